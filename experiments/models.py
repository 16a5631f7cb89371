"""Network definitions: ours for published weights with their input conventions, torchvision's for speed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lrp.errors import DataError, MissingDependencyError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PadShortcut(nn.Module):
    """Option-A shortcut: every second pixel, new channels padded with zeros."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))


class CifarBlock(nn.Module):
    """Basic block of the CIFAR ResNets (He et al. 2016, section 4.2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = PadShortcut(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-20, -56, ... for 32 x 32 pictures; ``blocks`` per stage is (depth - 2) / 6."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = CifarBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Fire(nn.Module):
    """Squeeze to few channels, expand by 1 x 1 and 3 x 3 kernels (Iandola et al. 2016)."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1, 1000 classes."""

    def __init__(self) -> None:
        super().__init__()

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, 2, ceil_mode=True)

        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(),
            Fire(64, 16, 64), Fire(128, 16, 64), pool(),
            Fire(128, 32, 128), Fire(256, 32, 128), pool(),
            Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(512, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


def _load(model: nn.Module, path: Path) -> nn.Module:
    if not path.is_file():
        raise DataError(
            "trained weights are missing", expected=path.name, got=f"nothing at {path}", fix="pass --data DIR"
        )
    state = {k.removeprefix("module."): v.float() for k, v in load_file(path).items()}
    known = model.state_dict()
    missing = [k for k in known if k not in state and not k.endswith("num_batches_tracked")]
    surplus = [k for k in state if k not in known]
    if missing or surplus:
        raise DataError(
            f"the weights in {path.name} do not fit {type(model).__name__}",
            expected=f"{len(known)} tensors of its names",
            got=f"missing {missing[:3]}, surplus {surplus[:3]}",
            fix="use the file the experiment names",
        )
    model.load_state_dict(state, strict=False)
    return model.eval()


@dataclass(frozen=True)
class Trained:
    """A trained network with the box its input lies in."""

    model: nn.Module
    low: Tensor
    high: Tensor


def resnet20(data: Path) -> Trained:
    """ResNet-20 on CIFAR-10; input ``(RGB / 255 - mean) / std`` with ImageNet's mean and std."""
    return _cifar_resnet(3, data, "resnet20-12fca82f.safetensors")


def resnet56(data: Path) -> Trained:
    """ResNet-56 on CIFAR-10; input as for :func:`resnet20`."""
    return _cifar_resnet(9, data, "resnet56-4bfd9763.safetensors")


def _cifar_resnet(blocks: int, data: Path, name: str) -> Trained:
    model = _load(CifarResNet(blocks), data / "cifar10_models" / name)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return Trained(model, (0 - mean) / std, (1 - mean) / std)


def squeezenet(data: Path) -> Trained:
    """SqueezeNet 1.1 on ImageNet; input BGR 0..255 minus (104, 117, 123), 227 x 227."""
    model = _load(SqueezeNet(), data / "imagenet" / "squeezenet1_1_caffe_fp16.safetensors")
    shift = torch.tensor([104.0, 117.0, 123.0])
    return Trained(model, -shift, 255 - shift)


def caffe_input(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, RGB) in 0..255 to SqueezeNet's BGR input."""
    x = torch.from_numpy(np.ascontiguousarray(pictures[..., ::-1].transpose(0, 3, 1, 2))).float()
    return x - torch.tensor([104.0, 117.0, 123.0]).reshape(1, 3, 1, 1)


_LIBRARY: list[torch.library.Library] = []


def torchvision_models() -> Any:
    """``torchvision.models``, importable on a CPU build of torch too.

    Raises
    ------
    MissingDependencyError
        If torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise MissingDependencyError(
            "torchvision is not installed",
            expected="its model definitions",
            got="no such package",
            fix="run `make peers`, or pip install --no-deps torchvision==0.28.0",
        )
    # torchvision's import refers to two compiled operators that a CPU build lacks and no model here uses
    if not _LIBRARY and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARY.append(library)
    from torchvision import models

    return models
