"""Partitions that come without a function: an explainable model fitted to given labels, and how far it agrees.

Spectral, agglomerative and density-based clusterings label the rows they are
fitted on and nothing else, so there is nothing to be converted exactly. What
can be had is a *surrogate*: a prototype or kernel model that reproduces the
labels as well as it can, itself explained exactly. It is another model; its
agreement, in the sample and on held-out rows, is part of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from lrp.errors import InputError, RuleError
from neuralize.additive import AdditiveHead
from neuralize.kernel_distances import KernelDistances
from neuralize.kernel_pools import RKHSPool
from neuralize.network import NeuralizedModel
from neuralize.pools import HardPool
from neuralize.steps import front
from neuralize.units import SquaredDistances

__all__ = ["Surrogate", "from_labels"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_ROWS = 4000  # of which kernel means are made at most
_PROTOTYPES = (1, 2, 4, 8, 16)
_WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # gamma times the median squared distance


@dataclass(frozen=True)
class Surrogate:
    """How far a surrogate agrees with the partition it stands for.

    Attributes
    ----------
    model : str
        What was fitted.
    agreement : float
        Share of the labelled rows it gives their own label.
    held_out : float
        The same on rows left out of the fit, mean over folds.
    spread : float
        Standard deviation over the folds.
    by_label : dict
        Agreement per label, in the sample.
    rows, left_out : int
        Rows used, and rows without a label.
    candidates : dict of {str: float}
        Held-out agreement of everything that was tried.
    """

    model: str
    agreement: float
    held_out: float
    spread: float
    by_label: dict[Any, float]
    rows: int
    left_out: int
    candidates: dict[str, float]

    def __str__(self) -> str:
        worst = min(self.by_label, key=lambda k: self.by_label[k])
        return (
            f"surrogate ({self.model}): gives {self.agreement:.1%} of {self.rows:,} rows their label, "
            f"{self.held_out:.1%} +- {self.spread:.1%} of held-out ones; "
            f"worst for label {worst} ({self.by_label[worst]:.1%})"
        )


def from_labels(
    X: Any,
    labels: npt.ArrayLike,
    *,
    model: str = "auto",
    preprocess: Any = "scale",
    noise: Any = None,
    folds: int = 5,
    random_state: int = 0,
) -> NeuralizedModel:
    """Fit an exactly explainable model to a given partition; a surrogate of it.

    Parameters
    ----------
    X : array-like or DataFrame (N, D)
    labels : array (N,)
        Such as ``SpectralClustering().fit_predict(X)``.
    model : {"auto", "prototypes", "kernel"}
        "prototypes": the nearest of 1 to 16 k-means centres per label.
        "kernel": the nearest mean in the space of an RBF kernel. "auto": what
        agrees best on held-out rows, the simplest where they tie.
    preprocess : "scale", None or transformer
        In front: standardise the columns; nothing; or a scikit-learn
        transformer or pipeline (cloned and fitted here).
    noise : label, optional
        Label of rows that belong nowhere (-1 of HDBSCAN and DBSCAN); they are
        left out of the fit, and get the label of what they are nearest to.
    folds : int
        For the held-out agreement.
    random_state : int

    Returns
    -------
    NeuralizedModel
        ``net.surrogate`` states its agreement with the labels, and is printed.

    Raises
    ------
    InputError
        Labels that do not fit the rows, fewer than two of them.

    Notes
    -----
    Values explain the surrogate, not the clustering the labels came from. With
    low agreement they explain neither. O(N M D) per candidate and fold, with at
    most 4,000 rows M in the kernel means.

    Examples
    --------
    >>> from sklearn.cluster import AgglomerativeClustering
    >>> from sklearn.datasets import load_wine
    >>> X = load_wine(as_frame=True).data
    >>> labels = AgglomerativeClustering(3).fit_predict((X - X.mean()) / X.std())
    >>> net = from_labels(X, labels)
    >>> net.surrogate.agreement > 0.9
    True
    """
    if model not in ("auto", "prototypes", "kernel"):
        raise RuleError(
            "unknown surrogate", expected="'auto', 'prototypes' or 'kernel'", got=repr(model), fix="choose one"
        )
    y = np.asarray(labels)
    count = X.shape[0] if hasattr(X, "shape") else len(X)
    if y.ndim != 1 or len(y) != count:
        raise InputError(
            "labels do not fit the rows",
            expected=f"one label for each of {count} rows",
            got=str(y.shape),
            fix="pass (N,)",
        )
    known = np.ones(len(y), dtype=bool) if noise is None else y != noise
    wrong = [label for label in y[known].tolist() if label is None or label != label]
    if wrong or len({isinstance(label, str) for label in y[known].tolist()}) > 1:
        raise InputError(
            "the labels are not all labels",
            expected="numbers, or strings, in every row",
            got=f"{len(wrong)} missing" if wrong else "numbers beside strings",
            fix="drop these rows, or name the label of rows that belong nowhere: noise=",
        )
    names, position = np.unique(y[known], return_inverse=True)
    if len(names) < 2:
        raise InputError(
            "the labels name fewer than two groups",
            expected="at least two labels" + ("" if noise is None else f" besides {noise!r}"),
            got=f"{names.tolist()}",
            fix="a single group has no competitor to be explained against",
        )
    rows = X.iloc[np.flatnonzero(known)] if hasattr(X, "iloc") else np.asarray(X)[known]
    step = StandardScaler() if isinstance(preprocess, str) and preprocess == "scale" else preprocess
    if step is None:
        made, schema = front([], getattr(rows, "columns", None), rows.shape[1])
    else:
        made, schema = front([("preprocess", clone(step).fit(rows))])
    with torch.no_grad():
        z = made(torch.from_numpy(schema.encode(rows))).numpy()
    if not np.isfinite(z).all():
        raise InputError(
            "the rows have missing or infinite values",
            expected="numbers, or preprocess= with an imputer",
            got=f"{int((~np.isfinite(z)).any(1).sum())} rows that are not finite",
            fix="pass preprocess=make_pipeline(SimpleImputer(), StandardScaler())",
        )
    tried = _candidates(model, z, random_state)
    held_out = {name: _held_out(fit, z, position, folds, random_state) for name, fit in tried.items()}
    # the first of the best: candidates go from simple to complex
    best = max(held_out, key=lambda name: round(float(held_out[name].mean()), 12))
    head = tried[best](z, position)
    net = NeuralizedModel(head, labels=names, front=made, schema=schema, source=f"surrogate of given labels: {best}")
    net.set_reference(rows)
    right = net.predict(rows) == y[known]
    net.surrogate = Surrogate(
        best,
        float(right.mean()),
        float(held_out[best].mean()),
        float(held_out[best].std()),
        {name: float(right[position == k].mean()) for k, name in enumerate(names.tolist())},
        len(right),
        int((~known).sum()),
        {name: float(found.mean()) for name, found in held_out.items()},
    )
    net.source = f"surrogate of given labels ({best}, {right.mean():.1%} agree)"
    return net


def _candidates(model: str, z: Floats, seed: int) -> dict[str, Callable[[Floats, Ints], AdditiveHead]]:
    found: dict[str, Callable[[Floats, Ints], AdditiveHead]] = {}
    if model in ("auto", "prototypes"):
        for r in _PROTOTYPES:

            def prototypes(z: Floats, y: Ints, r: int = r) -> AdditiveHead:
                return _prototypes(z, y, r, seed)

            found[f"{r} prototype{'s' * (r > 1)} per label"] = prototypes
    if model in ("auto", "kernel"):
        some = z[np.random.default_rng(seed).permutation(len(z))[:1000]]
        norms = (some**2).sum(1)
        gaps = np.maximum(norms[:, None] + norms - 2 * some @ some.T, 0)[np.triu_indices(len(some), 1)]
        typical = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 1.0
        for width in _WIDTHS:

            def means(z: Floats, y: Ints, gamma: float = width / typical) -> AdditiveHead:
                return _means(z, y, gamma, seed)

            found[f"kernel means, gamma = {width / typical:.3g}"] = means
    return found


def _prototypes(z: Floats, y: Ints, r: int, seed: int) -> AdditiveHead:
    points, owner = [], []
    for k in range(int(y.max()) + 1):
        mine = z[y == k]
        distinct = len(np.unique(mine, axis=0))
        centres = KMeans(min(r, distinct), n_init=3, random_state=seed).fit(mine).cluster_centers_
        points.append(centres)
        owner += [k] * len(centres)
    stacked = np.vstack(points)
    return AdditiveHead(SquaredDistances(stacked), HardPool(np.array(owner)), names=np.arange(len(stacked)))


def _means(z: Floats, y: Ints, gamma: float, seed: int) -> AdditiveHead:
    if len(z) > _ROWS:
        # the same share of every label, and at least one row of each
        order = np.random.default_rng(seed).permutation(len(z))
        counts = np.maximum(1, np.bincount(y) * _ROWS // len(z))
        kept = np.concatenate([order[y[order] == k][:n] for k, n in enumerate(counts)])
    else:
        kept = np.arange(len(z))
    u, owner = z[kept], y[kept]
    clusters = int(owner.max()) + 1
    weights = np.zeros((clusters, len(u)))
    weights[owner, np.arange(len(u))] = 1.0
    weights /= weights.sum(1, keepdims=True)
    norms = np.array([_squared_norm(u[owner == k], gamma) for k in range(clusters)])
    return AdditiveHead(KernelDistances(u, gamma), RKHSPool(weights, norms, gamma), names=kept)


def _squared_norm(u: Floats, gamma: float) -> float:
    """Mean kernel value of a group's pairs."""
    squares, total = (u**2).sum(1), 0.0
    for start in range(0, len(u), 500):
        part = slice(start, start + 500)
        total += float(np.exp(-gamma * np.maximum(squares[part, None] + squares - 2 * u[part] @ u.T, 0)).sum())
    return total / len(u) ** 2


def _held_out(
    fit: Callable[[Floats, Ints], AdditiveHead], z: Floats, y: Ints, folds: int, seed: int
) -> npt.NDArray[np.float64]:
    """Agreement per fold; labels with a single row are never held out."""
    splits = max(2, min(folds, int(np.bincount(y).max())))
    counts = np.bincount(y)
    common = np.flatnonzero(counts[y] >= splits)
    rare = np.flatnonzero(counts[y] < splits)
    if not len(common):
        return np.array([np.nan])
    found = []
    for train, test in StratifiedKFold(splits, shuffle=True, random_state=seed).split(z[common], y[common]):
        used = np.concatenate([common[train], rare])
        head = fit(z[used], y[used])
        with torch.no_grad():
            guess = head.assign(torch.from_numpy(z[common[test]]))[0].numpy()
        found.append((guess == y[common[test]]).mean())
    return np.array(found)
