"""Which criterion, layer normalisation and group reduction should be the default? Decided on validation data.

Networks whose filters are removed one group at a time, as they really can be:
SqueezeNet and MobileNetV2 (ImageNet samples; the second has residual and
depthwise groups), and the digits network (residual groups, batch norm). The
runs of :mod:`experiments.papers.few_shot_pruning` add ResNet-20 and ResNet-56.
The score of a choice on a network is the mean share of the unpruned accuracy
that is left over the rates; a default must do well on all, so choices are
ordered by their mean rank over networks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import compress
from compress.costs import CostTable
from experiments import data, digits, mobilenet, models
from experiments.papers.few_shot_pruning import Cells

NORMALISATIONS = ("none", "sum", "l2", "mean")
REDUCTIONS = ("mean", "sum", "max", "root")
CRITERIA = ("lrp:epsilon", "lrp:zplus", "lrp:gamma", "lrp:epsilon_plus", "logit_x_activation", "taylor", "activation")
DATA_FREE = ("weight:l1", "random:0")
#: networks without batch norm, whose statistics can not be mended, are not taken as far
RATES = {"squeezenet": (0.1, 0.2, 0.3), "mobilenet_v2": (0.1, 0.2, 0.3), "digits": (0.1, 0.2, 0.3, 0.4, 0.5)}


@dataclass(frozen=True)
class Net:
    """A trained network with pictures for reference and for validation."""

    model: nn.Module
    example: Tensor
    reference: Callable[[int], list[tuple[Tensor, Tensor]]]
    validation: list[tuple[Tensor, Tensor]]


def _imagenet(model: nn.Module, x: Tensor, y: Tensor, count: int) -> Net:
    """The samples hold one picture per class: references and validation pictures are of different classes."""
    order = np.random.default_rng(0).permutation(len(y))
    held, pool = order[:count], order[count:]

    def reference(draw: int) -> list[tuple[Tensor, Tensor]]:
        chosen = np.random.default_rng(draw).choice(pool, 100, replace=False)
        return [(x[chosen[k : k + 20]], y[chosen[k : k + 20]]) for k in range(0, 100, 20)]

    validation = [(x[held[k : k + 50]], y[held[k : k + 50]]) for k in range(0, count, 50)]
    return Net(model, x[:1], reference, validation)


def squeezenet(folder: Path, count: int) -> Net:
    """SqueezeNet 1.1 on the ImageNet samples."""
    raw = np.stack([p for _, p in data.imagenet_samples(folder, 227)])
    return _imagenet(models.squeezenet(folder).model, models.caffe_input(raw), torch.arange(1000), count)


def mobilenet_v2(folder: Path, count: int) -> Net:
    """MobileNetV2 on the ImageNet samples; class 0 is the background."""
    raw = np.stack([p for _, p in data.imagenet_samples(folder, 224)])
    x = mobilenet.mobilenet_input(raw)
    return _imagenet(mobilenet.mobilenet(folder).model, x, torch.arange(1, 1001), count)


def digits_cnn(folder: Path, count: int) -> Net:
    """The digits network, on its validation split."""
    x, _ = digits.validation()
    return Net(digits.train(), x[:1], lambda draw: digits.few(draw=draw), [digits.validation()])


NETS: dict[str, Callable[[Path, int], Net]] = {
    "squeezenet": squeezenet,
    "mobilenet_v2": mobilenet_v2,
    "digits": digits_cnn,
}


def run(name: str, folder: Path, cells: Cells, draws: int, count: int, seconds: float) -> bool:
    """Fill the cells of one network; False when the time is over first."""
    start = time.monotonic()
    net = NETS[name](folder, count)
    structure = compress.find_groups(net.model, net.example)
    table = CostTable.of(net.model, net.example, structure)
    coupled = any(len(g.producers) > 1 for g in structure.prunable)
    normed = any(isinstance(m, nn.BatchNorm2d) for m in net.model.modules())
    if f"{name}|unpruned" not in cells.rows:
        cells.add(f"{name}|unpruned", net=name, accuracy=compress.evaluate(net.model, net.validation).accuracy)
    for draw in range(draws):
        reference = net.reference(draw)
        for criterion in (*CRITERIA, *DATA_FREE):
            if criterion in DATA_FREE and draw and not normed:
                continue
            scores: Any = None
            for reduction in REDUCTIONS if coupled else ("mean",):
                for normalisation in ("none",) if criterion.startswith("random") else NORMALISATIONS:
                    for rate in RATES[name]:
                        for again in (False, True) if normed else (False,):
                            key = f"{name}|{criterion}|{normalisation}|{reduction}|{rate}|{again}|{draw}"
                            if key in cells.rows:
                                continue
                            if time.monotonic() - start > seconds:
                                return False
                            if scores is None:
                                scores = compress.score(
                                    net.model, net.example, reference, criterion=criterion, structure=structure,
                                    progress=False,
                                )  # fmt: skip
                            plan = compress.plan_pruning(
                                net.model, net.example, criterion=criterion, scores=scores, structure=structure,
                                table=table, target=compress.Target(channels=1 - rate), normalisation=normalisation,
                                reduction=reduction, round_to=1,
                            )  # fmt: skip
                            model = plan.apply(net.model)
                            if again:
                                model = compress.reestimate(model, reference)
                            cells.add(
                                key, net=name, criterion=criterion, normalisation=normalisation, reduction=reduction,
                                rate=rate, reestimated=again, draw=draw,
                                accuracy=compress.evaluate(model, net.validation).accuracy,
                            )  # fmt: skip
    return True


def shares(folder: Path) -> dict[tuple[str, str, str], dict[str, float]]:
    """(criterion, normalisation, reduction) to the mean share of the unpruned accuracy, per network."""
    out: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for name in NETS:
        cells = Cells(folder / f"{name}.jsonl")
        base = cells.rows.get(f"{name}|unpruned", {}).get("accuracy")
        if not base:
            continue
        rows = [row for row in cells.rows.values() if "criterion" in row]
        coupled = len({row["reduction"] for row in rows}) > 1
        for row in rows:
            for reduction in (row["reduction"],) if coupled else REDUCTIONS:
                at = out.setdefault((row["criterion"], row["normalisation"], reduction), {})
                at.setdefault(name, []).append(row["accuracy"] / base)
    for net in ("resnet20", "resnet56"):
        base = {"resnet20": 0.9173, "resnet56": 0.9339}[net]
        names = {"LRP epsilon": "lrp:epsilon", "LRP z+": "lrp:zplus", "LRP gamma": "lrp:gamma",
                 "LRP epsilon-plus": "lrp:epsilon_plus", "logit x activation": "logit_x_activation",
                 "Taylor, per sample": "taylor", "activation": "activation", "weight L1": "weight:l1",
                 "random": "random:0"}  # fmt: skip
        for row in Cells(folder.parent / "few_shot_pruning" / f"{net}-validation.jsonl").rows.values():
            if row["criterion"] in names:
                for reduction in REDUCTIONS:  # every group there has one layer
                    at = out.setdefault((names[row["criterion"]], row["normalisation"], reduction), {})
                    at.setdefault(net, []).append(row["correct"] / row["count"] / base)
    return {key: {net: float(np.mean(v)) for net, v in by.items()} for key, by in out.items()}


def markdown(folder: Path) -> str:
    """All choices, best mean rank first."""
    found = shares(folder)
    nets = sorted({net for by in found.values() for net in by})
    complete = {key: by for key, by in found.items() if len(by) == len(nets)}
    ranks = {
        key: [1 + sum(o[net] > by[net] for o in complete.values()) for net in nets] for key, by in complete.items()
    }
    lines = [
        "# The default criterion",
        "",
        "`python -m experiments.papers.default_criterion run --net NAME`, then `table`. Share of the unpruned accuracy "
        "that is left, on validation data, mean over the rates (10 to 50 % of the prunable channels; to 30 % on the "
        "networks without batch norm), draws of the reference pictures and, where there is batch norm, both with and "
        "without new statistics. `reduction` matters only where layers are coupled (digits, MobileNetV2). Ordered by "
        "the mean rank over the networks. ImageNet samples are probably training pictures of these networks, and "
        "reference and validation pictures are of different classes there.",
        "",
        "| criterion | normalisation | reduction | mean rank | worst rank | " + " | ".join(nets) + " |",
        "|---|---|---|---|---|" + "---|" * len(nets),
    ]
    for key in sorted(complete, key=lambda k: float(np.mean(ranks[k]))):
        cells = [f"{np.mean(ranks[key]):.1f}", str(max(ranks[key])), *(f"{complete[key][net]:.3f}" for net in nets)]
        lines.append(f"| {' | '.join(key)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``python -m experiments.papers.default_criterion run --net squeezenet``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("run", "table"))
    parser.add_argument("--net", choices=tuple(NETS), default="digits")
    parser.add_argument("--data", default=None)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("-o", "--output", type=Path, default=Path("experiments/results/default_criterion"))
    args = parser.parse_args(arguments)
    if args.stage == "table":
        (args.output / "README.md").write_text(markdown(args.output), encoding="utf-8")
        return 0
    torch.set_num_threads(args.threads)
    cells = Cells(args.output / f"{args.net}.jsonl")
    done = run(args.net, data.folder(args.data), cells, args.draws, args.pictures, args.seconds)
    print("all cells are done" if done else "the time is over; say the same again to go on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
