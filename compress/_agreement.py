"""Agreement between draws: of the sets of channels that go, and of the ranks of all scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from compress._results import pairs_interval
from compress.costs import CostTable
from compress.groups import Structure
from compress.planning import select
from compress.ranking import GroupScores, Ranking, order_of
from compress.target import Target
from lrp.errors import BudgetError

__all__ = ["Overlap", "RankCorrelation", "correlation", "overlaps_of"]


@dataclass(frozen=True)
class Overlap:
    """Of the sets of channels that go, between draws.

    Attributes
    ----------
    size : int
        Samples per draw: per class, or in all.
    share : float
        Of the prunable channels that go (the mean over draws, under a target).
    mean, low, high : float
        Over the pairs of draws, with the interval of a bootstrap over draws.
    chance : float
        Expected of sets drawn from all channels.
    chance_within : float
        Expected of sets that have only the numbers per group in common.
    """

    size: int
    share: float
    mean: float
    low: float
    high: float
    chance: float
    chance_within: float


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's, of all scores between draws; None where all scores of a draw are equal."""

    size: int
    mean: float | None
    low: float | None
    high: float | None


def correlation(size: int, scored: Sequence[GroupScores], seed: int) -> RankCorrelation:
    from scipy.stats import rankdata

    names = sorted(set.intersection(*(set(s.values) for s in scored)))
    if not names:
        return RankCorrelation(size, None, None, None)
    ranks = np.stack([rankdata(torch.cat([s.values[n] for n in names]).numpy()) for s in scored])
    ranks -= ranks.mean(1, keepdims=True)
    lengths = np.sqrt(np.square(ranks).sum(1))
    if not (lengths > 0).all():
        return RankCorrelation(size, None, None, None)
    unit = ranks / lengths[:, None]
    return RankCorrelation(size, *pairs_interval(unit @ unit.T, seed))


def overlaps_of(
    size: int,
    scored: Sequence[GroupScores],
    structure: Structure,
    ranking: Ranking,
    shares: Sequence[float] | None,
    target: Target | None,
    table: CostTable | None,
    seed: int,
) -> list[Overlap]:
    """One per share, or one for the target."""
    groups = structure.prunable
    start = dict(zip((g.name for g in groups), np.cumsum([0, *(g.width for g in groups)]).tolist(), strict=False))
    total = sum(g.width for g in groups)
    blocks = [order_of(s, structure, ranking) for s in scored]
    if target is not None and table is not None:
        limit = target.absolute(table.costs({}))
        members = np.zeros((len(scored), total), dtype=bool)
        for k, (own, s) in enumerate(zip(blocks, scored, strict=True)):
            for name, channels in select(structure, table, own, target, limit, s).items():
                members[k, start[name] + np.array(channels, dtype=np.int64)] = True
        return [_overlap(size, float(members.mean()), members, structure, seed)]
    # when a channel goes: how many have gone once its block is gone
    when = np.full((len(scored), total), np.inf)
    for k, own in enumerate(blocks):
        gone = 0
        for block in own:
            gone += len(block.channels)
            when[k, start[block.group] + np.array(block.channels)] = gone
    out = []
    for share in shares or ():
        members = when <= share * total + 1e-9
        short = int(members.sum(1).min())
        most = int(np.isfinite(when).sum(1).min())
        if most < share * total - 1e-9:
            raise BudgetError(
                f"{share:.0%} of the channels can not go",
                expected=f"{share * total:.0f} of {total}",
                got=f"{most} with everything removed that may go",
                fix="ask for smaller shares, or lower floor=",
            )
        if not short:
            raise BudgetError(
                f"no channel goes at {share:.1%}",
                expected="at least one unit",
                got=f"{share * total:.1f} of {total} channels",
                fix="ask for larger shares",
            )
        out.append(_overlap(size, share, members, structure, seed))
    return out


def _overlap(size: int, share: float, members: NDArray[np.bool_], structure: Structure, seed: int) -> Overlap:
    own = members.astype(np.float64)
    counts = own.sum(1)
    together = counts[:, None] + counts[None, :]
    chance = 2 * np.outer(counts, counts) / own.shape[1]
    within = np.zeros_like(chance)
    start = 0
    for g in structure.prunable:
        here = own[:, start : start + g.width].sum(1)
        within += 2 * np.outer(here, here) / g.width
        start += g.width
    off = ~np.eye(len(own), dtype=bool)
    with np.errstate(invalid="ignore"):  # two empty sets, under a target that is met already: they agree
        overlap, chance, within = (np.where(together > 0, m / together, 1.0) for m in (2 * own @ own.T, chance, within))
    mean, low, high = pairs_interval(overlap, seed)
    return Overlap(size, share, mean, low, high, float(chance[off].mean()), float(within[off].mean()))
