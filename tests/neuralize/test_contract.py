"""One battery for every converter: a new one joins by adding an entry to ``tests/fitted.py``."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fitted import CASES, Case
from scipy.special import expit

from lrp.errors import TargetError
from neuralize import Explanation, neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, np.ndarray, Any, Case]:
    chosen = CASES[request.param]
    fitted, X = chosen.fit()
    return fitted, X, neuralize(fitted), chosen


def close(a: Any, b: Any, e: Any, scale: float = 1e-9) -> bool:
    """The design's notion of closeness: relative to the sum of absolute relevances and residual parts."""
    size = np.abs(e.values).sum(1) + sum(np.abs(part) for part in e.residual_parts.values())
    gap = np.abs(np.asarray(a) - np.asarray(b))
    return bool((gap <= scale * (size[:, None] if gap.ndim == 2 else size) + 1e-300).all())


def known_size(e: Any, known: np.ndarray) -> Any:
    """An explanation's books, for single cells."""
    size = np.abs(e.values).sum(1) + sum(np.abs(part) for part in e.residual_parts.values())
    cells = np.broadcast_to(size[:, None], known.shape)[known]
    return SimpleNamespace(values=cells[:, None], residual_parts={})


def around(X: np.ndarray, spread: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [s for s in (1.0, 10.0, 1e3, 1e6) if s <= spread]
    return [X.mean(0) + s * (X.std(0) + 1e-3) * rng.normal(size=(100, X.shape[1])) for s in sizes]


def test_decides_as_the_estimator(case: Any) -> None:
    fitted, X, net, chosen = case
    for rows in (X[::2], X[1::2], *around(X, chosen.spread)):
        logits = net(torch.from_numpy(rows)).numpy()
        if chosen.logits == "density":
            # scikit-learn's tree leaves off what adds less than its tolerance
            exact = fitted.score_samples(rows)
            near = exact > -40
            np.testing.assert_allclose(net.predict(rows)[near], exact[near], rtol=1e-6)
            continue
        mine, theirs = net.predict(rows), fitted.predict(rows)
        if chosen.logits == "value":
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())
            continue
        assert mine.dtype == theirs.dtype
        size = np.sort(np.abs(logits), 1)
        border = size[:, 0] <= 1e-10 * (1 + size[:, -1])
        assert border.mean() < 0.5 or "clip" in str(fitted)
        np.testing.assert_array_equal(mine[~border], theirs[~border])
        won = logits.max(1) > 0
        np.testing.assert_array_equal(mine[won & ~border], net.labels[logits.argmax(1)][won & ~border])


def test_signs_of_the_logits(case: Any) -> None:
    fitted, X, net, chosen = case
    logits = net(X).numpy()
    positive = (logits > 0).sum(1)
    if chosen.logits in ("hard", "votes", "soft"):
        assert (positive <= 1).all()
    if chosen.logits == "hard":
        assert (positive == 1).mean() > 0.9
    if chosen.logits == "one":
        np.testing.assert_allclose(logits[:, 0], -logits[:, 1], atol=1e-12)
        assert ((logits[:, 0] > 0) == (fitted.predict(X) == -1)).all()
    if chosen.logits == "soft":
        for rows in (X, *around(X, chosen.spread)):
            P, f = fitted.predict_proba(rows), net(rows).numpy()
            np.testing.assert_allclose(expit(f), P, atol=1e-9)
            inner = (P > 1e-9) & (P < 1 - 1e-9)
            # not 1 - P, which has lost its digits where P is near 1
            others = np.stack([np.delete(P, c, 1).sum(1) for c in range(P.shape[1])], 1)
            np.testing.assert_allclose(f[inner], np.log(P[inner] / others[inner]), rtol=1e-8, atol=1e-8)


def questions(net: Any) -> list[dict[str, Any]]:
    labels = net.labels.tolist()
    asked: list[dict[str, Any]] = [{"rule": rule} for rule in net.head.rules if rule != "shapley"]
    asked += [{"beta": 0.7}, {"beta": np.inf}, {"output": "decision"}]
    if len(labels) > 1:
        asked += [{"rule": r, "target": labels[0]} for r in net.head.rules if r not in ("shapley", "divided")]
        asked += [{"target": labels[-1], "contrast": labels[0]}, {"target": labels[-1], "output": "decision"}]
        asked += [{"target": labels[0], "contrast": labels[-1], "output": "decision"}]
    return asked


def test_conserves(case: Any) -> None:
    _, X, net, chosen = case
    rows = np.vstack([X[:150], *around(X, min(chosen.spread, 10))])
    logits = net(rows).numpy()
    for options in questions(net):
        e = net.explain(rows, **options)
        assert np.isfinite(e.values).all(), options
        assert close(e.values.sum(1) + e.residual, e.output, e), options
        np.testing.assert_array_equal(e.residual, sum(e.residual_parts.values()))
        if "contrast" not in options and "output" not in options:
            place = [net.labels.tolist().index(t) for t in e.target.tolist()]
            assert close(e.output, logits[np.arange(len(rows)), place], e), options
            if len(net.labels) > 1:
                np.testing.assert_allclose(e.competitors.sum(1), 1)
                assert (e.competitors[np.arange(len(rows)), place] == 0).all()
        elif "output" not in options and len(net.labels) > 2:
            # a logit is never above a duel of its own
            mine = logits[:, net.labels.tolist().index(options["target"])]
            assert (mine <= e.output + 1e-9 * (1 + np.abs(e.output))).all()


def test_a_row_is_explained_alike_in_any_company(case: Any) -> None:
    _, X, net, _ = case
    X = X[:40]
    e = net.explain(X)
    for size in (1, 7, 39):
        assert close(net.explain(X, batch_size=size).values, e.values, e)
    alone = np.vstack([net.explain(row[None]).values for row in X[:10]])
    assert close(alone, e.values[:10], net.explain(X[:10]))
    shuffled = np.random.default_rng(1).permutation(len(X))
    assert close(net.explain(X[shuffled]).values[np.argsort(shuffled)], e.values, e)
    streamed = list(net.explain_batches(X, batch_size=13))
    assert [len(s) for s in streamed] == [13, 13, 13, 1]
    assert close(np.vstack([s.values for s in streamed]), e.values, e)
    frames = pd.concat([net.explain_batch(X[:9]), net.explain_batch(X[9:9]), net.explain_batch(X[9:])])
    assert close(frames[list(e.feature_names)].to_numpy(), e.values, e)


def test_no_rows(case: Any) -> None:
    _, X, net, _ = case
    e = net.explain(X[:0])
    assert e.values.shape == (0, X.shape[1])
    assert len(e) == 0
    assert net.predict(X[:0]).shape == (0,)
    assert list(net.explain_batches(X[:0])) == []
    assert net.explain_batch(X[:0]).columns.tolist()[-X.shape[1] :] == list(e.feature_names)


def test_lines(case: Any) -> None:
    """R = w (x - tau) in raw units wherever there is a tau; what it promises of a changed row is in test_break_even."""
    _, X, net, _ = case
    rows = X[:60]
    e = net.explain(rows)
    known = ~np.isnan(e.break_even)
    assert (known == (e.slope != 0)).all()
    assert np.isfinite(e.slope).all()
    with np.errstate(invalid="ignore"):
        line = e.slope * (rows - e.break_even)
    assert close(line[known], e.values[known], known_size(e, known), 1e-7)


def test_state_copy_pickle_export(case: Any) -> None:
    _, X, net, _ = case
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
    torch.testing.assert_close(program.module()(more), net(more), rtol=1e-12, atol=1e-12)


def test_estimator_and_rows_are_left_alone(case: Any) -> None:
    fitted, X, net, _ = case
    before, rows = pickle.dumps(fitted), X.copy()
    e = neuralize(fitted, reference=X).explain(X[:20])
    _ = e.break_even
    assert pickle.dumps(fitted) == before
    np.testing.assert_array_equal(X, rows)
    for b in net.buffers():
        if b.is_floating_point():
            b += 0
    assert pickle.dumps(fitted) == before


def test_kinds_of_tables(case: Any) -> None:
    _, X, net, _ = case
    X = X[:30]
    e = net.explain(X)
    read_only = X.copy()
    read_only.flags.writeable = False
    for rows in (pd.DataFrame(X), X.tolist(), np.asfortranarray(X), read_only, X[::-1][::-1], torch.from_numpy(X)):
        assert close(net.explain(rows).values, e.values, e)
    whole = np.round(X).astype(np.int64)
    assert close(net.explain(whole).values, net.explain(whole.astype(float)).values, e, 1e-6)


def test_out_and_top(case: Any, tmp_path: Any) -> None:
    _, X, net, _ = case
    X = X[:60]
    e = net.explain(X)
    out = np.full(X.shape, np.nan)
    filled = net.explain(X, out=out)
    assert filled.values is out
    np.testing.assert_array_equal(out, e.values)
    mapped = np.memmap(tmp_path / "values", dtype=np.float64, mode="w+", shape=X.shape)
    net.explain(X, out=mapped, batch_size=50)
    assert close(mapped, e.values, e)
    few = net.explain(X, top=2)
    kept = few.values.toarray()
    assert ((kept != 0).sum(1) <= 2).all()
    size = np.sort(np.abs(e.values), 1)[:, ::-1]
    np.testing.assert_allclose(np.sort(np.abs(kept), 1)[:, ::-1][:, :2], size[:, :2], rtol=1e-9, atol=1e-12)
    assert close(kept.sum(1) + few.residual, few.output, e)
    assert "columns beyond the top" in few.residual_parts


def test_float32(case: Any) -> None:
    fitted, X, net, _ = case
    if "sentinel" in str(X.max()) or np.abs(X).max() > 1e4:
        pytest.skip("one value of 1e5 leaves float32 no digits")
    scaled = "scaler" in str(fitted).lower() or np.abs(X).max() <= 10
    single = copy.deepcopy(net).float()
    e = single.explain(X[:50], target=net.labels[0]) if len(net.labels) > 1 else single.explain(X[:50])
    assert e.values.dtype == np.float32
    assert np.isfinite(e.values).all()
    assert close(e.values.sum(1, dtype=np.float64) + e.residual, e.output, e, 1e-4 if scaled else 1e-3)


def test_save_and_load(case: Any, tmp_path: Any) -> None:
    _, X, net, _ = case
    X = X[:30]
    e = net.explain(X, target=net.labels[-1])
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
    for name in ("rule", "beta", "model", "unit", "kind", "output_name", "categories", "feature_names"):
        assert getattr(other, name) == getattr(e, name), name
    assert list(other.residual_parts) == list(e.residual_parts)
    assert {k: v.tolist() for k, v in other.notes.items()} == {k: v.tolist() for k, v in e.notes.items()}
    assert repr(other) == repr(e)


def test_divided_is_for_winners_only(case: Any) -> None:
    _, X, net, chosen = case
    if "divided" not in net.head.rules or chosen.logits != "hard" or "RKHS" in str(net):
        return
    with pytest.raises(TargetError, match="own cluster"):
        net.explain(X, target=net.labels[0], rule="divided")
