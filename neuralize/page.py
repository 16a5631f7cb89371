"""A self-contained page: sentences, every row by itself, bars, a heat map and tables; nothing from outside."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from lrp.errors import InputError
from neuralize._columns import significant
from neuralize._html import shade
from neuralize._page_rows import check_alternatives, choose, embed, limit_for, payloads, top_columns
from neuralize._taken import some
from neuralize._words import count, words
from neuralize.explanation import CoverageWarning, Explanation
from neuralize.plots import SCALES
from neuralize.sentences import Portrait, describe

if TYPE_CHECKING:
    from neuralize.network import NeuralizedModel

__all__ = ["alternatives", "render"]

_BARS, _MAP, _TABLE, _QUESTIONS = 12, 30, 200, 100


def _group(portrait: Portrait, columns: int) -> dict[str, Any]:
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
            "number": significant(f.relevance),
        }
        for f in sorted(chosen, key=lambda f: -f.relevance)
    ]
    listed = {id(f) for f in sorted(notes, key=lambda f: -abs(f.relevance))[:_TABLE]}
    table = [
        {"name": f.name, "value": f.value, "point": f.point, "number": significant(f.relevance)}
        for f in notes
        if id(f) in listed
    ]
    return {
        "portrait": portrait,
        "bars": bars,
        "zero": round(-100 * low / span, 2),
        "hidden": columns - len(bars),
        "table": table,
        "cut": columns - len(table),
        "does": portrait.words.does(portrait),
    }


def _map(explanation: Explanation, portraits: list[Portrait], scale: str) -> dict[str, Any]:
    means = [{f.name: f.relevance for f in p.features} for p in portraits]
    names = [name for name in explanation.feature_names if name in means[0]]
    matrix = np.array([[mean[name] for name in names] for mean in means])
    limits = np.abs(matrix).max(1)
    shares = np.abs(matrix) / np.where(limits > 0, limits, 1)[:, None]
    if scale == "table":
        limits = np.full(len(matrix), limits.max())
    # by share, so that every cluster's own columns are among those shown
    shown = np.argsort(-shares.max(0), kind="stable")[:_MAP]
    rows = []
    for t in shown.tolist():
        cells = []
        for value, limit in zip(matrix[:, t].tolist(), limits.tolist(), strict=True):
            colour, dark = shade(value, limit)
            cells.append({"number": significant(value), "colour": colour, "dark": dark})
        rows.append({"name": names[t], "cells": cells})
    return {
        "heads": [p.heading for p in portraits],
        "rows": rows,
        "hidden": len(explanation.feature_names) - len(rows),
        "scale": scale,
    }


def _read(name: str) -> str:
    return resources.files("neuralize").joinpath("templates", name).read_text(encoding="utf-8")


def render(
    explanation: Explanation,
    title: str | None = None,
    scale: str = "cluster",
    alternatives: Mapping[str, Explanation] | None = None,
    rows: Sequence[int] = (),
) -> str:
    """HTML of one explanation.

    Parameters
    ----------
    explanation : Explanation
    title : str, optional
    scale : str
        Colours of the map relative to the largest magnitude of each "cluster",
        or of the whole "table".
    alternatives : dict of Explanation, optional
        Further explanations of the same rows, by their questions.
    rows : sequence of int
        Positions of rows that the page must show, however many there are.

    Returns
    -------
    str
        Opens offline, at phone and desktop width, and prints. All names are
        escaped. Without scripts it shows everything but single rows. Its size
        depends on clusters, columns and alternatives; of many rows at most 500
        are embedded, fewer with more than three alternatives: those nearest to
        the border, those farthest from it, and some drawn at random.

    Raises
    ------
    InputError
        If an alternative explains other rows, or the scale is unknown.

    Examples
    --------
    >>> from neuralize import CentroidHead, NeuralizedModel
    >>> net = NeuralizedModel(CentroidHead([[0.0], [10.0]]), feature_names=["age"])
    >>> "Cluster 0 (1 row) is set apart mostly by age below about 5." in render(net.explain([[1.0], [9.0]]))
    True
    """
    if scale not in SCALES:
        raise InputError("unknown scale", expected=" or ".join(map(repr, SCALES)), got=repr(scale), fix="choose one")
    e, further = some(explanation), dict(alternatives or {})
    check_alternatives(e, further)
    portraits, said = describe(e), words(e.kind)
    own = bool((e.target == e.decided).all())
    labelled = e.kind not in ("density", "value")
    shown, chosen = choose(e, limit_for(len(further)), rows)
    data, names = payloads(e, further, shown)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.from_string(_read("page.html")).render(
        title=title or said.title(own),
        ex=e,
        words=said,
        clusters=[_group(p, len(e.feature_names)) for p in portraits],
        map=_map(e, portraits, scale),
        own=own,
        labelled=labelled,
        votes={name: int(noted.sum()) for name, noted in e.notes.items() if noted.any()},
        exact=e.contrast is not None or len(e.labels) == 2,
        count=count,
        coverage=significant(float(np.median(e.coverage))),
        residual=[name for name, part in e.residual_parts.items() if np.any(part != 0)]
        or (["residual"] if np.any(e.residual != 0) else []),
        beta=None if e.beta is None else significant(e.beta) if np.isfinite(e.beta) else "infinite",
        number=significant,
        rows=data[0]["rows"],
        tops=[top_columns(row, names) for row in data[0]["rows"]],
        chosen=chosen,
        style=Markup(_read("page.css")),
        script=Markup(_read("page.js")),
        data=Markup(embed({"columns": names, "labelled": labelled, "does": said.does_it})),
        explanations=[Markup(embed(d)) for d in data],
    )
    return text.encode("utf-8", "replace").decode("utf-8")


def alternatives(
    net: NeuralizedModel,
    X: Any,
    targets: Iterable[Any] | None = None,
    contrasts: Iterable[Any] | None = None,
    **options: Any,
) -> dict[str, Explanation]:
    """Explanations of the same rows for other targets and contrasts, for the picker of a page.

    Parameters
    ----------
    net : NeuralizedModel
    X : array-like or DataFrame (N, D)
        The rows of the page.
    targets : iterable of labels, optional
        Default: every label.
    contrasts : iterable of labels, optional
        Every target is also compared with each of these, itself excepted.
        Default: none, only with all others together.
    **options
        Passed on to ``net.explain``.

    Returns
    -------
    dict of Explanation
        By its question: "cluster 2", "cluster 2 rather than cluster 1".

    Raises
    ------
    InputError
        If there are more than 100.
    TargetError
        If a label does not exist.

    Notes
    -----
    Each costs as much as ``net.explain(X)``, in time and memory. How much of
    the output the columns carry is not warned of: the page says it.

    Examples
    --------
    >>> from neuralize import CentroidHead, NeuralizedModel
    >>> net = NeuralizedModel(CentroidHead([[0.0], [10.0], [30.0]]), feature_names=["age"])
    >>> list(alternatives(net, [[1.0], [9.0]], targets=[0, 1], contrasts=[1]))
    ['cluster 0', 'cluster 0 rather than cluster 1', 'cluster 1']
    """
    rivals = [None, *(() if contrasts is None else contrasts)]
    asked = net.labels.tolist() if targets is None else targets
    pairs = [(target, rival) for target in asked for rival in rivals if rival is None or rival != target]
    if len(pairs) > _QUESTIONS:
        raise InputError(
            "too many questions for a page",
            expected=f"at most {_QUESTIONS} pairs of target and contrast",
            got=str(len(pairs)),
            fix="name the targets and contrasts that matter",
        )
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        for target, contrast in pairs:
            explained = net.explain(X, target=target, contrast=contrast, **options)
            name = words(explained.kind).name
            found[name(target) + ("" if contrast is None else f" rather than {name(contrast)}")] = explained
    return found
