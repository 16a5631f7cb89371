"""What converters share: checks of fitted estimators, and the model around a head."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.utils.validation import check_is_fitted

from lrp.errors import NotFittedError, UnsupportedEstimatorError
from neuralize.heads import Head
from neuralize.network import NeuralizedModel

__all__ = ["dense", "fitted_only", "model", "own_method", "unsupported"]


def unsupported(what: str, got: str, fix: str) -> UnsupportedEstimatorError:
    """The error for estimators and steps without an exact network."""
    return UnsupportedEstimatorError(
        what,
        expected="a clustering, mixture, density model, SVM, k-NN or linear classifier with an exact network "
        "(docs/kinds-of-models.md lists them), alone or at the end of a Pipeline",
        got=got,
        fix=fix,
    )


def fitted_only(estimator: Any) -> None:
    """Raise ``NotFittedError`` before fit."""
    try:
        check_is_fitted(estimator)
    except SklearnNotFittedError as error:
        name = type(estimator).__name__
        raise NotFittedError(
            f"{name} is not fitted", expected="a fitted estimator", got=f"{name} before fit", fix="call fit first"
        ) from error


def own_method(estimator: Any, base: type, *methods: str) -> None:
    """Refuse subclasses that override a method the network stands for."""
    for method in methods:
        if getattr(type(estimator), method, None) is not getattr(base, method, None):
            name = type(estimator).__name__
            raise unsupported(f"{name} overrides {base.__name__}.{method}", name, "register a converter for it")


def dense(array: Any) -> npt.NDArray[np.float64]:
    """As float64, dense."""
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array, dtype=np.float64)


def model(fitted: Any, head: Head, labels: npt.ArrayLike | None = None) -> NeuralizedModel:
    """The network around a head, with the names of the estimator's columns."""
    return NeuralizedModel(
        head,
        labels=labels,
        feature_names=getattr(fitted, "feature_names_in_", None),
        source=type(fitted).__name__,
    )
