"""The same clustering of the same data, moved by a constant: which explanation of it stays as it is?

Rows, centres (members, with kernels) and what fills the gaps are moved together, so that every logit, every label and
every flipped row is the same. Whatever changes comes from the explanation. Source of the models and of the midpoint
rule: Kauffmann et al., TNNLS 35(2), 2024, arXiv 1906.07633.

>>> EXPERIMENT.name, EXPERIMENT.full["shifts"]
('translation', [0, 1, 5])
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from experiments.experiment import Claim, Experiment, Report, Table, Verdict
from experiments.papers.cluster_flipping import explained, fit, integrated_gradients, logits, split
from experiments.papers.cluster_report import STYLES, counted, difference
from experiments.spread import mean_and_error
from experiments.study import Study
from neuralize import KernelKMeans, NeuralizedModel, neuralize
from neuralize.evaluation import Marginal, Mean, gradient, random_values, srg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "METHODS", "moved", "moved_row", "report"]

Floats = NDArray[np.float64]
#: colour and marker of each method
METHODS = {
    "LRP": STYLES["LRP"],
    "gradient x input": STYLES["gradient x input"],
    "integrated gradients": STYLES["integrated gradients"],
    "integrated gradients, mean": ("tab:green", "D"),
    "sensitivity": STYLES["sensitivity"],
    "random": STYLES["random"],
}
SUMS = ("LRP", "gradient x input", "integrated gradients", "integrated gradients, mean")
IMPUTERS = ("mean", "marginal")
EXACT = 1e-9


def moved(fitted: Any, shift: float) -> BaseEstimator:
    """The same clustering of rows that were moved by a constant in every column."""
    found = copy.deepcopy(fitted)
    name = "support_vectors_" if isinstance(fitted, KernelKMeans) else "cluster_centers_"
    setattr(found, name, getattr(fitted, name) + shift)
    return found


def _methods(net: NeuralizedModel, seed: int, centre: Floats) -> dict[str, Callable[[Floats], tuple[Floats, Floats]]]:
    """By name: values (N, D) and what a method itself books apart, (N,)."""

    def relevance(X: Floats) -> tuple[Floats, Floats]:
        found = explained(net, X)
        return np.asarray(found.values), np.asarray(found.residual)

    def alone(values: Callable[[Floats], Floats]) -> Callable[[Floats], tuple[Floats, Floats]]:
        return lambda X: (values(X), np.zeros(len(X)))

    return {
        "LRP": relevance,
        "gradient x input": alone(lambda X: gradient(net, X, target=net.predict(X)) * X),
        "integrated gradients": alone(lambda X: integrated_gradients(net, X, net.predict(X))),
        "integrated gradients, mean": alone(lambda X: integrated_gradients(net, X, net.predict(X), centre)),
        "sensitivity": alone(lambda X: gradient(net, X, target=net.predict(X)) ** 2),
        "random": alone(lambda X: random_values(X, seed)),
    }


def moved_row(model: str, name: str, seed: int, settings: Mapping[str, Any], data: Any = None) -> dict[str, Any]:
    """One fit, explained at every shift."""
    part = split(name, seed, settings, data)
    fitted = fit(model, part, seed, 0)
    row: dict[str, Any] = {"table": name, "model": model, "seed": seed, "columns": part.judged.shape[1]}
    row |= {key: {} for key in ("labels_same", "logits_moved", "refit_same", "srg", "sum_error", "changed")}
    still: dict[str, Floats] = {}
    start = logits(neuralize(fitted), part.judged)
    for shift in settings["shifts"]:
        here, key = moved(fitted, shift), str(shift)
        train, X = part.train + shift, part.judged + shift
        net = neuralize(here).set_reference(train)
        found = logits(net, X)
        row["labels_same"][key] = float((net.predict(X) == fitted.predict(part.judged)).mean())
        row["logits_moved"][key] = float(np.abs(found - start).max() / np.abs(start).mean())
        again = fit(model, part._replace(train=train), seed, 0)
        row["refit_same"][key] = float((again.labels_ == fitted.labels_).mean())
        own = found.max(1)
        imputers = {"mean": Mean().fit(train), "marginal": Marginal().fit(train)}
        row["srg"][key], row["sum_error"][key], row["changed"][key] = {i: {} for i in imputers}, {}, {}
        for method, values_of in _methods(net, seed, train.mean(0)).items():
            values, rest = values_of(X)
            still.setdefault(method, values)
            row["sum_error"][key][method] = float(np.abs(values.sum(1) + rest - own).mean() / own.mean())
            change = np.abs(values - still[method]).mean() / np.abs(still[method]).mean()
            row["changed"][key][method] = float(change)
            for label, imputer in imputers.items():
                gain = srg(net, X, values, imputer=imputer, draws=int(settings["draws"]), seed=seed)
                row["srg"][key][label][method] = gain.value
    return row


def work(study: Study) -> None:
    """A cell for every model, table and seed."""
    cells = [(m, t, s) for s in study.seeds for t in study.settings["tables"] for m in study.settings["models"]]
    for model, name, seed in study.progress(cells, "fits", len(cells)):
        study.cell(
            f"{model}|{name}|{seed}",
            functools.partial(moved_row, model, name, seed, study.settings, lambda: study.data),
        )


# ------------------------------------------------------------ report


class Moved:
    """Rows by model; numbers by seed, as means over the tables."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows
        self.models = list(dict.fromkeys(r["model"] for r in rows))
        self.tables = list(dict.fromkeys(r["table"] for r in rows))
        self.shifts = list(rows[0]["changed"]) if rows else []

    def seeds(self, model: str) -> list[int]:
        """Those under which all tables are done."""
        have: dict[int, set[str]] = {}
        for r in self.rows:
            if r["model"] == model:
                have.setdefault(r["seed"], set()).add(r["table"])
        return [s for s, tables in have.items() if tables == set(self.tables)]

    def numbers(self, model: str, *path: str) -> list[float]:
        """Mean over the tables for every complete seed; `srg` is over the imputers named last, or all."""
        return [
            float(np.mean([self._one(r, path) for r in self.rows if r["model"] == model and r["seed"] == s]))
            for s in self.seeds(model)
        ]

    def table(self, model: str, table: str, *path: str) -> list[float]:
        """One table's, for every seed that has it, in their order."""
        rows = sorted((r for r in self.rows if r["model"] == model and r["table"] == table), key=lambda r: r["seed"])
        return [self._one(r, path) for r in rows]

    @staticmethod
    def _one(row: Mapping[str, Any], path: Sequence[str]) -> float:
        kind, shift, method, *imputers = path
        if kind != "srg":
            return float(row[kind][shift][method])
        return float(np.mean([row["srg"][shift][i][method] for i in imputers or IMPUTERS]))

    def worst(self, model: str, *path: str) -> float:
        """Largest over all rows."""
        return max(self._one(r, path) for r in self.rows if r["model"] == model)

    def against(self, model: str, other: str) -> dict[str, str]:
        """By table, where another method stands against LRP before anything is moved."""
        out = {}
        for t in self.tables:
            both = (self.table(model, t, "srg", self.shifts[0], m) for m in (other, "LRP"))
            out[t] = difference([a - b for a, b in zip(*both, strict=True)])[0]
        return out

    def lost(self, model: str, method: str, shift: str) -> list[str]:
        """By table, whether a method's gain at a shift is behind that without one."""
        out = []
        for t in self.tables:
            pairs = zip(
                self.table(model, t, "srg", shift, method), self.table(model, t, "srg", self.shifts[0], method),
                strict=True,
            )  # fmt: skip
            out.append(difference([a - b for a, b in pairs])[0])
        return out


def report(study: Study) -> Report:
    """From the rows of a run, finished or not."""
    found = Moved(study.rows)
    if not study.rows:
        return Report(["No row is finished."], {})
    s, far = study.settings, found.shifts[-1]
    rows = study.rows
    words = [
        f"{len(rows)} fits of {', '.join(found.models)} on {len(found.tables)} standardised tables, {s['seeds']} seeds "
        "(each draws the rows that are fitted on, the rows that are judged, and the start of the fit). Rows, centres "
        f"and reference rows were moved together by {', '.join(found.shifts)} standard deviations in every column: "
        f"labels agree on {100 * min(min(r['labels_same'].values()) for r in rows):.2f} % of the rows or more, logits "
        f"to {max(max(r['logits_moved'].values()) for r in rows):.0e} of their mean; a fit of the moved rows under the "
        f"same seed gives the same label to {100 * float(np.mean([r['refit_same'][far] for r in rows])):.1f} % of "
        "them. 'integrated gradients' start from zero, as they do by default; '..., mean' from the mean of the fitted "
        "rows, a baseline that has to be chosen anew for every origin. SRG: mean over the mean and the marginal "
        "imputer."
    ]
    pairs: dict[str, dict[str, dict[str, str]]] = {}
    for model in found.models:
        told = []
        for m in METHODS:
            ends = [mean_and_error(found.numbers(model, "srg", k, m)) for k in found.shifts]
            if all(e is not None for e in ends):
                told.append(f"{m} " + " / ".join(f"{e[0]:.2f}" for e in ends if e is not None))
        if told:
            words.append(f"{model}, SRG at {' / '.join(found.shifts)}: {'; '.join(told)}.")
        told = [
            f"{m} " + " / ".join(f"{np.mean(found.numbers(model, 'sum_error', k, m)):.2g}" for k in found.shifts)
            for m in SUMS
            if found.seeds(model)
        ]
        if told:
            words.append(
                f"{model}, mean distance of the sum of a row's values from its logit, in mean logits: "
                f"{'; '.join(told)}. LRP with its named residual, which is 0 for k-means; "
                "integrated gradients promise the difference to the logit of their baseline, not the logit."
            )
        pairs[model] = {o: found.against(model, o) for o in ("gradient x input", "integrated gradients, mean")}
        words.append(
            f"{model}, before anything is moved, by tables (paired over the fits, Student's 95 %): "
            + "; ".join(f"{o} against LRP {counted(list(w.values()))}" for o, w in pairs[model].items())
            + "."
        )
    wins, losses = [], []
    for model in found.models:
        lost = {m: found.lost(model, m, far) for m in ("LRP", "gradient x input", "integrated gradients")}
        fallen = [m for m, w in lost.items() if m != "LRP" and w.count("behind") > len(w) / 2]
        if found.worst(model, "changed", far, "LRP") < EXACT and fallen:
            wins.append(
                f"Moved data, {model}: LRP does not change; {' and '.join(fallen)} lose SRG on most tables at a shift "
                f"of {far}."
            )
        others = [m for m in METHODS if m not in ("LRP", "random") and found.worst(model, "changed", far, m) < EXACT]
        better = [
            f"{_called(o)} on {_those([t for t, x in w.items() if x == 'ahead'], len(w))}"
            for o, w in pairs[model].items()
        ]
        same = (
            f"{' and '.join(map(_called, others))} stay as they are, too" if others else "nothing else stays as it is"
        )
        losses.append(
            f"Moved data, {model}: {same}; before anything is moved, ahead of LRP are {' and '.join(better)}."
        )
    figures = {"shift": _figure(found)}
    return Report(words, _tables(found), figures, _claims(found), wins, losses, _summary(found, pairs))


def _summary(found: Moved, pairs: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """For RESULTS.md; of models with all tables of some seed."""
    still, far = found.shifts[0], found.shifts[-1]
    models = [m for m in found.models if found.seeds(m)]
    if not models:
        return ""

    def told(model: str) -> str:
        ends = {
            method: [mean_and_error(found.numbers(model, "srg", k, method)) for k in (still, far)]
            for method in ("LRP", "gradient x input", "integrated gradients")
        }
        ours, slope, path = (" to ".join(_pm(e) for e in own if e is not None) for own in ends.values())
        return f"with {model} from {ours} for LRP, {slope} for gradient x input and {path} for integrated gradients"

    worst = max(found.worst(m, "changed", far, "LRP") for m in models)
    mean = "integrated gradients, mean"
    same = max(found.worst(m, "changed", far, mean) for m in models)
    words = {m: list(pairs[m][mean].values()) for m in models}
    counts = [(m, w.count("ahead"), w.count("behind"), len(w)) for m, w in words.items()]
    behaves = "do not change either" if same < EXACT else f"change by up to {100 * same:.2g} %"
    return (
        f"All rows and centres of a clustering are moved together by {far} standard deviations in every column, which "
        "changes no label and no logit; relevance by the paper's midpoint rule should not depend, by construction, on "
        "where the origin lies. "
        f"Values of LRP change by at most {100 * worst:.0e} %. The score of an explanation (SRG: area between removing "
        f"the least and the most relevant columns first, higher is better) goes {'; '.join(told(m) for m in models)} "
        "from zero. "
        f"Integrated gradients from the mean of the data {behaves}, and before anything is moved they are ahead of LRP "
        f"on {' and '.join(f'{a} of {n} tables with {m}' for m, a, _, n in counts)}, behind it on "
        f"{' and '.join(str(b) for _, _, b, _ in counts)}."
    )


def _claims(found: Moved) -> list[Claim]:
    still, far = found.shifts[0], found.shifts[-1]
    claims = []
    for model in found.models:
        worst = found.worst(model, "changed", far, "LRP")
        books = max(found.worst(model, "sum_error", k, "LRP") for k in found.shifts)
        claims.append(
            Claim(
                f"Relevance by the midpoint rule does not depend on the origin of the data ({model})",
                "invariant and conserving by construction"
                + "; a pilot of ours (wine, one fit): SRG .831 at 0, 1 and 5, conservation error 0"
                * (model == "k-means"),
                f"values change by {worst:.1e} of their mean at most at a shift of {far}; values and residual miss the "
                f"logit by {books:.1e} of it",
                "confirmed" if max(worst, books) < EXACT else "refuted",
                "confirmed if values and sums hold to 1e-9 in every fit, in float64",
            )
        )
        for method, pilot in (
            ("gradient x input", "a pilot of ours (wine, one fit): SRG .864 / .485 / .011 at 0 / 1 / 5, "
             "conservation error .3 / 1.1 / 4.2 mean logits"),
            ("integrated gradients", "no number"),
        ):  # fmt: skip
            words = found.lost(model, method, far)
            srgs = [mean_and_error(found.numbers(model, "srg", k, method)) for k in found.shifts]
            sums = [mean_and_error(found.numbers(model, "sum_error", k, method)) for k in found.shifts]
            told: Verdict = (
                "not comparable"
                if "unknown" in words or None in srgs
                else "confirmed"
                if words.count("behind") >= 0.8 * len(words) and "ahead" not in words
                else "refuted"
                if words.count("ahead") > words.count("behind")
                else "partly"
                if words.count("behind") >= len(words) / 3
                else "null"
            )
            claims.append(
                Claim(
                    f"{method[0].upper()}{method[1:]} (from zero) gets worse when the data are moved ({model})",
                    pilot if model == "k-means" else "no number",
                    f"SRG {' / '.join('-' if v is None else _pm(v) for v in srgs)} at {' / '.join(found.shifts)}, sums "
                    f"off by {' / '.join('-' if v is None else _pm(v) for v in sums)} mean logits; worse at {far} than "
                    f"at {still} on {words.count('behind')} of {len(words)} tables",
                    told,
                    "per table Student's 95 % interval of the paired difference over the fits; confirmed if worse on "
                    "four of five tables and better on none, refuted if better more often than worse",
                )
            )
    return claims


def _called(method: str) -> str:
    return method.replace(", mean", " from the mean")


def _those(tables: Sequence[str], total: int) -> str:
    return f"all {total} tables" if total > 3 and len(tables) == total else ", ".join(tables) or "no table"


def _pm(value: tuple[float, float | None]) -> str:
    return f"{value[0]:.2f}" if value[1] is None else f"{value[0]:.2f} ± {value[1]:.2f}"


def _tables(found: Moved) -> dict[str, Table]:
    tables = {}
    for model in found.models:
        key = model.split()[0].replace("-", "")
        rows: list[list[Any]] = [
            [
                m,
                *(
                    mean_and_error(found.numbers(model, "srg", k, m, i))
                    for i in IMPUTERS
                    for k in found.shifts
                ),
                *(
                    f"{np.mean(off):.2g}" if m in SUMS and (off := found.numbers(model, "sum_error", k, m)) else None
                    for k in found.shifts
                ),
                f"{100 * found.worst(model, 'changed', found.shifts[-1], m):.1e}",
            ]
            for m in METHODS
        ]  # fmt: skip
        tables[f"shifts_{key}"] = Table(
            f"Moved data, {model}",
            [
                "method",
                *(f"SRG ({i}) at {k}" for i in IMPUTERS for k in found.shifts),
                *(f"sum off at {k}" for k in found.shifts),
                "largest change of the values, %",
            ],
            rows,
            f"Mean over {len(found.tables)} tables ± standard error over {len(found.seeds(model))} seeds. 'Sum off': "
            "mean distance of the sum of a row's values (LRP: and its residual) from its logit, in mean logits. "
            "Change: of the values at the last shift against those at the first, in per cent of their mean magnitude, "
            "the worst fit.",
            2,
        )
        tables[f"tables_{key}"] = Table(
            f"SRG by table, {model}",
            ["table", *(f"{m} at {k}" for m in SUMS for k in (found.shifts[0], found.shifts[-1]))],
            [
                [t, *(mean_and_error(found.table(model, t, "srg", k, m)) for m in SUMS
                      for k in (found.shifts[0], found.shifts[-1]))]
                for t in found.tables
            ],
            "Mean of both imputers ± standard error over the seeds.",
            2,
        )  # fmt: skip
    return tables


def _figure(found: Moved) -> Figure:
    from matplotlib.figure import Figure

    n = len(found.models)
    figure = Figure(figsize=(8.5, 3.3 * n), layout="constrained")
    x = [float(k) for k in found.shifts]
    axes = figure.subplots(n, 2, squeeze=False)
    for (left, right), model in zip(axes, found.models, strict=True):
        for ax, kind, names in ((left, "srg", METHODS), (right, "sum_error", SUMS)):
            for m in names:
                values = [mean_and_error(found.numbers(model, kind, k, m)) for k in found.shifts]
                if None in values:
                    continue
                y, e = zip(*((v[0], v[1] or 0.0) for v in values if v is not None), strict=True)
                colour, marker = METHODS[m]
                ax.errorbar(x, y, yerr=e, color=colour, marker=marker, ms=4, label=m)
            ax.axhline(0, color="0.7", lw=0.8)
            ax.set_xticks(x)
            ax.set_xlabel("shift of every column, standard deviations")
        left.set_title(model, fontsize=10)
        left.set_ylabel("SRG (higher is better)")
        right.set_title(model, fontsize=10)
        right.set_ylabel("sum of the values off the logit,\nmean logits")
    axes[0][0].legend(fontsize=6)
    return figure


EXPERIMENT = Experiment(
    name="translation",
    paper="Kauffmann et al. 2024, From clustering to cluster explanations via neural networks",
    question="Does an explanation of a clustering depend on where the origin of the data lies?",
    full={
        "seeds": 5,
        "models": ["k-means", "kernel k-means"],
        "tables": [
            "wine", "breast cancer", "wheat seeds", "glass", "sonar", "banknote", "wholesale", "penguins", "red wine",
        ],
        "shifts": [0, 1, 5],
        "rows": 30,
        "fit_rows": 1000,
        "draws": 10,
    },
    quick={
        "seeds": 3,
        "models": ["k-means"],
        "tables": ["wine", "breast cancer"],
        "shifts": [0, 1, 5],
        "rows": 20,
        "fit_rows": 200,
        "draws": 5,
    },
    work=work,
    report=report,
    data=("tabular",),
)  # fmt: skip
