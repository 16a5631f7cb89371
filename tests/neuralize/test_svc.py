"""Support vector machines against their formulas written out: pools, rules, residual parts, votes, regressions."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kernels as oracle
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR, NuSVC, NuSVR

from lrp.errors import ConvergenceError, RuleError, TargetError, UnsupportedEstimatorError
from neuralize import neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


def blobs(classes: int, rows: int = 45, columns: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds off the origin."""
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    return 1.5 + rng.normal(size=(rows, columns)) + 1.2 * rng.normal(size=(classes, columns))[y], y


def new(columns: int = 3, rows: int = 5, spread: float = 2.0, seed: int = 7) -> np.ndarray:
    return 1.5 + spread * np.random.default_rng(seed).normal(size=(rows, columns))


def _fit(estimator: Any, classes: int, names: Any = None, columns: int = 3) -> Any:
    X, y = blobs(classes, columns=columns)
    return estimator.fit(X, y if names is None else np.asarray(names)[y])


def _sparse() -> Any:
    X, y = blobs(3)
    return SVC(gamma=0.3).fit(scipy.sparse.csr_matrix(X), y)


RBF: dict[str, Callable[[], Any]] = {
    "two classes": lambda: _fit(SVC(gamma=0.4), 2),
    "signs": lambda: _fit(SVC(gamma=0.4), 2, [-1, 1]),
    "signs the other way": lambda: _fit(SVC(gamma=0.4), 2, [1, -1]),
    "names": lambda: _fit(SVC(gamma=0.4), 2, ["yes", "no"]),
    "gamma scale": lambda: _fit(SVC(), 3),
    "gamma auto": lambda: _fit(SVC(gamma="auto"), 3),
    "four named classes": lambda: _fit(SVC(C=3, gamma=0.2), 4, ["d", "b", "a", "c"]),
    "ovo": lambda: _fit(SVC(gamma=0.4, decision_function_shape="ovo"), 4),
    "weights": lambda: _fit(SVC(gamma=0.4, class_weight={0: 5.0, 1: 0.2, 2: 1.0}), 3),
    "large C": lambda: _fit(SVC(C=1e4, gamma=2.0), 3),
    "small C": lambda: _fit(SVC(C=1e-3, gamma=0.3), 2),
    "sparse": _sparse,
    "one column": lambda: _fit(SVC(gamma=1.0), 2, columns=1),
    "nu": lambda: _fit(NuSVC(nu=0.4, gamma=0.4), 2),
    "nu, three": lambda: _fit(NuSVC(nu=0.3), 3),
}


@functools.cache
def rbf(name: str) -> Any:
    return RBF[name]()


def columns_of(fitted: Any) -> int:
    return int(fitted.n_features_in_)


def points_of(fitted: Any) -> np.ndarray:
    U = fitted.support_vectors_
    return np.asarray(U.toarray() if hasattr(U, "toarray") else U)


def truth(
    fitted: Any,
    x: np.ndarray,
    target: int,
    contrast: int | None = None,
    beta: float | None = None,
    rule: str = "midpoint",
    decision: bool = False,
) -> oracle.Explained:
    """The nearest duel of a class, or one of its duels, by positions of classes."""
    points, gamma = points_of(fitted), float(fitted._gamma)
    found = []
    for i, j, a, b in oracle.expansions(fitted):
        rival = {i: j, j: i}.get(target)
        if rival is None or (contrast is not None and rival != contrast):
            continue
        made = oracle.duel(x, points, a, b, gamma, beta, rule, oracle.eta(points, gamma))
        made = made if target == i else made.scaled(-1)
        found.append((made.output, a, b, made))
    _, a, b, made = min(found, key=lambda f: f[0])
    return made.scaled(oracle.lam(x, points, a, b, gamma)) if decision else made


@pytest.mark.parametrize("name", RBF)
def test_logits_values_and_parts(name: str) -> None:
    """Items 4, 5, 8 and 9: every target, every part of the residual."""
    fitted = rbf(name)
    net, K = neuralize(fitted), len(fitted.classes_)
    X = np.vstack([new(columns_of(fitted), 3), points_of(fitted)[:1], np.full((1, columns_of(fitted)), 12.0)])
    logits = net(X).numpy()
    for c in range(K):
        e = net.explain(X, target=fitted.classes_[c])
        assert e.rule == "auto"
        assert e.beta == fitted._gamma
        oracle.conserves(e)
        for n, x in enumerate(X):
            made = truth(fitted, x, c)
            oracle.agree(e, n, made)
            assert logits[n, c] == pytest.approx(made.output, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("beta", [0.05, 1.7, np.inf])
@pytest.mark.parametrize("name", ["two classes", "four named classes", "large C"])
def test_another_stiffness(name: str, beta: float) -> None:
    """The divergence of the shares from the model's own is in the pools' part."""
    fitted, X = rbf(name), new()
    e = neuralize(fitted).explain(X, target=fitted.classes_[0], beta=beta)
    for n, x in enumerate(X):
        oracle.agree(e, n, truth(fitted, x, 0, beta=beta))
    own = neuralize(fitted).explain(X, target=fitted.classes_[0])
    assert np.abs(own.values - e.values).max() > 1e-3
    # nearly the limit of a soft pool
    flat = neuralize(fitted).explain(X, target=fitted.classes_[0], beta=1e-12)
    oracle.conserves(flat)


@pytest.mark.parametrize("rule", ["gi", "hybrid"])
@pytest.mark.parametrize("name", ["two classes", "four named classes", "sparse", "nu, three"])
def test_gradient_times_input_and_hybrid(name: str, rule: str) -> None:
    fitted, X = rbf(name), new()
    net = neuralize(fitted)
    for beta in ("auto", 0.9):
        for c in range(len(fitted.classes_)):
            e = net.explain(X, target=fitted.classes_[c], rule=rule, beta=beta)
            for n, x in enumerate(X):
                oracle.agree(e, n, truth(fitted, x, c, rule=rule, beta=None if beta == "auto" else beta))


@pytest.mark.parametrize("name", ["two classes", "gamma scale", "four named classes"])
def test_gi_is_gradient_times_input(name: str) -> None:
    fitted, X = rbf(name), torch.from_numpy(new(rows=12))
    net = neuralize(fitted)
    for c in range(len(fitted.classes_)):
        z = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(z)[:, c].sum(), z)
        e = net.explain(X, target=fitted.classes_[c], rule="gi")
        np.testing.assert_allclose(e.values, (z * gradient).detach().numpy(), rtol=1e-8, atol=1e-10)
        assert np.abs(e.values.sum(1) - e.output).max() > 0.1  # it does not sum to g by itself
        oracle.conserves(e)


@pytest.mark.parametrize("name", [n for n in RBF if n != "one column"])
def test_contrasts_are_antisymmetric(name: str) -> None:
    fitted, X = rbf(name), new()
    net, labels = neuralize(fitted), fitted.classes_
    for a, b in ((0, 1), (len(labels) - 1, 0)):
        e, f = (net.explain(X, target=labels[s], contrast=labels[t]) for s, t in ((a, b), (b, a)))
        np.testing.assert_allclose(e.values, -f.values, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(e.output, -f.output, rtol=1e-12)
        for n, x in enumerate(X):
            oracle.agree(e, n, truth(fitted, x, a, b))
    with pytest.raises(TargetError):
        net.explain(X, target=labels[0], contrast=labels[0])


@pytest.mark.parametrize("name", RBF)
def test_decision_values(name: str) -> None:
    """Item 4 and 6.2: F itself is Lambda g, with Lambda > 0 and every part scaled."""
    fitted = rbf(name)
    X, K = new(columns_of(fitted), 6), len(fitted.classes_)
    net = neuralize(fitted)
    ovo = copy.deepcopy(fitted).set_params(decision_function_shape="ovo")
    theirs = ovo.decision_function(X).reshape(len(X), -1)
    for t, (i, j, _, _) in enumerate(oracle.expansions(fitted)):
        e = net.explain(X, target=fitted.classes_[i], contrast=fitted.classes_[j], output="decision")
        f = net.explain(X, target=fitted.classes_[j], contrast=fitted.classes_[i], output="decision")
        np.testing.assert_allclose(e.output, theirs[:, t], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(f.output, -theirs[:, t], rtol=1e-10, atol=1e-10)
        for n, x in enumerate(X):
            oracle.agree(e, n, truth(fitted, x, i, j, decision=True))
            oracle.agree(f, n, truth(fitted, x, j, i, decision=True))
    if K == 2:
        own = net.explain(X, output="decision")
        assert (own.output >= 0).all()
        np.testing.assert_allclose(own.output, np.abs(theirs[:, 0]), rtol=1e-10, atol=1e-10)


def _with(fitted: Any, intercept: Any) -> Any:
    other = copy.deepcopy(fitted)
    sign = -1 if len(fitted.classes_) == 2 else 1
    value = np.broadcast_to(np.asarray(intercept, dtype=float), fitted.intercept_.shape).copy()
    other.intercept_, other._intercept_ = value, sign * value
    return other


@pytest.mark.parametrize("intercept", [0.3, -0.3, 0.0, 1e-12])
@pytest.mark.parametrize("name", ["two classes", "gamma scale"])
def test_intercepts_of_either_sign(name: str, intercept: float) -> None:
    fitted = _with(rbf(name), intercept)
    X = np.vstack([new(rows=4), new(rows=200, spread=4.0, seed=1)])
    net = neuralize(fitted)
    far = np.abs(fitted.decision_function(X)).max(-1) > 1e-9
    assert far.any()
    np.testing.assert_array_equal(net.predict(X)[far], fitted.predict(X)[far])
    for c in range(len(fitted.classes_)):
        e = net.explain(X[:4], target=fitted.classes_[c])
        for n in range(4):
            oracle.agree(e, n, truth(fitted, X[n], c))
        assert (e.residual_parts["intercept"] != 0).any() == (intercept != 0)


def test_without_intercept_gi_and_hybrid() -> None:
    """Nothing stands at the row itself: the product form is then a plain product."""
    fitted, X = _with(rbf("four named classes"), 0.0), new()
    net = neuralize(fitted)
    for rule in ("gi", "hybrid"):
        e = net.explain(X, target="b", rule=rule)
        for n, x in enumerate(X):
            oracle.agree(e, n, truth(fitted, x, 1, rule=rule))
    z = torch.from_numpy(X).requires_grad_()
    (gradient,) = torch.autograd.grad(net(z)[:, 1].sum(), z)
    e = net.explain(X, target="b", rule="gi")
    np.testing.assert_allclose(e.values, (z * gradient).detach().numpy(), rtol=1e-8, atol=1e-10)


def test_a_side_without_members() -> None:
    fitted = copy.deepcopy(_with(rbf("two classes"), 0.5))
    fitted.dual_coef_ = np.abs(fitted.dual_coef_)
    with pytest.raises(ConvergenceError, match="other always wins") as info:
        neuralize(fitted)
    assert "[1, 0]" in info.value.got
    fitted.intercept_ = np.array([-0.5])  # the constant is a member
    X = new()
    e = neuralize(fitted).explain(X, target=1)
    for n, x in enumerate(X):
        oracle.agree(e, n, truth(fitted, x, 1))


def test_lambda_near_the_border() -> None:
    """Lambda is S where S+ = S-, and keeps its digits on both sides."""
    fitted = rbf("two classes")
    i, j, a, b = oracle.expansions(fitted)[0]
    net = neuralize(fitted)

    def decision(x: np.ndarray) -> float:
        return float(fitted.decision_function(x[None])[0])

    rows = blobs(2)[0]
    values = fitted.decision_function(rows)
    low, high = rows[values.argmin()], rows[values.argmax()]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if decision(middle) * decision(high) < 0 else (low, middle)
    rows = [low, high] + [low + s * np.ones(3) for s in (1e-12, 1e-9, 1e-8, 1e-7, 1e-5)]
    e = net.explain(np.array(rows), target=i, contrast=j, output="decision")
    g = net.explain(np.array(rows), target=i, contrast=j)
    oracle.conserves(e)
    S = oracle.lam(low, points_of(fitted), a, b, fitted._gamma)
    np.testing.assert_allclose(e.values, S * g.values, rtol=1e-4)
    np.testing.assert_allclose(e.output, [decision(x) for x in rows], atol=1e-12)
    np.testing.assert_allclose(e.residual, S * g.residual, rtol=1e-4)


@pytest.mark.parametrize("name", RBF)
def test_decides_everywhere(name: str) -> None:
    """Items 1 and 6: training rows, new ones, and rows so far away that every kernel value is 0 in floating point."""
    fitted = rbf(name)
    D = columns_of(fitted)
    net = neuralize(fitted)
    for X in (blobs(2, columns=D)[0], new(D, 300), new(D, 300, 30.0), new(D, 100, 1e6)):
        np.testing.assert_array_equal(net.predict(X), fitted.predict(X))
        logits = net(X)
        assert torch.isfinite(logits).all()
        assert ((logits > 0).sum(1) <= 1).all()
        for options in ({}, {"output": "decision"}, {"rule": "gi"}):
            oracle.conserves(net.explain(X[:40], **options))


def test_orientation_of_two_classes() -> None:
    for name in ("two classes", "signs", "signs the other way", "names", "nu", "weights"):
        fitted, X = rbf(name), new(rows=60)
        logits = neuralize(fitted)(X).numpy()
        if len(fitted.classes_) == 2:
            np.testing.assert_array_equal(logits[:, 1] > 0, fitted.decision_function(X) > 0)
            np.testing.assert_array_equal(logits[:, 1] > 0, fitted.predict(X) == fitted.classes_[1])
            np.testing.assert_allclose(logits[:, 0], -logits[:, 1], rtol=1e-12)


def test_boolean_labels() -> None:
    fitted, X = _fit(SVC(gamma=0.4), 2, [False, True]), new()
    e = neuralize(fitted).explain(X, target=True)
    for n, x in enumerate(X):
        oracle.agree(e, n, truth(fitted, x, 1))


def test_duels_of_many_classes_point_to_the_first() -> None:
    """The sign trap: with 3+ classes a positive column votes for its first class."""
    fitted, X = rbf("ovo"), new(rows=80)
    net = neuralize(fitted)
    F = fitted.decision_function(X)
    wins = np.zeros((80, 4))
    for (i, j), column in zip(itertools.combinations(range(4), 2), F.T, strict=True):
        h = net.explain(X, target=i, contrast=j).output
        np.testing.assert_array_equal(h > 0, column > 0)
        wins[:, i] += column > 0
        wins[:, j] += column <= 0
    # a class that wins all its duels, and it alone, has a positive logit
    np.testing.assert_array_equal(net(X).numpy() > 0, wins == 3)


@functools.cache
def _cyclic(break_ties: bool) -> tuple[Any, np.ndarray]:
    """Labels at random: many rows on which every class loses a duel."""
    rng = np.random.default_rng(3)
    X = rng.normal(size=(60, 2))
    fitted = SVC(C=10, gamma=2.0, break_ties=break_ties).fit(X, rng.integers(0, 5, 60))
    return fitted, rng.normal(size=(3000, 2))


@pytest.mark.parametrize("break_ties", [False, True])
def test_votes(break_ties: bool) -> None:
    fitted, X = _cyclic(break_ties)
    net = neuralize(fitted)
    e = net.explain(X)
    undecided = (net(X) <= 0).all(1).numpy()
    assert undecided.sum() > 20
    np.testing.assert_array_equal(e.notes["votes"], undecided)
    np.testing.assert_array_equal(e.decided, fitted.predict(X))
    np.testing.assert_array_equal(net.predict(X), fitted.predict(X))
    other = _cyclic(not break_ties)[0].predict(X)
    assert (other[~undecided] == e.decided[~undecided]).all()
    assert (other[undecided] != e.decided[undecided]).any()
    # the explanation is that of the class decided on, whose output is then not positive
    assert (e.output[undecided] <= 0).all()
    rows = np.flatnonzero(undecided)[:3]
    for n in rows:
        oracle.agree(e, n, truth(fitted, X[n], int(e.target[n])))
    # ties are broken for "ovr" decision values only
    ovo = copy.deepcopy(fitted).set_params(decision_function_shape="ovo", break_ties=False)
    np.testing.assert_array_equal(neuralize(ovo).predict(X), ovo.predict(X))
    assert "votes" not in neuralize(rbf("two classes")).explain(new()).notes


@pytest.mark.parametrize("break_ties", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "poly"])
def test_exact_ties_of_duels(kernel: str, break_ties: bool) -> None:
    """A decision value of exactly 0: libsvm votes for the second class, scikit-learn's tie-breaker for the first."""
    X, y = blobs(4)
    fitted = _with(SVC(kernel=kernel, break_ties=break_ties).fit(X, y), 0.0)
    net, rows = neuralize(fitted), np.zeros((1, 3))
    assert net.predict(rows) == fitted.predict(rows) == (0 if break_ties else 3)
    two = _with(SVC(kernel=kernel).fit(X, y > 1), 0.0)
    assert neuralize(two).predict(rows) == two.predict(rows)


def test_flipped_labels_negate() -> None:
    X, y = blobs(2)
    rows = new(rows=10)
    e, f = (neuralize(SVC(gamma=0.4, tol=1e-10).fit(X, z)).explain(rows, target=1) for z in (y, 1 - y))
    np.testing.assert_allclose(e.values, -f.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(e.output, -f.output, rtol=1e-5, atol=1e-6)
    for name in e.residual_parts:
        np.testing.assert_allclose(e.residual_parts[name], -f.residual_parts[name], rtol=1e-5, atol=1e-6)


def test_translation() -> None:
    """Item 10: midpoint relevances do not move with the origin; gi and hybrid do."""
    fitted, X = rbf("gamma scale"), new(rows=10)
    moved = copy.deepcopy(fitted)
    shift = np.array([100.0, -7.0, 0.5])
    moved.support_vectors_ = fitted.support_vectors_ + shift
    one, two = neuralize(fitted), neuralize(moved)
    e, f = one.explain(X), two.explain(X + shift)
    np.testing.assert_allclose(e.values, f.values, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(e.residual, f.residual, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(e.break_even + shift, f.break_even, rtol=1e-7, equal_nan=True)
    for rule in ("gi", "hybrid"):
        a, b = one.explain(X, rule=rule), two.explain(X + shift, rule=rule)
        assert np.abs(a.values - b.values).max() > 1
        np.testing.assert_allclose(a.output, b.output, rtol=1e-8, atol=1e-10)


def test_scale_permutation_and_constant_columns() -> None:
    X, y = blobs(3)
    X[:, 1] = 4.0
    fitted, rows = SVC(gamma=0.3).fit(X, y), new(rows=10)
    rows[:, 1] = 4.0
    e = neuralize(fitted).explain(rows)
    assert (e.values[:, 1] == 0).all()
    order = [2, 0, 1]
    turned = copy.deepcopy(fitted)
    turned.support_vectors_ = fitted.support_vectors_[:, order]
    np.testing.assert_allclose(neuralize(turned).explain(rows[:, order]).values, e.values[:, order], rtol=1e-9)
    # the logarithm of kernel sums knows no unit: gamma / s^2 on data s times as large
    larger = copy.deepcopy(fitted)
    larger.support_vectors_, larger._gamma = 8.0 * fitted.support_vectors_, fitted._gamma / 64
    np.testing.assert_allclose(neuralize(larger).explain(8.0 * rows).values, e.values, rtol=1e-9, atol=1e-12)


def test_eta() -> None:
    """0 below log10(gamma x median d^2) = -0.5, 1 above 1.5, rounded to two digits between."""
    X, y = blobs(2, 60)
    seen = []
    for gamma in (1e-3, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0):
        fitted = SVC(gamma=gamma).fit(X, y)
        head = neuralize(fitted).head
        assert head.pool.eta == oracle.eta(points_of(fitted), gamma)
        seen.append(head.pool.eta)
    assert seen[0] == 0
    assert seen[-1] == 1
    assert min(v for v in seen if v) >= 0.2
    assert sorted(seen) == seen
    U = np.array([[0.0], [1.0]])
    from neuralize.converters.kernels import eta

    at = [eta(U, 10.0**level) for level in (-0.501, -0.499, 0.0, 1.0, 1.5, 1.6)]
    assert at == [0.0, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert eta(np.zeros((3, 2)), 1.0) == 0.0  # nothing to scale by
    many = np.random.default_rng(0).normal(size=(4000, 60))
    rough = eta(many, 0.01)
    assert rough == pytest.approx(0.4 * np.log10(0.01 * 2 * 60) + 0.4, abs=0.02)


@pytest.mark.parametrize("name", ["two classes", "four named classes", "large C"])
def test_break_even(name: str) -> None:
    """Put one column's break-even value into the row, the shares held: its relevance is 0; NaN: no real root."""
    fitted, X = rbf(name), new(rows=8)
    net, gamma, points = neuralize(fitted), float(fitted._gamma), points_of(fitted)
    e = net.explain(X)
    found = missing = 0
    for n, x in enumerate(X):
        c = net.labels.tolist().index(e.target[n])
        i, _, a, b = min(
            (d for d in oracle.expansions(fitted) if c in d[:2]),
            key=lambda d: (1 if d[0] == c else -1) * oracle.duel(x, points, d[2], d[3], gamma).output,
        )
        sign = 1 if i == c else -1
        plus, minus = oracle.sides(x, points, a, b)
        p, q = (oracle.shares(x, side, gamma, gamma) for side in (plus, minus))
        for t in range(3):
            # gamma [sum q (v - u)^2 - sum p (v - u)^2]; members at the row move with it
            s = w = v0 = 0.0
            for side, share, turn in ((minus, q, 1), (plus, p, -1)):
                for m, part in zip(side, share, strict=True):
                    if not m.virtual:
                        k = sign * turn * gamma * part
                        s, w, v0 = s + k, w - 2 * k * m.u[t], v0 + k * m.u[t] ** 2
            near = oracle.roots(s, w, v0)
            tau = e.break_even[n, t]
            if np.isnan(tau):
                assert not near
                assert e.slope[n, t] == 0
                missing += 1
                continue
            found += 1
            size = abs(s * tau**2) + abs(w * tau) + abs(v0)
            assert abs(s * tau**2 + w * tau + v0) <= 1e-9 * size
            # of two roots the one nearer to the row
            assert abs(tau - x[t]) == pytest.approx(min(abs(r - x[t]) for r in near), rel=1e-6, abs=1e-9)
            assert e.slope[n, t] * (x[t] - tau) == pytest.approx(e.values[n, t], rel=1e-9, abs=1e-10)
    assert found > 5
    assert missing > 0 or name != "large C"


@pytest.mark.parametrize("rule", ["gi", "hybrid"])
def test_break_even_of_products(rule: str) -> None:
    fitted, X = rbf("two classes"), new(rows=8)
    net, gamma, points = neuralize(fitted), float(fitted._gamma), points_of(fitted)
    e = net.explain(X, rule=rule, target=1)
    share = {"gi": 0.0, "hybrid": oracle.eta(points, gamma)}[rule]
    assert share < 1
    _, _, a, b = oracle.expansions(fitted)[0]
    known = 0
    for n, x in enumerate(X):
        plus, minus = oracle.sides(x, points, a, b)
        p, q = (oracle.shares(x, side, gamma, gamma) for side in (plus, minus))

        def value(v: float, t: int, plus: Any = plus, minus: Any = minus, p: Any = p, q: Any = q) -> float:
            total = 0.0
            for side, shares, sign in ((plus, p, 1), (minus, q, -1)):
                for m, k in zip(side, shares, strict=True):
                    u = v if m.virtual else m.u[t]
                    total += sign * gamma * k * ((1 - share) * 2 * v * u - share * (v - u) ** 2)
            return total

        for t in range(3):
            assert value(x[t], t) == pytest.approx(e.values[n, t], rel=1e-8, abs=1e-10)
            tau = e.break_even[n, t]
            if np.isnan(tau):
                # never zero anywhere near: no change of sign
                at = np.sign([value(v, t) for v in np.linspace(-50, 50, 4001)])
                assert (at == at[0]).all()
                continue
            known += 1
            assert abs(value(tau, t)) <= 1e-8 * (1 + abs(e.values[n, t]))
            assert e.slope[n, t] * (x[t] - tau) == pytest.approx(e.values[n, t], rel=1e-8, abs=1e-10)
    assert known > 5


def test_float32() -> None:
    for name in ("two classes", "four named classes", "weights"):
        fitted, X = rbf(name), new(rows=10)
        net = neuralize(fitted).float()
        for options in ({}, {"output": "decision"}, {"rule": "gi"}):
            e = net.explain(X, **options)
            assert e.values.dtype == np.float32
            oracle.conserves(e, 1e-4)
        e = net.explain(X, target=fitted.classes_[0])
        for n, x in enumerate(X):
            oracle.agree(e, n, truth(fitted, x, 0), 1e-4)


def test_float32_far_from_the_origin() -> None:
    fitted, X = rbf("gamma scale"), new(rows=10)
    moved = copy.deepcopy(fitted)
    moved.support_vectors_ = fitted.support_vectors_ + 1e4
    e, f = neuralize(fitted).explain(X), neuralize(moved).float().explain(X + 1e4)
    # a raw value of 1e4 has a float32 step of 1e-3
    np.testing.assert_allclose(f.values, e.values, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------------- kernels of a dot product

DOTS: dict[str, Callable[[], Any]] = {
    "linear": lambda: _fit(SVC(kernel="linear"), 2),
    "linear, four": lambda: _fit(SVC(kernel="linear"), 4, ["d", "b", "a", "c"]),
    "degree 1": lambda: _fit(SVC(kernel="poly", degree=1, coef0=0.7), 3),
    "degree 2": lambda: _fit(SVC(kernel="poly", degree=2, coef0=-0.4), 3),
    "degree 3": lambda: _fit(SVC(kernel="poly", coef0=0.5), 2),
    "degree 3, no offset": lambda: _fit(SVC(kernel="poly"), 3),
    "degree 5": lambda: _fit(SVC(kernel="poly", degree=5, coef0=1.0, gamma=0.1), 3),
    "sigmoid": lambda: _fit(SVC(kernel="sigmoid", gamma=0.05, coef0=-0.2), 3),
    "sigmoid, no offset": lambda: _fit(SVC(kernel="sigmoid", gamma=0.05), 2),
    "nu poly": lambda: _fit(NuSVC(kernel="poly", nu=0.3, coef0=0.2), 3),
}


@pytest.mark.parametrize("name", DOTS)
def test_kernels_of_a_dot_product(name: str) -> None:
    fitted, X = DOTS[name](), np.vstack([new(rows=4), np.zeros((1, 3)), new(rows=1, spread=50.0)])
    net, K = neuralize(fitted), len(fitted.classes_)
    more = new(rows=300, spread=4.0, seed=1)
    np.testing.assert_array_equal(net.predict(more), fitted.predict(more))
    ovo = copy.deepcopy(fitted).set_params(decision_function_shape="ovo")
    columns = ovo.decision_function(X).reshape(len(X), -1)
    for t, (i, j, a, b) in enumerate(oracle.expansions(fitted)):
        for c, k, sign in ((i, j, 1), (j, i, -1)):
            e = net.explain(X, target=fitted.classes_[c], contrast=fitted.classes_[k])
            np.testing.assert_allclose(e.output, sign * columns[:, t], rtol=1e-10, atol=1e-10)
            oracle.conserves(e)
            for n, x in enumerate(X):
                made = oracle.dot_duel(
                    x, points_of(fitted), a, b, fitted.kernel, fitted._gamma, fitted.coef0, fitted.degree
                )
                oracle.agree(e, n, made.scaled(sign))
    # f_c is the smallest of its duels
    duels = {(i, j): columns[:, t] for t, (i, j, _, _) in enumerate(oracle.expansions(fitted))}
    for c in range(K):
        of = [d if i == c else -d for (i, j), d in duels.items() if c in (i, j)]
        np.testing.assert_allclose(net(X).numpy()[:, c], np.min(of, 0), rtol=1e-10, atol=1e-10)


def test_linear_values_are_weights_times_rows() -> None:
    fitted, X = DOTS["linear"](), new()
    e = neuralize(fitted).explain(X, target=1)
    np.testing.assert_allclose(e.values, fitted.coef_[0] * X, rtol=1e-9)
    np.testing.assert_allclose(e.residual, fitted.intercept_[0], rtol=1e-9)
    assert (e.break_even == 0).all()
    np.testing.assert_allclose(e.slope, np.broadcast_to(fitted.coef_[0], X.shape), rtol=1e-9)


def test_sigmoid_near_zero() -> None:
    """tanh(t)/t at and around t = 0, where the quotient has no digits."""
    from neuralize.linear_units import DotUnits

    units = DotUnits([[1.0, 0.0], [0.0, 2.0]], [[1.5, -0.5]], "sigmoid", 1.0, 0.0)
    for t in (0.0, 1e-300, 1e-12, -1e-7, 9.9e-7, 1.1e-6, 1e-3, 0.5, -30.0):
        X = np.array([[t, 0.0], [0.0, -t], [t, t]])
        costs = units(torch.from_numpy(X))
        rho = -torch.ones_like(costs)
        from neuralize.frames import Frame

        values, _ = units.spread(torch.from_numpy(X), rho, Frame.identity(2))
        for n, x in enumerate(X):
            made = oracle.dot_duel(x, units.points.numpy(), np.array([1.5, -0.5]), 0.0, "sigmoid", 1.0, 0.0)
            np.testing.assert_allclose(values[n].numpy(), made.values, rtol=1e-12, atol=0)
            assert -costs[n].item() == pytest.approx(made.output, rel=1e-12)


def test_polynomial_where_a_product_is_zero() -> None:
    """t = 0 with degree 1, 2 and 3: the factor t^(q-1) is 1, then 0, and no 0/0."""
    X, y = blobs(2)
    for degree in (1, 2, 3):
        fitted = SVC(kernel="poly", degree=degree, coef0=0.0).fit(X, y)
        e = neuralize(fitted).explain(np.zeros((1, 3)), target=1)
        assert (e.values == 0).all()
        assert e.residual[0] == pytest.approx(fitted.intercept_[0])
        oracle.conserves(e)


@pytest.mark.parametrize("estimator", [SVC, NuSVC, SVR, NuSVR])
def test_kernels_without_columns_are_refused(estimator: Any) -> None:
    X, y = blobs(2)
    with pytest.raises(UnsupportedEstimatorError, match="precomputed"):
        neuralize(estimator(kernel="precomputed").fit(X @ X.T / 10, y))
    with pytest.raises(UnsupportedEstimatorError, match="callable"):
        neuralize(estimator(kernel=lambda A, B: A @ B.T).fit(X, y))
    with pytest.raises(UnsupportedEstimatorError, match="degree"):
        neuralize(estimator(kernel="poly", degree=1).fit(X, y).set_params(degree=0))


def test_rules_of_others_are_refused() -> None:
    for fitted, rule in ((rbf("two classes"), "divided"), (DOTS["linear"](), "gi"), (DOTS["degree 2"](), "midpoint")):
        with pytest.raises(RuleError, match=rule):
            neuralize(fitted).explain(new(), rule=rule)
    with pytest.raises(RuleError, match="regressions"):
        neuralize(rbf("two classes")).set_level(1.0)


def test_overridden_methods_are_refused() -> None:
    class Turned(SVC):
        def predict(self, X: Any) -> Any:
            return super().predict(X)[::-1]

    with pytest.raises(UnsupportedEstimatorError, match=r"overrides SVC\.predict"):
        neuralize(Turned().fit(*blobs(2)))


# ---------------------------------------------------------------------- regressions


def _target(X: np.ndarray) -> np.ndarray:
    return np.sin(X[:, 0]) + 0.3 * X[:, 1] ** 2 + 5.0


REGRESSIONS: dict[str, Callable[[], Any]] = {
    "rbf": lambda: SVR(gamma=0.3),
    "nu": lambda: NuSVR(nu=0.4, gamma=0.3),
    "scale": lambda: SVR(C=20.0, epsilon=0.01),
    "linear": lambda: SVR(kernel="linear"),
    "poly": lambda: SVR(kernel="poly", degree=2, coef0=0.6),
    "sigmoid": lambda: NuSVR(kernel="sigmoid", gamma=0.02, coef0=0.1),
}


@functools.cache
def regression(name: str) -> Any:
    X, _ = blobs(1)
    return REGRESSIONS[name]().fit(X, _target(X))


def value(fitted: Any, x: np.ndarray, level: float, **options: Any) -> oracle.Explained:
    """F - y0, as Lambda g for the Gaussian, else with the constant as it is."""
    b, points = float(fitted.intercept_[0]) - level, points_of(fitted)
    if fitted.kernel != "rbf":
        a = fitted.dual_coef_[0]
        return oracle.dot_duel(x, points, a, b, fitted.kernel, fitted._gamma, fitted.coef0, fitted.degree)
    a, gamma = fitted.dual_coef_[0], float(fitted._gamma)
    made = oracle.duel(x, points, a, b, gamma, eta=oracle.eta(points, gamma), **options)
    return made.scaled(oracle.lam(x, points, a, b, gamma))


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions(name: str) -> None:
    fitted = regression(name)
    X, rows = blobs(1)[0], np.vstack([new(rows=4), new(rows=2, spread=30.0)])
    for level in (0.0, 4.0, float(fitted.intercept_[0]), 9.0):
        net = neuralize(fitted).set_level(level)
        for some in (X, rows, new(rows=50, spread=1e6)):
            np.testing.assert_allclose(net.predict(some), fitted.predict(some), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(net(rows).numpy()[:, 0], fitted.predict(rows) - level, rtol=1e-9, atol=1e-9)
        e = net.explain(rows)
        assert e.kind == "value"
        oracle.conserves(e)
        for n, x in enumerate(rows):
            oracle.agree(e, n, value(fitted, x, level))
    # the reference value is the mean prediction over the reference rows
    net = neuralize(fitted, reference=X)
    assert net.head.level == pytest.approx(fitted.predict(X).mean(), rel=1e-12)
    e = net.explain(rows)
    np.testing.assert_allclose(e.output, fitted.predict(rows) - fitted.predict(X).mean(), atol=1e-9)
    for n, x in enumerate(rows):
        oracle.agree(e, n, value(fitted, x, net.head.level))
    with pytest.raises(TargetError, match="contrast"):
        net.explain(rows, contrast="value")


def test_regressions_with_another_stiffness() -> None:
    fitted, rows = regression("rbf"), new()
    net = neuralize(fitted).set_level(5.0)
    for beta in (0.02, 2.0, np.inf):
        e = net.explain(rows, beta=beta)
        for n, x in enumerate(rows):
            oracle.agree(e, n, value(fitted, x, 5.0, beta=beta))


@pytest.mark.parametrize("rule", ["gi", "hybrid"])
def test_regressions_by_products(rule: str) -> None:
    fitted, rows = regression("rbf"), new()
    e = neuralize(fitted).set_level(5.0).explain(rows, rule=rule)
    for n, x in enumerate(rows):
        oracle.agree(e, n, value(fitted, x, 5.0, rule=rule))


@pytest.mark.parametrize("name", ["rbf", "linear"])
def test_levels_that_are_no_numbers(name: str) -> None:
    net = neuralize(regression(name)).set_level(4.0)
    for level in (np.nan, np.inf, -np.inf):
        with pytest.raises(RuleError, match="no number"):
            net.set_level(level)
    assert net.head.level == 4.0
    np.testing.assert_allclose(net(new()).numpy()[:, 0], regression(name).predict(new()) - 4.0, rtol=1e-9)


def test_a_level_that_leaves_one_side_empty() -> None:
    fitted = copy.deepcopy(regression("rbf"))
    fitted.dual_coef_ = np.abs(fitted.dual_coef_)
    fitted.intercept_ = np.array([-0.5])
    net = neuralize(fitted)
    before = net(new())
    with pytest.raises(ConvergenceError, match="other always wins"):
        net.set_level(-1.0)
    assert torch.equal(net(new()), before)  # as it was
    net.set_level(2.0)
    e = net.explain(new())
    for n, x in enumerate(new()):
        oracle.agree(e, n, value(fitted, x, 2.0))
    fitted.intercept_ = np.array([0.5])
    with pytest.raises(ConvergenceError, match="other always wins"):
        neuralize(fitted)


def test_a_constant_regression_is_refused() -> None:
    fitted = SVR(epsilon=100.0).fit(*blobs(2))
    assert not len(fitted.support_)
    with pytest.raises(ConvergenceError, match="constant"):
        neuralize(fitted)


def test_regressions_in_float32() -> None:
    fitted, rows = regression("rbf"), new(rows=8)
    net = neuralize(fitted).float().set_level(5.0)
    np.testing.assert_allclose(net.predict(rows), fitted.predict(rows), rtol=1e-5)
    e = net.explain(rows)
    oracle.conserves(e, 1e-4)
    for n, x in enumerate(rows):
        oracle.agree(e, n, value(fitted, x, 5.0), 1e-4)


# ---------------------------------------------------------------------- drawn tables


@st.composite
def tables(draw: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Few rows of a scale, some repeated, some columns constant; labels of 2 to 4 classes; gamma."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns, classes = draw(st.integers(4, 14)), draw(st.integers(1, 5)), draw(st.integers(2, 4))
    scale = 10.0 ** draw(st.integers(-3, 3))
    X = rng.normal(size=(rows, columns)) + draw(st.sampled_from([0.0, 3.0, -100.0]))
    if draw(st.booleans()):
        X[rng.integers(0, rows, rows // 2)] = X[rng.integers(0, rows, rows // 2)]
    if draw(st.booleans()):
        X[:, rng.integers(0, columns)] = 1.0
    if draw(st.booleans()):
        X = np.round(X)
    y = rng.permutation(np.arange(rows) % classes)
    gamma = 10.0 ** draw(st.floats(-2, 2)) / scale**2
    return X * scale, y, gamma


def rounding(rows: np.ndarray, X: np.ndarray, gamma: float) -> np.ndarray:
    """Of exponents gamma d, which cancel where all support vectors agree."""
    return 1e-14 * (1 + gamma * ((rows - X.mean(0)) ** 2).sum(1))


@given(tables(), st.sampled_from([0.1, 1.0, 100.0]), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_table(drawn: tuple[np.ndarray, np.ndarray, float], C: float, break_ties: bool) -> None:
    X, y, gamma = drawn
    fitted = SVC(C=C, gamma=gamma, break_ties=break_ties).fit(X, y)
    net = neuralize(fitted)
    rng = np.random.default_rng(0)
    rows = np.vstack([X, *(X + s * (X.std() or 1.0) * rng.normal(size=X.shape) for s in (1, 1e6))])
    ovo = copy.deepcopy(fitted).set_params(decision_function_shape="ovo", break_ties=False)
    clear = np.abs(ovo.decision_function(rows).reshape(len(rows), -1)).min(1) > 1e-9 * max(C, 1)
    np.testing.assert_array_equal(net.predict(rows)[clear], fitted.predict(rows)[clear])
    floor = rounding(rows, X, gamma)
    for options in ({}, {"target": y[0]}, {"rule": "hybrid"}, {"output": "decision"}, {"beta": 10 * gamma}):
        # gi is about the origin, not about the table
        away = 1e-14 * gamma * (rows**2).sum(1) if "rule" in options else 0.0
        oracle.conserves(net.explain(rows, **options), floor=floor + away)
    e = net.explain(rows)
    for n in (0, len(X) + 1, 2 * len(X) + 1):
        x = rows[n]
        c = int(np.flatnonzero(fitted.classes_ == e.target[n])[0])
        duels = [truth(fitted, x, c, int(k)).output for k in range(len(fitted.classes_)) if k != c]
        if np.diff(np.sort(duels)).min(initial=1.0) > 1e-6:
            oracle.agree(e, n, truth(fitted, x, c), floor=float(floor[n]))


@given(tables(), st.sampled_from([0.1, 10.0]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_regression(drawn: tuple[np.ndarray, np.ndarray, float], C: float) -> None:
    X, y, gamma = drawn
    fitted = SVR(C=C, gamma=gamma, epsilon=0.01).fit(X, y + 0.1 * X[:, 0] / np.abs(X).max())
    net = neuralize(fitted, reference=X)
    rng = np.random.default_rng(0)
    rows = np.vstack([X, *(X + s * (X.std() or 1.0) * rng.normal(size=X.shape) for s in (1, 1e6))])
    np.testing.assert_allclose(net.predict(rows), fitted.predict(rows), rtol=1e-9, atol=1e-9 * C)
    for options in ({}, {"rule": "gi"}, {"beta": gamma / 3}):
        away = 1e-14 * gamma * (rows**2).sum(1) if "rule" in options else 0.0
        oracle.conserves(net.explain(rows, **options), floor=C * (rounding(rows, X, gamma) + away))


def test_behind_a_scaler() -> None:
    """A pipeline gives the raw columns the values of the scaled ones."""
    from sklearn.pipeline import make_pipeline

    X, y = blobs(3)
    X = X * [1.0, 50.0, 0.02] + [0.0, 1000.0, 3.0]
    fitted = make_pipeline(StandardScaler(), SVC()).fit(X, y)
    e = neuralize(fitted).explain(X[:6], target=2)
    for n in range(6):
        oracle.agree(e, n, truth(fitted[-1], fitted[0].transform(X[n : n + 1])[0], 2))
