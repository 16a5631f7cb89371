r"""Regressions, explained as a difference from a reference value."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrp.errors import RuleError
from neuralize.heads import Request
from neuralize.kernel_pools import DuelPool, logarithmic_mean
from neuralize.pools import Pool, Sharing

__all__ = ["ScoreValuePool", "ValuePool"]


def _finite(level: float) -> float:
    if not math.isfinite(level):
        raise RuleError(
            "the reference value is no number", expected="a finite number", got=repr(level), fix="choose one"
        )
    return level


class ValuePool(DuelPool):
    r"""A regression minus a reference value: :math:`F - y_0 = \Lambda g`, one logit.

    Parameters
    ----------
    coefficients : array (M,)
    intercept : float
    gamma : float
    level : float
        The reference value :math:`y_0`; :meth:`refer` takes the mean
        prediction over the reference rows.
    eta : float

    Examples
    --------
    >>> pool = ValuePool([2.0, -1.0], 0.5, gamma=1.0)
    >>> pool(torch.tensor([[0.0, 0.0]], dtype=torch.float64)).round(decimals=6).tolist()
    [[1.5]]
    """

    level: Tensor
    intercept: Tensor

    def __init__(
        self, coefficients: npt.ArrayLike, intercept: float, gamma: float, level: float = 0.0, eta: float = 1.0
    ) -> None:
        b = float(intercept) - float(level)
        super().__init__(np.atleast_2d(np.asarray(coefficients)), [[max(b, 0), max(-b, 0)]], [[1, 0]], gamma, eta=eta)
        self.clusters = 1
        self.register_buffer("level", torch.tensor(float(level), dtype=torch.float64))
        self.register_buffer("intercept", torch.tensor(float(intercept), dtype=torch.float64))

    def forward(self, costs: Tensor) -> Tensor:
        logs = self.logs(costs)[:, 0]
        g = logs[:, :1] - logs[:, 1:]
        return logarithmic_mean(logs[:, :1], logs[:, 1:]) * g

    def decide(self, costs: Tensor) -> Tensor:
        return torch.zeros(len(costs), dtype=torch.long, device=costs.device)

    def refer(self, costs: list[Tensor]) -> None:
        count = sum(map(len, costs))
        mean = sum(float(self(c).double().sum()) for c in costs) / count + float(self.level)
        self.set_level(mean)

    def set_level(self, level: float) -> None:
        """Compare with another reference value."""
        b = float(self.intercept) - _finite(level)
        self._set_constants(np.array([[max(b, 0.0), max(-b, 0.0)]]))
        self.level.fill_(level)

    def share(self, costs: Tensor, request: Request) -> Sharing:
        logs = self.logs(costs)
        zero = torch.zeros(len(costs), dtype=torch.long, device=costs.device)
        one = torch.ones_like(costs[:, :1])
        found = self._expand(costs, logs, zero, zero, one, replace(request, output="decision"))
        return replace(found, competitors=torch.zeros_like(one))

    @staticmethod
    def _weight(target: Tensor, competitors: Tensor, first: int, second: int) -> Tensor:
        return competitors[:, 0]

    def extra_repr(self) -> str:
        return f"F - {float(self.level):.4g} = Lambda (log S+ - log S-), gamma = {self.gamma:.4g}"


class ScoreValuePool(Pool):
    r"""A regression by one linear score minus a reference value, :math:`F - y_0`.

    Parameters
    ----------
    intercept : float
    level : float

    Examples
    --------
    >>> ScoreValuePool(0.5)(torch.tensor([[-1.0]], dtype=torch.float64)).tolist()
    [[1.5]]
    """

    rules = ("auto", "undivided")
    residual_names = ("intercept",)
    intercept: Tensor
    level: Tensor

    def __init__(self, intercept: float, level: float = 0.0) -> None:
        super().__init__()
        self.clusters = 1
        self.register_buffer("intercept", torch.tensor(float(intercept), dtype=torch.float64))
        self.register_buffer("level", torch.tensor(float(level), dtype=torch.float64))

    def forward(self, costs: Tensor) -> Tensor:
        return (self.intercept - self.level) - costs

    decide = ValuePool.decide
    refer = ValuePool.refer

    def set_level(self, level: float) -> None:
        """Compare with another reference value."""
        self.level.fill_(_finite(level))

    def share(self, costs: Tensor, request: Request) -> Sharing:
        output = self(costs)[:, 0]
        zero = torch.zeros(len(costs), dtype=torch.long, device=costs.device)
        rest = torch.zeros_like(output) + (self.intercept - self.level)
        no = torch.zeros_like(zero, dtype=torch.bool)
        return Sharing(-torch.ones_like(costs), output, {"intercept": rest}, zero, zero, torch.zeros_like(costs), no)

    def extra_repr(self) -> str:
        return f"F - {float(self.level):.4g}"
