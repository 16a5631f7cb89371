"""Small quantized networks, and what ONNX files of integers hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import hard
from torch import Tensor, nn

from compress.codebook import Codebook, codebook_of
from compress.quantization_plan import QuantizationPlan, plan_of


def quantized(
    model: nn.Module,
    bits: int = 4,
    levels: str = "symmetric",
    axis: int | None = None,
    skip: Sequence[str] = (),
    books: Callable[[str, Tensor], Codebook] | None = None,
) -> nn.Module:
    """Rounded in place, with its plan."""
    found = {}
    for name, p in model.named_parameters():
        if p.dim() < 2 or name in skip or "parametrizations" in name or name.endswith(("_g", "_v")):
            continue  # the parts of weight norm are no weights themselves
        w = p.detach()
        book = codebook_of(w, bits, levels=levels, axis=axis) if books is None else books(name, w)
        p.data = book.values(book.nearest(w))
        found[name] = book
    QuantizationPlan(found).apply(model)
    return model


def indices(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    plan = plan_of(model)
    assert plan is not None
    return {name: k.numpy() for name, k in plan.indices(model).items()}


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Initializers by name, unpacked by hand from their bytes."""
    import onnx

    out = {}
    for t in onnx.load(path).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(t.data_type)
        if kind in ("INT4", "UINT4"):
            packed = np.frombuffer(t.raw_data, np.uint8).astype(np.int64)
            count = int(np.prod(t.dims))
            assert len(packed) == (count + 1) // 2
            nibbles = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:count].reshape(tuple(t.dims))
            out[t.name] = np.where(nibbles > 7, nibbles - 16, nibbles) if kind == "INT4" else nibbles
        else:
            out[t.name] = onnx.numpy_helper.to_array(t)
    return out


def props(path: Path) -> dict[str, str]:
    """What the file's metadata say."""
    import onnx

    return {p.key.removeprefix("compress."): p.value for p in onnx.load(path).metadata_props}


def session(path: Path, **options: str) -> Any:
    """With session options, ``__`` for a point."""
    import onnxruntime

    wanted = onnxruntime.SessionOptions()
    wanted.log_severity_level = 4
    for key, value in options.items():
        wanted.add_session_config_entry(key.replace("__", "."), value)
    return onnxruntime.InferenceSession(str(path), wanted, providers=["CPUExecutionProvider"])


class Kinds(nn.Module):
    """Batch norms of negative and zero factors, before and behind layers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.grouped_norm = nn.BatchNorm2d(8, affine=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.up_norm = nn.BatchNorm2d(6)
        self.up_grouped = nn.ConvTranspose2d(6, 4, 2, 2, groups=2)
        self.up_grouped_norm = nn.BatchNorm2d(4)
        self.bare = nn.Conv2d(4, 5, 1)
        self.linear = nn.Linear(5, 7)
        self.linear_norm = nn.BatchNorm1d(7)
        self.tokens = nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(self.before(x))))
        x = self.depthwise(self.grouped_norm(self.grouped(x)))
        x = self.up_grouped_norm(self.up_grouped(torch.relu(self.up_norm(self.up(x)))))
        x = self.linear_norm(self.linear(torch.relu(self.bare(x)).mean((2, 3))))
        return self.tokens(x) + self.tokens(torch.relu(x).unsqueeze(1)).squeeze(1)


def kinds() -> nn.Module:
    net = hard(Kinds())
    with torch.no_grad():
        for norm in (net.norm, net.up_norm, net.linear_norm):
            norm.weight[0], norm.weight[1] = 0.0, -norm.weight[1].abs()
    return net


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def level(w: Tensor, low: int, high: int, axis: int | None = None) -> Codebook:
    size = w.abs().amax() if axis is None else w.abs().amax([d for d in range(w.dim()) if d != axis])
    return Codebook((size / max(high, -low)).detach(), low, high, axis)
