r"""Would the explanation be the same, had other rows been drawn?

The estimator is fitted again to resampled rows, with another random start, and
asked the same question. Clusters have no names, so those of a refit are
matched to the original's: by the Hungarian method on the numbers of rows they
have in common, and on their similarity where these leave a choice. Signs and
ranks can be compared between refits; values can't, since their unit is a
distance within each model.

What moves is the estimator, not the explanation, which is exact for each refit.
Sources: C. Hennig, "Cluster-wise assessment of cluster stability",
Computational Statistics and Data Analysis 52(1), 2007 (Jaccard similarity to
the counterpart; "dissolved" at 1/2 and below); H. W. Kuhn, "The Hungarian
method for the assignment problem", Naval Research Logistics Quarterly 2, 1955.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError, UnsupportedEstimatorError
from neuralize._tally import Tally, quantile, ranks_of, signs_of, take
from neuralize.explanation import Explanation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Stability", "stability"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_DISSOLVED = 0.5
_SHOWN = 10


def stability(
    estimator: Any,
    X: Any,
    y: Any = None,
    *,
    rows: Any = None,
    refits: int = 20,
    sample: str | float = "bootstrap",
    seed: int = 0,
    target: Any = None,
    contrast: Any = None,
    beta: float | str = "auto",
    rule: str = "auto",
    output: str = "logit",
    top: int = 3,
) -> Stability:
    """In how many refits on resampled rows a column keeps its sign and its rank.

    Parameters
    ----------
    estimator : estimator or Pipeline
        Fitted: the original. Not fitted: a clone, fitted to X, is. It is never
        changed.
    X : array-like, DataFrame or CSR (N, D)
        Rows it is fitted to, and resampled from.
    y : array (N,), optional
        For classifiers and regressions; resampled along.
    rows : array-like, DataFrame or CSR (n, D), optional
        Rows to explain; X itself by default.
    refits : int
    sample : "bootstrap" or float
        N rows with replacement; or that share of the rows without: better for
        nearest neighbours, affinity propagation and densities, where a repeated
        row is its own neighbour. 1.0: all rows, so that only the random start
        differs.
    seed : int
        Sets the rows of each refit, and every ``random_state`` in it.
    target, contrast, beta, rule, output
        The question, as in :meth:`neuralize.NeuralizedModel.explain`, in the
        labels of the original. Where a refit puts a row elsewhere, the question
        stays: the values then say why it is not in its old cluster. "divided"
        has no answer to that, so that refits take "auto" instead.
    top : int
        Whether a column is among the first ``top`` of a row is counted.

    Returns
    -------
    Stability

    Raises
    ------
    InputError
        Numbers that make no sense.
    UnsupportedEstimatorError
        It can't be fitted again, has no exact network, or no refit succeeded.
    TargetError, RuleError
        The question does not fit the original.

    Notes
    -----
    Clusters are matched on all of X. Labels of classifiers and outlier
    detectors mean the same in every refit and are matched by name. Where a
    cluster vanishes, that is, has no counterpart with a row in common, its rows
    are not counted in that refit; see ``counted`` and ``clusters``. A refit that
    fails, or finds a single cluster, counts for no row; see ``failed``.

    Cost: ``refits`` fits, predictions of X and explanations of the rows; memory:
    n D ``refits`` bytes (up to 255 columns; beyond, 2 or 4 times that). A bar
    shows progress on a terminal.

    Examples
    --------
    >>> from sklearn.cluster import KMeans
    >>> X = np.random.default_rng(0).normal(size=(90, 3))
    >>> X[45:, 1] += 9
    >>> found = stability(KMeans(2, n_init=3, random_state=0).fit(X), X, refits=5, top=1)
    >>> found.agreement.tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0]
    >>> found.by_cluster()["in_top"].tolist()
    [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    """
    from neuralize.conversion import neuralize

    refits, seed, n, size = _checked(estimator, X, refits, sample, seed, top)
    fitted = estimator if _is_fitted(estimator) else _fit(_seeded(estimator, seed, only_none=True), X, y)
    net = neuralize(fitted, reference=X)
    table = X if rows is None else rows
    first = net.explain(table, target, contrast, beta, rule, output, top=None)
    if not len(first):
        raise InputError("there are no rows to explain", expected="at least one", got="0", fix="pass rows")
    tally = Tally(net, net.predict(X), first, refits, top)
    question = {"beta": beta, "rule": "auto" if rule == "divided" else rule, "output": output}
    for r in _bar(refits):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(r,)))
        drawn = rng.choice(n, size, replace=sample == "bootstrap")
        fresh = _seeded(estimator, int(rng.integers(2**31)))
        try:
            some = take(X, drawn)
            again = neuralize(_fit(fresh, some, None if y is None else take(y, drawn)), reference=some)
            tally.compare(r, again, again.predict(X), table, question)
        except ValueError as error:  # lrp.errors, and what scikit-learn raises for rows it can't take
            tally.failed[r] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if len(tally.failed) == refits:
        raise UnsupportedEstimatorError(
            "no refit succeeded",
            expected="an estimator that can be fitted to resampled rows",
            got=tally.failed[0],
            fix="try a larger sample, or fewer clusters",
        )
    return _result(tally, sample, seed, size)


@dataclass(eq=False, repr=False)
class Stability:
    """What holds over refits; printed, a summary.

    Attributes
    ----------
    original : Explanation
        Of the rows (n, D), by the original.
    sample : "bootstrap" or float
    size : int
        Rows in each refit.
    seed, top : int
    same_sign : ndarray (n, D)
        Share of the counted refits in which the relevance has the original's
        sign; NaN for rows never counted. Zeros have a sign of their own.
    rank : ndarray (n, D)
        In the original: 1 for the largest magnitude of the row. Equal
        magnitudes share the better rank; zeros come last.
    ranks : ndarray (refits, n, D)
        In each refit; 0 where the row was not counted.
    in_top : ndarray (n, D)
        Share of the counted refits in which the column is among the first ``top``.
    counted : ndarray (n,)
        Refits in which the row's clusters have counterparts.
    kept : ndarray (n,)
        Share of the counted refits in which the row is in the counterpart of
        its cluster; NaN for single outputs, which decide nothing.
    agreement : ndarray (refits,)
        Adjusted Rand index of original and refit over X; NaN for failed refits
        and single outputs.
    clusters : DataFrame
        Per label of the original: ``rows`` of X in it, refits in which it was
        ``matched`` or has ``vanished``, mean ``jaccard`` similarity with its
        counterpart (0 where it vanished), and in how many refits it is
        ``dissolved``, that is, similar to no more than 1/2.
    failed : dict of str
        Position of each refit that failed: the reason.
    means, magnitudes : ndarray (refits, C, D)
        Mean relevance and mean magnitude over the rows of each explained
        cluster, in the order of ``by_cluster``; NaN where none was counted.
    """

    original: Explanation
    sample: str | float
    size: int
    seed: int
    top: int
    same_sign: Floats
    rank: Ints
    ranks: npt.NDArray[Any]
    in_top: Floats
    counted: Ints
    kept: Floats
    agreement: Floats
    clusters: pd.DataFrame
    failed: dict[int, str]
    means: Floats
    magnitudes: Floats

    @property
    def refits(self) -> int:
        """All of them, failed ones included."""
        return len(self.agreement)

    def rank_quantile(self, q: float) -> Floats:
        """The smallest rank that the share q of the counted refits do not exceed, (n, D); NaN for rows never counted.

        Examples
        --------
        >>> from sklearn.cluster import KMeans
        >>> X = np.array([[0.0, 0], [1, 0], [9, 0], [8, 0]])
        >>> stability(KMeans(2, random_state=0, n_init=1), X, sample=1.0, refits=2).rank_quantile(0.5)[0].tolist()
        [1.0, 2.0]
        """
        return quantile(self.ranks, q)

    def to_frame(self, level: float = 0.9) -> pd.DataFrame:
        """One line per row and column.

        Parameters
        ----------
        level : float
            Share of the refits between ``low`` and ``high``.

        Returns
        -------
        DataFrame
            ``row`` (its label in the frame that was explained), ``target``,
            ``feature``, ``value``, ``same_sign``, ``rank``; of the ranks in the refits
            ``median``, ``low`` and ``high``; ``in_top``, and ``counted`` refits.
        """
        import pandas as pd

        ex = self.original
        n, d = ex.values.shape
        low, median, high = (self.rank_quantile(q).ravel() for q in _levels(level))
        index = np.arange(n) if ex.index is None else ex.index
        return pd.DataFrame(
            {
                "row": np.repeat(np.asarray(index), d),
                "target": np.repeat(ex.target, d),
                "feature": list(ex.feature_names) * n,
                "value": np.asarray(ex.values).ravel(),
                "same_sign": self.same_sign.ravel(),
                "rank": self.rank.ravel(),
                "median": median,
                "low": low,
                "high": high,
                "in_top": self.in_top.ravel(),
                "counted": np.repeat(self.counted, d),
            }
        )

    def by_cluster(self, level: float = 0.9) -> pd.DataFrame:
        """The same of each explained cluster: of its mean relevances, ranked by mean magnitude.

        Parameters
        ----------
        level : float
            Share of the refits between ``low`` and ``high``.

        Returns
        -------
        DataFrame
            Indexed by (cluster, feature): ``mean``, ``magnitude`` and ``rank`` in the
            original; ``same_sign`` of the mean, ``median``, ``low`` and ``high`` of
            the ranks, ``in_top``, over the ``counted`` refits.
        """
        import pandas as pd

        means = self.original.by_cluster()
        mean, magnitude = means["mean"].to_numpy(), means["magnitude"].to_numpy()
        there = np.isfinite(self.means[:, :, 0])
        counted = there.sum(0)
        some = np.where(counted, counted, np.nan)[:, None]
        signs = (signs_of(np.nan_to_num(self.means)) == signs_of(mean)) & there[:, :, None]
        ranks = np.where(there[:, :, None], ranks_of(np.nan_to_num(self.magnitudes)), 0)
        low, median, high = (quantile(ranks, q) for q in _levels(level))
        columns = {
            "mean": mean,
            "magnitude": magnitude,
            "rank": ranks_of(magnitude),
            "same_sign": signs.sum(0) / some,
            "median": median,
            "low": low,
            "high": high,
            "in_top": ((ranks > 0) & (ranks <= self.top)).sum(0) / some,
            "counted": np.broadcast_to(counted[:, None], mean.shape),
        }
        index = pd.MultiIndex.from_product(
            [means.index, list(self.original.feature_names)], names=["cluster", "feature"]
        )
        return pd.DataFrame({name: column.ravel() for name, column in columns.items()}, index=index)

    def __repr__(self) -> str:
        drawn = f"all {self.size} rows" if self.sample == 1 else f"{self.size} rows"
        how = " drawn with replacement" if self.sample == "bootstrap" else ""
        lines = [f"Stability over {self.refits} refits, each on {drawn}{how}"]
        lines += [f"  {name + ':':<14}{text}" for name, text in self._summary()]
        return "\n".join([*lines, *self._portraits()])

    def _summary(self) -> Iterator[tuple[str, str]]:
        ex = self.original
        yield "model", ex.model
        yield "question", ex.question
        some = self.agreement[np.isfinite(self.agreement)]
        if len(some):
            yield "agreement", f"adjusted Rand index {some.mean():.2f} on average, {some.min():.2f} at worst"
        lost, loose = self.clusters["vanished"], self.clusters["dissolved"] - self.clusters["vanished"]
        if lost.any():
            yield "vanished", f"{_times(lost)}; their rows are not counted there"
        if loose.any():
            yield "dissolved", f"{_times(loose)}; they share at most half of their rows with their counterparts there"
        for reason in dict.fromkeys(self.failed.values()):
            times = list(self.failed.values()).count(reason)
            yield "failed", f"{times} of {self.refits}: {reason}"
        seen = self.counted > 0
        if np.isfinite(self.kept).any():
            yield "rows", f"{_percent(self.kept[seen], self.counted[seen])} of them stay in their cluster, on average"
        leading = (self.rank <= self.top) & seen[:, None]
        weight = np.broadcast_to(self.counted[:, None], leading.shape)
        all_ = np.broadcast_to(seen[:, None], leading.shape)
        first = "column" if self.top == 1 else f"{self.top} columns"
        yield (
            "signs",
            f"{_percent(self.same_sign[leading], weight[leading])} hold for the first {first} of a row, "
            f"{_percent(self.same_sign[all_], weight[all_])} for all",
        )
        yield "ranks", f"{_percent(self.in_top[leading], weight[leading])} of the first {first} stay among them"

    def _portraits(self) -> Iterator[str]:
        frame = self.by_cluster()
        labels = frame.index.unique(0)
        for label in labels[:_SHOWN]:
            lines = frame.loc[[label]].droplevel(0).sort_values("rank", kind="stable").head(self.top)
            parts = []
            for feature, line in lines.iterrows():
                if line["counted"]:
                    ranks = f"rank {line['low']:.0f}" + (f"-{line['high']:.0f}" if line["high"] > line["low"] else "")
                    parts.append(f"{feature} ({ranks}, sign {line['same_sign']:.0%})")
                else:
                    parts.append(f"{feature} (never counted)")
            yield f"  {f'{label}:':<14}" + ", ".join(parts)
        if len(labels) > _SHOWN:
            yield f"  and {len(labels) - _SHOWN} more: by_cluster()"


def _result(tally: Tally, sample: str | float, seed: int, size: int) -> Stability:
    import pandas as pd

    done = np.array([r not in tally.failed for r in range(len(tally.agreement))])
    some = np.where(tally.counted, tally.counted, np.nan)
    with np.errstate(invalid="ignore"):
        dissolved = (tally.jaccard[done] <= _DISSOLVED).sum(0)
    clusters = pd.DataFrame(
        {
            "rows": np.bincount(tally.place, minlength=len(tally.known)),
            "matched": tally.matched[done].sum(0),
            "vanished": (~tally.matched[done]).sum(0),
            "jaccard": tally.jaccard[done].mean(0),
            "dissolved": dissolved,
        },
        index=pd.Index(tally.known, name="cluster"),
    )
    inside = sum((tally.ranks[r] > 0) & (tally.ranks[r] <= tally.top) for r in range(len(tally.ranks)))
    return Stability(
        original=tally.first,
        sample=sample,
        size=size,
        seed=seed,
        top=tally.top,
        same_sign=tally.same / some[:, None],
        rank=tally.rank,
        ranks=tally.ranks,
        in_top=inside / some[:, None],
        counted=tally.counted,
        kept=np.full(len(some), np.nan) if tally.single else tally.kept / some,
        agreement=tally.agreement,
        clusters=clusters,
        failed=tally.failed,
        means=tally.means,
        magnitudes=tally.magnitudes,
    )


def _levels(level: float) -> tuple[float, float, float]:
    if not 0 < level < 1:
        raise InputError("this is no share of the refits", expected="0 < level < 1", got=repr(level), fix="choose one")
    return (1 - level) / 2, 0.5, (1 + level) / 2


def _times(counts: pd.Series[Any]) -> str:
    """Labels with their number of refits."""
    some = counts[counts > 0]
    text = ", ".join(f"{label} in {count:.0f}" for label, count in list(some.items())[:_SHOWN])
    return f"{text} refit" + ("s" if some.max() > 1 else "") + (", and more" if len(some) > _SHOWN else "")


def _percent(shares: Floats, weights: npt.NDArray[Any]) -> str:
    return f"{np.average(shares, weights=weights):.0%}" if len(shares) else "none"


# ---------------------------------------------------------------------- fitting


def _checked(estimator: Any, X: Any, refits: Any, sample: Any, seed: Any, top: Any) -> tuple[int, int, int, int]:
    """(refits, seed, N, rows of each refit)."""
    for name, value, least in (("refits", refits, 1), ("seed", seed, 0), ("top", top, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise InputError(
                f"{name} is no such number", expected=f"an integer >= {least}", got=repr(value), fix="choose one"
            )
    share = isinstance(sample, Real) and not isinstance(sample, bool) and 0 < float(sample) <= 1
    if not share and not (isinstance(sample, str) and sample == "bootstrap"):
        raise InputError(
            "unknown sample",
            expected="'bootstrap', or a share of the rows, 0 < sample <= 1",
            got=repr(sample),
            fix="choose one",
        )
    if isinstance(estimator, type) or not all(hasattr(estimator, m) for m in ("fit", "get_params", "set_params")):
        raise UnsupportedEstimatorError(
            "this can not be fitted again",
            expected="a scikit-learn estimator or Pipeline",
            got=estimator.__name__ if isinstance(estimator, type) else type(estimator).__name__,
            fix="pass the estimator that the network is made from",
        )
    if hasattr(estimator, "estimator") and type(estimator).__name__ == "FrozenEstimator":
        raise UnsupportedEstimatorError(
            "a frozen estimator can not be fitted again",
            expected="the estimator itself",
            got="FrozenEstimator",
            fix="pass frozen.estimator",
        )
    n = int(X.shape[0]) if hasattr(X, "shape") else len(X)
    return int(refits), int(seed), n, n if not share else max(1, math.floor(float(sample) * n + 0.5))


def _is_fitted(estimator: Any) -> bool:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    try:
        check_is_fitted(estimator)
    except NotFittedError:
        return False
    return True


def _seeded(estimator: Any, seed: int, only_none: bool = False) -> Any:
    """A clone, not fitted, with this random state wherever there is one (only where it is None)."""
    from sklearn.base import clone

    fresh = clone(estimator)
    known = {k: v for k, v in fresh.get_params().items() if k == "random_state" or k.endswith("__random_state")}
    return fresh.set_params(**{k: seed for k, v in known.items() if v is None or not only_none})


def _fit(estimator: Any, X: Any, y: Any) -> Any:
    return estimator.fit(X) if y is None else estimator.fit(X, y)


def _bar(refits: int) -> Iterator[int]:
    from tqdm import tqdm

    # None: on a terminal only
    return iter(tqdm(range(refits), desc="stability", unit="refit", disable=None, delay=2))
