"""Networks on disk: one safetensors file that holds the tensors and the pruning plan."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.cutting import width_of
from compress.plan import PruningPlan
from lrp._files import digest, read_tensors, write_tensors
from lrp.errors import DataError, FileFormatError, InputError, MismatchError

__all__ = ["callable_of", "file_size", "load", "save"]

KIND = "compress.model"
_LARGEST_PLAN = 2**26  # bytes of its JSON text

Build = Callable[[], nn.Module]


def save(model: nn.Module, path: str | os.PathLike[str], *, plan: PruningPlan | None = None) -> None:
    """Write a network as one file, whole or not at all; no pickle.

    Parameters
    ----------
    model : nn.Module
        Left as it is; may be on any device, wrapped by ``torch.compile`` or
        ``DistributedDataParallel``.
    path : path
    plan : PruningPlan, optional
        Of all that was removed from the original architecture. Default: the one
        that ``plan.apply`` and :func:`compress.prune` leave on their networks.

    Raises
    ------
    MismatchError
        If the plan leaves another network than this.
    InputError
        If the state holds what a file of tensors can't: other objects, sparse
        or quantized tensors, tensors without values.
    DataError
        If the file can not be written; what was there stays.

    Notes
    -----
    The header is JSON: kind, version, names of tied and of frozen tensors, a
    SHA-256 of everything, and the plan without its scores (compressed, for it
    counts as bytes of the file). A tensor with several names is stored once.

    Examples
    --------
    >>> import tempfile, torch, compress
    >>> from compress.storage import load, save
    >>> def build():
    ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> net = build()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(net, f"{folder}/net.safetensors")
    ...     again = load(f"{folder}/net.safetensors", build)
    >>> x = torch.randn(3, 4)
    >>> torch.equal(again(x), net(x))
    True
    """
    from safetensors import SafetensorError

    tensors, meta = _contents(model, plan)
    try:
        write_tensors(path, KIND, tensors, meta)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} can not be written",
            expected="a file name in a folder that may be written to, on a disk with space",
            got=f"{type(error).__name__}: {error}",
            fix="make space or name another place",
        ) from error


def file_size(model: nn.Module, plan: PruningPlan | None = None) -> int:
    """Bytes of the file that :func:`save` would write, header and plan included.

    Parameters
    ----------
    model, plan
        As in :func:`save`.

    Notes
    -----
    Exact, for the file is made in memory: twice the bytes of the network.

    Examples
    --------
    >>> import torch
    >>> from compress.storage import file_size
    >>> 4 * 8 * 100 < file_size(torch.nn.Linear(8, 100)) < 4 * 9 * 100 + 1000
    True
    """
    from safetensors.torch import save as serialise

    tensors, meta = _contents(model, plan)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {"format": KIND, "version": "1", "meta": json.dumps(meta), "order": json.dumps(list(plain))}
    return len(serialise(plain, {**header, "digest": "0" * 64}))


def load(path: str | os.PathLike[str], build: Build | str) -> nn.Module:
    """Read what :func:`save` wrote.

    Parameters
    ----------
    path : path
    build : callable or str
        Called without arguments, gives the *original* architecture, with any
        values: the plan in the file cuts a copy of it. A string is
        ``"MODULE:CALLABLE"``.

    Returns
    -------
    nn.Module
        In eval mode, on the device of what ``build`` gave; data types, frozen
        and tied parameters as they were saved.

    Raises
    ------
    FileFormatError
        If the file is damaged, of another kind or version.
    MismatchError
        If ``build`` gives another architecture.
    InputError
        If ``build`` gives no network.
    FileNotFoundError

    Examples
    --------
    >>> import tempfile, torch, compress
    >>> from compress.storage import load, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(torch.nn.ReLU(), f"{folder}/net.safetensors")
    ...     load(f"{folder}/net.safetensors", "torch.nn:ReLU")
    ReLU()
    """
    try:
        tensors, meta = read_tensors(path, KIND)
        stored = _unpacked(meta["plan"])
        tied = {str(name): str(first) for name, first in meta["tied"].items()}
        frozen = {str(name) for name in meta["frozen"]}
        if any(first not in tensors or name in tensors for name, first in tied.items()):
            raise ValueError("names of tied tensors that are not there")
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    model = _built(build)
    model = copy.deepcopy(model) if stored is None else _cut(model, stored, path)  # it may be someone's own
    _fill(model, {**tensors, **{name: tensors[first] for name, first in tied.items()}}, tied, path)
    for name, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(name not in frozen)
    return model.eval()


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
    return found  # type: ignore[no-any-return]


def _uncallable(what: str, got: str) -> InputError:
    return InputError(
        f"{what} names nothing that can be called",
        expected="a function, or 'MODULE:CALLABLE' such as 'torchvision.models:resnet18'",
        got=got,
        fix="check the spelling, and that the module can be imported from here (PYTHONPATH)",
    )


# -- writing ----------------------------------------------------------------
def _contents(model: nn.Module, plan: PruningPlan | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, each once, and what else is to be known."""
    model = _unwrapped(model)
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
    packed = None if plan is None else _packed(plan)
    return tensors, {"plan": packed, "tied": tied, "frozen": frozen}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network that the user's ``build`` would give."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


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
    other = {name: width for name, width in widths.items() if name in dict(model.named_modules())}
    other = {name: width for name, width in other.items() if width_of(model.get_submodule(name)) != width}
    if names == known and count == left and not other:
        return
    if names != known:
        odd = sorted(names ^ known)
        expected, got = f"{len(known)} tensors of the plan's names", f"'{odd[0]}' and {len(odd) - 1} more do not match"
    elif other:
        name = next(iter(other))
        expected, got = f"{other[name]} channels in '{name}'", str(width_of(model.get_submodule(name)))
    else:
        expected, got = f"{left:,} parameters", f"{count:,}"
    raise MismatchError(
        "the plan leaves another network than the one to be saved",
        expected=expected,
        got=got,
        fix="save what plan.apply or compress.prune returned, with its own plan; load could not build anything else",
    )


def _packed(plan: PruningPlan) -> str:
    text = json.dumps(plan.to_json(scores=False), separators=(",", ":"))
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


# -- reading ----------------------------------------------------------------
def _unpacked(packed: Any) -> Any:
    if packed is None:
        return None
    try:
        engine = zlib.decompressobj()
        text = engine.decompress(base64.b85decode(packed), _LARGEST_PLAN)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not engine.eof:
        raise ValueError("a plan that is cut off, or too large")
    return json.loads(text)


def _damaged(path: str | os.PathLike[str], why: str) -> FileFormatError:
    return FileFormatError(
        f"the header of {path} can not be read",
        expected="what compress.save writes",
        got=why,
        fix="take another copy",
    )


def _built(build: Build | str) -> nn.Module:
    if isinstance(build, nn.Module):
        raise InputError(
            "build is a network, not a function that makes one",
            expected="a function without arguments, or 'MODULE:CALLABLE'",
            got=type(build).__name__,
            fix="pass lambda: network, of the original architecture",
        )
    model = callable_of(build)()
    if isinstance(model, nn.Module):
        model = _unwrapped(model)
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


def _cut(model: nn.Module, stored: Any, path: str | os.PathLike[str]) -> nn.Module:
    widest = max((n for t in model.state_dict().values() if isinstance(t, Tensor) for n in t.shape), default=0)
    _check_sizes(stored, widest, path)
    plan = PruningPlan.from_json(stored)
    try:
        return plan.apply(model)
    except MismatchError as error:
        raise _other(path, error.expected, error.got) from error


def _check_sizes(stored: Any, widest: int, path: str | os.PathLike[str]) -> None:
    """Before ranges are written out: no group or axis is wider than the widest tensor."""
    if not isinstance(stored, Mapping):
        raise _damaged(path, "a plan that is none")
    try:
        sizes = [int(group["width"]) for group in stored["structure"]]
        for group in stored["structure"]:
            indices = [member["index"] for member in group["members"]]
            sizes += [int(i["run"]) * int(i["count"]) for i in indices if isinstance(i, Mapping)]
            sizes += [int(i["count"]) for i in indices if isinstance(i, Mapping)]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if max(sizes, default=0) > widest:
        raise _other(path, f"a network with {max(sizes)} channels somewhere", f"no more than {widest}")


def _other(path: str | os.PathLike[str], expected: str, got: str) -> MismatchError:
    return MismatchError(
        f"{path} does not fit the network that build gives",
        expected=expected,
        got=got,
        fix="build the original architecture, unpruned, with the same options (classes, widths) as it was saved with",
    )


def _fill(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str], path: str | os.PathLike[str]) -> None:
    """Put values in place; data types follow the file, ties are made where they are missing."""
    own = model.state_dict(keep_vars=True)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    found = {name: tuple(t.shape) if isinstance(t, Tensor) else () for name, t in own.items()}
    if found != shapes:
        missing, surplus = [n for n in shapes if n not in found], [n for n in found if n not in shapes]
        other = [n for n in shapes if n in found and found[n] != shapes[n]]
        if other:
            raise _other(path, f"'{other[0]}' of shape {shapes[other[0]]}", f"{found[other[0]]} ({len(other)} differ)")
        raise _other(
            path, f"{len(shapes)} tensors by the file's names", f"missing {missing[:3]}, surplus {surplus[:3]}"
        )
    first: dict[int, str] = {}
    for name, t in own.items():
        leader = first.setdefault(id(t), name)
        if tied.get(name, name) != tied.get(leader, leader):
            raise _other(path, f"'{leader}' and '{name}' as two tensors", "one tensor with both names")
    for name, leader in tied.items():
        _tie(model, name, leader)
    with torch.no_grad():
        for name, t in model.state_dict(keep_vars=True).items():
            if t.dtype != tensors[name].dtype or 0 in t.stride():  # an expanded tensor can't be written to
                t.data = torch.empty_like(tensors[name], device=t.device)
        state = OrderedDict(tensors)
        # some modules ask which version of their own layout the state has
        state._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]  # set by torch, too
        model.load_state_dict(state, strict=True)
    for name, t in model.state_dict().items():
        if digest({"": t}) != digest({"": tensors[name]}):
            raise _other(path, f"a tensor '{name}' of its own", "one that shares memory with another")


def _tie(model: nn.Module, name: str, leader: str) -> None:
    """Let a parameter or buffer be the one of another name."""
    places = [model.get_submodule(n.rpartition(".")[0]) for n in (name, leader)]
    short, source = name.rpartition(".")[2], leader.rpartition(".")[2]
    for kind in ("_parameters", "_buffers"):
        held = getattr(places[1], kind)
        if source in held and short in getattr(places[0], kind):
            getattr(places[0], kind)[short] = held[source]
