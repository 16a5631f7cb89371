r"""Units that are linear in the row, or a held factor times a linear one."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuralize.frames import Block, Frame
from neuralize.units import Line, Shares, Units, back, cut, down, gathered, origin, total

__all__ = ["DotUnits", "Hyperplanes", "LinearUnits"]


class LinearUnits(Units):
    r"""Costs :math:`-w_j\cdot(z-z_0)`.

    The relevance is :math:`-\rho_j w_{jt}(z_t-z_{0t})`: zero where a column has
    its value in the reference row :math:`z_0`. Constants are the pool's.

    Parameters
    ----------
    weights : array (M, d)
    start : array (d,), optional
        :math:`z_0`; the origin of z without it.

    Examples
    --------
    >>> LinearUnits([[1.0, -2.0]])(torch.tensor([[3.0, 1.0]], dtype=torch.float64)).item()
    -1.0
    """

    weights: Tensor
    start: Tensor

    def __init__(self, weights: npt.ArrayLike, start: npt.ArrayLike | None = None) -> None:
        super().__init__()
        w = np.array(weights, dtype=np.float64)
        self.count, self.features = w.shape
        self.register_buffer("weights", torch.tensor(w))
        self.register_buffer("start", torch.tensor(np.zeros(w.shape[1]) if start is None else np.array(start, float)))

    def forward(self, z: Tensor) -> Tensor:
        return -(z - self.start) @ self.weights.T

    def compared(self, z: Tensor, own: Tensor | None = None) -> Tensor:
        x, own = z - self.start, self(z).argmin(1) if own is None else own
        costs = x.new_empty(len(x), self.count)
        for r in torch.unique(own).tolist():
            rows = torch.nonzero(own == r)[:, 0]
            costs[rows] = x[rows] @ (self.weights[r] - self.weights).T
        return costs

    def _pull(self, rho: Tensor) -> Tensor:
        """sum_j rho_j w_j (N, d); where units are compared, from their differences."""
        if not self.careful:
            return rho @ self.weights
        pull, own, s = rho.new_empty(len(rho), self.features), rho.argmin(1), total(rho)
        for r in torch.unique(own).tolist():
            rows = torch.nonzero(own == r)[:, 0]
            pull[rows] = rho[rows] @ (self.weights - self.weights[r]) + s[rows] * self.weights[r]
        return pull

    def _spread(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Tensor:
        assert isinstance(rho, Tensor)
        pull = down(cut(self._pull(rho), block), block)
        return -back(cut(z - self.start, block), block) * pull

    def _line(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Line:
        assert isinstance(rho, Tensor)
        slope = -down(cut(self._pull(rho), block), block)
        return Line(slope, torch.where(slope == 0, math.nan, origin(self.start, block).expand_as(slope)))


class DotUnits(Units):
    r"""Costs :math:`-\sum_j a_{pj}\,\phi(t_j)`, :math:`t_j = \gamma u_j\cdot z + c_0`: kernels of a dot product.

    Written as :math:`\phi(t) = \psi(t)\,t`, with :math:`\psi = t^{q-1}` for the
    polynomial of degree q and :math:`\tanh(t)/t` for the sigmoid, every member
    is a linear unit times a factor that is held, as in LRP-0; the columns get
    :math:`\gamma z_t \sum_j a_j\psi_j u_{jt}` and :meth:`rest` is
    :math:`c_0 \sum_j a_j \psi_j`.

    Parameters
    ----------
    points : array (M, d)
    coefficients : array (P, M)
        One expansion per unit.
    kernel : str
        "poly" or "sigmoid".
    gamma, coef0 : float
    degree : int

    Examples
    --------
    >>> DotUnits([[1.0, 1.0]], [[2.0]], "poly", 1.0, 0.0, 2)(torch.tensor([[1.0, 2.0]], dtype=torch.float64)).tolist()
    [[-18.0]]
    """

    rest_name: ClassVar[str] = "kernel offset"
    points: Tensor
    coefficients: Tensor
    rate: Tensor
    shift: Tensor

    def __init__(
        self,
        points: npt.ArrayLike,
        coefficients: npt.ArrayLike,
        kernel: str,
        gamma: float,
        coef0: float,
        degree: int = 1,
    ) -> None:
        super().__init__()
        self.register_buffer("points", torch.tensor(np.array(points, dtype=np.float64)))
        self.register_buffer("coefficients", torch.tensor(np.array(coefficients, dtype=np.float64)))
        self.count, self.features = len(self.coefficients), self.points.shape[1]
        self.kernel, self.gamma, self.coef0, self.degree = kernel, float(gamma), float(coef0), int(degree)
        # as tensors too: exporters round numbers in the graph to single precision
        self.register_buffer("rate", torch.tensor(self.gamma, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(self.coef0, dtype=torch.float64))

    def _inner(self, z: Tensor) -> Tensor:
        return self.rate * (z @ self.points.T) + self.shift

    def _factor(self, t: Tensor) -> Tensor:
        if self.kernel == "sigmoid":
            return torch.where(t.abs() < 1e-6, 1 - t.square() / 3, torch.tanh(t) / torch.where(t == 0, 1.0, t))
        return t ** (self.degree - 1)

    def forward(self, z: Tensor) -> Tensor:
        t = self._inner(z)
        values = torch.tanh(t) if self.kernel == "sigmoid" else t**self.degree
        return -values @ self.coefficients.T

    def _held(self, z: Tensor, rho: Shares) -> Tensor:
        """Weights (N, M) of the members, with their factors held."""
        assert isinstance(rho, Tensor)
        return -(rho @ self.coefficients) * self._factor(self._inner(z))

    def _spread(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Tensor:
        pull = self.gamma * self._held(z, rho) @ cut(self.points, block)
        return back(cut(z, block), block) * down(pull, block)

    def rest(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> Tensor | None:
        return self.coef0 * self._held(z, rho).sum(1) if self.coef0 else None

    def _line(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Line:
        slope = down(self.gamma * self._held(z, rho) @ cut(self.points, block), block)
        start = origin(torch.zeros_like(z[0]), block)
        return Line(slope, torch.where(slope == 0, math.nan, start.expand_as(slope)))


# squared distance of two means, in standard deviations, below which it is rounding
_SAME = 1e-20


class Hyperplanes(Units):
    r"""Costs :math:`-(w_k\cdot(z-c)+b_k)` of classes whose borders are hyperplanes between known means.

    Relevance of a pair is expanded at the root point on its own border,

    .. math:: m_{ck} = \tfrac12(\mu_c+\mu_k) - \frac{h_{ck}(\tfrac12(\mu_c+\mu_k))}{w_{ck}\cdot\delta}\,\delta,
        \quad \delta = \mu_c-\mu_k,

    so that :math:`w_{ck}\cdot(z-m_{ck}) = h_{ck}` and neither priors nor
    intercepts are left over. Gaussians with one covariance, linear
    discriminants: :math:`w_{ck}\cdot\delta` is the squared distance of the means
    in standard deviations. Pairs of equal means have no border; their constant
    is :meth:`rest`.

    Parameters
    ----------
    weights : array (K, d)
    bias : array (K,)
    means : array (K, d)
    centre : array (d,), optional
        c; the origin without it. Somewhere among the means, so that scores
        far from the origin keep their digits.

    Examples
    --------
    >>> units = Hyperplanes([[0.0], [2.0]], [0.0, -2.0], [[0.0], [2.0]])
    >>> units(torch.tensor([[1.0]], dtype=torch.float64)).tolist()
    [[-0.0, -0.0]]
    """

    rest_name: ClassVar[str] = "equal means"
    weights: Tensor
    bias: Tensor
    centre: Tensor
    roots: Tensor
    constant: Tensor

    def __init__(
        self,
        weights: npt.ArrayLike,
        bias: npt.ArrayLike,
        means: npt.ArrayLike,
        centre: npt.ArrayLike | None = None,
    ) -> None:
        super().__init__()
        W, b, mu = (np.array(a, dtype=np.float64) for a in (weights, bias, means))
        c = np.zeros(W.shape[1]) if centre is None else np.array(centre, dtype=np.float64)
        self.count, self.features = W.shape
        mu = mu - c
        w, delta, middle = W[:, None] - W, mu[:, None] - mu, (mu[:, None] + mu) / 2
        gap = b[:, None] - b
        height, width = (w * middle).sum(2) + gap, (w * delta).sum(2)
        apart = width > _SAME
        step = np.divide(height, width, out=np.zeros_like(width), where=apart)
        self.register_buffer("weights", torch.tensor(W))
        self.register_buffer("bias", torch.tensor(b))
        self.register_buffer("centre", torch.tensor(c))
        # of z - c
        self.register_buffer("roots", torch.tensor(middle - step[:, :, None] * delta))
        self.register_buffer("constant", torch.tensor(np.where(apart, 0.0, height)))

    def forward(self, z: Tensor) -> Tensor:
        return -torch.addmm(self.bias, z - self.centre, self.weights.T)

    def compared(self, z: Tensor, own: Tensor | None = None) -> Tensor:
        x, own = z - self.centre, self(z).argmin(1) if own is None else own
        costs = x.new_empty(len(x), self.count)
        for r in torch.unique(own).tolist():
            rows, w = torch.nonzero(own == r)[:, 0], self.weights[r] - self.weights
            costs[rows] = torch.addmm(self.constant[r] - (w * self.roots[r]).sum(1), x[rows], w.T)
        return costs

    def _pairs(self, rho: Shares, target: Tensor | None) -> list[tuple[Tensor, int, Tensor, Tensor]]:
        """Rows, target c, shares (n, K) of the rivals and w_ck (K, d), for every target that occurs."""
        assert isinstance(rho, Tensor)
        assert target is not None
        found = []
        for c in torch.unique(target).tolist():
            rows = torch.nonzero(target == c)[:, 0]
            shares = rho[rows].clone()
            shares[:, c] = 0
            found.append((rows, c, shares, self.weights[c] - self.weights))
        return found

    def spread(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        parts = []
        for block, (slope, offset) in zip(frame.parts(), self._all(z, rho, frame, target), strict=True):
            parts.append(slope * back(cut(z - self.centre, block), block) - offset)
        return gathered(frame, parts)

    def _all(self, z: Tensor, rho: Shares, frame: Frame, target: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """R = slope L (z - c) - offset of every block, each (N, m)."""
        found: list[tuple[Tensor, Tensor]] = []
        for block in frame.parts():
            like = back(cut(z, block), block)
            slope, offset = torch.zeros_like(like), torch.zeros_like(like)
            for rows, c, shares, w in self._pairs(rho, target):
                pull, roots = down(cut(w, block), block), back(cut(self.roots[c], block), block)
                slope[rows], offset[rows] = shares @ pull, shares @ (pull * roots)
            found.append((slope, offset))
        return found

    def rest(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> Tensor | None:
        if not bool((self.constant != 0).any()):
            return None
        left = torch.zeros_like(z[:, 0])
        for rows, c, shares, _ in self._pairs(rho, target):
            left[rows] = shares @ self.constant[c]
        return left

    def lines(
        self, z: Tensor, rho: Shares, frame: Frame, distance: float = 1.0, target: Tensor | None = None
    ) -> list[Line]:
        found = []
        for block, (slope, offset) in zip(frame.parts(), self._all(z, rho, frame, target), strict=True):
            point = torch.where(slope == 0, math.nan, offset / slope)
            found.append(Line(slope, point + origin(self.centre, block)))
        return found
