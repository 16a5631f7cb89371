"""The way back: conservation, right inverses, foldings by hand, break-even values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import way_back
from oracles.pipelines import CASES, converted, dense, iris, seen, tensor
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    RobustScaler,
    StandardScaler,
)
from sklearn.random_projection import GaussianRandomProjection

from neuralize import steps


@pytest.mark.parametrize("name", CASES)
def test_conservation(name: str) -> None:
    made, _, _, _ = converted(name)
    rng = np.random.default_rng(0)
    delta, g = tensor(rng.normal(size=(20, made.outputs))), tensor(rng.normal(size=(20, made.outputs)))
    R = made.frame.values(delta, g)
    lost = made.frame.lost(delta, g)
    assert R.shape == (20, made.inputs)
    size = R.abs().sum(1) + (delta * g).abs().sum(1)
    assert ((R.sum(1) + lost - (delta * g).sum(1)).abs() <= 1e-10 * size).all()
    if not made.frame.constants:
        assert (lost == 0).all()
    if not made.frame.mixes:
        np.testing.assert_allclose(made.frame.spread(delta * g).numpy(), R.numpy(), rtol=1e-12)
        np.testing.assert_allclose(made.frame.lost(delta * g).numpy(), lost.numpy(), rtol=1e-12)


STEP_BY_STEP = [
    "standard",
    "min-max clipped",
    "pca whitened",
    "k best",
    "yeo-johnson",
    "polynomial",
    "imputer median, indicator",
    "one-hot",
    "scale, pca",
    "scale, pca, scale, whitened pca",
    "pca clipped",
    "power, pca",
    "polynomial, scale, pca",
    "tf-idf, svd, normalizer",
    "normalizer, pca",
    "selection, pca",
    "pca, selection",
    "union",
    "union, weighted, then pca",
    "pca, union of parts",
    "columns",
    "columns, then pca",
    "pca in a column, then scale and pca",
    "columns of all kinds",
    "a column given twice",
    "nested",
    "pca behind, nonlinear beside",
]


@pytest.mark.parametrize("name", STEP_BY_STEP)
def test_against_one_step_at_a_time(name: str) -> None:
    made, _, fitted, _ = converted(name)
    rng = np.random.default_rng(1)
    delta, g = rng.normal(size=(2, 11, made.outputs))
    R = made.frame.values(tensor(delta), tensor(g)).numpy()
    expected = way_back.values(fitted, delta, g, made.inputs)
    np.testing.assert_allclose(R, expected, rtol=1e-7, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_right_inverse(name: str) -> None:
    made, _, _, _ = converted(name)
    taken: list[int] = []
    for block in made.frame.parts():
        index = np.arange(made.outputs) if block.index is None else block.index.numpy()
        taken += index.tolist()
        if block.inverse is not None and block.transpose is not None:
            TL = block.transpose.T @ block.inverse
            np.testing.assert_allclose(TL.numpy(), np.eye(len(index)), atol=1e-9)
        share = block.share
        if share is not None:
            sums = share.sum(1).numpy()
            assert (np.isclose(sums, 1) | (sums == 0)).all()
            assert (share >= 0).all()
    # each coordinate has one block
    assert sorted(taken) == list(range(made.outputs))


ELEMENTWISE = [
    "standard",
    "min-max",
    "max-abs",
    "robust",
    "yeo-johnson",
    "yeo-johnson raw",
    "box-cox",
    "quantile normal, no ties",
    "quantile, no ties",
    "log1p",
    "log, then scale",
    "sqrt",
    "exp",
    "expm1",
    "log2",
    "log10",
    "imputer mean",
    "k best",
]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_break_even_values_lead_where_they_should(name: str) -> None:
    made, schema, _, X = converted(name)
    assert not made.frame.mixes
    z = made(tensor(schema.encode(X)))
    z = z[~z.isnan().any(1)]
    # values between those seen, which some raw value attains
    points = 0.5 * (z + z.flip(0))
    block = made.frame.parts()[0]
    raw = made.raw(0, block.cut(points))
    kept = ~raw.isnan().all(0)
    assert int(kept.sum()) == made.outputs
    back = made(torch.where(raw.isnan(), tensor(schema.encode(X))[: len(raw)], raw))
    np.testing.assert_allclose(back.numpy(), points.numpy(), rtol=1e-7, atol=1e-7)


def test_no_raw_value_leads_there() -> None:
    made, _, _, _ = converted("min-max clipped")
    far = torch.full((1, made.outputs), 1.5, dtype=torch.float64)
    assert made.raw(0, far).isnan().all()
    assert not made.raw(0, far / 2).isnan().any()
    uniform = converted("quantile")[0]
    assert uniform.raw(0, torch.full((1, 13), 1.01, dtype=torch.float64)).isnan().all()
    assert converted("box-cox")[0].raw(0, torch.full((1, 13), -1e6, dtype=torch.float64)).isnan().any()
    norm = converted("normalizer l2")[0]
    assert norm.raw(0, torch.zeros(1, 9, dtype=torch.float64)).isnan().all()


def test_grouped_columns_have_no_break_even_value() -> None:
    made, schema, _, X = converted("columns")
    names = schema.feature_names
    zeros = [torch.zeros(2, len(b.share), dtype=torch.float64) for b in made.frame.parts()]
    raw = sum(made.raw(k, z).nan_to_num(nan=0.0).sum(0) for k, z in enumerate(zeros))
    known = {n for n, v in zip(names, raw.tolist(), strict=True) if v != 0}
    # the constant 0 behind a scaler is the mean; doors pass as they are, with 0 at 0
    assert known == {"age", "income"}
    np.testing.assert_allclose(raw[names.index("age")] / 2, X["age"].iloc[::2].mean(), rtol=1e-12)
    # an indicator beside the value, or a second block: no single value is neutral
    made = converted("imputer median, indicator")[0]
    raw = made.raw(0, torch.zeros(1, made.outputs, dtype=torch.float64))
    assert raw.isnan().tolist() == [[False, True, True, False]]
    made = converted("union")[0]
    for k, block in enumerate(made.frame.parts()):
        width = made.inputs if block.inverse is not None else len(block.index)
        assert made.raw(k, torch.zeros(1, width, dtype=torch.float64)).isnan().sum() >= 3


def test_raw_values_through_a_projection() -> None:
    made, schema, fitted, X = converted("power, pca")
    block = made.frame.parts()[0]
    z = made(tensor(schema.encode(X)))
    points = z @ block.inverse.T + block.shift
    expected = fitted[0].inverse_transform(fitted[1].inverse_transform(seen(fitted, X)))
    np.testing.assert_allclose(made.raw(0, points).numpy(), expected, rtol=1e-9)


INVERTED = [
    "pca",
    "pca whitened",
    "truncated svd",
    "lda",
    "lda eigen",
    "sparse projection",
    "gaussian projection with inverse",
    "factor analysis",
    "ica",
    "nca",
    "agglomeration",
    "scale, pca",
    "scale, pca, scale, whitened pca",
    "power, pca",
    "nested",
]


@pytest.mark.parametrize("name", INVERTED)
def test_the_point_of_z_leads_to_z(name: str) -> None:
    made, schema, _, X = converted(name)
    z = made(tensor(schema.encode(X)))
    (block,) = made.frame.parts()
    points = z @ block.inverse.T + block.shift
    raw = made.raw(0, points)
    assert not raw.isnan().any()
    np.testing.assert_allclose(made(raw).numpy(), z.numpy(), atol=1e-7 * float(z.abs().max()))
    # what the projection does not see stays in the middle of the data
    if name in ("pca", "lda", "lda eigen", "scale, pca"):
        np.testing.assert_allclose(raw.mean(0).numpy(), np.asarray(X)[::2].mean(0), rtol=0.2)


# ---------------------------------------------------------------------- the way back, by hand


def folded(fitted: Pipeline, delta: np.ndarray, g: np.ndarray, columns: int) -> np.ndarray:
    """R = (L delta) (T'g) from scikit-learn's own transform and inverse_transform, both affine."""
    zero = np.zeros((1, columns))
    T = (dense(fitted.transform(np.eye(columns))) - dense(fitted.transform(zero))).T
    d = T.shape[0]
    L = (fitted.inverse_transform(np.eye(d)) - fitted.inverse_transform(np.zeros((1, d)))).T
    return (delta @ L.T) * (g @ T)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_pipeline(StandardScaler(), PCA(4)),
        lambda: make_pipeline(StandardScaler(), PCA(5, whiten=True)),
        lambda: make_pipeline(PCA(5, whiten=True), MinMaxScaler()),
        lambda: make_pipeline(RobustScaler(), PCA(7), StandardScaler(), PCA(3, whiten=True), MaxAbsScaler()),
        lambda: make_pipeline(PCA(9), TruncatedSVD(6, random_state=0), StandardScaler()),
        lambda: make_pipeline(
            MinMaxScaler(), GaussianRandomProjection(6, compute_inverse_components=True, random_state=1), PCA(2)
        ),
        lambda: make_pipeline(StandardScaler(), PCA()),
    ],
)
def test_folding_by_hand(make: Callable[[], Pipeline]) -> None:
    X = load_wine().data
    fitted = make().fit(X)
    made, _ = steps.front(fitted.steps)
    rng = np.random.default_rng(1)
    delta, g = rng.normal(size=(2, 30, made.outputs))
    R = made.frame.values(tensor(delta), tensor(g)).numpy()
    expected = folded(fitted, delta, g, X.shape[1])
    np.testing.assert_allclose(R, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


def test_full_rotation_equals_folded_weights() -> None:
    """A linear unit behind a rotation is a linear unit of the raw columns."""
    X = load_wine().data
    fitted = make_pipeline(StandardScaler(), PCA(whiten=True)).fit(X)
    made, _ = steps.front(fitted.steps)
    w = np.random.default_rng(2).normal(size=made.outputs)
    Z = fitted.transform(X)
    R = made.frame.values(tensor(Z), tensor(np.broadcast_to(w, Z.shape))).numpy()
    zero = fitted.inverse_transform(np.zeros((1, made.outputs)))
    weights = w @ (fitted[1].components_ / np.sqrt(fitted[1].explained_variance_)[:, None]) / fitted[0].scale_
    np.testing.assert_allclose(R, weights * (X - zero), rtol=1e-8, atol=1e-9)


def test_rows_with_equal_coordinates_get_equal_values() -> None:
    X = load_wine().data
    fitted = make_pipeline(StandardScaler(), PCA(4)).fit(X)
    made, _ = steps.front(fitted.steps)
    basis = np.linalg.svd(fitted[1].components_)[2][4:]
    hidden = np.random.default_rng(0).normal(size=(len(X), len(basis))) @ basis * fitted[0].scale_
    root = made(tensor(X))[:1]
    values = [
        made.frame.values(made(tensor(rows)) - root, made(tensor(rows)) - root).numpy() for rows in (X, X + hidden)
    ]
    np.testing.assert_allclose(values[0], values[1], atol=1e-9)
    # distances behind an orthogonal projection are squares, scaled or not
    assert values[0].min() >= 0
    assert all(b.proportional for b in made.frame.parts())


def test_whitened_distances_are_no_squares_but_conserve() -> None:
    X = load_wine().data
    fitted = make_pipeline(StandardScaler(), PCA(4, whiten=True)).fit(X)
    made, _ = steps.front(fitted.steps)
    assert not made.frame.parts()[0].proportional
    u = made(tensor(X)) - 1.0
    R = made.frame.values(u, u)
    assert float(R.min()) < 0
    np.testing.assert_allclose(R.sum(1).numpy(), (u * u).sum(1).numpy(), rtol=1e-12)


def test_union_adds_up_block_by_block() -> None:
    made, _, fitted, _ = converted("union")
    pca, best = fitted[1].transformer_list[0][1], fitted[1].transformer_list[1][1]
    rng = np.random.default_rng(5)
    delta, g = rng.normal(size=(2, 7, 5))
    V = pca.components_
    expected = (delta[:, :2] @ V) * (g[:, :2] @ V)
    expected[:, best.get_support()] += delta[:, 2:] * g[:, 2:]
    np.testing.assert_allclose(made.frame.values(tensor(delta), tensor(g)).numpy(), expected, atol=1e-12)
    assert len(made.frame.blocks) == 2


def test_dummies_and_monomials_are_summed() -> None:
    made, _, fitted, X = converted("one-hot")
    R = tensor(np.random.default_rng(0).normal(size=(4, made.outputs)))
    owners = [name.rsplit("_", 1)[0] for name in fitted.get_feature_names_out()]
    expected = np.stack([R.numpy()[:, [o == c for o in owners]].sum(1) for c in X.columns], 1)
    np.testing.assert_allclose(made.frame.spread(R).numpy(), expected, atol=1e-12)
    made, _, fitted, _ = converted("polynomial")
    R = tensor(np.random.default_rng(0).normal(size=(4, made.outputs)))
    expected = np.zeros((4, 4))
    for k, powers in enumerate(fitted.powers_):
        for t, p in enumerate(powers):
            expected[:, t] += R.numpy()[:, k] * p / max(powers.sum(), 1)
    np.testing.assert_allclose(made.frame.spread(R).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(made.frame.lost(R).numpy(), R.numpy()[:, 0])


def test_a_norm_is_transparent() -> None:
    """svd -> norm: products of displacement and covector do not see the factor."""
    made, _, fitted, _ = converted("tf-idf, svd, normalizer")
    V = fitted[1].components_
    delta, g = np.random.default_rng(0).normal(size=(2, 5, 4))
    expected = (delta @ V) * (g @ V)
    np.testing.assert_allclose(made.frame.values(tensor(delta), tensor(g)).numpy(), expected, atol=1e-12)
    assert made.frame.parts()[0].shift.isnan().all()


def test_a_weight_of_zero_leaves_a_constant() -> None:
    union = FeatureUnion([("a", StandardScaler()), ("b", PCA(2))], transformer_weights={"a": 0.0}).fit(iris())
    made, _ = steps.front([("both", union)])
    np.testing.assert_allclose(made(tensor(iris())).numpy(), union.transform(iris()), atol=1e-12)
    delta = torch.ones(1, 6, dtype=torch.float64)
    assert made.frame.lost(delta, delta).tolist() == [4.0]
    np.testing.assert_allclose(made.frame.values(delta, delta).sum().item(), 2.0)


def test_order_of_columns_of_a_plain_front() -> None:
    made, _, _, _ = converted("standard")
    assert made.frame.plain
    assert converted("min-max clipped")[0].frame.plain
    assert steps.front([], n_features=3)[0].frame.plain
    shuffled = ColumnTransformer([("a", StandardScaler(), [2, 0]), ("b", "passthrough", [1, 3])]).fit(iris())
    frame = steps.front([("c", shuffled)])[0].frame
    assert len(frame.blocks) == 1
    assert frame.parts()[0].share is None
    assert frame.parts()[0].index.tolist() == [1, 2, 0, 3]


# ---------------------------------------------------------------------- any affine pipeline

LEAVES: list[Callable[[int, int], Any]] = [
    lambda width, seed: StandardScaler(),
    lambda width, seed: MinMaxScaler((-1, 2), clip=bool(seed % 2)),
    lambda width, seed: RobustScaler(with_centering=bool(seed % 2)),
    lambda width, seed: MaxAbsScaler(),
    lambda width, seed: "passthrough",
    lambda width, seed: PCA(1 + seed % width, whiten=bool(seed % 3 == 0)),
    lambda width, seed: (
        TruncatedSVD(1 + seed % width, algorithm="arpack", random_state=0) if 1 + seed % width < width else None
    ),
    lambda width, seed: Normalizer(),
]


@st.composite
def affine(draw: st.DrawFn, width: int, depth: int = 2) -> tuple[Any, int]:
    """A transformer of affine steps and norms, not fitted, with the number of its outputs."""
    kind = draw(st.sampled_from(["leaf", "leaf", "pipe", "union", "columns"] if depth else ["leaf"]))
    if kind == "leaf":
        seed = draw(st.integers(0, 11))
        leaf = draw(st.sampled_from(LEAVES))(width, seed)
        return leaf, leaf.n_components if isinstance(leaf, PCA | TruncatedSVD) else width
    made, total = [], 0
    for k in range(draw(st.integers(1, 3))):
        columns = draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=width, unique=True))
        inner, out = draw(affine(len(columns) if kind == "columns" else width, depth - 1))
        if kind == "pipe":
            width = out
        inner = "passthrough" if inner is None else inner
        made.append((f"s{k}", inner, columns) if kind == "columns" else (f"s{k}", inner))
        total = out if kind == "pipe" else total + out
    return {"pipe": Pipeline, "union": FeatureUnion, "columns": ColumnTransformer}[kind](made), total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_affine_pipeline(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 4))
    first, middle = data.draw(affine(width))
    second, _ = data.draw(affine(middle))
    X = np.random.default_rng(0).normal(size=(40, width)) @ np.diag([1.0, 3.0, 0.5, 2.0][:width]) + 1
    fitted = Pipeline([("one", first), ("two", second)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Z = fitted.fit(X).transform(X)
    except (ValueError, RuntimeWarning, np.linalg.LinAlgError):
        # copies of columns have no variance of their own
        assume(False)
    # a scale that is rounding only, as of copied columns, tells nothing
    assume(np.abs(fitted.transform(X + 1e-11 * np.sin(9 * X)) - Z).max() < 1e-8)
    made, _ = steps.front(fitted.steps, n_features=width)
    np.testing.assert_allclose(made(tensor(X)).numpy(), Z, atol=1e-7 * max(1, np.abs(Z).max()))
    rng = np.random.default_rng(1)
    delta, g = rng.normal(size=(2, 5, made.outputs))
    R = made.frame.values(tensor(delta), tensor(g)).numpy()
    expected = way_back.values(fitted, delta, g, width)
    np.testing.assert_allclose(R, expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_allclose(
        R.sum(1), (delta * g).sum(1), rtol=0, atol=1e-9 * (np.abs(R).sum(1).max() + np.abs(delta * g).sum(1).max())
    )
