"""``net.explain_batch`` over the partitions of a table, computed by two other processes."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from lrp import errors
from neuralize import neuralize
from neuralize.network import NeuralizedModel

cloudpickle = pytest.importorskip("cloudpickle")
dd = pytest.importorskip("dask.dataframe")
distributed = pytest.importorskip("distributed")

pytestmark = [
    pytest.mark.peer,
    # of few rows, the median row may say anything
    pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning"),
]


def kmeans(X: pd.DataFrame) -> NeuralizedModel:
    return neuralize(make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(X), reference=X)


def svc(X: pd.DataFrame) -> NeuralizedModel:
    y = np.repeat(["a", "b", "c"], [59, 71, 48])
    return neuralize(make_pipeline(StandardScaler(), SVC(gamma=0.02)).fit(X, y), reference=X)


both = pytest.mark.parametrize("made", [kmeans, svc])


# ------------------------------------------------------------------ what travels


@both
@pytest.mark.parametrize("library", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_the_bound_method_travels(wine: pd.DataFrame, made: Callable[..., Any], library: Any) -> None:
    net = made(wine)
    expected = net.explain_batch(wine)
    size = len(library.dumps(net.explain_batch))
    # its numbers, and little else
    assert size < sum(b.numel() * b.element_size() for b in net.buffers()) + 30_000
    # lines keep a copy of the network, which stays at home
    assert net.explain(wine).break_even.shape == (178, 13)
    assert len(library.dumps(net.explain_batch)) == size
    copy = pickle.loads(library.dumps(net.explain_batch))
    pd.testing.assert_frame_equal(copy(wine), expected, check_exact=True)


@both
def test_a_row_does_not_depend_on_its_partition(wine: pd.DataFrame, made: Callable[..., Any]) -> None:
    net = made(wine)
    whole = net.explain_batch(wine, rule="undivided")
    for cuts in ([60, 120], [0, 50, 50], range(1, 178)):
        edges = [0, *cuts, 178]
        parts = [net.explain_batch(wine[a:b], rule="undivided") for a, b in itertools.pairwise(edges)]
        assert [len(p) for p in parts] == np.diff(edges).tolist()
        # a matrix product sums in another order where it has other rows: the last bits
        pd.testing.assert_frame_equal(pd.concat(parts), whole, rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize("duel", [False, True])
def test_no_rows_have_the_same_columns_and_types(wine: pd.DataFrame, made: Callable[..., Any], duel: bool) -> None:
    net = made(wine)
    question = {"target": net.labels[1], "contrast": net.labels[0]} if duel else {}
    none = net.explain_batch(wine[:0], **question)
    assert len(none) == 0
    assert ("contrast" in none) == duel
    pd.testing.assert_frame_equal(none, net.explain_batch(wine, **question)[:0])
    # and dask, which tries the method on rows of its own, or none, finds them too
    found = dd.from_pandas(wine, npartitions=2).map_partitions(net.explain_batch, **question)
    pd.testing.assert_series_equal(found.dtypes, none.dtypes)


# ------------------------------------------------------------------ two processes


def equal_one_process(wine: pd.DataFrame, made: Callable[..., Any]) -> None:
    wine = wine.set_axis([f"bottle {i:03}" for i in range(178)])
    net = made(wine)
    table = dd.from_pandas(wine, npartitions=5)
    found = table.map_partitions(net.explain_batch, meta=net.explain_batch(wine[:0])).compute()
    here = pd.concat([net.explain_batch(part.compute(scheduler="sync")) for part in table.partitions])
    pd.testing.assert_frame_equal(found, here, check_exact=True)
    # dask keeps names of rows as strings of another type
    whole = net.explain_batch(wine)
    pd.testing.assert_frame_equal(found, whole, rtol=1e-10, atol=1e-10, check_index_type=False)
    assert found.index.tolist() == wine.index.tolist()


def both_processes_work(client: Any, wine: pd.DataFrame) -> None:
    net = kmeans(wine)
    workers = list(client.scheduler_info()["workers"])
    assert len(workers) == 2
    futures = [client.submit(net.explain_batch, wine[60:90], workers=[w], pure=False) for w in workers]
    for future in futures:
        pd.testing.assert_frame_equal(future.result(), net.explain_batch(wine[60:90]), check_exact=True)


def some_partitions_are_empty(wine: pd.DataFrame) -> None:
    net = kmeans(wine)
    table = dd.from_pandas(wine, npartitions=6)
    few = table[table["proline"] > 1100]
    sizes = few.map_partitions(len).compute().tolist()
    assert 0 in sizes
    assert sum(sizes) > 10
    options = {"target": 2, "contrast": 0}
    found = few.map_partitions(net.explain_batch, meta=net.explain_batch(wine[:0], **options), **options).compute()
    expected = net.explain_batch(wine[wine["proline"] > 1100], **options)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-10, atol=1e-10)


def some_columns_are_categories() -> None:
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"colour": rng.choice(["red", "green", "blue"], 90), "size": rng.normal(size=90)})
    encode = make_column_transformer((OneHotEncoder(), ["colour"]), (StandardScaler(), ["size"]))
    net = neuralize(make_pipeline(encode, KMeans(3, n_init=1, random_state=0)).fit(X), reference=X)
    table = dd.from_pandas(X, npartitions=3)
    found = table.map_partitions(net.explain_batch, meta=net.explain_batch(X[:0])).compute()
    pd.testing.assert_frame_equal(found, net.explain_batch(X), rtol=1e-10, atol=1e-10)


def errors_come_back(wine: pd.DataFrame) -> None:
    net = kmeans(wine)
    hole = wine.copy()
    hole.loc[100, "hue"] = np.nan
    lazy = dd.from_pandas(hole, npartitions=4).map_partitions(net.explain_batch, meta=net.explain_batch(wine[:0]))
    with pytest.raises(errors.NonFiniteError, match="in column 'hue'"):
        lazy.compute()


@pytest.mark.slow
def test_two_processes(wine: pd.DataFrame) -> None:
    # one test, so that parallel test runs start one cluster; ":0": any free port
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(2, timeout=120)
        both_processes_work(client, wine)
        equal_one_process(wine, kmeans)
        equal_one_process(wine, svc)
        some_partitions_are_empty(wine)
        some_columns_are_categories()
        errors_come_back(wine)
