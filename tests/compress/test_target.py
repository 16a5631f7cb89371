"""Targets: shares, absolute numbers and strings with units."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from compress.costs import Costs
from compress.target import Target
from lrp import errors

KINDS = ("channels", "macs", "params", "bytes", "latency_ms")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("value", "left"),
    [
        (0.5, 100),
        (1.0, 200),
        (1, 1),
        (150, 150),
        (10**12, 10**12),
        ("50%", 100),
        ("12.5 %", 25),
        ("70", 70),
        ("1e3", 1000),
    ],
)
def test_values(kind: str, value: Any, left: float) -> None:
    target = Target(**{kind: value})
    assert target.kind == kind
    assert target.absolute(200.0) == pytest.approx(left)
    before = dataclasses.replace(Costs(0, 0, 0, 0, 0), **{kind: 200})
    assert target.absolute(before) == pytest.approx(left), "of this quantity among the costs"


@pytest.mark.parametrize(
    ("kind", "value", "left"),
    [
        ("macs", "150M", 150e6), ("macs", "1.5G", 1.5e9), ("macs", " 3 k ", 3e3), ("params", "2m", 2e6),
        ("bytes", "300KiB", 300 * 1024), ("bytes", "1.5MB", 1.5e6), ("bytes", "2MiB", 2 * 2**20),
        ("bytes", "1GiB", 2**30), ("bytes", "12kB", 12e3), ("bytes", "7b", 7), ("latency_ms", "4.2ms", 4.2),
        ("latency_ms", "0.5s", 500), ("latency_ms", "250us", 0.25),
    ],
)  # fmt: skip
def test_units(kind: str, value: str, left: float) -> None:
    assert Target(**{kind: value}).absolute(1.0) == pytest.approx(left, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("macs", "4ms"), ("macs", "5MB"), ("macs", "5KiB"), ("params", "1s"), ("params", "3kib"), ("channels", "2ms"),
        ("channels", "1MB"), ("bytes", "4ms"), ("latency_ms", "2MB"), ("latency_ms", "3M"), ("latency_ms", "1KiB"),
    ],
)  # fmt: skip
def test_units_of_another_quantity_are_refused(kind: str, value: str) -> None:
    with pytest.raises(errors.InputError, match=kind):
        Target(**{kind: value})


@pytest.mark.parametrize(
    "value",
    [0, -1, 0.0, -0.5, 1.0001, 2.0, math.nan, math.inf, True, False, "", "half", "-3M", "0", "0%", "5 apples", "1e400",
     "150%", [0.5], b"3", 1j],
)  # fmt: skip
def test_what_is_no_target_is_refused_with_an_example(value: Any) -> None:
    with pytest.raises(errors.InputError, match="macs is no target") as caught:
        Target(macs=value)
    assert "what may remain" in str(caught.value)


def test_exactly_one_quantity() -> None:
    with pytest.raises(errors.InputError, match=r"Got: none"):
        Target()
    with pytest.raises(errors.InputError, match=r"Got: macs, params"):
        Target(macs=0.5, params=0.5)


def test_shares_are_shares_however_they_are_written() -> None:
    assert Target(bytes=0.5).is_share
    assert Target(bytes="50%").is_share
    assert not Target(bytes=500).is_share
    assert not Target(bytes="500").is_share
    assert not Target(bytes="5kB").is_share


@pytest.mark.parametrize("total", [3, 7, 10, 64, 100, 200, 1000, 4096])
def test_a_share_of_whole_things_does_not_lose_one_to_rounding(total: int) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point, and 29 of 100 are still 29 %."""
    for percent in range(1, 101):
        exact = Fraction(percent, 100) * total
        for target in (Target(channels=percent / 100), Target(channels=f"{percent}%")):
            limit = target.absolute(float(total))
            assert limit == pytest.approx(float(exact), rel=1e-9)
            assert math.floor(limit) == math.floor(exact), f"{percent} % of {total}"


@pytest.mark.parametrize("value", [0.5, 7, "150M", "50%"])
def test_targets_travel_and_print(value: Any) -> None:
    target = Target(macs=value)
    assert Target.from_json(target.to_json()) == target
    assert eval(repr(target)) == target
    assert hash(target) == hash(Target(macs=value))
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.macs = 0.1  # type: ignore[misc]


def test_numbers_of_numpy_are_numbers() -> None:
    assert Target(macs=np.float64(0.5)) == Target(macs=0.5)
    assert Target(macs=np.float32(0.5)).to_json() == {"macs": 0.5}
    assert Target(macs=np.int64(7)).absolute(100.0) == 7
    with pytest.raises(errors.InputError):
        Target(macs=np.float64(1.5))


def test_a_misspelt_quantity_is_named() -> None:
    with pytest.raises(errors.InputError, match="did you mean 'macs'"):
        Target(mac=0.5)  # type: ignore[call-arg]
    assert copy.deepcopy(pickle.loads(pickle.dumps(Target(macs=0.5)))) == Target(macs=0.5)
