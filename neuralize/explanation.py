"""Explanations: relevance of every column for every row, with all that is needed to read it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lrp.errors import FileFormatError, InputError, MissingDependencyError, RuleError
from neuralize._files import replacing

if TYPE_CHECKING:
    import pandas as pd

    from neuralize.lines import Lined
    from neuralize.plots import Plots
    from neuralize.reasons import ForAndAgainst

__all__ = ["CoverageWarning", "Explanation", "warn_coverage"]

Array = npt.NDArray[Any]
_MOST_LINES = 2**29  # 4 GiB for each of two arrays


class CoverageWarning(UserWarning):
    """The features carry little of the explained output; the residual carries the rest."""


class ComputedLines(NamedTuple):
    competitors: Array
    slope: Array
    break_even: Array


@dataclass(eq=False, repr=False)
class Explanation:
    r"""Relevance of every column for every row.

    ``values.sum(1) + residual == output``, to rounding. Arrays are float64
    unless the network was put into float32.

    Attributes
    ----------
    values : ndarray (N, D)
        Relevance on the columns the user fitted with, in ``unit``. Positive
        speaks for the target.
    output : ndarray (N,)
        What is explained: the target's logit, or the duel with the contrast.
        Positive: the target wins; 0: border.
    residual : ndarray (N,)
        What no column carries; the sum of ``residual_parts``.
    residual_parts : dict of ndarray (N,)
    target, contrast : ndarray (N,)
        Labels; contrast is None where all competitors count.
    decided : ndarray (N,)
        Label of the cluster each row is in.
    divided : ndarray (N,) of bool
        Rows on which the divided rule was used.
    feature_names : tuple of str
    labels : ndarray (K,)
        Label of every logit.
    data : ndarray (N, D)
        The raw rows: the caller's array, not a copy. Competitors and
        break-even points are computed from it when first asked for; if it has
        changed by then, ``DataError`` is raised.
    beta : float or None
        Stiffness; None for a contrast, which it does not enter.
    rule, model, unit : str
    index : Any
        Row labels, where a frame was explained.
    kind : str
        What the labels are: "cluster", "class", "outlier" (-1 and 1),
        "density" (one logit, a log density) or "value" (one logit, a
        regression minus its reference value).
    categories : dict of tuple of str
        For columns of categories, whose ``data`` are codes: the name of every
        code.
    notes : dict of ndarray (N,) of bool
        Rows with something to know about: "votes", rows without an outright
        winner, decided by votes.
    output_name : str
        "logit", or "decision" for the estimator's own decision value.
    grouped : tuple of str
        Features that stand for several columns, and so have no value of their
        own: their ``data`` are NaN.
    level : float
        Of a regression, the reference value that predictions are compared with.
    """

    values: Array
    output: Array
    residual: Array
    residual_parts: dict[str, Array]
    target: Array
    contrast: Array | None
    decided: Array
    divided: Array
    feature_names: tuple[str, ...]
    labels: Array
    data: Array
    beta: float | None
    rule: str
    model: str
    unit: str
    index: Any = None
    kind: str = "cluster"
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: dict[str, Array] = field(default_factory=dict)
    output_name: str = "logit"
    grouped: tuple[str, ...] = ()
    level: float = 0.0
    lines: Callable[[slice, Array], Lined] | None = None

    def __len__(self) -> int:
        return len(self.output)

    @property
    def coverage(self) -> Array:
        """Share of the output that the columns carry, (N,).

        ``values.sum(1) / output``, computed as ``1 - residual / output``, which
        is the same by conservation and exact where the residual is 0. Below 0:
        the columns speak against the sign of the output. Above 1: they say
        more than the output, and the residual takes it back. Where the output
        is 0: 1 if the residual is 0 too, else 0.
        """
        zero = self.output == 0
        ratio = self.residual / np.where(zero, 1, self.output)
        return np.where(zero, (self.residual == 0).astype(self.output.dtype), 1 - ratio)

    # ------------------------------------------------------------------ lines

    @cached_property
    def _computed(self) -> ComputedLines:
        if self.lines is None:
            raise FileFormatError(
                "this explanation holds no lines",
                expected="one made by net.explain or Explanation.load",
                got="none",
                fix="explain again",
            )
        n, d = self.values.shape
        if n * d > _MOST_LINES:
            raise InputError(
                "break-even points of so many cells would fill the memory",
                expected=f"at most {_MOST_LINES:,} cells",
                got=f"{n:,} rows x {d:,} columns",
                fix="explain fewer rows at a time, as net.explain_batches does",
            )
        found = ComputedLines(np.empty((n, len(self.labels))), np.empty((n, d)), np.empty((n, d)))
        step = max(16, 2**20 // max(d, getattr(self.lines, "width", 1)))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            part = self.lines(rows, self.output[rows])
            found.competitors[rows], found.slope[rows], found.break_even[rows] = (
                part.competitors,
                part.slope,
                part.break_even,
            )
        return found

    @property
    def competitors(self) -> Array:
        """Share of each competitor in the explanation, (N, K); rows sum to 1, the target has 0."""
        return self._computed.competitors

    @property
    def slope(self) -> Array:
        """Relevance per raw unit, (N, D), the competitors' weights held fixed.

        Positive: values above the break-even point speak for the target;
        negative: values below it do.
        """
        return self._computed.slope

    @property
    def break_even(self) -> Array:
        """The raw value at which a column would speak neither for nor against, (N, D).

        With the competitors' shares held as they are: exact for a contrast and
        for two clusters; otherwise the shares move with the value.
        The row's other columns are as they are, also behind a projection that
        mixes them. ``values == slope * (data - break_even)``, clipping scalers
        aside; of two values where relevance is 0, the one nearer to the row's.
        NaN where the column plays no part, holds categories, or enters by
        several ways, and where no value would be neutral or leads there.
        """
        return self._computed.break_even

    def prototypes(self, i: int, top: int = 5) -> pd.DataFrame:
        """The prototypes that carried the decision about row i, those with the largest shares first.

        Centres, subclusters, support vectors or training rows, whatever the
        model decides by.

        Parameters
        ----------
        i : int
            Position of the row.
        top : int

        Returns
        -------
        DataFrame
            "prototype": its label, or its position in the training table;
            "speaks": "for" where being near to it speaks for the target;
            "share": of the sum of all shares' magnitudes.

        Raises
        ------
        RuleError
            The model decides by no prototypes (a linear model), or the
            explanation was loaded from a file.
        """
        import pandas as pd

        names = getattr(self.lines, "names", lambda: None)()
        if names is None or self.lines is None:
            raise RuleError(
                "this explanation knows no prototypes",
                expected="a fresh explanation of a model with centres, support vectors or neighbours",
                got=f"{self.model or 'a network'}" + (", loaded from a file" if self.lines is None else ""),
                fix="read ex.values" if self.lines is not None else "explain again",
            )
        from neuralize._taken import position

        i = position(self, i)
        if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
            raise InputError(
                "top is no number of prototypes", expected="an integer > 0", got=repr(top), fix="choose one"
            )
        found = self.lines(slice(i, i + 1), self.output[i : i + 1])
        if found.units is None or found.shares is None:
            raise RuleError(
                "this rule has no prototypes", expected="another rule", got=self.rule, fix="use rule='auto'"
            )
        shares = pd.Series(found.shares[0]).groupby(found.units[0]).sum()
        size = float(shares.abs().sum()) or 1.0
        shares = shares[shares != 0]
        order = np.argsort(-shares.abs().to_numpy(), kind="stable")[:top]
        chosen = shares.iloc[order]
        return pd.DataFrame(
            {
                "prototype": names[chosen.index.to_numpy()],
                # a cost with a negative share: the nearer, the more for the target
                "speaks": np.where(chosen.to_numpy() < 0, "for", "against"),
                "share": chosen.abs().to_numpy() / size,
            }
        )

    # ------------------------------------------------------------------ views

    def to_frame(self, books: bool = False) -> pd.DataFrame:
        """Values as a DataFrame, one column per feature.

        Parameters
        ----------
        books : bool
            Put target, (contrast,) decided, output, residual and coverage
            first; an underscore is added where a feature has such a name already.
        """
        import pandas as pd

        columns = list(self.feature_names)
        if hasattr(self.values, "toarray"):
            frame = pd.DataFrame.sparse.from_spmatrix(self.values, index=self.index, columns=columns)  # type: ignore[attr-defined]
        else:
            frame = pd.DataFrame(self.values, columns=columns, index=self.index)
        if books:
            books_ = {"target": self.target} | ({} if self.contrast is None else {"contrast": self.contrast})
            books_ |= {
                "decided": self.decided,
                "output": self.output,
                "residual": self.residual,
                "coverage": self.coverage,
            }
            for place, (name, column) in enumerate(books_.items()):
                while name in self.feature_names:
                    name += "_"
                frame.insert(place, name, column)
        return frame  # type: ignore[no-any-return]

    def by_cluster(self) -> pd.DataFrame:
        """Explained cluster x feature: mean relevance and mean magnitude.

        Over all rows with that target, whether they are in it or not.

        Returns
        -------
        DataFrame
            Indexed by target; columns ("mean" | "magnitude", feature).
        """
        import pandas as pd

        clusters = np.unique(self.target)
        rows = [self.values[self.target == c] for c in clusters]
        # dense and CSR values alike
        shape = (len(clusters), self.values.shape[1])
        mean = np.reshape([np.asarray(r.mean(0)) for r in rows], shape)
        size = np.reshape([np.asarray(abs(r).mean(0)) for r in rows], shape)
        columns = pd.MultiIndex.from_product(
            [["mean", "magnitude"], list(self.feature_names)], names=["statistic", "feature"]
        )
        return pd.DataFrame(np.hstack([mean, size]), index=pd.Index(clusters, name="cluster"), columns=columns)

    def to_shap(self) -> Any:
        """As ``shap.Explanation`` with ``base_values = residual``, so that its sums are the outputs.

        Raises
        ------
        MissingDependencyError
            If shap is not installed.
        """
        try:
            import shap
        except ImportError as error:
            raise MissingDependencyError(
                "shap is not installed", expected="shap >= 0.46", got=str(error), fix="pip install 'neuralize[shap]'"
            ) from error
        # shap takes arrays only
        values, data = (a.toarray() if hasattr(a, "toarray") else a for a in (self.values, self.data))
        shown = None
        if self.categories:
            shown = np.asarray(data).astype(object)
            for t, name in enumerate(self.feature_names):
                known = dict(enumerate(self.categories.get(name, ())))
                shown[:, t] = [known.get(v, v) for v in shown[:, t].tolist()]
        return shap.Explanation(
            values=values,
            base_values=self.residual,
            data=data,
            display_data=shown,
            feature_names=list(self.feature_names),
        )

    def for_and_against(self, i: int, top: int = 5) -> ForAndAgainst:
        """The columns that speak most for and most against, for the row in position ``i``.

        Each with its value, its break-even point in raw units and its
        relevance; prints as a small table. See
        :func:`neuralize.reasons.for_and_against`.
        """
        from neuralize.reasons import for_and_against

        return for_and_against(self, i, top)

    @property
    def plot(self) -> Plots:
        """Pictures: ``plot.bar``, ``waterfall``, ``beeswarm``, ``heatmap``, ``image``; each returns its ``ax``."""
        from neuralize.plots import Plots

        return Plots(self)

    def to_html(
        self,
        path: str | os.PathLike[str],
        title: str | None = None,
        scale: str = "cluster",
        alternatives: Mapping[str, Explanation] | None = None,
        rows: Sequence[int] = (),
    ) -> Path:
        """Write a self-contained page; returns its path.

        Parameters
        ----------
        path : path
        title : str, optional
        scale : str
            Colours of its map relative to the largest magnitude of each
            "cluster", or of the whole "table".
        alternatives : dict of Explanation, optional
            Further explanations of the same rows, by the question they answer;
            the page lets its reader choose. See
            :func:`neuralize.page.alternatives`.
        rows : sequence of int
            Positions of rows that must be on it. Of many rows the page embeds
            at most 500, and says which.
        """
        from neuralize.page import render

        with replacing(path) as temporary:
            temporary.write_text(render(self, title, scale, alternatives, rows), encoding="utf-8")
        return Path(path)

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one npz file, without pickle, atomically; returns its path.

        The file carries the version of its format. Row labels are not kept.
        """
        from neuralize.archive import write

        return write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileFormatError
            Damaged, of another kind, or written by a later version.
        FileNotFoundError
        """

        from neuralize.archive import read

        return read(path)

    # ------------------------------------------------------------------ printing

    @property
    def question(self) -> str:
        """What was explained, in words."""
        from neuralize._words import words

        return words(self.kind).question(self)

    def _summary(self) -> list[tuple[str, str]]:
        n, d = self.values.shape
        if not n:
            return [("rows x features", f"0 x {d}"), ("model", self.model), ("unit", self.unit)]
        size = np.asarray(abs(self.values).mean(0)).ravel()
        top = ", ".join(self.feature_names[t] for t in np.argsort(-size, kind="stable")[:5])
        return [
            ("rows x features", f"{n} x {d}"),
            ("model", self.model),
            ("question", self.question),
            ("rule", self.rule + ("" if self.beta is None else f", beta = {self.beta:.4g}")),
            ("unit", self.unit),
            ("coverage", f"{np.median(self.coverage):.3g} (median share of the output carried by features)"),
            ("largest on average", top),
        ]

    def __repr__(self) -> str:
        return "Explanation\n" + "\n".join(f"  {name + ':':<20}{value}" for name, value in self._summary())

    def _repr_html_(self) -> str:
        from neuralize._html import summary

        return summary(self)


def warn_coverage(explanation: Explanation) -> None:
    """Warn where features carry less than half of the median row's output, or more than twice it."""
    if not explanation.residual.any():
        return
    typical = float(np.median(explanation.coverage))
    if not 0.5 <= typical <= 2:
        sizes = {name: float(np.median(np.abs(part))) for name, part in explanation.residual_parts.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        advice = _ADVICE.get(largest, "it belongs to no column")
        warnings.warn(
            f"the features carry {typical:.3g} times the explained output (median coverage); the residual carries the "
            f"rest, most of it {largest!r}: {advice}",
            CoverageWarning,
            stacklevel=3,
        )


_ADVICE = {
    "competition": "contrasts (contrast=...), each row's own cluster, or beta=inf leave none of it",
    "reference": "the mean of this contrast over the reference rows",
    "intercept": "the output at the row that relevance is measured from; neuralize(fitted, reference=X) takes X's mean",
    "pools": "how evenly members share; a smaller gamma leaves less of it",
    "norms": "constants of the clusters' centres; where gamma is large they decide, and the columns say little",
    "columns beyond the top": "raise top=",
}
