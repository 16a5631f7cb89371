"""Meters: from a file or a network to milliseconds, measured."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lrp.errors import InputError, MissingDependencyError, NonFiniteError

__all__ = [
    "FOLDING",
    "Latency",
    "Meter",
    "feeds_of",
    "machine",
    "milliseconds",
    "onnxruntime_meter",
    "session_of",
    "torch_latency",
]

FOLDING = "session.disable_quant_qdq"  # of onnxruntime: compute dequantized weights once, at load
Paths = str | os.PathLike[str]


class Meter(Protocol):
    """Any callable from the path of an ONNX file to milliseconds.

    For a table of layers on disk it also needs an ``identity``, a string that
    changes with whatever changes its times: device, runtime, threads, batch.
    """

    def __call__(self, path: Path, /) -> float: ...


@dataclass(frozen=True)
class Latency:
    """Times of one network.

    Attributes
    ----------
    median, low, high : float
        Milliseconds of one batch: median and quartiles.
    runs : int
        How often the network was run.
    """

    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ms ({self.low:.3g} to {self.high:.3g}, {self.runs} runs)"


@dataclass(frozen=True)
class onnxruntime_meter:  # noqa: N801  # used like a function: plan_pruning(..., meter=onnxruntime_meter(threads=4))
    """Time of an ONNX file in onnxruntime on this machine's CPU.

    Parameters
    ----------
    threads : int
    repeats : int
        Samples of which the median is taken.
    warmup : int
        Runs before them.
    batch : int
        For files whose batch size is open.
    seed : int
        Of the inputs: normal numbers, zeros for integers.
    least_ms : float
        A sample lasts at least as long; short networks run several times.

    Raises
    ------
    InputError
    MissingDependencyError
        When called, if onnxruntime is not installed.

    Examples
    --------
    >>> import tempfile, torch
    >>> from compress.exporting import export_onnx
    >>> from compress.meters import onnxruntime_meter
    >>> meter = onnxruntime_meter(repeats=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = export_onnx(torch.nn.Linear(8, 4), f"{folder}/net.onnx", torch.randn(1, 8))
    ...     found = meter.measure(path)
    >>> 0 < found.low <= found.median <= found.high
    True
    """

    threads: int = 1
    repeats: int = 30
    warmup: int = 3
    batch: int = 1
    seed: int = 0
    least_ms: float = 1.0

    def __post_init__(self) -> None:
        for name in ("threads", "repeats", "batch"):
            _positive(name, getattr(self, name))

    @property
    def name(self) -> str:
        """For reports: runtime, version, device, threads, batch."""
        return f"onnxruntime {_runtime().__version__}, CPU, {_threads(self.threads)}, batch {self.batch}"

    @property
    def identity(self) -> str:
        """The name with the machine; equal where times are comparable."""
        return f"{self.name}, {machine()}"

    def __call__(self, path: Paths) -> float:
        """Median in milliseconds."""
        return self.measure(path).median

    def measure(self, path: Paths) -> Latency:
        """Median, quartiles and number of runs.

        Raises
        ------
        InputError
            If the file takes another batch size, or has other open axes.
        FileNotFoundError
        """
        session = session_of(path, self.threads)
        feeds = feeds_of(session, self.batch, self.seed, path)
        return _timed(lambda: session.run(None, feeds), self.repeats, self.warmup, self.least_ms)


def torch_latency(
    model: Any,
    example_inputs: Any,
    *,
    threads: int = 1,
    device: Any = None,
    repeats: int = 30,
    warmup: int = 3,
    least_ms: float = 1.0,
) -> Latency:
    """Time of a network in eager torch, in eval mode, without gradients.

    Parameters
    ----------
    model : nn.Module
        Left as it is; a copy is timed.
    example_inputs : Tensor or tuple
        The batch to time.
    threads : int
        On a CPU.
    device : torch.device or str, optional
        The model's own if not given.
    repeats, warmup, least_ms
        As in :class:`onnxruntime_meter`. Every sample ends with a
        synchronisation of the device.

    Returns
    -------
    Latency

    Examples
    --------
    >>> import torch
    >>> from compress.meters import torch_latency
    >>> torch_latency(torch.nn.Linear(8, 4), torch.randn(1, 8), repeats=5).median > 0
    True
    """
    import copy

    import torch
    from torch.utils import _pytree as pytree

    from compress._data import device_of
    from compress.groups import as_inputs

    _positive("threads", threads)
    _positive("repeats", repeats)
    place = device_of(model, device)
    twin = copy.deepcopy(model).to(place).eval()
    inputs = pytree.tree_map(lambda t: t.to(place) if isinstance(t, torch.Tensor) else t, as_inputs(example_inputs))

    def run() -> None:
        twin(*inputs)

    def wait() -> None:
        if place.type != "cpu":
            torch.accelerator.synchronize(place)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return _timed(run, repeats, warmup, least_ms, wait)
    finally:
        torch.set_num_threads(before)


def milliseconds(meter: Callable[[Path], Any], path: Paths) -> float:
    """What a meter says of a file, checked.

    Raises
    ------
    NonFiniteError, InputError
        If it is no finite number above 0.

    Examples
    --------
    >>> from compress.meters import milliseconds
    >>> milliseconds(lambda path: 1.5, "net.onnx")
    1.5
    """
    found = meter(Path(path))
    try:
        value = None if found is None or isinstance(found, (bool, str, bytes)) else float(found)
    except (TypeError, ValueError, OverflowError):
        value = None
    if value is not None and value > 0 and math.isfinite(value):
        return value
    finite = value is None or math.isfinite(value)
    raise (InputError if finite else NonFiniteError)(
        f"the meter '{name_of(meter)}' gave no time",
        expected="milliseconds, a finite number above 0",
        got=f"{found!r} for {Path(path).name}",
        fix="let it return the median of several runs, and raise an error if the board does not answer",
    )


def name_of(meter: Any) -> str:
    """For messages and reports."""
    return str(getattr(meter, "name", None) or getattr(meter, "__name__", type(meter).__name__))


def machine() -> str:
    """Processor and number of cores of this machine.

    Examples
    --------
    >>> from compress.meters import machine
    >>> machine().endswith(("core", "cores"))
    True
    """
    processor = platform.processor()
    place = Path("/proc/cpuinfo")
    if place.exists():
        lines = place.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((row.partition(":")[2].strip() for row in lines if row.startswith("model name")), processor)
    cores = os.cpu_count() or 1
    return f"{platform.machine()}, {processor or 'unknown processor'}, {cores} core{'s' if cores > 1 else ''}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is wrong", expected="an int of at least 1", got=repr(value), fix="leave it out")


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "onnxruntime is not installed",
            expected="onnxruntime, to measure latency on this machine",
            got=str(error),
            fix="pip install 'neuralize[onnx]', or pass a meter of your own",
        ) from error
    return onnxruntime


def session_of(path: Paths, threads: int, options: Mapping[str, str] | None = None) -> Any:
    """An onnxruntime session on the CPU, with further session options by their keys.

    Raises
    ------
    InputError
        If onnxruntime can't open the file.
    FileNotFoundError
    MissingDependencyError
    """
    onnxruntime = _runtime()
    Path(path).stat()  # a missing file is told from a broken one
    wanted = onnxruntime.SessionOptions()
    wanted.log_severity_level = 4
    wanted.intra_op_num_threads = threads
    wanted.inter_op_num_threads = 1
    for key, value in (options or {}).items():
        wanted.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(str(path), wanted, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no public base
        raise InputError(
            f"onnxruntime can not open {path}",
            expected="an ONNX file with operators it knows",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="write it with compress.export_onnx",
        ) from error


_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def feeds_of(session: Any, batch: int, seed: int, path: Paths) -> dict[str, Any]:
    """Inputs of a file, by the shapes it states."""
    import numpy as np

    generator = np.random.default_rng(seed)
    feeds = {}
    for given in session.get_inputs():
        shape = list(given.shape)
        if shape and not isinstance(shape[0], int):
            shape[0] = batch
        elif shape and shape[0] != batch and given is session.get_inputs()[0]:
            raise InputError(
                f"{Path(path).name} is made for another batch size than the meter's",
                expected=f"an open batch size, or {batch}",
                got=str(shape[0]),
                fix=f"export it with dynamic_batch=True, or measure with batch={shape[0]}",
            )
        if not all(isinstance(n, int) for n in shape) or given.type not in _TYPES:
            raise InputError(
                f"the meter can not make an input '{given.name}' for {Path(path).name}",
                expected="a tensor of numbers, of fixed size but for the batch",
                got=f"{given.type} of shape {given.shape}",
                fix="pass a meter of your own",
            )
        kind = np.dtype(_TYPES[given.type])
        feeds[given.name] = (
            generator.standard_normal(shape).astype(kind) if kind.kind == "f" else np.zeros(shape, dtype=kind)
        )
    return feeds


def _timed(
    run: Callable[[], Any], repeats: int, warmup: int, least_ms: float, wait: Callable[[], None] = lambda: None
) -> Latency:
    """Quartiles of samples that each last ``least_ms`` at least."""

    def sample(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        return (time.perf_counter() - start) * 1e3 / count

    for _ in range(max(1, warmup)):
        once = sample(1)
    count = max(1, math.ceil(least_ms / max(once, 1e-4)))
    times = [sample(count) for _ in range(repeats)]
    if repeats == 1:
        return Latency(times[0], times[0], times[0], count)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(median, low, high, repeats * count)
