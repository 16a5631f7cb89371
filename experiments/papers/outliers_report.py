"""Tables, pictures and verdicts of the outliers among digits, from the rows of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.experiment import Claim, Report, Table
from experiments.papers.outliers import CONTROLS, KINDS, MACHINES, METHODS, PLANTED, RULES, SHOWN, SIDE
from experiments.papers.svm_flipping_report import RULE, Paired, judge, mean_and_error, paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.study import Study

__all__ = ["gaps", "report"]

OURS = RULES[0]
CLAIMED = ("gradient x input", "sensitivity", "squared difference to the nearest", "random")
FILLINGS = {"density": "the conditional density of the training pictures", "mean": "the training mean"}
NO_NUMBER = "shown on pictures; no score at hand"


def _fits(study: Study) -> list[dict[str, Any]]:
    return [row for row in study.rows if "machine" in row]


def _measure(row: Mapping[str, Any], kind: str, measure: str) -> Mapping[str, float] | None:
    """Method to number: "auc", "rank", or the areas of a filling."""
    found = row[kind]["areas"][measure] if measure in FILLINGS else row[kind].get(measure)
    return found  # type: ignore[no-any-return]


def _values(study: Study, machine: str, kind: str, measure: str, method: str) -> list[float]:
    numbers = [_measure(row, kind, measure) for row in _fits(study) if row["machine"] == machine]
    return [n[method] for n in numbers if n is not None and method in n]


def gaps(study: Study, measure: str, other: str, kinds: Sequence[str]) -> dict[tuple[str, str], Paired]:
    """Relevance minus another method, paired over digits and draws, by machine and kind of outlier."""
    out = {}
    for machine in MACHINES:
        for kind in kinds:
            ours, theirs = (_values(study, machine, kind, measure, m) for m in (OURS, other))
            if ours and len(ours) == len(theirs):
                out[machine, kind] = paired(ours, theirs)
    return out


def _told(found: Mapping[tuple[str, str], Paired]) -> str:
    """Of the first machine by kind, or of many kinds the ends; of all, how far they reach."""
    first = next(iter(found))[0]
    own = {KINDS[k]: g for (m, k), g in found.items() if m == first}
    shown = sorted(own, key=lambda k: own[k].mean)
    shown = [shown[0], shown[-1]] if len(shown) > 3 else list(own)
    every = [g.mean for g in found.values()]
    told = f"{MACHINES[first]}: {', '.join(f'{k} {own[k]}' for k in shown)}"
    return f"{told}; over all machines from {min(every):+.3f} to {max(every):+.3f}"


def _claims(study: Study) -> list[Claim]:
    rows, out = _fits(study), []
    if not rows:
        return []
    svm = [r for r in rows if r["machine"] == "ocsvm"]
    kde = [r for r in rows if r["machine"] != "ocsvm"]
    if svm:
        differing, compared = (int(sum(r[k] for r in svm)) for k in ("rows_differing", "rows_compared"))
        gap, least = max(r["decision_gap"] for r in svm), min(r["least_outlyingness"] for r in svm)
        out.append(
            Claim(
                "A one-class SVM is a network with the same decisions, whose outlyingness is not negative",
                "the same decisions and o >= 0 once the duals are normalised (Kauffmann et al. 2020; the normalisation "
                "is derived in the references: as scikit-learn stores them, o was negative on every row of wine)",
                f"{differing} of {compared:,} rows decided differently, decision values within {gap:.0e} of the "
                f"largest, smallest outlyingness {least:.3f}",
                "confirmed" if not differing and gap < 1e-9 and least >= 0 else "refuted",
                "confirmed if no row differs, values agree to 1e-9 and no outlyingness is below 0",
            )
        )
    if kde:
        gap, theirs = (max(r[k] for r in kde) for k in ("decision_gap", "score_samples_gap"))
        out.append(
            Claim(
                "A kernel density is the same network without a threshold",
                "score_samples, which a check of the references found inexact where the density is tiny",
                f"log densities within {gap:.0e} of a plain log-sum-exp, and within {theirs:.0e} of score_samples",
                "confirmed" if gap < 1e-9 else "refuted",
                "relative to the largest magnitude; confirmed if within 1e-9 of the plain sum",
            )
        )
    lost = max(r["conservation"] for r in rows)
    out.append(
        Claim(
            "Relevances of the pixels and the named rest add up to the outlyingness",
            "the divided rule conserves; the rest of the undivided rule is derived in the references",
            f"largest relative gap {lost:.0e} over machines, rules and pictures",
            "confirmed" if lost < 1e-9 else "refuted",
            "confirmed below 1e-9",
        )
    )
    for measure, kinds, good, what in (
        ("auc", tuple(PLANTED), "above", "finds spoilt pixels better than"),
        ("density", tuple(KINDS), "below", "leads back to the inliers faster than"),
    ):
        for other in CLAIMED:
            found = gaps(study, measure, other, kinds)
            if not found:
                continue
            states = [g.state for g in found.values()]
            ahead = states.count(good)
            behind = sum(s in ("above", "below") and s != good for s in states)
            number = "AUC of the planted pixels" if measure == "auc" else "area under the flipping curve"
            out.append(
                Claim(
                    f"Relevance {what} {other}",
                    NO_NUMBER,
                    f"{number}, undivided rule minus {other}: {_told(found)}",
                    judge(states, good),
                    f"ahead in {ahead}, behind in {behind} of {len(states)} settings of machine and kind, {RULE}",
                )
            )
    return out


def _against_controls(study: Study) -> tuple[list[str], list[str], tuple[int, int, int]]:
    """By machine where relevance is ahead of every control and where not; how many settings are won, lost, all."""
    wins: dict[str, list[str]] = {}
    losses: dict[str, list[str]] = {}
    won = lost = count = 0
    for measure, kinds, good in (("auc", tuple(PLANTED), "above"), ("density", tuple(KINDS), "below")):
        every = {c: gaps(study, measure, c, kinds) for c in CONTROLS}
        what = "AUC of the planted pixels" if measure == "auc" else "Flipping area"
        for machine in MACHINES:
            first: dict[str, str] = {}
            short: dict[str, str] = {}
            for kind in kinds:
                found = {c: g[machine, kind] for c, g in every.items() if (machine, kind) in g}
                if not found or any(g.state == "unknown" for g in found.values()):
                    continue
                count += 1
                nearest = min(found, key=lambda c: found[c].mean * (1 if good == "above" else -1))
                behind = [c for c, g in found.items() if g.state in ("above", "below") and g.state != good]
                if behind:
                    lost += 1
                    short[kind] = f"behind {', '.join(f'{c} ({found[c]})' for c in behind)}"
                elif level := [c for c, g in found.items() if g.state == "level"]:
                    short[kind] = f"level with {' and '.join(level)}"
                else:
                    won += 1
                    first[kind] = f"{found[nearest]} against the best control, {nearest}"
            for texts, told in ((wins, first), (losses, short)):
                if told:
                    same = {text: [KINDS[k] for k, other in told.items() if other == text] for text in told.values()}
                    where = {
                        t: "every kind" if len(names) == len(kinds) else ", ".join(names) for t, names in same.items()
                    }
                    parts = [f"{text} on {names}" for text, names in where.items()]
                    texts.setdefault(machine, []).append(f"{what}: {'; '.join(parts)}")
    ahead, not_ahead = ([f"{MACHINES[m]}. {'. '.join(v)}" for m, v in texts.items()] for texts in (wins, losses))
    return ahead, not_ahead, (won, lost, count)


def _summary(study: Study, won: int, lost: int, count: int) -> str:
    """For RESULTS.md; of the one-class SVM, and of how many settings are won."""
    rows = [r for r in _fits(study) if r["machine"] == "ocsvm"]
    if not rows or not count:
        return ""

    def told(method: str) -> str:
        mean, error = mean_and_error([float(np.mean([r[k]["auc"][method] for k in PLANTED])) for r in rows])
        return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")

    others = ", ".join(f"{c} {told(c)}" for c in CONTROLS if c not in ("random", "squared difference to the mean"))
    slopes = [abs(g.mean) for g in gaps(study, "auc", "sensitivity", tuple(PLANTED)).values()]
    s = study.settings
    return (
        f"One-class support vector machines and kernel densities are fitted to pictures of one MNIST digit "
        f"({len(s['digits'])} digits, {s['seeds']} draws of each), and pictures are spoilt at known places; the "
        "paper shows on pictures, without scores, that relevance of the outlyingness finds what is wrong. "
        "With the support vector machine, relevance ranks the spoilt pixels with an area under the ROC curve of "
        f"{told(OURS)} (mean over a stroke, noise and a wiped-out piece; {others}). "
        f"Over all machines, kinds of damage and two measures it is ahead of every control in {won} and behind one in "
        f"{lost} of {count} settings. "
        f"In no setting does the squared slope alone (sensitivity) rank spoilt pixels differently by more than "
        f"{max(slopes):.3f} in that area, but only relevance adds up to the outlyingness."
    )


def _cell(values: Sequence[float]) -> tuple[float, float | None] | None:
    return mean_and_error(values) if values else None


def _tables(study: Study) -> dict[str, Table]:
    out = {}
    machines = [m for m in MACHINES if any(r["machine"] == m for r in _fits(study))]
    note = "Mean and standard error over digits and draws. "
    for measure, kinds, title, said in (
        ("auc", PLANTED, "Ranking of the planted pixels: area under the ROC curve (higher is better)", "Chance: 0.5."),
        ("rank", PLANTED, "Share of the planted pixels among as many most relevant ones (higher is better)", ""),
        ("density", KINDS, f"Flipping towards the inliers, pixels from {FILLINGS['density']} (lower is better)",
         "Area under the curve of the outlyingness o over its start; points at 0, 4, 8, 16, ... pixels count alike."),
        ("mean", KINDS, f"The same with pixels from {FILLINGS['mean']}",
         "It favours the squared difference to the mean and occlusion, whose reference that is."),
    ):  # fmt: skip
        columns = [(m, k) for m in machines for k in kinds]
        body = [[method, *(_cell(_values(study, m, k, measure, method)) for m, k in columns)] for method in METHODS]
        names = [f"{_SHORT[m]}, {_KIND[k]}" for m, k in columns]
        out[f"planted_{measure}" if kinds is PLANTED else f"flipping_{measure}"] = Table(
            title, ["method", *names], body, note + said, digits=3
        )
    body = []
    for machine in machines:
        rows = [r for r in _fits(study) if r["machine"] == machine]
        body.append(
            [MACHINES[machine], mean_and_error([r["gamma"] for r in rows]),
             *(mean_and_error([r[k]["detected"] for r in rows]) for k in KINDS),
             mean_and_error([r["ms_per_row"] for r in rows])]
        )  # fmt: skip
    out["machines"] = Table(
        "What the machines see: area under the ROC curve of spoilt against held-out pictures",
        ["machine", "gamma", *KINDS.values(), "relevance, ms per picture"],
        body,
        note + "A machine that does not tell spoilt pictures from others still has an outlyingness to explain.",
        digits=3,
    )
    return out


_SHORT = {"ocsvm": "SVM", "kde": "KDE", "kde sharp": "sharp KDE"}
_KIND = {"stroke": "stroke", "noise": "noise", "wiped": "wiped", "others": "other digits"}


def _pictures(study: Study) -> Figure | None:
    from matplotlib.figure import Figure

    from lrp import plots

    found = [row for row in study.rows if "shown" in row]
    if not found:
        return None
    shown = found[0]["shown"]
    figure = Figure(figsize=(1.75 * (len(SHOWN) + 1), 1.8 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(SHOWN) + 1, squeeze=False)
    for row, item in zip(axes, shown, strict=True):
        row[0].imshow(np.reshape(item["picture"], (SIDE, SIDE)), cmap="gray_r", vmin=0, vmax=1)
        row[0].set_xticks([])
        row[0].set_yticks([])
        row[0].set_ylabel(KINDS[item["kind"]], fontsize=9)
        for ax, method in zip(row[1:], SHOWN, strict=True):
            plots.heatmap(np.reshape(item["maps"][method], (SIDE, SIDE)), ax, quantile=1.0)
    for ax, title in zip(axes[0], ("picture", *SHOWN), strict=True):
        ax.set_title(title.replace(" to the", "\nto the"), fontsize=9)
    return figure


def _curves(study: Study) -> Figure:
    from matplotlib.figure import Figure

    machines = [m for m in MACHINES if any(r["machine"] == m for r in _fits(study))]
    figure = Figure(figsize=(11, 2.5 * max(len(machines), 1)), layout="constrained")
    axes = figure.subplots(max(len(machines), 1), len(KINDS), sharex=True, squeeze=False)
    colours = ("#c0392b", "#e67e22", "#2980b9", "#b7950b", "#7f8c8d", "#16a085", "#8e44ad", "#2c3e50")
    steps = [0, *study.settings["steps"]]
    for row, machine in zip(axes, machines, strict=False):
        for ax, kind in zip(row, KINDS, strict=True):
            rows = [r for r in _fits(study) if r["machine"] == machine]
            for method, colour in zip(METHODS, colours, strict=True):
                curves = [np.asarray(r[kind]["curves"]["density"][method]) for r in rows]
                mean = np.mean([c / abs(c[0]) for c in curves], 0)
                ax.plot(range(len(steps)), mean, color=colour, lw=1.2, label=method,
                        ls="--" if method == "random" else "-")  # fmt: skip
            ax.axhline(0, color="0.85", lw=0.8, zorder=0)
            ax.set_title(f"{_SHORT[machine]}, {_KIND[kind]}", fontsize=9)
            ax.set_xticks(range(len(steps)), [str(k) for k in steps], fontsize=7)
            ax.tick_params(labelsize=7)
        row[0].set_ylabel("o / start", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("pixels replaced, most relevant first", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def report(study: Study) -> Report:
    """Tables, pictures and verdicts from the rows."""
    s, fits = study.settings, _fits(study)
    tables, (wins, losses, (won, lost, count)) = _tables(study), _against_controls(study)
    words = [
        f"One-class SVM (nu {s['nu']}) and kernel densities, each on {s['rows']} training pictures of one MNIST digit "
        f"(digits {', '.join(map(str, s['digits']))}; {s['seeds']} draws of each). gamma makes the mean "
        "perplexity of a picture's kernel values a quarter of their number, as the authors' code does; for the sharp "
        f"density it is that of the largest leave-one-out likelihood. Judged: {s['judged']} held-out test pictures of "
        "the digit, spoilt in three ways at known places, and as many of the other digits. Nothing was tuned.",
    ]
    if fits:
        told = []
        for kind, name in PLANTED.items():
            numbers = {m: np.mean(_values(study, "ocsvm", kind, "auc", m) or [np.nan]) for m in METHODS}
            ranked = sorted(numbers, key=lambda m: -numbers[m])
            told.append(f"{name}: " + ", ".join(f"{m} {numbers[m]:.3f}" for m in ranked))
        if any(r["machine"] == "ocsvm" for r in fits):
            every = {
                m: float(np.mean([v for k in PLANTED for v in _values(study, "ocsvm", k, "auc", m)])) for m in METHODS
            }
            told.append(
                "all three: " + ", ".join(f"{m} {every[m]:.3f}" for m in sorted(every, key=lambda m: -every[m]))
            )
            words.append("One-class SVM, mean AUC of the planted pixels. " + ". ".join(told) + ".")
        sharp = gaps(study, "auc", "squared difference to the nearest", tuple(PLANTED))
        near = [abs(g.mean) for (m, _), g in sharp.items() if m == "kde sharp"]
        soft = [abs(g.mean) for (m, _), g in sharp.items() if m != "kde sharp"]
        if near and soft:
            slopes = gaps(study, "auc", "sensitivity", tuple(PLANTED)).values()
            words.append(
                "The undivided rule is the mean of squared differences to the training pictures, weighted by their "
                "share in the kernel sum; sensitivity, here the squared slope of the outlyingness itself, is that "
                "without the spread of those pictures around their weighted mean. So the two rank alike (largest "
                f"difference in AUC {max(abs(g.mean) for g in slopes):.3f}), but only relevance adds up to the "
                "outlyingness. With the sharp bandwidth few pictures have all of the weight: relevance and the squared "
                f"difference to the nearest differ by at most {max(near):.3f}, with the authors' stiffness by up to "
                f"{max(soft):.3f}."
            )
    if count:
        words.append(
            f"Relevance by the undivided rule is ahead of every control in {won} of {count} settings of machine, "
            "kind and measure."
        )
    figures = {"curves": _curves(study)}
    pictures = _pictures(study)
    if pictures is not None:
        figures = {"pictures": pictures, **figures}
    summary = _summary(study, won, lost, count)
    return Report(words, tables, figures, _claims(study), wins, losses, summary)
