"""k nearest neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from neuralize.additive import AdditiveHead
from neuralize.conversion import neuralize
from neuralize.converters._common import dense, fitted_only, model, own_method, unsupported
from neuralize.network import NeuralizedModel
from neuralize.units import ProductDistances, SquaredDistances, Units
from neuralize.votes import NeighbourPool


@neuralize.register(KNeighborsClassifier)
def _neighbours(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, KNeighborsClassifier, "predict")
    if fitted.outputs_2d_:
        raise unsupported(
            "KNeighborsClassifier was fitted with several targets per row", "y of two dimensions", "fit one per target"
        )
    if fitted.weights not in (None, "uniform"):
        raise unsupported(
            f"KNeighborsClassifier(weights={fitted.weights!r}) has no exact network here",
            "weighted votes",
            "fit it with weights='uniform'",
        )
    metric = fitted.effective_metric_
    options = dict(fitted.effective_metric_params_)
    p = options.pop("p", 2)
    metric = {1: "manhattan", 2: "euclidean"}.get(p, metric) if metric == "minkowski" and not options else metric
    X = dense(fitted._fit_X)
    if metric in ("euclidean", "l2"):
        units: Units = SquaredDistances(X)
    elif metric in ("manhattan", "l1", "cityblock"):
        units = ProductDistances(X, "manhattan")
    else:
        raise unsupported(
            f"KNeighborsClassifier(metric={metric!r}) has no exact network here",
            f"p={p}, metric_params={fitted.metric_params}",
            "fit it with metric='euclidean' or 'manhattan'",
        )
    y = np.asarray(fitted._y).ravel()
    head = AdditiveHead(
        units,
        NeighbourPool(y, fitted.n_neighbors),
        kind="class",
        unit="squared distance" if isinstance(units, SquaredDistances) else "absolute distance",
        names=np.arange(len(X)),
    )
    return model(fitted, head, fitted.classes_)
