"""Reference samples and test data: what a batch may look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrp._batches import Batch, check_batches, parse, targets
from lrp.errors import InputError, LRPError

__all__ = ["Filled", "batches_of", "check_reiterable", "device_of", "labels_of", "outputs_of", "tensors_of"]


def device_of(model: nn.Module, device: torch.device | str | None = None) -> torch.device:
    """The device asked for, or the one the model's first parameter or buffer lies on."""
    if device is not None:
        try:
            return torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise InputError(
                "there is no such device",
                expected="'cpu', 'cuda' or another of torch",
                got=repr(device),
                fix="change it",
            ) from error
    for t in (*model.parameters(), *model.buffers()):
        return t.device
    return torch.device("cpu")


def check_reiterable(data: Any, what: str = "data") -> Any:
    """The data set itself, unless it could be read once only.

    Raises
    ------
    InputError
        For None, a generator or anything that only looks like an iterable of batches.
    """
    if data is None:
        raise InputError(
            f"{what} is missing",
            expected="a DataLoader or a list of batches (x, y) or x",
            got="None",
            fix="pass a few samples, for example [(x, y)]",
        )
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise InputError(
            f"{what} gives single samples, not batches",
            expected="a DataLoader or a list of batches (x, y) or x",
            got=type(data).__name__,
            fix="pass torch.utils.data.DataLoader(dataset, batch_size=32)",
        )
    checked = check_batches(data, False)
    if isinstance(checked, Iterator):
        raise InputError(
            f"{what} can be read once only, and several passes are needed",
            expected="a DataLoader or a list",
            got=type(data).__name__,
            fix=f"pass list({what})",
        )
    return checked


def batches_of(data: Any, device: torch.device | str | None = None, what: str = "data") -> Iterator[Batch]:
    """Batches on the device, with ``y`` a LongTensor (N,) there or None.

    Raises
    ------
    InputError
        If the data or one batch has no known form, or there is no sample at all.
    """
    checked = check_reiterable(data, what)
    place = None if device is None else torch.device(device)
    count = 0
    for index, item in enumerate(checked):
        batch = parse(item, index).to(place)
        n = batch.inputs[0].shape[0] if batch.inputs[0].dim() else 0
        if not n:
            continue
        count += n
        y = targets(batch, index)
        if isinstance(y, int):
            y = torch.full((n,), y)
        if y is not None:
            if y.shape != (n,):
                raise InputError(
                    f"the labels of batch {index} do not fit its samples",
                    expected=f"{n} classes, shape ({n},)",
                    got=f"shape {tuple(y.shape)}",
                    fix="yield (x, y) with one class index per sample",
                )
            y = y.to(device=batch.inputs[0].device, dtype=torch.int64)
        yield Batch(batch.x, y)
    if not count:
        raise InputError(
            f"{what} holds no sample", expected="at least one batch", got="none", fix="check the loader or the folder"
        )


class Filled:
    """The same batches but for those without a sample, as :func:`batches_of` leaves them out."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        for index, item in enumerate(self.data):
            x = parse(item, index).inputs[0]
            if x.dim() and len(x):
                yield item

    def __len__(self) -> int:
        return len(self.data)


def labels_of(batch: Batch, why: str) -> Tensor:
    """The labels of a batch.

    Raises
    ------
    InputError
        If it brings none.
    """
    if batch.y is None:
        raise InputError(
            f"{why} needs labels",
            expected="batches (x, y)",
            got="batches without y",
            fix="yield (x, y), or choose a criterion that needs no labels",
        )
    y: Tensor = batch.y
    return y


def outputs_of(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What the model returns for a batch.

    Raises
    ------
    InputError
        If it does not run on it; out of memory is torch's own error.
    """
    try:
        return model(*inputs)
    except (LRPError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t) for t in inputs)
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise InputError(
            f"{type(model).__name__} does not run on a batch of the samples",
            expected="inputs of the shape and type that it was trained on",
            got=f"{shapes}: {type(error).__name__}: {first}",
            fix="look at what the loader yields; the first axis is that of the samples",
        ) from error


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of what a model returned: a tensor, or dicts, tuples and objects that hold some."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in tensors_of(part)]
    return [t for t in vars(output).values() if isinstance(t, Tensor)] if hasattr(output, "__dict__") else []
