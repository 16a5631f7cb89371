"""Gaussians: mixtures, discriminant analysis, naive Bayes. Their logits are the exact log-odds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.naive_bayes import GaussianNB

from lrp.errors import ConvergenceError
from neuralize.additive import AdditiveHead
from neuralize.conversion import neuralize
from neuralize.converters._common import fitted_only, model, own_method
from neuralize.linear_units import Hyperplanes, LinearUnits
from neuralize.network import NeuralizedModel
from neuralize.pools import SoftPool
from neuralize.units import QuadraticForms, Units

Floats = npt.NDArray[np.float64]


def _two_or_more(count: int, name: str) -> None:
    if count < 2:
        raise ConvergenceError(
            f"{name} with K = 1: its posterior is constant, there is nothing to explain",
            expected="at least two components",
            got="1",
            fix="fit two components or more; for the density of a table itself use KernelDensity",
        )


def _log(priors: Any) -> Floats:
    """Log priors; minus infinity for a class that is never predicted."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.asarray(priors, dtype=np.float64)))


def _head(
    units: Units, constants: dict[str, Floats], kind: str, names: Any, decision: AdditiveHead | None = None
) -> AdditiveHead:
    constants = {name: c for name, c in constants.items() if np.any(c != 0)}
    pool = SoftPool(units.count, constants, decision=True)  # type: ignore[arg-type]
    return AdditiveHead(units, pool, kind=kind, unit="log-odds", names=names, decision=decision)


def _gaussians(
    means: Floats,
    precisions: Floats,
    constants: Floats,
    weights: Floats,
    kind: str,
    names: Any,
    extra: Floats | None = None,
) -> AdditiveHead:
    """Gaussians with covariances of their own.

    ``constants`` are the full log constants of the joint densities at their
    means; ``weights`` the log weights among them.
    """
    # of a class with prior 0 both are minus infinity
    rest = np.where(np.isinf(weights), 0.0, constants - np.where(np.isinf(weights), 0.0, weights))
    per_column = None
    if precisions.ndim == 2:
        # a diagonal Gaussian is a product: each factor brings its own normaliser
        per_column = 0.5 * (math.log(2 * math.pi) - np.log(precisions))
        rest = np.zeros_like(rest) if extra is None else extra
    units = QuadraticForms(means, precisions, per_column)
    return _head(units, {"log weights": -weights, "normaliser": -rest}, kind, names)


@neuralize.register(GaussianMixture)
@neuralize.register(BayesianGaussianMixture)
def _mixture(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, GaussianMixture if isinstance(fitted, GaussianMixture) else BayesianGaussianMixture, "predict")
    means = np.asarray(fitted.means_, dtype=np.float64)
    _two_or_more(len(means), type(fitted).__name__)
    kind, factor = fitted.covariance_type, np.asarray(fitted.precisions_cholesky_, dtype=np.float64)
    weights = np.asarray(fitted._estimate_log_weights(), dtype=np.float64)
    constants = np.diag(fitted._estimate_weighted_log_prob(fitted.means_)).astype(np.float64)
    names = np.arange(len(means))
    if kind == "tied":
        P = factor @ factor.T
        centre = means.mean(0)
        near, far = ((m @ P, constants - 0.5 * ((m @ P) * m).sum(1)) for m in (means - centre, means))
        return model(fitted, _tied(*near, means, centre, "cluster", names, _scores(*far, "cluster", names)), names)
    if kind == "full":
        P = factor @ factor.transpose(0, 2, 1)
        return model(fitted, _gaussians(means, P, constants, weights, "cluster", names), names)
    precisions = np.broadcast_to(factor[:, None] if factor.ndim == 1 else factor, means.shape) ** 2
    extra = None
    if isinstance(fitted, BayesianGaussianMixture):
        product = 0.5 * (np.log(precisions) - math.log(2 * math.pi)).sum(1)
        extra = constants - weights - product
    return model(fitted, _gaussians(means, precisions, constants, weights, "cluster", names, extra), names)


def _tied(
    weights: Floats,
    bias: Floats,
    means: Floats,
    centre: Floats,
    kind: str,
    names: Any,
    scores: AdditiveHead,
    priors: Floats | None = None,
) -> AdditiveHead:
    """Gaussians with one covariance: linear borders, expanded on them; the bias is at the centre."""
    constants = {} if priors is None else {"log weights": priors}
    return _head(Hyperplanes(weights, bias, means, centre), constants, kind, names, scores)


def _scores(weights: Floats, bias: Floats, kind: str, names: Any) -> AdditiveHead:
    """The linear scores themselves, from the origin."""
    return _head(LinearUnits(weights), {"intercept": -bias}, kind, names)


@neuralize.register(QuadraticDiscriminantAnalysis)
def _qda(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, QuadraticDiscriminantAnalysis, "predict", "_decision_function")
    _two_or_more(len(fitted.classes_), "QuadraticDiscriminantAnalysis")
    precisions = np.stack(
        [(np.asarray(R) / S) @ np.asarray(R).T for R, S in zip(fitted.rotations_, fitted.scalings_, strict=True)]
    )
    weights = _log(fitted.priors_)
    constants = weights - 0.5 * np.array([np.log(S).sum() for S in fitted.scalings_])
    head = _gaussians(np.asarray(fitted.means_), precisions, constants, weights, "class", fitted.classes_)
    return model(fitted, head, fitted.classes_)


@neuralize.register(GaussianNB)
def _naive_bayes(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, GaussianNB, "predict", "_joint_log_likelihood")
    _two_or_more(len(fitted.classes_), "GaussianNB")
    weights, variances = _log(fitted.class_prior_), np.asarray(fitted.var_, dtype=np.float64)
    if not (variances > 0).all():
        raise ConvergenceError(
            "GaussianNB was fitted on columns without any variance",
            expected="variances above 0",
            got=f"0 in column {int(np.nonzero(~(variances > 0).all(0))[0][0])}",
            fix="drop constant columns, or raise var_smoothing, and fit again",
        )
    precisions = 1 / variances
    head = _gaussians(np.asarray(fitted.theta_), precisions, weights, weights, "class", fitted.classes_)
    return model(fitted, head, fitted.classes_)


@neuralize.register(LinearDiscriminantAnalysis)
def _lda(fitted: Any) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, LinearDiscriminantAnalysis, "predict", "decision_function", "predict_proba")
    W, b = np.asarray(fitted.coef_, dtype=np.float64), np.asarray(fitted.intercept_, dtype=np.float64)
    if len(fitted.classes_) == 2:
        W, b = np.vstack([-W / 2, W / 2]), np.concatenate([-b / 2, b / 2])
    means = np.asarray(fitted.means_, dtype=np.float64)
    priors = np.where(np.isinf(b), -b, 0.0)
    b = np.where(np.isinf(b), 0.0, b)
    centre = means.mean(0)
    scores = _head(LinearUnits(W), {"intercept": -b, "log weights": priors}, "class", fitted.classes_)
    head = _tied(W, b + W @ centre, means, centre, "class", fitted.classes_, scores, priors)
    return model(fitted, head, fitted.classes_)
