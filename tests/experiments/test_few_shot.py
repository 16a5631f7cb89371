"""The few-shot pruning runs: fast test passes, resumable cells, choices and words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import compress
from experiments import data, models
from experiments.inference import correct, folded
from experiments.papers import few_shot_pruning as runs
from experiments.papers import few_shot_report as report
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
    cells = runs.Cells(path)
    cells.add("a", value=1)
    cells.add("b", value=2)
    path.write_text(path.read_text() + '{"key": "c", "val')
    again = runs.Cells(path)
    assert [row["value"] for row in again.rows.values()] == [1, 2]
    again.add("c", value=3)
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [1, 2, 3]


def _cell(cells: runs.Cells, criterion: str, normalisation: str, draw: int, correct: int, rate: float = 0.1) -> None:
    for again in (False, True):
        cells.add(
            f"{criterion}|{normalisation}|{rate}|{again}|{draw}",
            criterion=criterion,
            normalisation=normalisation,
            rate=rate,
            reestimated=again,
            draw=draw,
            correct=correct,
            count=100,
        )


def test_choice_and_paired_difference(tmp_path: Path) -> None:
    validation = runs.Cells(tmp_path / "resnet20-validation.jsonl")
    for normalisation, right in (("none", 40), ("sum", 60), ("l2", 50), ("mean", 10)):
        _cell(validation, "LRP epsilon", normalisation, 0, right)
    _cell(validation, "weight L1", "none", 0, 30)
    assert runs.best_normalisations(validation) == {"LRP epsilon": ("sum",), "weight L1": ("none",)}
    test = runs.Cells(tmp_path / "resnet20-test.jsonl")
    for draw, right in enumerate((50, 54, 52)):
        _cell(test, "LRP epsilon", "sum", draw, right)
        _cell(test, "weight L1", "none", draw, right - 10 - draw)
    run = report.Run(tmp_path, "resnet20")
    gap, error = run.difference("LRP epsilon", "weight L1", 0.1, True)
    assert gap == pytest.approx(11)  # 10, 11, 12
    assert error == pytest.approx(1 / 3**0.5)
    mean, spread, count = run.mean("LRP epsilon", 0.1, False)
    assert (mean, count) == (pytest.approx(52), 3)
    assert spread == pytest.approx(2 / 3**0.5)
    assert "3 of 20 draws" in report.words(run)[0]
    for draw in (3, 4):
        _cell(test, "LRP epsilon", "sum", draw, 52)
        _cell(test, "weight L1", "none", draw, 41)
    text = report.words(report.Run(tmp_path, "resnet20"))[1]
    assert "10% (LRP epsilon over weight L1: +11.0" in text.split("behind at")[0]


@pytest.mark.data
def test_bench_cuts_what_it_says() -> None:
    _trained("resnet20")
    bench = runs.Bench("resnet20", data.folder(), 1)
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
