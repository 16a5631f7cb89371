"""Composites: which rule goes to which layer.

A composite is an ordered list of ``(matcher, rule)``; the first match wins and
a linear layer that nothing matches is an error. Matchers:

==================  =======================================================
layer type(s)       ``nn.Linear``, ``(nn.Conv2d, nn.Conv3d)``; functional calls
                    count as the layer they compute
``"first"``         the first linear layer in *execution* order; of a layer
                    that reads several inputs in turn, its first call
``"last"``          the last one
``First(types)``    the first layer of these types in execution order
name pattern        shell pattern on the layer's name, ``"features.*"``
depth               a float ``f``: layers in the first share ``f`` of the depth;
                    a pair ``(lo, hi)``: ``lo <= depth < hi``, where depth runs
                    from 0 (first layer) to 1 (last)
==================  =======================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any

from torch import nn

from lrp.errors import CompositeError
from lrp.rules import AlphaBeta, Clip, Epsilon, Flat, Gamma, Rms, Rule, WSquare, ZBox, ZPlus

__all__ = [
    "ANY_CONV",
    "Composite",
    "First",
    "LayerInfo",
    "best_practice",
    "deconvnet",
    "epsilon",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "epsilon_plus",
    "epsilon_plus_flat",
    "excitation_backprop",
    "gradient",
    "gradient_x_input",
    "guided_backprop",
    "resolve",
]

MODES = ("lrp", "gradient", "gradient_x_input", "guided_backprop", "deconvnet")
ATTENTION = ("cp_lrp", "attn_lrp")

ANY_CONV: tuple[type, ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


_PLAIN = (int, float, str, Rms, Clip, FunctionType)  # what a rule may hold that says what it does


@dataclass(frozen=True)
class LayerInfo:
    """What a matcher sees of a layer: its name, types and place."""

    name: str
    types: tuple[type, ...]
    position: int
    count: int

    @property
    def depth(self) -> float:
        return self.position / max(1, self.count - 1)


@dataclass(frozen=True)
class First:
    """Matches the first layer of the given types in execution order."""

    types: type | tuple[type, ...]

    def __post_init__(self) -> None:
        many = self.types if isinstance(self.types, tuple) else (self.types,)
        if not many or not all(isinstance(t, type) for t in many):
            raise CompositeError(
                "First got something that is no layer type",
                expected="a layer type or a tuple of them",
                got=repr(self.types),
                fix="for example First(nn.Conv2d); the first layer of any kind is the matcher 'first'",
            )


def _is_type(info: LayerInfo, types: Any) -> bool:
    return any(issubclass(t, types) for t in info.types)


def _matches(matcher: Any, info: LayerInfo, layers: Sequence[LayerInfo]) -> bool:
    if isinstance(matcher, First):
        candidates = [layer for layer in layers if _is_type(layer, matcher.types)]
        return bool(candidates) and candidates[0] is info
    if isinstance(matcher, type):
        return _is_type(info, matcher)
    if matcher == "first":
        return info.position == 0
    if matcher == "last":
        return info.position == info.count - 1
    if isinstance(matcher, str):
        return fnmatchcase(info.name, matcher)
    if isinstance(matcher, float):
        return info.depth <= matcher
    if isinstance(matcher, tuple) and matcher and all(isinstance(m, type) for m in matcher):
        return _is_type(info, matcher)
    low, high = matcher  # shares of the depth in execution order: parallel branches come one after the other
    return bool(low <= info.depth < high or info.depth == high == 1.0)


def _check_matcher(matcher: Any) -> None:
    number = (int, float)
    ok = (
        isinstance(matcher, (type, str, First))
        or (isinstance(matcher, float) and 0 <= matcher <= 1)
        or (
            isinstance(matcher, tuple)
            and bool(matcher)
            and (
                all(isinstance(m, type) for m in matcher)
                or (
                    len(matcher) == 2
                    and all(isinstance(m, number) and not isinstance(m, bool) for m in matcher)
                    and 0 <= matcher[0] < matcher[1] <= 1
                )
            )
        )
    )
    if not ok:
        raise CompositeError(
            "a composite has an unknown matcher",
            expected="a layer type, a tuple of types, 'first', 'last', First(types), "
            "a name pattern, a depth in [0, 1] or a pair (low, high) of depths",
            got=repr(matcher),
            fix="see the table in lrp.composites",
        )


def _show(matcher: Any) -> str:
    if isinstance(matcher, First):
        return f"First({_show(matcher.types)})"
    if isinstance(matcher, type):
        return matcher.__name__
    if matcher == ANY_CONV:
        return "any convolution"
    if isinstance(matcher, tuple) and isinstance(matcher[0], type):
        return "(" + ", ".join(m.__name__ for m in matcher) + ")"
    return repr(matcher)


class Composite:
    """An ordered assignment of rules to linear layers.

    Parameters
    ----------
    rules : sequence of (matcher, Rule)
        First match wins.
    stabilise_sums : float
        Stabiliser on additions and average pools; ``0`` splits them
        proportionally, ``1e-6`` follows zennit.
    attention : {"cp_lrp", "attn_lrp"}
        "cp_lrp" (Ali et al. 2022): queries, keys and softmax are held fixed, all
        relevance goes to the values; conserves. "attn_lrp" (Achtibat et al. 2024):
        products are halved and the softmax passes its Taylor expansion, whose
        remainder is the ledger's ``nonlinear``.
    mode : {"lrp", "gradient", "gradient_x_input", "guided_backprop", "deconvnet"}
        The gradient modes use no rules and keep no ledger.
    name : str
        Shown by the plan.

    Examples
    --------
    >>> from torch import nn
    >>> import lrp
    >>> lrp.Composite([(nn.Conv2d, lrp.rules.ZPlus()), (nn.Linear, lrp.rules.Epsilon())]).name
    'custom'
    """

    def __init__(
        self,
        rules: Sequence[tuple[Any, Rule]] = (),
        stabilise_sums: float = 0.0,
        *,
        attention: str = "cp_lrp",
        mode: str = "lrp",
        name: str = "custom",
    ) -> None:
        if mode not in MODES:
            raise CompositeError(
                "unknown mode", expected=f"one of {MODES}", got=repr(mode), fix="leave mode out for relevance"
            )
        if attention not in ATTENTION:
            raise CompositeError(
                "unknown rule for attention",
                expected=f"one of {ATTENTION}",
                got=repr(attention),
                fix="'cp_lrp' conserves relevance and is the default",
            )
        if mode != "lrp" and (rules or stabilise_sums or attention != "cp_lrp"):
            raise CompositeError(
                f"mode '{mode}' uses no rules",
                expected="no rules, stabilise_sums or attention beside it",
                got=f"{len(rules)} rules, stabilise_sums={stabilise_sums}, attention={attention!r}",
                fix="leave them out, or leave mode out",
            )
        if not (isinstance(stabilise_sums, (int, float)) and 0 <= stabilise_sums < float("inf")):
            raise CompositeError(
                "stabilise_sums is out of range",
                expected="a finite number >= 0",
                got=repr(stabilise_sums),
                fix="use 0, or 1e-6 to follow zennit",
            )
        checked: list[tuple[Any, Rule]] = []
        for entry in rules:
            if not (isinstance(entry, tuple) and len(entry) == 2):
                raise CompositeError(
                    "a composite is a list of pairs",
                    expected="(matcher, rule)",
                    got=repr(entry),
                    fix="write lrp.Composite([(nn.Conv2d, lrp.rules.ZPlus()), ('*', lrp.rules.Epsilon())])",
                )
            matcher, rule = entry
            _check_matcher(matcher)
            if not isinstance(rule, Rule):
                raise CompositeError(
                    "a composite assigns something that is not a rule",
                    expected="an instance from lrp.rules, such as Epsilon()",
                    got=repr(rule),
                    fix="instantiate the rule",
                )
            checked.append((matcher, rule))
        self.rules = tuple(checked)
        self.stabilise_sums = float(stabilise_sums)
        self.attention = attention
        self.mode = mode
        self.name = name

    @property
    def multiplies(self) -> bool:
        """Whether results are activation x coefficient; gradients are coefficients."""
        return self.mode in ("lrp", "gradient_x_input")

    def recipe(self) -> Any:
        """What it is made of, comparable: composites of equal rules share their plans. Itself where that is open."""
        if type(self) is not Composite:
            return self
        parts: list[Any] = []
        for matcher, rule in self.rules:
            values = tuple(vars(rule).items())
            if type(rule).__module__ != Rule.__module__ or not all(isinstance(v, _PLAIN) for _, v in values):
                return self
            parts.append((matcher, type(rule), values))
        return (*parts, self.stabilise_sums, self.attention, self.mode, self.name)

    def assign(self, layers: Sequence[LayerInfo]) -> list[Rule]:
        """The rule of every layer, in the order given.

        Raises
        ------
        CompositeError
            If a layer is matched by nothing.
        """
        out = []
        for info in layers:
            for matcher, rule in self.rules:
                if _matches(matcher, info, layers):
                    out.append(rule)
                    break
            else:
                kinds = "/".join(sorted({t.__name__ for t in info.types}))
                raise CompositeError(
                    f"composite '{self.name}' has no rule for layer '{info.name}' ({kinds})",
                    expected="a rule for every linear layer",
                    got=f"{len(self.rules)} entries, none of which matches",
                    fix="add a last entry such as ('*', lrp.rules.Epsilon())",
                )
        return out

    def idle(self, layers: Sequence[LayerInfo]) -> list[str]:
        """The entries whose matcher fits no layer at all: perhaps misspelt."""
        return [_show(m) for m, _ in self.rules if not any(_matches(m, info, layers) for info in layers)]

    def __repr__(self) -> str:
        inner = ", ".join(f"{_show(m)}: {r}" for m, r in self.rules)
        return f"Composite({self.name}: {inner or self.mode})"


def epsilon(
    epsilon: Any = 1e-6, *, stabilise_sums: float = 0.0, ignore_bias: bool = False, attention: str = "cp_lrp"
) -> Composite:
    """Epsilon in every linear layer; on ReLU nets gradient x input for eps -> 0."""
    rule = Epsilon(epsilon, ignore_bias=ignore_bias)
    return Composite([("*", rule)], stabilise_sums, attention=attention, name="epsilon")


def _layered(
    name: str, first: Sequence[tuple[Any, Rule]], convolutions: Rule, epsilon: float, ignore_bias: bool, **options: Any
) -> Composite:
    dense = Epsilon(epsilon, ignore_bias=ignore_bias)
    return Composite([*first, (ANY_CONV, convolutions), ("*", dense)], name=name, **options)


def epsilon_plus(epsilon: float = 1e-6, *, ignore_bias: bool = False, **options: Any) -> Composite:
    """z+ in convolutions, epsilon in dense layers.

    ``options`` of this and the following: ``stabilise_sums``, ``attention``, as
    in :class:`Composite`.
    """
    return _layered("epsilon_plus", [], ZPlus(epsilon, ignore_bias), epsilon, ignore_bias, **options)


def epsilon_plus_flat(epsilon: float = 1e-6, *, ignore_bias: bool = False, **options: Any) -> Composite:
    """Flat in the first layer, z+ in the other convolutions, epsilon in dense layers."""
    first = [("first", Flat(epsilon))]
    return _layered("epsilon_plus_flat", first, ZPlus(epsilon, ignore_bias), epsilon, ignore_bias, **options)


def epsilon_gamma_box(
    low: Any = None,
    high: Any = None,
    *,
    gamma: float = 0.25,
    epsilon: float = 1e-6,
    ignore_bias: bool = False,
    **options: Any,
) -> Composite:
    """Box rule in the first convolution, gamma in the others, epsilon in dense layers.

    ``low`` and ``high`` bound the network's input in its own (normalised)
    units; see :class:`lrp.rules.ZBox`.
    """
    first = [(First(ANY_CONV), ZBox(low, high, epsilon))]
    hidden = Gamma(gamma, epsilon, ignore_bias)
    return _layered("epsilon_gamma_box", first, hidden, epsilon, ignore_bias, **options)


def epsilon_alpha2_beta1(epsilon: float = 1e-6, *, ignore_bias: bool = False, **options: Any) -> Composite:
    """Alpha-beta (2, 1) in convolutions, epsilon in dense layers."""
    hidden = AlphaBeta(2, 1, epsilon, ignore_bias)
    return _layered("epsilon_alpha2_beta1", [], hidden, epsilon, ignore_bias, **options)


def epsilon_alpha2_beta1_flat(epsilon: float = 1e-6, *, ignore_bias: bool = False, **options: Any) -> Composite:
    """Flat in the first layer, alpha-beta (2, 1) in the other convolutions, epsilon in dense layers."""
    hidden = AlphaBeta(2, 1, epsilon, ignore_bias)
    first = [("first", Flat(epsilon))]
    return _layered("epsilon_alpha2_beta1_flat", first, hidden, epsilon, ignore_bias, **options)


def best_practice(
    low: Any = None,
    high: Any = None,
    *,
    gamma: float = 0.25,
    rms: float = 0.25,
    epsilon: float = 1e-6,
    ignore_bias: bool = False,
    **options: Any,
) -> Composite:
    """By depth: LRP-0 on top, epsilon in the middle, gamma below, box or w² at the input.

    Montavon et al. 2019, section 10.3. The borders, 45 % and 85 % of the depth,
    are those of the paper's VGG-16: seven convolutions under gamma, six under
    epsilon, three dense layers under LRP-0.

    Parameters
    ----------
    low, high : float, sequence or Tensor, optional
        Bounds of the input: the first layer gets :class:`~lrp.rules.ZBox`;
        without them :class:`~lrp.rules.WSquare`.
    gamma : float
    rms : float
        Epsilon of the middle layers, as a share of each sample's rms.
    epsilon : float
        A guard in all other layers.
    """
    bounded = low is not None or high is not None
    first: Rule = ZBox(low, high, epsilon) if bounded else WSquare(epsilon, ignore_bias)
    rules = [
        ("first", first),
        ((0.0, 0.45), Gamma(gamma, epsilon, ignore_bias)),
        ((0.45, 0.85), Epsilon(Rms(rms), ignore_bias)),
        ("*", Epsilon(epsilon, ignore_bias)),
    ]
    return Composite(rules, name="best_practice", **options)


def excitation_backprop(epsilon: float = 1e-6, *, ignore_bias: bool = True, **options: Any) -> Composite:
    """z+ in every layer, without biases: the winning probabilities of Zhang et al. 2016.

    The paper starts from probability 1: ``start="one_hot"``. The map hardly
    depends on the upper layers' weights (Sixt et al. 2020).
    """
    return Composite([("*", ZPlus(epsilon, ignore_bias))], name="excitation_backprop", **options)


def gradient() -> Composite:
    """The plain gradient; nothing is conserved, so there is no ledger."""
    return Composite(mode="gradient", name="gradient")


def gradient_x_input() -> Composite:
    """Gradient times activation, at the input and at every layer."""
    return Composite(mode="gradient_x_input", name="gradient_x_input")


def guided_backprop() -> Composite:
    """The gradient, negative parts stopped at every ReLU (Springenberg et al. 2015); no ledger."""
    return Composite(mode="guided_backprop", name="guided_backprop")


def deconvnet() -> Composite:
    """Only positive signal goes back through a ReLU, whatever went forward (Zeiler and Fergus 2014); no ledger."""
    return Composite(mode="deconvnet", name="deconvnet")


_NAMED: dict[str, Callable[..., Composite]] = {
    f.__name__: f
    for f in (
        epsilon,
        epsilon_plus,
        epsilon_plus_flat,
        epsilon_gamma_box,
        epsilon_alpha2_beta1,
        epsilon_alpha2_beta1_flat,
        best_practice,
        excitation_backprop,
        gradient,
        gradient_x_input,
        guided_backprop,
        deconvnet,
    )
}


def resolve(composite: str | Rule | Composite) -> Composite:
    """A composite from its name, from a single rule (for every layer) or itself."""
    if isinstance(composite, Composite):
        return composite
    if isinstance(composite, Rule):
        return Composite([("*", composite)], name=composite.name)
    if isinstance(composite, str) and composite in _NAMED:
        return _NAMED[composite]()
    if isinstance(composite, type) or inspect.isroutine(composite):
        fix = "call it, so that it becomes an instance"
    else:
        fix = "use one of the names, or build a Composite"
    raise CompositeError(
        "unknown composite",
        expected=f"a Composite, a rule, or one of {sorted(_NAMED)}",
        got=repr(composite),
        fix=fix,
    )
