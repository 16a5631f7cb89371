"""Explanations of every kind, built from formulas of one line, without a network."""

from __future__ import annotations

from typing import Any

import numpy as np

from neuralize import Explanation
from neuralize.lines import Lined


def by_hand(
    values: Any,
    data: Any,
    *,
    kind: str = "cluster",
    labels: Any = (0, 1),
    target: Any = None,
    decided: Any = None,
    contrast: Any = None,
    slope: Any = None,
    break_even: Any = None,
    parts: dict[str, Any] | None = None,
    names: Any = None,
    categories: dict[str, tuple[str, ...]] | None = None,
    unit: str = "log-odds",
    index: Any = None,
    notes: dict[str, Any] | None = None,
) -> Explanation:
    """Conserves by construction; without a slope, no value is neutral."""
    values, data = np.asarray(values, np.float64), np.asarray(data)
    n, d = values.shape
    parts = {name: np.broadcast_to(np.asarray(part, np.float64), (n,)) for name, part in (parts or {}).items()}
    residual = sum(parts.values(), start=np.zeros(n))
    labels = np.asarray(labels)
    target = np.broadcast_to(labels[0] if target is None else np.asarray(target), (n,))
    slope = np.zeros((n, d)) if slope is None else np.broadcast_to(np.asarray(slope, np.float64), (n, d))
    point = np.full((n, d), np.nan) if break_even is None else np.broadcast_to(np.asarray(break_even, float), (n, d))

    def lines(rows: slice, output: Any) -> Lined:
        return Lined(output, np.zeros((len(output), len(labels))), slope[rows], point[rows])

    return Explanation(
        values=values,
        output=values.sum(1) + residual,
        residual=residual,
        residual_parts=parts,
        target=target,
        contrast=None if contrast is None else np.broadcast_to(np.asarray(contrast), (n,)),
        decided=target if decided is None else np.broadcast_to(np.asarray(decided), (n,)),
        divided=np.zeros(n, bool),
        feature_names=tuple(names or (f"x{t}" for t in range(d))),
        labels=labels,
        data=data,
        beta=None,
        rule="undivided",
        model="Model",
        unit=unit,
        index=index,
        notes={name: np.asarray(rows) for name, rows in (notes or {}).items()},
        kind=kind,
        categories=categories or {},
        lines=lines,
    )


def outliers(target: int | None = None, n: int = 300) -> Explanation:
    """Squares: outlying columns speak for an outlier, those near the mean for an inlier."""
    rng = np.random.default_rng(0)
    data = np.column_stack([rng.normal(700, 100, n), rng.normal(3, 1, n), rng.exponential(2, n)])
    mean, spread = data.mean(0), data.std(0)
    outlying = ((data - mean) / spread) ** 2 - 2
    decided = np.where(outlying.sum(1) > 0, -1, 1)
    asked = decided if target is None else np.full(n, target)
    values = -asked[:, None] * outlying
    roots = mean + np.sign(data - mean) * spread * np.sqrt(2)
    return by_hand(
        values,
        data,
        kind="outlier",
        labels=[-1, 1],
        target=asked,
        decided=decided,
        slope=values / (data - roots),
        break_even=roots,
        names=["income", "rooms", "age"],
    )


def density(n: int = 300, seed: int = 1) -> Explanation:
    """A Gaussian: every column lowers its log density away from the mean."""
    rng = np.random.default_rng(seed)
    data = rng.normal([700, 3], [100, 1], (n, 2))
    values = -0.5 * ((data - [700, 3]) / [100, 1]) ** 2
    return by_hand(
        values,
        data,
        kind="density",
        labels=[0],
        slope=values / (data - [700, 3]),
        break_even=[700, 3],
        parts={"normaliser": -6.4},
        names=["income", "rooms"],
    )


def value(n: int = 120) -> Explanation:
    """A line minus a reference value."""
    rng = np.random.default_rng(2)
    data = rng.normal(size=(n, 3)) * [5, 1, 10] + [27, 0, 100]
    slope = np.array([0.5, 2, 0.05])
    return by_hand(
        slope * (data - [27, 0, 100]),
        data,
        kind="value",
        labels=[0],
        slope=slope,
        break_even=[27, 0, 100],
        parts={"intercept": 0.3},
        names=["bmi", "s5", "bp"],
    )


def classes(n: int = 150) -> Explanation:
    """Three classes; a number, a column of categories with a missing one, and an age that is often missing."""
    rng = np.random.default_rng(3)
    y = np.arange(n) % 3
    petal = y * 2 + rng.normal(size=n) * 0.5
    housing = np.where(rng.random(n) < 0.7, y, rng.integers(0, 3, n)).astype(float)
    age = rng.normal(size=n) + 40
    housing[5], age[rng.random(n) < np.where(y == 2, 0.7, 0.1)] = np.nan, np.nan
    labels = np.array(["setosa", "versicolor", "virginica"])
    slope = np.array([-1.0, 1.0, 1.0])[y]
    point = np.array([1.0, 1.0, 3.0])[y]
    values = np.column_stack(
        [
            slope * (petal - point),
            np.where(housing == y, 1.2, -0.8),
            np.where(np.isnan(age), np.where(y == 2, 0.9, -0.6), 0.1),
        ]
    )
    nothing = np.full(n, np.nan)
    return by_hand(
        values,
        np.column_stack([petal, housing, age]),
        kind="class",
        labels=labels,
        target=labels[y],
        slope=np.column_stack([slope, nothing * 0, nothing * 0]),
        break_even=np.column_stack([point, nothing, nothing]),
        parts={"prior": 0.2},
        names=["petal", "housing", "age"],
        categories={"housing": ("own", "rent", "free")},
    )


KINDS = {"outlier": outliers, "density": density, "value": value, "class": classes}
