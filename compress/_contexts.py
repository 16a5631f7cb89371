"""An adaptive model of a tensor's whole numbers: which weights are alike, learnt on the way.

Encoder and decoder run the same walk and see the same past, so no table is
stored. Everything is whole numbers: every platform gets the same tables.

*Order.* A tensor (O, I, ...) with a kernel of K entries goes kernel entry by
kernel entry; entry p of all filters is a matrix (O, I). Another tensor is a
matrix that goes in K = 8 combs of columns (every eighth, from p). Such a matrix
goes in rectangles, either some whole rows or a part of one, of about a twelfth
of what has been seen: small at first, so that the tables learn fast, large later,
for speed. Within a rectangle the past is that of its start.

*Magnitudes.* A weight's scale is estimated as the mean magnitude of the tensor
so far, corrected by that of its row (filter), of its column (input channel) and
of its own kernel, where near entries weigh more; logarithms, a weighted sum, cut
into classes three to the octave. Every class counts the magnitudes that came,
starts from a geometric distribution of its mean, and borrows from the classes
beside it. *Signs* have nine classes by the signed sum over the own kernel.

The idea of coding weights by adaptive contexts is that of DeepCABAC (S. Wiedemann
et al., 2019, arXiv 1907.11900), which walks weight by weight; the contexts here
are chosen so that thousands of weights are coded in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LARGEST",
    "LONGEST",
    "PRECISION",
    "PRESETS",
    "Coder",
    "Levels",
    "first_class",
    "levels_type",
    "settings_of",
    "walk",
]

Ints = NDArray[np.int64]
Symbols = NDArray[np.int32]
Levels = NDArray[np.signedinteger[Any]]  # int8 where magnitudes fit, or int16

PRECISION = 24  # bits of a frequency
LARGEST = 255  # magnitude
LONGEST = 2**31  # weights: what counts in 64 bits
CLASSES = 42
# weights, in sixteenths, of row, column and kernel in the logarithm of the scale; whether signs have contexts
PRESETS = ((8, 8, 11, True), (8, 8, 0, False), (0, 0, 0, False), (4, 4, 14, True))

_FRACTION = 12  # bits behind the point of a mean magnitude
_SMALLEST = 41  # 0.01, added to every mean
_LOWEST = 64 * (_FRACTION - 7)  # class 0 starts at a mean of 2^-7; logarithms are in 64ths of an octave
_ROOTS = (73562, 92682, 116772)  # 2^(1/6), 2^(1/2), 2^(5/6), 16 bits behind the point: the middle of a class
_PRIOR, _COUNT, _BORROWED = 512, 64, 16  # weight of all of the prior, of a magnitude seen, of one seen next door
_FIRST, _ROW, _NEAR = 20, 8, 16  # how many weights, or sixteenths of one, the estimates start with
_KEEP, _KEEP_SIGNED = 11, 10  # sixteenths of the kernel's sums that last to its next entry
_SIGNS, _SIGN_PRIOR, _SIGN_OFFSET = 9, 4, 1229  # 0.3
_RECTANGLE, _SHARE, _MOST = 32, 12, 2**14


class Coder(Protocol):
    """What a walk talks to: an encoder, which is told symbols, or a decoder, which tells them."""

    def code(self, frequencies: Ints, count: int, known: Symbols | None) -> Symbols:
        """``count`` symbols under one table: whole numbers >= 1 that add up to ``2^PRECISION``."""
        ...


def settings_of(preset: int, first: int) -> int:
    """The byte before the stream: the preset and the class that the mean magnitude starts from."""
    return preset << 6 | first


def first_class(magnitudes: int, count: int) -> int:
    """The class of the mean magnitude of a tensor with this sum over this many weights."""
    mean = np.array([(magnitudes << _FRACTION) // max(1, count) + _SMALLEST], dtype=np.int64)
    return int(np.clip(((_log2(mean)[0] - _LOWEST) * 3) >> 6, 0, CLASSES - 1))


def levels_type(low: int, high: int) -> type[np.signedinteger[Any]]:
    """The smallest type for whole numbers up to these magnitudes."""
    return np.int8 if max(-low, high) <= 127 else np.int16


def walk(
    coder: Coder, shape: tuple[int, ...], low: int, high: int, settings: int, known: Levels | None = None
) -> Levels:
    """Code a tensor of whole numbers from ``low`` to ``high``.

    Parameters
    ----------
    coder : Coder
    shape : tuple of int
        At least one entry.
    low, high : int
        ``low <= 0 <= high``, ``low < high``, magnitudes up to ``LARGEST``.
    settings : int
        0 to 255; see :func:`settings_of`.
    known : array of ``shape``, optional
        For an encoder.

    Returns
    -------
    array of ``shape``
        ``known``, or what the decoder found: always within ``low`` and ``high``.

    Notes
    -----
    O(N) in time; beside the result (a byte per weight, or two where magnitudes need
    them), N / 2 bytes at most and a few megabytes.

    Raises
    ------
    ValueError
        If the settings are none, or the tensor has more than ``LONGEST`` entries.
    """
    rows, columns, kernel, combs = _matrix(shape)
    if rows * columns * (1 if combs else kernel) > LONGEST:
        raise ValueError(f"more than {LONGEST:,} weights")
    model = _Model(rows, -(-columns // kernel) if combs else columns, low, high, settings)
    out = np.zeros(rows * columns * (1 if combs else kernel), dtype=levels_type(low, high))

    def entries(flat: Levels, p: int) -> Levels:
        if combs:
            return flat.reshape(rows, columns)[:, p::kernel]
        return flat.reshape(rows, columns, kernel)[:, :, p]

    for p in range(kernel):
        place = entries(out, p)
        told = None if known is None else entries(known.reshape(-1), p)
        for part in model.rectangles(*place.shape):
            place[part] = model.code(coder, part, None if told is None else told[part])
        model.next_entry()
    return out.reshape(shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int, int, bool]:
    """Rows, columns, entries of the kernel, and whether these are combs of the columns."""
    size = int(np.prod(shape, dtype=object)) if shape else 1
    kernel = int(np.prod(shape[2:], dtype=object)) if len(shape) > 2 else 1
    if 1 < kernel <= shape[0] * shape[1]:
        return shape[0], shape[1], kernel, False
    rows = shape[0] * shape[1] if kernel > 1 else shape[0] if shape else 1
    columns = size // rows
    if columns == 1:
        rows, columns = 1, size
    return rows, columns, min(8, columns), True


class _Model:
    """What is known of a tensor so far."""

    def __init__(self, rows: int, columns: int, low: int, high: int, settings: int) -> None:
        preset, first = settings >> 6, settings & 63
        if preset >= len(PRESETS) or first >= CLASSES:
            raise ValueError(f"settings {settings} that no encoder writes")
        *self.weights, self.signed = PRESETS[preset]
        self.low, self.high, self.largest = low, high, max(high, -low)
        self.row_sum, self.row_count = np.zeros((2, rows), dtype=np.int64)
        self.column_sum, self.column_count = np.zeros((2, columns), dtype=np.int64)
        # sums over the own kernel, in sixteenths; at most 16 * 255 * 16 / 5
        self.near: NDArray[np.int16] = np.zeros((rows, columns), dtype=np.int16)
        self.near_signed: NDArray[np.int16] = np.zeros((rows, columns), dtype=np.int16)
        self.near_count = self.total = self.seen = 0
        self.start = _middle(first) >> (16 - _FRACTION)
        self.counts = np.zeros((CLASSES + 2, self.largest + 1), dtype=np.int64)  # an empty class at either end
        self.sign_counts = np.full((_SIGNS, 2), _SIGN_PRIOR, dtype=np.int64)
        self.prior = _prior(self.largest)

    def rectangles(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        row = 0
        while row < rows:
            column = 0
            while column < columns:
                size = min(_MOST, max(_RECTANGLE, self.seen // _SHARE))
                if not column and columns <= size:
                    last = min(rows, row + size // columns)
                    yield slice(row, last), slice(0, columns)
                    row, column = last - 1, columns
                else:
                    stop = columns if 2 * (columns - column) <= 3 * size else column + size
                    yield slice(row, row + 1), slice(column, stop)
                    column = stop
            row += 1

    def code(self, coder: Coder, part: tuple[slice, slice], known: Levels | None) -> Levels:
        near, near_signed = self.near[part], self.near_signed[part]
        mean = ((self.total << _FRACTION) + _FIRST * self.start) // (self.seen + _FIRST)
        told: Symbols | None = None if known is None else np.abs(known.reshape(-1).astype(np.int32))
        m = self._magnitudes(coder, self._classes(part, mean), told).reshape(near.shape)
        q = self._sign(coder, m, near_signed, mean, known)
        (rows, columns), (height, width) = part, near.shape
        self.row_sum[rows] += m.sum(1)
        self.row_count[rows] += width
        self.column_sum[columns] += m.sum(0)
        self.column_count[columns] += height
        self.total += int(m.sum())
        self.seen += m.size
        near += (m << 4).astype(np.int16)
        near_signed += (q << 4).astype(np.int16)
        return q.astype(levels_type(self.low, self.high))

    def next_entry(self) -> None:
        self.near_count = ((self.near_count * _KEEP) >> 4) + 16
        for sums, keep in ((self.near, _KEEP), (self.near_signed, _KEEP_SIGNED)):
            for i in range(0, len(sums), max(1, _MOST // sums.shape[1])):  # in parts, for memory
                rows = sums[i : i + max(1, _MOST // sums.shape[1])]
                rows[...] = (rows.astype(np.int32) * keep) >> 4

    def _classes(self, part: tuple[slice, slice], mean: int) -> NDArray[np.uint8]:
        rows, columns = part
        near = self.near[part]
        kernel = np.arange(int(near.max()) + 1, dtype=np.int64)
        parts = (
            np.array([mean], dtype=np.int64),
            ((self.row_sum[rows] << _FRACTION) + _ROW * mean) // (self.row_count[rows] + _ROW),
            ((self.column_sum[columns] << _FRACTION) + _ROW * mean) // (self.column_count[columns] + _ROW),
            ((kernel << _FRACTION) + _NEAR * mean) // (self.near_count + _NEAR),
        )
        logs = _log2(np.concatenate(parts) + _SMALLEST)
        level = int(logs[0])
        logs -= level
        a, b = 1 + near.shape[0], 1 + near.shape[0] + near.shape[1]
        row, column, own = (3 * w * x for w, x in zip(self.weights, (logs[1:a], logs[a:b], logs[b:]), strict=True))
        row += 48 * (level - _LOWEST)
        found = own[near]
        found += row[:, None]
        found += column[None, :]
        found >>= 10
        return np.clip(found, 0, CLASSES - 1, out=found).astype(np.uint8).reshape(-1)

    def _magnitudes(self, coder: Coder, kinds: NDArray[np.uint8], known: Symbols | None) -> Symbols:
        def tables(used: Ints) -> Ints:
            beside = self.counts[used] + self.counts[used + 2]
            return _COUNT * self.counts[used + 1] + _BORROWED * beside + self.prior[used]

        return _by_kind(coder, kinds, known, tables, self.counts[1:-1])

    def _sign(self, coder: Coder, m: Symbols, near: NDArray[np.int16], mean: int, known: Levels | None) -> Symbols:
        """Whole numbers from magnitudes; a sign is coded where both are possible."""
        q = m if self.high >= -self.low else -m  # the side that has the largest magnitudes
        undecided = np.flatnonzero((m > 0) & (m <= min(self.high, -self.low)))
        if not undecided.size:
            return q
        told = None if known is None else (known.reshape(-1)[undecided] > 0).astype(np.int32)
        if self.signed:
            unit = mean + _SIGN_OFFSET
            leaning = (near.reshape(-1)[undecided].astype(np.int64) * 1024 + unit) // (2 * unit)
            kinds = (np.clip(leaning, -4, 4) + 4).astype(np.uint8)
        else:
            kinds = np.full(undecided.size, 4, dtype=np.uint8)
        positive = _by_kind(coder, kinds, told, lambda used: self.sign_counts[used], self.sign_counts)
        signed = q.reshape(-1).copy()
        signed[undecided] = (2 * positive - 1) * m.reshape(-1)[undecided]
        return signed.reshape(m.shape)


def _by_kind(
    coder: Coder, kinds: NDArray[np.uint8], known: Symbols | None, tables: Callable[[Ints], Ints], counts: Ints
) -> Symbols:
    """Code symbols kind by kind, one call each; then count them."""
    order = np.argsort(kinds, kind="stable")
    sizes = np.bincount(kinds)
    used = np.flatnonzero(sizes)
    told = None if known is None else known[order]
    found, start = [], 0
    for kind, frequencies in zip(used, _frequencies(tables(used)), strict=True):
        size = int(sizes[kind])
        symbols = coder.code(frequencies, size, None if told is None else told[start : start + size])
        counts[kind] += np.bincount(symbols, minlength=counts.shape[1])
        found.append(symbols)
        start += size
    out = np.empty(kinds.size, dtype=np.int32)
    out[order] = np.concatenate(found)
    return out


def _frequencies(weights: Ints) -> Ints:
    """Rows of weights >= 1 as whole numbers >= 1 that add up to ``2^PRECISION``."""
    free = 2**PRECISION - weights.shape[1]
    out: Ints = 1 + weights * free // weights.sum(1, keepdims=True)
    out[:, 0] += 2**PRECISION - out.sum(1)
    return out


@lru_cache(maxsize=1)
def _mantissas() -> Ints:
    """64 log2(1 + i / 1024), rounded down, by repeated squaring."""
    x = (np.arange(1024, 2048, dtype=np.int64)) << 20
    out = np.zeros(1024, dtype=np.int64)
    for _ in range(6):
        x = (x * x) >> 30
        big = x >> 31
        x >>= big
        out = 2 * out + big
    return out


def _log2(x: Ints) -> Ints:
    """64 log2(x) of whole numbers from 1 to 2^50, from their ten leading bits behind the first."""
    exponents = np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1  # exact
    leading = np.where(exponents > 10, x >> np.maximum(exponents - 10, 0), x << np.maximum(10 - exponents, 0))
    out: Ints = 64 * exponents + _mantissas()[leading - 1024]
    return out


def _middle(kind: int) -> int:
    """The mean magnitude in the middle of a class, 16 bits behind the point."""
    octave, third = divmod(kind, 3)
    return (_ROOTS[third] << octave) >> 7


@lru_cache(maxsize=8)
def _prior(largest: int) -> Ints:
    """Per class, what a geometric distribution of its mean lets expect: weights that add up to about ``_PRIOR``."""
    out = np.empty((CLASSES, largest + 1), dtype=np.int64)
    for kind in range(CLASSES):
        mean = _middle(kind)
        ratio = (mean << 16) // (mean + 2**16)
        weights = [2**30]
        for _ in range(largest):
            weights.append((weights[-1] * ratio) >> 16)
        out[kind] = [1 + _PRIOR * w // sum(weights) for w in weights]
    out.flags.writeable = False
    return out
