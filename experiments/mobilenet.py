"""MobileNetV2 with published weights: batch norms folded, eight-bit weights spread out again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.models import Trained
from lrp.errors import DataError

__all__ = ["MobileNetV2", "mobilenet", "mobilenet_input"]

#: expansion, output channels, blocks, stride of the first (Sandler et al. 2018, table 2)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class Same(nn.Conv2d):
    """A convolution with TensorFlow's padding: at stride 2 on an even side one row and column more below and right."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size[0] == 3:
            x = F.pad(x, (0, 1, 0, 1) if self.stride[0] == 2 else (1, 1, 1, 1))
        return super().forward(x)


class InvertedResidual(nn.Module):
    """Expand, filter by depth, project; added to the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand: nn.Module = Same(inputs, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = Same(hidden, hidden, 3, stride, groups=hidden)
        self.project = Same(hidden, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if isinstance(self.expand, nn.Identity) else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """1.0, 224 pixels, 1001 classes of which class 0 is the background."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Same(3, 32, 3, 2)
        blocks, width = [], 32
        for expansion, outputs, count, stride in STAGES:
            for k in range(count):
                blocks.append(InvertedResidual(width, outputs, expansion, stride if k == 0 else 1))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = Same(width, 1280, 1)
        self.classifier = nn.Linear(1280, 1001)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.head(self.blocks(F.relu6(self.stem(x)))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def mobilenet(data: Path) -> Trained:
    """The network with its weights; input ``RGB / 127.5 - 1``, the centre 224 x 224.

    Raises
    ------
    DataError
        If the file is missing or holds other layers.
    """
    path = data / "imagenet" / "mobilenet_v2_1.0_224_quant.npz"
    if not path.is_file():
        raise DataError(
            "trained weights are missing", expected=path.name, got=f"nothing at {path}", fix="pass --data DIR"
        )
    model = MobileNetV2()
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with np.load(path) as stored, torch.no_grad():
        for k, layer in enumerate(layers):
            name = f"conv{k:02d}"
            if f"{name}.weight_u8" not in stored.files:
                raise DataError(
                    f"{path.name} holds other layers",
                    expected=name,
                    got=f"{len(stored.files)} arrays",
                    fix="see its README",
                )
            spread = stored[f"{name}.weight_u8"].astype(np.float32) - stored[f"{name}.zero_point"]
            weight = torch.from_numpy((spread * stored[f"{name}.scale"]).astype(np.float32))
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            assert layer.bias is not None
            layer.bias.copy_(torch.from_numpy(stored[f"{name}.bias"]))
    return Trained(model.eval(), -torch.ones(3), torch.ones(3))


def mobilenet_input(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, RGB) in 0..255 to the network's input."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 127.5 - 1
