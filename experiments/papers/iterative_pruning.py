"""Pruning in many steps with a short training after each: do criteria still differ?

Scenario 1 of Yeom et al. 2021 (arXiv 1912.08881) in small: five per cent of a VGG-like network's filters go in every
step, in one global order, then one short epoch on a few pictures. Scores are taken anew in every step or once, from
the network before the first cut, as in the published code for residual networks. The same steps without any training
show what training evens out. Everything goes through :func:`compress.prune`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import compress
from experiments import vgg
from experiments.experiment import Claim, Experiment, Report, Table, Verdict
from experiments.papers.few_shot_pruning import Pictures, pictures
from experiments.papers.vgg_pruning import nested, trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.study import Study

#: name in the tables to the criterion's name; "{seed}" is the number of the seed
CRITERIA = {
    "random": "random:{seed}",
    "weight L1": "weight:l1",
    "activation": "activation",
    "Taylor": "taylor:abs_per_sample",
    "LRP": "lrp:epsilon",
}
MODES = ("per_step", "once", "untrained")
TOLD = {
    "per_step": "trained, scored in every step",
    "once": "trained, scored once",
    "untrained": "untrained, scored in every step",
}
LEAST = 3  # seeds without which nothing is said
NEAR = 0.5  # the spread of criteria with training, as a share of that without, below which it counts as evened out


class Short:
    """One epoch on moved pictures; another order in every call. Products in 16 bits, on a CPU too."""

    def __init__(self, part: Pictures, seed: int, settings: Mapping[str, Any]) -> None:
        self.part, self.seed, self.settings, self.calls = part, seed, settings, 0

    def __call__(self, model: nn.Module) -> None:
        seed = 1000 * self.seed + self.calls
        self.calls += 1
        torch.manual_seed(seed)
        order = torch.randperm(len(self.part.y))
        x = vgg.shifted(self.part.x[order]).contiguous(memory_format=torch.channels_last)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fit = compress.FineTune(
            (x, self.part.y[order]), epochs=1, lr=self.settings["lr"], batch_size=self.settings["batch"], seed=seed,
            progress=False,
        )  # fmt: skip
        on_cpu = not next(model.parameters()).is_cuda
        with torch.autocast("cpu", torch.bfloat16, enabled=on_cpu, cache_enabled=False):  # as in experiments.vgg
            fit(model)


def pruned(model: nn.Module, criterion: str, mode: str, seed: int, data: Pictures, test: Pictures,
           settings: Mapping[str, Any]) -> list[dict[str, float]]:  # fmt: skip
    """Costs and accuracy after every step, the first entry before any."""
    batches = nested(data, seed, settings["per_class"])
    part = data.take(slice(0, settings["fine_tune"]["pictures"]))
    steps = settings["steps"]
    result = compress.prune(
        model,
        data.x[:1],
        batches,
        criterion=CRITERIA[criterion].format(seed=seed),
        target=compress.Target(channels=1 - steps * settings["step"]),
        schedule=compress.Iterative(steps=steps, rescore="once" if mode == "once" else "per_step"),
        fine_tune=None if mode == "untrained" else Short(part, seed, settings["fine_tune"]),
        evaluate=lambda net: vgg.correct(net, test.x, test.y) / len(test.y),
        normalisation=settings["normalisation"],
        floor=1,
        round_to=1,
        seed=seed,
        progress=False,
    )
    before = result.before
    out = [_entry(before, before, result.evaluation_before)]
    return out + [_entry(step.reached, before, step.after) for step in result.history]


def _entry(costs: compress.Costs, before: compress.Costs, found: compress.Evaluation | None) -> dict[str, float]:
    return {
        "channels": costs.channels / before.channels,
        "macs": costs.macs / before.macs,
        "params": costs.params / before.params,
        "accuracy": float("nan") if found is None else found.accuracy,
    }


def runs_of(settings: Mapping[str, Any], seed: int) -> Iterator[tuple[str, str]]:
    """Criterion and mode of all runs with one seed; a random order or magnitudes are not scored once."""
    for mode in MODES:
        for criterion in settings["criteria"] if mode != "once" else settings["once"]:
            yield criterion, mode


def work(study: Study) -> None:
    """Seed by seed; a cell is a run of all steps."""
    s = study.settings
    train = functools.cache(lambda: pictures(study.data, "train"))
    test = functools.cache(lambda: pictures(study.data, "test").take(slice(0, s["test_pictures"])))
    model = functools.cache(lambda: trained(study, train()))
    for seed in study.progress(study.seeds, "seeds"):
        for criterion, mode in runs_of(s, seed):

            def row(criterion: str = criterion, mode: str = mode, seed: int = seed) -> dict[str, Any]:
                steps = pruned(model(), criterion, mode, seed, train(), test(), s)
                return {"criterion": criterion, "mode": mode, "seed": seed, "steps": steps}

            study.cell(f"{criterion}|{mode}|{seed}", row)


# -- what is said ------------------------------------------------------------
Pair = tuple[float, float]


class Runs:
    """Accuracy in per cent and costs: criterion x mode to seeds x steps."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.by: dict[tuple[str, str], dict[int, list[dict[str, float]]]] = {}
        for row in rows:
            self.by.setdefault((row["criterion"], row["mode"]), {})[row["seed"]] = row["steps"]
        self.criteria = [c for c in CRITERIA if any(at[0] == c for at in self.by)]
        self.seeds = min((len(v) for v in self.by.values()), default=0)

    def values(self, criterion: str, mode: str, step: int, what: str = "accuracy") -> dict[int, float]:
        """By seed, in per cent."""
        return {seed: 100 * steps[step][what] for seed, steps in self.by.get((criterion, mode), {}).items()}

    def mean(self, criterion: str, mode: str, step: int, what: str = "accuracy") -> Pair | float | None:
        """Mean and standard error over seeds; the value of one seed."""
        return _spread(list(self.values(criterion, mode, step, what).values()))

    def gap(self, a: tuple[str, str], b: tuple[str, str], step: int) -> Pair:
        """Mean over the seeds of a minus b, and its standard error."""
        left, right = self.values(*a, step), self.values(*b, step)
        found = _spread([left[k] - right[k] for k in sorted(left.keys() & right.keys())])
        return found if isinstance(found, tuple) else (math.nan, math.nan)

    def range_(self, mode: str, step: int, names: Sequence[str]) -> float:
        """Highest minus lowest mean of these criteria."""
        means = [np.mean(list(self.values(c, mode, step).values())) for c in names if (c, mode) in self.by]
        return float(max(means) - min(means)) if means else math.nan


def _spread(values: Sequence[float]) -> Pair | float | None:
    if len(values) < 2:
        return float(values[0]) if values else None
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def report(study: Study) -> Report:
    """From the finished runs."""
    s, found = study.settings, Runs(study.rows)
    marks = sorted({max(1, round(share / s["step"])) for share in s["marks"]})
    tune = s["fine_tune"]
    text = [
        f"The VGG-like network of `experiments/vgg.py`, {s['steps']} steps of {s['step']:.0%} of its filters each, "
        f"ranked over all layers with normalisation `{s['normalisation']}`, {s['per_class']} reference pictures per "
        f"class, new batch-norm statistics from them after every cut, then one epoch on {tune['pictures']:,} training "
        f"pictures (SGD, highest learning rate {tune['lr']}). LRP is the default of `compress.prune`, epsilon; Taylor "
        f"is activation x gradient, absolute per sample. Accuracy on {s['test_pictures']:,} test pictures; mean ± "
        "standard error over seeds, which draw the reference pictures, the random order and the order of training. "
        f"Nothing is chosen by these accuracies.{_unpruned(found)}"
    ]
    tables = {mode: _table(found, mode, marks, s["step"]) for mode in MODES if any(m == mode for _, m in found.by)}
    if found.by:
        tables["costs"] = _costs(found, marks, s["step"])
    if found.seeds < LEAST:
        text.append(f"{found.seeds} seeds are complete of {LEAST} that are needed to say anything.")
        return Report(text, tables, {"curves": _curves(found)} if found.by else {})
    wins: list[str] = []
    losses: list[str] = []
    controls = [c for c in found.criteria if c != "LRP"]
    for mode in ("per_step", "untrained"):
        for step in marks:
            gaps = {c: found.gap(("LRP", mode), (c, mode), step) for c in controls}
            closest = min(gaps, key=lambda c: gaps[c][0])
            line = (
                f"VGG-like network, {step * s['step']:.0%} of the filters, {TOLD[mode]}: LRP "
                f"{_told(found.mean('LRP', mode, step))} %, {gaps[closest][0]:+.1f} ± {gaps[closest][1]:.1f} points "
                f"over the best control ({closest})"
            )
            (wins if all(gap > 2 * error for gap, error in gaps.values()) else losses).append(line)
    claims = _claims(found, marks, s["step"])
    return Report(text, tables, {"curves": _curves(found)}, claims, wins, losses, _summary(found, marks[-1], s["step"]))


def _unpruned(found: Runs) -> str:
    base = {round(100 * runs[0]["accuracy"], 1) for by in found.by.values() for runs in by.values()}
    return f" Before the first cut: {', '.join(map(str, sorted(base)))} %." if base else ""


def _summary(found: Runs, step: int, size: float) -> str:
    out = [f"A VGG-like network in steps of {size:.0%} of its filters; accuracy where {step * size:.0%} are gone."]
    for mode in MODES:
        told = [f"{c} {_told(found.mean(c, mode, step))}" for c in found.criteria if (c, mode) in found.by]
        out.append(f"{TOLD[mode].capitalize()}: {', '.join(told)} %.")
    return " ".join(out)


def _claims(found: Runs, marks: Sequence[int], size: float) -> list[Claim]:
    names = [c for c in found.criteria if c != "random"]
    ratios = {m: found.range_("per_step", m, names) / found.range_("untrained", m, names) for m in marks}
    near = [ratio < NEAR for ratio in ratios.values()]
    spreads = "; ".join(
        f"{m * size:.0%}: {found.range_('untrained', m, names):.1f} without training, "
        f"{found.range_('per_step', m, names):.1f} with" for m in marks
    )  # fmt: skip
    out = [
        Claim(
            "With training after every step the criteria come close together",
            "what is expected of scenario 1 (no published number)",
            f"highest minus lowest mean of {', '.join(names)}, in points: {spreads}",
            "confirmed" if all(near) else "partly" if any(near) else "refuted",
            f"close: the spread is below {NEAR:.0%} of that without training; at {sum(near)} of {len(near)} rates "
            f"(confirmed needs all){_floor(found, marks, size)}",
        )
    ]
    others = [c for c in found.criteria if c != "LRP"]
    gaps = {m: {c: found.gap(("LRP", "per_step"), (c, "per_step"), m) for c in others} for m in marks}
    behind = [m for m, by in gaps.items() if any(gap < -2 * error for gap, error in by.values())]
    ahead = [m for m, by in gaps.items() if all(gap > 2 * error for gap, error in by.values())]
    kind: Verdict = "confirmed" if not behind else "partly" if len(behind) < len(marks) else "refuted"
    out.append(
        Claim(
            "LRP is competitive or better where training follows",
            "abstract: competitive or better than other criteria when retraining follows (no number)",
            "; ".join(
                f"{m * size:.0%}: " + ", ".join(f"over {c} {g:+.1f} ± {e:.1f}" for c, (g, e) in by.items())
                for m, by in gaps.items()
            ),
            kind,
            f"behind a criterion by more than two standard errors at {len(behind)} of {len(marks)} rates, ahead of all "
            f"at {len(ahead)}; confirmed needs none behind, partly some",
        )
    )
    if ("LRP", "once") in found.by:
        pairs = {m: found.gap(("LRP", "per_step"), ("LRP", "once"), m) for m in marks}
        better, worse = ([m for m, (gap, error) in pairs.items() if sign * gap > 2 * error] for sign in (1, -1))
        verdict: Verdict = (
            "confirmed"
            if len(better) == len(marks)
            else "refuted"
            if worse and len(worse) >= len(better)
            else "partly"
            if better
            else "null"
        )
        out.append(
            Claim(
                "Scores should be taken anew in every step",
                "Yasui et al. (arXiv 2511.10861), abstract: re-evaluation during pruning against cascading loss where "
                "weights stay fixed; here weights are trained",
                "LRP, every step over once: "
                + "; ".join(f"{m * size:.0%} {gap:+.1f} ± {error:.1f}" for m, (gap, error) in pairs.items()),
                verdict,
                f"more than two standard errors better at {len(better)} of {len(marks)} rates, worse at {len(worse)}",
            )
        )
    return out


def _floor(found: Runs, marks: Sequence[int], size: float) -> str:
    """Where the spread without training is small because nothing is left."""
    best = {m: max(np.mean(list(found.values(c, "untrained", m).values())) for c in found.criteria) for m in marks}
    low = [f"{m * size:.0%}" for m, value in best.items() if value < 20]
    return f"; without training all are below 20 % at {', '.join(low)}, where a spread says little" if low else ""


def _table(found: Runs, mode: str, marks: Sequence[int], size: float) -> Table:
    rows = [
        [c, *(found.mean(c, mode, m) for m in marks)] for c in found.criteria if (c, mode) in found.by
    ]  # fmt: skip
    return Table(f"Accuracy, {TOLD[mode]}", ["criterion", *(f"{m * size:.0%}" for m in marks)], rows)


def _costs(found: Runs, marks: Sequence[int], size: float) -> Table:
    names = [(c, mode) for c, mode in found.by if mode != "untrained"]
    rows = [
        [c, TOLD[mode], *(found.mean(c, mode, m, what) for m in marks for what in ("macs", "params"))]
        for c, mode in names
    ]
    columns = [f"{m * size:.0%}: {what}" for m in marks for what in ("MACs", "parameters")]
    note = "At equal numbers of filters the criteria leave networks of different cost."
    return Table("Multiply-adds and parameters that are left, in per cent", ["criterion", "mode", *columns], rows, note)


def _curves(found: Runs) -> Figure:
    from matplotlib.figure import Figure

    colours = dict(zip(CRITERIA, ("0.6", "tab:brown", "tab:olive", "tab:green", "tab:blue"), strict=True))
    fig = Figure(figsize=(11, 8), layout="tight")
    axes = fig.subplots(2, 2, sharey=True)
    panels = [("untrained", "channels"), ("per_step", "channels"), ("once", "channels"), ("per_step", "macs")]
    for ax, (mode, what) in zip(axes.flat, panels, strict=True):
        for c in found.criteria:
            runs = found.by.get((c, mode))
            if not runs:
                continue
            count = len(next(iter(runs.values())))
            at = [float(np.mean(list(found.values(c, mode, k, what).values()))) for k in range(count)]
            points = [found.mean(c, mode, k) for k in range(count)]
            pairs = [p if isinstance(p, tuple) else (p, 0.0) for p in points]
            x = [100 - a for a in at] if what == "channels" else at
            ax.errorbar(x, [p[0] for p in pairs], [p[1] for p in pairs], color=colours[c], label=c)
        ax.set_title(TOLD[mode], fontsize=10)
        ax.set_xlabel("filters removed, %" if what == "channels" else "multiply-adds left, %")
        if what == "macs":
            ax.invert_xaxis()
    for ax in axes[:, 0]:
        ax.set_ylabel("top-1, %")
    axes[0][0].legend(fontsize=8)
    return fig


def _told(value: Pair | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else f"{value[0]:.1f} ± {value[1]:.1f}"


EXPERIMENT = Experiment(
    name="iterative_pruning",
    paper="Yeom et al. 2021, Pruning by Explaining (arXiv 1912.08881), scenario 1",
    question="Do criteria still differ where a short training follows every step of pruning?",
    full={
        "seeds": 3,
        "vgg": {"widths": vgg.WIDTHS, "epochs": vgg.EPOCHS, "thousands": vgg.LEARNT // 1000, "seed": vgg.SEED},
        "criteria": list(CRITERIA),
        "once": ["LRP"],
        "step": 0.05,
        "steps": 12,
        "marks": [0.2, 0.4, 0.6],
        "normalisation": "mean",
        "per_class": 10,
        "fine_tune": {"pictures": 2000, "lr": 0.02, "batch": 50},
        "test_pictures": 1000,
    },
    quick={
        "seeds": 1,
        "vgg": {"widths": [[16], [32], [32, 32]], "epochs": 4, "thousands": 5, "seed": 0},
        "criteria": ["random", "weight L1", "LRP"],
        "once": ["LRP"],
        "step": 0.15,
        "steps": 3,
        "marks": [0.15, 0.45],
        "normalisation": "mean",
        "per_class": 5,
        "fine_tune": {"pictures": 500, "lr": 0.02, "batch": 50},
        "test_pictures": 200,
    },
    work=work,
    report=report,
    data=("cifar10",),
)
