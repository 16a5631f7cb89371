"""``net.counterfactual`` behind real estimators and pipelines: the estimator agrees, and no row around is nearer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import Birch, BisectingKMeans, KMeans
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, SVR, LinearSVC

from lrp import errors
from neuralize import neuralize
from neuralize._affine import affine_of
from neuralize.counterfactuals import Counterfactuals, UnreachableError

_KM = KMeans(3, n_init=2, random_state=0)
CASES: dict[str, Any] = {
    "k-means": _KM,
    "k-means robust": make_pipeline(RobustScaler(), _KM),
    "k-means pca": make_pipeline(StandardScaler(), PCA(3, whiten=True), _KM),
    "k-means power": make_pipeline(PowerTransformer(), _KM),
    "k-means scaled, power": make_pipeline(MinMaxScaler((0.5, 3)), PowerTransformer("box-cox"), _KM),
    "k-means power pca": make_pipeline(PowerTransformer(), PCA(4), _KM),
    "k-means log, scaled": make_pipeline(FunctionTransformer(np.log1p), StandardScaler(), _KM),
    "k-means min-max clipped": make_pipeline(MinMaxScaler(clip=True), _KM),
    "bisecting": make_pipeline(StandardScaler(), BisectingKMeans(5, random_state=0)),
    "birch": make_pipeline(StandardScaler(), Birch(threshold=2.0, n_clusters=3)),
    "nearest centroid": make_pipeline(StandardScaler(), NearestCentroid()),
    "logistic": make_pipeline(StandardScaler(), LogisticRegression()),
    "ridge": make_pipeline(StandardScaler(), RidgeClassifier()),
    "linear svc": make_pipeline(MinMaxScaler(), LinearSVC(random_state=0)),
    "lda": LinearDiscriminantAnalysis(),
    "columns": make_pipeline(
        ColumnTransformer(
            [("a", PowerTransformer(), [0, 1, 2, 3]), ("b", StandardScaler(), [12, 5, 6]), ("c", "passthrough", [7])]
        ),
        _KM,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def asked(request: pytest.FixtureRequest) -> tuple[Any, Any, np.ndarray]:
    from sklearn.base import clone
    from sklearn.datasets import load_wine

    X, y = load_wine(return_X_y=True)
    fitted = clone(CASES[request.param]).fit(X, y)
    return fitted, neuralize(fitted), X


def nothing_nearer(fitted: Any, net: Any, found: Counterfactuals, to: Any, X: np.ndarray) -> None:
    """No sample within the distance has the label: rows around, and the way there."""
    affine = affine_of(net.front)
    rng = np.random.default_rng(0)
    if affine.transform is None:

        def up(x):
            return x

        def down(u):
            return u
    else:
        up, down = affine.transform, affine.inverse
    scale = up(X).std(0)
    for i in range(len(found)):
        if not found.distance[i]:
            continue
        u = up(found.data[i : i + 1])
        step = rng.normal(size=(600, X.shape[1]))
        step *= rng.uniform(0, 1, size=(600, 1)) / np.linalg.norm(step, axis=1, keepdims=True)
        way = (up(found.rows[i : i + 1]) - u) / scale
        assert np.linalg.norm(way) == pytest.approx(found.distance[i], rel=1e-6, abs=1e-9)
        # near the way there a better row would show first
        near = way * rng.uniform(0.9, 1, size=(600, 1)) + 0.1 * step * found.distance[i]
        near *= np.minimum(1, found.distance[i] / np.linalg.norm(near, axis=1, keepdims=True))
        v = np.vstack([step * found.distance[i], near]) * (1 - 2e-5)
        rows = down(u + v * scale)
        rows = rows[np.isfinite(rows).all(1)]
        labels = fitted.predict(rows)
        assert (labels == found.old[i]).all() if to is None else not (labels == to).any()


def test_the_estimator_agrees_and_nothing_is_nearer(asked: Any) -> None:
    fitted, net, X = asked
    rows = X[::13]
    for to in (None, *np.unique(net.labels)[:2]):
        found = net.counterfactual(rows, to, reference=X)
        np.testing.assert_array_equal(fitted.predict(found.rows), found.new)
        np.testing.assert_array_equal(fitted.predict(rows), found.old)
        assert (found.new == to).all() if to is not None else (found.new != found.old).all()
        assert found.exact.all()
        assert found.kind == net.kind
        if ("clipped" not in str(net) and net.front.hides is False) or to is None:
            nothing_nearer(fitted, net, found, to, X)


def test_bounds_and_fixed_columns_hold(asked: Any) -> None:
    fitted, net, X = asked
    rows, still = X[::17], [1, 12]
    for i in range(len(rows)):
        try:
            found = net.counterfactual(rows[i : i + 1], reference=X, bounds="data", fixed=still)
        except UnreachableError:
            continue
        np.testing.assert_array_equal(found.rows[:, still], rows[i : i + 1, still])
        assert (found.rows >= np.minimum(X.min(0), rows[i])).all()
        assert (found.rows <= np.maximum(X.max(0), rows[i])).all()
        assert fitted.predict(found.rows)[0] == found.new[0] != found.old[0]


def test_without_a_reference_the_scalers_measure(wine: pd.DataFrame) -> None:
    fitted = make_pipeline(StandardScaler(), PCA(3), _KM).fit(wine)
    net = neuralize(fitted)
    ours, theirs = net.counterfactual(wine[:20]), net.counterfactual(wine[:20], reference=wine)
    assert ours.unit == "units of StandardScaler"
    # a StandardScaler's units are the standard deviations
    np.testing.assert_allclose(ours.distance, theirs.distance, rtol=1e-9)
    assert ours.to_frame().columns.tolist() == wine.columns.tolist()


@pytest.mark.parametrize(
    ("estimator", "word"),
    [
        (GaussianMixture(2, random_state=0), "GaussianMixture has borders that are curved"),
        (SVC(), "SVC has borders that are curved"),
        (SVR(), "SVR gives a number"),
        (KernelDensity(), "KernelDensity gives a number"),
    ],
)
def test_curved_borders_and_regressions_are_refused(wine: pd.DataFrame, estimator: Any, word: str) -> None:
    net = neuralize(estimator.fit(wine, np.arange(len(wine)) % 2))
    with pytest.raises(errors.UnsupportedEstimatorError, match=word):
        net.counterfactual(wine[:3])


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (PolynomialFeatures(2), "multiplies columns"),
        (Normalizer(), "is not affine"),
        (QuantileTransformer(n_quantiles=50), "jumps where values repeat"),
        (make_column_transformer((PowerTransformer(), [0, 1]), (StandardScaler(), [1, 2])), "goes in twice"),
    ],
)
def test_columns_that_can_not_be_moved_are_named(wine: pd.DataFrame, step: Any, why: str) -> None:
    X = wine.iloc[:, [0, 4, 12]].round(1)
    fitted = make_pipeline(step, KMeans(2, n_init=1, random_state=0)).fit(X)
    net = neuralize(fitted)
    with pytest.raises(errors.UnsupportedEstimatorError, match=why):
        net.counterfactual(X[:3])


def test_the_other_columns_can_be_moved(wine: pd.DataFrame) -> None:
    X = wine.iloc[:, [0, 4, 12]]
    step = make_column_transformer((PolynomialFeatures(2), [0, 1]), (StandardScaler(), [2]))
    fitted = make_pipeline(step, StandardScaler(), KMeans(2, n_init=1, random_state=0)).fit(X)
    net = neuralize(fitted)
    found = net.counterfactual(X[:30], reference=X, fixed=["alcohol", "magnesium"])
    np.testing.assert_array_equal(fitted.predict(found.to_frame()), found.new)
    assert (found.new != found.old).all()
    np.testing.assert_array_equal(found.changed, np.tile([False, False, True], (30, 1)))
    # one column moves, so that its value is where the label changes
    for share, same in ((1 - 1e-4, True), (1.0, False)):
        half = X[:30].assign(proline=X["proline"][:30] + share * (found.rows[:, 2] - X["proline"][:30]))
        assert ((fitted.predict(half) == found.old) == same).all()


def test_a_quantile_transformer_without_ties() -> None:
    rng = np.random.default_rng(0)
    X = rng.lognormal(size=(200, 3))
    for output in ("uniform", "normal"):
        steps = QuantileTransformer(n_quantiles=200, output_distribution=output), KMeans(3, n_init=2, random_state=0)
        fitted = make_pipeline(*steps).fit(X)
        net = neuralize(fitted)
        found = net.counterfactual(X[:40], reference=X)
        np.testing.assert_array_equal(fitted.predict(found.rows), found.new)
        assert (found.new != found.old).all()
        assert "after QuantileTransformer" in found.metric
        held = net.counterfactual(X[:40], 1, reference=X, bounds="data")
        np.testing.assert_array_equal(fitted.predict(held.rows), 1)
        assert (held.rows >= X.min(0)).all()
        assert (held.rows <= X.max(0)).all()


def test_numbers_read_as_categories_stay() -> None:
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.integers(0, 4, 200), rng.normal(size=(200, 2))])
    y = (X[:, 0] == 2) + X[:, 1] + 0.3 * X[:, 0] > 1
    # column 0 counts as a number and as a category: between 1 and 2 it is neither
    step = make_column_transformer((OneHotEncoder(), [0]), (StandardScaler(), [0, 1, 2]))
    fitted = make_pipeline(step, LogisticRegression()).fit(X, y.astype(int))
    net = neuralize(fitted)
    found = net.counterfactual(X[:50], reference=X)
    np.testing.assert_array_equal(fitted.predict(found.rows), found.new)
    np.testing.assert_array_equal(found.rows[:, 0], X[:50, 0])
    W = fitted[-1].coef_[0, 5:] / fitted[0].named_transformers_["standardscaler"].scale_[1:]
    far = np.abs(fitted.decision_function(X[:50])) / np.sqrt(((W * X.std(0)[1:]) ** 2).sum())
    np.testing.assert_allclose(found.distance, far, rtol=1e-5)


def test_mixed_tables() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "income": rng.normal(3000, 800, 300),
            "job": rng.choice(["none", "part", "full"], 300),
            "grade": rng.choice([1, 2, 5], 300),
            "member": rng.choice([True, False], 300),
            "age": rng.integers(18, 70, 300).astype(float),
        }
    )
    worth = frame["income"] / 800 + 2 * (frame["job"] == "full") + frame["member"] + frame["grade"] / 5
    y = np.where(worth > worth.median(), "yes", "no")
    frame.loc[::11, "age"] = np.nan
    columns = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["income", "age"]),
        (OneHotEncoder(handle_unknown="ignore"), ["job", "grade", "member"]),
        sparse_threshold=0,
    )
    fitted = make_pipeline(columns, LogisticRegression(max_iter=500)).fit(frame, y)
    net = neuralize(fitted)
    rows = frame[:60]
    free = net.counterfactual(rows, "yes", reference=frame, integers=["age"])
    np.testing.assert_array_equal(fitted.predict(free.to_frame().astype(frame.dtypes)), "yes")
    for name in ("job", "grade", "member"):
        assert free.to_frame()[name].tolist() == rows[name].tolist()
    # what is missing stays missing
    np.testing.assert_array_equal(np.isnan(free.rows[:, 4]), rows["age"].isna())
    coded = [name for name in ("job", "grade", "member") if name in net.schema.categories]
    assert "job" in coded
    job = net.counterfactual(rows, "yes", reference=frame, change=coded)
    np.testing.assert_array_equal(fitted.predict(job.to_frame().astype(frame.dtypes)), "yes")
    assert (job.distance <= net.counterfactual(rows, "yes", reference=frame).distance * (1 + 1e-9)).all()
    assert (job.to_frame()["job"] != rows["job"]).any()
    text = " ".join(job.sentence(i) for i in range(60))
    assert "job none -> full" in text
