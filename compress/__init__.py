"""Relevance-guided pruning of CNNs: score, plan, cut, measure, save, export.

>>> import torch, compress
>>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 2))
>>> data = [(torch.randn(10, 1, 4, 4), torch.randint(2, (10,)))]
>>> plan = compress.plan_pruning(net, torch.randn(1, 1, 4, 4), data, target=compress.Target(macs=0.5))
>>> small = plan.apply(net)
>>> small[0].out_channels
4

Names are imported on first use, so that ``python -m compress --help`` needs no
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Costs": "compress.costs",
    "Group": "compress.groups",
    "PruningPlan": "compress.plan",
    "Ranking": "compress.ranking",
    "Scores": "compress.criteria.scores",
    "Structure": "compress.groups",
    "Target": "compress.target",
    "count": "compress.costs",
    "find_groups": "compress.groups",
    "plan_pruning": "compress.planning",
    "score": "compress.planning",
}
_MODULES = ("criteria",)
__all__ = [
    "Costs",
    "Group",
    "PruningPlan",
    "Ranking",
    "Scores",
    "Structure",
    "Target",
    "count",
    "criteria",
    "find_groups",
    "plan_pruning",
    "score",
]

if TYPE_CHECKING:
    from compress import criteria
    from compress.costs import Costs, count
    from compress.criteria.scores import Scores
    from compress.groups import Group, Structure, find_groups
    from compress.plan import PruningPlan
    from compress.planning import plan_pruning, score
    from compress.ranking import Ranking
    from compress.target import Target


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"compress.{name}")
    raise AttributeError(f"module 'compress' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
