"""The toy experiment of Yeom et al. 2021 (arXiv 1912.08881): a third of a small network goes, in one shot.

Three sets of points in the plane, a network 2-1000-1000-1000-k, 1000 of its
3000 hidden units removed in one global order, from n reference points per
class, no training afterwards. The published network lacks its third ReLU; it
is "paper" here, and "relu3" is its corrected twin. Hidden units of such a
network are removed exactly by a mask: a unit that is 0 adds nothing to the
next layer, whose biases stay.

>>> from experiments.papers.toy_pruning import points
>>> x, y = points("mult", 2, "even", 0)
>>> x.shape, y.tolist()
((8, 2), [0, 0, 1, 1, 2, 2, 3, 3])
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.datasets import make_circles, make_moons
from torch import Tensor, nn

import compress
import lrp
from experiments.experiment import Experiment
from experiments.papers.toy_report import report
from experiments.study import Study

__all__ = ["CRITERIA", "EXPERIMENT", "Bench", "Held", "agreement", "network", "points", "train", "work"]

CLASSES = {"moon": 2, "circle": 2, "mult": 4}

#: name in the tables to the criterion's name and the layer normalisation of the published form
CRITERIA: dict[str, tuple[str, str]] = {
    "random": ("random:{seed}", "sum"),
    "weight": ("weight:l1", "sum"),
    "activation": ("activation", "sum"),
    "gradient": ("gradient:published", "l2"),
    "Taylor": ("taylor:published", "l2"),
    "Taylor, per sample": ("taylor:per_sample", "l2"),
    "LRP z+": ("lrp:zplus:signed:ignore_bias:start=logit", "sum"),  # through positive weights: see Bench
    "LRP z+, positive parts": ("lrp:zplus:signed:ignore_bias:start=logit", "sum"),
    "LRP epsilon, signed": ("lrp:epsilon:signed:start=logit", "sum"),
    "LRP epsilon, per sample": ("lrp:epsilon:abs_per_sample:start=logit", "sum"),
}
#: the same for every set of reference points; their cells have n = 0
DATA_FREE = ("random", "weight")


# -- data -------------------------------------------------------------------------
def points(name: str, n: int, draws: str, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Points of one of the three sets, n per class, in the order of the classes.

    Parameters
    ----------
    name : {"moon", "circle", "mult"}
        Two half-moons and two circles of scikit-learn with noise 0.1; four spiral arms, of radius r in [0, 1] and
        angle 4 j + 4 r + 0.2 N(0, 1) for class j.
    n : int
    draws : {"even", "random"}
        Evenly spaced along each curve, as in the authors' code, so that only the noise depends on the seed; or
        uniform draws along it.
    seed : int

    Returns
    -------
    x : ndarray (classes * n, 2)
    y : ndarray (classes * n,)
    """
    rng = np.random.default_rng([seed, 11])
    if name == "mult":
        x = []
        for j in range(4):
            r = np.linspace(0, 1, n) if draws == "even" else rng.uniform(0, 1, n)
            t = 4 * j + 4 * r + 0.2 * rng.standard_normal(n)
            x.append(np.stack([r * np.sin(t), r * np.cos(t)], 1))
        return np.concatenate(x).astype(np.float32), np.repeat(np.arange(4), n)
    if draws == "even":
        make = make_moons if name == "moon" else functools.partial(make_circles, factor=0.3)
        both, y = make(n_samples=2 * n, noise=0.1, random_state=seed)
        order = np.argsort(y, kind="stable")
        return both[order].astype(np.float32), y[order].astype(np.int64)
    a, b = rng.uniform(0, np.pi if name == "moon" else 2 * np.pi, (2, n))
    first = np.stack([np.cos(a), np.sin(a)], 1)
    second = np.stack([np.cos(b), np.sin(b)], 1)
    second = np.array([1, 0.5]) - second if name == "moon" else 0.3 * second
    both = np.concatenate([first, second])
    return (both + 0.1 * rng.standard_normal(both.shape)).astype(np.float32), np.repeat(np.arange(2), n)


# -- network ----------------------------------------------------------------------
def network(mode: str, width: int, classes: int) -> nn.Sequential:
    """2-width-width-width-classes with dropout behind the first layer; "paper" has no ReLU behind the third."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["fc1"] = nn.Linear(2, width)
    layers["drop"] = nn.Dropout(0.5)
    layers["relu1"] = nn.ReLU()
    layers["fc2"] = nn.Linear(width, width)
    layers["relu2"] = nn.ReLU()
    layers["fc3"] = nn.Linear(width, width)
    if mode == "relu3":
        layers["relu3"] = nn.ReLU()
    layers["fc4"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


def train(data: str, mode: str, settings: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights after SGD with momentum 0.9 on the training points, from a start and in batches of this seed."""
    x, y = (torch.from_numpy(a) for a in points(data, settings["training points"], "even", 0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = network(mode, settings["width"], CLASSES[data]).train()
        step = torch.optim.SGD(net.parameters(), lr=settings["lr"], momentum=0.9)
        order = torch.randperm(len(x))
        at = 0
        for _ in range(settings["steps"]):
            if at + settings["batch"] > len(x):
                order, at = torch.randperm(len(x)), 0
            index = order[at : at + settings["batch"]]
            at += settings["batch"]
            step.zero_grad()
            nn.functional.cross_entropy(net(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]  # torch
            step.step()
    return dict(net.state_dict())


class Held:
    """Sets of points to judge on, and what no mask changes of them: layer 1 after its ReLU, layer 2 before.

    In blocks of points (units, points) that stay in the cache of a core.
    """

    def __init__(self, bench: Bench, sets: Mapping[str, tuple[NDArray[np.float32], NDArray[np.int64]]]) -> None:
        self.names = list(sets)
        self.sizes = [len(y) for _, y in sets.values()]
        self.y = torch.from_numpy(np.concatenate([y for _, y in sets.values()]))
        x = torch.from_numpy(np.concatenate([x for x, _ in sets.values()]))
        first = [(bench.w[0] @ part.T + bench.b[0]).relu() for part in x.split(500)]  # type: ignore[no-untyped-call]  # torch
        self.blocks = [(f, bench.w[1] @ f + bench.b[1]) for f in first]

    def accuracies(self, classes: Tensor) -> list[float]:
        """Per cent right, of every set."""
        right = torch.split((classes == self.y).double(), self.sizes)
        return [round(100 * float(r.mean()), 3) for r in right]

    def __add__(self, other: Held) -> Held:
        out = Held.__new__(Held)
        out.names, out.sizes = self.names + other.names, self.sizes + other.sizes
        out.y, out.blocks = torch.cat([self.y, other.y]), self.blocks + other.blocks
        return out


class Bench:
    """A trained network, its orders of removal and the accuracy without some units."""

    def __init__(self, data: str, mode: str, net: nn.Sequential, settings: Mapping[str, Any]) -> None:
        self.data, self.mode, self.settings = data, mode, settings
        self.net = net.eval().requires_grad_(False)
        linear = {name: m for name, m in net.named_children() if isinstance(m, nn.Linear)}
        self.names = list(linear)[:-1]
        self.w = [m.weight.detach() for m in linear.values()]
        self.b = [m.bias.detach()[:, None] for m in linear.values()]
        self.positive = [w.clamp(min=0) for w in self.w[1:]]
        self.zplus = lrp.prepare(net, torch.zeros(2, 2), lrp.rules.ZPlus(ignore_bias=True))
        self.epsilon = lrp.prepare(net, torch.zeros(2, 2), lrp.rules.Epsilon())
        self.training = Held(self, {"train": points(data, settings["training points"], "even", 0)})

    @torch.no_grad()
    def accuracy(self, held: Held, gone: Tensor) -> list[float]:
        """Per cent right on every set without the units that are True in ``gone`` (3, width)."""
        r1 = gone[0].nonzero().flatten()
        k1, k2, k3 = ((~g).nonzero().flatten() for g in gone)
        fewer = len(r1) <= len(k1)  # take away what is gone, or add up what stays
        w2 = self.w[1][k2][:, r1 if fewer else k1]
        w3, w4, b2, b3 = self.w[2][k3], self.w[3][:, k3], self.b[1][k2], self.b[2][k3]
        linear = self.mode == "paper"  # layers 3 and 4 are one linear map there
        w3 = (w4 @ w3 if linear else w3)[:, k2]
        out = []
        for first, second in held.blocks:
            z = torch.addmm(second[k2], w2, first[r1], alpha=-1) if fewer else torch.addmm(b2, w2, first[k1])
            h = z.relu_()
            last = w3 @ h + w4 @ b3 if linear else w4 @ torch.addmm(b3, w3, h).relu_()
            out.append((last + self.b[3]).argmax(0))
        return held.accuracies(torch.cat(out))

    def scores(self, n: int, draws: str, seed: int) -> dict[str, Tensor]:
        """Scores (3, width) by criterion, not normalised, from n reference points per class; n = 0: without data.

        One pass for the gradients and one per rule; the same as what ``compress.score`` gives for the names in
        :data:`CRITERIA` one by one. But for "LRP z+" of the network without its third ReLU: there inputs of the last
        layer are negative, and "positive weights only" (x w^+, here) and "positive contributions only" ((x w)^+, the
        rule of ``lrp``, here "positive parts") are two rules. Of inputs >= 0 they are one.
        """
        if not n:
            specs = {name: CRITERIA[name][0].format(seed=seed) for name in DATA_FREE}
            found = {k: compress.score(self.net, torch.zeros(1, 2), criterion=v) for k, v in specs.items()}
            return {k: torch.stack([s.values[name] for name in self.names]) for k, s in found.items()}
        x, y = (torch.from_numpy(a) for a in points(self.data, n, draws, seed))
        z, a, g = self._gradients(x, y)
        weights = self._positive_weights(a.float(), y)
        zplus, epsilon = (self._relevance(plan, x, y) for plan in (self.zplus, self.epsilon))
        return {
            "activation": a.abs().mean(1),
            "gradient": g.mean(1).abs(),
            "Taylor": (z * g).mean(1).abs(),
            "Taylor, per sample": (z * g).abs().mean(1),
            "LRP z+": weights.mean(1),
            "LRP z+, positive parts": zplus.mean(1),
            "LRP epsilon, signed": epsilon.mean(1),
            "LRP epsilon, per sample": epsilon.abs().mean(1),
        }

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the hidden linear layers, those behind their ReLUs, and the loss's gradients; (3, N, width)."""
        outputs: list[Tensor] = []
        activated: list[Tensor] = []
        h = x
        with torch.enable_grad():
            for name, module in self.net.named_children():
                h = module(h)
                if name in self.names:
                    h = h if outputs else h.requires_grad_()
                    outputs.append(h)
                    activated.append(h)
                elif isinstance(module, nn.ReLU):
                    activated[-1] = h
            found = torch.autograd.grad(nn.functional.cross_entropy(h, y, reduction="sum"), outputs)
        stacks = (torch.stack(list(t)).detach().double() for t in (outputs, activated, found))
        z, a, g = stacks
        return z, a, g

    def _positive_weights(self, a: Tensor, y: Tensor) -> Tensor:
        """z+ as x w^+ / sum x w^+, biases ignored, from the true logit; ``a`` and result (3, N, width)."""
        logits = a[2] @ self.w[3].T + self.b[3].T
        relevance = torch.zeros_like(logits).scatter(1, y[:, None], logits.gather(1, y[:, None]))
        out = []
        for x, w in zip(reversed(a), reversed(self.positive), strict=True):
            z = x @ w.T
            relevance = x * ((relevance / torch.where(z == 0, 1, z)) @ w)
            out.append(relevance)
        return torch.stack(out[::-1]).double()

    def _relevance(self, plan: lrp.Plan, x: Tensor, y: Tensor) -> Tensor:
        """From the true logit; (3, N, width)."""
        found = lrp.attribute(plan, x, y, wrt="channels", layers=self.names, ledger=False)
        return torch.stack([found.channels[name] for name in self.names]).double()

    def normalised(self, n: int, draws: str, seed: int) -> dict[str, NDArray[np.float64]]:
        """Flat normalised scores of all criteria, by name; "..., layer sum" where the published form has another."""
        out = {}
        for name, s in self.scores(n, draws, seed).items():
            size = {"sum": s.abs().sum(1, keepdim=True), "l2": s.square().sum(1, keepdim=True).sqrt()}
            published = CRITERIA[name][1]
            for how in dict.fromkeys((published, "sum")):
                divisor = torch.where(size[how] > 0, size[how], 1)
                out[name if how == published else f"{name}, layer {how}"] = (s / divisor).flatten().numpy()
        return out

    def test_sets(self, seed: int) -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """500 new points (seed + 1), without and with Gaussian noise on them."""
        x, y = points(self.data, self.settings["test points"] // CLASSES[self.data], "even", seed + 1)
        noise = np.random.default_rng([seed + 1, 7]).standard_normal(x.shape)
        return {str(s): ((x + s * noise).astype(np.float32), y) for s in (0, *self.settings["sigmas"])}

    def row(self, scores: Mapping[str, NDArray[np.float64]], held: Held) -> dict[str, Any]:
        """Accuracies on every set and units removed per layer, by criterion."""
        width = self.settings["width"]
        values: dict[str, list[float]] = {}
        cuts: dict[str, list[int]] = {}
        for name, s in scores.items():
            gone = torch.zeros(3 * width, dtype=torch.bool)
            gone[torch.from_numpy(np.argsort(s, kind="stable")[:width])] = True  # a third; ties: layer, then index
            gone = gone.reshape(3, width)
            values[name] = self.accuracy(held, gone)
            cuts[name] = gone.sum(1).tolist()
        return {"sets": held.names, "values": values, "cuts": cuts}


# -- agreement of the orders of different draws ------------------------------------
def agreement(scores: Sequence[NDArray[np.float64]], counts: Sequence[int]) -> dict[str, list[float | None]]:
    """How far draws agree: shared part of the first k units for every k, and Spearman's correlation of all scores.

    Each as the mean over pairs of draws and its jackknife standard error over draws (pairs are not independent).
    """
    order = np.stack([np.argsort(s, kind="stable") for s in scores])
    out = {}
    for k in counts:
        first = np.zeros(order.shape)
        np.put_along_axis(first, order[:, :k], 1, 1)
        out[str(k)] = _pairs(first @ first.T / k)
    ranks = np.stack([rankdata(s) for s in scores])
    ranks -= ranks.mean(1, keepdims=True)
    ranks /= np.linalg.norm(ranks, axis=1, keepdims=True)
    out["spearman"] = _pairs(ranks @ ranks.T)
    return out


def _pairs(matrix: NDArray[np.float64]) -> list[float | None]:
    """Mean off the diagonal, and its jackknife error."""
    n = len(matrix)
    sums = matrix.sum(1) - np.diag(matrix)
    total = float(sums.sum())
    mean = total / (n * (n - 1))
    if n < 3:
        return [round(mean, 5), None]
    without = (total - 2 * sums) / ((n - 1) * (n - 2))
    error = float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum()))
    return [round(mean, 5), round(error, 5)]


# -- the run ------------------------------------------------------------------------
def work(study: Study) -> None:
    """Cells: one per series, data set, n and seed; one per series, data set and n for the agreement of the seeds."""
    for series in study.settings["series"]:
        seeds = range(min(series["seeds"], study.settings["seeds"]))
        for data in CLASSES:
            _part(study, series, data, seeds)


def _part(study: Study, series: Mapping[str, Any], data: str, seeds: range) -> None:
    settings, sizes = study.settings, (0, *series["n"])
    keys = {(n, seed): f"{series['name']}|{data}|{n}|{seed}" for seed in seeds for n in sizes}
    pooled = {n: f"agreement|{series['name']}|{data}|{n}|{len(seeds)}" for n in sizes} if len(seeds) > 1 else {}
    if study.has([*keys.values(), *pooled.values()]):
        return
    mode, number = series["mode"], series["network"]
    net = network(mode, settings["width"], CLASSES[data])
    net.load_state_dict(study.weights(f"{data}-{mode}-{number}", lambda: train(data, mode, settings, number)))
    bench = Bench(data, mode, net, settings)
    about = {"series": series["name"], "data": data}

    @functools.cache
    def scores(n: int, seed: int) -> dict[str, NDArray[np.float64]]:
        return bench.normalised(n, series["draws"], seed)

    def judge(n: int, seed: int, few: Held, many: Held) -> dict[str, Any]:
        held = many if n in (0, settings["noise levels at n"]) else few
        found = bench.row(scores(n, seed), held)
        if not n:
            none = torch.zeros(3, settings["width"], dtype=torch.bool)
            found["values"]["unpruned"] = bench.accuracy(held, none)
        return {"kind": "accuracy", **about, "n": n, "seed": seed, **found}

    def compare(n: int) -> dict[str, Any]:
        of = [scores(n, seed) for seed in seeds]
        values = {name: agreement([s[name] for s in of], settings["first units"]) for name in of[0]}
        return {"kind": "agreement", **about, "n": n, "draws": len(seeds), "values": values}

    for seed in study.progress(seeds, f"{series['name']}, {data}"):
        if not study.has(keys[n, seed] for n in sizes):
            sets = bench.test_sets(seed)
            few = bench.training + Held(bench, {name: sets[name] for name in ("0", str(settings["sigma"]))})
            many = bench.training + Held(bench, sets)
            for n in sizes:
                study.cell(keys[n, seed], functools.partial(judge, n, seed, few, many))
    for n, key in pooled.items():
        study.cell(key, functools.partial(compare, n))


ALL = (1, 2, 5, 10, 20, 50, 100, 200)
COMMON = {
    "training points": 1000, "test points": 500, "lr": 0.01, "batch": 200, "steps": 1000,
    "sigmas": [0.01, 0.1, 0.3], "sigma": 0.3, "noise levels at n": 5,
}  # fmt: skip


def _series(name: str, mode: str, draws: str, number: int, n: Sequence[int], seeds: int) -> dict[str, Any]:
    return {"name": name, "mode": mode, "draws": draws, "network": number, "n": list(n), "seeds": seeds}


EXPERIMENT = Experiment(
    name="toy_pruning",
    paper="Yeom et al. 2021 (arXiv 1912.08881), section 4.1",
    question="Does relevance choose the right third of a small network from a few points?",
    full={
        "seeds": 50,
        "width": 1000,
        **COMMON,
        "first units": [125, 250, 500, 1000],
        "series": [
            _series("paper", "paper", "even", 0, ALL, 50),
            _series("paper, random draws", "paper", "random", 0, (1, 2, 5, 20, 200), 20),
            _series("relu3", "relu3", "even", 0, (1, 2, 5, 20, 200), 10),
            _series("paper, second network", "paper", "even", 1, (5,), 10),
        ],
    },
    quick={
        "seeds": 4,
        "width": 120,
        **COMMON,
        "first units": [15, 30, 60, 120],
        "series": [
            _series("paper", "paper", "even", 0, (1, 2, 5, 20), 4),
            _series("paper, random draws", "paper", "random", 0, (5,), 4),
            _series("relu3", "relu3", "even", 0, (5,), 3),
        ],
    },
    work=work,
    report=report,
)
