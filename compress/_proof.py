"""The proof of a structure: cut copies with random weights, and compare them with masked ones."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import tensors_of
from compress.cutting import cut, mask
from compress.groups import SPANNING, UNSEEN, Channels, Group, Structure, is_weighted, kind_of

__all__ = ["prove_groups"]

_FAILS = "removing its channels is not the same as masking them ({})"


def prove_groups(model: nn.Module, inputs: tuple[Any, ...], structure: Structure) -> Structure:
    """Protect every group that can not be cut as the structure says.

    Groups are cut together, in as many rounds as the largest has binary digits
    in the numbers of its units: in round k those whose digit k is 1. Any two
    units are apart in one of the rounds, so no exchange of channels goes
    unseen. If a round fails, groups of one kind are cut together, then halves
    of these, until the guilty ones are found. Groups that a norm spans can only
    be tested for shapes; they are tested apart, after the others.
    """
    bench = _Bench(model, inputs, structure)
    reasons: dict[str, str] = {}
    for spanned in (False, True):
        todo = [g for g in structure.prunable if any(m.type in SPANNING for m in g.members) == spanned]
        reasons |= _reasons(bench, todo, shapes_only=spanned)
    return structure.protecting(reasons)


def _reasons(bench: _Bench, todo: Sequence[Group], shapes_only: bool) -> dict[str, str]:
    if not todo or not bench.problem(todo, shapes_only):
        return {}
    kinds: dict[Any, list[Group]] = defaultdict(list)
    for group in todo:
        kinds[group.shape].append(group)
    reasons: dict[str, str] = {}
    for alike in kinds.values():
        reasons |= _guilty(bench, alike, shapes_only)
    good = [g for g in todo if g.name not in reasons]
    if good and bench.problem(good, shapes_only):
        # each alone is right, together they are not: take them one after the other
        kept: list[Group] = []
        for group in good:
            why = bench.problem([*kept, group], shapes_only)
            if why:
                reasons[group.name] = _FAILS.format(f"{why}, together with other groups")
            else:
                kept.append(group)
    return reasons


def _guilty(bench: _Bench, groups: Sequence[Group], shapes_only: bool) -> dict[str, str]:
    problem = bench.problem(groups, shapes_only)
    if not problem:
        return {}
    if len(groups) == 1:
        return {groups[0].name: _FAILS.format(problem)}
    half = len(groups) // 2
    return _guilty(bench, groups[:half], shapes_only) | _guilty(bench, groups[half:], shapes_only)


class _Bench:
    """A copy of the model in which every weight matters, and the input it is tried on."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], structure: Structure) -> None:
        self.structure = structure
        generator = torch.Generator().manual_seed(0)
        twin = copy.deepcopy(model).cpu().eval()
        _randomise(twin, generator)
        self.inputs = tuple(_noise(t, generator, None) for t in inputs)
        self.tolerance = 1e-3
        self.twin = twin
        try:
            double = copy.deepcopy(twin).double()
            wide = tuple(_noise(t, generator, torch.float64) for t in inputs)
            with torch.no_grad():
                if not all(bool(t.isfinite().all()) for t in tensors_of(double(*wide))):
                    # logarithms and roots want what the user gave, a little moved
                    wide = tuple(_moved(t, generator) for t in inputs)
                    double(*wide)
            self.twin, self.inputs, self.tolerance = double, wide, 1e-8
        except Exception:  # a model that fixes its own precision is tried in that
            pass
        # layers that no trace in eval mode sees may read in training what is cut
        unseen = any(g.protected == UNSEEN for g in structure.groups)
        self.trains = unseen and not _training_fails(self.twin, self.inputs)

    def problem(self, groups: Sequence[Group], shapes_only: bool) -> str:
        """What goes wrong when units of these groups are cut; empty if nothing does."""
        for removed in _rounds(groups, 1 if shapes_only else None):
            found = self._round(removed, shapes_only)
            if found:
                return found
        return ""

    def _round(self, removed: Mapping[str, Channels], shapes_only: bool) -> str:
        with torch.no_grad():
            try:
                masked = mask(self.twin, self.structure, removed, share=True)
                expected, inside = _run(masked, self.inputs)
                small = cut(self.twin, self.structure, removed, share=True)
                got, found = _run(small, self.inputs)
            except Exception as error:
                return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else "it fails"
        if self.trains and (why := _training_fails(small, self.inputs)):
            return f"in training mode, {why}"
        if [t.shape for t in got] != [t.shape for t in expected]:
            return "the output changes its shape"
        if shapes_only:
            return ""
        gone = self._gone(removed)
        for name, values in inside.items():
            for a, b in zip(found.get(name, []), values, strict=False):
                keep = [j for j in range(b.shape[_axis(masked, name, b)]) if j not in gone.get(name, ())]
                if not self._close(a, b.index_select(_axis(masked, name, b), torch.tensor(keep))):
                    return f"what '{name}' gives differs"
        if not all(self._close(a, b) for a, b in zip(got, expected, strict=True)):
            return "the outputs differ"
        return ""

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


def _rounds(groups: Sequence[Group], most: int | None) -> Iterator[dict[str, Channels]]:
    """Which channels go in each round."""
    digits = max((len(g.units) - 1).bit_length() for g in groups)
    for k in range(digits if most is None else min(most, digits)):
        removed = {}
        for g in groups:
            own = max(1, (len(g.units) - 1).bit_length())
            chosen = [unit for i, unit in enumerate(g.units) if i >> (k % own) & 1]
            removed[g.name] = tuple(sorted(j for unit in chosen for j in unit))
        yield removed


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Output tensors, and what every convolution and linear layer gave: an output alone may hide a difference."""
    inside: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str) -> Any:
        def record(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                inside[name].append(output.clone())

        return record

    for name, module in model.named_modules():
        if is_weighted(kind_of(module)):
            module.register_forward_hook(hook(name))
    return tensors_of(model(*inputs)), inside


def _training_fails(net: nn.Module, inputs: tuple[Any, ...]) -> str:
    """What goes wrong in training mode; empty if nothing does."""
    try:
        with torch.no_grad():
            copy.deepcopy(net).train()(*inputs)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else "it fails"
    return ""


def _axis(model: nn.Module, name: str, output: Tensor) -> int:
    """Where a layer's output holds its channels."""
    kernel = len(getattr(model.get_submodule(name), "kernel_size", ()))
    return output.dim() - 1 - kernel


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


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights for which no branch is silent: zero-initialised norms and tiny layer scales would hide a wrong cut."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                continue
            if p.dim() > 1 and p[0].numel() > 1:
                noise = torch.randn(p.shape, generator=generator) * (2.0 / p[0].numel()) ** 0.5
            elif name.endswith("bias"):  # of both signs, so that a masked zero is not always the least
                noise = torch.randn(p.shape, generator=generator)
            else:
                noise = 0.5 + torch.rand(p.shape, generator=generator)
            p.copy_(noise)
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                mean.copy_(0.1 * torch.randn(mean.shape, generator=generator))
                var.copy_(0.5 + torch.rand(var.shape, generator=generator))
