"""Costs: counted by hand on small networks, and the table against the network that was really cut."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BY_NAME, NETWORKS, hard, mlp, plain, structure_of
from torch import Tensor, nn

from compress.costs import Costs, CostTable, count
from compress.cutting import cut
from compress.groups import Structure, find_groups

ALL = [case.name for case in NETWORKS]


def table_of(name: str) -> CostTable:
    case = BY_NAME[name]
    return CostTable.of(case.model(), case.inputs(), structure_of(name))


def some(structure: Structure, seed: int) -> dict[str, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for g in structure.prunable:
        n = int(torch.randint(0, len(g.units), (1,), generator=generator))
        order = torch.randperm(len(g.units), generator=generator)[:n].tolist()
        out[g.name] = tuple(sorted(j for k in order for j in g.units[k]))
    return out


def macs_by_hand(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Products of every convolution and linear layer for one sample, from the shapes that hooks see."""
    found: dict[str, int] = {}

    def hook(name: str) -> Any:
        def see(module: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            n = given[0].shape[0]
            if isinstance(module, nn.Linear):
                macs = output.numel() // n * module.in_features
            elif module.transposed:
                macs = given[0].numel() // n * math.prod(module.kernel_size) * (module.out_channels // module.groups)
            else:
                macs = output.numel() // n * math.prod(module.kernel_size) * (module.in_channels // module.groups)
            found[name] = found.get(name, 0) + macs

        return see

    handles = [
        m.register_forward_hook(hook(n))
        for n, m in model.named_modules()
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))
    ]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


# -- by hand ----------------------------------------------------------------
def test_a_chain_by_hand() -> None:
    costs = count(plain(), torch.randn(1, 3, 8, 8), structure_of("plain"))
    assert costs.macs == 8 * 3 * 9 * 64 + 12 * 8 * 9 * 64 + 12 * 4
    assert costs.params == (8 * 27 + 8) + 2 * 8 + (12 * 72 + 12) + 2 * 12 + (4 * 12 + 4)
    assert costs.filters == 8 + 12 + 4
    assert costs.channels == 8 + 12
    assert costs.bytes == 4 * (costs.params + 2 * 8 + 2 * 12) + 2 * 8  # statistics, and two counters of int64
    assert costs.latency_ms is None


def test_a_cut_chain_by_hand() -> None:
    after = table_of("plain").costs({"0": (1, 2, 3), "3": (0,)})
    assert after.macs == 5 * 3 * 9 * 64 + 11 * 5 * 9 * 64 + 11 * 4
    assert after.params == (5 * 27 + 5) + 2 * 5 + (11 * 45 + 11) + 2 * 11 + (4 * 11 + 4)
    assert (after.filters, after.channels) == (5 + 11 + 4, 5 + 11)


def test_depthwise_by_hand() -> None:
    table = table_of("depthwise")
    assert table.costs({}).macs == 10 * 27 * 64 + 10 * 9 * 64 + 6 * 10 * 64 + 6 * 4
    after = table.costs({"0": (0, 4)})
    assert after.macs == 8 * 27 * 64 + 8 * 9 * 64 + 6 * 8 * 64 + 6 * 4
    assert after.params == (8 * 27 + 8) + 16 + (8 * 9 + 8) + 16 + (6 * 8 + 6) + (4 * 6 + 4)
    assert after.filters == 8 + 8 + 6 + 4
    assert after.channels == 8 + 6, "a channel that two layers share counts once"


def test_grouped_by_hand() -> None:
    after = table_of("grouped").costs({"0": (1, 4, 7, 10), "2": (0, 2, 4, 6)})
    assert after.macs == 8 * 27 * 64 + 4 * 2 * 9 * 64 + 6 * 4 * 9 * 64 + 6 * 4


def test_a_transposed_convolution_counts_by_its_input() -> None:
    assert table_of("transposed").costs({}).macs == 8 * 27 * 64 + 8 * 6 * 4 * 64 + 5 * 6 * 9 * 256 + 5 * 4


def test_attention_by_hand() -> None:
    """What no layer's weight explains, the products of activations, is counted and constant."""
    table = table_of("attention")
    t, e, up = 5, 8, 20
    fixed = t * 6 * e + t * (3 * e * e) + 2 * t * t * e + t * e * e + e * 4
    assert table.costs({}).macs == fixed + 2 * t * e * up
    assert table.costs({"up": range(7)}).macs == fixed + 2 * t * e * 13


def test_a_flattened_map_by_hand() -> None:
    after = table_of("flatten").costs({"0": (0, 5), "4": (9,)})
    assert after.macs == 4 * 27 * 64 + 9 * 64 + 9 * 4
    assert after.params == 4 * 27 + 4 + 9 * 64 + 9 + 4 * 9 + 4


@pytest.mark.parametrize(("name", "layer"), [("gated", "conv"), ("gated, linear", "up")])
def test_a_gated_pair_by_hand(name: str, layer: str) -> None:
    table = table_of(name)
    pixels, kernel, inputs = (64, 9, 3) if name == "gated" else (1, 1, 5)
    reader = "out" if name == "gated" else "down"
    removed = {layer: (0, 8, 3, 11)}
    assert table.layer_macs(removed)[layer] == 12 * inputs * kernel * pixels
    assert table.layer_macs(removed)[reader] == 6 * 6 * kernel * pixels
    assert table.costs(removed).filters == 12 + 6 + 4
    assert table.widths(removed)[layer] == (16, 12)


def test_one_layer_alone() -> None:
    costs = count(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 10, 10))
    assert (costs.macs, costs.params, costs.filters) == (8 * 27 * 64, 8 * 27 + 8, 8)


def test_layers_whose_weight_is_computed_count_as_filters() -> None:
    case = BY_NAME["weight norm"]
    costs = count(case.model(), case.inputs())
    assert costs.macs == 8 * 27 * 64 + 6 * 8 * 9 * 64 + 10 * 6 * 9 * 64 + 10 * 4
    assert costs.filters == 8 + 6 + 10 + 4


@pytest.mark.parametrize("name", ["called twice", "called on two inputs"])
def test_a_layer_counts_as_often_as_it_is_called(name: str) -> None:
    case = BY_NAME[name]
    assert count(case.model(), case.inputs()).macs == sum(macs_by_hand(case.model(), case.inputs()).values())


# -- the table is the network ----------------------------------------------
@pytest.mark.parametrize("name", ALL)
def test_the_table_counts_what_the_cut_network_has(name: str) -> None:
    case, structure = BY_NAME[name], structure_of(name)
    model, inputs = case.model(), case.inputs()
    table = CostTable.of(model, inputs, structure)
    for seed in range(4):
        removed = some(structure, seed)
        small = cut(model, structure, removed)
        expected, own = count(small, inputs), table.costs(removed)
        assert (own.macs, own.params, own.bytes, own.filters) == (
            expected.macs, expected.params, expected.bytes, expected.filters,
        )  # fmt: skip
        assert own.params == sum(p.numel() for p in small.parameters())
        assert own.bytes == sum(t.numel() * t.element_size() for t in small.state_dict().values())
        assert own.channels == sum(g.width - len(removed.get(g.name, ())) for g in structure.prunable)
        by_hand = {n: m for n, m in macs_by_hand(small, inputs).items() if "mha" not in n}
        layers = table.layer_macs(removed)
        assert {n: m for n, m in by_hand.items() if n in layers} == layers
        widths = table.widths(removed)
        for n, (before, after) in widths.items():
            for net, width in ((model, before), (small, after)):
                module: Any = net.get_submodule(n)
                assert width == (module.out_features if isinstance(module, nn.Linear) else module.out_channels)


@pytest.mark.parametrize("name", ALL)
def test_taking_and_giving_back_are_inverse(name: str) -> None:
    structure = structure_of(name)
    table = table_of(name)
    state = table.running()
    assert state.costs() == table.costs({})
    taken = []
    for g in structure.prunable:
        for unit in g.units[:-1]:
            state.take(g, unit)
            taken.append((g, unit))
            removed: dict[str, list[int]] = {}
            for group, channels in taken:
                removed.setdefault(group.name, []).extend(channels)
            assert state.costs() == table.costs(removed)
    for g, unit in taken[::2]:
        state.give(g, unit)
    left: dict[str, list[int]] = {}
    for g, unit in taken[1::2]:
        left.setdefault(g.name, []).extend(unit)
    assert state.costs() == table.costs(left)


@pytest.mark.parametrize("name", ALL)
def test_tables_travel_as_json(name: str) -> None:
    structure, table = structure_of(name), table_of(name)
    again = CostTable.from_json(json.loads(json.dumps(table.to_json())), structure)
    removed = some(structure, 3)
    assert again.costs(removed) == table.costs(removed)
    assert again.layer_macs(removed) == table.layer_macs(removed)
    assert again.widths(removed) == table.widths(removed)
    assert again.shapes() == table.shapes()
    assert Costs.from_json(json.loads(json.dumps(table.costs({}).to_json()))) == table.costs({})


def test_costs_of_groups_that_a_norm_spans() -> None:
    for name in ("layer norm", "group norm", "attention"):
        case = BY_NAME[name]
        model, inputs = case.model(), case.inputs()
        structure = find_groups(model, inputs, allow="*")
        table = CostTable.of(model, inputs, structure)
        for g in structure.prunable:
            removed = {g.name: tuple(j for unit in g.units[:2] for j in unit)}
            small = cut(model, structure, removed)
            assert table.costs(removed).params == count(small, inputs).params
            assert table.costs(removed).macs == count(small, inputs).macs


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_random_multi_layer_perceptrons(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(2, 12), min_size=3, max_size=5))
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    model, x = nn.Sequential(*layers[:-1]), torch.randn(1, widths[0])
    structure = find_groups(model, x, prove=False)
    table = CostTable.of(model, x, structure)
    removed = {
        g.name: sorted(data.draw(st.sets(st.integers(0, g.width - 1), max_size=g.width - 1)))
        for g in structure.prunable
    }
    left = [widths[0], *(w - len(removed[str(2 * k)]) for k, w in enumerate(widths[1:-1])), widths[-1]]
    costs = table.costs(removed)
    assert costs.macs == sum(i * o for i, o in pairwise(left))
    assert costs.params == sum(i * o + o for i, o in pairwise(left))
    assert costs.channels == sum(left[1:-1])
    assert costs.filters == sum(left[1:])


# -- what a count does not depend on ----------------------------------------
def test_costs_are_of_one_sample() -> None:
    case, structure = BY_NAME["attention"], structure_of("attention")
    one, many = (count(case.model(), torch.randn(n, 5, 6), structure) for n in (1, 7))
    assert one == many


def test_mode_and_frozen_parameters_do_not_matter() -> None:
    case = BY_NAME["dropout"]
    expected = count(case.model(), case.inputs())
    model = case.model().train()
    for p in model.parameters():
        p.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert count(model, case.inputs()) == expected
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_bytes_follow_the_data_type() -> None:
    model = mlp()
    full, half = count(model, torch.randn(1, 5)), count(hard(mlp()).bfloat16(), torch.randn(1, 5).bfloat16())
    assert full.bytes == 2 * half.bytes == 4 * full.params
    assert full.macs == half.macs


def test_printing() -> None:
    text = str(Costs(12, 34, 5600, 780, 3120, 1.234))
    assert text == "12 prunable channels, 34 filters, 5,600 MACs, 780 parameters, 3,120 bytes, 1.23 ms"
