"""Other coordinates: groups, complete and incomplete bases, what lies outside, break-even points, refusals."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.fft
from oracles import prototypes as oracle
from oracles.kernels import agree, conserves
from scipy.stats import ortho_group
from sklearn.cluster import BisectingKMeans, KMeans
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from lrp.errors import ColumnError, InputError, UnsupportedEstimatorError
from neuralize import neuralize
from neuralize.bases import Basis, dct, principal

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
D = 6


@functools.cache
def wine() -> tuple[pd.DataFrame, np.ndarray]:
    X, y = load_wine(return_X_y=True, as_frame=True)
    return X.iloc[:, :D], y.to_numpy()


MODELS: dict[str, Any] = {
    "k-means": KMeans(4, n_init=1, random_state=0),
    "bisecting": BisectingKMeans(5, random_state=0),
    "nearest centroid": NearestCentroid(priors=[0.2, 0.5, 0.3]),
    "mixture": GaussianMixture(3, random_state=0),
    "diagonal mixture": GaussianMixture(3, covariance_type="diag", random_state=0),
    "linear discriminant": LinearDiscriminantAnalysis(),
    "logistic": LogisticRegression(),
    "svc": SVC(gamma=0.1),
}


@functools.cache
def fitted(name: str) -> Any:
    X, y = wine()
    return make_pipeline(StandardScaler(), MODELS[name]).fit(X, y)


def rows() -> pd.DataFrame:
    X, _ = wine()
    rng = np.random.default_rng(0)
    return pd.concat([X[::25], X[:6] + 4 * X.std().to_numpy() * rng.normal(size=(6, D))])


QUESTIONS: list[dict[str, Any]] = [{}, {"target": 1}, {"target": 1, "contrast": 0}, {"beta": 0.4, "target": 1}]


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_sums(name: str) -> None:
    net, X = neuralize(fitted(name)), rows()
    groups = {"acids": ["malic_acid", "ash"], "rest": [0, 5]}
    for question in QUESTIONS:
        e, g = net.explain(X, **question), net.explain(X, basis=groups, **question)
        assert g.feature_names == ("rest", "acids", "alcalinity_of_ash", "magnesium")
        v = e.values
        expected = np.column_stack([v[:, 0] + v[:, 5], v[:, 1] + v[:, 2], v[:, 3], v[:, 4]])
        np.testing.assert_allclose(g.values, expected, rtol=1e-9, atol=1e-9 * np.abs(v).sum(1).max())
        np.testing.assert_allclose(g.residual, e.residual, rtol=1e-9, atol=1e-9)
        assert list(g.residual_parts) == list(e.residual_parts)
        conserves(g)
        # a group of several columns has no value of its own, single columns keep theirs
        assert np.isnan(g.break_even[:, :2]).all()
        assert np.isnan(g.data[:, :2]).all()
        np.testing.assert_allclose(g.break_even[:, 2:], e.break_even[:, [3, 4]])
        np.testing.assert_allclose(g.slope[:, 2:], e.slope[:, [3, 4]])
        np.testing.assert_array_equal(g.data[:, 2:], X.iloc[:, [3, 4]])


def test_one_column_by_name_or_position() -> None:
    net, X = neuralize(fitted("k-means")), rows()
    e = net.explain(X)
    for column in ("ash", 2, np.int64(2)):
        listed = column if isinstance(column, (str, int)) else [column]
        g = net.explain(X, basis={"powder": listed})
        assert g.feature_names[2] == "powder"
        np.testing.assert_allclose(g.values, e.values, rtol=1e-12)
        np.testing.assert_allclose(g.break_even, e.break_even, rtol=1e-12)


def test_groups_of_categories() -> None:
    frame = pd.DataFrame(
        {"city": ["Bern", "Oslo", "Rome"] * 20, "age": np.linspace(20, 70, 60), "pay": np.arange(60.0) ** 1.5}
    )
    front = ColumnTransformer(
        [("a", OneHotEncoder(sparse_output=False), ["city"]), ("b", StandardScaler(), ["age", "pay"])]
    )
    net = neuralize(make_pipeline(front, KMeans(3, n_init=1, random_state=0)).fit(frame))
    e, g = net.explain(frame), net.explain(frame, basis={"who": ["city", "age"]})
    np.testing.assert_allclose(g.values, np.column_stack([e.values[:, 0] + e.values[:, 1], e.values[:, 2]]))
    with pytest.raises(UnsupportedEstimatorError, match="numbers"):
        net.explain(frame, basis=Basis(np.eye(3)))


BAD_GROUPS: list[tuple[Any, type[Exception], str]] = [
    ({"a": ["hue"]}, ColumnError, "'hue'"),
    ({"a": [6]}, ColumnError, "does not exist"),
    ({"a": [-1]}, ColumnError, "does not exist"),
    ({"a": [0, 1], "b": [1]}, ColumnError, "two groups"),
    ({"a": [0, 0]}, ColumnError, "two groups"),
    ({"a": []}, ColumnError, "empty"),
    ({"ash": [0, 1]}, ColumnError, "'ash'"),
    ({"1": [0], 1: [1]}, ColumnError, "'1'"),
    ([[0, 1]], InputError, "neither groups"),
]


@pytest.mark.parametrize(("groups", "kind", "words"), BAD_GROUPS)
def test_groups_that_say_nothing_clear(groups: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        neuralize(fitted("k-means")).explain(rows(), basis=groups)


def test_a_group_may_take_the_name_of_its_own_column() -> None:
    g = neuralize(fitted("k-means")).explain(rows(), basis={"ash": ["ash", "magnesium"]})
    assert g.feature_names == ("alcohol", "malic_acid", "ash", "alcalinity_of_ash", "total_phenols")


# ---------------------------------------------------------------------- complete bases


def bases() -> dict[str, Basis]:
    rng = np.random.default_rng(3)
    X, _ = wine()
    return {
        "rotation": Basis(ortho_group.rvs(D, random_state=0)),
        "any invertible matrix": Basis(rng.normal(size=(D, D)) + np.eye(D)),
        "units of measurement": Basis(np.diag([1000.0, 1.0, 0.01, 5.0, 1.0, 2.0])),
        "principal axes": principal(X),
        "cosines": dct((2, 3)),
    }


@pytest.mark.parametrize("basis", bases())
@pytest.mark.parametrize("name", MODELS)
def test_values_in_another_basis(name: str, basis: str) -> None:
    """The network on the coordinates is the same function; relevance is that of a linear layer in front."""
    net, X, B = neuralize(fitted(name)), rows(), bases()[basis]
    coordinates = X.to_numpy() @ B.matrix.T
    np.testing.assert_allclose(B.coordinates(X.to_numpy()), coordinates)
    other = net.on(B)
    np.testing.assert_allclose(other(coordinates).numpy(), net(X).numpy(), rtol=1e-7, atol=1e-7)
    for question in QUESTIONS:
        e, plain = net.explain(X, basis=B, **question), net.explain(X, **question)
        conserves(e)
        assert e.feature_names == B.names
        np.testing.assert_allclose(e.data, coordinates)
        np.testing.assert_allclose(e.output, plain.output, rtol=1e-7, atol=1e-7)
        total = e.values.sum(1) + e.residual - plain.residual - plain.values.sum(1)
        assert (
            np.abs(total) <= 1e-7 * (np.abs(e.values).sum(1) + np.abs(plain.values).sum(1) + np.abs(e.residual))
        ).all()
        # the network on the coordinates, asked itself
        np.testing.assert_allclose(other.explain(coordinates, **question).values, e.values, rtol=1e-9)


@pytest.mark.parametrize("basis", bases())
def test_values_by_hand(basis: str) -> None:
    """c = C x, x = W c: a linear unit w of the columns is W'w of the coordinates, and midpoints move along."""
    B, pipe, table = bases()[basis], fitted("k-means"), rows().to_numpy()
    scaler = oracle.scaler_way(pipe[0])
    inner = oracle.Way(B.synthesis, np.zeros(D), B.matrix, np.zeros(D)).then(scaler)
    mu = pipe[-1].cluster_centers_
    e = neuralize(pipe).explain(table, target=2, rule="undivided", beta=0.3, basis=B)
    for i, x in enumerate(table):
        z = scaler.to(x)
        pairs = oracle.rivals(
            2, 4, lambda c, k, z=z: oracle.Pair(inner.unit(z, 2 * (mu[c] - mu[k]), (mu[c] + mu[k]) / 2))
        )
        agree(e, i, oracle.hard(pairs, 0.3, False))
    # diagonal: only the units of the numbers change
    if basis == "units of measurement":
        plain = neuralize(pipe).explain(table, target=2, rule="undivided", beta=0.3)
        np.testing.assert_allclose(e.values, plain.values, rtol=1e-9)
        np.testing.assert_allclose(e.break_even, plain.break_even * np.diag(B.matrix), rtol=1e-7)
        np.testing.assert_allclose(e.slope * np.diag(B.matrix), plain.slope, rtol=1e-6)


@pytest.mark.parametrize("basis", bases())
@pytest.mark.parametrize("name", ["k-means", "bisecting", "linear discriminant", "logistic"])
def test_break_even_points_are_coordinates(name: str, basis: str) -> None:
    """Put into the coordinates, the others and the shares held, a break-even point silences its coordinate."""
    net, B, X = neuralize(fitted(name)), bases()[basis], rows()
    c, k = net.labels[1], net.labels[0]
    e = net.explain(X, target=c, contrast=k, basis=B)
    assert np.isfinite(e.break_even).all()
    np.testing.assert_allclose(
        e.slope * (e.data - e.break_even), e.values, rtol=1e-6, atol=1e-9 * np.abs(e.values).max()
    )
    for i, t in itertools.product(range(0, len(X), 3), range(D)):
        coordinates = e.data[i].copy()
        coordinates[t] = e.break_even[i, t]
        there = net.explain((B.synthesis @ coordinates)[None], target=c, contrast=k, basis=B)
        size = np.abs(there.values).sum() + np.abs(e.values[i]).sum()
        assert abs(there.values[0, t]) <= 1e-8 * size
        # a duel of two is a linear unit, and columns do not interact in it
        rest = np.arange(D) != t
        np.testing.assert_allclose(there.values[0, rest], e.values[i, rest], rtol=1e-6, atol=1e-8 * size)


def test_an_orthogonal_basis_and_back() -> None:
    Q = ortho_group.rvs(D, random_state=1)
    for name in ("k-means", "bisecting", "logistic", "linear discriminant"):
        net, X = neuralize(fitted(name)), rows().to_numpy()
        there = net.on(Basis(Q))
        back = there.on(Basis(Q.T))
        for question in QUESTIONS:
            a, b = net.explain(X, **question), back.explain(X, **question)
            size = np.abs(a.values).sum(1, keepdims=True)
            assert (np.abs(a.values - b.values) <= 1e-9 * size).all()
            np.testing.assert_allclose(a.break_even, b.break_even, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(back.predict(X), net.predict(X))


def test_cosines_and_axes() -> None:
    x = np.random.default_rng(0).normal(size=(3, 12))
    found = dct((3, 4)).coordinates(x)
    expected = scipy.fft.dctn(x.reshape(3, 3, 4), axes=(1, 2), norm="ortho").reshape(3, 12)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert dct((3, 4)).names[5] == "dct 1,1"
    X = wine()[0].to_numpy()
    B, pca = principal(X, 3), PCA(3).fit(X)
    np.testing.assert_allclose(np.abs(B.matrix), np.abs(pca.components_), atol=1e-9)
    np.testing.assert_allclose(B.matrix @ B.matrix.T, np.eye(3), atol=1e-12)
    # pictures: all of the relevance of a cluster of digits, as waves
    D8 = load_digits().data / 16
    net = neuralize(KMeans(10, n_init=1, random_state=0).fit(D8))
    e, w = net.explain(D8[:50]), net.explain(D8[:50], basis=dct((8, 8)))
    np.testing.assert_allclose(w.values.sum(1), e.values.sum(1), rtol=1e-9)
    np.testing.assert_allclose(w.output, e.output, rtol=1e-9)


# ---------------------------------------------------------------------- incomplete bases


INCOMPLETE = {
    "some axes": Basis(ortho_group.rvs(D, random_state=2)[:3], ["one", "two", "three"]),
    "oblique": Basis(np.random.default_rng(1).normal(size=(2, D))),
    "oblique, other synthesis": Basis(
        [[1.0, 0, 0, 0, 0, 0], [0, 1.0, 1.0, 0, 0, 0]], synthesis=[[1, 0], [0, 1], [0, 0], [0, 0], [0.5, 0], [0, 2.0]]
    ),
}


@pytest.mark.parametrize("basis", INCOMPLETE)
@pytest.mark.parametrize("name", MODELS)
def test_what_lies_outside(name: str, basis: str) -> None:
    """x = W c + r: coordinates get (C d)_c (W'g)_c, and what r gets, sum ((1 - W C) d)_t g_t, is outside the basis."""
    net, X, B = neuralize(fitted(name)), rows(), INCOMPLETE[basis]
    for question in QUESTIONS:
        e, plain = net.explain(X, basis=B, **question), net.explain(X, **question)
        conserves(e)
        assert e.values.shape == (len(X), len(B.names))
        assert e.feature_names == B.names
        assert "constant columns" not in e.residual_parts
        outside = e.residual_parts["outside the basis"]
        others = {n: part for n, part in e.residual_parts.items() if n not in ("outside the basis", "normaliser")}
        for part, values in others.items():
            np.testing.assert_allclose(values, plain.residual_parts[part], rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(e.output, plain.output, rtol=1e-7, atol=1e-7)
        size = np.abs(e.values).sum(1) + np.abs(outside) + np.abs(plain.values).sum(1) + np.abs(e.residual)
        gap = e.values.sum(1) + e.residual - plain.values.sum(1) - plain.residual
        assert (np.abs(gap) <= 1e-8 * size).all()


@pytest.mark.parametrize("basis", INCOMPLETE)
def test_outside_in_closed_form(basis: str) -> None:
    B, table = INCOMPLETE[basis], rows().to_numpy()
    left = np.eye(D) - B.synthesis @ B.matrix
    for name in ("k-means", "logistic"):
        pipe = fitted(name)
        scaler = oracle.scaler_way(pipe[0])
        e = neuralize(pipe).explain(table, target=1, contrast=0, basis=B)
        for i, x in enumerate(table):
            if name == "k-means":
                mu = pipe[-1].cluster_centers_
                w, m = 2 * (mu[1] - mu[0]), (mu[0] + mu[1]) / 2
            else:
                w, m = pipe[-1].coef_[1] - pipe[-1].coef_[0], np.zeros(D)
            delta, g = x - scaler.back(m), scaler.T.T @ w
            values = (B.matrix @ delta) * (B.synthesis.T @ g)
            size = np.abs(values).sum() + np.abs(delta * g).sum()
            np.testing.assert_allclose(e.values[i], values, rtol=1e-9, atol=1e-9 * size)
            np.testing.assert_allclose(
                e.residual_parts["outside the basis"][i], (left @ delta) @ g, rtol=1e-9, atol=1e-9 * size
            )


def test_rows_inside_an_orthogonal_basis_leave_only_what_the_prototypes_leave() -> None:
    """If rows and prototypes lie in the span, nothing is outside."""
    rng = np.random.default_rng(0)
    Q = ortho_group.rvs(D, random_state=2)[:2]
    X = rng.normal(size=(80, 2)) @ Q
    net = neuralize(KMeans(3, n_init=1, random_state=0).fit(X))
    e = net.explain(X, basis=Basis(Q))
    np.testing.assert_allclose(e.residual_parts["outside the basis"], 0, atol=1e-12)
    conserves(e)
    flat = neuralize(KMeans(3, n_init=1, random_state=0).fit(X @ Q.T))
    np.testing.assert_allclose(np.abs(e.values).sum(), np.abs(flat.explain(X @ Q.T).values).sum(), rtol=1e-6)


def test_bad_bases() -> None:
    net = neuralize(fitted("k-means"))
    for matrix, words in (
        ([[1.0, 2, 3, 4, 5, 6], [2.0, 4, 6, 8, 10, 12]], "full rank"),
        (np.ones((7, 6)), "full rank"),
        ([[math.nan] * 6], "finite"),
        ([1.0, 2.0], "finite matrix"),
    ):
        with pytest.raises(InputError, match=words):
            Basis(matrix)
    with pytest.raises(InputError, match="name per coordinate"):
        Basis(np.eye(3), ["a"])
    with pytest.raises(InputError, match="full rank"):
        Basis(np.eye(3), synthesis=np.zeros((3, 3)))
    with pytest.raises(ColumnError, match="other columns"):
        net.explain(rows(), basis=Basis(np.eye(4)))
    with pytest.raises(ColumnError, match="other columns"):
        Basis(np.eye(4)).coordinates(rows().to_numpy())


def test_batches_and_files_know_the_basis(tmp_path: Any) -> None:
    net, X, B = neuralize(fitted("k-means")), rows(), INCOMPLETE["oblique"]
    e = net.explain(X, basis=B)
    parts = list(net.explain_batches(X, basis=B, batch_size=5))
    np.testing.assert_allclose(np.vstack([p.values for p in parts]), e.values, rtol=1e-9)
    np.testing.assert_allclose(
        np.concatenate([p.residual_parts["outside the basis"] for p in parts]), e.residual_parts["outside the basis"]
    )
    again = type(e).load(e.save(tmp_path / "e.npz"))
    np.testing.assert_array_equal(again.residual_parts["outside the basis"], e.residual_parts["outside the basis"])
    np.testing.assert_array_equal(again.break_even, e.break_even)
