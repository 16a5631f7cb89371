"""From a fitted estimator to its network: one converter per class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, overload

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.utils.validation import check_is_fitted

from lrp.errors import ColumnError, ConvergenceError, NotFittedError, UnsupportedEstimatorError
from neuralize.centroids import CentroidHead
from neuralize.network import NeuralizedModel
from neuralize.scaling import Scaler

__all__ = ["Neuralizer", "neuralize", "scaler_layers"]

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
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.datasets import load_wine
    >>> X = load_wine().data
    >>> fitted = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(X)
    >>> net = neuralize(fitted, reference=X)
    >>> bool((net.predict(X) == fitted.predict(X)).all())
    True

    A model of your own joins with a function from the fitted object to a network:

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


def unsupported(what: str, got: str, fix: str) -> UnsupportedEstimatorError:
    """The error for estimators and steps without an exact network."""
    return UnsupportedEstimatorError(
        what,
        expected="KMeans, alone or behind StandardScaler, MinMaxScaler, MaxAbsScaler or RobustScaler in a Pipeline",
        got=got,
        fix=fix,
    )


def _refuse(fitted: Any) -> NeuralizedModel:
    name = type(fitted).__name__
    raise unsupported(
        f"{name} has no exact network here",
        name,
        "choose a supported estimator, or register a converter with @neuralize.register",
    )


neuralize = Neuralizer()


def _fitted(estimator: Any) -> None:
    try:
        check_is_fitted(estimator)
    except SklearnNotFittedError as error:
        name = type(estimator).__name__
        raise NotFittedError(
            f"{name} is not fitted", expected="a fitted estimator", got=f"{name} before fit", fix="call fit first"
        ) from error


@neuralize.register(KMeans)
def _kmeans(fitted: Any) -> NeuralizedModel:
    _fitted(fitted)
    if type(fitted).predict is not KMeans.predict:
        name = type(fitted).__name__
        raise unsupported(f"{name} overrides KMeans.predict", name, "register a converter for it")
    labels = getattr(fitted, "labels_", None)
    centres = np.asarray(fitted.cluster_centers_)
    if labels is not None and len(labels) and not 0 <= np.min(labels) <= np.max(labels) < len(centres):
        raise ConvergenceError(
            "labels_ and cluster_centers_ do not belong together",
            expected=f"labels from 0 to {len(centres) - 1}",
            got=f"labels from {np.min(labels)} to {np.max(labels)}",
            fix="fit again, and leave the fitted attributes as they are",
        )
    sizes = None if labels is None else np.bincount(labels, minlength=len(centres))
    return NeuralizedModel(
        CentroidHead(centres, sizes),
        feature_names=getattr(fitted, "feature_names_in_", None),
        source=type(fitted).__name__,
    )


def _standard(s: Any) -> Scaler:
    return Scaler(
        subtract=s.mean_ if s.with_mean else None, divide=s.scale_ if s.with_std else None, source="StandardScaler"
    )


def _min_max(s: Any) -> Scaler:
    clip = tuple(map(float, s.feature_range)) if s.clip else None
    return Scaler(multiply=s.scale_, add=s.min_, clip=clip, source="MinMaxScaler")  # type: ignore[arg-type]


def _max_abs(s: Any) -> Scaler:
    return Scaler(divide=s.scale_, clip=(-1.0, 1.0) if getattr(s, "clip", False) else None, source="MaxAbsScaler")


def _robust(s: Any) -> Scaler:
    return Scaler(
        subtract=s.center_ if s.with_centering else None,
        divide=s.scale_ if s.with_scaling else None,
        source="RobustScaler",
    )


_SCALERS: dict[type, Callable[[Any], Scaler]] = {
    StandardScaler: _standard,
    MinMaxScaler: _min_max,
    MaxAbsScaler: _max_abs,
    RobustScaler: _robust,
}


def scaler_layers(step: Any, name: str) -> list[Scaler]:
    """Layers of one transforming step of a pipeline, pipelines of such steps included."""
    if step is None or (isinstance(step, str) and step == "passthrough"):
        return []
    if isinstance(step, Pipeline):
        return [layer for inner, s in step.steps for layer in scaler_layers(s, f"{name}.{inner}")]
    make = _SCALERS.get(type(step))
    if make is None:
        kind = type(step).__name__
        raise unsupported(
            f"step {name!r} ({kind}) can't be passed exactly",
            f"a pipeline with {kind}",
            "apply this step before the pipeline is fitted and explain its output, or use elementwise scalers",
        )
    _fitted(step)
    return [make(step)]


def _leaves(fitted: Any) -> list[Any]:
    if isinstance(fitted, Pipeline):
        return [leaf for _, step in fitted.steps for leaf in _leaves(step)]
    return [] if fitted is None or isinstance(fitted, str) else [fitted]


@neuralize.register(Pipeline)
def _pipeline(fitted: Any) -> NeuralizedModel:
    *steps, (name, last) = fitted.steps
    if last is None or isinstance(last, str):
        raise unsupported(f"the last step {name!r} is no clustering", repr(last), "end the pipeline with a clustering")
    scalers = [layer for step_name, step in steps for layer in scaler_layers(step, step_name)]
    net = neuralize.convert(last)
    for scaler in scalers:
        if scaler.features not in (None, net.n_features):
            raise ColumnError(
                f"{scaler.source} and {type(last).__name__} were fitted on tables of different width",
                expected=f"{net.n_features} columns in every step",
                got=f"{scaler.features} in {scaler.source}",
                fix="fit the pipeline as a whole",
            )
    names = getattr(_leaves(fitted)[0], "feature_names_in_", None)
    net.feature_names = None if names is None else tuple(str(n) for n in names)
    return net.behind(scalers, " -> ".join([*(s.source for s in scalers), net.source.split(" -> ")[-1]]))
