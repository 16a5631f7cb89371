"""Pictures of an explanation; matplotlib is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lrp.errors import InputError, TargetError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neuralize.explanation import Explanation

__all__ = ["Plots"]

SCALES = ("cluster", "table")
FOR, AGAINST = "#c2410c", "#1d4ed8"


def _literal(name: str) -> str:
    """A name as it is: matplotlib would read pairs of dollars as formulas."""
    return name.replace("$", r"\$")


def _check_top(top: Any) -> None:
    if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
        raise InputError("top is no number of columns", expected="an integer > 0", got=repr(top), fix="choose one")


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


class Plots:
    """Pictures of one explanation. Every method takes and returns ``ax``.

    Parameters
    ----------
    explanation : Explanation
    """

    def __init__(self, explanation: Explanation) -> None:
        self._ex = explanation

    def bar(self, row: int | None = None, cluster: Any = None, top: int = 15, ax: Axes | None = None) -> Axes:
        """Signed bars of the most relevant columns, largest on top.

        Parameters
        ----------
        row : int, optional
            One row; else the mean over the rows of ``cluster``, or all rows.
        cluster : label, optional
        top : int
            Number of columns shown.
        ax : Axes, optional
        """
        ex = self._ex
        _check_top(top)
        own = ex.target == ex.decided
        if row is not None:
            values, title = ex.values[row], f"row {row}: why {'' if own[row] else 'not '}cluster {ex.target[row]}"
        elif cluster is not None:
            mine = ex.target == cluster
            if not mine.any():
                raise TargetError(
                    "no explained row has this target",
                    expected=f"one of {np.unique(ex.target).tolist()}",
                    got=repr(cluster),
                    fix="choose one",
                )
            inside, n = int((mine & own).sum()), int(mine.sum())
            title = f"cluster {cluster}: mean of {n} rows" + ("" if inside == n else f", {inside} of them in it")
            values = ex.values[mine].mean(0)
        else:
            values, title = ex.values.mean(0), f"mean of {len(ex)} rows"
        order = np.argsort(-np.abs(values), kind="stable")[:top][::-1]
        ax = _axes(ax, 5.0 + 0.09 * max(len(ex.feature_names[t]) for t in order), 1.2 + 0.28 * len(order))
        ax.barh(np.arange(len(order)), values[order], color=[FOR if v > 0 else AGAINST for v in values[order]])
        ax.set_yticks(np.arange(len(order)), [_literal(ex.feature_names[t]) for t in order])
        limit = float(np.abs(values).max()) * 1.08 or 1.0
        ax.set_xlim(-limit, limit)
        ax.axvline(0, color="0.3", linewidth=0.8)
        ax.set_xlabel(f"relevance ({ex.unit})")
        ax.set_title(_literal(title))
        return ax

    def heatmap(self, top: int | None = 30, ax: Axes | None = None, scale: str = "cluster") -> Axes:
        """Explained cluster x column: mean relevance, colours symmetric about zero.

        Parameters
        ----------
        top : int or None
            Number of columns, by mean magnitude as coloured, in their
            original order.
        ax : Axes, optional
        scale : str
            Colours relative to the largest magnitude of each "cluster", so
            that a small cluster far away leaves the others visible, or of the
            whole "table".
        """
        ex = self._ex
        if top is not None:
            _check_top(top)
        if scale not in SCALES:
            raise InputError(
                "unknown scale", expected=" or ".join(map(repr, SCALES)), got=repr(scale), fix="choose one"
            )
        means, own = ex.by_cluster()["mean"], ex.target == ex.decided
        matrix = means.to_numpy()
        label = "mean relevance"
        if scale == "cluster":
            largest = np.abs(matrix).max(1, keepdims=True)
            matrix = matrix / np.where(largest > 0, largest, 1)
            label += ", relative to the cluster's largest"
        shown = np.sort(np.argsort(-np.abs(matrix).max(0), kind="stable")[:top])
        matrix = matrix[:, shown]
        longest = max(len(ex.feature_names[t]) for t in shown)
        ax = _axes(ax, 3.5 + 0.4 * len(shown) + 0.04 * longest, 1.8 + 0.4 * len(matrix) + 0.1 * longest)
        limit = float(np.abs(matrix).max()) or 1.0
        image = ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        ax.set_xticks(np.arange(len(shown)), [_literal(ex.feature_names[t]) for t in shown], rotation=60, ha="right")
        ax.set_yticks(
            np.arange(len(matrix)),
            [f"cluster {c}{'' if own[ex.target == c].all() else ', asked'}" for c in means.index],
        )
        ax.figure.colorbar(image, ax=ax, label=label)
        return ax
