"""Batch normalisations folded into the layer in front or behind, against the dense matrix of both."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracles.dense import matrix, relevance
from torch import Tensor, nn

import lrp
from lrp import rules

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda b: nn.Linear(4, 3, bias=b), (4,)),
    "conv1d": (lambda b: nn.Conv1d(4, 3, 3, padding=2, dilation=2, bias=b), (4, 5)),
    "conv2d": (lambda b: nn.Conv2d(4, 3, 3, padding=1, bias=b), (4, 4, 3)),
    "conv2d without padding": (lambda b: nn.Conv2d(4, 3, 2, bias=b), (4, 4, 3)),
    "conv2d grouped, strided": (lambda b: nn.Conv2d(4, 6, 3, 2, padding=1, groups=2, bias=b), (4, 5, 4)),
    "conv2d same, odd total": (lambda b: nn.Conv2d(4, 2, (2, 4), padding="same", bias=b), (4, 3, 5)),
    "conv3d": (lambda b: nn.Conv3d(4, 2, 2, padding=1, bias=b), (4, 2, 2, 3)),
    "transposed": (lambda b: nn.ConvTranspose2d(4, 4, 3, 2, padding=1, groups=2, bias=b), (4, 2, 3)),
}
RULES = [
    rules.Epsilon(1e-3),
    rules.ZPlus(1e-3),
    rules.Gamma(0.25, 1e-3),
    rules.AlphaBeta(2, 1, 1e-3),
]


def norm(size: int, ndim: int) -> nn.Module:
    """A batch norm with drawn statistics and scales of both signs."""
    bn: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[ndim](size, eps=0.01)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bn


class Net(nn.Module):
    def __init__(self, layer: nn.Module, before: nn.Module, behind: nn.Module, relu: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.before, self.layer, self.behind = before, layer, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(self.before(self.relu(x))))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("relu", [True, False], ids=["x >= 0", "any x"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_dense_matrix_of_both(kind: str, bias: bool, relu: bool) -> None:
    factory, shape = LAYERS[kind]
    layer = factory(bias)
    before = norm(shape[0], len(shape))
    out_channels = layer.out_features if kind == "linear" else layer.out_channels
    for behind in (nn.Identity(), norm(out_channels, len(shape))):
        model = Net(layer, before, behind, relu).double().eval()
        x = torch.randn(2, *shape, dtype=torch.float64)
        w, b = matrix(nn.Sequential(before, layer, behind), torch.Size(shape))
        out = model(x).detach()
        c = torch.randn_like(out)
        for rule in RULES:
            plan = lrp.prepare(model, x, rule)
            assert "batch norm + " in str(plan)
            rel = plan.attribute(x, start=lrp.Seed(c), wrt=("input", "layers", "channels", "weights"))
            assert torch.allclose(rel.output, out, atol=1e-12)
            for i in range(2):
                inner = (x[i].relu() if relu else x[i]).flatten()
                r_in, _, books = relevance(rule, w, b, inner, (out[i] * c[i]).flatten())
                scale = r_in.abs().sum() + (out[i] * c[i]).abs().sum()
                assert (rel.input[i].flatten() - r_in).abs().sum() <= 1e-10 * scale, rule
                assert (rel.layers["before"][i].flatten() - r_in).abs().sum() <= 1e-10 * scale
                assert abs(rel.ledger.modules["layer"].bias[i].item() - books["bias"]) <= 1e-9 * scale
            assert (rel.ledger.gap.abs() <= 1e-10 * rel.ledger.magnitude()).all()
            total = rel.weights["layer.weight"].sum()
            expected = rel.ledger.input.sum() + rel.ledger.lost.sum()
            assert abs(total - expected) <= 1e-9 * rel.ledger.magnitude().sum(), "weights share what the input gets"


def test_not_folded_where_something_else_reads_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = norm(2, 3), nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x)
            return self.conv(y) + y

    model = Twice().double().eval()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    plan = lrp.prepare(model, x, "epsilon")
    assert "batch norm + " not in str(plan)
    zero = lrp.attribute(model, x, start=lrp.Seed(model(x).detach()), composite=rules.Epsilon(0.0))
    plain = lrp.attribute(model, x, start=lrp.Seed(model(x).detach()), composite="gradient_x_input")
    assert torch.allclose(zero.input, plain.input, atol=1e-12)


def test_plane_follows_the_statistics() -> None:
    """The fingerprint covers what is folded from in front."""
    model = nn.Sequential(norm(2, 3), nn.Conv2d(2, 3, 3, padding=1)).double().eval()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    lrp.attribute(model, x, start=torch.ones(1, 3, 4, 4, dtype=torch.float64), composite=rules.ZPlus())
    model[0].running_mean.data += 1
    rel = lrp.attribute(model, x, start=torch.ones(1, 3, 4, 4, dtype=torch.float64), composite=rules.ZPlus())
    assert torch.allclose(rel.output, model(x), atol=1e-12)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3, rules.Rms(0.1)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_heavy_layers_take_their_norm_as_a_scale(kind: str, epsilon: Any, bias: bool, relu: bool) -> None:
    """Under epsilon the weights of such a layer stay the model's own: nothing to fold, nothing to watch."""
    makers: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "linear": (nn.Linear(40, 3, bias=bias), (40,)),
        "conv": (nn.Conv2d(8, 4, 3, padding=1, groups=2, bias=bias), (8, 2, 2)),
        "transposed": (nn.ConvTranspose2d(16, 2, 2, bias=bias), (16, 1, 2)),
    }
    layer, shape = makers[kind]
    bn = norm(3 if kind == "linear" else layer.out_channels, len(shape))
    model = nn.Sequential(layer, bn, nn.ReLU() if relu else nn.Identity()).double().eval()
    rule, x = rules.Epsilon(epsilon), torch.randn(2, *shape, dtype=torch.float64)
    plan = lrp.prepare(model, x, rule)
    assert "epsilon, scaled" in str(plan)
    for edit in (0.0, 0.5):
        layer.weight.data += edit
        bn.running_mean.data += edit
        w, b = matrix(model[:2], torch.Size(shape))
        out = model(x).detach()
        c = torch.randn_like(out)
        rel = plan.attribute(x, start=lrp.Seed(c), wrt=("input", "weights"))
        assert torch.allclose(rel.output, out, atol=1e-12)
        entries_total = 0.0
        for i in range(2):
            r_in, entries, books = relevance(rule, w, b, x[i].flatten(), (out[i] * c[i]).flatten())
            entries_total += entries.sum().item()
            scale = r_in.abs().sum() + (out[i] * c[i]).abs().sum()
            assert (rel.input[i].flatten() - r_in).abs().sum() <= 1e-10 * scale
            for column in ("bias", "stabiliser", "dead"):
                assert abs(getattr(rel.ledger, column)[i].item() - books[column]) <= 1e-9 * scale, column
        assert abs(rel.weights["0.weight"].sum().item() - entries_total) <= 1e-9 * rel.ledger.magnitude().sum()
        folded = lrp.attribute(model, x, start=lrp.Seed(c), composite=rules.Gamma(0.0, 1e-3), wrt="weights")
        if epsilon == 1e-3:
            assert torch.allclose(rel.weights["0.weight"], folded.weights["0.weight"], atol=1e-12)
            options: dict[str, Any] = {"wrt": "weights", "aggregate": "abs_element", "start": lrp.Seed(c[0])}
            one, two = (
                lrp.collect(model, [x], composite=r, progress=False, **options).weights["0.weight"]
                for r in (rule, rules.Gamma(0.0, 1e-3))
            )
            assert torch.allclose(one, two, atol=1e-12)


def test_folded_through_dropout_and_apart_from_other_readers() -> None:
    """The norm's relevance is what its own branch brings back, not all that its input gets."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn, self.drop = nn.Conv2d(2, 2, 1), norm(2, 3), nn.Dropout(0.5)
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.conv(self.drop(self.bn(x)))

    model = Residual().double().eval()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    c = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    plan = lrp.prepare(model, x, rules.Epsilon(0.0))
    assert "batch norm + " in str(plan)
    rel = plan.attribute(x, start=lrp.Seed(c), wrt=("input", "layers"))
    read = model.stem(x).detach().requires_grad_()
    (branch,) = torch.autograd.grad(model.conv(model.bn(read)), read, c)
    for name in ("bn", "drop"):
        assert torch.allclose(rel.layers[name], (read * branch).detach(), atol=1e-12)
    assert torch.allclose(rel.layers["stem"], (read * (branch + c)).detach(), atol=1e-12)


@pytest.mark.parametrize("rule", [rules.ZBox(-1.5, 2.0), rules.RootPoint(0.3), rules.WSquare(), rules.Flat()], ids=str)
def test_rules_that_return_relevance_keep_the_units_of_their_layer(rule: Any) -> None:
    """A normalisation in front as a batch norm, or spelled out: the same relevance."""

    class ByHand(nn.Module):
        def __init__(self, bn: nn.Module) -> None:
            super().__init__()
            scale = (bn.running_var + bn.eps).rsqrt() * bn.weight
            self.scale = scale.detach().reshape(-1, 1, 1)
            self.shift = (bn.bias - bn.running_mean * scale).detach().reshape(-1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + self.shift

    bn, conv = norm(2, 3).double().eval(), nn.Conv2d(2, 3, 3, padding=1).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64).clamp(-1, 1)
    x = (x - bn(torch.zeros_like(x))) / 10  # within the box behind the norm
    seed = lrp.Seed(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a few pixels leave the box
        one = lrp.attribute(nn.Sequential(bn, conv).eval(), x, start=seed, composite=rule)
        two = lrp.attribute(nn.Sequential(ByHand(bn), conv).eval(), x, start=seed, composite=rule)
    assert torch.allclose(one.input, two.input, atol=1e-12)
