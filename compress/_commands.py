"""What the commands do, apart from reading options and printing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compress import page
from compress._options import Network, Pruning, Ranked, Samples, shares_of, target_of
from compress._pictures import Pictures
from compress._results import Result
from compress._sources import builder
from compress.comparison import BASELINES, Comparison
from compress.comparison import compare as compare_criteria
from compress.exporting import export_onnx
from compress.plan import PruningPlan
from compress.planning import plan_pruning
from compress.pruning import PruneResult
from compress.pruning import prune as prune_network
from compress.ranking import Ranking
from compress.reporting import Report
from compress.reporting import report as report_on
from compress.schedules import Iterative, OneShot
from compress.sensitivity import sensitivity as measure_sensitivity
from compress.storage import load, save
from compress.training import Distillation, FineTune
from lrp.errors import DataError, InputError

__all__ = ["Done", "apply", "compare", "plan", "prune", "report", "sensitivity"]


@dataclass(frozen=True)
class Done:
    """What a command prints: lines for people, or one JSON document; and the contract that failed, if one did."""

    lines: list[str]
    summary: dict[str, Any]
    broken: str = ""


# ---------------------------------------------------------------------- prune


def prune(network: Network, samples: Samples, ranked: Ranked, wanted: Pruning, folder: Path) -> Done:
    """Prune, measure, write."""
    target = target_of(wanted.target)
    options = ranked.options()
    model, example = network.read(), network.example(samples)
    reference = samples.reference
    _fine_tune(samples, wanted, model)  # refused before any work
    steering = samples.steering
    if wanted.accuracy_floor is not None and steering is None:
        raise InputError(
            "--accuracy-floor needs labelled samples",
            expected="--validation-data, or --test-data",
            got="neither",
            fix="keep some labelled samples apart from --data",
        )

    def run(criterion: str, resume: Path | None) -> PruneResult:
        return prune_network(
            model,
            example,
            reference,
            target=target,
            criterion=criterion,
            schedule=OneShot() if wanted.steps == 1 else Iterative(wanted.steps),
            fine_tune=_fine_tune(samples, wanted, model),
            evaluate=None if steering is None else steering.batches(samples.batch_size),
            accuracy_floor=wanted.accuracy_floor,
            reestimate_batchnorm=reference is not None,
            resume=resume,
            seed=samples.seed,
            device=network.device,
            **options,
        )

    with writing(folder):
        result = run(ranked.criterion, wanted.resume)
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
        others = {}
        if wanted.rivals and reference is not None:
            others = {name: run(name, None) for name in BASELINES if name != ranked.criterion}
        found = _measured(result, network, samples, model, example, notes, others)
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
        notes=notes,
        rivals=rivals,
        title=title,
        device=network.device,
    )


def _at_budget(
    result: PruneResult, ranked: Ranked, samples: Samples, model: nn.Module, example: Any, device: str | None
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
        criteria=_with_baselines(ranked.criterion),
        evaluate=steering.batches(samples.batch_size),
        rates=(gone,),
        quantity="macs",
        normalisations=ranking.normalisation,
        reestimate_batchnorm=True,
        reduction=ranking.reduction,
        scope=ranking.scope,
        floor=ranking.floor,
        round_to=ranking.round_to,
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
    shares, options = shares_of(rates), ranked.options()
    normalisation = options.pop("normalisation", Ranking().normalisation)
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
    shares = shares_of(rates)
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
    title = f"{network.model}: {name}"
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
