"""How few pictures does a criterion need? Few-shot pruning of a plain VGG-like network and of a residual one.

Scenario 2 of Yeom et al. 2021 (arXiv 1912.08881) in small: one, two, five, ten or twenty pictures per class, filters
removed in one global order and really cut, no fine-tuning. In a chain of convolutions and ReLUs the relevance of the
z+ rule has one sign, so signed and absolute scores should be the same; sums over residual branches end that. Pictures
of a draw are nested: those of one size are among those of the next. Four kinds of cells:

* ``validate``: every criterion under every layer normalisation, on training pictures that serve nothing else;
* ``test``: every criterion under the normalisation that was best there;
* ``signs``: how far signed scores lie from absolute ones;
* ``mask``: cut networks beside masked ones, and beside the published mask that leaves the batch norms as they are.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import compress
from compress.costs import CostTable
from compress.criteria import Scores
from experiments import inference, models, vgg
from experiments.experiment import Experiment, Report
from experiments.papers.few_shot_pruning import (
    NORMALISATIONS,
    REFERENCE,
    VALIDATION,
    Pictures,
    best_normalisations,
    of_stage,
    pictures,
)

if TYPE_CHECKING:
    from experiments.study import Study

Batches = list[tuple[Tensor, Tensor]]

#: name in the tables to the criterion's name; "{draw}" is the number of the draw
CRITERIA = {
    "random": "random:{draw}",
    "weight L1": "weight:l1",
    "activation": "activation",
    "gradient, published": "gradient:abs_total",
    "Taylor, published": "taylor:abs_total",
    "Taylor, per sample": "taylor:abs_per_sample",
    "LRP z+": "lrp:zplus",
    "LRP z+, signed": "lrp:zplus:signed",
    "LRP epsilon": "lrp:epsilon",
    "LRP epsilon, signed": "lrp:epsilon:signed",
}
#: the same order whatever the pictures; only new statistics of the batch norms depend on them
NO_PICTURES = ("random", "weight L1")
#: of each pair the differences of scores are looked at
PAIRS = {"z+": ("lrp:zplus", "lrp:zplus:signed"), "epsilon": ("lrp:epsilon", "lrp:epsilon:signed")}


def nested(train: Pictures, draw: int, per_class: int) -> Batches:
    """The first pictures per class of the draw's order, as one batch."""
    generator = np.random.default_rng(1000 + draw)
    order = generator.permutation(REFERENCE.stop)
    y = train.y[order].numpy()
    index = torch.from_numpy(np.concatenate([order[y == k][:per_class] for k in range(10)]))
    return [(train.x[index], train.y[index])]


@dataclass(frozen=True)
class Bench:
    """One network, its groups and costs, and a way to count what it gets right."""

    model: nn.Module
    correct: Callable[[Any, Tensor, Tensor], int]
    train: Pictures
    structure: compress.Structure
    table: CostTable

    @classmethod
    def of(cls, model: nn.Module, correct: Callable[[Any, Tensor, Tensor], int], train: Pictures) -> Bench:
        structure = compress.find_groups(model, train.x[:1])
        return cls(model, correct, train, structure, CostTable.of(model, train.x[:1], structure))

    def score(self, spec: str, batches: Batches) -> Scores:
        example = self.train.x[:1]
        return compress.score(
            self.model, example, batches, criterion=spec, structure=self.structure, progress=False
        )  # fmt: skip

    def plan(self, scores: Scores, normalisation: str, rate: float) -> compress.PruningPlan:
        """A share of the prunable filters goes; no floor but one filter per layer, no rounding."""
        return compress.plan_pruning(
            self.model, self.train.x[:1], criterion="weight", scores=scores,
            target=compress.Target(channels=1 - rate), normalisation=normalisation, floor=1, round_to=1,
            structure=self.structure, table=self.table,
        )  # fmt: skip


Benches = Callable[[str], Bench]


def _fast(model: Any, x: Tensor, y: Tensor) -> int:
    return inference.correct(model, x, y, torch.bfloat16)


def trained(study: Study, train: Pictures) -> vgg.VGG:
    """The VGG-like network of the settings, trained once and kept in the cache of the study."""
    s = study.settings["vgg"]
    part = train.take(slice(0, 1000 * s["thousands"]))
    state = study.folder / "cache" / "vgg.state"

    def make() -> Mapping[str, Tensor]:
        state.parent.mkdir(parents=True, exist_ok=True)
        model = vgg.train(
            part.x, part.y, widths=s["widths"], epochs=s["epochs"], seed=s["seed"], device=study.device, resume=state
        )
        return model.state_dict()

    model = vgg.VGG(s["widths"])
    model.load_state_dict(study.weights("vgg", make))
    state.unlink(missing_ok=True)
    return model.eval()


def keys(settings: Mapping[str, Any], net: str, stage: str, criterion: str, draw: int, size: int,
         normalisations: Sequence[str]) -> Iterator[tuple[str, str, float, bool]]:  # fmt: skip
    """Of one score: key, normalisation, rate, whether batch norms get new statistics.

    What no picture has a part in stands once, at the first size; and, but for random, at the first draw.
    """
    first = settings["per_class"][0] if stage == "test" else size
    for normalisation in normalisations:
        for rate in settings["nets"][net]["rates"]:
            for again in (False, True):
                fixed = not again and criterion in NO_PICTURES
                if fixed and (size != first or (draw and criterion != "random")):
                    continue
                yield (
                    f"{net}|{stage}|{criterion}|{normalisation}|{rate}|{again}|{draw}|{size}",
                    normalisation,
                    rate,
                    again,
                )


def work(study: Study) -> None:
    """Draw by draw, so that a stop leaves whole draws; data and networks are read only where a cell is missing."""
    s = study.settings
    train = functools.cache(lambda: pictures(study.data, "train"))
    test = functools.cache(lambda: pictures(study.data, "test").take(slice(0, s["test_pictures"])))

    @functools.cache
    def bench(net: str) -> Bench:
        if net == "vgg":
            return Bench.of(trained(study, train()), vgg.correct, train())
        return Bench.of(models.resnet20(study.data).model, _fast, train())

    held = functools.cache(lambda: train().take(VALIDATION).take(slice(0, s["validation"]["pictures"])))
    for net in s["nets"]:
        study.cell(f"{net}|unpruned", functools.partial(_unpruned, net, bench, test))
        every = {c: ("none",) if c == "random" else NORMALISATIONS for c in s["nets"][net]["criteria"]}
        for draw in range(s["validation"]["draws"]):
            _fill(study, net, "validate", draw, s["validation"]["per_class"], every, bench, held)
    for draw in study.progress(study.seeds, "draws"):
        for net, own in s["nets"].items():
            if draw >= math.ceil(study.settings["seeds"] * own["draws_per_seed"]):
                continue
            best = best_normalisations(of_stage(study.rows, net, "validate"))
            for size in s["per_class"]:
                _fill(study, net, "test", draw, size, best, bench, test)
                for rule in PAIRS:
                    key = f"{net}|signs|{rule}|{draw}|{size}"
                    study.cell(key, functools.partial(_signs, net, rule, draw, size, bench))
    for net in s["nets"]:
        for criterion, rate in ((c, r) for c in s["masked"] for r in s["nets"][net]["rates"]):
            study.cell(f"{net}|mask|{criterion}|{rate}", functools.partial(_mask, net, criterion, rate, bench, test))


def _fill(study: Study, net: str, stage: str, draw: int, size: int, choices: Mapping[str, Sequence[str]],
          bench: Benches, on: Callable[[], Pictures]) -> None:  # fmt: skip
    """The cells of one draw and size."""
    batches = functools.cache(lambda: nested(bench(net).train, draw, size))
    for criterion, normalisations in choices.items():
        spec = CRITERIA[criterion].format(draw=draw)
        scores = functools.cache(lambda spec=spec: bench(net).score(spec, batches()))
        for key, normalisation, rate, again in keys(study.settings, net, stage, criterion, draw, size, normalisations):

            def row(c: str = criterion, n: str = normalisation, r: float = rate, again: bool = again,
                    scores: Callable[[], Scores] = scores) -> dict[str, Any]:  # fmt: skip
                plan = bench(net).plan(scores(), n, r)
                model = plan.apply(bench(net).model)
                if again:
                    model = compress.reestimate(model, batches())
                right = bench(net).correct(model, on().x, on().y)
                return {
                    "net": net, "stage": stage, "criterion": c, "normalisation": n, "rate": r, "reestimated": again,
                    "draw": draw, "per_class": size, "correct": right, "count": len(on().y),
                    "macs": plan.after.macs / plan.before.macs, "params": plan.after.params / plan.before.params,
                }  # fmt: skip

            study.cell(key, row)


def _unpruned(net: str, made: Benches, on: Callable[[], Pictures]) -> dict[str, Any]:
    bench = made(net)
    widths = {group.name: group.width for group in bench.structure.prunable}
    right = bench.correct(bench.model, on().x, on().y)
    return {"net": net, "stage": "unpruned", "correct": right, "count": len(on().y), "filters": widths}


def _signs(net: str, rule: str, draw: int, size: int, made: Benches) -> dict[str, Any]:
    """Largest difference of signed from absolute scores, beside the largest absolute score of the layer."""
    bench = made(net)
    batches = nested(bench.train, draw, size)
    absolute, signed = (bench.score(spec, batches).values for spec in PAIRS[rule])
    gaps = [float((signed[n] - v).abs().max() / v.abs().max()) for n, v in absolute.items() if float(v.abs().max()) > 0]
    return {"net": net, "stage": "signs", "rule": rule, "draw": draw, "per_class": size, "difference": max(gaps)}


def published_mask(model: nn.Module, removed: Mapping[str, Sequence[int]], layers: Mapping[str, str]) -> nn.Module:
    """Weights of the removed filters are zero; the batch norm after them still gives its constant.

    Parameters
    ----------
    model : nn.Module
    removed : dict
        Group to filters.
    layers : dict
        Group to its one convolution.
    """
    out = copy.deepcopy(model)
    with torch.no_grad():
        for group, filters in removed.items():
            weight: Any = out.get_submodule(layers[group]).weight
            weight[list(filters)] = 0
    return out


def _mask(net: str, criterion: str, rate: float, made: Benches, test: Callable[[], Pictures]) -> dict[str, Any]:
    """Logits in float32 of the cut network against two masks, and what the published one gets right."""
    bench, on = made(net), test()
    batches = nested(bench.train, 0, 10)
    plan = bench.plan(bench.score(CRITERIA[criterion].format(draw=0), batches), "mean", rate)
    layers = {group.name: group.producers[0] for group in bench.structure.prunable}
    published = published_mask(bench.model, plan.removed, layers)
    x = on.x[:200]
    with torch.no_grad():
        cut, exact, zeroed = (net_(x) for net_ in (plan.apply(bench.model), plan.mask(bench.model), published))
    scale = float(cut.abs().max())
    return {
        "net": net, "stage": "mask", "criterion": criterion, "rate": rate, "largest_logit": scale,
        "exact": float((cut - exact).abs().max()), "published": float((cut - zeroed).abs().max()),
        "correct": bench.correct(plan.apply(bench.model), on.x, on.y),
        "correct_published": bench.correct(published, on.x, on.y), "count": len(on.y),
    }  # fmt: skip


def _report(study: Study) -> Report:
    from experiments.papers.vgg_report import report

    return report(study)


_FEW = ["random", "weight L1", "activation", "Taylor, published", "LRP z+", "LRP epsilon"]
EXPERIMENT = Experiment(
    name="vgg_pruning",
    paper="Yeom et al. 2021, Pruning by Explaining (arXiv 1912.08881), scenario 2",
    question="How few pictures does a criterion need, in a plain network and in a residual one, without fine-tuning?",
    full={
        "seeds": 5,
        "vgg": {"widths": vgg.WIDTHS, "epochs": vgg.EPOCHS, "thousands": vgg.LEARNT // 1000, "seed": vgg.SEED},
        "per_class": [1, 2, 5, 10, 20],
        "nets": {
            "vgg": {
                "criteria": [c for c in CRITERIA if not c.endswith("signed")],
                "rates": [0.1, 0.3, 0.5],
                "draws_per_seed": 1.0,
            },
            "resnet20": {"criteria": _FEW, "rates": [0.3], "draws_per_seed": 0.6},
        },
        "masked": ["weight L1", "LRP z+"],
        "validation": {"draws": 1, "per_class": 10, "pictures": 500},
        "test_pictures": 1000,
    },
    quick={
        "seeds": 1,
        "vgg": {"widths": [[16], [32], [32, 32]], "epochs": 4, "thousands": 5, "seed": 0},
        "per_class": [1, 5],
        "nets": {
            "vgg": {"criteria": ["random", "weight L1", "Taylor, published", "LRP z+"], "rates": [0.3],
                    "draws_per_seed": 1.0},
            "resnet20": {"criteria": ["random", "weight L1", "LRP z+"], "rates": [0.3], "draws_per_seed": 1.0},
        },
        "masked": ["LRP z+"],
        "validation": {"draws": 1, "per_class": 5, "pictures": 100},
        "test_pictures": 200,
    },
    work=work,
    report=_report,
    data=("cifar10", "cifar10_models"),
)  # fmt: skip
