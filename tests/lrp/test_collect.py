"""Sums over a data set: against sums of single explanations, merged and kept."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.sums import close, make_data, make_net, pairs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lrp
from lrp import errors, rules

X, Y = make_data(3)
AGGREGATES = ("signed", "abs_element", "abs_per_sample", "abs_total")


@pytest.fixture
def net() -> nn.Module:
    return make_net()


def one_by_one(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Iterator[lrp.Relevance]:
    for i in range(len(x)):
        yield lrp.attribute(net, x[i : i + 1], y[i : i + 1], wrt=("layers", "channels", "weights"), **options)


# -- what is summed ----------------------------------------------------------------


@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_gamma", "gradient", "gradient_x_input"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_channels(net: nn.Module, aggregate: str, composite: Any) -> None:
    if composite == "epsilon_gamma":
        composite = lrp.Composite([("conv*", rules.Gamma(0.3)), ("*", rules.Epsilon())])
    x, y = make_data()
    total = lrp.collect(net, pairs(x, y), composite=composite, aggregate=aggregate)
    expected: dict[str, Any] = {}
    for rel in one_by_one(net, x, y, composite=composite):
        for name in rel.channels:
            r = rel.layers[name]
            r = r.reshape(*r.shape[:2], -1)[0]
            part = {"abs_element": r.abs().sum(1), "abs_per_sample": r.sum(1).abs()}.get(aggregate, r.sum(1))
            expected[name] = expected.get(name, 0) + part
    if aggregate == "abs_total":
        expected = {name: t.abs() for name, t in expected.items()}
    assert total.count == 7
    assert {"conv1", "conv2", "conv2@1", "head"} <= expected.keys()
    close(total.channels, expected)
    assert total.weights == {}


def test_the_aggregates_differ(net: nn.Module) -> None:
    x, y = make_data()
    sums = [lrp.collect(net, pairs(x, y), aggregate=a).channels["conv1"] for a in AGGREGATES]
    for a, b in itertools.combinations(sums, 2):
        assert (a - b).abs().max() > 1e-3 * a.abs().max()
    signed, element, sample, total = sums
    assert (element >= sample).all()
    assert (sample >= total - 1e-12).all()
    assert torch.equal(total, signed.abs())


@pytest.mark.parametrize("aggregate", ["signed", "abs_per_sample", "abs_total"])
@pytest.mark.parametrize("composite", ["epsilon_plus", "gradient_x_input"])
def test_weights(net: nn.Module, aggregate: str, composite: str) -> None:
    x, y = make_data(5)
    total = lrp.collect(net, pairs(x, y), composite=composite, wrt="weights", aggregate=aggregate)
    expected: dict[str, Any] = {}
    for rel in one_by_one(net, x, y, composite=composite):
        for name, r in rel.weights.items():
            expected[name] = expected.get(name, 0) + (r.abs() if aggregate == "abs_per_sample" else r)
    if aggregate == "abs_total":
        expected = {name: t.abs() for name, t in expected.items()}
    assert {"conv1.weight", "conv2.weight", "head.weight", "head.bias"} <= expected.keys()
    close(total.weights, expected)
    assert total.count == 5
    assert total.channels == {}


RULES: list[tuple[rules.Rule, bool]] = [
    (rules.Epsilon(1e-3), False),
    (rules.Epsilon(1e-3, ignore_bias=True), False),
    (rules.Gamma(0.7, 1e-3), True),
    (rules.Gamma(0.7, 1e-3), False),
    (rules.ZPlus(1e-3), True),
    (rules.ZPlus(1e-3), False),
    (rules.ZPlus(0.0), False),
    (rules.ZBox(-4, 4, 1e-3), False),
    (rules.RootPoint(0.3, 1e-3), False),
    (rules.AlphaBeta(2, 1, 1e-3), True),
    (rules.AlphaBeta(2, 1, 1e-3), False),
    (rules.WSquare(1e-3), False),
    (rules.Flat(1e-3), False),
]


@pytest.mark.parametrize(("rule", "positive"), RULES, ids=lambda v: str(v))
@pytest.mark.parametrize("relu", [True, False])
def test_weights_by_single_contributions(rule: rules.Rule, positive: bool, relu: bool) -> None:
    """A convolution has its contributions one by one where its input is cut into single windows."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 3)
            self.relu = relu

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(torch.relu(x) if positive else x)
            return torch.relu(z) if self.relu else z

    net = Windows().double().eval()
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    c = torch.randn(3, 3, 4, dtype=torch.float64)
    total = lrp.collect(
        net, [x], composite=rule, wrt="weights", aggregate="abs_element", start=lrp.Seed(c), layers="conv"
    )
    expected = {"conv.weight": torch.zeros(3, 2, 3).double(), "conv.bias": torch.zeros(3).double()}
    for n, o, p in itertools.product(range(3), range(3), range(4)):
        seed = torch.zeros(1, 3, 1, dtype=torch.float64)
        seed[0, o, 0] = c[n, o, p]
        window = x[n : n + 1, :, p : p + 3]
        rel = lrp.attribute(net, window, composite=rule, wrt="weights", start=lrp.Seed(seed))
        for name, r in rel.weights.items():
            expected[name] += r.abs()
    close({k: t for k, t in total.weights.items() if t.any()}, {k: t for k, t in expected.items() if t.any()}, 1e-11)


def test_contributions_of_every_use_count(net: nn.Module) -> None:
    x, y = make_data(4)
    element, sample = (
        lrp.collect(net, pairs(x, y), wrt="weights", aggregate=a).weights for a in ("abs_element", "abs_per_sample")
    )
    for name in element:
        assert (element[name] >= sample[name] - 1e-12).all()
    assert (element["conv2.weight"] > 1.5 * sample["conv2.weight"]).any()


@pytest.mark.parametrize("rule", [rules.Gamma(0.7), rules.ZPlus(), rules.Epsilon(), rules.AlphaBeta()])
@pytest.mark.parametrize("relu", [True, False])
def test_without_ledger_the_weights_are_the_same(rule: rules.Rule, relu: bool) -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU() if relu else nn.Identity()).double().eval()
    x, c = torch.randn(4, 2, 6, dtype=torch.float64), torch.randn(4, 3, 4, dtype=torch.float64)
    with_books, without = (
        lrp.attribute(net, x, composite=rule, start=lrp.Seed(c), wrt="weights", ledger=ledger).weights
        for ledger in (True, False)
    )
    assert "0.bias" in without
    for name, r in with_books.items():
        assert torch.allclose(r, without[name], atol=1e-14), name


def test_rules_without_known_magnitudes_are_named() -> None:
    net = nn.Sequential(nn.Linear(3, 2)).double().eval()
    rule = rules.RootPoint(torch.randn(2, 3, dtype=torch.float64))
    x = torch.randn(2, 3, dtype=torch.float64)
    lrp.collect(net, [x], composite=rule, wrt="weights")
    with pytest.raises(errors.RuleError, match="layer '0'"):
        lrp.collect(net, [x], composite=rule, wrt="weights", aggregate="abs_element")


def test_aggregate_by_name_or_by_kind(net: nn.Module) -> None:
    data = pairs(*make_data(3))
    both = ("channels", "weights")
    assert lrp.collect(net, data, wrt=both).settings["aggregate"] == {
        "channels": "abs_per_sample", "weights": "signed"
    }  # fmt: skip
    mixed = lrp.collect(net, data, wrt=both, aggregate={"weights": "abs_per_sample"})
    close(mixed.channels, lrp.collect(net, data).channels)
    close(mixed.weights, lrp.collect(net, data, wrt="weights", aggregate="abs_per_sample").weights)
    all_total = lrp.collect(net, data, wrt=both, aggregate="abs_total")
    assert min(t.min() for t in [*all_total.channels.values(), *all_total.weights.values()]) >= 0


def test_batches_do_not_matter(net: nn.Module) -> None:
    x, y = make_data()
    whole = lrp.collect(net, [(x, y)], wrt=("channels", "weights"))
    for size in (1, 2, 5):
        parts = lrp.collect(net, iter(pairs(x, y, size)), wrt=("channels", "weights"))
        close(parts.channels, whole.channels)
        close(parts.weights, whole.weights)
        assert parts.count == whole.count == 7
    loader = DataLoader(TensorDataset(x, y), batch_size=3)  # yields lists
    close(lrp.collect(net, loader).channels, whole.channels)


def test_float32_sums_are_float64() -> None:
    net = make_net().float()
    x, y = make_data(40)
    sums = lrp.collect(net, pairs(x.float(), y, 7), wrt=("channels", "weights"))
    exact = lrp.collect(make_net(), pairs(x, y, 7), wrt=("channels", "weights"))
    close(sums.channels, exact.channels, 1e-4)
    close(sums.weights, exact.weights, 1e-4)


def test_restricted_to_layers(net: nn.Module) -> None:
    data = pairs(*make_data(3))
    every = lrp.collect(net, data, wrt=("channels", "weights"))
    some = lrp.collect(net, data, wrt=("channels", "weights"), layers=["conv1", "head"])
    assert some.channels.keys() == {"conv1", "head"}
    assert some.weights.keys() == {"conv1.weight", "head.weight", "head.bias"}
    close(some.channels, {n: every.channels[n] for n in some.channels})
    close(some.weights, {n: every.weights[n] for n in some.weights})
    plain = lrp.collect(net, data, composite="gradient", wrt="weights", layers="head")
    assert plain.weights.keys() == {"head.weight", "head.bias"}


def test_mean_and_unexplained(net: nn.Module) -> None:
    total = lrp.collect(net, pairs(*make_data()))
    close({n: 7 * t for n, t in total.mean().items()}, total.channels)
    assert "gate" in total.unexplained
    assert "gate" not in total.channels
    with pytest.raises(errors.InputError, match="no sum of 'weights'"):
        total.mean("weights")


def test_prints(net: nn.Module) -> None:
    text = repr(lrp.collect(net, pairs(*make_data()), wrt=("channels", "weights")))
    for part in (
        "7 samples",
        "epsilon_plus",
        "logit",
        "channels abs_per_sample",
        "weights signed",
        "without relevance",
    ):
        assert part in text


# -- targets and starts ------------------------------------------------------------


def test_targets(net: nn.Module) -> None:
    x, y = make_data()
    best = net(x).argmax(1)
    assert (best != y).any()
    predicted = lrp.collect(net, [(x, best)]).channels
    for batches, target in (([x], None), ([(x,)], None), ([(x, None)], None), ([(x, y)], "predicted")):
        close(lrp.collect(net, batches, target=target).channels, predicted)
    close(lrp.collect(net, [(x, y)], target=2).channels, lrp.collect(net, [(x, torch.full_like(y, 2))]).channels)


@pytest.mark.parametrize("start", ["one_hot", "probability", "margin"])
def test_starts(net: nn.Module, start: str) -> None:
    x, y = make_data()
    expected = lrp.attribute(net, x, y, wrt="channels", start=start).channels
    close(
        lrp.collect(net, pairs(x, y), start=start, aggregate="signed").channels,
        {n: r.sum(0) for n, r in expected.items()},
    )


@pytest.mark.parametrize("form", [lambda c: c, lambda c: c[None]])
def test_start_of_one_sample_stands_for_each(net: nn.Module, form: Callable[[Tensor], Tensor]) -> None:
    x, y = make_data()
    c = torch.tensor([1.0, -1.0, 0.0, 0.5], dtype=torch.float64)
    expected = lrp.attribute(net, x, wrt=("channels", "weights"), start=lrp.Seed(c.expand(7, 4)))
    for aggregate in ("signed", {"channels": "signed", "weights": "abs_per_sample"}):
        total = lrp.collect(net, pairs(x, y), start=lrp.Seed(form(c)), wrt=("channels", "weights"), aggregate=aggregate)
        close(total.channels, {n: r.sum(0) for n, r in expected.channels.items()})
    relevance = lrp.collect(net, [x], start=form(c), aggregate="signed")
    expected = lrp.attribute(net, x, wrt="channels", start=c.expand(7, 4).clone())
    close(relevance.channels, {n: r.sum(0) for n, r in expected.channels.items()})


def test_models_without_classes_leave_targets_aside() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0)).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    with_y = lrp.collect(net, [(x, torch.randn(5))])
    close(with_y.channels, lrp.collect(net, [x]).channels)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.relu(self.left(a) + self.right(b)))


def test_several_inputs() -> None:
    net = Two().double().eval()
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    expected = lrp.attribute(net, (a, b), y, wrt=("channels", "weights"))
    for aggregate in ("abs_per_sample", None):
        total = lrp.collect(
            net, [((a[:2], b[:2]), y[:2]), [[a[2:], b[2:]], y[2:]]], wrt=("channels", "weights"), aggregate=aggregate
        )
        close(total.channels, {n: r.abs().sum(0) for n, r in expected.channels.items()})
    close(total.weights, dict(expected.weights))
    assert lrp.collect(net, [((a, b),)]).count == 5
    with pytest.raises(errors.InputError, match="tuple of their own"):
        lrp.collect(net, [(a, b)])


def test_shapes_may_vary(net: nn.Module) -> None:
    (x, y), (small, z) = make_data(3), make_data(4, 5)
    total = lrp.collect(net, [(x, y), (small, z), (x, y)])
    one, two = lrp.collect(net, [(x, y)]), lrp.collect(net, [(small, z)])
    close(total.channels, {n: 2 * r + two.channels[n] for n, r in one.channels.items()})
    with pytest.raises(errors.PlanError, match="shape"):
        lrp.collect(lrp.prepare(net, x), [(x, y), (small, z)])


def test_plan(net: nn.Module) -> None:
    x, y = make_data()
    plan = lrp.prepare(net, x, "epsilon")
    close(lrp.collect(plan, pairs(x, y)).channels, lrp.collect(net, pairs(x, y), composite="epsilon").channels)
    with pytest.raises(errors.InputError, match="composite"):
        lrp.collect(plan, pairs(x, y), composite="epsilon")


def test_model_is_left_as_it_was(net: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    lrp.collect(net, pairs(*make_data()), wrt=("channels", "weights"))
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name])
    assert all(p.grad is None for p in net.parameters())


# -- adding up ---------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_merge(net: nn.Module, aggregate: str) -> None:
    x, y = make_data()
    options: dict[str, Any] = {"wrt": ("channels", "weights"), "aggregate": aggregate}
    whole = lrp.collect(net, [(x, y)], **options)
    a, b, c = (lrp.collect(net, [p], **options) for p in pairs(x, y))
    before = a.state_dict()
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    for merged in (left, right, c.merge(a).merge(b)):
        assert merged.count == 7
        close(merged.channels, whole.channels)
        close(merged.weights, whole.weights)
    assert a.count == 3
    assert all(torch.equal(t, before["channels"][n]) for n, t in a.state_dict()["channels"].items())
    empty = lrp.RelevanceSum(**options, model=net)
    for merged in (empty.merge(a), a.merge(empty)):
        assert merged.count == 3
        close(merged.channels, a.channels, 0)


def test_update(net: nn.Module) -> None:
    x, y = make_data()
    total = lrp.RelevanceSum(("channels", "weights"), model=net)
    for part, target in pairs(x, y):
        total.update(lrp.attribute(net, part, target, wrt=("channels", "weights")))
    collected = lrp.collect(net, pairs(x, y), wrt=("channels", "weights"))
    close(total.channels, collected.channels, 0)
    close(total.weights, collected.weights, 0)
    assert total.merge(collected).count == 14


def test_update_refuses(net: nn.Module) -> None:
    x, y = make_data()
    rel = lrp.attribute(net, x, y, wrt=("channels", "weights"))
    with pytest.raises(errors.InputError, match="summed already"):
        lrp.RelevanceSum(aggregate="abs_element").update(rel)
    with pytest.raises(errors.InputError, match="summed already"):
        lrp.RelevanceSum("weights", "abs_per_sample").update(rel)
    single = lrp.RelevanceSum("weights", "abs_per_sample")
    single.update(lrp.attribute(net, x[:1], y[:1], wrt="weights"))
    assert single.count == 1
    total = lrp.RelevanceSum()
    with pytest.raises(errors.MismatchError, match="no channels"):
        total.update(lrp.attribute(net, x, y))
    total.update(rel)
    before = total.state_dict()
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 2)).double().eval()
    with pytest.raises(errors.MismatchError, match="layers"):
        total.update(lrp.attribute(other, x, wrt="channels"))
    assert total.count == 7
    assert all(torch.equal(t, before["channels"][n]) for n, t in total.channels.items())


def test_sums_of_different_things_do_not_merge(net: nn.Module) -> None:
    data = pairs(*make_data(3))
    total = lrp.collect(net, data)
    others = [
        ("composite", {"composite": "epsilon"}),
        ("composite", {"composite": lrp.composites.epsilon_plus(1e-3)}),
        ("aggregate", {"aggregate": "signed"}),
        ("start", {"start": "margin"}),
        ("wrt", {"wrt": ("channels", "weights")}),
        ("target", {"target": 1}),
        ("layers", {"layers": "conv*"}),
    ]
    for what, options in others:
        with pytest.raises(errors.MismatchError, match=what):
            total.merge(lrp.collect(net, data, **options))
    with pytest.raises(errors.MismatchError, match="targets"):
        total.merge(lrp.collect(net, [x for x, _ in data]))
    with torch.no_grad():
        net.head.bias[0] += 1e-12
    with pytest.raises(errors.MismatchError, match="weights"):
        total.merge(lrp.collect(net, data))
    with pytest.raises(errors.MismatchError, match="RelevanceSum"):
        total.merge(3)  # type: ignore[arg-type]
    # the same rules under another name are the same composite
    renamed = lrp.Composite(lrp.composites.epsilon_plus().rules, name="mine")
    assert lrp.collect(make_net(), data).merge(lrp.collect(make_net(), data, composite=renamed)).count == 6


def test_a_sum_that_does_not_know_its_model(net: nn.Module) -> None:
    collected = lrp.collect(net, [(X, Y)], composite="epsilon")
    empty = lrp.RelevanceSum(composite="epsilon")
    for a, b in ((empty, collected), (collected, empty)):
        with pytest.raises(errors.MismatchError, match=r"model class.*pass model= to RelevanceSum"):
            a.merge(b)
    assert lrp.RelevanceSum(composite="epsilon", model=net).merge(collected).count == 3


def test_functions_are_told_apart(net: nn.Module) -> None:
    def scaled(by: float) -> Callable[[Tensor], Tensor]:
        return lambda z: z + by

    class Plus:
        def __init__(self, by: float) -> None:
            self.by = by

        def __call__(self, z: Tensor) -> Tensor:
            return z + self.by

    def plus(z: Tensor, by: float = 1.0, *, more: float = 0.0) -> Tensor:
        return z + by + more

    def composite(stabiliser: Any) -> Any:
        return lrp.RelevanceSum(composite=rules.Epsilon(stabiliser)).settings["composite"]

    def loaded(text: str, **names: Any) -> Any:
        return eval(text, {"__name__": "loaded", **names})

    different = [
        [lambda z: z + 1e-6, lambda z: z + 10.0, lambda z: z - 1e-6, lambda z: (lambda v: v + 2.0)(z)],
        [lambda z: (lambda v: v + 1.0)(z), lambda z: (lambda v: v + 3.0)(z)],
        [lambda z: z.abs(), lambda z: z.sign()],
        [scaled(1.0), scaled(2.0), scaled(torch.ones(1)), scaled(torch.zeros(1))],  # type: ignore[arg-type]
        [lambda z, by=1.0: z + by, lambda z, by=2.0: z + by],
        [functools.partial(plus, by=2.0), functools.partial(plus, by=3.0), functools.partial(plus, more=2.0)],
        [Plus(1.0), Plus(2.0), Plus(1.0).__call__, Plus(2.0).__call__],
        [loaded("lambda z: z + EPS", EPS=1.0), loaded("lambda z: z + EPS", EPS=2.0)],
        [loaded("lambda z: f(z)", f=loaded("lambda z: z")), loaded("lambda z: f(z)", f=loaded("lambda z: -z"))],
    ]
    for group in different:
        texts = [json.dumps(composite(f)) for f in group]
        assert len(set(texts)) == len(group), texts
    for one, other in ((scaled(1.0), scaled(1.0)), (Plus(2.0), Plus(2.0))):
        assert composite(one) == composite(other)

    def itself(z: Tensor, keep: list[Any] = []) -> Tensor:  # noqa: B006
        return itself(z) if keep is None else z

    itself.__defaults__[0].extend([itself, itself.__defaults__])  # type: ignore[index]
    assert composite(itself) == composite(itself)
    small, large = (lrp.collect(net, [(X, Y)], composite=rules.Epsilon(f)) for f in different[0][:2])
    with pytest.raises(errors.MismatchError, match="composite"):
        small.merge(large)
    assert small.merge(small).count == 6


def test_digests_of_functions_hold_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "stable.py").write_text(
        "import torch\nEPS = 1e-3\n"
        "def helper(z):\n    return z + EPS\n"
        "def outer(by):\n"
        "    return lambda z, c=frozenset('abc'): helper(z) + by * (z in {'x', 'y', 'z'}) + torch.ones(1)\n"
        "chosen = outer(torch.arange(3.0))\n"
    )
    body = (
        f"import sys; sys.path[:0] = {[str(tmp_path), str(Path(lrp.__file__).parents[1])]!r}\n"
        "import lrp, stable\nprint(lrp.RelevanceSum(composite=lrp.rules.Epsilon(stable.chosen)).settings['composite'])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", body], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert b"stable.outer.<locals>.<lambda> " in told.pop()


def test_precision_and_registered_rules_are_compared(net: nn.Module, tmp_path: Path) -> None:
    net, data = net.float(), [(X.float(), Y)]
    plain = lrp.collect(net, data, resume=tmp_path / "state")
    assert plain.settings["precision"] is None
    assert plain.settings["registered"] is None
    with torch.autocast("cpu", torch.bfloat16):
        low = lrp.collect(net, data)
        assert lrp.RelevanceSum().settings["precision"] == "bfloat16"
        with pytest.raises(errors.MismatchError, match="autocast"):
            lrp.collect(net, data, resume=tmp_path / "state")
    assert low.settings["precision"] == "bfloat16"
    with pytest.raises(errors.MismatchError, match="autocast"):
        plain.merge(low)
    told = []
    for thing, rule in ((nn.Linear, "gradient"), (nn.Linear, rules.Pass()), (torch.sigmoid, "gradient")):
        with lrp.register(thing, rule):
            empty = lrp.RelevanceSum(model=net)
            with pytest.raises(errors.MismatchError, match=r"lrp\.register"):
                lrp.collect(net, data, resume=tmp_path / "state")
        with pytest.raises(errors.MismatchError, match=r"lrp\.register"):
            plain.merge(empty)
        told.append(json.dumps(empty.settings["registered"]))
    assert len(set(told)) == 3
    with lrp.register(nn.Bilinear, "gradient"):  # a class the model does not have
        assert lrp.collect(net, data, resume=tmp_path / "state").count == 3


class Packed(nn.Module):
    """Queries, keys and values out of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


def test_rows_without_relevance_are_kept(tmp_path: Path) -> None:
    net, x = Packed().double().eval(), torch.randn(3, 5, 4, dtype=torch.float64)
    first = lrp.collect(net, [x], resume=tmp_path / "state")
    total = lrp.collect(net, [x, x], resume=tmp_path / "state")
    merged = total.merge(lrp.collect(net, [x]))
    merged.save(tmp_path / "sum")
    again = lrp.RelevanceSum()
    again.load_state_dict(merged.state_dict())
    for held in (first, total, merged, lrp.RelevanceSum.load(tmp_path / "sum"), again):
        assert list(held.unexplained) == ["qkv[0:8]"]
        assert (held.channels["qkv"][:8] == 0).all()
        assert (held.channels["qkv"][8:] > 0).all()


def test_under_any_autograd_mode(net: nn.Module) -> None:
    data = pairs(*make_data())
    expected = lrp.collect(net, data)
    with torch.inference_mode():
        total = lrp.collect(net, data)
        merged = total.merge(total)
    close(total.channels, expected.channels, 0)
    for t in (total, merged):
        t.update(lrp.attribute(net, *data[0], wrt="channels"))
    assert (total.count, merged.count) == (10, 17)
