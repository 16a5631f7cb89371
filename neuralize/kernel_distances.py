r"""Squared distances for kernels, which need them to an absolute precision of a fraction of 1/gamma.

:math:`|z|^2 - 2 z\cdot u + |u|^2` is fast and loses :math:`\epsilon |u|^2`. In
:math:`e^{-\gamma d}` that is :math:`\gamma\epsilon|u|^2`, nothing on standardised
data and everything beside a column of time stamps. There the differences are
squared one by one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuralize.frames import Block
from neuralize.units import Picked, Shares, SquaredDistances, back, cut, down

__all__ = ["KernelDistances"]

_AT_ONCE = 16


class KernelDistances(SquaredDistances):
    r"""Costs :math:`|z-u_j|^2`, exact enough to be put into :math:`e^{-\gamma d}`.

    Parameters
    ----------
    points : array (M, d)
    gamma : float

    Notes
    -----
    Differences one by one cost O(N M d) as the product does, but several times
    its time.

    Examples
    --------
    >>> units = KernelDistances([[1e9, 0.0], [1e9 + 1e7, 0.001]], gamma=1e6)
    >>> float(units(torch.tensor([[1e9 + 1e7, 0.0]], dtype=torch.float64))[0, 1])
    1e-06
    """

    def __init__(self, points: npt.ArrayLike, gamma: float) -> None:
        super().__init__(points)
        norms = self.norms.numpy()
        # what kernel exponents lose, in units of the precision
        self.lost_in_kernel = float(gamma) * float(np.max(norms, initial=0.0))

    def _sharp(self, dtype: torch.dtype) -> bool:
        return torch.finfo(dtype).eps * self.lost_in_kernel > (1e-11 if dtype == torch.float64 else 1e-5)

    def forward(self, z: Tensor) -> Tensor:
        if not self._sharp(z.dtype):
            return super().forward(z)
        x = (z - self.centre)[:, None]
        return torch.cat([(x - u).square().sum(2) for u in torch.split(self.points, _AT_ONCE)], 1)

    def _spread(self, z: Tensor, rho: Shares, block: Block, distance: float) -> Tensor:
        if isinstance(rho, Picked) or not self._sharp(z.dtype):
            return super()._spread(z, rho, block, distance)
        x, u = cut(z - self.centre, block)[:, None], cut(self.points, block)
        parts = zip(torch.split(rho, _AT_ONCE, 1), torch.split(u, _AT_ONCE), strict=True)
        R = sum((w[:, :, None] * back(x - v, block) * down(x - v, block)).sum(1) for w, v in parts)
        assert isinstance(R, Tensor)
        return R if distance == 1 else distance * R + (1 - distance) * self._products(z, rho, block)
