"""Finished cells of long work on disk: one JSON line each, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from compress._progress import lock_file
from lrp._files import digest, unwritable
from lrp.errors import DataError, FileFormatError, MismatchError

__all__ = ["Cells", "Key", "opened", "weights_of"]

FORMAT, VERSION = "compress.cells", 1
_FIX = "make space or name another file, and start again: it goes on after what is written"
Key = Sequence[str | int | float | bool | None]


class Cells:
    """Values by key, kept in a file where one is named. Made by :func:`opened`.

    Every value comes back as JSON gives it, whether it was computed just now or
    read, so that a run that was resumed has the values of one that was not.
    """

    def __init__(self, handle: int | None, path: Path | None, values: dict[str, Any]) -> None:
        self._handle, self._path, self._values = handle, path, values
        self.found = len(values)

    def __contains__(self, key: Key) -> bool:
        return _name(key) in self._values

    def __len__(self) -> int:
        return len(self._values)

    def value(self, key: Key, compute: Callable[[], Any]) -> Any:
        """The value of a cell; computed and written at once if it is missing.

        Raises
        ------
        DataError
            If it can not be written.
        """
        name = _name(key)
        if name not in self._values:
            text = json.dumps(compute(), allow_nan=False)
            self._write(_line(name, text))
            self._values[name] = json.loads(text)
        return self._values[name]

    def _write(self, line: bytes) -> None:
        if self._handle is None:
            return
        try:
            while line:
                line = line[os.write(self._handle, line) :]
            os.fsync(self._handle)
        except OSError as error:
            raise unwritable(self._path, error, _FIX) from error


@contextmanager
def opened(path: str | os.PathLike[str] | None, kind: str, settings: Mapping[str, Any]) -> Iterator[Cells]:
    """Cells of one piece of work.

    Parameters
    ----------
    path : path or None
        The file; made if missing, extended if it holds cells of the same work.
        None keeps the cells in memory.
    kind : str
        What the work is.
    settings : dict
        All that every cell depends on, JSON-able.

    Raises
    ------
    MismatchError
        If the file holds cells of other work; it stays as it is.
    FileFormatError
        If it is something else, or damaged before its last line.
    DataError
        If it can not be opened, or another process is at work on it.

    Notes
    -----
    A line is appended and flushed to the disk for every cell. A process killed
    while it writes leaves a line without an end, which the next run removes. A
    lock, which dies with its process, keeps other processes out.
    """
    if path is None:
        yield Cells(None, None, {})
        return
    place = Path(path)
    mine = {"format": FORMAT, "version": VERSION, "kind": kind, "settings": json.loads(json.dumps(settings))}
    try:
        handle = os.open(place, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise unwritable(place, error, _FIX) from error
    try:
        try:
            lock_file(handle)
        except OSError as error:
            raise DataError(
                f"another process is at work on {place}",
                expected="one process per file",
                got="a lock that is held",
                fix="wait for it, end it, or name another file",
            ) from error
        held = place.read_bytes()
        values, sound = _read(held, mine, place)
        cells = Cells(handle, place, values)
        if sound < len(held):
            os.ftruncate(handle, sound)
        os.lseek(handle, 0, os.SEEK_END)
        if not sound:
            cells._write(json.dumps(mine).encode() + b"\n")
        yield cells
    finally:
        os.close(handle)


def weights_of(model: nn.Module) -> dict[str, str]:
    """What tells a network from others: its class, a digest of its layers as they print, and one of its tensors."""
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    return {"model": type(model).__name__, "weights": digest(dict(model.state_dict()), layers)}


def _name(key: Key) -> str:
    return json.dumps(list(key))


def _line(name: str, text: str) -> bytes:
    body = f'"cell": {name}, "value": {text}'
    return f'{{"check": {zlib.crc32(body.encode())}, {body}}}\n'.encode()


def _read(held: bytes, mine: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], int]:
    """Values by name, and up to which byte the file is whole."""
    end = held.find(b"\n") + 1
    start = f'{{"format": "{FORMAT}"'.encode()
    if not end and (start.startswith(held) or held.startswith(start)):
        return {}, 0  # new, or killed while its first line was written
    try:
        theirs = json.loads(held[:end])
        if theirs["format"] != FORMAT:
            raise KeyError("format")
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path} holds no cells",
            expected="a file that this package wrote, or a new name",
            got=f"{len(held)} bytes of something else",
            fix="name another file; this one was not changed",
        ) from error
    _compare(theirs, mine, path)
    values: dict[str, Any] = {}
    while end < len(held):
        stop = held.find(b"\n", end) + 1
        row = _parsed(held[end : stop or len(held)])
        if row is None:
            if not stop or not held[stop:].strip(b"\0"):
                break  # the last line: cut off by a kill, or by a power failure
            raise FileFormatError(
                f"{path} is damaged at byte {end}",
                expected="whole lines, but for the last one",
                got=repr(held[end : end + 40]),
                fix="delete it and start again, or take another copy",
            )
        if not stop:
            break  # whole by chance, but the next line could not be told from it
        values[json.dumps(row["cell"])] = row["value"]
        end = stop
    return values, end


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        whole = zlib.crc32(f'"cell": {json.dumps(row["cell"])}, "value": {json.dumps(row["value"])}'.encode())
    except (ValueError, KeyError, TypeError):
        return None
    return row if whole == row.get("check") else None


def _compare(theirs: Mapping[str, Any], mine: Mapping[str, Any], path: Path) -> None:
    for key in ("version", "kind"):
        if theirs.get(key) != mine[key]:
            raise MismatchError(
                f"{path} holds the cells of other work: its {key} differs",
                expected=str(mine[key]),
                got=str(theirs.get(key)),
                fix="name another file; this one was not changed",
            )
    ours, held = mine["settings"], theirs.get("settings", {})
    for key in sorted({*ours, *held}):
        if ours.get(key) != held.get(key):
            raise MismatchError(
                f"{path} is stale: its '{key}' differs from this call's",
                expected=str(ours.get(key))[:300],
                got=str(held.get(key))[:300],
                fix="call as for the first start (data that are transformed at random, and functions that keep count, "
                "differ in every call), name another file, or delete this one; it was not changed",
            )
