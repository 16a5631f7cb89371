"""A planted artefact: does SpRAy on relevance maps find it, and does the neuralized clustering point at it?

A yellow square is put into a corner of a share of one class's training pictures. The stages of the published ResNet-20
up to the second are kept, the third and the linear layer are drawn anew and trained on 10 x 250 pictures of CIFAR-10's
test part, which the kept stages have not seen. Held-out pictures of other classes, with the square, say whether the
network uses it. The relevance maps of the class's training pictures then go through :mod:`experiments.spray`, beside
raw pictures, gradient x input, activations and noise; and k-means on the pooled maps, neuralized behind the pooling as
its network, is explained in pixels.
"""

from __future__ import annotations

import base64
import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor, nn

import lrp
from experiments import data as sets
from experiments import models
from experiments.experiment import Experiment
from experiments.papers.clever_hans_report import report
from experiments.spray import (
    agreement,
    medoids,
    normalised,
    p_value,
    permuted_taus,
    pooled,
    rotated_taus,
    spray,
    tsne,
)
from experiments.study import Study
from neuralize import encoded

__all__ = ["EXPERIMENT", "Bench", "Case", "pointed", "stamp"]

Array = NDArray[Any]
SIDE, CORNER = 6, (24, 2)
COLOUR = (255, 255, 0)
CLASSES = (7, 2, 9, 4, 1)  # of seeds 0, 1, ...: horse, bird, truck, deer, automobile
MARGIN = 2


def stamp(pictures: Array, places: Array) -> Array:
    """Pictures (n, H, W, 3) with the square, its upper left corner at ``places`` (n, 2)."""
    out = pictures.copy()
    for picture, (top, left) in zip(out, places, strict=True):
        picture[top : top + SIDE, left : left + SIDE] = COLOUR
    return out


def area(places: Array, margin: int = 0, size: int = 32) -> Array:
    """(n, size, size) of bool: the square and what lies at most ``margin`` pixels from it."""
    i = np.arange(size)

    def inside(first: Array) -> Array:
        return (i >= first[:, None] - margin) & (i < first[:, None] + SIDE + margin)

    return np.asarray(inside(places[:, 0])[:, :, None] & inside(places[:, 1])[:, None, :])


@dataclass(frozen=True)
class Case:
    """Which class got the square, how often, where; ``trained=False``: the network was trained without it."""

    place: str
    share: float
    seed: int
    trained: bool = True

    @property
    def key(self) -> str:
        return f"{self.place if self.trained else 'unused'}|{self.share}|{self.seed}"

    @property
    def target(self) -> int:
        return CLASSES[self.seed % len(CLASSES)]

    def places(self, count: int, stream: int) -> Array:
        """Upper left corners (count, 2)."""
        rng = np.random.default_rng([self.seed, stream])
        if self.place == "anywhere":
            return rng.integers(0, 32 - SIDE + 1, (count, 2))
        return np.tile(np.array(CORNER), (count, 1))

    def planted(self, count: int) -> Array:
        """(count,) of bool; a larger share holds the smaller ones."""
        order = np.random.default_rng([self.seed, 7]).permutation(count)
        out = np.zeros(count, bool)
        out[order[: round(self.share * count)]] = True
        return out


class Bench:
    """Pictures, the kept stages and what they give, made once for all networks."""

    def __init__(self, study: Study) -> None:
        self.study, self.settings = study, study.settings
        count, held = int(self.settings["per_class"]), int(self.settings["held_out"])
        pictures, labels = sets.cifar10(study.data, "test")
        rows = [np.flatnonzero(labels == c) for c in range(10)]
        self.pictures = np.stack([pictures[r[:count]] for r in rows])  # (10, n, 32, 32, 3)
        self.held = np.stack([pictures[r[count : count + held]] for r in rows])
        self.published = models.resnet20(study.data)
        self.labels = torch.arange(10).repeat_interleave(count)

    @cached_property
    def clean(self) -> Tensor:
        """What the kept stages give for the training pictures."""
        return self.lower(self.pictures.reshape(-1, 32, 32, 3))

    @cached_property
    def clean_held(self) -> Tensor:
        """The same for held-out pictures."""
        return self.lower(self.held.reshape(-1, 32, 32, 3))

    @torch.no_grad()
    def lower(self, pictures: Array) -> Tensor:
        """Output of the kept stages (n, 32, 16, 16)."""
        net: Any = self.published.model
        parts = [net.layer2(net.layer1(F.relu(net.bn1(net.conv1(x))))) for x in torch.split(_input(pictures), 100)]
        return torch.cat(parts)

    # -- the network -------------------------------------------------------
    def training_pictures(self, case: Case) -> tuple[Array, Array, Array]:
        """The class's pictures as they are explained, which have the square, and where."""
        own = self.pictures[case.target]
        planted, places = case.planted(len(own)), case.places(len(own), 1)
        shown = own.copy()
        shown[planted] = stamp(own[planted], places[planted])
        return shown, planted, places

    def network(self, case: Case) -> nn.Module:
        """Trained, or from the cache; the clean one of a seed is the same for all cases."""
        clean = not case.trained or case.share == 0
        name = f"clean-{case.seed}" if clean else f"{case.place}-{case.share}-{case.seed}"
        state = self.study.weights(name, lambda: self.train(case, clean))
        model = copy.deepcopy(self.published.model)
        model.load_state_dict(state, strict=False)
        return model.eval()

    def train(self, case: Case, clean: bool) -> dict[str, Tensor]:
        """Third stage and linear layer, drawn anew."""
        z = self.clean.clone()
        if not clean:
            shown, planted, _ = self.training_pictures(case)
            z[torch.from_numpy(np.flatnonzero(planted)) + case.target * len(shown)] = self.lower(shown[planted])
        torch.manual_seed(case.seed)
        fresh = models.CifarResNet(3)
        parts = nn.ModuleDict({"layer3": fresh.layer3, "linear": fresh.linear}).train()
        epochs, batch = int(self.settings["epochs"]), int(self.settings["batch"])
        steps = -(-len(z) // batch)
        optimizer = torch.optim.SGD(parts.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=epochs, steps_per_epoch=steps)
        generator = torch.Generator().manual_seed(case.seed)
        for _ in self.study.progress(range(epochs), f"train {case.key}"):
            for rows in torch.split(torch.randperm(len(z), generator=generator), batch):
                loss = F.cross_entropy(_upper(fresh, z[rows]), self.labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        return parts.eval().state_dict()

    @torch.no_grad()
    def use(self, model: nn.Module, case: Case) -> dict[str, float]:
        """Accuracy on held-out pictures; other classes' pictures taken for the class, without and with the square."""
        count = self.held.shape[1]
        labels = np.repeat(np.arange(10), count)
        before = _classes(model, self.clean_held)
        others = labels != case.target
        stamped = stamp(self.held.reshape(-1, 32, 32, 3)[others], case.places(int(others.sum()), 2))
        after = _classes(model, self.lower(stamped))
        return {
            "accuracy": float((before == labels).mean()),
            "accuracy_class": float((before == labels)[~others].mean()),
            "turned_before": float((before[others] == case.target).mean()),
            "turned": float((after == case.target).mean()),
        }

    # -- maps --------------------------------------------------------------
    def relevance(self, model: nn.Module, pictures: Array, target: int, composite: str) -> Array:
        """Relevance (n, 32, 32) of the class's logit, summed over colours."""
        chosen: Any = composite
        if composite == "epsilon_gamma_box":
            chosen = lrp.composites.epsilon_gamma_box(self.published.low, self.published.high)
        elif composite == "gradient_x_input":
            chosen = lrp.composites.gradient_x_input()
        parts = torch.split(_input(pictures), 50)
        plan = lrp.prepare(model, parts[0], chosen)
        found: list[Any] = [lrp.attribute(plan, x, target, ledger=False).input for x in parts]
        return np.concatenate([np.asarray(r.sum(1), dtype=float) for r in found])

    @torch.no_grad()
    def activations(self, model: Any, pictures: Array) -> Array:
        """Pooled output of the last stage (n, 64)."""
        return np.asarray(F.adaptive_avg_pool2d(model.layer3(self.lower(pictures)), 1).flatten(1), dtype=float)

    def row(self, case: Case) -> dict[str, Any]:
        """All numbers of a case."""
        s = self.settings
        model = self.network(case)
        shown, planted, places = self.training_pictures(case)
        maps = {c: self.relevance(model, shown, case.target, c) for c in ("epsilon_plus", *s["composites"])}
        images = _input(shown).numpy()
        noise = np.random.default_rng([case.seed, 3]).normal(size=(len(shown), 32, 32))
        spatial = {
            "LRP epsilon_plus": maps["epsilon_plus"],
            **{("gradient x input" if c == "gradient_x_input" else f"LRP {c}"): maps[c] for c in s["composites"]},
            "raw pictures": images,
            "random": noise,
        }
        found, groups = [], {}
        active = normalised(self.activations(model, shown))
        for neighbours in s["neighbours"]:
            for size in s["pooling"]:
                for name, value in spatial.items():
                    groups[name, size, neighbours] = spray(pooled(value, size), neighbours, seed=case.seed)
            groups["activations", None, neighbours] = spray(active, neighbours, seed=case.seed)
        for (name, size, neighbours), g in groups.items():
            about = {"maps": name, "pooling": size, "neighbours": neighbours}
            told = {"suggested": g.suggested, "gap": g.gap, "tau": g.tau}
            found.append({**about, **told, **agreement(g.labels, g.embedding, planted)})
        size, neighbours = s["pooling"][0], s["neighbours"][0]
        main = groups["LRP epsilon_plus", size, neighbours]
        count = max(main.suggested, 2)
        out = {
            "case": case.place if case.trained else "unused",
            "share": case.share,
            "seed": case.seed,
            "class": case.target,
            "planted": int(planted.sum()),
            "use": self.use(model, case),
            "found": found,
            "pointed": pointed(maps["epsilon_plus"], planted, places, size, count, case.seed)[0],
        }
        if case.trained and case.place == "corner" and case.share in s["ranked"]:
            out["ranking"] = self.ranking(model, case, maps["epsilon_plus"])
        if case.trained and case.place == "corner" and case.share == max(s["shares"]) and case.seed == 0:
            out["view"] = self.view(shown, planted, places, maps["epsilon_plus"], main, case.seed)
        return out

    def ranking(self, model: nn.Module, case: Case, own: Array) -> list[dict[str, Any]]:
        """Tau of every class's maps, with both null distributions."""
        s, out = self.settings, []
        size, neighbours = s["pooling"][0], s["neighbours"][0]
        for c in self.study.progress(range(10), f"classes {case.key}"):
            maps = own if c == case.target else self.relevance(model, self.pictures[c], c, "epsilon_plus")
            rows = pooled(maps, size)
            g = spray(rows, neighbours, seed=case.seed)
            null = rotated_taus(rows, int(s["rotations"]), neighbours, seed=case.seed)
            out.append(
                {
                    "class": c,
                    "suggested": g.suggested,
                    "gap": g.gap,
                    "tau": g.tau,
                    "p_permuted": p_value(g.tau, permuted_taus(g, int(s["permutations"]), case.seed)),
                    "p_rotated": p_value(g.tau, null),
                    "null_mean": float(np.mean(null)),
                    "null_sd": float(np.std(null, ddof=1)),
                }
            )
        return out

    def view(self, shown: Array, planted: Array, places: Array, maps: Array, found: Any, seed: int) -> dict[str, Any]:
        """What the figures need: medoids with their maps, a t-SNE view, the explanation."""
        rows = pooled(maps, self.settings["pooling"][0])
        middle = medoids(rows, found.labels, 3)
        count = max(found.suggested, 2)
        _, explanation = pointed(maps, planted, places, self.settings["pooling"][0], count, seed)
        return {
            "labels": found.labels.tolist(),
            "planted": planted.astype(int).tolist(),
            "eigenvalues": [round(float(v), 5) for v in found.values],
            "tsne": np.round(tsne(rows, seed), 2).tolist(),
            "medoids": middle,
            "pictures": [[_text(shown[i]) for i in group] for group in middle],
            "maps": [[_text(_bytes(maps[i])) for i in group] for group in middle],
            "explanation": _text(_bytes(explanation)),
        }


def pointed(
    maps: Array, planted: Array, places: Array, size: int, clusters: int, seed: int
) -> tuple[dict[str, Any], Array]:
    """K-means on pooled maps, neuralized behind the pooling, explained in pixels.

    Returns
    -------
    dict, array (H, W)
        How the clusters agree with the planted labels, with ``picked`` as in :func:`experiments.spray.agreement`. Then
        shares of positive relevance: ``on_mean``, of the picked rows' mean explanation, in the square; ``each``, the
        same of every cluster, with its size and number of planted rows; ``on_rows`` and ``near`` (at most two pixels
        away), row by row over planted rows in picked clusters; ``map_mean``, of the mean relevance map of all rows,
        without clusters; ``chance``, ``chance_near``, the shares of the area. ``peak``: the mean explanation is largest
        in the square. Then that mean. Where the square has no fixed place, what needs one is None.
    """
    rows = pooled(maps, size)
    fitted = KMeans(clusters, n_init=10, random_state=seed).fit(rows)
    cell = maps.shape[1] // size
    sums = maps.reshape(len(maps), size, cell, size, cell).sum((2, 4))
    total = np.maximum(np.abs(sums).sum((1, 2)), 1e-300)[:, None, None]
    example = torch.from_numpy(cell**2 * maps / total)[:, None]  # its averages are the rows
    network = nn.Sequential(nn.AvgPool2d(cell), nn.Flatten()).double()
    model = encoded(network, fitted.cluster_centers_, example)
    values = model.explain(example).values.reshape(maps.shape)
    labels = np.asarray(model.predict(example))
    agrees = agreement(labels, rows, planted)
    mine = np.isin(labels, agrees["picked"])
    square, wide = area(places, 0, maps.shape[1]), area(places, MARGIN, maps.shape[1])
    one, fixed = square[0], bool((places == places[0]).all())

    def on(value: Array, where: Array) -> float:
        positive = np.maximum(value, 0)
        return float(positive[where].sum() / max(positive.sum(), 1e-300))

    mean = values[mine].mean(0)
    members = np.flatnonzero(mine & planted)
    each = [
        {
            "size": int((labels == c).sum()),
            "planted": int(planted[labels == c].sum()),
            "on_mean": on(values[labels == c].mean(0), one) if fixed else None,
        }
        for c in range(clusters)
    ]
    out = {
        "clusters": clusters,
        **agrees,
        "each": each,
        "on_mean": on(mean, one) if fixed else None,
        "peak": bool(one.flat[int(mean.argmax())]) if fixed else None,
        "map_mean": on(example[:, 0].numpy().mean(0), one) if fixed else None,
        "on_rows": float(np.mean([on(values[i], square[i]) for i in members])) if len(members) else None,
        "near": float(np.mean([on(values[i], wide[i]) for i in members])) if len(members) else None,
        "chance": float(one.mean()),
        "chance_near": float(wide[0].mean()) if fixed else float(wide.mean()),
    }
    return out, mean


# -- private -----------------------------------------------------------------
def _input(pictures: Array) -> Tensor:
    return sets.normalise(pictures, models.IMAGENET_MEAN, models.IMAGENET_STD)


def _upper(net: Any, z: Tensor) -> Tensor:
    out: Tensor = net.linear(F.adaptive_avg_pool2d(net.layer3(z), 1).flatten(1))
    return out


def _classes(model: nn.Module, z: Tensor) -> Array:
    return np.concatenate([_upper(model, part).argmax(1).numpy() for part in torch.split(z, 250)])


def _bytes(values: Array) -> Array:
    """Signed values as bytes around 128, the largest magnitude at 1 or 255."""
    largest = max(float(np.abs(values).max()), 1e-300)
    return np.asarray(np.round(127 * values / largest) + 128, dtype=np.uint8)


def _text(values: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=np.uint8).tobytes()).decode()


def cases(study: Study) -> list[Case]:
    """All of a run: shares in the corner, the largest share anywhere, and the same squares where none was learned."""
    s, out = study.settings, []
    for seed in study.seeds:
        out += [Case("corner", share, seed) for share in s["shares"]]
        out += [Case("anywhere", max(s["shares"]), seed), Case("corner", max(s["shares"]), seed, trained=False)]
    return out


def work(study: Study) -> None:
    """One cell per case."""
    todo = cases(study)
    if study.has(case.key for case in todo):
        return
    bench = Bench(study)
    for case in study.progress(todo, "cases"):
        study.cell(case.key, lambda case=case: bench.row(case))  # type: ignore[misc]


EXPERIMENT = Experiment(
    name="clever_hans",
    paper="Lapuschkin et al. 2019, Anders et al. 2022; beyond the papers",
    question="Does SpRAy find a planted artefact, and does a neuralized clustering of relevance maps point at it?",
    full={
        "seeds": 3,
        "per_class": 200,
        "held_out": 100,
        "epochs": 6,
        "batch": 50,
        "shares": [0.5, 0.2, 0.1, 0.05, 0.02, 0.0],
        "ranked": [0.5, 0.0],
        "pooling": [8, 4, 16],
        "neighbours": [10, 5, 20],
        "composites": ["epsilon_gamma_box", "gradient_x_input"],
        "rotations": 19,
        "permutations": 99,
    },
    quick={
        "seeds": 1,
        "per_class": 60,
        "held_out": 20,
        "epochs": 4,
        "batch": 50,
        "shares": [0.5, 0.1],
        "ranked": [0.5],
        "pooling": [8, 4],
        "neighbours": [10],
        "composites": ["gradient_x_input"],
        "rotations": 9,
        "permutations": 19,
    },
    work=work,
    report=report,
    data=("cifar10", "cifar10_models"),
)
