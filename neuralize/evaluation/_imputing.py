"""The work behind all evaluations that remove columns: scores of rows without some of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lrp.errors import ColumnError, InputError, OutputError, RuleError
from neuralize.evaluation._rows import Floats, Rows, count
from neuralize.evaluation.densities import ConditionalKDE
from neuralize.evaluation.imputers import Imputer, Marginal, Mask, Mean, NearestMidpoint, OtherCluster
from neuralize.evaluation.scores import Score

__all__ = ["DONORS", "WORK", "filled", "imputed_scores", "ready"]

WORK = 2**21  # numbers held in work: 16 MB
DONORS = 1  # stream of random numbers
NAMES = ("mean", "marginal", "kde", "other")


def imputed_scores(
    score: Score,
    imputer: Imputer,
    removed: Callable[[slice], Mask],
    sets: int,
    draws: int,
    rng: np.random.Generator,
    batch_size: int | str = "auto",
) -> Iterator[tuple[slice, Floats]]:
    """Scores of rows without some of their columns, batch by batch, in bounded memory.

    Parameters
    ----------
    score : Score
    imputer : Imputer
        Fitted.
    removed : callable
        From consecutive rows (a slice) to their masks (sets, n, D).
    sets, draws : int
    rng : Generator
        Of the donors.
    batch_size : int or "auto"

    Yields
    ------
    rows : slice
    scores : ndarray (draws, sets, n)
    """
    rows = score.rows
    n, d = rows.array.shape
    each = 3 * draws * d + imputer.width
    chunk = max(1, min(sets, WORK // each))
    size = max(1, WORK // (each * sets)) if batch_size == "auto" else count(batch_size, "batch_size")
    for first in range(0, n, size):
        part = slice(first, min(first + size, n))
        X, masks = rows.array[part], removed(part)
        u = rng.random((len(X), draws, imputer.numbers))
        owner = np.arange(part.start, part.stop)
        found = np.empty((draws, sets, len(X)))
        for s in range(0, sets, chunk):
            changed = filled(imputer, X, masks[s : s + chunk], u)
            flat = np.ascontiguousarray(changed).reshape(-1, d)
            owners = np.broadcast_to(owner, changed.shape[:3]).ravel()
            found[:, s : s + chunk] = score(flat, owners).reshape(changed.shape[:3])
        yield part, found


def filled(imputer: Imputer, X: Floats, removed: Mask, u: Floats) -> Floats:
    """What an imputer, perhaps of the user's, makes of rows; (draws, S, n, D).

    Raises
    ------
    OutputError
    """
    found = imputer.fill(X, removed, u)
    if np.shape(found) != (u.shape[1], *removed.shape):
        raise OutputError(
            f"{imputer!r} returns another shape",
            expected=str((u.shape[1], *removed.shape)),
            got=str(np.shape(found)),
            fix="return (draws, S, n, D) from fill",
        )
    return found


def ready(imputer: Any, rows: Rows, reference: Any, score: Any = None) -> Imputer:
    """A fitted imputer from a name, an instance, fitted or not; the caller's is not changed.

    Raises
    ------
    RuleError
        Unknown.
    InputError
        Nothing to draw from.
    """
    if isinstance(imputer, str):
        if imputer == "other" and not hasattr(score, "predict"):
            raise RuleError(
                "imputer 'other' does not know which rows belong together",
                expected="a score with predict, such as a NeuralizedModel",
                got=type(score).__name__,
                fix="pass imputer=OtherCluster(fitted)",
            )
        made: dict[str, Callable[[], Imputer]] = {
            "mean": Mean,
            "marginal": Marginal,
            "kde": ConditionalKDE,
            "other": lambda: OtherCluster(score),
        }
        if imputer not in made:
            raise RuleError(
                "unknown imputer",
                expected=f"one of {', '.join(map(repr, NAMES))}, or an Imputer such as NearestMidpoint(fitted)",
                got=repr(imputer),
                fix="choose one",
            )
        imputer = made[imputer]()
    if not isinstance(imputer, Imputer):
        raise RuleError(
            "imputer can not impute",
            expected=f"one of {', '.join(map(repr, NAMES))}, or an instance of a subclass of Imputer",
            got=repr(imputer)[:80],
            fix="for example imputer='marginal'",
        )
    if imputer.reference is None:
        if reference is None and len(rows) < 2 and not isinstance(imputer, NearestMidpoint):
            raise InputError(
                "there is one row and nothing to replace its values with",
                expected="reference rows",
                got="none",
                fix="pass reference=, the rows the model was fitted on",
            )
        imputer = copy.copy(imputer).fit(rows if reference is None else Rows.of(reference, "reference"))
    return _fits(imputer, rows)


def _fits(imputer: Imputer, rows: Rows) -> Imputer:
    known = imputer.reference
    if known is None or known.features != rows.features:
        raise InputError(
            "the imputer was fitted on another table",
            expected=f"{rows.features} columns",
            got=str(known.features if known else None),
            fix="fit it on rows with the columns of X",
        )
    if known.columns is not None and rows.columns is not None and known.names != rows.names:
        raise ColumnError(
            "the imputer's reference has other columns than X",
            expected=", ".join(rows.names[:8]),
            got=", ".join(known.names[:8]),
            fix="select the columns of X, in their order",
        )
    return imputer
