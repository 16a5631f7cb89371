"""The terms of a pruning run: what it was asked to do, checked, and as the settings that are kept of it."""

from __future__ import annotations

import copy
import json
import warnings
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress._data import check_reiterable, device_of
from compress._order import fingerprint
from compress._progress import Folder
from compress._pruning_state import told
from compress._randomness import generators_of
from compress._reference import shared
from compress._trainer import state_of
from compress.costs import CostTable
from compress.evaluation import Evaluator, evaluator_of
from compress.groups import as_inputs
from compress.schedules import Iterative, OneShot
from compress.target import Target
from compress.training import FineTune
from lrp._distributed import place
from lrp._files import digest
from lrp.errors import InputError

__all__ = ["RANKING", "Terms"]

RANKING = ("normalisation", "reduction", "scope", "floor", "round_to")
OPTIONS = (*RANKING, "protect", "allow", "meter", "latency_cache", "scores", "structure")


def _warn_of_shared(data: Any, evaluate: Any) -> None:
    """Of samples that were ranked by and are judged by; loaders, whose order may be their state, are not read."""
    lists = isinstance(data, (list, tuple)) and isinstance(evaluate, (list, tuple))
    found = shared({"data": data, "evaluate": evaluate}) if lists or data is evaluate else None
    if found is not None and data is not None:
        warnings.warn(
            f"evaluate= and data= are not apart ({found[2]}): on samples that the choice has seen, the network looks "
            "better than it is. Keep some samples apart",
            UserWarning,
            stacklevel=4,
        )


class Terms:
    """Arguments of :func:`compress.prune`, and the network that all starts from."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        data: Any,
        *,
        target: Target,
        criterion: Any,
        schedule: Any,
        fine_tune: Any,
        evaluate: Any,
        accuracy_floor: float | None,
        reestimate_batchnorm: bool,
        reestimate_data: Any,
        resume: Any,
        seed: int,
        device: Any,
        progress: bool,
        options: dict[str, Any],
    ) -> None:
        self.data, self.target, self.criterion, self.schedule = data, target, criterion, schedule
        self.fine_tune, self.floor, self.seed, self.progress = fine_tune, accuracy_floor, seed, progress
        self.options = {name: value for name, value in options.items() if value is not None}
        self.folder = None if resume is None else Folder(resume)
        self.reestimate = reestimate_batchnorm
        self.statistics = data if reestimate_data is None else reestimate_data
        self._check(model, evaluate)
        _warn_of_shared(data, evaluate)
        self.home = device_of(model)
        self.device = device_of(model, device)
        self.base = copy.deepcopy(model).to(self.device)
        self.example = tuple(t.to(self.device) if isinstance(t, Tensor) else t for t in as_inputs(example_inputs))
        self.evaluator: Evaluator | None = evaluator_of(evaluate)
        self.generators = generators_of(data, self.statistics, getattr(fine_tune, "data", None), evaluate)
        self.settings = {} if self.folder is None else self._settings(evaluate, reestimate_data)

    def _check(self, model: nn.Module, evaluate: Any) -> None:
        unknown = [name for name in self.options if name not in OPTIONS]
        wrong: list[tuple[bool, str, str, str, str]] = [
            (bool(unknown), "prune has no such option", ", ".join(OPTIONS), ", ".join(unknown), "see plan_pruning"),
            (
                not isinstance(self.schedule, (OneShot, Iterative)),
                "schedule is of another kind",
                "OneShot() or Iterative(steps=...)",
                repr(self.schedule),
                "leave it out for one shot",
            ),
            (
                self.fine_tune is not None and not callable(self.fine_tune),
                "fine_tune can not be called",
                "a FineTune, or a function that trains a network",
                type(self.fine_tune).__name__,
                "for example FineTune(data, epochs=5)",
            ),
            (
                not isinstance(self.target, Target),
                "target is no Target",
                "compress.Target(macs=0.5) or another of its five quantities",
                repr(self.target),
                "name the quantity",
            ),
            (
                self.floor is not None
                and (
                    isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)) or self.floor != self.floor
                ),
                "accuracy_floor is no accuracy and no drop",
                "a finite number: 0.9, or -0.02 for two points less than before",
                repr(self.floor),
                "percent are hundredths here",
            ),
            (
                self.floor is not None and evaluate is None,
                "there is no accuracy to compare the floor with",
                "evaluate= beside accuracy_floor=",
                "evaluate=None",
                "pass labelled data as evaluate=",
            ),
            (
                isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0,
                "seed makes no sense",
                "an int >= 0",
                repr(self.seed),
                "for example seed=0",
            ),
            (
                self.folder is not None and place()[1] > 1,
                "several processes would write to one folder",
                "resume= in a single process",
                f"{place()[1]} processes",
                "leave resume out, or run one process",
            ),
        ]
        for bad, what, expected, got, fix in wrong:
            if bad:
                raise InputError(what, expected=expected, got=got, fix=fix)
        if self.reestimate and any(isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules()):
            if self.statistics is None:
                raise InputError(
                    "there are no data to re-estimate batch-norm statistics from",
                    expected="data= or reestimate_data=; labels are not used",
                    got="None",
                    fix="pass a few samples, or reestimate_batchnorm=False",
                )
            check_reiterable(self.statistics, "reestimate_data")
        rescored = self.schedule.rescore == "per_step" and self.schedule.steps > 1
        if self.options.get("scores") is not None and rescored:
            raise InputError(
                "given scores are of the original network, and every step scores anew",
                expected="OneShot() or Iterative(..., rescore='once') with scores=",
                got="rescore='per_step'",
                fix="leave scores= out, or rescore='once'",
            )

    def _settings(self, evaluate: Any, reestimate_data: Any) -> dict[str, Any]:
        """What a resumed run must have in common with the one before."""

        def source(value: Any) -> Any:
            batches = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
            return fingerprint(value) if batches else told(value)

        training = self.fine_tune.settings() if isinstance(self.fine_tune, FineTune) else source(self.fine_tune)
        shapes = [list(t.shape) if isinstance(t, Tensor) else str(t) for t in self.example]
        out = {
            "model": type(self.base).__name__,
            "weights": digest(state_of(self.base)),
            "frozen": [name for name, p in self.base.named_parameters() if not p.requires_grad],
            "example_inputs": shapes,
            "target": self.target.to_json(),
            "criterion": told(self.criterion),
            "schedule": self.schedule.to_json(),
            "options": {name: told(value) for name, value in self.options.items() if name != "latency_cache"},
            "fine_tune": training,
            "evaluate": source(evaluate),
            "accuracy_floor": self.floor,
            "reestimate_batchnorm": self.reestimate,
            "data": source(self.data),
            "reestimate_data": source(reestimate_data),
            "seed": self.seed,
        }
        plain: dict[str, Any] = json.loads(json.dumps(out))
        return plain

    def _size(self, table: CostTable) -> float:
        """Of the original, in the target's quantity; bytes are those of its file."""
        if self.target.kind == "bytes":
            from compress.storage import file_size

            return float(file_size(self.base))
        return float(getattr(table.costs({}), self.target.kind))

    def _file_bytes(self) -> int | None:
        """Of the original, where bytes are the target."""
        from compress.storage import file_size

        return file_size(self.base) if self.target.kind == "bytes" else None

    def _done(self, cuts: int) -> dict[str, Any]:
        """What happened to the network beside the cuts: its plan takes that with it, but for digests."""
        training = self._training
        if isinstance(training, dict):
            training = {name: value for name, value in training.items() if name not in ("data", "validation")}
            training["distill"] = training["distill"] and training["distill"][:2]
        return {
            "cuts": cuts,
            "schedule": self.schedule.to_json(),
            "fine_tune": training,
            "accuracy_floor": self.floor,
            "reestimate_batchnorm": self.reestimate,
            "seed": self.seed,
        }

    @cached_property
    def _training(self) -> dict[str, Any] | str | None:
        """Settings of a FineTune, the name of a function."""
        if self.fine_tune is None or isinstance(self.fine_tune, FineTune):
            return None if self.fine_tune is None else self.fine_tune.settings()
        return str(getattr(self.fine_tune, "__qualname__", type(self.fine_tune).__name__))
