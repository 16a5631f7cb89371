"""Few-shot pruning without fine-tuning: every criterion at equal budget, on CIFAR-10.

The setting of Yeom et al. 2021 (arXiv 1912.08881, scenario 2) in small: a
trained residual network, ten pictures per class, filters removed in one global
order and really cut, no training afterwards. Only filters that can be removed
count: the inner convolutions of the blocks (their outer width is held by
zero-padded shortcuts).

Four stages, the first three resumable, one line per finished cell:

1. ``validate``: every criterion under every layer normalisation, on training
   pictures that serve nothing else;
2. ``test``: every criterion under the normalisation that was best there, on
   the whole test set, for many draws of the ten pictures;
3. ``check``: some cells of the first draw again with products in 32 bits;
4. ``table``: means and standard errors, a figure, and the conclusion in words.

>>> from experiments.papers.few_shot_pruning import RATES
>>> RATES
(0.1, 0.2, 0.3, 0.4, 0.5)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import compress
from compress.costs import CostTable
from compress.criteria import Scores
from experiments import data, models
from experiments.cells import Cells
from experiments.inference import correct

RATES = (0.1, 0.2, 0.3, 0.4, 0.5)
NORMALISATIONS = ("none", "sum", "l2", "mean")
PER_CLASS = 10
REFERENCE, VALIDATION = slice(0, 45_000), slice(45_000, 50_000)  # of the training pictures

#: name in the tables to the criterion's name; "{draw}" is the number of the draw
CRITERIA = {
    "random": "random:{draw}",
    "weight L1": "weight:l1",
    "weight L2": "weight:l2",
    "FPGM": "fpgm",
    "batch-norm scale": "batchnorm_scale",
    "activation": "activation",
    "gradient, published": "gradient:abs_total",
    "gradient, per sample": "gradient:abs_per_sample",
    "Taylor, published": "taylor:abs_total",
    "Taylor, per sample": "taylor:abs_per_sample",
    "weight Taylor": "taylor:weight",
    "Hessian": "hessian",
    "logit x activation": "logit_x_activation",
    "LRP epsilon": "lrp:epsilon",
    "LRP z+": "lrp:zplus",
    "LRP z+, signed": "lrp:zplus:signed",
    "LRP gamma": "lrp:gamma",
    "LRP alpha2-beta1": "lrp:alpha_beta",
    "LRP epsilon-plus": "lrp:epsilon_plus",
}
#: seen to be constant over draws, apart from the batch norms' new statistics
DATA_FREE = ("weight L1", "weight L2", "FPGM", "batch-norm scale")
#: taken again in 32 bits
CHECKED = ("weight L1", "activation", "LRP epsilon", "LRP z+")
#: the drop itself, by one pass per filter; too slow for ResNet-56
GROUND_TRUTH = {"ablation (ground truth)": "ablation"}


@dataclass(frozen=True)
class Pictures:
    x: Tensor
    y: Tensor

    def take(self, index: Any) -> Pictures:
        return Pictures(self.x[index], self.y[index])


def pictures(folder: Path, split: str) -> Pictures:
    """Normalised pictures (N, 3, 32, 32) and labels."""
    raw, y = data.cifar10(folder, split)
    return Pictures(data.normalise(raw, models.IMAGENET_MEAN, models.IMAGENET_STD), torch.from_numpy(y))


def reference(train: Pictures, draw: int) -> list[tuple[Tensor, Tensor]]:
    """Ten pictures per class, drawn with the draw's seed, as one batch."""
    generator = np.random.default_rng(draw)
    pool = train.take(REFERENCE)
    y = pool.y.numpy()
    index = np.concatenate([generator.choice(np.flatnonzero(y == k), PER_CLASS, replace=False) for k in range(10)])
    return [(pool.x[index], pool.y[index])]


class Bench:
    """One network, and all that is the same for every cell."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.name = name
        self.model: nn.Module = {"resnet20": models.resnet20, "resnet56": models.resnet56}[name](folder).model
        self.example = torch.randn(1, 3, 32, 32)
        self.structure = compress.find_groups(self.model, self.example)
        self.table = CostTable.of(self.model, self.example, self.structure)
        self.train = pictures(folder, "train")

    def score(self, criterion: str, draw: int, batches: Any) -> Scores:
        spec = (CRITERIA | GROUND_TRUTH)[criterion].format(draw=draw)
        return compress.score(
            self.model, self.example, batches, criterion=spec, structure=self.structure, progress=False
        )

    def cut(self, scores: Scores, normalisation: str, rate: float) -> nn.Module:
        """The network without a share of its prunable filters; no floor but one filter per layer, no rounding."""
        plan = compress.plan_pruning(
            self.model,
            self.example,
            criterion="weight",
            scores=scores,
            target=compress.Target(channels=1 - rate),
            normalisation=normalisation,
            floor=1,
            round_to=1,
            structure=self.structure,
            table=self.table,
        )
        return plan.apply(self.model)


def run_cells(
    bench: Bench,
    cells: Cells,
    draws: int,
    choices: dict[str, Sequence[str]],
    on: Pictures,
    seconds: float,
    precision: str = "float32",
) -> bool:
    """Fill the cells draw by draw; False when the time is over before all are done."""
    start = time.monotonic()
    for draw in range(draws):
        batches = reference(bench.train, draw)
        for criterion, normalisations in choices.items():
            keys = list(_keys(criterion, normalisations, draw))
            if all(key in cells.rows for key, *_ in keys):
                continue
            if time.monotonic() - start > seconds:
                return False
            scores = bench.score(criterion, draw, batches)
            for key, normalisation, rate, estimated in keys:
                if key in cells.rows:
                    continue
                model = bench.cut(scores, normalisation, rate)
                if estimated:
                    model = compress.reestimate(model, batches)
                cells.add(
                    key,
                    criterion=criterion,
                    normalisation=normalisation,
                    rate=rate,
                    reestimated=estimated,
                    draw=draw,
                    correct=correct(model, on.x, on.y, getattr(torch, precision)),
                    count=len(on.y),
                    precision=precision,
                )
    return True


def _keys(criterion: str, normalisations: Sequence[str], draw: int) -> Iterator[tuple[str, str, float, bool]]:
    for normalisation in normalisations:
        for rate in RATES:
            for estimated in (False, True):
                if not estimated and draw and criterion in DATA_FREE:
                    continue  # the same network for every draw
                yield f"{criterion}|{normalisation}|{rate}|{estimated}|{draw}", normalisation, rate, estimated


def best_normalisations(cells: Cells) -> dict[str, tuple[str, ...]]:
    """Per criterion the normalisation with the best mean validation accuracy over rates, draws, with and without new
    batch-norm statistics."""
    means: dict[str, dict[str, list[float]]] = {}
    for row in cells.rows.values():
        means.setdefault(row["criterion"], {}).setdefault(row["normalisation"], []).append(
            row["correct"] / row["count"]
        )
    return {c: (max(by, key=lambda n: (float(np.mean(by[n])), n)),) for c, by in means.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``python -m experiments.papers.few_shot_pruning STAGE --net resnet20``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("validate", "test", "check", "table"))
    parser.add_argument("--net", choices=("resnet20", "resnet56"), default="resnet20")
    parser.add_argument("--data", default=None)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the test passes")
    parser.add_argument("--pictures", type=int, default=1000, help="validation pictures")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these, at a whole cell")
    parser.add_argument("-o", "--output", type=Path, default=Path("experiments/results/few_shot_pruning"))
    args = parser.parse_args(arguments)
    if args.stage == "table":
        from experiments.papers.few_shot_report import write

        write(args.output)
        return 0
    bench = Bench(args.net, data.folder(args.data), args.threads)
    truth = GROUND_TRUTH if args.net == "resnet20" else {}
    names = [*CRITERIA, *truth]
    validation = Cells(args.output / f"{args.net}-validation.jsonl")
    if args.stage == "validate":
        on = bench.train.take(VALIDATION).take(slice(0, args.pictures))
        choices: dict[str, Sequence[str]] = {name: ("none",) if name == "random" else NORMALISATIONS for name in names}
        done = run_cells(bench, validation, args.draws, choices, on, args.seconds, args.precision)
    else:
        chosen = best_normalisations(validation)
        cells = Cells(args.output / f"{args.net}-test.jsonl")
        on = pictures(data.folder(args.data), "test")
        best: dict[str, Sequence[str]] = {n: chosen[n] for n in names if n in chosen}
        if args.stage == "check":
            cells, args.draws, args.precision = Cells(args.output / f"{args.net}-float32.jsonl"), 1, "float32"
            best = {n: best[n] for n in CHECKED}
        done = run_cells(bench, cells, args.draws, best, on, args.seconds, args.precision)
    print("all cells are done" if done else "the time is over; say the same again to go on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
