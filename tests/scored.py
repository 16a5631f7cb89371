"""Networks and data that criteria are tested on, and where each layer is read there, told by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from networks import Expression, hard
from torch import Tensor, nn
from torch.nn import functional as F


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Block(nn.Module):
    """A residual block whose activations work in place."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, inner, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, width, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


def shared() -> nn.Module:
    """A block used twice, functional activations in place, an output that two functions read."""

    def compute(m: Any, x: Tensor) -> Tensor:
        x = m.bn0(m.stem(x))
        F.relu_(x)
        x = m.block(m.block(x))
        y = m.both(x)
        x = F.relu(m.bn3(y), inplace=True) + y
        x = m.drop(F.silu(m.bare(x), inplace=True))
        return m.fc(x.mean((2, 3)))

    return Expression(
        compute, stem=conv(3, 5), bn0=nn.BatchNorm2d(5), block=Block(5, 4), both=conv(5, 6), bn3=nn.BatchNorm2d(6),
        bare=conv(6, 4), drop=nn.Dropout(0.5), fc=nn.Linear(4, 3),
    )  # fmt: skip


def tokens() -> nn.Module:
    """Linear layers on tokens, read after their activation, with channels last."""
    return Expression(
        lambda m, x: m.fc(m.down(m.act(m.up(x))).mean(1)),
        up=nn.Linear(5, 7), act=nn.GELU(), down=nn.Linear(7, 6), fc=nn.Linear(6, 3),
    )  # fmt: skip


def time_first() -> nn.Module:
    """Linear layers that see time before the batch."""
    return Expression(
        lambda m, x: m.fc(F.relu(m.up(x.transpose(0, 1))).mean(0)), up=nn.Linear(5, 7), fc=nn.Linear(7, 3)
    )


def windows() -> nn.Module:
    """Convolutions on the quarters of a picture, laid into the batch."""

    def compute(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, c, h // 2, w // 2)
        y = F.relu(m.bn(m.conv(parts)))
        return m.fc(y.mean((2, 3)).reshape(n, 4, -1).amax(1))

    return Expression(compute, conv=conv(3, 6), bn=nn.BatchNorm2d(6), fc=nn.Linear(6, 3))


def interleaved() -> nn.Module:
    """The same with the quarters outside: rows of one sample lie apart."""

    def compute(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.reshape(n, c, 2, h // 2, 2, w // 2).permute(2, 4, 0, 1, 3, 5).reshape(n * 4, c, h // 2, w // 2)
        y = F.relu(m.conv(parts))
        return m.fc(y.mean((2, 3)).reshape(4, n, -1).amax(0))

    return Expression(compute, conv=conv(3, 6), fc=nn.Linear(6, 3))


def two_inputs() -> nn.Module:
    return Expression(
        lambda m, x, z: m.fc(torch.cat([F.relu(m.bn(m.conv(x))).mean((2, 3)), torch.tanh(m.side(z))], 1)),
        conv=conv(3, 5), bn=nn.BatchNorm2d(5), side=nn.Linear(4, 6), fc=nn.Linear(11, 3),
    )  # fmt: skip


def embedded() -> nn.Module:
    """Integers come in."""
    return Expression(
        lambda m, x: m.fc(F.relu(m.up(m.table(x))).mean(1)),
        table=nn.Embedding(9, 4), up=nn.Linear(4, 6), fc=nn.Linear(6, 3),
    )  # fmt: skip


def kinds() -> nn.Module:
    """Grouped, depthwise and transposed convolutions, one dimension."""
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.BatchNorm1d(8), nn.LeakyReLU(0.1, True),
        nn.Conv1d(8, 8, 3, groups=8), nn.ConvTranspose1d(8, 6, 3, groups=2), nn.BatchNorm1d(6, affine=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 3),
    )  # fmt: skip


def in_place() -> nn.Module:
    """What reads the first layer changes it in place; a dropout that is off lies in between."""
    return nn.Sequential(
        conv(3, 5), nn.SiLU(inplace=True), conv(5, 6), nn.Dropout2d(0.5), nn.BatchNorm2d(6), nn.ELU(inplace=True),
        nn.Flatten(), nn.Linear(216, 3),
    )  # fmt: skip


@dataclass(frozen=True)
class Net:
    """A network; ``places``: layer to the module whose output is that of the layer behind its batch norm."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    places: Mapping[str, str]
    integers: bool = False
    #: layer to the function behind its place, where one elementwise function alone reads that
    activations: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(2)
        return hard(self.build()).double()

    def data(self, sizes: tuple[int, ...] = (3, 1, 2), labels: bool = True) -> list[Any]:
        generator = torch.Generator().manual_seed(7)
        count = sum(sizes)
        xs: tuple[Tensor, ...]
        if self.integers:
            xs = tuple(torch.randint(9, (count, *s), generator=generator) for s in self.shapes)
        else:
            xs = tuple(torch.randn((count, *s), generator=generator, dtype=torch.float64) for s in self.shapes)
        y = torch.randint(3, (count,), generator=generator)
        parts = list(zip(*(t.split(list(sizes)) for t in xs), strict=True))
        inputs = [p[0] if len(p) == 1 else p for p in parts]
        if not labels:
            return [(p,) if isinstance(p, tuple) else p for p in inputs]
        return list(zip(inputs, y.split(list(sizes)), strict=True))


PICTURE = ((3, 6, 6),)
NETS = {
    "shared": Net(
        shared, PICTURE,
        {"stem": "bn0", "block.conv1": "block.bn1", "block.conv2": "block.bn2", "both": "both", "bare": "bare",
         "fc": "fc"},
        activations={"stem": F.relu, "block.conv1": F.relu, "bare": F.silu},
    ),
    "in place": Net(in_place, PICTURE, {"0": "0", "2": "4", "7": "7"}, activations={"0": F.silu, "2": F.elu}),
    "tokens": Net(tokens, ((4, 5),), {"up": "up", "down": "down", "fc": "fc"}, activations={"up": F.gelu}),
    "time first": Net(time_first, ((4, 5),), {"up": "up", "fc": "fc"}, activations={"up": F.relu}),
    "windows": Net(windows, PICTURE, {"conv": "bn", "fc": "fc"}, activations={"conv": F.relu}),
    "interleaved": Net(interleaved, PICTURE, {"conv": "conv", "fc": "fc"}, activations={"conv": F.relu}),
    "two inputs": Net(
        two_inputs, ((3, 4, 4), (4,)), {"conv": "bn", "side": "side", "fc": "fc"},
        activations={"conv": F.relu, "side": torch.tanh},
    ),
    "embedded": Net(embedded, ((4,),), {"up": "up", "fc": "fc"}, True, activations={"up": F.relu}),
    "kinds": Net(
        kinds, ((4, 12),), {"0": "1", "3": "3", "4": "5", "8": "8"},
        activations={"0": lambda t: F.leaky_relu(t, 0.1), "4": F.relu},
    ),
}  # fmt: skip
