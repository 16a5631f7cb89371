"""Kernel machines: support vector machines, one-class SVM, kernel density."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import KernelDensity
from sklearn.svm import SVC, SVR, NuSVC, NuSVR, OneClassSVM

from lrp.errors import ConvergenceError
from neuralize.additive import AdditiveHead
from neuralize.conversion import neuralize
from neuralize.converters._common import dense, fitted_only, model, own_method, unsupported
from neuralize.kernel_distances import KernelDistances
from neuralize.kernel_pools import DensityPool, DuelPool
from neuralize.linear_units import DotUnits, LinearUnits
from neuralize.network import NeuralizedModel
from neuralize.units import Units
from neuralize.values import ScoreValuePool, ValuePool
from neuralize.votes import ScorePool

Floats = npt.NDArray[np.float64]


def eta(points: Floats, gamma: float) -> float:
    """Share of the midpoint rule in "hybrid": Bley et al.'s heuristic.

    It takes the stiffness for data whose median squared distance of pairs is 1.
    """
    some = points[:: -(-len(points) // 500)]
    typical = float(np.median(_gaps(some)[np.triu_indices(len(some), 1)])) if len(some) > 1 else 1.0
    level = math.log10(gamma * typical) if gamma * typical > 0 else -math.inf
    return 0.0 if level < -0.5 else 1.0 if level > 1.5 else round(0.4 * level + 0.4, 2)


def _gaps(points: Floats) -> Floats:
    points = points - points.mean(0)
    norms = (points**2).sum(1)
    return np.asarray(np.maximum(norms[:, None] + norms - 2 * points @ points.T, 0))


def _kernel(fitted: Any, allowed: tuple[str, ...]) -> str:
    name, kernel = type(fitted).__name__, fitted.kernel
    if callable(kernel) or kernel == "precomputed":
        shown = "a callable" if callable(kernel) else repr(kernel)
        raise unsupported(
            f"{name} with kernel {shown} knows no columns, only similarities",
            name,
            f"use one of the kernels {', '.join(allowed)}, or register a converter",
        )
    if kernel not in allowed:
        raise unsupported(f"{name} with kernel {kernel!r} has no exact network here", name, f"use {', '.join(allowed)}")
    return str(kernel)


def _duels(fitted: Any) -> tuple[Floats, Floats, Floats]:
    """Coefficients (P, M), intercepts (P,) and pairs (P, 2) of a support vector classifier."""
    dual, intercept = dense(fitted.dual_coef_), np.asarray(fitted.intercept_, dtype=np.float64)
    K = len(fitted.classes_)
    if K == 2:  # scikit-learn has flipped the signs: positive is classes_[1]
        return dual[:1], intercept, np.array([[1, 0]])
    ends = np.concatenate([[0], np.cumsum(fitted.n_support_)])
    coefficients, pairs = [], []
    for i in range(K):
        for j in range(i + 1, K):
            a = np.zeros(dual.shape[1])
            a[ends[i] : ends[i + 1]] = dual[j - 1, ends[i] : ends[i + 1]]
            a[ends[j] : ends[j + 1]] = dual[i, ends[j] : ends[j + 1]]
            coefficients.append(a)
            pairs.append((i, j))
    return np.array(coefficients), intercept, np.array(pairs)


def _dots(fitted: Any, kernel: str, points: Floats, coefficients: Floats) -> Units:
    if kernel == "linear":
        return LinearUnits(coefficients @ points)
    degree = int(fitted.degree) if kernel == "poly" else 1
    if degree < 1:
        raise unsupported("a polynomial of degree 0 is constant", f"degree={fitted.degree}", "use degree >= 1")
    return DotUnits(points, coefficients, kernel, fitted._gamma, fitted.coef0, degree)


@neuralize.register(SVC)
@neuralize.register(NuSVC)
def _svc(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    base = SVC if isinstance(fitted, SVC) else NuSVC
    own_method(fitted, base, "predict", "decision_function")
    kernel = _kernel(fitted, ("rbf", "linear", "poly", "sigmoid"))
    points = dense(fitted.support_vectors_)
    coefficients, intercept, pairs = _duels(fitted)
    break_ties = bool(fitted.break_ties) and fitted.decision_function_shape == "ovr"
    if kernel == "rbf":
        gamma = float(fitted._gamma)
        constants = np.stack([np.maximum(intercept, 0), np.maximum(-intercept, 0)], 1)
        pool: Any = DuelPool(coefficients, constants, pairs, gamma, break_ties, eta(points, gamma))
        units: Units = KernelDistances(points, gamma)
    else:
        units, pool = _dots(fitted, kernel, points, coefficients), ScorePool(pairs, intercept, break_ties)
    names = np.asarray(fitted.support_) if kernel == "rbf" else None
    unit = "log ratio of kernel sums" if kernel == "rbf" else "decision value"
    head = AdditiveHead(units, pool, kind="class", unit=unit, names=names, decision_unit="decision value")
    return model(fitted, head, fitted.classes_)


@neuralize.register(SVR)
@neuralize.register(NuSVR)
def _svr(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, SVR if isinstance(fitted, SVR) else NuSVR, "predict")
    kernel = _kernel(fitted, ("rbf", "linear", "poly", "sigmoid"))
    points, dual = dense(fitted.support_vectors_), dense(fitted.dual_coef_)
    intercept = float(np.asarray(fitted.intercept_).ravel()[0])
    if not len(points):
        raise ConvergenceError(
            "the regression has no support vectors: it is constant",
            expected="at least two support vectors",
            got="none",
            fix="lower epsilon and fit again",
        )
    names = np.asarray(fitted.support_) if kernel == "rbf" else None
    if kernel == "rbf":
        gamma = float(fitted._gamma)
        # compared with the intercept, what is predicted far from all rows; set_level chooses another value
        level = intercept if (dual[0] > 0).any() and (dual[0] < 0).any() else 0.0
        pool: Any = ValuePool(dual[0], intercept, gamma, level, eta(points, gamma))
        units: Units = KernelDistances(points, gamma)
    else:
        units, pool = _dots(fitted, kernel, points, dual), ScoreValuePool(intercept, intercept)
    head = AdditiveHead(units, pool, kind="value", unit="units of the target", names=names)
    return model(fitted, head, np.array(["value"]))


@neuralize.register(OneClassSVM)
def _one_class(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, OneClassSVM, "predict", "decision_function")
    _kernel(fitted, ("rbf",))
    alpha = dense(fitted.dual_coef_)[0]
    points, gamma, mass = dense(fitted.support_vectors_), float(fitted._gamma), float(alpha.sum())
    offset = float(np.asarray(fitted.offset_).ravel()[0])
    if not offset > 0:
        raise ConvergenceError(
            "the threshold of the one-class SVM is not positive: every row is an inlier",
            expected="offset_ > 0",
            got=f"{offset:.3g}",
            fix="fit again with a larger nu",
        )
    # the duals sum to nu n; normalised, the outlyingness is >= 0
    threshold = -math.log(offset / mass) / gamma
    keep = alpha > 0
    pool = DensityPool(alpha[keep], gamma, threshold, mass=mass)
    head = AdditiveHead(
        KernelDistances(points[keep], gamma),
        pool,
        kind="outlier",
        unit="squared distance",
        decision_unit="decision value",
        names=np.asarray(fitted.support_)[keep],
    )
    return model(fitted, head, np.array([-1, 1]))


@neuralize.register(KernelDensity)
def _density(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, KernelDensity, "score_samples")
    if fitted.kernel != "gaussian":
        raise unsupported(
            f"KernelDensity(kernel={fitted.kernel!r}) has no exact network here",
            "KernelDensity",
            "fit it with kernel='gaussian'",
        )
    options = dict(fitted.metric_params or {})
    if fitted.metric not in ("euclidean", "l2", "minkowski") or options.pop("p", 2) != 2 or options:
        raise unsupported(
            f"KernelDensity(metric={fitted.metric!r}) has no exact network here",
            f"metric_params={fitted.metric_params}",
            "fit it with metric='euclidean'",
        )
    points, h = np.asarray(fitted.tree_.data, dtype=np.float64), float(fitted.bandwidth_)
    weights = getattr(fitted.tree_, "sample_weight", None)
    w = np.ones(len(points)) if weights is None else np.asarray(weights, dtype=np.float64)
    keep = w > 0
    constant = -points.shape[1] * (math.log(h) + 0.5 * math.log(2 * math.pi))
    pool = DensityPool(w[keep], 1 / (2 * h * h), constant=constant)
    head = AdditiveHead(
        KernelDistances(points[keep], 1 / (2 * h * h)),
        pool,
        kind="density",
        unit="log density",
        names=np.nonzero(keep)[0],
    )
    return model(fitted, head, np.array(["log density"]))
