r"""ECQx: the cost of the level 0, scaled weight by weight with relevance.

With the relevance R of a tensor's weights, :math:`r = |R| / \max |R|`, the cost of
zero becomes

.. math:: \rho\, (r + 10^{-12})^\beta \bigl(w^2 + \lambda I_0\bigr), \qquad \rho = 2

and the other costs stay (D. Becking et al., "ECQx: Explainability-driven
quantization for low-bit and sparse DNNs", 2022; the formulas are those of the
published code). The exponent is chosen per tensor such that the share of zeros
:math:`s_x` lies within :math:`s_E - p \le s_x \le s_E`, with the share
:math:`s_E` without relevance.

A weight becomes zero iff :math:`\beta` is at least

.. math:: \beta^* = \ln(q / \rho) / \ln r, \qquad
          q = \min_{c \ne 0} \bigl((w - w_c)^2 + \lambda I_c\bigr) / (w^2 + \lambda I_0)

so the number of zeros at any :math:`\beta` is a count, and the exponent at which
the window is met is an order statistic: no search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.assignment import Levels, assign, borders
from lrp.errors import InputError

__all__ = ["MATCHES", "STATES", "ZeroCost", "exponents"]

MATCHES = ("p", "sparsity")
STATES = ("ok", "not_reached", "skipped")
_TINY = 1e-12
_LEAST = 1e-9  # the smallest exponent


@dataclass(frozen=True)
class ZeroCost:
    """How relevance acts on the cost of zero.

    Parameters
    ----------
    p : float
        Most sparsity that relevance may give back in a tensor, 0 to 1.
    match : {"p", "sparsity"}
        ``"p"``: the window of the published method, entered at the side that is
        nearest to the neutral exponent; tensors with no more zeros than ``p``
        are left to ECQ. ``"sparsity"``: as many zeros as without relevance,
        which then only says which weights they are.
    rho : float
        Factor on the cost of a weight of the largest relevance, above 1.
    normaliser : "max" or float
        What makes the relevance of a tensor 1 at most: its largest magnitude,
        or a quantile of the magnitudes (0.99), beyond which all count as 1.

    Raises
    ------
    InputError

    Examples
    --------
    >>> from compress.zero_cost import ZeroCost
    >>> ZeroCost(p=0.2).match
    'p'
    """

    p: float = 0.1
    match: str = "p"
    rho: float = 2.0
    normaliser: str | float = "max"

    def __post_init__(self) -> None:
        share = isinstance(self.normaliser, float) and 0 < self.normaliser < 1
        right = {
            "p": isinstance(self.p, (int, float)) and 0 <= self.p <= 1,
            "match": self.match in MATCHES,
            "rho": isinstance(self.rho, (int, float)) and 1 < self.rho < math.inf,
            "normaliser": self.normaliser == "max" or share,
        }
        for name, ok in right.items():
            if not ok:
                raise InputError(
                    f"{name} makes no sense",
                    expected="0 <= p <= 1, match 'p' or 'sparsity', rho > 1, normaliser 'max' or a share below 1",
                    got=f"{name}={getattr(self, name)!r}",
                    fix="change it",
                )

    def normalised(self, relevance: Tensor) -> Tensor:
        """Magnitudes from 0 to 1; relevance that is 0 everywhere stays so."""
        size = relevance.abs()
        if self.normaliser == "max":
            return size / (size.max() + _TINY)
        rank = max(1, math.ceil(float(self.normaliser) * size.numel()))
        top = size.reshape(-1).kthvalue(rank).values
        return (size / (torch.where(top > 0, top, size.max()) + _TINY)).clamp_(max=1)

    def settings(self) -> dict[str, Any]:
        return dict(vars(self))

    def assign(
        self, levels: Levels, bits: Tensor, lambdas: Tensor, weights: Sequence[Tensor], relevance: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[float], list[str]]:
        """Positions of the levels, exponents, and how each tensor fared.

        Parameters
        ----------
        levels, bits, lambdas
            As in :func:`compress.assignment.borders`.
        weights, relevance : sequences of T tensors
            Of equal shapes.

        Returns
        -------
        positions : list of LongTensor
        beta : list of float
        states : list of str
            ``"ok"``; ``"not_reached"``: the window lies beyond an exponent of
            1, or between ties; ``"skipped"``: too few zeros for relevance to
            act, or relevance that is 0 everywhere.
        """
        cells = borders(levels, bits, lambdas, without_zero=True)
        price = torch.where(lambdas[:, None] == 0, 0.0, lambdas[:, None] * bits)
        thresholds, positions, plain, start = [], [], [], []
        for t, (w, r) in enumerate(zip(weights, relevance, strict=True)):
            at = assign(w, cells[t])
            own, cost = levels.values[t].to(w.dtype), price[t].to(w.dtype)
            zero = levels.zero[t]
            other = (w - own[at]).square_().add_(cost[at])
            none = w.square().add_(cost[zero])
            share = self.normalised(r.to(w.dtype))
            thresholds.append(_thresholds(other, none, share, self.rho))
            positions.append(at)
            plain.append((none <= other).sum())
            start.append(share.mean())
        found = exponents(thresholds, torch.stack(plain), torch.stack(start), self)
        for t, (beta, state) in enumerate(zip(*found, strict=True)):
            keep = thresholds[t] > (beta if state != "skipped" else 0.0)
            if state == "skipped":  # as without relevance
                positions[t] = assign(weights[t], borders_of(levels, bits, lambdas, t))
            else:
                positions[t] = torch.where(keep, positions[t], levels.zero[t])
        return positions, *found


def borders_of(levels: Levels, bits: Tensor, lambdas: Tensor, t: int) -> Tensor:
    """Borders of one tensor's cells, zero among them."""
    one = slice(t, t + 1)
    part = Levels(levels.values[one], levels.real[one], levels.zero[one], levels.low[one])
    return borders(part, bits[one], lambdas[one])[0]


def _thresholds(other: Tensor, none: Tensor, share: Tensor, rho: float) -> Tensor:
    """The exponents from which on the weights are zero."""
    gain = torch.log(other / none / rho)  # none = 0: infinite, zero at any exponent
    size = torch.log(share + _TINY)
    below = size < 0
    at = gain / torch.where(below, size, -1.0)
    # of the largest relevance: the factor is rho at any exponent
    at = torch.where(below, at, torch.where(gain >= 0, -torch.inf, torch.inf))
    return torch.where(torch.isnan(at), -torch.inf, at)  # w = 0 on a level that costs nothing


def exponents(
    thresholds: Sequence[Tensor], plain: Tensor, mean: Tensor, how: ZeroCost
) -> tuple[list[float], list[str]]:
    r"""The exponent of every tensor.

    Parameters
    ----------
    thresholds : sequence of T tensors
        :math:`\beta^*` of every weight.
    plain : Tensor (T,)
        Zeros without relevance.
    mean : Tensor (T,)
        Of the normalised relevance; the search begins at
        :math:`-\ln \rho / \ln \bar r`, where average relevance is neutral.
    how : ZeroCost

    Returns
    -------
    beta, states : lists
    """
    start = (-math.log(how.rho) / torch.log(mean.double().clamp(_TINY, 1 - 1e-9))).clamp(_LEAST, 1.0)
    now = torch.stack([(t <= b.to(t.dtype)).sum() for t, b in zip(thresholds, start, strict=True)])
    rows = torch.stack([plain, now]).tolist()
    begin, means = start.tolist(), mean.tolist()
    beta, states = [], []
    for t, (zeros, count) in enumerate(zip(*rows, strict=True)):
        n = thresholds[t].numel()
        least = zeros if how.match == "sparsity" else math.ceil(zeros - how.p * n)
        if means[t] == 0 or zeros == 0 or (how.match == "p" and zeros <= how.p * n):
            beta.append(0.0)
            states.append("skipped")
            continue
        if least <= count <= zeros:
            beta.append(begin[t])
            states.append("ok")
            continue
        rank = least if count < least else zeros
        wanted = float(thresholds[t].reshape(-1).kthvalue(max(1, rank)).values)
        chosen = min(1.0, max(_LEAST, wanted))
        reached = int((thresholds[t] <= chosen).sum())
        beta.append(chosen)
        states.append("ok" if least <= reached <= zeros else "not_reached")
    return beta, states
