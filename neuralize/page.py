"""A self-contained page: sentences, bars, a heat map and tables, no scripts and no external resources."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
import numpy as np

from neuralize.explanation import Explanation
from neuralize.sentences import Portrait, describe, rounded

__all__ = ["render"]

_BARS, _MAP = 12, 30


def _number(value: float) -> str:
    """Three significant digits."""
    if value == 0 or not np.isfinite(value):
        return "0" if value == 0 else "-"
    digits = 2 - int(np.floor(np.log10(abs(value))))
    return rounded(value, digits) if 1e-4 <= abs(value) < 1e9 else f"{value:.2g}"


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
            "mean": rounded(f.mean, f.digits),
            "point": "-" if f.direction == "around" else f"{f.direction} {rounded(f.break_even, f.digits)}",
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


def _map(explanation: Explanation) -> dict[str, Any]:
    means = explanation.by_cluster()["mean"]
    matrix = means.to_numpy()
    shown = np.argsort(-np.abs(matrix).max(0), kind="stable")[:_MAP]
    limit = float(np.abs(matrix).max())
    rows = [
        {
            "name": explanation.feature_names[t],
            "cells": [
                {"number": _number(v), "colour": _colour(v, limit), "dark": limit > 0 and abs(v) > 0.75 * limit}
                for v in matrix[:, t]
            ],
        }
        for t in shown.tolist()
    ]
    return {"clusters": means.index.tolist(), "rows": rows, "hidden": len(explanation.feature_names) - len(rows)}


def render(explanation: Explanation, title: str | None = None) -> str:
    """HTML of one explanation.

    Parameters
    ----------
    explanation : Explanation
    title : str, optional

    Returns
    -------
    str
        Opens offline, at phone and desktop width. All names are escaped. Its
        size depends on clusters and columns, not on rows.
    """
    template = resources.files("neuralize").joinpath("templates", "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        title=title or "What sets the clusters apart",
        ex=explanation,
        clusters=[_cluster(p) for p in describe(explanation)],
        map=_map(explanation),
        coverage=_number(float(np.median(explanation.coverage))),
        residual=bool(np.any(explanation.residual != 0)),
        beta=None
        if explanation.beta is None
        else _number(explanation.beta)
        if np.isfinite(explanation.beta)
        else "infinite",
        number=_number,
    )
