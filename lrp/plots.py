"""Pictures of relevance; matplotlib is imported on first use.

Every function takes and returns ``ax`` (:func:`grid` returns its figure).
Colours are symmetric about zero: red speaks for the target, blue against it,
and zero has the neutral colour in the middle of the map.

>>> import matplotlib
>>> matplotlib.use("Agg")
>>> import torch, lrp
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
>>> rel = lrp.attribute(net.eval(), torch.rand(2, 3, 8, 8), wrt=("input", "channels"))
>>> lrp.plots.heatmap(rel.input[0], title="sample 0").get_title()
'sample 0'
>>> matplotlib.pyplot.close("all")
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lrp.errors import InputError, NonFiniteError
from lrp.relevance import Ledger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["channels", "grid", "heatmap", "ledger", "signal"]

Array: TypeAlias = NDArray[np.float64]

CMAP, QUANTILE = "seismic", 0.995
FOR, AGAINST = "#c2410c", "#1d4ed8"
PARTS = {  # what absorbs relevance, and its colour (Okabe and Ito's, told apart by the colour-blind)
    "bias": "#e69f00",
    "stabiliser": "#56b4e9",
    "dead": "#000000",
    "constant": "#009e73",
    "nonlinear": "#cc79a7",
    "lost": "#d55e00",
}


def _array(value: Any, what: str, shapes: dict[int, str], fix: str) -> Array:
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


def _map(relevance: Any) -> Array:
    if isinstance(relevance, tuple):
        raise InputError(
            "the relevance is a tuple: the model takes several inputs",
            expected="one map (H, W) or (C, H, W)",
            got=f"{len(relevance)} of them",
            fix="choose one, e.g. rel.input[0][i]",
        )
    shapes = {2: "(H, W)", 3: "(C, H, W)"}
    fix = "pass one sample, relevance[i]; lrp.plots.grid draws a batch, .signal a (C, T) and .channels a (C,)"
    r = _array(relevance, "the relevance", shapes, fix)
    return r if r.ndim == 2 else r.sum(0)


def _limit(r: Array, quantile: float, limit: float | None) -> float:
    """The magnitude that gets the strongest colour; 1 for a map of zeros."""
    if limit is not None:
        if not 0 < limit < float("inf"):
            raise InputError("limit is out of range", expected="a finite number > 0", got=repr(limit), fix="leave it")
        return float(limit)
    if not 0 < quantile <= 1:
        raise InputError("quantile is out of range", expected="0 < quantile <= 1", got=repr(quantile), fix="leave it")
    size = np.abs(r)
    return float(np.quantile(size, quantile)) or float(size.max()) or 1.0


def _picture(image: Any) -> Array:
    """A picture as matplotlib draws it: (H, W) or (H, W, 3) in [0, 1]."""
    shapes = {2: "(H, W)", 3: "(1 or 3, H, W) or (H, W, 1 or 3)"}
    p = _array(image, "the image", shapes, "pass the picture of one sample")
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


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _colours(cmap: Any) -> Any:
    """A map with an odd number of colours, so that zero has one of its own."""
    import matplotlib

    return (matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap).resampled(255)


def _literal(name: str) -> str:
    """A name as it is: matplotlib would read pairs of dollars as formulas."""
    return name.replace("$", r"\$")


def _fitted(text: str, inches: float, size: Any, lines: int = 2) -> str:
    """A text, wrapped to a width; an ellipsis stands for what does not fit into so many lines."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    def width(part: str) -> float:
        if not part.strip():
            return 0.0
        return float(TextPath((0, 0), _literal(part), prop=FontProperties(size=size)).get_extents().width) / 72

    rows = text.split("\n")
    widest, longest = max(map(width, rows)), max(map(len, rows))
    columns = int(1.5 * longest * inches / widest) if widest > inches else 0
    while columns > 1 and max(map(width, rows)) > inches:
        columns -= 1
        rows = [part for row in text.split("\n") for part in wrap(row, columns + 1, max_lines=lines, placeholder="…")]
    return _literal("\n".join(rows))


def _titled(ax: Axes, title: str | None, beside: float = 0.0) -> None:
    if title is not None:
        width = ax.get_position(original=True).width * ax.figure.bbox.width / ax.figure.dpi
        ax.set_title(_fitted(title, max(0.5, width - beside), ax.title.get_fontsize()))


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])


def _bar(ax: Axes, drawn: Any, extend: str) -> None:
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


def _as_many(what: str, given: Sequence[Any] | Any | None, count: int, of: str) -> None:
    if given is not None and len(given) != count:
        raise InputError(
            f"the number of {what} is not that of the {of}",
            expected=f"{count} {what}",
            got=str(len(given)),
            fix="pass one each",
        )


def _positive(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{what} is out of range", expected="an integer > 0", got=repr(value), fix="choose one")


def heatmap(
    relevance: ArrayLike | Tensor,
    ax: Axes | None = None,
    *,
    image: ArrayLike | Tensor | None = None,
    cmap: Any = CMAP,
    quantile: float = QUANTILE,
    limit: float | None = None,
    title: str | None = None,
    colorbar: bool = False,
) -> Axes:
    """Relevance of one picture, symmetric about zero.

    Parameters
    ----------
    relevance : array or Tensor, (H, W) or (C, H, W)
        Summed over the channels, which is exact: relevances add up.
    ax : Axes, optional
    image : array or Tensor, (H, W), (C, H, W) or (H, W, C), optional
        Drawn in grey below; relevance covers it where it is strong. It may be
        larger than the map.
    cmap : str or Colormap
        A diverging one.
    quantile : float
        The magnitude that gets the strongest colour, as a quantile, so that a
        few pixels do not pale the others.
    limit : float, optional
        The same as a number, to compare pictures.
    title : str, optional
    colorbar : bool

    Returns
    -------
    Axes

    Raises
    ------
    lrp.errors.InputError, lrp.errors.NonFiniteError

    Examples
    --------
    >>> import matplotlib, numpy as np, lrp
    >>> matplotlib.use("Agg")
    >>> ax = lrp.plots.heatmap(np.array([[1.0, -0.5], [0.0, 0.2]]), quantile=1.0)
    >>> [float(c) for c in ax.images[0].get_clim()]
    [-1.0, 1.0]
    >>> matplotlib.pyplot.close(ax.figure)
    """
    r = _map(relevance)
    strongest = _limit(r, quantile, limit)
    below = None if image is None else _picture(image)
    ax = _axes(ax, 3.2 + 0.7 * colorbar, 3.2 * min(3.0, max(0.3, r.shape[0] / r.shape[1])) + 0.3 * bool(title))
    alpha: Any = None
    if below is not None:
        extent = (-0.5, r.shape[1] - 0.5, r.shape[0] - 0.5, -0.5)
        grey = below if below.ndim == 2 else below @ np.array([0.299, 0.587, 0.114])
        ax.imshow(0.35 + 0.65 * grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
        alpha = np.minimum(1, np.abs(r) / strongest) ** 0.5
    drawn = ax.imshow(
        r, cmap=_colours(cmap), vmin=-strongest, vmax=strongest, interpolation="nearest", alpha=alpha, zorder=1
    )
    _bare(ax)
    _titled(ax, title, 0.8 * colorbar)
    if colorbar:
        _bar(ax, drawn, "both" if np.abs(r).max() > strongest else "neither")
    return ax


def grid(
    relevances: ArrayLike | Tensor,
    images: Sequence[Any] | NDArray[Any] | Tensor | None = None,
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    *,
    cmap: Any = CMAP,
    quantile: float = QUANTILE,
    limit: float | None = None,
) -> Figure:
    """Relevance of a batch, each map in its own scale unless ``limit`` is given.

    Parameters
    ----------
    relevances : array or Tensor, (N, H, W) or (N, C, H, W)
    images : array or Tensor, (N, ...), optional
        Drawn above their maps.
    labels : sequence of str, optional
        Titles, one per sample.
    columns : int, optional
        Samples side by side; at most 8 where not given.
    cmap, quantile, limit
        As in :func:`heatmap`.

    Returns
    -------
    Figure

    Raises
    ------
    lrp.errors.InputError, lrp.errors.NonFiniteError

    Examples
    --------
    >>> import matplotlib, torch, lrp
    >>> matplotlib.use("Agg")
    >>> figure = lrp.plots.grid(torch.randn(3, 1, 8, 8), labels=["a", "b", "c"])
    >>> [ax.get_title() for ax in figure.axes]
    ['a', 'b', 'c']
    >>> matplotlib.pyplot.close(figure)
    """
    import matplotlib.pyplot as plt

    fix = "pass rel.input; a single map goes to lrp.plots.heatmap"
    r = _array(relevances, "the relevance", {3: "(N, H, W)", 4: "(N, C, H, W)"}, fix)
    n = len(r)
    _as_many("images", images, n, "maps")
    _as_many("labels", labels, n, "maps")
    if columns is not None:
        _positive("columns", columns)
    columns = min(n, columns or 8)
    each = 1 if images is None else 2
    rows = -(-n // columns)
    shape = min(3.0, max(0.3, r.shape[-2] / r.shape[-1]))
    titles = None if labels is None else [_fitted(label, 1.4, 8) for label in labels]
    lines = max((title.count("\n") + 1 for title in titles or ()), default=0)
    size = (1.5 * columns, (1.5 * each * shape + 0.1 * bool(lines) + 0.15 * lines) * rows)
    figure, axes = plt.subplots(rows * each, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)  # type: ignore[union-attr,call-arg]  # constrained, as asked
    for i in range(rows * columns):
        row, column = each * (i // columns), i % columns
        mine = [axes[row + k, column] for k in range(each)]
        if i >= n:
            for ax in mine:
                ax.remove()
            continue
        if images is not None:
            mine[0].imshow(_picture(images[i]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            _bare(mine[0])
        heatmap(r[i], mine[-1], cmap=cmap, quantile=quantile, limit=limit)
        if titles is not None:
            mine[0].set_title(titles[i], fontsize=8)
    return figure


def signal(
    relevance: ArrayLike | Tensor,
    ax: Axes | None = None,
    *,
    values: ArrayLike | Tensor | None = None,
    names: Sequence[str] | None = None,
    cmap: Any = CMAP,
    quantile: float = QUANTILE,
    limit: float | None = None,
    title: str | None = None,
) -> Axes:
    """Relevance of one series: a coloured lane per channel, the signal on top.

    Parameters
    ----------
    relevance : array or Tensor, (T,) or (C, T)
    ax : Axes, optional
    values : array or Tensor, shaped like the relevance, optional
        The signal; every channel fills its lane.
    names : sequence of str, optional
        Names of the channels.
    cmap, quantile, limit, title
        As in :func:`heatmap`.

    Returns
    -------
    Axes

    Raises
    ------
    lrp.errors.InputError, lrp.errors.NonFiniteError

    Examples
    --------
    >>> import matplotlib, torch, lrp
    >>> matplotlib.use("Agg")
    >>> t = torch.linspace(0, 6, 50)
    >>> ax = lrp.plots.signal(t.cos().relu(), values=t.sin())
    >>> len(ax.images), len(ax.lines)
    (1, 1)
    >>> matplotlib.pyplot.close(ax.figure)
    """
    shapes = {1: "(T,)", 2: "(C, T)"}
    r = np.atleast_2d(_array(relevance, "the relevance", shapes, "pass one sample, relevance[i]"))
    strongest = _limit(r, quantile, limit)
    lanes = None
    if values is not None:
        lanes = np.atleast_2d(_array(values, "the signal", shapes, "pass the input of the same sample"))
        if lanes.shape != r.shape:
            raise InputError(
                "the signal does not fit its relevance", expected=str(r.shape), got=str(lanes.shape), fix="pass x[i]"
            )
    _as_many("names", names, len(r), "channels")
    ax = _axes(ax, 6.4, 0.9 + min(8.0, max(0.9, 0.45 * len(r))))
    ax.imshow(
        r, cmap=_colours(cmap), vmin=-strongest, vmax=strongest, aspect="auto", interpolation="nearest", alpha=0.75
    )
    for c, lane in enumerate([] if lanes is None else lanes):
        low, high = float(lane.min()), float(lane.max())
        height = (lane - low) / ((high - low) or 1.0) if high > low else np.full_like(lane, 0.5)
        ax.plot(np.arange(len(lane)), c + 0.42 - 0.84 * height, color="black", linewidth=0.8)
    for c in range(1, len(r)):
        ax.axhline(c - 0.5, color="0.6", linewidth=0.5)
    if names is None and len(r) == 1:
        ax.set_yticks([])
    elif names is not None:
        ax.set_yticks(np.arange(len(r)), [_literal(name) for name in names])
    ax.set_xlabel("position")
    _titled(ax, title)
    return ax


def channels(
    relevance: ArrayLike | Tensor,
    ax: Axes | None = None,
    *,
    top: int = 15,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Axes:
    """Signed bars of the most relevant channels, largest on top.

    Parameters
    ----------
    relevance : array or Tensor, (C,) or (N, C)
        ``rel.channels[name]`` (its mean over the samples is drawn), one row of
        it, or a collected sum.
    ax : Axes, optional
    top : int
        Number of channels shown.
    names : sequence of str, optional
        Names of the channels; their numbers where not given.
    title : str, optional

    Returns
    -------
    Axes

    Raises
    ------
    lrp.errors.InputError, lrp.errors.NonFiniteError

    Examples
    --------
    >>> import matplotlib, lrp
    >>> matplotlib.use("Agg")
    >>> ax = lrp.plots.channels([0.1, -0.7, 0.3], top=2)
    >>> [tick.get_text() for tick in ax.get_yticklabels()]
    ['2', '1']
    >>> matplotlib.pyplot.close(ax.figure)
    """
    fix = "pass rel.channels[name], of one layer; sum maps (N, C, H, W) over space before"
    r = _array(relevance, "the relevance", {1: "(C,)", 2: "(N, C)"}, fix)
    _positive("top", top)
    label = "relevance" if r.ndim == 1 or len(r) == 1 else f"mean relevance of {len(r)} samples"
    r = r if r.ndim == 1 else r.mean(0)
    _as_many("names", names, len(r), "channels")
    order = np.argsort(-np.abs(r), kind="stable")[:top][::-1]
    shown = [str(c) if names is None else _literal(names[c]) for c in order]
    ax = _axes(ax, 4.2 + 0.09 * max(map(len, shown)), 1.0 + 0.25 * len(order))
    ax.barh(np.arange(len(order)), r[order], color=[FOR if v > 0 else AGAINST for v in r[order]])
    ax.set_yticks(np.arange(len(order)), shown)
    ax.set_ylabel("channel")
    ax.axvline(0, color="0.3", linewidth=0.8)
    size = float(np.abs(r[order]).max()) * 1.08 or 1.0
    low, high = float(r[order].min()), float(r[order].max())
    ax.set_xlim(-size if low < 0 else 0, size if high > 0 or low == 0 else 0)
    ax.set_xlabel(label if len(order) == len(r) else f"{label} ({len(order)} of {len(r)} channels)")
    _titled(ax, title)
    return ax


def ledger(books: Ledger, ax: Axes | None = None, *, top: int = 20, title: str | None = None) -> Axes:
    """Where relevance was absorbed: a stacked bar per module, from the input to the output.

    Shares of the relevance put in, summed over the samples in magnitude, so
    that samples of opposite sign do not hide each other's losses: each sample's
    entry counts with the sign of its own start. The first bar is what the input
    received. Bars to the left stand for relevance that was created. Modules
    below 0.1 % share the last bar.

    Parameters
    ----------
    books : Ledger
        ``rel.ledger``.
    ax : Axes, optional
    top : int
        Modules shown at most, those that absorb most; the others share one bar.
    title : str, optional

    Returns
    -------
    Axes

    Raises
    ------
    lrp.errors.InputError, lrp.errors.NonFiniteError

    Examples
    --------
    >>> import matplotlib, torch, lrp
    >>> matplotlib.use("Agg")
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
    >>> _ = [torch.nn.init.constant_(p, 0.5) for p in net.parameters()]
    >>> ax = lrp.plots.ledger(lrp.attribute(net, torch.ones(1, 3)).ledger)
    >>> [tick.get_text() for tick in ax.get_yticklabels()]
    ['input', '0', '2']
    >>> matplotlib.pyplot.close(ax.figure)
    """
    if not isinstance(books, Ledger):
        none = books is None
        raise InputError(
            "there are no books to draw" if none else "the books are no ledger",
            expected="rel.ledger, an lrp.Ledger",
            got=type(books).__name__,
            fix="call lrp.attribute with ledger=True and a composite that conserves" if none else "pass rel.ledger",
        )
    _positive("top", top)
    start = _array(books.start, "the start of the ledger", {1: "(N,)"}, "pass rel.ledger")
    size = np.abs(start).sum() or 1.0

    def share(entry: Tensor) -> float:
        values = _array(entry, "an entry of the ledger", {1: "(N,)"}, "pass rel.ledger")
        return float((values * np.where(start < 0, -1, 1)).sum() / size)

    table = {name: {p: share(getattr(row, p)) for p in PARTS} for name, row in books.modules.items()}
    sizes = {name: sum(map(abs, parts.values())) for name, parts in table.items()}
    keep = {name for name in sorted(sizes, key=lambda name: -sizes[name])[:top] if sizes[name] >= 1e-3}
    rest = [parts for name, parts in table.items() if name not in keep and sizes[name]]
    bars = {"input": dict.fromkeys(PARTS, 0.0)} | {name: parts for name, parts in table.items() if name in keep}
    if rest:
        bars[f"{len(rest)} other{'s' * (len(rest) > 1)}"] = {p: sum(parts[p] for parts in rest) for p in PARTS}
    ax = _axes(ax, 5.4 + 0.07 * min(40, max(map(len, bars))), 1.3 + 0.25 * len(bars))
    place = np.arange(len(bars))
    ax.barh([0], [share(books.input)], color="0.6", label="delivered")
    right, left = np.zeros(len(bars)), np.zeros(len(bars))
    for part, colour in PARTS.items():
        widths = np.array([parts[part] for parts in bars.values()])
        if not widths.any():
            continue
        label = part if np.abs(widths).max() > 1e-3 else None  # too thin to be looked for
        ax.barh(place, widths, left=np.where(widths < 0, left, right), color=colour, label=label)
        right, left = right + widths.clip(min=0), left + widths.clip(max=0)
    ax.set_yticks(place, [_literal(name) for name in bars])
    ax.invert_yaxis()
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set_xlabel("share of the relevance put in")
    ax.legend(loc="best", fontsize="small", frameon=False)
    _titled(ax, title)
    return ax
