"""Networks as files for other runtimes: ONNX and torch.export, each checked against the network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress._onnx import capture, runner_of, session_of, translate
from compress._parity import Twin, quiet, tensors_of
from compress.plan import PruningPlan
from compress.quantization_plan import QuantizationPlan, plan_of
from lrp._files import replacing
from lrp.errors import ExportError, InputError, MissingDependencyError

__all__ = ["FORMS", "export_onnx", "export_program"]

FORMS = ("fp32", "int8", "int4", "a8w8")
_TOLERANCE = 1e-4  # of an output's largest entry, in float32
_LARGEST_FILE = 2**31 - 1  # protobuf's limit
_OPSET = 21  # the first with 4-bit integers, and the one that onnxruntime fuses best


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    form: str = "fp32",
    calibration: Any = None,
    *,
    opset: int | None = None,
    check: bool = True,
    dynamic_batch: bool = True,
    force: bool = False,
) -> Path:
    """Write an ONNX file that computes, in onnxruntime, what the network does; returns its path.

    Parameters
    ----------
    model : nn.Module
        Left as it is; a copy in eval mode, on the CPU, in float32 is exported.
        The integer forms take the networks that :func:`compress.quantize`
        returns.
    path : path
        One file of up to 2 GB, whole or not there.
    example_inputs : Tensor or tuple
        What the model is called with. The first axis of the first tensor is the
        batch, and so is that of every other tensor of the same length.
    form : {"fp32", "int8", "int4", "a8w8"}
        ``"int8"``, ``"int4"``: quantized weights lie in the file as the whole
        numbers of the network's plan, unchanged, with a batch norm behind the
        layer folded into scales per channel; arithmetic is in float32. In
        ``"int4"``, tensors of up to 16 levels take 4 bits and the others 8.
        Smaller, **not faster**. ``"a8w8"``: activations are quantized to 8 bits,
        too, and layers compute with integers: the one form that is faster on a
        CPU. Tensors without a codebook stay float32; ``"a8w8"`` rounds those of
        layers to int8 per channel.
    calibration : iterable of batches or Tensor, optional
        For ``"a8w8"``: x or (x, y), or a tensor of rows; a few hundred rows.
        The ranges of activations are taken from every second row; the others
        are held out to compare on.
    opset : int, optional
        Version of the operators; the exporter's own choice if not given, 21 for
        the integer forms. ``"int4"`` needs 21 or more, ``"a8w8"`` 21.
    check : bool
        Compare the file with the network: on the example, on other batch sizes,
        and on noise with the mean and spread of the example; for ``"a8w8"`` on
        the rows held out.
    dynamic_batch : bool
        False: the file takes the batch size of the example only.
    force : bool
        Write an ``"a8w8"`` file that names other classes than the network on
        more than 5 % of the rows held out, that has no classes, or of which
        onnxruntime computes layers in float32.

    Returns
    -------
    Path
        Inputs are named after the parameters of ``forward`` ("input" where it
        has one), outputs "output" or "output_0", ... Quantized initializers have
        the names of the parameters. The file's metadata holds form, version,
        what the pruning plan did, the parity or agreement that was measured,
        and how to run the form.

    Raises
    ------
    UnverifiedError
        If the file computes something else, with the numbers. Nothing is
        written.
    ExportError
        If the model can't be captured or written, fixes the batch size, or is
        too large.
    InputError, OutputError
        For an unknown form, inputs the model does not run on, outputs that
        are no tensors, or a form that needs a quantized network or calibration
        data and has none.
    MismatchError
        If weights no longer lie on their codebooks.
    MissingDependencyError
        If onnx, onnxscript or onnxruntime is not installed.
    DataError
        If the file can't be written.

    Notes
    -----
    onnxruntime computes the weights of ``"int8"`` and ``"int4"`` files anew in
    every run, which is slow; with the session option
    ``session.disable_quant_qdq = 1`` it does so once, at load, and runs at the
    speed of float32. The same option takes from ``"a8w8"`` what makes it fast.

    ``"a8w8"`` is onnxruntime's static quantization (QDQ, unsigned activations,
    MinMax ranges) with integers, scales and biases of the network written over
    its own. Agreement is measured on the machine that exports: x86 CPUs without
    VNNI may saturate sums of two products of 8-bit weights, and run it slower.

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
    plan = _check_form(model, form, calibration, opset)
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
    with replacing(path) as temporary:
        if plan is None:
            proto = translate(network, opset)
            if check:
                temporary.write_bytes(proto.SerializeToString())
                parity = network.compare(*runner_of(session_of(temporary)), _TOLERANCE)
                about["parity"] = str(parity)
        else:
            from compress._integer_files import Request, integer_file

            inner = getattr(model, "_orig_mod", model)
            request = Request(form, opset, check, force, _TOLERANCE)
            proto, told = integer_file(network, plan, plan.indices(inner), calibration, request, temporary)
            about.update(told)
        if not check:
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
    with replacing(path) as temporary, quiet():
        program = capture(network)
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


# -- small things -----------------------------------------------------------
def _check_form(model: nn.Module, form: str, calibration: Any, opset: int | None) -> QuantizationPlan | None:
    """The plan that an integer form needs; None for fp32."""
    if form not in FORMS:
        raise InputError(
            "unknown form", expected=", ".join(map(repr, FORMS)), got=repr(form), fix="'int8' and 'int4' are smaller, "
            "'a8w8' is faster, too"
        )  # fmt: skip
    if form == "fp32":
        return None
    plan = plan_of(getattr(model, "_orig_mod", model))
    if plan is None or not plan.codebooks:
        raise InputError(
            f"form='{form}' needs a quantized network",
            expected="one that carries a quantization plan, as compress.quantize returns it",
            got="a network without one" if plan is None else "a plan that quantizes nothing",
            fix='quantize it first, for example compress.quantize(model, method="rtn_per_channel", bits=8).model',
        )
    if form == "a8w8" and calibration is None:
        raise InputError(
            "form='a8w8' needs calibration data",
            expected="a DataLoader, a list of batches x or (x, y), or a tensor of rows",
            got="None",
            fix="pass calibration=, a few hundred samples as the network will meet them",
        )
    if opset is not None and ((form == "int4" and opset < _OPSET) or (form == "a8w8" and opset != _OPSET)):
        raise InputError(
            f"form='{form}' can not be written in this opset",
            expected=f"opset {_OPSET}" + (" or more, which has 4-bit integers" if form == "int4" else ""),
            got=str(opset),
            fix="leave opset out",
        )
    return plan


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401  # whether they are there
        import onnxruntime  # noqa: F401  # as above
        import onnxscript  # noqa: F401  # as above
    except ImportError as error:
        raise MissingDependencyError(
            "the ONNX packages are not installed",
            expected="onnx, onnxscript and onnxruntime",
            got=str(error),
            fix="pip install 'neuralize[onnx]'",
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
