"""Bits under a budget, against trying everything."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import compress
import lrp
from compress.bit_allocation import _least_damage, allocate_bits
from compress.codebook import codebook_of
from lrp.errors import BudgetError, InputError, MismatchError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)).eval()


def test_near_the_best_of_all_choices() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        table = {}
        for name in "abcd":
            sizes = torch.rand(4, generator=g).cumsum(0).tolist()
            damages = (torch.rand((), generator=g) * 4.0 ** -torch.arange(4)).tolist()
            table[name] = {b: (sizes[i], damages[i]) for i, b in enumerate((2, 3, 4, 8))}
        low = sum(row[2][0] for row in table.values())
        budget = low + 0.4 * (sum(row[8][0] for row in table.values()) - low)
        found = _least_damage(table, budget)
        assert sum(table[n][b][0] for n, b in found.items()) <= budget
        best = min(
            sum(table[n][b][1] for n, b in zip(table, bits, strict=True))
            for bits in itertools.product((2, 3, 4, 8), repeat=4)
            if sum(table[n][b][0] for n, b in zip(table, bits, strict=True)) <= budget
        )
        assert sum(table[n][b][1] for n, b in found.items()) <= 1.6 * best


def test_by_output_is_the_measured_change() -> None:
    net, x = network(), torch.randn(40, 6)
    found = allocate_bits(net, [x], budget=400, choices=(2, 4))
    twin = network()
    book = codebook_of(twin[2].weight, 2, step="mse")
    with torch.no_grad():
        twin[2].weight.copy_(book.values(book.nearest(twin[2].weight)))
        expected = float((twin(x) - net(x)).double().square().mean())
    assert found.table["2.weight"][2][1] == pytest.approx(expected, rel=1e-5)
    assert found.bytes <= 400
    assert "2.weight" in str(found)


def test_by_relevance() -> None:
    net, x = network(), torch.randn(40, 6)
    weights = lrp.collect(net, [x], wrt="weights", target="predicted", progress=False).weights
    found = allocate_bits(net, budget=260, by="relevance", relevance=weights)
    w, r = net[4].weight.detach().double(), weights["4.weight"].double()
    book = codebook_of(net[4].weight, 3, step="mse")
    expected = float(((r / w) * (book.values(book.nearest(net[4].weight)).double() - w)).square().sum())
    assert found.table["4.weight"][3][1] == pytest.approx(expected, rel=1e-9)
    result = compress.quantize(net, method="mse", bits=found.bits)
    assert {n: b.bits for n, b in result.plan.codebooks.items()} == dict(found.bits)


def test_a_large_budget_gives_all_and_a_small_one_is_refused() -> None:
    net, x = network(), torch.randn(8, 6)
    assert set(allocate_bits(net, [x], budget=1e9).bits.values()) == {8}
    with pytest.raises(BudgetError, match="budget"):
        allocate_bits(net, [x], budget=10)
    with pytest.raises(InputError, match="choices"):
        allocate_bits(net, [x], budget=100, choices=(1, 2))
    with pytest.raises(MismatchError, match="relevance="):
        allocate_bits(net, budget=1000, by="relevance")
