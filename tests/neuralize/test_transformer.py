"""RelevanceTransformer: values against a loop, and the contract of scikit-learn's transformers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn
from sklearn.base import clone
from sklearn.cluster import DBSCAN, KMeans
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import check_estimator

from lrp import errors
from neuralize import neuralize
from neuralize.transformer import RelevanceTransformer


def pipe(k: int = 3) -> Pipeline:
    return make_pipeline(StandardScaler(), KMeans(k, n_init=1, random_state=0))


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("contrast", [None, 2])
def test_values_equal_the_loop(wine: pd.DataFrame, materialised: Callable[..., Any], contrast: int | None) -> None:
    train, test = wine[::2], wine[1::2]
    target = None if contrast is None else 1
    found = RelevanceTransformer(pipe(4), target=target, contrast=contrast).fit(train).transform(test)
    fitted = pipe(4).fit(train)
    mu = fitted[-1].cluster_centers_
    own = []
    for z in fitted[0].transform(train):
        d = ((z - mu) ** 2).sum(1)
        own.append(np.diff(np.sort(d))[0])
    beta = 1 / np.mean(own)
    Z, labels = fitted[0].transform(test), fitted.predict(test)
    for R, z, c in zip(found, Z, labels if target is None else [target] * len(Z), strict=True):
        expected, _, output = materialised(z, mu, int(c), beta, divided=contrast is None, contrast=contrast)
        np.testing.assert_allclose(R, expected, rtol=0, atol=1e-9 * np.abs(expected).sum())
        # a contrast and the divided rule leave nothing to a residual
        assert abs(R.sum() - output) < 1e-9 * np.abs(R).sum()


def test_a_row_is_the_same_alone_and_in_a_batch(wine: pd.DataFrame) -> None:
    found = RelevanceTransformer(pipe(), rule="undivided").fit(wine[:100])
    whole = found.transform(wine)
    for i in (0, 99, 177):
        np.testing.assert_allclose(found.transform(wine[i : i + 1])[0], whole[i], rtol=1e-12, atol=1e-12)
    # beta is that of the rows of fit: explained without reference, it is another
    fitted = pipe().fit(wine[:100])
    assert found.net_.explain(wine, rule="undivided").beta == neuralize(fitted, wine[:100]).explain(wine).beta
    assert found.net_.explain(wine, rule="undivided").beta != neuralize(fitted, wine).explain(wine).beta


def test_precision(wine: pd.DataFrame) -> None:
    X = wine.to_numpy()
    wide = RelevanceTransformer(pipe()).fit(X).transform(X)
    for rows in (X.astype(np.float32), wine.astype(np.float32)):
        narrow = RelevanceTransformer(pipe()).fit(rows).transform(rows)
        assert narrow.dtype == np.float32
        np.testing.assert_allclose(narrow, wide, rtol=0, atol=1e-4 * np.abs(wide).max())
    assert wide.dtype == np.float64
    assert RelevanceTransformer(pipe()).fit(X).transform(np.rint(X).astype(int)).dtype == np.float64


def test_means_per_cluster() -> None:
    # more rows than a batch holds
    X = np.random.default_rng(0).normal(size=(20_000, 2))
    found = RelevanceTransformer(KMeans(5, n_init=1, random_state=0)).fit(X)
    R, labels = found.transform(X), found.clusterer_.labels_
    assert found.by_cluster_.index.tolist() == [0, 1, 2, 3, 4]
    for c in range(5):
        np.testing.assert_allclose(found.by_cluster_.loc[c, "mean"], R[labels == c].mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.by_cluster_.loc[c, "magnitude"], np.abs(R[labels == c]).mean(0), rtol=1e-9)
    expected = neuralize(found.clusterer_, X).explain(X).by_cluster()
    pd.testing.assert_frame_equal(found.by_cluster_, expected, rtol=1e-9)


def test_sparse_rows() -> None:
    rng = np.random.default_rng(0)
    X = scipy.sparse.random_array((80, 50), density=0.2, rng=rng, format="csr")
    clusterer = KMeans(3, n_init=1, random_state=0)
    dense = RelevanceTransformer(clusterer).fit_transform(X.toarray())
    found = RelevanceTransformer(clusterer).fit(X).transform(X)
    assert scipy.sparse.issparse(found)
    assert found.shape == (80, 50)
    assert np.diff(found.indptr).max() == 32
    kept = found.toarray()
    np.testing.assert_allclose(kept[kept != 0], dense[kept != 0], rtol=1e-9)
    whole = RelevanceTransformer(clusterer, top=None).fit(X).transform(X)
    np.testing.assert_allclose(whole, dense, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ scikit-learn's contract


@pytest.mark.parametrize(
    "clusterer",
    [
        None,
        KMeans(3, n_init=1, random_state=0),
        make_pipeline(StandardScaler(), KMeans(2, n_init=1, random_state=0)),
        GaussianMixture(2, random_state=0),
    ],
    ids=["default", "k-means", "pipeline", "mixture"],
)
def test_check_estimator(clusterer: Any) -> None:
    results = check_estimator(RelevanceTransformer(clusterer), on_skip=None)
    skipped = {r["check_name"] for r in results if r["status"] != "passed"}
    # array API: needs SCIPY_ARRAY_API before scipy is imported, and we don't claim to support it
    assert skipped <= {"check_array_api_input"}
    assert len(results) > 40


def test_names_and_frames(wine: pd.DataFrame) -> None:
    wine = wine.set_axis([f"bottle {i}" for i in range(len(wine))])
    found = RelevanceTransformer(pipe()).set_output(transform="pandas").fit(wine)
    assert list(found.feature_names_in_) == list(found.get_feature_names_out()) == list(wine.columns)
    out = found.transform(wine[5:9])
    assert isinstance(out, pd.DataFrame)
    assert out.index.tolist() == ["bottle 5", "bottle 6", "bottle 7", "bottle 8"]
    assert list(out.columns) == list(wine.columns)
    assert found.transform(wine[:0]).shape == (0, 13)
    with pytest.raises(ValueError, match="feature names"):
        found.transform(wine[wine.columns[::-1]])
    unnamed = RelevanceTransformer(pipe()).fit(wine.to_numpy())
    with pytest.raises(ValueError, match="expecting 13 features"):
        unnamed.transform(wine.to_numpy()[:, :5])
    assert not hasattr(unnamed, "feature_names_in_")
    assert unnamed.get_feature_names_out()[:2].tolist() == ["x0", "x1"]


def test_inside_pipelines_and_column_transformers(wine: pd.DataFrame) -> None:
    y = pipe().fit(wine).predict(wine)
    model = make_pipeline(RelevanceTransformer(pipe()), LogisticRegression(max_iter=2000)).fit(wine, y)
    # relevances tell clusters apart only through their reasons, yet well
    assert model.score(wine, y) > 0.8
    assert list(model[0].get_feature_names_out()) == list(wine.columns)
    some = list(wine.columns[:4])
    both = ColumnTransformer(
        [("why", RelevanceTransformer(pipe()), some), ("raw", "passthrough", ["proline"])],
    ).set_output(transform="pandas")
    out = both.fit_transform(wine)
    assert list(out.columns) == [*(f"why__{c}" for c in some), "raw__proline"]
    alone = RelevanceTransformer(pipe()).fit_transform(wine[some])
    np.testing.assert_array_equal(out.to_numpy()[:, :4], alone)


def test_categories_get_relevances_too() -> None:
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"colour": rng.choice(["red", "green", "blue"], 120), "size": rng.normal(size=120)})
    X.loc[X.colour == "red", "size"] += 5
    encode = make_column_transformer((OneHotEncoder(), ["colour"]), (StandardScaler(), ["size"]))
    clusterer = make_pipeline(encode, KMeans(3, n_init=3, random_state=0))
    found = RelevanceTransformer(clusterer).set_output(transform="pandas").fit(X)
    out = found.transform(X)
    assert list(out.columns) == ["colour", "size"]
    ex = neuralize(clusterer.fit(X), X).explain(X)
    np.testing.assert_array_equal(out, ex.values)
    np.testing.assert_allclose(out.sum(axis=1), ex.output, rtol=1e-9)
    with pytest.raises(errors.InputError, match="has not seen in fit"):
        found.transform(X.replace("red", "pink"))


def test_parameters_copies_and_pickles(wine: pd.DataFrame) -> None:
    found = RelevanceTransformer(KMeans(3, n_init=1, random_state=0), beta=2.0, rule="undivided")
    assert found.get_params()["clusterer__n_clusters"] == 3
    found.set_params(clusterer__n_clusters=4, rule="auto")
    again = clone(found)
    assert again.clusterer is not found.clusterer
    assert again.clusterer.n_clusters == 4
    found.fit(wine)
    assert len(found.by_cluster_) == 4
    assert not hasattr(found.clusterer, "cluster_centers_")
    loaded = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(loaded.transform(wine), found.transform(wine))
    with pytest.raises(NotFittedError):
        clone(found).transform(wine)


def test_a_frozen_clusterer_is_not_fitted_again(wine: pd.DataFrame) -> None:
    fitted = pipe().fit(wine[:100])
    found = RelevanceTransformer(FrozenEstimator(fitted), rule="undivided").fit(wine)
    assert clone(found).fit(wine).clusterer_.estimator is fitted
    np.testing.assert_array_equal(
        found.transform(wine), neuralize(fitted, reference=wine).explain(wine, rule="undivided").values
    )
    with pytest.raises(errors.ColumnError, match="another order"):
        clone(found).fit(wine[wine.columns[::-1]])
    with pytest.raises(NotFittedError):
        RelevanceTransformer(FrozenEstimator(pipe())).fit(wine)


def test_classifiers_and_weights(wine: pd.DataFrame) -> None:
    y = np.repeat(["a", "b", "c"], [59, 71, 48])
    svc = make_pipeline(StandardScaler(), SVC(gamma=0.05))
    found = RelevanceTransformer(svc, target="a", contrast="b").fit(wine, y)
    expected = neuralize(svc.fit(wine, y), wine).explain(wine, target="a", contrast="b")
    np.testing.assert_array_equal(found.transform(wine), expected.values)
    with pytest.raises(ValueError, match="requires y"):
        RelevanceTransformer(svc).fit(wine)
    # weights reach the clusterer, by either of scikit-learn's ways
    w = np.r_[np.ones(100), np.zeros(78)]
    clusterer = KMeans(3, n_init=1, random_state=0)
    expected = clone(clusterer).fit(wine, sample_weight=w).cluster_centers_
    direct = RelevanceTransformer(clusterer).fit(wine, sample_weight=w)
    np.testing.assert_array_equal(direct.clusterer_.cluster_centers_, expected)
    with sklearn.config_context(enable_metadata_routing=True):
        routed = RelevanceTransformer(clone(clusterer).set_fit_request(sample_weight=True))
        plain = StandardScaler(with_mean=False, with_std=False).set_fit_request(sample_weight=False)
        model = make_pipeline(plain, routed)
        model.fit(wine, sample_weight=w)
    np.testing.assert_allclose(model[-1].clusterer_.cluster_centers_, expected)
    assert not np.allclose(clone(clusterer).fit(wine).cluster_centers_, expected)


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"clusterer": DBSCAN()}, errors.UnsupportedEstimatorError, "no predict"),
        ({"clusterer": KMeans(1)}, errors.ConvergenceError, "K = 1"),
        ({"target": 7}, errors.TargetError, "does not exist"),
        ({"rule": "bisected"}, errors.RuleError, "bisected"),
        ({"beta": -1.0}, errors.RuleError, "beta"),
        ({"output": "probability"}, errors.RuleError, "output"),
        ({"top": 0}, errors.InputError, "top"),
    ],
)
def test_questions_without_answer_are_refused_in_fit(
    wine: pd.DataFrame, changed: dict[str, Any], error: type[Exception], says: str
) -> None:
    found = RelevanceTransformer(pipe()).set_params(**changed)
    with pytest.raises(error, match=says):
        found.fit(wine)


def test_missing_cells_are_named(wine: pd.DataFrame) -> None:
    found = RelevanceTransformer(pipe()).fit(wine)
    hole = wine.copy()
    hole.loc[3, "proline"] = np.nan
    with pytest.raises(errors.NonFiniteError, match="row 3 on, in column 'proline'"):
        found.transform(hole)
