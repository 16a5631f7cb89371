"""What is tracked while columns are removed: one number per row, of the target the row started with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError, NonFiniteError, OutputError, RuleError, TargetError
from neuralize.evaluation._rows import Floats, Rows, explained

if TYPE_CHECKING:
    from neuralize.network import NeuralizedModel

__all__ = ["Score", "target_of"]

BATCH = 2**21  # numbers per call of the score: 16 MB


def target_of(score: Any, values: Any, target: Any) -> Any:
    """The target, by default the one an Explanation was made for.

    Raises
    ------
    RuleError
        A network's logits can not judge the explanation of a duel.
    """
    if target is not None or not explained(values) or not _network(score):
        return target
    if values.contrast is not None:
        raise RuleError(
            "the explanation is of a duel, the score is a logit",
            expected="an explanation without contrast, or the duel as a callable",
            got="contrast given",
            fix="pass score=lambda X: ..., the output of the duel, and values=explanation.values",
        )
    return values.target


def _network(score: Any) -> bool:
    if not hasattr(score, "state_dict"):
        return False
    from neuralize.network import NeuralizedModel

    return isinstance(score, NeuralizedModel)


class Score:
    """A score of rows, each with its own target.

    Parameters
    ----------
    score : NeuralizedModel or callable
        A network gives its logits. A callable takes rows (M, D), a frame if X
        is one, and returns (M,), or (M, K) of which ``target`` selects a column.
    rows : Rows
        Those that are judged.
    target : None, label or array (N,)
        Labels of a network, positions of columns of a callable. None: each
        row's own, what ``net.predict`` says or the largest column.
    X : optional
        The rows as the user gave them, so that the network checks its columns.

    Attributes
    ----------
    start : ndarray (N,)
        Score of the rows as they are.
    position : ndarray (N,) or None
        Column of each row's target; None where the score is a single number.
    """

    def __init__(self, score: Any, rows: Rows, target: Any = None, X: Any = None) -> None:
        self.rows = rows
        self.net: NeuralizedModel | None = score if _network(score) else None
        if self.net is None and not callable(score):
            raise InputError(
                "score can not score",
                expected="a NeuralizedModel, or a callable from rows (M, D) to (M,) or (M, K)",
                got=type(score).__name__,
                fix="for an estimator pass one of its methods, such as fitted.decision_function",
            )
        self.score = score
        given = rows.array if X is None or isinstance(X, Rows) else X
        # the rows as they came, so that a network checks the columns of a frame
        first = self._all(rows.array if self.net is None else given)
        self.position: npt.NDArray[np.int64] | None = None
        if first.ndim == 2:
            self.position = self._positions(first, target, given)
            first = first[np.arange(len(first)), self.position]
        elif target is not None and self.net is None:  # a network of one logit has one target
            raise TargetError(
                "the score is one number per row, so there is nothing to choose",
                expected="target=None",
                got=repr(target)[:80],
                fix="drop target, or pass a score that returns one column per target",
            )
        self.start: Floats = first

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, flat: Floats, owner: npt.NDArray[np.int64]) -> Floats:
        """Scores (M,) of changed rows (M, D), each under the target of the row it was made of."""
        step = max(1, BATCH // self.rows.features)
        found = [self._pick(self._all(flat[i : i + step]), owner[i : i + step]) for i in range(0, len(flat), step)]
        return np.concatenate(found)

    def gradient(self, step: float = 1e-4) -> Floats:
        """Gradient (N, D) at the rows: through torch for a network, else central differences.

        Differences are taken over ``step`` standard deviations of each column
        (of the magnitude of the value where the column is constant).
        """
        if self.net is not None:
            found = self._backward()
            if found is not None:
                return found
        array, n = self.rows.array, len(self)
        width = np.broadcast_to(step * self.rows.scale, array.shape)
        width = np.where(width > 0, width, step * np.maximum(np.abs(array), 1.0))
        result = np.empty_like(array)
        owner = np.arange(n)
        for t in range(self.rows.features):
            up, down = array.copy(), array.copy()
            up[:, t] += width[:, t]
            down[:, t] -= width[:, t]
            # what was really added, not what was meant to be
            result[:, t] = (self(up, owner) - self(down, owner)) / (up[:, t] - down[:, t])
        return result

    def _backward(self) -> Floats | None:
        import torch

        assert self.net is not None
        device = next((b.device for b in self.net.buffers()), torch.device("cpu"))
        parts = []
        step = max(1, BATCH // self.rows.features)
        for i in range(0, len(self), step):
            x = torch.tensor(self.rows.array[i : i + step], device=device, requires_grad=True)
            with torch.enable_grad():
                logits = self.net(x)
                if not logits.requires_grad:  # a network of thresholds, or of codes
                    return None
                column = torch.zeros(len(x), dtype=torch.int64, device=device)
                if self.position is not None:
                    column = torch.from_numpy(self.position[i : i + step]).to(device)
                picked = logits.gather(1, column[:, None]).sum()
                (slope,) = torch.autograd.grad(picked, x)
            parts.append(slope.detach().cpu().numpy())
        return np.concatenate(parts)

    # ------------------------------------------------------------------ private

    def _all(self, flat: Any) -> Floats:
        """(M,) or (M, K) of rows (M, D), checked."""
        if self.net is not None:
            import torch

            from neuralize.tables import check_array

            if isinstance(flat, np.ndarray):
                # a tensor is taken for encoded numbers, which codes of categories are here
                check_array(flat.shape, self.net.n_features)
                flat = torch.tensor(np.asarray(flat, dtype=np.float64), device=self.net.device)
            with torch.no_grad():
                found: Any = self.net(flat)
            found = found[:, 0] if found.shape[1] == 1 else found
        else:
            found = self.score(self.rows.form(flat))
        if hasattr(found, "detach"):
            found = found.detach().cpu().numpy()
        try:
            array = np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise OutputError(
                "the score does not return numbers",
                expected="(M,) or (M, K) real numbers",
                got=str(error),
                fix="for labels that are words, pass a decision value or a probability instead",
            ) from error
        if array.ndim not in (1, 2) or len(array) != len(flat):
            raise OutputError(
                "the score returns another shape",
                expected=f"({len(flat)},) or ({len(flat)}, K)",
                got=str(array.shape),
                fix="return one number per row",
            )
        if not np.isfinite(array).all():
            raise NonFiniteError(
                "the score is not finite",
                expected="finite numbers",
                got=f"NaN or infinity for {int((~np.isfinite(array.reshape(len(array), -1)).all(1)).sum())} rows",
                fix="clip logarithms of probabilities, or choose an imputer that stays nearer to the data",
            )
        return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array

    def _pick(self, found: Floats, owner: npt.NDArray[np.int64]) -> Floats:
        if (found.ndim == 2) != (self.position is not None):
            raise OutputError(
                "the score returns another shape than before",
                expected=f"{1 if self.position is None else 2} dimension(s)",
                got=str(found.shape),
                fix="return the same for any number of rows",
            )
        return found if self.position is None else found[np.arange(len(found)), self.position[owner]]

    def _positions(self, found: Floats, target: Any, X: Any) -> npt.NDArray[np.int64]:
        n, k = found.shape
        if self.net is not None:
            from neuralize.labels import positions

            wanted = self.net.predict(X) if target is None else target
            at: npt.NDArray[np.int64] = positions(wanted, self.net.labels, n, "target")
            return at
        if target is None:
            return np.asarray(found.argmax(1), dtype=np.int64)
        given = np.asarray(target)
        if given.dtype.kind not in "iu" or given.shape not in ((), (n,)) or (given < 0).any() or (given >= k).any():
            raise TargetError(
                "target selects no column of the score",
                expected=f"an integer from 0 to {k - 1}, or {n} of them",
                got=repr(target)[:80],
                fix="pass positions, not labels: list(fitted.classes_).index(label)",
            )
        return np.broadcast_to(given.astype(np.int64), (n,)).copy()
