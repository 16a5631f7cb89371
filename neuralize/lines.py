"""The lines behind an explanation, computed when they are asked for."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lrp.errors import DataError
from neuralize.heads import Details, Request
from neuralize.tables import Table

if TYPE_CHECKING:
    from typing import Any

    from neuralize.network import NeuralizedModel

__all__ = ["Lines"]


class Lines:
    """Computes competitors and break-even points of explained rows when they are asked for.

    It holds a copy of the network, so later changes of precision or device
    don't reach it, and refers to the rows. If those have changed since, the
    output differs and ``DataError`` is raised.
    """

    def __init__(self, net: NeuralizedModel, tab: Table, request: Request) -> None:
        self.net, self.tab, self.request = copy.deepcopy(net).cpu(), tab, request

    def __call__(self, rows: slice, output: npt.NDArray[Any]) -> Details:
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
