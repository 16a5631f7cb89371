"""Networks are compared with their estimators; only rounding is excused."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fitted import CASES
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.datasets import load_diabetes, load_iris
from sklearn.neighbors import KernelDensity, KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from lrp.errors import UnverifiedError
from neuralize import neuralize
from neuralize.audit import Decisions, conservation, decisions

LABELLED = {name: case for name, case in CASES.items() if case.logits not in ("value", "density")}


def borders(fitted: Any, X: np.ndarray, pairs: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, D) on borders of the estimator to the last bit that matters, and steps (n, D) across them."""
    rng = np.random.default_rng(0)
    a, b = X[rng.integers(len(X), size=8 * pairs)], X[rng.integers(len(X), size=8 * pairs)]
    other = fitted.predict(a) != fitted.predict(b)
    a, b = a[other][:pairs], b[other][:pairs]
    step, start = b - a, fitted.predict(a)
    for _ in range(60):
        middle = (a + b) / 2
        same = (fitted.predict(middle) == start)[:, None]
        a, b = np.where(same, middle, a), np.where(same, b, middle)
    return a, step


class Stubborn:
    """An estimator that says what it was told to."""

    def __init__(self, answers: np.ndarray) -> None:
        self.answers = answers

    def predict(self, X: Any) -> np.ndarray:
        return self.answers


@pytest.mark.parametrize("name", LABELLED)
def test_on_the_borders(name: str) -> None:
    fitted, X = LABELLED[name].fit()
    net = neuralize(fitted)
    rows, step = borders(fitted, X)
    found = decisions(net, fitted, pd.DataFrame(rows))
    assert found.otherwise == 0
    assert found.total == len(rows) > 0
    # a millionth of the way to either side, the other side's label is no rounding
    here, there = rows - 1e-6 * step, rows + 1e-6 * step
    first, second = fitted.predict(here), fitted.predict(there)
    crossed = first != second
    assert crossed.mean() > 0.5
    for place, answers in ((here, second), (there, first)):
        wrong = decisions(net, Stubborn(answers[crossed]), pd.DataFrame(place[crossed]))
        assert wrong == Decisions(0, 0, int(crossed.sum()))


def test_labels_the_network_does_not_know_are_not_excused() -> None:
    X = load_iris().data
    net = neuralize(KMeans(3, n_init=1, random_state=0).fit(X))
    assert decisions(net, Stubborn(np.full(150, 7)), pd.DataFrame(X)).otherwise == 150
    mixed = np.where(np.arange(150) < 149, net.predict(X), 7)
    assert decisions(net, Stubborn(mixed), pd.DataFrame(X)) == Decisions(149, 0, 1)


def test_far_from_the_origin() -> None:
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(3000, 4)) + 1e7, columns=list("abcd"))
    for fitted in (KMeans(4, n_init=1, random_state=0), make_pipeline(StandardScaler(), KMeans(4, n_init=1))):
        fitted.fit(X)
        found = decisions(neuralize(fitted), fitted, X)
        assert found.otherwise == 0
    plain = KMeans(4, n_init=1, random_state=0).fit(X)
    assert decisions(neuralize(plain), plain, X).within_rounding > 0


@pytest.mark.parametrize("k", [1, 4, 5])
@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
def test_neighbours_equally_far(k: int, metric: str) -> None:
    X, y = load_iris(return_X_y=True)
    X = np.round(X)
    fitted = KNeighborsClassifier(k, metric=metric).fit(X, y)
    rng = np.random.default_rng(0)
    grid = np.round(X.mean(0) + 2 * X.std(0) * rng.normal(size=(1000, 4)))
    net = neuralize(fitted)
    found = decisions(net, fitted, pd.DataFrame(grid))
    assert found.otherwise == 0
    assert found.within_rounding > 0
    # where the k-th and the next are not equally far, nothing is excused
    distances = np.sort(
        np.abs(grid[:, None] - X).sum(2) if metric == "manhattan" else ((grid[:, None] - X) ** 2).sum(2)
    )
    clear = grid[distances[:, k - 1] < distances[:, k]]
    theirs = fitted.predict(clear)
    assert decisions(net, fitted, pd.DataFrame(clear)) == Decisions(len(clear), 0, 0)
    assert decisions(net, Stubborn((theirs + 1) % 3), pd.DataFrame(clear)).equal == 0


def test_votes_of_several_duels() -> None:
    """A duel of the label with a third one may decide between two."""
    X, y = load_iris(return_X_y=True)
    fitted = SVC(gamma=2.0).fit(X, y)
    net = neuralize(fitted)
    rng = np.random.default_rng(0)
    far = X.mean(0) + 20 * X.std(0) * rng.normal(size=(500, 4))
    assert decisions(net, fitted, pd.DataFrame(far)).otherwise == 0


def test_numbers() -> None:
    X, y = load_diabetes(return_X_y=True)
    fitted = make_pipeline(StandardScaler(), SVR()).fit(X, y)
    net = neuralize(fitted)
    frame = pd.DataFrame(X)
    assert decisions(net, fitted, frame) == Decisions(len(X), 0, 0)
    net.set_level(100.0)
    assert decisions(net, fitted, frame) == Decisions(len(X), 0, 0)
    assert decisions(net, Stubborn(fitted.predict(X) + 1e-5), frame) == Decisions(0, 0, len(X))


def test_densities() -> None:
    X = load_iris().data
    rng = np.random.default_rng(0)
    far = pd.DataFrame(X.mean(0) + 3 * X.std(0) * rng.normal(size=(500, 4)))
    fitted = KernelDensity(bandwidth=0.3).fit(X)
    found = decisions(neuralize(fitted), fitted, far)
    assert found.otherwise == 0
    # the tree leaves off what the sum over all rows has
    exact = logsumexp(-((far.to_numpy()[:, None] - X) ** 2).sum(2) / (2 * 0.3**2), axis=1)
    exact -= np.log(len(X)) + 4 * np.log(0.3 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(neuralize(fitted).predict(far), exact, rtol=1e-9)
    assert found.within_rounding > 10
    assert (np.abs(fitted.score_samples(far) - exact) > 1e-9 * np.abs(exact)).sum() >= found.within_rounding
    other = KernelDensity(bandwidth=0.3 + 1e-6).fit(X)
    assert decisions(neuralize(fitted), other, pd.DataFrame(X)).otherwise > 100
    rough = KernelDensity(bandwidth=0.3, rtol=1e-2).fit(X)
    found = decisions(neuralize(rough), rough, far)
    assert found.otherwise == 0
    loose = KernelDensity(bandwidth=0.3, atol=1e-3).fit(X)
    assert decisions(neuralize(loose), loose, far).otherwise == 0


def test_single_precision() -> None:
    X = pd.DataFrame(load_iris().data).astype(np.float32)
    fitted = KMeans(3, n_init=1, random_state=0).fit(X)
    assert fitted.cluster_centers_.dtype == np.float32
    assert decisions(neuralize(fitted), fitted, X.astype(np.float64)) == Decisions(150, 0, 0)


def test_only_the_estimators_own_refusal_is_told() -> None:
    X = pd.DataFrame(load_iris().data)
    net = neuralize(KMeans(3, n_init=1, random_state=0).fit(X))
    smaller = KMeans(3, n_init=1, random_state=0).fit(X.iloc[:, :3])
    with pytest.raises(UnverifiedError, match="nothing is verified"):
        decisions(net, smaller, X)


def test_conservation() -> None:
    X = load_iris().data
    net = neuralize(KMeans(3, n_init=1, random_state=0).fit(X))
    for options in ({}, {"target": 0}, {"target": 0, "top": 2}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ex = net.explain(X, **options)
        assert conservation(ex) < 1e-12
    ex = net.explain(X)
    ex.values[3, 1] += 1e-6 * np.abs(ex.values[3]).sum()
    assert 1e-7 < conservation(ex) < 1e-5
