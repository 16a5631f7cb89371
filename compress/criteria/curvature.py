"""Second-order criteria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.criteria._base import Base
from compress.criteria.gradients import weight_gradients
from compress.criteria.scores import Scores
from compress.criteria.weights import filters_of

__all__ = ["hessian"]


class _Hessian(Base):
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
        squares: dict[str, Tensor] = {}
        count = 0
        for gradients, n in weight_gradients(self, model, data, layers, device, progress, per_sample=True):
            count += n
            for name, (_, g) in gradients.items():
                squares[name] = squares[name] + g.square() if name in squares else g.square()
        values = {}
        for name, total in squares.items():
            values[name] = (
                0.5 * (filters_of(model.get_submodule(name)).square().to(total.device) * total).sum(1) / count
            )
        unscored = {name: "the loss does not depend on it" for name in layers if name not in values}
        return Scores(values, unscored, self.name, self.settings, count)


def hessian() -> Base:
    """Optimal brain damage with the diagonal Fisher matrix: sum over a filter of w² E[g²] / 2.

    LeCun et al. 1989, eq. 5, with the second derivative replaced by the mean
    square of the per-sample gradients of the cross-entropy. One pass per
    sample.
    """
    return _Hessian("hessian", {})
