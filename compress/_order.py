"""The order in which samples are seen in each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress._data import check_reiterable
from compress._randomness import seed_of
from lrp._batches import Batch, chain, parse
from lrp.errors import InputError

__all__ = ["Order", "fingerprint", "order_of"]


@dataclass(frozen=True)
class Order:
    """Data, and what seeds their order.

    Parameters
    ----------
    data
        A pair of tensors (x, y), or of a tuple of tensors and y: rows are dealt
        into new batches in every epoch. A list of batches: these come in a new
        order in every epoch. Any other iterable, such as a DataLoader, has its
        own order.
    batch_size : int
        For a pair.
    seed : int
    """

    data: Any
    batch_size: int
    seed: int

    @property
    def pair(self) -> tuple[tuple[Tensor, ...], Tensor] | None:
        """Inputs and labels, if the data are one pair."""
        data = self.data
        if not isinstance(data, (tuple, list)) or len(data) != 2:
            return None
        x, y = data
        inputs = x if isinstance(x, tuple) else (x,)
        if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dim() != 1:
            return None
        if not all(isinstance(t, Tensor) and t.dim() and len(t) == len(y) for t in inputs):
            return None
        return inputs, y

    def __len__(self) -> int:
        """Batches of an epoch; where the data do not tell, they are counted."""
        if self.pair is not None:
            return max(1, -(-len(self.pair[1]) // self.batch_size))
        try:
            return len(self.data)
        except TypeError:
            return sum(1 for _ in self.data)

    def epoch(self, index: int) -> Epoch:
        """A re-iterable of the batches of one epoch."""
        return Epoch(self, index)

    def fingerprint(self) -> list[Any]:
        """What tells these data from others, as far as it can be had without reading a loader."""
        if self.pair is not None:
            return ["pair", self.batch_size, chain("", Batch(*self.pair))]
        return fingerprint(self.data)


def fingerprint(data: Any) -> list[Any]:
    """Of batches: a list by its values, a loader by its length, which costs nothing to read."""
    if isinstance(data, (list, tuple)):
        digest = ""
        for index, item in enumerate(data):
            digest = chain(digest, parse(item, index))
        return ["batches", digest]
    try:
        length: int | None = len(data)
    except TypeError:
        length = None
    return [type(data).__name__, length, getattr(data, "batch_size", None)]


@dataclass(frozen=True)
class Epoch:
    order: Order
    index: int

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        data, pair = self.order.data, self.order.pair
        draw = torch.Generator().manual_seed(seed_of(self.order.seed, self.index))
        if pair is not None:
            inputs, y = pair
            # parts of nearly equal size: no last batch of one sample, which batch normalisation can not train on
            for rows in torch.randperm(len(y), generator=draw).tensor_split(len(self.order)):
                at = rows.to(y.device)
                x = tuple(t[at] for t in inputs)
                yield (x if len(x) > 1 else x[0], y[at])
        elif isinstance(data, (list, tuple)):
            for k in torch.randperm(len(data), generator=draw).tolist():
                yield data[k]
        else:
            yield from data


def order_of(data: Any, batch_size: int, seed: int) -> Order:
    """Checked data with an order.

    Raises
    ------
    InputError
    """
    order = Order(data, batch_size, seed)
    if order.pair is None:
        check_reiterable(data)
    elif not len(order.pair[1]):
        raise InputError("data holds no sample", expected="at least one row", got="0", fix="check how they were loaded")
    return order
