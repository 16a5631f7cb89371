"""Fast test passes of a CIFAR ResNet: batch norms folded, channels last, sums and ReLUs fused, in 32 or in 16 bits."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from experiments.models import CifarResNet

__all__ = ["correct", "folded"]


class _Fused(nn.Module):
    """A ResNet without batch norms; every convolution with its ReLU, and the sum with the shortcut, in one pass."""

    def __init__(self, net: CifarResNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = _conv_relu(net.conv1, x)
        for block in (*net.layer1, *net.layer2, *net.layer3):
            x = _conv_relu(block.conv2, _conv_relu(block.conv1, x), block.shortcut(x))
        out: Tensor = net.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


def _conv_relu(conv: Any, x: Tensor, other: Tensor | None = None) -> Tensor:
    """ReLU of the convolution, plus ``other`` if given: oneDNN's fused primitive, as torch.compile calls it."""
    shape = (conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    fused = torch.ops.mkldnn._convolution_pointwise
    out: Tensor
    if other is None:
        out = fused(x, *shape, "relu", [], "")
    else:
        out = fused.binary(x, other, *shape, "add", 1.0, "relu", [], "")
    return out


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
    out: Any = copy.deepcopy(model).eval()
    for name, conv in list(out.named_modules()):
        if isinstance(conv, nn.Conv2d):
            owner, _, short = name.rpartition(".")
            parent, norm = out.get_submodule(owner), short.replace("conv", "bn")
            setattr(parent, short, fuse_conv_bn_eval(conv, getattr(parent, norm)))
            setattr(parent, norm, nn.Identity())
    out = out.to(dtype=dtype, memory_format=torch.channels_last)
    on_cpu = next(out.parameters()).device.type == "cpu"
    return _Fused(out) if on_cpu and torch.backends.mkldnn.is_available() else out


def correct(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32, batch: int = 100) -> int:
    """How many of the pictures (N, 3, 32, 32) the model classifies as labelled."""
    fast = folded(model, dtype)
    right = 0
    with torch.no_grad():
        for part, labels in zip(x.split(batch), y.split(batch), strict=True):
            given = part.to(dtype=dtype).contiguous(memory_format=torch.channels_last)
            right += int((fast(given).float().argmax(1) == labels).sum())
    return right
