"""What a running plan costs: the products it announces, and no look at values from the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrp
from lrp import rules
from lrp._program import Wanted

aten = torch.ops.aten
FORWARD = {aten.convolution.default, aten.addmm.default, aten.mm.default}
BACK = {aten.convolution_backward.default}

# rule -> products forward and back (the network's own included) by what is proven: reference, table 2
TABLE: dict[str, tuple[rules.Rule, dict[tuple[bool, bool], tuple[int, int]]]] = {
    # (x >= 0, a ReLU follows): products
    "lrp-0": (rules.Epsilon(0.0), {(True, True): (1, 1), (False, False): (1, 1)}),
    "epsilon": (rules.Epsilon(), {(True, True): (1, 1), (False, False): (1, 1)}),
    "epsilon, rms": (rules.Epsilon(rules.Rms()), {(True, True): (1, 1), (False, False): (1, 1)}),
    "gamma": (rules.Gamma(), {(True, True): (2, 1), (True, False): (2, 2), (False, False): (2, 2)}),
    "z+": (rules.ZPlus(), {(True, True): (2, 1), (True, False): (2, 1), (False, True): (2, 2), (False, False): (3, 2)}),
    "alpha-beta": (rules.AlphaBeta(), {(True, True): (2, 2), (False, False): (4, 4)}),
    "w squared": (rules.WSquare(), {(False, False): (1, 1)}),
    "flat": (rules.Flat(), {(False, False): (1, 1)}),  # a box filter of one channel
    "box": (rules.ZBox(-9, 9), {(False, False): (3, 2)}),
}


class Counter(TorchDispatchMode):
    """Counts products and looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.back = self.looks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward += func in FORWARD
        self.back += func in BACK
        self.looks += func in (aten._local_scalar_dense.default, aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def _net(before: bool, after: bool) -> nn.Module:
    relu = (nn.ReLU(), nn.Identity())
    return nn.Sequential(relu[not before], nn.Conv2d(2, 3, 3), relu[not after]).eval()


CASES = [(name, proven) for name, (_, table) in TABLE.items() for proven in table]


@pytest.mark.parametrize(("name", "proven"), CASES, ids=lambda v: v if isinstance(v, str) else str(v))
def test_products_are_those_of_the_table(name: str, proven: tuple[bool, bool]) -> None:
    rule, table = TABLE[name]
    model, x = _net(*proven), torch.randn(2, 2, 6, 6)
    plan = lrp.prepare(model, x, rule)
    plan.attribute(x, start=lrp.Seed(torch.ones(2, 3, 4, 4)), ledger=False)  # modified weights at hand
    with Counter() as counter:
        plan.attribute(x, start=lrp.Seed(torch.ones(2, 3, 4, 4)), ledger=False)
    assert (counter.forward, counter.back) == table[proven]
    announced = "1+0" if name == "flat" else f"{table[proven][0]}+{table[proven][1]}"
    assert announced in next(line for line in str(plan).splitlines() if line.startswith("1 "))


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus", "epsilon_alpha2_beta1_flat", "best_practice"])
def test_the_pass_never_looks_at_values(composite: str) -> None:
    """A look from the host would stall a GPU; only the checks before and after the pass do."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).eval()
    x: Tensor = torch.randn(2, 2, 6, 6)
    plan = lrp.prepare(model, x, composite)
    program, table = plan._core.program(Wanted()), plan._core.bound.table(model)
    leaf = x.clone().requires_grad_()
    sinks = [torch.zeros_like(x).requires_grad_() for _ in program.sinks]
    with Counter() as counter:
        out = program.module(leaf, *sinks, *(table[key] for key in program.constants))[0]
        torch.autograd.grad(out.sum(), [leaf, *sinks], allow_unused=True)
    assert counter.forward > 0
    assert counter.looks == 0
