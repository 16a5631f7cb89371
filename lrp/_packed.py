"""Rows of a packed projection that relevance never reaches: queries and keys beside values.

One linear layer may compute several things that are taken apart afterwards. If
some of them are held fixed, their rows get no relevance by rule, and must not
be taken for irrelevant ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from lrp._analysis import Treatment, UnitPlan
from lrp._graph import Captured, Sizes
from lrp._vocabulary import REARRANGES, functional

aten = torch.ops.aten

# what takes a tensor apart without computing anything
MOVES = REARRANGES | {
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    operator.getitem,
}


def _known(arg: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of an operand for two samples; sizes are numbers."""
    return values[arg] if arg in values else Sizes((arg.meta["val"],))(2)[0]


def unreached_rows(
    unit: UnitPlan, captured: Captured, treatments: dict[fx.Node, Treatment], axis: int
) -> list[tuple[int, int, fx.Node]]:
    """(first, last + 1, an operation that holds them fixed) of every run of rows without relevance.

    The pieces of the layer's output are followed through everything that only
    moves elements; a row is reached if one of its elements is.
    """
    start = unit.result
    whole = torch.zeros(Sizes(captured.info[start].shape)(2)).requires_grad_()
    values: dict[fx.Node, Any] = {start: whole}
    reached: list[Tensor] = []
    fixed: list[fx.Node] = []
    for node in captured.graph.nodes:
        pieces = [a for a in node.all_input_nodes if a in values]
        if not pieces:
            continue
        others = [a for a in node.all_input_nodes if a not in values]
        sizes = all(isinstance(a.meta.get("val"), (int, torch.SymInt)) for a in others)
        target: Callable[..., Any] = functional(node.target) if node.op == "call_function" else node.target
        if node.op == "call_function" and target in MOVES and sizes:
            args, kwargs = (fx.node.map_arg(given, lambda a: _known(a, values)) for given in (node.args, node.kwargs))
            values[node] = target(*args, **kwargs)
            continue
        treatment = treatments.get(node)
        for piece in pieces:
            if node.op == "output" or (treatment is not None and piece in treatment.live):
                reached.append(values[piece])
            else:
                fixed.append(node)
    if not fixed or not all(isinstance(r, Tensor) for r in reached):
        return []
    total = torch.stack([r.sum() for r in reached]).sum() if reached else whole.sum() * 0
    (seen,) = torch.autograd.grad(total, whole)
    rows = (seen != 0).movedim(axis, 0).flatten(1).any(1).tolist()
    out, at = [], 0
    for live, run in groupby(rows):
        length = len(list(run))
        if not live:
            out.append((at, at + length, fixed[0]))
        at += length
    return out
