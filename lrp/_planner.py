"""The planner: which operation is treated how, and why.

Works backwards from the output: an operation the relevance reaches needs a
treatment; the operands that a treatment holds fixed (gates, queries and keys,
statistics) are not reached, and neither is what only they depend on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from lrp import registry
from lrp._analysis import Analysis, Row, Treatment, UnitPlan
from lrp._functions import cap, elementwise
from lrp._graph import Captured, Info
from lrp._layers import Layers, linear_op
from lrp._packed import unreached_rows
from lrp._vocabulary import (
    ADD,
    AVERAGES,
    CATS,
    DIV,
    GATES,
    HOMOGENEOUS,
    MATMUL,
    MUL,
    NORMS,
    REARRANGES,
    RSUB,
    SCATTERS,
    SDPA,
    SELECTS,
    SHAPED_LIKE,
    SOFTMAX,
    SUB,
    WHERES,
    functional,
    is_mutable,
    operand,
)
from lrp.composites import Composite
from lrp.errors import CompositeError, RuleError, UnsupportedOperationError
from lrp.registry import Registered

aten = torch.ops.aten


def _where(node: fx.Node, info: Info) -> str:
    return f"'{info.module}'" if info.module else "the model itself"


class Planner:
    """Builds an :class:`Analysis`; see the module's docstring."""

    def __init__(
        self, captured: Captured, composite: Composite, model: nn.Module, low: torch.dtype | None = None
    ) -> None:
        self.captured, self.composite, self.model, self.low = captured, composite, model, low
        self.info = captured.info
        self.treatments: dict[fx.Node, Treatment] = {}
        self.rows: list[Row] = []
        self.idle: list[str] = []

    # -- what the relevance reaches ----------------------------------------
    def _varying(self, node: fx.Node) -> list[fx.Node]:
        seen: dict[fx.Node, None] = {}
        for arg in node.all_input_nodes:
            if self.info[arg].varies:
                seen[arg] = None
        return list(seen)

    def _is_gate(self, node: fx.Node, gates: frozenset[Any], depth: int = 0) -> bool:
        """Whether a factor is a gate or a statistic: a bounded function, perhaps rescaled."""
        target = functional(node.target)
        if target in gates or (target is aten.pow.Tensor_Scalar and not _positive_int(node.args[1])):
            return True
        if target in (aten.hardtanh.default, aten.clamp.default, aten.relu6.default):
            return self.info[node].non_negative
        through = REARRANGES | SELECTS | AVERAGES | ADD | SUB | RSUB | MUL | DIV | {aten.masked_fill.Scalar}
        if depth < 12 and target in through:
            varying = self._varying(node)
            if target in SHAPED_LIKE:  # reads only the shape of its second operand
                varying = [v for v in varying if v is node.args[0]]
            elif target in DIV and node.args[0] in varying:
                varying = [v for v in varying if v is node.args[0]]  # the denominator is held fixed
            return len(varying) == 1 and self._is_gate(varying[0], gates, depth + 1)
        return False

    def treat(self, node: fx.Node) -> Treatment:
        """The treatment of a node that relevance reaches.

        Raises
        ------
        UnsupportedOperationError
            If there is no rule for it.
        """
        target, varying = functional(node.target), self._varying(node)
        val = node.meta.get("val")
        registered = registry.for_operation(target)
        if isinstance(val, torch.Tensor) and not val.is_floating_point():
            raise self._unsupported(node, f"a result of type {val.dtype}, which carries no relevance")
        if isinstance(val, torch.Tensor) and self.info[node].layout is None:
            raise self._unsupported(node, "a result in which the batch axis can not be followed (samples would mix)")
        if registered is not None:
            return self._custom(tuple(varying), registered)
        if linear_op(node, self.info) is not None:
            return Treatment("unit", tuple(varying[:1]))
        if target in HOMOGENEOUS:
            return self._homogeneous(node, target, varying)
        if target in ADD | SUB | RSUB | CATS | SCATTERS:
            return Treatment("native", tuple(varying), "sum: proportional")
        if target in MUL | MATMUL:
            return self._product(node, varying)
        if target in DIV:
            top, bottom = node.args[0], node.args[1]
            if isinstance(bottom, fx.Node) and self.info[bottom].varies:
                if isinstance(top, fx.Node) and self.info[top].varies and top is not bottom:
                    return Treatment("fixed", (top,), "denominator is a statistic: held fixed")
                raise self._unsupported(node, "division of a constant by the input")
            return Treatment("native", tuple(varying), "constant factor")
        if target is SDPA:
            query, key, value = (operand(node, i) for i in range(3))
            if operand(node, 3, "attn_mask") in varying:
                raise self._unsupported(node, "an attention mask that depends on the input")
            if self.composite.attention == "attn_lrp":
                why = "AttnLRP: half to v, a quarter each to q and k, the softmax's remainder is booked"
                return Treatment("attention", tuple(varying), why)
            if value in (query, key):
                raise self._unsupported(node, "attention whose values are its own keys or queries")
            return Treatment("fixed", (value,), "CP-LRP: q and k held fixed, all relevance to v")
        if target in SOFTMAX and self.composite.attention == "attn_lrp":
            return Treatment("softmax", tuple(varying), "AttnLRP: gradient, the Taylor remainder is booked")
        if target is aten.batch_norm.default:
            return Treatment("batch_norm", tuple(varying[:1]), "affine per channel: its gradient, shift to bias")
        if target is aten.instance_norm.default and not operand(node, 5):
            return Treatment("batch_norm", tuple(varying[:1]), "affine per channel: its gradient, shift to bias")
        if target in NORMS:
            return Treatment("norm", tuple(varying[:1]), "statistic held fixed, mean stays linear")
        if target in WHERES:
            if self.info[operand(node, 0)].varies:
                raise self._unsupported(node, "a choice that depends on the input")
            return Treatment("native", tuple(varying), "constant choice")
        name = getattr(target, "_schema", None)
        short = name.name.split("::")[1] if name is not None else str(target)
        plain = not any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values()))
        if plain and elementwise(short, lambda x: x, tuple(node.args[1:]), dict(node.kwargs)) is not None:
            return Treatment("elementwise", tuple(varying), "identity rule: factor f(x) / x")
        raise self._unsupported(node)

    def _homogeneous(self, node: fx.Node, target: Any, varying: list[fx.Node]) -> Treatment:
        if target in (aten.pad.default, aten.constant_pad_nd.default):
            value = operand(node, 3 if target is aten.pad.default else 2, "value", 0)
            if value:
                raise self._unsupported(node, f"padding with {value}")
        if target is aten.masked_fill.Scalar and node.args[2] != 0:
            raise self._unsupported(node, "filling with a number other than 0")
        first = node.args[0]
        if isinstance(first, fx.Node):
            others = [v for v in varying if v is not first]
            if others:
                if target in SHAPED_LIKE:
                    return Treatment("native", (first,))
                raise self._unsupported(node, "an index or parameter that depends on the input")
        return Treatment("native", tuple(varying))

    def _product(self, node: fx.Node, varying: list[fx.Node]) -> Treatment:
        if len(node.args) > 1 and node.args[0] is node.args[1]:
            return Treatment("product", tuple(varying), "square: both halves to x")
        if len(varying) == 1:
            if functional(node.target) in MATMUL:
                raise self._unsupported(node, "a constant matrix that is not the (in, out) weight on the right")
            return Treatment("native", tuple(varying), "constant factor")
        open_attention = self.composite.attention == "attn_lrp" and functional(node.target) in MATMUL
        gates = frozenset(GATES - SOFTMAX if open_attention else GATES)
        left, right = (self._is_gate(v, gates) for v in varying)
        if left != right:
            signal = varying[0] if right else varying[1]
            if functional(node.target) in MATMUL:
                return Treatment("fixed", (signal,), "CP-LRP: attention weights held fixed, all to the values")
            return Treatment("fixed", (signal,), "gate held fixed, the signal takes all")
        return Treatment("product", tuple(varying), "product: half to each factor")

    def _unsupported(self, node: fx.Node, detail: str = "") -> UnsupportedOperationError:
        info = self.info[node]
        return UnsupportedOperationError(
            f"operation '{node.target}' in {_where(node, info)} has no rule" + (f" for {detail}" if detail else ""),
            expected="an operation of lrp's vocabulary on the path from input to output",
            got=f"{node.target} on {[tuple(self.info[a].shape) for a in node.all_input_nodes]}",
            fix="give it a rule with lrp.register, rewrite it with supported operations, or use composite='gradient'"
            + ("; for a softmax or log-softmax at the end, return the logits" if "softmax" in str(node.target) else ""),
        )

    # -- a user's own operations --------------------------------------------
    def _custom(self, live: tuple[fx.Node, ...], registered: Registered) -> Treatment:
        if registered.rule == "gradient":
            return Treatment("gradient", live, f"registered for {registered.name}: its gradient")
        return Treatment("custom", live, f"registered for {registered.name}", registered)

    def _regions(self) -> tuple[dict[fx.Node, Treatment], dict[fx.Node, str]]:
        """(output of a registered module's call -> treatment, node whose gradient is asked for -> module call)."""
        outputs: dict[fx.Node, Treatment] = {}
        by_gradient: dict[fx.Node, str] = {}
        covered: set[fx.Node] = set()
        if not registry.any_module():
            return outputs, by_gradient
        for scope, nodes in self.captured.scopes.items():  # outer calls come first
            registered = registry.for_module(self.model.get_submodule(scope.split("@")[0]))
            if registered is None or covered.issuperset(nodes):
                continue
            inside = set(nodes)
            covered |= inside
            if registered.rule == "gradient":
                by_gradient |= {n: scope for n in nodes if self.info[n].varies}
                continue
            leaving = [
                n
                for n in nodes
                if self.info[n].varies and (n is self.captured.output or any(u not in inside for u in n.users))
            ]
            sources = {a: None for n in nodes for a in n.all_input_nodes if self.info[a].varies and a not in inside}
            if len(leaving) != 1:
                raise RuleError(
                    f"the rule registered for {registered.name} can not be used at '{scope}'",
                    expected="a module call that returns one tensor",
                    got=f"{len(leaving)} tensors that are read outside",
                    fix="register a smaller module inside it",
                )
            outputs[leaving[0]] = self._custom(tuple(sources), registered)
        return outputs, by_gradient

    def reach(self) -> None:
        output = self.captured.output
        live = {output}
        regions, by_gradient = self._regions()
        for node in reversed(list(self.captured.graph.nodes)):
            if node not in live or node.op != "call_function":
                continue
            if node in by_gradient:
                why = f"inside '{by_gradient[node]}', registered: its gradient"
                treatment = Treatment("region", tuple(self._varying(node)), why, region=by_gradient[node])
            else:
                treatment = regions.get(node) or self.treat(node)
            self.treatments[node] = treatment
            live.update(treatment.live)

    # -- the result --------------------------------------------------------
    def _why_unreached(self, node: fx.Node) -> str:
        seen, stack = {node}, [node]
        while stack:
            for user in stack.pop().users:
                if user in self.treatments:
                    return self.treatments[user].why or "held fixed"
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
        return "not on a path to the output"

    def _channels(self) -> dict[fx.Node, int]:
        axes: dict[fx.Node, int] = {}
        keeps = {
            aten.relu.default, aten.dropout.default, aten.gelu.default, aten.silu.default, aten.hardswish.default,
            aten.hardtanh.default, aten.relu6.default, aten.max_pool2d.default, aten.avg_pool2d.default,
            aten.adaptive_avg_pool2d.default, aten.batch_norm.default, aten.leaky_relu.default, aten.elu.default,
            aten.mish.default, aten.clone.default, aten.contiguous.default, aten.group_norm.default,
            aten.layer_norm.default,
        }  # fmt: skip
        for node in self.captured.graph.nodes:
            treatment = self.treatments.get(node)
            if treatment is None:
                continue
            found = linear_op(node, self.info)
            if found is not None:
                axes[node] = found[0].channel_axis(self.info[node].ndim)
            elif functional(node.target) in keeps | ADD:
                known = {axes.get(a) for a in treatment.live}
                if len(known) == 1 and None not in known:
                    axes[node] = next(a for a in known if a is not None)
                elif treatment.kind == "batch_norm":
                    axes[node] = 1
        return axes

    def _run_plain(self) -> Analysis:
        """Gradient methods: every operation by its own gradient, rectifiers by the method's."""
        mode = self.composite.mode
        bent = mode in ("guided_backprop", "deconvnet")
        live = {self.captured.output}
        for node in reversed(list(self.captured.graph.nodes)):
            if node in live and node.op == "call_function":
                kind = "rectified" if bent and rectifier(node) is not None else "native"
                self.treatments[node] = Treatment(kind, tuple(self._varying(node)))
                live.update(self._varying(node))
                if kind == "rectified":
                    name = self.info[node].module or node.name
                    self.rows.append(Row(name, mode, "autograd", "-", "only positive signal goes back"))
        if bent and not self.rows:
            raise CompositeError(
                f"{mode} changes the way back through ReLUs, and this model has none",
                expected="a model with ReLU, ReLU6 or a clamp at 0",
                got="none on the way from the output to the input",
                fix="use composite='gradient', which would give the same numbers",
            )
        what = "every other operation" if bent else "every operation"
        self.rows.append(Row(what, mode, "autograd", "1+1", "plain gradient"))
        return self._analysis([], {}, set(), {})

    def run(self) -> Analysis:
        """The analysis; raises where an operation has no rule or a layer none in the composite."""
        if self.composite.mode != "lrp":
            return self._run_plain()
        self.reach()
        layers = Layers(self.captured, self.treatments, self.model)
        units = layers.units()
        self.idle = layers.assign(units, self.composite)
        by_node: dict[fx.Node, UnitPlan] = {}
        absorbed = {node for u in units if u.bn_before is not None for node in (u.bn_before, *u.passed)}
        for unit in units:
            for node in (unit.node, unit.bn, unit.relu):
                if node is not None:
                    by_node[node] = unit
        for node in self.captured.graph.nodes:
            treatment = self.treatments.get(node)
            if treatment is None:
                continue
            name = self.info[node].module or node.name
            target = getattr(functional(node.target), "__name__", str(node.target)).split(".")[0]
            if treatment.kind == "unit":
                unit = by_node[node]
                assert unit.form is not None
                before = "batch norm + " if unit.bn_before else ""
                folded = [" + batch norm" if unit.bn else "", " + ReLU" if unit.relu else ""]
                forward, back = unit.form.products
                form = before + unit.form.name + "".join(folded)
                self.rows.append(Row(unit.name, str(unit.rule), form, f"{forward}+{back}", unit.why))
            elif node in by_node or node in absorbed:
                continue
            elif treatment.kind != "native":
                self.rows.append(Row(name, target, treatment.kind, "-", treatment.why))
        unreached: dict[str, str] = {}
        for scope, nodes in self.captured.scopes.items():
            varying = [n for n in nodes if self.info[n].varies and not is_mutable(n)] or [
                n for n in nodes if self.info[n].varies
            ]
            if varying and not any(n in self.treatments for n in nodes):
                unreached[scope] = self._why_unreached(varying[-1])
        for unit in units:
            axis = unit.op.channel_axis(self.info[unit.node].ndim)
            for first, last, fixed in unreached_rows(unit, self.captured, self.treatments, axis):
                treatment = self.treatments.get(fixed)
                why = treatment.why if treatment is not None else self._why_unreached(fixed)
                unreached[f"{unit.name}[{first}:{last}]"] = why
        return self._analysis(units, by_node, absorbed, unreached)

    def _analysis(
        self,
        units: list[UnitPlan],
        by_node: dict[fx.Node, UnitPlan],
        absorbed: set[fx.Node],
        unreached: dict[str, str],
    ) -> Analysis:
        return Analysis(
            self.captured,
            self.composite,
            self.treatments,
            units,
            by_node,
            absorbed,
            self.rows,
            unreached,
            channel_axis=self._channels(),
            low=self.low,
            idle=self.idle,
        )


def rectifier(node: fx.Node) -> float | None:
    """The cap of a ReLU (inf for the plain one); None for other nodes."""
    target = functional(node.target)
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    return cap(schema.name.split("::")[1], tuple(node.args[1:]), dict(node.kwargs))


def _positive_int(value: Any) -> bool:
    return isinstance(value, (int, float)) and value >= 1 and value == int(value)
