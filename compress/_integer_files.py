"""ONNX files with integers: made, checked, and described in their metadata."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from compress._onnx import runner_of, session_of, translate
from compress._parity import Twin
from compress._quantized_onnx import Grid, check_fits, detach, grids_of, uses_of, verify, write_integers
from compress._static_int8 import Rows, agreement, check_fused, quantize_statically
from compress.meters import FOLDING
from compress.quantization_plan import QuantizationPlan

__all__ = ["Request", "integer_file"]

_OPSET = 21
_WEIGHTS_ONLY = (
    "smaller, not faster: onnxruntime computes the float32 weights anew in every run; with the session option "
    f"{FOLDING}=1 it does so once, at load, and runs at the speed of fp32"
)
_STATIC = f"run with default session options: {FOLDING}=1 would take from this form what makes it fast"


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes
    ----------
    form : "int8", "int4" or "a8w8"
    opset : int or None
    check, force : bool
    tolerance : float
        Of the parity of weight-only files.
    """

    form: str
    opset: int | None
    check: bool
    force: bool
    tolerance: float


def integer_file(
    network: Twin,
    plan: QuantizationPlan,
    indices: dict[str, Tensor],
    calibration: Any,
    request: Request,
    temporary: Path,
) -> tuple[Any, dict[str, str]]:
    """The ONNX model, and what its metadata say; ``temporary`` is written to for the checks.

    Raises
    ------
    UnverifiedError, ExportError, InputError
    """
    grids = grids_of(network, plan, indices)
    if request.form == "int4":
        check_fits(grids)
    rows = Rows.of(network, calibration) if request.form == "a8w8" else None
    proto = translate(network, request.opset or _OPSET, partial(detach, grids=grids))
    uses = uses_of(proto, grids)
    present = {use.grid.name: use.grid for use in uses}
    folded = sum(bool(use.folded) for use in uses)
    about = {"batch_norms_folded": str(folded)}
    if rows is not None:
        made = quantize_statically(proto, uses, rows)
        proto = made.proto
        about["calibration"] = (
            f"{Rows.count(rows.calibrating)} rows, {Rows.count(rows.held_out)} more held out; onnxruntime "
            "quantize_static, QDQ, QUInt8 activations, QInt8 weights per channel, MinMax"
        )
        if made.rounded:
            about["rounded"] = json.dumps(made.rounded)  # to int8 here, for they had no codebook
        if any(made.moved.values()):
            about["moved"] = json.dumps({name: n for name, n in made.moved.items() if n})
        verify(proto.SerializeToString(), present.values(), made.moved)
    else:
        write_integers(proto, uses, request.form)
        verify(proto.SerializeToString(), present.values())
    about["weights"] = _stored(proto, present)
    about["session_option"] = f"{FOLDING}={0 if rows is not None else 1}"
    about["advice"] = _STATIC if rows is not None else _WEIGHTS_ONLY
    if not request.check:
        return proto, about
    temporary.write_bytes(proto.SerializeToString())
    if rows is None:
        parity = network.compare(*runner_of(session_of(temporary)), request.tolerance)
        network.compare(*runner_of(session_of(temporary, {FOLDING: "1"})), request.tolerance)
        about["parity"] = str(parity)
        return proto, about
    about["fused"] = check_fused(temporary, made, request.force)
    found = agreement(network, temporary, rows.held_out, request.force)
    about["agreement"] = "not measured: no classes" if found is None else str(found)
    if found is not None:
        about["parity"] = f"{found.error:.2g} of the largest output, {found.rows} held-out rows"
    return proto, about


def _stored(proto: Any, present: dict[str, Grid]) -> str:
    """How many quantized tensors have which type."""
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer}
    counts = Counter(kinds[name] for name in present)
    return ", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items()))
