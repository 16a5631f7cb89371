"""What a column says about one row, or about some: by its number, its category, or by being missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Column", "FeatureNote", "rounded", "significant"]

Array = npt.NDArray[Any]

_AGREE, _ENOUGH = 0.8, 0.2
_GROUPED = 10_000
_FAR = 1e6  # times a value: where its break-even point is that far away, it is rounding that puts it there
_SOME = {"above for some": "above", "below for some": "below"}


def rounded(value: float, digits: int, grouped: bool | None = None) -> str:
    """Without exponent or trailing zeros.

    Thousands are separated if ``grouped``; by default from 10,000 on.

    Examples
    --------
    >>> rounded(15432.0, -1), rounded(4.6001, 2)
    ('15,430', '4.6')
    """
    if not math.isfinite(value):
        return "-"
    value = round(value, digits) + 0.0
    if value and not 1e-6 <= abs(value) < 1e12:
        return f"{value:.3g}"
    comma = "," if (abs(value) >= _GROUPED if grouped is None else grouped) else ""
    text = f"{value:{comma}.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits.

    Examples
    --------
    >>> significant(0.012345), significant(-1234.5), significant(float("nan"))
    ('0.0123', '-1230', '-')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return rounded(value, places) if 1e-4 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def resolving(spread: float) -> int:
    """Decimals that resolve about a twentieth of the spread."""
    if not (math.isfinite(spread) and spread > 0):
        return 3
    decimals = math.ceil(-math.log10(spread / 20))
    return decimals if decimals >= 0 else decimals + 1


def _four(value: float) -> int:
    """Decimals of four significant digits."""
    return max(3 - math.floor(math.log10(abs(value))), 0) if value and math.isfinite(value) else 0


def _read(text: str) -> float:
    """The number that a reader sees."""
    return float(text.replace(",", ""))


@dataclass(frozen=True)
class FeatureNote:
    """One column over the rows of one portrait.

    Attributes
    ----------
    name : str
    relevance : float
        Mean over the rows; positive speaks for the explained label.
    mean : float
        Mean raw value of the rows that have one; NaN for categories.
    direction : str
        Side of the break-even point that speaks for what the portrait claims:
        "above", "below". Where no side can be stated: "around" the mean;
        "far" from the median of the table; "above for some", "below for some"
        where that carries most and is commoner than in the whole table;
        "spread" if only a mean can be given. "category" and "missing" for what
        they say; "group" for columns without values of their own.
    break_even : float
        Median raw break-even point of the rows with that direction (all rows
        if there is none); NaN if there is none.
    digits : int
        Decimals worth showing.
    grouped : bool or None
        Whether the column's thousands are separated; None: from 10,000 on.
    middle : float
        Median of the table, where the direction is "far".
    category : str
        Of a column of categories: the one that carries most of the relevance.
    share : float
        Share of the rows with that category, without a value, or on the side
        that some are on.
    single : bool
        Whether it is about one row.
    """

    name: str
    relevance: float
    mean: float
    direction: str
    break_even: float
    digits: int
    grouped: bool | None = None
    middle: float = math.nan
    category: str = ""
    share: float = math.nan
    single: bool = False

    def text(self, value: float) -> str:
        """A value of this column, rounded."""
        return rounded(value, self.digits, self.grouped)

    @property
    def side(self) -> str:
        """The direction with its point: "above about 755"; empty where there is no side."""
        known = self.direction in ("above", "below")
        return f"{self.direction} about {self.text(self.break_even)}" if known else ""

    @property
    def phrase(self) -> str:
        """For a sentence about several rows: "proline above about 755", "housing mostly own (62 %)"."""
        if self.direction == "group":
            return self.name
        if self.direction in ("category", "missing"):
            what = self.category or "missing"
            if self.share == 1:
                return f"{self.name} {what}"
            percent = _percent(self.share)
            return f"{self.name} mostly {what} ({percent} %)" if percent > 50 else f"{self.name} {what} in {percent} %"
        if self.direction == "far":
            return f"{self.name} far from {self.text(self.middle)} (its median)"
        if self.direction in _SOME:
            point = self.text(self.break_even)
            return f"{self.name} {_SOME[self.direction]} about {point} for {_percent(self.share)} % of them"
        return f"{self.name} {self.side or ('around ' + self.value if self.direction == 'around' else self.stand)}"

    @property
    def reason(self) -> str:
        """For a sentence about one row: "proline is 1065 (above about 755)", "age is missing"."""
        if self.direction == "group":
            return f"{self.name} points there"
        return f"{self.name} is {self.value}" + (f" ({self.side})" if self.side else "")

    @property
    def value(self) -> str:
        """What the rows have: a rounded mean, a category with its share, "missing", or a dash."""
        if self.direction == "group":
            return "-"
        if self.direction in ("category", "missing"):
            what = self.category or "missing"
            return what if self.single or self.share == 1 else f"{what} ({_percent(self.share)} %)"
        return rounded(self.mean, max(self.digits, _four(self.mean)) if self.single else self.digits, self.grouped)

    @property
    def stand(self) -> str:
        """The value, in parentheses: "(1065)", "(mean 755)", "(own in 62 %)"; empty for a group."""
        if self.direction == "group":
            return ""
        if self.direction in ("category", "missing"):
            what = self.category or "missing"
            return f"({what})" if self.single or self.share == 1 else f"({what} in {_percent(self.share)} %)"
        return f"({self.value})" if self.single else f"(mean {self.value})"

    @property
    def point(self) -> str:
        """The side for a table: "above 755"; a dash where there is none."""
        if self.direction in _SOME:
            return f"{_SOME[self.direction]} {self.text(self.break_even)} ({_percent(self.share)} %)"
        return f"{self.direction} {self.text(self.break_even)}" if self.side else "-"


def _percent(share: float) -> int:
    """Never "all" or "none" where there are others."""
    return min(max(round(100 * share), 1), 99)


class Column:
    """One column of the whole table.

    Parameters
    ----------
    name : str
    raw : ndarray (N,)
        Its values; NaN where they are missing.
    names : tuple of str, optional
        Names of the codes, for a column of categories.
    group : bool
        Whether it has no values of its own.
    """

    def __init__(self, name: str, raw: Array, names: tuple[str, ...] | None = None, group: bool = False) -> None:
        self.name, self.raw, self.names, self.group = name, raw, names, group

    @cached_property
    def known(self) -> Array:
        """The values that are there."""
        there = ~np.isnan(self.raw)
        return self.raw if there.all() else self.raw[there]

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest value."""
        return (float(self.known.min()), float(self.known.max())) if len(self.known) else (math.nan, math.nan)

    @cached_property
    def spread(self) -> float:
        """Standard deviation; 0 if there is nothing."""
        return float(self.known.std()) if len(self.known) else 0.0

    @cached_property
    def grouped(self) -> bool:
        """Whether thousands are separated."""
        return max(map(abs, self.ends)) >= _GROUPED

    @cached_property
    def middle(self) -> tuple[float, float]:
        """The median, and the median distance from it as it is printed."""
        median = float(np.median(self.known))
        return median, float(np.median(np.abs(self.known - _read(rounded(median, resolving(self.spread), False)))))

    def category(self, code: float) -> str:
        """The name of a code; empty if it is missing."""
        assert self.names is not None
        if math.isnan(code):
            return ""
        place = int(code)
        return str(self.names[place]) if place == code and 0 <= place < len(self.names) else f"unknown ({code:g})"

    # ------------------------------------------------------------------ one row

    def row(self, sign: int, relevance: float, raw: float, slope: float, point: float) -> FeatureNote:
        """Of one row; ``sign`` is +1 where positive relevance speaks for the claim, else -1."""
        if self.group:
            return FeatureNote(self.name, relevance, math.nan, "group", math.nan, 3, single=True)
        if self.names is not None or math.isnan(raw):
            category = "" if self.names is None else self.category(raw)
            direction = "category" if category else "missing"
            return FeatureNote(
                self.name, relevance, math.nan, direction, math.nan, 3, category=category, share=1.0, single=True
            )
        direction = "above" if sign * slope > 0 else "below" if sign * slope < 0 else "around"
        # one row has no spread; its distance to the point must show
        digits = resolving(abs(raw - point)) if math.isfinite(point) else _four(raw)
        if direction != "around":
            ahead = math.nan
            if abs(point - raw) <= _FAR * abs(raw) or (raw == 0 and math.isfinite(point)):
                ahead = _read(rounded(raw, max(digits, _four(raw)), False)) - _read(rounded(point, digits, False))
            # a column that speaks against the claim has its row on the other side
            wanted = 1 if (direction == "above") == (sign * relevance > 0) else -1
            if not wanted * ahead > 0:
                direction = "around"
        return FeatureNote(self.name, relevance, raw, direction, point, digits, single=True)

    # ------------------------------------------------------------------ some rows

    def rows(self, sign: int, values: Array, raw: Array, slope: Array, point: Array) -> FeatureNote:
        """Of some rows; all arrays are (n,)."""
        relevance = float(values.mean())
        if self.group:
            return FeatureNote(self.name, relevance, math.nan, "group", math.nan, 3)
        if self.names is not None:
            return self._categories(relevance, values, raw)
        gone = np.isnan(raw)
        some = bool(gone.any())
        if some:
            lead = values[gone].sum() - values[~gone].sum()
            if gone.all() or lead * relevance > 0:
                return self._gone(relevance, float(gone.mean()))
        there = ~gone if some else slice(None)
        up, down = sign * slope[there] > 0, sign * slope[there] < 0
        direction, side = "around", up | down
        if up.mean() >= _AGREE:
            direction, side = "above", up
        elif down.mean() >= _AGREE:
            direction, side = "below", down
        found = point[there][side & np.isfinite(point[there])]
        where, mean = float(np.median(found)) if len(found) else math.nan, float(raw[there].mean())
        digits = resolving(self.spread) if self.spread else _four(mean)
        speaks = sign * relevance > 0
        middle = math.nan
        if direction != "around" and not self._holds(direction, where, digits, raw, speaks):
            direction = "around"
        elif direction == "around" and speaks and self._far(values * sign, raw):
            direction, middle = "far", self.middle[0]
        share = math.nan
        if direction == "around" and raw[there].std() > 1.000001 * self.spread:
            direction = "spread"
            if speaks:
                direction, where, share = self._some(sign * values, raw, sign * slope, point, where)
        return FeatureNote(self.name, relevance, mean, direction, where, digits, self.grouped, middle, share=share)

    def _holds(self, direction: str, where: float, digits: int, raw: Array, speaks: bool) -> bool:
        """Whether "above (or below) about ``where``" is true of these rows, with the number as it is printed."""
        if math.isnan(where):
            return False
        shown = _read(rounded(where, digits, False))
        ahead = raw - shown if direction == "above" else shown - raw
        # a column that speaks against the claim has its rows on the other side, and that is what the sentence says
        most = (ahead > 0).mean() > 0.5 and np.nanmean(ahead) > 0
        return bool((most or not speaks) and self.ends[0] <= shown <= self.ends[1])

    def _far(self, speaking: Array, raw: Array) -> bool:
        """Whether most rows speak for it, and lie farther from the table's median than its median row."""
        if not (speaking > 0).mean() > 0.5:
            return False
        median, usual = self.middle
        shown = _read(rounded(median, resolving(self.spread), False))
        return bool((np.abs(raw - shown) > usual).mean() > 0.5)

    def _some(self, speaking: Array, raw: Array, slope: Array, point: Array, where: float) -> tuple[str, float, float]:
        """The side on which most of it speaks, if enough of the rows are there; direction, point and share."""
        mine = (speaking > 0) & np.isfinite(point)
        parts = {"above for some": mine & (slope > 0), "below for some": mine & (slope < 0)}
        direction = max(parts, key=lambda d: float(speaking[parts[d]].sum()))
        if parts[direction].any():
            found = float(np.median(point[parts[direction]]))
            shown = _read(rounded(found, resolving(self.spread), False))
            up = direction == "above for some"
            share = float(((raw > shown) if up else (raw < shown)).mean())
            usual = float(((self.known > shown) if up else (self.known < shown)).mean())
            if share >= _ENOUGH and share > usual and self.ends[0] <= shown <= self.ends[1]:
                return direction, found, share
        return "spread", where, math.nan

    def _gone(self, relevance: float, share: float) -> FeatureNote:
        return FeatureNote(self.name, relevance, math.nan, "missing", math.nan, 3, share=share)

    def _categories(self, relevance: float, values: Array, raw: Array) -> FeatureNote:
        codes, which = np.unique(raw, return_inverse=True)
        carried = np.bincount(which, weights=values, minlength=len(codes))
        counts = np.bincount(which, minlength=len(codes))
        # the category that says what the column says; the commonest where it says nothing
        best = int((carried * np.sign(relevance)).argmax() if relevance else counts.argmax())
        category, share = self.category(float(codes[best])), float(counts[best] / len(raw))
        if not category:
            return self._gone(relevance, share)
        return FeatureNote(self.name, relevance, math.nan, "category", math.nan, 3, category=category, share=share)
