"""Clusterings and classifiers by prototypes against every pair written out: trees, subclusters, centroids, traps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from oracles import prototypes as oracle
from oracles.kernels import agree, conserves
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import DBSCAN, AffinityPropagation, Birch, BisectingKMeans, MeanShift, MiniBatchKMeans
from sklearn.datasets import load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from lrp.errors import ConvergenceError, RuleError, TargetError, UnsupportedEstimatorError
from neuralize import CentroidHead, NeuralizedModel, neuralize
from neuralize.additive import AdditiveHead
from neuralize.pools import HardPool, PathPool
from neuralize.units import ProductDistances, SquaredDistances

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
RULES = [("auto", 0.05), ("auto", 3.0), ("auto", math.inf), ("undivided", 0.2), ("midpoint", math.inf)]


@functools.cache
def wine() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_wine(return_X_y=True)
    return StandardScaler().fit_transform(X)[:, :6], y


def rows(seed: int = 0) -> np.ndarray:
    """Rows of the table, rows between them, and rows far away."""
    X, _ = wine()
    rng = np.random.default_rng(seed)
    return np.vstack([X[::17], 3 * rng.normal(size=(6, 6)), 1e4 * rng.normal(size=(3, 6))])


def asked(net: NeuralizedModel, own: np.ndarray, i: int, target: Any, rule: str) -> tuple[int, bool]:
    """The class explained for a row, and whether by the divided rule."""
    labels = net.labels.tolist()
    c = labels.index(own[i]) if target is None else labels.index(target)
    return c, rule == "auto" and labels[c] == own[i]


# ---------------------------------------------------------------------- bisecting k-means


@functools.cache
def bisecting(shift: float = 0.0, k: int = 6, strategy: str = "biggest_inertia") -> BisectingKMeans:
    return BisectingKMeans(k, random_state=0, bisecting_strategy=strategy).fit(wine()[0] + shift)


@pytest.mark.parametrize("strategy", ["biggest_inertia", "largest_cluster"])
@pytest.mark.parametrize(("rule", "beta"), RULES)
@pytest.mark.parametrize("target", [None, 0, 4])
def test_bisecting_is_a_path_of_duels(strategy: str, rule: str, beta: float, target: int | None) -> None:
    fitted = bisecting(7.0, 6, strategy)
    net, X, ways = neuralize(fitted), rows() + 7, oracle.paths(fitted)
    e, own = net.explain(X, target=target, rule=rule, beta=beta), fitted.predict(X)
    for i, x in enumerate(X):
        c, divided = asked(net, own, i, target, rule)
        agree(e, i, oracle.hard([oracle.squared(x, s.node, s.sibling) for s in ways[c]], beta, divided))


def test_bisecting_decides_as_the_tree() -> None:
    fitted = bisecting(7.0)
    X = np.vstack([wine()[0] + 7, rows(1) + 7, rows(2)])
    net = neuralize(fitted)
    truth = [oracle.descend(x, fitted) for x in X]
    np.testing.assert_array_equal(fitted.predict(X), truth)
    np.testing.assert_array_equal(net.predict(X), truth)
    logits = net(X).numpy()
    ways = oracle.paths(fitted)
    for x, f in zip(X, logits, strict=True):
        expected = [min(oracle.squared(x, s.node, s.sibling).h for s in ways[c]) for c in range(6)]
        np.testing.assert_allclose(f, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    assert ((logits > 0).sum(1) == 1).all()


def test_bisecting_is_no_flat_minimum() -> None:
    """The nearest leaf is another clustering, and so is the tree without the mean of the data."""
    fitted = bisecting(7.0)
    X = wine()[0] + 7 + 1.5 * np.random.default_rng(3).normal(size=(178, 6))
    truth = fitted.predict(X)
    flat = ((X[:, None] - fitted.cluster_centers_) ** 2).sum(2).argmin(1)
    assert (flat == truth).mean() < 0.97
    net = neuralize(fitted)
    np.testing.assert_array_equal(net.predict(X), truth)
    # leaf centres with the mean are those that scikit-learn shows
    leaves = {
        int(n): p.numpy() for n, p in zip(net.head.names, net.head.units.points + net.head.units.centre, strict=True)
    }
    for label in range(6):
        np.testing.assert_allclose(leaves[label], fitted.cluster_centers_[label])
    forgot = NeuralizedModel(
        AdditiveHead(
            SquaredDistances((net.head.units.points + net.head.units.centre).numpy() - fitted._X_mean), net.head.pool
        )
    )
    assert (forgot.predict(X) == truth).mean() < 0.5
    assert abs(fitted._X_mean.mean() - 7) < 0.5


def test_bisecting_of_sparse_rows_has_no_mean() -> None:
    X = wine()[0] + 7
    fitted = BisectingKMeans(5, random_state=0).fit(scipy.sparse.csr_matrix(X))
    assert not hasattr(fitted, "_X_mean")
    net, ways = neuralize(fitted), oracle.paths(fitted)
    np.testing.assert_array_equal(net.predict(X), fitted.predict(scipy.sparse.csr_matrix(X)))
    few = scipy.sparse.csr_matrix(X[:9])
    e = net.explain(few, target=2, beta=0.3, top=None)
    for i in range(9):
        pairs = [oracle.squared(X[i], s.node, s.sibling) for s in ways[2]]
        agree(e, i, oracle.hard(pairs, 0.3, fitted.predict(few)[i] == 2))


def test_bisecting_contrast_is_the_duel_where_paths_part() -> None:
    fitted = bisecting(7.0)
    net, X, ways = neuralize(fitted), rows() + 7, oracle.paths(fitted)
    for c in range(6):
        for k in range(6):
            if c == k:
                continue
            e = net.explain(X, target=c, contrast=k)
            step = oracle.parting(ways[c], k)
            assert step.node is not None
            for i, x in enumerate(X):
                agree(e, i, oracle.duel(oracle.squared(x, step.node, step.sibling)))
            other = net.explain(X, target=k, contrast=c)
            np.testing.assert_allclose(e.values, -other.values, rtol=1e-9, atol=1e-9 * np.abs(e.values).max())
            assert not e.residual.any()
            assert (e.competitors == np.eye(6)[k]).all()


def test_bisecting_competitors_are_leaves_beside_the_path() -> None:
    """A sibling stands for the leaf beneath it that is nearest to winning."""
    fitted = bisecting()
    net, X, ways = neuralize(fitted), rows(), oracle.paths(fitted)
    logits = net(X).numpy()
    e = net.explain(X, beta=0.1)
    for i, x in enumerate(X):
        way = ways[int(e.target[i])]
        p = oracle.shares([oracle.squared(x, s.node, s.sibling).h for s in way], 0.1)
        expected = np.zeros(6)
        for step, share in zip(way, p, strict=True):
            expected[max(step.beside, key=lambda leaf: logits[i, leaf])] += share
        np.testing.assert_allclose(e.competitors[i], expected, atol=1e-9)
    # one leaf per sibling: the path is as long as there are competitors
    assert ((e.competitors > 0).sum(1) <= [len(ways[int(t)]) for t in e.target]).all()


def test_bisecting_break_even_and_prototypes() -> None:
    fitted = bisecting(7.0)
    net, X = neuralize(fitted), rows() + 7
    e = net.explain(X, beta=math.inf)
    ways = oracle.paths(fitted)
    for i, x in enumerate(X):
        pairs = [(oracle.squared(x, s.node, s.sibling).h, s) for s in ways[int(e.target[i])]]
        _, step = min(pairs, key=lambda pair: pair[0])
        np.testing.assert_allclose(e.break_even[i], (step.node + step.sibling) / 2, rtol=1e-7)
        np.testing.assert_allclose(e.slope[i], 2 * (step.node - step.sibling), rtol=1e-5, atol=1e-7)
    shown = e.prototypes(0)
    assert shown["speaks"].tolist() == ["for", "against"]
    np.testing.assert_allclose(shown["share"], 0.5)


def test_bisecting_stiffness_from_the_leaves() -> None:
    fitted = bisecting(7.0)
    ways, sizes = oracle.paths(fitted), np.bincount(fitted.labels_)
    own = [min(oracle.squared(c, s.node, s.sibling).h for s in ways[k]) for k, c in enumerate(fitted.cluster_centers_)]
    beta = neuralize(fitted).explain(rows() + 7).beta
    assert beta == pytest.approx(1 / np.average(np.maximum(own, 0), weights=sizes))
    X = wine()[0] + 7
    referred = neuralize(fitted, reference=X)
    assert referred.explain(X[:1]).beta == pytest.approx(1 / float(referred(X).max(1).values.mean()))


def test_one_leaf_is_an_error() -> None:
    with pytest.raises(ConvergenceError, match="K = 1"):
        neuralize(BisectingKMeans(1).fit(wine()[0]))


def test_a_long_path() -> None:
    """One leaf per row, and a tree that splits off one leaf at a time."""
    X = np.exp(np.arange(40.0))[:, None] * np.ones((1, 2))
    fitted = BisectingKMeans(40, random_state=0).fit(X)
    net = neuralize(fitted)
    assert len(oracle.paths(fitted)) == 40
    assert net.head.pool.node.shape[1] > 20
    np.testing.assert_array_equal(net.predict(X), fitted.predict(X))
    e = net.explain(X)
    conserves(e)
    assert (e.output > 0).all()


# ---------------------------------------------------------------------- Birch


class Gaps(ClusterMixin, BaseEstimator):
    """A global clusterer whose labels have gaps."""

    def fit_predict(self, X: np.ndarray, y: Any = None) -> np.ndarray:
        return np.array([11, 3, 7])[np.digitize(X[:, 0], [-0.4, 0.6])]


BIRCH: dict[str, Callable[[], Birch]] = {
    "four": lambda: Birch(n_clusters=4, threshold=0.9),
    "subclusters": lambda: Birch(n_clusters=None, threshold=1.8),
    "labels with gaps": lambda: Birch(n_clusters=Gaps(), threshold=0.9),
    "noise is a cluster": lambda: Birch(n_clusters=DBSCAN(eps=1.3, min_samples=3), threshold=0.7),
}


@functools.cache
def birch(name: str) -> Birch:
    return BIRCH[name]().fit(wine()[0])


def birch_pair(fitted: Birch, x: np.ndarray, c: int, k: int) -> oracle.Pair:
    """The active pair: the nearest subcluster of each label."""
    d = [((x - u) ** 2).sum() for u in fitted.subcluster_centers_]
    own, other = (
        min((j for j in range(len(d)) if fitted.subcluster_labels_[j] == label), key=lambda j: d[j]) for label in (c, k)
    )
    return oracle.squared(x, fitted.subcluster_centers_[own], fitted.subcluster_centers_[other])


@pytest.mark.parametrize("name", BIRCH)
@pytest.mark.parametrize(("rule", "beta"), RULES)
def test_birch_is_a_minimum_of_maxima(name: str, rule: str, beta: float) -> None:
    fitted = birch(name)
    net, X = neuralize(fitted), rows()
    labels = sorted(set(fitted.subcluster_labels_.tolist()))
    assert net.labels.tolist() == labels
    own = fitted.predict(X)
    np.testing.assert_array_equal(net.predict(X), own)
    for target in (None, labels[0], labels[-1]):
        e = net.explain(X, target=target, rule=rule, beta=beta)
        for i, x in enumerate(X):
            c, divided = asked(net, own, i, target, rule)
            pairs = [birch_pair(fitted, x, labels[c], k) for k in labels if k != labels[c]]
            agree(e, i, oracle.hard(pairs, beta, divided))


def test_birch_labels() -> None:
    assert sorted(set(birch("labels with gaps").labels_.tolist())) == [3, 7, 11]
    assert -1 in birch("noise is a cluster").labels_
    count = len(birch("subclusters").subcluster_centers_)
    assert neuralize(birch("subclusters")).labels.tolist() == list(range(count))


def test_birch_active_pair_leaves_no_residual() -> None:
    fitted = birch("four")
    net, X = neuralize(fitted), rows()
    for target in net.labels.tolist():
        e = net.explain(X, target=target, rule="midpoint")
        assert not e.residual.any()
        for contrast in net.labels.tolist():
            if contrast != target:
                duel = net.explain(X, target=target, contrast=contrast)
                assert not duel.residual.any()
                for i, x in enumerate(X):
                    agree(duel, i, oracle.duel(birch_pair(fitted, x, target, contrast)))


def test_tied_subclusters_share() -> None:
    points, owner = [[-1.0, 0.0], [1.0, 0.0], [0.0, 5.0]], [0, 0, 1]
    net = NeuralizedModel(AdditiveHead(SquaredDistances(points), HardPool(owner)))
    e = net.explain([[0.0, 1.0]])
    # the mean of both active pairs: no direction along the first column
    np.testing.assert_allclose(e.values, [[-1.0, 15.0]], atol=1e-12)
    np.testing.assert_allclose(e.output, [14.0])


def test_birch_with_one_label_is_an_error() -> None:
    with pytest.raises(ConvergenceError, match="K = 1"):
        neuralize(Birch(n_clusters=None, threshold=1e6).fit(wine()[0]))
    with pytest.raises(ConvergenceError, match="K = 1"):
        neuralize(Birch(n_clusters=1, threshold=0.9).fit(wine()[0]))


def test_birch_stiffness_from_the_subclusters() -> None:
    fitted = birch("four")
    own = [
        min(birch_pair(fitted, u, c, k).h for k in range(4) if k != c)
        for u, c in zip(fitted.subcluster_centers_, fitted.subcluster_labels_, strict=True)
    ]
    assert neuralize(fitted).explain(rows()).beta == pytest.approx(1 / np.mean(own))


# ---------------------------------------------------------------------- nearest centroids


NAMES = np.array(["red", "green", "blue"])
CENTROIDS: dict[str, Callable[[], NearestCentroid]] = {
    "uniform": NearestCentroid,
    "shrunk": lambda: NearestCentroid(shrink_threshold=0.6),
    "priors": lambda: NearestCentroid(priors=[0.15, 0.6, 0.25]),
    "empirical": lambda: NearestCentroid(priors="empirical"),
    "priors, shrunk": lambda: NearestCentroid(priors=[0.15, 0.6, 0.25], shrink_threshold=0.3),
    "manhattan": lambda: NearestCentroid(metric="manhattan"),
    "manhattan, shrunk": lambda: NearestCentroid(metric="manhattan", shrink_threshold=0.6),
}


@functools.cache
def centroids(name: str, classes: int = 3) -> NearestCentroid:
    X, y = wine()
    X, y = X[y < classes], y[y < classes]
    made = CENTROIDS[name]()
    if classes == 2 and isinstance(made.priors, list):
        made.set_params(priors=[0.2, 0.8])
    return made.fit(X, NAMES[y])


def centroid_pair(fitted: NearestCentroid, x: np.ndarray, c: int, k: int, by_score: bool) -> oracle.Pair:
    mu, prior = fitted.centroids_, fitted.class_prior_
    if by_score:
        return oracle.scaled(x, mu[c], mu[k], fitted.within_class_std_dev_, prior[c], prior[k])
    return (oracle.manhattan if fitted.metric == "manhattan" else oracle.squared)(x, mu[c], mu[k])


@pytest.mark.parametrize("name", CENTROIDS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("rule", "beta"), RULES[1:])
def test_nearest_centroid(name: str, classes: int, rule: str, beta: float) -> None:
    fitted = centroids(name, classes)
    by_score = "priors" in name or name == "empirical"
    net, X = neuralize(fitted), rows()
    own = fitted.predict(X)
    np.testing.assert_array_equal(net.predict(X), own)
    assert net.labels.tolist() == sorted(NAMES[:classes])
    for target in (None, "green"):
        e = net.explain(X, target=target, rule=rule, beta=beta)
        assert set(e.target.tolist()) <= set(NAMES)
        for i, x in enumerate(X):
            c, divided = asked(net, own, i, target, rule)
            pairs = oracle.rivals(c, classes, lambda c, k, x=x: centroid_pair(fitted, x, c, k, by_score))
            agree(e, i, oracle.hard(pairs, beta, divided))


def test_score_of_nearest_centroids_is_another_function() -> None:
    """With uniform priors predict and predict_proba contradict each other; each is an output of its own."""
    X, y = load_wine(return_X_y=True)
    fitted = NearestCentroid().fit(X, NAMES[y])
    net = neuralize(fitted)
    by_probability = fitted.classes_[fitted.predict_proba(X).argmax(1)]
    assert 0.5 < (by_probability == fitted.predict(X)).mean() < 0.9
    np.testing.assert_array_equal(net.predict(X), fitted.predict(X))
    scores = fitted.decision_function(X)
    for c, name in enumerate(fitted.classes_):
        e = net.explain(X, target=name, output="decision")
        np.testing.assert_allclose(e.output, scores[:, c], rtol=1e-9)
        conserves(e)
        for i in (0, 70, 150):
            terms = -(((X[i] - fitted.centroids_[c]) / fitted.within_class_std_dev_) ** 2)
            np.testing.assert_allclose(e.values[i], terms, rtol=1e-9)
            np.testing.assert_allclose(e.residual[i], 2 * math.log(1 / 3))
    # the logit is that of predict
    won = net(X).numpy().argmax(1)
    np.testing.assert_array_equal(fitted.classes_[won], fitted.predict(X))
    np.testing.assert_allclose(softmax(scores, 1), fitted.predict_proba(X))


def test_scores_are_neutral_at_their_own_centroid_only() -> None:
    """-(x - mu)^2 touches zero: the centroid is the break-even value, from either side."""
    fitted, X = centroids("uniform"), rows()
    net = neuralize(fitted)
    for c, label in enumerate(fitted.classes_):
        e = net.explain(X, target=label, output="decision")
        mu, sigma = fitted.centroids_[c], fitted.within_class_std_dev_
        np.testing.assert_allclose(e.break_even, np.tile(mu, (len(X), 1)), rtol=1e-7)
        np.testing.assert_allclose(e.slope, (mu - X) / sigma**2, rtol=1e-6)
        assert not net.explain(mu[None], target=label, output="decision").values.any()


CELLS: dict[str, Callable[[], Any]] = {
    "bisecting": lambda: bisecting(7.0),
    "birch": lambda: birch("four"),
    "nearest centroid": lambda: centroids("shrunk"),
    "nearest centroid, priors": lambda: centroids("priors"),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_where_a_class_wins(name: str) -> None:
    """A union of polytopes {A z + b >= 0} for every class; together they are all of the space."""
    fitted = CELLS[name]()
    X = np.vstack([rows(), wine()[0]]) + (7 if name == "bisecting" else 0)
    net = neuralize(fitted)
    own = fitted.predict(X)
    for c, label in enumerate(net.labels):
        inside = np.zeros(len(X), dtype=bool)
        for A, b in net.head.cells(c):
            inside |= (X @ A.numpy().T + b.numpy() >= 0).all(1)
        np.testing.assert_array_equal(inside, own == label)
    assert neuralize(centroids("manhattan")).head.cells(0) is None


def test_two_centroids_have_one_decision_value() -> None:
    for name in ("uniform", "priors"):
        fitted = centroids(name, 2)
        net, X = neuralize(fitted), rows()
        value = fitted.decision_function(X)
        for c, sign in ((0, -1), (1, 1)):
            e = net.explain(X, target=fitted.classes_[c], output="decision", rule="undivided")
            np.testing.assert_allclose(e.output, sign * value, rtol=1e-9)
            for i, x in enumerate(X):
                agree(e, i, oracle.duel(centroid_pair(fitted, x, c, 1 - c, True)))


def test_contrasts_of_scores_leave_the_priors() -> None:
    fitted = centroids("priors")
    net, X = neuralize(fitted), rows()
    for c in range(3):
        for k in range(3):
            if c != k:
                e = net.explain(X, target=fitted.classes_[c], contrast=fitted.classes_[k])
                log = 2 * math.log(fitted.class_prior_[c] / fitted.class_prior_[k])
                np.testing.assert_allclose(e.residual_parts["priors"], log)
                np.testing.assert_allclose(e.residual, log)
    assert "log odds" not in e.unit


def test_deviation_of_zero_is_not_scaled() -> None:
    X, y = wine()
    X = np.column_stack([X[:, :2], 2.0 * (y == 1)])
    with pytest.warns(UserWarning, match="zero standard deviation"):
        fitted = NearestCentroid(priors="empirical").fit(X, y)
    assert fitted.within_class_std_dev_[2] == 0
    net = neuralize(fitted)
    rows = np.vstack([X[::20], X[::20] + np.array([0, 0, 0.7])])
    np.testing.assert_array_equal(net.predict(rows), fitted.predict(rows))
    e = net.explain(rows, target=1, rule="undivided", beta=0.4)
    for i, x in enumerate(rows):
        pairs = oracle.rivals(1, 3, lambda c, k, x=x: centroid_pair(fitted, x, c, k, True))
        agree(e, i, oracle.hard(pairs, 0.4, False))


def test_manhattan_with_priors_is_refused() -> None:
    X, y = wine()
    for priors in ([0.2, 0.3, 0.5], "empirical"):
        with pytest.raises(UnsupportedEstimatorError, match="squares the L1 distance"):
            neuralize(NearestCentroid(metric="manhattan", priors=priors).fit(X, y))


def test_a_class_of_prior_zero() -> None:
    X, y = wine()
    fitted = NearestCentroid(priors=[0.0, 0.4, 0.6]).fit(X, y)
    with np.errstate(divide="ignore"):
        truth = fitted.predict(X)
    net = neuralize(fitted)
    np.testing.assert_array_equal(net.predict(X), truth)
    e = net.explain(X)
    conserves(e)
    assert (e.competitors[:, 0] == 0).all()
    assert (net(X)[:, 0] == -math.inf).all()
    for question in ({"target": 0}, {"target": 1, "contrast": 0}, {"target": 0, "output": "decision"}):
        with pytest.raises(TargetError, match="prior 0"):
            net.explain(X[y == 2], **question)
    with np.errstate(divide="ignore"), pytest.raises(ConvergenceError, match="only one class"):
        neuralize(NearestCentroid(priors=[0.0, 1.0]).fit(X, y > 0))


def test_manhattan_break_even_values() -> None:
    """sum rho |x - u| is linear between the prototypes; the value put there says nothing."""
    fitted = centroids("manhattan")
    net, X = neuralize(fitted), rows()
    e = net.explain(X, target="green", rule="undivided", beta=0.3)
    mu = fitted.centroids_
    known = ~np.isnan(e.break_even)
    assert known.mean() > 0.5
    green = fitted.classes_.tolist().index("green")
    for i, t in zip(*np.nonzero(known), strict=True):
        at = e.break_even[i, t]
        R = sum(e.competitors[i, k] * (abs(at - mu[k, t]) - abs(at - mu[green, t])) for k in range(3))
        assert abs(R) <= 1e-9 * (abs(at) + np.abs(mu[:, t]).max())
        np.testing.assert_allclose(e.slope[i, t] * (X[i, t] - at), e.values[i, t], rtol=1e-9, atol=1e-9)
    # where there is none, no value between, below or above the prototypes is neutral
    for i, t in zip(*np.nonzero(~known), strict=True):
        grid = np.concatenate([mu[:, t], [mu[:, t].min() - 1e3, mu[:, t].max() + 1e3]])
        R = [sum(e.competitors[i, k] * (abs(v - mu[k, t]) - abs(v - mu[green, t])) for k in range(3)) for v in grid]
        assert min(R) > 0 or max(R) < 0


# ---------------------------------------------------------------------- the others


def test_mean_shift_with_orphans() -> None:
    X = wine()[0]
    fitted = MeanShift(bandwidth=1.9, cluster_all=False, min_bin_freq=3).fit(X)
    assert (fitted.labels_ == -1).any()
    net = neuralize(fitted)
    assert net.labels.tolist() == list(range(len(fitted.cluster_centers_)))
    for table in (X, rows()):
        np.testing.assert_array_equal(net.predict(table), fitted.predict(table))
    # orphans belong to no cluster: they do not weigh in the stiffness
    sizes = np.bincount(fitted.labels_[fitted.labels_ >= 0], minlength=len(net.labels))
    mu = fitted.cluster_centers_
    gaps = [min(((a - b) ** 2).sum() for j, b in enumerate(mu) if j != i) for i, a in enumerate(mu)]
    assert net.explain(X[:1]).beta == pytest.approx(1 / np.average(gaps, weights=sizes))


def test_one_mode_is_an_error() -> None:
    with pytest.raises(ConvergenceError, match="K = 1"):
        neuralize(MeanShift(bandwidth=50).fit(wine()[0]))


def test_affinity_propagation() -> None:
    X = load_iris().data
    fitted = AffinityPropagation(random_state=0, preference=-30).fit(X)
    net = neuralize(fitted)
    far = X + 2 * np.random.default_rng(0).normal(size=X.shape)
    np.testing.assert_array_equal(net.predict(far), fitted.predict(far))
    mu = fitted.cluster_centers_
    e = net.explain(far[:20], beta=0.5)
    for i in range(20):
        pairs = oracle.rivals(int(e.target[i]), len(mu), lambda c, k, x=far[i]: oracle.squared(x, mu[c], mu[k]))
        agree(e, i, oracle.hard(pairs, 0.5, True))


def test_affinity_propagation_without_columns_or_centres() -> None:
    X = load_iris().data[::3]
    similar = -((X[:, None] - X) ** 2).sum(2)
    with pytest.raises(UnsupportedEstimatorError, match="precomputed"):
        neuralize(AffinityPropagation(affinity="precomputed", random_state=0).fit(similar))
    with pytest.warns(ConvergenceWarning):
        nowhere = AffinityPropagation(random_state=0, max_iter=1, preference=-1e9, damping=0.99).fit(X)
    assert len(nowhere.cluster_centers_) == 0
    with pytest.raises(ConvergenceError, match="no cluster centres"):
        neuralize(nowhere)


def test_mini_batches() -> None:
    X = wine()[0]
    fitted = MiniBatchKMeans(5, random_state=0, n_init=1).fit(X)
    net, mu = neuralize(fitted), fitted.cluster_centers_
    table = rows()
    own = fitted.predict(table)
    for target in (None, 3):
        e = net.explain(table, target=target, beta=0.2)
        for i, x in enumerate(table):
            c, divided = asked(net, own, i, target, "auto")
            pairs = oracle.rivals(c, 5, lambda c, k, x=x: oracle.squared(x, mu[c], mu[k]))
            agree(e, i, oracle.hard(pairs, 0.2, divided))


# ---------------------------------------------------------------------- the same as plain layers, and as each other


Build = Callable[[np.ndarray], NeuralizedModel]
POINTS = np.random.default_rng(5).normal(size=(7, 4))
BUILD: dict[str, Build] = {
    "centroids": lambda u: NeuralizedModel(CentroidHead(u)),
    "one unit each": lambda u: NeuralizedModel(AdditiveHead(SquaredDistances(u), HardPool(len(u)))),
    "groups": lambda u: NeuralizedModel(AdditiveHead(SquaredDistances(u), HardPool(np.arange(len(u)) % 3))),
    "path": lambda u: NeuralizedModel(
        AdditiveHead(
            SquaredDistances(u),
            PathPool([[(0, 1)], [(1, 0), (2, 3)], [(1, 0), (3, 2), (4, 5)], [(1, 0), (3, 2), (5, 4)]]),
        )
    ),
    "manhattan": lambda u: NeuralizedModel(AdditiveHead(ProductDistances(u, "manhattan"), HardPool(len(u)))),
}


class Pairs(torch.nn.Module):
    """The layers of one logit with groups: own against other units, soft over none, maximum, minimum."""

    def __init__(self, own: np.ndarray, others: list[np.ndarray]) -> None:
        super().__init__()
        self.sizes = [len(other) for other in others]
        flat = np.concatenate(others)
        W, b = [], []
        for u in own:
            for v in flat:
                W.append(2 * (u - v))
                b.append(v @ v - u @ u)
        self.linear = torch.nn.Linear(len(own[0]), len(W), dtype=torch.float64)
        self.own = len(own)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor(np.array(W)))
            self.linear.bias.copy_(torch.tensor(np.array(b)))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        pairs = self.linear(z).reshape(len(z), self.own, -1)
        best = pairs.amax(1)
        return torch.stack([part.amin(1) for part in best.split(self.sizes, 1)], 1).amin(1)


def test_logits_are_those_of_plain_layers() -> None:
    z = torch.tensor(2 * np.random.default_rng(1).normal(size=(50, 4)))
    net = BUILD["centroids"](POINTS)
    grouped = BUILD["groups"](POINTS)
    tree = BUILD["path"](POINTS)
    flat = BUILD["one unit each"](POINTS)
    with torch.no_grad():
        for c in range(7):
            np.testing.assert_allclose(net.layered(c)(z)[:, 0], net(z)[:, c], atol=1e-9)
            np.testing.assert_allclose(flat(z)[:, c], net(z)[:, c], atol=1e-9)
        for c in range(3):
            parts = [POINTS[k::3] for k in range(3) if k != c]
            np.testing.assert_allclose(Pairs(POINTS[c::3], parts)(z), grouped(z)[:, c], atol=1e-9)
        way = [[(0, 1)], [(1, 0), (2, 3)], [(1, 0), (3, 2), (4, 5)], [(1, 0), (3, 2), (5, 4)]]
        for c, path in enumerate(way):
            duels = [Pairs(POINTS[q : q + 1], [POINTS[s : s + 1]])(z) for q, s in path]
            np.testing.assert_allclose(torch.stack(duels).amin(0), tree(z)[:, c], atol=1e-9)


@pytest.mark.parametrize("rule", ["auto", "undivided", "midpoint"])
def test_a_flat_pool_of_units_is_the_centroid_head(rule: str) -> None:
    X = 2 * np.random.default_rng(1).normal(size=(50, 4))
    one, other = BUILD["centroids"](POINTS), BUILD["one unit each"](POINTS)
    for question in ({}, {"target": 2}, {"target": 2, "contrast": 5}):
        beta = math.inf if rule == "midpoint" else 0.4
        a, b = (net.explain(X, rule=rule, beta=beta, **question) for net in (one, other))
        scale = 1e-9 * np.abs(a.values).sum(1).max()
        for name in ("values", "output", "residual", "competitors"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=scale)
        np.testing.assert_allclose(a.break_even, b.break_even, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(a.divided, b.divided)


# ---------------------------------------------------------------------- invariances


@pytest.mark.parametrize("name", BUILD)
def test_invariances(name: str) -> None:
    build, X = BUILD[name], 2 * np.random.default_rng(1).normal(size=(40, 4))
    net = build(POINTS)
    for question in ({}, {"target": 1, "rule": "undivided"}, {"target": 1, "contrast": 2}):
        beta = 0.3
        e = net.explain(X, beta=beta, **question)
        size = np.abs(e.values).sum(1, keepdims=True) + np.abs(e.residual)[:, None]

        def same(other: Any, expected: np.ndarray, scale: float = 1.0, size: Any = size) -> None:
            assert (np.abs(other.values - expected) <= 1e-9 * scale * size).all()

        shift = np.array([30.0, -4.0, 0.0, 100.0])
        moved = build(POINTS + shift).explain(X + shift, beta=beta, **question)
        same(moved, e.values)
        np.testing.assert_allclose(moved.break_even, e.break_even + shift, rtol=1e-6, atol=1e-6)
        order = [2, 0, 3, 1]
        same(build(POINTS[:, order]).explain(X[:, order], beta=beta, **question), e.values[:, order])
        # squared distances grow with s^2, absolute ones with s; beta is per unit of output
        for s in (1e-5, 1e5):
            power = s if name == "manhattan" else s**2
            same(build(s * POINTS).explain(s * X, beta=beta / power, **question), power * e.values, power)
        wide = np.column_stack([POINTS, np.full(7, 0.1)])
        extra = np.column_stack([X, np.linspace(-5, 5, 40)])
        found = build(wide).explain(extra, beta=beta, **question)
        same(found, np.column_stack([e.values, np.zeros(40)]))
        assert (found.values[:, 4] == 0).all()
        assert np.isnan(found.break_even[:, 4]).all()
        assert (found.slope[:, 4] == 0).all()


def test_rows_that_come_twice_do_not_matter() -> None:
    """Nearest centroids of a table and of the table twice are the same model."""
    X, y = wine()
    twice = NearestCentroid().fit(np.vstack([X, X]), np.concatenate([y, y]))
    a = neuralize(NearestCentroid().fit(X, y)).explain(rows(), beta=0.3)
    b = neuralize(twice).explain(rows(), beta=0.3)
    np.testing.assert_allclose(a.values, b.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["one unit each", "groups", "path", "manhattan"])
def test_two_classes_are_antisymmetric(name: str) -> None:
    X = 2 * np.random.default_rng(1).normal(size=(40, 4))
    head = {
        "one unit each": lambda: AdditiveHead(SquaredDistances(POINTS[:2]), HardPool(2)),
        "groups": lambda: AdditiveHead(SquaredDistances(POINTS), HardPool([0, 1, 0, 1, 1, 0, 0])),
        "path": lambda: AdditiveHead(SquaredDistances(POINTS[:2]), PathPool([[(0, 1)], [(1, 0)]])),
        "manhattan": lambda: AdditiveHead(ProductDistances(POINTS[:2], "manhattan"), HardPool(2)),
    }[name]()
    net = NeuralizedModel(head)
    one = net.explain(X, target=0)
    for beta in (1e-3, 10.0, math.inf):
        other = net.explain(X, target=1, beta=beta)
        scale = 1e-9 * np.abs(one.values).max()
        np.testing.assert_allclose(one.values, -other.values, atol=scale)
        np.testing.assert_allclose(one.output, -other.output, atol=scale)
        assert not other.residual.any()


@pytest.mark.parametrize("name", BUILD)
def test_continuous_across_borders(name: str) -> None:
    """The undivided rule: halving the step halves the largest change, on a path through several cells."""
    net = BUILD[name](POINTS)
    ends = np.array([[-3.0, 2.0, 1.0, -2.0], [3.0, -2.0, -1.0, 2.5]])
    change = []
    for steps in (2000, 4000):
        path = ends[0] + np.linspace(0, 1, steps + 1)[:, None] * (ends[1] - ends[0])
        e = net.explain(path, target=net.labels[-1], rule="undivided", beta=0.5)
        change.append([np.abs(np.diff(e.values, axis=0)).max(), np.abs(np.diff(e.residual)).max()])
        assert len(set(net.predict(path).tolist())) >= 2
    if name == "groups":
        # the active subcluster changes: only the sum is continuous
        total = [np.abs(np.diff(e.values.sum(1) + e.residual)).max()]
        assert max(total) < 0.1
        return
    np.testing.assert_allclose(np.array(change[0]) / change[1], 2, rtol=0.1)


@pytest.mark.parametrize("name", BUILD)
def test_limits_of_the_stiffness(name: str) -> None:
    net, X = BUILD[name](POINTS), 2 * np.random.default_rng(1).normal(size=(40, 4))
    for rule in ("auto", "undivided"):
        stiff, nearest = (net.explain(X, target=0, rule=rule, beta=b) for b in (1e12, math.inf))
        scale = 1e-6 * np.abs(nearest.values).max()
        np.testing.assert_allclose(stiff.values, nearest.values, atol=scale)
        assert (np.isclose(nearest.competitors, 0) | np.isclose(nearest.competitors, 1)).all()
        loose = net.explain(X, target=0, rule="undivided", beta=1e-12)
        shares = loose.competitors[loose.competitors > 0]
        assert np.ptp(shares) < 1e-9
    np.testing.assert_allclose(net.explain(X, rule="midpoint").values, net.explain(X, beta=math.inf).values, atol=scale)


# ---------------------------------------------------------------------- rounding


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("span", [1e2, 1e4, 1e6])
def test_prototypes_far_from_the_rest(name: str, span: float) -> None:
    """Two prototypes next to each other, far from all others, are told apart without loss."""
    points = POINTS.copy()
    points[:4] += span
    net = BUILD[name](points)
    X = np.vstack([points[:4] + 0.3 * np.random.default_rng(2).normal(size=(4, 4)), points])
    pair = oracle.manhattan if name == "manhattan" else oracle.squared
    for question in ({}, {"target": 1}, {"target": 1, "rule": "undivided", "beta": 1e-9}):
        conserves(net.explain(X, **question))
    if name in ("one unit each", "manhattan", "centroids"):
        e = net.explain(X, beta=0.4)
        for i, x in enumerate(X):
            pairs = oracle.rivals(int(e.target[i]), 7, lambda c, k, x=x: pair(x, points[c], points[k]))
            agree(e, i, oracle.hard(pairs, 0.4, True))


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("far", [1e3, 1e6, 1e9])
def test_rows_far_away(name: str, far: float) -> None:
    net = BUILD[name](POINTS)
    X = far * np.random.default_rng(2).normal(size=(30, 4))
    pair = oracle.manhattan if name == "manhattan" else oracle.squared
    for question in ({}, {"target": 1}, {"target": 1, "contrast": 0}):
        e = net.explain(X, beta=1 / far, **question)
        conserves(e, 1e-11)
    if name in ("one unit each", "manhattan", "centroids"):
        for i, x in enumerate(X):
            agree(e, i, oracle.duel(pair(x, POINTS[1], POINTS[0])), 1e-7)


@pytest.mark.parametrize("name", [n for n in BUILD if n != "centroids"])
def test_ties_are_broken_once(name: str) -> None:
    """On a lattice many competitors tie; a row is explained alike whether its own class is named or not."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        net = BUILD[name](1e-6 * rng.integers(-2, 3, (7, 4)))
        X = 1e-6 * rng.integers(-3, 4, (60, 4))
        e = net.explain(X, beta=math.inf)
        np.testing.assert_array_equal(e.target, net.predict(X))
        np.testing.assert_array_equal(e.decided, net.predict(X))
        other = net.explain(X, target=e.target, beta=math.inf)
        np.testing.assert_array_equal(e.values, other.values)
        known = ~np.isnan(e.break_even)
        line = np.where(known, e.slope * (X - e.break_even), e.values)
        np.testing.assert_allclose(line, e.values, rtol=1e-6, atol=1e-9 * np.abs(e.values).max())


def test_rules_that_need_something_else() -> None:
    net = BUILD["one unit each"](POINTS)
    with pytest.raises(RuleError, match="nearest competitor"):
        net.explain(POINTS, rule="midpoint", beta=2.0)
    with pytest.raises(RuleError, match="centroid models"):
        net.explain(POINTS, rule="shapley", target=0, contrast=1)
    for name in ("one unit each", "groups", "path"):
        with pytest.raises(TargetError, match="own cluster"):
            BUILD[name](POINTS).explain(POINTS, rule="divided", target=0)
