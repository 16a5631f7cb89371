r"""Infidelity and maximum sensitivity of relevances (Yeh et al., NeurIPS 2019, arXiv 1901.09392).

Infidelity is the expected squared error of predicting, from relevances, how
the score changes: with a predicted change :math:`p` and the change :math:`a` of the score
it is :math:`E(\beta p - a)^2`. What p is depends on what the values are:

* *relevances* are in units of the score. Removing a set S of columns should
  cost :math:`p = \sum_{t \in S} R_t`;
* *slopes* are per unit of the column. Moving by :math:`\delta` should
  change the score by :math:`p = \delta \cdot \phi`.

The authors' definition has :math:`\beta = 1`: it then depends on the scale of
the values, and methods that are right up to a factor look wrong. With
normalisation :math:`\beta = E(pa)/E(p^2)`, the factor that fits best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from lrp.errors import InputError
from neuralize.evaluation._imputing import DONORS, WORK, filled, ready
from neuralize.evaluation._rows import Floats, Rows, choice, count, generator, relevances
from neuralize.evaluation.estimates import deviation, mean_of
from neuralize.evaluation.imputers import Imputer
from neuralize.evaluation.scores import Score, target_of

__all__ = ["Infidelity", "Stability", "infidelity", "max_sensitivity"]

CHANGES = 3  # stream of random numbers, beside those of flipping and controls


@dataclass(frozen=True, eq=False, repr=False)
class Infidelity:
    """How wrong relevances are about changes of the score; 0 is right.

    Attributes
    ----------
    value, standard_error : float
        Mean over the rows of the squared error, in squared units of the score.
    relative, relative_standard_error : float
        The same over the mean squared change of the score: 0 is right, 1 is
        no better than relevances of 0 (and, with "row", than any).
    rows : ndarray (N,)
        Squared errors.
    scale : ndarray (N,)
        Factor beta of every row.
    kind : "relevance" or "slope"
    normalise : None, "row" or "all"
    """

    value: float
    standard_error: float
    relative: float
    relative_standard_error: float
    rows: Floats
    scale: Floats
    kind: str
    normalise: str | None

    def __repr__(self) -> str:
        return (
            f"Infidelity: {self.value:.4g} +- {self.standard_error:.2g}, relative {self.relative:.4g} "
            f"+- {self.relative_standard_error:.2g} ({self.kind}s, normalise={self.normalise!r}, {len(self.rows)} rows)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Stability:
    """How much an explanation moves when its row moves a little; 0 is not at all.

    Attributes
    ----------
    value, standard_error : float
        Mean over the rows of the largest change found.
    rows : ndarray (N,)
    radius : float
    """

    value: float
    standard_error: float
    rows: Floats
    radius: float

    def __repr__(self) -> str:
        return (
            f"Stability: {self.value:.4g} +- {self.standard_error:.2g}, at most {self.rows.max():.4g} "
            f"(radius {self.radius:.3g}, {len(self.rows)} rows)"
        )


def infidelity(
    score: Any,
    X: Any,
    values: Any,
    *,
    kind: str = "relevance",
    normalise: str | None = None,
    imputer: Any = "mean",
    noise: float = 0.1,
    draws: int = 200,
    seed: int = 0,
    target: Any = None,
    reference: Any = None,
) -> Infidelity:
    r"""Expected squared error of relevances as predictors of changes.

    Parameters
    ----------
    score, X, imputer, target, reference
        As in :func:`~neuralize.evaluation.flip`; the imputer counts for
        relevances only. A random one is part of the change, and its noise part
        of the infidelity.
    values : array-like, DataFrame or Explanation (N, D)
    kind : "relevance" or "slope"
        "relevance": a random set of columns is removed, its size uniform from
        1 to D. "slope" (gradients, ``explanation.slope``): Gaussian noise is
        subtracted from the row.
    normalise : None, "row" or "all"
        Fit no factor, one for each row, or one for all rows. It is fitted on the very
        draws that are judged, so "row" needs many.
    noise : float
        Of slopes: standard deviation of the noise, in those of the columns.
    draws : int
        Changes per row.
    seed : int

    Returns
    -------
    Infidelity

    Raises
    ------
    InputError, ColumnError, NonFiniteError, RuleError, TargetError, OutputError
        See :func:`~neuralize.evaluation.flip`.

    Notes
    -----
    Yeh et al. 2019, equation 1. Cost: N draws evaluations of the score.

    Examples
    --------
    >>> X, w = np.array([[1.0, 3.0], [4.0, 0.0]]), np.array([2.0, -1.0])
    >>> exact = w * (X - X.mean(0))
    >>> bool(infidelity(lambda X: X @ w, X, exact).value < 1e-20)
    True
    >>> bool(infidelity(lambda X: X @ w, X, 3 * exact).value > 1)
    True
    >>> bool(infidelity(lambda X: X @ w, X, 3 * exact, normalise="all").value < 1e-20)
    True
    """
    choice(kind, ("relevance", "slope"), "kind")
    choice(normalise, (None, "row", "all"), "normalise")
    draws = count(draws, "draws")
    rows = Rows.of(X)
    given = relevances(values, rows)
    scored = Score(score, rows, target_of(score, values, target), X)
    fitted = ready(imputer, rows, reference, score) if kind == "relevance" else None
    width = np.zeros(rows.features)
    if fitted is None:
        known = rows if reference is None else Rows.of(reference, "reference", rows.features)
        width = _width(noise, known.scale, "noise")
    predicted, actual = _changes(scored, given, fitted, width, draws, seed)
    pa, pp = (predicted * actual).mean(1), (predicted**2).mean(1)
    if normalise == "all":
        pa, pp = np.full_like(pa, pa.mean()), np.full_like(pp, pp.mean())
    factor = np.ones(len(rows)) if normalise is None else np.divide(pa, pp, out=np.zeros_like(pa), where=pp > 0)
    errors = ((factor[:, None] * predicted - actual) ** 2).mean(1)
    sizes = (actual**2).mean(1)
    if sizes.any():
        relative = float(errors.mean() / sizes.mean())
        error = deviation(errors - relative * sizes) / math.sqrt(len(rows)) / float(sizes.mean())
    else:
        relative, error = (math.inf if errors.any() else 0.0), math.nan
    found = mean_of(errors)
    return Infidelity(found.value, found.standard_error, relative, error, errors, factor, kind, normalise)


def _width(factor: Any, scale: Floats, what: str) -> Floats:
    """Width (D,) of changes of every column."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float, np.number)) or not 0 < float(factor) < np.inf:
        raise InputError(f"{what} is no width", expected="a number > 0", got=repr(factor), fix="for example 0.1")
    if not scale.any():
        raise InputError(
            "the columns have no standard deviations",
            expected="rows that differ",
            got="one row, or equal ones",
            fix="pass reference= (infidelity) or scale= (max_sensitivity)",
        )
    return float(factor) * scale


def _changes(
    score: Score, values: Floats, imputer: Imputer | None, width: Floats, draws: int, seed: int
) -> tuple[Floats, Floats]:
    """Predicted and actual changes (N, draws)."""
    n, d = values.shape
    predicted, actual = np.empty((n, draws)), np.empty((n, draws))
    changes, donors = generator(seed, CHANGES), generator(seed, DONORS)
    size = max(1, WORK // (draws * (4 * d + (imputer.width if imputer else 0))))
    for first in range(0, n, size):
        part = slice(first, min(first + size, n))
        X = np.repeat(score.rows.array[part], draws, axis=0)
        R = np.repeat(values[part], draws, axis=0)
        if imputer is None:
            delta = ndtri(np.maximum(changes.random(X.shape), 2.0**-54)) * width
            changed, expected = X - delta, (delta * R).sum(1)
        else:
            u = changes.random((len(X), 1 + d))
            size_of_set = 1 + (u[:, :1] * d).astype(np.int64)
            removed = np.argsort(np.argsort(u[:, 1:], axis=1), axis=1) < size_of_set
            changed = filled(imputer, X, removed[None], donors.random((len(X), 1, imputer.numbers)))[0, 0]
            expected = (removed * R).sum(1)
        owner = np.repeat(np.arange(part.start, part.stop), draws)
        predicted[part] = expected.reshape(-1, draws)
        actual[part] = score.start[part, None] - score(changed, owner).reshape(-1, draws)
    return predicted, actual


def max_sensitivity(
    explainer: Callable[[Any], Any],
    X: Any,
    radius: float,
    *,
    draws: int = 10,
    seed: int = 0,
    scale: Any = None,
    relative: bool = True,
) -> Stability:
    r"""Largest change of an explanation within a box around its row.

    .. math:: \max_{|\delta_t| \le r s_t} |\Phi(x + \delta) - \Phi(x)|_2 \,/\, |\Phi(x)|_2

    estimated by the largest of ``draws`` uniform :math:`\delta`: a lower bound, which grows
    with their number.

    Parameters
    ----------
    explainer : callable
        From rows (N, D), a frame if X is one, to relevances (N, D) or an
        Explanation. It always gets all rows, in their order, so it may fix
        each row's target: ``lambda Z: net.explain(Z, target=net.predict(X))``.
    X : array-like or DataFrame (N, D)
    radius : float
        r, in units of ``scale``.
    draws : int
    seed : int
    scale : array-like (D,), optional
        s; default the standard deviations of the columns of X.
    relative : bool
        Divide by the norm of the explanation. Where that is 0 the result is 0 if
        nothing changes, and else infinite.

    Returns
    -------
    Stability

    Raises
    ------
    InputError, NonFiniteError

    Notes
    -----
    Yeh et al. 2019, definition 2.2, with a box in units of the columns. Cost: draws + 1
    explanations of all rows.

    Examples
    --------
    >>> X = np.array([[1.0, 3.0], [4.0, 0.0]])
    >>> max_sensitivity(lambda Z: np.ones_like(Z), X, 0.1).value
    0.0
    """
    rows = Rows.of(X)
    draws = count(draws, "draws")
    if scale is None:
        unit = rows.scale
    else:
        unit = np.asarray(scale, dtype=np.float64)
        if unit.shape not in ((), (rows.features,)) or not (np.isfinite(unit) & (unit >= 0)).all():
            raise InputError(
                "scale does not fit the columns",
                expected=f"{rows.features} numbers >= 0",
                got=repr(scale)[:80],
                fix="for example the standard deviations of the training rows",
            )
        unit = np.broadcast_to(unit, (rows.features,))
    width = _width(radius, unit, "radius")
    before = relevances(explainer(rows.form(rows.array)), rows, "explainer(X)")
    largest = np.zeros(len(rows))
    for draw in range(draws):
        # one stream per draw: the numbers of a row do not depend on those that follow it
        delta = (2 * generator(seed, CHANGES + draw).random(rows.array.shape) - 1) * width
        after = relevances(explainer(rows.form(rows.array + delta)), rows, "explainer(X)")
        largest = np.maximum(largest, np.linalg.norm(after - before, axis=1))
    if relative:
        norm = np.linalg.norm(before, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            largest = np.where(largest == 0, 0.0, largest / norm)
    with np.errstate(invalid="ignore"):
        found = mean_of(largest)
    return Stability(found.value, found.standard_error, largest, float(radius))
