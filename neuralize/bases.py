r"""Other coordinates for an explanation: one more linear layer in front of the input.

With :math:`x = W c + r`, coordinates :math:`c = Cx` and what they leave, r, the
network on (c, r) is the same function, and relevance goes back to c as through
any affine step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lrp.errors import ColumnError, InputError, UnsupportedEstimatorError
from neuralize.frames import Block, Frame
from neuralize.fronts import Front
from neuralize.schema import Schema
from neuralize.stages import Projection

__all__ = ["Basis", "dct", "principal", "rebased"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Basis:
    r"""Linear coordinates :math:`c = Cx` of the columns.

    Parameters
    ----------
    matrix : array (B, D)
        C, of full rank, B <= D. What an incomplete basis leaves of the
        relevance is the residual's "outside the basis".
    names : sequence of str, optional
        Of the coordinates; default b0, b1, ...
    synthesis : array (D, B), optional
        W with CW = I; the pseudo-inverse by default.

    Raises
    ------
    InputError
        Not of full rank, or not one name per coordinate.

    Examples
    --------
    >>> haar = Basis([[0.5, 0.5], [1.0, -1.0]], ["mean", "difference"])
    >>> haar.coordinates(np.array([[3.0, 1.0]])).tolist()
    [[2.0, 2.0]]
    """

    def __init__(
        self, matrix: npt.ArrayLike, names: Sequence[str] | None = None, synthesis: npt.ArrayLike | None = None
    ) -> None:
        C = np.array(matrix, dtype=np.float64)
        if C.ndim != 2 or not np.isfinite(C).all():
            raise InputError(
                "a basis is a finite matrix", expected="(coordinates, columns)", got=str(C.shape), fix="pass C"
            )
        W = np.linalg.pinv(C) if synthesis is None else np.array(synthesis, dtype=np.float64)
        if W.shape != C.T.shape or not np.abs(C @ W - np.eye(len(C))).max(initial=0.0) < 1e-8:
            raise InputError(
                "the basis is not of full rank",
                expected="linearly independent coordinates, C W = I",
                got=f"{len(C)} coordinates of rank {np.linalg.matrix_rank(C)} on {C.shape[1]} columns",
                fix="drop the dependent ones",
            )
        self.matrix, self.synthesis = C, W
        self.names = tuple(f"b{i}" for i in range(len(C))) if names is None else tuple(map(str, names))
        if len(self.names) != len(C):
            raise InputError(
                "the basis needs one name per coordinate",
                expected=str(len(C)),
                got=str(len(self.names)),
                fix="name each",
            )
        left = np.eye(C.shape[1]) - W @ C
        self.complete = bool(np.abs(left).max() < 1e-10)
        self.left = left

    def coordinates(self, X: npt.ArrayLike) -> Floats:
        """c (N, B), and what it leaves, r (N, D), beside it if the basis is incomplete."""
        x = np.asarray(X, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.matrix.shape[1]:
            raise ColumnError(
                "the basis is one of other columns",
                expected=f"{self.matrix.shape[1]} columns",
                got=str(x.shape),
                fix="make the basis for the columns of the table",
            )
        c = x @ self.matrix.T
        return c if self.complete else np.hstack([c, x @ self.left.T])


def rebased(front: Front, schema: Schema, basis: Any) -> tuple[Front, Schema, tuple[str, ...], Ints]:
    """Layers from other coordinates to z.

    Returns
    -------
    Front, Schema
        That take the coordinates.
    names : tuple of str
        Of the columns of an explanation, (G,).
    view : ndarray (G,)
        Which coordinate each of them is; -1 where it is several.
    """
    if not isinstance(basis, Basis):
        return _grouped(front, schema, basis)
    d, B = basis.matrix.shape[1], len(basis.names)
    if d != front.inputs:
        raise ColumnError(
            "the basis is one of other columns",
            expected=f"{front.inputs} columns",
            got=str(d),
            fix="make the basis for the columns of the table",
        )
    if any(column.kind == "code" for column in schema.columns):
        raise UnsupportedEstimatorError(
            "a basis needs columns of numbers",
            expected="numbers in every column",
            got="columns of categories",
            fix="explain groups of columns instead: basis={name: [columns]}",
        )
    if basis.complete:
        stage = Projection(basis.synthesis, inverse=basis.matrix, source="basis")
        return Front([stage, *front.parts()], B), Schema.plain(B, basis.names), basis.names, np.arange(B)
    T, L = np.hstack([basis.synthesis, np.eye(d)]), np.vstack([basis.matrix, basis.left])
    whole = Front([Projection(T, inverse=L, source="basis"), *front.parts()], B + d)
    # what the coordinates leave belongs to none of them
    whole.frame = _shared(whole.frame, np.vstack([np.eye(B), np.zeros((d, B))]))
    whole.frame.lost_name = "outside the basis"
    names = [*basis.names, *(f"outside: {name}" for name in schema.feature_names)]
    return whole, Schema.plain(B + d, names), basis.names, np.arange(B)


def _shared(frame: Frame, share: Floats) -> Frame:
    """The frame with its columns shared among others, (D, G)."""
    import torch

    M = torch.tensor(share)
    blocks = []
    for block in frame.parts():
        own = block.share
        new = Block(
            block.index,
            block.inverse,
            block.transpose,
            block.shift,
            M if own is None else own.to(M) @ M,
            block.proportional,
        )
        new.chains = block.chains
        blocks.append(new)
    return Frame(blocks, share.shape[1], frame.coordinates)


def _grouped(front: Front, schema: Schema, groups: Any) -> tuple[Front, Schema, tuple[str, ...], Ints]:
    """Front and schema whose relevance is summed over groups of columns.

    Parameters
    ----------
    front : Front
    schema : Schema
    groups : dict of {str: columns}
        Columns by name or position; those in no group stay by themselves.
    """
    if not isinstance(groups, Mapping):
        raise InputError(
            "basis is neither groups of columns nor a Basis",
            expected="{name: [column, ...]} or a neuralize.bases.Basis",
            got=type(groups).__name__,
            fix="for example basis={'size': ['height', 'width']}",
        )
    names = schema.feature_names
    place = {name: t for t, name in enumerate(names)}
    owner: dict[int, str] = {}
    for group, columns in groups.items():
        listed = [columns] if isinstance(columns, (str, int)) else list(columns)
        if not listed:
            raise ColumnError(
                f"group {group!r} is empty", expected="at least one column", got="none", fix="drop the group"
            )
        for column in listed:
            t = place.get(column) if isinstance(column, str) else int(column)
            if t is None or not 0 <= t < len(names):
                raise ColumnError(
                    f"group {group!r} names a column that does not exist",
                    expected=f"one of {', '.join(names[:12])}",
                    got=repr(column),
                    fix="use names or positions of columns",
                )
            if t in owner:
                raise ColumnError(
                    f"column {names[t]!r} is in two groups",
                    expected="each column in one group",
                    got=f"{owner[t]!r} and {group!r}",
                    fix="choose one",
                )
            owner[t] = str(group)
    shown = [*map(str, groups), *(name for t, name in enumerate(names) if t not in owner)]
    twice = [name for name in shown if shown.count(name) > 1]
    if twice:
        raise ColumnError(
            f"{twice[0]!r} would name two columns of the explanation",
            expected="group names that differ from each other and from columns in no group",
            got=f"{twice[0]!r}, which is also the name of another",
            fix="choose another name",
        )
    labels = list(dict.fromkeys(owner.get(t, name) for t, name in enumerate(names)))
    share = np.zeros((len(names), len(labels)))
    for t, name in enumerate(names):
        share[t, labels.index(owner.get(t, name))] = 1.0
    new = Front(front.parts(), front.inputs)
    new.frame = _shared(front.frame, share)
    view = np.array([np.flatnonzero(column)[0] if column.sum() == 1 else -1 for column in share.T])
    return new, schema, tuple(labels), view


def dct(shape: tuple[int, int]) -> Basis:
    """Orthonormal two-dimensional cosine basis of an image, for columns that are its pixels row by row.

    Parameters
    ----------
    shape : (int, int)
        Height and width.

    Examples
    --------
    >>> dct((2, 2)).coordinates(np.ones((1, 4))).round(12).tolist()
    [[2.0, 0.0, 0.0, 0.0]]
    """

    def one(n: int) -> Floats:
        k, x = np.arange(n)[:, None], np.arange(n)[None]
        C = np.sqrt(2 / n) * np.cos(math.pi * (2 * x + 1) * k / (2 * n))
        C[0] /= math.sqrt(2)
        return np.asarray(C)

    height, width = shape
    C = np.kron(one(height), one(width))
    return Basis(C, [f"dct {u},{v}" for u in range(height) for v in range(width)], C.T)


def principal(X: npt.ArrayLike, components: int | None = None) -> Basis:
    """Principal axes of a table, the most variable first.

    Parameters
    ----------
    X : array (N, D)
    components : int, optional
        All by default.
    """
    x = np.asarray(X, dtype=np.float64)
    V = np.linalg.svd(x - x.mean(0), full_matrices=True)[2]
    V = V[: len(V) if components is None else components]
    return Basis(V, [f"component {i}" for i in range(len(V))], V.T)
