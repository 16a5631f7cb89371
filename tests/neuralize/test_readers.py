"""Tables, estimators and other tools' relevances on disk."""

from __future__ import annotations

import importlib
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from fitted import CASES
from oracles import pipelines
from sklearn.cluster import BisectingKMeans, KMeans
from sklearn.feature_selection import SelectKBest, chi2, f_regression
from sklearn.neighbors import KernelDensity, KNeighborsClassifier

from lrp.errors import ColumnError, DataError, FileFormatError, LRPError
from neuralize import neuralize
from neuralize.readers import (
    ALLOWED_TYPES,
    BUNDLED,
    read_estimator,
    read_frame,
    read_labelled,
    read_matrix,
    read_pickle,
)

HELD = [name for name in CASES if "birch" not in name]


def teaches(info: pytest.ExceptionInfo[LRPError], *words: str) -> None:
    error = info.value
    assert error.expected
    assert error.got
    assert error.fix
    for word in words:
        assert word in str(error), str(error)


# ---------------------------------------------------------------------- estimators


@pytest.mark.parametrize("name", HELD)
def test_estimators_come_back_from_skops(name: str, tmp_path: Path) -> None:
    fitted, X = CASES[name].fit()
    skops.io.dump(fitted, tmp_path / "m.skops")
    back = read_estimator(tmp_path / "m.skops")
    assert type(back) is type(fitted)
    np.testing.assert_array_equal(neuralize(back).predict(X), neuralize(fitted).predict(X))


@pytest.mark.parametrize("name", pipelines.CASES)
def test_transformers_come_back_from_skops(name: str, tmp_path: Path) -> None:
    make, read = pipelines.CASES[name]
    X = read()
    with warnings.catch_warnings():
        # empty columns
        warnings.simplefilter("ignore", UserWarning)
        fitted = make().fit(X, pipelines.classes(X))
        skops.io.dump(fitted, tmp_path / "m.skops")
        back = read_estimator(tmp_path / "m.skops")
        # arrays may come back in another order of memory
        here, there = pipelines.dense(back.transform(X)), pipelines.dense(fitted.transform(X))
        np.testing.assert_allclose(here, there, rtol=1e-12, atol=1e-12 * np.nanmax(np.abs(there)))


@pytest.mark.parametrize(
    "estimator",
    [
        BisectingKMeans(3, algorithm="elkan"),
        KNeighborsClassifier(3, algorithm="ball_tree"),
        KNeighborsClassifier(3, p=1),
        KernelDensity(algorithm="ball_tree"),
        SelectKBest(chi2, k=2),
        SelectKBest(f_regression, k=2),
    ],
    # without addresses of functions, which differ between test workers
    ids=lambda e: re.sub(r"<function (\w+) at \w+>", r"\1", str(e)),
)
def test_what_estimators_are_made_of_is_allowed(estimator: Any, tmp_path: Path) -> None:
    X, y = np.random.default_rng(0).random((40, 3)), np.arange(40) % 2
    skops.io.dump(estimator.fit(X, y), tmp_path / "m.skops")
    assert type(read_estimator(tmp_path / "m.skops")) is type(estimator)


def test_birch_is_what_skops_can_not_hold(tmp_path: Path) -> None:
    fitted, X = CASES["birch"].fit()
    with pytest.raises(Exception, match="Birch"):
        skops.io.dump(fitted, tmp_path / "m.skops")
    for write, name in ((joblib.dump, "m.joblib"), (lambda o, f: f.write_bytes(pickle.dumps(o)), "m.pkl")):
        write(fitted, tmp_path / name)
        back = read_pickle(tmp_path / name)
        np.testing.assert_array_equal(neuralize(back).predict(X), fitted.predict(X))


def test_the_list_of_types_is_fixed_and_real() -> None:
    assert isinstance(ALLOWED_TYPES, tuple)
    assert sorted(set(ALLOWED_TYPES)) == list(ALLOWED_TYPES)
    for name in ALLOWED_TYPES:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


class Intruder:
    """Of a type that no list names."""

    seen = False

    def __init__(self) -> None:
        self.setting = 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        Intruder.seen = True
        self.__dict__.update(state)


def test_foreign_types_are_listed_and_not_built(tmp_path: Path) -> None:
    file = tmp_path / "m.skops"
    skops.io.dump({"model": KMeans(2), "more": Intruder()}, file)
    with pytest.raises(FileFormatError) as info:
        read_estimator(file)
    teaches(info, "Intruder", "--allow-pickle")
    assert not Intruder.seen
    with pytest.raises(FileFormatError) as info:
        read_pickle(file)
    teaches(info, "unpickled")
    with pytest.raises(DataError) as info:
        read_pickle(tmp_path / "none.pkl")
    teaches(info, "is not there")


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_labels_have_names(name: str) -> None:
    X, y = read_labelled(f"sklearn:{name}", "target")
    pd.testing.assert_frame_equal(X, read_frame(f"sklearn:{name}"))
    assert y.nunique() == {"breast_cancer": 2, "digits": 10}.get(name, 3)
    assert all(isinstance(label, str) for label in y)


def test_the_label_is_no_column(tmp_path: Path) -> None:
    file = str(tmp_path / "t.csv")
    pd.DataFrame({"a": [1, 2], "b": ["x", None], "kind": ["p", "q"], "c": [True, False]}).to_csv(file, index=False)
    X, y = read_labelled(file, "kind")
    assert list(X) == ["a", "b", "c"]
    assert y.tolist() == ["p", "q"]
    X, _ = read_labelled(file, "kind", columns=["c", "kind", "a"], drop=["c", "kind"])
    assert list(X) == ["a"]
    with pytest.raises(ColumnError) as info:
        read_labelled(file, "species")
    teaches(info, "'species'", "--target-column")


def test_numbers_among_the_names_are_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("A11,6,A34\nA12,48,A32\n")
    with pytest.warns(UserWarning, match="--no-header"):
        read_frame(str(tmp_path / "t.csv"))
    assert read_frame(str(tmp_path / "t.csv"), header=True).shape == (1, 3)
    assert read_frame(str(tmp_path / "t.csv"), header=False).shape == (2, 3)


def test_dates_are_refused(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1.0], "since": pd.to_datetime(["2020-01-01"])}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError) as info:
        read_frame(str(tmp_path / "t.parquet"))
    teaches(info, "since", "--drop since")
    assert read_frame(str(tmp_path / "t.parquet"), drop=["since"]).shape == (1, 1)


def test_real_tables(tabular: Callable[..., pd.DataFrame]) -> None:
    from conftest import data_folder

    folder = data_folder() / "tabular"
    known = tabular("penguins.csv")
    pd.testing.assert_frame_equal(read_frame(str(folder / "penguins.csv")), known)
    X, y = read_labelled(str(folder / "german.csv"), "x20", header=False)
    assert X.shape == (1000, 20)
    assert sorted(set(y)) == [1, 2]


# ---------------------------------------------------------------------- relevances


def test_relevances_of_other_tools(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    np.savez(tmp_path / "one.npz", anything=values)
    np.savez(tmp_path / "named.npz", base=np.zeros(5), values=values)
    np.save(tmp_path / "plain.npy", values)
    (tmp_path / "plain.npy").rename(tmp_path / "array.npz")
    frame = pd.DataFrame(values, columns=["a", "b", "c"])
    frame[["c", "a", "b"]].assign(output=1.0).to_csv(tmp_path / "named.csv")
    for name in ("one.npz", "named.npz", "array.npz", "named.csv"):
        np.testing.assert_array_equal(read_matrix(tmp_path / name, ["a", "b", "c"], 5), values)


def test_relevances_that_do_not_fit(tmp_path: Path) -> None:
    values = np.zeros((5, 3))
    np.savez(tmp_path / "two.npz", a=values, b=values)
    np.savez(tmp_path / "words.npz", values=values.astype(str))
    np.savez(tmp_path / "objects.npz", values=np.array([[None]]))
    np.savez(tmp_path / "fine.npz", values=values)
    (tmp_path / "broken.npz").write_bytes((tmp_path / "fine.npz").read_bytes()[:40])
    pd.DataFrame(values, columns=["a", "b", "x"]).to_csv(tmp_path / "other.csv", index=False)
    cases = [
        ("two.npz", 5, "which array"),
        ("words.npz", 5, "does not fit"),
        ("objects.npz", 1, "can not be read"),
        ("fine.npz", 6, "(6, 3)"),
        ("broken.npz", 5, "can not be read"),
        ("other.csv", 5, "'c'"),
        ("none.csv", 5, "is not there"),
        ("none.npz", 5, "is not there"),
    ]
    for name, rows, word in cases:
        with pytest.raises((DataError, ColumnError)) as info:
            read_matrix(tmp_path / name, ["a", "b", "c"], rows)
        teaches(info, word)
