r"""What a form is: the products by which a rule is computed, under its conditions.

A rule may be computed in several ways. The cheap ones hold only where the plan
proves that the inputs are non-negative or that no relevance arrives at outputs
:math:`z \le 0`; every form states what it needs and what it costs.

Notation: input x, weight W, bias b, output :math:`z = Wx + b`;
:math:`\tilde z` the rule's denominator, :math:`d` the stabilised one, c the
coefficient that arrives, :math:`s = c z / d`. ``g`` is gamma,
:math:`u = |W||x| + |b|`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp._graph import Layout
from lrp._linear import LinearLike
from lrp.errors import RuleError
from lrp.rules import Clip, Rms


def signed(epsilon: float, like: Tensor) -> Tensor:
    """eps sgn(like) with sgn(0) = +1, in the type of ``like``."""
    size = torch.full((), epsilon, dtype=like.dtype, device=like.device)
    return torch.where(like < 0, -size, size)  # copysign would read -0.0 as negative


def step(epsilon: Any, denominator: Tensor, layout: Layout) -> Tensor:
    """What the stabiliser adds to the denominators: ``d - z~``."""
    if isinstance(epsilon, Rms):
        return torch.where(denominator < 0, -1, 1) * (epsilon.factor * layout.rms(denominator))
    if isinstance(epsilon, Clip):
        short = denominator.abs() < epsilon.epsilon
        return torch.where(short, signed(epsilon.epsilon, denominator) - denominator, 0)
    if callable(epsilon):
        d = epsilon(denominator)
        if not isinstance(d, Tensor) or d.shape != denominator.shape:
            raise RuleError(
                "a stabiliser must return the stabilised denominators",
                expected=f"a tensor {tuple(denominator.shape)}",
                got=str(tuple(d.shape)) if isinstance(d, Tensor) else type(d).__name__,
                fix="return denominator + something of its sign, elementwise",
            )
        # a compiled graph can not look at values
        wrong = ((d == 0) & (denominator != 0)) | ~torch.isfinite(d)
        if not torch.compiler.is_compiling() and bool(wrong.any()):
            raise RuleError(
                "a stabiliser made a denominator 0 that was not, or not finite",
                expected="finite denominators farther from 0",
                got=f"{int(wrong.sum())} such denominators",
                fix="return denominator + something of its sign, elementwise",
            )
        return d - denominator
    return signed(epsilon, denominator)


def quotient(z: Tensor, d: Tensor) -> Tensor:
    """``z / d``, 0 where d is 0."""
    dead = d == 0
    return torch.where(dead, 0, z / torch.where(dead, 1, d))


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
    in_shape: tuple[int, ...] = ()  # of one sample's x, as far as the operation sees it

    name: ClassVar[str] = ""
    products: ClassVar[tuple[int, int]] = (1, 1)
    needs_input: ClassVar[bool] = False
    needs_sign: ClassVar[bool] = False
    weighted: ClassVar[bool] = True  # its weights receive relevance
    sign: ClassVar[str] = "any"  # of the denominator: "z" (that of z), "+" (never negative) or "any"
    scaled: ClassVar[bool] = False  # takes the batch norm behind it as a scale of z, instead of in its weights
    shares: ClassVar[int] = 1  # how many denominators, each with a share of the relevance

    def empty(self, denominator: Tensor, scale: Tensor) -> Tensor:
        """Where nothing contributes; a sum may be left as the rounding of what it was taken from."""
        return denominator.abs() <= 64 * torch.finfo(scale.dtype).eps * scale

    @property
    def shifts(self) -> bool:
        """Whether the stabiliser is a constant added to the magnitude."""
        return isinstance(self.rule.epsilon, (int, float))

    def share(self, i: int) -> float:
        """The share of the relevance that the i-th denominator divides."""
        return 1.0

    def derive(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        """Modified weights, computed once per weight version."""
        return ()

    def output(self, x: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        """z alone, where no relevance goes farther back."""
        return self.op.push(x, w, b)

    def forward(
        self, x: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(z, denominators)."""
        z = self.output(x, w, b, extra)
        return z, (self.denominator(x, z, w, b, extra),)

    def ratio(self, z: Tensor, denominators: tuple[Tensor, ...], relu: bool) -> Tensor:
        """``z / d`` with the fewest passes; takes the place of the denominator.

        ``relu``: z is the output of the ReLU behind the layer, so 0 where no
        relevance can be, and only the sign of d where z > 0 matters. Several
        denominators are stacked in front, each ratio times its share.
        """
        (denominator,) = denominators
        epsilon, ignores = self.rule.epsilon, self.rule.ignore_bias
        if epsilon == 0:
            return quotient(z, denominator)
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

    def denominator(self, x: Tensor, z: Tensor, w: Tensor, b: Tensor | None, extra: tuple[Tensor, ...]) -> Tensor:
        r""":math:`\tilde z`, a tensor of its own unless it is z; unused where ``forward`` is overridden."""
        raise NotImplementedError

    @abstractmethod
    def bias_part(self, b: Tensor | None, extra: tuple[Tensor, ...], side: Side) -> Tensor | None:
        r""":math:`\tilde b`, broadcastable over z; None where there is none."""

    @abstractmethod
    def pull(self, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], shape: torch.Size, side: Side) -> Tensor:
        """The coefficient at x (for rules that end the pass: the relevance)."""

    def weights(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
        """Relevance of every weight, summed over batch and positions; unused where there is none."""
        raise NotImplementedError

    def at_weight(self, s: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
        """s as the layer's own weight sees it."""
        return s

    def back(self, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> tuple[Tensor, Tensor]:
        """(``pull``, ``weights``), with products shared where that is possible."""
        return self.pull(s, w, extra, x.shape, side), self.weights(x, s, w, extra, side)

    def _spread(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else self.op.spread(b)


@dataclass(frozen=True)
class Side:
    """What the backward pass may know beside s: x, and where x and z are negative."""

    x: Tensor | None = None
    x_negative: Tensor | None = None
    z_negative: Tensor | None = None


def flip(s: Tensor, negative: Tensor | None) -> Tensor:
    """s, its sign turned where ``negative``."""
    return s if negative is None else torch.where(negative, -s, s)
