"""Stability: overlaps against sets compared by hand, chance against simulation, and what agreement means."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import analysed
import matplotlib
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import compress
from compress._reference import pool_of
from compress.planning import plan_pruning, score
from compress.ranking import Ranking, group_scores
from compress.stability import Overlap, RankCorrelation, Stability, stability
from lrp.errors import BudgetError, InputError, MismatchError

matplotlib.use("Agg")
WIDTHS = {"stem": 12, "inner": 10, "top": 16, "hidden": 14}
TOTAL = sum(WIDTHS.values())


def pictures() -> tuple[Tensor, Tensor]:
    x, y = analysed.split()["train"]
    return x[:400], y[:400]


def measured(**options: Any) -> Stability:
    given: dict[str, Any] = {
        "criterion": "activation", "sizes": (1, 3), "draws": 6, "shares": (0.25, 0.5), "normalisation": "mean",
        "progress": False,
    }  # fmt: skip
    return stability(analysed.trained(), analysed.EXAMPLE, pictures(), **{**given, **options})


def scores_by_hand(criterion: str, size: int, draws: int, seed: int = 0) -> list[dict[str, Tensor]]:
    model, pool = analysed.trained(), pool_of(pictures())
    structure = compress.find_groups(model, analysed.EXAMPLE)
    out = []
    for draw in range(draws):
        x, y = pictures()
        rows = pool.draw(size, (seed, size, draw), True)
        given = score(model, analysed.EXAMPLE, [(x[rows], y[rows])], criterion=criterion, structure=structure)
        out.append(group_scores(given, structure, Ranking(normalisation="mean")).values)
    return out


def first_by_hand(scores: dict[str, Tensor], count: int) -> set[tuple[str, int]]:
    """The first to go in one order over all groups, of which one channel stays."""
    rows = []
    for k, (name, own) in enumerate(scores.items()):
        order = own.argsort(stable=True).tolist()[:-1]
        rows += [(float(own[j]), k, place, (name, j)) for place, j in enumerate(order)]
    return {row[3] for row in sorted(rows)[:count]}


def test_overlaps_are_those_of_sets_compared_by_hand() -> None:
    found = measured()
    assert found.sizes == (1, 3)
    for size in found.sizes:
        scores = scores_by_hand("activation", size, 6)
        for point in found.at(size):
            count = int(point.share * TOTAL)
            sets = [first_by_hand(s, count) for s in scores]
            assert all(len(s) == count for s in sets)
            pairs = [len(a & b) / count for a, b in itertools.combinations(sets, 2)]
            assert point.mean == pytest.approx(np.mean(pairs), abs=1e-12)
            assert point.low <= point.mean <= point.high
            assert point.chance == pytest.approx(count / TOTAL)
    assert found.overlaps[0].mean < 1


def test_the_rank_correlation_is_scipys() -> None:
    found = measured()
    for size, own in zip(found.sizes, found.correlations, strict=True):
        flat = [torch.cat([s[n] for n in sorted(s)]).numpy() for s in scores_by_hand("activation", size, 6)]
        pairs = [spearmanr(a, b).statistic for a, b in itertools.combinations(flat, 2)]
        assert own.mean == pytest.approx(np.mean(pairs), abs=1e-12)


def drawn_from(x: Tensor, layers: dict[str, float]) -> dict[str, Tensor]:
    """Scores drawn at random, seeded by the samples; with an offset per layer."""
    generator = torch.Generator().manual_seed(int(x.double().abs().sum() * 1e6) % 2**31)
    widths = {"stem": 12, "outer": 12, "inner": 10, "top": 16, "hidden": 14}
    return {n: torch.rand(widths[n], generator=generator, dtype=torch.float64) + layers.get(n, 0.0) for n in widths}


def chance(model: nn.Module, data: Any) -> dict[str, Tensor]:
    return drawn_from(data[0][0], {})


def layers_only(model: nn.Module, data: Any) -> dict[str, Tensor]:
    """Knows which layer to cut, and nothing within it."""
    return drawn_from(data[0][0], {"top": -10.0})


def constant(model: nn.Module, data: Any) -> dict[str, Tensor]:
    return {n: torch.linspace(0, 1, w) for n, w in {**WIDTHS, "outer": 12}.items()}


def level(model: nn.Module, data: Any) -> dict[str, Tensor]:
    return {n: torch.ones(w) for n, w in {**WIDTHS, "outer": 12}.items()}


def test_a_criterion_that_knows_nothing_overlaps_by_chance() -> None:
    found = measured(criterion=chance, sizes=(2,), draws=40, shares=(0.25, 0.5), reduction="root", normalisation="none")
    for point in found.overlaps:
        assert point.mean == pytest.approx(point.chance, abs=0.03)
        assert point.mean < point.high < point.chance + 0.1
    assert abs(found.correlations[0].mean or 1.0) < 0.05


def test_a_criterion_that_only_knows_the_layer_overlaps_by_chance_within_groups() -> None:
    point = measured(criterion=layers_only, sizes=(2,), draws=40, shares=(0.15,), normalisation="none").overlaps[0]
    assert point.chance_within == pytest.approx(7 / 16)  # 7 of the 16 channels of one layer
    assert point.mean == pytest.approx(7 / 16, abs=0.04)
    assert point.mean > 2 * point.chance


def test_chance_within_groups_against_simulation() -> None:
    found = measured(sizes=(1,), shares=(0.4,))
    scores = scores_by_hand("activation", 1, 6)
    rng = np.random.default_rng(0)
    counts = []
    for own in scores:
        gone = first_by_hand(own, int(0.4 * TOTAL))
        counts.append({n: sum(name == n for name, _ in gone) for n in WIDTHS})
    overlaps = []
    for _ in range(300):
        sets = [{(n, j) for n, w in WIDTHS.items() for j in rng.permutation(w)[: c[n]].tolist()} for c in counts]
        overlaps.append(np.mean([len(a & b) / len(a) for a, b in itertools.combinations(sets, 2)]))
    error = np.std(overlaps) / 300**0.5
    assert found.overlaps[0].chance_within == pytest.approx(np.mean(overlaps), abs=4 * error)


def test_a_criterion_that_never_changes_is_stable() -> None:
    found = measured(criterion=constant)
    assert all((o.mean, o.low, o.high) == (1.0, 1.0, 1.0) for o in found.overlaps)
    assert all(c.mean == pytest.approx(1.0) for c in found.correlations)
    assert found.enough(1.0) == 1
    flat = measured(criterion=level, sizes=(1,))
    assert flat.correlations[0] == RankCorrelation(1, None, None, None)
    assert "none, all scores of a draw are equal" in str(flat)
    assert Stability.from_json(flat.to_json()) == flat


def test_under_a_target_plans_are_compared() -> None:
    target = compress.Target(macs=0.6)
    found = measured(sizes=(2,), draws=4, target=target, floor=0.2, round_to=2)
    model, pool = analysed.trained(), pool_of(pictures())
    x, y = pictures()
    sets = []
    for draw in range(4):
        rows = pool.draw(2, (0, 2, draw), True)
        options: dict[str, Any] = {"normalisation": "mean", "floor": 0.2, "round_to": 2}
        data = [(x[rows], y[rows])]
        plan = plan_pruning(model, analysed.EXAMPLE, data, criterion="activation", target=target, **options)
        sets.append({(n, j) for n, channels in plan.removed.items() for j in channels})
    pairs = [2 * len(a & b) / (len(a) + len(b)) for a, b in itertools.combinations(sets, 2)]
    (point,) = found.overlaps
    assert point.mean == pytest.approx(np.mean(pairs), abs=1e-12)
    assert point.share == pytest.approx(np.mean([len(s) for s in sets]) / TOTAL)
    assert found.settings["target"] == {"macs": 0.6}


def test_draws_are_seeded() -> None:
    first, same, other = measured(), measured(), measured(seed=1)
    assert first == same
    assert first.overlaps != other.overlaps
    assert first.common == {1: pytest.approx(1 / 39, abs=0.01), 3: pytest.approx(3 / 39, abs=0.02)}


def made() -> Stability:
    def at(size: int, share: float, low: float) -> Overlap:
        return Overlap(size, share, low + 0.02, low, low + 0.04, share, share + 0.1)

    lows = {1: (0.95, 0.5), 2: (0.85, 0.92), 5: (0.96, 0.93), 10: (0.97, 0.9)}
    overlaps = tuple(
        at(size, share, low) for size, own in lows.items() for share, low in zip((0.1, 0.5), own, strict=True)
    )
    correlations = tuple(RankCorrelation(size, 0.8, 0.7, 0.9) for size in lows)
    return Stability(overlaps, correlations, 20, True, dict.fromkeys(lows, 0.1), {"seed": 0})


def test_enough_samples_by_hand() -> None:
    found = made()
    assert found.enough(0.9) == 5
    assert found.enough(0.9, share=0.1) == 5  # one sample was enough by luck: two were not
    assert found.enough(0.9, share=0.6) == 2
    assert found.enough(0.91) is None
    assert found.enough(0.3) == 1
    for wrong in (0, 1.1, "0.9", True):
        with pytest.raises(InputError, match="no overlap"):
            found.enough(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not measured"):
        found.at(3)


def test_it_prints_draws_and_is_kept(tmp_path: Path) -> None:
    found = made()
    found.save(tmp_path / "s.json")
    assert Stability.load(tmp_path / "s.json") == found
    lines = str(found).splitlines()
    assert lines[1].split() == ["1", "10%", "0.970", "0.950", "to", "0.990", "0.100", "0.200", "10%"]
    assert lines[-1] == "20 draws of each size"
    assert "rank correlation at 5: 0.800 (0.700 to 0.900)" in lines
    ax = found.plot()
    assert len(ax.lines) == 4 + 2
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0.97, 0.52])
    single = Stability(tuple(o for o in found.overlaps if o.share == 0.5), found.correlations, 20, True, found.common)
    ax = single.plot()
    assert list(ax.lines[0].get_xdata()) == [1, 2, 5, 10]
    assert single.plot(ax) is ax
    matplotlib.pyplot.close("all")


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="do not depend on samples"):
        measured(criterion="weight")
    with pytest.raises(InputError, match="too few samples"):
        measured(sizes=(1, 100))
    x, y = pictures()
    rows = torch.cat([(y == c).nonzero().flatten()[:3] for c in range(10)])
    with pytest.raises(InputError, match="all draws of 3 samples per class would be the same"):
        stability(analysed.trained(), analysed.EXAMPLE, (x[rows], y[rows]), criterion="activation", sizes=(1, 3))
    with pytest.raises(InputError, match="too few to compare"):
        measured(draws=2)
    with pytest.raises(BudgetError, match="no channel goes"):
        measured(shares=(0.01,))
    with pytest.raises(BudgetError, match="can not go"):
        measured(shares=(0.95,))
    x, _ = pictures()
    with pytest.raises(InputError, match="need labels"):
        stability(analysed.trained(), analysed.EXAMPLE, [x], criterion="activation")


def test_without_labels_samples_are_drawn_from_all() -> None:
    x, _ = pictures()
    found = stability(
        analysed.trained(), analysed.EXAMPLE, [x], criterion="activation", stratify=False, sizes=(5,), draws=3
    )
    assert not found.per_class
    assert found.common == {5: 5 / 400}
    assert str(found).startswith("samples")


class Once:
    """Counts in its class what it is asked."""

    calls: ClassVar[int] = 0

    def __call__(self, model: nn.Module, data: Any) -> dict[str, Tensor]:
        Once.calls += 1
        return chance(model, data)


def test_scores_are_kept_and_only_what_is_new_is_computed(tmp_path: Path) -> None:
    path = tmp_path / "draws"
    Once.calls = 0
    first = measured(criterion=Once(), resume=path)
    assert Once.calls == 12
    assert measured(criterion=Once(), resume=path) == first
    assert Once.calls == 12
    more = measured(criterion=Once(), resume=path, sizes=(1, 3, 4), draws=8, shares=(0.3,))
    assert Once.calls == 12 + 2 + 2 + 8
    assert more == measured(criterion=Once(), sizes=(1, 3, 4), draws=8, shares=(0.3,))
    with pytest.raises(MismatchError, match="'seed' differs"):
        measured(criterion=Once(), resume=path, seed=3)
    with pytest.raises(MismatchError, match="'criterion' differs"):
        measured(criterion=chance, resume=path)


@pytest.mark.slow
def test_relevance_grows_stable_with_samples() -> None:
    found = measured(criterion="lrp", sizes=(1, 5, 20), draws=12, shares=(0.3,))
    means = [o.mean for o in found.overlaps]
    assert means == sorted(means)
    assert means[-1] > found.overlaps[-1].chance_within + 0.2
    assert found.enough(0.5) is not None
