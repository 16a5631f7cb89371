"""Small real tables by name: scikit-learn's bundled ones, and those in ``tabular/`` of the data folder.

>>> from experiments.tables import table
>>> wine = table("wine")
>>> wine.X.shape, wine.columns[0], wine.classes
((178, 13), 'alcohol', ('class_0', 'class_1', 'class_2'))
>>> bool(abs(wine.X.mean(0)).max() < 1e-12), bool(abs(wine.X.std(0) - 1).max() < 1e-12)
(True, True)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments import data as sets
from lrp.errors import DataError, InputError

__all__ = ["BUNDLED", "NAMES", "Tabular", "table"]


@dataclass(frozen=True, eq=False)
class Tabular:
    """A table of numbers and what its rows are known to be.

    Parameters
    ----------
    name : str
    X : ndarray (N, D)
        float64.
    y : ndarray (N,)
        Positions in ``classes``.
    columns : tuple of str
    classes : tuple of str
    """

    name: str
    X: NDArray[np.float64]
    y: NDArray[np.int64]
    columns: tuple[str, ...]
    classes: tuple[str, ...]

    def take(self, rows: NDArray[Any] | slice) -> Tabular:
        """Some of the rows."""
        return replace(self, X=self.X[rows], y=self.y[rows])

    def standardised(self) -> Tabular:
        """Every column with mean 0 and standard deviation 1 over these rows."""
        return replace(self, X=(self.X - self.X.mean(0)) / self.X.std(0))


def table(name: str, data: str | Path | None = None, *, standardise: bool = True) -> Tabular:
    """A table, without rows that miss a value and without constant columns.

    Parameters
    ----------
    name : str
        One of :data:`NAMES`.
    data : path, optional
        The data folder, see :func:`experiments.data.folder`; not needed for those in :data:`BUNDLED`.
    standardise : bool
        By the mean and the standard deviation of all rows; else the columns keep their units.

    Returns
    -------
    Tabular

    Raises
    ------
    InputError
        If there is no such table.
    DataError
        If its file is missing.
    """
    if name in BUNDLED:
        found = _bundled(name)
    elif name in _FILES:
        found = _FILES[name](name, sets.folder(data) / "tabular")
    else:
        raise InputError(
            f"there is no table '{name}'", expected=", ".join(NAMES), got=repr(name), fix="choose one of these"
        )
    varies = found.X.std(0) > 0
    columns = tuple(c for c, v in zip(found.columns, varies, strict=True) if v)
    found = replace(found, X=np.ascontiguousarray(found.X[:, varies]), columns=columns)
    return found.standardised() if standardise else found


def _bundled(name: str) -> Tabular:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{BUNDLED[name]}")()
    return Tabular(
        name,
        np.asarray(bunch.data, dtype=np.float64),
        np.asarray(bunch.target, dtype=np.int64),
        tuple(str(c) for c in bunch.feature_names),
        tuple(str(c) for c in bunch.target_names),
    )


def _of(name: str, frame: pd.DataFrame, target: pd.Series[Any]) -> Tabular:
    complete = frame.notna().all(axis=1) & target.notna()
    kept = target[complete]
    # by number where the labels are numbers: 9 before 10
    order = sorted(kept.unique().tolist())
    codes = {label: k for k, label in enumerate(order)}
    return Tabular(
        name,
        frame[complete].to_numpy(dtype=np.float64),
        np.array([codes[label] for label in kept.tolist()], dtype=np.int64),
        tuple(str(c) for c in frame.columns),
        tuple(str(label) for label in order),
    )


def _read(folder: Path, file: str, **options: Any) -> pd.DataFrame:
    path = folder / file
    if not path.is_file():
        raise DataError("a table is missing", expected=file, got=f"nothing at {path}", fix="see experiments/data.py")
    frame: pd.DataFrame = pd.read_csv(path, **options)
    return frame


def _last(file: str, columns: str) -> Callable[[str, Path], Tabular]:
    """Of a file without a header whose last column is the target."""

    def read(name: str, folder: Path) -> Tabular:
        frame = _read(folder, file, header=None)
        names = columns.split(", ") if columns else [f"band {t + 1}" for t in range(frame.shape[1] - 1)]
        frame.columns = pd.Index([*names, "target"])
        return _of(name, frame[names], frame["target"])

    return read


def _named(file: str, target: str, columns: str, logarithm: bool = False) -> Callable[[str, Path], Tabular]:
    def read(name: str, folder: Path) -> Tabular:
        frame = _read(folder, file)
        X = frame[columns.split(", ")].astype(np.float64)
        if logarithm:
            X = pd.DataFrame(np.log(X.to_numpy()), columns=[f"log {c}" for c in X.columns], index=X.index)
        return _of(name, X, frame[target])

    return read


def _german(name: str, folder: Path) -> Tabular:
    """Its seven columns of numbers; the thirteen of categories are left out."""
    frame = _read(folder, "german.csv", header=None)
    held = {1: "months", 4: "amount", 7: "rate", 10: "residence", 12: "age", 15: "credits", 17: "dependants"}
    return _of(name, frame[list(held)].rename(columns=held), frame[20])


_ACIDS = (
    "fixed acidity, volatile acidity, citric acid, residual sugar, chlorides, free sulfur dioxide, "
    "total sulfur dioxide, density, pH, sulphates, alcohol"
)
#: name to the name of scikit-learn's loader
BUNDLED = {"iris": "iris", "wine": "wine", "breast cancer": "breast_cancer", "digits": "digits"}
_FILES: dict[str, Callable[[str, Path], Tabular]] = {
    "wheat seeds": _last(
        "wheat-seeds.csv", "area, perimeter, compactness, length, width, asymmetry, length of the groove"
    ),
    "glass": _last("glass.csv", "RI, Na, Mg, Al, Si, K, Ca, Ba, Fe"),
    "sonar": _last("sonar.csv", ""),
    "banknote": _last("banknote_authentication.csv", "variance, skewness, kurtosis, entropy"),
    "thyroid": _last("new-thyroid.csv", "T3 resin uptake, thyroxin, triiodothyronine, TSH, rise of TSH"),
    "diabetes": _last(
        "pima-indians-diabetes.csv", "pregnancies, glucose, pressure, skin, insulin, mass, pedigree, age"
    ),
    "red wine": _last("winequality-red.csv", _ACIDS),
    "white wine": _last("winequality-white.csv", _ACIDS),
    # spendings over four decades: in logarithms, as they are usually clustered
    "wholesale": _named(
        "wholesale_customers.csv",
        "Channel",
        "Fresh, Milk, Grocery, Frozen, Detergents_Paper, Delicassen",
        logarithm=True,
    ),
    "penguins": _named("penguins.csv", "species", "bill_length_mm, bill_depth_mm, flipper_length_mm, body_mass_g"),
    "cars": _named("mpg.csv", "origin", "mpg, cylinders, displacement, horsepower, weight, acceleration, model_year"),
    "german": _german,
}
#: all tables
NAMES: tuple[str, ...] = (*BUNDLED, *_FILES)
