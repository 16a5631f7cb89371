"""Infidelity, stability and the controls against loops, closed forms and torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lrp import errors
from neuralize import NeuralizedModel, neuralize
from neuralize.evaluation import (
    gradient,
    gradient_x_input,
    infidelity,
    max_sensitivity,
    occlusion,
    random_values,
    sensitivity,
    srg,
)


@pytest.fixture(scope="module")
def net(wine: pd.DataFrame) -> NeuralizedModel:
    return neuralize(make_pipeline(StandardScaler(), KMeans(4, n_init=1, random_state=0)).fit(wine))


@pytest.fixture(scope="module")
def linear() -> tuple[np.ndarray, np.ndarray, Any]:
    rng = np.random.default_rng(0)
    w = np.array([2.0, -1.0, 0.5])
    return rng.normal(1, [1.0, 3.0, 0.2], (25, 3)), w, lambda X: np.asarray(X) @ w + 4


# ------------------------------------------------------------------ infidelity


@pytest.mark.parametrize("normalise", [None, "row", "all"])
def test_exact_attributions_of_a_line_are_faithful(linear: Any, normalise: str | None) -> None:
    X, w, f = linear
    exact = w * (X - X.mean(0))
    tiny = 1e-20
    assert infidelity(f, X, exact, normalise=normalise).value < tiny
    slopes = np.tile(w, (25, 1))
    assert infidelity(f, X, slopes, kind="slope", normalise=normalise).value < tiny
    # right up to a factor: only a normalisation forgives it
    for kind, values in (("relevance", exact), ("slope", slopes)):
        found = infidelity(f, X, -5 * values, kind=kind, normalise=normalise)
        assert (found.relative < tiny) == (normalise is not None)
        if normalise is None:
            assert math.isclose(found.relative, 36)
        else:
            np.testing.assert_allclose(found.scale, -0.2)
    assert infidelity(f, X, random_values(X), normalise=normalise).relative > 0.1


def test_infidelity_of_zero_and_closed_form(linear: Any) -> None:
    X, w, f = linear
    nothing = infidelity(f, X, np.zeros_like(X))
    assert math.isclose(nothing.relative, 1)
    assert infidelity(f, X, np.zeros_like(X), normalise="row").scale.tolist() == [0.0] * 25
    # Gaussian noise: E (delta . (phi - w))^2 = sum_t noise^2 s_t^2 (phi_t - w_t)^2
    phi = np.random.default_rng(1).normal(size=X.shape)
    found = infidelity(f, X, phi, kind="slope", noise=0.3, draws=4000)
    expected = (0.3**2 * X.std(0) ** 2 * (phi - w) ** 2).sum(1)
    np.testing.assert_allclose(found.rows, expected, rtol=5 * math.sqrt(2 / 4000))
    assert math.isclose(found.value, found.rows.mean())
    assert math.isclose(found.standard_error, found.rows.std(ddof=1) / 5)
    # exact expectation over random sets whose size is uniform: every set of k columns is equally likely
    R = np.random.default_rng(2).normal(size=X.shape)
    gap = R - w * (X - X.mean(0))
    sets = [[(t,) for t in range(3)], [(0, 1), (0, 2), (1, 2)], [(0, 1, 2)]]
    by_hand = sum(np.mean([gap[:, s].sum(1) ** 2 for s in group], axis=0) for group in sets) / 3
    found = infidelity(f, X, R, draws=6000)
    np.testing.assert_allclose(found.rows, by_hand, rtol=0.15)
    assert math.isclose(found.value, by_hand.mean(), rel_tol=0.02)


def test_errors_of_infidelity_are_honest(linear: Any) -> None:
    _, w, f = linear
    found = []
    for seed in range(200):
        X = np.random.default_rng(seed).normal(1, [1.0, 3.0, 0.2], (40, 3))
        bent = w * X * np.array([1.0, 0.5, 2.0])
        found.append(infidelity(f, X, bent, reference=np.zeros((2, 3)), draws=50, seed=seed))
    for value, error in (("value", "standard_error"), ("relative", "relative_standard_error")):
        scatter = np.std([getattr(x, value) for x in found])
        assert abs(scatter / np.mean([getattr(x, error) for x in found]) - 1) < 0.15, value


def test_a_ratio_that_is_the_same_for_all_rows_has_no_error(linear: Any) -> None:
    X, w, f = linear
    half = infidelity(f, X, 0.5 * w * (X - X.mean(0)))
    assert math.isclose(half.relative, 0.25)
    assert half.relative_standard_error < 1e-12
    assert half.standard_error > 0.1


def test_infidelity_of_a_constant_score() -> None:
    X = np.arange(6.0).reshape(3, 2)
    constant = lambda X: np.ones(len(X))  # noqa: E731
    assert infidelity(constant, X, np.zeros_like(X)).relative == 0
    assert infidelity(constant, X, X).relative == math.inf


def test_infidelity_of_a_network(net: NeuralizedModel, wine: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    e = net.explain(wine)
    exact = infidelity(net, wine, e, imputer="marginal", normalise="row")
    chance = infidelity(net, wine, random_values(wine), imputer="marginal", normalise="row")
    assert exact.relative + 5 * exact.relative_standard_error < chance.relative
    slopes = infidelity(net, wine, gradient(net, wine), kind="slope")
    assert slopes.relative < 0.1
    assert "row" in repr(exact)
    again = infidelity(net, wine, e, imputer="marginal", normalise="row")
    np.testing.assert_array_equal(again.rows, exact.rows)
    monkeypatch.setattr("neuralize.evaluation.faithfulness.WORK", 1)
    np.testing.assert_allclose(infidelity(net, wine, e, imputer="marginal", normalise="row").rows, exact.rows)
    assert (infidelity(net, wine, e, imputer="marginal", normalise="row", seed=1).rows != exact.rows).any()


# ------------------------------------------------------------------ stability


def test_stability(linear: Any, net: NeuralizedModel, wine: pd.DataFrame) -> None:
    X, w, _ = linear
    explainer = lambda Z: w * Z  # noqa: E731
    found = max_sensitivity(explainer, X, 0.1, draws=2000, relative=False)
    bound = 0.1 * np.linalg.norm(w * X.std(0))
    assert (found.rows <= bound).all()
    assert (found.rows > 0.9 * bound).all()
    relative = max_sensitivity(explainer, X, 0.1, draws=2000)
    np.testing.assert_allclose(relative.rows, found.rows / np.linalg.norm(w * X, axis=1))
    assert math.isclose(relative.standard_error, relative.rows.std(ddof=1) / 5)
    few, more = (max_sensitivity(explainer, X, 0.1, draws=k).rows for k in (3, 4))
    assert (more >= few).all()
    assert (more > few).any()
    fewer = max_sensitivity(explainer, X[:4], 0.1, scale=X.std(0), draws=3)
    np.testing.assert_allclose(fewer.rows, few[:4], rtol=1e-12)
    assert max_sensitivity(np.ones_like, X, 0.5).value == 0
    assert max_sensitivity(np.zeros_like, X, 0.5).value == 0
    assert max_sensitivity(lambda Z: np.where(np.isin(Z, X), 0, Z), X, 0.5).value == math.inf
    target = net.predict(wine)
    exact = max_sensitivity(lambda Z: net.explain(Z, target=target), wine, 0.05)
    assert 0 < exact.value < 0.3
    assert "Stability" in repr(exact)


# ------------------------------------------------------------------ controls


def test_gradients(net: NeuralizedModel, wine: pd.DataFrame) -> None:
    X = wine.to_numpy()
    target = np.roll(net.predict(wine), 1)
    for chosen in (None, target):
        found = gradient(net, wine, target=chosen)
        own = net.predict(wine) if chosen is None else chosen
        column = [net.labels.tolist().index(c) for c in own.tolist()]
        score = lambda X, column=column: net(X).numpy()[np.arange(len(X)), column]  # noqa: E731
        step = 1e-5 * X.std(0)
        for t in range(13):
            up, down = X.copy(), X.copy()
            up[:, t] += step[t]
            down[:, t] -= step[t]
            differences = (score(up) - score(down)) / (2 * step[t])
            np.testing.assert_allclose(found[:, t], differences, rtol=1e-5, atol=1e-6 * np.abs(found[:, t]).max())
    np.testing.assert_allclose(gradient_x_input(net, wine), gradient(net, wine) * X)
    np.testing.assert_allclose(sensitivity(net, wine), gradient(net, wine) ** 2)
    np.testing.assert_allclose(sensitivity(net, wine, kind="absolute"), np.abs(gradient(net, wine)))
    # far from a tie the logit is a line, whose slope is known
    fitted = make_pipeline(StandardScaler(), KMeans(4, n_init=1, random_state=0)).fit(wine)
    z, mu = fitted[0].transform(wine), fitted[1].cluster_centers_
    one = int(net(X).max(1).values.argmax())
    c, k = sorted(range(4), key=lambda k: ((z[one] - mu[k]) ** 2).sum())[:2]
    np.testing.assert_allclose(gradient(net, wine)[one], 2 * (mu[c] - mu[k]) / X.std(0))


class Threshold(NeuralizedModel):
    """One logit, and one that torch can not differentiate."""

    def forward(self, X: Any) -> torch.Tensor:
        with torch.no_grad():
            return super().forward(X)[:, :1]


def test_networks_of_one_logit_and_without_gradient(net: NeuralizedModel, wine: pd.DataFrame) -> None:
    one = neuralize(make_pipeline(StandardScaler(), KMeans(4, n_init=1, random_state=0)).fit(wine))
    one.__class__ = Threshold
    np.testing.assert_allclose(gradient(one, wine), gradient(net, wine, target=0), rtol=1e-4, atol=1e-4)
    e = net.explain(wine, target=0)
    np.testing.assert_array_equal(srg(one, wine, e, imputer="mean").rows, srg(net, wine, e, imputer="mean").rows)
    with pytest.raises(errors.ColumnError):
        srg(one, wine[wine.columns[::-1]], e.values, imputer="mean")


def test_gradients_of_callables() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20, 3)) * [1.0, 1e6, 1e-6]
    f = lambda X: np.sin(X[:, 0]) + (X[:, 1] / 1e6) ** 3 + X[:, 2] * 1e6 * X[:, 0]  # noqa: E731
    expected = np.column_stack([np.cos(X[:, 0]) + X[:, 2] * 1e6, 3 * X[:, 1] ** 2 / 1e18, X[:, 0] * 1e6])
    found = gradient(f, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(0).min())
    # a constant column has no deviation: its magnitude says what a small step is
    large = np.column_stack([X[:, 0], np.full(20, 1e12)])
    np.testing.assert_allclose(gradient(lambda X: X[:, 1] ** 2, large)[:, 1], 2e12, rtol=1e-6)
    one = gradient(f, X[:1], step=1e-7)
    np.testing.assert_allclose(one[:, 0], expected[:1, 0], rtol=1e-4)
    mixture = GaussianMixture(3, random_state=0).fit(X[:, :1])
    probabilities = lambda X: mixture.predict_proba(X)  # noqa: E731
    assert gradient(probabilities, X[:, :1], target=2).shape == (20, 1)


def test_occlusion(net: NeuralizedModel, wine: pd.DataFrame) -> None:
    few = wine[:9]
    X, mean = few.to_numpy(), wine.to_numpy().mean(0)
    found = occlusion(net, few, reference=wine)
    c = net(few).argmax(1).numpy()
    for i, t in np.ndindex(X.shape):
        changed = X[i].copy()
        changed[t] = mean[t]
        expected = float(net(X[i : i + 1])[0, c[i]] - net(changed[None])[0, c[i]])
        assert math.isclose(found[i, t], expected, rel_tol=1e-8, abs_tol=1e-8)
    a, b = (occlusion(net, few, imputer="kde", reference=wine, draws=4, batch_size=size) for size in (2, "auto"))
    np.testing.assert_allclose(a, b, atol=1e-9)
    w = np.array([1.0, -2.0])
    Z = np.random.default_rng(0).normal(size=(30, 2))
    np.testing.assert_allclose(occlusion(lambda Z: Z @ w, Z), w * (Z - Z.mean(0)), atol=1e-12)


def test_random_values(wine: pd.DataFrame) -> None:
    a = random_values(wine, 3)
    assert a.shape == wine.shape
    np.testing.assert_array_equal(a, random_values(wine, 3))
    assert (a != random_values(wine, 4)).all()
    rng = np.random.default_rng(0)
    assert (random_values(wine, rng) != random_values(wine, rng)).all()


# ------------------------------------------------------------------ errors


def test_errors(linear: Any, net: NeuralizedModel, wine: pd.DataFrame) -> None:
    X, _, f = linear
    for call in (
        lambda: infidelity(f, X, X, kind="both"),
        lambda: infidelity(f, X, X, normalise=True),
        lambda: sensitivity(f, X, kind="cubed"),
    ):
        with pytest.raises(errors.RuleError, match="unknown") as info:
            call()
        assert info.value.fix
    for call in (
        lambda: infidelity(f, X, X, kind="slope", noise=0),
        lambda: infidelity(f, X[:1], X[:1], kind="slope"),
        lambda: infidelity(f, X, X, draws=0),
        lambda: max_sensitivity(lambda Z: Z, X, -1.0),
        lambda: max_sensitivity(lambda Z: Z, X[:1], 0.1),
        lambda: max_sensitivity(lambda Z: Z, X, 0.1, scale=[1.0]),
        lambda: max_sensitivity(lambda Z: Z[:1], X, 0.1),
        lambda: gradient(f, X, step=0),
        lambda: random_values(X, -1),
    ):
        with pytest.raises(errors.InputError) as info:
            call()
        assert info.value.expected
        assert info.value.fix
    duel = net.explain(wine, target=0, contrast=1)
    with pytest.raises(errors.RuleError, match="duel"):
        infidelity(net, wine, duel)
