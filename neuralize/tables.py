"""Tables: what users pass as X, checked and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lrp.errors import ColumnError, InputError, NonFiniteError

__all__ = ["Table", "non_finite", "table"]


@dataclass(frozen=True)
class Table:
    """Numbers with the names of their columns.

    Parameters
    ----------
    array : ndarray (N, D)
        Of a real dtype; the caller's memory wherever it can be.
    names : tuple of str
        Names of the columns.
    index : Any
        Row labels of a frame, or None.
    """

    array: npt.NDArray[Any]
    names: tuple[str, ...]
    index: Any = None

    def __len__(self) -> int:
        return int(self.array.shape[0])


def _few(items: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(repr(i) for i in items[:limit])
    return shown + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _check_names(came: list[str], fitted: tuple[str, ...]) -> None:
    missing = [n for n in fitted if n not in set(came)]
    surplus = [n for n in came if n not in set(fitted)]
    if missing or surplus:
        parts = [f"missing: {_few(missing)}"] * bool(missing) + [f"not seen in fit: {_few(surplus)}"] * bool(surplus)
        raise ColumnError(
            "the columns are not those the estimator was fitted with",
            expected=f"{len(fitted)} columns: {_few(fitted)}",
            got="; ".join(parts),
            fix="pass X[list(estimator.feature_names_in_)]",
        )
    if len(came) != len(fitted):
        twice = sorted({n for n in came if came.count(n) > 1})
        raise ColumnError(
            "columns appear twice", expected="one column per name", got=_few(twice), fix="drop the copies"
        )
    if tuple(came) != fitted:
        first = next(i for i, (a, b) in enumerate(zip(came, fitted, strict=True)) if a != b)
        raise ColumnError(
            "the columns are in another order than in fit",
            expected=f"{fitted[first]!r} in position {first}",
            got=repr(came[first]),
            fix="pass X[list(estimator.feature_names_in_)]",
        )


def _frame(X: Any) -> tuple[npt.NDArray[Any], list[str]]:
    import pandas as pd

    frame = X if isinstance(X, pd.DataFrame) else pd.DataFrame(X.to_dict(as_series=False))
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
            got=_few(wrong),
            fix="encode or drop these columns, as in the table the estimator was fitted with",
        )
    if all(isinstance(dtype, np.dtype) for dtype in frame.dtypes):
        array = frame.to_numpy()
        # numpy has no common type for numbers beside truth values
        return (frame.to_numpy(dtype=np.float64) if array.dtype == object else array), names
    return frame.to_numpy(dtype=np.float64, na_value=np.nan), names


def table(X: Any, features: int, fitted_names: tuple[str, ...] | None) -> Table:
    """Check a table and name its columns; the numbers themselves are checked in batches.

    Parameters
    ----------
    X : array-like or DataFrame (N, D)
    features : int
        D.
    fitted_names : tuple of str or None
        Column names seen in fit; frames must have these, in this order.

    Raises
    ------
    InputError
        Not two-dimensional, no rows, no numbers.
    ColumnError
        Missing, surplus or re-ordered columns.
    """
    index = None
    names: list[str] | None = None
    if hasattr(X, "columns") and (hasattr(X, "iloc") or hasattr(X, "to_dict")):
        index = getattr(X, "index", None)
        array, names = _frame(X)
        if fitted_names is not None:
            _check_names(names, fitted_names)
    elif hasattr(X, "toarray"):
        raise InputError(
            "X is sparse",
            expected="a dense table",
            got=type(X).__name__,
            fix="pass X.toarray(), in parts if it is large",
        )
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
        raise InputError(
            f"X has {array.ndim} dimension{'s' * (array.ndim != 1)}",
            expected=f"(rows, {features})",
            got=str(array.shape),
            fix="pass X.reshape(1, -1) for one row" if array.ndim == 1 else "pass a table",
        )
    if array.dtype.kind not in "fiub":
        raise InputError(
            "X does not hold real numbers",
            expected="float, integer or bool",
            got=f"dtype {array.dtype}",
            fix="convert the columns first, for example X.astype(float)",
        )
    if array.shape[1] != features:
        raise ColumnError(
            "X has the wrong number of columns",
            expected=str(features),
            got=str(array.shape[1]),
            fix="pass the columns the estimator was fitted with",
        )
    if not array.shape[0]:
        raise InputError(
            "X has no rows", expected="at least one row", got=str(array.shape), fix="check the filter before"
        )
    if names is None:
        names = list(fitted_names) if fitted_names is not None else [f"x{t}" for t in range(features)]
    return Table(array, tuple(names), index)


def non_finite(chunk: npt.NDArray[Any], names: Sequence[str], first_row: int) -> NonFiniteError:
    """The error for a batch whose outputs are not finite: it names the cells, or the overflow."""
    rows, columns = np.nonzero(~np.isfinite(np.asarray(chunk, dtype=np.float64)))
    if len(rows):
        where = _few([names[t] for t in dict.fromkeys(columns.tolist())])
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
