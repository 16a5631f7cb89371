"""Stages against the transformers they stand for, one by one and in pipelines, and their way back."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles.pipelines import CASES, converted, iris, seen, tensor, wine
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.cluster import FeatureAgglomeration
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_wine
from sklearn.decomposition import NMF, PCA, KernelPCA
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.kernel_approximation import Nystroem
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    Binarizer,
    FunctionTransformer,
    KBinsDiscretizer,
    MinMaxScaler,
    Normalizer,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    SplineTransformer,
    StandardScaler,
)
from sklearn.random_projection import GaussianRandomProjection

from lrp import errors
from neuralize import steps
from neuralize.curves import Curve
from neuralize.frames import Frame
from neuralize.fronts import Branches, Series
from neuralize.scaling import Scaler
from neuralize.stages import Projection, Stage


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str) -> None:
    made, schema, fitted, X = converted(name)
    Z = seen(fitted, X)
    x = schema.encode(X)
    for z in (made(tensor(x)), made.apply_(tensor(x))):
        assert z.shape == Z.shape == (len(x), made.outputs)
        scale = np.maximum(np.abs(Z).max(0), 1.0)
        # scikit-learn's PCA centres behind the product and loses some digits
        np.testing.assert_allclose(z.numpy() / scale, Z / scale, rtol=0, atol=2e-12)
    alone = torch.cat([made(tensor(x[i : i + 1])) for i in range(0, len(x), 9)])
    np.testing.assert_allclose(alone.numpy(), made(tensor(x)).numpy()[::9], rtol=1e-12, atol=1e-12)


EXACT = [
    "standard",
    "min-max clipped",
    "k best",
    "quantile",
    "polynomial",
    "polynomial from 2",
    "imputer mean",
    "imputer median, indicator",
    "one-hot rare",
    "ordinal rare",
    "target of classes",
    "columns",
]


@pytest.mark.parametrize("name", EXACT)
def test_bit_for_bit(name: str) -> None:
    made, schema, fitted, X = converted(name)
    np.testing.assert_array_equal(made(tensor(schema.encode(X))).numpy(), seen(fitted, X))


# ---------------------------------------------------------------------- precision, export


def test_float32_with_an_offset() -> None:
    X = load_wine().data + 1e4
    fitted = make_pipeline(PCA(3), StandardScaler()).fit(X)
    made, _ = steps.front(fitted.steps)
    z = made.float()(torch.tensor(X, dtype=torch.float32))
    assert z.dtype == torch.float32
    np.testing.assert_allclose(z.numpy(), fitted.transform(X), atol=2e-2)
    assert made.frame.values(z, z).dtype == torch.float32
    assert made.raw(0, z @ made.frame.parts()[0].inverse.T).dtype == torch.float32


EXPORTED = [
    "min-max clipped",
    "pca whitened",
    "yeo-johnson",
    "box-cox",
    "quantile normal",
    "polynomial",
    "tf-idf sublinear",
    "normalizer max",
    "imputer median, indicator",
    "imputer and indicator",
    "one-hot",
    "one-hot rare",
    "ordinal rare",
    "target of classes",
    "columns",
    "union, weighted, then pca",
]


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name: str) -> None:
    made, schema, _, X = converted(name)
    x = tensor(schema.encode(X))
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(made, (x[:7],), dynamic_shapes=({0: rows},), strict=False)
    for part in (x, x[:1]):
        torch.testing.assert_close(program.module()(part), made(part), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXPORTED, "log2", "log10", "quantile normal, no ties"])
def test_onnx(name: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made, schema, _, X = converted(name)
    x = tensor(schema.encode(X))
    rows = torch.export.Dim("rows")
    with warnings.catch_warnings():
        # the exporter's own
        warnings.simplefilter("ignore")
        program = torch.onnx.export(made.eval(), (x[:7],), dynamic_shapes=({0: rows},), dynamo=True, verbose=False)
    assert program is not None
    held = io.BytesIO()
    program.save(held)
    session = runtime.InferenceSession(held.getvalue(), providers=["CPUExecutionProvider"])
    z = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(z, made(x).numpy(), rtol=1e-11, atol=1e-11)


def test_copies_carry_their_own_way_back() -> None:
    made, schema, _, X = converted("power, pca")
    z = made(tensor(schema.encode(X)))
    block = made.frame.parts()[0]
    points = z @ block.inverse.T + block.shift
    before = made.raw(0, points)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        other.float()
        assert other.raw(0, points.float()).dtype == torch.float32
        np.testing.assert_allclose(other.raw(0, points.float()).numpy(), before.numpy(), rtol=2e-3)
        fresh = copy.deepcopy(made)
        for buffer in fresh.buffers():
            buffer.zero_()
        fresh.load_state_dict(made.state_dict())
        torch.testing.assert_close(fresh.raw(0, points), before, rtol=0, atol=0)
    torch.testing.assert_close(made.raw(0, points), before, rtol=0, atol=0)


# ---------------------------------------------------------------------- refusals


class Doubled(StandardScaler):
    def transform(self, X: Any, copy: Any = None) -> Any:
        return 2 * super().transform(X)


class Unknown(TransformerMixin, BaseEstimator):
    def fit(self, X: Any, y: Any = None) -> Unknown:
        self.n_features_in_ = np.shape(X)[1]
        return self

    def transform(self, X: Any) -> Any:
        return np.tanh(X)


class Quiet(StandardScaler):
    """A subclass that changes nothing of importance."""


REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "bins": (
        lambda: KBinsDiscretizer(encode="ordinal", quantile_method="averaged_inverted_cdf"),
        ("KBinsDiscretizer", "piecewise constant", "QuantileTransformer"),
    ),
    "splines": (SplineTransformer, ("SplineTransformer",)),
    "binarizer": (Binarizer, ("Binarizer", "piecewise")),
    "neighbours": (KNNImputer, ("KNNImputer", "SimpleImputer")),
    "nystroem": (lambda: Nystroem(n_components=5), ("Nystroem", "kernels")),
    "kernel pca": (lambda: KernelPCA(2), ("KernelPCA",)),
    "nmf": (lambda: NMF(2, max_iter=2000), ("NMF",)),
    "own": (Unknown, ("Unknown", "no exact layer", "register")),
    "overridden": (Doubled, ("Doubled", "overrides StandardScaler.transform")),
    "function": (lambda: FunctionTransformer(np.abs), ("FunctionTransformer", "'absolute'", "np.log1p")),
    "lambda": (lambda: FunctionTransformer(lambda x: x + 1), ("FunctionTransformer", "<lambda>")),
    "dependent coordinates": (lambda: GaussianRandomProjection(9, random_state=0), ("dependent", "rank 4")),
    "mean of columns": (lambda: FeatureAgglomeration(2, pooling_func=np.max), ("FeatureAgglomeration", "mean")),
    "power behind pca": (
        lambda: Pipeline([("first", PCA(2)), ("second", PowerTransformer())]),
        ("PCA (step 'pipe.first')", "PowerTransformer (step 'pipe.second')", "order"),
    ),
    "quantile behind scaled pca": (
        lambda: make_pipeline(PCA(2), StandardScaler(), QuantileTransformer(n_quantiles=9), MinMaxScaler(), PCA(1)),
        ("PCA (step 'pipe.pca-1')", "QuantileTransformer"),
    ),
    "polynomial behind pca": (lambda: make_pipeline(PCA(2), PolynomialFeatures(2)), ("PCA", "PolynomialFeatures")),
    "polynomial behind columns": (
        lambda: make_pipeline(
            ColumnTransformer([("a", PCA(1), [0, 1]), ("b", "passthrough", [2, 3])]), PolynomialFeatures(2)
        ),
        ("PCA", "PolynomialFeatures"),
    ),
    "product across columns": (
        lambda: make_pipeline(
            ColumnTransformer([("a", PCA(1), [0, 1]), ("b", "passthrough", [2])]),
            PolynomialFeatures((2, 2), interaction_only=True, include_bias=False),
        ),
        ("PCA (step 'pipe.columntransformer.a')", "PolynomialFeatures"),
    ),
    "a mark behind pca": (lambda: make_pipeline(PCA(2), SimpleImputer(missing_values=0)), ("PCA", "SimpleImputer")),
    "nothing left": (lambda: ColumnTransformer([("a", "drop", [0])]), ("ColumnTransformer", "no column is left")),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:The number of components is higher")
def test_refused(name: str) -> None:
    make, words = REFUSED[name]
    fitted = make().fit(iris())
    with pytest.raises(errors.UnsupportedEstimatorError) as info:
        steps.front([("pipe", fitted)])
    assert isinstance(info.value, TypeError)
    assert info.value.expected
    assert info.value.got
    assert info.value.fix
    for word in words:
        assert word in str(info.value), str(info.value)


def test_text_is_refused() -> None:
    fitted = CountVectorizer().fit(["one two", "two three"])
    with pytest.raises(errors.UnsupportedEstimatorError, match=r"'words' \(CountVectorizer\).*text"):
        steps.front([("words", fitted)], n_features=1)


def test_a_harmless_subclass_is_served() -> None:
    made, _ = steps.front([("quiet", Quiet().fit(iris()))])
    assert isinstance(made.stages[0], Scaler)


def test_unfitted() -> None:
    for make in (
        StandardScaler,
        lambda: make_pipeline(StandardScaler()),
        lambda: ColumnTransformer([("a", PCA(), [0])]),
    ):
        with pytest.raises(errors.NotFittedError, match=r"first.*not fitted"):
            steps.front([("first", make())], n_features=4)
        with pytest.raises((errors.NotFittedError, errors.ColumnError)):
            steps.front([("first", make())])
    with pytest.raises(errors.NotFittedError, match=r"'two' \(PCA\)"):
        steps.front([("one", StandardScaler().fit(iris())), ("two", PCA())])


def test_steps_that_do_not_belong_together() -> None:
    narrow, wide = StandardScaler().fit(iris()), PCA(2).fit(wine())
    with pytest.raises(errors.ColumnError) as info:
        steps.front([("narrow", narrow), ("wide", wide)])
    for word in ("PCA", "13", "4", "as a whole"):
        assert word in str(info.value)


def test_dotted_names() -> None:
    inner = Pipeline([("bins", KBinsDiscretizer(quantile_method="averaged_inverted_cdf"))])
    fitted = ColumnTransformer([("number", inner, [0, 1])]).fit(iris())
    with pytest.raises(errors.UnsupportedEstimatorError, match=r"'prep\.number\.bins'"):
        steps.front([("prep", fitted)])


def test_registered() -> None:
    class Halver(TransformerMixin, BaseEstimator):
        def fit(self, X: Any, y: Any = None) -> Halver:
            self.n_features_in_ = np.shape(X)[1]
            return self

        def transform(self, X: Any) -> Any:
            return X / 2

    @steps.register(Halver)
    def halve(fitted: Any, place: steps.Place) -> list[Stage]:
        return [Curve("log", place.width), Curve("exp", place.width), Scaler(divide=[2.0] * place.width)]

    fitted = make_pipeline(Halver(), PCA(2)).fit(iris())
    made, _ = steps.front(fitted.steps)
    np.testing.assert_allclose(made(tensor(iris())).numpy(), fitted.transform(iris()), atol=1e-12)
    assert [s.step for s in made.parts()] == ["halver", "halver", "halver", "pca"]


def test_the_estimators_stay_as_they_were() -> None:
    fitted = make_pipeline(StandardScaler(), PCA(2, whiten=True), Normalizer()).fit(wine())
    before = {k: np.array(v) for k, v in vars(fitted[1]).items() if isinstance(v, np.ndarray)}
    made, _ = steps.front(fitted.steps)
    made.float()
    for buffer in made.buffers():
        if buffer.is_floating_point():
            buffer.zero_()
    for key, value in before.items():
        np.testing.assert_array_equal(vars(fitted[1])[key], value)


def test_stages_say_what_they_are() -> None:
    made, _, _, _ = converted("columns, then pca")
    drawn = str(made)
    for word in ("ColumnTransformer", "SimpleImputer", "2 indicators" if "2 indicators" in drawn else "indicators"):
        assert word in drawn
    assert "PCA: 8 -> 3" in drawn or "PCA: " in drawn
    assert math.isfinite(made.outputs)
    branch = next(s for s in made.stages if isinstance(s, Branches))
    assert isinstance(branch.parts()[0][1], Series)
    assert isinstance(made.frame, Frame)
    assert "through an inverse" in repr(made.frame)
    assert any(isinstance(s, Projection) for s in made.stages)
