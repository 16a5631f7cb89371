"""Relevance back through a fitted pipeline, one step at a time: slow, plain numpy, no code of the package.

A pair (delta, g) of displacement and covector is carried while steps are affine,
with T from differences of ``transform`` and its right inverse from differences
of ``inverse_transform``; a nonlinear step turns pairs into relevance.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_selection import SelectorMixin
from sklearn.impute import SimpleImputer
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)

Pair = tuple[np.ndarray, np.ndarray]
AFFINE = (PCA, TruncatedSVD, SelectorMixin, StandardScaler, MinMaxScaler, MaxAbsScaler, RobustScaler)


def dense(Z: Any) -> np.ndarray:
    return np.asarray(Z.toarray() if hasattr(Z, "toarray") else Z, dtype=np.float64)


def matrices(step: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    zero = np.zeros((1, width))
    if getattr(step, "clip", False):
        T = np.diag(step.scale_)
        return T, np.diag(1 / step.scale_)
    T = (dense(step.transform(np.eye(width))) - dense(step.transform(zero))).T
    d = len(T)
    if isinstance(step, SelectorMixin):
        return T, T.T
    return T, (step.inverse_transform(np.eye(d)) - step.inverse_transform(np.zeros((1, d)))).T


def shares(step: Any, width: int) -> np.ndarray:
    """(outputs, inputs) of a nonlinear step."""
    if isinstance(step, OneHotEncoder):
        owners = np.repeat(np.arange(width), [len(c) - (0 if step.drop_idx_ is None else 1) for c in step.categories_])
        return np.eye(width)[owners]
    if isinstance(step, PolynomialFeatures):
        return step.powers_ / np.maximum(step.powers_.sum(1, keepdims=True), 1)
    if isinstance(step, SimpleImputer) and step.add_indicator:
        return np.concatenate([np.eye(width), np.eye(width)[step.indicator_.features_]])
    return np.eye(width)


def back(step: Any, pairs: list[Pair], R: np.ndarray, width: int) -> tuple[list[Pair], np.ndarray]:
    """Pairs and relevance at the inputs (width) from those at the outputs."""
    if step is None or (isinstance(step, str) and step == "passthrough"):
        return pairs, R
    if isinstance(step, Pipeline):
        widths = []
        for _, inner in step.steps:
            widths.append(width)
            width = width if inner is None or isinstance(inner, str) else outputs(inner, width)
        for (_, inner), w in zip(reversed(step.steps), reversed(widths), strict=True):
            pairs, R = back(inner, pairs, R, w)
        return pairs, R
    if isinstance(step, ColumnTransformer | FeatureUnion):
        branches = (
            [(n, s, step._transformer_to_input_indices[n]) for n, s, c in step.transformers_]
            if isinstance(step, ColumnTransformer)
            else [(n, s, list(range(width))) for n, s in step.transformer_list]
        )
        found: list[Pair] = []
        total, start = np.zeros((len(R), width)), 0
        for name, inner, columns in branches:
            if (isinstance(inner, str) and inner == "drop") or not columns:
                continue
            stop = start + outputs(inner, len(columns))
            weight = (step.transformer_weights or {}).get(name) or 1.0
            here = [(d[:, start:stop] / weight, g[:, start:stop] * weight) for d, g in pairs]
            inside, part = back(inner, here, R[:, start:stop], len(columns))
            pick = np.eye(width)[columns]
            # where a column is given twice, the second copies go their own way
            turn = [columns[:k].count(c) for k, c in enumerate(columns)]
            for t in range(max(turn) + 1):
                mine = np.array([k for k, when in enumerate(turn) if when == t])
                found += [(d[:, mine] @ pick[mine], g[:, mine] @ pick[mine]) for d, g in inside]
            total += part @ pick
            start = stop
        return found, total
    if isinstance(step, AFFINE):
        T, L = matrices(step, width)
        # relevance that is closed can pass only where nothing mixes
        return [(d @ L.T, g @ T) for d, g in pairs], R @ (T != 0)
    if isinstance(step, Normalizer) or (isinstance(step, FunctionTransformer) and step.func is None):
        return pairs, R
    M = shares(step, width)
    if isinstance(step, SimpleImputer) and not step.add_indicator:
        return pairs, R
    return [], (R + sum((d * g for d, g in pairs), np.zeros_like(R))) @ M


def outputs(step: Any, width: int) -> int:
    if step is None or isinstance(step, str):
        return width
    if isinstance(step, Pipeline):
        for _, inner in step.steps:
            width = outputs(inner, width)
        return width
    if isinstance(step, FeatureUnion):
        return sum(outputs(s, width) for _, s in step.transformer_list if not (isinstance(s, str) and s == "drop"))
    if isinstance(step, FunctionTransformer):
        return width
    return len(step.get_feature_names_out())


def values(step: Any, delta: np.ndarray, g: np.ndarray, width: int) -> np.ndarray:
    """Relevance (N, width) of the raw columns."""
    with warnings.catch_warnings():
        # steps fitted on frames are asked about arrays
        warnings.filterwarnings("ignore", "X does not have valid feature names")
        pairs, R = back(step, [(delta, g)], np.zeros_like(delta), width)
    return sum((d * c for d, c in pairs), R if R.shape[1] == width else np.zeros((len(R), width)))
