"""How long explanations of fitted models take, in units of the models' own ``predict`` and of Shapley values.

Run ``python -m experiments.benchmarks.explain_speed``. Jobs that are compared
take turns in one process, and every ratio is taken within a round:

kmeans
    k-means against scikit-learn's ``predict``; budget 4 into ``out=``, 6 returned.
memory
    What a k-means explanation of a memmap needs, for few and for many rows.
models
    Other models against their own ``predict``, and all against shap's permutation
    explainer (budget: 1000 times faster per row) and shapiq, where installed.
pairs
    Kernel k-means, factorised, against the pair network written out.

``--quick`` takes under a minute, everything about twenty. Where other work
shares the cores, set ``OMP_WAIT_POLICY=passive``: by default a thread that is
done early keeps its core busy until the others, perhaps not running, catch up.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import threadpoolctl
import torch

from experiments.benchmarks import explain_memory, explain_models, explain_pairs, measuring
from experiments.benchmarks.explain_models import Model
from experiments.benchmarks.explain_report import markdown
from experiments.benchmarks.lrp_peers import Refused
from experiments.benchmarks.lrp_speed import _machine
from neuralize import CoverageWarning

PARTS = ("kmeans", "memory", "models", "pairs")


class TwoClocks(measuring.CpuClock):
    """Wall time; beside it, process CPU time of every call of a job.

    Parameters
    ----------
    before : dict, optional
        Job -> what runs before each call of it, untimed.
    """

    unit = "wall time"

    def __init__(self, before: dict[measuring.Job, measuring.Job] | None = None) -> None:
        self.before = before or {}
        self.cpu: dict[measuring.Job, list[float]] = {}

    def seconds(self, job: measuring.Job) -> float:
        """Wall seconds that one call takes; what it returns is freed outside."""
        if job in self.before:
            self.before[job]()
        cpu, wall = time.process_time(), time.perf_counter()
        result = job()
        spent = time.perf_counter() - wall
        self.cpu.setdefault(job, []).append(time.process_time() - cpu)
        del result
        return spent


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _turns(
    title: str, jobs: dict[str, measuring.Job], rounds: int, before: dict[measuring.Job, measuring.Job] | None = None
) -> tuple[list[dict[str, float]], list[dict[str, float]], dict[str, float]]:
    """Wall and CPU seconds of every round, and median wall seconds, of jobs that have run once before."""
    for job in jobs.values():
        job()
    timer = TwoClocks(before)
    wall = measuring.interleave(jobs, rounds, timer, lambda i: _say(f"{title}: round {i + 1} of {rounds}"))
    cpu = [{name: timer.cpu[job][i] for name, job in jobs.items()} for i in range(rounds)]
    return wall, cpu, {name: statistics.median(r[name] for r in wall) for name in jobs}


def _ratio(rounds: list[dict[str, float]], name: str, over: str, factor: float = 1.0) -> dict[str, float]:
    return {k: factor * v for k, v in asdict(measuring.ratio(rounds, name, over)).items()}


def touched(like: npt.NDArray[Any]) -> None:
    """Take memory for a result from the system, page by page, and give it back to malloc or the system."""
    array = np.empty_like(like)
    array.reshape(-1)[:: 4096 // like.itemsize] = 0


def kmeans(rows: int, columns: int, clusters: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Explanations into ``out=`` and returned, over predict."""
    model = explain_models.centroids(rows, columns, clusters, dtype)
    out = np.zeros_like(model.X)
    jobs = {
        "predict": model.predict(),
        "out": lambda: model.net.explain(model.X, out=out),
        "returned": model.explain(),
        "as it comes": model.explain(),
    }
    wall, cpu, seconds = _turns(model.name, jobs, rounds, {jobs["returned"]: lambda: touched(model.X)})
    return {
        "name": dtype,
        "note": model.note,
        "seconds": seconds,
        "rounds": wall,
        "cpu_rounds": cpu,
        "wall": {name: _ratio(wall, name, "predict") for name in jobs if name != "predict"},
        "cpu": {name: _ratio(cpu, name, "predict") for name in jobs if name != "predict"},
    }


def memory(rows: list[int], columns: int, clusters: int, dtype: str, threads: int) -> dict[str, Any]:
    """Peaks of every way, for few and many rows."""
    ways = {}
    for way in explain_memory.WAYS:
        _say(f"memory, {way}: {rows} rows")
        ways[way] = explain_memory.in_fresh_process(way, rows, columns, clusters, dtype, threads)
    return {"rows": rows, "columns": columns, "clusters": clusters, "dtype": dtype, "ways": ways}


def model(built: Model, rival_rows: int, rounds: int) -> dict[str, Any]:
    """One model against its own predict, and against rivals per row."""
    jobs = {"predict": built.predict(), "explain": built.explain()}
    refused = {}
    for name, make in explain_models.RIVALS.items():
        try:
            jobs[name] = make(built, rival_rows)
        except Refused as reason:
            refused[name] = str(reason)
    wall, cpu, seconds = _turns(built.name, jobs, rounds)
    per_row = len(built.X) / rival_rows
    return {
        "name": built.name,
        "note": built.note,
        "rows": len(built.X),
        "columns": built.X.shape[1],
        "rival_rows": rival_rows,
        "background": min(explain_models.BACKGROUND, len(built.X)),
        "seconds": seconds,
        "rounds": wall,
        "cpu_rounds": cpu,
        "wall": {"explain": _ratio(wall, "explain", "predict")},
        "cpu": {"explain": _ratio(cpu, "explain", "predict")},
        "rivals": {n: _ratio(wall, n, "explain", per_row) for n in jobs if n not in ("predict", "explain")},
        "refused": refused,
    }


def pair_jobs(members: int, columns: int, rows: int) -> tuple[dict[str, measuring.Job], int, int]:
    """Every rule, factorised and by the pair network; rows of a factorised job; numbers in the pair layer."""
    net, X, network = explain_pairs.case(members, columns, rows)
    jobs: dict[str, measuring.Job] = {}
    for rule in explain_pairs.RULES:
        jobs[rule] = partial(net.explain, X, rule=rule)
        jobs[f"{rule} pairs"] = partial(network.explain, X[0], rule)
    return jobs, len(X), network.size


def pairs(members: list[int], columns: int, rows: int, rounds: int) -> dict[str, Any]:
    """Factorised rules against the pair network, over the number of members."""
    cases = []
    for n in members:
        jobs, explained, size = pair_jobs(n, columns, rows)
        wall, cpu, seconds = _turns(f"{n} members", jobs, rounds)
        cases.append(
            {
                "members": n,
                "columns": columns,
                "rows": explained,
                "size": size,
                "seconds": seconds,
                "rounds": wall,
                "cpu_rounds": cpu,
                "ratio": {rule: _ratio(wall, f"{rule} pairs", rule, explained) for rule in explain_pairs.RULES},
            }
        )
    names = [name for rule in explain_pairs.RULES for name in (rule, f"{rule} pairs")]
    exponents = {n: explain_pairs.exponent(members, [c["seconds"][n] for c in cases]) for n in names}
    return {"cases": cases, "exponents": exponents}


@contextmanager
def _equal_threads(threads: int) -> Iterator[None]:
    """Every library, scikit-learn's own OpenMP included, may use so many threads and no more."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpoolctl.threadpool_limits(threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)  # of interest to who reads the values
            yield
    finally:
        torch.set_num_threads(before)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "scikit-learn", "numpy", "shap", "shapiq"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rows", type=int, default=1_000_000, help="of k-means; memory takes a tenth of them, and all")
    parser.add_argument("--columns", type=int, default=100, help="of k-means")
    parser.add_argument("--clusters", type=int, default=20, help="of k-means")
    parser.add_argument("--dtypes", nargs="+", choices=["float64", "float32"], default=["float64", "float32"])
    parser.add_argument("--model-rows", type=int, default=10_000, help="that other models are fitted on and explain")
    parser.add_argument("--model-columns", type=int, default=30)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--rival-rows", type=int, default=1, help="that shap and shapiq explain")
    parser.add_argument("--members", nargs="+", type=int, default=[100, 200, 400, 800, 1600], help="of kernel k-means")
    parser.add_argument("--pair-rows", type=int, default=64, help="that factorised kernel k-means explains at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="for every library")
    parser.add_argument("--quick", action="store_true", help="smaller tables and models, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and round")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write result.json and result.md")
    given = parser.parse_args(argv)
    if given.quick:
        given.rows, given.model_rows, given.members, given.rounds = 100_000, 500, [100, 200, 400], 3
    least = {"rows": 100, "columns": 1, "clusters": 2, "model_rows": 100, "model_columns": 1, "rival_rows": 1,
             "pair_rows": 1, "rounds": 1, "threads": 1}  # fmt: skip
    for name, smallest in least.items():
        if getattr(given, name) < smallest:
            parser.error(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be at least {smallest}")
    if min(given.members) < 4:
        parser.error(f"--members are {given.members}; two clusters need at least 4")
    known = list(explain_models.zoo(given.model_rows, given.model_columns))
    given.models = given.models or known
    unknown = [m for m in given.models if m not in known]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; there are {', '.join(known)}")
    return given


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure what the command line asks for."""
    given = _arguments(argv)
    started = time.time()
    result: dict[str, Any] = {
        "settings": {k: v for k, v in vars(given).items() if k not in ("output", "json")},  # no paths
        "versions": _versions(),
        "machine": _machine("cpu"),
        "waiting": os.environ.get("OMP_WAIT_POLICY", "active"),
        "load": [os.getloadavg()[0]] * 2,
    }

    def keep(part: str, measured: Any) -> None:
        result[part] = measured
        result["seconds"], result["load"][1] = time.time() - started, os.getloadavg()[0]
        _write(result, given)  # after every model: a long run that is stopped leaves what it has

    with _equal_threads(given.threads):
        if "kmeans" in given.parts:
            found: list[dict[str, Any]] = []
            for dtype in given.dtypes:
                found.append(kmeans(given.rows, given.columns, given.clusters, dtype, given.rounds))
                keep("kmeans", found)
        if "memory" in given.parts:
            sizes = sorted({max(given.rows // 10, min(given.rows, 30_000)), given.rows})  # some batches at least
            keep("memory", memory(sizes, given.columns, given.clusters, given.dtypes[0], given.threads))
        if "models" in given.parts:
            found = []
            builders = explain_models.zoo(given.model_rows, given.model_columns)
            for name in given.models:
                found.append(model(builders[name](), given.rival_rows, given.rounds))
                keep("models", found)
        if "pairs" in given.parts:
            keep("pairs", pairs(given.members, given.model_columns, given.pair_rows, given.rounds))
    return result


def _write(result: dict[str, Any], given: argparse.Namespace) -> None:
    text = json.dumps(result, indent=1) + "\n"
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "result.json").write_text(text)
        (given.output / "result.md").write_text(markdown(result))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    print(markdown(run(argv)))


if __name__ == "__main__":
    main()
