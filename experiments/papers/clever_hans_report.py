"""What the planted artefact shows: words, tables, figures and verdicts, from the rows alone."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from experiments.data import CIFAR10_CLASSES
from experiments.experiment import Claim, Report, Table
from experiments.spread import mean_and_error as mean
from experiments.study import Study
from lrp import plots

__all__ = ["MAIN", "report", "values"]

MAIN = "LRP epsilon_plus"
USED, HIGH = 0.1, 0.9
CONTROLS = ("gradient x input", "raw pictures", "activations", "random")
Pair = tuple[float, float | None]
Row = dict[str, Any]
QUALITATIVE = "a finding in words; no number is taken over"


def values(
    rows: Sequence[Row], case: str, share: float, maps: str, what: str, at: tuple[int, int]
) -> dict[int, float | None]:
    """By seed: a number of the groups that were found on such maps, at a pooling size and number of neighbours."""
    out: dict[int, float | None] = {}
    for row in rows:
        if (row["case"], row["share"]) == (case, share):
            for f in row["found"]:
                if f["maps"] == maps and f["neighbours"] == at[1] and f["pooling"] in (at[0], None):
                    out[row["seed"]] = f[what]
    return out


def _told(pair: Pair | None, digits: int = 2, percent: bool = False) -> str:
    if pair is None:
        return "-"
    scale, unit = (100.0, " %") if percent else (1.0, "")
    number = f"{scale * pair[0]:.{digits}f}"
    return number + (f" ± {scale * pair[1]:.{digits}f}" if pair[1] is not None else "") + unit


class _Found:
    """The rows, and what is asked of them more than once."""

    def __init__(self, study: Study) -> None:
        self.rows, self.s = study.rows, study.settings
        self.at = (int(self.s["pooling"][0]), int(self.s["neighbours"][0]))
        self.top = max(self.s["shares"])
        self.shares = sorted((v for v in self.s["shares"] if v > 0), reverse=True)
        self.names = list(dict.fromkeys(f["maps"] for row in self.rows for f in row["found"]))
        self.controls = [n for n in CONTROLS if n in self.names]

    def of(self, case: str, share: float) -> list[Row]:
        return [r for r in self.rows if (r["case"], r["share"]) == (case, share)]

    def auc(self, share: float, maps: str = MAIN, case: str = "corner", what: str = "auc") -> Pair | None:
        return mean(values(self.rows, case, share, maps, what, self.at).values())

    def use(self, share: float, what: str, case: str = "corner") -> Pair | None:
        return mean(r["use"][what] for r in self.of(case, share))

    def turned(self, share: float, case: str = "corner") -> Pair | None:
        """By how much more often other classes' pictures are taken for the class once they have the square."""
        return mean(r["use"]["turned"] - r["use"]["turned_before"] for r in self.of(case, share))

    def used(self) -> list[float]:
        """Shares at which the network uses the square."""
        gains = {share: self.turned(share) for share in self.shares}
        return [share for share, gain in gains.items() if gain is not None and gain[0] >= USED]

    def lead(self, share: float, control: str, case: str = "corner") -> Pair | None:
        """AUC of relevance minus that of a control, paired by seed."""
        mine = values(self.rows, case, share, MAIN, "auc", self.at)
        other = values(self.rows, case, share, control, "auc", self.at)
        pairs = [(mine[k], other[k]) for k in mine if k in other]
        return mean(a - b for a, b in pairs if a is not None and b is not None)

    def ranks(self, share: float) -> list[int]:
        """Of the class with the square among all classes by tau, 1 is the largest, one per seed."""
        out = []
        for row in self.of("corner", share):
            taus = {q["class"]: q["tau"] for q in row.get("ranking", ())}
            if taus:
                out.append(1 + sum(v > taus[row["class"]] for v in taus.values()))
        return out


def _surely_above(pair: Pair | None, limit: float) -> bool:
    return pair is not None and pair[1] is not None and pair[0] - 2 * pair[1] > limit


# -- verdicts ----------------------------------------------------------------
def _claims(found: _Found) -> list[Claim]:
    seeds = len({r["seed"] for r in found.rows})
    used = found.used()
    if seeds < 2 or not used:
        reason = "one seed only" if seeds < 2 else "no network here uses the square"
        text = "SpRAy on relevance maps sets apart the pictures with an artefact that the network uses"
        return [Claim(text, f"Lapuschkin et al. 2019: {QUALITATIVE}", "-", "not comparable", reason)]
    makers = (_claim_found, _claim_use, _claim_controls, _claim_tau, _claim_pointed)
    return [claim for maker in makers if (claim := maker(found, used)) is not None]


def _claim_found(found: _Found, used: list[float]) -> Claim:
    tried = [("corner", v, f"{v:.0%}") for v in found.shares] + [("anywhere", found.top, f"{found.top:.0%} anywhere")]
    tried = [t for t in tried if found.of(t[0], t[1])]
    asked = [t for t in tried if (gain := found.turned(t[1], t[0])) is not None and gain[0] >= USED]
    good = [
        (case, v, name)
        for case, v, name in asked
        if _surely_above(found.auc(v, case=case), HIGH) and (found.auc(v, MAIN, case, "precision") or (0,))[0] >= HIGH
    ]
    purity = {t: (found.auc(t[1], MAIN, t[0], "precision") or (float("nan"),))[0] for t in tried}
    told = [f"{t[2]} {_told(found.auc(t[1], case=t[0]))} (purity {purity[t]:.2f})" for t in tried]
    return Claim(
        "SpRAy on relevance maps sets apart the pictures with an artefact that the network uses",
        f"Lapuschkin et al. 2019: {QUALITATIVE}",
        f"AUC at {'; at '.join(told)}",
        "confirmed" if good == asked else "partly" if good else "refuted",
        f"used (at least {USED:.0%} more of other classes' pictures are taken for the class with the square) at "
        f"{', '.join(t[2] for t in asked)}; AUC surely above {HIGH} and purity at least {HIGH} at "
        f"{', '.join(t[2] for t in good) or 'none of them'}",
    )


def _claim_use(found: _Found, used: list[float]) -> Claim | None:
    there, unused = found.auc(found.top), found.auc(found.top, case="unused")
    if there is None or unused is None:
        return None
    low, far = unused[0] < 0.7, there[0] - 2 * (there[1] or 0) > unused[0] + 2 * (unused[1] or 0)
    return Claim(
        "It finds what the network uses, not what is in the pictures",
        f"Lapuschkin et al. 2019: {QUALITATIVE}",
        f"AUC {_told(there)} where the network learned it, {_told(unused)} for the same pictures and a network that "
        "did not",
        "confirmed" if low and far and there[0] >= HIGH else "partly" if far and there[0] >= 0.7 else "refuted",
        f"confirmed if the first is at least {HIGH}, the second below 0.7, and two standard errors of both lie between "
        "them; partly if the first is at least 0.7 and they are as far apart",
    )


def _claim_controls(found: _Found, used: list[float]) -> Claim:
    beaten = {s: [c for c in found.controls if _surely_above(found.lead(s, c), 0)] for s in used}
    pairs, won = len(used) * len(found.controls), sum(map(len, beaten.values()))
    aucs = {s: [pair[0] for c in found.controls if (pair := found.auc(s, c)) is not None] for s in used}
    told = "; ".join(
        f"{share:.0%}: AUC {_told(found.auc(share))}, of the controls {min(v):.2f} to {max(v):.2f}"
        for share, v in aucs.items()
        if v
    )
    return Claim(
        "The group shows in relevance maps, and not in simpler descriptions of the same pictures",
        "Lapuschkin et al. 2019 cluster relevance maps; controls are ours",
        told,
        "confirmed" if won == pairs else "partly" if won else "refuted",
        f"relevance is ahead, paired by seed and by more than two standard errors, in {won} of {pairs} comparisons",
    )


def _claim_tau(found: _Found, used: list[float]) -> Claim | None:
    ranks = found.ranks(found.top)
    if not ranks:
        return None
    rows = [q for r in found.of("corner", found.top) for q in r["ranking"] if q["class"] == r["class"]]
    others = [q for r in found.of("corner", found.top) for q in r["ranking"] if q["class"] != r["class"]]
    return Claim(
        "Fisher's tau ranks the class with the artefact first",
        f"Anders et al. 2022: {QUALITATIVE}",
        f"ranks {', '.join(map(str, ranks))} of 10; tau {_told(mean(q['tau'] for q in rows), 1)}, of the other classes "
        f"{_told(mean(q['tau'] for q in others), 1)} (standard errors over classes and seeds)",
        "confirmed" if set(ranks) == {1} else "partly" if np.mean(ranks) <= 3 else "refuted",
        "confirmed if it is first for every seed, partly if its mean rank is at most 3",
    )


def _claim_pointed(found: _Found, used: list[float]) -> Claim | None:
    rows = [r["pointed"] for share in used for r in found.of("corner", share)]
    shares, chance = [p["on_mean"] for p in rows], rows[0]["chance"]
    good = [p["peak"] and p["on_mean"] >= 5 * chance for p in rows]
    return Claim(
        "The neuralized k-means of pooled maps points at the square, in pixels",
        "ours",
        f"{_told(mean(shares), 0, True)} of the positive relevance of the picked clusters on {100 * chance:.1f} % of "
        f"the area; least {100 * min(shares):.0f} %",
        "confirmed" if all(good) else "partly" if any(good) else "refuted",
        f"at least five times the share of the area and the largest value in the square: {sum(good)} of {len(good)} "
        "networks that use it",
    )


def _list(shares: Sequence[float]) -> str:
    return ", ".join(f"{s:.0%}" for s in shares) or "none"


# -- words -------------------------------------------------------------------
def _words(found: _Found) -> list[str]:
    s, at, top = found.s, found.at, found.top
    seeds = sorted({r["seed"] for r in found.rows})
    names = ", ".join(CIFAR10_CLASSES[c] for c in dict.fromkeys(r["class"] for r in found.rows))
    out = [
        f"A yellow square of 6 x 6 pixels, {100 * 36 / 1024:.1f} % of the area, is put into the lower left corner of a "
        f"share of one class's training pictures ({names}; one class per seed). The third stage and the linear layer "
        f"of ResNet-20 are drawn anew and trained on 10 x {s['per_class']} pictures of CIFAR-10's test part, because "
        "the kept stages have seen the training part. All numbers are means and standard errors over "
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)}; a seed changes class, planted pictures and weights. SpRAy: "
        f"{MAIN} of the class's logit, summed over colours and over {at[0]} x {at[0]} squares, magnitudes "
        f"normalised to 1; graph of {at[1]} nearest neighbours; these settings were fixed beforehand, while the size "
        "of the square and the part that is trained anew were chosen in a pilot so that a network uses the square at "
        "50%.",
        "Use. With the square, so many more of the other classes' held-out pictures are taken for the class: "
        + "; ".join(
            f"{_told(found.turned(v), 1, True)} at a share of {v:.0%}" for v in found.shares if found.of("corner", v)
        )
        + ". The network's accuracy without it is "
        + _told(found.use(top, "accuracy"), 1, True)
        + ".",
    ]
    used = found.used()
    lost = [v for v in found.shares if (pair := found.auc(v)) is not None and pair[0] < HIGH]
    out.append(
        "Found. AUC of the picked groups: "
        + "; ".join(f"{_told(found.auc(v))} at {v:.0%}" for v in found.shares if found.of("corner", v))
        + f". Groups are picked with the planted labels, for controls alike, and noise then reaches "
        f"{_told(found.auc(top, 'random'))}. "
        + (f"It fails (AUC below {HIGH}) at {_list(lost)}" if lost else "It fails at no share that was tried")
        + (f"; the network uses the square at {_list(used)}." if used else "; the network uses it at no share.")
    )
    if found.of("anywhere", top):
        out.append(
            "A square that may lie anywhere: "
            f"{_told(found.turned(top, 'anywhere'), 1, True)} more pictures are turned, and SpRAy reaches an AUC of "
            f"{_told(found.auc(top, case='anywhere'))}: euclidean distances of maps are ruled by position."
        )
    grid = _stability(found)
    if grid:
        pairs = [a for _, a, _, _ in grid if a is not None]
        asked = [g for _, _, g, _ in grid if g is not None]
        out.append(
            f"Stability, share {top:.0%}: over {len(grid)} settings of pooling and neighbours the mean AUC lies "
            f"between {min(p[0] for p in pairs):.2f} and {max(p[0] for p in pairs):.2f}; the eigengap suggests "
            f"{min(g[0] for g in asked):.1f} to {max(g[0] for g in asked):.1f} groups in the mean, where two "
            "strategies were planted: the same strategy may be split."
        )
    ranked = [q | {"own": q["class"] == r["class"]} for r in found.of("corner", top) for q in r.get("ranking", ())]
    if ranked:
        low = min(q["p_permuted"] for q in ranked), max(q["p_permuted"] for q in ranked)
        hits = [q["p_rotated"] <= 0.05 for q in ranked if q["own"]]
        false = [q["p_rotated"] <= 0.05 for q in ranked if not q["own"]]
        bare = [q["tau"] for q in ranked if not q["own"]]
        bare += [q["tau"] for r in found.of("corner", 0.0) for q in r.get("ranking", ())]
        least = min(q["tau"] for q in ranked if q["own"])
        out.append(
            f"Tau is at least {least:.1f} for the class with the square, and at most {max(bare):.1f} for {len(bare)} "
            "classes without one, in these networks and in those that never saw it. Against permuted labels every "
            f"class is separated (p from {low[0]:.2f} to {low[1]:.2f}): the labels were cut out of the embedding, so "
            "that null says nothing. Against rows redrawn with the same mean and covariance, p <= 0.05 for the "
            f"class with the square in {sum(hits)} of {len(hits)} networks, and for {sum(false)} of {len(false)} "
            "classes without one."
        )
    pointed = [r["pointed"] for r in found.of("corner", top) if r["pointed"]["on_mean"] is not None]
    if pointed:
        each = [e for p in pointed for e in p["each"] if e["size"] and e["on_mean"] is not None]
        bare = [e["on_mean"] for e in each if e["planted"] / e["size"] < 0.5]
        out.append(
            f"Pointed at. k-means on the pooled maps, neuralized behind the pooling, puts "
            f"{_told(mean(p['on_mean'] for p in pointed), 0, True)} of the positive relevance of the picked clusters "
            f"into the square (share of the area {100 * pointed[0]['chance']:.1f} %, of the mean relevance map of all "
            f"pictures of the class, without any clusters, {_told(mean(p['map_mean'] for p in pointed), 0, True)})."
            + (
                f" So do the other clusters ({_told(mean(bare), 0, True)}): what sets them apart is that nothing is "
                "there. The explanation says what tells clusters apart, not which of them is wrong."
                if bare and np.mean(bare) > 0.2
                else ""
            )
        )
    return out


def _stability(found: _Found) -> list[tuple[str, Pair | None, Pair | None, Pair | None]]:
    """For every pooling size and number of neighbours: AUC, suggested groups, tau."""
    out: list[tuple[str, Pair | None, Pair | None, Pair | None]] = []
    for size in sorted(found.s["pooling"]):
        for k in sorted(found.s["neighbours"]):
            three = [
                mean(values(found.rows, "corner", found.top, MAIN, what, (size, k)).values())
                for what in ("auc", "suggested", "tau")
            ]
            if three[0] is not None:
                out.append((f"{size} x {size}, {k} neighbours", three[0], three[1], three[2]))
    return out


# -- tables --------------------------------------------------------------------
def _tables(found: _Found) -> dict[str, Table]:
    cases = [("corner", v, f"{v:.0%}") for v in sorted(found.s["shares"], reverse=True)]
    cases += [("anywhere", found.top, f"{found.top:.0%}, anywhere"), ("unused", found.top, f"{found.top:.0%}, unused")]
    cases = [c for c in cases if found.of(c[0], c[1])]
    asked = ("accuracy", "accuracy_class", "turned_before", "turned")
    use = [[name, *(_times(found.use(v, what, case)) for what in asked)] for case, v, name in cases]
    planted = [c for c in cases if c[1] > 0]
    aucs = [[n, *(found.auc(v, n, case) for case, v, _ in planted)] for n in found.names]
    told = ("suggested", "tau", "ari", "precision", "recall", "auc")
    groups = [[name, *(found.auc(v, MAIN, case, what) for what in told)] for case, v, name in planted]
    out = {
        "use": Table(
            "What the networks do",
            ["share", "accuracy %", "of the class %", "taken for the class %", "the same with the square %"],
            use,
            note="Held-out pictures; the last two are of the other nine classes.",
        ),
        "auc": Table("AUC of the picked groups", ["maps", *(name for _, _, name in planted)], aucs, digits=2),
        "groups": Table(
            f"Groups found on {MAIN}", ["share", "suggested", "tau", "ARI", "purity", "recall", "AUC"], groups, digits=2
        ),
        "stability": Table(
            f"Pooling and neighbours, share {found.top:.0%}",
            ["setting", "AUC", "suggested groups", "tau"],
            [list(row) for row in _stability(found)],
            digits=2,
        ),
    }
    ranked = [
        [f"{CIFAR10_CLASSES[q['class']]}{' (square)' if q['class'] == r['class'] and r['share'] else ''}",
         f"{r['share']:.0%}", r["seed"], *(q[k] for k in ("suggested", "tau", "null_mean", "p_rotated", "p_permuted"))]
        for r in found.rows
        for q in sorted(r.get("ranking", ()), key=lambda q: -q["tau"])[:3]
    ]  # fmt: skip
    if ranked:
        out["ranking"] = Table(
            "The three classes with the largest tau",
            ["class", "share", "seed", "suggested", "tau", "tau, redrawn", "p redrawn", "p permuted"],
            ranked,
            note="Share 0 %: networks trained without the square.",
            digits=2,
        )
    names = ("clusters", "auc", "on_mean", "on_rows", "map_mean", "chance")
    out["pointed"] = Table(
        "Share of positive relevance in the square, neuralized k-means",
        ["share", "clusters", "AUC", "mean of picked clusters", "row by row", "mean map, no clusters", "area"],
        [[name, *(mean(r["pointed"][k] for r in found.of(case, v)) for k in names)] for case, v, name in planted],
        digits=2,
    )
    return out


def _times(pair: Pair | None) -> Pair | None:
    return None if pair is None else (100 * pair[0], None if pair[1] is None else 100 * pair[1])


# -- figures -------------------------------------------------------------------
def _array(text: str, *shape: int) -> NDArray[np.uint8]:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


def _signed(text: str) -> NDArray[np.float64]:
    return (_array(text, 32, 32).astype(float) - 128) / 127


def _figures(found: _Found) -> dict[str, Figure]:
    out = {"shares": _curves(found)}
    seen = next((r for r in found.rows if "view" in r), None)
    if seen is not None:
        out["medoids"] = _medoids(seen["view"])
        out["tsne"] = _scatter(seen["view"])
        out["pointed"] = _pointed(seen)
    return out


def _curves(found: _Found) -> Figure:
    figure = Figure(figsize=(8.4, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.arange(len(found.shares))
    for name in found.names:
        pairs = [found.auc(v, name) for v in found.shares]
        y = [np.nan if p is None else p[0] for p in pairs]
        error = [0.0 if p is None else p[1] or 0.0 for p in pairs]
        style = "-" if name.startswith("LRP") else "--"
        left.errorbar(x, y, error, fmt=f"o{style}", ms=4, lw=2 if name == MAIN else 1, capsize=2, label=name)
    left.set(ylabel="AUC of the picked groups", ylim=(0.25, 1.05))
    gains = [found.turned(v) or (0.0, None) for v in found.shares]
    right.bar(x, [100 * g[0] for g in gains], yerr=[100 * (g[1] or 0) for g in gains])
    right.set(ylabel="more pictures of other classes\ntaken for the class with the square, %")
    for ax in (left, right):
        ax.set_xticks(x, [f"{v:.0%}" for v in found.shares])
        ax.set_xlabel("share of the class's training pictures with the square")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _medoids(view: Row) -> Figure:
    groups, each = len(view["medoids"]), max(map(len, view["medoids"]))
    labels, planted = np.array(view["labels"]), np.array(view["planted"])
    figure = Figure(figsize=(1.25 * 2 * each + 1, 1.35 * groups + 0.2), layout="constrained")
    axes = figure.subplots(groups, 2 * each, squeeze=False)
    for c in range(groups):
        for ax in axes[c]:
            ax.set_axis_off()
        for k, (picture, heat) in enumerate(zip(view["pictures"][c], view["maps"][c], strict=True)):
            axes[c, 2 * k].imshow(_array(picture, 32, 32, 3), interpolation="nearest")
            plots.heatmap(_signed(heat), axes[c, 2 * k + 1])
        text = f"group {c}: {(labels == c).sum()} pictures, {planted[labels == c].sum()} with the square"
        axes[c, 0].set_title(text, fontsize=8, loc="left")
    return figure


def _scatter(view: Row) -> Figure:
    points, labels, planted = np.array(view["tsne"]), np.array(view["labels"]), np.array(view["planted"])
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for c in np.unique(labels):
        left.scatter(*points[labels == c].T, s=12, color=f"C{c}", label=f"group {c}")
    for c, (name, color) in enumerate((("without", "0.65"), ("with the square", "goldenrod"))):
        right.scatter(*points[planted == c].T, s=12, color=color, label=name)
    for ax, title in ((left, "groups found by SpRAy"), (right, "planted")):
        ax.set_title(title, fontsize=9)
        ax.legend(fontsize=7)
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def _pointed(row: Row) -> Figure:
    figure = Figure(figsize=(3.6, 3.4), layout="constrained")
    ax = figure.subplots()
    plots.heatmap(_signed(row["view"]["explanation"]), ax)
    ax.add_patch(Rectangle((1.5, 23.5), 6, 6, fill=False, edgecolor="black", linestyle="--"))
    part = 100 * row["pointed"]["on_mean"]
    title = f"Why these pictures are in their cluster:\n{part:.0f} % of positive relevance in the square (dashed)"
    ax.set_title(title, fontsize=8)
    return figure


# -- all of it -----------------------------------------------------------------
def _summary(found: _Found) -> str:
    """For RESULTS.md; nothing before the largest share has a network that uses the square."""
    used, seeds = found.used(), len({r["seed"] for r in found.rows})
    if not used:
        return ""
    known = {c: pair for c in found.controls if (pair := found.auc(used[0], c)) is not None}
    best = max(known, key=lambda c: known[c][0], default="")
    out = [
        "A yellow square is put into the corner of a share of one class's training pictures (CIFAR-10, ResNet-20 "
        "with its last stage trained anew); the paper finds in words that SpRAy, the spectral clustering of relevance "
        "maps, sets such pictures apart.",
        f"The network uses the square at a share of {_list(used)}; there the area under the ROC curve is "
        f"{' and '.join(_told(found.auc(v)) for v in used)}"
        + (f" (best control at {used[0]:.0%}, {best}: {_told(known[best])})." if best else "."),
    ]
    rest = [(v, pair) for v in found.shares if v not in used and (pair := found.auc(v)) is not None]
    more = [f"{_told(pair)} at {v:.0%}" for v, pair in rest]
    if (apart := found.auc(found.top, case="anywhere")) is not None:
        more.append(f"{_told(apart)} where the square may lie anywhere")
    if (unused := found.auc(found.top, case="unused")) is not None:
        more.append(f"{_told(unused)} for a network that did not learn the square")
    out += [f"In other settings it is {', '.join(more)}."] if more else []
    part = mean(r["pointed"]["on_mean"] for v in used for r in found.of("corner", v))
    out.append(
        f"A clustering of the maps, explained in turn, puts {_told(part, 0, True)} of its positive relevance on the "
        f"square. All of it is over {seeds} seed{'s' * (seeds != 1)}, and groups were picked with the planted labels."
    )
    return " ".join(out)


def report(study: Study) -> Report:
    """From the rows of a run, finished or not."""
    found = _Found(study)
    won, lost = [], []
    for case, share in [("corner", v) for v in found.shares] + [("anywhere", found.top)]:
        if found.auc(share, case=case) is None:
            continue
        behind = [c for c in found.controls if not _surely_above(found.lead(share, c, case), 0)]
        text = f"at {share:.0%}{' anywhere' * (case != 'corner')} {_told(found.auc(share, case=case))}"
        if behind:
            lost.append(f"{text} ({', '.join(f'{c} {_told(found.auc(share, c, case))}' for c in behind)})")
        else:
            best = max((pair[0], c) for c in found.controls if (pair := found.auc(share, c, case)) is not None)[1]
            won.append(f"{text} (best control, {best}: {_told(found.auc(share, best, case))})")
    text = "AUC of SpRAy on relevance maps by share of the class with the square"
    wins = [f"{text}, where it is surely above every control, {'; '.join(won)}"] if won else []
    losses = [f"{text}, where it is not surely above the controls named, {'; '.join(lost)}"] if lost else []
    return Report(_words(found), _tables(found), _figures(found), _claims(found), wins, losses, _summary(found))
