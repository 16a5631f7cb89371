"""What was measured, as Markdown: one table per library, the budget beside every figure of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.benchmarks.lrp_methods import FULL, MEMORY_BUDGET, PLAIN

Cells = Callable[[dict[str, Any], str], str]
_TITLES = {
    "lrp": "lrp, books off, over the plain gradient",
    "lrp ledger": "lrp with its books",
    "lrp compiled": "lrp, compiled",
    "lrp weights": "lrp, relevance of every weight as well, over the full backward",
    "zennit": "zennit",
    "captum": "captum",
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def judged(value: float, allowed: float | None) -> str:
    """`` (<= 1.15 met)`` or ``(<= 1.15 missed)``."""
    return "" if allowed is None else f" (<= {allowed:g} {'met' if value <= allowed else 'missed'})"


def time_cell(case: dict[str, Any], name: str) -> str:
    """Median ratio, its range over the rounds, the ratio of the shortest times, and the budget."""
    if name not in case["ratios"]:
        return "refused" if name in case["refused"] else "–"
    r = case["ratios"][name]
    return f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}; {r['best']:.2f}]{judged(r['median'], r['budget'])}"


def cold_cell(case: dict[str, Any], name: str) -> str:
    """Seconds of the first call, and the same in plain gradients."""
    if name not in case["cold_s"]:
        return "–"
    return f"{case['cold_s'][name]:.2f} s = {1e3 * case['cold_s'][name] / case['plain_ms']:.0f} x"


def memory_cell(case: dict[str, Any], name: str) -> str:
    """Peak over that of the plain gradient (of the full backward for weights), in MiB too."""
    entry = case["memory"].get(name)
    if entry is None or "mib" not in entry:
        return "refused" if entry else "–"
    if "ratio" not in entry:
        return f"{entry['mib']:.0f} MiB"
    return f"{entry['ratio']:.2f} = {entry['mib']:.0f} MiB{judged(entry['ratio'], entry.get('budget'))}"


def rate_cell(case: dict[str, Any], name: str) -> str:
    """Pictures per second."""
    return f"{case['per_second'][name]:.0f}" if name in case["per_second"] else "–"


def _grouped(names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split()
        key = parts[0] if len(parts) == 2 else f"{parts[0]} {parts[-1]}"
        groups.setdefault(key, []).append(name)
    return groups


def _section(
    title: str, cases: list[dict[str, Any]], labels: dict[str, str], cell: Cells, what: str = "composite"
) -> list[str]:
    """A heading and its table; ``labels`` says what each row is called."""
    header = [what, *(c["label"] for c in cases)]
    rows = [[label, *(cell(c, name) for c in cases)] for name, label in labels.items()]
    return [f"### {title}", "", _table(header, rows), ""]


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    cases, settings = result["cases"], result["settings"]
    names = [n for n in result["methods"] if n not in (PLAIN, FULL)]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    out = [
        "# Speed and memory of lrp",
        "",
        f"{result['clock']}, {settings['threads']} thread(s), {settings['rounds']} interleaved rounds on "
        f"{result['machine']}; {versions}. Median over the rounds of (method / plain gradient of the same round) "
        "[smallest, largest; ratio of the shortest times]. Plain gradient: forward and backward to the input, frozen "
        "weights, the unmodified network. Full backward: to the input and every parameter. Random weights.",
        "",
        "### Baselines",
        "",
        _table(
            ["", *(c["label"] for c in cases)],
            [
                ["plain gradient, ms", *(f"{c['plain_ms']:.1f}" for c in cases)],
                ["full backward, x plain", *(time_cell(c, FULL) for c in cases)],
            ],
        ),
        "",
        "## Time, warm",
        "",
    ]
    for key, group in _grouped(names).items():
        out += _section(_TITLES.get(key, key), cases, {n: n.split()[1] for n in group}, time_cell)
    if any(c["per_second"] for c in cases):
        out += ["## Pictures per second", ""]
        out += _section("All", cases, {n: n for n in [PLAIN, FULL, *names]}, rate_cell, "method")
    if any(c["cold_s"] for c in cases):
        ours = {n: n.removeprefix("lrp ") for n in names if any(n in c["cold_s"] for c in cases)}
        out += ["## Time, cold", "", "First call on a model never seen: export, planning, derived weights, result.", ""]
        out += _section("lrp", cases, ours, cold_cell)
    if any(c["memory"] for c in cases):
        hows = {e["how"] for c in cases for e in c["memory"].values() if "how" in e}
        out += ["## Peak memory", ""]
        out += [f"Of one warm call beyond what lay there before, a fresh process each ({'; '.join(sorted(hows))}). "]
        out += [f"Over the plain gradient's; weights over the full backward's. Budget of lrp: {MEMORY_BUDGET}.", ""]
        known = {n: n for n in [PLAIN, FULL, *names] if any(n in c["memory"] for c in cases)}
        out += _section("All", cases, known, memory_cell, "method")
    refusals: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, why in case["refused"].items():
            refusals.setdefault((case["label"], why), []).append(name)
    if refusals:
        out += ["## Refused", ""]
        out += [f"- {label}: {', '.join(group)}: {why}" for (label, why), group in refusals.items()]
        out.append("")
    return "\n".join(out)
