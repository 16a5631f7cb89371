"""The proof of a structure: cut copies with random weights, and compare them with masked ones."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import tensors_of
from compress._passes import Calls, Heads, find_heads, place
from compress.cutting import channel_axis, cut, mask
from compress.groups import SPANNING, TRAINING_ONLY, UNSEEN, Channels, Group, Structure, is_weighted, kind_of
from lrp.errors import StructureError

__all__ = ["prove_groups", "prove_removal"]

Removed = Mapping[str, Channels]

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

    Groups are cut together, in the rounds of :func:`_rounds`: any two units of
    a group are apart in one of them, so no exchange of channels goes unseen, and
    of two groups of one width one loses more in one of them, so no two that the
    graph took apart by mistake go unseen. If a round fails, groups of one kind
    are cut together in it, then halves of these, until the guilty ones are
    found; then all rounds are repeated without them. Groups that a norm spans
    can only be tested for shapes; they are tested apart, after the others. A
    model with heads is tried with and without them. ``moved`` says what is
    known to move a group's channels, for the reasons.
    """
    from tqdm import tqdm

    hidden = None if progress else True
    with tqdm(total=0, desc="groups", unit="round", delay=1, disable=hidden) as bar:
        bench = _Bench(model, inputs, structure, heads, bar)
        rounds = _rounds(structure.prunable)
        causes: dict[str, str] = {}
        for spanned in (False, True):
            todo = [g for g in structure.prunable if _is_spanned(g) == spanned]
            causes |= _causes(bench, todo, rounds, shapes_only=spanned)
    return structure.protecting({name: _reason(cause, moved.get(name, "")) for name, cause in causes.items()})


def _reason(cause: str, moved: str) -> str:
    if _IN_HEADS in cause:
        return cause
    if moved:
        return f"{moved}: removing them is not the same as masking them"
    if _SHAPES in cause:
        return f"{cause} without some of its channels: they could only be masked"
    return f"{cause}: removing its channels is not the same as masking them"


def prove_removal(model: nn.Module, inputs: tuple[Any, ...], structure: Structure, removed: Removed) -> None:
    """Refuse a removal after which the network would compute something else.

    The proof of the groups removes other numbers of channels: a forward pass
    that looks at widths may take another way just for these. Groups that a norm
    spans are compared in their shapes only. A network that does not run on
    random weights can not be judged. Cost: a random copy, a cut, and a forward
    pass of either; more if they differ.

    Raises
    ------
    StructureError
        It names the groups.
    """
    removed = {name: channels for name, channels in removed.items() if channels}
    if not removed:
        return
    heads = Heads()
    if any(g.protected == UNSEEN or g.protected.endswith(TRAINING_ONLY) for g in structure.groups):
        heads = find_heads(model, inputs)
    bench = _Bench(model, inputs, structure, heads, None)
    plain = {name: channels for name, channels in removed.items() if not _is_spanned(structure[name])}
    for chosen, shapes_only in ((plain, False), (removed, True)):
        if not chosen or (shapes_only and len(chosen) == len(plain)) or not bench.problem(chosen, shapes_only):
            continue
        if not bench.runs():
            return
        causes = _blamed(bench, chosen, shapes_only)
        names = sorted(causes, key=[g.name for g in structure.groups].index)
        width = {n: (structure[n].width, structure[n].width - len(removed[n])) for n in names}
        raise StructureError(
            "the network without these channels is not the one in which they are masked: "
            + ", ".join(f"'{n}' ({before} to {after} channels)" for n, (before, after) in width.items()),
            expected="both to give the same on random weights",
            got="; ".join(f"'{n}': {causes[n]}" for n in names),
            fix=f"protect={names!r}, or another target or round_to=: a forward pass that looks at widths (as in "
            "'x.shape == y.shape') may take another way at just these; without that, any width will do",
        )


def _is_spanned(group: Group) -> bool:
    return any(m.type in SPANNING for m in group.members)


def _causes(bench: _Bench, todo: Sequence[Group], rounds: Sequence[Removed], shapes_only: bool) -> dict[str, str]:
    """What is wrong with groups, by name; all others can be cut together."""
    causes: dict[str, str] = {}
    while good := [g.name for g in todo if g.name not in causes]:
        left = [{name: gone[name] for name in good if gone[name]} for gone in rounds]
        bench.expect(sum(map(bool, left)))
        failed = next((removed for removed in left if removed and bench.problem(removed, shapes_only)), None)
        if failed is None:
            break
        causes |= _blamed(bench, failed, shapes_only)
    return causes


def _blamed(bench: _Bench, removed: Removed, shapes_only: bool) -> dict[str, str]:
    """The groups that make a removal fail, and why."""
    kinds: dict[Any, dict[str, Channels]] = defaultdict(dict)
    for name, channels in removed.items():
        kinds[bench.structure[name].shape][name] = channels
    causes: dict[str, str] = {}
    for alike in kinds.values():
        causes |= _guilty(bench, alike, shapes_only)
    return causes or _surplus(bench, removed, shapes_only)


def _guilty(bench: _Bench, removed: Removed, shapes_only: bool) -> dict[str, str]:
    """The groups that fail, among those of one kind."""
    cause = bench.problem(removed, shapes_only)
    if not cause:
        return {}
    if len(removed) == 1:
        return dict.fromkeys(removed, cause)
    names, half = list(removed), len(removed) // 2
    halves = ({name: removed[name] for name in part} for part in (names[:half], names[half:]))
    return {name: why for part in halves for name, why in _guilty(bench, part, shapes_only).items()}


def _surplus(bench: _Bench, removed: Removed, shapes_only: bool) -> dict[str, str]:
    """Where each kind is right alone and together they are not: those that fail beside the ones before them."""
    causes: dict[str, str] = {}
    kept: dict[str, Channels] = {}
    for name, channels in removed.items():
        cause = bench.problem({**kept, name: channels}, shapes_only)
        if cause:
            causes[name] = f"together with other groups, {cause}"
        else:
            kept[name] = channels
    return causes


#: rounds: that small groups of unequal widths lose the same places in all of them is rare
_LEAST = 5
#: rounds beyond those that suffice nearly always
_MORE = 24


def _rounds(groups: Sequence[Group]) -> list[dict[str, Channels]]:
    """What each group loses in each round.

    A unit goes in the rounds where its code, a random number, has a one. So
    any two units are apart in one round if their codes differ, and with one
    round more than codes need, groups lose random numbers of channels. Codes
    are drawn until any two groups of one width lose unequal numbers in one of
    the rounds; where they are too narrow for that, there are more rounds.
    In no round a layer loses all that it has in a group.
    """
    drawn = random.Random(0)
    count = max((_LEAST, *((len(g.units) - 1).bit_length() + 1 for g in groups)))
    last = count + _MORE
    for rounds in range(count, last + 1):
        codes: dict[str, list[int]] = {}
        seen: set[Any] = set()
        for group in groups:
            for _ in range(16):
                own, apart = _codes(group, rounds, drawn)
                sizes = (group.width, *(len(_losses(group, own, k)) for k in range(rounds)))
                if apart and (sizes not in seen or not any(own)):
                    break
            else:
                if rounds < last:
                    break
            codes[group.name] = own
            seen.add(sizes)
        else:
            break
    return [{g.name: _losses(g, codes[g.name], k) for g in groups} for k in range(rounds)]


def _losses(group: Group, codes: Sequence[int], k: int) -> Channels:
    return tuple(sorted(j for unit, code in zip(group.units, codes, strict=True) if code >> k & 1 for j in unit))


def _codes(group: Group, rounds: int, drawn: random.Random) -> tuple[list[int], bool]:
    """For each unit, the rounds in which it goes, as the ones of a number; and whether these tell all units apart.

    Units that are all a layer has never go: their number is 0.
    """
    whole = frozenset(range(group.width))
    held = [[i for i, unit in enumerate(group.units) if not part.isdisjoint(unit)] for part in (whole, *group.parts)]
    fixed = {units[0] for units in held if len(units) == 1}
    codes = [0 if i in fixed else c for i, c in enumerate(drawn.sample(range(1, 2**rounds), len(group.units)))]
    for units in held:
        for k in range(rounds):
            if all(codes[i] >> k & 1 for i in units):
                order, taken = drawn.sample(units, len(units)), {0, *codes}
                spared = next((i for i in order if codes[i] ^ 1 << k not in taken), order[0])
                codes[spared] ^= 1 << k
    free = {c for i, c in enumerate(codes) if i not in fixed}
    return codes, 0 not in free and len(free) == len(codes) - len(fixed)


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
        self.uncut: dict[Heads, _Pass] = {}
        generator = torch.Generator().manual_seed(0)
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
        if self.bar is not None:
            self.bar.total = self.bar.n + rounds

    def runs(self) -> bool:
        """Whether the copy can be judged at all."""
        return not self._whole(Heads()).failed

    def problem(self, removed: Removed, shapes_only: bool) -> str:
        """What goes wrong when these channels are cut; empty if nothing does."""
        if self.bar is not None:
            self.expect(max(1, self.bar.total - self.bar.n))
            self.bar.update()
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

    def _cause(self, small: nn.Module, removed: Removed, shapes_only: bool, heads: Heads) -> str:
        got = self._run(small, heads)
        if got.failed:
            return f"the shapes in {got.failed} {_SHAPES}"
        if shapes_only:
            return self._difference(got, self._whole(heads), removed, shapes_only, heads)
        cause = ""
        for hooked in (True, False):  # a model may use a weight without calling its layer
            masked = mask(self.twin, self.structure, removed, share=True, hooked=hooked)
            cause = self._difference(got, self._run(masked, heads), removed, shapes_only, heads)
            if not cause:
                break
        return cause

    def _difference(self, got: _Pass, expected: _Pass, removed: Removed, shapes_only: bool, heads: Heads) -> str:
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

    def _whole(self, heads: Heads) -> _Pass:
        """What comes out of the copy as it is, whose shapes are those of every masked one."""
        if heads not in self.uncut:
            found = self._run(self.twin, heads)
            self.uncut[heads] = _Pass(found.outputs, {}, found.failed)
        return self.uncut[heads]

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

    def _gone(self, removed: Removed) -> dict[str, set[int]]:
        out: dict[str, set[int]] = defaultdict(set)
        for name, channels in removed.items():
            for m in self.structure[name].members:
                if m.axis == "out":
                    out[m.layer].update(m.of(channels))
        return out


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
