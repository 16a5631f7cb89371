"""Measuring two networks as the files they are: bytes, accuracy loaded back, ONNX, time."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress._data import batches_of
from compress.class_comparison import ClassComparison, compare_classes
from compress.costs import Costs, count
from compress.evaluation import Evaluation, evaluate
from compress.plan import PruningPlan
from compress.pruning import PruneResult
from compress.reporting import Measured, Report, Timed
from compress.target import Target
from lrp.errors import ExportError, InputError, LRPError, MissingDependencyError, UnverifiedError

__all__ = ["judged", "measure", "timed", "versions"]

PACKAGES = ("torch", "torch-pruning", "onnx", "onnxruntime", "numpy")


def versions() -> dict[str, str]:
    """Packages, Python and machine.

    Examples
    --------
    >>> versions()["python"] == platform.python_version()
    True
    """
    from compress.meters import machine

    out = {}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    out["python"] = platform.python_version()
    out["machine"] = f"{machine()}, {platform.system()}"
    return out


def timed(meter: Any, paths: Sequence[Path], rounds: int) -> list[Timed]:
    """Every file timed ``rounds`` times, in turns."""
    from compress.meters import milliseconds, name_of

    times: list[list[float]] = [[] for _ in paths]
    for _ in range(max(1, rounds)):
        for own, path in zip(times, paths, strict=True):
            own.append(milliseconds(meter, path))
    name, threads = name_of(meter), getattr(meter, "threads", None)
    out = []
    for own in times:
        # one disturbed round moves a range, not a quartile
        low, median, high = statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else own * 3
        out.append(Timed(median, low, high, len(own), name, threads))
    return out


def measure(
    result: Any,
    *,
    original: nn.Module | None,
    example_inputs: Any,
    data: Any,
    class_names: Any,
    meter: Any,
    rounds: int,
    title: str | None,
    notes: Sequence[str],
    device: Any,
) -> Report:
    """See :func:`compress.report`."""
    small, plan = _parts(result)
    if meter == "auto":
        meter = getattr(result, "meter", None) or meter
    if original is not None:
        plan.check(original)
    if example_inputs is None and data is not None:
        example_inputs = tuple(t[:1] if isinstance(t, Tensor) else t for t in next(batches_of(data)).inputs)
    said = list(notes)
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), original, example_inputs, said)
        after, loaded = bench.stored(small, "after")
        before, first = (None, None) if original is None else bench.stored(original, "before")
        earlier, later = _evaluations(result, first, loaded, data, class_names, device, said)
        sides = [
            Measured(_costs(result, plan, "before", original, example_inputs), earlier, before),
            Measured(_costs(result, plan, "after", small, example_inputs), later, after),
        ]
        sides = bench.exported(sides, original, small, meter, rounds)
    target, settings, history, stopped = _story(result, plan)
    by, own = settings.get("latency_ms", {}).get("meter"), sides[1].latency
    if target.kind == "latency_ms" and own is not None and own.meter != by:
        said.append(f"The plan was made by the times of '{by}', the times in the table are by '{own.meter}'.")
    limit, reached = _reached(target, sides)
    return Report(
        title=title or f"{type(small).__name__}, pruned",
        model=type(small).__name__,
        target=target,
        limit=limit,
        reached=reached,
        before=sides[0],
        after=sides[1],
        classes=_classes(earlier, later),
        filters=_filters(plan),
        widths=plan.layer_widths,
        protected={g.name: g.protected for g in plan.structure.groups if g.protected},
        unscored=dict(plan.unscored),
        history=history,
        stopped=stopped,
        settings=settings,
        versions=versions(),
        notes=tuple(said),
    )


def _parts(result: Any) -> tuple[nn.Module, PruningPlan]:
    if isinstance(result, PruneResult):
        return result.model, result.plan
    plan = getattr(result, "_pruning_plan", None)
    if not isinstance(result, nn.Module) or plan is None:
        raise InputError(
            "there is no compression to report on",
            expected="what compress.prune or plan.apply returned, or a network that compress.load read",
            got=type(result).__name__ + (" without a plan" if isinstance(result, nn.Module) else ""),
            fix="pass the result of compress.prune",
        )
    return result, plan


def _costs(result: Any, plan: PruningPlan, side: str, model: nn.Module | None, example: Any) -> Costs:
    """Counted on the network where that is possible, else as the plan knows them."""
    known = plan.before if side == "before" else plan.after
    if isinstance(result, PruneResult):
        return result.before if side == "before" else result.reached
    if model is None or example is None:
        return known
    return replace(count(model, example), channels=known.channels)


def _evaluations(
    result: Any,
    original: nn.Module | None,
    small: nn.Module | None,
    data: Any,
    class_names: Any,
    device: Any,
    said: list[str],
) -> tuple[Evaluation | None, Evaluation | None]:
    """Of the networks in the files; without test samples, what the run found."""
    own: tuple[Evaluation | None, Evaluation | None] = (None, None)
    if isinstance(result, PruneResult):
        own = result.evaluation_before, result.evaluation
    if data is None:
        if own[1] is not None:
            said.append("The accuracy is the one that the run measured to steer by, not that of separate test samples.")
        return own
    found: list[Evaluation | None] = []
    for model in (original, small):
        if model is None:
            found.append(None)
            continue
        found.append(
            evaluate(
                model if device is None else copy.deepcopy(model).to(device), data, device=device, classes=class_names
            )
        )
    if found[0] is None:
        said.append("The original network was not at hand: its accuracy, size and speed are not measured here.")
    return found[0], found[1]


def judged(rivals: Mapping[str, PruneResult], data: Any, device: Any) -> dict[str, Any]:
    """Costs and accuracy of other results, on the same test samples."""
    out = {}
    for name, result in rivals.items():
        found = result.evaluation if data is None else evaluate(result.model, data, device=device)
        accuracy = None if found is None else {"accuracy": found.accuracy, "count": found.count}
        out[str(name)] = {"reached": result.reached.to_json(), "evaluation": accuracy, "stopped": result.stopped}
    return out


def _classes(first: Evaluation | None, second: Evaluation | None) -> ClassComparison | None:
    if first is None or second is None or not first.per_class or not second.per_class:
        return None
    return compare_classes(first, second)


def _filters(plan: PruningPlan) -> dict[str, dict[str, float]]:
    """Both denominators: of the layers that can be pruned, and of all."""
    prunable = set(plan.structure.layers)
    out = {}
    for name, chosen in (("prunable", prunable), ("all", set(plan.layer_widths))):
        pairs = [pair for layer, pair in plan.layer_widths.items() if layer in chosen]
        before, after = sum(b for b, _ in pairs), sum(a for _, a in pairs)
        out[name] = {"before": before, "after": after, "removed": 1 - after / before if before else 0.0}
    return out


def _story(result: Any, plan: PruningPlan) -> tuple[Target, dict[str, Any], tuple[Any, ...], str]:
    """Target, settings, steps, and why it ended."""
    settings = {**plan.settings}
    settings.update(settings.pop("done", {}))
    settings.pop("file_bytes", None)  # it is measured
    if isinstance(result, PruneResult):
        settings.update(result.settings)
        history, stopped = result.history, result.stopped
    else:
        history, stopped = (), ""
    asked = settings.pop("target", None)
    if asked is None:  # a plan made by hand has no target but itself
        asked = {"macs": plan.after.macs}
    settings.pop("steps", None)
    return Target.from_json(asked), settings, history, stopped


def _reached(target: Target, sides: Sequence[Measured]) -> tuple[float | None, float | None]:
    """(limit, reached) in the unit of the target, of what was measured."""

    def value(side: Measured) -> float | None:
        if target.kind == "bytes":
            return side.file_bytes
        found = getattr(side.costs, target.kind)
        if target.kind == "latency_ms" and found is None and side.latency is not None:
            found = side.latency.median
        return None if found is None else float(found)

    before, after = value(sides[0]), value(sides[1])
    limit = None if before is None and target.is_share else target.absolute(before or 0.0)
    return limit, after


class _Bench:
    """A folder in which networks become files."""

    def __init__(self, folder: Path, original: nn.Module | None, example_inputs: Any, said: list[str]) -> None:
        self.folder, self.original, self.example, self.said = folder, original, example_inputs, said

    def stored(self, model: nn.Module, name: str) -> tuple[int | None, nn.Module | None]:
        """Bytes of the saved network, and the network read from there."""
        from compress.storage import load, save

        path = self.folder / f"{name}.safetensors"
        try:
            save(model, path)
        except LRPError as error:
            self.said.append(f"The network ({name}) could not be saved: {error.what}; got {error.got}.")
            return None, model
        size = path.stat().st_size
        if self.original is None:
            self.said.append("Accuracy is that of the network in memory: without the original, no file can be read.")
            return size, model
        original = self.original
        return size, load(path, lambda: original)

    def exported(
        self, sides: list[Measured], original: nn.Module | None, small: nn.Module, meter: Any, rounds: int
    ) -> list[Measured]:
        """With sizes, differences and times of the ONNX files, as far as they can be had."""
        if meter is None:
            return sides
        if self.example is None:
            self.said.append("Nothing was exported or timed: there were no example inputs.")
            return sides
        try:
            clock = _meter(meter)
            paths, out = [], list(sides)
            for k, model in enumerate((original, small)):
                if model is None:
                    continue
                path = self.folder / f"{k}.onnx"
                out[k] = replace(out[k], **_export(model, path, self.example))
                paths.append((k, path))
            times = timed(clock, [path for _, path in paths], rounds)
        except (ExportError, MissingDependencyError, UnverifiedError) as error:
            self.said.append(f"Latency was not measured: {error.what}.")
            return sides
        for (k, _), found in zip(paths, times, strict=True):
            out[k] = replace(out[k], latency=found)
        return out


def _export(model: nn.Module, path: Path, example: Any) -> dict[str, Any]:
    """Writes an ONNX file; its size and parity."""
    import onnx

    from compress.exporting import export_onnx

    export_onnx(model, path, example)
    about = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    return {"onnx_bytes": path.stat().st_size, "onnx_parity": about.get("compress.parity", "")}


def _meter(meter: Any) -> Callable[[Path], float]:
    if meter == "auto":
        from compress.meters import onnxruntime_meter

        return onnxruntime_meter()
    if not callable(meter):
        raise InputError(
            "meter can not be called",
            expected="a function from the path of an ONNX file to milliseconds, 'auto' or None",
            got=repr(meter),
            fix="leave it out for onnxruntime on this machine",
        )
    clock: Callable[[Path], float] = meter
    return clock
