r"""First layers: units that are sums over columns.

A unit j has a cost :math:`c_j(z) = \sum_t \tau_{jt}(z)`: a squared distance to
a prototype, a quadratic form, a linear function. Pools turn costs into logits
(:mod:`neuralize.pools`) and, to explain one, into signed shares
:math:`\rho_j`; the columns then receive :math:`R_t = \sum_j \rho_j \tau_{jt}(z)`.

Every term is bilinear, a displacement times a covector,
:math:`\tau_{jt} = \delta_{jt} g_{jt}`. Behind a linear map :math:`z = Tx + t_0`
with right inverse L the columns of x receive
:math:`(L\delta_j)_i (T'g_j)_i`, which has the same sum; for a squared distance
that is :math:`v_i (T'Tv)_i` with :math:`v = \hat x - L(u_j)`, and
:math:`\hat x = L(z)` is the part of x that the model sees. A
:class:`neuralize.frames.Block` holds L and T'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrp.errors import RuleError, UnsupportedEstimatorError
from neuralize.frames import Block, Frame

__all__ = [
    "Line",
    "Picked",
    "ProductDistances",
    "QuadraticForms",
    "SquaredDistances",
    "Units",
]


@dataclass(frozen=True)
class Picked:
    """Signed shares of few units per row.

    Parameters
    ----------
    index : LongTensor (N, r)
        Positions of the units; repeated positions add up.
    weight : Tensor (N, r)
    """

    index: Tensor
    weight: Tensor

    def dense(self, units: int) -> Tensor:
        """The same as (N, M)."""
        empty = self.weight.new_zeros(len(self.weight), units)
        return empty.scatter_add_(1, self.index, self.weight)


Shares = Tensor | Picked


@dataclass(frozen=True)
class Line:
    """How the relevance of a block's coordinates moves with them: R = slope (x - point).

    Parameters
    ----------
    slope, point : Tensor (N, m)
        In the coordinates the block leads to. ``point`` is NaN where no value
        is neutral; of two neutral values it is the one nearer to the row.
    """

    slope: Tensor
    point: Tensor


class Units(nn.Module):
    """Costs that are sums over columns.

    Attributes
    ----------
    features, count : int
        d and M.
    rest_name : str
        Name of the residual part that :meth:`rest` returns.
    careful : bool
        Whether the costs are compared with each other; set by the head.
    """

    features: int
    count: int
    rest_name: ClassVar[str] = ""
    careful: bool = False

    def forward(self, z: Tensor) -> Tensor:
        """Costs (N, M) of rows (N, d)."""
        raise NotImplementedError

    def relative(self, z: Tensor) -> Tensor:
        """Costs (N, M) up to a number per row that all units share.

        For pools that only compare costs: their differences keep the digits the
        common part would take.
        """
        return self(z)  # type: ignore[no-any-return]

    def compared(self, z: Tensor, own: Tensor | None = None) -> Tensor:
        """As :meth:`relative`, from differences of the units themselves: as exact as :meth:`spread`.

        For explanations, whose sums have to meet the output. No fixed graph.

        Parameters
        ----------
        z : Tensor (N, d)
        own : LongTensor (N,), optional
            The unit whose cost is taken from the others'; by default the smallest.
        """
        return self.relative(z)

    def spread(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Relevance (N, D) of the raw columns, and what falls on constant columns (N,).

        Parameters
        ----------
        z : Tensor (N, d)
        rho : Tensor (N, M) or Picked
        frame : Frame
        distance : float
            Share of the distance form of squared distances; the rest is the
            product form. Other units have one form.
        target : LongTensor (N,), optional
            The explained class, for units that are expanded pair by pair.
        """
        return gathered(frame, [self._spread(z, rho, b, distance) for b in frame.parts()])

    def rest(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> Tensor | None:
        """What of ``sum rho_j c_j`` no column carries (N,), or None."""
        return None

    def lines(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> list[Line]:
        """One line per block."""
        return [self._line(z, rho, block, distance) for block in frame.parts()]

    def _spread(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Tensor:
        """Relevance (N, m) of the coordinates the block leads to."""
        raise NotImplementedError

    def _line(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Line:
        raise NotImplementedError


def gathered(frame: Frame, parts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Relevance (N, D) of the raw columns, and of constants (N,), from that of each block (N, m)."""
    total: Tensor | None = None
    lost: Tensor | None = None
    for block, R in zip(frame.parts(), parts, strict=True):
        rest, part = block.lost(R), block.gather(R)
        if rest is not None:
            lost = rest if lost is None else lost + rest
        total = part if total is None else total + part
    assert total is not None
    return total, lost


def cut(t: Tensor, block: Block) -> Tensor:
    """The coordinates of z, in the last dimension, that a block takes."""
    return t if block.index is None else t[..., block.index]


def back(t: Tensor, block: Block) -> Tensor:
    """Displacements L t of a block's coordinates."""
    return t if block.inverse is None else t @ block.inverse.T


def down(t: Tensor, block: Block) -> Tensor:
    """Covectors T' t of a block's coordinates."""
    return t if block.transpose is None else t @ block.transpose.T


def origin(centre: Tensor, block: Block) -> Tensor:
    """The point L(centre) in the coordinates the block leads to."""
    point = back(cut(centre, block), block)
    return point if block.shift is None else point + block.shift


def total(rho: Tensor) -> Tensor:
    """Sum (N, 1) of shares, exactly 0 where they are those of a contrast."""
    s = rho.sum(1, keepdim=True)
    rounding = 64 * torch.finfo(rho.dtype).eps * rho.abs().sum(1, keepdim=True)
    return torch.where(s.abs() <= rounding, 0.0, s)


def no_line(like: Tensor) -> Line:
    """Where relevance is no function of the column's own value."""
    return Line(torch.zeros_like(like), torch.full_like(like, math.nan))


def quadratic(a: Tensor, s: Tensor, p: Tensor, q: Tensor) -> Line:
    """The line through R = s a^2 - 2 p a + q at a, and its neutral value next to a.

    Stable for s -> 0, where it is the line -2 p a + q.
    """
    s = s.expand_as(a)
    # a perfect square, as of a single prototype, is zero to within rounding
    square = p.square()
    discriminant = square - s * q
    discriminant = torch.where(discriminant.abs() <= 8 * torch.finfo(a.dtype).eps * square, 0.0, discriminant)
    t = p + torch.where(p < 0, -1.0, 1.0) * discriminant.clamp(min=0).sqrt()
    near, far = q / t, t / s
    near = torch.where((t == 0) & (s != 0), 0.0, near)
    use_far = far.isfinite() & (~near.isfinite() | ((a - far).abs() < (a - near).abs()))
    point = torch.where(use_far, far, near)
    slope = torch.where(use_far, s * (a - near), s * a - t)
    none = (discriminant < 0) | ~point.isfinite() | ((s == 0) & (p == 0))
    return Line(torch.where(none, 0.0, slope), torch.where(none, math.nan, point))


def _centre(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The median, rounded so that float32 holds it exactly; a column on which all agree becomes exactly 0."""
    middle: npt.NDArray[np.float64] = np.median(points, axis=0)
    with np.errstate(over="ignore"):
        single = middle.astype(np.float32).astype(np.float64)
    centre = np.where(np.isfinite(single), single, middle)
    return np.where((points == points[0]).all(0), points[0], centre)


class SquaredDistances(Units):
    r"""Costs :math:`|z-u_j|^2`.

    Prototypes and rows are centred first: distances are translation invariant,
    floating-point numbers are not.

    Parameters
    ----------
    points : array (M, d)

    Notes
    -----
    With :math:`s = \sum_j \rho_j` the relevance is
    :math:`s z^2 - 2z(\rho U) + \rho U^2`: two products, O(N M d). Where costs
    are compared and prototypes lie much closer to each other than to the
    centre, these would lose digits: then terms are differences from the row's
    own prototype r,
    :math:`(z-u_j)^2 - (z-u_r)^2 = (u_r-u_j)(2z-u_j-u_r)`, one by one.
    A pair that is compared is a linear unit, zero on its midpoint, and goes
    back through projections as one.

    The product form, :math:`2z(sz - \rho U)`, is gradient times input; it depends
    on the origin, and :meth:`rest` is what it leaves.

    Examples
    --------
    >>> units = SquaredDistances(np.array([[0.0, 0.0], [3.0, 4.0]]))
    >>> units(torch.zeros(1, 2, dtype=torch.float64)).tolist()
    [[0.0, 25.0]]
    """

    rest_name: ClassVar[str] = "origin"
    centre: Tensor
    points: Tensor
    norms: Tensor
    mates: Tensor | None

    def __init__(self, points: npt.ArrayLike) -> None:
        super().__init__()
        u = np.array(points, dtype=np.float64)
        centre = _centre(u)
        self.count, self.features = u.shape
        self.register_buffer("centre", torch.tensor(centre))
        self.register_buffer("points", torch.tensor(u - centre))
        self.register_buffer("norms", torch.tensor(((u - centre) ** 2).sum(1)))
        self.register_buffer("mates", None)
        self._lost: float | None = None

    def pair(self, mates: Tensor) -> None:
        """Say which unit (M,) each is compared with; otherwise all are with the target's."""
        self.mates = mates

    def forward(self, z: Tensor) -> Tensor:
        x = z - self.centre
        products = torch.addmm(self.norms, x, self.points.T, alpha=-2)
        return (products + x.square().sum(1, keepdim=True)).clamp(min=0)

    def relative(self, z: Tensor) -> Tensor:
        return torch.addmm(self.norms, z - self.centre, self.points.T, alpha=-2)

    def compared(self, z: Tensor, own: Tensor | None = None) -> Tensor:
        costs = self.relative(z)
        if not self._delicate(z.dtype):
            return costs
        own = costs.argmin(1) if own is None else own
        return torch.cat([(gap * (u + v)).sum(2) for _, gap, u, v in self._differences(z, own, Block())], 1)

    def _delicate(self, dtype: torch.dtype) -> bool:
        """Whether differences of costs would lose too many digits."""
        if self._lost is None:
            u, self._lost = self.points.double(), 0.0
            norms = u.square().sum(1)
            for point, norm in zip(u, norms, strict=True):
                gaps = (u - point).square().sum(1)
                lost = torch.where(gaps > 0, torch.maximum(norms, norm) / gaps, 0.0)
                self._lost = max(self._lost, float(lost.max()))
        return torch.finfo(dtype).eps * self._lost > (1e-11 if dtype == torch.float64 else 1e-5)

    def _differences(self, z: Tensor, own: Tensor, block: Block) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Of some units at a time: which, u_r - u_j, z - u_j and z - u_r, (N, m, d_b) or (N, 1, d_b)."""
        x, u = cut(z - self.centre, block), cut(self.points, block)
        mine = u[own][:, None]
        step = max(1, 2**22 // max(1, x.numel()))
        for start in range(0, self.count, step):
            some = slice(start, min(start + step, self.count))
            yield some, mine - u[some], x[:, None] - u[some], x[:, None] - mine

    def _views(self, z: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a = L z, b = T'z, and the same of the prototypes, about the centre."""
        x, u = cut(z - self.centre, block), cut(self.points, block)
        return back(x, block), down(x, block), back(u, block), down(u, block)

    def _spread(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Tensor:
        if isinstance(rho, Picked):
            u = (z - self.centre)[:, None, :] - self.points[rho.index]
            u = cut(u, block)
            w = rho.weight[:, :, None]
            R = (w * back(u, block) * down(u, block)).sum(1)
            return R if distance == 1 else distance * R + (1 - distance) * self._products(z, rho, block)
        if self.careful and self._delicate(z.dtype):
            R = self._spread_carefully(z, rho, block)
        else:
            a, b, A, B = self._views(z, block)
            R = (rho @ (A * B)).sub_(a * (rho @ B))
            R.sub_(a * (rho @ B) if block.inverse is None else b * (rho @ A))
            R.addcmul_(total(rho) * a, b)
        if self.careful and not block.proportional:
            R = R + self._as_pairs(z, rho, block)
        return R if distance == 1 else distance * R + (1 - distance) * self._products(z, rho, block)

    def _as_pairs(self, z: Tensor, rho: Tensor, block: Block) -> Tensor:
        """From distances to the linear units of pairs, 2 T'(u_i - u_j) L(z - m_ij); 0 where L is a multiple of T'."""
        a, b, A, B = self._views(z, block)
        if self.mates is None:
            own = rho.argmin(1)
            found = (b - B[own]) * (rho @ A) - (a - A[own]) * (rho @ B)
        else:
            ahead, C, D = rho.clamp(min=0), A[self.mates], B[self.mates]
            found = b * (ahead @ (A - C)) - a * (ahead @ (B - D)) + ahead @ (B * C - A * D)
        return torch.where(total(rho) == 0, found, 0.0)

    def _spread_carefully(self, z: Tensor, rho: Tensor, block: Block) -> Tensor:
        R = None
        # the unit that costs count against: a row's own prototype
        for some, gap, u, v in self._differences(z, rho.argmin(1), block):
            if R is None:
                R = (total(rho)[:, :, None] * back(v, block) * down(v, block))[:, 0]
            away = back(gap, block) * down(u, block) + back(v, block) * down(gap, block)
            R = R + (rho[:, some, None] * away).sum(1)
        assert R is not None
        return R

    def _products(self, z: Tensor, rho: Shares, block: Block) -> Tensor:
        # about the origin of z, not about our centre: this form is defined by it
        points = cut(self.points + self.centre, block)
        u = (rho.weight[:, :, None] * points[rho.index]).sum(1) if isinstance(rho, Picked) else rho @ points
        s = rho.weight.sum(1, keepdim=True) if isinstance(rho, Picked) else total(rho)
        x = cut(z, block)
        return 2 * back(x, block) * down(s * x - u, block)

    def rest(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> Tensor | None:
        if distance == 1:
            return None
        whole = (self.points + self.centre).square().sum(1)
        weights = rho.weight if isinstance(rho, Picked) else rho
        norms = (weights * whole[rho.index]).sum(1) if isinstance(rho, Picked) else rho @ whole
        s = weights.sum(1) if isinstance(rho, Picked) else total(rho)[:, 0]
        return (1 - distance) * (norms - s * z.square().sum(1))

    def _line(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Line:
        a, _, A, _ = self._views(z, block)
        weights = rho.dense(self.count) if isinstance(rho, Picked) else rho
        if not block.proportional:
            if not self.careful:
                return no_line(a)
            slope = torch.where(total(weights) == 0, -2 * weights @ down(cut(self.points, block), block), 0.0)
            point = torch.where(slope == 0, math.nan, a - self._spread(z, rho, block, distance) / slope)
            return Line(slope, point + origin(self.centre, block))
        # b = a / kappa coordinate by coordinate
        ratio = 1.0 if block.inverse is None or block.transpose is None else _ratio(block)
        s = total(weights)
        p, q = weights @ A, weights @ A.square()
        middle = origin(self.centre, block)
        if distance == 1:
            line = quadratic(a, s, p, q)
            return Line(line.slope * ratio, line.point + middle)
        # the product form about the origin, 2 (a + m) (s (a + m) - P), written about the centre; m = L(centre) - L(0)
        moved, other = middle - origin(torch.zeros_like(self.centre), block), 1 - distance
        pulled = p + s * moved
        line = quadratic(
            a,
            distance * s + 2 * other * s,
            distance * p + other * (pulled - 2 * s * moved),
            distance * q + 2 * other * moved * (s * moved - pulled),
        )
        return Line(line.slope * ratio, line.point + middle)


def _ratio(block: Block) -> Tensor:
    """b / a per coordinate of a proportional block, (m,)."""
    assert block.inverse is not None
    assert block.transpose is not None
    top = (block.inverse * block.transpose).sum(1)
    low = block.inverse.square().sum(1)
    return torch.where(low > 0, top / low, 0.0)


_KERNELS = ("manhattan", "chi2", "l4")
_AT_ONCE = 16


class ProductDistances(Units):
    r"""Costs :math:`\sum_t d_t(z_t, u_{jt})` of other distances that are sums over columns.

    Parameters
    ----------
    points : array (M, d)
    distance : str
        "manhattan": :math:`|z_t-u_t|`; "chi2": :math:`(z_t-u_t)^2/(z_t+u_t)`
        (0 where both are 0); "l4": :math:`(z_t-u_t)^4`.

    Notes
    -----
    Additive already, so no root point is needed; relevance goes back through
    steps that keep columns apart only. O(N M d), memory one unit at a time.

    Examples
    --------
    >>> ProductDistances([[0.0, 0.0]], "manhattan")(torch.tensor([[3.0, -4.0]], dtype=torch.float64)).item()
    7.0
    """

    points: Tensor

    def __init__(self, points: npt.ArrayLike, distance: str) -> None:
        super().__init__()
        if distance not in _KERNELS:
            raise RuleError("unknown distance", expected=", ".join(_KERNELS), got=repr(distance), fix="choose one")
        self.distance = distance
        self.register_buffer("points", torch.tensor(np.array(points, dtype=np.float64)))
        self.count, self.features = self.points.shape

    def _terms(self, z: Tensor, u: Tensor) -> Tensor:
        gap = z - u
        if self.distance == "manhattan":
            return gap.abs()
        if self.distance == "l4":
            return gap.square().square()
        total = z + u
        return torch.where(total == 0, 0.0, gap.square() / torch.where(total == 0, 1.0, total))

    def forward(self, z: Tensor) -> Tensor:
        # a few units at a time: all at once would hold (N, M, d)
        return torch.cat([self._terms(z[:, None, :], u).sum(2) for u in torch.split(self.points, _AT_ONCE)], 1)

    def compared(self, z: Tensor, own: Tensor | None = None) -> Tensor:
        point = self.points[self(z).argmin(1) if own is None else own]
        return torch.cat([self._beyond(z, u, point).sum(2) for u in torch.split(self.points, _AT_ONCE)], 1)

    def _beyond(self, z: Tensor, u: Tensor, own: Tensor) -> Tensor:
        """Terms (N, m, d) of points u (m, d) less those of other points (N, d)."""
        z, own = z[:, None], own[:, None]
        apart = self._terms(z, u) - self._terms(z, own)
        if self.distance != "manhattan":
            return apart
        # on the same side of both the row does not matter, however far it is
        return torch.where((z > u) & (z > own), own - u, torch.where((z < u) & (z < own), u - own, apart))

    def spread(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if frame.mixes:
            raise UnsupportedEstimatorError(
                f"a {self.distance} distance has no exact way back through steps that mix columns",
                expected="steps that keep columns apart: scalers, encoders, imputers, selection",
                got="a projection in front",
                fix="use a Euclidean model behind PCA, or drop the projection",
            )
        if isinstance(rho, Picked):
            R = (rho.weight[:, :, None] * self._terms(z[:, None, :], self.points[rho.index])).sum(1)
        else:
            own = self.points[rho.argmin(1)]
            R = total(rho) * self._terms(z, own) if self.careful else torch.zeros_like(z)
            for w, u in zip(torch.split(rho, _AT_ONCE, 1), torch.split(self.points, _AT_ONCE), strict=True):
                terms = self._beyond(z, u, own) if self.careful else self._terms(z[:, None, :], u)
                R = R + (w[:, :, None] * terms).sum(1)
        return gathered(frame, [cut(R, b) for b in frame.parts()])

    def _line(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Line:
        x = cut(z, block)
        if self.distance != "manhattan" or isinstance(rho, Picked):
            return no_line(x)
        return _broken_line(x, rho, cut(self.points, block))


def _broken_line(z: Tensor, rho: Tensor, u: Tensor) -> Line:
    """Nearest zero of ``sum_j rho_j |z_t - u_jt|``, which is linear between the prototypes: (N, m)."""
    order = u.argsort(0)
    corners = u.gather(0, order)  # (M, m)
    # values at the corners, (N, M, m)
    heights = torch.einsum("nj,jkt->nkt", rho, (u[:, None] - corners[None]).abs())
    left, right = heights[:, :-1], heights[:, 1:]
    a, b = corners[:-1], corners[1:]
    crosses = (left * right <= 0) & (left != right)
    inside = torch.where(crosses, a + (b - a) * left / (left - right), math.nan)
    total = rho.sum(1)[:, None]
    total = torch.where(total.abs() <= 64 * torch.finfo(z.dtype).eps * rho.abs().sum(1)[:, None], 0.0, total)
    before = corners[0] + heights[:, 0] / total
    before = torch.where(before <= corners[0], before, math.nan)
    after = corners[-1] - heights[:, -1] / total
    after = torch.where(after >= corners[-1], after, math.nan)
    points = torch.cat([before[:, None], inside, after[:, None]], 1)
    gap = (points - z[:, None]).abs()
    gap = torch.where(gap.isfinite(), gap, math.inf)
    best, where = gap.min(1)
    point = torch.where(best.isfinite(), points.gather(1, where[:, None])[:, 0], math.nan)
    value = torch.einsum("nj,njt->nt", rho, (z[:, None] - u[None]).abs())
    slope = torch.where(point.isfinite() & (z != point), value / (z - point), 0.0)
    return Line(slope, point)


class QuadraticForms(Units):
    r"""Costs :math:`\tfrac12 u_j'P_ju_j + \sum_t c_{jt}`, :math:`u_j = z-\mu_j`: Gaussians up to a constant.

    Parameters
    ----------
    means : array (M, d)
    precisions : array (M, d) or (M, d, d)
        Diagonals, or full matrices.
    constants : array (M, d), optional
        Constants that belong to a column: the normaliser
        :math:`-\tfrac12\log P_{jtt}` of a diagonal Gaussian. Behind a projection
        they have no column, and :meth:`rest` returns them.

    Notes
    -----
    A diagonal costs O(N M d), a full matrix O(N M d^2). Terms
    :math:`\tfrac12 u_t(Pu)_t` are integrated gradients and exact Shapley values
    from the mean; single ones may be negative if P is full.

    Examples
    --------
    >>> units = QuadraticForms([[0.0, 0.0]], [[1.0, 4.0]])
    >>> units(torch.ones(1, 2, dtype=torch.float64)).item()
    2.5
    """

    rest_name: ClassVar[str] = "normaliser"
    means: Tensor
    precisions: Tensor
    constants: Tensor | None

    def __init__(self, means: npt.ArrayLike, precisions: npt.ArrayLike, constants: npt.ArrayLike | None = None) -> None:
        super().__init__()
        mu, P = np.array(means, dtype=np.float64), np.array(precisions, dtype=np.float64)
        self.count, self.features = mu.shape
        self.full = P.ndim == 3
        self.register_buffer("means", torch.tensor(mu))
        self.register_buffer("precisions", torch.tensor(P))
        self.register_buffer("constants", None if constants is None else torch.tensor(np.array(constants, np.float64)))

    @property
    def shared(self) -> bool:
        """Whether all units have the same diagonal, so that their differences are linear."""
        return not self.full and bool((self.precisions == self.precisions[0]).all())

    def forward(self, z: Tensor) -> Tensor:
        gaps = [z - mu for mu in self.means]
        costs = torch.stack([(u * _times(u, P)).sum(1) / 2 for u, P in zip(gaps, self.precisions, strict=True)], 1)
        return costs if self.constants is None else costs + self.constants.sum(1)

    def compared(self, z: Tensor, own: Tensor | None = None) -> Tensor:
        costs, whole = z.new_empty(len(z), self.count), Block()
        for rows, r in self._by_unit(self(z).argmin(1) if own is None else own):
            x = z[rows]
            for j in range(self.count):
                costs[rows, j] = 0.0 if j == r else self._beyond(x, j, r, whole).sum(1)
        return costs

    @staticmethod
    def _by_unit(own: Tensor) -> Iterator[tuple[Tensor, int]]:
        for r in torch.unique(own).tolist():
            yield torch.nonzero(own == r)[:, 0], r

    def _beyond(self, z: Tensor, j: int, r: int, block: Block) -> Tensor:
        """Terms (n, m) of unit j less those of unit r, whichever way loses fewer digits."""
        u, v, gap = z - self.means[j], z - self.means[r], (self.means[r] - self.means[j])[None]
        P, Q = self.precisions[j] / 2, self.precisions[r] / 2
        a, b, c = (back(cut(t, block), block) for t in (u, v, gap))

        def pull(t: Tensor, matrix: Tensor) -> Tensor:
            return down(cut(_times(t, matrix), block), block)

        # where the two agree, in a column that was constant in fit say, the row itself cancels
        near = a * pull(u, P - Q), c * pull(u, Q), b * pull(gap, Q)
        apart = _smaller(near, (a * pull(u, P), -b * pull(v, Q)))
        if self.constants is not None and block.inverse is None:
            apart = apart + cut(self.constants[j] - self.constants[r], block)
        return apart

    def _spread(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Tensor:
        assert isinstance(rho, Tensor)
        R = torch.zeros_like(back(cut(z, block), block))
        s = total(rho)
        for rows, r in self._by_unit(rho.argmin(1)):
            x = z[rows]
            v = x - self.means[r]
            own = back(cut(v, block), block) * down(cut(_times(v, self.precisions[r]), block), block) / 2
            if self.constants is not None and block.inverse is None:
                own = own + cut(self.constants[r], block)
            found = s[rows] * own
            for j in range(self.count):
                if j != r:
                    found = found + rho[rows, j, None] * self._beyond(x, j, r, block)
            R[rows] = found
        return R

    def rest(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> Tensor | None:
        assert isinstance(rho, Tensor)
        if self.constants is None:
            return None
        kept = [cut(self.constants, b) for b in frame.parts() if not b.mixes]
        left = self.constants.sum(1) - sum((k.sum(1) for k in kept), torch.zeros_like(self.constants[:, 0]))
        return rho @ left if frame.mixes else None

    def _line(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Line:
        assert isinstance(rho, Tensor)
        x = cut(z, block)
        if block.inverse is not None:
            return no_line(back(x, block))
        # in steps d from the row, the other columns held: R + slope d + curve d^2
        R, s = self._spread(z, rho, block, distance), total(rho)
        slope, curve = torch.zeros_like(x), torch.zeros_like(x)
        P = self.precisions.diagonal(dim1=1, dim2=2) if self.full else self.precisions
        # half of u_t (P u)_t changes by half of (P u)_t + P_tt u_t
        bent = (self.precisions + torch.diag_embed(P)) / 2 if self.full else self.precisions
        for rows, r in self._by_unit(rho.argmin(1)):
            v, w = z[rows] - self.means[r], rho[rows, :, None]
            slope[rows] = s[rows] * cut(_times(v, bent[r]), block)
            curve[rows] = s[rows] * cut(P[r], block) / 2
            for j in range(self.count):
                u, gap = z[rows] - self.means[j], (self.means[r] - self.means[j])[None]
                near = _times(u, bent[j] - bent[r]), _times(gap, bent[r])
                moved = _smaller(near, (_times(u, bent[j]), -_times(v, bent[r])))
                slope[rows] += w[:, j] * cut(moved, block)
                curve[rows] += w[:, j] * cut(P[j] - P[r], block) / 2
        tiny = (rho.abs() @ cut(P, block)) * 64 * torch.finfo(x.dtype).eps
        curve = torch.where(curve.abs() <= tiny, 0.0, curve)
        line = quadratic(torch.zeros_like(x), curve, -slope / 2, R)
        return Line(line.slope, x + line.point)


def _times(u: Tensor, P: Tensor) -> Tensor:
    """P u of rows u (n, d), for a matrix or a diagonal."""
    return u @ P if P.ndim == 2 else u * P


def _smaller(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Of two sums that are equal, element by element the one of smaller terms."""
    sums, sizes = [], []
    for terms in (one, other):
        value, size = terms[0], terms[0].abs()
        for term in terms[1:]:
            value, size = value + term, size + term.abs()
        sums.append(value)
        sizes.append(size)
    return torch.where(sizes[0] < sizes[1], sums[0], sums[1])
