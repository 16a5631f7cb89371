"""Some rows or columns of an explanation, without computing or holding anything for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError
from neuralize.explanation import ComputedLines, Explanation

if TYPE_CHECKING:
    from neuralize.lines import Lined

__all__ = ["dense", "means", "position", "row_label", "some", "strongest", "take", "wordless"]

Array = npt.NDArray[Any]


def dense(array: Any) -> Array:
    """An array, of an array or a CSR one."""
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array)


def some(e: Explanation) -> Explanation:
    """The explanation, if there is anything in it.

    Raises
    ------
    InputError
    """
    if not len(e):
        raise InputError("nothing was explained", expected="at least one row", got="0", fix="pass rows to explain")
    return e


def means(e: Explanation, rows: Array, magnitude: bool = False) -> Array:
    """Mean relevance, or mean magnitude, of every column over some rows, (D,)."""
    values = e.values[rows]
    return np.asarray((abs(values) if magnitude else values).mean(0), np.float64).reshape(-1)


def strongest(e: Explanation, most: int) -> Array:
    """Positions of all columns; of sparse values, whose columns may be very many, of so many that carry most."""
    if not hasattr(e.values, "toarray"):
        return np.arange(e.values.shape[1])
    return np.sort(np.argsort(-means(e, np.arange(len(e)), True), kind="stable")[:most])


def wordless(e: Explanation) -> frozenset[str]:
    """Columns without values of their own, such as groups of columns; they are no missing values."""
    return frozenset(e.grouped)


def position(explanation: Explanation, i: Any) -> int:
    """A row's position, checked; negative ones count from the end.

    Raises
    ------
    InputError
    """
    n = len(some(explanation))
    if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not -n <= i < n:
        raise InputError(
            "there is no such row",
            expected=f"a position, an integer from 0 to {n - 1}",
            got=repr(i),
            fix="choose one; positions count rows in the order in which they were explained",
        )
    return int(i) % n


def row_label(explanation: Explanation, i: int) -> str:
    """What the user calls a row: its label in the frame, or its position."""
    return str(i if explanation.index is None else explanation.index[i])


def take(explanation: Explanation, rows: Sequence[int] | Array) -> Explanation:
    """The same explanation of some rows, as plain arrays.

    Lines that have been computed are kept; others are computed when they are
    asked for.
    """
    e, chosen = explanation, np.asarray(rows, dtype=np.int64)

    def lines(part: slice, output: Any) -> Lined:
        from neuralize.lines import Lined

        assert e.lines is not None
        here = chosen[part]
        # rows that follow each other are computed together
        runs = np.split(here, np.flatnonzero(np.diff(here) != 1) + 1)
        spans = [slice(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        found = [e.lines(span, e.output[span]) for span in spans]
        return Lined(
            output,
            *(np.concatenate([getattr(f, name) for f in found]) for name in ("competitors", "slope", "break_even")),
        )

    taken = replace(
        e,
        values=dense(e.values[chosen]),
        output=e.output[chosen],
        residual=e.residual[chosen],
        residual_parts={name: part[chosen] for name, part in e.residual_parts.items()},
        target=e.target[chosen],
        contrast=None if e.contrast is None else e.contrast[chosen],
        decided=e.decided[chosen],
        divided=e.divided[chosen],
        data=dense(e.data[chosen]),
        index=None if e.index is None else e.index[chosen],
        notes={name: rows[chosen] for name, rows in e.notes.items()},
        lines=None if e.lines is None else lines,
    )
    known = e.__dict__.get("_computed")
    if known is not None:
        taken.__dict__["_computed"] = ComputedLines(*(array[chosen] for array in known))
    return taken
