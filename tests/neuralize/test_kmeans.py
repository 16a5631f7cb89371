"""K-means: relevances against the pair layer written out, rules, limits, and the shared engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

import lrp
from neuralize import CentroidHead, CoverageWarning, NeuralizedModel, neuralize

quiet = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


def model(mu: Any, sizes: Any = None) -> NeuralizedModel:
    return NeuralizedModel(CentroidHead(mu, sizes))


@pytest.fixture(scope="module")
def scaled_wine(wine: pd.DataFrame) -> tuple[NeuralizedModel, np.ndarray, np.ndarray, np.ndarray]:
    X = wine.to_numpy()
    fitted = make_pipeline(StandardScaler(), KMeans(5, n_init=1, random_state=0)).fit(X)
    return neuralize(fitted), X, fitted[:-1].transform(X), fitted[-1].cluster_centers_


def close(a: Any, b: Any, scale: Any, e: float = 1e-9) -> bool:
    return bool((np.abs(a - b) <= e * np.maximum(scale, 1e-300)).all())


SOFT = [(rule, beta) for rule in ("auto", "undivided") for beta in (0.05, 5.0, np.inf)]


@quiet
@pytest.mark.parametrize("target", [None, 0, 3])
@pytest.mark.parametrize(("rule", "beta"), [*SOFT, ("midpoint", np.inf)])
def test_equals_the_pair_layer_written_out(
    scaled_wine: Any, materialised: Any, target: Any, rule: str, beta: float
) -> None:
    net, X, Z, mu = scaled_wine
    e = net.explain(X, target=target, rule=rule, beta=beta)
    own = net.predict(X)
    for i, z in enumerate(Z):
        c = own[i] if target is None else target
        R, rest, f = materialised(z, mu, c, beta, rule == "auto" and c == own[i])
        size = np.abs(R).sum() + abs(rest)
        assert close(e.values[i], R, size)
        assert close(e.residual[i], rest, size)
        assert close(e.output[i], f, size)


@quiet
@pytest.mark.parametrize("delicate", [False, True])
@pytest.mark.parametrize("target", [None, 2])
def test_both_ways_to_compute_agree(scaled_wine: Any, delicate: bool, target: Any, materialised: Any) -> None:
    _, _, Z, mu = scaled_wine
    net = model(mu)
    net.head.condition.fill_(1e30 if delicate else 1.0)
    e = net.explain(Z, target=target, beta=0.3)
    own = net.predict(Z)
    assert net.head._delicate(torch.float64) is delicate
    for i, z in enumerate(Z):
        c = own[i] if target is None else target
        R, _, _ = materialised(z, mu, c, 0.3, c == own[i])
        assert close(e.values[i], R, np.abs(R).sum())


@quiet
@pytest.mark.parametrize("delicate", [False, True])
def test_contrast_and_shapley_both_ways(scaled_wine: Any, materialised: Any, delicate: bool) -> None:
    _, _, Z, mu = scaled_wine
    net = model(mu).set_reference(Z[:50])
    net.head.condition.fill_(1e30 if delicate else 1.0)
    duel = net.explain(Z, target=1, contrast=4)
    shapley = net.explain(Z, target=1, contrast=4, rule="shapley")
    g = np.array([materialised(z, mu, 1, 1.0, False, contrast=4)[0] for z in Z])
    size = np.abs(g).sum(1, keepdims=True)
    assert close(duel.values, g, size)
    assert not duel.residual.any()
    # exact interventional Shapley values of a sum over features
    assert close(shapley.values, g - g[:50].mean(0), size + np.abs(g[:50].mean(0)).sum())
    np.testing.assert_allclose(shapley.residual, g[:50].sum(1).mean())
    np.testing.assert_allclose(shapley.values.sum(1) + shapley.residual, duel.output)
    np.testing.assert_allclose(shapley.residual_parts["reference"], shapley.residual)
    assert (shapley.competitors == np.eye(5)[4]).all()
    np.testing.assert_allclose(shapley.slope * (Z - shapley.break_even), shapley.values, atol=1e-9)


def test_layered_network_through_the_shared_engine(scaled_wine: Any) -> None:
    net, X, Z, _ = scaled_wine
    e = net.explain(X, beta=0.2)
    z = torch.from_numpy(Z)
    logits = net(X)
    for c in range(5):
        layers = net.layered(c)
        assert [name for name, _ in layers.named_children()] == ["pairs", "pool"]
        np.testing.assert_allclose(layers(z)[:, 0], logits[:, c], atol=1e-9)
        mine = torch.from_numpy(e.target == c)
        h = layers.pairs(z[mine])
        f = h.amin(1, keepdim=True)
        start = torch.softmax(-0.2 * h, 1) * f
        rule = lrp.rules.RootPoint(net.head.midpoints(c), epsilon=0)
        found = lrp.attribute(layers.pairs, z[mine], start=start, composite=rule).input.numpy()
        expected = e.values[mine.numpy()]
        assert close(found, expected, np.abs(expected).sum(1, keepdims=True))


@quiet
def test_translation_permutation_and_scale(scaled_wine: Any) -> None:
    _, _, Z, mu = scaled_wine
    e = model(mu).explain(Z)
    size = np.abs(e.values).sum(1, keepdims=True)
    shift = np.linspace(-50, 80, Z.shape[1])
    assert close(model(mu + shift).explain(Z + shift).values, e.values, size)
    columns = np.random.default_rng(0).permutation(Z.shape[1])
    assert close(model(mu[:, columns]).explain(Z[:, columns]).values, e.values[:, columns], size)
    assert close(model(mu[::-1]).explain(Z).values, e.values, size)
    for s in (1e-6, 1e6):
        assert close(model(s * mu).explain(s * Z).values, s**2 * e.values, s**2 * size)
    # the gradient times the input is not invariant: the test can fail
    wrong = e.slope * Z
    moved = e.slope * (Z + shift)
    assert not close(wrong, moved, size)


def test_two_clusters_are_antisymmetric(wine: pd.DataFrame) -> None:
    net = neuralize(KMeans(2, n_init=1, random_state=0).fit(wine))
    one, two = net.explain(wine, target=0, rule="undivided"), net.explain(wine, target=1, rule="undivided")
    np.testing.assert_allclose(one.values, -two.values, rtol=1e-9)
    for beta in (0.01, 100.0, np.inf):
        np.testing.assert_allclose(net.explain(wine, target=0, beta=beta).values, one.values, rtol=1e-9)


@quiet
def test_beta_limits(scaled_wine: Any) -> None:
    net, X, *_ = scaled_wine
    near = net.explain(X, beta=np.inf)
    stiff = net.explain(X, beta=1e9)
    soft = net.explain(X, beta=1e-12)
    np.testing.assert_allclose(stiff.values, near.values, atol=1e-6)
    assert ((near.competitors == 0) | (near.competitors == 1)).all()
    np.testing.assert_allclose(soft.competitors[soft.competitors > 0], 0.25)
    np.testing.assert_allclose(near.values, net.explain(X, rule="midpoint").values, atol=1e-9)


@quiet
def test_undivided_residual_is_the_price_of_softness(scaled_wine: Any) -> None:
    net, X, Z, mu = scaled_wine
    e = net.explain(X, rule="undivided", beta=0.3)
    assert (e.residual <= 1e-9).all()
    h = ((Z[:, None] - mu) ** 2).sum(2) - ((Z - mu[e.target]) ** 2).sum(1)[:, None]
    np.testing.assert_allclose(e.residual, e.output - (e.competitors * h).sum(1), atol=1e-9)


def test_own_cluster_is_never_amplified(scaled_wine: Any) -> None:
    """f / h lies in [0, 1], so a divided relevance stays within the largest pair relevance."""
    net, X, Z, mu = scaled_wine
    e = net.explain(X, beta=0.1)
    assert e.divided.all()
    assert (e.output >= 0).all()
    largest = np.zeros_like(Z)
    for k in range(5):
        largest = np.maximum(largest, np.abs((Z - mu[k]) ** 2 - (Z - mu[e.target]) ** 2))
    assert (np.abs(e.values) <= largest + 1e-9).all()


@quiet
def test_auto_divides_row_by_row(scaled_wine: Any) -> None:
    net, X, *_ = scaled_wine
    e = net.explain(X, target=2)
    own = net.predict(X) == 2
    np.testing.assert_array_equal(e.divided, own)
    assert 0 < own.sum() < len(X)
    np.testing.assert_allclose(e.values[own], net.explain(X[own]).values, atol=1e-9)
    np.testing.assert_allclose(e.values[~own], net.explain(X[~own], target=2, rule="undivided").values, atol=1e-9)
    assert (e.output[~own] < 0).all()


def test_ties_and_duplicates() -> None:
    mu = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    net = model(mu)
    rows = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.3, 0.1]])
    assert net.predict(rows).tolist() == [0, 1, 0, 0]
    logits = net(rows)
    assert logits.argmax(1).tolist() == [0, 1, 0, 0]
    assert logits[1].max() == 0
    assert bool((logits[:3] <= 0).all())
    for beta in ("auto", 1.0, np.inf):
        e = net.explain(rows, beta=beta)
        assert np.isfinite(e.values).all()
        np.testing.assert_allclose(e.values.sum(1) + e.residual, e.output, atol=1e-12)
    shares = net.explain(rows[:1], beta=np.inf).competitors
    np.testing.assert_allclose(shares, [[0, 0.5, 0.5, 0]])


def test_all_centres_equal_gives_zeros() -> None:
    net = model(np.ones((3, 2)))
    e = net.explain([[5.0, 7.0], [1.0, 1.0]])
    assert not e.values.any()
    assert not e.output.any()
    assert e.coverage.tolist() == [1, 1]
    assert np.isnan(e.break_even).all()
    assert e.beta == 1


def test_constant_column_gets_exactly_zero() -> None:
    mu = np.array([[0.1, 1.0, 7.3], [0.1, 3.0, 1.1], [0.1, -4.0, 0.7]])
    e = model(mu).explain([[5.0, 0.5, 1.0], [0.1, 2.0, 9.0]])
    assert (e.values[:, 0] == 0).all()
    assert np.isnan(e.break_even[:, 0]).all()
    assert np.isfinite(e.break_even[:, 1:]).all()


def test_break_even_silences_a_column(scaled_wine: Any, materialised: Any) -> None:
    net, X, Z, mu = scaled_wine
    e = net.explain(X[:40], beta=0.2)
    scale, mean = X.std(0), X.mean(0)
    for i in range(40):
        for t in (0, 6, 12):
            z = Z[i].copy()
            z[t] = (e.break_even[i, t] - mean[t]) / scale[t]
            c = e.target[i]
            h = ((Z[i] - mu) ** 2).sum(1) - ((Z[i] - mu[c]) ** 2).sum()
            h[c] = 1
            rho = e.competitors[i] * e.output[i] / h
            R = (rho[:, None] * ((z - mu) ** 2 - (z - mu[c]) ** 2)).sum(0)
            assert abs(R[t]) <= 1e-9 * np.abs(e.values[i]).sum()


def test_automatic_beta(wine: pd.DataFrame) -> None:
    fitted = KMeans(3, n_init=1, random_state=0).fit(wine)
    mu, sizes = fitted.cluster_centers_, np.bincount(fitted.labels_)
    gaps = ((mu[:, None] - mu) ** 2).sum(2) + np.diag([np.inf] * 3)
    net = neuralize(fitted)
    assert net.explain(wine[:1]).beta == pytest.approx(1 / np.average(gaps.min(1), weights=sizes))
    assert net.explain(wine[5:9]).beta == net.explain(wine).beta
    referred = neuralize(fitted, reference=wine[:30])
    expected = referred(wine[:30]).max(1).values.mean()
    assert referred.explain(wine[:1]).beta == pytest.approx(1 / float(expected))
    assert net.explain(wine[:1], target=0, contrast=1).beta is None
    on_the_border = model([[0.0], [2.0]]).set_reference([[1.0], [1.0]])
    assert on_the_border.explain([[0.0]]).beta == 0.25


def test_coverage(wine: pd.DataFrame) -> None:
    net = neuralize(make_pipeline(StandardScaler(), KMeans(5, n_init=1, random_state=0)).fit(wine))
    assert (net.explain(wine).coverage == 1).all()
    with pytest.warns(CoverageWarning, match="contrast"):
        e = net.explain(wine, target=0, rule="undivided", beta=1e-6)
    np.testing.assert_allclose(e.coverage, e.values.sum(1) / e.output, rtol=1e-6, atol=1e-9)
    e.output[:2], e.residual[:2] = 0, [0, 1]
    assert e.coverage[:2].tolist() == [1, 0]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_far_from_the_origin(wine: pd.DataFrame, offset: float) -> None:
    Z = StandardScaler().fit_transform(wine)
    fitted = KMeans(3, n_init=1, random_state=0).fit(Z + offset)
    rows = (Z + offset).astype(np.float32)
    exact = neuralize(fitted).explain(rows)
    net = neuralize(fitted).float()
    e = net.explain(rows)
    assert e.values.dtype == np.float32
    np.testing.assert_array_equal(net.predict(rows), neuralize(fitted).predict(rows))
    size = np.abs(e.values).sum(1)
    assert (np.abs(e.values.sum(1) + e.residual - e.output) <= 1e-4 * size).all()
    assert (np.abs(e.values - exact.values) <= 1e-4 * np.abs(exact.values).sum(1, keepdims=True)).all()


@quiet
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(2, 6),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from([1e-8, 1.0, 1e8]),
    st.sampled_from([0.0, 1.0, 1e6]),
    st.sampled_from(["auto", 1e-3, 10.0, np.inf]),
)
def test_any_shape_and_scale(k: int, d: int, seed: int, scale: float, far: float, beta: Any) -> None:
    rng = np.random.default_rng(seed)
    mu = scale * rng.normal(size=(k, d))
    mu[-1] += far * scale
    X = np.vstack([scale * rng.normal(size=(6, d)), mu])
    net = model(mu)
    for target in (None, k - 1):
        e = net.explain(X, target=target, beta=beta)
        assert np.isfinite(e.values).all()
        assert np.isfinite(e.residual).all()
        size = np.abs(e.values).sum(1) + np.abs(e.residual)
        assert close(e.values.sum(1) + e.residual, e.output, size)


def test_published_demo_rows(wine: pd.DataFrame) -> None:
    """Logits of rows 60, 61, 83 on MinMax wine, K = 3, as printed in the README of jacobkauffmann/neon_demo."""
    Z = MinMaxScaler().fit_transform(wine)
    found = []
    for seed in range(20):
        fitted = KMeans(3, n_init=1, random_state=seed).fit(Z)
        found.append(np.sort(neuralize(fitted)(Z[[60, 61, 83]]).max(1).values.numpy() - [0.0772, 0.2447, 0.4378]))
    assert min(np.abs(gap).max() for gap in found) < 1e-4


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "options", "columns", "k"),
    [
        ("wholesale_customers.csv", {}, slice(2, None), 6),
        ("wheat-seeds.csv", {"header": None}, slice(0, -1), 3),
        ("winequality-white.csv", {"header": None}, slice(0, -1), 8),
        ("glass.csv", {"header": None}, slice(0, -1), 6),
        ("sonar.csv", {"header": None}, slice(0, -1), 4),
        ("banknote_authentication.csv", {"header": None}, slice(0, -1), 5),
    ],
)
@pytest.mark.parametrize("scale", [False, True])
def test_real_tables(tabular: Any, name: str, options: Any, columns: slice, k: int, scale: bool) -> None:
    frame = tabular(name, **options).iloc[:, columns]
    frame.columns = frame.columns.astype(str)
    clusterer = KMeans(k, n_init=1, random_state=0)
    fitted = (make_pipeline(StandardScaler(), clusterer) if scale else clusterer).fit(frame[::2])
    net = neuralize(fitted)
    far = frame + 1e6 * frame.std().to_numpy() * np.random.default_rng(0).normal(size=frame.shape)
    for rows in (frame[::2], frame[1::2], far):
        np.testing.assert_array_equal(net.predict(rows), fitted.predict(rows))
        e = net.explain(rows)
        assert close(e.values.sum(1) + e.residual, e.output, np.abs(e.values).sum(1))
    assert e.feature_names == tuple(frame.columns)
