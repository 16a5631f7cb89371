"""Kernel regressions without support vectors: kernel ridge, and the mean of a Gaussian process."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Kernel, Product, Sum, WhiteKernel
from sklearn.kernel_ridge import KernelRidge

from neuralize.additive import AdditiveHead
from neuralize.conversion import neuralize
from neuralize.converters._common import dense, fitted_only, model, own_method, unsupported
from neuralize.converters.kernels import eta
from neuralize.kernel_distances import KernelDistances
from neuralize.linear_units import DotUnits, LinearUnits
from neuralize.network import NeuralizedModel
from neuralize.scaling import Scaler
from neuralize.units import Units
from neuralize.values import ScoreValuePool, ValuePool

Floats = npt.NDArray[np.float64]
_LABEL = np.array(["value"])


def _rbf(points: Floats, alpha: Floats, intercept: float, gamma: float, level: float) -> AdditiveHead:
    keep = alpha != 0
    pool = ValuePool(alpha[keep], intercept, gamma, level, eta(points[keep], gamma))
    return AdditiveHead(
        KernelDistances(points[keep], gamma), pool, kind="value", unit="units of the target", names=np.flatnonzero(keep)
    )


@neuralize.register(KernelRidge)
def _kernel_ridge(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, KernelRidge, "predict")
    alpha = dense(fitted.dual_coef_)
    if alpha.ndim != 1 and alpha.shape[1] != 1:
        raise unsupported("KernelRidge was fitted with several targets", f"{alpha.shape[1]}", "fit one per target")
    alpha, X = alpha.ravel(), dense(fitted.X_fit_)
    # compared with the mean prediction on the rows it was fitted on; set_level chooses another value
    level = float(np.mean(fitted.predict(fitted.X_fit_)))
    kernel, gamma = fitted.kernel, 1 / X.shape[1] if fitted.gamma is None else float(fitted.gamma)
    if kernel == "rbf":
        return model(fitted, _rbf(X, alpha, 0.0, gamma, level), _LABEL)
    units: Units
    if kernel == "linear":
        units = LinearUnits(alpha[None] @ X)
    elif kernel in ("poly", "polynomial", "sigmoid"):
        degree = fitted.degree if kernel != "sigmoid" else 1
        if degree < 1 or degree != int(degree):
            raise unsupported(
                f"a polynomial of degree {degree} has no exact network here",
                f"degree={degree}",
                "use a whole degree >= 1",
            )
        name = "sigmoid" if kernel == "sigmoid" else "poly"
        units = DotUnits(X, alpha[None], name, gamma, float(fitted.coef0), int(degree))
    else:
        raise unsupported(
            f"KernelRidge with kernel {kernel if isinstance(kernel, str) else type(kernel).__name__!r} has no exact "
            "network here",
            "KernelRidge",
            "use kernel='rbf', 'linear', 'poly' or 'sigmoid'",
        )
    head = AdditiveHead(units, ScoreValuePool(0.0, level), kind="value", unit="units of the target")
    return model(fitted, head, _LABEL)


def _parts(kernel: Kernel) -> tuple[float, Floats]:
    """Factor and length scales of a kernel that is a Gaussian times a constant, noise aside."""
    if isinstance(kernel, Sum):
        for noise, other in ((kernel.k1, kernel.k2), (kernel.k2, kernel.k1)):
            if isinstance(noise, WhiteKernel):  # nothing between different rows, hence nothing of the mean
                return _parts(other)
    if isinstance(kernel, Product):
        for factor, other in ((kernel.k1, kernel.k2), (kernel.k2, kernel.k1)):
            if isinstance(factor, ConstantKernel):
                constant, scales = _parts(other)
                return float(factor.constant_value) * constant, scales
    if type(kernel) is RBF:
        return 1.0, np.atleast_1d(np.asarray(kernel.length_scale, dtype=np.float64))
    raise unsupported(
        f"GaussianProcessRegressor with kernel {kernel} has no exact network here",
        str(kernel),
        "use RBF, times a ConstantKernel, plus a WhiteKernel",
    )


@neuralize.register(GaussianProcessRegressor)
def _gaussian_process(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, GaussianProcessRegressor, "predict")
    if not hasattr(fitted, "alpha_"):
        raise unsupported("GaussianProcessRegressor is not fitted: it is its prior", "no rows", "call fit first")
    alpha = np.asarray(fitted.alpha_, dtype=np.float64)
    if alpha.ndim != 1 and alpha.shape[1] != 1:
        raise unsupported(
            "GaussianProcessRegressor was fitted with several targets", f"{alpha.shape[1]}", "fit one each"
        )
    constant, scales = _parts(fitted.kernel_)
    spread, mean = float(np.ravel(fitted._y_train_std)[0]), float(np.ravel(fitted._y_train_mean)[0])
    X, weights = dense(fitted.X_train_), alpha.ravel() * constant * spread
    # the mean of the process far from all rows, where that leaves both signs something
    both = (weights > 0).any() and (weights < 0).any()
    level = mean if both else float(np.mean(fitted.predict(fitted.X_train_)))
    if len(scales) == 1:
        return model(fitted, _rbf(X, weights, mean, 1 / (2 * float(scales[0]) ** 2), level), _LABEL)
    net = model(fitted, _rbf(X / scales, weights, mean, 0.5, level), _LABEL)
    return net.behind([Scaler(divide=scales, source="length scale per column")], None, net.source)
