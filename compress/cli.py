"""Command line: ``python -m compress``."""

from __future__ import annotations

import json as _json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compress._commands import Done

__all__ = ["app", "main"]

# heavy imports belong into the commands: --help must answer at once

app = typer.Typer(
    help="Prune a CNN by what is relevant in it, to a budget, and measure what is left.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_CRITERIA = "lrp, weight, taylor, gradient, activation, random, and others; variants after a colon: lrp:epsilon_plus"

Model = Annotated[
    str,
    typer.Option(
        metavar="MODULE:CALLABLE", help="builds the original network, for example torchvision.models:resnet18"
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="safetensors; or .pth or .pt, of which only tensors are read, never code"),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="reference and training samples: a folder of class folders, an npz with x and y, or MODULE:CALLABLE",
    ),
]
TestData = Annotated[
    str | None, typer.Option("--test-data", metavar="DATA", help="labelled samples for the accuracy in the report")
]
Validation = Annotated[
    str | None,
    typer.Option("--validation-data", metavar="DATA", help="labelled samples to steer by; default: --test-data"),
]
PerClass = Annotated[
    int, typer.Option("--samples-per-class", min=0, help="reference samples drawn from --data; 0: all of them")
]
Size = Annotated[str | None, typer.Option(metavar="PIXELS", help="resize pictures: 224, or 224x320 (height x width)")]
Mean = Annotated[str | None, typer.Option(metavar="NUMBERS", help="subtracted from pixels in 0..1, one per channel")]
Std = Annotated[str | None, typer.Option(metavar="NUMBERS", help="divided by, after that")]
Grey = Annotated[bool, typer.Option("--grey", help="read pictures with one channel")]
Shape = Annotated[
    str | None,
    typer.Option("--input-shape", metavar="SHAPE", help="of one sample, such as 3,224,224; default: as in --data"),
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="samples per batch")]
Goal = Annotated[
    str,
    typer.Option(
        metavar="QUANTITY=VALUE",
        help="what may remain of channels, macs, params, bytes or latency_ms: macs=0.5, bytes=300KiB, latency_ms=4ms",
    ),
]
Criterion = Annotated[str, typer.Option(metavar="NAME", help=f"what ranks the channels: {_CRITERIA}")]
Normalisation = Annotated[
    str | None, typer.Option(metavar="NAME", help="of scores within a layer: none, sum, l2 or mean")
]
Scope = Annotated[str | None, typer.Option(metavar="NAME", help="of the ranking: global, local or isomorphic")]
RoundTo = Annotated[
    str | None,
    typer.Option("--round-to", metavar="N", help="widths are multiples of it; auto: what this machine likes"),
]
Floor = Annotated[
    list[str] | None,
    typer.Option(metavar="[LAYERS=]VALUE", help="what stays of every group, a share or a number; repeatable"),
]
Protect = Annotated[
    list[str] | None, typer.Option(metavar="LAYER", help="name or pattern of layers that stay whole; repeatable")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder for the results")]
Seed = Annotated[int, typer.Option(help="seed of all that is random", min=0, max=2**32 - 1)]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="where to compute, such as cuda")]
Json = Annotated[bool, typer.Option("--json", help="print a summary as JSON, and nothing else")]


@app.callback()
def _root() -> None:
    """Prune a CNN by what is relevant in it, to a budget, and measure what is left."""


def _stop(message: str, code: int) -> typer.Exit:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(code)


_OPTION = re.compile(
    r"\b(target|criterion|normalisation|scope|round_to|floor|protect|accuracy_floor|device|seed|rates|criteria|data"
    r"|evaluate|steps|resume|original)=('?)([\w.:*]*)\2"
)
_CALLS = {
    "pass a few samples, for example [(x, y)]": "name some with --data",
    "pass a few unlabelled batches": "name some with --data",
}
_NAMED = {"evaluate": "--validation-data", "original": "--model", "class_names": "--data"}


def _for_the_shell(text: str) -> str:
    """Keyword arguments in advice, as options."""

    def option(match: re.Match[str]) -> str:
        name = _NAMED.get(match[1], f"--{match[1].replace('_', '-')}")
        return name + (f" {match[3]}" if match[3] and match[3] != "None" else "")

    for python, shell in _CALLS.items():
        text = text.replace(python, shell)
    return _OPTION.sub(option, re.sub(r"compress\.Target\((\w+)=([^)]*)\)", r"--target \1=\2", text))


def _run(work: Callable[[], Done], json: bool) -> None:
    """Do the work, and print what it found; every error is one line."""
    from lrp.errors import LRPError, UnverifiedError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            done = work()
        except LRPError as error:
            told = LRPError(
                error.what, expected=_for_the_shell(error.expected), got=error.got, fix=_for_the_shell(error.fix)
            )
            raise _stop(str(told), 1 if isinstance(error, UnverifiedError) else 2) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _stop(f"{where}{error.strerror or error}", 2) from None
    for text in dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning):
        print(f"warning: {_for_the_shell(' '.join(text.split()))}", file=sys.stderr)
    if json:
        print(_json.dumps(done.summary, indent=2))
    else:
        for line in done.lines:
            print(line)
    if done.broken:
        raise _stop(done.broken, 1)


@app.command()
def prune(
    model: Model,
    target: Goal,
    output: Output,
    weights: Weights = None,
    data: Data = None,
    samples_per_class: PerClass = 10,
    validation_data: Validation = None,
    test_data: TestData = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    grey: Grey = False,
    input_shape: Shape = None,
    batch_size: Batch = 64,
    criterion: Criterion = "lrp",
    normalisation: Normalisation = None,
    scope: Scope = None,
    round_to: RoundTo = None,
    floor: Floor = None,
    protect: Protect = None,
    steps: Annotated[int, typer.Option(min=1, help="rounds of scoring, cutting and training")] = 1,
    fine_tune_epochs: Annotated[int, typer.Option(min=0, help="of training on all of --data, after every cut")] = 0,
    learning_rate: Annotated[float, typer.Option(help="of that training")] = 0.01,
    distill: Annotated[
        bool, typer.Option("--distill", help="let the training follow the original's outputs, beside the labels")
    ] = False,
    accuracy_floor: Annotated[
        float | None,
        typer.Option(help="least accuracy after a step, or, if negative, the largest drop; a step below is undone"),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder for the state: after a kill the same command goes on")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="write model.onnx as well, compared with the network")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="compare with other criteria at this budget, as cut")
    ] = True,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="repeat the whole run, training included, with random, weight, activation")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Prune to a budget, and report on it with a page."""

    def work() -> Done:
        from compress._commands import prune
        from compress._options import Network, Pruning, Ranked, Samples

        return prune(
            Network(model, weights, input_shape, device),
            Samples(data, validation_data, test_data, samples_per_class, size, mean, std, grey, batch_size, seed),
            Ranked(criterion, normalisation, scope, round_to, floor or (), protect or ()),
            Pruning(
                target, steps, fine_tune_epochs, learning_rate, distill, accuracy_floor, resume, onnx, baselines, rivals
            ),
            output,
        )

    _run(work, json)


@app.command()
def plan(
    model: Model,
    target: Goal,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="a .json file, or a folder for plan.json")
    ] = None,
    weights: Weights = None,
    data: Data = None,
    samples_per_class: PerClass = 10,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    grey: Grey = False,
    input_shape: Shape = None,
    batch_size: Batch = 64,
    criterion: Criterion = "lrp",
    normalisation: Normalisation = None,
    scope: Scope = None,
    round_to: RoundTo = None,
    floor: Floor = None,
    protect: Protect = None,
    diff: Annotated[
        Path | None, typer.Option(metavar="FILE", help="another plan.json: say what that one does differently")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Choose what goes, and print it; nothing is cut."""

    def work() -> Done:
        from compress._commands import plan
        from compress._options import Network, Ranked, Samples

        return plan(
            Network(model, weights, input_shape, device),
            Samples(data, None, None, samples_per_class, size, mean, std, grey, batch_size, seed),
            Ranked(criterion, normalisation, scope, round_to, floor or (), protect or ()),
            target,
            output,
            diff,
        )

    _run(work, json)


@app.command()
def apply(
    file: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan.json")],
    model: Model,
    output: Output,
    weights: Weights = None,
    data: Data = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    grey: Grey = False,
    input_shape: Shape = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="write model.onnx as well, compared with the network")] = False,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Cut a network as a plan says: model.safetensors."""

    def work() -> Done:
        from compress._commands import apply
        from compress._options import Network, Samples

        samples = Samples(data, None, None, 0, size, mean, std, grey, 64, seed)
        return apply(file, Network(model, weights, input_shape, device), samples, output, onnx)

    _run(work, json)


@app.command()
def compare(
    model: Model,
    output: Output,
    weights: Weights = None,
    data: Data = None,
    samples_per_class: PerClass = 10,
    validation_data: Validation = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    grey: Grey = False,
    input_shape: Shape = None,
    batch_size: Batch = 64,
    criteria: Annotated[
        str, typer.Option(metavar="NAMES", help="separated by commas; random, weight and activation always join")
    ] = "lrp",
    rates: Annotated[
        str, typer.Option(metavar="SHARES", help="to be removed, separated by commas")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7",
    quantity: Annotated[str, typer.Option(metavar="NAME", help="of which: channels, macs or params")] = "macs",
    draws: Annotated[int, typer.Option(min=1, help="of reference samples, the same for every criterion")] = 5,
    normalisation: Normalisation = None,
    scope: Scope = None,
    round_to: RoundTo = None,
    floor: Floor = None,
    protect: Protect = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Compare criteria at equal budgets, without training."""

    def work() -> Done:
        from compress._commands import compare
        from compress._options import Network, Ranked, Samples

        return compare(
            Network(model, weights, input_shape, device),
            Samples(data, validation_data, None, samples_per_class, size, mean, std, grey, batch_size, seed),
            Ranked("lrp", normalisation, scope, round_to, floor or (), protect or ()),
            criteria,
            rates,
            quantity,
            draws,
            output,
        )

    _run(work, json)


@app.command()
def sensitivity(
    model: Model,
    output: Output,
    weights: Weights = None,
    data: Data = None,
    samples_per_class: PerClass = 10,
    validation_data: Validation = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    grey: Grey = False,
    input_shape: Shape = None,
    batch_size: Batch = 64,
    criterion: Criterion = "lrp",
    rates: Annotated[
        str, typer.Option(metavar="SHARES", help="to be removed of one group at a time, separated by commas")
    ] = "0.1,0.3,0.5,0.7,0.9",
    per: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="one row for all layers that fit, such as layer1.*; repeatable"),
    ] = None,
    protect: Protect = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """How much every group of channels can lose alone."""

    def work() -> Done:
        from compress._commands import sensitivity
        from compress._options import Network, Ranked, Samples

        return sensitivity(
            Network(model, weights, input_shape, device),
            Samples(data, validation_data, None, samples_per_class, size, mean, std, grey, batch_size, seed),
            Ranked(criterion, protect=protect or ()),
            rates,
            per or (),
            output,
        )

    _run(work, json)


@app.command()
def report(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="a report.json; or a pruned model.safetensors, to be measured")
    ],
    output: Output,
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:CALLABLE", help="builds the original network; to measure")
    ] = None,
    weights: Weights = None,
    test_data: TestData = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    grey: Grey = False,
    input_shape: Shape = None,
    batch_size: Batch = 64,
    title: Annotated[str | None, typer.Option(help="of the page")] = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure a pruned file, or write a report's page again."""

    def work() -> Done:
        from compress._commands import report
        from compress._options import Network, Samples

        network = None if model is None else Network(model, weights, input_shape, device)
        samples = Samples(None, None, test_data, 0, size, mean, std, grey, batch_size, seed)
        return report(file, network, samples, title, output)

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
