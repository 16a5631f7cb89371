"""Command line of the experiments: ``python -m experiments list | run | page | results``."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from experiments.catalogue import MODULES, experiment
from lrp.errors import LRPError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
OUT = Path("out/experiments")


@app.command("list")
def list_() -> None:
    """What there is, what it asks, which data it needs."""
    for name in MODULES:
        found = experiment(name)
        needs = f"  [needs {', '.join(found.data)}]" if found.data else ""
        print(f"{name:22s} {found.paper}: {found.question}{needs}")


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Names from the list.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every experiment.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Under two minutes each on two cores; no result.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of real data; see experiments/data.py.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many, in place of the experiment's own.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
    seconds: Annotated[float, typer.Option(help="No cell begins after these; the same call goes on.")] = float("inf"),
    part: Annotated[str | None, typer.Option(metavar="K/N", help="Every N-th cell from the K-th (0 to N-1).")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder; each gets one of its name there.")] = OUT,
) -> None:
    """Run experiments; what was finished before a stop is not computed again."""
    if all_ == bool(names):
        _stop("name experiments, or say --all", 2)
    import torch

    from experiments.study import Study

    if threads is not None:
        torch.set_num_threads(threads)
    if part is not None and not re.fullmatch(r"\d+/[1-9]\d*", part):
        _stop(f"--part takes K/N, 0/4 to 3/4 for four processes, and got '{part}'", 2)
    dealt = None if part is None else (int(part.split("/")[0]), int(part.split("/")[1]))
    missed = []
    for name in names or MODULES:
        began = time.monotonic()
        try:
            study = Study(
                experiment(name),
                output / name,
                quick=quick,
                seeds=seeds,
                data=data,
                device=device,
                seconds=seconds,
                part=dealt,
            )
            done = study.run()
        except LRPError as error:
            if not all_:
                _stop(" ".join(str(error).split()), 2)
            print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
            missed.append(name)
            continue
        except KeyboardInterrupt:
            _stop("interrupted; what is done is kept, the same call goes on", 130)
        state = "" if done else "  (the time is over: the same call goes on)"
        print(f"{output / name / 'result.md'}  {time.monotonic() - began:.0f} s{state}")
    if missed:
        _stop(f"{len(missed)} did not run: {', '.join(missed)}", 1)


@app.command()
def page(
    names: Annotated[list[str], typer.Argument(help="Names from the list.")],
    quick: Annotated[bool, typer.Option("--quick", help="Of quick runs.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the runs.")] = OUT,
) -> None:
    """Write pages again from the rows that are there, also of a run that was stopped."""
    import json

    from experiments.study import Study

    for name in names:
        try:
            held = output / name / "result.json"
            seeds = json.loads(held.read_text(encoding="utf-8"))["settings"]["seeds"] if held.exists() else None
            study = Study(experiment(name), output / name, quick=quick, seeds=seeds)
            if not study.rows:
                _stop(f"{output / name} holds no rows of {name}", 2)
            study.rewrite()
        except (LRPError, ValueError, KeyError) as error:
            _stop(" ".join(str(error).split()), 2)
        print(output / name / "result.md")


@app.command()
def results(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of full runs.")] = Path("experiments/results"),
) -> None:
    """Write RESULTS.md from the runs in a folder."""
    from experiments.results_page import write

    print(write(output))


def _stop(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    app()
