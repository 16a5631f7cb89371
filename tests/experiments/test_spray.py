"""SpRAy's parts beside slow, independent computations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csgraph
from scipy.stats import kurtosis
from sklearn.metrics import adjusted_rand_score

from experiments import spray as s
from lrp.errors import InputError


def _blobs(sizes: tuple[int, ...], apart: float = 12.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(n, 5)) + apart * np.eye(5)[k] for k, n in enumerate(sizes)]
    return np.concatenate(rows), np.repeat(np.arange(len(sizes)), sizes)


def test_pooling_sums_squares_and_normalises() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 2, 6, 6))
    got = s.pooled(maps, 3)
    for n in range(3):
        cells = [
            maps[n, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum() for c in (0, 1) for i in range(3) for j in range(3)
        ]
        np.testing.assert_allclose(got[n], np.array(cells) / np.abs(cells).sum())
    np.testing.assert_allclose(s.pooled(maps[:, 0], 6), s.normalised(maps[:, 0].reshape(3, -1)))
    assert (s.normalised(np.zeros((2, 3))) == 0).all()
    with pytest.raises(InputError, match="multiples of 4"):
        s.pooled(maps, 4)


def test_graph_of_neighbours_is_brute_force() -> None:
    rows = np.random.default_rng(1).normal(size=(25, 4))
    got = s.neighbour_graph(rows, 4)
    expected = np.zeros((25, 25))
    for i in range(25):
        order = sorted((float(np.linalg.norm(rows[i] - rows[j])), j) for j in range(25) if j != i)
        for _, j in order[:4]:
            expected[i, j] = expected[j, i] = 1
    assert (got == expected).all()
    with pytest.raises(InputError, match="1 to 24 neighbours"):
        s.neighbour_graph(rows, 25)


def test_laplacian_is_scipys_and_counts_separate_groups() -> None:
    rows, _ = _blobs((20, 15, 12), apart=60)
    graph = s.neighbour_graph(rows, 5)
    np.testing.assert_allclose(s.laplacian(graph), csgraph.laplacian(graph, normed=True), atol=1e-12)
    values = np.linalg.eigvalsh(s.laplacian(graph))
    assert (np.abs(values[:3]) < 1e-10).all()
    assert values[3] > 0.01
    assert s.eigengap(values[:11]) == 3, "after the third zero, in ascending order"
    assert s.eigengap(values[::-1][-11:]) != 3, "the other order gives something else"
    alone = s.laplacian(np.zeros((2, 2)))
    assert (alone == 0).all(), "a row without neighbours is a group of its own"


@pytest.mark.parametrize("sizes", [(30, 30), (40, 10), (25, 20, 15)])
def test_groups_are_found(sizes: tuple[int, ...]) -> None:
    rows, truth = _blobs(sizes)
    found = s.spray(rows, 6, seed=0)
    assert found.suggested == len(sizes)
    assert found.gap == pytest.approx(found.values[len(sizes)] - found.values[len(sizes) - 1])
    assert s.agreement(found.labels, found.embedding, truth == 1)["ari"] == pytest.approx(
        1.0 if len(sizes) == 2 else adjusted_rand_score(truth == 1, truth)
    )
    order = np.random.default_rng(3).permutation(len(rows))
    again = s.spray(rows[order], 6, seed=0)
    np.testing.assert_allclose(again.values, found.values, atol=1e-8)
    assert again.tau == pytest.approx(found.tau, rel=1e-3)


def test_one_cloud_has_no_groups() -> None:
    suggested = [s.spray(np.random.default_rng(seed).normal(size=(60, 10)), 10).suggested for seed in range(5)]
    assert suggested == [1] * 5


def test_tau_is_the_largest_root_by_loops() -> None:
    rows, labels = _blobs((12, 9, 7), apart=1.5)
    mean = rows.mean(0)
    for shrinkage in (0.0, 0.3):
        between, within = np.zeros((5, 5)), np.zeros((5, 5))
        for c in range(3):
            part = rows[labels == c]
            share = len(part) / len(rows)
            between += share * np.outer(part.mean(0) - mean, part.mean(0) - mean)
            within += share * np.cov(part.T, bias=True)
        within = (1 - shrinkage) * within + shrinkage * np.trace(within) / 5 * np.eye(5)
        expected = np.linalg.eigvals(np.linalg.inv(within) @ between).real.max()
        assert s.fisher_tau(rows, labels, shrinkage) == pytest.approx(expected)


def test_shrinkage_keeps_tau_of_a_tiny_group_small() -> None:
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.normal(size=40), np.zeros((40, 3))])
    rows[:2] = (0, 1e-3, 0, 0)
    labels = (np.arange(40) < 2).astype(int)
    assert s.fisher_tau(rows, labels, 0.0) > 1e3
    assert s.fisher_tau(rows, labels, 0.1) < 1


def test_null_distributions_answer_two_questions() -> None:
    rows = np.random.default_rng(0).normal(size=(80, 20))
    rows[40:] += 1.5
    found = s.spray(rows, 8)
    assert s.p_value(found.tau, s.permuted_taus(found, 99)) == pytest.approx(0.01)
    assert s.p_value(found.tau, s.rotated_taus(rows, 19, 8)) == pytest.approx(0.05)
    cloud = np.random.default_rng(4).normal(size=(60, 5)) * (4, 1, 1, 1, 1)
    none = s.spray(cloud, 8)
    assert s.p_value(none.tau, s.permuted_taus(none, 99)) == pytest.approx(0.01), "k-means cut it out: no evidence"
    assert s.p_value(none.tau, s.rotated_taus(cloud, 19, 8)) > 0.05, "a long cloud is no two groups"


def test_rotated_rows_keep_mean_and_covariance_alone() -> None:
    rows, _ = _blobs((30, 30), apart=8)
    got = s.rotated(rows, np.random.default_rng(0))
    np.testing.assert_allclose(got.mean(0), rows.mean(0), atol=1e-9)
    np.testing.assert_allclose(np.cov(got.T), np.cov(rows.T), atol=1e-9)
    axis = np.array([1, -1, 0, 0, 0])
    assert kurtosis(rows @ axis) < -1.2, "two peaks"
    assert kurtosis(got @ axis) > -1.0
    few = s.rotated(rows[:4], np.random.default_rng(0))
    np.testing.assert_allclose(np.cov(few.T), np.cov(rows[:4].T), atol=1e-9)


def test_agreement_by_hand() -> None:
    points = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [20.0], [21.0]])
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    planted = np.array([0, 0, 1, 1, 1, 1, 0], bool)
    told = s.agreement(labels, points, planted)
    assert told["picked"] == [1, 2], "planted by half or more"
    assert told["precision"] == pytest.approx(3 / 4)
    assert told["recall"] == pytest.approx(3 / 4)
    means = [1.0, 10.5, 20.5]
    score = [(p - means[0]) ** 2 - min((p - means[1]) ** 2, (p - means[2]) ** 2) for p in points[:, 0]]
    inside = [v for v, t in zip(score, planted, strict=True) if t]
    outside = [v for v, t in zip(score, planted, strict=True) if not t]
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert told["auc"] == pytest.approx(np.mean(pairs))
    rare = s.agreement(labels, points, np.array([1, 0, 0, 0, 0, 0, 0], bool))
    assert (rare["picked"], rare["precision"], rare["recall"]) == ([0], pytest.approx(1 / 3), 1.0)
    every = s.agreement(labels, points, np.ones(7, bool))
    assert (every["picked"], every["auc"]) == ([0], None), "never all groups"
    assert s.agreement(labels, points, np.zeros(7, bool))["auc"] is None


def test_medoids_and_view() -> None:
    rows, labels = _blobs((10, 8))
    got = s.medoids(rows, labels, 2)
    for c in (0, 1):
        middle = rows[labels == c].mean(0)
        order = sorted((float(((rows[i] - middle) ** 2).sum()), i) for i in np.flatnonzero(labels == c))
        assert got[c] == [int(i) for _, i in order[:2]]
    view = s.tsne(rows)
    assert view.shape == (18, 2)
    assert np.isfinite(view).all()
