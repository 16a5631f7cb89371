"""Targets: what may remain of a network."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from compress.costs import Costs
from compress.criteria._names import near
from lrp.errors import InputError

__all__ = ["Target"]

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_UNITS = {
    "channels": _COUNTS,
    "macs": _COUNTS,
    "params": _COUNTS,
    "bytes": _BYTES,
    "latency_ms": {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3},
}

_EXAMPLES = {
    "channels": "'300', '50%'",
    "macs": "'150M', '50%'",
    "params": "'300k', '50%'",
    "bytes": "'1.5MB', '300KiB', '50%'",
    "latency_ms": "'4.2ms', '50%'",
}


@dataclass(frozen=True)
class Target:
    """What may remain: exactly one of five.

    A float is the share that remains; an int, or a string with a unit, is
    absolute. What is reached never exceeds the target.

    Parameters
    ----------
    channels : float, int or str
        Of the groups that can be pruned.
    macs : float, int or str
        Multiply-adds of one sample: ``0.5``, ``"150M"``.
    params : float, int or str
    bytes : float, int or str
        Of the file that :func:`compress.save` writes: ``"1.5MB"``, ``"300KiB"``.
    latency_ms : float, int or str
        Milliseconds by the meter: ``0.5``, ``"4.2ms"``.

    Raises
    ------
    InputError

    Examples
    --------
    >>> from compress import Target
    >>> Target(macs=0.5)
    Target(macs=0.5)
    >>> Target(bytes="300KiB").absolute(0)
    307200.0
    """

    channels: float | int | str | None = None
    macs: float | int | str | None = None
    params: float | int | str | None = None
    bytes: float | int | str | None = None
    latency_ms: float | int | str | None = None

    def __new__(cls, *values: Any, **named: Any) -> Target:  # before dataclass refuses what it does not know
        kinds = [f.name for f in dataclasses.fields(cls)]
        for name in named:
            if name not in kinds:
                raise InputError(
                    f"'{name}' is no quantity that a target can name",
                    expected=f"one of {', '.join(kinds)}",
                    got=f"{name}={named[name]!r}",
                    fix=near(name, kinds, "for example compress.Target(macs=0.5)"),
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise InputError(
                "a target names one quantity",
                expected="exactly one of channels, macs, params, bytes, latency_ms",
                got=", ".join(given) or "none",
                fix="for example compress.Target(macs=0.5)",
            )
        value = getattr(self, self.kind)
        if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):  # numpy's, for one
            object.__setattr__(self, self.kind, int(value) if isinstance(value, numbers.Integral) else float(value))
        elif type(value) is not float and isinstance(value, float):
            object.__setattr__(self, self.kind, float(value))
        self.absolute(1.0)  # a wrong value is refused here

    @property
    def kind(self) -> str:
        """Which quantity."""
        return next(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)

    @property
    def is_share(self) -> bool:
        """Whether it is a share of what there was."""
        value = getattr(self, self.kind)
        return isinstance(value, float) or (isinstance(value, str) and value.strip().endswith("%"))

    def absolute(self, before: float | Costs) -> float:
        """What may remain, in units of the quantity; ``before`` is what there was."""
        value = getattr(self, self.kind)
        if isinstance(before, Costs):
            before = float(getattr(before, self.kind) or 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise self._wrong(repr(value))
        if isinstance(value, int):
            if value <= 0:
                raise self._wrong(repr(value))
            return float(value)
        if isinstance(value, str):
            found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]{1,2})?)\s*(%|[a-zA-Z]*)\s*", value)
            unit = found[2].lower() if found else ""
            if found is None or (unit != "%" and unit not in _UNITS[self.kind]):
                raise self._wrong(repr(value))
            number = Fraction(found[1])
            if unit != "%":
                if number <= 0:
                    raise self._wrong(repr(value))
                return float(number) * _UNITS[self.kind][unit]
            share = number / 100
        else:
            if not math.isfinite(value):
                raise self._wrong(repr(value))
            share = Fraction(repr(value))  # 29 % of 100 are 29, not 28.999...
        if not 0 < share <= 1:
            raise self._wrong(repr(value))
        return float(share * Fraction(before))

    def _wrong(self, got: str) -> InputError:
        return InputError(
            f"{self.kind} is no target",
            expected=f"a share in (0, 1] as a float, a positive int, or a string such as {_EXAMPLES[self.kind]}",
            got=got,
            fix="say what may remain, not what is to go",
        )

    def to_json(self) -> dict[str, Any]:
        return {self.kind: getattr(self, self.kind)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Target:
        return cls(**stored)

    def __repr__(self) -> str:
        return f"Target({self.kind}={getattr(self, self.kind)!r})"
