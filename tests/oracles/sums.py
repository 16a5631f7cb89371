"""A small network, its data set, and how sums over it are compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Padding, batch norm, a gate, a re-used module and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1)
        self.gate = nn.Linear(5, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        x = self.conv2(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.head(x.mean((2, 3)))


def make_net() -> nn.Module:
    torch.manual_seed(1)
    net = Net().double().eval()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    return net


def make_data(n: int = 7, size: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 2, size, size, generator=g, dtype=torch.float64), torch.randint(4, (n,), generator=g)


def pairs(x: Tensor, y: Tensor, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def close(a: dict[str, Tensor], b: dict[str, Tensor], limit: float = 1e-12) -> None:
    assert a
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == torch.float64
        assert t.shape == b[name].shape
        assert ((t - b[name]).abs().sum() <= limit * (t.abs().sum() + b[name].abs().sum())).all(), name
