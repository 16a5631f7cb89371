"""The forms of a network side by side, measured: size, load, latency, memory, accuracy."""

from __future__ import annotations

import functools
import importlib
import json
import lzma
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.meters import FOLDING, Latency, _runtime, feeds_of, machine, session_of
from lrp.errors import DataError, InputError, LRPError, UnverifiedError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Measurement", "Row", "measure"]

Paths = str | os.PathLike[str]
_WEIGHTS_ONLY = ("int8", "int4")
_NOTICED = 1.05  # a ratio below it, nobody would notice


@dataclass(frozen=True)
class Row:
    """One form of the network.

    Attributes
    ----------
    name : str
        The form, with ", folded" where onnxruntime computes its weights once,
        at load (``session.disable_quant_qdq=1``).
    form : str
        "fp32", "int8", "int4", "a8w8", or "" for files of other origin.
    bytes, compressed : int
        Of the file, and after a general compressor.
    load_ms : float or None
        Median of five loads in a fresh process.
    latency : Latency or None
    speed : float or None
        Time of fp32 over this one's: median of the ratios within a round.
    resident, peak : int or None
        Bytes of memory that a fresh process needs for it, after some runs and
        at the most.
    accuracy : float or None
    """

    name: str
    form: str
    bytes: int
    compressed: int
    load_ms: float | None = None
    latency: Latency | None = None
    speed: float | None = None
    resident: int | None = None
    peak: int | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Measurement:
    """What :func:`measure` found; prints as a table.

    Attributes
    ----------
    rows : tuple of Row
    settings : dict
        Runtime, machine, threads, batch, rounds, compressor, samples.
    notes : tuple of str
        Forms that were left out, and why.
    """

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def sentence(self) -> str:
        """What got smaller, and what did not get faster.

        A form of weights alone is never called faster, whatever noise says: its
        arithmetic is that of fp32.
        """
        base = next((row for row in self.rows if row.form == "fp32"), None)
        others = [row for row in self.rows if row.form not in ("fp32", "") and row.name == row.form]
        if base is None or not others:
            return "There is nothing beside fp32 to compare." if base else "There is no fp32 file to compare with."
        parts = [_told(row, base) for row in others]
        return f"Against fp32, {'; '.join(parts)}."

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        rows = [{k: v for k, v in asdict(row).items() if v is not None} for row in self.rows]
        return {"rows": rows, "settings": dict(self.settings), "notes": list(self.notes), "sentence": self.sentence}

    def __str__(self) -> str:
        s = self.settings
        head = ["form", "bytes", f"{s['compressor']}", "load ms", "latency ms", "speed", "memory MiB", "accuracy"]
        table = [head, *([_cell(v) for v in _cells(row)] for row in self.rows)]
        widths = [max(len(line[k]) for line in table) for k in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in table
        ]
        threads = f"{s['threads']} thread{'s' if s['threads'] > 1 else ''}"
        about = (
            f"{s['runtime']} on the CPU, {threads}, batch {s['batch']}, {s['machine']}. Latency: median (quartiles) of "
            f"{s['rounds']} rounds in which all forms take turns; speed: times fp32, within a round. Load, memory "
            "(resident after runs, peak): a fresh process per file."
        )
        samples = [f"Accuracy: of {s['samples']:,} samples."] if s.get("samples") else []
        return "\n".join([*lines, "", self.sentence, " ".join([about, *samples]), *self.notes])


def _cells(row: Row) -> list[Any]:
    memory = None if row.resident is None else f"{row.resident / 2**20:.0f}"
    if memory is not None and row.peak is not None:
        memory += f", {row.peak / 2**20:.0f}"
    t = row.latency
    return [
        row.name,
        f"{row.bytes:,}",
        f"{row.compressed:,}",
        None if row.load_ms is None else f"{row.load_ms:.1f}",
        None if t is None else f"{t.median:.3g} ({t.low:.3g} to {t.high:.3g})",
        None if row.speed is None else f"{row.speed:.2f}x",
        memory,
        None if row.accuracy is None else f"{row.accuracy:.4f}",
    ]


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def _told(row: Row, base: Row) -> str:
    ratio = base.bytes / row.bytes
    smaller = ratio >= _NOTICED
    size = f"{row.form} is {f'{ratio:.1f} times' if smaller else 'not'} smaller"
    if row.speed is None:
        return size
    if row.form in _WEIGHTS_ONLY:
        pace = f"({min(row.speed, 1.0):.2f}x by default, at best 1x with {FOLDING}=1)"
    elif row.speed >= _NOTICED:
        return f"{size} {'and' if smaller else 'but'} {row.speed:.2f} times faster"
    else:
        pace = f"({row.speed:.2f}x)"
    return f"{size} {'but' if smaller else 'and'} not faster {pace}"


def measure(
    what: nn.Module | Paths | Mapping[str, Paths],
    *,
    example_inputs: Any = None,
    build: Any = None,
    original: nn.Module | None = None,
    container: Paths | None = None,
    data: Any = None,
    calibration: Any = None,
    threads: int = 2,
    batch: int = 1,
    rounds: int = 30,
    least_ms: float = 5.0,
    force: bool = False,
    memory: bool = True,
) -> Measurement:
    """Measure the forms of a network beside fp32, in onnxruntime on this machine's CPU.

    Parameters
    ----------
    what : nn.Module, path, or dict of name to path
        A network, quantized or not: every form it can have is exported into a
        temporary folder. A file of :func:`compress.save`, with ``build``: the
        same, and the file itself. An ``.onnx`` file: as it is, beside its fp32
        form, which a file of integer weights gives. Several ``.onnx`` files.
    example_inputs : Tensor or tuple
        For networks: what the model is called with.
    build : callable or "MODULE:CALLABLE"
        As for :func:`compress.load`.
    original : nn.Module, optional
        The network before quantization: fp32 is measured on it.
    container : path, optional
        A file that holds the network, whose size is stated, too.
    data : iterable of batches (x, y), optional
        For accuracy: top-1 of the first output.
    calibration : iterable of batches or Tensor, optional
        As for :func:`compress.export_onnx`; without it there is no "a8w8".
    threads, batch : int
        Of onnxruntime; of the inputs that are timed.
    rounds : int
        In each, all forms take turns.
    least_ms : float
        A sample lasts at least as long; short networks run several times.
    force : bool
        As for :func:`compress.export_onnx`.
    memory : bool
        Start a process per form for memory and load time: about a second each.

    Returns
    -------
    Measurement

    Raises
    ------
    InputError, DataError, MissingDependencyError
    ExportError, UnverifiedError
        If fp32 can't be exported; other forms that can't are left out with a
        note.

    Examples
    --------
    >>> import torch
    >>> from compress.measurement import measure
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> found = measure(net, example_inputs=torch.randn(1, 1, 8, 8), rounds=3, memory=False)
    >>> [row.name for row in found.rows]
    ['fp32']
    """
    for name, value in {"threads": threads, "batch": batch, "rounds": rounds}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is wrong", expected="an int of at least 1", got=repr(value), fix="leave it out")
    onnxruntime = _runtime()
    with tempfile.TemporaryDirectory() as folder:
        files, sizes, notes = _files(what, Path(folder), example_inputs, build, original, calibration, force)
        named, compressor = _compressor()
        if container is not None:
            sizes[_there(container).name] = Path(container).read_bytes()
        own = [Row(name, "", len(raw), len(compressor(raw))) for name, raw in sizes.items()]
        trials = _trials(files)
        times = _interleaved(trials, threads, batch, rounds, least_ms)
        base = next((name for name, (_, form, _) in trials.items() if form == "fp32"), None)
        rows, accuracies, lengths = [], dict[Path, float](), dict[Path, tuple[int, int]]()
        count = 0
        for name, (path, form, options) in trials.items():
            if path not in lengths:
                raw = path.read_bytes()
                lengths[path] = len(raw), len(compressor(raw))
                if data is not None:
                    accuracies[path], count = _accuracy(path, data, threads)
            probed = _probed(path, threads, batch, options) if memory else {}
            speed = None if base is None else _ratio(times[base], times[name])
            rows.append(
                Row(name, form, *lengths[path], latency=_latency(times[name]), speed=speed,
                    accuracy=accuracies.get(path), **probed)
            )  # fmt: skip
    settings = {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "machine": machine(),
        "threads": threads,
        "batch": batch,
        "rounds": rounds,
        "compressor": named,
        "samples": count or None,
    }
    return Measurement((*own, *rows), settings, tuple(notes))


# -- which files --------------------------------------------------------------
def _files(
    what: Any, folder: Path, example: Any, build: Any, original: Any, calibration: Any, force: bool
) -> tuple[dict[str, Path], dict[str, bytes], list[str]]:
    """ONNX files by name, other files' bytes, and notes."""
    if isinstance(what, Mapping):
        return {str(name): _there(path) for name, path in what.items()}, {}, []
    if isinstance(what, (str, os.PathLike)):
        path = _there(what)
        if path.suffix.lower() == ".onnx":
            return *_of_onnx(path, folder), []
        from compress.storage import load

        if build is None:
            raise InputError(
                f"{path.name} is no ONNX file, and nothing says which network it holds",
                expected="build, which makes the original architecture",
                got="None",
                fix="pass build=, or name an .onnx file",
            )
        files, notes = _exported(load(path, build), folder, example, original, calibration, force)
        return files, {path.name: path.read_bytes()}, notes
    files, notes = _exported(what, folder, example, original, calibration, force)
    return files, {}, notes


def _there(path: Paths) -> Path:
    if not Path(path).is_file():
        raise DataError(f"{path} is not there", expected="a file", got="none", fix="check the path")
    return Path(path)


def _of_onnx(path: Path, folder: Path) -> tuple[dict[str, Path], dict[str, bytes]]:
    form = form_of(path)
    if form not in _WEIGHTS_ONLY:
        return {form or path.stem: path}, {}
    from compress._quantized_onnx import spelled_out

    beside = folder / "fp32.onnx"
    beside.write_bytes(spelled_out(path))
    return {"fp32": beside, form: path}, {}


def form_of(path: Path) -> str:
    """The form that the file's metadata name; "" for files of other origin.

    Raises
    ------
    DataError
        If it is no ONNX file.
    """
    import onnx

    try:
        held = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has errors of its own
        raise DataError(
            f"{path} is no ONNX file",
            expected="a file of compress.export_onnx, or another exporter's",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="check the path",
        ) from error
    return next((p.value for p in held.metadata_props if p.key == "compress.form"), "")


def _exported(
    model: Any, folder: Path, example: Any, original: Any, calibration: Any, force: bool
) -> tuple[dict[str, Path], list[str]]:
    """Every form that the network can have."""
    from compress.exporting import FORMS, export_onnx
    from compress.quantization_plan import plan_of

    if example is None:
        raise InputError(
            "the network's inputs are not known", expected="example_inputs", got="None", fix="pass one batch"
        )
    files = {"fp32": export_onnx(model if original is None else original, folder / "fp32.onnx", example)}
    if plan_of(model) is None:
        return files, ["The network is not quantized: compress.quantize it to measure the integer forms."]
    notes = []
    for form in FORMS[1:]:
        if form == "a8w8" and calibration is None:
            notes.append("a8w8 left out: it needs calibration data.")
            continue
        try:
            given = calibration if form == "a8w8" else None
            files[form] = export_onnx(model, folder / f"{form}.onnx", example, form, given, force=force)
        except (InputError, UnverifiedError) as error:
            notes.append(f"{form} left out: {error}")
    return files, notes


def _trials(files: Mapping[str, Path]) -> dict[str, tuple[Path, str, dict[str, str]]]:
    """Files with the session options they are run with: those of weights alone in both ways."""
    out = {}
    for name, path in files.items():
        form = name if name == "fp32" else form_of(path)
        out[name] = (path, form, dict[str, str]())
        if form in _WEIGHTS_ONLY:
            out[f"{name}, folded"] = (path, form, {FOLDING: "1"})
    return out


# -- what is measured -----------------------------------------------------------
def _interleaved(
    trials: Mapping[str, tuple[Path, str, dict[str, str]]], threads: int, batch: int, rounds: int, least_ms: float
) -> dict[str, list[float]]:
    """Milliseconds of every form in every round; every second round runs backwards."""
    jobs, counts = {}, {}
    for name, (path, _, options) in trials.items():
        session = session_of(path, threads, options)
        feeds = feeds_of(session, batch, 0, path)
        jobs[name] = (session, feeds)
        session.run(None, feeds)
        once = min(_seconds(session, feeds, 1) for _ in range(3)) * 1e3
        counts[name] = max(1, math.ceil(least_ms / max(once, 1e-3)))
    out: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds):
        for name in list(jobs) if i % 2 == 0 else reversed(list(jobs)):
            session, feeds = jobs[name]
            session.run(None, feeds)  # another session's threads may still spin
            out[name].append(_seconds(session, feeds, counts[name]) * 1e3)
    return out


def _seconds(session: Any, feeds: Any, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        session.run(None, feeds)
    return (time.perf_counter() - start) / count


def _latency(times: Sequence[float]) -> Latency:
    if len(times) == 1:
        return Latency(times[0], times[0], times[0], 1)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(median, low, high, len(times))


def _ratio(base: Sequence[float], times: Sequence[float]) -> float:
    return statistics.median(b / t for b, t in zip(base, times, strict=True))


def _probed(path: Path, threads: int, batch: int, options: Mapping[str, str]) -> dict[str, Any]:
    """Load time and memory, in a process of its own."""
    asked = {"path": str(path), "threads": threads, "batch": batch, "options": dict(options)}
    home = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "compress._load_probe", json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    if done.returncode:
        raise LRPError(
            f"the process that loads {path.name} failed",
            expected="a file that onnxruntime runs",
            got=(done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1],
            fix="pass memory=False to leave it out",
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _accuracy(path: Path, data: Any, threads: int) -> tuple[float, int]:
    """Top-1 of the first output, and of how many samples."""
    import torch

    from compress._data import batches_of, labels_of
    from compress.evaluation import logits_of

    session = session_of(path, threads, {})
    names = [i.name for i in session.get_inputs()]
    right = count = 0
    for index, given in enumerate(batches_of(data, "cpu", "data")):
        y = labels_of(given, "accuracy")
        inputs = [t.float() if t.is_floating_point() else t for t in given.inputs]
        try:
            output = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})[0]
        except Exception as error:  # onnxruntime's errors have no public base
            raise InputError(
                f"{path.name} does not run on the data",
                expected=f"batches of any size for the inputs {', '.join(names)}",
                got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                fix="check the shape of the samples; export with dynamic_batch=True",
            ) from error
        logits = logits_of(torch.from_numpy(output), index)
        right += int((logits.argmax(1) == y).sum())
        count += len(y)
    return right / count, count


def _compressor() -> tuple[str, Callable[[bytes], bytes]]:
    """zstd at level 19 where there is one, else lzma; under its name."""
    for module in ("compression.zstd", "zstandard"):  # of Python 3.14, and a package
        try:
            zstd: Any = importlib.import_module(module)
        except ImportError:
            continue
        return "zstd -19", functools.partial(zstd.compress, level=19)
    return "lzma -6", lambda raw: lzma.compress(raw, preset=6)
