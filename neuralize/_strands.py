"""Walking from the coordinates of z back to the raw columns, one stage at a time.

A strand is a set of rows on their way: row i is a coordinate whose relevance
is known as (L delta)_i (G g)_i, or as delta_i g_i before any map that mixes.
Stages take strands from their outputs to their inputs. A row stays *open* as
long as it has passed affine steps only; then a map in front that mixes columns
can still be folded into L and G. A nonlinear step *closes* it: from there on
only the relevance itself goes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch

from lrp.errors import UnsupportedEstimatorError
from neuralize.frames import Block, Chain, Frame

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Strand:
    """Rows at some place between z and the raw columns.

    Parameters
    ----------
    index : ndarray (d_b,) or None
        Coordinates of z; None for all.
    inverse, transpose : ndarray (m, d_b) or None
        L and G; None where row i is coordinate index[i].
    shift : ndarray (m,)
        The constant of the inverse.
    share : sparse (m, width)
        How each row is shared among the columns at this place. Open rows own
        one column each.
    slope, intercept : ndarray (m,)
        Row = slope * column + intercept: scalers passed since the last map
        that mixes. The intercept is NaN behind a norm.
    closer : ndarray (m,) of str or None
        The nonlinear step that closed a row.
    chain : tuple
        Stages passed since the last map that mixes; see ``Block.chains``.
    """

    index: Ints | None
    inverse: Floats | None
    transpose: Floats | None
    shift: Floats
    share: Any
    slope: Floats
    intercept: Floats
    closer: npt.NDArray[np.object_]
    chain: Chain = ()

    @classmethod
    def start(cls, width: int) -> Strand:
        """All coordinates of z, at z."""
        return cls(
            None,
            None,
            None,
            np.zeros(width),
            scipy.sparse.eye_array(width, format="csr"),
            np.ones(width),
            np.zeros(width),
            np.full(width, None, dtype=object),
        )

    def __len__(self) -> int:
        return int(self.share.shape[0])

    @property
    def touched(self) -> Bools:
        """Rows (m,) with some column here; the others are constants."""
        return np.asarray(np.diff(self.share.indptr) > 0)

    @property
    def columns(self) -> Ints:
        """The single column of each row (m,), or -1."""
        found = np.full(len(self), -1, dtype=np.int64)
        single = np.flatnonzero(np.diff(self.share.indptr) == 1)
        places = self.share.indptr[single]
        whole = self.share.data[places] == 1
        found[single[whole]] = self.share.indices[places[whole]]
        return found

    def take(self, rows: Ints) -> Strand:
        """Some of the rows."""
        index = self.index
        if self.inverse is None:
            index = rows if index is None else index[rows]
        return replace(
            self,
            index=index,
            inverse=None if self.inverse is None else self.inverse[rows],
            transpose=None if self.transpose is None else self.transpose[rows],
            shift=self.shift[rows],
            share=self.share[rows],
            slope=self.slope[rows],
            intercept=self.intercept[rows],
            closer=self.closer[rows],
            chain=tuple((stage, columns[rows]) for stage, columns in self.chain),
        )

    def moved(self, matrix: Any) -> Strand:
        """The same rows among other columns: share @ matrix."""
        share = scipy.sparse.csr_array(self.share @ matrix)
        share.eliminate_zeros()
        share.sort_indices()
        return replace(self, share=share)

    def passed(
        self,
        stage: Any,
        spread: Any,
        closes: Bools,
        slope: Floats | None = None,
        intercept: Floats | None = None,
    ) -> Strand:
        """Back through a stage that mixes nothing.

        Parameters
        ----------
        stage : Stage
        spread : sparse (outputs, inputs)
            Shares of its inputs in its outputs.
        closes : ndarray (outputs,)
            Outputs that are not affine in their input.
        slope, intercept : ndarray (outputs,), optional
            Of those that are; default 1 and 0.
        """
        here = self.columns
        shut = (self.share @ closes.astype(np.float64)) > 0
        closer = self.closer.copy()
        for row in np.flatnonzero(shut):
            closer[row] = closer[row] or stage.label
        a = 1.0 if slope is None else np.where(here >= 0, slope[here], 1.0)
        b = 0.0 if intercept is None else np.where(here >= 0, intercept[here], 0.0)
        return replace(
            self.moved(spread),
            slope=self.slope * a,
            intercept=self.slope * b + self.intercept,
            closer=closer,
            chain=(*self.chain, (stage, here)),
        )

    def folded(self, stage: Any, T: Floats, L: Floats, centre: Floats, image: Floats) -> list[Strand]:
        """Back through an affine map that mixes columns.

        Parameters
        ----------
        stage : Stage
        T, L : ndarray (outputs, inputs), (inputs, outputs)
        centre, image : ndarray (inputs,), (outputs,)
            A point and where it leads: the inverse of z is centre + L (z - image).

        Raises
        ------
        UnsupportedEstimatorError
            A row was closed by a nonlinear step behind this map.
        """
        refuse_closed(self, self.touched, stage.label)
        width = T.shape[1]
        idle = np.flatnonzero(~self.touched)
        rest = self.take(idle).moved(scipy.sparse.csr_array((self.share.shape[1], width)))
        made = [rest] if len(idle) else []
        for rows in _distinct(self.columns):
            part = self.take(rows)
            here = part.columns
            inverse: Floats = L[:, here] / part.slope
            transpose: Floats = T[here].T * part.slope
            shift = centre + L[:, here] @ ((part.shift - part.intercept) / part.slope - image[here])
            if part.inverse is not None and part.transpose is not None:
                inverse, transpose = inverse @ part.inverse, transpose @ part.transpose
            through = replace(
                Strand.start(width), index=part.index, inverse=inverse, transpose=transpose, shift=np.asarray(shift)
            )
            made.append(through)
        return made


def _distinct(columns: Ints) -> list[Ints]:
    """Rows in groups without a column twice; a transformer may be given a column more than once."""
    groups: list[list[int]] = []
    seen: dict[int, int] = {}
    for row, column in enumerate(columns.tolist()):
        if column < 0:
            continue
        turn = seen[column] = seen.get(column, -1) + 1
        if turn == len(groups):
            groups.append([])
        groups[turn].append(row)
    return [np.array(g, dtype=np.int64) for g in groups]


def refuse_closed(strand: Strand, rows: Bools, label: str) -> None:
    """Raise where rows that a nonlinear step has closed meet a map that mixes columns."""
    closed = [name for name in strand.closer[rows] if name is not None]
    if closed:
        raise UnsupportedEstimatorError(
            f"{closed[0]} stands behind {label}: relevance can't go from a nonlinear step into one that mixes columns",
            expected="nonlinear steps in front of those that mix columns; behind them scalers, norms and projections",
            got=f"{label}, then {closed[0]}",
            fix="change their order and fit again, or neuralize the estimator alone on the columns behind these steps",
        )


def assemble(strands: Iterable[Strand], columns: int, coordinates: int) -> Frame:
    """The frame of strands that have arrived at the raw columns.

    Rows that no map mixed form one block; rows of the same coordinates of z
    another, so that T L = I in each.
    """
    groups: dict[Any, list[Strand]] = {}
    for strand in strands:
        if len(strand):
            plain = strand.inverse is None
            key = None if plain else "all" if strand.index is None else strand.index.tobytes()
            groups.setdefault(key, []).append(strand)
    made = [_block(group, columns, coordinates) for group in groups.values()]
    made.sort(key=lambda pair: pair[0])
    return Frame([block for _, block in made], columns, coordinates)


def _block(group: list[Strand], columns: int, coordinates: int) -> tuple[int, Block]:
    """A block and its first coordinate."""
    mixing = group[0].inverse is not None
    every = np.arange(coordinates)
    share = scipy.sparse.vstack([s.share for s in group], format="csr")
    picked = np.concatenate([s.columns for s in group])
    index = group[0].index if mixing else np.concatenate([every if s.index is None else s.index for s in group])
    # rows in the order of their columns, where that is an order: the way back may then be the identity
    ordered = bool((picked >= 0).all()) and len(np.unique(picked)) == len(picked)
    order = np.argsort(picked if ordered or index is None or mixing else index, kind="stable")
    where = np.empty_like(order)
    where[order] = np.arange(len(order))
    share = share[order]
    identity = ordered and len(order) == columns
    if index is not None and not mixing:
        index = index[order]

    def stacked(parts: list[Any]) -> torch.Tensor:
        return torch.tensor(np.concatenate(parts)[order])

    block = Block(
        index=None if index is None or np.array_equal(index, every) else torch.tensor(index),
        inverse=stacked([s.inverse for s in group]) if mixing else None,
        transpose=stacked([s.transpose for s in group]) if mixing else None,
        shift=stacked([s.shift for s in group]) if mixing else None,
        share=None if ordered else torch.tensor(share.toarray()),
        column=torch.tensor(picked[order]) if ordered and not identity else None,
        columns=columns if ordered and not identity else None,
    )
    starts = np.cumsum([0, *(len(s) for s in group)])
    chains = [(where[a:b], s.chain) for a, b, s in zip(starts, starts[1:], group, strict=False)]
    if not identity or any(chain for _, chain in chains):
        block.chains = tuple(chains)
    return 0 if index is None else int(index.min()), block
