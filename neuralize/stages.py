"""Stages: the steps of a pipeline in front of a head, as layers.

Each stage computes what the fitted transformer's ``transform`` computes, and
knows the way back: how relevance of its outputs becomes relevance of its
inputs, and which input leads to an output. :class:`neuralize.fronts.Front` puts
stages one behind the other and works out the way back through all of them.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor, nn

from lrp.errors import UnsupportedEstimatorError
from neuralize._strands import Strand, assemble
from neuralize.frames import Frame

__all__ = ["Monomials", "Projection", "Selection", "Stage", "UnitNorm", "picking"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Stage(nn.Module):
    """One step in front of the head.

    Subclasses implement ``forward`` and :meth:`shares`; those that are affine
    column by column also :meth:`line`, those that have an inverse value
    :meth:`invert`. Others override what differs.

    Attributes
    ----------
    inputs, outputs : int
        Columns it takes and gives.
    source : str
        Name of the estimator it stands for; shown by ``print(net)``.
    step : str
        Name of the step in the pipeline, for messages.
    hides : bool
        Whether an infinite input may leave it finite.
    codes : bool
        Whether it only asks for equality, so that its inputs may be codes of categories.
    """

    inputs: int
    outputs: int
    source: str = "Stage"
    step: str = ""
    hides: bool = False
    codes: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (N, outputs) of inputs (N, inputs)."""
        raise NotImplementedError

    def apply_(self, x: Tensor) -> Tensor:
        """``forward``, which may overwrite x."""
        return self(x)  # type: ignore[no-any-return]

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.source} (step {self.step!r})" if self.step else self.source

    def shares(self) -> Any:
        """Sparse (outputs, inputs): how the relevance of each output is shared among the inputs.

        Rows sum to 1, or to 0 for outputs that are constants. Not defined for
        outputs that mix.
        """
        raise NotImplementedError

    def line(self) -> tuple[Floats, Floats] | None:
        """Slope and intercept (outputs,) of a stage that is affine column by column, else None."""
        return None

    def closes(self) -> Bools:
        """Outputs (outputs,) that are not affine in their input."""
        return np.full(self.outputs, self.line() is None)

    def mixes(self) -> Bools:
        """Outputs (outputs,) that are affine functions of several inputs."""
        return np.zeros(self.outputs, dtype=bool)

    def keeps(self) -> Ints:
        """Per output the input it repeats unchanged, or -1 (outputs,)."""
        return np.full(self.outputs, -1, dtype=np.int64)

    def missing(self, mask: Bools) -> Bools:
        """Outputs that are NaN where some inputs are: (n, inputs) -> (n, outputs)."""
        reads = scipy.sparse.csr_array(self.shares() != 0).astype(np.float64)
        return np.asarray((reads @ mask.T.astype(np.float64)).T > 0)

    def invert(self, y: Tensor, columns: Tensor) -> Tensor:
        """Inputs that lead to values of some outputs; NaN where none does, or not one alone.

        Parameters
        ----------
        y : Tensor (N, k)
            Values of the outputs named by ``columns``.
        columns : LongTensor (k,)
        """
        return torch.full_like(y, math.nan)

    def back(self, strand: Strand) -> list[Strand]:
        """Take rows from the outputs to the inputs."""
        line = self.line() or (None, None)
        return [strand.passed(self, self.shares(), self.closes(), *line)]

    def frame(self) -> Frame:
        """The way back through this stage alone."""
        return assemble(self.back(Strand.start(self.outputs)), self.inputs, self.outputs)

    def extra_repr(self) -> str:
        return f"{self.source}: {self.inputs} -> {self.outputs}"


def picking(columns: Ints, inputs: int) -> Any:
    """Sparse (len(columns), inputs) with a 1 per row; none for columns that are -1."""
    rows = np.flatnonzero(columns >= 0)
    return scipy.sparse.csr_array(
        (np.ones(len(rows)), (rows, columns[rows])), shape=(len(columns), inputs), dtype=np.float64
    )


class Selection(Stage):
    """Some of the columns.

    Parameters
    ----------
    index : array (d,)
        Positions of the columns kept, in order.
    inputs : int
    source : str

    Examples
    --------
    >>> Selection([2, 0], inputs=3)(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
    [[3.0, 1.0]]
    """

    index: Tensor
    hides = True
    codes: ClassVar[bool] = True

    def __init__(self, index: npt.ArrayLike, inputs: int, source: str = "Selection") -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(np.asarray(index, dtype=np.int64)))
        self.inputs, self.outputs, self.source = inputs, len(self.index), source

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)

    def keeps(self) -> Ints:
        return np.asarray(self.index.cpu().numpy(), dtype=np.int64)

    def shares(self) -> Any:
        return picking(self.keeps(), self.inputs)

    def line(self) -> tuple[Floats, Floats]:
        return np.ones(self.outputs), np.zeros(self.outputs)

    def invert(self, y: Tensor, columns: Tensor) -> Tensor:
        return y


class Projection(Stage):
    r"""An affine map with a right inverse: :math:`z = T(x - c) + t`, :math:`\hat x = c + L(z - t)`.

    Parameters
    ----------
    matrix : array (d, D)
        T.
    inverse : array (D, d), optional
        L with TL = I; by default the pseudo-inverse.
    centre : array (D,), optional
        c; where the inverse puts what T does not see.
    image : array (d,), optional
        t, the image of the centre; default 0.
    source : str

    Raises
    ------
    UnsupportedEstimatorError
        The rows of T are linearly dependent, so that there is no right inverse.

    Notes
    -----
    Centring comes first, so that columns far from 0 lose no digits.

    Examples
    --------
    >>> stage = Projection([[1.0, 1.0]], centre=[1.0, 2.0])
    >>> stage(torch.tensor([[2.0, 5.0]], dtype=torch.float64)).item()
    4.0
    """

    matrix: Tensor
    inverse: Tensor
    centre: Tensor | None
    image: Tensor | None

    def __init__(
        self,
        matrix: npt.ArrayLike,
        *,
        inverse: npt.ArrayLike | None = None,
        centre: npt.ArrayLike | None = None,
        image: npt.ArrayLike | None = None,
        source: str = "Projection",
        step: str = "",
    ) -> None:
        super().__init__()
        T = np.array(matrix, dtype=np.float64)
        self.source, self.step = source, step
        self.outputs, self.inputs = T.shape
        L = np.linalg.pinv(T) if inverse is None else np.array(inverse, dtype=np.float64)
        gap = float(np.abs(T @ L - np.eye(len(T))).max(initial=0.0))
        if not gap < 1e-7:
            raise UnsupportedEstimatorError(
                f"{self.label} makes linearly dependent coordinates, so that relevance has no unique way back",
                expected="components of full rank",
                got=f"{self.outputs} coordinates of rank {np.linalg.matrix_rank(T)} from {self.inputs} columns",
                fix="ask for fewer components and fit again",
            )
        self.register_buffer("matrix", torch.tensor(T))
        self.register_buffer("inverse", torch.tensor(L))
        self.register_buffer("centre", None if centre is None else torch.tensor(np.array(centre, dtype=np.float64)))
        self.register_buffer("image", None if image is None else torch.tensor(np.array(image, dtype=np.float64)))

    def forward(self, x: Tensor) -> Tensor:
        if self.centre is not None:
            x = x - self.centre
        return x @ self.matrix.T if self.image is None else torch.addmm(self.image, x, self.matrix.T)

    def shares(self) -> Any:
        return scipy.sparse.csr_array((self.outputs, self.inputs))

    def closes(self) -> Bools:
        return np.zeros(self.outputs, dtype=bool)

    def mixes(self) -> Bools:
        return np.ones(self.outputs, dtype=bool)

    def missing(self, mask: Bools) -> Bools:
        return np.repeat(mask.any(1, keepdims=True), self.outputs, axis=1)

    def back(self, strand: Strand) -> list[Strand]:
        def get(tensor: Tensor | None, width: int) -> Floats:
            return np.zeros(width) if tensor is None else np.asarray(tensor.double().cpu().numpy())

        return strand.folded(
            self,
            np.asarray(self.matrix.double().cpu().numpy()),
            np.asarray(self.inverse.double().cpu().numpy()),
            get(self.centre, self.inputs),
            get(self.image, self.outputs),
        )


class Monomials(Stage):
    """Products of columns; the relevance of a product is shared by degree.

    Parameters
    ----------
    powers : array of int (n, D)
        Exponents of each product; a row of zeros is the constant 1, which
        belongs to no column.
    source : str

    Examples
    --------
    >>> stage = Monomials([[0, 0], [1, 0], [2, 1]])
    >>> stage(torch.tensor([[3.0, 2.0]])).tolist()
    [[1.0, 3.0, 18.0]]
    >>> stage.shares().toarray().round(2).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.67, 0.33]]
    """

    factors: Tensor

    def __init__(self, powers: npt.ArrayLike, source: str = "PolynomialFeatures") -> None:
        super().__init__()
        P = np.asarray(powers, dtype=np.int64)
        self.source, self.powers = source, P
        self.outputs, self.inputs = P.shape
        degree = P.sum(1)
        factors = np.zeros((len(P), max(1, int(degree.max(initial=0)))), dtype=np.int64)
        for row, power in enumerate(P):
            # last column first, as scikit-learn multiplies; 0 stands for the factor 1
            found = np.repeat(np.arange(self.inputs), power)[::-1]
            factors[row, : len(found)] = found + 1
        self.register_buffer("factors", torch.tensor(factors))

    def forward(self, x: Tensor) -> Tensor:
        one = torch.cat([torch.ones_like(x[:, :1]), x], 1)
        z = one.index_select(1, self.factors[:, 0])
        for k in range(1, self.factors.shape[1]):
            z = z * one.index_select(1, self.factors[:, k])
        return z

    def shares(self) -> Any:
        return scipy.sparse.csr_array(self.powers / np.maximum(self.powers.sum(1, keepdims=True), 1))

    def closes(self) -> Bools:
        return np.asarray(self.powers.sum(1) != 1)

    def keeps(self) -> Ints:
        return np.where(self.powers.sum(1) == 1, self.powers.argmax(1), -1)

    def invert(self, y: Tensor, columns: Tensor) -> Tensor:
        kept = torch.as_tensor(self.keeps(), device=y.device)[columns]
        return torch.where(kept >= 0, y, math.nan)

    def extra_repr(self) -> str:
        return f"{self.source}: {self.inputs} -> {self.outputs}, degree {int(self.powers.sum(1).max(initial=0))}"


class UnitNorm(Stage):
    r"""Rows divided by their norm.

    On the way back the norm is held fixed: displacements are multiplied by it
    and covectors divided, so that relevance stays where it is. What a column
    does through the norm of its row is not told apart.

    Parameters
    ----------
    columns : int
    norm : "l1", "l2" or "max"
    tiny : float
        Norms below it are taken as 1; rows of zeros stay.
    source : str

    Examples
    --------
    >>> UnitNorm(2)(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """

    hides = True

    def __init__(self, columns: int, norm: str = "l2", tiny: float = 0.0, source: str = "Normalizer") -> None:
        super().__init__()
        self.inputs = self.outputs = columns
        self.norm, self.tiny, self.source = norm, tiny, source

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "l1":
            size = x.abs().sum(1, keepdim=True)
        elif self.norm == "l2":
            size = (x * x).sum(1, keepdim=True).sqrt()
        else:
            size = x.abs().amax(1, keepdim=True)
        return x / torch.where(size <= self.tiny, torch.ones_like(size), size)

    def shares(self) -> Any:
        return scipy.sparse.eye_array(self.outputs, format="csr")

    def line(self) -> tuple[Floats, Floats]:
        # the factor, one over the norm, cancels in every product; there is no fixed point
        return np.ones(self.outputs), np.full(self.outputs, np.nan)

    def missing(self, mask: Bools) -> Bools:
        return np.repeat(mask.any(1, keepdims=True), self.outputs, axis=1)

    def extra_repr(self) -> str:
        return f"{self.source}: x / |x| ({self.norm})"
