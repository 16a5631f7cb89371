"""What the evaluations take: tables, relevances, seeds; checked once, in one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrp.errors import ColumnError, InputError, NonFiniteError, RuleError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Floats", "Rows", "choice", "count", "explained", "generator", "relevances"]

Floats = npt.NDArray[np.float64]


def _floats(value: Any, what: str) -> Floats:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise NonFiniteError(
            f"{what} has masked values",
            expected="a number in every cell",
            got=f"{int(np.ma.getmaskarray(value).sum())} masked",
            fix="impute them, or drop these rows",
        )
    if hasattr(value, "columns") and hasattr(value, "iloc"):
        return _frame(value, what)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(
            f"{what} is no table",
            expected="rows of numbers",
            got=str(error),
            fix="give every row the same length",
        ) from error
    if array.dtype.kind not in "fiub":
        raise InputError(
            f"{what} does not hold real numbers",
            expected="float, integer or bool in every column",
            got=f"dtype {array.dtype}",
            fix="encode the table first, for example with net.encode(X)",
        )
    return array.astype(np.float64, copy=False)


def _frame(frame: pd.DataFrame, what: str) -> Floats:
    import pandas as pd

    wrong = [
        f"{str(name)!r} ({dtype})"
        for name, dtype in frame.dtypes.items()
        if not pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_complex_dtype(dtype)
    ]
    if wrong:
        raise InputError(
            f"{what} has columns without numbers",
            expected="real numbers in every column",
            got=", ".join(wrong[:8]),
            fix="encode the table first, for example with net.encode(X)",
        )
    return frame.to_numpy(dtype=np.float64, na_value=np.nan)


def _finite(array: Floats, what: str, names: Iterable[str]) -> None:
    wrong = ~np.isfinite(array)
    if wrong.any():
        rows, columns = np.nonzero(wrong)
        named = list(names)
        where = ", ".join(dict.fromkeys(repr(named[t]) for t in columns[:8].tolist()))
        raise NonFiniteError(
            f"{what} has missing or infinite values",
            expected="finite numbers",
            got=f"{len(rows)} from row {int(rows[0])} on, in column {where}",
            fix="impute them, or drop these rows",
        )


@dataclass(frozen=True)
class Rows:
    """A table of numbers, and how to give rows back in the form they came in.

    Parameters
    ----------
    array : ndarray (N, D)
        float64 and finite.
    columns : Index or None
        Of the frame it came from; None for arrays.
    """

    array: Floats
    columns: pd.Index | None = None

    @classmethod
    def of(cls, X: Any, what: str = "X", features: int | None = None) -> Rows:
        """Check a table.

        Raises
        ------
        InputError
            Not two-dimensional, no rows, no numbers.
        ColumnError
            Not ``features`` columns.
        NonFiniteError
        """
        if isinstance(X, Rows):
            return X
        columns = X.columns if hasattr(X, "columns") and hasattr(X, "iloc") else None
        array = _floats(X, what)
        if array.ndim != 2 or not array.size:
            raise InputError(
                f"{what} is no table",
                expected="at least one row and one column",
                got=f"shape {array.shape}",
                fix="pass X.reshape(1, -1) for one row" if array.ndim == 1 else "check the selection before",
            )
        if features is not None and array.shape[1] != features:
            raise ColumnError(
                f"{what} has the wrong number of columns",
                expected=str(features),
                got=str(array.shape[1]),
                fix="pass the columns the score takes, in its order",
            )
        rows = cls(array, columns)
        _finite(array, what, rows.names)
        return rows

    def __len__(self) -> int:
        return int(self.array.shape[0])

    @property
    def features(self) -> int:
        """D."""
        return int(self.array.shape[1])

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return [f"x{t}" for t in range(self.features)] if self.columns is None else [str(c) for c in self.columns]

    @property
    def scale(self) -> Floats:
        """Standard deviation of every column, (D,); 0 where it is constant."""
        # of values that agree, rounding of the mean must not leave a deviation
        constant = (self.array == self.array[0]).all(0)
        return np.where(constant, 0.0, self.array.std(0))

    def form(self, array: Floats) -> Any:
        """Other rows of these columns: a frame where this came from one."""
        if self.columns is None:
            return array
        import pandas as pd

        return pd.DataFrame(array, columns=self.columns)


def explained(values: Any) -> bool:
    """Whether it is an Explanation rather than a matrix."""
    return hasattr(values, "values") and hasattr(values, "target") and hasattr(values, "decided")


def relevances(values: Any, rows: Rows, what: str = "values") -> Floats:
    """Relevances (N, D) of these rows, from a matrix, a frame or an Explanation.

    Raises
    ------
    InputError
        Another shape than the rows.
    ColumnError
        Columns named otherwise than those of the rows.
    NonFiniteError
    """
    names = getattr(values, "feature_names", None) if explained(values) else getattr(values, "columns", None)
    if names is not None and rows.columns is not None and [str(n) for n in names] != rows.names:
        raise ColumnError(
            f"{what} has other columns than X",
            expected=", ".join(rows.names[:8]),
            got=", ".join(str(n) for n in list(names)[:8]),
            fix="select the columns of X, in their order",
        )
    array = _floats(values.values if explained(values) else values, what)
    if array.shape != rows.array.shape:
        raise InputError(
            f"{what} does not fit X",
            expected=f"one relevance for each cell, {rows.array.shape}",
            got=str(array.shape),
            fix="explain exactly the rows passed as X",
        )
    _finite(array, what, rows.names)
    return array


def choice(value: Any, options: Iterable[Any], what: str) -> Any:
    """One of the options.

    Raises
    ------
    RuleError
    """
    known = list(options)
    if not any(value is o or (isinstance(value, str) and value == o) for o in known):
        raise RuleError(f"unknown {what}", expected=" or ".join(map(repr, known)), got=repr(value), fix="choose one")
    return value


def count(value: Any, what: str, least: int = 1) -> int:
    """An integer of at least ``least``.

    Raises
    ------
    InputError
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(
            f"{what} is no such number", expected=f"an integer >= {least}", got=repr(value), fix="choose one"
        )
    return int(value)


def generator(seed: Any, stream: int) -> np.random.Generator:
    """Random numbers for one purpose: streams of one seed are independent of each other.

    Raises
    ------
    InputError
        If seed is no integer >= 0.
    """
    return np.random.default_rng(np.random.SeedSequence(count(seed, "seed", 0), spawn_key=(stream,)))
