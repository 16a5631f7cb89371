"""The lines behind an explanation, computed when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrp.errors import DataError
from neuralize.frames import Block, Frame
from neuralize.heads import Details, Request, numbers
from neuralize.tables import Table
from neuralize.units import Line, Picked, origin

if TYPE_CHECKING:
    from neuralize.network import NeuralizedModel

__all__ = ["Lined", "Lines", "lined"]


@dataclass(frozen=True)
class Lined:
    r"""The lines :math:`R_t = w_t (x_t - \tau_t)` of a batch, in raw units.

    Parameters
    ----------
    output : ndarray (n,)
    competitors : ndarray (n, K)
        Share of each competitor; 0 for the target.
    slope : ndarray (n, D)
        :math:`w_t`: its sign says on which side of the break-even point a
        value speaks for the target.
    break_even : ndarray (n, D)
        :math:`\tau_t`; NaN where there is none.
    units, shares : ndarray (n, r) or None
        Positions of the prototypes, and their signed shares.
    """

    output: npt.NDArray[Any]
    competitors: npt.NDArray[Any]
    slope: npt.NDArray[Any]
    break_even: npt.NDArray[Any]
    units: npt.NDArray[Any] | None = None
    shares: npt.NDArray[Any] | None = None


def lined(found: Details, frame: Frame, data: npt.NDArray[Any], values: Tensor, z: Tensor) -> Lined:
    """Details in raw units.

    Parameters
    ----------
    found : Details
    frame : Frame
    data : ndarray (n, D)
    values : Tensor (n, D)
    z : Tensor (n, d)

    Notes
    -----
    Behind a projection the model sees :math:`\\hat x = L T x` of a row, and R =
    slope (x-hat - point). Column i enters x-hat_i with the weight
    :math:`(LT)_{ii}`; the break-even value is the one that brings x-hat_i to the
    point, the row's other columns as they are.
    """
    point = torch.full_like(values, torch.nan)
    slope = torch.zeros_like(values)
    x = torch.from_numpy(np.array(data, dtype=np.float64)).to(values)
    for number, (block, line) in enumerate(zip(frame.parts(), found.lines, strict=True)):
        if block.mixes:
            line = _seen(frame, number, block, line, x, z)
        here = frame.raw(number, line.point)
        # a small step along each coordinate: the scale of its way back to the column
        step = 2.0**-10 * line.point.abs().clamp(min=1.0)
        owner = frame.owners(number)
        mine = torch.as_tensor(np.flatnonzero(owner >= 0), device=values.device)
        columns = torch.as_tensor(owner[owner >= 0], device=values.device)
        if not len(mine):
            continue
        away = frame.raw(number, line.point + step)
        rate = (step * line.slope)[:, mine] / (away - here)[:, columns]
        at, R = here[:, columns], values[:, columns]
        # the secant: R = slope (x - point) exactly, however the column was bent or squared
        secant = R / (x[:, columns] - at)
        rate = torch.where(secant.isfinite() & (secant != 0), secant, rate)
        known = at.isfinite() & rate.isfinite() & (rate != 0)
        point[:, columns] = torch.where(known, at, torch.nan)
        slope[:, columns] = torch.where(known, rate, 0.0)
    units = shares = None
    if isinstance(found.rho, Picked):
        units, shares = numbers(found.rho.index), numbers(found.rho.weight)
    elif found.rho is not None:
        shares = numbers(found.rho)
        units = np.broadcast_to(np.arange(shares.shape[1]), shares.shape)
    return Lined(numbers(found.output), numbers(found.competitors), numbers(slope), numbers(point), units, shares)


def _seen(frame: Frame, number: int, block: Block, line: Line, x: Tensor, z: Tensor) -> Line:
    """A line in what the model sees of a row, as one in the row's own coordinates."""
    assert block.inverse is not None
    assert block.transpose is not None
    weight = (block.inverse * block.transpose).sum(1)
    seen = origin(z, block)
    own = _coordinates(frame, number, seen, x)
    weight = torch.where(weight.abs() > 1e-9, weight, torch.nan)
    return Line(line.slope * weight, own + (line.point - seen) / weight)


def _coordinates(frame: Frame, number: int, start: Tensor, x: Tensor) -> Tensor:
    """Coordinates a block leads to of raw rows, by inverting their way back to the columns; NaN where there is none."""
    owner = frame.owners(number)
    mine = torch.as_tensor(np.flatnonzero(owner >= 0), device=x.device)
    columns = torch.as_tensor(owner[owner >= 0], device=x.device)
    y, wanted = start.clone(), x[:, columns]
    step = 2.0**-10 * y.abs().clamp(min=1.0)
    for _ in range(40):
        raw, ahead = frame.raw(number, y)[:, columns], frame.raw(number, y + step)[:, columns]
        left = wanted - raw
        move = left * step[:, mine] / (ahead - raw)
        if not bool((move.abs() > 1e-14 * y[:, mine].abs().clamp(min=1e-300)).any()):
            break
        y[:, mine] = y[:, mine] + torch.where(move.isfinite(), move, 0.0)
    found = torch.full_like(y, torch.nan)
    gap = (frame.raw(number, y)[:, columns] - wanted).abs()
    found[:, mine] = torch.where(gap <= 1e-9 * wanted.abs().clamp(min=1e-9), y[:, mine], torch.nan)
    return found


class Lines:
    """Computes competitors, break-even points and prototypes of explained rows when they are asked for.

    It holds a copy of the network, so later changes of precision or device
    don't reach it, and refers to the rows. If those have changed since, the
    output differs and ``DataError`` is raised.
    """

    def __init__(self, net: NeuralizedModel, tab: Table, request: Request) -> None:
        self.net, self.tab, self.request = net, tab, request

    def __call__(self, rows: slice, output: npt.NDArray[Any]) -> Lined:
        """Details of some rows, whose output is known."""
        found = self.net.details(self.tab, rows, self.request.rows(rows))
        scale = np.abs(output).max(initial=0.0)
        tolerance = 1e-6 if self.net.dtype == torch.float64 else 1e-2
        if not np.allclose(found.output, output, rtol=tolerance, atol=tolerance * scale):
            raise DataError(
                "the rows have changed since they were explained",
                expected="the table as it was passed to explain",
                got="other outputs",
                fix="explain again, or pass a copy to explain",
            )
        return found

    @property
    def width(self) -> int:
        """Numbers per row that the network's widest layer holds."""
        return self.net.width

    def names(self) -> npt.NDArray[Any] | None:
        """Names of the prototypes (M,); None where the units are none."""
        return self.net.head.prototypes()
