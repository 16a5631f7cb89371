"""What loading one ONNX file takes, in a process that does nothing else: ``python -m compress._load_probe``."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

_LOADS, _RUNS = 5, 3
_RESETTING = Path("/proc/self/clear_refs")


def _status(key: str) -> int | None:
    """Bytes, as the kernel counts them; None where it does not say."""
    place = Path("/proc/self/status")
    if not place.exists():
        return None
    rows = [row for row in place.read_text().splitlines() if row.startswith(key)]
    return int(rows[0].split()[1]) * 1024 if rows else None


def probe(path: str, threads: int, batch: int, options: dict[str, str]) -> dict[str, Any]:
    """Milliseconds of a load; bytes that stay resident after some runs, and at the most; None if they are not known."""
    import onnxruntime

    from compress.meters import _feeds

    wanted = onnxruntime.SessionOptions()
    wanted.log_severity_level = 4
    wanted.intra_op_num_threads = threads
    wanted.inter_op_num_threads = 1
    for key, value in options.items():
        wanted.add_session_config_entry(key, value)

    def load() -> tuple[Any, float]:
        start = time.perf_counter()
        session = onnxruntime.InferenceSession(path, wanted, providers=["CPUExecutionProvider"])
        return session, (time.perf_counter() - start) * 1e3

    gc.collect()
    try:
        _RESETTING.write_text("5")
        resets = True
    except OSError:
        resets = False
    before = _status("VmRSS:")
    session, first = load()
    feeds = _feeds(session, batch, 0, path)
    for _ in range(_RUNS):
        session.run(None, feeds)
    after, peak = _status("VmRSS:"), _status("VmHWM:")
    known = before is not None and after is not None
    del session
    times = [first, *(load()[1] for _ in range(_LOADS - 1))]
    return {
        "load_ms": statistics.median(times),
        "resident": max(0, after - before) if known else None,  # type: ignore[operator]  # known says so
        "peak": max(0, peak - before) if known and resets and peak is not None else None,  # type: ignore[operator]
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(probe(given["path"], given["threads"], given["batch"], given["options"])))
