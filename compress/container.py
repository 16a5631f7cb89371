r"""One file for a quantized network: whole numbers, entropy-coded, and everything else as safetensors.

The file, version 1; all numbers little-endian:

====== ============= ===========================================================
offset type          meaning
====== ============= ===========================================================
0      8 bytes       ``MAGIC``
8      uint16        version
10     uint16        0
12     uint32        bytes of the header in the file
16     uint32        bytes of the header, inflated
20     uint32        CRC-32 of everything else up to the end of the header
24     uint64        bytes of the whole file
32     zlib stream   the header, JSON
\      float section a safetensors file, as it is or as a zlib stream
\      tensors       one after the other: steps of the codebook, then the code
====== ============= ===========================================================

The header is an object: ``tensors``, a list of [name, type, shape, [low, high,
axis], coder, bytes, CRC-32]; ``floats``, [coder, bytes, bytes inflated, CRC-32];
``pruning``, ``quantization``, ``tied``, ``frozen``, ``aliases``. Section follows
section without gaps, and the last ends with the file. Coders:
:mod:`compress.entropy_coding`.

A reader trusts nothing: lengths are held against the size of the file and shapes
against the network before memory is taken, inflating stops at the declared
length, and a decoder at the declared number of weights.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from compress._contexts import LARGEST
from compress._network_state import damaged, other
from compress.codebook import Codebook
from compress.entropy_coding import Coded, decode, encode
from lrp._files import replacing
from lrp.errors import FileFormatError, InputError, LRPError

__all__ = ["MAGIC", "VERSION", "Entry", "Header", "inspect", "is_container", "largest_header", "pack", "read", "write"]

MAGIC = b"\x8bCOMPRS\n"  # no text, and broken by whatever changes the ends of lines
VERSION = 1
_PRELUDE = struct.Struct("<8sHHIIIQ")
_TYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_FLOATS = ("raw", "deflate")
_KINDS = frozenset(  # whatever can be copied
    getattr(torch, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
)
_ROOM, _LARGEST = 2**19, 2**23  # bytes of the header that every network may have; that it may have unasked


@dataclass(frozen=True)
class Entry:
    """A quantized tensor in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: int
    high: int
    axis: int | None
    coder: str
    length: int
    crc: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return _product(self.shape)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return 1 if self.axis is None else self.shape[self.axis]


@dataclass(frozen=True)
class Header:
    """What a file says of itself; prints as a table.

    Attributes
    ----------
    version : int
    entries : tuple of Entry
    floats : tuple
        Coder, bytes in the file, bytes, CRC-32 of the float section.
    meta : dict
        ``pruning``, ``quantization``, ``tied``, ``frozen``, ``aliases``.
    start : int
        Where the float section starts, and bytes before it.
    size : int
        Bytes of the file.
    """

    version: int
    entries: tuple[Entry, ...]
    floats: tuple[str, int, int, int]
    meta: Mapping[str, Any] = field(repr=False)
    start: int
    size: int

    def __str__(self) -> str:
        width = max((len(e.name) for e in self.entries), default=0)
        rows = [f"version {self.version}, {self.size:,} bytes: header {self.start:,}, other tensors {self.floats[1]:,}"]
        for e in self.entries:
            rate = 8 * e.length / max(1, e.size)
            levels = f"{e.low} to {e.high}"
            rows.append(f"{e.name.ljust(width)}  {e.size:>11,}  {levels:>10}  {e.coder:8}  {rate:6.3f} bits per weight")
        return "\n".join(rows)


def largest_header(weights: int) -> int:
    """Bytes that the header of a network with so many weights may have: half a megabyte and a quarter per weight.

    Objects made from JSON take up to thirty times its bytes.
    """
    return _ROOM + weights // 4


# -- writing ------------------------------------------------------------------
def pack(
    quantized: Mapping[str, tuple[Tensor, Codebook]], floats: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> list[bytes]:
    """The file, in pieces.

    Parameters
    ----------
    quantized : dict of str to (Tensor, Codebook)
        Whole numbers and what they count.
    floats : dict of str to Tensor
        All others, of any type.
    meta : dict
        JSON-able: ``pruning``, ``quantization``, ``tied``, ``frozen``, ``aliases``.

    Raises
    ------
    InputError
        If the codebook is beyond this format, or ``meta`` is not JSON or too long.

    Examples
    --------
    >>> import torch
    >>> from compress import container
    >>> from compress.codebook import codebook_of
    >>> w = torch.randn(8, 4, 3, 3)
    >>> book = codebook_of(w, 4)
    >>> pieces = container.pack({"w": (book.nearest(w), book)}, {"b": torch.ones(8)}, {})
    >>> pieces[0][:8] == container.MAGIC, sum(map(len, pieces)) < w.numel() * 2
    (True, True)
    """
    from safetensors.torch import save as serialise

    plain = serialise({name: t.detach().cpu().contiguous() for name, t in floats.items()})
    small = zlib.compress(plain, 9)
    section, coder = (small, "deflate") if len(small) < len(plain) else (plain, "raw")
    entries, sections = [], [section]
    for name, (k, book) in quantized.items():
        kind = str(book.step.dtype).removeprefix("torch.")
        if kind not in _TYPES:
            raise InputError(
                f"the codebook of '{name}' can not be stored",
                expected=f"steps of type {', '.join(_TYPES)}",
                got=kind,
                fix="quantize the network in one of these types",
            )
        coded = encode(k.detach().cpu().numpy(), book.low, book.high)
        payload = _raw(book.step) + coded.data
        about = [book.low, book.high, book.axis]
        entries.append([name, kind, list(k.shape), about, coded.coder, len(payload), zlib.crc32(payload)])
        sections.append(payload)
    header = {"tensors": entries, "floats": [coder, len(section), len(plain), zlib.crc32(section)], **meta}
    weights = sum(k.numel() for k, _ in quantized.values()) + sum(t.numel() for t in floats.values())
    text = _json(header, largest_header(weights))
    packed = zlib.compress(text, 9)
    size = _PRELUDE.size + len(packed) + sum(map(len, sections))
    first = _PRELUDE.pack(MAGIC, VERSION, 0, len(packed), len(text), 0, size)
    crc = zlib.crc32(packed, zlib.crc32(first))
    return [_PRELUDE.pack(MAGIC, VERSION, 0, len(packed), len(text), crc, size), packed, *sections]


def _json(header: Mapping[str, Any], largest: int) -> bytes:
    try:
        text = json.dumps(header, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            "the plans can not be stored",
            expected="settings that are JSON",
            got=f"{type(error).__name__}: {error}",
            fix="keep to numbers, texts, lists and dicts of these in the settings",
        ) from error
    if len(text) > largest:
        raise InputError(
            "the plans are too long to be stored",
            expected=f"{largest:,} bytes of JSON for a network of this size",
            got=f"{len(text):,}",
            fix="keep long lists out of the settings",
        )
    return text


def write(path: str | os.PathLike[str], pieces: list[bytes]) -> None:
    """Write a file, whole or not at all.

    Raises
    ------
    DataError
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(pieces)


# -- the header -----------------------------------------------------------------
def is_container(path: str | os.PathLike[str]) -> bool:
    """Whether the file starts as this format does.

    Raises
    ------
    FileNotFoundError
    """
    place = Path(path)
    place.stat()
    if not place.is_file():
        return False
    with place.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def inspect(path: str | os.PathLike[str], largest: int | None = None) -> Header:
    """Read and check the header; nothing is decoded.

    Parameters
    ----------
    path : path
    largest : int, optional
        Bytes that the header may have, inflated; see :func:`largest_header`.
        Default: half a megabyte and sixteen times the file, 8 MB at most (of
        which the objects take up to a quarter of a gigabyte).

    Raises
    ------
    FileFormatError
        If the file is of another kind or version, cut off, too long or damaged.
    FileNotFoundError
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        first = file.read(_PRELUDE.size)
        if len(first) < _PRELUDE.size or not first.startswith(MAGIC):
            raise damaged(path, f"{size:,} bytes that do not start as such a file does")
        _, version, zero, packed, inflated, crc, declared = _PRELUDE.unpack(first)
        if version != VERSION:
            raise FileFormatError(
                f"{path} was written by another version of the package",
                expected=f"a file of version {VERSION}",
                got=f"version {version}",
                fix="read it with that one",
            )
        if declared != size:
            what = "a file that was cut off" if size < declared else "bytes behind the end"
            raise damaged(path, f"{size:,} bytes where the file says {declared:,}: {what}")
        largest = min(_ROOM + 16 * size, _LARGEST) if largest is None else largest
        if packed > size - _PRELUDE.size or inflated > largest or zero:
            raise damaged(path, f"a header of {packed:,} bytes, {inflated:,} inflated, in a file of {size:,}")
        stored = file.read(packed)
    zeroed = _PRELUDE.pack(MAGIC, version, zero, packed, inflated, 0, declared)
    if len(stored) != packed or zlib.crc32(stored, zlib.crc32(zeroed)) != crc:
        raise damaged(path, "a header that does not fit its checksum")
    try:
        header = _parsed(json.loads(_inflate(stored, inflated)), version, _PRELUDE.size + packed, size)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, f"a header that makes no sense ({type(error).__name__}: {error})") from error
    return header


def _inflate(stored: bytes, size: int) -> bytes:
    engine = zlib.decompressobj()
    try:
        out = engine.decompress(stored, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(out) != size or not engine.eof or engine.unused_data:
        raise ValueError("a deflated section of another length")
    return out


def _parsed(stored: Any, version: int, start: int, size: int) -> Header:
    entries = tuple(_entry(row) for row in stored["tensors"])
    coder, length, inflated, crc = stored["floats"]
    for n in (length, inflated, crc):
        _whole(n)
    if coder not in _FLOATS or (coder == "raw" and length != inflated):
        raise ValueError(f"a float section of coder {coder!r}")
    if start + length + sum(e.length for e in entries) != size:
        raise ValueError("sections that are not as long as the file")
    if len({e.name for e in entries}) != len(entries):
        raise ValueError("a name that comes twice")
    meta = {key: stored[key] for key in ("pruning", "quantization", "tied", "frozen", "aliases") if key in stored}
    return Header(version, entries, (coder, length, inflated, crc), meta, start, size)


def _entry(row: Any) -> Entry:
    name, dtype, shape, (low, high, axis), coder, length, crc = row
    if not (isinstance(name, str) and isinstance(coder, str) and isinstance(shape, list)):
        raise TypeError("a tensor without a name, shape or coder")
    name.encode()  # half a character could not be printed
    for n in (*shape, length, crc, high, *(() if axis is None else (axis,))):
        _whole(n)
    if type(low) is not int or dtype not in _TYPES or not -LARGEST <= low <= 0 <= high <= LARGEST or low == high:
        raise ValueError(f"a codebook of {dtype!r} from {low} to {high}")
    if len(shape) > 16 or (axis is not None and axis >= len(shape)):
        raise ValueError(f"a shape {shape}, axis {axis}")
    entry = Entry(name, dtype, tuple(shape), low, high, axis, coder, length, crc)
    if length < entry.steps * _TYPES[dtype]:
        raise ValueError(f"a section of {length} bytes for the steps of '{name}'")
    return entry


def _whole(n: Any) -> None:
    if type(n) is not int or not 0 <= n < 2**63:
        raise ValueError(f"{n!r} where a size belongs")


# -- the contents -----------------------------------------------------------------
def read(
    path: str | os.PathLike[str],
    header: Header,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    slow: bool | None = None,
) -> tuple[dict[str, Tensor], dict[str, Codebook]]:
    """Tensors and codebooks.

    Parameters
    ----------
    path : path
    header : Header
        Of this file, from :func:`inspect`.
    shapes : dict of str to tuple of int
        Of the network that the file is for: what is of another shape is not decoded.
    slow : bool, optional
        Decode in plain Python, without constriction. Default: where it is missing.

    Returns
    -------
    tensors : dict of str to Tensor
        On the CPU: index times step, in the step's type, and the others as they were.
    codebooks : dict of str to Codebook

    Raises
    ------
    FileFormatError, MismatchError

    Notes
    -----
    O(N): eleven million weights take about a second, six times as long if slow.
    Beside the result, about two bytes per weight of the largest tensor are needed,
    or twice the float section if that is more.
    """
    for e in header.entries:
        if e.name not in shapes or tuple(shapes[e.name]) != e.shape:
            got = f"{tuple(shapes[e.name])}" if e.name in shapes else "none of this name"
            raise other(path, f"'{e.name}' of shape {e.shape}", got)
    tensors: dict[str, Tensor] = {}
    books: dict[str, Codebook] = {}
    quantized = {e.name for e in header.entries}
    with Path(path).open("rb") as file:
        file.seek(header.start)
        tensors.update(_floats(path, file, header, {n: s for n, s in shapes.items() if n not in quantized}))
        if twice := quantized.intersection(tensors):
            raise damaged(path, f"'{min(twice)}' twice")
        for e in header.entries:
            try:
                tensors[e.name], books[e.name] = _weights(e, _section(file, e.length, e.crc), slow)
            except (LRPError, ValueError) as error:
                raise damaged(path, f"the section of '{e.name}': {error}") from error
    return tensors, books


def _section(file: BinaryIO, length: int, crc: int) -> bytes:
    found = file.read(length)  # no longer than the file, which was checked
    if len(found) != length or zlib.crc32(found) != crc:
        raise ValueError("it does not fit its checksum")
    return found


def _floats(
    path: str | os.PathLike[str], file: BinaryIO, header: Header, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    coder, length, inflated, crc = header.floats
    # sixteen bytes at most for a number, some for its name in the section's own header
    largest = sum(16 * _product(s) + 256 + 8 * len(name) for name, s in shapes.items()) + 1024
    if inflated > largest:
        raise other(path, f"{inflated:,} bytes of tensors that are not quantized", f"room for {largest:,}")
    try:
        raw = _section(file, length, crc)
        found: dict[str, Tensor] = deserialise(_inflate(raw, inflated) if coder == "deflate" else raw)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise damaged(path, f"the float section: {type(error).__name__}: {error}") from error
    for name, t in found.items():
        if t.dtype not in _KINDS:
            raise damaged(path, f"the float section: '{name}' of {t.dtype}")
    return found


def _weights(e: Entry, payload: bytes, slow: bool | None) -> tuple[Tensor, Codebook]:
    dtype: torch.dtype = getattr(torch, e.dtype)
    cut = e.steps * _TYPES[e.dtype]
    step = torch.frombuffer(bytearray(payload[:cut]), dtype=dtype) if cut else torch.zeros(0, dtype=dtype)
    book = Codebook(step[0].clone() if e.axis is None else step, e.low, e.high, e.axis)
    code = Coded(e.coder, memoryview(payload)[cut:])  # not copied
    k = torch.from_numpy(decode(code, e.shape, e.low, e.high, slow=slow))
    del payload, code  # before the weights need room
    values = k.to(dtype)
    return values.mul_(book.spread(values)), book


def _raw(t: Tensor) -> bytes:
    """Bytes of a tensor, little-endian."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    return np.asarray(flat.view(torch.uint8)).tobytes() if flat.numel() else b""


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
