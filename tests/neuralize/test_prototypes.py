"""The prototypes that carried a decision: centres, support vectors, neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from lrp import errors
from neuralize import Explanation, KernelKMeans, neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


@pytest.fixture(scope="module")
def kinds(wine: pd.DataFrame) -> np.ndarray:
    return np.where(wine["alcohol"] > 13, "strong", "light")


def test_centres(wine: pd.DataFrame) -> None:
    net = neuralize(make_pipeline(StandardScaler(), KMeans(4, n_init=1, random_state=0)).fit(wine))
    e = net.explain(wine, rule="undivided")
    for i in (0, 50, -1):
        found = e.prototypes(i, top=9)
        assert set(found["prototype"]) <= set(range(4))
        # all shares are of the own centre and its competitors, half and half
        own = found[found["speaks"] == "for"]
        assert own["prototype"].tolist() == [e.target[i]]
        assert own["share"].item() == pytest.approx(0.5)
        rivals = found[found["speaks"] == "against"].set_index("prototype")["share"]
        for k, share in rivals.items():
            assert share == pytest.approx(e.competitors[i, k] / 2)


def test_neighbours(wine: pd.DataFrame, kinds: np.ndarray) -> None:
    fitted = make_pipeline(StandardScaler(), KNeighborsClassifier(3)).fit(wine, kinds)
    e = neuralize(fitted).explain(wine + 0.01)
    Z = fitted[0].transform(wine + 0.01)
    ranked = fitted[1].kneighbors(Z, 4, return_distance=False)
    for i in range(0, len(wine), 7):
        found = e.prototypes(i)
        # the two around the threshold, and the one that decided
        assert set(ranked[i, 2:]) <= set(found["prototype"])
        assert found["share"].sum() == pytest.approx(1)


def test_support_vectors(wine: pd.DataFrame, kinds: np.ndarray) -> None:
    fitted = make_pipeline(StandardScaler(), SVC(gamma=0.1)).fit(wine, kinds)
    e = neuralize(fitted).explain(wine)
    svc = fitted[1]
    side = dict(zip(svc.support_.tolist(), np.where(svc.dual_coef_[0] > 0, "strong", "light").tolist(), strict=True))
    for i in (0, 60, 100):
        found = e.prototypes(i, top=50)
        assert found["share"].is_monotonic_decreasing
        for prototype, speaks in zip(found["prototype"], found["speaks"], strict=True):
            assert (side[prototype] == e.target[i]) == (speaks == "for")
    kernel = neuralize(KernelKMeans(3, n_init=1, random_state=0).fit(StandardScaler().fit_transform(wine)))
    assert len(kernel.explain(StandardScaler().fit_transform(wine)).prototypes(3, top=7)) == 7


def test_without_prototypes(wine: pd.DataFrame, kinds: np.ndarray, tmp_path: Any) -> None:
    linear = neuralize(make_pipeline(StandardScaler(), LogisticRegression()).fit(wine, np.arange(178) % 3))
    e = neuralize(KMeans(2, n_init=1, random_state=0).fit(wine)).explain(wine)
    loaded = Explanation.load(e.save(tmp_path / "e.npz"))
    for explanation in (loaded, linear.explain(wine)):
        with pytest.raises(errors.RuleError, match="prototypes"):
            explanation.prototypes(0)
    for wrong in (178, 1.5, "a"):
        with pytest.raises(errors.InputError, match="no such row"):
            e.prototypes(wrong)
    with pytest.raises(errors.InputError, match="top"):
        e.prototypes(0, top=-1)
