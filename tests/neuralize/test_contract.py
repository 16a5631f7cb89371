"""One battery for every converter: a new one joins by adding its two factories to CASES."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import datasets
from sklearn.cluster import KMeans
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler

from neuralize import Explanation, neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


def _table(name: str) -> Callable[[], np.ndarray]:
    return lambda: np.array(getattr(datasets, f"load_{name}")().data[:600], dtype=np.float64)


def _kmeans(k: int, *steps: Any) -> Callable[[np.ndarray], Any]:
    def fit(X: np.ndarray) -> Any:
        clusterer = KMeans(k, n_init=1, random_state=0)
        return (make_pipeline(*copy.deepcopy(steps), clusterer) if steps else clusterer).fit(X)

    return fit


CASES: dict[str, tuple[Callable[[np.ndarray], Any], Callable[[], np.ndarray]]] = {
    "wine": (_kmeans(3), _table("wine")),
    "wine standard": (_kmeans(3, StandardScaler()), _table("wine")),
    "wine min-max clipped": (_kmeans(4, MinMaxScaler(clip=True)), _table("wine")),
    "iris K=2 robust": (_kmeans(2, RobustScaler()), _table("iris")),
    "breast cancer K=10 max-abs": (_kmeans(10, MaxAbsScaler()), _table("breast_cancer")),
    "digits K=10": (_kmeans(10), _table("digits")),
    "digits K=10 standard": (_kmeans(10, StandardScaler()), _table("digits")),
    "diabetes nested": (
        _kmeans(
            5, Pipeline([("a", StandardScaler(with_mean=False)), ("b", "passthrough")]), None, MinMaxScaler((-1, 3))
        ),
        _table("diabetes"),
    ),
    "one column": (_kmeans(3, StandardScaler(with_std=False)), lambda: _table("iris")()[:, 2:3]),
    "one sentinel": (_kmeans(4), lambda: np.vstack([_table("iris")(), [[1e5, -1e5, 1e5, 0]]])),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, np.ndarray, Any]:
    fit, data = CASES[request.param]
    X = data()
    fitted = fit(X[::2] if "sentinel" not in request.param else X)
    return fitted, X, neuralize(fitted)


def close(a: Any, b: Any, e: Any, scale: float = 1e-9) -> bool:
    """The design's notion of closeness: relative to the sum of absolute relevances."""
    size = np.abs(e.values).sum(1) + np.abs(e.residual)
    gap = np.abs(np.asarray(a) - np.asarray(b))
    return bool((gap <= scale * (size[:, None] if gap.ndim == 2 else size)).all())


def test_decides_as_the_estimator(case: Any) -> None:
    fitted, X, net = case
    rng = np.random.default_rng(0)
    spread = X.std(0) + 1e-3
    far = [X.mean(0) + 10.0**e * spread * rng.normal(size=(200, X.shape[1])) for e in (0, 1, 3, 6)]
    for rows in (X[::2], X[1::2], *far):
        logits = net(torch.from_numpy(rows)).numpy()
        border = np.abs(logits).min(1) <= 1e-12 * (1 + np.abs(logits).max(1))
        assert border.mean() < 0.5 or "clip" in str(fitted)
        mine, theirs = net.predict(rows), fitted.predict(rows)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine[~border], theirs[~border])
        np.testing.assert_array_equal(mine, logits.argmax(1))
    np.testing.assert_array_equal(net.predict(X), fitted.predict(X))


def test_one_positive_logit(case: Any) -> None:
    _, X, net = case
    positive = (net(X) > 0).sum(1)
    assert bool((positive <= 1).all())
    assert float((positive == 1).double().mean()) > 0.9


# midpoint has no stiffness
RULES = [
    (r, b) for r in ("auto", "undivided", "midpoint") for b in ("auto", 0.7, np.inf) if (r, b) != ("midpoint", 0.7)
]


@pytest.mark.parametrize(("rule", "beta"), RULES)
@pytest.mark.parametrize("target", [None, 0, 1])
def test_conserves(case: Any, rule: str, target: int | None, beta: Any) -> None:
    _, X, net = case
    e = net.explain(X, target=target, rule=rule, beta=beta)
    assert np.isfinite(e.values).all()
    assert close(e.values.sum(1) + e.residual, e.output, e)
    logits = net(X).numpy()
    assert close(e.output, logits[np.arange(len(X)), e.target], e, 1e-6)
    np.testing.assert_array_equal(e.residual, sum(e.residual_parts.values()))
    if rule == "midpoint" or np.isinf(e.beta) or (rule == "auto" and target is None):
        assert close(e.residual, 0, e)
    np.testing.assert_allclose(e.competitors.sum(1), 1)
    assert (e.competitors[np.arange(len(X)), e.target] == 0).all()


def test_a_row_is_explained_alike_in_any_company(case: Any) -> None:
    _, X, net = case
    X = X[:60]
    e = net.explain(X)
    for size in (1, 7, 59):
        assert close(net.explain(X, batch_size=size).values, e.values, e)
    alone = np.vstack([net.explain(row[None]).values for row in X])
    assert close(alone, e.values, e)
    shuffled = np.random.default_rng(1).permutation(len(X))
    assert close(net.explain(X[shuffled]).values[np.argsort(shuffled)], e.values, e)
    streamed = list(net.explain_batches(X, batch_size=13))
    assert [len(s) for s in streamed] == [13, 13, 13, 13, 8]
    assert close(np.vstack([s.values for s in streamed]), e.values, e)
    assert close(np.vstack([s.competitors for s in streamed]).sum(1), 1, e, 1e-6)


def test_lines(case: Any) -> None:
    """R = w (x - tau) in raw units, and R = 0 at the break-even value with the same competitors."""
    fitted, X, net = case
    if "clip=True" in repr(fitted):
        X = X[::2]
    e = net.explain(X)
    line = np.where(np.isnan(e.break_even), 0, e.slope * (X - e.break_even))
    assert close(line, np.where(np.isnan(e.break_even), 0, e.values), e, 1e-7)
    assert (np.isnan(e.break_even) == (e.slope == 0)).all() or "clip=True" in repr(fitted)
    assert close(np.where(e.slope == 0, e.values, 0), 0, e)


def test_state_copy_pickle_export(case: Any) -> None:
    _, X, net = case
    rows = torch.from_numpy(X[:5])
    twin = copy.deepcopy(net)
    for b in twin.buffers():
        b.zero_()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(rows), net(rows))
    assert torch.equal(pickle.loads(pickle.dumps(net))(rows), net(rows))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (rows,), dynamic_shapes=((({0: batch}),)), strict=False)
    more = torch.from_numpy(X[:11])
    assert torch.equal(program.module()(more), net(more))


def test_estimator_and_rows_are_left_alone(case: Any) -> None:
    fitted, X, net = case
    before, rows = pickle.dumps(fitted), X.copy()
    e = neuralize(fitted, reference=X).explain(X)
    _ = e.break_even
    assert pickle.dumps(fitted) == before
    np.testing.assert_array_equal(X, rows)
    for b in net.buffers():
        b += 0
    assert pickle.dumps(fitted) == before


def test_kinds_of_tables(case: Any) -> None:
    _, X, net = case
    e = net.explain(X)
    read_only = X.copy()
    read_only.flags.writeable = False
    for rows in (pd.DataFrame(X), X.tolist(), np.asfortranarray(X), read_only, X[::-1][::-1], torch.from_numpy(X)):
        assert close(net.explain(rows).values, e.values, e)
    whole = np.round(X).astype(np.int64)
    assert close(net.explain(whole).values, net.explain(whole.astype(float)).values, e, 1e-6)


def test_out(case: Any, tmp_path: Any) -> None:
    _, X, net = case
    e = net.explain(X)
    out = np.full(X.shape, np.nan)
    filled = net.explain(X, out=out)
    assert filled.values is out
    np.testing.assert_array_equal(out, e.values)
    mapped = np.memmap(tmp_path / "values", dtype=np.float64, mode="w+", shape=X.shape)
    net.explain(X, out=mapped, batch_size=50)
    assert close(mapped, e.values, e)


def test_save_and_load(case: Any, tmp_path: Any) -> None:
    _, X, net = case
    e = net.explain(X, target=1, contrast=0) if len(net.labels) == 2 else net.explain(X, target=1)
    other = Explanation.load(e.save(tmp_path / "e.npz"))
    assert [p.name for p in tmp_path.iterdir()] == ["e.npz"]
    for name in (
        "values",
        "output",
        "residual",
        "target",
        "decided",
        "divided",
        "labels",
        "data",
        "competitors",
        "slope",
        "break_even",
    ):
        np.testing.assert_array_equal(getattr(other, name), getattr(e, name))
    assert (other.rule, other.beta, other.model, other.unit) == (e.rule, e.beta, e.model, e.unit)
    assert other.feature_names == e.feature_names
    assert list(other.residual_parts) == list(e.residual_parts)
    assert repr(other) == repr(e)
