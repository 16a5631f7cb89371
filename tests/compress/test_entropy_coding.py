"""Coders of whole numbers: what comes back is what was coded, by either decoder, and a slow third one by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress import _constriction, _contexts
from compress._slow_decoder import SlowDecoder
from compress.entropy_coding import CODERS, Coded, decode, encode
from lrp import errors

Array = NDArray[Any]
SHAPES = (
    (),
    (1,),
    (7,),
    (300,),
    (1, 1),
    (5, 1),
    (1, 40),
    (3, 17),
    (33, 100),
    (16, 3, 3, 3),
    (8, 1, 5, 5),
    (24, 12, 3),
    (6, 5, 2, 2, 2),
    (2, 2, 40, 40),  # a kernel larger than the matrix
    (1, 1, 90, 90),
    (700, 70),
)
BOUNDS = ((-1, 1), (-2, 1), (-1, 2), (0, 3), (-3, 0), (-7, 7), (-127, 127), (0, 255), (-255, 0), (-128, 127))


def weights(shape: tuple[int, ...], low: int, high: int, scale: float = 0.3, seed: int = 0) -> Array:
    """Gaussian weights whose rows and columns differ in size."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    for axis in range(min(2, len(shape))):
        sizes = np.exp(0.5 * rng.standard_normal(shape[axis]))
        w = np.moveaxis(np.moveaxis(w, axis, -1) * sizes, -1, axis)
    return np.clip(np.rint(w * scale * max(high, -low)), low, high).astype(np.int64)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape: tuple[int, ...], bounds: tuple[int, int]) -> None:
    k = weights(shape, *bounds)
    for coder in (None, "packed", "deflate", "adaptive"):
        coded = encode(k, *bounds, coder=coder)
        for slow in (False, True):
            found = decode(coded, shape, *bounds, slow=slow)
            assert found.dtype == (np.int8 if max(-bounds[0], bounds[1]) <= 127 else np.int16)
            assert found.shape == shape
            assert np.array_equal(found, k)


@given(
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    bounds=st.sampled_from(BOUNDS),
    seed=st.integers(0, 2**16),
    skew=st.floats(0.2, 6),
)
@settings(max_examples=150, deadline=None)
def test_round_trip_of_anything(shape: tuple[int, ...], bounds: tuple[int, int], seed: int, skew: float) -> None:
    low, high = bounds
    k = low + np.floor((high - low + 1) * np.random.default_rng(seed).random(shape) ** skew).astype(np.int64)
    whole = encode(k, low, high)
    for preset in range(4):
        data = adaptive(k, low, high, preset)
        assert len(whole.data) <= max(2, len(data)) or preset > 1  # the last two are tried where they may help
        for slow in (False, True):
            assert np.array_equal(decode(Coded("adaptive", data), shape, low, high, slow=slow), k)


def adaptive(k: Array, low: int, high: int, preset: int) -> bytes:
    first = _contexts.first_class(int(np.abs(k).sum()), k.size)
    byte, encoder = _contexts.settings_of(preset, first), _constriction.Encoder()
    _contexts.walk(encoder, k.shape, low, high, byte, k.astype(_contexts.levels_type(low, high)))
    return bytes([byte]) + encoder.finish()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 3, 3)])
def test_nothing(shape: tuple[int, ...]) -> None:
    for coder in (None, *CODERS):
        coded = encode(np.zeros(shape, dtype=np.int8), -1, 1, coder=coder)
        assert decode(coded, shape, -1, 1).shape == shape


@pytest.mark.parametrize("value", [-7, 0, 3])
def test_one_value_takes_two_bytes(value: int) -> None:
    k = np.full((64, 64, 3, 3), value)
    coded = encode(k, -7, 7)
    assert coded == Coded("constant", value.to_bytes(2, "little", signed=True))
    assert np.array_equal(decode(coded, k.shape, -7, 7), k)
    assert len(encode(k, -7, 7, coder="adaptive").data) < 1000


def test_the_smallest_is_taken() -> None:
    rng = np.random.default_rng(0)
    cases = {
        "packed": rng.integers(-8, 8, (3, 3)),
        "deflate": np.tile(rng.integers(-7, 8, 512), 400).reshape(400, 512),
        "adaptive": weights((64, 64, 3, 3), -8, 7),
    }
    for name, k in cases.items():
        coded = encode(k, -8, 7)
        assert coded.coder == name
        every = [encode(k, -8, 7, coder=c) for c in CODERS[1:]]
        assert len(coded.data) == min(len(c.data) for c in every)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
def test_without_structure_the_entropy_is_met(share: float) -> None:
    """Within one per cent and the bytes that learning takes."""
    rng = np.random.default_rng(1)
    k = rng.integers(1, 8, (128, 128, 3, 3)) * rng.choice((-1, 1), (128, 128, 3, 3))
    k[rng.random(k.shape) < share] = 0
    p = np.unique(k, return_counts=True)[1] / k.size
    entropy = -(p * np.log2(p)).sum() * k.size / 8
    assert entropy * 0.999 < len(encode(k, -7, 7).data) < 1.01 * entropy + 300


def test_structure_is_found() -> None:
    """Rows, columns, kernels and signs, each alone."""
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((64, 64, 9))
    sizes = np.exp(rng.standard_normal(64))
    smooth = np.repeat(rng.standard_normal((64, 64, 1)), 9, axis=2)
    shaped = {
        "rows": noise * sizes[:, None, None],
        "columns": noise * sizes[None, :, None],
        "kernels": noise * np.exp(rng.standard_normal((64, 64, 1))),
        "signs": np.abs(noise) * np.sign(smooth),
    }
    for name, w in shaped.items():
        k = np.clip(np.rint(w), -7, 7).astype(int).reshape(64, 64, 3, 3)
        mixed = rng.permutation(k.reshape(-1)).reshape(k.shape)
        assert len(encode(k, -7, 7).data) < 0.96 * len(encode(mixed, -7, 7).data), name


def test_the_same_bytes_again() -> None:
    """Recorded once: other bytes would be another format."""
    k = (np.arange(32 * 16 * 9) * 2654435761 % 2**32 >> 20) ** 2 // 2**20 * (1 - 2 * (np.arange(32 * 16 * 9) % 3 % 2))
    coded = encode(np.clip(k, -7, 7).reshape(32, 16, 3, 3), -7, 7, coder="adaptive")
    assert (len(coded.data), sum(coded.data)) == (1593, 198190)


# -- the format once more, weight by weight --------------------------------------
def log2(x: int) -> int:
    """64 log2(x), from ten bits behind the first."""
    exponent = x.bit_length() - 1
    lead = x >> (exponent - 10) if exponent > 10 else x << (10 - exponent)
    x, out = lead << 20, 0
    for _ in range(6):
        x = x * x >> 30
        out = 2 * out + (x >> 31)
        x >>= x >> 31
    return 64 * exponent + out


class ByHand:
    """Decodes one weight after the other with Python's whole numbers; no numpy, no sharing of code."""

    ROOTS = (73562, 92682, 116772)
    PRESETS = ((8, 8, 11, 1), (8, 8, 0, 0), (0, 0, 0, 0), (4, 4, 14, 1))

    def __init__(self, data: bytes, low: int, high: int) -> None:
        self.low, self.high, self.largest = low, high, max(high, -low)
        self.row, self.column, self.kernel, self.signed = self.PRESETS[data[0] >> 6]
        self.start = self.middle(data[0] & 63) >> 4
        stream = data[1:] + bytes(-len(data[1:]) % 4 + 8)
        self.words = [int.from_bytes(stream[i : i + 4], "little") for i in range(0, len(stream), 4)]
        self.point, self.span = self.words[0] << 32 | self.words[1], 2**64 - 1
        del self.words[:2]

    def middle(self, kind: int) -> int:
        return self.ROOTS[kind % 3] << kind // 3 >> 7

    def symbol(self, table: list[int]) -> int:
        free, total = 2**24 - len(table), sum(table)
        shares = [1 + t * free // total for t in table]
        shares[0] += 2**24 - sum(shares)
        starts = [0, *accumulate(shares)]
        scale = self.span >> 24
        quantile = self.point // scale
        s = next(i for i in range(len(table)) if starts[i + 1] > quantile)
        self.point -= scale * starts[s]
        self.span = scale * shares[s]
        if self.span < 2**32:
            self.span <<= 32
            self.point = self.point << 32 | (self.words.pop(0) if self.words else 0)
        return s

    def prior(self, kind: int) -> list[int]:
        mean = self.middle(kind)
        ratio, terms = (mean << 16) // (mean + 2**16), [2**30]
        for _ in range(self.largest):
            terms.append(terms[-1] * ratio >> 16)
        return [1 + 512 * t // sum(terms) for t in terms]

    def tensor(self, rows: int, columns: list[list[int]]) -> dict[tuple[int, int, int], int]:
        """Of entries p, rows i and columns j; ``columns[p]`` lists the columns that entry p has."""
        found: dict[tuple[int, int, int], int] = {}
        counts = [[0] * (self.largest + 1) for _ in range(44)]
        priors = [self.prior(kind) for kind in range(42)]
        signs = [[4, 4] for _ in range(9)]
        row_sum, row_count = [0] * rows, [0] * rows
        column_sum, column_count = [0] * len(columns[0]), [0] * len(columns[0])
        near, near_signed = {}, {}
        near_count = total = seen = 0
        for p, present in enumerate(columns):
            for part in self.rectangles(rows, len(present), seen):
                mean = ((total << 12) + 20 * self.start) // (seen + 20)
                level = log2(mean + 41)
                kinds: dict[tuple[int, int], int] = {}
                for i, j in part:
                    r = log2(((row_sum[i] << 12) + 8 * mean) // (row_count[i] + 8) + 41)
                    c = log2(((column_sum[j] << 12) + 8 * mean) // (column_count[j] + 8) + 41)
                    k = log2(((near.get((i, j), 0) << 12) + 16 * mean) // (near_count + 16) + 41)
                    scale = self.row * (r - level) + self.column * (c - level) + self.kernel * (k - level)
                    kinds[i, j] = min(41, max(0, (3 * scale + 48 * (level - 320)) >> 10))
                tables = [
                    [64 * n + 16 * (a + b) + q for n, a, b, q in zip(*z, strict=True)]
                    for z in zip(counts[1:-1], counts[:-2], counts[2:], priors, strict=True)
                ]
                m = {at: self.symbol(tables[kinds[at]]) for at in sorted(part, key=lambda at: kinds[at])}
                for at, size in m.items():
                    counts[kinds[at] + 1][size] += 1
                leaning: dict[tuple[int, int], int] = {}
                for at in part:
                    if 0 < m[at] <= min(self.high, -self.low):
                        unit = mean + 1229
                        lean = (1024 * near_signed.get(at, 0) + unit) // (2 * unit) if self.signed else 0
                        leaning[at] = min(4, max(-4, lean)) + 4
                before = [list(s) for s in signs]
                side = dict.fromkeys(part, 1 if self.high >= -self.low else -1)
                for at in sorted(leaning, key=lambda at: leaning[at]):
                    positive = self.symbol(before[leaning[at]])
                    signs[leaning[at]][positive] += 1
                    side[at] = 2 * positive - 1
                for i, j in part:
                    size = m[i, j]
                    found[p, i, j] = side[i, j] * size
                    row_sum[i], row_count[i] = row_sum[i] + size, row_count[i] + 1
                    column_sum[j], column_count[j] = column_sum[j] + size, column_count[j] + 1
                    total, seen = total + size, seen + 1
                    near[i, j] = near.get((i, j), 0) + 16 * size
                    near_signed[i, j] = near_signed.get((i, j), 0) + 16 * side[i, j] * size
            near = {at: 11 * v >> 4 for at, v in near.items()}
            near_signed = {at: 10 * v >> 4 for at, v in near_signed.items()}
            near_count = (11 * near_count >> 4) + 16
        return found

    def rectangles(self, rows: int, columns: int, seen: int) -> Any:
        """Places in the order of rows, cut where the rules say."""
        i = j = 0
        while i < rows:
            size = min(2**14, max(32, seen // 12))
            if j == 0 and columns <= size:
                last = min(rows, i + size // columns)
                part = [(a, b) for a in range(i, last) for b in range(columns)]
                i = last
            else:
                stop = columns if 2 * (columns - j) <= 3 * size else j + size
                part = [(i, b) for b in range(j, stop)]
                i, j = (i + 1, 0) if stop == columns else (i, stop)
            yield part
            seen += len(part)


def by_hand(data: bytes, shape: tuple[int, ...], low: int, high: int) -> Array:
    decoder = ByHand(data, low, high)
    kernel, size = math.prod(shape[2:]), math.prod(shape)
    out = np.zeros(size, dtype=int)
    if len(shape) > 2 and 1 < kernel <= shape[0] * shape[1]:
        rows, width = shape[:2]
        for (p, i, j), k in decoder.tensor(rows, [list(range(width))] * kernel).items():
            out[(i * width + j) * kernel + p] = k
    else:
        rows = shape[0] if len(shape) < 3 or kernel == 1 else shape[0] * shape[1]
        width = size // rows
        rows, width = (1, size) if width == 1 else (rows, width)
        combs = min(8, width)
        for (p, i, j), k in decoder.tensor(rows, [list(range(p, width, combs)) for p in range(combs)]).items():
            out[i * width + j * combs + p] = k
    return out.reshape(shape)


@pytest.mark.parametrize("preset", range(4))
@pytest.mark.parametrize(
    ("shape", "bounds"),
    [
        ((12, 7, 3, 3), (-7, 7)),
        ((40, 30), (-3, 3)),
        ((9, 203), (-8, 7)),
        ((500,), (0, 15)),
        ((70, 1, 3), (-1, 2)),
        ((2, 2, 6, 6), (-127, 127)),
    ],
)
def test_by_hand(shape: tuple[int, ...], bounds: tuple[int, int], preset: int) -> None:
    k = weights(shape, *bounds)
    assert np.array_equal(by_hand(adaptive(k, *bounds, preset), shape, *bounds), k)


# -- what is no code ----------------------------------------------------------------
@given(data=st.binary(max_size=200), coder=st.sampled_from(CODERS), bounds=st.sampled_from(BOUNDS))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data: bytes, coder: str, bounds: tuple[int, int]) -> None:
    """Refused, or whole numbers within their bounds; both decoders agree."""
    results: list[Any] = []
    for slow in (False, True):
        try:
            found = decode(Coded(coder, data), (5, 4, 3, 3), *bounds, slow=slow)
            assert bounds[0] <= found.min() <= found.max() <= bounds[1]
            results.append(found.tolist())
        except errors.FileFormatError as error:
            results.append(str(error))
    assert results[0] == results[1]


@pytest.mark.parametrize("coder", CODERS[1:])
def test_more_or_fewer_bytes(coder: str) -> None:
    k = weights((16, 8, 3, 3), -8, 7)
    data = encode(k, -8, 7, coder=coder).data
    for other in (data + b"\1" * 9, b""):
        for slow in (False, True):
            with pytest.raises(errors.FileFormatError, match=r"1,152 whole numbers from -8 to 7"):
                decode(Coded(coder, other), k.shape, -8, 7, slow=slow)


@pytest.mark.parametrize("bounds", [(-1, 10**12), (-(10**12), 1), (1, 2), (0, 0)])
@pytest.mark.parametrize("coder", CODERS)
def test_bounds_that_would_fill_the_memory(coder: str, bounds: tuple[int, int]) -> None:
    with pytest.raises(errors.FileFormatError, match="bounds that no codebook has"):
        decode(Coded(coder, bytes(8)), (2, 2), *bounds)


def test_unknown_coders() -> None:
    with pytest.raises(errors.FileFormatError, match="a coder 'zip'"):
        decode(Coded("zip", b""), (2,), -1, 1)
    with pytest.raises(errors.InputError, match="one of constant, packed"):
        encode(np.zeros(2, dtype=int), -1, 1, coder="zip")
    with pytest.raises(errors.InputError, match="2 values"):
        encode(np.arange(2), -1, 1, coder="constant")


@pytest.mark.parametrize(
    ("k", "low", "high"),
    [
        (np.zeros(2), -1, 1),
        (np.full(2, 2), -1, 1),
        (np.full(2, -2), -1, 1),
        (np.zeros(2, dtype=int), 1, 2),
        (np.zeros(2, dtype=int), 0, 0),
        (np.zeros(2, dtype=int), -1, 256),
    ],
)
def test_what_can_not_be_coded(k: Array, low: int, high: int) -> None:
    with pytest.raises(errors.InputError, match="no whole numbers between their bounds"):
        encode(k, low, high)


def test_frequencies_are_what_constriction_uses() -> None:
    """One symbol at a time, so that the bytes tell each of them: random tables, skewed ones, many symbols."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 16, 256):
        for _ in range(60):
            table = (rng.random(n) ** rng.integers(1, 40) * 2.0 ** rng.integers(0, 40)).astype(np.int64) + 1
            frequencies = _contexts._frequencies(table[None])[0]
            assert frequencies.min() >= 1
            assert frequencies.sum() == 2**24
            symbols = rng.integers(0, n, 50).astype(np.int32)
            encoder = _constriction.Encoder()
            encoder.code(frequencies, 50, symbols)
            slow, fast = SlowDecoder(encoder.finish()), _constriction.Decoder(encoder.finish())
            assert np.array_equal(slow.code(frequencies, 50, None), symbols)
            assert np.array_equal(fast.code(frequencies, 50, None), symbols)
            slow.finish()
            fast.finish()


def test_without_constriction(tmp_path: Path) -> None:
    """Files open, slowly; what needs the library says so."""
    k = weights((16, 8, 3, 3), -7, 7)
    (tmp_path / "code").write_bytes(encode(k, -7, 7, coder="adaptive").data)
    np.save(tmp_path / "k.npy", k)
    code = f"""
import sys
sys.modules["constriction"] = None
import numpy as np
from compress.entropy_coding import Coded, decode, encode
from lrp.errors import MissingDependencyError
k = np.load({str(tmp_path / "k.npy")!r})
data = open({str(tmp_path / "code")!r}, "rb").read()
assert np.array_equal(decode(Coded("adaptive", data), k.shape, -7, 7), k)
try:
    encode(k, -7, 7)
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install constriction" in done.stdout
