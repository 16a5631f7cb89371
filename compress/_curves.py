"""One network pruned to many rates: what sensitivity, comparison and composite search have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress._cells import Cells, Key
from compress.batchnorm import reestimate_
from compress.costs import CostTable
from compress.criteria.scores import Scores
from compress.evaluation import Evaluator
from compress.groups import Structure
from compress.planning import plan_pruning
from compress.target import Target
from lrp.errors import InputError

__all__ = ["QUANTITIES", "Bench", "evaluator", "groups_of", "scores_in", "unpruned_cell"]

QUANTITIES = ("channels", "macs", "params")


@dataclass(frozen=True)
class Bench:
    """A network, what it is made of, and how it is measured.

    Attributes
    ----------
    model : nn.Module
    example_inputs : Tensor or tuple
    structure : Structure
    table : CostTable
    evaluate : callable
        Model to Evaluation.
    ranking : dict
        Options of :func:`compress.plan_pruning`.
    quantity : str
        What a rate is a share of.
    """

    model: nn.Module
    example_inputs: Any
    structure: Structure
    table: CostTable
    evaluate: Evaluator
    ranking: Mapping[str, Any]
    quantity: str = "channels"
    device: torch.device | str | None = None

    def check(self, rate: float) -> None:
        """Raise BudgetError, before any scoring, if so much can not be removed."""
        zeros = {}
        for g in self.structure.prunable:
            zeros[g.name] = torch.zeros(g.width, dtype=torch.float64)
        self._plan(Scores(values=zeros, unscored={}, name="none", settings={}, samples=0, level="group"), rate, {})

    def _plan(self, scores: Scores, rate: float, options: Mapping[str, Any]) -> Any:
        return plan_pruning(
            self.model,
            self.example_inputs,
            None,
            criterion="weight",  # not asked: the scores are at hand
            target=Target(**{self.quantity: 1.0 - rate}),
            scores=scores,
            structure=self.structure,
            table=self.table,
            **{**self.ranking, **options},
        )

    def measured(self, scores: Scores, rate: float, options: Mapping[str, Any], bn_data: Any = None) -> dict[str, Any]:
        """Accuracy and what was removed, of the network cut to a rate; statistics re-estimated where there are data."""
        plan = self._plan(scores, rate, options)
        small = plan.apply(self.model)
        if bn_data is not None:
            reestimate_(small, bn_data, device=self.device)
        before, after = plan.before, plan.after
        gone = {name: 1 - getattr(after, name) / max(1, getattr(before, name)) for name in QUANTITIES}
        return {"accuracy": self.evaluate(small).accuracy, "removed": gone}


def groups_of(structure: Structure) -> list[Any]:
    """What is scored and cut, as a setting of cells."""
    return [[g.name, g.width, len(g.units), list(g.producers)] for g in structure.prunable]


def evaluator(found: Evaluator | None) -> Evaluator:
    """The evaluator, which these analyses can not do without.

    Raises
    ------
    InputError
    """
    if found is None:
        raise InputError(
            "evaluate is missing",
            expected="labelled batches, or a function from a model to a number",
            got="None",
            fix="pass evaluate=[(x, y)], on samples apart from the reference samples",
        )
    return found


def scores_in(cells: Cells, key: Key, compute: Callable[[], Scores]) -> Scores:
    """Scores kept as a cell, so that a run that goes on ranks by the very same numbers."""

    def plain() -> dict[str, Any]:
        s = compute()
        return {
            "values": {name: t.detach().double().cpu().tolist() for name, t in s.values.items()},
            "unscored": dict(s.unscored),
            "name": s.name,
            "settings": s.settings,
            "samples": s.samples,
            "level": s.level,
        }

    held = cells.value(key, plain)
    values = {name: torch.tensor(row, dtype=torch.float64) for name, row in held["values"].items()}
    return Scores(**{**held, "values": values})


def unpruned_cell(found: Any) -> dict[str, Any]:
    """What is kept of the evaluation of the whole network."""
    return {"accuracy": found.accuracy, "count": found.count}
