"""Slow and independent: every rule, term by term, on the matrix of a layer.

Nothing here is shared with the package. A layer is turned into an explicit
matrix by pushing unit vectors through it; a rule is its table of numerators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrp import rules


def matrix(layer: nn.Module, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(W, b) with layer(x).flatten() == W @ x.flatten() + b."""
    size = int(torch.tensor(shape).prod())
    with torch.no_grad():
        zero = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
        columns = torch.stack([layer(e[None]).flatten() for e in unit]) - zero
    return columns.t(), zero


def weight_ids(layer: nn.Module, shape: torch.Size) -> Tensor:
    """Which weight stands in each entry of the matrix; -1 where none does."""
    import copy

    twin = copy.deepcopy(layer)
    count = twin.weight.numel()
    with torch.no_grad():
        twin.weight.copy_(torch.arange(1, count + 1, dtype=torch.float64).reshape(twin.weight.shape))
        if twin.bias is not None:
            twin.bias.zero_()
    return matrix(twin, shape)[0].round().long() - 1


def sgn(t: Tensor) -> Tensor:
    return torch.where(t < 0, -1.0, 1.0).double()


def numerators(rule: Any, w: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n_kj, bias part, true output z) for one sample."""
    z = w @ x + b
    n = w * x
    bias = torch.zeros_like(b) if rule.ignore_bias else b
    if isinstance(rule, rules.Epsilon):
        return n, bias, z
    if isinstance(rule, rules.ZPlus):
        return n.clamp(min=0), bias.clamp(min=0), z
    if isinstance(rule, rules.Gamma):
        g = rule.gamma
        up, down = n + g * n.clamp(min=0), n + g * n.clamp(max=0)
        bias_up, bias_down = bias + g * bias.clamp(min=0), bias + g * bias.clamp(max=0)
        positive = z > 0
        return torch.where(positive[:, None], up, down), torch.where(positive, bias_up, bias_down), z
    if isinstance(rule, rules.ZBox):
        low = rule.low.double().expand_as(x) if rule.low.numel() == 1 else rule.low.double().flatten()
        high = rule.high.double().expand_as(x) if rule.high.numel() == 1 else rule.high.double().flatten()
        return n - w.clamp(min=0) * low - w.clamp(max=0) * high, torch.zeros_like(b), z
    if isinstance(rule, rules.RootPoint):
        root = rule.root.double()
        root = root if root.shape == w.shape and w.ndim == 2 else root.expand_as(x)
        return w * (x - root), torch.zeros_like(b), z
    raise AssertionError(rule)


def relevance(rule: Any, w: Tensor, b: Tensor, x: Tensor, r_out: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(R_in, R of every matrix entry, ledger) of one sample."""
    n, bias, z = numerators(rule, w, b, x)
    total = n.sum(1) + bias
    d = total + rule.epsilon * sgn(total)
    live = (z != 0) if isinstance(rule, rules.Gamma) else torch.ones_like(z, dtype=torch.bool)
    s = torch.where(live & (d != 0), r_out / torch.where(d == 0, 1.0, d), 0.0)
    entries = n * s[:, None]
    dead = total == 0
    books = {
        "start": r_out.sum().item(),
        "input": entries.sum().item(),
        "bias": (bias * s).sum().item(),
        "dead": r_out[dead].sum().item(),
        "stabiliser": ((d - total) * s)[~dead].sum().item(),
    }
    return entries.sum(0), entries, books
