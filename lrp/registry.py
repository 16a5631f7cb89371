"""Rules for a user's own operations and modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrp._vocabulary import functional
from lrp.errors import RuleError
from lrp.rules import Pass

__all__ = ["Registration", "register"]

CustomRule = Callable[..., Tensor | Sequence[Tensor]]
RETURNS = ("coefficient", "relevance")


@dataclass(frozen=True, eq=False)
class Registered:
    """A rule as the planner needs it."""

    name: str
    rule: CustomRule | str  # "gradient", "pass" or a callable
    returns: str = "coefficient"


_LOCK = threading.RLock()
_MODULES: dict[Any, list[Registered]] = {}  # the last one holds
_OPERATIONS: dict[Any, list[Registered]] = {}
_VERSION = 0


def version() -> int:
    """Grows with every change: plans made before are not used after."""
    return _VERSION


def for_module(module: nn.Module) -> Registered | None:
    """The rule of the module's class, or of its nearest registered base."""
    with _LOCK:
        return next((_MODULES[kind][-1] for kind in type(module).__mro__ if kind in _MODULES), None)


def for_operation(target: Any) -> Registered | None:
    """The rule of an ATen or custom operator."""
    with _LOCK:
        return _OPERATIONS[target][-1] if target in _OPERATIONS else None


def applying(model: nn.Module, targets: Iterable[Any]) -> tuple[Registered | None, ...]:
    """The rules that concern a model and the operators of its graph."""
    with _LOCK:
        kinds = dict.fromkeys(type(m) for m in model.modules())
        found = [next((_MODULES[k][-1] for k in kind.__mro__ if k in _MODULES), None) for kind in kinds]
        return (*found, *(for_operation(t) for t in targets))


def any_module() -> bool:
    """Whether some module class has a rule."""
    return bool(_MODULES)


class Registration:
    """Undoes a :func:`register`, in any order and as often as you like; also a context manager."""

    def __init__(self, name: str, stacks: list[tuple[dict[Any, list[Registered]], Any]], entry: Registered) -> None:
        self._name, self._stacks, self._entry = name, stacks, entry

    def remove(self) -> None:
        """Forget this rule; one that was registered before it holds again."""
        global _VERSION
        with _LOCK:
            _VERSION += 1
            for table, key in self._stacks:
                left = [e for e in table.get(key, []) if e is not self._entry]
                if left:
                    table[key] = left
                else:
                    table.pop(key, None)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Registration({self._name})"


def _operators(function: Any) -> list[Any]:
    """The operators that torch.export shows for a call of ``function``."""
    overload = getattr(function, "_opoverload", None)  # what torch.library.custom_op returns
    if overload is not None:
        return [overload]
    if isinstance(function, torch._ops.OpOverload):
        return [functional(function)]
    packet = function
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        home = str(getattr(function, "__module__", None) or "")
        name = str(getattr(function, "__name__", "")).removeprefix("special_")
        own = home.partition(".")[0] == "torch" or getattr(torch, name, None) is function
        packet = getattr(torch.ops.aten, name, None) if own and name else None
    if packet is None:
        return []
    return list(dict.fromkeys(functional(getattr(packet, overload)) for overload in packet.overloads()))


def register(function_or_module_class: Any, rule: Any, *, returns: str = "coefficient") -> Registration:
    r"""Give an operation or a class of modules a rule of its own.

    Parameters
    ----------
    function_or_module_class : type or callable
        A subclass of ``nn.Module`` (its subclasses included; every call is one
        operation, whatever happens inside), an operator made by
        ``torch.library.custom_op``, an ``OpOverload``, or a function of torch
        such as ``torch.sin``. A rule of yours goes before the built-in one.
    rule : callable, lrp.rules.Pass() or "gradient"
        A callable ``rule(c, output, *inputs)`` gets the coefficient c of the
        output (relevance = output x c), the output and every input that depends
        on the model's input; it returns one tensor per input, shaped like it:
        the coefficients, or with ``returns="relevance"`` the relevances
        themselves. Where an input is exactly 0, relevance can not be handed on
        and goes to the ledger's ``lost``.
        ``Pass()``: relevance goes through element by element (identity rule).
        ``"gradient"``: the operation's own gradient; right where it is
        positively homogeneous, such as a pool.
    returns : {"coefficient", "relevance"}
        What the callable returns.

    Returns
    -------
    Registration
        Its ``remove()`` puts back what was there before; also a context manager.

    Raises
    ------
    RuleError
        If the thing can not be recognised in a graph, or the rule is none of these.

    Notes
    -----
    Process-wide and thread-safe; plans made before are made anew. What the rule
    does not hand on is booked as the ledger's ``nonlinear``. Every sample must
    keep to itself.

    Examples
    --------
    >>> import torch, lrp
    >>> class Squash(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x * x.abs() / (1 + x * x)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), Squash()).eval()
    >>> with lrp.register(Squash, lrp.rules.Pass()):
    ...     rel = lrp.attribute(model, torch.ones(1, 2), 0, composite="epsilon")
    >>> bool(torch.isclose(rel.input.sum(), rel.output[0, 0], rtol=1e-3))
    True
    """
    global _VERSION
    if isinstance(rule, Pass):
        chosen: Any = "pass"
    elif rule == "gradient" or (callable(rule) and not isinstance(rule, type)):
        chosen = rule
    else:
        raise RuleError(
            "register got something that is no rule for an operation",
            expected="a callable rule(c, output, *inputs), lrp.rules.Pass() or 'gradient'",
            got=repr(rule),
            fix="the other rules of lrp.rules are for linear layers: assign them in a Composite",
        )
    if returns not in RETURNS:
        raise RuleError(
            "register: unknown kind of result", expected=f"one of {RETURNS}", got=repr(returns), fix="choose one"
        )
    thing = function_or_module_class
    table: dict[Any, list[Registered]]
    if isinstance(thing, type) and issubclass(thing, nn.Module):
        keys, table = [thing], _MODULES
    else:
        keys, table = _operators(thing), _OPERATIONS
        if not keys:
            raise RuleError(
                f"{thing!r} leaves no trace in a graph, so no rule can be bound to it",
                expected="an nn.Module class, an operator of torch.library.custom_op, or a function of torch",
                got=type(thing).__name__,
                fix="call it inside a small nn.Module and register that class",
            )
    name = str(getattr(thing, "__name__", thing))
    entry = Registered(name, chosen, returns)
    with _LOCK:
        _VERSION += 1
        for key in keys:
            table.setdefault(key, []).append(entry)
    return Registration(name, [(table, key) for key in keys], entry)
