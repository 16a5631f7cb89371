"""Refits without columns, and the errors of everything that flips."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import AgglomerativeClustering, KMeans, MeanShift
from sklearn.compose import make_column_transformer
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from lrp import errors
from neuralize import neuralize
from neuralize.evaluation import Mean, compare, flip, gradient, refit_after_removal, srg

# ------------------------------------------------------------------ refits


@pytest.fixture(scope="module")
def informed() -> tuple[np.ndarray, np.ndarray]:
    """Three clusters that columns 2 and 5 tell apart, among four that know nothing."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 40)
    X = rng.normal(size=(120, 6))
    X[:, 2] += 8 * (y == 1)
    X[:, 5] += 8 * (y == 2)
    return X, y


def test_removing_what_matters(informed: Any) -> None:
    X, y = informed
    fitted = KMeans(3, n_init=2, random_state=9).fit(X)
    assert adjusted_rand_score(fitted.labels_, y) == 1
    state = {k: v for k, v in vars(fitted).items() if not isinstance(v, np.ndarray)}
    table = refit_after_removal(fitted, X, neuralize(fitted).explain(X), fractions=[1 / 3, 0.6], seeds=range(4))
    assert table.attrs["ranking"][:2] in (["x2", "x5"], ["x5", "x2"])
    assert table.order.tolist() == ["none", "most", "least", "random", "most", "least", "random"]
    assert table.removed.tolist() == [0, 2, 2, 2, 4, 4, 4]
    ari = table.set_index(["order", "removed"]).ari
    assert ari["none", 0] > 0.95
    assert ari["least", 4] > 0.95
    assert ari["most", 2] < 0.1
    assert ari["most", 2] < ari["random", 2] < ari["least", 2]
    assert {k: v for k, v in vars(fitted).items() if not isinstance(v, np.ndarray)} == state
    again = refit_after_removal(fitted, X, neuralize(fitted).explain(X), fractions=[1 / 3, 0.6], seeds=range(4))
    pd.testing.assert_frame_equal(table, again)


def test_refits_equal_the_loop(informed: Any) -> None:
    X, _ = informed
    pipe = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=1)).fit(X)
    R = np.tile([0.1, -5.0, 3.0, 0.2, 0.3, 2.0], (120, 1))
    for by, most in (("magnitude", [1, 2, 5]), ("mean", [2, 5, 4])):
        table = refit_after_removal(pipe, X, R, fractions=[0.5], seeds=[3, 8], by=by)
        kept = [t for t in range(6) if t not in most]
        expected = [
            adjusted_rand_score(
                pipe.predict(X),
                KMeans(3, n_init=1, random_state=s).fit_predict(StandardScaler().fit_transform(X[:, kept])),
            )
            for s in (3, 8)
        ]
        line = table[table.order == "most"].iloc[0]
        assert math.isclose(line.ari, np.mean(expected), abs_tol=1e-12)
        assert math.isclose(line.sd, np.std(expected, ddof=1), abs_tol=1e-12)
        assert math.isclose(line.se, line.sd / math.sqrt(2), abs_tol=1e-12)
    drop, constant = (refit_after_removal(pipe, X, R, fractions=[0.5], seeds=[3, 8], how=h) for h in HOWS)
    np.testing.assert_allclose(drop.ari, constant.ari)


HOWS = ("drop", "constant")


def test_other_estimators_and_frames(informed: Any) -> None:
    X, y = informed
    frame = pd.DataFrame(X, columns=list("abcdef"))
    R = np.tile([0.0, 0.0, 2.0, 0.0, 0.0, 1.0], (120, 1))
    options: dict[str, Any] = {"fractions": [0.5], "seeds": [0]}
    for fitted in (AgglomerativeClustering(3).fit(frame), MeanShift(bandwidth=4.0).fit(frame)):
        table = refit_after_removal(fitted, frame, pd.DataFrame(R, columns=frame.columns), **options)
        assert table.ari[0] == 1
        assert np.isnan(table.se).all()
    # without its own random_state a fit is repeated exactly: the start makes no noise
    assert (refit_after_removal(AgglomerativeClustering(3), X, R, labels=y, seeds=[0, 1]).sd[:1] == 0).all()
    mixture = GaussianMixture(3, random_state=0).fit(frame)
    assert refit_after_removal(mixture, frame, R, **options).ari[2] > 0.9
    named = make_pipeline(
        make_column_transformer((StandardScaler(), ["a", "b"]), remainder="passthrough"), KMeans(3, random_state=0)
    ).fit(frame)
    assert refit_after_removal(named, frame, R, how="constant", **options).ari[2] > 0.9
    with pytest.raises(errors.UnsupportedEstimatorError, match="how='constant'"):
        refit_after_removal(named, frame, R, **options)
    with pytest.raises(errors.NotFittedError, match="labels"):
        refit_after_removal(AgglomerativeClustering(3), X, R)
    with pytest.raises(errors.NotFittedError):
        refit_after_removal(KMeans(3), X, R)
    for options in ({"fractions": [0.0]}, {"fractions": []}, {"seeds": []}, {"seeds": [-1]}, {"labels": [1]}):
        with pytest.raises(errors.InputError):
            refit_after_removal(mixture, frame, R, **options)
    with pytest.raises(errors.UnsupportedEstimatorError, match="estimator the network was made from"):
        refit_after_removal(neuralize(KMeans(2, n_init=1).fit(X)), X, R)
    with pytest.raises(errors.InputError, match="one column"):
        refit_after_removal(KMeans(2).fit(X[:, :1]), X[:, :1], X[:, :1])
    with pytest.raises(errors.RuleError, match="ranking"):
        refit_after_removal(mixture, frame, R, by="max")
    with pytest.raises(errors.RuleError, match="removal"):
        refit_after_removal(mixture, frame, R, how="shuffle")


# ------------------------------------------------------------------ errors of flipping


def total(X: Any) -> np.ndarray:
    return np.asarray(X).sum(1)


X = np.arange(12.0).reshape(4, 3)
FRAME = pd.DataFrame(X, columns=["a", "b", "c"])
NAN = np.where(X == 4, np.nan, X)
BAD: dict[str, tuple[Any, type[errors.LRPError], str]] = {
    "fewer relevances": (lambda: srg(total, X, X[:3], imputer="mean"), errors.InputError, "(4, 3)"),
    "NaN in X": (lambda: srg(total, NAN, X, imputer="mean"), errors.NonFiniteError, "row 1 on, in column 'x1'"),
    "NaN in values": (lambda: srg(total, FRAME, NAN, imputer="mean"), errors.NonFiniteError, "column 'b'"),
    "words": (lambda: srg(total, FRAME.assign(b="red"), X, imputer="mean"), errors.InputError, "net.encode"),
    "one row as a vector": (lambda: srg(total, X[0], X[0], imputer="mean"), errors.InputError, "reshape(1, -1)"),
    "masked": (
        lambda: srg(total, np.ma.masked_greater(X, 5), X, imputer="mean"),
        errors.NonFiniteError,
        "6 masked",
    ),
    "objects": (lambda: srg(total, X.astype(object), X, imputer="mean"), errors.InputError, "dtype object"),
    "numbers written as words": (
        lambda: srg(total, FRAME.assign(b="1.5"), X, imputer="mean"),
        errors.InputError,
        "'b' (str)",
    ),
    "missing in a nullable column": (
        lambda: srg(total, FRAME.assign(b=pd.array([1, None, 2, 3], dtype="Int64")), X, imputer="mean"),
        errors.NonFiniteError,
        "column 'b'",
    ),
    "no rows": (lambda: srg(total, X[:0], X[:0], imputer="mean"), errors.InputError, "at least one row"),
    "ragged": (lambda: srg(total, [[1.0], [1.0, 2.0]], X, imputer="mean"), errors.InputError, "same length"),
    "complex": (lambda: srg(total, X + 1j, X, imputer="mean"), errors.InputError, "complex"),
    "columns in another order": (
        lambda: srg(total, FRAME, FRAME[["b", "a", "c"]], imputer="mean"),
        errors.ColumnError,
        "a, b, c",
    ),
    "reference in another order": (
        lambda: srg(total, FRAME, X, imputer="mean", reference=FRAME[["b", "a", "c"]]),
        errors.ColumnError,
        "reference",
    ),
    "narrow reference": (lambda: srg(total, X, X, imputer="mean", reference=X[:, :2]), errors.InputError, "3 columns"),
    "nothing to draw from": (lambda: srg(total, X[:1], X[:1], imputer="mean"), errors.InputError, "pass reference="),
    "unknown imputer": (lambda: srg(total, X, X, imputer="median"), errors.RuleError, "'marginal'"),
    "imputer class": (lambda: srg(total, X, X, imputer=Mean), errors.RuleError, "can not impute"),
    "no labeller": (lambda: srg(total, X, X, imputer="other"), errors.RuleError, "OtherCluster(fitted)"),
    "unknown order": (lambda: flip(total, X, X, imputer="mean", order="MIF"), errors.RuleError, "'least'"),
    "unknown normalise": (lambda: srg(total, X, X, imputer="mean", normalise="max"), errors.RuleError, "'row'"),
    "unknown spacing": (lambda: srg(total, X, X, imputer="mean", spacing="log"), errors.RuleError, "'index'"),
    "steps of 0": (lambda: srg(total, X, X, imputer="mean", steps=0), errors.InputError, "steps"),
    "steps beyond": (lambda: srg(total, X, X, imputer="mean", steps=[1, 4]), errors.InputError, "from 1 to 3"),
    "only step 0": (lambda: srg(total, X, X, imputer="mean", steps=[0]), errors.InputError, "from 1 to 3"),
    "no draws": (lambda: srg(total, X, X, imputer="mean", draws=0), errors.InputError, "draws"),
    "seed": (lambda: srg(total, X, X, imputer="mean", seed=None), errors.InputError, "seed"),
    "batch": (lambda: srg(total, X, X, imputer="mean", batch_size=0), errors.InputError, "batch_size"),
    "sign": (lambda: srg(total, X, X, imputer="mean", sign=[1, 0, 1, 1]), errors.InputError, "sign"),
    "no score": (lambda: srg(KMeans(2), X, X, imputer="mean"), errors.InputError, "decision_function"),
    "score of words": (lambda: srg(lambda X: ["a"] * 4, X, X, imputer="mean"), errors.OutputError, "numbers"),
    "score of another length": (lambda: srg(lambda X: [1.0], X, X, imputer="mean"), errors.OutputError, "(4,)"),
    "score of NaN": (lambda: srg(lambda X: X[:, 0] * np.nan, X, X, imputer="mean"), errors.NonFiniteError, "4 rows"),
    "score that changes": (
        lambda: srg(lambda X: total(X) if len(X) == 4 else np.asarray(X), X, X, imputer="mean", batch_size=1),
        errors.OutputError,
        "than before",
    ),
    "start of 0": (lambda: srg(lambda X: total(X) * 0, X, X, imputer="mean"), errors.InputError, "starts at 0"),
    "one start of 0": (
        lambda: srg(lambda X: X[:, 0], X, X, imputer="mean", normalise="row"),
        errors.InputError,
        "0 in 1 of 4 rows",
    ),
    "target without columns": (lambda: srg(total, X, X, imputer="mean", target=1), errors.TargetError, "target=None"),
    "target beyond": (lambda: srg(np.asarray, X, X, imputer="mean", target=3), errors.TargetError, "from 0 to 2"),
    "target by name": (lambda: srg(np.asarray, X, X, imputer="mean", target="a"), errors.TargetError, "positions"),
    "methods without names": (lambda: compare([X], total, X), errors.InputError, "mapping"),
    "no seeds": (lambda: compare({}, total, X, seeds=[]), errors.InputError, "seed"),
    "no imputers": (lambda: compare({}, total, X, imputers=[]), errors.InputError, "imputer"),
    "imputers twice": (
        lambda: compare({}, total, X, imputers=[Mean(), Mean(), Mean()]),
        errors.InputError,
        "same name",
    ),
    "relevances by name": (lambda: compare({"mine": X[:2]}, total, X), errors.InputError, "methods['mine']"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_teach(name: str) -> None:
    call, kind, words = BAD[name]
    with pytest.raises(kind) as info:
        call()
    assert info.value.expected
    assert info.value.got
    assert info.value.fix
    assert words in str(info.value), str(info.value)


def test_errors_of_networks(wine: pd.DataFrame) -> None:
    fitted = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(wine)
    net = neuralize(fitted)
    e = net.explain(wine)
    with pytest.raises(errors.RuleError, match="duel"):
        srg(net, wine, net.explain(wine, target=0, contrast=1), imputer="mean")
    with pytest.raises(errors.TargetError, match="does not exist"):
        srg(net, wine, e, imputer="mean", target=7)
    with pytest.raises(errors.TargetError, match="different targets"):
        compare({"own": e, "first": net.explain(wine, target=0)}, net, wine, imputers="mean")
    with pytest.raises(errors.ColumnError):
        srg(net, wine[wine.columns[::-1]], e.values, imputer="mean")
    with pytest.raises(errors.ColumnError):
        gradient(net, wine[wine.columns[::-1]])
    with pytest.raises(errors.ColumnError):
        srg(net, wine.iloc[:, :5], e.values[:, :5], imputer="mean")


def test_scores_of_labels_and_single_columns(wine: pd.DataFrame) -> None:
    """Any callable will do: labels as numbers, one column of many, one column alone."""
    Z = StandardScaler().fit_transform(wine)
    svc = SVC().fit(Z, np.where(Z[:, 0] > 0, 1, -1))
    a = flip(svc.predict, Z, Z, imputer="marginal", sign="score", draws=5)
    assert (a.start == 1).all()
    assert (np.abs(a.scores) <= 1).all()
    column = flip(lambda X: svc.decision_function(X)[:, None], Z, Z, imputer="mean")
    np.testing.assert_array_equal(column.start, svc.decision_function(Z))
