"""Tables, figures and verdicts of the clusters of texts, from the rows of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.experiment import Claim, Report, Table
from experiments.papers.svm_flipping_report import RULE, Paired, judge, mean_and_error, paired
from experiments.papers.text_clusters import CONTROLS, EXCHANGED, LISTS, METHODS, REMOVALS, RULES, STEPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.study import Study

__all__ = ["gap", "report"]

CLAIMED = ("gradient x input", "occlusion by the mean", "centroid weight", "random")
CHANGES = {**REMOVALS, EXCHANGED: "columns exchanged for another text's"}

NOT_HELD = "on 20 newsgroups, by notes that were not checked; no score at hand"


def _areas(rows: Sequence[dict[str, Any]], method: str, removal: str, order: str = "most") -> list[float]:
    key = removal if removal == EXCHANGED else f"{removal} {order}"
    return [r["flipping"][method][key]["area"] for r in rows]


def _gains(rows: Sequence[dict[str, Any]], method: str, removal: str) -> list[float]:
    """Area of least minus area of most relevant first."""
    least, most = (_areas(rows, method, removal, order) for order in ("least", "most"))
    return [a - b for a, b in zip(least, most, strict=True)]


def gap(rows: Sequence[dict[str, Any]], other: str, removal: str, ours: str = RULES[0]) -> Paired:
    """Area of relevance minus that of another method, most relevant first, paired over the seeds."""
    return paired(_areas(rows, ours, removal), _areas(rows, other, removal))


def _claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    if not rows:
        return []
    differing, compared = (sum(r[k] for r in rows) for k in ("rows_differing", "rows_compared"))
    lost = max(r["conservation"] for r in rows)
    out = [
        Claim(
            "The network puts every text where the pipeline of TF-IDF and k-means does",
            "the same decisions (Kauffmann et al. 2024)",
            f"{differing} of {compared:,} texts differ",
            "confirmed" if not differing else "refuted",
            "all texts of the corpus, from sparse counts; confirmed if none differs",
        ),
        Claim(
            "Relevances of the words add up to the logit",
            "conserved by the midpoint rule, without a rest for a text's own cluster",
            f"largest gap {lost:.0e} of the largest logit; sparse values keep {rows[0]['kept']:.0f} words per text, "
            "and what the others carry is a named part of the rest",
            "confirmed" if lost < 1e-9 else "refuted",
            "sparse and full values, both rules; confirmed below 1e-9",
        ),
    ]
    for other in CLAIMED:
        for text, changes in (
            ("Deleting words by relevance takes a text out of its cluster sooner than by", tuple(REMOVALS)),
            ("Exchanging columns by relevance takes a text out of its cluster sooner than by", (EXCHANGED,)),
        ):
            found = {change: gap(rows, other, change) for change in changes}
            told = "; ".join(f"{CHANGES[change]}: {g}" for change, g in found.items())
            out.append(
                Claim(
                    f"{text} {other}",
                    NOT_HELD,
                    f"area of LRP minus {other}, {told}",
                    judge([g.state for g in found.values()]),
                    f"{len(rows)} splits, {RULE}",
                )
            )
    better = paired([r["f1"][LISTS[0]] for r in rows], [r["f1"]["centroid weight"] for r in rows])
    out.append(
        Claim(
            "The words of largest mean relevance, where present, tell a cluster better than the largest weights",
            "no published number",
            f"mean F1 of ten words per cluster, LRP minus centroid weight: {better}",
            judge([better.state], "above"),
            f"F1 of 'has the word' against 'is in the cluster' on texts that gave no relevance, {RULE}",
        )
    )
    return out


def _against_controls(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    wins, losses = [], []
    for removal, name in CHANGES.items():
        found = {c: gap(rows, c, removal) for c in CONTROLS} if rows else {}
        if not found or any(g.state == "unknown" for g in found.values()):
            continue
        nearest = max(found, key=lambda c: found[c].mean)
        text = f"Words, {name}: LRP against the best control, {nearest}, {found[nearest]} in area"
        behind = [c for c, g in found.items() if g.state == "above"]
        level = [c for c, g in found.items() if g.state == "level"]
        if not behind and not level:
            wins.append(text)
        else:
            told = [f"behind {', '.join(behind)}"] if behind else []
            told += [f"not told apart from {', '.join(level)}"] if level else []
            losses.append(f"{text}; {'; '.join(told)}")
    return wins, losses


def _tables(rows: Sequence[dict[str, Any]]) -> dict[str, Table]:
    out = {}
    columns = ["method"]
    for name in REMOVALS.values():
        columns += [f"area, {name}", f"gain, {name}"]
    columns.append("area, columns exchanged")
    columns.append("still in the cluster without a fifth of the words, %")
    body = []
    for method in METHODS if rows else ():
        line: list[Any] = [method]
        for removal in REMOVALS:
            line += [mean_and_error(_areas(rows, method, removal)), mean_and_error(_gains(rows, method, removal))]
        stays = [100 * r["flipping"][method]["deleted most"]["stays"][4] for r in rows]
        body.append([*line, mean_and_error(_areas(rows, method, EXCHANGED)), mean_and_error(stays)])
    out["flipping"] = Table(
        "Deleting words",
        columns,
        body,
        "Area under the curve of the mean logit over its start, up to half of a text's words, most relevant first "
        "(lower is better); gain: area of least relevant first minus it (higher is better). Mean and standard error "
        "over the splits. Where a word's value is set to 0 and the others are kept, f is piecewise linear and "
        "gradient x input is just what removal changes, as long as the nearest competitor stays the same. Exchanged: "
        f"{', '.join(map(str, STEPS))} columns, whether the text has the word or not, take the values of a random "
        "training text; these points count alike.",
        digits=3,
    )  # fmt: skip
    lists = []
    if rows:
        for told in rows[0]["clusters"]:
            lists.append(
                [
                    told["cluster"],
                    told["topic"],
                    100 * told["purity"],
                    *(", ".join(w for w, _ in told[n]) for n in LISTS),
                ]
            )
    out["words"] = Table(
        "The ten words of every cluster, first split",
        ["cluster", "most frequent topic", "of its texts, %", *(f"by {n}" for n in LISTS)],
        lists,
        "Means over the held-out texts of the cluster, of relevance first where the text has the word, then wherever; "
        "the weights of its centre.",
        digits=0,
    )
    out["lists"] = Table(
        "How well ten words tell a cluster",
        ["list", "mean F1", "words shared with the first, of ten"],
        [
            [
                name,
                mean_and_error([r["f1"][name] for r in rows]),
                None if name == LISTS[0] else mean_and_error([r["shared"][name] for r in rows]),
            ]
            for name in (LISTS if rows else ())
        ],
        "F1 of 'has the word' against 'is in the cluster', mean over words and clusters, on the training texts.",
        digits=3,
    )
    return out


def _curves(rows: Sequence[dict[str, Any]], shares: Sequence[float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    colours = (
        "#c0392b",
        "#e67e22",
        "#2980b9",
        "#7f8c8d",
        "#b7950b",
        "#16a085",
        "#8e44ad",
        "#34495e",
        "#d35400",
        "#27ae60",
        "#2c3e50",
    )
    for ax, (removal, name) in zip(axes, CHANGES.items(), strict=True):
        whole = removal == EXCHANGED
        for method, colour in zip(METHODS, colours, strict=True):
            if rows:
                key = removal if whole else f"{removal} most"
                mean = np.mean([r["flipping"][method][key]["curve"] for r in rows], 0)
                at = list(range(len(mean))) if whole else [0, *(100 * s for s in shares)]
                ax.plot(at, mean, color=colour, ls="--" if method == "random" else "-", lw=1.3, label=method)
        ax.axhline(0, color="0.85", lw=0.8, zorder=0)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("columns exchanged" if whole else "words removed, % of the text's", fontsize=8)
        if whole:
            ax.set_xticks(range(len(STEPS) + 1), ["0", *map(str, STEPS)])
        ax.tick_params(labelsize=8)
    axes[0].set_ylabel("mean logit / start", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _bars(rows: Sequence[dict[str, Any]]) -> Figure | None:
    from matplotlib.figure import Figure

    if not rows:
        return None
    clusters = rows[0]["clusters"]
    across = 4
    down = -(-len(clusters) // across)
    figure = Figure(figsize=(11, 2.2 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, told in zip(axes, clusters, strict=False):
        words = told[LISTS[0]][:7][::-1]
        in_centre = {w for w, _ in told["centroid weight"]}
        colours = ["#c0392b" if w in in_centre else "#e8a598" for w, _ in words]
        ax.barh(range(len(words)), [v for _, v in words], color=colours)
        ax.set_yticks(range(len(words)), [w for w, _ in words], fontsize=7)
        ax.set_xticks([])
        ax.set_title(f"{told['topic']} ({100 * told['purity']:.0f} %)", fontsize=8)
    for ax in axes[len(clusters) :]:
        ax.set_axis_off()
    figure.suptitle(
        "Mean relevance of words where present, by cluster and its commonest topic; pale: not among the centre's ten",
        fontsize=9,
    )
    return figure


def report(study: Study) -> Report:
    """Tables, figures and verdicts from the rows."""
    rows, s = [r for r in study.rows if "flipping" in r], study.settings
    tables, (wins, losses) = _tables(rows), _against_controls(rows)
    words = []
    if rows:
        first = rows[0]
        words.append(
            f"{first['texts']:,} docstrings of {len(s['topics'])} parts of installed packages "
            f"({', '.join(f'{n} {k}' for n, k in first['per_topic'].items())}), {first['words']:,} words, "
            f"{first['words_per_text']:.0f} of them in a text; names of the packages are left out. This stands in for "
            "newsgroups, which are not at hand: the texts are what the installed versions hold (digest "
            f"{first['digest']}), their topics the places they come from. k-means with {s['clusters']} clusters on "
            f"TF-IDF, {s['seeds']} splits; adjusted Rand index of held-out texts and topics "
            f"{_plain(mean_and_error([r['adjusted_rand'] for r in rows]))}. {s['judged']} held-out texts of each split "
            "lose their words; nothing is fitted again, and nothing was tuned."
        )
        shown = {m: mean_and_error(_areas(rows, m, "deleted"))[0] for m in METHODS}
        words.append(
            "Area when words are deleted: "
            + ", ".join(f"{m} {v:.3f}" for m, v in sorted(shown.items(), key=_second))
            + "."
        )
        absent = 100 * float(np.mean([r["absent_share"] for r in rows]))
        words.append(
            f"{absent:.0f} % of the magnitude of relevance lies on words that a text does not have: their absence "
            "speaks for the cluster or against it. Deleting words can not test that part, and gradient x input has "
            f"none of it. When columns are exchanged, LRP has {_plain(mean_and_error(_areas(rows, 'LRP', EXCHANGED)))} "
            f"in area, gradient x input {_plain(mean_and_error(_areas(rows, 'gradient x input', EXCHANGED)))}, random "
            f"{_plain(mean_and_error(_areas(rows, 'random', EXCHANGED)))}, and the two controls that see absent words, "
            f"too: occlusion by the mean {_plain(mean_and_error(_areas(rows, 'occlusion by the mean', EXCHANGED)))}, "
            "gradient x (input - mean) "
            f"{_plain(mean_and_error(_areas(rows, 'gradient x (input - mean)', EXCHANGED)))}. A text takes "
            f"{np.mean([r['sparse_ms'] for r in rows]):.2f} ms with the 32 largest values kept as sparse "
            f"rows, {np.mean([r['dense_ms'] for r in rows]):.2f} ms with all."
        )  # fmt: skip
    figures = {"curves": _curves(rows, s["shares"])}
    bars = _bars(rows)
    if bars is not None:
        figures = {"words": bars, **figures}
    return Report(words, tables, figures, _claims(rows), wins, losses, _summary(rows, s))


def _summary(rows: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> str:
    """For RESULTS.md."""
    if not rows:
        return ""
    out = [
        f"{rows[0]['texts']:,} documentation texts, which stand in for 20 newsgroups, are put into "
        f"{settings['clusters']} clusters by k-means on TF-IDF, and the network that decides alike is explained word "
        "by word; the paper claims that its relevance (LRP) names the words that make a text belong to its cluster."
    ]
    for change, text in (
        ("deleted", "Up to half of a text's words are deleted in the order of an explanation: the logit that is left, "
         "as an area (lower is better), is"),
        (EXCHANGED, "Where columns, of words that the text has or lacks, take the values of another text, it is"),
    ):  # fmt: skip
        best = min(CONTROLS, key=lambda c: float(np.mean(_areas(rows, c, change))))
        states = [gap(rows, c, change).state for c in CONTROLS]
        ours, theirs, chance = (_plain(mean_and_error(_areas(rows, m, change))) for m in (RULES[0], best, "random"))
        out.append(f"{text} {ours} by LRP, {theirs} by {best}, the best control, and {chance} in random order")
        if "unknown" not in states:
            out[-1] += (
                f" (LRP ahead of {states.count('below')}, behind {states.count('above')} of {len(states)} controls)"
            )
        out[-1] += "."
    absent = 100 * float(np.mean([r["absent_share"] for r in rows]))
    better = paired([r["f1"][LISTS[0]] for r in rows], [r["f1"]["centroid weight"] for r in rows])
    return " ".join([
        *out,
        f"{absent:.0f} % of relevance lies on words that a text lacks, which deleting words can not test; as lists of "
        f"ten words per cluster, those of largest relevance and of largest weight differ by {better} in F1.",
        f"Standard errors are over {len(rows)} split{'s' * (len(rows) != 1)} of one corpus.",
    ])  # fmt: skip


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def _plain(pair: tuple[float, float | None]) -> str:
    return f"{pair[0]:.2f}" + ("" if pair[1] is None else f" ± {pair[1]:.2f}")
