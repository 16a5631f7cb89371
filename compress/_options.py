"""Options of the command line: each is declared here once, with its help, and read as the user typed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrp.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from compress._pictures import Pictures

# no heavy imports: --help must answer at once

_CRITERIA = "lrp, weight, taylor, gradient, activation, random, and others; variants after a colon: lrp:epsilon_plus"
_DATA = "a folder of class folders, an npz with x and y, or MODULE:CALLABLE"
_RATES = "shares to be removed, separated by commas"

# ---------------------------------------------------------------------- the network

Model = Annotated[
    str,
    typer.Option(
        metavar="MODULE:CALLABLE", help="builds the original network, for example torchvision.models:resnet18"
    ),
]
MaybeModel = Annotated[
    str | None, typer.Option(metavar="MODULE:CALLABLE", help="builds the original network; to measure")
]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="safetensors; or .pth or .pt, of which only tensors are read, never code"),
]
Shape = Annotated[
    str | None,
    typer.Option("--input-shape", metavar="SHAPE", help="of one sample, such as 3,224,224; default: as in the data"),
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="where to compute, such as cuda")]

# ---------------------------------------------------------------------- samples

Data = Annotated[str | None, typer.Option(metavar="DATA", help=f"reference and training samples: {_DATA}")]
PerClass = Annotated[
    int, typer.Option("--samples-per-class", min=0, help="reference samples drawn from --data; 0: all of them")
]
Validation = Annotated[
    str | None,
    typer.Option("--validation-data", metavar="DATA", help="labelled samples to steer by; default: --test-data"),
]
TestData = Annotated[
    str | None, typer.Option("--test-data", metavar="DATA", help="labelled samples for the accuracy in the report")
]
Classes = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="of the classes in the report: a file with one name per line, a .json with a list or {label: name}, or "
        "names separated by commas; default: as the data name them",
    ),
]
Size = Annotated[str | None, typer.Option(metavar="PIXELS", help="resize pictures: 224, or 224x320 (height x width)")]
Mean = Annotated[str | None, typer.Option(metavar="NUMBERS", help="subtracted from pixels in 0..1, one per channel")]
Std = Annotated[str | None, typer.Option(metavar="NUMBERS", help="divided by, after that")]
Grey = Annotated[bool, typer.Option("--grey", help="read pictures with one channel")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="samples per batch")]
Seed = Annotated[int, typer.Option(help="seed of all that is random", min=0, max=2**32 - 1)]

# ---------------------------------------------------------------------- what goes

Goal = Annotated[
    str,
    typer.Option(
        metavar="QUANTITY=VALUE",
        help="what may remain of channels, macs, params, bytes or latency_ms: macs=0.5, bytes=300KiB, latency_ms=4ms",
    ),
]
Criterion = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"what ranks the channels: {_CRITERIA}; or MODULE:CALLABLE, f(model, data) -> {{layer: scores}}",
    ),
]
Criteria = Annotated[
    str,
    typer.Option(
        metavar="NAMES", help="as --criterion, separated by commas; random, weight and activation always join"
    ),
]
Normalisation = Annotated[
    str | None, typer.Option(metavar="NAME", help="of scores within a layer: auto, none, sum, l2 or mean")
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
Meter = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:CALLABLE",
        help="from the path of an ONNX file to milliseconds, for latencies; default: onnxruntime on this machine",
    ),
]
Reestimate = Annotated[
    bool,
    typer.Option(
        "--reestimate/--no-reestimate", help="batch-norm statistics anew after a cut, from the reference samples"
    ),
]

# ---------------------------------------------------------------------- a run

Steps = Annotated[int, typer.Option(min=1, help="rounds of scoring, cutting and training")]
Epochs = Annotated[int, typer.Option("--fine-tune-epochs", min=0, help="of training on all of --data, after every cut")]
LearningRate = Annotated[float, typer.Option(help="of that training")]
Distill = Annotated[
    bool, typer.Option("--distill", help="let the training follow the original's outputs, beside the labels")
]
AccuracyFloor = Annotated[
    float | None,
    typer.Option(help="least accuracy after a step, or, if negative, the largest drop; a step below is undone"),
]
Resume = Annotated[
    Path | None, typer.Option(metavar="DIR", help="folder for the state: after a kill the same command goes on")
]
Onnx = Annotated[bool, typer.Option("--onnx", help="write model.onnx as well, compared with the network")]
Baselines = Annotated[
    bool, typer.Option("--baselines/--no-baselines", help="compare with other criteria at this budget, as cut")
]
Rivals = Annotated[
    bool, typer.Option("--rivals", help="repeat the whole run, training included, with random, weight, activation")
]

# ---------------------------------------------------------------------- quantization

Method = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="ecq or ecqx (with relevance), which train; magnitude, gradient, random: controls; rtn, mse, "
        "rtn_per_channel, mse_per_channel: rounding without training",
    ),
]
Bits = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[LAYERS=]BITS",
        help="2 to 8, for all layers or by pattern, which goes before --first and --last; repeatable; default: 4",
    ),
]
Gamma = Annotated[float | None, typer.Option(help="strength of the entropy constraint; default: 0.05")]
Zeros = Annotated[float | None, typer.Option(help="share of zeros to be held, in place of --gamma")]
BitsPerWeight = Annotated[
    float | None, typer.Option("--bits-per-weight", help="entropy to be held, in place of --gamma")
]
FileGoal = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="bytes=SIZE", help="of the file, never exceeded: bytes=100KiB, in place of --gamma"
    ),
]
Trained = Annotated[int, typer.Option("--epochs", min=0, help="of training on --data; 0: assign once")]
TrainedRate = Annotated[float, typer.Option("--lr", help="largest learning rate of that training (AdamW)")]
BestBy = Annotated[
    str | None,
    typer.Option("--validation-data", metavar="DATA", help="labelled samples that choose the epoch which is kept"),
]
RelevanceAt = Annotated[
    str | None,
    typer.Option(
        "--relevance-at",
        metavar="PLACE",
        help="weights at which relevance is taken: quantized_jitter (default), background or quantized",
    ),
]
Every = Annotated[int | None, typer.Option(min=1, help="steps from one refresh of the relevance to the next")]
End = Annotated[str, typer.Option(metavar="BITS", help="of this layer: 2 to 8, float, or as for all others: same")]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="LAYER", help="name or pattern of layers that stay as they are; repeatable")
]
Collapse = Annotated[
    bool, typer.Option("--allow-collapse", help="accept a network in which a whole layer became zero, and name it")
]
Controls = Annotated[
    int, typer.Option(min=0, help="compare all methods at the bytes reached, over so many seeds; 5 for a judgement")
]
Measured = Annotated[
    bool, typer.Option("--forms/--no-forms", help="export every ONNX form, and measure size, time and accuracy of each")
]
QuantizedFile = Annotated[Path, typer.Argument(metavar="FILE", help="what compress.save or the command quantize wrote")]

# ---------------------------------------------------------------------- studies

Rates = Annotated[str, typer.Option(metavar="SHARES", help=_RATES)]
RatesAlone = Annotated[str, typer.Option("--rates", metavar="SHARES", help=f"{_RATES}, of one group at a time")]
Quantity = Annotated[str, typer.Option(metavar="NAME", help="of which: channels, macs or params")]
Draws = Annotated[int, typer.Option(min=1, help="of reference samples, the same for every criterion")]
Per = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="one row for all layers that fit, such as layer1.*; repeatable"),
]

# ---------------------------------------------------------------------- files

Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder for the results")]
MaybeOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="a .json file, or a folder for plan.json")
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="a plan.json")]
ReportFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="a report.json; or a pruned model.safetensors, to be measured")
]
Diff = Annotated[
    Path | None, typer.Option(metavar="FILE", help="another plan.json: say what that one does differently")
]
ComparisonFile = Annotated[
    Path | None,
    typer.Option(
        "--comparison", metavar="FILE", help="a comparison.json of the command compare, to stand in the report"
    ),
]
Title = Annotated[str | None, typer.Option(help="of the page")]
Json = Annotated[bool, typer.Option("--json", help="print a summary as JSON, and nothing else")]

OnnxForm = Annotated[
    str,
    typer.Option(
        "--form",
        metavar="NAME",
        help="fp32; int8 or int4: integer weights, smaller but not faster; a8w8: int8 activations too, needs --data",
    ),
]
OnnxFile = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="the .onnx file")]
JsonFile = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="a .json file for the figures")]
NetworkFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="what compress.save wrote, or weights: safetensors, .pth or .pt")
]
MeasuredFiles = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...", help="what compress.save wrote, with --model; or .onnx files, to stand side by side"
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(metavar="DATA", help=f"calibration samples for a8w8, a few hundred: {_DATA}"),
]
Original = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="of the original, before quantization; fp32 is measured on it"),
]
Force = Annotated[
    bool, typer.Option("--force", help="write a8w8 even where it names other classes than the network, or is slow")
]
Threads = Annotated[int, typer.Option(min=1, help="of onnxruntime")]
Rounds = Annotated[int, typer.Option(min=1, help="in each, all forms are timed in turns")]
Timed = Annotated[int, typer.Option("--batch", min=1, help="samples per run that is timed")]

# ---------------------------------------------------------------------- as the user typed them


@dataclass(frozen=True)
class Network:
    """The network."""

    model: str
    weights: Path | None = None
    input_shape: str | None = None
    device: str | None = None

    def read(self) -> nn.Module:
        from compress._sources import read_model

        return read_model(self.model, self.weights, self.device)

    def example(self, samples: Samples) -> Any:
        """One input: noise of the shape given, or the first sample."""
        if self.input_shape is not None:
            import torch

            from compress._pictures import parse_shape

            shape = parse_shape(self.input_shape)
            return torch.randn(1, *shape, generator=torch.Generator().manual_seed(samples.seed))
        for _, pictures in samples.sources():
            return pictures.example
        raise InputError(
            "the shape of an input is not known",
            expected="--input-shape, or samples to take it from",
            got="neither",
            fix="for example --input-shape 3,224,224",
        )


@dataclass(frozen=True)
class Samples:
    """Where samples come from."""

    data: str | None = None
    validation: str | None = None
    test: str | None = None
    per_class: int = 10
    size: str | None = None
    mean: str | None = None
    std: str | None = None
    grey: bool = False
    batch_size: int = 64
    seed: int = 0
    classes: str | None = None

    def _read(self, spec: str | None, option: str) -> Pictures | None:
        from compress._sources import read_samples

        if spec is None:
            return None
        return read_samples(spec, option, size=self.size, mean=self.mean, std=self.std, grey=self.grey)

    @cached_property
    def pictures(self) -> Pictures | None:
        return self._read(self.data, "--data")

    @cached_property
    def validating(self) -> Pictures | None:
        return self._read(self.validation, "--validation-data")

    @cached_property
    def testing(self) -> Pictures | None:
        return self._read(self.test, "--test-data")

    @property
    def steering(self) -> Pictures | None:
        """What decisions may be taken by: validation samples, or, for want of them, test samples."""
        return self.validating or self.testing

    def sources(self) -> Iterator[tuple[str, Pictures]]:
        """Those that were named, each with its option."""
        found = {"--data": self.pictures, "--validation-data": self.validating, "--test-data": self.testing}
        return ((option, pictures) for option, pictures in found.items() if pictures is not None)

    @property
    def reference(self) -> Any:
        """What channels are ranked by; None without data."""
        if self.pictures is None:
            return None
        if not self.per_class:
            return self.pictures.batches(self.batch_size)
        return self.pictures.few(self.per_class, self.seed, self.batch_size)

    @cached_property
    def given_names(self) -> list[str] | dict[int, str] | None:
        from compress._sources import read_classes

        if self.classes is None:
            return None
        if self.test is None:
            raise InputError(
                "--classes has nothing to name",
                expected="--test-data, of whose classes the report has a table",
                got="none",
                fix="name some test samples",
            )
        return read_classes(self.classes)

    def names(self, pictures: Pictures) -> Sequence[str] | dict[int, str] | None:
        """Of the classes: as the user or the data name them."""
        return self.given_names or pictures.classes or None
