r"""K-means in the span of landmarks, streaming over rows.

A centre in the span of landmarks :math:`l_1 .. l_m` is
:math:`m_k = \sum_j B_{jk} \Phi(l_j)`, with coefficients of either sign. With
the features :math:`\kappa(x) = (k(x, l_j))_j` and :math:`W = (k(l_i, l_j))`,
the best centre of some rows is :math:`B_k = W^+ \bar\kappa_k`, their weighted
mean of features; its squared norm is :math:`\bar\kappa_k' B_k`, and distances
:math:`1 - 2 \kappa(x) \cdot B_k + |m_k|^2` are exact distances in the space of
the kernel. Rows need never be projected: a pass costs O(N m (D + 2K)).

Private to :class:`neuralize.KernelKMeans`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralize._rkhs import _ROUNDING, Ints, Progress
from neuralize.kernels import Anchors, Floats, ProductKernel


def sampled(w: Floats, size: int, rng: np.random.RandomState) -> tuple[Ints, Floats]:
    """Rows that stand for all, with their weights: all rows, or a stratified draw by weight."""
    if len(w) <= size:
        return np.arange(len(w)), w
    total = np.cumsum(w)
    at = (np.arange(size) + rng.random_sample(size)) * (total[-1] / size)
    drawn = np.minimum(np.searchsorted(total, at, side="right"), np.flatnonzero(w > 0)[-1])
    rows, times = np.unique(drawn, return_counts=True)
    return rows, times * (total[-1] / size)


class Subspace:
    """The span of landmarks in the space of the kernel.

    Parameters
    ----------
    kernel : ProductKernel
    landmarks : ndarray (m, D)
    """

    def __init__(self, kernel: ProductKernel, landmarks: npt.NDArray[Any]) -> None:
        self.landmarks = landmarks
        self.anchors = Anchors(kernel, landmarks)
        W = self.anchors.gram(landmarks)
        values, vectors = np.linalg.eigh((W + W.T) / 2)
        # smaller ones are rounding; negative ones, of kernels that are not positive definite, have no direction
        kept = values > 10 * np.finfo(np.float64).eps * values[-1]
        # the root of W+, applied twice: rounding then counts by the root of a small eigenvalue, not by itself
        self._root = vectors[:, kept] / np.sqrt(values[kept])

    def centres(self, sums: Floats, Z: Floats) -> tuple[Floats, Floats]:
        """Coefficients (m, K) and squared norms (K,) of centres from sums of features; 0 and infinite where empty."""
        means = np.divide(sums, Z, out=np.zeros_like(sums), where=Z > 0)
        coordinates = self._root.T @ means
        return self._root @ coordinates, np.where(Z > 0, (coordinates**2).sum(0), np.inf)

    def lengths(self, kappa: Floats) -> Floats:
        """Squared norms (N,) of the rows' projections on the span."""
        return np.asarray(((kappa @ self._root) ** 2).sum(1))


class Features:
    """Kernel values of many rows with the landmarks, in blocks: held where they fit, else made again in each pass."""

    def __init__(self, anchors: Anchors, X: npt.NDArray[Any], memory: float) -> None:
        self.anchors, self.X = anchors, X
        self.held: list[tuple[slice, Floats]] | None = None
        if 8.0 * len(X) * anchors.size <= memory:
            self.held = [(rows, anchors.gram(X[rows])) for rows in anchors.slices(len(X))]

    def __len__(self) -> int:
        return len(self.X)

    def __iter__(self) -> Iterator[tuple[slice, Floats]]:
        return self.anchors.blocks(self.X) if self.held is None else iter(self.held)

    def sums(self, labels: Ints, w: Floats, k: int) -> tuple[Floats, Floats]:
        """Weighted sums of features (m, K) and weights (K,) of given clusters."""
        sums, Z = np.zeros((self.anchors.size, k)), np.zeros(k)
        for rows, kappa in self:
            _add(sums, Z, kappa, labels[rows], w[rows])
        return sums, Z


def _add(sums: Floats, Z: Floats, kappa: Floats, labels: Ints, w: Floats) -> None:
    H = np.zeros((len(labels), len(Z)))
    H[np.arange(len(labels)), labels] = w
    sums += kappa.T @ H
    Z += H.sum(0)


def nearest(kappa: Floats, B: Floats, norms: Floats) -> tuple[Ints, Floats]:
    """Labels and squared distances of a block."""
    apart = kappa @ (-2.0 * B) + norms
    labels = np.asarray(apart.argmin(1), dtype=np.intp)
    return labels, np.maximum(1.0 + np.take_along_axis(apart, labels[:, None], 1)[:, 0], 0.0)


@dataclass
class Run:
    """Coefficients (m, K) and squared norms (K,) of centres, inertia of the labels they give, passes, and sums."""

    B: Floats
    norms: Floats
    inertia: float
    iterations: int
    sums: Floats
    Z: Floats


def lloyd(
    features: Features, space: Subspace, w: Floats, sums: Floats, Z: Floats, max_iter: int, tol: float, bar: Progress
) -> Run:
    """Lloyd's iterations from the centres of given sums; one pass over the rows each."""
    labels = np.full(len(features), -1, dtype=np.int32)
    before, refilled = np.inf, False
    for iteration in range(1, max_iter + 1):
        B, norms = space.centres(sums, Z)
        made = sums, Z
        sums, Z = np.zeros_like(sums), np.zeros_like(Z)
        inertia, moved = 0.0, 0
        for rows, kappa in features:
            new, far = nearest(kappa, B, norms)
            moved += int((new != labels[rows]).sum())
            labels[rows] = new
            inertia += float(w[rows] @ far)
            _add(sums, Z, kappa, new, w[rows])
        bar.step(iteration, inertia)
        done = moved == 0 or (iteration > 1 and before - inertia <= tol * before)
        if iteration == max_iter or (done and refilled):
            break
        refilled = bool((Z <= 0).any()) and _refill(features, space, w, labels, sums, Z, B, norms)
        if done and not refilled:
            break
        before = inertia
    return Run(B, norms, inertia, iteration, *made)


def _refill(
    features: Features,
    space: Subspace,
    w: Floats,
    labels: npt.NDArray[np.int32],
    sums: Floats,
    Z: Floats,
    B: Floats,
    norms: Floats,
) -> bool:
    """Give every empty cluster the row furthest from all centres, in place; whether any was given one.

    Distances are those between projections: what lies outside the span stays
    outside whichever cluster a row is in. One pass per empty cluster.
    """
    counts = np.bincount(labels[w > 0], minlength=len(Z))
    far, given = np.empty(len(labels)), False
    for rows, kappa in features:
        far[rows] = space.lengths(kappa) - 1.0 + nearest(kappa, B, norms)[1]
    for cluster in np.flatnonzero(Z <= 0):
        row = int(np.where((w > 0) & (counts[labels] > 1), far, 0.0).argmax())
        if far[row] <= _ROUNDING or counts[labels[row]] <= 1:
            break
        old, one = labels[row], features.anchors.gram(features.X[row : row + 1]).T
        sums[:, old] -= one[:, 0] * w[row]
        Z[old] -= w[row]
        sums[:, cluster], Z[cluster] = one[:, 0] * w[row], w[row]
        counts[old] -= 1
        counts[cluster], labels[row], given = 1, cluster, True
        there = space.centres(one, np.ones(1))
        for rows, kappa in features:
            np.minimum(far[rows], space.lengths(kappa) - 1.0 + nearest(kappa, *there)[1], out=far[rows])
    return given


def mini_batches(
    X: npt.NDArray[Any],
    space: Subspace,
    w: Floats,
    sums: Floats,
    Z: Floats,
    batch: int,
    epochs: int,
    tol: float,
    patience: int,
    rng: np.random.RandomState,
    bar: Progress,
) -> Run:
    """Running means instead of passes: every batch moves the centres towards the rows it assigns to them.

    The given centres count as one batch. Ends after some batches in a row
    without a better smoothed inertia.
    """
    used = np.flatnonzero(w > 0)
    total = float(w.sum())
    w = w * (len(used) / total)
    scale = min(batch, len(used)) / Z.sum()
    sums, Z = sums * scale, Z * scale
    smooth, best, waited, steps = np.nan, np.inf, 0, 0
    rate = min(1.0, 2.0 * batch / (len(used) + 1))
    for epoch in range(1, epochs + 1):  # noqa: B007  # counted for the result
        order = rng.permutation(used)
        seen = np.zeros(len(Z))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            B, norms = space.centres(sums, Z)
            kappa = space.anchors.gram(X[rows])
            labels, far = nearest(kappa, B, norms)
            taken = np.zeros(len(Z))
            _add(sums, taken, kappa, labels, w[rows])
            Z, seen = Z + taken, seen + taken
            steps += 1
            mean = float(w[rows] @ far / w[rows].sum())
            smooth = mean if np.isnan(smooth) else (1 - rate) * smooth + rate * mean
            bar.step(steps, smooth * total)
            waited = 0 if smooth < best * (1 - tol) else waited + 1
            best = min(best, smooth)
            if waited >= patience:
                break
        if waited >= patience:
            break
        # a cluster that took nothing in a whole epoch begins anew at the last batch's row furthest from all centres
        far = space.lengths(kappa) - 1.0 + far
        for cluster in np.flatnonzero(seen <= 0):
            row = int(far.argmax())
            if far[row] <= _ROUNDING:
                break
            one = kappa[row : row + 1].T
            sums[:, cluster], Z[cluster] = one[:, 0] * w[rows[row]], w[rows[row]]
            there = space.centres(one, np.ones(1))
            far = np.minimum(far, space.lengths(kappa) - 1.0 + nearest(kappa, *there)[1])
    B, norms = space.centres(sums, Z)
    return Run(B, norms, np.nan, epoch, sums, Z)
