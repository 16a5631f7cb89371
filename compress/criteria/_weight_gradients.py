"""Gradients of a loss with respect to the weights of layers, summed or sample by sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress._data import outputs_of
from compress.criteria._layers import owned_weight
from compress.criteria._reading import Objective
from compress.criteria._task import Task
from lrp._batches import Batch, rows

__all__ = ["COMPUTED", "weight_gradients"]

COMPUTED = "its weight is computed from other parameters, or no gradient of the loss reaches it"


def weight_gradients(task: Task, objective: Objective, *, per_sample: bool) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(samples, {layer: gradient of the sum of their losses}) for every sample, or for every batch.

    Layers of a re-used module or a shared weight get the whole gradient of the
    weight; those that no gradient reaches are left out.
    """
    weights = {name: w for name, m in task.twins.items() if (w := owned_weight(m)) is not None}
    for w in weights.values():
        w.requires_grad_(True)
    for batch in task.batches():
        n = batch.inputs[0].shape[0]
        for i in range(n) if per_sample else (None,):
            part = batch if i is None else Batch(rows(batch.x, i), None if batch.y is None else batch.y[i : i + 1])
            with torch.enable_grad():
                wanted = objective(outputs_of(task.twin, part.inputs), part).sum()
                found: tuple[Tensor | None, ...] = (None,) * len(weights)
                if wanted.requires_grad:
                    found = torch.autograd.grad(wanted, list(weights.values()), allow_unused=True)
            yield 1 if per_sample else n, {k: g for k, g in zip(weights, found, strict=True) if g is not None}
