"""Kernel k-means against loops written out, against k-means, and against scikit-learn's rules for estimators."""

from __future__ import annotations

import itertools
import math
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs, make_circles, make_moons
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from lrp.errors import InputError, LRPError, NonFiniteError
from neuralize import _landmarks, _rkhs
from neuralize.kernel_kmeans import KernelKMeans
from neuralize.kernels import Anchors, ProductKernel

KERNELS = ["rbf", "laplacian", "chi2", "l4"]
ALGORITHMS = ["full", "landmarks", "minibatch"]


def cost(kernel: Any, gamma: Any, x: Any, u: Any) -> float:
    """-log k of one pair, one column after the other."""
    total = 0.0
    for t in range(len(x)):
        a, b, g = float(x[t]), float(u[t]), float(np.broadcast_to(gamma, len(x))[t])
        d = abs(a - b)
        if kernel == "chi2":
            total += g * (d * d / (a + b) if a + b else 0.0)
        else:
            total += g * {"rbf": d * d, "laplacian": d, "l4": d**4}[kernel]
    return total


def gram(kernel: Any, gamma: Any, X: Any, U: Any) -> np.ndarray:
    return np.array([[math.exp(-cost(kernel, gamma, x, u)) for u in U] for x in X])


def naive(K: np.ndarray, w: Any, labels: Any, k: int, steps: int) -> list[tuple[list[int], float, list[float]]]:
    """(labels, inertia, norms) of each of Lloyd's iterations, by loops over rows and members."""
    n, history, labels = len(K), [], list(labels)
    for _ in range(steps):
        norms, Z = [0.0] * k, [0.0] * k
        for c in range(k):
            members = [i for i in range(n) if labels[i] == c]
            Z[c] = sum(w[i] for i in members)
            norms[c] = sum(w[i] * w[j] * K[i, j] for i in members for j in members) / Z[c] ** 2
        new, inertia = [], 0.0
        for i in range(n):
            apart = [
                K[i, i] - 2 * sum(w[j] * K[i, j] for j in range(n) if labels[j] == c) / Z[c] + norms[c]
                for c in range(k)
            ]
            new.append(int(np.argmin(apart)))
            inertia += w[i] * max(min(apart), 0.0)
        labels = new
        history.append((labels, inertia, norms))
    return history


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    return make_blobs(60, 3, centers=4, cluster_std=2.0, random_state=3)[0]


def same_partition(a: Any, b: Any) -> bool:
    return adjusted_rand_score(a, b) == 1.0


# ---- kernels


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("gamma", [0.3, [0.1, 0.0, 1.5]])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gram_equals_the_double_loop(kernel: str, gamma: Any, offset: float) -> None:
    rng = np.random.default_rng(0)
    X, U = rng.random((7, 3)) * 2 + offset, rng.random((5, 3)) * 2 + offset
    X[0], U[1] = 0.0, 0.0
    k, expected = ProductKernel(kernel, gamma), gram(kernel, gamma, X, U)
    np.testing.assert_allclose(k.gram(X, U), expected, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(k.gram(torch.tensor(X), torch.tensor(U)).numpy(), expected, rtol=1e-9, atol=1e-300)
    terms = k.terms(X[:, None], U)
    assert terms.shape == (7, 5, 3)
    np.testing.assert_allclose(terms.sum(2), k.cost(X, U), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(k.terms(torch.tensor(X)[:, None], torch.tensor(U)).numpy(), terms)
    single = X.astype(np.float32)
    np.testing.assert_allclose(k.gram(single, single), gram(kernel, gamma, single, single), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(np.diag(k.gram(X, X)), 1.0, rtol=1e-9)


def test_float32_tensors() -> None:
    X = torch.rand(20, 4) + 100
    for kernel in KERNELS:
        k = ProductKernel(kernel, 0.5)
        mine = k.gram(X, X[:6])
        assert mine.dtype == torch.float32
        np.testing.assert_allclose(mine.numpy(), k.gram(X.numpy(), X[:6].numpy()), atol=2e-5)


def test_columns_of_any_cost() -> None:
    def root(x: Any, u: Any) -> Any:
        return abs(x - u) ** 0.5

    X = np.random.default_rng(0).normal(size=(9, 2))
    gamma = [0.5, 2.0]
    expected = np.exp(-(0.5 * abs(X[:, None, 0] - X[:, 0]) ** 0.5 + 2 * abs(X[:, None, 1] - X[:, 1]) ** 0.5))
    k = ProductKernel(root, gamma)
    np.testing.assert_allclose(k.gram(X, X), expected)
    np.testing.assert_allclose(k.gram(torch.tensor(X), torch.tensor(X)).numpy(), expected)
    assert k.name == "root"
    fitted = KernelKMeans(2, kernel=root, random_state=0).fit(X)
    np.testing.assert_array_equal(fitted.predict(X), fitted.labels_)


def test_one_sentinel_costs_no_digits() -> None:
    X = np.random.default_rng(0).normal(size=(12, 2))
    X[3] = 1e8
    k = ProductKernel("rbf", 0.5)
    assert Anchors(k, X).far
    assert not Anchors(k, X[4:]).far
    np.testing.assert_allclose(k.gram(X, X), gram("rbf", 0.5, X, X), rtol=1e-12)
    np.testing.assert_allclose(k.gram(torch.tensor(X), torch.tensor(X)).numpy(), gram("rbf", 0.5, X, X), rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_far_rows_are_dissimilar_to_all(kernel: str) -> None:
    U = np.random.default_rng(0).random((4, 2))
    for size in (1e3, 1e30, 1e200, 1.7e308):
        np.testing.assert_array_equal(ProductKernel(kernel, 100.0).gram(np.full((1, 2), size), U), 0.0)


def test_no_similarity_above_one() -> None:
    X = np.random.default_rng(0).normal(size=(300, 5)) * 7
    assert ProductKernel("rbf", 0.9).gram(X, X).max() == 1.0
    assert ProductKernel("rbf", 0.9).cost(X, X).min() == 0.0


def test_definiteness_is_as_documented() -> None:
    X = np.random.default_rng(0).random((40, 1)) * 3
    for kernel in KERNELS:
        smallest = np.linalg.eigvalsh(ProductKernel(kernel, 1.0).gram(X, X)).min()
        assert (smallest > -1e-12) == ProductKernel(kernel).positive_definite
    assert ProductKernel(lambda x, u: abs(x - u)).positive_definite is None


def test_blocks_are_the_matrix() -> None:
    X = np.random.default_rng(0).normal(size=(1000, 3))
    for kernel in ("rbf", "laplacian"):
        anchors = Anchors(ProductKernel(kernel, 0.4), X[:600])
        whole = anchors.gram(X)
        seen = 0
        for rows, k in anchors.blocks(X):
            np.testing.assert_allclose(k, whole[rows], rtol=1e-12)
            seen += len(k)
        assert seen == 1000
        assert anchors.rows() < 1000


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ProductKernel("cosine"), "rbf, laplacian, chi2, l4"),
        (lambda: ProductKernel("rbf", -1.0), "gamma"),
        (lambda: ProductKernel("rbf", [1.0, np.nan]), "gamma"),
        (lambda: ProductKernel("rbf", [[1.0]]), "gamma"),
        (lambda: ProductKernel("chi2").check(np.array([[-1.0]])), "chi2"),
    ],
)
def test_kernel_errors(make: Any, word: str) -> None:
    with pytest.raises(InputError, match=word) as info:
        make()
    assert info.value.expected
    assert info.value.got
    assert info.value.fix


# ---- the full algorithm


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_iteration_equals_the_loops(blobs: np.ndarray, kernel: str, weighted: bool) -> None:
    X = np.abs(blobs) if kernel == "chi2" else blobs
    rng = np.random.default_rng(1)
    w = rng.random(len(X)) + 0.1 if weighted else np.ones(len(X))
    start = rng.integers(0, 4, len(X))
    gamma = {"l4": 1e-3, "chi2": 0.3}.get(kernel, 0.05)
    history = naive(gram(kernel, gamma, X, X), w, start, 4, 12)
    settled = 0
    for step, (labels, inertia, norms) in enumerate(history, 1):
        m = KernelKMeans(4, kernel=kernel, gamma=gamma, init=start, max_iter=step, tol=0, algorithm="full")
        m.fit(X, sample_weight=w)
        np.testing.assert_array_equal(m.labels_, labels)
        np.testing.assert_allclose(m.inertia_, inertia, rtol=1e-10)
        np.testing.assert_allclose(m.centre_norms_, norms, rtol=1e-10)
        assert m.n_iter_ <= step
        if kernel != "l4" and step > 1:
            assert inertia <= history[step - 2][1] * (1 + 1e-12)
        settled += m.n_iter_ < step
    assert settled, "the reference has not converged either"
    assert sum(a[0] != b[0] for a, b in itertools.pairwise(history)) >= 2, "too easy a start"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_attributes_say_what_is_decided(blobs: np.ndarray, algorithm: str) -> None:
    w = np.random.default_rng(0).random(len(blobs)) + 0.1
    m = KernelKMeans(3, gamma=0.1, algorithm=algorithm, n_landmarks=15, random_state=0).fit(blobs, sample_weight=w)
    U, a = m.support_vectors_, m.dual_coef_
    assert a.shape == (3, len(U))
    K = gram("rbf", 0.1, U, U)
    np.testing.assert_allclose(np.einsum("kj,ij,ki->k", a, K, a), m.centre_norms_, rtol=1e-9)
    new = blobs + np.random.default_rng(1).normal(size=blobs.shape)
    for X in (blobs, new):
        squares = 1 - 2 * gram("rbf", 0.1, X, U) @ a.T + m.centre_norms_
        np.testing.assert_array_equal(m.predict(X), squares.argmin(1))
        np.testing.assert_allclose(m.transform(X) ** 2, squares, rtol=1e-9)
    np.testing.assert_array_equal(m.predict(blobs), m.labels_)
    np.testing.assert_allclose(m.inertia_, w @ (m.transform(blobs) ** 2).min(1))
    np.testing.assert_allclose(m.score(blobs, sample_weight=w), -m.inertia_)
    np.testing.assert_allclose(m.cluster_weights_, [w[m.labels_ == c].sum() for c in range(3)])
    assert m.algorithm_ == algorithm
    assert m.kernel_.gamma == m.gamma_ == 0.1
    if algorithm == "full":
        assert (np.diff(m.support_labels_) >= 0).all()
        np.testing.assert_allclose(np.bincount(m.support_labels_, m.alpha_), m.cluster_weights_)
        np.testing.assert_array_equal(m.predict(U), m.support_labels_)
        np.testing.assert_allclose(a.sum(1), 1.0)
        np.testing.assert_allclose(
            a[m.support_labels_, np.arange(len(U))], m.alpha_ / m.cluster_weights_[m.support_labels_]
        )
    else:
        assert len(U) == 15
        assert (a < 0).any()
        assert {tuple(u) for u in U} <= {tuple(x) for x in blobs}
        assert not hasattr(m, "alpha_")


def test_a_small_gamma_is_k_means(blobs: np.ndarray) -> None:
    start = np.random.default_rng(2).integers(0, 4, len(blobs))
    centres = np.array([blobs[start == c].mean(0) for c in range(4)])
    plain = KMeans(4, init=centres, n_init=1, tol=0, random_state=0).fit(blobs)
    for algorithm in ("full", "landmarks"):
        m = KernelKMeans(4, gamma=1e-7, init=start, tol=0, algorithm=algorithm).fit(blobs)
        np.testing.assert_array_equal(m.labels_, plain.labels_)
        # |Phi(x) - Phi(u)|^2 -> 2 gamma |x - u|^2
        np.testing.assert_allclose(m.inertia_ / 2e-7, plain.inertia_, rtol=1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rings(algorithm: str) -> None:
    X, y = make_circles(400, factor=0.3, noise=0.05, random_state=0)
    assert adjusted_rand_score(y, KMeans(2, n_init=10, random_state=0).fit(X).labels_) < 0.1
    assert same_partition(y, KernelKMeans(2, gamma=4.0, algorithm=algorithm, random_state=0).fit(X).labels_)


def test_moons() -> None:
    X, y = make_moons(400, noise=0.05, random_state=0)
    assert adjusted_rand_score(y, KMeans(2, n_init=10, random_state=0).fit(X).labels_) < 0.4
    assert adjusted_rand_score(y, KernelKMeans(2, gamma=8.0, n_init=20, random_state=0).fit(X).labels_) > 0.9


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_memory_changes_nothing(algorithm: str) -> None:
    X = np.random.default_rng(0).normal(size=(700, 4))
    w = np.random.default_rng(1).random(700)
    one, other = (clone(KernelKMeans(5, algorithm=algorithm, n_init=2, random_state=0)) for _ in range(2))
    one.fit(X, sample_weight=w)
    with config_context(working_memory=1):  # MiB: the kernel matrix takes 3.9, the features 1.6
        other.fit(X, sample_weight=w)
    np.testing.assert_array_equal(one.labels_, other.labels_)
    np.testing.assert_allclose(one.dual_coef_, other.dual_coef_, atol=1e-9)
    np.testing.assert_allclose(one.inertia_, other.inertia_)


def test_products_with_the_kernel_matrix() -> None:
    rng = np.random.default_rng(0)
    U, H, index = rng.normal(size=(700, 3)), rng.normal(size=(700, 4)), rng.permutation(700)[:600]
    kernel = ProductKernel("rbf", 0.2)
    K = kernel.gram(U, U)
    for memory in (0.0, 1e9):
        matrix = _rkhs.Gram(kernel, U, memory)
        assert (matrix.held is None) == (memory == 0)
        np.testing.assert_allclose(matrix.product(H), K @ H, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(matrix.product(H[index], index), K[:, index] @ H[index], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(matrix.columns(index[:5]), K[:, index[:5]], rtol=1e-9)


# ---- weights, repetitions, order


@pytest.mark.parametrize("init", ["k-means++", "random", "labels"])
@pytest.mark.parametrize("algorithm", ["full", "landmarks"])
def test_weights_are_repetitions(algorithm: str, init: str) -> None:
    rng = np.random.default_rng(0)
    X = np.round(rng.normal(size=(80, 2)), 1)
    w = rng.integers(0, 4, 80)
    start = rng.integers(0, 3, 80)
    order = rng.permutation(w.sum())
    again = X.repeat(w, 0)[order]
    m = KernelKMeans(3, algorithm=algorithm, n_landmarks=20, random_state=0)
    a, b = clone(m), clone(m)
    a.set_params(init=start if init == "labels" else init).fit(X, sample_weight=w)
    b.set_params(init=start.repeat(w)[order] if init == "labels" else init).fit(again)
    np.testing.assert_allclose(a.gamma_, b.gamma_)
    np.testing.assert_array_equal(a.predict(X), b.predict(X))
    np.testing.assert_array_equal(a.labels_.repeat(w)[order], b.labels_)
    np.testing.assert_allclose(a.inertia_, b.inertia_)
    np.testing.assert_allclose(a.centre_norms_, b.centre_norms_)
    np.testing.assert_allclose(a.support_vectors_, b.support_vectors_)
    np.testing.assert_allclose(a.dual_coef_, b.dual_coef_, atol=1e-9)
    tripled = clone(a).fit(X, sample_weight=3 * w)
    np.testing.assert_array_equal(tripled.labels_, a.labels_)
    np.testing.assert_allclose(tripled.inertia_, 3 * a.inertia_)
    plain = clone(a).fit(X)
    assert abs(plain.inertia_ - a.inertia_) > 1e-3, "weights have no effect"


def test_weights_move_the_border() -> None:
    at = np.repeat([0.0, 1.0, 1.9], 500)
    X = (at + np.random.default_rng(0).normal(size=1500) * 0.05)[:, None]
    for algorithm in ALGORITHMS:
        m = KernelKMeans(2, gamma=1.0, algorithm=algorithm, random_state=0)
        assert same_partition(m.fit(X).labels_, at == 0.0)
        # a heavy group is not worth joining
        assert same_partition(m.fit(X, sample_weight=np.where(at == 1.9, 50.0, 1.0)).labels_, at == 1.9)


# ---- landmarks and mini-batches


@pytest.mark.parametrize("init", ["k-means++", "labels"])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "chi2"])
def test_all_rows_as_landmarks_are_exact(blobs: np.ndarray, kernel: str, init: str) -> None:
    X = np.concatenate([np.abs(blobs), np.abs(blobs[:9])])
    w = np.random.default_rng(0).random(len(X))
    start = np.random.default_rng(1).integers(0, 4, len(X)) if init == "labels" else init
    for gamma in ("scale", 1e-3):
        m = KernelKMeans(4, kernel=kernel, gamma=gamma, init=start, tol=0, random_state=0)
        full = clone(m).set_params(algorithm="full").fit(X, sample_weight=w)
        span = clone(m).set_params(algorithm="landmarks").fit(X, sample_weight=w)
        np.testing.assert_array_equal(full.labels_, span.labels_)
        np.testing.assert_allclose(span.inertia_, full.inertia_, rtol=1e-8)
        np.testing.assert_allclose(span.centre_norms_, full.centre_norms_, rtol=1e-8)
        new = X + np.random.default_rng(2).random(X.shape)
        np.testing.assert_allclose(span.transform(new), full.transform(new), atol=1e-8)
        assert len(span.support_vectors_) == len(blobs) == len(full.support_vectors_)


def test_passes_never_increase_the_inertia() -> None:
    X = np.random.default_rng(0).normal(size=(600, 5))
    start = np.random.default_rng(1).integers(0, 6, 600)
    for algorithm in ("full", "landmarks"):
        inertia = [
            KernelKMeans(6, init=start, max_iter=t, tol=0, algorithm=algorithm, n_landmarks=40, random_state=0)
            .fit(X)
            .inertia_
            for t in range(1, 25)
        ]
        assert (np.diff(inertia) <= 1e-9).all()
        assert inertia[-1] < inertia[0]


def test_more_landmarks_come_closer() -> None:
    X = StandardScaler().fit_transform(make_blobs(1500, 6, centers=5, cluster_std=4.0, random_state=0)[0])
    m = KernelKMeans(5, random_state=0)
    full = m.fit(X).inertia_
    few, many = (clone(m).set_params(algorithm="landmarks", n_landmarks=count).fit(X).inertia_ for count in (10, 300))
    assert full <= many * 1.002 < few
    batches = clone(m).set_params(algorithm="minibatch", batch_size=100).fit(X)
    assert batches.inertia_ < 1.01 * many
    assert batches.n_iter_ < 20


def test_samples_stand_for_all_rows() -> None:
    rng = np.random.RandomState(0)
    w = np.random.default_rng(0).random(50_000)
    w[:100], w[7] = 0.0, 400.0
    rows, weights = _landmarks.sampled(w, 1000, rng)
    np.testing.assert_allclose(weights.sum(), w.sum())
    assert rows.min() >= 7
    assert (np.diff(rows) > 0).all()
    np.testing.assert_allclose(weights[rows == 7], 400.0, rtol=0.1)
    X = np.random.default_rng(1).normal(size=(12_000, 2)) + 4 * np.random.default_rng(2).integers(0, 2, (12_000, 1))
    m = KernelKMeans(2, n_landmarks=50, random_state=0).fit(X)
    assert m.algorithm_ == "landmarks"
    np.testing.assert_array_equal(m.predict(X), m.labels_)
    assert same_partition(m.labels_[::100], X[::100].sum(1) > 4) or adjusted_rand_score(m.labels_, X.sum(1) > 4) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["landmarks", "minibatch"])
def test_memory_does_not_grow_with_features(algorithm: str) -> None:
    X = make_blobs(100_000, 20, centers=8, cluster_std=3.0, random_state=0)[0]
    m = KernelKMeans(8, algorithm=algorithm, n_landmarks=300, n_init=2, random_state=0)
    with config_context(working_memory=32):
        tracemalloc.start()
        try:
            m.fit(X)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            m.predict(X)
            predicting = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # features of all rows would take 229 MiB, the table has 15
    assert peak < 32 * 2**20 + 2 * X.nbytes, peak / 2**20
    assert predicting < X.nbytes, predicting / 2**20
    np.testing.assert_array_equal(m.predict(X), m.labels_)


# ---- degenerate tables


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_cluster(blobs: np.ndarray, algorithm: str) -> None:
    m = KernelKMeans(1, algorithm=algorithm, gamma=0.1).fit(blobs)
    K = gram("rbf", 0.1, blobs, blobs)
    assert (m.labels_ == 0).all()
    if algorithm != "minibatch":
        np.testing.assert_allclose(m.centre_norms_, K.mean(), rtol=1e-9)
        np.testing.assert_allclose(m.inertia_, len(K) * (1 - K.mean()), rtol=1e-9)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty_clusters_get_far_rows(blobs: np.ndarray, algorithm: str) -> None:
    start = np.zeros(len(blobs), dtype=int)
    start[:5] = 1
    two = KernelKMeans(2, init=start, algorithm=algorithm, random_state=0).fit(blobs)
    five = KernelKMeans(5, init=start, algorithm=algorithm, batch_size=20, random_state=0).fit(blobs)
    assert len(five.centre_norms_) == 5
    if algorithm != "minibatch":
        assert (five.cluster_weights_ > 0).all()
        assert five.inertia_ < two.inertia_


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_copies_of_outliers_beyond_the_span(algorithm: str) -> None:
    # projections on four landmarks coincide: more clusters than places, which must end and leave none empty
    rng = np.random.default_rng(0)
    far = rng.normal(size=(3, 2)) * 30
    X = np.vstack([rng.normal(size=(60, 2)) * 0.3, far.repeat(20, 0), rng.normal(size=(6, 2)) * 60])
    start = np.zeros(len(X), dtype=int)
    for k, init in itertools.product((6, 10), (start, "k-means++")):
        m = KernelKMeans(k, gamma=1.0, algorithm=algorithm, n_landmarks=4, init=init, n_init=1, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            m.fit(X)
        assert m.n_iter_ < 50 or algorithm == "minibatch"  # running means settle slowly
        assert (m.cluster_weights_ > 0).all()
        assert len(m.cluster_weights_) == (k if algorithm == "full" else len(m.centre_norms_))
        np.testing.assert_array_equal(m.predict(X), m.labels_)
        np.testing.assert_allclose(m.dual_coef_.shape, (len(m.centre_norms_), len(m.support_vectors_)))


@pytest.mark.parametrize("algorithm", ["full", "landmarks"])
def test_a_centre_without_rows(algorithm: str) -> None:
    rng = np.random.default_rng(40)
    X, start = rng.normal(size=(12, 2)), rng.integers(0, 4, 12)
    K = gram("rbf", 0.3, X, X)
    labels, inertia, norms = naive(K, np.ones(12), start, 4, 1)[0]
    found = sorted(set(labels))
    assert len(set(start)) == 4
    assert found == [0, 1, 3], "no cluster loses all its rows"
    m = KernelKMeans(4, gamma=0.3, init=start, max_iter=1, algorithm=algorithm)
    with pytest.warns(ConvergenceWarning, match="3 clusters found"):
        m.fit(X)
    np.testing.assert_array_equal(m.labels_, [found.index(c) for c in labels])
    np.testing.assert_allclose(m.centre_norms_, [norms[c] for c in found])
    np.testing.assert_allclose(m.inertia_, inertia)
    if algorithm == "full":
        assert sorted(map(tuple, m.support_vectors_)) == sorted(
            tuple(x) for x, c in zip(X, start, strict=True) if c in found
        )
        np.testing.assert_allclose(np.bincount(m.support_labels_), [(start == c).sum() for c in found])
    for steps in range(2, 8):  # the furthest row goes to the empty cluster, out of its own
        m.set_params(max_iter=steps).fit(X)
        other = clone(m).set_params(algorithm="full").fit(X)
        np.testing.assert_allclose(m.centre_norms_, other.centre_norms_, rtol=1e-9)
        np.testing.assert_allclose(m.inertia_, other.inertia_, rtol=1e-9)
        np.testing.assert_array_equal(m.predict(X), m.labels_)
        assert len(m.centre_norms_) == 4
        assert m.inertia_ < inertia


def _from_one_cluster(X: np.ndarray, landmarks: np.ndarray, k: int, gamma: float) -> np.ndarray:
    """Labels after Lloyd's iterations in the span of given landmarks, from a single cluster."""
    space = _landmarks.Subspace(ProductKernel("rbf", gamma), landmarks)
    features = _landmarks.Features(space.anchors, X, 0.0)
    w = np.ones(len(X))
    with _rkhs.progress(0) as bar:
        run = _landmarks.lloyd(features, space, w, *features.sums(np.zeros(len(X), int), w, k), 20, 0.0, bar)
    return np.concatenate([_landmarks.nearest(kappa, run.B, run.norms)[0] for _, kappa in features])


def test_furthest_means_within_the_span() -> None:
    X = np.array([[0.0], [0.1], [3.0], [3.1], [100.0]])
    # nothing can be gained for the last row: all centres are equally far from it, up to their norms
    assert same_partition(_from_one_cluster(X, X[:4], 2, 1.0)[:4], [0, 0, 1, 1])


def test_empty_clusters_do_not_share_a_place() -> None:
    at = np.repeat([0.0, 5.0, 11.0, 18.0], [40, 20, 20, 20])
    X = (at + np.random.default_rng(0).normal(size=100) * 0.01)[:, None]
    assert same_partition(_from_one_cluster(X, X[::5], 4, 0.5), at)


def test_heavy_rows_are_drawn() -> None:
    w = np.full(200, 1e-6)
    w[[3, 50, 199]] = 1.0
    for seed in range(5):
        assert set(_rkhs.random_seeds(w, 3, np.random.RandomState(seed))) == {3, 50, 199}


def test_refilling_never_empties_another_cluster() -> None:
    labels, far = np.array([0, 0, 0, 1, 3]), np.array([0.1, 0.3, 0.2, 9.0, 0.0])
    np.testing.assert_array_equal(_rkhs.refilled(labels, far, 5), [0, 2, 4, 1, 3])
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 3])
    np.testing.assert_array_equal(_rkhs.refilled(labels, np.zeros(5), 5), labels)
    whole = np.array([0, 1])
    assert _rkhs.refilled(whole, far[:2], 2) is whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fewer_distinct_rows_than_clusters(algorithm: str) -> None:
    X = np.repeat([[0.0, 1.0], [2.0, 3.0], [5.0, 1.0]], 4, axis=0)
    with pytest.warns(ConvergenceWarning, match="3 clusters found, n_clusters=5"):
        m = KernelKMeans(5, algorithm=algorithm, random_state=0).fit(X)
    assert m.dual_coef_.shape == (3, 3)
    assert sorted(np.bincount(m.labels_)) == [4, 4, 4]
    np.testing.assert_allclose(m.inertia_, 0.0, atol=1e-12)
    np.testing.assert_array_equal(m.predict(X), m.labels_)
    assert list(m.get_feature_names_out()) == ["kernelkmeans0", "kernelkmeans1", "kernelkmeans2"]
    with pytest.warns(ConvergenceWarning, match="1 clusters found"):
        assert (KernelKMeans(2, algorithm=algorithm).fit(np.ones((6, 2))).labels_ == 0).all()


def test_equal_rows_that_start_apart() -> None:
    X = np.repeat([[0.0], [1.0], [5.0], [6.0]], 3, axis=0)
    start = np.arange(12) % 2
    m = KernelKMeans(2, gamma=0.1, init=start, max_iter=1, algorithm="full")
    _, inertia, norms = naive(gram("rbf", 0.1, X, X), np.ones(12), start, 2, 1)[0]
    m.fit(X)
    np.testing.assert_allclose(m.inertia_, inertia)
    np.testing.assert_allclose(m.centre_norms_, norms)
    assert len(m.support_vectors_) == 8  # each row has a share in both centres
    np.testing.assert_array_equal(np.bincount(m.support_labels_, m.alpha_), [6, 6])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sentinel_and_an_offset(algorithm: str) -> None:
    X, y = make_blobs(200, 3, centers=3, cluster_std=0.5, random_state=0)
    m = KernelKMeans(3, gamma=0.05, algorithm=algorithm, random_state=0)
    assert same_partition(m.fit(X).labels_, y)
    assert same_partition(m.fit(X + 1e6).labels_, y)
    far = np.vstack([X, [[1e9, -1e9, 1e9]]])
    m.set_params(n_clusters=4).fit(far)
    assert same_partition(m.labels_, [*y, 3])
    assert m.predict([[-1e12, 1e300, 0.0]]).shape == (1,)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_small_table(data: Any) -> None:
    n, d = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    X = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n * d, max_size=n * d)), dtype=float).reshape(n, d)
    w = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), dtype=float)
    k = data.draw(st.integers(1, 4))
    kernel, algorithm = data.draw(st.sampled_from(KERNELS)), data.draw(st.sampled_from(ALGORITHMS))
    m = KernelKMeans(k, kernel=kernel, algorithm=algorithm, n_init=1, n_landmarks=4, max_iter=20, random_state=0)
    if (w > 0).sum() < k:
        with pytest.raises(ValueError, match=r"n_samples|zero"):
            m.fit(X, sample_weight=w)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        m.fit(X, sample_weight=w)
    np.testing.assert_array_equal(m.predict(X), m.labels_)
    assert 1 <= len(m.centre_norms_) <= k
    assert (m.cluster_weights_ > 0).all()
    assert np.isfinite(m.dual_coef_).all()
    assert np.isfinite(m.centre_norms_).all()
    np.testing.assert_allclose(m.cluster_weights_.sum(), w.sum())
    np.testing.assert_allclose(m.inertia_, w @ (m.transform(X) ** 2).min(1), atol=1e-9)


# ---- an estimator like scikit-learn's


@pytest.mark.parametrize("kernel", ["rbf", "chi2"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scikit_learns_own_checks(algorithm: str, kernel: str) -> None:
    expected = {}
    if kernel == "chi2":
        expected["check_clustering"] = "the check's table is standardised; this kernel takes no negative values"
    m = KernelKMeans(2, n_init=2, max_iter=5, batch_size=10, algorithm=algorithm, kernel=kernel)
    results = check_estimator(m, expected_failed_checks=expected, on_skip=None)
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == set(expected)
    passed = {r["check_name"] for r in results if r["status"] == "passed"}
    # KMeans itself does not pass this one
    assert "check_sample_weight_equivalence_on_dense_data" in passed
    assert len(passed) > 40


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_seed_same_fit_and_float32(blobs: np.ndarray, algorithm: str) -> None:
    single = blobs.astype(np.float32)
    m = KernelKMeans(4, algorithm=algorithm, n_landmarks=30, random_state=3)
    a, b, c = clone(m).fit(single), clone(m).fit(single), clone(m).fit(single.astype(np.float64))
    np.testing.assert_array_equal(a.labels_, b.labels_)
    np.testing.assert_array_equal(a.dual_coef_, b.dual_coef_)
    np.testing.assert_array_equal(a.labels_, c.labels_)
    np.testing.assert_allclose(a.dual_coef_, c.dual_coef_, atol=1e-9)
    assert a.labels_.dtype == a.predict(single).dtype == np.int32
    assert a.support_vectors_.dtype == a.transform(single).dtype == np.float32
    assert a.dual_coef_.dtype == a.centre_norms_.dtype == np.float64
    assert c.transform(blobs).dtype == np.float64


def test_order_of_rows_does_not_matter(blobs: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(len(blobs))
    for init in ("k-means++", "random"):
        m = KernelKMeans(4, init=init, n_init=1, random_state=0)
        np.testing.assert_array_equal(clone(m).fit(blobs).labels_[order], clone(m).fit(blobs[order]).labels_)


def test_gamma(blobs: np.ndarray) -> None:
    w = np.random.default_rng(0).random(len(blobs))
    centred = blobs - blobs.mean(0)
    np.testing.assert_allclose(
        KernelKMeans(2).fit(centred).gamma_, 1 / (centred.shape[1] * centred.var())
    )  # as of sklearn.svm
    scale = KernelKMeans(2).fit(blobs, sample_weight=w).gamma_
    np.testing.assert_allclose(scale, 1 / np.cov(blobs.T, aweights=w, ddof=0).trace())
    np.testing.assert_allclose(KernelKMeans(2).fit(blobs + 1e5, sample_weight=w).gamma_, scale)
    assert KernelKMeans(2, gamma="auto").fit(blobs).gamma_ == 1 / 3
    positive = np.abs(blobs)
    for kernel in KERNELS:
        g = KernelKMeans(2, kernel=kernel).fit(positive).gamma_
        mean = np.mean([cost(kernel, 1.0, x, positive.mean(0)) for x in positive])
        np.testing.assert_allclose(g, 1 / mean)
    each = KernelKMeans(2, gamma=[0.1, 0.0, 0.4], random_state=0).fit(blobs)
    np.testing.assert_array_equal(each.gamma_, [0.1, 0.0, 0.4])
    moved = blobs + np.array([0, 100, 0])
    np.testing.assert_array_equal(each.predict(moved), each.labels_)
    scaled = blobs * np.sqrt([0.1, 0.0, 0.4])
    np.testing.assert_array_equal(KernelKMeans(2, gamma=1.0, random_state=0).fit(scaled).labels_, each.labels_)


def test_in_a_pipeline_with_frames(wine: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    m = KernelKMeans(3, random_state=0, verbose=1)
    pipe = make_pipeline(StandardScaler(), m).set_output(transform="pandas").fit(wine)
    written = capsys.readouterr()
    assert "run 10, iteration 1, inertia" in written.out
    assert "passes" not in written.err  # no bar off a terminal
    frame = pipe.transform(wine)
    assert list(frame.columns) == ["kernelkmeans0", "kernelkmeans1", "kernelkmeans2"]
    np.testing.assert_array_equal(frame.to_numpy().argmin(1), pipe.predict(wine))
    np.testing.assert_array_equal(m.fit(wine).feature_names_in_, wine.columns)
    with pytest.raises(ValueError, match="feature names"):
        m.predict(wine[wine.columns[::-1]])


def test_another_fit_forgets_the_first(blobs: np.ndarray) -> None:
    m = KernelKMeans(2, algorithm="full", random_state=0).fit(blobs)
    assert hasattr(m, "support_labels_")
    m.set_params(algorithm="landmarks").fit(blobs)
    assert not hasattr(m, "support_labels_")
    assert not hasattr(m, "alpha_")


WRONG: dict[str, tuple[dict[str, Any], Any, Any, str]] = {
    "too few rows": ({"n_clusters": 8}, None, None, "n_samples=7"),
    "too few rows with weight": ({"n_clusters": 3}, None, [1, 1, 0, 0, 0, 0, 0], "n_samples=2"),
    "labels of another table": ({"init": [0, 1]}, None, None, r"shape \(2,\)"),
    "labels beyond the clusters": ({"init": [0, 1, 2, 0, 1, 2, 0]}, None, None, "values from 0 to 2"),
    "labels below zero": ({"init": [0, 1, -1, 0, 1, 0, 0]}, None, None, "values from -1 to 1"),
    "half a label": ({"init": [0, 1, 0.5, 0, 1, 0, 0]}, None, None, "0.5|float64"),
    "centres for labels": ({"init": np.zeros((2, 2))}, None, None, r"shape \(2, 2\)"),
    "one gamma too many": ({"gamma": [1.0, 1.0, 1.0]}, None, None, "2 of which"),
    "gammas of zero": ({"gamma": [0.0, 0.0]}, None, None, "of zeros"),
    "a gamma below zero": ({"gamma": [1.0, -1.0]}, None, None, "inverse scale"),
    "negative counts": ({"kernel": "chi2"}, [[-1.0, 2.0]] * 7, None, "chi2"),
    "overflow": ({}, [[1e200, i * 1e200] for i in range(7)], None, "overflow"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    options, X, w, word = WRONG[name]
    table = np.arange(14.0).reshape(7, 2) if X is None else np.array(X)
    with pytest.raises(LRPError, match=word) as info:
        KernelKMeans(**({"n_clusters": 2} | options)).fit(table, sample_weight=w)
    assert isinstance(info.value, NonFiniteError if name == "overflow" else InputError)
    assert info.value.expected
    assert info.value.got
    assert info.value.fix


def test_other_errors() -> None:
    X = np.arange(14.0).reshape(7, 2)
    with pytest.raises(NotFittedError):
        KernelKMeans().predict(X)
    with pytest.raises(ValueError, match="kernel"):
        KernelKMeans(2, kernel="poly").fit(X)
    with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
        KernelKMeans(2).fit(X, sample_weight=-np.ones(7))
    with pytest.raises(InputError, match="chi2"):
        KernelKMeans(2, kernel="chi2", random_state=0).fit(X).predict(-X)
