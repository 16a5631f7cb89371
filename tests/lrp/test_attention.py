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


class Packed(nn.Module):
    """q, k and v out of one projection, taken apart in one of the usual ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv, self.out = how, nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        if self.how == "unbind":
            q, k, v = self.qkv(x).reshape(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = self.qkv(x).chunk(3, -1) if self.how == "chunk" else self.qkv(x).split(8, -1)
            q, k, v = (p.reshape(n, length, 2, 4).transpose(1, 2) for p in parts)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, length, 8)).mean(1)


@pytest.mark.parametrize("how", ["unbind", "chunk", "split"])
def test_rows_of_queries_and_keys_are_named(how: str) -> None:
    """They are 0 by rule, which is not the same as irrelevant."""
    model, x = Packed(how).double().eval(), torch.randn(3, 5, 8, dtype=torch.float64)
    rel = lrp.attribute(model, x, 1, composite="epsilon", wrt=("channels", "weights"))
    assert list(rel.unexplained) == ["qkv[0:16]"]
    assert "CP-LRP" in rel.unexplained["qkv[0:16]"]
    assert rel.channels["qkv"][:, :16].abs().max() == 0
    assert rel.channels["qkv"][:, 16:].abs().min() > 0
    assert rel.weights["qkv.weight"][:16].abs().max() == 0
    full = lrp.attribute(model, x, 1, composite=lrp.composites.epsilon(attention="attn_lrp"), wrt="channels")
    assert not full.unexplained
    assert full.channels["qkv"].abs().min() > 0
    total = lrp.collect(model, [x], composite="epsilon", progress=False)
    assert list(total.unexplained) == ["qkv[0:16]"]


def test_torch_own_attention_names_them_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
            self.h = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.t(x).mean(1))

    model, x = Net().double().eval(), torch.randn(4, 5, 16, dtype=torch.float64)
    rel = lrp.attribute(model, x, 1, composite="epsilon", wrt=("layers", "channels"))
    assert list(rel.unexplained) == ["t.self_attn.in_proj[0:32]"]
    out = rel.layers["t.self_attn.out_proj"]  # (length x samples, 16)
    per_sample = out.reshape(5, 4, 16).sum(0)
    assert torch.allclose(rel.channels["t.self_attn.out_proj"], per_sample, atol=1e-12)
    assert (rel.ledger.gap.abs() <= 1e-10 * rel.ledger.magnitude()).all()


def test_masks_that_fill() -> None:
    """masked_fill and torch.where with minus infinity are the same mask."""

    class Masked(nn.Module):
        def __init__(self, where: bool) -> None:
            super().__init__()
            self.where = where

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            length = q.shape[-2]
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = q @ k.transpose(-1, -2)
            low = float("-inf")
            filled = torch.where(mask, low, scores) if self.where else scores.masked_fill(mask, low)
            return torch.softmax(filled, -1) @ v

    q, k, v = (torch.randn(2, 4, 5, dtype=torch.float64) for _ in range(3))
    start = torch.randn(2, 4, 5, dtype=torch.float64)
    composite = lrp.composites.epsilon(attention="attn_lrp")
    one, two = (lrp.attribute(Masked(w).eval(), (q, k, v), start=start, composite=composite) for w in (True, False))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one.input, two.input, strict=True))
    assert (two.ledger.gap.abs() <= 1e-10 * two.ledger.magnitude()).all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_torch_own_attention_with_a_mask(need_weights: bool) -> None:
    """With weights asked for it is spelled out (a masked baddbmm), else fused: the same relevance."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(4, 4, dtype=x.dtype).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
            return self.attention(x, x, x, attn_mask=mask, need_weights=need_weights)[0]

    torch.manual_seed(3)
    model, x = Net().double().eval(), torch.randn(2, 4, 8, dtype=torch.float64)
    composite = lrp.composites.epsilon(0.0, attention="attn_lrp")
    rel = lrp.attribute(model, x, start=lrp.Seed(torch.ones(2, 4, 8).double()), composite=composite)
    assert (rel.ledger.gap.abs() <= 1e-10 * rel.ledger.magnitude()).all()
    # half of the gradient goes to v, a quarter each to q and k: all three come out of one projection
    w, b = model.attention.in_proj_weight.detach(), model.attention.in_proj_bias.detach()
    packed = (x @ w.t() + b).requires_grad_()
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in packed.split(8, -1))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    out = model.attention.out_proj(mixed)
    (gradient,) = torch.autograd.grad(out.sum(), packed)
    shares = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).repeat_interleave(8)
    assert torch.allclose(rel.input, x * ((gradient * shares) @ w), atol=1e-12)
