"""What corrupted tables show: words, tables, a figure and verdicts, from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.experiment import Claim, Report, Table, Verdict
from experiments.spread import mean_and_error as mean
from experiments.study import Study

__all__ = ["CONTROLS", "report"]

Row = dict[str, Any]
Pair = tuple[float, float | None]
MAIN, OUTLIER = "relevance", "largest deviation"
CONTROLS = ("scaled rows", "distance to the centre", "random", OUTLIER)
HIGH = 0.9


def _found(row: Row, name: str) -> Row | None:
    return next((f for f in row["found"] if f["values"] == name), None)


def _auc(row: Row, name: str) -> float | None:
    if name == OUTLIER:
        return row.get("outlier_auc")
    found = _found(row, name)
    return None if found is None else found["auc"]


def _lead(rows: Sequence[Row], control: str) -> Pair | None:
    """AUC of relevance minus that of a control, paired by table and seed."""
    pairs = [(_auc(row, MAIN), _auc(row, control)) for row in rows]
    return mean(a - b for a, b in pairs if a is not None and b is not None)


def _surely(pair: Pair | None, sign: int) -> bool:
    return pair is not None and pair[1] is not None and sign * pair[0] - 2 * pair[1] > 0


def _told(pair: Pair | None, digits: int = 2) -> str:
    if pair is None:
        return "-"
    return f"{pair[0]:.{digits}f}" + (f" ± {pair[1]:.{digits}f}" if pair[1] is not None else "")


class _Settings:
    """Rows by kind and share, those of a real artefact alone."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [r for r in rows if r["kind"] != "none"]
        self.clean = [r for r in rows if r["kind"] == "none"]
        self.all: dict[tuple[str, float], list[Row]] = {}
        for row in self.rows:
            self.all.setdefault((row["kind"], row["share"]), []).append(row)

    def judged(self) -> dict[tuple[str, float], list[Row]]:
        """Settings with at least one cell in which there was a graph to make."""
        return {key: rows for key, rows in self.all.items() if any(r["found"] for r in rows)}

    def outcome(self) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """Where relevance is surely ahead of every control, and where some control is surely ahead of it."""
        ahead, behind = [], []
        for key, rows in self.judged().items():
            leads = [_lead(rows, c) for c in CONTROLS]
            if all(_surely(lead, 1) for lead in leads):
                ahead.append(key)
            if any(_surely(lead, -1) for lead in leads):
                behind.append(key)
        return ahead, behind


# -- verdicts ----------------------------------------------------------------
def _claims(s: _Settings) -> list[Claim]:
    judged = s.judged()
    if len({(r["table"], r["seed"]) for r in s.rows}) < 3 or not judged:
        text = "SpRAy on the relevances of a clustering finds the corrupted rows better than every control"
        return [Claim(text, "ours", "-", "not comparable", "fewer than three tables and seeds")]
    return [_claim_rows(s), _claim_column(s), _claim_own(s)]


def _claim_rows(s: _Settings) -> Claim:
    ahead, behind = s.outcome()
    total = len(s.judged())
    verdict: Verdict = "partly" if ahead else "refuted" if behind else "null"
    told = [f"{name} {_told(mean(_auc(r, name) for r in s.rows))}" for name in (MAIN, *CONTROLS)]
    return Claim(
        "SpRAy on the relevances of a clustering finds the corrupted rows better than every control",
        "ours; Lapuschkin et al. 2019 is about pictures",
        f"AUC over all settings: {', '.join(told)}",
        "confirmed" if len(ahead) == total else verdict,
        f"surely ahead of every control in {len(ahead)} of {total} settings of kind and share, surely behind one in "
        f"{len(behind)}; ahead or behind: more than two standard errors of the paired difference",
    )


def _claim_column(s: _Settings) -> Claim:
    good = [f for r in s.rows if (f := _found(r, MAIN)) is not None and f["auc"] is not None and f["auc"] >= HIGH]
    part = mean(f["named"] for f in good)
    text = "Where it finds the rows, k-means on the relevances, neuralized, names the column"
    if part is None or len(good) < 5:
        return Claim(text, "ours", "-", "not comparable", f"an AUC of {HIGH} in {len(good)} cells only")
    means = mean(f["named_by_means"] for f in good)
    verdict: Verdict = "confirmed" if part[0] >= 0.8 else "partly" if part[0] >= 0.5 else "refuted"
    return Claim(
        text,
        "ours",
        f"{_told(part)} of {len(good)} cells; by the largest standardised difference of means {_told(means)}",
        verdict,
        f"of the cells with an AUC of at least {HIGH}: confirmed from 0.8 on, partly from 0.5 on",
    )


def _claim_own(s: _Settings) -> Claim:
    own = [r for r in s.rows if r["own"]]
    text = "Where the batch has a cluster of its own, the neuralized clustering names the column"
    if len(own) < 5:
        return Claim(text, "ours", "-", "not comparable", f"{len(own)} such cells")
    part = mean(r["named_by_clustering"] for r in own)
    assert part is not None
    verdict: Verdict = "confirmed" if part[0] >= 0.9 else "partly" if part[0] >= 0.5 else "refuted"
    why = "confirmed from 0.9 on, partly from 0.5 on; no SpRAy is needed there"
    return Claim(text, "ours", f"{_told(part)} of {len(own)} cells", verdict, why)


# -- words, tables, a figure -------------------------------------------------
def _words(study: Study, s: _Settings) -> list[str]:
    settings, ahead, behind = study.settings, *s.outcome()
    own = sum(r["own"] for r in s.rows)
    used = [r for r in s.rows if r["named_by_clustering"] and r["found"]]
    other = [r for r in s.rows if not r["named_by_clustering"] and r["found"]]

    def aucs(rows: Sequence[Row]) -> str:
        return ", ".join(f"{name} {_told(mean(_auc(r, name) for r in rows))}" for name in (MAIN, *CONTROLS))

    out = [
        f"Tables: {', '.join(settings['tables'])}, at most {settings['rows']} rows each, one column at random per seed "
        f"(above zero in half of the rows). StandardScaler and KMeans, K = {settings['clusters']}, are fitted to the "
        "table with the artefact; SpRAy looks at the cluster with most of the batch. Means and standard errors are "
        "over tables and seeds. The largest deviation is a row's largest robust z-score, without any graph.",
        f"In {own} of {len(s.rows)} cells the batch has a cluster of its own, or nearly so (at least 90 % of that "
        "cluster's rows); these have no AUC.",
        f"Relevance is surely ahead of every control in {len(ahead)} of {len(s.judged())} settings, and surely behind "
        f"one in {len(behind)}.",
        f"Where the clustering uses the column (it has the largest mean relevance in the batch; {len(used)} cells), "
        f"AUC: {aucs(used)}. Where it does not ({len(other)} cells): {aucs(other)}. Relevance of a clustering speaks "
        "of what sets its clusters apart; an artefact in a column on which they agree has hardly any, and plain "
        "distances see it.",
    ]
    if s.clean:
        told = []
        for name in (MAIN, *CONTROLS[:3]):
            found = [f for r in s.clean if (f := _found(r, name)) is not None]
            told.append(f"{name} {sum(f['suggested'] > 1 for f in found)} of {len(found)}")
        out.append(f"Nothing planted: the eigengap suggests more than one group for {', '.join(told)}.")
    return out


def _tables(s: _Settings) -> dict[str, Table]:
    names = (MAIN, *CONTROLS)
    aucs, named = [], []
    for (kind, share), rows in s.all.items():
        own = sum(r["own"] for r in rows)
        aucs.append([kind, f"{share:.0%}", len(rows), own, *(mean(_auc(r, name) for r in rows) for name in names)])
        row: list[Any] = [kind, f"{share:.0%}", mean(r["named_by_clustering"] for r in rows)]
        for name in names[:3]:
            found = [f for r in rows if (f := _found(r, name)) is not None]
            row += [mean(f["named"] for f in found), mean(f["named_by_means"] for f in found)]
        named.append(row)
    groups = []
    for name in names[:4]:
        found = [f for r in s.rows if (f := _found(r, name)) is not None]
        told = ("suggested", "tau", "ari", "precision", "recall", "auc")
        groups.append([name, *(mean(f[what] for f in found) for what in told)])
    by_table = [
        [table, *(mean(_auc(r, name) for r in s.rows if r["table"] == table) for name in names)]
        for table in dict.fromkeys(r["table"] for r in s.rows)
    ]
    columns = [f"{name}, {how}" for name in names[:3] for how in ("k-means", "means")]
    return {
        "auc": Table(
            "AUC of the picked groups",
            ["artefact", "share", "cells", "own cluster", *names],
            aucs,
            note="Cells in which the batch has a cluster of its own have no AUC.",
            digits=2,
        ),
        "named": Table(
            "How often the right column is named",
            ["artefact", "share", "clustering itself", *columns],
            named,
            note="k-means: by the neuralized k-means of the values. means: by the largest standardised difference of "
            "means between the picked groups and the rest.",
            digits=2,
        ),
        "groups": Table(
            "Groups over all artefacts",
            ["values", "suggested", "tau", "ARI", "purity", "recall", "AUC"],
            groups,
            digits=2,
        ),
        "by_table": Table("AUC by table", ["table", *names], by_table, digits=2),
    }


def _figure(s: _Settings) -> Figure:
    shares = sorted({share for _, share in s.all}, reverse=True)
    kinds = list(dict.fromkeys(kind for kind, _ in s.all))
    figure = Figure(figsize=(3.4 * len(shares) + 1, 3.4), layout="constrained")
    for ax, share in zip(figure.subplots(1, len(shares), squeeze=False, sharey=True)[0], shares, strict=True):
        for k, name in enumerate((MAIN, *CONTROLS)):
            pairs = [mean(_auc(r, name) for r in s.all.get((kind, share), ())) for kind in kinds]
            y = [np.nan if p is None else p[0] for p in pairs]
            error = [0.0 if p is None else p[1] or 0.0 for p in pairs]
            x = np.arange(len(kinds)) + 0.12 * (k - 2)
            ax.errorbar(x, y, error, fmt="o", ms=6 if name == MAIN else 4, capsize=2, label=name)
        ax.axhline(0.5, color="0.8", lw=1, zorder=0)
        ax.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
        ax.set_title(f"{share:.0%} of the rows", fontsize=9)
    figure.axes[0].set_ylabel("AUC of the picked groups")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def report(study: Study) -> Report:
    """From the rows of a run, finished or not."""
    s = _Settings(study.rows)
    ahead, behind = s.outcome()
    figures = {"auc": _figure(s)} if s.judged() else {}
    losses, wins = [], []
    if ahead:
        told = _by_kind(ahead)
        rows = [row for key in ahead for row in s.all[key]]
        wins.append(f"SpRAy on relevances of k-means is surely ahead of every control: {told}; there {_aucs(rows)}")
    if behind:
        told = _by_kind(behind)
        losses.append(f"SpRAy on relevances of k-means is surely behind a control: {told}")
    rest = [key for key in s.judged() if key not in ahead and key not in behind]
    if rest:
        told = _by_kind(rest)
        losses.append(f"SpRAy on relevances of k-means is not surely ahead of every control: {told}")
    return Report(_words(study, s), _tables(s), figures, _claims(s), wins, losses, _short(study, s))


def _by_kind(keys: Sequence[tuple[str, float]]) -> str:
    """Artefacts, each with its shares of the rows."""
    shares: dict[str, list[str]] = {}
    for kind, share in keys:
        shares.setdefault(kind, []).append(f"{share:.0%}")
    return "; ".join(f"{kind} at {', '.join(told)}" for kind, told in shares.items())


def _short(study: Study, s: _Settings) -> str:
    """For RESULTS.md; nothing before some setting can be judged."""
    total = len(s.judged())
    if not total:
        return ""
    ahead, behind = s.outcome()
    used = [r for r in s.rows if r["named_by_clustering"] and r["found"]]
    other = [r for r in s.rows if not r["named_by_clustering"] and r["found"]]
    own = [r for r in s.rows if r["own"]]

    def best(rows: Sequence[Row]) -> str:
        known = {c: pair for c in CONTROLS if (pair := mean(_auc(r, c) for r in rows)) is not None}
        if not known:
            return "-"
        name = max(known, key=lambda c: known[c][0])
        return f"{_told(mean(_auc(r, MAIN) for r in rows))} against {_told(known[name])} of {_the(name)}"

    out = [
        f"One column of a table is spoilt in part of its rows, k-means is fitted to the table ({len(s.rows)} fits on "
        f"{len({r['table'] for r in s.rows})} tables), and SpRAy, the spectral clustering of relevances that was "
        "published for pictures, looks for the spoilt rows among those of one cluster.",
        f"It is ahead of every control, by more than two standard errors, in {len(ahead)} and behind one in "
        f"{len(behind)} of {total} settings of damage and share.",
    ]
    if used and other:
        pairs = [mean(_auc(r, MAIN) for r in rows) or (0.0, None) for rows in (used, other)]
        why = (
            "; relevance tells what sets clusters apart, and damage in a column on which they agree leaves little in it"
            if pairs[0][0] > pairs[1][0]
            else ""
        )
        out.append(
            "The area under the ROC curve, of relevance and of the best control, is "
            f"{best(used)} where the clustering itself uses the spoilt column, and {best(other)} where it does "
            f"not{why}."
        )
    if own:
        named = 100 * (mean(r["named_by_clustering"] for r in own) or (0.0, None))[0]
        out.append(
            f"In {len(own)} fits the spoilt rows make a cluster of their own, and its relevance names the column in "
            f"{named:.0f} % of these."
        )
    return " ".join(out)


def _the(control: str) -> str:
    """How a control is called in a sentence."""
    return {"scaled rows": "SpRAy on the scaled rows", "random": "chance", OUTLIER: "the largest deviation"}.get(
        control, f"SpRAy on the {control}"
    )


def _aucs(rows: Sequence[Row]) -> str:
    return ", ".join(f"{name} {_told(mean(_auc(r, name) for r in rows))}" for name in (MAIN, *CONTROLS))
