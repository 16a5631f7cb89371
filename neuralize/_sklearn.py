"""Converters of scikit-learn's transformers; see :mod:`neuralize.steps`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import FeatureAgglomeration
from sklearn.decomposition import PCA, FactorAnalysis, FastICA, IncrementalPCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.feature_selection import SelectorMixin
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.neighbors import NeighborhoodComponentsAnalysis
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
    TargetEncoder,
)
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection

from neuralize.curves import FUNCTIONS, Curve, PowerCurve, QuantileCurve
from neuralize.encoders import Imputer, Indicator, Lookup, OneHot
from neuralize.scaling import Scaler
from neuralize.stages import Monomials, Projection, Selection, Stage, UnitNorm
from neuralize.steps import Place, refusal, register, selection

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


# ---------------------------------------------------------------------- column by column, affine


@register(StandardScaler)
def _standard(s: Any, place: Place) -> Scaler:
    return Scaler(
        subtract=s.mean_ if s.with_mean else None,
        divide=s.scale_ if s.with_std else None,
        source="StandardScaler",
        columns=place.width,
    )


@register(MinMaxScaler)
def _min_max(s: Any, place: Place) -> Scaler:
    low, high = s.feature_range
    clip = (float(low), float(high)) if s.clip else None
    return Scaler(multiply=s.scale_, add=s.min_, clip=clip, source="MinMaxScaler")


@register(MaxAbsScaler)
def _max_abs(s: Any, place: Place) -> Scaler:
    return Scaler(divide=s.scale_, clip=(-1.0, 1.0) if getattr(s, "clip", False) else None, source="MaxAbsScaler")


@register(RobustScaler)
def _robust(s: Any, place: Place) -> Scaler:
    return Scaler(
        subtract=s.center_ if s.with_centering else None,
        divide=s.scale_ if s.with_scaling else None,
        source="RobustScaler",
        columns=place.width,
    )


@register(SelectorMixin)
def _selector(s: Any, place: Place) -> Selection:
    return selection(s)


# ---------------------------------------------------------------------- projections


@register(PCA)
@register(IncrementalPCA)
def _pca(s: Any, place: Place) -> Projection:
    V = np.asarray(s.components_, dtype=np.float64)
    scale = np.ones(len(V))
    if s.whiten:
        scale = np.sqrt(np.asarray(s.explained_variance_, dtype=np.float64))
        # scikit-learn's own floor
        scale = np.maximum(scale, np.finfo(np.asarray(s.explained_variance_).dtype).eps)
    return Projection(V / scale[:, None], inverse=V.T * scale, centre=s.mean_, source=type(s).__name__, step=place.name)


@register(TruncatedSVD)
def _svd(s: Any, place: Place) -> Projection:
    V = np.asarray(s.components_, dtype=np.float64)
    return Projection(V, inverse=V.T, source="TruncatedSVD", step=place.name)


@register(LinearDiscriminantAnalysis)
def _lda(s: Any, place: Place) -> Projection:
    if s.solver == "lsqr":
        raise refusal(s, place.name, "its solver 'lsqr' has no transform", "fit with solver='svd' or 'eigen'")
    T = np.asarray(s.scalings_, dtype=np.float64)[:, : s._max_components].T
    centre = s.xbar_ if s.solver == "svd" else np.asarray(s.priors_) @ np.asarray(s.means_)
    image = None if s.solver == "svd" else T @ centre
    return Projection(T, centre=centre, image=image, source="LinearDiscriminantAnalysis", step=place.name)


@register(GaussianRandomProjection)
@register(SparseRandomProjection)
def _random(s: Any, place: Place) -> Projection:
    T = s.components_
    T = np.asarray(T.toarray() if hasattr(T, "toarray") else T, dtype=np.float64)
    return Projection(T, inverse=getattr(s, "inverse_components_", None), source=type(s).__name__, step=place.name)


@register(FactorAnalysis)
def _factors(s: Any, place: Place) -> Projection:
    W = np.asarray(s.components_, dtype=np.float64)
    scaled = W / s.noise_variance_
    T = np.linalg.inv(np.eye(len(W)) + scaled @ W.T).T @ scaled
    return Projection(T, centre=s.mean_, source="FactorAnalysis", step=place.name)


@register(FastICA)
def _ica(s: Any, place: Place) -> Projection:
    centre = s.mean_ if s.whiten else None
    return Projection(s.components_, inverse=s.mixing_, centre=centre, source="FastICA", step=place.name)


@register(NeighborhoodComponentsAnalysis)
def _nca(s: Any, place: Place) -> Projection:
    return Projection(s.components_, source="NeighborhoodComponentsAnalysis", step=place.name)


@register(FeatureAgglomeration)
def _agglomeration(s: Any, place: Place) -> Projection:
    if s.pooling_func is not np.mean:
        raise refusal(s, place.name, "its pooling is no mean", "fit with pooling_func=np.mean")
    member = np.equal.outer(np.arange(s.n_clusters_ if s.n_clusters is None else s.n_clusters), s.labels_)
    T = member / member.sum(1, keepdims=True)
    return Projection(T, inverse=member.T.astype(np.float64), source="FeatureAgglomeration", step=place.name)


# ---------------------------------------------------------------------- column by column, curved


_UFUNCS: dict[Any, str] = {getattr(np, name): name for name in FUNCTIONS if hasattr(np, name)}


@register(FunctionTransformer)
def _function(s: Any, place: Place) -> list[Stage]:
    if s.func is None:
        return []
    try:
        name = _UFUNCS.get(s.func)
    except TypeError:  # a callable that can't be hashed
        name = None
    if name is None or s.kw_args:
        called = getattr(s.func, "__name__", type(s.func).__name__)
        raise refusal(
            s,
            place.name,
            f"{called!r} is not one of {', '.join('np.' + n for n in sorted(_UFUNCS.values()))}",
            "use one of these, or register a stage for a transformer of your own with neuralize.steps.register "
            "(from neuralize import steps)",
        )
    return [Curve(name, place.width)]


@register(PowerTransformer)
def _power(s: Any, place: Place) -> list[Stage]:
    stages: list[Stage] = [PowerCurve(s.lambdas_, s.method)]
    if s.standardize:
        stages.append(Scaler(subtract=s._scaler.mean_, divide=s._scaler.scale_, source="PowerTransformer"))
    return stages


@register(QuantileTransformer)
def _quantile(s: Any, place: Place) -> QuantileCurve:
    return QuantileCurve(s.quantiles_, s.references_, s.output_distribution == "normal")


@register(PolynomialFeatures)
def _polynomial(s: Any, place: Place) -> Monomials:
    return Monomials(s.powers_)


@register(Normalizer)
def _normalizer(s: Any, place: Place) -> UnitNorm:
    # scikit-learn takes norms below ten roundings for zero
    return UnitNorm(place.width, s.norm, tiny=10 * float(np.finfo(np.float64).eps) * (1 - 1e-12))


@register(TfidfTransformer)
def _tfidf(s: Any, place: Place) -> list[Stage]:
    stages: list[Stage] = []
    if s.sublinear_tf:
        stages.append(Curve("1 + log", place.width, source="TfidfTransformer"))
    if hasattr(s, "idf_"):
        stages.append(Scaler(multiply=s.idf_, source="TfidfTransformer"))
    if s.norm is not None:
        stages.append(UnitNorm(place.width, s.norm, source="TfidfTransformer"))
    return stages


# ---------------------------------------------------------------------- categories and missing values


def _lists(values: Any) -> list[Any]:
    # as objects, but for dates, which numpy would turn into integers
    array = np.asarray(values)
    return list(array if array.dtype.kind in "mM" else array.astype(object))


def _positions(numbers: Floats, among: Floats) -> Ints:
    """Positions of some numbers among others, NaN included."""
    match = np.equal.outer(numbers, among) | np.logical_and.outer(np.isnan(numbers), np.isnan(among))
    return np.asarray(match.argmax(1))


def _rare(s: Any, place: Place, column: int, known: Floats) -> Ints:
    """Positions of the categories that the encoder has put into one group."""
    groups = getattr(s, "infrequent_categories_", None)
    if groups is None or groups[column] is None:
        return np.zeros(0, dtype=np.int64)
    return _positions(place.numbers(column, _lists(groups[column]), s), known)


def _grouped(size: int, rare: Ints) -> Ints:
    """Number of each category, in order; rare ones share the last."""
    number = np.zeros(size, dtype=np.int64)
    common = np.setdiff1d(np.arange(size), rare)
    number[common] = np.arange(len(common))
    number[rare] = len(common)
    return number


@register(OneHotEncoder)
def _one_hot(s: Any, place: Place) -> OneHot:
    known, groups, others = [], [], []
    strict = s.handle_unknown == "error"
    for i, categories in enumerate(s.categories_):
        numbers = place.numbers(i, _lists(categories), s)
        rare = _rare(s, place, i, numbers)
        group = _grouped(len(numbers), rare)
        other = int(group[rare[0]]) if len(rare) and s.handle_unknown in ("infrequent_if_exist", "warn") else -1
        dropped = None if s.drop_idx_ is None else s.drop_idx_[i]
        if dropped is not None:
            out = group[int(dropped)]
            other = -1 if other == out else other - (other > out)
            group = np.where(group == out, -1, group - (group > out))
        known.append(numbers)
        groups.append(group)
        others.append(other)
        if strict:
            place.book.accept(place.origins[i], numbers, type(s).__name__)
    return OneHot(known, groups, others, strict=strict)


@register(OrdinalEncoder)
def _ordinal(s: Any, place: Place) -> Lookup:
    known, tables, others = [], [], []
    strict = s.handle_unknown == "error"
    for i, categories in enumerate(s.categories_):
        numbers = place.numbers(i, _lists(categories), s)
        blank = np.isnan(numbers)
        seen = numbers[~blank]
        table = np.full(len(numbers), math.nan)
        table[~blank] = _grouped(len(seen), _rare(s, place, i, seen))
        table[blank] = s.encoded_missing_value
        known.append(numbers)
        tables.append(table[:, None])
        others.append([math.nan if s.unknown_value is None else float(s.unknown_value)])
        if strict:
            place.book.accept(place.origins[i], numbers, type(s).__name__)
    return Lookup(known, tables, others, strict=strict)


@register(TargetEncoder)
def _target(s: Any, place: Place) -> Lookup:
    classes = len(s.classes_) if s.target_type_ == "multiclass" else 1
    known, tables, others = [], [], []
    for i, categories in enumerate(s.categories_):
        known.append(place.numbers(i, _lists(categories), s))
        tables.append(np.stack(s.encodings_[i * classes : (i + 1) * classes], 1))
        others.append(np.broadcast_to(s.target_mean_, (classes,)))
    return Lookup(known, tables, others, strict=False, source="TargetEncoder")


def _marks(s: Any, place: Place) -> list[float]:
    """The number that stands for "missing" in each column."""
    mark = s.missing_values
    if isinstance(mark, str) or mark is None:
        return [float(place.numbers(i, [mark], s, encoder=False)[0]) for i in range(place.width)]
    try:
        return [float(mark)] * place.width
    except TypeError:  # pandas.NA
        return [math.nan] * place.width


@register(SimpleImputer)
def _imputer(s: Any, place: Place) -> Imputer:
    statistics = _lists(s.statistics_)
    kept = [i for i, v in enumerate(statistics) if s.keep_empty_features or v == v]
    fill = []
    for i in kept:
        value = statistics[i]
        if isinstance(value, str) or value is None or place.book.coded(place.origins[i]):
            fill.append(float(place.numbers(i, [value], s, encoder=False)[0]))
        else:
            # as scikit-learn casts it to the type seen in fit
            dtype = getattr(s, "_fill_dtype", np.dtype(np.float64))
            fill.append(float(np.asarray(value).astype(np.float64 if dtype.kind in "OUS" else dtype)))
    flags = s.indicator_.features_ if s.add_indicator else None
    return Imputer(kept, fill, _marks(s, place), flags)


@register(MissingIndicator)
def _indicator(s: Any, place: Place) -> Indicator:
    strict = bool(s.error_on_new) and s.features == "missing-only"
    return Indicator(s.features_, _marks(s, place), strict)
