r"""Which composite makes relevance the best criterion for this network?

Hatefi et al. 2024 (arXiv 2408.12568) choose a rule for each group of layers by
what the composite is worth for pruning: the objective is the mean accuracy over
the rates on a *validation* set,

.. math:: A = \frac1n \sum_k a(r_k).

Groups are the first quarter of the convolutions, the middle, the last quarter,
and the linear layers; rules are epsilon, z+, gamma and alpha-beta (2, 1). The
best of many is chosen by luck too, so its value on the validation set is too
high: judge it on a test set that took no part.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

import lrp
from compress import criteria
from compress._cells import Cells, opened, weights_of
from compress._composites import RULES, composite_of, depth_groups, layer_groups, rules_of
from compress._curves import QUANTITIES, Bench, evaluator, groups_of, scores_in, unpruned_cell
from compress._network import network_of
from compress._reference import asked_with, fingerprint, refuse_shared
from compress._results import Result, aligned, checked_rates
from compress._strategies import BASELINES, STRATEGIES, Choice, choices
from compress.costs import CostTable
from compress.criteria._names import near
from compress.evaluation import Evaluator, evaluator_of
from compress.groups import Structure, find_groups
from compress.planning import score
from compress.ranking import Ranking
from lrp import rules as lrp_rules
from lrp._drawing import axes_or_new, literal
from lrp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from compress.criteria.scores import Criterion

__all__ = ["RULES", "SearchResult", "Trial", "composite_of", "depth_groups", "search"]

RATES = tuple(k / 20 for k in range(20))


@dataclass(frozen=True)
class Trial:
    """One composite that was tried.

    Attributes
    ----------
    rules : dict of str to str
        Group of layers to rule.
    area : float
        Mean accuracy over the rates, on the validation set.
    accuracy : tuple of float
        By rate.
    """

    rules: Mapping[str, str]
    area: float
    accuracy: tuple[float, ...]

    @property
    def name(self) -> str:
        kinds = set(self.rules.values())
        return kinds.pop() if len(kinds) == 1 else ", ".join(f"{g}: {r}" for g, r in self.rules.items())


@dataclass(frozen=True, repr=False)
class SearchResult(Result):
    """All composites that were tried; prints as a table, best first.

    Attributes
    ----------
    trials : tuple of Trial
        In the order they were tried; the baselines, one rule everywhere, come first.
    rates : tuple of float
    groups : dict of str to tuple of str
        Group of layers to the layers.
    linear : tuple of str
        Layers that are linear, and take the rule of linear layers.
    baseline : float
        Accuracy of the unpruned network on the validation set.
    count : int
        Samples of the validation set; 0 where a user's function was asked.
    test : dict of str to float
        Area on the test set, of the best composite ("best") and of the
        baselines; empty if no test set was passed.
    settings : dict

    Examples
    --------
    See :func:`search`.
    """

    FORMAT: ClassVar[str] = "compress.SearchResult"

    trials: tuple[Trial, ...]
    rates: tuple[float, ...]
    groups: Mapping[str, tuple[str, ...]]
    linear: tuple[str, ...]
    baseline: float
    count: int = 0
    test: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        """The largest area; of equal ones the first tried, so that a baseline wins a tie."""
        return max(self.trials, key=lambda t: t.area)

    @property
    def composite(self) -> lrp.Composite:
        """Of the best trial, for ``compress.criteria.lrp(result.composite)``.

        Raises
        ------
        InputError
            After JSON, if rules of the user's own were searched.
        """
        strange = [name for name in self.best.rules.values() if name not in RULES]
        if strange or self.settings.get("own_rules"):
            raise InputError(
                "the rules were the user's own, and are not in the result",
                expected=f"rules among {sorted(RULES)}",
                got=", ".join(strange or self.best.rules.values()),
                fix="compress.search.composite_of(result.best.rules, result.groups, result.linear, rules)",
            )
        return composite_of(self.best.rules, self.groups, self.linear)

    def baselines(self) -> dict[str, Trial]:
        """The trials with one rule everywhere that every search begins with."""
        return {t.name: t for t in self.trials if t.name in BASELINES}

    def _told(self) -> str:
        return f"best of {len(self.trials)}: {self.best.name}, area {self.best.area:.4f}"

    def _held(self) -> dict[str, Any]:
        return {
            "trials": [{"rules": dict(t.rules), "area": t.area, "accuracy": list(t.accuracy)} for t in self.trials],
            "rates": list(self.rates),
            "groups": {name: list(layers) for name, layers in self.groups.items()},
            "linear": list(self.linear),
            "baseline": self.baseline,
            "count": self.count,
            "test": dict(self.test),
            "settings": dict(self.settings),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> SearchResult:
        trials = tuple(
            Trial(
                {str(g): str(r) for g, r in t["rules"].items()},
                float(t["area"]),
                tuple(float(a) for a in t["accuracy"]),
            )
            for t in stored["trials"]
        )
        if not trials:
            raise ValueError("no composite was tried")
        return cls(
            trials,
            tuple(float(r) for r in stored["rates"]),
            {str(name): tuple(map(str, layers)) for name, layers in stored["groups"].items()},
            tuple(map(str, stored["linear"])),
            float(stored["baseline"]),
            int(stored["count"]),
            {str(name): float(area) for name, area in stored["test"].items()},
            dict(stored["settings"]),
        )

    def __str__(self) -> str:
        names = list(self.groups)
        table: list[tuple[str, ...]] = [(*names, "area, validation", "test")]
        ranked = sorted(self.trials, key=lambda t: -t.area)
        for t in ranked:
            key = "best" if t is self.best else t.name
            test = f"{self.test[key]:.4f}" if key in self.test else "-"
            table.append((*(t.rules[name] for name in names), f"{t.area:.4f}", test))
        lines = [aligned(table, left=len(names))]
        lines.append(f"unpruned {self.baseline:.4f}; {len(self.trials)} composites tried")
        if self.count:
            lines[-1] += f", {self.count} validation samples"
        if not self.test:
            lines.append("the best was chosen on the validation set, where it looks better than it is: pass test=")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy over the rate of the best composite and the baselines; all others in grey.

        Parameters
        ----------
        ax : Axes, optional
        """
        ax = axes_or_new(ax, 6.0, 4.0)
        for t in self.trials:
            ax.plot(self.rates, t.accuracy, color="0.85", linewidth=0.8, zorder=1)
        for k, t in enumerate(self.baselines().values()):
            label = f"{t.name} ({t.area:.4f})"
            ax.plot(self.rates, t.accuracy, color=f"C{k + 1}", linestyle="--", label=label, zorder=2)
        best = self.best
        label = literal(f"best ({best.area:.4f}): {best.name}".replace(", ", "\n"))
        ax.plot(self.rates, best.accuracy, color="C0", marker="o", markersize=3, label=label, zorder=3)
        ax.set_xlabel(f"share of {self.settings.get('quantity', 'channels')} removed")
        ax.set_ylabel("accuracy on the validation set")
        ax.legend(fontsize="small")
        return ax


def search(
    model: nn.Module,
    example_inputs: Any,
    data: Any,
    *,
    validation: Any = None,
    test: Any = None,
    groups: Mapping[str, Sequence[str] | str] | None = None,
    rules: Sequence[str] | Mapping[str, Any] | None = None,
    rates: Sequence[float] = RATES,
    quantity: str = "channels",
    strategy: str = "grid",
    budget: int | None = None,
    start: str = "one_hot",
    aggregate: str = "abs_per_sample",
    normalisation: str = Ranking.normalisation,
    reduction: str = Ranking.reduction,
    scope: str = Ranking.scope,
    floor: Any = 0.0,
    round_to: int | str = 1,
    seed: int = 0,
    structure: Structure | None = None,
    resume: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **unknown: Any,
) -> SearchResult:
    """Search the composite whose relevance prunes best.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    example_inputs : Tensor or tuple
    data : iterable of batches
        Reference samples ``(x, y)`` for the scores.
    validation : iterable of batches or callable
        Labelled samples that the composite is chosen on, or a function from a
        model to a number.
    test : the same, optional
        Asked once, at the end, for the best composite and the baselines only.
        Samples of the three sets must be apart.
    groups : dict of str to patterns, optional
        Groups of layers by shell patterns on their names; first match wins,
        and what fits none has epsilon. Default: :func:`depth_groups`, without
        a first group of one layer: scores are read at outputs, so that the rule
        of the network's first layer changes none.
    rules : sequence of str or dict, optional
        Among those of :data:`RULES`, or a dict from names to a rule or to a
        pair (of convolutions, of linear layers). All of RULES by default.
    rates : sequence of float
        Shares that go; 0 to 95 % in steps of 5 % by default.
    quantity : {"channels", "macs", "params"}
    strategy : {"grid", "random", "bayes"}
        All combinations; random ones without repetition; or a Gaussian process
        on the one-hot choices, which takes the largest expected improvement.
    budget : int, optional
        Composites to try, the two baselines included. Default: all for "grid",
        else 20 or all, whichever is less.
    start, aggregate : str
        See :func:`compress.criteria.lrp`.
    normalisation, reduction, scope, floor, round_to
        See :class:`compress.Ranking`.
    seed : int
    structure, device, progress
    resume : path, optional
        A file for what has been tried: a killed search goes on from there.

    Returns
    -------
    SearchResult

    Raises
    ------
    InputError
        If two of the sets are not apart, or groups, rules or budget make no sense.
    BudgetError
        Before any scoring, if a rate can not be reached.
    MismatchError
        If ``resume`` is of other work.

    Notes
    -----
    The baselines, epsilon and z+ in every layer, are always tried first. Cost:
    for every composite a scoring pass over ``data`` and one evaluation per
    rate; a pass over all sets to see that they are apart.

    Examples
    --------
    >>> import torch
    >>> from compress.search import search
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> few, held = ([(torch.randn(n, 4), torch.arange(n) % 2)] for n in (10, 30))
    >>> found = search(net, torch.randn(1, 4), few, validation=held, rules=("epsilon", "zplus"), rates=(0.25, 0.5))
    >>> [t.name for t in found.trials], list(found.groups)
    (['epsilon', 'zplus'], ['linear'])
    """
    from tqdm import tqdm

    _check_named(unknown, validation)
    shares = checked_rates(rates)
    for name, value, known in (("strategy", strategy, STRATEGIES), ("quantity", quantity, QUANTITIES)):
        if value not in known:
            raise InputError(f"{name} is not known", expected=f"one of {known}", got=repr(value), fix="choose one")
    measure = evaluator(evaluator_of(validation, device=device))
    model = network_of(model)
    final = evaluator_of(test, device=device)
    refuse_shared({"data": data, "validation": validation, "test": test})
    kinds = rules_of(rules)
    parts, dense = layer_groups(model, example_inputs, groups)
    grid = list(itertools.product(kinds, repeat=len(parts)))
    wanted = _budget(budget, strategy, len(grid))
    found = structure or find_groups(model, example_inputs)
    table = CostTable.of(model, example_inputs, found)
    ranking = {
        "normalisation": normalisation, "reduction": reduction, "scope": scope, "floor": floor, "round_to": round_to,
    }  # fmt: skip
    bench = Bench(model, example_inputs, found, table, measure, ranking, quantity, device)
    bench.check(max(shares))
    settings = {"start": start, "aggregate": aggregate, "quantity": quantity, **ranking}
    identity: dict[str, Any] = {}
    if resume is not None:
        identity = {**weights_of(model), "data": fingerprint(data), "validation": asked_with(validation)}
        identity |= {"groups": groups_of(found), "rates": list(shares)}
        identity["layers"] = {name: list(layers) for name, layers in parts.items()}

    def criterion(choice: Choice) -> Criterion:
        named = dict(zip(parts, choice, strict=True))
        made: Criterion = criteria.lrp(composite_of(named, parts, dense, kinds), start=start, aggregate=aggregate)
        return made

    tries = _Tries(bench, data, criterion, kinds, shares)
    with opened(resume, "search", {**identity, **settings}) as cells:
        unpruned = cells.value(["unpruned"], lambda: unpruned_cell(measure(model)))
        tried: dict[Choice, list[float]] = {}
        order, hidden = choices(strategy, grid, tried, wanted, seed, kinds), None if progress else True
        for choice in tqdm(order, total=wanted, desc="composite search", unit="composite", disable=hidden):
            tried[choice] = tries.accuracy(cells, choice, "validation", measure)
        trials = tuple(
            Trial(dict(zip(parts, choice, strict=True)), float(np.mean(own)), tuple(own))
            for choice, own in tried.items()
        )
        best = list(tried)[max(range(len(trials)), key=lambda k: (trials[k].area, -k))]
        scores = {}
        if final is not None:
            asked = json.dumps(asked_with(test))
            for name, choice in {**{r: (r,) * len(parts) for r in BASELINES if r in kinds}, "best": best}.items():
                scores[name] = float(np.mean(tries.accuracy(cells, choice, asked, final)))
    public = {**settings, "strategy": strategy, "budget": wanted, "seed": seed}
    public["own_rules"] = any(kinds[name] is not RULES.get(name) for name in kinds)
    return SearchResult(trials, shares, parts, dense, unpruned["accuracy"], unpruned["count"], scores, public)


def _check_named(unknown: Mapping[str, Any], validation: Any) -> None:
    """Refuse arguments that there are not, and a call without validation samples."""
    if unknown:
        own = [name for name in inspect.signature(search).parameters if name != "unknown"]
        raise InputError(
            "search has no such argument",
            expected=", ".join(own),
            got=", ".join(unknown),
            fix="did you mean 'validation'?"
            if "evaluate" in unknown
            else near(next(iter(unknown)), own, "leave it out"),
        )
    if validation is None:
        raise InputError(
            "validation is missing",
            expected="labelled batches apart from data, or a function from a model to a number",
            got="None",
            fix="pass validation=[(x, y)]",
        )


@dataclass(frozen=True)
class _Tries:
    """Scores and measures composites, each once."""

    bench: Bench
    data: Any
    criterion: Any
    rules: Mapping[str, tuple[lrp_rules.Rule, lrp_rules.Rule]]
    rates: Sequence[float]

    def accuracy(self, cells: Cells, choice: Choice, on: str, measure: Evaluator) -> list[float]:
        told = [f"{name} {self.rules[name]!r}" for name in choice]
        key = [on, *told]
        b = self.bench

        def compute() -> list[float]:
            scores = scores_in(
                cells,
                ["scores", *told],
                lambda: score(
                    b.model,
                    b.example_inputs,
                    self.data,
                    criterion=self.criterion(choice),
                    structure=b.structure,
                    device=b.device,
                    progress=False,
                ),
            )
            asked = Bench(b.model, b.example_inputs, b.structure, b.table, measure, b.ranking, b.quantity, b.device)
            return [asked.measured(scores, rate, {})["accuracy"] for rate in self.rates]

        return [float(a) for a in cells.value(key, compute)]


def _budget(budget: int | None, strategy: str, size: int) -> int:
    least = min(2, size)
    if budget is None:
        return size if strategy == "grid" else min(20, size)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < least:
        raise InputError(
            "budget is too small",
            expected=f"an int >= {least}: the baselines are always tried",
            got=repr(budget),
            fix="raise it",
        )
    if strategy == "grid" and budget < size:
        raise InputError(
            f"the grid has {size} composites",
            expected=f"budget >= {size}, or none",
            got=str(budget),
            fix="use strategy='random' or 'bayes', fewer rules, or fewer groups",
        )
    return min(budget, size)
