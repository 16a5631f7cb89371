"""A folder that holds how far a pruning run is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress._states import write_state
from lrp._files import read_tensors
from lrp.errors import DataError, FileFormatError, MismatchError

__all__ = ["Checkpoint", "Folder", "lock_file"]

KIND = "compress.prune"


@dataclass
class Checkpoint:
    """Tensors by part ("model", "scores", "before", ...), and JSON-able values."""

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


class Folder:
    """Where a run keeps its state.

    ``finished.state`` is what the last finished step left; ``step.state`` what
    the step after it has cut; ``tuning-K.state`` its training. Each file is
    whole or not there, and stands until what follows from it is written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def finished(self) -> Path:
        return self.path / "finished.state"

    @property
    def cut(self) -> Path:
        return self.path / "step.state"

    def tuning(self, step: int) -> Path:
        return self.path / f"tuning-{step}.state"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes out of it; a lock dies with its process.

        Raises
        ------
        DataError
            If another process is at work there, or it can not be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise DataError(
                f"{self.path} can not be used for resume=",
                expected="a folder that may be written to, or one that can be made",
                got=f"{type(error).__name__}: {error}",
                fix="name another folder",
            ) from error
        try:
            try:
                lock_file(handle)
            except OSError as error:
                raise DataError(
                    f"another process is at work in {self.path}",
                    expected="one process per folder",
                    got="a lock that is held",
                    fix="wait for it, end it, or name another folder",
                ) from error
            yield
        finally:
            os.close(handle)

    def write(self, path: Path, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
        """Raises DataError if the file can not be written; what was there stays."""
        tensors = {f"{part}:{name}": t for part, held in checkpoint.tensors.items() for name, t in held.items()}
        write_state(path, KIND, tensors, {"step": checkpoint.step, "settings": settings, "values": checkpoint.values})

    def read(self, path: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
        """The state in a file; None if there is none.

        Raises
        ------
        FileFormatError
            If it is damaged.
        MismatchError
            If it is of a run with other settings.
        """
        if not path.exists():
            return None
        tensors, meta = read_tensors(path, KIND)
        try:
            step, theirs, values = int(meta["step"]), dict(meta["settings"]), dict(meta["values"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"{path} holds no state of compress.prune",
                expected="a file that resume= wrote",
                got=f"{type(error).__name__}: {error}",
                fix="name another folder",
            ) from error
        for key, value in settings.items():
            if theirs.get(key) != value:
                raise MismatchError(
                    f"{path} is of another run: {key}",
                    expected=str(theirs.get(key))[:300],
                    got=str(value)[:300],
                    fix="call as for the first start, or name another folder; nothing was changed",
                )
        parts: dict[str, dict[str, Tensor]] = {}
        for key, t in tensors.items():
            part, _, name = key.partition(":")
            parts.setdefault(part, {})[name] = t
        return Checkpoint(step, parts, values)

    def clear(self, finished: int) -> None:
        """Remove what steps that are finished have left on their way."""
        parts = self.path.glob(".*.state.part")  # a process was killed as it wrote
        for path in (self.cut, *parts, *self.path.glob("tuning-*.state")):
            number = path.stem.partition("tuning-")[2]
            if not number or (number.isdigit() and int(number) <= finished):
                with contextlib.suppress(OSError):  # it is ignored wherever it can not be removed
                    path.unlink(missing_ok=True)


def lock_file(handle: int) -> None:
    """Hold a file of this process alone; raises OSError if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]  # stubs of Windows only
        return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
