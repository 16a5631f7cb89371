r"""Flipping: remove columns in the order of their relevance, and watch the score.

Let :math:`f_i(k)` be the score of row i with its k first columns removed. A
good explanation makes it fall early when the most relevant columns go first
(MIF) and late when the least relevant do (LIF). With k on the axis, scaled to
[0, 1], the *area* of a curve is its integral by the trapezoid rule, in units
of the constant start: 1 if nothing changes, 0 if all is lost at once, negative
where the target was lost and others win. The *symmetric relevance gain* is
area(LIF) - area(MIF) (Bluecher, Vielhaben and Strodthoff, TMLR 2024, arXiv
2401.06654): it is 0 for random orders whatever the imputer, since both curves
meet the same loss from removing anything at all.

The score is a logit, or any number, not a count of decisions: removing columns
leaves the data, another competitor may come nearest on the way, and only the
number says by how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError
from neuralize.evaluation._imputing import DONORS, imputed_scores, ready
from neuralize.evaluation._rows import Floats, Rows, choice, count, generator, relevances
from neuralize.evaluation.estimates import Estimate, deviation, normalised
from neuralize.evaluation.imputers import Mask
from neuralize.evaluation.scores import Score, target_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["FlippingCurve", "Gain", "Job", "flip", "gain", "ranks", "srg"]

TIES = 0  # stream of random numbers
ORDERS = ("most", "least")


@dataclass(frozen=True, eq=False, repr=False)
class FlippingCurve:
    """Scores while columns are removed.

    Attributes
    ----------
    removed : ndarray (S,)
        Numbers of removed columns, from 0 on.
    scores : ndarray (N, S)
        Mean over the draws, times the sign where one was given.
    draws : ndarray (draws, S)
        Mean over the rows of every single draw.
    relative_draws : ndarray (draws, S)
        The same after division by the magnitude of each row's start; NaN
        where a start is 0.
    features : int
        D.
    order : "most" or "least"
        What goes first.
    imputer : str
    """

    removed: npt.NDArray[np.int64]
    scores: Floats
    draws: Floats
    relative_draws: Floats
    features: int
    order: str
    imputer: str

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def start(self) -> Floats:
        """Scores (N,) before anything is removed."""
        return self.scores[:, 0]

    @property
    def mean(self) -> Floats:
        """Mean over the rows, (S,)."""
        return np.asarray(self.scores.mean(0))

    @property
    def standard_error(self) -> Floats:
        """Of the mean, over the rows, (S,); NaN for a single row."""
        return np.array([deviation(s) for s in self.scores.T]) / math.sqrt(len(self))

    def area(self, normalise: str | None = "mean", spacing: str = "removed") -> Estimate:
        """Area under the curve.

        Parameters
        ----------
        normalise : "mean", "row" or None
            "mean": area of the mean curve over the area of the constant mean
            magnitude of the start. "row": every row over its own start, then
            the mean; rows that start near 0 dominate it. None: in units of
            the score.
        spacing : "removed" or "index"
            Distance of the points: columns removed between them, or 1 for all,
            which differs where steps are uneven.

        Returns
        -------
        Estimate
            With standard error over the rows (of the ratio, for "mean"), and
            spread over the draws.

        Notes
        -----
        Bley et al. 2025 track sign x predicted label, which starts at 1, at
        1, 1 + s, 1 + 2s, ... removed columns and count these as equidistant:
        ``flip(fitted.predict, ..., sign="score", steps=range(1, D + 1, s))``
        with ``area("row", "index")``.

        Raises
        ------
        InputError
            If the score starts at 0.
        """
        return normalised(*self._areas(normalise, spacing), normalise)[0]

    def areas(self, spacing: str = "removed") -> Floats:
        """Area of each row, (N,), in units of the score."""
        return np.asarray(self.scores @ self._weights(spacing))

    def to_frame(self) -> pd.DataFrame:
        """Mean and standard error against the number of removed columns."""
        import pandas as pd

        index = pd.Index(self.removed, name="removed")
        return pd.DataFrame({"mean": self.mean, "standard_error": self.standard_error}, index=index)

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw it; takes and returns ``ax``. See :func:`neuralize.evaluation.plots.curves`."""
        from neuralize.evaluation.plots import curves

        return curves({f"{self.order} relevant first": self}, ax=ax, **options)

    def _weights(self, spacing: str) -> Floats:
        at = self.removed if choice(spacing, ("removed", "index"), "spacing") == "removed" else np.arange(self.points)
        gaps = np.diff(at) / (at[-1] - at[0])
        return np.asarray((np.append(gaps, 0) + np.append(0, gaps)) / 2)

    @property
    def points(self) -> int:
        """S."""
        return len(self.removed)

    def _areas(self, normalise: str | None, spacing: str) -> tuple[Floats, Floats, Floats]:
        """Areas (N,), starts (N,) and areas of the draws."""
        weights = self._weights(spacing)
        draws = self.relative_draws if normalise == "row" else self.draws
        return self.scores @ weights, self.start, draws @ weights

    def __repr__(self) -> str:
        start, end = self.scores[:, 0].mean(), self.scores[:, -1].mean()
        return (
            f"FlippingCurve: {len(self)} rows, {self.order} relevant of {self.features} columns first, "
            f"{self.imputer} imputer, {len(self.draws)} draw{'s' * (len(self.draws) > 1)}\n"
            f"  score {start:.4g} -> {end:.4g} with {self.removed[-1]} columns removed\n"
            f"  area {self.area() if self.start.any() else self.area(None)} of the start"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Gain:
    """Symmetric relevance gain: area(least relevant first) - area(most relevant first).

    Attributes
    ----------
    value, standard_error, spread : float
        As in :class:`Estimate`; higher is better, 0 is a random order.
    rows : ndarray (N,)
        Contributions of the rows; their mean is the value.
    most, least : FlippingCurve
    """

    value: float
    standard_error: float
    spread: float
    rows: Floats = field(compare=False)
    most: FlippingCurve
    least: FlippingCurve

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw both curves; takes and returns ``ax``. See :func:`neuralize.evaluation.plots.curves`."""
        from neuralize.evaluation.plots import curves

        both = {"least relevant first": self.least, "most relevant first": self.most}
        return curves(both, ax=ax, **options)

    def __repr__(self) -> str:
        return (
            f"Gain: {Estimate(self.value, self.standard_error)} "
            f"(area {self.least.area(None)} - {self.most.area(None)} in units of the score), "
            f"{len(self.rows)} rows, {self.most.imputer} imputer"
        )


def flip(
    score: Any,
    X: Any,
    values: Any,
    *,
    imputer: Any,
    order: str = "most",
    steps: Any = None,
    draws: int = 50,
    seed: int = 0,
    sign: Any = None,
    target: Any = None,
    reference: Any = None,
    batch_size: int | str = "auto",
) -> FlippingCurve:
    """Remove the columns of every row in the order of their relevance, and track the score.

    Parameters
    ----------
    score : NeuralizedModel or callable
        A network: the logit of each row's target, which is tracked after
        removal; negative means that the assignment is lost. A callable: from
        rows (M, D), a frame if X is one, to (M,), or to (M, K) of which
        ``target`` selects a column.
    X : array-like or DataFrame (N, D)
        Of real numbers. For raw tables with categories pass ``net.encode(X)``
        and an imputer that draws values ("marginal", "other").
    values : array-like, DataFrame or Explanation (N, D)
        Relevances; only their order counts. Equal ones go in random order.
    imputer : str or Imputer
        "mean", "marginal", "kde", "other" or an instance of
        :class:`~neuralize.evaluation.Imputer`; fitted on ``reference`` if it is not yet.
    order : "most" or "least"
        What goes first. Least is the exact reverse of most, ties included.
    steps : int or sequence of int, optional
        Columns removed per step, up to all; or the numbers of removed columns
        themselves. Default 1 for D <= 10, 2 for D <= 50, else 5.
    draws : int
        Of a random imputer; the score is averaged over them.
    seed : int
    sign : None, "score" or array (N,) of -1 and 1
        Relevances and score are multiplied by it. "score": the sign of the
        score before removal, for decision values whose negative predictions
        are explained with negative relevance.
    target : optional
        See :class:`~neuralize.evaluation.scores.Score`. Default: that of an Explanation passed as
        ``values``, else what the model decides for the row.
    reference : array-like or DataFrame (M, D), optional
        Rows the imputer is fitted on; default X.
    batch_size : int or "auto"
        Rows per batch; the result does not depend on it.

    Returns
    -------
    FlippingCurve

    Raises
    ------
    InputError, ColumnError, NonFiniteError
        Tables that do not fit each other, or numbers that are none.
    RuleError
        Unknown imputer or order.
    TargetError, OutputError
        Targets or scores that can not be used.

    Notes
    -----
    Cost: N S draws evaluations of the score, S points of the curve. Every row
    has its own donors, the same at all points, in both orders and for all
    methods under one seed.

    Examples
    --------
    >>> X = [[1.0, 3.0], [4.0, 0.0]]
    >>> curve = flip(lambda X: X.sum(1), X, X, imputer="mean", reference=[[0.0, 0.0]])
    >>> curve.mean.tolist()
    [4.0, 0.5, 0.0]
    >>> curve.area().value
    0.3125
    """
    choice(order, ORDERS, "order")
    job = Job(score, X, values, imputer, steps, draws, seed, sign, target, reference, batch_size)
    return job.curves((order,))[0]


def srg(
    score: Any,
    X: Any,
    values: Any,
    *,
    imputer: Any,
    steps: Any = None,
    draws: int = 50,
    seed: int = 0,
    sign: Any = None,
    target: Any = None,
    reference: Any = None,
    normalise: str | None = "mean",
    spacing: str = "removed",
    batch_size: int | str = "auto",
) -> Gain:
    """Symmetric relevance gain: how much later the score falls if the least relevant columns go first.

    Parameters
    ----------
    score, X, values, imputer, steps, draws, seed, sign, target, reference, batch_size
        As in :func:`flip`.
    normalise, spacing
        As in :meth:`FlippingCurve.area`.

    Returns
    -------
    Gain
        With standard error over the rows, and spread over the draws. Both
        orders share their random numbers, so most of the imputer's noise
        cancels.

    Raises
    ------
    InputError, ColumnError, NonFiniteError, RuleError, TargetError, OutputError
        See :func:`flip`.

    Notes
    -----
    Bluecher et al., arXiv 2401.06654, for the difference of the two areas.
    With one column it is 0.

    Examples
    --------
    >>> X = [[1.0, 3.0], [4.0, 0.0]]
    >>> gain = srg(lambda X: X.sum(1), X, X, imputer="mean", reference=[[0.0, 0.0]])
    >>> gain.value, gain.rows.tolist()
    (0.375, [0.25, 0.5])
    """
    job = Job(score, X, values, imputer, steps, draws, seed, sign, target, reference, batch_size)
    most, least = job.curves(ORDERS)
    return gain(most, least, normalise, spacing)


def gain(most: FlippingCurve, least: FlippingCurve, normalise: str | None, spacing: str = "removed") -> Gain:
    """Difference of the two areas of the same rows."""
    high, start, high_draws = least._areas(normalise, spacing)
    low, _, low_draws = most._areas(normalise, spacing)
    found, rows = normalised(high - low, start, high_draws - low_draws, normalise)
    return Gain(found.value, found.standard_error, found.spread, rows, most, least)


# ---------------------------------------------------------------------- work


class Job:
    """Checked arguments of a flipping."""

    def __init__(
        self,
        score: Any,
        X: Any,
        values: Any,
        imputer: Any,
        steps: Any,
        draws: int,
        seed: int,
        sign: Any,
        target: Any,
        reference: Any,
        batch_size: int | str,
    ) -> None:
        self.rows = Rows.of(X)
        self.values = relevances(values, self.rows)
        self.removed = counts(steps, self.rows.features)
        self.draws, self.seed, self.batch = count(draws, "draws"), count(seed, "seed", 0), batch_size
        self.score = Score(score, self.rows, target_of(score, values, target), X)
        self.imputer = ready(imputer, self.rows, reference, score)
        self.sign = signs(sign, self.score.start)

    def curves(self, orders: tuple[str, ...]) -> list[FlippingCurve]:
        n, d = self.rows.array.shape
        ties = generator(self.seed, TIES)
        later = self.removed[1:]
        sets = len(later)

        def removed(rows: slice) -> Mask:
            rank = ranks(self.values[rows] * self.sign[rows, None], ties)
            masks = [rank < k if order == "most" else rank >= d - k for order in orders for k in later]
            return np.stack(masks)

        draws = self.draws if self.imputer.numbers else 1
        mean = np.empty((n, len(orders) * sets))
        single, relative = np.zeros((draws, len(orders) * sets)), np.zeros((draws, len(orders) * sets))
        rng = generator(self.seed, DONORS)
        start = self.score.start * self.sign
        with np.errstate(divide="ignore", invalid="ignore"):
            for part, found in imputed_scores(
                self.score, self.imputer, removed, len(orders) * sets, draws, rng, self.batch
            ):
                found *= self.sign[part]
                mean[part] = found.mean(0).T
                single += found.sum(2)
                relative += (found / np.abs(start[part])).sum(2)
            one = np.full((draws, 1), (start / np.abs(start)).mean())
        relative = np.where(np.isfinite(relative), relative / n, np.nan)
        name = self.imputer.name or type(self.imputer).__name__
        curves = []
        for i, order in enumerate(orders):
            mine = slice(i * sets, (i + 1) * sets)
            scores = np.column_stack([start, mean[:, mine]])
            replicates = np.column_stack([np.full(draws, start.mean()), single[:, mine] / n])
            curves.append(
                FlippingCurve(
                    self.removed, scores, replicates, np.column_stack([one, relative[:, mine]]), d, order, name
                )
            )
        return curves


def ranks(values: Floats, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Place (n, D) of every column in its row: 0 for the most relevant; equal ones in random order."""
    order = np.lexsort((rng.random(values.shape), -values), axis=-1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(values.shape[1]), values.shape), axis=1)
    return rank


def counts(steps: Any, d: int) -> npt.NDArray[np.int64]:
    """Numbers of removed columns, from 0 on.

    Raises
    ------
    InputError
    """
    if steps is None:
        steps = 1 if d <= 10 else 2 if d <= 50 else 5
    if np.ndim(steps) == 0:
        return np.append(np.arange(0, d, count(steps, "steps")), d)
    given = np.asarray(list(steps))
    if given.dtype.kind not in "iu" or not len(given) or given.min() < 0 or given.max() > d or not given.any():
        raise InputError(
            "steps are no numbers of removed columns",
            expected=f"integers from 1 to {d}, or one step size",
            got=repr(steps)[:80],
            fix="for example steps=1",
        )
    return np.unique(np.append(0, given.astype(np.int64)))


def signs(sign: Any, start: Floats) -> Floats:
    """Signs (N,).

    Raises
    ------
    InputError
    """
    if sign is None:
        return np.ones_like(start)
    if isinstance(sign, str) and sign == "score":
        return np.where(start < 0, -1.0, 1.0)
    given = np.asarray(sign)
    if given.shape not in ((), start.shape) or given.dtype.kind not in "fi" or not np.isin(given, (-1, 1)).all():
        raise InputError(
            "sign is no sign",
            expected=f"None, 'score' or -1 and 1, one per row ({len(start)},)",
            got=repr(sign)[:80],
            fix="for example np.where(fitted.decision_function(X) < 0, -1, 1)",
        )
    return np.broadcast_to(given.astype(np.float64), start.shape)
