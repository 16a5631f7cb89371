"""Sums over samples: contributions become one number per channel."""

from __future__ import annotations

from torch import Tensor

from compress.criteria._names import AGGREGATES
from lrp._settings import as_double
from lrp.errors import InputError

__all__ = ["Sums", "check_choice"]


def check_choice(what: str, value: object, known: tuple[str, ...]) -> None:
    """Raise InputError unless the value is known."""
    if value not in known:
        raise InputError(
            f"unknown {what}", expected=" or ".join(f"'{k}'" for k in known), got=repr(value), fix="choose one of these"
        )


class Sums:
    """Per channel, in float64: how contributions are added is the ``aggregate``; see :func:`lrp.collect`."""

    def __init__(self, aggregate: str) -> None:
        check_choice("aggregate", aggregate, AGGREGATES)
        self.aggregate = aggregate
        self._sums: dict[str, Tensor] = {}

    def add(self, layer: str, contributions: Tensor) -> None:
        """Contributions (samples, positions, channels) of one call of a layer; calls add up."""
        r = contributions.detach()
        if self.aggregate == "abs_element":
            r = r.abs()
        per_sample = as_double(r.sum(1))
        if self.aggregate == "abs_per_sample":
            per_sample = per_sample.abs()
        new = per_sample.sum(0)
        self._sums[layer] = self._sums[layer] + new if layer in self._sums else new

    def means(self, samples: int) -> dict[str, Tensor]:
        """Layer to (C,): the sums divided by the number of samples."""
        out = {name: t / samples for name, t in self._sums.items()}
        return {name: t.abs() for name, t in out.items()} if self.aggregate == "abs_total" else out
