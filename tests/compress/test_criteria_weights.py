"""Criteria of the weights, one entry at a time; importances of other packages."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from networks import BY_NAME, Expression, hard, structure_of
from oracles import criteria as slow
from scored import NETS, conv
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress.criteria import (
    batchnorm_scale,
    captum,
    criterion_of,
    fpgm,
    logit_x_activation,
    torch_pruning,
    tp_taylor,
    weight,
)
from compress.criteria._layers import filters
from compress.criteria._paths import follow
from compress.criteria.external import IMPORTANCES, REFUSED
from lrp import errors

LAYERS: list[nn.Module] = [
    nn.Linear(5, 4),
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(3, 5, (2, 3), bias=False),
    nn.Conv3d(2, 4, 2),
    nn.Conv2d(6, 9, 3, groups=3),
    nn.Conv2d(6, 6, 3, groups=6),
    nn.Conv2d(4, 8, 3, groups=4, padding_mode="circular", padding=1),
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose2d(6, 9, 2, groups=3),
    nn.ConvTranspose2d(4, 4, (2, 3), groups=4),
    nn.ConvTranspose3d(4, 2, 2, groups=2),
]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_filters_of_every_kind_of_layer(layer: Any) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    w = model[0].weight.detach()
    rows = [[w[i].item() for i in entries] for entries in slow.filter_entries(model[0])]
    l1, l2 = weight()(model, None, ["0"]), weight("l2")(model, None, ["0"])
    apart = fpgm()(model, None, ["0"])
    for c, row in enumerate(rows):
        assert l1.values["0"][c].item() == pytest.approx(sum(abs(v) for v in row))
        assert l2.values["0"][c].item() == pytest.approx(sum(v * v for v in row) ** 0.5)
        distances = [sum((a - b) ** 2 for a, b in zip(row, other, strict=True)) ** 0.5 for other in rows]
        assert apart.values["0"][c].item() == pytest.approx(sum(distances))
        assert sorted(filters(model[0])[c].tolist()) == sorted(row)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_filter_is_what_its_channel_depends_on(layer: Any) -> None:
    """Without the entries of one filter, that channel gives its bias, and the others what they gave."""
    model: Any = copy.deepcopy(layer).double()
    size = (5,) if isinstance(model, nn.Linear) else (model.in_channels, *(6 for _ in model.kernel_size))
    x = torch.randn(2, *size, dtype=torch.float64)
    before = model(x).detach()
    axis = 1
    for c, entries in enumerate(slow.filter_entries(model)):
        cut = copy.deepcopy(model)
        with torch.no_grad():
            for i in entries:
                cut.weight[i] = 0
        after = cut(x).detach()
        bias = 0 if model.bias is None else model.bias[c].item()
        assert torch.allclose(after.select(axis, c), torch.full_like(after.select(axis, c), bias))
        others = [k for k in range(after.shape[axis]) if k != c]
        assert torch.equal(
            after.index_select(axis, torch.tensor(others)), before.index_select(axis, torch.tensor(others))
        )


def test_folding_is_that_of_the_engine() -> None:
    """With batch norms folded by hand, the plain norm is the folded one."""
    net = NETS["shared"]
    model, layers = net.model(), list(net.places)
    (x, _), *_ = net.data()
    found = {n: weight(n, "bn")(model, None, layers, example_inputs=x) for n in ("l1", "l2")}
    for layer, place in net.places.items():
        module: Any = model.get_submodule(layer)
        w = module.weight.detach()
        if place != layer:
            bn: Any = model.get_submodule(place)
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            w = (w * scale.reshape(-1, *(1 for _ in w.shape[1:]))).detach()
        assert close(found["l1"].values[layer], w.abs().flatten(1).sum(1))
        assert close(found["l2"].values[layer], w.square().flatten(1).sum(1).sqrt())
    assert not found["l1"].unscored
    assert found["l1"].name == "weight:l1:bn"


def test_scales_of_batch_norms() -> None:
    net = NETS["shared"]
    model, layers = net.model(), list(net.places)
    (x, _), *_ = net.data()
    with torch.no_grad():
        model.block.bn1.weight[1] *= -1
    found = batchnorm_scale()(model, None, layers, example_inputs=x)
    assert set(found.values) == {"stem", "block.conv1", "block.conv2"}
    assert torch.equal(found.values["block.conv1"], model.block.bn1.weight.detach().abs())
    assert all("no batch norm reads its output alone" in why for why in found.unscored.values())
    assert set(found.unscored) == {"both", "bare", "fc"}


def test_batch_norms_without_scale_or_statistics() -> None:
    model = hard(
        nn.Sequential(
            conv(3, 4), nn.BatchNorm2d(4, affine=False), nn.ReLU(), conv(4, 5),
            nn.BatchNorm2d(5, track_running_stats=False), nn.ReLU(), conv(5, 6), nn.InstanceNorm2d(6), nn.Flatten(),
            nn.Linear(96, 3),
        )
    )  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    scale = batchnorm_scale()(model, None, ["0", "3", "6"], example_inputs=x)
    assert scale.unscored == {"0": "its batch norm has no scale", "6": "no batch norm reads its output alone"}
    assert torch.equal(scale.values["3"], model[4].weight.detach().abs().double())
    folded = weight(fold="bn")(model, None, ["0", "3", "6"], example_inputs=x)
    assert folded.unscored == {"3": "its batch norm has no fixed statistics to fold in"}
    scale_0 = (model[1].running_var.double() + 1e-5).rsqrt()
    assert close(folded.values["0"], model[0].weight.detach().double().abs().flatten(1).sum(1) * scale_0)
    assert torch.equal(folded.values["6"], weight()(model, None, ["6"]).values["6"])


def test_one_layer_with_two_batch_norms() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return m.fc((F.relu(m.bn1(m.conv(x))) + F.relu(m.bn2(m.conv(x)))).mean((2, 3)))

    model = hard(Expression(compute, conv=conv(3, 4), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4), fc=nn.Linear(4, 3)))
    x = torch.randn(2, 3, 4, 4)
    for criterion in (batchnorm_scale(), weight(fold="bn")):
        found = criterion(model, None, ["conv"], example_inputs=x)
        assert found.unscored == {"conv": "its uses have different batch norms"}


def test_computed_weights_have_a_norm() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3))
    assert close(weight("l2")(model, None, ["0"]).values["0"], model[0].weight.detach().double().norm(dim=1))


def test_alike_filters_are_at_no_distance() -> None:
    """Expanded squares would give rounding errors instead."""
    layer = nn.Linear(300, 3)
    with torch.no_grad():
        layer.weight[:] = 1e3 + layer.weight[0]
        layer.weight[2] += 1e-3
    found = fpgm()(nn.Sequential(layer), None, ["0"]).values["0"]
    apart = (layer.weight[2] - layer.weight[0]).double().norm().item()
    assert found.tolist() == pytest.approx([apart, apart, 2 * apart], rel=1e-9)


# -- what follows a layer ----------------------------------------------------------------


def test_what_alone_reads_a_layer() -> None:
    net = NETS["shared"]
    model = net.model()
    (x, _), *_ = net.data()
    names = list(net.places)
    paths = follow(model, {n: model.get_submodule(n) for n in names}, (x,))
    assert {call: path.steps for call, path in paths.items()} == {
        ("stem", 0): ("norm", "activation"),
        ("block.conv1", 0): ("norm", "activation"),
        ("block.conv1", 1): ("norm", "activation"),
        ("block.conv2", 0): ("norm",),
        ("block.conv2", 1): ("norm",),
        ("both", 0): (),
        ("bare", 0): ("activation",),
        ("fc", 0): (),
    }
    assert paths[("stem", 0)].changed == (False, True, False)
    assert paths[("bare", 0)].changed == (True, False)
    norms = {call: path.norm.module for call, path in paths.items() if path.norm is not None}
    assert norms[("block.conv2", 1)] == "block.bn2"
    assert norms[("stem", 0)] == "bn0"


class Normed(nn.BatchNorm2d):
    """A batch norm with its activation inside, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


@pytest.mark.parametrize(
    ("compute", "steps"),
    [
        (lambda m, x: F.relu(m.bn(m.conv(x))), ("norm", "activation")),
        (lambda m, x: m.normed(m.conv(x)), ("norm", "activation")),
        (lambda m, x: m.bn(m.drop(m.conv(x).contiguous())), ("norm",)),
        (lambda m, x: torch.batch_norm(m.conv(x), None, None, m.mean, m.var, False, 0, 1e-5, False), ("norm",)),
        (lambda m, x: m.bn(m.conv(x)).relu_(), ("norm", "activation")),
        (lambda m, x: F.prelu(m.bn(m.conv(x)), m.slope), ("norm", "activation")),
        (lambda m, x: m.bn(F.relu(m.conv(x))), ("activation",)),
        (lambda m, x: m.bn(-m.conv(x)), ()),
        (lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), ()),
        (lambda m, x: (lambda y: m.bn(y) * y.mean())(m.conv(x)), ()),
        (lambda m, x: (lambda y: torch.cat([m.bn(y), y], 1))(m.conv(x)), ()),
        (lambda m, x: (lambda y: m.bn(y) + m.bn(y))(m.conv(x)), ()),
        (lambda m, x: (lambda y: [y.shape, y.dim(), y.size(1), m.bn(y)][-1])(m.conv(x)), ("norm",)),
        (lambda m, x: (lambda y: (m.store.__setitem__(slice(None), y), m.bn(y))[1])(m.conv(x)), ()),
        (lambda m, x: (lambda y: F.relu(y) + torch.sigmoid(y))(m.bn(m.conv(x))), ("norm",)),
        (lambda m, x: m.bn(m.conv(x).detach()), ()),
    ],
    ids=range(16),
)
def test_readers_of_every_kind(compute: Any, steps: tuple[str, ...]) -> None:
    model = hard(
        Expression(
            compute, conv=conv(3, 4), bn=nn.BatchNorm2d(4), normed=Normed(4),
            drop=nn.Sequential(nn.Dropout(0.5), nn.Identity()),
        )
    )  # fmt: skip
    model.mean, model.var, model.slope = torch.zeros(4), torch.ones(4), torch.full((4,), 0.2)
    model.store = torch.zeros(1, 4, 4, 4)
    (path,) = follow(model, {"conv": model.conv}, (torch.randn(1, 3, 4, 4),)).values()
    assert path.steps == steps


# -- torch-pruning -----------------------------------------------------------------------


def test_importances_of_torch_pruning_are_theirs() -> None:
    """As their own pruner would get them: on their own graph, group by group."""
    import torch_pruning as tp

    case = BY_NAME["residual"]
    model, structure = case.model(), structure_of("residual")
    graph = tp.DependencyGraph().build_dependency(copy.deepcopy(model), case.inputs()[0])
    for name, options in (("GroupMagnitudeImportance", {"p": 1}), ("LAMPImportance", {}), ("FPGMImportance", {})):
        found = torch_pruning(name, **options)(
            model, None, structure.layers, structure=structure, example_inputs=case.inputs()
        )
        assert found.level == "group"
        assert set(found.values) == {g.name for g in structure.prunable}
        theirs = getattr(tp.pruner.importance, name)(**options)
        for g in structure.prunable:
            root = graph.model.get_submodule(g.name)
            group = graph.get_pruning_group(root, tp.prune_conv_out_channels, list(range(g.width)))
            assert close(found.values[g.name], theirs(group).double(), 1e-5), (name, g.name)


def test_their_taylor_leaves_out_batch_norms_and_ours_does_not() -> None:
    """Trap 7: another scale of a batch norm's gradient changes our scores and not theirs."""
    import torch_pruning as tp

    net = NETS["shared"]
    x, y = torch.randn(3, 3, 6, 6), torch.tensor([0, 1, 2])
    model = hard(net.build())
    structure = compress.find_groups(model, x)
    layers = structure.layers
    theirs = tp_taylor()(model, [(x, y)], layers, structure=structure, progress=False)
    assert theirs.name == "tp:GroupTaylorImportance"
    assert theirs.settings["by"].startswith("torch-pruning ")
    assert theirs.samples == 3
    twin = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(twin, x)
    scores = []
    for factor in (1, 1000):
        twin.zero_grad()
        F.cross_entropy(twin(x), y, reduction="sum").backward()
        for m in twin.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.grad *= factor
                m.bias.grad *= factor
        importance = tp.importance.GroupTaylorImportance()
        group = graph.get_pruning_group(twin.block.conv1, tp.prune_conv_out_channels, [0, 1, 2, 3])
        scores.append(importance(group).double())
    assert torch.equal(*scores)
    assert close(theirs.values["block.conv1"], scores[0], 1e-5)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_importances_by_name(name: str) -> None:
    case = BY_NAME["plain"]
    model, (x,) = case.model(), case.inputs()
    data = [(x[:1], torch.tensor([0])), (x[1:], torch.tensor([3]))]
    criterion = criterion_of(f"tp:{name}")
    assert criterion.needs_data == criterion.needs_labels == (name == "GroupTaylorImportance")
    one = criterion(model, data, ["0", "3"], progress=False)
    both = criterion(model, [(x, torch.tensor([0, 3]))], ["0", "3"], progress=False, structure=structure_of("plain"))
    assert {n: len(t) for n, t in one.values.items()} == {"0": 8, "3": 12}
    assert all(close(t, one.values[n], 1e-5) for n, t in both.values.items())
    assert set(criterion(model, data, ["3"], progress=False).values) == {"3"}
    if criterion.needs_labels:
        with pytest.raises(errors.InputError, match="needs labels"):
            criterion(model, [x], ["0"], progress=False)


@pytest.mark.parametrize("name", REFUSED)
def test_importances_that_are_wrong_are_refused(name: str) -> None:
    with pytest.raises(errors.InputError, match="can not be used here") as caught:
        criterion_of(f"tp:{name}")
    assert REFUSED[name] in str(caught.value)


def test_importances_that_do_not_exist() -> None:
    with pytest.raises(errors.InputError, match="did you mean 'GroupMagnitudeImportance'"):
        criterion_of("tp:GroupMagnitude")
    with pytest.raises(errors.InputError, match=r"does not take these options.*'q': 3"):
        criterion_of("tp:GroupMagnitudeImportance:q=3")
    with pytest.raises(errors.InputError, match="does not take these options"):
        torch_pruning("LAMPImportance", normalizer="sum")
    assert criterion_of("tp:GroupMagnitudeImportance:p=1").settings["options"] == {"p": 1}


def test_groups_that_an_importance_can_not_score() -> None:
    case = BY_NAME["depthwise"]
    found = torch_pruning("BNScaleImportance")(case.model(), None, ["0", "6"], example_inputs=case.inputs())
    assert set(found.values) == {"0"}
    assert found.unscored == {"6": "torch-pruning's BNScaleImportance gives it no score"}
    case = BY_NAME["grouped"]
    layers = structure_of("grouped").layers
    found = torch_pruning("FPGMImportance")(case.model(), None, layers, example_inputs=case.inputs())
    assert set(found.values) | set(found.unscored) == {g.name for g in structure_of("grouped").prunable}
    assert found.values
    assert all("FPGMImportance fails on it (RuntimeError: " in why for why in found.unscored.values())
    assert found.unscored


def test_layers_of_no_group() -> None:
    case = BY_NAME["plain"]
    with pytest.raises(errors.StructureError, match="no group"):
        torch_pruning("LAMPImportance")(case.model(), None, ["8"], example_inputs=case.inputs())


# -- captum ------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("captum") is not None, reason="captum is installed")
def test_captum_that_is_not_installed() -> None:
    with pytest.raises(errors.MissingDependencyError, match="pip install captum"):
        criterion_of("captum:LayerConductance")


@pytest.mark.peer
class TestCaptum:
    @pytest.fixture(autouse=True)
    def _captum(self) -> None:
        pytest.importorskip("captum", reason="captum is optional: pip install captum")

    @pytest.mark.parametrize("name", ["shared", "two inputs", "tokens", "windows", "time first"])
    def test_gradient_x_activation(self, name: str) -> None:
        """Theirs is read in front of the batch norm."""
        net = NETS[name]
        model, data = net.model(), net.data()
        layers = [n for n in net.places if "block" not in n]
        for aggregate in ("abs_per_sample", "abs_total"):
            found = captum("LayerGradientXActivation", aggregate)(model, data, layers, progress=False)
            ours = logit_x_activation(aggregate, "conv")(model, data, layers, progress=False)
            assert found.samples == 6
            assert all(close(t, ours.values[n], 1e-9) for n, t in found.values.items())

    @pytest.mark.parametrize(
        "name", ["LayerConductance", "LayerIntegratedGradients", "LayerGradCam", "InternalInfluence", "LayerActivation"]
    )
    def test_attributors_by_name(self, name: str) -> None:
        net = NETS["kinds"]
        model, data = net.model(), net.data()
        steps = ":n_steps=5" if name in ("LayerConductance", "LayerIntegratedGradients", "InternalInfluence") else ""
        found = criterion_of(f"captum:{name}{steps}")(model, data, ["0", "4"], progress=False)
        assert {n: len(t) for n, t in found.values.items()} == {"0": 8, "4": 6}
        assert all(bool((t > 0).any()) for t in found.values.values())
        assert found.name == f"captum:{name}"

    def test_grad_cam_per_channel(self) -> None:
        """Mean gradient of the channel times its activation, not the sum over channels that is drawn."""
        net = NETS["kinds"]
        model, data = net.model(), net.data()
        found = captum("LayerGradCam", "signed")(model, data, ["0"], progress=False)
        values, gradients = slow.maps(model, data, "0", slow.logit)
        parts = [[v * g.mean(1, keepdim=True)] for ((v,), (g,)) in zip(values, gradients, strict=True)]
        assert close(found.values["0"], slow.aggregate(parts, "signed"), 1e-9)
        whole = captum("LayerGradCam", attr_dim_summation=True)(model, data, ["0"], progress=False)
        assert "no number per channel" in whole.unscored["0"]

    def test_networks_that_captum_fails_on(self) -> None:
        net = NETS["windows"]
        with pytest.raises(errors.StructureError, match="captum's LayerConductance fails on layer 'conv'"):
            captum("LayerConductance")(net.model(), net.data(), ["conv"], progress=False)

    def test_names_that_do_not_exist(self) -> None:
        with pytest.raises(errors.InputError, match="did you mean 'LayerConductance'"):
            criterion_of("captum:LayerConductence")
        with pytest.raises(errors.InputError, match="no layer attributor 'Saliency'"):
            criterion_of("captum:Saliency")


def test_the_filters_of_a_group_are_apart() -> None:
    """Every weight belongs to one filter."""
    for layer in LAYERS:
        entries = slow.filter_entries(layer)
        flat = list(itertools.chain(*entries))
        assert len(flat) == len(set(flat)) == layer.weight.numel()  # type: ignore[operator, union-attr]  # untyped attribute
