"""Pruning from end to end: steps, floors, and what is left alone."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned import EXAMPLE, TARGET, Net, accuracies, batches, make_net, run, same, same_results, samples
from torch import Tensor, nn

import compress
from compress._remainder import remaining, remaining_table
from compress.batchnorm import reestimate
from compress.costs import CostTable
from compress.evaluation import evaluate
from compress.plan import PruningPlan
from compress.pruning import Iterative, OneShot, Step
from compress.schedules import step_target
from compress.training import Distillation, FineTune, History
from lrp import errors

# small nets are judged by the samples they were ranked on, which prune warns of
pytestmark = pytest.mark.filterwarnings("ignore:evaluate= and data= are not apart")


@pytest.fixture
def net() -> Net:
    return make_net()


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


@pytest.mark.parametrize("schedule", [OneShot(), Iterative(2)])
def test_a_target_that_is_met_leaves_the_network_as_it_is(net: Net, tmp_path: Path, schedule: Any) -> None:
    shifted = [(x + 1, y) for x, y in batches()]  # new statistics would be others
    for _ in range(2):  # the second reads what the first has written
        result = run(
            net, target=compress.Target(macs=10**9), schedule=schedule, evaluate=batches(), criterion=never,
            reestimate_data=shifted, fine_tune=never, resume=tmp_path,
        )  # fmt: skip
        assert "met as it is" in result.stopped
        assert same(result.model, net)
        assert (result.history, result.plan.removed) == ((), {})
        assert result.evaluation == result.evaluation_before
        found = compress.report(result, original=net, meter=None)
        assert found.met
        assert any("met as it is" in sentence for sentence in found.sentences)


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


def test_once_drops_the_scores_of_layers_that_make_some_channels() -> None:
    """Channel 7 of the group is channel 1 of a layer that makes the second half."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skip, self.p, self.q = nn.Conv2d(2, 12, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(2, 6, 1)
            self.fc = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.skip(x) + torch.cat([self.p(x), self.q(x)], 1)).mean((2, 3)))

    torch.manual_seed(0)
    net = Halves()
    one = run(net, criterion="random", target=compress.Target(channels=5), normalisation="none")
    many = run(net, criterion="random", target=compress.Target(channels=5), normalisation="none",
               schedule=Iterative(4, rescore="once"))  # fmt: skip
    assert max(one.plan.removed["skip"]) > 6
    assert one.plan.removed == many.plan.removed


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


def test_judged_by_what_it_was_ranked_on(net: Net) -> None:
    x, y = samples()
    with pytest.warns(UserWarning, match="evaluate= and data= are not apart"):
        run(net, data=[(x[:48], y[:48])], evaluate=[(x[40:], y[40:])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net, data=[(x[:48], y[:48])], evaluate=[(x[48:], y[48:])])
