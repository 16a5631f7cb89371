r"""The nearest row that gets another label.

What a piecewise linear network says about its borders is a
:class:`Decision`: the polytopes in which its labels win, the affine map from
raw rows to the space they lie in, and its own ``predict``.

The distance is :math:`\sqrt{\sum_t w_t (u'_t - u_t)^2}`, to which a changed
category adds its :math:`w_t` under the root. With M = diag(w) and one border
h(x) = a.u + b between here and there, the answer is
:math:`u' = u - (h / |a|_M^2) M^{-1} a`; where more borders or bounds bind it is
a quadratic programme, see :func:`neuralize._projection.project`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lrp.errors import BoundsError, ColumnError, InputError, TargetError, UnsupportedEstimatorError
from neuralize._decision import Affine, Decision, Reference
from neuralize._nearest import Search
from neuralize.labels import positions
from neuralize.sentences import rounded
from neuralize.tables import Table, non_finite, table

if TYPE_CHECKING:
    import pandas as pd

    from neuralize.network import NeuralizedModel

__all__ = ["Affine", "Counterfactuals", "Decision", "Reference", "UnreachableError", "counterfactuals", "of_network"]

Floats = npt.NDArray[np.float64]


class UnreachableError(TargetError):
    """Rows from which no label asked for can be reached.

    Attributes
    ----------
    rows : tuple of int
        Their positions.
    """

    rows: tuple[int, ...] = ()


class _Metric(NamedTuple):
    """Weights (D,) of squared changes, columns (D,) without a unit, what a distance is, and its unit."""

    weights: Floats
    still: npt.NDArray[np.bool_]
    words: str
    unit: str


@dataclass(eq=False, repr=False)
class Counterfactuals:
    """Nearest rows with another label.

    Attributes
    ----------
    rows : ndarray (N, D)
        On the user's columns; columns of categories hold codes. Each row has
        its new label by the network's own ``predict``.
    data : ndarray (N, D)
        The rows they come from.
    distance : ndarray (N,)
        In ``unit``; 0 where the row has the label asked for already.
    old, new : ndarray (N,)
        Labels.
    margin : ndarray (N,)
        How far beyond each border of the new label the rows were asked to lie,
        in ``unit``.
    exact : ndarray (N,) of bool
        Proven: no row so far beyond the border is nearer. False only where the
        budget ended the search among categories or whole numbers.
    feature_names : tuple of str
    metric, unit : str
        How distances are measured, in words.
    categories : mapping of tuple
    model, kind : str
    index : Any
        Row labels, where a frame was asked about.
    """

    rows: Floats
    data: Floats
    distance: Floats
    old: npt.NDArray[Any]
    new: npt.NDArray[Any]
    margin: Floats
    exact: npt.NDArray[np.bool_]
    feature_names: tuple[str, ...]
    metric: str
    unit: str
    categories: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    model: str = ""
    kind: str = "cluster"
    index: Any = None
    shares: Floats | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def changed(self) -> npt.NDArray[np.bool_]:
        """Cells that differ, (N, D)."""
        return np.asarray((self.rows != self.data) & ~(np.isnan(self.rows) & np.isnan(self.data)))

    def to_frame(self, books: bool = False) -> pd.DataFrame:
        """The rows as a DataFrame, categories by name.

        Parameters
        ----------
        books : bool
            Put old and new label, distance and margin first; an underscore is
            added where a feature has such a name already.
        """
        import pandas as pd

        frame = pd.DataFrame(self.rows, columns=list(self.feature_names), index=self.index)
        for name, codes in self.categories.items():
            t = self.feature_names.index(name)
            frame[name] = [codes[int(c)] if c >= 0 else None for c in self.rows[:, t]]
        if books:
            for place, (name, column) in enumerate(
                {"old": self.old, "new": self.new, "distance": self.distance, "margin": self.margin}.items()
            ):
                while name in self.feature_names:
                    name += "_"
                frame.insert(place, name, column)
        return frame

    def changes(self) -> pd.DataFrame:
        """One line per changed cell: row, column, from, to, and its share of the squared distance."""
        import pandas as pd

        rows, columns = np.nonzero(self.changed)
        cells = list(zip(rows.tolist(), columns.tolist(), strict=True))
        index = np.arange(len(self)) if self.index is None else np.asarray(self.index)
        shares = np.full(self.rows.shape, np.nan) if self.shares is None else self.shares
        return pd.DataFrame(
            {
                "row": index[rows],
                "column": [self.feature_names[t] for _, t in cells],
                "from": [self._value(t, self.data[i, t]) for i, t in cells],
                "to": [self._value(t, self.rows[i, t]) for i, t in cells],
                "share": shares[rows, columns],
            }
        )

    def _value(self, t: int, value: float) -> Any:
        codes = self.categories.get(self.feature_names[t])
        if codes is None:
            return float(value)
        return codes[int(value)] if value >= 0 else "missing" if np.isnan(value) else "unknown"

    # ------------------------------------------------------------------ printing

    def sentence(self, i: int) -> str:
        """One row in words: what changes, and what that makes of it.

        The columns that carry most of the distance, at most five; numbers with
        two digits of the change.
        """
        i = range(len(self))[i]
        name = i if self.index is None else self.index[i]
        there, here = self._label(self.new[i]), self._label(self.old[i])
        columns = np.flatnonzero(self.changed[i])
        if not len(columns):
            return f"row {name}: {there} already"
        share = (np.ones(self.rows.shape[1]) if self.shares is None else self.shares[i])[columns]
        order = np.argsort(-share, kind="stable")
        count = min(int((np.cumsum(share[order]) < 0.9 * share.sum()).sum()) + 1, 5)
        said = ", ".join(self._change(i, int(t)) for t in columns[order[:count]])
        if rest := len(columns) - count:
            said += f" and {rest} smaller change{'s' * (rest != 1)}"
        size = rounded(self.distance[i], 1 - math.floor(math.log10(self.distance[i]))) if self.distance[i] else "0"
        unit = self.unit.removesuffix("s") if size == "1" else self.unit
        return f"row {name}: {said}: {there} instead of {here} (distance {size} {unit})"

    def _change(self, i: int, t: int) -> str:
        before, after = self.data[i, t], self.rows[i, t]
        if self.feature_names[t] in self.categories:
            return f"{self.feature_names[t]} {self._value(t, before)} -> {self._value(t, after)}"
        digits = max(1 - math.floor(math.log10(abs(after - before))), 0) if np.isfinite(after - before) else 3
        return f"{self.feature_names[t]} {rounded(before, digits)} -> {rounded(after, digits)}"

    def _label(self, label: Any) -> str:
        if self.kind == "outlier" and label in (-1, 1):
            return "inlier" if label == 1 else "outlier"
        return f"{self.kind} {label}"

    def _summary(self) -> list[tuple[str, str]]:
        moved = self.distance > 0
        typical = f"{np.median(self.distance[moved]):.3g} {self.unit} (median)" if moved.any() else "0"
        count = np.bincount(np.nonzero(self.changed)[1], minlength=self.rows.shape[1])
        top = ", ".join(self.feature_names[t] for t in np.argsort(-count, kind="stable")[:5] if count[t])
        lines = [
            ("rows x features", f"{len(self)} x {self.rows.shape[1]}"),
            ("model", self.model),
            ("distance", typical),
            ("metric", self.metric),
            ("changed most often", top or "nothing"),
        ]
        if not moved.all():
            lines.append(("unchanged", f"{int((~moved).sum())} rows have the label already"))
        if not self.exact.all():
            lines.append(("not proven nearest", f"{int((~self.exact).sum())} rows: the budget ended the search"))
        return lines

    def _examples(self) -> tuple[list[str], int]:
        """Sentences of the first rows that change, and how many more there are."""
        moved = np.flatnonzero(self.distance > 0).tolist()
        return [self.sentence(i) for i in moved[:3]], max(len(moved) - 3, 0)

    def __repr__(self) -> str:
        text = "Counterfactuals\n" + "\n".join(f"  {name + ':':<20}{value}" for name, value in self._summary())
        shown, more = self._examples()
        return text + "".join(f"\n  {line}" for line in shown) + (f"\n  and {more} more" if more else "")

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in self._summary())
        said = "".join(f"<li>{html.escape(line)}</li>" for line in self._examples()[0])
        return f"<table><caption>Counterfactuals</caption>{rows}</table><ul>{said}</ul>"


def counterfactuals(
    decision: Decision,
    X: Any,
    to: Any = None,
    *,
    metric: str | npt.ArrayLike = "scaled",
    bounds: str | Mapping[Any, Any] | None = None,
    fixed: Iterable[Any] = (),
    change: Iterable[Any] = (),
    integers: Iterable[Any] = (),
    margin: float = 1e-6,
    budget: int = 1000,
) -> Counterfactuals:
    r"""The nearest rows that get another label.

    Parameters
    ----------
    decision : Decision
    X : array-like, DataFrame or Table (N, D)
        Raw rows; categories as codes. NaN, where the network takes it, stays.
    to : None, label or array (N,) of labels
        The label wanted; None: any but the present one. Rows that have it
        already come back unchanged, with distance 0.
    metric : "scaled", "raw" or array (D,)
        "scaled": columns in standard deviations over the reference rows, where
        there are any (a column that does not vary there stays as it is), else
        in units of the scalers in front, else raw. Array: the weights
        :math:`w_t > 0` of squared changes. A changed category counts as 1, or
        as :math:`\sqrt{w_t}` with an array.
    bounds : None, "data" or dict
        "data": within the range of the reference rows. dict: column ->
        ``(low, high)``, None for open ends, or "up" or "down" for columns that
        only grow or fall. A value that lies outside already may stay.
    fixed : columns
        By name or position; they stay.
    change : columns of categories
        Those that may change; the others stay.
    integers : columns
        Their values stay whole.
    margin : float > 0
        Rows end this far, relative to a lower bound of their distance, beyond
        every border of the new label, or by the rounding of the border's value
        if that is more; doubled until the network's ``predict`` agrees.
    budget : int
        Candidates per row: combinations of categories, and programmes solved.

    Returns
    -------
    Counterfactuals

    Raises
    ------
    UnreachableError
        Rows that can not get there; all of them are named.
    UnsupportedEstimatorError
        The borders are curved.
    TargetError, ColumnError, BoundsError, InputError, NonFiniteError

    Notes
    -----
    O(M D) per row for M borders where the nearest border is all that binds;
    else a few quadratic programmes. A row's answer does not depend on the
    other rows.

    Examples
    --------
    >>> cells = {0: [(np.array([[-1.0]]), np.array([5.0]))], 1: [(np.array([[1.0]]), np.array([-5.0]))]}
    >>> decision = Decision(cells.get, Affine(np.eye(1), np.zeros(1)), lambda x: (x[:, 0] > 5).astype(int),
    ...                     np.array(["young", "old"]), ("age",), kind="class")
    >>> found = counterfactuals(decision, [[3.0]], metric="raw")
    >>> found.rows.round(5).tolist(), found.new.tolist()
    ([[5.0]], ['old'])
    >>> print(found.sentence(0))
    row 0: age 3 -> 5: class old instead of class young (distance 2 raw units)
    """
    tab = X if isinstance(X, Table) else table(X, len(decision.names), decision.fitted_names)
    x = np.array(tab.array, dtype=np.float64)
    names = decision.names
    if np.isinf(x).any():
        raise non_finite(x, names, 0)
    if not (isinstance(margin, (int, float)) and 0 < margin < 1):
        raise InputError("margin is no share", expected="0 < margin < 1", got=repr(margin), fix="keep the default")
    if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 1:
        raise InputError("budget is no count", expected="an integer > 0", got=repr(budget), fix="keep the default")
    coded = [names.index(c) for c in decision.categories]
    measure = _metric(metric, decision)
    free = ~measure.still
    free[_columns(fixed, names, "fixed")] = False
    free[[*coded, *decision.affine.still]] = False
    if shut := [t for t in decision.affine.closed if free[t]]:
        reasons = "; ".join(f"{names[t]!r}: {decision.affine.closed[t]}" for t in shut[:5])
        raise UnsupportedEstimatorError(
            f"{len(shut)} column{'s' * (len(shut) > 1)} can not be moved",
            expected="columns that reach the network through affine steps and increasing curves of their own",
            got=reasons,
            fix="hold them, fixed=[...], and move the others",
        )
    moving = _columns(change, names, "change")
    if wrong := [names[t] for t in moving if t not in coded]:
        raise ColumnError(
            "change names columns without categories",
            expected=f"some of {', '.join(map(repr, decision.categories)) or 'no column: there are no categories'}",
            got=", ".join(map(repr, wrong)),
            fix="leave them out: columns of numbers may change unless they are in fixed",
        )
    whole = [t for t in _columns(integers, names, "integers") if free[t]]
    lower, upper = _bounds(bounds, decision, x)
    _whole(x, whole, names)
    old = np.asarray(decision.predict(x), dtype=np.int64)
    want = np.full(len(x), -1) if to is None else positions(to, decision.labels, len(x), "to")
    rows, new = x.copy(), old.copy()
    distance, gap, exact = np.zeros(len(x)), np.zeros(len(x)), np.ones(len(x), dtype=bool)
    search = Search(decision, measure.weights, free, moving, whole, float(margin), int(budget))
    todo = np.flatnonzero(old != want)
    # rows that may leave by the same borders
    towards = want[todo] >= 0
    for key in np.unique(np.where(towards, want[todo], -1 - old[todo])).tolist():
        mine = todo[np.where(towards, want[todo], -1 - old[todo]) == key]
        found = search.batch(x[mine], old[mine], max(key, -1), lower[mine], upper[mine])
        rows[mine], new[mine], distance[mine] = found.rows, found.new, found.distance
        gap[mine], exact[mine] = found.margin, found.exact
    if (lost := np.flatnonzero(new < 0)).size:
        raise _unreachable(lost, bool(exact[lost].all()), want, decision, tab, int(budget))
    step = np.nan_to_num(np.where(rows == x, 0.0, decision.affine.columns(rows) - decision.affine.columns(x)))
    step[:, coded] = (rows[:, coded] != x[:, coded]) & ~np.isnan(rows[:, coded])
    shares = measure.weights * step**2 / np.where(distance > 0, distance, 1)[:, None] ** 2
    return Counterfactuals(
        rows=rows,
        data=x,
        distance=distance,
        old=np.asarray(decision.labels)[old],
        new=np.asarray(decision.labels)[new],
        margin=gap,
        exact=exact,
        feature_names=names,
        metric=measure.words,
        unit=measure.unit,
        categories=decision.categories,
        model=decision.source,
        kind=decision.kind,
        index=tab.index,
        shares=shares,
    )


def of_network(
    net: NeuralizedModel, X: Any, to: Any = None, *, reference: Any = None, **options: Any
) -> Counterfactuals:
    """The nearest rows to which a neuralized model gives another label.

    Parameters
    ----------
    net : NeuralizedModel
    X : array-like or DataFrame (N, D)
    to : None, label or array (N,) of labels
    reference : array-like or DataFrame, optional
        Rows for ``metric="scaled"`` and ``bounds="data"``, such as those the
        estimator was fitted on.
    **options
        Of :func:`counterfactuals`.

    Examples
    --------
    >>> from neuralize import CentroidHead, NeuralizedModel
    >>> net = NeuralizedModel(CentroidHead([[0.0], [10.0]]), feature_names=["age"])
    >>> print(of_network(net, [[3.0]]).sentence(0))
    row 0: age 3 -> 5: cluster 1 instead of cluster 0 (distance 2 raw units)
    """
    from neuralize._affine import decision_of

    tab = net.schema.read(X)
    array = tab.array.toarray() if hasattr(tab.array, "toarray") else tab.array
    return counterfactuals(decision_of(net, reference), Table(array, tab.names, tab.index), to, **options)


def _columns(given: Iterable[Any], names: tuple[str, ...], what: str) -> list[int]:
    """Positions of columns given by name or position."""
    given = [given] if isinstance(given, str) else list(given)
    found: list[int] = []
    for column in given:
        if isinstance(column, (int, np.integer)) and not isinstance(column, bool) and 0 <= column < len(names):
            found.append(int(column))
        elif str(column) in names:
            found.append(names.index(str(column)))
        else:
            shown = ", ".join(map(repr, names[:20]))
            raise ColumnError(
                f"{what} names a column that does not exist", expected=shown, got=repr(column), fix="check the name"
            )
    return sorted(set(found))


def _metric(metric: str | npt.ArrayLike, decision: Decision) -> _Metric:
    affine, d = decision.affine, len(decision.names)
    after = f" after {affine.transformed or 'the elementwise steps'}" if affine.transform is not None else ""
    plain = np.ones(d)
    still = np.zeros(d, dtype=bool)
    category = "; a changed category counts as 1" if decision.categories else ""
    coded = [decision.names.index(c) for c in decision.categories]
    if isinstance(metric, str):
        if metric not in ("scaled", "raw"):
            raise InputError(
                "unknown metric", expected="'scaled', 'raw' or weights", got=repr(metric), fix="choose one"
            )
        if metric == "scaled" and decision.reference is not None:
            spread = np.asarray(decision.reference.spread, dtype=np.float64)
            still = ~(spread > 0)
            words = f"Euclidean, each column in its standard deviation over {decision.reference.words}"
            unit = "standard deviations"
        elif metric == "scaled" and affine.spread is not None:
            spread = np.abs(np.asarray(affine.spread, dtype=np.float64))
            unit = f"units of {affine.scalers}" if affine.scalers else "scaled units"
            words = f"Euclidean, each column in {unit}"
        else:
            spread = plain
            words = "Euclidean, raw columns" + (" (there is neither a scaler nor a reference)" * (metric == "scaled"))
            unit = "raw units"
            if after:
                words, unit = words.replace("raw columns", "columns"), "units"
        still[coded] = False
        weights = 1 / np.where(still | (spread == 0), 1.0, spread) ** 2
        weights[coded] = 1.0
        return _Metric(weights, still, words + after + category, unit + after)
    weights = np.array(metric, dtype=np.float64)
    if weights.shape != (d,) or not (np.isfinite(weights) & (weights > 0)).all():
        raise InputError(
            "weights of the metric do not fit",
            expected=f"{d} finite numbers > 0",
            got=f"{weights.shape}, smallest {weights.min(initial=math.inf):g}",
            fix="one weight per column; fix a column by fixed=",
        )
    by_weight = "; a changed category counts by its weight" if category else ""
    return _Metric(weights, still, f"Euclidean, columns weighted as given{after}{by_weight}", "weighted units")


def _bounds(bounds: Any, decision: Decision, x: Floats) -> tuple[Floats, Floats]:
    """Lower and upper limits (N, D); a row's own value is always within."""
    lower, upper = np.full(x.shape, -np.inf), np.full(x.shape, np.inf)
    if isinstance(bounds, str) and bounds == "data":
        if decision.reference is None:
            raise BoundsError(
                "bounds='data' needs reference rows",
                expected="a network with reference rows",
                got="none",
                fix="neuralize(fitted, reference=X), or give bounds as a dict",
            )
        lower[:], upper[:] = decision.reference.low, decision.reference.high
    elif isinstance(bounds, Mapping):
        for column, ends in bounds.items():
            t = _columns([column], decision.names, "bounds")[0]
            if isinstance(ends, str) and ends in ("up", "down"):
                (lower if ends == "up" else upper)[:, t] = x[:, t]
                continue
            low, high = _ends(decision.names[t], ends)
            lower[:, t], upper[:, t] = low, high
    elif bounds is not None:
        raise BoundsError("unknown bounds", expected="None, 'data' or a dict", got=repr(bounds)[:80], fix="choose one")
    return np.fmin(lower, x), np.fmax(upper, x)


def _ends(name: str, ends: Any) -> tuple[float, float]:
    if isinstance(ends, Sequence) and not isinstance(ends, str) and len(ends) == 2:
        try:
            low = -math.inf if ends[0] is None else float(ends[0])
            high = math.inf if ends[1] is None else float(ends[1])
        except (TypeError, ValueError):
            low, high = math.nan, math.nan
        if low <= high:
            return low, high
    raise BoundsError(
        f"bounds of {name!r} are no interval",
        expected="(low, high) with low <= high, None for an open end, 'up' or 'down'",
        got=repr(ends)[:80],
        fix="check them",
    )


def _whole(x: Floats, whole: list[int], names: tuple[str, ...]) -> None:
    wrong = (x[:, whole] != np.round(x[:, whole])) & ~np.isnan(x[:, whole])
    if wrong.any():
        i, t = (int(a[0]) for a in np.nonzero(wrong))
        raise InputError(
            f"column {names[whole[t]]!r} of integers holds a fraction",
            expected="whole numbers",
            got=f"{x[i, whole[t]]!r} in row {i}",
            fix="leave it out of integers=",
        )


def _unreachable(
    lost: npt.NDArray[np.int64], proven: bool, want: npt.NDArray[np.int64], decision: Decision, tab: Table, budget: int
) -> UnreachableError:
    shown = [str(i if tab.index is None else tab.index[i]) for i in lost[:8].tolist()]
    who = f"row{'s' * (len(lost) > 1)} {', '.join(shown)}" + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
    goals = sorted({str(decision.labels[k]) if k >= 0 else "" for k in want[lost].tolist()})
    label = f"label {', '.join(goals)}" if goals[0] else "another label"
    error = UnreachableError(
        f"{who} can not get {label}",
        expected="a row with that label within the bounds, the fixed columns as they are",
        got="none" if proven else f"none among {budget} candidates",
        fix="widen bounds=, let more columns change, raise budget=, or ask for another label; "
        "a label whose region is empty wins nowhere",
    )
    error.rows = tuple(lost.tolist())
    return error
