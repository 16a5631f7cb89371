"""A self-contained page of a report: sentences, tables and drawings; nothing from outside, no scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from compress._sentences import QUANTITIES, percent, quantity, rows, sentences
from compress.evaluation import ClassChange
from compress.reporting import Report

__all__ = ["render"]

_CLASSES, _LONGEST = 100, 400


def render(report: Report) -> str:
    """HTML of a report.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
        Opens offline, at phone and desktop width, in light and dark, and
        prints; all names are escaped.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> result = compress.prune(net, torch.randn(1, 4), criterion="weight", target=compress.Target(macs=0.5))
    >>> "50 % remain (24 of 48)" in render(compress.report(result, meter=None))
    True
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = () if report.classes is None else report.classes.rows[:_CLASSES]
    text = environment.from_string(_read("page.html")).render(
        r=report,
        title=report.title,
        said_by=_said_by(report),
        tiles=_tiles(report),
        sentences=sentences(report),
        costs=[_cost(row) for row in rows(report)],
        asked=_asked(report),
        classes=[_class(c) for c in (*shown, *([report.classes.overall] if report.classes is not None else ()))],
        more_classes=0 if report.classes is None else len(report.classes) - len(shown),
        parts=_parts(report),
        widths=[_width(name, before, after) for name, (before, after) in report.widths.items()],
        steps=_steps(report),
        steps_figure=_steps_figure(report),
        settings=[(name.replace("_", " "), _told(value)) for name, value in report.settings.items()],
        style=Markup(_read("page.css")),
    )
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(name: str) -> str:
    return resources.files("compress").joinpath("templates", name).read_text(encoding="utf-8")


def _said_by(report: Report) -> str:
    criterion = report.settings.get("criterion")
    name = criterion.get("name") if isinstance(criterion, Mapping) else criterion
    return f"pruned by {name}" if name else ""


def _tiles(report: Report) -> list[dict[str, str]]:
    """The few numbers everyone looks for."""
    wanted = {"MACs": "MACs", "bytes on disk": "Bytes on disk", "latency, ms": "Latency"}
    out = []
    for row in rows(report):
        if row.name in ("top-1 accuracy", "own measure"):
            out.append({"name": row.name.capitalize(), "value": row.after, "note": f"{row.before} before"})
        elif row.name in wanted and row.share is not None:
            out.append({"name": wanted[row.name], "value": row.left, "note": f"{row.before} → {row.after}"})
    return out


def _cost(row: Any) -> dict[str, Any]:
    width = None if row.share is None else round(min(100.0, 100 * row.share), 2)
    return {"name": row.name, "before": row.before, "after": row.after, "left": row.left, "width": width}


def _asked(report: Report) -> list[tuple[str, str]]:
    kind = report.target.kind
    value = getattr(report.target, kind)
    asked = percent(value) if isinstance(value, float) else str(value)
    out = [("Target", f"at most {asked} of the {QUANTITIES[kind]}" if isinstance(value, float) else f"{kind} {asked}")]
    if report.limit is not None and report.reached is not None:
        out.append(("Asked and reached", f"{quantity(kind, report.limit)} and {quantity(kind, report.reached)}"))
    for name, share in report.filters.items():
        label = "Prunable filters" if name == "prunable" else "All filters"
        numbers = f"{share['before']:,.0f} → {share['after']:,.0f}, {percent(share['removed'])} removed"
        out.append((label, numbers))
    for name, side in (("Latency before", report.before.latency), ("Latency after", report.after.latency)):
        if side is not None:
            out.append((name, str(side)))
    if report.after.onnx_parity:
        out.append(("ONNX file and network differ by", report.after.onnx_parity))
    return out


def _class(c: ClassChange) -> dict[str, Any]:
    p = c.adjusted if c.label >= 0 else c.p_value
    return {
        "name": c.name if c.label >= 0 else "all",
        "all": c.label < 0,
        "count": f"{c.count:,}",
        "before": percent(c.before),
        "after": percent(c.after),
        "lost": "-" if c.lost is None else f"{c.lost:,}",
        "gained": "-" if c.gained is None else f"{c.gained:,}",
        "p": "-" if p is None else f"{p:.2g}",
        "width": round(100 * c.after, 2),
        "fell": round(100 * max(0.0, c.before - c.after), 2),
    }


def _width(name: str, before: int, after: int) -> dict[str, Any]:
    share = after / before if before else 0.0
    return {
        "name": name,
        "before": f"{before:,}",
        "after": f"{after:,}",
        "left": percent(share),
        "width": round(100 * share, 2),
    }


def _steps(report: Report) -> list[dict[str, str]]:
    def accuracy(found: Any) -> str:
        return "-" if found is None else percent(found.accuracy) if found.count else f"{found.accuracy:.4g}"

    first = report.before
    out = [
        {
            "name": "0",
            "macs": f"{first.costs.macs:,}",
            "params": f"{first.costs.params:,}",
            "cut": "-",
            "after": accuracy(first.evaluation),
            "seconds": "-",
        }
    ]
    for step in report.history:
        out.append(
            {
                "name": str(step.number),
                "macs": f"{step.reached.macs:,}",
                "params": f"{step.reached.params:,}",
                "cut": accuracy(step.cut),
                "after": accuracy(step.after),
                "seconds": f"{step.seconds:.1f}",
            }
        )
    return out


def _steps_figure(report: Report) -> Markup | None:
    from compress import plots

    if len([s for s in report.history if s.after is not None]) < 2:
        return None
    return Markup(plots.svg(lambda ax: plots.history(report, ax), salt="steps"))


def _told(value: Any) -> str:
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _parts(report: Report) -> list[dict[str, Any]]:
    return []
