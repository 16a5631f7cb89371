"""Relevance as a criterion: identities, one sample at a time, and what gets none by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import BY_NAME, Expression, hard
from oracles import criteria as slow
from scored import NETS, conv
from torch import Tensor, nn
from torch.nn import functional as F

import lrp as engine
from compress.criteria import criterion_of, logit_x_activation, lrp
from compress.criteria._names import AGGREGATES, COMPOSITES, RULES, STARTS
from experiments.models import CifarResNet
from lrp import composites, errors, rules
from lrp.seeds import STARTS as IN_LRP


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12))


def weighted(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


# -- identities --------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("build", [BY_NAME["residual"].model, lambda: hard(CifarResNet(3))], ids=["small", "resnet20"])
def test_epsilon_is_activation_times_gradient_of_the_logit(build: Any, aggregate: str) -> None:
    """Read behind the batch norm, in every convolution, with the same channels on top."""
    model = build()
    size = 8 if len(list(model.modules())) < 20 else 16
    data = [(torch.randn(2, 3, size, size), torch.tensor([1, 3])), (torch.randn(1, 3, size, size), torch.tensor([0]))]
    layers = weighted(model)
    relevance = lrp("epsilon", "logit", aggregate)(model, data, layers, progress=False)
    gradient = logit_x_activation(aggregate)(model, data, layers, progress=False)
    assert list(relevance.values) == list(gradient.values) == layers
    for layer, own in relevance.values.items():
        other = gradient.values[layer]
        assert close(own, other, 1e-3), layer
        half = len(own) // 2
        gap = other.sort().values
        if gap[half] - gap[half - 1] > 1e-3 * other.abs().max():
            assert set(own.argsort()[half:].tolist()) == set(other.argsort()[half:].tolist()), layer


def test_gradient_x_input_is_the_same_pass() -> None:
    """Gradients fold nothing, so the engine reads them at the convolution itself."""
    net = NETS["shared"]
    model, data, layers = net.model(), net.data(), list(net.places)
    by_engine = lrp("gradient_x_input", "logit")(model, data, layers, progress=False)
    by_hooks = logit_x_activation(read_at="conv")(model, data, layers, progress=False)
    for layer in layers:
        assert close(by_engine.values[layer], by_hooks.values[layer]), layer


def test_zplus_on_a_plain_chain_is_not_negative_and_conserves() -> None:
    """Trap: signed sums stay the share of the output, 1 in every layer of the chain."""
    model = hard(
        nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 3))
    )
    data = [(torch.rand(5, 3, 6, 6), torch.tensor([0, 1, 2, 1, 0]))]
    found = lrp("zplus", aggregate="signed", ignore_bias=True)(
        model.double(), _double(data), ["0", "2"], progress=False
    )
    for own in found.values.values():
        assert bool((own >= 0).all())
        assert own.sum().item() == pytest.approx(1, abs=1e-4)
    same = lrp("zplus", ignore_bias=True)(model, _double(data), ["0", "2"], progress=False)
    assert all(close(same.values[n], t) for n, t in found.values.items())
    with_bias = lrp("zplus", aggregate="signed")(model, _double(data), ["0", "2"], progress=False)
    assert not close(with_bias.values["0"], found.values["0"], 1e-2)


def _double(data: list[Any]) -> list[Any]:
    return [(x.double(), y) for x, y in data]


def test_a_folded_batch_norm_has_the_relevance_of_its_convolution() -> None:
    net = NETS["shared"]
    model = net.model()
    rel = engine.attribute(model, torch.randn(2, 3, 6, 6, dtype=torch.float64), composite="epsilon", wrt="layers")
    for layer, norm in (("stem", "bn0"), ("block.conv1", "block.bn1"), ("block.conv2@1", "block.bn2@1")):
        assert torch.equal(rel.layers[layer], rel.layers[norm])


# -- one sample at a time ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["epsilon", "zplus", "epsilon_plus"])
def test_samples_and_uses_add_up(name: str) -> None:
    net = NETS["shared"]
    model, data, layers = net.model(), net.data(), list(net.places)
    composite: Any = rules.ZPlus() if name == "zplus" else name
    contributions: dict[str, slow.Maps] = {layer: [] for layer in layers}
    for (x,), y in slow.rows_of(data):
        rel = engine.attribute(model, x, y, composite=composite, start="margin", wrt="layers")
        for layer, found in contributions.items():
            calls = [r for call, r in rel.layers.items() if call in (layer, f"{layer}@1")]
            assert len(calls) == (2 if "block" in layer else 1)
            found.append([slow.channel_rows(r, 1) for r in calls])
    for aggregate in AGGREGATES:
        scores = lrp(name, "margin", aggregate)(model, data, layers, progress=False)
        assert scores.samples == 6
        for layer, own in scores.values.items():
            assert close(own, slow.aggregate(contributions[layer], aggregate)), (layer, aggregate)


@pytest.mark.parametrize("name", ["tokens", "two inputs", "kinds", "windows"])
def test_other_layers(name: str) -> None:
    net = NETS[name]
    model, data = net.model(), net.data()
    found = lrp("epsilon", "logit")(model, data, list(net.places), progress=False)
    other = logit_x_activation()(model, data, list(net.places), progress=False)
    linear = "tokens" not in name  # elsewhere the activation is no rectifier
    for layer in net.places:
        assert found.values[layer].shape == other.values[layer].shape
        if linear and layer in ("fc", "8", "conv", "4"):
            assert close(found.values[layer], other.values[layer], 1e-4), layer


def test_batches_do_not_matter() -> None:
    net = NETS["shared"]
    model, layers = net.model(), list(net.places)
    one = lrp()(model, net.data((6,)), layers, progress=False)
    for sizes in ((3, 3), (1, 1, 1, 1, 1, 1)):
        other = lrp()(model, net.data(sizes), layers, progress=False)
        assert all(close(other.values[n], t) for n, t in one.values.items())


def test_starts_and_targets() -> None:
    net = NETS["shared"]
    model, data = net.model(), net.data()
    outputs = torch.cat([model(x) for x, _ in data]).detach()
    y = torch.cat([y for _, y in data])
    guessed = [(x, model(x).argmax(1)) for x, _ in data]
    signed = {start: lrp("epsilon", start, "signed")(model, data, ["fc"], progress=False) for start in STARTS}
    logits = outputs.gather(1, y[:, None])[:, 0]
    assert signed["logit"].values["fc"].sum().item() == pytest.approx(logits.mean().item(), abs=1e-4)
    assert signed["one_hot"].values["fc"].sum().item() == pytest.approx(1, abs=1e-4)
    ratio = outputs.softmax(1).gather(1, y[:, None]).mean()
    assert signed["probability"].values["fc"].sum().item() == pytest.approx(ratio.item(), abs=1e-4)
    predicted = lrp("epsilon", target="predicted")(model, data, ["stem"], progress=False)
    unlabelled = lrp("epsilon")(model, [x for x, _ in data], ["stem"], progress=False)
    by_hand = lrp("epsilon")(model, guessed, ["stem"], progress=False)
    assert torch.equal(predicted.values["stem"], by_hand.values["stem"])
    assert torch.equal(unlabelled.values["stem"], by_hand.values["stem"])
    one = lrp("epsilon", engine.Seed(torch.tensor([1.0, 0, 0]).double()), "signed")(model, data, ["fc"], progress=False)
    assert close(one.values["fc"], torch.tensor([outputs[:, 0].mean().item(), 0, 0]).double(), 1e-4)


# -- what gets no relevance --------------------------------------------------------------


def test_gates_are_not_scored() -> None:
    """Trap 22: zero by rule is no score at all."""
    case = BY_NAME["squeeze and excite"]
    model = case.model()
    layers = weighted(model)
    data = [(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))]
    for name in ("epsilon", "zplus", "epsilon_plus"):
        found = lrp(name)(model, data, layers, progress=False)
        assert set(found.unscored) == {"squeeze", "expand"}
        assert set(found.values) == set(layers) - {"squeeze", "expand"}
        assert all("no relevance by rule" in why for why in found.unscored.values())
        assert not any(bool((t == 0).all()) for t in found.values.values())


def test_queries_and_keys_are_not_scored() -> None:
    model = BY_NAME["heads"].model()
    data = [(torch.randn(3, 5, 6), torch.tensor([0, 1, 2]))]
    found = lrp()(model, data, ["q", "k", "v", "up", "down"], progress=False)
    assert set(found.unscored) == {"q", "k"}
    assert set(found.values) == {"v", "up", "down"}
    only = lrp()(model, data, ["q", "k"], progress=False)
    assert not only.values
    assert set(only.unscored) == {"q", "k"}


def test_packed_projections_are_not_scored() -> None:
    """Some of its channels are queries and keys: a score for the others alone would call those irrelevant."""

    def compute(m: Any, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = m.qkv(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return m.fc(F.relu(m.proj(y.transpose(1, 2).reshape(n, t, 8))).mean(1))

    model = hard(Expression(compute, qkv=nn.Linear(6, 24), proj=nn.Linear(8, 6), fc=nn.Linear(6, 3)))
    data = [(torch.randn(3, 5, 6), torch.tensor([0, 1, 2]))]
    found = lrp()(model, data, ["qkv", "proj"], progress=False)
    assert set(found.values) == {"proj"}
    assert found.unscored["qkv"].startswith("no relevance by rule on its channels 0 to 15 (")


def test_layers_that_are_never_called() -> None:
    model = hard(Expression(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3), c=nn.Linear(2, 2)))
    found = lrp()(model, [torch.randn(3, 4)], ["a", "c"], progress=False)
    assert set(found.values) == {"a"}
    assert set(found.unscored) == {"c"}


def test_two_names_of_one_module() -> None:
    layer = nn.Linear(4, 4)
    model = hard(
        Expression(lambda m, x: m.fc(F.relu(m.b(F.relu(m.a(x))))), a=layer, b=layer, fc=nn.Linear(4, 3))
    )  # fmt: skip
    data = [(torch.randn(3, 4), torch.tensor([0, 1, 2]))]
    relevance = lrp("epsilon", "logit")(model, data, ["a", "b"], progress=False)
    gradient = logit_x_activation()(model, data, ["a", "b"], progress=False)
    for name in ("a", "b"):
        assert torch.equal(relevance.values[name], relevance.values["a"])
        assert close(gradient.values[name], relevance.values["a"], 1e-3)


def test_networks_that_can_not_be_exported() -> None:
    model = hard(Expression(lambda m, x: m.a(x) if x.sum() > 0 else -m.a(x), a=nn.Linear(4, 3)))
    with pytest.raises(errors.ExportError):
        lrp()(model, [torch.randn(3, 4)], ["a"], progress=False)


# -- settings and names ------------------------------------------------------------------


def test_names_are_those_of_the_engine() -> None:
    named = {n for n in composites.__all__ if n in composites._NAMED}
    assert {*COMPOSITES, "epsilon_gamma_box"} == named  # the box has no bounds by name
    assert STARTS == IN_LRP
    assert {getattr(rules, kind)().name for kind in RULES.values()} == set(RULES.values())


@pytest.mark.parametrize("name", [*COMPOSITES, *RULES])
def test_every_composite_by_name(name: str) -> None:
    model = hard(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)))
    data = [(torch.rand(2, 3, 4, 4), torch.tensor([0, 2]))]
    found = criterion_of(f"lrp:{name}")(model, data, ["0", "2"], progress=False)
    assert found.name == f"lrp:{name}"
    assert found.settings["composite"] == name
    assert all(bool((t >= 0).all()) and bool((t > 0).any()) for t in found.values.values())
    json.dumps(found.settings)


def test_objects_instead_of_names() -> None:
    net = NETS["shared"]
    model, data = net.model(), net.data()
    by_name = lrp("gamma")(model, data, ["stem", "bare"], progress=False)
    for given in (rules.Gamma(), engine.Composite([("*", rules.Gamma())], name="mine")):
        for criterion in (lrp(given), criterion_of(given)):
            found = criterion(model, data, ["stem", "bare"], progress=False)
            assert all(torch.equal(found.values[n], t) for n, t in by_name.values.items())
            assert json.loads(json.dumps(found.settings))["rules"]
    assert lrp(rules.Gamma()).settings != lrp(rules.Gamma(0.5)).settings
    assert lrp(engine.composites.epsilon()).settings == lrp(engine.composites.epsilon()).settings


def test_words_after_colons() -> None:
    assert criterion_of("lrp").settings == {
        "composite": "epsilon", "start": "one_hot", "aggregate": "abs_per_sample", "target": None,
    }  # fmt: skip
    found = criterion_of("lrp:zplus:ignore_bias:signed:logit:predicted")
    assert found.settings == {
        "composite": "zplus", "ignore_bias": True, "start": "logit", "aggregate": "signed", "target": "predicted",
    }  # fmt: skip
    assert found.name == "lrp:zplus"
    assert criterion_of("lrp:margin:target=2").settings["target"] == 2
    assert not found.needs_labels
    assert found.needs_data


def test_what_is_misspelt() -> None:
    with pytest.raises(errors.InputError, match="did you mean 'zplus'"):
        criterion_of("lrp:zpluss")
    with pytest.raises(errors.InputError, match="did you mean 'signed'"):
        criterion_of("lrp:zplus:singed")
    with pytest.raises(errors.InputError, match="did you mean 'epsilon_plus'"):
        criterion_of("lrp:epsilon_plu")
    with pytest.raises(errors.InputError, match="epsilon_gamma_box"):
        lrp("epsilon_gamma_box")
    with pytest.raises(errors.InputError, match="aggregate"):
        lrp(aggregate="mean")
    with pytest.raises(errors.TargetError, match="start"):
        lrp(start="two_hot")
    with pytest.raises(errors.InputError, match="ignore_bias"):
        lrp(rules.ZPlus(), ignore_bias=True)
    with pytest.raises(errors.InputError, match="gradient"):
        lrp("gradient", ignore_bias=True)
    with pytest.raises(errors.CompositeError):
        lrp(3)  # type: ignore[arg-type]


def test_a_pass_goes_on(tmp_path: Path) -> None:
    net = NETS["shared"]
    model, data = net.model(), net.data()
    path = tmp_path / "state"
    whole = lrp()(model, data, ["stem"], progress=False)
    lrp(resume=path)(model, data[:2], ["stem"], progress=False)
    assert path.exists()
    found = lrp(resume=path)(model, data, ["stem"], progress=False)
    assert torch.equal(found.values["stem"], whole.values["stem"])
    other = net.model()
    with torch.no_grad():
        other.fc.weight.mul_(2)
    with pytest.raises(errors.MismatchError):
        lrp(resume=path)(other, data, ["stem"], progress=False)
