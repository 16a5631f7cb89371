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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lrp._drawing import (
    as_array,
    as_many,
    as_map,
    as_picture,
    axes_or_new,
    bare,
    colour_bar,
    colour_limit,
    colours,
    fitted,
    literal,
    positive,
    titled,
)
from lrp.errors import InputError
from lrp.relevance import Ledger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["channels", "grid", "heatmap", "ledger", "signal"]

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
    r = as_map(relevance)
    strongest = colour_limit(r, quantile, limit)
    below = None if image is None else as_picture(image)
    ax = axes_or_new(ax, 3.2 + 0.7 * colorbar, 3.2 * min(3.0, max(0.3, r.shape[0] / r.shape[1])) + 0.3 * bool(title))
    alpha: Any = None
    if below is not None:
        extent = (-0.5, r.shape[1] - 0.5, r.shape[0] - 0.5, -0.5)
        grey = below if below.ndim == 2 else below @ np.array([0.299, 0.587, 0.114])
        ax.imshow(0.35 + 0.65 * grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
        alpha = np.minimum(1, np.abs(r) / strongest) ** 0.5
    drawn = ax.imshow(
        r, cmap=colours(cmap), vmin=-strongest, vmax=strongest, interpolation="nearest", alpha=alpha, zorder=1
    )
    bare(ax)
    titled(ax, title, 0.8 * colorbar)
    if colorbar:
        colour_bar(ax, drawn, "both" if np.abs(r).max() > strongest else "neither")
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
    r = as_array(relevances, "the relevance", {3: "(N, H, W)", 4: "(N, C, H, W)"}, fix)
    n = len(r)
    as_many("images", images, n, "maps")
    as_many("labels", labels, n, "maps")
    if columns is not None:
        positive("columns", columns)
    columns = min(n, columns or 8)
    each = 1 if images is None else 2
    rows = -(-n // columns)
    shape = min(3.0, max(0.3, r.shape[-2] / r.shape[-1]))
    titles = None if labels is None else [fitted(label, 1.4, 8) for label in labels]
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
            mine[0].imshow(as_picture(images[i]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            bare(mine[0])
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
    r = np.atleast_2d(as_array(relevance, "the relevance", shapes, "pass one sample, relevance[i]"))
    strongest = colour_limit(r, quantile, limit)
    lanes = None
    if values is not None:
        lanes = np.atleast_2d(as_array(values, "the signal", shapes, "pass the input of the same sample"))
        if lanes.shape != r.shape:
            raise InputError(
                "the signal does not fit its relevance", expected=str(r.shape), got=str(lanes.shape), fix="pass x[i]"
            )
    as_many("names", names, len(r), "channels")
    ax = axes_or_new(ax, 6.4, 0.9 + min(8.0, max(0.9, 0.45 * len(r))))
    ax.imshow(
        r, cmap=colours(cmap), vmin=-strongest, vmax=strongest, aspect="auto", interpolation="nearest", alpha=0.75
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
        ax.set_yticks(np.arange(len(r)), [literal(name) for name in names])
    ax.set_xlabel("position")
    titled(ax, title)
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
    r = as_array(relevance, "the relevance", {1: "(C,)", 2: "(N, C)"}, fix)
    positive("top", top)
    label = "relevance" if r.ndim == 1 or len(r) == 1 else f"mean relevance of {len(r)} samples"
    r = r if r.ndim == 1 else r.mean(0)
    as_many("names", names, len(r), "channels")
    order = np.argsort(-np.abs(r), kind="stable")[:top][::-1]
    shown = [str(c) if names is None else literal(names[c]) for c in order]
    ax = axes_or_new(ax, 4.2 + 0.09 * max(map(len, shown)), 1.0 + 0.25 * len(order))
    ax.barh(np.arange(len(order)), r[order], color=[FOR if v > 0 else AGAINST for v in r[order]])
    ax.set_yticks(np.arange(len(order)), shown)
    ax.set_ylabel("channel")
    ax.axvline(0, color="0.3", linewidth=0.8)
    size = float(np.abs(r[order]).max()) * 1.08 or 1.0
    low, high = float(r[order].min()), float(r[order].max())
    ax.set_xlim(-size if low < 0 else 0, size if high > 0 or low == 0 else 0)
    ax.set_xlabel(label if len(order) == len(r) else f"{label} ({len(order)} of {len(r)} channels)")
    titled(ax, title)
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
    positive("top", top)
    start = as_array(books.start, "the start of the ledger", {1: "(N,)"}, "pass rel.ledger")
    size = np.abs(start).sum() or 1.0

    def share(entry: Tensor) -> float:
        values = as_array(entry, "an entry of the ledger", {1: "(N,)"}, "pass rel.ledger")
        return float((values * np.where(start < 0, -1, 1)).sum() / size)

    table = {name: {p: share(getattr(row, p)) for p in PARTS} for name, row in books.modules.items()}
    sizes = {name: sum(map(abs, parts.values())) for name, parts in table.items()}
    keep = {name for name in sorted(sizes, key=lambda name: -sizes[name])[:top] if sizes[name] >= 1e-3}
    rest = [parts for name, parts in table.items() if name not in keep and sizes[name]]
    bars = {"input": dict.fromkeys(PARTS, 0.0)} | {name: parts for name, parts in table.items() if name in keep}
    if rest:
        bars[f"{len(rest)} other{'s' * (len(rest) > 1)}"] = {p: sum(parts[p] for parts in rest) for p in PARTS}
    ax = axes_or_new(ax, 5.4 + 0.07 * min(40, max(map(len, bars))), 1.3 + 0.25 * len(bars))
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
    ax.set_yticks(place, [literal(name) for name in bars])
    ax.invert_yaxis()
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set_xlabel("share of the relevance put in")
    ax.legend(loc="best", fontsize="small", frameon=False)
    titled(ax, title)
    return ax
