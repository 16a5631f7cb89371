r"""Last layers: from unit costs to logits, and from a logit to signed shares of the units.

Class k has cost :math:`C_k`, its logit compares it with the others:

.. math:: f_c = \min_{k \ne c} h_{ck} \ \text{(hard)}, \quad
          f_c = -\log\sum_{k \ne c} e^{-h_{ck}} \ \text{(soft)}, \quad h_{ck} = C_k - C_c .

Either is a weighted sum of the :math:`h_{ck}` plus a term of the weights alone:
with :math:`p = \mathrm{softmin}_\beta(h)`,
:math:`-\mathrm{LSE}(-h) = \sum_k p_k h_k - H(p) - \mathrm{KL}(p \| \mathrm{softmin}_1(h))`.
So a unit of class k gets the share :math:`p_k`, the units of class c get
:math:`-\sum_k p_k`, and constants in the costs (priors, log-weights,
normalisers, intercepts) stay residual, by name. The soft logit is the
log-odds :math:`\log P(c|x) / (1 - P(c|x))` of a mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrp.errors import ConvergenceError, TargetError
from neuralize.heads import Request, distinct
from neuralize.units import Picked

__all__ = ["HardPool", "PathPool", "Pool", "Sharing", "SoftPool"]


@dataclass(frozen=True)
class Sharing:
    """Signed shares of the units in an output.

    ``output == sum_j rho_j cost_j + sum of parts``.

    Parameters
    ----------
    rho : Tensor (n, M) or Picked
    output : Tensor (n,)
    parts : dict of Tensor (n,)
        Named parts of the residual.
    target, decided : LongTensor (n,)
    competitors : Tensor (n, K)
        Share of each competitor; 0 for the target.
    divided : BoolTensor (n,)
    distance : float
        Share of the distance form; see :meth:`neuralize.units.Units.spread`.
    notes : dict of BoolTensor (n,)
    """

    rho: Tensor | Picked
    output: Tensor
    parts: dict[str, Tensor]
    target: Tensor
    decided: Tensor
    competitors: Tensor
    divided: Tensor
    distance: float = 1.0
    notes: dict[str, Tensor] = field(default_factory=dict)


class Pool(nn.Module):
    """From costs (N, M) to logits (N, K).

    Attributes
    ----------
    clusters : int
        K.
    rules, residual_names : tuple of str
    own_stiffness : bool
        Whether beta is a stiffness of the pool of members, and so enters contrasts.
    """

    clusters: int
    rules: tuple[str, ...] = ("auto", "undivided")
    residual_names: tuple[str, ...] = ()
    own_stiffness: bool = False

    def forward(self, costs: Tensor) -> Tensor:
        """Logits (N, K)."""
        raise NotImplementedError

    def decide(self, costs: Tensor) -> Tensor:
        """Positions (N,) of the decided classes."""
        return self(costs).argmax(1)  # type: ignore[no-any-return]

    def default_beta(self, rule: str, contrast: bool) -> float:
        """The stiffness "auto" stands for."""
        return math.inf if contrast else 1.0

    def compares(self, request: Request | None = None) -> bool:
        """Whether logits, or the requested output, stay the same when a row's costs grow by one number."""
        return False

    def own_unit(self, request: Request) -> Tensor | None:
        """The unit (n,) the requested output speaks for, where that is known beforehand."""
        return None

    @property
    def width(self) -> int:
        """Numbers per row that it holds beside the costs."""
        return self.clusters

    def share(self, costs: Tensor, request: Request) -> Sharing:
        """Signed shares of the units in the requested output."""
        raise NotImplementedError

    def refer(self, costs: list[Tensor]) -> None:
        """Learn the stiffness from the costs of reference rows."""


class _ClassPool(Pool):
    """Classes of one or more units, with named constants in their costs.

    Parameters
    ----------
    classes : array (M,) or int
        Class of every unit, or the number of classes with one unit each.
    constants : dict of array (M,)
        Added to the costs, by the name of their residual part.
    decision : bool
        Whether the output "decision" is the class's own score, minus its cost.
    """

    group: Tensor | None

    def __init__(
        self,
        classes: npt.ArrayLike | int,
        constants: dict[str, npt.ArrayLike] | None = None,
        decision: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(classes, int):
            count, group = classes, None
        else:
            members = np.asarray(classes)
            count = int(members.max()) + 1
            plain = len(members) == count and bool((members == np.arange(count)).all())
            group = None if plain else torch.tensor(members.astype(np.int64))
        if count < 2:
            raise ConvergenceError(
                f"K = {count}: the logit f_c compares c with the others, and there are none",
                expected="at least two clusters",
                got=str(count),
                fix="fit two clusters or more; a single group has no competitor to be explained against",
            )
        self.clusters, self.decision = count, decision
        self.register_buffer("group", group)
        if group is not None:
            # positions, not masks: their number must be known when the network is exported
            for k in range(count):
                self.register_buffer(f"members_{k}", torch.nonzero(group == k)[:, 0])
        self.constant_names = tuple(constants or {})
        for name, values in (constants or {}).items():
            self.register_buffer(self._buffer(name), torch.tensor(np.array(values, dtype=np.float64)))
        if int((~self._excluded()).sum()) < 2:
            raise ConvergenceError(
                "only one class has a prior above 0: its posterior is constant, there is nothing to explain",
                expected="at least two classes that can be predicted",
                got=f"priors of 0 for {count - 1} of {count} classes",
                fix="fit with priors above 0",
            )

    @staticmethod
    def _buffer(name: str) -> str:
        return "constant_" + name.replace(" ", "_")

    def constants(self) -> dict[str, Tensor]:
        """Constants (M,) by name."""
        return {name: getattr(self, self._buffer(name)) for name in self.constant_names}

    def _excluded(self) -> Tensor:
        """Classes (K,) of prior 0."""
        gone = torch.zeros(self.clusters if self.group is None else len(self.group), dtype=torch.bool)
        for constant in self.constants().values():
            gone = gone.to(constant.device) | constant.isinf()
        if self.group is None:
            return gone
        return torch.stack([gone[getattr(self, f"members_{k}")].all() for k in range(self.clusters)])

    def compares(self, request: Request | None = None) -> bool:
        return request is None or not self._own_score(request)

    def own_unit(self, request: Request) -> Tensor | None:
        return request.target if self.group is None else None

    def _own_score(self, request: Request) -> bool:
        """Whether the class's own score is asked for; of two classes the score is their difference."""
        return request.output == "decision" and self.decision and self.clusters > 2 and request.contrast is None

    def class_costs(self, costs: Tensor) -> Tensor:
        """Costs (N, K) of the classes: the smallest of their units'."""
        for constant in self.constants().values():
            costs = costs + constant
        if self.group is None:
            return costs
        columns = [costs[:, getattr(self, f"members_{k}")].amin(1) for k in range(self.clusters)]
        return torch.stack(columns, 1)

    def decide(self, costs: Tensor) -> Tensor:
        return self.class_costs(costs).argmin(1)

    def _units(self, rho: Tensor, costs: Tensor, C: Tensor) -> Tensor:
        """Shares (N, M) of units from those of classes (N, K): the active units, equally where they tie."""
        if self.group is None:
            return rho
        for constant in self.constants().values():
            costs = costs + constant
        active = (costs == C[:, self.group]).to(costs.dtype)
        counts = torch.zeros_like(C).index_add_(1, self.group, active)
        return active * (rho / counts)[:, self.group]

    def _sharing(
        self,
        costs: Tensor,
        C: Tensor,
        p: Tensor,
        rho: Tensor,
        output: Tensor,
        competition: Tensor,
        target: Tensor,
        decided: Tensor,
        divided: Tensor,
    ) -> Sharing:
        units = self._units(rho, costs, C)
        parts = {"competition": competition}
        for name, constant in self.constants().items():
            # a prior of 0 is an infinite cost, of which nobody has a share
            parts[name] = torch.where(units != 0, units * constant, 0.0).sum(1)
        return Sharing(units, output, parts, target, decided, p, divided)

    def _frame_of(self, costs: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        C = self.class_costs(costs)
        decided = C.argmin(1)
        target = decided if request.target is None else request.target
        distinct(target, request.contrast)
        gone = self._excluded()
        for asked in (target, request.contrast):
            if asked is not None and bool((never := gone[asked]).any()):
                raise TargetError(
                    "a class with prior 0 has no finite log-odds to explain",
                    expected="targets and contrasts with priors above 0",
                    got=f"{int(never.sum())} rows of a batch of {len(target)} with such a class",
                    fix="choose another class, or fit with priors above 0",
                )
        return C, decided, target

    def _duels(self, costs: Tensor, C: Tensor, target: Tensor) -> Tensor:
        """h_k = C_k - C_c (n, K) of one target c per row, infinite for c itself."""
        own = target[:, None]
        if self.group is not None:
            return others(C, target)
        # constants by themselves: beside large costs they would lose digits
        h = costs - costs.gather(1, own)
        for constant in self.constants().values():
            h = h + (constant - constant[own])
        return h.scatter(1, own, math.inf)

    def _single(self, costs: Tensor, C: Tensor, decided: Tensor, target: Tensor, request: Request) -> Sharing | None:
        """The sharing of a contrast, or of the class's own score; None where all competitors count."""
        own = target[:, None]
        no = torch.zeros_like(target, dtype=torch.bool)
        if request.contrast is not None:
            rival = request.contrast[:, None]
            p = torch.zeros_like(C).scatter_(1, rival, 1.0)
            output = self._duels(costs, C, target).gather(1, rival)[:, 0]
            rho = p.scatter(1, own, -1.0)
            return self._sharing(costs, C, p, rho, output, torch.zeros_like(output), target, decided, no)
        if self._own_score(request):
            output = -C.gather(1, own)[:, 0]
            rho = torch.zeros_like(C).scatter_(1, own, -1.0)
            return self._sharing(
                costs, C, torch.zeros_like(C), rho, output, torch.zeros_like(output), target, decided, no
            )
        return None


def softmin(h: Tensor, beta: float) -> Tensor:
    """Shares over the last dimension; infinite entries get 0, ties at ``beta = inf`` equal ones."""
    f = h.amin(-1, keepdim=True)
    if math.isinf(beta):
        p = (h == f).to(h.dtype)
        return p / p.sum(-1, keepdim=True)
    return torch.softmax((f - h) * beta, -1)


def entropy(p: Tensor) -> Tensor:
    """H(p) over the last dimension."""
    return torch.special.entr(p).sum(-1)  # type: ignore[no-any-return]


def others(C: Tensor, target: Tensor) -> Tensor:
    """h_k = C_k - C_c of one target c per row, infinite for c itself."""
    own = target[:, None]
    return (C - C.gather(1, own)).scatter(1, own, math.inf)


def expectation(p: Tensor, h: Tensor) -> Tensor:
    """sum p h, where p = 0 leaves infinite h out."""
    return torch.where(p > 0, p * h, 0.0).sum(-1)


def minimum(h: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A minimum over duels h (N, m), shared: f (N,), p and rho (N, m), what competition leaves (N,), divided rows (N,).

    Raises
    ------
    TargetError
        The divided rule, asked for where the ratio f / h is unbounded.
    """
    f = h.amin(1)
    p = softmin(h, math.inf if request.rule == "midpoint" else request.beta)
    divided = torch.full_like(f, request.rule in ("auto", "divided"), dtype=torch.bool) & (f >= 0)
    if request.divided is not None:
        divided = request.divided
    elif request.rule == "divided" and not bool(divided.all()):
        raise TargetError(
            "rule 'divided' explains a row's own cluster only",
            expected="targets equal to net.predict(X)",
            got=f"{int((~divided).sum())} rows with another target, where the ratio f / h_k is unbounded",
            fix="use rule='auto' (divides where that is safe) or 'undivided'",
        )
    tiny = torch.finfo(h.dtype).tiny
    ratio = torch.where(divided[:, None], (f[:, None] + tiny) / (h + tiny), 1.0)
    rho = p * torch.where(p > 0, ratio, 0.0)
    return f, p, rho, torch.where(divided, 0.0, f - expectation(p, h)), divided


class HardPool(_ClassPool):
    r"""Nearest class wins: :math:`f_c = \min_{k \ne c} C_k - C_c`.

    At most one logit is positive, and exactly one off ties. The class cost is
    the smallest of its units'. *Divided*: class k carries
    :math:`\rho_k = p_k f/h_k` and no competition is left over, for a row's own
    class, where the ratio lies in [0, 1]; *undivided*: :math:`\rho_k = p_k` and
    :math:`f - \sum p_k h_k \le 0` is left.

    Parameters
    ----------
    classes, constants, decision
        See above.
    margin : float, optional
        Mean output of rows in their own class; ``beta="auto"`` is its inverse.

    Examples
    --------
    >>> HardPool(3)(torch.tensor([[1.0, 4.0, 9.0]])).tolist()
    [[3.0, -3.0, -8.0]]
    """

    rules = ("auto", "divided", "undivided", "midpoint")
    margin: Tensor

    def __init__(
        self,
        classes: npt.ArrayLike | int,
        constants: dict[str, npt.ArrayLike] | None = None,
        decision: bool = False,
        margin: float = math.nan,
    ) -> None:
        super().__init__(classes, constants, decision)
        self.register_buffer("margin", torch.tensor(margin, dtype=torch.float64))
        self.residual_names = ("competition", *self.constant_names)

    def forward(self, costs: Tensor) -> Tensor:
        C = self.class_costs(costs)
        two = C.topk(2, dim=1, largest=False).values
        won = torch.arange(self.clusters, device=C.device) == C.argmin(1, keepdim=True)
        return torch.where(won, two[:, 1:] - two[:, :1], two[:, :1] - C)

    def default_beta(self, rule: str, contrast: bool) -> float:
        if contrast or rule == "midpoint":
            return math.inf
        margin = float(self.margin)
        return 1.0 / margin if margin > 0 else math.inf if math.isnan(margin) else 1.0

    def refer(self, costs: list[Tensor]) -> None:
        total = count = 0.0
        for batch in costs:
            total += float(self(batch).amax(1).double().sum())
            count += len(batch)
        if total > 0:
            self.margin.fill_(total / count)

    def share(self, costs: Tensor, request: Request) -> Sharing:
        C, decided, target = self._frame_of(costs, request)
        single = self._single(costs, C, decided, target, request)
        if single is not None:
            return single
        h = self._duels(costs, C, target)
        f, p, rho, competition, divided = minimum(h, request)
        signed = rho.scatter(1, target[:, None], -rho.sum(1, keepdim=True))
        return self._sharing(costs, C, p, signed, f, competition, target, decided, divided)

    def extra_repr(self) -> str:
        return f"f_c = min over k != c of C_k - C_c, {self.clusters} classes"


class SoftPool(_ClassPool):
    r"""Log-odds of a mixture: :math:`f_c = -\mathrm{LSE}_{k \ne c}(-(C_k - C_c))`.

    Costs are negative log joint densities; stiffness 1 is the model's own. All
    logits are negative where no class exceeds 1/2.

    Parameters
    ----------
    classes, constants, decision
        See above.

    Notes
    -----
    Never divides: the log-odds may be negative while all h are positive and
    some near 0.

    Examples
    --------
    >>> f = SoftPool(2)(torch.tensor([[1.0, 3.0]]))
    >>> f.tolist()
    [[2.0, -2.0]]
    """

    def __init__(
        self,
        classes: npt.ArrayLike | int,
        constants: dict[str, npt.ArrayLike] | None = None,
        decision: bool = False,
    ) -> None:
        super().__init__(classes, constants, decision)
        self.residual_names = ("competition", *self.constant_names)

    def forward(self, costs: Tensor) -> Tensor:
        C = self.class_costs(costs)
        # a masked sum per class: subtracting c from the sum over all would cancel
        diagonal = torch.eye(self.clusters, dtype=torch.bool, device=C.device)
        rivals = torch.where(diagonal, -math.inf, -C[:, None, :])
        return -C - torch.logsumexp(rivals, 2)

    def share(self, costs: Tensor, request: Request) -> Sharing:
        C, decided, target = self._frame_of(costs, request)
        single = self._single(costs, C, decided, target, request)
        if single is not None:
            return single
        h = self._duels(costs, C, target)
        f = -torch.logsumexp(-h, 1)
        p = softmin(h, request.beta)
        competition = -entropy(p)
        if request.beta != 1:
            log = torch.where(p > 0, p.clamp(min=torch.finfo(p.dtype).tiny).log() - (f[:, None] - h), 0.0)
            competition = competition - (p * log).sum(1)
        signed = p.scatter(1, target[:, None], -p.sum(1, keepdim=True))
        no = torch.zeros_like(target, dtype=torch.bool)
        return self._sharing(costs, C, p, signed, f, competition, target, decided, no)

    def extra_repr(self) -> str:
        return f"f_c = -log sum over k != c of exp(C_c - C_k), {self.clusters} classes"


class PathPool(Pool):
    r"""A path of duels down a binary tree: :math:`f_c = \min_{t \in \mathrm{path}(c)} (C_{s_t} - C_{q_t})`.

    Node :math:`q_t` on the path of leaf c competes with its sibling
    :math:`s_t`. Exactly one logit is positive off ties. A contrast is the duel
    at the node where the two paths part. Derived from
    ``sklearn.cluster.BisectingKMeans.predict``.

    Parameters
    ----------
    paths : list of list of (int, int)
        For every leaf, in the order of the logits, the units (node, sibling)
        from the top.
    margin : float

    Examples
    --------
    >>> PathPool([[(0, 1)], [(1, 0), (2, 3)], [(1, 0), (3, 2)]])(torch.tensor([[5.0, 1.0, 0.0, 2.0]])).tolist()
    [[-4.0, 2.0, -2.0]]
    """

    rules = ("auto", "divided", "undivided", "midpoint")
    residual_names = ("competition",)
    margin: Tensor
    node: Tensor
    sibling: Tensor
    part: Tensor
    beneath: Tensor
    real: Tensor

    def __init__(self, paths: list[list[tuple[int, int]]], margin: float = math.nan) -> None:
        super().__init__()
        self.clusters = len(paths)
        if self.clusters < 2:
            raise ConvergenceError(
                "K = 1: the only leaf is the root and has no competitor",
                expected="at least two clusters",
                got="1",
                fix="fit two clusters or more",
            )
        depth = max(map(len, paths))
        node = np.zeros((self.clusters, depth), dtype=np.int64)
        sibling = np.zeros_like(node)  # padded with a node against itself, masked below
        real = np.zeros((self.clusters, depth), dtype=bool)
        for c, path in enumerate(paths):
            for t, (q, s) in enumerate(path):
                node[c, t], sibling[c, t], real[c, t] = q, s, True
        self.depths = [len(p) for p in paths]
        # where two leaves part: the first level on which their nodes differ
        part = np.stack([(path != node).argmax(1) for path in node])
        # leaves beneath every sibling, for the shares of competitors
        units = 1 + max(max(q, s) for p in paths for q, s in p)
        beneath = np.zeros((units, self.clusters), dtype=bool)
        for c, path in enumerate(paths):
            for q, _ in path:
                beneath[q, c] = True
        for name, array in (("node", node), ("sibling", sibling), ("part", part), ("beneath", beneath), ("real", real)):
            self.register_buffer(name, torch.tensor(array))
        self.register_buffer("margin", torch.tensor(margin, dtype=torch.float64))

    def mates(self) -> Tensor:
        """The sibling (M,) of every unit."""
        found = torch.zeros(len(self.beneath), dtype=torch.long)
        found[self.node[self.real]] = self.sibling[self.real]
        return found

    def _levels(self, costs: Tensor) -> Tensor:
        """h (N, K, depth), infinite beyond a leaf's depth."""
        h = costs[:, self.sibling] - costs[:, self.node]
        return torch.where(self.real, h, math.inf)

    def forward(self, costs: Tensor) -> Tensor:
        return self._levels(costs).amin(2)

    def decide(self, costs: Tensor) -> Tensor:
        # equal distances go left, and the left child's leaves come first
        return self(costs).argmax(1)  # type: ignore[no-any-return]

    default_beta = HardPool.default_beta
    refer = HardPool.refer

    def compares(self, request: Request | None = None) -> bool:
        return True

    @property
    def width(self) -> int:
        return int(self.node.numel())

    def share(self, costs: Tensor, request: Request) -> Sharing:
        levels = self._levels(costs)
        logits = levels.amin(2)
        decided = logits.argmax(1)
        target = decided if request.target is None else request.target
        distinct(target, request.contrast)
        row = torch.arange(len(costs), device=costs.device)
        h = levels[row, target]
        divided = torch.zeros_like(target, dtype=torch.bool)
        if request.contrast is not None:
            where = self.part[target, request.contrast]
            p = torch.zeros_like(h).scatter_(1, where[:, None], 1.0)
            output = h.gather(1, where[:, None])[:, 0]
            rho, competition = p, torch.zeros_like(output)
            competitors = torch.zeros_like(logits).scatter_(1, request.contrast[:, None], 1.0)
        else:
            output, p, rho, competition, divided = minimum(h, request)
            # a sibling stands for the leaf beneath it that is nearest to winning
            competitors = torch.zeros_like(logits)
            for t in range(h.shape[1]):
                rivals = torch.where(self.beneath[self.sibling[target, t]], logits, -math.inf)
                competitors.scatter_add_(1, rivals.argmax(1, keepdim=True), p[:, t : t + 1])
        units = torch.zeros_like(costs)
        units.scatter_add_(1, self.sibling[target], rho).scatter_add_(1, self.node[target], -rho)
        return Sharing(units, output, {"competition": competition}, target, decided, competitors, divided)

    def extra_repr(self) -> str:
        return f"f_c = min over the path of c of C_sibling - C_node, {self.clusters} leaves"
