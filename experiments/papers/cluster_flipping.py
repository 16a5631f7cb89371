"""Clusterings as networks: are they equivalent, does relevance conserve, and which explanation finds what counts?

Three models (k-means, kernel k-means with a Gaussian kernel, deep k-means) on small real tables and on MNIST. A seed
draws four fifths of the rows to fit a model on, and rows to judge from the rest (on MNIST from the training and the
test pictures); everything that draws is seeded with it.

Every method explains the logit of a row's own cluster, on the same rows; then columns are removed in the order of its
values, under imputers of several kinds, and the symmetric relevance gain (SRG) is the area of the curve "least
relevant first" minus that of "most relevant first". Source of the models: Kauffmann et al., TNNLS 35(2), 2024, arXiv
1906.07633; of the gain: Bluecher et al., arXiv 2401.06654.

>>> EXPERIMENT.name, EXPERIMENT.full["seeds"]
('cluster_flipping', 4)
"""

from __future__ import annotations

import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge

from experiments import data as sets
from experiments.experiment import Experiment
from experiments.papers.cluster_report import report
from experiments.study import Study
from experiments.tables import table
from neuralize import (
    CentroidHead,
    CoverageWarning,
    DeepKMeans,
    Explanation,
    KernelKMeans,
    NeuralizedModel,
    encoded,
    neuralize,
)
from neuralize.evaluation import (
    ConditionalKDE,
    Marginal,
    Mean,
    NearestMidpoint,
    OtherCluster,
    gradient,
    occlusion,
    random_values,
    srg,
)

__all__ = ["EXPERIMENT", "Split", "attributions", "fit", "integrated_gradients", "local_surrogate", "logits", "split"]

Floats = NDArray[np.float64]
GRID = np.linspace(0, 1, 11)  # shares of removed columns at which curves are kept
PICTURES = ("digits", "MNIST")  # pixels keep their common unit, 0 to 1
SHAP_WORK = 5e11  # multiplications beyond which SHAP is left out


class Split(NamedTuple):
    """Rows to fit on, rows to judge, and how many clusters to look for."""

    train: Floats
    judged: Floats
    clusters: int


def split(name: str, seed: int, settings: Mapping[str, Any], data: Any = None) -> Split:
    """The rows of one table under one seed.

    Parameters
    ----------
    name : str
        One of :data:`experiments.tables.NAMES`, or "MNIST".
    seed : int
    settings : mapping
        "rows": judged at most; "fit_rows": fitted on at most; "pictures": both, of MNIST.
    data : path or callable, optional
        The data folder.

    Returns
    -------
    Split
        Tables are standardised, pixels lie in 0 to 1. As many clusters as the table has classes, three at least:
        with two there is one competitor and nothing to share among them.
    """
    rng = np.random.default_rng(seed)
    most, fitted = int(settings["rows"]), int(settings["fit_rows"])
    folder = data() if callable(data) else data
    if name == "MNIST":
        parts = [sets.mnist(sets.folder(folder), s)[0] for s in ("train", "test")]
        picked = [p[rng.permutation(len(p))[:n]] for p, n in zip(parts, settings["pictures"], strict=True)]
        train, judged = (p.reshape(len(p), -1) / 255.0 for p in picked)
        return Split(train, judged, 10)
    found = table(name, folder, standardise=name not in PICTURES)
    X = found.X / 16.0 if name in PICTURES else found.X
    order = rng.permutation(len(X))
    cut = (4 * len(X)) // 5
    return Split(X[order[:cut][:fitted]], X[order[cut:][:most]], max(3, len(found.classes)))


def fit(model: str, part: Split, seed: int, epochs: int) -> BaseEstimator:
    """One clustering, with its defaults but for the number of clusters and the seed.

    Parameters
    ----------
    model : {"k-means", "kernel k-means", "deep k-means"}
    part : Split
    seed : int
    epochs : int
        Of deep k-means: so many of pre-training, so many together.
    """
    if model == "k-means":
        return KMeans(part.clusters, n_init=10, random_state=seed).fit(part.train)
    if model == "kernel k-means":
        return KernelKMeans(part.clusters, algorithm="full", random_state=seed).fit(part.train)
    deep = DeepKMeans(part.clusters, pretrain_epochs=epochs, epochs=epochs, random_state=seed, progress=False)
    return deep.fit(part.train)


# ------------------------------------------------------------ equivalence


def logits(net: NeuralizedModel, X: Floats) -> Floats:
    """All logits (N, K), float64, in blocks."""
    with torch.no_grad():
        return np.concatenate([net(torch.tensor(X[i : i + 4096])).numpy() for i in range(0, len(X), 4096)])


def direct_logits(fitted: Any, X: Floats) -> Floats:
    """The same from the fitted attributes alone, by the definitions and without a network."""
    if isinstance(fitted, KernelKMeans):
        gamma = float(fitted.gamma_)
        squares = ((X[:, None] - fitted.support_vectors_) ** 2).sum(2)
        s, n = np.exp(-gamma * squares) @ fitted.dual_coef_.T, fitted.centre_norms_
        # h_ck = (log(s_c + n_k / 2) - log(s_k + n_c / 2)) / gamma
        own = np.log(s[:, :, None] + n / 2)
        pairs = (own - own.transpose(0, 2, 1)) / gamma
    else:
        z = fitted.transform(X) if isinstance(fitted, DeepKMeans) else X
        d = ((z[:, None] - fitted.cluster_centers_) ** 2).sum(2)
        pairs = d[:, None, :] - d[:, :, None]  # h_ck = d_k - d_c
    itself = np.arange(pairs.shape[1])
    pairs[:, itself, itself] = np.inf
    return np.asarray(pairs.min(2))


def equivalence(fitted: Any, net: NeuralizedModel, X: Floats, explained: Explanation) -> dict[str, Any]:
    """How far network and model agree, and whether the books of an explanation of these rows balance."""
    far = np.concatenate([X, X.mean(0) + 3 * (X - X.mean(0))])
    found, expected = (
        logits(net, far),
        np.concatenate([direct_logits(fitted, far[i : i + 64]) for i in range(0, len(far), 64)]),
    )
    labels = fitted.predict(far)
    scale = float(np.abs(explained.output).mean())
    books = explained.values.sum(1) + explained.residual - explained.output
    return {
        "checked": len(far),
        "labels_agree": float((net.predict(far) == labels).mean()),
        "signs_agree": float(((found > 0) == (np.arange(found.shape[1]) == labels[:, None])).all(1).mean()),
        "logit_error": float(np.abs(found - expected).max() / np.abs(expected).mean()),
        "books_error": float(np.abs(books).max() / scale),
        "residual_share": float(np.abs(explained.residual).mean() / scale),
        "coverage": float(np.median(explained.values.sum(1) / explained.output)),
        "mean_logit": scale,
    }


# ------------------------------------------------------------ methods


def integrated_gradients(
    net: NeuralizedModel, X: Floats, target: NDArray[Any], baseline: Floats | float = 0.0, steps: int = 32
) -> Floats:
    """Mean gradient on the way from a baseline, at midpoints, times the way; (N, D).

    Sundararajan et al., ICML 2017.

    Parameters
    ----------
    net : NeuralizedModel
    X : ndarray (N, D)
    target : array (N,) of labels
    baseline : ndarray (D,) or float
    steps : int
    """
    way = X - baseline
    slopes = [gradient(net, baseline + (k + 0.5) / steps * way, target=target) for k in range(steps)]
    return np.asarray(way * np.mean(slopes, axis=0))


def local_surrogate(
    net: NeuralizedModel, X: Floats, reference: Floats, samples: int = 500, width: float = 0.25, seed: int = 0
) -> Floats:
    """Coefficients (N, D) of a linear model of the logit around each row, in the manner of LIME.

    A sample keeps each column with probability 1/2 and takes the others from a reference row; the logit of the row's
    own cluster is regressed on what was kept, by ridge regression (alpha 1) with weights ``exp(-(d / width)^2)``, d
    the cosine distance from "all kept". Ribeiro et al., KDD 2016.

    Parameters
    ----------
    net : NeuralizedModel
    X, reference : ndarray (N, D), (M, D)
    samples : int
        2 D where that is more.
    width, seed : float, int
    """
    rng = np.random.default_rng(seed)
    own = logits(net, X).argmax(1)
    values = np.empty_like(X)
    count = max(samples, 2 * X.shape[1])
    for i, x in enumerate(X):
        kept = rng.random((count, len(x))) < 0.5
        kept[0] = True
        donors = reference[rng.integers(len(reference), size=count)]
        y = logits(net, np.where(kept, x, donors))[:, own[i]]
        weights = np.exp(-(((1 - np.sqrt(kept.mean(1))) / width) ** 2))
        values[i] = Ridge(alpha=1.0).fit(kept.astype(np.float64), y, sample_weight=weights).coef_
    return values


def shapley(net: NeuralizedModel, X: Floats, reference: Floats, seed: int, background: int = 20) -> Floats:
    """Shapley values (N, D) of the own logit by the permutation explainer of shap, which must be installed.

    ``background`` reference rows stand in for what is missing; evaluations: shap's 500 per row, or one permutation
    there and back where that is more.
    """
    import shap

    rows = reference[np.random.default_rng(seed).permutation(len(reference))[:background]]
    explainer = shap.explainers.Permutation(
        functools.partial(logits, net), shap.maskers.Independent(rows, max_samples=background), seed=seed
    )
    found = explainer(X, max_evals=max(500, 2 * X.shape[1] + 1), silent=True)
    own = logits(net, X).argmax(1)
    return np.asarray(found.values[np.arange(len(X)), :, own])


def explained(net: NeuralizedModel, X: Floats, **options: Any) -> Explanation:
    """``net.explain``; how much the columns carry is counted in the row, so it needs no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        return net.explain(X, **options)


def attributions(
    fitted: Any, net: NeuralizedModel, part: Split, seed: int
) -> Iterator[tuple[str, Callable[[Floats], Floats]]]:
    """Every method by name, as a function of rows."""
    own = net.predict
    yield "LRP", lambda X: np.asarray(explained(net, X).values)
    yield "LRP, hard", lambda X: np.asarray(explained(net, X, beta=np.inf).values)
    if isinstance(fitted, DeepKMeans):
        example = torch.zeros(1, part.train.shape[1], dtype=torch.float64)
        sizes = np.bincount(fitted.labels_, minlength=part.clusters)
        head = CentroidHead(fitted.cluster_centers_, sizes)
        other = encoded(fitted.encoder_, head, example, reference=part.train, hand_over="coefficient")
        yield "LRP, coefficients", lambda X: np.asarray(explained(other, X).values)
    yield "gradient x input", lambda X: gradient(net, X, target=own(X)) * X
    yield "integrated gradients", lambda X: integrated_gradients(net, X, own(X))
    columns = part.train.shape[1]
    work = max(500, 2 * columns + 1) * len(part.judged) * 20.0 * _per_row(fitted, columns)
    if importlib.util.find_spec("shap") and work < SHAP_WORK:
        yield "SHAP", lambda X: shapley(net, X, part.train, seed)
    draws = min(20, max(2, 1000 // columns))
    yield "occlusion", lambda X: occlusion(net, X, imputer="marginal", reference=part.train, draws=draws, seed=seed)
    yield "local surrogate", lambda X: local_surrogate(net, X, part.train, seed=seed)
    yield "sensitivity", lambda X: gradient(net, X, target=own(X)) ** 2
    yield "random", lambda X: random_values(X, seed)


def _per_row(fitted: Any, columns: int) -> float:
    """Multiplications of one evaluation, roughly."""
    if isinstance(fitted, DeepKMeans):
        return float(sum(p.numel() for p in fitted.encoder_.parameters()))
    return float(
        columns * len(fitted.support_vectors_ if isinstance(fitted, KernelKMeans) else fitted.cluster_centers_)
    )


# ------------------------------------------------------------ cells


def measured(model: str, name: str, seed: int, settings: Mapping[str, Any], data: Any = None) -> dict[str, Any]:
    """One row: a fit, its equivalence, and every method under every imputer."""
    part = split(name, seed, settings, data)
    fitted = fit(model, part, seed, int(settings["epochs"]))
    net = neuralize(fitted).set_reference(part.train)  # beta = 1 / mean logit of the rows that were fitted on
    X, columns = part.judged, part.judged.shape[1]
    own = net.predict(X)
    row: dict[str, Any] = {
        "table": name,
        "model": model,
        "seed": seed,
        "columns": columns,
        "clusters": len(net.labels),
        "fitted_on": len(part.train),
        "judged": len(X),
        **equivalence(fitted, net, X, explained(net, X)),
    }
    imputers: dict[str, Any] = {
        "mean": Mean(),
        "marginal": Marginal(),
        "other cluster": OtherCluster(fitted),
        "KDE": ConditionalKDE(),
    }
    if model == "k-means":
        imputers["midpoint"] = NearestMidpoint(fitted)
    imputers = {label: imputer.fit(part.train) for label, imputer in imputers.items()}
    steps = None if columns <= 100 else -(-columns // 14)
    out = logits(net, X).max(1)
    for key in ("seconds", "sum_error", "srg", "most", "least", "curves"):
        row[key] = {}
    for method, values_of in attributions(fitted, net, part, seed):
        values_of(X[:2])  # imports, plans of lrp, first calls of torch
        began = time.perf_counter()
        values = values_of(X)
        row["seconds"][method] = (time.perf_counter() - began) / len(X)
        row["sum_error"][method] = float(np.abs(values.sum(1) - out).mean() / out.mean())
        for label, imputer in imputers.items():
            gain = srg(
                net, X, values, imputer=imputer, steps=steps, draws=int(settings["draws"]), seed=seed, target=own
            )
            for kind, value in (
                ("srg", gain.value), ("most", gain.most.area().value), ("least", gain.least.area().value),
            ):  # fmt: skip
                row[kind].setdefault(label, {})[method] = value
            if label == "marginal":
                row["curves"][method] = [
                    np.interp(GRID, c.removed / columns, c.mean / c.mean[0]).round(5).tolist()
                    for c in (gain.most, gain.least)
                ]
    return row


def work(study: Study) -> None:
    """A cell for every model, table and seed."""
    cells = [(m, t, s) for s in study.seeds for t in study.settings["tables"] for m in study.settings["models"]]
    for model, name, seed in study.progress(cells, "fits", len(cells)):
        study.cell(
            f"{model}|{name}|{seed}",
            functools.partial(measured, model, name, seed, study.settings, lambda: study.data),
        )


MODELS = ["k-means", "kernel k-means", "deep k-means"]
EXPERIMENT = Experiment(
    name="cluster_flipping",
    paper="Kauffmann et al. 2024, From clustering to cluster explanations via neural networks",
    question="Which explanation of a clustering finds the columns that hold a row in its cluster?",
    full={
        "seeds": 4,
        "models": MODELS,
        "tables": [
            "wine", "breast cancer", "digits", "wheat seeds", "glass", "sonar", "banknote", "wholesale", "MNIST",
        ],
        "rows": 25,
        "fit_rows": 500,
        "pictures": [300, 15],
        "draws": 8,
        "epochs": 30,
    },
    quick={
        "seeds": 3,
        "models": MODELS,
        "tables": ["wine", "wheat seeds"],
        "rows": 10,
        "fit_rows": 150,
        "pictures": [150, 5],
        "draws": 5,
        "epochs": 5,
    },
    work=work,
    report=report,
    data=("tabular", "mnist"),
)  # fmt: skip
