"""Linear classifiers: exact log-odds where the model states probabilities, margins elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, Perceptron, RidgeClassifier, RidgeClassifierCV, SGDClassifier
from sklearn.svm import LinearSVC

from neuralize.additive import AdditiveHead
from neuralize.conversion import neuralize
from neuralize.converters._common import dense, fitted_only, model, own_method, unsupported
from neuralize.linear_units import LinearUnits
from neuralize.network import NeuralizedModel
from neuralize.pools import HardPool, SoftPool

_MARGINS = (LinearSVC, RidgeClassifier, RidgeClassifierCV, SGDClassifier, Perceptron)


def _convert(fitted: Any, base: type, soft: bool) -> NeuralizedModel:
    fitted_only(fitted)
    own_method(fitted, base, "predict", "decision_function")
    name, classes = type(fitted).__name__, np.asarray(fitted.classes_) if hasattr(fitted, "classes_") else np.empty(0)
    W = np.atleast_2d(dense(fitted.coef_))
    b = np.broadcast_to(np.asarray(fitted.intercept_, dtype=np.float64), (len(W),))
    if classes.ndim != 1 or len(W) != (1 if len(classes) == 2 else len(classes)):
        raise unsupported(
            f"{name} was fitted with several targets per row",
            f"coefficients {W.shape} for {len(classes)} classes",
            "fit one classifier per target",
        )
    if len(classes) == 2:  # one row, positive for classes_[1]
        W, b = np.vstack([-W / 2, W / 2]), np.concatenate([-b / 2, b / 2])
    pool = (SoftPool if soft else HardPool)(len(classes), {"intercept": -b}, decision=True)
    head = AdditiveHead(LinearUnits(W), pool, kind="class", unit="log-odds" if soft else "margin", names=classes)
    return model(fitted, head, classes)


@neuralize.register(LogisticRegression)
def _logistic(fitted: Any) -> NeuralizedModel:
    own_method(fitted, LogisticRegression, "predict_proba")
    return _convert(fitted, LogisticRegression, soft=True)


def _register_margins() -> None:
    for base in _MARGINS:

        def convert(fitted: Any, base: type = base) -> NeuralizedModel:
            return _convert(fitted, base, soft=False)

        neuralize.register(base, convert)


_register_margins()
