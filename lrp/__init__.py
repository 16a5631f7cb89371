"""Layer-wise Relevance Propagation: exact, in one backward pass.

>>> import lrp
>>> sorted(lrp.__all__)[:3]
['Composite', 'First', 'Ledger']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Composite": "lrp.composites",
    "First": "lrp.composites",
    "Ledger": "lrp.relevance",
    "LedgerRow": "lrp.relevance",
    "Plan": "lrp.plan",
    "Relevance": "lrp.relevance",
    "RelevanceSum": "lrp.collection",
    "Seed": "lrp.seeds",
    "attribute": "lrp.attribution",
    "collect": "lrp.collection",
    "prepare": "lrp.plan",
    "register": "lrp.registry",
}
_MODULES = ("composites", "errors", "plots", "rules")
__all__ = [
    "Composite",
    "First",
    "Ledger",
    "LedgerRow",
    "Plan",
    "Relevance",
    "RelevanceSum",
    "Seed",
    "attribute",
    "collect",
    "composites",
    "errors",
    "plots",
    "prepare",
    "register",
    "rules",
]

if TYPE_CHECKING:
    from lrp import composites, errors, plots, rules
    from lrp.attribution import attribute
    from lrp.collection import RelevanceSum, collect
    from lrp.composites import Composite, First
    from lrp.plan import Plan, prepare
    from lrp.registry import register
    from lrp.relevance import Ledger, LedgerRow, Relevance
    from lrp.seeds import Seed


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"lrp.{name}")
    raise AttributeError(f"module 'lrp' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
