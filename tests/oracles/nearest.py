"""The nearest point of a polytope by a general solver, from several starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
from scipy.optimize import minimize


def general_solver(
    x: np.ndarray,
    A: np.ndarray,
    b: np.ndarray,
    w: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    starts: Iterable[np.ndarray],
) -> float:
    """Shortest distance that sequential quadratic programming finds from several starts."""
    best, scale = np.inf, np.sqrt(w)
    v_low, v_high = (low - x) * scale, (high - x) * scale
    G, g = A / scale, A @ x + b
    for start in starts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = minimize(
                lambda v: v @ v / 2,
                np.clip((start - x) * scale, v_low, v_high),
                jac=lambda v: v,
                method="SLSQP",
                bounds=list(zip(v_low, v_high, strict=True)),
                constraints={"type": "ineq", "fun": lambda v: G @ v + g, "jac": lambda _: G},
                options={"ftol": 1e-12, "maxiter": 500},
            )
        # "positive directional derivative" is what it calls an optimum it can not improve
        if (G @ found.x + g).min() > -1e-7:
            best = min(best, float(np.linalg.norm(found.x)))
    return best
