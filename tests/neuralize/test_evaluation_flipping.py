"""Flipping against loops over rows and columns, against hand-computed areas, and its own standard errors."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from lrp import errors
from neuralize import NeuralizedModel, neuralize
from neuralize.evaluation import (
    ConditionalKDE,
    Marginal,
    Mean,
    NearestMidpoint,
    OtherCluster,
    compare,
    flip,
    random_values,
    srg,
)
from neuralize.evaluation import plots as pictures

TIES, DONORS = 0, 1


def uniforms(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream,))).random(shape)


def looped(score: Any, X: np.ndarray, R: np.ndarray, most: bool, counts: list[int], refill: Any, draws: int, seed: int):
    """Curves (N, S): one row, one draw, one column at a time; refill(i, draw, removed) gives the replaced row."""
    ties = uniforms(seed, TIES, X.shape)
    curves = np.zeros((len(X), len(counts)))
    for i, row in enumerate(X):
        order = sorted(range(len(row)), key=lambda t: (-R[i, t], ties[i, t]))
        if not most:
            order.reverse()
        for s, k in enumerate(counts):
            found = []
            for draw in range(draws):
                changed = row.copy()
                other = refill(i, draw, order[:k])
                for t in order[:k]:
                    changed[t] = other[t]
                found.append(float(score(changed[None])[0]))
            curves[i, s] = np.mean(found)
    return curves


def bent(X: Any) -> np.ndarray:
    """A score whose arithmetic is the same for one row as for many."""
    X = np.asarray(X)
    total = np.zeros(len(X))
    for t in range(X.shape[1]):
        total = total + (t + 1) * X[:, t] ** 2 - X[:, t] * X[:, t - 1]
    return total


@pytest.fixture(scope="module")
def table() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X, R = rng.normal(1, 2, (11, 6)), rng.normal(size=(11, 6))
    R[:4] = np.round(R[:4])  # with ties
    R[4] = 0
    return X, R


@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize("steps", [None, 4, [1, 3, 5]])
def test_equals_the_loop_exactly(table: Any, order: str, steps: Any) -> None:
    X, R = table
    counts = {None: [0, 1, 2, 3, 4, 5, 6], 4: [0, 4, 6]}.get(steps if not isinstance(steps, list) else 0, [0, 1, 3, 5])
    mean = X.mean(0)
    found = flip(bent, X, R, imputer="mean", order=order, steps=steps, seed=5)
    assert found.removed.tolist() == counts
    expected = looped(bent, X, R, order == "most", counts, lambda i, draw, removed: mean, 1, 5)
    np.testing.assert_array_equal(found.scores, expected)
    u = uniforms(5, DONORS, (len(X), 3, 1))[:, :, 0]
    found = flip(bent, X, R, imputer="marginal", order=order, steps=steps, seed=5, draws=3)
    donor = lambda i, draw, removed: X[int(u[i, draw] * len(X))]  # noqa: E731
    expected = looped(bent, X, R, order == "most", counts, donor, 3, 5)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-14, atol=0)
    assert found.draws.shape == (3, len(counts))
    np.testing.assert_allclose(found.draws.mean(0), found.mean, rtol=1e-12)
    np.testing.assert_allclose(found.relative_draws.mean(0), (found.scores / abs(found.start[:, None])).mean(0))


@pytest.mark.parametrize("order", ["most", "least"])
def test_network_equals_the_loop(wine: pd.DataFrame, order: str) -> None:
    fitted = make_pipeline(StandardScaler(), KMeans(4, n_init=1, random_state=0)).fit(wine)
    net, few = neuralize(fitted), wine.iloc[::12]
    e = net.explain(few)
    X, column = few.to_numpy(), {label: i for i, label in enumerate(net.labels.tolist())}
    own = [column[c] for c in net.predict(few).tolist()]
    u = uniforms(2, DONORS, (len(X), 2, 1))[:, :, 0]
    reference = wine.to_numpy()
    scores = {i: lambda row, c=c: net(row)[:, c].numpy() for i, c in enumerate(own)}
    counts = [0, 2, 4, 6, 8, 10, 12, 13]
    rows = [
        looped(
            scores[i],
            X[i : i + 1],
            e.values[i : i + 1],
            order == "most",
            counts,
            lambda _, draw, removed, i=i: reference[int(u[i, draw] * len(reference))],
            2,
            2,
        )[0]
        for i in range(len(X))
    ]
    found = flip(net, few, e, imputer="marginal", reference=wine, order=order, draws=2, seed=2)
    assert found.removed.tolist() == counts
    np.testing.assert_allclose(found.scores, rows, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.start, e.output)
    # the logit of the cluster at the start: negative once the row has left it
    assert order == "least" or (found.scores.min(1) < 0).mean() > 0.5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_the_loop_on_any_table(data: st.DataObject) -> None:
    n, d = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    numbers = st.sampled_from([0.0, 1.0, -1.0, 1e-300, -3.5e7, 2.0, 1 / 3])
    X, R, reference = (
        np.array(data.draw(st.lists(numbers, min_size=m * d, max_size=m * d))).reshape(m, d) for m in (n, n, 3)
    )
    seed, draws = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 3))
    u = uniforms(seed, DONORS, (n, draws, 1))[:, :, 0]
    for order in ("most", "least"):
        options: dict[str, Any] = {"imputer": "marginal", "reference": reference, "order": order, "steps": 1}
        found = flip(bent, X, R, draws=draws, seed=seed, **options)
        refill = lambda i, draw, removed: reference[int(3 * u[i, draw])]  # noqa: E731
        expected = looped(bent, X, R, order == "most", list(range(d + 1)), refill, draws, seed)
        np.testing.assert_allclose(found.scores, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("d", [5, 10, 11, 50, 51, 53])
def test_default_steps(d: int) -> None:
    X = np.arange(2.0 * d).reshape(2, d)
    removed = flip(bent, X, X, imputer="mean").removed
    step = 1 if d <= 10 else 2 if d <= 50 else 5
    assert removed.tolist() == sorted({*range(0, d, step), d})


# ------------------------------------------------------------------ by hand


def test_additive_score_by_hand() -> None:
    """f = sum w_t x_t: removing t takes away c_t = w_t (x_t - mean_t), whatever else is removed."""
    rng = np.random.default_rng(1)
    X, w = rng.normal(2, 1, (40, 5)), np.array([3.0, -1.0, 0.5, 2.0, 0.0])
    c = w * (X - X.mean(0))
    f = X @ w
    falling = np.sort(c, axis=1)[:, ::-1]
    expected = np.column_stack([f, f[:, None] - np.cumsum(falling, axis=1)])
    most = flip(lambda X: X @ w, X, c, imputer="mean")
    np.testing.assert_allclose(most.scores, expected, atol=1e-12)
    least = flip(lambda X: X @ w, X, c, imputer="mean", order="least")
    # what is left after k of one order is what k of the other took away
    both = np.tile((f + X.mean(0) @ w)[:, None], 4)
    np.testing.assert_allclose(least.scores[:, 1:-1] + most.scores[:, 4:0:-1], both, atol=1e-12)
    # trapezoid over the share of removed columns
    by_hand = (expected[:, :-1] + expected[:, 1:]).sum(1) / 10
    np.testing.assert_allclose(most.areas(), by_hand)
    assert math.isclose(most.area().value, by_hand.mean() / np.abs(f).mean())
    assert math.isclose(most.area("row").value, (by_hand / np.abs(f)).mean())
    assert math.isclose(most.area(None).value, by_hand.mean())
    # both orders start and end alike; LIF - MIF = sum_k (top k - bottom k) / D
    top = np.cumsum(falling, axis=1)[:, :-1].sum(1)
    bottom = np.cumsum(falling[:, ::-1], axis=1)[:, :-1].sum(1)
    gain = srg(lambda X: X @ w, X, c, imputer="mean")
    np.testing.assert_allclose(gain.rows, (top - bottom) / 5 / np.abs(f).mean())
    assert math.isclose(gain.value, gain.rows.mean())
    assert math.isclose(gain.value, gain.least.area().value - gain.most.area().value, rel_tol=1e-12)
    assert math.isnan(gain.spread)  # nothing is random


def test_no_order_beats_the_exact_relevances() -> None:
    rng = np.random.default_rng(2)
    X, w = rng.normal(size=(6, 4)), rng.normal(size=4)
    c = w * (X - X.mean(0))
    best = srg(lambda X: X @ w, X, c, imputer="mean", normalise=None).rows
    for order in itertools.permutations(range(4)):
        other = np.broadcast_to(np.array(order, dtype=float), X.shape)
        assert (srg(lambda X: X @ w, X, other, imputer="mean", normalise=None).rows <= best + 1e-12).all()


def test_only_the_order_counts(table: Any) -> None:
    X, R = table
    a = srg(bent, X, R, imputer="marginal", draws=2)
    b = srg(bent, X, 7 * R**3 + R, imputer="marginal", draws=2)
    np.testing.assert_array_equal(a.rows, b.rows)
    opposite = srg(bent, X, -R, imputer="marginal", draws=2)
    untied = np.arange(len(X)) > 4
    np.testing.assert_allclose(opposite.rows[untied], -a.rows[untied])


def test_constant_relevances_gain_nothing() -> None:
    """Ties must not fall into the order of the columns, which may be a good one."""
    rng = np.random.default_rng(3)
    X, w = rng.normal(1, 1, (300, 6)), np.arange(6.0, 0, -1)
    score = lambda X: X @ w  # noqa: E731
    gain = srg(score, X, np.zeros_like(X), imputer="mean", reference=np.zeros((2, 6)))
    assert abs(gain.value) < 3 * gain.standard_error
    by_column = srg(score, X, -np.tile(np.arange(6.0), (300, 1)), imputer="mean", reference=np.zeros((2, 6)))
    assert by_column.value > 10 * gain.standard_error


def test_negative_starts_keep_the_direction() -> None:
    rng = np.random.default_rng(4)
    X, w = rng.normal(size=(50, 4)), np.array([1.0, 2.0, -1.0, 0.3])
    for offset in (20.0, -20.0):
        gain = srg(lambda X, b=offset: X @ w + b, X, w * X, imputer="mean", normalise="row")
        assert gain.value > 5 * gain.standard_error > 0
        assert srg(lambda X, b=offset: X @ w + b, X, w * X, imputer="mean").value > 0


def test_sign_reverses_negative_predictions(wine: pd.DataFrame) -> None:
    X = StandardScaler().fit_transform(wine)
    y = KMeans(2, n_init=1, random_state=0).fit_predict(X)
    svc = SVC(gamma=0.05).fit(X, y)
    f = svc.decision_function
    R = X * 0.1 + f(X)[:, None]
    s = np.where(f(X) < 0, -1.0, 1.0)
    assert 0 < (s < 0).sum() < len(X)
    found = flip(f, X, R, imputer="mean", sign="score")
    assert (found.start > 0).all()
    for side in (-1.0, 1.0):
        mine = s == side
        alone = flip(lambda X, side=side: side * f(X), X[mine], side * R[mine], imputer="mean", reference=X)
        untied = np.median(found.scores[mine] - alone.scores, axis=1)
        np.testing.assert_allclose(untied, 0, atol=1e-12)
    np.testing.assert_array_equal(flip(f, X, R, imputer="mean", sign=s).scores, found.scores)


def test_area_of_the_published_protocol() -> None:
    """Bley et al. 2025: sign x predicted label at 1, 1 + s, ... removed columns, counted as equidistant."""
    rng = np.random.default_rng(5)
    X, w = rng.normal(size=(30, 13)), rng.normal(size=13)
    predict = lambda X: np.where(np.asarray(X) @ w > 0, 1, -1)  # noqa: E731
    R = w * X
    mean = X.mean(0)
    areas = []
    for x, r in zip(X, R, strict=True):
        sign = predict(x[None])[0]
        changed, curve = x.copy(), [1.0]
        for place, t in enumerate(np.argsort(-sign * r)):
            changed[t] = mean[t]
            if place % 2 == 0:
                curve.append(float(sign * predict(changed[None])[0]))
        c = np.array(curve)
        areas.append(((c[:-1] + c[1:]) / 2).sum() / (len(c) - 1))
    found = flip(predict, X, R, imputer="mean", sign="score", steps=range(1, 14, 2))
    assert math.isclose(found.area("row", "index").value, np.mean(areas))
    assert found.area("row", "index").value != found.area("row").value


# ------------------------------------------------------------------ errors of the numbers


def test_standard_errors_are_honest() -> None:
    """Over many data sets the areas scatter as their standard errors say, ratio and all."""
    w = np.array([2.0, 1.0, 0.5, -0.3])
    score = lambda X: X @ w + 3  # noqa: E731
    for normalise in ("mean", "row", None):
        values, errors_ = [], []
        for seed in range(300):
            X = np.random.default_rng(seed).normal(1, 0.3, (40, 4))
            area = flip(score, X, w * X, imputer="mean", reference=np.zeros((2, 4))).area(normalise)
            values.append(area.value)
            errors_.append(area.standard_error)
        assert abs(np.std(values) / np.mean(errors_) - 1) < 0.1, normalise


def test_random_orders_gain_nothing_within_their_errors(wine: pd.DataFrame) -> None:
    net = neuralize(make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(wine))
    z = []
    for seed in range(60):
        gain = srg(net, wine, random_values(wine, seed), imputer="marginal", draws=2, seed=seed)
        z.append(gain.value / gain.standard_error)
    assert abs(np.mean(z)) < 3 / math.sqrt(60)
    assert 0.8 < np.std(z) < 1.25


def test_spread_is_that_of_the_draws() -> None:
    rng = np.random.default_rng(6)
    X, R = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    many = srg(bent, X, R, imputer="marginal", draws=400)
    singles = [srg(bent, X, R, imputer="marginal", draws=1, seed=s).value for s in range(1, 200)]
    assert abs(np.std(singles) / many.spread - 1) < 0.15
    assert math.isnan(srg(bent, X, R, imputer="marginal", draws=1).spread)
    few = flip(bent, X, R, imputer="marginal", draws=3)
    assert few.area().spread > 0
    assert few.area("row").spread > 0


def test_one_row_has_no_standard_error() -> None:
    X = np.array([[1.0, 2.0]])
    gain = srg(bent, X, X, imputer="marginal", reference=np.zeros((3, 2)))
    assert math.isnan(gain.standard_error)
    assert np.isnan(gain.most.standard_error).all()
    assert math.isfinite(gain.value)
    assert "nan" in repr(gain)


# ------------------------------------------------------------------ invariances


def imputers(fitted: KMeans) -> dict[str, Any]:
    centres = NearestMidpoint(fitted)
    return {i.name: i for i in (Mean(), Marginal(), ConditionalKDE(), OtherCluster(fitted), centres)}


@pytest.fixture(scope="module")
def scaled(wine: pd.DataFrame) -> tuple[NeuralizedModel, np.ndarray, KMeans]:
    X = StandardScaler().fit_transform(wine)
    fitted = KMeans(3, n_init=1, random_state=0).fit(X)
    return neuralize(fitted), X, fitted


NAMES = ["mean", "marginal", "kde", "other", "midpoint"]


@pytest.mark.parametrize("name", NAMES)
def test_exact_relevances_gain_more_than_controls(scaled: Any, name: str) -> None:
    net, X, fitted = scaled
    table = compare({"lrp": net.explain(X)}, net, X, imputers=[imputers(fitted)[name]], draws=5, seeds=[0, 1])
    line = table.loc[name]
    assert line.srg["lrp"] > line.srg["sensitivity"] + 3 * (line.srg_se["lrp"] + line.srg_se["sensitivity"])
    assert line.over_random["lrp"] > 10 * line.over_random_se["lrp"]
    assert line.over_random["sensitivity"] > 5 * line.over_random_se["sensitivity"]
    assert abs(line.srg["random"]) < 3 * line.srg_se["random"]


@pytest.mark.parametrize("name", NAMES)
def test_translation_changes_nothing(scaled: Any, name: str) -> None:
    net, X, fitted = scaled
    shift = np.linspace(-30, 40, X.shape[1])
    moved = KMeans(3, n_init=1, init=fitted.cluster_centers_ + shift, max_iter=1).fit(X + shift)
    moved.cluster_centers_ = fitted.cluster_centers_ + shift
    R = net.explain(X).values
    a = srg(net, X, R, imputer=imputers(fitted)[name], draws=3)
    b = srg(neuralize(moved), X + shift, R, imputer=imputers(moved)[name], draws=3)
    np.testing.assert_allclose(b.least.scores, a.least.scores, atol=1e-9)
    np.testing.assert_allclose(b.most.scores, a.most.scores, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_batches_seeds_and_the_users_objects(scaled: Any, name: str) -> None:
    net, X, fitted = scaled
    few, R = X[:23].copy(), net.explain(X[:23]).values
    imputer = imputers(fitted)[name]
    a = srg(net, few, R, imputer=imputer, draws=4, reference=X, seed=1)
    assert imputer.reference is None
    assert (few == X[:23]).all()
    for size in (1, 7):
        b = srg(net, few, R, imputer=imputer, draws=4, reference=X, seed=1, batch_size=size)
        np.testing.assert_allclose(b.rows, a.rows, rtol=1e-10, atol=1e-12)
    # a row's curve does not depend on the rows that follow it
    one = srg(net, few[:5], R[:5], imputer=imputer, draws=4, reference=X, seed=1, normalise=None)
    np.testing.assert_allclose(one.most.scores, a.most.scores[:5], rtol=1e-10, atol=1e-12)
    again = srg(net, few, R, imputer=imputer.fit(X), draws=4, seed=1)
    np.testing.assert_array_equal(again.rows, a.rows)
    other = srg(net, few, R, imputer=imputer, draws=4, seed=2)
    assert (other.rows != a.rows).any() == (imputer.numbers > 0)


def test_bounded_work_gives_the_same(scaled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, X, _ = scaled
    few = X[::20]
    assert len(set(net.predict(few).tolist())) == 3
    R = net.explain(few).values
    a = srg(net, few, R, imputer="kde", draws=3, reference=X)
    monkeypatch.setattr("neuralize.evaluation.scores.BATCH", 100)
    b = srg(net, few, R, imputer="kde", draws=3, reference=X)
    np.testing.assert_allclose(a.rows, b.rows, rtol=1e-10)
    monkeypatch.setattr("neuralize.evaluation._imputing.WORK", 1)
    b = srg(net, few, R, imputer="kde", draws=3, reference=X)
    np.testing.assert_allclose(a.rows, b.rows, rtol=1e-10)


# ------------------------------------------------------------------ inputs


def test_frames_and_targets(wine: pd.DataFrame) -> None:
    fitted = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(wine)
    net = neuralize(fitted)
    e = net.explain(wine, target=1)
    a = srg(net, wine, e, imputer="mean")
    np.testing.assert_allclose(a.most.start, e.output, rtol=1e-12)
    assert (a.most.start < 0).any()
    for values in (e.values, e.to_frame()):
        np.testing.assert_allclose(srg(net, wine, values, imputer="mean", target=1).rows, a.rows, rtol=1e-9, atol=1e-12)
    same = srg(net, wine.to_numpy(), e.values, imputer="mean", target=[1] * 178).rows
    np.testing.assert_allclose(same, a.rows, rtol=1e-9, atol=1e-12)
    seen = []

    def columns(X: pd.DataFrame) -> np.ndarray:
        seen.append(list(X.columns))
        return -fitted.transform(X)  # one column per cluster; a frame, or scikit-learn would warn

    b = srg(columns, wine, e.values, imputer=OtherCluster(fitted), target=1, draws=2)
    assert seen[0] == list(wine.columns)
    np.testing.assert_allclose(b.most.start, -fitted.transform(wine)[:, 1])
    own = srg(columns, wine, e.values, imputer="mean")
    np.testing.assert_allclose(own.most.start, (-fitted.transform(wine)).max(1))
    integers = wine.round().astype(int).assign(flag=True)
    found = flip(lambda X: X.sum(axis=1), integers, integers, imputer="marginal", draws=2)
    np.testing.assert_array_equal(found.start, integers.astype(float).sum(axis=1))


def test_comparison_is_made_of_gains(scaled: Any) -> None:
    net, X, _ = scaled
    e = net.explain(X)
    options: dict[str, Any] = {"draws": 3, "steps": 3}
    table = compare({"lrp": e, "reverse": -e.values}, net, X, imputers=("marginal", "other"), seeds=(4, 7), **options)
    assert table.index.names == ["imputer", "method"]
    assert list(table.loc["other"].index) == ["lrp", "reverse", "random", "sensitivity"]
    gains = [srg(net, X, e, imputer="marginal", seed=s, **options) for s in (4, 7)]
    line = table.loc[("marginal", "lrp")]
    assert math.isclose(line.srg, np.mean([g.value for g in gains]))
    assert math.isclose(line.most, np.mean([g.most.area().value for g in gains]))
    assert math.isclose(line.spread_seeds, np.std([g.value for g in gains], ddof=1))
    mean = (gains[0].rows + gains[1].rows) / 2
    start = e.output / e.output.mean()
    assert math.isclose(line.srg_se, np.std(mean - line.srg * start, ddof=1) / math.sqrt(len(X)))
    chance = [srg(net, X, random_values(X, s), imputer="marginal", seed=s, **options) for s in (4, 7)]
    difference = mean - (chance[0].rows + chance[1].rows) / 2
    assert math.isclose(line.over_random, difference.mean())
    assert math.isclose(line.over_random_se, np.std(difference - difference.mean() * start, ddof=1) / math.sqrt(len(X)))
    assert math.isclose(table.loc[("other", "reverse")].srg, -table.loc[("other", "lrp")].srg)
    assert table.attrs["seeds"] == [4, 7]
    again = compare({"lrp": e, "reverse": -e.values}, net, X, imputers=("marginal", "other"), seeds=(4, 7), **options)
    pd.testing.assert_frame_equal(table, again)
    named = compare({}, net, X, imputers={"a": "mean", "b": Mean()}, seeds=[0])
    assert named.index.tolist() == [(i, m) for i in "ab" for m in ("random", "sensitivity")]
    kinds = compare({}, net, X, imputers=[ConditionalKDE(), ConditionalKDE(0.1)], seeds=[0], draws=1, steps=13)
    assert len(kinds) == 4


def test_comparison_reverses_negative_predictions() -> None:
    rng = np.random.default_rng(7)
    X, w = rng.normal(size=(60, 4)), np.array([3.0, -2.0, 1.0, 0.5])
    score = lambda X: X @ w  # noqa: E731
    s = np.where(score(X) < 0, -1.0, 1.0)
    table = compare({"exact": w * X}, score, X, imputers="mean", seeds=[0], sign="score").loc["mean"]
    exact = srg(score, X, w * X, imputer="mean", sign=s)
    assert math.isclose(table.srg["exact"], exact.value)
    assert table.srg["exact"] > 0
    # a slope has no sign of its own: it speaks for whatever was predicted
    slopes = srg(lambda X: X @ w, X, s[:, None] * w**2, imputer="mean", sign=s)
    np.testing.assert_allclose(table.srg["sensitivity"], slopes.value)


def test_pictures(scaled: Any) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    net, X, _ = scaled
    gain = srg(net, X, net.explain(X), imputer="mean")
    ax = gain.plot()
    assert [line.get_label() for line in ax.lines[:2]] == ["least relevant first", "most relevant first"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), gain.most.mean / gain.most.mean[0])
    assert gain.most.plot(ax=ax, normalise=None) is ax
    bars = pictures.gains(compare({"a$b$": -X}, net, X, imputers=["mean", "marginal"], draws=1, seeds=[0]))
    assert len(bars.patches) == 6
    with pytest.raises(errors.InputError):
        pictures.gains(pd.DataFrame({"srg": [1.0]}))
    with pytest.raises(errors.InputError):
        pictures.curves({})
    plt.close("all")
    frame = gain.most.to_frame()
    assert frame.index.name == "removed"
    assert "FlippingCurve" in repr(gain.most)


def test_importing_is_light() -> None:
    code = (
        "import sys, neuralize.evaluation as e; e.__dir__();"
        "print([m for m in ('torch', 'scipy', 'sklearn', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_codes_of_categories_are_not_encoded_twice() -> None:
    """Rows with categories are judged as ``net.encode`` returns them."""
    rng = np.random.default_rng(0)
    colour = np.array(["red", "blue", "green"])[rng.integers(0, 3, 60)]
    frame = pd.DataFrame({"colour": colour, "size": rng.normal(size=60)})
    prepare = make_column_transformer((OneHotEncoder(), ["colour"]), (StandardScaler(), ["size"]))
    net = neuralize(make_pipeline(prepare, KMeans(3, n_init=1, random_state=0)).fit(frame))
    e = net.explain(frame)
    for imputer in ("marginal", OtherCluster(net)):
        curve = flip(net, net.encode(frame), e, imputer=imputer, draws=3)
        np.testing.assert_allclose(curve.start, e.output, rtol=0, atol=1e-12 * e.output.max())
        assert np.isfinite(curve.mean).all()
