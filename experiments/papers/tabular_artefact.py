"""An artefact in a table: does SpRAy on the relevances of a clustering find the rows, and is the column named?

A batch, a random share of a real table's rows, gets an artefact in one column: a constant offset, a unit error (times
10) or a code for missing values. Scaler and k-means are fitted to the table as it then is. In the cluster with most of
the batch, the relevances of its rows, from the neuralized pipeline, go through :mod:`experiments.spray`, beside scaled
rows, squared distances to the centre, and noise. k-means on the same values, neuralized, names a column.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.experiment import Experiment
from experiments.papers.tabular_artefact_report import report
from experiments.spray import agreement, normalised, spray
from experiments.study import Study
from lrp.errors import DataError
from neuralize import neuralize

__all__ = ["EXPERIMENT", "KINDS", "cell", "column", "corrupted", "named", "table"]

Array = NDArray[Any]
KINDS = ("none", "offset 1 sd", "offset 2 sd", "offset 4 sd", "unit x 10", "code -1", "code 999")
OWN = 0.9


def table(name: str, data: Path | None, rows: int, seed: int) -> Array:
    """At most so many rows, drawn at random, of a real table.

    Raises
    ------
    DataError
        If it has to be in the data folder and is not.
    """
    if name == "breast cancer":
        X = load_breast_cancer().data
    elif name == "digits":
        X = load_digits().data
    else:
        path = (data or Path()) / "tabular" / "winequality-white.csv"
        if not path.is_file():
            raise DataError(
                "the table of white wines is missing",
                expected="tabular/winequality-white.csv in the data folder: UCI, 4,898 rows, no header",
                got=f"nothing at {path}",
                fix="pass --data DIR or set NEURALIZE_DATA",
            )
        X = np.loadtxt(path, delimiter=",")[:, :-1]
    order = np.random.default_rng([seed, 1]).permutation(len(X))[:rows]
    return np.asarray(X[order], float)


def column(X: Array, seed: int) -> int:
    """One at random of those that are above zero in half of the rows, so that a unit error changes something."""
    free = np.flatnonzero((X > 0).mean(0) >= 0.5)
    return int(np.random.default_rng([seed, 2]).choice(free))


def corrupted(X: Array, planted: Array, t: int, kind: str) -> Array:
    """The table with the artefact in column t of the planted rows."""
    out = X.copy()
    if kind.startswith("offset"):
        out[planted, t] += float(kind.split()[1]) * X[:, t].std()
    elif kind.startswith("unit"):
        out[planted, t] *= float(kind.split()[-1])
    elif kind.startswith("code"):
        out[planted, t] = float(kind.split()[1])
    return out


def named(rows: Array, planted: Array, clusters: int, seed: int) -> tuple[int, float]:
    """The column that the neuralized k-means of these rows names, and that column's share of positive relevance.

    Of the rows in the clusters that :func:`experiments.spray.agreement` picks; their mean relevance is largest there.
    """
    fitted = KMeans(clusters, n_init=10, random_state=seed).fit(rows)
    model = neuralize(fitted)
    labels = np.asarray(fitted.labels_)
    mine = np.isin(labels, agreement(labels, rows, planted)["picked"])
    mean = np.maximum(model.explain(rows[mine]).values.mean(0), 0)
    return int(mean.argmax()), float(mean.max() / max(mean.sum(), 1e-300))


def cell(X: Array, kind: str, share: float, seed: int, clusters: int, neighbours: int) -> dict[str, Any]:
    """All numbers of one corrupted table."""
    n, t = len(X), column(X, seed)
    planted = np.zeros(n, bool)
    planted[np.random.default_rng([seed, 3]).permutation(n)[: round(share * n)]] = True
    before = make_pipeline(StandardScaler(), KMeans(clusters, n_init=10, random_state=seed)).fit(X)
    weights = np.abs(neuralize(before).explain(X).values).mean(0)
    Y = corrupted(X, planted, t, kind)
    pipeline = make_pipeline(StandardScaler(), KMeans(clusters, n_init=10, random_state=seed)).fit(Y)
    labels = pipeline.predict(Y)
    c = int(np.bincount(labels[planted], minlength=clusters).argmax())
    mine = labels == c
    truth = planted[mine]
    values = neuralize(pipeline).explain(Y).values
    out: dict[str, Any] = {
        "kind": kind,
        "share": share,
        "seed": seed,
        "column": t,
        "importance": float((weights < weights[t]).mean()),  # rank among the columns before the artefact, 0 to 1
        "rows": int(mine.sum()),
        "planted": int(truth.sum()),
        "own": bool(truth.mean() >= OWN),
        "named_by_clustering": bool(values[mine & planted].mean(0).argmax() == t),
        "found": [],
    }
    if out["own"] or mine.sum() <= 2 * neighbours:
        return out  # the clustering itself has set the batch apart, or too few rows are left for a graph
    scaled = pipeline[:-1].transform(Y)[mine]
    centre = pipeline[-1].cluster_centers_[c]
    rng = np.random.default_rng([seed, 4])
    given = {
        "relevance": normalised(values[mine]),
        "scaled rows": scaled,
        "distance to the centre": normalised((scaled - centre) ** 2),
        "random": rng.normal(size=scaled.shape),
    }
    for name, rows in given.items():
        groups = spray(rows, neighbours, seed=seed)
        count = max(groups.suggested, 2)
        guess, part = named(rows, truth, count, seed)
        told = agreement(groups.labels, groups.embedding, truth)
        picked = np.isin(groups.labels, told["picked"])
        apart = np.abs(scaled[picked].mean(0) - scaled[~picked].mean(0)) / (scaled[~picked].std(0) + 1e-9)
        out["found"].append(
            {
                "values": name,
                "suggested": groups.suggested,
                "tau": groups.tau,
                **told,
                "named": guess == t,
                "named_share": part,
                "named_by_means": bool(apart.argmax() == t),
            }
        )
    middle = np.median(scaled, axis=0)
    spread = np.median(np.abs(scaled - middle), axis=0) + 1e-9
    out["outlier_auc"] = float(roc_auc_score(truth, (np.abs(scaled - middle) / spread).max(1)))
    return out


def work(study: Study) -> None:
    """One cell per table, kind, share and seed."""
    s = study.settings
    todo = [
        (name, kind, share, seed)
        for seed in study.seeds
        for name in s["tables"]
        for kind in s["kinds"]
        for share in (s["shares"] if kind != "none" else s["shares"][:1])
    ]
    folder = study.data if "white wine" in s["tables"] else None
    for name, kind, share, seed in study.progress(todo, "tables"):

        def compute(name: str = name, kind: str = kind, share: float = share, seed: int = seed) -> dict[str, Any]:
            X = table(name, folder, int(s["rows"]), seed)
            return {"table": name, **cell(X, kind, share, seed, int(s["clusters"]), int(s["neighbours"]))}

        study.cell(f"{name}|{kind}|{share}|{seed}", compute)


EXPERIMENT = Experiment(
    name="tabular_artefact",
    paper="Lapuschkin et al. 2019; beyond the papers",
    question="Does SpRAy on the relevances of a clustering find a corrupted batch of a table, and name the column?",
    full={
        "seeds": 5,
        "tables": ["breast cancer", "white wine", "digits"],
        "kinds": list(KINDS),
        "shares": [0.2, 0.1, 0.05],
        "rows": 500,
        "clusters": 3,
        "neighbours": 10,
    },
    quick={
        "seeds": 1,
        "tables": ["breast cancer", "white wine"],
        "kinds": ["none", "offset 4 sd", "code -1"],
        "shares": [0.2],
        "rows": 300,
        "clusters": 3,
        "neighbours": 10,
    },
    work=work,
    report=report,
    data=("tabular",),
)
