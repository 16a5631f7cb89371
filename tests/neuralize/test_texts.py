"""Sparse texts: docstrings of the standard library, clustered and explained word by word."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.svm import SVC, LinearSVC

from lrp import errors
from neuralize import Explanation, describe, neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")

MODULES = ("json", "email", "decimal", "statistics", "pathlib", "difflib", "tarfile", "sqlite3", "turtle", "argparse")


@pytest.fixture(scope="module")
def docs() -> tuple[list[str], list[str]]:
    """Docstrings and the modules they come from."""
    texts, names = [], []
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # turtle needs tkinter
            continue
        found = [
            module,
            *(m for _, m in inspect.getmembers(module, lambda o: inspect.isclass(o) or inspect.isroutine(o))),
        ]
        for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if not info.name.startswith("__"):
                found.append(importlib.import_module(f"{name}.{info.name}"))
        for thing in found:
            text = inspect.getdoc(thing)
            if text and len(text.split()) > 8:
                texts.append(text)
                names.append(name)
    assert len(texts) > 100
    return texts, names


def pipelines() -> dict[str, Any]:
    return {
        "k-means": make_pipeline(TfidfVectorizer(min_df=2), KMeans(5, n_init=1, random_state=0)),
        "lsa": make_pipeline(
            TfidfVectorizer(min_df=2),
            TruncatedSVD(20, random_state=0),
            Normalizer(),
            KMeans(5, n_init=1, random_state=0),
        ),
        "counts": make_pipeline(CountVectorizer(min_df=3), TfidfTransformer(), LinearSVC()),
        "hashing": make_pipeline(HashingVectorizer(n_features=512), LogisticRegression(C=10)),
        "svc": make_pipeline(TfidfVectorizer(min_df=3), SVC(gamma=1.0)),
    }


@pytest.mark.parametrize("name", pipelines())
def test_words_carry_the_decision(docs: tuple[list[str], list[str]], name: str) -> None:
    texts, modules = docs
    fitted = pipelines()[name].fit(texts, modules)
    net = neuralize(fitted)
    np.testing.assert_array_equal(net.predict(texts), fitted.predict(texts))
    e = net.explain(texts)
    assert scipy.sparse.issparse(e.values)
    assert e.values.shape == (len(texts), net.n_features)
    assert np.diff(e.values.indptr).max() <= 32
    kept = e.values.toarray()
    size = np.abs(kept).sum(1) + sum(np.abs(p) for p in e.residual_parts.values())
    assert (np.abs(kept.sum(1) + e.residual - e.output) <= 1e-9 * size).all()
    # the same as of all words, and as of the matrix
    some = slice(0, 20)
    whole = net.explain(texts[some], top=None)
    rows = fitted[0].transform(texts[some])
    np.testing.assert_allclose(net.explain(rows, top=None).values, whole.values, atol=1e-12)
    np.testing.assert_allclose(net.explain(rows.toarray()).values, whole.values, atol=1e-12)
    order = np.argsort(-np.abs(whole.values), 1)[:, :5]
    np.testing.assert_allclose(
        np.take_along_axis(kept[some], order, 1), np.take_along_axis(whole.values, order, 1), atol=1e-10
    )
    assert (
        net.predict(pickle.loads(pickle.dumps(texts[:3]))).tolist()
        == pickle.loads(pickle.dumps(net)).predict(texts[:3]).tolist()
    )


def test_what_people_do_with_it(docs: tuple[list[str], list[str]], tmp_path: Any) -> None:
    texts, _ = docs
    fitted = pipelines()["k-means"].fit(texts)
    net = neuralize(fitted)
    frame = pd.Series(texts, index=[f"doc{i}" for i in range(len(texts))])
    e = net.explain(frame, top=10)
    table = e.to_frame(books=True)
    assert table.index[0] == "doc0"
    # a word may be called "output" too
    assert [c.rstrip("_") for c in table.columns[:5]] == ["target", "decided", "output", "residual", "coverage"]
    assert list(e.by_cluster()["mean"].columns) == list(e.feature_names)
    assert describe(e)[0].sentence
    assert (tmp_path / "page.html") == e.to_html(tmp_path / "page.html")
    other = Explanation.load(e.save(tmp_path / "e.npz"))
    assert (other.values != e.values).nnz == 0
    assert other.feature_names == e.feature_names
    words = {e.feature_names[t] for t in np.argsort(-np.abs(e.by_cluster()["mean"].to_numpy()), 1)[:, :3].ravel()}
    assert len(words) > 4


def test_errors(docs: tuple[list[str], list[str]]) -> None:
    texts, _ = docs
    net = neuralize(pipelines()["k-means"].fit(texts))
    with pytest.raises(errors.InputError, match="one text"):
        net.predict(texts[0])
    with pytest.raises(errors.InputError, match="row 1"):
        net.predict([texts[0], 3])
    with pytest.raises(errors.ColumnError):
        net.predict(scipy.sparse.csr_array((2, 3)))
    assert net.explain([]).values.shape == (0, net.n_features)
