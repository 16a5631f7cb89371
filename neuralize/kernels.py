r"""Product kernels: similarities whose logarithm is a sum over columns.

.. math:: k(x, u) = \prod_t \exp(-\gamma_t\, d_t(x_t, u_t)), \qquad
          -\log k(x, u) = \sum_t \gamma_t\, d_t(x_t, u_t)

====================  ======================================  ===================
kernel                :math:`d(x, u)` of one column           positive definite
====================  ======================================  ===================
``"rbf"``             :math:`(x-u)^2`                         yes
``"laplacian"``       :math:`|x-u|`                           yes
``"chi2"``            :math:`(x-u)^2/(x+u)`, 0 where both     yes, for :math:`x, u \ge 0`
                      are 0
``"l4"``              :math:`(x-u)^4`                         no
a callable            ``d(x, u)``, elementwise                as it may be
====================  ======================================  ===================

A cost is zero at u and never negative, so that k(u, u) = 1. Whatever explains
a kernel machine needs the costs per column, and whatever fits one needs the
matrix of k; both are here, for numpy arrays and for torch tensors alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError

__all__ = ["TERMS", "Anchors", "ProductKernel"]

Floats = npt.NDArray[np.float64]
Term = Callable[[Any, Any], Any]

# a block of this many kernel values stays in a core's cache between product, exponential and sums
_BLOCK = 2**16
# beyond this displacement exp(-|x|^2) is zero, so that rows further away need no digits
_UNDERFLOW = 28.0


def _square(x: Any, u: Any) -> Any:
    return (x - u) ** 2


def _absolute(x: Any, u: Any) -> Any:
    return abs(x - u)


def _chi2(x: Any, u: Any) -> Any:
    total = x + u
    return (x - u) ** 2 / (total + (total == 0))


def _fourth(x: Any, u: Any) -> Any:
    return ((x - u) ** 2) ** 2


TERMS: dict[str, Term] = {"rbf": _square, "laplacian": _absolute, "chi2": _chi2, "l4": _fourth}
"""Cost of one column, without its gamma, by the kernel's name; elementwise, with broadcasting."""

# d(a x, a u) = a^p d(x, u): columns can be scaled instead of costs
_DEGREES = {"rbf": 2.0, "laplacian": 1.0, "chi2": 1.0, "l4": 4.0}


@dataclass(frozen=True, eq=False)
class ProductKernel:
    r"""A kernel :math:`k(x,u) = \exp(-\sum_t \gamma_t d_t(x_t, u_t))`.

    Parameters
    ----------
    kernel : {"rbf", "laplacian", "chi2", "l4"} or callable
        The cost of one column: a name of :data:`TERMS`, or a function
        ``d(x, u)`` that works elementwise and with broadcasting, is zero for
        x = u and never negative. Use operators (``abs``, ``**``) rather than
        functions of numpy if it shall take torch tensors as well.
    gamma : float or array (D,)
        Inverse scale, one for all columns or one per column (automatic
        relevance determination); not negative.

    Raises
    ------
    InputError
        An unknown kernel; a gamma that is negative or not finite.

    Notes
    -----
    "l4" is no inner product in any Hilbert space: exp(-\|t\|^p) is positive
    definite for 0 < p <= 2 only (Schoenberg, 1938). What holds of all
    similarities, such as density forms, holds of it; what needs distances
    that are never negative does not.

    Examples
    --------
    >>> kernel = ProductKernel("laplacian", gamma=[1.0, 0.5])
    >>> kernel.terms(np.array([3.0, 1.0]), np.array([1.0, 1.0]))
    array([2., 0.])
    >>> kernel.cost(np.array([[3.0, 1.0]]), np.array([[1.0, 1.0], [3.0, 5.0]]))
    array([[2., 2.]])
    """

    kernel: str | Term
    gamma: float | npt.ArrayLike = 1.0

    def __post_init__(self) -> None:
        if not (callable(self.kernel) or self.kernel in TERMS):
            raise InputError(
                "unknown kernel",
                expected=f"one of {', '.join(TERMS)}, or a function d(x, u) of one column",
                got=repr(self.kernel),
                fix="choose one",
            )
        gamma = np.asarray(self.gamma, dtype=np.float64)
        if gamma.ndim > 1 or not (np.isfinite(gamma).all() and (gamma >= 0).all()):
            raise InputError(
                "gamma is no inverse scale",
                expected="a finite number >= 0, or one per column",
                got=str(self.gamma),
                fix="choose one",
            )
        object.__setattr__(self, "gamma", float(gamma) if gamma.ndim == 0 else gamma)

    @property
    def name(self) -> str:
        """The name in :data:`TERMS`, or that of the callable."""
        return self.kernel if isinstance(self.kernel, str) else getattr(self.kernel, "__name__", repr(self.kernel))

    @property
    def term(self) -> Term:
        """The cost of one column, without gamma: elementwise (x, u) -> d."""
        return TERMS[self.kernel] if isinstance(self.kernel, str) else self.kernel

    @property
    def positive_definite(self) -> bool | None:
        """Whether it is known to be (True), known not to be (False), or up to the user (None)."""
        return (self.kernel != "l4") if isinstance(self.kernel, str) else None

    def check(self, X: npt.NDArray[Any]) -> None:
        """Raise ``InputError`` where the kernel is not defined: negative values, for chi2."""
        if self.kernel == "chi2" and X.size and X.min() < 0:
            raise InputError(
                "Negative values in data passed to the chi2 kernel",
                expected="counts, histograms or other numbers >= 0",
                got=f"a smallest value of {X.min():.6g}",
                fix="shift or rescale the columns (MinMaxScaler), or use kernel='laplacian'",
            )

    def terms(self, x: Any, u: Any) -> Any:
        r"""Costs per column :math:`\gamma_t d_t(x_t, u_t)`: what each column contributes to -log k.

        Parameters
        ----------
        x, u : ndarray or Tensor (..., D)
            Broadcast against each other.

        Returns
        -------
        ndarray or Tensor (..., D)
        """
        return self.term(x, u) * _like(self.gamma, x)

    def cost(self, X: Any, U: Any) -> Any:
        """-log k of all pairs.

        Parameters
        ----------
        X : ndarray or Tensor (N, D)
        U : ndarray or Tensor (M, D)

        Returns
        -------
        ndarray or Tensor (N, M)
            Computed in float64 for arrays, in their own type for tensors.

        Notes
        -----
        O(N M D). The Gaussian takes one product of centred matrices, clamped
        at zero, unless the anchors lie so far apart that the difference of
        squares would lose digits; then, and for the other kernels, the columns
        are added one by one.
        """
        if hasattr(X, "new_tensor"):
            return self._tensor_cost(X, U)
        return Anchors(self, np.asarray(U)).cost(np.asarray(X))

    def gram(self, X: Any, U: Any) -> Any:
        """k of all pairs, (N, M); see :meth:`cost`."""
        cost = self.cost(X, U)
        if hasattr(cost, "neg_"):
            return (-cost).exp()
        return np.exp(np.negative(cost, out=cost), out=cost)

    def _tensor_cost(self, X: Any, U: Any) -> Any:
        import torch

        gamma = _like(self.gamma, X)
        if self.kernel == "rbf":
            middle = U.median(0).values
            x, u = (X - middle) * gamma**0.5, (U - middle) * gamma**0.5
            norms = (u * u).sum(1)
            eps = torch.finfo(X.dtype).eps
            if eps * (float(norms.max()) ** 0.5 + _UNDERFLOW) ** 2 <= (1e-10 if X.dtype == torch.float64 else 1e-4):
                return ((x * x).sum(1)[:, None] + norms - 2 * (x @ u.T)).clamp(min=0)
        total = X.new_zeros(len(X), len(U))
        for t in range(X.shape[1]):
            total += self.term(X[:, t, None], U[:, t]) * (gamma[t] if gamma.ndim else gamma)
        return total


def _like(gamma: Any, x: Any) -> Any:
    return x.new_tensor(gamma) if hasattr(x, "new_tensor") else np.asarray(gamma)


class Anchors:
    """Rows U that many others are compared with, block by block, prepared once.

    Parameters
    ----------
    kernel : ProductKernel
    U : ndarray (M, D)

    Attributes
    ----------
    far : bool
        Whether differences of squares would lose digits: the Gaussian then
        sums squared differences column by column, several times slower.

    Notes
    -----
    All arithmetic is in float64, whatever the type of the rows: one block is
    converted at a time. The kernel value of a pair does not depend on the other
    rows of the block, up to rounding.

    Examples
    --------
    >>> anchors = Anchors(ProductKernel("rbf", 0.5), np.array([[0.0], [2.0]]))
    >>> [k.round(3).tolist() for _, k in anchors.blocks(np.array([[0.0], [1.0]]))]
    [[[1.0, 0.135], [0.607, 0.607]]]
    """

    block: ClassVar[int] = _BLOCK

    def __init__(self, kernel: ProductKernel, U: npt.NDArray[Any]) -> None:
        self.kernel = kernel
        self.size, self.features = U.shape
        self._scale, self._shift, self._augmented, self.far = _prepared(kernel, U)
        self._anchors = _scaled(U, self._shift, self._scale)

    def rows(self) -> int:
        """Rows per block."""
        return int(np.clip(self.block // max(self.size, 1), 64, 4096))

    def slices(self, rows: int) -> Iterator[slice]:
        """The blocks of so many rows."""
        step = self.rows()
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def blocks(self, X: npt.NDArray[Any]) -> Iterator[tuple[slice, Floats]]:
        """Blocks of the matrix of k (N, M), with their rows; each block overwrites the last."""
        out = np.empty((min(self.rows(), max(len(X), 1)), self.size))
        for rows in self.slices(len(X)):
            yield rows, self.gram(X[rows], out[: rows.stop - rows.start])

    def gram(self, X: npt.NDArray[Any], out: Floats | None = None) -> Floats:
        """k of all pairs, (N, M)."""
        cost = self._negative_cost(X, out)
        return np.exp(cost, out=cost)

    def cost(self, X: npt.NDArray[Any], out: Floats | None = None) -> Floats:
        """-log k of all pairs, (N, M)."""
        cost = self._negative_cost(X, out)
        return np.negative(cost, out=cost)

    def _negative_cost(self, X: npt.NDArray[Any], out: Floats | None) -> Floats:
        x = _scaled(X, self._shift, self._scale)
        if out is None:
            out = np.empty((len(x), self.size))
        if self._augmented is not None:
            # [x, |x|^2, 1] . [2u, -1, -|u|^2] is minus the squared distance: one product, no pass for the norms
            left = np.empty((len(x), self.features + 2))
            left[:, :-2] = x
            left[:, -2] = np.einsum("ij,ij->i", left[:, :-2], left[:, :-2])
            left[:, -1] = 1.0
            return np.minimum(np.matmul(left, self._augmented, out=out), 0.0, out=out)
        return np.negative(self._sum(x, out), out=out)

    def _sum(self, x: Floats, out: Floats) -> Floats:
        """Costs of scaled rows, column by column."""
        with np.errstate(over="ignore"):
            if self.kernel.kernel in ("rbf", "laplacian"):
                from scipy.spatial.distance import cdist

                metric = "sqeuclidean" if self.kernel.kernel == "rbf" else "cityblock"
                return np.asarray(cdist(x, self._anchors, metric, out=out))
            out[:] = 0.0
            # a callable may have any degree: its gammas weigh the costs, not the columns
            weights = np.broadcast_to(np.asarray(self.kernel.gamma), (self.features,))
            for t in range(self.features):
                cost = self.kernel.term(x[:, t, None], self._anchors[:, t])
                out += cost if isinstance(self.kernel.kernel, str) else weights[t] * cost
        return out


def _prepared(kernel: ProductKernel, U: npt.NDArray[Any]) -> tuple[Floats | float, Floats | float, Floats | None, bool]:
    """Scale and shift of the columns, the right factor of the product form or None, and whether anchors are far."""
    if not isinstance(kernel.kernel, str):
        return 1.0, 0.0, None, False
    scale = np.asarray(kernel.gamma, dtype=np.float64) ** (1 / _DEGREES[kernel.kernel])
    if kernel.kernel == "chi2" or not len(U):  # chi2 has an origin
        return scale, 0.0, None, False
    # the median, not the mean: one row far away must not push the others away from zero
    shift = np.median(U, axis=0).astype(np.float64)
    if kernel.kernel != "rbf":
        return scale, shift, None, False
    u = _scaled(U, shift, scale)
    with np.errstate(over="ignore"):
        norms = (u * u).sum(1)
    if not np.finfo(np.float64).eps * (np.sqrt(norms.max()) + _UNDERFLOW) ** 2 <= 1e-10:
        return scale, shift, None, True
    return scale, shift, np.vstack([2 * u.T, np.full((1, len(u)), -1.0), -norms[None]]), False


def _scaled(X: npt.NDArray[Any], shift: Floats | float, scale: Floats | float) -> Floats:
    with np.errstate(over="ignore"):
        x: Floats = np.subtract(X, shift, dtype=np.float64)
        x *= scale
    # so far away that the kernel is zero, and squares are still finite
    return np.clip(x, -1e100, 1e100, out=x)
