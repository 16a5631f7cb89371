"""A user's function as a criterion."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from compress.criteria._names import near
from compress.criteria._task import Found, Measure, Task
from compress.cutting import width_of
from lrp.errors import InputError

__all__ = ["Given"]


class Given(Measure):
    """A callable ``f(model, data) -> {layer: scores (C,)}``.

    It is given a copy of the network in evaluation mode, and the data as they
    are. Layers it leaves out, or gives None for, are not scored; scores of
    modules that nobody asked for are left aside.
    """

    needs_data = False

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    @property
    def settings(self) -> dict[str, Any]:
        where = getattr(self.function, "__module__", "")
        return {"function": f"{where}.{getattr(self.function, '__qualname__', type(self.function).__qualname__)}"}

    def _score(self, task: Task) -> Found:
        try:
            inspect.signature(self.function).bind(task.model, task.data)
        except TypeError as error:
            raise InputError(
                f"criterion '{self.name}' can not be called with a network and data",
                expected="f(model, data) -> {layer name: scores (C,)}",
                got=f"{self.name}{inspect.signature(self.function)}",
                fix="let it take both, used or not",
            ) from error
        except ValueError:  # a builtin without a signature
            pass
        twin = copy.deepcopy(task.model).to(task.device).eval()
        with torch.enable_grad():
            found = self.function(twin, task.data)
        form = "{layer name: scores (C,)}"
        if not isinstance(found, Mapping):
            raise InputError(
                f"criterion '{self.name}' returned no dictionary", expected=form, got=type(found).__name__, fix="do so"
            )
        modules = dict(task.model.named_modules(remove_duplicate=False))
        unknown = [str(key) for key in found if key not in modules]
        if unknown:
            raise InputError(
                f"criterion '{self.name}' scored a layer that does not exist: '{unknown[0]}'",
                expected=f"{form}, with names of model.named_modules()",
                got=f"{len(unknown)} unknown names",
                fix=near(unknown[0], task.layers, f"layers to score are {', '.join(task.layers)[:300]}"),
            )
        if task.layers and not any(found.get(name) is not None for name in task.layers):
            raise InputError(
                f"criterion '{self.name}' scored none of the layers",
                expected=f"scores of {', '.join(task.layers)[:300]}",
                got=", ".join(map(str, found))[:300] or "an empty dictionary",
                fix="return the scores of convolutions and linear layers whose channels can be removed",
            )
        values = {}
        for name, module in task.layers.items():
            if found.get(name) is None:
                continue
            try:
                t = torch.as_tensor(found[name]).detach()
            except (TypeError, ValueError, RuntimeError) as error:
                raise self._wrong(name, width_of(module), type(found[name]).__name__) from error
            if tuple(t.shape) != (width_of(module),) or t.is_complex():
                raise self._wrong(name, width_of(module), f"shape {tuple(t.shape)}, {t.dtype}")
            values[name] = t
        return Found(values, otherwise=f"{self.name} gives it no score")

    def _wrong(self, layer: str, width: int, got: str) -> InputError:
        return InputError(
            f"criterion '{self.name}': the scores of '{layer}' do not fit its channels",
            expected=f"{width} numbers, one per output channel",
            got=got,
            fix="sum over samples, positions and the weights of each filter",
        )
