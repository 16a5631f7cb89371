"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrp.errors import DataError

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if the block ends without error.

    Raises ``DataError`` if the folder is missing.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise DataError(
            f"there is no folder {target.parent}",
            expected="an existing folder",
            got=str(target),
            fix="make the folder first",
        )
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
