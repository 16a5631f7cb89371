"""Every rule on every layer type against the dense reference, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracles.dense import connections, matrix, relevance, weight_ids
from torch import Tensor, nn

import lrp
from lrp import rules

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda b: nn.Linear(5, 4, bias=b), (5,)),
    "linear on tokens": (lambda b: nn.Linear(3, 4, bias=b), (2, 3)),
    "conv1d": (lambda b: nn.Conv1d(2, 3, 3, padding=1, stride=2, bias=b), (2, 6)),
    "conv2d": (lambda b: nn.Conv2d(2, 3, 3, padding=1, bias=b), (2, 4, 5)),
    "conv2d strided, dilated": (lambda b: nn.Conv2d(2, 2, (3, 2), stride=2, dilation=(1, 2), bias=b), (2, 5, 6)),
    "conv2d grouped": (lambda b: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=b), (4, 3, 3)),
    "conv2d depthwise": (lambda b: nn.Conv2d(3, 3, 3, groups=3, padding=1, bias=b), (3, 3, 4)),
    "conv2d same, odd total": (lambda b: nn.Conv2d(1, 2, (2, 4), padding="same", bias=b), (1, 3, 5)),
    "conv2d circular": (lambda b: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=b), (1, 4, 4)),
    "conv3d": (lambda b: nn.Conv3d(1, 2, 2, padding=(1, 0, 0), bias=b), (1, 2, 3, 2)),
    "transposed 1d": (lambda b: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1, bias=b), (2, 3)),
    "transposed 2d grouped": (lambda b: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=2, bias=b), (4, 2, 3)),
    "transposed 3d": (lambda b: nn.ConvTranspose3d(1, 2, 2, dilation=(1, 2, 1), bias=b), (1, 2, 2, 2)),
}
RULES = {
    "epsilon": rules.Epsilon(1e-3),
    "epsilon without bias": rules.Epsilon(1e-3, ignore_bias=True),
    "lrp-0": rules.Epsilon(0.0),
    "z+": rules.ZPlus(1e-3),
    "z+ without bias": rules.ZPlus(1e-3, ignore_bias=True),
    "epsilon, rms": rules.Epsilon(rules.Rms(0.25)),
    "epsilon, clipped": rules.Epsilon(rules.Clip(0.1)),
    "epsilon, callable": rules.Epsilon(lambda z: z * 1.25 + 0.01 * (z >= 0) - 0.01 * (z < 0), ignore_bias=True),
    "alpha-beta": rules.AlphaBeta(2, 1, 1e-3),
    "alpha-beta, no stabiliser, without bias": rules.AlphaBeta(1.5, 0.5, 0.0, ignore_bias=True),
    "alpha 1, beta 0": rules.AlphaBeta(1, 0, 1e-3),
    "gamma": rules.Gamma(0.25, 1e-3),
    "gamma large, without bias": rules.Gamma(3.0, 1e-3, ignore_bias=True),
    "box": rules.ZBox(-4.0, 5.0, 1e-3),
    "root": rules.RootPoint(torch.tensor(0.3), 1e-3),
    "w squared": rules.WSquare(1e-3),
    "w squared without bias": rules.WSquare(ignore_bias=True),
    "flat": rules.Flat(1e-3),
}


class Behind(nn.Module):
    """A layer with what makes the planner prove things: ReLUs before and after."""

    def __init__(self, layer: nn.Module, relu_before: bool, relu_after: str) -> None:
        super().__init__()
        self.before = nn.ReLU() if relu_before else nn.Identity()
        self.layer = layer
        self.after = nn.ReLU() if relu_after == "relu" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


def _make(kind: str, bias: bool) -> tuple[nn.Module, tuple[int, ...]]:
    factory, shape = LAYERS[kind]
    return factory(bias).double().eval(), shape


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch on the layer itself
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_equals_dense_reference(kind: str, bias: bool) -> None:
    """Inputs, weights, channels and books, for every rule and every proof the plan may have."""
    layer, shape = _make(kind, bias)
    w, b = matrix(layer, torch.Size(shape))
    ones = connections(layer, torch.Size(shape))
    asymmetric = kind == "conv2d circular"
    ids = None if asymmetric else weight_ids(layer, torch.Size(shape))
    forms = set()
    models = {
        (before, after): Behind(layer, before, after).eval()
        for before, after in itertools.product((True, False), ("none", "relu"))
    }
    for (name, rule), (before, after) in itertools.product(RULES.items(), models):
        if (name.startswith("epsilon,") or rule.ends_pass) and before != (after == "relu"):
            continue  # one form only: two of the four cases are enough
        model = models[before, after]
        x = torch.randn(3, *shape, dtype=torch.float64)
        out = model(x)
        c = torch.randn_like(out)
        plan = lrp.prepare(model, x, lrp.Composite([("*", rule)]))
        forms.add(str(plan).splitlines()[2].split("  ")[-1])
        rel = plan.attribute(x, start=lrp.Seed(c), wrt=("input", "layers", "weights"))
        bare = plan.attribute(x, start=lrp.Seed(c), wrt=("input", "weights"), ledger=False)
        assert torch.equal(bare.input, rel.input)
        assert all(torch.equal(bare.weights[k], rel.weights[k]) for k in rel.weights)
        entries_sum = torch.zeros_like(w)
        for i in range(3):
            inner = x[i].relu() if before else x[i]
            r_out = (out[i] * c[i]).flatten()
            r_in, entries, books = relevance(rule, w, b, inner.flatten(), r_out, ones)
            entries_sum += entries
            got = rel.layers["before"][i].flatten() if before else rel.input[i].flatten()
            scale = r_in.abs().sum() + r_out.abs().sum()
            # before an input-ending rule that sits behind a ReLU, R on exact zeros of the ReLU is lost
            expected = torch.where(inner.flatten() == 0, 0.0, r_in) if before and rule.ends_pass else r_in
            assert (got - expected).abs().sum() <= 1e-10 * scale, (name, before, after)
            row = rel.ledger.modules["layer"]
            for column, value in books.items():
                if column == "input" and before and rule.ends_pass:
                    value = expected.sum().item()
                assert abs(getattr(row, column)[i].item() - value) <= 1e-9 * scale, (name, column)
            assert abs(rel.ledger.gap[i]) <= 1e-10 * rel.ledger.magnitude()[i]
        if ids is not None:
            count = layer.weight.numel()
            known = ids >= 0
            expected_w = torch.zeros(count, dtype=torch.float64).index_add_(0, ids[known], entries_sum[known])
            got_w = rel.weights["layer.weight"].flatten()
            assert (got_w - expected_w).abs().sum() <= 1e-10 * entries_sum.abs().sum(), (name, before, after)
    assert len(forms) >= 3


def test_every_form_is_used() -> None:
    """The cheap forms where their conditions are proven, the general ones where not."""

    def form(rule: rules.Rule, before: bool, after: str) -> str:
        model = Behind(nn.Conv2d(1, 2, 3), before, after).eval()
        text = str(lrp.prepare(model, torch.zeros(1, 1, 4, 4), lrp.Composite([("*", rule)])))
        return next(line for line in text.splitlines() if line.startswith("layer  ") and "why" not in line)

    assert "gamma, cheap + ReLU" in form(rules.Gamma(), True, "relu")
    assert "gamma, general" in form(rules.Gamma(), True, "none")
    assert "gamma, general" in form(rules.Gamma(), False, "relu")
    assert "z+, cheap" in form(rules.ZPlus(), True, "none")
    assert "z+, absolute" in form(rules.ZPlus(), False, "relu")
    assert "z+, split" in form(rules.ZPlus(), False, "none")
    assert "2+1" in form(rules.ZPlus(), True, "relu")


@pytest.mark.parametrize("rule", [rules.Gamma(0.25), rules.ZPlus(), rules.AlphaBeta()], ids=["gamma", "z+", "ab"])
def test_float32_with_one_sign_rows(rule: rules.Rule) -> None:
    """Rows whose contributions share one sign do not lose accuracy in float32."""
    layer = nn.Linear(64, 20)
    with torch.no_grad():
        layer.weight[:10].abs_()
        layer.weight[10:].abs_().neg_()
        layer.bias.zero_()
    for model in (Behind(layer, True, "none"), Behind(layer, False, "relu"), Behind(layer, False, "none")):
        x = torch.randn(8, 64).abs()
        c = torch.randn(8, 20)
        single = lrp.attribute(model.float().eval(), x, start=lrp.Seed(c), composite=rule)
        double = lrp.attribute(model.double().eval(), x.double(), start=lrp.Seed(c.double()), composite=rule)
        error = (single.input.double() - double.input).abs().sum() / double.input.abs().sum()
        assert error <= 1e-5


def test_box_corner_in_float32() -> None:
    """A patch exactly at the bounds of the active signs has no numerators to cancel."""
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight[0].abs_()
    x = torch.zeros(2, 3, 6, 6)
    x[1] = torch.rand(3, 6, 6)
    c = torch.randn(2, 4, 4, 4)
    rule = rules.ZBox([0.0] * 3, [1.0] * 3)
    single = lrp.attribute(conv.float().eval(), x, start=lrp.Seed(c), composite=rule).input
    double = lrp.attribute(conv.double().eval(), x.double(), start=lrp.Seed(c.double()), composite=rule).input
    assert (single.double() - double).abs().sum() / double.abs().sum() <= 1e-5


def test_alpha_one_beta_zero_is_z_plus() -> None:
    for before in (True, False):
        model = Behind(nn.Conv2d(2, 3, 3), before, "none").double().eval()
        x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
        seed = lrp.Seed(torch.randn(2, 3, 3, 3, dtype=torch.float64))
        one = lrp.attribute(model, x, start=seed, composite=rules.AlphaBeta(1, 0))
        two = lrp.attribute(model, x, start=seed, composite=rules.ZPlus())
        near = lrp.attribute(model, x, start=seed, composite=rules.AlphaBeta(1 + 1e-9, 1e-9))
        assert torch.equal(one.input, two.input)
        assert torch.allclose(near.input, two.input, atol=1e-5), "the limit, by the other form"
        assert not torch.equal(near.input, two.input)


def test_alpha_beta_with_one_sign_missing() -> None:
    """Finite, and what has no place to go is dead by definition."""
    layer = nn.Linear(3, 2).double().eval()
    with torch.no_grad():
        layer.weight.abs_()
        layer.bias.zero_()
    x = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    rel = lrp.attribute(layer, x, start=lrp.Seed(torch.ones(2, 2).double()), composite=rules.AlphaBeta(2, 1))
    out = layer(x).sum(1).detach()
    assert torch.allclose(rel.input.sum(1), 2 * out, rtol=1e-5)
    assert torch.allclose(rel.ledger.dead, -out, rtol=1e-5)
    assert torch.isfinite(rel.input).all()


def test_gamma_limits() -> None:
    layer = nn.Linear(6, 5).double().eval()
    model = Behind(layer, True, "relu").eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    c = torch.randn(4, 5, dtype=torch.float64)

    def run(rule: rules.Rule) -> Tensor:
        return lrp.attribute(model, x, start=lrp.Seed(c), composite=rule).input

    assert torch.allclose(run(rules.Gamma(0.0)), run(rules.Epsilon()), atol=1e-14)
    assert torch.allclose(run(rules.Gamma(1e8)), run(rules.ZPlus()), atol=1e-6)


def test_root_point_per_output_keeps_the_bias() -> None:
    """One root per output on the output's own zero: all of z reaches the input."""
    layer = nn.Linear(4, 3).double().eval()
    w, b = layer.weight.detach(), layer.bias.detach()
    root = -b[:, None] * w / w.square().sum(1, keepdim=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    rel = lrp.attribute(layer, x, start=layer(x).detach(), composite=rules.RootPoint(root, 0.0))
    assert torch.allclose(rel.input.sum(1), layer(x).sum(1).detach(), atol=1e-12)
    expected = torch.stack([(w * (row - root)).sum(0) for row in x])
    assert torch.allclose(rel.input, expected, atol=1e-12)
    assert rel.ledger.bias.abs().max() == 0


def test_pass_rule() -> None:
    layer = nn.Linear(4, 4).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    start = torch.randn(3, 4, dtype=torch.float64)
    rel = lrp.attribute(layer, x, start=start, composite=rules.Pass())
    assert torch.allclose(rel.input, start, atol=1e-14)
    with pytest.raises(lrp.errors.RuleError, match="shaped like the input"):
        lrp.attribute(nn.Linear(4, 3).double().eval(), x, composite=rules.Pass())
