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


def _above(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)


def probe(path: str, threads: int, batch: int, options: dict[str, str]) -> dict[str, Any]:
    """Milliseconds of a load; bytes that stay resident after some runs, and at the most; None if they are not known."""
    from compress.meters import feeds_of, session_of

    def load() -> tuple[Any, float]:
        start = time.perf_counter()
        session = session_of(path, threads, options)
        return session, (time.perf_counter() - start) * 1e3

    gc.collect()
    try:
        _RESETTING.write_text("5")
        resets = True
    except OSError:
        resets = False
    before = _status("VmRSS:")
    session, first = load()
    feeds = feeds_of(session, batch, 0, path)
    for _ in range(_RUNS):
        session.run(None, feeds)
    after, peak = _status("VmRSS:"), _status("VmHWM:")
    del session
    times = [first, *(load()[1] for _ in range(_LOADS - 1))]
    return {
        "load_ms": statistics.median(times),
        "resident": _above(before, after),
        "peak": _above(before, peak) if resets else None,
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(probe(given["path"], given["threads"], given["batch"], given["options"])))
