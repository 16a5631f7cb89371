"""Options of the command line, as the user typed them, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress._pictures import Pictures, parse_shape, read_pictures
from compress._sources import read_model
from compress.target import Target
from lrp.errors import InputError

__all__ = ["Network", "Pruning", "Ranked", "Samples", "shares_of", "target_of"]


@dataclass(frozen=True)
class Network:
    """The network, as the user named it."""

    model: str
    weights: Path | None = None
    input_shape: str | None = None
    device: str | None = None

    def read(self) -> nn.Module:
        return read_model(self.model, self.weights, self.device)

    def example(self, samples: Samples) -> Any:
        """One input: noise of the shape given, or the first sample."""
        if self.input_shape is not None:
            shape = parse_shape(self.input_shape)
            return torch.randn(1, *shape, generator=torch.Generator().manual_seed(samples.seed))
        for pictures in (samples.pictures, samples.steering, samples.testing):
            if pictures is not None:
                return pictures.example
        raise InputError(
            "the shape of an input is not known",
            expected="--input-shape, or samples to take it from",
            got="neither",
            fix="for example --input-shape 3,224,224",
        )


@dataclass(frozen=True)
class Samples:
    """Where samples come from, as the user typed it."""

    data: str | None = None
    validation: str | None = None
    test: str | None = None
    per_class: int = 10
    size: str | None = None
    mean: str | None = None
    std: str | None = None
    grey: bool = False
    batch_size: int = 64
    seed: int = 0

    def _read(self, spec: str | None, option: str) -> Pictures | None:
        if spec is None:
            return None
        return read_pictures(spec, size=self.size, mean=self.mean, std=self.std, grey=self.grey, option=option)

    @cached_property
    def pictures(self) -> Pictures | None:
        return self._read(self.data, "--data")

    @cached_property
    def testing(self) -> Pictures | None:
        return self._read(self.test, "--test-data")

    @cached_property
    def steering(self) -> Pictures | None:
        """What decisions may be taken by: validation samples, or, for want of them, test samples."""
        return self._read(self.validation, "--validation-data") or self.testing

    @property
    def reference(self) -> Any:
        """What channels are ranked by; None without data."""
        if self.pictures is None:
            return None
        if not self.per_class:
            return self.pictures.batches(self.batch_size)
        return self.pictures.few(self.per_class, self.seed, self.batch_size)

    def names(self, pictures: Pictures) -> tuple[str, ...] | None:
        return pictures.classes or None


@dataclass(frozen=True)
class Ranked:
    """Options of the ranking, as the user typed them."""

    criterion: str = "lrp"
    normalisation: str | None = None
    scope: str | None = None
    round_to: str | None = None
    floor: Sequence[str] = ()
    protect: Sequence[str] = ()

    def options(self) -> dict[str, Any]:
        """For plan_pruning; what was not given is left out."""
        given = {
            "normalisation": self.normalisation,
            "scope": self.scope,
            "round_to": None if self.round_to is None else _number(self.round_to),
            "floor": _floors(self.floor),
            "protect": tuple(self.protect),
        }
        return {name: value for name, value in given.items() if value is not None and value != ()}


@dataclass(frozen=True)
class Pruning:
    """Options of the command prune alone."""

    target: str
    steps: int = 1
    epochs: int = 0
    rate: float = 0.01
    distill: bool = False
    accuracy_floor: float | None = None
    resume: Path | None = None
    onnx: bool = False
    baselines: bool = True
    rivals: bool = False


# ---------------------------------------------------------------------- as typed


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
            "--target is none",
            expected="channels, macs, params, bytes or latency_ms, then =, then a share or a number with a unit",
            got=text,
            fix="for example --target macs=0.5, which keeps half of the multiply-adds",
        )
    return Target(**{kind.strip(): _number(value.strip())})


def shares_of(text: str) -> tuple[float, ...]:
    found = [_number(part) for part in text.split(",")]
    if not all(isinstance(share, (int, float)) for share in found):
        raise InputError(
            "--rates are no shares", expected="numbers in [0, 1), separated by commas", got=text, fix="--rates 0.3,0.5"
        )
    return tuple(float(share) for share in found)
