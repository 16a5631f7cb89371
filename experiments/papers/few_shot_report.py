"""Tables, figure, claims and words of few-shot pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.experiment import Claim, Report, Table, Verdict
from experiments.papers.few_shot_pruning import (
    DATA_FREE,
    GROUND_TRUTH,
    NORMALISATIONS,
    PER_CLASS,
    best_normalisations,
    draws_of,
    of_stage,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.study import Study

NETS = {"resnet20": "ResNet-20", "resnet56": "ResNet-56"}
LEAST = 5  # draws without which nothing is said in words
#: what the paper compares with, in the form of its code
PUBLISHED = ("weight L1", "gradient, published", "Taylor, published")
#: the same as LRP epsilon on a ReLU network whose batch norms are folded: no control of it
TWIN = "logit x activation"


class Run:
    """Accuracies of one network: criterion x rate x draw, in per cent."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], net: str, rates: Sequence[float]) -> None:
        self.net, self.rates = net, tuple(rates)
        self.validated = of_stage(rows, net, "validate")
        self.chosen = best_normalisations(self.validated)
        self.tested = of_stage(rows, net, "test")
        self.checked = of_stage(rows, net, "check")
        self.values: dict[tuple[str, float, bool], dict[int, float]] = {}
        for row in self.tested:
            at = self.values.setdefault((row["criterion"], row["rate"], row["reestimated"]), {})
            at[row["draw"]] = 100 * row["correct"] / row["count"]
        names = {row["criterion"] for row in self.tested}
        self.criteria = [n for n in self.chosen if n in names]
        counts = [len(v) for (n, _, again), v in self.values.items() if again or n not in DATA_FREE]
        self.draws = min(counts, default=0)
        base = of_stage(rows, net, "unpruned")
        self.unpruned = 100 * base[0]["correct"] / base[0]["count"] if base else None

    @property
    def controls(self) -> list[str]:
        """Criteria that are no relevance, nor its twin, nor the truth."""
        return [n for n in self.criteria if not n.startswith("LRP") and n not in (TWIN, GROUND_TRUTH)]

    @property
    def form(self) -> str | None:
        """The form of LRP that is best on the validation pictures, under its own best normalisation."""
        means: dict[str, list[float]] = {}
        for row in self.validated:
            name = row["criterion"]
            if name.startswith("LRP") and name in self.criteria and (row["normalisation"],) == self.chosen[name]:
                means.setdefault(name, []).append(row["correct"] / row["count"])
        return max(means, key=lambda n: float(np.mean(means[n])), default=None)

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

    def told_apart(self, ours: str, theirs: Sequence[str], again: bool) -> dict[float, int]:
        """By rate: 1 where it is ahead of every one of them by more than two standard errors of the paired
        difference, -1 where it is behind one of them by as much, else 0."""
        out = {}
        for rate in self.rates:
            gaps = [self.difference(ours, other, rate, again) for other in theirs]
            if all(gap > 2 * error for gap, error in gaps):
                out[rate] = 1
            else:
                out[rate] = -1 if any(gap < -2 * error for gap, error in gaps) else 0
        return out


def accuracies(run: Run, again: bool) -> Table:
    """Criterion, normalisation, mean and standard error per rate."""
    rows = []
    for name in run.criteria:
        cells: list[Any] = []
        for rate in run.rates:
            mean, error, count = run.mean(name, rate, again)
            cells.append(None if not count else mean if count == 1 else (mean, error))
        rows.append([name, run.chosen[name][0], *cells])
    best = [run.best([n for n in run.criteria if n != GROUND_TRUTH], rate, again) for rate in run.rates]
    return Table(
        f"{NETS[run.net]}, {_mode(again)} new batch-norm statistics",
        ["criterion", "layer normalisation", *(f"{rate:.0%}" for rate in run.rates)],
        rows,
        "Highest mean per rate, on the test pictures: "
        + "; ".join(f"{rate:.0%} {name}" for rate, name in zip(run.rates, best, strict=True))
        + "."
        if rows
        else "",
    )


def validation(run: Run) -> Table:
    """Mean validation accuracy of every criterion under every normalisation."""
    by: dict[str, dict[str, list[float]]] = {}
    for row in run.validated:
        own = by.setdefault(row["criterion"], {}).setdefault(row["normalisation"], [])
        own.append(100 * row["correct"] / row["count"])
    rows = [[name, *(float(np.mean(own[n])) if n in own else None for n in NORMALISATIONS)] for name, own in by.items()]
    count = max((row["count"] for row in run.validated), default=0)
    draws = 1 + max((row["draw"] for row in run.validated), default=-1)
    return Table(
        f"{NETS[run.net]}, layer normalisations on {count} validation pictures",
        ["criterion", *NORMALISATIONS],
        rows,
        f"Mean over the rates and both modes; draws: {draws}.",
    )


def words(run: Run, asked: int) -> list[str]:
    """Where relevance wins over every control and baseline, and where it does not, from the paired differences."""
    relevance = [n for n in run.criteria if n.startswith("LRP")]
    others = [n for n in run.criteria if n not in relevance and n != GROUND_TRUTH]
    if not relevance or not others:
        return []
    if run.draws < LEAST:
        return [
            f"{NETS[run.net]}: {run.draws} of {asked} draws are complete, {LEAST} are the least of which anything is "
            "said. No conclusion is drawn."
        ]
    base = "" if run.unpruned is None else f"unpruned {run.unpruned:.2f} %, "
    out = [f"{NETS[run.net]} ({base}{run.draws} draws)."]
    for again in (False, True):
        wins: list[str] = []
        losses: list[str] = []
        ties: list[str] = []
        for rate in run.rates:
            ours, theirs = (run.best(names, rate, again) for names in (relevance, others))
            gap, error = run.difference(ours, theirs, rate, again)
            text = f"{rate:.0%} ({ours} over {theirs}: {gap:+.1f} ± {error:.1f} points)"
            (wins if gap > 2 * error else losses if gap < -2 * error else ties).append(text)
        out.append(
            f"{_mode(again).capitalize()} new batch-norm statistics, the best LRP form (of {len(relevance)}, by the "
            f"test) is ahead of every other criterion at {'; '.join(wins) or 'no rate'}, behind at "
            f"{'; '.join(losses) or 'no rate'}, and not told apart (two standard errors of the paired difference) at "
            f"{'; '.join(ties) or 'no rate'}."
        )
    pair = ("LRP z+", "LRP z+, signed")
    if all(n in run.criteria for n in pair):
        gaps = [f"{rate:.0%} {_pm(run.difference(*pair, rate, False))}" for rate in run.rates]
        out.append(f"z+ with magnitudes per sample over signed z+, without new statistics: {'; '.join(gaps)} points.")
    return [" ".join(out), *_precision(run)]


def _precision(run: Run) -> list[str]:
    """How far cells move when their test pass runs in 32 bits."""
    tested = {_cell(row): row for row in run.tested}
    both = [(row, tested[_cell(row)]) for row in run.checked if _cell(row) in tested]
    if not both:
        return []
    moved = [100 * (b["correct"] - a["correct"]) / a["count"] for a, b in both]
    return [
        f"{NETS[run.net]}: {len(both)} of these cells again with products in 32 bits: 16 bits move the accuracy by "
        f"{np.mean(moved):+.2f} points in the mean and by {max(map(abs, moved)):.2f} at most."
    ]


def _cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[n] for n in ("criterion", "normalisation", "rate", "reestimated", "draw"))


def claims(runs: Mapping[str, Run]) -> list[Claim]:
    """The paper's sentence on few pictures, for its rule and for the form that validation pictures choose."""
    published = "abstract: clearly better than other criteria without fine-tuning where data are scarce (no number)"
    out = []
    for again, which in ((False, "LRP z+"), (True, "LRP z+"), (False, "chosen"), (True, "chosen")):
        if not runs:
            break
        forms = {net: which if which != "chosen" else run.form for net, run in runs.items()}
        about = "z+, the paper's rule," if which != "chosen" else "The form of LRP that validation pictures choose"
        claim = f"{about} is ahead of weight, gradient and Taylor as published, and of random, {_mode(again)} new "
        claim += "batch-norm statistics"
        if any(run.draws < LEAST or forms[net] not in run.criteria for net, run in runs.items()):
            why = f"fewer than {LEAST} draws, or the criteria are not all there"
            out.append(Claim(claim, published, "-", "not comparable", why))
            continue
        found = {}
        for net, run in runs.items():
            theirs = [n for n in (*PUBLISHED, "random") if n in run.criteria]
            found[net] = run.told_apart(str(forms[net]), theirs, again)
        signs = [s for by in found.values() for s in by.values()]
        ours = "; ".join(
            f"{NETS[net]} ({forms[net]}) ahead at {_rates(by, 1)}, behind at {_rates(by, -1)}"
            for net, by in found.items()
        )
        out.append(Claim(claim, published, ours, verdict(signs), _why(signs)))
    return out


def verdict(signs: Sequence[int]) -> Verdict:
    """Ahead everywhere: confirmed; more often than behind: partly; never told apart: null; else refuted."""
    ahead, behind = signs.count(1), signs.count(-1)
    if ahead == len(signs):
        return "confirmed"
    if ahead > behind:
        return "partly"
    return "null" if not ahead and not behind else "refuted"


def _why(signs: Sequence[int]) -> str:
    return (
        f"ahead of all of them by more than two standard errors of the paired difference in {signs.count(1)} of "
        f"{len(signs)} settings (network, rate), behind one of them in {signs.count(-1)}; confirmed needs all, partly "
        "more settings ahead than behind"
    )


def summary(runs: Mapping[str, Run]) -> str:
    """The middle rate in figures, and how often relevance is ahead."""
    out = []
    for net, run in runs.items():
        form = run.form
        if form is None or run.draws < LEAST or not run.controls:
            continue
        rate = run.rates[len(run.rates) // 2]
        for again in (False, True):
            other = run.best(run.controls, rate, again)
            names = [form, *(["LRP z+"] if form != "LRP z+" and "LRP z+" in run.criteria else []), other, "random"]
            told = ", ".join(f"{n} {run.mean(n, rate, again)[0]:.1f}" for n in names if n in run.criteria)
            signs = list(run.told_apart(form, run.controls, again).values())
            out.append(
                f"{NETS[net]}, {_mode(again)} new batch-norm statistics, {rate:.0%} of the filters cut: {told} %; "
                f"{form}, which validation pictures choose, is ahead of every control at {signs.count(1)} of "
                f"{len(signs)} rates and behind one at {signs.count(-1)}."
            )
    return f"{PER_CLASS} pictures per class, no training after the cut. " + " ".join(out) if out else ""


def wins_and_losses(runs: Mapping[str, Run]) -> tuple[list[str], list[str]]:
    """Settings in which the form that validation chose beats every control, and in which it does not."""
    wins: list[str] = []
    losses: list[str] = []
    for net, run in runs.items():
        form = run.form
        if form is None or run.draws < LEAST or "random" not in run.controls:
            continue
        for again in (False, True):
            for rate, sign in run.told_apart(form, run.controls, again).items():
                other = run.best(run.controls, rate, again)
                text = (
                    f"{NETS[net]}, {PER_CLASS} pictures per class, {rate:.0%} of the filters, {_mode(again)} new "
                    f"statistics: {form} {run.mean(form, rate, again)[0]:.1f} %, best control ({other}) "
                    f"{run.mean(other, rate, again)[0]:.1f} %, difference "
                    f"{_pm(run.difference(form, other, rate, again))}"
                )
                (wins if sign == 1 else losses).append(text)
    return wins, losses


def curves(runs: Mapping[str, Run]) -> Figure:
    """Curves of the best form of each family, one panel per network and mode."""
    from matplotlib.figure import Figure

    shown = {
        "random": ("0.6", ":"), "weight L1": ("tab:brown", "--"), "activation": ("tab:olive", "--"),
        "Taylor, published": ("tab:green", "--"), "Taylor, per sample": ("tab:green", "-"),
        "logit x activation": ("tab:purple", "-"), "LRP epsilon": ("tab:blue", "-"), "LRP z+": ("tab:red", "-"),
        "LRP z+, signed": ("tab:red", ":"), GROUND_TRUTH: ("black", "-."),
    }  # fmt: skip
    fig = Figure(figsize=(10, 4 * len(runs)), layout="tight")
    axes = fig.subplots(len(runs), 2, sharex=True, sharey="row", squeeze=False)
    for row, (net, run) in zip(axes, runs.items(), strict=True):
        for ax, again in zip(row, (False, True), strict=True):
            for name, (colour, style) in shown.items():
                if name not in run.criteria:
                    continue
                points = [run.mean(name, rate, again) for rate in run.rates]
                x = [100 * rate for rate in run.rates]
                ax.errorbar(x, [p[0] for p in points], [p[1] for p in points], color=colour, ls=style, label=name)
            if run.unpruned is not None:
                ax.axhline(run.unpruned, color="0.8", lw=1)
            ax.set_title(f"{NETS[net]}, {_mode(again)} new batch-norm statistics", fontsize=10)
            ax.set_xlabel("filters removed, % of the prunable ones")
        row[0].set_ylabel("top-1 on the test set, %")
    axes[0][0].legend(fontsize=7)
    return fig


def report(study: Study) -> Report:
    """From the rows of all networks that have some."""
    s = study.settings
    runs = {net: Run(study.rows, net, s["rates"]) for net in s["nets"] if of_stage(study.rows, net, "test")}
    wins, losses = wins_and_losses(runs)
    older = sum(
        row["precision"] != s["precision"][net]["validate"] for net in s["nets"]
        for row in of_stage(study.rows, net, "validate")
    )  # fmt: skip
    counts = {row["count"] for run in runs.values() for row in run.tested}
    text = [
        f"Public CIFAR-10 networks, {PER_CLASS} reference pictures per class drawn from the first 45,000 training "
        "pictures, rates in per cent of the filters that can be removed (inner convolutions of the blocks), one global "
        "order, filters physically cut, no fine-tuning. Top-1 on "
        f"{' or '.join(f'{n:,}' for n in sorted(counts))} test pictures, mean ± standard error over the draws of the "
        "reference pictures; criteria that need no data are the same for every draw but for new statistics. "
        "Magnitudes are per sample unless said otherwise; start relevance one at the true class. Each criterion has "
        "the layer normalisation that was best for it on training pictures kept apart (45,000 onwards), averaged over "
        "rates, draws and both modes. Products of the test passes in 16 bits, checked below; of the validation "
        f"passes, {older} cells are of another precision than the settings say, as their rows tell. Lists of wins and "
        "losses take the one form of LRP that the validation pictures choose, and leave out logit x activation, which "
        "is the same as LRP epsilon on these networks up to the stabiliser."
    ]
    for net, run in runs.items():
        text += words(run, draws_of(s, net))
    tables: dict[str, Table] = {}
    for net, run in runs.items():
        tables |= {f"{net}_old_statistics": accuracies(run, False), f"{net}_new_statistics": accuracies(run, True)}
        tables[f"{net}_validation"] = validation(run)
    figures = {"curves": curves(runs)} if runs else {}
    return Report(text, tables, figures, claims(runs), wins, losses, summary(runs))


def _mode(again: bool) -> str:
    return "with" if again else "without"


def _pm(pair: tuple[float, float]) -> str:
    return f"{pair[0]:+.1f} ± {pair[1]:.1f}"


def _rates(by: Mapping[float, int], sign: int) -> str:
    return ", ".join(f"{rate:.0%}" for rate, s in by.items() if s == sign) or "no rate"
