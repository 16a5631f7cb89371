"""Weights alone: norms of filters, distances between them, scales of batch norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.criteria._layers import filters
from compress.criteria._paths import Norm, follow
from compress.criteria._sums import check_choice
from compress.criteria._task import Found, Measure, Task
from compress.criteria.scores import Criterion
from lrp._settings import as_double

__all__ = ["batchnorm_scale", "fpgm", "weight"]

NO_NORM = "no batch norm reads its output alone"
SEVERAL = "its uses have different batch norms"


def _norms(task: Task) -> tuple[dict[str, Norm], dict[str, str]]:
    """The one batch norm of every layer that has one, and reasons for the others."""
    found: dict[str, list[Norm | None]] = {}
    for (name, _), path in follow(task.twin, task.twins, task.example).items():
        found.setdefault(name, []).append(path.norm)
    norms, reasons = {}, {}
    for name, held in found.items():
        first = held[0]
        if first is None and all(n is None for n in held):
            reasons[name] = NO_NORM
        elif first is None or any(n is None or n.weight is not first.weight or n.eps != first.eps for n in held):
            reasons[name] = SEVERAL
        else:
            norms[name] = first
    return norms, reasons


@dataclass(frozen=True, repr=False)
class _Weight(Measure):
    norm: str
    fold: str | None
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("l1", "l2"))
        if self.fold is not None:
            check_choice("fold", self.fold, ("bn",))

    @property
    def name(self) -> str:
        return f"weight:{self.norm}" + (":bn" if self.fold else "")

    @property
    def settings(self) -> dict[str, Any]:
        return {"norm": self.norm, "fold": self.fold}

    def _score(self, task: Task) -> Found:
        values = {}
        norms, reasons = _norms(task) if self.fold else ({}, {})
        unscored = {name: why for name, why in reasons.items() if why != NO_NORM}
        for name, module in task.layers.items():
            if name in unscored:
                continue
            rows = as_double(filters(module))
            size = rows.abs().sum(1) if self.norm == "l1" else rows.square().sum(1).sqrt()
            if name in norms:
                scale = _scale(norms[name])
                if scale is None:
                    unscored[name] = "its batch norm has no fixed statistics to fold in"
                    continue
                size = size * scale.to(size.device)
            values[name] = size
        return Found(values, unscored)


def _scale(norm: Norm) -> Tensor | None:
    """|gamma| / sqrt(variance + eps): what folding multiplies the filter with."""
    if norm.variance is None:
        return None
    scale = (as_double(norm.variance) + norm.eps).rsqrt()
    return scale if norm.weight is None else as_double(norm.weight.detach()).abs() * scale


class _BatchNormScale(Measure):
    needs_data: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "batchnorm_scale"

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def _score(self, task: Task) -> Found:
        norms, reasons = _norms(task)
        values = {name: n.weight.detach().abs() for name, n in norms.items() if n.weight is not None}
        return Found(values, {**reasons, **{n: "its batch norm has no scale" for n in norms if n not in values}})


class _FPGM(Measure):
    needs_data: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "fpgm"

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def _score(self, task: Task) -> Found:
        values: dict[str, Tensor] = {}
        for name, module in task.layers.items():
            rows = as_double(filters(module))
            # by differences: expanded squares would cancel between filters that are alike
            values[name] = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
        return Found(values)


def weight(norm: str = "l1", fold: str | None = None) -> Criterion:
    r"""Norm of the filter: :math:`\sum_k|w_k|` or :math:`(\sum_k w_k^2)^{1/2}` over its weights.

    Source: Li et al. 2017, "Pruning filters for efficient ConvNets", arXiv
    1608.08710.

    Parameters
    ----------
    norm : str
        "l1" or "l2".
    fold : str, optional
        "bn" multiplies by :math:`|\gamma|/\sqrt{v+\epsilon}` of the batch norm
        that alone reads the layer: the filter as it works. Needs
        ``example_inputs`` or data, since what follows a layer is seen in a
        forward pass. Layers without batch norm stay as they are.

    Returns
    -------
    Criterion

    Notes
    -----
    The bias does not count. Convolutions of any dimension, grouped or
    transposed, and linear layers; O(weights).

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0], [0.0, 0.5]]))
    >>> weight()(torch.nn.Sequential(layer), None, ["0"]).values["0"].tolist()
    [3.0, 0.5]
    """
    return _Weight(norm, fold)


def batchnorm_scale() -> Criterion:
    r"""Magnitude of the scale of the batch norm that alone reads the layer, :math:`|\gamma|`.

    Source: Liu et al. 2017, "Learning efficient convolutional networks through
    network slimming", arXiv 1708.06519. Layers without one are not scored.

    Returns
    -------
    Criterion

    Notes
    -----
    Needs ``example_inputs`` or data: what follows a layer is seen in a forward
    pass.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    >>> print(batchnorm_scale()(net, None, ["0", "3"], example_inputs=torch.zeros(1, 1, 4, 4)))
    batchnorm_scale
    layer  channels  lowest  median  highest
    0             4       1       1        1
    3: no score (no batch norm reads its output alone)
    """
    return _BatchNormScale()


def fpgm() -> Criterion:
    r"""Sum of the distances of a filter to the others of its layer, :math:`\sum_j\|w_i-w_j\|_2`.

    A filter near the geometric median can be replaced by the others. Source:
    He et al. 2019, "Filter pruning via geometric median", arXiv 1811.00250.

    Returns
    -------
    Criterion

    Notes
    -----
    O(C^2 K) for C filters of K weights.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(1, 3)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.0], [1.0], [5.0]]))
    >>> fpgm()(torch.nn.Sequential(layer), None, ["0"]).values["0"].tolist()
    [6.0, 5.0, 9.0]
    """
    return _FPGM()
