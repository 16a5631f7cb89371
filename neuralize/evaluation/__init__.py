"""Judging relevances: ours, or any other tool's.

A matrix of relevances says which columns matter to a score. These functions
ask the score itself: columns are removed in the order of their relevance,
clusterings are refitted without them, rows are perturbed.

>>> from neuralize import neuralize
>>> from neuralize.evaluation import srg
>>> from sklearn.cluster import KMeans
>>> from sklearn.datasets import load_iris
>>> X = load_iris().data
>>> net = neuralize(KMeans(3, random_state=0, n_init=1).fit(X))
>>> gain = srg(net, X, net.explain(X), imputer="mean")
>>> gain.value > 3 * gain.standard_error > 0
True

An imputer that agrees with a method's own baseline favours that method, and
removing columns leaves the data: use several imputers, and read every number
beside those of :func:`random_values` and :func:`sensitivity`, as
:func:`compare` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "ConditionalKDE": "densities",
    "Estimate": "estimates",
    "FlippingCurve": "flipping",
    "Gain": "flipping",
    "Imputer": "imputers",
    "Infidelity": "faithfulness",
    "Marginal": "imputers",
    "Mean": "imputers",
    "NearestMidpoint": "imputers",
    "OtherCluster": "imputers",
    "Stability": "faithfulness",
    "compare": "comparison",
    "flip": "flipping",
    "gradient": "controls",
    "gradient_x_input": "controls",
    "infidelity": "faithfulness",
    "max_sensitivity": "faithfulness",
    "occlusion": "controls",
    "random_values": "controls",
    "refit_after_removal": "refits",
    "sensitivity": "controls",
    "srg": "flipping",
}
__all__ = [
    "ConditionalKDE",
    "Estimate",
    "FlippingCurve",
    "Gain",
    "Imputer",
    "Infidelity",
    "Marginal",
    "Mean",
    "NearestMidpoint",
    "OtherCluster",
    "Stability",
    "compare",
    "flip",
    "gradient",
    "gradient_x_input",
    "infidelity",
    "max_sensitivity",
    "occlusion",
    "random_values",
    "refit_after_removal",
    "sensitivity",
    "srg",
]

if TYPE_CHECKING:
    from neuralize.evaluation.comparison import compare
    from neuralize.evaluation.controls import gradient, gradient_x_input, occlusion, random_values, sensitivity
    from neuralize.evaluation.densities import ConditionalKDE
    from neuralize.evaluation.estimates import Estimate
    from neuralize.evaluation.faithfulness import Infidelity, Stability, infidelity, max_sensitivity
    from neuralize.evaluation.flipping import FlippingCurve, Gain, flip, srg
    from neuralize.evaluation.imputers import Imputer, Marginal, Mean, NearestMidpoint, OtherCluster
    from neuralize.evaluation.refits import refit_after_removal


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"neuralize.evaluation.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'neuralize.evaluation' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
