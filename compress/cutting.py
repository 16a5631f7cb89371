"""Cutting and masking: the two ways to take channels out of a copy of a network."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from compress.groups import Structure, is_weighted, kind_of
from lrp.errors import MismatchError, StructureError

__all__ = ["cut", "mask"]

Removed = Mapping[str, Iterable[int]]


def cut(model: nn.Module, structure: Structure, removed: Removed, *, share: bool = False) -> nn.Module:
    """A copy without the removed channels.

    Parameters
    ----------
    model : nn.Module
        Of the shapes the structure was found with.
    structure : Structure
    removed : dict of str to iterable of int
        Group to channels.
    share : bool
        Tensors from which nothing is removed are the model's own: for copies
        that are only looked at.

    Returns
    -------
    nn.Module
        Training flags, frozen parameters and data types as in the model.

    Raises
    ------
    MismatchError
        If the model lacks a layer, or has another width.
    StructureError
        If a layer can not lose channels, or would lose all.

    Notes
    -----
    Entries of all groups are removed from a layer at once, by their places in
    the original layer. Cost: one copy of the model.

    Examples
    --------
    >>> import torch
    >>> from compress.cutting import cut
    >>> from compress import find_groups
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    >>> small = cut(net, find_groups(net, torch.randn(1, 4)), {"0": [1, 4]})
    >>> small[0], small[2]
    (Linear(in_features=4, out_features=4, bias=True), Linear(in_features=4, out_features=2, bias=True))
    """
    from compress._dependencies import cut_axis

    out = _copy(model, share)
    for layer, axis, entries in _entries(structure, removed):
        if axis == "parameter":
            _cut_parameter(out, layer, entries)
            continue
        module = _module(out, layer)
        size = _size(module, axis)
        if entries[-1] >= size:
            raise _other(layer, f"more than {entries[-1]} entries ({axis})", f"{size}")
        if len(entries) >= size:
            raise StructureError(
                f"nothing would be left of '{layer}'",
                expected="at least one channel",
                got=f"all {size} removed",
                fix="keep a channel of the group",
            )
        cut_axis(module, axis, entries)
    return out


def mask(model: nn.Module, structure: Structure, removed: Removed, *, share: bool = False) -> nn.Module:
    """A copy of full width in which the removed channels are zero and nobody reads them.

    Rows of what makes a channel (convolutions, linear layers, norms), and
    columns of what reads it, are set to zero. Its output equals that of
    :func:`cut`, unless a LayerNorm or GroupNorm spans the channels.
    """
    out = _copy(model, share)
    own: set[str] = set()
    with torch.no_grad():
        for layer, axis, entries in _entries(structure, removed):
            if axis == "parameter":
                continue
            module = _module(out, layer)
            if share and layer not in own:
                own.add(layer)
                for name, p in list(module.named_parameters(recurse=False)):
                    module._parameters[name] = nn.Parameter(p.detach().clone(), p.requires_grad)
            _silence(module, axis, entries)
    return out


def _copy(model: nn.Module, share: bool) -> nn.Module:
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {})


def _entries(structure: Structure, removed: Removed) -> Iterator[tuple[str, str, list[int]]]:
    """Layer, axis and sorted entries that go, all groups together; what reads a channel before what makes it."""
    out: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name, channels in removed.items():
        chosen = tuple(channels)
        for member in structure[name].members:
            out[member.layer, member.axis].update(member.of(chosen))
    for (layer, axis), entries in sorted(out.items(), key=lambda item: item[0]):
        if entries:
            yield layer, axis, sorted(entries)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise _other(name, f"a layer '{name}'", "none of that name") from error


def _other(layer: str, expected: str, got: str) -> MismatchError:
    return MismatchError(
        f"the plan does not fit this model at '{layer}'",
        expected=expected,
        got=got,
        fix="apply it to the architecture it was made for, before any pruning",
    )


def width_of(model: nn.Module, layer: str, axis: str) -> int:
    """Entries of one axis of a layer.

    Raises
    ------
    MismatchError
        If there is no such layer.
    """
    return _size(_module(model, layer), axis)


def _size(module: nn.Module, axis: str) -> int:
    names = ("out_channels", "out_features") if axis == "out" else ("in_channels", "in_features")
    for name in (*names, "num_features", "num_channels", "num_parameters", "embedding_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return int((getattr(module, "normalized_shape", None) or (0,))[-1])


def scaled_axis(p: torch.Tensor) -> int:
    """The axis of a bare parameter that holds channels: its last one with more than one entry."""
    return max((k for k, n in enumerate(p.shape) if n > 1), default=0)


def _cut_parameter(model: nn.Module, name: str, entries: list[int]) -> None:
    owner, _, short = name.rpartition(".")
    module = _module(model, owner)
    old = getattr(module, short, None)
    if not isinstance(old, nn.Parameter):
        raise _other(name, f"a parameter '{name}'", "none of that name")
    axis, gone = scaled_axis(old), set(entries)
    keep = [i for i in range(old.shape[axis]) if i not in gone]
    new = old.detach().index_select(axis, torch.tensor(keep, device=old.device))
    setattr(module, short, nn.Parameter(new, requires_grad=old.requires_grad))


def _silence(module: nn.Module, axis: str, entries: list[int]) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    at = torch.tensor(entries, device=weight.device)
    weighted = is_weighted(kind_of(module))
    if axis == "out" and (weighted or not isinstance(module, nn.PReLU)):
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.Tensor):
            bias[at] = 0
        if getattr(module, "transposed", False):
            size = weight.shape[1]
            for i in entries:
                rows = slice(None) if size == module.out_channels else _part(weight.shape[0], module.groups, i // size)
                weight[rows, i % size] = 0
        else:
            weight[(at,) if weighted else (..., at)] = 0  # an embedding holds its channels last
    elif axis == "in" and weighted:
        if getattr(module, "transposed", False):
            weight[at] = 0
            return
        if getattr(module, "groups", 1) == 1:
            weight.index_fill_(1, at, 0)
            return
        size = weight.shape[1]
        for i in entries:
            weight[_part(weight.shape[0], getattr(module, "groups", 1), i // size), i % size] = 0


def _part(total: int, parts: object, k: int) -> slice:
    size = total // (parts if isinstance(parts, int) else 1)
    return slice(k * size, (k + 1) * size)
