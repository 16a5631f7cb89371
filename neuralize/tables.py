"""Tables: what users pass as X, checked and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from lrp.errors import ColumnError, InputError, NonFiniteError

__all__ = [
    "Table",
    "check_array",
    "check_names",
    "few",
    "is_frame",
    "non_finite",
    "pandas_frame",
    "real_numbers",
    "table",
]


@dataclass(frozen=True)
class Table:
    """Numbers with the names of their columns.

    Parameters
    ----------
    array : ndarray or CSR (N, D)
        Of a real dtype; the caller's memory wherever it can be.
    names : tuple of str
        Names of the columns.
    index : Any
        Row labels of a frame, or None.
    """

    array: Any
    names: tuple[str, ...]
    index: Any = None

    def __len__(self) -> int:
        return int(self.array.shape[0])


def few(items: Sequence[str], limit: int = 8) -> str:
    """The first items, quoted, and how many more there are."""
    shown = ", ".join(repr(i) for i in items[:limit])
    return shown + (f" and {len(items) - limit} more" if len(items) > limit else "")


def check_names(came: list[str], fitted: tuple[str, ...]) -> None:
    """Raise ``ColumnError`` where columns are missing, surplus, double or in another order."""
    missing = [n for n in fitted if n not in set(came)]
    surplus = [n for n in came if n not in set(fitted)]
    if missing or surplus:
        parts = [f"missing: {few(missing)}"] * bool(missing) + [f"not seen in fit: {few(surplus)}"] * bool(surplus)
        raise ColumnError(
            "the columns are not those the estimator was fitted with",
            expected=f"{len(fitted)} columns: {few(fitted)}",
            got="; ".join(parts),
            fix="pass X[list(estimator.feature_names_in_)]",
        )
    if len(came) != len(fitted):
        twice = sorted({n for n in came if came.count(n) > 1})
        raise ColumnError("columns appear twice", expected="one column per name", got=few(twice), fix="drop the copies")
    if tuple(came) != fitted:
        first = next(i for i, (a, b) in enumerate(zip(came, fitted, strict=True)) if a != b)
        raise ColumnError(
            "the columns are in another order than in fit",
            expected=f"{fitted[first]!r} in position {first}",
            got=repr(came[first]),
            fix="pass X[list(estimator.feature_names_in_)]",
        )


def pandas_frame(X: Any) -> Any:
    """A frame of any library as one of pandas."""
    import pandas as pd

    if isinstance(X, pd.DataFrame):
        return X
    return X.to_pandas() if hasattr(X, "to_pandas") else pd.DataFrame(X.to_dict(as_series=False))


def is_frame(X: Any) -> bool:
    """Whether a table knows its columns by name: pandas, polars, pyarrow."""
    return hasattr(X, "columns") and (hasattr(X, "iloc") or hasattr(X, "to_dict") or hasattr(X, "to_pandas"))


def real_numbers(values: Any) -> npt.NDArray[np.float64] | None:
    """A column as float64, NaN where it is missing; None if it does not hold real numbers.

    Parameters
    ----------
    values : Series or ndarray (N,)
        Of numbers, truth values, categories that are numbers, or such objects.
    """
    import pandas as pd

    series = values if isinstance(values, pd.Series) else pd.Series(values)
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    if pd.api.types.is_complex_dtype(series.dtype):
        return None
    if not pd.api.types.is_numeric_dtype(series.dtype):
        kind = pd.api.types.infer_dtype(series, skipna=True)
        if kind not in ("integer", "floating", "mixed-integer-float", "boolean", "decimal", "empty"):
            return None
        series = series.astype(object)
    return np.asarray(series.to_numpy(dtype=np.float64, na_value=np.nan))


def _frame(X: Any) -> tuple[npt.NDArray[Any], list[str]]:
    import pandas as pd

    frame = pandas_frame(X)
    names = [str(c) for c in frame.columns]
    wrong = [
        f"{name} ({dtype})"
        for name, dtype in zip(names, frame.dtypes, strict=True)
        if not (pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype))
    ]
    if wrong:
        raise InputError(
            "columns without numbers",
            expected="real numbers in every column",
            got=few(wrong),
            fix="encode or drop these columns, as in the table the estimator was fitted with",
        )
    if all(isinstance(dtype, np.dtype) for dtype in frame.dtypes):
        array = frame.to_numpy()
        # numpy has no common type for numbers beside truth values
        return (frame.to_numpy(dtype=np.float64) if array.dtype == object else array), names
    return frame.to_numpy(dtype=np.float64, na_value=np.nan), names


def check_array(shape: tuple[int, ...], features: int, empty: bool = False) -> None:
    """Raise where a table of this shape is not (N, features), N > 0.

    Raises
    ------
    InputError
        Not two-dimensional; no rows, unless ``empty``.
    ColumnError
        Another number of columns.
    """
    if len(shape) != 2:
        raise InputError(
            f"X has {len(shape)} dimension{'s' * (len(shape) != 1)}",
            expected=f"(rows, {features})",
            got=str(shape),
            fix="pass X.reshape(1, -1) for one row" if len(shape) == 1 else "pass a table",
        )
    if shape[1] != features:
        raise ColumnError(
            "X has the wrong number of columns",
            expected=str(features),
            got=str(shape[1]),
            fix="pass the columns the estimator was fitted with",
        )
    if not shape[0] and not empty:
        raise InputError("X has no rows", expected="at least one row", got=str(shape), fix="check the filter before")


def table(X: Any, features: int, fitted_names: tuple[str, ...] | None, empty: bool = False) -> Table:
    """Check a table and name its columns; the numbers themselves are checked in batches.

    Parameters
    ----------
    X : array-like or DataFrame (N, D)
    features : int
        D.
    fitted_names : tuple of str or None
        Column names seen in fit; frames must have these, in this order.
    empty : bool
        Whether no rows are allowed.

    Raises
    ------
    InputError
        Not two-dimensional, no rows, no numbers.
    ColumnError
        Missing, surplus or re-ordered columns.
    """
    index = None
    names: list[str] | None = None
    array: Any
    if is_frame(X):
        index = X.index if hasattr(X, "iloc") else None
        array, names = _frame(X)
        if fitted_names is not None:
            check_names(names, fitted_names)
    elif scipy.sparse.issparse(X):
        array = X.tocsr()
    else:
        if hasattr(X, "detach"):
            X = X.detach().cpu().numpy()
        if isinstance(X, np.ma.MaskedArray) and np.ma.is_masked(X):
            raise NonFiniteError(
                "X has masked values",
                expected="a number in every cell",
                got=f"{int(np.ma.getmaskarray(X).sum())} masked",
                fix="impute or drop the rows",
            )
        try:
            array = np.asarray(X)
        except ValueError as error:
            raise InputError(
                "X is no table",
                expected=f"rows of {features} numbers",
                got=str(error),
                fix="give every row the same length",
            ) from error
    if array.ndim != 2:
        check_array(array.shape, features, empty)
    if array.dtype.kind not in "fiub":
        raise InputError(
            "X does not hold real numbers",
            expected="float, integer or bool",
            got=f"dtype {array.dtype}",
            fix="convert the columns first, for example X.astype(float)",
        )
    check_array(array.shape, features, empty)
    if names is None:
        names = list(fitted_names) if fitted_names is not None else [f"x{t}" for t in range(features)]
    return Table(array, tuple(names), index)


def non_finite(
    chunk: npt.NDArray[Any], names: Sequence[str], first_row: int, nullable: Sequence[bool] | None = None
) -> NonFiniteError:
    """The error for a batch whose outputs are not finite: it names the cells, or the overflow.

    Missing values in ``nullable`` columns are not the reason.
    """
    numbers = np.asarray(chunk, dtype=np.float64)
    wrong = ~np.isfinite(numbers)
    if nullable is not None:
        wrong &= ~(np.isnan(numbers) & np.asarray(nullable, dtype=bool))
    rows, columns = np.nonzero(wrong)
    if len(rows):
        where = few([names[t] for t in dict.fromkeys(columns.tolist())])
        return NonFiniteError(
            "X has missing or infinite values",
            expected="finite numbers",
            got=f"{len(rows)} from row {first_row + int(rows[0])} on, in column {where}",
            fix="impute them in the pipeline the estimator is fitted with, or drop these rows",
        )
    return NonFiniteError(
        "squared distances overflow",
        expected="numbers whose squares are finite in the network's precision",
        got=f"absolute values up to {float(np.abs(chunk).max()):.3g} in the rows from {first_row} on",
        fix="rescale the table before fitting, or use net.double()",
    )
