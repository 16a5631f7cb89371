"""Slow and independent: a copy of a model whose ordinary gradient is LRP.

Every linear module is replaced by one that spells out its rule with split
weights, every other nonlinearity by the detached form of its definition; then
``activation x gradient`` is relevance at every layer. Works module by module,
in eager mode, and shares nothing with the package but the rule's parameters.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lrp import rules

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def stabilise(d: Tensor, epsilon: float) -> Tensor:
    return d + epsilon * torch.where(d < 0, -torch.ones_like(d), torch.ones_like(d))


def with_gradient_of(value: Tensor, carrier: Tensor) -> Tensor:
    """The value, with the gradient of the carrier."""
    return value.detach() + carrier - carrier.detach()


def apply_rule(rule: Any, call: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """One linear layer under one rule; ``b`` is shaped to broadcast over its output."""
    bias = torch.zeros((), dtype=x.dtype) if b is None else b
    z = call(x, w) + bias
    if isinstance(rule, rules.Epsilon):
        numerator, kept = call(x, w), bias
        if rule.epsilon == 0:
            return z
    else:
        up, down = x * (x > 0), x * (x < 0)
        positive = call(up, w.clamp(min=0)) + call(down, w.clamp(max=0))
        negative = call(up, w.clamp(max=0)) + call(down, w.clamp(min=0))
        if isinstance(rule, rules.ZPlus):
            numerator, kept = positive, bias.clamp(min=0)
        else:
            assert isinstance(rule, rules.Gamma)
            g = rule.gamma
            favoured = torch.where(z > 0, positive, negative)
            numerator = positive + negative + g * favoured
            kept = bias + g * torch.where(z > 0, bias.clamp(min=0), bias.clamp(max=0))
    ratio = (z / stabilise(numerator + kept, rule.epsilon)).detach()
    return with_gradient_of(z, numerator * ratio)


class NaiveLinear(nn.Module):
    def __init__(self, layer: nn.Module, rule: Any) -> None:
        super().__init__()
        self.layer, self.rule = layer, rule
        if type(layer).__name__ == "ScaledStdConv2d":
            gain = (layer.gain * layer.scale).view(-1)
            flat = layer.weight.reshape(1, layer.out_channels, -1)
            w = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=layer.eps)
            self.w = w.reshape_as(layer.weight).detach()
        else:
            self.w = layer.weight.detach()
        self.b = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return apply_rule(self.rule, F.linear, x, self.w, self.b)
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.w.ndim - 2]

        def call(x: Tensor, w: Tensor) -> Tensor:
            return conv(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)

        b = None if self.b is None else self.b.reshape(-1, *(1,) * (self.w.ndim - 2))
        return apply_rule(self.rule, call, x, self.w, b)


class NaiveActivation(nn.Module):
    """Relevance passes unchanged: factor f(x) / x."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        ratio = torch.where(x == 0, torch.zeros_like(x), y / torch.where(x == 0, torch.ones_like(x), x))
        return with_gradient_of(y, x * ratio.detach())


class NaiveLayerNorm(nn.Module):
    def __init__(self, inner: nn.LayerNorm) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(x.ndim - len(self.inner.normalized_shape), x.ndim))
        centred = x - x.mean(axes, keepdim=True)
        std = (centred.square().mean(axes, keepdim=True) + self.inner.eps).sqrt().detach()
        return centred / std * self.inner.weight.detach() + self.inner.bias.detach()


class NaiveAttention(nn.Module):
    """Multi-head self-attention, queries and keys held fixed."""

    def __init__(self, inner: nn.MultiheadAttention, rule: Any) -> None:
        super().__init__()
        self.inner, self.rule = inner, rule

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        m = self.inner
        n, length, width = query.shape
        packed = apply_rule(self.rule, F.linear, query, m.in_proj_weight.detach(), m.in_proj_bias.detach())
        heads = packed.reshape(n, length, 3, m.num_heads, width // m.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = heads[0].detach(), heads[1].detach(), heads[2]
        attention = torch.softmax(q @ k.transpose(-1, -2) / (width // m.num_heads) ** 0.5, -1)
        mixed = (attention @ v).transpose(1, 2).reshape(n, length, width)
        w, b = m.out_proj.weight.detach(), m.out_proj.bias.detach()
        return apply_rule(self.rule, F.linear, mixed, w, b), None


def _fuse(module: nn.Module) -> None:
    names = list(module._modules)
    for first, second in itertools.pairwise(names):
        conv, norm = module._modules[first], module._modules[second]
        if isinstance(conv, CONVS) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
            module._modules[first] = fuse_conv_bn_eval(conv, norm)
            module._modules[second] = nn.Identity()
    for child in module.children():
        _fuse(child)


ACTIVATIONS = (nn.SiLU, nn.GELU, nn.Hardswish, nn.ReLU6, nn.Hardtanh, nn.Mish, nn.ELU, nn.Tanh)


def _replace(module: nn.Module, convolution: Any, dense: Any) -> None:
    for name, child in module.named_children():
        if isinstance(child, CONVS):
            setattr(module, name, NaiveLinear(child, convolution))
        elif isinstance(child, nn.MultiheadAttention):
            setattr(module, name, NaiveAttention(child, dense))
        elif isinstance(child, nn.Linear):
            setattr(module, name, NaiveLinear(child, dense))
        elif isinstance(child, nn.LayerNorm):
            setattr(module, name, NaiveLayerNorm(child))
        elif isinstance(child, ACTIVATIONS):
            child.inplace = False
            setattr(module, name, NaiveActivation(child))
        elif isinstance(child, nn.ReLU):
            child.inplace = False
        elif type(child).__name__ == "SqueezeExcitation":
            child.forward = lambda x, se=child: se._scale(x).detach() * x
        else:
            _replace(child, convolution, dense)


def naive(model: nn.Module, convolution: Any, dense: Any) -> nn.Module:
    """The copy; batch norms directly behind a convolution are folded into it."""
    twin = copy.deepcopy(model).eval()
    for p in twin.parameters():
        p.requires_grad_(False)
    _fuse(twin)
    _replace(twin, convolution, dense)
    return twin


def explain(twin: nn.Module, x: Tensor, c: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(relevance of the input, relevance of every module called once)."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            if not (isinstance(out, Tensor) and out.requires_grad):
                return None
            seen.setdefault(name, []).append(out)
            return out.clone()  # later in-place additions must not change what is kept

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in twin.named_modules() if n]
    x = x.detach().clone().requires_grad_()
    out = twin(x)
    for handle in handles:
        handle.remove()
    single = {n: outs[0] for n, outs in seen.items() if len(outs) == 1}
    grads = torch.autograd.grad(out, [x, *single.values()], c, allow_unused=True)
    layers = {n: t.detach() * g for (n, t), g in zip(single.items(), grads[1:], strict=True) if g is not None}
    return x.detach() * grads[0], layers
