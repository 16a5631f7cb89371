"""Criteria: what a filter is worth to a network.

A criterion gives every output channel of every layer a number, higher = more
important. It is named by a text, options after colons, or made here:

>>> import compress
>>> compress.criteria.lrp("zplus", aggregate="signed").name
'lrp:zplus'
>>> compress.criteria.criterion_of("taylor:published").settings["aggregate"]
'abs_total'
>>> sorted(compress.criteria.CRITERIA)[:3]
['ablation', 'activation', 'batchnorm_scale']

Data-based scores are means over the samples. With c the contribution of a
sample n at a position p of a channel, ``aggregate`` makes them one number as in
:func:`lrp.collect`: "signed" (sum of all c), "abs_element" (of all \\|c\\|),
"abs_per_sample" (\\|sum over p\\|, then over n), "abs_total" (\\|sum of all\\|: the
form of the published baselines, in which samples cancel).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "CRITERIA": "_names",
    "Criterion": "scores",
    "Scores": "scores",
    "ablation": "ablations",
    "activation": "activations",
    "batchnorm_scale": "weights",
    "captum": "external",
    "criterion_of": "scores",
    "fpgm": "weights",
    "gradient": "gradients",
    "hessian": "curvature",
    "logit_x_activation": "gradients",
    "lrp": "relevance",
    "random": "chance",
    "taylor": "gradients",
    "torch_pruning": "external",
    "tp_taylor": "external",
    "weight": "weights",
}
__all__ = [
    "CRITERIA",
    "Criterion",
    "Scores",
    "ablation",
    "activation",
    "batchnorm_scale",
    "captum",
    "criterion_of",
    "fpgm",
    "gradient",
    "hessian",
    "logit_x_activation",
    "lrp",
    "random",
    "taylor",
    "torch_pruning",
    "tp_taylor",
    "weight",
]

if TYPE_CHECKING:
    from compress.criteria._names import CRITERIA
    from compress.criteria.ablations import ablation
    from compress.criteria.activations import activation
    from compress.criteria.chance import random
    from compress.criteria.curvature import hessian
    from compress.criteria.external import captum, torch_pruning, tp_taylor
    from compress.criteria.gradients import gradient, logit_x_activation, taylor
    from compress.criteria.relevance import lrp
    from compress.criteria.scores import Criterion, Scores, criterion_of
    from compress.criteria.weights import batchnorm_scale, fpgm, weight


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"compress.criteria.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'compress.criteria' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
