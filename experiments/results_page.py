"""RESULTS.md: what was claimed, what we found, where relevance wins and where it does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.catalogue import MODULES
from experiments.experiment import VERDICTS
from experiments.study import claims_table, whole
from lrp.errors import DataError

__all__ = ["page", "write"]

SHOWN = 4


def write(folder: Path) -> Path:
    """Read every ``result.json`` of the folder and write ``RESULTS.md`` beside them.

    Raises
    ------
    DataError
        If there is none.
    """
    found = {}
    for name in MODULES:
        path = folder / name / "result.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    if not found:
        raise DataError(
            f"{folder} holds no results",
            expected="folders with a result.json",
            got="none of the experiments",
            fix="python -m experiments run --all -o FOLDER",
        )
    out = folder / "RESULTS.md"
    with whole(out) as temporary:
        temporary.write_text(page(found), encoding="utf-8")
    return out


def page(found: dict[str, dict[str, Any]]) -> str:
    """The text, from what the runs hold."""
    papers: dict[str, list[str]] = {}
    for name, run in found.items():
        paper = run["paper"].split(",")[0].split(" (")[0]
        papers.setdefault("Beyond the papers" if "beyond" in run["paper"] else paper, []).append(name)
    verdicts = [c["verdict"] for run in found.values() for c in run["claims"]]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS if v in verdicts)
    lines = [
        "# The papers, reproduced",
        "",
        "Written by `python -m experiments results` from the `result.json` of each run, which holds every number, the "
        "settings, the versions and the commits. Verdicts follow rules written in the code of each experiment. "
        f"{len(verdicts)} claims: {counted}.",
        "",
        "| experiment | question | " + " | ".join(VERDICTS) + " |",
        "|---|---|" + "---|" * len(VERDICTS),
    ]
    for name, run in found.items():
        own = [c["verdict"] for c in run["claims"]]
        told = " | ".join(str(own.count(v) or "") for v in VERDICTS)
        lines.append(f"| [{name}]({name}/result.md) | {run['question']} | {told} |")
    lines.append("")
    for heading, key in (
        ("Where relevance beats every control", "wins"),
        ("Where it does not", "losses"),
    ):
        if any(run[key] for run in found.values()):
            lines += [f"## {heading}", ""]
            for name, run in found.items():
                if run[key]:
                    lines += [f"- [{name}]({name}/result.md)", *_shortened(run[key])]
            lines.append("")
    for paper, names in papers.items():
        lines += [f"## {paper}", ""]
        for name in names:
            run = found[name]
            state = "" if run["complete"] else " *Not all cells of this run are done.*"
            lines += [f"### {run['question']}", "", f"{run.get('summary') or run['words'][0]}{state}", ""]
            if run["claims"]:
                lines += [claims_table(run["claims"]), ""]
            lines += [f"![{figure}]({name}/{figure}.svg)" for figure in run["figures"][:1]]
            lines += ["", f"How it was done, all tables and the settings: [{name}]({name}/result.md).", ""]
    return "\n".join(lines).rstrip() + "\n"


def _shortened(told: Sequence[str]) -> list[str]:
    """The first few of an experiment, and how many more its page has."""
    more = [f"  - and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
    return [*(f"  - {text}" for text in told[:SHOWN]), *more]
