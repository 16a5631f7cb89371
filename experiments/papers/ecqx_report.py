"""Tables, figure and words of the ECQx runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cells import Cells
from experiments.papers.ecqx import (
    ARMS,
    EPOCHS,
    LEARNING_RATES,
    RATES,
    ROUNDED,
    SEEDS,
    STEPS,
    TRAINED_ON,
    TRIED,
    VARIANTS,
    best_rate,
)  # fmt: skip

BASELINE = 91.73  # the network all runs start from, on the same pictures, in per cent
ORIGINAL = 1_097_776  # bytes of its file
RESAMPLED = 10_000
SOURCES = ("ECQx, background", "ECQx, quantized + step", "ECQx, quantized")
CONTROLS = ("magnitude", "gradient x weight", "random relevance")


class Runs:
    """Finished runs by (bits, rate, arm) and seed."""

    def __init__(self, folder: Path) -> None:
        self.rows = list(Cells(folder / "runs.jsonl").rows.values())
        self.failed = [r for r in self.rows if "failed" in r]
        self.at: dict[tuple[int, float, str], dict[int, dict[str, Any]]] = {}
        for row in self.rows:
            if "failed" not in row:
                self.at.setdefault((row["bits"], row["rate"], row["arm"]), {})[row["seed"]] = row

    def values(self, bits: int, rate: float, arm: str, what: str = "accuracy") -> dict[int, float]:
        """By seed; accuracies in per cent."""
        found = self.at.get((bits, rate, arm), {})
        return {s: 100 * r["correct"] / r["count"] if what == "accuracy" else r[what] for s, r in found.items()}

    def difference(self, bits: int, rate: float, a: str, b: str) -> tuple[float, float, float, int]:
        """Mean of a minus b over the same seeds, with a 95 % interval by bootstrap over the seeds, and their number."""
        left, right = (self.values(bits, rate, arm) for arm in (a, b))
        both = sorted(left.keys() & right.keys())
        if not both:
            return float("nan"), float("nan"), float("nan"), 0
        d = np.array([left[s] - right[s] for s in both])
        draw = np.random.default_rng(0).integers(0, len(d), (RESAMPLED, len(d)))
        low, high = np.percentile(d[draw].mean(1), [2.5, 97.5])
        return float(d.mean()), float(low), float(high), len(both)

    def points(self) -> list[tuple[int, float]]:
        return [(b, rate) for b in sorted(RATES, reverse=True) for rate in RATES[b] if (b, rate, "ECQ") in self.at]


def _mean(values: Sequence[float]) -> str:
    v = np.array(list(values))
    if not len(v):
        return "-"
    error = f" ± {v.std(ddof=1) / np.sqrt(len(v)):.2f}" if len(v) > 1 else ""
    return f"{v.mean():.2f}{error}" + ("" if len(v) == SEEDS else f" (n={len(v)})")


def table(runs: Runs, bits: int) -> list[str]:
    """Accuracy, zeros and bytes of every arm at every rate."""
    rates = [rate for b, rate in runs.points() if b == bits]
    out = ["| arm | " + " | ".join(f"{rate} bits per weight" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    names = [*ARMS, *(v for v in VARIANTS if any((bits, rate, v) in runs.at for rate in rates))]
    for arm in names:
        cells = [_mean(list(runs.values(bits, rate, arm).values())) for rate in rates]
        out.append(f"| {arm} | " + " | ".join(cells) + " |")
    for what, form in (("zeros", "{:.1%}"), ("bytes", "{:,.0f}")):
        cells = []
        for rate in rates:
            found = [v for arm in ARMS for v in runs.values(bits, rate, arm, what).values()]
            low, high = min(found), max(found)
            cells.append(form.format(low) if low == high else f"{form.format(low)} to {form.format(high)}")
        out.append(f"| *{what}, all runs* | " + " | ".join(cells) + " |")
    return out


def differences(runs: Runs, bits: int) -> list[str]:
    """Paired differences to ECQ, with their intervals."""
    rates = [rate for b, rate in runs.points() if b == bits]
    out = ["| arm less ECQ | " + " | ".join(f"{rate}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for arm in (*ARMS, *VARIANTS):
        if arm == "ECQ" or not any((bits, rate, arm) in runs.at for rate in rates):
            continue
        cells = []
        for rate in rates:
            mean, low, high, n = runs.difference(bits, rate, arm, "ECQ")
            cells.append(
                "-" if not n else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" + ("" if n >= SEEDS else f" (n={n})")
            )
        out.append(f"| {arm} | " + " | ".join(cells) + " |")
    return out


def words(runs: Runs) -> list[str]:
    """The verdict on the claim, from the intervals."""
    full = [p for p in runs.points() if all(len(runs.at.get((*p, arm), {})) >= SEEDS for arm in ARMS)]
    if not full:
        return ["The runs are not done: no rate has five seeds of every arm. No conclusion is drawn yet."]

    def count(a: str, b: str) -> tuple[int, int, int]:
        ahead = behind = 0
        for p in full:
            _, low, high, _ = runs.difference(*p, a, b)
            ahead, behind = ahead + (low > 0), behind + (high < 0)
        return ahead, behind, len(full) - ahead - behind

    scores = {source: count(source, "ECQ") for source in SOURCES}
    if all(behind > ahead for ahead, behind, _ in scores.values()):
        verdict = "**Refuted in this setting**: at equal bytes relevance does not add accuracy, it takes some."
    elif any(ahead > behind for ahead, behind, _ in scores.values()):
        verdict = "**Confirmed for some source** (see below)."
    else:
        verdict = "**Null**: at equal bytes relevance makes no difference that the seeds can tell."
    out = [f"{verdict} {len(full)} rates have five seeds of every arm."]
    out += [
        f"- {source} against ECQ: ahead at {a} of {len(full)} rates, behind at {b}, not told apart at {t}."
        for source, (a, b, t) in scores.items()
    ]
    for control in CONTROLS:
        a, b, t = count(control, "ECQ")
        out.append(f"- {control} against ECQ: ahead at {a}, behind at {b}, not told apart at {t}.")
    for control in CONTROLS:
        best = max(SOURCES, key=lambda s: count(s, control)[0] - count(s, control)[1])
        a, b, t = count(best, control)
        out.append(f"- {best} against {control}: ahead at {a}, behind at {b}, not told apart at {t}.")
    return out


def figure(runs: Runs, path: Path) -> None:
    """Accuracy against bytes, one panel per number of bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    styles = {
        "ECQ": ("black", "-", "o"), "ECQx, background": ("tab:red", "-", "s"),
        "ECQx, quantized + step": ("tab:orange", "-", "^"), "ECQx, quantized": ("tab:purple", "--", "v"),
        "magnitude": ("tab:blue", "-", "D"), "gradient x weight": ("tab:green", "--", "P"),
        "random relevance": ("0.55", ":", "x"),
    }  # fmt: skip
    shown = sorted({b for b, _ in runs.points()}, reverse=True)
    fig, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4.2), squeeze=False, sharey=True)
    for ax, bits in zip(axes[0], shown, strict=True):
        for arm, (colour, line, mark) in styles.items():
            points = []
            for b, rate in runs.points():
                v = list(runs.values(b, rate, arm).values())
                if b == bits and v:
                    kib = np.mean(list(runs.values(b, rate, arm, "bytes").values())) / 1024
                    points.append((kib, np.mean(v), np.std(v, ddof=1) / np.sqrt(len(v)) if len(v) > 1 else 0.0))
            if points:
                x, y, error = zip(*points, strict=True)
                ax.errorbar(x, y, error, color=colour, ls=line, marker=mark, ms=4, label=arm)
        ax.axhline(BASELINE, color="0.8", lw=1)
        ax.set_xscale("log")
        for axis in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
            axis(ScalarFormatter())
        ax.set_xlabel("file, KiB")
        ax.set_title(f"{bits} bits", fontsize=10)
    axes[0][0].set_ylabel("top-1 on the test set, %")
    axes[0][-1].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _rounding(folder: Path) -> list[str]:
    rows = Cells(folder / "rounding.jsonl").rows
    if not rows:
        return []
    out = [
        "## Without training", "",
        "Rounding to the nearest level; in brackets with new batch-norm statistics, from 2,000 training pictures.",
        "", "| method | " + " | ".join(f"{b} bits" for b in sorted(RATES)) + " |", "|---|" + "---|" * len(RATES),
    ]  # fmt: skip
    for method in ROUNDED:
        cells = []
        for bits in sorted(RATES):
            pair = [rows.get(f"{method}|{bits}|{new}") for new in (False, True)]
            acc = [f"{100 * r['correct'] / r['count']:.2f}" if r else "-" for r in pair]
            size = f", {pair[0]['bytes']:,} bytes" if pair[0] else ""
            cells.append(f"{acc[0]} ({acc[1]}){size}")
        out.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*out, ""]


def _trials(folder: Path, used: Sequence[float]) -> list[str]:
    rows = list(Cells(folder / "trial.jsonl").rows.values())
    if not rows:
        return []
    head = [f"{arm}, {bits} bits at {rate}" for arm, bits, rate in TRIED]
    out = ["## The learning rate", "", "Accuracy on pictures that no run is trained on (the starting network was), in "
           "per cent.", "", "| rate | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]  # fmt: skip
    for lr in LEARNING_RATES:
        found = {(r["arm"], r["bits"], r["rate"]): r["held_out"] for r in rows if r["learning_rate"] == lr}
        out.append(f"| {lr:g} | " + " | ".join(f"{100 * found[t]:.1f}" if t in found else "-" for t in TRIED) + " |")
    return [*out, "", f"Best mean: {best_rate(rows):g}.", *_late(best_rate(rows), used), ""]


def _late(best: float, used: Sequence[float]) -> list[str]:
    if list(used) == [best]:
        return []
    return [f"The runs are at {', '.join(f'{r:g}' for r in used)}: they were begun when one of the twelve trials was "
            "missing, without which that rate had the best mean. All arms have the same."]  # fmt: skip


def write(folder: Path) -> None:
    """README.md and curves.png beside the raw lines."""
    runs = Runs(folder)
    used = sorted({r["learning_rate"] for r in runs.rows})
    devices = sorted({f"{r['device']}, torch {r['torch']}" for r in runs.rows})
    text = [
        "# ECQx at equal bytes",
        "",
        "`python -m experiments.papers.ecqx trial`, `run`, `rounding`, then `table`. ResNet-20 on CIFAR-10 "
        f"({BASELINE} % before, a file of {ORIGINAL:,} bytes), trained for {EPOCHS} epochs on the first "
        f"{TRAINED_ON},000 training pictures at the learning rate {', '.join(f'{r:g}' for r in used)}; first and last "
        "layer at 8 bits in all arms. Every run is held to an entropy of its levels, in bits per quantized weight, by "
        "a search for gamma every ten steps, so all arms take the same bytes up to what the coder makes of it. Step "
        f"of the codebook: {', '.join(f'{s} at {b} bits' for b, s in sorted(STEPS.items()))}. Relevance is refreshed "
        "every ten steps with momentum 0.1 (a variant: after every step, as published). Top-1 on the 10,000 test "
        f"pictures, mean ± standard error over {SEEDS} seeds; intervals are 95 %, by bootstrap over the seeds of the "
        "paired differences, and so narrow partly because all seeds start from one network. Bytes are those of "
        f"files that were written and read again. Ran on {'; '.join(devices)}.",
        "",
        *words(runs),
        "",
        "![accuracy against bytes](curves.png)",
        "",
    ]
    for bits in sorted({b for b, _ in runs.points()}, reverse=True):
        text += [f"## {bits} bits", "", *table(runs, bits), "", "Paired differences, points:", "",
                 *differences(runs, bits), ""]  # fmt: skip
    text += [*_rounding(folder), *_trials(folder, used)]
    gone = [r for r in runs.rows if r.get("collapsed")]
    text += ["## What went wrong", ""]
    text += [f"{len(gone)} runs end with a tensor that is zero throughout: "
             + (", ".join(sorted({r["arm"] for r in gone})) or "none") + "."]  # fmt: skip
    text += [f"{r['key']}: {r['failed']}" for r in runs.failed] or ["No run failed."]
    (folder / "README.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    figure(runs, folder / "curves.png")
