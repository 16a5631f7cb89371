"""Composites equal zennit 1.0.0's to 1e-10 in float64, cheap forms included."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp
from lrp import composites

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore:The model's forward:UserWarning"),
]
BOX = 3.0
SUMS = {"stabilise_sums": 1e-6}


def make(models: Any, name: str) -> nn.Module:
    """A network with drawn statistics; VGG's dense layers are narrowed: they are nine tenths of its weights."""
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=20)
    if "vgg" in name:
        for i, sizes in {0: (512 * 7 * 7, 64), 3: (64, 48), 6: (48, 20)}.items():
            model.classifier[i] = nn.Linear(*sizes)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias, std=0.1)
    return model.double().eval()


@pytest.fixture(scope="module")
def network(torchvision_models: Any) -> Callable[[str], nn.Module]:
    """The networks, each made and exported once."""
    return functools.cache(functools.partial(make, torchvision_models))


def pictures(name: str) -> Tensor:
    size = 32 if "vgg" in name else 64
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def canonizers(zennit: Any, name: str) -> list[Any]:
    return [zennit.torchvision.VGGCanonizer() if "vgg" in name else zennit.torchvision.ResNetCanonizer()]


def bounds() -> dict[str, Tensor]:
    high = torch.full((1, 3, 1, 1), BOX, dtype=torch.float64)
    return {"low": -high, "high": high}


Pair = tuple[Callable[[], lrp.Composite], Callable[[Any, Any], Any]]  # ours; theirs, from zennit and canonizers
RELEVANCE: dict[str, Pair] = {
    "epsilon_plus": (
        lambda: composites.epsilon_plus(**SUMS),
        lambda z, c: z.composites.EpsilonPlus(canonizers=c),
    ),
    "epsilon_plus, no biases": (
        lambda: composites.epsilon_plus(**SUMS, ignore_bias=True),
        lambda z, c: z.composites.EpsilonPlus(zero_params=["bias"], canonizers=c),
    ),
    "epsilon_gamma_box": (
        lambda: composites.epsilon_gamma_box(-BOX, BOX, **SUMS),
        lambda z, c: z.composites.EpsilonGammaBox(**bounds(), canonizers=c),
    ),
    "epsilon_plus_flat": (
        lambda: composites.epsilon_plus_flat(**SUMS),
        lambda z, c: z.composites.EpsilonPlusFlat(canonizers=c),
    ),
    "epsilon_alpha2_beta1": (
        lambda: composites.epsilon_alpha2_beta1(**SUMS),
        lambda z, c: z.composites.EpsilonAlpha2Beta1(canonizers=c),
    ),
    "epsilon_alpha2_beta1_flat": (
        lambda: composites.epsilon_alpha2_beta1_flat(**SUMS),
        lambda z, c: z.composites.EpsilonAlpha2Beta1Flat(canonizers=c),
    ),
    "excitation_backprop": (
        lambda: composites.excitation_backprop(**SUMS),
        lambda z, c: z.composites.ExcitationBackprop(zero_params=["bias"], canonizers=c),
    ),
    "excitation_backprop, with biases": (
        lambda: composites.excitation_backprop(**SUMS, ignore_bias=False),
        lambda z, c: z.composites.ExcitationBackprop(canonizers=c),
    ),
}
GRADIENTS: dict[str, Pair] = {
    "guided_backprop": (composites.guided_backprop, lambda z, c: z.composites.GuidedBackprop()),
    "deconvnet": (composites.deconvnet, lambda z, c: z.composites.DeconvNet()),
}
NETWORKS = ["vgg11", "vgg11_bn", "resnet18", pytest.param("resnet50", marks=pytest.mark.slow)]


def expected(zennit: Any, model: nn.Module, x: Tensor, composite: Any, seed: Callable[[Tensor], Tensor]) -> Tensor:
    twin = copy.deepcopy(model)  # zennit's canonizers write into the model
    with zennit.attribution.Gradient(model=twin, composite=composite) as attributor:
        _, result = attributor(x.clone(), seed)
    return result


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / b.abs().sum())


@pytest.mark.parametrize("composite", RELEVANCE)
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_zennit(network: Callable[[str], nn.Module], zennit: Any, name: str, composite: str) -> None:
    model = network(name)
    x = pictures(name).clamp(-BOX, BOX)
    ours, theirs = RELEVANCE[composite]
    weight = torch.randn(20, dtype=torch.float64)
    target = expected(zennit, model, x, theirs(zennit, canonizers(zennit, name)), lambda out: out * weight)
    plan = lrp.prepare(model, x, ours())
    rel = plan.attribute(x, start=lrp.Seed(weight.expand(2, 20)))
    assert error(rel.input, target) <= 1e-10
    if composite in ("epsilon_plus", "epsilon_gamma_box"):
        assert "cheap" in str(plan)


@pytest.mark.parametrize("composite", GRADIENTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_equal_zennit(network: Callable[[str], nn.Module], zennit: Any, name: str, composite: str) -> None:
    model = network(name)
    x = pictures(name)
    ours, theirs = GRADIENTS[composite]
    weight = torch.randn(20, dtype=torch.float64).expand(2, 20)
    target = expected(zennit, model, x, theirs(zennit, None), lambda out: weight)
    rel = lrp.attribute(model, x, start=lrp.Seed(weight), composite=ours())
    assert rel.ledger is None
    assert error(rel.input, target) <= 1e-10


@pytest.mark.parametrize("bounded", [True, False], ids=["box", "w squared"])
def test_best_practice_equals_zennit(network: Callable[[str], nn.Module], zennit: Any, bounded: bool) -> None:
    """Depths of vgg11's eleven layers, counted by hand: input, four gamma, four epsilon, two LRP-0."""
    model = network("vgg11")
    x = pictures("vgg11").clamp(-BOX, BOX)
    z = zennit.rules
    middle = zennit.core.Stabilizer(0.25, norm_scale=True)
    first = z.ZBox(**bounds()) if bounded else z.WSquare()
    theirs = zennit.composites.NameMapComposite(
        [
            (["features.0"], first),
            ([f"features.{i}" for i in (3, 6, 8, 11)], z.Gamma(0.25)),
            ([f"features.{i}" for i in (13, 16, 18)] + ["classifier.0"], z.Epsilon(middle)),
            (["classifier.3", "classifier.6"], z.Epsilon(1e-6)),
            (["avgpool"], z.Norm()),
        ]
    )
    weight = torch.randn(20, dtype=torch.float64)
    target = expected(zennit, model, x, theirs, lambda out: out * weight)
    limits = {"low": -BOX, "high": BOX} if bounded else {}
    ours = composites.best_practice(**limits, **SUMS)
    rel = lrp.attribute(model, x, start=lrp.Seed(weight.expand(2, 20)), composite=ours)
    assert error(rel.input, target) <= 1e-10
