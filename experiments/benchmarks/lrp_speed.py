"""How long an explanation takes, and what memory, in units of the plain gradient.

Run ``python -m experiments.benchmarks.lrp_speed``: every composite of lrp, and
zennit and captum where they are installed, on torchvision's VGG-16, ResNet-18
and ResNet-50. All methods take turns in one process; every ratio is taken
within a round. The design's budget stands beside every figure of ours. Where a
library refuses a network, its reason is printed instead of a number.

``--quick`` takes under two minutes, everything a few hours, most of them for
VGG-16 on 16 pictures of 224 pixels.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.benchmarks import lrp_memory, lrp_methods, lrp_peers, measuring
from experiments.benchmarks.lrp_methods import MEMORY_BUDGET, PLAIN, Case, Method
from experiments.benchmarks.lrp_peers import Refused
from experiments.benchmarks.lrp_report import markdown

NETS = ("vgg16", "resnet18", "resnet50")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions(peers: list[str]) -> dict[str, str]:
    names = ["torch", "torchvision", *peers]
    return {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}


def _cold(chosen: list[Method], case: Case, model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Seconds of the first call of our own methods, each on a copy of its own."""
    timer, out = measuring.clock(case.device), {}
    for method in chosen:
        if method.library != "lrp" or method.variant not in ("", "compiled"):
            continue
        try:
            out[method.name] = timer.seconds(lrp_methods.first_call(method, case, model, x))
        except Refused:
            continue  # the warm call names the reason
    return out


def _memory(chosen: list[Method], case: Case, threads: int, refused: dict[str, str]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for method in chosen:
        if method.name in refused:
            continue
        out[method.name] = entry = lrp_memory.in_fresh_process(asdict(method), case.as_dict(), threads)
        base = out.get(method.over, {}).get("mib")
        if base and "mib" in entry and method.library != "torch":
            entry["ratio"] = entry["mib"] / base
            if method.library == "lrp" and method.variant != "ledger":
                entry["budget"] = MEMORY_BUDGET
    return out


def _wrong_peers(chosen: list[Method], case: Case, model: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """Peers whose maps of this network are not what they claim to be, and why."""
    target, seed = case.target(x)
    out = {}
    for peer in sorted({m.library for m in chosen} & set(lrp_peers.NAMES)):
        try:
            lrp_peers.check(peer, model, x, seed, target)
        except Refused as error:
            out[peer] = str(error)
    return out


def measure(
    case: Case, chosen: list[Method], rounds: int, *, cold: bool = True, memory: bool = True, threads: int = 1
) -> dict[str, Any]:
    """All figures of one case, the seconds of every round included."""
    model, x = case.model(), case.input()
    timer = measuring.clock(case.device)
    jobs: dict[str, measuring.Job] = {}
    refused: dict[str, str] = {}
    wrong = _wrong_peers(chosen, case, model, x)
    for method in chosen:
        if method.library in wrong:
            refused[method.name] = wrong[method.library]
            continue
        try:
            job = lrp_methods.build(method, case, model, x)
            job()
            jobs[method.name] = job
        except Refused as error:
            refused[method.name] = str(error)
    raw = measuring.interleave(jobs, rounds, timer, lambda i: _say(f"{case}: round {i + 1} of {rounds}"))
    ratios = {}
    for method in chosen:
        if method.name in jobs and method.name != PLAIN:
            r = measuring.ratio(raw, method.name, method.over)
            ratios[method.name] = {**asdict(r), "over": method.over, "budget": lrp_methods.budget(method, case.net)}
    del jobs
    median = {name: statistics.median(r[name] for r in raw) for name in raw[0]}
    on_gpu = case.device.startswith("cuda")
    return {
        "label": str(case),
        **case.as_dict(),
        "plain_ms": 1e3 * median[PLAIN],
        "rounds": raw,
        "ratios": ratios,
        "per_second": {n: case.batch / s for n, s in median.items()} if on_gpu else {},
        "cold_s": _cold(chosen, case, model, x) if cold else {},
        "memory": _memory(chosen, case, threads, refused) if memory else {},
        "refused": refused,
    }


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), help="names of torchvision models")
    parser.add_argument("--pixels", nargs="+", type=int, default=[64, 224])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--composites", nargs="+", help="default: all of lrp.composites")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cold", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="minutes per network")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"],
                        help="default: float32, on cuda float32 and bfloat16; 16 bits run under autocast")  # fmt: skip
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="default: on cuda only")
    parser.add_argument("--quick", action="store_true", help="ResNet-18 and VGG-16 at 64 pixels, one picture, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and round")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write result.json and result.md")
    given = parser.parse_args(argv)
    known = sorted(lrp_methods.composites())
    given.composites = given.composites or list(lrp_methods.composites())
    unknown = [c for c in given.composites if c not in known]
    if unknown:
        parser.error(f"unknown composite {unknown[0]}; there are {', '.join(known)}")
    for name in ("rounds", "threads", "classes"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}; it must be at least 1")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(2, "lrp_speed: error: --device cuda, but torch sees no CUDA device; use --device cpu\n")
    on_gpu = given.device.startswith("cuda")
    given.dtypes = given.dtypes or (["float32", "bfloat16"] if on_gpu else ["float32"])
    given.channels_last = on_gpu if given.channels_last is None else given.channels_last
    if given.quick:
        given.nets, given.pixels, given.batches, given.rounds = ["vgg16", "resnet18"], [64], [1], 3
        given.memory = given.cold = False
    return given


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure what the command line asks for."""
    given = _arguments(argv)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    peers = lrp_peers.installed() if given.peers else []
    chosen = lrp_methods.methods(given.composites, peers, given.compile)
    started = time.time()
    result: dict[str, Any] = {
        "settings": {k: v for k, v in vars(given).items() if k not in ("output", "json")},  # no paths
        "versions": _versions(peers),
        "machine": _machine(given.device),
        "clock": measuring.clock(given.device).unit,
        "methods": [m.name for m in chosen],
        "cases": [],
    }
    try:
        for net in given.nets:
            for pixels in given.pixels:
                for batch in given.batches:
                    for dtype in given.dtypes:
                        case = Case(net, pixels, batch, given.device, dtype, given.channels_last, given.classes)
                        entry = measure(
                            case, chosen, given.rounds, cold=given.cold, memory=given.memory, threads=given.threads
                        )
                        result["cases"].append(entry)
                        result["seconds"] = time.time() - started
                        _write(result, given)  # after every case: a long run that is stopped leaves what it has
    finally:
        torch.set_num_threads(threads_before)
    return result


def _write(result: dict[str, Any], given: argparse.Namespace) -> None:
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text + "\n")
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "result.json").write_text(text + "\n")
        (given.output / "result.md").write_text(markdown(result))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    print(markdown(run(argv)))


if __name__ == "__main__":
    main()
