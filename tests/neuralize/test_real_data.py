"""Whole workflows on real tables, with their missing values, categories and units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import Birch, BisectingKMeans, KMeans
from sklearn.compose import ColumnTransformer, make_column_selector, make_column_transformer
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, OneClassSVM

from neuralize import KernelKMeans, describe, neuralize

pytestmark = [pytest.mark.data, pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")]
Read = Callable[..., pd.DataFrame]


def checked(fitted: Any, X: Any, y: Any = None) -> Any:
    """Decisions equal, books closed for every row; returns the explanation."""
    net = neuralize(fitted, reference=X)
    mine, theirs = net.predict(X), fitted.predict(X)
    assert (mine == theirs).mean() >= 1 - 1 / len(mine)  # one row in a table may lie on a border
    for options in ({}, {"target": net.labels[0]}):
        e = net.explain(X, **options)
        size = np.abs(e.values).sum(1) + sum(np.abs(p) for p in e.residual_parts.values())
        assert (np.abs(e.values.sum(1) + e.residual - e.output) <= 1e-9 * size).all()
        assert e.feature_names == tuple(X.columns)
    # a row by itself
    one = net.explain(X.iloc[[3]], target=net.labels[0])
    np.testing.assert_allclose(one.values[0], e.values[3], rtol=1e-9, atol=1e-9 * size[3])
    assert all(p.sentence for p in describe(e))
    return e


def wholesale(tabular: Read) -> pd.DataFrame:
    frame = tabular("wholesale_customers.csv")
    return frame.astype({"Channel": str, "Region": str})


def test_wholesale_customers(tabular: Read) -> None:
    frame = wholesale(tabular)
    spend = [c for c in frame if c not in ("Channel", "Region")]
    prepare = ColumnTransformer(
        [
            ("spend", make_pipeline(FunctionTransformer(np.log1p), StandardScaler()), spend),
            ("who", OneHotEncoder(), ["Channel", "Region"]),
        ]
    )
    e = checked(make_pipeline(prepare, KMeans(4, n_init=1, random_state=0)).fit(frame), frame)
    assert set(e.categories) == {"Channel", "Region"}
    known = ~np.isnan(e.break_even)
    assert known[:, [list(frame).index(c) for c in spend]].mean() > 0.9
    assert not known[:, [list(frame).index(c) for c in ("Channel", "Region")]].any()
    # through the logarithm: R = slope (x - point) in the units of the table
    t = list(frame).index("Grocery")
    line = e.slope[:, t] * (frame["Grocery"].to_numpy() - e.break_even[:, t])
    np.testing.assert_allclose(line[known[:, t]], e.values[known[:, t], t], rtol=1e-9, atol=1e-9)
    mixture = make_pipeline(
        make_column_transformer((PowerTransformer(), spend)), GaussianMixture(3, random_state=0)
    ).fit(frame)
    checked(mixture, frame)


def test_wheat_seeds(tabular: Read) -> None:
    frame = tabular("wheat-seeds.csv", header=None)
    X, y = frame.iloc[:, :-1].set_axis([f"m{t}" for t in range(7)], axis=1), frame.iloc[:, -1]
    checked(make_pipeline(StandardScaler(), KernelKMeans(3, gamma=0.05, n_init=1, random_state=0)).fit(X), X)
    checked(make_pipeline(RobustScaler(), PCA(3), Birch(threshold=0.3)).fit(X), X)
    checked(make_pipeline(QuantileTransformer(n_quantiles=50), GaussianNB()).fit(X, y), X)
    both = FeatureUnion([("pca", PCA(2, whiten=True)), ("squares", PolynomialFeatures(2, include_bias=True))])
    checked(make_pipeline(StandardScaler(), both, LogisticRegression()).fit(X, y), X)


def test_wine_quality(tabular: Read) -> None:
    frame = pd.concat([tabular(f"winequality-{c}.csv", header=None).iloc[::8] for c in ("red", "white")])
    frame = frame.reset_index(drop=True)
    X = frame.iloc[:, :-1].set_axis([f"q{t}" for t in range(11)], axis=1)
    y = np.where(frame.iloc[:, -1] > 5, "good", "bad")
    checked(make_pipeline(StandardScaler(), BisectingKMeans(6, random_state=0)).fit(X), X)
    checked(make_pipeline(StandardScaler(), SVC(gamma=0.1)).fit(X, y), X)
    e = checked(make_pipeline(StandardScaler(), OneClassSVM(nu=0.05, gamma=0.05)).fit(X), X)
    assert e.kind == "outlier"


def test_penguins_have_holes(tabular: Read) -> None:
    frame = tabular("penguins.csv")
    assert frame.isna().any().any()
    X, y = frame.drop(columns="species"), frame["species"]
    numbers, names = make_column_selector(dtype_include=float), make_column_selector(dtype_exclude=float)
    prepare = make_column_transformer(
        (make_pipeline(SimpleImputer(add_indicator=True), StandardScaler()), numbers),
        (make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(drop="if_binary")), names),
    )
    e = checked(make_pipeline(prepare, KMeans(3, n_init=1, random_state=0)).fit(X), X)
    assert np.isnan(e.data).any()
    e = checked(make_pipeline(prepare, PCA(5), KNeighborsClassifier(5)).fit(X, y), X)
    assert e.kind == "class"
    assert set(e.labels) == set(y)


def test_german_credit(tabular: Read) -> None:
    frame = tabular("german.csv", header=None)
    X, y = frame.iloc[:, :-1].set_axis([f"c{t}" for t in range(20)], axis=1), frame.iloc[:, -1]
    names = make_column_selector(dtype_exclude="number")
    prepare = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore", min_frequency=20), names), remainder=StandardScaler()
    )
    e = checked(make_pipeline(prepare, LogisticRegression(max_iter=500)).fit(X, y), X)
    assert len(e.categories) == len(names(X))
    unseen = X.head(3).copy()
    unseen.loc[0, names(X)[0]] = "never seen"
    fitted = make_pipeline(prepare, SVC(gamma=0.05)).fit(X, y)
    checked(fitted, X)
    assert (neuralize(fitted).predict(unseen) == fitted.predict(unseen)).all()
    ordinal = make_column_transformer((OrdinalEncoder(), names), remainder="passthrough")
    checked(make_pipeline(ordinal, StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(X), X)


def test_sonar(tabular: Read) -> None:
    frame = tabular("sonar.csv", header=None)
    X, y = frame.iloc[:, :-1].set_axis([f"band{t}" for t in range(60)], axis=1), frame.iloc[:, -1]
    fitted = make_pipeline(StandardScaler(), PCA(12, whiten=True), SVC()).fit(X, y)
    e = checked(fitted, X)
    # neighbouring bands measure the same: a group of them has the sum
    groups = {f"bands {a}-{a + 9}": [f"band{t}" for t in range(a, a + 10)] for a in range(0, 60, 10)}
    g = neuralize(fitted).explain(X, target="M", basis=groups)
    assert g.feature_names == tuple(groups)
    whole = neuralize(fitted).explain(X, target="M").values
    np.testing.assert_allclose(g.values, whole.reshape(len(X), 6, 10).sum(2), rtol=1e-9, atol=1e-9)
    assert e.labels.tolist() == ["M", "R"]
