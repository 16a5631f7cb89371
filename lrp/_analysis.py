"""What the planner finds out about a graph, as the program builder and the weights need it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from lrp._form import Form
from lrp._graph import Captured
from lrp._linear import LinearLike
from lrp.composites import Composite
from lrp.registry import Registered
from lrp.rules import Rule


@dataclass
class Treatment:
    """How one node that relevance reaches is run.

    ``kind``: native | unit | elementwise | norm | batch_norm | product | fixed |
    attention | softmax | custom | gradient | region; in gradient methods native | rectified.
    ``live`` are the operands that relevance goes to.
    """

    kind: str
    live: tuple[fx.Node, ...]
    why: str = ""
    registered: Registered | None = None
    region: str = ""  # the module call that runs by its gradient as a whole


@dataclass
class UnitPlan:
    """A linear layer of the plan, with what is folded or fused into it."""

    name: str
    node: fx.Node
    op: LinearLike
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    bn_before: fx.Node | None = None
    passed: tuple[fx.Node, ...] = ()  # what stands between the two and does nothing, the nearest first
    bn: fx.Node | None = None
    relu: fx.Node | None = None
    rule: Rule | None = None
    form: Form | None = None
    why: str = ""
    types: tuple[type, ...] = ()
    sink: list[fx.Node] | None = None  # operations between the model's input and x, innermost last
    sink_input: fx.Node | None = None

    @property
    def result(self) -> fx.Node:
        return self.relu or self.bn or self.node

    @property
    def reads(self) -> fx.Node:
        """The operand itself; x, where nothing is folded in from the front."""
        return (*self.passed, self.bn_before or self.x)[0]

    @property
    def folds(self) -> list[fx.Node]:
        """The batch normalisations folded into the weights."""
        return [bn for bn in (self.bn_before, self.bn) if bn is not None]


@dataclass
class Row:
    """One line of the printed plan."""

    layer: str
    rule: str
    form: str
    products: str
    why: str


@dataclass
class Analysis:
    """Everything the program builder needs."""

    captured: Captured
    composite: Composite
    treatments: dict[fx.Node, Treatment]
    units: list[UnitPlan]
    by_node: dict[fx.Node, UnitPlan]  # linear node, norm folded from behind and fused ReLU -> unit
    absorbed: set[fx.Node]  # norms folded into the layer behind them, and what is between: they do not run
    rows: list[Row]
    unreached: dict[str, str]  # module call -> reason
    channel_axis: dict[fx.Node, int] = field(default_factory=dict)
    low: torch.dtype | None = None  # what autocast asks for
    idle: list[str] = field(default_factory=list)  # entries of the composite that fit no layer
