"""Relevance at everything that is no module of its own, by definition, in eager mode.

While :class:`Definitions` is active, every call on tensors runs as the detached
form of its rule, so that the ordinary gradient carries coefficients:

- gates (sigmoid, softmax) and the queries and keys of attention are held fixed;
- a product of two tensors that are not fixed gives half to each factor;
- statistics of a normalisation, and denominators, are held fixed;
- an elementwise function f passes relevance unchanged: factor f(x) / x;
- everything else keeps its gradient.

"Fixed" is what needs no gradient, so that the rules follow from one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Linear = Callable[..., Tensor]  # like F.linear

GATES = {"softmax", "sigmoid", "hardsigmoid"}
IDENTITY = {"silu", "hardswish", "gelu", "elu", "mish", "tanh", "hardtanh", "relu6", "selu", "celu"}
PRODUCTS = {"mul", "rmul", "imul", "multiply", "matmul", "rmatmul", "bmm", "mm"}
QUOTIENTS = {"div", "truediv", "itruediv", "divide", "true_divide"}
SUMS = {"add", "radd", "iadd", "sub", "isub"}
MEANS = {"mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
IN_PLACE = {"add_", "sub_", "mul_", "div_"}
NORMS = {"layer_norm", "group_norm", "rms_norm"}


def stabilise(d: Tensor, epsilon: float) -> Tensor:
    return d + epsilon * torch.where(d < 0, -torch.ones_like(d), torch.ones_like(d))


def with_gradient_of(value: Tensor, carrier: Tensor) -> Tensor:
    """The value, with the gradient of the carrier."""
    return value.detach() + carrier - carrier.detach()


def live(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


def normalise(x: Tensor, axes: tuple[int, ...], epsilon: float, centre: bool = True) -> Tensor:
    centred = x - x.mean(axes, keepdim=True) if centre else x
    return centred / (centred.square().mean(axes, keepdim=True) + epsilon).sqrt().detach()


class Definitions(TorchFunctionMode):
    """The rules of functional calls.

    Parameters
    ----------
    linear : callable
        Stands in for ``F.linear``.
    conv : callable
        Stands in for ``F.conv2d``.
    sums : float
        Stabiliser on additions and average pools.
    """

    def __init__(self, linear: Linear, conv: Linear, sums: float = 0.0) -> None:
        super().__init__()
        self.linear, self.conv, self.sums = linear, conv, sums

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        raw = getattr(func, "__name__", "")
        if raw in IN_PLACE and live(args[0]):
            operands = (args[0].clone(), *args[1:])  # what autograd keeps must not be written over
            return args[0].copy_(self._rule(getattr(torch, raw[:-1]), raw[:-1], operands, kwargs))
        return self._rule(func, raw.strip("_"), args, kwargs)

    def _rule(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if not any(live(a) for a in args):
            return func(*args, **kwargs)
        if name in GATES:
            return func(*args, **kwargs).detach()
        if name in IDENTITY:
            return self._identity(func, args[0], args[1:], kwargs)
        if name in PRODUCTS and live(args[0]) and live(args[1]):
            left = func(args[0], args[1].detach(), *args[2:], **kwargs)
            return 0.5 * (left + func(args[0].detach(), args[1], *args[2:], **kwargs))
        if name in QUOTIENTS and live(args[1]):
            return func(args[0], args[1].detach(), *args[2:], **kwargs)
        if name == "scaled_dot_product_attention":
            return func(args[0].detach(), args[1].detach(), *args[2:], **kwargs)
        if name == "linear":
            return self.linear(*args, **kwargs)
        if name == "conv2d":
            return self.conv(*args, **kwargs)
        if name in NORMS:
            return self._norm(name, *args, **kwargs)
        out = func(*args, **kwargs)
        both = name in SUMS and live(args[0]) and live(args[1])
        if self.sums and (both or name in MEANS):
            return with_gradient_of(out, out * (out / stabilise(out, self.sums)).detach())
        return out

    @staticmethod
    def _identity(func: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        y = func(x.detach().clone(), *args, **kwargs)
        ratio = torch.where(x == 0, torch.zeros_like(x), y / torch.where(x == 0, torch.ones_like(x), x))
        return with_gradient_of(y, x * ratio.detach())

    @staticmethod
    def _norm(name: str, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5) -> Tensor:
        if name == "group_norm":
            grouped = x.reshape(x.shape[0], shape, -1)
            y = normalise(grouped, (2,), eps).reshape(x.shape)
            across = (-1, *(1,) * (x.ndim - 2))
        else:
            axes = tuple(range(x.ndim - len(shape), x.ndim))
            if name == "rms_norm":
                eps = torch.finfo(x.dtype).eps if bias is None else bias  # the fourth operand there
                return normalise(x, axes, eps, centre=False) * (1 if weight is None else weight)
            y = normalise(x, axes, eps)
            across = tuple(shape)
        y = y if weight is None else y * weight.reshape(across)
        return y if bias is None else y + bias.reshape(across)
