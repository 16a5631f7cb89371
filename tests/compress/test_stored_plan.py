"""Plans that were changed on disk: refused with a reason, in little memory; what is accepted cuts what it says."""

from __future__ import annotations

import base64
import copy
import functools
import json
import math
import random
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import BY_NAME, NETWORKS, structure_of
from torch import Tensor, nn

from compress._remainder import remaining_table
from compress._stored_plan import seal
from compress.costs import CostTable
from compress.plan import PruningPlan
from compress.storage import KIND, load
from lrp import errors
from lrp._files import write_tensors

Edit = Callable[[dict[str, Any]], Any]
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 10**6, 2**24, 10**400, 0.5, math.inf, math.nan,
    "", "x", "in", "out", "parameter", [], {}, [0], {"start": 0, "run": 1, "count": 2**24},
]  # fmt: skip


@functools.cache
def whole(name: str) -> PruningPlan:
    """Every second piece goes; scores and notes of every kind."""
    case, structure = BY_NAME[name], structure_of(name)
    return PruningPlan(
        structure,
        CostTable.of(case.model(), case.inputs(), structure),
        {g.name: tuple(j for unit in g.units[1::2] for j in unit) for g in structure.prunable},
        {g.name: tuple(float(j) for j in range(g.width)) for g in structure.prunable},
        {"x": "why"},
        {
            "edits": ["a"], "steps": [{"seed": 1}], "target": {"macs": 0.5}, "done": {"cuts": 1},
            "latency_ms": {"before": 2.0, "after": 1.0}, "file_bytes": {"before": 10, "after": 5},
        },
    )  # fmt: skip


def stored_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(whole(name).to_json()))
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, inner in items for p in ((*path, key), *places(inner, (*path, key)))]


def changed(stored: dict[str, Any], everywhere: list[tuple[Any, ...]], draw: random.Random) -> dict[str, Any]:
    """One random edit: something is gone, one off, another value, or what stands elsewhere in the file."""
    out = copy.deepcopy(stored)

    def at(path: tuple[Any, ...]) -> Any:
        return functools.reduce(lambda held, key: held[key], path, out)

    path = draw.choice(everywhere)
    holder, old, kind = at(path[:-1]), at(path), draw.randrange(4)
    if kind == 0:
        holder.pop(path[-1])
    elif kind == 1 and type(old) is int:
        holder[path[-1]] = old + draw.choice((-1, 1, 2))
    else:
        holder[path[-1]] = copy.deepcopy(at(draw.choice(everywhere))) if kind == 2 else draw.choice(VALUES)
    return out


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for v in (output.values() if isinstance(output, dict) else output) for t in tensors(v)]


def read(plan: PruningPlan) -> None:
    """All that a user may look at, and edit."""
    assert str(plan)
    assert repr(plan)
    assert plan.before.macs >= plan.after.macs
    assert plan.widths.keys() == {g.name for g in plan.structure.prunable}
    assert plan.layer_widths
    for group in plan.structure.groups:
        plan.why(group.name)
    plan.keep(plan.structure.groups[0].name).diff(plan)


@pytest.mark.parametrize("name", ["residual", "gated", "dense", "grouped", "flatten", "instance norm, bare"])
def test_any_single_edit_is_refused_or_harmless(name: str) -> None:
    case, stored = BY_NAME[name], stored_of(name)
    model, inputs = case.model().double(), case.inputs(torch.float64)
    everywhere, draw = places(stored), random.Random(0)
    counts = {"refused": 0, "applied": 0}
    for _ in range(200):
        text = json.dumps(changed(stored, everywhere, draw))
        try:
            plan = PruningPlan.from_json(json.loads(text))
        except errors.FileFormatError:
            counts["refused"] += 1
            continue
        read(plan)
        with torch.no_grad():
            for a, b in zip(tensors(plan.apply(model)(*inputs)), tensors(plan.mask(model)(*inputs)), strict=True):
                assert float((a - b).abs().max()) <= 1e-10 * max(1e-12, float(b.abs().max())), text
        counts["applied"] += 1
    assert min(counts.values()) > 0


@pytest.mark.parametrize("name", ["residual", "gated", "dense", "prelu per channel"])
def test_edits_that_were_sealed_again_raise_no_other_errors(name: str) -> None:
    """Not by accident: shapes, costs and groups still have to agree with each other, and with the network."""
    stored, model = stored_of(name), BY_NAME[name].model()
    everywhere, draw = places(stored), random.Random(1)
    for _ in range(200):
        found = changed(stored, everywhere, draw)
        if {"structure", "costs", "seal"} <= found.keys():
            found["seal"] = seal(found["structure"], found["costs"])
        try:
            plan = PruningPlan.from_json(json.loads(json.dumps(found)))
        except errors.FileFormatError:
            continue
        read(plan)
        try:
            plan.apply(model)
        except errors.MismatchError:
            continue


@pytest.mark.parametrize("name", [c.name for c in NETWORKS])
def test_every_plan_that_we_write_is_read(name: str) -> None:
    """Also of what a cut leaves, and with groups that are protected because the graph got them wrong."""
    plan = whole(name)
    assert PruningPlan.from_json(stored_of(name)).removed == plan.removed
    left = remaining_table(plan.table, plan.removed)
    rest = PruningPlan(left.structure, left, {})
    assert PruningPlan.from_json(json.loads(json.dumps(rest.to_json()))) == rest
    rest.check(plan.apply(BY_NAME[name].model()))


def _member(stored: dict[str, Any], k: int = 0) -> Any:
    return stored["structure"][0]["members"][k]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: _member(s)["index"].update(start=-1), "start"),
        (lambda s: _member(s)["index"].update(start=1), "without its 8 channels"),
        (lambda s: _member(s, 1)["index"].update(start=1), "which has 8"),
        (lambda s: _member(s)["index"].update(run=0), "without entries"),
        (lambda s: _member(s)["index"].update(run=-1), "run"),
        (lambda s: _member(s).update(axis="x"), "an axis 'x'"),
        (lambda s: _member(s).update(layer="nowhere"), "without its 8 channels"),
        (lambda s: _member(s, 1).update(layer="nowhere"), "in no group"),
        (lambda s: s["structure"][0]["members"].append(_member(s, 1)), "twice in group '0'"),
        (lambda s: s["structure"].append(s["structure"][0]), "two groups '0'"),
        (lambda s: s["structure"][0].update(units=[[0, 1], [1], *([j] for j in range(2, 8))]), "twice"),
        (lambda s: s["structure"][0].update(units=[[0, 1], []]), "an empty unit"),
        (lambda s: s["structure"][0].update(protected=None), "no text"),
        (lambda s: s["structure"][0].update(width=True), "a width True"),
        (lambda s: s["costs"]["tensors"]["0.weight"][3][0].__setitem__(2, 0), "parts"),
        (lambda s: s["costs"]["tensors"]["0.weight"][3].pop(), "shorter"),
        (lambda s: s["costs"]["tensors"]["0.weight"][0].__setitem__(0, 9), "several widths of '0'"),
        (lambda s: s["costs"]["layers"]["0"].__setitem__(0, "no.weight"), "that is not there"),
        (lambda s: s["costs"]["layers"]["0"].__setitem__(2, 7), "7 filters of '0'"),
        (lambda s: s["costs"].update(other_macs=-1), "other MACs"),
        (lambda s: s["removed"].update(nothing=[1]), "there is no group 'nothing'"),
        (lambda s: s["removed"].update({"0": [8]}), "has no such channel"),
        (lambda s: s["scores"].update(nothing=[1.0]), "there is no group 'nothing'"),
        (lambda s: s["unscored"].update(x=3), "no text"),
        (lambda s: s["settings"].update(edits=5), "'edits'"),
        (lambda s: s["settings"]["file_bytes"].update(after="many"), "file_bytes 'many'"),
    ],
)
def test_the_reason_is_told_even_if_it_was_sealed_again(edit: Edit, words: str) -> None:
    stored = stored_of("plain")
    edit(stored)
    stored["seal"] = seal(stored["structure"], stored["costs"])
    with pytest.raises(errors.FileFormatError) as raised:
        PruningPlan.from_json(stored)
    assert words in str(raised.value)


def test_a_shift_that_fits_every_shape_is_seen() -> None:
    """Without its pixels in order, the head would read other channels: nothing but the seal knows."""
    stored = stored_of("flatten")
    index = next(m["index"] for g in stored["structure"] for m in g["members"] if dict(m["index"]).get("run", 1) > 1)
    index["run"] -= 1
    with pytest.raises(errors.FileFormatError, match="changed by hand"):
        PruningPlan.from_json(stored)


def test_layers_without_tensors_are_checked_when_it_is_applied() -> None:
    stored = stored_of("instance norm, bare")
    held = {name.rpartition(".")[0] for name in whole("instance norm, bare").table.shapes()}
    member = next(m for m in stored["structure"][0]["members"] if m["layer"] not in held)
    for other in ("nowhere", ""):
        member["layer"] = other
        stored["seal"] = seal(stored["structure"], stored["costs"])
        plan, model = PruningPlan.from_json(stored), BY_NAME["instance norm, bare"].model()
        for use in (plan.check, plan.apply, plan.mask):
            with pytest.raises(errors.MismatchError):
                use(model)


# -- memory -----------------------------------------------------------------
def hostile(width: int, members: int, same: bool) -> dict[str, Any]:
    """A group of a layer with that many readers, in a few hundred bytes each."""
    index = {"start": 0, "run": 1, "count": width}
    root = {"layer": "0", "axis": "out", "type": "Linear", "index": index}
    readers = [
        {"layer": "1" if same else f"{k}", "axis": "in", "type": "Linear", "index": index}
        for k in range(1, members)
    ]  # fmt: skip
    group = {"name": "0", "width": width, "units": None, "members": [root, *readers], "protected": ""}
    tensors: dict[str, Any] = {"0.weight": [[width, 1], 4, True, [["0", "out", 1], ["0", "in", 1]]]}
    for reader in readers:
        name = str(reader["layer"])
        tensors[f"{name}.weight"] = [[1, width], 4, True, [[name, "out", 1], [name, "in", 1]]]
    for name in {str(reader["layer"]) for reader in readers}:
        del tensors[f"{name}.weight"][3][0]
        tensors[f"{name}.weight"][3].insert(0, None)
    costs = {"tensors": tensors, "layers": {}, "other_macs": 0}
    rest: dict[str, Any] = {"removed": {}, "scores": {}, "unscored": {}, "settings": {}}
    found = {"format": PruningPlan.FORMAT, "version": 1, "structure": [group], "costs": costs, **rest}
    return {**found, "seal": seal([group], costs)}


def peak(work: Callable[[], Any], error: type[Exception], words: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(error, match=words):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("width", "members", "same", "words"), [(2**24, 8, False, "entries"), (2**16, 6000, True, "twice")]
)
def test_small_files_do_not_fill_the_memory(width: int, members: int, same: bool, words: str, tmp_path: Path) -> None:
    stored = hostile(width, members, same)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(stored))
    size = path.stat().st_size
    assert peak(lambda: PruningPlan.load(path), errors.FileFormatError, words) < 2**20 + 40 * size
    net = nn.Linear(1, width if width < 2**20 else 8)
    plan = base64.b85encode(zlib.compress(path.read_bytes())).decode()
    write_tensors(tmp_path / "net", KIND, net.state_dict(), {"plan": plan, "tied": {}, "frozen": []})
    own = 8 * net.weight.numel()
    wrong, why = (errors.FileFormatError, words) if width < 2**20 else (errors.MismatchError, "channels somewhere")
    assert peak(lambda: load(tmp_path / "net", lambda: net), wrong, why) < 2**21 + 40 * size + own


def test_a_plan_of_the_same_form_is_read() -> None:
    """The hostile ones are refused for their numbers."""
    assert PruningPlan.from_json(hostile(8, 8, False)).before.channels == 8
