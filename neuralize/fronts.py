"""Stages put together: one behind the other, side by side, and all of them in front of a head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from neuralize._strands import Strand, assemble, refuse_closed
from neuralize.frames import Frame
from neuralize.stages import Bools, Stage, picking

__all__ = ["Branches", "Front", "Series"]


class _Chain(nn.Module):
    """Stages one after the other."""

    stages: nn.ModuleList

    def parts(self) -> list[Stage]:
        """The stages, first to last."""
        return [s for s in self.stages if isinstance(s, Stage)]

    def forward(self, x: Tensor) -> Tensor:
        """Coordinates (N, d) of raw rows (N, D)."""
        for stage in self.stages:
            x = stage(x)
        return x

    def apply_(self, x: Tensor) -> Tensor:
        """``forward``, which may overwrite x."""
        for stage in self.parts():
            x = stage.apply_(x)
        return x


class Series(_Chain, Stage):
    """Stages one behind the other.

    Parameters
    ----------
    stages : iterable of Stage
    inputs : int
    source, step : str
    """

    def __init__(self, stages: Iterable[Stage], inputs: int, source: str = "Pipeline", step: str = "") -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.inputs, self.source, self.step = inputs, source, step
        width = inputs
        for stage in self.parts():
            if not stage.inputs:
                stage.inputs = stage.outputs = width
            width = stage.outputs
        self.outputs = width
        self.hides = any(s.hides for s in self.parts())

    def shares(self) -> Any:
        total: Any = scipy.sparse.eye_array(self.outputs, format="csr")
        for stage in reversed(self.parts()):
            total = total @ stage.shares()
        return scipy.sparse.csr_array(total)

    def mixes(self) -> Bools:
        mask = np.zeros(self.inputs, dtype=bool)
        for stage in self.parts():
            mask = stage.mixes() | np.asarray(stage.shares() @ mask.astype(np.float64) > 0)
        return mask

    def missing(self, mask: Bools) -> Bools:
        for stage in self.parts():
            mask = stage.missing(mask)
        return mask

    def back(self, strand: Strand) -> list[Strand]:
        strands = [strand]
        for stage in reversed(self.parts()):
            strands = [earlier for s in strands for earlier in stage.back(s)]
        return strands

    def extra_repr(self) -> str:
        return ""


class Branches(Stage):
    """Stages side by side, each on some of the columns; their outputs are concatenated.

    Parameters
    ----------
    branches : sequence of (array or None, Stage)
        Columns each takes (None: all), and the stage.
    inputs : int
    source, step : str

    Examples
    --------
    >>> from neuralize.stages import Selection
    >>> both = Branches([([0], Series([], 1)), (None, Selection([1], 2))], inputs=2)
    >>> both(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.0]]
    """

    def __init__(
        self, branches: Sequence[tuple[Any, Stage]], inputs: int, source: str = "ColumnTransformer", step: str = ""
    ) -> None:
        super().__init__()
        self.inputs, self.source, self.step = inputs, source, step
        self.branches = nn.ModuleList(stage for _, stage in branches)
        for k, (columns, _) in enumerate(branches):
            picked = None if columns is None else torch.tensor(np.asarray(columns, dtype=np.int64))
            self.register_buffer(f"columns_{k}", picked)
        self.outputs = sum(stage.outputs for _, stage in branches)
        self.hides = True

    def parts(self) -> list[tuple[Tensor | None, Stage]]:
        """Columns and stage of each branch."""
        return [(getattr(self, f"columns_{k}"), s) for k, s in enumerate(self.branches) if isinstance(s, Stage)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([stage(x if c is None else x.index_select(1, c)) for c, stage in self.parts()], 1)

    def _picks(self) -> list[tuple[Any, Stage]]:
        """Sparse selections (branch inputs, inputs), and stages."""
        every = np.arange(self.inputs)
        return [(picking(every if c is None else c.cpu().numpy(), self.inputs), s) for c, s in self.parts()]

    def shares(self) -> Any:
        return scipy.sparse.vstack([stage.shares() @ pick for pick, stage in self._picks()], format="csr")

    def closes(self) -> Bools:
        return np.ones(self.outputs, dtype=bool)

    def mixes(self) -> Bools:
        return np.concatenate([stage.mixes() for _, stage in self.parts()])

    def missing(self, mask: Bools) -> Bools:
        return np.concatenate([s.missing(mask if c is None else mask[:, c.cpu().numpy()]) for c, s in self.parts()], 1)

    def back(self, strand: Strand) -> list[Strand]:
        owner = np.repeat(np.arange(len(self.branches)), [stage.outputs for _, stage in self.parts()])
        reach = strand.share @ picking(owner, len(self.branches))
        reach = scipy.sparse.csr_array(reach)
        count = np.diff(reach.indptr)
        found = []
        # constants belong to no branch; what spans several was closed before and has only sums ahead
        idle, wide = np.flatnonzero(count == 0), np.flatnonzero(count > 1)
        if len(idle):
            found.append(strand.take(idle).moved(scipy.sparse.csr_array((self.outputs, self.inputs))))
        if len(wide):
            part = strand.take(wide)
            mixed = np.asarray(part.share @ self.mixes().astype(np.float64) > 0)
            refuse_closed(part, mixed, _mixer(self).label)
            found.append(part.passed(self, self.shares(), self.closes()))
        single = np.full(len(strand), -1)
        single[count == 1] = reach.indices[reach.indptr[:-1][count == 1]]
        start = 0
        for k, (pick, stage) in enumerate(self._picks()):
            stop = start + stage.outputs
            rows = np.flatnonzero(single == k)
            if len(rows):
                here = picking(np.arange(start, stop), self.outputs).T
                part = strand.take(rows)
                # columns of chains count from the branch's own first output
                found += [earlier.moved(pick) for earlier in stage.back(part.moved(here))]
            start = stop
        return found

    def extra_repr(self) -> str:
        return f"{self.source}: {self.inputs} -> {self.outputs}"


def _mixer(stage: Stage) -> Stage:
    """The stage that mixes, among those inside."""
    inside = [s for _, s in stage.parts()] if isinstance(stage, Branches) else []
    inside = stage.parts() if isinstance(stage, Series) else inside
    return next((_mixer(s) for s in inside if s.mixes().any()), stage)


class Front(_Chain):
    """All stages in front of a head, and the way back through them.

    Parameters
    ----------
    stages : iterable of Stage
    inputs : int
        D, the raw columns.

    Attributes
    ----------
    stages : ModuleList of Stage
    frame : Frame
        The way back.
    inputs, outputs : int
        D and d.
    hides : bool
        Whether an infinite raw value may lead to finite coordinates.

    Raises
    ------
    UnsupportedEstimatorError
        A nonlinear step stands behind one that mixes columns.

    Examples
    --------
    >>> from neuralize.scaling import Scaler
    >>> from neuralize.stages import Projection
    >>> front = Front([Scaler(divide=[2.0, 4.0]), Projection([[1.0, 1.0]])], inputs=2)
    >>> z = front(torch.tensor([[2.0, 4.0]], dtype=torch.float64))
    >>> z.tolist(), front.frame.values(z, z).round(decimals=9).tolist()
    ([[2.0]], [[2.0, 2.0]])
    """

    frame: Frame

    def __init__(self, stages: Iterable[Stage], inputs: int) -> None:
        super().__init__()
        series = Series(stages, inputs)
        self.stages = series.stages
        self.inputs, self.outputs, self.hides = inputs, series.outputs, series.hides
        self.frame = assemble(series.back(Strand.start(series.outputs)), inputs, series.outputs)

    def raw(self, number: int, points: Tensor) -> Tensor:
        """Raw values (N, D) of points in the coordinates a block leads to.

        See :meth:`neuralize.frames.Frame.raw`.
        """
        return self.frame.raw(number, points)

    def nullable(self, batch: int = 512) -> Bools:
        """Raw columns (D,) in which NaN leads to no NaN."""
        series = Series(self.parts(), self.inputs)
        found = np.zeros(self.inputs, dtype=bool)
        for start in range(0, self.inputs, batch):
            columns = np.arange(start, min(start + batch, self.inputs))
            mask = np.zeros((len(columns), self.inputs), dtype=bool)
            mask[np.arange(len(columns)), columns] = True
            found[columns] = ~series.missing(mask).any(1)
        return found
