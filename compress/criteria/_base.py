"""What criteria share: their arguments, aggregates, and the walk over the data."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compress._data import batches_of, check_reiterable, device_of
from compress.criteria.scores import Scores
from lrp._batches import Batch
from lrp.errors import InputError

__all__ = ["AGGREGATES", "Base", "aggregated", "choose", "frozen_copy"]

AGGREGATES = ("abs_per_sample", "abs_element", "abs_total", "signed")


def choose(name: str, value: Any, known: Sequence[str]) -> str:
    """The value, if it is one of those known.

    Raises
    ------
    InputError
    """
    if value not in known:
        raise InputError(
            f"{name} is not known",
            expected=" or ".join(f"'{k}'" for k in known),
            got=repr(value),
            fix="choose one of these",
        )
    return str(value)


def aggregated(r: Tensor, aggregate: str) -> Tensor:
    """(N, C, positions) to (C,) in float64; the magnitude of "abs_total" is taken at the end."""
    r = r.double()
    if aggregate == "abs_element":
        return r.abs().sum((0, 2))
    if aggregate == "abs_per_sample":
        return r.sum(2).abs().sum(0)
    return r.sum((0, 2))


def channels_first(t: Tensor, module: nn.Module) -> Tensor:
    """An output as (N, C, positions): linear layers hold their channels last."""
    if isinstance(module, nn.Linear):
        t = t.movedim(-1, 1) if t.dim() > 2 else t
    return t.reshape(t.shape[0], t.shape[1], -1)


def frozen_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in evaluation mode without gradients of its weights; no hook of ours ever touches the user's model."""
    twin = copy.deepcopy(model).to(device).eval()
    for p in twin.parameters():
        p.requires_grad_(False)
    return twin


class Base:
    """A criterion with settings; sub-classes say how scores come about."""

    needs_data = True
    needs_labels = False

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.settings: Mapping[str, Any] = dict(settings)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"

    def __call__(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        *,
        device: torch.device | str | None = None,
        progress: bool = True,
        structure: Any = None,
        example_inputs: Any = None,
    ) -> Scores:
        """Scores of the layers named; see :class:`compress.criteria.Criterion`."""
        modules = dict(model.named_modules())
        for layer in layers:
            if layer not in modules:
                raise InputError(
                    f"there is no layer '{layer}'",
                    expected="names of the model's modules",
                    got=repr(layer),
                    fix="see print(model)",
                )
        if self.needs_data:
            check_reiterable(data, f"data for {self.name}")
        return self.scored(model, data, layers, device_of(model, device), progress, structure, example_inputs)

    def scored(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        device: torch.device,
        progress: bool,
        structure: Any,
        example_inputs: Any,
    ) -> Scores:
        raise NotImplementedError

    def batches(self, data: Any, device: torch.device, progress: bool) -> Iterator[Batch]:
        """Batches on the device, with a bar on a terminal."""
        quiet = not (progress and sys.stderr.isatty())
        total = len(data) if hasattr(data, "__len__") else None
        yield from tqdm(batches_of(data, device), desc=self.name, total=total, disable=quiet, leave=False)
