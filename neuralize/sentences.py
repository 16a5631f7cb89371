"""What sets each cluster apart, in sentences that hold.

A column is named with the side of its break-even point that speaks for what
the sentence says. It is called "above" or "below" only if at least four rows
in five agree on that side, if more than half of them lie on that side of the
printed number, and if that number lies within the table; else only the mean is
given. Rows of the explained cluster and rows of others never share a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralize.explanation import Explanation

__all__ = ["FeatureNote", "Portrait", "describe", "rounded"]

_AGREE = 0.8
_MAIN, _MORE = 3, 2
_GROUPED = 10_000


@dataclass(frozen=True)
class FeatureNote:
    """One column over the rows of one portrait.

    Attributes
    ----------
    name : str
    relevance : float
        Mean over the rows; positive speaks for the explained cluster.
    mean : float
        Mean raw value.
    direction : str
        Side of the break-even point that speaks for what the portrait claims:
        "above", "below", or "around" where no side can be stated.
    break_even : float
        Median raw break-even point of the rows with that direction (all rows
        for "around"); NaN if there is none.
    digits : int
        Decimals worth showing.
    grouped : bool or None
        Whether the column's thousands are separated; None: from 10,000 on.
    """

    name: str
    relevance: float
    mean: float
    direction: str
    break_even: float
    digits: int
    grouped: bool | None = None

    def text(self, value: float) -> str:
        """A value of this column, rounded."""
        return rounded(value, self.digits, self.grouped)

    @property
    def side(self) -> str:
        """The direction with its point: "above about 755"; empty for "around"."""
        return "" if self.direction == "around" else f"{self.direction} about {self.text(self.break_even)}"

    @property
    def phrase(self) -> str:
        """For a sentence about several rows: "proline above about 755"."""
        return f"{self.name} {self.side or f'around {self.text(self.mean)}'}"

    @property
    def reason(self) -> str:
        """For a sentence about one row: "proline is 1065 (above about 755)"."""
        value = rounded(self.mean, max(self.digits, 0), self.grouped)
        return f"{self.name} is {value}" + (f" ({self.side})" if self.side else "")


@dataclass(frozen=True)
class Portrait:
    """Why the rows of one group are where they are.

    Attributes
    ----------
    label : Any
        The explained cluster.
    rows : int
        Rows of the group.
    contrast : Any
        The one competitor, or None.
    claim : str
        "in": the rows are in the explained cluster. "out": they are in others.
        "closer", "farther": they are in others, and closer to the explained
        cluster than to the contrast, or not.
    features : tuple of FeatureNote
        All columns; what speaks most for the claim first.
    coverage, output : float
        Medians over the rows.
    single : bool
        Whether the table has one row only.
    """

    label: Any
    rows: int
    contrast: Any
    claim: str
    features: tuple[FeatureNote, ...]
    coverage: float
    output: float
    single: bool = False

    @property
    def sign(self) -> int:
        """+1 where positive relevance speaks for the claim, else -1."""
        return 1 if self.claim in ("in", "closer") else -1

    @property
    def heading(self) -> str:
        """A few words: "Cluster 2", "Not in cluster 2"."""
        if self.claim == "in":
            return f"Cluster {self.label}" + ("" if self.contrast is None else f" rather than cluster {self.contrast}")
        return f"Not in cluster {self.label}" if self.claim == "out" else f"Closer to {self._order}"

    @property
    def _order(self) -> str:
        near, far = (self.label, self.contrast) if self.claim == "closer" else (self.contrast, self.label)
        return f"cluster {near} than to cluster {far}"

    @property
    def sentence(self) -> str:
        """One plain sentence."""
        start, joint = self._opening()
        said = [f for f in self.features if self.sign * f.relevance > 0]
        total = sum(abs(f.relevance) for f in said)
        if not said:
            side = "against" if self.claim == "out" else "for"
            return f"{start}: no column speaks {side} it on average."
        main, carried = [], 0.0
        for note in said[:_MAIN]:
            main.append(note)
            carried += abs(note.relevance)
            if carried >= total / 2:
                break
        more = [f for f in said[len(main) : len(main) + _MORE] if abs(f.relevance) >= 0.05 * total]
        comma = "," if self.claim != "in" and not self.single else ""
        lead = " is set apart" + ("" if self.contrast is None else f" from cluster {self.contrast}")
        text = start + (lead if joint == "by" else "") + f"{comma} mostly {joint} {self._join(main)}"
        if more:
            text += f", and, to a lesser degree, {joint} {self._join(more)}"
        against = self.features[-1]
        if self.sign * against.relevance < -0.15 * total:
            value = against.text(against.mean)
            text += f"; {against.name} ({value if self.single else f'mean {value}'}) speaks {self._opposite()}"
        return text + "."

    def _opening(self) -> tuple[str, str]:
        """Subject, and the word that leads to the reasons."""
        joint = "because" if self.single else "because of"
        who = "This row is" if self.single else f"{_count(self.rows)} {'is' if self.rows == 1 else 'are'}"
        if self.claim == "in" and not self.single:
            return f"Cluster {self.label} ({_count(self.rows)})", "by"
        if self.claim == "in":
            rival = "" if self.contrast is None else f" rather than in cluster {self.contrast}"
            return f"{who} in cluster {self.label}{rival}", joint
        return (
            f"{who} {'not in cluster ' + str(self.label) if self.claim == 'out' else 'closer to ' + self._order}",
            joint,
        )

    def _opposite(self) -> str:
        if self.claim in ("in", "closer"):
            return "against it"
        return f"for cluster {self.label}"

    def _join(self, notes: list[FeatureNote]) -> str:
        items = [f.reason if self.single else f.phrase for f in notes]
        return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _count(rows: int) -> str:
    return f"{rows:,} row{'s' * (rows != 1)}"


def rounded(value: float, digits: int, grouped: bool | None = None) -> str:
    """Without exponent or trailing zeros.

    Thousands are separated if ``grouped``; by default from 10,000 on.
    """
    if not math.isfinite(value):
        return "-"
    value = round(value, digits) + 0.0
    if value and not 1e-6 <= abs(value) < 1e12:
        return f"{value:.3g}"
    comma = "," if (abs(value) >= _GROUPED if grouped is None else grouped) else ""
    text = f"{value:{comma}.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _digits(spread: float) -> int:
    """Decimals that resolve about a twentieth of the spread."""
    if not (math.isfinite(spread) and spread > 0):
        return 3
    decimals = math.ceil(-math.log10(spread / 20))
    return decimals if decimals >= 0 else decimals + 1


@dataclass(frozen=True)
class _Column:
    """One column of the whole table."""

    name: str
    low: float
    high: float
    spread: float

    @property
    def grouped(self) -> bool:
        return max(abs(self.low), abs(self.high)) >= _GROUPED

    def note(
        self,
        sign: int,
        values: npt.NDArray[Any],
        raw: npt.NDArray[Any],
        slope: npt.NDArray[Any],
        point: npt.NDArray[Any],
        single: bool,
    ) -> FeatureNote:
        """Of some rows; all arrays are (n,)."""
        up, down = sign * slope > 0, sign * slope < 0
        direction, side = "around", up | down
        if up.mean() >= _AGREE:
            direction, side = "above", up
        elif down.mean() >= _AGREE:
            direction, side = "below", down
        known = point[side & np.isfinite(point)]
        where, mean, relevance = float(np.median(known)) if len(known) else math.nan, float(raw.mean()), values.mean()
        # one row has no spread; its distance to the point must show
        digits = _digits(abs(mean - where) if single else self.spread)
        if direction != "around" and not self._holds(direction, where, digits, raw, sign * relevance > 0, single):
            direction = "around"
        return FeatureNote(
            self.name, float(relevance), mean, direction, where, digits, None if single else self.grouped
        )

    def _holds(
        self, direction: str, where: float, digits: int, raw: npt.NDArray[Any], speaks: bool, single: bool
    ) -> bool:
        """Whether "above (or below) about ``where``" is true of these rows, with the number as it is printed."""
        if math.isnan(where):
            return False
        shown = float(rounded(where, digits, False))
        ahead = raw - shown if direction == "above" else shown - raw
        # a column that speaks against the claim has its rows on the other side, and that is what the sentence says
        most = (ahead > 0).mean() > 0.5 and (ahead.mean() > 0)
        return bool((most or not speaks) and (single or self.low <= shown <= self.high))


def _groups(e: Explanation) -> Iterator[tuple[Any, Any, str, npt.NDArray[Any]]]:
    """Label, rival, claim and rows (N,) of every group that occurs."""
    rivals = [None] if e.contrast is None else np.unique(e.contrast).tolist()
    member = e.decided == e.target
    for label in np.unique(e.target).tolist():
        for rival in rivals:
            asked = e.target == label
            if e.contrast is None:
                claims = {"in": member, "out": ~member}
            else:
                asked = asked & (e.contrast == rival)
                claims = {"in": member, "closer": ~member & (e.output > 0), "farther": ~member & (e.output <= 0)}
            for claim, where in claims.items():
                mine = asked & where
                if mine.any():
                    yield label, rival, claim, mine


def describe(explanation: Explanation) -> list[Portrait]:
    """Why rows are in their clusters, or not in the one asked for.

    Parameters
    ----------
    explanation : Explanation

    Returns
    -------
    list of Portrait
        In the order of the labels; one per target, contrast and claim that
        occur.

    Examples
    --------
    >>> from neuralize import CentroidHead, NeuralizedModel
    >>> net = NeuralizedModel(CentroidHead([[0.0], [10.0]]), feature_names=["age"])
    >>> print(describe(net.explain([[1.0], [2.0], [9.0]]))[0].sentence)
    Cluster 0 (2 rows) is set apart mostly by age below about 5.
    >>> print(describe(net.explain([[9.0]], target=0))[0].sentence)
    This row is not in cluster 0 mostly because age is 9 (above about 5).
    """
    data = np.asarray(explanation.data, dtype=np.float64)
    single = len(explanation) == 1
    ends = zip(data.min(0).tolist(), data.max(0).tolist(), data.std(0).tolist(), strict=True)
    columns = [_Column(name, *three) for name, three in zip(explanation.feature_names, ends, strict=True)]
    found = []
    for label, rival, claim, mine in _groups(explanation):
        sign = 1 if claim in ("in", "closer") else -1
        values, raw = explanation.values[mine], data[mine]
        slope, point = explanation.slope[mine], explanation.break_even[mine]
        notes = [
            column.note(sign, values[:, t], raw[:, t], slope[:, t], point[:, t], single)
            for t, column in enumerate(columns)
        ]
        notes.sort(key=lambda f: -sign * f.relevance)
        coverage, output = np.median(explanation.coverage[mine]), np.median(explanation.output[mine])
        found.append(
            Portrait(label, int(mine.sum()), rival, claim, tuple(notes), float(coverage), float(output), single)
        )
    return found
