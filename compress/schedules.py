"""Schedules: by which intermediate targets a budget is reached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from compress.target import Target
from lrp.errors import InputError

__all__ = ["Iterative", "OneShot", "Schedule", "step_target"]

SPACINGS = ("linear", "geometric")
RESCORES = ("per_step", "once")


@dataclass(frozen=True)
class OneShot:
    """All at once.

    Examples
    --------
    >>> from compress.schedules import OneShot
    >>> OneShot().limits(100.0, 40.0)
    [40.0]
    """

    steps = 1
    rescore = "per_step"

    def limits(self, before: float, limit: float) -> list[float]:
        """What may remain after each step."""
        return [limit]

    def to_json(self) -> dict[str, Any]:
        return {"name": "one-shot", "steps": 1}


@dataclass(frozen=True)
class Iterative:
    """In steps, each of which scores, cuts, re-estimates and trains.

    Parameters
    ----------
    steps : int
    spacing : "linear" or "geometric"
        Every step removes the same amount, or the same share of what is left.
    rescore : "per_step" or "once"
        Score the network that the steps before have left, or the original
        network only.

    Raises
    ------
    InputError

    Examples
    --------
    >>> from compress.schedules import Iterative
    >>> Iterative(3).limits(100.0, 40.0), Iterative(2, "geometric").limits(100.0, 25.0)
    ([80.0, 60.0, 40.0], [50.0, 25.0])
    """

    steps: int = 5
    spacing: str = "linear"
    rescore: str = "per_step"

    def __post_init__(self) -> None:
        number = isinstance(self.steps, int) and not isinstance(self.steps, bool) and self.steps >= 1
        if not number or self.spacing not in SPACINGS or self.rescore not in RESCORES:
            raise InputError(
                "the schedule makes no sense",
                expected=f"steps >= 1, spacing one of {SPACINGS}, rescore one of {RESCORES}",
                got=f"steps={self.steps!r}, spacing={self.spacing!r}, rescore={self.rescore!r}",
                fix="for example Iterative(steps=5)",
            )

    def limits(self, before: float, limit: float) -> list[float]:
        """What may remain after each step."""
        shares = [k / self.steps for k in range(1, self.steps)]
        if self.spacing == "linear":
            between = [before + (limit - before) * t for t in shares]
        else:
            between = [before * (limit / before) ** t for t in shares]
        return [*between, limit]

    def to_json(self) -> dict[str, Any]:
        return {"name": "iterative", "steps": self.steps, "spacing": self.spacing, "rescore": self.rescore}


Schedule = OneShot | Iterative


def step_target(kind: str, limit: float) -> Target:
    """A target in absolute terms: a share would be one of what the steps before have left.

    Examples
    --------
    >>> from compress.schedules import step_target
    >>> step_target("macs", 1234.5), step_target("latency_ms", 2.5)
    (Target(macs=1234), Target(latency_ms='2.500000ms'))
    """
    if kind == "latency_ms":
        return Target(latency_ms=f"{math.floor(limit * 1e6) / 1e6:.6f}ms")
    return Target(**{kind: max(1, math.floor(limit + 1e-9))})
