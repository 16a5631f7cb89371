"""The one place that knows the library constriction: a range encoder and a range decoder.

constriction (R. Bamler, MIT / Apache-2.0 / BSL-1.0) makes frequencies of 24 bits
from floating-point weights w: symbol i starts at floor(s (w_0 + ... + w_{i-1})) + i
with s = (2^24 - n) / (w_0 + ... + w_{n-1}) (its "fast" quantization). From whole
numbers that add up to 2^24 - n, s is 1 and every sum exact, so the frequencies are
w_i + 1 and ours: :mod:`compress._slow_decoder` reads the same streams by them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

from compress._contexts import Ints, Symbols
from compress._slow_decoder import words_of
from lrp.errors import MissingDependencyError

__all__ = ["Decoder", "Encoder", "available"]


def available() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("constriction") is not None


def _library() -> Any:
    try:
        return importlib.import_module("constriction")
    except ImportError as error:
        raise MissingDependencyError(
            "writing entropy-coded weights needs the library constriction",
            expected="constriction, which neuralize depends on",
            got=str(error),
            fix="pip install constriction; reading works without it, slowly",
        ) from error


def _model(library: Any, frequencies: Ints) -> Any:
    return library.stream.model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


class Encoder:
    """Turns symbols into bytes."""

    def __init__(self) -> None:
        self._library = _library()
        self._encoder = self._library.stream.queue.RangeEncoder()

    def code(self, frequencies: Ints, count: int, known: Symbols | None) -> Symbols:
        assert known is not None
        self._encoder.encode(known, _model(self._library, frequencies))
        return known

    def finish(self) -> bytes:
        """Words of 32 bits, little-endian, without zeros at the end: a decoder reads zeros there."""
        stream: bytes = self._encoder.get_compressed().astype("<u4").tobytes()
        return stream.rstrip(b"\0")


class Decoder:
    """Turns bytes into symbols; ``ValueError`` if they are none of an encoder's."""

    def __init__(self, stream: bytes | memoryview) -> None:
        self._library = _library()
        self._decoder = self._library.stream.queue.RangeDecoder(words_of(stream))

    def code(self, frequencies: Ints, count: int, known: Symbols | None) -> Symbols:
        try:
            found: Symbols = self._decoder.decode(_model(self._library, frequencies), count)
        except AssertionError as error:  # its word for a stream that is none
            raise ValueError("a stream that no encoder writes") from error
        return found

    def finish(self) -> None:
        """That nothing is left over."""
        if not self._decoder.maybe_exhausted():
            raise ValueError("a stream that is longer than its symbols")
