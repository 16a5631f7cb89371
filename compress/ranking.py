"""Ranking: scores of layers become one order of removal over the whole network."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.criteria._names import near
from compress.criteria.scores import Scores
from compress.groups import Channels, Group, Structure
from lrp.errors import InputError, MismatchError, NonFiniteError

__all__ = ["Block", "GroupScores", "Ranking", "group_scores", "order_of", "spared"]

NORMALISATIONS = ("auto", "none", "sum", "l2", "mean")
REDUCTIONS = ("sum", "mean", "max", "root")
SCOPES = ("global", "local", "isomorphic")


@dataclass(frozen=True)
class Ranking:
    """How scores are made comparable, and what limits removal.

    Parameters
    ----------
    normalisation : str
        Of the scores of one layer: "none"; "sum" divides by the sum of their
        magnitudes, so that wide layers have small scores; "mean" by the mean
        magnitude; "l2" by the root of the sum of squares. "auto": "mean" for a
        network with batch norm among what can be pruned, whose new statistics
        mend the scale of what is left; "none" for others (measured in
        experiments/results/default_criterion).
    reduction : str
        Over the coupled layers of a group that make a channel, after
        normalisation: "sum", "mean", "max", "root" (the first layer alone). A
        sum protects large groups: the residual width stays and inner layers are
        strangled.
    scope : str
        "global": one order over all groups; "local": every group loses the
        same share; "isomorphic": groups of one kind (equal names but for
        numbers, equal types) are ranked together, and every kind loses the same
        share (Fang et al. 2024, arXiv 2407.04616).
    floor : float, int or dict
        What stays in every group: a share of its width or a number of
        channels; by layer name or shell pattern in a dict, where "*" gives the
        default. At least one unit stays, and one channel of every layer.
    round_to : int, "auto" or dict
        Widths that remain are multiples of it. "auto" on x86: 16, halved until
        a group holds four of it (unrounded widths are slow there); 1 elsewhere.
        By layer name or shell pattern in a dict, as for ``floor``.

    Examples
    --------
    >>> from compress import Ranking
    >>> Ranking(normalisation="sum", scope="global", floor={"layer1.*": 0.5, "*": 0.1}).scope
    'global'
    """

    normalisation: str = "auto"
    reduction: str = "mean"
    scope: str = "global"
    floor: float | int | Mapping[str, float | int] = 0.1
    round_to: int | str | Mapping[str, int | str] = "auto"

    def __post_init__(self) -> None:
        for name, known in (("normalisation", NORMALISATIONS), ("reduction", REDUCTIONS), ("scope", SCOPES)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} is not known",
                    expected=" or ".join(f"'{k}'" for k in known),
                    got=repr(getattr(self, name)),
                    fix="choose one of these",
                )
        for value in self.floor.values() if isinstance(self.floor, Mapping) else (self.floor,):
            share = isinstance(value, float) and 0 <= value <= 1
            number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not (share or number):
                raise InputError(
                    "floor is no share and no number of channels",
                    expected="a float in [0, 1] or an int >= 0",
                    got=repr(value),
                    fix="0.1 keeps a tenth of every group",
                )
        for step in self.round_to.values() if isinstance(self.round_to, Mapping) else (self.round_to,):
            number = isinstance(step, int) and not isinstance(step, bool) and step >= 1
            if step != "auto" and not number:
                raise InputError(
                    "round_to is no width",
                    expected="'auto' or an int >= 1",
                    got=repr(step),
                    fix="1 rounds nothing",
                )

    def to_json(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        for name in ("floor", "round_to"):
            value = getattr(self, name)
            out[name] = dict(value) if isinstance(value, Mapping) else value
        return out

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Ranking:
        return cls(**stored)

    def block(self, group: Group) -> int:
        """Multiple that the width of a group keeps to."""
        step: int | str = 1
        if isinstance(self.round_to, Mapping):
            fits = [v for p, v in self.round_to.items() if p != "*" and fnmatch.filter(group.producers, p)]
            step = fits[0] if fits else self.round_to.get("*", 1)
        else:
            step = self.round_to
        if isinstance(step, int):
            return step
        if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
            return 1
        size = 16
        while size > 1 and group.width < 4 * size:
            size //= 2
        return size

    def kept(self, group: Group) -> int:
        """Channels that stay at least."""
        value: float | int = 0
        if isinstance(self.floor, Mapping):
            fits = [v for p, v in self.floor.items() if p != "*" and fnmatch.filter(group.producers, p)]
            value = max(fits, key=lambda v: _share(v, group.width)) if fits else self.floor.get("*", 0)
        else:
            value = self.floor
        return max(1, _share(value, group.width))

    def settled(self, structure: Structure) -> Ranking:
        """The same, with the normalisation that "auto" means for these groups."""
        if self.normalisation != "auto":
            return self
        normed = any("BatchNorm" in m.type for g in structure.prunable for m in g.members)
        return dataclasses.replace(self, normalisation="mean" if normed else "none")

    def check(self, structure: Structure) -> None:
        """Raise InputError if a pattern of the floors or of round_to fits no layer."""
        layers = [name for g in structure.groups for name in g.producers]
        for name in ("floor", "round_to"):
            value = getattr(self, name)
            for pattern in value if isinstance(value, Mapping) else ():
                if pattern == "*" or fnmatch.filter(layers, pattern):
                    continue
                inside = f"{pattern}.*"
                fix = f"write '{inside}' for the layers in it" if fnmatch.filter(layers, inside) else ""
                raise InputError(
                    f"{name}='{pattern}' fits no layer",
                    expected="the name of a convolution or linear layer, or a pattern such as 'layer1.*'; among them "
                    f"are {', '.join(layers[:4])}",
                    got=pattern,
                    fix=fix or near(pattern, layers, "print(structure) lists the groups"),
                )


def _share(value: float | int, width: int) -> int:
    return min(width, math.ceil(value * width - 1e-9) if isinstance(value, float) else int(value))


@dataclass(frozen=True)
class GroupScores:
    """Scores of groups: one number per channel, comparable as far as the normalisation makes them so."""

    values: dict[str, Tensor]
    unscored: dict[str, str]


@dataclass(frozen=True)
class Block:
    """The next channels a group loses together."""

    group: str
    channels: Channels
    key: float


def group_scores(
    scores: Scores, structure: Structure, ranking: Ranking, widths: Mapping[str, int] | None = None
) -> GroupScores:
    """Scores of layers as scores of groups.

    Scores are normalised within their layer, scattered to the channels of the
    group (a layer may hold several entries of one channel), reduced over the
    layers that make a channel and have a score, and averaged over the channels
    of a unit. A group is not scored if one of its channels is not.
    ``widths``: output channels of the layers; what the groups say without it.

    Raises
    ------
    MismatchError
        If a layer has another width than its scores: they are of another state
        of the network.
    NonFiniteError
    """
    ranking = ranking.settled(structure)
    values: dict[str, Tensor] = {}
    unscored: dict[str, str] = {}
    sizes = {**_sizes(structure), **(widths or {})}
    for g in structure.prunable:
        rows: list[Tensor] = []
        made: list[Tensor] = []
        why = ""
        if scores.level == "group":
            why = scores.unscored.get(g.name, "")
            if g.name in scores.values:
                rows = [_normalised(_checked(scores, g.name, g.width), ranking.normalisation)]
                made = [torch.ones(g.width, dtype=torch.bool)]
        else:
            for m in g.members:
                if m.axis != "out":
                    continue
                if m.layer not in scores.values:
                    why = why or scores.unscored.get(m.layer, "")
                    continue
                own = _normalised(_checked(scores, m.layer, sizes[m.layer]), ranking.normalisation)
                row = torch.zeros(g.width, dtype=torch.float64)
                at = [(j, i) for j, entries in enumerate(m.index) for i in entries]
                channels, entries = (torch.tensor(side, dtype=torch.int64) for side in zip(*at, strict=True))
                rows.append(row.index_add_(0, channels, own[entries]))
                made.append(torch.zeros(g.width, dtype=torch.bool).index_fill_(0, channels, True))
        if not rows:
            unscored[g.name] = why or f"{scores.name} gives it no score"
        elif not bool(torch.stack(made).any(0).all()):
            unscored[g.name] = why or f"{scores.name} gives some of its channels no score"
        else:
            values[g.name] = _tied(_reduced(torch.stack(rows), torch.stack(made), ranking.reduction), g)
    return GroupScores(values, unscored)


def _sizes(structure: Structure) -> dict[str, int]:
    """Layer to its output channels, as far as the groups know them."""
    out: dict[str, int] = {}
    for g in structure.groups:
        for m in g.members:
            if m.axis == "out":
                out[m.layer] = max(out.get(m.layer, 0), 1 + max((i for e in m.index for i in e), default=-1))
    return out


def _checked(scores: Scores, layer: str, size: int) -> Tensor:
    own = scores.values[layer].detach().double().cpu()
    if own.shape != (size,):
        raise MismatchError(
            f"the scores of '{layer}' do not fit the network",
            expected=f"{size} channels",
            got=f"scores of shape {tuple(own.shape)}",
            fix="score again: after a cut, old scores are of another network",
        )
    if not bool(own.isfinite().all()):
        raise NonFiniteError(
            f"the scores of '{layer}' are not finite",
            expected="finite numbers",
            got=f"{int((~own.isfinite()).sum())} of {own.numel()} are NaN or infinite",
            fix="look at the samples and at the network's outputs on them",
        )
    return own


def _normalised(own: Tensor, how: str) -> Tensor:
    size = own.abs()
    divisor = {
        "none": torch.ones((), dtype=torch.float64),
        "sum": size.sum(),
        "mean": size.mean(),
        "l2": size.square().sum().sqrt(),
    }[how]
    return own / divisor if divisor > 0 else own  # a layer of zeros stays one


def _reduced(rows: Tensor, made: Tensor, how: str) -> Tensor:
    """Over layers; a layer has no say on channels that it does not make, where its row is zero."""
    if how == "sum":
        return rows.sum(0)
    if how == "mean":
        return rows.sum(0) / made.sum(0)
    if how == "max":
        return rows.masked_fill(~made, -math.inf).amax(0)
    first = made.int().argmax(0, keepdim=True)
    return rows.gather(0, first)[0]


def _tied(own: Tensor, group: Group) -> Tensor:
    """Channels of one unit share the mean of their scores, so that units of unequal size compare."""
    if all(len(unit) == 1 for unit in group.units):
        return own
    out = own.clone()
    for unit in group.units:
        out[list(unit)] = own[list(unit)].mean()
    return out


def order_of(scored: GroupScores, structure: Structure, ranking: Ranking) -> list[Block]:
    """All that may go, first to go first.

    Within a group, units go by (score, index), so ties are broken by place; one
    that is the last of a layer stays. Blocks of a group lead from one allowed width to the next. Over the groups,
    blocks go by the mean of their keys, then by the group's place.
    """
    ranking.check(structure)
    place = {g.name: k for k, g in enumerate(structure.groups)}
    shares = _keys(scored, structure, ranking.scope)
    blocks: list[tuple[float, int, int, Block]] = []
    for g in structure.prunable:
        if g.name not in scored.values:
            continue
        keys = shares[g.name]
        units = sorted(g.units, key=lambda unit: (keys[unit[0]], unit[0]))
        step, floor = ranking.block(g), ranking.kept(g)
        width, last = g.width, -math.inf
        pending: list[Channels] = []
        for unit in spared(g, units):
            if width - sum(len(u) for u in pending) - len(unit) < floor:
                break
            pending.append(unit)
            left = width - sum(len(u) for u in pending)
            if left % step == 0 and left:
                channels = tuple(sorted(j for u in pending for j in u))
                # rounding of the mean must not turn the order of a group round
                key = max(last, math.fsum(keys[j] for j in channels) / len(channels))
                last = key
                blocks.append((key, place[g.name], len(blocks), Block(g.name, channels, key)))
                width, pending = left, []
    blocks.sort(key=lambda item: item[:3])
    return [block for *_, block in blocks]


def spared(group: Group, units: Iterable[Channels]) -> Iterator[Channels]:
    """The units in this order, without those that would leave a layer nothing once the ones before them are gone."""
    left = {part: len(part) for part in group.parts}
    for unit in units:
        own = {part: len(part.intersection(unit)) for part in left}
        if any(n and n == left[part] for part, n in own.items()):
            continue
        for part, n in own.items():
            left[part] -= n
        yield unit


def _keys(scored: GroupScores, structure: Structure, scope: str) -> dict[str, list[float]]:
    """What is compared over the network: the score, or its rank in the scope as a share."""
    if scope == "global":
        return {name: t.tolist() for name, t in scored.values.items()}
    families: dict[Any, list[Group]] = defaultdict(list)
    for g in structure.prunable:
        if g.name in scored.values:
            families[g.name if scope == "local" else g.shape].append(g)
    out: dict[str, list[float]] = {}
    for groups in families.values():
        _share_of(groups, scored, out)
    return out


def _share_of(groups: Sequence[Group], scored: GroupScores, out: dict[str, list[float]]) -> None:
    values = [scored.values[g.name].tolist() for g in groups]
    ranked = sorted((values[k][unit[0]], k, unit[0], unit) for k, g in enumerate(groups) for unit in g.units)
    total, before = sum(g.width for g in groups), 0
    for g in groups:
        out[g.name] = [0.0] * g.width
    for _, k, _, unit in ranked:
        share = (before + len(unit) / 2) / total
        before += len(unit)
        for j in unit:
            out[groups[k].name][j] = share
