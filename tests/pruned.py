"""A small trained network, and pruning runs of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import compress
from compress.pruning import PruneResult, prune
from compress.training import FineTune

TARGET = compress.Target(macs=0.4)
EXAMPLE = torch.zeros(1, 2, 6, 6)


class Net(nn.Module):
    """A stem, a residual block, and a head that reads a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.outer, self.bn3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.pool, self.drop, self.head = nn.MaxPool2d(2), nn.Dropout(0.1), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn3(self.outer(torch.relu(self.bn2(self.inner(x))))))
        return self.head(self.drop(self.pool(x).flatten(1)))


def samples(n: int = 96) -> tuple[Tensor, Tensor]:
    """Three patterns in noise."""
    g = torch.Generator().manual_seed(3)
    y = torch.arange(n) % 3
    patterns = torch.randn(3, 2, 6, 6, generator=g)
    return 0.6 * patterns[y] + 0.5 * torch.randn(n, 2, 6, 6, generator=g), y


def batches(size: int = 24) -> list[tuple[Tensor, Tensor]]:
    x, y = samples()
    return list(zip(x.split(size), y.split(size), strict=True))


_TRAINED: dict[str, Tensor] = {}


def make_net() -> Net:
    """Trained once."""
    torch.manual_seed(1)
    net = Net()
    if not _TRAINED:
        FineTune(batches(), epochs=8, lr=0.05)(net)
        _TRAINED.update(copy.deepcopy(net.state_dict()))
    net.load_state_dict(_TRAINED)
    return net.eval()


def run(net: nn.Module, **options: Any) -> PruneResult:
    """prune with what all tests share."""
    options = {"target": TARGET, "criterion": "weight", "round_to": 1, "progress": False, **options}
    return prune(net, EXAMPLE, options.pop("data", batches()), **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def same_results(a: PruneResult, b: PruneResult) -> None:
    assert same(a.model, b.model)
    assert a.plan.removed == b.plan.removed
    assert a.history == b.history
    assert (a.before, a.reached, a.stopped) == (b.before, b.reached, b.stopped)
    assert (a.evaluation_before, a.evaluation) == (b.evaluation_before, b.evaluation)
    assert str(a.classes) == str(b.classes)


def accuracies(*values: float) -> Any:
    left = list(values)
    return lambda model: left.pop(0)
