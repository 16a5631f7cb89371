"""Tables and estimators on disk, for the command line."""

from __future__ import annotations

import csv
import os
import re
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrp.errors import ColumnError, DataError, FileFormatError, MissingDependencyError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ALLOWED_TYPES", "BUNDLED", "build", "read_estimator", "read_frame", "without"]

BUNDLED = ("breast_cancer", "digits", "iris", "wine")
ALLOWED_TYPES = (
    "sklearn.cluster._kmeans.KMeans",
    "sklearn.pipeline.Pipeline",
    "sklearn.preprocessing._data.MaxAbsScaler",
    "sklearn.preprocessing._data.MinMaxScaler",
    "sklearn.preprocessing._data.RobustScaler",
    "sklearn.preprocessing._data.StandardScaler",
)


def _bundled(name: str) -> pd.DataFrame:
    from sklearn import datasets

    if name not in BUNDLED:
        raise DataError(
            f"scikit-learn bundles no table {name!r} here",
            expected=", ".join(f"sklearn:{n}" for n in BUNDLED),
            got=name,
            fix="choose one",
        )
    frame: pd.DataFrame = getattr(datasets, f"load_{name}")(as_frame=True).data
    return frame


def _npz(path: Path) -> pd.DataFrame:
    import pandas as pd

    with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
        if isinstance(file, np.ndarray) or not file.files:
            raise DataError(
                f"{path} holds no array", expected="an npz with X", got="nothing", fix="np.savez(path, X=X)"
            )
        array = file["X" if "X" in file.files else file.files[0]]
    if array.ndim != 2:
        raise DataError(
            f"the array in {path} is no table",
            expected="two dimensions",
            got=str(array.shape),
            fix="save X (rows, columns)",
        )
    return pd.DataFrame(array, columns=[f"x{t}" for t in range(array.shape[1])])


def _is_number(name: str) -> bool:
    # pandas tells equal names apart with .1, .2, ...
    for text in (name, re.sub(r"\.\d+$", "", name)):
        try:
            float(text)
        except ValueError:
            continue
        return True
    return False


def _widths(path: Path, separator: str) -> tuple[int, int]:
    """Cells in the first and in the second line that is not empty; 0 where there is none."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as handle:
        filled = (len(cells) for cells in csv.reader(handle, delimiter=separator) if cells)
        return next(filled, 0), next(filled, 0)


def _csv(path: Path, header: bool | None) -> pd.DataFrame:
    import pandas as pd

    named, separator = header is not False, "\t" if path.suffix == ".tsv" else ","
    frame = pd.read_csv(path, header=0 if named else None, sep=separator)
    if frame.shape[1] == 1:
        texts = [str(frame.columns[0])] if named else [str(v) for v in frame.iloc[:1, 0]]
        for mark in (";", "\t", ","):
            if any(mark in text for text in texts):
                raise DataError(
                    f"columns seem separated by {mark!r}",
                    expected="tabs in a .tsv, commas in any other text file",
                    got=f"one column {texts[0][:60]!r}",
                    fix="save it with commas and decimal points" if mark == ";" else "rename or convert the file",
                )
    width, cells = _widths(path, separator)
    if named and cells > width:
        # pandas would take the first column for row labels, and every name would stand over its neighbour
        raise DataError(
            f"the rows of {path} have more cells than the first line has names",
            expected=f"{width} cells in every row",
            got=str(cells),
            fix="name every column in the first line, and check for separators at the ends of lines",
        )
    if not named:
        frame.columns = pd.Index([f"x{t}" for t in range(frame.shape[1])])
    elif header is None:
        names = [str(c) for c in frame.columns if not str(c).startswith("Unnamed: ")]
        if names and all(map(_is_number, names)):
            raise DataError(
                f"the first line of {path} looks like data",
                expected="names of columns",
                got=", ".join(names[:6]),
                fix="pass --no-header, or --header if these are names",
            )
    return frame


def read_frame(
    data: str, *, header: bool | None = None, drop: Sequence[str] = (), columns: Sequence[str] = ()
) -> pd.DataFrame:
    """A table of numbers from csv, parquet, npz or ``sklearn:NAME``.

    Parameters
    ----------
    data : str
        Path, or one of scikit-learn's bundled tables, such as ``sklearn:wine``.
    header : bool, optional
        Whether a csv has column names; else they are x0, x1, ... By default it
        has, and is refused if they are all numbers.
    drop, columns : sequence of str
        Columns to leave out; columns to keep, in this order.

    Raises
    ------
    DataError
        Missing or unreadable, no rows, or columns without numbers.
    ColumnError
        ``drop`` or ``columns`` name what is not there.
    """
    import pandas as pd

    path = Path(data)
    try:
        if data.startswith("sklearn:"):
            frame = _bundled(data.removeprefix("sklearn:"))
        elif not path.is_file():
            raise DataError(f"{data} is not there", expected="a file", got="none", fix="check the path")
        elif path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        elif path.suffix == ".npz":
            frame = _npz(path)
        elif path.suffix in (".csv", ".tsv", ".txt"):
            frame = _csv(path, header)
        else:
            raise DataError(
                f"{data} has an unknown ending",
                expected=".csv, .tsv, .parquet or .npz",
                got=path.suffix,
                fix="convert it",
            )
    except DataError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            "parquet needs pyarrow", expected="pyarrow", got=str(error), fix="pip install 'neuralize[arrow]'"
        ) from error
    except (ValueError, OSError, EOFError, csv.Error, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{data} can not be read as a table", expected="a readable table", got=reason, fix="check the file"
        ) from error
    frame.columns = pd.Index([str(c) for c in frame.columns])
    columns = [c if c in frame.columns else c.strip() for c in columns]
    drop = [c if c in frame.columns else c.strip() for c in drop]
    twice = sorted({c for c in columns if columns.count(c) > 1})
    if twice:
        raise ColumnError(
            f"columns named twice: {', '.join(twice)}",
            expected="every column once",
            got=",".join(columns),
            fix="name each column once",
        )
    unknown = [c for c in (*drop, *columns) if c not in frame.columns]
    if unknown:
        raise ColumnError(
            f"no column {', '.join(map(repr, unknown))}",
            expected=", ".join(frame.columns[:40]),
            got=", ".join(unknown),
            fix="check the names",
        )
    frame = frame[list(columns)] if columns else frame
    frame = frame.drop(columns=list(drop))
    if frame.empty:
        raise DataError(
            f"{data} has no {'columns' if len(frame) else 'rows'}",
            expected="a table with rows and columns",
            got=f"{len(frame)} rows, {frame.shape[1]} columns",
            fix="check the file and what is left out",
        )
    wrong = [
        c for c, dtype in zip(frame.columns, frame.dtypes, strict=True) if not pd.api.types.is_numeric_dtype(dtype)
    ]
    if wrong:
        raise DataError(
            f"columns without numbers: {', '.join(wrong)}",
            expected="numbers in every column",
            got=", ".join(str(frame[c].dtype) for c in wrong[:8]),
            fix="leave them out: " + without(wrong),
        )
    return frame


def without(columns: Sequence[str]) -> str:
    """Options that leave columns out, ready for a shell."""
    return " ".join(f"--drop {shlex.quote(c)}" for c in columns)


def read_estimator(path: str | os.PathLike[str]) -> Any:
    """A fitted estimator from a skops file that holds only allowed types.

    Raises
    ------
    FileFormatError
        Damaged, or with types beyond ``ALLOWED_TYPES``; they are listed, and
        nothing is built.
    DataError
        No such file.
    """
    import skops.io

    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} is not there", expected="a skops file", got="none", fix="check the path")
    try:
        foreign = sorted(t for t in skops.io.get_untrusted_types(file=file) if t not in ALLOWED_TYPES)
        if foreign:
            raise FileFormatError(
                f"{file} holds types that are not allowed",
                expected=", ".join(t.rsplit(".", 1)[-1] for t in ALLOWED_TYPES),
                got=", ".join(foreign),
                fix="save a supported estimator, or use --fit",
            )
        return skops.io.load(file, trusted=list(ALLOWED_TYPES))
    except FileFormatError:
        raise
    except Exception as error:  # damaged files fail anywhere in zip, json, numpy and skops
        reason = str(error).split("\n")[0] or type(error).__name__
        raise FileFormatError(
            f"{file} is no skops file", expected="what skops.io.dump wrote", got=reason, fix="save it again"
        ) from error


def build(recipe: str, *, scale: bool, seed: int) -> Any:
    """The unfitted estimator of ``--fit``: ``kmeans:K``, behind a StandardScaler if ``scale``.

    Raises
    ------
    DataError
        An unknown recipe.
    """
    from sklearn.cluster import KMeans
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    name, _, count = recipe.partition(":")
    if name != "kmeans" or not count.isdecimal() or int(count) < 2:
        raise DataError(
            f"--fit {recipe} is not understood",
            expected="kmeans:K with K >= 2",
            got=recipe,
            fix="for example --fit kmeans:3",
        )
    clusterer = KMeans(int(count), n_init=10, random_state=seed)
    return make_pipeline(StandardScaler(), clusterer) if scale else clusterer
