"""Clusterings by prototypes: one, several, or a tree of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import AffinityPropagation, Birch, BisectingKMeans, KMeans, MeanShift, MiniBatchKMeans
from sklearn.neighbors import NearestCentroid

from lrp.errors import ConvergenceError
from neuralize.additive import AdditiveHead
from neuralize.centroids import CentroidHead
from neuralize.conversion import neuralize
from neuralize.converters._common import dense, fitted_only, model, own_method, unsupported
from neuralize.network import NeuralizedModel
from neuralize.pools import HardPool, PathPool
from neuralize.units import ProductDistances, QuadraticForms, SquaredDistances


def _sizes(labels: Any, count: int) -> npt.NDArray[np.int64] | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    labels = labels[labels >= 0]
    return np.bincount(labels, minlength=count)


@neuralize.register(KMeans)
@neuralize.register(MiniBatchKMeans)
def _kmeans(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, KMeans if isinstance(fitted, KMeans) else MiniBatchKMeans, "predict")
    labels = getattr(fitted, "labels_", None)
    centres = np.asarray(fitted.cluster_centers_)
    if labels is not None and len(labels) and not 0 <= np.min(labels) <= np.max(labels) < len(centres):
        raise ConvergenceError(
            "labels_ and cluster_centers_ do not belong together",
            expected=f"labels from 0 to {len(centres) - 1}",
            got=f"labels from {np.min(labels)} to {np.max(labels)}",
            fix="fit again, and leave the fitted attributes as they are",
        )
    return model(fitted, CentroidHead(centres, _sizes(labels, len(centres))))


@neuralize.register(MeanShift)
@neuralize.register(AffinityPropagation)
def _exemplars(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    name = type(fitted).__name__
    own_method(fitted, MeanShift if isinstance(fitted, MeanShift) else AffinityPropagation, "predict")
    if getattr(fitted, "affinity", "euclidean") != "euclidean" or not hasattr(fitted, "cluster_centers_"):
        raise unsupported(
            f"{name}(affinity={fitted.affinity!r}) knows no columns, only similarities",
            name,
            "fit it with affinity='euclidean', or describe its partition with neuralize.from_labels",
        )
    centres = dense(fitted.cluster_centers_)
    if not len(centres):
        raise ConvergenceError(
            f"{name} found no cluster centres",
            expected="at least two",
            got="none: the fit did not converge",
            fix="raise max_iter or damping and fit again",
        )
    # labels_ may hold -1 for orphans; predict never does
    return model(fitted, CentroidHead(centres, _sizes(fitted.labels_, len(centres))), np.arange(len(centres)))


@neuralize.register(BisectingKMeans)
def _bisecting(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, BisectingKMeans, "predict")
    shift = getattr(fitted, "_X_mean", None)  # absent after a sparse fit
    points: list[npt.NDArray[np.float64]] = []
    paths: dict[int, list[tuple[int, int]]] = {}

    def walk(node: Any, path: list[tuple[int, int]]) -> None:
        if node.left is None:
            paths[int(node.label)] = path
            return
        left, right = len(points), len(points) + 1
        for child in (node.left, node.right):
            centre = np.asarray(child.center, dtype=np.float64)
            points.append(centre if shift is None else centre + shift)
        walk(node.left, [*path, (left, right)])
        walk(node.right, [*path, (right, left)])

    walk(fitted._bisecting_tree, [])
    leaves = sorted(paths)
    # margins of the leaves' own centres, weighted by size, as for k-means
    pool = PathPool([paths[leaf] for leaf in leaves])
    units = SquaredDistances(np.array(points))
    own = np.array([points[paths[leaf][-1][0]] for leaf in leaves])
    names = np.full(len(points), -1)
    for leaf in leaves:
        names[paths[leaf][-1][0]] = leaf
    head = AdditiveHead(units, pool, names=names)
    _margin(head, own, _sizes(fitted.labels_, len(leaves)))
    return model(fitted, head, np.array(leaves, dtype=np.int32))


def _margin(head: AdditiveHead, centres: npt.NDArray[np.float64], sizes: Any) -> None:
    """The default stiffness: the mean logit of the centres in their own class, weighted by size."""
    with torch.no_grad():
        logits = head(torch.from_numpy(centres)).numpy()
    own = np.maximum(logits.max(1), 0)
    weights = None if sizes is None or not np.sum(sizes) else np.asarray(sizes, dtype=np.float64)
    head.pool.margin.fill_(float(np.average(own, weights=weights)))  # type: ignore[operator]


@neuralize.register(Birch)
def _birch(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, Birch, "predict")
    points = np.asarray(fitted.subcluster_centers_, dtype=np.float64)
    # labels may have gaps
    labels, classes = np.unique(fitted.subcluster_labels_, return_inverse=True)
    if len(labels) < 2:
        raise ConvergenceError(
            "K = 1: the logit f_c = min over k != c is a minimum over nothing",
            expected="at least two clusters",
            got=f"{len(points)} subclusters, all with one label",
            fix="lower the threshold or raise n_clusters, and fit again",
        )
    head = AdditiveHead(SquaredDistances(points), HardPool(classes), names=np.arange(len(points)))
    _margin(head, points, None)
    return model(fitted, head, labels)


@neuralize.register(NearestCentroid)
def _nearest_centroid(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, NearestCentroid, "predict")
    centroids = np.asarray(fitted.centroids_, dtype=np.float64)
    classes = fitted.classes_
    # scikit-learn before 1.6 knew neither priors nor a decision function
    priors = np.asarray(getattr(fitted, "class_prior_", np.full(len(classes), 1 / len(classes))), dtype=np.float64)
    uniform = bool(np.isclose(priors, 1 / len(classes)).all())
    if fitted.metric == "manhattan":
        if not uniform:
            raise unsupported(
                "NearestCentroid(metric='manhattan') with unequal priors squares the L1 distance",
                "NearestCentroid",
                "use priors='uniform', or metric='euclidean'",
            )
        head = AdditiveHead(
            ProductDistances(centroids, "manhattan"),
            HardPool(len(classes)),
            kind="class",
            unit="absolute distance",
            names=classes,
        )
        _margin(head, centroids, None)
        return model(fitted, head, classes)
    scored = None
    if hasattr(fitted, "within_class_std_dev_"):
        scored = _scored(fitted, centroids, priors)
    if scored is not None and not uniform:
        return model(fitted, scored, classes)
    # with uniform priors predict goes by plain distances, decision_function does not
    plain = AdditiveHead(
        SquaredDistances(centroids), HardPool(len(classes)), kind="class", names=classes, decision=scored
    )
    _margin(plain, centroids, None)
    return model(fitted, plain, classes)


def _scored(fitted: Any, centroids: npt.NDArray[np.float64], priors: npt.NDArray[np.float64]) -> AdditiveHead:
    """The score of decision_function and predict_proba: scaled distances and priors."""
    spread = np.asarray(fitted.within_class_std_dev_, dtype=np.float64)
    scale = np.where(spread != 0, spread, 1.0)
    with np.errstate(divide="ignore"):
        constants = -2 * np.log(priors)
    head = AdditiveHead(
        # forms are halved
        QuadraticForms(centroids, np.broadcast_to(2 / scale**2, centroids.shape)),
        HardPool(len(priors), {"priors": constants}, decision=True),
        kind="class",
        unit="squared distance over within-class variance",
        names=fitted.classes_,
    )
    _margin(head, centroids, None)
    return head
