"""Fast test passes of a CIFAR ResNet: batch norms folded, channels last, products in 32 or in 16 bits."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["correct", "folded"]


def folded(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy without batch norms: those of :class:`experiments.models.CifarResNet` are folded into their convolutions.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; of any widths.
    dtype : torch.dtype
        bfloat16 is three times as fast on a CPU with matrix units, and moves
        single predictions.
    """
    out = copy.deepcopy(model).eval()
    for name, conv in list(out.named_modules()):
        if isinstance(conv, nn.Conv2d):
            owner, _, short = name.rpartition(".")
            parent, norm = out.get_submodule(owner), short.replace("conv", "bn")
            setattr(parent, short, fuse_conv_bn_eval(conv, getattr(parent, norm)))
            setattr(parent, norm, nn.Identity())
    return out.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack this pair


def correct(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32, batch: int = 100) -> int:
    """How many of the pictures (N, 3, 32, 32) the model classifies as labelled."""
    fast = folded(model, dtype)
    right = 0
    with torch.no_grad():
        for part, labels in zip(x.split(batch), y.split(batch), strict=True):
            given = part.to(dtype=dtype).contiguous(memory_format=torch.channels_last)
            right += int((fast(given).float().argmax(1) == labels).sum())
    return right
