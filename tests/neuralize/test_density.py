"""One-class machines and kernel densities against plain sums over all points."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kernels as oracle
from sklearn.neighbors import KernelDensity
from sklearn.svm import OneClassSVM

from lrp.errors import ConvergenceError, RuleError, TargetError, UnsupportedEstimatorError
from neuralize import neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


def cloud(rows: int = 40, columns: int = 3, seed: int = 0) -> np.ndarray:
    return 2.0 + np.random.default_rng(seed).normal(size=(rows, columns))


def new(rows: int = 5, columns: int = 3, spread: float = 1.5, seed: int = 7) -> np.ndarray:
    return 2.0 + spread * np.random.default_rng(seed).normal(size=(rows, columns))


def duplicated() -> np.ndarray:
    X = cloud()
    X[5:15] = X[:10]
    return X


# ---------------------------------------------------------------------- one-class support vector machines

MACHINES: dict[str, Callable[[], Any]] = {
    "scale": lambda: OneClassSVM(nu=0.2).fit(cloud()),
    "auto": lambda: OneClassSVM(nu=0.3, gamma="auto").fit(cloud()),
    "sharp": lambda: OneClassSVM(nu=0.1, gamma=2.0).fit(cloud()),
    "all support vectors": lambda: OneClassSVM(nu=0.99, gamma=0.5).fit(cloud()),
    "sparse": lambda: OneClassSVM(nu=0.2, gamma=0.3).fit(scipy.sparse.csr_matrix(cloud())),
    "duplicates": lambda: OneClassSVM(nu=0.4, gamma=0.3).fit(duplicated()),
    "weighted": lambda: OneClassSVM(nu=0.4, gamma=0.3).fit(cloud(), sample_weight=np.linspace(0.1, 2, 40)),
    "one column": lambda: OneClassSVM(nu=0.2, gamma=1.0).fit(cloud(columns=1)),
}


@functools.cache
def machine(name: str) -> Any:
    return MACHINES[name]()


def dense(array: Any) -> np.ndarray:
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array)


def outlier(
    fitted: Any,
    x: np.ndarray,
    target: int = -1,
    beta: float | None = None,
    divided: bool = False,
    decision: bool = False,
) -> oracle.Explained:
    """+-(o - o_0), or the machine's own value, which is Lambda times that."""
    alpha, points, gamma = dense(fitted.dual_coef_)[0], dense(fitted.support_vectors_), float(fitted._gamma)
    made = oracle.density(x, points, alpha, gamma, beta, divided)
    mass, offset = math.fsum(alpha), float(fitted.offset_[0])
    level = -math.log(offset / mass) / gamma
    made = oracle.Explained(made.output - level, made.values, made.parts | {"threshold": -level}, made.noise)
    factor = 1.0 if target == -1 else -1.0
    if decision:
        S = math.fsum(a * math.exp(-gamma * float(((x - u) ** 2).sum())) for a, u in zip(alpha, points, strict=True))
        factor *= (offset - S) / made.output
    return made.scaled(factor)


@pytest.mark.parametrize("name", MACHINES)
def test_one_class(name: str) -> None:
    fitted = machine(name)
    D = fitted.n_features_in_
    net = neuralize(fitted)
    points = dense(fitted.support_vectors_)
    X = np.vstack([new(4, D), points[:2], np.full((1, D), 9.0)])
    assert net.labels.tolist() == [-1, 1]
    for target in (-1, 1):
        for beta in (None, 0.05, 3.0, np.inf):
            e = net.explain(X, target=target, beta="auto" if beta is None else beta)
            oracle.conserves(e)
            for n, x in enumerate(X):
                oracle.agree(e, n, outlier(fitted, x, target, beta))
        e = net.explain(X, target=target, rule="divided")
        oracle.conserves(e)
        assert e.divided.all()
        for n, x in enumerate(X):
            # a row that is a support vector: its own part is no column's
            made = outlier(fitted, x, target, divided=True)
            oracle.agree(e, n, made)
            assert (made.parts["coinciding"] != 0) == (n in (4, 5))
        e = net.explain(X, target=target, contrast=-target)
        for n, x in enumerate(X):
            oracle.agree(e, n, outlier(fitted, x, target))


@pytest.mark.parametrize("name", MACHINES)
def test_one_class_decides(name: str) -> None:
    fitted = machine(name)
    D = fitted.n_features_in_
    net = neuralize(fitted)
    for X in (cloud(columns=D), new(300, D), new(100, D, 30.0), new(50, D, 1e6)):
        F = fitted.decision_function(X)
        clear = np.abs(F) > 1e-9 * np.abs(F).max()
        np.testing.assert_array_equal(net.predict(X)[clear], fitted.predict(X)[clear])
        logits = net(X).numpy()
        assert np.isfinite(logits).all()
        np.testing.assert_array_equal(logits[:, 0], -logits[:, 1])
        # the outlyingness itself, before its threshold
        o = logits[:, 0] + net.head.pool.threshold
        assert (o >= -1e-12).all()
        for target, sign in ((1, 1), (-1, -1)):
            e = net.explain(X, target=target, output="decision")
            np.testing.assert_allclose(e.output, sign * F, rtol=1e-10, atol=1e-10 * float(fitted.dual_coef_.sum()))
            oracle.conserves(e)


def test_duals_as_they_are_would_be_negative() -> None:
    """Item 6: why the weights are normalised."""
    fitted = machine("scale")
    X = cloud()
    k = np.exp(-fitted._gamma * ((X[:, None] - fitted.support_vectors_) ** 2).sum(2))
    raw = -np.log(k @ fitted.dual_coef_[0]) / fitted._gamma
    net = neuralize(fitted)
    assert (raw < 0).mean() > 0.5
    assert (net(X).numpy()[:, 0] + net.head.pool.threshold >= 0).all()


@pytest.mark.parametrize("name", ["scale", "sharp", "duplicates"])
def test_own_decision_value(name: str) -> None:
    fitted, X = machine(name), new(6)
    net = neuralize(fitted)
    for target in (-1, 1):
        for options in ({}, {"rule": "divided"}, {"beta": 0.2}):
            e = net.explain(X, target=target, output="decision", **options)
            for n, x in enumerate(X):
                made = outlier(fitted, x, target, options.get("beta"), divided="rule" in options, decision=True)
                oracle.agree(e, n, made)


def test_rules_of_one_class() -> None:
    """Undivided values of an outlier are >= 0; divided ones too, and they sum to o."""
    fitted, X = machine("scale"), new(20)
    net = neuralize(fitted)
    e, f = net.explain(X, target=-1), net.explain(X, target=-1, rule="divided")
    assert (e.values >= 0).all()
    assert (f.values >= 0).all()
    assert (e.residual_parts["pool"] >= 0).all()
    assert (f.residual_parts["pool"] == 0).all()
    np.testing.assert_allclose(f.values.sum(1), f.output + net.head.pool.threshold, rtol=1e-9)
    assert np.abs(e.values - f.values).max() > 1e-3
    for rule in ("gi", "midpoint"):
        with pytest.raises(RuleError, match=rule):
            net.explain(X, rule=rule)
    with pytest.raises(TargetError):
        net.explain(X, target=1, contrast=1)
    with pytest.raises(TargetError):
        net.explain(X, target=0)


def test_a_row_on_the_border_is_an_outlier() -> None:
    """Libsvm takes 0 for an outlier: a table of one point only."""
    for rows, nu in ((2, 0.25), (4, 0.5), (8, 0.5)):
        X = np.zeros((rows, 1))
        fitted = OneClassSVM(nu=nu, gamma=1.0).fit(X)
        assert (fitted.decision_function(X) == 0).all()
        np.testing.assert_array_equal(neuralize(fitted).predict(X), fitted.predict(X))
        e = neuralize(fitted).explain(X + 1.0, rule="divided")
        oracle.conserves(e)


def test_machines_without_a_threshold_or_another_kernel() -> None:
    fitted = copy.deepcopy(machine("scale"))
    fitted.offset_ = np.array([-0.1])
    with pytest.raises(ConvergenceError, match="every row is an inlier"):
        neuralize(fitted)
    for kernel in ("linear", "poly", "sigmoid"):
        with pytest.raises(UnsupportedEstimatorError, match=kernel):
            neuralize(OneClassSVM(kernel=kernel).fit(cloud()))
    with pytest.raises(UnsupportedEstimatorError, match="precomputed"):
        neuralize(OneClassSVM(kernel="precomputed").fit(np.eye(10)))


def test_translation_and_scale() -> None:
    fitted, X = machine("sharp"), new(8)
    moved, larger = copy.deepcopy(fitted), copy.deepcopy(fitted)
    moved.support_vectors_ = fitted.support_vectors_ - 50.0
    larger.support_vectors_, larger._gamma = 4 * fitted.support_vectors_, fitted._gamma / 16
    for rule in ("undivided", "divided"):
        e = neuralize(fitted).explain(X, rule=rule)
        np.testing.assert_allclose(neuralize(moved).explain(X - 50.0, rule=rule).values, e.values, rtol=1e-8)
        f = neuralize(larger).explain(4 * X, rule=rule)
        np.testing.assert_allclose(f.values, 16 * e.values, rtol=1e-9)
        np.testing.assert_allclose(f.residual, 16 * e.residual, rtol=1e-9)


# ---------------------------------------------------------------------- kernel densities

DENSITIES: dict[str, Callable[[], Any]] = {
    "plain": lambda: KernelDensity(bandwidth=0.7).fit(cloud()),
    "narrow": lambda: KernelDensity(bandwidth=0.1).fit(cloud()),
    "scott": lambda: KernelDensity(bandwidth="scott").fit(cloud()),
    "silverman": lambda: KernelDensity(bandwidth="silverman").fit(cloud()),
    "weighted": lambda: KernelDensity(bandwidth=0.7).fit(cloud(), sample_weight=np.linspace(0.01, 3, 40)),
    "ball tree": lambda: KernelDensity(bandwidth=0.7, algorithm="ball_tree", leaf_size=5).fit(cloud()),
    "minkowski": lambda: KernelDensity(bandwidth=0.7, metric="minkowski", metric_params={"p": 2}).fit(cloud()),
    "duplicates": lambda: KernelDensity(bandwidth=0.5).fit(duplicated()),
    "one column": lambda: KernelDensity(bandwidth=0.5).fit(cloud(columns=1)),
    "one point": lambda: KernelDensity(bandwidth=0.5).fit(cloud(1)),
}


def log_density(fitted: Any, x: np.ndarray, beta: float | None = None, divided: bool = False) -> oracle.Explained:
    points, h = np.asarray(fitted.tree_.data), float(fitted.bandwidth_)
    weights = fitted.tree_.sample_weight
    weights = np.ones(len(points)) if weights is None else np.asarray(weights)
    gamma, D = 1 / (2 * h * h), points.shape[1]
    made = oracle.density(x, points, weights, gamma, beta, divided).scaled(-gamma)
    constant = -D * math.log(h) - 0.5 * D * math.log(2 * math.pi)
    return oracle.Explained(made.output + constant, made.values, made.parts | {"normaliser": constant})


@pytest.mark.parametrize("name", DENSITIES)
def test_densities(name: str) -> None:
    fitted = DENSITIES[name]()
    D = fitted.n_features_in_
    net = neuralize(fitted)
    points = np.asarray(fitted.tree_.data)
    X = np.vstack([new(4, D), points[:1], np.full((1, D), 30.0), new(2, D, 1e6)])
    assert net.kind == "density"
    for beta in (None, 0.3, np.inf):
        e = net.explain(X, beta="auto" if beta is None else beta)
        oracle.conserves(e)
        for n, x in enumerate(X):
            oracle.agree(e, n, log_density(fitted, x, beta))
    e = net.explain(X, rule="divided")
    oracle.conserves(e)
    for n, x in enumerate(X):
        oracle.agree(e, n, log_density(fitted, x, divided=True))
    # what the estimator says, where it has digits; a plain sum where it has none
    near = new(40, D, 1.0)
    theirs = fitted.score_samples(near)
    known = theirs > -25
    np.testing.assert_allclose(net.predict(near)[known], theirs[known], rtol=1e-6)
    np.testing.assert_allclose(net.predict(near), [log_density(fitted, x).output for x in near], rtol=1e-11)
    np.testing.assert_array_equal(net.predict(near), net(near).numpy()[:, 0])
    with pytest.raises(TargetError, match="contrast"):
        net.explain(X, contrast="log density")


def test_far_rows_have_a_density_that_scikit_learn_loses() -> None:
    fitted = DENSITIES["plain"]()
    net, X = neuralize(fitted), np.full((3, 3), 2.0) + np.array([[0], [60.0], [1e5]])
    assert np.isfinite(net.predict(X)).all()
    np.testing.assert_allclose(net.predict(X), [log_density(fitted, x).output for x in X], rtol=1e-12)


def test_weights_count_as_repetitions() -> None:
    X = cloud(12)
    times = np.arange(12) % 4
    repeated = KernelDensity(bandwidth=0.6).fit(np.repeat(X, times, axis=0))
    weighted = KernelDensity(bandwidth=0.6).fit(X[times > 0], sample_weight=times[times > 0].astype(float))
    rows = new(10)
    a, b = neuralize(repeated), neuralize(weighted)
    np.testing.assert_allclose(a.predict(rows), b.predict(rows), rtol=1e-12)
    np.testing.assert_allclose(a.explain(rows).values, b.explain(rows).values, rtol=1e-9)
    # the entropy over more members, and its complement in the weights: the sum is the same
    np.testing.assert_allclose(a.explain(rows).residual, b.explain(rows).residual, rtol=1e-9)


def test_prototypes_are_named_by_their_place_in_the_table() -> None:
    """The tree keeps the order of the rows."""
    X = cloud()
    e = neuralize(KernelDensity(bandwidth=0.2, leaf_size=2).fit(X)).explain(X[17:18] + 1e-3)
    assert e.prototypes(0).iloc[0]["prototype"] == 17
    assert e.prototypes(0).iloc[0]["speaks"] == "for"
    machine_ = OneClassSVM(nu=0.5, gamma=5.0).fit(X)
    row = int(machine_.support_[3])
    f = neuralize(machine_).explain(X[row : row + 1] + 1e-3, target=-1)
    assert f.prototypes(0).iloc[0]["prototype"] == row
    assert f.prototypes(0).iloc[0]["speaks"] == "against"


@pytest.mark.parametrize("kernel", ["tophat", "epanechnikov", "exponential", "linear", "cosine"])
def test_other_kernels_are_refused(kernel: str) -> None:
    with pytest.raises(UnsupportedEstimatorError, match=kernel):
        neuralize(KernelDensity(kernel=kernel).fit(cloud()))


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        ("manhattan", None),
        ("chebyshev", None),
        ("minkowski", {"p": 3}),
        ("minkowski", {"p": 2, "w": [100.0, 1.0, 0.01]}),
        ("minkowski", {"w": [100.0, 1.0, 0.01]}),
    ],
)
def test_other_metrics_are_refused(metric: str, options: Any) -> None:
    with pytest.raises(UnsupportedEstimatorError, match=metric):
        neuralize(KernelDensity(metric=metric, metric_params=options).fit(cloud()))


def test_break_even() -> None:
    """A row's undivided values are sums of squares: neutral only where all members with a share agree."""
    fitted, X = DENSITIES["one point"](), new(5)
    e = neuralize(fitted).explain(X)
    np.testing.assert_allclose(e.break_even, np.broadcast_to(np.asarray(fitted.tree_.data), X.shape), rtol=1e-9)
    np.testing.assert_allclose(e.slope * (X - e.break_even), e.values, rtol=1e-9)
    assert np.isnan(neuralize(DENSITIES["plain"]()).explain(X).break_even).all()
    # a column on which all members agree
    U = cloud()
    U[:, 1] = 5.0
    e = neuralize(KernelDensity(bandwidth=0.7).fit(U)).explain(X)
    np.testing.assert_allclose(e.break_even[:, 1], 5.0, rtol=1e-12)
    assert np.isnan(e.break_even[:, [0, 2]]).all()


def test_float32() -> None:
    for fitted, make in ((machine("scale"), outlier), (DENSITIES["plain"](), log_density)):
        X = np.vstack([new(6), new(2, spread=30.0)])
        net = neuralize(fitted).float()
        for rule in ("undivided", "divided"):
            e = net.explain(X, rule=rule, **({"target": -1} if make is outlier else {}))
            assert e.values.dtype == np.float32
            oracle.conserves(e, 1e-4)
            for n, x in enumerate(X):
                oracle.agree(e, n, make(fitted, x, divided=rule == "divided"), 1e-4)
    shifted = KernelDensity(bandwidth=0.7).fit(cloud() + 4096.0)
    e = neuralize(shifted).float().explain(new(6) + 4096.0)
    f = neuralize(shifted).explain((new(6) + 4096.0).astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(e.values, f.values, rtol=1e-4, atol=1e-4)


@st.composite
def clouds(draw: Any) -> tuple[np.ndarray, float]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(2, 14)), draw(st.integers(1, 5))
    scale = 10.0 ** draw(st.integers(-3, 3))
    X = rng.normal(size=(rows, columns)) + draw(st.sampled_from([0.0, 5.0, -100.0]))
    if draw(st.booleans()):
        X[rng.integers(0, rows, rows // 2)] = X[rng.integers(0, rows, rows // 2)]
    if draw(st.booleans()):
        X[:, rng.integers(0, columns)] = 1.0
    if draw(st.booleans()):
        X = np.round(X)
    return X * scale, 10.0 ** draw(st.floats(-2, 2)) / scale**2


def around(X: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.vstack([X, *(X + s * (X.std() or 1.0) * rng.normal(size=X.shape) for s in (1e-5, 1, 1e6))])


@given(clouds(), st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_machine(drawn: tuple[np.ndarray, float], nu: float) -> None:
    X, gamma = drawn
    fitted = OneClassSVM(nu=nu, gamma=gamma).fit(X)
    net, rows = neuralize(fitted), around(X)
    F = fitted.decision_function(rows)
    clear = np.abs(F) > 1e-9 * float(fitted.dual_coef_.sum())
    np.testing.assert_array_equal(net.predict(rows)[clear], fitted.predict(rows)[clear])
    for options in ({}, {"target": -1, "rule": "divided"}, {"output": "decision"}, {"target": 1, "beta": 9 * gamma}):
        floor = 1e-14 * (float(fitted.dual_coef_.sum()) + 1 / gamma)  # of o - o_0 on a table of equal rows
        oracle.conserves(net.explain(rows, **options), floor=floor)
    for n in (0, len(X), 2 * len(X), 3 * len(X)):
        oracle.agree(net.explain(rows[n : n + 1], target=1), 0, outlier(fitted, rows[n], 1), floor=1e-14 / gamma)


@given(clouds(), st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_density(drawn: tuple[np.ndarray, float], weighted: bool) -> None:
    X, gamma = drawn
    weights = np.random.default_rng(1).uniform(1e-6, 1.0, len(X)) if weighted else None
    fitted = KernelDensity(bandwidth=1 / math.sqrt(2 * gamma)).fit(X, sample_weight=weights)
    net, rows = neuralize(fitted), around(X)
    np.testing.assert_allclose(net.predict(rows), [log_density(fitted, x).output for x in rows], rtol=1e-9, atol=1e-9)
    for options in ({}, {"rule": "divided"}, {"beta": gamma / 7}, {"beta": np.inf}):
        oracle.conserves(net.explain(rows, **options))
    for n in (0, len(X), 2 * len(X), 3 * len(X)):
        oracle.agree(net.explain(rows[n : n + 1]), 0, log_density(fitted, rows[n]), floor=1e-14)


def test_gradients_of_logits_point_where_values_do() -> None:
    """x . grad of the undivided form, from a root at the prototypes: twice its values where shares are held."""
    fitted, X = DENSITIES["one point"](), torch.from_numpy(new(4))
    net = neuralize(fitted)
    z = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(z).sum(), z)
    values = net.explain(X.numpy()).values
    np.testing.assert_allclose(values, 0.5 * gradient.numpy() * (X.numpy() - np.asarray(fitted.tree_.data)), rtol=1e-9)
