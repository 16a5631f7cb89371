"""Ranking: scores of layers to one order of removal, against slow loops."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import BY_NAME, NETWORKS, structure_of
from torch import Tensor, nn

import compress
from compress.criteria.scores import Scores
from compress.groups import Group, Member, Structure, find_groups
from compress.ranking import NORMALISATIONS, REDUCTIONS, SCOPES, GroupScores, Ranking, group_scores, order_of
from lrp import errors


def scores_of(structure: Structure, values: dict[str, Any], **more: Any) -> Scores:
    tensors = {n: torch.as_tensor(v, dtype=torch.float64) for n, v in values.items()}
    options = {"unscored": {}, "name": "given", "settings": {}, "samples": 0, **more}
    return Scores(values=tensors, **options)


def random_scores(name: str, seed: int = 0, signed: bool = True) -> Scores:
    """For every producer, as wide as the layer."""
    model, structure = BY_NAME[name].model(), structure_of(name)
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for layer in structure.layers:
        module: Any = model.get_submodule(layer)
        width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        out[layer] = torch.randn(width, generator=generator, dtype=torch.float64)
        if not signed:
            out[layer] = out[layer].abs()
    return scores_of(structure, out)


def group(name: str, width: int, size: int = 1, layers: Sequence[str] = ()) -> Group:
    """A group of linear layers, in pieces of ``size`` channels."""
    own = tuple((j,) for j in range(width))
    members = tuple(Member(layer, "out", "Linear", own) for layer in (name, *layers))
    units = tuple(tuple(range(k, min(width, k + size))) for k in range(0, width, size))
    return Group(name, width, units, members)


def spread(p: int, q: int) -> Group:
    """A layer, one that makes its first channels, and two that make the others."""
    own = tuple((j,) for j in range(p + q))
    first = tuple((j,) if j < p else () for j in range(p + q))
    last = tuple(() if j < p else (j - p,) for j in range(p + q))
    index = {"a": own, "p": first, "q": last, "r": last}
    return Group("a", p + q, own, tuple(Member(n, "out", "Linear", i) for n, i in index.items()))


def scored(*rows: Sequence[float]) -> tuple[GroupScores, Structure]:
    """One group per row of scores."""
    structure = Structure(tuple(group(chr(97 + k), len(row)) for k, row in enumerate(rows)))
    values = {chr(97 + k): torch.tensor(row, dtype=torch.float64) for k, row in enumerate(rows)}
    return GroupScores(values, {}), structure


FREE = Ranking(normalisation="none", floor=0, round_to=1)


# -- slow references --------------------------------------------------------
def normalised_slowly(own: Sequence[float], how: str) -> list[float]:
    divisor = 1.0
    if how == "sum":
        divisor = sum(abs(v) for v in own)
    elif how == "mean":
        divisor = sum(abs(v) for v in own) / len(own)
    elif how == "l2":
        divisor = math.sqrt(sum(v * v for v in own))
    return [v / divisor if divisor > 0 else v for v in own]


def group_scores_slowly(scores: Scores, g: Group, ranking: Ranking) -> list[float] | None:
    rows: list[list[float]] = [[] for _ in range(g.width)]
    for m in g.members:
        if m.axis == "out" and m.layer in scores.values:
            own = normalised_slowly(scores.values[m.layer].tolist(), ranking.normalisation)
            for j, entries in enumerate(m.index):
                if entries:
                    rows[j].append(sum(own[i] for i in entries))
    if not all(rows):
        return None
    merge: Any = {
        "sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "root": lambda v: v[0],
    }[ranking.reduction]  # fmt: skip
    channel = [merge(row) for row in rows]
    out = [0.0] * g.width
    for unit in g.units:
        for j in unit:
            out[j] = sum(channel[i] for i in unit) / len(unit)
    return out


@pytest.mark.parametrize("name", [c.name for c in NETWORKS if c.free])
@pytest.mark.parametrize("normalisation", [how for how in NORMALISATIONS if how != "auto"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_group_scores_by_loops(name: str, normalisation: str, reduction: str) -> None:
    structure, scores = structure_of(name), random_scores(name)
    ranking = Ranking(normalisation=normalisation, reduction=reduction)
    found = group_scores(scores, structure, ranking)
    for g in structure.prunable:
        expected = group_scores_slowly(scores, g, ranking)
        assert expected is not None
        assert found.values[g.name].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert not found.unscored


def test_gated_pairs_and_grouped_channels_share_one_mean() -> None:
    """Whatever ties channels, a unit has the mean of their scores: pieces of unequal size compare."""
    gated = structure_of("gated")
    found = group_scores(scores_of(gated, {"conv": range(16), "out": range(6)}), gated, FREE)
    assert found.values["conv"].tolist() == pytest.approx([(j % 8) + 4 for j in range(16)])
    grouped = structure_of("grouped")
    found = group_scores(scores_of(grouped, {"0": range(12), "2": range(8), "5": range(6)}), grouped, FREE)
    assert found.values["0"].tolist() == pytest.approx([(j % 3) + 4.5 for j in range(12)])


def test_a_flattened_reader_adds_nothing() -> None:
    """Trap 19: only what makes the channels has scores; what reads 16 pixels of each does not count 16 times."""
    structure = structure_of("flatten")
    found = group_scores(scores_of(structure, {"0": range(6), "4": range(10)}), structure, FREE)
    assert found.values["0"].tolist() == list(range(6))


# -- normalisation ----------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "means"), [("residual", "mean"), ("plain", "mean"), ("mlp", "none"), ("flatten", "none")]
)
def test_auto_looks_for_batch_norm(name: str, means: str) -> None:
    normed = any(isinstance(m, nn.BatchNorm2d) for m in BY_NAME[name].build().modules())
    assert normed is (means == "mean")
    structure, scores = structure_of(name), random_scores(name)
    assert Ranking().settled(structure) == Ranking(normalisation=means)
    assert Ranking(normalisation="sum").settled(structure).normalisation == "sum"
    auto, told = (group_scores(scores, structure, Ranking(normalisation=how)) for how in ("auto", means))
    assert all(torch.equal(t, told.values[n]) for n, t in auto.values.items())
    plan = compress.plan_pruning(
        BY_NAME[name].build(), BY_NAME[name].inputs(), criterion="weight", target=compress.Target(channels=0.8)
    )
    assert plan.settings["ranking"]["normalisation"] == means


def test_a_layer_of_zeros_stays_one() -> None:
    structure = Structure((group("a", 3),))
    for how in NORMALISATIONS:
        found = group_scores(scores_of(structure, {"a": [0, 0, 0]}), structure, Ranking(normalisation=how))
        assert found.values["a"].tolist() == [0, 0, 0]


def test_sum_makes_wide_layers_cheap_and_mean_does_not() -> None:
    """Trap 18."""
    rows = {"a": [1.0] * 4, "b": [1.0] * 16}
    structure = Structure((group("a", 4), group("b", 16)))
    by = {
        how: group_scores(scores_of(structure, rows), structure, Ranking(normalisation=how)).values
        for how in NORMALISATIONS
    }
    assert by["sum"]["a"][0] == 4 * by["sum"]["b"][0]
    assert by["l2"]["a"][0] == 2 * by["l2"]["b"][0]
    assert by["mean"]["a"][0] == by["mean"]["b"][0] == by["none"]["a"][0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8),
    st.sampled_from(["sum", "l2", "mean"]),
    st.floats(1e-3, 1e3),
)
def test_normalised_scores_do_not_depend_on_the_scale(own: list[float], how: str, scale: float) -> None:
    structure = Structure((group("a", len(own)),))
    ranking = Ranking(normalisation=how)
    one = group_scores(scores_of(structure, {"a": own}), structure, ranking).values["a"]
    two = group_scores(scores_of(structure, {"a": [scale * v for v in own]}), structure, ranking).values["a"]
    if max(abs(v) for v in own) > 1e-100:
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_normalisation_is_per_layer_before_the_reduction() -> None:
    structure = Structure((group("a", 2, layers=("b",)),))
    scores = scores_of(structure, {"a": [1.0, 3.0], "b": [100.0, 0.0]})
    means = {r: group_scores(scores, structure, Ranking(normalisation="sum", reduction=r)).values["a"].tolist()
             for r in REDUCTIONS}  # fmt: skip
    assert means["sum"] == [1.25, 0.75]
    assert means["mean"] == [0.625, 0.375]
    assert means["max"] == [1.0, 0.75]
    assert means["root"] == [0.25, 0.75]


# -- trap 22: what has no score ---------------------------------------------
def test_layers_without_a_score_do_not_count_as_zero() -> None:
    structure = Structure((group("a", 2, layers=("b",)), group("c", 3)))
    scores = scores_of(structure, {"a": [2.0, 4.0]}, unscored={"b": "a gate", "c": "a gate gets no relevance"})
    found = group_scores(scores, structure, Ranking(normalisation="none", reduction="mean"))
    assert found.values["a"].tolist() == [2.0, 4.0]
    assert found.unscored == {"c": "a gate gets no relevance"}
    assert {b.group for b in order_of(found, structure, FREE)} == {"a"}


def test_layers_have_no_say_on_channels_that_they_do_not_make() -> None:
    """A mean is one over those that do; none counts as zero."""
    structure = Structure((spread(6, 6),))
    ones = {layer: torch.ones(n) for layer, n in (("a", 12), ("p", 6), ("q", 6), ("r", 6))}
    found = {r: group_scores(scores_of(structure, ones), structure, Ranking("none", r)).values["a"].tolist()
             for r in REDUCTIONS}  # fmt: skip
    assert found == {"sum": [2.0] * 6 + [3.0] * 6, "mean": [1.0] * 12, "max": [1.0] * 12, "root": [1.0] * 12}
    low = {layer: -k * t for k, (layer, t) in enumerate(ones.items(), 1)}
    found = {r: group_scores(scores_of(structure, low), structure, Ranking("none", r)).values["a"].tolist()
             for r in REDUCTIONS}  # fmt: skip
    assert found == {
        "sum": [-3.0] * 6 + [-8.0] * 6, "mean": [-1.5] * 6 + [-8 / 3] * 6, "max": [-1.0] * 12, "root": [-1.0] * 12,
    }  # fmt: skip
    # without the first layer, the next that makes a channel speaks for it
    partners = {n: t for n, t in low.items() if n != "a"}
    found = {r: group_scores(scores_of(structure, partners), structure, Ranking("none", r)).values["a"].tolist()
             for r in REDUCTIONS}  # fmt: skip
    assert found["root"] == found["max"] == [-2.0] * 6 + [-3.0] * 6


def test_a_group_of_which_some_channels_have_no_score_is_not_scored() -> None:
    structure = Structure((spread(2, 3), group("c", 3)))
    values = {"p": torch.ones(2), "c": torch.ones(3)}
    found = group_scores(scores_of(structure, values), structure, FREE)
    assert found.unscored == {"a": "given gives some of its channels no score"}
    found = group_scores(scores_of(structure, values, unscored={"q": "a gate"}), structure, FREE)
    assert found.unscored == {"a": "a gate"}
    assert set(found.values) == {"c"}


def test_a_reason_is_given_even_where_the_criterion_gave_none() -> None:
    structure = Structure((group("a", 2),))
    assert "given" in group_scores(scores_of(structure, {}), structure, FREE).unscored["a"]


def test_scores_of_groups_pass_through() -> None:
    structure = Structure((group("a", 2, layers=("b",)),))
    scores = scores_of(structure, {"a": [1.0, 3.0]}, level="group")
    assert group_scores(scores, structure, Ranking(normalisation="sum")).values["a"].tolist() == [0.25, 0.75]


# -- trap 5 and 11: wrong scores --------------------------------------------
@pytest.mark.parametrize("width", [1, 7, 9, 16])
def test_scores_of_another_width_are_refused(width: int) -> None:
    structure = structure_of("plain")
    scores = scores_of(structure, {"0": torch.ones(width), "3": torch.ones(12)})
    with pytest.raises(errors.MismatchError, match="scores of '0'"):
        group_scores(scores, structure, FREE)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_their_layer(wrong: float) -> None:
    structure = structure_of("plain")
    own = torch.ones(12)
    own[3] = wrong
    with pytest.raises(errors.NonFiniteError, match="scores of '3'"):
        group_scores(scores_of(structure, {"0": torch.ones(8), "3": own}), structure, FREE)


def test_scores_of_another_shape_are_refused() -> None:
    structure = structure_of("plain")
    with pytest.raises(errors.InputError, match="scores of '0'"):
        group_scores(scores_of(structure, {"0": torch.ones(8, 3), "3": torch.ones(12)}), structure, FREE)


# -- the order --------------------------------------------------------------
def names(blocks: Sequence[Any]) -> list[tuple[str, tuple[int, ...]]]:
    return [(b.group, b.channels) for b in blocks]


def test_the_smallest_score_goes_first() -> None:
    values, structure = scored([0.5, -1.0, 3.0], [0.0, 2.0])
    assert names(order_of(values, structure, FREE)) == [("a", (1,)), ("b", (0,)), ("a", (0,))]


def test_ties_go_by_the_place_of_group_and_channel() -> None:
    """Trap 1."""
    values, structure = scored([0.0] * 4, [0.0] * 3)
    assert names(order_of(values, structure, FREE)) == [("a", (0,)), ("a", (1,)), ("a", (2,)), ("b", (0,)), ("b", (1,))]


def test_one_unit_stays_in_every_group() -> None:
    for width in (1, 2, 5):
        for floor in (0, 0.0, 1, {}, {"a": 0}):
            values, structure = scored([0.0] * width)
            blocks = order_of(values, structure, Ranking(floor=floor, round_to=1))
            assert sum(len(b.channels) for b in blocks) == width - 1


@pytest.mark.parametrize("round_to", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 11, 12, 16, 23])
@pytest.mark.parametrize("value", [0.1, 1.0, -3.0, 1 / 3])
def test_equal_scores_keep_the_order_of_widths(width: int, round_to: int, value: float) -> None:
    """Blocks of unequal size and equal scores: the mean of three 0.1 is larger than the mean of two."""
    values, structure = scored([value] * width)
    blocks = order_of(values, structure, Ranking(floor=0, round_to=round_to))
    left, place = width, 0
    for block in blocks:
        left -= len(block.channels)
        assert left % round_to == 0
        assert left > 0
        assert block.channels == tuple(range(place, place + len(block.channels)))
        place += len(block.channels)
    widths = [w for w in range(width - 1, 0, -1) if w % round_to == 0]
    assert left == (widths[-1] if widths else width), "every allowed width is reached"
    assert len(blocks) == len(widths)


VALUES = st.one_of(st.sampled_from([0.0, 0.1, 0.3, -0.2]), st.floats(-1, 1))


@st.composite
def networks_with_scores(draw: Any) -> tuple[GroupScores, Structure, Ranking]:
    groups, values = [], {}
    for k in range(draw(st.integers(1, 4))):
        width, size = draw(st.integers(1, 14)), draw(st.sampled_from([1, 1, 1, 2, 3]))
        g = group(chr(97 + k), width, size)
        own = draw(st.lists(VALUES, min_size=width, max_size=width))
        for unit in g.units:
            mean = sum(own[j] for j in unit) / len(unit)
            for j in unit:
                own[j] = mean
        groups.append(g)
        values[g.name] = torch.tensor(own, dtype=torch.float64)
    ranking = Ranking(
        floor=draw(st.one_of(st.integers(0, 5), st.floats(0, 1))),
        round_to=draw(st.sampled_from([1, 1, 2, 3, 4])),
        scope=draw(st.sampled_from(SCOPES)),
    )
    return GroupScores(values, {}), Structure(tuple(groups)), ranking


@settings(max_examples=300, deadline=None)
@given(networks_with_scores())
def test_every_prefix_of_the_order_is_allowed(case: tuple[GroupScores, Structure, Ranking]) -> None:
    values, structure, ranking = case
    blocks = order_of(values, structure, ranking)
    assert blocks == order_of(values, structure, ranking)
    gone: dict[str, set[int]] = {g.name: set() for g in structure.groups}
    for block in blocks:
        g = structure[block.group]
        assert not gone[g.name] & set(block.channels)
        gone[g.name] |= set(block.channels)
        left = g.width - len(gone[g.name])
        assert left >= max(1, ranking.kept(g))
        assert left % ranking.block(g) == 0
        assert all(set(unit) <= gone[g.name] or not set(unit) & gone[g.name] for unit in g.units)
        # the least important pieces of the group, ties by place
        own = values.values[g.name].tolist()
        out = [(own[u[0]], u[0]) for u in g.units if u[0] in gone[g.name]]
        kept = [(own[u[0]], u[0]) for u in g.units if u[0] not in gone[g.name]]
        assert max(out) < min(kept)
    if ranking.scope == "global":
        keys = [b.key for b in blocks]
        assert all(a <= b + 1e-12 for a, b in pairwise(keys))


@settings(max_examples=200, deadline=None)
@given(networks_with_scores())
def test_all_that_may_go_is_in_the_order(case: tuple[GroupScores, Structure, Ranking]) -> None:
    """By brute force: the smallest width that whole pieces, floor and rounding allow."""
    values, structure, ranking = case
    blocks = order_of(values, structure, ranking)
    for g in structure.prunable:
        own = values.values[g.name].tolist()
        units = sorted(g.units, key=lambda u: (own[u[0]], u[0]))
        widths = [g.width]
        for k in range(1, len(units)):
            left = g.width - sum(len(u) for u in units[:k])
            if left < ranking.kept(g):
                break
            if left % ranking.block(g) == 0:
                widths.append(left)
        assert g.width - sum(len(b.channels) for b in blocks if b.group == g.name) == widths[-1]
        assert len([b for b in blocks if b.group == g.name]) == len(widths) - 1


def test_the_last_channel_of_a_layer_stays() -> None:
    structure = Structure((spread(3, 4),))
    values = GroupScores({"a": torch.arange(7.0, dtype=torch.float64)}, {})
    blocks = order_of(values, structure, FREE)
    assert [b.channels for b in blocks] == [(0,), (1,), (3,), (4,), (5,)], "2 is the last of p, 6 that of q and r"
    rounded = order_of(values, structure, Ranking(normalisation="none", floor=0, round_to=3))
    assert [b.channels for b in rounded] == [(0,), (1, 3, 4)]
    floored = order_of(values, structure, Ranking(normalisation="none", floor=4, round_to=1))
    assert [b.channels for b in floored] == [(0,), (1,), (3,)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_prefix_of_the_order_empties_a_layer(data: st.DataObject) -> None:
    """And every unit that stays is the last of a layer, or of the group."""
    width = data.draw(st.integers(2, 10))
    parts = data.draw(st.lists(st.sets(st.integers(0, width - 1), min_size=1), max_size=4))
    own = tuple((j,) for j in range(width))
    members = [Member("a", "out", "Linear", own)]
    for k, part in enumerate(parts):
        index = tuple((sorted(part).index(j),) if j in part else () for j in range(width))
        members.append(Member(f"b{k}", "out", "Linear", index))
    g = Group("a", width, own, tuple(members))
    scores = data.draw(st.lists(VALUES, min_size=width, max_size=width))
    blocks = order_of(GroupScores({"a": torch.tensor(scores, dtype=torch.float64)}, {}), Structure((g,)), FREE)
    gone: set[int] = set()
    for block in blocks:
        gone.update(block.channels)
        assert not g.emptied(gone)
    for j in set(range(width)) - gone:
        assert g.emptied(gone | {j})


# -- scopes -----------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(VALUES, min_size=2, max_size=12), min_size=1, max_size=4))
@example([[0.0, 0.0, 0.0], [5.0, 6.0, 7.0, 8.0]])
def test_local_takes_the_same_share_of_every_group(rows: list[list[float]]) -> None:
    values, structure = scored(*rows)
    blocks = order_of(values, structure, Ranking(scope="local", floor=0, round_to=1))
    gone = dict.fromkeys(values.values, 0)
    for block in blocks:
        gone[block.group] += 1
        shares = {g.name: (gone[g.name], g.width) for g in structure.groups}
        for name, (n, width) in shares.items():
            for other, (m, size) in shares.items():
                if m < size - 1 and name != other:  # the other could still give
                    assert (n - 0.5) / width <= (m + 0.5) / size + 1e-9


@pytest.mark.parametrize("scope", SCOPES)
def test_ties_go_by_place_in_every_scope(scope: str) -> None:
    """Also where the channels of a piece are far apart, and in blocks of several pieces."""
    own = tuple((j,) for j in range(6))
    g = Group("a", 6, ((0, 5), (1, 2), (3, 4)), (Member("a", "out", "Linear", own),))
    values = GroupScores({"a": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)}, {})
    blocks = order_of(values, Structure((g,)), Ranking(scope=scope, floor=0, round_to=1))
    assert [b.channels for b in blocks] == [(3, 4), (0, 5)]
    if scope != "global":
        assert [b.key for b in blocks] == pytest.approx([1 / 6, 3 / 6]), "the mean rank, as a share"


def test_local_does_not_compare_scores_across_groups() -> None:
    low, high = [0.001, 0.002, 0.003, 0.004], [100.0, 300.0, 200.0, 400.0]
    values, structure = scored(low, high)
    blocks = order_of(values, structure, Ranking(scope="local", floor=0, round_to=1))
    assert names(blocks)[:4] == [("a", (0,)), ("b", (0,)), ("a", (1,)), ("b", (2,))]


def test_isomorphic_ranks_groups_of_one_kind_together() -> None:
    """Two kinds, two groups each: scores compare within a kind, shares between kinds."""

    def of(name: str, kind: str) -> Group:
        own = tuple((j,) for j in range(4))
        return Group(name, 4, own, (Member(name, "out", kind, own),))

    structure = Structure(
        (of("block.1", "Conv2d"), of("block.2", "Conv2d"), of("head.1", "Linear"), of("head.2", "Linear"))
    )
    values = {
        "block.1": [1.0, 2.0, 3.0, 4.0], "block.2": [10.0, 11.0, 12.0, 13.0],
        "head.1": [0.1, 0.3, 0.5, 0.7], "head.2": [0.2, 0.4, 0.6, 0.8],
    }  # fmt: skip
    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
    blocks = order_of(GroupScores(tensors, {}), structure, Ranking(scope="isomorphic", floor=0, round_to=1))
    first = blocks[:6]
    assert [b.group for b in first if b.group.startswith("block")] == ["block.1"] * 3
    assert [b.group for b in first if b.group.startswith("head")] == ["head.1", "head.2", "head.1"]
    for k in range(1, 4):  # as many of each kind
        assert len([b for b in blocks[: 2 * k] if b.group.startswith("block")]) == k


def test_isomorphic_kinds_of_a_real_network() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)), nn.Linear(6, 2))
    structure = find_groups(net, torch.randn(1, 6))
    assert structure["0.0"].shape == structure["1.0"].shape
    residual = structure_of("residual")
    assert len({g.shape for g in residual.prunable}) == len(residual.prunable)


# -- floors and rounding ----------------------------------------------------
@pytest.mark.parametrize(
    ("floor", "width", "kept"),
    [
        (0, 10, 1), (0.0, 10, 1), (0.1, 10, 1), (0.1, 11, 2), (0.3, 10, 3), (1.0, 10, 10), (1, 10, 1), (4, 10, 4),
        (40, 10, 10), (0.07, 100, 7), (0.29, 100, 29), ({"a": 0.5}, 10, 5), ({"*": 3}, 10, 3),
        ({"a": 0.5, "*": 3}, 10, 5), ({"a": 2, "*": 7}, 10, 2), ({"?": 0.2, "a": 4}, 10, 4), ({}, 10, 1),
        ({"b": 0.9}, 10, 1),
    ],
)  # fmt: skip
def test_floors(floor: Any, width: int, kept: int) -> None:
    assert Ranking(floor=floor).kept(group("a", width)) == kept


def test_a_floor_by_a_partner_of_the_group() -> None:
    g = group("stem", 10, layers=("layer1.conv2",))
    assert Ranking(floor={"layer1.*": 0.5}).kept(g) == 5


def test_a_floor_whose_pattern_fits_nothing_is_refused() -> None:
    with pytest.raises(errors.InputError, match=r"floor='layer9\.\*' fits no layer"):
        Ranking(floor={"layer9.*": 0.5, "*": 0.1}).check(structure_of("plain"))
    Ranking(floor={"0": 0.5, "*": 0.1}).check(structure_of("plain"))


@pytest.mark.parametrize(
    ("width", "step"), [(3, 1), (7, 1), (8, 2), (15, 2), (16, 4), (32, 8), (63, 8), (64, 16), (512, 16)]
)
def test_automatic_rounding(width: int, step: int) -> None:
    """Four blocks fit into every group, and none is larger than 16."""
    expected = step if platform.machine().lower() in ("x86_64", "amd64", "i686") else 1
    assert Ranking().block(group("a", width)) == expected


def test_a_group_narrower_than_the_rounding_stays_whole() -> None:
    values, structure = scored([0.0] * 6)
    assert order_of(values, structure, Ranking(floor=0, round_to=8)) == []


def test_pieces_of_a_grouped_convolution_keep_to_the_rounding() -> None:
    structure = Structure((group("a", 12, 3),))
    values = GroupScores({"a": torch.arange(12.0, dtype=torch.float64) // 3}, {})
    blocks = order_of(values, structure, Ranking(floor=0, round_to=2))
    assert [len(b.channels) for b in blocks] == [6]


# -- options ----------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"normalisation": "max"}, {"reduction": "median"}, {"scope": "layer"}, {"floor": -1}, {"floor": 1.5},
        {"floor": True}, {"floor": {"a": -0.1}}, {"floor": math.nan}, {"floor": "0.1"}, {"round_to": 0},
        {"round_to": 1.5}, {"round_to": "automatic"}, {"round_to": True}, {"round_to": -4},
    ],
)  # fmt: skip
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.InputError, match=next(iter(options))):
        Ranking(**options)


@pytest.mark.parametrize("ranking", [Ranking(), Ranking("sum", "max", "local", {"a*": 3, "*": 0.2}, 8)])
def test_rankings_travel_as_json(ranking: Ranking) -> None:
    assert Ranking.from_json(json.loads(json.dumps(ranking.to_json()))) == ranking


def test_scores_are_not_changed() -> None:
    scores = random_scores("residual")
    before = {n: t.clone() for n, t in scores.values.items()}
    structure = structure_of("residual")
    for how in NORMALISATIONS:
        order_of(group_scores(scores, structure, Ranking(normalisation=how)), structure, Ranking(scope="local"))
    assert all(torch.equal(t, before[n]) for n, t in scores.values.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_scores_of_any_number_type(dtype: torch.dtype) -> None:
    structure = Structure((group("a", 3),))
    scores = Scores({"a": torch.tensor([3, 1, 2]).to(dtype)}, {}, "given", {}, 0)
    found: Tensor = group_scores(scores, structure, FREE).values["a"]
    assert found.dtype == torch.float64
    assert found.tolist() == [3, 1, 2]


def test_a_pattern_that_fits_no_layer_says_which_would() -> None:
    structure = Structure((group("layer1.0.conv", 8), group("head", 4)))
    for name, pattern, words in (
        ("floor", "layer1", r"write 'layer1\.\*' for the layers in it"),
        ("round_to", "haed", "did you mean 'head'"),
        ("floor", "q", "among them are layer1.0.conv, head"),
    ):
        with pytest.raises(errors.InputError, match=words) as caught:
            Ranking(**{name: {pattern: 1}}).check(structure)
        assert caught.value.what == f"{name}='{pattern}' fits no layer"
