r"""The forms of the rules that end the pass and return relevance itself.

They belong at the input, which may be zero or of any sign, so that no division
by it is ever needed. Notation as in :mod:`lrp._form`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lrp._form import Form, Side, quotient
from lrp._linear import LinearLike, LinearOp
from lrp.errors import BoundsError


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
        # a compiled graph can not look at values
        if not torch.compiler.is_compiling() and bool(((above < -slack) | (below > slack)).any()):
            warnings.warn(
                f"the input leaves the box of ZBox: values from {x.min():.4g} to {x.max():.4g}, bounds from "
                f"{self.rule.low.min():.4g} to {self.rule.high.max():.4g}; give the bounds after normalisation",
                RuntimeWarning,
                stacklevel=2,
            )
        return self.op.push(above, extra[0]).add_(self.op.push(below, extra[1]))

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
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

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
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

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        return None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        return s


class Constant(Form):
    """Denominators that do not depend on x: a plane, so that zero padding counts for nothing."""

    def empty(self, denominator: Tensor, scale: Tensor) -> Tensor:
        return denominator == 0

    def _ones(self, like: Tensor) -> Tensor:
        return torch.ones((1, *self.in_shape), dtype=like.dtype, device=like.device)

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        return extra[0].expand_as(z)

    def ratio(self, z: Tensor, denominators: tuple[Tensor, ...], relu: bool) -> Tensor:
        return quotient(z, denominators[0] + self.rule.epsilon)


class WSquareForm(Constant):
    r""":math:`\tilde z = W^2 \cdot 1 + b^2`; returns R."""

    name = "w squared"

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        b = self._bias(b)
        squared = w * w
        plane = self.op.push(self._ones(w), squared, None if b is None else b * b)
        return (plane, squared) if b is None else (plane, squared, b * b)

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        return self._spread(extra[2]) if len(extra) > 2 else None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        return self.op.pull(s, extra[1], shape)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        return self.op.wgrad(torch.ones_like(x), s, w.shape).mul_(extra[1])


class FlatForm(Constant):
    r""":math:`\tilde z` = number of connections; returns R, the box filter of the channel sum of s."""

    name = "flat"
    products = (1, 0)

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        plane = self.op.push(self._ones(w), torch.ones_like(w))
        if isinstance(self.op, LinearOp):
            return (plane,)
        return (plane, torch.ones((self.op.groups, 1, *w.shape[2:]), dtype=w.dtype, device=w.device))

    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        return None

    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        op = self.op
        if isinstance(op, LinearOp):
            return s.sum(-1, keepdim=True).expand(shape)
        per_group = s.reshape(len(s), op.groups, -1, *s.shape[2:]).sum(2)
        small = torch.Size([shape[0], op.groups, *shape[2:]])
        spread = op.pull(per_group, extra[1], small)
        return spread.repeat_interleave(shape[1] // op.groups, 1)

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        return self.op.wgrad(torch.ones_like(x), s, w.shape)
