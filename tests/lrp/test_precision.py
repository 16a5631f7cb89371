"""float32, 16 bits and autocast against float64, and the compiled plan against the eager one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp
from lrp import rules

ALL = ("input", "layers", "channels", "weights")
COMPOSITES: list[Any] = [
    lrp.composites.epsilon_plus(),
    lrp.composites.epsilon_gamma_box(-5, 5),
    lrp.composites.epsilon_alpha2_beta1(),
    lrp.composites.best_practice(),
    lrp.composites.epsilon_plus_flat(),
]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.SiLU(),
        nn.GroupNorm(2, 8),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 6, 6)


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().sum() / b.double().abs().sum())


@pytest.mark.parametrize("composite", COMPOSITES, ids=lambda c: c.name)
def test_float32_equals_float64(model: nn.Module, x: Tensor, composite: Any) -> None:
    single = lrp.attribute(model, x, 1, composite=composite, wrt=ALL)
    double = lrp.attribute(model.double(), x.double(), 1, composite=composite, wrt=ALL)
    assert _error(single.input, double.input) <= 1e-5
    for name, r in double.weights.items():
        if name != "3.bias" or r.abs().sum() > 1e-9:
            assert _error(single.weights[name], r) <= 1e-4, name
    assert (single.ledger.gap.abs() <= 1e-4 * single.ledger.magnitude()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("composite", COMPOSITES, ids=lambda c: c.name)
def test_autocast(model: nn.Module, x: Tensor, composite: Any, dtype: torch.dtype) -> None:
    """Products in 16 bits (shown by their rounding), ratios in 32; results in the input's own type."""
    full = lrp.attribute(model, x, 1, composite=composite, wrt=ALL)
    with torch.autocast("cpu", dtype=dtype):
        half = lrp.attribute(model, x, 1, composite=composite, wrt=ALL)
    unit = torch.finfo(dtype).eps
    assert half.input.dtype == torch.float32
    assert unit / 100 <= _error(half.input, full.input) <= 8 * unit
    assert set(half.weights) == set(full.weights)
    assert set(half.channels) == set(full.channels)
    assert all(torch.isfinite(r).all() for r in half.weights.values())
    again = lrp.attribute(model, x, 1, composite=composite)
    assert torch.equal(again.input, full.input), "the plan of autocast is not used outside it"


def test_float16_ratios_beyond_its_range() -> None:
    """Outputs without a negative part: their ratio to the stabiliser is 1e6, beyond float16."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
    x = torch.rand(5, 6) + 1
    full = lrp.attribute(model, x, 1, composite=rules.AlphaBeta(2, 1))
    with torch.autocast("cpu", dtype=torch.float16):
        half = lrp.attribute(model, x, 1, composite=rules.AlphaBeta(2, 1))
    assert _error(half.input, full.input) <= 0.01
    assert torch.isfinite(half.ledger.dead).all()


def test_pure_epsilon_in_16_bits_warns(model: nn.Module, x: Tensor) -> None:
    for composite in ("epsilon", rules.Epsilon(0.0)):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(RuntimeWarning, match="bfloat16"):
            lrp.attribute(model, x, 1, composite=composite)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrp.attribute(model, x, 1, composite="epsilon")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lrp.attribute(model, x, 1, composite="epsilon_plus")
    with pytest.warns(RuntimeWarning, match="bfloat16"):
        lrp.attribute(model.bfloat16(), x.bfloat16(), 1, composite="epsilon")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's compiler about itself
@pytest.mark.parametrize(
    "composite",
    [COMPOSITES[0], *(pytest.param(c, marks=pytest.mark.slow) for c in (*COMPOSITES[1:], "guided_backprop"))],
    ids=lambda c: getattr(c, "name", c),
)
def test_compiled_equals_eager(model: nn.Module, x: Tensor, composite: Any) -> None:
    eager = lrp.attribute(model, x, 1, composite=composite, wrt=ALL)
    plan = lrp.prepare(model, x, composite, compile="aot_eager")
    for batch in (x, x[:3]):
        compiled = plan.attribute(batch, 1, wrt=ALL)
        n = len(batch)
        assert _error(compiled.input, eager.input[:n]) <= 1e-5
        for name, r in compiled.layers.items():
            assert torch.allclose(r, eager.layers[name][:n], rtol=1e-4, atol=1e-5), name
    whole = plan.attribute(x, 1, wrt=ALL)
    for name, r in whole.weights.items():
        assert torch.allclose(r, eager.weights[name], rtol=1e-3, atol=1e-5), name
    if whole.ledger is not None:
        assert (whole.ledger.gap.abs() <= 1e-4 * whole.ledger.magnitude()).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_by_the_default_backend(model: nn.Module, x: Tensor) -> None:
    """Needs a C++ compiler, as torch.compile does on a CPU."""
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler")
    eager = lrp.attribute(model, x, 1, composite="epsilon_plus", wrt=ALL)
    compiled = lrp.attribute(model, x, 1, composite="epsilon_plus", wrt=ALL, compile=True)
    assert _error(compiled.input, eager.input) <= 1e-5


def test_a_plan_is_compiled_or_not(model: nn.Module, x: Tensor) -> None:
    plan = lrp.prepare(model, x, "epsilon")
    with pytest.raises(lrp.errors.InputError, match=r"lrp\.prepare"):
        lrp.attribute(plan, x, compile=True)
