"""What the graph gets wrong, and what it can say about it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from networks import BY_NAME, NETWORKS, conv, hard, plain, shuffle, structure_of
from torch import Tensor, nn
from torch.nn import functional as F

from compress._dependencies import version
from compress.cutting import cut, mask
from compress.groups import find_groups
from experiments.models import CifarResNet

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# -- shuffles ---------------------------------------------------------------
class ShuffleUnit(nn.Module):
    """Half of the channels pass, half go through a branch; then both are shuffled (ShuffleNetV2)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv(half, inner, 1), nn.BatchNorm2d(inner), nn.ReLU(), conv(inner, inner, groups=inner),
            conv(inner, half, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return shuffle(torch.cat([kept, self.branch(changed)], 1), 2)


class First(nn.Module):
    """The unit that begins a stage: two branches, no channel passes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(6, 8, 1), conv(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], 1), 2)


def shuffling() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.ReLU(), First(), ShuffleUnit(16, 10), ShuffleUnit(16, 12), conv(16, 14), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 4),
    )  # fmt: skip


def test_torch_pruning_divides_by_zero_at_shuffles() -> None:
    """So the workaround is known to be needed; other versions may do better."""
    import torch_pruning as tp

    if version() == "1.6.1":
        with pytest.raises(ZeroDivisionError):
            tp.DependencyGraph().build_dependency(hard(shuffling()), X, unwrapped_parameters=[])


def test_branches_of_shuffling_units_can_be_cut() -> None:
    model = hard(shuffling())
    structure = find_groups(model, X)
    assert [g.name for g in structure.prunable] == ["0", "3.branch.0", "4.branch.0", "5"], str(structure)
    for name in ("2.left", "2.right", "3.branch.4", "4.branch.4"):
        held = next(g for g in structure.groups if name in g.producers)
        assert re.fullmatch(r"its channels are regrouped in '\d', which the graph does not follow", held.protected)
    double = model.double()
    removed = {"0": (1, 4), "3.branch.0": (0, 2, 9), "4.branch.0": (5,), "5": (13,)}
    small = cut(double, structure, removed)
    x = X.double()
    torch.testing.assert_close(small(x), mask(double, structure, removed)(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(small(x), double(x), atol=1e-3)


def test_splits_of_unknown_parts_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch-pruning infers the width of one part only, its list of offsets is too short."""
    from torch_pruning.dependency import index_mapping

    def short(self: Any, indices: Any) -> Any:
        return [][0]

    monkeypatch.setattr(index_mapping._SplitIndexMapping, "__call__", short)
    case = BY_NAME["gated"]
    structure = find_groups(case.model(), case.inputs())
    assert structure["conv"].protected == "the graph loses its channels"
    assert not structure["out"].protected


def test_importances_of_the_graph_are_found_beside_shuffles() -> None:
    import torch_pruning as tp

    from compress._dependencies import importance_scores

    model = hard(shuffling())
    structure = find_groups(model, X)
    found = importance_scores(model, X, tp.importance.GroupMagnitudeImportance(), structure, None)
    assert {n: s.shape for n, s in found.items()} == {g.name: (g.width,) for g in structure.prunable}


# -- reasons ----------------------------------------------------------------
@pytest.mark.parametrize("name", [case.name for case in NETWORKS])
def test_reasons_are_short_and_no_errors_of_torch(name: str) -> None:
    for g in structure_of(name).groups:
        assert len(g.protected) <= 140
        assert not re.search(r"Error|tensor|size|\[\d|expected", g.protected), g.protected


def test_a_padded_shortcut_is_named() -> None:
    structure = find_groups(hard(CifarResNet(1)), torch.randn(2, 3, 16, 16))
    assert structure["conv1"].protected == (
        "its channels are padded with zeros in 'layer2.0.shortcut': removing them is not the same as masking them"
    )


class Between(nn.Module):
    """An operation between two convolutions, in a module of its own."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, :8], "padded with zeros"),
        (lambda x: x.flip(-3), "reversed"),
        (lambda x: x.roll(2, 1), "rolled"),
        (lambda x: x.index_select(1, torch.tensor([3, 0, 1, 2, 4, 5, 6, 7])), "picked by number"),
        (lambda x: x[:, [3, 0, 1, 2, 4, 5, 6, 7]], "picked by number"),
        (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2).flip(1), 2), "shuffled"),
        (lambda x: F.channel_shuffle(x, 2), "shuffled"),
        (lambda x: shuffle(x, 4), "regrouped"),
    ],
)
def test_what_moves_channels_is_named_with_its_module(change: Any, how: str) -> None:
    net = nn.Sequential(
        conv(3, 8), Between(change), conv(8, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    structure = find_groups(hard(net), X)
    assert structure["0"].protected.startswith(f"its channels are {how} in '1'"), structure["0"].protected
    assert [g.name for g in structure.prunable] == ["2"]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: F.pad(x, (1, 1, 1, 1)), lambda x: x.flip(2, 3), lambda x: x.roll(1, -1), lambda x: x[:, :, 1:],
        lambda x: x[:, :, [0, 2]],
    ],
)  # fmt: skip
def test_what_moves_pixels_moves_no_channel(change: Any) -> None:
    net = nn.Sequential(
        conv(3, 8), Between(change), conv(8, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    assert [g.name for g in find_groups(hard(net), X).prunable] == ["0", "2"]


def test_shapes_that_do_not_fit_say_where() -> None:
    net = nn.Sequential(nn.Linear(5, 32), Between(lambda x: x.view(len(x), 8, 2, 2)), conv(8, 3))
    reason = find_groups(hard(net), torch.randn(2, 5))["0"].protected
    assert reason == "the shapes in '1' do not fit without some of its channels: they could only be masked"


def test_the_model_keeps_its_parameters_and_hooks() -> None:
    """The graph is traced on a copy that holds the values of the model's own tensors."""
    model = hard(plain())
    before = {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    find_groups(model, X)
    for n, p in model.named_parameters():
        assert (id(p), p.requires_grad, p.grad) == (before[n][0], before[n][2], None)
        assert torch.equal(p, before[n][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = hard(plain())
    assert find_groups(model, X) == structure_of("plain")
