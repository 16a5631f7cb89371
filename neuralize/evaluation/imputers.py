r"""What takes the place of a removed value.

Every imputer answers one question: given a row and the set of its columns
that are removed, what else might stand there? All have one interface, and the
randomness they use belongs to rows, not to sets: a row meets the same donors
whatever the order in which its columns go, so that curves of different orders
and methods are compared on equal terms, and results do not depend on batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from lrp.errors import InputError, NotFittedError, TargetError, UnsupportedEstimatorError
from neuralize.evaluation._rows import Floats, Rows, count

__all__ = ["Imputer", "Marginal", "Mask", "Mean", "NearestMidpoint", "OtherCluster"]

Mask = npt.NDArray[np.bool_]


class Imputer(ABC):
    """Base class; a new imputer needs :meth:`fill`, and :attr:`numbers` if it is random.

    After ``fit`` it has ``reference``, the rows it draws from.
    """

    name: ClassVar[str] = ""
    reference: Rows | None = None

    @property
    def numbers(self) -> int:
        """Uniform random numbers per row and draw; 0: nothing is random, and one draw is all there is."""
        return 0

    @property
    def width(self) -> int:
        """Numbers held in work per row and set of removed columns, beside the result."""
        return 0

    def fit(self, reference: Any) -> Self:
        """Take the rows to draw from; returns self.

        Parameters
        ----------
        reference : array-like or DataFrame (M, D)
            In the units of the rows that are judged.

        Raises
        ------
        InputError, NonFiniteError
        """
        self.reference = Rows.of(reference, "reference")
        self._fitted()
        return self

    @abstractmethod
    def fill(self, X: Floats, removed: Mask, u: Floats) -> Floats:
        """Rows with the removed values replaced.

        Parameters
        ----------
        X : ndarray (n, D)
        removed : ndarray (S, n, D) of bool
            S sets for each row.
        u : ndarray (n, draws, numbers)
            Uniform on [0, 1).

        Returns
        -------
        ndarray (draws, S, n, D)
        """

    def draw(self, X: Any, removed: Any, rng: Any, size: int | None = None) -> Floats:
        """Replace the removed values of rows.

        Parameters
        ----------
        X : array-like or DataFrame (n, D)
        removed : array of bool (..., n, D)
            True where a value is removed; leading axes are alternative sets,
            which share the random numbers of the row.
        rng : Generator or int
        size : int, optional
            Number of draws.

        Returns
        -------
        ndarray (..., n, D)
            As ``removed``; with ``size`` in front where it is given.

        Raises
        ------
        NotFittedError, InputError, ColumnError, NonFiniteError

        Examples
        --------
        >>> import numpy as np
        >>> Mean().fit([[0.0, 1.0], [2.0, 5.0]]).draw([[7.0, 8.0]], [[False, True]], rng=0).tolist()
        [[7.0, 3.0]]
        """
        fitted = self._known()
        rows = Rows.of(X, features=fitted.features)
        mask = np.asarray(removed)
        if mask.dtype != np.bool_ or mask.shape[-2:] != rows.array.shape:
            raise InputError(
                "removed is no mask of X",
                expected=f"truth values (..., {len(rows)}, {fitted.features})",
                got=f"{mask.dtype} {mask.shape}",
                fix="mark the removed cells with True",
            )
        draws = 1 if size is None else count(size, "size")
        rng = np.random.default_rng(rng)
        sets = mask.reshape(-1, *rows.array.shape)
        filled = self.fill(rows.array, sets, rng.random((len(rows), draws, self.numbers)))
        filled = np.broadcast_to(filled, (draws, *filled.shape[1:])).reshape(draws, *mask.shape)
        return filled[0] if size is None else np.ascontiguousarray(filled)

    def _fitted(self) -> None:
        """Compute what is needed once; the reference is there."""
        self._known()

    def _known(self) -> Rows:
        if self.reference is None:
            raise NotFittedError(
                f"{type(self).__name__} has no rows to draw from",
                expected="a fitted imputer",
                got="one that is not",
                fix="call fit(reference), or pass reference=",
            )
        return self.reference

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options().items())
        return f"{type(self).__name__}({options})"

    def options(self) -> dict[str, Any]:
        """What was passed to the constructor, as far as it fits a line."""
        return {}


class Mean(Imputer):
    """The mean of the reference rows, column by column.

    It favours methods whose baseline is that mean; a mean of codes is no
    category.

    Examples
    --------
    >>> Mean().fit([[0.0], [4.0]]).draw([[9.0]], [[True]], rng=0).tolist()
    [[2.0]]
    """

    name = "mean"

    def _fitted(self) -> None:
        self.mean = self._known().array.mean(0)

    def fill(self, X: Floats, removed: Mask, u: Floats) -> Floats:
        return np.where(removed, self.mean, X)[None]


class Marginal(Imputer):
    """The values of a reference row, drawn uniformly: all removed columns from the same one.

    Columns that are removed keep their relations among each other, those to
    the kept ones are broken. A row may meet itself, if it is in the reference.

    Examples
    --------
    >>> Marginal().fit([[1.0, 10.0], [2.0, 20.0]]).draw([[5.0, 5.0]], [[True, True]], rng=0, size=3).tolist()
    [[[2.0, 20.0]], [[1.0, 10.0]], [[1.0, 10.0]]]
    """

    name = "marginal"

    @property
    def numbers(self) -> int:
        return 1

    def fill(self, X: Floats, removed: Mask, u: Floats) -> Floats:
        rows = self._known().array
        donor = (u[:, :, 0] * len(rows)).astype(np.int64).T
        return np.where(removed, rows[donor][:, None], X)


class OtherCluster(Imputer):
    """The values of a reference row of another cluster (or class), drawn uniformly among all of these.

    Parameters
    ----------
    labeller : NeuralizedModel, fitted estimator or callable
        Says to which cluster a row belongs.

    Raises
    ------
    TargetError
        If all reference rows belong to the cluster of a row.

    Examples
    --------
    >>> imputer = OtherCluster(lambda X: X[:, 0] > 0).fit([[-2.0, 1.0], [-1.0, 2.0], [3.0, 3.0]])
    >>> imputer.draw([[-5.0, 0.0]], [[False, True]], rng=0).tolist()
    [[-5.0, 3.0]]
    """

    name = "other"

    def __init__(self, labeller: Any) -> None:
        self.labeller = getattr(labeller, "predict", labeller)
        if not callable(self.labeller):
            raise InputError(
                "labeller can not say to which cluster a row belongs",
                expected="a NeuralizedModel, a fitted estimator with predict, or a callable",
                got=type(labeller).__name__,
                fix="pass the fitted clusterer",
            )

    @property
    def numbers(self) -> int:
        return 1

    def _labels(self, array: Floats) -> npt.NDArray[Any]:
        rows = self._known().form(array)
        if isinstance(rows, np.ndarray) and hasattr(getattr(self.labeller, "__self__", None), "state_dict"):
            import torch

            # a network takes a tensor for encoded numbers, which codes of categories are here
            rows = torch.tensor(rows)
        found = np.asarray(self.labeller(rows))
        if found.shape != (len(array),):
            raise InputError(
                "labeller does not give a label for each row",
                expected=f"({len(array)},)",
                got=str(found.shape),
                fix="return what predict returns",
            )
        return found

    def _fitted(self) -> None:
        rows = self._known().array
        labels = self._labels(rows)
        order = np.argsort(labels, kind="stable")
        self.sorted = rows[order]
        self.known, self.first, self.sizes = np.unique(labels[order], return_index=True, return_counts=True)

    def fill(self, X: Floats, removed: Mask, u: Floats) -> Floats:
        labels = self._labels(X)
        place = np.minimum(np.searchsorted(self.known, labels), len(self.known) - 1)
        mine = self.known[place] == labels
        # rows of its own cluster lie together and are jumped over
        first, size = np.where(mine, self.first[place], 0), np.where(mine, self.sizes[place], 0)
        others = len(self.sorted) - size
        if not others.all():
            raise TargetError(
                "there is no row of another cluster to draw from",
                expected="reference rows of at least two clusters",
                got=f"only cluster {self.known[:1].tolist()[0]!r}",
                fix="fit the imputer on more rows",
            )
        donor = (u[:, :, 0].T * others).astype(np.int64)
        donor += np.where(donor >= first, size, 0)
        return np.where(removed, self.sorted[donor][:, None], X)


class NearestMidpoint(Imputer):
    r"""The midpoint between the row's own centroid and the nearest competing one.

    For k-means and its relatives: with every column removed, the row lies on
    the border. It is the root point of the midpoint rule, so it favours that
    rule.

    Parameters
    ----------
    clusterer : fitted estimator, Pipeline or array (K, D)
        With ``cluster_centers_``; a Pipeline may scale or rotate in front, its
        steps must have ``inverse_transform``. Or the centres themselves.

    Raises
    ------
    UnsupportedEstimatorError
        Without centres, or behind steps that can not be inverted.

    Examples
    --------
    >>> NearestMidpoint([[0.0, 0.0], [4.0, 2.0], [9.0, 9.0]]).fit([[0.0, 0.0]]).draw(
    ...     [[1.0, 1.0]], [[True, False]], rng=0
    ... ).tolist()
    [[2.0, 1.0]]
    """

    name = "midpoint"

    def __init__(self, clusterer: Any) -> None:
        steps = getattr(clusterer, "steps", None)
        last = clusterer if steps is None else steps[-1][1]
        self.before = clusterer[:-1] if steps is not None and len(steps) > 1 else None
        centres = getattr(last, "cluster_centers_", None)
        if centres is None and not hasattr(last, "fit"):
            centres = clusterer
        try:
            array = None if centres is None else np.asarray(centres, dtype=np.float64)
        except (TypeError, ValueError):  # a network, a word
            array = None
        if array is None or array.ndim != 2 or len(array) < 2:
            raise UnsupportedEstimatorError(
                "there are no two centres to stand between",
                expected="cluster_centers_ (K, D) of a fitted estimator, K >= 2",
                got=type(last).__name__ if array is None else f"shape {array.shape}",
                fix="use OtherCluster(fitted) for clusterings without centres",
            )
        self.centres: Floats = array

    def _fitted(self) -> None:
        rows = self._known()
        k, d = self.centres.shape
        middle = ((self.centres[:, None] + self.centres) / 2).reshape(k * k, d)
        if self.before is not None:
            try:
                middle = np.asarray(self.before.inverse_transform(middle), dtype=np.float64)
            except AttributeError as error:
                raise UnsupportedEstimatorError(
                    "a step in front of the clusterer can not be inverted",
                    expected="steps with inverse_transform",
                    got=str(error),
                    fix="use OtherCluster(fitted)",
                ) from error
        if middle.shape[1] != rows.features:
            raise InputError(
                "the centres do not fit the reference rows",
                expected=f"{middle.shape[1]} columns",
                got=str(rows.features),
                fix="pass the rows the clusterer was fitted on",
            )
        self.middle = middle.reshape(k, k, -1)

    def fill(self, X: Floats, removed: Mask, u: Floats) -> Floats:
        rows = self._known()
        z = X if self.before is None else np.asarray(self.before.transform(rows.form(X)), dtype=np.float64)
        near = np.argsort(cdist(z, self.centres, "sqeuclidean"), axis=1, kind="stable")
        return np.where(removed, self.middle[near[:, 0], near[:, 1]], X)[None]
