"""Rows on their way into a network: batches, their numbers on the device, and where values go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor

from lrp.errors import InputError
from neuralize.fronts import Front
from neuralize.heads import Workspace, buffer
from neuralize.tables import Table, non_finite

__all__ = ["Receiver", "batches", "loaded", "verify"]

NUMPY: dict[torch.dtype, np.dtype[Any]] = {torch.float64: np.dtype(np.float64), torch.float32: np.dtype(np.float32)}


def batches(n: int, size: int | str, width: int) -> Iterator[slice]:
    """Consecutive rows.

    Parameters
    ----------
    n : int
    size : int or "auto"
    width : int
        Numbers per row that the widest layer holds.
    """
    if size == "auto":
        # large enough to hide the calls, small enough for the cache: measured at 100 columns
        size = max(64, min(16384, 2**21 // max(width, 1)))
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise InputError(
            "batch_size is no number of rows", expected="'auto' or an integer > 0", got=repr(size), fix="choose one"
        )
    for start in range(0, n, int(size)):
        yield slice(start, min(start + int(size), n))


def dense(chunk: Any) -> npt.NDArray[Any]:
    """Rows of a table as an array."""
    return np.asarray(chunk.toarray() if scipy.sparse.issparse(chunk) else chunk)


def loaded(
    tab: Table, rows: slice, front: Front, nullable: npt.NDArray[np.bool_], like: Tensor, work: Workspace
) -> Tensor:
    """Coordinates (n, d) of some rows on the device; without a copy where there is nothing to do.

    Parameters
    ----------
    tab : Table
    rows : slice
    front : Front
    nullable : ndarray (D,)
        Columns in which missing values are allowed.
    like : Tensor
        Of the network's precision and device.
    work : dict
        Buffers kept between batches.
    """
    chunk = dense(tab.array[rows])
    plain = like.device.type == "cpu" and NUMPY[like.dtype] == chunk.dtype
    if plain and not len(front.stages) and chunk.flags.writeable and min(chunk.strides, default=0) >= 0:
        return torch.from_numpy(chunk)
    if front.hides:
        wrong = np.isinf(chunk) if nullable.any() else ~np.isfinite(chunk)
        if wrong.any():
            raise non_finite(chunk, tab.names, rows.start, nullable.tolist())
    wide = torch.float32 if like.dtype == torch.float32 else torch.float64
    host = buffer(work, "host", chunk.shape, torch.empty(0, dtype=wide))
    with np.errstate(over="ignore"):
        np.copyto(host.numpy(), chunk, casting="unsafe")
    return front.apply_(host.to(device=like.device, dtype=like.dtype))


def verify(finite: Tensor, tab: Table, rows: slice, nullable: npt.NDArray[np.bool_], first_row: int = 0) -> None:
    """Raise ``NonFiniteError`` where a number of a batch (n,) is not finite."""
    if not bool(finite.isfinite().all()):
        raise non_finite(dense(tab.array[rows]), tab.names, first_row + rows.start, nullable.tolist())


class Receiver:
    """Where values go: an array of the caller's, one of ours, or the largest few of each row.

    Parameters
    ----------
    out : ndarray (N, D) or None
    shape : (int, int)
    dtype : dtype
    top : int or None
        Keep that many values per row, the largest by magnitude, and return a
        CSR array.
    """

    def __init__(self, out: Any, shape: tuple[int, int], dtype: np.dtype[Any], top: int | None) -> None:
        self.shape, self.dtype = shape, dtype
        self.top = None if top is None else min(top, shape[1])
        if self.top is None:
            self.values = np.empty(shape, dtype) if out is None else _checked(out, shape, dtype)
        else:
            if out is not None:
                raise InputError(
                    "out= and top= exclude each other",
                    expected="all values into out, or the largest returned",
                    got="both",
                    fix="drop one of them",
                )
            self._data = np.empty((shape[0], self.top), dtype)
            self._columns = np.empty((shape[0], self.top), np.int64)

    def tensor(self, rows: slice, like: Tensor, work: Workspace) -> Tensor:
        """Where a batch is written: the array itself where that is possible."""
        if self.top is None and like.device.type == "cpu":
            return torch.from_numpy(self.values[rows])
        return buffer(work, "values", (rows.stop - rows.start, self.shape[1]), like)

    def take(self, rows: slice, batch: Tensor) -> Tensor | None:
        """Keep a batch; returns what was dropped of each row (n,), where values are."""
        if self.top is None:
            if batch.device.type != "cpu":
                self.values[rows] = batch.cpu().numpy()
            return None
        order = batch.abs().topk(self.top, dim=1).indices.sort(1).values
        kept = batch.gather(1, order)
        self._data[rows], self._columns[rows] = kept.cpu().numpy(), order.cpu().numpy()
        # summed by itself: total minus kept would cancel
        return batch.scatter(1, order, 0.0).sum(1)

    def result(self) -> Any:
        """The values: an array, or a CSR array."""
        if self.top is None:
            return self.values
        pointer = np.arange(0, self.shape[0] * self.top + 1, max(self.top, 1))[: self.shape[0] + 1]
        return scipy.sparse.csr_array((self._data.ravel(), self._columns.ravel(), pointer), shape=self.shape)


def _checked(out: Any, shape: tuple[int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != dtype:
        got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise InputError(
            "out can not receive the values",
            expected=f"a numpy array or memmap {dtype} {shape}",
            got=got,
            fix="allocate it with this shape and dtype; net.float() computes in float32",
        )
    if not out.flags.writeable or min(out.strides, default=0) < 0:
        raise InputError(
            "out is read-only or reversed", expected="a writable array", got="one that is not", fix="pass mode='r+'"
        )
    return out
