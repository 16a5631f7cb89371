"""Fitted pipelines of scikit-learn over small real and made-up tables, and what the package makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import FeatureAgglomeration
from sklearn.compose import ColumnTransformer, make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine
from sklearn.decomposition import PCA, FactorAnalysis, FastICA, IncrementalPCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.feature_selection import RFE, SelectFromModel, SelectKBest, VarianceThreshold
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NeighborhoodComponentsAnalysis
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
    TargetEncoder,
)
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection

from neuralize import steps
from neuralize.fronts import Front
from neuralize.schema import Schema

Table = Any


def wine() -> pd.DataFrame:
    return load_wine(as_frame=True).data


def cancer() -> np.ndarray:
    return load_breast_cancer().data


def diabetes() -> np.ndarray:
    return load_diabetes().data


def iris() -> np.ndarray:
    return load_iris().data


def counts() -> np.ndarray:
    X = np.random.default_rng(3).poisson(0.7, (60, 9)).astype(float)
    X[5] = 0
    return X


def holes() -> np.ndarray:
    X = iris().copy()
    X[::7, 1] = np.nan
    X[3::11, 2] = np.nan
    return X


def customers() -> pd.DataFrame:
    """Strings with missing values, few integers, truth values, and numbers with missing ones."""
    rng = np.random.default_rng(7)
    n = 160
    frame = pd.DataFrame(
        {
            "colour": rng.choice(["blue", "green", "red", "violet"], n, p=[0.5, 0.3, 0.15, 0.05]),
            "age": rng.integers(18, 80, n).astype(float),
            "doors": rng.integers(1, 4, n),
            "member": rng.random(n) < 0.4,
            "income": rng.lognormal(10, 1, n),
            "city": pd.Categorical(rng.choice(["Rome", "Oslo", "Bern"], n)),
            "size": rng.choice(["S", "M", "L"], n),
        }
    )
    frame.loc[::13, "colour"] = None
    frame.loc[3::17, "age"] = np.nan
    return frame


def classes(X: Table) -> np.ndarray:
    """Some labels for supervised steps."""
    numbers = pd.DataFrame(X).select_dtypes("number")
    if not numbers.shape[1] or numbers.iloc[:, 0].nunique() < 4:
        return np.arange(len(X)) * 7 % 11 % 3
    return np.digitize(numbers.iloc[:, 0], np.nanquantile(numbers.iloc[:, 0], [0.3, 0.6]))


def dense(Z: Any) -> np.ndarray:
    return np.asarray(Z.toarray() if hasattr(Z, "toarray") else Z, dtype=np.float64)


# name -> (transformer, table); all are fitted on every second row and compared on all of them
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Table]]] = {
    "standard": (StandardScaler, wine),
    "standard, no mean, no std": (lambda: StandardScaler(with_mean=False, with_std=False), wine),
    "min-max": (lambda: MinMaxScaler((-1, 3)), wine),
    "min-max clipped": (lambda: MinMaxScaler(clip=True), cancer),
    "max-abs": (MaxAbsScaler, diabetes),
    "robust": (RobustScaler, cancer),
    "pca": (lambda: PCA(4), wine),
    "pca full": (lambda: PCA(), iris),
    "pca whitened": (lambda: PCA(3, whiten=True), cancer),
    "pca randomized": (lambda: PCA(3, svd_solver="randomized", random_state=0), cancer),
    "incremental pca": (lambda: IncrementalPCA(3, whiten=True), wine),
    "truncated svd": (lambda: TruncatedSVD(4, random_state=0), wine),
    "truncated svd arpack": (lambda: TruncatedSVD(4, algorithm="arpack", random_state=0), wine),
    "lda": (LinearDiscriminantAnalysis, wine),
    "lda one": (lambda: LinearDiscriminantAnalysis(n_components=1), wine),
    "lda eigen": (lambda: LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1), wine),
    "gaussian projection": (lambda: GaussianRandomProjection(4, random_state=0), wine),
    "gaussian projection with inverse": (
        lambda: GaussianRandomProjection(4, random_state=0, compute_inverse_components=True),
        wine,
    ),
    "sparse projection": (lambda: SparseRandomProjection(3, density=0.5, random_state=0), cancer),
    "factor analysis": (lambda: make_pipeline(StandardScaler(), FactorAnalysis(3)), wine),
    "ica": (lambda: make_pipeline(StandardScaler(), FastICA(3, random_state=0, whiten="unit-variance")), wine),
    "nca": (lambda: make_pipeline(StandardScaler(), NeighborhoodComponentsAnalysis(2, random_state=0)), iris),
    "agglomeration": (lambda: make_pipeline(StandardScaler(), FeatureAgglomeration(4)), wine),
    "k best": (lambda: SelectKBest(k=5), wine),
    "variance": (lambda: VarianceThreshold(1.0), wine),
    "from model": (
        lambda: make_pipeline(StandardScaler(), SelectFromModel(LogisticRegression(), max_features=4)),
        wine,
    ),
    "rfe": (lambda: make_pipeline(StandardScaler(), RFE(LogisticRegression(), n_features_to_select=3)), wine),
    "yeo-johnson": (PowerTransformer, diabetes),
    "yeo-johnson raw": (lambda: PowerTransformer(standardize=False), wine),
    "box-cox": (lambda: PowerTransformer("box-cox"), wine),
    "quantile": (lambda: QuantileTransformer(n_quantiles=37), wine),
    "quantile normal": (lambda: QuantileTransformer(n_quantiles=89, output_distribution="normal"), wine),
    "quantile with ties": (lambda: QuantileTransformer(n_quantiles=30, output_distribution="normal"), counts),
    "quantile of one": (lambda: QuantileTransformer(n_quantiles=1), iris),
    "quantile normal, no ties": (
        lambda: QuantileTransformer(n_quantiles=25, output_distribution="normal"),
        lambda: np.random.default_rng(0).normal(size=(90, 3)),
    ),
    "quantile, no ties": (
        lambda: QuantileTransformer(n_quantiles=25),
        lambda: np.random.default_rng(1).normal(size=(90, 3)),
    ),
    "log1p": (lambda: FunctionTransformer(np.log1p), counts),
    "log, then scale": (lambda: make_pipeline(FunctionTransformer(np.log), StandardScaler()), iris),
    "sqrt": (lambda: FunctionTransformer(np.sqrt), wine),
    "exp": (lambda: FunctionTransformer(np.exp), iris),
    "expm1": (lambda: FunctionTransformer(np.expm1), iris),
    "log2": (lambda: FunctionTransformer(np.log2), iris),
    "log10": (lambda: FunctionTransformer(np.log10), iris),
    "no function": (FunctionTransformer, iris),
    "polynomial": (lambda: PolynomialFeatures(3), iris),
    "polynomial of interactions": (lambda: PolynomialFeatures(3, interaction_only=True, include_bias=False), iris),
    "polynomial from 2": (lambda: PolynomialFeatures((2, 3)), iris),
    "normalizer l1": (lambda: Normalizer("l1"), diabetes),
    "normalizer l2": (Normalizer, counts),
    "normalizer max": (lambda: Normalizer("max"), diabetes),
    "tf-idf": (TfidfTransformer, counts),
    "tf-idf sublinear": (lambda: TfidfTransformer(sublinear_tf=True, norm="l1"), counts),
    "tf only": (lambda: TfidfTransformer(use_idf=False, norm=None), counts),
    "imputer mean": (SimpleImputer, holes),
    "imputer median, indicator": (lambda: SimpleImputer(strategy="median", add_indicator=True), holes),
    "imputer constant": (lambda: SimpleImputer(strategy="constant", fill_value=-3.0), holes),
    "imputer of a number": (lambda: SimpleImputer(missing_values=0, strategy="most_frequent"), counts),
    "imputer, empty column": (SimpleImputer, lambda: np.insert(holes(), 2, np.nan, axis=1)),
    "imputer, empty column kept": (
        lambda: SimpleImputer(keep_empty_features=True, add_indicator=True),
        lambda: np.insert(holes(), 2, np.nan, axis=1),
    ),
    "imputer and indicator": (lambda: make_union(SimpleImputer(), MissingIndicator()), holes),
    "one-hot of numbers": (OneHotEncoder, lambda: customers()[["doors", "member"]]),
    "one-hot of an array": (lambda: OneHotEncoder(sparse_output=False), lambda: customers()[["doors"]].to_numpy()),
    "one-hot": (OneHotEncoder, lambda: customers()[["colour", "city", "member", "size"]]),
    "one-hot first": (lambda: OneHotEncoder(drop="first"), lambda: customers()[["colour", "doors"]]),
    "one-hot binary": (lambda: OneHotEncoder(drop="if_binary"), lambda: customers()[["member", "city", "colour"]]),
    "one-hot rare": (
        lambda: OneHotEncoder(min_frequency=0.2, handle_unknown="infrequent_if_exist"),
        lambda: customers()[["colour", "size", "doors"]],
    ),
    "one-hot rare, first dropped": (
        lambda: OneHotEncoder(max_categories=2, drop="first", handle_unknown="infrequent_if_exist"),
        lambda: customers()[["colour", "city"]],
    ),
    "one-hot rare, others dropped": (
        lambda: OneHotEncoder(max_categories=3, drop=["blue", "Oslo"]),
        lambda: customers()[["colour", "city"]],
    ),
    "ordinal": (OrdinalEncoder, lambda: customers()[["city", "size", "doors"]]),
    "ordinal with missing": (
        lambda: OrdinalEncoder(encoded_missing_value=-7),
        lambda: customers()[["colour", "city"]],
    ),
    "ordinal rare": (
        lambda: OrdinalEncoder(
            min_frequency=30, handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2
        ),
        lambda: customers()[["colour", "city"]],
    ),
    "ordinal given": (
        lambda: OrdinalEncoder(categories=[["S", "M", "L"]]),
        lambda: customers()[["size"]],
    ),
    "target": (lambda: TargetEncoder(target_type="continuous"), lambda: customers()[["colour", "city"]]),
    "target of classes": (lambda: TargetEncoder(target_type="multiclass"), lambda: customers()[["colour", "doors"]]),
    "impute words, then one-hot": (
        lambda: make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()),
        lambda: customers()[["colour", "city"]],
    ),
    "impute a word, then one-hot": (
        lambda: make_pipeline(SimpleImputer(strategy="constant", fill_value="none"), OneHotEncoder()),
        lambda: customers()[["colour", "size"]],
    ),
    "impute one word by another": (
        lambda: make_pipeline(
            SimpleImputer(missing_values="violet", strategy="constant", fill_value="blue"), OrdinalEncoder()
        ),
        lambda: customers()[["colour", "size"]].dropna(),
    ),
    "scale, pca": (lambda: make_pipeline(StandardScaler(), PCA(4)), wine),
    "scale, pca, scale, whitened pca": (
        lambda: make_pipeline(RobustScaler(), PCA(6), StandardScaler(), PCA(3, whiten=True)),
        wine,
    ),
    "pca clipped": (lambda: make_pipeline(PCA(3), MinMaxScaler(clip=True)), wine),
    "power, pca": (lambda: make_pipeline(PowerTransformer(), PCA(3)), wine),
    "polynomial, scale, pca": (lambda: make_pipeline(PolynomialFeatures(2), StandardScaler(), PCA(5)), iris),
    "tf-idf, svd, normalizer": (
        lambda: make_pipeline(TfidfTransformer(), TruncatedSVD(4, random_state=0), Normalizer()),
        counts,
    ),
    "normalizer, pca": (lambda: make_pipeline(Normalizer(), PCA(2)), iris),
    "selection, pca": (lambda: make_pipeline(SelectKBest(k=6), StandardScaler(), PCA(2)), wine),
    "pca, selection": (lambda: make_pipeline(PCA(6), SelectKBest(k=2)), wine),
    "union": (lambda: make_pipeline(StandardScaler(), make_union(PCA(2), SelectKBest(k=3))), wine),
    "union, weighted, then pca": (
        lambda: make_pipeline(
            FeatureUnion(
                [("a", PCA(3)), ("b", "passthrough"), ("c", "drop"), ("d", StandardScaler())],
                transformer_weights={"a": 2.0, "d": 0.5},
            ),
            PCA(2),
        ),
        wine,
    ),
    "pca, union of parts": (lambda: make_pipeline(PCA(5), make_union(StandardScaler(), SelectKBest(k=2))), wine),
    "columns": (
        lambda: ColumnTransformer(
            [
                ("number", make_pipeline(SimpleImputer(), StandardScaler()), ["age", "income"]),
                ("category", OneHotEncoder(handle_unknown="ignore"), ["colour", "city"]),
                ("gone", "drop", ["size"]),
                ("kept", "passthrough", ["doors"]),
            ],
            transformer_weights={"category": 0.5},
        ),
        customers,
    ),
    "columns, then pca": (
        lambda: make_pipeline(
            ColumnTransformer(
                [
                    ("number", make_pipeline(SimpleImputer(add_indicator=True), RobustScaler()), ["age", "income"]),
                    ("category", OneHotEncoder(sparse_output=False), make_column_selector(dtype_include="category")),
                ],
                remainder="drop",
            ),
            StandardScaler(),
            PCA(3),
        ),
        customers,
    ),
    "pca in a column, then scale and pca": (
        lambda: make_pipeline(
            ColumnTransformer(
                [("a", make_pipeline(StandardScaler(), PCA(2)), [0, 1, 2, 3]), ("b", "passthrough", [5, 4])]
            ),
            StandardScaler(),
            PCA(3),
        ),
        wine,
    ),
    "columns of all kinds": (
        lambda: make_column_transformer(
            (StandardScaler(), slice(0, 2)),
            (PCA(2), [2, -1]),
            (MinMaxScaler(), [False] * 4 + [True] + [False] * 8),
            ("passthrough", []),
            remainder=MaxAbsScaler(),
        ),
        lambda: wine().to_numpy(),
    ),
    "a column given twice": (
        lambda: make_pipeline(PCA(4), ColumnTransformer([("a", StandardScaler(), [1, 0, 1])])),
        wine,
    ),
    "nested": (
        lambda: Pipeline([("outer", make_pipeline(StandardScaler(), make_pipeline(PCA(3)))), ("none", "passthrough")]),
        wine,
    ),
    "pca behind, nonlinear beside": (
        lambda: make_pipeline(
            ColumnTransformer([("a", PCA(2), [0, 1, 2]), ("b", "passthrough", [3, 4])]),
            ColumnTransformer([("c", StandardScaler(), [0, 1]), ("d", PowerTransformer(), [2, 3])]),
        ),
        wine,
    ),
}


def converted(name: str) -> tuple[Front, Schema, Any, Table]:
    make, read = CASES[name]
    X = read()
    part = X[::2] if isinstance(X, np.ndarray) else X.iloc[::2]
    with warnings.catch_warnings():
        # empty columns
        warnings.simplefilter("ignore", UserWarning)
        fitted = make().fit(part, classes(part))
    made, schema = steps.front([("step", fitted)])
    return made, schema, fitted, X


def seen(fitted: Any, X: Table) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return dense(fitted.transform(X))


def tensor(X: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(X, dtype=np.float64))
