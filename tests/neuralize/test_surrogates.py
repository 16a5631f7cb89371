"""Surrogates of partitions without a function: they say how far they agree, and are exact about themselves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, SpectralClustering
from sklearn.compose import make_column_transformer
from sklearn.datasets import make_moons
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from lrp import errors
from neuralize import from_labels, neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


def closes(e: object) -> bool:
    size = np.abs(e.values).sum(1) + sum(np.abs(p) for p in e.residual_parts.values())  # type: ignore[attr-defined]
    return bool((np.abs(e.values.sum(1) + e.residual - e.output) <= 1e-9 * size).all())  # type: ignore[attr-defined]


def test_agreement_is_what_it_says(wine: pd.DataFrame) -> None:
    labels = AgglomerativeClustering(4).fit_predict(StandardScaler().fit_transform(wine))
    net = from_labels(wine, labels)
    found = net.surrogate
    assert found.agreement == (net.predict(wine) == labels).mean()
    assert found.held_out <= 1
    assert found.held_out == max(found.candidates.values())
    assert found.agreement > 0.85
    for label, share in found.by_label.items():
        assert share == (net.predict(wine)[labels == label] == label).mean()
    assert "surrogate" in repr(net)
    assert f"{found.agreement:.1%}" in repr(net)
    assert "surrogate" in net.explain(wine).model
    e = net.explain(wine)
    assert e.feature_names == tuple(wine.columns)
    assert closes(e)


def test_a_partition_that_no_centres_make() -> None:
    X, labels = make_moons(300, noise=0.05, random_state=0)
    one = from_labels(X, labels, model="prototypes").surrogate
    kernel = from_labels(X, labels, model="kernel").surrogate
    assert one.candidates["1 prototype per label"] < 0.9
    assert kernel.held_out > 0.98
    net = from_labels(X, labels)
    assert net.surrogate.held_out >= max(one.held_out, kernel.held_out)
    assert closes(net.explain(X))


def test_labels_that_mean_nothing_are_said_to(wine: pd.DataFrame) -> None:
    labels = np.random.default_rng(0).integers(0, 2, len(wine))
    found = from_labels(wine, labels, model="kernel").surrogate
    assert found.held_out < 0.7
    assert found.held_out < found.agreement


def test_noise_names_and_categories(wine: pd.DataFrame) -> None:
    labels = HDBSCAN(min_cluster_size=8, copy=True).fit_predict(StandardScaler().fit_transform(wine))
    assert (labels == -1).any()
    net = from_labels(wine, labels, noise=-1)
    assert net.surrogate.left_out == (labels == -1).sum()
    assert -1 not in net.labels
    frame = wine[["proline", "hue"]].assign(kind=np.where(wine["alcohol"] > 13, "strong", "light"))
    frame.loc[3, "hue"] = np.nan
    names = np.where(frame["kind"] == "strong", "a", "b")
    step = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["proline", "hue"]), (OneHotEncoder(), ["kind"])
    )
    net = from_labels(frame, names, preprocess=step)
    assert net.surrogate.agreement == 1
    e = net.explain(frame)
    assert e.feature_names == ("proline", "hue", "kind")
    assert closes(e)


def test_many_rows_and_lone_labels() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(4500, 2))
    labels = (X[:, 0] > 0).astype(int)
    labels[0] = 7
    net = from_labels(X, labels, model="kernel")
    assert net.head.units.count <= 4001
    assert net.predict(X[:1]).tolist() == [7] or net.surrogate.by_label[7] == 0
    assert net.surrogate.by_label[1] > 0.9


@pytest.mark.parametrize(
    ("labels", "options", "kind", "words"),
    [
        ([0, 1], {}, errors.InputError, "one label for each"),
        ([0] * 178, {}, errors.InputError, "fewer than two"),
        ([0] * 100 + [-1] * 78, {"noise": -1}, errors.InputError, "besides"),
        ([0, 1] * 89, {"model": "tree"}, errors.RuleError, "surrogate"),
        ([0.0, np.nan] * 89, {}, errors.InputError, "89 missing"),
        (np.array([1, "b"] * 89, dtype=object), {}, errors.InputError, "beside"),
    ],
)
def test_errors(wine: pd.DataFrame, labels: list[int], options: dict[str, object], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        from_labels(wine, labels, **options)
    with pytest.raises(errors.InputError, match="imputer"):
        from_labels(wine.mask(wine > 1500), [0, 1] * 89)


@pytest.mark.parametrize("estimator", [AgglomerativeClustering(2), SpectralClustering(2), HDBSCAN(copy=True)])
def test_the_refusal_points_here(wine: pd.DataFrame, estimator: object) -> None:
    with pytest.raises(TypeError, match="from_labels") as info:
        neuralize(estimator.fit(StandardScaler().fit_transform(wine)))  # type: ignore[attr-defined]
    assert "no predict" in str(info.value)
