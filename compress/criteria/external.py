"""Other libraries' scores by name, where they are installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress._data import batches_of, labels_of
from compress.criteria._base import AGGREGATES, Base, aggregated, channels_first, choose, frozen_copy
from compress.criteria.gradients import _places
from compress.criteria.scores import Scores
from lrp.errors import InputError, MissingDependencyError

__all__ = ["captum", "torch_pruning"]


class _Captum(Base):
    needs_labels = True

    def __init__(self, method: str, aggregate: str) -> None:
        try:
            from captum import attr
        except ImportError as error:
            raise MissingDependencyError(
                "captum is not installed",
                expected="captum",
                got="no such package",
                fix="pip install 'neuralize[captum]'",
            ) from error
        known = [n for n in dir(attr) if n.startswith(("Layer", "Internal"))]
        self._method = getattr(attr, choose("method", method, known))
        super().__init__(f"captum {method}", {"aggregate": choose("aggregate", aggregate, AGGREGATES)})

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
        places = _places(model, layers, "output", data, device)
        twin = frozen_copy(model, device)
        values: dict[str, Tensor] = {}
        count = 0
        for batch in self.batches(data, device, progress):
            y = labels_of(batch, self.name)
            count += len(y)
            inputs = batch.inputs if len(batch.inputs) > 1 else batch.inputs[0]
            for name in layers:
                module = twin.get_submodule(places[name])
                with torch.enable_grad():
                    method = self._method(twin, module)
                    options = {"relu_attributions": False} if "GradCam" in type(method).__name__ else {}
                    r = method.attribute(inputs, target=y, **options)
                r = r[0] if isinstance(r, tuple) else r
                own = aggregated(channels_first(r.detach(), module), self.settings["aggregate"])
                values[name] = values[name] + own if name in values else own
        if self.settings["aggregate"] == "abs_total":
            values = {name: t.abs() for name, t in values.items()}
        widths = {n: t for n, t in values.items() if t.shape[0] == len(model.get_submodule(n).weight)}  # type: ignore[arg-type]  # untyped attribute
        left = {n: "captum returns one map for the whole layer" for n in values if n not in widths}
        return Scores({n: t / count for n, t in widths.items()}, left, self.name, self.settings, count)


def captum(method: str, aggregate: str = "abs_per_sample") -> Base:
    """A layer attributor of captum: "LayerConductance", "LayerGradientXActivation", "InternalInfluence", ...

    Raises
    ------
    MissingDependencyError
    """
    return _Captum(method, aggregate)


class _TorchPruning(Base):
    def __init__(self, importance: str) -> None:
        import torch_pruning as tp

        known = [n for n in dir(tp.importance) if n.endswith("Importance") and n != "Importance"]
        self._class = getattr(tp.importance, choose("importance", importance, known))
        super().__init__(f"torch-pruning {importance}", {})
        self.needs_data = self.needs_labels = "Taylor" in importance or "Hessian" in importance

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
        from compress._dependencies import importance_scores

        if structure is None or example_inputs is None:
            raise InputError(
                f"{self.name} scores groups of coupled layers",
                expected="structure and example_inputs",
                got="None",
                fix="call compress.score or compress.plan_pruning",
            )
        importance = self._class()
        count = sum(len(b.inputs[0]) for b in batches_of(data)) if self.needs_data else 0

        def loss(twin: nn.Module) -> None:
            twin.to(device)
            per_sample = hasattr(importance, "accumulate_grad")
            for batch in self.batches(data, device, progress):
                y = labels_of(batch, self.name)
                parts = range(len(y)) if per_sample else (slice(None),)
                for k in parts:
                    part = slice(k, k + 1) if isinstance(k, int) else k
                    if per_sample:
                        twin.zero_grad()
                    F.cross_entropy(twin(*(t[part] for t in batch.inputs)), y[part], reduction="sum").backward()
                    if per_sample:
                        importance.accumulate_grad(twin)
            twin.to("cpu")

        values = importance_scores(model, example_inputs, importance, structure, loss if self.needs_data else None)
        return Scores(values, {}, self.name, self.settings, count, "group")


def torch_pruning(importance: str) -> Base:
    """An importance of torch-pruning, as it is: "LAMPImportance", "GroupTaylorImportance", ...

    Their Taylor form is |w dL/dw| of the summed loss, not that of activations;
    their Hessian keeps the last sample only. Scores are of whole groups.
    """
    return _TorchPruning(importance)
