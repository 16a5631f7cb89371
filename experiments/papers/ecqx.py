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

``python -m experiments run ecqx --data DIR``; ``--part K/N`` deals the cells to
N processes, of one GPU, too.

>>> from experiments.papers.ecqx import ARMS
>>> len(ARMS)
7
"""

from __future__ import annotations

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

import compress
from compress import Rate, WeightRelevance
from experiments import data, models
from experiments.experiment import Experiment, Report
from experiments.study import Study
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
    epochs: int = EPOCHS
    rate: float = LEARNING_RATES[0]

    @classmethod
    def of(cls, study: Study) -> Bench:
        folder, device = study.data, study.device
        raw, y = data.cifar10(folder, "train", TRAINED_ON + HELD_OUT)
        x = data.normalise(raw, models.IMAGENET_MEAN, models.IMAGENET_STD).to(device)
        labels = torch.from_numpy(y).to(device)
        raw_test, y_test = data.cifar10(folder, "test", study.settings["test"] // 1000)
        x_test = data.normalise(raw_test, models.IMAGENET_MEAN, models.IMAGENET_STD).to(device)
        test = list(zip(x_test.split(1000), torch.from_numpy(y_test).to(device).split(1000), strict=True))
        cut, trained = 1000 * TRAINED_ON, study.settings["trained_on"]
        last = cut + study.settings["held_out"]
        held_out = list(zip(x[cut:last].split(1000), labels[cut:last].split(1000), strict=True))
        model = models.resnet20(folder).model.to(device)
        return cls(model, x[:trained], labels[:trained], held_out, test, study.settings["epochs"])

    def quantize(self, arm: str, bits: int, rate: float, seed: int, **options: Any) -> compress.QuantizeResult:
        method, relevance = (ARMS | VARIANTS)[arm]
        batches = Augmented(self.x, self.y, BATCH, torch.Generator().manual_seed(seed))
        train = compress.FineTune(
            batches, epochs=self.epochs, optimizer="adamw", lr=self.rate, weight_decay=0.0, warmup=WARMUP,
            mixed_precision="off", seed=seed, progress=False,
        )  # fmt: skip
        return compress.quantize(
            self.model, batches, method=method, bits=bits, rate=Rate(bits_per_weight=rate), relevance=relevance,
            step=STEPS[bits], train=train, allow_collapse=True, seed=seed, progress=False, **options,
        )  # fmt: skip


def cells_of(
    bits: Sequence[int], seeds: Sequence[int], rates: Sequence[float] | None = None, variants: bool = True
) -> Iterator[tuple[str, str, int, float, int]]:
    """(key, arm, bits, rate, seed), all arms together and seed by seed: what is done at any time can be compared."""
    for group in ([b for b in bits if b != 3], [b for b in bits if b == 3]):
        for seed in seeds:
            for b in group:
                for rate in RATES[b] if rates is None else rates:
                    for arm in ARMS:
                        yield f"{arm}|{b}|{rate}|{seed}", arm, b, rate, seed
    for seed in seeds if variants else ():
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
        "bytes": _bytes(result.model, 3),
        "zeros": result.reached.zeros,
        "bits_per_weight": result.reached.bits_per_weight,
        "gamma": result.gamma,
        "collapsed": list(result.collapsed),
        "relevance": {fate: fates.count(fate) for fate in sorted(set(fates))},
        "loss": None if result.training is None else result.training.losses[-1],
    }


def trials(study: Study, bench: Bench) -> None:
    """Four runs by every learning rate."""
    for lr in LEARNING_RATES:
        for arm, bits, rate in TRIED:

            def cell(lr: float = lr, arm: str = arm, bits: int = bits, rate: float = rate) -> dict[str, Any]:
                bench.rate = lr
                found = entry(bench.quantize(arm, bits, rate, 100), [], bench.held_out)
                return {"stage": "trial", "learning_rate": lr, "arm": arm, "bits": bits, "rate": rate, **found}

            study.cell(f"trial|{lr}|{arm}|{bits}|{rate}", cell)


def best_rate(rows: Sequence[dict[str, Any]]) -> float:
    """The learning rate of the best mean accuracy on pictures that were not trained on; the first without trials."""
    means = {lr: [r["held_out"] for r in rows if r["learning_rate"] == lr] for lr in LEARNING_RATES}
    return max(LEARNING_RATES, key=lambda lr: float(np.mean(means[lr])) if means[lr] else 0.0)


def runs(study: Study, bench: Bench) -> None:
    """All arms at all rates by all seeds; a run that fails is a result, too."""
    s = study.settings
    todo = list(cells_of(s["bits"], study.seeds, s["rates"], s["variants"]))
    for key, arm, bits, rate, seed in study.progress(todo, "runs"):

        def cell(arm: str = arm, bits: int = bits, rate: float = rate, seed: int = seed) -> dict[str, Any]:
            began = time.monotonic()
            where = {"device": bench.x.device.type, "torch": torch.__version__}
            about = {"stage": "run", "arm": arm, "bits": bits, "rate": rate, "seed": seed, "learning_rate": bench.rate}
            try:
                result = bench.quantize(arm, bits, rate, seed)
            except LRPError as error:
                return {**about, **where, "failed": str(error)}
            found = entry(result, bench.test, bench.held_out)
            return {**about, **where, **found, "seconds": round(time.monotonic() - began, 2)}

        study.cell(f"run|{key}", cell)


def rounding(study: Study, bench: Bench) -> None:
    """The post-training baselines, with and without new batch-norm statistics from the training pictures."""
    batches = list(zip(bench.x.split(500), bench.y.split(500), strict=True))[:4]
    for bits in sorted(study.settings["bits"]):
        for method in ROUNDED:
            for new in (False, True):

                def cell(method: str = method, bits: int = bits, new: bool = new) -> dict[str, Any]:
                    result = compress.quantize(
                        bench.model, batches, method=method, bits=bits, reestimate_batchnorm=new, progress=False
                    )
                    found = entry(result, bench.test, bench.held_out)
                    return {"stage": "rounding", "arm": method, "bits": bits, "reestimated": new, **found}

                study.cell(f"rounding|{method}|{bits}|{new}", cell)


def _bytes(model: nn.Module, blocks: int) -> int:
    """Of the file, which was written and gave the same network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        compress.save(model, path)
        state = compress.load(path, lambda: models.CifarResNet(blocks)).state_dict()
        if not all(torch.equal(t.cpu(), state[n].cpu()) for n, t in model.state_dict().items()):
            raise AssertionError("a file gave another network")
        return path.stat().st_size


def work(study: Study) -> None:
    """Trials, runs, then the baselines without training."""
    torch.backends.cudnn.benchmark = True  # two sizes of batches
    bench = Bench.of(study)
    if study.settings["trials"]:
        trials(study, bench)
    bench.rate = best_rate([row for row in study.rows if row["stage"] == "trial"])
    for row in study.rows:
        if row["stage"] == "run":
            bench.rate = row["learning_rate"]  # one for all
    if study.settings["rounding"]:
        rounding(study, bench)
    runs(study, bench)


def report(study: Study) -> Report:
    """See :mod:`experiments.papers.ecqx_report`."""
    from experiments.papers.ecqx_report import report

    return report(study)


EXPERIMENT = Experiment(
    "ecqx",
    "Becking et al. 2022 (ECQx)",
    "At equal bytes, does relevance make a quantized ResNet-20 more accurate?",
    full={"seeds": SEEDS, "bits": [4, 2, 3], "trained_on": 10_000, "epochs": EPOCHS, "test": 10_000, "trials": True,
          "rates": None, "variants": True, "rounding": True, "held_out": 2000},
    quick={"seeds": 1, "bits": [4], "trained_on": 500, "epochs": 1, "test": 1000, "trials": False,
           "rates": [1.4], "variants": False, "rounding": False, "held_out": 100},
    work=work,
    report=report,
    data=("cifar10", "cifar10_models"),
)  # fmt: skip
