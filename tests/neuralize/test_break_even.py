"""Break-even values do what they say: put into the row, they silence their column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KernelDensity, NearestCentroid
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, PowerTransformer, StandardScaler
from sklearn.random_projection import GaussianRandomProjection
from sklearn.svm import SVR

from neuralize import neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")

FRONTS: dict[str, list[Any]] = {
    "scaler": [StandardScaler()],
    "pca": [StandardScaler(), PCA(4)],
    "whitened pca": [StandardScaler(), PCA(4, whiten=True)],
    "all of a pca": [StandardScaler(), PCA(whiten=True)],
    "svd": [StandardScaler(), TruncatedSVD(3)],
    "random projection": [StandardScaler(), GaussianRandomProjection(5, random_state=0)],
    "lda": [StandardScaler(), LinearDiscriminantAnalysis()],
    "power and pca": [PowerTransformer(), PCA(5)],
    "logarithm and pca": [FunctionTransformer(np.log1p), StandardScaler(), PCA(3)],
    "logarithm": [FunctionTransformer(np.log1p), StandardScaler()],
}


@pytest.fixture(scope="module")
def wine() -> tuple[np.ndarray, np.ndarray]:
    return load_wine(return_X_y=True)


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.parametrize(
    "last",
    [KMeans(2, n_init=1, random_state=0), NearestCentroid(metric="manhattan"), LogisticRegression()],
    ids=["k-means", "manhattan", "linear"],
)
def test_a_column_at_its_break_even_value_is_silent(wine: Any, name: str, last: Any) -> None:
    """Contrasts of two: the shares can not move."""
    X, y = wine
    if isinstance(last, NearestCentroid) and name not in ("scaler", "logarithm"):
        pytest.skip("absolute distances do not pass projections")
    y = y > 0 if name != "lda" else y
    net = neuralize(make_pipeline(*FRONTS[name], last).fit(X, y))
    options = {"target": net.labels[1], "contrast": net.labels[0]}
    e = net.explain(X, **options)
    known = 0
    for i in range(0, len(X), 18):
        size = np.abs(e.values[i]).sum()
        for t in range(X.shape[1]):
            if np.isnan(e.break_even[i, t]):
                continue
            row = X[i].copy()
            row[t] = e.break_even[i, t]
            assert abs(net.explain(row[None], **options).values[0, t]) <= 1e-8 * size
            known += 1
    assert known > 60


def test_of_two_neutral_values_it_is_the_nearer_one(wine: Any) -> None:
    X, y = wine
    net = neuralize(make_pipeline(StandardScaler(), GaussianNB()).fit(X, y > 0))
    options = {"target": True, "contrast": False}
    e = net.explain(X[::9], **options)
    assert 0.3 < np.isfinite(e.break_even).mean() <= 1
    for i, x in enumerate(X[::9]):
        for t in range(13):
            point = e.break_even[i, t]
            # on the way from the value to the point the column does not change sides
            for share in (0.3, 0.7, 0.99):
                row = x.copy()
                row[t] = x[t] + share * ((X[:, t].max() + X[:, t].std() if np.isnan(point) else point) - x[t])
                value = net.explain(row[None], **options).values[0, t]
                assert np.sign(value) == np.sign(e.values[i, t]) or abs(value) < 1e-9


def test_where_there_is_none(wine: Any) -> None:
    X, y = wine
    density = neuralize(make_pipeline(StandardScaler(), KernelDensity(bandwidth=0.5)).fit(X))
    # a distance is never in favour: at best it is zero, where one member alone counts, and on it
    e = density.explain(X + 0.3 * X.std(0))
    assert np.isnan(e.break_even).mean() > 0.5
    assert (e.values <= 0).all()
    both = FeatureUnion([("pca", PCA(2)), ("all", StandardScaler())])
    e = neuralize(make_pipeline(StandardScaler(), both, KMeans(2, n_init=1, random_state=0)).fit(X)).explain(X)
    assert np.isnan(e.break_even).all()  # every column enters by two ways
    full = neuralize(make_pipeline(StandardScaler(), PCA(4, whiten=True), GaussianMixture(2, random_state=0)).fit(X))
    assert np.isnan(full.explain(X).break_even).all()  # a product of two mixed coordinates
    value = neuralize(make_pipeline(StandardScaler(), PCA(4, whiten=True), SVR()).fit(X, y))
    assert np.isnan(value.explain(X).break_even).all()
