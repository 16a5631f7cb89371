"""Tables, figure and words of the few-shot pruning runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.cells import Cells
from experiments.papers.few_shot_pruning import DATA_FREE, GROUND_TRUTH, PER_CLASS, RATES, best_normalisations

NETS = {"resnet20": "ResNet-20", "resnet56": "ResNet-56"}
BASELINE = {"resnet20": 91.73, "resnet56": 93.39}  # the unpruned networks on the same pictures, in per cent
DRAWS = {"resnet20": 20, "resnet56": 10}
LEAST = 5  # draws without which nothing is said in words


class Run:
    """Accuracies of one network: criterion x rate x draw, in per cent."""

    def __init__(self, folder: Path, net: str) -> None:
        self.net = net
        self.chosen = best_normalisations(Cells(folder / f"{net}-validation.jsonl"))
        rows = list(Cells(folder / f"{net}-test.jsonl").rows.values())
        self.values: dict[tuple[str, float, bool], dict[int, float]] = {}
        for row in rows:
            at = self.values.setdefault((row["criterion"], row["rate"], row["reestimated"]), {})
            at[row["draw"]] = 100 * row["correct"] / row["count"]
        names = {row["criterion"] for row in rows}
        self.criteria = [n for n in self.chosen if n in names]
        counts = [len(v) for (n, _, again), v in self.values.items() if again or n not in DATA_FREE]
        self.draws = min(counts, default=0)

    def mean(self, criterion: str, rate: float, again: bool) -> tuple[float, float, int]:
        """Mean, standard error and draws."""
        v = np.array(list(self.values.get((criterion, rate, again), {}).values()))
        if not len(v):
            return float("nan"), float("nan"), 0
        error = float(v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else 0.0
        return float(v.mean()), error, len(v)

    def difference(self, a: str, b: str, rate: float, again: bool) -> tuple[float, float]:
        """Mean of a minus b over the same draws, and its standard error."""
        left, right = (self.values.get((n, rate, again), {}) for n in (a, b))
        if b in DATA_FREE and not again:
            right = dict.fromkeys(left, next(iter(right.values()), float("nan")))
        if a in DATA_FREE and not again:
            left = dict.fromkeys(right, next(iter(left.values()), float("nan")))
        d: NDArray[np.float64] = np.array([left[k] - right[k] for k in sorted(left.keys() & right.keys())])
        if not len(d):
            return float("nan"), float("nan")
        return float(d.mean()), float(d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else 0.0

    def best(self, names: Sequence[str], rate: float, again: bool) -> str:
        """The criterion with the highest mean."""
        return max(names, key=lambda n: np.nan_to_num(self.mean(n, rate, again)[0], nan=-1.0))


def table(run: Run, again: bool) -> str:
    """Markdown: criterion, normalisation, mean and standard error per rate; the best of each rate in bold."""
    best = {rate: run.best([n for n in run.criteria if n not in GROUND_TRUTH], rate, again) for rate in RATES}
    lines = ["| criterion | layer normalisation | " + " | ".join(f"{rate:.0%}" for rate in RATES) + " |"]
    lines.append("|---|---|" + "---|" * len(RATES))
    for name in run.criteria:
        cells = []
        for rate in RATES:
            mean, error, count = run.mean(name, rate, again)
            text = "-" if not count else f"{mean:.1f}" if count == 1 else f"{mean:.1f} ± {error:.1f}"
            cells.append(f"**{text}**" if best[rate] == name else text)
        lines.append(f"| {name} | {run.chosen[name][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def words(run: Run) -> list[str]:
    """Where relevance wins over every control and baseline, and where it does not, from the paired differences."""
    relevance = [n for n in run.criteria if n.startswith("LRP")]
    others = [n for n in run.criteria if n not in relevance and n not in GROUND_TRUTH]
    if not relevance or not others:
        return []
    if run.draws < LEAST:
        return [f"The run is not done: {run.draws} of {DRAWS[run.net]} draws are complete. No conclusion is drawn yet."]
    out = []
    for again in (False, True):
        wins, losses, ties = [], [], []
        for rate in RATES:
            ours, theirs = (run.best(names, rate, again) for names in (relevance, others))
            gap, error = run.difference(ours, theirs, rate, again)
            text = f"{rate:.0%} ({ours} over {theirs}: {gap:+.1f} ± {error:.1f} points)"
            (wins if gap > 2 * error else losses if gap < -2 * error else ties).append(text)
        mode = "With" if again else "Without"
        out.append(
            f"{mode} new batch-norm statistics, the best LRP form is ahead of every other criterion at "
            f"{'; '.join(wins) or 'no rate'}, behind at {'; '.join(losses) or 'no rate'}, and not told apart "
            f"(two standard errors of the paired difference) at {'; '.join(ties) or 'no rate'}."
        )
    return out


def figure(runs: Mapping[str, Run], path: Path) -> None:
    """Curves of the best form of each family, one panel per network and mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = {
        "random": ("0.6", ":"), "weight L1": ("tab:brown", "--"), "activation": ("tab:olive", "--"),
        "Taylor, published": ("tab:green", "--"), "Taylor, per sample": ("tab:green", "-"),
        "logit x activation": ("tab:purple", "-"), "LRP epsilon": ("tab:blue", "-"), "LRP z+": ("tab:red", "-"),
        "LRP z+, signed": ("tab:red", ":"), "ablation (ground truth)": ("black", "-."),
    }  # fmt: skip
    fig, axes = plt.subplots(len(runs), 2, figsize=(10, 4 * len(runs)), sharex=True, sharey="row", squeeze=False)
    for row, (net, run) in zip(axes, runs.items(), strict=True):
        for ax, again in zip(row, (False, True), strict=True):
            for name, (colour, style) in shown.items():
                if name not in run.criteria:
                    continue
                points = [run.mean(name, rate, again) for rate in RATES]
                x = [100 * rate for rate in RATES]
                ax.errorbar(x, [p[0] for p in points], [p[1] for p in points], color=colour, ls=style, label=name)
            ax.axhline(BASELINE[net], color="0.8", lw=1)
            ax.set_title(f"{NETS[net]}, {'with' if again else 'without'} new batch-norm statistics", fontsize=10)
            ax.set_xlabel("filters removed, % of the prunable ones")
        row[0].set_ylabel("top-1 on the test set, %")
    axes[0][0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def write(folder: Path) -> None:
    """README.md and curves.png beside the raw lines."""
    runs = {net: Run(folder, net) for net in NETS if (folder / f"{net}-test.jsonl").exists()}
    text = [
        "# Few-shot pruning without fine-tuning",
        "",
        "`python -m experiments.papers.few_shot_pruning validate|test --net resnet20|resnet56`, then `table`. Public "
        f"CIFAR-10 networks, {PER_CLASS} reference pictures per class drawn from the first 45,000 training pictures, "
        "rates in per cent of the filters that can be removed (inner convolutions of the blocks), one global order, "
        "filters physically cut, no fine-tuning. Top-1 on the 10,000 test pictures, mean ± standard error over the "
        "draws of the reference pictures. Criteria: see `CRITERIA` in the script; magnitudes are per sample unless "
        "said otherwise; start relevance one at the true class. Each criterion has the layer normalisation that was "
        "best for it on training pictures kept apart (45,000 onwards), averaged over rates, draws and both modes. "
        "`--precision bfloat16`: products of the test passes in 16 bits; see the check below each table.",
        "",
        "![curves](curves.png)",
        "",
    ]
    for net, run in runs.items():
        text += [f"## {NETS[net]} (unpruned {BASELINE[net]} %), {run.draws} draws", "", *words(run), ""]
        for again in (False, True):
            text += [f"{'With' if again else 'Without'} new batch-norm statistics:", "", table(run, again), ""]
        text += [*precision(folder, net), *validation_table(folder, net)]
    (folder / "README.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    if runs:
        figure(runs, folder / "curves.png")


def precision(folder: Path, net: str) -> list[str]:
    """How far cells move when their test pass runs in 32 bits."""
    again = Cells(folder / f"{net}-float32.jsonl").rows
    rows = Cells(folder / f"{net}-test.jsonl").rows
    both = [(row, rows[key]) for key, row in again.items() if key in rows]
    if not both:
        return []
    moved = [100 * (b["correct"] - a["correct"]) / a["count"] for a, b in both]
    return [
        f"{len(both)} of these cells again with products in 32 bits: 16 bits move the accuracy by "
        f"{np.mean(moved):+.2f} points in the mean and by {max(map(abs, moved)):.2f} at most.",
        "",
    ]


def validation_table(folder: Path, net: str) -> list[str]:
    """Mean validation accuracy of every criterion under every normalisation."""
    rows: dict[str, dict[str, list[float]]] = {}
    cells: list[dict[str, Any]] = list(Cells(folder / f"{net}-validation.jsonl").rows.values())
    for row in cells:
        by = rows.setdefault(row["criterion"], {}).setdefault(row["normalisation"], [])
        by.append(100 * row["correct"] / row["count"])
    names = ("none", "sum", "l2", "mean")
    pictures = max((row["count"] for row in cells), default=0)
    draws = 1 + max((row["draw"] for row in cells), default=0)
    text = [f"On {pictures} validation pictures, mean over the rates and both modes, {draws} draws:", ""]
    text += ["| criterion | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for criterion, by in rows.items():
        text.append(f"| {criterion} | " + " | ".join(f"{np.mean(by[n]):.1f}" if n in by else "-" for n in names) + " |")
    return [*text, ""]
