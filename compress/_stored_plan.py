"""What a plan's JSON has to be before anything is made of it: whole, bearable in size, in agreement with itself."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from compress.groups import is_weighted

__all__ = ["check_stored", "seal"]

#: entries of all members together; a ResNet-50 has about 90,000, and each takes some 100 bytes
MOST = 2**22
AXES = ("in", "out", "parameter")

Axis = tuple[str, str]
Interval = tuple[int, int]


def seal(structure: Any, costs: Any) -> str:
    """Digest of what a plan says about its network.

    An index that is off by one may still fit every shape, and cut the wrong
    channels: nothing but the network's graph, which is not in the file, would
    tell.
    """
    text = json.dumps([structure, costs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_stored(stored: Mapping[str, Any]) -> None:
    """That groups and costs are those that were written, and that they fit each other.

    Ranges are not written out: a file of a few bytes can state any number.

    Raises
    ------
    ValueError, TypeError, KeyError
        With the reason.

    Notes
    -----
    Cost: O(n log n) for n intervals of indices.
    """
    extents = _extents(stored["costs"])
    taken = _taken(stored["structure"])
    holders = {layer for layer, _ in extents}
    for (layer, axis), intervals in taken.items():
        where = f"'{layer}' ({axis})"
        _need(not intervals or (layer, axis) in extents or layer not in holders, f"{where}, which no tensor follows")
        sizes = extents.get((layer, axis), {MOST}) if intervals else {MOST}
        _need(len(sizes) == 1, f"several widths of {where}: {sorted(sizes)}")
        (size,) = sizes
        last = 0
        for first, end in sorted(intervals):
            _need(first >= last, f"entry {first} of {where} twice" if first >= 0 else f"entry {first} of {where}")
            last = end
        _need(last <= size, f"entry {last - 1} of {where}, which has {size}")
    for layer, axis in extents:
        known = (layer, axis) in taken or (axis == "in" and (layer, "out") in extents)
        _need(known, f"costs that follow '{layer}' ({axis}), which is in no group")
    _check_layers(stored["costs"], extents)
    _need(stored["seal"] == seal(stored["structure"], stored["costs"]), "groups or costs that were changed by hand")
    _check_notes(stored)


def _need(right: bool, wrong: str) -> None:
    if not right:
        raise ValueError(wrong)


def _number(value: Any, least: int, what: str) -> int:
    """An int, not a truth value."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} {value!r}, no int >= {least}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} {value!r}, no text")
    return value


def _items(value: Any, kind: Any, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, str):
        raise TypeError(f"{what} that is a {type(value).__name__}")
    return value


# -- costs ------------------------------------------------------------------
def _extents(costs: Any) -> dict[Axis, set[int]]:
    """Layer and axis to its entries, as the tensors that follow it say."""
    out: dict[Axis, set[int]] = defaultdict(set)
    for name, entry in _items(costs["tensors"], Mapping, "tensors").items():
        shape, itemsize, trained, follows = entry
        _number(itemsize, 1, f"bytes per entry of '{name}':")
        _need(isinstance(trained, bool), f"'{name}' trained or not: {trained!r}")
        sizes = [_number(n, 0, f"in the shape of '{name}':") for n in _items(shape, list, f"a shape of '{name}'")]
        for n, source in zip(sizes, _items(follows, list, f"axes of '{name}'"), strict=True):
            if source is None:
                continue
            layer, axis, parts = source
            key = (_text(layer, "a layer"), _text(axis, "an axis"))
            _need(axis in AXES, f"an axis '{axis}'")
            out[key].add(n * _number(parts, 1, f"parts of '{name}':"))
    return out


def _check_layers(costs: Mapping[str, Any], extents: Mapping[Axis, set[int]]) -> None:
    _number(costs["other_macs"], 0, "other MACs:")
    for name, row in _items(costs["layers"], Mapping, "layers").items():
        weight, positions, filters = row
        _need(weight == "" or weight in costs["tensors"], f"a weight '{weight}' that is not there")
        _number(positions, 0, f"positions of '{name}':")
        width = _number(filters, 0, f"filters of '{name}':")
        _need(extents.get((name, "out"), {width}) == {width}, f"{width} filters of '{name}'")


# -- groups -----------------------------------------------------------------
def _taken(structure: Any) -> dict[Axis, list[Interval]]:
    """Layer and axis to the intervals of entries that groups hold of it, of a bearable number.

    None where all of them are protected: what the graph made of these may be
    the reason.
    """
    taken: dict[Axis, list[Interval]] = defaultdict(list)
    names: set[str] = set()
    entries = 0
    for group in _items(structure, list, "groups"):
        name, width = _text(group["name"], "a group's name"), _number(group["width"], 1, "a width")
        protected = _text(group["protected"], "a reason")
        _need(name not in names, f"two groups '{name}'")
        names.add(name)
        entries += width
        own: set[Axis] = set()
        root = False
        for member in _items(group["members"], list, f"members of '{name}'"):
            axis = (_text(member["layer"], "a layer"), _text(member["axis"], "an axis"))
            kind = _text(member["type"], "a type")
            _need(axis[1] in AXES, f"an axis '{axis[1]}'")
            _need(axis not in own, f"'{axis[0]}' ({axis[1]}) twice in group '{name}'")
            own.add(axis)
            intervals, count = _intervals(member["index"], width, f"'{axis[0]}' ({axis[1]})")
            entries += sum(end - first for first, end in intervals)
            _need(entries <= MOST, f"more than {MOST:,} entries")
            _need(count == width, f"'{axis[0]}' with {count} channels in group '{name}' of {width}")
            taken[axis] += [] if protected else intervals
            first = axis == (name, "out") and is_weighted(kind)
            root = root or (first and sorted(intervals) in ([(0, width)], [(j, j + 1) for j in range(width)]))
        _need(root, f"group '{name}' without its {width} channels")
        _check_units(group["units"], width, name)
    return taken


def _intervals(index: Any, width: int, what: str) -> tuple[list[Interval], int]:
    """What a member holds of its axis, and of how many channels."""
    if isinstance(index, Mapping):
        start, run, count = (_number(index[key], 0, f"{key} of {what}:") for key in ("start", "run", "count"))
        _need(run > 0, f"channels of {what} without entries")
        return [(start, start + run * count)], count
    rows: Sequence[Any] = _items(index, list, f"an index of {what}")
    out = []
    for row in rows:
        for i in _items(row, list, f"an index of {what}"):
            entry = _number(i, 0, f"in the index of {what}:")
            out.append((entry, entry + 1))
    return out, len(rows)


def _check_units(units: Any, width: int, name: str) -> None:
    if units is None:
        return
    found: set[int] = set()
    for unit in _items(units, list, f"units of '{name}'"):
        _need(bool(_items(unit, list, f"a unit of '{name}'")), f"an empty unit of '{name}'")
        for j in unit:
            _need(_number(j, 0, "a channel") < width and j not in found, f"channel {j} of '{name}' twice, or too many")
            found.add(j)
    _need(len(found) == width, f"units of '{name}' with {len(found)} of {width} channels")


# -- the rest ---------------------------------------------------------------
def _check_notes(stored: Mapping[str, Any]) -> None:
    """What is printed, and read by later steps."""
    for name, reason in _items(stored["unscored"], Mapping, "unscored").items():
        _text(reason, f"a reason of '{name}'")
    settings = _items(stored["settings"], Mapping, "settings")
    kinds = {"edits": list, "steps": list, "done": Mapping, "latency_ms": Mapping, "file_bytes": Mapping}
    for key in kinds.keys() & settings.keys():
        _items(settings[key], kinds[key], f"settings '{key}'")
    for key in ("latency_ms", "file_bytes"):
        for n in (settings.get(key, {}).get(when) for when in ("before", "after")):
            _need(n is None or (type(n) in (int, float) and n >= 0), f"{key} {n!r}")
