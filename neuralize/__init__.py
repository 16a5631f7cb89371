"""Fitted scikit-learn clusterings as equivalent networks, explained exactly.

>>> from neuralize import neuralize
>>> from sklearn.cluster import KMeans
>>> from sklearn.datasets import load_iris
>>> X = load_iris().data
>>> fitted = KMeans(3, random_state=0, n_init=1).fit(X)
>>> net = neuralize(fitted)
>>> bool((net.predict(X) == fitted.predict(X)).all())
True
>>> ex = net.explain(X)
>>> bool(abs(ex.values.sum(1) + ex.residual - ex.output).max() < 1e-9)
True

Names are imported on first use, so that ``python -m neuralize --help`` needs
neither torch nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "from_labels": "neuralize.surrogates",
    "encoded": "neuralize.encoding",
    "RelevanceTransformer": "neuralize.transformer",
    "DeepKMeans": "neuralize.deep_kmeans",
    "CentroidHead": "neuralize.centroids",
    "CoverageWarning": "neuralize.explanation",
    "Explanation": "neuralize.explanation",
    "Head": "neuralize.heads",
    "KernelKMeans": "neuralize.kernel_kmeans",
    "NeuralizedModel": "neuralize.network",
    "Scaler": "neuralize.scaling",
    "describe": "neuralize.sentences",
    "neuralize": "neuralize.conversion",
}
__all__ = [
    "CentroidHead",
    "CoverageWarning",
    "DeepKMeans",
    "Explanation",
    "Head",
    "KernelKMeans",
    "NeuralizedModel",
    "RelevanceTransformer",
    "Scaler",
    "describe",
    "encoded",
    "from_labels",
    "neuralize",
]

if TYPE_CHECKING:
    from neuralize.centroids import CentroidHead
    from neuralize.conversion import neuralize
    from neuralize.deep_kmeans import DeepKMeans
    from neuralize.encoding import encoded
    from neuralize.explanation import CoverageWarning, Explanation
    from neuralize.heads import Head
    from neuralize.kernel_kmeans import KernelKMeans
    from neuralize.network import NeuralizedModel
    from neuralize.scaling import Scaler
    from neuralize.sentences import describe
    from neuralize.surrogates import from_labels


_MODULES = ("bases", "evaluation", "stability")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"neuralize.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'neuralize' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
