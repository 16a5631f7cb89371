"""ECQx: the scaled cost of zero against the formula, weight by weight, and the window of its exponent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.assignment import Levels, assign, borders, information, lambda_limit
from compress.codebook import codebook_of
from compress.zero_cost import ZeroCost
from lrp.errors import InputError

F64 = torch.float64
N = 400


def setting(seed: int, bits: int, gamma: float) -> tuple[Levels, Tensor, Tensor, list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ws = [torch.randn(N, generator=g, dtype=F64) ** 3 for _ in range(2)]
    rs = [torch.randn(N, generator=g, dtype=F64) ** 3 for _ in range(2)]
    books = [codebook_of(w, bits) for w in ws]
    levels = Levels.of(books)
    _, info = information(levels, levels.counts([b.nearest(w) - b.low for b, w in zip(books, ws, strict=True)]))
    ends = torch.stack([torch.stack(w.aminmax()) for w in ws])
    lambdas = gamma * lambda_limit(levels, info, ends[:, 0], ends[:, 1])
    return levels, info, lambdas, ws, rs


def table(levels: Levels, info: Tensor, lambdas: Tensor, w: Tensor, t: int) -> Tensor:
    price = lambdas[t] * info[t] if float(lambdas[t]) else torch.zeros(levels.count, dtype=F64)
    out = (w[:, None] - levels.values[t]) ** 2 + price
    return torch.where(levels.real[t], out, math.inf)


@pytest.mark.parametrize("how", [ZeroCost(), ZeroCost(p=0.03, rho=3.0), ZeroCost(match="sparsity")])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("bits", [2, 4])
def test_equals_brute_force_at_the_exponent_found(bits: int, gamma: float, how: ZeroCost) -> None:
    for seed in range(10):
        levels, info, lambdas, ws, rs = setting(seed, bits, gamma)
        positions, beta, states = how.assign(levels, info, lambdas, ws, rs)
        for t in range(2):
            costs = table(levels, info, lambdas, ws[t], t)
            zero = int(levels.zero[t])
            plain = int((costs.argmin(1) == zero).sum())
            if states[t] != "skipped":
                r = rs[t].abs() / (rs[t].abs().max() + 1e-12)
                costs[:, zero] *= how.rho * (r + 1e-12) ** beta[t]
            found = costs.gather(1, positions[t][:, None])[:, 0]
            # at an order statistic one weight has two equal costs
            assert int((found > costs.amin(1) * (1 + 1e-9)).sum()) == 0
            now = int((positions[t] == zero).sum())
            if states[t] == "ok":
                assert (now == plain) if how.match == "sparsity" else (plain - how.p * N <= now <= plain)


def zeros_at(levels: Levels, info: Tensor, lambdas: Tensor, w: Tensor, r: Tensor, t: int, beta: float) -> int:
    """How many weights are zero at an exponent, from the table of costs."""
    costs, zero = table(levels, info, lambdas, w, t), int(levels.zero[t])
    costs[:, zero] *= 2 * (r.abs() / (r.abs().max() + 1e-12) + 1e-12) ** beta
    return int((costs.argmin(1) == zero).sum())


def test_the_neutral_exponent_is_kept_where_it_meets_the_window() -> None:
    """At it average relevance changes nothing; from outside, the window is entered at the side that is nearest."""
    seen = {"inside": 0, "below": 0, "above": 0}
    for seed in range(4):
        levels, info, lambdas, ws, drawn = setting(seed, 4, 0.2)
        ordered = [r.abs().sort().values[w.abs().argsort().argsort()] for w, r in zip(ws, drawn, strict=True)]
        for rs, p in ((drawn, 0.1), *((ordered, p) for p in (0.1, 0.02, 0.005))):
            positions, beta, states = ZeroCost(p=p).assign(levels, info, lambdas, ws, rs)
            assert states == ["ok", "ok"]
            for t, (w, r) in enumerate(zip(ws, rs, strict=True)):
                plain = int((table(levels, info, lambdas, w, t).argmin(1) == int(levels.zero[t])).sum())
                least = math.ceil(plain - p * N)
                neutral = -math.log(2) / math.log(float((r.abs() / r.abs().max()).mean()))
                count = zeros_at(levels, info, lambdas, w, r, t, neutral)
                now = int((positions[t] == int(levels.zero[t])).sum())
                if least <= count <= plain:
                    seen["inside"] += 1
                    assert beta[t] == pytest.approx(neutral, rel=1e-9)
                    assert now == count
                elif count < least:
                    seen["below"] += 1
                    assert beta[t] > neutral
                    assert now == least
                else:
                    seen["above"] += 1
                    assert beta[t] < neutral
                    assert now == plain
    assert min(seen.values()) >= 4, seen


def test_a_window_as_wide_as_the_zeros_leaves_a_tensor_to_ecq() -> None:
    levels, info, lambdas, ws, rs = setting(0, 4, 0.2)
    _, beta, states = ZeroCost(p=1.0).assign(levels, info, lambdas, ws, rs)
    assert states == ["skipped", "skipped"]  # no share of zeros exceeds 1
    assert beta == [0.0, 0.0]


def test_zeros_grow_with_the_exponent() -> None:
    levels, info, lambdas, ws, rs = setting(3, 4, 0.3)
    counts = []
    for p in (0.3, 0.2, 0.1, 0.05, 0.0):
        positions, _, states = ZeroCost(p=p).assign(levels, info, lambdas, ws, rs)
        assert states[0] == "ok"
        counts.append(int((positions[0] == levels.zero[0]).sum()))
    assert counts == sorted(counts)


def test_a_relevant_weight_comes_back_and_an_irrelevant_one_goes() -> None:
    levels, info, lambdas, ws, _ = setting(1, 4, 0.3)
    cells = borders(levels, info, lambdas)
    plain = assign(ws[0], cells[0])
    zero = levels.zero[0]
    gone, there = plain == zero, plain != zero
    relevance = torch.full((N,), 0.3, dtype=F64)
    largest_gone = torch.where(gone, ws[0].abs(), -1.0).argmax()
    smallest_there = torch.where(there, ws[0].abs(), math.inf).argmin()
    relevance[largest_gone], relevance[smallest_there] = 1.0, 0.0
    positions, _, _ = ZeroCost(match="sparsity").assign(levels, info, lambdas, ws[:1] * 2, [relevance] * 2)
    assert positions[0][largest_gone] != zero
    assert positions[0][smallest_there] == zero


def test_without_zeros_or_relevance_it_is_ecq() -> None:
    """Trap 8: where relevance does not act, the state says so."""
    levels, info, lambdas, ws, rs = setting(2, 4, 0.3)
    cells = borders(levels, info, lambdas)
    positions, beta, states = ZeroCost().assign(levels, info, lambdas, ws, [torch.zeros(N, dtype=F64), rs[1]])
    assert (states, beta[0]) == (["skipped", "ok"], 0.0)
    assert torch.equal(positions[0], assign(ws[0], cells[0]))
    positions, _, states = ZeroCost(p=0.99).assign(levels, info, lambdas, ws, rs)
    assert states == ["skipped", "skipped"]
    assert torch.equal(positions[1], assign(ws[1], cells[1]))


def test_gamma_zero_is_applied() -> None:
    """Trap 7: the released code leaves relevance out at gamma 0; here it acts on the distances alone."""
    levels, info, lambdas, ws, rs = setting(4, 4, 0.0)
    positions, _, states = ZeroCost(match="sparsity").assign(levels, info, lambdas, ws, rs)
    plain = assign(ws[0], borders(levels, info, lambdas)[0])
    assert states[0] == "ok"
    assert not torch.equal(positions[0], plain)


def test_an_exponent_above_one_is_not_taken() -> None:
    levels, info, lambdas, ws, _ = setting(5, 4, 0.3)
    relevance = [torch.linspace(0.98, 1.0, N, dtype=F64)] * 2  # nearly equal
    _, beta, states = ZeroCost(match="sparsity").assign(levels, info, lambdas, ws, relevance)
    assert states[0] == "not_reached"
    assert beta[0] == 1.0


def test_a_quantile_normalises_outliers() -> None:
    r = torch.rand(1000, dtype=F64)
    r[0] = 1e6
    assert float(ZeroCost().normalised(r).median()) < 1e-5
    clipped = ZeroCost(normaliser=0.99).normalised(r)
    assert 0.4 < float(clipped.median()) < 0.6
    assert float(clipped.max()) <= 1
    assert float(ZeroCost(normaliser=0.5).normalised(torch.tensor([0.0, 0.0, 0.0, 2.0])).max()) <= 1


@pytest.mark.parametrize("wrong", [{"p": -0.1}, {"p": 2}, {"match": "zeros"}, {"rho": 1.0}, {"normaliser": 2.0}])
def test_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ZeroCost(**wrong)  # type: ignore[arg-type]  # on purpose
