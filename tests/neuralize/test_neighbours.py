"""k nearest neighbours against sorting by hand: order statistics, votes, and the two or three rows that decide."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import kernels as oracle
from sklearn.neighbors import KNeighborsClassifier

from lrp.errors import ConvergenceError, RuleError, TargetError, UnsupportedEstimatorError
from neuralize import neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


def table(classes: int, rows: int = 30, columns: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 1.0 + rng.normal(size=(rows, columns)), np.arange(rows) % classes


def new(rows: int = 6, columns: int = 3, spread: float = 1.5, seed: int = 5) -> np.ndarray:
    return 1.0 + spread * np.random.default_rng(seed).normal(size=(rows, columns))


def votes(x: np.ndarray, X: np.ndarray, y: np.ndarray, k: int, kind: str) -> collections.Counter[int]:
    """Classes of the k nearest."""
    d = oracle.distances(x, X, kind)
    return collections.Counter(int(y[i]) for i in sorted(range(len(X)), key=d.__getitem__)[:k])


@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 10, 29])
def test_any_k_and_number_of_classes(k: int, classes: int, metric: str) -> None:
    X, y = table(classes)
    fitted = KNeighborsClassifier(k, metric=metric).fit(X, y)
    net, kind = neuralize(fitted), {"euclidean": "rbf"}.get(metric, metric)
    rows = np.vstack([new(), new(4, spread=20.0), X[:2] + 1e-3])
    logits = net(rows).numpy()
    np.testing.assert_array_equal(net.predict(rows), fitted.predict(rows))
    undecided = np.zeros(len(rows), bool)
    for n, x in enumerate(rows):
        counted = votes(x, X, y, k, kind)
        most = [c for c in range(classes) if counted[c] == max(counted.values())]
        undecided[n] = len(most) > 1
        # a unique winner has the only positive logit; where votes tie there is none, and the lowest class is decided
        assert np.flatnonzero(logits[n] > 0).tolist() == (most if len(most) == 1 else [])
        assert net.predict(rows[n : n + 1]) == most[0]
        for c in range(classes):
            for other in range(classes):
                if c != other:
                    won = oracle.neighbours(x, X, y, k, c, other, kind).output
                    assert (won > 0) == (counted[c] > counted[other])
    for c in range(classes):
        e = net.explain(rows, target=c)
        oracle.conserves(e)
        assert (e.residual == 0).all()
        np.testing.assert_array_equal(e.notes["votes"], undecided)
        for n, x in enumerate(rows):
            made = oracle.neighbours(x, X, y, k, c, kind=kind)
            oracle.agree(e, n, made)
            assert logits[n, c] == pytest.approx(made.output, rel=1e-9, abs=1e-9)
        f = net.explain(rows, target=c, contrast=(c + 1) % classes)
        for n, x in enumerate(rows):
            oracle.agree(f, n, oracle.neighbours(x, X, y, k, c, (c + 1) % classes, kind))


@pytest.mark.parametrize("rule", ["gi", "hybrid", "midpoint", "undivided"])
def test_rules(rule: str) -> None:
    X, y = table(3)
    fitted, rows = KNeighborsClassifier(5).fit(X, y), new()
    net = neuralize(fitted)
    for c in range(3):
        e = net.explain(rows, target=c, rule=rule)
        oracle.conserves(e)
        for n, x in enumerate(rows):
            oracle.agree(e, n, oracle.neighbours(x, X, y, 5, c, rule="midpoint" if rule == "undivided" else rule))
    if rule == "gi":
        z = torch.from_numpy(rows).requires_grad_()
        (gradient,) = torch.autograd.grad(net(z)[:, 2].sum(), z)
        np.testing.assert_allclose(e.values, (z * gradient).detach().numpy(), rtol=1e-9, atol=1e-10)
    with pytest.raises(RuleError):
        net.explain(rows, rule="divided")


def test_by_hand() -> None:
    """On a line, k = 3: the third and fourth nearest of 0 are at 2 and -4, the second of class 0 at 1."""
    X, y = np.array([[0.5], [1.0], [2.0], [-4.0], [6.0]]), np.array([0, 0, 1, 1, 1])
    net = neuralize(KNeighborsClassifier(3).fit(X, y))
    tau = (2.0**2 + 4.0**2) / 2
    # g_01 = max_j min(tau - d_0^(j), d_1^(j) - tau): j=1: 4 - 10 < 0; j=2: min(10 - 1, 16 - 10) = 6; j=3: -inf
    # g_10: j=1: 0.25 - 10; j=2: min(10 - 16, 1 - 10) = -9; j=3: 10 - 36
    e = net.explain([[0.0]])
    assert e.target.tolist() == [0]
    assert e.output.tolist() == [16.0 - tau] == e.values.ravel().tolist()
    assert net([[0.0]]).tolist() == [[6.0, -9.0]]
    assert e.residual.tolist() == [0.0]
    far = net.explain([[5.0]])
    # nearest: 6 (1), 2 (9), 1 (16) | 0.5 (20.25): class 1 has two of three
    assert far.target.tolist() == [1]
    assert far.output.tolist() == [min(18.125 - 9.0, 20.25 - 18.125)]


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_two_classes_odd_k(k: int) -> None:
    """Bley et al.: the r-th nearest of either class, r = (k+1)/2, have the same sign."""
    X, y = table(2)
    net, rows = neuralize(KNeighborsClassifier(k).fit(X, y)), new(60)
    r = (k + 1) // 2
    for n, f in enumerate(net(rows).numpy()):
        d = ((rows[n] - X) ** 2).sum(1)
        g = np.sort(d[y == 0])[r - 1] - np.sort(d[y == 1])[r - 1]
        assert (f[1] > 0) == (g > 0)
        assert (f[0] > 0) == (g < 0)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_two_classes_even_k(k: int) -> None:
    """The upper label wins iff its (k/2+1)-th is nearer than the other's (k/2)-th: vote ties go to the lower."""
    X, y = table(2)
    fitted, rows = KNeighborsClassifier(k).fit(X, y), new(80)
    net, half = neuralize(fitted), k // 2
    ties = 0
    for x in rows:
        d = ((x - X) ** 2).sum(1)
        lower, upper = np.sort(d[y == 0]), np.sort(d[y == 1])
        assert (net.predict(x[None])[0] == 1) == (upper[half] < lower[half - 1])
        tied = votes(x, X, y, k, "rbf")[0] == half
        assert bool((net(x[None]) <= 0).all()) == tied
        ties += tied
    assert 0 < ties < 80
    np.testing.assert_array_equal(net.predict(rows), fitted.predict(rows))


def test_classes_with_few_members() -> None:
    X, y = table(2)
    y = np.where(np.arange(30) == 4, 2, y)  # one row
    y = np.where(np.arange(30) >= 28, 3, y)  # two rows
    for k in (1, 4, 5, 20, 29):
        fitted = KNeighborsClassifier(k).fit(X, y)
        net, rows = neuralize(fitted), np.vstack([new(20), X[4:5] + 0.01, X[28:] + 0.01])
        np.testing.assert_array_equal(net.predict(rows), fitted.predict(rows))
        for c in range(4):
            e = net.explain(rows, target=c)
            oracle.conserves(e)
            for n in (0, 20, 21):
                oracle.agree(e, n, oracle.neighbours(rows[n], X, y, k, c))


def test_named_labels_and_gaps() -> None:
    X, y = table(3)
    names = np.array(["zebra", "ant", "mule"])[y]
    fitted = KNeighborsClassifier(4).fit(X, names)
    net, rows = neuralize(fitted), new(50)
    np.testing.assert_array_equal(net.predict(rows), fitted.predict(rows))
    assert net.labels.tolist() == ["ant", "mule", "zebra"]
    where = {"ant": 0, "mule": 1, "zebra": 2}
    e = net.explain(rows[:5], target="mule", contrast="zebra")
    for n in range(5):
        oracle.agree(e, n, oracle.neighbours(rows[n], X, np.array([where[v] for v in names]), 4, 1, 2))
    other = KNeighborsClassifier(4).fit(X, np.array([-7, 3, 100])[y])
    np.testing.assert_array_equal(neuralize(other).predict(rows), other.predict(rows))


@pytest.mark.parametrize("algorithm", ["brute", "kd_tree", "ball_tree"])
def test_any_search(algorithm: str) -> None:
    X, y = table(3, 60)
    rows = np.vstack([new(100), new(50, spread=1e3), new(20, spread=1e6)])
    for metric, p in (("minkowski", 2), ("minkowski", 1), ("l2", 2), ("l1", 2), ("cityblock", 2), ("euclidean", 7)):
        fitted = KNeighborsClassifier(5, algorithm=algorithm, metric=metric, p=p).fit(X, y)
        np.testing.assert_array_equal(neuralize(fitted).predict(rows[:150]), fitted.predict(rows[:150]))
        oracle.conserves(neuralize(fitted).explain(rows))


def test_sparse_fit() -> None:
    X, y = table(3)
    X = np.maximum(np.round(X), 0) + np.eye(30, 3)
    fitted = KNeighborsClassifier(3).fit(scipy.sparse.csr_matrix(X), y)
    dense = KNeighborsClassifier(3).fit(X, y)
    rows = new(20)
    np.testing.assert_array_equal(neuralize(fitted).predict(rows), fitted.predict(rows))
    np.testing.assert_array_equal(neuralize(fitted).explain(rows).values, neuralize(dense).explain(rows).values)


def test_duplicates_of_different_classes() -> None:
    """Distances agree around rank k: somebody is taken, no logit is positive, everything stays finite."""
    X = np.repeat([[0.0, 0.0], [1.0, 0.0], [3.0, 1.0]], 4, axis=0)
    y = np.array([0, 1, 0, 1] * 3)
    for k in (1, 2, 5):
        fitted = KNeighborsClassifier(k).fit(X, y)
        net, rows = neuralize(fitted), np.array([[0.0, 0.0], [0.9, 0.0], [3.0, 1.0], [50.0, 0.0]])
        logits = net(rows)
        assert torch.isfinite(logits).all()
        assert (logits <= 1e-12).all()
        for c in (0, 1):
            e = net.explain(rows, target=c)
            oracle.conserves(e)
            assert e.notes["votes"].all()
    # all the same class around a rank: the vote does not depend on who is taken
    fitted = KNeighborsClassifier(3).fit(X, np.repeat([0, 1, 2], 4))
    rows = new(30, 2)
    np.testing.assert_array_equal(neuralize(fitted).predict(rows), fitted.predict(rows))


def test_translation_scale_and_permutation() -> None:
    X, y = table(3)
    rows = new(8)
    e = neuralize(KNeighborsClassifier(5).fit(X, y)).explain(rows)
    moved = neuralize(KNeighborsClassifier(5).fit(X + 1000.0, y))
    np.testing.assert_allclose(moved.explain(rows + 1000.0).values, e.values, rtol=1e-7, atol=1e-9)
    g = neuralize(KNeighborsClassifier(5).fit(X, y)).explain(rows, rule="gi")
    assert np.abs(moved.explain(rows + 1000.0, rule="gi").values - g.values).max() > 1
    scaled = neuralize(KNeighborsClassifier(5).fit(3 * X, y)).explain(3 * rows)
    np.testing.assert_allclose(scaled.values, 9 * e.values, rtol=1e-9)
    order = np.random.default_rng(2).permutation(30)
    shuffled = neuralize(KNeighborsClassifier(5).fit(X[order], y[order])).explain(rows)
    np.testing.assert_allclose(shuffled.values, e.values, rtol=1e-12)
    turned = neuralize(KNeighborsClassifier(5).fit(X[:, [2, 0, 1]], y)).explain(rows[:, [2, 0, 1]])
    np.testing.assert_allclose(turned.values, e.values[:, [2, 0, 1]], rtol=1e-9)


def test_refusals() -> None:
    X, y = table(2)
    for k in (30,):
        with pytest.raises(ConvergenceError, match="every row gets the same vote"):
            neuralize(KNeighborsClassifier(k).fit(X, y))
    assert neuralize(KNeighborsClassifier(29).fit(X, y)).predict(X).shape == (30,)
    with pytest.raises(ConvergenceError, match="one class"):
        neuralize(KNeighborsClassifier(3).fit(X, np.zeros(30)))
    for weights in ("distance", lambda d: 1 / (1 + d)):
        with pytest.raises(UnsupportedEstimatorError, match="weights"):
            neuralize(KNeighborsClassifier(3, weights=weights).fit(X, y))
    assert neuralize(KNeighborsClassifier(3, weights=None).fit(X, y)).predict(X[:1]).shape == (1,)
    with pytest.raises(UnsupportedEstimatorError, match="several targets"):
        neuralize(KNeighborsClassifier(3).fit(X, np.stack([y, y], 1)))
    for metric in ("chebyshev", "cosine", "correlation", lambda a, b: float(abs(a - b).max())):
        with pytest.raises(UnsupportedEstimatorError, match="metric"):
            neuralize(KNeighborsClassifier(3, metric=metric).fit(X, y))
    with pytest.raises(UnsupportedEstimatorError, match="minkowski"):
        neuralize(KNeighborsClassifier(3, p=3).fit(X, y))
    with pytest.raises(UnsupportedEstimatorError, match="precomputed"):
        neuralize(KNeighborsClassifier(3, metric="precomputed").fit(((X[:, None] - X) ** 2).sum(2), y))
    net = neuralize(KNeighborsClassifier(3).fit(X, y))
    with pytest.raises(TargetError):
        net.explain(X, target=0, contrast=0)


@pytest.mark.parametrize("p", [1, 2])
def test_weighted_columns_are_refused(p: int) -> None:
    """Another distance than the plain one, under the same name."""
    X, y = table(3)
    fitted = KNeighborsClassifier(3, metric="minkowski", p=p, metric_params={"w": [100.0, 1.0, 0.01]}).fit(X, y)
    with pytest.raises(UnsupportedEstimatorError, match="minkowski"):
        neuralize(fitted)


def test_break_even() -> None:
    """Three squares with shares 1/2, 1/2, -1 are a line."""
    X, y = table(3)
    net, rows = neuralize(KNeighborsClassifier(4).fit(X, y)), new(12)
    e = net.explain(rows)
    known = ~np.isnan(e.break_even)
    assert known.mean() > 0.9
    np.testing.assert_allclose((e.slope * (rows - e.break_even))[known], e.values[known], rtol=1e-9, atol=1e-10)
    for n, x in enumerate(rows):
        # with the three rows held, a column at its break-even value has no relevance
        v = oracle.vote(x, X, y, 4, int(e.target[n]))
        for t in range(3):
            inner, outer, member = X[v.inner, t], X[v.outer, t], X[v.member, t]
            tau = e.break_even[n, t]
            if np.isnan(tau):
                assert member == pytest.approx((inner + outer) / 2, abs=1e-12)
                continue
            assert ((tau - inner) ** 2 + (tau - outer) ** 2) / 2 == pytest.approx((tau - member) ** 2, abs=1e-8)
            slope = 2 * (member - (inner + outer) / 2)
            assert e.slope[n, t] == pytest.approx(slope if v.own else -slope, rel=1e-9, abs=1e-9)


def test_float32() -> None:
    X, y = table(3)
    for metric in ("euclidean", "manhattan"):
        net, rows = neuralize(KNeighborsClassifier(5, metric=metric).fit(X, y)).float(), new(12)
        assert net.explain(rows).values.dtype == np.float32
        for options in ({}, {"rule": "gi"}) if metric == "euclidean" else ({},):
            oracle.conserves(net.explain(rows, **options), 1e-4)
        e = net.explain(rows, target=0)
        for n, x in enumerate(rows):
            oracle.agree(e, n, oracle.neighbours(x, X, y, 5, 0, kind={"euclidean": "rbf"}.get(metric, metric)), 1e-4)


def test_prototypes_are_rows_of_the_table() -> None:
    X, y = table(2)
    e = neuralize(KNeighborsClassifier(3).fit(X, y)).explain(new(5))
    for n in range(5):
        made = e.prototypes(n)
        d = ((new(5)[n] - X) ** 2).sum(1)
        nearest = np.argsort(d)
        assert {nearest[2], nearest[3]} <= {*made["prototype"], nearest[2], nearest[3]}
        assert len(made) <= 3
        assert made["share"].sum() == pytest.approx(1)


@st.composite
def problems(draw: Any) -> tuple[np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns, classes = draw(st.integers(4, 16)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    scale = 10.0 ** draw(st.integers(-3, 3))
    X = rng.normal(size=(rows, columns)) + draw(st.sampled_from([0.0, -50.0]))
    if draw(st.booleans()):
        X[rng.integers(0, rows, rows // 2)] = X[rng.integers(0, rows, rows // 2)]
    if draw(st.booleans()):
        X[:, rng.integers(0, columns)] = 1.0
    if draw(st.booleans()):
        X = np.round(X)
    y = rng.permutation(np.minimum(np.arange(rows), classes - 1) if draw(st.booleans()) else np.arange(rows) % classes)
    return X * scale, y, draw(st.integers(1, rows - 1))


FAR = np.array([[0.12573022, -0.13210486], [0.64042265, 0.10490012], [-0.53566937, 0.36159505], [1.304, 0.94708096]])


@given(problems(), st.sampled_from(["euclidean", "manhattan"]))
@example((FAR, np.array([0, 0, 1, 1]), 1), "manhattan")
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_table(drawn: tuple[np.ndarray, np.ndarray, int], metric: str) -> None:
    X, y, k = drawn
    fitted, kind = KNeighborsClassifier(k, metric=metric).fit(X, y), {"euclidean": "rbf"}.get(metric, metric)
    net = neuralize(fitted)
    rng = np.random.default_rng(0)
    rows = np.vstack([X, *(X + s * (X.std() or 1.0) * rng.normal(size=X.shape) for s in (1, 1e6))])
    mine, theirs = net.predict(rows), fitted.predict(rows)
    floor = 1e-14 * ((rows - X.mean(0)) ** 2).sum(1)  # rounding of squares that cancel
    for options in ({}, {"target": int(y[0])}, {"rule": "hybrid"}) if metric == "euclidean" else ({},):
        oracle.conserves(net.explain(rows, **options), floor=floor)
    for n in range(0, len(rows), 5):
        d, far = np.sort(oracle.distances(rows[n], X, kind)), float(oracle.columns(kind, rows[n], X[0]).sum())
        if d[k] - d[k - 1] <= 1e-13 * far:
            continue  # taken at random
        counted = votes(rows[n], X, y, k, kind)
        best = max(counted.values())
        assert mine[n] == theirs[n] == min(c for c, v in counted.items() if v == best)
        if np.diff(d).min() > 1e-13 * far:
            c = int(y[n % len(y)])
            made = oracle.neighbours(rows[n], X, y, k, c, kind=kind)
            oracle.agree(net.explain(rows[n : n + 1], target=c), 0, made, floor=float(floor[n]))
