"""Words, tables, figures and verdicts of the flipping of clusterings, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t as student

from experiments.experiment import Claim, Report, Table, Verdict
from experiments.spread import mean_and_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.study import Study

__all__ = ["CONTROLS", "IMPUTERS", "STYLES", "Gains", "counted", "difference", "report", "verdict"]

#: those that judge; the midpoint is the root of our rule and is only shown
IMPUTERS = ("mean", "marginal", "other cluster", "KDE")
OURS = ("LRP", "LRP, hard", "LRP, coefficients")
GRADIENTS, AGNOSTIC = ("gradient x input", "integrated gradients"), ("SHAP", "occlusion", "local surrogate")
SIMPLE = ("sensitivity", "random")
CONTROLS = (*GRADIENTS, *AGNOSTIC, *SIMPLE)
#: colour and marker
STYLES = {
    "LRP": ("tab:red", "o"), "LRP, hard": ("tab:orange", "o"), "LRP, coefficients": ("tab:pink", "s"),
    "gradient x input": ("tab:blue", "^"), "integrated gradients": ("tab:cyan", "v"), "SHAP": ("tab:green", "D"),
    "occlusion": ("tab:olive", "P"), "local surrogate": ("tab:purple", "X"), "sensitivity": ("tab:brown", "*"),
    "random": ("0.5", "x"),
}  # fmt: skip
EXACT = 1e-9
PAPER = "no score at hand"
PILOT = "a pilot of ours (k-means, wine, one fit, mean imputer): SRG .831"
TIMED = (
    "a pilot of ours (three tables; share of replaced rows still in their cluster, lower is better): LRP .464, .379, "
    ".208, SHAP .465, .372, .212; 0.03 against 13 to 63 ms."
)


def difference(values: Sequence[float]) -> tuple[str, float, float]:
    """What paired differences over seeds say: the word, their mean and its standard error.

    "ahead" or "behind" where Student's interval at 95 % leaves out 0, "level" where it does not; "unknown" for fewer
    than three seeds.
    """
    found = mean_and_error(values)
    if found is None or found[1] is None or len(values) < 3:
        return "unknown", float("nan") if found is None else found[0], float("nan")
    half = float(student.ppf(0.975, len(values) - 1)) * found[1]
    word = "ahead" if found[0] > half else "behind" if found[0] < -half else "level"
    return word, found[0], found[1]


def verdict(words: Sequence[str]) -> Verdict:
    """Of many comparisons: "confirmed" if four of five are won and none lost, "refuted" if more are lost than won and
    one of three at least, "null" if not even one of three is won, "partly" otherwise."""
    n, won, lost = len(words), words.count("ahead"), words.count("behind")
    if not n or "unknown" in words:
        return "not comparable"
    if won >= 0.8 * n and not lost:
        return "confirmed"
    if lost > won and lost >= n / 3:
        return "refuted"
    return "null" if won < n / 3 else "partly"


class Gains:
    """Rows of a study by model, table and seed."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows: dict[tuple[str, str], dict[int, Any]] = {}
        for row in rows:
            self.rows.setdefault((row["model"], row["table"]), {})[row["seed"]] = row
        self.models = list(dict.fromkeys(m for m, _ in self.rows))
        self.tables = list(dict.fromkeys(t for _, t in self.rows))

    def methods(self, model: str) -> list[str]:
        """Those of at least one row, in the order of :data:`STYLES`."""
        seen = {n for (m, _), by in self.rows.items() if m == model for row in by.values() for n in row["seconds"]}
        return [n for n in STYLES if n in seen]

    def each(
        self, model: str, table: str, method: str, imputers: Sequence[str] = IMPUTERS, kind: str = "srg"
    ) -> dict[int, float]:
        """By seed the mean over imputers; without seeds in which one is missing."""
        out = {}
        for seed, row in self.rows.get((model, table), {}).items():
            v = [row[kind].get(i, {}).get(method) for i in imputers]
            if None not in v:
                out[seed] = float(np.mean(v))
        return out

    def paired(
        self, model: str, table: str, other: str, ours: str = "LRP", imputers: Sequence[str] = IMPUTERS
    ) -> tuple[str, float, float] | None:
        """Ours minus another method over the same fits; None where one of them is missing."""
        a, b = (self.each(model, table, n, imputers) for n in (ours, other))
        both = sorted(a.keys() & b.keys())
        return difference([a[s] - b[s] for s in both]) if both else None

    def words(self, model: str, others: Sequence[str], ours: str = "LRP") -> list[str]:
        """Of the paired differences on all tables."""
        found = [self.paired(model, t, o, ours) for t in self.tables for o in others]
        return [f[0] for f in found if f is not None]

    def common(self, model: str) -> list[str]:
        """Tables on which every method of the model was run."""
        names = self.methods(model)
        return [t for t in self.tables if (model, t) in self.rows and all(self.each(model, t, n) for n in names)]

    def overall(
        self, model: str, method: str, imputers: Sequence[str] = IMPUTERS, kind: str = "srg"
    ) -> tuple[float, float | None] | None:
        """Mean over the common tables, with the standard error over the seeds that all of them have."""
        found = [self.each(model, t, method, imputers, kind) for t in self.common(model)]
        if not found:
            return None
        seeds = sorted(set.intersection(*(set(f) for f in found)))
        return mean_and_error([float(np.mean([f[s] for f in found])) for s in seeds])

    def of(self, model: str, *path: str) -> list[float]:
        """A number of every row of a model, such as ``of("k-means", "seconds", "LRP")``."""
        out = []
        for (m, _), by in self.rows.items():
            for row in by.values() if m == model else ():
                value = row
                for name in path:
                    value = value.get(name) if value is not None else None
                if value is not None:
                    out.append(float(value))
        return out


def counted(words: Sequence[str]) -> str:
    """ "ahead 3, level 1, behind 0"."""
    shown = ("ahead", "level", "behind", *(["unknown"] if "unknown" in words else []))
    return ", ".join(f"{w} {words.count(w)}" for w in shown)


# ------------------------------------------------------------ report


def report(study: Study) -> Report:
    """From the rows of a run, finished or not."""
    found = Gains(study.rows)
    wins, losses = _settings(found)
    words, summary = _words(study, found), _summary(found)
    return Report(words, _tables(found), _figures(found), _claims(found), wins, losses, summary)


def _exactness(found: Gains, model: str) -> dict[str, float]:
    return {
        "labels": min(found.of(model, "labels_agree")),
        "signs": min(found.of(model, "signs_agree")),
        "logits": max(found.of(model, "logit_error")),
        "books": max(found.of(model, "books_error")),
        "residual": float(np.mean(found.of(model, "residual_share"))),
        "coverage": float(np.median(found.of(model, "coverage"))),
        "rows": sum(found.of(model, "checked")),
    }


def _claims(found: Gains) -> list[Claim]:
    if not found.rows:
        return []
    exact = {m: _exactness(found, m) for m in found.models}
    worst = {k: max(e[k] for e in exact.values()) for k in ("logits", "books")}
    agree = min(min(e["labels"], e["signs"]) for e in exact.values())
    same: Verdict = "confirmed" if agree == 1 and worst["logits"] < EXACT else "partly" if agree > 0.999 else "refuted"
    claims = [
        Claim(
            "A clustering can be rewritten as a network that decides alike: the logit of a cluster is positive exactly "
            "on its rows", "exact, by construction (k-means, kernel and deep k-means)",
            f"labels and signs of all logits agree on {100 * agree:.2f} % of "
            f"{sum(e['rows'] for e in exact.values()):.0f} rows (held-out ones, and the same moved away threefold); "
            f"logits differ from the definitions by {worst['logits']:.1e} of their mean at most",
            same, "confirmed if every label and sign agrees and logits to 1e-9, in float64",
        )
    ]  # fmt: skip
    for model, e in exact.items():
        books, carried = e["books"] < EXACT, abs(e["coverage"] - 1) < 0.1 and e["residual"] < 0.1
        claims.append(
            Claim(
                f"Relevance is conserved: the values of a row add up to its logit ({model})",
                "exact for k-means; behind kernels and networks with what pools and biases take",
                f"values plus named residual differ from the logit by {e['books']:.1e} of its mean at most; the "
                f"residual is {100 * e['residual']:.1f} % of the logit on average, the columns carry "
                f"{100 * e['coverage']:.0f} % of it in the median row",
                "confirmed" if books and carried else "partly" if books else "refuted",
                "confirmed if books balance to 1e-9 and columns carry the logit to a tenth; partly if only books do",
            )
        )
    rule = (
        "by table, Student's 95 % interval of paired differences; confirmed if ahead in four of five and behind in "
        "none, refuted if behind more often than ahead and in a third, null if ahead in less than a third"
    )
    for model in found.models:
        forms = [n for n in ("LRP", "LRP, coefficients") if n in found.methods(model)]
        for title, others, published in (
            ("finds the columns better than slopes alone and than chance", SIMPLE, f"{PILOT} against .476 and -.01."),
            ("finds the columns better than gradient x input and integrated gradients", GRADIENTS,
             f"{PILOT} against .864 of gradient x input."),
        ):  # fmt: skip
            for form in forms:
                words = found.words(model, others, form)
                ours = "; ".join(f"{o}: {counted(found.words(model, [o], form))}" for o in others)
                source = f"{PAPER}; {published}" if model == "k-means" else PAPER
                claims.append(Claim(f"{form} {title} ({model})", source, ours, verdict(words), rule))
        claims += [_speed(found, model, form) for form in forms]
    return claims


def _speed(found: Gains, model: str, form: str) -> Claim:
    """Level with Shapley values of the same logit, and faster."""
    claim = f"{form} is level with SHAP on the same logit, at a fraction of its time ({model})"
    published, words = TIMED if model == "k-means" else PAPER, found.words(model, ["SHAP"], form)
    if not words or "unknown" in words:
        return Claim(claim, published, "-", "not comparable", "needs three fits" if words else "shap is not installed")
    ours, theirs = (float(np.median(found.of(model, "seconds", n))) for n in (form, "SHAP"))
    kept = 1 - words.count("behind") / len(words)
    told: Verdict = "refuted" if kept <= 0.5 or theirs < 10 * ours else "confirmed" if kept >= 0.8 else "partly"
    return Claim(
        claim, published,
        f"{counted(words)} of {len(words)} tables; median time of a row {1000 * ours:.3g} against "
        f"{1000 * theirs:.3g} ms", told,
        "confirmed if behind on a fifth of the tables at most and ten times as fast, refuted if behind on half of them "
        "or not that fast",
    )  # fmt: skip


def _settings(found: Gains) -> tuple[list[str], list[str]]:
    """Tables on which the default is ahead of every control, and those on which it is not."""
    wins, losses = [], []
    for model in found.models:
        ahead, exact, level = [], [], []
        behind: dict[str, list[str]] = {}
        for table in found.tables:
            all_ = {o: found.paired(model, table, o) for o in CONTROLS}
            words = {o: p[0] for o, p in all_.items() if p is not None}
            if not words or "unknown" in words.values():
                continue
            by = [o for o, w in words.items() if w == "behind"]
            if set(words.values()) != {"ahead"} and all(words[o] == "ahead" for o in (*GRADIENTS, *SIMPLE)):
                exact.append(table)
            if set(words.values()) == {"ahead"}:
                ahead.append(table)
            elif by:
                behind.setdefault(", ".join(by), []).append(table)
            else:
                level.append(table)
        without = f"what samples nothing ({', '.join((*GRADIENTS, *SIMPLE))})"
        for rivals, names in (("every other method", ahead), (without, exact)):
            if names:
                wins.append(f"Flipping, {model}: LRP (default) is ahead of {rivals} on {', '.join(names)}.")
        if behind or level:
            rest = [f"on {', '.join(level)} behind none, and level with at least one"] if level else []
            lost = "; ".join([f"behind {by} on {', '.join(tables)}" for by, tables in behind.items()] + rest)
            losses.append(f"Flipping, {model}: LRP (default) is not ahead of every other method: {lost}.")
    return wins, losses


def _summary(found: Gains) -> str:
    """For RESULTS.md; of the models that have all methods on some table."""
    scores, slopes, times = [], [], []
    for model in found.models:
        known = {n: o for n in found.methods(model) if (o := found.overall(model, n)) is not None}
        rivals = [n for n in CONTROLS if n in known]
        if "LRP" not in known or not rivals:
            continue
        best, words = max(rivals, key=lambda n: known[n][0]), found.words(model, GRADIENTS)
        other = known.get("LRP, coefficients")
        form = "" if other is None else f", or {_pm(other)} if the encoder is given coefficients"
        scores.append(f"{model} {_pm(known['LRP'])}{form} ({best}, best of the others: {_pm(known[best])})")
        slopes.append(
            f"ahead {words.count('ahead')} and behind {words.count('behind')} of {len(words)} times with {model}"
        )
        if shap := found.words(model, ["SHAP"]):
            ours, theirs = (float(np.median(found.of(model, "seconds", n))) for n in ("LRP", "SHAP"))
            fast = f"{theirs / ours:,.0f} times as fast"
            times.append(f"{shap.count('behind')} of {len(shap)} tables with {model} ({fast})")
    if not scores:
        return ""
    seeds = len({seed for by in found.rows.values() for seed in by})
    return (
        "Clusterings are rewritten as networks; the paper, whose scores were not at hand, claims that relevance (LRP) "
        "then finds the columns that hold a row in its cluster. "
        f"Columns of {len(found.tables)} tables are taken out, and the area between least and most relevant first "
        f"(SRG, higher is better) is, for LRP: {'; '.join(scores)}. Table by table, against gradient x "
        f"input and integrated gradients, LRP is {', '.join(slopes)}. "
        + (f"It is behind SHAP, which samples the same logit, on {', '.join(times)}. " if times else "")
        + f"Scores are means over {seeds} seeds and four ways to fill gaps, each of which favours some method."
    )


def _words(study: Study, found: Gains) -> list[str]:
    if not found.rows:
        return ["No row is finished."]
    s, rows = study.settings, study.rows
    words = [
        f"{len(rows)} fits of {', '.join(found.models)} on {len(found.tables)} tables, {s['seeds']} seeds; a seed "
        f"draws the four fifths of the rows that are fitted on ({s['fit_rows']} at most), up to {s['rows']} held-out "
        f"rows that are judged, and the start of the fit; of MNIST {s['pictures'][0]} training and {s['pictures'][1]} "
        "test pictures. Tables are standardised, pixels lie in 0 to 1; as many clusters as "
        "classes, three at least. LRP: the divided midpoint rule for k-means (undivided with kernels), beta = 1 / mean "
        "logit of the fitted rows; 'hard': the nearest competitor alone. Behind an encoder 'LRP' is the default, which "
        "hands relevance over to the gamma rule, and 'coefficients' hands over the weights of the distance layer. All "
        "methods explain the logit of a row's own cluster.",
        "SRG is the area under the curve 'least relevant first' minus that of 'most relevant first', in units of the "
        f"logit; higher is better, 0 is chance. Unless it is said otherwise it is the mean over four imputers "
        f"({', '.join(IMPUTERS)}). Each favours someone: the mean is the root of gradient x input and integrated "
        "gradients on standardised columns, marginal rows are the background of SHAP, occlusion and the local "
        "surrogate, and the midpoint (shown apart, for k-means) is the root of our rule. 'Ahead' and 'behind': per "
        "table Student's 95 % interval of the paired difference over the fits leaves out 0; nothing corrects for many "
        "comparisons.",
    ]  # fmt: skip
    for model in found.models:
        told = {n: o for n in found.methods(model) if (o := found.overall(model, n)) is not None}
        order = sorted(told, key=lambda n: -told[n][0])
        text = f"{model}: mean SRG over {len(found.common(model))} tables: "
        text += ", ".join(f"{n} {_pm(told[n])}" for n in order) + "."
        for form in ("LRP", "LRP, coefficients"):
            by = {o: w for o in (*OURS[1:], *CONTROLS) if o != form and (w := found.words(model, [o], form))}
            if form in told and by:
                text += f" {form} is ahead of, level with and behind on so many tables: " + ", ".join(
                    f"{o} {'/'.join(str(w.count(x)) for x in ('ahead', 'level', 'behind'))}" for o, w in by.items()
                )
                unknown = any("unknown" in w for w in by.values())
                text += " (fewer than three fits: not yet known)." if unknown else "."
        words.append(text)
    words += _by_imputer(found) + _by_root(found)
    missing = [
        f"{m} on {t}" for (m, t), by in found.rows.items() if any("SHAP" not in r["seconds"] for r in by.values())
    ]
    if missing:
        words.append(
            "SHAP (permutation explainer, 20 background rows, 500 evaluations a row or one permutation there and "
            f"back) was not run for {', '.join(missing)}: not installed, or more multiplications than the run allows."
        )
    return words


def _pm(value: tuple[float, float | None]) -> str:
    return f"{value[0]:.2f}" if value[1] is None else f"{value[0]:.2f} ± {value[1]:.2f}"


def _by_imputer(found: Gains) -> list[str]:
    """How far a comparison depends on what fills the gaps."""
    out = []
    for model in found.models:
        told = []
        for imputer in [*IMPUTERS, "midpoint"]:
            a, b = (found.overall(model, n, [imputer]) for n in ("LRP", "gradient x input"))
            c = found.overall(model, "SHAP", [imputer])
            if a is not None and b is not None:
                told.append(f"{imputer} {a[0] - b[0]:+.2f}" + (f" and {a[0] - c[0]:+.2f}" if c is not None else ""))
        if told:
            out.append(f"{model}, LRP minus gradient x input and minus SHAP by imputer: {'; '.join(told)}.")
    return out


def _by_root(found: Gains) -> list[str]:
    """What changes where zero is black and not the mean of the column."""
    told = []
    for model in found.models:
        kinds = []
        for pixels in (False, True):
            names = [t for t in found.common(model) if (t in ("digits", "MNIST")) == pixels]
            gaps = [found.paired(model, t, "gradient x input") for t in names]
            kinds.append([g[1] for g in gaps if g is not None])
        if all(kinds):
            told.append(f"{model} {np.mean(kinds[0]):+.2f} and {np.mean(kinds[1]):+.2f}")
    if not told:
        return []
    return [
        "LRP minus gradient x input on standardised columns, whose zero is their mean, and on pixels, whose zero is "
        f"black: {'; '.join(told)}."
    ]


def _tables(found: Gains) -> dict[str, Table]:
    tables = {
        "equivalence": Table(
            "The network and the model, in float64",
            ["model", "rows checked", "labels agree, %", "signs agree, %", "largest error of a logit",
             "largest error of the books", "mean residual, % of the logit", "columns carry in the median row, %"],
            [
                [m, int(e["rows"]), 100 * e["labels"], 100 * e["signs"], f"{e['logits']:.1e}", f"{e['books']:.1e}",
                 100 * e["residual"], 100 * e["coverage"]]
                for m in found.models
                for e in [_exactness(found, m)]
            ],
            "Errors in units of the mean logit; logits against the definitions, in numpy. The worst fit of each.",
        )
    }  # fmt: skip
    for model in found.models:
        names = found.methods(model)
        key = model.split()[0].replace("-", "")
        rows: list[list[Any]] = []
        pairs: list[list[Any]] = []
        for t in (t for t in found.tables if (model, t) in found.rows):
            first = next(iter(found.rows[model, t].values()))
            label = f"{t} (D {first['columns']}, K {first['clusters']})"
            rows.append([label, *(mean_and_error(found.each(model, t, n).values()) for n in names)])
            said = [found.paired(model, t, o) for o in names if o != "LRP"]
            pairs.append([label, *(None if p is None else f"{p[1]:+.3f} ± {p[2]:.3f} {p[0]}" for p in said)])
        tables[f"srg_{key}"] = Table(
            f"SRG, {model}", ["table", *names], rows, "Mean over four imputers ± standard error over the seeds.", 2
        )
        tables[f"paired_{key}"] = Table(
            f"SRG of LRP minus that of the others, {model}",
            ["table", *(f"- {n}" for n in names if n != "LRP")],
            pairs,
            "Paired over the fits, ± standard error; ahead or behind: Student's interval at 95 % leaves out 0.",
        )
        imputers = [i for i in (*IMPUTERS, "midpoint") if found.overall(model, "LRP", [i]) is not None]
        tables[f"imputers_{key}"] = Table(
            f"SRG by imputer, and both areas, {model}",
            ["method", *imputers, "most relevant first", "least relevant first", "ms per row",
             "sum of the values off the logit, %"],
            [
                [n, *(found.overall(model, n, [i]) for i in imputers), found.overall(model, n, kind="most"),
                 found.overall(model, n, kind="least"),
                 f"{1000 * float(np.median(found.of(model, 'seconds', n))):.3g}",
                 f"{100 * float(np.mean(found.of(model, 'sum_error', n))):.3g}"]
                for n in names
            ],
            f"Mean over the tables on which all were run ({len(found.common(model))}) ± standard error over the seeds; "
            "areas in units of the constant logit, over the four imputers. Time: median over tables and seeds, for all "
            "judged rows at once, on one shared core: orders of magnitude only.",
            2,
        )  # fmt: skip
    return tables


def _figures(found: Gains) -> dict[str, Figure]:
    from matplotlib.figure import Figure

    if not found.rows:
        return {}
    n, tables = len(found.models), found.tables
    gains = Figure(figsize=(4.2 * n + 1, 0.5 * len(tables) + 1.8), layout="constrained")
    axes = gains.subplots(1, n, sharey=True, squeeze=False)[0]
    for ax, model in zip(axes, found.models, strict=True):
        names = found.methods(model)
        for k, name in enumerate(names):
            at = [(i, v) for i, t in enumerate(tables) if (v := mean_and_error(found.each(model, t, name).values()))]
            y = [i + 0.6 * (k / max(1, len(names) - 1) - 0.5) for i, _ in at]
            x, error = [v[0] for _, v in at], [v[1] or 0 for _, v in at]
            colour, marker = STYLES[name]
            ax.errorbar(x, y, xerr=error, color=colour, marker=marker, ls="", ms=4.5, lw=1, label=name)
        for i in range(1, len(tables)):
            ax.axhline(i - 0.5, color="0.9", lw=0.8)
        ax.axvline(0, color="0.7", lw=0.8)
        ax.set_xlabel("SRG (higher is better)")
    axes[0].set_yticks(range(len(tables)), tables)
    axes[0].invert_yaxis()
    name = "MNIST" if "MNIST" in tables else tables[-1]
    curves = Figure(figsize=(4.2 * n, 4.1), layout="constrained")
    for ax, model in zip(curves.subplots(1, n, squeeze=False)[0], found.models, strict=True):
        for method in found.methods(model):
            runs = [r["curves"][method] for r in found.rows.get((model, name), {}).values() if method in r["curves"]]
            if not runs or method in ("LRP, hard", "local surrogate", "occlusion"):
                continue
            most, least = np.mean(runs, axis=0)
            share = np.linspace(0, 100, len(most))
            ax.plot(share, most, color=STYLES[method][0], label=method)
            ax.plot(share, least, color=STYLES[method][0], ls="--", lw=1)
        ax.axhline(0, color="0.7", lw=0.8)
        text = f"columns of {name} removed (marginal draws), %\nsolid: most relevant first, dashed: least"
        ax.set(xlabel=text, ylabel="logit over its start")
    times = Figure(figsize=(3.8 * n, 3.9), layout="constrained")
    for ax, model in zip(times.subplots(1, n, squeeze=False)[0], found.models, strict=True):
        for method in found.methods(model):
            if (value := found.overall(model, method)) is None:
                continue
            spent = 1000 * float(np.median(found.of(model, "seconds", method)))
            colour, marker = STYLES[method]
            ax.errorbar([spent], [value[0]], yerr=[value[1] or 0], color=colour, marker=marker, ls="", label=method)
        ax.set(xscale="log", xlabel="ms per row", ylabel="SRG, mean over tables")
    figures = {"gains": gains, "curves": curves, "times": times}
    for figure in figures.values():
        handles: dict[str, Any] = {}
        for ax, model in zip(figure.axes, found.models, strict=True):
            ax.set_title(model, fontsize=10)
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        shown = [m for m in STYLES if m in handles]
        figure.legend([handles[m] for m in shown], shown, loc="outside lower center", ncols=5, fontsize=8)
    return figures
