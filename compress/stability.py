r"""Would the same channels go, had other reference samples been drawn?

Scores are computed on many random draws of reference samples. For every number
of samples, and every share of channels that goes, the sets of channels are
compared between draws. With :math:`A_i` the set of draw i, their overlap is

.. math:: O_{ij} = \frac{2 |A_i \cap A_j|}{|A_i| + |A_j|},

the share :math:`|A_i \cap A_j| / K` where both hold K channels. Two levels of
chance stand beside it: of sets drawn from all channels, and of sets that agree
only in how many channels go from each group. A criterion that always empties
the same layer overlaps with itself though it ranks nothing within the layer.

Sources: Yeom et al. 2021 (arXiv 1912.08881) count the overlap of the first
1,000 units between seeds; their rank correlations compare orders, not ranks,
and are not followed here: ours is Spearman's, on average ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from compress._agreement import Overlap, RankCorrelation, correlation, overlaps_of
from compress._cells import Cells, opened, weights_of
from compress._curves import groups_of
from compress._network import network_of
from compress._reference import criterion_settings, fingerprint, pool_of, reads_samples
from compress._results import Result, aligned, checked_rates, optional_number
from compress.costs import CostTable
from compress.criteria.scores import criterion_of
from compress.groups import Structure, find_groups
from compress.planning import score
from compress.ranking import GroupScores, Ranking, group_scores
from compress.target import Target
from lrp._drawing import axes_or_new
from lrp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Overlap", "RankCorrelation", "Stability", "stability"]

SIZES, SHARES = (1, 2, 5, 10, 20), (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


@dataclass(frozen=True, repr=False)
class Stability(Result):
    """Agreement between draws of reference samples; prints as a table.

    Attributes
    ----------
    overlaps : tuple of Overlap
        By size, then by share.
    correlations : tuple of RankCorrelation
        By size.
    draws : int
        For every size.
    per_class : bool
        Whether sizes are per class.
    common : dict of int to float
        Size to the share of samples that two draws are expected to share: where
        it is large, overlap says little about other samples.
    settings : dict

    Examples
    --------
    See :func:`stability`.
    """

    FORMAT: ClassVar[str] = "compress.Stability"

    overlaps: tuple[Overlap, ...]
    correlations: tuple[RankCorrelation, ...]
    draws: int
    per_class: bool
    common: Mapping[int, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(c.size for c in self.correlations)

    def at(self, size: int) -> tuple[Overlap, ...]:
        """The curve over the share that goes, for one size.

        Raises
        ------
        InputError
            If it was not measured.
        """
        found = tuple(o for o in self.overlaps if o.size == size)
        if not found:
            raise InputError(
                "this size was not measured",
                expected=f"one of {self.sizes}",
                got=repr(size),
                fix="name it in sizes=",
            )
        return found

    def enough(self, overlap: float = 0.9, share: float | None = None) -> int | None:
        """The smallest size at which the interval's lower end reaches an overlap, and stays there for larger sizes.

        Parameters
        ----------
        overlap : float
            In (0, 1].
        share : float, optional
            Of channels that go: the nearest one measured. None: at all of them.

        Returns
        -------
        int or None
            None if no size does.
        """
        if not (isinstance(overlap, (int, float)) and not isinstance(overlap, bool) and 0 < overlap <= 1):
            raise InputError(
                "this is no overlap", expected="a number in (0, 1]", got=repr(overlap), fix="0.9 is nine in ten"
            )
        best = None
        for size in reversed(self.sizes):
            points = self.at(size)
            if share is not None:
                points = (min(points, key=lambda o: abs(o.share - share)),)
            if any(o.low < overlap for o in points):
                break
            best = size
        return best

    def _told(self) -> str:
        unit = " per class" if self.per_class else ""
        return f"{self.draws} draws of {', '.join(map(str, self.sizes))} samples{unit}"

    def _held(self) -> dict[str, Any]:
        return {
            "overlaps": [vars(o) for o in self.overlaps],
            "correlations": [vars(c) for c in self.correlations],
            "draws": self.draws,
            "per_class": self.per_class,
            "common": [[size, share] for size, share in self.common.items()],
            "settings": dict(self.settings),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> Stability:
        overlaps = tuple(
            Overlap(int(o["size"]), *(float(o[f.name]) for f in fields(Overlap)[1:])) for o in stored["overlaps"]
        )
        correlations = tuple(
            RankCorrelation(
                int(c["size"]), optional_number(c["mean"]), optional_number(c["low"]), optional_number(c["high"])
            )
            for c in stored["correlations"]
        )
        common = {int(size): float(share) for size, share in stored["common"]}
        more = int(stored["draws"]), bool(stored["per_class"]), common, dict(stored["settings"])
        return cls(overlaps, correlations, *more)

    def __str__(self) -> str:
        unit = "per class" if self.per_class else "samples"
        table = [(unit, "goes", "overlap", "95 % interval", "chance", "within groups", "shared samples")]
        for o in self.overlaps:
            shared = f"{self.common[o.size]:.0%}" if o.size in self.common else "-"
            table.append(
                (
                    str(o.size),
                    f"{o.share:.0%}",
                    f"{o.mean:.3f}",
                    f"{o.low:.3f} to {o.high:.3f}",
                    f"{o.chance:.3f}",
                    f"{o.chance_within:.3f}",
                    shared,
                )
            )
        lines = [aligned(table, left=0)]
        for c in self.correlations:
            if c.mean is None:
                lines.append(f"rank correlation at {c.size}: none, all scores of a draw are equal")
            else:
                lines.append(f"rank correlation at {c.size}: {c.mean:.3f} ({c.low:.3f} to {c.high:.3f})")
        return "\n".join([*lines, f"{self.draws} draws of each size"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Overlap over the share that goes, a line with its interval per size, and chance; over the size if one share.

        Parameters
        ----------
        ax : Axes, optional
        """
        ax = axes_or_new(ax, 6.0, 4.0)
        unit = "per class" if self.per_class else "samples"
        single = all(len(self.at(size)) == 1 for size in self.sizes)
        lines = [(f"{size} {unit}", self.at(size)) for size in self.sizes]
        if single:
            lines = [("overlap", self.overlaps)]
        for k, (label, points) in enumerate(lines):
            x = [o.size if single else o.share for o in points]
            colour = f"C{k}"
            ax.plot(x, [o.mean for o in points], marker="o", markersize=3, color=colour, label=label)
            ax.fill_between(x, [o.low for o in points], [o.high for o in points], color=colour, alpha=0.2, linewidth=0)
        points = lines[-1][1]
        x = [o.size if single else o.share for o in points]
        ax.plot(x, [o.chance for o in points], color="0.5", linestyle=":", label="chance")
        ax.plot(x, [o.chance_within for o in points], color="0.5", linestyle="--", label="chance within groups")
        ax.set_xlabel(f"samples{' per class' if self.per_class else ''}" if single else "share of channels that goes")
        ax.set_ylabel("overlap between draws")
        ax.set_ylim(0, 1.02)
        ax.legend(fontsize="small")
        return ax


def stability(
    model: nn.Module,
    example_inputs: Any,
    samples: Any,
    *,
    criterion: Any = "lrp",
    sizes: Sequence[int] = SIZES,
    draws: int = 20,
    shares: Sequence[float] = SHARES,
    target: Target | None = None,
    stratify: bool = True,
    normalisation: str = Ranking.normalisation,
    reduction: str = Ranking.reduction,
    scope: str = Ranking.scope,
    floor: Any = 0.0,
    round_to: int | str = 1,
    seed: int = 0,
    batch_size: int = 64,
    structure: Structure | None = None,
    resume: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Stability:
    """How far the channels that go depend on which reference samples were drawn.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    example_inputs : Tensor or tuple
    samples : (x, y), Dataset or batches
        The pool that is drawn from: a pair of tensors, a data set with length
        and index, or a list of batches.
    criterion : str, Criterion or callable
    sizes : sequence of int
        Samples per draw: of every class if ``stratify``, else in all.
    draws : int
        Independent random draws for every size, at least 3; without
        replacement within a draw.
    shares : sequence of float
        Of the prunable channels that go.
    target : Target, optional
        Compare the plans for it, in place of ``shares``.
    stratify : bool
    normalisation, reduction, scope, floor, round_to
        See :class:`compress.Ranking`. Floors and rounding force agreement,
        hence these defaults; pass those of the plan you mean to make.
    seed : int
        Of the draws; for the same size and number, always the same samples.
    batch_size : int
    structure : Structure, optional
    resume : path, optional
        A file for the scores of every draw.
    device, progress

    Returns
    -------
    Stability

    Raises
    ------
    InputError
        If the samples are too few, or no more than a draw takes; if they have no
        labels to stratify by, or if the criterion does not look at samples.
    MismatchError
        If ``resume`` is of other work.

    Notes
    -----
    Cost: ``len(sizes) * draws`` scoring passes. The interval is the percentile
    bootstrap over draws; see :func:`compress._results.pairs_interval`.

    Examples
    --------
    >>> import torch
    >>> from compress.stability import stability
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> samples = torch.randn(60, 4), torch.arange(60) % 2
    >>> found = stability(net, samples[0][:1], samples, sizes=(1, 10), draws=5, shares=(0.5,))
    >>> [(o.size, o.share, o.chance) for o in found.overlaps]
    [(1, 0.5, 0.5), (10, 0.5, 0.5)]
    """
    points = None if target is not None else checked_rates(shares, "shares")
    model = network_of(model)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 3:
        raise InputError("draws are too few to compare", expected="an int >= 3", got=repr(draws), fix="20 is usual")
    pool = pool_of(samples)
    counts = tuple(dict.fromkeys((sizes,) if isinstance(sizes, int) else sizes))
    pool.check(counts, stratify)
    counts = tuple(sorted(int(n) for n in counts))
    common = {size: pool.common(size, stratify) for size in counts}
    if max(common.values()) >= 1:
        raise InputError(
            f"all draws of {counts[-1]} samples{' per class' if stratify else ''} would be the same samples",
            expected="fewer than there are to draw from",
            got=f"as many as there are: {pool.count} in all",
            fix="pass more samples, or smaller sizes",
        )
    chosen = criterion_of(criterion)
    if not reads_samples(criterion, chosen):
        raise InputError(
            f"the scores of '{chosen.name}' do not depend on samples",
            expected="a criterion that needs data",
            got=chosen.name,
            fix="there is nothing to compare: every draw gives the same channels",
        )
    found = structure or find_groups(model, example_inputs)
    ranking = Ranking(normalisation, reduction, scope, floor, round_to).settled(found)
    table = CostTable.of(model, example_inputs, found) if target is not None else None
    settings = {"criterion": criterion_settings(criterion, chosen), "seed": seed, "stratify": stratify}
    identity: dict[str, Any] = {}
    if resume is not None:
        identity = {**weights_of(model), "samples": fingerprint(pool.batches(range(pool.count)))}
        identity |= {"groups": groups_of(found), "ranking": [ranking.normalisation, reduction]}
        identity["batch_size"] = batch_size

    def drawn(size: int, draw: int) -> dict[str, Any]:
        rows = pool.draw(size, (seed, size, draw), stratify)
        given = score(
            model,
            example_inputs,
            pool.batches(rows, batch_size),
            criterion=chosen,
            structure=found,
            device=device,
            progress=False,
        )
        scored = group_scores(given, found, ranking)
        return {"values": {n: t.tolist() for n, t in scored.values.items()}, "unscored": dict(scored.unscored)}

    overlaps: list[Overlap] = []
    correlations = []
    with opened(resume, "stability", {**identity, **settings}) as cells:
        held = _collect(cells, counts, draws, drawn, progress)
    for size in counts:
        scored = [_scores_of(row) for row in held[size]]
        correlations.append(correlation(size, scored, seed))
        overlaps += overlaps_of(size, scored, found, ranking, points, target, table, seed)
    public = {**settings, **ranking.to_json()}
    public["target"] = None if target is None else target.to_json()
    per_class = stratify and pool.labels is not None
    return Stability(tuple(overlaps), tuple(correlations), draws, per_class, common, public)


def _collect(
    cells: Cells, sizes: Sequence[int], draws: int, drawn: Any, progress: bool
) -> dict[int, list[dict[str, Any]]]:
    from tqdm import tqdm

    out: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    with tqdm(
        total=len(sizes) * draws, desc="stability", unit="draw", disable=None if progress else True
    ) as bar:  # None: hidden off a terminal
        for size in sizes:
            for draw in range(draws):
                out[size].append(cells.value([size, draw], partial(drawn, size, draw)))
                bar.update()
    return out


def _scores_of(row: Mapping[str, Any]) -> GroupScores:
    return GroupScores({n: torch.tensor(v, dtype=torch.float64) for n, v in row["values"].items()}, row["unscored"])
