"""Labels as users pass them, and their positions among the logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lrp.errors import TargetError

__all__ = ["positions"]


def positions(value: Any, labels: npt.NDArray[Any], n: int, what: str) -> npt.NDArray[np.int64]:
    """Positions (n,) of one label, or of one per row.

    Parameters
    ----------
    value : label or array (n,) of labels
    labels : ndarray (K,)
    n : int
    what : str
        "target" or "contrast".

    Raises
    ------
    TargetError
        No labels, not one per row, or labels that do not exist.
    """
    known = labels.tolist()
    given = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if given.dtype.kind not in {*"iuUO", labels.dtype.kind} or (given.dtype.kind == "b") != (labels.dtype.kind == "b"):
        raise TargetError(
            f"{what} is no label",
            expected=f"labels such as {known[0]!r}, one or one per row",
            got=f"dtype {given.dtype}",
            fix="pass what net.predict returns",
        )
    if given.shape not in ((), (n,)):
        raise TargetError(
            f"{what} does not fit the rows",
            expected=f"one label or {n}",
            got=str(given.shape),
            fix="pass one label per row",
        )
    where = {label: i for i, label in enumerate(known)}
    flat = np.atleast_1d(given).tolist()
    try:
        unknown = list(dict.fromkeys(repr(label) for label in flat if label not in where))
    except TypeError:  # not hashable, hence no label
        unknown = [type(value).__name__]
    if unknown:
        raise TargetError(
            f"{what} names a label that does not exist",
            expected=f"one of {', '.join(map(repr, known[:20]))}",
            got=", ".join(unknown[:8]),
            fix="pass a label that net.predict can return",
        )
    return np.broadcast_to(np.array([where[label] for label in flat], dtype=np.int64), (n,)).copy()
