"""Scores of channels by definition: one sample, one call of a layer, one channel, one weight at a time, float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Maps = list[list[Tensor]]  # samples x calls, each (C, positions)


class Probe(nn.Module):
    """A module with a zero added to its output, whose gradient is that of the output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.values, self.zeros = inner, [], []
        self.silent: int | None = None
        self.axis = -1 if isinstance(inner, nn.Linear) else 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        zero = torch.zeros_like(y).requires_grad_()
        self.values.append(y.detach().clone())
        self.zeros.append(zero)
        if self.silent is not None:
            kept = [c for c in range(y.shape[self.axis]) if c != self.silent]
            mask = torch.zeros(y.shape[self.axis], dtype=y.dtype)
            mask[kept] = 1
            shape = [1] * y.dim()
            shape[self.axis] = -1
            y = y * mask.reshape(shape)
        return y + zero


def probed(model: nn.Module, place: str) -> tuple[nn.Module, Probe]:
    """A copy with a probe in the place of one module, wherever it is used."""
    twin = copy.deepcopy(model).eval()
    old = twin.get_submodule(place)
    probe = Probe(old)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if child is old and parent is not probe:
                setattr(parent, name, probe)
    return twin, probe


def rows_of(data: Sequence[Any]) -> list[tuple[tuple[Tensor, ...], int | None]]:
    """Samples one by one."""
    out = []
    for item in data:
        x, y = (*item, None)[:2] if isinstance(item, tuple) else (item, None)
        several = x if isinstance(x, tuple) else (x,)
        for i in range(len(several[0])):
            out.append((tuple(t[i : i + 1] for t in several), None if y is None else int(y[i])))
    return out


def cross_entropy(output: Tensor, y: int | None) -> Tensor:
    assert y is not None
    return -F.log_softmax(output, 1)[0, y]


def logit(output: Tensor, y: int | None) -> Tensor:
    return output[0, int(output.argmax()) if y is None else y]


def channel_rows(t: Tensor, axis: int) -> Tensor:
    """(C, positions) of one sample's output."""
    return torch.stack([t.select(axis, c).reshape(-1) for c in range(t.shape[axis])])


def maps(
    model: nn.Module, data: Sequence[Any], place: str, objective: Callable[[Tensor, int | None], Tensor]
) -> tuple[Maps, Maps]:
    """Values and gradients at the output of a module, for every sample and call."""
    twin, probe = probed(model, place)
    values: Maps = []
    gradients: Maps = []
    for x, y in rows_of(data):
        probe.values, probe.zeros = [], []
        wanted = objective(twin(*x), y)
        found = torch.autograd.grad(wanted, probe.zeros)
        values.append([channel_rows(v, probe.axis) for v in probe.values])
        gradients.append([channel_rows(g, probe.axis) for g in found])
    return values, gradients


def times(a: Maps, b: Maps) -> Maps:
    return [[v * g for v, g in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True)]


def aggregate(contributions: Maps, how: str) -> Tensor:
    """The four ways to one number per channel, by loops; mean over samples."""
    width = len(contributions[0][0])
    out = []
    for c in range(width):
        total = 0.0
        for sample in contributions:
            for call in sample:
                own = call[c].tolist()
                if how == "abs_element":
                    total += sum(abs(v) for v in own)
                elif how == "abs_per_sample":
                    total += abs(sum(own))
                else:
                    total += sum(own)
        out.append(abs(total) if how == "abs_total" else total)
    return torch.tensor(out, dtype=torch.float64) / len(contributions)


def filter_entries(module: Any) -> list[list[tuple[int, ...]]]:
    """Places in the weight that take part in each output channel."""
    shape = tuple(module.weight.shape)
    out: list[list[tuple[int, ...]]] = []
    every = [tuple(int(i) for i in index) for index in torch.ones(shape).nonzero()]
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return [[i for i in every if i[0] == c] for c in range(shape[0])]
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    for c in range(module.out_channels):
        part, own = c // outputs, c % outputs
        out.append([i for i in every if i[0] // inputs == part and i[1] == own])
    return out


def weight_gradients(model: nn.Module, data: Sequence[Any], layer: str) -> list[Tensor]:
    """Gradient of each sample's cross-entropy."""
    twin = copy.deepcopy(model).eval()
    weight: Any = twin.get_submodule(layer).weight
    weight.requires_grad_(True)
    return [torch.autograd.grad(cross_entropy(twin(*x), y), weight)[0] for x, y in rows_of(data)]


def ablated(
    model: nn.Module, data: Sequence[Any], place: str, objective: Callable[[Tensor, int | None], Tensor], sign: int
) -> Tensor:
    """Mean of what the objective loses (sign 1) or gains (-1) without each channel of a module's output."""
    twin, probe = probed(model, place)
    samples = rows_of(data)
    named = [(x, int(twin(*x).argmax()) if y is None else y) for x, y in samples]
    out = []
    width = int(probe.values[0].shape[probe.axis]) if probe.values else 0
    if not width:
        twin(*samples[0][0])
        width = int(probe.values[0].shape[probe.axis])
    for c in range(width):
        total = 0.0
        for x, y in named:
            probe.silent = None
            whole = objective(twin(*x), y).item()
            probe.silent = c
            total += sign * (whole - objective(twin(*x), y).item())
        out.append(total / len(samples))
    return torch.tensor(out, dtype=torch.float64)
