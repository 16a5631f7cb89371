"""Networks as ONNX files, for any runtime; the only module that knows onnx."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrp.errors import ExportError, InputError, MissingDependencyError, RuleError
from neuralize._files import replacing
from neuralize.centroids import CentroidHead
from neuralize.network import NeuralizedModel

__all__ = ["Explainer", "export_onnx"]

FORMS = ("logits", "explanation")


class Explainer(nn.Module):
    """A k-means network with its explanation: from encoded rows to logits, values and output.

    Every row's own cluster against all others, by the divided rule, so there
    is no residual.

    Parameters
    ----------
    net : NeuralizedModel
        With a centroid head, behind steps that keep columns apart or project.

    Raises
    ------
    RuleError
        Another head: its explanation is no fixed graph of a few operations.

    Examples
    --------
    >>> from neuralize import CentroidHead
    >>> explainer = Explainer(NeuralizedModel(CentroidHead([[0.0], [2.0]])))
    >>> logits, values, output = explainer(torch.tensor([[0.5]], dtype=torch.float64))
    >>> logits.tolist(), values.tolist(), output.tolist()
    ([[2.0, -2.0]], [[2.0]], [2.0])
    """

    beta: Tensor

    def __init__(self, net: NeuralizedModel) -> None:
        super().__init__()
        if not isinstance(net.head, CentroidHead):
            raise RuleError(
                "only explanations of centroid models can be exported",
                expected="k-means and its relatives",
                got=type(net.head).__name__,
                fix="export form='logits', and explain in Python",
            )
        self.net = net
        self.register_buffer("beta", torch.tensor(net.head.default_beta("divided", False), dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), values (N, D) and explained output (N,)."""
        head = self.net.head
        assert isinstance(head, CentroidHead)
        z = self.net.front(x.to(self.net.dtype))
        return head.own_explanation(z, self.beta.to(z.dtype), self.net.front.frame)


def export_onnx(net: NeuralizedModel, path: str | os.PathLike[str], X: Any, form: str = "logits") -> Path:
    """Write an ONNX file with a dynamic batch, checked against torch in onnxruntime; returns its path.

    Parameters
    ----------
    net : NeuralizedModel
        In the precision the file shall have.
    path : path
    X : array-like or DataFrame (N, D)
        Raw rows, at least two; the file is checked on them.
    form : {"logits", "explanation"}
        "logits": output ``logits`` (N, K). "explanation": of centroid models,
        also ``values`` (N, D) and ``output`` (N,), see :class:`Explainer`.

    Returns
    -------
    Path
        The file's input ``x`` (N, D) is what ``net.encode(X)`` returns, in the
        network's precision.

    Raises
    ------
    MissingDependencyError
        onnx, onnxscript or onnxruntime is not installed.
    ExportError
        The file does not compute what the network does; nothing is written.
    """
    if form not in FORMS:
        raise RuleError("unknown form", expected=" or ".join(map(repr, FORMS)), got=repr(form), fix="choose one")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise MissingDependencyError(
            "the ONNX packages are not installed",
            expected="onnx, onnxscript and onnxruntime",
            got=str(error),
            fix="pip install 'neuralize[onnx]'",
        ) from error
    module: nn.Module = net if form == "logits" else Explainer(net)
    names = ["logits"] if form == "logits" else ["logits", "values", "output"]
    rows = torch.from_numpy(net.encode(X)).to(net.device, net.dtype)
    if len(rows) < 2:
        raise InputError("too few rows to check the file", expected="at least two", got=str(len(rows)), fix="pass more")
    with replacing(path) as temporary:
        _write(module, rows[:3], names, temporary)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            expected = module(rows)
        found = session.run(names, {"x": rows.numpy()})
        _compare(names, found, [expected] if isinstance(expected, Tensor) else list(expected), net.dtype)
    return Path(path)


def _write(module: nn.Module, rows: Tensor, names: list[str], path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's exporter, about itself
            program = torch.onnx.export(
                module.eval(),
                (rows,),
                dynamo=True,
                input_names=["x"],
                output_names=names,
                dynamic_shapes=({0: batch},),
                verbose=False,
            )
            assert program is not None
            program.save(str(path))
    except OSError:  # a full disk is no fault of the network
        raise
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(
            "the network can't be written as ONNX",
            expected="operations that ONNX has",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="use torch.export on it instead",
        ) from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _compare(names: list[str], found: Any, expected: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for name, theirs, ours in zip(names, found, expected, strict=True):
        mine = ours.numpy()
        finite = np.isfinite(mine)
        scale = float(np.abs(mine[finite]).max(initial=0.0))
        worst = float(np.abs(theirs[finite] - mine[finite]).max(initial=0.0))
        if theirs.shape != mine.shape or not np.array_equal(np.isfinite(theirs), finite) or worst > tolerance * scale:
            raise ExportError(
                f"the exported file computes other {name} than the network",
                expected=f"equal to {tolerance:g} of the largest",
                got=f"{worst:.3g} apart, largest {scale:.3g}",
                fix="export in float64 (net.double()), or report this",
            )
