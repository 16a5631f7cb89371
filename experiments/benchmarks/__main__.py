"""Every benchmark, each in a process of its own, and one table of them all.

``python -m experiments.benchmarks`` runs them (hours; ``--quick``: minutes) and
writes BENCHMARKS.md; ``python -m experiments.benchmarks table FOLDER`` only
writes the table, from the results that lie in a folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrp.errors import LRPError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("experiments/results")


@dataclass(frozen=True)
class Benchmark:
    """How one is run.

    Parameters
    ----------
    short : tuple of str
        Arguments of its short form.
    needs : tuple of str
        Modules without which it cannot run.
    needs_in_full : tuple of str
        Further ones of the full form.
    data : str
        A file below ``--data`` without which it cannot run.
    takes_data : bool
    """

    short: tuple[str, ...]
    needs: tuple[str, ...] = ()
    needs_in_full: tuple[str, ...] = ()
    data: str = ""
    takes_data: bool = False

    def lacks(self, quick: bool, data: Path) -> str:
        """Why it cannot run here; empty if it can."""
        modules = self.needs if quick else self.needs + self.needs_in_full
        absent = [m for m in modules if importlib.util.find_spec(m) is None]
        if absent:
            return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
        if self.data and not (data / self.data).is_file():
            return f"the data folder has no {self.data}"
        return ""


BENCHMARKS = {
    "lrp_speed": Benchmark(("--quick",), ("torchvision",)),
    "explain_speed": Benchmark(("--quick",)),
    "pruning_speed": Benchmark(
        ("--nets", "resnet18", "--pictures", "8", "--batch", "4", "--rounds", "3"), ("torchvision",)
    ),
    "quantizing_speed": Benchmark(("--nets", "resnet20", "--rounds", "2"), (), ("torchvision",)),
    "coder_sizes": Benchmark(("--rounds", "1"), data="cifar10_models/ecqx_resnet20.safetensors", takes_data=True),
    "runtime_forms": Benchmark(
        ("--nets", "resnet20", "--rows", "128", "--rounds", "10"),
        ("onnx", "onnxruntime", "onnxscript", "torchvision"),
        takes_data=True,
    ),
}


def command(name: str, quick: bool, data: Path, output: Path) -> list[str]:
    """The command line of one benchmark."""
    found = BENCHMARKS[name]
    options = [*(found.short if quick else ()), *(("--data", str(data.resolve())) if found.takes_data else ())]
    return [sys.executable, "-m", f"experiments.benchmarks.{name}", *options, "-o", str((output / name).resolve())]


def measure(name: str, quick: bool, data: Path, output: Path) -> str:
    """Run one; its exit status and the last line it wrote to stderr if it failed, else nothing."""
    process = subprocess.Popen(
        command(name, quick, data, output),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,  # its report, which it also writes to a file
        stderr=subprocess.PIPE,
        text=True,
    )
    last = ""
    with process:
        for line in process.stderr or ():
            sys.stderr.write(line)
            last = line.strip() or last
    return "" if process.returncode == 0 else f"exit status {process.returncode}, last words: {last[:300] or 'none'}"


def run(names: Sequence[str], quick: bool, data: Path, output: Path) -> int:
    """Run benchmarks, say of each what became of it, write the table; 1 if one failed."""
    from experiments.benchmarks import summary  # after the arguments are checked: it imports all of them
    from experiments.study import whole

    output.mkdir(parents=True, exist_ok=True)
    kept = output / summary.KEPT
    said: dict[str, str] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    failed = False
    for name in names:
        before = time.monotonic()
        why, said[name] = BENCHMARKS[name].lacks(quick, data), ""
        if why:
            said[name] = f"skipped: {why}"
        else:
            print(f"{name}: running", file=sys.stderr)
            if why := measure(name, quick, data, output):
                failed = True
                said[name] = f"failed: {why}"
            elif quick:
                said[name] = "A short run, to see that it works and roughly where it stands: no result"
        if why and any((output / name).glob("*.json")):
            said[name] += " (what is stored here is of an earlier run, or of a part of this one)"
        print(f"{name}: {said[name] or 'done'}  {time.monotonic() - before:.0f} s")
        with whole(kept) as temporary:  # after each: a long run that is stopped leaves what it has
            temporary.write_text(json.dumps({n: s for n, s in said.items() if s}, indent=1) + "\n", encoding="utf-8")
    print(summary.write(output))
    return int(failed)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the short form of each")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds cifar10_models and cifar10")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("-o", "--output", type=Path, default=Path("out/benchmarks"), metavar="FOLDER",
                        help="each gets a folder of its name there")  # fmt: skip
    table = parser.add_subparsers(dest="command", metavar="table").add_parser("table", help="only write the table")
    table.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit status: 2 for wrong use, 1 if a benchmark failed or no table can be written."""
    given = _arguments(argv)
    try:
        if given.command == "table":
            from experiments.benchmarks import summary

            print(summary.write(given.folder))
            return 0
        return run(given.only or list(BENCHMARKS), given.quick, given.data, given.output)
    except LRPError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is done is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
