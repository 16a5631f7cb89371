"""A hundred thousand damaged and forged containers: each is read or refused, in bounded memory.

The files are loaded in a process of its own, whose memory is bounded twice: the
address space by the system, so that whoever asks for more than a network could
need fails at once (numpy, torch, zlib and constriction alike), and what was ever
resident, read off afterwards.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.codebook import Codebook, codebook_of
from compress.container import MAGIC
from compress.groups import find_groups
from compress.planning import plan_pruning
from compress.quantization_plan import QuantizationPlan
from compress.storage import load, save
from compress.target import Target
from lrp.errors import FileFormatError, MismatchError

PRELUDE = struct.Struct("<8sHHIIIQ")
MEGABYTE = 2**20


class Net(nn.Module):
    """Small; its tensors need every coder."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 5)
        self.zero = nn.Linear(4, 3)
        self.one = nn.Linear(2, 1)
        self.steady = nn.Linear(64, 8)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.zero.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.wide(self.norm(self.conv(x)).relu()).mean((2, 3)).relu())
        return out


class Large(nn.Module):
    """Forty megabytes, nearly all in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.conv = nn.Conv2d(1024, 1024, 3)


def quantize(net: nn.Module, bits: int = 4) -> nn.Module:
    """Round to the nearest level, one step per channel where a name says so."""
    books: dict[str, Codebook] = {}
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() > 1:
                books[name] = codebook_of(p, bits, axis=0 if "wide" in name else None)
                p.copy_(books[name].values(books[name].nearest(p)))
    QuantizationPlan(books, {"norm.weight": "not a weight"}, {"bits": bits}).apply(net)
    return net


def small() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.conv.weight.copy_(torch.randn(8, 3, 3, 3) ** 3)
        net.zero.weight.zero_()
        net.steady.weight.copy_(torch.linspace(-1, 1, 16).repeat(32).view(8, 64))
    return quantize(net).eval()


def large() -> nn.Module:
    torch.manual_seed(0)
    return quantize(Large()).eval()


def pruned() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(1, 3, 8, 8)
    plan = plan_pruning(net, x, criterion="weight", target=Target(channels=0.7), structure=find_groups(net, x))
    return quantize(plan.apply(net)).eval()


class Parts:
    """A container taken to pieces, and put together with checksums that fit."""

    def __init__(self, raw: bytes) -> None:
        _, self.version, self.zero, packed, self.inflated, _, self.size = PRELUDE.unpack(raw[: PRELUDE.size])
        stop = PRELUDE.size + packed
        self.packed = raw[PRELUDE.size : stop]
        self.header: Any = json.loads(zlib.decompress(self.packed))
        self.sections = []
        for length in [self.header["floats"][1], *(row[5] for row in self.header["tensors"])]:
            self.sections.append(raw[stop : stop + length])
            stop += length

    def seal(self) -> None:
        """Lengths and checksums of the sections."""
        for row, section in zip((self.header["floats"], *self.header["tensors"]), self.sections, strict=True):
            row[-1] = zlib.crc32(section)
            row[1 if len(row) == 4 else 5] = len(section)

    def repack(self) -> None:
        text = json.dumps(self.header).encode()
        self.packed, self.inflated = zlib.compress(text), len(text)

    def raw(self, size: int | None = None, packed: int | None = None, version: int | None = None) -> bytes:
        body = b"".join(self.sections)
        size = PRELUDE.size + len(self.packed) + len(body) if size is None else size
        packed = len(self.packed) if packed is None else packed
        fields = (MAGIC, self.version if version is None else version, self.zero, packed, self.inflated)
        crc = zlib.crc32(self.packed, zlib.crc32(PRELUDE.pack(*fields, 0, size)))
        return PRELUDE.pack(*fields, crc, size) + self.packed + body


HUGE: tuple[Any, ...] = (2**31, 2**40, 2**63, 2**63 - 1, 2**64, 10**30, -1, -(2**63), 0, 1, 2, 255, 256, 65535)
ODD: tuple[Any, ...] = (
    *HUGE,
    None,
    True,
    "",
    "x",
    "adaptive",
    "packed",
    "deflate",
    "constant",
    "float64",
    "int8",
    "\ud800",
    1.5,
    float("nan"),
    [],
    {},
    [[]],
    [2**40, 2**40],
)


def flipped(raw: bytes, dice: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        if out:
            out[dice.randrange(len(out))] ^= 1 << dice.randrange(8)
    return bytes(out)


def spliced(raw: bytes, dice: random.Random) -> bytes:
    i, j = sorted(dice.randrange(len(raw) + 1) for _ in range(2))
    i = max(i, j - dice.choice((1, 4, 64)))
    return raw[:i] + dice.choice((b"", dice.randbytes(j - i), dice.randbytes(dice.choice((1, 7, 300))))) + raw[j:]


def bits(raw: bytes, dice: random.Random) -> bytes:
    return flipped(raw, dice)


def truncated(raw: bytes, dice: random.Random) -> bytes:
    return raw[: dice.randrange(len(raw))]


def edited(raw: bytes, dice: random.Random) -> bytes:
    return spliced(raw, dice)


def extended(raw: bytes, dice: random.Random) -> bytes:
    return raw + dice.randbytes(dice.choice((1, 3, 100)))


def section(raw: bytes, dice: random.Random) -> bytes:
    """Other bytes in a section, under checksums that fit."""
    parts = Parts(raw)
    i = dice.randrange(len(parts.sections))
    parts.sections[i] = dice.choice((flipped, flipped, spliced))(parts.sections[i], dice)
    parts.seal()
    parts.repack()
    return parts.raw()


def swapped(raw: bytes, dice: random.Random) -> bytes:
    """Sections or coders of one another."""
    parts = Parts(raw)
    if dice.random() < 0.5:
        dice.shuffle(parts.sections)
    else:
        dice.choice(parts.header["tensors"])[4] = dice.choice(("constant", "packed", "deflate", "adaptive"))
    parts.seal()
    parts.repack()
    return parts.raw()


def field(raw: bytes, dice: random.Random) -> bytes:
    """Another value, or none, somewhere in the header."""
    parts = Parts(raw)
    where: Any = parts.header
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = dice.choice(keys)
        if isinstance(where[key], (dict, list)) and where[key] and dice.random() < 0.85:
            where = where[key]
            continue
        break
    if dice.random() < 0.1:
        del where[key]
    elif type(where[key]) is int and dice.random() < 0.5:
        where[key] += dice.choice((-1, 1, 2, 1000))
    else:
        where[key] = dice.choice(ODD)
    parts.repack()
    return parts.raw()


def shape(raw: bytes, dice: random.Random) -> bytes:
    parts = Parts(raw)
    row = dice.choice(parts.header["tensors"])
    row[2] = [dice.choice((*row[2], *HUGE)) for _ in range(dice.choice((1, 2, 4, 4)))]
    if dice.random() < 0.3:
        row[3][dice.randrange(3)] = dice.choice(HUGE)
    parts.repack()
    return parts.raw()


def prelude(raw: bytes, dice: random.Random) -> bytes:
    parts = Parts(raw)
    what = dice.choice(("size", "packed", "version", "zero", "inflated"))
    value = dice.choice((0, 1, 2, 31, len(raw), 2**16 - 1, 2**20, 2**31, 2**32 - 1, 2**64 - 1))
    if what in ("zero", "inflated"):
        setattr(parts, what, min(value, 2**16 - 1 if what == "zero" else 2**32 - 1))
        return parts.raw()
    limit = {"size": 2**64 - 1, "packed": 2**32 - 1, "version": 2**16 - 1}[what]
    return parts.raw(**{what: min(value, limit)})


def stream(raw: bytes, dice: random.Random) -> bytes:
    """Other bytes in the deflated header."""
    parts = Parts(raw)
    parts.packed = dice.choice((flipped, spliced))(parts.packed, dice)
    return parts.raw()


def text(raw: bytes, dice: random.Random) -> bytes:
    """Other bytes in the header's JSON."""
    parts = Parts(raw)
    plain = dice.choice((flipped, spliced))(zlib.decompress(parts.packed), dice)
    parts.packed, parts.inflated = zlib.compress(plain), len(plain)
    return parts.raw()


BOMB = zlib.compress(bytes(64 * MEGABYTE), 9)
NESTED = b'{"tensors":' + b"[" * 300_000 + b"]" * 100_000
LISTS = b'{"tensors":[' + b"[]," * 170_000 + b"[]]}"


def bomb(raw: bytes, dice: random.Random) -> bytes:
    """A few bytes that inflate to very many."""
    parts = Parts(raw)
    kind = dice.randrange(4)
    if kind == 0:
        parts.header["floats"][0] = "deflate"
        parts.header["floats"][2] = dice.choice((64 * MEGABYTE, parts.header["floats"][2], 2**40))
        parts.sections[0] = BOMB
    elif kind == 1:
        i = dice.randrange(1, len(parts.sections))
        parts.header["tensors"][i - 1][4] = "deflate"
        parts.sections[i] = parts.sections[i][:4] + BOMB
    parts.seal()
    parts.repack()
    if kind == 2:
        parts.packed, parts.inflated = BOMB, dice.choice((64 * MEGABYTE, 2**19, 2**32 - 1))
    elif kind == 3:
        plain = dice.choice((NESTED, LISTS))
        parts.packed, parts.inflated = zlib.compress(plain), len(plain)
    return parts.raw()


COMMON: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    bits,
    truncated,
    edited,
    extended,
    section,
    section,
    swapped,
    field,
    field,
    shape,
    prelude,
    stream,
    text,
)


def peak() -> int:
    """Bytes of memory that this process ever held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(place: str, name: str, files: str, seed: str) -> None:
    """Load mutated files of one network; print what happened and how much more memory it took, as JSON."""
    kind = {"small": Net, "pruned": Net, "large": Large}[name]
    made = Net()

    def build() -> nn.Module:
        return Large() if kind is Large else made  # drawing values takes longer than reading

    torch.set_num_threads(1)
    whole = Path(place) / name
    raw, mutated = whole.read_bytes(), Path(place) / f"{name}-{seed}"
    with torch.device("meta"):
        model_bytes = sum(t.numel() * t.element_size() for t in build().state_dict().values())
    tiny = Path(place) / "tiny"
    save(quantize(nn.Linear(64, 64)), tiny)
    load(tiny, lambda: nn.Linear(64, 64))  # imports, and what is cached
    before = peak()
    for _ in range(3):
        load(whole, build)
    floor = peak()
    with open("/proc/self/statm") as file:
        space = int(file.read().split()[0]) * resource.getpagesize()
    room = 4 * model_bytes + 128 * MEGABYTE  # of addresses, not of memory
    resource.setrlimit(resource.RLIMIT_AS, (space + room, space + room))
    mutated.touch()
    dice, seen, worst = random.Random(int(seed)), {"read": 0, "FileFormatError": 0, "MismatchError": 0}, 0.0
    for i in range(int(files)):
        change = bomb if i % 100 == 0 else dice.choice(COMMON)
        changed = change(raw, dice)
        with mutated.open("r+b") as file:  # making a file anew takes longer than reading it
            file.write(changed)
            file.truncate()
        start = time.perf_counter()
        try:
            load(mutated, build)
            seen["read"] += 1
        except (FileFormatError, MismatchError) as error:
            seen[type(error).__name__] += 1
        except BaseException as error:
            mutated.rename(mutated.with_suffix(".bad"))
            raise AssertionError(f"{change.__name__}, file {i} of seed {seed}: {error!r}") from error
        worst = max(worst, time.perf_counter() - start)
    found = {"loaded": floor - before, "grown": peak() - floor, "model": model_bytes, "slowest": worst}
    print(json.dumps({**seen, **found}))


def run(folder: Path, name: str, files: int, seed: int) -> dict[str, int]:
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, __file__, str(folder), name, str(files), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    out: dict[str, int] = json.loads(found.stdout.splitlines()[-1])
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("containers")
    save(small(), place / "small")
    save(pruned(), place / "pruned")
    return place


def test_the_files_have_every_coder(folder: Path) -> None:
    rows = Parts((folder / "small").read_bytes()).header["tensors"]
    assert {row[4] for row in rows} == {"constant", "packed", "deflate", "adaptive"}


def test_a_few_mutations(folder: Path) -> None:
    """What the fast tier sees of the test below."""
    found = run(folder, "small", 500, 1)
    assert found["FileFormatError"] > 200


@pytest.mark.slow
@pytest.mark.parametrize(("name", "files"), [("small", 100_000), ("pruned", 5_000)])
def test_no_mutation_crashes(name: str, files: int, folder: Path) -> None:
    found = run(folder, name, files, 2)
    assert found["FileFormatError"] > 0.5 * files
    assert found["MismatchError"] > 0.01 * files
    assert 0 < found["read"] < 0.2 * files  # other values under checksums that fit are another network
    # the network is of 20 kB; objects made from a header's half a megabyte of JSON are not
    assert found["grown"] < 2 * found["model"] + 24 * MEGABYTE


@pytest.mark.slow
def test_memory_is_bounded_by_the_network(tmp_path: Path) -> None:
    """Of one that is large beside all else: no more than twice its bytes beside the network that is returned."""
    save(large(), tmp_path / "large")
    found = run(tmp_path, "large", 250, 3)
    assert found["loaded"] < 3 * found["model"]
    assert found["loaded"] + found["grown"] < 3 * found["model"]


if __name__ == "__main__":
    main(*sys.argv[1:])
