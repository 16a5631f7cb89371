"""Networks on disk, in one file with their plans: tensors as safetensors, quantized ones entropy-coded."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress import container
from compress._network_state import Build, State, built, callable_of, cut, damaged, fill, state_of
from compress.codebook import Codebook
from compress.plan import PruningPlan
from compress.quantization_plan import QuantizationPlan, plan_of
from lrp._files import read_tensors, write_tensors
from lrp._identity import unwrapped
from lrp.errors import FileFormatError, InputError

__all__ = ["callable_of", "file_size", "load", "save"]

KIND = "compress.model"
_LARGEST_PLAN = 2**26  # bytes of its JSON text


def save(model: nn.Module, path: str | os.PathLike[str], *, plan: PruningPlan | None = None) -> None:
    """Write a network as one file, whole or not at all; no pickle.

    Parameters
    ----------
    model : nn.Module
        Left as it is; may be on any device, wrapped by ``torch.compile`` or
        ``DistributedDataParallel``. One that :func:`compress.quantize` made goes
        into a container with entropy-coded weights.
    path : path
    plan : PruningPlan, optional
        Of all that was removed from the original architecture. Default: the one
        that ``plan.apply`` and :func:`compress.prune` leave on their networks.

    Raises
    ------
    MismatchError
        If the plan leaves another network than this, or the weights lie off the
        codebooks that the network carries.
    InputError
        If the state holds what a file of tensors can't: other objects, sparse
        tensors or those of torch's own quantization, tensors without values.
    DataError
        If the file can not be written; what was there stays.

    Notes
    -----
    Of networks that are not quantized: a safetensors file, whose header is JSON:
    kind, version, names of tied and of frozen tensors, a SHA-256 of everything,
    and the plan without its scores (compressed, for it counts as bytes of the
    file). Of quantized ones: :mod:`compress.container`. A tensor with several
    names is stored once.

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
    model = unwrapped(model)
    state, quantized = state_of(model, plan), plan_of(model)
    if quantized is not None:
        container.write(path, _pieces(model, state, quantized))
        return
    tensors, meta = state.tensors, _meta(state)
    write_tensors(path, KIND, tensors, meta)


def file_size(model: nn.Module, plan: PruningPlan | None = None) -> int:
    """Bytes of the file that :func:`save` would write, header and plan included.

    Parameters
    ----------
    model, plan
        As in :func:`save`.

    Notes
    -----
    Exact, for the file is made in memory: twice the bytes of the network; of a
    quantized one, half a second per million weights.

    Examples
    --------
    >>> import torch
    >>> from compress.storage import file_size
    >>> 4 * 8 * 100 < file_size(torch.nn.Linear(8, 100)) < 4 * 9 * 100 + 1000
    True
    """
    from safetensors.torch import save as serialise

    model = unwrapped(model)
    state, quantized = state_of(model, plan), plan_of(model)
    if quantized is not None:
        return sum(map(len, _pieces(model, state, quantized)))
    tensors, meta = state.tensors, _meta(state)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {"format": KIND, "version": "1", "meta": json.dumps(meta), "order": json.dumps(list(plain))}
    return len(serialise(plain, {**header, "digest": "0" * 64}))


def load(path: str | os.PathLike[str], build: Build | str) -> nn.Module:
    """Read what :func:`save` wrote; which of its two formats it is, the file tells.

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
        and tied parameters as they were saved. It carries the plans it was saved
        with; quantized weights are index times step, to the last bit.

    Raises
    ------
    FileFormatError
        If the file is damaged, of another kind or version.
    MismatchError
        If ``build`` gives another architecture.
    InputError
        If ``build`` gives no network.
    FileNotFoundError

    Notes
    -----
    No file is trusted: what is damaged, forged or of another network is refused,
    without more memory than twice the network's. Eleven million entropy-coded
    weights take about a second; without the library constriction six times that.

    Examples
    --------
    >>> import tempfile, torch, compress
    >>> from compress.storage import load, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(torch.nn.ReLU(), f"{folder}/net.safetensors")
    ...     load(f"{folder}/net.safetensors", "torch.nn:ReLU")
    ReLU()
    """
    if container.is_container(path):
        return _load_quantized(path, build)
    try:
        tensors, meta = read_tensors(path, KIND)
        stored = _unpacked(meta["plan"])
        tied, frozen = _names(meta)
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    model = cut(built(build), stored, path)
    fill(model, State(tensors, tied, frozen, None), path)
    model.__dict__.pop("_quantization_plan", None)  # of the network that build gave
    return model


def _load_quantized(path: str | os.PathLike[str], build: Build | str) -> nn.Module:
    original = built(build)
    weights = sum(t.numel() for t in original.state_dict().values() if isinstance(t, Tensor))
    header = container.inspect(path, container.largest_header(weights))
    try:
        tied, frozen = _names(header.meta)
        stored, about = header.meta["pruning"], header.meta["quantization"]
        left_out = {str(name): str(why) for name, why in about["left_out"].items()}
        settings = dict(about["settings"].items())
        named = {e.name: [e.name] for e in header.entries}
        named.update({leader: [str(n) for n in names] for leader, names in header.meta["aliases"].items()})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if any(tied.get(name, name) != leader for leader, names in named.items() for name in names):
        raise damaged(path, "codebooks of tensors that are not there")
    model = cut(original, stored, path)
    del original  # two of them are enough
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    tensors, books = container.read(path, header, {n: s for n, s in shapes.items() if n not in tied})
    fill(model, State(tensors, tied, frozen, None), path)
    codebooks = {name: book for leader, book in books.items() for name in named[leader]}
    # not plan.apply, which would read the whole numbers off the weights: they were just made from them
    object.__setattr__(model, "_quantization_plan", QuantizationPlan(codebooks, left_out, settings))
    return model


# -- what is stored beside tensors ------------------------------------------------
def _pieces(model: nn.Module, state: State, plan: QuantizationPlan) -> list[bytes]:
    """The container of a quantized network."""
    quantized: dict[str, tuple[Tensor, Codebook]] = {}
    aliases: dict[str, list[str]] = {}
    for name, book in plan.codebooks.items():
        k = QuantizationPlan({name: book}).indices(model)[name]  # one at a time, for memory
        leader = state.tied.get(name, name)
        if leader in quantized and quantized[leader][1].to_json() != book.to_json():
            raise InputError(
                f"'{leader}' and '{name}' are one tensor with two codebooks",
                expected="one codebook",
                got=f"{quantized[leader][1]}, and {book}",
                fix="quantize the network again",
            )
        quantized[leader] = (k.to(torch.int16), book)
        aliases.setdefault(leader, []).append(name)
    floats = {name: t for name, t in state.tensors.items() if name not in quantized}
    about = {
        "pruning": None if state.plan is None else state.plan.to_json(scores=False),
        "quantization": {"left_out": dict(plan.left_out), "settings": dict(plan.settings)},
        "tied": state.tied,
        "frozen": state.frozen,
        "aliases": {leader: names for leader, names in aliases.items() if names != [leader]},
    }
    return container.pack(quantized, floats, about)


def _names(meta: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    tied = {str(name): str(first) for name, first in meta["tied"].items()}
    frozen = [str(name) for name in meta["frozen"]]
    "".join((*tied, *tied.values(), *frozen)).encode()  # half a character could not be printed
    return tied, frozen


def _meta(state: State) -> dict[str, Any]:
    plan = state.plan
    return {"plan": None if plan is None else _packed(plan), "tied": state.tied, "frozen": state.frozen}


def _packed(plan: PruningPlan) -> str:
    text = json.dumps(plan.to_json(scores=False), separators=(",", ":"))
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


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
