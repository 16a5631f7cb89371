"""Command line: ``python -m compress``."""

from __future__ import annotations

import json as _json
import re
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from compress import _options as opt

if TYPE_CHECKING:
    from compress._commands import Done

__all__ = ["app", "main"]

# heavy imports belong into the commands: --help must answer at once

app = typer.Typer(
    help="Prune and quantize a CNN by what is relevant in it, to a budget, and measure what is left.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class _Command(TyperCommand):
    """Refuses an option given twice, of which the parser would take the last without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for p in order:
            once = p.param_type_name == "option" and not getattr(p, "multiple", False)
            if once and not getattr(p, "is_flag", False) and order.count(p) > 1:
                ctx.fail(f"Option '{p.opts[0]}' is given more than once.")
        return super().parse_args(ctx, args)


@app.callback()
def _root() -> None:
    """Prune and quantize a CNN by what is relevant in it, to a budget, and measure what is left."""


def _stop(message: str, code: int) -> typer.Exit:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(code)


_OPTION = re.compile(
    r"\b(target|criterion|normalisation|scope|round_to|floor|protect|accuracy_floor|device|seed|rates|criteria|data"
    r"|evaluate|steps|resume|original|meter|class_names)=('?)([\w.:*]*)\2"
)
_CALLS = {
    "pass a few samples, for example [(x, y)]": "name some with --data",
    "pass a few unlabelled batches": "name some with --data",
    ", or pass dynamic_batch=False for the batch size of the example alone": "",
    "reestimate_batchnorm=False": "--no-reestimate",
    "calibration=": "--data",
    "calibration data": "calibration samples (--data)",
    "force=True": "--force",
    "allow_collapse=True": "--allow-collapse",
    "rate=compress.Rate(zeros=0.9)": "--zeros 0.9",
    "train=False to assign once": "--epochs 0 to assign once",
    "method='ecq'": "--method ecq",
    "compress.Target(bytes=...)": "--target bytes=...",
    "form=": "--form ",
    "print(structure) lists the groups": "the command plan lists the groups",
    "a smaller per_class": "a smaller --samples-per-class",
}
_NAMED = {"evaluate": "--validation-data", "original": "--model", "class_names": "--classes"}


def _for_the_shell(text: str) -> str:
    """Keyword arguments in advice, as options."""

    def option(match: re.Match[str]) -> str:
        name = _NAMED.get(match[1], f"--{match[1].replace('_', '-')}")
        return name + (f" {match[3]}" if match[3] and match[3] != "None" else "")

    for python, shell in _CALLS.items():
        text = text.replace(python, shell)
    return _OPTION.sub(option, re.sub(r"compress\.Target\((\w+)=([^)]*)\)", r"--target \1=\2", text))


def _run(work: Callable[[], Done], json: bool, interrupted: str = "") -> None:
    """Do the work, and print what it found; every error is one line."""
    from lrp.errors import LRPError, UnverifiedError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            from compress._parity import unheard
            from compress._sources import explaining

            with explaining(), unheard():
                done = work()
        except LRPError as error:
            what, expected, fix = (_for_the_shell(part) for part in (error.what, error.expected, error.fix))
            got = "; ".join([error.got, *getattr(error, "__notes__", ())])
            told = LRPError(what, expected=expected, got=got, fix=fix)
            raise _stop(str(told), 1 if isinstance(error, UnverifiedError) else 2) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _stop(f"{where}{error.strerror or error}", 2) from None
        except KeyboardInterrupt:
            raise _stop(f"interrupted{interrupted}", 130) from None
    for text in dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning):
        print(f"warning: {_for_the_shell(' '.join(text.split()))}", file=sys.stderr)
    if json:
        print(_json.dumps(done.summary, indent=2))
    else:
        for line in done.lines:
            print(line)
    if done.broken:
        raise _stop(done.broken, 1)


@app.command(cls=_Command)
def prune(
    model: opt.Model,
    target: opt.Goal,
    output: opt.Output,
    weights: opt.Weights = None,
    data: opt.Data = None,
    samples_per_class: opt.PerClass = 10,
    validation_data: opt.Validation = None,
    test_data: opt.TestData = None,
    classes: opt.Classes = None,
    size: opt.Size = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    grey: opt.Grey = False,
    input_shape: opt.Shape = None,
    batch_size: opt.Batch = 64,
    criterion: opt.Criterion = "lrp",
    normalisation: opt.Normalisation = None,
    scope: opt.Scope = None,
    round_to: opt.RoundTo = None,
    floor: opt.Floor = None,
    protect: opt.Protect = None,
    meter: opt.Meter = None,
    steps: opt.Steps = 1,
    reestimate: opt.Reestimate = True,
    fine_tune_epochs: opt.Epochs = 0,
    learning_rate: opt.LearningRate = 0.01,
    distill: opt.Distill = False,
    accuracy_floor: opt.AccuracyFloor = None,
    resume: opt.Resume = None,
    onnx: opt.Onnx = False,
    baselines: opt.Baselines = True,
    rivals: opt.Rivals = False,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Prune to a budget, and report on it with a page."""

    def work() -> Done:
        from compress._commands import prune

        samples = opt.Samples(
            data, validation_data, test_data, samples_per_class, size, mean, std, grey, batch_size, seed, classes
        )
        training = opt.Training(fine_tune_epochs, learning_rate, distill, accuracy_floor, reestimate)
        return prune(
            opt.Network(model, weights, input_shape, device),
            samples,
            opt.Ranked(criterion, normalisation, scope, round_to, floor or (), protect or (), meter),
            opt.Pruning(opt.target_of(target), steps, training, resume, onnx, baselines, rivals),
            output,
        )

    _run(work, json, "" if resume is None else f"; the same command goes on from what is in {resume}")


@app.command(cls=_Command)
def plan(
    model: opt.Model,
    target: opt.Goal,
    output: opt.MaybeOutput = None,
    weights: opt.Weights = None,
    data: opt.Data = None,
    samples_per_class: opt.PerClass = 10,
    size: opt.Size = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    grey: opt.Grey = False,
    input_shape: opt.Shape = None,
    batch_size: opt.Batch = 64,
    criterion: opt.Criterion = "lrp",
    normalisation: opt.Normalisation = None,
    scope: opt.Scope = None,
    round_to: opt.RoundTo = None,
    floor: opt.Floor = None,
    protect: opt.Protect = None,
    meter: opt.Meter = None,
    diff: opt.Diff = None,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Choose what goes, and print it; nothing is cut."""

    def work() -> Done:
        from compress._commands import plan

        return plan(
            opt.Network(model, weights, input_shape, device),
            opt.Samples(data, None, None, samples_per_class, size, mean, std, grey, batch_size, seed),
            opt.Ranked(criterion, normalisation, scope, round_to, floor or (), protect or (), meter),
            opt.target_of(target),
            output,
            diff,
        )

    _run(work, json)


@app.command(cls=_Command)
def apply(
    file: opt.PlanFile,
    model: opt.Model,
    output: opt.Output,
    weights: opt.Weights = None,
    data: opt.Data = None,
    samples_per_class: opt.PerClass = 10,
    size: opt.Size = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    grey: opt.Grey = False,
    input_shape: opt.Shape = None,
    batch_size: opt.Batch = 64,
    reestimate: opt.Reestimate = True,
    onnx: opt.Onnx = False,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Cut a network as a plan says: model.safetensors."""

    def work() -> Done:
        from compress._commands import apply

        samples = opt.Samples(data, None, None, samples_per_class, size, mean, std, grey, batch_size, seed)
        return apply(file, opt.Network(model, weights, input_shape, device), samples, output, onnx, reestimate)

    _run(work, json)


@app.command(cls=_Command)
def compare(
    model: opt.Model,
    output: opt.Output,
    weights: opt.Weights = None,
    data: opt.Data = None,
    samples_per_class: opt.PerClass = 10,
    validation_data: opt.Validation = None,
    size: opt.Size = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    grey: opt.Grey = False,
    input_shape: opt.Shape = None,
    batch_size: opt.Batch = 64,
    criteria: opt.Criteria = "lrp",
    rates: opt.Rates = "0.1,0.2,0.3,0.4,0.5,0.6,0.7",
    quantity: opt.Quantity = "macs",
    draws: opt.Draws = 5,
    normalisation: opt.Normalisation = None,
    scope: opt.Scope = None,
    round_to: opt.RoundTo = None,
    floor: opt.Floor = None,
    protect: opt.Protect = None,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Compare criteria at equal budgets, without training."""

    def work() -> Done:
        from compress._commands import compare

        return compare(
            opt.Network(model, weights, input_shape, device),
            opt.Samples(data, validation_data, None, samples_per_class, size, mean, std, grey, batch_size, seed),
            opt.Ranked(criteria, normalisation, scope, round_to, floor or (), protect or ()),
            opt.shares_of(rates),
            quantity,
            draws,
            output,
        )

    _run(work, json)


@app.command(cls=_Command)
def sensitivity(
    model: opt.Model,
    output: opt.Output,
    weights: opt.Weights = None,
    data: opt.Data = None,
    samples_per_class: opt.PerClass = 10,
    validation_data: opt.Validation = None,
    size: opt.Size = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    grey: opt.Grey = False,
    input_shape: opt.Shape = None,
    batch_size: opt.Batch = 64,
    criterion: opt.Criterion = "lrp",
    rates: opt.RatesAlone = "0.1,0.3,0.5,0.7,0.9",
    per: opt.Per = None,
    protect: opt.Protect = None,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """How much every group of channels can lose alone."""

    def work() -> Done:
        from compress._commands import sensitivity

        return sensitivity(
            opt.Network(model, weights, input_shape, device),
            opt.Samples(data, validation_data, None, samples_per_class, size, mean, std, grey, batch_size, seed),
            opt.Ranked(criterion, protect=protect or ()),
            opt.shares_of(rates),
            per or (),
            output,
        )

    _run(work, json)


@app.command(cls=_Command)
def report(
    file: opt.ReportFile,
    output: opt.Output,
    model: opt.MaybeModel = None,
    weights: opt.Weights = None,
    test_data: opt.TestData = None,
    classes: opt.Classes = None,
    size: opt.Size = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    grey: opt.Grey = False,
    input_shape: opt.Shape = None,
    batch_size: opt.Batch = 64,
    meter: opt.Meter = None,
    comparison: opt.ComparisonFile = None,
    title: opt.Title = None,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Measure a pruned file, or write a report's page again."""

    def work() -> Done:
        from compress._commands import report

        network = None if model is None else opt.Network(model, weights, input_shape, device)
        samples = opt.Samples(None, None, test_data, 0, size, mean, std, grey, batch_size, seed, classes)
        return report(file, network, samples, meter, title, output, comparison)

    _run(work, json)


@app.command(cls=_Command)
def quantize(
    model: opt.Model,
    output: opt.Output,
    weights: opt.Weights = None,
    data: opt.Data = None,
    validation_data: opt.BestBy = None,
    test_data: opt.TestData = None,
    classes: opt.Classes = None,
    size: opt.Size = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    grey: opt.Grey = False,
    input_shape: opt.Shape = None,
    batch_size: opt.Batch = 64,
    method: opt.Method = "ecqx",
    bits: opt.Bits = None,
    gamma: opt.Gamma = None,
    zeros: opt.Zeros = None,
    bits_per_weight: opt.BitsPerWeight = None,
    target: opt.FileGoal = None,
    epochs: opt.Trained = 10,
    lr: opt.TrainedRate = 1e-3,
    distill: opt.Distill = False,
    relevance_at: opt.RelevanceAt = None,
    every: opt.Every = None,
    first: opt.End = "8",
    last: opt.End = "8",
    exclude: opt.Exclude = None,
    allow_collapse: opt.Collapse = False,
    forms: opt.Measured = True,
    controls: opt.Controls = 0,
    resume: opt.Resume = None,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Quantize to a few bits per weight, and report on it with a page."""

    def work() -> Done:
        from compress._quantize_command import quantize

        samples = opt.Samples(data, validation_data, test_data, 10, size, mean, std, grey, batch_size, seed, classes)
        wanted = opt.Quantizing(
            method=method,
            bits=bits or (),
            gamma=gamma,
            zeros=zeros,
            bits_per_weight=bits_per_weight,
            target=None if target is None else opt.target_of(target),
            epochs=epochs,
            rate=lr,
            distill=distill,
            relevance_at=relevance_at,
            every=every,
            first=first,
            last=last,
            exclude=exclude or (),
            allow_collapse=allow_collapse,
            forms=forms,
            controls=controls,
            resume=resume,
        )
        return quantize(opt.Network(model, weights, input_shape, device), samples, wanted, output)

    _run(work, json, "" if resume is None else f"; the same command goes on from what is in {resume}")


@app.command(cls=_Command)
def export(
    file: opt.NetworkFile,
    model: opt.Model,
    output: opt.OnnxFile,
    form: opt.OnnxForm = "fp32",
    data: opt.Calibration = None,
    size: opt.Size = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    grey: opt.Grey = False,
    input_shape: opt.Shape = None,
    batch_size: opt.Batch = 64,
    force: opt.Force = False,
    seed: opt.Seed = 0,
    json: opt.Json = False,
) -> None:
    """Write an ONNX file, compared with the network."""

    def work() -> Done:
        from compress._form_commands import export

        samples = opt.Samples(data, None, None, 0, size, mean, std, grey, batch_size, seed)
        return export(opt.Network(model, file, input_shape), samples, form, force, output)

    _run(work, json)


@app.command(cls=_Command)
def measure(
    files: opt.MeasuredFiles,
    model: opt.MaybeModel = None,
    weights: opt.Original = None,
    data: opt.Calibration = None,
    test_data: opt.TestData = None,
    size: opt.Size = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    grey: opt.Grey = False,
    input_shape: opt.Shape = None,
    batch_size: opt.Batch = 64,
    threads: opt.Threads = 2,
    batch: opt.Timed = 1,
    rounds: opt.Rounds = 30,
    force: opt.Force = False,
    output: opt.JsonFile = None,
    seed: opt.Seed = 0,
    json: opt.Json = False,
) -> None:
    """Size, load time, latency, memory and accuracy of every form beside fp32."""

    def work() -> Done:
        from compress._form_commands import measure

        network = None if model is None else opt.Network(model, files[0], input_shape)
        samples = opt.Samples(data, None, test_data, 0, size, mean, std, grey, batch_size, seed)
        settings = {"threads": threads, "batch": batch, "rounds": rounds, "force": force}
        return measure(files, network, weights, samples, settings, output)

    _run(work, json)


@app.command(cls=_Command)
def inspect(file: opt.QuantizedFile, json: opt.Json = False) -> None:
    """What a file holds, tensor by tensor; nothing is decoded."""

    def work() -> Done:
        from compress._quantize_command import inspect

        return inspect(file)

    _run(work, json)


def main() -> None:
    """Entry point."""
    try:
        code = app(prog_name="python -m compress", standalone_mode=False)
    except Exception as error:
        # wrong use, as the parser reports it; anything else is ours and shows its traceback
        code = getattr(error, "exit_code", None)
        describe = getattr(error, "format_message", None)
        if code is None:
            raise
        if describe is not None and describe():
            print(f"error: {' '.join(describe().split())}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
