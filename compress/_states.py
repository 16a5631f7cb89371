"""States of long work on disk: whole or not there, and clear about a disk that is full."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from lrp._files import write_tensors

__all__ = ["write_state"]


def write_state(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and what is known of them in place of what was there, which stays if this fails.

    Raises
    ------
    DataError
        If the file can not be written.
    """
    apart = {name: t.detach().clone() for name, t in tensors.items()}  # tied weights share memory, files can not
    write_tensors(
        path,
        kind,
        apart,
        meta,
        alone=True,
        fix="make space or name another folder, and start again: it goes on after what is written",
    )
