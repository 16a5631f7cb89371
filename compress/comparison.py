r"""Criteria at equal budget: does relevance help here, or would chance have done?

Every criterion removes the same share of the same quantity, on the same
reference samples, and is measured on the same labelled data, with and without
re-estimated batch-norm statistics. Random, weight magnitude and activation are
always among them.

*Area* is the mean accuracy over the rates, :math:`A = \frac1n \sum_k a(r_k)`
(Hatefi et al. 2024, arXiv 2408.12568, over 20 rates from 0 to 95 %); their code
integrates by the trapezoid rule instead, which gives 0.95 for a perfect curve.
Both are reported. *Top* is their highest rate that keeps 95 % of the unpruned
accuracy.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from compress._cells import Key, opened, weights_of
from compress._comparing import BASELINES, Cell, ReferenceSets, cells_of, named, normalisations_of, treatments_of
from compress._curves import QUANTITIES, Bench, evaluator, groups_of, scores_in, unpruned_cell
from compress._network import network_of
from compress._randomness import seed_of
from compress._reference import asked_with, criterion_settings, reads_samples
from compress._results import Result, aligned, as_csv, as_markdown, checked_rates
from compress.batchnorm import reestimate
from compress.costs import CostTable
from compress.criteria.scores import Scores, criterion_of
from compress.evaluation import evaluator_of
from compress.groups import Structure, find_groups
from compress.planning import score
from compress.ranking import Ranking
from lrp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BASELINES", "Comparison", "Curve", "compare"]

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Curve:
    """Accuracy of one criterion over the rates, draw by draw.

    Attributes
    ----------
    criterion : str
    normalisation : str
        Of the scores within a layer; "auto" as in :class:`compress.Ranking`.
    batchnorm : bool
        Whether batch-norm statistics were re-estimated after the cut.
    accuracy : tuple of tuple of float
        By draw, then by rate; a single draw where no other could differ.
    removed : tuple of float
        The share of the quantity that really went, by rate; mean over draws.
    """

    criterion: str
    normalisation: str
    batchnorm: bool
    accuracy: tuple[tuple[float, ...], ...]
    removed: tuple[float, ...]

    @property
    def name(self) -> str:
        plain = self.normalisation == Ranking.normalisation
        return f"{self.criterion}{'' if plain else f' / {self.normalisation}'}{' + BN' if self.batchnorm else ''}"

    @property
    def mean(self) -> tuple[float, ...]:
        """Over draws, by rate."""
        return tuple(float(m) for m in np.mean(self.accuracy, axis=0))

    @property
    def error(self) -> tuple[float, ...] | None:
        """Standard error of the mean over draws, by rate; None for a single draw."""
        n = len(self.accuracy)
        if n < 2:
            return None
        return tuple(float(e) for e in np.std(self.accuracy, axis=0, ddof=1) / math.sqrt(n))

    @property
    def areas(self) -> tuple[float, ...]:
        """Mean accuracy over the rates, by draw."""
        return tuple(float(a) for a in np.mean(self.accuracy, axis=1))


def _is_baseline(curve: Curve) -> bool:
    return curve.criterion.split(":")[0] in BASELINES


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Accuracy of all criteria at equal budget; prints as a table.

    Attributes
    ----------
    rates : tuple of float
        Shares that go.
    quantity : str
        Of what: "channels", "macs" or "params".
    curves : tuple of Curve
    baseline : float
        Accuracy of the network as it is.
    reestimated : tuple of float
        The same with re-estimated batch-norm statistics, by draw; empty if not asked for.
    count : int
        Samples it was measured on; 0 where a user's function was asked.
    settings : dict

    Examples
    --------
    See :func:`compare`.
    """

    FORMAT: ClassVar[str] = "compress.Comparison"

    rates: tuple[float, ...]
    quantity: str
    curves: tuple[Curve, ...]
    baseline: float
    reestimated: tuple[float, ...] = ()
    count: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def curve(self, criterion: str, normalisation: str | None = None, batchnorm: bool = False) -> Curve:
        """One of the curves; the first that fits where no normalisation is named.

        Raises
        ------
        InputError
        """
        for c in self.curves:
            if c.criterion == criterion and c.batchnorm is batchnorm and normalisation in (None, c.normalisation):
                return c
        raise InputError(
            "there is no such curve",
            expected=f"one of {[c.name for c in self.curves]}",
            got=f"{criterion!r}, normalisation {normalisation!r}, batchnorm {batchnorm}",
            fix="name it in criteria= when comparing",
        )

    def area(self, curve: Curve) -> float:
        """Mean accuracy over the rates, and over draws."""
        return float(np.mean(curve.areas))

    def trapezoid(self, curve: Curve) -> float:
        """Integral of the accuracy over the rates by the trapezoid rule; a perfect curve gives max - min rate."""
        return float(np.trapezoid(curve.mean, self.rates)) if len(self.rates) > 1 else 0.0

    def top(self, curve: Curve, keep: float = 0.95) -> float | None:
        """Highest measured rate at which the mean accuracy is at least ``keep`` of the unpruned one; None if none."""
        fits = [r for r, a in zip(self.rates, curve.mean, strict=True) if a >= keep * self.baseline - 1e-12]
        return max(fits, default=None)

    def difference(self, first: Curve, second: Curve) -> tuple[float, float | None]:
        """First area minus second, and its standard error over draws, paired by draw; None for a single draw.

        A curve of a single draw is paired with every draw of the other.
        """
        gaps = np.subtract(first.areas, second.areas)
        error = float(np.std(gaps, ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else None
        return float(gaps.mean()), error

    def error(self, first: Curve, second: Curve) -> float | None:
        r"""Standard error of a difference of areas: of draws, and of test samples where their number is known.

        Test samples count as if each network had its own,
        :math:`(A_1 (1 - A_1) + A_2 (1 - A_2)) / n`, which is rather too much.
        None if nothing is known.
        """
        drawn = self.difference(first, second)[1] or 0.0
        areas = [self.area(c) for c in (first, second)]
        tested = sum(a * (1 - a) for a in areas) / self.count if self.count else 0.0
        return math.sqrt(drawn**2 + tested) or None

    def verdict(self) -> str:
        """One sentence per treatment of batch norm: what is best, and whether it beats the best baseline.

        The best is chosen on the very data it is judged by, so a small lead is
        none; a lead counts from two standard errors.
        """
        lines = []
        for bn in sorted({c.batchnorm for c in self.curves}):
            ranked = sorted((c for c in self.curves if c.batchnorm is bn), key=lambda c: -self.area(c))
            others = [c for c in ranked if not _is_baseline(c)]
            base = [c for c in ranked if _is_baseline(c)]
            lead = "with batch norm re-estimated" if bn else "as cut"
            if not others:
                lines.append(f"{lead}: '{base[0].name}' is the best of the baselines")
                continue
            own, best = others[0], base[0]
            gap, error = self.difference(own, best)[0], self.error(own, best)
            shown = f"{100 * gap:+z.2f} points" + (" of area" if len(self.rates) > 1 else "")
            if error is None:
                how = f"'{own.name}' against the best baseline '{best.name}': {shown}, of which no error is known"
            else:
                shown += f" (standard error {100 * error:.2f})"
                if gap > 2 * error:
                    how = f"'{own.name}' is better than the best baseline '{best.name}': {shown}"
                elif gap < -2 * error:
                    how = f"the baseline '{best.name}' is better than '{own.name}': {shown}"
                else:
                    how = f"'{own.name}' is not told apart from the baseline '{best.name}': {shown}"
            lines.append(f"{lead}: {how}")
        return "\n".join(lines)

    # -- tables -------------------------------------------------------------
    def _ranked(self) -> list[Curve]:
        return sorted(self.curves, key=lambda c: (c.batchnorm, -self.area(c)))

    def _table(self) -> list[tuple[str, ...]]:
        several = len(self.rates) > 1  # of one rate there is no area but the accuracy itself
        head = (
            "criterion",
            *(f"-{r:.0%}" for r in self.rates),
            *(("area", "trapezoid") if several else ()),
            "top 95 %",
        )
        rows = [head]
        for c in self._ranked():
            error = c.error
            cells = [f"{m:.4f}" if error is None else f"{m:.4f} ± {error[k]:.4f}" for k, m in enumerate(c.mean)]
            top = self.top(c)
            shown = "-" if top is None else f"{top:.0%}"
            areas = (f"{self.area(c):.4f}", f"{self.trapezoid(c):.4f}") if several else ()
            rows.append((c.name, *cells, *areas, shown))
        return rows

    def _notes(self) -> list[str]:
        lines = [f"{self.quantity} removed; unpruned {self.baseline:.4f}"]
        if self.reestimated:
            lines[0] += f", with batch norm re-estimated {float(np.mean(self.reestimated)):.4f}"
        draws = max((len(c.accuracy) for c in self.curves), default=0)
        lines[0] += f"; {draws} draw{'s' if draws != 1 else ''}"
        if any(len(c.accuracy) < draws for c in self.curves):
            lines[0] += " of random, one of all else, for the reference samples are the same in every draw"
        if self.count:
            lines[0] += f", {self.count} test samples"
        if "auto" in self.settings and any(c.normalisation == Ranking.normalisation for c in self.curves):
            lines[0] += f"; scores normalised within a layer: {self.settings['auto']}"
        return [*lines, self.verdict()]

    def _parts(self) -> tuple[str, str]:
        """The table, and what it is of, without the verdict: for pages."""
        return aligned(self._table()), self._notes()[0]

    def __str__(self) -> str:
        return "\n".join([aligned(self._table()), *self._notes()])

    def to_markdown(self) -> str:
        """The table, best area first, and what it says."""
        return "\n".join([as_markdown(self._table()), "", *self._notes()])

    def to_csv(self) -> str:
        """One line for every curve, draw and rate."""
        rows: list[Sequence[Any]] = [
            ("criterion", "normalisation", "batchnorm", "draw", "rate", "removed", "accuracy"),
        ]
        for c in self.curves:
            for draw, own in enumerate(c.accuracy):
                for rate, removed, accuracy in zip(self.rates, c.removed, own, strict=True):
                    rows.append((c.criterion, c.normalisation, c.batchnorm, draw, rate, removed, accuracy))
        return as_csv(rows)

    def plot(self, ax: Axes | None = None, batchnorm: bool | None = None) -> Axes:
        """Accuracy over the rate, a line per curve with its standard error; baselines are dashed.

        Parameters
        ----------
        ax : Axes, optional
        batchnorm : bool, optional
            Only the curves with, or without re-estimated statistics.
        """
        from compress.plots import comparison

        return comparison(self, ax, batchnorm=batchnorm)

    # -- keeping ------------------------------------------------------------
    def _told(self) -> str:
        names = list(dict.fromkeys(c.criterion for c in self.curves))
        rates = ", ".join(f"{r:.0%}" for r in self.rates)
        return f"{', '.join(names)} at {rates} of the {self.quantity} removed; unpruned {self.baseline:.4f}"

    def _held(self) -> dict[str, Any]:
        curves = [
            {**vars(c), "accuracy": [list(a) for a in c.accuracy], "removed": list(c.removed)} for c in self.curves
        ]
        return {
            "rates": list(self.rates),
            "quantity": self.quantity,
            "curves": curves,
            "baseline": self.baseline,
            "reestimated": list(self.reestimated),
            "count": self.count,
            "settings": dict(self.settings),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> Comparison:
        rates = tuple(float(r) for r in stored["rates"])
        curves = []
        for c in stored["curves"]:
            accuracy = tuple(tuple(float(a) for a in row) for row in c["accuracy"])
            removed = tuple(float(r) for r in c["removed"])
            if not accuracy or any(len(row) != len(rates) for row in (*accuracy, removed)):
                raise ValueError(f"'{c['criterion']}' has not one value per rate")
            curves.append(Curve(str(c["criterion"]), str(c["normalisation"]), bool(c["batchnorm"]), accuracy, removed))
        more = float(stored["baseline"]), tuple(float(a) for a in stored["reestimated"])
        return cls(rates, str(stored["quantity"]), tuple(curves), *more, int(stored["count"]), dict(stored["settings"]))


def compare(
    model: nn.Module,
    example_inputs: Any,
    data: Any,
    *,
    criteria: Sequence[Any] | Mapping[str, Any] = ("lrp",),
    evaluate: Any,
    rates: Sequence[float] = RATES,
    quantity: str = "channels",
    normalisations: str | Sequence[str] | Mapping[str, str | Sequence[str]] = Ranking.normalisation,
    reestimate_batchnorm: bool | Sequence[bool] = (False, True),
    draws: int = 1,
    per_class: int | None = None,
    reduction: str = Ranking.reduction,
    scope: str = Ranking.scope,
    floor: Any = Ranking.floor,
    round_to: Any = 1,
    seed: int = 0,
    batch_size: int = 64,
    structure: Structure | None = None,
    resume: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Accuracy of several criteria after cutting to the same budgets, without fine-tuning.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    example_inputs : Tensor or tuple
    data : iterable of batches, (x, y) or Dataset
        Reference samples: for scores, and, without their labels, for batch
        norm. With ``per_class``, what the draws are taken from.
    criteria : sequence or dict
        Names, criteria or functions; in a dict, by the name they are to have.
        Random, weight and activation are added where they are missing.
    evaluate : iterable of batches or callable
        Labelled samples apart from ``data``, or a function of the model.
    rates : sequence of float
        Shares of the quantity that go, in [0, 1).
    quantity : {"channels", "macs", "params"}
    normalisations : str, sequence or dict
        Within a layer, as in :class:`compress.Ranking`; several give a curve
        each. In a dict by the criterion's name, "*" for all others ("none"
        where it is missing). Compare criteria under the same one, or show all.
    reestimate_batchnorm : bool or sequence of bool
    draws : int
        With ``per_class``: independent random sets of reference samples, the
        same for every criterion. Without, or where there are no more samples
        than that: only random differs between draws, all else has a single one.
    per_class : int, optional
        Samples of every class in a draw. Draws that have to share many samples
        differ less than they should; ``settings["common"]`` is the share.
    reduction, scope, floor, round_to
        See :class:`compress.Ranking`, whose defaults hold but for the rounding:
        widths are not rounded, so that budgets are equal.
    seed : int
    batch_size : int
        Of drawn samples.
    structure, device, progress
    resume : path, optional
        A file for finished cells; later calls with more rates, criteria or
        draws only compute what is new.

    Returns
    -------
    Comparison

    Raises
    ------
    BudgetError
        Before any scoring, if a rate can not be reached.
    MismatchError
        If ``resume`` is of other weights, data or settings.
    InputError, StructureError, NonFiniteError

    Notes
    -----
    Cost: a scoring pass per criterion and draw, and an evaluation per curve,
    draw and rate.

    Examples
    --------
    >>> import torch, compress
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> data = [(torch.randn(20, 4), torch.arange(20) % 2)]
    >>> found = compress.compare(net, data[0][0], data, evaluate=data, rates=(0.25, 0.5), reestimate_batchnorm=False)
    >>> [c.name for c in found.curves]
    ['lrp', 'random', 'weight', 'activation']
    """
    from tqdm import tqdm

    shares = checked_rates(rates)
    if quantity not in QUANTITIES:
        raise InputError("quantity is not known", expected=f"one of {QUANTITIES}", got=repr(quantity), fix="choose one")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise InputError("draws makes no sense", expected="an int >= 1", got=repr(draws), fix="20 is usual")
    specs = named(criteria)
    chosen = {name: criterion_of(spec) for name, spec in specs.items()}
    wanted = normalisations_of(normalisations, specs)
    treatments = treatments_of(reestimate_batchnorm)
    measure = evaluator(evaluator_of(evaluate, device=device))
    model = network_of(model)
    found = structure or find_groups(model, example_inputs)
    table = CostTable.of(model, example_inputs, found)
    ranking = {"reduction": reduction, "scope": scope, "floor": floor, "round_to": round_to}
    bench = Bench(model, example_inputs, found, table, measure, ranking, quantity, device)
    bench.check(max(shares))
    sets = ReferenceSets(data, per_class, draws, seed, batch_size)
    if per_class is not None and draws > 1 and not sets.differ:
        warnings.warn(
            f"every draw has the same reference samples: the data hold exactly {per_class} of every class. They are "
            "compared once, and without a standard error. Pass more samples, or a smaller per_class",
            UserWarning,
            stacklevel=2,
        )
    settings = {"quantity": quantity, "per_class": per_class, "seed": seed, **ranking}
    identity: dict[str, Any] = {}
    if resume is not None:
        identity = {**weights_of(model), "data": sets.fingerprint(), "evaluate": asked_with(evaluate)}
        identity |= {"groups": groups_of(found), "batch_size": batch_size}
    told = {name: json.dumps(criterion_settings(specs[name], c)) for name, c in chosen.items()}

    def scored(name: str, draw: int) -> Callable[[], Scores]:
        criterion = chosen[name]
        if specs[name] == "random":
            criterion = criterion_of(f"random:{seed_of(seed, 1, draw) % 2**31}")
        return lambda: score(
            model, example_inputs, sets.of(draw), criterion=criterion, structure=found, device=device, progress=False
        )

    measured: dict[tuple[Any, ...], dict[str, Any]] = {}
    with opened(resume, "comparison", {**identity, **settings}) as cells:
        unpruned = cells.value(["unpruned"], lambda: unpruned_cell(measure(model)))
        reestimated = []
        if True in treatments:
            for draw in range(draws if sets.differ else 1):

                def again(draw: int = draw) -> float:
                    return measure(reestimate(model, sets.of(draw), device=device)).accuracy

                reestimated.append(float(cells.value(["reestimated", draw], again)))
        plan = list(cells_of(specs, wanted, treatments, draws, shares))
        for name, how, bn, draw, rate in tqdm(plan, desc="comparison", unit="cut", disable=None if progress else True):
            differs = sets.differ and reads_samples(specs[name], chosen[name])
            seeded = draw if differs or specs[name] == "random" else 0
            key: Key = [name, told[name], how, bn, max(seeded, draw if bn and sets.differ else 0), rate]

            def cut(seeded: int = seeded, name: str = name, cell: Cell = (name, how, bn, draw, rate)) -> dict[str, Any]:
                scores = scores_in(cells, ["scores", name, told[name], seeded], scored(name, seeded))
                _, how, bn, draw, rate = cell
                return bench.measured(scores, rate, {"normalisation": how}, sets.of(draw) if bn else None)

            measured[name, how, bn, draw, rate] = cells.value(key, cut)
    curves = []
    for name, how, bn in dict.fromkeys(row[:3] for row in plan):
        own = draws if sets.differ or specs[name] == "random" else 1
        grid = [[measured[name, how, bn, draw, rate] for rate in shares] for draw in range(own)]
        removed = np.mean([[cell["removed"][quantity] for cell in row] for row in grid], axis=0)
        accuracy = tuple(tuple(float(cell["accuracy"]) for cell in row) for row in grid)
        curves.append(Curve(name, how, bn, accuracy, tuple(float(r) for r in removed)))
    auto = Ranking().settled(found).normalisation
    public = {
        **settings,
        "auto": auto,
        "draws": draws,
        "common": sets.common,
        "criteria": {name: [c.name, c.settings] for name, c in chosen.items()},
    }
    return Comparison(
        shares, quantity, tuple(curves), unpruned["accuracy"], tuple(reestimated), unpruned["count"], public
    )
