"""Composites chosen for pruning, on three of ten classes: Hatefi et al. 2024 (arXiv 2408.12568) in small.

ResNet-20 on CIFAR-10, restricted to three classes (the other outputs are taken off) and with all ten. Filters go in
one global order, least relevant first, without training afterwards, at 20 rates from 0 to 95 %, in two ways:

``mask``
    as in the paper: each of the 688 convolution filters, those of the residual stream too, is silenced on its own,
    together with its batch norm (the target "Both" of the published code);
``cut``
    the 336 inner filters of the blocks, which are all that can be removed one by one, are really removed.

A composite has one rule for the stem and the first stage, one for the other stages, one for the classifier. It is
chosen on training pictures that serve nothing else and judged once on test pictures; so are the plain rules and the
criteria that the paper leaves out (magnitude, activation, Taylor).

>>> len(grid(("epsilon", "zplus", "gamma", "alpha2beta1")))
64
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import compress
from compress import criteria
from compress.criteria import Scores
from compress.search import RULES, composite_of, search
from experiments import data, models
from experiments.experiment import Experiment
from experiments.inference import folded
from experiments.papers.composite_report import DATA_FREE, report
from experiments.study import Study
from lrp import rules

__all__ = [
    "EXPERIMENT",
    "Task",
    "grid",
    "integrated_gradients",
    "optimised",
    "order",
    "removed",
    "restricted",
    "silenced",
    "work",
]

ARMS = ("mask", "cut")
#: groups of layers that have one rule, as in the paper's code for ResNets; this network has no fourth stage
GROUPS = {"early": ("conv1", "layer1.*"), "late": ("layer2.*", "layer3.*"), "linear": ("linear",)}
LINEAR = ("linear",)
#: name in the tables to the rules of all groups
PLAIN = {"LRP epsilon": "epsilon", "LRP z+": "zplus", "LRP gamma": "gamma", "LRP alpha2beta1": "alpha2beta1"}
#: the rest, by the names of compress; "{draw}" is the number of the draw
CONTROLS = {
    "random": "random:{draw}",
    "weight L1": "weight:l1",
    "activation": "activation",
    "Taylor, published": "taylor:abs_total",
    "Taylor, per sample": "taylor:abs_per_sample",
}
#: judged a second time with the scores of every layer divided by their mean
NORMALISED = ("optimised", "LRP epsilon", "weight L1", "activation", "Taylor, per sample")
NEAR_ZERO, SIGNED = "abs_per_sample", "signed"
Choice = tuple[str, ...]
Batches = list[tuple[Tensor, Tensor]]


def grid(names: Sequence[str]) -> list[Choice]:
    """All composites, one rule everywhere first: of equal ones the first is chosen."""
    everywhere = [(name,) * len(GROUPS) for name in names]
    rest = [choice for choice in itertools.product(names, repeat=len(GROUPS)) if choice not in everywhere]
    return everywhere + rest


def composite(choice: Choice) -> Any:
    """The composite of one rule per group."""
    return composite_of(dict(zip(GROUPS, choice, strict=True)), GROUPS, LINEAR)


def optimised(row: Mapping[str, Any]) -> Choice:
    """The choice with the largest mean accuracy on the validation pictures; of equal ones the first."""
    areas = [float(np.mean(trial["accuracy"])) for trial in row["trials"]]
    return tuple(row["trials"][int(np.argmax(areas))]["rules"])


def restricted(model: nn.Module, classes: Sequence[int]) -> nn.Module:
    """A copy with the outputs of these classes alone, in this order."""
    out: Any = copy.deepcopy(model)
    whole = out.linear
    out.linear = nn.Linear(whole.in_features, len(classes)).to(whole.weight)
    with torch.no_grad():
        out.linear.weight.copy_(whole.weight[list(classes)])
        out.linear.bias.copy_(whole.bias[list(classes)])
    out.eval()
    return cast(nn.Module, out)


def order(scores: Mapping[str, Tensor], normalisation: str = "none") -> list[tuple[str, int]]:
    """(layer, channel) of all filters, the smallest score first; of equal ones the earlier.

    Parameters
    ----------
    scores : dict of str to Tensor (C,)
    normalisation : {"none", "mean"}
        "mean" divides the scores of a layer by their mean magnitude.
    """
    parts = [s / s.abs().mean().clamp_min(1e-300) if normalisation == "mean" else s for s in scores.values()]
    names = [(name, j) for name, s in scores.items() for j in range(len(s))]
    return [names[k] for k in torch.argsort(torch.cat(parts), stable=True).tolist()]


def silenced(
    model: nn.Module, filters: Sequence[tuple[str, int]], rates: Sequence[float], dtype: torch.dtype = torch.float32
) -> Iterator[nn.Module]:
    """One network without batch norms in which, rate by rate, more of the filters are silent: zero behind their norm.

    Parameters
    ----------
    model : nn.Module
        A :class:`experiments.models.CifarResNet`.
    filters : sequence of (str, int)
        In the order in which they go. A layer may lose all.
    rates : sequence of float
        Ascending. The whole number of filters that is no more than the share goes.
    dtype : torch.dtype
    """
    net = folded(model, dtype)
    layers: dict[str, Any] = {n.removeprefix("net."): m for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    done = 0
    for rate in rates:
        until = int(rate * len(filters) + 1e-9)
        with torch.no_grad():
            for name, channel in filters[done:until]:
                layers[name].weight[channel] = 0
                layers[name].bias[channel] = 0
        done = until
        yield net


def removed(filters: Sequence[tuple[str, int]], rate: float, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Layer to the channels that go at a rate, in order; the last one of a layer is passed over.

    As in a plan with a target, the smallest whole number that is no less than the share goes.

    Parameters
    ----------
    filters : sequence of (str, int)
    rate : float
    widths : dict of str to int
        Channels by layer.
    """
    gone: dict[str, tuple[int, ...]] = {}
    left = math.ceil(rate * len(filters) - 1e-9)
    for name, channel in filters:
        if left and len(gone.get(name, ())) < widths[name] - 1:
            gone[name] = (*gone.get(name, ()), channel)
            left -= 1
    return gone


def right(net: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, batch: int = 300) -> int:
    """Right answers of what :func:`experiments.inference.folded` returned."""
    found = 0
    with torch.no_grad():
        for part, labels in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
            given = part.to(dtype=dtype).contiguous(memory_format=torch.channels_last)
            found += int((net(given).float().argmax(1) == labels).sum())
    return found


def integrated_gradients(model: nn.Module, batches: Batches, steps: int = 20) -> dict[str, Tensor]:
    """What of the true class's output comes through each filter on the way from the mean colour to the picture.

    Gradients at the outputs of the batch norms times the change there, along the straight line of inputs, by the
    trapezoid rule; summed over space, magnitudes averaged over the pictures. (Integrated gradients per filter are
    known as conductance: Dhamdhere et al. 2018, arXiv 1805.12233.)
    """
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    outs: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[..., None]:
        return lambda module, given, output: outs.__setitem__(name, output)

    norms = {name: model.get_submodule(name.replace("conv", "bn")) for name in convolutions}
    handles = [norm.register_forward_hook(reader(name)) for name, norm in norms.items()]
    total: dict[str, Tensor] = {}
    count = 0
    try:
        parts = [pair for x, y in batches for pair in zip(torch.split(x, 10), torch.split(y, 10), strict=True)]
        for x, y in parts:
            n = len(y)
            share = torch.linspace(0, 1, steps + 1).to(x).repeat_interleave(n).reshape(-1, 1, 1, 1)
            path = (share * x.repeat(steps + 1, 1, 1, 1)).requires_grad_()
            true = model(path).gather(1, y.repeat(steps + 1)[:, None])
            gradients = torch.autograd.grad(true.sum(), [outs[name] for name in convolutions])
            for name, g in zip(convolutions, gradients, strict=True):
                a, g = (t.detach().double().reshape(steps + 1, n, *t.shape[1:]) for t in (outs[name], g))
                through = ((g[1:] + g[:-1]) / 2 * (a[1:] - a[:-1])).sum((0, -2, -1))
                total[name] = total.get(name, 0) + through.abs().sum(0)
            count += n
    finally:
        for handle in handles:
            handle.remove()
    return {name: t / count for name, t in total.items()}


@dataclass(frozen=True)
class Task:
    """A network with some of its classes, and pictures of these with labels 0, 1, ..."""

    classes: tuple[int, ...]
    model: nn.Module
    pool: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def name(self) -> str:
        return "-".join(map(str, self.classes)) if len(self.classes) < len(data.CIFAR10_CLASSES) else "all"

    def reference(self, per_class: int, draw: int) -> Batches:
        """So many pictures per class, drawn with the draw's seed; a larger draw holds the smaller ones."""
        x, y = self.pool
        generator = np.random.default_rng(draw)
        index = np.concatenate(
            [generator.permutation(np.flatnonzero(y.cpu().numpy() == k))[:per_class] for k in range(len(self.classes))]
        )
        return [(x[index], y[index])]


class Bench:
    """All that a run needs of network and data, read when the first cell asks for it."""

    example = torch.zeros(1, 3, 32, 32)

    def __init__(self, folder: Callable[[], Path], settings: Mapping[str, Any], device: str = "cpu") -> None:
        self.folder, self.settings, self.device = folder, settings, device
        self.made: dict[tuple[int, ...], Task] = {}
        self.held: dict[Any, Scores] = {}
        self.plans: dict[str, compress.PruningPlan] = {}

    @cached_property
    def model(self) -> nn.Module:
        return models.resnet20(self.folder()).model.to(self.device)

    @cached_property
    def layers(self) -> list[str]:
        return [name for name, m in self.model.named_modules() if isinstance(m, nn.Conv2d)]

    @cached_property
    def pictures(self) -> dict[str, tuple[Tensor, Tensor]]:
        first, then = self.settings["thousands"]
        x, y = self._read("train", first + then)
        at = 1000 * first
        return {"pool": (x[:at], y[:at]), "validation": (x[at:], y[at:]), "test": self._read("test", None)}

    def _read(self, split: str, thousands: int | None) -> tuple[Tensor, Tensor]:
        raw, y = data.cifar10(self.folder(), split, thousands)
        x = data.normalise(raw, models.IMAGENET_MEAN, models.IMAGENET_STD)
        return x.to(self.device), torch.from_numpy(y).to(self.device)

    def task(self, classes: Sequence[int]) -> Task:
        """The network and the pictures of these classes."""
        key = tuple(classes)
        if key not in self.made:
            few = len(key) < len(data.CIFAR10_CLASSES)
            counts = self.settings["pictures" if few else "pictures_of_all"]
            parts = {name: of_classes(*self.pictures[name], key, counts.get(name)) for name in self.pictures}
            self.made[key] = Task(key, restricted(self.model, key), **parts)
        return self.made[key]

    def plan(self, task: Task) -> compress.PruningPlan:
        """Of the whole network: nothing goes."""
        if task.name not in self.plans:
            self.plans[task.name] = compress.plan_pruning(
                task.model, self.example, criterion="weight", target=compress.Target(channels=1.0), round_to=1
            )
        return self.plans[task.name]

    def scores(
        self, task: Task, draw: int, what: Any, aggregate: str = NEAR_ZERO, per_class: int | None = None
    ) -> Scores:
        """Of all convolutions, by a control's name or a choice of rules; kept while the task and the draw stay."""
        n = per_class or int(self.settings["per_class"])
        key = (task.name, draw, what, aggregate, n)
        if key not in self.held:
            self.held = {k: v for k, v in self.held.items() if k[:2] == key[:2]}
            if what == "integrated gradients":
                asked: Any = partial(integrated_gradients, steps=int(self.settings["steps"]))
            elif what == "LRP z+, bias ignored":
                asked = criteria.lrp(rules.ZPlus(ignore_bias=True), start="one_hot", aggregate=aggregate)
            elif isinstance(what, str):
                asked = CONTROLS[what].format(draw=draw)
            else:
                asked = criteria.lrp(composite(what), start="one_hot", aggregate=aggregate)
            self.held[key] = criteria.criterion_of(asked)(
                task.model, task.reference(n, draw), self.layers,
                structure=self.plan(task).structure, example_inputs=self.example, progress=False,
            )  # fmt: skip
        return self.held[key]

    def networks(
        self, task: Task, arm: str, scores: Scores, rates: Sequence[float], normalisation: str = "none"
    ) -> Iterator[nn.Module]:
        """One after the other, ready for test passes, with ever fewer filters."""
        if arm == "mask":
            yield from silenced(task.model, order(scores.values, normalisation), rates, self.dtype)
            return
        whole = self.plan(task)
        widths = {name: wide for name, (wide, _) in whole.widths.items()}
        inner = order({name: scores.values[name] for name in widths}, normalisation)
        for rate in rates:
            yield folded(replace(whole, removed=removed(inner, rate, widths)).apply(task.model), self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.settings["precision"])
        return found

    def curve(
        self, task: Task, arm: str, scores: Scores, rates: Sequence[float], on: tuple[Tensor, Tensor],
        normalisation: str = "none",
    ) -> list[int]:  # fmt: skip
        """Right answers at every rate."""
        return [right(net, *on, self.dtype) for net in self.networks(task, arm, scores, rates, normalisation)]

    def trials(self, task: Task, arm: str, draw: int, aggregate: str) -> list[dict[str, Any]]:
        """Composites with their accuracies on the validation pictures: the whole grid, or what a search tries."""
        names, rates, held = self.settings["rules"], self.settings["search_rates"], task.validation
        total = len(held[1])
        if arm == "mask":
            out = []
            for choice in grid(names):
                found = self.curve(task, arm, self.scores(task, draw, choice, aggregate), rates, held)
                out.append({"rules": list(choice), "accuracy": [k / total for k in found]})
            return out
        result = search(
            task.model,
            self.example,
            task.reference(int(self.settings["per_class"]), draw),
            validation=lambda model: right(folded(model, self.dtype), *held, self.dtype) / total,
            groups=GROUPS,
            rules=names,
            rates=rates,
            strategy="bayes",
            budget=self.settings["budget"],
            seed=draw,
            aggregate=aggregate,
            normalisation="none",
            floor=1,
            structure=self.plan(task).structure,
            progress=False,
        )
        return [{"rules": [t.rules[g] for g in GROUPS], "accuracy": list(t.accuracy)} for t in result.trials]


def of_classes(x: Tensor, y: Tensor, classes: Sequence[int], per_class: int | None) -> tuple[Tensor, Tensor]:
    """The first pictures of each class, in their order; labels are places in ``classes``."""
    index = torch.cat([(y == c).nonzero().flatten()[:per_class] for c in classes]).sort().values
    place = torch.full((len(data.CIFAR10_CLASSES),), -1, device=y.device)
    place[list(classes)] = torch.arange(len(classes), device=y.device)
    return x[index], place[y[index]]


def work(study: Study) -> None:
    """All searches, then all judgements, draw by draw."""
    bench = Bench(lambda: study.data, study.settings, study.device)
    everything = tuple(range(len(data.CIFAR10_CLASSES)))
    tasks = [tuple(classes) for classes in study.settings["classes"]]
    for draw in study.seeds:
        more = [everything] if draw < study.settings["draws_of_all"] else []
        for classes in study.progress([*tasks, *more], f"draw {draw}"):
            _unit(study, bench, classes, draw)


def _unit(study: Study, bench: Bench, classes: tuple[int, ...], draw: int) -> None:
    """One set of classes with one draw of reference pictures."""
    settings = study.settings
    few = len(classes) < len(data.CIFAR10_CLASSES)
    name = "-".join(map(str, classes)) if few else "all"
    normalised: dict[str, tuple[str, ...]] = dict.fromkeys(NORMALISED, ("none", "mean"))
    for arm in ARMS:
        about = {"arm": arm, "task": name, "draw": draw}

        def searched(aggregate: str, arm: str = arm, about: dict[str, Any] = about) -> dict[str, Any]:
            trials = bench.trials(bench.task(classes), arm, draw, aggregate)
            return {"kind": "search", **about, "aggregate": aggregate, "trials": trials}

        found = study.cell(f"search|{arm}|{name}|{draw}|{NEAR_ZERO}", partial(searched, NEAR_ZERO))
        if few and draw < settings["signed_draws"] and arm in settings["signed_arms"]:
            study.cell(f"search|{arm}|{name}|{draw}|{SIGNED}", partial(searched, SIGNED))
        plain: dict[str, Choice] = {n: (rule,) * len(GROUPS) for n, rule in PLAIN.items() if rule in settings["rules"]}
        chosen: dict[str, Any] = {"optimised": optimised(found), **plain}
        judged: list[tuple[str, Any, str]] = [(n, choice, NEAR_ZERO) for n, choice in chosen.items()]
        judged += [(f"{n}, signed", choice, SIGNED) for n, choice in chosen.items()]
        judged += [(n, n, NEAR_ZERO) for n in (*CONTROLS, "integrated gradients", "LRP z+, bias ignored")]
        for label, what, aggregate in judged:
            seed = 0 if label in DATA_FREE else draw
            for how in normalised.get(label, ("none",)):

                def test(label: str = label, what: Any = what, aggregate: str = aggregate, how: str = how,
                         seed: int = seed, arm: str = arm) -> dict[str, Any]:  # fmt: skip
                    task = bench.task(classes)
                    right = bench.curve(
                        task, arm, bench.scores(task, seed, what, aggregate), settings["rates"], task.test, how
                    )
                    rules = list(what) if isinstance(what, tuple) else None
                    return {
                        "kind": "test", "arm": arm, "task": name, "draw": seed, "criterion": label, "rules": rules,
                        "normalisation": how, "correct": right, "count": len(task.test[1]),
                    }  # fmt: skip

                study.cell(f"test|{arm}|{name}|{seed}|{label}|{how}", test)
    if draw == 0:
        study.cell(f"check|mask|{name}|0|LRP epsilon", partial(_checked, bench, classes))
    if few and "epsilon" in settings["rules"]:
        for size in settings["sizes"]:
            study.cell(f"size|mask|{name}|{draw}|{size}", partial(_sized, bench, classes, draw, size))


def _sized(bench: Bench, classes: tuple[int, ...], draw: int, size: int) -> dict[str, Any]:
    """Plain epsilon with another number of reference pictures per class."""
    task = bench.task(classes)
    scores = bench.scores(task, draw, ("epsilon",) * len(GROUPS), NEAR_ZERO, size)
    right = bench.curve(task, "mask", scores, bench.settings["rates"], task.test)
    return {"kind": "size", "arm": "mask", "task": task.name, "draw": draw, "per_class": size, "correct": right,
            "count": len(task.test[1])}  # fmt: skip


def _checked(bench: Bench, classes: tuple[int, ...]) -> dict[str, Any]:
    """Plain epsilon with test passes in 32 bits."""
    task, dtype = bench.task(classes), torch.float32
    scores = bench.scores(task, 0, ("epsilon",) * len(GROUPS))
    nets = silenced(task.model, order(scores.values), bench.settings["rates"], dtype)
    return {"kind": "check", "arm": "mask", "task": task.name, "draw": 0, "criterion": "LRP epsilon",
            "correct": [right(net, *task.test, dtype) for net in nets], "count": len(task.test[1])}  # fmt: skip


_RATES = [k / 20 for k in range(20)]
EXPERIMENT = Experiment(
    name="composite_search",
    paper="Hatefi et al. 2024, Pruning By Explaining Revisited (arXiv 2408.12568)",
    question="Does a composite that is chosen for pruning remove more than plain rules, on three of ten classes?",
    full={
        "seeds": 2,
        # nine of the ten in the order of numpy.random.default_rng(0).permutation(10)
        "classes": [[2, 4, 6], [3, 5, 7], [0, 8, 9]],
        "draws_of_all": 1,
        "signed_draws": 1,
        "signed_arms": ["mask"],
        "rules": list(RULES),
        "rates": _RATES,
        "search_rates": [0.05, 0.15, 0.25, 0.35, 0.5, 0.65],
        "budget": 16,
        "per_class": 10,
        "sizes": [1, 2, 5, 20],
        "pictures": {"validation": 40, "test": 60},
        "pictures_of_all": {"validation": 12, "test": 30},
        "thousands": [12, 3],
        "steps": 20,
        "precision": "bfloat16",
    },
    quick={
        "seeds": 2,
        "classes": [[2, 4, 6]],
        "draws_of_all": 0,
        "signed_draws": 1,
        "signed_arms": ["mask"],
        "rules": ["epsilon", "zplus"],
        "rates": _RATES[::4],
        "search_rates": [0.15, 0.35, 0.55],
        "budget": 4,
        "per_class": 5,
        "sizes": [1],
        "pictures": {"validation": 20, "test": 50},
        "pictures_of_all": {"validation": 10, "test": 10},
        "thousands": [2, 1],
        "steps": 5,
        "precision": "bfloat16",
    },
    work=work,
    report=report,
    data=("cifar10", "cifar10_models"),
)
