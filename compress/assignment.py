r"""Entropy-constrained assignment (ECQ) of weights to the levels of their codebooks.

The cost of level c for a weight w is

.. math:: (w - w_c)^2 + \lambda I_c, \qquad I_c = -\log_2 P_c

with the probabilities :math:`P_c` of rounding to the nearest level, that of zero
at least one half (D. Becking, "Finding storage- and compute-efficient
convolutional neural networks", thesis, 2020, equations 4.4 and 4.15; the bound is
that of the published code). Less :math:`w^2`, each cost is a line in w, so the
cells of the best assignment are intervals: their borders are found once per
tensor, and a weight costs one binary search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codebook import Codebook

__all__ = ["LAMBDA_RULES", "Levels", "assign", "borders", "information", "lambda_limit", "size_factor"]

LAMBDA_RULES = ("thesis", "max", "released")
_LARGEST_CROSS = 2**22  # entries of a table of crossings at a time


@dataclass(frozen=True, eq=False)
class Levels:
    """Codebooks of several tensors side by side, in float64; those with fewer levels are padded.

    Attributes
    ----------
    values : Tensor (T, K)
        Ascending; levels beyond a codebook's last go on in its steps.
    real : BoolTensor (T, K)
        Which belong to the codebook.
    zero : LongTensor (T,)
        Position of the level 0.
    low : tuple of int
        Index k of the first level.
    """

    values: Tensor
    real: Tensor
    zero: Tensor
    low: tuple[int, ...]

    @classmethod
    def of(cls, books: Sequence[Codebook]) -> Levels:
        """Of codebooks with one step each."""
        device = books[0].step.device
        wide = max(book.size for book in books)
        place = torch.arange(wide, dtype=torch.float64, device=device)
        low = tuple(book.low for book in books)
        first = torch.tensor(low, dtype=torch.float64, device=device)
        step = torch.stack([book.step for book in books]).double()
        size = torch.tensor([book.size for book in books], device=device)
        return cls((first[:, None] + place) * step[:, None], place < size[:, None], -first.long(), low)

    @property
    def count(self) -> int:
        return self.values.shape[1]

    def counts(self, positions: Sequence[Tensor]) -> Tensor:
        """How often each position occurs in each tensor, (T, K) int64."""
        out = torch.zeros(self.values.shape, dtype=torch.int64, device=self.values.device)
        for row, at in zip(out, positions, strict=True):
            row.scatter_add_(0, at.reshape(-1), torch.ones_like(at.reshape(-1)))
        return out


def information(levels: Levels, counts: Tensor) -> tuple[Tensor, Tensor]:
    r"""Probabilities and information content of the levels.

    Parameters
    ----------
    levels : Levels
    counts : Tensor (T, K)
        Weights nearest to each level.

    Returns
    -------
    probabilities, bits : Tensor (T, K)
        :math:`P_0 \ge 1/2`, the others scaled to a sum of 1;
        :math:`-\log_2 P_c`, infinite for an empty level.

    Examples
    --------
    >>> import torch
    >>> from compress.assignment import Levels, information
    >>> from compress.codebook import Codebook
    >>> levels = Levels.of([Codebook(torch.tensor(1.0), -1, 1)])
    >>> information(levels, torch.tensor([[3, 2, 3]]))[0]
    tensor([[0.2500, 0.5000, 0.2500]], dtype=torch.float64)
    """
    p = counts.double() / counts.sum(1, keepdim=True)
    zero = levels.zero[:, None]
    own = p.gather(1, zero)
    scaled = torch.where(own < 0.5, p * (0.5 / (1 - own)), p)
    p = scaled.scatter(1, zero, own.clamp(min=0.5))
    return p, -p.log2()


def lambda_limit(levels: Levels, bits: Tensor, smallest: Tensor, largest: Tensor, rule: str = "thesis") -> Tensor:
    r"""The multiplier at which the outermost weight of one sign becomes zero, (T,).

    .. math:: \lambda_n = \frac{w_{\min}^2 - (w_{\min} - w_n)^2}{I_n - I_0}

    with the level :math:`w_n` nearest to the smallest weight, and alike
    :math:`\lambda_p` for the largest (thesis, 4.12 and 4.13).

    Parameters
    ----------
    levels : Levels
    bits : Tensor (T, K)
        From :func:`information`.
    smallest, largest : Tensor (T,)
        Of the weights.
    rule : {"thesis", "max", "released"}
        ``"thesis"``: the smaller of the two, so that below it every sign that a
        tensor had stays (4.14). ``"max"``: the larger. ``"released"``: the
        larger with the numerators of the published code,
        :math:`((w_n - w_{\min})^2 - |w_{\min}|)^2` and
        :math:`((w_p - w_{\max})^2 + w_{\max})^2`, which do not scale as a
        squared weight; for reproduction only.

    Notes
    -----
    A side whose outermost weight is nearest to 0 is left out; without any side,
    and where the level costs no more than 0, the limit is 0.
    """
    ends = torch.stack([smallest, largest], 1).double()  # (T, 2)
    at = _nearest(levels, ends)
    level, cost, none = levels.values.gather(1, at), bits.gather(1, at), bits.gather(1, levels.zero[:, None])
    if rule == "released":
        distance = (level - ends).square()
        gain = (distance + torch.stack([-ends[:, 0].abs(), ends[:, 1]], 1)).square()
    else:
        gain = ends.square() - (ends - level).square()
    limit = gain / (cost - none)
    own = (at != levels.zero[:, None]) & torch.isfinite(limit)
    if rule == "thesis":
        found = torch.where(own, limit, torch.inf).amin(1)
    else:
        found = torch.where(own, limit, -torch.inf).amax(1)
    return torch.where(own.any(1), found, 0.0)


def _nearest(levels: Levels, w: Tensor) -> Tensor:
    """Positions of the nearest real levels, for few numbers per tensor."""
    far = (w[:, :, None] - levels.values[:, None, :]).abs()
    return torch.where(levels.real[:, None, :], far, torch.inf).argmin(2)


def size_factor(sizes: Sequence[int], offset: float = 0.05) -> list[float]:
    r""":math:`\delta = (N / N_{\max} + s) / (1 + s)` of every tensor: small ones are spared (thesis, 4.9)."""
    largest = max(sizes)
    return [(n / largest + offset) / (1 + offset) for n in sizes]


def borders(levels: Levels, bits: Tensor, lambdas: Tensor, *, without_zero: bool = False) -> Tensor:
    r"""Borders between the cells of the cheapest levels.

    Parameters
    ----------
    levels : Levels
    bits : Tensor (T, K)
    lambdas : Tensor (T,)
        Where 0, the information plays no part, that of empty levels included.
    without_zero : bool
        Cells of the levels but 0.

    Returns
    -------
    Tensor (T, K - 1), float64
        Ascending. The cheapest level of w is the one at the position that is
        the number of borders below w; levels that are nowhere the cheapest have
        equal borders on both sides.

    Notes
    -----
    Lines :math:`-2 w w_c + b_c` of ascending :math:`w_c` cross at
    :math:`t_{c'c''}`; a level above c is the cheapest iff w is beyond
    :math:`\min_{c'' > c} \max_{c' \le c} t_{c'c''}`. O(T K^2).
    """
    price = lambdas[:, None] * bits
    price = torch.where(lambdas[:, None] == 0, 0.0, price)
    offset = torch.where(levels.real, levels.values.square() + price, torch.inf)
    if without_zero:
        offset = offset.scatter(1, levels.zero[:, None], torch.inf)
    rows = max(1, _LARGEST_CROSS // levels.count**2)
    starts = range(0, len(offset), rows)
    return torch.cat([_crossings(levels.values[i : i + rows], offset[i : i + rows]) for i in starts])


def _crossings(values: Tensor, offset: Tensor) -> Tensor:
    apart = values[:, None, :] - values[:, :, None]  # [t, c', c''] = w_c'' - w_c'
    count = values.shape[1]
    later = torch.ones(count, count, dtype=torch.bool, device=values.device).triu(1)
    cross = (offset[:, None, :] - offset[:, :, None]) / (2 * torch.where(later, apart, 1.0))
    # a line at infinity loses to every other, also to one of its kind before it
    cross = torch.where(torch.isinf(offset)[:, :, None], -torch.inf, cross)
    above = torch.where(later, cross, -torch.inf).cummax(1).values
    return torch.where(later, above, torch.inf).amin(2)[:, :-1]


def assign(w: Tensor, border: Tensor) -> Tensor:
    """Positions of the cheapest levels of the weights, int64, in the shape of ``w``; on a border the lower one.

    Examples
    --------
    >>> import torch
    >>> from compress.assignment import Levels, assign, borders, information
    >>> from compress.codebook import Codebook
    >>> levels = Levels.of([Codebook(torch.tensor(1.0), -1, 1)])
    >>> w = torch.tensor([-0.9, -0.6, 0.1, 0.2, 0.6, 0.9])
    >>> bits = information(levels, torch.tensor([[2, 2, 2]]))[1]
    >>> [assign(w, borders(levels, bits, torch.tensor([x]).double())[0]).tolist() for x in (0.0, 0.4)]
    [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 2]]
    """
    return torch.bucketize(w, border.to(w.dtype))
