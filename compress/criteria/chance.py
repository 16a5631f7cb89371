"""Chance: the baseline that every criterion has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from compress.criteria._task import Found, Measure, Task
from compress.criteria.scores import Criterion
from compress.cutting import width_of
from lrp.errors import InputError

__all__ = ["random"]


@dataclass(frozen=True, repr=False)
class _Random(Measure):
    seed: int
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError("the seed is no integer", expected="an int", got=repr(self.seed), fix="for example 0")

    @property
    def name(self) -> str:
        return "random"

    @property
    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def _score(self, task: Task) -> Found:
        values = {}
        for name, module in task.layers.items():
            digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            values[name] = torch.rand(width_of(module), generator=generator, dtype=torch.float64)
        return Found(values)


def random(seed: int = 0) -> Criterion:
    """Uniform random scores in [0, 1).

    Parameters
    ----------
    seed : int
        The same seed gives a layer of the same name and width the same scores,
        whatever else is scored.

    Returns
    -------
    Criterion

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> torch.equal(random(3)(net, None, ["0"]).values["0"], random(3)(net, None, ["2", "0"]).values["0"])
    True
    """
    return _Random(seed)
