"""Heads built from units and pools over shapes, scales and degenerate numbers: finite, conserving, of one mind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.kernels import conserves

from neuralize import CentroidHead, NeuralizedModel
from neuralize.additive import AdditiveHead
from neuralize.bases import Basis
from neuralize.linear_units import Hyperplanes, LinearUnits
from neuralize.pools import HardPool, PathPool, SoftPool
from neuralize.scaling import Scaler
from neuralize.stages import Projection
from neuralize.units import ProductDistances, QuadraticForms, SquaredDistances

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
Rng = np.random.Generator


def spd(rng: Rng, d: int) -> np.ndarray:
    A = rng.normal(size=(d, d))
    return A @ A.T + 0.05 * np.eye(d)


def tree(rng: Rng, leaves: int) -> list[list[tuple[int, int]]]:
    """Paths of a random binary tree; nodes are numbered as they come."""
    count = 0

    def grow(n: int, path: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        nonlocal count
        if n == 1:
            return [path]
        left, right = count, count + 1
        count += 2
        m = int(rng.integers(1, n))
        return grow(m, [*path, (left, right)]) + grow(n - m, [*path, (right, left)])

    return grow(leaves, [])


def _groups(rng: Rng, points: np.ndarray) -> AdditiveHead:
    k = int(rng.integers(2, len(points) + 1))
    owner = np.concatenate([np.arange(k), rng.integers(0, k, len(points) - k)])
    return AdditiveHead(SquaredDistances(points), HardPool(rng.permutation(owner) if k > 1 else owner))


def _path(rng: Rng, points: np.ndarray) -> AdditiveHead:
    paths = tree(rng, len(points))
    nodes = points[rng.integers(0, len(points), 2 * len(points) - 2)]
    nodes = nodes + (rng.random(len(nodes)) < 0.5)[:, None] * points.std() * rng.normal(size=nodes.shape)
    return AdditiveHead(SquaredDistances(nodes), PathPool(paths))


def _quadratic(rng: Rng, points: np.ndarray, full: bool, soft: bool) -> AdditiveHead:
    k, d = points.shape
    size = float(np.abs(points - points.mean(0)).max()) or 1.0
    P = np.stack([spd(rng, d) if full else np.exp(rng.normal(size=d)) for _ in points]) / size**2
    P[-1] = P[0]
    constants = None if full else -0.5 * np.log(P)
    pool = (SoftPool if soft else HardPool)(k, {"log weights": np.log(rng.uniform(0.01, 1, k))})
    return AdditiveHead(QuadraticForms(points, P, constants), pool)


def _borders(rng: Rng, points: np.ndarray) -> AdditiveHead:
    k, d = points.shape
    centre = points.mean(0)
    size = float(np.abs(points - centre).max()) or 1.0
    W = (points - centre) @ spd(rng, d) / size**2
    return AdditiveHead(Hyperplanes(W, rng.normal(size=k), points, centre), SoftPool(k))


def _linear(rng: Rng, points: np.ndarray, soft: bool) -> AdditiveHead:
    pool = (SoftPool if soft else HardPool)(len(points), {"intercept": rng.normal(size=len(points))})
    return AdditiveHead(LinearUnits(points / (np.abs(points).max() or 1.0), rng.normal(size=points.shape[1])), pool)


HEADS: dict[str, Callable[[Rng, np.ndarray], Any]] = {
    "centroids": lambda rng, points: CentroidHead(points),
    "one unit each": lambda rng, points: AdditiveHead(SquaredDistances(points), HardPool(len(points))),
    "groups": _groups,
    "path": _path,
    "manhattan": lambda rng, points: AdditiveHead(ProductDistances(points, "manhattan"), HardPool(len(points))),
    "scores": lambda rng, points: _quadratic(rng, points, False, False),
    "diagonal": lambda rng, points: _quadratic(rng, points, False, True),
    "full": lambda rng, points: _quadratic(rng, points, True, True),
    "borders": _borders,
    "linear, hard": lambda rng, points: _linear(rng, points, False),
    "linear, soft": lambda rng, points: _linear(rng, points, True),
}
MIXES = [name for name in HEADS if name != "manhattan"]


def drawn(rng: Rng, k: int, d: int, kind: str, scale: float, offset: float) -> np.ndarray:
    points = rng.normal(size=(k, d))
    if kind == "duplicates":
        points[-1] = points[0]
        points[k // 2] = points[0]
    elif kind == "constant column":
        points[:, -1] = 0.1
    elif kind == "one far away":
        points[0] *= 1e4
    elif kind == "two far away":
        points[:2] += 1e3
    elif kind == "lattice":
        points = np.round(points)
    elif kind == "all the same":
        points[:] = points[0]
    return scale * (points + offset)


def around(rng: Rng, points: np.ndarray, scale: float) -> np.ndarray:
    """Rows between, on and far from the points, on midpoints, and with an entry of each."""
    k, d = points.shape
    mixed = points[rng.integers(0, k, (4, d)), np.arange(d)]
    return np.vstack(
        [
            points,
            (points[0] + points[-1]) / 2,
            points.mean(0),
            points[rng.integers(0, k, 4)] + scale * rng.normal(size=(4, d)),
            points[0] + 1e6 * scale * rng.normal(size=(2, d)),
            mixed,
        ]
    )


def sizes(e: Any) -> np.ndarray:
    return np.abs(e.values).sum(1) + sum(np.abs(part) for part in e.residual_parts.values())


def rounding(e: Any, X: np.ndarray, logits: np.ndarray, eps: float = 1e-16) -> np.ndarray:
    """What the digits of rows and numbers leave open, (N,): on a border in every column all else cancels."""
    moved = np.nansum(np.abs(e.slope).max(0) * (np.abs(X) + np.abs(e.break_even)), 1)
    large = np.abs(logits).max(1)
    return 100 * eps * moved + 1000 * eps * np.maximum(large, np.quantile(large, 0.8)) + 1e-300


def check(net: NeuralizedModel, X: np.ndarray) -> None:
    logits = net(X).numpy()
    assert np.isfinite(logits).all()
    labels, own = net.labels, net.predict(X)
    decided = np.searchsorted(labels, own)
    hard = isinstance(net.head, CentroidHead) or isinstance(net.head.pool, (HardPool, PathPool))
    assert ((logits > 0).sum(1) <= 1).all()
    best = logits.max(1)
    large = 0.0 if isinstance(net.head, CentroidHead) else net.head.units(torch.tensor(X)).abs().amax(1).numpy()
    # whoever wins has the largest logit, to within the rounding of a tie
    assert (logits[np.arange(len(X)), decided] >= best - 1e-9 * np.abs(logits).max(1)).all()
    questions: list[dict[str, Any]] = [{}, {"beta": 1e-3}, {"beta": math.inf}, {"rule": "undivided", "beta": 1e3}]
    questions += [{"target": labels[0]}, {"target": labels[-1], "contrast": labels[0]}]
    for question in questions:
        e = net.explain(X, **question)
        size, floor = sizes(e), rounding(e, X, logits)
        conserves(e, 1e-9, floor)
        if "contrast" not in question:
            place = np.searchsorted(labels, e.target)
            there = logits[np.arange(len(X)), place]
            # the network's own forward pass may lose digits where the explanation takes care not to
            loss = 1e-9 * size + 1e-9 * np.abs(logits).max(1) + floor + 1e-14 * large
            assert (np.abs(e.output - there) <= loss).all()
            np.testing.assert_allclose(e.competitors.sum(1), 1)
        if hard and "target" not in question and question.get("rule") != "undivided":
            won = e.output >= 0
            assert (e.residual_parts["competition"][won] == 0).all()
        known = ~np.isnan(e.break_even)
        assert (known == (e.slope != 0)).all()
        if question.get("beta") == math.inf and isinstance(net.head, CentroidHead):
            continue  # of competitors that tie to within rounding, the line may take another
        with np.errstate(invalid="ignore"):
            line = np.where(known, e.slope * (X - e.break_even), e.values)
        assert (np.abs(line - e.values) <= 1e-6 * np.maximum(size[:, None], np.abs(e.slope * X)) + floor[:, None]).all()


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    k=st.integers(2, 6),
    d=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(
        ["plain", "duplicates", "constant column", "one far away", "two far away", "lattice", "all the same"]
    ),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_any_head(name: str, k: int, d: int, seed: int, kind: str, scale: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    points = drawn(rng, k, d, kind, scale, offset)
    check(NeuralizedModel(HEADS[name](rng, points)), around(rng, points, scale))


@pytest.mark.parametrize("name", MIXES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    k=st.integers(2, 5),
    d=st.integers(1, 4),
    more=st.integers(0, 3),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["plain", "duplicates", "constant column", "two far away", "lattice"]),
    orthogonal=st.booleans(),
)
def test_any_head_behind_a_projection(
    name: str, k: int, d: int, more: int, seed: int, kind: str, orthogonal: bool
) -> None:
    """The same sums, whatever map and whatever right inverse; and rows the map can't tell apart alike."""
    rng = np.random.default_rng(seed)
    points = drawn(rng, k, d, kind, 1.0, 0.0)
    head = HEADS[name](rng, points)
    T = np.linalg.qr(rng.normal(size=(d + more, d)))[0].T
    if not orthogonal:
        T = (np.eye(d) + 0.3 * rng.normal(size=(d, d))) @ T
    L = np.linalg.pinv(T)
    blind = np.eye(d + more) - L @ T
    if more:
        L = L + blind @ rng.normal(size=L.shape)
    scale = np.exp(rng.normal(size=d + more))
    front = [Scaler(subtract=rng.normal(size=d + more), divide=scale), Projection(T, inverse=L)]
    net, inner = NeuralizedModel(head, front=front), NeuralizedModel(head)
    X = rng.normal(size=(12, d + more)) * scale * 2
    Z = net.front(torch.tensor(X)).numpy()
    for question in ({}, {"beta": 0.3, "target": 0}, {"target": 1, "contrast": 0}):
        e, z = net.explain(X, **question), inner.explain(Z, **question)
        floor = rounding(e, X, net(X).numpy()) + 1e-20
        conserves(e, 1e-9, floor)
        size = np.abs(e.values).sum(1) + np.abs(z.values).sum(1) + np.abs(e.residual) + np.abs(z.residual)
        assert (np.abs(e.output - z.output) <= 1e-9 * size).all()
        moved = net.explain(X + (rng.normal(size=X.shape) @ blind.T) * scale, **question)
        assert (np.abs(moved.values - e.values) <= 1e-6 * size[:, None] + 1e3 * floor[:, None]).all()
        B = Basis(rng.normal(size=(1, d + more)))
        conserves(net.explain(X, basis=B, **question), 1e-9, floor)


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(k=st.integers(2, 5), d=st.integers(1, 5), seed=st.integers(0, 2**31), offset=st.sampled_from([0.0, 3.0]))
def test_any_head_in_single_precision(name: str, k: int, d: int, seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    points = drawn(rng, k, d, "plain", 1.0, offset)
    net = NeuralizedModel(HEADS[name](rng, points)).float()
    X = (points[rng.integers(0, k, 20)] + rng.normal(size=(20, d))).astype(np.float32)
    for question in ({}, {"target": 0, "beta": 0.5}, {"target": 1, "contrast": 0}):
        e = net.explain(X, **question)
        assert e.values.dtype == np.float32
        conserves(e, 1e-4, rounding(e, X, net(X).numpy(), 1e-7))
