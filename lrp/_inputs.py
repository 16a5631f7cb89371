"""Checks of the input tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrp.errors import InputError, NonFiniteError


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether none holds NaN or infinity: these survive in a sum, which needs no temporary and one look for all."""
    if not tensors:
        return True
    sums = torch.stack([t.sum().to(tensors[0].device, torch.float32) for t in tensors])
    return bool(sums.isfinite().all()) or all(bool(torch.isfinite(t).all()) for t in tensors)


def as_inputs(x: Any, name: str) -> tuple[Tensor, ...]:
    """The input tensors, checked.

    Raises
    ------
    InputError
        If an input is no floating-point tensor with a non-empty batch.
    NonFiniteError
        If it holds NaN or infinity.
    """
    inputs = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    if not inputs:
        raise InputError(f"{name} got no input", expected="a tensor", got="nothing", fix="pass the input")
    for i, t in enumerate(inputs):
        which = "the input" if len(inputs) == 1 else f"input {i}"
        if not isinstance(t, Tensor):
            raise InputError(
                f"{which} of {name} is not a tensor",
                expected="a torch.Tensor (N, ...)",
                got=type(t).__name__,
                fix="convert it with torch.as_tensor",
            )
        if t.device.type == "meta" or t.layout != torch.strided:
            raise InputError(
                f"{which} of {name} has no values to read",
                expected="a dense tensor on a CPU or GPU",
                got=f"{t.layout} on {t.device}",
                fix="use to_dense(), or a device that holds data",
            )
        if not t.is_floating_point():
            raise InputError(
                f"{which} of {name} has no relevance to receive",
                expected="a floating-point tensor",
                got=str(t.dtype),
                fix="convert it, scaled and normalised as in training, or explain the model after its embedding",
            )
        if t.ndim < 1 or t.shape[0] == 0 or t.numel() == 0:
            raise InputError(
                f"{which} of {name} is empty",
                expected="at least one sample, shape (N, ...) with N >= 1",
                got=str(tuple(t.shape)),
                fix="skip empty batches",
            )
        if t.shape[0] != inputs[0].shape[0]:
            raise InputError(
                "the inputs disagree on the batch size",
                expected=f"{inputs[0].shape[0]} samples",
                got=f"{t.shape[0]} in input {i}",
                fix="give every input the same number of samples",
            )
        if not bool(torch.isfinite(t).all()):
            bad = int((~torch.isfinite(t)).sum())
            raise NonFiniteError(
                f"{which} of {name} is not finite",
                expected="finite numbers",
                got=f"{bad} of {t.numel()} values are NaN or infinite",
                fix="impute or drop them first",
            )
    return inputs
