"""The order in which choices are tried: all, at random, or by what is expected of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BASELINES", "STRATEGIES", "Choice", "choices", "expected_improvement", "posterior"]

BASELINES = ("epsilon", "zplus")
STRATEGIES = ("grid", "random", "bayes")
Floats = NDArray[np.float64]
Choice = tuple[str, ...]


def choices(
    strategy: str,
    grid: Sequence[Choice],
    tried: Mapping[Choice, Sequence[float]],
    budget: int,
    seed: int,
    kinds: Mapping[str, Any],
) -> Iterator[Choice]:
    """Choices to try, one by one; reads what the earlier ones were worth."""
    first = [(name,) * len(grid[0]) for name in BASELINES if name in kinds]
    rng = np.random.default_rng(seed)
    shuffled = [grid[k] for k in rng.permutation(len(grid)) if grid[k] not in first]
    rest = [choice for choice in grid if choice not in first] if strategy == "grid" else shuffled
    order = [*first, *rest][:budget]
    if strategy != "bayes":
        yield from order
        return
    begin = min(budget, max(len(first), 2) + len(grid[0]))  # as many random ones as there are groups
    yield from order[:begin]
    for _ in range(begin, budget):
        yield _next(grid, tried, list(kinds), seed)


def _next(grid: Sequence[Choice], tried: Mapping[Choice, Sequence[float]], names: Sequence[str], seed: int) -> Choice:
    """The choice with the largest expected improvement; of equal ones the first in the grid."""
    left = [choice for choice in grid if choice not in tried]
    x = np.array([_one_hot(choice, names) for choice in tried])
    y = np.array([float(np.mean(own)) for own in tried.values()])
    gain = expected_improvement(*posterior(x, y, np.array([_one_hot(choice, names) for choice in left]), seed))
    return left[int(np.argmax(np.round(gain, 12)))]


def expected_improvement(mean: Floats, deviation: Floats, known: float) -> Floats:
    r"""Of normal variables over what is known: :math:`s\,(z\,\Phi(z) + \phi(z))` with z = (m - f*) / s.

    Source: Jones, Schonlau, Welch, "Efficient global optimization of expensive
    black-box functions", J. Global Optimization 13, 1998, eq. 15.
    """
    from scipy.stats import norm

    s = np.maximum(deviation, 1e-12)
    z = (mean - known) / s
    out: Floats = s * (z * norm.cdf(z) + norm.pdf(z))
    return out


def posterior(x: Floats, y: Floats, at: Floats, seed: int) -> tuple[Floats, Floats, float]:
    """Mean and standard deviation of a Gaussian process at new points, and its largest mean at the old ones.

    The largest mean, not the largest value, is what there is to improve on: the
    value may be noise.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(1.0, (1e-1, 1e2), nu=2.5) + WhiteKernel(1e-2, (1e-6, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound is an answer
        process.fit(x, y)
    mean, deviation = process.predict(at, return_std=True)
    return mean, deviation, float(process.predict(x).max())


def _one_hot(choice: Choice, names: Sequence[str]) -> list[float]:
    return [float(rule == name) for rule in choice for name in names]
