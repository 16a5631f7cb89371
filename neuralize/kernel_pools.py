r"""Pools of kernel machines: log-sum-exp over weighted members, and duels between two of them.

A kernel expansion with positive and negative coefficients is a duel,

.. math:: F = S^+ - S^-, \quad S^\pm = \sum_{\pm\alpha_j>0} |\alpha_j| e^{-\gamma d_j} + v^\pm, \quad
          g = \log S^+ - \log S^- ,

with :math:`\mathrm{sign}\, g = \mathrm{sign}\, F`. A constant v is one more
member at the row itself (distance 0). With :math:`a_j = \log|\alpha_j| - \gamma
d_j` and :math:`p` the softmax of :math:`\log|\alpha_j| - \beta d_j` on each side,

.. math:: g = \gamma \Big[\sum_j p^-_j d_j - \sum_i p^+_i d_i\Big]
          + \big[\textstyle\sum p^+\log|\alpha| - \sum p^-\log|\alpha|\big]
          + \big[H(p^+) - H(p^-) + \mathrm{KL}^+ - \mathrm{KL}^-\big] ,

KL being that of p from the softmax of a; for :math:`\beta = \infty` all of p is
on the largest a. F itself is :math:`\Lambda g`,
:math:`\Lambda` the logarithmic mean of :math:`S^+` and :math:`S^-`. Source: Bley
et al. 2025, arXiv 2508.03913, for the two pools and the rules; the constants'
bookkeeping, :math:`\Lambda` and the many-class form are derived here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrp.errors import ConvergenceError
from neuralize.heads import Request, distinct
from neuralize.pools import HardPool, Pool, Sharing, entropy, expectation, softmin
from neuralize.votes import decide_by_votes, duelled

__all__ = ["DensityPool", "DuelPool", "RKHSPool", "logarithmic_mean"]


# so many pairs of members are held at once
_PAIRS = 2**21


def logarithmic_mean(plus: Tensor, minus: Tensor) -> Tensor:
    """:math:`(S^+-S^-)/(\\log S^+-\\log S^-)` from the two logarithms, > 0; the common value where they agree.

    Examples
    --------
    >>> round(float(logarithmic_mean(torch.tensor(math.log(4.0)), torch.tensor(math.log(2.0)))), 6)
    2.88539
    """
    g = plus - minus
    size = g.abs()
    safe = torch.where(size < 1e-8, 1.0, size)
    factor = torch.where(size < 1e-8, 1 - size / 2, -torch.expm1(-safe) / safe)
    return torch.exp(torch.maximum(plus, minus)) * factor


@dataclass(frozen=True)
class _Side:
    """One side of a duel: members and their log-weights; the constant, if any, comes last."""

    members: Tensor
    log: Tensor
    virtual: bool

    def exponents(self, costs: Tensor, gamma: float | Tensor) -> Tensor:
        """a (N, m): log-weights minus gamma times distance."""
        a = self.log[: len(self.members)] - gamma * costs[:, self.members]
        if not self.virtual:
            return a
        return torch.cat([a, self.log[-1:].expand(costs.shape[0], 1)], 1)


class DuelPool(Pool):
    r"""Duels of every pair of classes: :math:`f_c = \min_{k \ne c} g_{ck}`.

    :math:`f_c > 0` iff c wins all its duels, and then c is decided. Where no
    class does, votes decide, as in libsvm; such rows are noted as "votes".

    Parameters
    ----------
    coefficients : array (P, M)
        Of every duel.
    constants : array (P, 2)
        Its constants :math:`v^+` and :math:`v^-`, >= 0.
    pairs : array (P, 2)
        The class its positive side stands for, and the other.
    gamma : float
    break_ties : bool
        Decide rows without a winner by confidence, as
        ``SVC(break_ties=True)`` does, instead of by the lowest class.
    eta : float
        Share of the midpoint rule in "hybrid".
    scale : float
        The logits are ``scale * g``.

    Raises
    ------
    ConvergenceError
        A side without members: its duel is always won by the other.

    Notes
    -----
    One pass over the M members per duel they belong to, O(N M K).

    Examples
    --------
    >>> pool = DuelPool([[2.0, -1.0]], [[0.0, 0.0]], [[1, 0]], gamma=1.0)
    >>> pool(torch.tensor([[0.0, 0.0]], dtype=torch.float64)).round(decimals=4).tolist()
    [[-0.6931, 0.6931]]
    """

    rules = ("auto", "midpoint", "undivided", "gi", "hybrid")
    residual_names = ("pools", "weights", "intercept")
    own_stiffness = True
    coefficients: Tensor
    rate: Tensor
    log_constants: Tensor
    pairs: Tensor
    where: Tensor
    sign: Tensor

    def __init__(
        self,
        coefficients: npt.ArrayLike,
        constants: npt.ArrayLike,
        pairs: npt.ArrayLike,
        gamma: float,
        break_ties: bool = False,
        eta: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        A, v = np.array(coefficients, dtype=np.float64), np.array(constants, dtype=np.float64)
        couples = np.array(pairs, dtype=np.int64)
        self.gamma, self.break_ties, self.eta, self.scale = float(gamma), break_ties, float(eta), float(scale)
        # as a tensor too: exporters round numbers in the graph to single precision
        self.register_buffer("rate", torch.tensor(self.gamma, dtype=torch.float64))
        self.clusters = int(couples.max()) + 1
        where = np.zeros((self.clusters, self.clusters), dtype=np.int64)
        sign = np.zeros((self.clusters, self.clusters))
        for p, (i, j) in enumerate(couples):
            where[i, j] = where[j, i] = p
            sign[i, j], sign[j, i] = 1.0, -1.0
        for name, array in (("coefficients", A), ("pairs", couples), ("where", where), ("sign", sign)):
            self.register_buffer(name, torch.tensor(array))
        for p in range(len(A)):
            for side, sign_ in ((0, 1), (1, -1)):
                members = np.flatnonzero(sign_ * A[p] > 0)
                self.register_buffer(f"members_{p}_{side}", torch.tensor(members))
                self.register_buffer(f"log_{p}_{side}", torch.tensor(np.log(np.abs(A[p][members]))))
        self._set_constants(v)

    def extra_repr(self) -> str:
        return f"{len(self.pairs)} duels of log-sum-exp pools, gamma = {self.gamma:.4g}, f_c = min over k != c of g_ck"

    def _set_constants(self, constants: npt.NDArray[np.float64]) -> None:
        """Constants (P, 2) of the sides; which of them exist is part of the graph, so no tensor."""
        for p, (a, v) in enumerate(zip(self.coefficients, constants, strict=True)):
            for there, constant in ((bool((a > 0).any()), v[0]), (bool((a < 0).any()), v[1])):
                if not there and not constant > 0:
                    raise ConvergenceError(
                        "one side of a duel has no members and no constant: the other always wins",
                        expected="support vectors on both sides, or an intercept",
                        got=f"coefficients of one sign only in duel {self.pairs[p].tolist()}",
                        fix="fit with more data or other parameters; for a regression set another reference value",
                    )
        self._virtual = [[bool(v > 0) for v in pair] for pair in constants]
        with np.errstate(divide="ignore"):
            logs = torch.tensor(np.log(constants))
        self.register_buffer("log_constants", logs.to(self.coefficients))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._virtual = self.log_constants.isfinite().tolist()

    def _sides(self, p: int) -> tuple[_Side, _Side]:
        found = []
        for side in (0, 1):
            members, log = getattr(self, f"members_{p}_{side}"), getattr(self, f"log_{p}_{side}")
            virtual = self._virtual[p][side]
            if virtual:
                log = torch.cat([log, self.log_constants[p, side : side + 1]])
            found.append(_Side(members, log, virtual))
        return found[0], found[1]

    def logs(self, costs: Tensor) -> Tensor:
        """log S+ and log S- of every duel, (N, P, 2)."""
        columns = [
            torch.stack([torch.logsumexp(side.exponents(costs, self.rate), 1) for side in self._sides(p)], 1)
            for p in range(len(self.pairs))
        ]
        return torch.stack(columns, 1)

    def _duels(self, logs: Tensor) -> Tensor:
        """g_ck (N, K, K), infinite on the diagonal."""
        g = logs[:, :, 0] - logs[:, :, 1]
        full = self.scale * g[:, self.where] * self.sign
        diagonal = torch.eye(self.clusters, dtype=torch.bool, device=g.device)
        return torch.where(diagonal, math.inf, full)

    def forward(self, costs: Tensor) -> Tensor:
        return self._duels(self.logs(costs)).amin(2)

    def decide(self, costs: Tensor) -> Tensor:
        return self._decide(self.logs(costs))

    def _decide(self, logs: Tensor) -> Tensor:
        values = None
        if self.break_ties:
            gaps = torch.exp(logs[:, :, 0]) - torch.exp(logs[:, :, 1])
            values = gaps[:, self.where] * self.sign
        return decide_by_votes(self._duels(logs), self.pairs, self.break_ties, values)

    def default_beta(self, rule: str, contrast: bool) -> float:
        return self.gamma

    def share(self, costs: Tensor, request: Request) -> Sharing:
        logs = self.logs(costs)
        duels = self._duels(logs)
        decided = self._decide(logs)
        target, _, competitors = duelled(duels, decided, request)
        sharing = self._expand(costs, logs, target, decided, competitors, request)
        if self.clusters > 2:
            undecided = duels.amin(2).amax(1) <= 0
            sharing = replace(sharing, notes={"votes": undecided})
        return sharing

    def _expand(
        self, costs: Tensor, logs: Tensor, target: Tensor, decided: Tensor, competitors: Tensor, request: Request
    ) -> Sharing:
        rho = torch.zeros_like(costs)
        zero = torch.zeros_like(costs[:, 0])
        parts = {name: zero.clone() for name in self.residual_names}
        output = zero.clone()
        for p in range(len(self.pairs)):
            first, second = self.pairs[p].tolist()
            weight = self._weight(target, competitors, first, second)
            rows = torch.nonzero(weight)[:, 0]
            if not len(rows):
                continue
            w = weight[rows] * self.scale
            plus, minus = logs[rows, p, 0], logs[rows, p, 1]
            if request.output == "decision":
                w = weight[rows] * logarithmic_mean(plus, minus)
            output[rows] += w * (plus - minus)
            for side, sign, log_sum in zip(self._sides(p), (1.0, -1.0), (plus, minus), strict=True):
                self._expand_side(costs[rows], side, sign * w, log_sum, request.beta, rows, rho, parts)
        divided = torch.zeros_like(target, dtype=torch.bool)
        return Sharing(rho, output, parts, target, decided, competitors, divided, self._distance(request.rule))

    def _distance(self, rule: str) -> float:
        return {"gi": 0.0, "hybrid": self.eta}.get(rule, 1.0)

    @staticmethod
    def _weight(target: Tensor, competitors: Tensor, first: int, second: int) -> Tensor:
        """Signed share of the duel (first, second) in every row, (N,)."""
        for_first = torch.where(target == first, competitors[:, second], 0.0)
        for_second = torch.where(target == second, competitors[:, first], 0.0)
        return for_first - for_second

    def _expand_side(
        self,
        costs: Tensor,
        side: _Side,
        w: Tensor,
        log_sum: Tensor,
        beta: float,
        rows: Tensor,
        rho: Tensor,
        parts: dict[str, Tensor],
    ) -> None:
        """Add ``w * log S`` of one side to the shares and parts."""
        a = side.exponents(costs, self.gamma)
        # beta: the stiffness of the shares; gamma is the model's
        p = torch.softmax(side.exponents(costs, beta), 1) if math.isfinite(beta) else softmin(-a, math.inf)
        m = len(side.members)
        rho[rows[:, None], side.members] += -self.gamma * w[:, None] * p[:, :m]
        parts["weights"][rows] += w * (p[:, :m] @ side.log[:m])
        if side.virtual:
            parts["intercept"][rows] += w * p[:, -1] * side.log[-1]
        # log S = sum p a + H(p) + KL(p | softmax a) = sum p a - sum p log p + sum p (log p - a + log S)
        pool = entropy(p) if beta == self.gamma else entropy(p) + _divergence(p, a - log_sum[:, None])
        parts["pools"][rows] += w * pool


def _divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p | q) over the last dimension."""
    return expectation(p, p.clamp(min=torch.finfo(p.dtype).tiny).log() - log_q)


def _lost(costs: Tensor) -> Tensor:
    """Distances (N, 1) that are lost in the rounding of squared norms: nothing can be divided by them."""
    return (2e-6 if costs.dtype == torch.float64 else 1e-2) * costs.mean(1, keepdim=True)


class DensityPool(Pool):
    r"""One soft minimum over members: how far a row lies from all of them.

    .. math:: o = -\tfrac1\gamma \log\sum_j w_j e^{-\gamma d_j}
              = \sum_j p_j d_j + \tfrac1\gamma \mathrm{KL}(p\|w), \quad \sum_j w_j = 1

    grows with the distance from the data. Source: Kauffmann et al. 2020
    (arXiv 1805.06230); the undivided form is derived here.

    Parameters
    ----------
    weights : array (M,)
        > 0; they are normalised.
    gamma : float
    threshold : float, optional
        Two logits, :math:`\pm(o - o_0)`, outlier first. Without it one logit,
        ``-gamma * o + constant``: a log density.
    constant : float
        Log normaliser of that density.
    mass : float
        Sum of the weights as given by the estimator, for its own decision value.

    Notes
    -----
    "divided" gives unit j the share :math:`p_j o / d_j`, and no entropy is left
    over; a unit that the row (nearly) coincides with keeps its share as residual,
    "coinciding".

    Examples
    --------
    >>> pool = DensityPool([1.0, 1.0], 1.0, threshold=0.5)
    >>> pool(torch.tensor([[2.0, 2.0]], dtype=torch.float64)).tolist()
    [[1.5, -1.5]]
    """

    rules = ("auto", "undivided", "divided")
    own_stiffness = True
    log: Tensor
    rate: Tensor
    offset: Tensor

    def __init__(
        self,
        weights: npt.ArrayLike,
        gamma: float,
        threshold: float | None = None,
        constant: float = 0.0,
        mass: float = 1.0,
    ) -> None:
        super().__init__()
        w = np.array(weights, dtype=np.float64)
        with np.errstate(divide="ignore"):
            self.register_buffer("log", torch.tensor(np.log(w / w.sum())))
        self.gamma, self.threshold, self.constant, self.mass = float(gamma), threshold, float(constant), float(mass)
        # as tensors too: exporters round numbers in the graph to single precision
        self.register_buffer("rate", torch.tensor(self.gamma, dtype=torch.float64))
        self.register_buffer(
            "offset", torch.tensor(self.constant if threshold is None else float(threshold), dtype=torch.float64)
        )
        self.clusters = 1 if threshold is None else 2
        self.residual_names = ("pool", "coinciding", "normaliser" if threshold is None else "threshold")

    def outlyingness(self, costs: Tensor) -> Tensor:
        """o (N,)."""
        return -torch.logsumexp(self.log - self.rate * costs, 1) / self.rate

    def forward(self, costs: Tensor) -> Tensor:
        o = self.outlyingness(costs)
        if self.threshold is None:
            return (self.offset - self.rate * o)[:, None]
        return torch.stack([o - self.offset, self.offset - o], 1)

    def decide(self, costs: Tensor) -> Tensor:
        if self.threshold is None:
            return torch.zeros(len(costs), dtype=torch.long, device=costs.device)
        # libsvm: an inlier if its decision value is > 0
        return (self.outlyingness(costs) < self.threshold).long()

    def default_beta(self, rule: str, contrast: bool) -> float:
        return self.gamma

    def share(self, costs: Tensor, request: Request) -> Sharing:
        o = self.outlyingness(costs)
        decided = self.decide(costs)
        target = decided if request.target is None else request.target
        distinct(target, request.contrast)
        beta = request.beta
        a = self.log - self.gamma * costs
        p = torch.softmax(self.log - beta * costs, 1) if math.isfinite(beta) else softmin(-a, math.inf)
        kept = torch.zeros_like(o)
        if request.rule == "divided":
            share = p * o[:, None]
            here = costs <= _lost(costs)
            kept = torch.where(here, share, 0.0).sum(1)
            units = torch.where(here, 0.0, share / torch.where(here, 1.0, costs))
            pool = torch.zeros_like(o)
        else:
            units = p
            # o = sum p d + KL(p | w) / gamma, less KL(p | softmax a) / gamma where beta is not gamma
            pool = _divergence(p, self.log.expand_as(p)) / self.gamma
            if beta != self.gamma:
                pool = pool - _divergence(p, a - torch.logsumexp(a, 1, keepdim=True)) / self.gamma
        if self.threshold is None:
            factor, rest, name = torch.full_like(o, -self.gamma), torch.full_like(o, self.constant), "normaliser"
            output = factor * o + rest
        else:
            factor = torch.where(target == 0, 1.0, -1.0).to(o)
            if request.output == "decision":
                # F = mass (e^{-gamma o} - e^{-gamma o_0}) = Lambda * (-gamma) (o - o_0)
                level = torch.full_like(o, self.threshold)
                factor = factor * self.mass * self.gamma * logarithmic_mean(-self.gamma * o, -self.gamma * level)
            rest, name = -factor * self.threshold, "threshold"
            output = factor * (o - self.threshold)
        parts = {"pool": factor * pool, "coinciding": factor * kept, name: rest}
        competitors = torch.zeros(len(o), self.clusters, dtype=o.dtype, device=o.device)
        if self.clusters == 2:
            competitors.scatter_(1, 1 - target[:, None], 1.0)
        divided = torch.full_like(target, request.rule == "divided", dtype=torch.bool)
        return Sharing(factor[:, None] * units, output, parts, target, decided, competitors, divided)

    def extra_repr(self) -> str:
        what = "log density" if self.threshold is None else f"o - {self.threshold:.4g} and its negative"
        return f"{what}, o = -log(sum w exp(-gamma d)) / gamma, gamma = {self.gamma:.4g}"


class RKHSPool(Pool):
    r"""Kernel k-means: :math:`f_c = \min_{k \ne c} h_{ck}`, decided as by distances in feature space.

    With cluster sums :math:`s_k^\pm` over the members' kernels, by the sign of
    their weights, and squared norms :math:`n_k` of the centres,

    .. math:: h_{ck} = \tfrac1\gamma\big[\log(s_c^+ + s_k^- + n_k/2) - \log(s_k^+ + s_c^- + n_c/2)\big],

    positive iff :math:`|\Phi(x)-m_c|^2 < |\Phi(x)-m_k|^2`. Mind the crossing:
    the own pool holds the *competitor's* :math:`n_k/2`. Derived here;
    neuralization of the density form :math:`s_k` alone: Kauffmann et al. 2024.

    Parameters
    ----------
    weights : array (K, M)
        Weight of every member in every cluster's centre; of either sign.
    norms : array (K,)
        :math:`n_k`.
    gamma : float

    Notes
    -----
    "undivided" costs O(N M); "divided" pairs every own member with every
    competing one, O(N N_c N_k), as :math:`q_i p_j/(d_j - d_i)`, which is
    ill-conditioned where distances nearly agree: it is stabilised by a
    fiftieth of the median :math:`|d_j - d_i|`, at least 2e-6 of the mean
    distance (float32: 1e-2), and what that takes is a part of the residual.

    Examples
    --------
    >>> pool = RKHSPool([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0], gamma=1.0)
    >>> pool(torch.tensor([[0.0, 9.0]], dtype=torch.float64)).round(decimals=3).tolist()
    [[1.098, -1.098]]
    """

    rules = ("auto", "undivided", "divided", "midpoint")
    residual_names = ("competition", "pools", "weights", "norms", "stabiliser")
    margin: Tensor
    weights: Tensor
    norms: Tensor
    rate: Tensor
    default_beta = HardPool.default_beta
    refer = HardPool.refer

    def __init__(self, weights: npt.ArrayLike, norms: npt.ArrayLike, gamma: float) -> None:
        super().__init__()
        n = np.array(norms, dtype=np.float64)
        self.clusters, self.gamma = len(n), float(gamma)
        if self.clusters < 2:
            raise ConvergenceError(
                "K = 1: the logit f_c = min over k != c is a minimum over nothing",
                expected="at least two clusters",
                got="1",
                fix="fit two clusters or more; for the density of a single group use KernelDensity",
            )
        W = np.array(weights, dtype=np.float64)
        self.register_buffer("weights", torch.tensor(W))
        for k, row in enumerate(W):
            self.register_buffer(f"plus_{k}", torch.tensor(np.flatnonzero(row > 0)))
            self.register_buffer(f"minus_{k}", torch.tensor(np.flatnonzero(row < 0)))
        self.register_buffer("norms", torch.tensor(n))
        self.register_buffer("rate", torch.tensor(self.gamma, dtype=torch.float64))
        self.register_buffer("margin", torch.tensor(math.nan, dtype=torch.float64))

    def extra_repr(self) -> str:
        return f"f_c = min over k != c of h_ck in feature space, {self.clusters} clusters, gamma = {self.gamma:.4g}"

    def _members(self, k: int, sign: int) -> Tensor:
        return getattr(self, f"{'plus' if sign > 0 else 'minus'}_{k}")  # type: ignore[no-any-return]

    def _exponents(self, costs: Tensor, k: int, sign: int) -> tuple[Tensor, Tensor]:
        """Members (m,) of a cluster with weights of a sign, and their exponents (N, m)."""
        members = self._members(k, sign)
        return members, (sign * self.weights[k, members]).log() - self.rate * costs[:, members]

    def _sums(self, costs: Tensor) -> tuple[Tensor, Tensor]:
        """log s+ and log s- of every cluster, each (N, K); -inf where there are none."""
        both = []
        for sign in (1, -1):
            columns = []
            for k in range(self.clusters):
                members, a = self._exponents(costs, k, sign)
                empty = torch.full_like(costs[:, 0], -math.inf)
                columns.append(torch.logsumexp(a, 1) if len(members) else empty)
            both.append(torch.stack(columns, 1))
        return both[0], both[1]

    def _duels(self, costs: Tensor) -> tuple[Tensor, Tensor]:
        """h_ck (N, K, K), infinite on the diagonal, and the logarithms U_ck (N, K, K) of c's own pool against k."""
        plus, minus = self._sums(costs)
        half = (self.norms / 2).log()
        own = torch.logaddexp(plus[:, :, None], torch.logaddexp(minus, half)[:, None, :])
        h = (own - own.transpose(1, 2)) / self.rate
        diagonal = torch.eye(self.clusters, dtype=torch.bool, device=costs.device)
        return torch.where(diagonal, math.inf, h), own

    def forward(self, costs: Tensor) -> Tensor:
        return self._duels(costs)[0].amin(2)

    def share(self, costs: Tensor, request: Request) -> Sharing:
        duels, own = self._duels(costs)
        logits = duels.amin(2)
        decided = logits.argmax(1)
        target = decided if request.target is None else request.target
        distinct(target, request.contrast)
        row = torch.arange(len(costs), device=costs.device)
        h = duels[row, target]
        divided = torch.full_like(target, request.rule == "divided", dtype=torch.bool)
        if request.contrast is not None:
            P = torch.zeros_like(h).scatter_(1, request.contrast[:, None], 1.0)
            output = h.gather(1, request.contrast[:, None])[:, 0]
            competition = torch.zeros_like(output)
        else:
            output = h.amin(1)
            P = softmin(h, math.inf if request.rule == "midpoint" else request.beta)
            competition = torch.zeros_like(output) if request.rule == "divided" else output - expectation(P, h)
        rho = torch.zeros_like(costs)
        parts = {name: torch.zeros_like(output) for name in self.residual_names}
        parts["competition"] = competition
        for c in torch.unique(target).tolist():
            for k in range(self.clusters):
                rows = torch.nonzero((target == c) & (P[:, k] > 0))[:, 0]
                if k == c or not len(rows):
                    continue
                sides = self._pool(costs[rows], c, k, own[rows, c, k]), self._pool(costs[rows], k, c, own[rows, k, c])
                if request.rule == "divided":
                    carried = P[rows, k] * output[rows]
                    # the pairs of all rows at once would not fit
                    step = max(1, _PAIRS // max(1, sides[0][1].shape[1] * sides[1][1].shape[1]))
                    for n in range(0, len(rows), step):
                        some = slice(n, n + step)
                        cut = tuple((members, p[some], log) for members, p, log in sides)
                        self._divide(costs[rows[some]], cut, carried[some], rows[some], rho, parts)
                    continue
                for (members, p, log), sign in zip(sides, (1.0, -1.0), strict=True):
                    w = sign * P[rows, k] / self.gamma
                    self._add(rho, rows, members, -self.gamma * w[:, None] * p[:, :-1])
                    parts["weights"][rows] += w * (p[:, :-1] @ log[:-1])
                    # a centre without any landmark nearby has norm 0: no share of no weight
                    parts["norms"][rows] += w * torch.where(p[:, -1] > 0, p[:, -1] * log[-1], 0.0)
                    parts["pools"][rows] += w * entropy(p)
        return Sharing(rho, output, parts, target, decided, P, divided)

    def _pool(self, costs: Tensor, c: int, k: int, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c's own pool against k: members (m,), shares (n, m + 1), the norm's last, and log-weights (m + 1,)."""
        mine, a = self._exponents(costs, c, 1)
        theirs, b = self._exponents(costs, k, -1)
        half = (self.norms[k] / 2).log()
        exponents = torch.cat([a, b, half.expand(len(costs), 1)], 1)
        log = torch.cat([self.weights[c, mine].log(), (-self.weights[k, theirs]).log(), half[None]])
        return torch.cat([mine, theirs]), torch.exp(exponents - log_sum[:, None]), log

    @staticmethod
    def _add(rho: Tensor, rows: Tensor, members: Tensor, shares: Tensor) -> None:
        """Add shares (n, m); a landmark may be on both signs' lists of a side."""
        block = rho[rows]
        rho[rows] = block.index_add_(1, members, shares)

    def _divide(
        self,
        costs: Tensor,
        sides: tuple[tuple[Tensor, Tensor, Tensor], ...],
        carried: Tensor,
        rows: Tensor,
        rho: Tensor,
        parts: dict[str, Tensor],
    ) -> None:
        """Pairs of an own member i and a competing one j get q_i p_j of what the duel carries."""
        (own, q, _), (rival, p, _) = sides
        none = torch.zeros_like(costs[:, :1])
        d_own, d_rival = torch.cat([costs[:, own], none], 1), torch.cat([costs[:, rival], none], 1)
        D = d_rival[:, :, None] - d_own[:, None, :]
        # at a member of one of two small clusters the median may be 0, but for rounding
        lost = _lost(costs[:, torch.cat([own, rival])])[:, 0]
        epsilon = torch.maximum(D.abs().flatten(1).median(1).values / 50, lost)
        inverse = torch.where(D == 0, 0.0, D / (D.square() + epsilon.square()[:, None, None]))
        G = carried[:, None, None] * p[:, :, None] * q[:, None, :] * inverse
        self._add(rho, rows, rival, G.sum(2)[:, :-1])
        self._add(rho, rows, own, -G.sum(1)[:, :-1])
        parts["stabiliser"][rows] += carried - (G * D).sum((1, 2))
