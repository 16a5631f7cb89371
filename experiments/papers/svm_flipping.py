"""Support vector machines and nearest neighbours under flipping: which columns decide, by every rule and control.

The protocol of Bley et al. 2025 (arXiv 2508.03913), as their code has it: of
each test row the most relevant columns are removed first (for a negative
prediction the order is reversed), removed values are drawn from a Gaussian
kernel density of the training rows conditional on the columns that are kept,
and the curve of sign x predicted label is tracked; its area divided by that of
the constant start is the number: lower is better.

Hyperparameters are chosen by cross-validation on the training rows, eta of the
hybrid rule by the paper's formula from gamma on the training rows; nothing is
chosen on test rows.

For nearest neighbours the released class averages the ranks 1 to k of both
classes, which smooths g and gives up its sign; ours is the exact vote. Both are
here.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments import data as sets
from experiments.experiment import Experiment, Report
from experiments.tables import table

if TYPE_CHECKING:
    from experiments.study import Study
    from neuralize import NeuralizedModel

__all__ = [
    "AVERAGED",
    "CONTROLS",
    "EXPERIMENT",
    "IN_PAPER",
    "METHODS",
    "MODELS",
    "RULES",
    "SHAP",
    "Split",
    "averaged_ranks",
    "integrated_gradients",
    "relevances",
    "slope_of_decision",
    "split",
]

Floats = NDArray[np.float64]

MODELS = {"svc": "SVC, Gaussian kernel", "knn": "k nearest neighbours"}
RULES = ("GI", "midpoint", "hybrid")
AVERAGED = tuple(f"{rule}, averaged ranks" for rule in RULES)
CONTROLS = (
    "gradient x input",
    "integrated gradients of f",
    "integrated gradients of g",
    "sensitivity",
    "occlusion",
    "training variance",
    "centroid difference",
    "random",
)
SHAP = "SHAP, permutations"
METHODS = (*RULES, *AVERAGED, *CONTROLS)
PIXELS = ("digits 4v9", "MNIST 4v9")
IN_PAPER = ("breast cancer", "red wine", "MNIST 4v9")


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test rows of two classes in common units: centred, median squared distance of training pairs 1."""

    train: Floats
    labels: NDArray[np.int64]
    test: Floats
    truth: NDArray[np.int64]


def _pictures(name: str, data: Path | None) -> tuple[Floats, NDArray[np.int64]]:
    if name == "MNIST 4v9":
        pictures, digit = sets.mnist(sets.folder(data), "train")
        kept = np.flatnonzero((digit == 4) | (digit == 9))[:4000]
        return pictures[kept].reshape(len(kept), -1) / 255.0, (digit[kept] == 9).astype(np.int64)
    found = table("digits", data, standardise=False)
    kept = np.flatnonzero((found.y == 4) | (found.y == 9))
    return found.X[kept], (found.y[kept] == 9).astype(np.int64)


def _rows(name: str, data: Path | None) -> tuple[Floats, NDArray[np.int64]]:
    """Raw rows of a table and one of two classes for each."""
    if name in PIXELS:
        return _pictures(name, data)
    found = table({"wine 2 v rest": "wine"}.get(name, name), data, standardise=False)
    if name == "wine 2 v rest":
        return found.X, (found.y == 1).astype(np.int64)
    if name == "red wine":  # quality, from 3 to 8: six and more is good
        return found.X, (np.array([int(float(c)) for c in found.classes])[found.y] >= 6).astype(np.int64)
    return found.X, found.y


def split(name: str, data: Path | None, seed: int, rows: Mapping[str, int]) -> Split:
    """Rows drawn with a seed, both classes in their proportion; units from the training rows alone.

    Parameters
    ----------
    name : str
    data : path, optional
    seed : int
    rows : mapping
        "train" at most, "test".

    Returns
    -------
    Split
    """
    from scipy.spatial.distance import pdist
    from sklearn.model_selection import train_test_split

    X, y = _rows(name, data)
    train, test = train_test_split(np.arange(len(X)), test_size=rows["test"], stratify=y, random_state=seed)
    if len(train) > rows["train"]:
        train, _ = train_test_split(train, train_size=rows["train"], stratify=y[train], random_state=seed)
    centre, unit = X[train].mean(0), X[train].std(0)
    # pixels have one unit already, and some hardly vary
    unit = np.ones_like(unit) if name in PIXELS else np.where(unit > 0, unit, 1.0)
    Z = (X - centre) / unit
    Z = Z / math.sqrt(float(np.median(pdist(Z[train], "sqeuclidean"))))
    return Split(Z[train], y[train], Z[test], y[test])


def fitted(model: str, part: Split, seed: int, grid: Mapping[str, Sequence[float]]) -> tuple[Any, dict[str, float]]:
    """The machine with the best balanced accuracy in three folds of the training rows, and its settings."""
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    if model == "svc":
        machine, choices = SVC(kernel="rbf"), {"C": list(grid["C"]), "gamma": list(grid["gamma"])}
    else:
        most = 2 * len(part.train) // 3
        machine, choices = KNeighborsClassifier(), {"n_neighbors": [int(k) for k in grid["k"] if k < most]}
    folds = StratifiedKFold(3, shuffle=True, random_state=seed)
    search = GridSearchCV(machine, choices, scoring="balanced_accuracy", cv=folds).fit(part.train, part.labels)
    return search.best_estimator_, {k: float(v) for k, v in search.best_params_.items()}


def slope_of_decision(machine: Any, X: Floats) -> Floats:
    """Gradient (N, D) of the decision function of a fitted Gaussian SVC whose gamma is a number."""
    points, dual, gamma = machine.support_vectors_, machine.dual_coef_[0], float(machine.gamma)
    distances = (X**2).sum(1)[:, None] + (points**2).sum(1) - 2 * X @ points.T
    weights = dual * np.exp(-gamma * np.maximum(distances, 0))
    return np.asarray(2 * gamma * (weights @ points - weights.sum(1)[:, None] * X))


def integrated_gradients(slope: Callable[[Floats], Floats], X: Floats, steps: int = 32) -> Floats:
    """From the origin, the mean of the training rows, to each row; midpoints of equal steps."""
    total = np.zeros_like(X)
    for k in range(steps):
        total += slope(X * ((k + 0.5) / steps))
    return X * total / steps


def averaged_ranks(part: Split, k: int, eta: float) -> tuple[dict[str, Floats], Floats]:
    """The rules of the released class for neighbours, towards the second class, and its g (N,).

    g is the mean over the k nearest rows of each class of the squared distances to the first minus those to the
    second: kappa = (k - 1) / 2 of that class, for odd k.
    """
    from scipy.spatial.distance import cdist

    X = part.test
    means, squares, distances = [], [], []
    for label in (0, 1):
        points = part.train[part.labels == label]
        d = cdist(X, points, "sqeuclidean")
        near = np.argsort(d, axis=1, kind="stable")[:, :k]
        means.append(points[near].mean(1))
        squares.append(((X[:, None] - points[near]) ** 2).mean(1))
        distances.append(np.take_along_axis(d, near, 1).mean(1))
    gi, midpoint = 2 * X * (means[1] - means[0]), squares[0] - squares[1]
    values = dict(zip(AVERAGED, (gi, midpoint, (1 - eta) * gi + eta * midpoint), strict=True))
    return values, distances[0] - distances[1]


def relevances(
    machine: Any, net: NeuralizedModel, part: Split, seed: int, eta: float
) -> tuple[dict[str, Floats], dict[str, float]]:
    """All methods on the test rows, towards the second class; and what was measured on the way.

    Unsigned methods take the sign of the prediction, so that reversing the
    order of negative rows leaves their order as it is.
    """
    from neuralize import CoverageWarning
    from neuralize.evaluation import gradient, occlusion, random_values

    X, positive = part.test, net.labels[1]
    measured: dict[str, float] = {}

    def g(rows: Floats) -> Floats:
        return np.asarray(net(rows).detach().numpy()[:, 1])

    def slope_of_g(rows: Floats) -> Floats:
        return gradient(net, rows, target=positive)

    found: dict[str, Floats] = {}
    errors, start = [], time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        for name in ("gi", "midpoint", "hybrid"):
            ex = net.explain(X, target=positive, rule=name)
            found["GI" if name == "gi" else name] = np.asarray(ex.values)
            gap = np.abs(ex.values.sum(1) + ex.residual - ex.output)
            size = np.abs(ex.values).sum(1) + np.abs(ex.output)
            errors.append(float((gap / np.maximum(size, 1e-300)).max()))
    measured["ms_per_row"] = (time.perf_counter() - start) * 1000 / (3 * len(X))
    measured["conservation"] = max(errors)
    found["hybrid"] = (1 - eta) * found["GI"] + eta * found["midpoint"]
    svc = hasattr(machine, "dual_coef_")
    if not svc:
        smooth, total = averaged_ranks(part, machine.n_neighbors, eta)
        found |= smooth
        measured["averaged_agrees"] = float(((total > 0) == (machine.predict(X) == machine.classes_[1])).mean())
    f: Callable[[Floats], Floats] = machine.decision_function if svc else g
    slope: Callable[[Floats], Floats] = (lambda rows: slope_of_decision(machine, rows)) if svc else slope_of_g
    sign = np.where(np.asarray(machine.predict(X)) == machine.classes_[1], 1.0, -1.0)[:, None]
    at = slope(X)
    found["gradient x input"] = at * X
    if svc:
        found["integrated gradients of f"] = integrated_gradients(slope, X)
    found["integrated gradients of g"] = integrated_gradients(slope_of_g, X)
    found["sensitivity"] = at**2 * sign
    found["occlusion"] = occlusion(f, X, imputer="mean", reference=part.train)
    spread = part.train.var(0)
    if spread.max() > 1.01 * spread.min():  # all 1 where the columns were standardised
        found["training variance"] = np.broadcast_to(spread, X.shape) * sign
    means = [part.train[part.labels == k].mean(0) for k in (0, 1)]
    found["centroid difference"] = np.broadcast_to(np.abs(means[1] - means[0]), X.shape) * sign
    found["random"] = random_values(X, seed)
    return found, measured


def shap_values(f: Callable[[Floats], Floats], part: Split, rows: int, seed: int) -> Floats | None:
    """Of the first test rows, against 50 training rows; None without the package."""
    try:
        import shap
    except ImportError:
        return None
    background = part.train[np.random.default_rng(seed).permutation(len(part.train))[:50]]
    explainer = shap.PermutationExplainer(f, background, seed=seed)
    return np.asarray(explainer(part.test[:rows], max_evals=10 * (2 * part.test.shape[1] + 1), silent=True).values)


def equivalence(machine: Any, net: NeuralizedModel, part: Split, seed: int) -> dict[str, float]:
    """Rows on which network and machine decide differently: training, test, far away; gap of decision values.

    Rows with g = 0 are counted apart.
    """
    rng = np.random.default_rng(seed)
    far = part.train[rng.integers(len(part.train), size=200)] + rng.normal(0, 1, (200, part.train.shape[1]))
    rows = np.concatenate([part.train, part.test, far])
    differing = net.predict(rows) != machine.predict(rows)
    # equal distances at rank k (copies of a row) are broken arbitrarily by scikit-learn, and g is 0 there
    border = np.abs(net(rows).detach().numpy()[:, 1]) < 1e-9
    out = {
        "rows_compared": float((~border).sum()),
        "rows_differing": float((differing & ~border).sum()),
        "rows_on_border": float(border.sum()),
    }
    if hasattr(machine, "decision_function"):
        ex = net.explain(rows, target=net.labels[1], output="decision", rule="midpoint")
        wanted = machine.decision_function(rows)
        out["decision_gap"] = float(np.abs(ex.output - wanted).max() / np.abs(wanted).max())
    return out


def one(study: Study, name: str, model: str, seed: int) -> dict[str, Any]:
    """A cell: one table, one machine, one draw of the rows."""
    from neuralize import CoverageWarning, neuralize
    from neuralize.converters.kernels import eta as heuristic
    from neuralize.evaluation import ConditionalKDE, flip

    s = study.settings
    large = name == "MNIST 4v9"
    part = split(name, study.data, seed, s["pictures" if large else "rows"])
    machine, chosen = fitted(model, part, seed, s["grid"])
    net = neuralize(machine)
    # the paper's choice; of the training rows, whose typical distance is 1
    eta = heuristic(part.train, float(machine.gamma)) if model == "svc" else 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        row: dict[str, Any] = equivalence(machine, net, part, seed)
    found, measured = relevances(machine, net, part, seed, eta)
    d = part.train.shape[1]
    step = 1 if d <= 10 else 2 if d <= 50 else 28 if large else 5
    imputer = ConditionalKDE(scale=name not in PIXELS).fit(part.train)
    draws = s["pictures" if large else "rows"]["draws"]

    def label(rows: Floats) -> Floats:
        return np.where(np.asarray(machine.predict(rows)) == machine.classes_[1], 1.0, -1.0)

    def areas(values: Floats) -> tuple[Floats, Floats]:
        X = part.test[: len(values)]
        curve = flip(
            label, X, values, imputer=imputer, draws=draws, seed=seed, sign="score", steps=range(1, d + 1, step)
        )
        return curve.areas("index"), curve.mean

    results = {method: areas(values) for method, values in found.items()}
    few: dict[str, float] = {}
    if d <= 30 and s["shap_rows"]:

        def score(rows: Floats) -> Floats:
            if model == "svc":
                return np.asarray(machine.decision_function(rows))
            return np.asarray(net(rows).detach().numpy()[:, 1])

        began = time.perf_counter()
        values = shap_values(score, part, int(s["shap_rows"]), seed)
        if values is not None:
            row["shap_ms_per_row"] = (time.perf_counter() - began) * 1000 / len(values)
            few = {m: float(a[: len(values)].mean()) for m, (a, _) in results.items()}
            few[SHAP] = float(areas(values)[0].mean())
    n = len(part.test)
    return {
        "table": name,
        "model": model,
        "seed": seed,
        "columns": d,
        "train_rows": len(part.train),
        "test_rows": n,
        "draws": draws,
        "step": step,
        "chosen": chosen,
        "eta": eta,
        "accuracy": float(machine.score(part.test, part.truth)),
        **row,
        **measured,
        "areas": {m: float(a.mean()) for m, (a, _) in results.items()},
        "row_errors": {m: float(a.std(ddof=1) / math.sqrt(n)) for m, (a, _) in results.items()},
        "curves": {m: [round(float(v), 5) for v in c] for m, (_, c) in results.items()},
        "areas_of_few": few,
    }


def work(study: Study) -> None:
    """Every table, machine and draw of the rows."""
    cells = [(t, m, seed) for seed in study.seeds for t in study.settings["tables"] for m in MODELS]
    for name, model, seed in study.progress(cells, "tables"):
        study.cell(f"{name}|{model}|{seed}", partial(one, study, name, model, seed))


def report(study: Study) -> Report:
    """Tables, curves and verdicts from the rows."""
    from experiments.papers.svm_flipping_report import report as written

    return written(study)


_GRID = {
    "C": [10.0**k for k in range(-4, 5)],
    "gamma": [10.0**k for k in range(-2, 3)],
    "k": list(range(3, 28, 2)),
}
_TABLES = ["breast cancer", "red wine", "banknote", "diabetes", "german", "wine 2 v rest", "sonar", "digits 4v9"]
EXPERIMENT = Experiment(
    name="svm_flipping",
    paper="Bley et al. 2025, arXiv 2508.03913",
    question="Do the rules for support vector machines and neighbours find the columns that decide?",
    full={
        "seeds": 5,
        "tables": [*_TABLES, "MNIST 4v9"],
        "rows": {"train": 400, "test": 100, "draws": 50},
        "pictures": {"train": 400, "test": 40, "draws": 10},
        "shap_rows": 10,
        "grid": _GRID,
    },
    quick={
        "seeds": 3,
        "tables": ["breast cancer", "banknote", "wine 2 v rest"],
        "rows": {"train": 120, "test": 50, "draws": 10},
        "pictures": {"train": 100, "test": 10, "draws": 2},
        "shap_rows": 5,
        "grid": {"C": [1.0, 100.0], "gamma": [0.1, 1.0, 10.0], "k": [3, 9]},
    },
    work=work,
    report=report,
    data=("tabular", "mnist"),
)
