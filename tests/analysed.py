"""A small residual CNN, trained on scikit-learn's digits within seconds, for tests of analyses."""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

Batches = list[tuple[Tensor, Tensor]]
EXAMPLE = torch.zeros(1, 1, 8, 8)


class Small(nn.Module):
    """Four convolutions, two of them coupled by a shortcut, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 10, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(10)
        self.outer = nn.Conv2d(10, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.top = nn.Conv2d(12, 16, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16, 14)
        self.head = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn0(self.stem(x))), 2)
        x = F.relu(x + self.bn2(self.outer(F.relu(self.bn1(self.inner(x))))))
        x = F.relu(self.bn3(self.top(x))).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


@functools.cache
def split() -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures and labels: "train", "validation" and "test", apart from each other."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.from_numpy(digits.images[order].astype(np.float32) / 8 - 1).unsqueeze(1)
    y = torch.from_numpy(digits.target[order].astype(np.int64))
    ends = {"train": (0, 1100), "validation": (1100, 1400), "test": (1400, 1797)}
    return {name: (x[a:b], y[a:b]) for name, (a, b) in ends.items()}


def batches(part: str, count: int | None = None, size: int = 100) -> Batches:
    x, y = split()[part]
    n = len(y) if count is None else count
    return list(zip(x[:n].split(size), y[:n].split(size), strict=True))


@functools.cache
def _trained() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small().train()
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.02, total_steps=10 * 11)
        x, y = split()["train"]
        for _ in range(10):
            for rows in torch.randperm(len(y)).split(100):
                optimiser.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimiser.step()
                schedule.step()
    return model.eval()


def trained() -> Small:
    """A copy of the trained network, about 95 % right on the test set."""
    return copy.deepcopy(_trained())
