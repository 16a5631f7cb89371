"""Taking the time and the memory of jobs: interleaved clocks, ratios within a round, peaks of the resident set."""

from __future__ import annotations

import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Job = Callable[[], Any]
MIB = 2**20


class CpuClock:
    """Process CPU time: of all threads of this process, and of no other process."""

    unit = "process CPU time"

    def seconds(self, job: Job) -> float:
        """Seconds that one call takes; what it returns is freed outside."""
        start = time.process_time()
        result = job()
        spent = time.process_time() - start
        del result
        return spent


class CudaClock:
    """Time between two events on the current stream, the queue drained before and after."""

    unit = "time between CUDA events"

    def seconds(self, job: Job) -> float:
        """Seconds from an idle device to an idle device, launches and host-side waits included."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = job()
        end.record()
        torch.cuda.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3


def told(text: str, result: Mapping[str, Any], folder: Path | None) -> None:
    """Print the tables; with a folder, keep them as result.md and the figures as result.json."""
    print(text)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "result.md").write_text(text)


def clock(device: str) -> CpuClock | CudaClock:
    """The clock of a device."""
    return CudaClock() if device.startswith("cuda") else CpuClock()


def interleave(
    jobs: Mapping[str, Job],
    rounds: int,
    timer: CpuClock | CudaClock,
    on_round: Callable[[int], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Seconds of every job in every round.

    The jobs take turns, every second round in reverse order, so that a slow
    spell of the machine meets all of them and no job always follows the same one.
    """
    out = []
    for i in range(rounds):
        order = list(jobs) if i % 2 == 0 else list(reversed(jobs))
        gc.collect()
        gc.disable()  # a collection inside one job would be booked to it
        try:
            seconds = {name: timer.seconds(jobs[name]) for name in order}
        finally:
            gc.enable()
        out.append({name: seconds[name] for name in jobs})
        on_round(i)
    return out


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest ratio over the rounds; ``best`` is that of the two shortest times."""

    median: float
    low: float
    high: float
    best: float


def ratio(rounds: Sequence[Mapping[str, float]], name: str, over: str) -> Ratio:
    """A job's time over another's of the same round."""
    values = [r[name] / r[over] for r in rounds]
    best = min(r[name] for r in rounds) / min(r[over] for r in rounds)
    return Ratio(statistics.median(values), min(values), max(values), best)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@contextmanager
def _sampled(every: float) -> Iterator[list[int]]:
    peak, stop = [_resident()], threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            peak[0] = max(peak[0], _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def peak_extra(job: Job) -> tuple[int, str]:
    """(bytes, method): how far one warm call raises the resident set above what lay there before.

    The kernel's own high-water mark where it can be reset (Linux), else
    samples every 0.5 ms. Weights, plans and modified weights that an earlier
    call left behind do not count; results of the call do. Start the process
    with small ``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_``, or
    freed memory that malloc keeps hides part of the rise.
    """
    for _ in range(2):
        result = job()
        del result
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident()
        result = job()
        return max(0, _status("VmHWM:") - before), "VmHWM, reset before the call"
    except OSError:
        before = _resident()
        with _sampled(5e-4) as peak:
            result = job()
        del result
        return max(0, peak[0] - before), "resident set sampled every 0.5 ms"


def cuda_peak_extra(job: Job) -> tuple[int, str]:
    """(bytes, method): how far one warm call raises the allocated device memory."""
    result = job()
    del result
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = job()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"
