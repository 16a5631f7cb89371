"""Relevance-guided pruning and low-bit quantization of CNNs: score, plan, cut, train, measure, save, export.

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
    "BitAllocation": "compress.bit_allocation",
    "Costs": "compress.costs",
    "Distillation": "compress.training",
    "Evaluation": "compress.evaluation",
    "FineTune": "compress.training",
    "Group": "compress.groups",
    "Iterative": "compress.schedules",
    "OneShot": "compress.schedules",
    "PruneResult": "compress.pruning",
    "PruningPlan": "compress.plan",
    "QuantizationPlan": "compress.quantization_plan",
    "QuantizationReport": "compress.quantization_report",
    "QuantizeResult": "compress.quantization",
    "Quantizer": "compress.quantizer",
    "QuantizerComparison": "compress.quantizer_comparison",
    "Ranking": "compress.ranking",
    "Rate": "compress.rate",
    "Report": "compress.reporting",
    "Scores": "compress.criteria.scores",
    "Structure": "compress.groups",
    "Target": "compress.target",
    "WeightRelevance": "compress.weight_relevance",
    "ZeroCost": "compress.zero_cost",
    "allocate_bits": "compress.bit_allocation",
    "compare": "compress.comparison",
    "compare_quantizers": "compress.quantizer_comparison",
    "count": "compress.costs",
    "evaluate": "compress.evaluation",
    "export_onnx": "compress.exporting",
    "export_program": "compress.exporting",
    "find_groups": "compress.groups",
    "load": "compress.storage",
    "measure": "compress.measurement",
    "plan_pruning": "compress.planning",
    "prune": "compress.pruning",
    "quantize": "compress.quantization",
    "reestimate": "compress.batchnorm",
    "report": "compress.reporting",
    "save": "compress.storage",
    "score": "compress.planning",
}
_MODULES = (
    "criteria",
    "drift",
    "measurement",
    "meters",
    "plots",
    "quantization_plan",
    "quantization_plots",
    "search",
    "sensitivity",
    "stability",
    "stages",
)
__all__ = [
    "BitAllocation",
    "Costs",
    "Distillation",
    "Evaluation",
    "FineTune",
    "Group",
    "Iterative",
    "OneShot",
    "PruneResult",
    "PruningPlan",
    "QuantizationPlan",
    "QuantizationReport",
    "QuantizeResult",
    "Quantizer",
    "QuantizerComparison",
    "Ranking",
    "Rate",
    "Report",
    "Scores",
    "Structure",
    "Target",
    "WeightRelevance",
    "ZeroCost",
    "allocate_bits",
    "compare",
    "compare_quantizers",
    "count",
    "criteria",
    "drift",
    "evaluate",
    "export_onnx",
    "export_program",
    "find_groups",
    "load",
    "measure",
    "meters",
    "plan_pruning",
    "plots",
    "prune",
    "quantize",
    "reestimate",
    "report",
    "save",
    "score",
    "search",
    "sensitivity",
    "stability",
]

if TYPE_CHECKING:
    from compress import criteria as criteria
    from compress import drift, meters, plots, search, sensitivity, stability
    from compress.batchnorm import reestimate
    from compress.bit_allocation import BitAllocation, allocate_bits
    from compress.comparison import compare
    from compress.costs import Costs, count
    from compress.criteria.scores import Scores
    from compress.evaluation import Evaluation, evaluate
    from compress.exporting import export_onnx, export_program
    from compress.groups import Group, Structure, find_groups
    from compress.measurement import measure
    from compress.plan import PruningPlan
    from compress.planning import plan_pruning, score
    from compress.pruning import PruneResult, prune
    from compress.quantization import QuantizeResult, quantize
    from compress.quantization_plan import QuantizationPlan
    from compress.quantization_report import QuantizationReport
    from compress.quantizer import Quantizer
    from compress.quantizer_comparison import QuantizerComparison, compare_quantizers
    from compress.ranking import Ranking
    from compress.rate import Rate
    from compress.reporting import Report, report
    from compress.schedules import Iterative, OneShot
    from compress.storage import load, save
    from compress.target import Target
    from compress.training import Distillation, FineTune
    from compress.weight_relevance import WeightRelevance
    from compress.zero_cost import ZeroCost


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"compress.{name}")
    raise AttributeError(f"module 'compress' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
