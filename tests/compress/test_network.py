"""What users hand over as a network: wrapped, made in inference mode, without values, or not to be copied."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import hard, plain
from torch import Tensor, nn

import compress
from compress._network import network_of
from compress.drift import drift
from compress.search import search
from compress.sensitivity import sensitivity
from compress.stability import stability
from lrp import errors

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 2
HALF: dict[str, Any] = {"target": compress.Target(macs=0.5), "progress": False}

Wrap = Callable[[nn.Module], nn.Module]


def build() -> nn.Module:
    return hard(plain())


def compiled(net: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(net, backend="eager")  # type: ignore[assignment]  # as torch declares it
    return wrapped


WRAPPERS: dict[str, Wrap] = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "both": lambda net: compiled(nn.DataParallel(net)),
}


@pytest.fixture(params=list(WRAPPERS))
def wrap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Wrap]:
    if request.param != "distributed":
        yield WRAPPERS[request.param]
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield WRAPPERS["distributed"]
    torch.distributed.destroy_process_group()


# -- wrappers ---------------------------------------------------------------
@pytest.mark.parametrize("criterion", ["lrp", "weight"])
def test_the_network_in_a_wrapper_is_pruned(wrap: Wrap, criterion: str, tmp_path: Path) -> None:
    """Result, plan and file are those of the bare network."""
    net = build()
    wrapped = wrap(net)
    expected = compress.prune(build(), X[:1], [(X, Y)], criterion=criterion, **HALF)
    result = compress.prune(wrapped, X[:1], [(X, Y)], criterion=criterion, evaluate=[(X + 1, Y)], **HALF)
    assert type(result.model) is type(net)
    assert result.plan.removed == expected.plan.removed
    for plan in (None, result.plan):
        compress.save(result.model, tmp_path / "net", plan=plan)
        again = compress.load(tmp_path / "net", build)
        assert torch.equal(again(X), result.model.eval()(X))
    plan = compress.plan_pruning(wrapped, X[:1], [(X, Y)], criterion=criterion, **HALF)
    assert plan.removed == expected.plan.removed
    plan.check(wrapped)
    state = plan.apply(build()).state_dict()
    assert all(torch.equal(t, state[name]) for name, t in plan.apply(wrapped).state_dict().items())
    torch.testing.assert_close(plan.mask(wrapped)(X), plan.apply(wrapped)(X), atol=1e-5, rtol=1e-4)
    compress.save(plan.apply(wrapped), tmp_path / "net")
    assert compress.load(tmp_path / "net", lambda: wrapped)._pruning_plan.removed == plan.removed
    scores = compress.score(wrapped, X[:1], [(X, Y)], criterion=criterion)
    assert scores.values.keys() == {"0", "3"}


def test_studies_take_wrapped_networks() -> None:
    wrapped = nn.DataParallel(build())
    few: dict[str, Any] = {"rates": (0.3,), "progress": False}
    result = compress.prune(wrapped, X[:1], [(X, Y)], criterion="weight", **HALF)
    assert compress.compare(wrapped, X[:1], [(X, Y)], evaluate=[(X + 1, Y)], criteria=("lrp",), **few).curves
    assert str(sensitivity(wrapped, X[:1], [(X, Y)], evaluate=[(X + 1, Y)], **few))
    assert stability(wrapped, X[:1], (X, Y), sizes=(1, 2), draws=3, progress=False)
    assert search(wrapped, X[:1], [(X, Y)], validation=[(X + 1, Y)], rules=("epsilon",), **few).trials
    assert drift(wrapped, result.model, [(X, Y)], progress=False).overall
    assert compress.report(result, original=wrapped, data=[(X, Y)], meter=None).met


@pytest.mark.parametrize("copied", [False, True])
def test_what_trains_may_return_it_wrapped(copied: bool) -> None:
    def trained(net: nn.Module) -> nn.Module:
        own = copy.deepcopy(net) if copied else net
        with torch.no_grad():
            next(own.parameters()).zero_()
        return compiled(own)

    result = compress.prune(build(), X[:1], [(X, Y)], criterion="weight", fine_tune=trained, **HALF)
    assert not next(result.model.parameters()).any()


# -- inference mode ---------------------------------------------------------
@pytest.mark.parametrize("criterion", ["lrp", "weight", "taylor"])
@pytest.mark.parametrize("made", ["before", "there"])
def test_inference_mode_leaves_no_trace(criterion: str, made: str) -> None:
    net, expected = build(), compress.prune(build(), X[:1], [(X, Y)], criterion=criterion, **HALF)
    with torch.inference_mode():
        if made == "there":
            net = build()
        x = X.clone()
        result = compress.prune(net, x[:1], [(x, Y)], criterion=criterion, evaluate=[(x + 1, Y)], **HALF)
        plan = compress.plan_pruning(net, x[:1], [(x, Y)], criterion=criterion, **HALF)
        small = plan.apply(net)
        assert not torch.is_grad_enabled()
    assert result.plan.removed == plan.removed == expected.plan.removed
    for model in (result.model, small, plan.mask(net)):
        assert not any(t.is_inference() for t in model.state_dict().values())
        model(X).sum().backward()


def test_training_in_inference_mode() -> None:
    with torch.inference_mode():
        tuning = compress.FineTune([(X, Y)], epochs=1, progress=False)
        result = compress.prune(build(), X[:1], [(X, Y)], criterion="weight", fine_tune=tuning, **HALF)
    assert result.history[0].training is not None


# -- what can not be worked with --------------------------------------------
class Keeping(nn.Module):
    """Holds a result of its last pass, in one form or another."""

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.head, self.keep, self._last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), keep, None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self._last = self.keep(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        layer = torch.nn.utils.weight_norm(nn.Conv2d(3, 8, 3))
    return nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def locked() -> nn.Module:
    net = build()
    net.lock = threading.Lock()  # type: ignore[assignment]  # any attribute will do
    return net


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


BAD: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "cached": (lambda: Keeping(lambda x: x), "'_last'", "_last.detach()"),
    "cached in a list": (lambda: nn.Sequential(Keeping(lambda x: [{"a": x}])), "'0._last'", "_last.detach()"),
    "weight_norm": (weight_norm, "'0.weight'", "remove_weight_norm"),
    "lock": (locked, "cannot pickle", "copy.deepcopy(model) has to work"),
    "lazy": (lazy, "'0.weight' has no shape yet", "call the model once"),
    "meta": (lambda: build().to("meta"), "'0.weight' has no values", "to_empty"),
}


@pytest.mark.parametrize("case", list(BAD))
@pytest.mark.parametrize("call", ["prune", "plan", "score", "apply"])
def test_the_place_and_the_way_out_are_named(case: str, call: str) -> None:
    make, what, fix = BAD[case]
    net = make()
    if case not in ("lazy", "meta"):
        net(X)
    calls: dict[str, Callable[[], Any]] = {
        "prune": lambda: compress.prune(net, X[:1], [(X, Y)], criterion="weight", **HALF),
        "plan": lambda: compress.plan_pruning(net, X[:1], [(X, Y)], **HALF),
        "score": lambda: compress.score(net, X[:1], [(X, Y)], criterion="taylor"),
        "apply": lambda: compress.plan_pruning(build(), X[:1], criterion="weight", **HALF).apply(net),
    }
    if case == "meta" and call == "apply":
        assert all(p.is_meta for p in calls[call]().parameters()), "shapes are enough to cut"
        return
    with pytest.raises(errors.InputError) as raised:
        calls[call]()
    assert what in str(raised.value)
    assert fix in raised.value.fix


@pytest.mark.parametrize("criterion", ["lrp", "weight", "gradient", "taylor", "activation", "random"])
def test_criteria_by_themselves_need_values(criterion: str) -> None:
    with pytest.raises(errors.InputError, match="has no values"):
        compress.criteria.criterion_of(criterion)(build().to("meta"), [(X, Y)], ["0"])


def test_something_else_is_no_network() -> None:
    with pytest.raises(errors.InputError, match=r"not an nn\.Module"):
        network_of("resnet")  # type: ignore[arg-type]


def test_a_cached_tensor_without_a_graph_is_no_obstacle() -> None:
    net = Keeping(lambda x: x.detach())
    net(X)
    assert network_of(net) is net
    assert compress.plan_pruning(net, X[:1], criterion="weight", target=compress.Target(macs=1.0)).removed == {}


# -- agreement of prune and plan_pruning ------------------------------------
@pytest.mark.parametrize("asked", [{"channels": 0.5}, {"channels": 3}, {"channels": 1.0}, {"macs": 0.5}, {"macs": 1.0}])
def test_nothing_to_remove(asked: dict[str, Any]) -> None:
    rigid = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    found = []
    for work in (compress.prune, compress.plan_pruning):
        try:
            work(rigid, X[:1], criterion="weight", target=compress.Target(**asked))
            found.append("met")
        except (errors.StructureError, errors.BudgetError) as error:
            found.append(str(error))
    assert found[0] == found[1]
    assert (found[0] == "met") == (asked not in ({"channels": 0.5}, {"macs": 0.5}))


@pytest.mark.parametrize("criterion", ["lrp", "lrp:zplus", "taylor", "gradient", "activation", "logit_x_activation"])
def test_an_empty_batch_beside_others_is_left_out(criterion: str) -> None:
    data = [(X[:0], Y[:0]), (X[:4], Y[:4]), (X[:0], Y[:0]), (X[4:], Y[4:])]
    scores, expected = (compress.score(build(), X[:1], d, criterion=criterion) for d in (data, [data[1], data[3]]))
    assert scores.samples == 6
    assert all(torch.equal(t, expected.values[name]) for name, t in scores.values.items())
