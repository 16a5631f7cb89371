"""Tables, figure and words of the ECQx runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.experiment import Claim, Report, Table, Verdict
from experiments.papers.ecqx import (
    ARMS,
    LEARNING_RATES,
    RATES,
    ROUNDED,
    SEEDS,
    STEPS,
    TRIED,
    VARIANTS,
    best_rate,
)  # fmt: skip
from experiments.papers.small_quantization import STYLES
from experiments.spread import mean_and_error, paired_interval
from experiments.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = 91.73  # the network all runs start from, on the same pictures, in per cent
ORIGINAL = 1_097_776  # bytes of its file
SOURCES = ("ECQx, background", "ECQx, quantized + step", "ECQx, quantized")
CONTROLS = ("magnitude", "gradient x weight", "random relevance")


class Runs:
    """Finished runs by (bits, rate, arm) and seed."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = [row for row in rows if row["stage"] == "run"]
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
        return paired_interval(self.values(bits, rate, a), self.values(bits, rate, b))

    def points(self) -> list[tuple[int, float]]:
        return [(b, rate) for b in sorted(RATES, reverse=True) for rate in RATES[b] if (b, rate, "ECQ") in self.at]

    def full(self) -> list[tuple[int, float]]:
        """Those with the seeds of every arm."""
        return [p for p in self.points() if all(len(self.at.get((*p, arm), {})) >= SEEDS for arm in ARMS)]

    def count(self, a: str, b: str) -> tuple[int, int, int]:
        """At how many of them a is ahead of b, behind it, and not told apart, by the intervals."""
        ahead = behind = 0
        for p in self.full():
            _, low, high, _ = self.difference(*p, a, b)
            ahead, behind = ahead + (low > 0), behind + (high < 0)
        return ahead, behind, len(self.full()) - ahead - behind


def table(runs: Runs, bits: int) -> Table:
    """Accuracy, zeros and bytes of every arm at every rate."""
    rates = [rate for b, rate in runs.points() if b == bits]
    rows: list[list[Any]] = []
    short = set()
    for arm in [*ARMS, *(v for v in VARIANTS if any((bits, rate, v) in runs.at for rate in rates))]:
        found = [list(runs.values(bits, rate, arm).values()) for rate in rates]
        short |= {f"{arm} at {rate}: {len(v)}" for v, rate in zip(found, rates, strict=True) if 0 < len(v) < SEEDS}
        rows.append([arm, *(mean_and_error(v) for v in found)])
    for what, form in (("zeros", "{:.1%}"), ("bytes", "{:,.0f}")):
        cells = []
        for rate in rates:
            every = [v for arm in ARMS for v in runs.values(bits, rate, arm, what).values()]
            low, high = min(every), max(every)
            cells.append(form.format(low) if low == high else f"{form.format(low)} to {form.format(high)}")
        rows.append([f"{what}, all runs", *cells])
    note = f"Fewer seeds than {SEEDS}: {'; '.join(sorted(short))}." if short else ""
    names = ["arm", *(f"{rate} bits per weight" for rate in rates)]
    return Table(f"{bits} bits: top-1 in per cent", names, rows, note, digits=2)


def differences(runs: Runs, bits: int) -> Table:
    """Paired differences to ECQ, with their intervals."""
    rates = [rate for b, rate in runs.points() if b == bits]
    rows = []
    for arm in (*ARMS, *VARIANTS):
        if arm == "ECQ" or not any((bits, rate, arm) in runs.at for rate in rates):
            continue
        cells = []
        for rate in rates:
            mean, low, high, n = runs.difference(bits, rate, arm, "ECQ")
            few = "" if n >= SEEDS else f" (n={n})"
            cells.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]{few}" if n else None)
        rows.append([arm, *cells])
    names = ["arm less ECQ", *(f"{rate}" for rate in rates)]
    return Table(f"{bits} bits: paired differences in points, 95 % intervals", names, rows)


def words(runs: Runs) -> list[str]:
    """The verdict on the claim, from the intervals."""
    number = len(runs.full())
    if not number:
        return [f"No rate has {SEEDS} seeds of every arm: no conclusion is drawn."]
    verdict = {
        "refuted": "**Refuted in this setting**: at equal bytes relevance does not add accuracy, it takes some.",
        "partly": "**Confirmed for some source** (see below).",
        "null": "**Null**: at equal bytes relevance makes no difference that the seeds can tell.",
    }[_verdict(runs)]
    told = []
    for source in SOURCES:
        a, b, t = runs.count(source, "ECQ")
        told.append(f"{source} against ECQ: ahead at {a} of {number} rates, behind at {b}, not told apart at {t}.")
    for control in CONTROLS:
        a, b, t = runs.count(control, "ECQ")
        told.append(f"{control} against ECQ: ahead at {a}, behind at {b}, not told apart at {t}.")
    for control in CONTROLS:
        best = _best(runs, control)
        a, b, t = runs.count(best, control)
        told.append(f"{best} against {control}: ahead at {a}, behind at {b}, not told apart at {t}.")
    return [f"{verdict} {number} rates have {SEEDS} seeds of every arm.", "\n".join(f"- {line}" for line in told)]


def _verdict(runs: Runs) -> Verdict:
    scores = [runs.count(source, "ECQ")[:2] for source in SOURCES]
    if all(behind > ahead for ahead, behind in scores):
        return "refuted"
    return "partly" if any(ahead > behind for ahead, behind in scores) else "null"


def _best(runs: Runs, control: str) -> str:
    """The source of relevance that does best against a control."""
    return max(SOURCES, key=lambda s: runs.count(s, control)[0] - runs.count(s, control)[1])


def figure(runs: Runs) -> Figure:
    """Accuracy against bytes, one panel per number of bits."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    shown = sorted({b for b, _ in runs.points()}, reverse=True)
    fig = Figure(figsize=(5 * len(shown), 4.2))
    axes = fig.subplots(1, len(shown), squeeze=False, sharey=True)
    for ax, bits in zip(axes[0], shown, strict=True):
        for arm, (colour, line, mark) in STYLES.items():
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
    return fig


def _rounding(rows: Sequence[dict[str, Any]]) -> Table | None:
    found = {(r["arm"], r["bits"], r["reestimated"]): r for r in rows if r["stage"] == "rounding"}
    if not found:
        return None
    shown = sorted({bits for _, bits, _ in found})
    lines: list[list[Any]] = []
    for method in ROUNDED:
        for new in (False, True):
            pair = [found.get((method, bits, new)) for bits in shown]
            acc = [None if r is None else 100 * r["correct"] / r["count"] for r in pair]
            size = [None if r is None else f"{r['bytes']:,}" for r in pair]
            lines.append([method, "new" if new else "kept", *acc, *size])
    names = ["method", "batch-norm statistics", *(f"{b} bits, %" for b in shown), *(f"{b} bits, bytes" for b in shown)]
    return Table("Without training: rounding to the nearest level", names, lines, digits=2)


def _trials(rows: Sequence[dict[str, Any]], used: Sequence[float]) -> Table | None:
    tried = [r for r in rows if r["stage"] == "trial"]
    if not tried:
        return None
    lines = []
    for lr in LEARNING_RATES:
        found = {(r["arm"], r["bits"], r["rate"]): 100 * r["held_out"] for r in tried if r["learning_rate"] == lr}
        lines.append([f"{lr:g}", *(found.get(t) for t in TRIED)])
    names = ["learning rate", *(f"{arm}, {bits} bits at {rate}" for arm, bits, rate in TRIED)]
    note = f"Accuracy on held-out training pictures, in per cent. Best mean: {best_rate(tried):g}."
    if used and list(used) != [best_rate(tried)]:
        note += (
            f" The runs are at {', '.join(f'{r:g}' for r in used)}: they were begun when one of the twelve trials was "
            "missing, without which that rate had the best mean. All arms have the same."
        )
    return Table("The learning rate", names, lines, note)


def claims(runs: Runs) -> list[Claim]:
    """What the paper says, beside the runs."""
    number = len(runs.full())
    if not number:
        return []
    told = "; ".join(
        f"{s}: ahead at {a}, behind at {b} of {number}" for s in SOURCES for a, b, _ in [runs.count(s, "ECQ")]
    )
    out = [
        Claim("more accuracy at the same size", "ECQx at or above ECQ, most at high sparsity and few bits", told,
              _verdict(runs), "95 % intervals of paired differences at equal entropy, five seeds, ResNet-20"),
    ]  # fmt: skip
    for control in ("random relevance", "gradient x weight", "magnitude"):
        best = _best(runs, control)
        a, b, t = runs.count(best, control)
        verdict: Verdict = "confirmed" if a == number else "partly" if a > b else "null" if t == number else "refuted"
        out.append(
            Claim(f"true relevance beats {control} in its place", "expected, not published",
                  f"{best}: ahead at {a}, behind at {b} of {number}", verdict, "as above; the best of three sources")
        )  # fmt: skip
    v = list(runs.values(4, 2.6, "ECQ").values())
    size = runs.values(4, 2.6, "ECQ", "bytes").values()
    if v:
        ratio, loss = ORIGINAL / max(size), BASELINE - float(np.mean(v))
        good = ratio >= 10 and loss < 1
        out.append(
            Claim("4 bits, at least 10 times smaller, less than a point lost", "yes, for both methods",
                  f"ECQ: {ratio:.1f} times, {loss:.2f} ± {np.std(v, ddof=1) / np.sqrt(len(v)):.2f} points",
                  "confirmed" if good else "refuted", "whole file against float32, mean over the seeds")
        )  # fmt: skip
    return out


def _overall(runs: Runs, a: str, b: str) -> tuple[float, float | None] | None:
    """Of paired differences, their mean over the rates; standard error over the seeds."""
    by_seed: dict[int, list[float]] = {}
    for p in runs.full():
        left, right = runs.values(*p, a), runs.values(*p, b)
        for seed in left.keys() & right.keys():
            by_seed.setdefault(seed, []).append(left[seed] - right[seed])
    return mean_and_error([float(np.mean(v)) for v in by_seed.values() if len(v) == len(runs.full())])


def _summary(runs: Runs, settings: Mapping[str, Any]) -> str:
    """For RESULTS.md; nothing before some rate has the seeds of every arm."""
    number = len(runs.full())
    known = {s: gap for s in SOURCES if number and (gap := _overall(runs, s, "ECQ")) is not None}
    if not known:
        return ""
    best = max(known, key=lambda s: known[s][0])
    each = [runs.difference(*p, best, "ECQ")[0] for p in runs.full()]

    def told(other: str) -> str:
        gap, (ahead, behind, _) = _overall(runs, best, other), runs.count(best, other)
        size = "" if gap is None else f"{gap[0]:+.2f}" + ("" if gap[1] is None else f" ± {gap[1]:.2f}") + " points, "
        return f"{size}ahead at {ahead} and behind at {behind} of {number} sizes"

    rest = len(runs.points()) - number
    return (
        f"The weights of a trained ResNet-20 (CIFAR-10, {BASELINE} %) are quantized to {_bits(runs)} bits while it is "
        "trained further, and all variants are held to files of the same size; the paper claims that relevance, used "
        "to decide which weights become zero (ECQx), gives more accuracy than the size constraint alone (ECQ). "
        f"Here the best of {len(SOURCES)} forms of relevance differs from ECQ by {min(each):+.2f} to {max(each):+.2f} "
        f"points from size to size (mean {told('ECQ')}). "
        f"The same form against random values in the place of relevance: {told('random relevance')}; against gradient "
        f"x weight: {told('gradient x weight')}; against weight magnitude: {told('magnitude')}. "
        f"All seeds start from one network and train for {settings['epochs']} epochs on {settings['trained_on']:,} "
        f"pictures{f'; {rest} more sizes are unfinished' if rest else ''}."
    )


def _bits(runs: Runs) -> str:
    bits = sorted({b for b, _ in runs.full()})
    return str(bits[0]) if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"


def report(study: Study) -> Report:
    """The page."""
    runs = Runs(study.rows)
    used = sorted({r["learning_rate"] for r in runs.rows})
    devices = sorted({f"{r['device']}, torch {r['torch']}" for r in runs.rows})
    s = study.settings
    text = [
        f"ResNet-20 on CIFAR-10 ({BASELINE} % before, a file of {ORIGINAL:,} bytes), trained for {s['epochs']} epochs "
        f"on the first {s['trained_on']:,} training pictures at the learning rate "
        f"{', '.join(f'{r:g}' for r in used)}; first and last "
        "layer at 8 bits in all arms. Every run is held to an entropy of its levels, in bits per quantized weight, by "
        "a search for gamma every ten steps, so all arms take the same bytes up to what the coder makes of it. Step "
        f"of the codebook: {', '.join(f'{s} at {b} bits' for b, s in sorted(STEPS.items()))}. Relevance is refreshed "
        "every ten steps with momentum 0.1 (a variant: after every step, as published). Top-1 on "
        f"{s['test']:,} test pictures, mean ± standard error over the seeds; intervals are 95 %, by bootstrap over the "
        "seeds of the "
        "paired differences, and so narrow partly because all seeds start from one network. Bytes are those of "
        f"files that were written and read again. Ran on {'; '.join(devices)}.",
        *words(runs),
    ]
    gone = sorted({r["arm"] for r in runs.rows if r.get("collapsed")})
    text.append(
        f"Runs that end with a tensor of zeros: {', '.join(gone) or 'none'}. "
        + (" ".join(f"{r['key']}: {r['failed']}" for r in runs.failed) or "No run failed.")
    )
    tables = {}
    for bits in sorted({b for b, _ in runs.points()}, reverse=True):
        tables[f"accuracy_{bits}_bits"] = table(runs, bits)
        tables[f"differences_{bits}_bits"] = differences(runs, bits)
    for name, more in (("rounding", _rounding(study.rows)), ("learning_rate", _trials(study.rows, used))):
        if more is not None:
            tables[name] = more
    losses = []
    if runs.full() and _verdict(runs) != "partly":
        beaten = [c for c in CONTROLS if runs.count(_best(runs, c), c)[0] == len(runs.full())]
        losses = [
            "Quantization of ResNet-20 at equal bytes: relevance in the cost of the zero level does not raise the "
            f"accuracy of ECQ; of the controls in its place it beats {' and '.join(beaten) or 'none'} at every rate"
        ]
    figures = {"curves": figure(runs)} if runs.points() else {}
    return Report(text, tables, figures, claims(runs), losses=losses, summary=_summary(runs, s))
