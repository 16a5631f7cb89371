"""The program: the analysed graph, rewritten so that autograd carries coefficients.

One ``fx.GraphModule`` per set of wanted results. Its placeholders are the
model's inputs, sinks (zero tensors whose gradient is relevance), constants
(parameters as they are now, folded and modified weights) and probes (zero
tensors whose gradients are the books). It has no state and no side effects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrp import _functions as fn
from lrp._analysis import Analysis, UnitPlan
from lrp._graph import Layout, Sizes
from lrp._magnitudes import check_magnitudes
from lrp._planner import rectifier
from lrp._taps import channel_tap, layer_tap
from lrp._unit import Unit
from lrp._vocabulary import ADD, AVERAGES, CATS, NORMS, REARRANGES, RSUB, SCATTERS, SUB, WHERES, functional, operand
from lrp.rules import Epsilon

aten = torch.ops.aten


@dataclass(frozen=True)
class Wanted:
    """Which results a program delivers beside the input's."""

    layers: tuple[str, ...] = ()
    channels: bool = False
    weights: bool = False
    ledger: bool = False
    absolute: tuple[str, ...] = ()  # of "channels", "weights": sums of magnitudes instead of signed ones
    only: tuple[str, ...] | None = None  # the modules whose channels and weights are wanted; None: all
    weight_rule: str = "own"  # "epsilon": of weights, in every layer


@dataclass
class Program:
    """A rewritten graph and the meaning of its placeholders."""

    module: fx.GraphModule
    constants: list[Any]  # keys into the bound table
    probes: list[str]  # ledger rows
    channel_probes: list[tuple[list[str], int]]  # (module calls, channels)
    weight_probes: list[tuple[str, Any, tuple[int, ...]]]  # (parameter, key, shape)
    layer_probes: list[tuple[list[str], Sizes]]  # (module calls, shape); twice where a sink adds to it
    sinks: list[int]  # indices of inputs that have a sink


def detach(x: Any) -> Any:
    """x, held fixed; a list where an operation returns several."""
    return [t.detach() for t in x] if isinstance(x, (list, tuple)) else x.detach()


def _named(function: Any, name: str, *bound: Any) -> Any:
    """A callable an ``fx.Graph`` can hold; ``bound`` are its last arguments."""

    def call(*args: Any) -> Any:
        return function(*args, *bound)

    call.__name__ = call.__qualname__ = name
    call.__module__ = "lrp._program"
    return call


class Builder:
    """Rewrites one analysed graph for one set of wanted results."""

    def __init__(self, analysis: Analysis, wanted: Wanted) -> None:
        self.a, self.wanted = analysis, wanted
        self.info = analysis.captured.info
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.detached: dict[fx.Node, fx.Node] = {}
        self.constants: dict[Any, fx.Node] = {}
        self.probes: dict[str, fx.Node] = {}
        self.channel_probes: list[tuple[list[str], fx.Node, int]] = []
        self.weight_probes: dict[str, tuple[fx.Node, Any, tuple[int, ...]]] = {}
        self.layer_probes: list[tuple[list[str], fx.Node, Sizes]] = []
        names = module_outputs(analysis)
        self.wanted_at: dict[fx.Node, list[str]] = {}
        for name in wanted.layers:
            self.wanted_at.setdefault(names[name], []).append(name)
        self.names_at: dict[fx.Node, list[str]] = {}
        for name, node in names.items():
            self.names_at.setdefault(node, []).append(name)
        self.entered: dict[tuple[str, fx.Node], fx.Node] = {}
        self.sinks: dict[fx.Node, fx.Node] = {}
        self.sink_values: dict[fx.Node, fx.Node] = {}
        self.anchor: fx.Node | None = None

    # -- placeholders, created on demand in front of everything -------------
    def _placeholder(self, name: str) -> fx.Node:
        assert self.anchor is not None
        with self.graph.inserting_before(self.anchor):
            return self.graph.placeholder(name)

    def constant(self, key: Any) -> fx.Node:
        if key not in self.constants:
            self.constants[key] = self._placeholder(f"k{len(self.constants)}")
        return self.constants[key]

    def probe(self, name: str) -> fx.Node | None:
        if not self.wanted.ledger:
            return None
        if name not in self.probes:
            self.probes[name] = self._placeholder(f"probe{len(self.probes)}")
        return self.probes[name]

    def _asked(self, name: str, any_use: bool = True) -> bool:
        """Whether channels (of this use) or weights (of any use of the module) are wanted."""
        only = self.wanted.only
        if only is None or name in only:
            return True
        return any_use and name.partition("@")[0] in {o.partition("@")[0] for o in only}

    def row(self, node: fx.Node) -> str:
        return self.info[node].module or node.name

    # -- operands -----------------------------------------------------------
    def value(self, node: fx.Node) -> fx.Node:
        info = self.info[node]
        if not info.varies and not info.per_call and node not in self.values:
            return self.constant(node)
        return self.values[node]

    def fixed(self, node: fx.Node) -> fx.Node:
        if not self.info[node].varies:
            return self.value(node)
        if node not in self.detached:
            self.detached[node] = self.graph.call_function(detach, (self.value(node),))
        return self.detached[node]

    def _native(self, node: fx.Node, live: tuple[fx.Node, ...]) -> fx.Node:
        def swap(arg: fx.Node) -> fx.Node:
            return self.value(arg) if arg in live else self.fixed(arg)

        args, kwargs = fx.node.map_arg(node.args, swap), fx.node.map_arg(node.kwargs, swap)
        target: Any = functional(node.target) if self.info[node].varies else node.target
        if target is aten.detach.default and self.a.composite.mode == "lrp":
            target = aten.alias.default  # relevance is about the forward pass
        return self.graph.call_function(target, args, kwargs)

    # -- treatments ---------------------------------------------------------
    def _layout(self, node: fx.Node) -> Layout:
        return self.info[node].layout or Layout(0)

    def _unit(self, unit: UnitPlan) -> fx.Node:
        assert unit.form is not None
        assert unit.rule is not None
        probe = self.probe(unit.name)
        by_epsilon = self.wanted.weight_rule == "epsilon" and not isinstance(unit.rule, Epsilon)
        spec = Unit(
            unit.form,
            unit.relu is not None,
            self._layout(unit.node),
            self._layout(unit.x),
            self.wanted.ledger,
            self.a.low,
            "weights" in self.wanted.absolute,
            by_epsilon,
        )
        weight_probe = bias_probe = None
        if self.wanted.weights and (unit.form.weighted or by_epsilon) and self._asked(unit.name):
            if spec.absolute:
                check_magnitudes(unit.form, unit.name, tuple(int(s) for s in self.info[unit.weight].shape))
            weight_probe = self._weight_probe(unit.weight, unit, "weight")
            if unit.bias is not None and not unit.folds:
                bias_probe = self._weight_probe(unit.bias, unit, "bias")
        sink = self._sink(unit) if unit.sink is not None else None
        w, b = self.constant(("w", unit.name)), None
        if unit.bias is not None or unit.folds:
            b = self.constant(("b", unit.name))
        extra = [self.constant(("extra", unit.name, i)) for i in range(_extras(unit))]
        call = _named(spec, f"unit_{unit.node.name}")
        return self.graph.call_function(
            call, (self.value(unit.reads), probe, weight_probe, bias_probe, sink, w, b, *extra)
        )

    def _weight_probe(self, node: fx.Node, unit: UnitPlan, what: str) -> fx.Node | None:
        kind, name = self.a.captured.constants.get(node, ("", ""))
        if kind != "parameter":
            name = f"{unit.name}.{what}"  # a weight computed from parameters: relevance of the product
        if name not in self.weight_probes:
            key = node if kind == "parameter" else ("w" if what == "weight" else "b", unit.name)
            shape = tuple(int(s) for s in self.info[node].shape)
            self.weight_probes[name] = (self._placeholder(f"wp{len(self.weight_probes)}"), key, shape)
        return self.weight_probes[name][0]

    def _sink(self, unit: UnitPlan) -> fx.Node:
        assert unit.sink is not None
        assert unit.sink_input is not None
        source = unit.sink_input
        if source not in self.sinks:
            self.sinks[source] = self._placeholder(f"sink{len(self.sinks)}")
        if source not in self.sink_values:
            self.sink_values[source] = self._tap_layer(source, self.sinks[source], False)
        sink = self.sink_values[source]
        for node in unit.sink:
            if node not in self.sink_values:
                value = sink  # through an affine map per element R goes unchanged
                if functional(node.target) in REARRANGES:

                    def swap(arg: fx.Node, inner: fx.Node = sink) -> fx.Node:
                        return inner if self.info[arg].varies else self.value(arg)

                    args = fx.node.map_arg(node.args, swap)
                    kwargs = fx.node.map_arg(node.kwargs, swap)
                    value = self.graph.call_function(functional(node.target), args, kwargs)
                self.sink_values[node] = self._tap_layer(node, value, False)
            sink = self.sink_values[node]
        return sink

    def _rectified(self, node: fx.Node) -> fx.Node:
        source, high = node.args[0], rectifier(node)
        assert isinstance(source, fx.Node)
        guided = self.a.composite.mode == "guided_backprop"
        return self.graph.call_function(fn.rectified, (self.value(source), high, guided))

    def _elementwise(self, node: fx.Node) -> fx.Node:
        target = functional(node.target)
        short = target._schema.name.split("::")[1]
        found = fn.elementwise(short, target, tuple(node.args[1:]), dict(node.kwargs))
        assert found is not None
        spec = fn.Elementwise(*found, layout=self._layout(node))
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return self.graph.call_function(
            _named(spec, f"rule_{node.name}"), (self.value(source), self.probe(self.row(node)))
        )

    def _norm(self, node: fx.Node) -> fx.Node:
        kind = NORMS[functional(node.target)]
        x = node.args[0]
        assert isinstance(x, fx.Node)
        groups, normalized, eps = 0, 0, 1e-5
        if kind == "layer":
            normalized = len(node.args[1])  # type: ignore[arg-type]
            w, b, eps = operand(node, 2, "weight"), operand(node, 3, "bias"), operand(node, 4, "eps", 1e-5)
        elif kind == "rms":
            normalized = len(node.args[1])  # type: ignore[arg-type]
            w, b, eps = operand(node, 2, "weight"), None, operand(node, 3, "eps")
            if eps is None:
                eps = torch.finfo(x.meta["val"].dtype).eps
        elif kind == "group":
            groups = operand(node, 1, "num_groups")
            w, b, eps = operand(node, 2, "weight"), operand(node, 3, "bias"), operand(node, 4, "eps", 1e-5)
        else:
            w, b, eps = operand(node, 1, "weight"), operand(node, 2, "bias"), operand(node, 7, "eps", 1e-5)
        spec = fn.Normaliser(kind, groups, normalized, eps, self._layout(node))
        args = [None if t is None else self.value(t) for t in (w, b)]
        call = _named(spec, f"norm_{node.name}")
        return self.graph.call_function(call, (self.value(x), *args, self.probe(self.row(node))))

    def _batch_norm(self, node: fx.Node) -> fx.Node:
        x, w, b, mean, var = node.args[:5]
        eps = node.args[7]
        assert isinstance(x, fx.Node)
        parts = [None if t is None else self.value(t) for t in (w, b, mean, var)]  # type: ignore[arg-type]
        args = (self.value(x), *parts, eps)
        y = self.graph.call_function(fn.channel_affine, args)
        probe = self.probe(self.row(node))
        if probe is not None:
            shift = self.graph.call_function(fn.channel_shift, (y, *parts, eps))
            y = self._book(node, y, shift, probe, "bias")
        return y

    def _product(self, node: fx.Node) -> fx.Node:
        halves: dict[fx.Node, fx.Node] = {}
        for arg in self.a.treatments[node].live:
            halves[arg] = self.graph.call_function(fn.part, (self.value(arg), 0.5))

        def swap(arg: fx.Node) -> fx.Node:
            return halves.get(arg) or self.fixed(arg)

        args, kwargs = fx.node.map_arg(node.args, swap), fx.node.map_arg(node.kwargs, swap)
        return self.graph.call_function(functional(node.target), args, kwargs)

    def _flow(self, row: str, value: fx.Node, like: fx.Node, arrives: bool) -> fx.Node:
        probe = self.probe(row)
        if probe is None:
            return value
        call = _named(fn.flow, f"flow_{like.name}", self._layout(like), arrives)
        return self.graph.call_function(call, (value, probe))

    def _by_gradient(self, node: fx.Node) -> fx.Node:
        """A registered operation or module by its gradient: what it does not hand on is booked."""
        treatment = self.a.treatments[node]
        row = treatment.region or self.row(node)

        def inside(other: fx.Node) -> bool:
            known = self.a.treatments.get(other)
            return bool(treatment.region) and known is not None and known.region == treatment.region

        def swap(arg: fx.Node) -> fx.Node:
            if arg not in treatment.live:
                return self.fixed(arg)
            if inside(arg) or not isinstance(arg.meta.get("val"), Tensor):
                return self.value(arg)
            if (row, arg) not in self.entered:
                self.entered[row, arg] = self._flow(row, self.value(arg), arg, False)
            return self.entered[row, arg]

        args, kwargs = fx.node.map_arg(node.args, swap), fx.node.map_arg(node.kwargs, swap)
        y = self.graph.call_function(functional(node.target), args, kwargs)
        readers = [user for user in node.users if user in self.a.treatments]
        leaves = node is self.a.captured.output or any(not inside(user) for user in readers)
        return self._flow(row, y, node, True) if leaves else y

    def _remainder(self, node: fx.Node) -> fx.Node:
        """Attention and softmax by their gradient, v halved, q and k quartered; the remainder is booked."""
        shares = (0.25, 0.25, 0.5) if self.a.treatments[node].kind == "attention" else (1.0,)
        args = list(fx.node.map_arg(node.args, self.fixed))
        for i, share in enumerate(shares):
            source = node.args[i]
            assert isinstance(source, fx.Node)
            if self.info[source].varies:
                value = self._flow(self.row(node), self.value(source), source, False)
                args[i] = value if share == 1 else self.graph.call_function(fn.part, (value, share))
        kwargs = fx.node.map_arg(node.kwargs, self.fixed)
        y = self.graph.call_function(functional(node.target), tuple(args), kwargs)
        return self._flow(self.row(node), y, node, True)

    def _custom(self, node: fx.Node) -> fx.Node:
        treatment = self.a.treatments[node]
        assert treatment.registered is not None
        y = self.graph.call_function(detach, (self._native(node, ()),))
        layouts = tuple(self._layout(source) for source in treatment.live)
        call = _named(fn.Custom(treatment.registered, self._layout(node), layouts), f"custom_{node.name}")
        return self.graph.call_function(call, (y, self.probe(self.row(node)), *map(self.value, treatment.live)))

    def _sum(self, node: fx.Node, live: tuple[fx.Node, ...]) -> fx.Node:
        """Additions and concatenations: constant summands are booked."""
        target = functional(node.target)
        y = self._native(node, live)
        if target in CATS | SCATTERS:
            if all(self.info[a].varies for a in node.all_input_nodes) or (probe := self.probe(self.row(node))) is None:
                return y

            def swap(arg: fx.Node) -> fx.Node:
                value = self.fixed(arg)
                return self.graph.call_function(torch.zeros_like, (value,)) if self.info[arg].varies else value

            args, kwargs = fx.node.map_arg(node.args, swap), fx.node.map_arg(node.kwargs, swap)
            return self._book(node, y, self.graph.call_function(target, args, kwargs), probe, "constant")
        left, right = node.args[:2]
        if all(isinstance(a, fx.Node) and self.info[a].varies for a in (left, right)):
            return y
        probe = self.probe(self.row(node))
        if probe is None:
            return y
        alpha = operand(node, 99, "alpha", 1)
        first_is_constant = not (isinstance(left, fx.Node) and self.info[left].varies)
        sign_left = -1 if target in RSUB else 1
        sign_right = -1 if target in SUB else 1
        constant, sign = (left, sign_left) if first_is_constant else (right, sign_right * alpha)
        value: Any = self.value(constant) if isinstance(constant, fx.Node) else constant
        if sign != 1:
            value = (
                self.graph.call_function(aten.mul.Tensor, (value, sign)) if isinstance(value, fx.Node) else value * sign
            )
        return self._book(node, y, value, probe, "constant")

    def _where(self, node: fx.Node, live: tuple[fx.Node, ...]) -> fx.Node:
        """A constant choice: what a constant branch contributes is booked."""
        y = self._native(node, live)
        condition, *branches = node.args
        fixed = [not (isinstance(b, fx.Node) and self.info[b].varies) for b in branches]
        if not any(fixed) or (probe := self.probe(self.row(node))) is None:
            return y
        zero = self.graph.call_function(torch.zeros_like, (y,))
        parts = [zero, zero]
        for i, branch in enumerate(branches):
            if fixed[i] and isinstance(branch, fx.Node):
                parts[i] = self.value(branch)
            elif fixed[i]:
                parts[i] = self.graph.call_function(torch.full_like, (y, branch))
        value = self.graph.call_function(aten.where.self, (self.value(condition), *parts))  # type: ignore[arg-type]
        return self._book(node, y, value, probe, "constant")

    def _reached(self, node: fx.Node) -> fx.Node:
        treatment = self.a.treatments[node]
        target = functional(node.target)
        epsilon = self.a.composite.stabilise_sums
        if treatment.kind == "elementwise":
            return self._elementwise(node)
        if treatment.kind == "norm":
            return self._norm(node)
        if treatment.kind == "batch_norm":
            return self._batch_norm(node)
        if treatment.kind == "product":
            return self._product(node)
        if treatment.kind in ("attention", "softmax"):
            return self._remainder(node)
        if treatment.kind == "custom":
            return self._custom(node)
        if treatment.kind in ("gradient", "region"):
            return self._by_gradient(node)
        if target in WHERES:
            return self._where(node, treatment.live)
        if target in ADD | SUB | RSUB | CATS | SCATTERS:
            y = self._sum(node, treatment.live)
            if epsilon and target in ADD | SUB and len(treatment.live) == 2:
                y = self._stabilise(node, y, epsilon)
            return y
        y = self._native(node, treatment.live)
        if epsilon and target in AVERAGES and "sum" not in str(target):
            y = self._stabilise(node, y, epsilon)
        return y

    def _stabilise(self, node: fx.Node, y: fx.Node, epsilon: float) -> fx.Node:
        call = _named(fn.stabilised, f"stabilised_{node.name}", epsilon, self._layout(node))
        return self.graph.call_function(call, (y, self.probe(self.row(node))))

    def _book(self, node: fx.Node, y: fx.Node, value: Any, probe: fx.Node, column: str) -> fx.Node:
        call = _named(fn.book, f"book_{node.name}", self._layout(node), column)
        return self.graph.call_function(call, (y, value, probe))

    # -- results ------------------------------------------------------------
    def _tap_channels(self, node: fx.Node, y: fx.Node, names: list[str]) -> fx.Node:
        axis = self.a.channel_axis.get(node)
        layout = self.info[node].layout
        if axis is None or layout is None or layout.dim == axis:
            return y
        names = [name for name in names if self._asked(name, any_use=False)]
        if not names:
            return y
        probe = self._placeholder(f"cp{len(self.channel_probes)}")
        self.channel_probes.append((names, probe, int(self.info[node].shape[axis])))
        times, absolute = self.a.composite.multiplies, "channels" in self.wanted.absolute
        call = _named(channel_tap, f"channels_{len(self.channel_probes)}", layout, axis, times, absolute)
        return self.graph.call_function(call, (y, probe))

    def _tap_layer(self, node: fx.Node, y: fx.Node, times: bool) -> fx.Node:
        if node not in self.wanted_at:
            return y
        probe = self._placeholder(f"lp{len(self.layer_probes)}")
        self.layer_probes.append((self.wanted_at[node], probe, Sizes(self.info[node].shape)))
        return self.graph.call_function(layer_tap, (y, probe, times))

    def build(self) -> Program:
        """The finished program."""
        a, captured = self.a, self.a.captured
        times = a.composite.multiplies
        behind_sink = {n for u in a.units for n in u.sink or ()}
        inputs = [self.graph.placeholder(f"x{i}") for i in range(len(captured.inputs))]
        self.values.update(zip(captured.inputs, inputs, strict=True))
        self.anchor = self.graph.call_function(_nothing, ())
        for node in captured.inputs:
            self.values[node] = self._tap_layer(node, self.values[node], times)

        plain = a.composite.mode != "lrp"
        if plain:
            for node, (kind, name) in captured.constants.items():
                if kind == "parameter" and self.wanted.weights and self._asked(name.rpartition(".")[0]):
                    shape = tuple(int(s) for s in self.info[node].shape)
                    self.weight_probes[name] = (self.constant(node), node, shape)
        for node in captured.graph.nodes:
            if node.op != "call_function":
                continue
            info = self.info[node]
            if not (info.varies or info.per_call or plain):
                continue
            unit = a.by_node.get(node)
            if unit is not None:
                if node is not unit.result:
                    continue
                y = self._unit(unit)
            elif node in a.absorbed:  # its input, apart from that input's other readers
                y = self.graph.call_function(aten.alias.default, (self.value(node.all_input_nodes[0]),))
            elif plain and node in a.treatments and a.treatments[node].kind == "rectified":
                y = self._rectified(node)
            elif plain:
                y = self._native(node, tuple(node.all_input_nodes))
            elif node in a.treatments:
                y = self._reached(node)
            else:
                y = self._native(node, ())
            if self.wanted.channels and node in self.names_at and node in a.treatments and node not in behind_sink:
                y = self._tap_channels(unit.node if unit else node, y, self.names_at[node])
            y = self._tap_layer(node, y, times)
            self.values[node] = y
            if unit is not None:
                for part in (unit.node, unit.bn, unit.relu):
                    if part is not None:
                        self.values[part] = y

        self.graph.output((self.values[captured.output],))
        self.graph.erase_node(self.anchor)
        self.graph.eliminate_dead_code()
        self._sort_placeholders()
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        return Program(
            module,
            list(self.constants),
            list(self.probes),
            [(names, count) for names, _, count in self.channel_probes],
            [(name, key, shape) for name, (_, key, shape) in self.weight_probes.items()],
            [(names, sizes) for names, _, sizes in self.layer_probes],
            [captured.inputs.index(node) for node in self.sinks],
        )

    def _sort_placeholders(self) -> None:
        """inputs, sinks, constants, probes, channel probes, layer probes, weight probes."""
        wanted = [
            *self.sinks.values(),
            *self.constants.values(),
            *self.probes.values(),
            *(p for _, p, _ in self.channel_probes),
            *(p for _, p, _ in self.layer_probes),
            *(p for p, key, _ in self.weight_probes.values() if self.constants.get(key) is not p),
        ]
        anchor = [n for n in self.graph.nodes if n.op == "placeholder" and n.name.startswith("x")][-1]
        for node in wanted:
            anchor.append(node)
            anchor = node


def _nothing() -> None:
    return None


def _extras(unit: UnitPlan) -> int:
    """How many modified tensors the unit's form derives; counted on tensors without storage."""
    assert unit.form is not None
    w = torch.empty(tuple(int(s) for s in unit.weight.meta["val"].shape), device="meta")
    has_bias = unit.bias is not None or bool(unit.folds)
    return len(unit.form.derive(w, torch.empty(w.shape[0], device="meta") if has_bias else None))


def module_outputs(analysis: Analysis) -> dict[str, fx.Node]:
    """Module call -> the one tensor it returns (folded and fused layers share theirs)."""
    captured, out = analysis.captured, {}
    for scope, nodes in captured.scopes.items():
        inside = set(nodes)
        leaving = [
            n
            for n in nodes
            if n in analysis.treatments
            and isinstance(n.meta.get("val"), Tensor)
            and (n is captured.output or any(u not in inside for u in n.users))
        ]
        if len(leaving) == 1:
            node = leaving[0]
            unit = analysis.by_node.get(node)
            out[scope] = unit.result if unit is not None else node
    for unit in analysis.units:
        out.setdefault(unit.name, unit.result)
    return out
