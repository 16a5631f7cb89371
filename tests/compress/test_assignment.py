"""ECQ's assignment against the definition: every cost of every level, by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.assignment import Levels, assign, borders, information, lambda_limit, size_factor
from compress.codebook import Codebook, codebook_of

F64 = torch.float64


def tensors(seed: int, count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(300, generator=g, dtype=F64) ** 3 * 0.1 * (k + 1) for k in range(count)]


def prepared(ws: list[Tensor], books: list[Codebook], rule: str = "thesis") -> tuple[Levels, Tensor, Tensor, Tensor]:
    levels = Levels.of(books)
    p, bits = information(levels, levels.counts([b.nearest(w) - b.low for b, w in zip(books, ws, strict=True)]))
    ends = torch.tensor([[float(w.min()), float(w.max())] for w in ws], dtype=F64)
    return levels, p, bits, lambda_limit(levels, bits, ends[:, 0], ends[:, 1], rule)


def costs(levels: Levels, bits: Tensor, multiplier: Tensor, w: Tensor, t: int) -> Tensor:
    """(N, K): squared distance + lambda x information, each formed on its own."""
    out = torch.full((len(w), levels.count), math.inf, dtype=F64)
    for c in range(levels.count):
        if bool(levels.real[t, c]):
            price = float(multiplier[t]) * float(bits[t, c]) if float(multiplier[t]) else 0.0
            out[:, c] = (w - levels.values[t, c]) ** 2 + price
    return out


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.4, 0.99, 2.5])
@pytest.mark.parametrize("kind", ["symmetric", "released"])
@pytest.mark.parametrize("without_zero", [False, True])
def test_intervals_equal_brute_force(gamma: float, kind: str, without_zero: bool) -> None:
    """Released-code trap 21: no table of costs; the intervals give its arg min."""
    for seed in range(8):
        ws = tensors(seed)
        books = [codebook_of(w, 2 + (seed + t) % 4, levels=kind) for t, w in enumerate(ws)]
        levels, _, bits, limit = prepared(ws, books)
        cells = borders(levels, bits, gamma * limit, without_zero=without_zero)
        assert bool((cells[:, 1:] >= cells[:, :-1]).all())
        for t, w in enumerate(ws):
            table = costs(levels, bits, gamma * limit, w, t)
            if without_zero:
                table[:, levels.zero[t]] = math.inf
            found = table.gather(1, assign(w, cells[t])[:, None])[:, 0]
            assert float((found - table.amin(1)).abs().max()) < 1e-14


def test_eight_bits_and_many_tensors_in_pieces() -> None:
    ws = tensors(5, count=70)
    books = [codebook_of(w, 8) for w in ws]
    levels, _, bits, limit = prepared(ws, books)
    cells = borders(levels, bits, 0.1 * limit)
    for t in (0, 69):
        table = costs(levels, bits, 0.1 * limit, ws[t], t)
        found = table.gather(1, assign(ws[t], cells[t])[:, None])[:, 0]
        assert float((found - table.amin(1)).abs().max()) < 1e-14


def test_lambda_zero_is_the_nearest_level() -> None:
    """Trap 7: empty levels have infinite information, and 0 x infinity is no number."""
    ws = tensors(1)
    books = [codebook_of(w, 4) for w in ws]
    levels, _, bits, _ = prepared(ws, books)
    assert bool(torch.isinf(bits).any())
    cells = borders(levels, bits, torch.zeros(3, dtype=F64))
    for t, w in enumerate(ws):
        assert torch.equal(assign(w, cells[t]) + books[t].low, books[t].nearest(w))


def test_information() -> None:
    levels = Levels.of([Codebook(torch.tensor(1.0, dtype=F64), -2, 1)])
    p, bits = information(levels, torch.tensor([[1, 0, 2, 5]]))
    assert p.tolist()[0] == pytest.approx([0.5 / 6, 0.0, 0.5, 2.5 / 6])  # 2 of 8 are too few
    assert float(p.sum()) == pytest.approx(1.0)
    assert float(bits[0, 2]) == 1.0
    assert math.isinf(float(bits[0, 1]))
    p, bits = information(levels, torch.tensor([[1, 0, 6, 1]]))
    assert p.tolist() == [[0.125, 0.0, 0.75, 0.125]]
    assert bool((bits >= bits[:, levels.zero]).all())


def test_zero_level_without_a_weight() -> None:
    """Trap 6: the released code fails where no weight is nearest to zero."""
    w = torch.tensor([1.0, -1.0] * 20, dtype=F64)
    books = [codebook_of(w, 2)]
    levels, p, bits, limit = prepared([w], books)
    assert float(p[0, levels.zero[0]]) == 0.5
    assert math.isfinite(float(limit[0]))
    assert torch.equal((assign(w, borders(levels, bits, 0.9 * limit)[0]) + books[0].low).double(), w)


def test_weights_of_one_sign_do_not_vanish() -> None:
    """Trap 5: the released code divides by I_0 - I_0 and makes such a layer zero at any gamma."""
    w = torch.rand(500, dtype=F64)
    for rule in ("thesis", "max", "released"):
        levels, _, bits, limit = prepared([w], [codebook_of(w, 3)], rule)
        assert math.isfinite(float(limit[0]))
        assert bool((assign(w, borders(levels, bits, 0.05 * limit)[0]) != levels.zero[0]).any())


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["symmetric", "released"])
def test_every_sign_stays_below_gamma_one(bits: int, kind: str) -> None:
    """Trap 3: the released code takes the larger of the two limits."""
    lost_by_max = 0
    for seed in range(40):
        (w,) = tensors(seed, 1)
        w[w < 0] *= 0.3 + 0.05 * seed
        books = [codebook_of(w, bits, levels=kind)]
        nearest = books[0].nearest(w)
        for rule in ("thesis", "max"):
            levels, _, information_bits, limit = prepared([w], books, rule)
            k = assign(w, borders(levels, information_bits, 0.999 * limit)[0]) + books[0].low
            kept = [bool((sign * k > 0).any()) or not bool((sign * nearest > 0).any()) for sign in (1, -1)]
            if rule == "thesis":
                assert all(kept)
            else:
                lost_by_max += not all(kept)
    assert lost_by_max > 0 or bits == 2  # so the test can tell the rules apart


def test_the_limit_is_where_the_outermost_weight_turns_to_zero() -> None:
    w = torch.tensor([-0.2, -0.9, 0.1, 0.0, 0.05, 1.1, 0.3, 0.02, -0.01, 0.0], dtype=F64)
    books = [codebook_of(w, 2, step="max")]
    levels, _, bits, limit = prepared([w], books)
    for share, zero in ((0.9999, False), (1.0001, True)):
        k = assign(w, borders(levels, bits, share * limit)[0]) + books[0].low
        assert (not bool((k < 0).any())) == zero or (not bool((k > 0).any())) == zero


def test_scaling_a_tensor_scales_the_limit_by_the_square() -> None:
    """Trap 4: the released numerator mixes w with w squared."""
    (w,) = tensors(2, 1)
    a = 7.0
    books, scaled = [codebook_of(w, 4)], [codebook_of(a * w, 4)]
    for rule in ("thesis", "max"):
        levels, _, bits, limit = prepared([w], books, rule)
        levels_a, _, bits_a, limit_a = prepared([a * w], scaled, rule)
        assert float(limit_a[0]) == pytest.approx(a * a * float(limit[0]), rel=1e-12)
        before = assign(w, borders(levels, bits, 0.3 * limit)[0])
        assert torch.equal(assign(a * w, borders(levels_a, bits_a, 0.3 * limit_a)[0]), before)
    _, _, _, limit = prepared([w], books, "released")
    _, _, _, limit_a = prepared([a * w], scaled, "released")
    assert float(limit_a[0]) != pytest.approx(a * a * float(limit[0]), rel=1e-3)


def test_the_released_limit_is_the_published_code() -> None:
    (w,) = tensors(4, 1)
    books = [codebook_of(w, 4)]
    levels, _, bits, limit = prepared([w], books, "released")
    low, high = float(w.min()), float(w.max())
    sides = []
    for end in (low, high):
        at = int(books[0].nearest(torch.tensor(end, dtype=F64)))
        level = at * float(books[0].step)
        first = (level - end) ** 2 + (-abs(end) if end < 0 else end)
        sides.append(first**2 / float(bits[0, at - books[0].low] - bits[0, levels.zero[0]]))
    assert float(limit[0]) == pytest.approx(max(sides), rel=1e-12)


def test_a_tensor_that_rounds_to_zero_has_no_limit() -> None:
    w = torch.full((50,), 1e-3, dtype=F64)
    book = Codebook(torch.tensor(1.0, dtype=F64), -1, 1)
    levels, _, bits, limit = prepared([w], [book])
    assert float(limit[0]) == 0.0
    assert bool((assign(w, borders(levels, bits, limit)[0]) == levels.zero[0]).all())


def test_size_factor() -> None:
    assert size_factor([100, 10, 0]) == pytest.approx([1.0, 0.15 / 1.05, 0.05 / 1.05])
