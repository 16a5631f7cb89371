"""Rules of a user's own operations and modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp
from lrp.errors import RuleError, UnsupportedOperationError


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) + x * x.abs() / (1 + x * x)


class LogMeanExp(nn.Module):
    """A soft pool over the last axis, whose rule hands on relevances."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.logsumexp(x, -1)


class Twins(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sin(x * y)


def _net(*tail: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), *tail).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def _layer(model: nn.Module, x: Tensor, r: Tensor, upto: int) -> Tensor:
    """Relevance of the input for a relevance r of the output of the first ``upto`` modules."""
    return lrp.attribute(model[:upto], x, start=r, composite=lrp.rules.Epsilon(0.0)).input


def test_unregistered_is_refused_and_told_how(x: Tensor) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"lrp\.register"):
        lrp.attribute(_net(Squash()), x, composite="epsilon")


def test_pass_on_a_module_class(x: Tensor) -> None:
    model = _net(Squash())
    start = model(x).detach() * torch.randn(5, 6, dtype=torch.float64)
    with lrp.register(Squash, lrp.rules.Pass()):
        rel = lrp.attribute(model, x, start=start, composite=lrp.rules.Epsilon(0.0), wrt=("input", "layers"))
    assert torch.allclose(rel.layers["2"], start, atol=1e-12)
    assert torch.allclose(rel.input, _layer(model, x, start, 3), atol=1e-12)
    assert (rel.ledger.gap.abs() <= 1e-12 * rel.ledger.magnitude()).all()
    with pytest.raises(UnsupportedOperationError):  # and forgotten afterwards
        lrp.attribute(model, x, composite="epsilon")


def test_callable_with_relevances_and_subclass(x: Tensor) -> None:
    class Child(LogMeanExp):
        pass

    def rule(c: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.softmax(z, -1) * (c * y)[..., None]

    model = _net(nn.Unflatten(1, (2, 3)), Child())
    start = torch.randn(5, 2, dtype=torch.float64)
    with lrp.register(LogMeanExp, rule, returns="relevance"):
        rel = lrp.attribute(model, x, start=start, composite=lrp.rules.Epsilon(0.0), wrt=("input", "layers"))
    shares = torch.softmax(model[:4](x), -1)
    assert torch.allclose(rel.layers["3"], shares * start[..., None], atol=1e-12)
    assert (rel.ledger.gap.abs() <= 1e-12 * rel.ledger.magnitude()).all()


def test_several_inputs_and_the_remainder(x: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.twins = nn.Linear(4, 3), nn.Linear(4, 3), Twins()

        def forward(self, x: Tensor) -> Tensor:
            return self.twins(self.a(x), self.b(x))

    def rule(c: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return 0.25 * c * y / a, 0.5 * c * y / b

    model = Net().double().eval()
    start = torch.randn(5, 3, dtype=torch.float64)
    with lrp.register(Twins, rule):
        rel = lrp.attribute(model, x, start=start, composite=lrp.rules.Epsilon(0.0), wrt=("input", "layers"))
    assert torch.allclose(rel.layers["a"], start / 4, atol=1e-12)
    assert torch.allclose(rel.layers["b"], start / 2, atol=1e-12)
    assert torch.allclose(rel.ledger.nonlinear, start.sum(1) / 4, atol=1e-12)


@pytest.fixture
def operator() -> Iterator[Any]:
    @torch.library.custom_op("lrp_tests::cube", mutates_args=())
    def cube(t: Tensor) -> Tensor:
        return t**3

    cube.register_fake(torch.empty_like)
    return cube


def test_operators(x: Tensor, operator: Any) -> None:
    class Cube(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return operator(t)

    class Sine(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return torch.sin(t)

    for tail, thing in ((Cube(), operator), (Sine(), torch.sin)):
        model = _net(tail)
        start = torch.randn(5, 6, dtype=torch.float64)
        with lrp.register(thing, lambda c, y, t: c * y / t):
            rel = lrp.attribute(model, x, start=start, composite=lrp.rules.Epsilon(0.0))
        assert torch.allclose(rel.input, _layer(model, x, start, 3), atol=1e-11)


def test_gradient_of_a_pool(x: Tensor) -> None:
    class SecondLargest(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return torch.sort(t, -1).values[..., -2:-1]

    model = _net(SecondLargest())
    with lrp.register(SecondLargest, "gradient"):
        rel = lrp.attribute(model, x, start="logit", composite=lrp.rules.Epsilon(0.0))
        plain = lrp.attribute(model, x, composite="gradient_x_input")
    assert torch.allclose(rel.input, plain.input, atol=1e-12)
    assert (rel.ledger.gap.abs() <= 1e-12 * rel.ledger.magnitude()).all()


def test_a_rule_of_yours_goes_before_the_built_in_one(x: Tensor) -> None:
    model = _net(nn.Tanh())
    before = lrp.attribute(model, x, composite="epsilon").input
    with lrp.register(nn.Tanh, lambda c, y, t: 0 * c):
        assert lrp.attribute(model, x, composite="epsilon").input.abs().max() == 0
    assert torch.equal(lrp.attribute(model, x, composite="epsilon").input, before)


def test_wrong_use_teaches(x: Tensor) -> None:
    with pytest.raises(RuleError, match=r"small nn\.Module"):
        lrp.register(lambda t: t, lrp.rules.Pass())
    with pytest.raises(RuleError, match="Composite"):
        lrp.register(Squash, lrp.rules.Epsilon())
    with pytest.raises(RuleError, match="coefficient"):
        lrp.register(Squash, lrp.rules.Pass(), returns="both")
    with lrp.register(Squash, lambda c, y, t: c[:, :2]), pytest.raises(RuleError, match="shaped like each input"):
        lrp.attribute(_net(Squash()), x, composite="epsilon")
