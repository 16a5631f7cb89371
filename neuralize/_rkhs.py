"""K-means among the rows themselves: seeds and Lloyd's iterations on the kernel matrix.

Private to :class:`neuralize.KernelKMeans`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError, NonFiniteError
from neuralize.kernels import Anchors, Floats, ProductKernel, Term

Ints = npt.NDArray[np.intp]

# squared distances below this are rounding of kernel values near 1
_ROUNDING = 1e-12


def working_memory() -> float:
    """Bytes that may be held for speed: scikit-learn's ``working_memory``."""
    from sklearn import get_config

    return float(get_config()["working_memory"]) * 2**20


class Progress:
    """One bar for a fit: a pass over the rows is a step."""

    def __init__(self, bar: Any, verbose: int) -> None:
        self.bar, self.verbose, self.run = bar, verbose, ""

    def step(self, iteration: int, inertia: float) -> None:
        self.bar.set_postfix_str(f"inertia {inertia:.6g}", refresh=False)
        self.bar.update()
        if self.verbose:
            self.bar.write(f"{self.run}iteration {iteration}, inertia {inertia:.10g}")


@contextmanager
def progress(verbose: int) -> Iterator[Progress]:
    """A bar on a terminal, once the work takes longer than two seconds; lines where asked for."""
    from tqdm import tqdm

    with tqdm(desc="kernel k-means", unit=" passes", delay=2, disable=None) as bar:
        yield Progress(bar, verbose)


def unit_gamma(kernel: ProductKernel, X: npt.NDArray[Any], w: Floats) -> float:
    """The gamma for which a row's mean cost against the mean row is 1; 1 where all rows are equal."""
    total = float(w.sum())
    parts = [slice(start, start + 4096) for start in range(0, len(X), 4096)]
    mean = sum((w[rows] @ X[rows] for rows in parts), np.zeros(X.shape[1])) / total
    with np.errstate(over="ignore", invalid="ignore"):
        cost = sum(float(w[rows] @ kernel.terms(X[rows].astype(np.float64), mean).sum(1)) for rows in parts)
    if not np.isfinite(cost):
        raise NonFiniteError(
            "the costs of the kernel overflow",
            expected="a table whose squares are finite",
            got=f"absolute values up to {np.abs(X).max():.3g}",
            fix="rescale the table, for example with StandardScaler",
        )
    return total / cost if cost > 0 else 1.0


def inverse_scale(kernel: str | Term, gamma: Any, X: npt.NDArray[Any], w: Floats) -> float | Floats:
    """Gamma as a number, or one per column, checked."""
    if isinstance(gamma, str):
        return 1.0 / X.shape[1] if gamma == "auto" else unit_gamma(ProductKernel(kernel), X, w)
    given = np.array(gamma, dtype=np.float64)
    if given.ndim == 0:
        return float(given)
    if given.shape != (X.shape[1],) or not given.any():
        raise InputError(
            "gamma does not fit X",
            expected=f"a number, or {X.shape[1]} of which one at least is positive",
            got=f"shape {given.shape}" + " of zeros" * (not given.any()),
            fix="pass one value per column",
        )
    ProductKernel(kernel, given)  # raises where it is negative or not finite
    return given


def initial_labels(init: npt.ArrayLike, rows: int, k: int) -> Ints:
    """Labels to start from, checked."""
    labels = np.asarray(init)
    fits = labels.shape == (rows,) and labels.dtype.kind in "iuf"
    if not fits or (labels != np.floor(labels)).any() or labels.min() < 0 or labels.max() >= k:
        raise InputError(
            "init does not hold the labels to start from",
            expected=f"{rows} integers from 0 to {k - 1}, one per row",
            got=f"shape {labels.shape}, {labels.dtype}"
            + (f", values from {labels.min()} to {labels.max()}" if fits else ""),
            fix="pass labels, for example labels_ of another clustering, or init='k-means++'",
        )
    return labels.astype(np.intp)


def merged(X: npt.NDArray[Any], w: Floats) -> tuple[npt.NDArray[Any], Floats, Ints, Ints]:
    """Distinct rows of positive weight in lexicographic order and their weights; the rows used, and where each went.

    Equal rows always share a cluster, and the order does not depend on that
    of the table: so weights and repetitions give the same fit, seeds included.
    """
    used = np.flatnonzero(w > 0)
    U, inverse = np.unique(X[used], axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    weights = np.bincount(inverse, w[used], minlength=len(U)).astype(np.float64)
    return U, weights, used.astype(np.intp), inverse.astype(np.intp)


class Gram:
    """The kernel matrix of distinct rows: held where it fits, else made again block by block.

    Parameters
    ----------
    kernel : ProductKernel
    U : ndarray (M, D)
    memory : float
        Bytes that may be held.
    """

    def __init__(self, kernel: ProductKernel, U: npt.NDArray[Any], memory: float) -> None:
        self.kernel, self.U = kernel, U
        self.held: Floats | None = None
        if 8.0 * len(U) ** 2 <= memory:
            self.held = np.empty((len(U), len(U)))
            for rows, k in Anchors(kernel, U).blocks(U):
                self.held[rows] = k

    def __len__(self) -> int:
        return len(self.U)

    def columns(self, index: Ints) -> Floats:
        """Kernel values of all rows with a few, (M, len(index))."""
        if self.held is not None:
            return self.held[index].T.copy()
        out = np.empty((len(self), len(index)))
        anchors = Anchors(self.kernel, self.U[index])
        for rows in anchors.slices(len(self)):
            out[rows] = anchors.gram(self.U[rows])
        return out

    def product(self, H: Floats, index: Ints | None = None) -> Floats:
        """Kernel matrix times H, of which rows not in ``index`` are left out as zero: (M, K)."""
        if self.held is not None and index is None:
            return self.held @ H
        if self.held is not None and index is not None:
            out = np.zeros((len(self), H.shape[1]))
            for start in range(0, len(index), 256):  # rows are copied, so few at a time
                out += self.held[index[start : start + 256]].T @ H[start : start + 256]
            return out
        out = np.empty((len(self), H.shape[1]))
        for rows, k in Anchors(self.kernel, self.U if index is None else self.U[index]).blocks(self.U):
            np.matmul(k, H, out=out[rows])
        return out


def spread_seeds(gram: Gram, w: Floats, k: int, rng: np.random.RandomState) -> Ints:
    """Greedy k-means++ with kernel distances: positions of k rows.

    Every seed is the best of 2 + log k rows drawn with probability
    proportional to weight times squared distance to the nearest seed.
    """
    trials = 2 + int(np.log(k))
    seeds = np.empty(k, dtype=np.intp)
    seeds[0] = _draw(w, 1, rng)[0]
    nearest = _apart(gram.columns(seeds[:1]))[:, 0]
    for i in range(1, k):
        mass = w * nearest
        if not mass.sum() > 0:  # rows that differ by less than the kernel resolves
            seeds[i] = np.setdiff1d(np.arange(len(w)), seeds[:i])[0]
            nearest[seeds[i]] = 0.0
            continue
        candidates = _draw(mass, trials, rng)
        apart = np.minimum(_apart(gram.columns(candidates)), nearest[:, None])
        best = int((w @ apart).argmin())
        seeds[i], nearest = candidates[best], apart[:, best]
    return seeds


def random_seeds(w: Floats, k: int, rng: np.random.RandomState) -> Ints:
    """k different rows, drawn with probability proportional to weight."""
    return np.asarray(rng.choice(len(w), size=k, replace=False, p=w / w.sum()), dtype=np.intp)


def nearest_seed(gram: Gram, seeds: Ints) -> Ints:
    """Label of each row: the seed it is most similar to; a seed keeps its own label."""
    labels = np.asarray(gram.columns(seeds).argmax(1), dtype=np.intp)
    labels[seeds] = np.arange(len(seeds))
    return labels


def _apart(k: Floats) -> Floats:
    """Squared distances 2 - 2k, in place."""
    return np.maximum(np.subtract(2.0, np.multiply(k, 2.0, out=k), out=k), 0.0, out=k)


def _draw(mass: Floats, size: int, rng: np.random.RandomState) -> Ints:
    total = np.cumsum(mass)
    drawn = np.searchsorted(total, rng.random_sample(size) * total[-1], side="right")
    return np.asarray(np.minimum(drawn, np.flatnonzero(mass > 0)[-1]), dtype=np.intp)


@dataclass
class Run:
    """What Lloyd's iterations on the kernel matrix end with.

    ``split`` (M, K) holds the weight that each row has in each centre,
    ``norms`` (K,) the squared norms of the centres (infinite where a cluster
    is empty), ``inertia`` belongs to the labels those centres give.
    """

    split: Floats
    norms: Floats
    inertia: float
    iterations: int


def lloyd(gram: Gram, w: Floats, split: Floats, max_iter: int, tol: float, bar: Progress) -> Run:
    r"""Lloyd's iterations in the space of the kernel.

    With the sums :math:`T_k(i) = \sum_j H_{jk} k(u_i, u_j)` and the weights
    :math:`Z_k = \sum_j H_{jk}` the squared distance to a centre is
    :math:`1 - 2 T_k(i)/Z_k + \sum_i H_{ik} T_k(i)/Z_k^2`. A row that changes
    its cluster changes two columns of T, so that an iteration costs
    O(M x rows that moved), not O(M^2).
    """
    k = split.shape[1]
    every = np.arange(len(w))
    T = gram.product(split)
    previous, before, helped = None, np.inf, False
    for iteration in range(1, max_iter + 1):
        Z = split.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            norms = np.where(Z > 0, (split * T).sum(0) / Z**2, np.inf)
            apart = np.where(Z > 0, T * (-2.0 / Z), 0.0) + norms
        labels = np.asarray(apart.argmin(1), dtype=np.intp)
        far = np.maximum(1.0 + apart[every, labels], 0.0)
        inertia = float(w @ far)
        bar.step(iteration, inertia)
        settled = previous is not None and np.array_equal(labels, previous)
        done = settled or (iteration > 1 and before - inertia <= tol * before)
        if iteration == max_iter or (done and helped):
            break
        filled = refilled(labels, far, k)
        helped = filled is not labels
        if done and not helped:
            break
        before, previous = inertia, filled
        moved = np.zeros_like(split)
        moved[every, filled] = w
        changed = np.flatnonzero((moved != split).any(1))
        if 2 * len(changed) < len(w):
            T += gram.product(moved[changed] - split[changed], changed)
        else:
            T = gram.product(moved)
        split = moved
    return Run(split, norms, inertia, iteration)


def refilled(labels: Ints, far: Floats, k: int) -> Ints:
    """Labels in which every empty cluster has got the row furthest from its centre; the same object if none could."""
    counts = np.bincount(labels, minlength=k)
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return labels
    filled, far, helped = labels.copy(), far.copy(), False
    for cluster in empty:
        row = int(np.where(counts[filled] > 1, far, 0.0).argmax())
        if far[row] <= _ROUNDING or counts[filled[row]] <= 1:
            break
        counts[filled[row]] -= 1
        filled[row], far[row], counts[cluster], helped = cluster, 0.0, 1, True
    return filled if helped else labels
