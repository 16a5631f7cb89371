"""Planning: from scores and a target to the channels that go."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress._dependencies import version
from compress._network import example_of, network_of, normal_mode
from compress._proof import prove_removal
from compress.costs import CostTable, Running
from compress.criteria.scores import Scores, criterion_of
from compress.groups import Structure, as_inputs, find_groups, layers_of
from compress.plan import PruningPlan
from compress.ranking import Block, GroupScores, Ranking, group_scores, order_of
from compress.target import Target
from lrp.errors import BudgetError, InputError, MismatchError, StructureError

__all__ = ["plan_pruning", "score"]


@normal_mode()
def score(
    model: nn.Module,
    example_inputs: Any,
    data: Any = None,
    *,
    criterion: Any = "lrp",
    structure: Structure | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Scores:
    """Scores of all layers that could lose channels; one pass serves many plans.

    Parameters
    ----------
    model, example_inputs, data, criterion, device, progress
        As in :func:`plan_pruning`.
    structure : Structure, optional
        What :func:`compress.find_groups` returned; found here if missing.

    Returns
    -------
    Scores

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> compress.score(net, torch.randn(1, 4), criterion="weight").values["0"].shape
    torch.Size([8])
    """
    model, example_inputs = network_of(model), example_of(example_inputs)
    found = structure or find_groups(model, example_inputs)
    chosen = criterion_of(criterion)
    return chosen(
        model, data, found.layers, device=device, progress=progress, structure=found, example_inputs=example_inputs
    )


@normal_mode()
def plan_pruning(
    model: nn.Module,
    example_inputs: Any,
    data: Any = None,
    *,
    criterion: Any = "lrp",
    target: Target,
    normalisation: str | None = None,
    reduction: str | None = None,
    scope: str | None = None,
    floor: Any = None,
    round_to: Any = None,
    protect: Sequence[str] | str = (),
    allow: Sequence[str] | str = (),
    scores: Scores | None = None,
    structure: Structure | None = None,
    table: CostTable | None = None,
    meter: Any = None,
    latency_cache: str | os.PathLike[str] | None = None,
    done: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> PruningPlan:
    """Choose the channels to remove; nothing is cut.

    Parameters
    ----------
    model : nn.Module
        Left as it is. Of one in a wrapper (``torch.compile``, DataParallel,
        DistributedDataParallel) the network inside is meant: the plan has its
        names, and fits it with and without wrappers.
    example_inputs : Tensor or tuple
        What the model is called with.
    data : iterable of batches, optional
        ``(x, y)`` or ``x``, a DataLoader or a list; not needed by criteria of
        the weights alone.
    criterion : str, Criterion or callable
        See :data:`compress.criteria.CRITERIA`; a callable ``f(model, data)``
        returns {layer: scores (C,)}, higher = more important.
    target : Target
        What may remain. Reached <= target, and no block that was removed could
        be put back without exceeding it; for a latency, see the notes.
    normalisation, reduction, scope, floor, round_to
        See :class:`compress.Ranking`, whose defaults hold where None is given.
    protect, allow
        See :func:`compress.find_groups`.
    scores, structure, table : optional
        Results of earlier calls to use again: :func:`score`,
        :func:`compress.find_groups`, ``plan.table``.
    meter : callable, optional
        For a latency target: path of an ONNX file to milliseconds. Default:
        onnxruntime on this machine.
    latency_cache : path, optional
        A file in which times of single layers are kept for later plans; a meter
        of your own needs an attribute ``identity`` for it. See
        :class:`compress.latency.LatencyTable`.
    done : dict, optional
        What is done to the network after the cut, JSON-able: "fine_tune" (the
        name of a function, or None), "reestimate_batchnorm", ... It travels with
        the plan and in the file of the network, for reports on them, and counts
        as bytes there. :func:`compress.prune` fills it in.
    device : torch.device or str, optional
        For scoring.
    progress : bool
        Bars on stderr, on a terminal only.

    Returns
    -------
    PruningPlan

    Raises
    ------
    BudgetError
        Before any scoring, if the target can not be met; after it, if groups
        without a score would be needed.
    StructureError
        If the forward pass looks at widths, so that it does something else at
        those that the plan would leave.
    InputError, NonFiniteError

    Notes
    -----
    Greedy: blocks (single units, or as many as one step of ``round_to``) go in
    the order of the ranking until the target is met; then those that fit are
    put back, most important first. The plan is tried once: on random weights,
    the cut network gives what the masked one gives. Cost beyond scoring: one
    trace, the proof of the structure, O(channels) steps, and two forward passes
    of a copy in float64.

    A latency target asks the meter for single layers, at each width that is
    looked at (30 files for a ResNet-20, some 230 for a MobileNetV2; a
    ``latency_cache`` keeps them), and for 34 whole networks at most: 2 to see
    whether it can be met, 16 to find a place, 16 as blocks are put back. What
    is returned was measured to be within the target. Of every group, one block
    more was measured to exceed it, but for as many groups as
    ``plan.settings["latency_ms"]["groups_untried"]`` says, where the 16 did not
    suffice. That no block could be put back follows if the meter gives the same
    time for the same file, and no less for more channels; times that are noisy
    promise what was measured, and no more.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> data = [(torch.randn(10, 4), torch.randint(2, (10,)))]
    >>> compress.plan_pruning(net, torch.randn(1, 4), data, target=compress.Target(macs=0.5)).after.macs <= 24
    True
    """
    if not isinstance(target, Target):
        raise InputError(
            "target is no Target",
            expected="compress.Target(macs=0.5) or another of its five quantities",
            got=repr(target),
            fix="name the quantity",
        )
    model, example_inputs = network_of(model), example_of(example_inputs)
    started = time.monotonic()
    given = {
        "normalisation": normalisation,
        "reduction": reduction,
        "scope": scope,
        "floor": floor,
        "round_to": round_to,
    }
    ranking = Ranking(**{name: value for name, value in given.items() if value is not None})
    found = structure_for(model, example_inputs, structure, protect, allow)
    refuse_rigid(found, target)
    costs = CostTable.of(model, example_inputs, found) if table is None else _fitting(table, model, found)
    ranking.check(found)
    ranking = ranking.settled(found)
    chosen = criterion_of(criterion)
    search = None
    if target.kind == "latency_ms":
        from compress._latency_search import LatencySearch

        search = LatencySearch(model, example_inputs, target, found, costs, meter, latency_cache, progress)
        search.check(_everything(found, ranking))
    else:
        _refuse(target, _reachable(found, costs, ranking), costs, "")
    given_scores = scores or score(
        model, example_inputs, data, criterion=chosen, structure=found, device=device, progress=progress
    )
    widths = {name: before for name, (before, _) in costs.widths({}).items()}
    scored = group_scores(given_scores, found, ranking, widths)
    blocks = order_of(scored, found, ranking)
    settings = {
        "criterion": {"name": given_scores.name, **given_scores.settings},
        "samples": given_scores.samples,
        "ranking": ranking.to_json(),
        "target": target.to_json(),
        "torch_pruning": version(),
        **({} if done is None else {"done": dict(done)}),
    }

    def plan_of(removed: dict[str, tuple[int, ...]]) -> PruningPlan:
        kept = {name: tuple(t.tolist()) for name, t in scored.values.items()}
        spent = {"seconds": round(time.monotonic() - started, 3)}
        return PruningPlan(found, costs, removed, kept, scored.unscored, {**settings, **spent})

    if search is not None:
        plan = search.plan(blocks, plan_of)
    else:
        limit = target.absolute(costs.costs({}))
        if target.kind == "bytes":
            plan = _within_file(model, found, costs, blocks, scored, target, limit, plan_of)
        else:
            plan = plan_of(select(found, costs, blocks, target, limit, scored))
    with torch.inference_mode(False):
        prove_removal(model, as_inputs(example_inputs), found, plan.removed)
    return plan


def refuse_rigid(structure: Structure, target: Target) -> None:
    """Raise StructureError if a share of the channels is asked of a network without any that can go."""
    if structure.prunable or target.kind != "channels" or target.absolute(1.0) >= 1:
        return
    held = ", ".join(f"'{g.name}' ({g.protected})" for g in structure.groups[:3])
    raise StructureError(
        "nothing can be removed from this network",
        expected="a group of channels that is not protected",
        got=f"{len(structure.groups)} protected groups: {held}",
        fix="print(compress.find_groups(...)) lists the reasons",
    )


def structure_for(
    model: nn.Module, example_inputs: Any, given: Structure | None, protect: Any, allow: Any
) -> Structure:
    """The groups, found or given, with what the user protects."""
    if given is None:
        return find_groups(model, example_inputs, protect=protect, allow=allow)
    if allow:
        raise InputError(
            "allow= comes too late for a structure that is given",
            expected="allow= of find_groups",
            got=f"structure= and allow={allow!r}",
            fix="pass it to compress.find_groups",
        )
    given.check(model)
    named = layers_of(model, protect, "protect")
    reasons = {}
    for g in given.groups:
        if named & {m.layer for m in g.members if m.axis == "out"}:
            reasons[g.name] = "the user protects it"
    return given.protecting(reasons)


def _fitting(table: CostTable, model: nn.Module, structure: Structure) -> CostTable:
    """The table for these groups, if it is of a network of this model's shapes."""
    found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if table.shapes() != found:
        raise MismatchError(
            "the table is of another network",
            expected="tensors of the model's names and shapes",
            got="others",
            fix="leave table= out, or use plan.table of a plan for this model",
        )
    return table if table.structure == structure else CostTable.from_json(table.to_json(), structure)


def select(
    structure: Structure,
    table: CostTable,
    blocks: Sequence[Block],
    target: Target,
    limit: float,
    scored: GroupScores | None = None,
) -> dict[str, tuple[int, ...]]:
    """Greedy removal down to the limit, then putting back what fits; group to channels."""
    state = table.running()
    taken: list[Block] = []
    for block in blocks:
        if getattr(state, target.kind) <= limit:
            break
        state.take(structure[block.group], block.channels)
        taken.append(block)
    if getattr(state, target.kind) > limit:
        why = "; ".join(f"'{n}': {w}" for n, w in list(scored.unscored.items())[:3]) if scored else ""
        _refuse(target, state, table, f"groups without a score stay ({why})" if why else "")
    full: set[str] = set()
    for block in reversed(list(taken)):
        if block.group in full:
            continue  # a block comes back only after all that its group lost later
        state.give(structure[block.group], block.channels)
        if getattr(state, target.kind) <= limit:
            taken.remove(block)
        else:
            state.take(structure[block.group], block.channels)
            full.add(block.group)
    out: dict[str, list[int]] = {}
    for block in taken:
        out.setdefault(block.group, []).extend(block.channels)
    return {name: tuple(sorted(channels)) for name, channels in out.items()}


def _reachable(structure: Structure, table: CostTable, ranking: Ranking) -> Running:
    """Costs with everything gone that the floors and the rounding let go."""
    state = table.running()
    for block in _everything(structure, ranking):
        state.take(structure[block.group], block.channels)
    return state


def _everything(structure: Structure, ranking: Ranking) -> list[Block]:
    """All blocks that may go, in no meaningful order."""
    scored = GroupScores({g.name: torch.zeros(g.width, dtype=torch.float64) for g in structure.prunable}, {})
    return order_of(scored, structure, ranking)


def _refuse(target: Target, least: Running, table: CostTable, why: str) -> None:
    """Raise BudgetError if even the least that can remain is more than the target."""
    before = table.costs({})
    limit, reached = target.absolute(before), getattr(least, target.kind)
    if reached <= limit:
        return
    total = getattr(before, target.kind)
    protected = [f"'{g.name}' ({g.protected})" for g in table.structure.groups if g.protected]
    held = why or f"protected: {', '.join(protected[:3])}{', ...' if len(protected) > 3 else ''}" if protected else why
    raise BudgetError(
        f"{target} can not be met",
        expected=f"{target.kind} <= {math.floor(limit):,}",
        got=f"{reached:,} of {total:,} ({reached / total:.1%}) with everything removed that may go; {held}",
        fix="ask for more, lower floor=, set round_to=1, or protect fewer layers",
    )


def _within_file(
    model: nn.Module,
    structure: Structure,
    table: CostTable,
    blocks: Sequence[Block],
    scored: GroupScores,
    target: Target,
    limit: float,
    plan_of: Any,
) -> PruningPlan:
    """A plan whose saved file, header and plan included, is within the limit."""
    from compress.storage import file_size

    before = file_size(model)
    if target.is_share:
        limit = target.absolute(float(before))
    inner = limit
    while True:
        plan: PruningPlan = plan_of(select(structure, table, blocks, target, inner, scored))
        size = file_size(plan.apply(model))
        if size <= limit:
            return dataclasses.replace(
                plan, settings={**plan.settings, "file_bytes": {"before": before, "after": size}}
            )
        inner -= size - limit
