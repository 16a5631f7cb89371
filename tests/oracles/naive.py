"""Slow and independent: a copy of a model whose ordinary gradient is LRP.

Every linear module is replaced by one that spells out its rule with split
weights; functional calls run under :class:`oracles.definitions.Definitions`.
Then ``activation x gradient`` is relevance at every layer. Works module by
module, in eager mode, and shares nothing with the package but the rule's
parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrp import rules
from oracles.definitions import Definitions, stabilise, with_gradient_of
from oracles.folding import CONVS, affine, before_layers, execution, fold_backward, put

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Call = Callable[[Tensor, Tensor], Tensor]


def ratio(z: Tensor, total: Tensor, epsilon: float) -> Tensor:
    """z / d, and 0 where nothing contributes at all."""
    d = stabilise(total, epsilon)
    return torch.where(d == 0, torch.zeros_like(z), z / torch.where(d == 0, torch.ones_like(d), d)).detach()


def apply_rule(rule: Any, call: Call, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
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
        if isinstance(rule, rules.AlphaBeta):
            plus = positive * ratio(z, positive + bias.clamp(min=0), rule.epsilon)
            minus = negative * ratio(z, negative + bias.clamp(max=0), rule.epsilon)
            return with_gradient_of(z, rule.alpha * plus - rule.beta * minus)
        if isinstance(rule, rules.ZPlus):
            numerator, kept = positive, bias.clamp(min=0)
        else:
            assert isinstance(rule, rules.Gamma)
            g = rule.gamma
            favoured = torch.where(z > 0, positive, negative)
            numerator = positive + negative + g * favoured
            kept = bias + g * torch.where(z > 0, bias.clamp(min=0), bias.clamp(max=0))
    return with_gradient_of(z, numerator * ratio(z, numerator + kept, rule.epsilon))


def apply_input_rule(rule: Any, call: Call, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output, sink): the gradient at the sink, which is zero, is relevance itself."""
    x = x.detach()
    sink = torch.zeros_like(x, requires_grad=True)
    z = call(x, w) if b is None else call(x, w) + b
    if isinstance(rule, rules.ZBox):
        above, below = x - rule.low.to(x.dtype), x - rule.high.to(x.dtype)
        numerator = call((1 + sink) * above, w.clamp(min=0)) + call((1 + sink) * below, w.clamp(max=0))
    else:
        assert isinstance(rule, rules.Flat)
        numerator = call(1 + sink, torch.ones_like(w)).expand_as(z)
    return with_gradient_of(z, numerator * ratio(z, numerator, rule.epsilon)), sink


def _weight(layer: nn.Module) -> Tensor:
    if type(layer).__name__ != "ScaledStdConv2d":
        return layer.weight.detach()
    gain = (layer.gain * layer.scale).view(-1)
    flat = layer.weight.reshape(1, layer.out_channels, -1)
    w = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=layer.eps)
    return w.reshape_as(layer.weight).detach()


class NaiveLinear(nn.Module):
    """A linear layer under a rule; ``norm`` is a batch norm in front of it that counts as part of it."""

    def __init__(self, layer: nn.Module, rule: Any, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.rule, self.sink = layer, rule, None
        self.w = _weight(layer)
        self.b = None if layer.bias is None else layer.bias.detach()
        self.scale, self.shift = (None, None) if norm is None else affine(norm)

    def call(self, x: Tensor, w: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, w)
        return CONV[w.ndim - 2](x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; a norm in front makes the bias a plane, since zero padding does not pass through it."""
        w, b = self.w, self.b
        dense = isinstance(self.layer, nn.Linear)
        if b is not None and not dense:
            b = b.reshape(-1, *(1,) * (w.ndim - 2))
        if self.scale is None:
            return w, b
        if dense:
            plane = F.linear(self.shift, w)
            return w * self.scale, plane if b is None else plane + b
        space = (1,) * (w.ndim - 2)
        groups = self.layer.groups
        plane = self.call(self.shift.reshape(1, -1, *space).expand(1, *x.shape[1:]), w)
        scale = self.scale.reshape(groups, 1, -1).expand(-1, len(w) // groups, -1)
        return w * scale.reshape(len(w), -1, *space), plane if b is None else plane + b

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # what follows is the definition itself
            w, b = self.parts(x)
            if self.rule.ends_pass:
                out, self.sink = apply_input_rule(self.rule, self.call, x, w, b)
                return out
            return apply_rule(self.rule, self.call, x, w, b)


class NaiveAttention(nn.Module):
    """Multi-head self-attention, queries and keys held fixed."""

    def __init__(self, inner: nn.MultiheadAttention, rule: Any) -> None:
        super().__init__()
        self.inner, self.rule = inner, rule

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        with torch._C.DisableTorchFunction():
            return self._forward(query), None

    def _forward(self, query: Tensor) -> Tensor:
        m = self.inner
        n, length, width = query.shape
        packed = apply_rule(self.rule, F.linear, query, m.in_proj_weight.detach(), m.in_proj_bias.detach())
        heads = packed.reshape(n, length, 3, m.num_heads, width // m.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = heads[0].detach(), heads[1].detach(), heads[2]
        attention = torch.softmax(q @ k.transpose(-1, -2) / (width // m.num_heads) ** 0.5, -1)
        mixed = (attention @ v).transpose(1, 2).reshape(n, length, width)
        w, b = m.out_proj.weight.detach(), m.out_proj.bias.detach()
        return apply_rule(self.rule, F.linear, mixed, w, b)


class Naive(nn.Module):
    """The twin of a model: call it under its definitions."""

    def __init__(self, model: nn.Module, definitions: Definitions, first: str) -> None:
        super().__init__()
        self.model, self.definitions, self.first = model, definitions, first

    def forward(self, x: Tensor) -> Tensor:
        with self.definitions:
            return self.model(x)


def naive(
    model: nn.Module,
    convolution: Any,
    dense: Any,
    *,
    x: Tensor,
    first: Any = None,
    sums: float = 0.0,
    fold_forward: bool = True,
) -> Naive:
    """The copy, for inputs of the shape of x.

    ``first`` is the rule of the first convolution in order of execution (that
    of all others if None). A batch norm that alone reads a linear layer is
    folded into it; with ``fold_forward``, one that only a linear layer reads
    into that layer, else it is an affine map of its own.
    """
    twin = copy.deepcopy(model).eval()
    for p in twin.parameters():
        p.requires_grad_(False)
    run = execution(twin, x)
    folded = fold_backward(twin, run)
    norms = before_layers(twin, run, folded) if fold_forward else {}
    leading = next((n for n in run.calls if isinstance(twin.get_submodule(n), CONVS)), "") if first else ""
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            put(twin, name, NaiveAttention(module, dense))
        elif isinstance(module, (*CONVS, nn.Linear)) and name in run.calls:
            rule = first if name == leading else convolution if isinstance(module, CONVS) else dense
            norm = twin.get_submodule(norms[name]) if name in norms else None
            put(twin, name, NaiveLinear(module, rule, norm))
        elif isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False
    for name in norms.values():
        put(twin, name, nn.Identity())

    def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return apply_rule(dense, F.linear, x, w, b)

    def conv(x: Tensor, w: Tensor, b: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        b = None if b is None else b.reshape(-1, 1, 1)
        return apply_rule(convolution, lambda x, w: F.conv2d(x, w, None, *args, **kwargs), x, w, b)

    return Naive(twin, Definitions(linear, conv, sums), leading)


def explain(twin: Naive, x: Tensor, c: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(relevance of the input, relevance of every module called once, output)."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            if not (isinstance(out, Tensor) and out.requires_grad):
                return None
            if out is args[0]:
                out = out.clone()  # who else reads the input does not read this
            seen.setdefault(name, []).append(out)
            return out.clone()  # later in-place additions must not change what is kept

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in twin.model.named_modules() if n]
    x = x.detach().clone().requires_grad_()
    out = twin(x)
    for handle in handles:
        handle.remove()
    single = {n: outs[0] for n, outs in seen.items() if len(outs) == 1}
    sinks = [m.sink for m in twin.modules() if isinstance(m, NaiveLinear) and m.sink is not None]
    assert all(sink.shape == x.shape for sink in sinks), "an input rule must read the model's input directly"
    tensors = [x, *sinks, *single.values()]
    grads = torch.autograd.grad(out, tensors, c, allow_unused=True)
    relevance = torch.zeros_like(x) if grads[0] is None else x.detach() * grads[0]
    for r in grads[1 : 1 + len(sinks)]:
        relevance = relevance + r
    rest = zip(single.items(), grads[1 + len(sinks) :], strict=True)
    layers = {n: t.detach() * g for (n, t), g in rest if g is not None}
    return relevance.detach(), layers, out.detach()
