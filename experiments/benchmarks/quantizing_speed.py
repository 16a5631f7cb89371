"""What training at low precision costs: its steps in units of plain training steps.

Run ``python -m experiments.benchmarks.quantizing_speed``. Ten steps of plain
training and ten of every method take turns in one process, warm, so that one
refresh of the relevance falls on every ten (one every step is shown, too), and
one search for gamma where a rate is held; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import compress
from compress import Rate, WeightRelevance
from compress.meters import machine
from experiments import models
from experiments.benchmarks import measuring

PLAIN = "plain training"
STEPS = 10
BUDGET = 1.6
METHODS: dict[str, dict[str, Any]] = {
    "ECQ": {"method": "ecq"},
    "ECQ, rate held": {"method": "ecq", "rate": Rate(bits_per_weight=1.4)},
    "ECQx, refreshed every 10 steps": {"method": "ecqx"},
    "ECQx, rate held": {"method": "ecqx", "rate": Rate(bits_per_weight=1.4)},
    "ECQx, refreshed every step": {"method": "ecqx", "relevance": WeightRelevance(every=1)},
    "magnitude": {"method": "magnitude"},
    "gradient x weight": {"method": "gradient"},
}


def network(name: str) -> nn.Module:
    """With random weights."""
    torch.manual_seed(0)
    if name == "resnet20":
        return models.CifarResNet(3)
    net: nn.Module = getattr(models.torchvision_models(), name)(weights=None)
    return net


def measure(name: str, pixels: int, classes: int, batch: int, rounds: int) -> dict[str, Any]:
    """Ratios of ten steps over ten plain steps."""
    x, y = torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch,))

    def job(options: dict[str, Any] | None) -> measuring.Job:
        net = network(name).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
        quantizer = None if options is None else compress.Quantizer(net, optimizer, bits=4, gamma=0.2, **options)

        def run() -> None:
            for _ in range(STEPS):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                if quantizer is not None:
                    quantizer.step(x, y)

        return run

    jobs = {PLAIN: job(None)} | {method: job(options) for method, options in METHODS.items()}
    timer = measuring.CpuClock()
    for run in jobs.values():
        run()
    raw = measuring.interleave(jobs, rounds, timer, lambda i: print(f"{name}: round {i + 1}", file=sys.stderr))
    ratios = {method: asdict(measuring.ratio(raw, method, PLAIN)) for method in METHODS}
    return {"net": name, "pixels": pixels, "batch": batch, "rounds": raw, "ratios": ratios}


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{STEPS} training steps at 4 bits in units of {STEPS} plain ones, process CPU time, {result['threads']} "
        f"thread(s), warm; median (lowest to highest) over rounds. Budget: {BUDGET}. torch {result['torch']}.",
        "",
        "| method | " + " | ".join(f"{c['net']}, batch {c['batch']}" for c in result["cases"]) + " |",
        "|---|" + "---|" * len(result["cases"]),
    ]
    for method in METHODS:
        found = [c["ratios"][method] for c in result["cases"]]
        lines.append(
            f"| {method} | "
            + " | ".join(f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in found)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nets", nargs="+", choices=("resnet20", "resnet18"), default=["resnet20", "resnet18"])
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write result.json and result.md")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    cases = {"resnet20": (32, 10, given.batch), "resnet18": (64, 1000, given.batch // 2)}
    result: dict[str, Any] = {
        "threads": given.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(),
        "cases": [measure(net, *cases[net], given.rounds) for net in given.nets],
    }
    text = markdown(result)
    measuring.told(text, result, given.output)


if __name__ == "__main__":
    main()
