"""What a command is asked for, as the user typed it: a ranking, a target, what pruning and quantizing take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrp.errors import InputError

if TYPE_CHECKING:
    from compress.target import Target

__all__ = ["Pruning", "Quantizing", "Ranked", "Training", "shares_of", "target_of"]

# no heavy imports: --help must answer at once


@dataclass(frozen=True)
class Ranked:
    """How channels are ranked."""

    criterion: str = "lrp"
    normalisation: str | None = None
    scope: str | None = None
    round_to: str | None = None
    floor: Sequence[str] = ()
    protect: Sequence[str] = ()
    meter: str | None = None

    @cached_property
    def scorer(self) -> Any:
        """A criterion's name, or a function."""
        from compress._sources import read_criterion

        return read_criterion(self.criterion)

    @property
    def scorers(self) -> list[Any]:
        """Of a list of criteria."""
        from compress._sources import read_criterion

        return [read_criterion(part.strip()) for part in self.criterion.split(",") if part.strip()]

    @cached_property
    def clock(self) -> Any:
        """The user's meter; None without one."""
        from compress._sources import read_meter

        return read_meter(self.meter)

    def options(self) -> dict[str, Any]:
        """For plan_pruning; what was not given is left out."""
        given = {
            "normalisation": self.normalisation,
            "scope": self.scope,
            "round_to": None if self.round_to is None else _number(self.round_to),
            "floor": _floors(self.floor),
            "protect": tuple(self.protect),
            "meter": self.clock,
        }
        return {name: value for name, value in given.items() if value is not None and value != ()}


@dataclass(frozen=True)
class Training:
    """What happens to a network that was cut."""

    epochs: int = 0
    rate: float = 0.01
    distill: bool = False
    accuracy_floor: float | None = None
    reestimate: bool = True


@dataclass(frozen=True)
class Pruning:
    """What concerns the command prune alone."""

    target: Target
    steps: int = 1
    training: Training = Training()
    resume: Path | None = None
    onnx: bool = False
    baselines: bool = True
    rivals: bool = False


@dataclass(frozen=True)
class Quantizing:
    """What concerns the command quantize alone."""

    method: str = "ecq"
    bits: Sequence[str] = ()
    gamma: float | None = None
    zeros: float | None = None
    bits_per_weight: float | None = None
    target: Target | None = None
    epochs: int = 10
    rate: float = 1e-3
    distill: bool = False
    relevance_at: str | None = None
    every: int | None = None
    first: str = "8"
    last: str = "8"
    exclude: Sequence[str] = ()
    allow_collapse: bool = False
    forms: bool = True
    controls: int = 0
    resume: Path | None = None

    @property
    def widths(self) -> int | dict[str, int]:
        """Bits for all, or by pattern."""
        found = _floors(self.bits)
        many = found if isinstance(found, dict) else {"": found}
        if found is not None and not all(isinstance(b, int) for b in many.values()):
            raise InputError(
                "--bits make no sense",
                expected="whole numbers, 2 to 8",
                got=" ".join(self.bits),
                fix="for example --bits 4",
            )
        if isinstance(found, dict) and "*" in found:  # the first pattern that fits decides
            found["*"] = found.pop("*")
        return 4 if found is None else found

    def end(self, which: str) -> int | str | None:
        """Bits of the first or last layer."""
        text = getattr(self, which)
        if text == "same":
            return None
        found = _number(text)
        if isinstance(found, int) or found == "float":
            return found
        raise InputError(
            f"--{which} makes no sense", expected="2 to 8, float or same", got=text, fix=f"for example --{which} 8"
        )


def _number(text: str) -> float | int | str:
    """A float where there is a point, an int where there are digits, else the text."""
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        return text


def _floors(given: Sequence[str]) -> Any:
    """One value for all groups, or a dictionary of patterns."""
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return _number(given[0])
    out = {}
    for text in given:
        pattern, _, value = text.rpartition("=")
        out[pattern or "*"] = _number(value)
    return out


def target_of(text: str) -> Target:
    """``macs=0.5`` as a target.

    Raises
    ------
    InputError

    Examples
    --------
    >>> target_of("macs=0.5"), target_of("bytes=300KiB")
    (Target(macs=0.5), Target(bytes='300KiB'))
    """
    kind, _, value = text.partition("=")
    if kind.strip() not in ("channels", "macs", "params", "bytes", "latency_ms") or not value.strip():
        raise InputError(
            "--target makes no sense",
            expected="channels, macs, params, bytes or latency_ms, then =, then a share or a number with a unit",
            got=text,
            fix="for example --target macs=0.5, which keeps half of the multiply-adds",
        )
    from compress.target import Target

    return Target(**{kind.strip(): _number(value.strip())})


def shares_of(text: str) -> tuple[float, ...]:
    found = [_number(part) for part in text.split(",")]
    if not all(isinstance(share, (int, float)) for share in found):
        raise InputError(
            "--rates are no shares", expected="numbers in [0, 1), separated by commas", got=text, fix="--rates 0.3,0.5"
        )
    return tuple(float(share) for share in found)
