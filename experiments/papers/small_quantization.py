"""ECQx against ECQ and controls at equal bytes on two small networks, with the drift of heat maps.

A convolutional network on scikit-learn's digits and an MLP (784-300-100-10) on
MNIST, 2 to 5 bits, every arm held to the same entropy of its levels. As in
:mod:`experiments.papers.ecqx`, which has the arms; here trained networks, their
training pictures and the test pictures are small enough for many cells, and each
run is explained: how far its heat maps are from those of the network before.

>>> from experiments.papers.small_quantization import NETS
>>> sorted(NETS)
['digits', 'mlp']
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import compress
from compress import Rate
from compress.drift import drift
from experiments import data, digits
from experiments.experiment import Claim, Experiment, Report, Table, Verdict
from experiments.papers.ecqx import ARMS
from experiments.spread import mean_and_error, paired_interval
from experiments.study import Study
from lrp.errors import LRPError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batches = list[tuple[Tensor, Tensor]]
CONTROLS = ("ECQ", "magnitude", "gradient x weight", "random relevance")
SOURCES = tuple(name for name in ARMS if name.startswith("ECQx"))
RATES = {2: (0.8, 0.3), 3: (1.2, 0.5), 4: (1.6, 0.6), 5: (2.0, 0.8)}
LEAST = 5  # seeds without which nothing is claimed


def mlp() -> nn.Sequential:
    """784-300-100-10 with ReLU."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


@dataclass
class Net:
    """A trained network, what it is trained on further, and what it is judged on."""

    model: nn.Module
    build: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: Batches
    epochs: int
    batch: int
    lr: float


def _digits(study: Study) -> Net:
    state = study.weights("digits", lambda: digits.train().state_dict())
    model = digits.build()
    model.load_state_dict(state)
    return Net(model.eval(), digits.build, digits.training(), [digits.test()], study.settings["epochs"], 50, 2e-3)


def _mlp(study: Study) -> Net:
    raw, labels = data.mnist(study.data, "train")
    count = study.settings["trained_on"]
    x = torch.from_numpy(raw[:count].astype(np.float32) / 255).unsqueeze(1)
    y = torch.from_numpy(labels[:count])
    raw_test, labels_test = data.mnist(study.data, "test")
    tested = study.settings["test"]
    x_test = torch.from_numpy(raw_test[:tested].astype(np.float32) / 255).unsqueeze(1)
    test = list(zip(x_test.split(1000), torch.from_numpy(labels_test[:tested]).split(1000), strict=True))

    def trained() -> Mapping[str, Tensor]:
        torch.manual_seed(0)
        model = mlp()
        tune = compress.FineTune((x, y), epochs=8, optimizer="adamw", lr=1e-3, batch_size=100, progress=False)
        tune(model)
        return model.state_dict()

    model = mlp()
    model.load_state_dict(study.weights(f"mlp-{count}", trained))
    return Net(model.eval(), mlp, (x, y), test, study.settings["epochs"], 100, 1e-3)


NETS: dict[str, Callable[[Study], Net]] = {"digits": _digits, "mlp": _mlp}


def cells(study: Study) -> Iterator[tuple[str, str, int, float, str, int]]:
    """(key, net, bits, rate, arm, seed), seed by seed."""
    for seed in study.seeds:
        for name in study.settings["nets"]:
            for bits in study.settings["bits"]:
                for rate in RATES[bits][: study.settings["rates"]]:
                    for arm in study.settings["arms"] or ARMS:
                        yield f"{name}|{bits}|{rate}|{arm}|{seed}", name, bits, rate, arm, seed


def quantized(net: Net, arm: str, bits: int, rate: float, seed: int) -> compress.QuantizeResult:
    """One run; all arms have the same settings but for what matters to the zero level."""
    method, relevance = ARMS[arm]
    tune = compress.FineTune(
        net.train, epochs=net.epochs, optimizer="adamw", lr=net.lr, weight_decay=0.0, batch_size=net.batch,
        mixed_precision="off", seed=seed, progress=False,
    )  # fmt: skip
    return compress.quantize(
        net.model, net.train, method=method, bits=bits, rate=Rate(bits_per_weight=rate), relevance=relevance,
        step="mse", train=tune, allow_collapse=True, seed=seed, progress=False,
    )  # fmt: skip


def entry(net: Net, result: compress.QuantizeResult) -> dict[str, Any]:
    """Accuracy, bytes of a file that was read again, and how the heat maps of the test pictures changed."""
    found = compress.evaluate(result.model, net.test)
    x, y = net.test[0]
    maps = drift(net.model, result.model, [(x[:200], y[:200])], progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        compress.save(result.model, path)
        again = compress.load(path, net.build)
        if not all(torch.equal(t, again.state_dict()[n]) for n, t in result.model.state_dict().items()):
            raise AssertionError("a file gave another network")
        size = path.stat().st_size
    return {
        "correct": round(found.accuracy * found.count),
        "count": found.count,
        "bytes": size,
        "before": result.before,
        "zeros": result.reached.zeros,
        "bits_per_weight": result.reached.bits_per_weight,
        "collapsed": list(result.collapsed),
        **{name: value.mean for name, value in maps.overall.items()},
    }


def work(study: Study) -> None:
    """Networks, then all cells."""
    held: dict[str, Net] = {}
    todo = list(cells(study))
    for key, name, bits, rate, arm, seed in study.progress(todo, "runs"):
        if name not in held and not study.has([key]):
            held[name] = NETS[name](study)
            net = held[name]
            study.cell(f"{name}|before", lambda net=net: _before(net))  # type: ignore[misc]  # bound at once

        def cell(
            name: str = name, bits: int = bits, rate: float = rate, arm: str = arm, seed: int = seed
        ) -> dict[str, Any]:
            about = {"net": name, "bits": bits, "rate": rate, "arm": arm, "seed": seed}
            began = time.monotonic()
            try:
                found = entry(held[name], quantized(held[name], arm, bits, rate, seed))
            except LRPError as error:  # a run that fails is a result, too
                return {**about, "failed": str(error)}
            return {**about, **found, "seconds": round(time.monotonic() - began, 2)}

        study.cell(key, cell)


def _before(net: Net) -> dict[str, Any]:
    found = compress.evaluate(net.model, net.test)
    return {"correct": round(found.accuracy * found.count), "count": found.count}


class Runs:
    """Finished runs by (net, bits, rate, arm) and seed."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.before = {r["key"].split("|")[0]: 100 * r["correct"] / r["count"] for r in rows if "arm" not in r}
        self.failed = [r for r in rows if "failed" in r]
        self.at: dict[tuple[str, int, float, str], dict[int, Mapping[str, Any]]] = {}
        for row in rows:
            if "arm" in row and "failed" not in row:
                self.at.setdefault((row["net"], row["bits"], row["rate"], row["arm"]), {})[row["seed"]] = row
        self.points = sorted({key[:3] for key in self.at}, key=lambda p: (p[0], -p[1], -p[2]))

    def values(self, point: tuple[str, int, float], arm: str, what: str = "accuracy") -> dict[int, float]:
        """By seed; accuracies in per cent."""
        found = self.at.get((*point, arm), {})
        return {s: 100 * r["correct"] / r["count"] if what == "accuracy" else r[what] for s, r in found.items()}

    def difference(
        self, point: tuple[str, int, float], a: str, b: str, what: str = "accuracy"
    ) -> tuple[float, float, float, int]:
        """Mean of a minus b over the same seeds, its 95 % interval by bootstrap, and their number."""
        return paired_interval(self.values(point, a, what), self.values(point, b, what))

    def count(self, a: str, b: str, what: str = "accuracy") -> tuple[int, int, int]:
        """Points at which a is ahead of b, behind it, not told apart."""
        found = [self.difference(p, a, b, what) for p in self.points]
        found = [f for f in found if f[3] >= LEAST]
        ahead, behind = sum(f[1] > 0 for f in found), sum(f[2] < 0 for f in found)
        return ahead, behind, len(found) - ahead - behind


def _table(runs: Runs, net: str, what: str, title: str, digits: int) -> Table:
    points = [p for p in runs.points if p[0] == net]
    rows: list[list[Any]] = [
        [arm, *(mean_and_error(list(runs.values(p, arm, what).values())) for p in points)] for arm in ARMS
    ]
    if what == "accuracy":
        for name, form in (("bytes", "{:,.0f}"), ("zeros", "{:.0%}")):
            spans = []
            for p in points:
                every = [v for arm in ARMS for v in runs.values(p, arm, name).values()]
                spans.append(f"{form.format(min(every))} to {form.format(max(every))}")
            rows.append([f"{name}, all runs", *spans])
    return Table(title, ["arm", *(f"{bits} bits at {rate}" for _, bits, rate in points)], rows, digits=digits)


def report(study: Study) -> Report:
    """The page."""
    runs = Runs(study.rows)
    s, number = study.settings, len(runs.points)
    before = ", ".join(f"{net} {value:.2f} %" for net, value in sorted(runs.before.items()))
    text = [
        f"Before: {before}. Each run trains a copy for {s['epochs']} epochs under the entropy constraint, held to the "
        "same entropy in all arms; first and last layer at 8 bits. Mean ± standard error over "
        f"{s['seeds']} seeds; intervals are 95 %, by bootstrap over paired seeds. Bytes are of whole files, which were "
        "read again.",
        "\n".join(
            f"- {a} against {b}: ahead at {n[0]} of {number} points, behind at {n[1]}, not told apart at {n[2]}."
            for b in CONTROLS for a in SOURCES for n in [runs.count(a, b)] if sum(n)
        )
        or f"No point has {LEAST} seeds of the arms to be compared yet: nothing is concluded.",
    ]  # fmt: skip
    if runs.failed:
        text.append("Runs that failed: " + "; ".join(f"{r['key']}: {r['failed']}" for r in runs.failed))
    tables = {}
    for net in sorted({p[0] for p in runs.points}):
        tables[f"{net}_accuracy"] = _table(runs, net, "accuracy", f"{net}: top-1 in per cent", 2)
        tables[f"{net}_maps"] = _table(runs, net, "cosine", f"{net}: cosine of heat maps with those before", 3)
    told = {source: runs.count(source, "ECQ") for source in SOURCES}
    ours = "; ".join(f"{source}: ahead at {a}, behind at {b} of {number}" for source, (a, b, _) in told.items())
    better = {source: runs.count(source, "ECQ", "cosine") for source in SOURCES}
    maps = "; ".join(f"{source}: ahead at {a}, behind at {b} of {number}" for source, (a, b, _) in better.items())
    claims = [
        Claim("more accuracy at the same size", "ECQx at or above ECQ, most at high sparsity and few bits", ours,
              _verdict(list(told.values())), "paired intervals at equal entropy, two small networks, 2 to 5 bits"),
        Claim("heat maps stay closer to the original", "no published value", maps, _verdict(list(better.values())),
              "cosine over 200 test pictures, paired by seed"),
    ] if all(sum(n) for n in told.values()) and s["seeds"] >= LEAST else []  # fmt: skip
    won: dict[str, list[str]] = {}
    for p in runs.points:
        for source in SOURCES:
            gaps = [runs.difference(p, source, control) for control in CONTROLS]
            if all(g[3] >= LEAST and g[1] > 0 for g in gaps):
                won.setdefault(p[0], []).append(f"{source} with {p[1]} bits at {p[2]} bits per weight")
    wins = [f"{net}: ahead of ECQ and of every control are {'; '.join(found)}" for net, found in won.items()]
    losses = []
    gaps_of = {p: [runs.difference(p, a, "ECQ") for a in SOURCES] for p in runs.points}
    behind = [p for p, gaps in gaps_of.items() if all(g[3] >= LEAST and g[2] < 0 for g in gaps)]
    if behind:
        losses.append(
            f"Quantization of small networks: every source of relevance is behind plain ECQ at {len(behind)} of "
            f"{number} points"
        )
    figures = {"curves": _figure(runs)} if runs.points else {}
    return Report(text, tables, figures, claims, wins, losses, _summary(runs, s) if claims else "")


def _summary(runs: Runs, settings: Mapping[str, Any]) -> str:
    """For RESULTS.md; of the points that have all seeds of all arms."""
    arms = (*SOURCES, *CONTROLS)
    done = [p for p in runs.points if min(len(runs.values(p, a)) for a in arms) >= settings["seeds"]]
    if not done:
        return ""

    def overall(a: str, b: str, what: str = "accuracy") -> tuple[float, float]:
        """Of paired differences, their mean over the points; standard error over the seeds."""
        pairs = [(runs.values(p, a, what), runs.values(p, b, what)) for p in done]
        seeds = sorted(set.intersection(*(x.keys() & y.keys() for x, y in pairs)))
        v = [float(np.mean([x[s] - y[s] for x, y in pairs])) for s in seeds]
        return float(np.mean(v)), float(np.std(v, ddof=1) / np.sqrt(len(v)))

    best = max(SOURCES, key=lambda s: overall(s, "ECQ")[0])

    def told(other: str, what: str = "accuracy", digits: int = 2, unit: str = " points") -> str:
        (mean, error), found = overall(best, other, what), [runs.difference(p, best, other, what) for p in done]
        ahead, behind = sum(f[1] > 0 for f in found), sum(f[2] < 0 for f in found)
        mean = round(mean, digits) + 0.0  # no -0.00
        return f"{mean:+.{digits}f} ± {error:.{digits}f}{unit}, ahead in {ahead} and behind in {behind} of {len(done)}"

    before = " and ".join(f"{net} {value:.2f} %" for net, value in sorted(runs.before.items()))
    rest = len(runs.points) - len(done)
    return (
        f"Small networks ({before} before) are quantized while they are trained further, and all variants are held to "
        "files of the same size; the paper claims that relevance, used to decide which weights become zero (ECQx), "
        "gives more accuracy than the size constraint alone (ECQ). "
        f"Over {len(done)} settings of network, bits and size, the best of {len(SOURCES)} forms of relevance changes "
        f"the accuracy of ECQ by {told('ECQ')}. "
        f"The same form against random values in the place of relevance: {told('random relevance')}; against gradient "
        f"x weight: {told('gradient x weight')}; against weight magnitude: {told('magnitude')}. "
        "Likeness of heat maps to those of the network before (cosine), against ECQ: "
        f"{told('ECQ', 'cosine', 3, '')}{f'; {rest} more settings are unfinished' if rest else ''}."
    )


def _verdict(counts: Sequence[tuple[int, int, int]]) -> Verdict:
    """Confirmed: a source is ahead at most points and never behind; refuted: all are behind more often than ahead."""
    if any(a > (a + b + t) / 2 and not b for a, b, t in counts):
        return "confirmed"
    if all(b > a for a, b, _ in counts):
        return "refuted"
    return "partly" if any(a > b for a, b, _ in counts) else "null"


STYLES = {
    "ECQ": ("black", "-", "o"), "ECQx, background": ("tab:red", "-", "s"),
    "ECQx, quantized + step": ("tab:orange", "-", "^"), "ECQx, quantized": ("tab:purple", "--", "v"),
    "magnitude": ("tab:blue", "-", "D"), "gradient x weight": ("tab:green", "--", "P"),
    "random relevance": ("0.55", ":", "x"),
}  # fmt: skip


def _figure(runs: Runs) -> Figure:
    """Accuracy against bytes, one panel per network."""
    from matplotlib.figure import Figure

    nets = sorted({p[0] for p in runs.points})
    figure = Figure(figsize=(5.2 * len(nets), 4))
    for ax, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        for arm, (colour, line, mark) in STYLES.items():
            found = [(runs.values(p, arm, "bytes"), runs.values(p, arm)) for p in runs.points if p[0] == net]
            points = sorted(
                (np.mean(list(size.values())) / 1024, np.mean(list(v.values()))) for size, v in found if size
            )
            if points:
                x, y = zip(*points, strict=True)
                ax.plot(x, y, color=colour, ls=line, marker=mark, ms=4, label=arm)
        if net in runs.before:
            ax.axhline(runs.before[net], color="0.8", lw=1)
        ax.set_xlabel("file, KiB")
        ax.set_title(net, fontsize=10)
        ax.set_ylabel("top-1 on the test pictures, %")
        ax.legend(fontsize=7)
    figure.tight_layout()
    return figure


EXPERIMENT = Experiment(
    "small_quantization",
    "Becking et al. 2022 (ECQx)",
    "At equal bytes, does relevance help small networks, and their heat maps?",
    full={"seeds": 5, "nets": ["digits", "mlp"], "bits": [2, 3, 4, 5], "rates": 2, "arms": None, "epochs": 3,
          "trained_on": 6000, "test": 10_000},
    quick={"seeds": 2, "nets": ["digits"], "bits": [4], "rates": 1, "arms": ["ECQ", "ECQx, quantized + step",
           "random relevance"], "epochs": 1, "trained_on": 1000, "test": 1000},
    work=work,
    report=report,
    data=("mnist",),
)  # fmt: skip
