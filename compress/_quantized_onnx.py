"""Integers in an ONNX graph: where quantized weights are used, batch norms folded into their scales, packing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compress._parity import Twin
from compress.quantization_plan import QuantizationPlan
from lrp.errors import ExportError, InputError, UnverifiedError

__all__ = [
    "Grid",
    "Use",
    "attribute",
    "check_fits",
    "detach",
    "grids_of",
    "integers_in",
    "new_name",
    "outputs_axis",
    "spelled_out",
    "tidy",
    "uses_of",
    "verify",
    "write_integers",
]

_SCALED = ("Conv", "ConvTranspose", "Gemm")  # a factor per output channel can go into their weight
# onnxruntime would fuse these with a DequantizeLinear into MatMulNBits, which rounds activations to 8 bits; a Flatten
# between them, which changes nothing, keeps them apart
_MULTIPLYING = ("MatMul", "Transpose")
_NIBBLES = {"INT4": TensorProto.INT4, "UINT4": TensorProto.UINT4}
_BYTES = {"INT8": TensorProto.INT8, "UINT8": TensorProto.UINT8}


@dataclass(frozen=True)
class Grid:
    """A quantized parameter: whole numbers times steps.

    Attributes
    ----------
    name : str
    k : int64 array, shape of the parameter
    step : float64 array, () or (C,)
    low, high : int
    axis : int or None
        Along which ``step`` runs.
    """

    name: str
    k: NDArray[np.int64]
    step: NDArray[np.float64]
    low: int
    high: int
    axis: int | None

    @property
    def levels(self) -> int:
        return self.high - self.low + 1

    def values(self, scale: NDArray[Any] | None = None, axis: int | None = None) -> NDArray[np.float32]:
        """Weights, at their own steps or at others; one rounding each."""
        scale, axis = (self.step, self.axis) if scale is None else (scale, axis)
        shape = [1] * self.k.ndim
        if axis is not None:
            shape[axis] = -1
        spread = scale.astype(np.float64).reshape(shape)
        found: NDArray[np.float32] = (self.k * spread).astype(np.float32)
        return found

    def storage(self, form: str) -> tuple[str, int]:
        """Type of ONNX and zero point: that which is added to the whole numbers."""
        bits = 4 if form == "int4" and self.levels <= 16 else 8
        half = 2 ** (bits - 1)
        if -half <= self.low and self.high < half:
            return f"INT{bits}", 0
        return f"UINT{bits}", -self.low


@dataclass
class Use:
    """A place where a graph takes a quantized parameter.

    Attributes
    ----------
    grid : Grid
    node : NodeProto
        The reader.
    index : int
        Which of its inputs.
    scale : float32 array, () or (C,)
        The step, times the factor of a batch norm that was folded.
    axis : int or None
    folded : str
        The output of the batch norm; "" if there was none.
    """

    grid: Grid
    node: Any
    index: int
    scale: NDArray[np.float32]
    axis: int | None
    folded: str = ""


def grids_of(network: Twin, plan: QuantizationPlan, indices: Mapping[str, torch.Tensor]) -> dict[str, Grid]:
    """Grids by every name a parameter has in the twin, whose weights become k * step exactly."""
    state = network.model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, t in state.items():
        names.setdefault(id(t), []).append(name)
    out: dict[str, Grid] = {}
    for name, book in plan.codebooks.items():
        t = state[name]
        step = book.step.detach().cpu().double().numpy()
        grid = Grid(name, indices[name].cpu().numpy(), step, book.low, book.high, book.axis)
        with torch.no_grad():
            t.copy_(torch.from_numpy(grid.values()).view_as(t))  # half networks have rounded their weights off it
        for alias in names[id(t)]:
            out[alias] = grid
    return out


def detach(model: Any, read: set[str], grids: Mapping[str, Grid]) -> None:
    """Turn quantized initializers of an ``onnx_ir.Model`` into inputs, out of the optimiser's reach.

    ``read``: the parameters that the network reads; others need not be there.

    Raises
    ------
    ExportError
        If a parameter is not among the initializers as it was, though the
        network reads it.
    """
    graph = model.graph
    for name, grid in grids.items():
        value = graph.initializers.get(name)
        if value is None:
            if name in read:
                raise _lost(name, "none of that name")
            continue
        held = value.const_value.numpy()
        if held.shape != grid.k.shape or not np.array_equal(held.astype(np.float32), grid.values()):
            raise _lost(name, "other values")
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)


def _lost(name: str, got: str) -> ExportError:
    return ExportError(
        f"the quantized weight '{name}' is not in the exported graph as it was",
        expected="an initializer with its name and values",
        got=got,
        fix="report it with the versions of torch and onnxscript; form='fp32' does not need it",
    )


# -- where weights are used ---------------------------------------------------
def uses_of(proto: Any, grids: Mapping[str, Grid]) -> list[Use]:
    """Every reader of a detached weight; batch norms behind a layer are folded into scale and bias.

    The weights are no inputs of the graph any longer, and not yet anything else.
    """
    graph = proto.graph
    present = [i.name for i in graph.input if i.name in grids]
    kept = [i for i in graph.input if i.name not in grids]
    del graph.input[:]
    graph.input.extend(kept)
    graph_of = _Readers(graph)
    found = []
    for name in present:
        grid = grids[name]
        for node, index in graph_of.readers.get(name, []):
            use = Use(grid, node, index, grid.step.astype(np.float32), grid.axis)
            axis = outputs_axis(node, index)
            if axis is not None and grid.axis in (None, axis):
                _fold(graph, graph_of, use, axis)
            found.append(use)
    return found


def outputs_axis(node: Any, index: int) -> int | None:
    """The axis of a weight along which the outputs of a layer lie; None for other nodes."""
    if index != 1 or node.op_type not in (*_SCALED, "MatMul") or node.domain:
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if attribute(node, "group", 1) == 1 else None
    if node.op_type == "MatMul":
        return 1
    plain = attribute(node, "alpha", 1.0) == 1 and attribute(node, "beta", 1.0) == 1
    return (0 if attribute(node, "transB", 0) else 1) if plain else None


def attribute(node: Any, name: str, otherwise: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), otherwise)


class _Readers:
    """Who reads a value, at the top of a graph or inside of branches; and the constants."""

    def __init__(self, graph: Any) -> None:
        self.readers: dict[str, list[tuple[Any, int]]] = {}
        self.outputs = {o.name for o in graph.output}
        for node in _nodes(graph):
            for i, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, i))
        self.constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}

    def only_reader(self, name: str) -> Any:
        """The one node that reads a value; None if there are others, or it is an output of the graph."""
        readers = self.readers.get(name, [])
        return readers[0][0] if len(readers) == 1 and name not in self.outputs else None


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes, those of branches and loops included."""
    for node in graph.node:
        yield node
        for a in node.attribute:
            for inner in (a.g, *a.graphs):
                yield from _nodes(inner)


def _fold(graph: Any, around: _Readers, use: Use, axis: int) -> None:
    """The batch norm that alone reads a layer's output goes into scale and bias; others stay."""
    node = use.node
    norm = around.only_reader(node.output[0])
    if norm is None or norm.op_type != "BatchNormalization" or attribute(norm, "training_mode", 0):
        return
    if node.op_type not in _SCALED or norm.input[0] != node.output[0] or not any(n is norm for n in graph.node):
        return
    named = (*norm.input[1:5], *([node.input[2]] if len(node.input) > 2 and node.input[2] else ()))
    if not all(name in around.constants for name in named):
        return
    gamma, beta, mean, var, *bias = (around.constants[name].astype(np.float64) for name in named)
    if bias and bias[0].shape != mean.shape:  # a Gemm may add anything
        return
    factor = gamma / np.sqrt(var + float(attribute(norm, "epsilon", 1e-5)))
    use.scale = (use.grid.step * factor).astype(np.float32)
    use.axis, use.folded = axis, norm.output[0]
    shifted = beta + ((bias[0] if bias else 0.0) - mean) * factor
    name = new_name(graph, f"{use.grid.name}.bias")
    graph.initializer.append(numpy_helper.from_array(shifted.astype(np.float32), name))
    del node.input[2:]
    node.input.append(name)
    node.output[0] = norm.output[0]
    graph.node.remove(norm)


def new_name(graph: Any, name: str) -> str:
    taken = {t.name for t in graph.initializer} | {v.name for v in (*graph.input, *graph.output)}
    for node in _nodes(graph):
        taken.update((*node.input, *node.output))
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


# -- integers in the file -----------------------------------------------------
def write_integers(proto: Any, uses: list[Use], form: str) -> dict[str, str]:
    """Integer initializers, with the names of the parameters, each read through DequantizeLinear.

    Returns
    -------
    dict of str to str
        The type of every quantized tensor.
    """
    graph = proto.graph
    stored: dict[str, str] = {}
    made: dict[tuple[str, bytes, int | None], str] = {}
    apart: dict[str, str] = {}
    for use in uses:
        grid = use.grid
        kind, zero = grid.storage(form)
        if grid.name not in stored:
            graph.initializer.append(_tensor(grid.name, kind, grid.k + zero))
            stored[grid.name] = kind
        key = (grid.name, use.scale.tobytes(), use.axis)
        if key not in made:
            inputs = [grid.name, new_name(graph, f"{grid.name}.scale")]
            graph.initializer.append(numpy_helper.from_array(np.asarray(use.scale), inputs[1]))
            if zero:
                inputs.append(new_name(graph, f"{grid.name}.zero_point"))
                graph.initializer.append(_tensor(inputs[2], kind, np.full(use.scale.shape, zero)))
            made[key] = new_name(graph, f"{grid.name}.float")
            axis: dict[str, Any] = {} if use.axis is None else {"axis": use.axis}
            graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, [made[key]], name=made[key], **axis))
        read = made[key]
        if use.node.op_type in _MULTIPLYING and grid.k.ndim == 2:
            if read not in apart:
                apart[read] = new_name(graph, f"{grid.name}.matrix")
                node = helper.make_node("Flatten", [read], [apart[read]], name=apart[read], axis=1)
                graph.node.insert(len(made) + len(apart) - 1, node)
            read = apart[read]
        use.node.input[use.index] = read
    tidy(proto)
    return stored


def tidy(proto: Any, shapes: bool = False) -> None:
    """Without initializers that nothing reads any longer, and without the shapes of values inside, unless wanted."""
    graph = proto.graph
    read = {name for node in _nodes(graph) for name in node.input} | {o.name for o in graph.output}
    kept = [t for t in graph.initializer if t.name in read]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
    made = {name for node in graph.node for name in node.output} if shapes else set()
    known = [v for v in graph.value_info if v.name in made]
    del graph.value_info[:]
    graph.value_info.extend(known)


def _tensor(name: str, kind: str, values: NDArray[np.int64]) -> Any:
    """An integer tensor with its bytes in raw_data, where they take the least room; low nibble first."""
    if kind in _NIBBLES:
        flat = (values.reshape(-1) & 0xF).astype(np.uint8)
        flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
        raw = (flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
        return helper.make_tensor(name, _NIBBLES[kind], values.shape, raw, raw=True)
    raw = values.astype(np.int8 if kind == "INT8" else np.uint8).tobytes()
    return helper.make_tensor(name, _BYTES[kind], values.shape, raw, raw=True)


def integers_in(proto: Any) -> dict[str, NDArray[np.int64]]:
    """Whole numbers k of every tensor that a DequantizeLinear reads, by name: zero points taken off."""
    held = {t.name: t for t in proto.graph.initializer}
    out = {}
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in held:
            continue
        k = numpy_helper.to_array(held[node.input[0]]).astype(np.int64)
        if len(node.input) > 2 and node.input[2]:
            zero = numpy_helper.to_array(held[node.input[2]]).astype(np.int64)
            shape = [1] * k.ndim
            if zero.ndim:
                shape[attribute(node, "axis", 1)] = -1
            k = k - zero.reshape(shape)
        out[node.input[0]] = k
    return out


def spelled_out(path: Path) -> bytes:
    """A file of integer weights with the float32 numbers they stand for: its fp32 form."""
    proto = onnx.load(path)
    graph = proto.graph
    held = {t.name: t for t in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or not all(name in held for name in node.input):
            kept.append(node)
            continue
        q, scale, *zero = (numpy_helper.to_array(held[name]) for name in node.input)
        shape = [1] * q.ndim
        if scale.ndim:
            shape[attribute(node, "axis", 1)] = -1
        k = q.astype(np.int64) - (zero[0].astype(np.int64).reshape(shape) if zero else 0)
        values = (k * scale.astype(np.float64).reshape(shape)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    tidy(proto)
    raw: bytes = proto.SerializeToString()
    return raw


def verify(serialised: bytes, grids: Iterable[Grid], moved: Mapping[str, int] | None = None) -> None:
    """That the integers of a file are those of the network, every one.

    ``moved``: by name, how many entries are known to differ. A matrix may lie
    turned, as a MatMul reads it; whether it is read as it lies is seen in the
    outputs, which are compared elsewhere.

    Raises
    ------
    UnverifiedError
    """
    found = integers_in(onnx.load_from_string(serialised))
    for grid in grids:
        k = found.get(grid.name)
        ways = [] if k is None else [k, k.T] if k.ndim == 2 else [k]
        counts = [int(np.count_nonzero(way != grid.k)) for way in ways if way.shape == grid.k.shape]
        fits = bool(counts)
        differing = min(counts, default=grid.k.size)
        if differing > (moved or {}).get(grid.name, 0):
            raise UnverifiedError(
                f"the file holds other integers than '{grid.name}'",
                expected="those of the network, bit for bit",
                got=f"{differing:,} of {grid.k.size:,} that differ" if fits else "none of its shape",
                fix="report it; nothing was written",
            )


def check_fits(grids: Mapping[str, Grid]) -> None:
    """That there is something for 4 bits.

    Raises
    ------
    InputError
    """
    if not any(grid.levels <= 16 for grid in grids.values()):
        raise InputError(
            "no weight of this network fits 4 bits",
            expected="a tensor with at most 16 levels; the others go into int8 beside it",
            got=f"{min(g.levels for g in grids.values())} levels or more in every tensor",
            fix="export form='int8', or quantize to 4 bits or less",
        )
