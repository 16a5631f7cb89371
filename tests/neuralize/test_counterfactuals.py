"""The nearest row with another label: against brute force, closed forms and other solvers; what can not be reached."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.nearest import general_solver
from scipy.stats import qmc
from sklearn.cluster import Birch, KMeans
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, PowerTransformer, StandardScaler

from lrp import errors
from neuralize import CentroidHead, NeuralizedModel, Scaler, neuralize
from neuralize._affine import decision_of
from neuralize._projection import InfeasibleError, project
from neuralize.counterfactuals import Affine, Counterfactuals, Decision, Reference, UnreachableError, counterfactuals

EYE = np.eye


# ---------------------------------------------------------------------- what networks say


def pairs(mu: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where centre k is nearest."""
    rest = np.delete(mu, k, axis=0)
    return [(2 * (mu[k] - rest), (rest**2).sum(1) - (mu[k] ** 2).sum())]


def centroids(*mu: Any, predict: Any = None, precision: float = 2.2e-16) -> Decision:
    """Nearest centres on raw columns, in plain numpy."""
    M = np.array(mu, dtype=float)

    def nearest(x: np.ndarray) -> np.ndarray:
        return ((x[:, None] - M) ** 2).sum(2).argmin(1)

    d = M.shape[1]
    names = tuple(f"x{t}" for t in range(d))
    affine = Affine(EYE(d), np.zeros(d))
    return Decision(
        lambda k: pairs(M, k),
        affine,
        predict or nearest,
        np.arange(len(M)),
        names,
        source="centres",
        precision=precision,
    )


def nearest_by_force(
    predict: Callable[[np.ndarray], np.ndarray], x: np.ndarray, want: int, w: np.ndarray, points: np.ndarray
) -> float:
    """Distance to the nearest of many points that have the label (-1: another one)."""
    labels = predict(points)
    good = labels == want if want >= 0 else labels != predict(x[None])[0]
    return float(np.sqrt((w * (points[good] - x) ** 2).sum(1)).min(initial=np.inf))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 3), st.booleans())
def test_no_point_of_a_grid_is_nearer(seed: int, k: int, d: int, to_one: bool) -> None:
    rng = np.random.default_rng(seed)
    decision = centroids(*rng.normal(size=(k, d)))
    x, w = rng.normal(size=(4, d)), rng.uniform(0.2, 5, size=d)
    want = k - 1 if to_one else -1
    points = qmc.scale(qmc.Sobol(d, seed=seed).random(2**12), [-4] * d, [4] * d)
    found = counterfactuals(decision, x, to=want if to_one else None, metric=w)
    np.testing.assert_array_equal(decision.predict(found.rows), found.new)
    assert found.exact.all()
    for i in range(4):
        assert (found.new[i] == want) if to_one else (found.new[i] != found.old[i])
        forced = nearest_by_force(decision.predict, x[i], want, w, points)
        assert found.distance[i] <= forced * (1 + 1e-4) + 1e-9
        assert found.distance[i] == pytest.approx(np.sqrt((w * (found.rows[i] - x[i]) ** 2).sum()), rel=1e-9)
        # and it is not far from the best of the grid: the grid resolves about this much
        if d == 1 and np.isfinite(forced):
            assert forced <= found.distance[i] + 0.01 * np.sqrt(w[0])


@pytest.fixture(scope="module")
def on_wine(wine: pd.DataFrame) -> tuple[Any, NeuralizedModel, Decision, pd.DataFrame]:
    fitted = make_pipeline(StandardScaler(), KMeans(3, n_init=10, random_state=0)).fit(wine)
    net = neuralize(fitted)
    return fitted, net, decision_of(net, wine), wine


def test_wine_to_the_nearest_other_cluster(on_wine: Any) -> None:
    fitted, net, decision, X = on_wine
    found = counterfactuals(decision, X)
    np.testing.assert_array_equal(fitted.predict(found.to_frame()), found.new)
    np.testing.assert_array_equal(fitted.predict(X), found.old)
    assert (found.new != found.old).all()
    # closed form: half the gap over the distance of the centres, in scaled space, the nearest of the two planes
    z, mu = fitted[0].transform(X), fitted[1].cluster_centers_
    d = ((z[:, None] - mu) ** 2).sum(2)
    own = d.argmin(1)
    planes = np.full(d.shape, np.inf)
    for i, k in itertools.product(range(len(z)), range(3)):
        if k != own[i]:
            planes[i, k] = (d[i, k] - d[i, own[i]]) / (2 * np.linalg.norm(mu[k] - mu[own[i]]))
    np.testing.assert_allclose(found.distance, planes.min(1), rtol=3e-6)
    assert (found.distance >= planes.min(1)).all()
    np.testing.assert_array_equal(found.new, planes.argmin(1))
    assert found.unit == "standard deviations"
    # on the border the duel is undecided
    duel = net.explain(found.rows, target=found.new, contrast=found.old).output
    assert (duel > 0).all()
    assert (duel < 1e-4 * net.explain(X, target=found.old, contrast=found.new).output.max()).all()


@pytest.mark.parametrize("options", [{}, {"bounds": "data"}, {"bounds": "data", "fixed": ["proline", "hue"]}])
def test_wine_to_one_cluster_agrees_with_a_general_solver(on_wine: Any, options: dict[str, Any]) -> None:
    fitted, _, decision, X = on_wine
    rows = X.iloc[::20]
    found = counterfactuals(decision, rows, to=1, **options)
    np.testing.assert_array_equal(fitted.predict(found.to_frame()), 1)
    scale, mu = fitted[0].scale_, fitted[1].cluster_centers_
    stay = [X.columns.get_loc(c) for c in options.get("fixed", [])]
    for i, x in enumerate(rows.to_numpy()):
        if found.old[i] == 1:
            np.testing.assert_array_equal(found.rows[i], x)
            assert found.distance[i] == 0
            continue
        z = (x - fitted[0].mean_) / scale
        A, b = 2 * (mu[1] - mu[[0, 2]]), (mu[[0, 2]] ** 2).sum(1) - (mu[1] ** 2).sum()
        low, high = np.full(13, -np.inf), np.full(13, np.inf)
        if "bounds" in options:
            low, high = ((e - fitted[0].mean_) / scale for e in (X.min().to_numpy(), X.max().to_numpy()))
            assert (found.rows[i] >= X.min().to_numpy()).all()
            assert (found.rows[i] <= X.max().to_numpy()).all()
        low[stay], high[stay] = z[stay], z[stay]
        np.testing.assert_array_equal(found.rows[i, stay], x[stay])
        other = general_solver(z, A, b, np.ones(13), low, high, (mu[1], z, (z + mu[1]) / 2))
        assert found.distance[i] == pytest.approx(other, rel=2e-5)


def test_a_row_does_not_depend_on_the_others(on_wine: Any) -> None:
    _, _, decision, X = on_wine
    options: dict[str, Any] = {"to": 2, "bounds": "data", "integers": ["proline"]}
    whole = counterfactuals(decision, X.iloc[:20], **options)
    for i in (0, 3, 19):
        alone = counterfactuals(decision, X.iloc[[i]], **options)
        np.testing.assert_array_equal(alone.rows[0], whole.rows[i])
    assert whole.index[3] == X.index[3]


def test_labels_per_row_and_labels_by_name(on_wine: Any) -> None:
    _, _, decision, X = on_wine
    named = Decision(
        decision.cells, decision.affine, decision.predict, np.array(["a", "b", "c"]), decision.names, kind="class"
    )
    goals = np.array(["a", "b", "c"])[np.arange(len(X)) % 3]
    found = counterfactuals(named, X.to_numpy(), to=goals)
    np.testing.assert_array_equal(found.new, goals)
    np.testing.assert_array_equal(found.distance == 0, found.old == goals)
    assert "class b" in str(found.sentence(1))
    with pytest.raises(errors.TargetError, match="exist"):
        counterfactuals(named, X.to_numpy(), to="d")


# ---------------------------------------------------------------------- bounds, metrics, columns


def test_bounds_that_leave_no_way_name_the_rows() -> None:
    decision = centroids([0.0, 0.0], [10.0, 0.0])
    frame = pd.DataFrame({"x0": [1.0, 9.0, 2.0], "x1": [0.0, 0.0, 5.0]}, index=["ann", "bob", "cid"])
    with pytest.raises(UnreachableError, match="rows ann, cid can not get another label") as caught:
        counterfactuals(decision, frame, bounds={"x0": (3, 20), "x1": (0, 9)} | {"x0": "down"})
    assert caught.value.rows == (0, 2)
    with pytest.raises(UnreachableError, match="row ann can not get label 1"):
        counterfactuals(decision, frame.iloc[:1], to=1, fixed=["x0"])
    # up to the border itself is not enough, and just beyond it is
    with pytest.raises(UnreachableError):
        counterfactuals(decision, frame.iloc[:1], to=1, bounds={"x0": (None, 5.0)})
    found = counterfactuals(decision, frame.iloc[:1], to=1, bounds={"x0": (None, 5.0 + 1e-9)})
    assert 5 < found.rows[0, 0] <= 5 + 1e-9
    assert found.new[0] == 1


def test_values_beyond_bounds_may_stay() -> None:
    decision = centroids([0.0, 0.0], [10.0, 10.0])
    found = counterfactuals(decision, [[1.0, 20.0]], to=0, bounds={1: (30, 40), "x0": (-50, 0)})
    assert found.rows[0, 1] == 20
    assert found.rows[0, 0] == pytest.approx(-10, abs=1e-3)


def test_no_value_leaves_its_bounds_by_a_bit(on_wine: Any) -> None:
    fitted, _, decision, X = on_wine
    low, high = X.quantile(0.2).to_numpy(), X.quantile(0.8).to_numpy()
    bound = 0
    for to in (0, 1, 2):
        found = counterfactuals(
            decision, X, to=to, bounds=dict(zip(X.columns, zip(low, high, strict=True), strict=True))
        )
        np.testing.assert_array_equal(fitted.predict(found.to_frame()), to)
        assert (found.rows >= np.minimum(low, X)).all(axis=None)
        assert (found.rows <= np.maximum(high, X)).all(axis=None)
        bound += int((found.changed & ((found.rows == low) | (found.rows == high))).sum())
    assert bound > 100


def test_directions() -> None:
    decision = centroids([0.0, 0.0], [10.0, 10.0])
    free = counterfactuals(decision, [[1.0, 2.0]])
    up = counterfactuals(decision, [[1.0, 2.0]], bounds={"x0": "down", "x1": "up"})
    np.testing.assert_allclose(free.rows, [[4.5, 5.5]], atol=1e-4)
    np.testing.assert_allclose(up.rows, [[1.0, 9.0]], atol=1e-4)


def test_metrics_are_stated() -> None:
    X = np.array([[0.0, 0.0, 7.0], [10.0, 1.0, 7.0], [0.0, 1.0, 7.0], [10.0, 0.0, 7.0]])
    net = NeuralizedModel(
        CentroidHead([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        front=[Scaler(divide=[10.0, 1.0, 1.0], source="StandardScaler")],
    )
    row = [[1.0, 0.1, -1.0]]
    seen = counterfactuals(decision_of(net, X), row)
    assert "standard deviation over 4 reference rows" in seen.metric
    # the reference says nothing about a column that does not vary there
    assert not seen.changed[0, 2]
    scaled = counterfactuals(decision_of(net), row)
    assert scaled.unit == "units of StandardScaler"
    assert scaled.changed.all()
    assert scaled.distance[0] == pytest.approx((1.5 - 0.1 - 0.1 + 1.0) / np.sqrt(3), rel=1e-5)
    raw = counterfactuals(decision_of(net), row, metric="raw")
    assert raw.unit == "raw units"
    assert raw.distance[0] == pytest.approx(2.3 / np.sqrt(2.01), rel=1e-5)
    weighted = counterfactuals(decision_of(net), row, metric=[1e-4, 1e6, 1e6])
    assert "weighted" in weighted.metric
    assert weighted.rows[0] == pytest.approx([24.0, 0.1, -1.0], abs=1e-3)
    bare = counterfactuals(centroids([0.0], [2.0]), [[0.5]])
    assert "neither a scaler nor a reference" in bare.metric


def test_reference_rows() -> None:
    seen = Reference.of([[0.1, np.nan, 1.0], [0.1, 2.0, 3.0], [0.1, 4.0, np.nan]])
    # three tenths have a standard deviation of 1.4e-17 in float64
    assert np.std([0.1, 0.1, 0.1]) > 0
    assert seen.spread.tolist() == [0.0, 1.0, 1.0]
    assert (seen.low.tolist(), seen.high.tolist()) == ([0.1, 2.0, 1.0], [0.1, 4.0, 3.0])
    with pytest.raises(errors.InputError):
        Reference.of([[np.nan, 1.0]])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"metric": "cosine"}, errors.InputError),
        ({"metric": [1.0, -1.0]}, errors.InputError),
        ({"metric": [1.0]}, errors.InputError),
        ({"bounds": "data"}, errors.BoundsError),
        ({"bounds": {"x0": (3, 1)}}, errors.BoundsError),
        ({"bounds": {"x0": "left"}}, errors.BoundsError),
        ({"bounds": {"x0": ("a", 1)}}, errors.BoundsError),
        ({"bounds": 3}, errors.BoundsError),
        ({"bounds": {"age": (0, 1)}}, errors.ColumnError),
        ({"fixed": ["age"]}, errors.ColumnError),
        ({"fixed": [2]}, errors.ColumnError),
        ({"change": ["x0"]}, errors.ColumnError),
        ({"integers": ["x0"]}, errors.InputError),
        ({"margin": 0}, errors.InputError),
        ({"budget": 0}, errors.InputError),
        ({"to": 7}, errors.TargetError),
    ],
)
def test_wrong_questions(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        counterfactuals(centroids([0.0, 0.0], [10.0, 0.0]), [[0.5, 1.0]], **options)


def test_infinite_values_and_missing_values() -> None:
    decision = centroids([0.0, 0.0], [10.0, 0.0])
    with pytest.raises(errors.NonFiniteError):
        counterfactuals(decision, [[np.inf, 0.0]])
    names = ("x0", "x1")
    plain = Decision(decision.cells, Affine(EYE(2), np.zeros(2)), lambda x: x[:, 0].astype(int), np.arange(2), names)
    with pytest.raises(errors.NonFiniteError, match="x1"):
        counterfactuals(plain, [[0.0, np.nan]])
    # where the network fills it in, a missing value stays missing
    fill = Affine(EYE(2), np.zeros(2), forward=lambda x: np.where(np.isnan(x), 1.0, x))
    filled = Decision(
        decision.cells, fill, lambda x: decision.predict(fill.z(x)), decision.labels, ("x0", "x1"), source="imputed"
    )
    found = counterfactuals(filled, [[1.0, np.nan], [np.nan, 1.0]][:1])
    assert found.rows[0, 0] == pytest.approx(5.0, abs=1e-4)
    assert np.isnan(found.rows[0, 1])
    assert found.changed.tolist() == [[True, False]]
    with pytest.raises(UnreachableError, match="row 0"):
        counterfactuals(filled, [[np.nan, 1.0]])


def test_curved_borders_are_refused_by_name() -> None:
    curved = Decision(
        lambda k: None, Affine(EYE(1), np.zeros(1)), lambda x: np.zeros(len(x), int), np.arange(2), ("a",), source="SVC"
    )
    with pytest.raises(errors.UnsupportedEstimatorError, match="SVC has borders that are curved"):
        counterfactuals(curved, [[1.0]])


# ---------------------------------------------------------------------- borders that are hard to cross


def test_duplicate_centres_own_no_cell() -> None:
    decision = centroids([0.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 6.0])
    found = counterfactuals(decision, [[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    assert found.new.tolist() == [1, 0, 0]
    np.testing.assert_allclose(found.distance, [1.0, 1.0, 2.0], rtol=1e-5)
    with pytest.raises(UnreachableError, match="rows 0, 1 can not get label 2"):
        counterfactuals(decision, [[1.0, 0.0], [3.0, 0.0]], to=2)


def test_rows_on_a_border() -> None:
    decision = centroids([0.0, 0.0], [4.0, 0.0])
    found = counterfactuals(decision, [[2.0, 1e6], [2.0, 0.0]])
    assert found.old.tolist() == [0, 0]
    assert found.new.tolist() == [1, 1]
    # squares of a million are known to a tenth of a thousandth
    assert (found.distance < [1e-3, 1e-6]).all()
    assert (found.rows[:, 0] > 2).all()


def test_far_away_rows_and_offsets() -> None:
    mu = np.array([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]]) + 1e7
    decision = centroids(*mu)
    x = np.array([[1e7, 1e7], [1e7 + 900, 1e7], [1e7, 1e7 - 1e5]])
    for to in (None, 0, 1, 2):
        found = counterfactuals(decision, x, to=to)
        np.testing.assert_array_equal(decision.predict(found.rows), found.new)
        near = counterfactuals(centroids(*(mu - 1e7)), x - 1e7, to=to)
        np.testing.assert_allclose(found.distance, near.distance, rtol=1e-5, atol=1e-7)


def test_a_cell_thinner_than_the_margin() -> None:
    decision = centroids([0.0], [1e-7], [2e-7])
    found = counterfactuals(decision, [[1000.0]], to=1)
    assert found.new[0] == 1
    assert 0.5e-7 < found.rows[0, 0] < 1.5e-7


def test_the_margin_doubles_until_the_network_agrees() -> None:
    cells = {0: [(np.array([[-1.0]]), np.array([5.0]))], 1: [(np.array([[1.0]]), np.array([-5.0]))]}

    def decision(border: float) -> Decision:
        return Decision(
            cells.get, Affine(EYE(1), np.zeros(1)), lambda x: (x[:, 0] > border).astype(int), np.arange(2), ("age",)
        )

    exact = counterfactuals(decision(5.0), [[3.0]])
    assert exact.margin[0] == pytest.approx(2e-6)
    late = counterfactuals(decision(5.0 + 1e-3), [[3.0]])
    assert late.new[0] == 1
    assert 5 + 1e-3 < late.rows[0, 0] < 5 + 3e-3
    assert late.margin[0] == pytest.approx(late.rows[0, 0] - 5)
    wide = counterfactuals(decision(5.0), [[3.0]], margin=0.5)
    assert wide.rows[0, 0] == pytest.approx(6.0)
    with pytest.raises(UnreachableError):
        counterfactuals(decision(np.inf), [[3.0]])


def test_a_network_in_float32() -> None:
    rng = np.random.default_rng(3)
    mu = rng.normal(size=(5, 6)) + 100
    net = NeuralizedModel(CentroidHead(mu)).float()
    x = rng.normal(size=(40, 6)) + 100
    rounded = centroids(*mu, predict=lambda rows: net.predict(rows).astype(int), precision=1.2e-7)
    for decision in (rounded, decision_of(net)):
        for to in (None, 2):
            found = counterfactuals(decision, x, to=to)
            np.testing.assert_array_equal(net.predict(found.rows), found.new)
    # without a word on its precision the margin doubles many times, row by row
    alone = counterfactuals(centroids(*mu, predict=rounded.predict), x[14:15])
    assert net.predict(alone.rows)[0] == alone.new[0] != alone.old[0]


# ---------------------------------------------------------------------- unions of polytopes


def in_samples(predict: Callable[[np.ndarray], np.ndarray], found: Counterfactuals, to: int | None, seed: int) -> None:
    """No sample around a row, or between it and its answer, is nearer and has the label."""
    rng = np.random.default_rng(seed)
    for i, x in enumerate(found.data):
        if not found.distance[i]:
            continue
        step = rng.normal(size=(3000, len(x)))
        step *= found.distance[i] * rng.uniform(0, 1, size=(3000, 1)) / np.linalg.norm(step, axis=1, keepdims=True)
        labels = predict(np.vstack([x + step, x + (found.rows[i] - x) * (1 - 3e-5)]))
        assert not (labels == to).any() if to is not None else (labels == found.old[i]).all()


def test_union_of_cells_birch() -> None:
    rng = np.random.default_rng(0)
    X = np.vstack([rng.normal(size=(60, 2)) + c for c in ([0, 0], [4, 0], [0, 4], [5, 5])])
    fitted = Birch(threshold=0.6, n_clusters=3).fit(X)
    centres, owner = fitted.subcluster_centers_, fitted.subcluster_labels_
    assert len(centres) > 10

    def cells(k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        foreign = centres[owner != k]
        return [
            (2 * (c - foreign), (foreign**2).sum(1) - (c**2).sum()) for c in centres[owner == k]
        ]  # d_foreign - d_own >= 0

    decision = Decision(cells, Affine(EYE(2), np.zeros(2)), fitted.predict, np.arange(3), ("a", "b"), source="Birch")
    rows = X[::9]
    for to in (None, 0, 2):
        found = counterfactuals(decision, rows, to=to)
        np.testing.assert_array_equal(fitted.predict(found.rows), found.new)
        assert found.exact.all()
        in_samples(fitted.predict, found, to, 1)


def test_union_of_cells_nearest_neighbour() -> None:
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(40, 3)), rng.integers(0, 3, size=40)
    fitted = KNeighborsClassifier(1).fit(X, y)

    def cells(k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        foreign = X[y != k]
        return [(2 * (c - foreign), (foreign**2).sum(1) - (c**2).sum()) for c in X[y == k]]

    decision = Decision(cells, Affine(EYE(3), np.zeros(3)), fitted.predict, np.arange(3), ("a", "b", "c"))
    for to in (None, 1):
        found = counterfactuals(decision, rng.normal(size=(15, 3)), to=to)
        np.testing.assert_array_equal(fitted.predict(found.rows), found.new)
        in_samples(fitted.predict, found, to, 2)


def test_a_label_that_wins_nowhere_or_everywhere() -> None:
    everywhere = Decision(
        lambda k: [(np.zeros((0, 1)), np.zeros(0))] if k == 0 else [],
        Affine(EYE(1), np.zeros(1)),
        lambda x: np.zeros(len(x), int),
        np.arange(2),
        ("a",),
    )
    for to in (None, 1):
        with pytest.raises(UnreachableError):
            counterfactuals(everywhere, [[1.0]], to=to)
    assert counterfactuals(everywhere, [[1.0]], to=0).distance[0] == 0


# ---------------------------------------------------------------------- steps in front


def test_behind_a_pca(wine: pd.DataFrame) -> None:
    fitted = make_pipeline(StandardScaler(), PCA(4, whiten=True), KMeans(3, n_init=5, random_state=0)).fit(wine.values)
    front, mu = fitted[:-1], fitted[-1].cluster_centers_
    T = (front.transform(fitted[0].scale_ * EYE(13) + fitted[0].mean_) - front.transform(fitted[0].mean_[None])).T
    affine = Affine(T / fitted[0].scale_, front.transform(np.zeros((1, 13)))[0], forward=front.transform)

    decision = Decision(
        lambda k: pairs(mu, k),
        affine,
        fitted.predict,
        np.arange(3),
        tuple(wine.columns),
        reference=Reference.of(wine, affine),
    )
    rows = wine.to_numpy()[::15]
    for to in (None, 0):
        found = counterfactuals(decision, rows, to=to)
        np.testing.assert_array_equal(fitted.predict(found.rows), found.new)
        # nothing moves along what the network does not see
        step = (found.rows - rows) / fitted[0].scale_
        visible = np.linalg.qr(fitted[1].components_.T)[0]
        np.testing.assert_allclose(step @ visible @ visible.T, step, atol=1e-9)
    tight = counterfactuals(decision, rows, to=0, bounds="data", fixed=["alcohol"])
    np.testing.assert_array_equal(fitted.predict(tight.rows), 0)
    np.testing.assert_array_equal(tight.rows[:, 0], rows[:, 0])
    assert (tight.distance >= counterfactuals(decision, rows, to=0).distance * (1 - 1e-6)).all()


def powers(wine: pd.DataFrame, **options: Any) -> tuple[Any, Decision]:
    X = wine.to_numpy()
    fitted = make_pipeline(PowerTransformer(), KMeans(3, n_init=5, random_state=0)).fit(X)
    mu = fitted[1].cluster_centers_

    def inverse(u: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return fitted[0].inverse_transform(u)

    affine = Affine(
        EYE(13), np.zeros(13), transform=fitted[0].transform, inverse=inverse, transformed="PowerTransformer"
    )
    decision = Decision(
        lambda k: pairs(mu, k),
        affine,
        fitted.predict,
        np.arange(3),
        tuple(wine.columns),
        reference=Reference.of(X, affine),
        **options,
    )
    return fitted, decision


def test_behind_an_elementwise_step_that_is_not_affine(wine: pd.DataFrame) -> None:
    fitted, decision = powers(wine)
    rows = wine.to_numpy()[::10]
    found = counterfactuals(decision, rows)
    np.testing.assert_array_equal(fitted.predict(found.rows), found.new)
    assert "after PowerTransformer" in found.metric
    z, mu = fitted[0].transform(rows), fitted[1].cluster_centers_
    d = ((z[:, None] - mu) ** 2).sum(2)
    own = d.argmin(1)
    gaps = np.linalg.norm(mu[:, None] - mu[own], axis=2).T
    planes = np.where(gaps > 0, (d - d.min(1, keepdims=True)) / np.where(gaps > 0, 2 * gaps, 1), np.inf).min(1)
    np.testing.assert_allclose(found.distance, planes, rtol=1e-5)
    held = counterfactuals(decision, rows, to=1, bounds="data")
    np.testing.assert_array_equal(fitted.predict(held.rows), 1)
    assert (held.rows >= wine.min().to_numpy() - 1e-9).all()
    assert (held.rows <= wine.max().to_numpy() + 1e-9).all()
    whole = counterfactuals(decision, rows, to=1, bounds="data", integers=["proline", "magnesium"])
    np.testing.assert_array_equal(fitted.predict(whole.rows), 1)
    for t in (4, 12):
        np.testing.assert_array_equal(whole.rows[:, t], np.round(whole.rows[:, t]))
    assert (whole.distance >= held.distance * (1 - 1e-9)).all()


def test_a_column_that_plays_no_part_stays_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    x = rng.lognormal(size=(50, 2))
    assert (np.exp(np.log(x)) != x).any()
    affine = Affine(EYE(2), np.zeros(2), transform=np.log, inverse=np.exp, transformed="log")
    A, b = np.array([[1.0, 0.0]]), np.zeros(1)
    cells = {0: [(-A, b)], 1: [(A, b)]}
    decision = Decision(cells.get, affine, lambda x: (x[:, 0] > 1).astype(int), np.arange(2), ("a", "b"))
    for options in ({}, {"bounds": {"a": (0.01, 100.0)}, "integers": []}):
        found = counterfactuals(decision, x, **options)
        np.testing.assert_array_equal(found.rows[:, 1], x[:, 1])
        np.testing.assert_allclose(found.distance, np.abs(np.log(x[:, 0])), rtol=1e-5, atol=1e-9)
    slow = counterfactuals(decision, x, bounds={"b": "up"}, to=1 - decision.predict(x))
    np.testing.assert_array_equal(slow.rows[:, 1], x[:, 1])


def test_where_no_raw_value_leads() -> None:
    def transform(x: np.ndarray) -> np.ndarray:
        return 1 - np.exp(-x)

    def inverse(u: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return -np.log(1 - u)

    def decision(f: Callable[[np.ndarray], np.ndarray], high: Any = None) -> Decision:
        affine = Affine(EYE(1), np.zeros(1), transform=f, inverse=inverse, high=high, transformed="Saturation")
        cells = {0: [(np.array([[-1.0]]), np.array([2.0]))], 1: [(np.array([[1.0]]), np.array([-2.0]))]}
        return Decision(cells.get, affine, lambda x: (f(x)[:, 0] > 2).astype(int), np.arange(2), ("dose",))

    with pytest.raises(errors.RuleError, match=r"'dose'.*Saturation"):
        counterfactuals(decision(transform), [[1.0]])
    with pytest.raises(UnreachableError):
        counterfactuals(decision(transform, high=np.array([1.0])), [[1.0]])
    with pytest.raises(errors.RuleError, match="decreasing"):
        counterfactuals(decision(lambda x: -x), [[1.0]], bounds={"dose": (0, 9)})


def test_beyond_a_clip_values_stay_or_come_back() -> None:
    data = np.array([[0.0, 0.0], [1.0, 1.0]])
    scaler = MinMaxScaler(clip=True).fit(data)
    km = KMeans(2, init=np.array([[0.0, 0.0], [1.0, 1.0]]), n_init=1).fit(data)
    fitted = Pipeline([("scale", scaler), ("cluster", km)])
    decision = decision_of(neuralize(fitted))
    # x0 = 3 counts as 1: it may stay there for nothing, or come back from 3
    x = np.array([[3.0, 0.9], [0.9, 0.8], [-5.0, 0.3]])
    found = counterfactuals(decision, x)
    np.testing.assert_array_equal(fitted.predict(found.rows), found.new)
    # rows 0: x1 to 0 with x0 at 3 is a tie that stays in the old cluster or costs .9; row 2 needs x1 up to 1
    points = np.stack(np.meshgrid(np.linspace(-6, 4, 401), np.linspace(-3, 4, 281)), -1).reshape(-1, 2)
    for i in range(3):
        forced = nearest_by_force(fitted.predict, x[i], -1, np.ones(2), points)
        assert found.distance[i] <= forced + 1e-9
        assert forced <= found.distance[i] + 0.05


# ---------------------------------------------------------------------- categories and whole numbers


@pytest.fixture(scope="module")
def loans() -> tuple[Any, Decision, np.ndarray]:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "income": rng.normal(3000, 800, 400),
            "job": rng.choice(["none", "part", "full"], 400),
            "age": rng.integers(18, 70, 400).astype(float),
            "home": rng.choice(["own", "rent"], 400),
        }
    )
    worth = frame["income"] / 800 + 2 * (frame["job"] == "full") - (frame["home"] == "rent") + frame["age"] / 40
    y = pd.cut(worth + rng.normal(0, 0.3, 400), [-99, 4.0, 6.0, 99], labels=["no", "talk", "yes"]).astype(str)
    names = {"job": ("full", "none", "part"), "home": ("own", "rent")}

    def decode(x: np.ndarray) -> pd.DataFrame:
        out = pd.DataFrame(x, columns=list(frame.columns))
        for name, codes in names.items():
            out[name] = [codes[int(c)] for c in x[:, frame.columns.get_loc(name)]]
        return out

    columns = ColumnTransformer(
        [("n", StandardScaler(), ["income", "age"]), ("c", OneHotEncoder(sparse_output=False), ["job", "home"])]
    )
    fitted = make_pipeline(columns, LogisticRegression(max_iter=500)).fit(frame, y)
    W, c = fitted[-1].coef_, fitted[-1].intercept_
    T = np.zeros((7, 4))
    scaler = columns.fit(frame).named_transformers_["n"]
    T[0, 0], T[1, 2] = 1 / scaler.scale_

    def cells(k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rest = [j for j in range(3) if j != k]
        return [(W[k] - W[rest], c[k] - c[rest])]

    coded = frame.assign(**{name: [codes.index(v) for v in frame[name]] for name, codes in names.items()}).to_numpy(
        dtype=float
    )
    decision = Decision(
        cells,
        Affine(T, np.zeros(7), forward=lambda x: fitted[0].transform(decode(x))),
        lambda x: np.searchsorted(fitted.classes_, fitted.predict(decode(x))),
        fitted.classes_,
        tuple(frame.columns),
        categories=names,
        reference=Reference.of(coded),
        source="LogisticRegression",
        kind="class",
    )
    return fitted, decision, coded


def test_categories_stay_unless_they_may_change(loans: Any) -> None:
    _, decision, coded = loans
    rows = coded[:25]
    stay = counterfactuals(decision, rows, to="yes")
    np.testing.assert_array_equal(stay.rows[:, [1, 3]], rows[:, [1, 3]])
    job = counterfactuals(decision, rows, to="yes", change=["job"])
    np.testing.assert_array_equal(job.rows[:, 3], rows[:, 3])
    both = counterfactuals(decision, rows, to="yes", change=["job", "home"], fixed=["age"])
    np.testing.assert_array_equal(both.rows[:, 2], rows[:, 2])
    for found in (stay, job, both):
        np.testing.assert_array_equal(decision.predict(found.rows), 2)
        assert found.exact.all()
        assert "a changed category counts as 1" in found.metric
    assert (job.distance <= stay.distance + 1e-12).all()
    assert (job.distance < stay.distance - 0.1).any()
    assert (both.rows[:, 1] != rows[:, 1]).any()
    # brute force over the codes, with the closed form's projection for the rest
    spread = decision.reference.spread
    w = 1 / spread**2
    for i, x in enumerate(rows):
        if both.old[i] == "yes":
            continue
        best = np.inf
        for job_, home in itertools.product(range(3), range(2)):
            other = np.array([x[0], job_, x[2], home])
            A, b = decision.cells(2)[0]
            h = A @ decision.affine.z(other[None])[0] + b
            income = A @ decision.affine.T[:, 0]
            step = max(0.0, *(np.where(income > 0, -h / income, np.where(h >= 0, 0, np.inf))))
            cost = w[0] * step**2 + (job_ != x[1]) + (home != x[3])
            best = min(best, cost)
        assert both.distance[i] == pytest.approx(np.sqrt(best), rel=1e-5, abs=1e-6)


def test_categories_in_words(loans: Any) -> None:
    _, decision, coded = loans
    poor = coded[coded[:, 1] == 1][:40]
    found = counterfactuals(decision, poor, to="yes", change=["job"])
    moved = np.flatnonzero(found.rows[:, 1] != poor[:, 1])
    assert len(moved)
    i = int(moved[0])
    assert "job none -> full" in found.sentence(i)
    assert found.to_frame()["job"].iloc[i] == "full"
    book = found.changes()
    line = book[(book["row"] == i) & (book["column"] == "job")].iloc[0]
    assert (line["from"], line["to"]) == ("none", "full")
    assert book.groupby("row")["share"].sum().to_numpy() == pytest.approx(1.0)


def test_a_category_the_network_refuses_is_no_alternative() -> None:
    table = np.array([0.0, 4.0, np.nan])
    affine = Affine(
        np.array([[1.0, 0.0]]), np.zeros(1), forward=lambda x: x[:, :1] + table[x[:, 1].astype(int)][:, None]
    )
    cells = {0: [(np.array([[-1.0]]), np.array([5.0]))], 1: [(np.array([[1.0]]), np.array([-5.0]))]}
    decision = Decision(
        cells.get,
        affine,
        lambda x: (affine.z(x)[:, 0] > 5).astype(int),
        np.arange(2),
        ("a", "b"),
        categories={"b": ("x", "y", "z")},
    )
    found = counterfactuals(decision, [[0.0, 0.0]], change=["b"])
    np.testing.assert_allclose(found.rows, [[1.0, 1.0]], atol=1e-5)
    assert found.distance[0] == pytest.approx(np.sqrt(2), rel=1e-5)


def test_a_budget_that_ends_says_so(loans: Any) -> None:
    _, decision, coded = loans
    rows = coded[:25]
    full = counterfactuals(decision, rows, to="yes", change=["job", "home"])
    short = counterfactuals(decision, rows, to="yes", change=["job", "home"], budget=2)
    np.testing.assert_array_equal(decision.predict(short.rows), 2)
    assert (short.distance >= full.distance - 1e-9).all()
    worse = short.distance > full.distance + 1e-6
    assert worse.any()
    assert not short.exact[worse].any()
    assert "not proven nearest" in repr(short)


@pytest.mark.parametrize("seed", range(6))
def test_whole_numbers_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mu = rng.normal(size=(4, 3)) * 3
    decision = centroids(*mu)
    x = np.column_stack([rng.integers(-4, 5, size=(5, 2)), rng.normal(size=5) * 3]).astype(float)
    w = rng.uniform(0.3, 2, size=3)
    to = None if seed % 2 else 3
    found = counterfactuals(decision, x, to=to, metric=w, integers=["x0", 1])
    np.testing.assert_array_equal(decision.predict(found.rows), found.new)
    np.testing.assert_array_equal(found.rows[:, :2], np.round(found.rows[:, :2]))
    assert found.exact.all()
    for i in range(5):
        goals = [3] if to is not None else [k for k in range(4) if k != found.old[i]]
        if not found.distance[i]:
            continue
        best = np.inf
        for a, b in itertools.product(range(-25, 26), repeat=2):
            fixed = w[0] * (a - x[i, 0]) ** 2 + w[1] * (b - x[i, 1]) ** 2
            if fixed >= best:
                continue
            for k in goals:
                A, c = decision.cells(k)[0]
                try:
                    free = project([x[i, 2]], A[:, 2:], A[:, :2] @ [a, b] + c, weights=w[2:])
                except InfeasibleError:
                    continue
                best = min(best, fixed + free.distance**2)
        assert found.distance[i] == pytest.approx(np.sqrt(best), rel=1e-4, abs=1e-4)


def test_only_whole_numbers() -> None:
    decision = centroids([0.0, 0.0], [4.0, 4.0])
    found = counterfactuals(decision, [[0.0, 0.0], [1.0, 0.0]], integers=[0, 1])
    # x0 + x1 = 4 is the border itself, and a tie stays where it is
    assert found.rows.sum(1).tolist() == [5.0, 5.0]
    assert found.distance == pytest.approx([np.sqrt(13), np.sqrt(8)])
    assert found.exact.all()


def test_a_budget_of_one_still_gives_whole_numbers() -> None:
    rng = np.random.default_rng(2)
    decision = centroids(*rng.normal(size=(2, 6)) * 3)
    x = rng.integers(-3, 4, size=(20, 6)).astype(float)
    full, short = (counterfactuals(decision, x, integers=range(6), budget=n) for n in (3000, 1))
    for found in (full, short):
        np.testing.assert_array_equal(decision.predict(found.rows), found.new)
        np.testing.assert_array_equal(found.rows, np.round(found.rows))
    assert full.exact.all()
    assert not short.exact.any()
    assert (short.distance >= full.distance * (1 - 1e-12)).all()
    assert np.median(short.distance / full.distance) < 1.2


# ---------------------------------------------------------------------- reading


def test_sentences_and_frames(on_wine: Any) -> None:
    _, _, decision, X = on_wine
    frame = X.iloc[5:9].set_index(pd.Index([f"w{i}" for i in range(4)]))
    found = counterfactuals(decision, frame, to=0, fixed=[c for c in X.columns if c not in ("alcohol", "proline")])
    i = int(np.flatnonzero(found.distance > 0)[0])
    text = found.sentence(i)
    assert text.startswith(f"row w{i}: ")
    assert f": cluster 0 instead of cluster {found.old[i]} (distance " in text
    assert text.endswith("standard deviations)")
    assert "alcohol" in text
    assert "proline" in text
    out = found.to_frame(books=True)
    assert list(out.columns[:4]) == ["old", "new", "distance", "margin"]
    assert list(out.index) == list(frame.index)
    assert found.to_frame().shape == frame.shape
    assert text in repr(found)
    assert "<table>" in found._repr_html_()
    assert len(found) == 4
    unchanged = counterfactuals(decision, frame, to=found.old)
    assert unchanged.sentence(0) == f"row w0: cluster {found.old[0]} already"
    assert unchanged.changes().empty
    assert "4 rows have the label already" in repr(unchanged)


def test_the_words_of_outliers() -> None:
    cells = {0: [(np.array([[1.0]]), np.array([-5.0]))], 1: [(np.array([[-1.0]]), np.array([5.0]))]}
    decision = Decision(
        cells.get,
        Affine(EYE(1), np.zeros(1)),
        lambda x: (x[:, 0] < 5).astype(int),
        np.array([-1, 1]),
        ("dose",),
        kind="outlier",
    )
    found = counterfactuals(decision, [[12_000.0]])
    assert found.sentence(0) == "row 0: dose 12,000 -> 5: inlier instead of outlier (distance 12,000 raw units)"
