"""Quantization from end to end: choose the levels, train with them, hold a rate, evaluate."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress._network import network_of, normal_mode
from compress.class_comparison import ClassComparison, compared
from compress.evaluation import Evaluation
from compress.quantization_plan import QuantizationPlan
from compress.quantizer import METHODS, State
from compress.rate import Rate
from compress.rounding import ROUNDING
from compress.target import Target
from compress.training import FineTune, History
from compress.weight_relevance import WeightRelevance
from compress.zero_cost import ZeroCost

__all__ = ["KNOWN", "QuantizeResult", "Reached", "quantize"]

KNOWN = (*METHODS, *ROUNDING)


@dataclass(frozen=True)
class Reached:
    """What a quantized network takes.

    Attributes
    ----------
    bytes : int
        Of the file that :func:`compress.save` writes.
    zeros : float
        Share of zeros among the quantized weights.
    bits_per_weight : float
        Entropy of their levels.
    weights : int
        How many are quantized.
    """

    bytes: int
    zeros: float
    bits_per_weight: float
    weights: int

    @classmethod
    def of(cls, model: nn.Module, plan: QuantizationPlan) -> Reached:
        """Of a network that carries the plan."""
        from compress.storage import file_size

        rows = plan.statistics(model).values()
        weights = int(sum(row["weights"] for row in rows))
        zeros, bits = (sum(row[key] * row["weights"] for row in rows) / weights for key in ("zeros", "entropy"))
        return cls(file_size(model), zeros, bits, weights)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class QuantizeResult:
    """A quantized network, how it came about, and what it is worth.

    Attributes
    ----------
    model : nn.Module
        A new one, whose weights lie on the levels of ``plan``.
    plan : QuantizationPlan
    before : int
        Bytes of the original network's file.
    reached : Reached
    evaluation_before, evaluation : Evaluation or None
        Of the original and of ``model``.
    states : dict of str to State
        How each tensor stands; empty for the post-training methods.
    training : History or None
    gamma : float or None
        At the end: found, where a rate was to be held.
    collapsed : tuple of str
        Tensors that became zero throughout.
    settings : dict
        What the run depends on: JSON-able.
    """

    model: nn.Module = field(repr=False)
    plan: QuantizationPlan = field(repr=False)
    before: int
    reached: Reached
    evaluation_before: Evaluation | None = field(default=None, repr=False)
    evaluation: Evaluation | None = field(default=None, repr=False)
    states: Mapping[str, State] = field(default_factory=dict, repr=False)
    training: History | None = field(default=None, repr=False)
    gamma: float | None = None
    collapsed: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> ClassComparison | None:
        """Who was hurt; None without two evaluations on the same labelled data."""
        return compared(self.evaluation_before, self.evaluation)

    @property
    def report(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-able."""
        found = self.plan.statistics(self.model)
        tensors = {}
        for name, row in found.items():
            state = self.states.get(name)
            tensors[name] = {**row, "codebook": str(self.plan.codebooks[name])}
            if state is not None:
                tensors[name] |= {k: v for k, v in vars(state).items() if k != "zeros"}
        classes = self.classes
        return {
            "settings": dict(self.settings),
            "bytes": {"before": self.before, "after": self.reached.bytes},
            "reached": self.reached.to_json(),
            "tensors": tensors,
            "left_out": dict(self.plan.left_out),
            "collapsed": list(self.collapsed),
            "gamma": self.gamma,
            "training": None if self.training is None else self.training.to_json(),
            "evaluation": {
                "before": None if self.evaluation_before is None else self.evaluation_before.to_json(),
                "after": None if self.evaluation is None else self.evaluation.to_json(),
            },
            "classes": None if classes is None else classes.to_json(),
        }

    def __str__(self) -> str:
        r = self.reached
        lines = [
            f"{self.before:,} bytes before, {r.bytes:,} after: {self.before / r.bytes:.1f} times smaller",
            f"{r.weights:,} quantized weights, {r.zeros:.1%} of them zero, {r.bits_per_weight:.3f} bits each",
        ]
        if self.evaluation_before is not None and self.evaluation is not None:
            first, last = self.evaluation_before.accuracy, self.evaluation.accuracy
            told = ", no more than by always naming one class" if self.evaluation.at_chance else ""
            lines.append(f"accuracy {first:.4f} before, {last:.4f} after{told}")
        asked = self.settings.get("rate") if self.settings.get("target") is None else None
        if asked is not None and not Rate(**asked).reached(r.zeros, r.bits_per_weight):
            name = "zeros" if asked["zeros"] is not None else "bits_per_weight"
            lines.append(f"asked for: {name} = {asked[name]:g}, which was not reached")
        if self.collapsed:
            lines.append(f"zero throughout: {', '.join(self.collapsed)}")
        return "\n".join(lines)


@normal_mode()
def quantize(
    model: nn.Module,
    data: Any = None,
    *,
    method: str = "ecq",
    bits: int | Mapping[str, int] = 4,
    gamma: float = 0.05,
    rate: Rate | None = None,
    target: Target | None = None,
    train: FineTune | bool | None = None,
    first: int | str | None = 8,
    last: int | str | None = 8,
    exclude: Iterable[str] | str = (),
    levels: str = "symmetric",
    step: str | float | None = None,
    lambda_rule: str = "thesis",
    relevance: WeightRelevance | Mapping[str, Tensor] | None = None,
    zero_cost: ZeroCost | None = None,
    grad_scale: str = "plain",
    reestimate_batchnorm: bool = False,
    evaluate: Any = None,
    resume: str | os.PathLike[str] | None = None,
    allow_collapse: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> QuantizeResult:
    r"""Quantize the weights of a network to 2 to 8 bits.

    Parameters
    ----------
    model : nn.Module
        Left as it is; may be pruned.
    data : optional
        Training batches ``(x, y)`` or one pair of tensors, as in
        :class:`compress.FineTune`; not needed by the post-training methods.
    method : str
        ``"ecq"``: entropy-constrained training; ``"ecqx"``: with relevance
        deciding which weights become zero; ``"magnitude"``, ``"gradient"``,
        ``"random"``: controls, with another measure in its place; ``"rtn"``,
        ``"rtn_per_channel"``, ``"mse"``, ``"mse_per_channel"``: rounding after
        training.
    bits : int or mapping
        2 to 8, for all or by shell pattern of layers; see
        :func:`compress.allocate_bits`.
    gamma : float
        Strength of the entropy constraint. Rounding after training reads none
        of ``gamma``, ``lambda_rule`` and ``grad_scale``, and refuses other
        values than the defaults.
    rate : Rate, optional
        A share of zeros or an entropy to be held in place of ``gamma``.
    target : Target, optional
        ``Target(bytes="100KB")``: of the file that :func:`compress.save`
        writes, never exceeded.
    train : FineTune, True, False or None
        How to train: ``FineTune(data, ...)`` with ``validation=`` for early
        stopping; None or True: AdamW, 10 epochs, cosine from 1e-3, on ``data``;
        False: assign once, without training (relevance is then averaged over
        ``data``).
    first, last, exclude
        See :func:`compress.quantized_tensors.choose_tensors`.
    levels, step
        See :func:`compress.codebook.codebook_of`; step "percentile" if not
        given. The post-training methods have a step of their own.
    lambda_rule, relevance, zero_cost, grad_scale
        See :class:`compress.Quantizer`.
    reestimate_batchnorm : bool
        Take batch-norm statistics anew from ``data`` at the end.
    evaluate : data or callable, optional
        As in :func:`compress.prune`: on test data, which nothing else sees.
    resume : path, optional
        A folder for the state of the training, from which it goes on after a
        kill with the same result. Of several processes the first locks it and
        writes; all must see it.
    allow_collapse : bool
        Return a network in which a whole tensor is zero, and name it; otherwise
        that is an error.
    seed : int
    device : torch.device or str, optional
        To train on; the model's own if not given.
    progress : bool

    Returns
    -------
    QuantizeResult

    Raises
    ------
    InputError
        For unknown methods, missing data, options that do not fit together.
    ConvergenceError
        If a tensor became zero throughout.
    BudgetError
        If the target can not be met.
    MismatchError, FileFormatError, DataError
        If ``resume`` is of another run, damaged, or can not be written.
    DistributedError
        If another process of the run failed or is gone, or differs in model,
        data or settings.

    Notes
    -----
    Under torch.distributed (``torchrun``) all processes make the same call, and
    all return the same network: they train it as :class:`compress.FineTune`
    does, by whole batches in turn, and relevance is the mean over the samples
    of all. Each evaluates on its own. With ``train=False`` nothing is dealt:
    ``data`` are then the batches of one process, at least one, relevance is the
    mean over those of all, and batch-norm statistics are of its own.

    Cost per training step: see ``experiments/results/quantizing_speed``. The
    default method was chosen by measurement: at equal bytes relevance did not
    raise the accuracy of ResNet-20 (``experiments/results/ecqx``), and costs more.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] > 0).long()
    >>> train = compress.FineTune((x, y), epochs=20, optimizer="adamw", lr=0.02)
    >>> result = compress.quantize(net, method="ecqx", bits=3, train=train, evaluate=[(x, y)])
    >>> result.evaluation.accuracy > 0.9, result.reached.bytes < result.before
    (True, True)
    """
    from compress._quantization_run import QuantizationRun

    several = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    patterns = tuple(exclude) if several else (exclude,)
    run = QuantizationRun(
        copy.deepcopy(network_of(model)),
        data,
        method=method,
        train=train,
        rate=rate,
        target=target,
        choice={"bits": bits, "first": first, "last": last, "exclude": patterns},
        codes={"levels": levels, "step": step},
        options={
            "gamma": gamma,
            "lambda_rule": lambda_rule,
            "relevance": relevance,
            "zero_cost": zero_cost,
            "grad_scale": grad_scale,
        },
        reestimate=reestimate_batchnorm,
        evaluate=evaluate,
        resume=resume,
        allow_collapse=allow_collapse,
        seed=seed,
        device=device,
        progress=progress,
    )
    return run.result()
