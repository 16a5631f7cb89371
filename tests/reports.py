"""Reports made by hand, for what is said about numbers that are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from compress import Target
from compress.class_comparison import ClassComparison, compare_classes
from compress.costs import Costs
from compress.evaluation import Evaluation, _evaluation
from compress.pruning import Step
from compress.reporting import Measured, Report, Timed

BEFORE = Costs(channels=160, filters=170, macs=400_000, params=40_000, bytes=161_000)
AFTER = Costs(channels=104, filters=114, macs=196_000, params=18_000, bytes=73_000)
METER = "onnxruntime 1.25.0, CPU, 1 thread, batch 1"


def answers(wrong: dict[int, int], per_class: int = 45, classes: int = 10, first: int = 0) -> Evaluation:
    """``per_class`` samples of every class, of which ``wrong[c]`` many are wrong, from the ``first``-th on."""
    y = torch.arange(classes).repeat_interleave(per_class)
    said = y.clone()
    for label, count in wrong.items():
        start = label * per_class + first
        said[start : start + count] = (label + 1) % classes
    return _evaluation(y, said, 0.1 * len(y), classes, None)


def timed(median: float, spread: float = 0.02) -> Timed:
    return Timed(median, median * (1 - spread), median * (1 + spread), 5, METER, 1)


def compared(before: Evaluation | None, after: Evaluation | None) -> ClassComparison | None:
    return None if before is None or after is None or not before.per_class else compare_classes(before, after)


def by_hand(
    *,
    before: Evaluation | None = None,
    after: Evaluation | None = None,
    times: tuple[float, float] | None = (1.0, 0.6),
    **changes: Any,
) -> Report:
    """A report on ten classes that lost a little; every part can be replaced."""
    before = answers({0: 1, 3: 1}) if before is None else before
    after = answers({0: 1, 3: 2, 8: 3}) if after is None else after
    clocks = (None, None) if times is None else (timed(times[0]), timed(times[1]))
    report = Report(
        title="A small network, pruned",
        model="DigitNet",
        target=Target(macs=0.5),
        limit=200_000.0,
        reached=196_000.0,
        before=Measured(BEFORE, before, 163_412, 170_000, "1.2e-07 of the largest output", clocks[0]),
        after=Measured(AFTER, after, 75_000, 81_000, "1.4e-07 of the largest output", clocks[1]),
        classes=compared(before, after),
        filters={
            "prunable": {"before": 160, "after": 104, "removed": 0.35},
            "all": {"before": 170, "after": 114, "removed": 56 / 170},
        },
        widths={"conv1": (32, 16), "conv2": (32, 24), "conv3": (32, 16), "conv4": (64, 48), "linear": (10, 10)},
        protected={"linear": "its channels are the network's output"},
        history=(Step(1, Target(macs=0.5), AFTER, None, after, None, 1.25),),
        settings={"criterion": {"name": "lrp", "composite": "epsilon_plus"}, "samples": 100, "seed": 0},
        versions={"torch": "2.13.0", "python": "3.11.2"},
    )
    return dataclasses.replace(report, **changes)
