"""Measuring a quantized network as the file it is: bytes, accuracy loaded back, forms, heat maps."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress import container
from compress._data import batches_of
from compress._measuring import versions
from compress.class_comparison import compared
from compress.drift import drift
from compress.evaluation import Evaluation, evaluate
from compress.quantization import QuantizeResult, Reached
from compress.quantization_plan import plan_of
from compress.quantization_report import Layer, QuantizationReport, Side
from compress.storage import file_size, load, save
from compress.target import Target
from lrp.errors import ExportError, InputError, LRPError, MissingDependencyError, UnverifiedError

__all__ = ["measure_quantized", "of_network"]

_MAPS = 256  # samples whose heat maps are compared
_TURNS = 6  # rounds of the forms for one round that was asked for: they are short


def of_network(model: nn.Module, original: nn.Module | None) -> QuantizeResult:
    """A quantized network that was read from a file, as a result of which the training is not known."""
    plan = plan_of(model)
    assert plan is not None
    size = file_size(_unquantized(model) if original is None else original)
    return QuantizeResult(model, plan, size, Reached.of(model, plan), settings=dict(plan.settings))


def measure_quantized(
    result: QuantizeResult,
    *,
    original: nn.Module | None,
    example_inputs: Any,
    data: Any,
    class_names: Any,
    calibration: Any,
    build: Any,
    meter: Any,
    rounds: int,
    title: str | None,
    notes: Sequence[str],
    sections: Mapping[str, Any],
    device: Any,
) -> QuantizationReport:
    """See :func:`compress.report`."""
    if meter is not None and meter != "auto":
        raise InputError(
            "forms of a quantized network are timed side by side in onnxruntime",
            expected="meter='auto' or None",
            got=repr(meter),
            fix="write the forms with compress.export_onnx, and call your meter on each file",
        )
    said = list(notes)
    if example_inputs is None and data is not None:
        example_inputs = tuple(t[:1] if isinstance(t, Tensor) else t for t in next(batches_of(data)).inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "after"
        save(result.model, path)
        header = container.inspect(path)
        loaded = _loaded(result.model, original, build, path, said)
        size = path.stat().st_size
        first = None
        before = result.before
        if original is not None:
            first = Path(folder) / "before"
            save(original, first)
            before = first.stat().st_size
    earlier, later = _evaluations(result, original, loaded, data, class_names, device, said)
    forms = None if meter is None else _forms(result, original, example_inputs, data, calibration, rounds, said)
    kept = dict(sections)
    if "drift" not in kept and original is not None and data is not None:
        maps = _maps(original, loaded, data, device, said)
        kept |= {} if maps is None else {"drift": maps}
    return QuantizationReport(
        title=title or f"{type(result.model).__name__}, quantized",
        model=type(result.model).__name__,
        method=str(result.settings.get("method", "unknown")),
        before=Side(before, earlier),
        after=Side(size, later),
        reached=replace(result.reached, bytes=size),
        parts={
            "weights": sum(e.length for e in header.entries),
            "other": header.floats[1],
            "header": header.start,
        },
        layers=_layers(result, header),
        left_out=dict(result.plan.left_out),
        limit=_limit(result),
        gamma=result.gamma,
        collapsed=result.collapsed,
        classes=compared(earlier, later),
        training=result.training,
        forms=forms,
        settings=dict(result.settings),
        versions=versions(),
        notes=tuple(said),
        sections=kept,
    )


def _limit(result: QuantizeResult) -> int | None:
    asked = result.settings.get("target")
    return None if asked is None else int(Target.from_json(asked).absolute(result.before))


def _layers(result: QuantizeResult, header: container.Header) -> tuple[Layer, ...]:
    lengths = {entry.name: entry.length for entry in header.entries}
    out = []
    for name, row in result.plan.statistics(result.model).items():
        book, state = result.plan.codebooks[name], result.states.get(name)
        steps = float(book.step.min()), float(book.step.max())
        out.append(
            Layer(
                name,
                book.bits,
                book.size,
                *steps,
                int(row["weights"]),
                row["zeros"],
                row["entropy"],
                lengths.get(name),  # None for a tensor that is another one
                "none" if state is None else state.relevance,
                None if state is None else state.beta,
                row["zeros"] == 1.0,
            )
        )
    return tuple(out)


# -- the network in the file -----------------------------------------------------
def _unquantized(model: nn.Module) -> nn.Module:
    """A copy that carries no plan."""
    out = copy.deepcopy(model)
    for name in ("_quantization_plan", "_pruning_plan"):
        out.__dict__.pop(name, None)
    return out


def _loaded(model: nn.Module, original: nn.Module | None, build: Any, path: Path, said: list[str]) -> nn.Module:
    """The network read from the file.

    A pruned one needs the architecture before pruning; where that is not at
    hand, it is read from a file of the same tensors without the pruning plan.
    """
    if build is not None:
        return load(path, build)
    if getattr(model, "_pruning_plan", None) is None:
        return load(path, lambda: _unquantized(model))
    if original is not None and getattr(original, "_pruning_plan", None) is None:
        shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (model, original)]
        if shapes[0] != shapes[1]:
            return load(path, lambda: original)
    whole = copy.deepcopy(model)
    whole.__dict__.pop("_pruning_plan", None)
    beside = path.with_name("uncut")
    save(whole, beside)
    said.append(
        "The architecture before pruning was not at hand (build=): accuracy is that of the tensors in the file, put "
        "into the pruned network."
    )
    return load(beside, lambda: _unquantized(model))


def _evaluations(
    result: QuantizeResult,
    original: nn.Module | None,
    loaded: nn.Module,
    data: Any,
    class_names: Any,
    device: Any,
    said: list[str],
) -> tuple[Evaluation | None, Evaluation | None]:
    if data is None:
        if result.evaluation is not None:
            said.append("The accuracy is the one that the run measured, not that of separate test samples.")
        return result.evaluation_before, result.evaluation

    def of(model: nn.Module) -> Evaluation:
        placed = model if device is None else copy.deepcopy(model).to(device)
        return evaluate(placed, data, device=device, classes=class_names)

    if original is None:
        said.append("The network before quantization was not at hand: its accuracy is not measured here.")
    return None if original is None else of(original), of(loaded)


# -- forms and heat maps -----------------------------------------------------------
def _forms(
    result: QuantizeResult,
    original: nn.Module | None,
    example: Any,
    data: Any,
    calibration: Any,
    rounds: int,
    said: list[str],
) -> dict[str, Any] | None:
    if example is None:
        said.append("Nothing was exported or timed: there were no example inputs.")
        return None
    try:
        from compress.measurement import measure

        found = measure(
            result.model,
            example_inputs=example,
            original=original,
            data=data,
            calibration=calibration,
            rounds=_TURNS * rounds,
            memory=False,
        )
    except (ExportError, MissingDependencyError, UnverifiedError, InputError) as error:
        said.append(f"Forms were not measured: {error.what}.")
        return None
    return found.to_json()


def _maps(original: nn.Module, loaded: nn.Module, data: Any, device: Any, said: list[str]) -> dict[str, Any] | None:
    try:
        return drift(original, loaded, list(_some(data)), device=device, progress=False).to_json()
    except LRPError as error:
        said.append(f"Heat maps were not compared: {error.what}.")
        return None


def _some(data: Any) -> Iterable[tuple[Any, Any]]:
    """The first samples, as batches."""
    left = _MAPS
    for batch in batches_of(data):
        inputs = tuple(t[:left] for t in batch.inputs)
        yield (inputs if isinstance(batch.x, tuple) else inputs[0]), batch.y[:left]
        left -= len(inputs[0])
        if left <= 0:
            return
