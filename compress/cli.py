"""Command line: ``python -m compress``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from compress import _options as opt
from compress import _requests as asked
from compress._shell import Command, run

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


@app.callback()
def _root() -> None:
    """Prune and quantize a CNN by what is relevant in it, to a budget, and measure what is left."""


@app.command(cls=Command)
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
        training = asked.Training(fine_tune_epochs, learning_rate, distill, accuracy_floor, reestimate)
        return prune(
            opt.Network(model, weights, input_shape, device),
            samples,
            asked.Ranked(criterion, normalisation, scope, round_to, floor or (), protect or (), meter),
            asked.Pruning(asked.target_of(target), steps, training, resume, onnx, baselines, rivals),
            output,
        )

    run(work, json, "" if resume is None else f"; the same command goes on from what is in {resume}")


@app.command(cls=Command)
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
            asked.Ranked(criterion, normalisation, scope, round_to, floor or (), protect or (), meter),
            asked.target_of(target),
            output,
            diff,
        )

    run(work, json)


@app.command(cls=Command)
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

    run(work, json)


@app.command(cls=Command)
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
        from compress._study_commands import compare

        return compare(
            opt.Network(model, weights, input_shape, device),
            opt.Samples(data, validation_data, None, samples_per_class, size, mean, std, grey, batch_size, seed),
            asked.Ranked(criteria, normalisation, scope, round_to, floor or (), protect or ()),
            asked.shares_of(rates),
            quantity,
            draws,
            output,
        )

    run(work, json)


@app.command(cls=Command)
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
        from compress._study_commands import sensitivity

        return sensitivity(
            opt.Network(model, weights, input_shape, device),
            opt.Samples(data, validation_data, None, samples_per_class, size, mean, std, grey, batch_size, seed),
            asked.Ranked(criterion, protect=protect or ()),
            asked.shares_of(rates),
            per or (),
            output,
        )

    run(work, json)


@app.command(cls=Command)
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

    run(work, json)


@app.command(cls=Command)
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
    method: opt.Method = "ecq",
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
        wanted = asked.Quantizing(
            method=method,
            bits=bits or (),
            gamma=gamma,
            zeros=zeros,
            bits_per_weight=bits_per_weight,
            target=None if target is None else asked.target_of(target),
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

    run(work, json, "" if resume is None else f"; the same command goes on from what is in {resume}")


@app.command(cls=Command)
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

    run(work, json)


@app.command(cls=Command)
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

    run(work, json)


@app.command(cls=Command)
def inspect(file: opt.QuantizedFile, json: opt.Json = False) -> None:
    """What a file holds, tensor by tensor; nothing is decoded."""

    def work() -> Done:
        from compress._quantize_command import inspect

        return inspect(file)

    run(work, json)


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
