"""ECQx against ECQ and controls at equal bytes: ResNet-20 on CIFAR-10, low bits, five seeds.

The published claim (D. Becking et al., "ECQx", 2022): relevance, put into the
cost of the level zero, gives more accuracy at the same size. Released code and
paper compare at equal gamma, where ECQx has fewer zeros. Here every run is held
to a rate, the entropy of its levels, so that all arms take the same bytes; the
controls put magnitude, gradient times weight, and LRP's own values dealt to
other weights of the tensor, into the same machinery.

Every run starts from the same trained network and is trained for five epochs on
the first 10,000 training pictures; its seed sets the order of the pictures,
their crops and flips, and the permutation of the random arm. The learning rate is
the one of three that leaves the best mean accuracy of four runs of another seed,
on 2,000 pictures that no run is trained on (the starting network was); the other
settings are the defaults of ``compress.quantize``. Nothing is chosen on the test
pictures.

Stages, all resumable: ``trial`` for the learning rate, ``run`` fills in cells,
``bytes`` measures the files of runs that were made elsewhere and whose levels were
kept, ``rounding`` adds the baselines without training, ``table`` writes the page.

>>> from experiments.papers.ecqx import ARMS
>>> len(ARMS)
7
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import compress
from compress import QuantizationPlan, Rate, WeightRelevance
from compress.codebook import codebook_of
from compress.quantizer import choose_tensors
from experiments import data, models
from experiments.cells import Cells
from lrp.errors import LRPError

SEEDS = 5
TRAINED_ON = 10  # thousands of the training pictures
HELD_OUT = 2  # thousands after them; the network all runs start from has seen these, too
EPOCHS, BATCH, WARMUP = 5, 128, 0.1
LEARNING_RATES = (1e-3, 3e-4, 1e-4)
TRIED = (("ECQ", 4, 1.4), ("ECQ", 2, 0.6), ("ECQx, background", 4, 1.4), ("ECQx, background", 2, 0.6))

#: bits per weight that every arm is held to, by the bits of its codebook
RATES = {4: (2.6, 1.4, 0.9, 0.6), 2: (1.0, 0.6, 0.4, 0.25), 3: (1.2, 0.6, 0.35)}
#: with the percentile, two bits round 94 % of the weights to zero before any training
STEPS = {2: "mse", 3: "percentile", 4: "percentile"}

#: name in the tables: method, and how it is told what matters
ARMS: dict[str, tuple[str, WeightRelevance | None]] = {
    "ECQ": ("ecq", None),
    "ECQx, background": ("ecqx", WeightRelevance(at="background")),
    "ECQx, quantized + step": ("ecqx", WeightRelevance(at="quantized_jitter")),
    "ECQx, quantized": ("ecqx", WeightRelevance(at="quantized")),
    "magnitude": ("magnitude", None),
    "gradient x weight": ("gradient", None),
    "random relevance": ("random", WeightRelevance(at="background")),
}
#: at two rates: relevance after every step, as published, and steadier relevance
VARIANTS: dict[str, tuple[str, WeightRelevance | None]] = {
    "ECQx, quantized + step, every step": ("ecqx", WeightRelevance(at="quantized_jitter", every=1)),
    "ECQx, background, momentum 0.9": ("ecqx", WeightRelevance(at="background", momentum=0.9)),
}
VARIED = ((4, 0.9), (2, 0.6))
ROUNDED = ("rtn", "rtn_per_channel", "mse", "mse_per_channel")


@dataclass
class Augmented:
    """Batches of an epoch: new order, crops from four pixels of padding, flips; all on one device.

    The generator's state goes along with the training's.
    """

    x: Tensor
    y: Tensor
    batch: int
    generator: torch.Generator

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, size = len(self.y), self.x.shape[-1]
        order = torch.randperm(n, generator=self.generator)
        shift = torch.randint(0, 9, (n, 2), generator=self.generator)
        flip = torch.rand(n, generator=self.generator) < 0.5
        place = self.x.device
        order, shift, flip = (t.to(place) for t in (order, shift, flip))
        span = torch.arange(size, device=place)
        for rows in torch.arange(n, device=place).tensor_split(len(self)):
            padded = F.pad(self.x[order[rows]], (4, 4, 4, 4))
            down = (shift[rows, 0, None] + span)[:, :, None]
            right = shift[rows, 1, None] + span
            right = torch.where(flip[rows, None], right.flip(1), right)[:, None, :]
            # indices of three axes bring the channels to the end
            cut = padded[torch.arange(len(rows), device=place)[:, None, None], :, down, right]
            yield cut.permute(0, 3, 1, 2).contiguous(), self.y[order[rows]]


@dataclass
class Bench:
    """The network and the pictures, the same for all cells."""

    model: nn.Module
    x: Tensor
    y: Tensor
    held_out: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    rate: float = LEARNING_RATES[0]

    @classmethod
    def of(cls, folder: Path, device: str) -> Bench:
        raw, y = data.cifar10(folder, "train", TRAINED_ON + HELD_OUT)
        x = data.normalise(raw, models.IMAGENET_MEAN, models.IMAGENET_STD).to(device)
        labels = torch.from_numpy(y).to(device)
        raw_test, y_test = data.cifar10(folder, "test")
        x_test = data.normalise(raw_test, models.IMAGENET_MEAN, models.IMAGENET_STD).to(device)
        test = list(zip(x_test.split(1000), torch.from_numpy(y_test).to(device).split(1000), strict=True))
        cut = 1000 * TRAINED_ON
        held_out = list(zip(x[cut:].split(1000), labels[cut:].split(1000), strict=True))
        return cls(models.resnet20(folder).model.to(device), x[:cut], labels[:cut], held_out, test)

    def quantize(self, arm: str, bits: int, rate: float, seed: int, **options: Any) -> compress.QuantizeResult:
        method, relevance = (ARMS | VARIANTS)[arm]
        batches = Augmented(self.x, self.y, BATCH, torch.Generator().manual_seed(seed))
        train = compress.FineTune(
            batches, epochs=EPOCHS, optimizer="adamw", lr=self.rate, weight_decay=0.0, warmup=WARMUP,
            mixed_precision="off", seed=seed, progress=False,
        )  # fmt: skip
        return compress.quantize(
            self.model, batches, method=method, bits=bits, rate=Rate(bits_per_weight=rate), relevance=relevance,
            step=STEPS[bits], train=train, allow_collapse=True, seed=seed, progress=False, **options,
        )  # fmt: skip


def cells_of(bits: Sequence[int], seeds: Sequence[int]) -> Iterator[tuple[str, str, int, float, int]]:
    """(key, arm, bits, rate, seed), all arms together and seed by seed: what is done at any time can be compared."""
    for group in ([b for b in bits if b != 3], [b for b in bits if b == 3]):
        for seed in seeds:
            for b in group:
                for rate in RATES[b]:
                    for arm in ARMS:
                        yield f"{arm}|{b}|{rate}|{seed}", arm, b, rate, seed
    for seed in seeds:
        for b, rate in VARIED:
            for arm in VARIANTS if b in bits else ():
                yield f"{arm}|{b}|{rate}|{seed}", arm, b, rate, seed


def entry(result: compress.QuantizeResult, on: Sequence[tuple[Tensor, Tensor]], held_out: Any) -> dict[str, Any]:
    """What is kept of a run."""
    fates = [s.relevance for s in result.states.values()]
    test = compress.evaluate(result.model, on) if on else None
    return {
        **({} if test is None else {"correct": round(test.accuracy * test.count), "count": test.count}),
        "held_out": compress.evaluate(result.model, held_out).accuracy,
        "bytes": result.reached.bytes,
        "zeros": result.reached.zeros,
        "bits_per_weight": result.reached.bits_per_weight,
        "gamma": result.gamma,
        "collapsed": list(result.collapsed),
        "relevance": {fate: fates.count(fate) for fate in sorted(set(fates))},
        "loss": None if result.training is None else result.training.losses[-1],
    }


def run(
    bench: Bench, cells: Cells, todo: Sequence[tuple[str, str, int, float, int]], seconds: float, keep: Any
) -> bool:
    """Fill in the cells; False when the time is over before all are done."""
    start = time.monotonic()
    for key, arm, bits, rate, seed in todo:
        if key in cells.rows:
            continue
        if time.monotonic() - start > seconds:
            return False
        began = time.monotonic()
        where = {"device": bench.x.device.type, "torch": torch.__version__}
        about = {"arm": arm, "bits": bits, "rate": rate, "seed": seed, "learning_rate": bench.rate, **where}
        try:
            result = bench.quantize(arm, bits, rate, seed)
        except LRPError as error:  # a run that fails is a result, too
            cells.add(key, **about, failed=str(error))
            continue
        found = entry(result, bench.test, bench.held_out)
        cells.add(key, **about, **found, seconds=round(time.monotonic() - began, 2))
        if keep is not None:
            keep(key, result)
    return True


def trial(bench: Bench, cells: Cells, part: int, parts: int) -> None:
    """Four runs by every learning rate."""
    todo = [(lr, *tried) for lr in LEARNING_RATES for tried in TRIED]
    for lr, arm, bits, rate in todo[part::parts]:
        key = f"{lr}|{arm}|{bits}|{rate}"
        if key not in cells.rows:
            bench.rate = lr
            found = entry(bench.quantize(arm, bits, rate, 100), [], bench.held_out)
            cells.add(key, learning_rate=lr, arm=arm, bits=bits, rate=rate, **found)


def best_rate(rows: Sequence[dict[str, Any]]) -> float:
    """The learning rate of the best mean accuracy on pictures that were not trained on; the first without trials."""
    means = {lr: [r["held_out"] for r in rows if r["learning_rate"] == lr] for lr in LEARNING_RATES}
    return max(LEARNING_RATES, key=lambda lr: float(np.mean(means[lr])) if means[lr] else 0.0)


def rounding(bench: Bench, cells: Cells) -> None:
    """The post-training baselines, with and without new batch-norm statistics from the training pictures."""
    batches = list(zip(bench.x.split(500), bench.y.split(500), strict=True))[:4]
    for bits in sorted(RATES):
        for method in ROUNDED:
            for new in (False, True):
                key = f"{method}|{bits}|{new}"
                if key not in cells.rows:
                    result = compress.quantize(
                        bench.model, batches, method=method, bits=bits, reestimate_batchnorm=new, progress=False
                    )
                    cells.add(key, arm=method, bits=bits, reestimated=new, **entry(result, bench.test, bench.held_out))


class Kept:
    """The whole numbers and floats of every run, packed, so that files can be measured elsewhere."""

    def __init__(self, path: Path) -> None:
        self.path, self.held = path, {}  # type: ignore[var-annotated]  # name to array
        self.saved = time.monotonic()

    def __call__(self, key: str, result: compress.QuantizeResult) -> None:
        model = copy.deepcopy(result.model).cpu()
        indices = result.plan.indices(model)
        for name, t in model.state_dict().items():
            self.held[f"{key}/{name}"] = (indices[name].to(torch.int8) if name in indices else t).numpy()
        if time.monotonic() - self.saved > 30:
            self.save()

    def save(self) -> None:
        np.savez_compressed(self.path, **self.held)
        self.saved = time.monotonic()


def measured(model: nn.Module, cells: Cells, paths: Sequence[Path]) -> int:
    """Bytes of the files of runs whose levels were kept, each written and read again; their number."""
    count = 0
    original = {name: t.clone() for name, t in model.state_dict().items()}
    for path in paths:
        with np.load(path) as held:
            names: dict[str, list[str]] = {}
            for full in held.files:
                key, _, name = full.rpartition("/")
                names.setdefault(key, []).append(name)
            for key, tensors in tqdm(names.items(), desc=path.name, disable=None):
                row = cells.rows.get(key)
                if row is None or "failed" in row:
                    continue
                twin = copy.deepcopy(model)
                chosen, left_out = choose_tensors(twin, row["bits"])
                books = {n: codebook_of(original[n], b, step=STEPS[row["bits"]]) for n, b in chosen.items()}
                state = {n: torch.from_numpy(held[f"{key}/{n}"]) for n in tensors}
                levels = {n: book.values(state[n].long()) for n, book in books.items()}
                twin.load_state_dict({**state, **levels})
                QuantizationPlan(books, left_out, {"method": ARMS[row["arm"]][0]}).apply(twin)
                cells.add(key, **{k: v for k, v in row.items() if k not in ("key", "bytes")}, bytes=_read_again(twin))
                count += 1
    return count


def _read_again(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        compress.save(model, path)
        again = compress.load(path, lambda: models.CifarResNet(3))
        state = again.state_dict()
        if not all(torch.equal(t, state[n]) for n, t in model.state_dict().items()):
            raise AssertionError("a file gave another network")
        return path.stat().st_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``python -m experiments.papers.ecqx STAGE``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("trial", "run", "bytes", "rounding", "table"))
    parser.add_argument("--data", default=None)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument(
        "--part", default="0/1", metavar="K/N", help="every N-th cell from the K-th, to a file of its own"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these, at a whole cell")
    parser.add_argument("--keep", type=Path, nargs="+", help="a .npz for the levels of every run; of 'bytes': several")
    parser.add_argument("-o", "--output", type=Path, default=Path("experiments/results/ecqx"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.stage == "table":
        from experiments.papers.ecqx_report import write

        write(args.output)
        return 0
    if args.stage == "bytes":
        model = models.resnet20(data.folder(args.data)).model
        print(f"{measured(model, Cells(args.output / 'runs.jsonl'), args.keep or [])} files measured")
        return 0
    bench = Bench.of(data.folder(args.data), args.device)
    if args.stage == "rounding":
        rounding(bench, Cells(args.output / "rounding.jsonl"))
        return 0
    torch.backends.cudnn.benchmark = True  # two sizes of batches
    part, parts = (int(n) for n in args.part.split("/"))
    if args.stage == "trial":
        trial(bench, Cells(args.output / ("trial.jsonl" if parts == 1 else f"trial-{part}.jsonl")), part, parts)
        return 0
    trials = [row for path in sorted(args.output.glob("trial*.jsonl")) for row in Cells(path).rows.values()]
    bench.rate = best_rate(trials)
    cells = Cells(args.output / ("runs.jsonl" if parts == 1 else f"runs-{part}.jsonl"))
    for row in cells.rows.values():
        bench.rate = row["learning_rate"]  # one for all
    keep = None if args.keep is None else Kept(args.keep[0])
    todo = list(cells_of(args.bits, args.seeds))[part::parts]
    done = run(bench, cells, todo, args.seconds, keep)
    if keep is not None:
        keep.save()
    print("all cells are done" if done else "the time is over; say the same again to go on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
