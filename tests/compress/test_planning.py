"""Planning: the greedy choice against brute force, targets met to one piece, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BY_NAME, NETWORKS, hard, plain, structure_of
from torch import Tensor, nn

import compress
from compress.costs import CostTable, count
from compress.criteria.scores import Scores
from compress.groups import Structure, find_groups
from compress.plan import PruningPlan
from compress.planning import plan_pruning, score
from compress.ranking import Ranking
from compress.storage import file_size
from compress.target import Target
from lrp import errors

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.tensor([0, 1]))]
FREE: dict[str, Any] = {"floor": 0, "round_to": 1}


def given_scores(values: Mapping[str, Any], **more: Any) -> Scores:
    tensors = {n: torch.as_tensor(v, dtype=torch.float64) for n, v in values.items()}
    return Scores(values=tensors, **{"unscored": {}, "name": "given", "settings": {}, "samples": 0, **more})


def random_scores(model: nn.Module, structure: Structure, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for layer in structure.layers:
        module: Any = model.get_submodule(layer)
        width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        out[layer] = torch.rand(width, generator=generator, dtype=torch.float64)
    return given_scores(out)


def chain(*widths: int) -> tuple[nn.Module, Tensor, Structure, CostTable]:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    model, x = nn.Sequential(*layers[:-1]), torch.randn(1, widths[0])
    structure = find_groups(model, x, prove=False)
    return model, x, structure, CostTable.of(model, x, structure)


def plan_of(model: nn.Module, x: Any, target: Target, **options: Any) -> PruningPlan:
    return plan_pruning(model, x, None, target=target, **options)


# -- against brute force ----------------------------------------------------
def greedy_slowly(
    structure: Structure, scores: Mapping[str, list[float]], cost: Any, limit: float
) -> dict[str, list[int]]:
    """Single channels, no rounding, one stays everywhere: remove the smallest, then put back the largest that fit."""
    order = sorted((scores[g.name][j], k, j, g.name) for k, g in enumerate(structure.prunable) for j in range(g.width))
    last = {g.name: max((scores[g.name][j], j) for j in range(g.width))[1] for g in structure.prunable}
    gone: list[tuple[str, int]] = []

    def as_dict(pairs: list[tuple[str, int]]) -> dict[str, list[int]]:
        return {g.name: sorted(j for n, j in pairs if n == g.name) for g in structure.prunable}

    for _, _, j, name in order:
        if cost(as_dict(gone)) <= limit:
            break
        if j != last[name]:
            gone.append((name, j))
    blocked: set[str] = set()
    for name, j in list(gone)[::-1]:
        if name in blocked:
            continue
        without = [p for p in gone if p != (name, j)]
        if cost(as_dict(without)) <= limit:
            gone = without
        else:
            blocked.add(name)
    return {n: c for n, c in as_dict(gone).items() if c}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_greedy_choice_by_loops(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    model, x, structure, table = chain(3, *widths, 2)
    kind = data.draw(st.sampled_from(["channels", "macs", "params"]))
    own = st.one_of(st.sampled_from([0.0, 0.1, 0.2]), st.floats(-1, 1))
    scores = {g.name: data.draw(st.lists(own, min_size=g.width, max_size=g.width)) for g in structure.prunable}

    def cost(removed: dict[str, list[int]]) -> int:
        left = [3, *(w - len(removed.get(str(2 * k), ())) for k, w in enumerate(widths)), 2]
        macs = sum(i * o for i, o in itertools.pairwise(left))
        channels = sum(g.width - len(removed.get(g.name, ())) for g in structure.prunable)
        return {"channels": channels, "macs": macs, "params": macs + sum(left[1:])}[kind]

    least = cost({g.name: list(range(1, g.width)) for g in structure.prunable})
    limit = data.draw(st.integers(max(1, least), max(1, cost({}))))
    plan = plan_of(
        model, x, Target(**{kind: limit}), scores=given_scores(scores), structure=structure, table=table,
        normalisation="none", **FREE,
    )  # fmt: skip
    assert {n: list(c) for n, c in plan.removed.items()} == greedy_slowly(structure, scores, cost, limit)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_more_than_the_target_and_nothing_could_stay(data: st.DataObject) -> None:
    """Reached <= asked; by brute force, no block that was removed can be put back."""
    widths = data.draw(st.lists(st.integers(2, 20), min_size=1, max_size=3))
    model, x, structure, table = chain(3, *widths, 2)
    kind = data.draw(st.sampled_from(["channels", "macs", "params"]))
    ranking = Ranking(
        normalisation=data.draw(st.sampled_from(["none", "sum", "mean", "l2"])),
        scope=data.draw(st.sampled_from(["global", "local", "isomorphic"])),
        floor=data.draw(st.sampled_from([0, 1, 0.1, 0.3])),
        round_to=data.draw(st.sampled_from([1, 2, 4])),
    )
    scores = random_scores(model, structure, data.draw(st.integers(0, 99)))
    share = data.draw(st.floats(0.05, 1.0))
    options = {k: getattr(ranking, k) for k in ("normalisation", "scope", "floor", "round_to")}
    before = getattr(table.costs({}), kind)
    try:
        plan = plan_of(model, x, Target(**{kind: share}), scores=scores, structure=structure, table=table, **options)
    except errors.BudgetError:
        smallest = {}
        for g in structure.prunable:
            fits = [w for w in range(ranking.kept(g), g.width) if w % ranking.block(g) == 0]
            smallest[g.name] = range(g.width - min(fits, default=g.width))
        assert getattr(table.costs(smallest), kind) > share * before
        return
    reached = getattr(plan.after, kind)
    assert Fraction(reached) <= Fraction(share) * before * (1 + Fraction(1, 10**12))
    for g in structure.prunable:
        gone = plan.removed.get(g.name, ())
        left = g.width - len(gone)
        assert left == g.width or (left % ranking.block(g) == 0 and left >= ranking.kept(g))
    nothing_could_stay(plan, ranking, share * before)


@pytest.mark.parametrize("name", [c.name for c in NETWORKS if c.free])
@pytest.mark.parametrize("kind", ["channels", "macs", "params"])
def test_networks_of_every_kind(name: str, kind: str) -> None:
    case, structure = BY_NAME[name], structure_of(name)
    model, inputs = case.model(), case.inputs()
    table = CostTable.of(model, inputs, structure)
    scores = random_scores(model, structure)
    most = table.costs({g.name: [j for u in g.units[:-1] for j in u] for g in structure.prunable})
    low, high = max(1, getattr(most, kind)), getattr(table.costs({}), kind)
    for limit in (low, (low + high) // 2, high):
        plan = plan_of(model, inputs, Target(**{kind: limit}), scores=scores, structure=structure, table=table, **FREE)
        small = plan.apply(model)
        counted = count(small, inputs, structure)
        assert getattr(plan.after, kind) <= limit
        assert (counted.macs, counted.params) == (plan.after.macs, plan.after.params)
        assert plan.widths == {
            g.name: (g.width, g.width - len(plan.removed.get(g.name, ()))) for g in structure.prunable
        }
        if limit == high:
            assert not plan.removed
        for g in structure.prunable:
            gone = set(plan.removed.get(g.name, ()))
            assert all(set(u) <= gone or not set(u) & gone for u in g.units)


# -- trap 1 and 2: exact counts ---------------------------------------------
def test_ties_at_zero_do_not_take_more_than_asked() -> None:
    """Two fifths of all scores are exactly zero; a tenth is to go."""
    model, x, structure, table = chain(3, 40, 60, 2)
    zeros = {"0": [0.0] * 16 + [1.0] * 24, "2": [0.0] * 24 + [1.0] * 36}
    plan = plan_of(model, x, Target(channels=0.9), scores=given_scores(zeros), structure=structure, table=table, **FREE)
    assert sum(len(c) for c in plan.removed.values()) == 10
    assert plan.removed == {"0": tuple(range(10))}


@pytest.mark.parametrize("percent", range(5, 100, 6))
@pytest.mark.parametrize("total", [20, 64, 100])
def test_shares_of_channels_are_exact(percent: int, total: int) -> None:
    """However many scores are equal: as many channels stay as fit into the share."""
    model, x, structure, table = chain(3, total, 2)
    scores = given_scores({"0": [float(j % 3 == 0) for j in range(total)]})
    plan = plan_of(model, x, Target(channels=percent / 100), scores=scores, structure=structure, table=table, **FREE)
    assert plan.after.channels == max(1, math.floor(Fraction(percent, 100) * total))


@pytest.mark.parametrize("round_to", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
def test_rounding_never_exceeds_the_target_and_misses_it_by_less_than_a_block(round_to: int, share: float) -> None:
    model, x, structure, table = chain(32, 32, 40, 36, 4)
    plan = plan_of(
        model, x, Target(macs=share), scores=random_scores(model, structure), structure=structure, table=table,
        floor=0, round_to=round_to,
    )  # fmt: skip
    assert plan.after.macs <= share * plan.before.macs
    nothing_could_stay(plan, Ranking(floor=0, round_to=round_to), share * plan.before.macs)
    assert all(after == before or after % round_to == 0 for before, after in plan.widths.values())
    assert '"target": {"macs": ' in json.dumps(dict(plan.settings))
    assert f"{plan.after.macs / plan.before.macs:.1%}" in str(plan), "asked and reached are both shown"
    assert f'target: {{"macs": {share}}}' in str(plan)


def nothing_could_stay(plan: PruningPlan, ranking: Ranking, limit: float) -> None:
    """The block that a group lost last would exceed the limit, group by group."""
    kind = Target.from_json(plan.settings["target"]).kind
    for g in plan.structure.prunable:
        gone = plan.removed.get(g.name, ())
        left = g.width - len(gone)
        if gone:
            wider = next(w for w in range(left + 1, g.width + 1) if w == g.width or w % ranking.block(g) == 0)
            back = sorted(gone, key=lambda j: (plan.scores[g.name][j], j))[: g.width - wider]
            more = getattr(plan.table.costs({**plan.removed, g.name: back}), kind)
            assert more > limit, f"a block of '{g.name}' could stay"


# -- trap 4 and 6: nothing is strangled -------------------------------------
def test_a_layer_of_tiny_scores_keeps_its_floor() -> None:
    model, x, structure, table = chain(3, 30, 30, 2)
    scores = given_scores({"0": torch.full((30,), 1e-9), "2": torch.ones(30)})
    for floor, kept in ((0, 1), (3, 3), (0.2, 6), ({"0": 0.5, "*": 0.1}, 15)):
        plan = plan_of(
            model, x, Target(channels=0.4), scores=scores, structure=structure, table=table, floor=floor, round_to=1,
            normalisation="none",
        )  # fmt: skip
        assert plan.widths["0"] == (30, kept)
        assert plan.after.channels == 24, "the rest comes from elsewhere: the target is met"


def test_a_sum_over_coupled_layers_strangles_the_inner_ones() -> None:
    """Five layers write to the stream: by their sum it stays whole and inner layers go; by their mean both go."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 16)
            self.inner = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.outer = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.fc = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            for inner, outer in zip(self.inner, self.outer, strict=True):
                x = (x + outer(inner(x).relu())).relu()
            return self.fc(x)

    model, x = hard(Residual()), torch.randn(1, 6)
    structure = find_groups(model, x)
    assert len(structure["stem"].producers) == 5
    scores = random_scores(model, structure)
    stream, inner = {}, {}
    for reduction in ("sum", "mean", "max", "root"):
        plan = plan_of(
            model, x, Target(channels=0.4), scores=scores, structure=structure, reduction=reduction, floor=2, round_to=1
        )
        stream[reduction] = plan.widths["stem"][1]
        inner[reduction] = min(after for n, (_, after) in plan.widths.items() if n != "stem")
        assert min(after for _, after in plan.widths.values()) >= 2
    assert stream["sum"] == 16
    assert stream["mean"] < 12
    assert inner["sum"] < inner["mean"]
    bounded = plan_of(
        model, x, Target(channels=0.4), scores=scores, structure=structure, reduction="sum", floor={"inner.*": 0.3},
        round_to=1,
    )  # fmt: skip
    assert all(after >= 5 for n, (_, after) in bounded.widths.items() if n != "stem")


class Spread(nn.Module):
    """Layers that make only a part of the channels of their group."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.p, self.q, self.r = (nn.Conv2d(3, n, 1) for n in (12, 6, 6, 6))
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.skip(x) + torch.cat([self.p(x), self.q(x) + self.r(x)], 1)).relu())  # type: ignore[no-any-return]


def test_every_layer_keeps_a_channel() -> None:
    """The half that one layer makes is worth least; that layer stays nevertheless, and the target is met."""
    torch.manual_seed(0)
    model = Spread()
    with torch.no_grad():
        model.p.weight.mul_(1e-3)
        model.skip.weight[:6].mul_(1e-3)
    plan = plan_of(model, X, Target(channels=6), criterion="weight", **FREE)
    small = plan.apply(model)
    assert [m.out_channels for m in (small.skip, small.p, small.q, small.r)] == [6, 1, 5, 5]
    torch.testing.assert_close(small(X), plan.mask(model)(X))
    least = plan_of(model, X, Target(channels=2), criterion="weight", **FREE)
    assert least.apply(model).out.in_channels == 2
    with pytest.raises(errors.BudgetError):
        plan_of(model, X, Target(channels=1), criterion="weight", **FREE)
    with pytest.raises(errors.StructureError, match="all channels of 'p' would go"):
        PruningPlan(plan.structure, plan.table, {"skip": range(6)})
    with pytest.raises(errors.StructureError, match="all channels of 'q' would go"):
        plan.cut("skip", range(6, 12))


# -- what the proof can not see ---------------------------------------------
class Branch(nn.Module):
    """A residual where shapes agree."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        return x + y if x.shape == y.shape else y


@pytest.mark.parametrize("kind", ["channels", "bytes"])
def test_a_plan_at_whose_widths_the_network_does_something_else_is_refused(kind: str) -> None:
    """Equal widths add a residual that was never there: nothing else is wrong, and no other width shows it."""
    torch.manual_seed(0)
    model = nn.Sequential(Branch(3, 32), Branch(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    structure = find_groups(model.eval(), X)
    assert [g.name for g in structure.prunable] == ["0.conv", "1.conv"]
    options: dict[str, Any] = {"criterion": "weight", "structure": structure, "round_to": 1}
    options["floor"] = {"0.conv": 1.0, "1.conv": 32}
    least = plan_of(model, X, Target(channels=65), **options).apply(model)
    target = Target(channels=64) if kind == "channels" else Target(bytes=file_size(least) - 600)
    with pytest.raises(errors.StructureError, match=r"'1.conv' \(64 to 32 channels\)") as caught:
        plan_of(model, X, target, **options)
    assert "protect=['1.conv']" in str(caught.value)
    with pytest.raises(errors.StructureError, match=r"'1.conv' \(64 to 32 channels\)"):
        compress.prune(model, X, None, target=target, **options)


# -- trap 22 ----------------------------------------------------------------
def test_groups_without_a_score_stay_whole() -> None:
    case, structure = BY_NAME["squeeze and excite"], structure_of("squeeze and excite")
    model, inputs = case.model(), case.inputs()
    values = {n: v for n, v in random_scores(model, structure).values.items() if n != "squeeze"}
    scores = given_scores(values, unscored={"squeeze": "a gate gets no relevance"})
    plan = plan_of(model, inputs, Target(channels=0.5), scores=scores, structure=structure, **FREE)
    assert plan.widths["squeeze"] == (5, 5)
    assert plan.unscored == {"squeeze": "a gate gets no relevance"}
    assert "a gate gets no relevance" in str(plan)
    assert plan.after.channels <= 0.5 * plan.before.channels


def test_a_target_that_needs_groups_without_a_score_says_so() -> None:
    model, x, structure, table = chain(3, 10, 10, 2)
    scores = given_scores({"0": torch.ones(10)}, unscored={"2": "it is a gate"})
    with pytest.raises(errors.BudgetError, match="it is a gate"):
        plan_of(model, x, Target(channels=0.3), scores=scores, structure=structure, table=table, **FREE)


# -- what can not be -------------------------------------------------------
def test_a_target_out_of_reach_is_refused_before_scoring() -> None:
    called = []

    def criterion(model: nn.Module, data: Any) -> dict[str, Tensor]:
        called.append(1)
        return {}

    with pytest.raises(errors.BudgetError, match=r"Target\(macs=0.01\) can not be met") as caught:
        plan_pruning(plain(), X, DATA, criterion=criterion, target=Target(macs=0.01), floor=0.5)
    assert not called
    assert "floor" in str(caught.value)
    assert "network's output" in str(caught.value), "it names what holds it"


@pytest.mark.parametrize("target", [0.5, None, {"macs": 0.5}, "0.5"])
def test_a_target_has_to_name_its_quantity(target: Any) -> None:
    with pytest.raises(errors.InputError, match="target is no Target"):
        plan_pruning(plain(), X, DATA, criterion="weight", target=target)


def test_a_network_of_which_nothing_can_go() -> None:
    case = BY_NAME["layer norm"]
    with pytest.raises((errors.BudgetError, errors.StructureError)):
        plan_pruning(nn.Linear(5, 3), torch.randn(1, 5), None, criterion="weight", target=Target(macs=0.5))
    with pytest.raises(errors.BudgetError, match="LayerNorm"):
        plan_pruning(case.model(), case.inputs(), None, criterion="weight", target=Target(macs=0.2))
    plan = plan_pruning(nn.Linear(5, 3), torch.randn(1, 5), None, criterion="weight", target=Target(macs=1.0))
    assert not plan.removed


def test_all_of_it_removes_nothing() -> None:
    for target in (Target(macs=1.0), Target(channels=1.0), Target(params="100%"), Target(macs=10**9)):
        assert not plan_pruning(plain(), X, None, criterion="weight", target=target).removed


# -- trap 5: scores, structures and tables of another network ---------------
def test_scores_of_the_network_before_a_cut_are_refused() -> None:
    model = hard(plain())
    structure = structure_of("plain")
    scores = random_scores(model, structure)
    small = plan_of(model, X, Target(channels=0.7), scores=scores, structure=structure, **FREE).apply(model)
    with pytest.raises(errors.MismatchError, match="do not fit"):
        plan_of(small, X, Target(channels=0.7), scores=scores, **FREE)
    again = plan_of(small, X, Target(channels=0.7), scores=random_scores(small, find_groups(small, X)), **FREE)
    assert again.after.channels <= 0.7 * again.before.channels


def test_structures_and_tables_of_the_network_before_a_cut_are_refused() -> None:
    model = hard(plain())
    plan = plan_pruning(model, X, None, criterion="weight", target=Target(channels=0.7), **FREE)
    small = plan.apply(model)
    with pytest.raises(errors.MismatchError):
        plan_pruning(small, X, None, criterion="weight", target=Target(macs=0.7), structure=plan.structure, **FREE)
    with pytest.raises(errors.MismatchError):
        plan_pruning(small, X, None, criterion="weight", target=Target(macs=0.7), table=plan.table, **FREE)


def test_protection_is_not_forgotten_when_a_structure_is_given() -> None:
    """``structure=`` beside ``protect=`` or ``allow=``: either it is honoured, or refused; never ignored."""
    model, structure = hard(plain()), structure_of("plain")
    try:
        plan = plan_pruning(
            model, X, None, criterion="weight", target=Target(channels=0.8), structure=structure, protect="0", **FREE
        )
    except errors.InputError:
        return
    assert plan.widths.get("0", (8, 8)) == (8, 8)


# -- what a plan does not depend on -----------------------------------------
def test_the_order_of_scores_does_not_matter() -> None:
    case, structure = BY_NAME["residual"], structure_of("residual")
    model, inputs = case.model(), case.inputs()
    scores = random_scores(model, structure)
    turned = given_scores(dict(reversed(scores.values.items())))
    one, two = (
        plan_of(model, inputs, Target(macs=0.5), scores=s, structure=structure, **FREE) for s in (scores, turned)
    )
    assert one.removed == two.removed


def test_scores_structure_and_table_can_be_used_again() -> None:
    model = hard(plain())
    scores = score(model, X, criterion="weight")
    first = plan_pruning(model, X, None, criterion="weight", target=Target(macs=0.5), **FREE)
    again = plan_of(model, X, Target(macs=0.5), scores=scores, structure=first.structure, table=first.table, **FREE)
    assert again.removed == first.removed
    assert again.after == first.after


@pytest.mark.parametrize("frozen", ["prefix", "all"])
def test_frozen_parameters_give_the_same_plan(frozen: str) -> None:
    """Trap 3."""
    case = BY_NAME["residual"]
    model, inputs = case.model(), case.inputs()
    expected = plan_pruning(model, inputs, None, criterion="weight", target=Target(macs=0.5), **FREE)
    names = [n for n, _ in model.named_parameters()]
    for n, p in model.named_parameters():
        p.requires_grad_(frozen == "prefix" and n not in names[: len(names) // 2])
    plan = plan_pruning(model, inputs, None, criterion="weight", target=Target(macs=0.5), **FREE)
    assert plan.removed == expected.removed
    small = plan.apply(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in small.named_parameters()} == flags


def test_planning_leaves_the_model_as_it_is() -> None:
    case = BY_NAME["dropout"]
    model = case.model().train()
    next(model.parameters()).requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks), set(vars(m))) for m in model.modules()]
    plan = plan_pruning(model, case.inputs(), None, criterion="weight", target=Target(macs=0.5))
    plan.apply(model)
    plan.mask(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [(m.training, len(m._forward_hooks), set(vars(m))) for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]


def test_a_callable_is_a_criterion() -> None:
    model = hard(plain())

    def mine(net: nn.Module, data: Any) -> dict[str, Tensor]:
        assert data is DATA
        return {"0": torch.arange(8.0), "3": torch.arange(12.0) + 100}

    plan = plan_pruning(model, X, DATA, criterion=mine, target=Target(channels=15), normalisation="none", **FREE)
    assert plan.removed == {"0": (0, 1, 2, 3, 4)}
    assert plan.settings["criterion"]["name"] == "mine"


def test_settings_say_how_the_plan_was_made() -> None:
    """And the version of torch-pruning is that of the package, not of its attribute (trap 20)."""
    import importlib.metadata

    plan = plan_pruning(
        hard(plain()), X, None, criterion="weight", target=Target(macs="50%"), normalisation="sum", scope="local",
        reduction="max", floor={"0": 2, "*": 0.1}, round_to=2,
    )  # fmt: skip
    settings = json.loads(json.dumps(dict(plan.settings)))
    assert settings["ranking"] == {
        "normalisation": "sum", "reduction": "max", "scope": "local", "floor": {"0": 2, "*": 0.1}, "round_to": 2,
    }  # fmt: skip
    assert settings["target"] == {"macs": "50%"}
    assert settings["criterion"]["name"].startswith("weight")
    assert settings["torch_pruning"] == importlib.metadata.version("torch-pruning")


def test_trap_20_the_attribute_of_the_package_is_wrong() -> None:
    """The guard is needed: 1.6.1 calls itself 1.6.0."""
    import importlib.metadata

    import torch_pruning

    from compress._dependencies import version

    assert version() == importlib.metadata.version("torch-pruning")
    if version() == "1.6.1":
        assert torch_pruning.__version__ != version()


def test_names_of_the_package() -> None:
    assert compress.plan_pruning is plan_pruning
    assert compress.score is score
