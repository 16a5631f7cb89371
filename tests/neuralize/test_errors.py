"""Bad input: a typed error that says what was expected, what came, and what to do."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import DBSCAN, AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer, MinMaxScaler, QuantileTransformer, StandardScaler
from sklearn.svm import SVR

from lrp import errors
from neuralize import CentroidHead, CoverageWarning, KernelKMeans, NeuralizedModel, neuralize
from neuralize.explanation import warn_coverage


@pytest.fixture(scope="module")
def net(wine: pd.DataFrame) -> NeuralizedModel:
    return neuralize(make_pipeline(MinMaxScaler(), KMeans(3, n_init=1, random_state=0)).fit(wine))


def teaches(info: pytest.ExceptionInfo[errors.LRPError], *words: str) -> None:
    error = info.value
    assert error.expected
    assert error.got
    assert error.fix
    for word in words:
        assert word in str(error), str(error)


def broken(X: np.ndarray, value: float) -> np.ndarray:
    X = np.array(X)
    X[7, 2] = value
    return X


BAD_TABLES: dict[str, tuple[Any, type[errors.LRPError], tuple[str, ...]]] = {
    "one-dimensional": (lambda f: f.to_numpy()[0], errors.InputError, ("1 dimension", "reshape(1, -1)")),
    "three-dimensional": (lambda f: f.to_numpy()[None], errors.InputError, ("3 dimensions",)),
    "a number": (lambda f: 3.0, errors.InputError, ("0 dimensions",)),
    "too few columns": (lambda f: f.to_numpy()[:, 1:], errors.ColumnError, ("13", "12")),
    "NaN": (lambda f: broken(f, np.nan), errors.NonFiniteError, ("row 7", "'ash'")),
    "infinity": (lambda f: broken(f, np.inf), errors.NonFiniteError, ("row 7", "'ash'")),
    "objects": (lambda f: f.to_numpy().astype(object), errors.InputError, ("object",)),
    "strings": (lambda f: f.to_numpy().astype(str), errors.InputError, ("real numbers",)),
    "complex": (lambda f: f.to_numpy() + 1j, errors.InputError, ("complex",)),
    "ragged": (lambda f: [[1.0] * 13, [2.0]], errors.InputError, ("",)),
    "masked": (lambda f: np.ma.masked_greater(f.to_numpy(), 100), errors.NonFiniteError, ("masked",)),
    "missing column": (lambda f: f.drop(columns="hue"), errors.ColumnError, ("missing: 'hue'",)),
    "surplus column": (lambda f: f.assign(more=1.0), errors.ColumnError, ("not seen in fit: 'more'",)),
    "renamed column": (lambda f: f.rename(columns={"hue": "HUE"}), errors.ColumnError, ("'hue'", "'HUE'")),
    "column twice": (lambda f: f[[*f.columns, "hue"]], errors.ColumnError, ("twice", "'hue'")),
    "other order": (lambda f: f[f.columns[::-1]], errors.ColumnError, ("order", "'alcohol'")),
    "column of words": (lambda f: f.assign(hue="red"), errors.InputError, ("'hue",)),
    "missing in a nullable column": (
        lambda f: f.assign(hue=pd.array([None] * len(f), dtype="Int64")),
        errors.NonFiniteError,
        ("'hue'",),
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables(net: NeuralizedModel, wine: pd.DataFrame, name: str) -> None:
    make, kind, words = BAD_TABLES[name]
    X = make(wine)
    for call in (net.predict, net.explain, net.set_reference, lambda x: list(net.explain_batches(x, batch_size=5))):
        with pytest.raises(kind) as info:
            call(X)
        teaches(info, *words)
    np.testing.assert_allclose(net.explain(wine).values.sum(1), net.explain(wine).output)


def test_clipping_does_not_hide_infinity(wine: pd.DataFrame) -> None:
    clipped = neuralize(make_pipeline(MinMaxScaler(clip=True), KMeans(3, n_init=1, random_state=0)).fit(wine))
    with pytest.raises(errors.NonFiniteError, match="row 7"):
        clipped.explain(broken(wine, np.inf))


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        ({"target": 3}, errors.TargetError, "does not exist"),
        ({"target": -1}, errors.TargetError, "does not exist"),
        ({"target": "one"}, errors.TargetError, "does not exist"),
        ({"target": True}, errors.TargetError, "bool"),
        ({"target": 1.0}, errors.TargetError, "float64"),
        ({"target": [0, 1]}, errors.TargetError, "rows"),
        ({"target": 1, "contrast": 9}, errors.TargetError, "contrast"),
        ({"target": 1, "contrast": 1}, errors.TargetError, "same"),
        ({"contrast": 1}, errors.TargetError, "same"),
        ({"target": 1, "rule": "divided"}, errors.TargetError, "undivided"),
        ({"rule": "gi"}, errors.RuleError, "support vector"),
        ({"rule": "hybrid"}, errors.RuleError, "support vector"),
        ({"rule": "magic"}, errors.RuleError, "midpoint"),
        ({"rule": "shapley"}, errors.RuleError, "contrast"),
        ({"rule": "midpoint", "beta": 1.0}, errors.RuleError, "nearest"),
        ({"beta": 0}, errors.RuleError, "beta"),
        ({"beta": -1.0}, errors.RuleError, "beta"),
        ({"beta": float("nan")}, errors.RuleError, "beta"),
        ({"beta": "stiff"}, errors.RuleError, "auto"),
        ({"beta": None}, errors.RuleError, "beta"),
        ({"output": "probability"}, errors.RuleError, "decision"),
        ({"batch_size": 0}, errors.InputError, "batch_size"),
        ({"batch_size": 2.5}, errors.InputError, "batch_size"),
        ({"device": "nowhere"}, errors.InputError, "device"),
        ({"out": np.empty((178, 12))}, errors.InputError, "out"),
        ({"out": np.empty((178, 13), np.float32)}, errors.InputError, "float64"),
        ({"out": [[0.0]]}, errors.InputError, "list"),
    ],
)
def test_options(wine: pd.DataFrame, options: dict[str, Any], kind: type[errors.LRPError], word: str) -> None:
    net = neuralize(make_pipeline(MinMaxScaler(), KMeans(3, n_init=1, random_state=0)).fit(wine))
    with pytest.raises(kind) as info:
        net.explain(wine, **options)
    teaches(info, word)


def test_shapley_without_reference(wine: pd.DataFrame) -> None:
    net = neuralize(KMeans(3, n_init=1, random_state=0).fit(wine))
    with pytest.raises(errors.RuleError, match="reference"):
        net.explain(wine, target=0, contrast=1, rule="shapley")


class Overridden(KMeans):
    def predict(self, X: Any) -> Any:
        return super().predict(X) * 0


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    ("estimator", "name"),
    [
        (DBSCAN(), "DBSCAN"),
        (AgglomerativeClustering(3), "AgglomerativeClustering"),
        (IsolationForest(n_estimators=2), "IsolationForest"),
        (Overridden(2, n_init=1), "Overridden"),
        (make_pipeline(PCA(2), MinMaxScaler(), QuantileTransformer(n_quantiles=10), KMeans(2, n_init=1)), "PCA"),
        (MLPClassifier(max_iter=1), "MLPClassifier"),
        (GridSearchCV(KMeans(n_init=1), {"n_clusters": [2]}, cv=2), "best_estimator_"),
        (
            make_pipeline(KBinsDiscretizer(encode="ordinal", quantile_method="averaged_inverted_cdf"), KMeans(2)),
            "KBins",
        ),
        (make_pipeline(StandardScaler(), IsolationForest(n_estimators=2)), "IsolationForest"),
        (make_pipeline(StandardScaler(), "passthrough"), "passthrough"),
    ],
)
def test_unsupported(wine: pd.DataFrame, estimator: Any, name: str) -> None:
    with pytest.raises(errors.UnsupportedEstimatorError) as info:
        neuralize(estimator.fit(wine, np.arange(len(wine)) % 2))
    teaches(info, name)


def test_no_rows_are_no_reference(wine: pd.DataFrame, net: NeuralizedModel) -> None:
    with pytest.raises(errors.InputError) as info:
        net.set_reference(wine[:0])
    teaches(info, "no rows")


def test_a_single_output_has_no_contrast(wine: pd.DataFrame) -> None:
    value = neuralize(SVR().fit(wine, wine["hue"]))
    with pytest.raises(errors.TargetError) as info:
        value.explain(wine, contrast="value")
    teaches(info, "set_level")
    with pytest.raises(errors.RuleError, match="regressions"):
        neuralize(KMeans(2, n_init=1).fit(wine)).set_level(1.0)


def test_not_estimators() -> None:
    for thing in (KMeans, 3, None, "model"):
        with pytest.raises(errors.UnsupportedEstimatorError):
            neuralize(thing)


def test_unfitted() -> None:
    for estimator in (KMeans(3), make_pipeline(StandardScaler(), KMeans(3))):
        with pytest.raises(errors.NotFittedError) as info:
            neuralize(estimator)
        teaches(info, "fit")


def test_degenerate_centres(wine: pd.DataFrame) -> None:
    with pytest.raises(errors.ConvergenceError) as info:
        neuralize(KMeans(1, n_init=1).fit(wine))
    teaches(info, "minimum over nothing", "K = 1")
    fitted = KMeans(3, n_init=1).fit(wine)
    fitted.cluster_centers_[1, 4] = np.nan
    with pytest.raises(errors.ConvergenceError) as info:
        neuralize(fitted)
    teaches(info, "[1]")


def test_overflow() -> None:
    with pytest.raises(errors.ConvergenceError, match="overflow"):
        CentroidHead([[1e200, 0.0], [0.0, 1.0]])
    net = NeuralizedModel(CentroidHead([[1e100, 0.0], [0.0, 1.0]]))
    with pytest.raises(errors.NonFiniteError, match="overflow"):
        net.predict([[1e250, 1.0]])


def test_changed_rows_are_noticed(wine: pd.DataFrame) -> None:
    X = wine.to_numpy().copy()
    explanation = neuralize(KMeans(3, n_init=1, random_state=0).fit(wine)).explain(X)
    X *= 2
    with pytest.raises(errors.DataError, match="changed"):
        _ = explanation.break_even


def test_labels_are_shown_as_they_are(wine: pd.DataFrame) -> None:
    net = neuralize(KMeans(3, n_init=1, random_state=0).fit(wine))
    with pytest.raises(errors.TargetError) as info:
        net.explain(wine, target="1")
    teaches(info, "one of 0, 1, 2", "'1'")
    with pytest.raises(errors.TargetError) as info:
        net.explain(wine, target=1.0)
    teaches(info, "such as 0,")


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        ({"beta": 10**400}, errors.RuleError, "beta"),
        ({"beta": 10**9000}, errors.RuleError, "beta"),
        ({"target": {}}, errors.TargetError, "dict"),
        ({"contrast": {0}}, errors.TargetError, "set"),
        ({"device": "meta"}, errors.InputError, "meta"),
    ],
)
def test_odd_options(wine: pd.DataFrame, options: dict[str, Any], kind: type[errors.LRPError], word: str) -> None:
    net = neuralize(KMeans(3, n_init=1, random_state=0).fit(wine))
    with pytest.raises(kind) as info:
        net.explain(wine, **options)
    teaches(info, word)


def test_low_precision(wine: pd.DataFrame) -> None:
    for lower in (NeuralizedModel.bfloat16, NeuralizedModel.half):
        net = lower(neuralize(KMeans(3, n_init=1, random_state=0).fit(wine)))
        for call in (net.explain, net.predict):
            with pytest.raises(errors.InputError, match="float32"):
                call(wine)


def test_parts_that_do_not_belong_together(wine: pd.DataFrame) -> None:
    fitted = make_pipeline(StandardScaler(), KMeans(3, n_init=1)).fit(wine)
    fitted.steps[0] = ("scale", StandardScaler().fit(wine.iloc[:, :5]))
    with pytest.raises(errors.ColumnError) as info:
        neuralize(fitted)
    teaches(info, "StandardScaler", "13", "5")
    for odd in (7, -1):
        alone = KMeans(3, n_init=1).fit(wine)
        alone.labels_[0] = odd
        with pytest.raises(errors.ConvergenceError) as info:
            neuralize(alone)
        teaches(info, "labels_", str(odd))


def test_truth_values_beside_numbers(wine: pd.DataFrame) -> None:
    mixed = wine.assign(hue=wine["hue"] > 1)
    fitted = KMeans(3, n_init=1, random_state=0).fit(mixed)
    net = neuralize(fitted)
    np.testing.assert_array_equal(net.predict(mixed), fitted.predict(mixed))
    assert net.explain(mixed).data.dtype == np.float64


def test_the_function_is_pickled_by_name() -> None:
    assert pickle.loads(pickle.dumps(neuralize)) is neuralize


def test_coverage_warning_points_to_the_caller(wine: pd.DataFrame) -> None:
    net = neuralize(make_pipeline(StandardScaler(), KMeans(8, n_init=10, random_state=0)).fit(wine))
    with pytest.warns(CoverageWarning, match="'competition': contrasts") as caught:
        net.explain(wine, target=0, beta=1e-9)
    assert caught[0].filename == __file__
    with pytest.warns(CoverageWarning) as caught:
        list(net.explain_batches(wine, target=0, beta=1e-9))
    assert caught[0].filename == __file__
    duel = net.explain(wine, target=0, contrast=1)
    duel.residual = 0.9 * duel.output
    duel.residual_parts = {"competition": 0 * duel.output, "reference": duel.residual}
    with pytest.warns(CoverageWarning, match="reference rows") as caught:
        warn_coverage(duel)
    assert "contrasts" not in str(caught[0].message)


def test_arrow_tables_are_checked_by_name(wine: pd.DataFrame, net: NeuralizedModel) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs the arrow extra")
    np.testing.assert_array_equal(net.predict(pa.table(wine.to_dict("list"))), net.predict(wine))
    with pytest.raises(errors.ColumnError, match="order"):
        net.predict(pa.table(wine[wine.columns[::-1]].to_dict("list")))


def test_chi2_is_for_values_above_zero(wine: pd.DataFrame) -> None:
    chi2 = neuralize(KernelKMeans(2, kernel="chi2", n_init=1, random_state=0).fit(wine))
    with pytest.raises(errors.InputError) as info:
        chi2.predict(broken(wine, -1.0))
    teaches(info, "row 7", "MinMaxScaler")


def test_reference_rows_measure_counterfactuals(wine: pd.DataFrame) -> None:
    fitted = KMeans(2, n_init=1, random_state=0).fit(wine)
    with pytest.raises(errors.BoundsError, match="reference"):
        neuralize(fitted).counterfactual(wine[:3], bounds="data")
    found = neuralize(fitted, reference=wine).counterfactual(wine[:3], bounds="data")
    assert "standard deviation" in found.metric
    rows = np.asarray(found.rows)
    assert (rows >= wine.min().to_numpy()).all()
    assert (rows <= wine.max().to_numpy()).all()
