"""Memory of an explanation over the rows, in a process of its own: ``python -m experiments.benchmarks.explain_memory JSON``."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks.lrp_memory import MALLOC, ROOT
from experiments.benchmarks.measuring import MIB

WAYS = ("out", "batches", "returned")
_EVERY = 2e-3


def in_fresh_process(way: str, rows: int, columns: int, clusters: int, dtype: str, threads: int) -> dict[str, Any]:
    """{"mib": peak of one warm call beyond what lay there before} or {"failed"}.

    Parameters
    ----------
    way : str
        "out": ``explain`` into a memmap; "batches": ``explain_batches``; "returned": ``explain``.
    rows, columns, clusters : int
        Of a memmap that is explained by k-means.
    dtype : str
    threads : int
    """
    job = {"way": way, "rows": rows, "columns": columns, "clusters": clusters, "dtype": dtype, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.explain_memory", json.dumps(job)],
        cwd=ROOT,
        env={**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"failed": f"{(done.stderr.strip().splitlines() or [done.returncode])[-1]}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _anonymous() -> int:
    """Bytes of this process that no file backs: pages of the two memmaps are the system's to drop."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("RssAnon")


def _peak(job: Callable[[], Any]) -> int:
    before = peak = _anonymous()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(_EVERY):
            peak = max(peak, _anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        result = job()
        peak = max(peak, _anonymous())
        del result
    finally:
        stop.set()
        thread.join()
    return peak - before


def _measure(given: dict[str, Any], folder: str) -> dict[str, Any]:
    import numpy as np
    import torch
    from sklearn.cluster import KMeans

    from neuralize import neuralize

    torch.set_num_threads(given["threads"])
    rows, columns, dtype = given["rows"], given["columns"], given["dtype"]
    rng = np.random.default_rng(0)
    X = np.memmap(Path(folder, "X"), dtype, "w+", shape=(rows, columns))
    for start in range(0, rows, 10_000):
        X[start : start + 10_000] = rng.normal(size=X[start : start + 10_000].shape)
    out = np.memmap(Path(folder, "out"), dtype, "w+", shape=(rows, columns))
    sample = np.array(X[:2000])
    fitted = KMeans(given["clusters"], n_init=1, max_iter=5, random_state=0).fit(sample)
    net = neuralize(fitted).to(getattr(torch, dtype))
    jobs: dict[str, Callable[[], Any]] = {
        "out": lambda: net.explain(X, out=out),
        "batches": lambda: [None for _ in net.explain_batches(X)],
        "returned": lambda: net.explain(X),
    }
    net.explain(sample)  # what a first call leaves behind does not count
    gc.collect()
    return {"mib": _peak(jobs[given["way"]]) / MIB, "how": f"RssAnon sampled every {1e3 * _EVERY:g} ms"}


def main() -> None:
    """One measurement, printed as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(json.loads(sys.argv[1]), folder)))


if __name__ == "__main__":
    main()
