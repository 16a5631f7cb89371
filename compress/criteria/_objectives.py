"""Objectives: one number per sample that a gradient is taken of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from compress._data import labels_of
from lrp._batches import Batch
from lrp._settings import _plain
from lrp.errors import InputError, OutputError, TargetError

__all__ = ["CROSS_ENTROPY", "Loss", "check_loss", "logit", "loss_of", "setting"]

CROSS_ENTROPY = "cross_entropy"
#: ``loss(output, y) -> (N,)``
Loss = str | Callable[[Any, Any], Tensor]


def setting(loss: Loss) -> Any:
    """A loss as a JSON-able value."""
    return loss if isinstance(loss, str) else _plain(loss)


def check_loss(loss: Loss) -> None:
    """Raise InputError unless it is "cross_entropy" or a callable."""
    if loss != CROSS_ENTROPY and not callable(loss):
        raise InputError(
            "unknown loss",
            expected="'cross_entropy' or a callable loss(output, y) -> (N,)",
            got=repr(loss),
            fix="for a regression: lambda output, y: (output - y).square().flatten(1).sum(1)",
        )


def loss_of(output: Any, batch: Batch, loss: Loss, why: str) -> Tensor:
    """The loss of every sample, (N,).

    Raises
    ------
    InputError, OutputError, TargetError
        If there are no labels, or output and labels do not fit.
    """
    n = batch.inputs[0].shape[0]
    if not isinstance(loss, str):
        value = loss(output, batch.y)
        if not isinstance(value, Tensor) or value.shape != (n,):
            raise InputError(
                f"the loss of {why} is not one number per sample",
                expected=f"a Tensor ({n},)",
                got=str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__,
                fix="do not reduce over samples; sum over everything else",
            )
        return value
    y = labels_of(batch, why)
    return F.cross_entropy(_classes(output, y, why), y, reduction="none")


def logit(output: Any, batch: Batch, why: str) -> Tensor:
    """The output of every sample's class, (N,): the label, or the largest output where there is none."""
    y = batch.y
    if y is None and isinstance(output, Tensor) and output.dim() == 2:
        y = output.detach().argmax(1)
    return _classes(output, y, why).gather(1, y[:, None])[:, 0]


def _classes(output: Any, y: Tensor | None, why: str) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise OutputError(
            f"{why} needs an output with one number per class",
            expected="a Tensor (N, classes)",
            got=f"a Tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__,
            fix="wrap the network so that it returns its logits, or pass loss=",
        )
    if y is not None and bool(((y < 0) | (y >= output.shape[1])).any()):
        raise TargetError(
            "a label is out of range",
            expected=f"0 <= y < {output.shape[1]}",
            got=f"values from {int(y.min())} to {int(y.max())}",
            fix="labels are positions of output units",
        )
    return output
