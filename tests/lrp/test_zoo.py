"""Whole networks: against the naive oracle at every layer, with books that close.

The networks are made hard: zero heads and tiny layer scales are drawn anew,
batch-norm statistics are random, and every test runs with and without biases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracles.naive import explain, naive
from torch import Tensor, nn

import lrp
from lrp import rules
from lrp.composites import (
    ANY_CONV,
    Composite,
    First,
    epsilon_alpha2_beta1_flat,
    epsilon_gamma_box,
    epsilon_plus,
)


@dataclass(frozen=True)
class Case:
    """A network of the zoo.

    ``conserves``: without biases and stabilisers nothing absorbs anything.
    ``cover``: share of the engine's layers that the oracle has to see; below
    0.6 only with a reason beside it.
    """

    name: str
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    conserves: bool = False
    cover: float = 0.6
    composites: tuple[str, ...] = ()  # all of them where empty


def slow(case: Case) -> Any:
    return pytest.param(case, marks=pytest.mark.slow, id=case.name)


FEW = ("lrp-0", "epsilon_plus", "epsilon_gamma_box")  # where all would take too long
SMALL_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 64,
    "mlp_dim": 128,
    "num_classes": 10,
}
TORCHVISION = [
    Case("resnet18", conserves=True),
    Case("squeezenet1_1", conserves=True),
    Case("mobilenet_v2", conserves=True, composites=FEW),
    Case("mobilenet_v3_small", conserves=True),
    Case("VisionTransformer", size=32, options=SMALL_VIT),
    slow(Case("efficientnet_b0", conserves=True, composites=FEW)),
    slow(Case("shufflenet_v2_x1_0", conserves=True)),
    slow(Case("resnet50", conserves=True)),
    slow(Case("vgg16", conserves=True, composites=FEW)),
    slow(Case("vgg16_bn", conserves=True, composites=FEW)),
    slow(Case("densenet121", conserves=True)),
    slow(Case("googlenet", options={"init_weights": False, "aux_logits": False}, conserves=True)),
    slow(Case("regnet_y_400mf", conserves=True)),
    slow(Case("mnasnet1_0", conserves=True)),
    slow(Case("convnext_tiny", conserves=True)),
    slow(Case("vit_b_16", options={"image_size": 64}, composites=FEW)),
    slow(Case("swin_t", conserves=True)),
]
TIMM = [
    slow(Case("repvgg_a0", conserves=True)),
    slow(Case("resnest14d", conserves=True)),
    slow(Case("skresnet18", conserves=True)),
    slow(Case("eca_resnet33ts", conserves=True)),
    slow(Case("ghostnet_100", conserves=True)),
    slow(Case("hrnet_w18_small", conserves=True)),
    slow(Case("dpn48b", conserves=True)),
    slow(Case("dla34", conserves=True)),
    slow(Case("rexnet_100", conserves=True)),
    slow(Case("ese_vovnet19b_dw", conserves=True)),
    slow(Case("nf_resnet50", conserves=True)),
    slow(Case("poolformer_s12", conserves=True)),
    slow(Case("convmixer_768_32", size=32, conserves=True, composites=FEW)),
    slow(Case("mixer_s32_224", options={"img_size": 64}, conserves=True)),
    slow(Case("fastvit_t8", conserves=True)),
    slow(Case("edgenext_xx_small")),
    slow(Case("levit_128s", options={"img_size": 64}, conserves=True)),
    slow(Case("xcit_nano_12_p8_224", options={"img_size": 64})),
    slow(Case("coat_lite_tiny", options={"img_size": 64})),
    slow(Case("visformer_tiny", options={"img_size": 64})),
    slow(Case("mobilevit_xxs", conserves=True)),
]


def harden(model: nn.Module) -> nn.Module:
    """No zero heads, no tiny scales, random statistics with scales of both signs."""
    generator = torch.Generator().manual_seed(1)

    def normal(shape: torch.Size, scale: float = 0.1) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def positive(shape: torch.Size, low: float) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + low

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.abs().max() < 1e-3 and p.ndim == 2:
                p.copy_(normal(p.shape))
            elif p.abs().max() < 1e-3 or any(part in name for part in ("layer_scale", "gain", "skipinit")):
                p.copy_(positive(p.shape, 0.3))
            if name.endswith("bias"):
                p.copy_(normal(p.shape))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                size = m.running_mean.shape
                m.running_mean.copy_(normal(size))
                m.running_var.copy_(positive(size, 0.5))
                scale = positive(size, 0.6)
                sign = (torch.rand(size, generator=generator) < 0.2).double()
                m.weight.copy_(scale * (1 - 2 * sign))
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
def build(torchvision_models: Any) -> Callable[[str], nn.Module]:
    def make(name: str, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        if hasattr(torchvision_models, name):
            model = getattr(torchvision_models, name)(**options)
        else:
            timm = pytest.importorskip("timm", reason="needs timm's model definitions: make peers")
            model = timm.create_model(name, **options)
        return harden(model.double().eval())

    return make


COMPOSITES: dict[str, Composite] = {
    "lrp-0": lrp.Composite([("*", rules.Epsilon(0.0))]),
    "epsilon_plus": epsilon_plus(),
    "epsilon_gamma_box": epsilon_gamma_box(-3.0, 3.0),
    "epsilon_plus, large stabilisers": epsilon_plus(epsilon=1e-3, stabilise_sums=1e-3),
    "epsilon_gamma_box, no stabiliser": epsilon_gamma_box(-3.0, 3.0, gamma=0.5, epsilon=0.0),
    "epsilon_alpha2_beta1_flat": epsilon_alpha2_beta1_flat(),
    "gamma everywhere": lrp.Composite([("*", rules.Gamma(0.25))]),
}


def rules_of(composite: Composite) -> dict[str, Any]:
    """What the oracle needs to know of a composite of this file."""
    by_kind = {"first" if isinstance(m, First) else m: rule for m, rule in composite.rules}
    dense = by_kind["*"]
    return {
        "convolution": by_kind.get(ANY_CONV, dense),
        "dense": dense,
        "first": by_kind.get("first"),
        "sums": composite.stabilise_sums,
    }


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().sum() / b.abs().sum().clamp_min(1e-300))


def compare(model: nn.Module, x: Tensor, composite: Composite, cover: float) -> dict[str, float]:
    """Largest relative errors of one explanation, by what is compared; fails where the oracle sees too little."""
    with torch.no_grad():
        plain = model(x)
    c = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2), dtype=plain.dtype)
    rel = lrp.attribute(model, x, start=lrp.Seed(c), composite=composite, wrt=("input", "layers"))
    r_in, layers, twin_output = explain(naive(model, x=x, **rules_of(composite)), x, c)
    common = [n for n in layers if n in rel.layers and layers[n].abs().sum() > 0]
    assert len(common) >= cover * len(rel.layers), f"the oracle covers {len(common)} of {len(rel.layers)} layers"
    books = rel.ledger
    worst = {
        "output": error(rel.output, plain),
        "twin's output": error(twin_output, plain),
        "input": error(rel.input, r_in),
        "total": float((books.gap.abs() / books.magnitude()).max()),
    }
    worst |= {f"layer {n}": error(rel.layers[n], layers[n]) for n in common}
    for module, row in books.modules.items():
        own = rel.layers.get(module)
        own = own if own is not None and len(own) == len(x) else rel.output
        scale = own.flatten(1).abs().sum(1) + row.start.abs() + row.bias.abs() + row.input.abs()
        worst[f"books {module}"] = float((row.gap.abs() / scale.clamp_min(1e-300)).max())
    if composite is COMPOSITES["lrp-0"]:
        worst["conservation"] = float((rel.input.sum((1, 2, 3)) - (c * plain).sum(1)).abs().sum()) / float(
            (c * plain).sum(1).abs().sum()
        )
    return worst


LIMITS = {"output": 1e-11, "twin's output": 1e-11, "input": 1e-9, "total": 1e-10, "layer": 1e-8, "books": 1e-10}


@pytest.mark.peer
@pytest.mark.parametrize("case", [*TORCHVISION, *TIMM], ids=lambda case: case.name)
def test_zoo(build: Callable[..., nn.Module], case: Case) -> None:
    model = build(case.name, **case.options)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, case.size, case.size, generator=generator, dtype=torch.float64).clamp(-3, 3)
    for biases in (True, False):
        if not biases:
            without_biases(model)
        for name in case.composites or COMPOSITES:
            composite = COMPOSITES[name]
            worst = compare(model, x, composite, case.cover)
            conserved = worst.pop("conservation", 0.0)
            found = {k: f"{e:.1e}" for k, e in worst.items() if not e <= LIMITS[k.split()[0] if k not in LIMITS else k]}
            assert not found, f"{name}, {'with' if biases else 'without'} biases: {found}"
            if case.conserves and not biases:
                assert conserved <= 1e-9, f"{name}: {conserved:.1e}"


@pytest.mark.peer
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_epsilon_zero_is_gradient_times_input(build: Callable[..., nn.Module], name: str) -> None:
    """On ReLU networks, at every layer that is not folded away."""
    model = build(name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    zero = lrp.attribute(model, x, 7, composite=lrp.rules.Epsilon(0.0), wrt="layers")
    plain = lrp.attribute(model, x, 7, composite="gradient_x_input", wrt="layers")
    assert error(zero.input, plain.input) <= 1e-10
    folded = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for layer in plain.layers:
        if layer not in folded:
            assert error(zero.layers[layer], plain.layers[layer]) <= 1e-10, layer
