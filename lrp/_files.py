"""Files that are either whole or not there: tensors with a JSON header, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrp.errors import DataError, FileFormatError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["digest", "read_tensors", "replacing", "unwritable", "write_tensors"]


@contextmanager
def replacing(
    path: str | os.PathLike[str], *, alone: bool = False, fix: str = "make space or name another place"
) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if the block ends without error.

    ``alone``: one process at a time writes there, so the temporary file has a
    fixed name, and one that a killed process left is written over.

    Raises ``DataError`` if the folder is missing or the file can not be written;
    what was there stays.
    """
    from safetensors import SafetensorError

    target = Path(path)
    if target.is_dir():
        raise unwritable(target, f"{target} is a folder", "name a file")
    if not target.parent.is_dir():
        raise DataError(
            f"there is no folder {target.parent}",
            expected="an existing folder",
            got=str(target),
            fix="make the folder first",
        )
    try:
        if alone:
            temporary = target.with_name(f".{target.name}.part")
        else:
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
    except (OSError, SafetensorError) as error:
        raise unwritable(target, error, fix) from error


def unwritable(path: str | os.PathLike[str] | None, why: Exception | str, fix: str) -> DataError:
    """The error that tells of a file that can not be written."""
    return DataError(
        f"{path} can not be written",
        expected="a file name in an existing folder that may be written to, on a disk with space",
        got=why if isinstance(why, str) else f"{type(why).__name__}: {why}",
        fix=fix,
    )


def digest(tensors: dict[str, Tensor], text: str = "") -> str:
    """SHA-256 of a text and of names, types, shapes and values, in hexadecimal."""
    import torch

    out = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().resolve_conj().resolve_neg()
        out.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        # bytes, since numpy has no bfloat16
        out.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return out.hexdigest()


def write_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    *,
    alone: bool = False,
    fix: str = "make space or name another place",
) -> None:
    """Write tensors and what is known of them as one safetensors file; see :func:`replacing`."""
    from safetensors.torch import save_file

    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    order, about = json.dumps(list(plain)), json.dumps(meta)  # safetensors sorts by its own lights
    checked = digest(plain, kind + about + order)
    header = {"format": kind, "version": "1", "meta": about, "order": order, "digest": checked}
    with replacing(path, alone=alone, fix=fix) as temporary:
        save_file(plain, temporary, header)


_WHAT_TO_DO = {
    "lrp.collect": "this is the state of a run: call lrp.collect(..., resume=path) to get its sum",
    "lrp.RelevanceSum": "this is a saved sum: read it with lrp.RelevanceSum.load, and name another file for resume=",
}


def _damaged(path: Path, why: str, kind: str) -> FileFormatError:
    return FileFormatError(
        f"{path} can not be read",
        expected=f"a whole file of the kind '{kind}', version 1",
        got=why,
        fix="take another copy, or delete it and start again",
    )


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta data of a file written by :func:`write_tensors`.

    Raises
    ------
    FileFormatError
        If it is damaged (its digest is checked), of another kind or version.
    FileNotFoundError
    """
    from safetensors import SafetensorError, safe_open

    place = Path(path)
    place.stat()  # so that a missing file is told from a damaged one
    try:
        with safe_open(place, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(place, str(error), kind) from error
    if header.get("format") != kind or header.get("version") != "1":
        found = header.get("format", "none")
        fix = (
            _WHAT_TO_DO.get(found, "name a file that this package wrote") if found != kind else "read it with that one"
        )
        raise FileFormatError(
            f"{path} is of another kind" if found != kind else f"{path} was written by another version of the package",
            expected=f"a file of the kind '{kind}', version 1",
            got=f"'{found}', version {header.get('version', 'none')}",
            fix=fix,
        )
    try:
        meta = json.loads(header["meta"])
        tensors = {name: tensors[name] for name in json.loads(header["order"])}
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(place, "a header without meta data", kind) from error
    if not isinstance(meta, dict) or digest(tensors, kind + header["meta"] + header["order"]) != header.get("digest"):
        raise _damaged(place, "values that do not fit the digest in its header", kind)
    return tensors, meta
