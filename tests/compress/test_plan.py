"""Plans: what they say, how they are changed, kept and used again."""

from __future__ import annotations

import copy
import json
import math
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import BY_NAME, NETWORKS, hard, mlp, plain, structure_of
from torch import Tensor, nn

import compress
from compress.costs import CostTable, count
from compress.groups import find_groups
from compress.plan import PruningPlan
from lrp import errors

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plan_for(name: str, removed: dict[str, Any], **more: Any) -> PruningPlan:
    case, structure = BY_NAME[name], structure_of(name)
    return PruningPlan(structure, CostTable.of(case.model(), case.inputs(), structure), removed, **more)


def halves(name: str) -> PruningPlan:
    """Every second piece goes."""
    structure = structure_of(name)
    return plan_for(name, {g.name: [j for u in g.units[1::2] for j in u] for g in structure.prunable})


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for v in (output.values() if isinstance(output, dict) else output) for t in tensors(v)]


# -- using ------------------------------------------------------------------
@pytest.mark.parametrize("name", [c.name for c in NETWORKS if c.free])
def test_apply_equals_mask(name: str) -> None:
    case = BY_NAME[name]
    plan = halves(name)
    model, inputs = case.model().double(), case.inputs(torch.float64)
    with torch.no_grad():
        small, masked = plan.apply(model)(*inputs), plan.mask(model)(*inputs)
    for a, b in zip(tensors(small), tensors(masked), strict=True):
        assert float((a - b).abs().max()) <= 1e-10 * max(1e-12, float(b.abs().max()))


def test_costs_and_widths_are_those_of_the_network() -> None:
    plan = plan_for("residual", {"stem": (0, 1), "conv1": (5,), "conv3": ()})
    model = BY_NAME["residual"].model()
    assert plan.before == count(model, BY_NAME["residual"].inputs(), plan.structure)
    small = plan.apply(model)
    after = count(small, BY_NAME["residual"].inputs())
    assert (plan.after.macs, plan.after.params, plan.after.bytes, plan.after.filters) == (
        after.macs, after.params, after.bytes, after.filters,
    )  # fmt: skip
    assert plan.widths == {"stem": (8, 6), "conv1": (6, 5), "conv3": (10, 10)}
    assert plan.layer_widths == {
        "stem": (8, 6), "conv1": (6, 5), "conv2": (8, 6), "conv3": (10, 10), "down": (10, 10), "fc": (4, 4),
    }  # fmt: skip
    assert plan.removed == {"stem": (0, 1), "conv1": (5,)}


def test_a_plan_for_another_network_is_refused() -> None:
    plan = halves("plain")
    with pytest.raises(errors.MismatchError, match="another network"):
        plan.apply(mlp())
    with pytest.raises(errors.MismatchError, match="another network"):
        plan.mask(BY_NAME["residual"].model())
    small = plan.apply(BY_NAME["plain"].model())
    with pytest.raises(errors.MismatchError, match="before any pruning"):
        plan.apply(small)
    plan.check(BY_NAME["plain"].model())


def test_the_pruned_network_trains_and_copies() -> None:
    plan = halves("plain")
    small = plan.apply(BY_NAME["plain"].model())
    assert not hasattr(BY_NAME["plain"].model(), "_pruning_plan")
    again = copy.deepcopy(small)
    torch.testing.assert_close(again(X), small(X))
    assert sum(p.numel() for p in small.parameters()) == plan.after.params
    assert "_pruning_plan" not in small.state_dict()


# -- what can not be asked --------------------------------------------------
@pytest.mark.parametrize(
    ("removed", "error", "words"),
    [
        ({"0": (8,)}, errors.InputError, "'0' has no such channel"),
        ({"0": (-1,)}, errors.InputError, "'0' has no such channel"),
        ({"0": range(8)}, errors.StructureError, "all channels of '0'"),
        ({"8": (1,)}, errors.StructureError, "nothing can be removed from '8'"),
        ({"1": (1,)}, errors.InputError, "no group '1'"),
    ],
)
def test_what_can_not_go(removed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        plan_for("plain", removed)


def test_a_part_of_a_piece_can_not_go() -> None:
    """Tied channels go together: half a gated pair would cut two layers to different widths."""
    with pytest.raises((errors.InputError, errors.StructureError), match="conv"):
        plan_for("gated", {"conv": (3,)})


# -- reading ----------------------------------------------------------------
def test_printing_shows_every_layer_asked_and_reached() -> None:
    """Trap 18: cuts per layer; trap 2: what was asked beside what was reached."""
    scores = {"0": tuple(range(8)), "3": tuple(range(10, 22))}
    plan = plan_for(
        "plain", {"0": (0, 1, 2)}, scores=scores, settings={"target": {"channels": 17}, "ranking": {"scope": "global"}}
    )
    text = str(plan)
    assert re.search(r"^0 +8 +5 +1 +0 to 2 +3 to 7$", text, re.M)
    assert re.search(r"^3 +12 +12 +1 +- +10 to 21$", text, re.M)
    assert re.search(r"^8 +4 +4 +1 +- +its channels are the network's output$", text, re.M)
    assert "prunable channels: 20 -> 17 (85.0% stay)" in text
    assert "filters: 24 -> 21 (87.5% stay)" in text
    assert 'target: {"channels": 17}' in text
    assert "3 of 20 channels go" in repr(plan)


def test_why_lists_the_least_important_first() -> None:
    plan = plan_for("plain", {"0": (2, 5)}, scores={"0": (3.0, 4.0, -1.0, 9.0, 8.0, 0.0, 7.0, 6.0)})
    rows = plan.why("0")
    assert rows[:3] == [(2, -1.0, "goes"), (5, 0.0, "goes"), (0, 3.0, "stays")]
    assert plan.why("3")[0] == (0, None, "stays")


# -- changing ---------------------------------------------------------------
def test_channels_can_be_kept_and_cut_by_hand() -> None:
    plan = plan_for("plain", {"0": (1, 2), "3": (5,)}, settings={"samples": 3})
    assert plan.keep("0", [2]).removed == {"0": (1,), "3": (5,)}
    assert plan.keep("0").removed == {"3": (5,)}
    assert plan.cut("3", [0]).removed == {"0": (1, 2), "3": (0, 5)}
    assert plan.removed == {"0": (1, 2), "3": (5,)}, "the plan itself does not change"
    edited = plan.cut("3", [0]).keep("0")
    assert edited.settings["edits"] == ["3: cut by hand", "0: kept by hand"]
    assert edited.settings["samples"] == 3
    with pytest.raises(errors.StructureError):
        plan.cut("0", range(8))
    with pytest.raises(errors.InputError):
        plan.cut("0", [99])


def test_hands_cut_and_keep_whole_pieces() -> None:
    plan = plan_for("gated", {})
    assert plan.cut("conv", [3]).removed == {"conv": (3, 11)}
    assert plan.cut("conv", [3, 12]).keep("conv", [11]).removed == {"conv": (4, 12)}


def test_differences() -> None:
    one, two = plan_for("plain", {"0": (1, 2)}), plan_for("plain", {"0": (2, 3, 4), "3": (0,)})
    text = one.diff(two)
    assert "0: 6 -> 5 channels, removed +[3, 4] -[1]" in text
    assert "3: 12 -> 11 channels, removed +[0]" in text
    assert f"MACs {one.after.macs:,} -> {two.after.macs:,}" in text
    assert one.diff(one) == ""
    with pytest.raises(errors.MismatchError):
        one.diff(halves("residual"))


# -- two steps --------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["plain", "residual", "gated", "flatten", "grouped", "dense", "depthwise", "unflatten"]
)
def test_two_steps_are_one_plan(name: str) -> None:
    case = BY_NAME[name]
    model, inputs = case.model().double(), case.inputs(torch.float64)
    structure = structure_of(name)
    first = plan_for(name, {g.name: g.units[0] for g in structure.prunable if len(g.units) > 2})
    once = first.apply(model)
    found = find_groups(once, inputs)
    second = PruningPlan(
        found, CostTable.of(once, inputs, found), {g.name: g.units[-1] for g in found.prunable if len(g.units) > 1}
    )
    twice = second.apply(once)
    both = first.then(second)
    direct = both.apply(model)
    state = twice.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in direct.state_dict().items())
    assert both.before.macs == first.before.macs
    assert both.after.macs == second.after.macs
    assert len(both.settings["steps"]) == 2
    carried = twice._pruning_plan  # what save writes
    assert carried.removed == both.removed
    assert all(torch.equal(t, state[n]) for n, t in carried.apply(model).state_dict().items())


def test_three_steps_keep_three_settings() -> None:
    model = hard(plain())
    for k in range(3):
        structure = find_groups(model, X)
        table = CostTable.of(model, X, structure)
        model = PruningPlan(structure, table, {"0": (0,)}, settings={"step": k}).apply(model)
    plan = model._pruning_plan
    assert [s["step"] for s in plan.settings["steps"]] == [0, 1, 2]
    assert plan.removed == {"0": (0, 1, 2)}


def test_what_hands_changed_is_told_of_all_steps() -> None:
    model = hard(plain())
    first = plan_for("plain", {"0": (0,)}).cut("0", [1])
    later = compress.plan_pruning(
        first.apply(model), X, criterion="weight", target=compress.Target(channels=1.0), round_to=1
    )
    assert first.then(later).settings["edits"] == ["0: cut by hand"]
    assert first.then(later.cut("0", [0])).settings["edits"] == ["0: cut by hand", "0: cut by hand"]
    assert "edits" in str(first.then(later))
    assert "edits" not in later.settings


def test_a_later_plan_for_another_network_is_refused() -> None:
    first, other = plan_for("plain", {"0": (0,)}), plan_for("plain", {"0": (1,)})
    with pytest.raises(errors.MismatchError, match="not for the network"):
        first.then(other)
    with pytest.raises(errors.MismatchError):
        first.then(halves("residual"))
    with pytest.raises(errors.MismatchError):
        first.then(plan_for("plain", {"3": (1,)}))  # '0' is one narrower by now


# -- keeping ----------------------------------------------------------------
@pytest.mark.parametrize("name", [c.name for c in NETWORKS if c.free])
def test_plans_travel_as_json(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    plan = halves(name)
    group, (width, _) = next(iter(plan.widths.items()))
    own = tuple([0.5, 1e-300][j % 2] for j in range(width))
    plan = PruningPlan(plan.structure, plan.table, plan.removed, {group: own}, {"x": "why"}, {"seed": 3})
    for again in (
        PruningPlan.from_json(json.loads(json.dumps(plan.to_json()))),
        _through(plan, tmp_path / "plan.json"),
    ):
        assert again.to_json() == plan.to_json()
        assert again == plan
        assert (again.removed, again.scores, again.unscored, again.settings) == (
            plan.removed, plan.scores, plan.unscored, plan.settings,
        )  # fmt: skip
        assert (again.before, again.after, again.widths) == (plan.before, plan.after, plan.widths)
        state = plan.apply(case.model()).state_dict()
        assert all(torch.equal(t, state[n]) for n, t in again.apply(case.model()).state_dict().items())
    assert plan.to_json(scores=False)["scores"] == {}


def _through(plan: PruningPlan, path: Path) -> PruningPlan:
    plan.save(path)
    return PruningPlan.load(path)


def test_a_plan_is_for_a_fresh_model_and_its_weights_follow() -> None:
    """The history of torch-pruning, without pickle: shapes from the plan, numbers from an ordinary state."""
    trained = BY_NAME["residual"].model()
    plan = halves("residual")
    small = plan.apply(trained)
    fresh = plan.apply(BY_NAME["residual"].build())
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(fresh.eval()(X), small(X), rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["no json", "empty", "list", "format", "version", "removed", "structure", "channel"])
def test_damaged_files_are_refused_with_one_error(damage: str, tmp_path: Path) -> None:
    stored = halves("plain").to_json()
    path = tmp_path / "plan.json"
    text = json.dumps(stored)
    if damage == "no json":
        text = text[: len(text) // 2]
    elif damage == "empty":
        text = ""
    elif damage == "list":
        text = "[1, 2]"
    elif damage == "format":
        text = json.dumps({**stored, "format": "something"})
    elif damage == "version":
        text = json.dumps({**stored, "version": 99})
    elif damage == "removed":
        text = json.dumps({**stored, "removed": {"0": ["x"]}})
    elif damage == "structure":
        text = json.dumps({k: v for k, v in stored.items() if k != "structure"})
    elif damage == "channel":
        text = json.dumps({**stored, "removed": {"0": [800]}})
    path.write_text(text)
    with pytest.raises(errors.LRPError):
        PruningPlan.load(path)


def test_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError):
        PruningPlan.load("/nowhere/plan.json")


def test_saving_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    halves("plain").save(path)
    before = path.read_bytes()
    broken = plan_for("plain", {"0": (1,)}, settings={"bad": object()})
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_can_not_be_changed_in_passing() -> None:
    plan = halves("plain")
    with pytest.raises((AttributeError, TypeError)):
        plan.removed = {}  # type: ignore[misc]
    channels = [1, 2]
    own = plan_for("plain", {"0": channels})
    channels.append(3)
    assert own.removed == {"0": (1, 2)}


def test_layers_of_other_modules_are_not_plans() -> None:
    assert not hasattr(nn.Linear(2, 2), "_pruning_plan")
    with pytest.raises(errors.FileFormatError, match="no PruningPlan"):
        PruningPlan.from_json({"format": "lrp.RelevanceSum"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored["structure"][0].update(width=10**11),
        lambda stored: stored["structure"][0]["members"][0].update(index={"start": 0, "run": 1, "count": 10**11}),
        lambda stored: stored["structure"][0]["members"][0].update(index={"start": 0, "run": 10**11, "count": 2}),
        lambda stored: stored["structure"][0].update(width=-1),
        lambda stored: stored["scores"].update({"0": [math.nan] * 8}),
        lambda stored: stored["scores"].update({"0": [1.0] * 3}),
        lambda stored: stored["removed"].update({"0": [1.5]}),
        lambda stored: stored["structure"][0].update(width=8.0),
        lambda stored: stored["structure"][0].update(units=[[0.5], *([j] for j in range(1, 8))]),
        lambda stored: stored["structure"][0].update(members=[]),
        lambda stored: stored["structure"][0]["members"][0].update(index=[[0], [1]]),
        lambda stored: stored["structure"][0]["members"][0].update(index=[[float(j)] for j in range(8)]),
    ],
)
def test_hostile_numbers_are_refused_before_anything_is_made_of_them(damage: Callable[[dict[str, Any]], None]) -> None:
    """A file of a few bytes can state any width; ranges of it would fill the memory."""
    stored = halves("plain").to_json()
    damage(stored)
    with pytest.raises(errors.FileFormatError):
        PruningPlan.from_json(stored)


def test_a_full_disk_leaves_the_plan_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = halves("plain")
    plan.save(path)
    kept = path.read_bytes()
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        with pytest.raises(errors.DataError, match="can not be written"):
            plan.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
