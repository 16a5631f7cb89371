"""What pruning costs: scoring in units of a gradient-scoring pass, planning and cutting in seconds.

Run ``python -m experiments.benchmarks.pruning_speed``. The scoring passes of
every criterion over the same pictures take turns in one process, warm; ratios
are taken within a round. Then torchvision's ResNet-50 is planned and cut from
scores at hand: tracing, proof, ranking, cutting.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import compress
from compress.meters import machine
from experiments import models
from experiments.benchmarks import measuring

BASE = "gradient:abs_per_sample"
CRITERIA = (
    "lrp:epsilon",
    "lrp:zplus",
    "lrp:gamma",
    "lrp:epsilon_plus",
    "taylor:abs_per_sample",
    "activation",
    "weight",
)
BUDGETED = "lrp:zplus"
BUDGET = {"vgg16": 1.6, "vgg16_bn": 1.6, "resnet18": 1.9, "resnet50": 1.9}
PLANNING = 60.0  # seconds that planning and cutting a ResNet-50 must stay below


def scoring(net: str, pixels: int, pictures: int, batch: int, rounds: int) -> dict[str, Any]:
    """Ratios of the scoring passes over the gradient's, of one network with random weights."""
    torch.manual_seed(0)
    model: nn.Module = getattr(models.torchvision_models(), net)(weights=None).eval()
    example = torch.randn(1, 3, pixels, pixels)
    data = [(torch.randn(batch, 3, pixels, pixels), torch.randint(1000, (batch,))) for _ in range(pictures // batch)]
    structure = compress.find_groups(model, example)

    def job(criterion: str) -> measuring.Job:
        return lambda: compress.score(model, example, data, criterion=criterion, structure=structure, progress=False)

    jobs = {criterion: job(criterion) for criterion in (BASE, *CRITERIA)}
    timer = measuring.CpuClock()
    cold = {name: timer.seconds(run) for name, run in jobs.items()}
    raw = measuring.interleave(jobs, rounds, timer, lambda i: print(f"{net}: round {i + 1}", file=sys.stderr))
    ratios = {name: asdict(measuring.ratio(raw, name, BASE)) for name in CRITERIA}
    base = statistics.median(r[BASE] for r in raw)
    settings = {"net": net, "pixels": pixels, "pictures": pictures, "batch": batch}
    return {**settings, "base_seconds": base, "cold_seconds": cold, "rounds": raw, "ratios": ratios}


def planning(net: str, pixels: int, share: float) -> dict[str, float]:
    """Seconds from scores at hand to the cut network."""
    torch.manual_seed(0)
    model: nn.Module = getattr(models.torchvision_models(), net)(weights=None).eval()
    example = torch.randn(1, 3, pixels, pixels)
    scores = compress.score(model, example, criterion="weight")
    start = time.perf_counter()
    structure = compress.find_groups(model, example)
    found = time.perf_counter()
    plan = compress.plan_pruning(
        model, example, scores=scores, structure=structure, target=compress.Target(macs=share), round_to=1
    )
    planned = time.perf_counter()
    plan.apply(model)
    cut = time.perf_counter()
    return {"structure": found - start, "plan": planned - found, "cut": cut - planned, "total": cut - start}


def markdown(result: dict[str, Any]) -> str:
    """The figures as tables."""
    lines = [
        f"Scoring in units of `{BASE}` over the same pictures, process CPU time, {result['threads']} thread(s), warm; "
        "median (lowest to highest) over rounds. Networks of torchvision with random weights.",
        "",
        "| network | pixels | pictures | " + " | ".join(f"`{c}`" for c in CRITERIA) + " | budget of z+ |",
        "|" + "---|" * (len(CRITERIA) + 4),
    ]
    for case in result["scoring"]:
        cells = [f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in case["ratios"].values()]
        budget = BUDGET.get(case["net"], "-")
        row = [case["net"], case["pixels"], case["pictures"], *cells, budget]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", "Seconds beyond scoring, to half of the MACs:", "", "| network | structure | plan | cut | total |"]
    lines.append("|---|---|---|---|---|")
    for net, row in result["planning"].items():
        lines.append(f"| {net} | " + " | ".join(f"{row[k]:.2f}" for k in ("structure", "plan", "cut", "total")) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["vgg16", "resnet18", "resnet50"])
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write result.json and result.md")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {
        "threads": given.threads,
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "torchvision", "torch-pruning")},
        "python": platform.python_version(),
        "machine": machine(),
        "scoring": [scoring(net, given.pixels, given.pictures, given.batch, given.rounds) for net in given.nets],
        "planning": {net: planning(net, 224, 0.5) for net in ("resnet50",)},
    }
    text = markdown(result)
    measuring.told(text, result, given.output)


if __name__ == "__main__":
    main()
