"""Composites equal zennit 1.0.0's to 1e-10 in float64, cheap forms included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lrp

pytestmark = pytest.mark.peer


def randomise(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias, std=0.1)
    return model.double().eval()


NETWORKS = ["vgg11", "vgg11_bn", "resnet18", pytest.param("resnet50", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore:The model's forward:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_gamma_box"])
def test_equals_zennit(torchvision_models: Any, zennit: Any, name: str, composite: str) -> None:
    model = randomise(getattr(torchvision_models, name)(num_classes=20))
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64).clamp(-3, 3)
    canonizers = [zennit.torchvision.VGGCanonizer() if "vgg" in name else zennit.torchvision.ResNetCanonizer()]
    if composite == "epsilon_plus":
        theirs = zennit.composites.EpsilonPlus(canonizers=canonizers)
        ours = lrp.composites.epsilon_plus(stabilise_sums=1e-6)
    else:
        low = torch.full((1, 3, 1, 1), -3.0, dtype=torch.float64)
        theirs = zennit.composites.EpsilonGammaBox(low=low, high=-low, canonizers=canonizers)
        ours = lrp.composites.epsilon_gamma_box(-3.0, 3.0, stabilise_sums=1e-6)
    weight = torch.randn(20, dtype=torch.float64)
    with zennit.attribution.Gradient(model=copy.deepcopy(model), composite=theirs) as attributor:
        _, expected = attributor(x.clone(), lambda out: out * weight)
    rel = lrp.attribute(model, x, start=lrp.Seed(weight.expand(3, 20)), composite=ours)
    error = (rel.input - expected).abs().sum() / expected.abs().sum()
    assert error <= 1e-10
    forms = str(lrp.prepare(model, x, ours))
    assert "cheap" in forms
