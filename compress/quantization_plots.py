"""Pictures of quantized networks; matplotlib is imported on first use.

Every function takes and returns ``ax``; colours are those of
:mod:`compress.plots`.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from compress.plots import AFTER, BEFORE, LOSS, PAPER, short
from lrp._drawing import axes_or_new
from lrp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from compress.quantization_report import QuantizationReport
    from compress.quantizer_comparison import QuantizerComparison
    from compress.training import History

__all__ = ["bits", "methods", "training", "zeros"]


def bits(report: QuantizationReport, ax: Axes | None = None) -> Axes:
    """Bits per weight of every tensor: by entropy, and a mark at those of an index at a fixed length.

    Parameters
    ----------
    report : QuantizationReport
    ax : Axes, optional
        A new one if missing, here as in the other functions.

    Examples
    --------
    >>> import matplotlib, torch, compress
    >>> from compress.quantization_plots import bits
    >>> matplotlib.use("Agg")
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> found = compress.report(compress.quantize(net, method="rtn", bits=4), meter=None)
    >>> [float(bar.get_width()) < 8 for bar in bits(found).patches]
    [True, True]
    >>> matplotlib.pyplot.close("all")
    """
    ax = _rows(report, ax)
    places = range(len(report.layers))
    ax.barh(places, [layer.entropy for layer in report.layers], color=AFTER, height=0.62, label="entropy")
    ax.plot([layer.bits for layer in report.layers], places, "|", color=BEFORE, markersize=12, label="fixed length")
    ax.set_xlim(0, None)
    ax.set_xlabel("bits per weight")
    return ax


def zeros(report: QuantizationReport, ax: Axes | None = None) -> Axes:
    """Share of zeros in every tensor; one that is zero throughout is red.

    Examples
    --------
    >>> import matplotlib, torch, compress
    >>> from compress.quantization_plots import zeros
    >>> matplotlib.use("Agg")
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> found = compress.report(compress.quantize(net, method="rtn", bits=4), meter=None)
    >>> zeros(found).get_xlabel()
    'weights that are zero, %'
    >>> matplotlib.pyplot.close("all")
    """
    ax = _rows(report, ax)
    colours = [LOSS if layer.collapsed else AFTER for layer in report.layers]
    ax.barh(range(len(report.layers)), [100 * layer.zeros for layer in report.layers], color=colours, height=0.62)
    ax.set_xlim(0, 100)
    ax.set_xlabel("weights that are zero, %")
    return ax


def training(history: History, ax: Axes | None = None) -> Axes:
    """Loss of every epoch and, on an axis of its own, the accuracy on validation samples; a ring marks the best.

    Examples
    --------
    >>> import matplotlib
    >>> from compress.quantization_plots import training
    >>> from compress.training import History
    >>> matplotlib.use("Agg")
    >>> ax = training(History((1.0, 0.5), (0.4, 0.8), (0.1, 0.0), (0.5, 0.7), 2))
    >>> [float(y) for y in ax.lines[0].get_ydata()]
    [1.0, 0.5]
    >>> matplotlib.pyplot.close("all")
    """
    if not history.losses:
        raise InputError("there is no epoch", expected="a history of one at least", got="none", fix="train first")
    ax = axes_or_new(ax, 5.0, 3.2)
    epochs = range(1, len(history.losses) + 1)
    (loss,) = ax.plot(epochs, history.losses, "o-", color=AFTER, label="training loss")
    ax.set_ylim(0, None)
    ax.set_xlabel("epoch")
    ax.set_ylabel("training loss")
    ax.set_xticks([k for k in epochs if not (k - 1) % max(1, len(epochs) // 6)])
    lines = [loss]
    held = history.validations or history.accuracies
    accuracies = [100 * a for a in held if a is not None]
    if len(accuracies) == len(epochs):
        name = "validation accuracy" if history.validations else "accuracy while training"
        other = ax.twinx()
        other.spines["right"].set_visible(True)
        (line,) = other.plot(epochs, accuracies, "s--", color=LOSS, markerfacecolor=PAPER, label=name)
        other.set_ylabel("accuracy, %")
        lines.append(line)
        if history.best:
            other.plot(history.best, accuracies[history.best - 1], "o", color=LOSS, fillstyle="none", markersize=13)
    ax.legend(handles=lines, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return ax


def methods(found: QuantizerComparison, ax: Axes | None = None) -> Axes:
    """Accuracy by method: a dot per seed and a bar at the mean; failed runs are missing.

    Examples
    --------
    >>> import matplotlib
    >>> from compress.quantization_plots import methods
    >>> from compress.quantizer_comparison import QuantizerComparison, Run
    >>> matplotlib.use("Agg")
    >>> runs = tuple(Run(m, s, 0.9 + 0.01 * s, 100, 0.5, 1.0) for m in ("ecq", "ecqx") for s in (0, 1))
    >>> ax = methods(QuantizerComparison(runs, "at most 1 bit per weight", 0.95))
    >>> [text.get_text() for text in ax.get_yticklabels()]
    ['ecq', 'ecqx']
    >>> matplotlib.pyplot.close("all")
    """
    order = [name for name, *_ in found.rows()[1:]]
    scale = 100 if found.count else 1
    ax = axes_or_new(ax, 5.0, 1.0 + 0.34 * len(order))
    for place, name in enumerate(order):
        values = [scale * (run.accuracy or 0.0) for run in found.of(name)]
        if values:
            ax.plot(values, [place] * len(values), "o", color=AFTER, fillstyle="none")
            ax.plot(statistics.fmean(values), place, "|", color=AFTER, markersize=18, markeredgewidth=2.5)
    ax.axvline(scale * found.baseline, color=BEFORE, linestyle=":", linewidth=1.2, label="before quantization")
    ax.set_yticks(range(len(order)), [short(name) for name in order])
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlabel("accuracy, %" if found.count else "own measure")
    ax.legend(loc="best")
    return ax


def _rows(report: QuantizationReport, ax: Axes | None) -> Axes:
    """A row per tensor."""
    if not report.layers:
        raise InputError("there are no layers", expected="a quantized tensor", got="none", fix="pass a report")
    ax = axes_or_new(ax, 5.0, 0.8 + 0.24 * len(report.layers))
    ax.set_yticks(range(len(report.layers)), [short(layer.name.removesuffix(".weight"), 20) for layer in report.layers])
    ax.set_ylim(len(report.layers) - 0.5, -0.5)
    return ax
