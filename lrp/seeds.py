"""Where relevance starts: the coefficient of the model's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrp.errors import InputError, NonFiniteError, TargetError

__all__ = ["Seed", "Start", "seed"]

STARTS = ("logit", "one_hot", "probability", "margin")


@dataclass(frozen=True, eq=False)
class Seed:
    """Coefficients to start from: relevance = output x coefficient.

    Parameters
    ----------
    coefficient : Tensor
        Shaped like the output.
    """

    coefficient: Tensor


Start = str | Tensor | Seed


def _fits(value: Tensor, output: Tensor, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != output.shape:
        raise InputError(
            f"{what} does not fit the output",
            expected=str(tuple(output.shape)),
            got=str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__,
            fix="give one number per output unit",
        )
    if value.is_complex():
        raise InputError(f"{what} is complex", expected="real numbers", got=str(value.dtype), fix="pass its real part")
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"{what} is not finite", expected="finite numbers", got="NaN or infinity", fix="check it")
    return value.to(device=output.device, dtype=output.dtype).detach()


def _targets(target: Any, output: Tensor) -> Tensor:
    """Class of every sample, LongTensor (N,)."""
    n, classes = output.shape
    if target is None:
        return output.argmax(1)
    if isinstance(target, bool) or (isinstance(target, Tensor) and target.dtype == torch.bool):
        raise TargetError("the target is a truth value", expected="class indices", got="bool", fix="pass integers")
    if isinstance(target, (Tensor, list, tuple)) or hasattr(target, "__array__"):
        try:
            tensor = torch.as_tensor(target, device=output.device)
        except (TypeError, ValueError, RuntimeError):
            tensor = torch.zeros(0)
        if tensor.dtype == torch.bool:
            raise TargetError("the targets are truth values", expected="class indices", got="bool", fix="pass integers")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.ndim > 1:
            raise TargetError(
                "the target is no vector of class indices",
                expected=f"integers ({n},)",
                got=f"{tensor.dtype} {tuple(tensor.shape)}",
                fix="pass one integer per sample",
            )
        chosen = tensor.long()
        if chosen.ndim == 0 or len(chosen) == 1:
            chosen = chosen.reshape(-1).expand(n)
    else:
        try:
            chosen = torch.full((n,), int(target.__index__()), device=output.device)
        except (AttributeError, TypeError) as error:
            raise TargetError(
                "the target is no class index",
                expected="None, an integer or integers (N,)",
                got=repr(target),
                fix="pass the index of the class to explain",
            ) from error
    if chosen.shape != (n,):
        raise TargetError(
            "the number of targets is not that of the samples",
            expected=f"{n} targets",
            got=str(tuple(chosen.shape)),
            fix="pass one target per sample, or a single one for all",
        )
    if bool(((chosen < 0) | (chosen >= classes)).any()):
        raise TargetError(
            "the target is out of range",
            expected=f"0 <= target < {classes}",
            got=f"values from {int(chosen.min())} to {int(chosen.max())}",
            fix="targets are positions of output units",
        )
    return chosen


def _safe_ratio(relevance: Tensor, output: Tensor, what: str) -> Tensor:
    zero = output == 0
    if bool((zero & (relevance != 0)).any()):
        raise TargetError(
            f"{what} puts relevance on an output that is 0",
            expected="relevance only where the output is not 0",
            got=f"{int((zero & (relevance != 0)).sum())} such outputs",
            fix="use lrp.Seed to give coefficients instead",
        )
    return torch.where(zero, 0, relevance / torch.where(zero, 1, output))


def check_start(start: Any, target: Any) -> None:
    """Raise unless the start is known, and fits the target.

    Raises
    ------
    TargetError
    """
    if isinstance(start, (Tensor, Seed)):
        if target is not None:
            raise TargetError(
                "start gives the relevance of every output, so a target has no meaning",
                expected="either a target or a Tensor / Seed start",
                got=f"target = {target!r} and a {type(start).__name__}",
                fix="drop the target",
            )
    elif start not in STARTS:
        raise TargetError(
            "unknown start", expected=f"one of {STARTS}, a Tensor or lrp.Seed", got=repr(start), fix="choose one"
        )


def seed(output: Tensor, target: Any, start: Start) -> tuple[Tensor, Tensor | None, Tensor]:
    """(coefficient, target, relevance) at the output.

    Parameters
    ----------
    output : Tensor (N, ...)
    target : None, int or LongTensor (N,)
        None: the largest output. Ignored by Tensor and Seed starts, which must
        come without one.
    start : str, Tensor or Seed
        ``"logit"``: the target's output. ``"one_hot"``: 1. ``"probability"``:
        its softmax. ``"margin"``: the target's output minus the largest other.
        A Tensor is the relevance itself.
    """
    check_start(start, target)
    if isinstance(start, (Tensor, Seed)):
        if isinstance(start, Seed):
            coefficient = _fits(start.coefficient, output, "the seed")
            return coefficient, None, coefficient * output
        relevance = _fits(start, output, "the start relevance")
        return _safe_ratio(relevance, output, "start"), None, relevance
    if output.ndim == 1 and target is None and start == "logit":
        return torch.ones_like(output), None, output
    if output.ndim != 2:
        raise TargetError(
            "the output has no class axis",
            expected="an output (N, classes) for a target; "
            + ("start='logit' without target" if output.ndim == 1 else "or a start for every output unit"),
            got=str(tuple(output.shape)),
            fix="pass start=lrp.Seed(c) with c shaped like the output",
        )
    chosen = _targets(target, output)
    coefficient = torch.zeros_like(output).scatter_(1, chosen[:, None], 1.0)
    if start == "logit":
        pass
    elif start == "margin":
        if output.shape[1] < 2:
            raise TargetError("a margin needs two classes", expected="at least 2 outputs", got="1", fix="use 'logit'")
        others = output.masked_fill(coefficient.bool(), float("-inf")).argmax(1)
        coefficient = coefficient.scatter(1, others[:, None], -1.0)
    else:
        amount = torch.softmax(output, 1) if start == "probability" else torch.ones_like(output)
        coefficient = _safe_ratio(coefficient * amount, output, f"start={start!r}")
    return coefficient, chosen, coefficient * output
