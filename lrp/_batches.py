"""Batches of a data set: what they may look like, and which data they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrp.errors import InputError
from lrp.seeds import Seed, Start

__all__ = ["Batch", "as_names", "chain", "check_batches", "parse", "rows", "start_for", "targets"]

_CONVENTION = "x, (x, y) or, for several inputs, ((x1, x2), y); without targets (x,) or ((x1, x2),)"


@dataclass(frozen=True)
class Batch:
    """Inputs, and what came beside them."""

    x: Tensor | tuple[Tensor, ...]
    y: Any

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.x if isinstance(self.x, tuple) else (self.x,)

    def to(self, device: torch.device | None) -> Batch:
        if device is None:
            return self
        moved = tuple(t.to(device, non_blocking=True) for t in self.inputs)
        return Batch(moved if isinstance(self.x, tuple) else moved[0], self.y)


def _is_integers(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def check_batches(batches: Any, distributed: bool) -> Iterable[Any]:
    """The iterable of batches, unless it is something that only looks like one.

    Raises
    ------
    InputError
    """
    what = ""
    if isinstance(batches, Tensor):
        what = "a Tensor, whose items have no batch axis"
    elif isinstance(batches, (str, bytes, dict)) or not (
        hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    ):
        what = type(batches).__name__
    elif isinstance(batches, (tuple, list)) and len(batches) == 2 and _is_integers(batches[1]):
        what = "one pair (x, y), not an iterable of pairs"
    if what:
        raise InputError(
            "batches is no iterable of batches",
            expected=f"a DataLoader, a list or a generator that yields {_CONVENTION}",
            got=what,
            fix="pass [x] or [(x, y)] for a single batch, x.split(32) to cut a tensor",
        )
    if distributed and isinstance(getattr(batches, "sampler", None), torch.utils.data.DistributedSampler):
        raise InputError(
            "the loader has a DistributedSampler, and collect deals out whole batches itself",
            expected="the same batches in every process",
            got="a part of the data in each, of which only every n-th batch would be used",
            fix="leave the sampler out; shuffle only with one seed for all processes",
        )
    checked: Iterable[Any] = batches
    return checked


def parse(item: Any, index: int) -> Batch:
    """What one step of the iterable yielded.

    Raises
    ------
    InputError
        If it is none of x, (x,), (x, y), ((x1, x2),), ((x1, x2), y).
    """
    x, y = item, None
    if isinstance(item, (tuple, list)) and len(item) in (1, 2):
        x, y = item[0], item[1] if len(item) == 2 else None
    several = isinstance(x, (tuple, list))
    parts = tuple(x) if several else (x,)
    if not parts or not all(isinstance(t, Tensor) for t in parts) or (several and x is item):
        kinds = [type(t).__name__ for t in item] if isinstance(item, (tuple, list)) else type(item).__name__
        raise InputError(
            f"batch {index} has no known form",
            expected=_CONVENTION,
            got=f"{len(item)} entries: {kinds}" if isinstance(item, (tuple, list)) else str(kinds),
            fix="yield tensors in one of these forms, for example "
            "((a, b), y) for b in loader; dictionaries are unpacked by a generator",
        )
    return Batch(parts if several else x, y)


def targets(batch: Batch, index: int) -> Any:
    """The classes a batch brings, checked as far as possible without the output; None if it brings none."""
    y = batch.y
    if y is None or isinstance(y, int):
        return y
    if isinstance(y, (list, tuple)) and all(isinstance(v, int) for v in y):
        y = torch.tensor(y)
    if _is_integers(y):
        return y
    raise InputError(
        f"the second entry of batch {index} is no target",
        expected="a LongTensor (N,) of classes",
        got=f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__,
        fix="several inputs go into a tuple of their own, ((x1, x2),); target='predicted' leaves targets aside",
    )


_SAMPLE = 1024


def chain(digest: str, batch: Batch) -> str:
    """Digest of all batches so far: shapes, and up to about a thousand values of every tensor.

    Enough to tell another order, another shuffle or other data; every value
    would cost as much as reading the data again.
    """
    out = hashlib.sha256(digest.encode())
    for t in (*batch.inputs, *((batch.y,) if isinstance(batch.y, Tensor) else ())):
        out.update(f"{t.dtype} {tuple(t.shape)}".encode())
        flat = t.detach().reshape(-1)
        step = flat.numel() // _SAMPLE | 1  # odd: no walk along one column
        values = flat[::step].cpu().contiguous()
        out.update(values.view(torch.uint8).numpy().data)
    if not isinstance(batch.y, Tensor):
        out.update(repr(batch.y).encode())
    return out.hexdigest()


def start_for(start: Start, count: int, ndim: int) -> Start:
    """The start of a batch of ``count``, where the output has ``ndim`` axes with the batch.

    A Tensor or Seed shaped like the output of one sample stands for each.
    """
    if isinstance(start, Seed):
        inner = start_for(start.coefficient, count, ndim)
        assert isinstance(inner, Tensor)
        return Seed(inner)
    if isinstance(start, Tensor):
        if start.ndim == ndim - 1:
            return start.expand(count, *start.shape)
        if start.ndim == ndim and start.shape[0] == 1:
            return start.expand(count, *start.shape[1:])
    return start


def rows(value: Any, i: int) -> Any:
    """What belongs to sample i, as a batch of one."""
    if isinstance(value, Seed):
        return Seed(value.coefficient[i : i + 1])
    if isinstance(value, tuple):
        return tuple(t[i : i + 1] for t in value)
    if isinstance(value, Tensor) and value.ndim and len(value) > 1:
        return value[i : i + 1]
    return value


def as_names(value: Sequence[str] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
