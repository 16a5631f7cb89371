"""Our own estimators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from neuralize.additive import AdditiveHead
from neuralize.centroids import CentroidHead
from neuralize.conversion import neuralize
from neuralize.converters._common import dense, fitted_only, model, unsupported
from neuralize.deep_kmeans import DeepKMeans
from neuralize.encoding import EncodedHead, Encoder
from neuralize.kernel_distances import KernelDistances
from neuralize.kernel_kmeans import KernelKMeans
from neuralize.kernel_pools import RKHSPool
from neuralize.network import NeuralizedModel
from neuralize.scaling import Scaler
from neuralize.units import ProductDistances, Units

# the cost of a column is homogeneous in it, of this degree
_DEGREES = {"rbf": 2, "laplacian": 1, "chi2": 1, "l4": 4}


@neuralize.register(KernelKMeans)
def _kernel_kmeans(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    kernel = fitted.kernel
    if kernel not in _DEGREES:
        raise unsupported(
            "KernelKMeans with a kernel of your own has no exact network here",
            repr(kernel),
            f"use one of {', '.join(_DEGREES)}, or register a converter",
        )
    gamma = np.asarray(fitted.gamma_, dtype=np.float64)
    points, scaler = dense(fitted.support_vectors_), None
    if gamma.ndim:
        # one gamma per column: a scaler in front, and gamma = 1
        factor = gamma ** (1 / _DEGREES[kernel])
        points, scaler, gamma = points * factor, Scaler(multiply=factor, source="gamma per column"), np.asarray(1.0)
    units: Units = (
        KernelDistances(points, float(gamma))
        if kernel == "rbf"
        else ProductDistances(points, {"laplacian": "manhattan"}.get(kernel, kernel))
    )
    pool = RKHSPool(fitted.dual_coef_, fitted.centre_norms_, float(gamma))
    unit = "squared distance" if kernel == "rbf" else f"{kernel} distance"
    names = np.arange(len(points))
    head = AdditiveHead(units, pool, unit=unit, names=names)
    # the default stiffness: centres are no rows, so the mean logit of the rows they are made of
    some = torch.from_numpy(points[:: max(1, len(points) // 1000)])
    with torch.no_grad():
        pool.margin.fill_(float(head(some).amax(1).mean()))
    net = model(fitted, head)
    return net if scaler is None else net.behind([scaler], None, net.source)


@neuralize.register(DeepKMeans)
def _deep_kmeans(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    centres = dense(fitted.cluster_centers_)
    encoder = Encoder(fitted.encoder_, torch.zeros(1, fitted.n_features_in_, dtype=torch.float64), "encoder")
    head = CentroidHead(centres, np.bincount(fitted.labels_, minlength=len(centres)))
    return model(fitted, EncodedHead(encoder, head), np.arange(len(centres), dtype=fitted.labels_.dtype))
