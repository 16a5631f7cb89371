"""What an explanation shows in a notebook, and the colours that pages share with it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

from neuralize._columns import significant
from neuralize._taken import means
from neuralize._words import count, words

if TYPE_CHECKING:
    from neuralize.explanation import Explanation

__all__ = ["shade", "summary"]

_ROWS, _LABELS, _LONGEST = 8, 8, 60


def shade(value: float, limit: float) -> tuple[str, bool]:
    """A background, from white at 0 to red or blue at the limit, and whether it is dark."""
    share = min(abs(value) / limit, 1.0) if limit else 0.0
    red, green, blue = (194, 65, 12) if value > 0 else (29, 78, 216)
    return f"rgba({red},{green},{blue},{0.9 * share:.3f})", share > 0.75


def _short(text: str) -> str:
    return html.escape(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def summary(e: Explanation) -> str:
    """A table of the most relevant columns for every explained label, without scripts or classes."""
    said = words(e.kind)
    if not len(e):
        return "<div>Explanation of no rows</div>"
    labels = np.unique(e.target)
    shown = labels[:_LABELS]
    matrix = np.stack([means(e, e.target == c) for c in shown])
    limits = np.abs(matrix).max(1)
    shares = np.abs(matrix) / np.where(limits > 0, limits, 1)[:, None]
    columns = np.argsort(-shares.max(0), kind="stable")[:_ROWS].tolist()
    cell = "padding:.25em .7em;text-align:{};border-bottom:1px solid #e3e8ee"
    left, right = cell.format("left"), cell.format("right")
    heads = "".join(f'<th style="{right}">{_short(said.head(c))}</th>' for c in shown.tolist())
    body = f'<tr><th style="{left}">Mean relevance</th>{heads}</tr>'
    for t in columns:
        cells = ""
        for value, limit in zip(matrix[:, t].tolist(), limits.tolist(), strict=True):
            colour, dark = shade(value, limit)
            ink = "#fff" if dark else "#1f2933"
            cells += f'<td style="{right};background:{colour};color:{ink}">{significant(value)}</td>'
        body += f'<tr><th style="{left};font-weight:400">{_short(e.feature_names[t])}</th>{cells}</tr>'
    size = f"{count(len(e), 'row')}, {count(len(e.feature_names), 'column')}"
    size += f" ({len(columns)} shown)" if len(columns) < len(e.feature_names) else ""
    size += f", {len(labels):,} {said.several.lower()} ({len(shown)} shown)" if len(shown) < len(labels) else ""
    beta = "" if e.beta is None else f", beta {significant(e.beta) if np.isfinite(e.beta) else 'inf'}"
    facts = [
        size,
        f"coverage {significant(float(np.median(e.coverage)))} (median share of the output that the columns carry)",
        f"rule {e.rule}{beta}",
        f"in {e.unit}",
    ]
    return (
        '<div style="color:#1f2933;background:#fff;padding:.6em .8em;overflow-x:auto">'
        f"<div><strong>{html.escape(e.question)}</strong>"
        f' <span style="color:#5f6c7b">{html.escape(e.model)}</span></div>'
        f'<table style="border-collapse:collapse;margin:.5em 0">{body}</table>'
        + "".join(f'<div style="color:#5f6c7b;font-size:.9em">{html.escape(fact)}</div>' for fact in facts)
        + "</div>"
    )
