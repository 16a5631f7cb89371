"""Models whose explanations are timed: estimator, network and rows, and rivals that explain the same output."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from experiments.benchmarks.lrp_peers import Refused
from experiments.benchmarks.measuring import Job
from neuralize import KernelKMeans, neuralize
from neuralize.network import NeuralizedModel

Floats = npt.NDArray[Any]

CLASSES = 5
BACKGROUND = 100  # rows of shap's background, its own default
# rows given to a network at once: shap's batches, all masks times the background, do not fit kernel machines
_CHUNK = 2048


@dataclass(frozen=True)
class Model:
    """An estimator, its network and the rows to explain."""

    name: str
    note: str
    fitted: Any
    net: NeuralizedModel
    X: Floats

    def predict(self) -> Job:
        """The estimator's own labels."""
        return lambda: self.fitted.predict(self.X)

    def explain(self) -> Job:
        """Our explanation of every row's own class, default rule."""
        return lambda: self.net.explain(self.X)


def blobs(rows: int, columns: int, classes: int, seed: int = 0, spread: float = 1.0) -> tuple[Floats, Floats]:
    """Overlapping Gaussian groups (rows, columns) with noise of variance 4, and the group of each row."""
    rng = np.random.default_rng(seed)
    centres = spread * rng.normal(size=(classes, columns))
    y = rng.integers(0, classes, rows)
    return centres[y] + 2 * rng.normal(size=(rows, columns)), y


def centroids(rows: int, columns: int, clusters: int, dtype: str) -> Model:
    """K-means on many rows; only a part of them is used to fit."""
    X, _ = blobs(rows, columns, clusters, spread=2.0)
    X = X.astype(dtype)
    fitted = KMeans(clusters, n_init=1, max_iter=5, random_state=0).fit(X[:20_000])
    net = neuralize(fitted).to(getattr(torch, dtype))
    return Model(f"KMeans {dtype}", f"{rows} rows x {columns} columns, K = {clusters}", fitted, net, X)


def _support(fitted: Any) -> str:
    return f"{len(fitted.support_)} support vectors"


def zoo(rows: int, columns: int) -> dict[str, Callable[[], Model]]:
    """Builders by name: all fitted on the same rows, which are the rows to explain."""
    X, y = blobs(rows, columns, CLASSES)
    two = (y < 2).astype(int)

    def made(name: str, fitted: Any, note: Callable[[Any], str]) -> Model:
        return Model(name, note(fitted), fitted, neuralize(fitted), X)

    builders: dict[str, Callable[[str], Model]] = {
        "KMeans": lambda n: made(n, KMeans(CLASSES, n_init=1, random_state=0).fit(X), lambda f: f"K = {CLASSES}"),
        "SVC, 2 classes": lambda n: made(n, SVC().fit(X, two), _support),
        f"SVC, {CLASSES} classes": lambda n: made(n, SVC().fit(X, y), _support),
        "GaussianMixture diag": lambda n: made(
            n, GaussianMixture(CLASSES, covariance_type="diag", random_state=0).fit(X), lambda f: f"K = {CLASSES}"
        ),
        "GaussianMixture full": lambda n: made(
            n, GaussianMixture(CLASSES, covariance_type="full", random_state=0).fit(X), lambda f: f"K = {CLASSES}"
        ),
        "KNeighborsClassifier": lambda n: made(n, KNeighborsClassifier(5).fit(X, y), lambda f: f"k = 5 of {rows} rows"),
        "KernelKMeans": lambda n: made(
            n,
            KernelKMeans(CLASSES, n_init=1, random_state=0).fit(X),
            lambda f: f"K = {CLASSES}, {len(f.support_vectors_)} members ({f.algorithm_})",
        ),
    }
    return {name: (lambda name=name, build=build: build(name)) for name, build in builders.items()}


# ---------------------------------------------------------------------- rivals


def imported(library: str) -> Any:
    """The module.

    Raises
    ------
    Refused
        It is not installed.
    """
    try:
        with warnings.catch_warnings():
            # shap uses a method of matplotlib's colour maps that will be deprecated
            warnings.simplefilter("ignore", PendingDeprecationWarning)
            return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise Refused("not installed") from error


def _logit(net: NeuralizedModel, position: int) -> Callable[[Floats], Floats]:
    def f(X: Floats) -> Floats:
        with torch.no_grad():
            return np.concatenate(
                [net(np.asarray(X[i : i + _CHUNK]))[:, position].numpy() for i in range(0, len(X), _CHUNK)]
            )

    return f


def shap_permutation(model: Model, rows: int) -> Job:
    """shap's permutation explainer, its defaults, on the logit of the first row's class; a job for ``rows`` rows."""
    shap = imported("shap")
    target = model.net.explain(model.X[:1]).target[0]
    position = int(np.flatnonzero(model.net.labels == target)[0])
    background = model.X[np.random.default_rng(1).choice(len(model.X), min(BACKGROUND, len(model.X)), replace=False)]
    masker = shap.maskers.Independent(background, max_samples=len(background))
    explainer = shap.PermutationExplainer(_logit(model.net, position), masker, seed=0)
    some = model.X[:rows]
    return lambda: explainer(some, silent=True)


def product_kernel(model: Model, rows: int) -> Job:
    """shapiq's exact Shapley values of an RBF SVC's decision function; a job for ``rows`` rows."""
    shapley = imported("shapiq.explainer.product_kernel")
    if not isinstance(model.fitted, SVC) or len(model.fitted.classes_) > 2:
        raise Refused("takes binary SVC only")
    explainer = shapley.ProductKernelExplainer(model.fitted)
    some = model.X[:rows]
    return lambda: [explainer.explain_function(x) for x in some]


RIVALS: dict[str, Callable[[Model, int], Job]] = {
    "shap PermutationExplainer": shap_permutation,
    "shapiq ProductKernelExplainer": product_kernel,
}
