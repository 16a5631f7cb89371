"""Peak memory of one method, in a process of its own: ``python -m experiments.benchmarks.lrp_memory JSON``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# every block of a page or more goes back to the system when freed: else malloc's own stock hides part of the rise
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def in_fresh_process(method: dict[str, Any], case: dict[str, Any], threads: int) -> dict[str, Any]:
    """{"mib", "method"} or {"refused"}: the peak of a warm call beyond what lay there before."""
    job = json.dumps({"method": method, "case": case, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.lrp_memory", job],
        cwd=ROOT,
        env={**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"refused": f"the process failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """One measurement, printed as JSON."""
    import torch

    from experiments.benchmarks import lrp_methods as m
    from experiments.benchmarks import measuring

    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    case, method = m.Case(**given["case"]), m.Method(**given["method"])
    model, x = case.model(), case.input()
    try:
        start = time.process_time()
        job = m.build(method, case, model, x)
        job()
        first = time.process_time() - start
        peak = measuring.cuda_peak_extra if case.device.startswith("cuda") else measuring.peak_extra
        extra, how = peak(job)
    except m.Refused as error:
        print(json.dumps({"refused": str(error)}))
        return
    print(json.dumps({"mib": extra / measuring.MIB, "how": how, "first_call_s": first}))


if __name__ == "__main__":
    main()
