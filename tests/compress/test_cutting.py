"""Cutting against masking: two networks that have to be one, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BY_NAME, NETWORKS, Case, conv, hard, mlp, plain, structure_of
from torch import Tensor, nn
from torch.nn import functional as F

from compress.cutting import cut, mask, width_of
from compress.groups import Structure, find_groups
from lrp import errors

Removed = Mapping[str, Sequence[int]]


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for v in values for t in flat(v)]


def same(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    """Equal up to rounding, relative to the largest entry."""
    first, second = flat(a), flat(b)
    assert [t.shape for t in first] == [t.shape for t in second]
    for s, t in zip(first, second, strict=True):
        error, scale = float((s - t).abs().max()), float(t.abs().max())
        assert error <= tolerance * max(scale, 1e-12), f"outputs differ by {error} of {scale}"


def run(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        return model(*inputs)


def axis_of(module: nn.Module, t: Tensor) -> int:
    return -1 if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)) or t.dim() < 3 else 1


def poisoned(model: nn.Module, structure: Structure, removed: Removed) -> nn.Module:
    """A full-width copy, by hooks alone: removed channels become NaN where they are made, and 0 where they are read.

    A NaN in the output says that a channel goes where nobody looked.
    """
    out = copy.deepcopy(model)
    for name, channels in removed.items():
        for m in structure[name].members:
            if m.axis == "parameter":
                continue
            module, entries = out.get_submodule(m.layer), m.of(channels)
            if m.axis == "in":
                module.register_forward_pre_hook(reading(entries))
            elif m.layer in structure[name].producers and not is_both(structure, m.layer):
                module.register_forward_hook(making(entries))
    return out


def is_both(structure: Structure, layer: str) -> bool:
    """Whether a layer reads the channels that it makes itself; a NaN would not leave it."""
    return any({m.axis for m in g.members if m.layer == layer} == {"in", "out"} for g in structure.groups)


def making(entries: list[int]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(axis_of(module, output), torch.tensor(entries), float("nan"))

    return hook


def reading(entries: list[int]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        x = inputs[0]
        return (x.index_fill(axis_of(module, x), torch.tensor(entries), 0.0), *inputs[1:])

    return hook


def choices(structure: Structure, seed: int) -> dict[str, tuple[int, ...]]:
    """Some pieces of every group, never all."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for g in structure.prunable:
        count = int(torch.randint(0, len(g.units), (1,), generator=generator))
        order = torch.randperm(len(g.units), generator=generator)[:count].tolist()
        out[g.name] = tuple(sorted(j for k in order for j in g.units[k]))
    return {name: channels for name, channels in out.items() if channels}


# -- the network is the masked one ------------------------------------------
@pytest.mark.parametrize("name", [c.name for c in NETWORKS])
def test_cut_equals_mask_equals_hooks(name: str) -> None:
    case, structure = BY_NAME[name], structure_of(name)
    model, inputs = case.model().double(), case.inputs(torch.float64)
    full, changed = run(model, inputs), []
    for seed in range(4):
        removed = choices(structure, seed)
        small, masked = run(cut(model, structure, removed), inputs), run(mask(model, structure, removed), inputs)
        same(small, masked)
        same(small, run(poisoned(model, structure, removed), inputs))
        if removed:
            changed.append(any(not torch.equal(a, b) for a, b in zip(flat(small), flat(full), strict=True)))
    if changed and name not in ("saturated", "winner takes all"):
        assert any(changed), "the removed channels were not silent"


@pytest.mark.parametrize("name", [c.name for c in NETWORKS])
def test_every_piece_alone_and_all_but_one(name: str) -> None:
    case, structure = BY_NAME[name], structure_of(name)
    model, inputs = case.model().double(), case.inputs(torch.float64)
    for g in structure.prunable:
        for k in {0, len(g.units) // 2, len(g.units) - 1} if len(g.units) > 1 else ():
            others = tuple(sorted(j for i, unit in enumerate(g.units) if i != k for j in unit))
            for channels in (g.units[k], others):
                removed = {g.name: channels}
                same(run(cut(model, structure, removed), inputs), run(poisoned(model, structure, removed), inputs))


@pytest.mark.parametrize("name", [c.name for c in NETWORKS])
def test_mask_is_zero_where_channels_were_made(name: str) -> None:
    """And leaves the kept channels of every layer as they were."""
    case, structure = BY_NAME[name], structure_of(name)
    model = case.model()
    removed = choices(structure, 7)
    masked = mask(model, structure, removed)
    for g in removed:
        for m in structure[g].members:
            if m.axis != "out" or m.layer not in structure[g].producers:
                continue
            before, after = model.get_submodule(m.layer), masked.get_submodule(m.layer)
            gone = torch.tensor(m.of(removed[g]))
            kept = torch.tensor([i for i in range(before.weight.shape[axis(before)]) if i not in gone.tolist()])
            assert not after.weight.index_select(axis(after), gone).any()
            if before.bias is not None:
                assert not after.bias[gone].any()
                assert torch.equal(after.bias[kept], before.bias[kept])


def axis(module: Any) -> int:
    return 1 if getattr(module, "transposed", False) else 0


# -- by hand, without a structure -------------------------------------------
def zero(channels: Sequence[int], dim: int = 1) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(dim, torch.tensor(list(channels)), 0.0)

    return hook


@pytest.mark.parametrize(
    ("name", "group", "gone", "after"),
    [
        # where the channels are zero by hand: the last layer before anyone reads them, and the channels there
        ("plain", "0", (1, 4, 5), {"1": (1, 4, 5)}),
        ("plain", "3", (0, 11), {"4": (0, 11)}),
        ("residual", "stem", (2, 7), {"bn0": (2, 7), "bn2": (2, 7)}),
        ("residual", "conv1", (0, 3), {"bn1": (0, 3)}),
        ("residual", "conv3", (9,), {"bn4": (9,), "bn3": (9,)}),
        ("depthwise", "0", (0, 9), {"1": (0, 9), "4": (0, 9)}),
        ("grouped", "0", (1, 4, 7, 10), {"0": (1, 4, 7, 10)}),
        ("grouped", "2", (0, 2, 4, 6), {"3": (0, 2, 4, 6)}),
        ("gated", "conv", (3, 11), {"conv": (3, 11)}),
        ("dense", "stem", (5,), {"bn1": (5,), "bn2": (5,), "bn3": (5,)}),
        ("dense", "conv1", (0, 2), {"bn2": (8, 10), "bn3": (8, 10)}),
        ("dense", "conv2", (1,), {"bn3": (13,)}),
        ("flatten", "0", (2, 3), {"0": (2, 3)}),
        ("transposed", "2", (0, 5), {"3": (0, 5)}),
        ("squeeze and excite", "stem", (3, 4), {"bn": (3, 4)}),
        ("squeeze and excite", "squeeze", (2,), {"squeeze": (2,)}),
        ("layer scale", "0", (6,), {"1": (6,)}),
        ("two inputs", "conv", (1, 2), {"conv": (1, 2), "side": (1, 2)}),
        ("called on two inputs", "stem", (0,), {"stem": (0,)}),
        ("called twice", "stem", (4,), {"stem": (4,), "mix": (4,)}),
        ("three dimensions", "0", (7,), {"1": (7,)}),
        ("instance norm", "0", (3,), {"1": (3,)}),
        ("prelu per channel", "0", (2, 6), {"0": (2, 6)}),
        ("unflatten", "fc", (4, 5, 6, 7), {"fc": (4, 5, 6, 7)}),
        ("attention", "up", (0, 19), {"up": (0, 19)}),
    ],
)
def test_cut_equals_a_mask_by_hand(
    name: str, group: str, gone: tuple[int, ...], after: Mapping[str, tuple[int, ...]]
) -> None:
    case = BY_NAME[name]
    model, inputs = case.model().double(), case.inputs(torch.float64)
    masked = copy.deepcopy(model)
    for layer, channels in after.items():
        module = masked.get_submodule(layer)
        module.register_forward_hook(zero(channels, -1 if isinstance(module, nn.Linear) else 1))
    same(run(cut(model, structure_of(name), {group: gone}), inputs), run(masked, inputs))


def test_masking_the_convolution_alone_is_not_cutting() -> None:
    """Trap 17: batch norm turns a silent channel into a constant one."""
    case, structure = BY_NAME["plain"], structure_of("plain")
    model, inputs = case.model().double(), case.inputs(torch.float64)
    removed = {"0": (1, 4, 5)}
    small = run(cut(model, structure, removed), inputs)
    halves = {}
    for layer in ("0", "1"):
        half = copy.deepcopy(model)
        half.get_submodule(layer).register_forward_hook(zero(removed["0"]))
        halves[layer] = float((run(half, inputs) - small).abs().max())
    assert halves["0"] > 1e-2
    assert halves["1"] < 1e-12
    same(run(mask(model, structure, removed), inputs), small)


def test_the_kept_weights_of_a_norm_that_spans_keep_their_order() -> None:
    """Few of many entries: sets of integers do not come sorted."""
    net = hard(nn.Sequential(nn.Linear(5, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 3)))
    structure = find_groups(net, torch.randn(2, 5), allow="0")
    for kept in ([1, 8, 33, 40, 63], [8, 1], [*range(40, 64), 0, 32], [63, 31, 0, 32]):
        kept = sorted(kept)
        small = cut(net, structure, {"0": [j for j in range(64) if j not in kept]})
        for k, own in ((0, "weight"), (0, "bias"), (1, "weight"), (1, "bias")):
            assert torch.equal(getattr(small[k], own), getattr(net[k], own)[kept]), f"{k}.{own} keeping {kept}"
        assert torch.equal(small[3].weight, net[3].weight[:, kept])
        small(torch.randn(2, 5))


def test_a_group_norm_loses_one_channel_of_every_part() -> None:
    case = BY_NAME["group norm"]
    net = case.model()
    structure = find_groups(net, case.inputs(), allow="0")
    small = cut(net, structure, {"0": structure["0"].units[1]})
    assert (small[1].num_groups, small[1].num_channels) == (4, 12)
    kept = [j for j in range(16) if j % 4 != 1]
    assert torch.equal(small[1].weight, net[1].weight[kept])
    # the statistics of each part are those of the channels that are left
    x = case.inputs()[0]
    y = F.group_norm(net[0](x)[:, kept], 4, net[1].weight[kept], net[1].bias[kept]).relu()
    torch.testing.assert_close(small(x), net[4:](F.linear(y, net[3].weight[:, kept], net[3].bias)))


# -- what a copy keeps ------------------------------------------------------
def test_flags_types_and_hooks_survive() -> None:
    """Trap 12: cutting makes new parameters; the frozen ones stay frozen."""
    net = hard(plain()).train()
    net[1].eval()
    frozen = {"0.weight", "1.bias", "3.bias", "8.weight"}
    for n, p in net.named_parameters():
        p.requires_grad_(n not in frozen)
    small = cut(net, structure_of("plain"), {"0": (0, 1), "3": (5,)})
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == frozen
    assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in small.parameters())
    old = {id(p) for p in net.parameters()}
    assert not old & {id(p) for p in small.parameters()}
    pointers = {t.data_ptr() for t in net.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in small.state_dict().values()}, "nothing is shared with the model"
    assert small[0].out_channels == 6
    assert small[1].num_features == small[3].in_channels == 6
    assert small[3].out_channels == small[8].in_features == 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_data_type(dtype: torch.dtype) -> None:
    case, structure = BY_NAME["residual"], structure_of("residual")
    model = case.model().to(dtype)
    removed = {"stem": (1, 2), "conv1": (0,), "conv3": (3, 4, 5)}
    small = cut(model, structure, removed)
    assert {t.dtype for n, t in small.state_dict().items() if "tracked" not in n} == {dtype}
    inputs = case.inputs(dtype)
    torch.testing.assert_close(
        run(small, inputs),
        run(mask(model, structure, removed), inputs),
        rtol=3e-2,
        atol=3e-2 if dtype.itemsize == 2 else 1e-5,
    )


def test_the_model_is_not_touched() -> None:
    case, structure = BY_NAME["layer scale"], structure_of("layer scale")
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    identity = {n: id(p) for n, p in model.named_parameters()}
    for change in (cut, mask):
        change(model, structure, {"0": (1, 2), "3": (0,)})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {n: id(p) for n, p in model.named_parameters()} == identity


def test_the_cut_network_learns() -> None:
    """Gradients reach every parameter, and an optimiser made for the copy moves it, not the model."""
    case, structure = BY_NAME["residual"], structure_of("residual")
    model = case.model()
    small = cut(model, structure, {"stem": (1, 2), "conv1": (0,), "conv3": (3, 4, 5)}).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    F.cross_entropy(small(*case.inputs()), torch.tensor([0, 3])).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    moved = {n for n, p in small.named_parameters() if not torch.equal(p, before[n])}
    assert moved >= {n for n, _ in small.named_parameters() if n.endswith("weight")}
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


def test_a_cut_network_can_be_cut_again() -> None:
    case, structure = BY_NAME["residual"], structure_of("residual")
    model, inputs = case.model().double(), case.inputs(torch.float64)
    once = cut(model, structure, {"stem": (0, 3), "conv1": (1,)})
    again = cut(once, find_groups(once, inputs), {"stem": (1, 4), "conv3": (0,)})
    left = [j for j in range(8) if j not in (0, 3)]
    both = {"stem": (0, 3, left[1], left[4]), "conv1": (1,), "conv3": (0,)}
    same(run(again, inputs), run(cut(model, structure, both), inputs))
    assert all(torch.equal(t, cut(model, structure, both).state_dict()[n]) for n, t in again.state_dict().items())


def test_order_and_repetition_do_not_matter() -> None:
    case, structure = BY_NAME["plain"], structure_of("plain")
    model = case.model()
    one = cut(model, structure, {"0": (5, 1, 5), "3": [2]}).state_dict()
    two = cut(model, structure, {"3": iter((2,)), "0": {1, 5}}).state_dict()
    assert all(torch.equal(t, two[n]) for n, t in one.items())


def test_nothing_removed_is_a_plain_copy() -> None:
    case = BY_NAME["plain"]
    model = case.model()
    for change in (cut, mask):
        out = change(model, structure_of("plain"), {"0": ()})
        assert out is not model
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in out.state_dict().items())


# -- random networks --------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_chains(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))
    layers: list[nn.Module] = []
    inputs = 2
    for width in widths:
        bias, kind = data.draw(st.booleans()), data.draw(st.sampled_from(["plain", "norm", "depthwise", "transposed"]))
        layer = nn.ConvTranspose2d if kind == "transposed" else nn.Conv2d
        layers += [layer(inputs, width, 3, padding=1, bias=bias)]
        if kind == "depthwise":
            layers += [conv(width, width, groups=width, bias=bias)]
        if kind == "norm":
            layers += [nn.BatchNorm2d(width, affine=data.draw(st.booleans()))]
        layers += [data.draw(st.sampled_from([nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.Softplus()]))]
        inputs = width
    flat_head = data.draw(st.booleans())
    head = (
        [nn.Flatten(), nn.Linear(inputs * 16, 3)]
        if flat_head
        else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 3)]
    )
    model = hard(nn.Sequential(*layers, *head)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    structure = find_groups(model, x)
    assert [g.width for g in structure.prunable] == widths
    removed = {
        g.name: data.draw(st.sets(st.integers(0, g.width - 1), max_size=g.width - 1)) for g in structure.prunable
    }
    same(
        run(cut(model, structure, removed), (x,)),
        run(poisoned(model, structure, {n: sorted(c) for n, c in removed.items() if c}), (x,)),
    )


# -- faults -----------------------------------------------------------------
def test_another_network_is_refused() -> None:
    structure = structure_of("plain")
    with pytest.raises(errors.MismatchError, match=r"does not fit this model at '\d'"):
        cut(mlp(), structure, {"0": (0,)})
    narrow = cut(BY_NAME["plain"].model(), structure, {"0": (0, 1)})
    with pytest.raises(errors.MismatchError, match="before any pruning"):
        cut(narrow, structure, {"0": (7,)})


def test_something_is_left_of_every_layer() -> None:
    with pytest.raises(errors.StructureError, match=r"nothing would be left of '[013]'"):
        cut(BY_NAME["plain"].model(), structure_of("plain"), {"0": range(8)})


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(errors.InputError, match="no group '1'"):
        cut(BY_NAME["plain"].model(), structure_of("plain"), {"1": (0,)})


@pytest.mark.parametrize("case", [BY_NAME["flipped, 8"], BY_NAME["padded shortcut"]], ids=lambda c: c.name)
def test_the_oracle_sees_a_wrong_cut(case: Case) -> None:
    """Unproven groups of networks that the graph gets wrong differ from the hooks: these tests can fail."""
    model, inputs = case.model().double(), case.inputs(torch.float64)
    structure = find_groups(model, inputs, prove=False)
    name = next(iter(case.stays))
    removed = {structure[name].name if name in {g.name for g in structure.groups} else name: (1,)}
    with pytest.raises(AssertionError):
        same(run(cut(model, structure, removed), inputs), run(poisoned(model, structure, removed), inputs))


# -- widths -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("layer", "out", "read"),
    [
        (nn.Linear(4, 6), 6, 4), (nn.Conv1d(4, 6, 3), 6, 4), (nn.ConvTranspose2d(4, 6, 2), 6, 4),
        (nn.Conv3d(8, 6, 1, groups=2), 6, 8), (nn.BatchNorm2d(5), 5, 5), (nn.InstanceNorm1d(5), 5, 5),
        (nn.GroupNorm(2, 6), 6, 6), (nn.LayerNorm((3, 7)), 7, 7), (nn.PReLU(3), 3, 3), (nn.Embedding(9, 4), 4, 4),
        (nn.ReLU(), 0, 0),
    ],
)  # fmt: skip
def test_widths_of_layers(layer: nn.Module, out: int, read: int) -> None:
    assert (width_of(layer), width_of(layer, "out"), width_of(layer, "in")) == (out, out, read)
