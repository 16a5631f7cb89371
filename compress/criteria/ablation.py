"""The drop itself: ground truth for small networks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from compress._data import batches_of, labels_of
from compress.criteria._base import Base, choose, frozen_copy
from compress.criteria.gradients import _check_labels, _output, _places
from compress.criteria.scores import Scores, width_of

__all__ = ["ablation"]


class _Ablation(Base):
    needs_labels = True

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
        batches = [(b, labels_of(b, self.name)) for b in batches_of(data, device)]
        count = sum(len(y) for _, y in batches)
        silent: dict[str, int] = {}

        def hook(layer: str) -> Any:
            def silence(module: nn.Module, given: Any, output: Any) -> Any:
                if layer not in silent or not isinstance(output, Tensor):
                    return None
                out = output.clone()
                axis = out.dim() - 1 if isinstance(module, nn.Linear) else 1
                out.select(axis, silent[layer]).zero_()
                return out

            return silence

        for layer, place in places.items():
            twin.get_submodule(place).register_forward_hook(hook(layer))

        def value() -> Tensor:
            parts = []
            with torch.no_grad():
                for batch, y in batches:
                    logits = _output(twin, batch).double()
                    y = _check_labels(logits, y)
                    if self.settings["drop_of"] == "logit":
                        parts.append(logits.gather(1, y[:, None])[:, 0])
                    else:
                        parts.append(-F.cross_entropy(logits, y, reduction="none"))
            return torch.cat(parts)

        base = value()
        values = {}
        total = sum(width_of(model.get_submodule(name)) for name in layers)
        quiet = not (progress and sys.stderr.isatty())
        with tqdm(total=total, desc=self.name, disable=quiet, leave=False) as bar:
            for name in layers:
                drops = []
                for j in range(width_of(model.get_submodule(name))):
                    silent[name] = j
                    drops.append((base - value()).mean())
                    bar.update()
                silent.clear()
                values[name] = torch.stack(drops)
        return Scores(values, {}, self.name, self.settings, count)


def ablation(drop_of: str = "loss") -> Base:
    """Mean drop when a single filter is silenced behind its batch norm; one pass over the data per filter.

    Parameters
    ----------
    drop_of : "loss" or "logit"
        Rise of the cross-entropy, or fall of the label's logit.
    """
    return _Ablation("ablation", {"drop_of": choose("drop_of", drop_of, ("loss", "logit"))})
