"""Groups: which channels go together, told by hand for networks of every kind."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from networks import (
    BY_NAME,
    NETWORKS,
    Case,
    Embedded,
    Expression,
    Frozen,
    conv,
    hard,
    mlp,
    normed_after_flip,
    padded,
    plain,
    shuffle,
    structure_of,
)
from torch import Tensor, nn

from compress.groups import Group, Member, Structure, find_groups, is_weighted
from lrp import errors

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def parametrised(cases: list[Case] = NETWORKS) -> Any:
    return pytest.mark.parametrize("name", [case.name for case in cases])


# -- what can be cut, and what can not --------------------------------------
@parametrised()
def test_channels_that_can_go_are_those_a_person_names(name: str) -> None:
    case, structure = BY_NAME[name], structure_of(name)
    found = {g.name: (g.width, len(g.units)) for g in structure.prunable}
    assert {n: found.get(n) for n in case.free} == dict(case.free), str(structure)


@parametrised([case for case in NETWORKS if case.stays])
def test_channels_that_must_stay_are_protected_and_say_why(name: str) -> None:
    case, structure = BY_NAME[name], structure_of(name)
    for layer, why in case.stays.items():
        holders = [g for g in structure.groups if layer in g.producers]
        assert holders, f"'{layer}' is in no group"
        for g in holders:
            assert g.protected, f"'{layer}' can be cut"
            assert why in g.protected
            assert g not in structure.prunable


@parametrised()
def test_every_layer_of_the_graph_belongs_to_one_group(name: str) -> None:
    model, structure = BY_NAME[name].model(), structure_of(name)
    held = [layer for g in structure.groups for layer in set(g.producers)]
    weighted = [n for n, m in model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    inner = {n for n in weighted if n.startswith("mha.")}  # a module of attention is one layer
    assert set(weighted) - inner <= set(held)


@parametrised()
def test_units_are_a_partition_and_members_cover_the_group(name: str) -> None:
    model = BY_NAME[name].model()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for g in structure_of(name).groups:
        assert sorted(j for unit in g.units for j in unit) == list(range(g.width))
        assert all(list(unit) == sorted(unit) and unit for unit in g.units)
        assert [u[0] for u in g.units] == sorted(u[0] for u in g.units)
        root = next(m for m in g.members if m.layer == g.name and m.axis == "out")
        assert all(root.of(unit) == list(unit) for unit in g.units), "channel j of a group is output j of its root"
        for m in g.members:
            assert len(m.index) == g.width
            where = parameters[m.layer] if m.axis == "parameter" else modules[m.layer]
            assert m.type in {c.__name__ for c in type(where).__mro__ if c.__module__.startswith("torch.nn")}
            entries = [i for own in m.index for i in own]
            assert len(entries) == len(set(entries)), f"an entry of '{m.layer}' counts for two channels"


@parametrised()
def test_finding_groups_leaves_the_model_as_it_is(name: str) -> None:
    model = BY_NAME[name].model()
    model.train()
    frozen = [p for k, p in enumerate(model.parameters()) if k % 2]
    for p in frozen:
        p.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    kept = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    find_groups(model, BY_NAME[name].inputs())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == kept
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for n, m in model.named_modules() if "parametri" not in n)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(p.grad is None for p in model.parameters())


@parametrised()
def test_what_can_be_cut_comes_in_two_pieces_at_least(name: str) -> None:
    """Channels that are all tied to each other can not go, and do not count as prunable."""
    assert all(len(g.units) > 1 for g in structure_of(name).prunable), str(structure_of(name))


# -- members, by hand -------------------------------------------------------
def members(structure: Structure, group: str) -> dict[tuple[str, str], tuple[tuple[int, ...], ...]]:
    return {(m.layer, m.axis): m.index for m in structure[group].members}


def test_members_of_a_chain() -> None:
    found = members(structure_of("plain"), "3")
    own = tuple((j,) for j in range(12))
    assert found == {("3", "out"): own, ("4", "out"): own, ("8", "in"): own}


def test_a_flattened_map_is_read_by_its_pixels() -> None:
    found = members(structure_of("flatten"), "0")
    assert found["4", "in"] == tuple(tuple(range(16 * j, 16 * j + 16)) for j in range(6))


def test_a_residual_stream_is_one_group() -> None:
    structure = structure_of("residual")
    assert structure["stem"].producers == ("stem", "conv2")
    assert structure["conv3"].producers == ("conv3", "down")
    assert {(m.layer, m.axis) for m in structure["stem"].members} == {
        ("stem", "out"), ("bn0", "out"), ("conv1", "in"), ("conv2", "out"), ("bn2", "out"), ("conv3", "in"),
        ("down", "in"),
    }  # fmt: skip


def test_concatenated_channels_are_read_behind_an_offset() -> None:
    found = members(structure_of("dense"), "conv1")
    assert found["bn2", "out"] == tuple((j,) for j in range(8, 12))
    assert found["conv2", "in"] == tuple((j,) for j in range(8, 12))
    assert found["fc", "in"] == tuple((j,) for j in range(8, 12))
    assert members(structure_of("dense"), "conv2")["fc", "in"] == tuple((j,) for j in range(12, 16))


def test_grouped_convolutions_lose_one_place_from_every_part() -> None:
    structure = structure_of("grouped")
    assert structure["0"].units == tuple((j, j + 3, j + 6, j + 9) for j in range(3))
    assert structure["2"].units == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_a_depthwise_convolution_goes_with_its_input() -> None:
    structure = structure_of("depthwise")
    assert structure["0"].producers == ("0", "3")
    assert all(len(unit) == 1 for unit in structure["0"].units)


@pytest.mark.parametrize(("name", "group"), [("gated", "conv"), ("gated, linear", "up")])
def test_gate_and_value_go_together(name: str, group: str) -> None:
    assert structure_of(name)[group].units == tuple((j, j + 8) for j in range(8))


def test_one_encoder_on_two_inputs_is_read_twice() -> None:
    assert members(structure_of("called on two inputs"), "stem")["fc", "in"] == tuple((j, j + 6) for j in range(6))


def test_a_layer_on_its_own_output_has_one_axis() -> None:
    found = members(structure_of("called twice"), "stem")
    assert {("stem", "out"), ("mix", "in"), ("mix", "out"), ("fc", "in")} == set(found)


@pytest.mark.parametrize("name", ["layer scale", "added parameter"])
def test_bare_parameters_go_with_their_channels(name: str) -> None:
    found = members(structure_of(name), "0")
    assert found["1.gamma", "parameter"] == tuple((j,) for j in range(8))


def test_units_of_a_decoder_are_the_pixels_of_one_channel() -> None:
    assert structure_of("unflatten")["fc"].units == tuple(tuple(range(4 * j, 4 * j + 4)) for j in range(8))


# -- trap 3: frozen parameters ----------------------------------------------
@pytest.mark.parametrize("share", ["none", "prefix", "all"])
def test_frozen_parameters_change_nothing(share: str) -> None:
    case = BY_NAME["residual"]
    model = case.model()
    names = [n for n, _ in model.named_parameters()]
    frozen = {"none": [], "prefix": names[: len(names) // 2], "all": names}[share]
    for n, p in model.named_parameters():
        p.requires_grad_(n not in frozen)
    assert find_groups(model, case.inputs()) == structure_of("residual")


def test_layers_that_autograd_does_not_see_are_not_passed_over_in_silence() -> None:
    """Features under no_grad stay, and the structure says so."""
    structure = find_groups(hard(Frozen()), X)
    held = {layer: g for g in structure.groups for layer in g.producers}
    assert {"features.0", "features.2"} <= set(held), str(structure)
    assert all(held[layer].protected for layer in ("features.0", "features.2"))
    assert [g.name for g in structure.prunable] == ["hidden"]


def test_training_mode_dropout_and_data_type_do_not_matter() -> None:
    case = BY_NAME["dropout"]
    expected = structure_of("dropout")
    model = case.model().train()
    assert find_groups(model, case.inputs()) == expected
    assert find_groups(case.model().double(), case.inputs(torch.float64)) == expected
    assert find_groups(case.model().bfloat16(), case.inputs(torch.bfloat16)) == expected


def test_two_graphs_share_nothing() -> None:
    """Trap 13: default arguments of the graph grow, so a second model would hold the first one's parameters."""
    case = BY_NAME["layer scale"]
    first = find_groups(case.model(), case.inputs())
    for _ in range(2):
        assert find_groups(case.model(), case.inputs()) == first
    found = find_groups(mlp(), torch.randn(2, 5))
    assert {m.layer for g in found.groups for m in g.members} == {"0", "2", "4"}


# -- trap 10: the output stays ----------------------------------------------
@pytest.mark.parametrize("name", [c.name for c in NETWORKS if c.name not in ("two inputs",)])
def test_no_group_reaches_the_output(name: str) -> None:
    """The output keeps its shape when one piece of every group goes."""
    from compress.cutting import cut

    case, structure = BY_NAME[name], structure_of(name)
    model = case.model()
    removed = {g.name: g.units[-1] for g in structure.prunable if len(g.units) > 1}
    with torch.no_grad():
        before, after = model(*case.inputs()), cut(model, structure, removed)(*case.inputs())
    assert shapes(before) == shapes(after)


def shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, dict):
        return {k: shapes(v) for k, v in output.items()}
    return [shapes(v) for v in output]


class Reshaped(nn.Module):
    """The classifier's output, changed in shape or scaled before it leaves."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = plain(), how

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return {
            "softmax": lambda: y.softmax(1), "view": lambda: y.view(-1, 2, 2), "one": lambda: y[:, :1],
            "chunks": lambda: y.chunk(2, 1), "list": lambda: [y, 2 * y], "log": lambda: {"out": y.log_softmax(1)},
        }[self.how]()  # fmt: skip


@pytest.mark.parametrize("how", ["softmax", "view", "one", "chunks", "list", "log"])
@pytest.mark.parametrize("prove", [True, False])
def test_the_classifier_is_never_cut(how: str, prove: bool) -> None:
    structure = find_groups(hard(Reshaped(how)), X, prove=prove)
    assert structure["body.8"].protected
    assert {g.name for g in structure.prunable} == {"body.0", "body.3"}


# -- the proof --------------------------------------------------------------
def flip(x: Tensor) -> Tensor:
    return x.flip(1)


def roll(x: Tensor) -> Tensor:
    return x.roll(3, 1)


def shuffle_by_two(x: Tensor) -> Tensor:
    return shuffle(x, 2)


def swap(x: Tensor) -> Tensor:
    return torch.cat([x[:, 3:4], x[:, 1:3], x[:, :1], x[:, 4:]], 1)


@pytest.mark.parametrize("width", [6, 8, 10, 12, 18, 24])
@pytest.mark.parametrize("change", [flip, roll, shuffle_by_two, swap])
def test_the_proof_finds_every_permutation(width: int, change: Any) -> None:
    """No pattern of removed channels that the permutation maps to itself lets it pass."""
    net = Expression(
        lambda m, x: m.fc(m.out(change(m.conv(x).relu())).relu().mean((2, 3))),
        conv=conv(3, width), out=conv(width, 5), fc=nn.Linear(5, 3),
    )  # fmt: skip
    structure = find_groups(hard(net), X)
    if not structure["conv"].protected:  # then it has to be right, channel by channel
        check_every_channel(net, structure, "conv", X)
    assert not structure["out"].protected


def check_every_channel(model: nn.Module, structure: Structure, group: str, x: Tensor) -> None:
    """Cut one piece after the other; what makes its channels is silenced by hand."""
    from compress.cutting import cut

    double = copy.deepcopy(model).double()
    for unit in structure[group].units:
        silent = copy.deepcopy(double)
        for m in structure[group].members:
            if m.axis == "out" and m.layer in structure[group].producers:
                silent.get_submodule(m.layer).register_forward_hook(silence(m.of(unit)))
        with torch.no_grad():
            got, expected = cut(double, structure, {group: unit})(x.double()), silent(x.double())
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def silence(channels: list[int]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, channels] = 0
        return output

    return hook


def test_an_allowed_norm_hides_no_wrong_group() -> None:
    """Of groups that a norm spans only the shape can be tested; of all others still the values."""
    x = X
    without = find_groups(hard(normed_after_flip()), x)
    assert without["body.conv"].protected
    assert "LayerNorm" in without["wide"].protected
    allowed = find_groups(hard(normed_after_flip()), x, allow="wide")
    assert not allowed["wide"].protected
    assert allowed["body.conv"].protected


def test_without_a_proof_the_graph_is_believed() -> None:
    case = BY_NAME["flipped, 8"]
    assert not find_groups(case.model(), case.inputs(), prove=False)["conv"].protected
    assert "not the same as masking" in structure_of("flipped, 8")["conv"].protected


def test_parts_of_a_group_and_layers_that_would_be_emptied() -> None:
    own = tuple((j,) for j in range(4))
    some = ((), (0,), (1,), ())
    members = (Member("a", "out", "Linear", own), Member("b", "out", "Linear", some), Member("c", "in", "Linear", own))
    group = Group("a", 4, own, members)
    assert group.parts == (frozenset({1, 2}),)
    assert [group.emptied(gone) for gone in ((), (1,), (0, 3), (1, 2), (0, 1, 2), range(4))] == [
        "", "", "", "b", "b", "a",
    ]  # fmt: skip
    assert Group("a", 4, own, members[::2]).parts == ()
    assert copy.deepcopy(group) == group == Group.from_json(group.to_json())


def test_channels_of_which_each_is_all_that_a_layer_has() -> None:
    """Two layers of two tied channels each, side by side: nothing can go."""

    def compute(m: Any, x: Tensor) -> Tensor:
        p, q = m.p(x), m.q(x)
        y = m.skip(x) + torch.cat([p, q], 1)
        return torch.cat([m.out(y), m.s(p), m.t(q)], 1).mean((2, 3))

    parts = {n: conv(2, 4, groups=2) for n in "st"}
    net = hard(Expression(compute, skip=conv(3, 4), p=conv(3, 2), q=conv(3, 2), out=conv(4, 2), **parts))
    for prove in (True, False):
        structure = find_groups(net, X, prove=prove)
        assert len(structure["skip"].units) == 2, str(structure)
        assert structure["skip"].protected == "each of its channels is all that a layer has"


def test_only_the_guilty_groups_are_protected() -> None:
    structure = find_groups(hard(padded()), X)
    assert [g.name for g in structure.prunable] == ["conv1"]
    assert structure["stem"].protected


@pytest.mark.parametrize(("width", "before", "after"), [(6, 3, 3), (9, 3, 6), (12, 6, 6), (8, 0, 4), (8, 4, 0)])
def test_padded_streams_are_protected_or_right(width: int, before: int, after: int) -> None:
    """Trap 21, at offsets that regular patterns of removed channels could miss."""
    model = hard(padded(width, before, after))
    structure = find_groups(model, X)
    assert bool(structure["stem"].protected) == (before > 0), "channels that keep their numbers can go"
    if not before:
        check_every_channel(model, structure, "stem", X)


@pytest.mark.parametrize("tokens", [3, 8, 20])
def test_embeddings_in_a_residual_stream(tokens: int) -> None:
    """An embedding has rows for tokens and columns for channels; few tokens break nothing."""
    from compress.cutting import cut, mask

    x = torch.randint(tokens, (2, 5))
    model = hard(Embedded(tokens)).double()
    structure = find_groups(model, x)
    assert not structure["up"].protected
    assert not structure["down"].protected, structure["down"].protected
    removed = {"down": (1, 6), "up": (0,)}
    small = cut(model, structure, removed)
    assert small.table.weight.shape == (tokens, 6)
    torch.testing.assert_close(small(x), mask(model, structure, removed)(x))


# -- options ----------------------------------------------------------------
def test_layers_can_be_protected_by_name_and_pattern() -> None:
    structure = find_groups(plain(), X, protect="3")
    assert [g.name for g in structure.prunable] == ["0"]
    assert "user" in structure["3"].protected
    residual = BY_NAME["residual"]
    by_partner = find_groups(residual.model(), residual.inputs(), protect=["conv[23]"])
    assert [g.name for g in by_partner.prunable] == ["conv1"]


def test_protecting_a_block_protects_its_layers() -> None:
    net = nn.Sequential(plain()[:6], plain()[6:])
    structure = find_groups(net, X, protect="0")
    assert [g.name for g in structure.prunable] == []
    assert all(g.protected for g in structure.groups)


@pytest.mark.parametrize("option", ["protect", "allow"])
def test_a_pattern_that_fits_nothing_is_refused(option: str) -> None:
    with pytest.raises(errors.InputError, match=re.escape("layer4.*")):
        find_groups(plain(), X, **{option: "layer4.*"})


def test_norms_that_span_channels_can_be_allowed() -> None:
    case = BY_NAME["layer norm"]
    structure = find_groups(case.model(), case.inputs(), allow="0")
    assert not structure["0"].protected
    group = find_groups(BY_NAME["group norm"].model(), case.inputs(), allow="*")["0"]
    assert group.units == tuple((j, j + 4, j + 8, j + 12) for j in range(4)), "one channel from each of the 4 parts"


def test_allow_does_not_open_what_is_protected_for_another_reason() -> None:
    case = BY_NAME["attention"]
    structure = find_groups(case.model(), case.inputs(), allow="*")
    assert structure["fc"].protected


# -- faults -----------------------------------------------------------------
def test_models_without_layers_and_wrong_inputs_are_refused() -> None:
    with pytest.raises(errors.StructureError, match="no convolution or linear layer"):
        find_groups(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), X)
    with pytest.raises(errors.StructureError, match="can not be traced"):
        find_groups(plain(), torch.randn(2, 4, 8, 8))
    for wrong in (None, (), [3], "x"):
        with pytest.raises(errors.InputError, match="example_inputs"):
            find_groups(plain(), wrong)  # type: ignore[arg-type]


def test_a_model_of_one_layer_has_nothing_to_cut() -> None:
    structure = find_groups(nn.Linear(5, 3), torch.randn(2, 5))
    assert structure.prunable == ()
    assert structure.layers == ()


def test_an_unknown_group_names_the_one_it_belongs_to() -> None:
    with pytest.raises(errors.InputError, match="'stem' is the group it belongs to"):
        structure_of("residual")["conv2"]
    with pytest.raises(errors.InputError, match="there is no group 'nothing'"):
        structure_of("residual")["nothing"]


# -- keeping ----------------------------------------------------------------
@parametrised()
def test_structures_travel_as_json(name: str) -> None:
    structure = structure_of(name)
    stored = json.loads(json.dumps(structure.to_json()))
    assert Structure.from_json(stored) == structure
    assert Structure.from_json(stored)[structure.groups[0].name] == structure.groups[0]


def test_structures_are_stored_in_little_space() -> None:
    """A flattened map of 16 pixels a channel takes no list of them."""
    stored = structure_of("flatten").to_json()
    reader = next(m for m in stored[0]["members"] if m["axis"] == "in")
    assert reader["index"] == {"start": 0, "run": 16, "count": 6}


def test_printing_shows_groups_and_reasons() -> None:
    text = str(structure_of("grouped"))
    assert re.search(r"^0 +12 +4s +1 +-$", text, re.M)
    assert "network's output" in text


def test_layers_to_score_are_the_producers_of_what_can_go() -> None:
    assert structure_of("residual").layers == ("stem", "conv2", "conv1", "conv3", "down")
    assert structure_of("attention").layers == ("up",)


@pytest.mark.parametrize(
    ("kind", "weighted"),
    [("Conv2d", True), ("ConvTranspose3d", True), ("Linear", True), ("BatchNorm2d", False), ("PReLU", False)],
)
def test_types_with_weights(kind: str, weighted: bool) -> None:
    assert is_weighted(kind) is weighted


@pytest.mark.parametrize("front", ["log", "sqrt"])
def test_a_front_that_wants_positive_input_is_proved_on_the_example(front: str) -> None:
    """Noise would give NaN, and NaN differs from everything."""

    class Front(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(getattr(torch, front)(x))

    structure = find_groups(hard(Front()), torch.rand(2, 3, 8, 8) + 0.1)
    assert [g.name for g in structure.prunable] == ["body.0", "body.3"]


def test_a_maximum_over_channels_is_seen() -> None:
    """A masked channel is 0, which can be the largest of all; a channel that is gone can not."""
    case = Expression(
        lambda m, x: m.fc((lambda y: torch.cat([y, y.amax(1, keepdim=True)], 1))(m.conv(x)).mean((2, 3))),
        conv=nn.Conv2d(3, 6, 3, padding=1), fc=nn.Linear(7, 3),
    )  # fmt: skip
    assert find_groups(hard(case), X)["conv"].protected


def test_inference_mode_changes_nothing() -> None:
    model = hard(plain())
    expected = find_groups(model, X)
    with torch.inference_mode():
        assert find_groups(model, X) == expected
