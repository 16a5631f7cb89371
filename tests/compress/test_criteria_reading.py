"""Gradients, Taylor expansions, activations and ablations against one sample, one channel at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Expression, hard
from oracles import criteria as slow
from scored import NETS, Net, conv
from torch import Tensor, nn
from torch.nn import functional as F

from compress.criteria import ablation, activation, gradient, hessian, logit_x_activation, taylor
from compress.criteria._names import AGGREGATES
from lrp import errors
from lrp._settings import AGGREGATES as IN_LRP

FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], bool]] = {
    "gradient": (gradient, slow.cross_entropy, False),
    "taylor": (taylor, slow.cross_entropy, True),
    "logit_x_activation": (logit_x_activation, slow.logit, True),
}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12))


def expected(net: Net, model: nn.Module, data: Any, layer: str, form: str, aggregate: str, place: str = "") -> Tensor:
    _, objective, multiply = FORMS[form]
    values, gradients = slow.maps(model, data, place or net.places[layer], objective)
    return slow.aggregate(slow.times(values, gradients) if multiply else gradients, aggregate)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETS)
def test_one_sample_and_one_channel_at_a_time(name: str, form: str) -> None:
    net = NETS[name]
    model, data = net.model(), net.data()
    for aggregate in AGGREGATES:
        found = FORMS[form][0](aggregate)(model, data, list(net.places), progress=False)
        assert found.samples == 6
        assert list(found.values) == list(net.places)
        for layer, own in found.values.items():
            assert close(own, expected(net, model, data, layer, form, aggregate)), (layer, aggregate)


@pytest.mark.parametrize("form", FORMS)
def test_read_at_the_convolution(form: str) -> None:
    net = NETS["shared"]
    model, data = net.model(), net.data()
    found = FORMS[form][0](read_at="conv")(model, data, list(net.places), progress=False)
    for layer, own in found.values.items():
        assert close(own, expected(net, model, data, layer, form, "abs_per_sample", layer))
    behind = FORMS[form][0]()(model, data, list(net.places), progress=False)
    assert not close(found.values["stem"], behind.values["stem"], 1e-3)  # the batch norm has a shift


@pytest.mark.parametrize("name", NETS)
def test_activation_is_what_leaves_the_layer(name: str) -> None:
    net = NETS[name]
    model, data = net.model(), net.data()
    found = activation()(model, data, list(net.places), progress=False)
    before = activation(read_at="output")(model, data, list(net.places), progress=False)
    for layer, place in net.places.items():
        values, _ = slow.maps(model, data, place, slow.cross_entropy)
        shares = [[v / v.shape[1] for v in sample] for sample in values]
        assert close(before.values[layer], slow.aggregate(shares, "abs_element"))
        act = net.activations.get(layer, lambda t: t)
        shares = [[act(v) / v.shape[1] for v in sample] for sample in values]
        assert close(found.values[layer], slow.aggregate(shares, "abs_element")), layer


def test_taylor_behind_an_activation() -> None:
    """Where a rectifier is on, a gradient passes it; where it is off, the value is 0."""
    net = NETS["shared"]
    model, data = net.model(), net.data()
    layers = ["stem", "block.conv1"]
    found = taylor(read_at="activated")(model, data, layers, progress=False)
    for layer in layers:
        assert close(found.values[layer], taylor()(model, data, layers, progress=False).values[layer])
    other = gradient(read_at="activated")(model, data, layers, progress=False)
    assert not close(other.values["stem"], gradient()(model, data, layers, progress=False).values["stem"], 1e-3)


def test_the_aggregates_are_those_of_lrp() -> None:
    assert AGGREGATES == IN_LRP


@pytest.mark.parametrize("name", ["shared", "time first", "interleaved", "kinds"])
@pytest.mark.parametrize(
    "criterion",
    [gradient(), taylor("abs_total"), taylor(on="weight"), taylor("cvpr2019"), logit_x_activation(), activation(),
     hessian(), ablation()],
    ids=lambda c: f"{c.name}:{c.settings.get('aggregate', '')}",
)  # fmt: skip
def test_batches_do_not_matter(name: str, criterion: Any) -> None:
    """Trap 9: nothing of an earlier batch is lost; nothing depends on how samples are dealt."""
    net = NETS[name]
    model, layers = net.model(), list(net.places)
    one = criterion(model, net.data((6,)), layers, progress=False)
    for sizes in ((3, 3), (1, 1, 1, 1, 1, 1), (1, 4, 1)):
        other = criterion(model, net.data(sizes), layers, progress=False)
        assert other.samples == one.samples == 6
        for layer in layers:
            assert close(other.values[layer], one.values[layer])
    first = criterion(model, net.data((3, 3))[:1], layers, progress=False)
    last = criterion(model, net.data((3, 3))[1:], layers, progress=False)
    assert not close(first.values[layers[0]], one.values[layers[0]], 1e-6)
    assert not close(last.values[layers[0]], one.values[layers[0]], 1e-6)


@pytest.mark.parametrize("name", ["shared", "tokens", "kinds"])
def test_weight_taylor(name: str) -> None:
    net = NETS[name]
    model, data = net.model(), net.data()
    layers = list(net.places)
    per_weight = taylor(on="weight")(model, data, layers, progress=False)
    per_sample = taylor("abs_per_sample", on="weight")(model, data, layers, progress=False)
    summed = taylor("cvpr2019")(model, data, layers, progress=False)
    squared = hessian()(model, data, layers, progress=False)
    for layer in layers:
        module: Any = model.get_submodule(layer)
        gradients = slow.weight_gradients(model, data, layer)
        w, n = module.weight.detach(), len(gradients)
        for c, entries in enumerate(slow.filter_entries(module)):
            total = [sum(float(g[i]) for g in gradients) / n for i in entries]
            assert per_weight.values[layer][c].item() == pytest.approx(
                sum(abs(float(w[i] * g[i])) for g in gradients for i in entries) / n
            )
            assert per_sample.values[layer][c].item() == pytest.approx(
                sum(abs(sum(float(w[i] * g[i]) for i in entries)) for g in gradients) / n
            )
            assert summed.values[layer][c].item() == pytest.approx(
                sum(abs(float(w[i]) * t) for i, t in zip(entries, total, strict=True))
            )
            assert squared.values[layer][c].item() == pytest.approx(
                sum(0.5 * float(w[i]) ** 2 * sum(float(g[i]) ** 2 for g in gradients) / n for i in entries)
            )


def test_weights_of_a_filter_and_what_it_gives_out() -> None:
    """Euler: without bias, sum of w dL/dw over the filter is sum of a dL/da at the convolution."""
    net = NETS["shared"]
    model, data = net.model(), net.data()
    layers = ["block.conv1", "block.conv2"]
    by_weight = taylor("signed", on="weight")(model, data, layers, progress=False)
    by_output = taylor("signed", read_at="conv")(model, data, layers, progress=False)
    for layer in layers:
        assert close(by_weight.values[layer], by_output.values[layer])


def test_taylor_counts_the_batch_norm() -> None:
    """Trap 7: behind a batch norm, a dL/da sums up to scale and shift times their gradients."""
    net = NETS["shared"]
    model, data = net.model(), net.data((6,))
    found = taylor("signed")(model, data, ["stem", "block.conv1"], progress=False)
    twin = copy.deepcopy(model)
    x, y = data[0]
    F.cross_entropy(twin(x), y, reduction="sum").backward()
    for layer, bn in (("stem", twin.bn0), ("block.conv1", twin.block.bn1)):
        assert close(found.values[layer], (bn.weight * bn.weight.grad + bn.bias * bn.bias.grad).detach() / 6)


def test_hessian_counts_all_samples() -> None:
    """Trap 8: the mean over three samples is the mean of the three, whatever the order."""
    net = NETS["shared"]
    model, layers = net.model(), ["stem", "bare"]
    data = net.data((1, 1, 1))
    alone = [hessian()(model, [item], layers, progress=False) for item in data]
    for order in ((0, 1, 2), (2, 1, 0)):
        whole = hessian()(model, [data[k] for k in order], layers, progress=False)
        for layer in layers:
            mean = torch.stack([s.values[layer] for s in alone]).mean(0)
            assert close(whole.values[layer], mean)
            assert not close(whole.values[layer], alone[order[-1]].values[layer], 1e-3)


# -- ablation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared", "tokens", "windows", "two inputs"])
def test_ablation_is_the_drop_itself(name: str) -> None:
    net = NETS[name]
    model, data = net.model(), net.data((2, 1))
    layers = [layer for layer in net.places if layer != "fc"]
    drop = ablation()(model, data, layers, progress=False)
    rise = ablation("loss")(model, data, layers, progress=False)
    for layer in layers:
        assert close(drop.values[layer], slow.ablated(model, data, net.places[layer], slow.logit, 1))
        assert close(rise.values[layer], slow.ablated(model, data, net.places[layer], slow.cross_entropy, -1))
    unlabelled = net.data((2, 1), labels=False)
    guessed = ablation()(model, unlabelled, layers, progress=False)
    for layer in layers:
        assert close(guessed.values[layer], slow.ablated(model, unlabelled, net.places[layer], slow.logit, 1))


def test_where_there_is_no_curvature_taylor_is_the_drop() -> None:
    """From the last hidden layer on, the logit is linear in what leaves the layer."""
    model = hard(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3))).double()
    data = [(torch.randn(4, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1]))]
    drop = ablation(read_at="activated")(model, data, ["0", "2"], progress=False)
    first = logit_x_activation("signed", "activated")(model, data, ["0", "2"], progress=False)
    assert close(drop.values["0"], first.values["0"])
    assert close(drop.values["2"], first.values["2"])


# -- objectives --------------------------------------------------------------------------


def test_a_loss_of_ones_own() -> None:
    net = NETS["tokens"]
    model, data = net.model(), net.data(labels=False)

    def loss(output: Tensor, y: Any) -> Tensor:
        assert y is None
        return output.square().sum(1)

    found = taylor(loss=loss)(model, data, ["up"], progress=False)
    values, gradients = slow.maps(model, data, "up", lambda out, y: out.square().sum())
    assert close(found.values["up"], slow.aggregate(slow.times(values, gradients), "abs_per_sample"))
    assert not taylor(loss=loss).needs_labels
    assert taylor().needs_labels


def test_the_class_is_the_largest_output_without_labels() -> None:
    net = NETS["shared"]
    model, data = net.model(), net.data(labels=False)
    found = logit_x_activation()(model, data, ["stem"], progress=False)
    values, gradients = slow.maps(model, data, "bn0", slow.logit)
    assert close(found.values["stem"], slow.aggregate(slow.times(values, gradients), "abs_per_sample"))


@pytest.mark.parametrize("criterion", [gradient(), taylor(), taylor(on="weight"), hessian(), ablation("loss")])
def test_missing_labels_are_asked_for(criterion: Any) -> None:
    net = NETS["tokens"]
    assert criterion.needs_labels
    with pytest.raises(errors.InputError, match=f"criterion '{criterion.name}' needs labels.*yield \\(x, y\\)"):
        criterion(net.model(), net.data(labels=False), ["up"], progress=False)


@pytest.mark.parametrize("criterion", [gradient(), hessian(), logit_x_activation(), ablation()])
def test_labels_that_are_no_classes(criterion: Any) -> None:
    net = NETS["tokens"]
    ((x, _),) = net.data((2,))
    with pytest.raises(errors.TargetError, match="out of range"):
        criterion(net.model(), [(x, torch.tensor([0, 3]))], ["up"], progress=False)


def test_outputs_that_are_no_classes() -> None:
    net = NETS["tokens"]
    model = Expression(lambda m, x: {"logits": m.body(x)}, body=net.model())
    with pytest.raises(errors.OutputError, match=r"one number per class.*loss="):
        taylor()(model, net.data(), ["body.up"], progress=False)
    named = taylor(loss=lambda out, y: F.cross_entropy(out["logits"], y, reduction="none"))
    found = named(model, net.data(), ["body.up"], progress=False)
    assert close(found.values["body.up"], taylor()(net.model(), net.data(), ["up"], progress=False).values["up"])


def test_losses_that_are_reduced() -> None:
    net = NETS["tokens"]
    with pytest.raises(errors.InputError, match="not one number per sample"):
        gradient(loss=F.cross_entropy)(net.model(), net.data(), ["up"], progress=False)
    with pytest.raises(errors.InputError, match="unknown loss"):
        gradient(loss="hinge")


# -- what is not reached -----------------------------------------------------------------


def test_layers_without_a_gradient_are_not_scored() -> None:
    """Parts under no_grad, layers that are never called, outputs that nobody uses."""

    def compute(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(m.fixed(x))
        m.aside(x)
        return m.fc(F.relu(m.hidden(x)))

    model = hard(
        Expression(
            compute, fixed=nn.Linear(4, 5), aside=nn.Linear(5, 2), hidden=nn.Linear(5, 6), idle=nn.Linear(2, 2),
            fc=nn.Linear(6, 3),
        )
    )  # fmt: skip
    data = [(torch.randn(3, 4), torch.tensor([0, 1, 2]))]
    layers = ["fixed", "aside", "hidden", "idle"]
    for criterion in (gradient(), taylor(), logit_x_activation()):
        found = criterion(model, data, layers, progress=False)
        assert set(found.values) == {"hidden"}
        assert "no gradient" in found.unscored["fixed"]
        assert "no gradient" in found.unscored["aside"]
        assert "never called" in found.unscored["idle"]
    for criterion in (hessian(), taylor(on="weight")):
        assert set(criterion(model, data, layers, progress=False).values) == {"hidden"}
    assert set(activation()(model, data, layers, progress=False).values) == {"fixed", "aside", "hidden"}


def test_computed_weights_have_no_gradient_of_their_own() -> None:
    model = hard(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3)))
    data = [(torch.randn(3, 4), torch.tensor([0, 1, 2]))]
    found = hessian()(model, data, ["0", "2"], progress=False)
    assert "computed" in found.unscored["0"]
    assert set(found.values) == {"2"}
    assert set(taylor()(model, data, ["0", "2"], progress=False).values) == {"0", "2"}


def test_samples_that_influence_each_other_are_refused() -> None:
    model = hard(
        nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(64, 3))
    )
    data = [(torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 0]))]
    with pytest.raises(errors.ModeError, match="influence each other"):
        taylor()(model, data, ["0"], progress=False)


def test_a_network_that_decides_by_its_input() -> None:
    """The batch norm is there for the first sample and not for the second."""
    model = hard(
        Expression(
            lambda m, x: m.fc((m.bn(m.conv(x)) if x.sum() > 0 else m.conv(x) * 2).mean((2, 3))),
            conv=conv(3, 4), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 3),
        )
    )  # fmt: skip
    data = [(torch.ones(1, 3, 4, 4), torch.tensor([0])), (-torch.ones(1, 3, 4, 4), torch.tensor([0]))]
    with pytest.raises(errors.StructureError, match="'conv' differs from sample to sample"):
        taylor()(model, data, ["conv"], progress=False)
    assert taylor(read_at="conv")(model, data, ["conv"], progress=False).values["conv"].shape == (4,)


@pytest.mark.parametrize("name", NETS)
def test_single_precision(name: str) -> None:
    net = NETS[name]
    model, data = net.model(), net.data()
    single = [(tuple(t.float() if t.is_floating_point() else t for t in x) if isinstance(x, tuple) else
               x.float() if x.is_floating_point() else x, y) for x, y in data]  # fmt: skip
    for criterion in (taylor(), activation(), hessian()):
        exact = criterion(model, data, list(net.places), progress=False)
        found = criterion(copy.deepcopy(model).float(), single, list(net.places), progress=False)
        for layer in net.places:
            assert found.values[layer].dtype == torch.float64
            assert close(found.values[layer], exact.values[layer], 1e-4)


def test_within_inference_mode() -> None:
    net = NETS["shared"]
    model = net.model()
    exact = taylor()(model, net.data(), ["stem", "block.conv2"], progress=False)
    with torch.inference_mode():
        found = taylor()(model, net.data(), ["stem", "block.conv2"], progress=False)
        weights = hessian()(model, net.data(), ["stem"], progress=False)
    assert all(torch.equal(found.values[name], t) for name, t in exact.values.items())
    assert torch.equal(weights.values["stem"], hessian()(model, net.data(), ["stem"], progress=False).values["stem"])


def test_nothing_is_warned_of() -> None:
    net = NETS["shared"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for criterion in (gradient(), activation(), hessian(), ablation()):
            criterion(net.model(), net.data((2,)), ["block.conv1"])
