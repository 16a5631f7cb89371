"""Texts as rows: a vectorizer in front of the network, its words as columns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer

from lrp.errors import InputError
from neuralize.schema import Column, Schema
from neuralize.tables import Table

__all__ = ["TextSchema", "is_vectorizer", "words"]


def is_vectorizer(step: Any) -> bool:
    """Whether a step turns texts into rows."""
    return isinstance(step, (CountVectorizer, HashingVectorizer))


def words(vectorizer: Any) -> tuple[int, tuple[str, ...] | None]:
    """Number of columns a fitted vectorizer makes, and their names where it knows them."""
    if isinstance(vectorizer, HashingVectorizer):
        return int(vectorizer.n_features), None
    names = tuple(str(w) for w in vectorizer.get_feature_names_out())
    return len(names), names


@dataclass(frozen=True)
class TextSchema(Schema):
    """Columns that are words: takes texts, or rows as the vectorizer makes them.

    Relevance is that of the vectorizer's columns. Its weighting acts word by
    word and its norm is held, so it is the relevance of the words' counts as
    well.

    Parameters
    ----------
    vectorizer : CountVectorizer, TfidfVectorizer or HashingVectorizer
        Fitted.

    Examples
    --------
    >>> schema = TextSchema.of(CountVectorizer().fit(["red apple", "green pear"]))
    >>> schema.feature_names, schema.encode(["red pear"]).tolist()
    (('apple', 'green', 'pear', 'red'), [[0.0, 0.0, 1.0, 1.0]])
    """

    vectorizer: Any = None

    @classmethod
    def of(cls, vectorizer: Any) -> TextSchema:
        """The schema of a fitted vectorizer, which is copied."""
        count, names = words(vectorizer)
        column = Column("number")
        return cls(names, (column,) * count, (False,) * count, copy.deepcopy(vectorizer))

    def encode(self, X: Any) -> Any:
        array = self.read(X, empty=True).array
        return np.asarray(array.toarray() if hasattr(array, "toarray") else array, dtype=np.float64)

    def read(self, X: Any, empty: bool = False) -> Table:
        if hasattr(X, "toarray") or (hasattr(X, "ndim") and X.ndim == 2):
            return super().read(X, empty)
        texts = _texts(X)
        if not len(texts):
            return super().read(np.empty((0, self.n_features)), empty)
        rows = self.vectorizer.transform(texts).tocsr()
        return Table(rows, self.feature_names, X.index if hasattr(X, "iloc") else None)


def _texts(X: Any) -> Sequence[str]:
    if isinstance(X, str):
        raise InputError("X is one text", expected="a list of texts", got="a str", fix="pass [text]")
    texts = list(X)
    wrong = next((i for i, t in enumerate(texts) if not isinstance(t, str)), None)
    if wrong is not None:
        raise InputError(
            "X does not hold texts",
            expected="str in every row, or rows as the vectorizer makes them",
            got=f"{type(texts[wrong]).__name__} in row {wrong}",
            fix="convert or drop these rows",
        )
    return texts
