"""Fitted models of every kind the package converts: a converter joins the contract battery with one entry here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.cluster import AffinityPropagation, Birch, BisectingKMeans, KMeans, MeanShift, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KernelDensity, KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC, NuSVC, OneClassSVM

from neuralize import KernelKMeans


def table(name: str, rows: int = 600) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    def read() -> tuple[np.ndarray, np.ndarray]:
        bunch = getattr(datasets, f"load_{name}")()
        return np.array(bunch.data[:rows], dtype=np.float64), np.array(bunch.target[:rows])

    return read


@dataclass(frozen=True)
class Case:
    """Two factories: an estimator to fit, and the table; and what its logits promise.

    logits: "hard": at most one is positive, one off ties; "votes": the same, but for rows without an outright
    winner; "soft": exact log-odds of ``predict_proba``; "one": two antisymmetric ones; "value", "density".
    """

    estimator: Any
    data: Callable[[], tuple[np.ndarray, np.ndarray]]
    logits: str = "hard"
    spread: float = 1e6  # how far from the table rows are tried
    every: int = 2  # fitted on every second row

    def fit(self) -> tuple[Any, np.ndarray]:
        X, y = self.data()
        estimator = copy.deepcopy(self.estimator)
        return estimator.fit(X[:: self.every], y[:: self.every]), X


def _kmeans(k: int, *steps: Any) -> Any:
    clusterer = KMeans(k, n_init=1, random_state=0)
    return make_pipeline(*steps, clusterer) if steps else clusterer


def _scaled(estimator: Any, *steps: Any) -> Any:
    return make_pipeline(StandardScaler(), *steps, estimator)


def _two(name: str) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    def read() -> tuple[np.ndarray, np.ndarray]:
        X, y = table(name)()
        return X, np.where(y > 0, "b", "a")

    return read


def _digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = table("digits", 300)()
    return X / 16, y


def _one_column() -> tuple[np.ndarray, np.ndarray]:
    X, y = table("iris")()
    return X[:, 2:3], y


def _sentinel() -> tuple[np.ndarray, np.ndarray]:
    X, y = table("iris")()
    return np.vstack([X, [[1e5, -1e5, 1e5, 0]]]), np.append(y, 0)


wine, iris, cancer = table("wine"), table("iris"), table("breast_cancer", 200)
_NESTED = (Pipeline([("a", StandardScaler(with_mean=False)), ("b", "passthrough")]), None, MinMaxScaler((-1, 3)))

CASES: dict[str, Case] = {
    "k-means": Case(_kmeans(3), wine),
    "k-means standard": Case(_kmeans(3, StandardScaler()), wine),
    "k-means min-max clipped": Case(_kmeans(4, MinMaxScaler(clip=True)), wine),
    "k-means K=2 robust": Case(_kmeans(2, RobustScaler()), iris),
    "k-means K=10 max-abs": Case(_kmeans(10, MaxAbsScaler()), cancer),
    "k-means digits": Case(_kmeans(10, StandardScaler()), _digits),
    "k-means nested": Case(_kmeans(5, *_NESTED), table("diabetes")),
    "k-means one column": Case(_kmeans(3, StandardScaler(with_std=False)), _one_column),
    "k-means one sentinel": Case(_kmeans(4), _sentinel, every=1),
    "k-means pca": Case(_kmeans(4, StandardScaler(), PCA(4)), wine),
    "k-means whitened pca": Case(_kmeans(4, StandardScaler(), PCA(4, whiten=True)), wine),
    "mini-batch k-means": Case(_scaled(MiniBatchKMeans(4, n_init=1, random_state=0)), wine),
    "bisecting": Case(BisectingKMeans(6, random_state=0), wine),
    "bisecting pca": Case(_scaled(BisectingKMeans(5, random_state=0), PCA(3, whiten=True)), wine),
    "mean shift": Case(_scaled(MeanShift(bandwidth=2.8)), wine),
    "affinity propagation": Case(_scaled(AffinityPropagation(random_state=0)), iris),
    "nearest centroid": Case(NearestCentroid(), wine),
    "nearest centroid shrunk": Case(_scaled(NearestCentroid(shrink_threshold=0.5)), wine),
    "nearest centroid manhattan": Case(_scaled(NearestCentroid(metric="manhattan")), wine),
    "nearest centroid priors": Case(_scaled(NearestCentroid(priors=[0.2, 0.5, 0.3])), wine),
    "birch": Case(_scaled(Birch(n_clusters=4, threshold=1.5)), wine),
    "birch subclusters": Case(_scaled(Birch(n_clusters=None, threshold=2.5)), wine),
    "birch pca": Case(_scaled(Birch(n_clusters=3, threshold=1.0), PCA(5)), wine),
    **{
        f"gmm {kind}": Case(_scaled(GaussianMixture(3, covariance_type=kind, random_state=0)), wine, "soft", 10)
        for kind in ("full", "tied", "diag", "spherical")
    },
    **{
        f"bayesian gmm {kind}": Case(
            _scaled(BayesianGaussianMixture(n_components=3, covariance_type=kind, random_state=0)), iris, "soft", 10
        )
        for kind in ("full", "tied", "diag", "spherical")
    },
    "gmm full pca": Case(_scaled(GaussianMixture(3, random_state=0), PCA(4, whiten=True)), wine, "soft", 10),
    "gmm diag pca": Case(_scaled(GaussianMixture(3, covariance_type="diag", random_state=0), PCA(4)), wine, "soft", 10),
    "qda": Case(_scaled(QuadraticDiscriminantAnalysis(reg_param=0.1)), wine, "soft", 10),
    "naive bayes": Case(GaussianNB(), wine, "soft", 10),
    "naive bayes two": Case(_scaled(GaussianNB()), _two("wine"), "soft", 10),
    "lda": Case(LinearDiscriminantAnalysis(), wine, "soft", 10),
    "lda two": Case(_scaled(LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2)), _two("wine"), "soft", 10),
    "lda pca": Case(_scaled(LinearDiscriminantAnalysis(), PCA(4, whiten=True)), wine, "soft", 10),
    "logistic regression": Case(_scaled(LogisticRegression()), wine, "soft", 10),
    "logistic regression two": Case(_scaled(LogisticRegression()), _two("wine"), "soft", 10),
    "linear svc": Case(_scaled(LinearSVC()), wine, "hard"),
    "linear svc pca": Case(_scaled(LinearSVC(), PCA(4, whiten=True)), wine, "hard"),
    "ridge": Case(_scaled(RidgeClassifier()), _two("wine"), "hard"),
    "sgd": Case(_scaled(SGDClassifier(random_state=0)), wine, "hard"),
    "svc": Case(_scaled(SVC()), wine, "votes", 2),
    "svc two": Case(_scaled(SVC(C=10, gamma=0.2)), _two("wine"), "hard", 2),
    "svc digits": Case(SVC(gamma=0.1), _digits, "votes", 1),
    "svc break ties": Case(SVC(gamma=3.0, break_ties=True), _digits, "votes", 1),
    "svc linear": Case(_scaled(SVC(kernel="linear")), wine, "votes", 10),
    "svc poly": Case(_scaled(SVC(kernel="poly", coef0=0.5)), wine, "votes", 10),
    "svc sigmoid": Case(_scaled(SVC(kernel="sigmoid")), wine, "votes", 10),
    "svc pca": Case(_scaled(SVC(), PCA(4, whiten=True)), wine, "votes", 2),
    "nu-svc": Case(_scaled(NuSVC(nu=0.3)), wine, "votes", 2),
    "svr": Case(_scaled(SVR()), table("diabetes", 200), "value", 2),
    "svr linear": Case(_scaled(SVR(kernel="linear")), table("diabetes", 200), "value", 2),
    "kernel ridge": Case(_scaled(KernelRidge(kernel="rbf", gamma=0.1)), table("diabetes", 150), "value", 2),
    "kernel ridge poly": Case(_scaled(KernelRidge(kernel="poly", degree=2)), table("diabetes", 150), "value", 2),
    "gaussian process": Case(
        _scaled(
            GaussianProcessRegressor(
                ConstantKernel(2.0) * RBF([2.0] * 10) + WhiteKernel(), normalize_y=True, optimizer=None
            )
        ),
        table("diabetes", 120),
        "value",
        2,
    ),
    "one-class svm": Case(_scaled(OneClassSVM(nu=0.2, gamma=0.05)), wine, "one", 2),
    "kernel density": Case(_scaled(KernelDensity(bandwidth=0.8)), wine, "density", 1),
    "k-nn": Case(_scaled(KNeighborsClassifier(5)), wine, "votes", 10),
    "k-nn even": Case(_scaled(KNeighborsClassifier(4)), wine, "votes", 10),
    "k-nn one": Case(_scaled(KNeighborsClassifier(1), PCA(3)), iris, "votes", 10),
    "k-nn manhattan": Case(_scaled(KNeighborsClassifier(3, metric="manhattan")), wine, "votes", 10),
    "kernel k-means": Case(_scaled(KernelKMeans(4, n_init=1, random_state=0)), wine, "hard", 2),
    "kernel k-means laplacian": Case(
        _scaled(KernelKMeans(3, kernel="laplacian", n_init=1, random_state=0)), wine, "hard", 2
    ),
    "kernel k-means landmarks": Case(
        _scaled(KernelKMeans(3, algorithm="landmarks", n_landmarks=25, n_init=1, random_state=0), PCA(6)),
        wine,
        "hard",
        2,
    ),
}
