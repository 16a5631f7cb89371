r"""The way back: from the coordinates a head sees to the raw columns.

A head's relevance is a displacement times a covector,
:math:`\delta_i g_i`, in the coordinates :math:`z` it sees. Behind an affine map
:math:`z = Tx + t_0` with a right inverse L, :math:`TL = I`, the columns receive

.. math:: R_t = (L\delta)_t \, (T'g)_t, \qquad
          \sum_t R_t = (TL\delta)' g = \sum_i \delta_i g_i .

That is the expansion at :math:`L(\text{root})` with x replaced by
:math:`\hat x = L(z)`, the part of x the model sees: rows with equal z get equal
values. For a distance :math:`\delta = g = z-\mu` and an orthogonal projection
the values are squares. Steps that act column by column leave relevance where it
is, and those that make several coordinates of one column (dummies, monomials)
are undone by sums; together they are a matrix M of shares.

Source: derived, and checked numerically; Frames are built from the stages of a
pipeline by :class:`neuralize.fronts.Front`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrp.errors import RuleError

__all__ = ["Block", "Frame"]

Chain = tuple[tuple[Any, Any], ...]
"""Stages between the coordinates a block leads to and the raw columns, the nearest first, each with the
coordinates (m,) it gives to them; -1 where there is not just one."""


class Block(nn.Module):
    r"""Some coordinates of z, and their way back.

    Parameters
    ----------
    index : LongTensor (d_b,), optional
        The coordinates of z it takes; None for all. Each belongs to one block.
    inverse, transpose : Tensor (m, d_b), optional
        L and T' of an affine map from m coordinates; None for the identity.
    shift : Tensor (m,), optional
        :math:`l_0`: the point that leads to z is :math:`L z + l_0`. NaN where
        the norm of the row stands between, so that there is no such point.
    share : Tensor (m, D), optional
        M: how the relevance of each of the m coordinates is shared among the
        raw columns. Rows sum to 1, or to 0 where a coordinate is a constant
        and belongs to no column. None for the identity.
    column : LongTensor (m,), optional
        Instead of M: the columns, all different, of coordinates with just one each.
    columns : int, optional
        D, with ``column``.
    proportional : bool, optional
        Whether L = diag(kappa) T' for some kappa > 0; found out by default.
        Then distances decompose into squares.

    Attributes
    ----------
    loss : Tensor (m,) or None
        1 for coordinates without a column, else 0; None if there are none.

    Examples
    --------
    >>> block = Block(share=torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    >>> block.gather(block.middle(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))).tolist()
    [[7.0, 4.0]]
    """

    index: Tensor | None
    inverse: Tensor | None
    transpose: Tensor | None
    shift: Tensor | None
    loss: Tensor | None
    matrix: Tensor | None
    column: Tensor | None

    def __init__(
        self,
        index: Tensor | None = None,
        inverse: Tensor | None = None,
        transpose: Tensor | None = None,
        shift: Tensor | None = None,
        share: Tensor | None = None,
        proportional: bool | None = None,
        *,
        column: Tensor | None = None,
        columns: int | None = None,
    ) -> None:
        super().__init__()
        matrix, loss, self.columns = share, None, columns
        if share is not None:
            self.columns = int(share.shape[1])
            hits = share != 0
            single = (hits.sum(1) == 1) & (share.sum(1) == 1)
            where = hits.to(torch.int64).argmax(1)
            if bool(single.all()) and len(set(where.tolist())) == len(where):
                # picking columns needs no matrix, and rounds nothing
                matrix, column = None, where
            if bool((share.sum(1) == 0).any()):
                loss = (share.sum(1) == 0).to(share.dtype)
        for name, tensor in (
            ("index", index),
            ("inverse", inverse),
            ("transpose", transpose),
            ("shift", shift),
            ("matrix", matrix),
            ("column", column),
            ("loss", loss),
        ):
            self.register_buffer(name, tensor)
        self.proportional = _proportional(inverse, transpose) if proportional is None else proportional
        # set by the front: how each of the m coordinates came from raw values; (rows, stages), see raw
        self.chains: Sequence[tuple[Any, Chain]] = ()

    @property
    def share(self) -> Tensor | None:
        """M as one matrix (m, D), or None; :meth:`gather` does not need it."""
        if self.column is None:
            return self.matrix
        assert self.columns is not None
        dtype = next((b.dtype for b in self.buffers() if b.is_floating_point()), torch.get_default_dtype())
        M = torch.zeros(len(self.column), self.columns, dtype=dtype, device=self.column.device)
        return M.scatter_(1, self.column[:, None], 1.0)

    @property
    def mixes(self) -> bool:
        """Whether a column's relevance comes from several coordinates of z."""
        return self.inverse is not None

    def cut(self, t: Tensor) -> Tensor:
        """The block's coordinates (N, d_b) of (N, d)."""
        return t if self.index is None else t[..., self.index]

    def middle(self, delta: Tensor, g: Tensor) -> Tensor:
        """Relevance (N, m) from displacements and covectors (N, d)."""
        delta, g = self.cut(delta), self.cut(g)
        if self.inverse is not None and self.transpose is not None:
            delta, g = delta @ self.inverse.T, g @ self.transpose.T
        return delta * g

    def gather(self, R: Tensor) -> Tensor:
        """Relevance of the raw columns (N, D) from that of the coordinates (N, m)."""
        if self.column is not None:
            assert self.columns is not None
            return R.new_zeros(len(R), self.columns).index_copy_(1, self.column, R)
        return R if self.matrix is None else R @ self.matrix

    def lost(self, R: Tensor) -> Tensor | None:
        """Relevance (N,) of coordinates (N, m) that belong to no column; None if there are none."""
        return None if self.loss is None else R @ self.loss

    def extra_repr(self) -> str:
        took = "all coordinates" if self.index is None else f"{len(self.index)} coordinates"
        way = "" if self.inverse is None else f", through an inverse to {len(self.inverse)}"
        return f"{took}{way}" + ("" if self.columns is None else f", to {self.columns} columns")


def _proportional(inverse: Tensor | None, transpose: Tensor | None) -> bool:
    """Whether the rows of L are positive multiples of those of T'."""
    if inverse is None or transpose is None:
        return inverse is None and transpose is None
    kappa = (inverse * transpose).sum(1) / transpose.square().sum(1)
    kappa = torch.where(kappa.isfinite(), kappa, 1.0)
    size = inverse.abs().amax(1)
    apart = (inverse - kappa[:, None] * transpose).abs().amax(1)
    # a column the map ignores gets 0 however it is inverted
    idle = (size <= 1e-12 * inverse.abs().max()) | (transpose == 0).all(1)
    return bool((((kappa > 0) & (apart <= 1e-9 * size)) | idle).all())


class Frame(nn.Module):
    """The way back of all coordinates: a sum over blocks.

    Parameters
    ----------
    blocks : iterable of Block
        Each coordinate of z is in one of them.
    columns, coordinates : int
        D and d.

    Notes
    -----
    :meth:`values` costs O(N d m) per block that mixes, O(N d) else.

    Examples
    --------
    >>> L, T = torch.tensor([[0.5], [0.5]]), torch.tensor([[1.0, 1.0]])
    >>> frame = Frame([Block(inverse=L, transpose=T.T)], columns=2, coordinates=1)
    >>> frame.values(torch.tensor([[2.0]]), torch.tensor([[3.0]])).tolist()
    [[3.0, 3.0]]
    """

    # name of the residual part of coordinates that belong to no column
    lost_name: str = "constant columns"

    def __init__(self, blocks: Iterable[Block], columns: int, coordinates: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.columns, self.coordinates = columns, coordinates

    @classmethod
    def identity(cls, columns: int) -> Frame:
        """Coordinates that are the columns."""
        return cls([Block()], columns, columns)

    def parts(self) -> list[Block]:
        """The blocks, for type checkers."""
        return [b for b in self.blocks if isinstance(b, Block)]

    @property
    def mixes(self) -> bool:
        """Whether some block mixes coordinates."""
        return any(b.mixes for b in self.parts())

    @property
    def plain(self) -> bool:
        """Whether each coordinate is its column."""
        parts = self.parts()
        return len(parts) == 1 and parts[0].index is None and not parts[0].mixes and parts[0].columns is None

    @property
    def constants(self) -> bool:
        """Whether some coordinate belongs to no column."""
        return any(b.loss is not None for b in self.parts())

    def values(self, delta: Tensor, g: Tensor) -> Tensor:
        """Relevance of the raw columns.

        Parameters
        ----------
        delta, g : Tensor (N, d)
            Displacements from the root, and covectors: the relevance of z
            is their product.

        Returns
        -------
        Tensor (N, D)
            ``values.sum(1) + lost == (delta * g).sum(1)``.
        """
        return self._sum([b.gather(b.middle(delta, g)) for b in self.parts()])

    def spread(self, R: Tensor) -> Tensor:
        """Relevance of the raw columns (N, D) from that of z (N, d), where no block mixes.

        Raises
        ------
        RuleError
            A step mixes columns: relevance alone has no way back.
        """
        if self.mixes:
            raise RuleError(
                "relevance can't be handed back through a step that mixes columns",
                expected="displacements and covectors, or steps that act column by column",
                got="relevance of coordinates",
                fix="choose a rule whose terms are displacement times covector",
            )
        return self._sum([b.gather(b.cut(R)) for b in self.parts()])

    def lost(self, delta: Tensor, g: Tensor | None = None) -> Tensor:
        """What falls on coordinates without a column (N,): the residual part "constant columns".

        Parameters
        ----------
        delta : Tensor (N, d)
            Displacements, or the relevance of z where no block mixes.
        g : Tensor (N, d), optional
            Covectors.
        """
        total = delta.new_zeros(len(delta))
        for block in self.parts():
            if block.loss is not None:
                here = block.lost(block.cut(delta) if g is None else block.middle(delta, g))
                assert here is not None
                total = total + here
        return total

    def raw(self, number: int, points: Tensor) -> Tensor:
        """Raw values of points in the coordinates a block leads to.

        Parameters
        ----------
        number : int
            Position of the block.
        points : Tensor (N, m)

        Returns
        -------
        Tensor (N, D)
            In the units of the columns. NaN where the column does not come
            from this block, where it is the sum of several coordinates, and
            where no raw value leads to the point (beyond the bounds of a
            clipping scaler, or where a norm stands between).
        """
        block = self.parts()[number]
        owner = self.owners(number)
        raw = points.new_full((len(points), self.columns), math.nan)
        for rows, chain in block.chains or ((np.arange(points.shape[1]), ()),):
            kept = np.flatnonzero(owner[rows] >= 0)
            if not len(kept):
                continue
            y = points[:, torch.as_tensor(rows[kept], device=points.device)]
            for stage, columns in chain:
                y = stage.invert(y, torch.as_tensor(columns[kept], device=points.device))
            y = torch.where(y.isfinite(), y, math.nan).to(raw.dtype)
            raw = raw.index_copy(1, torch.as_tensor(owner[rows[kept]], device=points.device), y)
        return raw

    def owners(self, number: int) -> Any:
        """Per coordinate of a block the one column that gets all its relevance from it, else -1 (m,)."""
        parts = self.parts()
        count = np.zeros(self.columns, dtype=np.int64)
        found = None
        for k, block in enumerate(parts):
            if block.columns is None:
                count += 1
                mine = np.arange(self.columns)
            elif block.column is not None:
                mine = block.column.cpu().numpy()
                count[mine] += 1
            else:
                assert block.matrix is not None
                M = block.matrix.cpu().numpy()
                count += (M != 0).sum(0)
                mine = np.where(((M != 0).sum(1) == 1) & (M.sum(1) == 1), (M != 0).argmax(1), -1)
            if k == number:
                found = mine
        assert found is not None
        return np.where((found >= 0) & (count[found] == 1), found, -1)

    def _sum(self, parts: list[Tensor]) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def __repr__(self) -> str:
        # one line: in a drawing of the network the stages say it all
        blocks = "; ".join(b.extra_repr() for b in self.parts())
        return f"Frame({self.coordinates} coordinates -> {self.columns} columns: {blocks})"
