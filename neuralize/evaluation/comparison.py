"""Whole tables: several methods under several imputers, always beside chance and slopes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lrp.errors import InputError, TargetError
from neuralize.evaluation._imputing import ready
from neuralize.evaluation._rows import Floats, Rows, count, explained, relevances
from neuralize.evaluation.controls import random_values
from neuralize.evaluation.estimates import Estimate, deviation, normalised
from neuralize.evaluation.flipping import ORDERS, FlippingCurve, Job, signs
from neuralize.evaluation.imputers import Imputer
from neuralize.evaluation.scores import Score, target_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare"]


def compare(
    methods: Mapping[str, Any],
    score: Any,
    X: Any,
    *,
    imputers: Any = ("mean", "marginal", "kde"),
    seeds: Iterable[int] = (0, 1, 2),
    draws: int = 20,
    steps: Any = None,
    sign: Any = None,
    target: Any = None,
    reference: Any = None,
    normalise: str | None = "mean",
    batch_size: int | str = "auto",
) -> pd.DataFrame:
    """Gains and areas of several methods, under several imputers.

    Parameters
    ----------
    methods : mapping of name to relevances (N, D)
        Matrices, frames or Explanations, all of the same rows and targets.
        "random" (other numbers for every seed) and "sensitivity" (squared
        slopes) are added where they are not among them.
    score, X, draws, steps, sign, target, reference, batch_size
        As in :func:`~neuralize.evaluation.flip`.
    imputers : sequence of names and instances, or mapping of name to either
    seeds : sequence of int
        Everything is repeated with each, and averaged.
    normalise : "mean", "row" or None
        As in :meth:`~neuralize.evaluation.FlippingCurve.area`.

    Returns
    -------
    DataFrame
        Indexed by imputer and method. ``srg``, ``least`` and ``most`` (the two
        areas) with standard errors over the rows, ``_se``; ``spread``, the
        standard deviation of the gain between all draws, and
        ``spread_seeds``, between the seeds; ``over_random``, the gain minus that of
        "random", with the standard error of the paired difference.

    Raises
    ------
    InputError, ColumnError, NonFiniteError, RuleError, TargetError, OutputError
        See :func:`~neuralize.evaluation.flip`.

    Notes
    -----
    Under one seed all methods meet the same donors, so their differences are
    better known than each of them. No correction is made for comparing many.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(1.0, 1.0, (60, 4))
    >>> w = np.array([3.0, 2.0, 1.0, 0.5])
    >>> table = compare({"exact": w * X}, lambda X: X @ w, X, imputers=["mean", "marginal"], draws=5, sign="score")
    >>> bool((table.loc["marginal"].srg["exact"] > table.loc["marginal"].srg["sensitivity"]).all())
    True
    >>> list(table.columns[:2]), list(table.loc["mean"].index)
    (['srg', 'srg_se'], ['exact', 'random', 'sensitivity'])
    """
    import pandas as pd

    if not isinstance(methods, Mapping):
        raise InputError(
            "methods have no names",
            expected="a mapping of name to relevances",
            got=type(methods).__name__,
            fix='for example {"lrp": net.explain(X)}',
        )
    rows = Rows.of(X)
    target = _common_target(methods, score, target)
    several = [count(s, "seed", 0) for s in seeds]
    if not several:
        raise InputError("there is no seed", expected="at least one", got="none", fix="seeds=[0]")
    scored = Score(score, rows, target, X)
    factor = signs(sign, scored.start)
    entries: dict[str, Floats | None] = {str(n): relevances(v, rows, f"methods[{n!r}]") for n, v in methods.items()}
    entries.setdefault("random", None)
    if "sensitivity" not in entries:
        entries["sensitivity"] = scored.gradient() ** 2 * factor[:, None]
    table: dict[tuple[str, str], dict[str, float]] = {}
    for label, imputer in _imputers(imputers, rows, reference, score).items():
        found: dict[str, _Areas] = {}
        for name, values in entries.items():
            areas = found[name] = _Areas(normalise)
            for seed in several:
                given = random_values(rows, seed) if values is None else values
                job = Job(score, X, given, imputer, steps, draws, seed, factor, target, None, batch_size)
                areas.add(*job.curves(ORDERS))
        for name, areas in found.items():
            table[label, name] = areas.row(found["random"])
    frame = pd.DataFrame.from_dict(table, orient="index")
    frame.index = pd.MultiIndex.from_tuples(list(table), names=["imputer", "method"])
    frame.attrs = {"rows": len(rows), "draws": draws, "seeds": several, "normalise": normalise}
    return frame


class _Areas:
    """Areas of one method under one imputer, over the seeds."""

    def __init__(self, normalise: str | None) -> None:
        self.normalise = normalise
        self.least: list[Floats] = []
        self.most: list[Floats] = []
        self.draws: list[Floats] = []
        self.start: Floats = np.empty(0)

    def add(self, most: FlippingCurve, least: FlippingCurve) -> None:
        """Those of one more seed."""
        high, self.start, high_draws = least._areas(self.normalise, "removed")
        low, _, low_draws = most._areas(self.normalise, "removed")
        self.least.append(high)
        self.most.append(low)
        self.draws.append(high_draws - low_draws)

    def _estimate(self, areas: Floats, draws: Floats) -> Estimate:
        return normalised(areas, self.start, draws, self.normalise)[0]

    @property
    def gains(self) -> Floats:
        """Of the rows, (N,), mean over the seeds."""
        return np.asarray(np.mean(self.least, axis=0) - np.mean(self.most, axis=0))

    def row(self, chance: _Areas) -> dict[str, float]:
        """One line of the table."""
        draws = np.concatenate(self.draws)
        gain = self._estimate(self.gains, draws)
        least, most = (self._estimate(np.mean(a, axis=0), draws) for a in (self.least, self.most))
        single = [self._estimate(h - lo, draws).value for h, lo in zip(self.least, self.most, strict=True)]
        over = self._estimate(self.gains - chance.gains, draws)
        return {
            "srg": gain.value,
            "srg_se": gain.standard_error,
            "spread": gain.spread,
            "spread_seeds": deviation(np.array(single)),
            "least": least.value,
            "least_se": least.standard_error,
            "most": most.value,
            "most_se": most.standard_error,
            "over_random": over.value,
            "over_random_se": math.nan if chance is self else over.standard_error,
        }


def _imputers(imputers: Any, rows: Rows, reference: Any, score: Any) -> dict[str, Imputer]:
    """Fitted imputers by name."""
    if isinstance(imputers, (str, Imputer)):
        imputers = [imputers]
    if isinstance(imputers, Mapping):
        return {str(name): ready(imputer, rows, reference, score) for name, imputer in imputers.items()}
    found: dict[str, Imputer] = {}
    for imputer in imputers:
        fitted = ready(imputer, rows, reference, score)
        name = fitted.name or type(fitted).__name__
        # two of a kind are told apart by their options
        name = name if name not in found else repr(fitted)
        if name in found:
            raise InputError(
                "two imputers have the same name",
                expected="different ones",
                got=name,
                fix="pass a mapping of names to imputers",
            )
        found[name] = fitted
    if not found:
        raise InputError("there is no imputer", expected="at least one", got="none", fix="imputers=['marginal']")
    return found


def _common_target(methods: Mapping[str, Any], score: Any, target: Any) -> Any:
    """The target of all Explanations among the methods."""
    if target is not None:
        return target
    made_for = {name: target_of(score, v, None) for name, v in methods.items() if explained(v)}
    known = {name: t for name, t in made_for.items() if t is not None}
    if not known:
        return None
    first, common = next(iter(known.items()))
    for name, other in known.items():
        if not np.array_equal(other, common):
            raise TargetError(
                "the explanations are of different targets",
                expected=f"that of {first!r}",
                got=f"another for {name!r}",
                fix="explain the same rows and target with every method",
            )
    return common
