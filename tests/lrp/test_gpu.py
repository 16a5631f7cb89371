"""The same numbers on a GPU as on the CPU. Every test needs CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp

pytestmark = pytest.mark.gpu

ALL = ("input", "layers", "channels", "weights")
COMPOSITES: list[Any] = [
    lrp.composites.epsilon(),
    lrp.composites.epsilon_plus(),
    lrp.composites.epsilon_gamma_box(-5, 5),
    lrp.composites.epsilon_alpha2_beta1_flat(),
    lrp.composites.best_practice(),
    lrp.composites.gradient_x_input(),
    lrp.composites.guided_backprop(),
]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """No TF32: float32 products as on the CPU."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 6, 6)


def _error(a: Tensor, b: Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).abs().sum() / b.abs().sum().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("composite", COMPOSITES, ids=lambda c: c.name)
def test_gpu_equals_cpu(model: nn.Module, x: Tensor, composite: Any, dtype: torch.dtype) -> None:
    model, x = model.to(dtype), x.to(dtype)
    cpu = lrp.attribute(model, x, 1, composite=composite, wrt=ALL)
    gpu = lrp.attribute(model.cuda(), x.cuda(), 1, composite=composite, wrt=ALL)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert gpu.input.is_cuda
    assert _error(gpu.input, cpu.input) <= limit
    for kind in ("layers", "channels", "weights"):
        for name, r in getattr(cpu, kind).items():
            if r.abs().sum() > 0:
                assert _error(getattr(gpu, kind)[name], r) <= 100 * limit, (kind, name)
    if cpu.ledger is not None:
        assert (gpu.ledger.gap.abs() <= 10 * limit * gpu.ledger.magnitude()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_channels_last(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    model, x = model.cuda(), x.cuda()
    full = lrp.attribute(model, x, 1, composite="epsilon_plus")
    last = x.to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=dtype):
        half = lrp.attribute(model.to(memory_format=torch.channels_last), last, 1, composite="epsilon_plus")
    assert half.input.dtype == torch.float32
    assert _error(half.input, full.input) <= 8 * torch.finfo(dtype).eps


def test_collect_moves_the_batches(model: nn.Module, x: Tensor) -> None:
    here = lrp.collect(model, [x, x[:1]], progress=False)
    there = lrp.collect(model.cuda(), [x, x[:1]], device="cuda", progress=False)
    for name, r in here.channels.items():
        assert _error(there.channels[name], r) <= 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled(model: nn.Module, x: Tensor) -> None:
    model, x = model.cuda(), x.cuda()
    eager = lrp.attribute(model, x, 1, composite="epsilon_plus")
    compiled = lrp.attribute(model, x, 1, composite="epsilon_plus", compile=True)
    assert _error(compiled.input, eager.input) <= 1e-4


def test_a_plan_of_another_device_is_refused(model: nn.Module, x: Tensor) -> None:
    plan = lrp.prepare(model, x, "epsilon")
    with pytest.raises(lrp.errors.PlanError):
        plan.attribute(x.cuda())
