r"""Numbers with their errors.

Rows are the sampling unit. A mean over rows has the standard error
:math:`s/\sqrt N`; a ratio of means :math:`r = \bar a/\bar b` that of its
linear expansion, :math:`s(a_i - r b_i)/(\sqrt N\,\bar b)`. Both hold for the
model, the imputer and its reference rows as they are: another fit may differ
by more. With a single row there is no such error, and it is NaN, not 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from lrp.errors import InputError
from neuralize.evaluation._rows import Floats, choice

__all__ = ["Estimate", "deviation", "mean_of", "normalised"]


class Estimate(NamedTuple):
    """A mean over rows, and how well it is known.

    Parameters
    ----------
    value : float
    standard_error : float
        Over rows; it contains the imputer's noise. NaN for one row.
    spread : float
        Standard deviation between the imputer's draws, each over all rows:
        divided by the root of their number, the part of the error that more
        draws would remove. NaN where there is one draw, or nothing random.
    """

    value: float
    standard_error: float
    spread: float = math.nan

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.standard_error:.2g}"


def deviation(sample: Floats) -> float:
    """Sample standard deviation; NaN of fewer than two, exactly 0 of equal ones."""
    if len(sample) < 2:
        return math.nan
    return 0.0 if (sample == sample[0]).all() else float(np.std(sample, ddof=1))


def mean_of(sample: Floats, replicates: Floats | None = None) -> Estimate:
    """Mean (N,) -> its estimate; replicates (draws,) give the spread."""
    spread = math.nan if replicates is None else deviation(replicates)
    return Estimate(float(sample.mean()), deviation(sample) / math.sqrt(len(sample)), spread)


def normalised(areas: Floats, start: Floats, replicates: Floats, normalise: str | None) -> tuple[Estimate, Floats]:
    """Areas in units of the constant start.

    Parameters
    ----------
    areas, start : ndarray (N,)
    replicates : ndarray (draws,)
        Areas of single draws, means over the rows; for "row" after division
        by each row's start.
    normalise : "mean", "row" or None
        By the mean magnitude of the start, by each row's own, or not at all.

    Returns
    -------
    estimate : Estimate
    rows : ndarray (N,)
        Contributions of the rows; their mean is the value.

    Raises
    ------
    InputError
        Where the start is 0, so that nothing can be measured in units of it.
    """
    choice(normalise, ("mean", "row", None), "normalise")
    if normalise is None:
        return mean_of(areas, replicates), areas
    size = np.abs(start)
    if not (size.any() if normalise == "mean" else size.all()):
        raise InputError(
            "the score starts at 0, which can not be the unit of an area",
            expected="a score that is not 0 before anything is removed",
            got=f"0 in {int((size == 0).sum())} of {len(size)} rows",
            fix="normalise='mean' allows single rows at 0; normalise=None leaves the unit of the score",
        )
    if normalise == "row":
        rows = areas / size
        return mean_of(rows, replicates), rows
    unit = float(size.mean())
    rows = areas / unit
    value = float(rows.mean())
    error = deviation((areas - value * size) / unit) / math.sqrt(len(areas))
    return Estimate(value, error, deviation(replicates / unit)), rows
