"""How long a k-means explanation takes, in units of scikit-learn's own ``predict``.

Run ``python -m experiments.benchmarks.kmeans_speed``. The three jobs take turns
in one process; the ratios are medians over the rounds. Target: at most 4 into
``out=``, at most 6 returned.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans

from neuralize import neuralize


def _seconds(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure(rows: int, columns: int, clusters: int, dtype: str, rounds: int) -> dict[str, float]:
    """Median seconds of predict, and median ratios over it within each round."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(clusters, columns))
    X = (centres[rng.integers(0, clusters, rows)] + 2 * rng.normal(size=(rows, columns))).astype(dtype)
    fitted = KMeans(clusters, n_init=1, max_iter=5, random_state=0).fit(X[:20_000])
    net = neuralize(fitted).to(getattr(torch, dtype))
    out = np.zeros_like(X)
    jobs = {
        "predict": lambda: fitted.predict(X),
        "out": lambda: net.explain(X, out=out),
        "returned": lambda: net.explain(X),
    }
    for job in jobs.values():
        job()
    seconds = [{name: _seconds(job) for name, job in jobs.items()} for _ in range(rounds)]
    return {
        "predict": statistics.median(s["predict"] for s in seconds),
        "out": statistics.median(s["out"] / s["predict"] for s in seconds),
        "returned": statistics.median(s["returned"] / s["predict"] for s in seconds),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    print(f"{given.rows} rows x {given.columns} columns, K = {given.clusters}, {torch.get_num_threads()} threads")
    print(f"{'dtype':<10}{'predict':>12}{'into out=':>12}{'returned':>12}")
    for dtype in ("float64", "float32"):
        m = measure(given.rows, given.columns, given.clusters, dtype, given.rounds)
        print(f"{dtype:<10}{1e3 * m['predict']:>9.1f} ms{m['out']:>10.2f} x{m['returned']:>10.2f} x")


if __name__ == "__main__":
    main()
