"""From a fitted estimator to its network: one converter per class."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar, overload

from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline

from lrp.errors import ColumnError
from neuralize.converters._common import unsupported
from neuralize.network import NeuralizedModel
from neuralize.schema import Schema
from neuralize.steps import front
from neuralize.texts import TextSchema, is_vectorizer

__all__ = ["Neuralizer", "neuralize"]

Converter = Callable[[Any], NeuralizedModel]
C = TypeVar("C", bound=Converter)


class Neuralizer:
    """Turn a fitted clustering, alone or at the end of a pipeline, into an equivalent network.

    ``neuralize(fitted, reference=None)`` is the only instance.

    Parameters
    ----------
    fitted : estimator or Pipeline
        It is never modified, and not needed afterwards.
    reference : array-like or DataFrame (N, D), optional
        Rows that set the default stiffness ``beta="auto"`` (1 / their mean
        margin) and the baseline of Shapley values. Without it the fitted
        centres do the former.

    Returns
    -------
    NeuralizedModel
        With ``net.predict(X) == fitted.predict(X)``.

    Raises
    ------
    UnsupportedEstimatorError
        No exact network is known for it, or for a step.
    NotFittedError, ConvergenceError
        Nothing to convert: not fitted, K = 1, centres that are not finite.

    Examples
    --------
    >>> from sklearn.cluster import KMeans
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.datasets import load_wine
    >>> X = load_wine().data
    >>> from sklearn.preprocessing import StandardScaler
    >>> fitted = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(X)
    >>> net = neuralize(fitted, reference=X)
    >>> bool((net.predict(X) == fitted.predict(X)).all())
    True

    A model of your own joins with a function from the fitted object to a network:

    >>> from neuralize import CentroidHead
    >>> class Anchors:
    ...     anchors = [[0.0, 0.0], [1.0, 1.0]]
    >>> @neuralize.register(Anchors)
    ... def convert(fitted):
    ...     return NeuralizedModel(CentroidHead(fitted.anchors), source="Anchors")
    >>> neuralize(Anchors()).predict([[0.2, 0.1]]).tolist()
    [0]
    """

    __name__ = "neuralize"

    def __init__(self) -> None:
        self._dispatch = functools.singledispatch(_refuse)

    def __call__(self, fitted: Any, reference: Any = None) -> NeuralizedModel:
        net = self.convert(fitted)
        return net if reference is None else net.set_reference(reference)

    def __reduce__(self) -> str:
        # the only instance: pickled by name, like a function
        return "neuralize"

    def convert(self, fitted: Any) -> NeuralizedModel:
        """The network, without reference."""
        importlib.import_module("neuralize.converters.all")
        if isinstance(fitted, type):
            raise unsupported(f"{fitted.__name__} is a class", "a class", "pass a fitted instance")
        return self._dispatch(fitted)

    @overload
    def register(self, cls: type, converter: None = None) -> Callable[[C], C]: ...
    @overload
    def register(self, cls: type, converter: C) -> C: ...
    def register(self, cls: type, converter: Any = None) -> Any:
        """Register a converter for a class and its subclasses; a decorator without ``converter``."""
        return self._dispatch.register(cls) if converter is None else self._dispatch.register(cls, converter)

    def dispatch(self, cls: type) -> Converter:
        """The converter that would serve a class."""
        return self._dispatch.dispatch(cls)


_NO_PREDICT = (
    "it has no predict: its labels are those of the rows it was fitted on, and no function of the columns gives them"
)
_FROM_LABELS = (
    "neuralize.from_labels(X, labels) fits a kernel model that can be explained exactly to its partition, as a "
    "surrogate, and states how far it agrees; or choose KMeans, GaussianMixture or KernelKMeans"
)
_STEPS = (
    "its output is a step function of single columns, so a relevance by distances or weights would be another model's"
)
_TREES = "use a method for trees, such as shap.TreeExplainer"
_REASONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("SpectralClustering", "AgglomerativeClustering", "HDBSCAN", "DBSCAN", "OPTICS", "FeatureAgglomeration"),
        (_NO_PREDICT, _FROM_LABELS),
    ),
    **dict.fromkeys(("SpectralCoclustering", "SpectralBiclustering"), (_NO_PREDICT, _FROM_LABELS)),
    **dict.fromkeys(
        (
            "BaseDecisionTree",
            "BaseForest",
            "IsolationForest",
            "BaseGradientBoosting",
            "BaseHistGradientBoosting",
            "BaseWeightBoosting",
            "BaseBagging",
        ),
        (_STEPS, _TREES),
    ),
    "BaseMultilayerPerceptron": (
        "it is a network already, but not one of ours",
        "copy its weights (coefs_, intercepts_) into a torch module and explain that with lrp.attribute",
    ),
    "LocalOutlierFactor": (
        "its score is a ratio of densities of neighbours of neighbours",
        "use OneClassSVM or KernelDensity",
    ),
    "EllipticEnvelope": (
        "it is one robust Gaussian, a distance without competitor",
        "use OneClassSVM, or GaussianMixture with two components",
    ),
    "BaseSearchCV": ("it holds the estimator it has chosen", "pass search.best_estimator_"),
    "CalibratedClassifierCV": (
        "calibrated probabilities are another model's than the classifier's decision",
        "pass the calibrated estimator's own classifier",
    ),
    "_BaseNB": ("only GaussianNB measures distances in its columns", "use GaussianNB or LogisticRegression"),
}


def _refuse(fitted: Any) -> NeuralizedModel:
    name = type(fitted).__name__
    for base in type(fitted).__mro__:
        if base.__name__ in _REASONS:
            reason, fix = _REASONS[base.__name__]
            raise unsupported(f"{name} has no exact network: {reason}", name, fix)
    raise unsupported(
        f"{name} has no exact network here",
        name,
        "choose a supported estimator, or register a converter with @neuralize.register",
    )


neuralize = Neuralizer()


def _flat(steps: list[tuple[str, Any]], prefix: str = "") -> list[tuple[str, Any]]:
    """Steps of nested pipelines in one list; the estimator of the innermost last."""
    *front, (name, last) = steps
    listed = [(prefix + n, step) for n, step in front]
    if isinstance(last, FrozenEstimator):
        last = last.estimator
    if isinstance(last, Pipeline):
        return listed + _flat(last.steps, f"{prefix}{name}.")
    return [*listed, (prefix + name, last)]


@neuralize.register(FrozenEstimator)
def _frozen(fitted: Any) -> NeuralizedModel:
    return neuralize.convert(fitted.estimator)


@neuralize.register(Pipeline)
def _pipeline(fitted: Any) -> NeuralizedModel:
    *steps, (name, last) = _flat(fitted.steps)
    if last is None or isinstance(last, str):
        raise unsupported(f"the last step {name!r} is no clustering", repr(last), "end the pipeline with an estimator")
    net = neuralize.convert(last)
    live = [s for _, s in steps if s is not None and not isinstance(s, str)]
    if not live:
        return net
    schema: Schema
    if is_vectorizer(live[0]):
        text = TextSchema.of(live[0])
        first = next(i for i, (_, s) in enumerate(steps) if s is live[0])
        made, _ = front(steps[first + 1 :], text.names, text.n_features)
        schema = text
    else:
        made, schema = front(steps)
    if made.outputs != net.n_features:
        raise ColumnError(
            f"the steps and {type(last).__name__} were fitted on tables of different width",
            expected=f"{net.n_features} columns in front of {type(last).__name__}",
            got=f"{made.outputs} from {type(live[-1]).__name__}",
            fix="fit the pipeline as a whole",
        )
    return net.behind(made, schema, " -> ".join([*(type(s).__name__ for s in live), net.source]))
