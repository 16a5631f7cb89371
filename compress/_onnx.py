"""From a network to an ONNX graph, and from a file to a function that runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress._parity import Runner, Twin, line, quiet, tensors_of
from lrp.errors import ExportError, UnverifiedError

__all__ = ["capture", "runner_of", "session_of", "strip", "translate"]


def capture(network: Twin) -> torch.export.ExportedProgram:
    """The graph of a network, as torch.export sees it.

    Raises
    ------
    ExportError
    """
    name = type(network.model).__name__
    try:
        return _exported(network, network.shapes())
    except Exception as error:
        if network.dynamic and _is_captured(network):
            raise ExportError(
                f"{name} fixes the batch size",
                expected="a forward on which every batch size takes the same path",
                got=f"a graph for {network.exported} samples only",
                fix="use x.shape[0] or -1 in place of numbers and of len(x), or pass dynamic_batch=False for the batch "
                "size of the example alone",
            ) from error
        raise ExportError(
            f"the graph of {name} can not be captured by torch.export",
            expected="a forward without branches on data",
            got=f"{type(error).__name__}: {line(error)}",
            fix="replace the data-dependent branch by tensor operations (torch.where)",
        ) from error


def _exported(network: Twin, shapes: Any) -> torch.export.ExportedProgram:
    with quiet(), torch.no_grad():
        return torch.export.export(network.model, network.twin(), dynamic_shapes=shapes, strict=False)


def _is_captured(network: Twin) -> bool:
    """Whether it is with a batch of fixed size."""
    try:
        _exported(network, None)
    except Exception:  # torch.export raises many kinds
        return False
    return True


def translate(network: Twin, opset: int | None, prepare: Callable[[Any, set[str]], None] | None = None) -> Any:
    """The ONNX model, without the exporter's notes on the source code.

    ``prepare`` changes the graph (an ``onnx_ir.Model``) before it is optimised;
    initializers have the names of parameters there. It also gets the names of
    those parameters that the network reads.

    Raises
    ------
    ExportError
    """
    program = capture(network)
    names = _names(network)
    try:
        with quiet(), torch.no_grad():
            translated = torch.onnx.export(
                program,
                network.twin(),
                dynamo=True,
                input_names=names[0],
                output_names=names[1],
                dynamic_shapes=network.shapes(),
                opset_version=opset,
                optimize=prepare is None,
                verbose=False,
            )
            assert translated is not None
            if prepare is not None:
                prepare(translated.model, _read_in(program))
                translated.optimize()
    except ExportError:
        raise
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(
            f"{type(network.model).__name__} can not be written as ONNX",
            expected="operations that ONNX has",
            got=f"{type(error).__name__}: {line(error)}",
            fix="replace the operation, or use export_program",
        ) from error
    proto = translated.model_proto
    written = next(o.version for o in proto.opset_import if not o.domain)
    if opset is not None and written != opset:
        raise ExportError(
            f"the exporter can not write opset {opset}",
            expected=f"opset {opset}",
            got=f"opset {written}",
            fix=f"leave opset out, or ask for {written} or more",
        )
    strip(proto)
    return proto


def _read_in(program: torch.export.ExportedProgram) -> set[str]:
    """Parameters and buffers that the graph reads."""
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    specs = program.graph_signature.input_specs
    return {str(s.target) for s in specs if s.target is not None and getattr(s.arg, "name", None) in read}


def _names(network: Twin) -> tuple[list[str], list[str]]:
    """Of the file's inputs and outputs, which are the tensors among those of the network."""
    count = len(tensors_of(network.inputs))
    parameters = list(inspect.signature(network.model.forward).parameters.values())
    named = [p.name for p, value in zip(parameters, network.inputs, strict=False) if isinstance(value, Tensor)]
    if count == 1:
        inputs = ["input"]
    elif len(named) == count and all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in parameters):
        inputs = named
    else:
        inputs = [f"input_{k}" for k in range(count)]
    count = len(network.run("the example", network.inputs))
    return inputs, ["output"] if count == 1 else [f"output_{k}" for k in range(count)]


def strip(proto: Any) -> None:
    """Leave out stack traces and paths of the machine the file was made on."""
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for function in proto.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""


def session_of(path: Path, options: Mapping[str, str] | None = None, optimised: Path | None = None) -> Any:
    """An onnxruntime session on the CPU, in as many threads as torch has.

    Raises
    ------
    UnverifiedError
        If onnxruntime can't open the file.
    """
    import onnxruntime

    wanted = onnxruntime.SessionOptions()
    wanted.log_severity_level = 4  # what goes wrong is raised
    wanted.intra_op_num_threads = max(1, torch.get_num_threads())
    for key, value in (options or {}).items():
        wanted.add_session_config_entry(key, value)
    if optimised is not None:
        wanted.optimized_model_filepath = str(optimised)
    try:
        return onnxruntime.InferenceSession(str(path), wanted, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnverifiedError(
            f"onnxruntime {onnxruntime.__version__} can not open the exported file",
            expected="operators of a version it knows",
            got=f"{type(error).__name__}: {line(error)}",
            fix="pass a lower opset, update onnxruntime, or check=False if it is for another runtime",
        ) from error


def runner_of(session: Any) -> tuple[Runner, str]:
    """A function that runs a session, and the runtime's name."""
    import onnxruntime

    names = [i.name for i in session.get_inputs()]

    def run(inputs: tuple[Any, ...]) -> list[Tensor]:
        given = tensors_of(inputs)
        if len(given) != len(names):
            raise ValueError(f"the file takes {len(names)} of {len(given)} inputs")
        found = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
        return [torch.from_numpy(a) for a in found]

    return run, f"onnxruntime {onnxruntime.__version__}"
