"""What every method is measured beside: chance, slopes, and removing one column at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from lrp.errors import InputError
from neuralize.evaluation._imputing import DONORS, imputed_scores, ready
from neuralize.evaluation._rows import Floats, Rows, choice, count, generator
from neuralize.evaluation.scores import Score

__all__ = ["gradient", "gradient_x_input", "occlusion", "random_values", "sensitivity"]

RANDOM = 2  # stream of random numbers, beside those of flipping


def random_values(X: Any, rng: Any = 0) -> Floats:
    """Relevances that know nothing: standard normal numbers (N, D).

    Parameters
    ----------
    X : array-like or DataFrame (N, D)
    rng : int or Generator

    Examples
    --------
    >>> random_values([[0.0, 0.0]], 0).shape
    (1, 2)
    """
    rng = rng if isinstance(rng, np.random.Generator) else generator(rng, RANDOM)
    return np.asarray(rng.standard_normal(Rows.of(X).array.shape))


def gradient(score: Any, X: Any, *, target: Any = None, step: float = 1e-4) -> Floats:
    """Slope of the score at every row, (N, D), per raw unit.

    Through torch where the score is a NeuralizedModel that can be
    differentiated; otherwise by central differences, 2 D evaluations.

    Parameters
    ----------
    score, X, target
        As in :func:`~neuralize.evaluation.flip`.
    step : float
        Half-width of a difference, in standard deviations of the column (where it
        is constant: in magnitudes of the value, or 1 if that is smaller).

    Raises
    ------
    InputError, NonFiniteError, TargetError, OutputError
        See :func:`~neuralize.evaluation.flip`.

    Examples
    --------
    >>> gradient(lambda X: X[:, 0] ** 2, [[3.0, 1.0], [1.0, 2.0]]).round(6).tolist()
    [[6.0, 0.0], [2.0, 0.0]]
    """
    if not 0 < step < np.inf:
        raise InputError("step is no width", expected="a number > 0", got=repr(step), fix="for example 1e-4")
    return Score(score, Rows.of(X), target, X).gradient(step)


def sensitivity(score: Any, X: Any, *, target: Any = None, kind: str = "squared", step: float = 1e-4) -> Floats:
    """Squared or absolute slopes (N, D): where the score reacts, not what it rests on.

    Parameters
    ----------
    score, X, target, step
        As in :func:`gradient`.
    kind : "squared" or "absolute"
        They order the columns alike.

    Examples
    --------
    >>> sensitivity(lambda X: 3 * X[:, 0] - X[:, 1], [[3.0, 1.0], [1.0, 2.0]]).round(6).tolist()
    [[9.0, 1.0], [9.0, 1.0]]
    """
    choice(kind, ("squared", "absolute"), "kind")
    slope = gradient(score, X, target=target, step=step)
    return slope**2 if kind == "squared" else np.abs(slope)


def gradient_x_input(score: Any, X: Any, *, target: Any = None, step: float = 1e-4) -> Floats:
    """Slope times value, (N, D): depends on where the origin of the table lies.

    Parameters
    ----------
    score, X, target, step
        As in :func:`gradient`.

    Examples
    --------
    >>> gradient_x_input(lambda X: 3 * X[:, 0], [[3.0, 1.0], [1.0, 2.0]]).round(6).tolist()
    [[9.0, 0.0], [3.0, 0.0]]
    """
    return gradient(score, X, target=target, step=step) * Rows.of(X).array


def occlusion(
    score: Any,
    X: Any,
    *,
    imputer: Any = "mean",
    target: Any = None,
    reference: Any = None,
    draws: int = 50,
    seed: int = 0,
    batch_size: int | str = "auto",
) -> Floats:
    """How much the score falls when one column alone is removed, (N, D).

    Parameters
    ----------
    score, X, imputer, target, reference, draws, seed, batch_size
        As in :func:`~neuralize.evaluation.flip`.

    Raises
    ------
    InputError, ColumnError, NonFiniteError, RuleError, TargetError, OutputError
        See :func:`~neuralize.evaluation.flip`.

    Notes
    -----
    Cost: N D draws evaluations of the score.

    Examples
    --------
    >>> occlusion(lambda X: X[:, 0] * X[:, 1], [[3.0, 1.0], [1.0, 2.0]], reference=[[0.0, 0.0]]).tolist()
    [[3.0, 3.0], [2.0, 2.0]]
    """
    rows = Rows.of(X)
    scored = Score(score, rows, target, X)
    fitted = ready(imputer, rows, reference, score)
    d = rows.features
    alone = np.eye(d, dtype=bool)[:, None]
    draws = count(draws, "draws") if fitted.numbers else 1

    result = np.empty_like(rows.array)
    parts = imputed_scores(
        scored,
        fitted,
        lambda part: np.broadcast_to(alone, (d, part.stop - part.start, d)),
        d,
        draws,
        generator(seed, DONORS),
        batch_size,
    )
    for part, found in parts:
        result[part] = scored.start[part, None] - found.mean(0).T
    return result
