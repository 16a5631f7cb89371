r"""How much each group of channels can lose alone before the network suffers.

One group at a time loses its least important channels while all others stay
whole; the network is cut, and its accuracy measured. The table shows which
layers are fragile whatever a global ranking says about them, and yields floors
for :class:`compress.Ranking`. What groups lose together is not the sum of what
they lose alone: a plan that respects all floors is still to be measured.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from compress._cells import Cells, opened, weights_of
from compress._curves import evaluator, groups_of, scores_in
from compress._network import network_of
from compress._reference import asked_with, criterion_settings, fingerprint
from compress._results import Result, aligned, checked_rates
from compress.batchnorm import reestimate_
from compress.criteria.scores import criterion_of
from compress.cutting import cut
from compress.evaluation import Evaluation, Evaluator, evaluator_of, wilson
from compress.groups import Group, Structure, find_groups
from compress.planning import score
from compress.ranking import GroupScores, Ranking, group_scores, spared
from lrp._drawing import axes_or_new, literal
from lrp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Row", "Sensitivity", "sensitivity"]

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Row:
    """One group, or all groups of one pattern.

    Attributes
    ----------
    name : str
        The group's, or the pattern.
    groups : tuple of str
    width : int
        Channels.
    accuracy : tuple of float
        By rate.
    removed : tuple of int
        Channels that went, by rate: the largest number of whole units that is
        no more than the rate.
    """

    name: str
    groups: tuple[str, ...]
    width: int
    accuracy: tuple[float, ...]
    removed: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """Accuracy by group and rate; prints as a table.

    Attributes
    ----------
    rates : tuple of float
    rows : tuple of Row
        In the order of the network's modules.
    baseline : float
        Accuracy of the network as it is.
    count : int
        Samples it was measured on; 0 where a user's function was asked.
    unscored : dict of str to str
        Groups that were left out because they have no score, and why.
    settings : dict

    Examples
    --------
    See :func:`sensitivity`.
    """

    FORMAT: ClassVar[str] = "compress.Sensitivity"

    rates: tuple[float, ...]
    rows: tuple[Row, ...]
    baseline: float
    count: int = 0
    unscored: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(
            f"there is no row '{name}'",
            expected=", ".join(row.name for row in self.rows[:8]),
            got=name,
            fix="print(sensitivity) lists them",
        )

    def robust(self, drop: float = 0.01) -> dict[str, float]:
        """The rate up to which no measured rate loses more than ``drop`` of accuracy; 0 if the first one does.

        Parameters
        ----------
        drop : float
            In units of accuracy: 0.01 is one percentage point.
        """
        if not (isinstance(drop, (int, float)) and not isinstance(drop, bool) and 0 <= drop < math.inf):
            raise InputError(
                "drop is no loss of accuracy", expected="a number >= 0", got=repr(drop), fix="0.01 is one point"
            )
        out = {}
        for row in self.rows:
            kept = 0.0
            for rate, found in zip(self.rates, row.accuracy, strict=True):
                if found < self.baseline - drop - 1e-12:
                    break
                kept = rate
            out[row.name] = kept
        return out

    def floors(self, drop: float = 0.01, default: float | int = 0.1) -> dict[str, float | int]:
        """What each group keeps at least so that it alone loses no more than ``drop``: for ``floor=`` of a plan.

        Parameters
        ----------
        drop : float
        default : float or int
            For groups that were not measured.
        """
        floors: dict[str, float | int] = {name: round(1.0 - rate, 12) for name, rate in self.robust(drop).items()}
        return {**floors, "*": default}

    def _told(self) -> str:
        return f"rows: {len(self.rows)}, rates: {len(self.rates)}; unpruned {self.baseline:.4f}"

    def _held(self) -> dict[str, Any]:
        return {
            "rates": list(self.rates),
            "rows": [{k: list(v) if isinstance(v, tuple) else v for k, v in vars(r).items()} for r in self.rows],
            "baseline": self.baseline,
            "count": self.count,
            "unscored": dict(self.unscored),
            "settings": dict(self.settings),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> Sensitivity:
        rates = tuple(float(r) for r in stored["rates"])
        rows = []
        for r in stored["rows"]:
            accuracy, removed = tuple(float(a) for a in r["accuracy"]), tuple(int(n) for n in r["removed"])
            if not len(rates) == len(accuracy) == len(removed):
                raise ValueError(f"'{r['name']}' has not one value per rate")
            rows.append(Row(str(r["name"]), tuple(map(str, r["groups"])), int(r["width"]), accuracy, removed))
        more = dict(stored["unscored"]), dict(stored["settings"])
        return cls(rates, tuple(rows), float(stored["baseline"]), int(stored["count"]), *more)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("group", "channels", *(f"-{rate:.0%}" for rate in self.rates))]
        for row in self.rows:
            table.append((row.name, str(row.width), *(f"{a:.4f}" for a in row.accuracy)))
        lines = [aligned(table), f"baseline {self.baseline:.4f}"]
        if self.count:
            low, high = wilson(round(self.baseline * self.count), self.count)
            lines[-1] += f" (95 % interval {low:.4f} to {high:.4f}, {self.count} samples)"
        if self.settings.get("reestimate_batchnorm"):
            lines[-1] += "; batch-norm statistics re-estimated after each cut"
        lines += [f"{name}: not measured, {why}" for name, why in self.unscored.items()]
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None, drop: float = 0.01) -> Axes:
        """Accuracy as a picture, group by rate; a line ends what a group may lose within ``drop``.

        Parameters
        ----------
        ax : Axes, optional
        drop : float
        """
        values = [row.accuracy for row in self.rows]
        names = [literal(row.name) for row in self.rows]
        ax = axes_or_new(
            ax, 2.6 + 0.5 * len(self.rates) + 0.08 * max(map(len, names), default=0), 1.4 + 0.24 * len(names)
        )
        low = min((min(v) for v in values), default=0.0)
        drawn = ax.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=max(self.baseline, low + 1e-9))
        steps = self.robust(drop)
        for k, row in enumerate(self.rows):
            edge = sum(rate <= steps[row.name] for rate in self.rates) - 0.5
            ax.plot([edge, edge], [k - 0.5, k + 0.5], color="#c2410c", linewidth=2)
        ax.set_xticks(range(len(self.rates)), [f"{rate:.0%}" for rate in self.rates])
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("channels removed, one group at a time")
        ax.set_title(f"accuracy (baseline {self.baseline:.4f}); line: loss up to {drop:g}", fontsize="medium")
        ax.figure.colorbar(drawn, ax=ax, fraction=0.05)
        return ax


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    data: Any = None,
    *,
    criterion: Any = "lrp",
    evaluate: Any,
    rates: Sequence[float] = RATES,
    per: str | Sequence[str] = "group",
    reestimate_batchnorm: bool = False,
    normalisation: str = Ranking.normalisation,
    reduction: str = Ranking.reduction,
    structure: Structure | None = None,
    cache: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Accuracy when one group alone loses a share of its channels, least important first.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    example_inputs : Tensor or tuple
        What the model is called with.
    data : iterable of batches, optional
        Reference samples for the criterion, and for batch norm.
    criterion : str, Criterion or callable
        See :func:`compress.plan_pruning`.
    evaluate : iterable of batches or callable
        Labelled samples, apart from ``data``; or a function from a model to a
        number, larger is better.
    rates : sequence of float
        Shares to remove, in [0, 1).
    per : "group", str or sequence of str
        "group": every group alone. Shell patterns on layer names: all groups
        with a layer that fits lose the share together, one row per pattern.
    reestimate_batchnorm : bool
        Re-estimate batch-norm statistics on ``data`` after every cut.
    normalisation, reduction : str
        Over the layers of one group; see :class:`compress.Ranking`.
    structure : Structure, optional
        What :func:`compress.find_groups` returned; found here if missing.
    cache : path, optional
        A file for finished cells: a killed run goes on after the last one, and
        later calls with other rates or patterns only compute what is new.
    device : torch.device or str, optional
    progress : bool
        A bar on stderr, on a terminal only.

    Returns
    -------
    Sensitivity

    Raises
    ------
    MismatchError
        If the cache is of other weights, data or settings.
    InputError, StructureError, NonFiniteError

    Notes
    -----
    Cost: one scoring pass, and an evaluation for every group and rate that
    removes another number of channels; with a cache, a pass over the data to
    tell them from others. At least one unit of a group stays.

    Examples
    --------
    >>> import torch
    >>> from compress.sensitivity import sensitivity
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 2, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.0], [0.0, 0.1]]))
    >>> _ = net[2].weight.data.copy_(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]))
    >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> found = sensitivity(net, torch.eye(2), data, criterion="weight", evaluate=data, rates=(0.5, 0.75))
    >>> print(found)
    group  channels    -50%    -75%
    0             4  1.0000  1.0000
    baseline 1.0000 (95 % interval 0.3424 to 1.0000, 2 samples)
    >>> found.floors()
    {'0': 0.25, '*': 0.1}
    """
    shares = checked_rates(rates)
    model = network_of(model)
    found = structure or find_groups(model, example_inputs)
    chosen = criterion_of(criterion)
    measure = evaluator(evaluator_of(evaluate, device=device))
    rows = _rows(found, per)
    ranking = Ranking(normalisation=normalisation, reduction=reduction).settled(found)
    if reestimate_batchnorm and data is None:
        raise InputError(
            "batch-norm statistics can not be re-estimated without data",
            expected="data",
            got="None",
            fix="pass a few unlabelled batches",
        )
    settings = {
        "criterion": criterion_settings(criterion, chosen),
        "normalisation": ranking.normalisation,
        "reduction": reduction,
        "reestimate_batchnorm": reestimate_batchnorm,
    }
    identity: dict[str, Any] = {}
    if cache is not None:
        identity = {**weights_of(model), "data": fingerprint(data), "evaluate": asked_with(evaluate)}
        identity["groups"] = groups_of(found)
    with opened(cache, "sensitivity", {**identity, **settings}) as cells:
        scores = scores_in(
            cells,
            ["scores"],
            lambda: score(
                model, example_inputs, data, criterion=chosen, structure=found, device=device, progress=progress
            ),
        )
        scored = group_scores(scores, found, ranking)
        work = _Work(model, found, scored, measure, data if reestimate_batchnorm else None, cells, device)
        baseline = work.baseline()
        table = work.table(rows, shares, progress)
    public = {**settings, "criterion": {"name": scores.name, **scores.settings}, "samples": scores.samples}
    return Sensitivity(shares, table, baseline["accuracy"], baseline["count"], scored.unscored, public)


@dataclass(frozen=True)
class _Work:
    model: nn.Module
    structure: Structure
    scored: GroupScores
    measure: Evaluator
    bn_data: Any
    cells: Cells
    device: torch.device | str | None

    def baseline(self) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            found: Evaluation = self.measure(self.model)
            return {"accuracy": found.accuracy, "count": found.count}

        held: dict[str, Any] = self.cells.value(["baseline"], compute)
        return held

    def table(self, rows: Mapping[str, list[Group]], rates: Sequence[float], progress: bool) -> tuple[Row, ...]:
        from tqdm import tqdm

        measured = {name: [g for g in groups if g.name in self.scored.values] for name, groups in rows.items()}
        measured = {name: groups for name, groups in measured.items() if groups}
        out = []
        hidden = None if progress else True  # None: hidden off a terminal
        with tqdm(total=len(measured) * len(rates), desc="sensitivity", unit="cut", disable=hidden) as bar:
            for name, groups in measured.items():
                accuracy, removed = [], []
                for rate in rates:
                    gone = {g.name: least(g, self.scored.values[g.name], rate) for g in groups}
                    gone = {group: channels for group, channels in gone.items() if channels}
                    accuracy.append(self._accuracy(gone))
                    removed.append(sum(map(len, gone.values())))
                    bar.update()
                width = sum(g.width for g in groups)
                out.append(Row(name, tuple(g.name for g in groups), width, tuple(accuracy), tuple(removed)))
        return tuple(out)

    def _accuracy(self, gone: Mapping[str, Sequence[int]]) -> float:
        """Of the network without these channels; the cell is named by how many go from which group."""
        if not gone:
            return float(self.baseline()["accuracy"])

        def compute() -> float:
            small = cut(self.model, self.structure, gone)
            if self.bn_data is not None:
                reestimate_(small, self.bn_data, device=self.device)
            return self.measure(small).accuracy

        key = [part for group, channels in sorted(gone.items()) for part in (group, len(channels))]
        return float(self.cells.value(key, compute))


def least(group: Group, own: Tensor, rate: float) -> tuple[int, ...]:
    """Channels of the least important whole units, no more of them than the rate; every layer keeps one.

    Ties are broken by place.
    """
    values = own.tolist()
    units = sorted(group.units, key=lambda unit: (values[unit[0]], unit[0]))[: len(group.units) - 1]
    out: list[int] = []
    for unit in spared(group, units):
        if len(out) + len(unit) > rate * group.width + 1e-9:
            break
        out.extend(unit)
    return tuple(sorted(out))


def _rows(structure: Structure, per: str | Sequence[str]) -> dict[str, list[Group]]:
    """Row name to its groups.

    Raises
    ------
    InputError
    """
    if per == "group":
        return {g.name: [g] for g in structure.prunable}
    rows = {}
    for pattern in (per,) if isinstance(per, str) else tuple(per):
        rows[pattern] = [g for g in structure.prunable if fnmatch.filter(g.producers, pattern)]
        if not rows[pattern]:
            raise InputError(
                f"per: '{pattern}' fits no layer of a prunable group",
                expected="'group', or shell patterns such as 'layer1.*'",
                got=repr(per),
                fix="print(compress.find_groups(model, example_inputs)) lists them",
            )
    return rows
