r"""The nearest point of a polytope: a small quadratic programme with a certificate.

.. math:: \min_{x'} \sum_t w_t (x'_t - x_t)^2 \quad \text{so that} \quad A x' + b \ge 0,\; l \le x' \le u .

In the coordinates :math:`v_t = \sqrt{w_t}\,(x'_t - x_t)` this is least-distance
programming, :math:`\min |v|` so that :math:`G v \ge g`, which one non-negative
least-squares problem solves (Lawson & Hanson, "Solving Least Squares Problems",
chapter 23). Where a single border binds, it is the step
:math:`x' = x - (h / |a|_M^2)\, M^{-1} a` with :math:`M = \mathrm{diag}(w)`,
:math:`|a|_M^2 = \sum_t a_t^2 / w_t`.

No answer is trusted for the way it was found. For any multipliers
:math:`\lambda \ge 0`, every feasible v has :math:`|v| \ge g \cdot \lambda / |G'\lambda|`;
a feasible v of that length is the nearest one, and multipliers for which the
bound is infinite prove that there is none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from lrp.errors import ConvergenceError, InputError, TargetError

__all__ = ["InfeasibleError", "Projection", "displace", "project"]

Floats = npt.NDArray[np.float64]

# relative error of violation and of length that a result may have
TOLERANCE = 1e-9
# a corner sharper than this (in radians) can not be told from no corner at all
_SHARPEST = 1e-9
_EPS = float(np.finfo(np.float64).eps)


class InfeasibleError(TargetError):
    """A polytope without points, or without points within the bounds."""


class Projection(NamedTuple):
    """The nearest point of a polytope.

    Attributes
    ----------
    row : ndarray (D,)
    distance : float
        ``sqrt(sum(weights * (row - x)**2))``.
    active : ndarray (m,) of bool
        The borders it is held by: those with a positive multiplier.
    bound : float
        What multipliers prove: no point of the polytope is nearer.
    """

    row: Floats
    distance: float
    active: npt.NDArray[np.bool_]
    bound: float


class Displacement(NamedTuple):
    v: Floats
    multipliers: Floats
    bound: float


def project(
    x: npt.ArrayLike,
    A: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    lower: npt.ArrayLike | None = None,
    upper: npt.ArrayLike | None = None,
    fixed: npt.ArrayLike | None = None,
) -> Projection:
    r"""Nearest point of ``{A x' + b >= 0, lower <= x' <= upper}`` in a diagonal metric.

    Parameters
    ----------
    x : array (D,)
    A, b : array (m, D) and (m,)
        Borders; rows of any length, zero rows and copies included.
    weights : array (D,), optional
        :math:`w_t > 0`, default 1; ``inf`` is as good as fixed.
    lower, upper : array (D,), optional
        Of x'; infinite where there is none.
    fixed : array (D,) of bool or of positions, optional
        Columns that stay, whatever their bounds.

    Returns
    -------
    Projection
        Violations and excess over ``bound`` are at most 1e-9 of the distance.

    Raises
    ------
    InfeasibleError
        Nothing satisfies all constraints.
    InputError
        Shapes that do not fit, numbers that are not finite, weights <= 0, lower > upper.
    ConvergenceError
        The result could not be certified; the borders are too ill-conditioned for float64.

    Notes
    -----
    Borders join as they are violated, so that the cost is that of the binding
    ones: O(D q^2) for q of them, and O(m D) per round for the check.

    Examples
    --------
    >>> found = project([0.0, 0.0], [[1.0, 1.0], [1.0, 0.0]], [-2.0, 5.0])
    >>> found.row.round(12).tolist(), round(found.distance, 6), found.active.tolist()
    ([1.0, 1.0], 1.414214, [True, False])
    >>> project([0.0, 0.0], [[1.0, 1.0]], [-2.0], upper=[0.5, 9.0]).row.round(12).tolist()
    [0.5, 1.5]
    """
    x, A, b = (np.asarray(a, dtype=np.float64) for a in (x, A, b))
    d = len(x) if x.ndim == 1 else -1
    if x.ndim != 1 or A.ndim != 2 or A.shape[1] != d or b.shape != A.shape[:1]:
        raise InputError(
            "x, A and b do not fit together",
            expected="(D,), (m, D) and (m,)",
            got=f"{x.shape}, {A.shape} and {b.shape}",
            fix="pass one row, and one border per row of A",
        )
    w = np.ones(d) if weights is None else np.asarray(weights, dtype=np.float64)
    low = np.full(d, -np.inf) if lower is None else np.asarray(lower, dtype=np.float64)
    high = np.full(d, np.inf) if upper is None else np.asarray(upper, dtype=np.float64)
    for name, vector in (("weights", w), ("lower", low), ("upper", high)):
        if vector.shape != (d,):
            raise InputError(f"{name} does not fit x", expected=f"({d},)", got=str(vector.shape), fix="one per column")
    if not (np.isfinite(x).all() and np.isfinite(A).all() and np.isfinite(b).all()):
        raise InputError("x, A or b is not finite", expected="finite numbers", got="NaN or infinity", fix="check them")
    if not (w > 0).all():
        raise InputError("weights are not positive", expected="> 0", got=str(w.min()), fix="fix columns by fixed=")
    still = np.zeros(d, dtype=bool)
    still[np.array([], dtype=int) if fixed is None else np.asarray(fixed)] = True
    still |= np.isinf(w)
    if not (low <= high)[~still].all():
        raise InputError("bounds are inverted or NaN", expected="lower <= upper", got="lower > upper", fix="swap them")
    scale = np.sqrt(np.where(still, 1.0, w))
    lo, hi = np.where(still, 0.0, (low - x) * scale), np.where(still, 0.0, (high - x) * scale)
    found = displace(A / scale, -(A @ x + b), lo, hi)
    row = np.clip(x + found.v / scale, low, high)
    row = np.where(found.v == lo, low, np.where(found.v == hi, high, row))
    row = np.where(still | (found.v == 0), x, row)
    return Projection(row, float(np.linalg.norm(found.v)), found.multipliers > 0, found.bound)


def displace(G: Floats, g: Floats, lower: Floats, upper: Floats) -> Displacement:
    """Shortest v with ``G v >= g`` and ``lower <= v <= upper``.

    Parameters
    ----------
    G, g : ndarray (m, n) and (m,)
    lower, upper : ndarray (n,)
        Equal where a component is given.

    Returns
    -------
    Displacement
        v, multipliers (m,) of the rows of G, and the length no shorter v has.

    Raises
    ------
    InfeasibleError, ConvergenceError
    """
    given = lower == upper
    fixed = np.where(given, lower, 0.0)
    rest = g - G @ fixed if given.any() else g
    # how far rounding of g - G v can go, whatever the length of the row
    noise = 16 * _EPS * (np.abs(g) + np.abs(G) @ np.abs(fixed))
    H = G[:, ~given]
    length = np.sqrt(np.einsum("ij,ij->i", H, H))
    flat = length <= 4 * _EPS * np.sqrt(np.einsum("ij,ij->i", G, G))
    if (rest[flat] > noise[flat]).any():
        raise _infeasible("a border that no free column can move is violated")
    kept = np.flatnonzero(~flat)
    H, need = H[kept] / length[kept, None], rest[kept] / length[kept]
    v, y, bound = _shortest(H, need, lower[~given], upper[~given])
    whole, multipliers = fixed.copy(), np.zeros(len(g))
    whole[~given] = v
    multipliers[kept] = y / length[kept]
    return Displacement(whole, multipliers, float(np.hypot(bound, np.linalg.norm(fixed))))


def _shortest(H: Floats, need: Floats, lower: Floats, upper: Floats) -> tuple[Floats, Floats, float]:
    """The same with unit rows and no given components: v, multipliers of H, proven lower bound of the length."""
    m, n = H.shape
    # every constraint as a unit row: borders, then v >= lower, then -v >= -upper
    demand = np.concatenate([need, lower, -upper])

    def lack(v: Floats) -> Floats:
        return np.asarray(demand - np.concatenate([H @ v, v, -v]))

    # beside a border this far away, a shorter violation is nothing
    tiny = TOLERANCE * _EPS * float(np.abs(need).max(initial=0.0))
    v, y, bound = np.zeros(n), np.zeros(0), 0.0
    work = np.zeros(0, dtype=np.int64)
    rows = np.zeros((0, n))
    # the demands left out hold already: each round adds violated ones, so the length grows and no set comes twice
    for _ in range(m + 2 * n + 1):
        short = lack(v)
        short[work] = -np.inf
        slack = TOLERANCE / 4 * float(np.linalg.norm(v)) + tiny
        violated = np.flatnonzero(short > slack)
        if not len(violated):
            break
        new = violated[np.argsort(-short[violated], kind="stable")[:16]]
        work = np.concatenate([work, new])
        rows = np.vstack([rows, _unit(H, new, m, n)])
        v, y, bound = _least_distance(rows, demand[work])
    # bounds that bind are met to the last bit
    held = work[y > 0] - m
    v[held[(held >= 0) & (held < n)]] = lower[held[(held >= 0) & (held < n)]]
    v[held[held >= n] - n] = upper[held[held >= n] - n]
    v = np.clip(v, lower, upper)
    size = float(np.linalg.norm(v))
    worst = max(float(lack(v).max(initial=0.0)), size - bound)
    if worst > TOLERANCE * size + tiny:
        raise ConvergenceError(
            "the nearest point could not be certified",
            expected=f"violation and excess below {TOLERANCE:g} of the distance",
            got=f"{worst / max(size, tiny):.3g}",
            fix="rescale the columns, or choose another metric: these borders are too nearly parallel for float64",
        )
    full = np.zeros(len(demand))
    full[work] = y
    return v, full[:m], bound


def _unit(H: Floats, which: npt.NDArray[np.int64], m: int, n: int) -> Floats:
    """Unit rows of these constraints."""
    rows = np.zeros((len(which), n))
    border = which < m
    rows[border] = H[which[border]]
    rest = np.flatnonzero(~border)
    rows[rest, (which[rest] - m) % n] = np.where(which[rest] - m < n, 1.0, -1.0)
    return rows


def _least_distance(G: Floats, g: Floats) -> tuple[Floats, Floats, float]:
    """Shortest v with G v >= g, unit rows: v, multipliers, proven lower bound."""
    unit = float(g.max())
    best: tuple[float, Floats, Floats, float] | None = None
    scale = unit
    for _ in range(4):
        E = np.vstack([G.T, g / scale])
        norms = np.sqrt(np.einsum("ij,ij->j", E, E))
        target = np.zeros(len(E))
        target[-1] = 1.0
        try:
            y = nnls(E / norms, target, maxiter=30 * E.shape[1] + 100)[0] / norms
        except RuntimeError:  # cycling at rounding level; another scale changes the rounding
            scale *= 3.0
            continue
        push, gain = G.T @ y, float(g @ y)
        if np.linalg.norm(push) <= _SHARPEST * gain / unit:
            raise _infeasible("borders and bounds contradict each other")
        for v, multipliers in _candidates(G, g, y, push, gain):
            bound = _bound(G, g, multipliers)
            size = float(np.linalg.norm(v))
            error = max(float((g - G @ v).max()), size - bound) / max(size, unit)
            if best is None or error < best[0]:
                best = error, v, multipliers, bound
        assert best is not None
        if best[0] <= TOLERANCE / 8:
            break
        # least-distance programming is sharpest where the distance is about 1
        scale = max(float(np.linalg.norm(best[1])), unit) * 1.1
    if best is None:
        raise ConvergenceError(
            "non-negative least squares does not end",
            expected="an optimum of the nearest point's dual",
            got=f"{len(g)} borders without one",
            fix="rescale the columns, or choose another metric",
        )
    return best[1:]


def _candidates(G: Floats, g: Floats, y: Floats, push: Floats, gain: float) -> list[tuple[Floats, Floats]]:
    """Two readings of the same multipliers: as they are, and with the binding borders met to rounding."""
    # the length along G'y at which the dual is largest
    stretch = gain / float(push @ push)
    found = [(push * stretch, y * stretch)]
    on = np.flatnonzero(y > 0)
    if len(on):
        exact: Floats = np.asarray(np.linalg.lstsq(G[on], g[on], rcond=None)[0], dtype=np.float64)
        multipliers = np.zeros_like(y)
        multipliers[on] = np.maximum(np.linalg.lstsq(G[on].T, exact, rcond=None)[0], 0.0)
        found.append((exact, multipliers))
    return found


def _bound(G: Floats, g: Floats, multipliers: Floats) -> float:
    """No feasible v is shorter, whatever the multipliers >= 0."""
    push = float(np.linalg.norm(G.T @ multipliers))
    return max(float(g @ multipliers) / push, 0.0) if push > 0 else 0.0


def _infeasible(why: str) -> InfeasibleError:
    return InfeasibleError(
        "no point satisfies all borders and bounds",
        expected="a polytope with points in it",
        got=why,
        fix="widen the bounds, or let more columns change",
    )
