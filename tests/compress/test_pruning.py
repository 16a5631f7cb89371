"""Pruning from end to end: steps, floors, and what is left alone."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compress
from compress._remainder import remaining, remaining_table
from compress.batchnorm import reestimate
from compress.costs import CostTable
from compress.evaluation import evaluate
from compress.plan import PruningPlan
from compress.pruning import Iterative, OneShot, PruneResult, Step, prune
from compress.schedules import step_target
from compress.training import Distillation, FineTune, History
from lrp import errors

ROOT = Path(__file__).resolve().parents[2]
TARGET = compress.Target(macs=0.4)
EXAMPLE = torch.zeros(1, 2, 6, 6)


class Net(nn.Module):
    """A stem, a residual block, and a head that reads a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.outer, self.bn3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.pool, self.drop, self.head = nn.MaxPool2d(2), nn.Dropout(0.1), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn3(self.outer(torch.relu(self.bn2(self.inner(x))))))
        return self.head(self.drop(self.pool(x).flatten(1)))


def samples(n: int = 96) -> tuple[Tensor, Tensor]:
    """Three patterns in noise."""
    g = torch.Generator().manual_seed(3)
    y = torch.arange(n) % 3
    patterns = torch.randn(3, 2, 6, 6, generator=g)
    return 0.6 * patterns[y] + 0.5 * torch.randn(n, 2, 6, 6, generator=g), y


def batches(size: int = 24) -> list[tuple[Tensor, Tensor]]:
    x, y = samples()
    return list(zip(x.split(size), y.split(size), strict=True))


_TRAINED: dict[str, Tensor] = {}


def make_net() -> Net:
    """Trained once."""
    torch.manual_seed(1)
    net = Net()
    if not _TRAINED:
        FineTune(batches(), epochs=8, lr=0.05)(net)
        _TRAINED.update(copy.deepcopy(net.state_dict()))
    net.load_state_dict(_TRAINED)
    return net.eval()


@pytest.fixture
def net() -> Net:
    return make_net()


def run(net: nn.Module, **options: Any) -> PruneResult:
    """prune with what all tests share."""
    options = {"target": TARGET, "criterion": "weight", "round_to": 1, "progress": False, **options}
    return prune(net, EXAMPLE, options.pop("data", batches()), **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def same_results(a: PruneResult, b: PruneResult) -> None:
    assert same(a.model, b.model)
    assert a.plan.removed == b.plan.removed
    assert a.history == b.history
    assert (a.before, a.reached, a.stopped) == (b.before, b.reached, b.stopped)
    assert (a.evaluation_before, a.evaluation) == (b.evaluation_before, b.evaluation)
    assert str(a.classes) == str(b.classes)


# -- one shot ----------------------------------------------------------------------


def test_one_shot_is_its_parts_by_hand(net: Net) -> None:
    result = run(net, evaluate=batches())
    plan = compress.plan_pruning(net, EXAMPLE, batches(), criterion="weight", target=TARGET, round_to=1)
    expected = reestimate(plan.apply(net), batches())
    assert result.plan.removed == plan.removed
    assert same(result.model, expected)
    assert result.reached.macs <= 0.4 * result.before.macs
    assert result.reached == plan.after
    assert result.evaluation == evaluate(expected, batches())
    assert result.evaluation_before == evaluate(net, batches())
    (step,) = result.history
    assert (step.number, step.target, step.cut, step.after) == (1, TARGET, None, result.evaluation)
    bare = run(net, reestimate_batchnorm=False)
    assert same(bare.model, plan.apply(net))
    assert bare.evaluation is None


def test_the_model_stays_as_it_is(net: Net) -> None:
    net.train()
    net.bn2.eval()
    net.stem.requires_grad_(False)
    net.bn3.bias.requires_grad_(False)
    before, flags = copy.deepcopy(net), [m.training for m in net.modules()]
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    result = run(net, fine_tune=FineTune(batches(), epochs=1, lr=0.05), evaluate=batches(), schedule=Iterative(2))
    assert same(net, before)
    assert [m.training for m in net.modules()] == flags
    assert [m.training for m in result.model.modules()] == flags
    assert frozen == {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in result.model.named_parameters() if not p.requires_grad}
    # what is frozen was cut, and not trained
    kept = [j for j in range(16) if j not in result.plan.removed.get("stem", ())]
    assert len(kept) < 16
    assert torch.equal(result.model.stem.weight, net.stem.weight[kept])
    assert not hasattr(net, "_pruning_plan")


def test_random_states_are_put_back_and_the_seed_decides(net: Net) -> None:
    held = torch.get_rng_state()
    first = run(net, criterion="random", seed=1)
    assert torch.equal(torch.get_rng_state(), held)
    torch.manual_seed(50)
    same_results(run(net, criterion="random", seed=1), first)


# -- several steps -----------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["linear", "geometric"])
@pytest.mark.parametrize("rescore", ["per_step", "once"])
@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
def test_steps_lead_to_the_target(net: Net, spacing: str, rescore: str, kind: str) -> None:
    target = compress.Target(**{kind: 0.4})
    schedule = Iterative(3, spacing, rescore)
    result = run(net, target=target, schedule=schedule, evaluate=batches())
    before = getattr(result.before, kind)
    limits = schedule.limits(before, 0.4 * before)
    reached = [getattr(s.reached, kind) for s in result.history]
    assert len(reached) == 3
    assert all(r <= limit for r, limit in zip(reached, limits, strict=True))
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] == getattr(result.reached, kind)
    # one plan for the original network, also through JSON
    plan = PruningPlan.from_json(json.loads(json.dumps(result.plan.to_json())))
    fresh = plan.apply(make_net())
    fresh.load_state_dict(result.model.state_dict())
    x, _ = samples(5)
    assert torch.equal(fresh.eval()(x), result.model(x))
    assert plan.after == result.reached == CostTable.of(net, EXAMPLE, plan.structure).costs(plan.removed)


def test_iterative_is_its_steps_by_hand(net: Net) -> None:
    task = FineTune(batches(), epochs=1, lr=0.02)
    seeds: list[int] = []

    def train(model: nn.Module) -> History:
        seeds.append(torch.initial_seed())
        return task(model)

    result = run(net, schedule=Iterative(2), fine_tune=train, evaluate=batches())
    model: nn.Module = net
    for k, limit in enumerate(Iterative(2).limits(result.before.macs, 0.4 * result.before.macs)):
        plan = compress.plan_pruning(
            model, EXAMPLE, criterion="weight", target=step_target("macs", limit), round_to=1,
            floor={g.name: 2 for g in compress.find_groups(net, EXAMPLE).prunable},
        )  # fmt: skip
        model = reestimate(plan.apply(model), batches())
        assert result.history[k].cut == evaluate(model, batches())
        assert task(model) == result.history[k].training
        assert result.history[k].after == evaluate(model, batches())
    assert same(result.model, model)
    assert len(set(seeds)) == 2


def test_scores_are_those_of_the_network_as_it_is(net: Net) -> None:
    widths: list[int] = []

    def by_index(model: Any, data: Any) -> dict[str, Tensor]:
        widths.append(model.inner.out_channels)
        return {n: torch.arange(float(m.weight.shape[0])) for n, m in model.named_modules() if hasattr(m, "stride")
                and isinstance(m, nn.Conv2d)}  # fmt: skip

    per_step = run(net, criterion=by_index, schedule=Iterative(3))
    assert len(widths) == 3
    assert widths == sorted(widths, reverse=True)
    assert widths[2] < 16
    widths.clear()
    once = run(net, criterion=by_index, schedule=Iterative(3, rescore="once"))
    assert widths == [16]
    # the first channels go in both, and those that stay keep their own scores
    for result in (per_step, once):
        for name, channels in result.plan.removed.items():
            assert channels == tuple(range(len(channels))), name


def test_once_drops_the_scores_of_what_is_gone(net: Net) -> None:
    """Random scores drawn once: the steps remove, in their order, what one shot would."""
    scores = compress.score(net, EXAMPLE, batches(), criterion="random")
    one = run(net, criterion="random", scores=scores, target=compress.Target(channels=16))
    many = run(net, criterion="random", scores=scores, target=compress.Target(channels=16),
               schedule=Iterative(4, rescore="once"))  # fmt: skip
    assert one.plan.removed == many.plan.removed
    with pytest.raises(errors.InputError, match="scores anew"):
        run(net, scores=scores, schedule=Iterative(2))


def test_floors_are_of_the_original_widths(net: Net) -> None:
    """A share of the width that is left would let a group shrink without end."""
    result = run(net, target=compress.Target(channels=0.55), floor=0.5, schedule=Iterative(4))
    assert min(after for _, after in result.plan.widths.values()) >= 8
    with pytest.raises(errors.BudgetError):
        run(net, target=compress.Target(channels=0.4), floor=0.5, schedule=Iterative(4))


class Grouped(nn.Module):
    """A grouped convolution, a depthwise one, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 12, 3, padding=1), nn.Conv2d(2, 6, 1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=4)
        self.depthwise, self.head = nn.Conv2d(30, 30, 3, padding=1, groups=30), nn.Linear(30 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.relu(self.grouped(torch.relu(self.a(x)))), self.b(x)], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(torch.relu(self.depthwise(y)), 2).flatten(1))


@pytest.mark.parametrize("make", [Net, Grouped])
def test_what_remains_of_the_structure_is_that_of_the_smaller_network(make: type[nn.Module]) -> None:
    model = make().eval()
    structure = compress.find_groups(model, EXAMPLE)
    target = compress.Target(channels=0.6)
    # two stay: a group of one channel would count as protected in the smaller network
    plan = compress.plan_pruning(model, EXAMPLE, criterion="weight", target=target, round_to=1, floor=2)
    rest, small = remaining(structure, plan.removed), plan.apply(model)
    assert rest == compress.find_groups(small, EXAMPLE)
    assert rest != structure
    assert remaining(structure, {}) == structure
    left, found = remaining_table(plan.table, plan.removed), CostTable.of(small, EXAMPLE, rest)
    assert left.to_json() == found.to_json()
    assert left.costs({}) == plan.after


@pytest.mark.parametrize("first", ["a", "grouped"])
def test_grouped_convolutions_in_steps(first: str) -> None:
    """A grouped convolution that is left with one output per group is no depthwise one."""

    def criterion(model: Any, data: Any) -> dict[str, Tensor]:
        scores = {
            n: m.weight.detach().abs().flatten(1).sum(1) for n, m in model.named_modules() if hasattr(m, "stride")
        }
        scores[first] -= 100
        return scores

    model = Grouped().eval()
    target, schedule = compress.Target(macs=0.15), Iterative(4)
    result = run(model, target=target, criterion=criterion, floor=1, schedule=schedule, reestimate_batchnorm=False)
    assert result.history[1].reached.channels < result.history[0].reached.channels
    x, _ = samples(4)
    small = result.plan.apply(model)
    assert same(small, result.model)
    assert torch.equal(small(x), result.model(x))
    assert torch.allclose(result.plan.mask(model)(x), result.model(x), atol=1e-5)
    limits = schedule.limits(result.before.macs, 0.15 * result.before.macs)
    for step, limit in zip(result.history, limits, strict=True):
        assert 0.8 * limit < step.reached.macs <= limit


@pytest.mark.slow
def test_bytes_and_milliseconds(net: Net, tmp_path: Path) -> None:
    file = tmp_path / "file"
    compress.save(net, file)
    result = run(net, target=compress.Target(bytes=0.5), schedule=Iterative(2))
    whole = file.stat().st_size
    compress.save(result.model, file)
    assert file.stat().st_size <= whole / 2
    # a meter for which time is the size of the file
    result = run(net, target=compress.Target(latency_ms=0.5), schedule=Iterative(2), meter=kilobytes)
    assert result.before.latency_ms is not None
    assert result.reached.latency_ms is not None
    assert result.reached.latency_ms <= result.before.latency_ms / 2
    assert [s.reached.latency_ms for s in result.history][-1] == result.reached.latency_ms
    with pytest.raises(errors.BudgetError):
        run(net, target=compress.Target(latency_ms=0.01), meter=kilobytes, criterion=never, schedule=Iterative(2))


def kilobytes(path: Path) -> float:
    return path.stat().st_size / 1000


def test_fine_tuning_and_relevance_bring_accuracy_back(net: Net) -> None:
    assert evaluate(net, batches()).accuracy > 0.97
    bare = run(net, criterion="lrp", target=compress.Target(macs=0.15), evaluate=batches(), reestimate_batchnorm=False)
    tuned = run(
        net, criterion="lrp", target=compress.Target(macs=0.15), evaluate=batches(), schedule=Iterative(2),
        fine_tune=FineTune(batches(), epochs=6, lr=0.03, distill=Distillation(net)),
    )  # fmt: skip
    assert bare.evaluation is not None
    assert tuned.evaluation is not None
    assert bare.evaluation.accuracy < tuned.evaluation.accuracy
    assert tuned.evaluation.accuracy > 0.95
    for step in tuned.history:
        assert step.training is not None
        assert len(step.training.losses) == 6
        assert step.cut is not None
        assert step.after is not None
    assert tuned.history[0].training != tuned.history[1].training


def test_a_function_may_return_the_trained_network(net: Net) -> None:
    def elsewhere(model: nn.Module) -> nn.Module:
        out = copy.deepcopy(model)
        with torch.no_grad():
            out.head.bias += 1
        return out

    def in_place(model: nn.Module) -> None:
        with torch.no_grad():
            model.head.bias += 1

    first, second = run(net, fine_tune=elsewhere), run(net, fine_tune=in_place)
    assert same(first.model, second.model)
    assert torch.equal(first.model.head.bias, net.head.bias + 1)
    with pytest.raises(errors.MismatchError, match="names and shapes"):
        run(net, fine_tune=lambda model: make_net())


# -- the floor ---------------------------------------------------------------------


def accuracies(*values: float) -> Any:
    left = list(values)
    return lambda model: left.pop(0)


def test_a_step_below_the_floor_is_rolled_back(net: Net) -> None:
    result = run(net, schedule=Iterative(4), evaluate=accuracies(0.9, 0.88, 0.85, 0.79), accuracy_floor=0.8)
    assert result.stopped == "accuracy floor at step 3: 0.7900 < 0.8000; rolled back"
    assert [s.after.accuracy for s in result.history if s.after] == [0.88, 0.85, 0.79]
    assert result.evaluation is not None
    assert result.evaluation.accuracy == 0.85
    assert result.reached == result.history[1].reached
    assert result.plan.after == result.reached
    assert same(result.model, run(net, schedule=Iterative(4), evaluate=accuracies(0.9, 0.88, 0.85, 0.7),
                                  accuracy_floor=-0.1).model)  # fmt: skip
    assert result.stopped in str(result)


def test_a_first_step_below_the_floor_leaves_the_network_whole(net: Net) -> None:
    result = run(net, evaluate=accuracies(0.9, 0.85), accuracy_floor=-0.04)
    assert "0.8500 < 0.8600" in result.stopped
    assert result.plan.removed == {}
    assert same(result.model, net)
    assert result.model is not net
    assert result.reached == result.before
    exact = run(net, evaluate=accuracies(0.9, 0.85), accuracy_floor=0.85)
    assert exact.stopped == ""


def test_a_floor_that_makes_no_sense(net: Net) -> None:
    with pytest.raises(errors.InputError, match="evaluate"):
        run(net, accuracy_floor=0.5)
    with pytest.raises(errors.BudgetError, match="before anything is removed"):
        run(net, accuracy_floor=0.95, evaluate=lambda model: 0.9, criterion=never)


# -- what is refused ---------------------------------------------------------------


def never(model: nn.Module, data: Any) -> Any:
    raise AssertionError("called")


@pytest.mark.parametrize("schedule", [OneShot(), Iterative(3)])
def test_an_impossible_target_is_refused_before_any_work(net: Net, tmp_path: Path, schedule: Any) -> None:
    with pytest.raises(errors.BudgetError):
        run(net, target=compress.Target(macs=0.001), criterion=never, evaluate=lambda model: never(model, None),
            schedule=schedule, resume=tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": 0.5}, "Target"),
        ({"schedule": 3}, "OneShot"),
        ({"fine_tune": 3}, "FineTune"),
        ({"evaluate": 3}, "neither data nor a function"),
        ({"seed": -1}, "seed"),
        ({"rounds": 4}, "round_to"),
        ({"data": None}, "re-estimate"),
        ({"reestimate_data": iter([])}, "once only"),
    ],
)
def test_arguments_that_make_no_sense(net: Net, options: dict[str, Any], match: str) -> None:
    with pytest.raises(errors.InputError, match=match):
        run(net, **options)


def test_wrong_schedules() -> None:
    for options in ({"steps": 0}, {"steps": True}, {"spacing": "cubic"}, {"rescore": "never"}):
        with pytest.raises(errors.InputError, match="makes no sense"):
            Iterative(**options)


def test_statistics_from_other_data(net: Net) -> None:
    x, _ = samples()
    other = [5 * x]  # no labels
    result = run(net, data=None, reestimate_data=other)
    plan = compress.plan_pruning(net, EXAMPLE, criterion="weight", target=TARGET, round_to=1)
    assert same(result.model, reestimate(plan.apply(net), other))


# -- the report --------------------------------------------------------------------


def test_report_and_print(net: Net) -> None:
    result = run(net, criterion="lrp", schedule=Iterative(2), evaluate=batches(),
                 fine_tune=FineTune(batches(), epochs=1))  # fmt: skip
    report = json.loads(json.dumps(result.report, allow_nan=False))
    assert report["before"]["macs"] == result.before.macs
    assert report["reached"]["macs"] == result.reached.macs
    assert report["target"] == {"macs": 0.4}
    assert report["widths"]["inner"] == [16, result.model.inner.out_channels]
    assert report["filters"]["all"]["before"] == 51
    assert report["filters"]["prunable"]["before"] == 48
    assert report["filters"]["prunable"]["after"] == sum(
        getattr(result.model, n).out_channels for n in ("stem", "inner", "outer")
    )
    assert "output" in report["protected"]["head"]
    assert [Step.from_json(s) for s in report["history"]] == list(result.history)
    assert report["evaluation"]["after"]["accuracy"] == result.evaluation.accuracy
    assert len(report["classes"]["rows"]) == 3
    lines = str(result).splitlines()
    assert len(lines) == 4
    assert f"{result.reached.macs:,}" in lines[-1]


# -- resuming ----------------------------------------------------------------------


class StopsError(Exception):
    pass


class Bomb:
    """Goes off at its k-th touch."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.touched = at, error, 0

    def touch(self) -> None:
        self.touched += 1
        if self.touched == self.at:
            raise self.error


NOW = [Bomb(0, StopsError)]


def loader(seed: int = 3) -> Any:
    return DataLoader(
        TensorDataset(*samples()), batch_size=24, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


class Touching:
    """A loader that touches the bomb with every batch."""

    def __init__(self, data: Any) -> None:
        self.data, self.generator, self.batch_size = data, data.generator, data.batch_size

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for item in self.data:
            NOW[0].touch()
            yield item


def scored(model: nn.Module, data: Any) -> dict[str, Tensor]:
    """Depends on the weights, on the order of the data to rounding, and on random numbers."""
    NOW[0].touch()
    out = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            x, _ = next(iter(data))
            out[name] = m.weight.detach().abs().sum((1, 2, 3)) * (1 + x.std()) + 0.01 * torch.rand(m.out_channels)
    return out


def own_training(model: nn.Module) -> None:
    NOW[0].touch()
    noise = torch.randn(3)
    for x, y in batches():
        NOW[0].touch()
        loss = nn.functional.cross_entropy(model(x), y) + 0.1 * (model.head.bias * noise).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.05 * g


def everything(training: str, rescore: str = "per_step") -> dict[str, Any]:
    """All that can be interrupted."""
    tune: Any = own_training if training == "own" else FineTune(Touching(loader(4)), epochs=2, lr=0.02, progress=False)
    return {
        "data": Touching(loader(5)),
        "criterion": scored,
        "schedule": Iterative(3, rescore=rescore),
        "fine_tune": tune,
        "evaluate": Touching(loader(6)),
        "reestimate_data": Touching(loader(7)),
    }


@pytest.mark.parametrize(
    ("training", "rescore", "error"), [("own", "once", KeyboardInterrupt), ("fine_tune", "per_step", StopsError)]
)
def test_resume_from_anywhere(
    net: Net, tmp_path: Path, training: str, rescore: str, error: type[BaseException]
) -> None:
    NOW[0] = Bomb(0, error)
    expected = run(net, **everything(training, rescore))
    total = NOW[0].touched
    assert total > 50
    for at in range(1, total + 1, 7):
        folder = tmp_path / str(at)
        NOW[0] = Bomb(at, error)
        torch.manual_seed(at)
        with pytest.raises(error):
            run(net, resume=folder, **everything(training, rescore))
        NOW[0] = Bomb(0, error)
        result = run(net, resume=folder, **everything(training, rescore))
        same_results(result, expected)
        assert NOW[0].touched < total or at < 8  # in the first evaluation nothing is done yet
        assert {p.name for p in folder.iterdir()} == {"lock", "finished.state"}


def test_a_finished_run_returns_at_once(net: Net, tmp_path: Path) -> None:
    NOW[0] = Bomb(0, StopsError)
    options = everything("own")
    first = run(net, resume=tmp_path, accuracy_floor=0.1, **options)
    kept = (tmp_path / "finished.state").read_bytes()
    NOW[0] = Bomb(1, StopsError)
    same_results(run(net, resume=tmp_path, accuracy_floor=0.1, **options), first)
    assert (tmp_path / "finished.state").read_bytes() == kept


def test_a_run_that_was_stopped_by_the_floor_stays_so(net: Net, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": Iterative(3), "accuracy_floor": 0.8, "resume": tmp_path}
    first = run(net, evaluate=accuracies(0.9, 0.85, 0.7), **options)
    assert "step 2" in first.stopped
    again = run(net, evaluate=accuracies(), **options)
    same_results(again, first)


def test_after_an_interruption_only_what_is_missing_is_done(net: Net, tmp_path: Path) -> None:
    calls: list[str] = []

    def criterion(model: Any, data: Any) -> Any:
        calls.append(f"score {model.inner.out_channels}")
        return {n: m.weight.detach().abs().sum((1, 2, 3)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def train(model: Any) -> None:
        calls.append(f"train {model.inner.out_channels}")
        if len(calls) == 4:
            raise StopsError

    options: dict[str, Any] = {"criterion": criterion, "fine_tune": train, "schedule": Iterative(2), "resume": tmp_path}
    with pytest.raises(StopsError):
        run(net, **options)
    result = run(net, **options)
    width = result.model.inner.out_channels
    # the callback is called again, the criterion is not
    assert [c.split()[0] for c in calls] == ["score", "train", "score", "train", "train"]
    assert calls[3] == calls[4] == f"train {width}"


def test_resume_refuses_other_runs(net: Net, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": Iterative(2), "evaluate": batches(), "fine_tune": FineTune(batches())}
    run(net, resume=tmp_path, **options)
    kept = (tmp_path / "finished.state").read_bytes()
    others: list[tuple[str, dict[str, Any]]] = [
        ("target", {"target": compress.Target(macs=0.41)}),
        ("criterion", {"criterion": "random"}),
        ("schedule", {"schedule": Iterative(3)}),
        ("schedule", {"schedule": Iterative(2, rescore="once")}),
        ("fine_tune", {"fine_tune": FineTune(batches(), lr=0.1)}),
        ("fine_tune", {"fine_tune": None}),
        ("options", {"normalisation": "sum"}),
        ("accuracy_floor", {"accuracy_floor": 0.1}),
        ("reestimate_batchnorm", {"reestimate_batchnorm": False}),
        ("seed", {"seed": 1}),
        ("data", {"data": batches(12)}),
    ]
    for what, change in others:
        with pytest.raises(errors.MismatchError, match=rf"another run: {what}"):
            run(net, resume=tmp_path, **{**options, **change})
    with torch.no_grad():
        net.head.bias += 1e-3
    with pytest.raises(errors.MismatchError, match="weights"):
        run(net, resume=tmp_path, **options)
    assert (tmp_path / "finished.state").read_bytes() == kept


@pytest.mark.parametrize("name", ["finished.state", "step.state", "tuning-2.state"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_an_error_and_stays(net: Net, tmp_path: Path, name: str, how: str) -> None:
    NOW[0] = Bomb(0, StopsError)
    run(net, **everything("fine_tune"))
    total = NOW[0].touched
    NOW[0] = Bomb(total * 2 // 3 - 6, StopsError)  # in the training of step 2
    with pytest.raises(StopsError):
        run(net, resume=tmp_path, **everything("fine_tune"))
    path = tmp_path / name
    whole = path.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"lock", "finished.state", "step.state", "tuning-2.state"}
    damaged = {"truncated": whole[:-100], "empty": b"", "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]}[
        how
    ]
    path.write_bytes(damaged)
    held = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    NOW[0] = Bomb(0, StopsError)
    with pytest.raises(errors.FileFormatError, match=name):
        run(net, resume=tmp_path, **everything("fine_tune"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == held
    path.write_bytes(whole)
    run(net, resume=tmp_path, **everything("fine_tune"))


def test_a_full_disk(net: Net, tmp_path: Path) -> None:
    """The limit on the size of a file stands for the disk."""
    NOW[0] = Bomb(0, StopsError)
    expected = run(net, **everything("own"))
    NOW[0] = Bomb(expected_touches() * 2 // 3, StopsError)
    with pytest.raises(StopsError):
        run(net, resume=tmp_path, **everything("own"))
    kept = (tmp_path / "finished.state").read_bytes()
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    NOW[0] = Bomb(0, StopsError)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, old[1]))
        with pytest.raises(errors.DataError, match=r"can not be written.*goes on after"):
            run(net, resume=tmp_path, **everything("own"))
        with pytest.raises(errors.DataError, match="can not be written"):
            run(net, resume=tmp_path / "new", **everything("own"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "finished.state").read_bytes() == kept
    assert not list(tmp_path.rglob("*.part"))
    same_results(run(net, resume=tmp_path, **everything("own")), expected)


def expected_touches() -> int:
    return NOW[0].touched


SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
import test_pruning as t
from safetensors.torch import load_file
class Slow(t.Bomb):
    def touch(self):
        self.touched += 1
        print(self.touched, flush=True)
        time.sleep(0.01)
t.torch.set_num_threads(1)
t.NOW[0] = Slow(0, t.StopsError)
net = t.Net().eval()
net.load_state_dict(load_file(sys.argv[3]))
t.run(net, resume=sys.argv[1], **t.everything(sys.argv[2]))
"""


def killed(tmp_path: Path, training: str, after: int) -> None:
    """A process that works in the folder "run" and is killed after some touches."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(ROOT), str(Path(__file__).parent)]))
    save_file(make_net().state_dict(), tmp_path / "weights")
    command = [sys.executable, str(script), str(tmp_path / "run"), training, str(tmp_path / "weights")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= after:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are split over threads: bits depend on their number."""
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["own", "fine_tune"])
def test_resume_after_kills(net: Net, tmp_path: Path, training: str, one_thread: None) -> None:
    NOW[0] = Bomb(0, StopsError)
    expected = run(net, **everything(training))
    total, left = NOW[0].touched, []
    for share in (0.35, 0.35):  # the second lands later: it goes on where the first one was
        killed(tmp_path, training, int(share * total))
        left.append({p.name for p in (tmp_path / "run").iterdir()})
    assert all("finished.state" in names for names in left)
    NOW[0] = Bomb(0, StopsError)
    same_results(run(net, resume=tmp_path / "run", **everything(training)), expected)
    assert NOW[0].touched < total / 2
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"lock", "finished.state"}


def test_folders_that_can_not_be_used(net: Net, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for bad in (file, file / "below", Path("/proc/self/none")):
        with pytest.raises(errors.DataError, match="can not be used"):
            run(net, resume=bad)
    assert file.read_text() == "mine"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finished.state").write_text("mine")
    with pytest.raises(errors.FileFormatError):
        run(net, resume=tmp_path / "run")
    assert (tmp_path / "run" / "finished.state").read_text() == "mine"


def test_one_process_at_a_time(net: Net, tmp_path: Path) -> None:
    def second(model: nn.Module) -> None:
        with pytest.raises(errors.DataError, match="another process is at work"):
            run(net, resume=tmp_path)

    run(net, resume=tmp_path, fine_tune=second)


def test_loaders_without_their_generators(net: Net, tmp_path: Path) -> None:
    NOW[0] = Bomb(0, StopsError)
    run(net, resume=tmp_path, data=loader())
    plain = DataLoader(TensorDataset(*samples()), batch_size=24)
    with pytest.raises(errors.MismatchError, match="generators"):
        run(net, resume=tmp_path, data=plain)


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cuda"])
def test_on_a_gpu(net: Net, tmp_path: Path, device: str | None) -> None:
    model = net if device else net.cuda()
    options: dict[str, Any] = {
        "schedule": Iterative(2), "evaluate": batches(), "criterion": "lrp", "device": device, "resume": tmp_path,
        "fine_tune": FineTune(batches(), epochs=3, lr=0.02),
    }  # fmt: skip
    result = run(model, **options)
    assert next(result.model.parameters()).device.type == ("cpu" if device else "cuda")
    assert result.evaluation is not None
    assert result.evaluation.accuracy > 0.9
    assert result.reached.macs <= 0.4 * result.before.macs
    same_results(run(model, **options), result)


def test_a_structure_that_is_given_is_checked_and_protected(net: Net) -> None:
    structure = compress.find_groups(net, EXAMPLE)
    name = structure.prunable[0].name
    result = run(net, target=compress.Target(channels=0.8), structure=structure, protect=name)
    assert result.plan.widths.get(name, (0, 0))[0] == result.plan.widths.get(name, (0, 0))[1]
    other = compress.find_groups(Grouped().eval(), EXAMPLE)
    with pytest.raises(errors.MismatchError):
        run(net, target=compress.Target(channels=0.8), structure=other)


def test_other_scores_or_another_structure_are_another_run(net: Net, tmp_path: Path) -> None:
    first, second = (compress.score(net, EXAMPLE, batches(), criterion=f"random:{k}") for k in (1, 1))
    changed = compress.Scores(
        {n: t.flip(0) for n, t in second.values.items()}, {}, second.name, second.settings, second.samples
    )
    target = compress.Target(channels=0.6)
    given = {"criterion": "random:1", "target": target, "resume": tmp_path / "state"}
    done = run(net, scores=first, **given)
    assert run(net, scores=second, **given).plan.removed == done.plan.removed
    with pytest.raises(errors.MismatchError):
        run(net, scores=changed, **given)
    structure = compress.find_groups(net, EXAMPLE)
    with pytest.raises(errors.MismatchError):
        run(net, scores=first, structure=structure, **given)


@pytest.mark.parametrize("floor", ["0.5", float("nan"), True])
def test_a_floor_that_is_no_number_is_refused(net: Net, floor: Any) -> None:
    with pytest.raises(errors.InputError, match="accuracy_floor"):
        run(net, target=compress.Target(channels=0.8), evaluate=batches(), accuracy_floor=floor)
