"""Pruning from end to end: score, plan, cut, mend, train, evaluate; in one step or in several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress._network import example_of, network_of, normal_mode
from compress.class_comparison import ClassComparison, compared
from compress.costs import Costs
from compress.evaluation import Evaluation
from compress.plan import PruningPlan
from compress.schedules import Iterative, OneShot, Schedule
from compress.target import Target
from compress.training import FineTune, History

__all__ = ["Iterative", "OneShot", "PruneResult", "Step", "prune"]


@dataclass(frozen=True)
class Step:
    """One round of pruning.

    Attributes
    ----------
    number : int
        From 1.
    target : Target
        Of this step, in absolute terms but for the single step of OneShot.
    reached : Costs
        Of the network after the cut.
    cut : Evaluation or None
        After the cut and the re-estimation, before training; None without
        training or without ``evaluate``.
    after : Evaluation or None
        At the end of the step.
    training : History or None
        What :class:`compress.FineTune` returned.
    seconds : float
        Left out of comparisons.
    """

    number: int
    target: Target
    reached: Costs
    cut: Evaluation | None = None
    after: Evaluation | None = None
    training: History | None = None
    seconds: float = field(default=0.0, compare=False)

    def to_json(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            return None if value is None else value.to_json()

        held = ("target", "reached", "cut", "after", "training")
        return {"number": self.number, **{k: plain(getattr(self, k)) for k in held}, "seconds": self.seconds}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Step:
        def evaluation(key: str) -> Evaluation | None:
            return None if stored[key] is None else Evaluation.from_json(stored[key])

        training = None if stored["training"] is None else History.from_json(stored["training"])
        reached = Costs.from_json(stored["reached"])
        target = Target.from_json(stored["target"])
        number, seconds = int(stored["number"]), float(stored["seconds"])
        return cls(number, target, reached, evaluation("cut"), evaluation("after"), training, seconds)


@dataclass(frozen=True)
class PruneResult:
    """A pruned network, how it came about, and what it is worth.

    Attributes
    ----------
    model : nn.Module
        A new one, with the training flags and frozen parameters of the original.
    plan : PruningPlan
        All steps as one plan for the original network: ``plan.apply(original)``
        has the shapes of ``model``.
    before, reached : Costs
        Counted on the original and on ``model``.
    evaluation_before, evaluation : Evaluation or None
        Of the original and of ``model``.
    history : tuple of Step
        A step that was rolled back is the last one.
    stopped : str
        Why it ended before its last step, or did none; empty otherwise.
    settings : dict
        What the run depends on: JSON-able.
    meter : callable or None
        The one that was given; :func:`compress.report` times by it.
    """

    model: nn.Module = field(repr=False)
    plan: PruningPlan
    before: Costs
    reached: Costs
    evaluation_before: Evaluation | None = field(default=None, repr=False)
    evaluation: Evaluation | None = field(default=None, repr=False)
    history: tuple[Step, ...] = field(default=(), repr=False)
    stopped: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    meter: Any = field(default=None, repr=False, compare=False)

    @property
    def classes(self) -> ClassComparison | None:
        """Who was hurt; None without two evaluations on the same labelled data.

        Without p-values where the data were shuffled between them.
        """
        return compared(self.evaluation_before, self.evaluation)

    @property
    def report(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-able.

        Shares are given of all filters, and of those that can be pruned; cuts
        per layer as (before, after).
        """
        prunable = set(self.plan.structure.layers)
        widths = self.plan.layer_widths
        own = {name: pair for name, pair in widths.items() if name in prunable}

        def share(pairs: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
            total, left = (sum(pair[k] for pair in pairs.values()) for k in (0, 1))
            return {"before": total, "after": left, "removed": 1 - left / total if total else 0.0}

        classes = self.classes
        return {
            "settings": dict(self.settings),
            "target": self.settings.get("target"),
            "before": self.before.to_json(),
            "reached": self.reached.to_json(),
            "filters": {"all": share(widths), "prunable": share(own)},
            "widths": {name: list(pair) for name, pair in widths.items()},
            "groups": {name: list(pair) for name, pair in self.plan.widths.items()},
            "protected": {g.name: g.protected for g in self.plan.structure.groups if g.protected},
            "unscored": dict(self.plan.unscored),
            "evaluation": {
                "before": None if self.evaluation_before is None else self.evaluation_before.to_json(),
                "after": None if self.evaluation is None else self.evaluation.to_json(),
            },
            "classes": None if classes is None else classes.to_json(),
            "history": [step.to_json() for step in self.history],
            "stopped": self.stopped,
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = []
        rows.append(("step", "target", "channels", "MACs", "parameters", "after the cut", "after the step", "seconds"))
        start = "-" if self.evaluation_before is None else f"{self.evaluation_before.accuracy:.4f}"
        first = self.before
        rows.append(("0", "-", f"{first.channels:,}", f"{first.macs:,}", f"{first.params:,}", "-", start, "-"))
        for s in self.history:
            accuracies = ["-" if e is None else f"{e.accuracy:.4f}" for e in (s.cut, s.after)]
            ((kind, value),) = s.target.to_json().items()
            asked = f"{kind} {value:,}" if isinstance(value, int) else f"{kind} {value}"
            costs = (f"{s.reached.channels:,}", f"{s.reached.macs:,}", f"{s.reached.params:,}")
            rows.append((str(s.number), asked, *costs, *accuracies, f"{s.seconds:.1f}"))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, self.stopped] if self.stopped else lines)


def prune(
    model: nn.Module,
    example_inputs: Any,
    data: Any = None,
    *,
    target: Target,
    criterion: Any = "lrp",
    schedule: Schedule | None = None,
    fine_tune: FineTune | Callable[[nn.Module], Any] | None = None,
    evaluate: Any = None,
    accuracy_floor: float | None = None,
    reestimate_batchnorm: bool = True,
    reestimate_data: Any = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Any,
) -> PruneResult:
    """Prune a network to a budget.

    Every step scores the network as it is, removes channels down to the step's
    target, re-estimates batch-norm statistics, trains, and evaluates.

    Parameters
    ----------
    model : nn.Module
        Left as it is. Of one in a wrapper (``torch.compile``, DataParallel,
        DistributedDataParallel) the network inside is pruned: the result and
        its plan are of it, without the wrapper.
    example_inputs : Tensor or tuple
        What the model is called with.
    data : iterable of batches, optional
        Reference samples for the criterion; see :func:`compress.plan_pruning`.
    target : Target
        What may remain in the end. A network that is within it already comes
        back as it is, untrained, and ``stopped`` says so.
    criterion : str, Criterion or callable
    schedule : OneShot or Iterative, optional
        One shot where not given.
    fine_tune : FineTune or callable, optional
        Called with the pruned network after every cut; trains it in place, or
        returns the trained network. A FineTune gets another seed in each step.
        Under torch.distributed all processes make the same call, and a FineTune
        trains one network with the batches of all.
    evaluate : iterable or callable, optional
        Labelled data, or a function from a network to a number (larger is
        better); see :func:`compress.evaluation.evaluator_of`. Use data that the
        choice of criterion and floor may see, not the test set, and apart from
        ``data``: lists that are not are warned of.
    accuracy_floor : float, optional
        The smallest accuracy that is accepted after a step, or, if negative, the
        largest drop: -0.02 allows two points less than before. A step that ends
        lower is rolled back, and is the last.
    reestimate_batchnorm : bool
        See :func:`compress.batchnorm.reestimate`.
    reestimate_data : iterable of batches, optional
        For the statistics; ``data`` where not given. Labels are not used.
    resume : path, optional
        A folder for the state, made if missing. After a kill the same call goes
        on from the last finished step, a FineTune from its last finished epoch,
        a function given as ``fine_tune`` from the cut; on a CPU to the same
        bits. A finished run returns its result at once. Functions (``fine_tune``,
        ``evaluate``, a criterion, a meter) are told apart by their name and their
        own code, not by what they refer to: numbers they read from elsewhere,
        functions they call. Give one an attribute ``identity``, a string that
        changes with whatever changes what it does, or name another folder. For
        a single process: several are refused.
    seed : int
        Sets torch's, numpy's and Python's global random states within each
        step; they are put back. Generators of loaders are the caller's, and
        part of the state.
    device : torch.device or str, optional
        Where to work; the model's own if not given. The result is on the
        model's.
    progress : bool
        Bars on stderr, on a terminal only.
    **options
        Of :func:`compress.plan_pruning`: normalisation, reduction, scope, floor,
        round_to, protect, allow, meter, latency_cache, scores, structure. Floors and
        ``round_to="auto"`` are those of the original widths. ``scores`` are
        those of the original network and go with one shot or ``rescore="once"``
        only.

    Returns
    -------
    PruneResult

    Raises
    ------
    BudgetError
        Before any work, if the target can not be met, or if the network is
        below the floor already.
    InputError
        For arguments that make no sense together.
    DataError
        If another process is at work in the folder, or it can not be written
        to: a full disk leaves the state of the last finished step.
    MismatchError, FileFormatError
        If the folder holds another run (settings and weights are compared, data
        where they are a list, functions by name, code and ``identity``), or a
        damaged file. Nothing in it is changed.
    NonFiniteError, StructureError, OutputError, TargetError

    Notes
    -----
    With ``rescore="per_step"`` a step never sees scores of an earlier network;
    with "once", scores of channels that are gone are dropped with them. Cost
    of a step: scoring, one pass for the statistics, training and one or two
    evaluations; the network is traced, and its groups proved, once. The state holds two networks at most.

    Examples
    --------
    >>> import torch, compress
    >>> from compress.pruning import Iterative, prune
    >>> from compress.training import FineTune
    >>> _ = torch.manual_seed(0)
    >>> data, held = ([(x, (x[:, 0] > 0).long())] for x in torch.randn(2, 60, 4))
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> result = prune(net, data[0][0], data, target=compress.Target(macs=0.5), schedule=Iterative(steps=2),
    ...                fine_tune=FineTune(data, epochs=20, lr=0.5), evaluate=held, round_to=1)
    >>> result.plan.widths, result.reached.macs <= result.before.macs / 2, result.evaluation.accuracy > 0.9
    ({'0': (16, 8)}, True, True)
    """
    from compress._pruning_run import Run

    with normal_mode():
        return Run(
            network_of(model),
            example_of(example_inputs),
            data,
            target=target,
            criterion=criterion,
            schedule=OneShot() if schedule is None else schedule,
            fine_tune=fine_tune,
            evaluate=evaluate,
            accuracy_floor=accuracy_floor,
            reestimate_batchnorm=reestimate_batchnorm,
            reestimate_data=reestimate_data,
            resume=resume,
            seed=seed,
            device=device,
            progress=progress,
            options=options,
        ).run()
