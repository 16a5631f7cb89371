"""Imputers against brute force: which donors, with which weights, and what of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lrp import errors
from neuralize import neuralize
from neuralize.evaluation import ConditionalKDE, Imputer, Marginal, Mean, NearestMidpoint, OtherCluster, flip

SEED = 3


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, reference rows on other scales, and three masks for every row: some, all and no columns removed."""
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 100.0, 0.01, 5.0])
    X, reference = rng.normal(size=(7, 4)) * scale, rng.normal(size=(25, 4)) * scale
    some = rng.random((7, 4)) < 0.5
    return X, reference, np.stack([some, np.ones_like(some), np.zeros_like(some)])


def brute_weights(kde: ConditionalKDE, x: np.ndarray, reference: np.ndarray, kept: np.ndarray) -> np.ndarray:
    s = reference.std(0) if kde.scale else np.ones(len(x))
    logs = []
    for row in reference:
        near = sum(((x[t] - row[t]) / s[t]) ** 2 for t in range(len(x)) if kept[t])
        whole = sum(((x[t] - row[t]) / s[t]) ** 2 for t in range(len(x)))
        logs.append(-near / (2 * kde.h**2) - kde.local * whole)
    w = np.exp(np.array(logs) - max(logs))
    return w / w.sum()


def test_mean_and_marginal(case: Any) -> None:
    X, reference, masks = case
    mean = Mean().fit(reference).draw(X, masks, SEED)
    drawn = Marginal().fit(reference).draw(X, masks, SEED, size=5)
    u = np.random.default_rng(SEED).random((7, 5, 1))[:, :, 0]
    assert drawn.shape == (5, 3, 7, 4)
    for s, i, t in np.ndindex(masks.shape):
        gone = masks[s, i, t]
        assert math.isclose(mean[s, i, t], reference[:, t].mean() if gone else X[i, t], rel_tol=1e-12)
        for draw in range(5):
            assert drawn[draw, s, i, t] == (reference[int(25 * u[i, draw]), t] if gone else X[i, t])
    assert Marginal().fit(reference).draw(X, masks[0], SEED).shape == (7, 4)
    many = Marginal().fit(reference).draw(X[:1], np.ones((1, 4), bool), SEED, size=20000)[:, 0]
    se = reference.std(0) / math.sqrt(20000)
    assert (np.abs(many.mean(0) - reference.mean(0)) < 4 * se).all()


@pytest.mark.parametrize("options", [{}, {"local": 0.3}, {"scale": False, "bandwidth": 40.0}, {"bandwidth": "scott"}])
def test_conditional_weights_mean_and_draws(case: Any, options: dict[str, Any]) -> None:
    X, reference, masks = case
    kde = ConditionalKDE(**options).fit(reference)
    weights, means = kde.weights(X, masks), kde.conditional_mean(X, masks)
    drawn = kde.draw(X, masks, SEED, size=3)
    u = np.random.default_rng(SEED).random((7, 3, 5))
    width = kde.h * (reference.std(0) if kde.scale else np.ones(4))
    for s, i in np.ndindex(masks.shape[:2]):
        gone = masks[s, i]
        w = brute_weights(kde, X[i], reference, ~gone)
        np.testing.assert_allclose(weights[s, i], w, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(means[s, i], np.where(gone, w @ reference, X[i]), rtol=1e-9)
        for draw in range(3):
            donor = int((np.cumsum(w) <= u[i, draw, 0]).sum())
            value = reference[donor] + width * norm.ppf(u[i, draw, 1:])
            np.testing.assert_allclose(drawn[draw, s, i], np.where(gone, value, X[i]), rtol=1e-10)


def test_conditional_draws_have_the_conditional_mean(case: Any) -> None:
    X, reference, masks = case
    kde = ConditionalKDE().fit(reference)
    many = kde.draw(X, masks, SEED, size=20000)
    se = many.std(0) / math.sqrt(20000)
    gap = np.abs(many.mean(0) - kde.conditional_mean(X, masks))
    assert (gap <= 4.5 * se + 1e-12 * (1 + np.abs(X))).all()
    assert (se[~masks] < 1e-10).all()
    assert (se[masks] > 0).all()
    without = ConditionalKDE(noise=False).fit(reference)
    assert without.numbers == 1
    found = without.draw(X, masks, SEED, size=50)[:, 1].reshape(-1, 4)
    assert {tuple(r) for r in found} <= {tuple(r) for r in reference}


def test_conditional_keeps_a_relation_that_the_others_break() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=400)
    reference = np.column_stack([a, a + 0.05 * rng.normal(size=400)])
    X, removed = reference[:50], np.tile([False, True], (50, 1))
    for imputer, kept in ((ConditionalKDE(), True), (Marginal(), False), (Mean(), False)):
        found = imputer.fit(reference).draw(X, removed, SEED)
        assert (np.abs(found[:, 1] - X[:, 1]).mean() < 0.2) == kept


def test_a_row_without_weight_is_never_drawn() -> None:
    kde = ConditionalKDE(0.01, noise=False).fit([[9.0, 1.0], [0.0, 2.0], [9.0, 3.0]])
    X, removed = np.array([[0.0, 7.0]]), np.array([[[False, True]]])
    assert kde.weights(X, removed).tolist() == [[[0.0, 1.0, 0.0]]]
    for u in (0.0, 0.5, 1 - 2.0**-53):
        assert kde.fill(X, removed, np.full((1, 1, 1), u)).tolist() == [[[[0.0, 2.0]]]]


def test_bandwidth_has_the_largest_leave_one_out_likelihood() -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(size=(60, 3)) * [1.0, 10.0, 0.1]
    kde = ConditionalKDE().fit(reference)
    z = (reference - reference.mean(0)) / reference.std(0)

    def likelihood(h: float) -> float:
        total = 0.0
        for i in range(60):
            others = [np.exp(-((z[i] - z[j]) ** 2).sum() / (2 * h * h)) for j in range(60) if j != i]
            total += math.log(sum(others)) - 3 * math.log(h)
        return total

    best = likelihood(kde.h)
    assert all(likelihood(kde.h * factor) < best for factor in (0.9, 0.99, 1.01, 1.1))
    # copies would pull it to 0, a constant column would pull it down
    copied = ConditionalKDE().fit(np.vstack([reference, reference]))
    assert math.isclose(copied.h, kde.h, rel_tol=0.05)
    padded = ConditionalKDE().fit(np.column_stack([reference, np.full(60, 0.1)]))
    assert math.isclose(padded.h, kde.h, rel_tol=1e-9)
    drawn = padded.draw(np.zeros((2, 4)), np.ones((2, 4), bool), SEED)
    assert (drawn[:, 3] == 0.1).all()
    assert math.isclose(ConditionalKDE("scott").fit(reference).h, 60 ** (-1 / 7))
    some = ConditionalKDE(rows=20).fit(reference)
    assert some.raw.shape == (20, 3)
    assert {tuple(r) for r in some.raw} < {tuple(r) for r in reference}


def test_other_cluster(case: Any) -> None:
    X, reference, masks = case
    labeller = lambda rows: np.where(rows[:, 0] > 0.5, "far", np.where(rows[:, 0] < -0.5, "low", "mid"))  # noqa: E731
    imputer = OtherCluster(labeller).fit(reference)
    drawn = imputer.draw(X, masks, SEED, size=4)
    u = np.random.default_rng(SEED).random((7, 4, 1))[:, :, 0]
    ordered = reference[np.argsort(labeller(reference), kind="stable")]
    for i, x in enumerate(X):
        others = [r for r in ordered if labeller(r[None])[0] != labeller(x[None])[0]]
        for draw in range(4):
            donor = others[int(u[i, draw] * len(others))]
            for s in range(3):
                np.testing.assert_array_equal(drawn[draw, s, i], np.where(masks[s, i], donor, x))
    # a cluster that no reference row is in: every row is of another one
    few = OtherCluster(labeller).fit(reference[reference[:, 0] > 0.5])
    low = X[X[:, 0] < -0.5]
    assert len(low)
    assert few.draw(low, np.ones(low.shape, bool), SEED).shape == low.shape
    with pytest.raises(errors.TargetError, match="only cluster 'far'"):
        few.draw(reference[reference[:, 0] > 0.5], np.ones((len(few.sorted), 4), bool), SEED)


@pytest.mark.parametrize("front", ["none", "scaler", "rotation"])
def test_nearest_midpoint_lies_on_the_border(wine: pd.DataFrame, front: str) -> None:
    steps: list[Any] = {"none": [], "scaler": [StandardScaler()], "rotation": [StandardScaler(), PCA()]}[front]
    fitted = make_pipeline(*steps, KMeans(4, n_init=1, random_state=0)).fit(wine)
    imputer = NearestMidpoint(fitted).fit(wine)
    gone = imputer.draw(wine, np.ones(wine.shape, bool), 0)
    z = fitted[:-1].transform(wine) if steps else wine.to_numpy()
    at = fitted[:-1].transform(pd.DataFrame(gone, columns=wine.columns)) if steps else gone
    mu = fitted[-1].cluster_centers_
    for i, row in enumerate(z):
        near = sorted(range(4), key=lambda k: ((row - mu[k]) ** 2).sum())
        np.testing.assert_allclose(at[i], (mu[near[0]] + mu[near[1]]) / 2, atol=1e-9)
    half = np.tile(np.arange(13) % 2 == 0, (len(wine), 1))
    np.testing.assert_array_equal(imputer.draw(wine, half, 0), np.where(half, gone, wine))
    if front == "scaler":
        # the logit of the row's cluster ends at the border, or below where a third is nearer still
        net = neuralize(fitted)
        curve = flip(net, wine, net.explain(wine), imputer=imputer)
        assert (curve.scores[:, -1] < 1e-9).all()
        assert (np.abs(curve.scores[:, -1]) < 1e-9).mean() > 0.5


def test_a_users_own(case: Any) -> None:
    X, reference, masks = case

    class Negative(Imputer):
        def fill(self, X: np.ndarray, removed: np.ndarray, u: np.ndarray) -> np.ndarray:
            return np.where(removed, -X, X)[None]

    imputer = Negative().fit(reference)
    np.testing.assert_array_equal(imputer.draw(X, masks, 0, size=2)[1], np.where(masks, -X, X))
    curve = flip(lambda X: X.sum(1), X, X, imputer=imputer)
    np.testing.assert_allclose(curve.scores[:, -1], -X.sum(1))
    assert curve.imputer == "Negative"
    imputer.fill = lambda X, removed, u: X  # type: ignore[method-assign]
    with pytest.raises(errors.OutputError, match="another shape"):
        flip(lambda X: X.sum(1), X, X, imputer=imputer)


def test_errors(case: Any) -> None:
    X, reference, masks = case
    with pytest.raises(errors.NotFittedError, match="no rows to draw from"):
        Mean().draw(X, masks, 0)
    for removed in (masks.astype(int), masks[:, :3], True):
        with pytest.raises(errors.InputError, match="no mask"):
            Mean().fit(reference).draw(X, removed, 0)
    with pytest.raises(errors.ColumnError):
        Mean().fit(reference[:, :3]).draw(X, masks, 0)
    with pytest.raises(errors.InputError, match="size"):
        Mean().fit(reference).draw(X, masks, 0, size=0)
    with pytest.raises(errors.NonFiniteError, match="row 1"):
        Mean().fit(np.array([[1.0], [np.nan]]))
    for bandwidth in ("silverman", 0, -1.0, np.inf, np.nan, True, None):
        with pytest.raises(errors.RuleError, match="bandwidth"):
            ConditionalKDE(bandwidth)
    with pytest.raises(errors.RuleError, match="local"):
        ConditionalKDE(local=-1)
    for same in (np.ones((5, 2)), np.ones((1, 2))):
        with pytest.raises(errors.InputError, match="two rows that differ"):
            ConditionalKDE().fit(same)
        assert (ConditionalKDE(0.1).fit(same).draw([[3.0, 4.0]], [[True, False]], 0) == [[1.0, 4.0]]).all()
    with pytest.raises(errors.InputError, match="labeller"):
        OtherCluster(3)
    with pytest.raises(errors.InputError, match="label for each row"):
        OtherCluster(lambda X: 1).fit(reference)
    for clusterer in (StandardScaler(), [[1.0, 2.0]], make_pipeline(StandardScaler()), "kmeans"):
        with pytest.raises(errors.UnsupportedEstimatorError, match="two centres"):
            NearestMidpoint(clusterer)
    with pytest.raises(errors.InputError, match="2 columns"):
        NearestMidpoint([[0.0, 0.0], [1.0, 1.0]]).fit(reference)
