"""What results of an analysis share: files, tables, intervals."""

from __future__ import annotations

import abc
import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from lrp._files import replacing
from lrp.errors import FileFormatError, InputError, LRPError

__all__ = [
    "Result",
    "aligned",
    "as_csv",
    "as_markdown",
    "checked_rates",
    "mean_interval",
    "optional_number",
    "pairs_interval",
]

Floats = NDArray[np.float64]
Rows = Sequence[Sequence[str]]
_RESAMPLES = 2000


class Result(abc.ABC):
    """A result that is written to JSON and read again, equal to what it was."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int] = 1

    @abc.abstractmethod
    def _held(self) -> dict[str, Any]:
        """What there is to write, JSON-able."""

    @classmethod
    @abc.abstractmethod
    def _made(cls, stored: Mapping[str, Any]) -> Self:
        """Made again of what :meth:`_held` gave."""

    def _told(self) -> str:
        """What it is of, in a few words; print shows all of it."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._told()})"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {"format": self.FORMAT, "version": self.VERSION, **self._held()}

    @classmethod
    def from_json(cls, stored: Any) -> Self:
        """What :meth:`to_json` gave.

        Raises
        ------
        FileFormatError
            If it is something else, damaged, or of another version.
        """
        found = (stored.get("format"), stored.get("version")) if isinstance(stored, Mapping) else (type(stored), None)
        if found != (cls.FORMAT, cls.VERSION):
            raise FileFormatError(
                f"this is no {cls.__name__}",
                expected=f"'{cls.FORMAT}', version {cls.VERSION}",
                got=f"{found[0]!r}, version {found[1]}",
                fix="use what to_json or save of this version wrote",
            )
        try:
            return cls._made(stored)
        except LRPError:
            raise  # it says already what is wrong
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise FileFormatError(
                f"the {cls.__name__} is damaged",
                expected="what to_json gives",
                got=f"{type(error).__name__}: {error}",
                fix="take another copy, or compute it again",
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all.

        Raises
        ------
        DataError
            If it can not be written; what was there stays.
        """
        text = json.dumps(self.to_json(), indent=1)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileFormatError, FileNotFoundError
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise FileFormatError(
                f"{path} can not be read",
                expected="a JSON file that save wrote",
                got=f"{type(error).__name__}: {error}",
                fix="take another copy, or compute it again",
            ) from error
        return cls.from_json(stored)


def optional_number(value: Any) -> float | None:
    """A number of a JSON file, or what stands for none."""
    return None if value is None else float(value)


def aligned(rows: Rows, left: int = 1) -> str:
    """A table in columns; the first ``left`` ones are names, flush left."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_markdown(rows: Rows, left: int = 1) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("---" if k < left else "---:" for k in range(len(rows[0]))) + "|")
    return "\n".join(lines)


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    """The same as comma-separated values."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def checked_rates(rates: Sequence[float], what: str = "rates") -> tuple[float, ...]:
    """Shares to remove, sorted, each once.

    Raises
    ------
    InputError
        If there is none, or one is outside of [0, 1).
    """
    numbers = (int, float, np.floating, np.integer)
    found = list(rates) if isinstance(rates, (Sequence, np.ndarray)) and not isinstance(rates, str) else [rates]
    right = [isinstance(r, numbers) and not isinstance(r, bool) and 0 <= r < 1 for r in found]
    if not found or not all(right):
        raise InputError(
            f"{what} are no shares to remove",
            expected="numbers in [0, 1), at least one",
            got=repr(rates),
            fix="for example (0.1, 0.3, 0.5)",
        )
    return tuple(sorted({float(r) for r in found}))


def mean_interval(values: Floats, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap of a mean over samples (n,); the value twice for n = 1."""
    n = len(values)
    if n < 2:
        return float(values.mean()), float(values.mean())
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(values, n).mean() for _ in range(_RESAMPLES)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pairs_interval(matrix: Floats, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    r"""Mean over the pairs of n draws and its interval, by a bootstrap over the draws.

    Pairs that share a draw are not independent, so the draws are resampled, not
    the pairs: with :math:`w_i` copies of draw i, the mean is

    .. math:: \sum_{i \ne j} w_i w_j M_{ij} \Big/ \sum_{i \ne j} w_i w_j ;

    copies of one draw form no pair, whose overlap would be 1 by construction.

    Parameters
    ----------
    matrix : array (n, n)
        Symmetric; the diagonal is not read.

    Returns
    -------
    mean, low, high : float
    """
    n = len(matrix)
    off = matrix.copy()
    np.fill_diagonal(off, 0.0)
    mean = float(off.sum() / (n * (n - 1)))
    rng = np.random.default_rng(seed)
    copies = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(np.float64)
    pairs = n * n - np.square(copies).sum(1)
    sums = np.einsum("bi,ij,bj->b", copies, off, copies, optimize=True)
    means = sums[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)
