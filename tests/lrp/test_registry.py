"""Rules of a user's own operations and modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp
from lrp import rules
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


def test_gradient_of_what_is_not_homogeneous_books_its_remainder(x: Tensor) -> None:
    class Wave(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            u = torch.cos(t) * 2
            return u[:, :3] + torch.cos(u[:, 3:]) + t[:, :3] ** 3

    model = nn.Sequential(_net(Wave()), nn.Linear(3, 2)).double().eval()
    plain = lrp.attribute(model, x, 1, composite="gradient_x_input")
    for thing in (Wave, torch.cos):
        with lrp.register(thing, "gradient"):
            rel = lrp.attribute(model, x, 1, composite=lrp.rules.Epsilon(0.0), wrt=("input", "layers"))
            assert (rel.ledger.gap.abs() <= 1e-12 * rel.ledger.magnitude()).all()
            assert rel.ledger.nonlinear.abs().min() > 1e-4
            if thing is Wave:
                assert torch.allclose(rel.input, plain.input, atol=1e-12)
                row = rel.ledger.modules["0.3"]
                assert torch.allclose(row.start, rel.layers["0.3"].sum(1), atol=1e-12)
                assert torch.allclose(row.input, rel.layers["0.2"].sum(1), atol=1e-12)
    with lrp.register(Wave, "gradient"):
        again = lrp.attribute(model, x, 1, composite=lrp.rules.Epsilon(0.0), ledger=False)
    assert torch.allclose(again.input, plain.input, atol=1e-12)


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


def test_a_registered_relu_or_norm_is_not_folded_away(x: Tensor) -> None:
    """Fusing and the cheap forms count on the built-in ReLU and batch norm."""

    class Leak(nn.ReLU):
        pass

    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), Leak(), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        model[1].bias.normal_()
    z = model[:2](x).detach()
    seed = lrp.Seed(torch.ones(5, 3, dtype=torch.float64))
    with lrp.register(Leak, lambda c, y, t: torch.ones_like(c)):
        rel = lrp.attribute(model, x, start=seed, composite=rules.Gamma(), wrt=("input", "layers"))
        assert "ReLU" not in str(lrp.prepare(model, x, rules.Gamma())).split("registered")[0]
    assert torch.allclose(rel.layers["1"], z, atol=1e-12), "coefficient 1 wherever z is, negative or not"
    with lrp.register(nn.BatchNorm1d, lambda c, y, t: 2 * c):
        rel = lrp.attribute(model, x, start=seed, composite=rules.Epsilon(0.0), wrt=("input", "layers"))
    assert torch.allclose(rel.layers["0"], 2 * (rel.layers["1"] / z) * model[0](x), atol=1e-11)


def test_undone_in_any_order(x: Tensor) -> None:
    model = _net(Squash())
    one = lrp.register(Squash, lambda c, y, t: c)
    two = lrp.register(Squash, lambda c, y, t: 0 * c)
    one.remove()
    assert lrp.attribute(model, x, composite="epsilon").input.abs().max() == 0
    one.remove()
    two.remove()
    with pytest.raises(UnsupportedOperationError):
        lrp.attribute(model, x, composite="epsilon")


def test_a_plan_does_not_keep_a_rule_that_is_gone(x: Tensor) -> None:
    model = _net(Squash())
    with lrp.register(Squash, lrp.rules.Pass()):
        plan = lrp.prepare(model, x, "epsilon")
        with lrp.register(LogMeanExp, "gradient"):
            plan.attribute(x, 0)  # nothing of this model
    with pytest.raises(lrp.errors.PlanError, match="registered"):
        plan.attribute(x, 0)


def test_a_rule_may_write_into_what_it_gets(x: Tensor) -> None:
    model = _net(Squash())
    with lrp.register(Squash, lambda c, y, t: c.mul_(0.5)):
        rel = lrp.attribute(model, x, 0, composite="epsilon")
    with lrp.register(Squash, lambda c, y, t: c * 0.5):
        same = lrp.attribute(model, x, 0, composite="epsilon")
    assert torch.equal(rel.input, same.input)
    assert (rel.ledger.gap.abs() <= 1e-12 * rel.ledger.magnitude()).all()


@pytest.mark.parametrize("thing", [__import__("math").sin, max, print], ids=str)
def test_functions_that_leave_no_trace_are_refused(thing: Any) -> None:
    with pytest.raises(RuleError, match="no trace"):
        lrp.register(thing, lrp.rules.Pass())


def test_in_place_functions_are_recognised(x: Tensor) -> None:
    class InPlace(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return torch.relu_(t * 1)

    model = _net(InPlace())
    with lrp.register(torch.relu_, lambda c, y, t: 0 * c):
        assert lrp.attribute(model[2:], torch.ones(2, 6).double(), 0).input.abs().max() == 0


@pytest.mark.parametrize("rule", [lambda c: c, lambda c, y, t: None, lambda c, y, t: 1.0], ids=["few", "none", "float"])
def test_rules_that_are_none_teach(x: Tensor, rule: Any) -> None:
    with lrp.register(Squash, rule), pytest.raises(RuleError, match="Squash"):
        lrp.attribute(_net(Squash()), x, 0, composite="epsilon")
