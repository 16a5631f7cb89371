"""A rate that training at low precision is held to: the multiplier is found from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lrp.errors import InputError

__all__ = ["Rate", "entropy_of", "find_gamma"]

_LEAST, _MOST = 2.0**-14, 2.0**6
_CLOSE = 2e-3  # of what is wanted
_TRIALS = 24


@dataclass(frozen=True)
class Rate:
    """How sparse, or how short, the quantized weights are to be: one of the two.

    Parameters
    ----------
    zeros : float
        Least share of zeros among all quantized weights, below 1.
    bits_per_weight : float
        Largest entropy of the levels, in bits per quantized weight: what an
        ideal coder with one table per tensor needs.
    every : int
        Steps from one search for gamma to the next.

    Raises
    ------
    InputError

    Examples
    --------
    >>> from compress.rate import Rate
    >>> Rate(zeros=0.9).reached(zeros=0.91, bits=0.7), Rate(bits_per_weight=0.5).reached(zeros=0.91, bits=0.7)
    (True, False)
    """

    zeros: float | None = None
    bits_per_weight: float | None = None
    every: int = 10

    def __post_init__(self) -> None:
        given = [n for n in ("zeros", "bits_per_weight") if getattr(self, n) is not None]
        right = len(given) == 1
        if right:
            value = getattr(self, given[0])
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            right = number and value > 0 and (given[0] == "bits_per_weight" or value < 1)
        if not right or not isinstance(self.every, int) or self.every < 1:
            raise InputError(
                "a rate makes no sense",
                expected="one of zeros (above 0, below 1) and bits_per_weight (above 0); every from 1",
                got=f"zeros={self.zeros!r}, bits_per_weight={self.bits_per_weight!r}, every={self.every!r}",
                fix="for example Rate(zeros=0.9)",
            )

    def excess(self, zeros: float, bits: float) -> float:
        """How far a network is from the rate, as a share of it: positive where it is reached with room to spare."""
        if self.zeros is not None:
            return (zeros - self.zeros) / (1 - self.zeros)
        assert self.bits_per_weight is not None
        return (self.bits_per_weight - bits) / self.bits_per_weight

    def reached(self, zeros: float, bits: float) -> bool:
        return self.excess(zeros, bits) >= 0

    def settings(self) -> dict[str, Any]:
        return dict(vars(self))


def entropy_of(counts: list[list[int]]) -> float:
    """Bits per weight over tensors with these counts of their levels.

    Examples
    --------
    >>> from compress.rate import entropy_of
    >>> entropy_of([[1, 1], [4, 0]])
    0.3333333333333333
    """
    total = bits = 0.0
    for row in counts:
        n = sum(row)
        total += n
        bits -= sum(c * math.log2(c / n) for c in row if c)
    return bits / total if total else 0.0


def find_gamma(excess: Callable[[float], float], start: float | None) -> float:
    """The smallest gamma, to a small share of the rate, at which the excess is not negative.

    Parameters
    ----------
    excess : callable
        Of gamma; grows with it, in steps.
    start : float or None
        Gamma of the search before.

    Returns
    -------
    float
        0 where no multiplier is needed; the largest one tried where none is
        enough.

    Examples
    --------
    >>> from compress.rate import find_gamma
    >>> 0.3 <= find_gamma(lambda gamma: gamma - 0.3, None) < 0.31
    True
    """
    trials = 0

    def at(gamma: float) -> float:
        nonlocal trials
        trials += 1
        return excess(gamma)

    gamma = start or 0.05
    found = at(gamma)
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    factor = 1.02 if start else 2.0
    while low is None or high is None:  # a bracket, from narrow to wide
        if found >= 0:
            if found <= _CLOSE:
                return gamma
            high = (gamma, found)
        else:
            low = (gamma, found)
        if low is None or high is None:
            if low is not None and gamma >= _MOST:
                return gamma
            if high is not None and gamma <= _LEAST:
                if at(0.0) >= 0:
                    return 0.0
                low = (gamma / 2, -1.0)
                break
            gamma = min(_MOST, gamma * factor) if low is not None else max(_LEAST, gamma / factor)
            factor = factor**2 if factor < 4 else factor
            found = at(gamma)
    assert high is not None
    while trials < _TRIALS and high[0] / low[0] > 1 + 1e-4:
        # where a line through both meets half of what is close enough, kept inside the bracket
        share = (0.5 * _CLOSE - low[1]) / (high[1] - low[1])
        share = min(0.9, max(0.1, share))
        gamma = low[0] * (high[0] / low[0]) ** share
        found = at(gamma)
        if found >= 0:
            high = (gamma, found)
            if found <= _CLOSE:
                break
        else:
            low = (gamma, found)
    return high[0]
