"""Sensitivity: every cell against a masked network computed by hand, and a cache that is never stale."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import analysed
import matplotlib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress.batchnorm import reestimate
from compress.evaluation import evaluate
from compress.groups import Group, Member
from compress.plan import PruningPlan
from compress.sensitivity import Row, Sensitivity, least, sensitivity
from lrp.errors import BudgetError, InputError, MismatchError, NonFiniteError

matplotlib.use("Agg")
RATES = (0.1, 0.35, 0.7, 0.95)
PRODUCERS = {"stem": ("stem", "outer"), "inner": ("inner",), "top": ("top",), "hidden": ("hidden",)}


def masked(m: analysed.Small, x: Tensor, silent: dict[str, list[int]]) -> Tensor:
    """The network with silent channels, written out."""

    def hush(x: Tensor, name: str) -> Tensor:
        keep = torch.ones(x.shape[1], dtype=x.dtype)
        keep[silent.get(name, [])] = 0
        return x * keep.reshape(1, -1, *(1,) * (x.dim() - 2))

    x = hush(F.max_pool2d(F.relu(m.bn0(m.stem(x))), 2), "stem")
    y = hush(F.relu(m.bn1(m.inner(x))), "inner")
    x = F.relu(x + hush(m.bn2(m.outer(y)), "stem"))
    x = hush(F.relu(m.bn3(m.top(x))), "top").mean((2, 3))
    return m.head(hush(F.relu(m.hidden(x)), "hidden"))


def magnitudes(m: analysed.Small, group: str) -> Tensor:
    """Mean L1 norm over the coupled layers."""
    rows = [dict(m.named_modules())[n].weight.detach().double().flatten(1).abs().sum(1) for n in PRODUCERS[group]]
    return torch.stack(rows).mean(0)


def test_every_cell_is_the_accuracy_of_a_network_masked_by_hand() -> None:
    model = analysed.trained().double()
    x, y = (t.double() if t.is_floating_point() else t for t in analysed.split()["validation"])
    before = copy.deepcopy(model.state_dict())
    model.train()
    found = sensitivity(
        model, analysed.EXAMPLE.double(), criterion="weight", evaluate=[(x, y)], rates=RATES, progress=False,
        normalisation="none",
    )  # fmt: skip
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()
    assert found.baseline == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    assert [row.name for row in found.rows] == list(PRODUCERS)
    seen = set()
    for row, (k, rate) in itertools.product(found.rows, enumerate(RATES)):
        own = magnitudes(model, row.name)
        gone = own.argsort()[: min(math.floor(rate * len(own) + 1e-9), len(own) - 1)].tolist()
        expected = float((masked(model, x, {row.name: gone}).argmax(1) == y).double().mean())
        assert row.accuracy[k] == pytest.approx(expected), (row.name, rate)
        assert row.removed[k] == len(gone)
        seen.add(expected)
    assert len(seen) > 8  # the groups differ, and so do the rates


def test_patterns_remove_from_all_their_groups_together() -> None:
    model, data = analysed.trained(), analysed.batches("validation")
    x, y = analysed.split()["validation"]
    found = sensitivity(
        model, analysed.EXAMPLE, criterion="weight", evaluate=data, rates=(0.4,), per=["[it]*", "outer"],
        normalisation="none", progress=False,
    )  # fmt: skip
    gone = {
        n: magnitudes(model, n).argsort()[: math.floor(0.4 * len(magnitudes(model, n)))].tolist() for n in PRODUCERS
    }
    both = {n: gone[n] for n in ("inner", "top")}
    assert [(row.name, row.groups, row.width) for row in found.rows] == [
        ("[it]*", ("inner", "top"), 26),
        ("outer", ("stem",), 12),
    ]
    for row, silent in zip(found.rows, (both, {"stem": gone["stem"]}), strict=True):
        expected = float((masked(model, x, silent).argmax(1) == y).double().mean())
        assert row.accuracy[0] == pytest.approx(expected)
        assert row.removed == (sum(map(len, silent.values())),)
    with pytest.raises(InputError, match="'nothing' fits no layer"):
        sensitivity(model, analysed.EXAMPLE, criterion="weight", evaluate=data, per="nothing")


def test_statistics_are_reestimated_after_the_cut() -> None:
    model, data, few = analysed.trained(), analysed.batches("validation"), analysed.batches("train", 100)
    found = sensitivity(
        model, analysed.EXAMPLE, few, criterion="weight", evaluate=data, rates=(0.5,), reestimate_batchnorm=True,
        normalisation="none",
    )  # fmt: skip
    plain = sensitivity(model, analysed.EXAMPLE, few, criterion="weight", evaluate=data, rates=(0.5,))
    structure = compress.find_groups(model, analysed.EXAMPLE)
    table = compress.costs.CostTable.of(model, analysed.EXAMPLE, structure)
    for name in PRODUCERS:
        own = magnitudes(model, name)
        plan = PruningPlan(structure, table, {name: tuple(own.argsort()[: len(own) // 2].tolist())})
        small = reestimate(plan.apply(model), few)
        assert found[name].accuracy[0] == evaluate(small, data).accuracy
    assert [r.accuracy for r in found.rows] != [r.accuracy for r in plain.rows]
    assert "re-estimated" in str(found)
    with pytest.raises(InputError, match="without data"):
        sensitivity(model, analysed.EXAMPLE, criterion="weight", evaluate=data, reestimate_batchnorm=True)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.floats(0, 0.999), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_least_important_whole_units_go_within_the_rate(sizes: list[int], rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = list(itertools.accumulate(sizes, initial=0))
    units = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))
    group = Group("g", ends[-1], units, (Member("g", "out", "Conv2d", tuple((i,) for i in range(ends[-1]))),))
    values = torch.randint(0, 4, (len(units),), generator=generator).double()
    own = torch.cat([values[k].repeat(n) for k, n in enumerate(sizes)])
    gone = least(group, own, rate)
    order = sorted(range(len(units)), key=lambda k: (float(values[k]), k))
    expected: list[int] = []
    for k in order[:-1]:  # the most important unit always stays
        if len(expected) + sizes[k] > rate * group.width + 1e-9:
            break
        expected += units[k]
    assert gone == tuple(sorted(expected))
    assert len(gone) < group.width


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_layer_keeps_a_channel(data: st.DataObject) -> None:
    """Also those that make only some of the channels; what they spare leaves room for the next in the order."""
    width = data.draw(st.integers(2, 10))
    layers = data.draw(st.lists(st.sets(st.integers(0, width - 1), min_size=1), max_size=4))
    values = data.draw(st.lists(st.integers(0, 3), min_size=width, max_size=width))
    rate = data.draw(st.floats(0, 0.999))
    own = tuple((j,) for j in range(width))
    members = [Member("all", "out", "Linear", own)]
    for k, made_here in enumerate(layers):
        index = tuple((sorted(made_here).index(j),) if j in made_here else () for j in range(width))
        members.append(Member(f"some{k}", "out", "Linear", index))
    gone = least(Group("g", width, own, tuple(members)), torch.tensor(values).double(), rate)
    expected: set[int] = set()
    for j in sorted(range(width), key=lambda j: (values[j], j))[:-1]:
        if any(layer <= expected | {j} for layer in layers):
            continue
        if len(expected) + 1 > rate * width + 1e-9:
            break
        expected.add(j)
    assert gone == tuple(sorted(expected))
    assert all(layer - set(gone) for layer in layers)


class Spread(nn.Module):
    """Layers that make only a part of the channels of their group."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.p, self.q = (nn.Conv2d(1, n, 1) for n in (8, 2, 6))
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.skip(x) + torch.cat([self.p(x), self.q(x)], 1)).relu()).mean((2, 3))  # type: ignore[no-any-return]


def test_a_layer_that_makes_few_channels_is_not_emptied() -> None:
    torch.manual_seed(0)
    model = Spread().eval()
    with torch.no_grad():
        sizes = torch.tensor([2.0, 1, 3, 4, 5, 6, 7, 8]) / 8  # those that p makes are the least
        model.skip.weight.copy_(sizes.view(8, 1, 1, 1))
        model.p.weight.fill_(0.01)
        model.q.weight.fill_(0.01)
        model.out.bias.zero_()
        for layer in (model.skip, model.p, model.q):
            layer.bias.copy_(torch.linspace(0, 1, len(layer.bias)))  # nothing is dead
    x = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(1))

    def share(model: nn.Module) -> float:
        """The mean probability of the first class, which every channel moves."""
        with torch.no_grad():
            return float(model(x).softmax(1)[:, 0].mean())

    found = sensitivity(
        model, x[:1], criterion="weight", evaluate=share, rates=(0.125, 0.25, 0.5, 0.9), normalisation="none",
        progress=False,
    )  # fmt: skip
    (row,) = found.rows
    assert (row.width, row.removed) == (8, (1, 2, 4, 6))  # p and q keep one each
    for gone, value in zip(([1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]), row.accuracy, strict=True):
        keep = torch.ones(8).index_fill(0, torch.tensor(gone), 0).view(1, 8, 1, 1)
        hidden = model.skip(x) + torch.cat([model.p(x), model.q(x)], 1)
        expected = model.out(hidden.relu() * keep).mean((2, 3)).softmax(1)[:, 0].mean()
        assert value == pytest.approx(float(expected.detach()), abs=1e-6)
    assert len({round(value, 4) for value in (share(model), *row.accuracy)}) == 5


def made(**more: Any) -> Sensitivity:
    rows = (
        Row("a.1", ("a.1",), 10, (0.90, 0.895, 0.80), (1, 2, 5)),
        Row("b", ("b",), 8, (0.88, 0.91, 0.91), (0, 1, 4)),
        Row("c", ("c",), 8, (0.90, 0.90, 0.8900000000000001), (0, 1, 4)),
    )
    return Sensitivity((0.1, 0.2, 0.5), rows, 0.9, **more)


def test_robust_rates_and_floors_by_hand() -> None:
    found = made()
    assert found.robust(0.01) == {"a.1": 0.2, "b": 0.0, "c": 0.5}  # of b, the dip at the first rate counts
    assert found.robust(0.0) == {"a.1": 0.1, "b": 0.0, "c": 0.2}
    assert found.robust(0.5) == dict.fromkeys(("a.1", "b", "c"), 0.5)
    assert found.floors(0.01) == {"a.1": 0.8, "b": 1.0, "c": 0.5, "*": 0.1}
    assert found["b"].removed == (0, 1, 4)
    for wrong in (-0.1, math.nan, math.inf, "0.1", True):
        with pytest.raises(InputError, match="no loss"):
            found.robust(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no row 'd'"):
        found["d"]


def test_a_plan_keeps_to_the_floors() -> None:
    model, data = analysed.trained(), analysed.batches("validation")
    found = sensitivity(model, analysed.EXAMPLE, criterion="weight", evaluate=data, rates=(0.1, 0.2, 0.3, 0.5))
    robust, floors = found.robust(0.1), found.floors(0.1)
    assert len(set(robust.values())) > 1
    allowed = {row.name: math.floor(robust[row.name] * row.width + 1e-9) for row in found.rows}
    options: dict[str, Any] = {"criterion": "weight", "floor": floors, "round_to": 1}
    target = compress.Target(channels=52 - sum(allowed.values()))
    plan = compress.plan_pruning(model, analysed.EXAMPLE, target=target, **options)
    assert {name: before - after for name, (before, after) in plan.widths.items()} == allowed
    target = compress.Target(channels=51 - sum(allowed.values()))
    with pytest.raises(BudgetError):
        compress.plan_pruning(model, analysed.EXAMPLE, target=target, **options)


def test_it_prints_draws_and_is_kept(tmp_path: Path) -> None:
    found = made(count=200, unscored={"gate": "no relevance"}, settings={"reestimate_batchnorm": False})
    lines = str(found).splitlines()
    assert lines[0].split() == ["group", "channels", "-10%", "-20%", "-50%"]
    assert lines[1].split() == ["a.1", "10", "0.9000", "0.8950", "0.8000"]
    assert lines[4].startswith("baseline 0.9000 (95 % interval 0.8")
    assert lines[5] == "gate: not measured, no relevance"
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found
    ax = found.plot(drop=0.01)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a.1", "b", "c"]
    assert [line.get_xdata()[0] for line in ax.lines] == [1.5, -0.5, 2.5]  # after two rates, none, and all
    assert made().plot(ax) is ax
    matplotlib.pyplot.close("all")


def test_groups_without_a_score_are_named_and_not_measured() -> None:
    model, data = analysed.trained(), analysed.batches("validation", 100)

    def some(model: nn.Module, data: Any) -> dict[str, Tensor]:
        return {"inner": torch.arange(10.0), "hidden": torch.arange(14.0)}

    found = sensitivity(model, analysed.EXAMPLE, criterion=some, evaluate=data, rates=(0.5,))
    assert [row.name for row in found.rows] == ["inner", "hidden"]
    assert set(found.unscored) == {"stem", "top"}


def test_relevance_runs_and_errors_are_typed() -> None:
    model, data, few = analysed.trained(), analysed.batches("validation", 100), analysed.batches("train", 20)
    found = sensitivity(model, analysed.EXAMPLE, few, evaluate=data, rates=(0.3,), progress=False)
    assert found.settings["criterion"]["name"] == "lrp:epsilon"
    assert found.settings["samples"] == 20
    with pytest.raises(InputError, match="evaluate is missing"):
        sensitivity(model, analysed.EXAMPLE, few, evaluate=None)
    with pytest.raises(InputError, match="no shares"):
        sensitivity(model, analysed.EXAMPLE, few, evaluate=data, rates=(1.0,))
    with pytest.raises(NonFiniteError):
        sensitivity(model, analysed.EXAMPLE, few, evaluate=lambda model: math.nan)


class Counting:
    """Counts in its class, which is no part of what tells it from others."""

    calls: ClassVar[int] = 0

    def __call__(self, model: nn.Module) -> float:
        Counting.calls += 1
        return evaluate(model, analysed.batches("validation", 100)).accuracy


def counted(path: Path, rates: Any = (0.3, 0.6), **options: Any) -> tuple[Sensitivity, int]:
    Counting.calls = 0
    given: dict[str, Any] = {"model": analysed.trained(), "data": None, "criterion": "weight", "evaluate": Counting()}
    given |= options
    model, data = given.pop("model"), given.pop("data")
    found = sensitivity(model, analysed.EXAMPLE, data, rates=rates, cache=path, **given)
    return found, Counting.calls


def test_a_cache_answers_and_is_extended(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    first, calls = counted(path)
    assert calls == 1 + 4 * 2
    assert counted(path) == (first, 0)
    more, calls = counted(path, (0.3, 0.45, 0.6))
    assert calls == 4
    assert [(r.accuracy[0], r.accuracy[2]) for r in more.rows] == [r.accuracy for r in first.rows]
    pair, calls = counted(path, (0.3,), per=["inner", "[it]*"])
    assert calls == 1
    assert pair["inner"].accuracy == first["inner"].accuracy[:1]


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("criterion", {"criterion": "weight:l2"}),
        ("data", {"data": [torch.zeros(3, 1, 8, 8)]}),
        ("evaluate", {"evaluate": [(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]))]}),
        ("normalisation", {"normalisation": "sum"}),
        ("groups", {"structure": "protected"}),
        ("weights", {"model": "other"}),
    ],
)
def test_a_stale_cache_is_refused(tmp_path: Path, named: str, options: dict[str, Any]) -> None:
    path = tmp_path / "cache"
    counted(path)
    held = path.read_bytes()
    if named == "groups":
        options = {"structure": compress.find_groups(analysed.trained(), analysed.EXAMPLE, protect="top")}
    if named == "weights":
        other = analysed.trained()
        other.head.bias.data[0] += 1e-3
        options = {"model": other}
    with pytest.raises(MismatchError, match=f"stale: its '{named}' differs"):
        counted(path, **options)
    assert path.read_bytes() == held


KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    import analysed
    from compress.evaluation import evaluate
    from compress.sensitivity import sensitivity

    class Fragile:
        calls = 0
        def __call__(self, model):
            Fragile.calls += 1
            if os.environ.get("KILL") == str(Fragile.calls):
                os.kill(os.getpid(), signal.SIGKILL)
            return evaluate(model, analysed.batches("validation", 100)).accuracy

    found = sensitivity(analysed.trained(), analysed.EXAMPLE, analysed.batches("train", 20), criterion="lrp",
                        evaluate=Fragile(), rates=(0.3, 0.6), cache=sys.argv[1] or None, progress=False)
    print(Fragile.calls)
    print(found.to_json())
"""


@pytest.mark.slow
def test_kill_9_and_resume_give_the_same_table(tmp_path: Path) -> None:
    def run(path: Path | str, kill: int = 0) -> tuple[int, list[str]]:
        code = textwrap.dedent(KILLED)
        command = [sys.executable, "-c", code, str(path), str(Path(analysed.__file__).parent)]
        root = str(Path(compress.__file__).parent.parent)
        environment = {**os.environ, "KILL": str(kill), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    path = tmp_path / "cache"
    code, _ = run(path, kill=5)
    assert code == -signal.SIGKILL
    code, second = run(path)
    assert code == 0
    assert second[0] == "5"  # of nine evaluations, four were there
    _, whole = run("")
    assert whole[0] == "9"
    assert second[1] == whole[1]
