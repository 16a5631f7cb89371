"""Few-shot pruning without fine-tuning: every criterion at equal budget, on CIFAR-10.

The setting of Yeom et al. 2021 (arXiv 1912.08881, scenario 2) in small: a
trained residual network, ten pictures per class, filters removed in one global
order and really cut, no training afterwards. Only filters that can be removed
count: the inner convolutions of the blocks (their outer width is held by
zero-padded shortcuts).

Three stages for every network, one cell per cut:

1. ``validate``: every criterion under every layer normalisation, on training
   pictures that serve nothing else;
2. ``test``: every criterion under the normalisation that was best there, on
   the whole test set, for many draws of the ten pictures;
3. ``check``: some cells of the first draw again with products in 32 bits.

>>> from experiments.papers.few_shot_pruning import RATES
>>> RATES
(0.1, 0.2, 0.3, 0.4, 0.5)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import compress
from compress.costs import CostTable
from compress.criteria import Scores
from experiments import data, models
from experiments.experiment import Experiment, Report
from experiments.inference import correct

if TYPE_CHECKING:
    from experiments.study import Study

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
    "ablation (ground truth)": "ablation",
}
#: seen to be constant over draws, apart from the batch norms' new statistics
DATA_FREE = ("weight L1", "weight L2", "FPGM", "batch-norm scale")
#: the drop itself, by one pass per filter; too slow for ResNet-56
GROUND_TRUTH = "ablation (ground truth)"
STAGES = ("validate", "test", "check")


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

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.model: nn.Module = {"resnet20": models.resnet20, "resnet56": models.resnet56}[name](folder).model
        self.example = torch.randn(1, 3, 32, 32)
        self.structure = compress.find_groups(self.model, self.example)
        self.table = CostTable.of(self.model, self.example, self.structure)
        self.train = pictures(folder, "train")

    def score(self, criterion: str, draw: int, batches: Any) -> Scores:
        spec = CRITERIA[criterion].format(draw=draw)
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


@dataclass(frozen=True)
class Part:
    """One stage of one network: which criteria under which normalisations, how often, on which pictures."""

    net: str
    stage: str
    draws: int
    choices: Mapping[str, Sequence[str]]
    rates: Sequence[float]
    precision: str

    def keys(self, criterion: str, draw: int) -> Iterator[tuple[str, str, float, bool]]:
        """Of one score: key, normalisation, rate, whether batch norms get new statistics."""
        for normalisation in self.choices[criterion]:
            for rate in self.rates:
                for again in (False, True):
                    if not again and draw and criterion in DATA_FREE:
                        continue  # the same network for every draw
                    own = f"{criterion}|{normalisation}|{rate}|{again}|{draw}"
                    yield f"{self.net}|{self.stage}|{own}", normalisation, rate, again


def fill(study: Study, part: Part, bench: Bench, on: Pictures) -> None:
    """The cells of a part; a score is made once for all cells that need it, and not where there are none."""
    for draw in study.progress(range(part.draws), f"{part.net}, {part.stage}"):
        batches = functools.cache(lambda draw=draw: reference(bench.train, draw))
        for criterion in part.choices:
            scores = functools.cache(lambda c=criterion, d=draw, b=batches: bench.score(c, d, b()))
            for key, normalisation, rate, again in part.keys(criterion, draw):

                def row(
                    criterion: str = criterion,
                    normalisation: str = normalisation,
                    rate: float = rate,
                    again: bool = again,
                    draw: int = draw,
                    batches: Any = batches,
                    scores: Any = scores,
                ) -> dict[str, Any]:
                    model = bench.cut(scores(), normalisation, rate)
                    if again:
                        model = compress.reestimate(model, batches())
                    return {
                        "net": part.net,
                        "stage": part.stage,
                        "criterion": criterion,
                        "normalisation": normalisation,
                        "rate": rate,
                        "reestimated": again,
                        "draw": draw,
                        "correct": correct(model, on.x, on.y, getattr(torch, part.precision)),
                        "count": len(on.y),
                        "precision": part.precision,
                    }

                study.cell(key, row)


def best_normalisations(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Per criterion the normalisation with the best mean validation accuracy over rates, draws, with and without new
    batch-norm statistics."""
    means: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        means.setdefault(row["criterion"], {}).setdefault(row["normalisation"], []).append(
            row["correct"] / row["count"]
        )
    return {c: (max(by, key=lambda n: (float(np.mean(by[n])), n)),) for c, by in means.items()}


def draws_of(settings: Mapping[str, Any], net: str) -> int:
    """Of the test stage: as many as there are seeds, or the share of them that the settings give the network."""
    share: float = settings["draws_per_seed"].get(net, 1.0)
    return math.ceil(share * int(settings["seeds"]))


def of_stage(rows: Iterable[Mapping[str, Any]], net: str, stage: str) -> list[dict[str, Any]]:
    """Rows of one stage of one network."""
    return [dict(row) for row in rows if (row.get("net"), row.get("stage")) == (net, stage)]


def work(study: Study) -> None:
    """Validate, test and check every network; data are read only where a cell is missing."""
    s = study.settings
    test = functools.cache(lambda: pictures(study.data, "test").take(slice(0, s["test_pictures"])))
    benches = functools.cache(lambda net: Bench(net, study.data))
    for net in s["nets"]:
        bench = functools.partial(benches, net)
        names = [c for c in s["criteria"] if c != GROUND_TRUTH or net in s["ground_truth"]]

        def do(
            stage: str, draws: int, choices: Mapping[str, Sequence[str]], net: str = net, bench: Any = bench
        ) -> None:
            part = Part(net, stage, draws, choices, s["rates"], s["precision"][net][stage])
            if study.has(key for c in choices for d in range(draws) for key, *_ in part.keys(c, d)):
                return
            held = bench().train.take(VALIDATION).take(slice(0, s["validation_pictures"]))
            fill(study, part, bench(), held if stage == "validate" else test())

        every = {name: ("none",) if name == "random" else NORMALISATIONS for name in names}
        do("validate", s["validation_draws"], every)
        best = best_normalisations(of_stage(study.rows, net, "validate"))
        do("test", draws_of(s, net), {name: best[name] for name in names})
        do("check", 1, {name: best[name] for name in s["checked"]})
        study.cell(f"{net}|unpruned", functools.partial(_unpruned, net, bench, test))


def _unpruned(net: str, bench: Callable[[], Bench], on: Callable[[], Pictures]) -> dict[str, Any]:
    right = correct(bench().model, on().x, on().y)
    return {"net": net, "stage": "unpruned", "correct": right, "count": len(on().y), "precision": "float32"}


def _report(study: Study) -> Report:
    from experiments.papers.few_shot_report import report

    return report(study)


_BITS = {"validate": "float32", "test": "bfloat16", "check": "float32"}
EXPERIMENT = Experiment(
    name="few_shot_pruning",
    paper="Yeom et al. 2021, Pruning by Explaining (arXiv 1912.08881), scenario 2",
    question="Which filters of a residual network can go, judged by ten pictures per class and without fine-tuning?",
    full={
        "seeds": 20,
        "draws_per_seed": {"resnet20": 1.0, "resnet56": 0.5},
        "nets": ["resnet20", "resnet56"],
        "criteria": list(CRITERIA),
        "ground_truth": ["resnet20"],
        "checked": ["weight L1", "activation", "LRP epsilon", "LRP z+"],
        "validation_draws": 1,
        "validation_pictures": 500,
        "test_pictures": 10_000,
        "rates": list(RATES),
        # 186 of ResNet-56's validation cells are older and in 32 bits: every row has its own
        "precision": {"resnet20": _BITS, "resnet56": {**_BITS, "validate": "bfloat16"}},
    },
    quick={
        "seeds": 1,
        "draws_per_seed": {"resnet20": 1.0},
        "nets": ["resnet20"],
        "criteria": ["random", "weight L1", "activation", "Taylor, published", "LRP epsilon", "LRP z+"],
        "ground_truth": [],
        "checked": ["LRP epsilon"],
        "validation_draws": 1,
        "validation_pictures": 100,
        "test_pictures": 300,
        "rates": [0.1, 0.3],
        "precision": {"resnet20": _BITS},
    },
    work=work,
    report=_report,
    data=("cifar10", "cifar10_models"),
)
