"""Post-training quantization: weights rounded to the nearest level, no training and no data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compress.codebook import codebook_of
from compress.quantization_plan import QuantizationPlan

__all__ = ["ROUNDING", "round_to_nearest"]

ROUNDING: Mapping[str, tuple[str, bool]] = {  # method: (step, one step per output channel)
    "rtn": ("max", False),
    "rtn_per_channel": ("max", True),
    "mse": ("mse", False),
    "mse_per_channel": ("mse", True),
}


@torch.no_grad()
def round_to_nearest(
    model: nn.Module, chosen: Mapping[str, int], left_out: Mapping[str, str], method: str, levels: str = "symmetric"
) -> QuantizationPlan:
    """Replace the weights of a network by their nearest levels, in place.

    Parameters
    ----------
    model : nn.Module
        Carries the plan afterwards.
    chosen, left_out
        From :func:`compress.quantized_tensors.choose_tensors`.
    method : {"rtn", "rtn_per_channel", "mse", "mse_per_channel"}
        The step lets the outermost level meet the largest weight, or makes the
        squared error least; one step per tensor, or per output channel.
    levels : str
        See :func:`compress.codebook.codebook_of`.

    Examples
    --------
    >>> import torch
    >>> from compress.rounding import round_to_nearest
    >>> net = torch.nn.Linear(8, 4)
    >>> plan = round_to_nearest(net, {"weight": 3}, {}, "mse_per_channel")
    >>> plan.codebooks["weight"].step.shape, bool((net.weight.unique().numel() <= 4 * 7))
    (torch.Size([4]), True)
    """
    step, per_channel = ROUNDING[method]
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    books = {}
    for name, bits in chosen.items():
        p = parameters[name]
        axis = output_axis(modules[name.rpartition(".")[0]]) if per_channel else None
        books[name] = book = codebook_of(p, bits, levels=levels, step=step, axis=axis)
        p.copy_(book.values(book.nearest(p)))
    plan = QuantizationPlan(books, dict(left_out), {"method": method, "levels": levels})
    plan.apply(model)
    return plan


def output_axis(module: nn.Module) -> int:
    """The axis of a layer's output channels in its weight.

    A transposed convolution with groups has none: its output channels lie on
    two axes, and the slices of its first axis share a step instead.
    """
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 1 if module.groups == 1 else 0
    return 0
