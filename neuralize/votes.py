r"""Pools that count votes: duels of linear scores, and k nearest neighbours."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrp.errors import ConvergenceError
from neuralize.heads import Request, distinct
from neuralize.pools import Pool, Sharing, softmin
from neuralize.units import Picked

__all__ = ["NeighbourPool", "ScorePool"]


class ScorePool(Pool):
    r"""Duels of scores, one unit per pair of classes: :math:`f_c = \min_{k \ne c} F_{ck}`.

    Support vector machines whose kernel is a function of the dot product. A row
    without a class that wins all its duels is decided by votes, as in libsvm,
    and noted as "votes".

    Parameters
    ----------
    pairs : array (P, 2)
        The class a positive score votes for, and the other.
    intercepts : array (P,)
    break_ties : bool
        See :class:`neuralize.kernel_pools.DuelPool`.

    Examples
    --------
    >>> ScorePool([[1, 0]], [0.5])(torch.tensor([[-1.0]], dtype=torch.float64)).tolist()
    [[-1.5, 1.5]]
    """

    rules = ("auto", "undivided")
    residual_names = ("intercept",)
    pairs: Tensor
    intercepts: Tensor
    where: Tensor
    sign: Tensor

    def __init__(self, pairs: npt.ArrayLike, intercepts: npt.ArrayLike, break_ties: bool = False) -> None:
        super().__init__()
        couples = np.array(pairs, dtype=np.int64)
        self.clusters, self.break_ties = int(couples.max()) + 1, break_ties
        where = np.zeros((self.clusters, self.clusters), dtype=np.int64)
        sign = np.zeros((self.clusters, self.clusters))
        for p, (i, j) in enumerate(couples):
            where[i, j] = where[j, i] = p
            sign[i, j], sign[j, i] = 1.0, -1.0
        intercept = np.array(intercepts, dtype=np.float64)
        for name, array in (("pairs", couples), ("intercepts", intercept), ("where", where), ("sign", sign)):
            self.register_buffer(name, torch.tensor(array))

    def duels(self, costs: Tensor) -> Tensor:
        """F_ck (N, K, K), infinite on the diagonal."""
        values = self.intercepts - costs
        full = values[:, self.where] * self.sign
        return torch.where(torch.eye(self.clusters, dtype=torch.bool, device=costs.device), math.inf, full)

    def forward(self, costs: Tensor) -> Tensor:
        return self.duels(costs).amin(2)

    def decide(self, costs: Tensor) -> Tensor:
        return decide_by_votes(self.duels(costs), self.pairs, self.break_ties)

    def share(self, costs: Tensor, request: Request) -> Sharing:
        duels = self.duels(costs)
        decided = decide_by_votes(duels, self.pairs, self.break_ties)
        target, h, p = duelled(duels, decided, request)
        output = torch.where(p > 0, p * h, 0.0).sum(1)
        signed = p * self.sign[target]
        rho = torch.zeros_like(costs).scatter_add_(1, self.where[target], -signed)
        no = torch.zeros_like(target, dtype=torch.bool)
        notes = {"votes": duels.amin(2).amax(1) <= 0} if self.clusters > 2 else {}
        return Sharing(rho, output, {"intercept": -(rho @ self.intercepts)}, target, decided, p, no, notes=notes)

    def extra_repr(self) -> str:
        return f"{len(self.pairs)} duels, f_c = min over k != c of F_ck"


def duelled(duels: Tensor, decided: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Target (N,), its duels h (N, K) and the shares (N, K) of the one competitor, or of the nearest."""
    target = decided if request.target is None else request.target
    distinct(target, request.contrast)
    h = duels[torch.arange(len(duels), device=duels.device), target]
    if request.contrast is None:
        return target, h, softmin(h, math.inf)
    return target, h, torch.zeros_like(h).scatter_(1, request.contrast[:, None], 1.0)


def decide_by_votes(duels: Tensor, pairs: Tensor, break_ties: bool, values: Tensor | None = None) -> Tensor:
    """Positions (N,) as libsvm and scikit-learn decide.

    Parameters
    ----------
    duels : Tensor (N, K, K)
        Positive where the first class wins.
    pairs : Tensor (P, 2)
    break_ties : bool
        By the confidence of ``decision_function_shape="ovr"``.
    values : Tensor (N, K, K), optional
        The estimator's own values of the duels, where these are others.
    """
    own = torch.eye(duels.shape[1], dtype=torch.bool, device=duels.device)
    if duels.shape[1] == 2:
        # libsvm decides by the negated value: 0 goes to the positive side
        first, second = pairs[0].tolist()
        return torch.where(duels[:, first, second] >= 0, first, second)
    # a tie is a vote for the second class of the pair; scikit-learn, which breaks ties itself, gives it to the first
    upper = torch.triu(torch.ones_like(own), 1)
    won = torch.where(upper != break_ties, duels > 0, duels >= 0) & ~own
    votes = won.sum(2).to(duels.dtype)
    if break_ties:
        total = torch.where(own, 0.0, duels if values is None else values).sum(2)
        votes = votes + total / (3 * (total.abs() + 1))
    return votes.argmax(1)


class NeighbourPool(Pool):
    r"""Majority of the k nearest, any number of classes, as order statistics.

    With :math:`d_c^{(j)}` the j-th smallest distance to class c, infinite
    beyond its members, and :math:`\tau` halfway between the k-th and the
    (k+1)-th of all,

    .. math:: g_{cc'} = \max_{j \le k} \min(\tau - d_c^{(j)},\; d_{c'}^{(j)} - \tau) > 0

    iff c has more votes than c', and :math:`f_c = \min_{c'} g_{cc'}`. Every
    argument is half a sum of two linear pair units, so nothing is left over.
    Derived here.

    Parameters
    ----------
    classes : array (M,)
        Class of every training row.
    k : int

    Raises
    ------
    ConvergenceError
        k equals the number of training rows: the vote is constant.

    Examples
    --------
    >>> pool = NeighbourPool([0, 0, 1], 1)
    >>> pool(torch.tensor([[1.0, 5.0, 3.0]], dtype=torch.float64)).tolist()
    [[1.0, -1.0]]
    """

    rules = ("auto", "midpoint", "undivided", "gi", "hybrid")
    residual_names = ()
    members: Tensor
    eta = 0.8  # of "hybrid"; Bley et al. 2025

    def __init__(self, classes: npt.ArrayLike, k: int) -> None:
        super().__init__()
        y = np.array(classes, dtype=np.int64)
        self.clusters, self.k = int(y.max()) + 1, int(k)
        if self.clusters < 2:
            raise ConvergenceError(
                "one class only: it has no competitor",
                expected="two classes or more",
                got="1",
                fix="fit with rows of other classes",
            )
        if self.k >= len(y):
            raise ConvergenceError(
                "k equals the number of training rows: every row gets the same vote",
                expected=f"n_neighbors < {len(y)}",
                got=str(k),
                fix="fit with a smaller n_neighbors",
            )
        self.register_buffer("members", torch.tensor(y))
        for c in range(self.clusters):
            self.register_buffer(f"class_{c}", torch.tensor(np.flatnonzero(y == c)))

    def _ranks(self, costs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Distances (N, K, k) and members of every class by rank, and the two members (N, 2) around tau."""
        two = costs.topk(self.k + 1, dim=1, largest=False)
        around = two.indices[:, -2:]
        tau = two.values[:, -2:].mean(1)
        values, indices = [], []
        for c in range(self.clusters):
            mine = getattr(self, f"class_{c}")
            found = costs[:, mine].topk(min(self.k, len(mine)), dim=1, largest=False)
            missing = self.k - found.values.shape[1]
            values.append(torch.nn.functional.pad(found.values, (0, missing), value=math.inf))
            indices.append(torch.nn.functional.pad(mine[found.indices], (0, missing)))
        return torch.stack(values, 1), torch.stack(indices, 1), around, tau

    @staticmethod
    def _arguments(d: Tensor, tau: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tau - d and d - tau, (N, K, k)."""
        return tau[:, None, None] - d, d - tau[:, None, None]

    def forward(self, costs: Tensor) -> Tensor:
        d, _, _, tau = self._ranks(costs)
        near, far = self._arguments(d, tau)
        logits = []
        for c in range(self.clusters):
            g = torch.minimum(near[:, c : c + 1], far).amax(2)
            rivals = [k for k in range(self.clusters) if k != c]
            logits.append(g[:, rivals].amin(1))
        return torch.stack(logits, 1)

    def decide(self, costs: Tensor) -> Tensor:
        nearest = costs.topk(self.k, dim=1, largest=False).indices
        votes = torch.zeros(len(costs), self.clusters, dtype=costs.dtype, device=costs.device)
        votes.scatter_add_(1, self.members[nearest], torch.ones_like(nearest, dtype=costs.dtype))
        return votes.argmax(1)

    def default_beta(self, rule: str, contrast: bool) -> float:
        return math.inf

    def share(self, costs: Tensor, request: Request) -> Sharing:
        d, index, around, tau = self._ranks(costs)
        near, far = self._arguments(d, tau)
        decided = self.decide(costs)
        target = decided if request.target is None else request.target
        distinct(target, request.contrast)
        row = torch.arange(len(costs), device=costs.device)
        inner = torch.minimum(near[row, target][:, None], far)  # (N, K, k)
        g, rank = inner.max(2)
        g = g.scatter(1, target[:, None], math.inf)
        rival = g.argmin(1) if request.contrast is None else request.contrast
        output = g[row, rival]
        j = rank[row, rival]
        # the smaller argument decides: the own member, or the rival's
        own = near[row, target, j] <= far[row, rival, j]
        member = torch.where(own, index[row, target, j], index[row, rival, j])
        sign = torch.where(own, 1.0, -1.0).to(costs.dtype)
        units = torch.cat([around, member[:, None]], 1)
        weight = sign[:, None] * costs.new_tensor([0.5, 0.5, -1.0])
        p = torch.zeros_like(g).scatter_(1, rival[:, None], 1.0)
        no = torch.zeros_like(target, dtype=torch.bool)
        distance = {"gi": 0.0, "hybrid": self.eta}.get(request.rule, 1.0)
        tied = {"votes": self.forward(costs).amax(1) <= 0}
        return Sharing(Picked(units, weight), output, {}, target, decided, p, no, distance, tied)

    def extra_repr(self) -> str:
        return f"majority of the {self.k} nearest of {len(self.members)}, {self.clusters} classes"
