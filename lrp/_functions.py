"""Rules of the operations that are neither linear nor positively homogeneous.

Each is the operation's own forward and a backward step on the coefficient
c = R / a. Identity rule: relevance passes an elementwise function f unchanged,
so its factor is f(x) / x, in closed form where there is one; where f(0) != 0
the factor is (f(x) - f(0)) / x and f(0) is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrp._form import signed
from lrp._graph import Layout
from lrp._unit import booking, to_coefficient
from lrp.errors import RuleError
from lrp.registry import Registered

once = torch.autograd.function.once_differentiable


def _over_x(numerator: Tensor, x: Tensor, limit: float) -> Tensor:
    """numerator / x, with its limit where |x| is too small to divide."""
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    small = x.abs() < tiny
    return torch.where(small, limit, numerator / torch.where(small, 1, x))


def _gelu(x: Tensor, y: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * torch.erfc(-x * math.sqrt(0.5))


def _elu(x: Tensor, y: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    below = _over_x(torch.expm1(x.clamp(max=0) * input_scale), x, input_scale)
    return scale * torch.where(x > 0, 1.0, alpha * below)


def _softplus(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """(f(x) - f(0)) / x; near 0 as log((1 + exp t) / 2) / t with t = beta x, free of cancellation."""
    t = beta * x
    near = t.abs() < 1
    small = torch.log1p(0.5 * torch.expm1(torch.where(near, t, 0)))
    return torch.where(near, _over_x(small, t, 0.5), _over_x(y - math.log(2) / beta, x, 0.5))


def _clip(x: Tensor, y: Tensor, low: float, high: float, at_zero: float) -> Tensor:
    inside = (x >= low) & (x <= high)
    if at_zero == 0:
        return torch.where(inside, 1.0, (y / torch.where(inside, 1, x)))
    return _over_x(y - at_zero, x, 0.0)


@dataclass(frozen=True)
class Elementwise:
    """An elementwise function with its coefficient factor.

    Attributes
    ----------
    forward : callable
        The operation itself, applied to x.
    factor : callable
        ``factor(x, y)``: the factor on the coefficient.
    at_zero : float
        f(0), booked as a constant.
    """

    forward: Callable[[Tensor], Tensor]
    factor: Callable[[Tensor, Tensor], Tensor]
    at_zero: float
    layout: Layout

    def __call__(self, x: Tensor, probe: Tensor | None) -> Tensor:
        out: Tensor = _Elementwise.apply(self, x, probe)  # type: ignore[no-untyped-call]  # torch: untyped
        return out


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Elementwise, x: Tensor, probe: Tensor | None) -> Tensor:
        y = spec.forward(x)
        ctx.spec, ctx.books = spec, probe is not None
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        spec: Elementwise = ctx.spec
        x, y = ctx.saved_tensors
        result = c * spec.factor(x, y)
        entry = None
        if ctx.books:
            sums = spec.layout.per_sample
            start = sums(y * c)
            entry = booking(start.shape[0], start, start=start, input=sums(x * result), constant=sums(c) * spec.at_zero)
        return None, result, entry


Factor = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> factor on the coefficient

_FACTORS: dict[str, tuple[Factor, float]] = {  # name -> (factor, f(0))
    "silu": (lambda x, y: torch.sigmoid(x), 0.0),
    "hardswish": (lambda x, y: (x + 3).clamp(0, 6) / 6, 0.0),
    "mish": (lambda x, y: torch.tanh(F.softplus(x)), 0.0),
    "tanh": (lambda x, y: _over_x(y, x, 1.0), 0.0),
    "selu": (lambda x, y: _elu(x, y, 1.6732632423543772, 1.0507009873554805), 0.0),
    "sigmoid": (lambda x, y: _over_x(0.5 * torch.tanh(0.5 * x), x, 0.25), 0.5),
    "hardsigmoid": (lambda x, y: _over_x((x / 6).clamp(-0.5, 0.5), x, 1 / 6), 0.5),
    "exp": (lambda x, y: _over_x(torch.expm1(x), x, 1.0), 1.0),
    "square": (lambda x, y: x, 0.0),
}


def elementwise(
    name: str, call: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[Tensor], Tensor], Factor, float] | None:
    """(forward, factor, f(0)) of a known elementwise function; None if unknown."""

    def forward(x: Tensor) -> Tensor:
        return call(x, *args, **kwargs)

    if name in _FACTORS:
        return forward, *_FACTORS[name]
    if name == "gelu":
        approximate = kwargs.get("approximate", "none")
        return forward, lambda x, y: _gelu(x, y, approximate), 0.0
    if name == "elu":
        return forward, lambda x, y: _elu(x, y, *args, **kwargs), 0.0
    if name == "softplus":
        beta = args[0] if args else kwargs.get("beta", 1.0)
        at_zero = math.log(2) / beta
        return forward, lambda x, y: _softplus(x, y, beta), at_zero
    if name in ("hardtanh", "relu6", "clamp", "clamp_min", "clamp_max"):
        low, high = _limits(name, args, kwargs)
        at_zero = min(max(0.0, low), high)
        return forward, lambda x, y: _clip(x, y, low, high, at_zero), at_zero
    if name == "pow" and isinstance(args[0], (int, float)) and args[0] >= 1 and args[0] == int(args[0]):
        power = int(args[0])
        return forward, lambda x, y: x ** (power - 1), 0.0
    return None


def _limits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    if name == "relu6":
        return 0.0, 6.0
    if name == "clamp_min":
        return float(args[0]), math.inf
    if name == "clamp_max":
        return -math.inf, float(args[0])
    defaults = (-1.0, 1.0) if name == "hardtanh" else (None, None)
    keys = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    low = args[0] if len(args) > 0 else kwargs.get(keys[0], defaults[0])
    high = args[1] if len(args) > 1 else kwargs.get(keys[1], defaults[1])
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float, guided: bool) -> Tensor:
        y = x.clamp(0, high)
        ctx.guided = guided
        if guided:
            ctx.save_for_backward((y > 0) & (y < high))
        return y

    @staticmethod
    @once
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        c = c.clamp(min=0)
        return (c * ctx.saved_tensors[0] if ctx.guided else c), None, None


def rectified(x: Tensor, high: float, guided: bool) -> Tensor:
    """ReLU, capped at ``high``; back goes positive signal only.

    guided backprop: where the forward pass let the input through, too;
    deconvnet: everywhere.
    """
    out: Tensor = _Rectified.apply(x, high, guided)  # type: ignore[no-untyped-call]  # torch: untyped
    return out


def cap(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The upper bound of a rectifier; None for what is no rectifier."""
    if name == "relu":
        return math.inf
    if name in ("relu6", "hardtanh", "clamp", "clamp_min"):
        low, high = _limits(name, args, kwargs)
        return high if low == 0 and high > 0 else None
    return None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        return ctx.factor * c, None


def part(x: Tensor, factor: float) -> Tensor:
    """x; a part of its coefficient: each factor of a product takes half of the relevance."""
    out: Tensor = _Part.apply(x, factor)  # type: ignore[no-untyped-call]  # torch: untyped
    return out


class _Flow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, layout: Layout, arrives: bool) -> Tensor:
        ctx.layout, ctx.arrives = layout, arrives
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        amount = ctx.layout.per_sample(torch.where(c == 0, 0, x * c))  # masked scores are -inf
        columns = {"start": amount, "nonlinear": amount} if ctx.arrives else {"input": amount, "nonlinear": -amount}
        return c, booking(amount.shape[0], amount, **columns), None, None


def flow(x: Tensor, probe: Tensor, layout: Layout, arrives: bool) -> Tensor:
    """x; its relevance enters an operation's books, as what arrives or as what is handed on.

    The difference is the operation's nonlinear remainder.
    """
    out: Tensor = _Flow.apply(x, probe, layout, arrives)  # type: ignore[no-untyped-call]  # torch: untyped
    return out


@dataclass(frozen=True)
class Custom:
    """A user's rule for an operation or a module call."""

    registered: Registered
    layout: Layout
    layouts: tuple[Layout, ...]

    def __call__(self, y: Tensor, probe: Tensor | None, *xs: Tensor) -> Tensor:
        out: Tensor = _Custom.apply(self, y, probe, *xs)  # type: ignore[no-untyped-call]  # torch: untyped
        return out

    def coefficients(self, c: Tensor, y: Tensor, xs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """(coefficient, lost relevance) of every input."""
        rule, name = self.registered.rule, self.registered.name
        if rule == "pass":
            given: Any = y * c
        else:
            assert callable(rule)
            try:
                given = rule(c.clone(), y, *xs)
            except TypeError as error:
                raise RuleError(
                    f"the rule registered for {name} can not be called",
                    expected=f"rule(c, output, {', '.join(f'input{i}' for i in range(len(xs)))})",
                    got=f"TypeError: {error}",
                    fix="take the coefficient, the output and every input that depends on the model's input",
                ) from error
        many = list(given) if isinstance(given, (tuple, list)) else [given]
        if [getattr(g, "shape", None) for g in many] != [x.shape for x in xs]:
            raise RuleError(
                f"the rule registered for {name} returned something of the wrong shape",
                expected=f"one tensor per input: {[tuple(x.shape) for x in xs]}",
                got=str([tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__ for g in many]),
                fix="return one tensor shaped like each input, in their order",
            )
        if rule != "pass" and self.registered.returns == "coefficient":
            return many, [torch.zeros_like(x) for x in xs]
        pairs = [to_coefficient(r, x) for r, x in zip(many, xs, strict=True)]
        return [p[0] for p in pairs], [p[1] for p in pairs]


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Custom, y: Tensor, probe: Tensor | None, *xs: Tensor) -> Tensor:
        ctx.spec, ctx.books = spec, probe is not None
        ctx.save_for_backward(y, *xs)
        return y.view_as(y)

    @staticmethod
    @once
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        spec: Custom = ctx.spec
        y, *xs = ctx.saved_tensors
        results, lost = spec.coefficients(c, y, tuple(xs))
        entry = None
        if ctx.books:
            start = spec.layout.per_sample(y * c)
            delivered, gone = torch.zeros_like(start), torch.zeros_like(start)
            for layout, x, result, left in zip(spec.layouts, xs, results, lost, strict=True):
                delivered = delivered + layout.per_sample(x * result)
                gone = gone + layout.per_sample(left)
            columns = {"input": delivered, "lost": gone, "nonlinear": start - delivered - gone}
            entry = booking(start.shape[0], start, start=start, **columns)
        return (None, None, entry, *results)


class _Book(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, value: Tensor, probe: Tensor, layout: Layout, column: str) -> Tensor:
        ctx.layout, ctx.column = layout, column
        ctx.save_for_backward(y, value)
        return y.view_as(y)

    @staticmethod
    @once
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        y, value = ctx.saved_tensors
        none = c == 0  # a mask may hold -inf where nothing arrives
        start, rest, amount = (ctx.layout.per_sample(torch.where(none, 0, t * c)) for t in (y, y - value, value))
        return c, None, booking(start.shape[0], start, start=start, input=rest, **{ctx.column: amount}), None, None


def book(y: Tensor, value: Any, probe: Tensor, layout: Layout, column: str) -> Tensor:
    """y; whatever relevance falls on its summand ``value`` is entered in ``column``."""
    out: Tensor = _Book.apply(y, torch.as_tensor(value, dtype=y.dtype, device=y.device), probe, layout, column)  # type: ignore[no-untyped-call]  # torch: untyped
    return out


class _Stabilised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, epsilon: float, probe: Tensor | None, layout: Layout) -> Tensor:
        ctx.epsilon, ctx.layout, ctx.books = epsilon, layout, probe is not None
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    @once
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        (y,) = ctx.saved_tensors
        d = signed(ctx.epsilon, y).add_(y)
        result = c * (y / d)
        entry = None
        if ctx.books:
            sums = ctx.layout.per_sample
            start = sums(y * c)
            stab = sums((d - y) * result)
            entry = booking(start.shape[0], start, start=start, input=sums(y * result), stabiliser=stab)
        return result, None, entry, None


def stabilised(y: Tensor, probe: Tensor | None, epsilon: float, layout: Layout) -> Tensor:
    """y; coefficient times y / (y + eps sgn y), as zennit has it at sums and average pools."""
    out: Tensor = _Stabilised.apply(y, epsilon, probe, layout)  # type: ignore[no-untyped-call]  # torch: untyped
    return out


@dataclass(frozen=True)
class Normaliser:
    """Layer, group or RMS normalisation: the statistic detached, the rest linear.

    x is viewed as (outer..., group) and normalised over the group; all kinds
    but "rms" subtract the mean.
    """

    kind: str  # "layer", "group", "rms", "instance"
    groups: int
    normalized: int  # number of trailing axes (layer, rms)
    epsilon: float
    layout: Layout

    def __call__(self, x: Tensor, w: Tensor | None, b: Tensor | None, probe: Tensor | None) -> Tensor:
        out: Tensor = _Normalise.apply(self, x, w, b, probe)  # type: ignore[no-untyped-call]  # torch: untyped
        return out

    def group(self, x: Tensor) -> Tensor:
        if self.kind in ("group", "instance"):
            return x.reshape(x.shape[0], x.shape[1] if self.kind == "instance" else self.groups, -1)
        return x.flatten(x.ndim - self.normalized)

    def affine(self, p: Tensor | None, x: Tensor) -> Tensor | None:
        if p is None or self.kind in ("layer", "rms"):
            return p
        return p.reshape(1, -1, *(1,) * (x.ndim - 2))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Normaliser, x: Tensor, w: Tensor | None, b: Tensor | None, probe: Tensor | None
    ) -> Tensor:
        if spec.kind == "layer":
            y = F.layer_norm(x, x.shape[x.ndim - spec.normalized :], w, b, spec.epsilon)
        elif spec.kind == "rms":
            y = F.rms_norm(x, x.shape[x.ndim - spec.normalized :], w, spec.epsilon)
        elif spec.kind == "group":
            y = F.group_norm(x, spec.groups, w, b, spec.epsilon)
        else:
            y = F.instance_norm(x, None, None, w, b, True, 0.0, spec.epsilon)
        grouped = spec.group(x)
        if spec.kind == "rms":
            rstd = (grouped.square().mean(-1, keepdim=True) + spec.epsilon).rsqrt()
        else:
            rstd = (grouped.var(-1, keepdim=True, correction=0) + spec.epsilon).rsqrt()
        ctx.spec, ctx.books = spec, probe is not None
        ctx.save_for_backward(x, y, rstd, spec.affine(w, x), spec.affine(b, x))
        return y

    @staticmethod
    @once
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        spec: Normaliser = ctx.spec
        x, y, rstd, w, b = ctx.saved_tensors
        g = spec.group(c if w is None else c * w) * rstd
        if spec.kind != "rms":
            g = g - g.mean(-1, keepdim=True)
        result = g.reshape(x.shape)
        entry = None
        if ctx.books:
            sums = spec.layout.per_sample
            start = sums(y * c)
            columns = {} if b is None else {"bias": sums(b * c)}
            entry = booking(start.shape[0], start, start=start, input=sums(x * result), **columns)
        return None, result, None, None, entry


def channel_affine(x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, var: Tensor, epsilon: float) -> Tensor:
    """Batch normalisation in evaluation mode, on its own: an affine map per channel."""
    return F.batch_norm(x, mean, var, w, b, False, 0.0, epsilon)


def channel_shift(x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, var: Tensor, epsilon: float) -> Tensor:
    """The shift of :func:`channel_affine`, shaped (1, C, 1, ...)."""
    scale = (var + epsilon).rsqrt()
    if w is not None:
        scale = scale * w
    shift = -mean * scale
    if b is not None:
        shift = shift + b
    return shift.reshape(1, -1, *(1,) * (x.ndim - 2))
