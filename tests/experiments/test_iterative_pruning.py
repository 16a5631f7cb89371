"""Pruning in steps with training: costs by hand, the steps of a tiny run, verdicts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from experiments import vgg
from experiments.papers import iterative_pruning as runs
from experiments.papers.few_shot_pruning import Pictures
from experiments.study import Study

TINY: dict[str, Any] = {
    **runs.EXPERIMENT.quick,
    "vgg": {"widths": [[8], [12]], "epochs": 1, "thousands": 1, "seed": 0},
    "criteria": ["weight L1", "LRP"],
    "step": 0.2,
    "steps": 2,
    "marks": [0.2, 0.4],
    "per_class": 2,
    "fine_tune": {"pictures": 200, "lr": 0.02, "batch": 50},
    "test_pictures": 100,
}


def synthetic(count: int, seed: int = 0) -> Pictures:
    """The class is a colour under noise."""
    generator = torch.Generator().manual_seed(seed)
    marks = torch.randn(10, 3, 1, 1, generator=torch.Generator().manual_seed(7)).expand(-1, -1, 32, 32)
    y = torch.arange(count) % 10
    return Pictures(marks[y] + 0.3 * torch.randn(count, 3, 32, 32, generator=generator), y)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthetic pictures in place of CIFAR-10."""
    made = {"train": synthetic(1000), "test": synthetic(200, 1)}
    monkeypatch.setattr(runs, "pictures", lambda folder, split: made[split])
    monkeypatch.setattr("experiments.papers.vgg_pruning.REFERENCE", slice(0, 1000))


def by_hand(model: vgg.VGG, step: float, steps: int) -> list[dict[str, float]]:
    """Magnitude, over the mean of the layer, taken anew in every step; costs of what is left."""
    convs: list[Any] = [m for m in model.features if isinstance(m, nn.Conv2d)]
    left = [list(range(conv.out_channels)) for conv in convs]
    total = sum(map(len, left))

    def costs() -> dict[str, float]:
        inputs = [3, *map(len, left)]
        pixels = [32 * 32, 16 * 16]
        macs = sum(9 * inputs[k] * inputs[k + 1] * pixels[k] for k in range(2)) + 10 * inputs[2]
        params = sum((9 * inputs[k] + 2) * inputs[k + 1] for k in range(2)) + 10 * inputs[2] + 10
        return {"channels": sum(map(len, left)), "macs": macs, "params": params}

    out = [costs()]
    for number in range(1, steps + 1):
        scores = []
        for k, conv in enumerate(convs):
            inputs = left[k - 1] if k else range(3)
            sizes = {c: sum(float(conv.weight[c, i].detach().abs().sum()) for i in inputs) for c in left[k]}
            mean = sum(sizes.values()) / len(sizes)
            scores += [(size / mean, k, c) for c, size in sizes.items()]
        goal = math.floor(total * (1 - number * step) + 1e-9)
        for _, k, c in sorted(scores)[: sum(map(len, left)) - goal]:
            left[k].remove(c)
        out.append(costs())
    return [{name: value / out[0][name] for name, value in entry.items()} for entry in out]


@pytest.mark.usefixtures("offline")
def test_a_tiny_run_cuts_and_trains(tmp_path: Path) -> None:
    experiment = dataclasses.replace(runs.EXPERIMENT, quick=TINY)
    study = Study(experiment, tmp_path, quick=True, data=tmp_path)
    assert study.run()
    rows = {
        (r["criterion"], r["mode"]): r["steps"] for r in Study(experiment, tmp_path, quick=True, data=tmp_path).rows
    }
    assert set(rows) == {("weight L1", "per_step"), ("LRP", "per_step"), ("LRP", "once"), ("weight L1", "untrained"),
                         ("LRP", "untrained")}  # fmt: skip
    model = vgg.VGG(TINY["vgg"]["widths"])
    model.load_state_dict(study.weights("vgg", dict))
    steps = rows["weight L1", "untrained"]
    for found, expected in zip(steps, by_hand(model, 0.2, 2), strict=True):
        assert {name: found[name] for name in expected} == pytest.approx(expected)
    test = runs.pictures(Path(), "test").take(slice(0, 100))
    assert steps[0]["accuracy"] == vgg.correct(model.eval(), test.x, test.y) / 100
    assert {tuple(entry) for run in rows.values() for entry in run} == {("channels", "macs", "params", "accuracy")}
    trained, untrained = (rows["LRP", mode][1] for mode in ("per_step", "untrained"))
    assert trained["macs"] == untrained["macs"]  # the first cut is the same
    assert rows["LRP", "once"][1] == trained  # and so is the training
    pairs = [(rows[c, "per_step"][k], rows[c, "untrained"][k]) for c in TINY["criteria"] for k in (1, 2)]
    assert any(a["accuracy"] != b["accuracy"] for a, b in pairs)


def test_training_moves_the_weights_and_forgets_no_seed() -> None:
    part = synthetic(100)

    def after(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = vgg.VGG([[4]])
        tune = runs.Short(part, seed, TINY["fine_tune"])
        tune(model)
        tune(model)
        return model.linear.weight.detach().clone()

    torch.manual_seed(0)
    before = vgg.VGG([[4]]).linear.weight
    assert torch.equal(after(1), after(1))
    assert not torch.equal(after(1), after(2))
    assert not torch.equal(after(1), before)


# -- the page, on rows made by hand ------------------------------------------------------------------------------
def told(by: dict[tuple[str, str], int], seeds: int = 3) -> tuple[dict[str, str], Any]:
    """(criterion, mode) to the accuracy in per cent after both steps, with a spread over seeds."""
    rows = []
    for (criterion, mode), value in by.items():
        for seed in range(seeds):
            entry = {"channels": 0.8, "macs": 0.7, "params": 0.6, "accuracy": (value + seed % 2) / 100}
            steps = [{**entry, "channels": 1.0, "macs": 1.0, "params": 1.0}, entry, {**entry, "channels": 0.6}]
            rows.append({"criterion": criterion, "mode": mode, "seed": seed, "steps": steps})
    study: Any = SimpleNamespace(settings=TINY, rows=rows)
    found = runs.report(study)
    return {c.claim: c.verdict for c in found.claims}, found


EVEN: dict[tuple[str, str], int] = {
    ("random", "per_step"): 60, ("weight L1", "per_step"): 69, ("LRP", "per_step"): 70, ("LRP", "once"): 65,
    ("random", "untrained"): 10, ("weight L1", "untrained"): 30, ("LRP", "untrained"): 50,
}  # fmt: skip
CLOSE = "With training after every step the criteria come close together"
COMPETITIVE = "LRP is competitive or better where training follows"
ANEW = "Scores should be taken anew in every step"


def test_verdicts_follow_the_numbers() -> None:
    verdicts, found = told(EVEN)
    assert verdicts == {CLOSE: "confirmed", COMPETITIVE: "confirmed", ANEW: "confirmed"}
    assert len(found.wins) == 4  # two rates, trained and not
    assert not found.losses
    assert "+20.0 ± 0.0 points over the best control (weight L1)" in found.wins[2]
    assert "scored once: LRP 65.3 ± 0.3 %" in found.summary
    verdicts, found = told({**EVEN, ("weight L1", "per_step"): 95, ("LRP", "once"): 75})
    assert verdicts == {CLOSE: "refuted", COMPETITIVE: "refuted", ANEW: "refuted"}
    assert len(found.losses) == 2
    verdicts, _ = told({**EVEN, ("LRP", "once"): 70})
    assert verdicts[ANEW] == "null"
    verdicts, found = told(EVEN, seeds=2)
    assert not verdicts
    assert not found.wins
    assert "2 seeds are complete of 3" in found.words[-1]
    costs = found.tables["costs"]
    assert [mean for mean, _ in costs.rows[0][2:4]] == pytest.approx([70.0, 60.0])
    assert told({})[0] == {}
