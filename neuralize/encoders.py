"""Categories and missing values: steps that ask for equality only.

Inputs are numbers: values of numeric columns as they are, and codes of
categories (:mod:`neuralize.schema`), NaN where a value is missing. All outputs
made of one column belong to it: relevance of dummies and of indicators is
summed. Where the fitted encoder would refuse a category, the output is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuralize.stages import Bools, Floats, Ints, Stage, picking

__all__ = ["Imputer", "Indicator", "Lookup", "OneHot"]


class _Categories(Stage):
    """What encoders share: a list of known categories per column.

    Parameters
    ----------
    known : sequence of array (C_i,)
        Categories of each column as numbers; NaN where missing is one.
    widths : sequence of int
        Outputs of each column.
    strict : bool
        Whether others are refused.
    source : str
    """

    value: Tensor
    blank: Tensor
    column: Tensor
    owner: Tensor
    source_column: Tensor
    hides = True
    codes: ClassVar[bool] = True

    def __init__(self, known: Sequence[npt.ArrayLike], widths: Sequence[int], strict: bool, source: str) -> None:
        super().__init__()
        lists = [np.asarray(k, dtype=np.float64) for k in known]
        value = np.concatenate(lists) if lists else np.zeros(0)
        self.inputs, self.outputs, self.strict, self.source = len(lists), sum(widths), strict, source
        self.blanks = bool(np.isnan(value).any())
        column = np.repeat(np.arange(len(lists)), [len(k) for k in lists])
        self.register_buffer("value", torch.tensor(np.nan_to_num(value, nan=0.0)))
        self.register_buffer("blank", torch.tensor(np.isnan(value)))
        self.register_buffer("column", torch.tensor(column))
        self.register_buffer("owner", torch.tensor(np.equal.outer(column, np.arange(len(lists))).astype(np.float64)))
        self.register_buffer("source_column", torch.tensor(np.repeat(np.arange(len(widths)), widths)))

    def hits(self, x: Tensor) -> Tensor:
        """Which category (N, C) each value (N, inputs) is, as truth values."""
        wide = x.index_select(1, self.column)
        if not self.blanks:
            return wide == self.value
        # no choice between truth values: onnxruntime has none
        return (self.blank & wide.isnan()) | (~self.blank & (wide == self.value))

    def unknown(self, hits: Tensor) -> Tensor:
        """1 where a value (N, inputs) is none of the categories."""
        return 1 - hits.to(self.value.dtype) @ self.owner

    def sources(self) -> Ints:
        """The column of each output (outputs,)."""
        return np.asarray(self.source_column.cpu().numpy())

    def shares(self) -> Any:
        return picking(self.sources(), self.inputs)

    def missing(self, mask: Bools) -> Bools:
        if not self.strict:
            return np.zeros((len(mask), self.outputs), dtype=bool)
        seen = np.zeros(self.inputs, dtype=bool)
        seen[self.column.cpu().numpy()[self.blank.cpu().numpy()]] = True
        return np.asarray((mask & ~seen)[:, self.sources()])


class OneHot(_Categories):
    """One dummy per category, or per group of rare ones.

    Parameters
    ----------
    known : sequence of array (C_i,)
    group : sequence of array of int (C_i,)
        The dummy of each category, counted from 0 in each column; -1 for none.
    others : sequence of int
        The dummy of unknown categories in each column; -1 for none.
    strict : bool
        Unknown categories are refused: NaN.
    source : str

    Examples
    --------
    >>> stage = OneHot([[0.0, 1.0, 2.0]], [[-1, 0, 1]], [-1], strict=False)
    >>> stage(torch.tensor([[1.0], [0.0], [7.0]], dtype=torch.float64)).tolist()
    [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """

    pick: Tensor
    members: Tensor | None
    spare: Tensor | None

    def __init__(
        self,
        known: Sequence[npt.ArrayLike],
        group: Sequence[npt.ArrayLike],
        others: Sequence[int],
        *,
        strict: bool,
        source: str = "OneHotEncoder",
    ) -> None:
        groups = [np.asarray(g, dtype=np.int64) for g in group]
        sizes = [int(max(g.max(initial=-1), o)) + 1 for g, o in zip(groups, others, strict=True)]
        super().__init__(known, sizes, strict, source)
        starts = np.cumsum([0, *sizes])
        target = np.concatenate([np.where(g < 0, -1, g + s) for g, s in zip(groups, starts, strict=False)])
        # a dummy of one category is a comparison; only groups need a sum
        count = np.bincount(target[target >= 0], minlength=self.outputs)
        grouped = np.flatnonzero(count != 1)
        first = np.zeros(self.outputs, dtype=np.int64)
        shown = np.flatnonzero(target >= 0)
        single = shown[count[target[shown]] == 1]
        first[target[single]] = single
        first[grouped] = len(target) + np.arange(len(grouped))
        members = np.equal.outer(target, grouped).astype(np.float64)
        self.ordered = not len(grouped) and np.array_equal(first, np.arange(len(target)))
        self.register_buffer("pick", torch.tensor(first))
        self.register_buffer("members", torch.tensor(members) if len(grouped) else None)
        spare = np.zeros((self.inputs, self.outputs))
        for i, (other, start) in enumerate(zip(others, starts, strict=False)):
            if other >= 0:
                spare[i, start + other] = 1.0
        self.register_buffer("spare", torch.tensor(spare) if spare.any() else None)

    def forward(self, x: Tensor) -> Tensor:
        hits = self.hits(x)
        dummies = hits.to(self.value.dtype)
        if self.members is not None:
            dummies = torch.cat([dummies, dummies @ self.members], 1)
        z = dummies if self.ordered else dummies.index_select(1, self.pick)
        if self.spare is not None or self.strict:
            unknown = self.unknown(hits)
            if self.spare is not None:
                z = z + unknown @ self.spare
            if self.strict:
                z = torch.where(unknown.index_select(1, self.source_column) > 0.5, math.nan, z)
        return z


class Lookup(_Categories):
    """A number per category.

    Parameters
    ----------
    known : sequence of array (C_i,)
    tables : sequence of array (C_i, r)
        The r numbers of each category, which follow each other in the outputs.
        NaN is a number here.
    others : sequence of array (r,)
        Those of unknown categories.
    strict : bool
        Unknown categories are refused: NaN.
    source : str

    Examples
    --------
    >>> stage = Lookup([[3.0, 7.0]], [[[10.0], [20.0]]], [[-1.0]], strict=False)
    >>> stage(torch.tensor([[7.0], [5.0]], dtype=torch.float64)).tolist()
    [[20.0], [-1.0]]
    """

    table: Tensor
    void: Tensor
    other: Tensor

    def __init__(
        self,
        known: Sequence[npt.ArrayLike],
        tables: Sequence[npt.ArrayLike],
        others: Sequence[npt.ArrayLike],
        *,
        strict: bool,
        source: str = "OrdinalEncoder",
    ) -> None:
        parts = [np.asarray(t, dtype=np.float64) for t in tables]
        widths = [p.shape[1] for p in parts]
        super().__init__(known, widths, strict, source)
        total = np.zeros((len(self.value), self.outputs))
        row = column = 0
        for part, width in zip(parts, widths, strict=True):
            total[row : row + len(part), column : column + width] = part
            row, column = row + len(part), column + width
        # NaN would spoil the sums of its neighbours: 0 * NaN is NaN
        self.register_buffer("table", torch.tensor(np.nan_to_num(total, nan=0.0)))
        self.register_buffer("void", torch.tensor(np.isnan(total).astype(np.float64)))
        other = np.concatenate([np.asarray(o, dtype=np.float64) for o in others])
        self.register_buffer("other", torch.tensor(np.full(self.outputs, np.nan) if strict else other))

    def forward(self, x: Tensor) -> Tensor:
        hits = self.hits(x)
        one = hits.to(self.value.dtype)
        z = torch.where(one @ self.void > 0.5, math.nan, one @ self.table)
        unknown = self.unknown(hits).index_select(1, self.source_column)
        return torch.where(unknown > 0.5, self.other, z)

    def missing(self, mask: Bools) -> Bools:
        blank, column = self.blank.cpu().numpy(), self.column.cpu().numpy()
        source = self.sources()
        answer = np.isnan(self.other.cpu().numpy())
        for k in np.flatnonzero(blank):
            mine = source == column[k]
            answer[mine] = self.void[k].cpu().numpy()[mine] > 0.5
        return np.asarray(mask[:, source] & answer)


class Imputer(Stage):
    """Missing values replaced by a number per column; indicators of them behind.

    Relevance passes it unchanged: an imputed value speaks for its column.

    Parameters
    ----------
    kept : array (d,)
        Columns it gives; those that were empty in fit are dropped.
    fill : array (d,)
    marks : array (D,)
        What stands for "missing" in each column; NaN by default.
    flags : array, optional
        Columns with an indicator.
    source : str

    Examples
    --------
    >>> stage = Imputer([0], [5.0], [math.nan], flags=[0])
    >>> stage(torch.tensor([[math.nan], [1.0]], dtype=torch.float64)).tolist()
    [[5.0, 1.0], [1.0, 0.0]]
    """

    kept: Tensor
    fill: Tensor
    marks: Tensor
    flags: Tensor | None
    codes: ClassVar[bool] = True

    def __init__(
        self,
        kept: npt.ArrayLike,
        fill: npt.ArrayLike,
        marks: npt.ArrayLike,
        flags: npt.ArrayLike | None = None,
        source: str = "SimpleImputer",
    ) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(np.asarray(kept, dtype=np.int64)))
        self.register_buffer("fill", torch.tensor(np.asarray(fill, dtype=np.float64)))
        self.register_buffer("marks", torch.tensor(np.asarray(marks, dtype=np.float64)))
        self.register_buffer("flags", None if flags is None else torch.tensor(np.asarray(flags, dtype=np.int64)))
        self.inputs, self.source = len(self.marks), source
        self.outputs = len(self.kept) + (0 if self.flags is None else len(self.flags))
        self.hides = len(self.kept) < self.inputs

    def forward(self, x: Tensor) -> Tensor:
        gone = _gone(x, self.marks)
        z = torch.where(gone.index_select(1, self.kept), self.fill, x.index_select(1, self.kept))
        if self.flags is not None:
            z = torch.cat([z, gone.index_select(1, self.flags).to(z.dtype)], 1)
        return z

    def sources(self) -> Ints:
        """The column of each output (outputs,)."""
        parts = [self.kept] if self.flags is None else [self.kept, self.flags]
        return np.asarray(torch.cat(parts).cpu().numpy())

    def shares(self) -> Any:
        return picking(self.sources(), self.inputs)

    def line(self) -> tuple[Floats, Floats]:
        return np.ones(self.outputs), np.zeros(self.outputs)

    def closes(self) -> Bools:
        # nothing is NaN behind a step that mixes; another mark is a jump, and an indicator always is
        jump = np.full(self.outputs, not bool(self.marks.isnan().all()))
        jump[len(self.kept) :] = True
        return jump

    def keeps(self) -> Ints:
        found = self.sources().copy()
        found[len(self.kept) :] = -1
        return found

    def missing(self, mask: Bools) -> Bools:
        healed = self.marks.isnan().cpu().numpy()
        source = self.sources()
        found = mask[:, source] & ~healed[source]
        found[:, len(self.kept) :] = False
        return np.asarray(found)

    def invert(self, y: Tensor, columns: Tensor) -> Tensor:
        return torch.where(columns < len(self.kept), y, math.nan)

    def extra_repr(self) -> str:
        flags = "" if self.flags is None else f", {len(self.flags)} indicators"
        return f"{self.source}: {self.inputs} -> {self.outputs}{flags}"


class Indicator(Stage):
    """1 where a value is missing, else 0.

    Parameters
    ----------
    flags : array (d,)
        Columns it tells about.
    marks : array (D,)
        What stands for "missing"; NaN by default.
    strict : bool
        Whether a missing value in another column is refused: NaN.
    source : str

    Examples
    --------
    >>> Indicator([0], [math.nan])(torch.tensor([[math.nan], [1.0]])).tolist()
    [[1.0], [0.0]]
    """

    flags: Tensor
    others: Tensor
    marks: Tensor
    hides = True
    codes: ClassVar[bool] = True

    def __init__(
        self, flags: npt.ArrayLike, marks: npt.ArrayLike, strict: bool = False, source: str = "MissingIndicator"
    ) -> None:
        super().__init__()
        self.register_buffer("flags", torch.tensor(np.asarray(flags, dtype=np.int64)))
        self.register_buffer("marks", torch.tensor(np.asarray(marks, dtype=np.float64)))
        self.inputs, self.outputs, self.source = len(self.marks), len(self.flags), source
        rest = np.setdiff1d(np.arange(self.inputs), self.sources()) if strict else np.zeros(0, dtype=np.int64)
        self.register_buffer("others", torch.tensor(rest))

    def forward(self, x: Tensor) -> Tensor:
        gone = _gone(x, self.marks)
        z = gone.index_select(1, self.flags).to(x.dtype)
        if len(self.others):
            z = torch.where(gone.index_select(1, self.others).any(1, keepdim=True), math.nan, z)
        return z

    def sources(self) -> Ints:
        """The column of each output (outputs,)."""
        return np.asarray(self.flags.cpu().numpy())

    def shares(self) -> Any:
        return picking(self.sources(), self.inputs)

    def missing(self, mask: Bools) -> Bools:
        spoiled = mask[:, self.others.cpu().numpy()].any(1, keepdims=True)
        return np.repeat(spoiled, self.outputs, axis=1)


def _gone(x: Tensor, marks: Tensor) -> Tensor:
    """Where values (N, D) are the mark of their column."""
    return (marks.isnan() & x.isnan()) | (x == marks)
