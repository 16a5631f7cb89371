"""The table of layers: how long each would take at other widths, measured once and kept."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress.meters import milliseconds, name_of
from lrp._files import replacing
from lrp.errors import FileFormatError, InputError, MissingDependencyError

__all__ = ["LatencyTable", "LayerSpec", "layer_specs"]

FORMAT, VERSION = "compress.LatencyTable", 1
_OPSET, _IR = 18, 8  # understood by runtimes since 2022


@dataclass(frozen=True)
class LayerSpec:
    """What the time of a convolution or linear layer depends on.

    Attributes
    ----------
    type : {"conv", "transposed", "linear"}
    inputs, outputs : int
        Channels or features.
    sizes : tuple of tuple of int
        For each call in one pass, the lengths of the input's axes beside batch
        and channels; empty where there are none.
    kernel, stride, dilation : tuple of int
        One entry per axis of a convolution.
    padding : tuple of int
        At all beginnings, then at all ends.
    output_padding : tuple of int
        Of a transposed convolution.
    groups : int
    bias : bool

    Examples
    --------
    >>> import torch
    >>> from compress.latency import layer_specs
    >>> spec = layer_specs(torch.nn.Conv2d(3, 8, 3), torch.randn(1, 3, 9, 9))[""]
    >>> spec.sizes, spec.resized(outputs=4).outputs
    (((9, 9),), 4)
    """

    type: str
    inputs: int
    outputs: int
    sizes: tuple[tuple[int, ...], ...] = ((),)
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        widths = (self.inputs, self.outputs, self.groups)
        if min(widths) < 1 or self.inputs % self.groups or self.outputs % self.groups:
            raise InputError(
                f"there is no {self.type} layer of these widths",
                expected="channels of at least 1, multiples of the groups",
                got=f"{self.inputs} inputs, {self.outputs} outputs, {self.groups} groups",
                fix="pass groups= too where both axes of a depthwise convolution shrink",
            )

    def resized(self, inputs: int | None = None, outputs: int | None = None, groups: int | None = None) -> LayerSpec:
        """The same layer with other widths; None leaves one as it is.

        Raises
        ------
        InputError
            If there is no such layer.
        """
        return replace(
            self,
            inputs=self.inputs if inputs is None else inputs,
            outputs=self.outputs if outputs is None else outputs,
            groups=self.groups if groups is None else groups,
        )

    @property
    def calls(self) -> tuple[LayerSpec, ...]:
        """One specification per call."""
        return tuple(replace(self, sizes=(size,)) for size in self.sizes)

    @property
    def key(self) -> str:
        """Text that differs wherever anything differs."""
        return json.dumps(list(asdict(self).values()), separators=(",", ":"))


class LatencyTable:
    """Milliseconds of single layers by a meter; each is measured when first asked for, and kept.

    A guide to where whole networks are worth measuring: sums leave out what is
    between the layers, and what a runtime saves by joining them.

    Parameters
    ----------
    meter : callable
        From the path of an ONNX file to milliseconds.
    cache : path, optional
        JSON file for the times, made if missing; several tables and meters may
        share it. Without it times are kept in memory.
    identity : str, optional
        Changes with whatever changes the times: device, runtime, threads,
        batch. Default: the meter's own ``identity``.

    Attributes
    ----------
    measured : int
        How often the meter was asked; what the cache holds is not asked for.

    Raises
    ------
    InputError
        If there is a cache, but no identity.
    FileFormatError
        If the file is no such table.

    Notes
    -----
    A layer is measured as an ONNX file of one node, with an open batch size as
    in the files of :func:`compress.export_onnx`.

    Examples
    --------
    >>> import torch
    >>> from compress.latency import LatencyTable, layer_specs
    >>> from compress.meters import onnxruntime_meter
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> specs = layer_specs(net, torch.randn(1, 8))
    >>> table = LatencyTable(onnxruntime_meter(repeats=5))
    >>> table.predict(specs.values()) == table.of(specs["0"]) + table.of(specs["2"])
    True
    """

    def __init__(
        self,
        meter: Callable[[Path], Any],
        cache: str | os.PathLike[str] | None = None,
        *,
        identity: str | None = None,
    ) -> None:
        self.meter = meter
        self.cache = None if cache is None else Path(cache)
        own = identity if identity is not None or cache is None else getattr(meter, "identity", None)
        if cache is not None and not (isinstance(own, str) and own):
            raise InputError(
                f"times of the meter '{name_of(meter)}' can not be told from those of another",
                expected="identity=, or a meter with an attribute 'identity': device, runtime, threads, batch",
                got=repr(own),
                fix="for example LatencyTable(meter, cache=path, identity='board 7, TFLite 2.16, 4 threads')",
            )
        self.identity: str = own or ""
        self.measured = 0
        self._times: dict[str, float] = {} if self.cache is None else _read(self.cache).get(self.identity, {})

    def of(self, spec: LayerSpec) -> float:
        """Milliseconds of all calls of a layer in one pass."""
        return sum(self._call(call) for call in spec.calls)

    def predict(self, specs: Iterable[LayerSpec]) -> float:
        """Sum over layers, in milliseconds."""
        return sum(self.of(spec) for spec in specs)

    def __len__(self) -> int:
        return len(self._times)

    def _call(self, spec: LayerSpec) -> float:
        found = self._times.get(spec.key)
        if found is None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "layer.onnx"
                path.write_bytes(_one_layer(spec))
                found = milliseconds(self.meter, path)
            self.measured += 1
            self._times[spec.key] = found
            self._write()
        return found

    def _write(self) -> None:
        if self.cache is None:
            return
        held = _read(self.cache)  # another table may have written since
        held[self.identity] = {**held.get(self.identity, {}), **self._times}
        text = json.dumps({"format": FORMAT, "version": VERSION, "times": held}, indent=0)
        with replacing(self.cache) as temporary:
            temporary.write_text(text, encoding="utf-8")


def layer_specs(model: Any, example_inputs: Any) -> dict[str, LayerSpec]:
    """Specifications of all convolutions and linear layers that one pass calls.

    Parameters
    ----------
    model : nn.Module
        Left as it is; a copy runs once.
    example_inputs : Tensor or tuple
        Its batch size does not matter.

    Returns
    -------
    dict of str to LayerSpec
        In the order of the calls. Layers that are computed without their module
        (inside of attention) are missing.

    Examples
    --------
    >>> import torch
    >>> from compress.latency import layer_specs
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(128, 2))
    >>> [(name, s.type, s.inputs, s.outputs) for name, s in layer_specs(net, torch.randn(1, 3, 4, 4)).items()]
    [('0', 'conv', 3, 8), ('2', 'linear', 128, 2)]
    """
    import torch
    from torch import Tensor, nn
    from torch.nn.modules.conv import _ConvNd

    from compress._data import device_of
    from compress.groups import as_inputs

    twin = copy.deepcopy(model).eval()
    place = device_of(twin)
    inputs = tuple(t.to(place) if isinstance(t, Tensor) else t for t in as_inputs(example_inputs))
    batch = next((len(t) for t in inputs if isinstance(t, Tensor) and t.dim()), 1)
    out: dict[str, LayerSpec] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor):
                spec = _spec(module, given[0], batch)
                out[name] = replace(out[name], sizes=out[name].sizes + spec.sizes) if name in out else spec

        return record

    for name, module in twin.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            module.register_forward_pre_hook(hook(name))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it passes hooks by
    try:
        with torch.no_grad():
            twin(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return out


def _spec(module: Any, x: Any, batch: int) -> LayerSpec:
    """Of one call."""
    from torch import nn

    rows = max(1, x.shape[0] // max(1, batch)) if x.dim() else 1  # windows or frames in the batch axis
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        size = tuple(x.shape[1:-1]) if rows == 1 else (rows, *x.shape[1:-1])
        return LayerSpec("linear", module.in_features, module.out_features, (size,), bias=bias)
    n = len(module.kernel_size)
    size = tuple(x.shape[-n:])
    rows = rows if x.dim() == n + 2 else 1
    twice = module._reversed_padding_repeated_twice  # numbers also where padding is "same"
    padding = tuple(twice[2 * k + side] for side in (0, 1) for k in reversed(range(n)))
    return LayerSpec(
        "transposed" if module.transposed else "conv",
        module.in_channels,
        module.out_channels,
        (size,) * rows,
        tuple(module.kernel_size),
        tuple(module.stride),
        padding,
        tuple(module.dilation),
        tuple(module.output_padding) if module.transposed else (),
        module.groups,
        bias,
    )


def _one_layer(spec: LayerSpec) -> bytes:
    """An ONNX file of one layer, with an open batch size."""
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise MissingDependencyError(
            "onnx is not installed",
            expected="onnx, to write the files that a meter measures",
            got=str(error),
            fix="pip install 'neuralize[onnx]'",
        ) from error
    import numpy as np

    (size,) = spec.sizes
    generator = np.random.default_rng(0)

    def values(name: str, *shape: int) -> Any:
        fan = math.prod(shape[1:]) or 1
        return numpy_helper.from_array((generator.standard_normal(shape) / fan**0.5).astype(np.float32), name)

    first: list[int | str] = []
    last: list[int | str] = []
    if spec.type == "linear":
        nodes, weights = _linear(spec, helper, values)
        first, last = [*size, spec.inputs], [*size, spec.outputs]
    else:
        transposed = spec.type == "transposed"
        rows, columns = (spec.inputs, spec.outputs) if transposed else (spec.outputs, spec.inputs)
        weights = [values("w", rows, columns // spec.groups, *spec.kernel)]
        weights += [values("b", spec.outputs)] if spec.bias else []
        options: dict[str, Any] = (
            {"output_padding": list(spec.output_padding)} if transposed and any(spec.output_padding) else {}
        )
        nodes = [
            helper.make_node(
                "ConvTranspose" if transposed else "Conv",
                ["x", *(w.name for w in weights)],
                ["y"],
                kernel_shape=list(spec.kernel),
                strides=list(spec.stride),
                pads=list(spec.padding),
                dilations=list(spec.dilation),
                group=spec.groups,
                **options,
            )
        ]
        first, last = [spec.inputs, *size], [spec.outputs, *(f"n{k}" for k in range(len(size)))]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *first])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *last])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    onnx.checker.check_model(model)
    written: bytes = model.SerializeToString()
    return written


def _linear(spec: LayerSpec, helper: Any, values: Callable[..., Any]) -> tuple[list[Any], list[Any]]:
    """As torch's exporter writes it: Gemm for a matrix, a product and a sum for more axes."""
    if not spec.sizes[0]:
        weights = [values("w", spec.outputs, spec.inputs)] + ([values("b", spec.outputs)] if spec.bias else [])
        return [helper.make_node("Gemm", ["x", *(w.name for w in weights)], ["y"], transB=1)], weights
    weights = [values("w", spec.inputs, spec.outputs)] + ([values("b", spec.outputs)] if spec.bias else [])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z" if spec.bias else "y"])]
    if spec.bias:
        nodes.append(helper.make_node("Add", ["z", "b"], ["y"]))
    return nodes, weights


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Identity to layer to milliseconds; empty if there is no file."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT or stored["version"] != VERSION:
            raise ValueError(f"'{stored['format']}', version {stored['version']}")
        out = {str(i): {str(k): float(v) for k, v in own.items()} for i, own in stored["times"].items()}
        if not all(v > 0 and math.isfinite(v) for own in out.values() for v in own.values()):
            raise ValueError("times that are none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is no table of latencies",
            expected=f"a JSON file of the kind '{FORMAT}', version {VERSION}",
            got=f"{type(error).__name__}: {error}",
            fix="name another file, or delete it and measure again",
        ) from error
    return out
