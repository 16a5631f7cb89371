"""Pictures of an explanation; matplotlib is imported on first use.

Red speaks for what is explained, blue against it, and zero has the neutral
colour in the middle of the map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lrp.errors import InputError
from neuralize._columns import significant
from neuralize._drawing import (
    AGAINST,
    FOR,
    OTHER,
    axes_or_new,
    check_top,
    colours,
    label,
    labelled,
    largest,
    members,
    offsets,
    pixels,
    row_title,
    steps,
    titled,
)
from neuralize._taken import dense, means, position, some
from neuralize._words import count, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neuralize.explanation import Explanation

__all__ = ["SCALES", "Plots"]

SCALES = ("cluster", "table")
_POINTS = 2000
_VALUES = "viridis"  # of raw values; red and blue are kept for relevance
_CMAP = "RdBu_r"


class Plots:
    """Pictures of one explanation. Every method takes and returns ``ax``.

    Parameters
    ----------
    explanation : Explanation

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> from neuralize import CentroidHead, NeuralizedModel
    >>> net = NeuralizedModel(CentroidHead([[0.0, 0.0], [10.0, 2.0]]), feature_names=["age", "size"])
    >>> ex = net.explain([[4.0, 1.9], [9.0, 1.0]])
    >>> ex.plot.waterfall(0).get_title()
    'row 0: why cluster 0'
    >>> ex.plot.beeswarm().get_title(), ex.plot.image(1, (1, 2)).get_title()
    ('2 rows', 'row 1: why cluster 1')
    >>> matplotlib.pyplot.close("all")
    """

    def __init__(self, explanation: Explanation) -> None:
        self._ex = explanation

    def bar(self, row: int | None = None, cluster: Any = None, top: int = 15, ax: Axes | None = None) -> Axes:
        """Signed bars of the most relevant columns, largest on top.

        Parameters
        ----------
        row : int, optional
            Position of one row; else the mean over the rows of ``cluster``,
            or all rows.
        cluster : label, optional
        top : int
            Number of columns shown.
        ax : Axes, optional
        """
        ex = self._ex
        check_top(top)
        if row is not None:
            row = position(ex, row)
            values, title = dense(ex.values[[row]])[0], row_title(ex, row)
        else:
            mine = members(ex, cluster)
            values, title = means(ex, mine), f"mean of {count(int(mine.sum()), 'row')}"
            if cluster is not None:
                title = self._of(cluster, mine, title)
        order = largest(np.abs(values), top)[::-1]
        names = [label(ex.feature_names[t]) for t in order]
        ax = axes_or_new(ax, 5.0 + 0.09 * max(map(len, names)), 1.2 + 0.28 * len(order))
        ax.barh(np.arange(len(order)), values[order], color=[FOR if v > 0 else AGAINST for v in values[order]])
        ax.set_yticks(np.arange(len(order)), names)
        limit = float(np.abs(values).max()) * 1.08 or 1.0
        ax.set_xlim(-limit, limit)
        ax.axvline(0, color="0.3", linewidth=0.8)
        labelled(ax, ex.unit, title, names)
        return ax

    def waterfall(self, row: int, top: int = 10, ax: Axes | None = None) -> Axes:
        """How the columns of one row add up to its output, what no column carries included, by name.

        Parameters
        ----------
        row : int
            Its position.
        top : int
            Columns with bars of their own; the others are summed up.
        ax : Axes, optional
        """
        ex = self._ex
        check_top(top)
        row = position(ex, row)
        found = steps(ex, row, top)
        names, sizes = [name for name, _, _ in found], np.array([size for _, size, _ in found])
        output = float(ex.output[row])
        ends = np.concatenate([[0.0], np.cumsum(sizes)])
        low, high = min(ends.min(), output), max(ends.max(), output)
        room = 0.16 * (high - low) or 1.0
        n = len(found)
        ax = axes_or_new(ax, 5.5 + 0.08 * max(map(len, names)), 1.4 + 0.3 * (n + 1))
        heights = np.arange(n, 0, -1)
        tones = [(FOR if size > 0 else AGAINST) if column else OTHER for _, size, column in found]
        ax.barh(heights, sizes, left=ends[:-1], color=tones, height=0.7)
        ax.barh([0], [output], color="0.2", height=0.7)
        ax.vlines(ends[1:], heights - 1.35, heights + 0.35, color="0.6", linewidth=0.7, zorder=0)
        for y, start, size in zip([*heights, 0], [*ends[:-1], 0.0], [*sizes, output], strict=True):
            right = size >= 0
            sign = "+" if right and y else ""
            ax.annotate(
                sign + significant(float(size)),
                (start + size, y),
                xytext=(3 if right else -3, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                fontsize="small",
            )
        ax.set_yticks([*heights, 0], [*names, "output"])
        ax.set_xlim(low - room, high + room)
        ax.set_ylim(-0.6, n + 0.6)
        ax.axvline(0, color="0.3", linewidth=0.8)
        labelled(ax, ex.unit, row_title(ex, row), names)
        return ax

    def beeswarm(self, cluster: Any = None, top: int = 15, ax: Axes | None = None) -> Axes:
        """Rows as points along their relevance, one line per column, the largest on top.

        The colour is the raw value of the column, from low (its 5th
        percentile) to high (its 95th); grey for categories, a hollow mark for
        missing values.

        Parameters
        ----------
        cluster : label, optional
            Rows explained for it; else all.
        top : int
            Number of columns, by mean magnitude.
        ax : Axes, optional

        Notes
        -----
        At most 2,000 rows are drawn, at equal steps through the table; the
        title says so.
        """
        ex = self._ex
        check_top(top)
        mine = members(ex, cluster)
        rows = np.flatnonzero(mine)
        title = count(len(rows), "row")
        order = largest(means(ex, mine, magnitude=True), top)[::-1]
        if len(rows) > _POINTS:
            rows = rows[np.linspace(0, len(rows) - 1, _POINTS).round().astype(np.int64)]
            title = f"{_POINTS:,} of {title}"
        if cluster is not None:
            title = self._of(cluster, mine, title)
        names = [label(ex.feature_names[t]) for t in order]
        ax = axes_or_new(ax, 6.0 + 0.09 * max(map(len, names)), 1.6 + 0.36 * len(order))
        for y, t in enumerate(order.tolist()):
            column = np.asarray(dense(ex.data[:, [t]])[:, 0], np.float64)
            x, raw = dense(ex.values[:, [t]])[rows, 0], column[rows]
            heights = y + offsets(x)
            there = ~np.isnan(raw)
            if ex.feature_names[t] in ex.categories:
                ax.scatter(x[there], heights[there], s=9, color=OTHER, linewidths=0, rasterized=True)
            elif there.any():
                low, high = np.nanquantile(column, [0.05, 0.95])
                shade = np.clip((raw[there] - low) / (high - low), 0, 1) if high > low else np.full(there.sum(), 0.5)
                ax.scatter(
                    x[there], heights[there], s=9, c=shade, cmap=_VALUES, vmin=0, vmax=1, linewidths=0, rasterized=True
                )
            if not there.all():
                ax.scatter(x[~there], heights[~there], s=9, facecolors="none", edgecolors=OTHER, linewidths=0.7)
        ax.set_yticks(np.arange(len(order)), names)
        ax.set_ylim(-0.7, len(order) - 0.3)
        ax.margins(x=0.05)
        ax.axvline(0, color="0.3", linewidth=0.8, zorder=0)
        labelled(ax, ex.unit, title, names, 0.9)
        self._value_bar(ax)
        return ax

    def image(self, row: int, shape: tuple[int, ...] | None = None, ax: Axes | None = None) -> Axes:
        """The relevance of columns that are the pixels of a picture; colours symmetric about zero.

        Parameters
        ----------
        row : int
            Its position.
        shape : (h, w) or (h, w, channels), optional
            Of the picture, rows first; channels are summed. A square if it is
            not given.
        ax : Axes, optional

        Raises
        ------
        InputError
            If the columns don't fill the shape.
        """
        ex = self._ex
        row = position(ex, row)
        values = dense(ex.values[[row]]).reshape(pixels(ex.values.shape[1], shape))
        if values.ndim == 3:
            values = values.sum(2)
        h, w = values.shape
        size = 3.2 / max(h, w)
        ax = axes_or_new(ax, 1.8 + max(size * w, 1.2), 0.9 + max(size * h, 1.2))
        limit = float(np.abs(values).max()) or 1.0
        drawn = ax.imshow(values, cmap=colours(_CMAP), vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.figure.colorbar(drawn, ax=ax, label=label(f"relevance ({ex.unit})", 60), shrink=0.9)
        titled(ax, row_title(ex, row))
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
        ex, said = self._ex, words(self._ex.kind)
        if top is not None:
            check_top(top)
        if scale not in SCALES:
            raise InputError(
                "unknown scale", expected=" or ".join(map(repr, SCALES)), got=repr(scale), fix="choose one"
            )
        table, own = some(ex).by_cluster()["mean"], ex.target == ex.decided
        matrix = table.to_numpy()
        text = "mean relevance"
        if scale == "cluster":
            most = np.abs(matrix).max(1, keepdims=True)
            matrix = matrix / np.where(most > 0, most, 1)
            text += f", relative to the {said.noun}'s largest"
        shown = np.sort(largest(np.abs(matrix).max(0), top))
        matrix = matrix[:, shown]
        names = [label(ex.feature_names[t]) for t in shown]
        longest = max(map(len, names))
        ax = axes_or_new(ax, 3.5 + 0.4 * len(shown) + 0.04 * longest, 1.8 + 0.4 * len(matrix) + 0.1 * longest)
        limit = float(np.abs(matrix).max()) or 1.0
        image = ax.imshow(matrix, cmap=_CMAP, vmin=-limit, vmax=limit, aspect="auto")
        ax.set_xticks(np.arange(len(shown)), names, rotation=60, ha="right", rotation_mode="anchor")
        ax.set_yticks(
            np.arange(len(matrix)),
            [label(said.name(c) + ("" if own[ex.target == c].all() else ", asked")) for c in table.index],
        )
        ax.figure.colorbar(image, ax=ax, label=text)
        return ax

    # ------------------------------------------------------------------ private

    def _of(self, cluster: Any, mine: Any, rows: str) -> str:
        """A title: whose rows they are, and how many of them are in it."""
        ex = self._ex
        inside = int((mine & (ex.target == ex.decided)).sum())
        among = "" if inside == mine.sum() else f", {inside:,} of them in it"
        return f"{words(ex.kind).name(cluster)}: {rows}{among}"

    def _value_bar(self, ax: Axes) -> None:
        """What the colours of raw values mean."""
        import matplotlib
        from matplotlib.cm import ScalarMappable

        bar = ax.figure.colorbar(
            ScalarMappable(matplotlib.colors.Normalize(0, 1), _VALUES), ax=ax, ticks=[0, 1], aspect=40, pad=0.02
        )
        bar.set_ticklabels(["low", "high"])
        bar.set_label("raw value of the column", labelpad=-12)
        bar.outline.set_visible(False)
