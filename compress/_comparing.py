"""What is compared: criteria by name, normalisations, treatments, and the reference samples of every draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress._reference import Pool, fingerprint, pool_of
from compress.ranking import NORMALISATIONS
from lrp.errors import InputError

__all__ = ["BASELINES", "Cell", "ReferenceSets", "cells_of", "named", "normalisations_of", "treatments_of"]

BASELINES = ("random", "weight", "activation")


@dataclass(frozen=True)
class ReferenceSets:
    """Reference samples of every draw."""

    data: Any
    per_class: int | None
    draws: int
    seed: int
    batch_size: int
    _pool: Pool | None = field(init=False)

    def __post_init__(self) -> None:
        pool = None
        if self.per_class is not None:
            pool = pool_of(self.data)
            pool.check([self.per_class], True)
        object.__setattr__(self, "_pool", pool)

    def of(self, draw: int) -> Any:
        if self._pool is None or self.per_class is None:
            return self.data
        own = draw if self.differ else 0
        return self._pool.batches(self._pool.draw(self.per_class, (self.seed, 0, own), True), self.batch_size)

    @property
    def common(self) -> float:
        """Expected share of samples that two draws have in common."""
        return 1.0 if self._pool is None or self.per_class is None else self._pool.common(self.per_class, True)

    @property
    def differ(self) -> bool:
        return self.common < 1

    def fingerprint(self) -> list[Any]:
        return fingerprint(self.data if self._pool is None else self._pool.batches(range(self._pool.count)))


def named(criteria: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Criteria by name, the baselines among them."""
    out: dict[str, Any] = {}
    if isinstance(criteria, Mapping):
        out = {str(name): spec for name, spec in criteria.items()}
    else:
        for spec in (criteria,) if isinstance(criteria, str) or callable(criteria) else criteria:
            name = spec if isinstance(spec, str) else getattr(spec, "name", getattr(spec, "__name__", "criterion"))
            if name in out:
                raise InputError(
                    f"two criteria are named '{name}'",
                    expected="names that differ",
                    got=repr(name),
                    fix="pass criteria={'first': ..., 'second': ...}",
                )
            out[name] = spec
    for name in BASELINES:
        out.setdefault(name, name)
    return out


def normalisations_of(
    given: str | Sequence[str] | Mapping[str, str | Sequence[str]], names: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    def some(value: str | Sequence[str]) -> tuple[str, ...]:
        return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))

    held = {str(k): some(v) for k, v in given.items()} if isinstance(given, Mapping) else {"*": some(given)}
    strange = [k for k in held if k != "*" and k not in names]
    wrong = [v for row in held.values() for v in row if v not in NORMALISATIONS]
    if strange or wrong or not all(held.values()):
        raise InputError(
            "normalisations make no sense",
            expected=f"among {NORMALISATIONS}, or a dictionary to these from {[*names, '*']}",
            got=repr(given),
            fix="name a criterion of this comparison and one of the normalisations",
        )
    return {name: held.get(name, held.get("*", ("none",))) for name in names}


def treatments_of(given: bool | Sequence[bool]) -> tuple[bool, ...]:
    found = (given,) if isinstance(given, bool) else tuple(dict.fromkeys(given))
    if not found or not all(isinstance(t, bool) for t in found):
        raise InputError(
            "reestimate_batchnorm is neither true nor false", expected="a bool, or both", got=repr(given), fix="choose"
        )
    return found


Cell = tuple[str, str, bool, int, float]


def cells_of(
    names: Mapping[str, Any],
    wanted: Mapping[str, tuple[str, ...]],
    treatments: Sequence[bool],
    draws: int,
    rates: Sequence[float],
) -> Iterator[Cell]:
    for name in names:
        for draw in range(draws):
            for how in wanted[name]:
                for bn in treatments:
                    for rate in rates:
                        yield name, how, bn, draw, rate
