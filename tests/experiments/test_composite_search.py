"""The composite search: its networks and scores against slow ones, its verdicts on rows made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.criteria import Scores
from experiments import data as sets
from experiments import models
from experiments.papers import composite_report as told
from experiments.papers import composite_search as runs
from experiments.study import Study

RATES = (0.0, 0.25, 0.5, 0.75)


def _network() -> Any:
    torch.manual_seed(0)
    model: Any = models.CifarResNet(1).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            norm: Any = module
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return model


def _layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def _scores(model: Any, layers: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(len(model.get_submodule(n).weight), generator=generator).double() for n in layers}


def _behind_norms(model: Any, gone: dict[str, list[int]], x: Tensor) -> Tensor:
    """Outputs with channels set to zero where they leave their batch norm."""
    handles = []
    for name, channels in gone.items():

        def zero(module: nn.Module, given: Any, output: Tensor, channels: list[int] = channels) -> Tensor:
            return output.index_fill(1, torch.tensor(channels), 0)

        handles.append(model.get_submodule(name.replace("conv", "bn")).register_forward_hook(zero))
    with torch.no_grad():
        out: Tensor = model(x)
    for handle in handles:
        handle.remove()
    return out


def _least(scores: dict[str, Tensor], count: int) -> dict[str, list[int]]:
    ranked = sorted((float(v), k, j) for k, s in enumerate(scores.values()) for j, v in enumerate(s))
    names = list(scores)
    gone: dict[str, list[int]] = {}
    for _, k, j in ranked[:count]:
        gone.setdefault(names[k], []).append(j)
    return gone


def test_order_has_ties_by_place_and_divides_layers_by_their_mean() -> None:
    scores = {"a": torch.tensor([2.0, 1.0, 1.0]), "b": torch.tensor([1.0, 30.0])}
    assert runs.order(scores) == [("a", 1), ("a", 2), ("b", 0), ("a", 0), ("b", 1)]
    # means 4/3 and 31/2: 1.5, 0.75, 0.75 and 0.065, 1.94
    assert runs.order(scores, "mean") == [("b", 0), ("a", 1), ("a", 2), ("a", 0), ("b", 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silent_filters_give_zero_behind_their_norm(dtype: torch.dtype) -> None:
    model, x = _network(), torch.randn(4, 3, 32, 32)
    scores = _scores(model, _layers(model))
    total = sum(map(len, scores.values()))
    nets = runs.silenced(model, runs.order(scores), RATES, dtype)
    near = 1e-4 if dtype == torch.float32 else 0.1
    for rate, net in zip(RATES, nets, strict=True):
        expected = _behind_norms(model, _least(scores, int(rate * total)), x)
        with torch.no_grad():
            got = net(x.to(dtype).contiguous(memory_format=torch.channels_last)).float()
        torch.testing.assert_close(got, expected, rtol=0, atol=near * float(expected.abs().max()))
    assert not torch.allclose(expected, _behind_norms(model, {}, x), atol=1e-2), "something was silenced"


def test_removed_filters_are_those_of_a_plan() -> None:
    model = _network()
    found = compress.find_groups(model, torch.zeros(1, 3, 32, 32))
    scores = _scores(model, list(found.layers))
    scores["layer1.0.conv1"] *= 1e-3  # all of them come first: one has to stay
    widths = {name: len(s) for name, s in scores.items()}
    for rate in (0.0, 0.2, 0.5, 0.9):
        plan = compress.plan_pruning(
            model, torch.zeros(1, 3, 32, 32), criterion="weight", scores=Scores(scores),
            target=compress.Target(channels=1 - rate), normalisation="none", floor=1, round_to=1, structure=found,
        )  # fmt: skip
        gone = runs.removed(runs.order(scores), rate, widths)
        assert {name: tuple(sorted(c)) for name, c in gone.items()} == {k: v for k, v in plan.removed.items() if v}
    assert len(gone["layer1.0.conv1"]) == 15


def test_restricted_network_has_the_outputs_of_its_classes() -> None:
    model, x = _network(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(runs.restricted(model, (7, 2, 4))(x), model(x)[:, [7, 2, 4]])
    assert model.linear.out_features == 10


def test_integrated_gradients_equal_a_loop() -> None:
    model = _network().double()
    x, y, steps = torch.randn(12, 3, 32, 32).double(), torch.arange(12) % 10, 3
    got = runs.integrated_gradients(model, [(x, y)], steps)
    name = "layer2.0.conv1"
    held: list[Tensor] = []
    handle = model.layer2[0].bn1.register_forward_hook(lambda module, given, output: held.append(output))
    expected = torch.zeros(32).double()
    for picture, label in zip(x, y, strict=True):
        a, g = [], []
        for k in range(steps + 1):
            held.clear()
            true = model((k / steps * picture)[None].requires_grad_())[0, label]
            g.append(torch.autograd.grad(true, held[0])[0][0])
            a.append(held[0][0].detach())
        parts = sum((g[k] + g[k + 1]) / 2 * (a[k + 1] - a[k]) for k in range(steps))
        assert isinstance(parts, Tensor)
        expected += parts.sum((1, 2)).abs() / len(x)
    handle.remove()
    torch.testing.assert_close(got[name], expected)
    assert set(got) == set(_layers(model))


def test_grid_and_choice() -> None:
    choices = runs.grid(("epsilon", "zplus"))
    assert len(set(choices)) == 8
    assert choices[:2] == [("epsilon",) * 3, ("zplus",) * 3]
    trials = [{"rules": list(c), "accuracy": [0.5, 0.5]} for c in choices]
    assert runs.optimised({"trials": trials}) == choices[0], "of equal ones the first"
    trials[5]["accuracy"] = [0.4, 0.7]
    assert runs.optimised({"trials": trials}) == choices[5]


def test_measures_of_a_curve() -> None:
    rates = np.arange(20) / 20
    perfect, step = np.ones(20), np.where(rates < 0.475, 0.9, 0.3)
    assert told.area(rates, perfect) == 1
    assert told.trapezoid(rates, perfect) == pytest.approx(0.95)
    assert told.area(rates, step) == pytest.approx((10 * 0.9 + 10 * 0.3) / 20)
    assert told.trapezoid(rates, step) == pytest.approx(0.45 * 0.9 + 0.05 * 0.6 + 0.45 * 0.3)
    assert told.top_rate(rates, step) == pytest.approx(0.45)
    step[12] = 0.86  # 95 % of 0.9 is 0.855
    assert told.top_rate(rates, step) == pytest.approx(0.6)


def test_verdicts() -> None:
    up, down, flat = (0.1, 0.02, 6), (-0.1, 0.02, 6), (0.03, 0.02, 6)
    assert told.verdict([up, up]) == "confirmed"
    assert told.verdict([up, flat]) == told.verdict([up, down]) == "partly"
    assert told.verdict([flat, flat]) == "null"
    assert told.verdict([down, flat]) == "refuted"
    assert told.verdict([up, (0.5, 0.01, 2)]) == told.verdict([]) == "not comparable"


def _study(folder: Path, areas: dict[str, float], signed: float = 0.2, sized: float = 0.801) -> Study:
    """Rows as the work makes them: flat curves of these heights, a little different in each unit."""
    study = Study(runs.EXPERIMENT, folder, quick=True)
    study.settings["per_class"], study.settings["seeds"] = 10, 2
    rates, add = study.settings["rates"], study.cells.add
    names = [*told.RELEVANCE, *told.CONTROLS, *(f"{n}, signed" for n in told.RELEVANCE)]
    for task in ("2-4-6", "3-5-7", "all"):
        for draw in range(1 if task == "all" else 2):
            shift = 0.01 * draw + (0.02 if task == "3-5-7" else 0) - (0.3 if task == "all" else 0)
            for arm in told.ARMS:
                for k, name in enumerate(names):
                    if name in told.DATA_FREE and draw:
                        continue
                    height = areas.get(name, 0.4) + shift * (1 + k / 100)
                    right = [900.0] + [1000 * height] * (len(rates) - 1)
                    add(f"test|{arm}|{task}|{draw}|{name}", kind="test", arm=arm, task=task, draw=draw,
                        criterion=name, normalisation="none", correct=right, count=1000, rules=None)  # fmt: skip
                for aggregate, height in (("abs_per_sample", 0.7), ("signed", signed)):
                    trials = [{"rules": list(c), "accuracy": [height - i / 100]}
                              for i, c in enumerate(runs.grid(("epsilon", "zplus")))]  # fmt: skip
                    add(f"search|{arm}|{task}|{draw}|{aggregate}", kind="search", arm=arm, task=task, draw=draw,
                        aggregate=aggregate, trials=trials)  # fmt: skip
            if task != "all":
                height = sized + shift * (1 + told.RELEVANCE.index("LRP epsilon") / 100)
                right = [900.0] + [1000 * height] * (len(rates) - 1)
                add(f"size|mask|{task}|{draw}|20", kind="size", arm="mask", task=task, draw=draw, per_class=20,
                    correct=right, count=1000)  # fmt: skip
    return study


def _verdicts(study: Study) -> dict[str, str]:
    found = told.report(study).claims
    assert len({c.claim for c in found}) == len(found)
    keys = (
        "ahead of plain epsilon",
        "ahead of plain z+",
        "random",
        "integrated",
        "Near-zero",
        "suffice",
        "few classes",
    )
    return {key: next(c.verdict for c in found if key in c.claim) for key in keys}


def test_report_says_what_the_rows_say(tmp_path: Path) -> None:
    good = {"optimised": 0.9, "LRP epsilon": 0.8, "LRP z+": 0.7, "random": 0.4}
    study = _study(tmp_path / "good", good)
    assert set(_verdicts(study).values()) == {"confirmed"}
    report = told.report(study)
    assert [text.count("beats every control") for text in report.wins] == [2, 2]
    assert "ahead of 6 and 6 of the 6 controls" in report.summary
    assert not report.losses
    assert "three_classes" in report.tables
    assert set(report.figures) == {"curves", "signs", "sizes"}
    row = next(r for r in report.tables["gaps"].rows if r[0] == "LRP epsilon")
    # one of five rates is the whole network's
    assert row[2][0] == pytest.approx(0.1 * 4 / 5, abs=1e-3)
    study.write(report)
    assert json.loads((tmp_path / "good" / "result.json").read_text())["claims"][0]["verdict"] == "confirmed"


def test_report_turns_with_the_rows(tmp_path: Path) -> None:
    bad = {"optimised": 0.6, "LRP epsilon": 0.65, "LRP z+": 0.7, "random": 0.75, "integrated gradients": 0.8}
    study = _study(tmp_path, bad, signed=0.9, sized=0.75)
    found = _verdicts(study)
    assert found.pop("few classes") == "null", "no rate keeps enough of either"
    assert set(found.values()) == {"refuted"}
    report = told.report(study)
    assert not report.wins
    assert [text.count("is not ahead of") for text in report.losses] == [2, 2]
    assert "ahead of 4 and 4 of the 6 controls" in report.summary
    assert "random" in report.losses[0]


def test_report_of_an_unfinished_run(tmp_path: Path) -> None:
    study = _study(tmp_path, {"optimised": 0.9})
    for key in [k for k, r in study.cells.rows.items() if r["draw"] or r["task"] != "2-4-6" or r["arm"] == "cut"]:
        del study.cells.rows[key]
    report = told.report(study)
    verdicts = {c.claim: c.verdict for c in report.claims}
    assert verdicts["Plain epsilon is ahead of plain z+"] == "not comparable"
    assert report.summary == ""
    assert not report.wins
    assert not report.losses
    study.cells.rows.clear()
    assert not told.report(study).claims


def test_tiny_run(data: Path, tmp_path: Path) -> None:
    tiny = {
        **runs.EXPERIMENT.quick, "seeds": 1, "rates": [0.0, 0.2], "search_rates": [0.2], "budget": 2, "per_class": 2,
        "thousands": [1, 1], "pictures": {"validation": 5, "test": 10}, "steps": 2, "precision": "float32",
        "signed_draws": 0,
    }  # fmt: skip
    study = Study(replace(runs.EXPERIMENT, quick=tiny), tmp_path, quick=True, data=data)
    assert study.run()
    rows = {row["key"]: row for row in study.rows}
    model: Any = models.resnet20(data).model
    raw, y = sets.cifar10(data, "test", 1)
    x = sets.normalise(raw, models.IMAGENET_MEAN, models.IMAGENET_STD)
    index = np.concatenate([np.flatnonzero(y == c)[:10] for c in (2, 4, 6)])
    scores = {n: model.get_submodule(n).weight.detach().abs().sum((1, 2, 3)) for n in _layers(model)}
    place = np.searchsorted((2, 4, 6), y[index])
    expected = []
    for rate in tiny["rates"]:
        out = _behind_norms(model, _least(scores, int(688 * rate)), x[index])[:, [2, 4, 6]]
        expected.append(int((out.argmax(1).numpy() == place).sum()))
    row = rows["test|mask|2-4-6|0|weight L1|none"]
    assert row["correct"] == expected
    assert row["count"] == 30
    found = rows["search|mask|2-4-6|0|abs_per_sample"]
    assert rows["test|mask|2-4-6|0|optimised|none"]["rules"] == list(runs.optimised(found))
    cut = rows["search|cut|2-4-6|0|abs_per_sample"]["trials"]
    assert [t["rules"] for t in cut] == [["epsilon"] * 3, ["zplus"] * 3]
    assert study.complete
    assert (tmp_path / "result.md").exists()
    assert rows["test|cut|2-4-6|0|LRP epsilon|none"]["rules"] == ["epsilon"] * 3
