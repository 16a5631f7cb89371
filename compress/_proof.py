"""The proof of a structure: cut copies with random weights, and compare them with masked ones."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.cutting import cut, mask
from compress.groups import SPANNING, Channels, Group, Structure

__all__ = ["prove_groups"]

_FAILS = "removing its channels is not the same as masking them ({})"


def prove_groups(model: nn.Module, inputs: tuple[Any, ...], structure: Structure) -> Structure:
    """Protect every group that can not be cut as the structure says.

    All groups are cut together first; if that fails, groups of one kind
    together, then halves of these, until the guilty ones are found.
    """
    bench = _Bench(model, inputs, structure)
    todo = list(structure.prunable)
    if not todo or not bench.problem(todo):
        return structure
    kinds: dict[Any, list[Group]] = defaultdict(list)
    for group in todo:
        kinds[group.shape].append(group)
    reasons: dict[str, str] = {}
    for alike in kinds.values():
        reasons |= _guilty(bench, alike)
    good = [g for g in todo if g.name not in reasons]
    if good and bench.problem(good):
        # each alone is right, together they are not: take them one after the other
        kept: list[Group] = []
        for group in good:
            why = bench.problem([*kept, group])
            if why:
                reasons[group.name] = _FAILS.format(f"{why}, together with other groups")
            else:
                kept.append(group)
    return structure.protecting(reasons)


def _guilty(bench: _Bench, groups: Sequence[Group]) -> dict[str, str]:
    problem = bench.problem(groups)
    if not problem:
        return {}
    if len(groups) == 1:
        return {groups[0].name: _FAILS.format(problem)}
    half = len(groups) // 2
    return _guilty(bench, groups[:half]) | _guilty(bench, groups[half:])


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
                double(*wide)
            self.twin, self.inputs, self.tolerance = double, wide, 1e-8
        except Exception:  # a model that fixes its own precision is tried in that
            pass

    def problem(self, groups: Sequence[Group]) -> str:
        """What goes wrong when a third of the units of these groups is cut; empty if nothing does."""
        removed = {g.name: _some(g) for g in groups}
        removed = {name: channels for name, channels in removed.items() if channels}
        spanned = any(m.type in SPANNING for g in groups for m in g.members)
        with torch.no_grad():
            expected = _flat(mask(self.twin, self.structure, removed)(*self.inputs))
            try:
                got = _flat(cut(self.twin, self.structure, removed)(*self.inputs))
            except Exception as error:
                return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else "it fails"
        if [t.shape for t in got] != [t.shape for t in expected]:
            return "the output changes its shape"
        if spanned:
            return ""
        for a, b in zip(got, expected, strict=True):
            if not a.is_floating_point():
                continue
            scale = b.abs().max().clamp_min(1e-30)
            if not bool((a - b).abs().max() <= self.tolerance * scale):
                return "the outputs differ"
        return ""


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in _flat(part)]
    return [t for t in vars(output).values() if isinstance(t, Tensor)] if hasattr(output, "__dict__") else []


def _some(group: Group) -> Channels:
    """Channels of every third unit, the first one left alone; all but one of two."""
    chosen = group.units[1::3]
    return tuple(sorted(j for unit in chosen for j in unit))


def _noise(t: Any, generator: torch.Generator, dtype: torch.dtype | None) -> Any:
    if not isinstance(t, Tensor):
        return t
    if not t.is_floating_point():
        return t.cpu()
    return torch.randn(t.shape, generator=generator, dtype=torch.float32).to(dtype or t.dtype)


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights for which no branch is silent: zero-initialised norms and tiny layer scales would hide a wrong cut."""
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_floating_point():
                continue
            if p.dim() > 1 and p[0].numel() > 1:
                noise = torch.randn(p.shape, generator=generator) * (2.0 / p[0].numel()) ** 0.5
            else:
                noise = 0.5 + torch.rand(p.shape, generator=generator)
            p.copy_(noise)
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                mean.copy_(0.1 * torch.randn(mean.shape, generator=generator))
                var.copy_(0.5 + torch.rand(var.shape, generator=generator))
