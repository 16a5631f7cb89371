"""Pictures of flipping; matplotlib is imported on first use. Every function takes and returns ``ax``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lrp.errors import InputError
from neuralize.evaluation._rows import choice

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from neuralize.evaluation.flipping import FlippingCurve

__all__ = ["curves", "gains"]


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _literal(name: str) -> str:
    """A name as it is: matplotlib would read pairs of dollars as formulas."""
    return name.replace("$", r"\$")


def curves(
    flipped: FlippingCurve | Mapping[str, FlippingCurve], ax: Axes | None = None, normalise: str | None = "mean"
) -> Axes:
    """Mean score against the share of removed columns, with a band of one standard error.

    Parameters
    ----------
    flipped : FlippingCurve or mapping of label to FlippingCurve
    ax : Axes, optional
    normalise : "mean" or None
        In units of the mean magnitude of the start, or of the score.

    Raises
    ------
    InputError
        No curve, or a start of 0.
    """
    choice(normalise, ("mean", None), "normalise")
    several = flipped if isinstance(flipped, Mapping) else {f"{flipped.order} relevant first": flipped}
    if not several:
        raise InputError("there is no curve", expected="at least one", got="none", fix="pass what flip returns")
    ax = _axes(ax, 5.0, 3.6)
    for label, curve in several.items():
        unit = float(np.abs(curve.start).mean()) if normalise else 1.0
        if unit == 0:
            raise InputError(
                "the score starts at 0", expected="a start to measure in", got="0", fix="pass normalise=None"
            )
        share, mean = curve.removed / curve.features, curve.mean / unit
        (line,) = ax.plot(share, mean, marker=".", label=_literal(label))
        if len(curve) > 1:
            error = curve.standard_error / unit
            ax.fill_between(share, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of columns removed")
    ax.set_ylabel("score / start" if normalise else "score")
    ax.legend(frameon=False)
    return ax


def gains(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Gains of a comparison: a group of bars per method, one per imputer, with standard errors.

    Parameters
    ----------
    table : DataFrame
        What :func:`~neuralize.evaluation.compare` returns.
    ax : Axes, optional

    Raises
    ------
    InputError
        Another table.
    """
    if list(getattr(table, "index", table).names if hasattr(table, "srg") else []) != ["imputer", "method"]:
        raise InputError(
            "this is no comparison", expected="what compare returns", got=type(table).__name__, fix="call compare first"
        )
    imputers = list(dict.fromkeys(table.index.get_level_values("imputer")))
    methods = list(dict.fromkeys(table.index.get_level_values("method")))
    ax = _axes(ax, 2.5 + 0.25 * len(methods) * (1 + len(imputers)), 3.6)
    width = 0.8 / len(imputers)
    for i, imputer in enumerate(imputers):
        part = table.loc[imputer].reindex(methods)
        at = np.arange(len(methods)) + (i - (len(imputers) - 1) / 2) * width
        error = np.nan_to_num(part["srg_se"].to_numpy())
        ax.bar(at, part["srg"].to_numpy(), width, yerr=error, label=_literal(imputer), error_kw={"linewidth": 0.8})
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set_xticks(np.arange(len(methods)), [_literal(m) for m in methods], rotation=30, ha="right")
    ax.set_ylabel("symmetric relevance gain")
    ax.legend(frameon=False, title="imputer")
    return ax
