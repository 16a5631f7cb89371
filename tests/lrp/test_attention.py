"""AttnLRP and CP-LRP inside attention, against the step-by-step relevance form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp


class Heads(nn.Module):
    """Attention on given queries, keys and values; fused or spelled out, perhaps masked."""

    def __init__(self, fused: bool, masked: bool) -> None:
        super().__init__()
        self.fused, self.masked = fused, masked

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, width = q.shape[-2:]
        mask = torch.ones(length, length, dtype=torch.bool).tril() if self.masked else None
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) / width**0.5
        if mask is not None:
            scores = scores + torch.zeros(length, length, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        return torch.softmax(scores, -1) @ v


def step_by_step(q: Tensor, k: Tensor, v: Tensor, r: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """One head, one sample, by relevances: uniform rule at both products, Taylor at the softmax."""
    t, width = q.shape
    scores = q @ k.t() / width**0.5
    if masked:
        scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), float("-inf"))
    a = torch.softmax(scores, -1)
    o = a @ v
    r_a, r_v = torch.zeros_like(a), torch.zeros_like(v)
    for i in range(t):
        for j in range(t):
            for e in range(width):
                share = a[i, j] * v[j, e] * r[i, e] / o[i, e] / 2
                r_a[i, j] += share
                r_v[j, e] += share
    r_s = torch.zeros_like(a)
    for i in range(t):
        for j in range(t):
            if scores[i, j] > -1e300:
                r_s[i, j] = scores[i, j] * (r_a[i, j] - a[i, j] * r_a[i].sum())
    remainder = (r_a.sum() - r_s.sum()).item()
    r_q, r_k = torch.zeros_like(q), torch.zeros_like(k)
    for i in range(t):
        for j in range(t):
            if scores[i, j] > -1e300:
                for e in range(width):
                    share = q[i, e] * k[j, e] / width**0.5 * r_s[i, j] / scores[i, j] / 2
                    r_q[i, e] += share
                    r_k[j, e] += share
    return r_q, r_k, r_v, remainder


@pytest.mark.parametrize("masked", [False, True], ids=["open", "causal"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "spelled out"])
def test_attn_lrp_equals_the_relevance_form(fused: bool, masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    model = Heads(fused, masked).eval()
    start = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    composite = lrp.composites.epsilon(attention="attn_lrp")
    rel = lrp.attribute(model, (q, k, v), start=start, composite=composite)
    remainder = torch.zeros(2, dtype=torch.float64)
    for n in range(2):
        for h in range(3):
            *expected, lost = step_by_step(q[n, h], k[n, h], v[n, h], start[n, h], masked)
            remainder[n] += lost
            for got, want in zip(rel.input, expected, strict=True):
                assert torch.allclose(got[n, h], want, atol=1e-9)
    scale = rel.ledger.magnitude()
    assert (rel.ledger.gap.abs() <= 1e-10 * scale).all()
    assert ((rel.ledger.nonlinear - remainder).abs() <= 1e-10 * scale).all()
    assert rel.ledger.nonlinear.abs().min() > 1e-3
    assert torch.allclose(rel.input[2].sum((1, 2, 3)), start.sum((1, 2, 3)) / 2, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "spelled out"])
def test_cp_lrp_conserves_and_leaves_q_and_k(fused: bool) -> None:
    q, k, v = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    start = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    rel = lrp.attribute(Heads(fused, False).eval(), (q, k, v), start=start, composite="epsilon")
    assert rel.input[0].abs().max() == 0
    assert rel.input[1].abs().max() == 0
    assert torch.allclose(rel.input[2].sum((1, 2, 3)), start.sum((1, 2, 3)), atol=1e-10)
    assert rel.ledger.nonlinear.abs().max() == 0


def test_a_softmax_gate_stays_a_gate() -> None:
    """Weights that multiply element by element are a gate under either rule."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x, -1) * x

    x = torch.randn(3, 4, dtype=torch.float64)
    for attention in ("cp_lrp", "attn_lrp"):
        composite = lrp.composites.epsilon(attention=attention)
        out = Gate()(x)
        rel = lrp.attribute(Gate().eval(), x, start=out, composite=composite)
        assert torch.allclose(rel.input, out, atol=1e-12)


def test_the_choice_is_on_record() -> None:
    q = torch.randn(2, 3, 4, 5)
    model = Heads(True, False).eval()
    for attention, word in (("cp_lrp", "CP-LRP"), ("attn_lrp", "AttnLRP")):
        plan = lrp.prepare(model, (q, q.clone(), q.clone()), lrp.composites.epsilon(attention=attention))
        assert word in str(plan)
    with pytest.raises(lrp.errors.CompositeError, match="cp_lrp"):
        lrp.composites.epsilon(attention="lxt")
