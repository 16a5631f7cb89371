"""What a sum of relevance is of, as JSON-able values that can be compared."""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp import registry
from lrp._batches import as_names
from lrp._files import digest
from lrp._identity import unwrapped
from lrp.composites import Composite, resolve
from lrp.errors import InputError, MismatchError, TargetError
from lrp.seeds import Seed, Start, check_start

__all__ = ["AGGREGATES", "as_double", "check_state", "compare", "same", "settings_of"]

AGGREGATES = ("signed", "abs_element", "abs_per_sample", "abs_total")
KINDS = ("channels", "weights")


def as_double(t: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def _plain(value: Any, seen: set[int] | None = None) -> Any:
    """A setting, such that equal texts mean equal settings, in any process.

    ``seen``: what was met within one function, which may hold itself.
    """
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, Tensor):
        return "tensor " + digest({"": value})
    if isinstance(value, (list, dict)) and seen is not None:
        if id(value) in seen:
            return "again"
        seen.add(id(value))
    if isinstance(value, (list, tuple)):
        return [_plain(v, seen) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_plain(v, seen)) for v in value)
    if isinstance(value, Mapping):
        return sorted(([str(k), _plain(v, seen)] for k, v in value.items()), key=lambda pair: pair[0])
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if isinstance(value, types.MethodType):
        return [_plain(value.__func__, seen), _plain(value.__self__, set() if seen is None else seen)]
    if isinstance(value, functools.partial):
        return ["partial", *(_plain(v, seen) for v in (value.func, value.args, value.keywords))]
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _instance(value, seen)


def _instance(value: Any, seen: set[int] | None) -> Any:
    """An object: its class, what it holds, and what it does when it is called."""
    name = type(value).__name__
    does = getattr(type(value), "forward" if isinstance(value, nn.Module) else "__call__", None)
    call = [["()", _plain(does, seen)]] if isinstance(does, types.FunctionType) else []
    if isinstance(value, nn.Module):
        return [name, *call, digest(_tensors(value))]
    if hasattr(value, "tobytes"):  # an array: its repr leaves out most of it
        return [name, str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if dataclasses.is_dataclass(value):
        held = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        held = sorted(getattr(value, "__dict__", {}).items())
        if seen is not None:  # anything may hang on an object that a function holds: no further than its values
            held = [(k, v) for k, v in held if isinstance(v, (bool, int, float, str, Tensor))]
    if held or call:
        return [name, *call, *([k, _plain(v, seen)] for k, v in held)]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address differs from process to process


def _function(function: types.FunctionType, seen: set[int] | None) -> str:
    """Name and digest of a function: two lambdas of one module share their name."""
    name, seen = f"{function.__module__}.{function.__qualname__}", set() if seen is None else seen
    if id(function) in seen:
        return name
    seen.add(id(function))
    parts: list[Any] = [_code(function.__code__), _plain(function.__defaults__, seen)]
    parts.append(_plain(function.__kwdefaults__, seen))
    for cell in function.__closure__ or ():
        try:
            parts.append(_plain(cell.cell_contents, seen))
        except ValueError:  # not assigned yet
            parts.append("empty")
    for key in sorted(_globals(function.__code__) & function.__globals__.keys()):
        value = function.__globals__[key]
        far = isinstance(value, types.FunctionType) and value.__module__ != function.__module__
        parts.append([key, f"{value.__module__}.{value.__qualname__}" if far else _plain(value, seen)])
    return f"{name} {hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


def _code(code: types.CodeType) -> list[Any]:
    """What a function does: the same in every process of one version of Python."""
    consts = [
        _code(c) if isinstance(c, types.CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    return [code.co_code.hex(), consts, list(code.co_names), list(code.co_freevars)]


def _globals(code: types.CodeType) -> set[str]:
    """Global names that a function reads."""
    names = {str(i.argval) for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return names.union(*(_globals(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _precision(model: nn.Module | None) -> str | None:
    """What autocast computes in, on the model's device; None outside of it."""
    held = next(iter(_tensors(model).values()), None) if model is not None else None
    accelerator = torch.accelerator.current_accelerator()
    kinds = [held.device.type] if held is not None else ["cpu"] if accelerator is None else [accelerator.type, "cpu"]
    for kind in kinds:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
    return None


def _registered(model: nn.Module | None) -> list[Any] | None:
    """Rules of lrp.register: of operations, and of the classes the model has; None if there are none."""
    with registry._LOCK:
        modules = {kind: held[-1] for kind, held in registry._MODULES.items()}
        operations = {operation: held[-1] for operation, held in registry._OPERATIONS.items()}
    if model is not None:
        kinds = {base for module in model.modules() for base in type(module).__mro__}
        modules = {kind: held for kind, held in modules.items() if kind in kinds}
    rules: list[tuple[str, registry.Registered]]
    rules = [(f"{kind.__module__}.{kind.__qualname__}", held) for kind, held in modules.items()]
    rules += [(str(operation), held) for operation, held in operations.items()]
    return sorted(([name, _plain(held.rule), held.returns] for name, held in rules), key=str) or None


def _composite(composite: Composite) -> Any:
    return [[k, _plain(v)] for k, v in sorted(vars(composite).items()) if k != "name"]


def _start(start: Any, target: Any) -> str:
    check_start(start, target)
    if isinstance(start, str):
        return start
    return f"{type(start).__name__} " + digest({"": start.coefficient if isinstance(start, Seed) else start})


def _wrt(wrt: Sequence[str] | str) -> list[str]:
    names = as_names(wrt)
    for name in names:
        if name in ("input", "layers"):
            raise InputError(
                f"relevance of the {name!r} is not summed over a data set",
                expected="'channels', 'weights' or both",
                got=repr(wrt),
                fix="positions of different samples do not correspond, so there is nothing to add; where they do, "
                "add up what lrp.attribute returns",
            )
    if not names or any(n not in KINDS for n in names):
        raise InputError(
            "wrt names something unknown", expected="'channels', 'weights' or both", got=repr(wrt), fix="choose"
        )
    return [k for k in KINDS if k in names]


def _aggregate(aggregate: str | Mapping[str, str] | None, wrt: list[str]) -> dict[str, str]:
    out = {"channels": "abs_per_sample", "weights": "signed"}
    if isinstance(aggregate, Mapping):
        surplus = [k for k in aggregate if k not in wrt]
        if surplus:
            raise InputError(
                f"aggregate names what is not collected: {surplus}",
                expected=f"keys among wrt = {wrt}",
                got=repr(dict(aggregate)),
                fix="add it to wrt, or drop it",
            )
        out |= aggregate
    elif aggregate is not None:
        out = dict.fromkeys(KINDS, aggregate)
    for how in out.values():
        if how not in AGGREGATES:
            raise InputError(
                "unknown aggregate",
                expected=f"one of {AGGREGATES}, or a dictionary from 'channels' and 'weights' to these",
                got=repr(aggregate),
                fix="choose one",
            )
    return {k: out[k] for k in wrt}


def settings_of(
    wrt: Sequence[str] | str,
    aggregate: str | Mapping[str, str] | None,
    composite: Any,
    start: Start,
    target: int | str | None,
    layers: Sequence[str] | str | None,
    model: nn.Module | None,
) -> dict[str, Any]:
    """Checked settings of a sum.

    Raises
    ------
    InputError, TargetError, CompositeError
    """
    wrt = _wrt(wrt)
    chosen = _aggregate(aggregate, wrt)
    rules = resolve(composite)
    if rules.mode != "lrp" and chosen.get("weights") == "abs_element":
        raise InputError(
            f"{rules.name} has no contributions of single weights whose magnitudes could be added",
            expected="'signed', 'abs_per_sample' or 'abs_total' for weights",
            got="'abs_element'",
            fix="choose one, or an LRP composite",
        )
    if not (target is None or target == "predicted" or (isinstance(target, int) and not isinstance(target, bool))):
        raise TargetError(
            "the target of a data set is no class",
            expected="None (the targets the batches bring, else the largest output), 'predicted' or an integer",
            got=repr(target) if not isinstance(target, Tensor) else f"a Tensor {tuple(target.shape)}",
            fix="let the batches bring their targets: yield (x, y)",
        )
    model = None if model is None else unwrapped(model)
    return {
        "model": None if model is None else type(model).__name__,
        "parameters": None if model is None else digest(_tensors(model)),
        "precision": _precision(model),
        "registered": _registered(model),
        "composite_name": rules.name,
        "composite": _composite(rules),
        "start": _start(start, target),
        "target": target,
        "wrt": wrt,
        "aggregate": chosen,
        "layers": None if layers is None else list(as_names(layers)),
    }


def same(what: str, first: Any, second: Any, fix: str = "") -> None:
    """Raise :class:`MismatchError` if they differ."""
    if first != second:
        raise MismatchError(
            f"the two differ in their {what}",
            expected=str(first)[:300],
            got=str(second)[:300],
            fix=fix or "only sums of the same thing can be added; collect both with the same settings",
        )


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], fix: str = "") -> None:
    """Raise :class:`MismatchError` naming the first setting that differs."""
    words = {
        "parameters": "weights (SHA-256)",
        "model": "model class",
        "precision": "precision (autocast)",
        "registered": "rules of lrp.register",
    }
    if ours["model"] != theirs.get("model") and None in (ours["model"], theirs.get("model")):
        fix = fix or "pass model= to RelevanceSum: a sum that does not know its model can not be compared"
    for key in ours:
        if key == "composite" and ours[key] != theirs.get(key):
            first, second = (f"{s.get('composite_name')} = {s.get('composite')}" for s in (ours, theirs))
            same("composite", first, second, fix)
        if key != "composite_name":
            same(words.get(key, key), ours[key], theirs.get(key), fix)


def check_state(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Raise TypeError or KeyError if this is no state of a sum."""
    for key in ("settings", "count", "labels", "unexplained"):
        meta[key]
    if not isinstance(meta["count"], int) or meta["count"] < 0 or not isinstance(meta["unexplained"], dict):
        raise TypeError("count or unexplained of another type")
    for key in ("wrt", "aggregate", "composite_name", "composite", "start", "parameters"):
        meta["settings"][key]
    for name, t in tensors.items():
        if name.partition(":")[0] not in KINDS or not isinstance(t, Tensor) or t.dtype != torch.float64:
            raise TypeError(f"'{name}' is no float64 sum of channels or weights")
