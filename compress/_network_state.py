"""The state of a network as a file holds it: read off, checked, put back."""

from __future__ import annotations

import copy
import importlib
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.cutting import width_of
from compress.plan import PruningPlan
from lrp._files import digest
from lrp._identity import unwrapped
from lrp.errors import FileFormatError, InputError, MismatchError

__all__ = ["Build", "State", "built", "callable_of", "cut", "damaged", "fill", "other", "state_of"]

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class State:
    """What of a network goes into a file."""

    tensors: dict[str, Tensor]  # each once
    tied: dict[str, str]  # further names
    frozen: list[str]
    plan: PruningPlan | None


def callable_of(spec: Callable[..., Any] | str) -> Callable[..., Any]:
    """What ``"MODULE:CALLABLE"`` names; a callable as it is.

    Raises
    ------
    InputError
        If there is none.

    Examples
    --------
    >>> from compress.storage import callable_of
    >>> callable_of("torch.nn:ReLU")
    <class 'torch.nn.modules.activation.ReLU'>
    """
    if not isinstance(spec, str):
        if callable(spec):
            return spec
        raise _uncallable(repr(spec), "it can not be called")
    module, _, name = spec.partition(":")
    if not module or not name:
        raise _uncallable(f"'{spec}'", "no module and name with a colon between them")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise _uncallable(f"'{spec}'", f"{type(error).__name__}: {error}") from error
    if not callable(found):
        raise _uncallable(f"'{spec}'", f"a {type(found).__name__}")
    return found  # type: ignore[no-any-return]  # callable() does not narrow Any


def _uncallable(what: str, got: str) -> InputError:
    return InputError(
        f"{what} names nothing that can be called",
        expected="a function, or 'MODULE:CALLABLE' such as 'torchvision.models:resnet18'",
        got=got,
        fix="check the spelling, and that the module can be imported from here (PYTHONPATH)",
    )


# -- reading off ------------------------------------------------------------
def state_of(model: nn.Module, plan: PruningPlan | None) -> State:
    """Of a network that is not wrapped; its own pruning plan, unless another is given."""
    if plan is None:
        plan = getattr(model, "_pruning_plan", None)
    if plan is not None:
        _check_plan(model, plan)
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    memory: set[int] = set()
    for name, t in model.state_dict(keep_vars=True).items():
        _check_storable(name, t)
        if id(t) in first:
            tied[name] = first[id(t)]
            continue
        first[id(t)] = name
        plain = t.detach()
        place = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if place in memory else plain  # different views of one memory are two tensors
        memory.add(place)
    frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    return State(tensors, tied, frozen, plan)


def _check_storable(name: str, t: Any) -> None:
    got = ""
    if not isinstance(t, Tensor):
        got = f"a {type(t).__name__}"
    elif isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        got = "a lazy parameter without a shape"
    elif t.is_meta:
        got = "a meta tensor, which has no values"
    elif t.layout is not torch.strided or t.is_quantized:
        got = f"a {'quantized' if t.is_quantized else t.layout} tensor"
    if got:
        raise InputError(
            f"'{name}' of the network's state can not be stored",
            expected="dense tensors with values",
            got=got,
            fix="make it a dense tensor, or leave it out of the state (persistent=False)",
        )


def _check_plan(model: nn.Module, plan: PruningPlan) -> None:
    """That the plan leaves this network; names, widths and the number of parameters say so."""
    names, known = set(model.state_dict()), set(plan.table.shapes())
    count, left = sum(p.numel() for p in model.parameters()), plan.after.params
    widths = {name: width for name, (_, width) in plan.layer_widths.items()}
    wrong = {name: width for name, width in widths.items() if name in dict(model.named_modules())}
    wrong = {name: width for name, width in wrong.items() if width_of(model.get_submodule(name)) != width}
    if names == known and count == left and not wrong:
        return
    if names != known:
        odd = sorted(names ^ known)
        expected, got = f"{len(known)} tensors of the plan's names", f"'{odd[0]}' and {len(odd) - 1} more do not match"
    elif wrong:
        name = next(iter(wrong))
        expected, got = f"{wrong[name]} channels in '{name}'", str(width_of(model.get_submodule(name)))
    else:
        expected, got = f"{left:,} parameters", f"{count:,}"
    raise MismatchError(
        "the plan leaves another network than the one to be saved",
        expected=expected,
        got=got,
        fix="save what plan.apply or compress.prune returned, with its own plan; load could not build anything else",
    )


# -- putting back -----------------------------------------------------------
def damaged(path: str | os.PathLike[str], why: str) -> FileFormatError:
    """A file that nothing here wrote like that."""
    return FileFormatError(
        f"{path} can not be read",
        expected="a whole file that compress.save wrote",
        got=why,
        fix="take another copy",
    )


def built(build: Build | str) -> nn.Module:
    """What ``build`` gives, which may be someone's own."""
    if isinstance(build, nn.Module):
        raise InputError(
            "build is a network, not a function that makes one",
            expected="a function without arguments, or 'MODULE:CALLABLE'",
            got=type(build).__name__,
            fix="pass lambda: network, of the original architecture",
        )
    model = callable_of(build)()
    if isinstance(model, nn.Module):
        model = unwrapped(model)
    else:
        raise InputError(
            "build gives no network",
            expected="an nn.Module of the original architecture",
            got=type(model).__name__,
            fix="pass a function without arguments, for example lambda: resnet18(num_classes=10)",
        )
    empty = [n for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor) and t.is_meta]
    if empty:
        raise InputError(
            "build gives tensors without values",
            expected="a network on a CPU or another device with memory",
            got=f"'{empty[0]}' on the meta device",
            fix="build it outside of torch.device('meta')",
        )
    return model


def cut(model: nn.Module, stored: Any, path: str | os.PathLike[str]) -> nn.Module:
    """A copy, cut by the plan in a file if there is one."""
    if stored is None:
        return copy.deepcopy(model)
    widest = max((n for t in model.state_dict().values() if isinstance(t, Tensor) for n in t.shape), default=0)
    _check_sizes(stored, widest, path)
    plan = PruningPlan.from_json(stored)
    try:
        return plan.apply(model)
    except MismatchError as error:
        raise other(path, error.expected, error.got) from error


def _check_sizes(stored: Any, widest: int, path: str | os.PathLike[str]) -> None:
    """Before ranges are written out: no group or axis is wider than the widest tensor."""
    if not isinstance(stored, Mapping):
        raise damaged(path, "a plan that is none")
    try:
        sizes = [int(group["width"]) for group in stored["structure"]]
        for group in stored["structure"]:
            indices = [member["index"] for member in group["members"]]
            sizes += [int(i["run"]) * int(i["count"]) for i in indices if isinstance(i, Mapping)]
            sizes += [int(i["count"]) for i in indices if isinstance(i, Mapping)]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if max(sizes, default=0) > widest:
        raise other(path, f"a network with {max(sizes)} channels somewhere", f"no more than {widest}")


def other(path: str | os.PathLike[str], expected: str, got: str) -> MismatchError:
    """A file of another network."""
    return MismatchError(
        f"{path} does not fit the network that build gives",
        expected=expected,
        got=got,
        fix="build the original architecture, unpruned, with the same options (classes, widths) as it was saved with",
    )


def fill(model: nn.Module, state: State, path: str | os.PathLike[str]) -> None:
    """Put values in place, in eval mode; data types follow the file, ties are made where they are missing."""
    tied = state.tied
    if any(first not in state.tensors or name in state.tensors for name, first in tied.items()):
        raise damaged(path, "names of tied tensors that are not there")
    tensors = {**state.tensors, **{name: state.tensors[first] for name, first in tied.items()}}
    own = model.state_dict(keep_vars=True)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    found = {name: tuple(t.shape) if isinstance(t, Tensor) else () for name, t in own.items()}
    if found != shapes:
        missing, surplus = [n for n in shapes if n not in found], [n for n in found if n not in shapes]
        differ = [n for n in shapes if n in found and found[n] != shapes[n]]
        if differ:
            name = differ[0]
            raise other(path, f"'{name}' of shape {shapes[name]}", f"{found[name]} ({len(differ)} differ)")
        raise other(path, f"{len(shapes)} tensors by the file's names", f"missing {missing[:3]}, surplus {surplus[:3]}")
    first: dict[int, str] = {}
    for name, t in own.items():
        leader = first.setdefault(id(t), name)
        if tied.get(name, name) != tied.get(leader, leader):
            raise other(path, f"'{leader}' and '{name}' as two tensors", "one tensor with both names")
    for name, leader in tied.items():
        _tie(model, name, leader)
    with torch.no_grad():
        for name, t in model.state_dict(keep_vars=True).items():
            kind = tensors[name].dtype
            if t.requires_grad and not (kind.is_floating_point or kind.is_complex):
                raise other(path, f"'{name}' of {kind}", "a parameter that is trained")
            if t.dtype != kind or 0 in t.stride():  # an expanded tensor can't be written to
                t.data = torch.empty_like(tensors[name], device=t.device)
        values = OrderedDict(tensors)
        # some modules ask which version of their own layout the state has
        values._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]  # set by torch, too
        model.load_state_dict(values, strict=True)
    for name, t in model.state_dict().items():
        if digest({"": t}) != digest({"": tensors[name]}):
            raise other(path, f"a tensor '{name}' of its own", "one that shares memory with another")
    frozen = set(state.frozen)
    for name, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(name not in frozen and (p.is_floating_point() or p.is_complex()))
    model.eval()


def _tie(model: nn.Module, name: str, leader: str) -> None:
    """Let a parameter or buffer be the one of another name."""
    places = [model.get_submodule(n.rpartition(".")[0]) for n in (name, leader)]
    short, source = name.rpartition(".")[2], leader.rpartition(".")[2]
    for kind in ("_parameters", "_buffers"):
        held = getattr(places[1], kind)
        if source in held and short in getattr(places[0], kind):
            getattr(places[0], kind)[short] = held[source]
