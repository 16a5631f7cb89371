"""The few-shot pruning runs: fast test passes, resumable cells, choices and words."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import compress
from experiments import data, models
from experiments.cells import Cells
from experiments.inference import correct, folded
from experiments.papers import few_shot_pruning as runs
from experiments.papers import few_shot_report as report
from experiments.study import Study
from lrp.errors import DataError


def _trained(name: str) -> torch.nn.Module:
    try:
        folder = data.folder()
    except DataError as error:
        pytest.skip(str(error))
    return {"resnet20": models.resnet20, "resnet56": models.resnet56}[name](folder).model


def test_folded_networks_equal_torch_on_pruned_forms() -> None:
    torch.manual_seed(0)
    model = models.CifarResNet(1).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    x = torch.randn(7, 3, 32, 32)
    for share in (1.0, 0.5):
        target = compress.Target(channels=share)
        small = compress.plan_pruning(model, x[:1], criterion="weight", target=target, round_to=1).apply(model)
        with torch.no_grad():
            expected, got = small(x), folded(small)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        y = expected.argmax(1)
        assert correct(small, x, y, batch=3) == 7
        assert correct(small, x, (y + 1) % 10, batch=3) == 0
        assert correct(small, x, y, torch.bfloat16) >= 5
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded(small).modules())
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in small.modules()), "the model stays as it is"


def test_cells_survive_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    cells = Cells(path)
    cells.add("a", value=1)
    cells.add("b", value=2)
    path.write_text(path.read_text() + '{"key": "c", "val')
    again = Cells(path)
    assert [row["value"] for row in again.rows.values()] == [1, 2]
    again.add("c", value=3)
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [1, 2, 3]


SETTINGS: dict[str, Any] = {**runs.EXPERIMENT.full, "nets": ["resnet20"], "rates": [0.1], "seeds": 20}


def _rows(net: str, stage: str, criterion: str, normalisation: str, draw: int, correct: int) -> list[dict[str, Any]]:
    """Both modes of one cut."""
    row = {"net": net, "stage": stage, "criterion": criterion, "normalisation": normalisation, "rate": 0.1}
    row |= {"draw": draw, "correct": correct, "count": 100, "precision": "float32"}
    return [{"key": f"{list(row.values())}{again}", **row, "reestimated": again} for again in (False, True)]


def _study(rows: list[dict[str, Any]]) -> Any:
    return SimpleNamespace(settings=SETTINGS, rows=rows)


def _made(draws: int, lead: dict[str, int]) -> list[dict[str, Any]]:
    """Relevance as good as said, every other criterion below it by its lead."""
    rows = []
    for name in ("LRP epsilon", "LRP z+", *lead):
        rows += _rows("resnet20", "validate", name, "sum", 0, 60)
        for draw in range(draws):
            rows += _rows(
                "resnet20", "test", name, "sum", draw, 60 + draw - lead.get(name, 0) - draw % 2 * (name in lead)
            )
    return rows


def test_choice_and_paired_difference() -> None:
    rows = []
    for normalisation, right in (("none", 40), ("sum", 60), ("l2", 50), ("mean", 10)):
        rows += _rows("resnet20", "validate", "LRP epsilon", normalisation, 0, right)
    rows += _rows("resnet20", "validate", "weight L1", "none", 0, 30)
    assert runs.best_normalisations(rows) == {"LRP epsilon": ("sum",), "weight L1": ("none",)}
    for draw, right in enumerate((50, 54, 52)):
        rows += _rows("resnet20", "test", "LRP epsilon", "sum", draw, right)
        rows += _rows("resnet20", "test", "weight L1", "none", draw, right - 10 - draw)
    run = report.Run(rows, "resnet20", [0.1])
    gap, error = run.difference("LRP epsilon", "weight L1", 0.1, True)
    assert gap == pytest.approx(11)  # 10, 11, 12
    assert error == pytest.approx(1 / 3**0.5)
    mean, spread, count = run.mean("LRP epsilon", 0.1, False)
    assert (mean, count) == (pytest.approx(52), 3)
    assert spread == pytest.approx(2 / 3**0.5)
    assert "3 of 20 draws" in report.words(run, 20)[0]
    for draw in (3, 4):
        rows += _rows("resnet20", "test", "LRP epsilon", "sum", draw, 52)
        rows += _rows("resnet20", "test", "weight L1", "none", draw, 41)
    text = report.words(report.Run(rows, "resnet20", [0.1]), 20)[0]
    old, new = text.split("With new")
    assert "10% (LRP epsilon over weight L1: +12.0" in old.split("behind at")[0]  # the one cut of magnitude
    assert "10% (LRP epsilon over weight L1: +11.0" in new.split("behind at")[0]


def test_verdicts_follow_the_numbers() -> None:
    lead = {"random": 40, "weight L1": 10, "Taylor, published": 20}
    found = report.report(_study(_made(6, lead)))
    assert [c.verdict for c in found.claims] == ["confirmed"] * 4
    assert len(found.wins) == 2
    assert not found.losses
    assert "LRP epsilon 62.5 %, best control (weight L1) 5" in found.wins[1]
    assert "ahead of every control at 1 of 1 rates and behind one at 0." in found.summary
    found = report.report(_study(_made(6, {**lead, "weight L1": -10})))  # magnitude ahead
    assert [c.verdict for c in found.claims] == ["refuted"] * 4
    assert (len(found.wins), len(found.losses)) == (0, 2)
    assert "ahead of every control at 0 of 1 rates and behind one at 1." in found.summary
    found = report.report(_study(_made(2, lead)))  # too few draws
    assert {c.verdict for c in found.claims} == {"not comparable"}
    assert not found.wins
    assert not found.losses
    assert report.verdict([1, 1, -1]) == "partly"
    assert report.verdict([0, 0]) == "null"
    assert report.report(_study([])).claims == []


def test_committed_rows_are_all_there(tmp_path: Path) -> None:
    """Nothing is left to compute, without any data."""
    held = Path(runs.__file__).parent.parent / "results" / "few_shot_pruning" / "result.json"
    shutil.copy(held, tmp_path)
    assert Study(runs.EXPERIMENT, tmp_path, data=tmp_path / "none").run()
    before, after = (json.loads(path.read_text()) for path in (held, tmp_path / "result.json"))
    assert all(after[part] == before[part] for part in ("rows", "runs", "words", "claims", "wins", "losses"))
    assert sum(run["cells"] for run in after["runs"]) == len(after["rows"])


@pytest.mark.data
def test_a_small_run_counts_what_torch_counts(data: Path, tmp_path: Path) -> None:
    tiny = {**runs.EXPERIMENT.quick, "criteria": ["weight L1"], "checked": ["weight L1"], "rates": [0.2]}
    tiny |= {"validation_pictures": 40, "test_pictures": 100}
    experiment = dataclasses.replace(runs.EXPERIMENT, quick=tiny)
    study = Study(experiment, tmp_path, quick=True, data=data)
    assert study.run()
    assert len(study.rows) == 4 * 2 + 2 + 2 + 1  # validation, test, check, unpruned
    row = next(r for r in study.rows if r["key"].startswith("resnet20|test|weight L1|") and not r["reestimated"])
    model = models.resnet20(data).model
    convs = {n: m for n, m in model.named_modules() if n.startswith("layer") and n.endswith("conv1")}
    sizes = {n: m.weight.detach().abs().sum((1, 2, 3)).double() for n, m in convs.items()}
    by = {"none": lambda v: 1.0, "sum": torch.sum, "l2": torch.linalg.vector_norm, "mean": torch.mean}
    scale = by[row["normalisation"]]
    order = sorted((float(s / scale(v)), n, k) for n, v in sizes.items() for k, s in enumerate(v))
    for _, name, k in order[: math.ceil(0.2 * 336)]:
        norm = model.get_submodule(name.replace("conv", "bn"))
        with torch.no_grad():
            norm.weight[k], norm.bias[k] = 0, 0
    test = runs.pictures(data, "test").take(slice(0, 100))
    with torch.no_grad():
        right = int((model(test.x).argmax(1) == test.y).sum())
    assert abs(row["correct"] - right) <= 2  # 16 bits may move single pictures


@pytest.mark.data
def test_bench_cuts_what_it_says() -> None:
    _trained("resnet20")
    bench = runs.Bench("resnet20", data.folder())
    batches = runs.reference(bench.train, 3)
    x, y = batches[0]
    assert torch.bincount(y).tolist() == [10] * 10
    assert x.shape == (100, 3, 32, 32)
    assert sum(g.width for g in bench.structure.prunable) == 336
    model = bench.cut(bench.score("weight L1", 0, batches), "none", 0.3)
    left = sum(m.out_channels for n, m in model.named_modules() if n.startswith("layer") and n.endswith("conv1"))
    assert left == 336 - 101  # 100.8 asked for, never fewer than asked
    test = runs.pictures(data.folder(), "test").take(slice(0, 200))
    with torch.no_grad():
        right = int((bench.model(test.x).argmax(1) == test.y).sum())
    assert correct(bench.model, test.x, test.y) == right > 170
