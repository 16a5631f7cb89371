r"""What a piecewise linear network says about its borders.

A :class:`Decision` is three things beside names.

``cells(k) -> [(A, b), ...]``
    The region of z-space in which label k wins is the union of the polytopes
    ``{z : A z + b >= 0}``, A (m, d) and b (m,). k-means: one polytope with K-1
    borders. Birch: one per own subcluster. ``[]``: the label never wins.
    ``None``: the borders are curved, and the question is refused by name.
``affine``
    The way from raw rows to z, an :class:`Affine`: elementwise and increasing
    first (``u = transform(x)``, the identity where None), then ``z = T u + t0``.
    Columns of categories are no part of T: what they add to z is found by
    calling ``forward`` with other codes. Within ``low <= u <= high`` the map is
    affine; beyond, a clipping scaler holds z fixed.
``predict(rows) -> positions``
    The network's own decision; it has the last word on every row returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError

__all__ = ["Affine", "Decision", "Reference"]

Floats = npt.NDArray[np.float64]
Cells = list[tuple[Floats, Floats]]


@dataclass(frozen=True)
class Affine:
    """From raw rows x (n, D) to z (n, d): ``z = T transform(x) + t0``.

    Parameters
    ----------
    T, t0 : array (d, D) and (d,)
        Columns of categories are zero.
    forward : callable, optional
        Raw rows to z exactly as the network computes it, categories, missing
        values and clipping included; by default the formula above.
    transform, inverse : callable, optional
        Elementwise and increasing, (n, D) to (n, D); the identity by default.
    low, high : array (D,), optional
        The interval of u on which the formula holds; infinite by default.
    spread : array (D,), optional
        Units of u per scaled unit: what the scalers in front divide by.
    scalers, transformed : str
        Names of the steps behind ``spread`` and ``transform``, for messages.
    closed : mapping of int to str
        Columns that can be held but not moved, and why: asking to move them is
        an error.
    still : tuple of int
        Columns that are never moved: numbers that are read as categories.
    """

    T: Floats
    t0: Floats
    forward: Callable[[Floats], Floats] | None = None
    transform: Callable[[Floats], Floats] | None = None
    inverse: Callable[[Floats], Floats] | None = None
    low: Floats | None = None
    high: Floats | None = None
    spread: Floats | None = None
    scalers: str = ""
    transformed: str = ""
    closed: Mapping[int, str] = field(default_factory=dict)
    still: tuple[int, ...] = ()

    def columns(self, rows: Floats) -> Floats:
        """u (n, D)."""
        return rows if self.transform is None else np.asarray(self.transform(rows), dtype=np.float64)

    def z(self, rows: Floats) -> Floats:
        """z (n, d)."""
        if self.forward is not None:
            return np.asarray(self.forward(rows), dtype=np.float64)
        u = self.columns(rows)
        if self.low is not None or self.high is not None:
            u = np.clip(u, self.low, self.high)
        return np.asarray(u @ np.asarray(self.T).T + self.t0)


@dataclass(frozen=True)
class Reference:
    """What the columns of some rows range over.

    Parameters
    ----------
    spread : array (D,)
        Standard deviations, of u; 0 for a column that does not vary.
    low, high : array (D,)
        Smallest and largest raw values.
    words : str
    """

    spread: Floats
    low: Floats
    high: Floats
    words: str = "the reference rows"

    @classmethod
    def of(cls, rows: npt.ArrayLike, affine: Affine | None = None, words: str = "") -> Reference:
        """Of raw rows (N, D); missing values are left out.

        Raises
        ------
        InputError
            A column without a single value.

        Examples
        --------
        >>> Reference.of([[1.0], [3.0]]).spread.tolist()
        [1.0]
        """
        x = np.asarray(rows, dtype=np.float64)
        if x.ndim != 2 or not len(x) or np.isnan(x).all(0).any():
            raise InputError(
                "reference rows do not fill every column",
                expected="a table with a value in every column",
                got=str(x.shape),
                fix="pass the rows the estimator was fitted on",
            )
        u = x if affine is None else affine.columns(x)
        low, high = np.nanmin(x, 0), np.nanmax(x, 0)
        # the standard deviation of copies of one number may be rounding, not 0
        spread = np.where(low == high, 0.0, np.nanstd(u, 0))
        return cls(spread, low, high, words or f"{len(x):,} reference rows")


@dataclass(frozen=True)
class Decision:
    """What a network says about its borders; see the top of this module.

    Parameters
    ----------
    cells : callable
    affine : Affine
    predict : callable
    labels : array (K,)
    names : tuple of str (D,)
        Raw columns.
    fitted_names : tuple of str, optional
        Names that frames must have; None where the estimator saw none.
    categories : mapping of tuple
        For columns whose data are codes: the category of every code, as it
        stands in the user's table.
    reference : Reference, optional
    source, kind : str
        Of the model, and of its labels: "cluster", "class" or "outlier".
    precision : float
        Relative rounding of ``predict``, such as ``torch.finfo(dtype).eps``.
    """

    cells: Callable[[int], Cells | None]
    affine: Affine
    predict: Callable[[Floats], npt.NDArray[np.int64]]
    labels: npt.NDArray[Any]
    names: tuple[str, ...]
    fitted_names: tuple[str, ...] | None = None
    categories: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reference: Reference | None = None
    source: str = ""
    kind: str = "cluster"
    precision: float = float(np.finfo(np.float64).eps)
