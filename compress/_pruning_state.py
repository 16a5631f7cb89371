"""What a pruning run writes down: settings, evaluations and scores."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
from typing import Any

import torch

from compress._progress import Checkpoint
from compress.criteria.scores import Scores
from compress.evaluation import Evaluation
from compress.groups import Structure
from compress.plan import PruningPlan
from lrp._files import digest
from lrp._settings import _code, _plain

__all__ = ["evaluation_of", "left_of", "scores_of", "told"]


def told(value: Any) -> Any:
    """A setting as JSON-able values.

    Functions by name and code: what they refer to may change as they run, and
    their module is another one where it is the script that is started. What
    else decides, they may say by an attribute ``identity``.
    """
    identity = getattr(value, "identity", None)
    if callable(value) and isinstance(identity, str):
        return [_function(value), identity]
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, Scores):
        return [value.name, _plain(value.settings), digest(dict(value.values))]
    if isinstance(value, Structure):
        return hashlib.sha256(json.dumps(value.to_json()).encode()).hexdigest()
    if hasattr(value, "settings") and hasattr(value, "name"):
        return [value.name, _plain(value.settings)]
    if isinstance(value, types.MethodType):
        return told(value.__func__)
    if isinstance(value, functools.partial):
        return ["partial", told(value.func)]
    return _function(value) if callable(value) else _plain(value)


def _function(value: Any) -> str:
    """Of something that can be called, what it does by itself; of a class, what its instances do."""
    name = getattr(value, "__qualname__", type(value).__name__)
    inner = value if isinstance(value, types.FunctionType) else type(value).__call__
    if not isinstance(inner, types.FunctionType):
        return str(name)
    return f"{name} {hashlib.sha256(json.dumps(_code(inner.__code__)).encode()).hexdigest()}"


def evaluation_of(held: Checkpoint, part: str) -> Evaluation | None:
    stored = held.values[part]
    if stored is None:
        return None
    found, tensors = Evaluation.from_json(stored), held.tensors.get(part, {})
    return dataclasses.replace(
        found,
        labels=tensors.get("labels"),
        predictions=tensors.get("predictions"),
        outputs=int(stored["outputs"]),
    )


def scores_of(held: Checkpoint) -> Scores | None:
    stored = held.values.get("scores")
    return None if stored is None else Scores(values=dict(held.tensors.get("scores", {})), **stored)


def left_of(scores: Scores, plan: PruningPlan | None) -> Scores:
    """Scores of the channels that a plan leaves."""
    if plan is None:
        return scores
    gone: dict[str, set[int]] = {}
    for name, channels in plan.removed.items():
        if scores.level == "group":
            gone[name] = set(channels)
            continue
        for m in plan.structure[name].members:
            if m.axis == "out":
                gone.setdefault(m.layer, set()).update(m.of(channels))
    values = {}
    for name, own in scores.values.items():
        keep = [i for i in range(len(own)) if i not in gone.get(name, ())]
        values[name] = own[torch.tensor(keep, dtype=torch.int64)]
    return dataclasses.replace(scores, values=values)
