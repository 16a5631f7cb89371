"""The commands compare and sensitivity: studies, each with a page of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compress import page
from compress._commands import Done, with_baselines, writing
from compress._pictures import Pictures
from compress._results import Result
from compress._sources import opened, uses_labels
from compress.comparison import compare as compare_criteria
from compress.groups import Structure, find_groups
from compress.ranking import Ranking
from compress.sensitivity import sensitivity as measure_sensitivity
from lrp.errors import InputError

if TYPE_CHECKING:
    from compress._options import Network, Samples
    from compress._requests import Ranked

__all__ = ["compare", "sensitivity"]


def compare(
    network: Network,
    samples: Samples,
    ranked: Ranked,
    shares: tuple[float, ...],
    quantity: str,
    draws: int,
    folder: Path,
) -> Done:
    """Criteria at equal budgets."""
    options, criteria = ranked.options(), ranked.scorers
    normalisation = options.pop("normalisation", Ranking.normalisation)
    steering, pictures = _judged_by(samples, "compare"), samples.pictures
    if pictures is None:
        raise InputError("compare needs reference samples", expected="--data", got="none", fix="name some samples")
    model, example = opened(network, samples, labelled=uses_labels(criteria))
    structure = _protected(model, example, options.pop("protect", ()))
    with writing(folder):
        found = compare_criteria(
            model,
            example,
            pictures.source,
            criteria=with_baselines(criteria),
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
    network: Network,
    samples: Samples,
    ranked: Ranked,
    shares: tuple[float, ...],
    per: Sequence[str],
    folder: Path,
) -> Done:
    """What every group can lose alone."""
    criterion = ranked.scorer
    steering = _judged_by(samples, "sensitivity")
    model, example = opened(network, samples, labelled=uses_labels([criterion]))
    with writing(folder):
        found = measure_sensitivity(
            model,
            example,
            samples.reference,
            criterion=criterion,
            evaluate=steering.batches(samples.batch_size),
            rates=shares,
            per=tuple(per) or "group",
            structure=_protected(model, example, ranked.protect),
            device=network.device,
        )
        return _study(found, "sensitivity", network, folder)


def _protected(model: nn.Module, example: Any, layers: Sequence[str]) -> Structure | None:
    """The groups, if the user protects some."""
    return find_groups(model, example, protect=tuple(layers)) if layers else None


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
    found.save(folder / f"{name}.json")
    page.write(page.render_study(title, {name: found.to_json()}), folder / "index.html")
    files = [f"{name}.json", "index.html"]
    lines = [str(found), f"Written to {folder}: {', '.join(files)}"]
    return Done(lines, {**found.to_json(), "folder": str(folder), "files": files})
