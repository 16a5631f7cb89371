"""From fitted transformers to stages: one converter per class of scikit-learn.

:func:`front` converts all steps in front of an estimator. A transformer of
your own joins with a function from the fitted object to a stage::

    @steps.register(MyTransformer)
    def convert(fitted, place):
        return Scaler(divide=fitted.scale_)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.utils.validation import check_is_fitted

from lrp.errors import ColumnError, NotFittedError, UnsupportedEstimatorError
from neuralize.encoders import Imputer
from neuralize.fronts import Branches, Front, Series
from neuralize.scaling import Scaler
from neuralize.schema import Codebook, Origin, Schema
from neuralize.stages import Selection, Stage

__all__ = ["Place", "front", "refusal", "register"]

Origins = tuple[Origin | None, ...]


@dataclass(frozen=True)
class Place:
    """Where in the pipeline a transformer stands.

    Parameters
    ----------
    name : str
        Names of the steps that lead to it, joined by dots.
    origins : tuple of Origin or None
        Per input column the raw column it still is.
    book : Codebook
        Collects the categories of raw columns.
    """

    name: str
    origins: Origins
    book: Codebook

    @property
    def width(self) -> int:
        """Columns that come in."""
        return len(self.origins)

    def inside(self, name: str) -> Place:
        """The same columns, one name deeper."""
        return replace(self, name=f"{self.name}.{name}" if self.name else name)

    def label(self, step: Any) -> str:
        """How messages name a step here."""
        return f"{type(step).__name__} (step {self.name!r})"

    def numbers(self, column: int, values: Iterable[Any], step: Any, encoder: bool = True) -> npt.NDArray[np.float64]:
        """The numbers that values of an input column have in the network."""
        return self.book.numbers(self.origins[column], values, self.label(step), encoder)


Converter = Callable[[Any, Place], Stage | Sequence[Stage]]
C = TypeVar("C", bound=Converter)

_REASONS = {
    "KBinsDiscretizer": "it is piecewise constant, so that a value has no influence except where it jumps",
    "Binarizer": "it is piecewise constant, so that a value has no influence except where it jumps",
    "SplineTransformer": "a column becomes several curves that are no one-to-one map of it",
    "KNNImputer": "an imputed value depends on other columns through neighbours",
    "IterativeImputer": "an imputed value depends on other columns through a model",
    "KernelPCA": "its coordinates are not affine in the columns",
    "Nystroem": "its coordinates are kernels, not affine in the columns",
    "RBFSampler": "its coordinates are random waves, not affine in the columns",
    "TSNE": "it has no transform for new rows",
    "UMAP": "its coordinates come from an optimisation",
    "Isomap": "its coordinates come from a neighbour graph",
    "LocallyLinearEmbedding": "its coordinates come from a neighbour graph",
    "NMF": "its coordinates come from an optimisation",
    "LatentDirichletAllocation": "its coordinates come from an optimisation",
    "CountVectorizer": "its input is text, not a table",
    "TfidfVectorizer": "its input is text, not a table",
    "HashingVectorizer": "its input is text, not a table",
    "FeatureHasher": "several columns may share a coordinate by chance",
    "DictVectorizer": "its input is no table",
}
_FIXES = {
    "CountVectorizer": "count words first, fit TfidfTransformer and the estimator on the counts, and explain these",
    "TfidfVectorizer": "count words first, fit TfidfTransformer and the estimator on the counts, and explain these",
    "KNNImputer": "use SimpleImputer, or impute before the pipeline is fitted",
    "IterativeImputer": "use SimpleImputer, or impute before the pipeline is fitted",
    "KBinsDiscretizer": "use the column itself or QuantileTransformer, or bin before the pipeline is fitted",
}


def refusal(step: Any, name: str, reason: str, fix: str = "") -> UnsupportedEstimatorError:
    """The error for a step that relevance can't pass: names it, the reason and the way out."""
    kind = type(step).__name__
    return UnsupportedEstimatorError(
        f"step {name!r} ({kind}) can't be passed exactly: {reason}",
        expected="scalers, projections, feature selection, power and quantile transforms, encoders, SimpleImputer, "
        "PolynomialFeatures, Normalizer, TfidfTransformer, ColumnTransformer, FeatureUnion",
        got=f"a pipeline with {kind}",
        fix=fix
        or "apply this step before the pipeline is fitted and explain its output, or register a stage for it with "
        "neuralize.steps.register (from neuralize import steps)",
    )


def _refuse(step: Any, place: Place) -> Stage:
    kind = type(step).__name__
    raise refusal(step, place.name, _REASONS.get(kind, "no exact layer is known for it"), _FIXES.get(kind, ""))


_dispatch = functools.singledispatch(_refuse)


@overload
def register(cls: type, converter: None = None) -> Callable[[C], C]: ...
@overload
def register(cls: type, converter: C) -> C: ...
def register(cls: type, converter: Any = None) -> Any:
    """Register a converter for a class of transformers; a decorator without ``converter``.

    It serves subclasses that do not override ``transform``.

    Parameters
    ----------
    cls : type
    converter : callable
        ``converter(fitted, place)`` returns a :class:`neuralize.stages.Stage`,
        or several, first to last.

    Examples
    --------
    >>> class Doubler:
    ...     n_features_in_ = 2
    ...     def fit(self, X): ...
    ...     def transform(self, X): return 2 * X
    >>> @register(Doubler)
    ... def convert(fitted, place):
    ...     return Scaler(multiply=[2.0, 2.0], source="Doubler")
    >>> front([("double", Doubler())])[0].stages[0]
    Scaler(Doubler: x * scale)
    """

    def add(function: Any) -> Any:
        _dispatch.register(cls, lambda step, place: function(step, place))
        _CLASSES.append(cls)
        return function

    return add if converter is None else add(converter)


_CLASSES: list[type] = [Pipeline, ColumnTransformer, FeatureUnion]


def _serves(step: Any, place: Place) -> None:
    """Raise where the step overrides the ``transform`` that its converter stands for."""
    kind = type(step)
    owner = next((c for c in kind.__mro__ if c in _CLASSES), None)
    # static: a pipeline makes the method anew at each access
    mine, theirs = (inspect.getattr_static(c, "transform", None) for c in (kind, owner))
    if owner is not None and mine is not theirs:
        raise refusal(step, place.name, f"it overrides {owner.__name__}.transform")


def fitted_or_raise(step: Any, name: str) -> None:
    """Raise ``NotFittedError`` that names the step."""
    try:
        check_is_fitted(step)
    except SklearnNotFittedError as error:
        kind = type(step).__name__
        raise NotFittedError(
            f"step {name!r} ({kind}) is not fitted",
            expected="a fitted pipeline",
            got=f"{kind} before fit",
            fix="call fit of the whole pipeline first",
        ) from error
    except (TypeError, AttributeError):
        # no scikit-learn estimator: its converter knows
        return


def _check_width(step: Any, place: Place) -> None:
    seen = getattr(step, "n_features_in_", None)
    if seen is not None and int(seen) != place.width:
        raise ColumnError(
            f"{place.label(step)} and the steps before it were fitted on tables of different width",
            expected=f"{int(seen)} columns for {type(step).__name__}",
            got=f"{place.width}",
            fix="fit the pipeline as a whole",
        )


def _convert(step: Any, place: Place) -> tuple[list[Stage], Origins]:
    """Stages of one step, and what of its outputs still is a raw column."""
    if step is None or (isinstance(step, str) and step == "passthrough"):
        return [], place.origins
    if isinstance(step, (type, str)):
        raise refusal(step, place.name, f"{step!r} is no fitted transformer", "pass a fitted pipeline")
    _serves(step, place)
    if isinstance(step, Pipeline):
        stages: list[Stage] = []
        for name, inner in step.steps:
            found, origins = _convert(inner, place.inside(name))
            stages += found
            place = replace(place, origins=origins)
        return stages, place.origins
    fitted_or_raise(step, place.name)
    if isinstance(step, ColumnTransformer):
        _check_width(step, place)
        return _columns(step, place)
    if isinstance(step, FeatureUnion):
        every = range(place.width)
        branches = [(name, inner, None, every) for name, inner in step.transformer_list]
        return _branches(step, place, branches, step.transformer_weights)
    _check_width(step, place)
    made = _dispatch(step, place)
    stages = [made] if isinstance(made, Stage) else list(made)
    for stage in stages:
        stage.step = place.name
        if stage.inputs not in (0, place.width):
            raise ColumnError(
                f"{place.label(step)} and the steps before it were fitted on tables of different width",
                expected=f"{stage.inputs} columns for {stage.source}",
                got=f"{place.width}",
                fix="fit the pipeline as a whole",
            )
        place = replace(place, origins=_origins(stage, place))
    return stages, place.origins


def _origins(stage: Stage, place: Place) -> Origins:
    """What of a stage's outputs still is a raw column; columns it computes with hold numbers."""
    if not stage.inputs:
        stage.inputs = stage.outputs = place.width
    if not stage.codes:
        for origin in place.origins:
            place.book.number(origin)
    found: list[Origin | None] = [None if k < 0 else place.origins[k] for k in stage.keeps().tolist()]
    if isinstance(stage, Imputer):
        marks = stage.marks.tolist()
        found = [
            origin if origin is None else origin.without(marks[k])
            for origin, k in zip(found, stage.keeps().tolist(), strict=True)
        ]
    return tuple(found)


def _columns(step: Any, place: Place) -> tuple[list[Stage], Origins]:
    where = step._transformer_to_input_indices
    branches = []
    for name, inner, _ in step.transformers_:
        columns = list(where[name])
        if columns:
            branches.append((name, inner, columns, columns))
    return _branches(step, place, branches, step.transformer_weights)


def _branches(
    step: Any, place: Place, branches: Sequence[tuple[str, Any, Any, Iterable[int]]], weights: Any
) -> tuple[list[Stage], Origins]:
    """Transformers side by side: (name, transformer, columns or None, positions)."""
    made: list[tuple[Any, Stage]] = []
    out: list[Origin | None] = []
    for name, inner, picked, positions in branches:
        if isinstance(inner, str) and inner == "drop":
            continue
        here = replace(place.inside(name), origins=tuple(place.origins[k] for k in positions))
        stages, origins = _convert(inner, here)
        weight = (weights or {}).get(name)
        series = Series(stages, here.width, source=name, step=here.name)
        if weight is not None and weight != 1:
            scale = Scaler(multiply=np.full(series.outputs, float(weight)), source="weight")
            series = Series([*stages, scale], here.width, source=name, step=here.name)
            for origin in origins:
                place.book.number(origin)
            origins = (None,) * len(origins)
        made.append((picked, series))
        out += origins
    if not out:
        raise refusal(step, place.name, "no column is left", "keep at least one column")
    kind = type(step).__name__
    return [Branches(made, place.width, source=kind, step=place.name)], tuple(out)


def _seen(step: Any, name: str) -> Any:
    """What the steps that read the raw table have noted of it in fit; None if nothing."""
    if step is None or isinstance(step, str):
        return None
    found = getattr(step, name, None)
    inside: Iterable[Any] = ()
    if isinstance(step, Pipeline):
        # the first that is no "passthrough": those behind it read another table
        inside = [s for _, s in step.steps if s is not None and not isinstance(s, str)][:1]
    elif isinstance(step, FeatureUnion):
        inside = (s for _, s in step.transformer_list)
    return found if found is not None else next((f for s in inside if (f := _seen(s, name)) is not None), None)


def front(
    steps: Iterable[tuple[str, Any]], feature_names: Sequence[str] | None = None, n_features: int | None = None
) -> tuple[Front, Schema]:
    """Stages of all steps in front of an estimator, and the schema of the raw table.

    Parameters
    ----------
    steps : iterable of (str, transformer)
        As in ``Pipeline.steps``, without the last; may be empty.
    feature_names : sequence of str, optional
        Columns seen in fit; by default those of the first step.
    n_features : int, optional
        D; by default what the first step has seen.

    Returns
    -------
    Front, Schema
        ``front(torch.from_numpy(schema.encode(X)))`` equals what the steps
        make of X.

    Raises
    ------
    UnsupportedEstimatorError
        A step, or an order of steps, that relevance can't pass exactly.
    NotFittedError
        A step that is not fitted.
    ColumnError
        Steps fitted on tables of different width.

    Examples
    --------
    >>> import torch
    >>> from sklearn.datasets import load_wine
    >>> from sklearn.decomposition import PCA
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> X = load_wine().data
    >>> pipe = make_pipeline(StandardScaler(), PCA(2)).fit(X)
    >>> layers, schema = front(pipe.steps)
    >>> z = layers(torch.from_numpy(schema.encode(X)))
    >>> bool(np.allclose(z, pipe.transform(X)))
    True
    """
    listed = list(steps)
    first = next((s for _, s in listed if s is not None and not isinstance(s, str)), None)
    if n_features is None:
        n_features = _seen(first, "n_features_in_")
    if n_features is None:
        for name, step in listed:
            if step is not None and not isinstance(step, (str, Pipeline)):
                fitted_or_raise(step, name)
        raise ColumnError(
            "the number of columns is not known",
            expected="a first step that knows the table it was fitted with",
            got=type(first).__name__,
            fix="pass n_features=, or fit the pipeline again",
        )
    if feature_names is None:
        feature_names = _seen(first, "feature_names_in_")
    book = Codebook(int(n_features), feature_names)
    stages = _all(listed, book)
    if any(c.kind == "code" for c in book.columns):
        # once more, with the categories of encoders in their order, before those that only imputers name
        book = book.ordered()
        stages = _all(listed, book)
    made = Front(stages, int(n_features))
    plain = all(c.kind == "number" and not c.strict for c in book.columns)
    nullable = np.zeros(made.inputs, dtype=bool)
    if not plain or any(isinstance(s, (Imputer, Branches)) for s in stages):
        nullable = made.nullable() | np.array([c.kind == "" for c in book.columns])
    return made, book.schema(nullable.tolist())


def _all(steps: Sequence[tuple[str, Any]], book: Codebook) -> list[Stage]:
    from neuralize import _sklearn  # noqa: F401  registers the converters

    stages: list[Stage] = []
    origins: Origins = tuple(Origin(t) for t in range(len(book.columns)))
    for name, step in steps:
        found, origins = _convert(step, Place(name, origins, book))
        stages += found
    if not origins:
        name, step = steps[-1]
        raise refusal(step, name, "no column is left", "keep at least one column")
    for origin in origins:
        book.number(origin)
    return stages


def selection(fitted: Any) -> Selection:
    """The columns a selector keeps."""
    mask = np.asarray(fitted.get_support())
    return Selection(np.flatnonzero(mask), len(mask), source=type(fitted).__name__)
