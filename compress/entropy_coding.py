"""Whole numbers as few bytes: the smallest of several coders for every tensor."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import _constriction
from compress._contexts import LARGEST, LONGEST, Levels, first_class, levels_type, settings_of, walk
from compress._slow_decoder import SlowDecoder
from lrp.errors import FileFormatError, InputError

__all__ = ["CODERS", "Coded", "decode", "encode"]

CODERS = ("constant", "packed", "deflate", "adaptive")
_SAMPLE = 2**16  # symbols on which deflate shows what it can do


@dataclass(frozen=True)
class Coded:
    """A coded tensor.

    Attributes
    ----------
    coder : str
        One of ``CODERS``.
    data : bytes or memoryview
    """

    coder: str
    data: bytes | memoryview


def encode(k: NDArray[Any], low: int, high: int, *, coder: str | None = None) -> Coded:
    """Code whole numbers.

    Parameters
    ----------
    k : array of integers, any shape
    low, high : int
        ``low <= k <= high``, ``low <= 0 <= high``, ``low < high``; magnitudes up
        to 255.
    coder : str, optional
        ``"constant"``: one value; ``"packed"``: a fixed number of bits;
        ``"deflate"``: these, deflated; ``"adaptive"``: a range coder under a
        model of which weights are alike. Default: the smallest.

    Returns
    -------
    Coded

    Raises
    ------
    InputError
        If the numbers are not within their bounds, or the coder can't code them.
    MissingDependencyError
        If constriction is missing and ``"adaptive"`` is called for.

    Notes
    -----
    O(N): up to three walks of the adaptive model, about 0.1 s each per million.

    Examples
    --------
    >>> import numpy as np
    >>> from compress.entropy_coding import decode, encode
    >>> k = np.random.default_rng(0).geometric(0.7, (64, 32, 3, 3)).clip(max=8) - 1
    >>> coded = encode(k, 0, 7)
    >>> coded.coder, len(coded.data) < 0.5 * k.size * 3 / 8
    ('adaptive', True)
    >>> bool((decode(coded, k.shape, 0, 7) == k).all())
    True
    """
    k = _checked(k, low, high)
    if coder is not None:
        if coder not in CODERS:
            raise InputError(
                "unknown coder", expected=f"one of {', '.join(CODERS)}", got=repr(coder), fix="choose one of them"
            )
        return Coded(coder, _BY_NAME[coder](k, low, high))
    if _is_constant(k):
        return Coded("constant", _constant(k, low, high))
    packed = Coded("packed", _packed(k, low, high))
    if k.size > LONGEST:
        return packed
    found = Coded("adaptive", _adaptive(k, low, high))
    if k.size <= _SAMPLE or _deflates(k, low, len(found.data) / k.size):
        return min(found, packed, Coded("deflate", _deflated(k, low, high)), key=lambda c: len(c.data))
    return min(found, packed, key=lambda c: len(c.data))


def decode(coded: Coded, shape: tuple[int, ...], low: int, high: int, *, slow: bool | None = None) -> Levels:
    """The whole numbers behind a code.

    Parameters
    ----------
    coded : Coded
        From anywhere: it is checked.
    shape, low, high
        As they were encoded.
    slow : bool, optional
        Decode in plain Python, without constriction. Default: where it is missing.

    Returns
    -------
    int8 or int16 array of ``shape``, within the bounds

    Raises
    ------
    FileFormatError
        If no encoder wrote this.

    Notes
    -----
    O(N); never more than some 3 bytes per weight and a few megabytes, whatever the code.
    """
    size = 1
    for n in shape:
        size *= n
    try:
        if not (-LARGEST <= low <= 0 <= high <= LARGEST and low < high):
            raise ValueError("bounds that no codebook has")
        if coded.coder == "constant":
            return _from_constant(coded.data, shape, low, high)
        if coded.coder == "adaptive":
            return _from_adaptive(coded.data, shape, size, low, high, slow)
        if coded.coder not in CODERS:
            raise ValueError(f"a coder '{coded.coder}'")
        flat = _from_packed(coded.data, size, low, high, deflated=coded.coder == "deflate")
        return flat.reshape(shape)
    except ValueError as error:
        raise FileFormatError(
            "coded weights can not be decoded",
            expected=f"{size:,} whole numbers from {low} to {high}, as one of {', '.join(CODERS)} codes them",
            got=str(error),
            fix="take another copy of the file",
        ) from error


def _checked(k: NDArray[Any], low: int, high: int) -> Levels:
    k = np.asarray(k)
    ok = k.dtype.kind in "iu" and -LARGEST <= low <= 0 <= high <= LARGEST and low < high
    if not ok or (k.size and not low <= int(k.min()) <= int(k.max()) <= high):
        raise InputError(
            "these are no whole numbers between their bounds",
            expected=f"integers from low to high, with -{LARGEST} <= low <= 0 <= high <= {LARGEST} and low < high",
            got=f"{k.dtype} from {k.min() if k.size else '-'} to {k.max() if k.size else '-'}, bounds {low} and {high}",
            fix="pass the indices and the bounds of a codebook",
        )
    return np.ascontiguousarray(k, dtype=levels_type(low, high))


# -- one value ------------------------------------------------------------------
def _is_constant(k: Levels) -> bool:
    return not k.size or bool((k == k.flat[0]).all())


def _constant(k: Levels, low: int, high: int) -> bytes:
    if not _is_constant(k):
        raise InputError(
            "this tensor is not constant",
            expected="one value",
            got=f"{len(np.unique(k))} values",
            fix="leave the choice of the coder to encode",
        )
    return int(k.flat[0]).to_bytes(2, "little", signed=True) if k.size else bytes(2)


def _from_constant(data: bytes | memoryview, shape: tuple[int, ...], low: int, high: int) -> Levels:
    value = int.from_bytes(data, "little", signed=True)
    if len(data) != 2 or not low <= value <= high:
        raise ValueError(f"{len(data)} bytes, the value {value}")
    return np.full(shape, value, dtype=levels_type(low, high))


# -- a fixed number of bits -----------------------------------------------------
def _bits(low: int, high: int) -> int:
    return (high - low).bit_length()


def _packed(k: Levels, low: int, high: int) -> bytes:
    """Most significant bit first, a table of bits column by column: its rows are the weights."""
    bits = _bits(low, high)
    out = []
    for i in range(0, k.size, _SAMPLE):
        part = (k.reshape(-1)[i : i + _SAMPLE].astype(np.int16) - low).astype(np.uint16)
        table = (part[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint16)).astype(np.uint8) & 1
        out.append(np.packbits(table).tobytes())  # a whole number of bytes but for the last part
    return b"".join(out)


def _from_packed(data: bytes | memoryview, size: int, low: int, high: int, *, deflated: bool) -> Levels:
    bits = _bits(low, high)
    expected = -(-size * bits // 8)
    if deflated:
        engine = zlib.decompressobj()
        try:
            data = engine.decompress(data, expected + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if not engine.eof or engine.unused_data:
            raise ValueError("a deflated stream of another length")
    if len(data) != expected:
        raise ValueError(f"{len(data):,} bytes where {expected:,} are right")
    raw = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(size, dtype=levels_type(low, high))
    for i in range(0, size, _SAMPLE):
        n = min(_SAMPLE, size - i)
        table = np.unpackbits(raw[i * bits // 8 : -(-(i + n) * bits // 8)], count=n * bits).reshape(n, bits)
        part = np.full(n, low, dtype=np.int16)
        for j in range(bits):
            part += table[:, j].astype(np.int16) << (bits - 1 - j)
        if int(part.max()) > high:
            raise ValueError(f"the value {part.max()}")
        out[i : i + n] = part
    return out


def _deflated(k: Levels, low: int, high: int) -> bytes:
    return zlib.compress(_packed(k, low, high), 9)


def _deflates(k: Levels, low: int, rate: float) -> bool:
    """Whether deflate may beat so many bytes per symbol: on a sample from the middle, twice as long as its window."""
    start = (k.size - _SAMPLE) // 2
    sample = (k.reshape(-1)[start : start + _SAMPLE].astype(np.int16) - low).astype(np.uint16)
    return len(zlib.compress(sample.tobytes(), 9)) < rate * _SAMPLE


# -- an adaptive model ----------------------------------------------------------
def _adaptive(k: Levels, low: int, high: int) -> bytes:
    if not k.size:
        return b""
    first = first_class(int(np.abs(k).sum(dtype=np.int64)), k.size)  # -128 does not occur in int8

    def coded(preset: int) -> bytes:
        encoder, settings = _constriction.Encoder(), settings_of(preset, first)
        walk(encoder, k.shape, low, high, settings, k)
        return bytes([settings]) + encoder.finish()

    near, far = coded(0), coded(1)  # does a weight resemble its kernel?
    return min(near, coded(3), key=len) if len(near) <= len(far) else min(far, coded(2), key=len)


def _from_adaptive(
    data: bytes | memoryview, shape: tuple[int, ...], size: int, low: int, high: int, slow: bool | None
) -> Levels:
    if not size:
        if data:
            raise ValueError("bytes where there are no weights")
        return np.zeros(shape, dtype=levels_type(low, high))
    if not data:
        raise ValueError("no bytes")
    if slow is None:
        slow = not _constriction.available()
    decoder: Any = SlowDecoder(data[1:]) if slow else _constriction.Decoder(data[1:])
    out = walk(decoder, shape, low, high, data[0])
    decoder.finish()
    return out


_BY_NAME = {"constant": _constant, "packed": _packed, "deflate": _deflated, "adaptive": _adaptive}
