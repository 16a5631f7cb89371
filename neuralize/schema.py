"""The raw table: which columns hold numbers and which categories, and the numbers the network takes.

A network computes with numbers. Columns that an encoder reads by name get the
position of each category in one list per column; all encoders of the column
compare with the same positions. Missing values are NaN.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from lrp.errors import InputError, UnsupportedEstimatorError
from neuralize.tables import Table, check_array, check_names, few, is_frame, pandas_frame, real_numbers, table

__all__ = ["Codebook", "Origin", "Schema"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Origin:
    """A column of some stage that still is a raw column.

    Parameters
    ----------
    raw : int
        Position among the raw columns.
    replaced : tuple of float
        Values that an imputer on the way has replaced; NaN among them or not.
    """

    raw: int
    replaced: tuple[float, ...] = ()

    def without(self, value: float) -> Origin:
        """The same behind an imputer of this value."""
        return replace(self, replaced=(*self.replaced, value))


@dataclass
class Column:
    """What is known of one raw column.

    Parameters
    ----------
    kind : str
        "" (not read), "number" or "code".
    names : dict
        Category -> code.
    encoded : dict
        The categories that an encoder knows, in order.
    truth : bool
        Whether its categories are truth values.
    strict : list of (encoder, accepted numbers)
        Encoders that refuse what they have not seen.
    """

    kind: str = ""
    names: dict[Any, int] = field(default_factory=dict)
    encoded: dict[Any, None] = field(default_factory=dict)
    truth: bool = False
    strict: list[tuple[str, Floats]] = field(default_factory=list)


class Codebook:
    """Collects, while a pipeline is converted, what its steps need of the raw columns.

    Parameters
    ----------
    columns : int
        D.
    names : sequence of str, optional

    Examples
    --------
    >>> book = Codebook(1, ["colour"])
    >>> book.numbers(Origin(0), ["blue", "red", math.nan], "OneHotEncoder").tolist()
    [0.0, 1.0, nan]
    >>> book.schema([False]).categories
    {'colour': ('blue', 'red')}
    """

    def __init__(self, columns: int, names: Sequence[str] | None = None) -> None:
        self.names = None if names is None else tuple(str(n) for n in names)
        self.columns = [Column() for _ in range(columns)]

    def name(self, raw: int) -> str:
        """How messages and results name a column."""
        return f"x{raw}" if self.names is None else self.names[raw]

    def number(self, origin: Origin | None) -> None:
        """Note that a step computes with the column."""
        if origin is None:
            return
        column = self.columns[origin.raw]
        self._settle(column, "number", origin.raw)

    def coded(self, origin: Origin | None) -> bool:
        """Whether the column is known to hold categories."""
        return origin is not None and self.columns[origin.raw].kind == "code"

    def ordered(self) -> Codebook:
        """An empty book that numbers categories as encoders order them, before those that only imputers name."""
        fresh = Codebook(len(self.columns), self.names)
        for new, column in zip(fresh.columns, self.columns, strict=True):
            if column.kind == "code":
                new.kind = "code"
                new.names = {c: k for k, c in enumerate({**column.encoded, **dict.fromkeys(column.names)})}
        return fresh

    def numbers(self, origin: Origin | None, categories: Iterable[Any], label: str, encoder: bool = True) -> Floats:
        """The numbers that categories of a column have in the network.

        Parameters
        ----------
        origin : Origin or None
        categories : iterable
        label : str
            Who asks, for messages.
        encoder : bool
            Whether an encoder asks; imputers only name single categories.

        Raises
        ------
        UnsupportedEstimatorError
            Dates; categories of a column that other steps compute with.
        """
        listed = list(categories)
        plain = all(_is_number(c) for c in listed)
        if origin is None:
            if plain:
                return np.array([math.nan if _is_nan(c) else float(c) for c in listed], dtype=np.float64)
            raise _confused(label, "a computed column", "categories that are no numbers")
        column = self.columns[origin.raw]
        if any(isinstance(c, (np.datetime64, np.timedelta64)) for c in listed):
            raise _confused(label, f"column {self.name(origin.raw)!r}", "dates as categories")
        if plain and column.kind != "code":
            column.kind = "number"
            seen = [c for c in listed if not _is_nan(c)]
            column.truth = bool(seen) and all(isinstance(c, (bool, np.bool_)) for c in seen)
            return np.array([math.nan if _is_nan(c) else float(c) for c in listed], dtype=np.float64)
        self._settle(column, "code", origin.raw)
        if encoder:
            column.encoded.update(dict.fromkeys(c for c in listed if not _is_nan(c)))
        return np.array(
            [math.nan if _is_nan(c) else float(column.names.setdefault(c, len(column.names))) for c in listed],
            dtype=np.float64,
        )

    def accept(self, origin: Origin | None, known: Floats, label: str) -> None:
        """Note that an encoder of the column refuses all other numbers."""
        if origin is not None:
            self.columns[origin.raw].strict.append((label, np.concatenate([known, np.array(origin.replaced)])))

    def _settle(self, column: Column, kind: str, raw: int) -> None:
        if column.kind not in ("", kind):
            raise _confused(
                "the pipeline", f"column {self.name(raw)!r}", "a column read as categories and as numbers at once"
            )
        column.kind = kind

    def schema(self, nullable: Sequence[bool]) -> Schema:
        """What was collected."""
        return Schema(self.names, tuple(self.columns), tuple(bool(n) for n in nullable))


def _confused(label: str, what: str, got: str) -> UnsupportedEstimatorError:
    return UnsupportedEstimatorError(
        f"{label} reads {what} in a way that numbers can't follow",
        expected="categories encoded straight from the raw table, and numbers elsewhere",
        got=got,
        fix="give the categories and the numbers columns of their own, and fit again",
    )


def _is_number(value: Any) -> bool:
    # None is a category of its own, beside NaN
    return isinstance(value, (numbers.Real, np.bool_, np.number)) or _is_nan(value)


def _is_nan(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return False
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    return type(value).__name__ in ("NAType", "NaTType")


@dataclass(frozen=True)
class Schema:
    """Names, kinds and categories of the raw columns.

    Parameters
    ----------
    names : tuple of str or None
        Columns seen in fit.
    columns : tuple of Column
    nullable : tuple of bool
        Columns in which missing values are allowed: imputed, encoded, or not read.

    Examples
    --------
    >>> import pandas as pd
    >>> book = Codebook(2, ["colour", "size"])
    >>> known = book.numbers(Origin(0), ["blue", "red"], "OneHotEncoder")
    >>> book.number(Origin(1))
    >>> schema = book.schema([False, False])
    >>> schema.encode(pd.DataFrame({"colour": ["red", "blue", None], "size": [1, 2, 3]})).tolist()
    [[1.0, 1.0], [0.0, 2.0], [nan, 3.0]]
    """

    names: tuple[str, ...] | None
    columns: tuple[Column, ...]
    nullable: tuple[bool, ...]

    @classmethod
    def plain(cls, columns: int, names: Sequence[str] | None = None) -> Schema:
        """A table of numbers without missing values."""
        return cls(
            None if names is None else tuple(str(n) for n in names),
            tuple(Column("number") for _ in range(columns)),
            (False,) * columns,
        )

    @property
    def n_features(self) -> int:
        """D."""
        return len(self.columns)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the columns, x0, x1, ... where none were seen in fit."""
        return tuple(f"x{t}" for t in range(len(self.columns))) if self.names is None else self.names

    @property
    def coded(self) -> tuple[bool, ...]:
        """Columns whose numbers are codes."""
        return tuple(c.kind == "code" for c in self.columns)

    @property
    def used(self) -> tuple[bool, ...]:
        """Columns that some step reads."""
        return tuple(c.kind != "" for c in self.columns)

    @property
    def numeric(self) -> bool:
        """Whether every column is read as a number, and every number is accepted."""
        return all(c.kind == "number" and not c.strict for c in self.columns)

    @property
    def categories(self) -> dict[str, tuple[str, ...]]:
        """Names of the codes of each column that has any: code k is the k-th."""
        found = {}
        for name, column in zip(self.feature_names, self.columns, strict=True):
            if column.kind == "code":
                found[name] = tuple(str(c) for c in column.names)
            elif column.truth:
                found[name] = ("False", "True")
        return found

    def encode(self, X: Any) -> Floats:
        """The numbers (N, D) that the network takes.

        Parameters
        ----------
        X : DataFrame or array-like (N, D)
            Raw rows; N may be 0.

        Returns
        -------
        ndarray (N, D)
            float64: numbers as they are, categories as codes, -1 for a
            category that no encoder knows and all ignore, NaN for missing.

        Raises
        ------
        InputError, ColumnError
            No table, other columns than in fit, no numbers where numbers are
            needed, a category not seen in fit that an encoder refuses.
        """
        array: Any = self.read(X, empty=True).array
        return np.array(array.toarray() if scipy.sparse.issparse(array) else array, dtype=np.float64)

    def read(self, X: Any, empty: bool = False) -> Table:
        """As :meth:`encode`, with names and row labels; refers to X where it holds the numbers already.

        Parameters
        ----------
        X : DataFrame or array-like (N, D)
        empty : bool
            Whether N = 0 is allowed.
        """
        if self.numeric:
            return table(X, self.n_features, self.names, empty=empty)
        framed = is_frame(X)
        raw: list[Any]
        index = None
        if framed:
            frame = pandas_frame(X)
            index = X.index if hasattr(X, "iloc") else None
            found = tuple(str(c) for c in frame.columns)
            if self.names is not None:
                check_names(list(found), self.names)
            check_array(frame.shape, self.n_features, empty)
            raw = [frame.iloc[:, t] for t in range(frame.shape[1])]
            names = found
        else:
            array = self._array(X)
            check_array(array.shape, self.n_features, empty)
            raw = [array[:, t] for t in range(array.shape[1])]
            names = self.feature_names
        out = np.empty((len(raw[0]) if raw else 0, self.n_features), dtype=np.float64)
        for t, (values, column) in enumerate(zip(raw, self.columns, strict=True)):
            out[:, t] = self._numbers(values, column, names[t])
            for label, accepted in column.strict:
                _refuse_unknown(out[:, t], values, accepted, column, names[t], label)
        return Table(out, names, index)

    def _array(self, X: Any) -> npt.NDArray[Any]:
        if scipy.sparse.issparse(X):
            return np.asarray(X.toarray())
        if isinstance(X, np.ma.MaskedArray) or hasattr(X, "detach"):
            return np.asarray(table(X, self.n_features, self.names, empty=True).array)
        if hasattr(X, "dtype"):
            array = np.asarray(X)
        else:
            try:
                # numbers beside strings keep their types only as objects
                array = np.array(X, dtype=object) if any(self.coded) else np.asarray(X)
            except ValueError as error:
                raise InputError(
                    "X is no table",
                    expected=f"rows of {self.n_features} values",
                    got=str(error),
                    fix="give every row the same length",
                ) from error
        return array.astype(object) if array.dtype.kind == "U" else array

    def _numbers(self, values: Any, column: Column, name: str) -> Floats:
        if column.kind == "code":
            return _coded(values, column, name)
        found = real_numbers(values)
        if column.kind == "":
            # nothing reads it: whatever it holds is no reason to refuse the row
            return np.full(len(values), math.nan) if found is None else np.where(np.isinf(found), math.nan, found)
        if found is None:
            raise InputError(
                "columns without numbers",
                expected="real numbers in every column that is no category",
                got=few([f"{name} ({getattr(values, 'dtype', type(values).__name__)})"]),
                fix="encode or drop these columns, as in the table the estimator was fitted with",
            )
        return found


def _coded(values: Any, column: Column, name: str) -> Floats:
    """Codes (N,) of the categories in a column."""
    import pandas as pd

    series = values if isinstance(values, pd.Series) else pd.Series(values, dtype=object)
    try:
        place, unique = pd.factorize(series)
    except TypeError as error:
        raise InputError(
            f"column {name!r} holds something that is no category",
            expected="strings, numbers or truth values",
            got=str(error),
            fix="pass the column as in fit",
        ) from error
    # one more for missing values, which factorize numbers -1
    code = np.array([float(column.names.get(u, -1)) for u in unique] + [math.nan])
    codes: Floats = code[place]
    blank = np.flatnonzero(place < 0)
    if len(blank) and series.dtype == object:
        # None is a category of its own: scikit-learn tells it from NaN
        objects = series.to_numpy()
        none = [row for row in blank.tolist() if objects[row] is None]
        codes[none] = float(column.names.get(None, -1))
    return codes


def _refuse_unknown(coded: Floats, values: Any, accepted: Floats, column: Column, name: str, label: str) -> None:
    """Raise ``InputError`` at the first value that an encoder has not seen."""
    fine = np.isin(coded, accepted) | (np.isnan(coded) & np.isnan(accepted).any())
    if fine.all():
        return
    row = int(np.flatnonzero(~fine)[0])
    value = values.iloc[row] if hasattr(values, "iloc") else values[row]
    back = {code: category for category, code in column.names.items()}
    known = [repr(back.get(int(a), a) if column.kind == "code" else float(a)) for a in accepted if not np.isnan(a)]
    shown = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
    raise InputError(
        f"column {name!r} holds a category that {label} has not seen in fit",
        expected=f"one of {shown}",
        got=f"{value!r} in row {row}, {int((~fine).sum())} such rows in all",
        fix="impute the column in the pipeline, or drop these rows"
        if np.isnan(coded[row])
        else "drop these rows or map them to a known category, or fit the encoder with handle_unknown='ignore'",
    )
