"""Networks as files for other runtimes: ONNX and torch.export, each checked against the network."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress._parity import Runner, Twin, line, quiet, tensors_of
from compress.plan import PruningPlan
from lrp._files import replacing
from lrp.errors import DataError, ExportError, InputError, MissingDependencyError, UnverifiedError

__all__ = ["FORMS", "export_onnx", "export_program"]

FORMS = ("fp32",)
_TOLERANCE = 1e-4  # of an output's largest entry, in float32
_LARGEST_FILE = 2**31 - 1  # protobuf's limit


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    form: str = "fp32",
    *,
    opset: int | None = None,
    check: bool = True,
    dynamic_batch: bool = True,
) -> Path:
    """Write an ONNX file that computes, in onnxruntime, what the network does; returns its path.

    Parameters
    ----------
    model : nn.Module
        Left as it is; a copy in eval mode, on the CPU, in float32 is exported.
    path : path
        One file of up to 2 GB, whole or not there.
    example_inputs : Tensor or tuple
        What the model is called with. The first axis of the first tensor is the
        batch, and so is that of every other tensor of the same length.
    form : {"fp32"}
        Number format of the weights and of the arithmetic.
    opset : int, optional
        Version of the operators; the exporter's own choice if not given.
    check : bool
        Compare the file with the network: on the example, on other batch sizes,
        and on noise with the mean and spread of the example.
    dynamic_batch : bool
        False: the file takes the batch size of the example only.

    Returns
    -------
    Path
        Inputs are named after the parameters of ``forward`` ("input" where it
        has one), outputs "output" or "output_0", ... The file's metadata holds
        form, version, what the pruning plan did, and the parity that was
        measured.

    Raises
    ------
    UnverifiedError
        If the file computes something else, with the numbers. Nothing is
        written.
    ExportError
        If the model can't be captured or written, fixes the batch size, or is
        too large.
    InputError, OutputError
        For an unknown form, inputs the model does not run on, or outputs that
        are no tensors.
    MissingDependencyError
        If onnx, onnxscript or onnxruntime is not installed.
    DataError
        If the file can't be written.

    Examples
    --------
    >>> import tempfile, torch, onnxruntime
    >>> from compress.exporting import export_onnx
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = export_onnx(net, f"{folder}/net.onnx", torch.randn(1, 3, 4, 4))
    ...     session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    >>> session.run(["output"], {"input": torch.randn(5, 3, 4, 4).numpy()})[0].shape
    (5, 2)
    """
    _check_form(form)
    _check_packages()
    network = Twin.of(model, example_inputs, dynamic_batch, torch.float32)
    size = sum(t.nbytes for t in (*network.model.parameters(), *network.model.buffers()))
    if size > _LARGEST_FILE:
        raise ExportError(
            "the network is too large for one ONNX file",
            expected=f"up to {_LARGEST_FILE:,} bytes",
            got=f"{size:,} bytes of weights",
            fix="prune it further, or use export_program",
        )
    about = {"form": form, "version": _version(), **_told(_plan_of(model))}
    with _writing(path) as temporary:
        proto = _translate(network, opset)
        if check:
            temporary.write_bytes(proto.SerializeToString())
            parity = network.compare(*_session(temporary), _TOLERANCE)
            about["parity"] = str(parity)
        else:
            about["parity"] = "not checked"
        for key, value in about.items():
            proto.metadata_props.add(key=f"compress.{key}", value=value)
        temporary.write_bytes(proto.SerializeToString())
    return Path(path)


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    check: bool = True,
    dynamic_batch: bool = True,
) -> Path:
    """Write a ``.pt2`` file of :func:`torch.export.save`, loaded back and compared; returns its path.

    Parameters
    ----------
    model, path, example_inputs, check, dynamic_batch
        As in :func:`export_onnx`, but data types stay.

    Raises
    ------
    UnverifiedError, ExportError, InputError, OutputError, DataError
        As :func:`export_onnx`.

    Notes
    -----
    Weights are raw bytes; the example itself is left out of the file.

    Examples
    --------
    >>> import tempfile, torch
    >>> from compress.exporting import export_program
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = export_program(torch.nn.Linear(4, 2), f"{folder}/net.pt2", torch.randn(1, 4))
    ...     program = torch.export.load(path)
    >>> program.module()(torch.randn(7, 4)).shape
    torch.Size([7, 2])
    """
    network = Twin.of(model, example_inputs, dynamic_batch, None)
    about = {"compress.version": _version(), **{f"compress.{k}": v for k, v in _told(_plan_of(model)).items()}}
    with _writing(path) as temporary, quiet():
        program = _capture(network)
        program._example_inputs = None  # would be pickled into the file, and may be someone's data
        archive = temporary.with_name(f"{temporary.name}.pt2")  # torch wants the suffix
        try:
            torch.export.save(program, archive, extra_files=about)
            if check:
                module = torch.export.load(archive).module()
                network.compare(lambda inputs: tensors_of(module(*inputs)), f"torch {torch.__version__}", 1e-5)
            os.replace(archive, temporary)
        finally:
            archive.unlink(missing_ok=True)
    return Path(path)


# -- the two exporters ------------------------------------------------------
def _capture(network: Twin) -> torch.export.ExportedProgram:
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


def _translate(network: Twin, opset: int | None) -> Any:
    """The ONNX model, without the exporter's notes on the source code."""
    program = _capture(network)
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
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(
            f"{type(network.model).__name__} can not be written as ONNX",
            expected="operations that ONNX has",
            got=f"{type(error).__name__}: {line(error)}",
            fix="replace the operation, or use export_program",
        ) from error
    assert translated is not None
    proto = translated.model_proto
    written = next(o.version for o in proto.opset_import if not o.domain)
    if opset is not None and written != opset:
        raise ExportError(
            f"the exporter can not write opset {opset}",
            expected=f"opset {opset}",
            got=f"opset {written}",
            fix=f"leave opset out, or ask for {written} or more",
        )
    _strip(proto)
    return proto


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


def _strip(proto: Any) -> None:
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


def _session(path: Path) -> tuple[Runner, str]:
    """A function that runs the file, and the runtime's name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.intra_op_num_threads = max(1, torch.get_num_threads())
    runtime = f"onnxruntime {onnxruntime.__version__}"
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnverifiedError(
            f"{runtime} can not open the exported file",
            expected="operators of a version it knows",
            got=f"{type(error).__name__}: {line(error)}",
            fix="pass a lower opset, update onnxruntime, or check=False if it is for another runtime",
        ) from error
    names = [i.name for i in session.get_inputs()]

    def run(inputs: tuple[Any, ...]) -> list[Tensor]:
        given = tensors_of(inputs)
        if len(given) != len(names):
            raise ValueError(f"the file takes {len(names)} of {len(given)} inputs")
        found = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
        return [torch.from_numpy(a) for a in found]

    return run, runtime


# -- small things -----------------------------------------------------------
def _check_form(form: str) -> None:
    if form not in FORMS:
        later = form in ("int8", "int4", "a8w8")
        raise InputError(
            f"form='{form}' needs a quantized network, which this version does not make" if later else "unknown form",
            expected=" or ".join(map(repr, FORMS)),
            got=repr(form),
            fix="export 'fp32'",
        )


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "the ONNX packages are not installed",
            expected="onnx, onnxscript and onnxruntime",
            got=str(error),
            fix="pip install 'neuralize[onnx]'",
        ) from error


@contextlib.contextmanager
def _writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As ``replacing``; a disk's errors become ours, and a wrong place is known before the work."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(str(path))
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise DataError(
            f"{path} can not be written",
            expected="a file name in a folder that may be written to, on a disk with space",
            got=f"{type(error).__name__}: {error}",
            fix="make space or name another place",
        ) from error


def _plan_of(model: nn.Module) -> PruningPlan | None:
    plan: PruningPlan | None = getattr(model, "_pruning_plan", None)
    return plan


def _told(plan: PruningPlan | None) -> dict[str, str]:
    """What a plan did, in a few numbers."""
    if plan is None:
        return {}
    before, after = plan.before, plan.after
    numbers = {k: [getattr(before, k), getattr(after, k)] for k in ("channels", "filters", "macs", "params")}
    settings = {k: plan.settings[k] for k in ("criterion", "target") if k in plan.settings}
    return {"plan": json.dumps({**numbers, **settings}, default=str)}


def _version() -> str:
    from compress import __version__

    return __version__
