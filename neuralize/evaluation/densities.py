"""Imputation from a density: what a removed value is like, given those that are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, ndtri

from lrp.errors import ConvergenceError, InputError, RuleError
from neuralize.evaluation._rows import Floats, Rows, count
from neuralize.evaluation.imputers import Imputer, Mask

__all__ = ["ConditionalKDE", "likelihood_bandwidth"]


class ConditionalKDE(Imputer):
    r"""A draw from a Gaussian kernel density of the reference, conditional on the kept columns.

    In units of each column's standard deviation over the reference, the
    density is a sum of isotropic Gaussians of bandwidth h around its M rows
    :math:`r_j`. Given the kept columns :math:`x_K`, row j is drawn with weight
    :math:`w_j \propto \exp(-|x_K - r_{jK}|^2 / 2h^2)` and the removed columns
    are :math:`r_{jt} + h \varepsilon_t`. With nothing kept all rows weigh the
    same.

    Parameters
    ----------
    bandwidth : "likelihood", "scott" or float > 0
        h, in those units. "likelihood" maximises the leave-one-out
        likelihood by the fixed point
        :math:`h^2 = \frac{1}{MD}\sum_{i \ne j} w_{ij} |r_i - r_j|^2` (pairs
        that coincide are left out: they would pull h to 0; so are columns that
        are constant); "scott" is :math:`M^{-1/(D+4)}`.
    local : float
        Adds :math:`-\lambda |x - r_j|^2`, over all columns, to the exponent:
        donors near the whole row, the removed columns included.
    noise : bool
        False draws the row itself, without :math:`h\varepsilon`.
    scale : bool
        False takes the columns as they are: for columns of one unit, such as
        pixels, of which the nearly constant ones should not count as much as
        the others.
    rows : int
        Of a larger reference a fixed random subset of this size is used.

    Notes
    -----
    The protocol of Bley et al. 2025 (arXiv 2508.03913), whose data are
    standardised already, who keep up to 5000 rows and have local = 0 or 10.
    The fixed point is that of Leiva-Murillo and Artes-Rodriguez, Pattern
    Recognition Letters 33, 2012. Meant for real numbers: between two codes of
    a category it draws numbers that are neither.
    Cost: fitting O(M^2 D), and O(M^2) for each of its steps; drawing O(M D) per row
    and set of removed columns.

    Examples
    --------
    >>> kde = ConditionalKDE(bandwidth=0.01).fit([[0.0, 0.0], [1.0, 10.0]])
    >>> kde.conditional_mean([[0.9, 3.0]], [[False, True]]).round(3).tolist()
    [[0.9, 10.0]]
    """

    name = "kde"

    def __init__(
        self,
        bandwidth: float | str = "likelihood",
        local: float = 0.0,
        noise: bool = True,
        scale: bool = True,
        rows: int = 2000,
    ) -> None:
        number = isinstance(bandwidth, (int, float, np.number)) and not isinstance(bandwidth, bool)
        if not (number and 0 < float(bandwidth) < np.inf) and bandwidth not in ("likelihood", "scott"):
            raise RuleError(
                "unknown bandwidth",
                expected="'likelihood', 'scott' or a number > 0",
                got=repr(bandwidth),
                fix="choose one",
            )
        if not 0 <= local < np.inf:
            raise RuleError("local is no weight", expected="a number >= 0", got=repr(local), fix="choose one")
        self.bandwidth, self.local, self.noise = bandwidth, float(local), bool(noise)
        self.scale, self.rows = bool(scale), count(rows, "rows")

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("bandwidth", "local", "noise", "scale", "rows")}

    @property
    def numbers(self) -> int:
        return 1 + (self._known().features if self.noise else 0)

    @property
    def width(self) -> int:
        return 3 * len(self.points) + 3 * self._known().features

    def _fitted(self) -> None:
        known = self._known()
        rows, deviations = known.array, known.scale
        if len(rows) > self.rows:
            rows = rows[np.sort(np.random.default_rng(0).permutation(len(rows))[: self.rows])]
        self.raw = rows
        self.unit = np.where((deviations > 0) & self.scale, deviations, 1.0)
        self.centre = known.array.mean(0)
        self.points = (rows - self.centre) / self.unit
        self.constant = deviations == 0
        varying = self.points[:, ~self.constant]
        m, d = varying.shape
        if self.bandwidth == "likelihood":
            self.h = likelihood_bandwidth(varying)
        else:
            self.h = m ** (-1 / (d + 4)) if self.bandwidth == "scott" else float(self.bandwidth)

    def weights(self, X: Floats, removed: Mask) -> Floats:
        """Weights of the reference rows, (S, n, M), of rows (n, D) for sets (S, n, D); they sum to 1."""
        z = (X - self.centre) / self.unit
        kept = (~removed).astype(np.float64)
        # |x_K - r_K|^2 from products, so that no (S, n, M, D) is built; what depends on x alone cancels
        exponent: Floats = (kept * z) @ self.points.T
        exponent *= 2.0
        exponent -= kept @ (self.points**2).T
        exponent *= 1 / (2 * self.h**2)
        if self.local:
            exponent -= self.local * cdist(z, self.points, "sqeuclidean")
        exponent -= exponent.max(-1, keepdims=True)
        np.exp(exponent, out=exponent)
        exponent /= exponent.sum(-1, keepdims=True)
        return exponent

    def conditional_mean(self, X: Any, removed: Any) -> Floats:
        """Mean of the draws, exactly: rows (n, D), their removed values (..., n, D) replaced by it."""
        rows = Rows.of(X, features=self._known().features)
        mask = np.asarray(removed, dtype=bool)
        sets = mask.reshape(-1, *rows.array.shape)
        mean = self.weights(rows.array, sets) @ self.raw
        return np.where(sets, mean, rows.array).reshape(mask.shape)

    def fill(self, X: Floats, removed: Mask, u: Floats) -> Floats:
        s, n, _ = removed.shape
        m = len(self.points)
        cumulative = np.cumsum(self.weights(X, removed), axis=-1)
        cumulative /= cumulative[..., -1:]
        # one sorted array for all searches: row i of it lies in [i, i + 1]
        offset = np.arange(s * n, dtype=np.float64).reshape(s, n)
        cumulative += offset[..., None]
        wanted = u[:, :, 0].T[:, None] + offset
        donor = np.searchsorted(cumulative.ravel(), wanted.ravel(), side="right").reshape(wanted.shape)
        donor = np.clip(donor - (offset * m).astype(np.int64), 0, m - 1)
        drawn = self.raw[donor]
        if self.noise:
            normal = ndtri(np.maximum(u[:, :, 1:], 2.0**-54)).swapaxes(0, 1)
            # a column that is constant in the reference has no width
            drawn += normal[:, None] * np.where(self.constant, 0.0, self.h * self.unit)
        return np.where(removed, drawn, X)


def likelihood_bandwidth(points: Floats) -> float:
    """Bandwidth of an isotropic Gaussian kernel density that maximises the leave-one-out likelihood.

    Raises
    ------
    InputError
        If no two rows differ.
    ConvergenceError
    """
    d2 = cdist(points, points, "sqeuclidean")
    # a row is left out together with its copies
    d2[d2 == 0] = np.inf
    d2 = d2[np.isfinite(d2).any(1)]
    if not len(d2):
        raise InputError(
            "the reference has no two rows that differ",
            expected="at least two",
            got=f"{len(points)} equal rows",
            fix="fit the imputer on more rows, or pass bandwidth= as a number",
        )
    apart = np.where(np.isfinite(d2), d2, 0.0)
    variance = float(apart.sum() / np.isfinite(d2).sum() / (2 * points.shape[1]))
    for _ in range(1000):
        w = -d2 / (2 * variance)
        w = np.exp(w - logsumexp(w, axis=1, keepdims=True))
        old, variance = variance, float((w * apart).sum() / (d2.shape[0] * points.shape[1]))
        if abs(variance - old) <= 1e-6 * variance:
            return float(np.sqrt(variance))
    raise ConvergenceError(
        "the bandwidth of largest likelihood was not found",
        expected="a fixed point within 1000 steps",
        got=f"h = {np.sqrt(variance):.3g} and moving",
        fix="pass bandwidth='scott' or a number",
    )
