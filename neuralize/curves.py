r"""Monotone curves: steps that send each column through a function of its own.

A one-to-one map leaves the relevance of a column where it is. It also has an
inverse value, so that a break-even point found behind it goes back to the
column's own units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor

from neuralize.stages import Stage

__all__ = ["FUNCTIONS", "Curve", "PowerCurve", "QuantileCurve"]

Function = Callable[[Tensor], Tensor]


def _as(x: Tensor, value: Any) -> Tensor:
    """Numbers as a tensor like x: exporters round plain numbers to float32."""
    return torch.tensor(value, dtype=x.dtype, device=x.device)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, math.nan)


def _damped(x: Tensor) -> Tensor:
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.log(torch.where(zero, torch.ones_like(x), x)) + 1)


FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "log": (torch.log, torch.exp),
    "log1p": (torch.log1p, torch.expm1),
    "log2": (lambda x: torch.log(x) / _as(x, math.log(2)), torch.exp2),
    "log10": (lambda x: torch.log(x) / _as(x, math.log(10)), lambda y: torch.pow(10.0, y)),
    "exp": (torch.exp, lambda y: torch.log(_positive(y))),
    "expm1": (torch.expm1, torch.log1p),
    "sqrt": (torch.sqrt, lambda y: torch.where(y >= 0, y * y, math.nan)),
    # counts: zero stays zero, and no count lies between 0 and 1
    "1 + log": (_damped, lambda y: torch.where(y == 0, y, torch.where(y >= 1, torch.exp(y - 1), math.nan))),
}
"""Elementwise functions by name, with their inverses; NaN where there is none."""


class Curve(Stage):
    """The same function for every column.

    Parameters
    ----------
    name : str
        One of ``FUNCTIONS``.
    columns : int
    source : str

    Examples
    --------
    >>> Curve("log2", 1)(torch.tensor([[8.0]])).item()
    3.0
    """

    def __init__(self, name: str, columns: int, source: str = "FunctionTransformer") -> None:
        super().__init__()
        self.name, self.source = name, source
        self.inputs = self.outputs = columns

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name][0](x)

    def invert(self, y: Tensor, columns: Tensor) -> Tensor:
        return FUNCTIONS[self.name][1](y)

    def shares(self) -> Any:
        return scipy.sparse.eye_array(self.outputs, format="csr")

    def extra_repr(self) -> str:
        return f"{self.source}: {self.name}(x)"


class PowerCurve(Stage):
    r"""Power transforms, one exponent :math:`\lambda` per column.

    Box-Cox: :math:`(x^\lambda - 1)/\lambda` for x > 0. Yeo-Johnson: the same of
    1 + x for x >= 0, and :math:`-((1-x)^{2-\lambda} - 1)/(2-\lambda)` below. The
    limits at exponent 0 are logarithms. Source: Yeo and Johnson, "A new family
    of power transformations to improve normality or symmetry", Biometrika 87,
    2000.

    Parameters
    ----------
    exponents : array (D,)
    method : "yeo-johnson" or "box-cox"
    source : str

    Examples
    --------
    >>> PowerCurve([2.0])(torch.tensor([[1.0]], dtype=torch.float64)).item()
    1.5
    """

    exponents: Tensor

    def __init__(self, exponents: npt.ArrayLike, method: str = "yeo-johnson", source: str = "PowerTransformer") -> None:
        super().__init__()
        self.register_buffer("exponents", torch.tensor(np.array(exponents, dtype=np.float64)))
        self.inputs = self.outputs = len(self.exponents)
        self.method, self.source = method, source

    def forward(self, x: Tensor) -> Tensor:
        p = self.exponents
        if self.method == "box-cox":
            return _power(torch.log(_positive(x)), p)
        below = x < 0
        up = _power(torch.log1p(torch.where(below, 0.0, x)), p)
        down = -_power(torch.log1p(torch.where(below, -x, 0.0)), 2 - p)
        return torch.where(below, down, up)

    def invert(self, y: Tensor, columns: Tensor) -> Tensor:
        p = self.exponents[columns]
        if self.method == "box-cox":
            return torch.exp(_root(y, p))
        return torch.where(y < 0, -torch.expm1(_root(-y, 2 - p)), torch.expm1(_root(y, p)))

    def shares(self) -> Any:
        return scipy.sparse.eye_array(self.outputs, format="csr")

    def extra_repr(self) -> str:
        return f"{self.source}: {self.method}, {self.outputs} exponents"


def _power(log: Tensor, p: Tensor) -> Tensor:
    """(exp(p log) - 1) / p, and its limit at p = 0."""
    zero = p.abs() < 2.220446049250313e-16
    safe = torch.where(zero, torch.ones_like(p), p)
    return torch.where(zero, log, torch.expm1(safe * log) / safe)


def _root(y: Tensor, p: Tensor) -> Tensor:
    """The logarithm that ``_power`` sends to y; NaN where there is none."""
    zero = p.abs() < 2.220446049250313e-16
    safe = torch.where(zero, torch.ones_like(p), p)
    return torch.where(zero, y, torch.log1p(safe * y) / safe)


class QuantileCurve(Stage):
    """Empirical distribution functions, one per column, then to a uniform or a normal distribution.

    A value between two quantiles is interpolated; on a run of equal quantiles
    it takes the middle of the run. Values beyond the fitted range go to the
    ends, which no break-even point can pass.

    Parameters
    ----------
    quantiles : array (Q, D)
        Ascending in each column.
    levels : array (Q,)
        Their probabilities.
    normal : bool
        To a normal distribution, cut at the probability 1e-7 on each side.
    source : str

    Notes
    -----
    O(N D log Q): a search by halves, written out so that it can be exported.

    Examples
    --------
    >>> curve = QuantileCurve([[0.0], [10.0], [20.0]], [0.0, 0.5, 1.0])
    >>> curve(torch.tensor([[5.0], [99.0]], dtype=torch.float64)).tolist()
    [[0.25], [1.0]]
    """

    knots: Tensor
    levels: Tensor
    first: Tensor
    bound: Tensor
    ends: Tensor
    hides = True

    def __init__(
        self,
        quantiles: npt.ArrayLike,
        levels: npt.ArrayLike,
        normal: bool = False,
        source: str = "QuantileTransformer",
    ) -> None:
        super().__init__()
        table = np.array(quantiles, dtype=np.float64)
        self.size, self.inputs = table.shape
        self.outputs, self.normal, self.source = self.inputs, normal, source
        self.register_buffer("knots", torch.tensor(np.ascontiguousarray(table.T)))
        self.register_buffer("levels", torch.tensor(np.array(levels, dtype=np.float64)))
        self.register_buffer("first", torch.arange(self.inputs) * self.size)
        tiny = 1e-7 - float(np.spacing(1))
        self.register_buffer("bound", torch.tensor(1e-7, dtype=torch.float64))
        self.register_buffer("ends", torch.tensor([tiny, 1 - tiny], dtype=torch.float64))

    def _knot(self, place: Tensor) -> Tensor:
        """Quantiles (N, D) at positions (N, D)."""
        flat = (place + self.first).reshape(-1)
        return self.knots.reshape(-1).index_select(0, flat).reshape(place.shape)

    def _level(self, place: Tensor) -> Tensor:
        return self.levels.index_select(0, place.reshape(-1)).reshape(place.shape)

    def _count(self, x: Tensor, equal: bool) -> Tensor:
        """How many quantiles are below x, or not above it (``equal``)."""
        found = torch.zeros_like(x, dtype=torch.int64)
        step = 1 << (self.size.bit_length() - 1)
        while step:
            more = found + step
            knot = self._knot((more - 1).clamp(max=self.size - 1))
            inside = (more <= self.size) & ((knot <= x) if equal else (knot < x))
            found = torch.where(inside, more, found)
            step >>= 1
        return found

    def forward(self, x: Tensor) -> Tensor:
        last = self.size - 1
        # the highest and the lowest level of x; they differ on runs of equal quantiles
        j = (self._count(x, equal=True) - 1).clamp(min=0, max=last)
        after = (j + 1).clamp(max=last)
        k, y = self._knot(j), self._level(j)
        rise = (self._level(after) - y) / (self._knot(after) - k)
        high = torch.where((x > k) & (j < last), rise * (x - k) + y, y)
        i = self._count(x, equal=False).clamp(max=last)
        before = (i - 1).clamp(min=0)
        k, y = self._knot(i), self._level(i)
        rise = (y - self._level(before)) / (k - self._knot(before))
        low = torch.where((x < k) & (i > 0), y - rise * (k - x), y)
        z = 0.5 * (high + low)
        bottom, top = self.knots[:, 0], self.knots[:, -1]
        above = (x + self.bound > top) if self.normal else (x == top)
        below = (x - self.bound < bottom) if self.normal else (x == bottom)
        z = torch.where(above, 1.0, z)
        z = torch.where(below, 0.0, z)
        z = torch.where(x.isnan(), x, z)
        if self.normal:
            z = normal_quantile(torch.minimum(torch.maximum(z, self.ends[0]), self.ends[1]))
        return z

    def invert(self, y: Tensor, columns: Tensor) -> Tensor:
        inside = (y >= 0) & (y <= 1)
        if self.normal:
            ends = normal_quantile(self.ends)
            inside = (y >= ends[0]) & (y <= ends[1])
            y = torch.special.ndtr(y)
        y = torch.where(inside, y, 0.0).contiguous()
        j = (torch.searchsorted(self.levels, y, right=True) - 1).clamp(0, self.size - 1)
        after = (j + 1).clamp(max=self.size - 1)
        table = self.knots[columns].T
        a, b = table.gather(0, j), table.gather(0, after)
        low, high = self.levels[j], self.levels[after]
        x = torch.where(high > low, a + (b - a) * ((y - low) / (high - low)), a)
        return torch.where(inside, x, math.nan)

    def shares(self) -> Any:
        return scipy.sparse.eye_array(self.outputs, format="csr")

    def extra_repr(self) -> str:
        return f"{self.source}: {self.size} quantiles, to {'normal' if self.normal else 'uniform'}"


# Wichura, "Algorithm AS 241: the percentage points of the normal distribution", Applied Statistics 37, 1988
_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_TAIL = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip


def _ratio(r: Tensor, terms: Tensor) -> Tensor:
    # the highest term first, not added to a zero: an optimiser of graphs takes 1e-9 for nothing
    top, low = r * terms[0, -1], r * terms[1, -1]
    for k in reversed(range(1, terms.shape[1] - 1)):
        top, low = (top + terms[0, k]) * r, (low + terms[1, k]) * r
    return (top + terms[0, 0]) / (low + terms[1, 0])


def normal_quantile(p: Tensor) -> Tensor:
    """The inverse of the normal distribution function, for 1e-11 < p < 1 - 1e-11.

    Of elementary operations only, which every export format knows; accurate
    to about 1e-15, relative. Source: Wichura's algorithm AS 241.

    Parameters
    ----------
    p : Tensor

    Returns
    -------
    Tensor like p

    Examples
    --------
    >>> round(normal_quantile(torch.tensor(0.975, dtype=torch.float64)).item(), 6)
    1.959964
    """
    q = p - 0.5
    near = q.abs() <= 0.425
    centre = q * _ratio(_as(p, 0.180625) - q * q, _as(p, _CENTRE))
    edge = torch.where(near, 0.25, torch.where(q < 0, p, 1 - p))
    tail = _ratio((-edge.log()).sqrt() - _as(p, 1.6), _as(p, _TAIL))
    return torch.where(near, centre, torch.where(q < 0, -tail, tail))
