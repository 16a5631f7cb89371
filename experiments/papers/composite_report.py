"""Tables, figures, claims and words of the composite search, from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import t as student

from experiments.experiment import Claim, Report, Table, Verdict
from experiments.spread import mean_and_error
from experiments.study import Study

__all__ = ["DATA_FREE", "Curves", "area", "claims", "report", "top_rate", "trapezoid", "verdict"]

#: the same scores for every draw
DATA_FREE = ("weight L1",)
ARMS = {"mask": "single filters masked", "cut": "inner filters cut"}
RELEVANCE = ("optimised", "LRP epsilon", "LRP z+", "LRP gamma", "LRP alpha2beta1")
TAYLOR = ("Taylor, published", "Taylor, per sample")
CONTROLS = ("random", "weight L1", "activation", *TAYLOR, "integrated gradients")
OTHERS = ("LRP z+, bias ignored",)
KEPT = 0.95  # of the accuracy of the whole network, for Top-PR
SUFFICIENT = 0.01  # of area: what twice as many pictures may add where ten suffice
CALLED = {"optimised": "the optimised composite", "LRP epsilon": "plain epsilon"}
LEAST = 3  # units without which no difference is judged
SOURCE = "secondary notes on the paper"

Floats = NDArray[np.float64]
Unit = tuple[str, int]
Gap = tuple[float, float, int]


def area(rates: Floats, curve: Floats) -> float:
    """The mean over the rates: A_PR as the paper writes it."""
    return float(curve.mean())


def trapezoid(rates: Floats, curve: Floats) -> float:
    """The integral from 0 to the last rate: A_PR as the published code has it; 0.95 at most for rates up to 95 %."""
    return float(np.trapezoid(curve, rates))


def top_rate(rates: Floats, curve: Floats) -> float:
    """Top-PR: the highest rate that keeps 95 % of the accuracy at rate 0."""
    return float(rates[curve >= KEPT * curve[0] - 1e-12].max())


Measure = Callable[[Floats, Floats], float]
MEASURES: dict[str, Measure] = {"A_PR, mean": area, "A_PR, trapezoid": trapezoid, "Top-PR": top_rate}


class Curves:
    """Accuracy over the rates: arm, criterion and normalisation to unit (classes, draw) to curve."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], rates: Sequence[float], seeds: int) -> None:
        self.rates: Floats = np.array(rates, dtype=np.float64)
        self.held: dict[tuple[str, str, str], dict[Unit, Floats]] = {}
        for row in rows:
            if row.get("kind") != "test":
                continue
            curve = np.array(row["correct"], dtype=np.float64) / row["count"]
            at = self.held.setdefault((row["arm"], row["criterion"], row["normalisation"]), {})
            draws = range(seeds) if row["criterion"] in DATA_FREE else (row["draw"],)
            at |= {(row["task"], draw): curve for draw in draws}

    def units(self, arm: str, criterion: str, how: str = "none", few: bool = True) -> dict[Unit, Floats]:
        """Of three classes, or of all."""
        found = self.held.get((arm, criterion, how), {})
        return {unit: curve for unit, curve in sorted(found.items()) if (unit[0] != "all") == few}

    def mean(
        self, arm: str, criterion: str, how: str = "none", few: bool = True, of: str = "A_PR, mean"
    ) -> tuple[float, float | None] | None:
        """Mean and standard error over units; None without any."""
        units = self.units(arm, criterion, how, few)
        if criterion in DATA_FREE:  # the draws do not differ
            units = {(task, 0): curve for (task, _), curve in units.items()}
        return mean_and_error([MEASURES[of](self.rates, curve) for curve in units.values()])

    def gap(self, arm: str, a: tuple[str, str], b: tuple[str, str], few: bool = True, of: str = "A_PR, mean") -> Gap:
        """Mean of a minus b over the units that have both, its standard error, and their number."""
        left, right = self.units(arm, *a, few), self.units(arm, *b, few)
        return gap_of(
            [MEASURES[of](self.rates, left[u]) - MEASURES[of](self.rates, right[u]) for u in left if u in right]
        )

    def best(self, arm: str, criterion: str, few: bool = True) -> str:
        """The normalisation with the larger mean area."""
        found = {how: self.mean(arm, criterion, how, few) for how in ("none", "mean")}
        return max(found, key=lambda how: (found[how] or (-1.0, None))[0])


def gap_of(differences: Sequence[float]) -> Gap:
    """Mean, standard error (infinite for fewer than two), number."""
    found = mean_and_error(differences)
    if found is None:
        return float("nan"), float("inf"), 0
    return found[0], float("inf") if found[1] is None else found[1], len(differences)


def margin(gap: Gap) -> float:
    """Half the width of Student's 95 % interval; infinite for fewer than three units."""
    _, error, count = gap
    return error * float(student.ppf(0.975, count - 1)) if count >= LEAST else float("inf")


def verdict(gaps: Sequence[Gap]) -> Verdict:
    """Of differences that are claimed to be positive: whether their 95 % intervals are above 0, below, or hold it."""
    if not gaps or min(count for _, _, count in gaps) < LEAST:
        return "not comparable"
    up, down = [gap[0] > margin(gap) for gap in gaps], [gap[0] < -margin(gap) for gap in gaps]
    if all(up):
        return "confirmed"
    if any(up):
        return "partly"
    return "refuted" if any(down) else "null"


RULE = "by 95 % intervals: confirmed if both are above 0, partly if one is, refuted if one is below and none above"


def _words(gap: Gap) -> str:
    mean, error, count = gap
    return f"{mean:+.3f} ± {error:.3f}" if count > 1 else f"{mean:+.3f} (one unit)" if count else "no unit"


def _both(gaps: Mapping[str, Gap]) -> str:
    return "; ".join(f"{ARMS[arm]}: {_words(gap)}" for arm, gap in gaps.items())


def _pairs(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, int, str, float, float]]:
    """(arm, classes, draw, composite, area near zero first, area in signed order) of every composite tried twice."""
    areas: dict[tuple[str, str, int, str], dict[str, float]] = {}
    for row in rows:
        if row.get("kind") == "search":
            for trial in row["trials"]:
                key = (row["arm"], row["task"], row["draw"], ", ".join(trial["rules"]))
                areas.setdefault(key, {})[row["aggregate"]] = float(np.mean(trial["accuracy"]))
    return [(*k, v["abs_per_sample"], v["signed"]) for k, v in areas.items() if {"abs_per_sample", "signed"} <= set(v)]


def _sizes(study: Study, curves: Curves) -> dict[int, dict[Unit, float]]:
    """Pictures per class to areas of plain epsilon, masks."""
    out: dict[int, dict[Unit, float]] = {}
    for row in study.rows:
        if row.get("kind") == "size":
            curve = np.array(row["correct"], dtype=np.float64) / row["count"]
            out.setdefault(row["per_class"], {})[row["task"], row["draw"]] = area(curves.rates, curve)
    usual = {u: area(curves.rates, c) for u, c in curves.units("mask", "LRP epsilon").items()}
    if usual:
        out[int(study.settings["per_class"])] = usual
    common = set.intersection(*(set(own) for own in out.values())) if out else set()
    return {n: {u: own[u] for u in sorted(common)} for n, own in sorted(out.items()) if common}


def _gains(study: Study, curves: Curves) -> list[tuple[str, str, int, str, int, float, float | None]]:
    """(arm, classes, draw, rules, tried, gain over epsilon on validation, on test pictures) of every search."""
    out = []
    for row in study.rows:
        if row.get("kind") != "search" or row["aggregate"] != "abs_per_sample":
            continue
        areas = {tuple(t["rules"]): float(np.mean(t["accuracy"])) for t in row["trials"]}
        best = max(areas, key=lambda rules: areas[rules])  # of equal ones the first
        plain = areas.get(("epsilon",) * len(best))
        unit, few = (row["task"], row["draw"]), row["task"] != "all"
        a, b = (curves.units(row["arm"], n, few=few).get(unit) for n in ("optimised", "LRP epsilon"))
        test = None if a is None or b is None else area(curves.rates, a) - area(curves.rates, b)
        if plain is not None:
            out.append((row["arm"], *unit, ", ".join(best), len(areas), areas[best] - plain, test))
    return out


def claims(study: Study, curves: Curves) -> list[Claim]:
    """What the paper says, with verdicts by paired differences over (classes, draw)."""
    out = []

    def ordered(a: str, b: str, claim: str, published: str, few: bool = True) -> None:
        gaps = {arm: curves.gap(arm, (a, "none"), (b, "none"), few) for arm in ARMS}
        if any(gap[2] for gap in gaps.values()):
            number = max(gap[2] for gap in gaps.values())
            out.append(
                Claim(claim, published, _both(gaps), verdict(list(gaps.values())),
                      f"paired differences of A_PR on test pictures, {number} units (classes, draw); {RULE}")
            )  # fmt: skip

    vit = f"in tendency; ViT-B-16, MLP neurons, 3 classes, A_PR {{}} ({SOURCE})"
    both = vit.format("0.87 / 0.83; attention heads 0.85 / 0.85")
    ordered("optimised", "LRP epsilon", "A composite that is chosen for pruning is ahead of plain epsilon", both)
    ordered("LRP epsilon", "LRP z+", "Plain epsilon is ahead of plain z+", vit.format("0.83 / 0.77"))
    ordered("optimised", "random", "The chosen composite is ahead of a random order", vit.format("0.87 / 0.59"))
    claim = "The chosen composite is ahead of integrated gradients"
    ordered("optimised", "integrated gradients", claim, vit.format("0.87 / 0.70"))
    pairs = _pairs(study.rows)
    if pairs:
        share = float(np.mean([near > signed for *_, near, signed in pairs]))
        where = ", ".join(dict.fromkeys(ARMS[p[0]] for p in pairs))
        by_unit: dict[Unit, list[float]] = {}
        for _, task, draw, _, near, signed in pairs:
            by_unit.setdefault((task, draw), []).append(near - signed)
        gap = gap_of([float(np.mean(own)) for own in by_unit.values()])
        v: Verdict = (
            "confirmed" if share >= 0.9 else "partly" if share >= 0.75 else "refuted" if share <= 0.5 else "null"
        )
        out.append(
            Claim("Near-zero relevance first is better than most negative first, almost everywhere",
                  f"near zero first wins almost everywhere ({SOURCE})",
                  f"{share:.1%} of {len(pairs)} pairs (composite, classes, draw) on validation pictures, {where}; "
                  f"mean difference of area {_words(gap)} (over classes and draws)",
                  v, "confirmed from 90 % of the pairs, partly from 75 %, refuted up to 50 %")
        )  # fmt: skip
    sizes, usual = _sizes(study, curves), int(study.settings["per_class"])
    more = {n: u for n, u in sizes.items() if n > usual}
    if usual in sizes and more:
        most = max(more)
        gap = gap_of([more[most][u] - sizes[usual][u] for u in more[most] if u in sizes[usual]])
        v = (
            "not comparable" if gap[2] < LEAST
            else "confirmed" if gap[0] + margin(gap) <= SUFFICIENT
            else "refuted" if gap[0] - margin(gap) > SUFFICIENT
            else "null"
        )  # fmt: skip
        out.append(
            Claim(f"{usual} reference pictures per class suffice", f"10 per class suffice for CNNs ({SOURCE})",
                  f"{most} instead of {usual} per class change A_PR of plain epsilon by {_words(gap)}", v,
                  f"confirmed if the 95 % interval ends below {SUFFICIENT}, refuted if it begins above, else null")
        )  # fmt: skip
    tops = {arm: (curves.mean(arm, "optimised", of="Top-PR"), curves.mean(arm, "optimised", few=False, of="Top-PR"))
            for arm in ARMS}  # fmt: skip
    wide = {a: margin((0.0, w[1] or 0.0, len(curves.units(a, "optimised")))) for a, (w, _) in tops.items() if w}
    if all(few and many for few, many in tops.values()):
        ahead = [few[0] - many[0] > wide[arm] for arm, (few, many) in tops.items() if few and many]
        behind = [few[0] < many[0] for few, many in tops.values() if few and many]
        both = "; ".join(
            f"{ARMS[arm]}: Top-PR {few[0]:.0%} with three classes, {many[0]:.0%} with ten"
            for arm, (few, many) in tops.items()
            if few and many
        )
        out.append(
            Claim("A network that serves few classes can lose more than one that serves all",
                  f"ViT-B-16 MLP neurons: Top-PR 57 % with 3 classes, about 20 % with 1000 ({SOURCE})", both,
                  "confirmed" if all(ahead) else "refuted" if all(behind) else "partly" if any(ahead) else "null",
                  "optimised; confirmed if the 95 % interval with three classes is above the value with ten in "
                  "both ways, partly in one; another network than the paper's, ten classes in place of 1000")
        )  # fmt: skip
    return out


def _judged(curves: Curves) -> tuple[list[str], list[str], list[str]]:
    """Where the chosen composite and plain epsilon beat every control, where not, and how far they are."""
    wins: list[str] = []
    losses: list[str] = []
    words = []
    for arm, way in ARMS.items():
        won, lost = [], []
        for name, called in CALLED.items():
            gaps = {}
            for control in CONTROLS:
                how = curves.best(arm, control)
                gap = curves.gap(arm, (name, "none"), (control, how))
                if gap[2] >= LEAST:
                    gaps[control if how == "none" else f"{control} (layers divided by their mean)"] = gap
            if len(gaps) < len(CONTROLS):
                continue
            short = [k for k, gap in gaps.items() if gap[0] <= margin(gap)]
            closest = min(gaps, key=lambda k: gaps[k][0])
            if short:
                lost.append(f"{called} is not ahead of {', '.join(f'{k} ({_words(gaps[k])})' for k in short)}")
            else:
                won.append(f"{called} beats every control; the closest is {closest} ({_words(gaps[closest])})")
            words.append(
                f"With {way}, {called} is ahead of the controls, each under its better normalisation, by: "
                f"{'; '.join(f'{k} {_words(g)}' for k, g in gaps.items())}."
            )
        where = f"ResNet-20, three of ten CIFAR-10 classes, {way}, no training, A_PR by 95 % intervals"
        for own, texts in ((won, wins), (lost, losses)):
            texts += [f"{where}: {'; '.join(own)}."] if own else []
    return wins, losses, words


def _summary(study: Study, curves: Curves) -> str:
    """For RESULTS.md; nothing before both ways have units enough to judge."""

    def gaps(b: str) -> list[Gap]:
        hows = [curves.best(arm, b) if b in CONTROLS else "none" for arm in ARMS]
        return [curves.gap(arm, ("optimised", "none"), (b, how)) for arm, how in zip(ARMS, hows, strict=True)]

    names = ("LRP epsilon", "LRP z+", *CONTROLS)
    if min(gap[2] for name in names for gap in gaps(name)) < LEAST:
        return ""
    plain, zplus, *others = (" and ".join(map(_words, gaps(name))) for name in names)
    won = [sum(gap[0] > margin(gap) for gap in way) for way in zip(*map(gaps, CONTROLS), strict=True)]
    pairs, units = _pairs(study.rows), len(curves.units("mask", "optimised"))
    share = f"{np.mean([near > signed for *_, near, signed in pairs]):.0%} of {len(pairs)} pairs" if pairs else ""
    return (
        "ResNet-20 serves three of ten CIFAR-10 classes and loses filters without training; LRP rules for early, late "
        "and last layers are chosen on training pictures, which the paper (on ViT-B-16) finds to keep, in tendency, "
        f"more accuracy than one rule. Mean accuracy over the pruning rates ({' and '.join(ARMS.values())}) differs "
        f"from that of the epsilon rule by {plain}, from z+ by {zplus}, and from integrated gradients "
        f"by {others[-1]}. By 95 % intervals the chosen rules are ahead of {won[0]} and {won[1]} of the "
        f"{len(CONTROLS)} controls (chance, weights, activations, Taylor, integrated gradients). "
        + (f"To remove relevance near zero before the most negative is better in {share}. " if share else "")
        + f"Errors are over {units} pairs of a set of classes and a draw of pictures, of one network."
    )


def _paragraphs(study: Study, curves: Curves) -> list[str]:
    s = study.settings
    searches = [row for row in study.rows if row.get("kind") == "search" and row["aggregate"] == "abs_per_sample"]
    tried = {arm: max((len(r["trials"]) for r in searches if r["arm"] == arm), default=0) for arm in ARMS}
    out = [
        f"Networks are the trained ResNet-20 with the outputs of {len(s['classes'])} sets of three classes, which "
        "share no class and come from one shuffle; and the whole one. Reference pictures: "
        f"{s['per_class']} per class, {s['seeds']} draws. A composite has one rule for the stem and stage 1, one for "
        "stages 2 and 3, one for the classifier, of "
        f"{', '.join(s['rules'])}. It is chosen for each set and draw by the mean accuracy over "
        f"{len(s['search_rates'])} rates on {s['pictures']['validation']} training pictures per class "
        f"({s['pictures_of_all']['validation']} with ten classes) that serve nothing else, and judged once on the "
        f"first {s['pictures']['test']} test pictures per class ({s['pictures_of_all']['test']} with ten), at "
        f"{len(s['rates'])} rates. Accuracy is counted in {s['precision']}, scores are made in float32.",
        f"Two ways to take filters out. Masked, as in the paper: all 688 convolution filters, each silenced with its "
        f"batch norm, a layer may lose all; the whole grid ({tried['mask']} composites) is tried. Cut: the 336 inner "
        "filters of the blocks, which are all that can be removed one by one, at least one stays in each layer; "
        f"`compress.search` tries {tried['cut']} composites, proposed by a Gaussian process. One global order, scored "
        "once, start relevance 1 at the true class, read behind the batch norm, magnitude of each sample's sum over "
        "space unless it says signed, no layer normalisation unless it says mean; no new batch-norm statistics, no "
        f"training. Integrated gradients run from the mean colour in {s['steps']} steps and are read at the filters.",
    ]
    if units := curves.units("mask", "optimised"):
        out.append(
            f"Standard errors are over {len(units)} units (set of classes, draw of reference pictures); draws of one "
            "set share network and test pictures, so that they understate the spread over sets."
        )
    gains = [g for g in _gains(study, curves) if g[1] != "all"]
    for arm, way in ARMS.items():
        if own := [g for g in gains if g[0] == arm]:
            test = gap_of([g[6] for g in own if g[6] is not None])
            same = sum(g[3] == ", ".join(["epsilon"] * 3) for g in own)
            out.append(
                f"With {way}, the chosen composite gains {_words(gap_of([g[5] for g in own]))} over epsilon on the "
                f"pictures it was chosen on and {_words(test)} on test pictures (of other rates); the choice was "
                f"epsilon everywhere in {same} of {len(own)} searches; different composites that were chosen: "
                f"{len({g[3] for g in own})}."
            )
    told_all = []
    for arm, way in ARMS.items():
        found = {n: curves.mean(arm, n, curves.best(arm, n, False) if n in CONTROLS else "none", few=False)
                 for n in (*RELEVANCE, *CONTROLS)}  # fmt: skip
        known = {n: m[0] for n, m in found.items() if m is not None}
        if "optimised" in known:
            ranked = sorted(known, key=lambda n: -known[n])
            told_all.append(f"{way}: {', '.join(f'{n} {known[n]:.3f}' for n in ranked)}")
    if told_all:
        out.append(
            f"With all ten classes, A_PR (mean over the rates), controls under their better normalisation, "
            f"{s['draws_of_all']} draw: {'; '.join(told_all)}. One draw shows no spread, so that nothing is concluded."
        )
    checks = []
    held = curves.held.get(("mask", "LRP epsilon", "none"), {})
    for row in study.rows:
        if row.get("kind") == "check" and (row["task"], 0) in held:
            exact = np.array(row["correct"], dtype=np.float64) / row["count"]
            checks.append(abs(area(curves.rates, exact) - area(curves.rates, held[row["task"], 0])))
    if checks:
        out.append(
            f"Test passes in 32 bits instead of {s['precision']} move A_PR of plain epsilon by {max(checks):.4f} at "
            f"most ({len(checks)} curves)."
        )
    return out


def _tables(study: Study, curves: Curves) -> dict[str, Table]:
    names = (*RELEVANCE, *OTHERS, *CONTROLS, *(f"{n}, signed" for n in RELEVANCE))
    columns = ["criterion", "layers divided by", *(f"{arm}: {m}" for arm in ARMS for m in MEASURES)]
    tables = {}
    for few, key, title in ((True, "three_classes", "Three of ten classes"), (False, "all_classes", "All ten classes")):
        rows = []
        for name in names:
            for how in ("none", "mean"):
                values = [curves.mean(arm, name, how, few, m) for arm in ARMS for m in MEASURES]
                if any(v is not None for v in values):
                    rows.append([name, {"none": "nothing", "mean": "their mean"}[how], *values])
        if rows:
            note = (
                f"{'mean ± standard error over (classes, draw)' if few else 'one draw: no spread'}; A_PR as the mean "
            )
            note += "accuracy over the rates and as their integral (0.95 at most); Top-PR: the highest rate that keeps "
            note += "95 % of the accuracy."
            tables[key] = Table(title, columns, rows, note, 3)

    def paired(pairs: Iterable[tuple[list[str], tuple[str, str], tuple[str, str]]]) -> list[list[Any]]:
        lines: list[list[Any]] = []
        for label, a, b in pairs:
            both = [curves.gap(arm, a, b) for arm in ARMS]
            if any(v[2] > 1 for v in both):
                lines.append([*label, *((v[0], v[1]) if v[2] > 1 else None for v in both)])
        return lines

    divided, note = {"none": "nothing", "mean": "their mean"}, "mean ± standard error over (classes, draw)."
    gaps = paired(
        ([name, divided[how]], ("optimised", "none"), (name, how))
        for name in (*RELEVANCE[1:], *OTHERS, *CONTROLS)
        for how in divided
    )
    if gaps:
        tables["gaps"] = Table(
            "The optimised composite minus others, three classes", ["criterion", "layers divided by", *ARMS], gaps,
            f"Paired differences of A_PR (mean over the rates), {note}", 3,
        )  # fmt: skip
    if found := _gains(study, curves):
        names_ = ["way", "classes", "draw", "early, late, linear", "tried", "gain over epsilon, validation", "and test"]
        note_ = "Gains in mean accuracy over the rates of the search and of the test."
        tables["choices"] = Table("What was chosen", names_, [list(g) for g in found], note_, 3)
    signs = paired(([name], (name, "none"), (f"{name}, signed", "none")) for name in RELEVANCE)
    if signs:
        tables["signs"] = Table(
            "Near zero first minus most negative first, three classes", ["criterion", *ARMS], signs,
            f"Paired differences of A_PR on test pictures, {note}", 3,
        )  # fmt: skip
    if sizes := _sizes(study, curves):
        tables["sizes"] = Table(
            "Reference pictures per class, plain epsilon, masks", ["per class", "A_PR, mean", "units"],
            [[n, mean_and_error(list(v.values())), len(v)] for n, v in sizes.items()],
            "Larger draws hold the smaller ones.", 3,
        )  # fmt: skip
    return tables


def _curves_figure(curves: Curves) -> Figure:
    figure = Figure(figsize=(11, 4.2))
    shown = {
        "optimised": "C0", "LRP epsilon": "C1", "LRP z+": "C2", "integrated gradients": "C3",
        "Taylor, per sample": "C4", "activation": "C5", "weight L1": "C7", "random": "black",
    }  # fmt: skip
    for k, (arm, way) in enumerate(ARMS.items()):
        ax = figure.add_subplot(1, 2, k + 1)
        for name, color in shown.items():
            how = curves.best(arm, name) if name in CONTROLS else "none"
            units = list(curves.units(arm, name, how).values())
            if units:
                label = name if how == "none" else f"{name}, layers / mean"
                style = "-" if name in RELEVANCE else "--"
                ax.plot(100 * curves.rates, 100 * np.mean(units, axis=0), style, color=color, label=label, lw=1.6)
        ax.axhline(100 / 3, color="0.8", lw=0.8, zorder=0)
        ax.set(title=f"{way}, three classes", xlabel="filters taken out, %", ylabel="accuracy, %")
        if ax.lines[1:]:
            ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    return figure


def _signs_figure(pairs: Sequence[tuple[str, str, int, str, float, float]]) -> Figure:
    figure = Figure(figsize=(4.8, 4.5))
    ax = figure.add_subplot()
    for k, task in enumerate(dict.fromkeys(p[1] for p in pairs)):
        x, y = zip(*((p[5], p[4]) for p in pairs if p[1] == task), strict=True)
        ax.scatter(x, y, s=12, color=f"C{k}", label=f"classes {task}")
    ends = [min(min(p[4:]) for p in pairs) - 0.02, max(max(p[4:]) for p in pairs) + 0.02]
    ax.plot(ends, ends, color="0.7", lw=0.8, zorder=0)
    ax.set(xlabel="mean accuracy, most negative first", ylabel="mean accuracy, near zero first")
    ax.set_title("Every composite, both orders (validation)")
    ax.legend(fontsize="small")
    return figure


def _sizes_figure(sizes: Mapping[int, Mapping[Unit, float]]) -> Figure:
    figure = Figure(figsize=(4.8, 3.6))
    ax = figure.add_subplot()
    for unit in sorted({u for own in sizes.values() for u in own}):
        own = [(n, v[unit]) for n, v in sizes.items() if unit in v]
        ax.plot(*zip(*own, strict=True), color="0.8", lw=0.9)
    means = [mean_and_error(list(v.values())) for v in sizes.values()]
    ax.errorbar(list(sizes), [m[0] for m in means if m], [m[1] or 0.0 for m in means if m], color="C1", marker="o")
    ax.set_xscale("log")
    ax.set_xticks(list(sizes), [str(n) for n in sizes])
    ax.minorticks_off()
    ax.set(xlabel="reference pictures per class", ylabel="A_PR of plain epsilon, masks")
    ax.set_title("Grey: each set of classes and draw")
    return figure


def report(study: Study) -> Report:
    """What the rows say."""
    curves = Curves(study.rows, study.settings["rates"], int(study.settings["seeds"]))
    wins, losses, more = _judged(curves)
    pairs, sizes = _pairs(study.rows), _sizes(study, curves)
    figures = {"curves": _curves_figure(curves)} if curves.held else {}
    figures |= {"signs": _signs_figure(pairs)} if pairs else {}
    figures |= {"sizes": _sizes_figure(sizes)} if len(sizes) > 1 else {}
    words, tables, found = [*_paragraphs(study, curves), *more], _tables(study, curves), claims(study, curves)
    return Report(words, tables, figures, found, wins, losses, _summary(study, curves))
