"""Tables, estimators and other tools' relevances on disk, for the command line."""

from __future__ import annotations

import csv
import os
import re
import shlex
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrp.errors import ColumnError, DataError, FileFormatError, MissingDependencyError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ALLOWED_TYPES",
    "BUNDLED",
    "chosen",
    "read_estimator",
    "read_frame",
    "read_labelled",
    "read_matrix",
    "read_pickle",
    "without",
]

BUNDLED = ("breast_cancer", "digits", "iris", "wine")

# skops itself trusts the public estimators and transformers of scikit-learn; these are what they hold beside,
# and our own clustering
ALLOWED_TYPES = (
    "neuralize.kernel_kmeans.KernelKMeans",
    "numpy.dtype",
    "numpy.mean",
    "scipy.sparse._csr.csr_matrix",
    "sklearn.cluster._bisect_k_means._BisectingTree",
    "sklearn.cluster._kmeans._kmeans_single_elkan",
    "sklearn.cluster._kmeans._kmeans_single_lloyd",
    "sklearn.compose._column_transformer.make_column_selector",
    "sklearn.feature_selection._univariate_selection.chi2",
    "sklearn.feature_selection._univariate_selection.f_classif",
    "sklearn.feature_selection._univariate_selection.f_regression",
    "sklearn.gaussian_process.kernels.ConstantKernel",
    "sklearn.gaussian_process.kernels.Product",
    "sklearn.gaussian_process.kernels.RBF",
    "sklearn.gaussian_process.kernels.Sum",
    "sklearn.gaussian_process.kernels.WhiteKernel",
    "sklearn.metrics._dist_metrics.EuclideanDistance64",
    "sklearn.metrics._dist_metrics.ManhattanDistance64",
    "sklearn.metrics._dist_metrics.MinkowskiDistance64",
    "sklearn.neighbors._ball_tree.BallTree",
    "sklearn.neighbors._kd_tree.KDTree",
)


def _bundled(name: str, label: str | None) -> pd.DataFrame:
    from sklearn import datasets

    if name not in BUNDLED:
        raise DataError(
            f"scikit-learn bundles no table {name!r} here",
            expected=", ".join(f"sklearn:{n}" for n in BUNDLED),
            got=name,
            fix="choose one",
        )
    bunch = getattr(datasets, f"load_{name}")(as_frame=True)
    frame: pd.DataFrame = bunch.data
    # the classes, by name, for whoever asks
    return frame.assign(target=bunch.target_names[bunch.target].astype(str)) if label == "target" else frame


def _held(path: Path, preferred: Sequence[str], several: bool) -> tuple[list[str], npt.NDArray[Any] | None]:
    """Names of the arrays in an npz, and the first preferred one, or the only one (or the first, of ``several``)."""
    with open(path, "rb") as handle:
        held = np.load(handle, allow_pickle=False)
        if isinstance(held, np.ndarray):  # an npy by another name
            return [""], held
        names = list(held.files)
        wanted = [n for n in preferred if n in names] or (names if several or len(names) == 1 else [])
        return names, held[wanted[0]] if wanted else None


def _npz(path: Path) -> pd.DataFrame:
    import pandas as pd

    array = _held(path, ("X",), several=True)[1]
    if array is None:
        raise DataError(f"{path} holds no array", expected="an npz with X", got="nothing", fix="np.savez(path, X=X)")
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
        if numbers := [n for n in names if _is_number(n)]:
            warnings.warn(
                f"the first line of {path} was taken for names of columns, and some of them are numbers "
                f"({', '.join(numbers[:4])}): pass --no-header if it is data, or --header if these are names",
                stacklevel=2,
            )
    return frame


def _read(data: str, header: bool | None, label: str | None = None) -> pd.DataFrame:
    """All of a table; the names of its columns are strings."""
    import pandas as pd

    path = Path(data)
    try:
        if data.startswith("sklearn:"):
            frame = _bundled(data.removeprefix("sklearn:"), label)
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
    return frame


def _checked(frame: pd.DataFrame, data: str) -> pd.DataFrame:
    if frame.empty:
        raise DataError(
            f"{data} has no {'columns' if len(frame) else 'rows'}",
            expected="a table with rows and columns",
            got=f"{len(frame)} rows, {frame.shape[1]} columns",
            fix="check the file and what is left out",
        )
    wrong = [str(c) for c, dtype in frame.dtypes.items() if dtype.kind in "mMc"]
    if wrong:
        raise DataError(
            f"columns of dates or complex numbers: {', '.join(wrong)}",
            expected="numbers, words or truth values",
            got=", ".join(str(frame[c].dtype) for c in wrong[:8]),
            fix="leave them out: " + without(wrong),
        )
    return frame


def chosen(frame: pd.DataFrame, drop: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of a table.

    Parameters
    ----------
    frame : DataFrame
    drop, columns : sequence of str
        Columns to leave out; columns to keep, in this order, or none for all.

    Raises
    ------
    ColumnError
        They are not there, or named twice.

    Examples
    --------
    >>> import pandas as pd
    >>> list(chosen(pd.DataFrame({"a": [1], "b": [2], "c": [3]}), drop=["b"], columns=["c", "b"]))
    ['c']
    """
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
    frame = frame[columns] if columns else frame
    return frame.drop(columns=drop)


def read_frame(
    data: str, *, header: bool | None = None, drop: Sequence[str] = (), columns: Sequence[str] = ()
) -> pd.DataFrame:
    """A table from csv, parquet, npz or ``sklearn:NAME``.

    Parameters
    ----------
    data : str
        Path, or one of scikit-learn's bundled tables, such as ``sklearn:wine``.
    header : bool, optional
        Whether a csv has column names; else they are x0, x1, ... By default it
        has, and is refused if they are all numbers.
    drop, columns : sequence of str
        Columns to leave out; columns to keep, in this order.

    Returns
    -------
    DataFrame
        Of numbers, words and truth values, some of which may be missing.

    Raises
    ------
    DataError
        Missing or unreadable, no rows, or columns of dates.
    ColumnError
        ``drop`` or ``columns`` name what is not there.

    Examples
    --------
    >>> read_frame("sklearn:iris", columns=["petal width (cm)"]).shape
    (150, 1)
    """
    return _checked(chosen(_read(data, header), drop, columns), data)


def read_labelled(
    data: str, label: str, *, header: bool | None = None, drop: Sequence[str] = (), columns: Sequence[str] = ()
) -> tuple[pd.DataFrame, pd.Series[Any]]:
    """A table, and one column of labels that is no part of it.

    Parameters
    ----------
    data, header, drop, columns
        As in :func:`read_frame`; ``columns`` need not name the label.
    label : str
        Name of the column; ``target`` for scikit-learn's bundled tables.

    Returns
    -------
    DataFrame, Series

    Examples
    --------
    >>> X, y = read_labelled("sklearn:iris", "target")
    >>> X.shape, sorted(set(y))
    ((150, 4), ['setosa', 'versicolor', 'virginica'])
    """
    whole = _read(data, header, label)
    if label not in whole.columns:
        raise ColumnError(
            f"no column {label!r} of labels",
            expected=", ".join(whole.columns[:40]) + (", or target" if data.startswith("sklearn:") else ""),
            got=label,
            fix="check --target-column",
        )
    rest = whole.drop(columns=label)
    kept = [c for c in columns if c != label]
    return _checked(chosen(rest, [c for c in drop if c != label], kept), data), whole[label]


def read_matrix(path: str | os.PathLike[str], features: Sequence[str], rows: int) -> npt.NDArray[np.float64]:
    """Relevances (N, D) that another tool has written: npz or csv.

    Parameters
    ----------
    path : path
        An npz with ``values``, ``X`` or one array, an explanation of ours
        among them; or a csv whose header has the names of the columns, others
        beside them are left aside.
    features : sequence of str
        The D columns, in the order wanted.
    rows : int
        N.

    Raises
    ------
    DataError
        Missing, unreadable, of another shape.
    ColumnError
        A csv without some of the columns.
    """
    file = Path(path)
    if file.suffix == ".npz" and file.is_file():
        try:
            names, values = _held(file, ("values", "X"), several=False)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise DataError(
                f"{file} can not be read", expected="an npz without pickle", got=reason, fix="save it again"
            ) from error
        if values is None:
            raise DataError(
                f"{file} does not say which array holds the relevances",
                expected="one array, or one called values",
                got=", ".join(names) or "none",
                fix="np.savez(path, values=values)",
            )
    else:
        frame = _read(os.fspath(file), None)
        missing = [f for f in features if f not in frame.columns]
        if missing:
            raise ColumnError(
                f"{file} lacks relevances of columns",
                expected=", ".join(features[:8]),
                got="none of " + ", ".join(map(repr, missing[:8])),
                fix="write one column for each column of the table, under its name",
            )
        values = frame[list(features)].to_numpy()
    if values.shape != (rows, len(features)) or values.dtype.kind not in "fiub":
        raise DataError(
            f"{file} does not fit the table",
            expected=f"one number for each cell, {(rows, len(features))}",
            got=f"{values.dtype} {values.shape}",
            fix="write the relevances of exactly these rows and columns",
        )
    return np.asarray(values, dtype=np.float64)


def without(columns: Sequence[str]) -> str:
    """Options that leave columns out, ready for a shell."""
    return " ".join(f"--drop {shlex.quote(c)}" for c in columns)


def read_estimator(path: str | os.PathLike[str]) -> Any:
    """A fitted estimator from a skops file that holds only allowed types.

    Raises
    ------
    FileFormatError
        Damaged, or with types beyond scikit-learn's public estimators and
        ``ALLOWED_TYPES``; they are listed, and nothing is built.
    DataError
        No such file.
    """
    import skops.io

    file = _there(path, "a skops file")
    try:
        foreign = sorted(t for t in skops.io.get_untrusted_types(file=file) if t not in ALLOWED_TYPES)
        if foreign:
            raise FileFormatError(
                f"{file} holds types that are not allowed",
                expected="scikit-learn's estimators and transformers, KernelKMeans, and what they are made of",
                got=", ".join(foreign),
                fix="save a supported estimator, or use --fit; a pickle that you trust can be read by --allow-pickle",
            )
        return skops.io.load(file, trusted=list(ALLOWED_TYPES))
    except FileFormatError:
        raise
    except Exception as error:  # damaged files fail anywhere in zip, json, numpy and skops
        reason = str(error).split("\n")[0] or type(error).__name__
        raise FileFormatError(
            f"{file} is no skops file", expected="what skops.io.dump wrote", got=reason, fix="save it again"
        ) from error


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Whatever a pickle or joblib file holds.

    Reading one runs the code that it holds: the caller says so first.

    Raises
    ------
    FileFormatError
        Damaged, or made of classes that are not installed here.
    DataError
        No such file.
    """
    import joblib

    file = _there(path, "a pickle or joblib file")
    try:
        return joblib.load(file)
    except Exception as error:  # code of the file's own choice
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise FileFormatError(
            f"{file} can not be unpickled",
            expected="what pickle.dump or joblib.dump wrote, and its classes installed",
            got=reason,
            fix="save it again, with skops where that can hold it",
        ) from error


def _there(path: str | os.PathLike[str], what: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} is not there", expected=what, got="none", fix="check the path")
    return file
