r"""Forms: the products by which a rule is computed, each under its conditions.

A rule may be computed in several ways. The cheap ones hold only where the plan
proves that the inputs are non-negative or that no relevance arrives at outputs
:math:`z \le 0`; every form states what it needs and what it costs.

Notation: input x, weight W, bias b, output :math:`z = Wx + b`;
:math:`\tilde z` the rule's denominator, :math:`d` the stabilised one, c the
coefficient that arrives, :math:`s = c z / d`. ``g`` is gamma,
:math:`u = |W||x| + |b|`.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp._linear import LinearLike, LinearOp
from lrp.errors import BoundsError, RuleError
from lrp.rules import Epsilon, Gamma, Pass, RootPoint, Rule, ZBox, ZPlus


def signed(epsilon: float, like: Tensor) -> Tensor:
    """eps sgn(like) with sgn(0) = +1, in the type of ``like``."""
    step = torch.full((), epsilon, dtype=like.dtype, device=like.device)
    return torch.where(like < 0, -step, step)  # copysign would read -0.0 as negative


@dataclass(frozen=True)
class Form(ABC):
    """One way to compute one rule on one layer.

    Attributes
    ----------
    name : str
        Shown by the plan.
    products : (int, int)
        Products forward (the network's own included) and back.
    needs_input : bool
        Whether the backward pass reads x.
    needs_sign : bool
        Whether it reads the sign of z and of x.
    """

    rule: Any
    op: LinearLike
    non_negative: bool  # x >= 0 is proven
    relu_follows: bool  # c = 0 wherever z <= 0 is proven

    name: ClassVar[str] = ""
    products: ClassVar[tuple[int, int]] = (1, 1)
    needs_input: ClassVar[bool] = False
    needs_sign: ClassVar[bool] = False
    weighted: ClassVar[bool] = True  # its weights receive relevance
    sign: ClassVar[str] = "any"  # of the denominator: "z" (that of z), "+" (never negative) or "any"

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        """Modified weights, computed once per weight version."""
        return ()

    def ratio(self, z: Tensor, denominator: Tensor, relu: bool) -> Tensor:
        """``z / d`` with the fewest passes; takes the place of the denominator.

        ``relu``: z is the output of the ReLU behind the layer, so 0 where no
        relevance can be, and only the sign of d where z > 0 matters.
        """
        epsilon, ignores = self.rule.epsilon, self.rule.ignore_bias
        if epsilon == 0:
            dead = denominator == 0
            return torch.where(dead, 0, z / torch.where(dead, 1, denominator))
        if self.sign == "+" or (relu and self.sign == "z" and not ignores):
            d = denominator.clamp_(min=0).add_(epsilon)
            return torch.div(z, d, out=d)
        if self.sign == "z" and not ignores and not self.relu_follows:
            d = denominator.abs_().add_(epsilon)
            return torch.div(z.abs(), d, out=d)
        d = denominator.add_(signed(epsilon, denominator))
        return torch.div(z, d, out=d)

    def _bias(self, b: Tensor | None) -> Tensor | None:
        return None if self.rule.ignore_bias else b

    @abstractmethod
    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        r""":math:`\tilde z`, a tensor of its own unless it is z."""

    @abstractmethod
    def bias_part(self, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor | None:
        r""":math:`\tilde b`, broadcastable over z; None where there is none."""

    @abstractmethod
    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        """The coefficient at x (for rules that end the pass: the relevance)."""

    @abstractmethod
    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        """Relevance of every weight, summed over batch and positions."""

    def _spread(self, b: Tensor | None, z: Tensor) -> Tensor | None:
        return None if b is None else self.op.spread(b, z.ndim)


@dataclass(frozen=True)
class Side:
    """What the backward pass may know beside s: x, and where x and z are negative."""

    x: Tensor | None = None
    x_negative: Tensor | None = None
    z_negative: Tensor | None = None


def _flip(s: Tensor, negative: Tensor | None) -> Tensor:
    return s if negative is None else torch.where(negative, -s, s)


class EpsilonForm(Form):
    r""":math:`\tilde z = z`; always allowed."""

    name = "epsilon"
    sign = "z"

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        if self.rule.ignore_bias and b is not None:
            return self.op.push(x, w)
        return z

    def bias_part(self, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor | None:
        return self._spread(self._bias(b), z)

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        return self.op.pull(s, w, shape)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        return self.op.wgrad(x, s, w.shape).mul_(w)


class OneVersion(Form):
    """One modified weight: cheap gamma and cheap z+; x >= 0 is proven."""

    products = (2, 1)

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        return self.op.push(x, extra[0], extra[1] if len(extra) > 1 else None)

    def bias_part(self, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor | None:
        return self._spread(extra[1], z) if len(extra) > 1 else None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        return self.op.pull(s, extra[0], shape)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        return self.op.wgrad(x, s, w.shape).mul_(extra[0])


class CheapGamma(OneVersion):
    r""":math:`\tilde W = W + gW^+`; needs x >= 0 and c = 0 wherever z <= 0."""

    name = "gamma, cheap"
    sign = "z"  # where z > 0, the only place that counts here

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        g, b = self.rule.gamma, self._bias(b)
        modified = w + g * w.clamp(min=0)
        return (modified,) if b is None else (modified, b + g * b.clamp(min=0))


class CheapZPlus(OneVersion):
    r""":math:`\tilde W = W^+`; needs x >= 0."""

    name = "z+, cheap"
    sign = "+"

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        b = self._bias(b)
        modified = w.clamp(min=0)
        return (modified,) if b is None else (modified, b.clamp(min=0))


class Absolute(Form):
    """Forms on W and |W|: the sums of one sign are (z +- u) / 2."""

    products = (2, 2)
    needs_sign = True

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        b = self._bias(b)
        return (w.abs(),) if b is None else (w.abs(), b.abs())

    def _sums(self, x: Tensor, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(z with the bias the rule counts, u)."""
        u = self.op.push(x if self.non_negative else x.abs(), extra[0], extra[1] if len(extra) > 1 else None)
        if self.rule.ignore_bias and b is not None:
            spread = self._spread(b, z)
            assert spread is not None
            z = z - spread
        return z, u


class GeneralGamma(Absolute):
    r"""Any x, any z: :math:`\tilde z = (1+g/2) z + (g/2)\,\mathrm{sgn}(z)\, u`."""

    name = "gamma, general"
    sign = "z"

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        g: float = self.rule.gamma
        counted, u = self._sums(x, z, b, extra)
        if not self.relu_follows:
            u.copysign_(z)
        return u.mul_(g / 2).add_(counted, alpha=1 + g / 2)

    def bias_part(self, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor | None:
        b = self._spread(self._bias(b), z)
        if b is None:
            return None
        g: float = self.rule.gamma
        return (1 + g / 2) * b + (g / 2) * torch.where(z < 0, -b.abs(), b.abs())

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        g: float = self.rule.gamma
        straight = self.op.pull(s, w, shape).mul_(1 + g / 2)
        absolute = self.op.pull(_flip(s, side.z_negative), extra[0], shape)
        return straight.add_(_flip(absolute, side.x_negative), alpha=g / 2)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        g: float = self.rule.gamma
        straight = self.op.wgrad(x, s, w.shape).mul_(w).mul_(1 + g / 2)
        absolute = self.op.wgrad(x.abs(), _flip(s, side.z_negative), w.shape)
        return straight.addcmul_(absolute, extra[0], value=g / 2)


class AbsoluteZPlus(Absolute):
    r"""Any x, c = 0 wherever z <= 0: :math:`\tilde z = (z + u)/2`."""

    name = "z+, absolute"
    sign = "+"  # but for rounding

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        counted, u = self._sums(x, z, b, extra)
        return u.add_(counted).mul_(0.5)

    def bias_part(self, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor | None:
        b = self._bias(b)
        return None if b is None else self._spread(b.clamp(min=0), z)

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        absolute = self.op.pull(s, extra[0], shape)
        return self.op.pull(s, w, shape).add_(_flip(absolute, side.x_negative)).mul_(0.5)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        return 0.5 * (w * self.op.wgrad(x, s, w.shape) + extra[0] * self.op.wgrad(x.abs(), s, w.shape))


class SplitZPlus(Form):
    r"""Any x, any z: :math:`\tilde z = W^+x^+ + W^-x^- + b^+`, free of cancellation."""

    name = "z+, split"
    products = (3, 2)
    needs_sign = True
    sign = "+"

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        b = self._bias(b)
        parts = (w.clamp(min=0), w.clamp(max=0))
        return parts if b is None else (*parts, b.clamp(min=0))

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        positive = self.op.push(x.clamp(min=0), extra[0], extra[2] if len(extra) > 2 else None)
        return positive.add_(self.op.push(x.clamp(max=0), extra[1]))

    def bias_part(self, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor | None:
        return self._spread(extra[2], z) if len(extra) > 2 else None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        positive = self.op.pull(s, extra[0], shape)
        if side.x_negative is None:
            return positive
        return torch.where(side.x_negative, self.op.pull(s, extra[1], shape), positive)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        positive = extra[0] * self.op.wgrad(x.clamp(min=0), s, w.shape)
        return positive + extra[1] * self.op.wgrad(x.clamp(max=0), s, w.shape)


def _fit(value: Tensor, x: Tensor, op: LinearLike, what: str) -> Tensor:
    """Bounds or roots, shaped to broadcast over a batch of inputs; (C,) lies along the channels."""
    value = value.to(device=x.device, dtype=x.dtype)
    behind = x.ndim - 1 - op.channel_axis(x.ndim)
    if value.ndim == 1 and value.shape[0] > 1:
        value = value.reshape(-1, *(1,) * behind)
    try:
        if value.broadcast_to(x.shape).shape != x.shape:
            raise RuntimeError
    except RuntimeError:
        raise BoundsError(
            f"{what} does not fit the input of its layer",
            expected=f"a number, ({x.shape[op.channel_axis(x.ndim)]},) or anything that broadcasts to {tuple(x.shape)}",
            got=str(tuple(value.shape)),
            fix="give one value per channel or per element",
        ) from None
    return value


class Box(Form):
    r""":math:`\tilde z = W^+(x-l) + W^-(x-h)`; returns R. Free of cancellation."""

    name = "box, split"
    products = (3, 2)
    needs_input = True

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        return (w.clamp(min=0), w.clamp(max=0))

    def _sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x - _fit(self.rule.low, x, self.op, "ZBox.low"), x - _fit(self.rule.high, x, self.op, "ZBox.high")

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        above, below = self._sides(x)
        slack = 1e-5 * (above - below)
        if bool(((above < -slack) | (below > slack)).any()):
            warnings.warn(
                f"the input leaves the box of ZBox: values from {x.min():.4g} to {x.max():.4g}, bounds from "
                f"{self.rule.low.min():.4g} to {self.rule.high.max():.4g}; give the bounds after normalisation",
                RuntimeWarning,
                stacklevel=2,
            )
        return self.op.push(above, extra[0]).add_(self.op.push(below, extra[1]))

    def bias_part(self, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor | None:
        return None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        assert side.x is not None
        above, below = self._sides(side.x)
        positive = self.op.pull(s, extra[0], shape).mul_(above)
        return positive.add_(self.op.pull(s, extra[1], shape).mul_(below))

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        above, below = (t.expand_as(x) for t in self._sides(x))
        positive = extra[0] * self.op.wgrad(above, s, w.shape)
        return positive + extra[1] * self.op.wgrad(below, s, w.shape)


class Root(Form):
    r""":math:`\tilde z = W(x - r)`; returns R. One root per output: a linear layer."""

    name = "root point"
    products = (2, 1)
    needs_input = True

    def _per_output(self, w: Tensor) -> bool:
        return isinstance(self.op, LinearOp) and self.rule.root.shape == w.shape and w.ndim == 2

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        root = self.rule.root.to(device=w.device, dtype=w.dtype)
        if self._per_output(w):
            product = w * root
            return (product, product.sum(1 - self.op.out_axis))
        return (root,)

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        if len(extra) == 2:
            return self.op.push(x, w) - extra[1]
        return self.op.push(x - _fit(extra[0], x, self.op, "RootPoint.root"), w)

    def bias_part(self, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor | None:
        return None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        assert side.x is not None
        if len(extra) == 2:
            return side.x * self.op.pull(s, w, shape) - self.op.pull(s, extra[0], shape)
        return (side.x - _fit(extra[0], side.x, self.op, "RootPoint.root")) * self.op.pull(s, w, shape)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        if len(extra) == 2:
            total = s.reshape(-1, s.shape[-1]).sum(0)
            return w * self.op.wgrad(x, s, w.shape) - self.op.scale_outputs(extra[0], total)
        shifted = (x - _fit(extra[0], x, self.op, "RootPoint.root")).expand_as(x)
        return w * self.op.wgrad(shifted, s, w.shape)


class PassForm(Form):
    r"""R goes through unchanged; input and output have one shape.

    As a form: :math:`\tilde z = 1`, so that s is R itself, and the pull is the identity.
    """

    name = "pass"
    products = (1, 0)
    needs_input = True
    weighted = False

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        return torch.ones_like(z)

    def bias_part(self, z: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor | None:
        return None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        return s

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        return torch.zeros_like(w)  # no weight takes part


def choose(rule: Rule, op: LinearLike, non_negative: bool, relu_follows: bool) -> tuple[Form, str]:
    """The cheapest correct form of a rule, and why it is this one."""
    sign = "x >= 0 is proven" if non_negative else "the sign of x is not known"
    after = "only a ReLU reads z" if relu_follows else "relevance may sit on z <= 0"
    kind: type[Form]
    if isinstance(rule, Epsilon):
        kind, why = EpsilonForm, "needs no second weight"
    elif isinstance(rule, Gamma):
        kind = CheapGamma if non_negative and relu_follows else GeneralGamma
        why = f"{sign}; {after}"
    elif isinstance(rule, ZPlus):
        if non_negative:
            kind, why = CheapZPlus, sign
        else:
            # without a stabiliser the rounding of (z + u) / 2 would be divided by
            absolute = relu_follows and rule.epsilon > 0
            kind, why = (AbsoluteZPlus if absolute else SplitZPlus), f"{sign}; {after}"
    elif isinstance(rule, ZBox):
        kind, why = Box, "bounded input; ends the pass with relevance"
    elif isinstance(rule, RootPoint):
        kind, why = Root, "expansion about a given point; ends the pass with relevance"
    elif isinstance(rule, Pass):
        kind, why = PassForm, "relevance goes through; ends the pass with relevance"
    else:
        raise RuleError(
            f"{type(rule).__name__} has no form",
            expected="a rule of lrp.rules",
            got=type(rule).__name__,
            fix="use one of lrp.rules, or RootPoint for a rule of your own",
        )
    return kind(rule, op, non_negative, relu_follows), why
