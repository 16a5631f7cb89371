r"""Ways to quantize at equal bytes: does relevance help here, or would something simpler have done?

All methods start from one network, are trained alike and are held to one rate,
each over several seeds, which decide the order of the samples (and the
permutation of ``"random"``). Two methods are compared seed by seed: with
:math:`d_s` the difference of their accuracies under seed s, the mean over seeds
has a 95 % interval by a bootstrap over the seeds. At equal gamma nothing is
compared: one gamma leads to other bytes with every method.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from compress._cells import opened, weights_of
from compress._quantizer_runs import SEEDS, Run, as_json, checked_seeds, fingerprint, goal_of, run_of, training_of
from compress._reference import asked_with
from compress._results import Result, aligned, as_markdown, mean_interval
from compress._sentences import percent
from compress.evaluation import evaluator_of
from compress.quantizer import METHODS
from compress.rate import Rate
from compress.target import Target
from compress.training import FineTune
from lrp.errors import InputError

__all__ = ["Difference", "QuantizerComparison", "Run", "compare_quantizers"]

_EVEN = 0.01  # bytes that differ by more are not equal


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method less that of another, over the seeds that both finished.

    Attributes
    ----------
    first, second : str
    mean, low, high : float
        And the ends of its 95 % interval.
    seeds : int
    """

    first: str
    second: str
    mean: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> str:
        """ "ahead", "behind" or "not told apart"; of a single seed nothing can be told."""
        if self.seeds < 2 or self.low <= 0 <= self.high:
            return "not told apart"
        return "ahead" if self.low > 0 else "behind"

    def __str__(self) -> str:
        interval = "" if self.seeds < 2 else f" [{100 * self.low:+z.2f}, {100 * self.high:+z.2f}]"
        told = f"{self.first} less {self.second}: {100 * self.mean:+z.2f}{interval} points over {self.seeds} seeds"
        return f"{told}, {self.verdict}"


@dataclass(frozen=True, repr=False)
class QuantizerComparison(Result):
    """Accuracy of several methods at one rate; prints as a table with paired differences.

    Attributes
    ----------
    runs : tuple of Run
        All of them, those that failed or collapsed included.
    goal : str
        What all were held to.
    baseline : float
        Accuracy before quantization.
    count : int
        Samples it was measured on; 0 where a user's function was asked.
    settings : dict

    Examples
    --------
    See :func:`compare_quantizers`.
    """

    FORMAT: ClassVar[str] = "compress.QuantizerComparison"

    runs: tuple[Run, ...]
    goal: str
    baseline: float
    count: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.method for run in self.runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def pilot(self) -> bool:
        """Whether there are too few seeds for a judgement: fewer than five."""
        return len(self.seeds) < SEEDS

    def of(self, method: str) -> tuple[Run, ...]:
        """The runs of a method that ended, by seed."""
        return tuple(run for run in self.runs if run.method == method and run.accuracy is not None)

    def mean(self, method: str, what: str = "accuracy") -> float | None:
        """Mean over the seeds of ``accuracy``, ``bytes``, ``zeros`` or ``bits_per_weight``; None without a run."""
        found = [float(getattr(run, what)) for run in self.of(method)]
        return statistics.fmean(found) if found else None

    def difference(self, first: str, second: str) -> Difference | None:
        """Of two methods, seed by seed; None where no seed has both.

        Raises
        ------
        InputError
            For a method that is not in this comparison.
        """
        missing = [name for name in (first, second) if name not in self.methods]
        if missing:
            raise InputError(
                f"'{missing[0]}' was not compared",
                expected=f"one of {', '.join(self.methods)}",
                got=repr(missing[0]),
                fix="name it in methods=",
            )
        other = {run.seed: run.accuracy for run in self.of(second)}
        pairs = [(run.accuracy, other[run.seed]) for run in self.of(first) if run.seed in other]
        if not pairs:
            return None
        gaps = np.array([float(a or 0.0) - float(b or 0.0) for a, b in pairs])
        low, high = mean_interval(gaps)
        return Difference(first, second, float(gaps.mean()), low, high, len(gaps))

    @property
    def reference(self) -> str:
        """What the others are compared with: "ecq", which has no relevance, or the first."""
        return "ecq" if "ecq" in self.methods else self.methods[0]

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Of every method against the reference, then of "ecqx" against the other controls."""
        pairs = [(name, self.reference) for name in self.methods if name != self.reference]
        if "ecqx" in self.methods and self.reference != "ecqx":
            pairs += [("ecqx", name) for name in self.methods if name not in ("ecqx", self.reference)]
        return tuple(found for pair in pairs if (found := self.difference(*pair)) is not None)

    @property
    def spread(self) -> float:
        """Largest mean bytes over smallest, less 1: how far the budgets are from equal."""
        sizes = [size for name in self.methods if (size := self.mean(name, "bytes")) is not None]
        return max(sizes) / min(sizes) - 1 if sizes else 0.0

    def verdict(self) -> list[str]:
        """What the runs say, in sentences."""
        who = "In this pilot" if self.pilot else "At equal bytes"
        out = []
        for d in self.differences:
            interval = "" if d.seeds < 2 else f", 95 % interval {100 * d.low:+z.2f} to {100 * d.high:+z.2f}"
            seeds = f"{d.seeds} seed{'s' if d.seeds > 1 else ''}"
            verb = {"ahead": "is ahead of", "behind": "is behind"}.get(d.verdict, "is not told apart from")
            out.append(f"{who} {d.first} {verb} {d.second}: {100 * d.mean:+z.2f} points over {seeds}{interval}.")
        if self.pilot:
            few = f"{len(self.seeds)} seed{'s are' if len(self.seeds) > 1 else ' is'}"
            out.append(f"{few[:1].upper()}{few[1:]} a pilot: at least {SEEDS} are needed for a judgement.")
        if self.spread > _EVEN:
            out.append(f"Budgets are not equal: the files differ by up to {100 * self.spread:.1f} %.")
        failed = [run for run in self.runs if run.accuracy is None]
        if failed:
            named = ", ".join(f"{run.method} under seed {run.seed} ({run.error})" for run in failed)
            out.append(f"{len(failed)} of {len(self.runs)} runs failed: {named}.")
        gone = [run for run in self.runs if run.collapsed]
        if gone:
            named = ", ".join(f"{run.method} under seed {run.seed}" for run in gone)
            out.append(f"With a tensor that is zero throughout: {named}.")
        return out

    def rows(self) -> list[tuple[str, ...]]:
        """The table, best method first, with its head."""
        head = ("method", "accuracy", "seeds", "bytes", "zeros", "bits per weight")
        order = sorted(self.methods, key=lambda name: -(self.mean(name) or -1.0))
        out: list[tuple[str, ...]] = [head]
        for name in order:
            runs = self.of(name)
            if not runs:
                out.append((name, "failed", "0", "-", "-", "-"))
                continue
            found = [float(run.accuracy or 0.0) for run in runs]
            error = f" ± {100 * statistics.stdev(found) / len(found) ** 0.5:.2f}" if len(found) > 1 else ""
            size, zeros, bits = (self.mean(name, what) or 0.0 for what in ("bytes", "zeros", "bits_per_weight"))
            shown = f"{100 * statistics.fmean(found):.2f} %{error}"
            out.append((name, shown, str(len(runs)), f"{size:,.0f}", percent(zeros), f"{bits:.3f}"))
        return out

    def to_markdown(self) -> str:
        return as_markdown(self.rows())

    # -- keeping ------------------------------------------------------------
    def _told(self) -> str:
        return f"{', '.join(self.methods)} at {self.goal}, {len(self.seeds)} seeds{', pilot' if self.pilot else ''}"

    def _held(self) -> dict[str, Any]:
        return {
            "runs": [run.to_json() for run in self.runs],
            "goal": self.goal,
            "baseline": self.baseline,
            "count": self.count,
            "pilot": self.pilot,  # these two for other readers
            "differences": [vars(d) for d in self.differences],
            "settings": dict(self.settings),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> QuantizerComparison:
        runs = tuple(Run.from_json(row) for row in stored["runs"])
        if not runs:
            raise ValueError("no runs")
        return cls(runs, str(stored["goal"]), float(stored["baseline"]), int(stored["count"]), dict(stored["settings"]))

    def __str__(self) -> str:
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}{' (a pilot)' if self.pilot else ''}"
        samples = f"{self.count:,} samples, " if self.count else ""
        head = f"{self.goal}, {seeds}; {samples}{100 * self.baseline:.2f} % before; ± is a standard error over seeds"
        return "\n".join([head, aligned(self.rows()), *self.verdict()])


def compare_quantizers(
    model: nn.Module,
    data: Any,
    *,
    evaluate: Any,
    methods: Sequence[str] = METHODS,
    seeds: int | Sequence[int] = SEEDS,
    rate: Rate | None = None,
    target: Target | None = None,
    train: FineTune | Callable[[int], FineTune] | None = None,
    resume: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Any,
) -> QuantizerComparison:
    """Quantize by several methods to one rate, over several seeds, and compare them seed by seed.

    Parameters
    ----------
    model : nn.Module
        Left as it is; the start of every run.
    data
        Training samples, as in :func:`compress.quantize`.
    evaluate : data or callable
        What accuracy is measured on: samples that no run is trained on or
        stopped by.
    methods : sequence of str
        Of "ecq", "ecqx", "magnitude", "gradient", "random".
    seeds : int or sequence of int
        How many, or which. Fewer than five make a pilot.
    rate : Rate, optional
        ``Rate(bits_per_weight=1.0)``: equal entropy, and so equal bytes up to
        what the coder makes of it.
    target : Target, optional
        ``Target(bytes="20KiB")``, of the file; one of the two.
    train : FineTune or callable, optional
        As in :func:`compress.quantize`; its seed is replaced. A DataLoader has
        an order of its own: for that pass a function of the seed that makes the
        training, so that all methods see the same order.
    resume : path, optional
        A file for finished runs; later calls with more methods or seeds only
        make what is new.
    device, progress
    **options
        Further options of :func:`compress.quantize`, the same for all: bits,
        first, last, levels, step, ...; relevance (as settings) and zero_cost for
        all but "ecq".

    Returns
    -------
    QuantizerComparison

    Raises
    ------
    InputError
        Without a rate or target, or for methods that do not train.
    MismatchError
        If ``resume`` is of other weights, data or settings.

    Notes
    -----
    Cost: methods times seeds trainings. A run that fails or collapses is kept
    and named. All seeds start from one network, so that intervals say nothing
    about another one.

    Examples
    --------
    >>> import torch, compress
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> x = torch.randn(128, 2)
    >>> y = (x[:, 0] > 0).long()
    >>> found = compress.compare_quantizers(net, (x, y), evaluate=[(x, y)], methods=("ecq", "magnitude"), seeds=2,
    ...                                     rate=compress.Rate(zeros=0.6), first=None, last=None, bits=3)
    >>> found.methods, found.pilot, found.mean("ecq", "zeros") >= 0.6
    (('ecq', 'magnitude'), True, True)
    """
    from tqdm import tqdm

    chosen = checked_seeds(methods, seeds, rate, target, train, options)
    judge = evaluator_of(evaluate, device=device)
    if judge is None:
        raise InputError(
            "there is nothing to compare by",
            expected="evaluate=, labelled samples that no run is trained on",
            got="None",
            fix="keep some samples apart",
        )
    goal = goal_of(rate, target)
    plain = {"rate": None if rate is None else rate.settings(), "target": None if target is None else target.to_json()}
    settings = {**plain, "options": {name: as_json(value) for name, value in options.items()}}
    settings["train"] = None if train is None else training_of(train, 0).settings()
    identity: dict[str, Any] = {}
    if resume is not None:
        identity = {**weights_of(model), "data": fingerprint(data), "evaluate": asked_with(evaluate)}
    with opened(resume, "quantizers", {**identity, **settings}) as cells:

        def before() -> dict[str, Any]:
            found = judge(model)
            return {"accuracy": found.accuracy, "count": found.count}

        unquantized = cells.value(["unquantized"], before)
        pairs = [(method, seed) for seed in chosen for method in methods]
        runs = []
        for method, seed in tqdm(pairs, desc="quantizers", unit="run", disable=None if progress else True):

            def run(method: str = method, seed: int = seed) -> dict[str, Any]:
                tuned = None if train is None else training_of(train, seed)
                wanted = {"rate": rate, "target": target, "train": tuned, "seed": seed, "device": device}
                return run_of(model, data, method, evaluate, {**options, **wanted}).to_json()

            runs.append(Run.from_json(cells.value([method, seed], run)))
    order = {name: k for k, name in enumerate(methods)}
    runs.sort(key=lambda run: (order[run.method], run.seed))
    return QuantizerComparison(
        tuple(runs), goal, float(unquantized["accuracy"]), int(unquantized["count"]), {**settings, "seeds": chosen}
    )
