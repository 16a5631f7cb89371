"""Heads of one layer of additive units and a pool: nearly every model here is one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrp.errors import NonFiniteError
from neuralize.frames import Frame
from neuralize.heads import Details, Head, Part, Polytope, Request, Workspace, nearest_only
from neuralize.linear_units import Hyperplanes, LinearUnits
from neuralize.pools import HardPool, PathPool, Pool, Sharing, SoftPool
from neuralize.units import Picked, ProductDistances, QuadraticForms, SquaredDistances, Units
from neuralize.values import ScoreValuePool, ValuePool
from neuralize.votes import NeighbourPool, ScorePool

__all__ = ["AdditiveHead"]


def _regions(slope: Tensor, bias: Tensor, group: Tensor, cluster: int) -> list[Polytope]:
    """Where one of a class's units has the smallest of the costs slope . z + bias: a polytope per unit."""
    # a class of prior 0 has infinite cost, and no region
    others, own = (group != cluster) & bias.isfinite(), (group == cluster) & bias.isfinite()
    return [(slope[others] - slope[i], bias[others] - bias[i]) for i in torch.nonzero(own)[:, 0].tolist()]


class AdditiveHead(Head):
    r"""Units that are sums over columns, and a pool: :math:`R_t = \sum_j \rho_j \tau_{jt}`.

    Parameters
    ----------
    units : Units
    pool : Pool
    kind : str
        What the logits stand for; see :class:`neuralize.Explanation`.
    unit : str
        What one unit of the output is.
    names : array (M,), optional
        Names of the units, where they are prototypes a user knows: labels of
        clusters, rows of the training table.
    decision : Head, optional
        Head of the estimator's own decision value, where that belongs to
        another function than its ``predict``.
    decision_unit : str
        Unit of the decision value, where that is another.

    Examples
    --------
    >>> from neuralize.units import SquaredDistances
    >>> head = AdditiveHead(SquaredDistances([[0.0], [3.0]]), HardPool(2))
    >>> head(torch.tensor([[1.0]], dtype=torch.float64)).tolist()
    [[3.0, -3.0]]
    """

    def __init__(
        self,
        units: Units,
        pool: Pool,
        *,
        kind: str = "cluster",
        unit: str = "squared distance",
        names: npt.ArrayLike | None = None,
        decision: Head | None = None,
        decision_unit: str = "",
    ) -> None:
        super().__init__()
        for name, buffer in units.named_buffers():
            if buffer.is_floating_point() and not bool(buffer.isfinite().all()):
                raise NonFiniteError(
                    f"the fitted {name} are not finite",
                    expected="finite numbers",
                    got="NaN or infinity",
                    fix="check the table that was fitted, rescale it if it is huge, and fit again",
                )
        self.units, self.pool = units, pool
        units.careful = pool.compares()
        if isinstance(units, SquaredDistances) and isinstance(pool, PathPool):
            units.pair(pool.mates())
        self.features, self.clusters = units.features, pool.clusters
        self.kind, self.unit = kind, unit
        self.rules = pool.rules
        # squared distances leave something only where they are not expanded as distances
        rest = units.rest_name and (not isinstance(units, SquaredDistances) or "gi" in pool.rules)
        self.residual_names = tuple(dict.fromkeys((*pool.residual_names, *((units.rest_name,) if rest else ()))))
        self.names = None if names is None else np.asarray(names)
        self.decision, self.decision_unit = decision, decision_unit

    def forward(self, z: Tensor) -> Tensor:
        """Logits (N, K) of scaled rows (N, d)."""
        return self.pool(self._costs(z))  # type: ignore[no-any-return]

    def _costs(self, z: Tensor) -> Tensor:
        return self.units.relative(z) if self.pool.compares() else self.units(z)

    def assign(self, z: Tensor) -> tuple[Tensor, Tensor]:
        costs = self._costs(z)
        return self.pool.decide(costs), costs.sum(1)

    def request(self, rule: str, beta: float | str, contrast: bool, output: str = "logit") -> tuple[str, float]:
        if output == "decision" and self.decision is not None:
            return self.decision.request(rule, beta, contrast)
        rule, value = super().request(rule, beta, contrast, output)
        if isinstance(self.pool, (HardPool, PathPool)):
            nearest_only(rule, value, contrast)
        return rule, value

    def default_beta(self, rule: str, contrast: bool) -> float:
        return self.pool.default_beta(rule, contrast)

    def _share(self, z: Tensor, request: Request) -> Sharing:
        if not self.pool.compares(request):
            return self.pool.share(self.units(z), request)
        # decided as predict does, and lines of an explanation as it was: the same numbers whether a target is given
        decided = self.pool.decide(self._costs(z))
        if request.target is None:
            request = replace(request, target=decided, rule="auto" if request.rule == "divided" else request.rule)
        costs = self.units.compared(z, self.pool.own_unit(request))
        return replace(self.pool.share(costs, request), decided=decided)

    def explain(self, z: Tensor, request: Request, out: Tensor, work: Workspace, frame: Frame) -> Part:
        if request.output == "decision" and self.decision is not None:
            return self.decision.explain(z, request, out, work, frame)
        sharing = self._share(z, request)
        values, lost = self.units.spread(z, sharing.rho, frame, sharing.distance, sharing.target)
        out.copy_(values)
        parts = dict(sharing.parts)
        rest = self.units.rest(z, sharing.rho, frame, sharing.distance, sharing.target)
        if rest is not None:
            parts[self.units.rest_name] = parts[self.units.rest_name] + rest if self.units.rest_name in parts else rest
        output = sharing.output
        if lost is not None:
            parts[frame.lost_name] = lost
        if isinstance(sharing.rho, Picked):
            # differences of the few prototypes themselves are exact where those of squared norms cancel
            output = sum((part for part in (rest, lost) if part is not None), values.sum(1))
        return Part(output, parts, sharing.target, sharing.decided, sharing.divided, sharing.notes)

    def details(self, z: Tensor, request: Request, frame: Frame) -> Details:
        if request.output == "decision" and self.decision is not None:
            return self.decision.details(z, request, frame)
        sharing = self._share(z, request)
        lines = self.units.lines(z, sharing.rho, frame, sharing.distance, sharing.target)
        return Details(sharing.output, sharing.competitors, lines, sharing.rho)

    def refer(self, batches: Iterable[Tensor]) -> None:
        costs: list[Tensor] = []
        total: Any = 0.0
        count = 0
        for z in batches:
            costs.append(self._costs(z))
            total = total + z.double().sum(0)
            count += len(z)
        self.pool.refer(costs)
        # only then: it moves what the pool adds to these costs
        if isinstance(self.units, LinearUnits) and isinstance(self.pool, (HardPool, SoftPool)):
            self._start_at(total / count)
        if self.decision is not None and isinstance(self.decision, AdditiveHead) and isinstance(total, Tensor):
            self.decision.refer([total[None] / count])

    def _start_at(self, row: Tensor) -> None:
        """Measure linear units from another row; what that moves becomes intercept."""
        assert isinstance(self.units, LinearUnits)
        constants = self.pool.constants()  # type: ignore[operator]
        moved = (row - self.units.start.double()) @ self.units.weights.double().T
        constants["intercept"].sub_(moved.to(constants["intercept"].dtype))
        self.units.start.copy_(row)

    def cells(self, cluster: int) -> list[Polytope] | None:
        pool, units = self.pool, self.units
        if isinstance(units, SquaredDistances):
            # |z - u|^2 up to |z|^2, which every cost has
            slope = -2 * units.points
            bias = units.norms + 2 * units.points @ units.centre
        elif isinstance(units, LinearUnits):
            slope, bias = -units.weights, units.weights @ units.start
        elif isinstance(units, Hyperplanes):
            slope, bias = -units.weights, units.weights @ units.centre - units.bias
        elif isinstance(units, QuadraticForms) and units.shared:
            # one diagonal for all: z'Pz is common to every cost
            pull = units.precisions * units.means
            slope, bias = -pull, (pull * units.means).sum(1) / 2
            bias = bias if units.constants is None else bias + units.constants.sum(1)
        else:
            return None
        if isinstance(pool, ScorePool):
            if pool.clusters > 2:  # votes decide where no class wins all its duels
                return None
            sign = 1.0 if cluster == int(pool.pairs[0, 0]) else -1.0
            return [(-sign * slope, sign * (pool.intercepts - bias))]
        if isinstance(pool, NeighbourPool):
            return None if pool.k > 1 else _regions(slope, bias, pool.members, cluster)
        if isinstance(pool, PathPool):
            path = pool.depths[cluster]
            own, other = pool.node[cluster, :path], pool.sibling[cluster, :path]
            return [(slope[other] - slope[own], bias[other] - bias[own])]
        if not isinstance(pool, (HardPool, SoftPool)):
            return None
        for constant in pool.constants().values():
            bias = bias + constant
        group = torch.arange(len(bias), device=bias.device) if pool.group is None else pool.group
        return _regions(slope, bias, group, cluster)

    def prototypes(self) -> npt.NDArray[Any] | None:
        # a weight vector is no row that one could look at
        return None if isinstance(self.units, LinearUnits) else self.names

    @property
    def non_negative(self) -> bool:
        return isinstance(self.units, ProductDistances) and self.units.distance == "chi2"

    @property
    def width(self) -> int:
        return max(self.features, self.clusters, self.units.count, self.pool.width)

    @property
    def level(self) -> float:
        return float(getattr(self.pool, "level", 0.0))

    def set_level(self, level: float) -> None:
        if not isinstance(self.pool, (ValuePool, ScoreValuePool)):
            super().set_level(level)
            return
        self.pool.set_level(level)

    def unit_of(self, output: str) -> str:
        if output == "logit":
            return self.unit
        return self.decision_unit or (self.unit if self.decision is None else self.decision.unit)

    def beta_counts(self, request: Request) -> bool:
        return request.contrast is None or self.pool.own_stiffness

    def extra_repr(self) -> str:
        return f"unit: {self.unit}"
