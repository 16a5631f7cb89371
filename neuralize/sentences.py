"""What sets each cluster apart, in sentences that hold.

A column is named with the side of its break-even point that speaks for the
cluster. It is called "above" or "below" only if at least four rows in five
agree on that side; else the cluster lies between others, and only its mean is
given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuralize.explanation import Explanation

__all__ = ["FeatureNote", "Portrait", "describe", "rounded"]

_AGREE = 0.8
_MAIN, _MORE = 3, 2


@dataclass(frozen=True)
class FeatureNote:
    """One column in one cluster.

    Attributes
    ----------
    name : str
    relevance : float
        Mean over the cluster's rows.
    mean : float
        Mean raw value.
    direction : str
        "above", "below", or "around" where rows disagree.
    break_even : float
        Median raw break-even point of the rows with that direction (all rows
        for "around"); NaN if there is none.
    digits : int
        Decimals worth showing.
    """

    name: str
    relevance: float
    mean: float
    direction: str
    break_even: float
    digits: int

    @property
    def phrase(self) -> str:
        """For a sentence: "proline above about 755"."""
        if self.direction == "around" or math.isnan(self.break_even):
            return f"{self.name} around {rounded(self.mean, self.digits)}"
        return f"{self.name} {self.direction} about {rounded(self.break_even, self.digits)}"


@dataclass(frozen=True)
class Portrait:
    """What sets one cluster apart.

    Attributes
    ----------
    label : Any
    rows : int
        Explained rows with this target.
    contrast : Any
        The one competitor, or None.
    features : tuple of FeatureNote
        All columns, most relevant first.
    coverage, output : float
        Medians over the rows.
    """

    label: Any
    rows: int
    contrast: Any
    features: tuple[FeatureNote, ...]
    coverage: float
    output: float

    @property
    def sentence(self) -> str:
        """One plain sentence."""
        count = f"{self.rows:,} row{'s' * (self.rows != 1)}"
        rival = "" if self.contrast is None else f" from cluster {self.contrast}"
        positive = [f for f in self.features if f.relevance > 0]
        total = sum(f.relevance for f in positive)
        if not positive:
            return f"Cluster {self.label} ({count}): no column speaks for it on average."
        main, said = [], 0.0
        for note in positive[:_MAIN]:
            main.append(note)
            said += note.relevance
            if said >= total / 2:
                break
        more = [f for f in positive[len(main) : len(main) + _MORE] if f.relevance >= 0.05 * total]
        text = f"Cluster {self.label} ({count}) is set apart{rival} mostly by {_join([f.phrase for f in main])}"
        if more:
            text += f", and, to a lesser degree, by {_join([f.phrase for f in more])}"
        against = self.features[-1]
        if against.relevance < -0.15 * total:
            text += f"; {against.name} (mean {rounded(against.mean, against.digits)}) speaks against it"
        return text + "."


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def rounded(value: float, digits: int) -> str:
    """Without exponent or trailing zeros; thousands are separated from 10,000 on."""
    if not math.isfinite(value):
        return "-"
    value = round(value, digits) + 0.0
    if value and not 1e-6 <= abs(value) < 1e12:
        return f"{value:.3g}"
    text = f"{value:,.{max(digits, 0)}f}" if abs(value) >= 10_000 else f"{value:.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _digits(spread: float) -> int:
    """Decimals that resolve about a twentieth of the spread."""
    if not (math.isfinite(spread) and spread > 0):
        return 3
    decimals = math.ceil(-math.log10(spread / 20))
    return decimals if decimals >= 0 else decimals + 1


def _note(
    name: str,
    values: npt.NDArray[Any],
    raw: npt.NDArray[Any],
    slope: npt.NDArray[Any],
    point: npt.NDArray[Any],
    digits: int,
) -> FeatureNote:
    up, down = slope > 0, slope < 0
    direction, side = "around", up | down
    if up.mean() >= _AGREE:
        direction, side = "above", up
    elif down.mean() >= _AGREE:
        direction, side = "below", down
    known = point[side & np.isfinite(point)]
    where = float(np.median(known)) if len(known) else math.nan
    mean = float(raw.mean())
    # a positive mean relevance and a mean on the wrong side of the median point would make the sentence false
    if direction != "around" and values.mean() > 0 and (mean - where) * (1 if direction == "above" else -1) <= 0:
        direction = "around"
    return FeatureNote(name, float(values.mean()), mean, direction, where, digits)


def describe(explanation: Explanation) -> list[Portrait]:
    """What sets each explained cluster apart.

    Parameters
    ----------
    explanation : Explanation

    Returns
    -------
    list of Portrait
        In the order of the labels; one per target and contrast that occur.

    Examples
    --------
    >>> from neuralize import CentroidHead, NeuralizedModel
    >>> net = NeuralizedModel(CentroidHead([[0.0], [10.0]]), feature_names=["age"])
    >>> print(describe(net.explain([[1.0], [2.0], [9.0]]))[0].sentence)
    Cluster 0 (2 rows) is set apart mostly by age below about 5.
    """
    data = np.asarray(explanation.data, dtype=np.float64)
    digits = [_digits(float(s)) for s in data.std(0)]
    found = []
    rivals = [None] if explanation.contrast is None else np.unique(explanation.contrast).tolist()
    for label in np.unique(explanation.target).tolist():
        for rival in rivals:
            mine = explanation.target == label
            if explanation.contrast is not None:
                mine = mine & (explanation.contrast == rival)
            if not mine.any():
                continue
            values, raw = explanation.values[mine], data[mine]
            slope, point = explanation.slope[mine], explanation.break_even[mine]
            notes = [
                _note(name, values[:, t], raw[:, t], slope[:, t], point[:, t], digits[t])
                for t, name in enumerate(explanation.feature_names)
            ]
            notes.sort(key=lambda f: -f.relevance)
            coverage, output = np.median(explanation.coverage[mine]), np.median(explanation.output[mine])
            found.append(Portrait(label, int(mine.sum()), rival, tuple(notes), float(coverage), float(output)))
    return found
