r"""Does the network decide as the estimator does, on this very table?

Where the two label a row differently, one of them has rounded. That is excused
only where a duel that counts lies within a bound that follows from the numbers
themselves,

.. math:: |h| \le 64\,\varepsilon \Big[\sum_t |R_t| + \sum |r|
          + \sum_t \Big|\frac{\partial f}{\partial x_t} x_t\Big| + s\Big] ,

R and r the relevances and residual parts of that duel, f the logits of both
labels, and s the size of the terms that cancel in the first layer. The first two
sums are the terms that add up to h; the third is what a relative rounding of the
raw values does to it, through scalers and projections; s is
:math:`|z|^2 + \max_j |u_j|^2` for squared distances, which estimators compute as
:math:`|u|^2 - 2u \cdot z + |z|^2` (j over the prototypes of the two labels, where
labels have prototypes of their own), and is likewise taken without signs for
quadratic forms and scores. The constant covers sums over columns and members.

A duel that counts is the one between the two labels. Models that vote (support
vector machines of several classes, k nearest neighbours) may decide for a label
through a third one; there it is any duel of either label: where none of them is
near 0, neither label can gain or lose a vote. For k nearest neighbours a duel is
0 exactly where the k-th and the next neighbour are equally far.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrp.errors import UnverifiedError
from neuralize.centroids import CentroidHead
from neuralize.explanation import CoverageWarning, Explanation
from neuralize.linear_units import DotUnits, Hyperplanes, LinearUnits
from neuralize.pools import HardPool, SoftPool
from neuralize.units import ProductDistances, QuadraticForms, SquaredDistances

if TYPE_CHECKING:
    import pandas as pd

    from neuralize.network import NeuralizedModel

__all__ = ["Decisions", "conservation", "decisions"]

Floats = npt.NDArray[np.float64]

_CLOSE, _FACTOR = 1e-9, 64
_BLOCK, _FEW = 2**16, 2**10


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


def decisions(net: NeuralizedModel, fitted: Any, frame: pd.DataFrame) -> Decisions:
    """Compare the network with the estimator it was made from.

    Labels are equal or not; see the module for when a difference is excused.
    Predicted values and log densities are equal to 1e-9 of the terms they are
    sums of. Log densities are further excused where the densities agree to
    within 64 eps of that of a table whose rows all lie here: the trees of
    scikit-learn leave off what adds less. The tolerances of a ``KernelDensity``
    count as its own rounding.

    Parameters
    ----------
    net : NeuralizedModel
    fitted : estimator or Pipeline
    frame : DataFrame (N, D)

    Raises
    ------
    UnverifiedError
        If the estimator can not predict the table.

    Examples
    --------
    >>> import pandas as pd
    >>> from neuralize import neuralize
    >>> from sklearn.cluster import KMeans
    >>> X = pd.DataFrame({"age": [0.0, 1.0, 8.0, 9.0]})
    >>> fitted = KMeans(2, n_init=1, random_state=0).fit(X)
    >>> decisions(neuralize(fitted), fitted, X)
    Decisions(equal=4, within_rounding=0, otherwise=0)
    """
    last = _last(fitted)
    centres = getattr(last, "cluster_centers_", None)
    single = centres is not None and getattr(centres, "dtype", None) == np.float32
    counts = np.zeros(3, dtype=np.int64)
    for start in range(0, len(frame), _BLOCK):
        rows = frame.iloc[start : start + _BLOCK]
        if single:
            # centres of a fit in single precision take rows of single precision only
            rows = rows.astype({c: np.float32 for c, t in rows.dtypes.items() if t.kind in "fiub"})
        mine, theirs = net.predict(rows), _theirs(fitted, last, rows, net.kind)
        if net.kind in ("value", "density"):
            near, excused = _numbers(net, last, rows, mine, theirs)
        else:
            near = np.asarray(mine == theirs)
            excused = np.zeros(len(rows), dtype=bool)
            for few in _blocks(np.flatnonzero(~near)):
                eps = float(np.finfo(np.float32 if single else np.float64).eps)
                excused[few] = _on_a_border(net, rows.iloc[few], mine[few], theirs[few], eps)
        counts += near.sum(), (excused & ~near).sum(), (~excused & ~near).sum()
    return Decisions(*counts.tolist())


def conservation(explanation: Explanation) -> float:
    """Largest violation of ``values.sum(1) + residual == output``; 0 is perfect.

    Relative to the sum of absolute relevances and residual parts of the row.
    Where these cancel, at a border, what is left is rounding of the terms that
    cancelled; so the sum counts as no less than 1e-6 of the table's largest.

    Examples
    --------
    >>> from neuralize import CentroidHead, NeuralizedModel
    >>> conservation(NeuralizedModel(CentroidHead([[0.0], [10.0]])).explain([[1.0], [4.0]]))
    0.0
    """
    e = explanation
    sizes = _sizes(e)
    gap = np.abs(e.values.sum(1) + e.residual - e.output)
    floor = 1e-6 * float(sizes.max(initial=0.0))
    return float(np.max(gap / np.maximum(sizes, floor))) if floor > 0 else float(gap.max(initial=0.0))


def _last(fitted: Any) -> Any:
    steps = getattr(fitted, "steps", None)
    return fitted if steps is None else _last(steps[-1][1])


def _theirs(fitted: Any, last: Any, rows: pd.DataFrame, kind: str) -> npt.NDArray[Any]:
    """What the estimator says of the rows."""
    # estimators fitted on arrays have no column names; scikit-learn would only warn
    first = fitted.steps[0][1] if hasattr(fitted, "steps") else fitted
    named = any(hasattr(e, "feature_names_in_") for e in (fitted, first, last))
    method = "score_samples" if kind == "density" else "predict"
    try:
        return np.asarray(getattr(fitted, method)(rows if named else rows.to_numpy()))
    except (ValueError, AttributeError) as error:
        raise UnverifiedError(
            "the estimator itself can not predict this table, so nothing is verified",
            expected=f"rows that fitted.{method} accepts",
            got=str(error).split("\n")[0],
            fix="check the table against the one it was fitted on",
        ) from error


def _blocks(rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    return (rows[i : i + _FEW] for i in range(0, len(rows), _FEW))


def _quiet(net: NeuralizedModel, rows: pd.DataFrame, target: Any = None, contrast: Any = None) -> Explanation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        return net.explain(rows, target, contrast, top=None)


def _sizes(explanation: Explanation) -> Floats:
    """Sum of absolute relevances and residual parts, (n,)."""
    parts = [np.abs(part) for part in explanation.residual_parts.values()]
    return np.asarray(np.abs(explanation.values).sum(1) + sum(parts, start=np.zeros(len(explanation))))


def _numbers(
    net: NeuralizedModel, last: Any, rows: pd.DataFrame, mine: npt.NDArray[Any], theirs: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Rows whose numbers agree, and those that are excused."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(mine - theirs)
    near = (gap <= _CLOSE * np.abs(theirs)) | (mine == theirs)
    excused = np.zeros(len(rows), dtype=bool)
    for few in _blocks(np.flatnonzero(~near)):
        explanation = _quiet(net, rows.iloc[few])
        near[few] = gap[few] <= _CLOSE * (_sizes(explanation) + abs(net.head.level))
        peak = explanation.residual_parts.get("normaliser")
        if net.kind == "density" and peak is not None:
            # in units of the density of a table whose rows all lie here, which may itself overflow
            m, t = np.exp(mine[few] - peak), np.exp(theirs[few] - peak)
            allowed = _FACTOR * np.finfo(np.float64).eps + getattr(last, "rtol", 0) * np.maximum(m, t)
            atol = getattr(last, "atol", 0)
            with np.errstate(over="ignore"):
                excused[few] = np.abs(m - t) <= allowed + (atol * np.exp(-peak) if atol else 0)
    return near, excused


def _on_a_border(
    net: NeuralizedModel, rows: pd.DataFrame, mine: npt.NDArray[Any], theirs: npt.NDArray[Any], eps: float
) -> npt.NDArray[np.bool_]:
    """Whether rounding explains that rows (n,) are labelled differently."""
    labels = net.labels.tolist()
    found = np.zeros(len(rows), dtype=bool)
    known = np.isin(theirs, net.labels)
    if not known.any():
        return found
    rows, mine, theirs = rows[known], mine[known], theirs[known]
    duel = _quiet(net, rows, mine, theirs)
    height = np.abs(duel.output)
    if "votes" in duel.notes:
        for own in (mine, theirs):
            for rival in labels:
                other = np.flatnonzero(own != rival)
                if len(other):
                    asked = _quiet(net, rows.iloc[other], own[other], net.labels[labels.index(rival)])
                    height[other] = np.minimum(height[other], np.abs(asked.output))
    where = {label: i for i, label in enumerate(labels)}
    both = torch.tensor([[where[m], where[t]] for m, t in zip(mine.tolist(), theirs.tolist(), strict=True)])
    found[known] = height <= _FACTOR * eps * (_sizes(duel) + _roundings(net, rows, both))
    return found


def _roundings(net: NeuralizedModel, rows: pd.DataFrame, both: Tensor) -> Floats:
    """What the values as such, and the first layer, add to the terms that cancel, (n,)."""
    x = torch.from_numpy(net.encode(rows)).to(net.device, net.dtype).requires_grad_()
    both = both.to(net.device)
    with torch.enable_grad():
        logits = net(x)
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if logits.requires_grad:
            for column in both.T:
                picked = logits.gather(1, column[:, None]).sum()
                (slope,) = torch.autograd.grad(picked, x, retain_graph=True)
                total += (slope * x.detach()).abs().nan_to_num(0.0).sum(1)
    with torch.no_grad():
        total = total + _first_layer(net.head, net.front(x.detach()), both)
    return np.asarray(total.cpu().numpy(), dtype=np.float64)


def _first_layer(head: Any, z: Tensor, both: Tensor) -> Tensor:
    """Size (n,) of the terms that cancel in the costs of the first layer, in units of the logits.

    ``both`` (n, 2) are the positions of the two labels.
    """
    size, units, pool = z.abs(), getattr(head, "units", None), getattr(head, "pool", None)
    if isinstance(head, CentroidHead):
        found = _squares(size, head.pairs.prototypes + head.pairs.centre, None, both)
    elif isinstance(units, SquaredDistances):
        points = units.points + units.centre
        if isinstance(pool, (HardPool, SoftPool)):
            found = _squares(size, points, pool.group, both)
        else:
            found = _squares(size, points, None, None)
    elif isinstance(units, ProductDistances):
        far = size + units.points.abs().amax(0)
        found = (far**4 if units.distance == "l4" else far).sum(1)
    elif isinstance(units, QuadraticForms):
        diagonal = units.precisions.diagonal(dim1=1, dim2=2) if units.full else units.precisions
        # |u|'|P||u| is at most this, and so is what any factor of P makes of it
        scaled = [((size + mu.abs()) * p.sqrt()).sum(1).square() for mu, p in zip(units.means, diagonal, strict=True)]
        found = torch.stack(scaled).amax(0)
    elif isinstance(units, LinearUnits):
        found = ((size + units.start.abs()) @ units.weights.abs().T).amax(1)
    elif isinstance(units, Hyperplanes):
        found = torch.addmm(units.bias.abs(), size, units.weights.abs().T).amax(1)
    elif isinstance(units, DotUnits):
        inner = units.gamma * (size @ units.points.abs().T) + abs(units.coef0)
        found = (inner**units.degree @ units.coefficients.abs().T).amax(1)
    else:
        found = torch.zeros_like(size[:, 0])
    gamma = getattr(pool, "gamma", None)
    if gamma is None:
        return found
    # sums of kernels have relative errors, and logits are their logarithms
    own = getattr(pool, "scale", None)
    total: Tensor = found + 1 / gamma if own is None else own * (gamma * found + 1)
    return total


def _squares(size: Tensor, points: Tensor, group: Tensor | None, both: Tensor | None) -> Tensor:
    """|z|^2 + max |u|^2 over the points of both labels, or over all (n,)."""
    norms = points.square().sum(1)
    if both is None:
        return size.square().sum(1) + norms.amax()
    if group is not None:
        norms = norms.new_zeros(int(group.max()) + 1).scatter_reduce(0, group, norms, "amax")
    return size.square().sum(1) + norms[both].amax(1)
