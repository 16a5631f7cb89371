"""Refits: does the clustering survive without its most relevant columns?

Other than flipping, this never leaves the data. But it judges a ranking of
columns for all rows at once, a refit may find the same clusters through columns
that are correlated with the removed ones, and another start of the algorithm
alone may move as many rows: so random columns are removed beside, and refits
with all columns show how much the start is worth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError, NotFittedError, UnsupportedEstimatorError
from neuralize.evaluation._rows import Floats, Rows, choice, count, generator, relevances
from neuralize.evaluation.controls import RANDOM
from neuralize.evaluation.estimates import deviation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["refit_after_removal"]

ORDERS = ("most", "least", "random")


def refit_after_removal(
    clusterer: Any,
    X: Any,
    values: Any,
    *,
    fractions: Iterable[float] = (0.1, 0.25, 0.5, 0.75),
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
    labels: Any = None,
    by: str = "magnitude",
    how: str = "drop",
) -> pd.DataFrame:
    """Refit without the most, the least, and random columns; agreement with the original partition.

    Parameters
    ----------
    clusterer : estimator or Pipeline
        It is cloned, and not changed.
    X : array-like or DataFrame (N, D)
        Rows it is fitted on.
    values : array-like, DataFrame or Explanation (N, D)
    fractions : sequence of float
        Shares of the columns that are removed, between 0 and 1; at least one
        column goes, and one stays.
    seeds : sequence of int
        For every ``random_state`` of the clusterer, and for the choice of random columns.
    labels : array (N,), optional
        The original partition; default what the fitted clusterer predicts for
        X, or its ``labels_``.
    by : "magnitude" or "mean"
        Columns are ranked by their mean magnitude or mean relevance.
    how : "drop" or "constant"
        "constant" puts the mean of the column instead, for pipelines that
        name their columns; to distances that is the same.

    Returns
    -------
    DataFrame
        One line per order ("none": all columns are kept) and fraction:
        ``removed`` columns, ``ari``, the mean adjusted Rand index with the
        original partition over the seeds, its standard deviation ``sd`` and standard
        error ``se`` over the seeds. The line "none" is the noise of the
        start: effects below 1 - its ari are none.

    Raises
    ------
    InputError, ColumnError, NonFiniteError
    NotFittedError
        Not fitted, and no labels.
    UnsupportedEstimatorError
        If a refit fails.

    Notes
    -----
    Standard errors are over seeds, for these rows; other rows would differ by
    more. Cost: (1 + 3 fractions) x seeds fits.

    Examples
    --------
    >>> from sklearn.cluster import KMeans
    >>> X = np.random.default_rng(0).normal(size=(90, 4))
    >>> X[:30, 0] += 9
    >>> X[30:60, 1] += 9
    >>> fitted = KMeans(3, n_init=3, random_state=0).fit(X)
    >>> table = refit_after_removal(fitted, X, np.tile([2.0, 1.0, 0.0, 0.0], (90, 1)), fractions=[0.5], seeds=[0, 1])
    >>> table.order.tolist(), table.removed.tolist()
    (['none', 'most', 'least', 'random'], [0, 2, 2, 2])
    >>> bool(table.ari[2] > table.ari[1])
    True
    """
    import pandas as pd

    choice(by, ("magnitude", "mean"), "ranking")
    choice(how, ("drop", "constant"), "removal")
    rows = Rows.of(X)
    d = rows.features
    if not hasattr(clusterer, "get_params") or not hasattr(clusterer, "fit"):
        raise UnsupportedEstimatorError(
            "this can not be fitted again",
            expected="a scikit-learn estimator or Pipeline",
            got=type(clusterer).__name__,
            fix="pass the estimator the network was made from",
        )
    if d < 2:
        raise InputError("there is one column", expected="at least two", got="1", fix="nothing would be left to fit")
    given = relevances(values, rows)
    several = [count(s, "seed", 0) for s in seeds]
    shares = [float(q) for q in fractions]
    if not several or not shares or not all(0 < q < 1 for q in shares):
        raise InputError(
            "there is nothing to refit",
            expected="at least one seed, and fractions between 0 and 1",
            got=f"{len(several)} seeds, fractions {shares}",
            fix="for example fractions=[0.25, 0.5], seeds=range(5)",
        )
    original = _partition(clusterer, X, len(rows), labels)
    size = (np.abs(given) if by == "magnitude" else given).mean(0)
    order = np.argsort(-size, kind="stable")

    def agreement(columns: npt.NDArray[np.int64], seed: int) -> float:
        from sklearn.metrics import adjusted_rand_score

        return float(adjusted_rand_score(original, _refit(clusterer, rows, columns, seed, how)))

    lines = []
    for which, q in [("none", 0.0)] + [(o, q) for q in shares for o in ORDERS]:
        removed = 0 if which == "none" else min(d - 1, max(1, round(q * d)))
        found = np.array([agreement(_columns(which, order, removed, seed), seed) for seed in several])
        sd = deviation(found)
        lines.append(
            {
                "order": which,
                "fraction": q,
                "removed": removed,
                "ari": float(found.mean()),
                "sd": sd,
                "se": sd / math.sqrt(len(found)),
            }
        )
    frame = pd.DataFrame(lines)
    frame.attrs = {"seeds": several, "ranking": [rows.names[t] for t in order]}
    return frame


def _columns(which: str, order: npt.NDArray[np.int64], removed: int, seed: int) -> npt.NDArray[np.int64]:
    if which == "random":
        order = generator(seed, RANDOM).permutation(len(order))
    return order[len(order) - removed :] if which == "least" else order[:removed]


def _partition(clusterer: Any, X: Any, n: int, labels: Any) -> npt.NDArray[Any]:
    if labels is None:
        last = clusterer.steps[-1][1] if hasattr(clusterer, "steps") else clusterer
        try:
            found = clusterer.predict(X) if hasattr(clusterer, "predict") else last.labels_
        except AttributeError as error:  # scikit-learn's NotFittedError is one
            raise NotFittedError(
                "there is no original partition",
                expected="a fitted clusterer, or labels",
                got=str(error).split("\n")[0],
                fix="fit it, or pass labels=",
            ) from error
        labels = found
    array = np.asarray(labels)
    if array.shape != (n,):
        raise InputError(
            "the original partition does not fit X",
            expected=f"({n},)",
            got=str(array.shape),
            fix="pass the rows the clusterer was fitted on, or labels=",
        )
    return array


def _refit(clusterer: Any, rows: Rows, columns: npt.NDArray[np.int64], seed: int, how: str) -> npt.NDArray[Any]:
    from sklearn.base import clone

    fresh = clone(clusterer)
    states = {k: seed for k in fresh.get_params() if k == "random_state" or k.endswith("__random_state")}
    fresh.set_params(**states)
    array: Floats = rows.array.copy()
    if how == "constant":
        array[:, columns] = array[:, columns].mean(0)
        table = rows.form(array)
    else:
        kept = np.setdiff1d(np.arange(rows.features), columns)
        table = Rows(array[:, kept], None if rows.columns is None else rows.columns[kept]).form(array[:, kept])
    try:
        return np.asarray(
            fresh.fit_predict(table) if hasattr(fresh, "fit_predict") else fresh.fit(table).predict(table)
        )
    except (ValueError, KeyError) as error:
        raise UnsupportedEstimatorError(
            "a refit without some columns fails",
            expected="a clusterer that takes any number of columns",
            got=str(error).split("\n")[0],
            fix="for pipelines that name columns pass how='constant'",
        ) from error
