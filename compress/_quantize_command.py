"""The commands quantize and inspect."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compress import container
from compress._commands import Done, kept, writing
from compress._network_state import damaged
from compress._sources import builder, opened
from compress.quantization import KNOWN, QuantizeResult
from compress.quantization import quantize as quantize_network
from compress.quantization_report import QuantizationReport
from compress.quantizer import METHODS
from compress.quantizer_comparison import QuantizerComparison, compare_quantizers
from compress.rate import Rate
from compress.reporting import report as report_on
from compress.storage import save
from compress.training import Distillation, FineTune
from compress.weight_relevance import WeightRelevance
from lrp.errors import DataError, FileFormatError, InputError

if TYPE_CHECKING:
    from compress._options import Network, Samples
    from compress._requests import Quantizing

__all__ = ["inspect", "quantize"]

FILE = "model.compressed"


def quantize(network: Network, samples: Samples, wanted: Quantizing, folder: Path) -> Done:
    """Quantize, measure, write."""
    options = _options(samples, wanted)  # refused before any work
    rounding = wanted.method not in METHODS
    if not rounding and samples.data is None:
        raise InputError(
            f"--method {wanted.method} trains",
            expected="--data, labelled samples",
            got="none",
            fix="name some, or round without them: --method rtn_per_channel",
        )
    model, example = opened(network, samples, labelled=True)
    training = _training(samples, wanted, model)
    data = None if samples.pictures is None else samples.pictures.batches(samples.batch_size)
    with writing(folder):
        result = quantize_network(
            model,
            data,
            method=wanted.method,
            train=None if rounding else training(samples.seed) if training else False,
            resume=wanted.resume if training else None,
            allow_collapse=wanted.allow_collapse,
            seed=samples.seed,
            device=network.device,
            **options,
        )
        save(result.model, folder / FILE)
        result.plan.save(folder / "plan.json")
        written = [FILE, "plan.json"]
        with kept(folder, written):
            beside: dict[str, Any] = {}
            if wanted.controls:
                beside["comparison"] = _controls(result, model, data, samples, training, wanted, options, network)
            found = _report(result, network, samples, model, example, wanted.forms, beside)
            report_on(found, folder)
    written += ["report.json", "index.html"]
    lines = [*found.sentences, f"Written to {folder}: {', '.join(written)}"]
    held = found.to_json()
    kept_keys = ("title", "model", "method", "sentences", "before", "after", "target", "reached", "parts", "layers")
    summary = {**{name: held[name] for name in kept_keys}, "folder": str(folder), "files": written}
    return Done(lines, summary, "" if found.met else "the rate was not reached")


def _options(samples: Samples, wanted: Quantizing) -> dict[str, Any]:
    """For compress.quantize; what was not given is left out."""
    given = [("--gamma", wanted.gamma), ("--zeros", wanted.zeros), ("--bits-per-weight", wanted.bits_per_weight)]
    goals = [name for name, value in [*given, ("--target", wanted.target)] if value is not None]
    if len(goals) > 1:
        raise InputError(
            "these are several goals",
            expected="one of --gamma, --zeros, --bits-per-weight and --target",
            got=" and ".join(goals),
            fix="leave all but one out",
        )
    if wanted.method not in KNOWN:
        raise InputError(
            f"--method {wanted.method} is unknown", expected=", ".join(KNOWN), got=wanted.method, fix="choose one"
        )
    rounding = wanted.method not in METHODS
    if rounding and goals:
        raise InputError(
            f"--method {wanted.method} has no rate to choose",
            expected="--bits alone",
            got=goals[0],
            fix="--method ecq holds a rate",
        )
    if wanted.controls and samples.testing is None:
        raise InputError(
            "--controls are judged on samples that no run is trained on",
            expected="--test-data",
            got="none",
            fix="name some labelled samples",
        )
    if wanted.controls and (rounding or not wanted.epochs or samples.data is None):
        raise InputError(
            "--controls are trainings",
            expected="--data, --epochs above 0, and a method that trains",
            got=f"--data {samples.data}, --epochs {wanted.epochs}, --method {wanted.method}",
            fix="leave --controls out",
        )
    out: dict[str, Any] = {"bits": wanted.widths, "exclude": tuple(wanted.exclude)}
    out |= {"first": wanted.end("first"), "last": wanted.end("last")}
    if wanted.zeros is not None or wanted.bits_per_weight is not None:
        out["rate"] = Rate(zeros=wanted.zeros, bits_per_weight=wanted.bits_per_weight)
    if wanted.gamma is not None:
        out["gamma"] = wanted.gamma
    if wanted.target is not None:
        out["target"] = wanted.target
    if wanted.relevance_at is not None or wanted.every is not None:
        if wanted.method not in ("ecqx", "random"):
            raise InputError(
                f"--method {wanted.method} asks for no relevance by LRP",
                expected="--method ecqx beside --relevance-at and --every",
                got=wanted.method,
                fix="leave them out",
            )
        plain = WeightRelevance()
        out["relevance"] = replace(plain, at=wanted.relevance_at or plain.at, every=wanted.every or plain.every)
    return out


def _training(samples: Samples, wanted: Quantizing, model: nn.Module) -> Callable[[int], FineTune] | None:
    """What trains with a seed; None without training."""
    surplus = [n for n, v in (("--distill", wanted.distill), ("--resume", wanted.resume)) if v]
    if wanted.method not in METHODS or not wanted.epochs:
        if surplus:
            raise InputError(
                f"{surplus[0]} is about training",
                expected="--epochs above 0, and a method that trains",
                got=f"--method {wanted.method}, --epochs {wanted.epochs}",
                fix=f"leave {surplus[0]} out",
            )
        return None
    pictures, held = samples.pictures, samples.validating
    if pictures is None:
        return None

    def training(seed: int) -> FineTune:
        return FineTune(
            pictures.shuffled(samples.batch_size, seed),
            epochs=wanted.epochs,
            optimizer="adamw",
            lr=wanted.rate,
            weight_decay=0.0,
            validation=None if held is None else held.batches(samples.batch_size),
            distill=Distillation(model) if wanted.distill else None,
            seed=seed,
        )

    return training


def _controls(
    result: QuantizeResult,
    model: nn.Module,
    data: Any,
    samples: Samples,
    training: Callable[[int], FineTune] | None,
    wanted: Quantizing,
    options: dict[str, Any],
    network: Network,
) -> QuantizerComparison:
    """All methods at the entropy that this run has reached."""
    testing = samples.testing
    assert testing is not None
    assert training is not None
    shared = {name: value for name, value in options.items() if name not in ("gamma", "rate", "target", "relevance")}
    return compare_quantizers(
        model,
        data,
        evaluate=testing.batches(samples.batch_size),
        seeds=wanted.controls,
        rate=Rate(bits_per_weight=result.reached.bits_per_weight),
        train=training,
        resume=None if wanted.resume is None else wanted.resume / "controls.cells",
        device=network.device,
        **shared,
    )


def _report(
    result: QuantizeResult,
    network: Network,
    samples: Samples,
    model: nn.Module,
    example: Any,
    forms: bool,
    beside: dict[str, Any],
) -> QuantizationReport:
    testing = samples.testing
    pruned = getattr(model, "_pruning_plan", None) is not None
    found: QuantizationReport = report_on(
        result,
        original=model,
        example_inputs=example,
        data=None if testing is None else testing.batches(samples.batch_size),
        class_names=None if testing is None else samples.names(testing),
        calibration=samples.reference,
        meter="auto" if forms else None,
        build=builder(network.model) if pruned else None,
        device=network.device,
        **beside,
    )
    return found


# ---------------------------------------------------------------------- inspect


def inspect(file: Path) -> Done:
    """What a file of compress.save says of itself; nothing is decoded."""
    if not file.is_file():
        raise DataError(f"{file} is not there", expected="a file", got="none", fix="check the path")
    if not container.is_container(file):
        return _plain_file(file)
    header = container.inspect(file)
    try:
        about = header.meta["quantization"]
        settings, left_out = dict(about["settings"]), dict(about["left_out"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}") from error
    own = sum(e.length for e in header.entries)
    weights = sum(e.size for e in header.entries)
    lines = [
        *str(header).splitlines(),
        f"{weights:,} quantized weights in {own:,} bytes, {8 * own / max(1, weights):.3f} bits per weight",
        f"pruned: {'yes' if header.meta.get('pruning') else 'no'}",
        f"tensors that stay as they are: {len(left_out):,}",
        *(f"{name.replace('_', ' ')}: {_said(value)}" for name, value in settings.items()),
    ]
    tensors = [{**vars(e), "shape": list(e.shape)} for e in header.entries]
    sizes = {"bytes": header.size, "header": header.start, "other": header.floats[1], "weights": own}
    told = {"file": str(file), "version": header.version, **sizes, "tensors": tensors, "left_out": left_out}
    return Done(lines, {**told, "pruned": bool(header.meta.get("pruning")), "settings": settings})


def _plain_file(file: Path) -> Done:
    """A safetensors file: networks that are not quantized."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as held:
            names = held.keys()  # it is no mapping
            rows = {name: (held.get_slice(name).get_dtype(), held.get_slice(name).get_shape()) for name in names}
            kind = dict(held.metadata() or {}).get("format", "none")
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{file} is no file of compress.save",
            expected="a quantized network in a container, or safetensors",
            got=f"{type(error).__name__}: {error}",
            fix="for ONNX files: the command measure",
        ) from error
    size = file.stat().st_size
    width = max((len(name) for name in rows), default=0)
    lines = [f"safetensors, {size:,} bytes, not quantized; format: {kind}"]
    lines += [f"{name.ljust(width)}  {dtype}  {'x'.join(map(str, shape))}" for name, (dtype, shape) in rows.items()]
    tensors = [{"name": name, "dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in rows.items()]
    return Done(lines, {"file": str(file), "bytes": size, "format": kind, "tensors": tensors})


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
