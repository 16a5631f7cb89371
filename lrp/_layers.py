"""Linear layers in the graph: what they are, what is folded or fused into them, and their rules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from lrp._analysis import Treatment, UnitPlan
from lrp._forms import choose
from lrp._graph import Captured, Info, Layout
from lrp._linear import ConvOp, LinearLike, LinearOp
from lrp._vocabulary import ADD, CONVS, CONVS_T, DIV, DROPOUTS, MATMUL, MUL, REARRANGES, RSUB, SUB, functional, operand
from lrp.composites import Composite, LayerInfo
from lrp.errors import RuleError
from lrp.rules import Pass

aten = torch.ops.aten

HEAVY = 4  # weights per output of one sample; above, small batches gain and large ones hardly lose


def _ints(value: Any, count: int) -> tuple[int, ...]:
    numbers: tuple[int, ...] = (value,) if isinstance(value, int) else tuple(value)
    return numbers * count if len(numbers) == 1 and count > 1 else numbers


def linear_op(node: fx.Node, info: dict[fx.Node, Info]) -> tuple[LinearLike, Any, Any, Any] | None:
    """(operation, x, weight, bias) if the node is a linear layer with constant weight."""
    target = functional(node.target)
    args: tuple[Any, ...] = node.args
    x: Any
    w: Any
    b: Any
    if target in CONVS:
        nd = CONVS[target]
        x, w, b = args[0], args[1], operand(node, 2, "bias")
        stride = _ints(operand(node, 3, "stride", 1), nd)
        padding = operand(node, 4, "padding", 0)
        dilation = _ints(operand(node, 5, "dilation", 1), nd)
        groups = operand(node, 6, "groups", 1)
        tail: tuple[int, ...] = ()
        if isinstance(padding, str):
            kernel = info[w].shape[2:]
            full = [0 if padding == "valid" else d * (int(k) - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding, tail = tuple(f // 2 for f in full), tuple(f % 2 for f in full)
        op: LinearLike = ConvOp(nd, stride, _ints(padding, nd), dilation, groups, tail=tail)
    elif target in CONVS_T:
        nd = CONVS_T[target]
        x, w, b = args[0], args[1], operand(node, 2, "bias")
        op = ConvOp(
            nd,
            _ints(operand(node, 3, "stride", 1), nd),
            _ints(operand(node, 4, "padding", 0), nd),
            _ints(operand(node, 7, "dilation", 1), nd),
            operand(node, 6, "groups", 1),
            True,
            _ints(operand(node, 5, "output_padding", 0), nd),
        )
    elif target is aten.convolution.default:
        x, w, b, stride, padding, dilation, transposed, out_pad, groups = args
        nd = len(_ints(stride, 1))
        op = ConvOp(
            nd,
            _ints(stride, nd),
            _ints(padding, nd),
            _ints(dilation, nd),
            groups,
            transposed,
            _ints(out_pad, nd),
        )
    elif target is aten.linear.default:
        x, w, b = args[0], args[1], operand(node, 2, "bias")
        op = LinearOp()
    elif target is aten.addmm.default and len(args) == 3 and not node.kwargs:
        b, x, w = args
        if not isinstance(b, fx.Node) or info[b].ndim != 1:
            return None
        op = LinearOp(transpose_weight=True)
    elif target in MATMUL:
        x, w, b = args[0], args[1], None
        if info[w].ndim != 2:
            return None
        op = LinearOp(transpose_weight=True)
    else:
        return None
    fixed = [w, b] if b is not None else [w]
    if not info[x].varies or any(info[n].varies or info[n].per_call for n in fixed):
        return None
    return op, x, w, b


class Layers:
    """Finds the linear layers among the treated nodes of a graph."""

    def __init__(self, captured: Captured, treatments: dict[fx.Node, Treatment], model: nn.Module) -> None:
        self.captured, self.treatments, self.model = captured, treatments, model
        self.info = captured.info

    def _is(self, node: fx.Node, *kinds: str) -> bool:
        """Whether the node is treated in one of the built-in ways named."""
        treatment = self.treatments.get(node)
        return treatment is not None and treatment.kind in kinds

    def _foldable(self, node: fx.Node, op: LinearLike) -> fx.Node | None:
        users = list(node.users)
        if len(users) != 1 or users[0].target is not aten.batch_norm.default:
            return None
        bn = users[0]
        if (
            not self._is(bn, "batch_norm")
            or bn.args[0] is not node
            or any(self.info[a].varies for a in bn.args[1:5] if isinstance(a, fx.Node))
        ):
            return None
        if isinstance(op, LinearOp) and self.info[node].ndim != 2:
            return None
        return bn

    def _foldable_before(self, bn: fx.Node, op: LinearLike, folded: set[fx.Node]) -> fx.Node | None:
        """The batch norm whose only reader is this layer, unless it belongs to the layer before it."""
        if functional(bn.target) is not aten.batch_norm.default or bn in folded or bn is self.captured.output:
            return None
        if (
            not self._is(bn, "batch_norm")
            or len(bn.users) != 1
            or any(self.info[a].varies for a in bn.args[1:5] if isinstance(a, fx.Node))
        ):
            return None
        if isinstance(op, LinearOp) and self.info[bn].ndim != 2:
            return None
        static = all(isinstance(s, int) for s in self.info[bn].shape[1:])
        return bn if static and self.info[bn].layout == Layout(0) else None

    def _fusable(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        if len(users) == 1 and functional(users[0].target) is aten.relu.default and self._is(users[0], "native"):
            return users[0]
        return None

    def _relu_follows(self, node: fx.Node) -> bool:
        """Whether only a ReLU reads the node, perhaps through max-pooling or a reshape."""
        while True:
            users = list(node.users)
            if len(users) != 1 or node is self.captured.output:
                return False
            user, target = users[0], functional(users[0].target)
            if not self._is(user, "native", "elementwise"):
                return False
            if target is aten.relu.default:
                return True
            if target in (aten.hardtanh.default, aten.relu6.default, aten.clamp.default, aten.clamp_min.default):
                low = 0.0 if target is aten.relu6.default else operand(user, 1, "min", None)
                return low == 0
            if target not in REARRANGES | {aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default}:
                return False
            node = user

    def _sink(self, x: fx.Node) -> tuple[list[fx.Node], fx.Node] | None:
        """Operations from the model's input to x, if each keeps every element apart."""
        chain: list[fx.Node] = []
        node = x
        while node not in self.captured.inputs:
            treatment = self.treatments.get(node)
            if treatment is None or len(treatment.live) != 1:
                return None
            source, target = treatment.live[0], functional(node.target)
            chain.append(node)
            if target in REARRANGES:
                pass
            elif target in ADD | SUB | RSUB | MUL | DIV | {aten.neg.default} or treatment.kind == "batch_norm":
                if self.info[source].shape != self.info[node].shape:
                    return None
            else:
                return None
            node = source
        return chain[::-1], node

    def _unit_name(self, node: fx.Node, weight: fx.Node, taken: set[str]) -> str:
        info = self.info[node]
        owner = self.model.get_submodule(info.path) if info.path else self.model
        own = {id(p) for p in owner._parameters.values() if p is not None}
        kind, qualified = self.captured.constants.get(weight, ("", ""))
        is_leaf = bool(info.path) and all(n == "parametrizations" for n, _ in owner.named_children()) and len(own) <= 2
        name = info.module
        if not is_leaf:
            stem = qualified if kind == "parameter" else f"{info.path}.{node.name}".lstrip(".")
            for tail in (".weight", "_weight"):
                stem = stem.removesuffix(tail)
            name = stem or node.name
            suffix = info.module.removeprefix(info.path)
            name += suffix
        unique, k = name, 1
        while unique in taken:
            unique, k = f"{name}#{k}", k + 1
        taken.add(unique)
        return unique

    def units(self) -> list[UnitPlan]:
        """The linear layers that relevance reaches, in execution order, with what they take in."""
        out: list[UnitPlan] = []
        taken: set[str] = set()
        for node in self.captured.graph.nodes:
            treatment = self.treatments.get(node)
            if treatment is None or treatment.kind != "unit":
                continue
            found = linear_op(node, self.info)
            assert found is not None
            op, x, w, b = found
            unit = UnitPlan(self._unit_name(node, w, taken), node, op, x, w, b)
            unit.bn = self._foldable(node, op)
            unit.relu = self._fusable(unit.bn or node)
            path = self.info[node].path
            actual = type(self.model.get_submodule(path)) if path else type(self.model)
            unit.types = (op.layer_type, actual) if issubclass(actual, op.layer_type) else (op.layer_type,)
            out.append(unit)
        folded = {u.bn for u in out if u.bn is not None}
        for unit in out:
            source, passed = unit.x, []
            while functional(source.target) in DROPOUTS and self._is(source, "native") and len(source.users) == 1:
                passed.append(source)
                source = source.all_input_nodes[0]
            unit.bn_before = self._foldable_before(source, unit.op, folded)
            if unit.bn_before is not None:
                unit.x, unit.passed = unit.bn_before.all_input_nodes[0], tuple(passed)
        return out

    def _in_shape(self, unit: UnitPlan) -> tuple[int, ...]:
        """Shape of one sample's x, as far as the operation sees it."""
        shape = self.info[unit.x].shape
        if isinstance(unit.op, LinearOp):
            return (int(shape[-1]),)
        return tuple(int(s) for s in shape[1:])

    def _heavy(self, unit: UnitPlan) -> bool:
        """Whether the weights are so much larger than z that reading z twice more is cheaper."""
        sizes = self.info[unit.node].shape[1:]
        if not all(isinstance(s, int) for s in sizes):
            return False
        return bool(math.prod(self.info[unit.weight].shape) > HEAVY * math.prod(sizes))

    def assign(self, units: list[UnitPlan], composite: Composite) -> list[str]:
        """Give every layer its rule and the cheapest form that is correct there; the entries that fit none."""
        infos = [LayerInfo(u.name, u.types, i, len(units)) for i, u in enumerate(units)]
        for unit, rule in zip(units, composite.assign(infos), strict=True):
            follows = unit.relu is not None or self._relu_follows(unit.bn or unit.node)
            unit.rule = rule
            if rule.ends_pass and unit.bn_before is not None:
                # bounds and roots are in the units of the layer's own input
                unit.x, unit.bn_before, unit.passed = unit.reads, None, ()
            unit.form, unit.why = choose(
                rule,
                unit.op,
                self.info[unit.x].non_negative,
                follows,
                self._in_shape(unit),
                unit.folds == [unit.bn] and self._heavy(unit),
            )
            if isinstance(rule, Pass) and self.info[unit.x].shape[1:] != self.info[unit.node].shape[1:]:
                raise RuleError(
                    f"Pass can not be used on layer '{unit.name}'",
                    expected="an output shaped like the input",
                    got=f"{self.info[unit.x].shape[1:]} -> {self.info[unit.node].shape[1:]}",
                    fix="use another rule there",
                )
            if rule.ends_pass:
                found = self._sink(unit.reads)
                if found is not None:
                    unit.sink, unit.sink_input = found
        return composite.idle(infos)
