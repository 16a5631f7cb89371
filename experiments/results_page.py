"""RESULTS.md: what was claimed, what we found, where relevance wins and where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.catalogue import MODULES
from experiments.study import claims_table, whole
from lrp.errors import DataError

__all__ = ["page", "write"]


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
        papers.setdefault(run["paper"], []).append(name)
    verdicts = [c["verdict"] for run in found.values() for c in run["claims"]]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    lines = [
        "# The papers, reproduced",
        "",
        "Written by `python -m experiments results` from the `result.json` of each run, which holds every number, its "
        "settings, the versions and the commit. Verdicts follow rules that are written in the code of each experiment. "
        f"{len(verdicts)} claims: {counted}.",
        "",
    ]
    for heading, key in (
        ("Where relevance beats every control", "wins"),
        ("Where it does not", "losses"),
    ):
        told = [(name, text) for name, run in found.items() for text in run[key]]
        if told:
            lines += [f"## {heading}", ""]
            lines += [f"- {text} ([{name}]({name}/result.md))" for name, text in told] + [""]
    for paper, names in papers.items():
        lines += [f"## {paper}", ""]
        for name in names:
            run = found[name]
            state = "" if run["complete"] else " *Not all cells of this run are done.*"
            lines += [f"### {run['question']}", "", f"[{name}]({name}/result.md).{state}", ""]
            for text in run["words"]:
                lines += [text, ""]
            if run["claims"]:
                lines += [claims_table(run["claims"]), ""]
            lines += [f"![{figure}]({name}/{figure}.svg)" for figure in run["figures"][:1]] + [""]
    return "\n".join(lines).rstrip() + "\n"
