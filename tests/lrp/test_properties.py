"""Properties over drawn shapes, scales and degenerate data."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.dense import connections, matrix, relevance
from torch import Tensor, nn

import lrp
from lrp import rules

RULES = [
    rules.Epsilon(1e-4),
    rules.ZPlus(1e-4),
    rules.Gamma(0.5, 1e-4),
    rules.ZBox(-1e7, 1e7, 1e-4),
    rules.RootPoint(0.2),
    rules.AlphaBeta(2, 1, 1e-4),
    rules.Epsilon(rules.Rms(0.3)),
    rules.WSquare(1e-4),
    rules.Flat(1e-4),
]


@st.composite
def layers(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """A linear layer with weights that may hold zeros, and the shape of its input."""
    kind = draw(st.sampled_from(["linear", "conv1d", "conv2d", "transposed"]))
    bias = draw(st.booleans())
    if kind == "linear":
        size = draw(st.integers(1, 6))
        layer: nn.Module = nn.Linear(size, draw(st.integers(1, 5)), bias=bias)
        shape: tuple[int, ...] = (size,)
    else:
        groups = draw(st.integers(1, 2))
        channels, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
        stride, padding, dilation = draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 2))
        kernel, length = draw(st.integers(1, 3)), draw(st.integers(5, 7))
        maker = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "transposed": nn.ConvTranspose1d}[kind]
        layer = maker(channels, out, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias)
        shape = (channels, length) if kind != "conv2d" else (channels, length, 5)
        if kind == "transposed":
            layer.padding = (0,)
    layer = layer.double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) > 0.3)
            p.abs_() if draw(st.booleans()) else None
    return layer, shape


@given(
    drawn=layers(),
    rule=st.sampled_from(RULES),
    exponent=st.integers(-5, 5),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    relu=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_any_layer_equals_the_dense_reference(
    drawn: tuple[nn.Module, tuple[int, ...]], rule: Any, exponent: int, zeros: float, relu: bool, seed: int
) -> None:
    layer, shape = drawn
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    x *= torch.rand(x.shape, generator=generator) >= zeros
    model = nn.Sequential(layer, nn.ReLU()) if relu else layer
    out = model(x).detach()
    c = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    rel = lrp.attribute(model.eval(), x, start=lrp.Seed(c), composite=rule)
    w, b = matrix(layer, torch.Size(shape))
    ones = connections(layer, torch.Size(shape))
    for i in range(2):
        r_in, _, _ = relevance(rule, w, b, x[i].flatten(), (out[i] * c[i]).flatten(), ones)
        scale = r_in.abs().sum() + (out[i] * c[i]).abs().sum()
        assert (rel.input[i].flatten() - r_in).abs().sum() <= 1e-9 * scale
    assert (rel.ledger.gap.abs() <= 1e-9 * rel.ledger.magnitude() + 1e-300).all()


@given(widths=st.lists(st.integers(1, 6), min_size=2, max_size=4), seed=st.integers(0, 999), shift=st.floats(-3, 3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_conservation_without_bias_and_stabiliser(widths: list[int], seed: int, shift: float) -> None:
    """LRP-0 on a ReLU net without biases gives all of the output to the input."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b, bias=False), nn.ReLU()]
    model = nn.Sequential(*parts, nn.Linear(widths[-1], 3, bias=False)).double().eval()
    x: Tensor = torch.randn(3, widths[0], dtype=torch.float64) + shift
    rel = lrp.attribute(model, x, 1, composite=rules.Epsilon(0.0))
    assert torch.allclose(rel.input.sum(1), model(x)[:, 1], atol=1e-12)
