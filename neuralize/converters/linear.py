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
    # one row per class, but several classes at once: the classes are those of a matrix of truth values
    several = str(getattr(getattr(fitted, "_label_binarizer", None), "y_type_", "")).startswith("multilabel")
    if several or classes.ndim != 1 or len(W) != (1 if len(classes) == 2 else len(classes)):
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
    # scikit-learn before 1.8 also fitted one class against the rest, and two classes by a doubled softmax
    several = len(getattr(fitted, "classes_", ())) > 2
    scheme = getattr(fitted, "multi_class", "auto")
    other = scheme == "ovr" or fitted.solver == "liblinear" if several else scheme == "multinomial"
    return _convert(fitted, LogisticRegression, soft=not other)


def _register_margins() -> None:
    for base in _MARGINS:

        def convert(fitted: Any, base: type = base) -> NeuralizedModel:
            return _convert(fitted, base, soft=False)

        neuralize.register(base, convert)


_register_margins()
