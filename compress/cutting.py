"""Cutting and masking: the two ways to take channels out of a copy of a network."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.groups import Structure, is_weighted, kind_of
from lrp.errors import MismatchError, StructureError

__all__ = ["channel_axis", "cut", "mask", "width_of"]

Removed = Mapping[str, Iterable[int]]

#: forward passes in which a channel that is not read, or not given, is one whose weights are zero
_PLAIN = {
    c.forward
    for c in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    )
}  # fmt: skip


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
    from compress._dependencies import cut_axes

    out = _copy(model, share)
    for layer, axes in _entries(structure, removed).items():
        if "parameter" in axes:
            _cut_parameter(out, layer, axes["parameter"])
            continue
        module = module_of(out, layer)
        for axis, entries in axes.items():
            size = width_of(module, axis)
            if entries[-1] >= size:
                raise _other(layer, f"more than {entries[-1]} entries ({axis})", f"{size}")
            if len(entries) >= size:
                raise StructureError(
                    f"nothing would be left of '{layer}'",
                    expected="at least one channel",
                    got=f"all {size} removed",
                    fix="keep a channel of the group",
                )
        cut_axes(module, axes)
    return out


def mask(
    model: nn.Module, structure: Structure, removed: Removed, *, share: bool = False, hooked: bool = False
) -> nn.Module:
    """A copy of full width in which the removed channels are zero and nobody reads them.

    Rows of what makes a channel (convolutions, linear layers, norms), and
    columns of what reads it, are set to zero. Its output equals that of
    :func:`cut`, unless a LayerNorm or GroupNorm spans the channels.

    With ``hooked``, convolutions and linear layers keep their weights; hooks
    set what they read and give to zero instead. It takes no memory, and is the
    same unless the model uses a layer's weight without calling the layer.
    """
    out = _copy(model, share)
    with torch.no_grad():
        for layer, axes in _entries(structure, removed).items():
            if "parameter" in axes:
                continue
            module = module_of(out, layer)
            if hooked and type(module).forward in _PLAIN:
                _hook(module, axes)
                continue
            if share:
                for name, p in list(module.named_parameters(recurse=False)):
                    module._parameters[name] = nn.Parameter(p.detach().clone(), p.requires_grad)
            for axis, entries in axes.items():
                _silence(module, axis, entries)
    return out


def _copy(model: nn.Module, share: bool) -> nn.Module:
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {})


def _entries(structure: Structure, removed: Removed) -> dict[str, dict[str, list[int]]]:
    """Layer and axis to the sorted entries that go, all groups together."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name, channels in removed.items():
        chosen = tuple(channels)
        for member in structure[name].members:
            found[member.layer, member.axis].update(member.of(chosen))
    out: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for (layer, axis), entries in sorted(found.items(), key=lambda item: item[0]):
        if entries:
            out[layer][axis] = sorted(entries)
    return out


def module_of(model: nn.Module, name: str) -> nn.Module:
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


def width_of(module: nn.Module, axis: str = "out") -> int:
    """Entries of one axis of a layer; 0 if it has no width.

    Parameters
    ----------
    module : nn.Module
        A convolution, linear layer, norm, PReLU or embedding.
    axis : str
        "out": channels it gives; "in": channels it reads. Layers other than
        convolutions and linear ones have one width.

    Examples
    --------
    >>> from compress.cutting import width_of
    >>> width_of(nn.Linear(4, 6)), width_of(nn.Linear(4, 6), "in"), width_of(nn.BatchNorm2d(3))
    (6, 4, 3)
    """
    names = ("out_channels", "out_features") if axis == "out" else ("in_channels", "in_features")
    for name in (*names, "num_features", "num_channels", "num_parameters", "embedding_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return int((getattr(module, "normalized_shape", None) or (0,))[-1])


def channel_axis(module: nn.Module, t: Tensor) -> int:
    """Where an input or output of a convolution or linear layer holds its channels."""
    return t.dim() - 1 - len(getattr(module, "kernel_size", ()))


def _hook(module: nn.Module, axes: Mapping[str, list[int]]) -> None:
    def silent(t: Tensor, axis: str) -> Tensor:
        return t.index_fill(channel_axis(module, t), torch.tensor(axes[axis], device=t.device), 0)

    def reading(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (silent(given[0], "in"), *given[1:])

    def giving(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        return silent(output, "out")

    if "in" in axes:
        module.register_forward_pre_hook(reading)
    if "out" in axes:
        module.register_forward_hook(giving)


def scaled_axis(p: torch.Tensor) -> int:
    """The axis of a bare parameter that holds channels: its last one with more than one entry."""
    return max((k for k, n in enumerate(p.shape) if n > 1), default=0)


def _cut_parameter(model: nn.Module, name: str, entries: list[int]) -> None:
    owner, _, short = name.rpartition(".")
    module = module_of(model, owner)
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
