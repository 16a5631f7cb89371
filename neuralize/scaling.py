r"""Elementwise affine layers: the scalers of a pipeline.

Each keeps the operations, and their order, of the scaler it stands for, so
that the scaled values are equal bit for bit in float64. An elementwise map
sends column *t* to coordinate *t* only; hence the relevance of a coordinate is
the relevance of its column, unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor

from neuralize._strands import Strand
from neuralize.stages import Bools, Stage

__all__ = ["Scaler"]

Floats = npt.NDArray[np.float64]


class Scaler(Stage):
    r"""Subtract, divide, multiply, add, clip: those that are given, in this order.

    Parameters
    ----------
    subtract, divide, multiply, add : array (D,), optional
    clip : (float, float), optional
        Bounds of the scaled values (``MinMaxScaler(clip=True)``).
    source : str
        Name of the estimator it stands for; shown by ``print(net)``.
    columns : int, optional
        D, needed where nothing depends on the column; a front fills it in.

    Notes
    -----
    Relevance treats a clipping scaler as its unclipped line. A column that is
    multiplied by 0 becomes a constant and belongs to nobody.

    Examples
    --------
    >>> Scaler(subtract=[1.0], divide=[2.0])(torch.tensor([[5.0]], dtype=torch.float64)).item()
    2.0
    """

    subtract: Tensor | None
    divide: Tensor | None
    multiply: Tensor | None
    add: Tensor | None

    def __init__(
        self,
        *,
        subtract: npt.ArrayLike | None = None,
        divide: npt.ArrayLike | None = None,
        multiply: npt.ArrayLike | None = None,
        add: npt.ArrayLike | None = None,
        clip: tuple[float, float] | None = None,
        source: str = "Scaler",
        columns: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("subtract", subtract), ("divide", divide), ("multiply", multiply), ("add", add)):
            tensor = None if value is None else torch.tensor(np.array(value, dtype=np.float64))
            self.register_buffer(name, tensor)
        self.clip = clip
        self.source = source
        self.inputs = self.outputs = self.features or columns or 0
        self.hides = clip is not None

    @property
    def features(self) -> int | None:
        """D, or None where nothing depends on the column."""
        return next((b.numel() for b in self.buffers() if b.ndim == 1), None)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled values.

        Parameters
        ----------
        x : Tensor (N, D)

        Returns
        -------
        Tensor (N, D)
        """
        if self.subtract is not None:
            x = x - self.subtract
        if self.divide is not None:
            x = x / self.divide
        if self.multiply is not None:
            x = x * self.multiply
        if self.add is not None:
            x = x + self.add
        if self.clip is not None:
            x = x.clamp(*self.clip)
        return x

    def apply_(self, x: Tensor) -> Tensor:
        """``forward`` in place, for buffers of the caller."""
        if self.subtract is not None:
            x.sub_(self.subtract)
        if self.divide is not None:
            x.div_(self.divide)
        if self.multiply is not None:
            x.mul_(self.multiply)
        if self.add is not None:
            x.add_(self.add)
        return x if self.clip is None else x.clamp_(*self.clip)

    def affine(self) -> tuple[Floats | float, Floats | float]:
        """Slope and intercept ``(a, b)`` of ``z = a x + b`` before clipping, each (D,) or a number."""

        def get(tensor: Tensor | None, neutral: float) -> Floats | float:
            return neutral if tensor is None else np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)

        slope = get(self.multiply, 1.0) / get(self.divide, 1.0)
        return slope, get(self.add, 0.0) - slope * get(self.subtract, 0.0)

    def line(self) -> tuple[Floats, Floats]:
        slope, shift = self.affine()
        return np.broadcast_to(slope, (self.outputs,)), np.broadcast_to(shift, (self.outputs,))

    def shares(self) -> Any:
        # what is multiplied by 0 is a constant
        return scipy.sparse.diags_array((self.line()[0] != 0).astype(np.float64), format="csr")

    def closes(self) -> Bools:
        return np.asarray(self.line()[0] == 0)

    def back(self, strand: Strand) -> list[Strand]:
        slope, shift = self.line()
        return [strand.passed(self, self.shares(), self.closes(), np.where(slope == 0, 1.0, slope), shift)]

    def invert(self, y: Tensor, columns: Tensor) -> Tensor:
        def get(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.ndim == 0 else tensor[columns]

        subtract, divide, multiply, add = map(get, (self.subtract, self.divide, self.multiply, self.add))
        if self.clip is not None:
            y = torch.where((y >= self.clip[0]) & (y <= self.clip[1]), y, math.nan)
        if add is not None:
            y = y - add
        if multiply is not None:
            y = y / multiply
        if divide is not None:
            y = y * divide
        return y if subtract is None else y + subtract

    def extra_repr(self) -> str:
        terms = "x"
        if self.subtract is not None:
            terms += " - shift"
        if self.divide is not None:
            terms = f"({terms}) / scale" if " " in terms else f"{terms} / scale"
        if self.multiply is not None:
            terms = f"({terms}) * scale" if " " in terms else f"{terms} * scale"
        if self.add is not None:
            terms += " + shift"
        if self.clip is not None:
            terms = f"clip({terms}, {self.clip[0]:g}, {self.clip[1]:g})"
        return f"{self.source}: {terms}"
