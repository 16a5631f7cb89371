"""Values on the raw columns against matrices written out, for every family of prototypes, Gaussians, linear models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
from oracles import prototypes as oracle
from oracles.kernels import agree, conserves
from oracles.prototypes import Blocks, Gaussian, Pair, Sums, View
from sklearn.base import clone
from sklearn.cluster import Birch, BisectingKMeans, KMeans
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, PowerTransformer, RobustScaler, StandardScaler

from lrp.errors import UnsupportedEstimatorError
from neuralize import CentroidHead, NeuralizedModel, neuralize
from neuralize.additive import AdditiveHead
from neuralize.linear_units import LinearUnits
from neuralize.pools import SoftPool
from neuralize.scaling import Scaler
from neuralize.units import QuadraticForms

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
D = 6


@functools.cache
def wine() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_wine(return_X_y=True)
    return X[:, :D], y


def rows() -> np.ndarray:
    X, _ = wine()
    rng = np.random.default_rng(0)
    return np.vstack([X[::25], X.mean(0) + 4 * X.std(0) * rng.normal(size=(6, D))])


# ---------------------------------------------------------------------- families: pairs of classes in a view


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    pairs: Callable[[Any, np.ndarray, int, View], list[Pair]]
    soft: bool = False


def _centroids(fitted: Any, z: np.ndarray, c: int, view: View) -> list[Pair]:
    mu = fitted.cluster_centers_
    return oracle.rivals(c, len(mu), lambda c, k: _unit(view, z, mu[c], mu[k]))


def _unit(view: View, z: np.ndarray, own: np.ndarray, other: np.ndarray) -> Pair:
    """A pair is a linear unit, expanded at its midpoint."""
    return Pair(view.unit(z, 2 * (own - other), (own + other) / 2))


def _path(fitted: Any, z: np.ndarray, c: int, view: View) -> list[Pair]:
    return [_unit(view, z, step.node, step.sibling) for step in oracle.paths(fitted)[c]]


def _birch(fitted: Any, z: np.ndarray, c: int, view: View) -> list[Pair]:
    u, labels = fitted.subcluster_centers_, fitted.subcluster_labels_

    def nearest(k: int) -> np.ndarray:
        return min(u[labels == k], key=lambda p: float(((z - p) ** 2).sum()))

    return oracle.rivals(c, labels.max() + 1, lambda c, k: _unit(view, z, nearest(c), nearest(k)))


def _nearest_centroid(fitted: Any, z: np.ndarray, c: int, view: View) -> list[Pair]:
    mu = fitted.centroids_
    return oracle.rivals(c, len(mu), lambda c, k: _unit(view, z, mu[c], mu[k]))


def _scored_centroid(fitted: Any, z: np.ndarray, c: int, view: View) -> list[Pair]:
    mu, P, prior = fitted.centroids_, np.diag(2 / fitted.within_class_std_dev_**2), fitted.class_prior_
    return oracle.rivals(
        c,
        len(mu),
        lambda c, k: Pair(
            view.form(z, mu[k], P) - view.form(z, mu[c], P), {"priors": 2 * math.log(prior[c] / prior[k])}
        ),
    )


def _gaussians(gaussians: list[Gaussian], z: np.ndarray, c: int, view: View) -> list[Pair]:
    def normaliser(g: Gaussian) -> tuple[np.ndarray | float, float]:
        """What goes to the columns, and what to none."""
        if not g.apart:
            return 0.0, g.normaliser
        each = 0.5 * np.log(2 * math.pi * np.diag(g.covariance))
        if isinstance(view, Sums):
            return view.bilinear(each, np.ones(len(each))), g.extra
        if isinstance(view, Blocks):
            # the normalisers of coordinates that mix columns belong to no column
            found, rest = np.zeros(D), g.extra
            for some, part in view.views:
                if isinstance(part, Sums):
                    found = found + part.bilinear(each[some], np.ones(len(each[some])))
                else:
                    rest -= each[some].sum()
            return found, rest
        return 0.0, g.extra - each.sum()

    def pair(c: int, k: int) -> Pair:
        (mine, own), (theirs, other) = normaliser(gaussians[c]), normaliser(gaussians[k])
        costs = [view.form(z, g.mean, g.precision) for g in (gaussians[k], gaussians[c])]
        weights = gaussians[c].log_weight - gaussians[k].log_weight
        return Pair(costs[0] + theirs - costs[1] - mine, {"log weights": weights, "normaliser": own - other})

    return oracle.rivals(c, len(gaussians), pair)


def _borders(gaussians: list[Gaussian], z: np.ndarray, c: int, view: View) -> list[Pair]:
    return oracle.rivals(c, len(gaussians), lambda c, k: Pair(view.unit(z, *oracle.root(gaussians[c], gaussians[k]))))


def _quadratic_discriminant(fitted: Any) -> list[Gaussian]:
    return [
        Gaussian(m, C, math.log(p)) for m, C, p in zip(fitted.means_, fitted.covariance_, fitted.priors_, strict=True)
    ]


def _naive(fitted: Any) -> list[Gaussian]:
    return [
        Gaussian(m, np.diag(v), math.log(p), True)
        for m, v, p in zip(fitted.theta_, fitted.var_, fitted.class_prior_, strict=True)
    ]


def _shared(fitted: Any) -> list[Gaussian]:
    return [Gaussian(m, fitted.covariance_, math.log(p)) for m, p in zip(fitted.means_, fitted.priors_, strict=True)]


def _scores(fitted: Any, z: np.ndarray, c: int, view: View) -> list[Pair]:
    W, b = fitted.coef_, fitted.intercept_
    return oracle.rivals(
        c, len(W), lambda c, k: Pair(view.unit(z, W[c] - W[k], np.zeros_like(z)), {"intercept": float(b[c] - b[k])})
    )


def _mixture(kind: str) -> Family:
    pairs = _borders if kind == "tied" else _gaussians
    return Family(
        lambda: GaussianMixture(3, covariance_type=kind, random_state=0),
        lambda fitted, *rest: pairs(oracle.mixture(fitted), *rest),
        True,
    )


FAMILIES: dict[str, Family] = {
    "k-means": Family(lambda: KMeans(4, n_init=1, random_state=0), _centroids),
    "bisecting": Family(lambda: BisectingKMeans(5, random_state=0), _path),
    "birch": Family(lambda: Birch(n_clusters=3, threshold=0.4), _birch),
    "nearest centroid": Family(NearestCentroid, _nearest_centroid),
    "nearest centroid, priors": Family(lambda: NearestCentroid(priors=[0.2, 0.5, 0.3]), _scored_centroid),
    **{f"mixture {kind}": _mixture(kind) for kind in ("full", "tied", "diag", "spherical")},
    "bayesian mixture": Family(
        lambda: BayesianGaussianMixture(n_components=3, covariance_type="diag", random_state=0, max_iter=500, tol=1e-2),
        lambda fitted, *rest: _gaussians(oracle.bayesian_mixture(fitted), *rest),
        True,
    ),
    "quadratic discriminant": Family(
        lambda: QuadraticDiscriminantAnalysis(store_covariance=True, solver="eigen", shrinkage=0.1),
        lambda fitted, *rest: _gaussians(_quadratic_discriminant(fitted), *rest),
        True,
    ),
    "naive bayes": Family(GaussianNB, lambda fitted, *rest: _gaussians(_naive(fitted), *rest), True),
    "linear discriminant": Family(
        lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1),
        lambda fitted, *rest: _borders(_shared(fitted), *rest),
        True,
    ),
    "logistic": Family(LogisticRegression, _scores, True),
    "ridge": Family(RidgeClassifier, _scores),
}

FRONTS: dict[str, list[Any]] = {
    "scaled": [StandardScaler()],
    "curved": [PowerTransformer()],
    "truncated": [StandardScaler(), PCA(3)],
    "whitened": [StandardScaler(), PCA(3, whiten=True)],
    "unscaled": [PCA(4)],
    "full, whitened": [MinMaxScaler((-1, 2)), PCA(whiten=True)],
    "twice": [RobustScaler(), PCA(5), StandardScaler(), PCA(3, whiten=True)],
}


APART = ("scaled", "curved")  # columns stay columns


@functools.cache
def piped(front: str, family: str) -> Any:
    X, y = wine()
    return make_pipeline(*map(clone, FRONTS[front]), FAMILIES[family].make()).fit(X, y)


def view_of(front: str, pipe: Any) -> View:
    return Sums(range(D), D) if front in APART else oracle.pipeline_way([step for _, step in pipe.steps[:-1]])


def expected(family: str, fitted: Any, z: np.ndarray, c: int, view: View, beta: float, divided: bool) -> Any:
    pairs = FAMILIES[family].pairs(fitted, z, c, view)
    return oracle.soft(pairs, beta) if FAMILIES[family].soft else oracle.hard(pairs, beta, divided)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_on_the_raw_columns(front: str, family: str) -> None:
    pipe, X = piped(front, family), rows()
    net, Z, view = neuralize(pipe), pipe[:-1].transform(rows()), view_of(front, pipe)
    if isinstance(view, oracle.Way):
        np.testing.assert_allclose(Z, [view.to(x) for x in X], atol=1e-9)
        np.testing.assert_allclose([view.back(z) for z in Z], pipe[:-1].inverse_transform(Z), atol=1e-8)
    own = pipe.predict(X)
    np.testing.assert_array_equal(net.predict(X), own)
    for target in (None, net.labels[1]):
        for beta in (0.5, 1.0):
            e = net.explain(X, target=target, beta=beta)
            for i, z in enumerate(Z):
                c = net.labels.tolist().index(own[i] if target is None else target)
                divided = bool(net.labels[c] == own[i])
                agree(e, i, expected(family, pipe[-1], z, c, view, beta, divided), 1e-8)


@pytest.mark.parametrize("front", [f for f in FRONTS if f not in APART])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_in_front_of_the_head(front: str, family: str) -> None:
    """Going back moves relevance between columns only; and rows the model can't tell apart are explained alike."""
    pipe, X = piped(front, family), rows()
    net, Z = neuralize(pipe), pipe[:-1].transform(rows())
    a, b = net.explain(X, target=net.labels[0]), neuralize(pipe[-1]).explain(Z, target=net.labels[0])
    size = np.abs(a.values).sum(1) + np.abs(b.values).sum(1)
    np.testing.assert_allclose(a.output, b.output, rtol=1e-8, atol=1e-8)
    constants = a.residual - b.residual  # normalisers of diagonals have no column behind a projection
    assert (np.abs(a.values.sum(1) + constants - b.values.sum(1)) <= 1e-8 * size).all()
    conserves(a)
    way = view_of(front, pipe)
    assert isinstance(way, oracle.Way)
    blind = np.eye(D) - way.L @ way.T
    moved = net.explain(X + np.random.default_rng(1).normal(size=X.shape) * X.std(0) @ blind.T, target=net.labels[0])
    assert (np.abs(moved.values - a.values) <= 1e-8 * size[:, None]).all()
    if front != "full, whitened":
        assert np.abs(blind).max() > 0.01
        # x itself in the place of what the model sees of it: the same sum, other values (choice A)
        if family == "k-means":
            e, mu = net.explain(X, target=0, contrast=1), pipe[-1].cluster_centers_
            other = (way.T.T @ (2 * (mu[0] - mu[1]))) * (X - way.back((mu[0] + mu[1]) / 2))
            np.testing.assert_allclose(other.sum(1), e.output, rtol=1e-7, atol=1e-7)
            assert np.abs(other - e.values).max() > 0.1


def test_projections_that_are_not_orthogonal_bend_distances() -> None:
    """Without whitening a distance is a sum of squares over the raw columns; with it, pairs and distances differ."""
    for front in ("truncated", "unscaled"):
        way = view_of(front, piped(front, "k-means"))
        for x in rows():
            z = way.to(x)
            assert (way.distance(z, np.zeros(len(z))) >= -1e-12).all()
            pair = way.unit(z, 2 * (np.ones(len(z)) - np.arange(len(z))), (np.ones(len(z)) + np.arange(len(z))) / 2)
            squares = way.distance(z, np.arange(float(len(z)))) - way.distance(z, np.ones(len(z)))
            np.testing.assert_allclose(pair, squares, rtol=1e-8, atol=1e-8 * np.abs(squares).sum())
    way = view_of("whitened", piped("whitened", "k-means"))
    assert min(way.distance(way.to(x), np.zeros(3)).min() for x in rows()) < -1e-6


@pytest.mark.parametrize("front", FRONTS)
def test_the_same_prototypes_by_another_name(front: str) -> None:
    """Nearest centroids, k-means and bisecting k-means of two clusters with the same prototypes: the same values."""
    pipe, X = piped(front, "nearest centroid"), rows()
    mu = pipe[-1].centroids_
    clusterer = KMeans(3, init=mu, n_init=1, max_iter=1).fit(pipe[:-1].transform(wine()[0]))
    clusterer.cluster_centers_ = mu
    nets = [neuralize(pipe), neuralize(make_pipeline(*pipe[:-1], clusterer))]
    for question in ({}, {"target": 1}, {"target": 1, "contrast": 2}):
        a, b = (net.explain(X, beta=0.3, **question) for net in nets)
        size = np.abs(a.values).sum(1, keepdims=True)
        assert (np.abs(a.values - b.values) <= 1e-9 * size).all()
        np.testing.assert_allclose(a.break_even, b.break_even, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(a.slope, b.slope, rtol=1e-5, atol=1e-9 * np.abs(a.slope).max())


def test_a_full_rotation_is_folded_weights() -> None:
    X, y = wine()
    front = make_pipeline(StandardScaler(), PCA()).fit(X)
    way = oracle.pipeline_way([step for _, step in front.steps])
    scaler = front[0]
    table = rows()

    def behind(head: Any) -> NeuralizedModel:
        return NeuralizedModel(head, front=[Scaler(subtract=scaler.mean_, divide=scaler.scale_)])

    def rotated(z: np.ndarray) -> np.ndarray:
        return scaler.transform(np.array([way.back(row) for row in z]))

    clusterer = make_pipeline(*front, KMeans(4, n_init=1, random_state=0)).fit(X)
    a, b = neuralize(clusterer), behind(CentroidHead(rotated(clusterer[-1].cluster_centers_)))
    for question in ({}, {"target": 1}, {"target": 1, "contrast": 3}):
        one, other = (net.explain(table, beta=0.3, **question) for net in (a, b))
        size = np.abs(one.values).sum(1, keepdims=True)
        assert (np.abs(one.values - other.values) <= 1e-9 * size).all()
        np.testing.assert_allclose(one.break_even, other.break_even, rtol=1e-6)
        np.testing.assert_allclose(one.slope, other.slope, rtol=1e-6, atol=1e-9 * np.abs(one.slope).max())

    fitted = make_pipeline(*front, LogisticRegression()).fit(X, y)[-1]
    pipe = make_pipeline(*front, fitted)
    W = fitted.coef_ @ way.T * scaler.scale_
    # measured from the mean row, which the rotation sends to the origin
    head = AdditiveHead(LinearUnits(W), SoftPool(3, {"intercept": -fitted.intercept_}), kind="class")
    one, other = neuralize(pipe).explain(table, target=1), behind(head).explain(table, target=1)
    np.testing.assert_allclose(one.values, other.values, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(one.residual, other.residual, rtol=1e-8)

    mixture = make_pipeline(*front, GaussianMixture(3, random_state=0)).fit(X)
    gaussians = oracle.mixture(mixture[-1])
    rotation = way.T * scaler.scale_
    forms = QuadraticForms(rotated(mixture[-1].means_), [rotation.T @ g.precision @ rotation for g in gaussians])
    constants = {"log weights": [-g.log_weight for g in gaussians], "normaliser": [-g.normaliser for g in gaussians]}
    one = neuralize(mixture).explain(table, target=1)
    other = behind(AdditiveHead(forms, SoftPool(3, constants))).explain(table, target=1)
    size = np.abs(one.values).sum(1, keepdims=True)
    assert (np.abs(one.values - other.values) <= 1e-8 * size).all()


PLAIN = [
    "k-means",
    "bisecting",
    "birch",
    "nearest centroid",
    "mixture tied",
    "linear discriminant",
    "logistic",
    "ridge",
]


@pytest.mark.parametrize("front", [*APART, "full, whitened"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_break_even_value_put_into_a_row(front: str, family: str) -> None:
    """In raw units, the shares held: the column then speaks neither for nor against."""
    pipe, X = piped(front, family), rows()
    net, view = neuralize(pipe), view_of(front, pipe)
    e = net.explain(X, target=net.labels[1], rule="undivided", beta=1.0)
    known = ~np.isnan(e.break_even)
    if front == "full, whitened":
        # forms mix columns there, pairs and linear units don't
        assert known.all() == known.any() == (family in PLAIN)
    else:
        assert known.any()
        assert known.all() or family not in PLAIN
    for i, t in zip(*np.nonzero(known), strict=True):
        at = X[i].copy()
        at[t] = e.break_even[i, t]
        Z = pipe[:-1].transform(np.vstack([X[i], at]))
        held = [FAMILIES[family].pairs(pipe[-1], z, 1, view) for z in Z]
        if family == "birch":
            continue  # its active subcluster may change on the way
        p = oracle.shares([pair.h for pair in held[0]], 1.0)
        R = [sum(w * pair.terms for w, pair in zip(p, pairs, strict=True)) for pairs in held]
        size = sum(w * np.abs(pair.terms).sum() for w, pair in zip(p, held[1], strict=True))
        np.testing.assert_allclose(R[0], e.values[i], rtol=1e-7, atol=1e-8 * np.abs(R[0]).sum())
        assert abs(R[1][t]) <= 1e-7 * (size + np.abs(R[0]).sum())
        np.testing.assert_allclose(
            e.slope[i, t] * (X[i, t] - at[t]), R[0][t], rtol=1e-6, atol=1e-8 * np.abs(R[0]).sum()
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_side_by_side(family: str) -> None:
    """A union of scaled columns and principal components: each block goes its own way back, and they add up."""
    X, y = wine()
    union = FeatureUnion([("kept", StandardScaler()), ("seen", make_pipeline(StandardScaler(), PCA(2, whiten=True)))])
    last = FAMILIES[family].make()
    if hasattr(last, "reg_covar"):
        last.set_params(reg_covar=0.1)  # the components are sums of the columns beside them
    pipe = make_pipeline(union, last).fit(X, y)
    fitted = pipe[0].transformer_list[1][1]
    view = Blocks(
        [(slice(0, D), Sums(range(D), D)), (slice(D, D + 2), oracle.pipeline_way([s for _, s in fitted.steps]))]
    )
    net, Z, own = neuralize(pipe), pipe[0].transform(rows()), pipe.predict(rows())
    for target in (None, net.labels[0]):
        e = net.explain(rows(), target=target, beta=0.7)
        conserves(e)
        for i, z in enumerate(Z):
            c = net.labels.tolist().index(own[i] if target is None else target)
            agree(e, i, expected(family, pipe[-1], z, c, view, 0.7, bool(net.labels[c] == own[i])), 1e-7)


@functools.cache
def people() -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(4)
    n = 150
    frame = pd.DataFrame(
        {
            "city": rng.choice(["Bern", "Oslo", "Rome"], n, p=[0.5, 0.3, 0.2]),
            "age": rng.integers(18, 80, n).astype(float),
            "size": rng.choice(["S", "M"], n),
            "income": rng.lognormal(2, 0.5, n),
        }
    )
    y = np.digitize(frame["age"] / 40 + (frame["city"] == "Oslo") + 0.3 * rng.normal(size=n), [1.2, 1.8])
    return frame, y


@pytest.mark.parametrize("family", FAMILIES)
def test_dummies_are_summed(family: str) -> None:
    """The relevance of a category is that of all its dummies."""
    frame, y = people()
    encode = ColumnTransformer(
        [
            ("words", OneHotEncoder(sparse_output=False), ["size", "city"]),
            ("numbers", StandardScaler(), ["income", "age"]),
        ]
    )
    last = FAMILIES[family].make()
    if hasattr(last, "reg_covar"):
        last.set_params(reg_covar=0.05)  # dummies add up to one
    pipe = make_pipeline(encode, last).fit(frame, y)
    view = Sums([2, 2, 0, 0, 0, 3, 1], 4)
    table = frame[::17]
    net, Z, own = neuralize(pipe), pipe[0].transform(table), pipe.predict(table)
    np.testing.assert_array_equal(net.predict(frame), pipe.predict(frame))
    for target in (None, net.labels[1]):
        e = net.explain(table, target=target, beta=0.7)
        assert e.feature_names == ("city", "age", "size", "income")
        for i, z in enumerate(Z):
            c = net.labels.tolist().index(own[i] if target is None else target)
            agree(e, i, expected(family, pipe[-1], z, c, view, 0.7, bool(net.labels[c] == own[i])), 1e-8)
        assert np.isnan(e.break_even[:, [0, 2]]).all()
    # another category, all else equal: its column's values change as the output does, for an additive model
    if family in ("logistic", "ridge"):
        other = table.assign(city=np.where(table["city"] == "Rome", "Oslo", "Rome"))
        a, b = (net.explain(t, target=net.labels[0], contrast=net.labels[1]) for t in (table, other))
        np.testing.assert_allclose(b.output - a.output, (b.values - a.values)[:, 0], atol=1e-9)
        np.testing.assert_allclose(b.values[:, 1:], a.values[:, 1:], atol=1e-12)


def test_absolute_distances_do_not_go_through_projections() -> None:
    X, y = wine()
    pipe = make_pipeline(StandardScaler(), PCA(3), NearestCentroid(metric="manhattan")).fit(X, y)
    net = neuralize(pipe)
    np.testing.assert_array_equal(net.predict(X), pipe.predict(X))
    with pytest.raises(UnsupportedEstimatorError, match="mix columns"):
        net.explain(X)
    # scalers and dummies are no obstacle
    pipe = make_pipeline(StandardScaler(), NearestCentroid(metric="manhattan")).fit(X, y)
    Z, mu, e = pipe[:-1].transform(rows()), pipe[-1].centroids_, neuralize(pipe).explain(rows(), target=2, contrast=0)
    np.testing.assert_allclose(e.values, np.abs(Z - mu[0]) - np.abs(Z - mu[2]), atol=1e-12)


def test_reference_rows_behind_a_projection() -> None:
    """The mean of the raw rows leads to the mean of the coordinates: values are measured from it on every column."""
    X, y = wine()
    for front in ("truncated", "full, whitened", "scaled"):
        pipe = make_pipeline(*map(clone, FRONTS[front]), LogisticRegression()).fit(X, y)
        net = neuralize(pipe, reference=X[:40])
        at = net.explain(X[:40].mean(0)[None], target=1)
        np.testing.assert_allclose(at.values, 0, atol=1e-9)
        assert np.isfinite(net.explain(rows(), target=1).break_even).all()
        if front != "truncated":
            np.testing.assert_allclose(
                net.explain(rows(), target=1).break_even, np.tile(X[:40].mean(0), (len(rows()), 1))
            )
