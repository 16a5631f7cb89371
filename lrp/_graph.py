"""From a module to an annotated graph of ATen calls.

``capture`` exports the model with a dynamic batch and states, for every node:
the module call it belongs to, whether it depends on the input, whether its
value is known to be non-negative, and where the batch sits in its shape.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from lrp._vocabulary import (
    ADD,
    AVERAGES,
    CATS,
    CLAMPS,
    CREATES,
    DIV,
    DROPOUTS,
    MUL,
    NON_NEGATIVE,
    REARRANGES,
    RESHAPES,
    SELECTS,
    VIEWS,
    functional,
    is_mutable,
    operand,
)
from lrp.errors import ExportError, InputError, ModeError, OutputError

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """Where the batch sits: axis ``dim`` has size ``pre * N * post``."""

    dim: int
    pre: int = 1
    post: int = 1

    def rms(self, t: Tensor) -> Tensor:
        """Root mean square of everything that belongs to each sample, broadcastable over t."""
        split = t.shape[: self.dim], (self.pre, -1, self.post), t.shape[self.dim + 1 :]
        apart = t.reshape(*split[0], *split[1], *split[2])
        axis = self.dim + 1
        mean = apart.square().mean([d for d in range(apart.ndim) if d != axis], keepdim=True)
        whole = [1] * self.dim + [-1] + [1] * (t.ndim - self.dim - 1)
        return mean.sqrt().expand(*[1] * self.dim, *(self.pre, -1, self.post), *[1] * len(split[2])).reshape(whole)

    def per_channel(self, t: Tensor, axis: int) -> Tensor:
        """Sum over all but the samples and one axis, shape (N, C)."""
        if self.pre != 1 or self.post != 1:
            t = t.reshape(*t.shape[: self.dim], self.pre, -1, self.post, *t.shape[self.dim + 1 :])
            batch, axis = self.dim + 1, axis if axis < self.dim else axis + 2
        else:
            batch = self.dim
        others = [d for d in range(t.ndim) if d not in (batch, axis)]
        t = t.sum(others) if others else t
        return t if batch < axis else t.t()

    def per_sample(self, t: Tensor) -> Tensor:
        """Sum of everything that belongs to each sample, shape (N,)."""
        if self.pre != 1 or self.post != 1:
            t = t.reshape(*t.shape[: self.dim], self.pre, -1, self.post, *t.shape[self.dim + 1 :])
            axis = self.dim + 1
        else:
            axis = self.dim
        others = [d for d in range(t.ndim) if d != axis]
        return t.sum(others) if others else t


@dataclass(frozen=True)
class Sizes:
    """The shape of a node for any number of samples."""

    shape: tuple[Any, ...]

    def __call__(self, n: int) -> tuple[int, ...]:
        return tuple(self._size(s, n) for s in self.shape)

    @staticmethod
    def _size(size: Any, n: int) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr  # the only symbol is the number of samples
        return int(expression.subs(dict.fromkeys(expression.free_symbols, n)))


@dataclass
class Info:
    """What the planner knows of one node."""

    module: str = ""  # path of the innermost module, with "@k" for its k-th re-use
    path: str = ""  # the same without "@k"
    varies: bool = False  # depends on the model's input
    per_call: bool = False  # depends on the batch size (only meaningful if not varies)
    non_negative: bool = False
    layout: Layout | None = None
    ndim: int = 0
    shape: tuple[Any, ...] = ()


@dataclass
class Captured:
    """The annotated graph of one model."""

    graph: fx.Graph
    info: dict[fx.Node, Info]
    inputs: list[fx.Node]
    constants: dict[fx.Node, tuple[str, str]]  # node -> (kind, qualified name)
    tensors: dict[str, Tensor]  # values of constants that are neither parameter nor buffer
    output: fx.Node
    scopes: dict[str, list[fx.Node]] = field(default_factory=dict)  # module call -> its nodes


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3])[:400]


def _twin(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two samples: a batch of one would be taken for a constant."""
    return tuple(torch.cat([a[:1], a[:1]]).detach() for a in args)


def run_apart(model: nn.Module, args: tuple[Tensor, ...]) -> Any:
    """The model's output on clones of the input; buffers it writes are copies."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        return torch.func.functional_call(model, buffers, tuple(a.clone() for a in args))


def _export(model: nn.Module, args: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    twin = _twin(args)
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError(
            "a scripted module can not be explained",
            expected="an nn.Module whose forward is Python",
            got=type(model).__name__,
            fix="pass the module that was scripted",
        )
    lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise InputError(
            f"{type(model).__name__} has parameters without a shape: {', '.join(lazy[:3])}",
            expected="a model whose lazy modules have run once",
            got=f"{len(lazy)} uninitialised parameters",
            fix="call the model on an example first; explaining it must not change it",
        )
    try:
        run_apart(model, twin)
    except Exception as error:
        shapes = ", ".join(str(tuple(a.shape)) for a in twin)
        raise InputError(
            f"{type(model).__name__} does not run on an input of this kind",
            expected="an input the model accepts",
            got=f"{type(error).__name__} for two samples, shape {shapes}, {twin[0].dtype}: {_reason(error)}",
            fix="check the shape and the type of the input; the first axis is that of the samples (x[None] for one)",
        ) from error
    dims: tuple[Any, ...] = tuple({0: Dim.DYNAMIC} for _ in args)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if kinds and kinds[0] is inspect.Parameter.VAR_POSITIONAL:
        dims = (dims,)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, twin, dynamic_shapes=dims, strict=False)
    except Exception as error:
        raise ExportError(
            f"the graph of {type(model).__name__} can not be captured by torch.export",
            expected="a forward without branches on data, on which every batch size takes the same path",
            got=f"{type(error).__name__}: {_reason(error)}",
            fix="replace the data-dependent branch by tensor operations (torch.where), or explain the part "
            "of the model that has none",
        ) from error


def _varying(program: torch.export.ExportedProgram) -> set[fx.Node]:
    """The nodes whose values depend on the model's input, sizes apart."""
    names = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    varies: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            inherits = node.name in names
        else:
            size = isinstance(node.meta.get("val"), (torch.SymInt, int))
            inherits = not size and node.target not in CREATES and any(a in varies for a in node.all_input_nodes)
        if inherits:
            varies.add(node)
    return varies


def _check_modes(program: torch.export.ExportedProgram, varies: set[fx.Node]) -> None:
    """Refuse what mixes samples or draws random numbers on the way of the input."""
    for node in program.graph.nodes:
        if node.op != "call_function" or node not in varies:
            continue
        what = ""
        if node.target is aten.batch_norm.default and node.args[5]:
            what = "batch normalisation uses the statistics of the batch, which mixes samples"
        elif node.target in DROPOUTS and node.args[1] and node.args[2]:
            what = f"dropout with p = {node.args[1]} is switched on"
        elif node.target is aten.scaled_dot_product_attention.default and operand(node, 4, "dropout_p", 0.0):
            what = "dropout inside attention is switched on"
        elif "rrelu" in str(node.target) and operand(node, 3, "training", False):
            what = "a randomised ReLU is switched on"
        if what:
            raise ModeError(
                f"in {_where_of(node)}, {what}",
                expected="a model in evaluation mode, with running statistics",
                got="training mode or a layer without running statistics",
                fix="call model.eval() first; a norm without running statistics needs them, a functional dropout "
                "training=self.training",
            )


def _where_of(node: fx.Node) -> str:
    path, name = _call_name(node)
    return f"'{name}'" if path else "the model itself"


def _restore_batch_norms(graph: fx.Graph) -> None:
    """Functionalisation splits a batch norm in three results; make it one call again."""
    for node in list(graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        x, w, b, mean, var, momentum, eps = node.args
        for user in list(node.users):
            if user.args[1] == 0:
                with graph.inserting_before(user):
                    call = graph.call_function(
                        aten.batch_norm.default, (x, w, b, mean, var, False, momentum, eps, False)
                    )
                call.meta = {**user.meta, "nn_module_stack": node.meta.get("nn_module_stack")}
                user.replace_all_uses_with(call)
            if not user.users:
                graph.erase_node(user)
        graph.erase_node(node)


def _spell_out(graph: fx.Graph) -> None:
    """Operations made of others that have rules: ``addcmul``, ``baddbmm``, ``masked_fill`` with a number."""
    for node in list(graph.nodes):
        target = functional(node.target)
        if target is aten.masked_fill.Scalar and node.args[2] != 0:
            with graph.inserting_before(node):
                chosen = graph.call_function(aten.where.ScalarSelf, (node.args[1], node.args[2], node.args[0]))
            chosen.meta = dict(node.meta)
            node.replace_all_uses_with(chosen)
            graph.erase_node(node)
        if target is aten.baddbmm.default and operand(node, 3, "beta", 1) == 1:
            a, b, c = node.args[:3]
            alpha = operand(node, 4, "alpha", 1)
            with graph.inserting_before(node):
                product = graph.call_function(aten.bmm.default, (b, c))
                total = graph.call_function(aten.add.Tensor, (product, a) if alpha == 1 else (a, product))
            if alpha != 1:
                total.kwargs = {"alpha": alpha}
            product.meta, total.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)
        if target is not aten.addcmul.default:
            continue
        a, b, c = node.args[:3]
        value = operand(node, 3, "value", 1)
        with graph.inserting_before(node):
            product = graph.call_function(aten.mul.Tensor, (b, c))
            total = graph.call_function(aten.add.Tensor, (a, product), {"alpha": value} if value != 1 else {})
        product.meta = {**node.meta, "val": b.meta["val"] * c.meta["val"]}
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def _needs_functional(graph: fx.Graph, varies: set[fx.Node]) -> bool:
    """Whether an in-place call on the way of the input could be seen through another name.

    Writes into fresh constants (masks filled piece by piece) are run as they are.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        shares = node.op == "call_function" and (node.target in VIEWS or is_mutable(node))
        root[node] = root[source] if shares and isinstance(source, fx.Node) else node
    for node in graph.nodes:
        if not is_mutable(node):
            continue
        if root[node].op != "placeholder" and root[node] not in varies and node not in varies:
            continue
        if not node.users or root[node].op == "placeholder":
            return True
        aliases = (n for n in graph.nodes if order[n] < order[node] and root[n] is root[node])
        if any(order[user] > order[node] for n in aliases for user in n.users):
            return True
    return False


def _calls(node: fx.Node) -> Iterator[tuple[str, str]]:
    """(path, name with "@k") of every module call around the node, outermost first, the root left out."""
    suffix = ""
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if not isinstance(path, str) or not path or path.startswith("_empty_nn_module_stack"):
            continue
        tail = str(key).rsplit("@", 1)
        if len(tail) == 2:
            suffix = "@" + "".join(c for c in tail[1] if c.isdigit())
        yield path, path + suffix


def _call_name(node: fx.Node) -> tuple[str, str]:
    """The innermost of them."""
    return [("", ""), *_calls(node)][-1]


def _batch_factor(size: Any, symbol: Any) -> int | None:
    """k if ``size`` is ``k * N``, else None."""
    if not isinstance(size, torch.SymInt):
        return None
    ratio = size.node.expr / symbol
    return int(ratio) if getattr(ratio, "is_Integer", False) else None


def _layout_of(node: fx.Node, shape: tuple[Any, ...], symbol: Any, info: dict[fx.Node, Info]) -> Layout | None:
    hits = [(d, k) for d, s in enumerate(shape) if (k := _batch_factor(s, symbol)) is not None]
    if len(hits) != 1:
        return None
    dim, factor = hits[0]
    if factor == 1:
        return Layout(dim)
    for arg in node.all_input_nodes:
        known = info[arg].layout
        if known is None or not info[arg].varies:
            continue
        if node.target in RESHAPES or node.target is aten.clone.default:
            # elements in front of the batch, in row-major order, stay in front of it
            before = 1
            for s in info[arg].shape[: known.dim]:
                before *= int(s)
            before *= known.pre
            ahead = 1
            for s in shape[:dim]:
                ahead *= int(s)
            if before % ahead == 0 and factor % (before // ahead) == 0:
                return Layout(dim, before // ahead, factor // (before // ahead))
            return None
        if known.pre * known.post == factor:
            return Layout(dim, known.pre, known.post)
    return None


def _non_negative(node: fx.Node, info: dict[fx.Node, Info]) -> bool:
    target, operands = functional(node.target), [info[a] for a in node.all_input_nodes]
    if target in NON_NEGATIVE:
        return True
    if target in CLAMPS:
        default = -1.0 if "hardtanh" in str(target) else None
        low = operand(node, 1, "min_val" if default is not None else "min", default)
        return isinstance(low, (int, float)) and low >= 0
    source = node.args[0] if node.args else None
    if target in REARRANGES | SELECTS | AVERAGES:
        return isinstance(source, fx.Node) and info[source].non_negative
    if target is aten.pad.default:
        value = operand(node, 3, "value", 0) or 0
        return isinstance(source, fx.Node) and info[source].non_negative and value >= 0
    if target in ADD | MUL | DIV:
        numbers = [a for a in node.args if isinstance(a, (int, float))]
        alpha = node.kwargs.get("alpha", 1)
        ok = all(n >= 0 for n in numbers) and isinstance(alpha, (int, float)) and alpha >= 0
        if target in MUL | DIV and len(operands) == 1 and not numbers:
            return True  # x * x
        return ok and all(o.non_negative for o in operands)
    if target in CATS:
        return all(o.non_negative for o in operands)
    return False


def capture(model: nn.Module, args: tuple[Tensor, ...]) -> Captured:
    """Export ``model`` and annotate every node.

    Raises
    ------
    ExportError
        If the graph can not be captured.
    OutputError
        If the model does not return exactly one floating-point tensor.
    """
    program = _export(model, args)
    varies = _varying(program)
    _check_modes(program, varies)
    if _needs_functional(program.graph, varies):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions({})
        _restore_batch_norms(program.graph)
    graph, signature = program.graph, program.graph_signature
    _spell_out(graph)
    varies = _varying(program)

    specs = {s.arg.name: s for s in signature.input_specs}
    by_identity = {id(p): name for name, p in model.named_parameters()}  # tied weights have one name there
    first_name = {name: by_identity[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    inputs: list[fx.Node] = []
    constants: dict[fx.Node, tuple[str, str]] = {}
    tensors: dict[str, Tensor] = {}
    info: dict[fx.Node, Info] = {}
    for node in graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind is InputKind.PARAMETER:
            constants[node] = ("parameter", first_name.get(str(spec.target), str(spec.target)))
        elif spec.kind is InputKind.BUFFER:
            constants[node] = ("buffer", str(spec.target))
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            name = str(spec.target)
            value = program.constants[name]
            constants[node] = ("constant", name)
            tensors[name] = value.detach() if isinstance(value, Tensor) else value
        else:
            raise ExportError(
                f"the model carries a constant of kind {spec.kind.name}",
                expected="parameters, buffers and tensors",
                got=str(spec.target),
                fix="explain the part of the model without it",
            )

    out_node = next(iter(graph.find_nodes(op="output")))
    user = [i for i, s in enumerate(signature.output_specs) if s.kind is OutputKind.USER_OUTPUT]
    flat = list(out_node.args[0])
    values = [flat[i] for i in user]
    if len(values) != 1 or not isinstance(values[0], fx.Node):
        got = f"{len(values)} values" if len(values) != 1 else repr(values[0])
        raise OutputError(
            f"{type(model).__name__} does not return one tensor",
            expected="one floating-point tensor with the batch first",
            got=got,
            fix="wrap the model in a module that returns the tensor to explain",
        )
    if not program.call_spec.out_spec.is_leaf():
        raise OutputError(
            f"{type(model).__name__} returns its tensor inside a container",
            expected="the tensor itself",
            got=str(program.call_spec.out_spec)[:120],
            fix="wrap the model in a module that returns the tensor to explain",
        )
    output = values[0]

    first_val = inputs[0].meta["val"]
    batch = first_val.shape[0]
    if not isinstance(batch, torch.SymInt):
        raise ExportError(
            "the model fixes the batch size",
            expected="a forward that works for every batch size",
            got=f"batch size {batch} only",
            fix="replace fixed numbers in view or reshape by x.shape[0] or -1",
        )
    symbol = batch.node.expr

    scopes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        val = node.meta.get("val")
        item = Info()
        item.path, item.module = _call_name(node)
        if isinstance(val, Tensor):
            item.shape, item.ndim = tuple(val.shape), val.ndim
        elif isinstance(val, (list, tuple)) and val and isinstance(val[0], Tensor):
            item.shape, item.ndim = tuple(val[0].shape), val[0].ndim
        sources = [info[a] for a in node.all_input_nodes]
        item.varies = node in varies
        item.per_call = (
            isinstance(val, (torch.SymInt, int))
            or any(s.per_call or (node.target in CREATES and s.varies) for s in sources)
            or any(isinstance(s, torch.SymInt) for s in item.shape)
        )
        info[node] = item
        item.layout = _layout_of(node, item.shape, symbol, info)
        if node.op == "call_function":
            item.non_negative = _non_negative(node, info)
            for _, name in _calls(node):
                scopes.setdefault(name, []).append(node)
    final = output.meta.get("val")
    if not isinstance(final, Tensor) or not final.is_floating_point() or not info[output].varies:
        raise OutputError(
            f"{type(model).__name__} does not return a floating-point tensor that depends on its input",
            expected="one floating-point tensor",
            got=str(getattr(final, "dtype", type(final).__name__)),
            fix="wrap the model in a module that returns the logits",
        )
    if info[output].layout != Layout(0):
        raise OutputError(
            f"the output of {type(model).__name__} does not start with the batch axis",
            expected="shape (N, ...)",
            got=str(tuple(final.shape)),
            fix="move the batch axis to the front",
        )
    return Captured(graph, info, inputs, constants, tensors, output, scopes)
