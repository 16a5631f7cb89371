"""The network of kernel k-means against distances in feature space, and its rules against the pairs written out."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kernels as oracle
from sklearn.cluster import KMeans
from sklearn.datasets import load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler
from torch.utils._python_dispatch import TorchDispatchMode

from lrp.errors import ConvergenceError, TargetError, UnsupportedEstimatorError
from neuralize import KernelKMeans
from neuralize import neuralize as convert
from neuralize.additive import AdditiveHead
from neuralize.kernel_pools import RKHSPool
from neuralize.network import NeuralizedModel
from neuralize.units import SquaredDistances

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


def neuralize(model: Any, reference: Any = None) -> NeuralizedModel:
    """The network with the nearest competitor by default, as the loops below have it."""
    net = convert(model, reference)
    if reference is None and isinstance(net.head.pool, RKHSPool):
        net.head.pool.margin.fill_(math.nan)
    return net


def test_default_stiffness() -> None:
    """Of the rows the centres are made of: one over their mean logit in their own cluster."""
    model = KernelKMeans(3, n_init=1, random_state=0).fit(np.random.default_rng(0).normal(size=(60, 3)))
    net = convert(model)
    own = net(model.support_vectors_).amax(1).mean()
    assert net.explain(model.support_vectors_[:3]).beta == pytest.approx(1 / float(own), rel=1e-9)


def table(rows: int = 36, columns: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 3.0 + rng.normal(size=(rows, columns)) + 2.0 * rng.normal(size=(4, columns))[np.arange(rows) % 4]


def new(rows: int = 4, columns: int = 3, spread: float = 2.0, seed: int = 5) -> np.ndarray:
    return 3.0 + spread * np.random.default_rng(seed).normal(size=(rows, columns))


def _fit(k: int, X: np.ndarray | None = None, **options: Any) -> KernelKMeans:
    return KernelKMeans(k, n_init=2, random_state=0, **options).fit(table() if X is None else X)


def _landmarks(**options: Any) -> KernelKMeans:
    return _fit(3, table(120), algorithm="landmarks", n_landmarks=14, **options)


MODELS: dict[str, Callable[[], KernelKMeans]] = {
    "scale": lambda: _fit(3),
    "two": lambda: _fit(2, gamma=0.2),
    "sharp": lambda: _fit(4, gamma=1.5),
    "per column": lambda: _fit(3, gamma=[0.5, 0.02, 0.1]),
    "a column without weight": lambda: _fit(3, gamma=[0.5, 0.0, 0.1]),
    "laplacian": lambda: _fit(3, kernel="laplacian"),
    "laplacian per column": lambda: _fit(3, kernel="laplacian", gamma=[1.0, 0.1, 0.3]),
    "chi2": lambda: _fit(3, np.abs(table()), kernel="chi2"),
    "chi2 per column": lambda: _fit(3, np.abs(table()), kernel="chi2", gamma=[1.0, 0.2, 0.5]),
    "l4": lambda: _fit(3, kernel="l4"),
    "l4 per column": lambda: _fit(3, kernel="l4", gamma=[1e-3, 1e-2, 1e-1]),
    "landmarks": _landmarks,
    "landmarks, sharp": lambda: _landmarks(gamma=0.8),
    "mini-batches": lambda: _fit(3, table(120), algorithm="minibatch", n_landmarks=14, batch_size=32),
}


@functools.cache
def fitted(name: str) -> KernelKMeans:
    return MODELS[name]()


class Pieces:
    """What the oracle takes: gammas per column go into the columns."""

    def __init__(self, model: KernelKMeans) -> None:
        self.kind, gamma = model.kernel, np.asarray(model.gamma_)
        self.scale = np.ones(model.n_features_in_)
        if gamma.ndim:
            self.scale = gamma ** {"rbf": 1 / 2, "laplacian": 1.0, "chi2": 1.0, "l4": 1 / 4}[self.kind]
        self.gamma = 1.0 if gamma.ndim else float(gamma)
        self.points = np.asarray(model.support_vectors_) * self.scale
        self.weights, self.norms = model.dual_coef_, model.centre_norms_

    def duel(self, x: np.ndarray, c: int, k: int, **options: Any) -> oracle.Explained:
        return oracle.feature_space_duel(
            x * self.scale, self.points, self.weights, self.norms, self.gamma, c, k, self.kind, **options
        )

    def logit(self, x: np.ndarray, c: int, **options: Any) -> oracle.Explained:
        return min((self.duel(x, c, k, **options) for k in range(len(self.norms)) if k != c), key=lambda d: d.output)


@pytest.mark.parametrize("name", MODELS)
def test_decides_as_distances_in_feature_space(name: str) -> None:
    model = fitted(name)
    pieces, net = Pieces(model), neuralize(model)
    positive = model.kernel == "chi2"
    np.testing.assert_allclose(
        oracle.centre_norms(pieces.points, pieces.weights, pieces.gamma, pieces.kind), pieces.norms, rtol=1e-7
    )
    for X in (table(), new(60), new(30, spread=20.0)):
        X = np.abs(X) if positive else X
        logits = net(X).numpy()
        np.testing.assert_array_equal(net.predict(X), model.predict(X))
        assert ((logits > 0).sum(1) <= 1).all()
        for n in range(0, len(X), 3):
            far = oracle.squared_distances(
                X[n] * pieces.scale, pieces.points, pieces.weights, pieces.norms, pieces.gamma, pieces.kind
            )
            gap = np.sort(far)
            if gap[1] - gap[0] > 1e-12:
                assert far.argmin() == model.predict(X[n : n + 1])[0] == logits[n].argmax()
                assert (logits[n] > 0).sum() == 1
    assert net.predict(table()[:1] if not positive else np.abs(table()[:1])).dtype == model.labels_.dtype


@pytest.mark.parametrize("name", MODELS)
def test_values_and_parts(name: str) -> None:
    model = fitted(name)
    pieces, net = Pieces(model), neuralize(model)
    X = np.vstack([new(3), np.asarray(model.support_vectors_)[:1], new(1, spread=8.0)])
    X = np.abs(X) if model.kernel == "chi2" else X
    logits, K = net(X).numpy(), len(pieces.norms)
    for c in range(K):
        e = net.explain(X, target=c)
        oracle.conserves(e)
        for n, x in enumerate(X):
            made = pieces.logit(x, c)
            oracle.agree(e, n, made)
            assert logits[n, c] == pytest.approx(made.output, rel=1e-9, abs=1e-10)
        for k in range(K):
            if k != c:
                h = net.explain(X, target=c, contrast=k)
                for n, x in enumerate(X):
                    oracle.agree(h, n, pieces.duel(x, c, k))
        d = net.explain(X, target=c, rule="divided")
        oracle.conserves(d)
        for n, x in enumerate(X):
            oracle.agree(d, n, pieces.logit(x, c, divided=True), 1e-8)
    with pytest.raises(TargetError):
        net.explain(X, target=1, contrast=1)


@pytest.mark.parametrize("beta", [0.3, 5.0, np.inf])
@pytest.mark.parametrize("rule", ["undivided", "divided"])
def test_soft_competition(rule: str, beta: float) -> None:
    """P over competitors; undivided: f - sum P h is left, divided: every competitor carries P f."""
    model, X = fitted("sharp"), new(4)
    pieces, net = Pieces(model), neuralize(model)
    for c in range(4):
        e = net.explain(X, target=c, rule=rule, beta=beta)
        oracle.conserves(e)
        for n, x in enumerate(X):
            duels = {k: pieces.duel(x, c, k, divided=rule == "divided") for k in range(4) if k != c}
            h = [d.output for d in duels.values()]
            P = oracle.softmax([-beta * v for v in h]) if np.isfinite(beta) else oracle.hardmax([-v for v in h])
            f = min(h)
            values, parts = np.zeros(3), {"competition": 0.0}
            for share, d in zip(P, duels.values(), strict=True):
                factor = share * (f / d.output if rule == "divided" else 1.0)
                values += factor * d.values
                for name, part in d.parts.items():
                    parts[name] = parts.get(name, 0.0) + factor * part
                if rule == "undivided":
                    parts["competition"] -= share * d.output
            parts["competition"] += f if rule == "undivided" else 0.0
            oracle.agree(e, n, oracle.Explained(f, values, parts), 1e-8)
            np.testing.assert_allclose(np.delete(e.competitors[n], c), P, atol=1e-9)
            assert parts["competition"] <= 1e-12


def test_bookkeeping_by_shares_of_the_norms() -> None:
    """R_t = (1 - e_k) M_k(t) - (1 - e_c) M_c(t), from the softmaxes within the clusters."""
    model, X = fitted("scale"), new(6)
    pieces, net = Pieces(model), neuralize(model)
    for c, k in itertools.permutations(range(3), 2):
        e = net.explain(X, target=c, contrast=k)
        for n, x in enumerate(X):
            d = ((x - pieces.points) ** 2).sum(1)
            M, s = {}, {}
            for a in (c, k):
                mine = np.flatnonzero(pieces.weights[a])
                p = oracle.softmax(np.log(pieces.weights[a, mine]) - pieces.gamma * d[mine])
                M[a] = sum(w * (x - pieces.points[j]) ** 2 for w, j in zip(p, mine, strict=True))
                s[a] = math.fsum(pieces.weights[a, mine] * np.exp(-pieces.gamma * d[mine]))
            e_k = (pieces.norms[c] / 2) / (s[k] + pieces.norms[c] / 2)
            e_c = (pieces.norms[k] / 2) / (s[c] + pieces.norms[k] / 2)
            np.testing.assert_allclose(e.values[n], (1 - e_k) * M[k] - (1 - e_c) * M[c], rtol=1e-9)


def test_the_density_form_decides_otherwise() -> None:
    """Item 6: kernel densities alone, and norms that are not crossed, are other models."""
    X = StandardScaler().fit_transform(load_wine().data)
    model = KernelKMeans(3, gamma=0.05, random_state=0, n_init=2).fit(X[::2])
    pieces, net = Pieces(model), neuralize(model)
    rows = X[::3] + 0.8 * np.random.default_rng(0).normal(size=X[::3].shape)
    labels = model.predict(rows)
    np.testing.assert_array_equal(net.predict(rows), labels)
    by_density = [oracle.density_form(x, pieces.points, pieces.weights, pieces.gamma).argmin() for x in rows]
    assert 0.5 < (labels == by_density).mean() < 0.99
    wrong = 0
    for n, x in enumerate(rows[:30]):
        f = [min(pieces.duel(x, c, k, crossed=False).output for k in range(3) if k != c) for c in range(3)]
        wrong += int(np.argmax(f)) != labels[n]
    assert wrong > 0


def test_signed_weights() -> None:
    """Landmarks: about a third of the coefficients are negative, and some of a cluster's sums may be."""
    for name in ("landmarks", "landmarks, sharp", "mini-batches"):
        model = fitted(name)
        assert (model.dual_coef_ < 0).mean() > 0.1
        rows = new(200, spread=3.0)
        np.testing.assert_array_equal(neuralize(model).predict(rows), model.predict(rows))
    # one landmark on both sides of a duel, positive for c and negative for k
    net = NeuralizedModel(
        AdditiveHead(SquaredDistances([[0.0, 1.0], [2.0, 0.0]]), RKHSPool([[1.0, -0.2], [-0.5, 0.9]], [0.8, 0.7], 0.4))
    )
    U, W, norms, X = np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([[1.0, -0.2], [-0.5, 0.9]]), [0.8, 0.7], new(6, 2)
    for c in (0, 1):
        for rule in ("undivided", "divided"):
            e = net.explain(X, target=c, rule=rule)
            for n, x in enumerate(X):
                made = oracle.feature_space_duel(x, U, W, np.array(norms), 0.4, c, 1 - c, divided=rule == "divided")
                oracle.agree(e, n, made)


def test_one_member_each_is_a_pair() -> None:
    """Two clusters of one member: the decision is that of k-means; without norms the explanation is too."""
    X = np.array([[0.0, 1.0], [3.0, -1.0]])
    model = KernelKMeans(2, gamma=0.1, random_state=0).fit(X)
    assert sorted(model.labels_.tolist()) == [0, 1]
    net, rows = neuralize(model), new(20, 2)
    pairs = neuralize(KMeans(2, n_init=1, init=X[np.argsort(model.labels_)]).fit(X))
    np.testing.assert_array_equal(net.predict(rows), pairs.predict(rows))
    np.testing.assert_allclose(net.predict(X), model.labels_)
    plain = NeuralizedModel(AdditiveHead(SquaredDistances(X), RKHSPool(np.eye(2), [1e-300, 1e-300], 0.1)))
    f = neuralize(KMeans(2, n_init=1, init=X).fit(X)).explain(rows)
    e, d = plain.explain(rows), plain.explain(rows, rule="divided")
    np.testing.assert_allclose(e.output, f.output, rtol=1e-9)
    np.testing.assert_allclose(e.values, f.values, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(e.residual, 0, atol=1e-9)
    # all pairs are one, of which the stabiliser takes a little
    kept = 1 - d.residual / d.output
    np.testing.assert_allclose(d.values, kept[:, None] * f.values, rtol=1e-9, atol=1e-9)
    assert np.median(kept) > 0.99


def test_members_of_small_clusters() -> None:
    """A row that is its cluster's only member: distances of 0, but for rounding, are not divided by."""
    rounded = 0
    for seed in range(20):
        points = np.random.default_rng(seed).normal(size=(7, 50))
        weights = np.eye(2, 7)
        units = SquaredDistances(points)
        rounded += int((units(torch.from_numpy(points[:2])).diagonal() > 0).any())
        e = NeuralizedModel(AdditiveHead(units, RKHSPool(weights, [1.0, 1.0], 1e-2))).explain(
            points[:2], rule="divided"
        )
        oracle.conserves(e)
        for n in (0, 1):
            made = oracle.feature_space_duel(
                points[n], points, weights, np.ones(2), 1e-2, int(e.target[n]), 1 - int(e.target[n]), divided=True
            )
            oracle.agree(e, n, made, 1e-8)
    assert rounded > 3


def test_what_the_divided_rule_leaves() -> None:
    """Without the stabiliser only the share of the two norms, at distance 0 both; with it little more."""
    model, X = fitted("two"), new(12)
    pieces = Pieces(model)
    e = neuralize(model).explain(X, rule="divided")
    for n, x in enumerate(X):
        c = int(e.target[n])
        free = pieces.duel(x, c, 1 - c, divided=True, epsilon=0.0)
        s = [
            math.fsum(
                w * math.exp(-pieces.gamma * v)
                for w, v in zip(pieces.weights[a], ((x - pieces.points) ** 2).sum(1), strict=True)
            )
            for a in (0, 1)
        ]
        q = pieces.norms[1 - c] / 2 / (s[c] + pieces.norms[1 - c] / 2)
        p = pieces.norms[c] / 2 / (s[1 - c] + pieces.norms[c] / 2)
        assert free.parts["stabiliser"] == pytest.approx(free.output * p * q, rel=1e-9)
        assert abs(e.residual_parts["stabiliser"][n] - free.parts["stabiliser"]) < 0.2 * abs(free.output)
    assert (e.residual_parts["pools"] == 0).all()
    assert e.divided.all()


def test_a_point_in_two_clusters() -> None:
    """Equal distances of a competing and an own member: that pair's share is left over, nothing is divided by zero."""
    points = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [3.0, 0.0]])
    weights = np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    norms = oracle.centre_norms(points, weights, 0.5)
    net = NeuralizedModel(AdditiveHead(SquaredDistances(points), RKHSPool(weights, norms, 0.5)))
    rows = np.vstack([new(6, 2), points])
    for c in (0, 1):
        for rule in ("divided", "undivided"):
            e = net.explain(rows, target=c, rule=rule)
            oracle.conserves(e)
            for n, x in enumerate(rows):
                made = oracle.feature_space_duel(x, points, weights, norms, 0.5, c, 1 - c, divided=rule == "divided")
                oracle.agree(e, n, made)


def test_centres_without_landmarks_nearby() -> None:
    """Rows far from all landmarks share a centre of norm 0: no logarithm of 0 in the residual."""
    X = 10.0 * np.arange(40)[:, None]
    model = KernelKMeans(4, gamma=50.0, algorithm="landmarks", n_landmarks=4, random_state=0, n_init=1).fit(X)
    assert (model.centre_norms_ == 0).any()
    net, rows = neuralize(model), np.vstack([X, X + 0.1])
    np.testing.assert_array_equal(net.predict(rows), model.predict(rows))
    for c in range(4):
        for rule in ("undivided", "divided"):
            e = net.explain(rows, target=c, rule=rule)
            oracle.conserves(e)
            for n in (0, 7, 39, 60):
                pieces = Pieces(model)
                duels = sorted(pieces.duel(rows[n], c, k).output for k in range(4) if k != c)
                if rule == "undivided" and duels[1] - duels[0] > 1e-9:
                    oracle.agree(e, n, pieces.logit(rows[n], c))


def test_many_pairs_are_taken_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, X = fitted("scale"), new(20)
    net = neuralize(model)
    e = net.explain(X, rule="divided")
    for pairs in (1, 600, 1500):
        monkeypatch.setattr("neuralize.kernel_pools._PAIRS", pairs)
        few = net.explain(X, rule="divided")
        np.testing.assert_allclose(few.values, e.values, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(few.residual, e.residual, rtol=1e-12, atol=1e-14)


def test_the_whole_batch_of_pairs_is_never_held() -> None:
    """300 rows x 150 x 150 pairs are 7 million numbers; 2 million are held at once."""
    rng = np.random.default_rng(0)
    W = np.zeros((2, 300))
    W[0, :150] = W[1, 150:] = 1 / 150
    pool = RKHSPool(W, [0.5, 0.5], 0.1)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    net = NeuralizedModel(AdditiveHead(SquaredDistances(rng.normal(size=(300, 2))), pool))
    with Watch():
        e = net.explain(rng.normal(size=(300, 2)), rule="divided")
    oracle.conserves(e)
    assert largest <= 2**21


def test_translation_and_scale() -> None:
    model, X = fitted("scale"), new(8)
    moved, larger = copy.deepcopy(model), copy.deepcopy(model)
    moved.support_vectors_ = model.support_vectors_ + 500.0
    larger.support_vectors_, larger.gamma_ = 4 * model.support_vectors_, model.gamma_ / 16
    for rule in ("undivided", "divided"):
        e = neuralize(model).explain(X, rule=rule)
        np.testing.assert_allclose(neuralize(moved).explain(X + 500.0, rule=rule).values, e.values, rtol=1e-6)
        f = neuralize(larger).explain(4 * X, rule=rule)
        np.testing.assert_allclose(f.values, 16 * e.values, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(f.residual, 16 * e.residual, rtol=1e-8, atol=1e-9)


def test_two_clusters_are_antisymmetric() -> None:
    net, X = neuralize(fitted("two")), new(10)
    for rule in ("undivided", "divided"):
        a, b = net.explain(X, target=0, rule=rule), net.explain(X, target=1, rule=rule)
        np.testing.assert_allclose(a.values, -b.values, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(a.residual, -b.residual, rtol=1e-9, atol=1e-10)


def test_a_column_without_weight_plays_no_part() -> None:
    model, X = fitted("a column without weight"), new(10)
    net = neuralize(model)
    e = net.explain(X)
    assert (e.values[:, 1] == 0).all()
    assert np.isnan(e.break_even[:, 1]).all()
    X[:, 1] += 1e3
    np.testing.assert_array_equal(net.predict(X), model.predict(X))
    np.testing.assert_allclose(net.explain(X).values, e.values, rtol=1e-9)


def test_per_column_gammas_are_one_where_equal() -> None:
    X = new(8)
    for kernel in ("rbf", "laplacian", "chi2", "l4"):
        U, rows = (np.abs(table()), np.abs(X)) if kernel == "chi2" else (table(), X)
        one = KernelKMeans(3, kernel=kernel, gamma=0.2, random_state=0, n_init=1).fit(U)
        many = KernelKMeans(3, kernel=kernel, gamma=[0.2] * 3, random_state=0, n_init=1).fit(U)
        e, f = neuralize(one).explain(rows), neuralize(many).explain(rows)
        # costs already hold gamma: values are gamma times as large
        np.testing.assert_allclose(f.values, 0.2 * e.values, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(f.residual, 0.2 * e.residual, rtol=1e-9, atol=1e-12)


def test_refusals() -> None:
    with pytest.raises(UnsupportedEstimatorError, match="kernel of your own"):
        neuralize(KernelKMeans(2, kernel=lambda x, u: abs(x - u) ** 1.5, random_state=0).fit(table()))
    with pytest.raises(ConvergenceError, match="K = 1"):
        neuralize(KernelKMeans(1).fit(table()))


def test_reference_rows_set_beta() -> None:
    model, X = fitted("sharp"), new(30)
    net = neuralize(model, reference=X)
    pieces = Pieces(model)
    own = [pieces.logit(x, int(c)).output for x, c in zip(X, model.predict(X), strict=True)]
    assert net.explain(X[:2]).beta == pytest.approx(1 / np.mean(own), rel=1e-9)


def test_break_even() -> None:
    """With the shares held: the column's relevance is 0 at its break-even value; NaN where its parabola has no root."""
    model, X = fitted("sharp"), new(10)
    pieces, net = Pieces(model), neuralize(model)
    e = net.explain(X)
    found = missing = 0
    for n, x in enumerate(X):
        c = int(e.target[n])
        k = min((k for k in range(4) if k != c), key=lambda k: pieces.duel(x, c, k).output)
        d = ((x - pieces.points) ** 2).sum(1)
        rho = np.zeros(len(d))
        for a, b, sign in ((c, k, -1), (k, c, 1)):
            exponents = [math.log(w) - pieces.gamma * v for w, v in zip(pieces.weights[a], d, strict=True) if w > 0]
            total = oracle.log_sum_exp([*exponents, math.log(pieces.norms[b] / 2)])
            rho[pieces.weights[a] > 0] += sign * np.exp(np.array(exponents) - total)
        for t in range(3):
            u = pieces.points[:, t]
            s, b, v0 = rho.sum(), -2 * float(rho @ u), float(rho @ u**2)
            near, tau = oracle.roots(s, b, v0), e.break_even[n, t]
            if np.isnan(tau):
                assert not near
                missing += 1
                continue
            found += 1
            assert abs(tau - x[t]) == pytest.approx(min(abs(r - x[t]) for r in near), rel=1e-6, abs=1e-8)
            assert float(rho @ (tau - u) ** 2) == pytest.approx(0, abs=1e-8)
            assert e.slope[n, t] * (x[t] - tau) == pytest.approx(e.values[n, t], rel=1e-8, abs=1e-10)
    assert found > 5
    assert missing > 0


@pytest.mark.parametrize("name", ["laplacian", "laplacian per column"])
def test_break_even_of_absolute_distances(name: str) -> None:
    model, X = fitted(name), new(8)
    pieces, net = Pieces(model), neuralize(model)
    e = net.explain(X)
    known = ~np.isnan(e.break_even)
    assert known.any()
    for n, x in enumerate(X):
        c = int(e.target[n])
        k = min((k for k in range(3) if k != c), key=lambda k: pieces.duel(x, c, k).output)
        rho = np.zeros(len(pieces.points))
        d = np.abs(x * pieces.scale - pieces.points).sum(1)
        for a, b, sign in ((c, k, -1), (k, c, 1)):
            exponents = [math.log(w) - pieces.gamma * v for w, v in zip(pieces.weights[a], d, strict=True) if w > 0]
            total = oracle.log_sum_exp([*exponents, math.log(pieces.norms[b] / 2)])
            rho[pieces.weights[a] > 0] += sign * np.exp(np.array(exponents) - total)
        for t in range(3):
            u, tau = pieces.points[:, t], e.break_even[n, t] * pieces.scale[t]

            def value(v: float, u: np.ndarray = u, rho: np.ndarray = rho) -> float:
                return float(rho @ np.abs(v - u))

            assert value(x[t] * pieces.scale[t]) == pytest.approx(e.values[n, t], rel=1e-9, abs=1e-12)
            if np.isnan(tau):
                at = np.sign([value(v) for v in np.linspace(-1e3, 1e3, 20001)])
                assert (at == at[0]).all()
            else:
                assert value(tau) == pytest.approx(0, abs=1e-9)
                # no zero on the way to it
                here = x[t] * pieces.scale[t]
                between = np.sign([value(v) for v in np.linspace(here, tau, 200)[:-1]])
                assert (between == between[0]).all()


def test_float32() -> None:
    for name in ("scale", "laplacian", "landmarks", "per column"):
        model, X = fitted(name), new(8)
        net, pieces = neuralize(model).float(), Pieces(model)
        for rule in ("undivided", "divided"):
            e = net.explain(X, target=0, rule=rule)
            assert e.values.dtype == np.float32
            oracle.conserves(e, 1e-4)
        e = net.explain(X, target=0)
        for n, x in enumerate(X):
            oracle.agree(e, n, pieces.logit(x, 0), 1e-4)


def test_far_rows() -> None:
    """Every kernel value is 0 there: norms alone decide, and nothing is NaN."""
    for name in ("scale", "laplacian", "l4", "landmarks"):
        model = fitted(name)
        net, X = neuralize(model), new(10, spread=1e6)
        assert (model.transform(X)[0] > 0.9).all()
        np.testing.assert_array_equal(net.predict(X), model.predict(X))
        for rule in ("undivided", "divided"):
            e = net.explain(X, rule=rule)
            oracle.conserves(e)
            # far away no column says anything
            assert np.abs(e.values).sum() <= 1e-6 * np.abs(e.residual).sum()


@st.composite
def tables(draw: Any) -> tuple[np.ndarray, int, str, float]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns, k = draw(st.integers(4, 16)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    kernel = draw(st.sampled_from(["rbf", "laplacian", "chi2", "l4"]))
    X = rng.normal(size=(rows, columns)) + draw(st.sampled_from([0.0, 6.0]))
    if draw(st.booleans()):
        X[rng.integers(0, rows, rows // 2)] = X[rng.integers(0, rows, rows // 2)]
    if draw(st.booleans()):
        X[:, rng.integers(0, columns)] = 1.0
    if draw(st.booleans()):
        X = np.round(X)
    if kernel == "chi2":
        X = np.abs(X)
    return X * 10.0 ** draw(st.integers(-3, 3)), k, kernel, 10.0 ** draw(st.floats(-1.5, 1.5))


@given(tables(), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_table(drawn: tuple[np.ndarray, int, str, float], landmarks: bool) -> None:
    X, k, kernel, sharpness = drawn
    options = {"algorithm": "landmarks", "n_landmarks": max(2, len(X) // 2)} if landmarks else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        first = KernelKMeans(k, kernel=kernel, random_state=0, n_init=1, **options).fit(X)
        model = KernelKMeans(k, kernel=kernel, gamma=first.gamma_ * sharpness, random_state=0, n_init=1, **options)
        model.fit(X)
    if len(model.centre_norms_) < 2:
        with pytest.raises(ConvergenceError, match="K = 1"):
            neuralize(model)
        return
    net, pieces = neuralize(model), Pieces(model)
    rng = np.random.default_rng(0)
    rows = np.vstack([X, *(X + s * (X.std() or 1.0) * rng.normal(size=X.shape) for s in (1, 1e6))])
    rows = np.abs(rows) if kernel == "chi2" else rows
    clear = np.diff(np.sort(model.transform(rows) ** 2, 1)[:, :2], axis=1)[:, 0] > 1e-9
    np.testing.assert_array_equal(net.predict(rows)[clear], model.predict(rows)[clear])
    floor = 1e-14 / pieces.gamma  # logarithms that cancel
    for asked in ({}, {"target": 0}, {"rule": "divided"}, {"beta": 1.0, "target": 1}, {"target": 0, "contrast": 1}):
        oracle.conserves(net.explain(rows, **asked), floor=floor)
    e = net.explain(rows, target=0)
    for n in (0, len(X), len(X) + 1, 2 * len(X)):
        duels = sorted(pieces.duel(rows[n], 0, j).output for j in range(1, len(pieces.norms)))
        if len(duels) == 1 or duels[1] - duels[0] > 1e-9 / pieces.gamma:
            oracle.agree(e, n, pieces.logit(rows[n], 0), floor=floor)
