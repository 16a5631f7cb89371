"""The way of a network from what was trained to the file that is shipped, a row per stage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from markupsafe import Markup

from compress._results import Result, aligned, optional_number
from compress._sentences import Sentence, byte_size, percent

__all__ = ["Stage", "Stages", "render_stages", "timed"]


@dataclass(frozen=True)
class Stage:
    """One network as one file.

    Attributes
    ----------
    name : str
    bytes : int
        Of the file.
    what : str
        What was done, and with which samples.
    accuracy : float or None
        Of what is in the file.
    macs : int or None
        Multiply-adds of one sample.
    ms, low, high : float or None
        Median time of a call, and quartiles.
    page : str
        Of the report, relative to the page of the stages.
    weights_only : bool
        Whether only the weights are integers and the arithmetic is that of fp32, so
        that at equal MACs no shorter time is believed.
    """

    name: str
    bytes: int
    what: str = ""
    accuracy: float | None = None
    macs: int | None = None
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    page: str = ""
    weights_only: bool = False

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Stage:
        macs = stored["macs"]
        return cls(
            name=str(stored["name"]),
            bytes=int(stored["bytes"]),
            what=str(stored["what"]),
            accuracy=optional_number(stored["accuracy"]),
            macs=None if macs is None else int(macs),
            ms=optional_number(stored["ms"]),
            low=optional_number(stored["low"]),
            high=optional_number(stored["high"]),
            page=str(stored["page"]),
            weights_only=bool(stored["weights_only"]),
        )


@dataclass(frozen=True, repr=False)
class Stages(Result):
    """All stages, the first one as it was trained; prints as sentences and a table.

    Attributes
    ----------
    title : str
    stages : tuple of Stage
    samples : int
        Test samples of the accuracies.
    runtime : str
        Of the times: runtime, threads, machine.
    notes : tuple of str
    settings : dict

    Examples
    --------
    >>> from compress.stages import Stage, Stages
    >>> stages = Stage("trained", 100_000, accuracy=0.99), Stage("quantized", 5_000, accuracy=0.98)
    >>> way = Stages("Digits", stages, 450)
    >>> way.sentences[0]
    'From 100 kB to 5 kB: the smallest file, quantized, is 20.0 times smaller than trained.'
    """

    FORMAT: ClassVar[str] = "compress.Stages"

    title: str
    stages: tuple[Stage, ...]
    samples: int = 0
    runtime: str = ""
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """What the numbers say."""
        return [s.text for s in self._said()]

    def _said(self) -> list[Sentence]:
        first, smallest = self.stages[0], min(self.stages, key=lambda s: s.bytes)
        out = []
        if smallest is not first:
            sizes = (
                f"From {byte_size(first.bytes)} to {byte_size(smallest.bytes)}: the smallest file, {smallest.name}, "
            )
            out.append(Sentence(f"{sizes}is {first.bytes / smallest.bytes:.1f} times smaller than {first.name}."))
        if first.accuracy is not None and smallest.accuracy is not None and smallest is not first:
            samples = f" of {self.samples:,} test samples" if self.samples else ""
            told = (
                f"It gets {percent(smallest.accuracy, 2)}{samples} right, and {first.name} {percent(first.accuracy, 2)}"
            )
            out.append(Sentence(f"{told}: {_alike(first, smallest, self.samples)}."))
        timed = [s for s in self.stages if s.ms is not None]
        if len(timed) > 1:
            base, others = timed[0], timed[1:]
            quick = [s for s in others if _faster(s, base)]
            slow = [s for s in others if s not in quick]
            if quick:
                parts = ", ".join(f"{s.name} ({(base.ms or 0) / (s.ms or 1):.2f}x)" for s in quick)
                out.append(Sentence(f"Faster than {base.name} in the runtime: {parts}."))
            if slow:
                parts = ", ".join(f"{s.name} ({(base.ms or 0) / (s.ms or 1):.2f}x)" for s in slow)
                out.append(
                    Sentence(f"Not faster than {base.name}, or within the spread of the rounds: {parts}.", not quick)
                )
        return [*out, *(Sentence(note, True) for note in self.notes)]

    def rows(self) -> list[tuple[str, ...]]:
        """The table, with its head."""
        out: list[tuple[str, ...]] = [("stage", "bytes", "smaller", "accuracy", "MACs", "ms", "quartiles")]
        first = self.stages[0]
        for s in self.stages:
            time = "-" if s.ms is None else f"{s.ms:.3g}"
            spread = "-" if s.low is None or s.high is None else f"{s.low:.3g} to {s.high:.3g}"
            accuracy = "-" if s.accuracy is None else percent(s.accuracy, 2)
            macs = "-" if s.macs is None else f"{s.macs:,}"
            out.append((s.name, f"{s.bytes:,}", f"{first.bytes / s.bytes:.1f}x", accuracy, macs, time, spread))
        return out

    # -- keeping ------------------------------------------------------------
    def _told(self) -> str:
        return f"{self.title!r}, {len(self.stages)} stages"

    def _held(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "sentences": self.sentences,  # for other readers
            "stages": [s.to_json() for s in self.stages],
            "samples": self.samples,
            "runtime": self.runtime,
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> Stages:
        stages = tuple(Stage.from_json(row) for row in stored["stages"])
        if not stages:
            raise ValueError("no stages")
        notes = tuple(map(str, stored["notes"]))
        text = (str(stored["title"]), stages, int(stored["samples"]), str(stored["runtime"]), notes)
        return cls(*text, dict(stored["settings"]))

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained page that links the reports of the stages."""
        from compress.page import write

        return write(render_stages(self), path)

    def __str__(self) -> str:
        return "\n".join([self.title, *self.sentences, "", aligned(self.rows())])


def _faster(s: Stage, base: Stage) -> bool:
    """Integer weights alone never are at equal MACs: their arithmetic is that of fp32, all else is unrest."""
    if (s.weights_only and s.macs == base.macs) or s.ms is None or base.ms is None:
        return False
    return s.ms < 0.97 * base.ms and (s.high is None or base.low is None or s.high < base.low)


def _alike(first: Stage, second: Stage, samples: int) -> str:
    from compress.evaluation import wilson

    a, b = first.accuracy or 0.0, second.accuracy or 0.0
    points = f"{100 * (b - a):+z.2f} points"
    if not samples:
        return points
    one, other = (wilson(round(share * samples), samples) for share in (a, b))
    if one[0] <= other[1] and other[0] <= one[1]:
        return f"{points}, and the 95 % intervals overlap"
    return f"{points}, more than chance"


def render_stages(found: Stages) -> str:
    """HTML of the stages, in the look of the reports.

    Examples
    --------
    >>> from compress.stages import Stage, Stages, render_stages
    >>> "<title>Digits</title>" in render_stages(Stages("Digits", (Stage("trained", 100),)))
    True
    """
    from compress.page import rendered

    table = found.rows()
    rows = [
        {"stage": s, "cells": row[1:], "page": _safe(s.page)} for s, row in zip(found.stages, table[1:], strict=True)
    ]
    return rendered(
        "stages.html",
        r=found,
        title=found.title,
        tiles=_tiles(found),
        sentences=found._said(),
        head=table[0],
        rows=rows,
        figures=_figures(found),
    )


def _safe(page: str) -> str:
    """A link that stays beside the page: no scheme, no way up."""
    parts = Path(page).parts
    return page if page and ":" not in page and not page.startswith("/") and ".." not in parts else ""


def _tiles(found: Stages) -> list[dict[str, str]]:
    first, smallest = found.stages[0], min(found.stages, key=lambda s: s.bytes)
    out = [
        {
            "name": "Smallest file",
            "value": byte_size(smallest.bytes),
            "note": f"{smallest.name}; {first.bytes / smallest.bytes:.1f} times smaller",
        }
    ]
    if smallest.accuracy is not None:
        before = "" if first.accuracy is None else f"{percent(first.accuracy, 2)} at first"
        out.append({"name": "Its accuracy", "value": percent(smallest.accuracy, 2), "note": before})
    timed = [s for s in found.stages if s.ms is not None]
    if timed:
        quick = min(timed, key=lambda s: (not _faster(s, timed[0]) and s is not timed[0], s.ms or 0.0))
        note = f"{quick.name}; {timed[0].ms:.3g} ms at first"
        out.append({"name": "Fastest", "value": f"{quick.ms:.3g} ms", "note": note})
    counted = [s.macs for s in found.stages if s.macs is not None]
    if counted and counted[0]:
        out.append({"name": "MACs", "value": percent(counted[-1] / counted[0]), "note": "of what there were"})
    return out


def _figures(found: Stages) -> list[Markup]:
    from compress import plots

    names = [plots.short(s.name, 24) for s in found.stages]
    places = range(len(names))

    def rows(ax: Any) -> None:
        ax.set_yticks(places, names)
        ax.set_ylim(len(names) - 0.5, -0.5)

    def sizes(ax: Any) -> None:
        ax.barh(places, [s.bytes / 1000 for s in found.stages], color=plots.AFTER, height=0.62)
        rows(ax)
        ax.set_xlabel("file, kB")

    def times(ax: Any) -> None:
        for k, s in enumerate(found.stages):
            if s.ms is not None:
                ax.plot(s.ms, k, "o", color=plots.AFTER)
                ax.plot([s.low or s.ms, s.high or s.ms], [k, k], color=plots.AFTER, linewidth=1.2)
        rows(ax)
        ax.set_xlim(0, None)
        ax.set_xlabel("one call, ms: median and quartiles")

    height = 1.0 + 0.32 * len(names)
    out = [Markup(plots.svg(sizes, 4.3, height, "sizes", "Bytes of every stage"))]
    if any(s.ms is not None for s in found.stages):
        out.append(Markup(plots.svg(times, 4.3, height, "times", "Time of a call at every stage")))
    return out


def timed(row: Any) -> dict[str, float | None]:
    """Times of a row of :class:`compress.measurement.Measurement`, for a :class:`Stage`."""
    t = row.latency
    return {"ms": None, "low": None, "high": None} if t is None else {"ms": t.median, "low": t.low, "high": t.high}
