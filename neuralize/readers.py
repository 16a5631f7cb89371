"""Tables and estimators on disk, for the command line."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrp.errors import ColumnError, DataError, FileFormatError, MissingDependencyError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ALLOWED_TYPES", "BUNDLED", "build", "read_estimator", "read_frame"]

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


def read_frame(
    data: str, *, header: bool = True, drop: Sequence[str] = (), columns: Sequence[str] = ()
) -> pd.DataFrame:
    """A table of numbers from csv, parquet, npz or ``sklearn:NAME``.

    Parameters
    ----------
    data : str
        Path, or one of scikit-learn's bundled tables, such as ``sklearn:wine``.
    header : bool
        Whether a csv has column names; else they are x0, x1, ...
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
            frame = pd.read_csv(path, header=0 if header else None, sep="\t" if path.suffix == ".tsv" else ",")
            if not header:
                frame.columns = pd.Index([f"x{t}" for t in range(frame.shape[1])])
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
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{data} can not be read as a table", expected="a readable table", got=reason, fix="check the file"
        ) from error
    frame.columns = pd.Index([str(c) for c in frame.columns])
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
    wrong = [
        c for c, dtype in zip(frame.columns, frame.dtypes, strict=True) if not pd.api.types.is_numeric_dtype(dtype)
    ]
    if wrong:
        raise DataError(
            f"columns without numbers: {', '.join(wrong)}",
            expected="numbers in every column",
            got=", ".join(str(frame[c].dtype) for c in wrong[:8]),
            fix="leave them out: " + " ".join(f"--drop {c}" for c in wrong),
        )
    if frame.empty:
        raise DataError(
            f"{data} has no rows or no columns", expected="a table", got=str(frame.shape), fix="check the file"
        )
    return frame


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
