"""The nearest point of a polytope: certificates, other solvers, closed forms, degenerate borders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.nearest import general_solver
from scipy.optimize import linprog, lsq_linear

from lrp import errors
from neuralize._projection import InfeasibleError, displace, project

EYE = np.eye


def polytope(seed: int, d: int, m: int, kind: str) -> tuple[np.ndarray, ...]:
    """x, A, b, weights and a feasible point."""
    rng = np.random.default_rng(seed)
    A, p = rng.normal(size=(m, d)), rng.normal(size=d)
    b = -A @ p + rng.exponential(size=m) * rng.choice([0.0, 0.1, 1.0])
    if kind == "copies":
        A, b = np.vstack([A, A, 3 * A[:1], 0 * A[:1]]), np.concatenate([b, b, 3 * b[:1], [0.0]])
    if kind == "scales":
        size = 10.0 ** rng.uniform(-8, 8, size=m)
        A, b = A * size[:, None], b * size
    if kind == "parallel":
        A = A[:1] + 1e-4 * A
        b = -A @ p + 1e-3 * rng.exponential(size=m)
    weights = 10.0 ** rng.uniform(-2, 2, size=d) if seed % 2 else np.ones(d)
    return rng.normal(size=d) * 3, A, b, weights, p


KINDS = st.sampled_from(["plain", "copies", "scales", "parallel"])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 15), KINDS, st.booleans())
def test_projection_is_feasible_nearest_and_certified(seed: int, d: int, m: int, kind: str, bounded: bool) -> None:
    x, A, b, w, p = polytope(seed, d, m, kind)
    low, high = np.full(d, -np.inf), np.full(d, np.inf)
    if bounded:
        low, high = np.minimum(x, p) - 0.1, np.maximum(x, p)
    found = project(x, A, b, weights=w, lower=low, upper=high)
    size = np.maximum(np.linalg.norm(A / np.sqrt(w), axis=1), 1e-300)
    slack = (A @ found.row + b) / size
    assert slack.min() >= -1e-8 * max(found.distance, np.abs(slack).max())
    assert (found.row >= low).all()
    assert (found.row <= high).all()
    assert found.distance == pytest.approx(np.sqrt((w * (found.row - x) ** 2).sum()), rel=1e-7, abs=1e-12)
    assert found.bound <= found.distance * (1 + 1e-12)
    assert found.distance - found.bound <= 1e-9 * found.distance
    # every other point of the polytope is at least as far: the one it was built around, and points between
    for share in (0.0, 0.3, 1.0):
        other = found.row + share * (p - found.row)
        assert np.sqrt((w * (other - x) ** 2).sum()) >= found.distance * (1 - 1e-9)
    # KKT: M (x' - x) is a combination, with weights >= 0, of active borders and bounds
    step = w * (found.row - x)
    at_low, at_high = found.row == low, found.row == high
    columns = np.column_stack([A[found.active].T, EYE(d)[:, at_low], -EYE(d)[:, at_high]])
    if columns.size:
        norms = np.linalg.norm(columns, axis=0)
        multipliers = minimize_nonnegative(columns / norms, step)
        np.testing.assert_allclose(columns / norms @ multipliers, step, atol=1e-6 * max(np.abs(step).max(), 1e-9))
    else:
        np.testing.assert_array_equal(step, 0)
    np.testing.assert_array_less(np.abs(slack[found.active]), 1e-6 * max(1.0, found.distance))


def minimize_nonnegative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    return lsq_linear(columns, target, bounds=(0, np.inf), tol=1e-14, method="bvls").x


@pytest.mark.parametrize("seed", range(12))
def test_projection_agrees_with_a_general_solver(seed: int) -> None:
    x, A, b, w, p = polytope(seed, 4, 9, "plain")
    low, high = np.minimum(x, p) - 0.2, np.maximum(x, p) + 0.2
    found = project(x, A, b, weights=w, lower=low, upper=high)
    other = general_solver(x, A, b, w, low, high, (p, x, (x + p) / 2, p + 0.1))
    assert found.distance == pytest.approx(other, rel=1e-4, abs=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 12))
def test_infeasible_exactly_where_a_linear_programme_says_so(seed: int, d: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(m, d))
    b = rng.normal(size=m) - 1.0
    low, high = np.full(d, -2.0), np.full(d, 2.0)
    known = linprog(np.zeros(d), -A, b, bounds=np.column_stack([low, high]), method="highs").status
    try:
        found = project(np.zeros(d), A, b, lower=low, upper=high)
    except InfeasibleError:
        assert known == 2
    else:
        assert known == 0
        assert (A @ found.row + b).min() > -1e-8


def test_one_border_is_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    x, a, w = rng.normal(size=7), rng.normal(size=7), rng.uniform(0.1, 5, size=7)
    h = a @ x - 3.0
    found = project(x, a[None], [-3.0], weights=w)
    np.testing.assert_allclose(found.row, x - h / (a**2 / w).sum() * a / w, rtol=1e-12)
    assert found.distance == pytest.approx(abs(h) / np.sqrt((a**2 / w).sum()), rel=1e-12)


def test_degenerate_polytopes() -> None:
    # inside: nothing moves, bit for bit
    x = np.array([0.1, 1e17, -3.0])
    found = project(x, np.ones((1, 3)), [0.0])
    np.testing.assert_array_equal(found.row, x)
    assert (found.distance, found.bound, found.active.any()) == (0.0, 0.0, False)
    # on the border
    assert project([1.0], [[1.0]], [-1.0]).distance == 0
    # zero rows that hold, and that can not
    assert project([0.0], [[0.0], [1.0]], [0.0, -1.0]).row.tolist() == [1.0]
    with pytest.raises(InfeasibleError):
        project([0.0], [[0.0]], [-1e-9])
    # a border that only fixed columns could move
    with pytest.raises(InfeasibleError):
        project([0.0, 0.0], [[1.0, 0.0]], [-1.0], fixed=[0])
    assert project([0.0, 0.0], [[1.0, 1.0]], [-1.0], fixed=[0]).row.tolist() == [0.0, 1.0]
    np.testing.assert_array_equal(project([0.0, 0.0], [[1.0, 1.0]], [-1.0], weights=[np.inf, 1]).row, [0.0, 1.0])
    # a single point: an equality as two borders
    assert project([5.0], [[1.0], [-1.0]], [-2.0, 2.0]).row == pytest.approx([2.0], abs=1e-9)
    # no borders at all, and a row outside its bounds
    assert project([5.0], np.zeros((0, 1)), [], upper=[3.0]).row.tolist() == [3.0]
    # a corner of one thousandth of a radian is far, not absent
    far = project([0.0, 0.0], [[1e-3, 1.0], [1e-3, -1.0]], [-1.0, -1.0])
    assert far.row == pytest.approx([1000.0, 0.0], rel=1e-9, abs=1e-6)
    with pytest.raises(InfeasibleError):
        project([0.0, 0.0], [[0.0, 1.0], [0.0, -1.0]], [-1.0, -1.0])


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7])
def test_sharp_corners(angle: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        A = np.zeros((3, 6))
        A[0, :2], A[1, :2], A[2, 2] = (angle, 1), (angle, -1), 1
        A = A @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
        size = 10.0 ** rng.uniform(-3, 3, size=3) * np.linalg.norm(A, axis=1)
        A *= (size / np.linalg.norm(A, axis=1))[:, None]
        b = -np.array([1, 1, 0.3]) * size / [np.hypot(angle, 1), np.hypot(angle, 1), 1]
        assert project(np.zeros(6), A, b).distance == pytest.approx(np.hypot(1 / angle, 0.3), rel=1e-8)


def test_hundreds_of_borders() -> None:
    rng = np.random.default_rng(1)
    A = rng.normal(size=(800, 60))
    x = rng.normal(size=60) * 20
    b = -A @ np.zeros(60) + 1.0
    found = project(x, A, b)
    assert (A @ found.row + b).min() > -1e-8 * found.distance
    assert found.active.sum() > 10
    assert found.distance - found.bound <= 1e-9 * found.distance


def test_given_displacements_count() -> None:
    found = displace(np.array([[1.0, 1.0]]), np.array([5.0]), np.array([2.0, -np.inf]), np.array([2.0, np.inf]))
    np.testing.assert_allclose(found.v, [2.0, 3.0])
    assert found.bound == pytest.approx(np.sqrt(13))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"A": [[1.0, 2.0]]}, "fit"),
        ({"weights": [0.0]}, "positive"),
        ({"weights": [1.0, 1.0]}, "weights"),
        ({"lower": [1.0], "upper": [0.0]}, "inverted"),
        ({"x": [np.nan]}, "finite"),
    ],
)
def test_projection_refuses(options: dict[str, Any], word: str) -> None:
    given_ = {"x": [0.0], "A": [[1.0]], "b": [0.0]} | options
    with pytest.raises(errors.InputError, match=word):
        project(given_.pop("x"), given_.pop("A"), given_.pop("b"), **given_)
