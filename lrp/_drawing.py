"""What the pictures of relevance share: checked arrays, axes, titles that fit, colour bars."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrp.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array: TypeAlias = NDArray[np.float64]


def as_array(value: Any, what: str, shapes: dict[int, str], fix: str) -> Array:
    """A finite float64 array of one of the shapes.

    Raises
    ------
    InputError
        If it is no array of numbers, empty or has another number of axes.
    NonFiniteError
        If it holds NaN or infinity.
    """
    expected = "an array or tensor " + " or ".join(shapes.values())
    if isinstance(value, Tensor):
        if value.is_complex():
            raise InputError(f"{what} is complex", expected=expected, got=str(value.dtype), fix="take its real part")
        out: Array = value.detach().to("cpu", torch.float64).numpy()
    else:
        try:
            out = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            raise InputError(f"{what} is no array", expected=expected, got=type(value).__name__, fix=fix) from None
    if out.ndim not in shapes or out.size == 0:
        raise InputError(f"{what} has the wrong shape", expected=expected, got=f"shape {out.shape}", fix=fix)
    if not np.isfinite(out).all():
        bad = int((~np.isfinite(out)).sum())
        raise NonFiniteError(
            f"{what} is not finite",
            expected="finite numbers",
            got=f"{bad} of {out.size} values are NaN or infinite",
            fix="find where they come from; a picture would hide them",
        )
    return out


def as_map(relevance: Any) -> Array:
    if isinstance(relevance, tuple):
        raise InputError(
            "the relevance is a tuple: the model takes several inputs",
            expected="one map (H, W) or (C, H, W)",
            got=f"{len(relevance)} of them",
            fix="choose one, e.g. rel.input[0][i]",
        )
    shapes = {2: "(H, W)", 3: "(C, H, W)"}
    fix = "pass one sample, relevance[i]; lrp.plots.grid draws a batch, .signal a (C, T) and .channels a (C,)"
    r = as_array(relevance, "the relevance", shapes, fix)
    return r if r.ndim == 2 else r.sum(0)


def colour_limit(r: Array, quantile: float, limit: float | None) -> float:
    """The magnitude that gets the strongest colour; 1 for a map of zeros."""
    if limit is not None:
        if not 0 < limit < float("inf"):
            raise InputError("limit is out of range", expected="a finite number > 0", got=repr(limit), fix="leave it")
        return float(limit)
    if not 0 < quantile <= 1:
        raise InputError("quantile is out of range", expected="0 < quantile <= 1", got=repr(quantile), fix="leave it")
    size = np.abs(r)
    return float(np.quantile(size, quantile)) or float(size.max()) or 1.0


def as_picture(image: Any) -> Array:
    """A picture as matplotlib draws it: (H, W) or (H, W, 3) in [0, 1]."""
    shapes = {2: "(H, W)", 3: "(1 or 3, H, W) or (H, W, 1 or 3)"}
    p = as_array(image, "the image", shapes, "pass the picture of one sample")
    if p.ndim == 3 and p.shape[0] in (1, 3) and p.shape[2] not in (1, 3):
        p = p.transpose(1, 2, 0)
    if p.ndim == 3 and p.shape[2] not in (1, 3):
        raise InputError(
            "the image has no colours to show",
            expected="1 or 3 channels",
            got=f"shape {p.shape}",
            fix="choose 1 or 3 of its channels",
        )
    if p.ndim == 3 and p.shape[2] == 1:
        p = p[:, :, 0]
    low, high = float(p.min()), float(p.max())
    if low < 0 or high > 1:  # bytes, or normalised: only the contrast is shown
        p = p / 255 if low >= 0 and high > 2 and high <= 255 else (p - low) / (high - low)
    return p


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def colours(cmap: Any) -> Any:
    """A map with an odd number of colours, so that zero has one of its own."""
    import matplotlib

    return (matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap).resampled(255)


def literal(name: str) -> str:
    """A name as it is: matplotlib would read pairs of dollars as formulas."""
    return name.replace("$", r"\$")


def fitted(text: str, inches: float, size: Any, lines: int = 2) -> str:
    """A text, wrapped to a width; an ellipsis stands for what does not fit into so many lines."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    def width(part: str) -> float:
        if not part.strip():
            return 0.0
        return float(TextPath((0, 0), literal(part), prop=FontProperties(size=size)).get_extents().width) / 72

    rows = text.split("\n")
    widest, longest = max(map(width, rows)), max(map(len, rows))
    columns = int(1.5 * longest * inches / widest) if widest > inches else 0
    while columns > 1 and max(map(width, rows)) > inches:
        columns -= 1
        rows = [part for row in text.split("\n") for part in wrap(row, columns + 1, max_lines=lines, placeholder="…")]
    return literal("\n".join(rows))


def titled(ax: Axes, title: str | None, beside: float = 0.0) -> None:
    if title is not None:
        width = ax.get_position(original=True).width * ax.figure.bbox.width / ax.figure.dpi
        ax.set_title(fitted(title, max(0.5, width - beside), ax.title.get_fontsize()))


def bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])


def colour_bar(ax: Axes, drawn: Any, extend: str) -> None:
    """A colour bar beside the picture, as high as the picture in any layout."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import make_axes
    from matplotlib.transforms import Bbox

    slot = ax.get_position(original=True).width * ax.figure.bbox.width / ax.figure.dpi
    laid = ax.figure.get_layout_engine() is not None  # else nothing makes room for the bar's numbers
    beside, _ = make_axes(ax, fraction=0.046 if laid else min(0.4, 0.8 / slot), pad=0.04, aspect=20)

    def place(cax: Any, renderer: Any) -> Bbox:
        ax.apply_aspect()
        picture, page = ax.get_position(), ax.figure.bbox
        left, width = picture.x1 + 0.15 * ax.figure.dpi / page.width, picture.height * page.height / page.width / 20
        return Bbox.from_bounds(left, picture.y0, width, picture.height)

    place.get_subplotspec = ax.get_subplotspec  # type: ignore[attr-defined]  # for tight_layout
    beside.set_axes_locator(place)
    # not of the image itself, whose transparency is that of its pixels
    ax.figure.colorbar(ScalarMappable(drawn.norm, drawn.cmap), cax=beside, label="relevance", extend=extend)


def as_many(what: str, given: Sequence[Any] | Any | None, count: int, of: str) -> None:
    if given is not None and len(given) != count:
        raise InputError(
            f"the number of {what} is not that of the {of}",
            expected=f"{count} {what}",
            got=str(len(given)),
            fix="pass one each",
        )


def positive(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{what} is out of range", expected="an integer > 0", got=repr(value), fix="choose one")
