"""What the commands do, apart from reading options and printing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress._sources import builder, explaining, opened, read_meter, uses_labels
from compress.batchnorm import reestimate as reestimate_batchnorm
from compress.comparison import BASELINES, Comparison
from compress.comparison import compare as compare_criteria
from compress.exporting import export_onnx
from compress.meters import milliseconds
from compress.plan import PruningPlan
from compress.planning import plan_pruning
from compress.pruning import PruneResult
from compress.pruning import prune as prune_network
from compress.quantization_report import QuantizationReport
from compress.ranking import Ranking
from compress.reporting import Report
from compress.reporting import report as report_on
from compress.schedules import Iterative, OneShot
from compress.storage import load, save
from compress.target import Target
from compress.training import Distillation, FineTune
from lrp.errors import DataError, FileFormatError, InputError, LRPError

if TYPE_CHECKING:
    from compress._options import Network, Samples
    from compress._requests import Pruning, Ranked, Training

__all__ = ["Done", "apply", "kept", "plan", "prune", "report", "with_baselines", "writing"]


@dataclass(frozen=True)
class Done:
    """What a command prints: lines for people, or one JSON document; and the contract that failed, if one did."""

    lines: list[str]
    summary: dict[str, Any]
    broken: str = ""


# ---------------------------------------------------------------------- prune


def prune(network: Network, samples: Samples, ranked: Ranked, wanted: Pruning, folder: Path) -> Done:
    """Prune, measure, write."""
    options, criterion = ranked.options(), ranked.scorer
    labelled = uses_labels([criterion]) or wanted.training.epochs > 0
    model, example = opened(network, samples, labelled=labelled)
    reference, steering = samples.reference, samples.steering
    _fine_tune(samples, wanted.training, model)  # refused before any work
    if wanted.training.accuracy_floor is not None and steering is None:
        raise InputError(
            "--accuracy-floor needs labelled samples",
            expected="--validation-data, or --test-data",
            got="neither",
            fix="keep some labelled samples apart from --data",
        )

    def run(criterion: Any, resume: Path | None) -> PruneResult:
        return prune_network(
            model,
            example,
            reference,
            target=wanted.target,
            criterion=criterion,
            schedule=OneShot() if wanted.steps == 1 else Iterative(wanted.steps),
            fine_tune=_fine_tune(samples, wanted.training, model),
            evaluate=None if steering is None else steering.batches(samples.batch_size),
            accuracy_floor=wanted.training.accuracy_floor,
            reestimate_batchnorm=wanted.training.reestimate and reference is not None,
            resume=resume,
            seed=samples.seed,
            device=network.device,
            **options,
        )

    notes = []
    if wanted.training.accuracy_floor is not None and samples.validation is None:
        notes.append(
            "The accuracy floor was watched on the test samples themselves: the accuracy reported is a little too "
            "good for that."
        )
    with writing(folder):
        if wanted.onnx or ranked.clock is not None:
            _try_out(model, example, ranked.clock)
        result = run(criterion, wanted.resume)
        save(result.model, folder / "model.safetensors")
        result.plan.save(folder / "plan.json")
        written = ["model.safetensors", "plan.json"]
        with kept(folder, written):
            if wanted.onnx:
                export_onnx(result.model, folder / "model.onnx", example)
                written.append("model.onnx")
            others = {}
            if wanted.rivals and reference is not None:
                others = {name: run(name, None) for name in BASELINES if name != criterion}
            found = _measured(result, network, samples, model, example, ranked.clock, notes, others)
            if wanted.baselines:
                budget = _at_budget(result, ranked, samples, wanted.training.reestimate, model, example, network.device)
                found = report_on(found, comparison=budget)
            report_on(found, folder)
    written += ["report.json", "index.html"]
    lines = [*found.sentences, f"Written to {folder}: {', '.join(written)}"]
    return Done(lines, _summary(found, folder, written), "" if found.met else result.stopped)


def _try_out(model: nn.Module, example: Any, meter: Callable[[Path], float] | None) -> None:
    """Export the original, and time it: what would fail at the end of a long run is known at its start."""
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "model.onnx", example)
        if meter is not None:
            milliseconds(meter, path)


def _fine_tune(samples: Samples, wanted: Training, model: nn.Module) -> FineTune | None:
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
    meter: Callable[[Path], float] | None,
    notes: Sequence[str] = (),
    rivals: Mapping[str, PruneResult] | None = None,
    title: str | None = None,
) -> Report:
    testing = samples.testing
    return report_on(
        result,
        original=original,
        example_inputs=example,
        data=None if testing is None else testing.batches(samples.batch_size),
        class_names=None if testing is None else samples.names(testing),
        meter=meter or "auto",
        notes=notes,
        rivals=rivals,
        title=title,
        device=network.device,
    )


def _at_budget(
    result: PruneResult,
    ranked: Ranked,
    samples: Samples,
    again: bool,
    model: nn.Module,
    example: Any,
    device: str | None,
) -> Comparison | None:
    """Other criteria where as much of the MACs is gone, ranked as the run was; None without samples for it."""
    steering, reference = samples.steering, samples.reference
    gone = 1 - result.reached.macs / result.before.macs
    if steering is None or reference is None or gone <= 0:
        return None
    ranking = Ranking.from_json(result.plan.settings["ranking"])
    return compare_criteria(
        model,
        example,
        reference,
        criteria=with_baselines([ranked.scorer]),
        evaluate=steering.batches(samples.batch_size),
        rates=(gone,),
        quantity="macs",
        normalisations=ranking.normalisation,
        reestimate_batchnorm=again,
        reduction=ranking.reduction,
        scope=ranking.scope,
        floor=ranking.floor,
        round_to=ranking.round_to,
        structure=result.plan.structure,
        seed=samples.seed,
        device=device,
    )


def with_baselines(criteria: Sequence[Any]) -> list[Any]:
    return [*criteria, *(name for name in BASELINES if name not in criteria)]


def _summary(found: Report, folder: Path, written: Sequence[str]) -> dict[str, Any]:
    held = found.to_json()
    wanted = ("title", "model", "sentences", "target", "before", "after", "filters", "widths", "stopped", "notes")
    return {**{name: held[name] for name in wanted if name in held}, "folder": str(folder), "files": list(written)}


# ---------------------------------------------------------------------- plan, apply


def plan(
    network: Network, samples: Samples, ranked: Ranked, target: Target, place: Path | None, diff: Path | None
) -> Done:
    """Choose, print, and write if asked to."""
    options = ranked.options()
    if ranked.meter is not None and target.kind != "latency_ms":
        raise InputError(
            "--meter has nothing to measure",
            expected="a target of latency_ms beside it",
            got=str(target),
            fix="leave it out, or give it to prune or report, which measure the network that is left",
        )
    other = None if diff is None else PruningPlan.load(diff)
    file = place if place is None or place.suffix.lower() == ".json" else place / "plan.json"
    with nullcontext() if file is None else writing(file.parent):
        model, example = opened(network, samples, labelled=uses_labels([ranked.scorer]))
        found = plan_pruning(
            model,
            example,
            samples.reference,
            criterion=ranked.scorer,
            target=target,
            device=network.device,
            **options,
        )
        if file is not None:
            found.save(file)
    lines, summary = [str(found)], _told(found)
    if other is not None:
        change = found.diff(other)
        lines = [*lines, "", f"{diff} does differently:" if change else f"{diff} does the same.", *change.splitlines()]
        summary["diff"] = change.splitlines()
    if file is not None:
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


def apply(file: Path, network: Network, samples: Samples, folder: Path, onnx: bool, reestimate: bool) -> Done:
    """Cut as a plan says."""
    found = PruningPlan.load(file)
    model, example = opened(network, samples, onnx)
    small = found.apply(model)
    reference = samples.reference if reestimate else None
    notes = []
    if reference is not None:
        small = reestimate_batchnorm(small, reference, device=network.device)
    elif any(isinstance(m, _BatchNorm) and m.track_running_stats for m in small.modules()):
        notes = ["The batch-norm statistics are those of the original; --data re-estimates them."]
    written = ["model.safetensors"]
    with writing(folder):
        if onnx:
            export_onnx(small, folder / "model.onnx", example)  # first: what it refuses leaves nothing behind
            written.append("model.onnx")
        save(small, folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    lines = [
        f"MACs {found.before.macs:,} -> {found.after.macs:,}, parameters {found.before.params:,} -> "
        f"{found.after.params:,}, file {size:,} bytes.",
        *notes,
        f"Written to {folder}: {', '.join(written)}",
    ]
    told = {"reestimated": reference is not None, "file_bytes": size, "folder": str(folder), "files": written}
    return Done(lines, {**_told(found), **told})


# ---------------------------------------------------------------------- report


def report(
    file: Path,
    network: Network | None,
    samples: Samples,
    meter: str | None,
    title: str | None,
    folder: Path,
    comparison: Path | None = None,
) -> Done:
    """Write an earlier report again, or measure a pruned file."""
    if comparison is not None and not comparison.is_file():
        raise DataError(
            f"--comparison {comparison} is not there",
            expected="a comparison.json that the command compare wrote",
            got="none",
            fix="check the path",
        )
    beside: dict[str, Any] = {} if comparison is None else {"comparison": Comparison.load(comparison)}
    if file.suffix.lower() == ".json":
        given = {
            "--model": None if network is None else network.model,
            "--test-data": samples.test,
            "--classes": samples.classes,
            "--meter": meter,
        }
        surplus = [f"{option} {value}" for option, value in given.items() if value is not None]
        if surplus:
            raise InputError(
                "a report that is read is not measured again",
                expected="none of --model, --test-data, --classes and --meter beside a report.json",
                got=", ".join(surplus),
                fix="name the pruned model.safetensors to measure it",
            )
        found = report_on(_stored(file), title=title, **beside)
        with writing(folder):
            report_on(found, folder)
    else:
        with writing(folder):
            found = report_on(_of_file(file, network, samples, meter, title), **beside)
            report_on(found, folder)
    written = ["report.json", "index.html"]
    lines = [*found.sentences, f"Written to {folder}: {', '.join(written)}"]
    return Done(lines, _summary(found, folder, written))


def _stored(file: Path) -> Any:
    """A report of either kind."""
    try:
        return Report.load(file)
    except FileFormatError as error:
        if QuantizationReport.FORMAT not in error.got:
            raise
    return QuantizationReport.load(file)


def _of_file(file: Path, network: Network | None, samples: Samples, meter: str | None, title: str | None) -> Report:
    if network is None:
        raise InputError(
            "a network is measured beside its original",
            expected="--model, and --weights of the original",
            got="none",
            fix="or name a report.json",
        )
    if not file.is_file():
        raise DataError(f"{file} is not there", expected="a file that prune or apply wrote", got="none", fix="check it")
    clock = read_meter(meter)
    original, example = opened(network, samples)
    small = load(file, builder(network.model))
    return _measured(small, network, samples, original, example, clock, title=title)


# ---------------------------------------------------------------------- files


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The folder, made, and found fit for writing; where nothing comes of it, it is gone again.

    Raises
    ------
    DataError
        At the start, if nothing can be written there.
    """
    made: list[Path] = []
    try:
        try:
            made = [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise DataError(
                f"can not write into {folder}",
                expected="a folder where files can be written",
                got=error.strerror or str(error),
                fix="choose another with -o",
            ) from error
        yield
    except BaseException:
        with suppress(OSError):  # one that is not empty stays, and so do those above it
            for place in made:
                place.rmdir()
        raise


@contextmanager
def kept(folder: Path, written: Sequence[str]) -> Iterator[None]:
    """Errors say which files of a long run are there all the same."""
    try:
        with explaining():
            yield
    except LRPError as error:
        there = f"{', '.join(written)} of this run are complete, in {folder}"
        fix = f"{error.fix}; {there}" if error.fix else there
        raise type(error)(error.what, expected=error.expected, got=error.got, fix=fix) from error
