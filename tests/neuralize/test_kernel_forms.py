"""Pools of kernel machines by themselves: drawn weights of any size, identities, limits, and states that are loaded."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kernels as oracle
from sklearn.svm import SVR

from lrp.errors import ConvergenceError
from neuralize import neuralize
from neuralize.additive import AdditiveHead
from neuralize.heads import Request
from neuralize.kernel_pools import DensityPool, DuelPool, RKHSPool, logarithmic_mean
from neuralize.network import NeuralizedModel
from neuralize.units import Picked, SquaredDistances
from neuralize.values import ScoreValuePool, ValuePool
from neuralize.votes import NeighbourPool, ScorePool, decide_by_votes

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


def network(points: np.ndarray, pool: Any) -> NeuralizedModel:
    return NeuralizedModel(AdditiveHead(SquaredDistances(points), pool))


def tensor(array: Any) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64)


def ask(pool: Any, rule: str = "auto", beta: float | None = None, **options: Any) -> Request:
    return Request(rule, pool.default_beta(rule, False) if beta is None else beta, **options)


# ---------------------------------------------------------------------- the logarithmic mean


def test_logarithmic_mean() -> None:
    for a, b in itertools.product((1e-300, 1e-9, 0.3, 1.0, 1.0 + 1e-12, 1.0 + 1e-6, 2.0, 1e5, 1e300), repeat=2):
        found = float(logarithmic_mean(tensor(math.log(a)), tensor(math.log(b))))
        gap = math.log(a) - math.log(b)
        # between the two, above the geometric mean; by its series where the difference has no digits
        true = b * (1 + gap / 2 + gap**2 / 6) if abs(gap) < 1e-4 else (a - b) / gap
        assert found == pytest.approx(true, rel=1e-9 if 1e-200 < a < 1e200 and 1e-200 < b < 1e200 else 1e-6)
        assert min(a, b) * (1 - 1e-9) <= found <= max(a, b) * (1 + 1e-9)
        assert found == pytest.approx(float(logarithmic_mean(tensor(math.log(b)), tensor(math.log(a)))), rel=1e-12)
    far = logarithmic_mean(tensor(-1e6), tensor(3.0))
    assert far == pytest.approx(math.exp(3.0) / (1e6 + 3), rel=1e-12)
    assert torch.isfinite(logarithmic_mean(torch.tensor(-50.0), torch.tensor(-50.0)))


def test_logarithmic_mean_is_smooth_over_its_cases() -> None:
    g = tensor(np.concatenate([np.linspace(-3e-8, 3e-8, 601), [0.0]]))
    mean = logarithmic_mean(g, torch.zeros_like(g))
    np.testing.assert_allclose(mean, 1 + g / 2, rtol=1e-12)


# ---------------------------------------------------------------------- drawn expansions


@st.composite
def expansions(draw: Any) -> tuple[np.ndarray, np.ndarray, float, float, np.ndarray]:
    """Points, coefficients of both signs, a constant, gamma, rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    plus, minus, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    scale, gamma = 10.0 ** draw(st.integers(-3, 3)), 10.0 ** draw(st.floats(-3, 3))
    points = rng.normal(size=(plus + minus, columns)) * scale
    if draw(st.booleans()):
        points[-1] = points[0]
    size = draw(st.sampled_from([0.1, 3.0, 200.0]))
    a = np.exp(rng.uniform(-size, size, plus + minus)) * np.repeat([1.0, -1.0], [plus, minus])
    constant = draw(st.sampled_from([0.0, 1.0, -1.0])) * math.exp(float(rng.uniform(-size, size)))
    rows = np.vstack([rng.normal(size=(2, columns)) * scale, points[:1]])
    return points, a, constant, gamma / scale**2, rows


@given(expansions(), st.sampled_from([None, 0.01, 10.0, math.inf]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_duel(drawn: Any, stiffness: float | None) -> None:
    points, a, constant, gamma, rows = drawn
    v = [[max(constant, 0.0), max(-constant, 0.0)]]
    net = network(points, DuelPool(a[None], v, [[0, 1]], gamma))
    beta = None if stiffness is None else stiffness * gamma
    for c, sign in ((0, 1.0), (1, -1.0)):
        e = net.explain(rows, target=c, beta="auto" if beta is None else beta)
        for n, x in enumerate(rows):
            made = oracle.duel(x, points, a, constant, gamma, beta).scaled(sign)
            oracle.agree(e, n, made, floor=1e-13 * (1 + gamma * float(((x - points) ** 2).sum(1).max())))
    if constant == 0:
        for rule in ("gi", "hybrid"):
            net.head.pool.eta = 0.3
            e = net.explain(rows, target=0, rule=rule, beta="auto" if beta is None else beta)
            for n, x in enumerate(rows):
                made = oracle.duel(x, points, a, 0.0, gamma, beta, rule, 0.3)
                oracle.agree(e, n, made, floor=1e-13 * (1 + gamma * float((points**2).sum(1).max() + (x**2).sum())))


@given(expansions(), st.sampled_from(["gi", "hybrid"]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_product_form_with_a_constant(drawn: Any, rule: str) -> None:
    points, a, _, gamma, rows = drawn
    for constant in (1.0, -1.0):
        v = [[max(constant, 0.0), max(-constant, 0.0)]]
        net = network(points, DuelPool(a[None], v, [[0, 1]], gamma, eta=0.3))
        e = net.explain(rows, target=0, rule=rule)
        for n, x in enumerate(rows):
            made = oracle.duel(x, points, a, constant, gamma, None, rule, 0.3)
            oracle.agree(e, n, made, floor=1e-13 * (1 + gamma * float((points**2).sum(1).max() + (x**2).sum())))


@given(expansions(), st.floats(-2.0, 2.0))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_value(drawn: Any, level: float) -> None:
    points, a, constant, gamma, rows = drawn
    size = np.abs(a).sum() + abs(constant)
    if not 1e-50 < size < 1e50:
        a, constant = np.sign(a), float(np.sign(constant))
        size = len(a)
    net = network(points, ValuePool(a, constant, gamma, level * size))
    e = net.explain(rows)
    F = [constant + math.fsum(a * np.exp(-gamma * ((x - points) ** 2).sum(1))) for x in rows]
    np.testing.assert_allclose(net(rows).numpy()[:, 0], np.array(F) - level * size, atol=1e-12 * size)
    for n, x in enumerate(rows):
        b = constant - level * size
        made = oracle.duel(x, points, a, b, gamma).scaled(oracle.lam(x, points, a, b, gamma))
        oracle.agree(e, n, made, floor=1e-12 * size)


@given(expansions(), st.booleans(), st.sampled_from([None, 0.01, 10.0, math.inf]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_density(drawn: Any, divided: bool, stiffness: float | None) -> None:
    points, a, _, gamma, rows = drawn
    weights = np.abs(a)
    net = network(points, DensityPool(weights, gamma, threshold=0.5))
    beta = None if stiffness is None else stiffness * gamma
    rule = "divided" if divided else "undivided"
    e = net.explain(rows, target=0, rule=rule, beta="auto" if beta is None else beta)
    for n, x in enumerate(rows):
        made = oracle.density(x, points, weights, gamma, beta, divided)
        made = oracle.Explained(made.output - 0.5, made.values, made.parts | {"threshold": -0.5}, made.noise)
        oracle.agree(e, n, made, floor=1e-13 / gamma)


@given(expansions(), st.booleans(), st.integers(0, 99))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_duel_in_feature_space(drawn: Any, divided: bool, seed: int) -> None:
    points, _, _, gamma, rows = drawn
    rng = np.random.default_rng(seed)
    # members of both signs in both clusters, some in none
    W = rng.normal(size=(2, len(points))) * (rng.random((2, len(points))) < 0.7)
    W[0, 0], W[1, -1] = 1.0, 1.0
    norms = rng.uniform(0.05, 2.0, 2)
    net = network(points, RKHSPool(W, norms, gamma))
    rule = "divided" if divided else "undivided"
    for c in (0, 1):
        e = net.explain(rows, target=c, rule=rule)
        for n, x in enumerate(rows):
            made = oracle.feature_space_duel(x, points, W, norms, gamma, c, 1 - c, divided=divided)
            # at a member of both clusters equal distances leave rounding where a difference is divided by
            d = ((x - points) ** 2).sum(1)
            if divided and np.diff(np.sort(d)).min() < 1e-9 * d.max():
                oracle.conserves(e, floor=1e-13 / gamma)
                continue
            oracle.agree(e, n, made, 1e-8 if divided else 1e-9, floor=1e-13 / gamma)


# ---------------------------------------------------------------------- identities and limits


def test_shares_of_both_sides_sum_to_gamma() -> None:
    """Pool weights sum to 1 on both sides; what the constant takes is missing from the members'."""
    rng = np.random.default_rng(0)
    costs, a = tensor(rng.uniform(0, 3, (20, 7))), np.array([1.0, 2.0, 0.5, -1.0, -0.2, -3.0, -0.4])
    for v, sign in (([0.0, 0.0], 0), ([0.7, 0.0], 1), ([0.0, 0.7], -1)):
        pool = DuelPool(a[None], [v], [[0, 1]], 1.3)
        for beta in (0.2, 1.3, 5.0, math.inf):
            found = pool.share(costs, ask(pool, beta=beta, target=torch.zeros(20, dtype=torch.long)))
            assert isinstance(found.rho, torch.Tensor)
            assert (found.rho[:, :3] <= 0).all()
            assert (found.rho[:, 3:] >= 0).all()
            plus, minus = -found.rho[:, :3].sum(1) / 1.3, found.rho[:, 3:].sum(1) / 1.3
            if sign <= 0:
                np.testing.assert_allclose(plus, 1, rtol=1e-12)
            if sign >= 0:
                np.testing.assert_allclose(minus, 1, rtol=1e-12)
            whole = (found.rho * costs).sum(1) + sum(found.parts.values())
            np.testing.assert_allclose(whole, found.output, rtol=1e-12, atol=1e-12)


def test_limits_of_beta() -> None:
    """Stiff: the nearest member; soft: members by their weights; inf: the member with most of the sum."""
    points, a = np.array([[0.0], [1.0], [5.0]]), np.array([1.0, 50.0, -1.0])
    net = network(points, DuelPool(a[None], [[0.0, 0.0]], [[0, 1]], 1.0))
    x = np.array([[0.4]])

    def plus(beta: float) -> float:
        return float(net.explain(x, target=0, beta=beta).values[0, 0])

    rival = (0.4 - 5) ** 2
    assert plus(1e6) == pytest.approx(rival - 0.4**2)
    assert plus(1e-9) == pytest.approx(rival - (0.4**2 + 50 * 0.6**2) / 51)
    assert plus(math.inf) == pytest.approx(rival - 0.6**2)
    o = network(points[:2], DensityPool([1.0, 50.0], 1.0, threshold=0.0))
    assert float(o.explain(x, target=0, beta=math.inf).values[0, 0]) == pytest.approx(0.6**2)
    assert float(o.explain(x, target=0, beta=1e6).values[0, 0]) == pytest.approx(0.4**2)


def test_scale_of_the_logits() -> None:
    a, points, X = np.array([1.0, -2.0]), np.array([[0.0], [2.0]]), np.array([[0.3], [5.0]])
    one, two = (network(points, DuelPool(a[None], [[0.5, 0.0]], [[1, 0]], 0.4, scale=s)) for s in (1.0, 2.5))
    torch.testing.assert_close(2.5 * one(X), two(X))
    e, f = one.explain(X), two.explain(X)
    np.testing.assert_allclose(2.5 * e.values, f.values)
    oracle.conserves(f)
    # the decision value is F whatever the logit's scale
    np.testing.assert_allclose(one.explain(X, output="decision").values, two.explain(X, output="decision").values)


def test_members_in_another_order() -> None:
    rng = np.random.default_rng(1)
    points, X = rng.normal(size=(8, 3)), rng.normal(size=(5, 3))
    a = rng.normal(size=(3, 8))
    order = rng.permutation(8)
    pools = [
        (lambda o: DuelPool(a[:, o], np.full((3, 2), [0.1, 0.0]), [[0, 1], [0, 2], [1, 2]], 0.7)),
        (lambda o: DensityPool(np.abs(a[0, o]), 0.7)),
        (lambda o: RKHSPool(a[:, o], [0.3, 0.4, 0.5], 0.7)),
        (lambda o: NeighbourPool(np.array([0, 1, 2, 0, 1, 2, 0, 1])[o], 3)),
    ]
    for make in pools:
        e = network(points, make(np.arange(8))).explain(X)
        f = network(points[order], make(order)).explain(X)
        np.testing.assert_allclose(e.values, f.values, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(e.output, f.output, rtol=1e-9)


def test_a_batch_is_a_loop() -> None:
    rng = np.random.default_rng(2)
    points, X = rng.normal(size=(8, 3)), rng.normal(size=(9, 3))
    a = rng.normal(size=(3, 8))
    for pool in (
        DuelPool(a, np.full((3, 2), [0.0, 0.2]), [[0, 1], [0, 2], [1, 2]], 0.7),
        DensityPool(np.abs(a[0]), 0.7, threshold=0.2),
        ValuePool(a[0], 0.3, 0.7, 0.1),
        RKHSPool(a, [0.3, 0.4, 0.5], 0.7),
        NeighbourPool([0, 1, 2, 0, 1, 2, 0, 1], 3),
    ):
        net = network(points, pool)
        rules = [r for r in pool.rules if r != "auto"]
        for rule in rules:
            e = net.explain(X, rule=rule)
            for n in range(9):
                f = net.explain(X[n : n + 1], rule=rule)
                np.testing.assert_allclose(f.values[0], e.values[n], rtol=1e-9, atol=1e-12)
                np.testing.assert_allclose(f.residual[0], e.residual[n], rtol=1e-9, atol=1e-12)


def test_continuity_across_a_border() -> None:
    """Values are finite and do not jump where the logit of two classes changes its sign."""
    rng = np.random.default_rng(3)
    points = rng.normal(size=(8, 2))
    a = np.array([[1.0, 2.0, 0.5, 1.0, -1.0, -0.2, -3.0, -0.4]])
    W = np.array([[0.25] * 4 + [0.0] * 4, [0.0] * 4 + [0.25] * 4])
    for pool, rules in (
        (DuelPool(a, [[0.0, 0.1]], [[0, 1]], 0.5), ("midpoint", "gi")),
        (RKHSPool(W, [0.5, 0.6], 0.5), ("undivided", "divided")),
        (DensityPool(np.abs(a[0]), 0.5, threshold=1.0), ("undivided", "divided")),
    ):
        net = network(points, pool)
        path = np.linspace(points[0] + 0.05, points[6] - 0.05, 4001)  # at a member a divided share has no direction
        f = net(path).numpy()[:, 0]
        assert f.min() < 0 < f.max()
        for rule in rules:
            e = net.explain(path, target=0, rule=rule)
            oracle.conserves(e)
            steps = np.abs(np.diff(e.values, axis=0)).max()
            assert steps <= 0.05 * np.abs(e.values).max(), (rule, steps)


# ---------------------------------------------------------------------- extremes


def test_extreme_weights_do_not_overflow() -> None:
    points, X = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [100.0], [-1e6]])
    for a in ([1e300, 1e-300, -1e300], [1e-300, 1e-300, -1e300], [1e300, 1.0, -1e-300], [5e-324, 1.0, -1.0]):
        for v in ([0.0, 0.0], [1e300, 0.0], [0.0, 1e-300]):
            pool = DuelPool([a], [v], [[0, 1]], 2.0)
            net = network(points, pool)
            assert torch.isfinite(net(X)).all()
            for options in ({}, {"rule": "gi"}, {"beta": 1e-3}, {"beta": np.inf}, {"beta": 1e9}):
                oracle.conserves(net.explain(X, **options))
            e = net.explain(X, target=0)
            for n, x in enumerate(X):
                oracle.agree(e, n, oracle.duel(x, points, np.array(a), v[0] - v[1], 2.0), floor=1e-12)
    for w in ([1e300, 1e-300, 1.0], [1e-300] * 3, [1e150, 1.0, 1e-150]):
        net = network(points, DensityPool(w, 2.0, threshold=0.1))
        for rule in ("undivided", "divided"):
            oracle.conserves(net.explain(X, rule=rule))


def test_extreme_weights_in_float32() -> None:
    points, X = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [20.0], [-1e3]])
    a = np.array([1e200, 1e-200, -1e180])
    net = network(points, DuelPool([a], [[0.0, 1e-100]], [[0, 1]], 2.0)).float()
    e = net.explain(X, target=0)
    assert e.values.dtype == np.float32
    oracle.conserves(e, 1e-4)
    for n, x in enumerate(X):
        oracle.agree(e, n, oracle.duel(x, points, a, -1e-100, 2.0), 1e-4)


def test_far_rows_are_finite() -> None:
    rng = np.random.default_rng(4)
    points, X = rng.normal(size=(8, 3)), np.vstack([s * rng.normal(size=(3, 3)) for s in (1e3, 1e6)])
    a = rng.normal(size=(3, 8))
    for single in (False, True):
        for pool in (
            DuelPool(a, np.full((3, 2), [0.0, 0.2]), [[0, 1], [0, 2], [1, 2]], 0.7),
            DuelPool(a, np.zeros((3, 2)), [[0, 1], [0, 2], [1, 2]], 0.7),
            DensityPool(np.abs(a[0]), 0.7, threshold=0.2),
            DensityPool(np.abs(a[0]), 0.7),
            ValuePool(a[0], 0.3, 0.7, 0.1),
            RKHSPool(a, [0.3, 0.4, 0.5], 0.7),
            NeighbourPool([0, 1, 2, 0, 1, 2, 0, 1], 3),
        ):
            net = network(points, copy.deepcopy(pool))
            net = net.float() if single else net
            for rule in [r for r in pool.rules if r != "auto"]:
                e = net.explain(X, rule=rule)
                for array in (e.values, e.residual, e.output):
                    assert np.isfinite(array).all()
                if not single:
                    oracle.conserves(e)


# ---------------------------------------------------------------------- refusals, states, votes


def test_one_sided_duels_are_refused() -> None:
    for a, v in (([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [3.0, 0.0]), ([-1.0, 0.0], [0.0, 1.0])):
        with pytest.raises(ConvergenceError, match="other always wins"):
            DuelPool([a], [v], [[0, 1]], 1.0)
    assert DuelPool([[1.0, 2.0]], [[0.0, 1.0]], [[0, 1]], 1.0)(tensor([[0.0, 0.0]])).shape == (1, 2)
    pool = ValuePool([1.0, 2.0], -1.0, 1.0)
    with pytest.raises(ConvergenceError, match="other always wins"):
        pool.set_level(-2.0)
    assert pool.level == 0
    with pytest.raises(ConvergenceError, match="K = 1"):
        RKHSPool([[1.0]], [1.0], 1.0)
    with pytest.raises(ConvergenceError, match="same vote"):
        NeighbourPool([0, 1], 2)
    with pytest.raises(ConvergenceError, match="one class"):
        NeighbourPool([0, 0, 0], 1)


def test_the_state_of_another_level_can_be_loaded() -> None:
    """Which side has a constant is no number of the state; it must follow it."""
    rng = np.random.default_rng(5)
    X = rng.normal(size=(30, 2))
    fitted = SVR().fit(X, X[:, 0] + 3.0)
    one, two = neuralize(fitted).set_level(9.0), neuralize(fitted)
    assert (one(X) != two(X)).all()
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(two(X), one(X), rtol=0, atol=0)
    np.testing.assert_array_equal(two.explain(X).residual, one.explain(X).residual)
    np.testing.assert_array_equal(two.predict(X), one.predict(X))
    three = copy.deepcopy(one).set_level(0.5)
    assert (three(X) != one(X)).all()
    np.testing.assert_allclose(three(X).numpy()[:, 0], fitted.predict(X) - 0.5, rtol=1e-9, atol=1e-9)


def test_votes_of_libsvm() -> None:
    """By hand: three classes in a circle, ties to the second class of a pair, then the lowest class."""
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])

    def duels(f01: float, f02: float, f12: float) -> torch.Tensor:
        inf = math.inf
        return tensor([[[inf, f01, f02], [-f01, inf, f12], [-f02, -f12, inf]]])

    assert decide_by_votes(duels(1, 1, 1), pairs, False).tolist() == [0]
    assert decide_by_votes(duels(-1, 1, 1), pairs, False).tolist() == [1]
    assert decide_by_votes(duels(1, -1, 1), pairs, False).tolist() == [0]  # a circle: one vote each
    assert decide_by_votes(duels(0, 0, 0), pairs, False).tolist() == [2]
    assert decide_by_votes(duels(0, 0, 0), pairs, True).tolist() == [0]
    assert decide_by_votes(duels(0, 1, 1), pairs, False).tolist() == [1]
    # in a circle confidence decides: sums of a class's own values
    assert decide_by_votes(duels(1, -3, 5), pairs, True).tolist() == [1]
    assert decide_by_votes(duels(1, -12, 5), pairs, True).tolist() == [2]
    # by the estimator's values, not by the logarithms
    assert decide_by_votes(duels(1, -3, 5), pairs, True, duels(1, -12, 5)).tolist() == [2]
    # a vote more counts for more than any confidence
    assert decide_by_votes(duels(1e-9, 1e-9, 1e9), pairs, True).tolist() == [0]
    two = tensor([[[math.inf, 0.0], [0.0, math.inf]]])
    assert decide_by_votes(two, torch.tensor([[1, 0]]), False).tolist() == [1]


def test_scores() -> None:
    pool = ScorePool([[0, 1], [0, 2], [1, 2]], [0.5, -1.0, 2.0])
    costs = tensor([[0.0, -3.0, 1.0], [2.0, 0.0, 0.0]])
    # F = intercept - cost
    np.testing.assert_allclose(pool(costs), [[0.5, -0.5, -2.0], [-1.5, 1.5, -2.0]])
    found = pool.share(costs, ask(pool, target=torch.tensor([2, 1])))
    assert isinstance(found.rho, torch.Tensor)
    np.testing.assert_allclose(found.rho, [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose((found.rho * costs).sum(1) + found.parts["intercept"], found.output)
    value = ScoreValuePool(2.0, 0.5)
    np.testing.assert_allclose(value(tensor([[1.0]])), [[0.5]])
    made = value.share(tensor([[1.0]]), ask(value))
    assert made.output.tolist() == [0.5]
    assert made.parts["intercept"].tolist() == [1.5]


def test_neighbours_pick_three_units() -> None:
    pool = NeighbourPool([0, 0, 1, 1, 2], 3)
    costs = tensor([[1.0, 2.0, 3.0, 4.0, 9.0]])
    # nearest three: 0, 0, 1; tau = 3.5
    found = pool.share(costs, ask(pool))
    assert isinstance(found.rho, Picked)
    # f_0 = min(g_01, g_02): g_01 = min(3.5 - 2, 4 - 3.5) = 0.5, g_02 = max(min(2.5, 5.5), min(1.5, inf)) = 2.5
    # g_10 = max(min(0.5, 1 - 3.5), min(-0.5, 2 - 3.5)) = -1.5
    assert found.output.tolist() == [0.5]
    assert pool(costs).tolist() == [[0.5, -1.5, -5.5]]
    dense = found.rho.dense(5)
    np.testing.assert_allclose(dense, [[0, 0, -0.5, 0.5, 0]])
    assert float((dense * costs).sum()) == 0.5
    assert found.competitors.tolist() == [[0.0, 1.0, 0.0]]
