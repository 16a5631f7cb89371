"""Groups: channels of several layers that can only be removed together."""

from __future__ import annotations

import fnmatch
import functools
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrp.errors import FileFormatError, InputError, MismatchError, StructureError

__all__ = ["Group", "Member", "Structure", "find_groups"]

Channels = tuple[int, ...]

_MOST = 2**24  # entries of one axis; the widest layers known have thousands

#: norms whose output for one channel depends on all others
SPANNING = ("LayerNorm", "GroupNorm", "RMSNorm")
#: why layers that the trace does not reach stay
UNSEEN = "the outputs do not depend on it in a way autograd sees"
#: what layers of heads are, which the proof runs too
TRAINING_ONLY = "which runs in training mode only"


@dataclass(frozen=True)
class Member:
    """One axis of one layer that shrinks with a group.

    Attributes
    ----------
    layer : str
        Module name; for a parameter outside of the known layers its own name.
    axis : str
        "out" (rows of a weight, entries of a norm), "in" (what reads the
        channels) or "parameter".
    type : str
        Name of the class of torch.nn that the module is, or is derived from.
    index : tuple of tuple of int
        ``index[j]``: the entries of this axis that belong to channel j of the
        group; several where a flattened map is read, none where only a part of
        the channels passes.
    """

    layer: str
    axis: str
    type: str
    index: tuple[Channels, ...]

    def of(self, channels: Iterable[int]) -> list[int]:
        """Sorted entries of this axis that belong to the channels."""
        return sorted({i for j in channels for i in self.index[j]})

    def to_json(self) -> dict[str, Any]:
        index: Any = [list(i) for i in self.index]
        run = len(self.index[0]) if self.index else 0
        start = self.index[0][0] if run else 0
        if run and index == [list(range(start + j * run, start + (j + 1) * run)) for j in range(len(index))]:
            index = {"start": start, "run": run, "count": len(self.index)}
        return {"layer": self.layer, "axis": self.axis, "type": self.type, "index": index}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Member:
        index = stored["index"]
        if isinstance(index, Mapping):
            start, run, count = (operator.index(index[key]) for key in ("start", "run", "count"))
            _check_size(max(count, count * run))
            index = [range(start + j * run, start + (j + 1) * run) for j in range(count)]
        rows = tuple(tuple(operator.index(i) for i in row) for row in index)
        return cls(str(stored["layer"]), str(stored["axis"]), str(stored["type"]), rows)


@dataclass(frozen=True)
class Group:
    """Coupled channels: channel j of every member goes, or none does.

    Attributes
    ----------
    name : str
        The first layer, in the order of the model's modules, that makes these
        channels.
    width : int
        Channels.
    units : tuple of tuple of int
        What can be removed in one piece: single channels, or several where a
        grouped convolution or a gated pair ties them.
    members : tuple of Member
    protected : str
        Why nothing is removed here; empty if it can be.
    """

    name: str
    width: int
    units: tuple[Channels, ...]
    members: tuple[Member, ...]
    protected: str = ""

    @property
    def producers(self) -> tuple[str, ...]:
        """Convolutions and linear layers whose output channels these are."""
        return tuple(m.layer for m in self.members if m.axis == "out" and is_weighted(m.type))

    @functools.cached_property
    def parts(self) -> tuple[frozenset[int], ...]:
        """For layers that hold only some of the channels, which these are; one of each has to stay."""
        found = (frozenset(j for j, own in enumerate(m.index) if own) for m in self.members if not all(m.index))
        return tuple(part for part in dict.fromkeys(found) if part)

    def emptied(self, gone: Iterable[int]) -> str:
        """The first layer that would hold none of its channels of this group without these; empty if there is none."""
        without = set(gone)
        if len(without) == self.width:
            return self.name
        part = next((part for part in self.parts if part <= without), None)
        if part is None:
            return ""
        return next(m.layer for m in self.members if part == {j for j, own in enumerate(m.index) if own})

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for groups of one kind: names without numbers, and types."""
        return tuple((re.sub(r"\d+", "#", m.layer), m.axis, m.type) for m in self.members)

    def to_json(self) -> dict[str, Any]:
        single = all(len(unit) == 1 for unit in self.units)
        return {
            "name": self.name,
            "width": self.width,
            "units": None if single else [list(unit) for unit in self.units],
            "members": [m.to_json() for m in self.members],
            "protected": self.protected,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Group:
        width = operator.index(stored["width"])
        _check_size(width)
        units = stored["units"] or [[j] for j in range(width)]
        members = tuple(Member.from_json(m) for m in stored["members"])
        rows = tuple(tuple(operator.index(j) for j in unit) for unit in units)
        if not members or any(len(m.index) != width for m in members):
            raise ValueError(f"group '{stored['name']}' has no members of its {width} channels")
        return cls(str(stored["name"]), width, rows, members, str(stored["protected"]))


_WEIGHTED = re.compile(r"Conv|Linear")


def _check_size(entries: int) -> None:
    """Before ranges of a stored structure are written out: a file of a few bytes can state any number."""
    if not 0 <= entries <= _MOST:
        raise FileFormatError(
            "the structure is damaged",
            expected=f"axes of at most {_MOST:,} entries",
            got=f"{entries:,}",
            fix="take another copy, or plan again",
        )


def kind_of(module: nn.Module | nn.Parameter) -> str:
    """Name of the class of torch.nn that a module is, or is derived from."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn"):
            return cls.__name__
    return type(module).__name__


def is_depthwise(module: Any) -> bool:
    """Whether a convolution's two channel axes are one: as many groups as inputs and as outputs."""
    groups = getattr(module, "groups", 1)
    outputs = getattr(module, "out_channels", 0)
    return bool(groups > 1 and groups == outputs == getattr(module, "in_channels", outputs))


def is_weighted(type_name: str) -> bool:
    """Whether a member's type is a convolution or a linear layer."""
    return bool(_WEIGHTED.search(type_name))


@dataclass(frozen=True)
class Structure:
    """All groups of a network.

    Attributes
    ----------
    groups : tuple of Group
        In the order of the model's modules.
    """

    groups: tuple[Group, ...]
    _by_name: dict[str, Group] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {g.name: g for g in self.groups})

    def __getitem__(self, name: str) -> Group:
        if name not in self._by_name:
            near = [g.name for g in self.groups if name in g.producers]
            raise InputError(
                f"there is no group '{name}'",
                expected="the name of its first layer",
                got=name,
                fix=f"'{near[0]}' is the group it belongs to" if near else "print(structure) lists them",
            )
        return self._by_name[name]

    @property
    def prunable(self) -> tuple[Group, ...]:
        """Groups from which something can be removed."""
        return tuple(g for g in self.groups if not g.protected)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers a criterion scores: the producers of all prunable groups."""
        return tuple(dict.fromkeys(name for g in self.prunable for name in g.producers))

    def protecting(self, reasons: Mapping[str, str]) -> Structure:
        """The same with more groups protected; ``reasons`` by group name."""
        changed = (replace(g, protected=g.protected or reasons.get(g.name, "")) for g in self.groups)
        return Structure(tuple(changed))

    def check(self, model: nn.Module) -> None:
        """That a model has the layers and widths of the groups.

        Raises
        ------
        MismatchError
        """
        from compress.cutting import module_of, width_of

        for g in self.prunable:  # of the others nothing is ever cut
            for m in g.members:
                if m.axis == "parameter":
                    continue
                least = 1 + max((i for entries in m.index for i in entries), default=-1)
                found = width_of(module_of(model, m.layer), m.axis)
                if found < least or (m.layer == g.name and m.axis == "out" and found != g.width):
                    raise MismatchError(
                        f"the structure is not that of this model at '{m.layer}'",
                        expected=f"{g.width if m.layer == g.name else least} channels ({m.axis})",
                        got=f"{found}",
                        fix="find the groups of this model: compress.find_groups",
                    )

    def to_json(self) -> list[dict[str, Any]]:
        return [g.to_json() for g in self.groups]

    @classmethod
    def from_json(cls, stored: Sequence[Mapping[str, Any]]) -> Structure:
        return cls(tuple(Group.from_json(g) for g in stored))

    def __str__(self) -> str:
        rows = [("group", "channels", "cut in", "layers", "protected")]
        for g in self.groups:
            size = max((len(u) for u in g.units), default=1)
            rows.append((g.name, str(g.width), f"{size}s", str(len(g.producers)), g.protected or "-"))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)


def find_groups(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    protect: Sequence[str] | str = (),
    allow: Sequence[str] | str = (),
    prove: bool = True,
    progress: bool = False,
) -> Structure:
    """Which channels of a network can be removed, and what goes with them.

    Protected by default are the network's outputs, groups that a LayerNorm or
    GroupNorm spans (removing one of its channels changes what all others
    become: the residual width of ConvNeXt and ViT), layers whose weight is
    computed or shared, auxiliary heads that run in training mode only, and
    whatever the proof finds. Such heads are cut where they read channels.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    example_inputs : Tensor or tuple
        What the model is called with; values do not matter, shapes do.
    protect : str or sequence of str
        Layers, by name or shell pattern, whose output channels all stay.
    allow : str or sequence of str
        Groups, by the name or pattern of one of their layers, that a
        normalisation spans and that may be cut nevertheless: then the pruned
        network is *not* the masked one.
    prove : bool
        Cut every group of a copy with random weights and compare it, in
        float64, with the same network masked. Groups that differ (channels
        padded, shuffled or reshaped in a way that the dependency graph does
        not follow) are protected.
    progress : bool
        Show the rounds of the proof, if it takes longer than a moment.

    Returns
    -------
    Structure

    Raises
    ------
    InputError
        If a pattern fits no layer.
    StructureError
        If the model can not be traced, or holds nothing that can be removed.

    Notes
    -----
    The graph is torch-pruning's (Fang et al. 2023, "DepGraph", arXiv
    2301.12900). Cost: two forward passes, and with ``prove`` about
    2 log2(units of the largest group) forward passes of a copy in float64; as
    many again, times log2(groups), for each group that fails. Memory: three
    times the model's, that is the copy, and what half of its channels leave.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 2))
    >>> structure = compress.find_groups(net, torch.randn(1, 3, 4, 4))
    >>> [(g.name, g.width, g.protected) for g in structure.groups]
    [('0', 8, ''), ('3', 2, "its channels are the network's output")]
    >>> structure["0"].members[1].index[1]  # the four pixels of channel 1 in the flattened map
    (4, 5, 6, 7)
    """
    from compress._network import example_of, network_of

    with torch.inference_mode(False):  # the graph is read from autograd
        model, example_inputs = network_of(model, values=False), example_of(example_inputs)
        return _found(model, as_inputs(example_inputs), protect, allow, prove, progress)


def _found(
    model: nn.Module,
    inputs: tuple[Any, ...],
    protect: Sequence[str] | str,
    allow: Sequence[str] | str,
    prove: bool,
    progress: bool,
) -> Structure:
    from compress._dependencies import follow
    from compress._passes import Heads, find_heads
    from compress._proof import prove_groups

    protected, allowed = (layers_of(model, p, what) for p, what in ((protect, "protect"), (allow, "allow")))
    heads = Heads()
    structure, moved = follow(model, inputs, heads)
    if any(g.protected == UNSEEN for g in structure.groups) and (heads := find_heads(model, inputs)).names:
        try:
            structure, moved = follow(model, inputs, heads)
        except StructureError:
            heads = replace(heads, failure="the graph can not follow it")
            structure, moved = follow(model, inputs, heads)
    if not structure.groups:
        raise StructureError(
            f"no convolution or linear layer was found in {type(model).__name__}",
            expected="a network with layers whose channels can be removed",
            got="none that the outputs depend on",
            fix="check that example_inputs reach the layers",
        )
    structure = protecting(structure, protected, allowed)
    return prove_groups(model, inputs, structure, heads, moved, progress) if prove else structure


def protecting(structure: Structure, protected: set[str], allowed: set[str]) -> Structure:
    """With what the user protects, and groups that a norm spans unless they are allowed."""
    reasons = {}
    for g in structure.groups:
        named = {m.layer for m in g.members if m.axis == "out"}
        if named & protected:
            reasons[g.name] = "the user protects it"
        elif (kinds := sorted({m.type for m in g.members if m.type in SPANNING})) and not named & allowed:
            reasons[g.name] = f"{' and '.join(kinds)} spans its channels"
    return structure.protecting(reasons)


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """Example inputs as the tuple a model is called with.

    Raises
    ------
    InputError
    """
    inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if not inputs or not any(isinstance(t, Tensor) for t in inputs):
        raise InputError(
            "example_inputs holds no tensor",
            expected="a Tensor with a batch axis, or a tuple of what the model is called with",
            got=type(example_inputs).__name__,
            fix="pass for example torch.randn(1, 3, 224, 224)",
        )
    return inputs


def layers_of(model: nn.Module, patterns: Sequence[str] | str, what: str) -> set[str]:
    """Names of the modules that one of the patterns fits, and of what they hold."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    out: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else tuple(patterns):
        found = fnmatch.filter(names, pattern)
        if not found:
            raise InputError(
                f"{what}='{pattern}' fits no layer",
                expected="a module name or a shell pattern such as 'layer4.*'",
                got=pattern,
                fix="print(model) lists the names",
            )
        out |= {name for name in names if any(name == f or name.startswith(f"{f}.") for f in found)}
    return out
