"""The pair network of kernel k-means written out: every own member against every competing one, N_c x N_k x D numbers.

What :class:`neuralize.kernel_pools.RKHSPool` factorises, for measuring what that saves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.benchmarks.explain_models import blobs
from neuralize import KernelKMeans, neuralize
from neuralize.network import NeuralizedModel

RULES = ("divided", "undivided")


def case(members: int, columns: int, rows: int) -> tuple[NeuralizedModel, npt.NDArray[Any], PairNetwork]:
    """Two clusters of kernel k-means with so many members, rows of the first one (rows, columns), and its pairs."""
    X, _ = blobs(members + 8 * rows, columns, 2)
    fitted = KernelKMeans(2, algorithm="full", n_init=1, random_state=0).fit(X[:members])
    net = neuralize(fitted)
    fresh = X[members:]
    return net, fresh[fitted.predict(fresh) == 0][:rows], PairNetwork(fitted)


class PairNetwork:
    """Pair layer (N_k, N_c, D), own and competing pools, and relevance of one row of the first of two clusters.

    Parameters
    ----------
    fitted : KernelKMeans
        Of two clusters, ``kernel="rbf"``.
    """

    def __init__(self, fitted: KernelKMeans) -> None:
        points, weights = torch.tensor(fitted.support_vectors_), torch.tensor(fitted.dual_coef_)
        norms, self.gamma = torch.tensor(fitted.centre_norms_), float(fitted.gamma_)
        own, rival = torch.nonzero(weights[0])[:, 0], torch.nonzero(weights[1])[:, 0]
        self.u, self.v = points[own], points[rival]
        self.weight = 2 * (self.u[None] - self.v[:, None])
        self.middle = (self.u[None] + self.v[:, None]) / 2
        self.bias = (self.v**2).sum(1)[:, None] - (self.u**2).sum(1)
        # the last member of a pool is the other centre's norm, at distance 0
        self.log_own = torch.cat([weights[0, own].log(), (norms[1:] / 2).log()])
        self.log_rival = torch.cat([weights[1, rival].log(), (norms[:1] / 2).log()])

    @property
    def size(self) -> int:
        """Numbers in the pair layer."""
        return self.weight.numel()

    def explain(self, row: npt.NDArray[Any], rule: str) -> Tensor:
        """Relevance (D,) of a row (D,)."""
        x = torch.from_numpy(row)
        pairs = torch.einsum("jid,d->ji", self.weight, x) + self.bias
        away_u, away_v = (x - self.u) ** 2, (x - self.v) ** 2
        d_own, d_rival = (torch.cat([a.sum(1), torch.zeros(1, dtype=x.dtype)]) for a in (away_u, away_v))
        a, b = self.log_own - self.gamma * d_own, self.log_rival - self.gamma * d_rival
        q, p = torch.softmax(a, 0), torch.softmax(b, 0)
        share = p[:, None] * q
        if rule == "divided":
            gaps = torch.cat([torch.cat([pairs, d_rival[:-1, None]], 1), -d_own[None]])
            output = (torch.logsumexp(a, 0) - torch.logsumexp(b, 0)) / self.gamma
            epsilon = gaps.abs().flatten().median() / 50
            share = output * share * gaps / (gaps**2 + epsilon**2)
        values = (share[:-1, :-1, None] * self.weight * (x - self.middle)).sum((0, 1))
        return values + share[:-1, -1] @ away_v - share[-1, :-1] @ away_u


def exponent(members: list[int], seconds: list[float]) -> float:
    """Slope of log time over log members."""
    return float(np.polyfit(np.log(members), np.log(seconds), 1)[0])
