"""The pruning plan: what goes and why, before anything is cut."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from compress._network import network_of, normal_mode
from compress._results import Result
from compress._stored_plan import check_stored, seal
from compress.costs import Costs, CostTable
from compress.cutting import cut, mask
from compress.groups import Channels, Group, Structure
from lrp.errors import InputError, MismatchError, StructureError

__all__ = ["PruningPlan"]


@dataclass(frozen=True)
class PruningPlan(Result):
    """Which channels of which groups go. Made by :func:`compress.plan_pruning`; changes nothing by itself.

    Attributes
    ----------
    structure : Structure
    table : CostTable
    removed : dict of str to tuple of int
        Group to its channels that go, sorted; groups that stay whole are absent.
    scores : dict of str to tuple of float
        What the channels were ranked by; empty where there was no score.
    unscored : dict of str to str
        Groups left alone for want of a score, and why.
    settings : dict
        Criterion, ranking, target, samples: JSON-able. Of a network that
        :func:`compress.prune` made, the plan that travels with it also says what
        was done after the cut ("done"), so that a report on its file knows.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> plan = compress.plan_pruning(net, torch.randn(1, 4), criterion="weight", target=compress.Target(channels=0.5))
    >>> plan.widths
    {'0': (8, 4)}
    >>> small = plan.apply(net)
    >>> small[0].out_features, net[0].out_features
    (4, 8)
    """

    FORMAT: ClassVar[str] = "compress.PruningPlan"

    structure: Structure
    table: CostTable
    removed: Mapping[str, Channels]
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    unscored: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clean = {}
        for name, channels in self.removed.items():
            group = self.structure[name]
            gone = tuple(sorted({operator.index(j) for j in channels}))
            if gone and (gone[0] < 0 or gone[-1] >= group.width):
                raise InputError(
                    f"'{name}' has no such channel",
                    expected=f"0 to {group.width - 1}",
                    got=str(gone[-1] if gone[0] >= 0 else gone[0]),
                    fix="print(plan) shows the widths",
                )
            if gone and group.protected:
                raise StructureError(
                    f"nothing can be removed from '{name}'",
                    expected="a group that is not protected",
                    got=group.protected,
                    fix="leave it out; see allow= of find_groups for groups that a normalisation spans",
                )
            part = next((u for u in group.units if 0 < len(set(u) & set(gone)) < len(u)), None)
            if part is not None:
                raise StructureError(
                    f"'{name}' can not lose a part of tied channels",
                    expected=f"all of {list(part)}, or none",
                    got=str(sorted(set(part) & set(gone))),
                    fix="plan.cut and plan.keep take whole units",
                )
            if len(gone) >= group.width:
                raise StructureError(
                    f"all channels of '{name}' would go", expected="one at least stays", got="none", fix="keep one"
                )
            if layer := group.emptied(gone):
                raise StructureError(
                    f"all channels of '{layer}' would go",
                    expected=f"one at least stays of those that it has in the group '{name}'",
                    got="none",
                    fix="keep one",
                )
            if gone:
                clean[name] = gone
        order = {g.name: k for k, g in enumerate(self.structure.groups)}
        object.__setattr__(self, "removed", dict(sorted(clean.items(), key=lambda item: order[item[0]])))

    # -- reading ------------------------------------------------------------
    @property
    def before(self) -> Costs:
        """Costs of the network the plan is for."""
        return replace(self.table.costs({}), file_bytes=self._file_bytes("before"))

    @property
    def after(self) -> Costs:
        """Costs of what the plan leaves."""
        return replace(self.table.costs(self.removed), file_bytes=self._file_bytes("after"))

    def _file_bytes(self, when: str) -> int | None:
        """Known where the target was one of bytes."""
        found: int | None = self.settings.get("file_bytes", {}).get(when)
        return found

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Prunable group to its channels before and after."""
        return {g.name: (g.width, g.width - len(self.removed.get(g.name, ()))) for g in self.structure.prunable}

    @property
    def layer_widths(self) -> dict[str, tuple[int, int]]:
        """Convolution or linear layer to its output channels before and after."""
        return self.table.widths(self.removed)

    def why(self, group: str) -> list[tuple[int, float | None, str]]:
        """Every channel of a group: (channel, score, "goes" or "stays"), smallest score first."""
        g = self.structure[group]
        gone, own = set(self.removed.get(group, ())), self.scores.get(group)
        rows = [(j, None if own is None else own[j], "goes" if j in gone else "stays") for j in range(g.width)]
        return sorted(rows, key=lambda row: (row[1] is not None, row[1] or 0.0, row[0]))

    def __deepcopy__(self, memo: Any) -> PruningPlan:
        return self  # nothing in it changes; copies of a pruned model share it

    def __str__(self) -> str:
        before, after = self.before, self.after
        head = ("group", "before", "after", "layers", "scores of what goes", "and of what stays")
        rows: list[tuple[str, ...]] = [head]
        for g in self.structure.groups:
            gone = self.removed.get(g.name, ())
            note = g.protected or self.unscored.get(g.name, "")
            own = self.scores.get(g.name)
            left = _range(own, gone) if own and gone else "-"
            right = _range(own, [j for j in range(g.width) if j not in set(gone)]) if own else note or "-"
            rows.append((g.name, str(g.width), str(g.width - len(gone)), str(len(g.producers)), left, right))
        widths = [max(len(row[k]) for row in rows) for k in range(len(head) - 1)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
        ]
        for name, b, a in (
            ("prunable channels", before.channels, after.channels),
            ("filters", before.filters, after.filters),
            ("MACs", before.macs, after.macs),
            ("parameters", before.params, after.params),
        ):
            lines.append(f"{name}: {b:,} -> {a:,} ({a / b:.1%} stay)" if b else f"{name}: none")
        if before.file_bytes and after.file_bytes:
            share = after.file_bytes / before.file_bytes
            lines.append(f"bytes of the file: {before.file_bytes:,} -> {after.file_bytes:,} ({share:.1%} stay)")
        for key in ("latency_ms", "criterion", "ranking", "target", "samples", "edits"):
            if key in self.settings:
                lines.append(f"{key}: {json.dumps(self.settings[key])}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        before, after = self.before, self.after
        return (
            f"PruningPlan({sum(len(c) for c in self.removed.values())} of {before.channels} channels go, "
            f"{after.macs / max(1, before.macs):.1%} of the MACs stay)"
        )

    # -- using --------------------------------------------------------------
    def check(self, model: nn.Module) -> None:
        """That a model has the shapes the plan was made for.

        Raises
        ------
        MismatchError
        InputError
            If it can not be copied, or has layers without a shape.
        """
        self._network(model)

    def _network(self, model: nn.Module) -> nn.Module:
        """The network in a model, checked."""
        model = network_of(model, values=False)
        found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        expected = self.table.shapes()
        if found == expected:
            self.structure.check(model)  # layers without tensors too
            return model
        missing = [n for n in expected if n not in found]
        surplus = [n for n in found if n not in expected]
        other = [n for n in expected if n in found and found[n] != expected[n]]
        if other:
            got = f"'{other[0]}' of shape {found[other[0]]}, not {expected[other[0]]} ({len(other)} tensors differ)"
        else:
            got = f"missing {missing[:3]}, surplus {surplus[:3]}"
        raise MismatchError(
            "the plan is for another network",
            expected=f"{len(expected)} tensors of the names and shapes it was made with",
            got=got,
            fix="apply it to the original architecture, before any pruning",
        )

    def apply(self, model: nn.Module) -> nn.Module:
        """A smaller copy of the model; the model stays as it is.

        The copy carries the plan, so that :func:`compress.save` can write it. A
        wrapper (``torch.compile``, DataParallel, DistributedDataParallel) is
        not copied. Batch norms keep the statistics of the wide network;
        :func:`compress.reestimate` mends them, as :func:`compress.prune` does.

        Raises
        ------
        MismatchError
            If it is another network.
        """
        model = self._network(model)
        with normal_mode():
            out = cut(model, self.structure, self.removed)
        earlier = getattr(model, "_pruning_plan", None)
        object.__setattr__(out, "_pruning_plan", self if earlier is None else earlier.then(self))
        return out

    def mask(self, model: nn.Module) -> nn.Module:
        """A copy of full width in which the channels that go are silent; see :func:`compress.cutting.mask`."""
        model = self._network(model)
        with normal_mode():
            return mask(model, self.structure, self.removed)

    # -- editing ------------------------------------------------------------
    def keep(self, group: str, channels: Iterable[int] | None = None) -> PruningPlan:
        """The same plan, but these channels (None: all) of a group stay, with the units they belong to."""
        g = self.structure[group]
        chosen = set(range(g.width)) if channels is None else _whole(g, channels)
        return self._with(group, [j for j in self.removed.get(group, ()) if j not in chosen], "kept by hand")

    def cut(self, group: str, channels: Iterable[int]) -> PruningPlan:
        """The same plan, but these channels of a group go too, with the units they belong to."""
        g = self.structure[group]
        return self._with(group, {*self.removed.get(group, ()), *_whole(g, channels)}, "cut by hand")

    def _with(self, group: str, channels: Iterable[int], what: str) -> PruningPlan:
        edits = [*self.settings.get("edits", ()), f"{group}: {what}"]
        removed = {**self.removed, group: tuple(channels)}
        # not those of the edited network
        settings = {k: v for k, v in self.settings.items() if k not in ("latency_ms", "file_bytes")}
        return replace(self, removed=removed, settings={**settings, "edits": edits})

    def then(self, later: PruningPlan) -> PruningPlan:
        """This plan and one made for the network it leaves, as one plan for the original network.

        Raises
        ------
        MismatchError
            If the later plan is not for the network this one leaves.
        """
        removed = {}
        widths = {g.name: g.width for g in later.structure.groups}
        for g in self.structure.groups:
            gone = set(self.removed.get(g.name, ()))
            kept = [j for j in range(g.width) if j not in gone]
            if widths.pop(g.name, None) != len(kept):
                raise MismatchError(
                    f"the later plan is not for the network this one leaves: '{g.name}'",
                    expected=f"a group of {len(kept)} channels",
                    got=str(next((o.width for o in later.structure.groups if o.name == g.name), "none of that name")),
                    fix="make it with the model that this plan's apply returned",
                )
            removed[g.name] = tuple(sorted(gone | {kept[j] for j in later.removed.get(g.name, ())}))
        if widths:
            raise MismatchError(
                "the later plan is not for the network this one leaves",
                expected="the groups of this plan",
                got=f"'{next(iter(widths))}'",
                fix="make it with the model that this plan's apply returned",
            )
        settings = {**later.settings}
        settings["steps"] = [*self.settings.get("steps", [_of_step(self)]), _of_step(later)]
        if "file_bytes" in settings:
            settings["file_bytes"] = {**settings["file_bytes"], "before": self._file_bytes("before")}
        edits = [*self.settings.get("edits", ()), *later.settings.get("edits", ())]
        if edits:
            settings["edits"] = edits
        return PruningPlan(self.structure, self.table, removed, {}, self.unscored, settings)

    def diff(self, other: PruningPlan) -> str:
        """What the other plan does differently, group by group; empty if nothing.

        Raises
        ------
        MismatchError
            If it is for another network.
        """
        if self.table.shapes() != other.table.shapes():
            raise MismatchError(
                "plans of different networks can not be compared",
                expected="the same tensors",
                got="others",
                fix="make both plans for one network",
            )
        lines = []
        for g in self.structure.groups:
            own, its = set(self.removed.get(g.name, ())), set(other.removed.get(g.name, ()))
            if own != its:
                parts = [f"+{sorted(its - own)}"] if its - own else []
                parts += [f"-{sorted(own - its)}"] if own - its else []
                lines.append(
                    f"{g.name}: {g.width - len(own)} -> {g.width - len(its)} channels, removed {' '.join(parts)}"
                )
        if lines:
            lines.append(f"MACs {self.after.macs:,} -> {other.after.macs:,}")
        return "\n".join(lines)

    # -- keeping ------------------------------------------------------------
    def to_json(self, scores: bool = True) -> dict[str, Any]:
        """Everything as JSON-able values; ``scores=False`` leaves the scores out, as in the file of a network.

        That file has a size: it is not told what it is.
        """
        held = super().to_json()
        if scores:
            return held
        return held | {"scores": {}, "settings": {k: v for k, v in held["settings"].items() if k != "file_bytes"}}

    def _held(self) -> dict[str, Any]:
        structure, costs = self.structure.to_json(), self.table.to_json()
        return {
            "structure": structure,
            "costs": costs,
            "seal": seal(structure, costs),
            "removed": {name: list(channels) for name, channels in self.removed.items()},
            "scores": {name: list(own) for name, own in self.scores.items()},
            "unscored": dict(self.unscored),
            "settings": dict(self.settings),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> PruningPlan:
        check_stored(stored)
        structure = Structure.from_json(stored["structure"])
        table = CostTable.from_json(stored["costs"], structure)
        removed = {str(n): tuple(operator.index(j) for j in c) for n, c in stored["removed"].items()}
        scores = {str(n): tuple(float(s) for s in own) for n, own in stored["scores"].items()}
        try:
            for name, own in scores.items():
                if len(own) != structure[name].width or not all(map(math.isfinite, own)):
                    raise ValueError(f"scores of '{name}' that are not {structure[name].width} finite numbers")
            return cls(structure, table, removed, scores, dict(stored["unscored"]), dict(stored["settings"]))
        except (InputError, StructureError) as error:  # it speaks to who writes a plan, not to who reads one
            raise ValueError(f"{error.what} (expected {error.expected}, got {error.got})") from error


def _of_step(plan: PruningPlan) -> dict[str, Any]:
    """Settings of one step of several: what holds for a network at the end, the last step says."""
    return {k: v for k, v in plan.settings.items() if k not in ("done", "file_bytes")}


def _whole(group: Group, channels: Iterable[int]) -> set[int]:
    """The channels with the others of their units."""
    chosen = {int(j) for j in channels}
    strange = sorted(j for j in chosen if not 0 <= j < group.width)
    if strange:
        raise InputError(
            f"'{group.name}' has no such channel",
            expected=f"0 to {group.width - 1}",
            got=str(strange[0]),
            fix="print(plan) shows the widths",
        )
    return chosen | {j for unit in group.units if chosen & set(unit) for j in unit}


def _range(own: tuple[float, ...], channels: Iterable[int]) -> str:
    values = [own[j] for j in channels]
    return f"{min(values):.3g} to {max(values):.3g}" if values else "-"
