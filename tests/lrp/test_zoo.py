"""Whole networks: against the naive oracle at every layer, with books that close.

The networks are made hard: zero heads and tiny layer scales are drawn anew,
batch-norm statistics are random, and every test runs with and without biases.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.naive import explain, naive
from torch import Tensor, nn

import lrp
from lrp import rules
from lrp.composites import ANY_CONV

NETWORKS = [
    "resnet18",
    "squeezenet1_1",
    "mobilenet_v2",
    "efficientnet_b0",
    "vit_b_16",
    pytest.param("vgg16_bn", marks=pytest.mark.slow),
    pytest.param("resnet50", marks=pytest.mark.slow),
    pytest.param("googlenet", marks=pytest.mark.slow),
    pytest.param("densenet121", marks=pytest.mark.slow),
    pytest.param("nf_resnet50", marks=pytest.mark.slow),
]


def harden(model: nn.Module) -> nn.Module:
    """No zero heads, no tiny scales, random statistics with scales of both signs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.abs().max() < 1e-3 or "layer_scale" in name or "gain" in name or "skipinit" in name:
                p.copy_(torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.3)
            if name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(0.1 * torch.randn(m.num_features, generator=generator, dtype=torch.float64))
                m.running_var.copy_(torch.rand(m.num_features, generator=generator, dtype=torch.float64) + 0.5)
                scale = torch.rand(m.num_features, generator=generator, dtype=torch.float64) + 0.6
                sign = (torch.rand(m.num_features, generator=generator) < 0.2).double()
                m.weight.copy_(scale * (1 - 2 * sign))
            if isinstance(m, nn.Linear) and m.weight.abs().max() == 0:
                m.weight.copy_(0.1 * torch.randn(m.weight.shape, generator=generator, dtype=torch.float64))
    return model


def without_biases(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.zero_()


@pytest.fixture(scope="module")
def build(torchvision_models: Any) -> Any:
    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        if name == "nf_resnet50":
            timm = pytest.importorskip("timm", reason="needs timm's model definitions: make peers")
            model = timm.create_model(name)
        elif name == "vit_b_16":
            model = torchvision_models.vit_b_16(image_size=64)
        elif name == "googlenet":
            model = torchvision_models.googlenet(init_weights=False, aux_logits=False)
        else:
            model = getattr(torchvision_models, name)()
        return harden(model.double().eval())

    return make


COMPOSITES = {
    "lrp-0": (rules.Epsilon(0.0), rules.Epsilon(0.0)),
    "z+ and epsilon": (rules.ZPlus(), rules.Epsilon()),
    "gamma and epsilon": (rules.Gamma(), rules.Epsilon()),
}


def close(a: Tensor, b: Tensor, limit: float, what: str = "") -> None:
    assert a.shape == b.shape
    error = (a - b).abs().sum() / b.abs().sum().clamp_min(1e-300)
    assert error <= limit, f"{what}: relative error {error:.2e}"


@pytest.mark.peer
@pytest.mark.parametrize("name", NETWORKS)
def test_zoo(build: Any, name: str) -> None:
    model = build(name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for biases in (True, False):
        if not biases:
            without_biases(model)
        with torch.no_grad():
            out = model(x)
        c = torch.randn_like(out)
        for convolution, dense in COMPOSITES.values():
            composite = lrp.Composite([(ANY_CONV, convolution), ("*", dense)])
            rel = lrp.attribute(model, x, start=lrp.Seed(c), composite=composite, wrt=("input", "layers"))
            twin = naive(model, convolution, dense)
            r_in, layers = explain(twin, x, c)
            close(rel.output, out, 1e-11)
            close(rel.input, r_in, 1e-9)
            common = [n for n in layers if n in rel.layers and layers[n].abs().sum() > 0]
            assert len(common) >= 0.6 * len(rel.layers), "the oracle covers too few layers"
            for layer in common:
                close(rel.layers[layer], layers[layer], 1e-8, layer)
            books = rel.ledger
            assert (books.gap.abs() <= 1e-10 * books.magnitude()).all()
            for module, row in books.modules.items():
                own = rel.layers.get(module)
                own = own if own is not None and len(own) == 2 else rel.output
                scale = own.flatten(1).abs().sum(1) + row.start.abs() + row.bias.abs() + row.input.abs()
                assert (row.gap.abs() <= 1e-10 * scale).all(), module
            if convolution.epsilon == 0 and not biases and name not in ("vit_b_16",):
                # nothing absorbs anything where there is no bias and no stabiliser
                close(rel.input.sum((1, 2, 3)), (c * out).sum(1), 1e-9)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_epsilon_zero_is_gradient_times_input(build: Any, name: str) -> None:
    """On ReLU networks, at every layer that is not folded away."""
    model = build(name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    zero = lrp.attribute(model, x, 7, composite=lrp.rules.Epsilon(0.0), wrt="layers")
    plain = lrp.attribute(model, x, 7, composite="gradient_x_input", wrt="layers")
    close(zero.input, plain.input, 1e-10)
    folded = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for layer in plain.layers:
        if layer not in folded:
            close(zero.layers[layer], plain.layers[layer], 1e-10)
