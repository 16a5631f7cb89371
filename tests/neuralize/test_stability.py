"""Stability: counts against a loop that tries every matching, and what happens where clusters vanish."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.cluster import AgglomerativeClustering, KMeans, MeanShift
from sklearn.compose import make_column_transformer
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, SVR, OneClassSVM

from lrp import errors
from neuralize import neuralize
from neuralize._tally import quantile, ranks_of, signs_of
from neuralize.explanation import CoverageWarning
from neuralize.stability import Stability, stability


def pipe(k: int = 3) -> Any:
    return make_pipeline(StandardScaler(), KMeans(k, n_init=1, random_state=0))


def spawned(seed: int, r: int, n: int, size: int, replace: bool) -> tuple[np.ndarray, int]:
    """The rows and the random state that a refit is promised."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(r,)))
    return rng.choice(n, size, replace=replace), int(rng.integers(2**31))


def slow_rank(row: np.ndarray, t: int) -> int:
    small = 1e-12 * sum(abs(v) for v in row)
    return len(row) if abs(row[t]) <= small else 1 + sum(abs(v) > abs(row[t]) for v in row)


def slow_sign(row: np.ndarray, t: int) -> int:
    return 0 if abs(row[t]) <= 1e-12 * sum(abs(v) for v in row) else (1 if row[t] > 0 else -1)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def matching(before: np.ndarray, after: np.ndarray, k: int) -> tuple[int, ...]:
    """The best of all matchings: most rows in common, then the most similar."""

    def worth(p: tuple[int, ...]) -> tuple[int, float]:
        pairs = [(before == a, after == b) for a, b in enumerate(p)]
        return sum(int((a & b).sum()) for a, b in pairs), round(sum(similarity(a, b) for a, b in pairs), 9)

    return max(itertools.permutations(range(k)), key=worth)


# ------------------------------------------------------------------ numbers


@pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")  # of rows that moved
@pytest.mark.parametrize("contrast", [False, True])
def test_counts_equal_the_loop(wine: pd.DataFrame, contrast: bool) -> None:
    k, refits, top = 5, 4, 2
    fitted = pipe(k).fit(wine)
    rows = wine[::9]
    question = {"target": 0, "contrast": 3} if contrast else {}
    found = stability(fitted, wine, rows=rows, refits=refits, sample=0.6, seed=7, top=top, **question)
    ex = neuralize(fitted, wine).explain(rows, **question)
    np.testing.assert_array_equal(found.original.values, ex.values)
    n, d = ex.values.shape
    same, first, counted, stay = np.zeros((n, d)), np.zeros((n, d)), np.zeros(n), np.zeros(n)
    before = fitted.predict(wine)
    for r in range(refits):
        drawn, state = spawned(7, r, len(wine), round(0.6 * len(wine)), replace=False)
        again = clone(fitted).set_params(kmeans__random_state=state).fit(wine.iloc[drawn])
        after = again.predict(wine)
        common = np.array([[((before == a) & (after == b)).sum() for b in range(k)] for a in range(k)])
        best = matching(before, after, k)
        net = neuralize(again, wine.iloc[drawn])
        assert found.agreement[r] == pytest.approx(adjusted_rand_score(before, after))
        for i in range(n):
            c = int(ex.target[i])
            asked = {"target": best[c]} | ({"contrast": best[3]} if contrast else {})
            if common[c, best[c]] == 0 or (contrast and common[3, best[3]] == 0):
                assert (found.ranks[r, i] == 0).all()
                continue
            other = net.explain(rows.iloc[i : i + 1], **asked)
            counted[i] += 1
            stay[i] += best[int(ex.decided[i])] == other.decided[0]
            for t in range(d):
                same[i, t] += slow_sign(other.values[0], t) == slow_sign(ex.values[i], t)
                rank = slow_rank(other.values[0], t)
                first[i, t] += rank <= top
                assert found.ranks[r, i, t] == rank
    np.testing.assert_array_equal(found.counted, counted)
    np.testing.assert_allclose(found.same_sign, same / counted[:, None])
    np.testing.assert_allclose(found.in_top, first / counted[:, None])
    np.testing.assert_allclose(found.kept, stay / counted)
    assert 0.2 < found.same_sign.mean() < 1  # neither all nor nothing: the loop says something
    assert found.agreement.max() < 1


def test_summaries_equal_the_loop(wine: pd.DataFrame) -> None:
    fitted = pipe(4).fit(wine)
    found = stability(fitted, wine, refits=9, seed=1)
    ex = neuralize(fitted, wine).explain(wine)
    frame = found.to_frame(level=0.8)
    assert len(frame) == 178 * 13
    line = frame.iloc[13 * 50 + 4]
    ranks = sorted(found.ranks[:, 50, 4].tolist())
    assert (line["row"], line.feature, line.value) == (50, "magnesium", ex.values[50, 4])
    assert line["rank"] == slow_rank(ex.values[50], 4)
    # 9 refits: a tenth is the first, nine tenths the ninth
    assert (line.low, line["median"], line.high) == (ranks[0], ranks[4], ranks[8])
    clusters = found.by_cluster()
    means = []
    for r in range(9):
        drawn, state = spawned(1, r, 178, 178, replace=True)
        again = clone(fitted).set_params(kmeans__random_state=state).fit(wine.iloc[drawn])
        before, after = fitted.predict(wine), again.predict(wine)
        best = matching(before, after, 4)
        other = neuralize(again, wine.iloc[drawn]).explain(wine[before == 2], target=best[2])
        means.append((other.values.mean(0), np.abs(other.values).mean(0)))
    R = ex.values[ex.target == 2]
    for t, name in enumerate(ex.feature_names):
        line = clusters.loc[(2, name)]
        assert line["mean"] == pytest.approx(R[:, t].mean())
        assert line["rank"] == slow_rank(np.abs(R).mean(0), t)
        assert line["same_sign"] == np.mean([slow_sign(m, t) == slow_sign(R.mean(0), t) for m, _ in means])
        ranks = [slow_rank(size, t) for _, size in means]
        assert line["in_top"] == np.mean([rank <= 3 for rank in ranks])
        assert (line["low"], line["median"], line["high"]) == (min(ranks), sorted(ranks)[4], max(ranks))
        assert line["counted"] == 9


def test_jaccard_and_dissolved(wine: pd.DataFrame) -> None:
    fitted = pipe(6).fit(wine)
    found = stability(fitted, wine, refits=3, seed=2)
    before = fitted.predict(wine)
    total, dissolved, vanished = np.zeros(6), np.zeros(6), np.zeros(6)
    for r in range(3):
        drawn, state = spawned(2, r, 178, 178, replace=True)
        after = clone(fitted).set_params(kmeans__random_state=state).fit(wine.iloc[drawn]).predict(wine)
        for c, b in enumerate(matching(before, after, 6)):
            jaccard = similarity(before == c, after == b)
            total[c] += jaccard
            dissolved[c] += jaccard <= 0.5
            vanished[c] += not ((before == c) & (after == b)).any()
    np.testing.assert_allclose(found.clusters["jaccard"], total / 3)
    assert found.clusters["dissolved"].tolist() == dissolved.tolist()
    assert found.clusters["vanished"].tolist() == vanished.tolist()
    assert found.clusters["rows"].tolist() == np.bincount(before, minlength=6).tolist()
    assert dissolved.sum() > 0


def test_signs_ranks_and_quantiles() -> None:
    values = np.array([[3.0, -3.0, 0.0, 1e-13, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert signs_of(values).tolist() == [[1, -1, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert ranks_of(values).tolist() == [[1, 1, 5, 5, 3], [5, 5, 5, 5, 5]]
    # refits in which a row is not counted are left out
    ranks = np.array([[[4]], [[0]], [[1]], [[2]]], dtype=np.uint8)
    assert [quantile(ranks, q)[0, 0] for q in (0, 1 / 3, 0.34, 2 / 3, 1)] == [1, 1, 2, 2, 4]
    assert math.isnan(quantile(np.zeros((3, 1, 1), dtype=np.uint8), 0.5)[0, 0])
    many = np.arange(1, 21, dtype=np.uint8).reshape(20, 1, 1)
    assert [quantile(many, q)[0, 0] for q in (0.05, 0.5, 0.95)] == [1, 10, 19]


# ------------------------------------------------------------------ meaning


def test_columns_that_make_the_clusters_hold_and_noise_does_not() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 6))
    X[40:80, 2] += 8
    X[80:, 5] += 8
    found = stability(KMeans(3, n_init=3, random_state=0).fit(X), X, refits=12, top=2)
    np.testing.assert_array_equal(found.agreement, 1)
    informed, noise = [2, 5], [0, 1, 3, 4]
    clusters = found.by_cluster()["same_sign"].unstack()
    assert (found.same_sign[:, informed].mean(0) > 0.95).all()
    assert (found.same_sign[:, noise].mean(0) < 0.9).all()
    assert (clusters[["x2", "x5"]].min() == 1).all()
    # a cluster has one informed column of its own for sure: it is among the first two in every refit
    assert (found.by_cluster()["in_top"].unstack()[["x2", "x5"]].max(axis=1) == 1).all()
    text = repr(found)
    assert "adjusted Rand index 1.00 on average" in text
    assert "vanished" not in text
    assert "dissolved" not in text


def test_refits_are_deterministic_and_leave_the_estimator_alone(wine: pd.DataFrame) -> None:
    fitted = make_pipeline(StandardScaler(), KMeans(4, n_init=1)).fit(wine)
    centres = fitted[-1].cluster_centers_.copy()
    one = stability(fitted, wine, refits=3)
    np.random.seed(9)  # noqa: NPY002  what happens outside must not matter
    two = stability(fitted, wine, refits=3)
    pd.testing.assert_frame_equal(one.to_frame(), two.to_frame())
    np.testing.assert_array_equal(one.agreement, two.agreement)
    assert (stability(fitted, wine, refits=3, seed=1).agreement != one.agreement).any()
    np.testing.assert_array_equal(fitted[-1].cluster_centers_, centres)
    assert fitted[-1].random_state is None
    # not fitted: the original is drawn from the seed as well
    bare = make_pipeline(StandardScaler(), KMeans(4, n_init=1))
    first, second = stability(bare, wine, refits=2), stability(bare, wine, refits=2)
    np.testing.assert_array_equal(first.original.values, second.original.values)
    assert not hasattr(bare[-1], "cluster_centers_")
    # the first refits are the same however many follow
    np.testing.assert_array_equal(stability(fitted, wine, refits=2).agreement, one.agreement[:2])


def test_the_start_alone(wine: pd.DataFrame) -> None:
    calm = stability(make_pipeline(StandardScaler(), KMeans(3, n_init=20)), wine, sample=1.0, refits=3)
    wild = stability(make_pipeline(StandardScaler(), KMeans(12, n_init=1)), wine, sample=1.0, refits=3)
    assert calm.agreement.min() > 0.98
    assert wild.agreement.max() < 0.9
    assert "each on all 178 rows" in repr(calm)


def test_labels_of_another_order_do_not_matter() -> None:
    """Cluster numbers are arbitrary: a refit that swaps them is no change."""
    rng = np.random.default_rng(0)
    X = np.vstack([rng.normal(size=(30, 2)) + c for c in ([0, 0], [9, 0], [0, 9])])
    found = stability(KMeans(3, n_init=2, random_state=0).fit(X), X, refits=10)
    orders = set()
    for r in range(10):
        drawn, state = spawned(0, r, 90, 90, replace=True)
        orders.add(tuple(KMeans(3, n_init=2, random_state=state).fit(X[drawn]).predict(X[[0, 30, 60]]).tolist()))
    assert len(orders) > 1
    np.testing.assert_array_equal(found.agreement, 1)
    np.testing.assert_array_equal(found.kept, 1)


# ------------------------------------------------------------------ clusters that vanish, refits that fail


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    """Two clusters of 60, and one of two rows, which half a sample often leaves out."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(122, 3))
    X[60:120, 0] += 12
    X[120:, 1] += 40
    return X


def test_rows_of_a_vanished_cluster_are_not_counted(blobs: np.ndarray) -> None:
    fitted = MeanShift(bandwidth=6).fit(blobs)
    small = int(fitted.predict(blobs[120:])[0])
    found = stability(fitted, blobs, refits=12, sample=0.3)
    there = []
    for r in range(12):
        drawn, _ = spawned(0, r, 122, 37, replace=False)
        there.append(bool((drawn >= 120).any()))
    assert 0 < sum(there) < 12
    assert found.clusters["vanished"][small] == 12 - sum(there)
    assert found.clusters["vanished"].drop(small).eq(0).all()
    assert (found.counted[120:] == sum(there)).all()
    assert (found.counted[:120] == 12).all()
    assert ((found.ranks[:, 121] > 0).any(1) == there).all()
    # rows count where they are counted: x1 sets the two apart in each of these refits
    assert (found.same_sign[120:, 1] == 1).all()
    assert found.by_cluster().loc[(small, "x1"), "counted"] == sum(there)
    assert f"{small} in {12 - sum(there)} refits; their rows are not counted there" in repr(found)
    # as a contrast, it takes everyone's rows with it
    other = int(fitted.predict(blobs[:1])[0])
    rival = stability(fitted, blobs, rows=blobs[:5], refits=12, sample=0.3, target=other, contrast=small)
    assert (rival.counted == sum(there)).all()


def test_a_row_that_is_never_counted() -> None:
    rng = np.random.default_rng(0)
    X = np.r_[rng.normal(size=(50, 2)), rng.normal((12, 0), size=(50, 2)), [[0, 99.0]]]
    fitted = MeanShift(bandwidth=5).fit(X)
    refits = [r for r in range(40) if (spawned(r, 0, 101, 50, replace=False)[0] != 100).all()]
    found = stability(fitted, X, refits=1, sample=0.5, seed=refits[0])
    assert found.counted[-1] == 0
    assert np.isnan(found.same_sign[-1]).all()
    assert np.isnan(found.in_top[-1]).all()
    assert math.isnan(found.kept[-1])
    assert np.isnan(found.rank_quantile(0.5)[-1]).all()
    assert "never counted" in repr(found)
    assert np.isfinite(found.same_sign[:-1]).all()


def test_failed_refits_are_told_and_not_counted(blobs: np.ndarray) -> None:
    X = blobs[np.r_[0:60, 120:122]]
    fitted = MeanShift(bandwidth=6).fit(X)
    found = stability(fitted, X, refits=10, sample=0.5)
    # without the two rows there is one cluster only
    alone = [r for r in range(10) if (spawned(0, r, 62, 31, replace=False)[0] < 60).all()]
    assert 0 < len(alone) < 10
    assert sorted(found.failed) == alone
    assert (found.counted == 10 - len(alone)).all()
    assert np.isnan(found.agreement[alone]).all()
    assert np.isfinite(np.delete(found.agreement, alone)).all()
    assert f"{len(alone)} of 10: ConvergenceError" in repr(found)
    with pytest.raises(errors.UnsupportedEstimatorError, match="no refit succeeded"):
        stability(fitted, X[:60], rows=X, refits=2)


# ------------------------------------------------------------------ models and tables


def test_classes_are_matched_by_name(wine: pd.DataFrame) -> None:
    y = np.repeat(["b", "c", "a"], [59, 71, 48])
    svc = make_pipeline(StandardScaler(), SVC(gamma=0.02))
    found = stability(svc, wine, y, refits=4, sample=0.5, rule="undivided")
    net = neuralize(clone(svc).fit(wine, y), wine)
    before = net.explain(wine, rule="undivided")
    for r in range(4):
        drawn, _ = spawned(0, r, 178, 89, replace=False)
        again = neuralize(clone(svc).fit(wine.iloc[drawn], y[drawn]), wine.iloc[drawn])
        values = again.explain(wine, target=before.target, rule="undivided").values
        np.testing.assert_array_equal(found.ranks[r], ranks_of(values))
    assert found.clusters.index.tolist() == ["a", "b", "c"]
    # a class that a sample lacks has vanished
    few = np.where(np.arange(178) == 177, "z", y)
    lost = stability(svc, wine, few, refits=6, sample=0.5)
    absent = [177 not in spawned(0, r, 178, 89, replace=False)[0] for r in range(6)]
    assert 0 < sum(absent) < 6
    assert lost.clusters["vanished"]["z"] == sum(absent)


@pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
@pytest.mark.parametrize("model", [KernelDensity(bandwidth=0.8), SVR()], ids=["density", "regression"])
def test_single_outputs(wine: pd.DataFrame, model: Any) -> None:
    estimator = make_pipeline(StandardScaler(), model)
    found = stability(estimator, wine, wine["hue"], rows=wine[::20], refits=3, sample=0.5)
    assert (found.counted == 3).all()
    assert np.isnan(found.agreement).all()
    assert np.isnan(found.kept).all()
    assert "Rand" not in repr(found)
    drawn, _ = spawned(0, 2, 178, 89, replace=False)
    again = neuralize(clone(estimator).fit(wine.iloc[drawn], wine["hue"].iloc[drawn]), wine.iloc[drawn])
    np.testing.assert_array_equal(found.ranks[2], ranks_of(again.explain(wine[::20]).values))


def test_mixtures_and_the_divided_rule(wine: pd.DataFrame) -> None:
    mixture = make_pipeline(StandardScaler(), GaussianMixture(3, covariance_type="diag", random_state=0))
    assert stability(mixture, wine, refits=2).agreement.mean() > 0.6
    # rows that move have no divided explanation: refits fall back
    divided = stability(pipe(5).fit(wine), wine, refits=3, rule="divided")
    assert divided.kept.min() < 1
    assert divided.original.divided.all()
    auto = stability(pipe(5).fit(wine), wine, refits=3)
    np.testing.assert_array_equal(divided.ranks, auto.ranks)


def test_tables_of_every_kind(wine: pd.DataFrame) -> None:
    named = wine.set_axis([f"bottle {i}" for i in range(178)])
    framed = stability(pipe(), named, rows=named[:4], refits=2)
    assert framed.to_frame()["row"].unique().tolist() == ["bottle 0", "bottle 1", "bottle 2", "bottle 3"]
    plain = stability(pipe(), wine.to_numpy(), rows=wine.to_numpy()[:4], refits=2)
    np.testing.assert_array_equal(framed.ranks, plain.ranks)
    assert plain.to_frame()["feature"][0] == "x0"
    sparse = stability(
        KMeans(3, n_init=1, random_state=0), scipy.sparse.csr_array(wine.to_numpy()), refits=2, sample=0.5
    )
    assert sparse.ranks.shape == (2, 178, 13)
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"colour": rng.choice(["red", "green", "blue"], 90), "size": rng.normal(size=90)})
    encode = make_column_transformer((OneHotEncoder(), ["colour"]), (StandardScaler(), ["size"]))
    coded = stability(make_pipeline(encode, KMeans(3, n_init=1, random_state=0)), X, refits=3)
    assert coded.original.feature_names == ("colour", "size")
    assert not coded.failed


def test_a_category_that_a_refit_has_not_seen_is_told() -> None:
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"colour": ["pink", *rng.choice(["red", "blue"], 59)], "size": rng.normal(size=60)})
    encode = make_column_transformer((OneHotEncoder(), ["colour"]), (StandardScaler(), ["size"]))
    found = stability(make_pipeline(encode, KMeans(2, n_init=1, random_state=0)), X, refits=6, sample=0.5)
    absent = [r for r in range(6) if 0 not in spawned(0, r, 60, 30, replace=False)[0]]
    assert 0 < len(absent) < 6
    assert sorted(found.failed) == absent
    assert all("has not seen" in reason for reason in found.failed.values())


def test_the_original_warns_once_and_refits_are_silent(wine: pd.DataFrame) -> None:
    estimator = make_pipeline(StandardScaler(), OneClassSVM(gamma=0.05, nu=0.2))
    with pytest.warns(CoverageWarning) as caught:
        stability(estimator, wine, refits=2)
    assert len(caught) == 1


# ------------------------------------------------------------------ wrong use


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"refits": 0}, "refits"),
        ({"refits": 2.5}, "refits"),
        ({"seed": -1}, "seed"),
        ({"top": True}, "top"),
        ({"sample": "jackknife"}, "sample"),
        ({"sample": 1.5}, "sample"),
        ({"sample": 0.0}, "sample"),
    ],
)
def test_numbers_that_make_no_sense(wine: pd.DataFrame, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.InputError, match=says):
        stability(pipe(), wine, **changed)


def test_what_can_not_be_refitted_or_asked(wine: pd.DataFrame) -> None:
    for wrong in (KMeans, neuralize, FrozenEstimator(pipe().fit(wine))):
        with pytest.raises(errors.UnsupportedEstimatorError, match="can not be fitted again"):
            stability(wrong, wine)
    with pytest.raises(errors.UnsupportedEstimatorError, match="no predict"):
        stability(AgglomerativeClustering(3), wine)
    with pytest.raises(errors.TargetError):
        stability(pipe(), wine, target=8)
    with pytest.raises(errors.RuleError):
        stability(pipe(), wine, rule="bisected")
    with pytest.raises(errors.InputError, match="no rows to explain"):
        stability(pipe(), wine, rows=wine[:0])
    found: Stability = stability(pipe(), wine, refits=1)
    for wrong in (0.0, 1.0, 90):
        with pytest.raises(errors.InputError, match="share of the refits"):
            found.to_frame(level=wrong)
    with pytest.raises(errors.InputError, match="quantile"):
        found.rank_quantile(95)
