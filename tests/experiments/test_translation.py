"""Moved data: what must not change does not, what does is what loops say, verdicts follow the rows."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.papers import translation as runs
from experiments.papers.cluster_flipping import fit, logits, split
from experiments.study import Study
from neuralize import neuralize

SETTINGS = {"rows": 8, "fit_rows": 80, "draws": 2, "shifts": [0, 3]}


@pytest.mark.parametrize("model", ["k-means", "kernel k-means"])
def test_moved_models_decide_alike(model: str) -> None:
    part = split("wine", 0, SETTINGS)
    fitted = fit(model, part, 0, 0)
    before = logits(neuralize(fitted), part.judged)
    other = neuralize(runs.moved(fitted, 3.0))
    np.testing.assert_allclose(logits(other, part.judged + 3), before, rtol=1e-8, atol=1e-10)
    assert np.abs(logits(other, part.judged) - before).max() > 0.1
    np.testing.assert_array_equal(logits(neuralize(fitted), part.judged), before, "the first stays as it is")


def test_a_row_by_loops() -> None:
    row = runs.moved_row("k-means", "wine", 0, SETTINGS)
    assert row["labels_same"] == {"0": 1.0, "3": 1.0}
    assert row["refit_same"]["3"] == 1
    assert row["logits_moved"]["3"] < 1e-9
    for key in ("LRP", "integrated gradients, mean", "sensitivity", "random"):
        assert row["changed"]["3"][key] < 1e-9
        assert row["srg"]["3"]["mean"][key] == pytest.approx(row["srg"]["0"]["mean"][key], abs=1e-9)
    assert row["sum_error"]["3"]["LRP"] < 1e-9
    part = split("wine", 0, SETTINGS)
    u = fit("k-means", part, 0, 0).cluster_centers_
    off, changed, total, start = [], 0.0, 0.0, []
    for x in part.judged:
        d = ((x - u) ** 2).sum(1)
        c, k = np.argsort(d)[:2]
        slope = 2 * (u[c] - u[k])
        f = d[k] - d[c]
        off.append(abs(sum(slope * (x + 3)) - f))
        start.append(f)
        changed += np.abs(3 * slope).sum()
        total += np.abs(slope * x).sum()
    assert row["sum_error"]["3"]["gradient x input"] == pytest.approx(np.mean(off) / np.mean(start), rel=1e-9)
    assert row["changed"]["3"]["gradient x input"] == pytest.approx(changed / total, rel=1e-9)
    kernel = runs.moved_row("kernel k-means", "wine", 0, SETTINGS)
    assert max(kernel["changed"]["3"]["LRP"], kernel["sum_error"]["3"]["LRP"]) < 1e-8
    assert kernel["changed"]["3"]["gradient x input"] > 0.1


def _row(table: str, seed: int, far: float, changed: float = 1e-15) -> dict[str, Any]:
    def by(value: float) -> dict[str, float]:
        return dict.fromkeys(runs.METHODS, 0.8) | {
            "gradient x input": value + 0.01 * seed,
            "integrated gradients": value - 0.01 * seed,
        }

    still = dict.fromkeys(runs.METHODS, 1e-16)
    return {
        "table": table, "model": "k-means", "seed": seed, "columns": 4,
        "labels_same": {"0": 1.0, "5": 1.0}, "logits_moved": {"0": 0.0, "5": 1e-15}, "refit_same": {"0": 1.0, "5": 1.0},
        "srg": {k: {i: by(v) for i in ("mean", "marginal")} for k, v in (("0", 0.8), ("5", far))},
        "sum_error": {"0": still, "5": still | {"gradient x input": 4.0}},
        "changed": {"0": still, "5": still | {"LRP": changed, "gradient x input": 5.0, "integrated gradients": 5.0}},
    }  # fmt: skip


def _report(folder: Path, rows: list[dict[str, Any]]) -> Any:
    study = Study(runs.EXPERIMENT, folder)
    for row in rows:
        study.cell(f"{row['table']}|{row['seed']}", functools.partial(dict, row))
    report = runs.report(study)
    study.write(report)
    return report


def test_verdicts_follow_the_numbers(tmp_path: Path) -> None:
    # differences that are all equal have no error; a little noise keeps the interval from being empty
    def rows(far: float, changed: float = 1e-15) -> list[dict[str, Any]]:
        return [_row(t, s, far + 0.001 * s, changed) for t in ("wine", "glass") for s in range(3)]

    report = _report(tmp_path / "lost", rows(0.1))
    assert [c.verdict for c in report.claims] == ["confirmed"] * 3
    assert "gradient x input and integrated gradients lose SRG on most tables" in report.wins[0]
    assert "integrated gradients from the mean and sensitivity stay as they are, too" in report.losses[0]
    assert "and integrated gradients from the mean on no table" in report.losses[0]
    ahead = rows(0.1)
    for row in ahead:
        for imputer in row["srg"]["0"].values():
            imputer["integrated gradients, mean"] = 0.9 + 0.01 * row["seed"]
    better = _report(tmp_path / "ahead", ahead)
    assert "and integrated gradients from the mean on wine, glass" in better.losses[0]
    assert "ahead of LRP on 0 of 2 tables with k-means, behind it on 0" in report.summary
    assert "0.81 ± 0.01 to 0.11 ± 0.01 for gradient x input" in report.summary
    assert "ahead of LRP on 2 of 2 tables with k-means, behind it on 0" in better.summary
    assert "SRG 0.81 ± 0.01 / 0.11 ± 0.01 at 0 / 5" in report.claims[1].ours
    gained = _report(tmp_path / "gained", rows(0.9))
    assert [c.verdict for c in gained.claims] == ["confirmed", "refuted", "refuted"]
    assert not gained.wins
    assert _report(tmp_path / "broken", rows(0.1, 0.01)).claims[0].verdict == "refuted"
    noisy = [_row(t, s, (0.1, 1.5, 0.8)[s]) for t in ("wine", "glass") for s in range(3)]
    assert [c.verdict for c in _report(tmp_path / "noisy", noisy).claims][1:] == ["null", "null"]


def test_unfinished_runs(tmp_path: Path) -> None:
    claims = _report(tmp_path / "one", [_row("wine", 0, 0.1)]).claims
    assert [c.verdict for c in claims] == ["confirmed", "not comparable", "not comparable"]
    study = Study(runs.EXPERIMENT, tmp_path / "none")
    assert runs.report(study).claims == ()
    assert runs.report(study).summary == ""
