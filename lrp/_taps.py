"""Taps: identities in the program whose probes' gradients are relevance that somebody asked for.

A probe is a zero tensor that takes part in nothing; what autograd reports as
its gradient is what the tap hands it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrp._graph import Layout


class _LayerTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, times: bool) -> Tensor:
        ctx.times = times
        if times:
            ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        return c, ctx.saved_tensors[0] * c if ctx.times else c, None


def layer_tap(y: Tensor, probe: Tensor, times: bool) -> Tensor:
    """y; its relevance goes to the probe, which is shaped like y.

    ``times=False`` hands on the coefficient instead (gradient methods, and
    sinks, whose coefficient is relevance).
    """
    out: Tensor = _LayerTap.apply(y, probe, times)  # type: ignore[no-untyped-call]  # torch: untyped
    return out


class _ChannelTap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, probe: Tensor, layout: Layout, channel_dim: int, times: bool, absolute: bool
    ) -> Tensor:
        ctx.layout, ctx.channel_dim, ctx.times, ctx.absolute = layout, channel_dim, times, absolute
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        (y,) = ctx.saved_tensors
        r = y * c if ctx.times else c
        if ctx.absolute:
            r = r.abs()
        return c, ctx.layout.per_channel(r, ctx.channel_dim), None, None, None, None


def channel_tap(y: Tensor, probe: Tensor, layout: Layout, channel_dim: int, times: bool, absolute: bool) -> Tensor:
    """y; the signed sum over space of its relevance, per sample and channel, goes to the probe.

    ``times=False`` sums the coefficient instead (gradient methods);
    ``absolute=True`` sums magnitudes.
    """
    out: Tensor = _ChannelTap.apply(y, probe, layout, channel_dim, times, absolute)  # type: ignore[no-untyped-call]  # torch: untyped
    return out
