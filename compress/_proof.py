"""The proof of a structure: cut copies with random weights, and compare them with masked ones."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import tensors_of
from compress._passes import Calls, Heads, place
from compress.cutting import channel_axis, cut, mask
from compress.groups import SPANNING, Channels, Group, Structure, is_weighted, kind_of

__all__ = ["prove_groups"]


_IN_HEADS = "its channels are read by"
_SHAPES = "do not fit"


def prove_groups(
    model: nn.Module,
    inputs: tuple[Any, ...],
    structure: Structure,
    heads: Heads,
    moved: Mapping[str, str],
    progress: bool = False,
) -> Structure:
    """Protect every group that can not be cut as the structure says.

    Groups are cut together, in as many rounds as the largest has binary digits
    in the numbers of its units: in round k those whose digit k is 1, or 0, as
    drawn for each group. Any two units are apart in one of the rounds, so no
    exchange of channels goes unseen. If a round fails, groups of one kind are
    cut together in it, then halves of these, until the guilty ones are found;
    then all rounds are repeated without them. Groups that a norm spans can only
    be tested for shapes; they are tested apart, after the others. A model with
    heads is tried with and without them. ``moved`` says what is known to move
    a group's channels, for the reasons.
    """
    from tqdm import tqdm

    hidden = None if progress else True
    with tqdm(total=0, desc="groups", unit="round", delay=1, disable=hidden) as bar:
        bench = _Bench(model, inputs, structure, heads, bar)
        causes: dict[str, str] = {}
        for spanned in (False, True):
            todo = [g for g in structure.prunable if any(m.type in SPANNING for m in g.members) == spanned]
            causes |= _causes(bench, todo, shapes_only=spanned)
    return structure.protecting({name: _reason(cause, moved.get(name, "")) for name, cause in causes.items()})


def _reason(cause: str, moved: str) -> str:
    if _IN_HEADS in cause:
        return cause
    if moved:
        return f"{moved}: removing them is not the same as masking them"
    if _SHAPES in cause:
        return f"{cause} without some of its channels: they could only be masked"
    return f"{cause}: removing its channels is not the same as masking them"


def _causes(bench: _Bench, todo: Sequence[Group], shapes_only: bool) -> dict[str, str]:
    """What is wrong with groups, by name; all others can be cut together."""
    causes: dict[str, str] = {}
    while good := [g for g in todo if g.name not in causes]:
        rounds = range(1 if shapes_only else max(map(_digits, good)))
        bench.expect(len(rounds))
        k = next((k for k in rounds if bench.problem(good, k, shapes_only)), None)
        if k is None:
            break
        kinds: dict[Any, list[Group]] = defaultdict(list)
        for group in good:
            kinds[group.shape].append(group)
        fresh: dict[str, str] = {}
        for alike in kinds.values():
            fresh |= _guilty(bench, alike, k, shapes_only)
        causes |= fresh or _surplus(bench, good, k, shapes_only)
    return causes


def _guilty(bench: _Bench, groups: Sequence[Group], k: int, shapes_only: bool) -> dict[str, str]:
    """The groups that fail in a round, among those of one kind."""
    cause = bench.problem(groups, k, shapes_only)
    if not cause:
        return {}
    if len(groups) == 1:
        return {groups[0].name: cause}
    half = len(groups) // 2
    return _guilty(bench, groups[:half], k, shapes_only) | _guilty(bench, groups[half:], k, shapes_only)


def _surplus(bench: _Bench, groups: Sequence[Group], k: int, shapes_only: bool) -> dict[str, str]:
    """Where each kind is right alone and together they are not: those that fail beside the ones before them."""
    causes: dict[str, str] = {}
    kept: list[Group] = []
    for group in groups:
        cause = bench.problem([*kept, group], k, shapes_only)
        if cause:
            causes[group.name] = f"together with other groups, {cause}"
        else:
            kept.append(group)
    return causes


def _digits(group: Group) -> int:
    """Rounds in which any two of its units are apart once."""
    return max(1, (len(group.units) - 1).bit_length())


@dataclass(frozen=True)
class _Pass:
    """What came out; where an exception was raised."""

    outputs: list[Tensor]
    inside: dict[str, list[Tensor]]
    failed: str = ""


class _Bench:
    """A copy of the model in which every weight matters, and the input it is tried on."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], structure: Structure, heads: Heads, bar: Any) -> None:
        self.structure, self.bar = structure, bar
        generator = torch.Generator().manual_seed(0)
        # groups that the graph takes apart by mistake go unseen where all lose the same places
        flips = torch.randint(2**62, (len(structure.groups),), generator=generator).tolist()
        self.flips = {g.name: n for g, n in zip(structure.groups, flips, strict=True)}
        try:
            self.twin = _random_copy(model, generator, torch.float64).double()
            self.inputs = tuple(_noise(t, generator, torch.float64) for t in inputs)
            self.tolerance = 1e-8
            with torch.no_grad():
                if not all(bool(t.isfinite().all()) for t in tensors_of(self.twin(*self.inputs))):
                    # logarithms and roots want what the user gave, a little moved
                    self.inputs = tuple(_moved(t, generator) for t in inputs)
                    self.twin(*self.inputs)
        except Exception:  # a model that fixes its own precision is tried in that
            self.twin = _random_copy(model, generator, None)
            self.inputs = tuple(_noise(t, generator, None) for t in inputs)
            self.tolerance = 1e-3
        self.modes = [Heads()]
        self.comparable = {self.modes[0]: True}
        if heads.names:
            first, second = (self._run(mask(self.twin, structure, {}, share=True), heads) for _ in range(2))
            self.modes.append(heads)
            # dropout that a head calls as a function can not be switched off
            self.comparable[heads] = all(map(self._close, first.outputs, second.outputs))

    def expect(self, rounds: int) -> None:
        """Before the bar moves on."""
        self.bar.total = self.bar.n + rounds

    def problem(self, groups: Sequence[Group], k: int, shapes_only: bool) -> str:
        """What goes wrong when units of these groups are cut, in round k; empty if nothing does."""
        self.expect(max(1, self.bar.total - self.bar.n))
        self.bar.update()
        removed = {g.name: _half(g, k, self.flips[g.name]) for g in groups}
        try:
            small = cut(self.twin, self.structure, removed, share=True)
        except Exception:
            return f"the shapes of its layers {_SHAPES}"
        for heads in self.modes:
            cause = self._cause(small, removed, shapes_only, heads)
            if cause and heads.failure:
                names = " or ".join(map(place, heads.names))
                return (
                    f"{_IN_HEADS} {names}, which runs in training mode only and fails on the example inputs "
                    f"({heads.failure}): give inputs on which it runs, or take it out of the model"
                )
            if cause:
                return f"in training mode, {cause}" if heads.names else cause
        return ""

    def _cause(self, small: nn.Module, removed: Mapping[str, Channels], shapes_only: bool, heads: Heads) -> str:
        got = self._run(small, heads)
        if got.failed:
            return f"the shapes in {got.failed} {_SHAPES}"
        cause = ""
        for hooked in (True, False):  # a model may use a weight without calling its layer
            masked = mask(self.twin, self.structure, removed, share=True, hooked=hooked)
            cause = self._difference(got, self._run(masked, heads), removed, shapes_only, heads)
            if not cause:
                break
        return cause

    def _difference(
        self, got: _Pass, expected: _Pass, removed: Mapping[str, Channels], shapes_only: bool, heads: Heads
    ) -> str:
        if expected.failed:
            return f"{expected.failed} fails on random weights"
        if [t.shape for t in got.outputs] != [t.shape for t in expected.outputs]:
            return "the output changes its shape"
        if shapes_only or not self.comparable[heads]:
            return ""
        gone = self._gone(removed)
        for name, values in expected.inside.items():
            module = self.twin.get_submodule(name)
            for a, b in zip(got.inside.get(name, []), values, strict=False):
                axis = channel_axis(module, b)
                keep = [j for j in range(b.shape[axis]) if j not in gone.get(name, ())]
                if not self._close(a, b.index_select(axis, torch.tensor(keep))):
                    return f"what '{name}' gives differs"
        return "" if all(map(self._close, got.outputs, expected.outputs)) else "what the network gives differs"

    def _run(self, model: nn.Module, heads: Heads) -> _Pass:
        """Output tensors, and what every layer with weights gave: an output alone may hide a difference."""
        inside: dict[str, list[Tensor]] = defaultdict(list)

        def hook(name: str) -> Any:
            def record(module: nn.Module, given: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    inside[name].append(output.clone())

            return record

        if heads.names:
            model = heads.start(copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())}))
        handles = [
            module.register_forward_hook(hook(name))
            for name, module in model.named_modules()
            if is_weighted(kind_of(module))
        ]
        try:
            with torch.no_grad():
                return _Pass(tensors_of(model(*self.inputs)), inside)
        except Exception:
            return _Pass([], {}, self._place(model))
        finally:
            for handle in handles:
                handle.remove()

    def _place(self, model: nn.Module) -> str:
        """The innermost module in which a pass fails."""
        with torch.no_grad(), Calls(model) as calls, contextlib.suppress(Exception):
            model(*self.inputs)
        return place(calls.stack[-1] if calls.stack else "")

    def _close(self, a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        if not a.is_floating_point() or not a.numel():
            return True
        return bool((a - b).abs().max() <= self.tolerance * b.abs().max().clamp_min(1e-30))

    def _gone(self, removed: Mapping[str, Channels]) -> dict[str, set[int]]:
        out: dict[str, set[int]] = defaultdict(set)
        for name, channels in removed.items():
            for m in self.structure[name].members:
                if m.axis == "out":
                    out[m.layer].update(m.of(channels))
        return out


def _half(group: Group, k: int, flips: int) -> Channels:
    """The channels of a group that go in round k: those of the units whose digit k is that of the flips."""
    place = k % _digits(group)
    flip = flips >> k & 1
    return tuple(sorted(j for i, unit in enumerate(group.units) if (i >> place & 1) == flip for j in unit))


def _noise(t: Any, generator: torch.Generator, dtype: torch.dtype | None) -> Any:
    if not isinstance(t, Tensor):
        return t
    if not t.is_floating_point():
        return t.cpu()
    return torch.randn(t.shape, generator=generator, dtype=torch.float32).to(dtype or t.dtype)


def _moved(t: Any, generator: torch.Generator) -> Any:
    """The user's own values in float64, each up to a tenth larger: signs stay."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return t
    return t.detach().cpu().double() * (1 + 0.1 * torch.rand(t.shape, generator=generator, dtype=torch.float64))


def _random_copy(model: nn.Module, generator: torch.Generator, dtype: torch.dtype | None) -> nn.Module:
    """Weights for which no branch is silent: zero-initialised norms and tiny layer scales would hide a wrong cut."""
    drawn: dict[int, Any] = {}
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            continue
        if p.dim() > 1 and p[0].numel() > 1:
            noise = torch.randn(p.shape, generator=generator).mul_((2.0 / p[0].numel()) ** 0.5)
        elif name.endswith("bias"):  # of both signs, so that a masked zero is not always the least
            noise = torch.randn(p.shape, generator=generator)
        else:
            noise = torch.rand(p.shape, generator=generator).add_(0.5)
        drawn[id(p)] = nn.Parameter(noise.to(dtype or p.dtype), p.requires_grad)
    twin = copy.deepcopy(model, drawn).cpu().eval()
    for module in twin.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.copy_(0.1 * torch.randn(mean.shape, generator=generator))
            var.copy_(0.5 + torch.rand(var.shape, generator=generator))
    return twin
