"""What processes of one torch.distributed run tell each other."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lrp.errors import DistributedError

__all__ = [
    "exchange",
    "from_first",
    "gather",
    "on_device",
    "place",
    "raise_together",
    "reached",
    "same_everywhere",
    "sum_over_processes",
    "together",
]


def place() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def on_device(stack: contextlib.ExitStack, device: torch.device | None) -> None:
    """Make the model's the current GPU: NCCL sends from the current one."""
    if device is not None and device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))


def _device() -> torch.device:
    """Where the default group takes tensors from."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def exchange(note: dict[str, Any]) -> list[dict[str, Any]]:
    """The note of every process, by rank. Notes are JSON: nothing is unpickled.

    Raises
    ------
    DistributedError
        If the processes can not talk to each other any more.
    """
    if place()[1] == 1:
        return [note]
    device = _device()
    text = json.dumps(note).encode()
    try:
        size = torch.tensor([len(text)], device=device)
        sizes = [torch.zeros_like(size) for _ in range(place()[1])]
        dist.all_gather(sizes, size)
        lengths = [int(s) for s in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
        padded[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=device)
        parts = [torch.zeros_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
    except RuntimeError as error:
        raise DistributedError(
            "another process of the run is gone",
            expected=f"{place()[1]} processes at work",
            got=str(error).strip().splitlines()[0],
            fix="see the output of that process",
        ) from error
    return [json.loads(bytes(p[:n].tolist())) for p, n in zip(parts, lengths, strict=True)]


def raise_together(note: dict[str, Any], error: Exception | None) -> list[dict[str, Any]]:
    """Exchange notes; if one process failed, every process raises.

    The one that failed raises its own error, the others name it. All wait here
    for the slowest.

    Raises
    ------
    Exception
        The process' own.
    DistributedError
        If another failed.
    """
    failure = None if error is None else f"{type(error).__name__}: {error}"
    try:
        notes = exchange({**note, "error": failure})
    except DistributedError:
        if error is not None:
            raise error from None
        raise
    if error is not None:
        raise error
    for rank, other in enumerate(notes):
        if other["error"] is not None:
            raise DistributedError(
                f"process {rank} of {len(notes)} failed",
                expected="every process to finish its batches",
                got=other["error"],
                fix="mend that error and start all processes again; with resume= they go on where they were",
            )
    return notes


def sum_over_processes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum of float64 tensors whose names and shapes all processes share; one reduction."""
    if place()[1] == 1 or not tensors:
        return tensors
    names = sorted(tensors)  # the same order in every process
    flat = torch.cat([tensors[n].reshape(-1).to(_device()) for n in names])
    dist.all_reduce(flat)
    pieces = dict(zip(names, torch.split(flat, [tensors[n].numel() for n in names]), strict=True))
    return {n: pieces[n].reshape(t.shape).to(t.device) for n, t in tensors.items()}


def same_everywhere(notes: list[dict[str, Any]], key: str, what: str, fix: str) -> None:
    """Raise on every process if the notes differ in ``key``.

    Raises
    ------
    DistributedError
    """
    for rank, note in enumerate(notes):
        if note[key] != notes[0][key]:
            raise DistributedError(
                f"the processes do not agree on {what}",
                expected=f"what process 0 has: {str(notes[0][key])[:200]}",
                got=f"in process {rank}: {str(note[key])[:200]}",
                fix=fix,
            )


@contextlib.contextmanager
def reached() -> Iterator[None]:
    """What torch says when a process does not answer, as a DistributedError."""
    try:
        yield
    except (DistributedError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise DistributedError(
            "another process of the run is gone",
            expected=f"{place()[1]} processes at work",
            got=(str(error).strip().splitlines() or [type(error).__name__])[0],
            fix="see the output of that process",
        ) from error


def gather(numbers: Sequence[float]) -> list[list[float]]:
    """The float64 numbers of every process, by rank; all have equally many.

    Raises
    ------
    DistributedError
        If the processes can not talk to each other any more.
    """
    if place()[1] == 1:
        return [[float(v) for v in numbers]]
    with reached():
        own = torch.tensor([float(v) for v in numbers], dtype=torch.float64, device=_device())
        rows = [torch.zeros_like(own) for _ in range(place()[1])]
        dist.all_gather(rows, own)
        found: list[list[float]] = torch.stack(rows).tolist()
    return found


@contextlib.contextmanager
def together() -> Iterator[None]:
    """If the block fails in one process, every process raises at its end, as :func:`raise_together` does.

    All wait here for the slowest. What the block says to other processes must not
    depend on what may fail in one of them.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    try:
        lost = any(row[0] for row in gather([failed is not None]))
    except DistributedError:
        if failed is not None:
            raise failed from None
        raise
    if lost:
        raise_together({}, failed)


def from_first(tensors: Iterable[Tensor]) -> None:
    """Write process 0's values into the tensors of the others, in place; the shapes are the same in all.

    Raises
    ------
    DistributedError
        If the processes can not talk to each other any more.
    """
    if place()[1] == 1:
        return
    with torch.no_grad(), reached():
        for t in tensors:
            held = t.detach().to(_device(), copy=True).contiguous()
            if held.numel():
                dist.broadcast(held.reshape(-1).view(torch.uint8), 0)  # bytes: backends do not know all types
                t.copy_(held)
