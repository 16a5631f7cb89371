"""The proof of a structure: what it sees, what it costs, and networks with heads that run in training mode only."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import BY_NAME, NETWORKS, Expression, conv, hard, plain, structure_of
from torch import Tensor, nn
from torch.nn import functional as F

from compress._passes import Calls, Heads, find_heads
from compress._proof import prove_groups
from compress.costs import count
from compress.cutting import cut, mask
from compress.groups import Structure, find_groups
from compress.planning import plan_pruning
from compress.target import Target

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def removed_half(structure: Structure) -> dict[str, tuple[int, ...]]:
    return {g.name: tuple(sorted(j for unit in g.units[::2] for j in unit)) for g in structure.prunable}


# -- masks without copies ---------------------------------------------------
@pytest.mark.parametrize("name", [case.name for case in NETWORKS])
def test_hooks_mask_as_weights_do(name: str) -> None:
    case, structure = BY_NAME[name], structure_of(name)
    model, inputs = case.model().double(), case.inputs(torch.float64)
    removed = {n: c[: max(1, len(c) // 2)] for n, c in removed_half(structure).items()}
    with torch.no_grad():
        by_weights = flat(mask(model, structure, removed)(*inputs))
        by_hooks = flat(mask(model, structure, removed, share=True, hooked=True)(*inputs))
    for a, b in zip(by_weights, by_hooks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for v in (output.values() if isinstance(output, dict) else output) for t in flat(v)]


def test_hooks_take_no_memory() -> None:
    """A mask by hooks owns no weight of a convolution or linear layer."""
    model, structure = hard(plain()), structure_of("plain")
    hooked = mask(model, structure, removed_half(structure), share=True, hooked=True)
    for name in ("0", "3", "8"):
        assert hooked.get_submodule(name).weight is model.get_submodule(name).weight
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- what it sees -----------------------------------------------------------
def test_streams_that_are_taken_apart_are_seen() -> None:
    """Two halves of one group lose the same places where all lose the same places; so they do not."""
    case = BY_NAME["residual"]
    model, inputs, structure = case.model(), case.inputs(), structure_of("residual")
    whole = structure["stem"]
    second = ("conv2", "bn2")
    apart = [
        replace(whole, members=tuple(m for m in whole.members if m.layer not in second)),
        replace(whole, name="conv2", members=tuple(m for m in whole.members if m.layer in second)),
    ]
    wrong = Structure((*apart, *(g for g in structure.groups if g.name != "stem")))
    proved = prove_groups(model, inputs, wrong, Heads(), {})
    assert proved["stem"].protected
    assert proved["conv2"].protected
    assert prove_groups(model, inputs, structure, Heads(), {}) == structure


def test_a_weight_that_is_used_without_its_layer() -> None:
    """Hooks do not see it, so masked weights decide."""

    def compute(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x).mean((2, 3))
        return m.last(F.relu(m.fc(y) + F.linear(y.exp(), m.fc.weight)))  # type: ignore[no-any-return]

    net = hard(Expression(compute, conv=conv(3, 6), fc=nn.Linear(6, 6), last=nn.Linear(6, 3)))
    structure = find_groups(net, X)
    removed = {g.name: g.units[0] for g in structure.prunable}
    assert "conv" in removed, str(structure)
    torch.testing.assert_close(cut(net, structure, removed)(X), mask(net, structure, removed)(X))


# -- the bar ----------------------------------------------------------------
class Bar:
    """What is said to a bar."""

    made: list[Bar]

    def __init__(self, **options: Any) -> None:
        self.options, self.total, self.n, self.made = options, options["total"], 0, [*getattr(Bar, "made", []), self]
        Bar.made = self.made

    def update(self) -> None:
        self.n += 1
        assert self.n <= self.total

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed = True


@pytest.mark.parametrize(("progress", "disable"), [(True, None), (False, True)])
@pytest.mark.parametrize("name", ["plain", "padded shortcut"])
def test_rounds_are_shown(name: str, progress: bool, disable: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm", Bar)
    Bar.made = []
    case = BY_NAME[name]
    assert find_groups(case.model(), case.inputs(), progress=progress) == structure_of(name)
    (bar,) = Bar.made
    assert bar.options["disable"] is disable
    assert bar.n == bar.total > 3
    assert bar.closed


def test_nothing_is_shown_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    find_groups(hard(plain()), X)
    assert capfd.readouterr() == ("", "")


# -- heads that run in training mode only -----------------------------------
class Auxiliary(nn.Module):
    """A classifier in the middle of the network, in training mode alone."""

    def __init__(self, kernel: int = 3, dropout: bool = False, padding: int = 1) -> None:
        super().__init__()
        self.stem, self.middle, self.last, self.fc = conv(3, 8), conv(8, 12), conv(12, 10), nn.Linear(10, 4)
        self.aux = nn.Sequential(
            nn.Conv2d(12, 6, kernel, padding=padding), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(6, 4),
        )  # fmt: skip
        self.dropout = dropout

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.middle(F.relu(self.stem(x))))
        y = self.fc(F.relu(self.last(x)).mean((2, 3)))
        if not self.training:
            return y
        if self.dropout:
            x = F.dropout(x, 0.5, self.training)
        return {"out": y, "aux": self.aux(x)}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_auxiliary_heads_are_cut_where_they_read(dropout: bool, training: bool) -> None:
    model = hard(Auxiliary(dropout=dropout)).train(training)
    structure = find_groups(model, X)
    assert [g.name for g in structure.prunable] == ["stem", "middle", "last"], str(structure)
    assert ("aux.0", "in") in {(m.layer, m.axis) for m in structure["middle"].members}
    for layer in ("aux.0", "aux.5"):
        assert structure[layer].protected == "it belongs to 'aux', which runs in training mode only"
    assert all(m.training == training for m in model.modules())
    removed = {"stem": (0, 1), "middle": (1, 5, 11), "last": (3,)}
    small = cut(model, structure, removed)
    large = copy.deepcopy(small).train()(X)
    assert large["out"].shape == large["aux"].shape == (2, 4)
    assert small.aux[0].in_channels == 9
    if not dropout:  # in eval mode of its norms, the head gives what the masked one gives
        heads = find_heads(model, (X,))
        a, b = heads.start(small.double().eval())(X.double()), None
        b = heads.start(mask(model, structure, removed).double().eval())(X.double())
        torch.testing.assert_close(a["aux"], b["aux"], rtol=1e-10, atol=1e-10)


def test_plans_count_what_a_head_loses() -> None:
    model = hard(Auxiliary())
    plan = plan_pruning(model, X, criterion="weight", target=Target(channels=0.6), round_to=1, floor=1)
    small = plan.apply(model)
    assert plan.after.params == sum(p.numel() for p in small.parameters()) == count(small, X).params
    assert small.aux[0].in_channels == small.middle.out_channels


def test_a_head_that_fails_on_the_example_inputs_keeps_what_it_reads() -> None:
    """A kernel that is larger than the maps of a small example."""
    model = hard(Auxiliary(kernel=11, padding=0))
    structure = find_groups(model, X)
    assert [g.name for g in structure.prunable] == ["stem", "last"]
    assert structure["middle"].protected == (
        "its channels are read by 'aux', which runs in training mode only and fails on the example inputs "
        "(RuntimeError in 'aux.0'): give inputs on which it runs, or take it out of the model"
    )
    assert structure["aux.0"].protected == "it belongs to 'aux', which runs in training mode only"
    larger = find_groups(model, torch.randn(2, 3, 16, 16))
    assert [g.name for g in larger.prunable] == ["stem", "middle", "last"]


class Two(nn.Module):
    """Two heads, of which the first fails and hides the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = conv(3, 8), conv(8, 7), conv(7, 6), nn.Linear(6, 4)
        self.one, self.two = nn.Conv2d(8, 4, 11), nn.Conv2d(7, 4, 3)

    def forward(self, x: Tensor) -> Any:
        more = []
        x = F.relu(self.a(x))
        more += [self.one(x)] if self.training else []
        x = F.relu(self.b(x))
        more += [self.two(x)] if self.training else []
        y = self.fc(F.relu(self.c(x)).mean((2, 3)))
        return (y, *more) if more else y


def test_heads_behind_one_that_fails() -> None:
    model = hard(Two())
    heads = find_heads(model, (X,))
    assert heads == Heads(("one", "two"), ("",), "RuntimeError in 'one'")
    structure = find_groups(model, X)
    assert [g.name for g in structure.prunable] == ["c"]
    assert all("'one' or 'two'" in structure[name].protected for name in ("a", "b"))


@pytest.mark.parametrize("name", [case.name for case in NETWORKS])
def test_other_networks_have_no_heads(name: str) -> None:
    case = BY_NAME[name]
    assert find_heads(case.model(), case.inputs()) == Heads()


class Strict(nn.Module):
    """Wants targets in training mode; one layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = plain(), nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.training and y is None:
            raise ValueError("targets are missing")
        return self.body(x)  # type: ignore[no-any-return]


def test_layers_that_never_run_are_no_heads() -> None:
    model = hard(Strict())
    assert find_heads(model, (X,)) == Heads()
    structure = find_groups(model, X)
    assert [g.name for g in structure.prunable] == ["body.0", "body.3"]
    assert structure["unused"].protected == "the outputs do not depend on it in a way autograd sees"


def test_calls_say_where_a_pass_fails() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(5, 2)))
    with Calls(net) as calls, pytest.raises(RuntimeError):
        net(torch.randn(2, 3))
    assert calls.stack == ["", "1", "1.1"]
    assert calls.called == {"", "0", "1", "1.0", "1.1"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
