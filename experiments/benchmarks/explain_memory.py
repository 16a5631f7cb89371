"""Memory of a k-means explanation over the rows, in a process of its own.

``python -m experiments.benchmarks.explain_memory JSON``
"""

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


def in_fresh_process(
    way: str, rows: list[int], columns: int, clusters: int, dtype: str, threads: int
) -> dict[str, Any]:
    """{"mib": peaks of one warm call each beyond what lay there before} or {"failed"}.

    Parameters
    ----------
    way : str
        "out": ``explain`` into a memmap; "batches": ``explain_batches``; "returned": ``explain``.
    rows : list of int
        The first so many of a memmap are explained by k-means, ascending.
    columns, clusters : int
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
    shape, dtype = (given["rows"][-1], given["columns"]), given["dtype"]
    rng = np.random.default_rng(0)
    X, out = (np.memmap(Path(folder, name), dtype, "w+", shape=shape) for name in ("X", "out"))
    for start in range(0, shape[0], 10_000):
        X[start : start + 10_000] = rng.normal(size=X[start : start + 10_000].shape)
    sample = np.array(X[:2000])
    fitted = KMeans(given["clusters"], n_init=1, max_iter=5, random_state=0).fit(sample)
    net = neuralize(fitted).to(getattr(torch, dtype))
    jobs: dict[str, Callable[[int], Any]] = {
        "out": lambda n: net.explain(X[:n], out=out[:n]),
        "batches": lambda n: [None for _ in net.explain_batches(X[:n])],
        "returned": lambda n: net.explain(X[:n]),
    }
    job = jobs[given["way"]]
    net.explain(sample)  # what a first call leaves behind does not count
    peaks = []
    for n in given["rows"]:
        gc.collect()
        peaks.append(_peak(lambda n=n: job(n)) / MIB)
    return {"mib": peaks, "how": f"RssAnon sampled every {1e3 * _EVERY:g} ms"}


def main() -> None:
    """One measurement, printed as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(json.loads(sys.argv[1]), folder)))


if __name__ == "__main__":
    main()
