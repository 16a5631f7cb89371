"""What is counted while refits pass: matched clusters, signs, ranks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError
from neuralize.explanation import CoverageWarning, Explanation
from neuralize.network import NeuralizedModel

__all__ = ["Tally", "quantile", "ranks_of", "signs_of", "take"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# relevances below this share of their row are rounding, and have no sign
_ROUNDING = 1e-12


class Tally:
    """What is counted while refits pass.

    Parameters
    ----------
    net : NeuralizedModel
        The original.
    labels : ndarray (N,)
        Its predictions of X.
    first : Explanation
        The original's, of the rows (n, D).
    refits, top : int
    """

    def __init__(self, net: NeuralizedModel, labels: npt.NDArray[Any], first: Explanation, refits: int, top: int):
        n, d = first.values.shape
        self.labels, self.first, self.top = labels, first, top
        # one logit decides nothing; labels of clusterings only are arbitrary
        self.single, self.named = net.head.clusters == 1, net.kind != "cluster"
        self.known = net.labels
        self.place = np.zeros(len(labels), dtype=np.int64) if self.single else places(labels, self.known)
        self.target, self.decided = places(first.target, self.known), places(first.decided, self.known)
        self.contrast = None if first.contrast is None else places(first.contrast, self.known)
        self.signs, self.rank = signs_of(first.values), ranks_of(first.values)
        self.ranks = np.zeros((refits, n, d), dtype=np.min_scalar_type(d))
        self.same = np.zeros((n, d), dtype=np.int64)
        self.counted, self.kept = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.agreement = np.full(refits, np.nan)
        self.jaccard = np.full((refits, len(self.known)), np.nan)
        self.matched = np.zeros((refits, len(self.known)), dtype=bool)
        self.groups = [np.flatnonzero(first.target == c) for c in np.unique(first.target)]
        self.means = np.full((refits, len(self.groups), d), np.nan)
        self.magnitudes = self.means.copy()
        self.failed: dict[int, str] = {}

    def compare(
        self, r: int, net: NeuralizedModel, labels: npt.NDArray[Any], table: Any, question: dict[str, Any]
    ) -> None:
        """Count one refit: its network, its predictions of X, the rows to explain, and how."""
        found = self.place if self.single else places(labels, net.labels)
        partner, jaccard = self._partners(net, found)
        target = partner[self.target]
        contrast = None if self.contrast is None else partner[self.contrast]
        usable = target >= 0 if contrast is None else (target >= 0) & (contrast >= 0)
        chosen = np.flatnonzero(usable)
        if len(chosen):
            some = table if len(chosen) == len(usable) else take(table, chosen)
            asked = None if self.single else net.labels[target[chosen]]
            rival = None if contrast is None else net.labels[contrast[chosen]]
            with warnings.catch_warnings():
                # the original has said it
                warnings.simplefilter("ignore", CoverageWarning)
                ex = net.explain(some, asked, rival, top=None, **question)
            # nothing is counted before all of it is known: a refit that fails here counts for no row
            self.ranks[r, chosen] = ranks_of(ex.values)
            self.same[chosen] += signs_of(ex.values) == self.signs[chosen]
            self.kept[chosen] += partner[self.decided[chosen]] == places(ex.decided, net.labels)
            where = np.full(len(usable), -1)
            where[chosen] = np.arange(len(chosen))
            for g, group in enumerate(self.groups):
                mine = ex.values[where[group[usable[group]]]]
                if len(mine):
                    self.means[r, g], self.magnitudes[r, g] = mine.mean(0), np.abs(mine).mean(0)
        self.counted += usable
        self.jaccard[r], self.matched[r] = jaccard, partner >= 0
        if not self.single:
            from sklearn.metrics import adjusted_rand_score

            self.agreement[r] = adjusted_rand_score(self.place, found)

    def _partners(self, net: NeuralizedModel, found: Ints) -> tuple[Ints, Floats]:
        """The refit's cluster for each of the original's, -1 where it vanished; and their Jaccard similarities (K,)."""
        from scipy.optimize import linear_sum_assignment

        if self.single:
            return np.zeros(1, dtype=np.int64), np.full(1, np.nan)
        common = np.zeros((len(self.known), len(net.labels)), dtype=np.int64)
        np.add.at(common, (self.place, found), 1)
        jaccard = common / np.maximum(common.sum(1, keepdims=True) + common.sum(0) - common, 1)
        partner = np.full(len(self.known), -1)
        if self.named:
            theirs = {c: j for j, c in enumerate(net.labels.tolist())}
            partner[:] = [theirs.get(c, -1) for c in self.known.tolist()]
        else:
            # rows in common are whole numbers: similarity decides between matchings with equally many
            one, other = linear_sum_assignment(common + jaccard / (2 * len(partner)), maximize=True)
            partner[one] = np.where(common[one, other] > 0, other, -1)
        return partner, np.where(partner >= 0, jaccard[np.arange(len(partner)), partner], 0.0)


def places(labels: npt.NDArray[Any], known: npt.NDArray[Any]) -> Ints:
    """Position of every label among those known."""
    where = {c: i for i, c in enumerate(known.tolist())}
    unique, inverse = np.unique(labels, return_inverse=True)
    found: Ints = np.array([where[c] for c in unique.tolist()], dtype=np.int64)[inverse]
    return found


def take(table: Any, rows: Ints) -> Any:
    """Rows of a table of any kind."""
    from sklearn.utils import _safe_indexing

    return _safe_indexing(table, rows)


def signs_of(values: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """-1, 0 or 1 for each relevance (..., D), 0 where it is rounding."""
    size = np.abs(values)
    return np.where(size > _ROUNDING * size.sum(-1, keepdims=True), np.sign(values), 0).astype(np.int8)


def ranks_of(values: npt.NDArray[Any]) -> Ints:
    """1 for the largest magnitude along the last axis; equal ones share the better rank, zeros are last."""
    from scipy.stats import rankdata

    found = rankdata(-np.abs(values), method="min", axis=-1)
    ranks: Ints = np.where(signs_of(values) == 0, values.shape[-1], found).astype(np.int64)
    return ranks


def quantile(ranks: npt.NDArray[Any], q: float) -> Floats:
    """Along the first axis, zeros left out: an order statistic, since ranks are whole numbers."""
    if not 0 <= q <= 1:
        raise InputError("this is no quantile", expected="a number from 0 to 1", got=repr(q), fix="choose one")
    ordered = np.sort(ranks, axis=0)
    count = (ranks > 0).sum(0)
    # 0.95 of 20 is 19, whatever rounding says
    place = np.clip(np.ceil(q * count - 1e-9).astype(np.int64) - 1, 0, None) + len(ranks) - count
    found = np.take_along_axis(ordered, np.minimum(place, len(ranks) - 1)[None], 0)[0]
    return np.where(count > 0, found.astype(np.float64), np.nan)
