"""A self-contained page: sentences, bars, a heat map and tables, no scripts and no external resources."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
import numpy as np

from lrp.errors import InputError
from neuralize.explanation import Explanation
from neuralize.plots import SCALES
from neuralize.sentences import Portrait, describe, rounded

__all__ = ["render"]

_BARS, _MAP = 12, 30


def _number(value: float) -> str:
    """Three significant digits."""
    if value == 0 or not np.isfinite(value):
        return "0" if value == 0 else "-"
    digits = 2 - int(np.floor(np.log10(abs(value))))
    return rounded(value, digits) if 1e-4 <= abs(value) < 1e9 else f"{value:.2g}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _cluster(portrait: Portrait) -> dict[str, Any]:
    notes = portrait.features
    chosen = sorted(notes, key=lambda f: -abs(f.relevance))[:_BARS]
    low = min(0.0, *(f.relevance for f in chosen))
    span = (max(0.0, *(f.relevance for f in chosen)) - low) or 1.0
    bars = [
        {
            "name": f.name,
            "left": round(100 * (min(0.0, f.relevance) - low) / span, 2),
            "width": round(100 * abs(f.relevance) / span, 2),
            "positive": f.relevance >= 0,
            "number": _number(f.relevance),
        }
        for f in sorted(chosen, key=lambda f: -f.relevance)
    ]
    table = [
        {
            "name": f.name,
            "mean": f.text(f.mean),
            "point": "-" if f.direction == "around" else f"{f.direction} {f.text(f.break_even)}",
            "number": _number(f.relevance),
        }
        for f in notes
    ]
    return {
        "portrait": portrait,
        "bars": bars,
        "zero": round(-100 * low / span, 2),
        "hidden": len(notes) - len(bars),
        "table": table,
    }


def _colour(value: float, limit: float) -> str:
    share = min(abs(value) / limit, 1.0) if limit else 0.0
    red, green, blue = (194, 65, 12) if value > 0 else (29, 78, 216)
    return f"rgba({red},{green},{blue},{0.9 * share:.3f})"


def _map(explanation: Explanation, portraits: list[Portrait], scale: str) -> dict[str, Any]:
    names = explanation.feature_names
    matrix = np.array([[{f.name: f.relevance for f in p.features}[name] for name in names] for p in portraits])
    limits = np.abs(matrix).max(1)
    shares = np.abs(matrix) / np.where(limits > 0, limits, 1)[:, None]
    if scale == "table":
        limits = np.full(len(matrix), limits.max())
    # by share, so that every cluster's own columns are among those shown
    shown = np.argsort(-shares.max(0), kind="stable")[:_MAP]
    rows = [
        {
            "name": names[t],
            "cells": [
                {"number": _number(v), "colour": _colour(v, limit), "dark": limit > 0 and abs(v) > 0.75 * limit}
                for v, limit in zip(matrix[:, t].tolist(), limits.tolist(), strict=True)
            ],
        }
        for t in shown.tolist()
    ]
    return {"heads": [p.heading for p in portraits], "rows": rows, "hidden": len(names) - len(rows), "scale": scale}


def render(explanation: Explanation, title: str | None = None, scale: str = "cluster") -> str:
    """HTML of one explanation.

    Parameters
    ----------
    explanation : Explanation
    title : str, optional
    scale : str
        Colours of the map relative to the largest magnitude of each "cluster",
        or of the whole "table".

    Returns
    -------
    str
        Opens offline, at phone and desktop width. All names are escaped. Its
        size depends on clusters and columns, not on rows.
    """
    if scale not in SCALES:
        raise InputError("unknown scale", expected=" or ".join(map(repr, SCALES)), got=repr(scale), fix="choose one")
    portraits = describe(explanation)
    template = resources.files("neuralize").joinpath("templates", "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        title=title or "What sets the clusters apart",
        ex=explanation,
        clusters=[_cluster(p) for p in portraits],
        map=_map(explanation, portraits, scale),
        own=bool((explanation.target == explanation.decided).all()),
        exact=explanation.contrast is not None or len(explanation.labels) == 2,
        count=_count,
        coverage=_number(float(np.median(explanation.coverage))),
        residual=bool(np.any(explanation.residual != 0)),
        beta=None
        if explanation.beta is None
        else _number(explanation.beta)
        if np.isfinite(explanation.beta)
        else "infinite",
        number=_number,
    )
