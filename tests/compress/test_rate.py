"""Rates: the search for gamma, and what it is told."""

from __future__ import annotations

import math

import pytest

from compress.rate import Rate, entropy_of, find_gamma
from lrp.errors import InputError


@pytest.mark.parametrize("start", [None, 1e-3, 0.05, 0.3, 2.0, 30.0])
@pytest.mark.parametrize("root", [3e-4, 0.01, 0.3, 4.0, 20.0])
def test_the_smallest_gamma_that_is_enough(root: float, start: float | None) -> None:
    trials = []

    def excess(gamma: float) -> float:
        trials.append(gamma)
        return math.tanh(gamma / root - 1)

    found = find_gamma(excess, start)
    assert root <= found <= 1.005 * root
    assert len(trials) <= 34


def test_steps_are_met_from_above() -> None:
    found = find_gamma(lambda gamma: math.floor(10 * gamma) / 10 - 0.5, 0.05)
    assert 0.5 <= found < 0.6  # all of these are as good


def test_out_of_reach_on_either_side() -> None:
    assert find_gamma(lambda gamma: 0.1, 0.3) == 0.0
    assert find_gamma(lambda gamma: -1.0, 0.3) == 64.0


def test_entropy() -> None:
    assert entropy_of([[4, 4, 0, 0]]) == 1.0
    assert entropy_of([[8, 0], [2, 2]]) == pytest.approx(4 / 12)
    assert entropy_of([[0, 5]]) == 0.0


def test_excess() -> None:
    assert Rate(zeros=0.8).excess(0.9, 1.0) == pytest.approx(0.5)
    assert Rate(bits_per_weight=2.0).excess(0.0, 3.0) == pytest.approx(-0.5)


@pytest.mark.parametrize("wrong", [{}, {"zeros": 1.0}, {"zeros": 0.5, "bits_per_weight": 1.0}, {"bits_per_weight": 0},
                                   {"zeros": True}, {"zeros": 0.5, "every": 0}])  # fmt: skip
def test_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="rate"):
        Rate(**wrong)  # type: ignore[arg-type]  # on purpose
