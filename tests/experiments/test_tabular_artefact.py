"""The corrupted tables: what is planted, what is named, and what the report concludes from hand-made rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans

from experiments.papers import tabular_artefact as work
from experiments.papers.tabular_artefact_report import CONTROLS
from experiments.study import Study
from lrp.errors import DataError


def test_artefacts_change_one_column_of_the_batch() -> None:
    X = work.table("breast cancer", None, 100, 0)
    planted = np.arange(100) < 20
    t = work.column(X, 0)
    assert (X[:, t] > 0).mean() >= 0.5
    for kind in work.KINDS:
        Y = work.corrupted(X, planted, t, kind)
        changed = Y != X
        assert not changed[~planted].any()
        assert not np.delete(changed, t, axis=1).any()
        assert changed[planted, t].all() == (kind != "none")
    np.testing.assert_allclose(work.corrupted(X, planted, t, "offset 2 sd")[:20, t], X[:20, t] + 2 * X[:, t].std())
    np.testing.assert_allclose(work.corrupted(X, planted, t, "unit x 10")[:20, t], 10 * X[:20, t])
    assert (work.corrupted(X, planted, t, "code 999")[:20, t] == 999).all()
    with pytest.raises(DataError, match="white wines"):
        work.table("white wine", Path("nowhere"), 10, 0)


def test_named_column_is_that_of_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 4))
    planted = np.arange(60) < 25
    rows[planted, 2] += 9
    got, share = work.named(rows, planted, 2, 0)
    fitted = KMeans(2, n_init=10, random_state=0).fit(rows)
    own = int(fitted.labels_[0])
    mine, other = fitted.cluster_centers_[own], fitted.cluster_centers_[1 - own]
    members = rows[fitted.labels_ == own]
    values = np.array([2 * (mine - other) * (x - (mine + other) / 2) for x in members]).mean(0)
    assert got == 2 == values.argmax()
    assert share == pytest.approx(values.max() / np.maximum(values, 0).sum())


def test_a_large_offset_in_a_column_that_separates_nothing_is_seen_by_distances() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(240, 4)) + 20
    X[:120, 0] += 12  # the clusters differ here alone
    X = np.column_stack([X, rng.normal(size=240) + 30])
    seed = next(k for k in range(50) if work.column(X, k) == 4)
    row = work.cell(X, "code -1", 0.2, seed, 2, 8)
    assert row["column"] == 4
    assert row["importance"] < 1
    found = {f["values"]: f for f in row["found"]}
    if row["own"]:
        assert row["named_by_clustering"]
    else:
        assert found["scaled rows"]["auc"] > 0.95
        assert found["random"]["auc"] < 0.8
        assert row["outlier_auc"] > 0.95


def test_a_batch_with_a_cluster_of_its_own_is_named_by_the_clustering() -> None:
    X = np.random.default_rng(1).normal(size=(150, 3)) + 10
    row = work.cell(X, "code 999", 0.2, 0, 2, 5)
    assert row["own"]
    assert row["named_by_clustering"]
    assert row["found"] == []


def _row(seed: int, kind: str, aucs: dict[str, float], own: bool = False, named: bool = True) -> dict[str, Any]:
    found = [
        {
            "values": name,
            "suggested": 2,
            "tau": 5.0,
            "picked": [0],
            "ari": 0.5,
            "precision": 0.9,
            "recall": 0.9,
            "auc": aucs[name] + 0.001 * seed,
            "named": named,
            "named_share": 0.5,
            "named_by_means": True,
        }
        for name in ("relevance", *CONTROLS[:3])
    ]
    row: dict[str, Any] = {
        "table": "t",
        "kind": kind,
        "share": 0.2,
        "seed": seed,
        "own": own,
        "named_by_clustering": own,
    }
    return row | ({"found": []} if own else {"found": found, "outlier_auc": 0.6 + 0.001 * seed})


def _study(tmp_path: Path, rows: list[dict[str, Any]]) -> Study:
    study = Study(replace(work.EXPERIMENT, work=lambda _: None), tmp_path)
    for row in rows:
        study.cell(f"{row['table']}|{row['kind']}|{row['share']}|{row['seed']}", partial(dict, row))
    return study


GOOD = {"relevance": 0.95, "scaled rows": 0.7, "distance to the centre": 0.7, "random": 0.5}


@pytest.mark.parametrize(
    ("relevance", "named", "expected"),
    [(0.95, True, ("confirmed", "confirmed")), (0.95, False, ("confirmed", "refuted")), (0.6, True, ("refuted", None))],
)
def test_verdicts_follow_the_numbers(
    tmp_path: Path, relevance: float, named: bool, expected: tuple[str, str | None]
) -> None:
    rows = [_row(k, "unit x 10", GOOD | {"relevance": relevance}, named=named) for k in range(6)]
    report = work.EXPERIMENT.report(_study(tmp_path, rows))
    assert report.claims[0].verdict == expected[0]
    assert report.claims[1].verdict == (expected[1] or "not comparable")
    assert report.claims[2].verdict == "not comparable", "no batch has a cluster of its own"
    assert bool(report.wins) == (expected[0] == "confirmed")
    assert bool(report.losses) == (expected[0] != "confirmed")
    counts = (1, 0) if expected[0] == "confirmed" else (0, 1)
    assert "in {} and behind one in {} of 1 settings".format(*counts) in report.summary


def test_equal_numbers_are_a_null_result(tmp_path: Path) -> None:
    even = dict.fromkeys(GOOD, 0.6)
    report = work.EXPERIMENT.report(_study(tmp_path, [_row(k, "code -1", even) for k in range(4)]))
    assert report.claims[0].verdict == "null"
    assert "not surely ahead" in report.losses[0]


def test_own_clusters_and_unfinished_runs(tmp_path: Path) -> None:
    rows = [_row(k, "code 999", GOOD, own=True) for k in range(6)] + [_row(k, "none", GOOD) for k in range(3)]
    rows += [_row(k, "unit x 10", GOOD) for k in range(3)]
    report = work.EXPERIMENT.report(_study(tmp_path / "a", rows))
    assert report.claims[2].verdict == "confirmed"
    assert "6 of 9 cells" in report.words[1]
    first = work.EXPERIMENT.report(_study(tmp_path / "b", [_row(0, "unit x 10", GOOD)]))
    assert [c.verdict for c in first.claims] == ["not comparable"]
    bare = work.EXPERIMENT.report(_study(tmp_path / "c", [_row(0, "none", GOOD)]))
    assert (bare.figures, bare.summary) == ({}, "")


def test_whole_run_on_a_bundled_table(tmp_path: Path) -> None:
    tiny = dict(work.EXPERIMENT.quick) | {"tables": ["breast cancer"], "rows": 120, "kinds": ["offset 4 sd"]}
    study = Study(replace(work.EXPERIMENT, quick=tiny, data=()), tmp_path, quick=True)
    assert study.run()
    assert len(study.rows) == 1
    assert "AUC of the picked groups" in (tmp_path / "result.md").read_text()
    assert (tmp_path / "auc.csv").exists()
