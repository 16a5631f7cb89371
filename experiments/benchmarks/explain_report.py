"""What was measured, as Markdown, the budget beside every figure that has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.explain_memory import WAYS
from experiments.benchmarks.explain_pairs import RULES

OUT, RETURNED, FASTER = 4.0, 6.0, 1000.0


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def duration(seconds: float) -> str:
    """With a unit that fits, three digits.

    Examples
    --------
    >>> duration(0.00123), duration(12.0)
    ('1.23 ms', '12 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def at_most(value: float, allowed: float) -> str:
    """`` (<= 4 met)`` or ``(<= 4 missed)``."""
    return f" (<= {allowed:g} {'met' if value <= allowed else 'missed'})"


def at_least(value: float, wanted: float) -> str:
    """`` (>= 1000 met)`` or ``(>= 1000 missed)``."""
    return f" (>= {wanted:g} {'met' if value >= wanted else 'missed'})"


def times(value: float) -> str:
    """A ratio with three digits, or all digits before the point.

    Examples
    --------
    >>> times(3.456), times(12345.6)
    ('3.46', '12,346')
    """
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def spread(r: dict[str, float]) -> str:
    """Median ratio, its range over the rounds and the ratio of the shortest times."""
    return f"{times(r['median'])} [{times(r['low'])}, {times(r['high'])}; {times(r['best'])}]"


def _kmeans(entries: list[dict[str, Any]]) -> list[str]:
    rows = []
    shown = {"out": "into `out=`", "returned": "returned", "as it comes": "returned, memory as it comes"}
    for e in entries:
        for job, allowed in (("out", OUT), ("returned", RETURNED), ("as it comes", None)):
            ratios = [e[clock][job] for clock in ("wall", "cpu")]
            judged = ["" if allowed is None else at_most(r["median"], allowed) for r in ratios]
            rows.append(
                [
                    f"{e['name']}, {shown[job]}",
                    duration(e["seconds"]["predict"]),
                    duration(e["seconds"][job]),
                    *(spread(r) + j for r, j in zip(ratios, judged, strict=True)),
                ]
            )
    header = ["", "predict", "explain", "explain / predict, wall time", "the same, process CPU time"]
    return [
        "## K-means against its own predict",
        "",
        f"{entries[0]['note']}, labels and explanations of all. A returned result needs fresh memory: as much was "
        "touched and freed just before, so that the system has it at hand, or it is taken as it comes. (A virtual "
        "machine may have given it back to its host, and then pays many times the usual price per page.)",
        "",
        _table(header, rows),
        "",
    ]


def _memory(part: dict[str, Any]) -> list[str]:
    shown = {"out": "`explain(X, out=memmap)`", "batches": "`explain_batches(X)`", "returned": "`explain(X)`"}
    sizes, rows, how = part["rows"], [], "not measured"
    for way in WAYS:
        entry = part["ways"][way]
        if "failed" in entry:
            rows.append([shown[way], entry["failed"], *["–"] * len(sizes)])
            continue
        how, mib = entry["how"], entry["mib"]
        per_row = (mib[-1] - mib[0]) * 2**20 / max(1, sizes[-1] - sizes[0])
        rows.append([shown[way], *(f"{m:.1f} MiB" for m in mib), f"{round(per_row)} bytes"])
    bytes_per_row = part["columns"] * (8 if part["dtype"] == "float64" else 4)
    return [
        "## Memory of a k-means explanation",
        "",
        f"Peak of one warm call beyond what lay there before, X a memmap, {part['columns']} columns of "
        f"{part['dtype']}, K = {part['clusters']}, a fresh process per line ({how}; pages of files do not count). "
        f"A row of values is {bytes_per_row} bytes. What `out=` still needs per row are its output, residual, target "
        "and the like, (N,) each.",
        "",
        _table(["", *(f"{n:,} rows" for n in sizes), "per further row"], rows),
        "",
    ]


def _models(entries: list[dict[str, Any]]) -> list[str]:
    first = entries[0]
    own = [
        [
            e["name"],
            e["note"],
            duration(e["seconds"]["predict"] / e["rows"]),
            duration(e["seconds"]["explain"] / e["rows"]),
            spread(e["wall"]["explain"]),
            spread(e["cpu"]["explain"]),
        ]
        for e in entries
    ]
    header = ["", "", "predict, per row", "explain, per row", "explain / predict, wall time", "process CPU time"]
    out = [
        "## Other models against their own predict",
        "",
        f"Fitted on {first['rows']} rows x {first['columns']} columns, which are also explained; default rule.",
        "",
        _table(header, own),
        "",
        "## Against model-agnostic and exact Shapley values",
        "",
        f"Per row. shap's permutation explainer with its defaults ({first['background']} background rows) on the "
        f"network's own logit of one class; times of {first['rival_rows']} row(s). Another question is answered: "
        "Shapley values, sampled by shap, exact by shapiq.",
        "",
    ]
    rivals = list(dict.fromkeys(name for e in entries for name in (*e["rivals"], *e["refused"])))
    rows = []
    for e in entries:
        cells = [e["name"], duration(e["seconds"]["explain"] / e["rows"])]
        for name in rivals:
            if name in e["refused"]:
                cells += [e["refused"][name], "–"]
                continue
            r = e["rivals"][name]
            judged = at_least(r["median"], FASTER) if name.startswith("shap ") else ""
            cells += [duration(e["seconds"][name] / e["rival_rows"]), spread(r) + judged]
        rows.append(cells)
    header = ["", "explain", *(cell for name in rivals for cell in (name, "times slower than explain"))]
    return [*out, _table(header, rows), ""]


def _pairs(part: dict[str, Any]) -> list[str]:
    cases = part["cases"]
    ways = [f"{rule}, {way}" for rule in RULES for way in ("factorised", "pairs", "ratio")]
    rows = []
    for e in cases:
        cells = [str(e["members"]), f"{e['size']:,}"]
        for rule in RULES:
            ours, pairs = e["seconds"][rule] / e["rows"], e["seconds"][f"{rule} pairs"]
            cells += [duration(ours), duration(pairs), spread(e["ratio"][rule])]
        rows.append(cells)
    last = ["exponent", "–"]
    for rule in RULES:
        last += [f"{part['exponents'][rule]:.2f}", f"{part['exponents'][f'{rule} pairs']:.2f}", "–"]
    return [
        "## Factorised kernel k-means against its pair network",
        "",
        f"Per row, {cases[0]['columns']} columns, two clusters; exponent: slope of log time over log members. Expected "
        "for many members: 2 for the divided rule, 1 for the undivided one, 2 for the pair layer of N_c x N_k x D "
        f"numbers, which is held in memory, not built anew. The factorised times are of {cases[-1]['rows']} rows at "
        "once, those of the pair network of one row. At few members they are the cost of calls.",
        "",
        _table(["members", "numbers in the pair layer", *ways], [*rows, last]),
        "",
    ]


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    settings = result["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    out = [
        "# Speed and memory of explanations",
        "",
        f"{settings['threads']} thread(s) for every library (OMP_WAIT_POLICY {result['waiting']}), "
        f"{settings['rounds']} interleaved rounds on "
        f"{result['machine']}, load average {result['load'][0]:.1f} before and {result['load'][1]:.1f} after; "
        f"{versions}. Ratios are medians over the rounds of ratios within a round [smallest, largest; ratio of the "
        "shortest times]; times are medians, warm. Wall time suffers from other work on the machine; process CPU time "
        "counts the waiting of idle threads as work.",
        "",
    ]
    parts = {"kmeans": _kmeans, "memory": _memory, "models": _models, "pairs": _pairs}
    for name, show in parts.items():
        if result.get(name):
            out += show(result[name])
    return "\n".join(out)
