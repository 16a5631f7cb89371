r"""Rules: how the relevance of a layer's output goes to its input.

A rule is a small immutable description. It fixes a numerator
:math:`n_{jk}` (what input *j* is said to contribute to output *k*) and a
denominator :math:`\tilde z_k = \sum_j n_{jk} + \tilde b_k`, stabilised to
:math:`d_k = \tilde z_k + \epsilon\,\mathrm{sgn}(\tilde z_k)` with
:math:`\mathrm{sgn}(0)=+1`. Relevance is then

.. math:: R_j = \sum_k n_{jk} s_k, \qquad s_k = R_k / d_k .

Which products compute that (the *form*) is decided by the planner; see
:mod:`lrp.plan`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lrp.errors import BoundsError, RuleError

__all__ = [
    "AlphaBeta",
    "Clip",
    "Epsilon",
    "Flat",
    "Gamma",
    "Pass",
    "Rms",
    "RootPoint",
    "Rule",
    "WSquare",
    "ZBox",
    "ZPlus",
]


@dataclass(frozen=True, eq=False)
class Rule:
    """Base class of all rules.

    Attributes
    ----------
    ends_pass : bool
        True for rules that return relevance itself instead of a coefficient;
        they belong at the input of the network.
    """

    ends_pass = False

    @property
    def name(self) -> str:
        return type(self).__name__

    def __str__(self) -> str:
        return repr(self)


def _non_negative(rule: str, name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0):
        raise RuleError(
            f"{rule}: {name} is out of range",
            expected="a finite number >= 0",
            got=repr(value),
            fix=f"choose {name} >= 0, for example the default",
        )


@dataclass(frozen=True)
class Rms:
    r"""Stabiliser in proportion to each sample's own outputs.

    :math:`\epsilon_n = f \cdot \sqrt{\mathrm{mean}(\tilde z_n^2)}`, the mean over
    everything that belongs to sample *n*: no sample sees another's. Source:
    Montavon et al. 2019, section 10.3 (f about 0.25).

    Parameters
    ----------
    factor : float
        f, without units.

    Examples
    --------
    >>> import lrp
    >>> lrp.rules.Epsilon(lrp.rules.Rms(0.25))
    Epsilon(epsilon=Rms(factor=0.25), ignore_bias=False)
    """

    factor: float = 0.25

    def __post_init__(self) -> None:
        _non_negative("Rms", "factor", self.factor)


@dataclass(frozen=True)
class Clip:
    r"""Stabiliser that leaves large denominators alone.

    :math:`d = \mathrm{sgn}(\tilde z)\max(|\tilde z|, \epsilon)`: nothing is
    absorbed where :math:`|\tilde z| \ge \epsilon`.

    Parameters
    ----------
    epsilon : float
        Smallest magnitude of a denominator, in the units of the layer's output.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _non_negative("Clip", "epsilon", self.epsilon)


@dataclass(frozen=True, eq=False)
class Epsilon(Rule):
    r"""LRP-epsilon: :math:`n_{jk} = x_j w_{jk}`, bias in the denominator.

    Source: Bach et al. 2015, eq. 58. One product forward, one back.

    Parameters
    ----------
    epsilon : float, Rms, Clip or callable
        Stabiliser, same units as the layer's output. ``0`` gives LRP-0.
        :class:`Rms` scales it with each sample, :class:`Clip` clips instead of
        shifting. A callable maps the denominators (N, ...) to the stabilised
        ones of the same shape, each sample on its own.
    ignore_bias : bool
        Leave the bias out of the denominator (never out of the forward pass).

    Raises
    ------
    RuleError
        If the stabiliser is none of these.

    Examples
    --------
    >>> import lrp
    >>> lrp.rules.Epsilon(0.1)
    Epsilon(epsilon=0.1, ignore_bias=False)
    """

    epsilon: Any = 1e-6
    ignore_bias: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, str) or self.epsilon is None:
            raise RuleError(
                "Epsilon: this is no stabiliser",
                expected="a number >= 0, Rms, Clip or a callable",
                got=repr(self.epsilon),
                fix="for example Epsilon(1e-6) or Epsilon(Rms(0.25))",
            )
        if not callable(self.epsilon) and not isinstance(self.epsilon, (Rms, Clip)):
            _non_negative("Epsilon", "epsilon", self.epsilon)


@dataclass(frozen=True, eq=False)
class Gamma(Rule):
    r"""Generalised LRP-gamma, for inputs and outputs of any sign.

    With :math:`P_k` the sum of the positive and :math:`N_k` of the negative
    contributions (bias included), :math:`\tilde z = z + \gamma P` where
    :math:`z > 0` and :math:`z + \gamma N` where :math:`z < 0`. Source:
    Montavon et al. 2019 for the rule, Andeol et al. 2021 for both signs.

    Parameters
    ----------
    gamma : float
        How much more the contributions that agree with the output count.
    epsilon : float
        Stabiliser.
    ignore_bias : bool
        Leave the bias out of the denominator; the sign of ``z`` keeps it.
    """

    gamma: float = 0.25
    epsilon: float = 1e-6
    ignore_bias: bool = False

    def __post_init__(self) -> None:
        _non_negative("Gamma", "gamma", self.gamma)
        _non_negative("Gamma", "epsilon", self.epsilon)


@dataclass(frozen=True, eq=False)
class ZPlus(Rule):
    r"""The z+ rule (alpha-beta with 1, 0): only positive contributions count.

    :math:`n_{jk} = (x_j w_{jk})^+`, bias :math:`b^+`. Source: Montavon et al.
    2017 (deep Taylor), here for inputs of any sign.

    Parameters
    ----------
    epsilon : float
        Stabiliser.
    ignore_bias : bool
        Leave the bias out of the denominator.
    """

    epsilon: float = 1e-6
    ignore_bias: bool = False

    def __post_init__(self) -> None:
        _non_negative("ZPlus", "epsilon", self.epsilon)


@dataclass(frozen=True, eq=False)
class AlphaBeta(Rule):
    r"""LRP-alpha-beta: positive and negative contributions apart.

    .. math:: R_j = \sum_k \Big(\alpha \frac{(x_j w_{jk})^+}{z_k^+}
        - \beta \frac{(x_j w_{jk})^-}{z_k^-}\Big) R_k,
        \qquad \alpha - \beta = 1,\ \alpha, \beta \ge 0,

    with the bias in the sum of its sign. Source: Bach et al. 2015, eq. 60 (there
    with :math:`\alpha + \beta = 1` and :math:`\beta \le 0`). Where an output has
    contributions of one sign only, the other share goes to the ledger's
    ``dead``. Two products forward and two back where the input is known to be
    >= 0, else four and four.

    Parameters
    ----------
    alpha, beta : float
        Weights of the positive and of the negative contributions.
    epsilon : float
        Stabiliser of both denominators.
    ignore_bias : bool
        Leave the bias out of both.

    Raises
    ------
    RuleError
        If :math:`\alpha - \beta \ne 1` or one of them is negative.

    Examples
    --------
    >>> import lrp
    >>> lrp.rules.AlphaBeta(1, 0)  # the same as ZPlus()
    AlphaBeta(alpha=1, beta=0, epsilon=1e-06, ignore_bias=False)
    """

    alpha: float = 2.0
    beta: float = 1.0
    epsilon: float = 1e-6
    ignore_bias: bool = False

    def __post_init__(self) -> None:
        if self.alpha + self.beta == 1 and self.beta < 0:
            raise RuleError(
                "AlphaBeta: beta is given with its sign",
                expected="alpha - beta = 1, both >= 0",
                got=f"alpha = {self.alpha}, beta = {self.beta}",
                fix=f"in this convention the sign of beta is turned: write AlphaBeta({self.alpha}, {-self.beta})",
            )
        for name in ("alpha", "beta", "epsilon"):
            _non_negative("AlphaBeta", name, getattr(self, name))
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise RuleError(
                "AlphaBeta: alpha - beta is not 1, so relevance would not be conserved",
                expected="alpha = 1 + beta, both >= 0",
                got=f"alpha = {self.alpha}, beta = {self.beta}",
                fix="for example AlphaBeta(2, 1)",
            )


def _bounds(value: Any, which: str) -> Any:
    import torch

    if value is None:
        raise BoundsError(
            f"ZBox has no {which}er bound",
            expected="the smallest and the largest value each input can take, after normalisation",
            got=f"{which} = None",
            fix="pass both, for example ZBox(low=(0 - mean) / std, high=(1 - mean) / std)",
        )
    tensor = torch.as_tensor(value).detach()
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    if not bool(torch.isfinite(tensor).all()):
        raise BoundsError(
            f"ZBox: {which} is not finite",
            expected="finite bounds",
            got=f"{which} = {value}",
            fix="use the range of the pixels; for unbounded inputs choose another rule",
        )
    return tensor


@dataclass(frozen=True, eq=False)
class ZBox(Rule):
    r"""The box rule for bounded inputs; returns relevance itself.

    :math:`n_{jk} = x_j w_{jk} - l_j w_{jk}^+ - h_j w_{jk}^-`. The bias cancels.
    Source: Montavon et al. 2017 (:math:`z^B`).

    Parameters
    ----------
    low, high : float, sequence or Tensor
        Bounds in the units of the layer's input (after normalisation): a
        number, one per channel ``(C,)``, or any shape that broadcasts to one
        input ``(C, ...)`` or to a batch ``(1, C, ...)``.
    epsilon : float
        Stabiliser.
    ignore_bias : bool
        Accepted for uniformity; the box rule never counts the bias.

    Raises
    ------
    BoundsError
        If a bound is missing, not finite, or ``low > high`` anywhere.
    """

    low: Any = None
    high: Any = None
    epsilon: float = 1e-6
    ignore_bias: bool = False
    ends_pass = True

    def __post_init__(self) -> None:
        _non_negative("ZBox", "epsilon", self.epsilon)
        low, high = _bounds(self.low, "low"), _bounds(self.high, "high")
        try:
            inverted = bool((low > high).any())
        except RuntimeError as error:
            raise BoundsError(
                "ZBox: low and high do not fit each other",
                expected="two shapes that broadcast",
                got=f"{tuple(low.shape)} and {tuple(high.shape)}",
                fix="give both the same shape",
            ) from error
        if inverted:
            raise BoundsError(
                "ZBox: the bounds are inverted",
                expected="low <= high everywhere",
                got=f"low = {self.low}, high = {self.high}",
                fix="swap them; after normalisation low = (0 - mean) / std and high = (1 - mean) / std",
            )
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    def __repr__(self) -> str:
        def short(t: Any) -> str:
            return f"{t.item():.4g}" if t.numel() == 1 else f"Tensor{tuple(t.shape)}"

        return f"ZBox(low={short(self.low)}, high={short(self.high)})"


@dataclass(frozen=True, eq=False)
class WSquare(Rule):
    r"""The w² rule for unbounded inputs; returns relevance itself.

    :math:`n_{jk} = w_{jk}^2`, bias :math:`b_k^2`: relevance does not depend on
    the value of the input, and connections that meet zero padding count for
    nothing. Source: Montavon et al. 2017.

    Parameters
    ----------
    epsilon : float
        Stabiliser.
    ignore_bias : bool
        Leave the bias out of the denominator.
    """

    epsilon: float = 1e-6
    ignore_bias: bool = False
    ends_pass = True

    def __post_init__(self) -> None:
        _non_negative("WSquare", "epsilon", self.epsilon)


@dataclass(frozen=True, eq=False)
class Flat(Rule):
    r"""Spreads relevance evenly over the receptive field; returns relevance itself.

    :math:`n_{jk} = 1` for every connection inside the input (zero padding has
    none); the bias never counts. Source: Lapuschkin et al. 2019.

    Parameters
    ----------
    epsilon : float
        Stabiliser.
    ignore_bias : bool
        Accepted for uniformity.
    """

    epsilon: float = 1e-6
    ignore_bias: bool = False
    ends_pass = True

    def __post_init__(self) -> None:
        _non_negative("Flat", "epsilon", self.epsilon)


@dataclass(frozen=True, eq=False)
class Pass(Rule):
    """Relevance goes through unchanged, element by element.

    Only for layers whose output has the shape of their input. Returns
    relevance itself.
    """

    epsilon: float = 0.0
    ignore_bias: bool = False
    ends_pass = True


@dataclass(frozen=True, eq=False)
class RootPoint(Rule):
    r"""First-order Taylor expansion about a root point; returns relevance.

    :math:`n_{jk} = w_{jk}(x_j - r_j)`, so :math:`\tilde z = W(x - r)`. With
    :math:`r` on the layer's own zero (:math:`W r + b = 0`) no bias is lost:
    that is the midpoint rule of k-means networks. Source: Montavon et al.
    2017, eq. 5; Kauffmann et al. 2024 for one root per output.

    Parameters
    ----------
    root : Tensor
        Broadcastable to one input; or, for a linear layer, shaped like its
        weight ``(out, in)``: one root point per output unit. The latter is
        meant wherever the shape is that of the weight.
    epsilon : float
        Stabiliser.
    ignore_bias : bool
        Accepted for uniformity; the bias never enters ``W(x - r)``.
    """

    root: Any = None
    epsilon: float = 1e-6
    ignore_bias: bool = False
    ends_pass = True

    def __post_init__(self) -> None:
        import torch

        _non_negative("RootPoint", "epsilon", self.epsilon)
        if self.root is None or not bool(torch.isfinite(torch.as_tensor(self.root)).all()):
            raise RuleError(
                "RootPoint has no usable root",
                expected="a finite tensor",
                got=repr(self.root),
                fix="pass the point the expansion starts from; zeros give LRP-0 without bias",
            )
        object.__setattr__(self, "root", torch.as_tensor(self.root).detach())

    def __repr__(self) -> str:
        return f"RootPoint(root=Tensor{tuple(self.root.shape)})"
