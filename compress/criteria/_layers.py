"""Convolutions and linear layers: their output channels, and the weights that make one of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compress.criteria._names import near
from compress.cutting import channel_axis, width_of
from lrp.errors import InputError

__all__ = ["by_channel", "check_layers", "filters", "owned_weight"]


def check_layers(model: nn.Module, layers: Iterable[str] | str) -> dict[str, nn.Module]:
    """The modules of the names, each once.

    Raises
    ------
    InputError
        If a name is none of a convolution or linear layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    out: dict[str, nn.Module] = {}
    for name in (layers,) if isinstance(layers, str) else layers:
        module = modules.get(name)
        if not isinstance(module, (_ConvNd, nn.Linear)):
            known = [n for n, m in modules.items() if isinstance(m, (_ConvNd, nn.Linear))]
            raise InputError(
                f"'{name}' is no layer of {type(model).__name__} that can be scored",
                expected="the name of a convolution or linear layer",
                got="no module of that name" if module is None else type(module).__name__,
                fix=near(name, known, f"known are {', '.join(known)[:300]}" if known else "the model has none"),
            )
        out[name] = module
    return out


def owned_weight(module: nn.Module) -> Tensor | None:
    """The weight as a parameter of the layer; None where it is computed from others."""
    held = module._parameters.get("weight")
    return None if nn.utils.parametrize.is_parametrized(module, "weight") else held


def filters(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A tensor shaped like the weight, as one row per output channel.

    Parameters
    ----------
    module : nn.Module
        A convolution of any kind or a linear layer.
    weight : Tensor, optional
        The layer's weight if None.

    Returns
    -------
    Tensor (C_out, K)
        Row j holds all entries that take part in output channel j.
    """
    found: Any = module.weight if weight is None else weight
    w: Tensor = found.detach()
    if isinstance(module, _ConvTransposeNd):  # (C_in, C_out / groups, ...)
        parts = module.groups
        w = w.reshape(parts, w.shape[0] // parts, w.shape[1], *w.shape[2:]).transpose(1, 2)
        return w.reshape(module.out_channels, -1)
    return w.reshape(w.shape[0], -1)


def by_channel(module: nn.Module, output: Tensor, samples: int) -> Tensor:
    """An output of the layer, or what has its shape, as (samples, positions, channels).

    The first axis holds the samples, or a run of rows for each (windows of a
    picture).
    """
    return output.movedim(channel_axis(module, output), -1).reshape(samples, -1, width_of(module))
