"""Single runs of a comparison of quantizers: one method under one seed, what all share, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress._results import optional_number
from compress.quantization import QuantizeResult, quantize
from compress.quantizer import METHODS
from compress.rate import Rate
from compress.target import Target
from compress.training import FineTune
from lrp._files import digest
from lrp.errors import BudgetError, ConvergenceError, InputError, NonFiniteError

__all__ = ["SEEDS", "Run", "as_json", "checked_seeds", "fingerprint", "goal_of", "run_of", "training_of"]

SEEDS = 5  # fewer are a pilot


@dataclass(frozen=True)
class Run:
    """One method under one seed.

    Attributes
    ----------
    method : str
    seed : int
    accuracy : float or None
        None where the run failed.
    bytes : int or None
        Of the file that :func:`compress.save` writes.
    zeros, bits_per_weight : float or None
    gamma : float or None
        That held the rate.
    collapsed : tuple of str
        Tensors that became zero throughout.
    error : str
        Why the run failed.
    """

    method: str
    seed: int
    accuracy: float | None = None
    bytes: int | None = None
    zeros: float | None = None
    bits_per_weight: float | None = None
    gamma: float | None = None
    collapsed: tuple[str, ...] = ()
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "collapsed": list(self.collapsed)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Run:
        numbers = ("accuracy", "zeros", "bits_per_weight", "gamma")
        size = stored["bytes"]
        return cls(
            str(stored["method"]),
            int(stored["seed"]),
            bytes=None if size is None else int(size),
            collapsed=tuple(map(str, stored["collapsed"])),
            error=str(stored["error"]),
            **{name: optional_number(stored[name]) for name in numbers},
        )


def run_of(model: nn.Module, data: Any, method: str, evaluate: Any, options: Mapping[str, Any]) -> Run:
    """Quantize, and keep what was reached; a failure is kept as well."""
    seed = int(options["seed"])
    if method == "ecq":  # the one that knows no relevance
        options = {name: value for name, value in options.items() if name not in ("relevance", "zero_cost")}
    try:
        found: QuantizeResult = quantize(
            model, data, method=method, evaluate=evaluate, allow_collapse=True, progress=False, **options
        )
    except (BudgetError, ConvergenceError, NonFiniteError) as error:
        return Run(method, seed, error=f"{error.what}; got {error.got}")
    assert found.evaluation is not None
    reached = found.reached
    return Run(
        method,
        seed,
        found.evaluation.accuracy,
        reached.bytes,
        reached.zeros,
        reached.bits_per_weight,
        found.gamma,
        found.collapsed,
    )


def training_of(train: FineTune | Callable[[int], FineTune], seed: int) -> FineTune:
    """The training under one seed, without a bar."""
    own = replace(train, seed=seed) if isinstance(train, FineTune) else train(seed)
    return replace(own, progress=False)


def checked_seeds(
    methods: Sequence[str], seeds: Any, rate: Any, target: Any, train: Any, options: Mapping[str, Any]
) -> list[int]:
    """The seeds; whatever else makes no sense is refused."""
    chosen = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    whole = isinstance(chosen, Sequence) and not isinstance(chosen, str)
    whole = whole and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in chosen)
    names = isinstance(methods, Sequence) and not isinstance(methods, str)
    own = [name for name in ("method", "evaluate", "seed", "allow_collapse", "gamma", "resume") if name in options]
    wrong = [
        (
            not names or len(set(methods)) < 2 or any(m not in METHODS for m in methods),
            "these methods can not be compared",
            f"two or more of {', '.join(METHODS)}",
            repr(methods),
            "rounding after training has no rate to hold: quantize by it, and look at its bytes",
        ),
        (
            not whole or not len(chosen) or len(set(chosen)) < len(chosen),
            "the seeds make no sense",
            "a number from 1, or different numbers from 0",
            repr(seeds),
            f"for example seeds={SEEDS}",
        ),
        (
            (rate is None) == (target is None),
            "methods are compared at equal bytes",
            "rate= or target=, one of the two",
            "neither" if rate is None else "both",
            "for example rate=compress.Rate(bits_per_weight=1.0); at one gamma they take other bytes",
        ),
        (
            train is not None and not callable(train),
            "train is no training",
            "a compress.FineTune, a function of the seed that makes one, or nothing",
            repr(train),
            "leave it out for ten epochs of AdamW",
        ),
        (
            bool(own),
            f"{own[0] if own else ''} is not the same for all, or is set here",
            "options that all methods share",
            ", ".join(own),
            "leave it out",
        ),
    ]
    for failed, what, expected, got, fix in wrong:
        if failed:
            raise InputError(what, expected=expected, got=got, fix=fix)
    return [int(s) for s in chosen]


def goal_of(rate: Rate | None, target: Target | None) -> str:
    """What all are held to, in words."""
    if rate is None:
        value = None if target is None else target.bytes
        value = f"{value:,} bytes" if isinstance(value, int) else value
        shown = f"{100 * value:g} % of the bytes" if isinstance(value, float) else f"{value} in the file"
        return f"at most {shown}"
    if rate.zeros is not None:
        return f"at least {100 * rate.zeros:g} % zeros"
    return f"at most {rate.bits_per_weight:g} bit{'' if rate.bits_per_weight == 1 else 's'} per weight"


def as_json(value: Any) -> Any:
    """An option as JSON has it."""
    if hasattr(value, "settings"):
        return value.settings()
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, torch.Tensor):
        return digest({"value": value})
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def fingerprint(data: Any) -> list[Any]:
    from compress._order import order_of

    return order_of(data, 64, 0).fingerprint()
