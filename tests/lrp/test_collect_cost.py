"""What a sum over data does not compute, and that nothing is missing for it."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles.sums import close, make_data, make_net, pairs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import compress
import lrp
from lrp import errors, rules
from lrp import plan as plans
from lrp._inputs import all_finite

COMPOSITES: dict[str, Any] = {
    "z+": rules.ZPlus(1e-3),
    "gamma": rules.Gamma(0.3, 1e-3),
    "alpha-beta": rules.AlphaBeta(2, 1, 1e-3),
    "epsilon": rules.Epsilon(1e-3),
    "rms": rules.Epsilon(rules.Rms()),
    "box": lrp.Composite([("first", rules.ZBox(-5.0, 5.0)), ("*", rules.ZPlus())]),
    "flat": lrp.Composite([("first", rules.Flat()), ("*", rules.ZPlus())]),
    "sums": lrp.Composite([("*", rules.ZPlus())], 1e-3),
    "gradient": "gradient",
    "gradient_x_input": "gradient_x_input",
    "guided_backprop": "guided_backprop",
}


RULES: dict[str, rules.Rule] = {
    "epsilon": rules.Epsilon(1e-3),
    "epsilon without bias": rules.Epsilon(1e-3, ignore_bias=True),
    "z+": rules.ZPlus(1e-3),
    "gamma": rules.Gamma(0.25, 1e-3),
    "alpha-beta": rules.AlphaBeta(2, 1, 1e-3),
    "box": rules.ZBox(-5.0, 5.0, 1e-3),
    "root": rules.RootPoint(torch.tensor(0.3), 1e-3),
    "w squared": rules.WSquare(1e-3),
    "flat": rules.Flat(1e-3),
}


class Products(TorchDispatchMode):
    """Counts products forward and back."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.back = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward += func in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default)
        if func is torch.ops.aten.convolution_backward.default:
            self.back += sum(args[-1])  # of the input, of the weight
        return func(*args, **(kwargs or {}))


class Residual(nn.Module):
    """Norms in front, behind and in between; a layer with and one without a ReLU; a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.BatchNorm2d(2)
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)
        for bn in (self.front, self.bn1, self.bn2):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(self.front(x))).relu()
        x = (self.bn2(self.conv2(x)) + self.down(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    return Residual().double().eval()


def _data(count: int = 5, channels: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(count, channels, 5, 5, dtype=torch.float64), torch.randint(3, (count,))


def _once(kind: str, rel: lrp.Relevance) -> dict[str, Tensor]:
    return {n: r.sum(0) for n, r in rel.channels.items()} if kind == "channels" else rel.weights


# -- a pass ends where nothing is asked for any more --------------------------------


@pytest.mark.parametrize("kind", ["channels", "weights"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_sums_are_those_of_whole_explanations(net: nn.Module, name: str, kind: str) -> None:
    """An explanation goes as far as the input, a sum does not."""
    composite, (x, y) = COMPOSITES[name], _data()
    whole = _once(kind, lrp.attribute(net, x, y, composite=composite, wrt=kind))
    everything = lrp.collect(net, [(x, y)], composite=composite, wrt=kind, aggregate="signed")
    close(getattr(everything, kind), whole)
    for layer in ("conv1", "conv2", "down", "head"):
        part = lrp.collect(net, [(x, y)], composite=composite, wrt=kind, aggregate="signed", layers=layer)
        got = getattr(part, kind)
        assert got
        close(got, {n: whole[n] for n in got})


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_weights_of_the_first_layer(name: str, relu: bool, norm: bool) -> None:
    """Its weight product alone, of every form."""
    layer = nn.Conv2d(2, 3, 5) if norm else nn.Conv2d(2, 3, 3)  # with a norm: larger than what it puts out
    model = nn.Sequential(
        nn.ReLU() if relu else nn.Identity(),
        layer,
        nn.BatchNorm2d(3) if norm else nn.Identity(),
        nn.ReLU() if relu else nn.Identity(),
        nn.Flatten(),
    )
    x = torch.randn(4, 2, 5, 5).double()
    start = torch.randn(model.double().eval()(x)[0].shape).double()
    composite = lrp.Composite([("*", RULES[name])])
    if name == "epsilon" and norm:
        assert "scaled" in str(lrp.prepare(model, x, composite))
    whole = lrp.attribute(model, x, composite=composite, wrt="weights", start=lrp.Seed(start.expand(4, -1)))
    total = lrp.collect(model, [x], composite=composite, wrt="weights", start=lrp.Seed(start))
    close(total.weights, whole.weights)


class Sides(nn.Module):
    """Two inputs; only the second passes a layer that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.left(a) + self.right(b)).relu())


def test_a_branch_that_nobody_asks_for() -> None:
    net = Sides().double().eval()
    inputs = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    whole = lrp.attribute(net, inputs, 1, composite=rules.ZPlus(), wrt="channels").channels
    for layer in ("left", "right", "head"):
        total = lrp.collect(
            net, [(inputs,)], composite=rules.ZPlus(), aggregate="signed", layers=layer, start="logit", target=1
        )
        close(total.channels, {layer: whole[layer].sum(0)})


def test_nothing_behind_the_layer_that_is_asked_for_is_computed() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 3))
    x = torch.randn(2, 2, 5, 5)
    costs = {}
    for layers in (["0", "2"], ["2"], ["5"]):
        run = {"composite": rules.ZPlus(), "layers": layers, "progress": False}
        lrp.collect(model.eval(), [x], **run)  # modified weights at hand
        with Products() as counter:
            lrp.collect(model, [x], **run)
        costs["".join(layers)] = counter.forward, counter.back
    # of z+ two products forward and one back, of a layer before the first one that is asked for one and none
    assert costs == {"02": (1 + 2 + 2, 1), "2": (1 + 1 + 2, 0), "5": (1 + 1 + 1, 0)}
    lrp.prepare(model, x, rules.Epsilon())
    with Products() as counter:
        lrp.collect(model, [x], composite=rules.Epsilon(), wrt="weights", progress=False)
    assert (counter.forward, counter.back) == (3, 1 + 2)  # the first layer hands nothing on


def test_layers_without_channels_are_still_named(net: nn.Module) -> None:
    """Nothing is tapped, so that no tensor of the pass needs a gradient."""

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.head = nn.Flatten(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.flat(x))

    model = Pixels().eval()
    with pytest.raises(errors.MismatchError, match="has no channels"):
        lrp.collect(model, [torch.randn(2, 2, 2, 2)], layers="flat", composite="epsilon")


def test_relevance_that_is_not_finite_is_seen() -> None:
    """The last channels before the input are checked in its place."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for p in model.parameters():
        p.data = p.data.abs() + 1
    start = lrp.Seed(torch.tensor([1e38, 1e38]))
    for wrt in ("channels", "weights"):
        with pytest.raises(errors.NonFiniteError, match="relevance"):
            lrp.collect(model, [torch.rand(2, 3)], composite=rules.Epsilon(), wrt=wrt, start=start)


def test_finite_numbers_whose_sum_is_not() -> None:
    large = torch.tensor([3e38, 3e38])
    assert all_finite([])
    assert all_finite([large, torch.zeros(3, dtype=torch.float64)])
    assert all_finite([torch.full((4,), 6e4, dtype=torch.float16)])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([large, torch.tensor([0.0, bad])])
    assert not all_finite([torch.tensor([float("inf"), -float("inf")])])
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    net[0].weight.data[:] = 3e38
    assert lrp.attribute(net, torch.full((1, 2), 0.1), 0).input.isfinite().all()


def test_one_tap_serves_all_names_of_a_place(net: nn.Module) -> None:
    x, y = _data()
    plan = lrp.prepare(net, x, "epsilon_plus")
    rel = plan.attribute(x, y, wrt=("channels", "layers"))
    program = plan._core.program(plans.Wanted(channels=True))
    names = [name for many, _ in program.channel_probes for name in many]
    assert sorted(names) == sorted(rel.channels)
    assert ["conv1", "bn1"] in [sorted(many, reverse=True) for many, _ in program.channel_probes]
    for name, r in rel.channels.items():
        assert torch.allclose(r, rel.layers[name].flatten(2).sum(2) if rel.layers[name].ndim > 2 else rel.layers[name])
    only = plan.attribute(x, y, wrt="channels", layers="bn1").channels
    assert torch.equal(only.pop("bn1"), rel.channels["bn1"])
    assert not only


@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_alpha2_beta1"])
def test_compiled_and_under_autocast(net: nn.Module, composite: str) -> None:
    x, y = _data()
    plan = lrp.prepare(net, x, composite, compile="aot_eager")
    expected = lrp.collect(net, [(x, y)], composite=composite).channels
    close(lrp.collect(plan, [(x, y)]).channels, expected)
    half, x = net.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        rel = lrp.attribute(half, x, y, composite=composite, wrt="channels", ledger=False)
        total = lrp.collect(half, [(x, y)], composite=composite, aggregate="signed")
    for name, r in rel.channels.items():
        assert torch.allclose(total.channels[name], r.double().sum(0), rtol=1e-2, atol=1e-2 * float(r.abs().max()))


# -- plans serve all composites that say the same ------------------------------------


def _core(net: nn.Module, x: Tensor, composite: Any) -> Any:
    return lrp.prepare(net, x, composite)._core


def test_equal_composites_share_a_plan(net: nn.Module) -> None:
    x, _ = _data()

    def square(z: Tensor) -> Tensor:
        return z * 1.5

    for make in (
        lambda: rules.ZPlus(),
        lambda: lrp.composites.epsilon_plus(ignore_bias=True),
        lambda: lrp.Composite([(nn.Conv2d, rules.Gamma(0.3)), ("*", rules.Epsilon(rules.Rms(0.1)))], 1e-6),
        lambda: lrp.Composite([(lrp.composites.First((nn.Conv2d,)), rules.Flat()), ("*", rules.Epsilon(square))]),
    ):
        assert _core(net, x, make()) is _core(net, x, make())
    assert _core(net, x, "epsilon_plus") is _core(net, x, lrp.composites.epsilon_plus())


def test_other_composites_do_not() -> None:
    net = Residual().eval()
    x = torch.randn(1, 2, 5, 5)

    class Own(lrp.Composite):
        pass

    class Doubled(rules.ZPlus):
        pass

    box = torch.tensor(4.0)
    makers: list[Any] = [
        lambda: lrp.Composite([("*", rules.ZPlus())]),
        lambda: lrp.Composite([("*", rules.ZPlus(1e-5))]),
        lambda: lrp.Composite([("*", rules.ZPlus(ignore_bias=True))]),
        lambda: lrp.Composite([("*", rules.Gamma())]),
        lambda: lrp.Composite([(("*"), rules.ZPlus())], 1e-6),
        lambda: lrp.Composite([("*", rules.ZPlus())], name="other"),
        lambda: lrp.Composite([("*", rules.ZPlus())], attention="attn_lrp"),
        lambda: lrp.Composite([("first", rules.ZPlus()), ("*", rules.ZPlus())]),
    ]
    recipes = [make().recipe() for make in makers]
    for a, b in itertools.combinations(recipes, 2):
        assert a != b
    # what can change, or does what only it knows, is shared by nobody but itself
    for make in (
        lambda: Own([("*", rules.ZPlus())]),
        lambda: lrp.Composite([("*", Doubled())]),
        lambda: lrp.Composite([("first", rules.ZBox(-box, box)), ("*", rules.ZPlus())]),
        lambda: lrp.Composite([("*", rules.Epsilon(nn.Softplus()))]),
    ):
        one = make()
        assert one.recipe() is one
    boxed = makers[0](), lrp.Composite([("first", rules.ZBox(-box, box)), ("*", rules.ZPlus())])
    assert len({id(_core(net, x, c)) for c in (*boxed, *boxed, makers[1](), makers[4]())}) == 4


def test_a_composite_that_was_changed_leaves_no_stale_plan(net: nn.Module) -> None:
    """Neither for itself nor for one that is equal to what it was."""
    x, y = _data()
    first = lrp.Composite([("*", rules.ZPlus())])
    lrp.prepare(net, x, first)
    first.stabilise_sums = 0.5
    for composite in (first, lrp.Composite([("*", rules.ZPlus())])):
        got = lrp.attribute(net, x, y, composite=composite).input
        assert torch.equal(got, lrp.attribute(copy.deepcopy(net), x, y, composite=composite).input)


def test_scoring_again_plans_nothing(net: nn.Module, monkeypatch: Any) -> None:
    x, y = _data()
    made = []
    actual = plans._Core.__init__
    monkeypatch.setattr(plans._Core, "__init__", lambda self, *a: (made.append(1), actual(self, *a))[1])
    for composite in ("zplus", "zplus", "epsilon_plus", "gamma", "zplus"):
        compress.score(net, x[:1], [(x, y)], criterion=f"lrp:{composite}", progress=False)
    assert len(made) == 3


# -- modified weights ---------------------------------------------------------------


def _kept(net: nn.Module) -> list[Any]:
    return [t for core in plans._CACHE[net].plans.values() for t in core.bound._table.values()]


def test_scoring_leaves_no_modified_weights(net: nn.Module, monkeypatch: Any) -> None:
    """As large as the network, and of no use after the pass; nor after one that failed, or met several shapes."""
    (x, y), seen = _data(), []
    data = [(x, y), (torch.randn(2, 2, 7, 7).double(), y[:2])]

    def batches(fail: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data:
            yield batch
            seen.extend(weakref.ref(t) for t in _kept(net))
            if fail:
                raise RuntimeError("gone")

    class Data(list[Any]):
        fail = False

        def __iter__(self) -> Any:
            return batches(self.fail)

    loader = Data(data)
    compress.score(net, x[:1], loader, criterion="lrp:zplus", progress=False)
    gc.collect()
    assert len(seen) > 5
    assert not _kept(net)
    assert all(t() is None for t in seen)
    loader.fail = True
    with pytest.raises(RuntimeError, match="gone"):
        compress.score(net, x[:1], loader, criterion="lrp:zplus", progress=False)
    assert not _kept(net)
    lrp.collect(net, data, composite=rules.ZPlus())
    assert _kept(net)


def test_released_weights_are_made_again(net: nn.Module) -> None:
    x, y = _data()
    plan = lrp.prepare(net, x, rules.ZPlus())
    before = plan.attribute(x, y).input
    plan._core.bound.release()
    assert torch.equal(plan.attribute(x, y).input, before)
    plan._core.bound.release()
    net.conv2.weight.data *= -1
    fresh = lrp.attribute(copy.deepcopy(net), x, y, composite=rules.ZPlus()).input
    assert torch.equal(plan.attribute(x, y).input, fresh)
    assert not torch.equal(fresh, before)


def test_releasing_while_another_thread_explains(net: nn.Module) -> None:
    x, y = _data()
    plan = lrp.prepare(net, x, rules.Gamma())
    expected, done = plan.attribute(x, y).input, threading.Event()

    def release() -> None:
        while not done.is_set():
            plan._core.bound.release()

    thread = threading.Thread(target=release)
    thread.start()
    try:
        assert all(torch.equal(plan.attribute(x, y).input, expected) for _ in range(20))
    finally:
        done.set()
        thread.join()


def test_weights_that_change_between_batches(net: nn.Module) -> None:
    """Every batch is explained with the weights of its moment, edits of ``.data`` included."""
    (x, y), twin = _data(), copy.deepcopy(net)

    def edit(model: Any) -> None:
        model.conv2.weight.data *= -1
        model.bn1.running_var.data += 1

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield x, y
        edit(net)
        yield x, y

    total = lrp.collect(net, batches(), composite=rules.ZPlus(), aggregate="signed").channels
    first = lrp.attribute(twin, x, y, composite=rules.ZPlus(), wrt="channels").channels
    edit(twin)
    second = lrp.attribute(twin, x, y, composite=rules.ZPlus(), wrt="channels").channels
    close(total, {name: (r + second[name]).sum(0) for name, r in first.items()})


def test_scores_are_means_of_explanations() -> None:
    """The scoring pass has no digest and no weights at its end; its scores are those of single explanations."""
    net, (x, y) = make_net(), make_data(6)
    scores = compress.score(net, x[:1], pairs(x, y), criterion="lrp:zplus", progress=False).values
    rel = [
        lrp.attribute(net, x[i : i + 1], y[i : i + 1], composite=rules.ZPlus(), wrt="channels", start="one_hot")
        for i in range(len(x))
    ]
    for name in ("conv1", "head"):
        if name in scores:
            expected = torch.stack([r.channels[name][0].abs() for r in rel]).double().mean(0)
            assert torch.allclose(scores[name], expected)
    assert scores


def test_a_pass_that_leaves_a_state_knows_its_weights(net: nn.Module, tmp_path: Any, monkeypatch: Any) -> None:
    from lrp import _settings

    (x, y), asked = _data(), []
    actual = _settings.digest
    monkeypatch.setattr(_settings, "digest", lambda t, *a: (asked.append(len(t)), actual(t, *a))[1])
    compress.score(net, x[:1], [(x, y)], criterion="lrp:zplus", progress=False)
    assert not asked
    criterion = compress.criteria.lrp("zplus", resume=tmp_path / "state")
    compress.score(net, x[:1], [(x, y)], criterion=criterion, progress=False)
    assert asked
    net.head.weight.data += 1
    with pytest.raises(errors.MismatchError, match="weights"):
        compress.score(net, x[:1], [(x, y)], criterion=criterion, progress=False)
