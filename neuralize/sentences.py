"""What sets each cluster apart, and why a row is where it is, in sentences that hold.

A column is named with the side of its break-even point that speaks for what
the sentence says. It is called "above" or "below" only if at least four rows
in five agree on that side, if more than half of them lie on that side of the
printed number, and if that number lies within the table. Else it is "far from"
the median of the table, if most rows speak for the sentence and lie farther
from the printed median than the table's middle row does; or "around" its mean,
if the rows are no more spread than the table; or only the mean is given.
Categories are named with the share of rows that have them, and have no
break-even point. Rows of the explained cluster and rows of others never share
a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralize._columns import Column, FeatureNote, rounded, significant
from neuralize._taken import dense, strongest, take, wordless
from neuralize._words import Words, words
from neuralize.explanation import Explanation

__all__ = ["FeatureNote", "Portrait", "claims", "describe", "note_of", "of_row", "rounded"]

Array = npt.NDArray[Any]

_MAIN, _MORE = 3, 2
# share of the output that the columns carry, below and above which a sentence says so
_LITTLE, _MUCH = 0.5, 2.0
_FOR = ("in", "closer", "above", "at", "raised")
_NOTED = 200  # columns of sparse values
_FEW = 20  # rows below which a tenth is too few to speak of


@dataclass(frozen=True)
class Portrait:
    """Why the rows of one group are where they are.

    Attributes
    ----------
    label : Any
        The explained label.
    rows : int
        Rows of the group.
    contrast : Any
        The one competitor, or None.
    claim : str
        "in": the rows are in the explained cluster. "out": they are in others.
        "closer", "farther": they are in others, and closer to the explained
        cluster than to the contrast, or not. Of a value: "above", "below" or
        "at" the reference. Of a density: "rarest", the lowest tenth of at
        least 20 rows; "raised", "lowered", what the columns do on the whole.
    features : tuple of FeatureNote
        All columns, what speaks most for the claim first; of one row among
        others, those that its sentence can name; of sparse values, the 200
        that carry most.
    coverage, output : float
        Medians over the rows.
    single : bool
        Whether it is about one row.
    kind : str
        As in :class:`Explanation`.
    spoken : float
        Sum of the mean relevances that speak for the claim.
    limit : str
        "rarest": no row has a higher output.
    beside : bool
        Whether the rarest rows have a portrait of their own.
    """

    label: Any
    rows: int
    contrast: Any
    claim: str
    features: tuple[FeatureNote, ...]
    coverage: float
    output: float
    single: bool = False
    kind: str = "cluster"
    spoken: float = 0.0
    limit: str = ""
    beside: bool = False

    @property
    def words(self) -> Words:
        """How to speak of it."""
        return words(self.kind)

    @property
    def sign(self) -> int:
        """+1 where positive relevance speaks for the claim, else -1."""
        return 1 if self.claim in _FOR else -1

    @property
    def heading(self) -> str:
        """A few words: "Cluster 2", "Not in cluster 2"."""
        return self.words.heading(self)

    @property
    def sentence(self) -> str:
        """One plain sentence."""
        start, lead, joint = self.words.opening(self)
        said = [f for f in self.features if self.sign * f.relevance > 0]
        if not said:
            return f"{start}: {self.words.silent(self)}."
        main, carried = [], 0.0
        for note in said[:_MAIN]:
            main.append(note)
            carried += abs(note.relevance)
            if carried >= self.spoken / 2:
                break
        more = [f for f in said[len(main) : len(main) + _MORE] if abs(f.relevance) >= 0.05 * self.spoken]
        text = f"{start}{lead} mostly {joint} {self._join(main)}"
        if more:
            text += f", and, to a lesser degree, {joint} {self._join(more)}"
        against = self.features[-1]
        if self.sign * against.relevance < -0.15 * self.spoken:
            stand = f" {against.stand}" if against.stand else ""
            text += f"; {against.name}{stand} {self.words.opposite(self)}"
        return text + self._rest() + "."

    def _rest(self) -> str:
        """A warning where the columns are not what decided."""
        if self.coverage < 0:
            return "; all columns together speak the other way, and what belongs to no column decides"
        if self.coverage < _LITTLE:
            return "; the columns carry the smaller part, the rest belongs to no column"
        if self.coverage > _MUCH:
            return "; what belongs to no column takes most of it back"
        return ""

    def _join(self, notes: Sequence[FeatureNote]) -> str:
        items = [f.reason if self.single else f.phrase for f in notes]
        return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def claims(e: Explanation) -> Array:
    """What can be said of each row, one word of :class:`Portrait` each, (N,)."""
    inside, positive = e.decided == e.target, e.output > 0
    if e.kind == "value":
        return np.where(positive, "above", np.where(e.output < 0, "below", "at"))
    if e.kind == "density":
        return np.where(e.values.sum(1) > 0, "raised", "lowered")
    if e.contrast is None or e.kind == "outlier":
        return np.where(inside, "in", "out")
    return np.where(inside, "in", np.where(positive, "closer", "farther"))


def _groups(e: Explanation) -> Iterator[tuple[Any, Any, str, Array]]:
    """Label, rival, claim and rows (N,) of every group that occurs."""
    if e.kind == "density":
        yield from _by_density(e)
        return
    rivals = [None] if e.contrast is None else np.unique(e.contrast).tolist()
    said = claims(e)
    for label in np.unique(e.target).tolist():
        for rival in rivals:
            asked = e.target == label
            if e.contrast is not None:
                asked = asked & (e.contrast == rival)
            for claim in ("in", "out", "closer", "farther", "above", "at", "below"):
                mine = asked & (said == claim)
                if mine.any():
                    yield label, rival, claim, mine


def _by_density(e: Explanation) -> Iterator[tuple[Any, Any, str, Array]]:
    label = e.target[0]
    rarest = np.zeros(len(e), bool)
    if len(e) >= _FEW:
        place = max(len(e) // 10, 1) - 1
        rarest = e.output <= np.partition(e.output, place)[place]
    if rarest.all():  # all alike
        rarest[:] = False
    if rarest.any():
        yield label, None, "rarest", rarest
    others = ~rarest
    yield label, None, "raised" if e.values[others].sum() > 0 else "lowered", others


def _limit(highest: float) -> str:
    """A number of about three digits that the highest output does not exceed."""
    if not math.isfinite(highest) or highest == 0:
        return significant(highest)
    digits = 2 - math.floor(math.log10(abs(highest)))
    return rounded(math.ceil(highest * 10.0**digits) / 10.0**digits, max(digits, 0))


def _sorted(notes: list[FeatureNote], sign: int) -> tuple[FeatureNote, ...]:
    return tuple(sorted(notes, key=lambda f: -sign * f.relevance))


def describe(explanation: Explanation) -> list[Portrait]:
    """Why rows are in their clusters, or not in the one asked for.

    Parameters
    ----------
    explanation : Explanation

    Returns
    -------
    list of Portrait
        In the order of the labels; one per target, contrast and claim that
        occur. Of a density: the tenth of the rows with the lowest, then the
        others.

    Examples
    --------
    >>> from neuralize import CentroidHead, NeuralizedModel
    >>> net = NeuralizedModel(CentroidHead([[0.0], [10.0]]), feature_names=["age"])
    >>> print(describe(net.explain([[1.0], [2.0], [9.0]]))[0].sentence)
    Cluster 0 (2 rows) is set apart mostly by age below about 5.
    >>> print(describe(net.explain([[9.0]], target=0))[0].sentence)
    This row is not in cluster 0 mostly because age is 9 (above about 5).
    """
    e = explanation
    if len(e) == 1:
        return [of_row(e, 0, whole=True)]
    groups = wordless(e)
    shown = strongest(e, _NOTED)
    values, data, slope, point = _arrays(e, shown)
    named = [e.feature_names[t] for t in shown.tolist()]
    columns = [Column(name, data[:, t], e.categories.get(name), name in groups) for t, name in enumerate(named)]
    found = []
    for label, rival, claim, mine in _groups(e):
        sign = 1 if claim in _FOR else -1
        # columns become contiguous: each is gone through several times
        turned = (np.ascontiguousarray(a[mine].T) for a in (values, data, slope, point))
        notes = [column.rows(sign, *four) for column, *four in zip(columns, *turned, strict=True)]
        output = e.output[mine]
        found.append(
            Portrait(
                label,
                int(mine.sum()),
                rival,
                claim,
                _sorted(notes, sign),
                float(np.median(e.coverage[mine])),
                float(np.median(output)),
                kind=e.kind,
                spoken=sum(max(sign * f.relevance, 0.0) for f in notes),
                limit=_limit(float(output.max())) if claim == "rarest" else "",
                beside=e.kind == "density" and not mine.all(),
            )
        )
    return found


def _arrays(e: Explanation, columns: Array) -> tuple[Array, Array, Array, Array]:
    """Values, data, slopes and break-even points of some columns, each (N, d), as plain arrays."""
    if not hasattr(e.values, "toarray"):
        return e.values, dense(e.data).astype(np.float64, copy=False), e.slope, e.break_even
    slope, point = np.empty((len(e), len(columns))), np.empty((len(e), len(columns)))
    step = max(16, 2**20 // max(e.values.shape[1], 1))
    for start in range(0, len(e), step):
        rows = np.arange(start, min(start + step, len(e)))
        part = take(e, rows)
        slope[rows], point[rows] = part.slope[:, columns], part.break_even[:, columns]
    return dense(e.values[:, columns]), dense(e.data[:, columns]).astype(np.float64), slope, point


def of_row(explanation: Explanation, i: int, whole: bool = False, groups: frozenset[str] | None = None) -> Portrait:
    """Why row ``i`` is where it is.

    Parameters
    ----------
    explanation : Explanation
    i : int
        Its position.
    whole : bool
        Take notes of all columns, not only of those that the sentence can
        name.
    groups : set of str, optional
        Columns without values of their own, found once for many rows.
    """
    groups = wordless(explanation) if groups is None else groups
    one = take(explanation, [i])
    claim = str(claims(one)[0])
    sign = 1 if claim in _FOR else -1
    values = one.values[0]
    order = np.argsort(-sign * values, kind="stable")
    if not whole and len(order) > _MAIN + _MORE + 1:
        order = np.append(order[: _MAIN + _MORE], order[-1])
    return Portrait(
        label=one.target.tolist()[0],
        rows=1,
        contrast=None if one.contrast is None else one.contrast.tolist()[0],
        claim=claim,
        features=tuple(note_of(one, t, sign, one.feature_names[t] in groups) for t in order.tolist()),
        coverage=float(one.coverage[0]),
        output=float(one.output[0]),
        single=True,
        kind=one.kind,
        spoken=float(np.maximum(sign * values, 0).sum()),
    )


def note_of(one: Explanation, t: int, sign: int, group: bool = False) -> FeatureNote:
    """What column ``t`` says about the only row."""
    name, raw = one.feature_names[t], np.asarray(one.data[:, t], dtype=np.float64)
    numbers = (one.values[0, t], raw[0], one.slope[0, t], one.break_even[0, t])
    return Column(name, raw, one.categories.get(name), group).row(sign, *map(float, numbers))
