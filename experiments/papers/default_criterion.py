"""Which criterion, layer normalisation and group reduction should be the default? Decided on validation data.

Networks whose filters are removed one group at a time, as they really can be:
SqueezeNet and MobileNetV2 (ImageNet samples; the second has residual and
depthwise groups), the digits network (residual groups, batch norm) and the two
CIFAR-10 ResNets. Two budgets: a share of the channels and a share of the
multiply-adds, in which a layer counts by what it costs. All else is as
:func:`compress.prune` does it by itself: floor, rounding of the widths, and new
statistics of the batch norms from the reference pictures.
The score of a choice on a network is the mean share of the unpruned accuracy
that is left over the rates; a default must do well on all, so choices are
ordered by the mean over networks and budgets. That rule was fixed before the
runs.
"""

from __future__ import annotations

import argparse
import itertools
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
from experiments.cells import Cells
from experiments.papers.few_shot_pruning import VALIDATION, pictures
from experiments.papers.few_shot_pruning import reference as few_shot

NORMALISATIONS = ("none", "sum", "l2", "mean")
REDUCTIONS = ("mean", "sum", "max", "root")
CRITERIA = ("lrp:epsilon", "lrp:zplus", "lrp:gamma", "lrp:epsilon_plus", "logit_x_activation", "taylor", "activation")
DATA_FREE = ("weight:l1", "weight:l2", "random:{draw}")
WITHOUT_BATCH_NORM = ("squeezenet",)
#: what compress ships: its normalisation is "mean" with batch norm, "none" without
DEFAULT = ("lrp:epsilon", "auto", "mean")
#: what is removed of the channels, of the multiply-adds; less from a network without batch norm or trained on ImageNet
RATES = {"channels": (0.2, 0.4), "macs": (0.3, 0.5)}
GENTLE = {"channels": (0.1, 0.2), "macs": (0.15, 0.3)}


@dataclass(frozen=True)
class Net:
    """A trained network with pictures for reference and for validation."""

    model: nn.Module
    example: Tensor
    reference: Callable[[int], list[tuple[Tensor, Tensor]]]
    validation: list[tuple[Tensor, Tensor]]
    rates: dict[str, tuple[float, ...]]

    def accuracy(self, model: nn.Module) -> float:
        """On the validation pictures, with products in 16 bits."""
        with torch.autocast("cpu", torch.bfloat16):
            return compress.evaluate(model, self.validation, progress=False).accuracy


def _imagenet(model: nn.Module, x: Tensor, y: Tensor, count: int) -> Net:
    """The samples hold one picture per class: references and validation pictures are of different classes."""
    order = np.random.default_rng(0).permutation(len(y))
    held, pool = order[:count], order[count:]

    def reference(draw: int) -> list[tuple[Tensor, Tensor]]:
        chosen = np.random.default_rng(draw).choice(pool, 100, replace=False)
        return [(x[chosen[k : k + 20]], y[chosen[k : k + 20]]) for k in range(0, 100, 20)]

    validation = [(x[held[k : k + 50]], y[held[k : k + 50]]) for k in range(0, count, 50)]
    return Net(model, x[:1], reference, validation, GENTLE)


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
    return Net(digits.train(), x[:1], lambda draw: digits.few(draw=draw), [digits.validation()], RATES)


def _cifar(name: str) -> Callable[[Path, int], Net]:
    def make(folder: Path, count: int) -> Net:
        train = pictures(folder, "train")
        held = train.take(VALIDATION).take(slice(0, count))
        trained = {"resnet20": models.resnet20, "resnet56": models.resnet56}[name](folder)
        parts = list(zip(held.x.split(100), held.y.split(100), strict=True))
        return Net(trained.model, train.x[:1], lambda draw: few_shot(train, draw), parts, RATES)

    return make


NETS: dict[str, Callable[[Path, int], Net]] = {
    "squeezenet": squeezenet,
    "mobilenet_v2": mobilenet_v2,
    "digits": digits_cnn,
    "resnet20": _cifar("resnet20"),
    "resnet56": _cifar("resnet56"),
}


def run(name: str, quantity: str, folder: Path, cells: Cells, draws: int, count: int, seconds: float) -> bool:
    """Fill the cells of one network and budget; False when the time is over first."""
    start = time.monotonic()
    net = NETS[name](folder, count)
    structure = compress.find_groups(net.model, net.example)
    table = CostTable.of(net.model, net.example, structure)
    coupled = any(len(g.producers) > 1 for g in structure.prunable)
    normed = any(isinstance(m, nn.BatchNorm2d) for m in net.model.modules())
    if f"{name}|unpruned" not in cells.rows:
        cells.add(f"{name}|unpruned", net=name, accuracy=net.accuracy(net.model))
    for draw, criterion in itertools.product(range(draws), (*CRITERIA, *DATA_FREE)):
        spec = criterion.format(draw=draw)
        if criterion in DATA_FREE and draw and not normed and "{draw}" not in criterion:
            continue
        scores: Any = None
        reference = net.reference(draw)
        for reduction, normalisation, rate in itertools.product(
            REDUCTIONS if coupled else ("mean",),
            ("none",) if criterion.startswith("random") else NORMALISATIONS,
            net.rates[quantity],
        ):
            row = {"criterion": criterion, "normalisation": normalisation, "reduction": reduction, "rate": rate}
            key = f"{name}|{quantity}|{'|'.join(map(str, row.values()))}|{draw}"
            if key in cells.rows:
                continue
            if time.monotonic() - start > seconds:
                return False
            if scores is None:
                scores = compress.score(
                    net.model, net.example, reference, criterion=spec, structure=structure, progress=False
                )
            plan = compress.plan_pruning(
                net.model, net.example, criterion=spec, scores=scores, structure=structure, table=table,
                target=compress.Target(**{quantity: 1 - rate}), normalisation=normalisation, reduction=reduction,
            )  # fmt: skip
            model = plan.apply(net.model)
            if normed:
                model = compress.reestimate(model, reference)
            left = getattr(plan.after, quantity) / getattr(plan.before, quantity)
            cells.add(key, net=name, quantity=quantity, **row, left=left, draw=draw, accuracy=net.accuracy(model))
    return True


def shares(folder: Path) -> dict[tuple[str, str, str], dict[str, float]]:
    """(criterion, normalisation, reduction) to the mean share of the unpruned accuracy, per network and budget."""
    out: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for name in NETS:
        cells = Cells(folder / f"{name}.jsonl")
        base = cells.rows.get(f"{name}|unpruned", {}).get("accuracy")
        rows = [row for row in cells.rows.values() if "criterion" in row]
        coupled = len({row["reduction"] for row in rows}) > 1
        for row in rows:
            for reduction in (row["reduction"],) if coupled else REDUCTIONS:
                at = out.setdefault((row["criterion"], row["normalisation"], reduction), {})
                at.setdefault(f"{name}, {row['quantity']}", []).append(row["accuracy"] / base)
    found = {key: {net: float(np.mean(v)) for net, v in by.items()} for key, by in out.items()}
    for criterion, _, reduction in list(found):
        by = {}
        for column in {c for own in found.values() for c in own}:
            how = "none" if column.split(",")[0] in WITHOUT_BATCH_NORM else "mean"
            own = found.get((criterion, how, reduction), found.get((criterion, "none", reduction), {}))
            if column in own:
                by[column] = own[column]
        found[criterion, "auto", reduction] = by
    return found


def markdown(folder: Path) -> str:
    """All choices, best mean first."""
    found = shares(folder)
    nets = sorted({net for by in found.values() for net in by})
    nets = [net for net in nets if all(net in by for by in found.values())]  # those that are done
    ranks = {key: [1 + sum(o[net] > by[net] for o in found.values()) for net in nets] for key, by in found.items()}
    means = {key: float(np.mean([by[net] for net in nets])) for key, by in found.items()}
    lines = [
        "# The default criterion",
        "",
        "`python -m experiments.papers.default_criterion run --net NAME --quantity channels|macs`, then `table`. Share "
        "of the unpruned accuracy that is left, on validation data, mean over the rates (removed: 20 and 40 % of the "
        "prunable channels, 30 and 50 % of the MACs; 10 and 20, 15 and 30 on the ImageNet networks) and over draws of "
        "the reference pictures. Widths rounded, floors, and new batch-norm statistics as `compress.prune` does it by "
        "default. `reduction` matters only where layers are coupled (digits, MobileNetV2). Ordered by the mean over "
        "the columns. `auto` is `mean` on networks with batch norm and `none` on SqueezeNet, the only one without; it "
        "was added when these figures were seen (below). ImageNet samples are probably training pictures of these "
        "networks, and reference and validation pictures are of different classes there.",
        "",
    ]
    order = sorted(found, key=lambda k: -means[k])
    first = [next(key for key in order if key[0] == c) for c in dict.fromkeys(c for c, *_ in order)]
    head = [
        "| criterion | normalisation | reduction | mean | mean rank | " + " | ".join(nets) + " |",
        "|---|---|---|---|---|" + "---|" * len(nets),
    ]

    def row(key: tuple[str, str, str]) -> str:
        cells = [f"{means[key]:.3f}", f"{np.mean(ranks[key]):.1f}", *(f"{found[key][net]:.3f}" for net in nets)]
        return f"| {' | '.join(key).replace(':{draw}', '')} | " + " | ".join(cells) + " |"

    single = [key for key in order if key[1] != "auto"]
    best = single[0]
    gap = sum(found[DEFAULT][n] > found[best][n] + 1e-9 for n in nets)
    same = {how: found[DEFAULT[0], DEFAULT[1], how] for how in REDUCTIONS}
    reductions = ", ".join(f"`{how}` {np.mean([by[n] for n in nets]):.3f}" for how, by in same.items())
    lines += [
        "## What is chosen",
        "",
        f"The rule said before the runs, one choice for all, gives `{best[0]}`, normalisation `{best[1]}`, reduction "
        f"`{best[2]}` ({means[best]:.3f}). But the networks fall into two kinds. {_kinds(found, nets)} So the "
        f"default is `{DEFAULT[0]}` with reduction `{DEFAULT[2]}` and normalisation `auto` ({means[DEFAULT]:.3f}; "
        f"ahead of that single choice in {gap} of {len(nets)} columns). Only one network without batch norm stands "
        "behind the second half of that, and nothing but these validation pictures behind the split; the test "
        "pictures of [few_shot_pruning](../few_shot_pruning/result.md) had no part in it.",
        "",
        f"Reductions of the default, mean over the columns: {reductions}. A sum over coupled layers protects wide "
        "groups and strangles inner layers (digits); `mean` is kept where they are about equal.",
        "",
        "## The best choice of every criterion",
        "",
        *head,
        *map(row, first),
        "",
        "## All choices",
        "",
        *head,
        *map(row, order),
    ]
    return "\n".join(lines) + "\n"


def _kinds(found: dict[tuple[str, str, str], dict[str, float]], nets: Sequence[str]) -> str:
    """For how many criteria which normalisation is best, by kind of network; reduction "mean"."""
    told = []
    names = [c for c in dict.fromkeys(key[0] for key in found) if not c.startswith("random")]
    for kind, own in (
        ("with", [n for n in nets if n.split(",")[0] not in WITHOUT_BATCH_NORM]),
        ("without", [n for n in nets if n.split(",")[0] in WITHOUT_BATCH_NORM]),
    ):
        if not own:
            continue
        wins = dict.fromkeys(NORMALISATIONS, 0)
        for c in names:
            wins[max(NORMALISATIONS, key=lambda how: float(np.mean([found[c, how, "mean"][n] for n in own])))] += 1
        shown = ", ".join(f"`{how}` for {k}" for how, k in sorted(wins.items(), key=lambda w: -w[1]) if k)
        told.append(f"On those {kind} batch norm the best normalisation of the {len(names)} criteria is {shown}.")
    return " ".join(told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``python -m experiments.papers.default_criterion run --net squeezenet``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("run", "table"))
    parser.add_argument("--net", choices=tuple(NETS), default="digits")
    parser.add_argument("--quantity", choices=("channels", "macs"), default="channels")
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
    done = run(args.net, args.quantity, data.folder(args.data), cells, args.draws, args.pictures, args.seconds)
    print("all cells are done" if done else "the time is over; say the same again to go on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
