"""Does the network decide as the estimator does, on this very table?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lrp.errors import UnverifiedError

if TYPE_CHECKING:
    import pandas as pd

    from neuralize.network import NeuralizedModel

__all__ = ["Decisions", "decisions"]


class Decisions(NamedTuple):
    """Rows by how the network and the estimator decide them.

    Parameters
    ----------
    equal, within_rounding, otherwise : int
        Decided alike; otherwise, but on a border to within the estimator's
        own rounding; otherwise, and not excused.
    """

    equal: int
    within_rounding: int
    otherwise: int

    @property
    def total(self) -> int:
        """All rows."""
        return self.equal + self.within_rounding + self.otherwise


def _clusterer(fitted: Any) -> Any:
    steps = getattr(fitted, "steps", None)
    return fitted if steps is None else _clusterer(steps[-1][1])


def decisions(net: NeuralizedModel, fitted: Any, frame: pd.DataFrame) -> Decisions:
    """Compare the network with the estimator it was made from.

    A row on which they differ is excused if the logits of both clusters are 0
    to within 64 eps (|z|^2 + max |mu|^2), in scaled units and in the precision
    of the centres: scikit-learn computes |mu|^2 - 2 mu z, which loses that much far
    from the origin.

    Raises
    ------
    UnverifiedError
        If the estimator can not predict the table.
    """
    last = _clusterer(fitted)
    centres = np.asarray(last.cluster_centers_)
    # centres of a fit in single precision take rows of single precision only
    dtype = centres.dtype if centres.dtype == np.float32 else np.dtype(np.float64)
    rows = frame.astype(dtype)
    # estimators fitted on arrays have no column names; scikit-learn would only warn
    first = fitted.steps[0][1] if hasattr(fitted, "steps") else fitted
    named = any(hasattr(e, "feature_names_in_") for e in (fitted, first, last))
    try:
        theirs = fitted.predict(rows if named else rows.to_numpy())
    except ValueError as error:
        raise UnverifiedError(
            "the estimator itself can not predict this table, so nothing is verified",
            expected="rows that fitted.predict accepts",
            got=str(error).split("\n")[0],
            fix="check the table against the one it was fitted on",
        ) from error
    mine = net.predict(rows)
    differ = np.nonzero(mine != theirs)[0]
    if not len(differ):
        return Decisions(len(rows), 0, 0)
    where = {label: i for i, label in enumerate(net.labels.tolist())}
    chosen = np.array([[where[m], where.get(o, where[m])] for m, o in zip(mine[differ], theirs[differ], strict=True)])
    with torch.no_grad():
        z = net.scaler(torch.from_numpy(rows.to_numpy(dtype=np.float64)[differ]))
        margins = np.abs(np.take_along_axis(net.head(z).numpy(), chosen, 1)).max(1)
    norms = (z.numpy() ** 2).sum(1) + (centres.astype(np.float64) ** 2).sum(1).max()
    excused = (margins <= 64 * np.finfo(dtype).eps * norms) & (chosen[:, 0] != chosen[:, 1])
    count = int(excused.sum())
    return Decisions(len(rows) - len(differ), count, len(differ) - count)
