"""Spectral relevance analysis: relevance maps of one class, sorted into the strategies that a model uses.

Lapuschkin et al. 2019 (SpRAy), with the separability of Anders et al. 2022. Maps are pooled and normalised
(:func:`pooled`), the graph of their nearest neighbours has a normalised Laplacian (:func:`laplacian`), the gap in its
ascending eigenvalues tells how many groups there are (:func:`eigengap`), and k-means on its first eigenvectors tells
which (:func:`spray`). How well the groups are separated is :func:`fisher_tau`, beside two null distributions: labels
permuted (:func:`permuted_taus`) and rows redrawn with the same mean and covariance (:func:`rotated_taus`).

Eigengaps, tau and t-SNE suggest, they prove nothing: euclidean distances of maps are ruled by position, and groups
that k-means cut out of an embedding are always better separated there than permuted labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from lrp.errors import InputError

__all__ = [
    "Groups",
    "agreement",
    "eigengap",
    "fisher_tau",
    "laplacian",
    "medoids",
    "neighbour_graph",
    "normalised",
    "p_value",
    "permuted_taus",
    "pooled",
    "rotated",
    "rotated_taus",
    "spray",
    "tsne",
]

Array = NDArray[Any]
DIMENSIONS = 8


# -- maps ------------------------------------------------------------------
def normalised(rows: ArrayLike) -> Array:
    """Rows (n, d) whose magnitudes sum to 1; a row of zeros stays."""
    X = np.asarray(rows, float)
    total = np.abs(X).sum(1, keepdims=True)
    out: Array = np.divide(X, total, out=np.zeros_like(X), where=total > 0)
    return out


def pooled(maps: ArrayLike, size: int) -> Array:
    """Maps (n, H, W) as normalised rows (n, size²) of sums over equal squares; (n, C, H, W) as (n, C size²).

    Raises
    ------
    InputError
        If the squares are not equal.

    Examples
    --------
    >>> pooled([[[1.0, 1.0], [-1.0, 5.0]]], 1).tolist(), pooled([[[1.0, 1.0], [-1.0, 5.0]]], 2).tolist()
    ([[1.0]], [[0.125, 0.125, -0.125, 0.625]])
    """
    X = np.asarray(maps, float)
    if X.ndim not in (3, 4) or X.shape[-2] % size or X.shape[-1] % size:
        raise InputError(
            "maps can not be pooled into equal squares",
            expected=f"(n, H, W) or (n, C, H, W), H and W multiples of {size}",
            got=f"{X.shape}",
            fix="choose another size",
        )
    height, width = X.shape[-2:]
    squares = X.reshape(len(X), -1, size, height // size, size, width // size).sum((3, 5))
    return normalised(squares.reshape(len(X), -1))


# -- the graph and its spectrum --------------------------------------------
def neighbour_graph(rows: ArrayLike, neighbours: int) -> Array:
    """Affinity (n, n): 1 where one of two rows is among the other's nearest, by euclidean distance; diagonal 0."""
    X = np.asarray(rows, float)
    if not 1 <= neighbours < len(X):
        raise InputError(
            "no such graph of neighbours",
            expected=f"1 to {len(X) - 1} neighbours for {len(X)} rows",
            got=f"{neighbours}",
            fix="ask for fewer, or give more rows",
        )
    squares = (X**2).sum(1)
    distances = squares[:, None] + squares[None] - 2 * X @ X.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argpartition(distances, neighbours - 1, axis=1)[:, :neighbours]
    graph = np.zeros((len(X), len(X)))
    np.put_along_axis(graph, nearest, 1.0, axis=1)
    return np.maximum(graph, graph.T)


def laplacian(graph: ArrayLike) -> Array:
    """I - D^-1/2 A D^-1/2; a row without neighbours counts as a group of its own (eigenvalue 0)."""
    A = np.asarray(graph, float)
    degree = A.sum(1)
    root = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    out: Array = np.diag((degree > 0).astype(float)) - root[:, None] * A * root[None]
    return out


def eigengap(values: ArrayLike, most: int | None = None) -> int:
    """The number of eigenvalues, in ascending order, before the largest gap; at most ``most``.

    Examples
    --------
    >>> eigengap([0.0, 0.0, 0.0, 0.45, 0.5])
    3
    """
    gaps = np.diff(np.asarray(values, float))[:most]
    return int(np.argmax(gaps)) + 1


@dataclass(frozen=True)
class Groups:
    """What SpRAy found.

    Parameters
    ----------
    values : array (most + 1,)
        The smallest eigenvalues, ascending.
    suggested : int
        Number of groups by the eigengap; 1 says that there are none.
    labels : array (n,)
        Of ``max(suggested, 2)`` groups.
    embedding : array (n, groups)
        Eigenvectors, each row of length 1: where k-means looked.
    axes : array (n, 8)
        The first eigenvectors as they are: where tau is measured, of all classes alike.
    tau : float
    """

    values: Array
    suggested: int
    labels: Array
    embedding: Array
    axes: Array
    tau: float

    @property
    def gap(self) -> float:
        """The largest gap."""
        return float(self.values[self.suggested] - self.values[self.suggested - 1])


def spray(rows: ArrayLike, neighbours: int = 10, *, most: int = 10, seed: int = 0, shrinkage: float = 0.1) -> Groups:
    """Groups of rows (n, d), normalised relevance maps of one class.

    Parameters
    ----------
    rows : array (n, d)
    neighbours : int
        Of the graph.
    most : int
        Groups at most.
    seed : int
        Of k-means.
    shrinkage : float
        Of tau.

    Notes
    -----
    Time O(n² d + n³), memory O(n²).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> two = np.concatenate([rng.normal(0, 1, (30, 4)), rng.normal(9, 1, (20, 4))])
    >>> found = spray(two, 5)
    >>> found.suggested, sorted(np.bincount(found.labels).tolist())
    (2, [20, 30])
    """
    L = laplacian(neighbour_graph(rows, neighbours))
    last = min(max(most, DIMENSIONS - 1), len(L) - 1)
    values, vectors = scipy.linalg.eigh(L, subset_by_index=[0, last])
    values = np.maximum(values[: most + 1], 0)
    suggested = eigengap(values, most)
    groups = max(suggested, 2)
    part = vectors[:, :groups]
    length = np.linalg.norm(part, axis=1, keepdims=True)
    embedding = np.divide(part, length, out=np.zeros_like(part), where=length > 0)
    labels = KMeans(groups, n_init=5, random_state=seed).fit_predict(embedding)
    axes = vectors[:, :DIMENSIONS]
    return Groups(values, suggested, labels, embedding, axes, fisher_tau(axes, labels, shrinkage))


# -- how well separated ----------------------------------------------------
def fisher_tau(rows: ArrayLike, labels: ArrayLike, shrinkage: float = 0.1) -> float:
    """The largest tau of S_between v = tau S_within v; groups weigh by their shares.

    Parameters
    ----------
    rows : array (n, q)
    labels : array (n,)
    shrinkage : float
        S_within becomes (1 - shrinkage) S_within + shrinkage tr(S_within) / q: a small group spans few directions, and
        without shrinkage tau explodes in the others.

    Examples
    --------
    >>> round(fisher_tau([[-2.0], [0.0], [4.0], [6.0]], [0, 0, 1, 1], 0.0), 6)
    9.0
    """
    X, y = np.asarray(rows, float), np.asarray(labels)
    mean, q = X.mean(0), X.shape[1]
    between, within = np.zeros((q, q)), np.zeros((q, q))
    for c in np.unique(y):
        part = X[y == c]
        apart = part.mean(0) - mean
        between += len(part) / len(X) * np.outer(apart, apart)
        within += (part - part.mean(0)).T @ (part - part.mean(0)) / len(X)
    spread = np.trace(within) / q
    within = (1 - shrinkage) * within + shrinkage * spread * np.eye(q)
    within += 1e-12 * max(np.trace(between), spread, 1e-300) * np.eye(q)
    return float(scipy.linalg.eigh(between, within, eigvals_only=True)[-1])


def permuted_taus(found: Groups, draws: int, seed: int = 0, shrinkage: float = 0.1) -> list[float]:
    """Tau of the same groups with their labels permuted.

    It asks whether the labels have anything to do with the embedding, which they do: they were cut out of it.
    """
    rng = np.random.default_rng(seed)
    return [fisher_tau(found.axes, rng.permutation(found.labels), shrinkage) for _ in range(draws)]


def rotated(rows: ArrayLike, rng: np.random.Generator) -> Array:
    """Rows with the same mean and covariance, to rounding, and no other structure: a random rotation of the samples."""
    X = np.asarray(rows, float)
    n, mean = len(X), X.mean(0)
    _, scale, right = np.linalg.svd(X - mean, full_matrices=False)
    kept = scale > scale[:1] * 1e-12
    noise = rng.normal(size=(n, int(kept.sum())))
    frame, _ = np.linalg.qr(noise - noise.mean(0))
    return np.asarray(frame @ (scale[kept, None] * right[kept]) + mean)


def rotated_taus(
    rows: ArrayLike, draws: int, neighbours: int = 10, *, most: int = 10, seed: int = 0, shrinkage: float = 0.1
) -> list[float]:
    """Tau of everything done again, eigengap and k-means included, on rotated rows.

    It asks for groups beyond what a covariance gives. It has little power where few directions hold most of the
    variance: a long cloud is cut in two with a large tau as well.
    """
    rng = np.random.default_rng(seed)
    return [spray(rotated(rows, rng), neighbours, most=most, seed=seed, shrinkage=shrinkage).tau for _ in range(draws)]


def p_value(value: float, null: ArrayLike) -> float:
    """Share of null values, and of the value itself, that are at least as large.

    Examples
    --------
    >>> p_value(3.0, [1.0, 2.0, 3.0])
    0.5
    """
    drawn = np.asarray(null, float)
    return float((1 + (drawn >= value).sum()) / (1 + len(drawn)))


# -- beside what was planted ------------------------------------------------
def agreement(labels: ArrayLike, points: ArrayLike, planted: ArrayLike) -> dict[str, Any]:
    """How groups agree with planted labels.

    Parameters
    ----------
    labels : array (n,)
        0, 1, ... without gaps.
    points : array (n, q)
        Where k-means found them: :attr:`Groups.embedding`.
    planted : array (n,) of bool

    Returns
    -------
    dict
        ``ari`` of all groups; ``picked``, the groups that are planted by half or more, or, where there are none (or no
        others), the one with the best F1: what a person who looks at every group would pick. Of these together
        ``precision``, ``recall``, and ``auc`` of the distance² to the next other mean minus that to the next of theirs,
        None without planted rows. Picking makes chance look better than it is: judge random maps alike.

    Examples
    --------
    >>> told = agreement([0, 0, 1, 1], [[0.0], [0.0], [1.0], [1.0]], [False, False, True, True])
    >>> told["picked"], told["ari"], told["precision"], told["recall"], told["auc"]
    ([1], 1.0, 1.0, 1.0, 1.0)
    """
    y, P, truth = np.asarray(labels), np.asarray(points, float), np.asarray(planted, bool)
    groups = range(int(y.max()) + 1)
    distances = np.stack([((P - P[y == c].mean(0)) ** 2).sum(1) for c in groups], 1)

    def hits(chosen: list[int]) -> tuple[float, float]:
        rows = np.isin(y, chosen)
        right = int((truth & rows).sum())
        return right / max(int(rows.sum()), 1), right / max(int(truth.sum()), 1)

    picked = [c for c in groups if truth[y == c].mean() >= 0.5]
    if len(picked) in (0, len(groups)):
        f1 = [2 * p * r / max(p + r, 1e-300) for p, r in (hits([c]) for c in groups)]
        picked = [int(np.argmax(f1))]
    precision, recall = hits(picked)
    logit = np.delete(distances, picked, axis=1).min(1) - distances[:, picked].min(1)
    mixed = bool(truth.any() and not truth.all())
    return {
        "picked": picked,
        "ari": float(adjusted_rand_score(truth, y)),
        "precision": precision,
        "recall": recall,
        "auc": float(roc_auc_score(truth, logit)) if mixed else None,
    }


def medoids(rows: ArrayLike, labels: ArrayLike, count: int = 1) -> list[list[int]]:
    """Of every group the rows that are nearest to its mean."""
    X, y = np.asarray(rows, float), np.asarray(labels)
    out = []
    for c in range(int(y.max()) + 1):
        mine = np.flatnonzero(y == c)
        apart = ((X[mine] - X[mine].mean(0)) ** 2).sum(1)
        out.append([int(i) for i in mine[np.argsort(apart, kind="stable")[:count]]])
    return out


def tsne(rows: ArrayLike, seed: int = 0) -> Array:
    """A view (n, 2), for the eye alone: groups in it are no proof."""
    from sklearn.manifold import TSNE

    X = np.asarray(rows, float)
    perplexity = min(30.0, (len(X) - 1) / 3)
    return np.asarray(TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(X))
