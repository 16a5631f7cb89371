"""ECQx on small networks, and on ResNet-20: real cells, and what the page makes of hand-made ones."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compress
from experiments import digits
from experiments.experiment import Experiment
from experiments.papers import ecqx, ecqx_report
from experiments.papers import small_quantization as small
from experiments.study import Study


def tiny(folder: Path, **settings: Any) -> Study:
    e = small.EXPERIMENT
    return Study(Experiment(e.name, e.paper, e.question, {**e.quick, **settings}, {}, e.work, e.report), folder)


def test_cells_are_held_to_one_rate_and_measured(tmp_path: Path) -> None:
    study = tiny(tmp_path, seeds=1, arms=["ECQ", "ECQx, quantized + step"])
    assert study.run()
    before = study.cells.rows["digits|before"]
    runs = [row for row in study.rows if "arm" in row]
    assert [row["arm"] for row in runs] == ["ECQ", "ECQx, quantized + step"]
    net = digits.build()
    net.load_state_dict(study.weights("digits", dict))
    x, y = digits.test()
    with torch.no_grad():
        assert before["correct"] == int((net.eval()(x).argmax(1) == y).sum())
    for row in runs:
        assert 0 <= row["bits_per_weight"] <= 1.6 + 1e-6
        assert row["bytes"] < 0.25 * row["before"]
        assert 0.5 < row["cosine"] <= 1
        assert row["count"] == len(y)
    assert abs(runs[0]["bytes"] - runs[1]["bytes"]) < 0.05 * runs[0]["bytes"]
    assert "| ECQ |" in (tmp_path / "result.md").read_text()


def rows(better: float, cosine: float = 0.0) -> list[dict[str, Any]]:
    """Two points, five seeds, all arms; those of relevance by so much better than ECQ, which is above the controls."""
    out: list[dict[str, Any]] = [{"key": "digits|before", "correct": 95, "count": 100}]
    for bits, seed, arm in itertools.product((2, 4), range(5), ecqx.ARMS):
        gain = better if arm in small.SOURCES else 0.0 if arm == "ECQ" else -1.0
        similar = 0.9 + (cosine if arm in small.SOURCES else 0.0) + 0.001 * seed
        row = {"net": "digits", "bits": bits, "rate": small.RATES[bits][0], "arm": arm, "seed": seed, "cosine": similar}
        correct = 800 + 10 * gain + seed + (seed % 2 if arm == "ECQ" else 0)
        row |= {"correct": correct, "count": 1000, "bytes": 900 + bits, "before": 9000, "zeros": 0.5}
        out.append({"key": f"digits|{bits}|{row['rate']}|{arm}|{seed}", **row})
    return out


def judged(folder: Path, given: list[dict[str, Any]]) -> Any:
    study = tiny(folder, seeds=5)
    study.cells.rows = {row["key"]: row for row in given}
    return small.report(study)


@pytest.mark.parametrize(
    ("better", "cosine", "verdict", "maps"),
    [(2.0, 0.01, "confirmed", "confirmed"), (-2.0, -0.01, "refuted", "refuted"), (0.04, 0.0, "null", "null")],
)
def test_verdicts_follow_the_numbers(tmp_path: Path, better: float, cosine: float, verdict: str, maps: str) -> None:
    found = judged(tmp_path, rows(better, cosine))
    assert [claim.verdict for claim in found.claims] == [verdict, maps]
    assert bool(found.wins) is (better == 2)
    assert bool(found.losses) is (better == -2)
    counts = {2.0: "ahead in 2 and behind in 0", -2.0: "ahead in 0 and behind in 2"}
    assert f"changes the accuracy of ECQ by {better - 0.04:+.2f} ±" in found.summary
    assert counts.get(better, "ahead in 0 and behind in 0 of 2") in found.summary
    accuracy = found.tables["digits_accuracy"]
    shown = {row[0]: row[1] for row in accuracy.rows}
    values = [80 + 0.1 * seed + 0.1 * (seed % 2) for seed in range(5)]
    assert shown["ECQ"] == pytest.approx((np.mean(values), np.std(values, ddof=1) / np.sqrt(5)))


def test_too_few_seeds_claim_nothing(tmp_path: Path) -> None:
    study = tiny(tmp_path, seeds=2)
    study.cells.rows = {row["key"]: row for row in rows(2.0) if row.get("seed", 0) < 2}
    assert not small.report(study).claims


def resnet_rows(better: float) -> list[dict[str, Any]]:
    out = []
    for seed, arm in itertools.product(range(5), ecqx.ARMS):
        gain = better if arm in ecqx_report.SOURCES else 0.0
        row = {"stage": "run", "arm": arm, "bits": 4, "rate": 2.6, "seed": seed, "learning_rate": 1e-3}
        row |= {
            "device": "cpu",
            "torch": "2",
            "correct": 9100 + 10 * gain + seed * (1 + (arm == "ECQ")),
            "count": 10000,
        }
        out.append({"key": f"run|{arm}|{seed}", **row, "bytes": 90_000, "zeros": 0.4, "collapsed": []})
    return out


@pytest.mark.parametrize(("better", "verdict"), [(9.0, "partly"), (-9.0, "refuted"), (0.2, "null")])
def test_what_the_page_of_resnet_says(tmp_path: Path, better: float, verdict: str) -> None:
    study = Study(ecqx.EXPERIMENT, tmp_path)
    study.cells.rows = {row["key"]: row for row in resnet_rows(better)}
    found = ecqx_report.report(study)
    assert found.claims[0].verdict == verdict
    assert found.claims[-1].verdict == "confirmed"  # 12.2 times, 0.7 points
    assert bool(found.losses) is (verdict != "partly")
    place = {"partly": "ahead at 1 and behind at 0 of 1", "refuted": "ahead at 0 and behind at 1 of 1"}
    assert place.get(verdict, "ahead at 0 and behind at 0 of 1") in found.summary
    study.cells.rows = dict(list(study.cells.rows.items())[:-1])
    unfinished = ecqx_report.report(study)
    assert not unfinished.claims
    assert unfinished.summary == ""
    assert "no conclusion" in unfinished.words[1]


def test_cells_come_seed_by_seed() -> None:
    found = list(ecqx.cells_of([4, 3], [0, 1]))
    assert len({key for key, *_ in found}) == len(found) == 2 * (4 + 3) * 7 + 2 * 2
    first = [seed for _, _, bits, _, seed in found if bits == 4]
    assert first[:28] == [0] * 28


@pytest.mark.data
def test_resnet_cell(tmp_path: Path, data: Path) -> None:
    """One epoch on a thousand pictures: held to its entropy, in a file that was read again."""
    e = ecqx.EXPERIMENT
    settings = {**e.quick, "seeds": 1}
    study = Study(Experiment(e.name, e.paper, e.question, settings, {}, e.work, e.report), tmp_path, data=data)
    bench = ecqx.Bench.of(study)
    assert (len(bench.y), len(bench.test), bench.epochs) == (500, 1, 1)
    result = compress.quantize(bench.model, method="rtn", bits=4, progress=False)
    found = ecqx.entry(result, bench.test, bench.held_out)
    assert found["count"] == 1000
    assert found["bytes"] == pytest.approx(result.reached.bytes, abs=64)
