"""A network and its file, run side by side."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress.groups import as_inputs
from lrp.errors import ExportError, InputError, OutputError, UnverifiedError

__all__ = ["Parity", "Twin", "line", "quiet", "tensors_of"]

_BATCHES = (1, 3)
_NOISY = (
    "torch.onnx", "torch.export", "torch._export", "torch.fx", "torch._subclasses", "torch._guards", "onnxscript",
    "onnx_ir",
)  # fmt: skip

Runner = Callable[[tuple[Any, ...]], Sequence[Tensor]]


@dataclass(frozen=True)
class Parity:
    """How far a file is from its network.

    Attributes
    ----------
    error : float
        Largest difference of any output, as a share of that output's largest entry.
    inputs : int
        Batches that were compared.
    runtime : str
    """

    error: float
    inputs: int
    runtime: str

    def __str__(self) -> str:
        return f"{self.error:.2g} of the largest output, {self.inputs} batches, {self.runtime}"


@dataclass(frozen=True)
class Twin:
    """A copy on the CPU in eval mode, and batches of any size for it."""

    model: nn.Module
    inputs: tuple[Any, ...]
    batch: int
    dynamic: bool

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, dynamic: bool, dtype: torch.dtype | None) -> Twin:
        if isinstance(model, torch.jit.ScriptModule):
            raise ExportError(
                "a scripted module can not be exported",
                expected="an nn.Module whose forward is Python",
                got=type(model).__name__,
                fix="pass the module that was scripted",
            )
        model = getattr(model, "_orig_mod", model)
        twin = copy.deepcopy(model).to("cpu").eval()
        twin = twin if dtype is None else twin.to(dtype)

        def plain(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return t.detach().to("cpu", dtype if dtype is not None and t.is_floating_point() else None)

        inputs = pytree.tree_map(plain, as_inputs(example_inputs))
        batch = next((len(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), 0)
        if not batch:
            raise InputError(
                "example_inputs holds no samples",
                expected="a first tensor with a batch axis",
                got="an empty batch" if any(t.dim() for t in tensors_of(inputs)) else "a number",
                fix="pass for example torch.randn(1, 3, 224, 224)",
            )
        network = cls(twin, inputs, batch, dynamic)
        network.run("the example", inputs)
        return network

    def of_size(self, size: int) -> tuple[Any, ...]:
        """The example's samples in turn, as many as wanted."""
        at = torch.arange(size) % self.batch

        def take(t: Any) -> Any:
            return t[at] if self.is_batch(t) else t

        return self._map(take, self.inputs)

    def noise(self, size: int, seed: int) -> tuple[Any, ...]:
        """Noise with the mean and spread of the example; integers are drawn from it."""
        generator = torch.Generator().manual_seed(seed)

        def draw(t: Any) -> Any:
            if not isinstance(t, Tensor) or not t.numel():
                return t
            if not t.is_floating_point():
                return t.flatten()[torch.randint(t.numel(), t.shape, generator=generator)]
            spread, mean = torch.std_mean(t.double(), correction=0)
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            return (mean + (spread if spread > 0 else 1.0) * noise).to(t.dtype)

        return self._map(draw, self.of_size(size))

    def is_batch(self, t: Any) -> bool:
        """Whether the first axis of an input is that of the samples."""
        return isinstance(t, Tensor) and t.dim() > 0 and len(t) == self.batch

    @property
    def exported(self) -> int:
        """The batch size to export with, at least two: the exporter takes a batch of one for a constant."""
        return max(2, self.batch) if self.dynamic else self.batch

    def twin(self) -> tuple[Any, ...]:
        """An example of that size."""
        return self.of_size(self.exported)

    def shapes(self) -> Any:
        """Which axes are dynamic, as torch.export wants it."""
        if not self.dynamic:
            return None
        batch = torch.export.Dim("batch", min=1)
        dims = pytree.tree_map(lambda t: {0: batch} if self.is_batch(t) else None, self.inputs)
        kinds = [p.kind for p in inspect.signature(self.model.forward).parameters.values()]
        return (dims,) if kinds and kinds[0] is inspect.Parameter.VAR_POSITIONAL else dims

    def run(self, what: str, inputs: tuple[Any, ...]) -> list[Tensor]:
        """Outputs of the network itself.

        Raises
        ------
        InputError, OutputError
        """
        copies = self._map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
        try:
            with torch.no_grad():
                found = self.model(*copies)
        except Exception as error:
            raise InputError(
                f"{type(self.model).__name__} does not run on {what}",
                expected="example_inputs that the model accepts, as a tuple where it takes several",
                got=f"{type(error).__name__}: {line(error)}",
                fix="check shape and data type",
            ) from error
        outputs = tensors_of(found)
        if not outputs:
            raise OutputError(
                f"{type(self.model).__name__} returns no tensor",
                expected="a tensor, or a tuple or dict of tensors",
                got=type(found).__name__,
                fix="wrap it in a module whose forward returns tensors",
            )
        return outputs

    def compare(self, runner: Runner, runtime: str, tolerance: float) -> Parity:
        """The largest difference between a runtime and the network, over all kinds of inputs.

        Raises
        ------
        UnverifiedError
        """
        sizes = [b for b in _BATCHES if b != self.batch] if self.dynamic else [self.batch]
        trials = [("the example", self.inputs)]
        trials += [(f"a batch of {b}", self.of_size(b)) for b in sizes if self.dynamic]
        trials += [(f"noise, a batch of {b}", self.noise(b, seed)) for seed, b in enumerate(sizes)]
        worst = 0.0
        for what, inputs in trials:
            expected = self.run(what, inputs)
            try:
                found = runner(inputs)
            except Exception as error:
                raise UnverifiedError(
                    f"the exported file does not run on {what}",
                    expected=f"a file that {runtime} runs on every batch",
                    got=f"{type(error).__name__}: {line(error)}",
                    fix="pass dynamic_batch=False if the network is made for one batch size, or another opset",
                ) from error
            worst = max(worst, _difference(what, found, expected, tolerance, runtime))
        return Parity(worst, len(trials), runtime)

    @staticmethod
    def _map(function: Callable[[Any], Any], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        out: tuple[Any, ...] = pytree.tree_map(function, inputs)
        return out


def _difference(
    what: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, runtime: str
) -> float:
    """The largest difference, as a share of the largest entry; raises UnverifiedError if it is too large."""
    worst = 0.0
    if len(found) != len(expected):
        raise _differs(what, f"{len(expected)} outputs", str(len(found)), runtime)
    for k, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        name = f"output {k} " if len(expected) > 1 else ""
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            kinds = [f"{name}of shape {tuple(t.shape)}, {t.dtype}" for t in (ours, theirs)]
            raise _differs(what, kinds[0], kinds[1], runtime)
        if not ours.is_floating_point():
            if not torch.equal(theirs, ours):
                count = int((theirs != ours).sum())
                raise _differs(what, f"{name}equal", f"{count} of {ours.numel()} entries differ", runtime)
            continue
        finite = ours.isfinite()
        odd = torch.equal(theirs[~finite].nan_to_num(0.5), ours[~finite].nan_to_num(0.5))
        if not odd or not theirs[finite].isfinite().all():
            raise _differs(what, f"{name}NaN and infinite entries in the same places", "others", runtime)
        a, b = theirs[finite].double(), ours[finite].double()
        scale, error = float(b.abs().max()) if b.numel() else 0.0, float((a - b).abs().max()) if b.numel() else 0.0
        share = error / scale if scale else error
        if share > tolerance:
            got = f"{name}{error:.3g} apart, largest {scale:.3g}"
            raise _differs(what, f"equal to {tolerance:g} of the largest output", got, runtime)
        worst = max(worst, share)
    return worst


def _differs(what: str, expected: str, got: str, runtime: str) -> UnverifiedError:
    return UnverifiedError(
        f"the exported file computes something else than the network on {what} ({runtime})",
        expected=expected,
        got=got,
        fix="look for random numbers, branches on values and batch-dependent sizes in forward; "
        "dynamic_batch=False if it is made for one batch size; nothing was written",
    )


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


@contextmanager
def unheard() -> Iterator[None]:
    """Without the exporters' log of what they can not follow, which our errors say; TORCH_LOGS brings it back."""
    loggers = [logging.getLogger(name) for name in (() if "TORCH_LOGS" in os.environ else _NOISY)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings and messages about themselves."""
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # fused attention is no operation of ONNX
        with unheard(), warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
