"""Relevance of weights by the epsilon rule, under any composite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp
from lrp.errors import InputError

COMPOSITES = ["epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box", "epsilon"]


def network(norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(2, 4, 3, padding=1)]
    layers += [nn.BatchNorm2d(4)] if norm else []
    layers += [nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)]
    net = nn.Sequential(*layers).double().eval()
    if norm:
        for p in (net[1].weight, net[1].bias, net[1].running_mean):
            nn.init.normal_(p)  # type: ignore[arg-type]  # modules of a Sequential
        net[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]  # as above
    return net


def composite(name: str) -> Any:
    return lrp.composites.epsilon_gamma_box(-6, 6) if name == "epsilon_gamma_box" else name


def dense(net: nn.Sequential, x: Tensor, names: list[str], relevance: dict[str, Tensor]) -> dict[str, Tensor]:
    """w dz/dw R / (z + 1e-6 sgn z), summed over samples and places, by autograd on one layer at a time."""
    out = {}
    value = x
    modules = list(net.named_children())
    for i, (name, module) in enumerate(modules):
        norm = modules[i + 1][1] if i + 1 < len(modules) and isinstance(modules[i + 1][1], nn.BatchNorm2d) else None
        if name in names:
            parameters = [p for p in (module.weight, module.bias) if isinstance(p, Tensor)]
            z = module(value.detach())
            z = z if norm is None else norm(z)
            r = relevance[name if norm is None else modules[i + 1][0]]
            s = r / (z + 1e-6 * torch.where(z < 0, -1.0, 1.0))
            grads = torch.autograd.grad((z * s.detach()).sum(), parameters)
            for label, p, g in zip(("weight", "bias"), parameters, grads, strict=False):
                out[f"{name}.{label}"] = p.detach() * g
        value = module(value)
    return out


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", COMPOSITES)
def test_equals_the_dense_formula(name: str, norm: bool) -> None:
    net, x = network(norm), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    rel = lrp.attribute(net, x, 1, composite=composite(name), wrt=("layers", "weights"), weight_rule="epsilon")
    names = [n for n, m in net.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))]
    expected = dense(net, x, names, dict(rel.layers))
    if norm:  # a folded layer's bias has no relevance of its own
        expected.pop("0.bias")
    for key, value in expected.items():
        error = (rel.weights[key] - value).abs().sum() / value.abs().sum()
        assert error < 1e-6, (key, error)


def test_the_input_and_the_books_do_not_change() -> None:
    net, x = network(True), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    own = lrp.attribute(net, x, 1, wrt=("input", "weights"))
    other = lrp.attribute(net, x, 1, wrt=("input", "weights"), weight_rule="epsilon")
    assert torch.equal(own.input, other.input)
    assert not torch.allclose(own.weights["0.weight"], other.weights["0.weight"])


def test_under_epsilon_it_is_the_rule_itself() -> None:
    net, x = network(False), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    own = lrp.attribute(net, x, 1, composite="epsilon", wrt="weights")
    other = lrp.attribute(net, x, 1, composite="epsilon", wrt="weights", weight_rule="epsilon")
    assert all(torch.equal(own.weights[k], other.weights[k]) for k in own.weights)


def test_unknown() -> None:
    with pytest.raises(InputError, match="weight_rule"):
        lrp.attribute(network(False), torch.randn(1, 2, 6, 6, dtype=torch.float64), wrt="weights", weight_rule="z")
