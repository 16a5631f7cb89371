"""Tables, figures, claims and words of how few pictures a criterion needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.experiment import Claim, Report, Table
from experiments.papers.few_shot_pruning import NORMALISATIONS, best_normalisations, of_stage
from experiments.papers.few_shot_report import PUBLISHED, verdict
from experiments.papers.vgg_pruning import NO_PICTURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.study import Study

NETS = {"vgg": "VGG-like", "resnet20": "ResNet-20"}
LEAST = 3  # draws without which nothing is said
Pair = tuple[float, float]


class Curves:
    """Accuracies of one network in per cent: criterion x rate x mode x size x draw."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], net: str, settings: Mapping[str, Any]) -> None:
        self.net, self.rates = net, settings["nets"][net]["rates"]
        self.sizes: list[int] = list(settings["per_class"])
        self.validated = of_stage(rows, net, "validate")
        self.chosen = best_normalisations(self.validated)
        self.values: dict[tuple[str, float, bool, int], dict[int, float]] = {}
        for row in of_stage(rows, net, "test"):
            value = 100 * row["correct"] / row["count"]
            fixed = row["criterion"] in NO_PICTURES and not row["reestimated"]
            for size in self.sizes if fixed else (row["per_class"],):
                at = (row["criterion"], row["rate"], row["reestimated"], size)
                self.values.setdefault(at, {})[row["draw"]] = value
        names = {at[0] for at in self.values}
        self.criteria = [c for c in settings["nets"][net]["criteria"] if c in names]
        counts = [len(v) for (c, _, again, _), v in self.values.items() if again or c not in NO_PICTURES]
        self.draws = min(counts, default=0)
        base = of_stage(rows, net, "unpruned")
        self.unpruned = 100 * base[0]["correct"] / base[0]["count"] if base else None
        self.filters = sum(base[0]["filters"].values()) if base else None

    @property
    def controls(self) -> list[str]:
        """Criteria that are no relevance."""
        return [c for c in self.criteria if not c.startswith("LRP")]

    @property
    def form(self) -> str | None:
        """The form of LRP that is best on the validation pictures, under its own best normalisation."""
        means: dict[str, list[float]] = {}
        for row in self.validated:
            name = row["criterion"]
            if name.startswith("LRP") and name in self.criteria and (row["normalisation"],) == self.chosen[name]:
                means.setdefault(name, []).append(row["correct"] / row["count"])
        return max(means, key=lambda n: float(np.mean(means[n])), default=None)

    def of(self, criterion: str, rate: float, again: bool, size: int) -> dict[int, float]:
        """By draw; a criterion whose cut does not depend on the draw has its one value at every draw."""
        found = self.values.get((criterion, rate, again, size), {})
        if criterion == "weight L1" and not again and found:
            return dict.fromkeys(range(self.draws), next(iter(found.values())))
        return found

    def mean(self, criterion: str, rate: float, again: bool, size: int) -> Pair | float | None:
        """Mean and standard error over draws; the one value where there is but one."""
        found = self.values.get((criterion, rate, again, size), {})
        return spread(list(found.values()))

    def overall(self, criterion: str, again: bool) -> float:
        """Mean over draws, then over rates and sizes."""
        cells = [list(self.of(criterion, r, again, s).values()) for r in self.rates for s in self.sizes]
        return float(np.mean([np.mean(cell) for cell in cells if cell])) if any(cells) else float("nan")

    def gain(self, criterion: str) -> Pair | float | None:
        """From the fewest pictures to the most, mean over the rates, over draws; without new statistics."""
        ends = [[self.of(criterion, rate, False, s) for rate in self.rates] for s in (self.sizes[0], self.sizes[-1])]
        shared = set.intersection(*(set(own) for end in ends for own in end))
        return spread([float(np.mean([b[d] - a[d] for a, b in zip(*ends, strict=True)])) for d in sorted(shared)])

    def gap(self, a: str, b: str, rate: float, again: bool, size: int) -> Pair:
        """Mean of a minus b over the same draws, and its standard error."""
        left, right = self.of(a, rate, again, size), self.of(b, rate, again, size)
        found = spread([left[d] - right[d] for d in sorted(left.keys() & right.keys())])
        return found if isinstance(found, tuple) else (float("nan"), float("nan"))

    def sign(self, ours: str, theirs: Sequence[str], rate: float, again: bool, size: int) -> int:
        """1 ahead of every one of them by more than two standard errors, -1 behind one of them by as much, else 0."""
        gaps = [self.gap(ours, other, rate, again, size) for other in theirs]
        if all(gap > 2 * error for gap, error in gaps):
            return 1
        return -1 if any(gap < -2 * error for gap, error in gaps) else 0

    def lead(self, a: str, b: str, again: bool) -> dict[int, dict[int, float]]:
        """Size to draw to the lead of a over b, mean over the rates."""
        out: dict[int, dict[int, float]] = {}
        for size in self.sizes:
            by = [(self.of(a, rate, again, size), self.of(b, rate, again, size)) for rate in self.rates]
            shared = set.intersection(*(left.keys() & right.keys() for left, right in by)) if by else set()
            out[size] = {d: float(np.mean([left[d] - right[d] for left, right in by])) for d in sorted(shared)}
        return out


def spread(values: Sequence[float]) -> Pair | float | None:
    """Mean and standard error; the value itself of one; None of none."""
    if len(values) < 2:
        return float(values[0]) if values else None
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def accuracies(run: Curves, again: bool) -> Table:
    """A row per rate and criterion, a column per size."""
    rows = [
        [f"{rate:.0%}", name, run.chosen[name][0], *(run.mean(name, rate, again, size) for size in run.sizes)]
        for rate in run.rates
        for name in run.criteria
    ]
    return Table(
        f"{NETS[run.net]}, {_mode(again)} new batch-norm statistics",
        ["removed", "criterion", "layer normalisation", *(f"{size} per class" for size in run.sizes)],
        rows,
        "Without new statistics, weight and random do not depend on the pictures." if not again else "",
    )


def validation(run: Curves) -> Table:
    """Mean validation accuracy of every criterion under every normalisation."""
    by: dict[str, dict[str, list[float]]] = {}
    for row in run.validated:
        own = by.setdefault(row["criterion"], {}).setdefault(row["normalisation"], [])
        own.append(100 * row["correct"] / row["count"])
    rows = [[name, *(float(np.mean(own[n])) if n in own else None for n in NORMALISATIONS)] for name, own in by.items()]
    sizes = {row["per_class"] for row in run.validated}
    return Table(
        f"{NETS[run.net]}, layer normalisations on {max((r['count'] for r in run.validated), default=0)} validation "
        "pictures",
        ["criterion", *NORMALISATIONS],
        rows,
        f"Mean over the rates and both modes, {', '.join(map(str, sorted(sizes)))} reference pictures per class.",
    )


def claims(runs: Mapping[str, Curves], signs: Sequence[Mapping[str, Any]], masks: Sequence[Mapping[str, Any]],
           ) -> list[Claim]:  # fmt: skip
    """The paper's sentence on few pictures, the lead that shrinks, the sign of z+, cut against masked."""
    out = []
    for net, run in runs.items():
        for again in (False, True):
            out.append(_ahead(net, run, again))
        out.append(_shrinks(net, run))
    for net in NETS:
        own = [row for row in signs if row["net"] == net and row["rule"] == "z+"]
        if not own:
            continue
        largest = max(row["difference"] for row in own)
        same = largest < 1e-5
        if net == "vgg":
            out.append(
                Claim(
                    "In a chain without residual sums signed and absolute z+ scores are the same",
                    "z+ conserves sign where inputs are not negative (a property of the rule, no number)",
                    f"largest difference {largest:.1e} of the layer's largest score, {len(own)} sets of pictures",
                    "confirmed" if same else "refuted",
                    "confirmed below 1e-5",
                )
            )
        else:
            out.append(
                Claim(
                    "A residual sum breaks the sign of z+ scores: signed and absolute differ",
                    "authors' code: signed sums for VGG, absolute ones for ResNets",
                    f"largest difference {largest:.2f} of the layer's largest score, {len(own)} sets of pictures",
                    "confirmed" if largest > 0.01 else "refuted",
                    "confirmed above 0.01",
                )
            )
    if masks:
        exact = max(row["exact"] / row["largest_logit"] for row in masks)
        zeroed = max(row["published"] / row["largest_logit"] for row in masks)
        out.append(
            Claim(
                "A cut network gives what the mask over convolution and batch norm gives; the published mask, which "
                "zeroes weights only, does not",
                "published code masks convolution weights only",
                f"largest difference of logits, relative to the largest: cut against exact mask {exact:.1e}, against "
                f"the published mask {zeroed:.2f} ({len(masks)} cuts)",
                "confirmed" if exact < 1e-4 < 1e-2 < zeroed else "partly" if exact < 1e-4 else "refuted",
                "confirmed where the first is below 1e-4 and the second above 0.01; partly with the first alone",
            )
        )
    return out


def _ahead(net: str, run: Curves, again: bool) -> Claim:
    claim = (
        f"{NETS[net]}: z+ is ahead of weight, gradient and Taylor as published, and of random, {_mode(again)} new "
        "batch-norm statistics"
    )
    published = "abstract: clearly better than other criteria without fine-tuning where data are scarce (no number)"
    theirs = [c for c in (*PUBLISHED, "random") if c in run.criteria]
    if run.draws < LEAST or "LRP z+" not in run.criteria or "random" not in theirs:
        why = f"{run.draws} draws of {LEAST} needed, or criteria are missing"
        return Claim(claim, published, "-", "not comparable", why)
    by = {s: [run.sign("LRP z+", theirs, rate, again, s) for rate in run.rates] for s in run.sizes}
    found = [sign for own in by.values() for sign in own]
    ours = ", ".join(f"{s} per class: {own.count(1)} ahead, {own.count(-1)} behind" for s, own in by.items())
    return Claim(
        claim, published, f"of {len(run.rates)} rates, {ours}", verdict(found),
        f"against {', '.join(theirs)}: ahead of all by more than two standard errors of the paired difference in "
        f"{found.count(1)} of {len(found)} settings (size, rate), behind one in {found.count(-1)}; confirmed needs "
        "all, partly more ahead than behind",
    )  # fmt: skip


def _shrinks(net: str, run: Curves) -> Claim:
    claim = f"{NETS[net]}: the lead of LRP over Taylor is largest where there are few pictures"
    published = (
        "toy data, authors' logs, accuracy without one third of the units: 13 to 38 points at 2 to 5 per class, about "
        "3 to 10 at 200"
    )
    pair = ("LRP z+", "Taylor, published")
    if run.draws < LEAST or not set(pair) <= set(run.criteria) or len(run.sizes) < 2:
        why = f"{run.draws} draws of {LEAST} needed, or criteria are missing"
        return Claim(claim, published, "-", "not comparable", why)
    lead = run.lead(*pair, False)
    few = [s for s in run.sizes if s <= 5]
    most = run.sizes[-1]
    shared = sorted(set.intersection(*(set(lead[s]) for s in (*few, most))))
    change = spread([float(np.mean([lead[s][d] for s in few])) - lead[most][d] for d in shared])
    told = ", ".join(f"{s} per class {_told(spread(list(own.values())))}" for s, own in lead.items())
    if not isinstance(change, tuple):
        return Claim(claim, published, told, "not comparable", "one draw")
    gap, error = change
    result = verdict([1 if gap > 2 * error else -1 if gap < -2 * error else 0])
    return Claim(
        claim, published, f"z+ over published Taylor, mean over the rates, in points: {told}", result,
        f"mean lead at up to 5 per class minus that at {most}: {gap:+.1f} ± {error:.1f} points; confirmed above two "
        "standard errors",
    )  # fmt: skip


def words(run: Curves) -> list[str]:
    """What a picture more is worth, and who is ahead where."""
    base = "" if run.unpruned is None else f" (unpruned {run.unpruned:.1f} %, {run.filters} filters that can go)"
    if run.draws < LEAST:
        return [f"{NETS[run.net]}{base}: {run.draws} draws are complete of {LEAST} that are needed to say anything."]
    out = [f"{NETS[run.net]}{base}, {run.draws} draws."]
    for again in (False, True):
        means = {c: run.overall(c, again) for c in run.criteria}
        order = sorted(means, key=lambda c: -means[c])
        out.append(
            f"Mean over rates and sizes, {_mode(again)} new statistics: "
            + ", ".join(f"{c} {means[c]:.1f}" for c in order)
            + " %."
        )
    least, most = run.sizes[0], run.sizes[-1]
    gains = {c: run.gain(c) for c in run.criteria if c not in NO_PICTURES}
    more = [f"{c} {_told(gain)}" for c, gain in gains.items() if isinstance(gain, tuple) and gain[0] > 2 * gain[1]]
    less = [f"{c} {_told(gain)}" for c, gain in gains.items() if isinstance(gain, tuple) and gain[0] < -2 * gain[1]]
    same = [
        f"{c} {_told(gain)}" for c, gain in gains.items() if isinstance(gain, tuple) and abs(gain[0]) <= 2 * gain[1]
    ]
    out.append(
        f"From {least} to {most} pictures per class, without new statistics and over all rates, these gain (points): "
        f"{', '.join(more) or 'none'}; these lose: {', '.join(less) or 'none'}; not told from no change (two standard "
        f"errors over draws): {', '.join(same) or 'none'}."
    )
    return [" ".join(out)]


def summary(runs: Mapping[str, Curves]) -> str:
    """Overall means of the best relevance and the best control, and how often relevance is ahead."""
    out = []
    for net, run in runs.items():
        form = run.form
        if form is None or run.draws < LEAST or "random" not in run.controls:
            continue
        for again in (False, True):
            means = {c: run.overall(c, again) for c in run.criteria}
            best = max(run.controls, key=means.__getitem__)
            shown = [*(c for c in run.criteria if c.startswith("LRP")), best, "random"]
            signs = [run.sign(form, run.controls, rate, again, s) for rate in run.rates for s in run.sizes]
            out.append(
                f"{NETS[net]}, {_mode(again)} new batch-norm statistics, mean over rates and sizes: "
                + ", ".join(f"{c} {means[c]:.1f}" for c in shown)
                + f" %; {form}, which validation pictures choose, is ahead of every control in {signs.count(1)} of "
                f"{len(signs)} settings and behind one in {signs.count(-1)}."
            )
    sizes = next(iter(runs.values())).sizes if runs else []
    return f"{sizes[0]} to {sizes[-1]} pictures per class, no fine-tuning. " + " ".join(out) if out else ""


def wins_and_losses(runs: Mapping[str, Curves]) -> tuple[list[str], list[str]]:
    """Settings in which the form that validation chose beats every control, and in which it does not."""
    wins: list[str] = []
    losses: list[str] = []
    for net, run in runs.items():
        form = run.form
        if form is None or run.draws < LEAST or "random" not in run.controls:
            continue
        for again in (False, True):
            for rate in run.rates:
                by = {s: run.sign(form, run.controls, rate, again, s) for s in run.sizes}
                for ahead, told in ((True, wins), (False, losses)):
                    sizes = [s for s, sign in by.items() if (sign == 1) == ahead]
                    if sizes:
                        gaps = [
                            _told(min(run.gap(form, c, rate, again, s) for c in run.controls)) for s in sizes
                        ]  # the closest control
                        told.append(
                            f"{NETS[net]}, {rate:.0%} of the filters, {_mode(again)} new statistics, {form}: "
                            + ", ".join(f"{s} per class {g}" for s, g in zip(sizes, gaps, strict=True))
                            + " points over the best control"
                        )
    return wins, losses


def curves(run: Curves) -> Figure:
    """Accuracy against pictures per class, a column per rate, a row per mode."""
    from matplotlib.figure import Figure

    colours = {
        "random": "0.6", "weight L1": "tab:brown", "activation": "tab:olive", "gradient, published": "tab:cyan",
        "Taylor, published": "tab:green", "Taylor, per sample": "tab:purple", "LRP z+": "tab:red",
        "LRP epsilon": "tab:blue", "LRP epsilon, signed": "tab:blue", "LRP z+, signed": "tab:red",
    }  # fmt: skip
    fig = Figure(figsize=(3.6 * len(run.rates) + 2.4, 6.5), layout="tight")
    axes = fig.subplots(2, len(run.rates), sharex=True, sharey=False, squeeze=False)
    for row, again in zip(axes, (False, True), strict=True):
        for ax, rate in zip(row, run.rates, strict=True):
            for name in run.criteria:
                points = [run.mean(name, rate, again, size) for size in run.sizes]
                known = [(s, *(p if isinstance(p, tuple) else (p, 0.0))) for s, p in zip(run.sizes, points, strict=True)
                         if p is not None]  # fmt: skip
                style = ":" if name.endswith("signed") else "-" if name.startswith("LRP") else "--"
                x, y, e = zip(*known, strict=True) if known else ((), (), ())
                ax.errorbar(x, y, e, color=colours[name], ls=style, label=name)
            ax.set_xscale("log")
            ax.set_xticks(run.sizes, [str(s) for s in run.sizes], minor=False)
            ax.minorticks_off()
            ax.set_title(f"{rate:.0%} removed, {_mode(again)} new statistics", fontsize=9)
            if again:
                ax.set_xlabel("reference pictures per class")
        row[0].set_ylabel("top-1, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return fig


def report(study: Study) -> Report:
    """From the rows of all networks that have some."""
    s = study.settings
    runs = {net: Curves(study.rows, net, s) for net in s["nets"] if of_stage(study.rows, net, "test")}
    signs = [row for row in study.rows if row.get("stage") == "signs"]
    masks = [row for row in study.rows if row.get("stage") == "mask"]
    wins, losses = wins_and_losses(runs)
    v = s["vgg"]
    text = [
        f"The VGG-like network has {sum(map(len, v['widths']))} convolutions with batch norm, "
        f"{sum(map(sum, v['widths']))} filters, and was trained by us for {v['epochs']} epochs on {v['thousands']},000 "
        "pictures of CIFAR-10 (`experiments/vgg.py`), which is short: its accuracy is below what such networks reach. "
        f"ResNet-20 has public weights. {s['test_pictures']:,} test pictures, products in 16 bits; mean ± standard "
        "error over draws of the reference pictures, which are nested from size to size. Filters are cut, in one "
        "global order, without fine-tuning. Every criterion has the layer normalisation that was best for it on "
        f"{s['validation']['pictures']} training pictures kept apart, at {s['validation']['per_class']} reference "
        "pictures per class. Start relevance one at the true class; magnitudes are per sample unless said otherwise. "
        "Wins and losses take the one form of LRP that the validation pictures choose; controls are all criteria that "
        "are no relevance."
    ]
    for run in runs.values():
        text += words(run)
    for net, rule in ((n, r) for n in runs for r in ("z+", "epsilon")):
        own = [row["difference"] for row in signs if (row["net"], row["rule"]) == (net, rule)]
        if own:
            text.append(
                f"{NETS[net]}, signed against absolute {rule} scores: the largest difference is {max(own):.2g} of the "
                f"layer's largest score ({len(own)} sets of pictures)."
            )
    tables: dict[str, Table] = {}
    for net, run in runs.items():
        tables |= {f"{net}_old_statistics": accuracies(run, False), f"{net}_new_statistics": accuracies(run, True)}
        tables[f"{net}_validation"] = validation(run)
    if masks:
        tables["masks"] = _masks(masks)
    return Report(text, tables, {f"curves_{net}": curves(run) for net, run in runs.items()},
                  claims(runs, signs, masks), wins, losses, summary(runs))  # fmt: skip


def _masks(rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        "Cut against masked, without new batch-norm statistics",
        ["network", "criterion", "removed", "exact mask", "published mask", "accuracy, cut", "and published mask"],
        [
            [NETS[r["net"]], r["criterion"], f"{r['rate']:.0%}", f"{r['exact'] / r['largest_logit']:.1e}",
             f"{r['published'] / r['largest_logit']:.2f}", 100 * r["correct"] / r["count"],
             100 * r["correct_published"] / r["count"]]
            for r in rows
        ],
        "Masks: largest difference of logits from the cut network, relative to the largest logit.",
    )  # fmt: skip


def _mode(again: bool) -> str:
    return "with" if again else "without"


def _told(value: Pair | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else f"{value[0]:.1f} ± {value[1]:.1f}"
