"""Pictures of a compression report; matplotlib is imported on first use.

Every function takes and returns ``ax``. Grey is the original, blue what the
compression has left; red marks a loss.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress._comparing import BASELINES
from compress._sentences import plain_name, rows
from lrp._drawing import axes_or_new, literal
from lrp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from compress.comparison import Comparison, Curve
    from compress.evaluation import Evaluation
    from compress.plan import PruningPlan
    from compress.reporting import Report

__all__ = [
    "AFTER",
    "BEFORE",
    "INK",
    "LOSS",
    "PAPER",
    "SERIES",
    "classes",
    "comparison",
    "costs",
    "history",
    "legend_below",
    "short",
    "svg",
    "widths",
]

INK, BEFORE, AFTER, LOSS, PAPER = "#1f2933", "#9aa5b1", "#1d4ed8", "#c2410c", "#ffffff"
SERIES = (AFTER, LOSS, "#0f766e", "#a16207", "#7e22ce", "#be185d", "#4d7c0f", "#475569")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # one more than colours, so that pairs do not come back soon
DASHES: tuple[Any, ...] = ((0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1.5, 1.5)))


def short(name: str, longest: int = 34) -> str:
    """A name on one line, its middle left out where it is too long.

    Examples
    --------
    >>> short("features.denseblock4.denselayer16.conv2", 20)
    'features.d…r16.conv2'
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[longest // 2 + 1 - longest :]}"
    return literal(text)


def costs(report: Report, ax: Axes | None = None) -> Axes:
    """Shares of MACs, parameters, bytes and latency that are left, one bar each.

    Parameters
    ----------
    report : Report
    ax : Axes, optional
        A new one if missing, here as in the other functions.

    Examples
    --------
    >>> import matplotlib, torch, compress, compress.plots
    >>> matplotlib.use("Agg")
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> result = compress.prune(net, torch.randn(1, 4), criterion="weight", target=compress.Target(macs=0.5))
    >>> ax = compress.plots.costs(compress.report(result, original=net))
    >>> [round(float(bar.get_width()), 1) for bar in ax.patches][:2]
    [50.0, 51.7]
    >>> matplotlib.pyplot.close("all")
    """
    found = [(row, 100 * row.share) for row in rows(report) if row.share is not None]
    ax = axes_or_new(ax, 5.0, 0.9 + 0.32 * len(found))
    for place, (row, share) in enumerate(found):
        ax.barh(place, share, color=AFTER, height=0.62)
        ax.text(share + 1.5, place, f"{row.before} → {row.after}", va="center", fontsize="small")
    ax.axvline(100, color=BEFORE, linewidth=0.8)
    ax.set_yticks(range(len(found)), [row.name for row, _ in found])
    ax.invert_yaxis()
    ax.set_xlim(0, max(150.0, *(1.5 * share for _, share in found)))
    ax.set_xlabel("left, in % of the original")
    return ax


def widths(layers: Report | PruningPlan | Mapping[str, tuple[int, int]], ax: Axes | None = None) -> Axes:
    """Output channels of every layer, before and after.

    Parameters
    ----------
    layers : Report, PruningPlan or dict of str to (int, int)

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> ax = widths({"conv1": (32, 16), "conv2": (64, 40)})
    >>> [int(bar.get_width()) for bar in ax.patches]
    [32, 64, 16, 40]
    >>> matplotlib.pyplot.close("all")
    """
    found = layers if isinstance(layers, Mapping) else getattr(layers, "layer_widths", None) or layers.widths
    if not found:
        raise InputError("there are no layers", expected="one width at least", got="none", fix="pass a plan or report")
    ax = axes_or_new(ax, 5.0, 0.8 + 0.22 * len(found))
    places = range(len(found))
    ax.barh(places, [before for before, _ in found.values()], color=BEFORE, height=0.74, label="before")
    ax.barh(places, [after for _, after in found.values()], color=AFTER, height=0.42, label="after")
    ax.set_yticks(places, [short(name) for name in found])
    ax.invert_yaxis()
    ax.set_xlabel("output channels")
    ax.legend(loc="best")
    return ax


def classes(report: Report, ax: Axes | None = None, top: int = 20) -> Axes:
    """Accuracy of every class before and after, the largest loss on top; intervals are Wilson's, 95 %.

    Parameters
    ----------
    report : Report
    top : int
        Classes shown.

    Raises
    ------
    InputError
        If the report has no accuracies of classes.

    Examples
    --------
    >>> import matplotlib, torch, compress
    >>> matplotlib.use("Agg")
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> data = [(torch.randn(20, 4), torch.arange(20) % 2)]
    >>> result = compress.prune(net, data[0][0], data, target=compress.Target(macs=0.5), progress=False)
    >>> classes(compress.report(result, original=net, data=data, meter=None)).get_xlabel()
    'accuracy, %'
    >>> matplotlib.pyplot.close("all")
    """
    from compress.evaluation import wilson

    if report.classes is None or not len(report.classes):
        raise InputError(
            "the report has no classes to show",
            expected="accuracy measured on labelled samples",
            got="none",
            fix="pass data= to compress.report",
        )
    found = report.classes.rows[:top]
    ax = axes_or_new(ax, 5.0, 0.9 + 0.3 * len(found))
    for place, row in enumerate(found):
        low, high = wilson(round(row.after * row.count), row.count)
        colour = LOSS if row.difference < 0 else AFTER
        ax.plot([100 * row.before, 100 * row.after], [place, place], color=colour, linewidth=2.2, zorder=2)
        ax.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=0.8, alpha=0.6, zorder=1)
        ax.plot(100 * row.before, place, "o", color=BEFORE, zorder=3, label="before" if not place else None)
        ax.plot(100 * row.after, place, "o", color=colour, zorder=4, label="after" if not place else None)
    ax.set_yticks(range(len(found)), [short(row.name) for row in found])
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_xlabel("accuracy, %")
    ax.legend(loc="best")
    return ax


def history(report: Report, ax: Axes | None = None) -> Axes:
    """Accuracy against the MACs that are left, step by step; open circles are cuts before training.

    Examples
    --------
    >>> import matplotlib, torch, compress
    >>> matplotlib.use("Agg")
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> data, held = ([(x, torch.arange(20) % 2)] for x in torch.randn(2, 20, 4))
    >>> steps = compress.Iterative(2)
    >>> result = compress.prune(net, data[0][0], data, target=compress.Target(macs=0.5), schedule=steps, evaluate=held,
    ...                         round_to=1, progress=False)
    >>> len(history(compress.report(result, original=net, meter=None)).lines[0].get_xdata())
    3
    >>> matplotlib.pyplot.close("all")
    """
    total = report.before.costs.macs or 1
    points: list[tuple[float, Evaluation | None, Evaluation | None]] = [(1.0, report.before.evaluation, None)]
    points += [(step.reached.macs / total, step.after, step.cut) for step in report.history]
    ax = axes_or_new(ax, 5.0, 3.2)
    known = [(100 * share, 100 * after.accuracy) for share, after, _ in points if after is not None]
    ax.plot([x for x, _ in known], [y for _, y in known], "o-", color=AFTER, label="end of the step")
    cuts = [(100 * share, 100 * cut.accuracy) for share, _, cut in points if cut is not None]
    if cuts:
        ax.plot([x for x, _ in cuts], [y for _, y in cuts], "o", color=AFTER, fillstyle="none", label="after the cut")
        ax.legend(loc="best")
    ax.invert_xaxis()
    ax.set_xlabel("MACs left, %")
    ax.set_ylabel("accuracy, %")
    return ax


def comparison(
    found: Comparison, ax: Axes | None = None, *, own: str | None = None, batchnorm: bool | None = None
) -> Axes:
    """Accuracy of all criteria over what each really removed, told apart by marks, not by colour alone.

    The own criterion is thick and on top; baselines have hollow marks and
    broken lines. The range of accuracies is that of all curves, so that
    drawings with and without re-estimated statistics can be laid side by side.

    Parameters
    ----------
    found : Comparison
    own : str, optional
        The criterion to emphasise; the best that is no baseline if missing.
    batchnorm : bool, optional
        Only the curves with, or without re-estimated statistics.

    Raises
    ------
    InputError
        If there is no such curve.

    Examples
    --------
    >>> import matplotlib
    >>> from compress.comparison import Comparison, Curve
    >>> matplotlib.use("Agg")
    >>> curves = [Curve(name, "auto", False, ((0.9, 0.8),), (0.21, 0.42)) for name in ("lrp", "random")]
    >>> ax = comparison(Comparison((0.2, 0.4), "macs", tuple(curves), 0.95, count=100))
    >>> [round(float(x)) for x in ax.containers[0][0].get_xdata()]
    [21, 42]
    >>> matplotlib.pyplot.close("all")
    """
    names = list(dict.fromkeys((c.criterion, c.normalisation) for c in _own_first(found, own)))
    shown = [c for c in _own_first(found, own) if batchnorm in (None, c.batchnorm)]
    if not shown:
        raise InputError(
            "there is no such curve to draw", expected="curves of this treatment of batch norm",
            got=f"batchnorm={batchnorm}", fix="leave batchnorm out",
        )  # fmt: skip
    both = len({c.batchnorm for c in shown}) > 1
    scale = 100 if found.count else 1
    ax = axes_or_new(ax, 6.4, 4.2)
    for c in shown:
        k = names.index((c.criterion, c.normalisation))
        error, first, baseline = c.error, c.criterion == shown[0].criterion, c.criterion.split(":")[0] in BASELINES
        colour = f"C{k % len(SERIES)}"
        ax.errorbar(
            [100 * r for r in c.removed],
            [scale * m for m in c.mean],
            yerr=None if error is None else [scale * e for e in error],
            color=colour,
            linestyle=DASHES[k % len(DASHES)] if baseline else "-",
            linewidth=2.8 if first else 1.5,
            marker=MARKS[(k + len(names) * (both and c.batchnorm)) % len(MARKS)],
            markersize=9 if first else 7,
            markerfacecolor=PAPER if baseline and not first else colour,
            markeredgecolor=PAPER if first else colour,
            markeredgewidth=1.0 if first else 1.5,
            elinewidth=1.2,
            capsize=3,
            zorder=4 if first else 3,
            label=_label(c.name if both else c.name.removesuffix(" + BN")),
        )
    whole = f"unpruned, {100 * found.baseline:.1f} %" if found.count else f"unpruned, {found.baseline:.4g}"
    ax.axhline(scale * found.baseline, color=BEFORE, linewidth=1.2, linestyle=":", label=whole)
    ax.set_ylim(*_range([scale * found.baseline], *(_ends(c, scale) for c in found.curves)))
    ax.set_xlabel(f"{plain_name(found.quantity)} removed, %")
    ax.set_ylabel("accuracy, %" if found.count else "own measure")
    for text, c in zip(ax.legend(loc="best").get_texts()[-len(shown) :], shown, strict=True):
        text.set_fontweight("bold" if c.criterion == shown[0].criterion else "normal")
    return ax


def legend_below(ax: Axes) -> None:
    """The legend moved under the drawing, where there is room for names and nothing is hidden."""
    handles, labels = ax.get_legend_handles_labels()
    before = ax.get_legend()
    weights = [] if before is None else [text.get_fontweight() for text in before.get_texts()]
    names = [_label(short(label.replace(r"\$", "$"), 24).replace(r"\$", "$")) for label in labels]
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.2)}
    legend = ax.legend(handles, names, **place, ncols=2, fontsize=9, columnspacing=1.2)
    for text, weight in zip(legend.get_texts(), weights, strict=False):  # none had weights without a legend
        text.set_fontweight(weight)


def _label(name: str) -> str:
    """A name as legends take it: they leave out what starts with an underscore."""
    return literal(f" {name}" if name.startswith("_") else name)


def _own_first(found: Comparison, own: str | None) -> list[Curve]:
    """The curves of the own criterion, then the others, then baselines, each by area."""

    def rank(c: Curve) -> tuple[bool, bool, float]:
        return c.criterion != own, c.criterion.split(":")[0] in BASELINES, -found.area(c)

    ranked = sorted(found.curves, key=rank)
    return sorted(ranked, key=lambda c: c.criterion != ranked[0].criterion)


def _ends(c: Curve, scale: float) -> list[float]:
    """The lowest and the highest value that is drawn of a curve, its error included."""
    errors = c.error or [0.0] * len(c.mean)
    return [scale * (m + sign * e) for m, e in zip(c.mean, errors, strict=True) for sign in (-1, 1)]


def _range(*values: Sequence[float]) -> tuple[float, float]:
    """Limits with a little room on both sides."""
    low, high = min(map(min, values)), max(map(max, values))
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


# ---------------------------------------------------------------------- for the page


def svg(
    draw: Callable[[Axes], Any],
    width: float = 4.6,
    height: float = 3.2,
    salt: str = "drawing",
    label: str = "A drawing",
) -> str:
    """A drawing as SVG to be put into HTML: text stays text, and ink and series have the page's colours.

    Parameters
    ----------
    draw : callable
        Gets an ``ax``.
    width, height : float
        Inches; small, so that the text can still be read on a phone.
    salt : str
        Names of parts are made of it: drawings on one page need different ones.
    label : str
        What it shows, for those who can not see it.

    Examples
    --------
    >>> svg(lambda ax: ax.plot([0, 1]))[:5]
    '<svg '
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 10.0,
        "font.family": "sans-serif",
        "axes.edgecolor": BEFORE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=SERIES),
        "legend.frameon": False,
        "legend.fontsize": "small",
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure((width, height), layout="constrained")
        draw(figure.add_subplot())
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return _for_html(target.getvalue(), salt, label)


def _for_html(text: str, salt: str, label: str) -> str:
    """Without what only a file needs; with the colours of the page in place of ours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{salt}-", text)
    text = re.sub(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", lambda found: _head(found, label), text, count=1)
    text = re.sub(r"font:([^;\"]*?)px [^;\"]*", r"font:\1px sans-serif", text)
    text = re.sub(r"font-family:[^;\"]*", "font-family: sans-serif", text)  # as newer matplotlib writes it
    for colour, name in {
        INK: "ink",
        BEFORE: "faint",
        PAPER: "card",
        "#333333": "ink",
        "#808080": "faint",
        **{c: f"c{k}" for k, c in enumerate(SERIES)},
    }.items():
        text = text.replace(colour, f"var(--{name})")
    return text.strip()


def _head(found: re.Match[str], label: str) -> str:
    width = float(found[1].split()[2])
    name = html.escape(label, quote=True)
    style = f"width:100%;max-width:{width * 4 / 3:.0f}px;height:auto"
    return f'<svg role="img" aria-label="{name}" viewBox="{found[1]}" style="{style}">'
