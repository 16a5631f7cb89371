"""Our explanations in shap's own container and pictures."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from neuralize import neuralize
from neuralize.explanation import Explanation

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def shap() -> Any:
    pytest.importorskip("matplotlib").use("Agg")
    with warnings.catch_warnings():
        # on import: a method of matplotlib's colour maps that will be deprecated
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        module = pytest.importorskip("shap")
    major, minor = importlib.metadata.version("shap").split(".")[:2]
    assert (int(major), int(minor)) >= (0, 46)
    return module


@pytest.fixture
def figure() -> Iterator[Callable[[], Any]]:
    import matplotlib.pyplot as plt

    plt.close("all")
    yield plt.gcf
    plt.close("all")


def explain(X: pd.DataFrame, **options: Any) -> Explanation:
    fitted = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(X)
    return neuralize(fitted, reference=X).explain(X, **options)


@pytest.fixture(scope="module")
def explained(wine: pd.DataFrame) -> Explanation:
    return explain(wine, rule="undivided")


@pytest.fixture(scope="module")
def coded() -> Explanation:
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"colour": rng.choice(["red", "green", "blue"], 60), "size": rng.normal(size=60)})
    encode = make_column_transformer((OneHotEncoder(), ["colour"]), (StandardScaler(), ["size"]))
    return neuralize(make_pipeline(encode, KMeans(3, n_init=1, random_state=0)).fit(X)).explain(X)


def sums(shown: Any, explanation: Explanation) -> None:
    gap = np.abs(shown.base_values + shown.values.sum(1) - explanation.output)
    assert (gap <= 1e-9 * (np.abs(shown.values).sum(1) + np.abs(shown.base_values))).all()


def written(figure: Any) -> set[str]:
    """Every text in the picture."""
    import matplotlib.text

    figure.canvas.draw()
    return {t.get_text() for t in figure.findobj(matplotlib.text.Text)}


def test_sums_are_the_outputs(shap: Any, explained: Explanation) -> None:
    found = explained.to_shap()
    assert isinstance(found, shap.Explanation)
    assert found.values.shape == (178, 13)
    assert np.abs(explained.residual).max() > 0.1  # else it would not matter where the residual goes
    sums(found, explained)
    np.testing.assert_array_equal(found.values, explained.values)
    np.testing.assert_array_equal(found.data, explained.data)
    assert list(found.feature_names) == list(explained.feature_names)
    # shap's own slices and sums work on it
    assert found[:, "proline"].values.shape == (178,)
    np.testing.assert_allclose(found.abs.mean(0).values, np.abs(explained.values).mean(0))


def test_waterfall(shap: Any, explained: Explanation, figure: Callable[[], Any]) -> None:
    shap.plots.waterfall(explained.to_shap()[5], max_display=14, show=False)
    texts = written(figure())
    ex = explained
    # the bars run from the residual to the output
    assert any(f"{ex.output[5]:.3f}".rstrip("0") in t for t in texts)
    assert any(f"{abs(ex.residual[5]):.3f}".rstrip("0") in t for t in texts)
    for value in ex.values[5]:
        shown = f"{abs(value):.2f}".rstrip("0").rstrip(".")
        assert any(t.lstrip("+−") == shown for t in texts)


@pytest.mark.parametrize("name", ["bar", "beeswarm", "heatmap", "violin"])
def test_pictures_of_all_rows(shap: Any, explained: Explanation, figure: Callable[[], Any], name: str) -> None:
    getattr(shap.plots, name)(explained.to_shap(), max_display=14, show=False)
    assert set(explained.feature_names) <= written(figure())


def test_scatter_and_one_bar(shap: Any, explained: Explanation, figure: Callable[[], Any]) -> None:
    shap.plots.scatter(explained.to_shap()[:, "hue"], show=False)
    assert "hue" in written(figure())
    shap.plots.bar(explained.to_shap()[0], show=False)


def test_the_largest_values_only(shap: Any, wine: pd.DataFrame, figure: Callable[[], Any]) -> None:
    """CSR values: shap takes arrays, and what was left out is in the base value."""
    some = explain(wine, top=4)
    found = some.to_shap()
    assert isinstance(found.values, np.ndarray)
    assert (found.values != 0).sum(1).max() == 4
    sums(found, some)
    for name in ("bar", "beeswarm", "heatmap"):
        getattr(shap.plots, name)(found, show=False)
    shap.plots.waterfall(found[0], show=False)
    assert "proline" in " ".join(written(figure()))


def test_sparse_rows(shap: Any, figure: Callable[[], Any]) -> None:
    X = scipy.sparse.random_array((60, 40), density=0.3, rng=np.random.default_rng(0), format="csr")
    ex = neuralize(KMeans(3, n_init=1, random_state=0).fit(X)).explain(X)
    found = ex.to_shap()
    assert isinstance(found.data, np.ndarray)
    np.testing.assert_array_equal(found.data, X.toarray())
    sums(found, ex)
    shap.plots.beeswarm(found, show=False)


def test_categories_are_shown_by_name(shap: Any, coded: Explanation, figure: Callable[[], Any]) -> None:
    found = coded.to_shap()
    sums(found, coded)
    red = int(np.flatnonzero(coded.data[:, 0] == coded.categories["colour"].index("red"))[0])
    shap.plots.waterfall(found[red], show=False)
    assert "red = colour" in written(figure())
    for name in ("bar", "beeswarm", "heatmap"):
        getattr(shap.plots, name)(found, show=False)
