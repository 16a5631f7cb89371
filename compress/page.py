"""A self-contained page of a report: sentences, tables and drawings; nothing from outside, no scripts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from compress._results import Result
from compress._sentences import (
    QUANTITIES,
    Sentence,
    baselines,
    budgets,
    percent,
    plain_name,
    quantity,
    rival_quantity,
    rivals,
    rows,
    sentences,
)
from compress.class_comparison import ClassChange
from compress.evaluation import wilson
from compress.reporting import Report
from lrp._files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from compress.comparison import Comparison

__all__ = ["render", "render_study", "write"]

CLASSES, _LONGEST = 100, 400
_COMMON = 0.25  # of samples that draws share, from which on their spread says too little
_WITH_UNIT = re.compile(r"(?<=\d) (?=(?:%|ms|points?|bytes|[kMG]B)(?!\w))|(?<=[<>]) (?=\d)|(?<=\bp) (?==)|(?<=p =) ")
_DOTTED = re.compile(r"\S*(?:[^\W\d]\w*\.\w|\w\.[^\W\d])\S*")


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
    >>> "remain (24 of 48)" in render(compress.report(result, meter=None))
    True
    """
    shown = () if report.classes is None else report.classes.rows[:CLASSES]
    return rendered(
        "page.html",
        r=report,
        title=report.title,
        said_by=_said_by(report),
        tiles=_tiles(report),
        sentences=sentences(report),
        costs=[_cost(row) for row in rows(report)],
        asked=_asked(report),
        classes=[class_row(c) for c in (*shown, *([report.classes.overall] if report.classes is not None else ()))],
        more_classes=0 if report.classes is None else len(report.classes) - len(shown),
        parts=parts_of(report.sections, baselines(report), _criterion(report)),
        rivals=_rivals(report),
        rival_shares=_rival_shares(report).values(),
        rivals_said=rivals(report),
        widths=[_width(name, before, after) for name, (before, after) in report.widths.items()],
        steps=_steps(report),
        steps_figure=_steps_figure(report),
        main_settings=_main_settings(report.settings),
        settings=settings_of(report.settings),
    )


def render_study(title: str, sections: Mapping[str, Any]) -> str:
    """HTML of studies without a report.

    Parameters
    ----------
    title : str
    sections : dict
        JSON forms by name, as in :class:`compress.Report`.

    Examples
    --------
    >>> from compress.comparison import Comparison, Curve
    >>> curve = Curve("random", "none", False, ((0.9,),), (0.5,))
    >>> page = render_study("Digits", {"comparison": Comparison((0.5,), "macs", (curve,), 0.95).to_json()})
    >>> "<title>Digits</title>" in page, "0.9000" in page
    (True, True)
    """
    return rendered("study.html", title=title, parts=parts_of(sections))


def write(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a page, whole or not at all.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write("<p>A page.", f"{folder}/page.html").name
    'page.html'
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def rendered(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("compress"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = _words
    style = Markup(resources.files("compress").joinpath("templates", "page.css").read_text(encoding="utf-8"))
    text = environment.get_template(template).render(style=style, **values)
    return text.encode("utf-8", "replace").decode("utf-8")


def _words(text: str) -> Markup:
    """Text whose numbers stay with their units, and whose names may break after dots."""
    kept = str(escape(_WITH_UNIT.sub("\N{NO-BREAK SPACE}", str(text))))
    return Markup(_DOTTED.sub(lambda name: re.sub(r"(?<=\w)\.(?=\w)", ".<wbr>", name[0]), kept))


def _criterion(report: Report) -> str:
    criterion = report.settings.get("criterion")
    return str((criterion.get("name") if isinstance(criterion, Mapping) else criterion) or "")


def _said_by(report: Report) -> str:
    name = _criterion(report)
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


def class_row(c: ClassChange) -> dict[str, Any]:
    p = c.adjusted if c.label >= 0 else c.p_value
    return {
        "name": c.name if c.label >= 0 else "all",
        "all": c.label < 0,
        "count": f"{c.count:,}",
        "before": percent(c.before),
        "after": percent(c.after),
        "changed": "-" if c.lost is None or c.gained is None else f"{c.lost:,} / {c.gained:,}",
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


def _rival_shares(report: Report) -> dict[str, str]:
    """Costs whose shares are shown beside other criteria, that of the target first."""
    return {kind: plain_name(kind) for kind in dict.fromkeys((rival_quantity(report), "macs", "params"))}


def _rivals(report: Report) -> list[dict[str, Any]]:
    """The run itself and the others, best first."""
    stored = report.sections.get("rivals")
    if not stored:
        return []
    mine = None if report.after.evaluation is None else report.after.evaluation.to_json()
    name = _criterion(report)
    found = [(f"{name} (this run)" if name else "this run", report.after.costs.to_json(), mine)]
    found += [(rival, row["reached"], row["evaluation"]) for rival, row in stored.items()]
    total, out = report.before.costs.to_json(), []
    for name, reached, judged in sorted(found, key=lambda row: -1.0 if row[2] is None else -row[2]["accuracy"]):
        shown, interval = "-", "-"
        if judged is not None:
            shown = percent(judged["accuracy"]) if judged["count"] else f"{judged['accuracy']:.4g}"
        if judged is not None and judged["count"]:
            low, high = wilson(round(judged["accuracy"] * judged["count"]), judged["count"])
            interval = f"{percent(low).removesuffix(' %')} to {percent(high)}"
        left = [percent(reached[kind] / max(1, total[kind])) for kind in _rival_shares(report)]
        out.append({"name": name, "left": left, "accuracy": shown, "interval": interval})
    return out


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
    return Markup(plots.svg(lambda ax: plots.history(report, ax), salt="steps", label="Accuracy, step by step"))


def as_text(value: Any) -> str:
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


# ---------------------------------------------------------------------- studies


class _Study(NamedTuple):
    """How the result of a study is shown."""

    heading: str
    caption: str
    width: float
    height: float


_STUDIES = {
    "comparison": _Study(
        "Other criteria at equal budget",
        "Accuracy by criterion, over the share that each really removed, on the same reference samples and without "
        "training; + BN: with batch-norm statistics re-estimated.", 3.8, 3.5,
    ),
    "sensitivity": _Study(
        "What each group can lose alone",
        "Accuracy when one group alone loses a share of its channels, least important first. A red line ends "
        "what the group may lose for one percentage point. What groups lose together is not the sum of this.", 4.3, 1.4,
    ),
    "stability": _Study(
        "Would other reference samples have chosen the same?",
        "Overlap of the channels that go between random draws of reference samples, beside chance.", 4.3, 3.6,
    ),
    "drift": _Study(
        "Does it still look at the same things?",
        "Heat maps of the original and of the pruned network on the same samples: 1 is the same map. Chance is the map "
        "of another sample.", 4.3, 3.6,
    ),
}  # fmt: skip


def parts_of(sections: Mapping[str, Any], told: Sequence[Sentence] = (), own: str = "") -> list[dict[str, Any]]:
    """Every study with its sentences, drawings and numbers."""
    from compress import plots
    from compress.comparison import Comparison
    from compress.drift import Drift
    from compress.sensitivity import Sensitivity
    from compress.stability import Stability

    kinds: dict[str, type[Result]] = {
        "comparison": Comparison,
        "sensitivity": Sensitivity,
        "stability": Stability,
        "drift": Drift,
    }
    out = []
    for name, study in _STUDIES.items():
        if name not in sections:
            continue
        found: Any = kinds[name].from_json(sections[name])
        part: dict[str, Any] = {"heading": study.heading, "caption": study.caption, "text": str(found)}
        part |= {"sentences": [], "table": None, "open": False, "notes": ""}
        if isinstance(found, Comparison):
            unequal = budgets(found)
            said = [Sentence(f"{line[:1].upper()}{line[1:]}.") for line in found.verdict().splitlines()]
            part["sentences"] = list(told) or [*said, *unequal]
            table, notes = found._parts()
            part |= {"table": _reached(found), "open": bool(unequal), "text": table, "notes": notes}
            part["caption"] = " ".join([study.caption, *_read(found)])
            if unequal:
                part["heading"] = "Other criteria, not at equal budget"
        drawings, extra = _drawings_of(found, own), 0.24 * len(found.rows) if isinstance(found, Sensitivity) else 0.0
        part["figures"] = [
            Markup(plots.svg(draw, study.width, study.height + extra, f"{name}{k}", f"{study.heading}{more}"))
            for k, (more, draw) in enumerate(drawings.items())
        ]
        out.append(part)
    return out


def _read(found: Comparison) -> list[str]:
    """How the drawing is read, if there is one; and what its bars, and numbers after ±, are."""
    out = []
    if len(found.rates) > 1:
        out.append("The thick line is the criterion in question; hollow marks and broken lines are baselines.")
    draws = {len(c.accuracy) for c in found.curves}
    errors = "Bars" if len(found.rates) > 1 else "Numbers after ±"
    if max(draws, default=1) < 2:
        out.append("From a single draw of the reference samples: how much another would change is not known.")
    elif min(draws) < 2:
        out.append(f"{errors} are standard errors over draws of random orders; all else is from a single draw.")
    else:
        out.append(f"{errors} are standard errors over draws of the reference samples, and do not hold the chance of "
                   "the test samples.")  # fmt: skip
        common = found.settings.get("common")
        if isinstance(common, float) and common >= _COMMON:
            out.append(f"Two draws share {percent(common)} of their samples, so that these errors are too small.")
    return out


def _reached(found: Comparison) -> dict[str, Any]:
    """What each criterion removed, by rate asked for; the same with and without re-estimated batch norm."""
    removed = {c.name.removesuffix(" + BN"): c.removed for c in found.curves}
    return {
        "caption": f"Removed of the {plain_name(found.quantity)}, by what was asked for",
        "head": ["Criterion", *(percent(rate) for rate in found.rates)],
        "rows": [[name, *(percent(share) for share in row)] for name, row in removed.items()],
    }


def _drawings_of(found: Any, own: str) -> dict[str, Callable[[Axes], Any]]:
    """How a study is drawn in little room: what the label has to add, and the drawing."""
    from compress import plots
    from compress.comparison import Comparison
    from compress.drift import Drift
    from compress.sensitivity import Sensitivity

    def draw(ax: Axes) -> None:
        found.plot(ax)
        if isinstance(found, Sensitivity):
            ax.set_title("")
            ax.set_yticks(range(len(found.rows)), [plots.short(row.name, 18) for row in found.rows])
        if isinstance(found, Drift):
            plots.legend_below(ax)

    if not isinstance(found, Comparison):
        return {"": draw}
    if len(found.rates) == 1:  # one point makes no curve
        return {}

    def panel(batchnorm: bool, title: str) -> Callable[[Axes], None]:
        def draw(ax: Axes) -> None:
            plots.comparison(found, ax, own=own, batchnorm=batchnorm)
            ax.set_title(title, fontsize=10)
            plots.legend_below(ax)

        return draw

    treatments = sorted({c.batchnorm for c in found.curves}, reverse=True)
    titles = {True: "batch norm re-estimated", False: "as cut"}
    return {f": {titles[bn]}": panel(bn, titles[bn]) for bn in treatments}


def _main_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What decides most, as far as it is known."""
    wanted = (
        ("Criterion", "criterion", "name"),
        ("Reference samples", "samples", ""),
        ("Normalisation within a layer", "ranking", "normalisation"),
        ("Reduction over coupled layers", "ranking", "reduction"),
        ("Scope of the ranking", "ranking", "scope"),
        ("Widths are multiples of", "ranking", "round_to"),
        ("Least that stays of a group", "ranking", "floor"),
        ("Steps", "schedule", "steps"),
        ("Batch norm re-estimated", "reestimate_batchnorm", ""),
        ("Accuracy floor", "accuracy_floor", ""),
        ("Seed", "seed", ""),
    )
    out = []
    for label, name, part in wanted:
        value = settings.get(name)
        if part:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            out.append((label, {True: "yes", False: "no"}[value] if isinstance(value, bool) else as_text(value)))
    return out


def settings_of(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values as they are read; what is nested one level deep gets a line of its own."""
    out = []
    for name, value in settings.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping) and value and not prefix:
            out += settings_of(value, f"{name}: ")
        else:
            out.append((label, as_text(value)))
    return out
