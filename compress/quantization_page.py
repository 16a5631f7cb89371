"""A self-contained page on a quantized network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from compress._quantization_sentences import METHODS, controls, form_rows, layer_rows, sentences
from compress._sentences import byte_size, percent
from compress.page import CLASSES, as_text, class_row, parts_of, rendered, settings_of
from compress.quantization_report import QuantizationReport

__all__ = ["render_quantized"]


def render_quantized(report: QuantizationReport) -> str:
    """HTML of the report on a quantized network.

    Parameters
    ----------
    report : QuantizationReport

    Returns
    -------
    str
        As :func:`compress.page.render`.

    Examples
    --------
    >>> import torch, compress
    >>> from compress.quantization_page import render_quantized
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> found = compress.report(compress.quantize(net, method="rtn", bits=4), original=net, meter=None)
    >>> "times smaller, everything counted" in render_quantized(found)
    True
    """
    shown = () if report.classes is None else report.classes.rows[:CLASSES]
    last = () if report.classes is None else (report.classes.overall,)
    return rendered(
        "quantized.html",
        r=report,
        title=report.title,
        said_by=METHODS.get(report.method, report.method),
        tiles=_tiles(report),
        sentences=sentences(report),
        inside=_inside(report),
        forms=form_rows(report),
        measured=report.forms,
        classes=[class_row(c) for c in (*shown, *last)],
        more_classes=0 if report.classes is None else len(report.classes) - len(shown),
        layers=layer_rows(report),
        figures=_figures(report),
        training=_training(report),
        epochs=_epochs(report),
        parts=_parts(report),
        main_settings=_main_settings(report),
        settings=settings_of(report.settings),
    )


def _tiles(r: QuantizationReport) -> list[dict[str, str]]:
    out = []
    first, second = r.before.evaluation, r.after.evaluation
    if second is not None:
        counted = bool(second.count)
        value, before = (
            "-" if e is None else percent(e.accuracy) if counted else f"{e.accuracy:.4g}" for e in (second, first)
        )
        name = "Top-1 accuracy" if counted else "Own measure"
        out.append({"name": name, "value": value, "note": f"{before} before"})
    size, before_size = r.after.file_bytes, r.before.file_bytes
    if size is not None:
        note = "on disk" if before_size is None else f"{before_size:,} → {size:,}"
        shown = byte_size(size) if before_size is None else f"{before_size / size:.1f} times smaller"
        out.append({"name": "Bytes on disk", "value": shown, "note": note})
    out.append({"name": "Zeros", "value": percent(r.reached.zeros), "note": f"of {r.reached.weights:,} weights"})
    out.append({"name": "Bits per weight", "value": f"{r.reached.bits_per_weight:.2f}", "note": "by entropy"})
    return out


def _inside(r: QuantizationReport) -> list[dict[str, Any]]:
    """What the file is made of."""
    names = {
        "weights": "quantized weights, entropy-coded, with their steps",
        "other": "all other tensors: biases, norms, statistics",
        "header": "header: names, shapes, plans, checksums",
    }
    total = max(1, sum(r.parts.values()))
    rows: list[dict[str, Any]] = []
    for name, size in r.parts.items():
        share = size / total
        shown = {"name": names.get(name, name), "bytes": f"{size:,}", "share": percent(share)}
        rows.append({**shown, "width": round(100 * share, 2)})
    return rows


def _figures(r: QuantizationReport) -> list[Markup]:
    from compress import quantization_plots as drawings
    from compress.plots import legend_below, svg

    if not r.layers:
        return []

    def bits(ax: Any) -> None:
        drawings.bits(r, ax)
        legend_below(ax)

    height = 1.3 + 0.24 * len(r.layers)
    return [
        Markup(svg(bits, 4.3, height + 0.3, "bits", "Bits per weight of every tensor")),
        Markup(svg(lambda ax: drawings.zeros(r, ax), 4.3, height, "zeros", "Share of zeros in every tensor")),
    ]


def _training(r: QuantizationReport) -> Markup | None:
    from compress import quantization_plots as drawings
    from compress.plots import svg

    history = r.training
    if history is None or len(history.losses) < 2:
        return None
    return Markup(svg(lambda ax: drawings.training(history, ax), 4.6, 3.5, "training", "Loss and accuracy by epoch"))


def _epochs(r: QuantizationReport) -> list[dict[str, str]]:
    if r.training is None:
        return []
    h, out = r.training, []
    for k, (loss, rate) in enumerate(zip(h.losses, h.rates, strict=True)):
        own, held = h.accuracies[k], h.validations[k] if h.validations else None
        out.append(
            {
                "name": f"{k + 1}{' (kept)' if k + 1 == h.best else ''}",
                "loss": f"{loss:.4f}",
                "own": "-" if own is None else percent(own),
                "held": "-" if held is None else percent(held),
                "rate": f"{rate:.2g}",
            }
        )
    return out


def _parts(r: QuantizationReport) -> list[dict[str, Any]]:
    """Controls and heat maps."""
    from compress import quantization_plots as drawings
    from compress.plots import svg
    from compress.quantizer_comparison import QuantizerComparison

    out = []
    stored = r.sections.get("comparison")
    if stored is not None:
        found = QuantizerComparison.from_json(stored)
        table = found.rows()
        pilot = f", a pilot over {len(found.seeds)} seeds" if found.pilot else f", {len(found.seeds)} seeds"
        figure = svg(lambda ax: drawings.methods(found, ax), 4.6, 1.3 + 0.36 * len(found.methods), "methods", "Methods")
        judged = f"on {found.count:,} samples" if found.count else "by the user's own measure"
        out.append(
            {
                "heading": f"Other methods at equal bytes{pilot}",
                "caption": f"Every method trained alike to {found.goal}, and judged {judged}; a ring is a run, a bar "
                "the mean over seeds. Intervals are 95 %, by bootstrap over the seeds of the differences seed by seed; "
                "all seeds start from one network, so that they say nothing about another one.",
                "sentences": controls(r),
                "figures": [Markup(figure)],
                "table": {
                    "caption": "Means over seeds; ± is a standard error",
                    "head": list(table[0]),
                    "rows": [list(row) for row in table[1:]],
                },
                "text": "\n".join(found.verdict()),
                "open": True,
                "notes": "",
            }
        )
    if "drift" in r.sections:
        (part,) = parts_of({"drift": r.sections["drift"]})
        part["caption"] = (
            "Heat maps before and after quantization on the same samples: 1 is the same map. Chance is the map of "
            "another sample."
        )
        out.append(part)
    return out


def _main_settings(r: QuantizationReport) -> list[tuple[str, str]]:
    wanted = (
        ("Bits", "bits"),
        ("First layer", "first"),
        ("Last layer", "last"),
        ("Levels", "levels"),
        ("Step", "step_size"),
        ("Rate", "rate"),
        ("Target", "target"),
        ("Rule of lambda", "lambda_rule"),
        ("Relevance", "relevance"),
        ("Batch norm re-estimated", "reestimate_batchnorm"),
        ("Seed", "seed"),
    )
    out = []
    for label, name in wanted:
        value = r.settings.get(name)
        if value is None:
            continue
        if isinstance(value, Mapping):
            shown = ", ".join(f"{k.replace('_', ' ')} {as_text(v)}" for k, v in value.items() if v is not None)
        else:
            shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else as_text(value)
        out.append((label, shown))
    return out
