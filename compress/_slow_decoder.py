"""The range decoder in plain Python: reads what :mod:`compress._constriction` writes, without that library.

Several times as slow, so that a file opens everywhere.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from compress._contexts import PRECISION, Ints, Symbols

__all__ = ["SlowDecoder", "words_of"]

_ALL = 2**64 - 1
_WORD = 2**32


def words_of(stream: bytes | memoryview) -> NDArray[np.uint32]:
    """The words of a stream; zeros fill the last."""
    whole = len(stream) // 4 * 4
    words = np.zeros(-(-len(stream) // 4), dtype="<u4")
    words[: whole // 4] = np.frombuffer(stream[:whole], dtype="<u4")
    if whole < len(stream):
        words[-1] = int.from_bytes(stream[whole:], "little")
    return words.astype(np.uint32, copy=False)


class SlowDecoder:
    """Turns bytes into symbols; ``ValueError`` if they are none of an encoder's.

    A range decoder (G. N. N. Martin, 1979) with a state of 64 bits that takes in
    words of 32, little-endian, zeros behind the end. The point is where the number
    in the stream lies above the lower end of the present interval, whose length is
    the range; a symbol narrows it to its share.
    """

    def __init__(self, stream: bytes | memoryview) -> None:
        words = words_of(stream)
        self._words, self._next = words, 2
        first, second = [*words[:2].tolist(), 0, 0][:2]
        self._point, self._range = first * _WORD + second, _ALL

    def code(self, frequencies: Ints, count: int, known: Symbols | None) -> Symbols:
        starts = [0, *accumulate(frequencies.tolist())]
        words, size = self._words, len(self._words)
        point, span = self._point, self._range
        out = []
        for _ in range(count):
            scale = span >> PRECISION
            quantile = point // scale
            if quantile >> PRECISION:
                raise ValueError("a stream that no encoder writes")
            symbol = bisect_right(starts, quantile) - 1
            start = starts[symbol]
            point -= scale * start
            span = scale * (starts[symbol + 1] - start)
            if span < _WORD:
                span *= _WORD
                point *= _WORD
                if self._next < size:
                    point += int(words[self._next])
                self._next += 1
            out.append(symbol)
        self._point, self._range = point, span
        return np.array(out, dtype=np.int32)

    def finish(self) -> None:
        """That nothing is left over."""
        untouched = self._range == _ALL
        if self._next < len(self._words) or not (untouched or self._point < 2 * _WORD - 1):
            raise ValueError("a stream that is longer than its symbols")
