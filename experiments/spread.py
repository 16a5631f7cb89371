"""Means with their standard errors, and intervals of paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

__all__ = ["Pair", "mean_and_error", "paired_interval"]

Pair = tuple[float, float | None]
RESAMPLED = 10_000


def mean_and_error(values: Iterable[float | None]) -> Pair | None:
    """Mean and standard error of the values that are there; no error of one, and None of none.

    Examples
    --------
    >>> mean_and_error([1.0, None, 3.0]), mean_and_error([2.0]), mean_and_error([])
    ((2.0, 1.0), (2.0, None), None)
    """
    v = np.array([x for x in values if x is not None], dtype=np.float64)
    if not len(v):
        return None
    return float(v.mean()), float(v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else None


def paired_interval(left: Mapping[int, float], right: Mapping[int, float]) -> tuple[float, float, float, int]:
    """Mean of left minus right over the seeds of both, its 95 % interval by bootstrap over them, and their number.

    Examples
    --------
    >>> paired_interval({0: 1.0, 1: 3.0}, {0: 1.0, 1: 2.0, 2: 9.0})
    (0.5, 0.0, 1.0, 2)
    """
    d = np.array([left[s] - right[s] for s in sorted(left.keys() & right.keys())])
    if not len(d):
        return float("nan"), float("nan"), float("nan"), 0
    draw = np.random.default_rng(0).integers(0, len(d), (RESAMPLED, len(d)))
    low, high = np.percentile(d[draw].mean(1), [2.5, 97.5])
    return float(d.mean()), float(low), float(high), len(d)
