"""What the commands do, apart from reading options and printing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import page
from compress._data import sample_count
from compress._results import Result
from compress._sources import Pictures, builder, parse_shape, read_model, read_pictures
from compress.comparison import BASELINES, Comparison
from compress.comparison import compare as compare_criteria
from compress.evaluation import evaluate
from compress.exporting import export_onnx
from compress.plan import PruningPlan
from compress.planning import plan_pruning
from compress.pruning import PruneResult
from compress.pruning import prune as prune_network
from compress.reporting import Report
from compress.reporting import report as report_on
from compress.schedules import Iterative, OneShot
from compress.sensitivity import sensitivity as measure_sensitivity
from compress.storage import load, save
from compress.target import Target
from compress.training import Distillation, FineTune
from lrp.errors import DataError, InputError, MissingDependencyError

__all__ = [
    "Done",
    "Network",
    "Pruning",
    "Ranked",
    "Samples",
    "apply",
    "compare",
    "plan",
    "prune",
    "report",
    "sensitivity",
]


@dataclass(frozen=True)
class Done:
    """What a command prints: lines for people, or one JSON document; and the contract that failed, if one did."""

    lines: list[str]
    summary: dict[str, Any]
    broken: str = ""


@dataclass(frozen=True)
class Network:
    """The network, as the user named it."""

    model: str
    weights: Path | None = None
    input_shape: str | None = None
    device: str | None = None

    def read(self) -> nn.Module:
        return read_model(self.model, self.weights, self.device)

    def example(self, samples: Samples) -> Any:
        """One input: noise of the shape given, or the first sample."""
        if self.input_shape is not None:
            shape = parse_shape(self.input_shape)
            return torch.randn(1, *shape, generator=torch.Generator().manual_seed(samples.seed))
        for pictures in (samples.pictures, samples.steering, samples.testing):
            if pictures is not None:
                return pictures.example
        raise InputError(
            "the shape of an input is not known",
            expected="--input-shape, or samples to take it from",
            got="neither",
            fix="for example --input-shape 3,224,224",
        )


@dataclass(frozen=True)
class Samples:
    """Where samples come from, as the user typed it."""

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

    def _read(self, spec: str | None, option: str) -> Pictures | None:
        if spec is None:
            return None
        return read_pictures(spec, size=self.size, mean=self.mean, std=self.std, grey=self.grey, option=option)

    @cached_property
    def pictures(self) -> Pictures | None:
        return self._read(self.data, "--data")

    @cached_property
    def testing(self) -> Pictures | None:
        return self._read(self.test, "--test-data")

    @cached_property
    def steering(self) -> Pictures | None:
        """What decisions may be taken by: validation samples, or, for want of them, test samples."""
        return self._read(self.validation, "--validation-data") or self.testing

    @property
    def reference(self) -> Any:
        """What channels are ranked by; None without data."""
        if self.pictures is None:
            return None
        if not self.per_class:
            return self.pictures.batches(self.batch_size)
        return self.pictures.few(self.per_class, self.seed, self.batch_size)

    def names(self, pictures: Pictures) -> tuple[str, ...] | None:
        return pictures.classes or None


@dataclass(frozen=True)
class Ranked:
    """Options of the ranking, as the user typed them."""

    criterion: str = "lrp"
    normalisation: str | None = None
    scope: str | None = None
    round_to: str | None = None
    floor: Sequence[str] = ()
    protect: Sequence[str] = ()

    def options(self) -> dict[str, Any]:
        """For plan_pruning; what was not given is left out."""
        given = {
            "normalisation": self.normalisation,
            "scope": self.scope,
            "round_to": None if self.round_to is None else _number(self.round_to),
            "floor": _floors(self.floor),
            "protect": tuple(self.protect),
        }
        return {name: value for name, value in given.items() if value is not None and value != ()}


@dataclass(frozen=True)
class Pruning:
    """Options of the command prune alone."""

    target: str
    steps: int = 1
    epochs: int = 0
    rate: float = 0.01
    distill: bool = False
    accuracy_floor: float | None = None
    resume: Path | None = None
    onnx: bool = False
    baselines: bool = True


# ---------------------------------------------------------------------- as typed


def _number(text: str) -> float | int | str:
    """A float where there is a point, an int where there are digits, else the text."""
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        return text


def _floors(given: Sequence[str]) -> Any:
    """One value for all groups, or a dictionary of patterns."""
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return _number(given[0])
    out = {}
    for text in given:
        pattern, _, value = text.rpartition("=")
        out[pattern or "*"] = _number(value)
    return out


def target_of(text: str) -> Target:
    """``macs=0.5`` as a target.

    Raises
    ------
    InputError

    Examples
    --------
    >>> target_of("macs=0.5"), target_of("bytes=300KiB")
    (Target(macs=0.5), Target(bytes='300KiB'))
    """
    kind, _, value = text.partition("=")
    if kind.strip() not in ("channels", "macs", "params", "bytes", "latency_ms") or not value.strip():
        raise InputError(
            "--target is none",
            expected="channels, macs, params, bytes or latency_ms, then =, then a share or a number with a unit",
            got=text,
            fix="for example --target macs=0.5, which keeps half of the multiply-adds",
        )
    return Target(**{kind.strip(): _number(value.strip())})


def _shares(text: str) -> tuple[float, ...]:
    found = [_number(part) for part in text.split(",")]
    if not all(isinstance(share, (int, float)) for share in found):
        raise InputError(
            "--rates are no shares", expected="numbers in [0, 1), separated by commas", got=text, fix="--rates 0.3,0.5"
        )
    return tuple(float(share) for share in found)


# ---------------------------------------------------------------------- prune


def prune(network: Network, samples: Samples, ranked: Ranked, wanted: Pruning, folder: Path) -> Done:
    """Prune, measure, write."""
    target = target_of(wanted.target)
    options = ranked.options()
    model, example = network.read(), network.example(samples)
    reference = samples.reference
    tune = _fine_tune(samples, wanted, model)
    steering = samples.steering
    if wanted.accuracy_floor is not None and steering is None:
        raise InputError(
            "--accuracy-floor needs labelled samples",
            expected="--validation-data, or --test-data",
            got="neither",
            fix="keep some labelled samples apart from --data",
        )
    with writing(folder):
        result = prune_network(
            model,
            example,
            reference,
            target=target,
            criterion=ranked.criterion,
            schedule=OneShot() if wanted.steps == 1 else Iterative(wanted.steps),
            fine_tune=tune,
            evaluate=None if steering is None else steering.batches(samples.batch_size),
            accuracy_floor=wanted.accuracy_floor,
            reestimate_batchnorm=reference is not None,
            resume=wanted.resume,
            seed=samples.seed,
            device=network.device,
            **options,
        )
        save(result.model, folder / "model.safetensors")
        result.plan.save(folder / "plan.json")
        written = ["model.safetensors", "plan.json"]
        if wanted.onnx:
            export_onnx(result.model, folder / "model.onnx", example)
            written.append("model.onnx")
        notes = []
        if wanted.accuracy_floor is not None and samples.validation is None:
            notes.append(
                "The accuracy floor was watched on the test samples themselves: the accuracy reported is a little too "
                "good for that."
            )
        found = _measured(result, network, samples, model, example, notes)
        if wanted.baselines:
            found = report_on(found, comparison=_at_budget(result, ranked, samples, model, example, network.device))
        report_on(found, folder)
    written += ["report.json", "index.html"]
    lines = [*found.sentences, f"Written to {folder}: {', '.join(written)}"]
    return Done(lines, _summary(found, folder, written), result.stopped)


def _fine_tune(samples: Samples, wanted: Pruning, model: nn.Module) -> FineTune | None:
    if not wanted.epochs:
        if wanted.distill:
            raise InputError(
                "--distill is a way of training",
                expected="--fine-tune-epochs beside it",
                got="no training",
                fix="for example --fine-tune-epochs 5",
            )
        return None
    if samples.pictures is None:
        raise InputError(
            "there is nothing to train on", expected="--data", got="none", fix="or drop --fine-tune-epochs"
        )
    return FineTune(
        samples.pictures.shuffled(samples.batch_size, samples.seed),
        epochs=wanted.epochs,
        lr=wanted.rate,
        distill=Distillation(model) if wanted.distill else None,
        seed=samples.seed,
    )


def _measured(
    result: PruneResult | nn.Module,
    network: Network,
    samples: Samples,
    original: nn.Module,
    example: Any,
    notes: Sequence[str] = (),
    title: str | None = None,
) -> Report:
    testing = samples.testing
    return report_on(
        result,
        original=original,
        example_inputs=example,
        data=None if testing is None else testing.batches(samples.batch_size),
        class_names=None if testing is None else samples.names(testing),
        notes=notes,
        title=title or f"{network.model.rpartition(':')[2]}, pruned",
        device=network.device,
    )


def _at_budget(
    result: PruneResult, ranked: Ranked, samples: Samples, model: nn.Module, example: Any, device: str | None
) -> Comparison | None:
    """Other criteria where as much of the MACs is gone; None without samples to judge or rank by."""
    steering, reference = samples.steering, samples.reference
    gone = 1 - result.reached.macs / result.before.macs
    if steering is None or reference is None or gone <= 0:
        return None
    return compare_criteria(
        model,
        example,
        reference,
        criteria=_with_baselines(ranked.criterion),
        evaluate=steering.batches(samples.batch_size),
        rates=(gone,),
        quantity="macs",
        normalisations=ranked.normalisation or "none",
        reestimate_batchnorm=True,
        scope=ranked.scope or "global",
        structure=result.plan.structure,
        seed=samples.seed,
        device=device,
    )


def _with_baselines(text: str) -> list[str]:
    return list(dict.fromkeys([part.strip() for part in text.split(",") if part.strip()] + list(BASELINES)))


def _summary(found: Report, folder: Path, written: Sequence[str]) -> dict[str, Any]:
    held = found.to_json()
    wanted = ("title", "model", "sentences", "target", "before", "after", "filters", "widths", "stopped", "notes")
    return {**{name: held[name] for name in wanted}, "folder": str(folder), "files": list(written)}


# ---------------------------------------------------------------------- plan, apply


def plan(
    network: Network, samples: Samples, ranked: Ranked, target: str, place: Path | None, diff: Path | None
) -> Done:
    """Choose, print, and write if asked to."""
    wanted, options = target_of(target), ranked.options()
    other = None if diff is None else PruningPlan.load(diff)
    model, example = network.read(), network.example(samples)
    found = plan_pruning(
        model,
        example,
        samples.reference,
        criterion=ranked.criterion,
        target=wanted,
        device=network.device,
        **options,
    )
    lines, summary = [str(found)], _told(found)
    if other is not None:
        change = found.diff(other)
        lines = [*lines, "", f"{diff} does differently:" if change else f"{diff} does the same.", *change.splitlines()]
        summary["diff"] = change.splitlines()
    if place is not None:
        file = place if place.suffix.lower() == ".json" else place / "plan.json"
        with writing(file.parent):
            found.save(file)
        lines.append(f"Written to {file}")
        summary["file"] = str(file)
    return Done(lines, summary)


def _told(found: PruningPlan) -> dict[str, Any]:
    return {
        "widths": {name: list(pair) for name, pair in found.layer_widths.items()},
        "removed": {name: list(channels) for name, channels in found.removed.items()},
        "before": found.before.to_json(),
        "after": found.after.to_json(),
        "unscored": dict(found.unscored),
        "settings": dict(found.settings),
    }


def apply(file: Path, network: Network, samples: Samples, folder: Path, onnx: bool) -> Done:
    """Cut as a plan says."""
    found = PruningPlan.load(file)
    small = found.apply(network.read())
    example = network.example(samples) if onnx else None
    written = ["model.safetensors"]
    with writing(folder):
        save(small, folder / "model.safetensors")
        if onnx:
            export_onnx(small, folder / "model.onnx", example)
            written.append("model.onnx")
    size = (folder / "model.safetensors").stat().st_size
    lines = [
        f"MACs {found.before.macs:,} -> {found.after.macs:,}, parameters {found.before.params:,} -> "
        f"{found.after.params:,}, file {size:,} bytes.",
        f"Written to {folder}: {', '.join(written)}",
    ]
    summary = {**_told(found), "file_bytes": size, "folder": str(folder), "files": written}
    return Done(lines, summary)


# ---------------------------------------------------------------------- studies


def compare(
    network: Network,
    samples: Samples,
    ranked: Ranked,
    criteria: str,
    rates: str,
    quantity: str,
    draws: int,
    folder: Path,
) -> Done:
    """Criteria at equal budgets."""
    shares, options = _shares(rates), ranked.options()
    normalisation = options.pop("normalisation", "none")
    steering, pictures = _judged_by(samples, "compare"), samples.pictures
    if pictures is None:
        raise InputError("compare needs reference samples", expected="--data", got="none", fix="name some samples")
    model, example = network.read(), network.example(samples)
    structure = None
    protect = options.pop("protect", None)
    if protect is not None:
        from compress.groups import find_groups

        structure = find_groups(model, example, protect=protect)
    found = compare_criteria(
        model,
        example,
        pictures.source,
        criteria=_with_baselines(criteria),
        evaluate=steering.batches(samples.batch_size),
        rates=shares,
        quantity=quantity,
        normalisations=normalisation,
        draws=draws,
        per_class=samples.per_class or None,
        structure=structure,
        seed=samples.seed,
        batch_size=samples.batch_size,
        device=network.device,
        **options,
    )
    return _study(found, "comparison", network, folder)


def sensitivity(
    network: Network, samples: Samples, ranked: Ranked, rates: str, per: Sequence[str], folder: Path
) -> Done:
    """What every group can lose alone."""
    shares = _shares(rates)
    steering = _judged_by(samples, "sensitivity")
    model, example = network.read(), network.example(samples)
    structure = None
    if ranked.protect:
        from compress.groups import find_groups

        structure = find_groups(model, example, protect=tuple(ranked.protect))
    found = measure_sensitivity(
        model,
        example,
        samples.reference,
        criterion=ranked.criterion,
        evaluate=steering.batches(samples.batch_size),
        rates=shares,
        per=tuple(per) or "group",
        structure=structure,
        device=network.device,
    )
    return _study(found, "sensitivity", network, folder)


def _judged_by(samples: Samples, command: str) -> Pictures:
    if samples.steering is None:
        raise InputError(
            f"{command} measures accuracy",
            expected="--validation-data, labelled samples apart from --data",
            got="none",
            fix="keep some samples apart; not those of the final test",
        )
    return samples.steering


def _study(found: Result, name: str, network: Network, folder: Path) -> Done:
    """Write one study, with a page of its own."""
    title = f"{network.model.rpartition(':')[2]}: {name}"
    with writing(folder):
        found.save(folder / f"{name}.json")
        page.write(page.render_study(title, {name: found.to_json()}), folder / "index.html")
    files = [f"{name}.json", "index.html"]
    lines = [str(found), f"Written to {folder}: {', '.join(files)}"]
    return Done(lines, {**found.to_json(), "folder": str(folder), "files": files})


# ---------------------------------------------------------------------- report


def report(file: Path, network: Network | None, samples: Samples, title: str | None, folder: Path) -> Done:
    """Write an earlier report again, or measure a pruned file."""
    if file.suffix.lower() == ".json":
        if network is not None:
            raise InputError(
                "a report that is read is not measured again",
                expected="no --model beside a report.json",
                got=network.model,
                fix="name the pruned model.safetensors to measure it",
            )
        found = Report.load(file)
        found = found if title is None else report_on(found, title=title)
    else:
        found = _of_file(file, network, samples, title)
    with writing(folder):
        report_on(found, folder)
    written = ["report.json", "index.html"]
    lines = [*found.sentences, f"Written to {folder}: {', '.join(written)}"]
    return Done(lines, _summary(found, folder, written))


def _of_file(file: Path, network: Network | None, samples: Samples, title: str | None) -> Report:
    if network is None:
        raise InputError(
            "a network is measured beside its original",
            expected="--model, and --weights of the original",
            got="none",
            fix="or name a report.json",
        )
    if not file.is_file():
        raise DataError(f"{file} is not there", expected="a file that prune or apply wrote", got="none", fix="check it")
    small = load(file, builder(network.model))
    original = network.read()
    return _measured(small, network, samples, original, network.example(samples), title=title)


# ---------------------------------------------------------------------- files


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make the folder, and say so where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"can not write into {folder}",
            expected="a folder where files can be written",
            got=error.strerror or str(error),
            fix="choose another with -o",
        ) from error
    yield
