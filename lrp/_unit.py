"""The linear unit: one ``autograd.Function`` that runs any form of any rule.

A unit is a linear layer with what was folded into it: the batch normalisation
after it (in the weights) and the ReLU after that (in the ratio). Its backward
pass turns the coefficient of the output into that of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrp._form import Form, Side, quotient, signed, step
from lrp._forms import ScaledEpsilon
from lrp._graph import Layout
from lrp._magnitudes import magnitudes

WEIGHT_EPSILON = 1e-6
COLUMNS = ("start", "input", "bias", "stabiliser", "dead", "constant", "nonlinear", "lost")


def booking(batch: int, like: Tensor, **columns: Tensor) -> Tensor:
    """A ledger entry (N, 8): zero but for the given columns."""
    out = like.new_zeros(batch, len(COLUMNS), dtype=torch.float64)
    for name, value in columns.items():
        out[:, COLUMNS.index(name)] = value
    return out


def to_coefficient(r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(c, lost): ``c = R / x``; R on zeros of x is lost."""
    tiny = torch.finfo(x.dtype).tiny ** 0.8
    zero = x.abs() <= tiny
    c = torch.where(zero, 0, r / torch.where(zero, 1, x))
    return c, torch.where(zero, r, 0)


@dataclass(frozen=True)
class Unit:
    """A linear layer ready to run.

    Attributes
    ----------
    form : Form
    relu : bool
        A ReLU is fused behind the layer.
    layout : Layout
        Batch axis of the output; ``in_layout`` of the input.
    ledger : bool
        Keep the books.
    low : torch.dtype, optional
        The 16-bit type that autocast asks for: products run in it. Rules that
        return relevance itself stay in the input's own type.
    absolute : bool
        Weights get the sum of the magnitudes of their contributions.
    by_epsilon : bool
        Weights and bias get their relevance by the epsilon rule, whatever rule
        hands relevance on to the input.
    """

    form: Form
    relu: bool
    layout: Layout
    in_layout: Layout
    ledger: bool = False
    low: torch.dtype | None = None
    absolute: bool = False
    by_epsilon: bool = False

    def __call__(
        self,
        x: Tensor,
        probe: Tensor | None,
        weight_probe: Tensor | None,
        bias_probe: Tensor | None,
        sink: Tensor | None,
        w: Tensor,
        b: Tensor | None,
        *extra: Tensor,
    ) -> Tensor:
        if self.low is not None:
            with torch.autocast(x.device.type, enabled=False):
                kind = w.dtype if self.form.rule.ends_pass else self.low
                given = [None if t is None else t.to(kind) for t in (w, b, *extra)]
                return self._run(x.to(kind), probe, weight_probe, bias_probe, sink, *given)
        return self._run(x, probe, weight_probe, bias_probe, sink, w, b, *extra)

    def _run(self, x: Tensor, *operands: Any) -> Tensor:
        *receivers, w, b = operands[:6]
        # without grad mode a plan is being checked, its forms included
        if torch.is_grad_enabled() and not any(t is not None and t.requires_grad for t in (x, *receivers)):
            z = self.form.output(x, w, b, operands[6:])
            return z.relu_() if self.relu else z
        out: Tensor = _Linear.apply(self, x, *operands)  # type: ignore[no-untyped-call]  # torch: untyped
        return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unit: Unit,
        x: Tensor,
        probe: Tensor | None,
        weight_probe: Tensor | None,
        bias_probe: Tensor | None,
        sink: Tensor | None,
        w: Tensor,
        b: Tensor | None,
        *extra: Tensor,
    ) -> Tensor:
        form = unit.form
        z, denominators = form.forward(x, w, b, extra)
        ctx.unit, ctx.shape, ctx.extra_count = unit, x.shape, len(extra)
        ctx.wants_weights = weight_probe is not None
        ctx.wants_bias = bias_probe is not None
        keep: dict[str, Tensor | None] = {"w": w, "b": b}
        if form.needs_sign and not form.relu_follows:
            keep["z_negative"] = z < 0
        if form.needs_sign and not form.non_negative:
            keep["x_negative"] = x < 0
        own = denominators[0] is not z
        if not form.shifts:
            # the stabiliser reads z before a fused ReLU overwrites it
            increment = step(form.rule.epsilon, denominators[0], unit.layout)
            keep["step"], d = increment, denominators[0] + increment
        if unit.ledger and own:
            for i, denominator in enumerate(denominators):
                keep[f"denominator{i}"] = denominator
        if unit.relu:
            z = z.relu_()
        if not form.shifts:
            keep["ratio"] = quotient(z.float(), d.float()) if z.itemsize == 2 else quotient(z, d)
        elif own and not unit.ledger:
            keep["ratio"] = _ratio(form, z, denominators, unit.relu)
        elif form.rule.epsilon or unit.relu:
            keep["out"] = z  # the ratio is recomputed: one tensor fewer
        if form.needs_input or unit.ledger or ctx.wants_weights:
            keep["x"] = x
        if unit.by_epsilon and (ctx.wants_weights or ctx.wants_bias):
            keep["z_weights"] = z
        if unit.ledger:
            keep["z"] = z
        ctx.names = tuple(keep)
        ctx.save_for_backward(*keep.values(), *extra)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        if ctx.unit.low is not None:
            with torch.autocast(c.device.type, enabled=False):
                return _backward(ctx, c)
        return _backward(ctx, c)


def _backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
    unit: Unit = ctx.unit
    form, rule = unit.form, unit.form.rule
    saved = ctx.saved_tensors
    keep = dict(zip(ctx.names, saved[: len(ctx.names)], strict=True))
    extra = saved[len(ctx.names) :]
    w, b = keep["w"], keep["b"]
    x: Any = keep.get("x")

    if "denominator0" in keep and "ratio" not in keep:
        # the books need the denominators themselves, which the ratio would overwrite
        copies = tuple(keep[f"denominator{i}"].clone() for i in range(form.shares))
        s = _narrow(_ratio(form, keep["z"], copies, unit.relu).mul_(c), c.dtype)
    elif "ratio" in keep:
        s = _narrow(c * keep["ratio"], c.dtype)  # stacked where the form has several shares
    elif "out" in keep:
        s = _narrow(_epsilon_step(c, keep["out"], rule.epsilon, unit.relu), c.dtype)
    else:
        s = c
    side = Side(x, keep.get("x_negative"), keep.get("z_negative"))
    delivers = ctx.needs_input_grad[1] or ctx.needs_input_grad[5]  # a sum may end here
    result: Any = None
    weights = s_weights = None
    if "z_weights" in keep:
        s_weights = _narrow(_epsilon_step(c, keep["z_weights"], WEIGHT_EPSILON, unit.relu), c.dtype)
    if ctx.wants_weights and s_weights is not None:
        at_weight = form.at_weight(s_weights, extra) if isinstance(form, ScaledEpsilon) else s_weights
        weights = form.op.wgrad(x, at_weight, w.shape).mul_(w)
    elif ctx.wants_weights and unit.absolute:
        weights = magnitudes(form, x, s, w, extra, side)
    elif ctx.wants_weights and not delivers:
        weights = form.weights(x, s, w, extra, side)
    elif ctx.wants_weights:
        result, weights = form.back(x, s, w, extra, side)
    if delivers and result is None:
        result = form.pull(s, w, extra, ctx.shape, side)

    lost = None
    if rule.ends_pass and delivers and not ctx.needs_input_grad[5]:
        relevance_in = result
        result, lost = to_coefficient(result, x)
    else:
        relevance_in = None

    entry = None
    if unit.ledger:
        entry = _book(unit, c, s, result, keep, extra, side, lost, relevance_in)
    bias = None
    if ctx.wants_bias:
        part = form.bias_part(b, extra, side) if s_weights is None else form.op.spread(b)
        if part is None:
            bias = torch.zeros_like(b)
        else:
            if s_weights is not None:
                total = part * s_weights
            else:
                total = part * s if form.shares == 1 else part[0] * s[0] + part[1] * s[1]
            if unit.absolute:
                total = total.abs()  # of two shares a bias has one
            axis = form.op.channel_axis(total.ndim)
            bias = total.sum([d for d in range(total.ndim) if d != axis])
    if rule.ends_pass and ctx.needs_input_grad[5]:
        return (None, None, entry, weights, bias, result, None, None, *([None] * ctx.extra_count))
    return (None, result, entry, weights, bias, None, None, None, *([None] * ctx.extra_count))


def _ratio(form: Form, z: Tensor, denominators: tuple[Tensor, ...], relu: bool) -> Tensor:
    """The form's ratio, which takes the place of the denominators."""
    if z.itemsize == 2:  # in 16 bits the stabiliser would vanish beside z, or the ratio overflow
        return form.ratio(z.float(), tuple(t.float() for t in denominators), relu)
    return form.ratio(z, denominators, relu)


def _narrow(s: Tensor, dtype: torch.dtype) -> Tensor:
    """s in another type; float16 ends at 65504, and infinity times a zero weight would be no number."""
    if dtype == torch.float16 and s.dtype != dtype:
        s = s.clamp(-65504, 65504)
    return s.to(dtype)


def _epsilon_step(c: Tensor, out: Tensor, epsilon: float, relu: bool) -> Tensor:
    if out.itemsize == 2:
        c, out = c.float(), out.float()
    if relu:  # out = max(z, 0): c z / (z + eps) where z > 0, else 0
        if epsilon == 0:
            return c * (out > 0)
        d = out + epsilon
        return torch.div(out, d, out=d).mul_(c)
    size = out.abs()  # z / (z + eps sgn z) = |z| / (|z| + eps)
    return size.div_(size + epsilon).mul_(c)


def _book(
    unit: Unit,
    c: Tensor,
    s: Tensor,
    result: Tensor,
    keep: dict[str, Tensor],
    extra: tuple[Tensor, ...],
    side: Side,
    lost: Tensor | None,
    relevance_in: Tensor | None,
) -> Tensor:
    """The books of one layer: every sum is taken on its own, none by difference."""
    form, rule = unit.form, unit.form.rule
    per_out, per_in = unit.layout.per_sample, unit.in_layout.per_sample
    x, z = keep["x"], keep["z"]
    if z.itemsize == 2:
        x, z, c, s, result = (t.float() for t in (x, z, c, s, result))
    relevance = z * c  # z is the ReLU's output where one is fused
    start = per_out(relevance)
    scale = z.abs() if keep["b"] is None else z.abs() + form.op.spread(keep["b"]).abs()
    bias = form.bias_part(keep["b"], extra, side)
    columns = {"start": start}

    def add(name: str, value: Tensor) -> None:
        columns[name] = columns[name] + value if name in columns else value

    for i in range(form.shares):
        # where a ReLU is fused, nothing arrives at z <= 0: its output serves as well as z
        denominator = keep.get(f"denominator{i}", z)
        own, part = (s, bias) if form.shares == 1 else (s[i], None if bias is None else bias[i])
        empty = form.empty(denominator, scale)
        increment = keep["step"] if "step" in keep else signed(rule.epsilon, denominator)
        add("stabiliser", per_out(torch.where(empty, 0, increment * own)))
        add("dead", per_out(torch.where(empty, form.share(i) * relevance - denominator * own, 0)))
        if part is not None:
            add("bias", per_out(part * own))
    if relevance_in is not None:
        columns["input"] = per_in(relevance_in)
    elif rule.ends_pass:
        columns["input"] = per_in(result)
    else:
        columns["input"] = per_in(x * result)
    if lost is not None:
        columns["lost"] = per_in(lost)
        columns["input"] = columns["input"] - columns["lost"]
    return booking(start.shape[0], start, **columns)
