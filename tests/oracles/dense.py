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


def connections(layer: nn.Module, shape: torch.Size) -> Tensor:
    """How often each input is connected with each output: the matrix of the layer with weights 1."""
    import copy

    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.fill_(1)
        if twin.bias is not None:
            twin.bias.zero_()
    return matrix(twin, shape)[0]


Branch = tuple[float, Tensor, Tensor]  # share of the relevance, numerators n_kj, bias part


def branches(rule: Any, w: Tensor, b: Tensor, x: Tensor, ones: Tensor | None = None) -> list[Branch]:
    """The sums a rule divides by, for one sample; all but alpha-beta have one."""
    z = w @ x + b
    n = w * x
    bias = torch.zeros_like(b) if rule.ignore_bias else b
    if isinstance(rule, rules.Epsilon):
        return [(1.0, n, bias)]
    if isinstance(rule, rules.ZPlus):
        return [(1.0, n.clamp(min=0), bias.clamp(min=0))]
    if isinstance(rule, rules.AlphaBeta):
        return [
            (rule.alpha, n.clamp(min=0), bias.clamp(min=0)),
            (-rule.beta, n.clamp(max=0), bias.clamp(max=0)),
        ]
    if isinstance(rule, rules.Gamma):
        g = rule.gamma
        up, down = n + g * n.clamp(min=0), n + g * n.clamp(max=0)
        bias_up, bias_down = bias + g * bias.clamp(min=0), bias + g * bias.clamp(max=0)
        positive = z > 0
        return [(1.0, torch.where(positive[:, None], up, down), torch.where(positive, bias_up, bias_down))]
    if isinstance(rule, rules.ZBox):
        low = rule.low.double().expand_as(x) if rule.low.numel() == 1 else rule.low.double().flatten()
        high = rule.high.double().expand_as(x) if rule.high.numel() == 1 else rule.high.double().flatten()
        return [(1.0, n - w.clamp(min=0) * low - w.clamp(max=0) * high, torch.zeros_like(b))]
    if isinstance(rule, rules.WSquare):
        return [(1.0, w * w, bias * bias)]
    if isinstance(rule, rules.Flat):
        assert ones is not None
        return [(1.0, ones, torch.zeros_like(b))]
    if isinstance(rule, rules.RootPoint):
        root = rule.root.double()
        root = root if root.shape == w.shape and w.ndim == 2 else root.expand_as(x)
        return [(1.0, w * (x - root), torch.zeros_like(b))]
    raise AssertionError(rule)


def stabilised(epsilon: Any, total: Tensor) -> Tensor:
    if isinstance(epsilon, rules.Rms):
        return total + epsilon.factor * (total * total).mean() ** 0.5 * sgn(total)
    if isinstance(epsilon, rules.Clip):
        return sgn(total) * torch.maximum(total.abs(), torch.tensor(epsilon.epsilon, dtype=torch.float64))
    if callable(epsilon):
        return epsilon(total)
    return total + epsilon * sgn(total)


def relevance(
    rule: Any, w: Tensor, b: Tensor, x: Tensor, r_out: Tensor, ones: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(R_in, R of every matrix entry, ledger) of one sample."""
    z = w @ x + b
    live = (z != 0) if isinstance(rule, rules.Gamma) else torch.ones_like(z, dtype=torch.bool)
    entries = torch.zeros_like(w)
    books = {"start": r_out.sum().item(), "bias": 0.0, "dead": 0.0, "stabiliser": 0.0}
    for share, n, bias in branches(rule, w, b, x, ones):
        total = n.sum(1) + bias
        d = stabilised(rule.epsilon, total)
        s = torch.where(live & (d != 0), share * r_out / torch.where(d == 0, 1.0, d), 0.0)
        entries += n * s[:, None]
        dead = total == 0
        books["bias"] += (bias * s).sum().item()
        books["dead"] += share * r_out[dead].sum().item()
        books["stabiliser"] += ((d - total) * s)[~dead].sum().item()
    books["input"] = entries.sum().item()
    return entries.sum(0), entries, books
