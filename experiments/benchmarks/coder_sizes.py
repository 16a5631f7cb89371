"""Bytes of quantized weights: our container against other coders, and how long it takes to read one.

Run ``python -m experiments.benchmarks.coder_sizes --data FOLDER``. The weights are
those of the published ECQx ResNet-20 (CIFAR-10), 268,336 in 20 tensors, rounded by
one-shot entropy-constrained assignment without training: rows of b bits and the
multiplier gamma (symmetric levels, the larger of both lambda limits). No accuracy
is attached to them. Every file is read back and compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import lzma
import platform
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress import container
from compress.assignment import Levels, assign, borders, information, lambda_limit, size_factor
from compress.codebook import Codebook, codebook_of
from compress.entropy_coding import encode
from compress.meters import machine
from experiments.benchmarks import measuring

BITS, GAMMAS = (2, 3, 4, 5), (0.0, 0.05, 0.2)
BOUND = 1.0  # a file has to stay below this, over NNC's bytes and over zstd's
# bytes of NNCodec 2.1.3 (ISO/IEC 15938-17, lossless integers, per-network stream) on the same whole numbers, measured
# once outside of this repository: its licence grants no patent rights, so it is no dependency
NNC = {
    (2, 0.0): 12432,
    (2, 0.05): 10057,
    (2, 0.2): 5566,
    (3, 0.0): 54833,
    (3, 0.05): 50994,
    (3, 0.2): 41462,
    (4, 0.0): 92091,
    (4, 0.05): 82680,
    (4, 0.2): 47031,
    (5, 0.0): 127862,
    (5, 0.05): 92966,
    (5, 0.2): 42978,
}
Whole = dict[str, tuple[Tensor, Codebook]]


def one_shot(weights: Mapping[str, Tensor], bits: int, gamma: float) -> Whole:
    """Whole numbers by one assignment."""
    books = {name: codebook_of(w, bits) for name, w in weights.items()}
    levels = Levels.of(list(books.values()))
    nearest = [books[name].nearest(w) - books[name].low for name, w in weights.items()]
    cost = information(levels, levels.counts(nearest))[1]
    ends = [torch.stack([f(w) for w in weights.values()]) for f in (torch.min, torch.max)]
    factors = torch.tensor(size_factor([w.numel() for w in weights.values()]), dtype=torch.float64)
    lambdas = gamma * factors * lambda_limit(levels, cost, *ends, rule="max")
    cells = borders(levels, cost, lambdas)
    found = {name: assign(w.double(), cells[t]) for t, (name, w) in enumerate(weights.items())}
    if gamma == 0:  # halves go to even, not down
        found = dict(zip(weights, nearest, strict=True))
    return {name: (k + books[name].low, books[name]) for name, k in found.items()}


def about() -> dict[str, Any]:
    """The plans of a network that was quantized and not pruned."""
    return {
        "pruning": None,
        "quantization": {"left_out": {}, "settings": {}},
        "tied": {},
        "frozen": [],
        "aliases": {},
    }


def packed(k: Tensor, book: Codebook) -> bytes:
    """A fixed number of bits per weight."""
    return bytes(encode(k.numpy(), book.low, book.high, coder="packed").data)


def entropy(k: Tensor) -> float:
    """Bytes at the zeroth-order entropy, without a table."""
    counts = np.unique(k.numpy(), return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def others(whole: Whole) -> dict[str, float]:
    """Bytes of general coders, each with one stream for the whole network."""
    plain = b"".join(k.numpy().astype(np.int8).tobytes() for k, _ in whole.values())
    tight = b"".join(packed(k, book) for k, book in whole.values())
    out = {
        "entropy": sum(entropy(k) for k, _ in whole.values()),
        "packed": len(tight),
        "zlib9": len(zlib.compress(plain, 9)),
        "lzma": len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)),
    }
    if importlib.util.find_spec("zstandard") is not None:
        zstandard: Any = importlib.import_module("zstandard")
        best = zstandard.ZstdCompressor(level=19)
        out |= {"zstd19": len(best.compress(plain)), "zstd19 of packed": len(best.compress(tight))}
    return out


def read_back(whole: Whole, floats: Mapping[str, Tensor], slow: bool) -> dict[str, Any]:
    """Write a container, read it, compare; its bytes and seconds of process CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        start = time.process_time()
        pieces = container.pack(whole, floats, about())
        encoded = time.process_time()
        container.write(path, pieces)
        header = container.inspect(path)
        shapes = {name: tuple(t.shape) for name, t in floats.items()}
        shapes |= {name: tuple(k.shape) for name, (k, _) in whole.items()}
        out = {
            "file": path.stat().st_size,
            "codes": sum(e.length for e in header.entries),
            "coders": dict(Counter(e.coder for e in header.entries)),
            "encode_seconds": encoded - start,
        }
        for name in ("decode_seconds", "slow_seconds")[: 1 + slow]:
            start = time.process_time()
            tensors, _ = container.read(path, header, shapes, slow=name == "slow_seconds")
            out[name] = time.process_time() - start
            for n, (k, book) in whole.items():
                if not torch.equal(tensors[n], book.values(k)):
                    raise AssertionError(f"{n} did not come back")
    return out


def sizes(path: Path) -> list[dict[str, Any]]:
    """The rows of the table."""
    state = load_file(path)
    weights = {name: w for name, w in state.items() if w.dim() > 1}
    floats = {name: t for name, t in state.items() if name not in weights}
    rows = []
    for bits in BITS:
        for gamma in GAMMAS:
            whole = one_shot(weights, bits, gamma)
            count = sum(k.numel() for k, _ in whole.values())
            zeros = sum(int((k == 0).sum()) for k, _ in whole.values()) / count
            row = {"bits": bits, "gamma": gamma, "weights": count, "zeros": zeros, **others(whole)}
            row |= {"nnc": NNC[bits, gamma], **read_back(whole, {}, slow=True)}
            row["model_file"] = read_back(whole, floats, slow=False)["file"]
            rows.append(row)
            print(f"{bits} bit, gamma {gamma}: {row['file']:,} bytes", file=sys.stderr)
    return rows


def resnet18(zeros: float, seed: int = 0) -> Whole:
    """Whole numbers of 4 bit in the shapes of a ResNet-18; scales of filters and channels vary as trained ones do."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    for width, before in ((64, 64), (128, 64), (256, 128), (512, 256)):
        shapes += [(width, before, 3, 3), *[(width, width, 3, 3)] * 3]
        shapes += [(width, before, 1, 1)] if width > before else []
    shapes.append((1000, 512))
    rng = np.random.default_rng(seed)
    whole = {}
    for i, shape in enumerate(shapes):
        w = rng.standard_normal(shape)
        for axis in (0, 1):
            sides = [1] * len(shape)
            sides[axis] = shape[axis]
            w *= np.exp(0.4 * rng.standard_normal(sides))
        w /= np.quantile(np.abs(w), zeros) / 0.5
        k = torch.from_numpy(np.clip(np.rint(w), -7, 7).astype(np.int64))
        whole[f"layer{i}.weight"] = (k, Codebook(torch.tensor(0.01), -7, 7))
    return whole


def times(rounds: int) -> list[dict[str, Any]]:
    """Reading eleven million weights."""
    out = []
    for share in (0.5, 0.7):
        whole = resnet18(share)
        count = sum(k.numel() for k, _ in whole.values())
        found = [read_back(whole, {}, slow=i == 0) for i in range(rounds)]
        best = {key: min(f[key] for f in found) for key in ("encode_seconds", "decode_seconds")}
        best |= {"slow_seconds": found[0]["slow_seconds"], "file": found[0]["file"]}
        zeros = sum(int((k == 0).sum()) for k, _ in whole.values()) / count
        out.append({"weights": count, "zeros": zeros, "bits_per_weight": 8 * best["file"] / count, **best})
    return out


def markdown(result: dict[str, Any]) -> str:
    """The figures as tables."""
    first = result["sizes"][0]
    columns = [
        c for c in ("entropy", "packed", "zlib9", "zstd19", "zstd19 of packed", "lzma", "nnc", "codes") if c in first
    ]
    named = {"nnc": "NNC (cited)", "codes": "ours: codes", "entropy": "entropy (order 0, no tables)"}
    lines = [
        f"Bytes of the {first['weights']:,} quantized weights of the published ECQx ResNet-20, one-shot ECQ (symmetric "
        "levels, lambda limit max), no training, no accuracy attached. General coders: one stream of int8 for the "
        "network. NNC: NNCodec 2.1.3, measured elsewhere on the same whole numbers. Ours: codes, steps included; file, "
        "with header, names, shapes and checksums; whole model, with all other tensors in float32.",
        "",
        "| b | gamma | zeros | " + " | ".join(named.get(c, c) for c in columns) + " | **ours: file** | file / NNC | "
        "codes / NNC | file / zstd19 | whole model |",
        "|" + "---|" * (len(columns) + 8),
    ]
    for row in result["sizes"]:
        cells = [f"{row[c]:,.0f}" for c in columns]
        zstd = f"{row['file'] / min(row['zstd19'], row['zstd19 of packed']):.3f}" if "zstd19" in row else "-"
        ratios = [f"{row['file'] / row['nnc']:.3f}", f"{row['codes'] / row['nnc']:.3f}", zstd]
        start = [row["bits"], row["gamma"], f"{row['zeros']:.3f}"]
        row_cells = [*start, *cells, f"**{row['file']:,}**", *ratios, f"{row['model_file']:,}"]
        lines.append("| " + " | ".join(map(str, row_cells)) + " |")
    lines += [
        "",
        "file / zstd19: the smaller of zstd-19 on int8 and on packed bits.",
        "",
        f"Reading weights in the shapes of a ResNet-18 at 4 bit (simulated weights), process CPU seconds, one thread, "
        f"best of {result['rounds']} (slow: once); encoding tries several models per tensor.",
        "",
        "| weights | zeros | bits per weight | encode | decode | decode in plain Python |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["times"]:
        seconds = [f"{row[k]:.1f}" for k in ("encode_seconds", "decode_seconds", "slow_seconds")]
        lines.append(
            f"| {row['weights']:,} | {row['zeros']:.2f} | {row['bits_per_weight']:.3f} | {' | '.join(seconds)} |"
        )
    small = result["sizes"]
    spans = [
        (f"{1e3 * min(r[k] for r in small):.0f} to {1e3 * max(r[k] for r in small):.0f}")
        for k in ("encode_seconds", "decode_seconds", "slow_seconds")
    ]
    lines += ["", f"ResNet-20, milliseconds: encode {spans[0]}, decode {spans[1]}, in plain Python {spans[2]}."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds cifar10_models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write result.json and result.md")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    wanted = [n for n in ("torch", "numpy", "constriction", "zstandard") if importlib.util.find_spec(n)]
    result: dict[str, Any] = {
        "versions": {n: importlib.metadata.version(n) for n in wanted},
        "python": platform.python_version(),
        "machine": machine(),
        "threads": 1,
        "rounds": given.rounds,
        "sizes": sizes(given.data / "cifar10_models" / "ecqx_resnet20.safetensors"),
        "times": times(given.rounds),
    }
    text = markdown(result)
    measuring.told(text, result, given.output)


if __name__ == "__main__":
    main()
