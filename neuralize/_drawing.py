"""What the pictures of an explanation share: names that fit, chosen columns, steps that add up, swarms."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrp._drawing import axes_or_new, colours, literal
from lrp.errors import InputError, TargetError
from neuralize._columns import Column, significant
from neuralize._taken import position, row_label, some, take, wordless
from neuralize._words import words
from neuralize.explanation import Explanation
from neuralize.reasons import parts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "AGAINST",
    "FOR",
    "OTHER",
    "axes_or_new",
    "check_top",
    "colours",
    "label",
    "labelled",
    "largest",
    "members",
    "offsets",
    "pixels",
    "row_title",
    "steps",
    "titled",
]

Array = npt.NDArray[Any]

FOR, AGAINST, OTHER = "#c2410c", "#1d4ed8", "#6b7280"
_LONGEST = 40


def label(name: str, longest: int = _LONGEST) -> str:
    """A name on one line as it is, its middle left out where it is too long."""
    text = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[longest // 2 + 1 - longest :]}"
    return literal(text)


def check_top(top: Any) -> None:
    """Raise ``InputError`` unless it is a number of columns."""
    if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
        raise InputError("top is no number of columns", expected="an integer > 0", got=repr(top), fix="choose one")


def largest(size: Array, top: int | None) -> Array:
    """Positions of the largest sizes, the largest first."""
    return np.argsort(-size, kind="stable")[:top]


def members(e: Explanation, cluster: Any) -> Array:
    """Rows (N,) explained for a label; all if it is None."""
    if cluster is None:
        return np.ones(len(some(e)), bool)
    mine: Array = e.target == cluster
    if not mine.any():
        raise TargetError(
            "no explained row has this target",
            expected=f"one of {np.unique(e.target).tolist()}",
            got=repr(cluster),
            fix="choose one",
        )
    return mine


def row_title(e: Explanation, i: int) -> str:
    """The question that a row's numbers answer."""
    contrast = None if e.contrast is None else e.contrast[i]
    inside = bool(e.target[i] == e.decided[i])
    return f"row {row_label(e, i)}: {words(e.kind).why(e.target[i], contrast, inside, float(e.output[i]))}"


def wrapped(text: str, inches: float, size: Any) -> str:
    """A text on at most two lines of about a width; an ellipsis stands for what does not fit."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    columns = max(int(72 * inches / (0.54 * size)), 12)
    return literal("\n".join(wrap(plain, columns, max_lines=2, placeholder="…")))


def labelled(ax: Axes, unit: str, title: str, names: Sequence[str] = (), beside: float = 0.0) -> None:
    """Name the axis of relevance and the picture; ``names`` and ``beside`` (inches) take room from it."""
    width = _width(ax, names, beside)
    ax.set_xlabel(wrapped(f"relevance ({unit})", width, ax.xaxis.label.get_fontsize()))
    ax.set_title(wrapped(title, width, ax.title.get_fontsize()))


def titled(ax: Axes, title: str) -> None:
    """Name the picture."""
    ax.set_title(wrapped(title, _width(ax, (), 0.0), ax.title.get_fontsize()))


def _width(ax: Axes, names: Sequence[str], beside: float) -> float:
    """What is left of the width of the axes, in inches, once a layout has made room for its labels."""
    free = float(ax.get_position(original=True).width * ax.figure.bbox.width / ax.figure.dpi)
    slot = free / 0.775  # matplotlib's share of the axes in an undivided figure
    return min(free, slot - 0.08 * max(map(len, names), default=0) - beside - 0.3)


def steps(e: Explanation, i: int, top: int) -> list[tuple[str, float, bool]]:
    """Name, size, and whether it is a column's, of what adds up to a row's output."""
    i, groups = position(e, i), wordless(e)
    one = take(e, [i])
    values = one.values[0]
    order = largest(np.abs(values), None)
    # one left over is shown rather than summed
    shown = order if len(order) <= top + 1 else order[:top]
    found = []
    for t in shown.tolist():
        name, raw = one.feature_names[t], float(one.data[0, t])
        categories = one.categories.get(name)
        value = "missing" if np.isnan(raw) else significant(raw, 6)
        if categories is not None and not np.isnan(raw):
            value = Column(name, one.data[:, t], categories).category(raw)
        text = label(name) + ("" if name in groups else f" = {label(value, 20)}")
        found.append((text, float(values[t]), True))
    if len(shown) < len(order):
        rest = order[len(shown) :]
        found.append((f"{len(rest)} other columns", float(values[rest].sum()), True))
    return found + [(label(name), size, False) for name, size in parts_of(one, 0).items()]


def offsets(x: Array, bins: int = 60, height: float = 0.4) -> Array:
    """Where points stand above and below their line, so that they show how many there are.

    Points that lie close together are stacked on both sides in turn; the
    fullest place takes the whole height.
    """
    if not len(x):
        return np.zeros(0)
    low, width = float(x.min()), float(x.max() - x.min())
    place = np.minimum((x - low) / (width or 1.0) * bins, bins - 1).astype(np.int64)
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place)
    rank = np.empty(len(x), np.int64)
    rank[order] = np.arange(len(x)) - np.repeat(np.cumsum(counts) - counts, counts)
    stacked = np.where(rank % 2 == 0, 1, -1) * ((rank + 1) // 2)
    tallest = np.abs(stacked).max()
    return stacked * min(height / tallest, 0.06) if tallest else np.zeros(len(x))


def pixels(d: int, shape: Any) -> tuple[int, ...]:
    """The shape of a picture of ``d`` columns; a square if none is given."""
    if shape is None:
        side = round(d**0.5)
        shape = (side, side)
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    right = len(sizes) in (2, 3) and all(isinstance(s, (int, np.integer)) and s > 0 for s in sizes)
    if not right or int(np.prod(sizes)) != d:
        raise InputError(
            "the columns don't fill this picture",
            expected=f"shape=(h, w) or (h, w, channels) with {d} pixels in all",
            got=repr(shape),
            fix="pass the shape that the pictures had before they became rows",
        )
    return tuple(map(int, sizes))
