"""The ONNX forms of quantized networks, timed beside fp32 in onnxruntime.

Run ``python -m experiments.benchmarks.runtime_forms``. Every form of a network
takes its turn in every round of one process, those of weights alone both as
onnxruntime runs them by default and with their weights computed once, at load
(``session.disable_quant_qdq=1``); ratios are taken within a round. ResNet-20
has its published weights and CIFAR-10 pictures where ``--data`` has them; the
ResNet-18-shaped network and MobileNetV2 have random weights: sizes and times
only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import compress
from compress.codebook import codebook_of
from compress.meters import FOLDING, machine, session_of
from compress.quantization_plan import QuantizationPlan
from experiments import models
from experiments.benchmarks import measuring
from experiments.data import cifar10, normalise
from lrp.errors import DataError

FOLDED = {FOLDING: "1"}
BUSY = 1.0  # load at the start, above which times are of little worth
PLEDGED = {"resnet20": 1.5, "resnet18": 2.5}  # a8w8 over fp32 on two threads of a CPU with VNNI


@dataclass(frozen=True)
class Case:
    """A network, one input of it, rows to calibrate with, and what its weights are."""

    model: nn.Module
    example: Tensor
    rows: Tensor
    weights: str


def quantized(model: nn.Module, bits: int) -> nn.Module:
    """Every kernel and matrix rounded to a symmetric codebook, without training."""
    books = {}
    for name, p in model.named_parameters():
        if p.dim() > 1:
            books[name] = codebook_of(p.detach(), bits, step="mse")
            p.data = books[name].values(books[name].nearest(p.detach()))
    QuantizationPlan(books).apply(model)
    return model


def case(net: str, data: Path, rows: int) -> Case:
    """A network by name."""
    generator = torch.Generator().manual_seed(0)
    if net == "resnet20":
        found = _pictures(data)
        trained = found is not None
        model = models.resnet20(data).model if trained else models.CifarResNet(3).eval()
        x = torch.randn(rows, 3, 32, 32, generator=generator) if found is None else found[:rows]
        return Case(model, x[:1], x, "trained, CIFAR-10" if trained else "random")
    torch.manual_seed(0)
    model = getattr(models.torchvision_models(), net)(weights=None).eval()
    x = torch.randn(min(rows, 32), 3, 224, 224, generator=generator)
    return Case(model, x[:1], x, "random")


def _pictures(data: Path) -> Tensor | None:
    """CIFAR-10 test pictures as ResNet-20 takes them; None if they are not there."""
    try:
        pictures, _ = cifar10(data, "test")
    except DataError as error:
        print(f"random weights: {error}", file=sys.stderr)
        return None
    return normalise(pictures, models.IMAGENET_MEAN, models.IMAGENET_STD)


def timed(files: dict[str, Path], x: Any, threads: int, rounds: int, least_ms: float) -> dict[str, Any]:
    """Wall and process CPU time of every form in every round, in milliseconds of one run."""
    jobs = {}
    for form, path in files.items():
        jobs[form] = session_of(path, threads, {})
        if form in ("int8", "int4"):
            jobs[f"{form}, folded"] = session_of(path, threads, FOLDED)
    counts = {}
    for name, job in jobs.items():
        spans = []
        for _ in range(6):
            start = time.perf_counter()
            job.run(None, {"input": x})
            spans.append(time.perf_counter() - start)
        counts[name] = max(1, round(least_ms / 1e3 / min(spans)))
    wall: dict[str, list[float]] = {name: [] for name in jobs}
    cpu: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds):
        for name in list(jobs) if i % 2 == 0 else list(reversed(jobs)):
            jobs[name].run(None, {"input": x})  # other sessions' threads may still spin
            start, spent = time.perf_counter(), time.process_time()
            for _ in range(counts[name]):
                jobs[name].run(None, {"input": x})
            wall[name].append((time.perf_counter() - start) * 1e3 / counts[name])
            cpu[name].append((time.process_time() - spent) * 1e3 / counts[name])
    return {name: _summary(name, wall, cpu) for name in jobs}


def _summary(name: str, wall: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, float]:
    ratios = [b / t for b, t in zip(wall["fp32"], wall[name], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    work = [b / t for b, t in zip(cpu["fp32"], cpu[name], strict=True)]
    return {
        "ms": statistics.median(wall[name]),
        "ms_best": min(wall[name]),
        "speed": median,
        "speed_low": low,
        "speed_high": high,
        "speed_best": min(wall["fp32"]) / min(wall[name]),
        "speed_cpu_time": statistics.median(work),
    }


def measured(net: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Files, sizes, agreement and times of one network."""
    import onnx

    found = case(net, given.data, given.rows)
    model = quantized(found.model, given.bits)
    files = {}
    for form in ("fp32", "int8", "int4", "a8w8"):
        rows = list(found.rows.split(16)) if form == "a8w8" else None
        files[form] = compress.export_onnx(model, folder / f"{net}.{form}.onnx", found.example, form, rows, force=True)
        print(f"{net}: {form} written", file=sys.stderr)
    told = {p.key.removeprefix("compress."): p.value for p in onnx.load(files["a8w8"]).metadata_props}
    result: dict[str, Any] = {
        "net": net,
        "weights": found.weights,
        "input": list(found.example.shape),
        "bytes": {form: path.stat().st_size for form, path in files.items()},
        "a8w8": {key: told[key] for key in ("fused", "agreement", "calibration", "parity")},
        "times": {},
    }
    x = np.ascontiguousarray(found.example.numpy())
    for threads in given.threads:
        result["times"][str(threads)] = timed(files, x, threads, given.rounds, given.least_ms)
        print(f"{net}: {threads} threads timed", file=sys.stderr)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The figures as tables."""
    s = result["settings"]
    vnni = "with VNNI" if s["vnni"] else "**without VNNI**"
    lines = [
        f"onnxruntime {s['versions']['onnxruntime']}, {s['machine']}, {vnni}; batch 1, {s['bits']}-bit symmetric "
        f"codebooks; {s['rounds']} rounds of at least {s['least_ms']:g} ms per form, all forms in turns in one "
        "process. Speed: fp32's time over the form's, median (quartiles) within rounds; best: shortest over shortest; "
        "CPU: the same of process CPU time. Load of the machine at start and end: "
        f"{s['load'][0]:.1f}, {s['load'][1]:.1f}.",
        *(["", "**Other work ran on this machine: not to be quoted.**"] if s["load"][0] > BUSY else []),
        "",
        "int8 and int4 are of weights alone: smaller, never faster. By default onnxruntime computes their weights anew "
        "in every run; folded (`session.disable_quant_qdq=1`), once, at load.",
    ]
    for case_ in result["nets"]:
        fp32 = case_["bytes"]["fp32"]
        lines += ["", f"## {case_['net']}", "", f"Weights: {case_['weights']}; input {case_['input']}; a8w8: "
                  f"{case_['a8w8']['fused']}; {case_['a8w8']['agreement']}."]  # fmt: skip
        if case_["net"] in PLEDGED and "2" in case_["times"]:
            row = case_["times"]["2"]["a8w8"]
            lines.append(
                f"Pledged for a8w8 on 2 threads: {PLEDGED[case_['net']]}x; found: {row['speed']:.2f}x "
                f"(best {row['speed_best']:.2f}x, CPU {row['speed_cpu_time']:.2f}x)."
            )
        lines += ["", "| threads | form | bytes | of fp32 | ms | speed | best | CPU |", "|" + "---|" * 8]
        for threads, rows in case_["times"].items():
            for form, row in rows.items():
                size = case_["bytes"][form.partition(",")[0]]
                speed = f"{row['speed']:.2f} ({row['speed_low']:.2f} to {row['speed_high']:.2f})"
                cells = [threads, form, f"{size:,}", f"{size / fp32:.3f}", f"{row['ms']:.3g}", speed]
                cells += [f"{row['speed_best']:.2f}", f"{row['speed_cpu_time']:.2f}"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _load() -> float:
    place = Path("/proc/loadavg")
    return float(place.read_text().split()[0]) if place.exists() else float("nan")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["resnet20", "resnet18", "mobilenet_v2"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rows", type=int, default=512, help="calibrating and held out")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--least-ms", type=float, default=20.0)
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write result.json and result.md")
    given = parser.parse_args(argv)
    before = _load()
    flags = Path("/proc/cpuinfo")
    with tempfile.TemporaryDirectory() as folder:
        nets = [measured(net, given, Path(folder)) for net in given.nets]
    result: dict[str, Any] = {
        "settings": {
            "versions": {n: importlib.metadata.version(n) for n in ("torch", "torchvision", "onnx", "onnxruntime")},
            "python": platform.python_version(),
            "machine": machine(),
            "vnni": flags.exists() and "vnni" in flags.read_text(),
            "bits": given.bits,
            "rounds": given.rounds,
            "least_ms": given.least_ms,
            "load": [before, _load()],
        },
        "nets": nets,
    }
    text = markdown(result)
    measuring.told(text, result, given.output)


if __name__ == "__main__":
    main()
