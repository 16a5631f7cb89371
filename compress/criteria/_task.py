"""What is the same for all criteria: their arguments, a frozen copy of the network, one pass over the data."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from compress._data import batches_of, check_reiterable, device_of
from compress._network import check_values
from compress.criteria._layers import check_layers
from compress.criteria.scores import Scores
from compress.cutting import width_of
from lrp._batches import Batch
from lrp.errors import InputError

if TYPE_CHECKING:
    from compress.groups import Structure

__all__ = ["Found", "Measure", "Task"]


@dataclass(eq=False)
class Task:
    """The arguments of a criterion, checked.

    ``model`` is the user's and only read; ``twin`` is a copy in evaluation
    mode, frozen, on the device.
    """

    name: str
    model: nn.Module
    layers: dict[str, nn.Module]
    data: Any
    device: torch.device
    progress: bool
    structure: Structure | None
    example_inputs: Any

    @cached_property
    def twin(self) -> nn.Module:
        out = copy.deepcopy(self.model).to(self.device).eval()
        for p in out.parameters():
            p.requires_grad_(False)
            p.grad = None
        return out

    @cached_property
    def twins(self) -> dict[str, nn.Module]:
        """The layers of the copy."""
        return check_layers(self.twin, self.layers)

    @cached_property
    def example(self) -> tuple[Any, ...]:
        """What the network is called with: the example inputs, or the first sample.

        Raises
        ------
        InputError
            If there are neither.
        """
        from compress.groups import as_inputs

        if self.example_inputs is not None:
            given = as_inputs(self.example_inputs)
            return tuple(t.to(self.device) if isinstance(t, Tensor) else t for t in given)
        if self.data is None:
            raise InputError(
                f"criterion '{self.name}' has to call the network once",
                expected="example_inputs or data",
                got="neither",
                fix="pass example_inputs, for example torch.randn(1, 3, 224, 224)",
            )
        return tuple(t[:1] for t in next(batches_of(self.data, self.device)).inputs)

    def batches(self) -> Iterator[Batch]:
        """The data on the device, with a progress bar."""
        from tqdm import tqdm

        try:
            total = len(self.data)
        except TypeError:
            total = None
        hidden = None if self.progress else True  # None: hidden off a terminal
        for batch in tqdm(
            batches_of(self.data, self.device), total=total, desc=self.name, unit="batch", disable=hidden
        ):
            x = tuple(_plain(t) for t in batch.inputs)
            yield Batch(x if isinstance(batch.x, tuple) else x[0], None if batch.y is None else _plain(batch.y))


def _plain(t: Tensor) -> Tensor:
    """Without a graph of its own, and fit for one."""
    return t.clone() if t.is_inference() else t.detach()


@dataclass
class Found:
    """What a criterion found out; layers it does not name get the reason ``otherwise``."""

    values: dict[str, Tensor]
    unscored: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    level: str = "layer"
    otherwise: str = "it was never called as a layer"


class Measure(ABC):
    """Base of the criteria of this package."""

    needs_data: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]: ...

    @property
    def needs_labels(self) -> bool:
        return False

    def __call__(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        *,
        device: torch.device | str | None = None,
        progress: bool = True,
        structure: Structure | None = None,
        example_inputs: Any = None,
    ) -> Scores:
        """Scores of the layers; see :class:`compress.criteria.Criterion`."""
        if not isinstance(model, nn.Module):
            raise InputError(
                "the model is not an nn.Module",
                expected="a torch.nn.Module",
                got=type(model).__name__,
                fix="pass the network itself",
            )
        check_values(model)
        if data is not None:
            check_reiterable(data)
        elif self.needs_data:
            raise InputError(
                f"criterion '{self.name}' needs data",
                expected="a DataLoader or a list of batches (x, y) or x",
                got="None",
                fix="pass a few samples, for example [(x, y)], or choose a criterion of the weights, such as 'weight'",
            )
        known = check_layers(model, layers)
        task = Task(self.name, model, known, data, device_of(model, device), progress, structure, example_inputs)
        with torch.inference_mode(False), torch.no_grad():
            found = self._score(task)
        values, unscored = found.values, found.unscored
        if found.level == "layer":
            first = {module: name for name, module in reversed(known.items())}  # a module may have several names
            named = {name: first[module] for name, module in known.items()}
            values = {name: found.values[other] for name, other in named.items() if other in found.values}
            left = {name: other for name, other in named.items() if name not in values}
            unscored = {name: found.unscored.get(other, found.otherwise) for name, other in left.items()}
        scores = Scores(values, unscored, self.name, self.settings, found.samples, found.level)
        if found.level == "group":
            return scores
        return scores.check({name: width_of(module) for name, module in known.items()})

    @abstractmethod
    def _score(self, task: Task) -> Found: ...

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        return f"{self.name}({inside})"
