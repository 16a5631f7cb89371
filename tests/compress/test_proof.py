"""The proof of a structure: what it sees, what it costs, and networks with heads that run in training mode only."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BY_NAME, NETWORKS, Expression, conv, hard, plain, structure_of
from torch import Tensor, nn
from torch.nn import functional as F

from compress._passes import Calls, Heads, find_heads
from compress._proof import _rounds, prove_groups, prove_removal
from compress.costs import count
from compress.cutting import cut, mask
from compress.groups import Group, Member, Structure, find_groups
from compress.planning import plan_pruning
from compress.target import Target
from lrp import errors

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


def detached(pairs: int, width: int, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Pairs of layers added behind autograd's back, each of them read elsewhere too."""

    def compute(m: Any, x: Tensor) -> Tensor:
        out = []
        for k in range(pairs):
            a, b = (F.relu(m.get_submodule(f"{name}{k}")(x)) for name in "ab")
            for y, name in ((a + change(b.detach()), "c"), (b, "d")):
                out.append(m.get_submodule(f"{name}{k}")(y).mean((2, 3)))
        return torch.cat(out, 1)

    layers = {f"{n}{k}": nn.Conv2d(3, width, 1) for k in range(pairs) for n in "ab"}
    readers = {f"{n}{k}": nn.Conv2d(width, 2, 1) for k in range(pairs) for n in "cd"}
    return hard(Expression(compute, **layers, **readers))


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: x.flip(1), lambda x: x.roll(x.shape[1] // 2, 1)], ids=["as it is", "flip", "roll"]
)
@pytest.mark.parametrize(("width", "pairs"), [(2, 3), (3, 3), (8, 4), (13, 2)])
def test_groups_that_meet_unseen_by_autograd(width: int, pairs: int, change: Callable[[Tensor], Tensor]) -> None:
    """No two groups of one width lose equal numbers of channels in all rounds, so none meet unseen."""
    model = detached(pairs, width, change)
    assert len(find_groups(model, X, prove=False).prunable) == 2 * pairs
    structure = find_groups(model, X)
    assert not structure.prunable, str(structure)


@st.composite
def some_groups(draw: Any) -> list[Group]:
    out = []
    for k in range(draw(st.integers(1, 12))):
        pieces, size = draw(st.sampled_from([2, 2, 3, 4, 5, 8, 9, 16])), draw(st.sampled_from([1, 1, 2]))
        width = pieces * size
        units = tuple(tuple(range(i, width, pieces)) for i in range(pieces))
        parts = draw(st.lists(st.sets(st.integers(0, width - 1), min_size=1), max_size=3))
        whole = tuple((j,) for j in range(width))
        members = [Member(f"{k}", "out", "Linear", whole)]
        for i, part in enumerate(parts):
            place = {j: n for n, j in enumerate(sorted(part))}
            index = tuple((place[j],) if j in part else () for j in range(width))
            members.append(Member(f"{k}.{i}", "out", "Linear", index))
        out.append(Group(f"{k}", width, units, tuple(members)))
    return out


@settings(max_examples=150, deadline=None)
@given(some_groups())
def test_what_is_removed_in_the_rounds(groups: list[Group]) -> None:
    rounds = _rounds(groups)
    seen = set()
    for g in groups:
        for gone in (r[g.name] for r in rounds):
            assert len(gone) < g.width
            assert not g.emptied(gone)
            assert all(set(u) <= set(gone) or not set(u) & set(gone) for u in g.units)
        fixed = {u for u in g.units if any(p <= set(u) for p in g.parts)}
        codes = {u: tuple(u[0] in r[g.name] for r in rounds) for u in g.units}
        assert all(any(codes[u]) != (u in fixed) for u in g.units), "what can go goes once"
        for u, v in itertools.combinations(g.units, 2):
            assert codes[u] != codes[v] or {u, v} <= fixed, "any two are apart once"
        sizes = tuple(len(r[g.name]) for r in rounds)
        assert not any(sizes) or (g.width, sizes) not in seen
        seen.add((g.width, sizes))
    assert len(rounds) <= 12


def test_rounds_are_as_many_as_digits_and_one() -> None:
    own = tuple((j,) for j in range(1024))
    groups = [Group(f"{k}", 1024, own, (Member(f"{k}", "out", "Linear", own),)) for k in range(20)]
    assert len(_rounds(groups)) == 11


def test_what_a_network_gives_beside_its_layers() -> None:
    """All layers agree; the mean over channels, which autograd does not see, does not."""

    def compute(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.stem(x))
        return torch.cat([m.fc(y.mean((2, 3))), y.detach().mean((1, 2, 3))[:, None]], 1)

    net = hard(Expression(compute, stem=conv(3, 8), fc=nn.Linear(8, 4)))
    assert not find_groups(net, X, prove=False)["stem"].protected
    assert "what the network gives differs" in find_groups(net, X)["stem"].protected


class Spread(nn.Module):
    """One layer for several widths: a part of the stream, and all of it."""

    def __init__(self, p: int, q: int) -> None:
        super().__init__()
        self.skip, self.p = nn.Conv2d(3, p + q, 1), nn.Conv2d(3, p, 1)
        self.q, self.r, self.out = nn.Conv2d(3, q, 1), nn.Conv2d(3, q, 1), nn.Conv2d(p + q, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.skip(x) + torch.cat([self.p(x), self.q(x) + self.r(x)], 1)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("p", "q"), [(6, 6), (6, 10), (10, 6), (5, 3), (2, 2), (2, 14), (3, 2)])
def test_no_round_leaves_a_layer_nothing(p: int, q: int) -> None:
    structure = find_groups(hard(Spread(p, q)), X)
    assert [g.name for g in structure.prunable] == ["skip"], str(structure)
    assert structure["skip"].parts == (frozenset(range(p)), frozenset(range(p, p + q)))


# -- single removals --------------------------------------------------------
class Branches(nn.Module):
    """A residual where shapes happen to agree."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(i, o) for i, o in itertools.pairwise((3, *widths)))
        self.fc = nn.Linear(widths[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            y = F.relu(layer(x))
            x = x + y if x.shape == y.shape else y
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_removal_at_which_the_forward_pass_branches() -> None:
    model = hard(Branches(16, 32))
    structure = find_groups(model, X)
    assert [g.name for g in structure.prunable] == ["convs.0", "convs.1"]
    first, second = tuple(range(8)), tuple(range(16))
    prove_removal(model, (X,), structure, {"convs.0": first, "convs.1": tuple(range(4))})
    prove_removal(model, (X,), structure, {"convs.0": first, "convs.1": second})
    with pytest.raises(errors.StructureError, match=r"'convs.1' \(32 to 16 channels\)\. .*protect=\['convs.1'\]"):
        prove_removal(model, (X,), structure, {"convs.1": second})
    with pytest.raises(errors.StructureError, match=r"'convs.1' \(32 to 8 channels\).*together with other groups"):
        prove_removal(model, (X,), structure, {"convs.0": first, "convs.1": tuple(range(24))})


def test_nothing_is_tried_where_nothing_goes() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    prove_removal(Never(), (X,), structure_of("plain"), {"0": ()})


def test_removals_that_a_norm_spans_are_tried_for_their_shapes() -> None:
    case = BY_NAME["layer norm"]
    structure = find_groups(case.model(), case.inputs(), allow="0")
    prove_removal(case.model(), case.inputs(), structure, {"0": (0, 5), "3": (1,)})
    apart = Structure(
        tuple(replace(g, members=tuple(m for m in g.members if m.axis != "in")) for g in structure.groups)
    )
    with pytest.raises(errors.StructureError, match=r"'0' \(16 to 14 channels\).*do not fit"):
        prove_removal(case.model(), case.inputs(), apart, {"0": (0, 5)})


def test_a_network_that_fails_on_random_weights_is_not_judged() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        if not bool((m.a.weight == 1).all()):
            raise ValueError("only ones")
        return m.b(m.a(x))  # type: ignore[no-any-return]

    net = Expression(compute, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    nn.init.ones_(net.a.weight)
    structure = find_groups(net, torch.randn(2, 3), prove=False)
    prove_removal(net, (torch.randn(2, 3),), structure, {"a": (1,)})


class Late(nn.Module):
    """A head for training that looks at widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc, self.aux = conv(3, 16), conv(16, 12), nn.Linear(12, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.stem(x))
        z = F.relu(self.body(y))
        out = self.fc(z.mean((2, 3)))
        if not self.training:
            return out
        same = z.shape[1] == 4 * 2
        return out, self.aux(y.mean((2, 3)) * (2 if same else 1))


def test_removals_are_tried_with_heads_for_training() -> None:
    model = hard(Late())
    structure = find_groups(model, X)
    assert "body" in {g.name for g in structure.prunable}, str(structure)
    prove_removal(model, (X,), structure, {"body": (0, 1, 2)})
    with pytest.raises(errors.StructureError, match=r"'body' .*in training mode"):
        prove_removal(model, (X,), structure, {"body": (0, 1, 2, 3)})


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
    case, expected = BY_NAME[name], structure_of(name)
    monkeypatch.setattr("tqdm.tqdm", Bar)
    Bar.made = []
    assert find_groups(case.model(), case.inputs(), progress=progress) == expected
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
