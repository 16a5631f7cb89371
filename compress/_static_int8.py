"""int8 weights and activations: onnxruntime's static quantization, with our integers in place of its own."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor
from torch.utils import _pytree as pytree

from compress._data import batches_of
from compress._onnx import runner_of, session_of, strip
from compress._parity import Twin, line, quiet, tensors_of
from compress._quantized_onnx import Use, attribute, new_name, outputs_axis, tidy, write_integers
from lrp.errors import ExportError, InputError, UnverifiedError

__all__ = ["INTEGER_OPS", "LEAST", "Agreement", "Rows", "StaticFile", "agreement", "check_fused", "quantize_statically"]

LEAST = 0.95  # share of held-out rows on which the file must name the class that the network names
_FEWEST = 2  # rows: one to calibrate, one to hold out
_TOGETHER = 32  # rows of a tensor
_LARGEST = 2**31 - 1
INTEGER_OPS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger")
FLOAT_OPS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


@dataclass(frozen=True)
class Rows:
    """Calibration data, parted: every second row is held out.

    Attributes
    ----------
    calibrating, held_out : list of tuple
        Batches of inputs, on the CPU, in the twin's type.
    """

    calibrating: list[tuple[Any, ...]]
    held_out: list[tuple[Any, ...]]

    @classmethod
    def of(cls, network: Twin, calibration: Any) -> Rows:
        """From batches x or (x, y), or from one tensor of rows.

        Raises
        ------
        InputError
        """
        data = list(torch.split(calibration, _TOGETHER)) if isinstance(calibration, Tensor) else calibration
        parts: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]] = ([], [])
        at = 0
        for batch in batches_of(data, "cpu", "calibration"):
            inputs = pytree.tree_map(_plain, batch.inputs)
            count = len(inputs[0])
            for k in range(len(parts)):
                rows = torch.arange((k + at) % 2, count, 2)
                if len(rows):
                    parts[k].append(pytree.tree_map(lambda t, rows=rows, n=count: _take(t, rows, n), inputs))
            at += count
        if at < _FEWEST:
            raise InputError(
                "there are too few calibration rows",
                expected=f"{_FEWEST} or more, of which every second one is held out to compare on",
                got=str(at),
                fix="pass some hundred",
            )
        if not network.dynamic:
            parts = (_regrouped(parts[0], network.batch), _regrouped(parts[1], network.batch))
        return cls(*parts)

    @staticmethod
    def count(batches: Sequence[tuple[Any, ...]]) -> int:
        return sum(len(tensors_of(b)[0]) for b in batches)


def _plain(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    return t.detach().to("cpu", torch.float32 if t.is_floating_point() else None)


def _take(t: Any, rows: Tensor, count: int) -> Any:
    return t[rows] if isinstance(t, Tensor) and t.dim() and len(t) == count else t


def _regrouped(batches: list[tuple[Any, ...]], size: int) -> list[tuple[Any, ...]]:
    """Batches of exactly that size, for files that take no other; rows are repeated to fill the last."""
    single = [pytree.tree_map(lambda t, i=i: t[i : i + 1] if isinstance(t, Tensor) else t, b)
              for b in batches for i in range(len(b[0]))]  # fmt: skip
    out = []
    for start in range(0, len(single), size):
        rows = [single[(start + i) % len(single)] for i in range(size)]
        out.append(tuple(torch.cat(p) if isinstance(p[0], Tensor) else p[0] for p in zip(*rows, strict=True)))
    return out


@dataclass(frozen=True)
class Agreement:
    """On how many held-out rows the file names the class that the network names.

    Attributes
    ----------
    same, rows : int
    error : float
        Largest difference of an output, as a share of the largest output.
    """

    same: int
    rows: int
    error: float

    @property
    def share(self) -> float:
        return self.same / self.rows

    def __str__(self) -> str:
        return f"top-1 {self.share:.4f} of {self.rows} held-out rows"


@dataclass(frozen=True)
class StaticFile:
    """What static quantization made.

    Attributes
    ----------
    proto : ModelProto
    layers : int
        That should compute with integers.
    rounded : list of str
        Weights without a codebook, rounded to int8 per channel here.
    moved : dict of str to int
        Integers that are not the network's, by tensor: where a channel's bias
        would not fit 32 bits at its step, the channel lies on a coarser one; it
        is 0 where its batch-norm factor is.
    """

    proto: Any
    layers: int
    rounded: list[str]
    moved: dict[str, int]


# -- making it ----------------------------------------------------------------
def quantize_statically(proto: Any, uses: list[Use], rows: Rows) -> StaticFile:
    """Calibrate, quantize, and put the network's own integers and scales in.

    Parameters
    ----------
    proto : ModelProto
        With detached weights, as :func:`compress._quantized_onnx.uses_of`
        leaves it; changed.

    Raises
    ------
    ExportError
    """
    uses = _without_transposes(proto, uses)
    owner: dict[str, Use] = {}
    for use in uses:
        name = new_name(proto.graph, f"{use.grid.name}.float")
        values = use.grid.values(use.scale, use.axis)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
        use.node.input[use.index] = name
        owner[name] = use
    _name_nodes(proto)
    _part_biases(proto)
    tidy(proto, shapes=True)  # the tool's own inference of shapes does not know every operation
    excluded = [use.node.name for use in uses if not _is_computed(use)]
    made = _run_tool(proto, rows, excluded)
    found = _Overwriting(proto, made, owner).run()
    _restore_floats(made, owner)
    tidy(made)
    return found


def _is_computed(use: Use) -> bool:
    """Whether onnxruntime has the layer with integers, for scales as these."""
    axis = outputs_axis(use.node, use.index)
    return axis is not None and use.node.op_type != "ConvTranspose" and use.axis in (None, axis)


def _without_transposes(proto: Any, uses: list[Use]) -> list[Use]:
    """Weights that only a MatMul reads, through a transpose, lie in the file as it reads them."""
    out = []
    for use in uses:
        node, k = use.node, use.grid.k
        readers = [(n, i) for n in proto.graph.node for i, name in enumerate(n.input) if name == node.output[0]]
        turned = node.op_type == "Transpose" and k.ndim == 2 and list(attribute(node, "perm", [1, 0])) == [1, 0]
        if not turned or not readers or any(n.op_type != "MatMul" or i != 1 for n, i in readers):
            out.append(use)
            continue
        axis = None if use.axis is None else 1 - use.axis
        grid = replace(use.grid, k=np.ascontiguousarray(k.T), axis=axis)
        out += [Use(grid, n, i, use.scale, axis) for n, i in readers]
        proto.graph.node.remove(node)
    return out


def _name_nodes(proto: Any) -> None:
    """Every node gets a name of its own, by which it is found again."""
    taken: set[str] = set()
    for i, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}.{i}"
        taken.add(node.name)


def _part_biases(proto: Any) -> None:
    """Each layer gets a bias of its own: its integers depend on the layer's scales."""
    held = {t.name: t for t in proto.graph.initializer}
    seen: set[str] = set()
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2] in held:
            if node.input[2] in seen:
                again = onnx.TensorProto()
                again.CopyFrom(held[node.input[2]])
                again.name = new_name(proto.graph, f"{node.input[2]}.again")
                proto.graph.initializer.append(again)
                node.input[2] = again.name
            seen.add(node.input[2])


class _Reader:
    """Calibration batches, as onnxruntime wants them."""

    def __init__(self, names: list[str], batches: list[tuple[Any, ...]]) -> None:
        self.names, self.batches = names, iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        if batch is None:
            return None
        return {name: t.numpy() for name, t in zip(self.names, tensors_of(batch), strict=True)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (batch := self.get_next()) is not None:
            yield batch


@contextmanager
def _untouched_logging() -> Iterator[None]:
    """The tool sets up the root logger at its import, and talks through it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        root.setLevel(logging.CRITICAL)
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _run_tool(proto: Any, rows: Rows, excluded: list[str]) -> Any:
    """The pinned recipe: QDQ, unsigned activations, signed weights, per channel. Others are slower than float32."""
    names = [i.name for i in proto.graph.input]
    marked = onnx.ModelProto()
    marked.CopyFrom(proto)
    marked.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    try:
        with tempfile.TemporaryDirectory() as folder, _untouched_logging(), quiet():
            from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

            quantize_static(
                marked,
                Path(folder) / "static.onnx",
                _Reader(names, rows.calibrating),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
                calibrate_method=CalibrationMethod.MinMax,
            )
            made = onnx.load(Path(folder) / "static.onnx")
    except Exception as error:  # the tool raises many kinds
        raise ExportError(
            "onnxruntime's static quantization does not take this network",
            expected="layers that it knows, and calibration rows that the network takes",
            got=f"{type(error).__name__}: {line(error)}",
            fix="check the shape of the calibration rows against example_inputs; form='int8' needs none",
        ) from error
    strip(made)
    made.producer_name, made.producer_version = proto.producer_name, proto.producer_version
    return made


# -- our integers ---------------------------------------------------------------
class _Overwriting:
    """Weights, scales and biases of the tool's file become those of the network."""

    def __init__(self, proto: Any, made: Any, owner: dict[str, Use]) -> None:
        self.made, self.owner = made, owner
        self.floats = {t.name: t for t in proto.graph.initializer}
        self.inputs = {node.name: list(node.input) for node in proto.graph.node}
        self.held = {t.name: t for t in made.graph.initializer}
        self.sources = {name: node for node in made.graph.node for name in node.output}
        self.named: dict[tuple[str, bytes], str] = {}
        self.moved: dict[str, int] = {}

    def run(self) -> StaticFile:
        layers, rounded = 0, []
        for node in self.made.graph.node:
            if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
                continue
            x, w = (self._dequantizer(node.input[i]) for i in (0, 1))
            if x is None or w is None or w.input[0] not in self.held:
                continue
            layers += 1
            name = w.input[0].removesuffix("_quantized")
            if name in self.owner:
                self._layer(node, self.owner[name], x, w)
            else:
                rounded.append(name)
        return StaticFile(self.made, layers, rounded, self.moved)

    def _dequantizer(self, name: str) -> Any:
        source = self.sources.get(name)
        return source if source is not None and source.op_type == "DequantizeLinear" else None

    def _array(self, name: str) -> NDArray[Any]:
        found: NDArray[Any] = numpy_helper.to_array(self.held[name])
        return found

    def _put(self, name: str, values: NDArray[Any]) -> None:
        self.held[name].CopyFrom(numpy_helper.from_array(values, name))

    def _layer(self, node: Any, use: Use, x: Any, w: Any) -> None:
        grid = use.grid
        axis = outputs_axis(node, 1)
        assert axis is not None
        k, shape = grid.k, [1] * grid.k.ndim
        shape[axis] = -1
        scale = np.broadcast_to(use.scale.astype(np.float64), (k.shape[axis],)).copy()
        bias = self._dequantizer(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if bias is not None:
            b = numpy_helper.to_array(self.floats[self.inputs[node.name][2]]).astype(np.float64)
            step = float(self._array(x.input[1]))
            k, scale = self._fitted(grid.name, k, scale, b, step, axis)
            both = (scale * step).astype(np.float32)
            whole = np.rint(b / both.astype(np.float64)).clip(-_LARGEST, _LARGEST)
            self._put(bias.input[0], whole.astype(np.int32))
            self._put(bias.input[1], both)
            self._put(bias.input[2], np.zeros(len(both), np.int32))
            _set_axis(bias, 0)
        # a zero point for all channels, which is all that onnxruntime's kernel takes
        zero = 127 - grid.high if grid.high > 127 else -128 - grid.low if grid.low < -128 else 0
        stored = (k + zero).astype(np.int8)
        self._put(w.input[1], scale.astype(np.float32))
        self._put(w.input[2], np.full(len(scale), zero, np.int8))
        _set_axis(w, axis)
        w.input[0] = self._once(grid.name, w.input[0], stored)

    def _fitted(
        self,
        name: str,
        k: NDArray[np.int64],
        scale: NDArray[np.float64],
        b: NDArray[np.float64],
        step: float,
        axis: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Channels whose bias would be beyond 32 bits take the least coarser step at which it is not."""
        least = np.maximum(np.abs(b) / (step * (_LARGEST // 2)), float(np.finfo(np.float32).tiny) / min(step, 1.0))
        small = np.abs(scale) < least
        if not small.any():
            return k, scale
        coarser = np.where(small, np.where(scale < 0, -least, least), scale)
        shape = [1] * k.ndim
        shape[axis] = -1
        moved = np.rint(k * (scale / coarser).reshape(shape)).astype(np.int64)
        moved = np.where(small.reshape(shape), moved, k)
        self.moved[name] = self.moved.get(name, 0) + int((moved != k).sum())
        return moved, coarser

    def _once(self, name: str, old: str, stored: NDArray[np.int8]) -> str:
        """Integers under the name of the parameter, and the same ones once."""
        key = (name, stored.tobytes())
        if key not in self.named:
            self.named[key] = new_name(self.made.graph, name)
            self._put(old, stored)
            self.held[old].name = self.named[key]
        return self.named[key]


def _set_axis(node: Any, axis: int) -> None:
    kept = [a for a in node.attribute if a.name != "axis"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("axis", axis)])


def _restore_floats(made: Any, owner: dict[str, Use]) -> None:
    """Weights that the tool left in float32 become integers that are read as in the weight-only forms."""
    left = []
    for node in made.graph.node:
        for i, name in enumerate(node.input):
            if name in owner:
                use = owner[name]
                left.append(Use(use.grid, node, i, use.scale, use.axis))
    write_integers(made, left, "int8")


# -- checks ---------------------------------------------------------------------
def check_fused(path: Path, made: StaticFile, force: bool) -> str:
    """That onnxruntime fuses every layer into an integer kernel; says how many, of which kinds.

    Raises
    ------
    UnverifiedError
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "optimised.onnx"
        session_of(path, optimised=place)
        graph = onnx.load(place).graph
    kinds = [n.op_type for n in _weighted(graph)]
    fused = ", ".join(f"{kinds.count(kind)} {kind}" for kind in INTEGER_OPS if kind in kinds) or "none"
    left = sum(kind in FLOAT_OPS for kind in kinds)
    kept = sum(n.op_type in FLOAT_OPS for n in _weighted(made.proto.graph)) - made.layers  # in float32 on purpose
    if (left > kept or fused == "none") and not force:
        raise UnverifiedError(
            "onnxruntime leaves layers of this file in float32",
            expected=f"{made.layers} integer layers in the optimised graph" if made.layers else "layers with integers",
            got=f"{fused}, and {left} in float32",
            fix="quantize convolutions and linear layers, with one step per tensor or per output channel; force=True "
            "writes the file all the same",
        )
    return f"{fused}; {left} layers in float32"


def _weighted(graph: Any) -> list[Any]:
    """Nodes with a constant matrix or kernel, behind a DequantizeLinear or not."""
    constants = {t.name for t in graph.initializer if len(t.dims) > 1}
    for node in graph.node:
        if node.op_type in ("DequantizeLinear", "Flatten", "Transpose") and node.input[0] in constants:
            constants.add(node.output[0])
    return [n for n in graph.node if n.op_type in (*INTEGER_OPS, *FLOAT_OPS) and constants & set(n.input)]


def agreement(network: Twin, path: Path, held_out: list[tuple[Any, ...]], force: bool) -> Agreement | None:
    """Top-1 of the file against the network's; None, if forced, where there are no classes.

    Raises
    ------
    UnverifiedError
        If they agree on less than ``LEAST``.
    InputError
        If the first output holds no classes.
    """
    run, _ = runner_of(session_of(path))
    same = rows = 0
    error = largest = 0.0
    for inputs in held_out:
        ours = network.run("the calibration rows", inputs)
        theirs = run(inputs)
        a, b = ours[0], theirs[0]
        if a.dim() < 2 or a.shape[1] < 2 or not a.is_floating_point():
            if force:
                return None
            raise InputError(
                "top-1 agreement can not be measured",
                expected="a first output of class scores, (N, K) with K of 2 or more",
                got=f"{a.dtype} {tuple(a.shape)}",
                fix="force=True writes the file all the same; compare it yourself",
            )
        same += int((a.argmax(1) == b.argmax(1)).sum())
        rows += a.argmax(1).numel()
        error, largest = max(error, float((a - b).abs().max())), max(largest, float(a.abs().max()))
    found = Agreement(same, rows, error / largest if largest else error)
    if found.share < LEAST and not force:
        raise UnverifiedError(
            "int8 activations change what the network says",
            expected=f"the same class on {LEAST:.0%} of the held-out rows",
            got=f"{found.share:.1%} of {rows}",
            fix="calibrate with more rows, of all classes and scaled as in use; form='int8' keeps float32 "
            "activations; force=True writes it all the same; nothing was written",
        )
    return found
