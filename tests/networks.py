"""Small networks of every kind for pruning: how channels are coupled there, told by hand.

Every case says which groups can be pruned, into how many pieces, and which
layers must stay whole. Weights, batch-norm statistics, layer scales and gates
are drawn at random, so that no channel is silent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.groups import Structure, find_groups


def hard(model: nn.Module, seed: int = 1) -> nn.Module:
    """Weights of both signs, random statistics, no zero heads and no tiny scales; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> None:
        t.copy_(low + (high - low) * torch.rand(t.shape, generator=generator, dtype=torch.float64))

    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.dim() > 1 else 1
            if fan > 1:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (2 / fan) ** 0.5)
            else:
                uniform(p, 0.4, 1.4)
                p.mul_(torch.where(torch.rand(p.shape, generator=generator) < 0.3, -1.0, 1.0))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                uniform(b, -0.5, 0.5)
            elif name.endswith("running_var"):
                uniform(b, 0.5, 2.0)
    return model.eval()


class Expression(nn.Module):
    """Named layers and a function of them: ``forward(layers, *inputs)``."""

    def __init__(self, compute: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.compute(self, *inputs)


@dataclass(frozen=True)
class Case:
    """A network with what a person says about its channels.

    ``free``: group to (width, pieces); ``stays``: part of a layer's name to
    part of the reason why it can not be cut; everything else is not said.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: Sequence[tuple[int, ...]] = ((2, 3, 8, 8),)
    free: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    stays: Mapping[str, str] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        return hard(self.build())

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 5) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in self.shapes)


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def plain(
    bias: bool = True, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, act: Callable[[], nn.Module] = nn.ReLU
) -> nn.Module:
    """Two convolutions, pooling and a classifier."""
    return nn.Sequential(
        conv(3, 8, bias=bias), norm(8), act(), conv(8, 12, bias=bias), norm(12), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4, bias=bias),
    )  # fmt: skip


def _head(width: int) -> nn.Module:
    return nn.Linear(width, 4)


def _pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))


def _flatten() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 10), nn.ReLU(), _head(10))


def _channels_last() -> nn.Module:
    return Expression(
        lambda m, x: m.fc(F.relu(m.conv(x)).permute(0, 2, 3, 1).flatten(1)), conv=conv(3, 8), fc=nn.Linear(512, 4)
    )


def _residual() -> nn.Module:
    def compute(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.bn0(m.stem(x)))
        x = F.relu(x + m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x))))))
        return m.fc(_pool(F.relu(m.bn4(m.down(x)) + m.bn3(m.conv3(x)))))

    norms = {f"bn{k}": nn.BatchNorm2d(n) for k, n in enumerate((8, 6, 8, 10, 10))}
    return Expression(
        compute, stem=conv(3, 8), conv1=conv(8, 6), conv2=conv(6, 8), conv3=conv(8, 10, stride=2),
        down=nn.Conv2d(8, 10, 1, 2), fc=_head(10), **norms,
    )  # fmt: skip


def _grouped() -> nn.Module:
    return nn.Sequential(
        conv(3, 12), nn.ReLU(), conv(12, 8, groups=4), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _head(6),
    )  # fmt: skip


def _depthwise() -> nn.Module:
    return nn.Sequential(
        conv(3, 10), nn.BatchNorm2d(10), nn.ReLU(), conv(10, 10, groups=10), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Conv2d(10, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _head(6),
    )  # fmt: skip


def _multiplier() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.ReLU(), conv(6, 12, groups=6), nn.ReLU(), nn.Conv2d(12, 5, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), _head(5),
    )  # fmt: skip


def _one_per_part() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 4, groups=4), nn.ReLU(), conv(4, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), _head(6),
    )  # fmt: skip


def _grouped_concat() -> nn.Module:
    """Each part of a grouped convolution reads another layer: they could only be cut together."""
    return Expression(
        lambda m, x: m.fc(_pool(F.relu(m.out(torch.cat([m.left(x), m.right(x)], 1).relu())))),
        left=conv(3, 8), right=conv(3, 8), out=conv(16, 6, groups=2), fc=_head(6),
    )  # fmt: skip


def _glu() -> nn.Module:
    def compute(m: Any, x: Tensor) -> Tensor:
        a, b = m.conv(x).chunk(2, 1)
        return m.fc(_pool(F.relu(m.out(a * b.sigmoid()))))

    return Expression(compute, conv=conv(3, 16), out=conv(8, 6), fc=_head(6))


def _glu_linear() -> nn.Module:
    def compute(m: Any, x: Tensor) -> Tensor:
        a, b = m.up(x).chunk(2, -1)
        return m.fc(m.down(a * F.silu(b)))

    return Expression(compute, up=nn.Linear(5, 16), down=nn.Linear(8, 6), fc=_head(6))


def _dense() -> nn.Module:
    def compute(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = torch.cat([x, m.conv1(F.relu(m.bn1(x)))], 1)
        x = torch.cat([x, m.conv2(F.relu(m.bn2(x)))], 1)
        return m.fc(_pool(F.relu(m.bn3(x))))

    return Expression(
        compute, stem=conv(3, 8), bn1=nn.BatchNorm2d(8), conv1=conv(8, 4), bn2=nn.BatchNorm2d(12),
        conv2=conv(12, 4), bn3=nn.BatchNorm2d(16), fc=_head(16),
    )  # fmt: skip


def _concat_added() -> nn.Module:
    """Two branches side by side, added to a third that spans both."""
    return Expression(
        lambda m, x: m.fc(_pool(F.relu(torch.cat([m.left(x), m.right(x)], 1) + m.wide(x)))),
        left=conv(3, 5), right=conv(3, 7), wide=conv(3, 12), fc=_head(12),
    )  # fmt: skip


def _ghost() -> nn.Module:
    """Half of the channels are made from the other half, and both are added to a stream."""

    def compute(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        y = m.primary(x)
        return m.fc(_pool(F.relu(x + torch.cat([y, m.cheap(y)], 1))))

    return Expression(compute, stem=conv(3, 8), primary=conv(8, 4), cheap=conv(4, 4, groups=4), fc=_head(8))


def _channels_mixed(width: int = 12) -> nn.Module:
    """A gate from a convolution along the channels (ECA-Net): none can go without moving its neighbours."""

    def compute(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        gate = m.mix(_pool(x).view(len(x), 1, -1)).view(len(x), -1, 1, 1).sigmoid()
        return m.fc(_pool(F.relu(m.out(x * gate))))

    return Expression(compute, stem=conv(3, width), mix=nn.Conv1d(1, 1, 3, padding=1), out=conv(width, 6), fc=_head(6))


def _concat_raw(first: bool) -> nn.Module:
    def compute(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.conv(x))
        return m.fc(_pool(F.relu(m.out(torch.cat([x, y] if first else [y, x], 1)))))

    return Expression(compute, conv=conv(3, 8), out=conv(11, 6), fc=_head(6))


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _shuffled(width: int = 12) -> nn.Module:
    return Expression(
        lambda m, x: m.fc(_pool(F.relu(m.out(shuffle(F.relu(m.conv(x)), 2))))),
        conv=conv(3, width), out=conv(width, 6), fc=_head(6),
    )  # fmt: skip


def _permuted(width: int, change: Callable[[Tensor], Tensor]) -> nn.Module:
    return Expression(
        lambda m, x: m.fc(_pool(F.relu(m.out(change(F.relu(m.conv(x))))))),
        conv=conv(3, width), out=conv(width, 6), fc=_head(6),
    )  # fmt: skip


def _flipped(width: int = 12) -> nn.Module:
    return _permuted(width, lambda x: x.flip(1))


def _rolled(width: int = 12) -> nn.Module:
    return _permuted(width, lambda x: x.roll(3, 1))


def _heads() -> nn.Module:
    """Attention written out: q, k, v reshaped to heads."""

    def compute(m: Any, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, 2, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        x = x + m.proj(y.transpose(1, 2).reshape(n, t, 8))
        return m.fc(m.down(F.gelu(m.up(x))).mean(1))

    return Expression(
        compute, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), proj=nn.Linear(8, 6), up=nn.Linear(6, 14),
        down=nn.Linear(14, 5), fc=_head(5),
    )  # fmt: skip


def _attention_module() -> nn.Module:
    def compute(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.mha(m.ln1(x), m.ln1(x), m.ln1(x), need_weights=False)[0]
        x = x + m.down(F.gelu(m.up(m.ln2(x))))
        return m.fc(x.mean(1))

    return Expression(
        compute, embed=nn.Linear(6, 8), ln1=nn.LayerNorm(8), mha=nn.MultiheadAttention(8, 2, batch_first=True),
        ln2=nn.LayerNorm(8), up=nn.Linear(8, 20), down=nn.Linear(20, 8), fc=_head(8),
    )  # fmt: skip


class Scale(nn.Module):
    """A bare parameter per channel."""

    def __init__(self, width: int, add: bool = False) -> None:
        super().__init__()
        self.gamma, self.add = nn.Parameter(torch.ones(width, 1, 1)), add

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma if self.add else x * self.gamma


def _layer_scale(add: bool = False) -> nn.Module:
    return nn.Sequential(
        conv(3, 8), Scale(8, add), nn.ReLU(), conv(8, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _head(6)
    )


def _raw_input() -> nn.Module:
    return Expression(
        lambda m, x: m.fc(_pool(F.relu(m.out(F.relu(x + m.conv(x)))))), conv=conv(3, 3), out=conv(3, 6), fc=_head(6)
    )


def _weight_norm(old: bool) -> nn.Module:
    wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), wrap(conv(8, 6)), nn.ReLU(), conv(6, 10), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), _head(10),
    )  # fmt: skip


def _shared_parameter() -> nn.Module:
    one, two = nn.Linear(6, 6), nn.Linear(6, 6)
    two.weight = one.weight
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), one, nn.ReLU(), two, nn.ReLU(), nn.Linear(6, 9), nn.ReLU(), _head(9)
    )


def _called_twice() -> nn.Module:
    """One module used twice on the same stream: its two axes are one."""
    return Expression(
        lambda m, x: m.fc(_pool(F.relu(m.mix(F.relu(m.mix(F.relu(m.stem(x)))))))),
        stem=conv(3, 8), mix=conv(8, 8), fc=_head(8),
    )  # fmt: skip


def _called_apart() -> nn.Module:
    """One encoder for two inputs, its outputs side by side."""
    return Expression(
        lambda m, x, y: m.fc(torch.cat([_pool(F.relu(m.stem(x))), _pool(F.relu(m.stem(y)))], 1)),
        stem=conv(3, 6), fc=_head(12),
    )  # fmt: skip


def _two_names() -> nn.Module:
    net = Expression(lambda m, x: m.fc(_pool(F.relu(m.b(F.relu(m.a(x)))))), a=conv(3, 8), b=conv(8, 6), fc=_head(6))
    net.add_module("alias", net.a)
    return net


def _two_inputs() -> nn.Module:
    return Expression(
        lambda m, x, y: m.fc(F.relu(_pool(F.relu(m.conv(x))) + m.side(y))),
        conv=conv(3, 8), side=nn.Linear(4, 8), fc=_head(8),
    )  # fmt: skip


def _dictionary() -> nn.Module:
    def compute(m: Any, x: Tensor) -> Any:
        y = F.relu(m.body(F.relu(m.stem(x))))
        return {"class": m.fc(_pool(y)), "more": (m.aux(_pool(y)), y.new_zeros(1))}

    return Expression(compute, stem=conv(3, 8), body=conv(8, 6), fc=_head(6), aux=nn.Linear(6, 2))


def _features_too(first: bool) -> nn.Module:
    """Logits and the features they are made from."""

    def compute(m: Any, x: Tensor) -> Any:
        y = F.relu(m.body(F.relu(m.stem(x))))
        return (y, m.fc(_pool(y))) if first else (m.fc(_pool(y)), y)

    return Expression(compute, stem=conv(3, 8), body=conv(8, 6), fc=_head(6))


def _transposed() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), _head(5),
    )  # fmt: skip


def _unflatten(channels: int = -1) -> nn.Module:
    """A decoder: every channel is a run of a linear layer's outputs."""
    return Expression(
        lambda m, x: m.out(F.relu(m.up(F.relu(m.fc(x)).view(len(x), channels, 2, 2)))),
        fc=nn.Linear(5, 32), up=nn.ConvTranspose2d(8, 6, 2, 2), out=conv(6, 3),
    )  # fmt: skip


def _ndim(n: int) -> nn.Module:
    kinds = {1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d), 3: (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d)}
    layer, norm, pool = kinds[n]
    return nn.Sequential(layer(3, 8, 3), norm(8), nn.ReLU(), layer(8, 6, 3), nn.ReLU(), pool(1), nn.Flatten(), _head(6))


def _squeeze_excite() -> nn.Module:
    def compute(m: Any, x: Tensor) -> Tensor:
        x = F.silu(m.bn(m.stem(x)))
        gate = m.expand(F.relu(m.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return m.fc(_pool(F.relu(m.out(x * gate))))

    return Expression(
        compute, stem=conv(3, 12), bn=nn.BatchNorm2d(12), squeeze=conv(12, 5, 1), expand=conv(5, 12, 1),
        out=conv(12, 6), fc=_head(6),
    )  # fmt: skip


def _spatial_gate() -> nn.Module:
    """A gate of one channel over all others."""
    return Expression(
        lambda m, x: m.fc(_pool(F.relu(m.out(F.relu(m.stem(x)) * m.gate(x).sigmoid())))),
        gate=conv(3, 1), stem=conv(3, 8), out=conv(8, 6), fc=_head(6),
    )  # fmt: skip


def padded(width: int = 8, before: int = 2, after: int = 2) -> nn.Module:
    """Option-A shortcut: channels padded on both sides."""

    def compute(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        y = m.conv2(F.relu(m.conv1(x)))
        return m.fc(_pool(F.relu(y + F.pad(x, (0, 0, 0, 0, before, after)))))

    total = width + before + after
    return Expression(compute, stem=conv(3, width), conv1=conv(width, 9), conv2=conv(9, total), fc=_head(total))


def saturated(last: Callable[[Tensor], Tensor]) -> nn.Module:
    """A coupling that the graph gets wrong, before an output that hardly tells."""
    return Expression(lambda m, x: last(m.body(x)), body=_flipped(8))


def _pixel_shuffle() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        _head(6),
    )  # fmt: skip


def _layer_norm(kind: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), kind(16), nn.ReLU(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3))


class Dense(nn.Linear):
    """A linear layer by another name."""


class Kernel2d(nn.Conv2d):
    """A convolution by another name."""


def _renamed() -> nn.Module:
    return nn.Sequential(
        Kernel2d(3, 8, 3), nn.ReLU(), Kernel2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Dense(6, 9),
        nn.ReLU(), Dense(9, 3),
    )  # fmt: skip


class Embedded(nn.Module):
    """Tokens, an embedding with an added multi-layer perceptron."""

    def __init__(self, tokens: int = 20) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(tokens, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.table(x)
        return self.fc((y + self.down(F.relu(self.up(y)))).mean(1))


def normed_after_flip() -> nn.Module:
    """A wrong coupling in front of a group that a norm spans."""
    return Expression(
        lambda m, x: m.fc(F.relu(m.norm(m.wide(m.body(x))))),
        body=_flipped(8), wide=nn.Linear(4, 16), norm=nn.LayerNorm(16), fc=nn.Linear(16, 3),
    )  # fmt: skip


class Frozen(nn.Module):
    """Features under no_grad, and a trained head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.ReLU())
        self.hidden, self.fc = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = _pool(self.features(x))
        return self.fc(F.relu(self.hidden(x)))


OUTPUT = "network's output"
VECTOR, VOLUME = ((2, 5),), ((2, 3, 6, 6, 6),)
PLAIN = {"0": (8, 8), "3": (12, 12)}
NETWORKS = [
    Case("plain", plain, free=PLAIN, stays={"8": OUTPUT}),
    Case("bias-free", lambda: plain(bias=False), free=PLAIN, stays={"8": OUTPUT}),
    Case("norm without affine", lambda: plain(norm=lambda n: nn.BatchNorm2d(n, affine=False)), free=PLAIN),
    Case("norm of the batch", lambda: plain(norm=lambda n: nn.BatchNorm2d(n, track_running_stats=False)), free=PLAIN),
    Case("instance norm", lambda: plain(norm=lambda n: nn.InstanceNorm2d(n, affine=True)), free=PLAIN),
    Case("instance norm, bare", lambda: plain(norm=nn.InstanceNorm2d), free=PLAIN),
    Case(
        "instance norm, tracked",
        lambda: plain(norm=lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True)),
        free=PLAIN,
    ),
    Case("prelu", lambda: plain(act=nn.PReLU), free=PLAIN),
    Case(
        "prelu per channel",
        lambda: nn.Sequential(
            conv(3, 8), nn.PReLU(8), conv(8, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _head(6)
        ),
        free={"0": (8, 8), "2": (6, 6)},
    ),
    Case("sigmoid", lambda: plain(act=nn.Sigmoid), free=PLAIN),
    Case(
        "dropout", lambda: plain(act=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Dropout2d(0.2))), free=PLAIN
    ),
    Case("mlp", mlp, VECTOR, {"0": (9, 9), "2": (7, 7)}, {"4": OUTPUT}),
    Case("flatten", _flatten, free={"0": (6, 6), "4": (10, 10)}),
    Case("flatten, channels last", _channels_last, stays={"conv": ""}),
    Case("residual", _residual, free={"stem": (8, 8), "conv1": (6, 6), "conv3": (10, 10)}, stays={"fc": OUTPUT}),
    Case("grouped", _grouped, free={"0": (12, 3), "2": (8, 2), "5": (6, 6)}),
    Case("depthwise", _depthwise, free={"0": (10, 10), "6": (6, 6)}),
    Case("depthwise, two filters per channel", _multiplier, free={"4": (5, 5)}, stays={"0": ""}),
    Case("one output per part", _one_per_part, free={"4": (6, 6)}, stays={"0": "", "2": ""}),
    Case("parts of a concat", _grouped_concat, free={"out": (6, 3)}, stays={"left": "", "right": ""}),
    Case("gated", _glu, free={"conv": (16, 8), "out": (6, 6)}),
    Case("gated, linear", _glu_linear, VECTOR, {"up": (16, 8), "down": (6, 6)}),
    Case("dense", _dense, free={"stem": (8, 8), "conv1": (4, 4), "conv2": (4, 4)}),
    Case("concat, added", _concat_added),
    Case("ghost", _ghost, free={"stem": (8, 4)}),
    Case("channels mixed", _channels_mixed, free={"out": (6, 6)}, stays={"stem": ""}),
    Case("concat with the raw input last", lambda: _concat_raw(False), free={"conv": (8, 8), "out": (6, 6)}),
    Case("concat with the raw input first", lambda: _concat_raw(True), free={"out": (6, 6)}, stays={"conv": "differ"}),
    Case("shuffled", _shuffled, free={"out": (6, 6)}, stays={"conv": ""}),
    Case("flipped, 12", _flipped, free={"out": (6, 6)}, stays={"conv": ""}),
    Case("flipped, 8", lambda: _flipped(8), free={"out": (6, 6)}, stays={"conv": ""}),
    Case("rolled", _rolled, free={"out": (6, 6)}, stays={"conv": ""}),
    Case("saturated", lambda: saturated(lambda x: (1e4 * x).sigmoid()), stays={"body.conv": ""}),
    Case(
        "winner takes all",
        lambda: saturated(lambda x: (1e4 * x).softmax(-1)),
        free={"body.out": (6, 6)},
        stays={"body.conv": ""},
    ),
    Case("heads", _heads, ((2, 5, 6),), {"up": (14, 14), "down": (5, 5)}, {"q": "", "k": "", "v": ""}),
    Case("attention", _attention_module, ((2, 5, 6),), {"up": (20, 20)}, {"embed": "LayerNorm"}),
    Case("layer scale", _layer_scale, free={"0": (8, 8), "3": (6, 6)}),
    Case("added parameter", lambda: _layer_scale(True), free={"0": (8, 8), "3": (6, 6)}),
    Case("added to the raw input", _raw_input, free={"out": (6, 6)}, stays={"conv": ""}),
    Case("weight norm", lambda: _weight_norm(False), free={"4": (10, 10)}, stays={"0": "computed", "2": "computed"}),
    Case("shared parameter", _shared_parameter, VECTOR, {"6": (9, 9)}, {"0": "shares", "2": "shares", "4": "shares"}),
    Case("called twice", _called_twice, free={"stem": (8, 8)}),
    Case("called on two inputs", _called_apart, ((2, 3, 8, 8), (2, 3, 8, 8)), {"stem": (6, 6)}),
    Case("two names", _two_names, free={"a": (8, 8), "b": (6, 6)}),
    Case("two inputs", _two_inputs, ((2, 3, 8, 8), (2, 4)), {"conv": (8, 8)}, {"fc": OUTPUT}),
    Case("outputs in a dict", _dictionary, free={"stem": (8, 8), "body": (6, 6)}, stays={"fc": OUTPUT, "aux": OUTPUT}),
    Case("features first", lambda: _features_too(True), free={"stem": (8, 8)}, stays={"body": "output"}),
    Case("features last", lambda: _features_too(False), free={"stem": (8, 8)}, stays={"body": "output"}),
    Case("transposed", _transposed, free={"0": (8, 8), "2": (6, 6), "5": (5, 5)}),
    Case("unflatten", _unflatten, VECTOR, {"fc": (32, 8), "up": (6, 6)}, {"out": OUTPUT}),
    Case("unflatten to fixed sizes", lambda: _unflatten(8), VECTOR, {"up": (6, 6)}, {"fc": "shape"}),
    Case("one dimension", lambda: _ndim(1), ((2, 3, 12),), {"0": (8, 8), "3": (6, 6)}),
    Case("three dimensions", lambda: _ndim(3), VOLUME, {"0": (8, 8), "3": (6, 6)}),
    Case("squeeze and excite", _squeeze_excite, free={"stem": (12, 12), "squeeze": (5, 5), "out": (6, 6)}),
    Case("spatial gate", _spatial_gate, free={"stem": (8, 8), "out": (6, 6)}, stays={"gate": "one channel"}),
    Case("padded shortcut", padded, free={"conv1": (9, 9)}, stays={"stem": ""}),
    Case("pixel shuffle", _pixel_shuffle, free={"3": (6, 6)}, stays={"0": ""}),
    Case("layer norm", lambda: _layer_norm(nn.LayerNorm), VECTOR, {"3": (9, 9)}, {"0": "LayerNorm"}),
    Case("group norm", lambda: _layer_norm(lambda n: nn.GroupNorm(4, n)), VECTOR, {"3": (9, 9)}, {"0": "GroupNorm"}),
    Case("rms norm", lambda: _layer_norm(nn.RMSNorm), VECTOR, {"3": (9, 9)}, {"0": ""}),
    Case("layers by other names", _renamed, free={"0": (8, 8), "2": (6, 6), "6": (9, 9)}, stays={"8": OUTPUT}),
]
BY_NAME = {case.name: case for case in NETWORKS}


@functools.cache
def structure_of(name: str) -> Structure:
    """The groups of a case, found once."""
    case = BY_NAME[name]
    return find_groups(case.model(), case.inputs())
