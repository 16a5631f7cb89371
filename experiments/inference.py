"""Fast test passes: a CIFAR ResNet of any widths in onnxruntime, without a new export for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lrp.errors import MissingDependencyError

__all__ = ["Template"]


class Template:
    """The graph of one network, filled with the weights of its pruned forms.

    The graph is exported once; batch norms are folded into the convolutions
    before them by the exporter, and here for every new model. Pruned forms have
    the same nodes and other widths.

    Parameters
    ----------
    model : nn.Module
        A :class:`experiments.models.CifarResNet`.
    threads : int
    """

    def __init__(self, model: nn.Module, threads: int = 1) -> None:
        try:
            import onnx
        except ImportError as error:
            raise MissingDependencyError(
                "onnx is not installed",
                expected="onnx and onnxruntime",
                got="none",
                fix="pip install 'neuralize[onnx]'",
            ) from error
        import compress

        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            compress.export_onnx(model, path, torch.randn(2, 3, 32, 32))
            self._proto = onnx.load(str(path))
        del self._proto.graph.value_info[:]  # widths of the unpruned network
        self._threads = threads
        self._folded: dict[str, str] = {}  # name of a bias to the convolution it belongs to
        for node in self._proto.graph.node:
            if node.op_type == "Conv" and len(node.input) > 2:
                self._folded[node.input[2]] = node.input[1].removesuffix(".weight")

    def session(self, model: nn.Module) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """Logits of a model, as a function of a batch (N, 3, 32, 32)."""
        import onnx
        import onnxruntime as ort

        tensors = {name: t.detach().float() for name, t in model.state_dict().items()}
        values: dict[str, Tensor] = {}
        for bias, conv in self._folded.items():
            bn = conv.replace("conv", "bn")
            scale = tensors[f"{bn}.weight"] / (tensors[f"{bn}.running_var"] + model.get_submodule(bn).eps).sqrt()
            values[f"{conv}.weight"] = tensors[f"{conv}.weight"] * scale.reshape(-1, 1, 1, 1)
            values[bias] = tensors[f"{bn}.bias"] - tensors[f"{bn}.running_mean"] * scale
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        for tensor in proto.graph.initializer:
            new = values.get(tensor.name, tensors.get(tensor.name))
            if new is not None:
                tensor.CopyFrom(onnx.numpy_helper.from_array(new.numpy(), tensor.name))
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        run = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        name = run.get_inputs()[0].name

        def logits(x: NDArray[np.float32]) -> NDArray[np.float32]:
            out: Any = run.run(None, {name: x})[0]
            return np.asarray(out)

        return logits

    def correct(self, model: nn.Module, x: NDArray[np.float32], y: NDArray[np.int64], batch: int = 100) -> int:
        """How many of the pictures the model classifies as labelled."""
        logits = self.session(model)
        parts = range(0, len(y), batch)
        return int(sum((logits(x[k : k + batch]).argmax(1) == y[k : k + batch]).sum() for k in parts))
