r"""The forms of the rules that hand on a coefficient, and the choice among all forms.

A rule may be computed in several ways. The cheap ones hold only where the plan
proves that the inputs are non-negative or that no relevance arrives at outputs
:math:`z \le 0`; every form states what it needs and what it costs. Notation as
in :mod:`lrp._form`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrp._form import Form, Side, flip, quotient
from lrp._input_forms import Box, FlatForm, PassForm, Root, WSquareForm
from lrp._linear import LinearLike
from lrp.errors import RuleError
from lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, RootPoint, Rule, WSquare, ZBox, ZPlus


class EpsilonForm(Form):
    r""":math:`\tilde z = z`; always allowed."""

    name = "epsilon"
    sign = "z"

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        if self.rule.ignore_bias and b is not None:
            return self.op.push(x, w)
        return z

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        return self._spread(self._bias(b))

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        return self.op.pull(s, w, shape)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        return self.op.wgrad(x, s, w.shape).mul_(w)

    def back(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> tuple[Tensor, Tensor]:
        result, weights = self.op.pull_and_wgrad(x, s, w)
        return result, weights.mul_(w)


class ScaledEpsilon(EpsilonForm):
    r"""Epsilon with the batch norm behind it as :math:`z = a (Wx) + b`: the weights stay the model's own.

    Costs two passes over z instead of one over the weights: right where these
    are larger. The bias b holds the shift, ``extra`` the scale a.
    """

    name = "epsilon, scaled"
    scaled = True

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        return (self.op.spread(w),)  # given the scale in the place of a weight

    def output(self, x: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        assert b is not None
        z = self.op.push(x, w)
        return torch.addcmul(self.op.spread(b), z, extra[0], out=z)

    def at_weight(self, s: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
        return s * extra[0]

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        return super().pull(self.at_weight(s, extra), w, extra, shape, side)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        return super().weights(x, self.at_weight(s, extra), w, extra, side)

    def back(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> tuple[Tensor, Tensor]:
        return super().back(x, self.at_weight(s, extra), w, extra, side)


class OneVersion(Form):
    """One modified weight: cheap gamma and cheap z+; x >= 0 is proven."""

    products = (2, 1)

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        return self.op.push(x, extra[0], extra[1] if len(extra) > 1 else None)

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        return self._spread(extra[1]) if len(extra) > 1 else None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        return self.op.pull(s, extra[0], shape)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        return self.op.wgrad(x, s, w.shape).mul_(extra[0])

    def back(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> tuple[Tensor, Tensor]:
        result, weights = self.op.pull_and_wgrad(x, s, extra[0])
        return result, weights.mul_(extra[0])


class CheapGamma(OneVersion):
    r""":math:`\tilde W = W + gW^+`; needs x >= 0 and c = 0 wherever z <= 0."""

    name = "gamma, cheap"
    sign = "z"  # where z > 0, the only place that counts here

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        g, b = self.rule.gamma, self._bias(b)
        modified = w.clamp(min=0).mul_(g).add_(w)
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
            spread = self._spread(b)
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

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        b = self._spread(self._bias(b))
        if b is None:
            return None
        g: float = self.rule.gamma
        size = b.abs() if side.z_negative is None else torch.where(side.z_negative, -b.abs(), b.abs())
        return (1 + g / 2) * b + (g / 2) * size

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        g: float = self.rule.gamma
        straight = self.op.pull(s, w, shape).mul_(1 + g / 2)
        absolute = self.op.pull(flip(s, side.z_negative), extra[0], shape)
        return straight.add_(flip(absolute, side.x_negative), alpha=g / 2)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        g: float = self.rule.gamma
        straight = self.op.wgrad(x, s, w.shape).mul_(w).mul_(1 + g / 2)
        absolute = self.op.wgrad(x.abs(), flip(s, side.z_negative), w.shape)
        return straight.addcmul_(absolute, extra[0], value=g / 2)


class AbsoluteZPlus(Absolute):
    r"""Any x, c = 0 wherever z <= 0: :math:`\tilde z = (z + u)/2`."""

    name = "z+, absolute"
    sign = "+"  # but for rounding

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        counted, u = self._sums(x, z, b, extra)
        return u.add_(counted).mul_(0.5)

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        b = self._bias(b)
        return None if b is None else self._spread(b.clamp(min=0))

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        absolute = self.op.pull(s, extra[0], shape)
        return self.op.pull(s, w, shape).add_(flip(absolute, side.x_negative)).mul_(0.5)

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

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        return self._spread(extra[2]) if len(extra) > 2 else None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        positive = self.op.pull(s, extra[0], shape)
        if side.x_negative is None:
            return positive
        return torch.where(side.x_negative, self.op.pull(s, extra[1], shape), positive)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        positive = extra[0] * self.op.wgrad(x.clamp(min=0), s, w.shape)
        return positive + extra[1] * self.op.wgrad(x.clamp(max=0), s, w.shape)


class AlphaBetaForm(Form):
    r"""x >= 0: :math:`z^\pm = W^\pm x + b^\pm`, whose sum is z: no third product."""

    name = "alpha-beta"
    products = (2, 2)
    shares = 2

    def share(self, i: int) -> float:
        return float(-self.rule.beta if i else self.rule.alpha)

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        parts = (w.clamp(min=0), w.clamp(max=0))
        return parts if b is None else (*parts, b.clamp(min=0), b.clamp(max=0))

    def _sums(self, x: Tensor, extra: tuple[Tensor, ...], with_bias: bool) -> tuple[Tensor, Tensor]:
        biases = extra[2:] if with_bias and len(extra) > 2 else (None, None)
        return self.op.push(x, extra[0], biases[0]), self.op.push(x, extra[1], biases[1])

    def forward(
        self, x: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        ignores = self.rule.ignore_bias
        positive, negative = self._sums(x, extra, not ignores)
        z = positive + negative
        spread = self._spread(b)
        if ignores and spread is not None:
            z += spread
        return z, (positive, negative)

    def ratio(self, z: Tensor, denominators: tuple[Tensor, ...], relu: bool) -> Tensor:
        epsilon = self.rule.epsilon
        out = torch.empty((2, *z.shape), dtype=z.dtype, device=z.device)
        for i, d in enumerate(denominators):
            if epsilon == 0:
                out[i] = quotient(z, d).mul_(self.share(i))
            else:
                # z- is never positive: its stabiliser is subtracted
                torch.div(z, d.add_(-epsilon if i else epsilon).mul_(1 / self.share(i)), out=out[i])
        return out

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        if self.rule.ignore_bias or len(extra) < 3:
            return None
        return torch.stack([self.op.spread(part) for part in extra[2:]])

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        return self.op.pull(s[0], extra[0], shape).add_(self.op.pull(s[1], extra[1], shape))

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        positive = self.op.wgrad(x, s[0], w.shape).mul_(extra[0])
        return positive.addcmul_(self.op.wgrad(x, s[1], w.shape), extra[1])


class SplitAlphaBeta(AlphaBetaForm):
    r"""Any x: :math:`z^+ = W^+x^+ + W^-x^- + b^+`, :math:`z^- = W^-x^+ + W^+x^- + b^-`."""

    name = "alpha-beta, split"
    products = (4, 4)
    needs_sign = True

    def _sums(self, x: Tensor, extra: tuple[Tensor, ...], with_bias: bool) -> tuple[Tensor, Tensor]:
        up, down = x.clamp(min=0), x.clamp(max=0)
        positive, negative = super()._sums(up, extra, with_bias)
        return positive.add_(self.op.push(down, extra[1])), negative.add_(self.op.push(down, extra[0]))

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        assert side.x_negative is not None
        down = self.op.pull(s[0], extra[1], shape).add_(self.op.pull(s[1], extra[0], shape))
        return torch.where(side.x_negative, down, super().pull(s, w, extra, shape, side))

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        up, down = x.clamp(min=0), x.clamp(max=0)
        out = super().weights(up, s, w, extra, side)
        out.addcmul_(self.op.wgrad(down, s[0], w.shape), extra[1])
        return out.addcmul_(self.op.wgrad(down, s[1], w.shape), extra[0])


def choose(
    rule: Rule,
    op: LinearLike,
    non_negative: bool,
    relu_follows: bool,
    in_shape: tuple[int, ...],
    heavy_norm: bool = False,
) -> tuple[Form, str]:
    """The cheapest correct form of a rule, and why it is this one.

    ``heavy_norm``: a batch norm follows, and the weights are much larger than z.
    """
    if isinstance(rule, AlphaBeta) and rule.beta == 0:
        rule = ZPlus(rule.epsilon, rule.ignore_bias)
    sign = "x >= 0 is proven" if non_negative else "the sign of x is not known"
    after = "only a ReLU reads z" if relu_follows else "relevance may sit on z <= 0"
    kind: type[Form]
    if isinstance(rule, Epsilon):
        kind, why = EpsilonForm, "needs no second weight"
        if heavy_norm and not rule.ignore_bias:
            kind, why = ScaledEpsilon, "needs no second weight; the weights are larger than z"
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
    elif isinstance(rule, AlphaBeta):
        kind, why = (AlphaBetaForm if non_negative else SplitAlphaBeta), sign
    elif isinstance(rule, WSquare):
        kind, why = WSquareForm, "weights only; ends the pass with relevance"
    elif isinstance(rule, Flat):
        kind, why = FlatForm, "connections only; ends the pass with relevance"
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
            fix="use one of lrp.rules; for an operation of your own see lrp.register",
        )
    return kind(rule, op, non_negative, relu_follows, in_shape), why
