"""Codebooks: their levels against the definition, and what a tensor on them says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from compress.codebook import Codebook, codebook_of
from lrp.errors import InputError, MismatchError, NonFiniteError


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("levels", ["symmetric", "released"])
def test_levels(bits: int, levels: str) -> None:
    w = torch.randn(500, dtype=torch.float64)
    w[0] = 9.0  # the positive side has the larger extreme, mean, sum and spread
    book = codebook_of(w, bits, levels=levels, step="max")
    half = 2 ** (bits - 1)
    assert (book.low, book.high) == ((1 - half, half - 1) if levels == "symmetric" else (1 - half, half))
    assert book.bits == bits
    outermost = max(book.high, -book.low)
    assert float(book.step) == pytest.approx(9.0 / outermost)


def test_the_extra_level_goes_to_the_side_that_wins_three_of_five() -> None:
    # more negatives by count and sum; positives are larger, larger on average and more spread
    w = torch.cat([torch.full((90,), -0.5), torch.tensor([1.0, 2.0, 3.0])])
    assert (codebook_of(w, 3, levels="released").low, codebook_of(-w, 3, levels="released").low) == (-3, -4)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("levels", ["symmetric", "released"])
def test_weights_of_one_sign_get_all_levels_there(sign: int, levels: str) -> None:
    w = sign * torch.rand(100)
    book = codebook_of(w, 3, levels=levels)
    assert (book.low, book.high) == ((0, 7) if sign > 0 else (-7, 0))


def test_the_percentile_is_numpys_and_zero_falls_back_to_the_largest() -> None:
    w = torch.randn(3000, dtype=torch.float64)
    expected = np.percentile(w.abs().numpy(), 99.9) / 7
    assert float(codebook_of(w, 4).step) == pytest.approx(expected, rel=1e-15)
    sparse = torch.zeros(5000, dtype=torch.float64)
    sparse[:2] = torch.tensor([0.7, -0.7])
    assert float(codebook_of(sparse, 4).step) == pytest.approx(0.1)


def test_least_squared_error_beats_every_step_of_a_dense_grid() -> None:
    w = torch.randn(400, dtype=torch.float64) ** 3
    for bits in (2, 3, 4):
        book = codebook_of(w, bits, step="mse")

        def error(step: float, high: int = book.high) -> float:
            return float((w - (w / step).round().clamp(-high, high) * step).square().sum())

        best = min(error(float(s)) for s in np.linspace(0.05, 1.3, 3000) * float(w.abs().max()) / book.high)
        assert error(float(book.step)) <= 1.01 * best


def test_one_step_per_channel() -> None:
    w = torch.randn(5, 3, 2, 2) * torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0]).view(-1, 1, 1, 1)
    book = codebook_of(w, 4, axis=0, step="max")
    for c in range(4):
        assert float(book.step[c]) == pytest.approx(float(w[c].abs().max()) / 7)
    assert float(book.step[4]) == 1.0  # a slice of zeros
    k = book.nearest(w)
    assert torch.equal(book.indices(book.values(k)), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_indices_come_back_exactly_for_all_levels_and_many_steps(dtype: torch.dtype) -> None:
    """Released-code trap 14: w / step is truncated, and levels are lost."""
    torch.manual_seed(3)
    for bits in (2, 3, 4, 5, 8):
        k = torch.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1))
        for _ in range(300):
            step = torch.rand((), dtype=torch.float64).mul(4).sub(3).exp().to(dtype)
            book = Codebook(step, int(k[0]), int(k[-1]))
            values = book.values(k)
            assert values.dtype == dtype
            assert torch.equal(book.indices(values), k)


def test_a_weight_off_the_levels_is_told() -> None:
    book = codebook_of(torch.randn(10), 4)
    with pytest.raises(MismatchError, match="lies off its codebook"):
        book.indices(torch.full((3,), 0.37) * book.step)


def test_json_is_exact() -> None:
    book = codebook_of(torch.randn(6, 3), 5, axis=0)
    again = Codebook.from_json(json.loads(json.dumps(book.to_json())))
    assert torch.equal(again.step, book.step)
    assert (again.low, again.high, again.axis, again.step.dtype) == (book.low, book.high, 0, torch.float32)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": 4, "levels": "ternary"}, "levels"),
        ({"bits": 4, "step": "median"}, "step"),
        ({"bits": 4, "step": -1.0}, "step"),
        ({"bits": 4, "step": math.nan}, "step"),
        ({"bits": 4, "axis": 3}, "axis"),
    ],
)
def test_refused(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        codebook_of(torch.randn(4, 4), **arguments)  # type: ignore[arg-type]  # on purpose


def test_tensors_that_are_none() -> None:
    with pytest.raises(InputError, match="nothing to quantize"):
        codebook_of(torch.zeros(0), 4)
    with pytest.raises(InputError, match="nothing to quantize"):
        codebook_of(torch.arange(4), 4)
    with pytest.raises(NonFiniteError):
        codebook_of(torch.tensor([1.0, math.inf]), 4)
    assert float(codebook_of(torch.zeros(4), 4).step) == 1.0
    tiny = torch.tensor([1e-45, -1e-45])
    assert float(codebook_of(tiny, 8).step) > 0
