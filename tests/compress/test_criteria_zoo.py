"""Criteria on published architectures."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from networks import hard
from torch import nn

from compress.criteria import activation, logit_x_activation, lrp, taylor
from lrp import rules


@pytest.fixture(scope="module")
def definitions() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision's model definitions: make peers")
    from experiments.models import torchvision_models

    return torchvision_models()


def weighted(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "shufflenet_v2_x0_5", "vgg11_bn"])
def test_epsilon_and_the_gradient_are_read_at_one_place(name: str, definitions: Any) -> None:
    """Two independent ways of finding the batch norm that belongs to a layer."""
    model = hard(getattr(definitions, name)(num_classes=10)).double()
    layers = weighted(model)
    data = [(torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 5]))]
    relevance = lrp(rules.Epsilon(1e-13), "logit")(model, data, layers, progress=False)
    gradient = logit_x_activation()(model, data, layers, progress=False)
    assert list(relevance.values) == list(gradient.values) == layers
    for layer, own in relevance.values.items():
        other = gradient.values[layer]
        assert (own - other).abs().max() <= 1e-7 * other.abs().max(), layer


@pytest.mark.slow
def test_windows_and_gates(definitions: Any) -> None:
    """Shifted windows lie in the batch; gates get a gradient, but no relevance."""
    swin = hard(definitions.swin_t(num_classes=10))
    layers = [n for n in weighted(swin) if ".mlp." in n][:4]
    x, y = torch.randn(3, 3, 64, 64), torch.tensor([0, 5, 7])
    whole = taylor()(swin, [(x, y)], layers, progress=False)
    apart = [taylor()(swin, [(x[i : i + 1], y[i : i + 1])], layers, progress=False) for i in range(3)]
    for layer in layers:
        mean = torch.stack([s.values[layer] for s in apart]).mean(0)
        assert torch.allclose(whole.values[layer], mean, rtol=1e-3, atol=1e-3 * mean.max().item())
    mobile = hard(definitions.mobilenet_v3_small(num_classes=10))
    layers = weighted(mobile)
    found = lrp()(mobile, [(x, y)], layers, progress=False)
    gates = {n for n in layers if n.endswith((".fc1", ".fc2"))}
    assert set(found.unscored) == gates
    assert set(activation()(mobile, [x], layers, progress=False).values) == set(layers)
