"""A small residual CNN on scikit-learn's digits: train it, halve its MACs, measure what is left.

``python -m experiments.digits -o out/digits`` takes well under two minutes on
two cores and needs no data folder. Of the 1,797 pictures (8 x 8), a fixed split
gives 1,000 to training, 347 to validation and 450 to the test; 10 pictures per
class of the *training* part are the reference samples of every criterion. The
network is trained once and kept beside the results; a second run reads it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DigitNet", "build", "few", "split", "test", "train", "training", "validation"]

EPOCHS, RATE, SEED, PER_CLASS = 15, 0.1, 0, 10
Batches = list[tuple[Tensor, Tensor]]


class DigitNet(nn.Module):
    """Convolution, pooling, a residual block, a convolution of stride 2, and a linear layer; about 390,000 MACs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv4 = nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + x)
        x = F.relu(self.bn4(self.conv4(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def build() -> DigitNet:
    """The network before training, for ``--model experiments.digits:build``."""
    return DigitNet()


def split() -> dict[str, tuple[Tensor, Tensor]]:
    """Part to (pictures (N, 1, 8, 8) in 0..1, labels (N,)); the same at every call."""
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
    y = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED))
    parts = {"train": order[:1000], "validation": order[1000:1347], "test": order[1347:]}
    return {name: (x[rows], y[rows]) for name, rows in parts.items()}


def training() -> tuple[Tensor, Tensor]:
    """For ``--data experiments.digits:training``."""
    return split()["train"]


def validation() -> tuple[Tensor, Tensor]:
    """For ``--validation-data experiments.digits:validation``."""
    return split()["validation"]


def test() -> tuple[Tensor, Tensor]:
    """For ``--test-data experiments.digits:test``."""
    return split()["test"]


test.__test__ = False  # type: ignore[attr-defined]  # a data set, whatever pytest makes of its name


def few(per_class: int = PER_CLASS, draw: int = 0) -> Batches:
    """Reference samples: some of every class, drawn from the training part."""
    x, y = training()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 + draw))
    rows = torch.cat([order[y[order] == c][:per_class] for c in range(10)])
    return [(x[rows], y[rows])]


def train(folder: Path | None = None, epochs: int = EPOCHS, width: int = 32) -> DigitNet:
    """The network trained with a fixed seed, or read from the folder if it was kept there.

    On one machine the result is the same every time.
    """
    from safetensors.torch import load_file, save_file

    place = None if folder is None else folder / "trained.safetensors"
    torch.manual_seed(SEED)
    model = DigitNet(width)
    if place is not None and place.is_file():
        model.load_state_dict(load_file(place))
        return model.eval()
    x, y = training()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs=epochs, steps_per_epoch=-(-len(y) // 50))
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(50):
            loss = F.cross_entropy(model(_shifted(x[rows], generator)), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), place)
    return model


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every batch moved by at most one pixel."""
    right, down = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return torch.roll(F.pad(x, (1, 1, 1, 1)), (down, right), (2, 3))[:, :, 1:-1, 1:-1]
