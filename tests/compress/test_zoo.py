"""Whole architectures: planned, cut, compared with masking by hooks, counted, kept and exported."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import hard
from torch import Tensor, nn

from compress.costs import CostTable, count
from compress.groups import Structure, find_groups
from compress.plan import PruningPlan
from compress.planning import plan_pruning, score
from compress.target import Target
from experiments.models import CifarResNet, torchvision_models

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Network:
    """How to build it, how much of it can be pruned, and what has to stay."""

    name: str
    build: Callable[[], nn.Module]
    size: int = 64
    stays: Mapping[str, str] = field(default_factory=dict)  # layer to part of the reason
    share: float = 0.7  # of all filters, at least, that can be pruned
    lrp: bool = True


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision_models(), name)(**options)


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchvision_models()
        model: nn.Module = pytest.importorskip(
            "timm", reason="needs timm's model definitions: make peers"
        ).create_model(name, **options)
        return model

    return build


SMALL_VIT = {
    "image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64,
    "num_classes": 10,
}  # fmt: skip


def mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in ((3 * 16 * 16, 64), (64, 48), (48, 32)):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(32, 10))


ZOO = [
    Network("mlp", mlp, 16, share=0.9),
    Network("cifar-resnet20", lambda: CifarResNet(3), 32, {"conv1": "mask", "linear": "output"}, share=0.4),
    Network("vgg11_bn", vision("vgg11_bn", num_classes=10), 32, {"classifier.6": "output"}),
    Network("resnet18", vision("resnet18"), stays={"fc": "output"}),
    Network("resnet50", vision("resnet50"), stays={"fc": "output"}),
    Network("resnext50_32x4d", vision("resnext50_32x4d"), stays={"fc": "output"}, lrp=False),
    Network("squeezenet1_1", vision("squeezenet1_1"), stays={"classifier.1": "output"}),
    Network("mobilenet_v2", vision("mobilenet_v2"), stays={"classifier.1": "output"}),
    Network("mobilenet_v3_small", vision("mobilenet_v3_small"), stays={"classifier.3": "output"}),
    Network("efficientnet_b0", vision("efficientnet_b0"), stays={"classifier.1": "output"}),
    Network("mnasnet1_0", vision("mnasnet1_0"), lrp=False),
    Network("regnet_y_400mf", vision("regnet_y_400mf"), lrp=False),
    Network("densenet121", vision("densenet121"), stays={"classifier": "output"}),
    Network(
        "convnext_tiny",
        vision("convnext_tiny"),
        stays={"features.0.0": "LayerNorm", "classifier.2": "output"},
        share=0.5,
    ),
    Network(
        "vit",
        vision("VisionTransformer", **SMALL_VIT),
        32,
        {"conv_proj": "LayerNorm", "heads.head": "output"},
        share=0.3,
    ),
    Network(
        "timm vit", timm("vit_tiny_patch16_224", img_size=64, depth=3), stays={"blocks.0.attn.qkv": "mask"}, share=0.2
    ),
    Network("timm convnext", timm("convnext_atto"), stays={"stem.0": "LayerNorm"}, share=0.5),
    Network("ghostnet", timm("ghostnet_100"), lrp=False),
    Network("hrnet", timm("hrnet_w18_small"), lrp=False),
    Network("mixer", timm("mixer_s32_224", img_size=64), stays={"stem.proj": "LayerNorm"}, lrp=False),
    Network("eca", timm("eca_resnet33ts"), share=0.3, lrp=False),
]


@dataclass(frozen=True)
class Found:
    """A network of the zoo with hard weights, and what was found out about it once."""

    net: Network
    model: nn.Module
    x: Tensor
    structure: Structure
    table: CostTable

    def plan(self, share: float) -> PruningPlan:
        return plan_pruning(
            self.model, self.x, criterion="weight", target=Target(channels=share), structure=self.structure,
            table=self.table, normalisation="mean", round_to=1, progress=False,
        )  # fmt: skip


@pytest.fixture(scope="module", params=ZOO, ids=lambda net: net.name)
def case(request: pytest.FixtureRequest) -> Found:
    """Module-wide, so that all tests of one network follow each other and its memory is given back."""
    net: Network = request.param
    torch.manual_seed(0)
    model = hard(net.build())
    x = torch.randn(2, 3, net.size, net.size, generator=torch.Generator().manual_seed(1))
    structure = find_groups(model, x)
    return Found(net, model, x, structure, CostTable.of(model, x, structure))


def masked_by_hooks(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Whoever reads a removed channel reads zeros; no weight is touched."""
    out = copy.deepcopy(model)
    for name, channels in plan.removed.items():
        for m in plan.structure[name].members:
            if m.axis == "in" or m.type == "MultiheadAttention":
                out.get_submodule(m.layer).register_forward_pre_hook(_reading(m.of(channels)))
    return out


def _reading(entries: Sequence[int]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        x = inputs[0]
        dim = -1 if isinstance(module, nn.Linear) or x.dim() < 3 else 1
        return (x.index_fill(dim, torch.tensor(entries), 0.0), *inputs[1:])

    return hook


def test_what_can_be_pruned(case: Found) -> None:
    net, model, structure, table = case.net, case.model, case.structure, case.table
    for layer, why in net.stays.items():
        held = [g for g in structure.groups if layer in g.producers]
        assert held, f"'{layer}' is in no group"
        assert why in held[0].protected
    weighted = {
        n
        for n, m in model.named_modules()
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) and not n.endswith("self_attention.out_proj")
    }
    assert weighted <= {layer for g in structure.groups for layer in g.producers}
    widths = table.widths({})
    free = sum(widths[layer][0] for layer in structure.layers)
    assert free >= net.share * table.costs({}).filters


@pytest.mark.parametrize("removed", [0.3, 0.6])
def test_cut_is_masked_is_counted(case: Found, removed: float) -> None:
    model, x = case.model, case.x
    plan = case.plan(1 - removed)
    asked = (1 - removed) * plan.before.channels + 1e-6
    assert plan.after.channels == int(asked) or (_tied(plan) and plan.after.channels < asked)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        full = double(x.double())
        small, masked = plan.apply(double)(x.double()), plan.mask(double)(x.double())
        hooked = masked_by_hooks(double, plan)(x.double())
    scale = float(masked.abs().max())
    assert float((small - masked).abs().max()) <= 1e-10 * scale
    assert float((small - hooked).abs().max()) <= 1e-10 * scale
    assert float((small - full).abs().max()) >= 1e-4 * scale, "the removed channels were not silent"
    single = plan.apply(model)
    with torch.no_grad():
        assert float((single(x).double() - masked).abs().max()) <= 1e-3 * scale
    expected = count(single, x)
    assert (plan.after.macs, plan.after.params, plan.after.bytes, plan.after.filters) == (
        expected.macs, expected.params, expected.bytes, expected.filters,
    )  # fmt: skip
    assert plan.after.params == sum(p.numel() for p in single.parameters())


def _tied(plan: PruningPlan) -> bool:
    return any(len(unit) > 1 for g in plan.structure.prunable for unit in g.units)


def test_by_relevance(case: Found) -> None:
    if not case.net.lrp:
        pytest.skip("its relatives are tested")
    model, x, structure, table = case.model, case.x, case.structure, case.table
    data = [(x, torch.tensor([0, 1]))]
    scores = score(model, x, data, criterion="lrp", structure=structure, progress=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    options = {"scores": scores, "structure": structure, "table": table, "round_to": 1}
    plan = plan_pruning(model, x, data, target=Target(channels=0.7), **options)
    assert plan.after.channels <= 0.7 * plan.before.channels + 1e-6
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        small, masked = plan.apply(double)(x.double()), plan.mask(double)(x.double())
    assert float((small - masked).abs().max()) <= 1e-10 * float(masked.abs().max())
    for g in structure.prunable:
        if g.name in plan.unscored:
            assert g.name not in plan.removed


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_targets_with_default_rounding(case: Found, kind: str) -> None:
    model, x, structure, table = case.model, case.x, case.structure, case.table
    full = getattr(table.costs({}), kind)
    least = getattr(
        table.costs({g.name: [j for u in g.units[: len(g.units) * 3 // 4] for j in u] for g in structure.prunable}),
        kind,
    )
    share = max(0.6, 0.5 + least / full / 2)
    plan = plan_pruning(
        model, x, None, criterion="weight", target=Target(**{kind: share}), structure=structure, table=table
    )
    assert getattr(plan.after, kind) <= share * full + 1e-6
    assert getattr(count(plan.apply(model), x), kind) == getattr(plan.after, kind)


def test_plans_are_kept_and_used_on_a_fresh_model(case: Found, tmp_path: Path) -> None:
    model, x = case.model, case.x
    plan = case.plan(0.7)
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    fresh = again.apply(case.net.build()).eval()
    fresh.load_state_dict(plan.apply(model).state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), plan.apply(model)(x))


def test_pruned_networks_train(case: Found) -> None:
    model, x = case.model, case.x
    small = case.plan(0.7).apply(model).train()
    large = torch.cat([x, x.flip(0), x + 1])
    out = small(large)
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in small.parameters())


def test_saved_and_loaded(case: Found, tmp_path: Path) -> None:
    storage = pytest.importorskip("compress.storage")
    model, x = case.model, case.x
    small = case.plan(0.7).apply(model)
    storage.save(small, tmp_path / "small.safetensors")
    again = storage.load(tmp_path / "small.safetensors", case.net.build).eval()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


@pytest.mark.filterwarnings("ignore")
def test_exported(case: Found, tmp_path: Path) -> None:
    exporting = pytest.importorskip("compress.exporting")
    ort = pytest.importorskip("onnxruntime")
    model, x = case.model, case.x
    small = case.plan(0.7).apply(model)
    path = tmp_path / "small.onnx"
    exporting.export_onnx(small, path, x)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = small(x)
    assert float((torch.from_numpy(got) - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


# -- what can not be followed is refused, in bounded time and memory ---------
_LIMITED = """
import resource, sys, torch
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from experiments.models import torchvision_models
from compress.groups import find_groups
from lrp.errors import StructureError
models = torchvision_models()
torch.manual_seed(0)
if sys.argv[1] == "swin":
    net = models.SwinTransformer([2, 2], 4, [1, 1], [2, 2], [2, 2], num_classes=3)
else:
    net = models.shufflenet_v2_x0_5()
try:
    structure = find_groups(net, torch.randn(1, 3, 16, 16) if sys.argv[1] == "swin" else torch.randn(1, 3, 64, 64))
except StructureError as error:
    print("refused:", error)
else:
    print("found:", len(structure.groups), len(structure.prunable))
"""


@pytest.mark.parametrize("name", ["swin", "shuffle"])
def test_graphs_that_run_away_are_stopped(name: str) -> None:
    """Index maps of shifted windows multiply without end; those of a shuffle divide by zero."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LIMITED, name], capture_output=True, text=True, timeout=120,
        check=False, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith(("refused:", "found:"))


def test_heads_that_only_train_are_not_broken() -> None:
    """GoogLeNet's auxiliary classifiers run in training mode alone, where no trace in eval mode sees them."""
    torch.manual_seed(0)
    model = hard(torchvision_models().googlenet(init_weights=False, aux_logits=True, num_classes=5))
    x = torch.randn(2, 3, 64, 64)
    structure = find_groups(model, x)
    plan = plan_pruning(
        model, x, None, criterion="weight", target=Target(channels=0.7), structure=structure, round_to=1
    )
    small = plan.apply(model).train()
    out = small(x)
    assert out.logits.shape == out.aux_logits1.shape == (2, 5)
