"""One run of an experiment: its settings, its finished cells on disk, what it writes in the end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from experiments import data as sets
from experiments.cells import Cells
from experiments.experiment import Experiment, Report
from lrp.errors import DataError, FileFormatError, MismatchError

__all__ = ["Study", "TimeIsOverError", "claims_table", "commit", "whole"]

T = TypeVar("T")
PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "torch-pruning", "matplotlib")
VERSION = 1


class TimeIsOverError(Exception):
    """The seconds that were given are spent; what is done is kept."""


class Study:
    """A run of an experiment in a folder of its own.

    Parameters
    ----------
    experiment : Experiment
    folder : path
        Holds ``result.json`` with all rows once the work is done, ``cells.jsonl`` with those that are newer, and
        ``cache/`` with what can be computed again (trained networks).
    quick : bool
    seeds : int, optional
        In place of the number in the settings; a later run may have more.
    data : path, optional
        The folder of real data.
    device : str
    seconds : float
        No cell begins after these.
    part : (int, int), optional
        (k, n): only every n-th cell, from the k-th, into a file of its own, for n processes at a time. A call
        without it takes all parts together and writes the page.

    Raises
    ------
    MismatchError
        If the folder holds rows under other settings.
    FileFormatError
        If ``result.json`` can not be read.

    Examples
    --------
    >>> import tempfile
    >>> from experiments.experiment import Experiment, Report, Table
    >>> def work(study):
    ...     for seed in study.seeds:
    ...         study.cell(f"square|{seed}", lambda: {"seed": seed, "value": seed**2})
    >>> def report(study):
    ...     return Report([], {"squares": Table("Squares", ["seed", "value"], study.columns("seed", "value"))})
    >>> squares = Experiment("squares", "none", "how large?", {"seeds": 3}, {"seeds": 2}, work, report)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Study(squares, folder, quick=True).run(), len(Study(squares, folder, quick=True).rows)
    (True, 2)
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: str | os.PathLike[str],
        *,
        quick: bool = False,
        seeds: int | None = None,
        data: str | Path | None = None,
        device: str = "cpu",
        seconds: float = float("inf"),
        part: tuple[int, int] | None = None,
    ) -> None:
        self.experiment, self.folder, self.quick, self.device = experiment, Path(folder), quick, device
        settings = dict(experiment.quick if quick else experiment.full)
        if seeds is not None:
            settings["seeds"] = seeds
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._data, self._until = data, time.monotonic() + seconds
        held = self._held()
        self._runs: list[dict[str, Any]] = list(held.get("runs", ()))
        self._lock: int | None = None
        self._origin: dict[str, Any] = {}
        self._began, self._computed, self.complete = time.monotonic(), 0, False
        self._part, self._seen = part, 0
        own = self.folder / ("cells.jsonl" if part is None else f"cells-{part[0]}-of-{part[1]}.jsonl")
        self._fresh = not own.exists()
        self.cells = Cells(own, mend=False)
        found = self.cells.rows
        self.cells.rows = {row["key"]: row for row in held.get("rows", ())}
        self._take(found)
        for path in sorted(self.folder.glob("cells*.jsonl")):
            if path != own:
                self._take(Cells(path, mend=False).rows)

    # -- what the work asks for ---------------------------------------------
    @property
    def seeds(self) -> range:
        """As many as the settings say."""
        return range(int(self.settings["seeds"]))

    @property
    def data(self) -> Path:
        """The folder of real data."""
        return sets.folder(self._data)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All finished cells."""
        return list(self.cells.rows.values())

    def columns(self, *names: str) -> list[list[Any]]:
        """Of every row these values; None where a row has none."""
        return [[row.get(name) for name in names] for row in self.rows]

    def cell(self, key: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The row of a cell, computed unless it is there; of a cell of another part, nothing.

        Raises
        ------
        TimeIsOverError
        """
        self._seen += 1
        if key not in self.cells.rows:
            if self._part is not None and (self._seen - 1) % self._part[1] != self._part[0]:
                return {}
            if time.monotonic() > self._until:
                raise TimeIsOverError
            self._begin()
            row = json.loads(json.dumps(dict(compute())))
            self.cells.add(key, **row)
            self._computed += 1
        return self.cells.rows[key]

    def _begin(self) -> None:
        """Before the first cell of a call: alone in the file, with its settings and where its cells come from."""
        if self._lock is not None:
            return
        self._lock = _locked(self.cells.path)
        Cells(self.cells.path)  # mends the file
        if self._fresh:  # a folder that is only read stays as it is
            self.cells.add("settings", settings=self._fixed())
            self.cells.rows.pop("settings")
        key = f"{_RUN}{time.time()}"
        self._origin = self._this_run()
        self.cells.add(key, **self._origin)
        self.cells.rows.pop(key)

    def _take(self, rows: Mapping[str, dict[str, Any]]) -> None:
        """Cells that a call which was stopped has left, with where they come from."""
        run: dict[str, Any] | None = None
        for key, row in rows.items():
            if key.startswith(_RUN):
                run = {**{k: v for k, v in row.items() if k != "key"}, "cells": 0, "seconds": None}
                self._runs.append(run)
            elif key != "settings":
                self.cells.rows[key] = row
                if run is not None:
                    run["cells"] += 1

    def has(self, keys: Iterable[str]) -> bool:
        """Whether all of these cells are there, so that what they share need not be made."""
        return all(key in self.cells.rows for key in keys)

    def weights(self, name: str, train: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A state that takes long to make, kept in the cache of this folder."""
        from safetensors.torch import load_file, save_file

        path = self.folder / "cache" / f"{name}.safetensors"
        if not path.exists():
            if time.monotonic() > self._until:
                raise TimeIsOverError
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {k: t.detach().cpu().contiguous().clone() for k, t in train().items()}
            with whole(path) as temporary:
                save_file(state, temporary)
        return load_file(path)

    def progress(self, items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
        """Items behind a bar that shows only on a terminal."""
        yield from tqdm(items, desc=f"{self.experiment.name}: {text}", total=total, disable=None, leave=False)

    # -- from beginning to end ----------------------------------------------
    def run(self) -> bool:
        """Work, then write; False if the time was over before all was done.

        Raises
        ------
        DataError
            If another process computes cells of the same file.
        """
        try:
            try:
                self.experiment.work(self)
                self.complete = True
            except TimeIsOverError:
                self.complete = False
            if self.rows and self._part is None:
                self.write(self.experiment.report(self))
        finally:
            self._release()
        return self.complete

    def rewrite(self) -> None:
        """The page from the rows that are there, without work."""
        path = self.folder / "result.json"
        self.complete = path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["complete"])
        self.write(self.experiment.report(self))

    def write(self, report: Report) -> None:
        """``result.json``, ``result.md``, a CSV file per table, an SVG and a PNG per figure."""
        import matplotlib
        import matplotlib.pyplot as plt

        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = _locked(self.cells.path)
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        head = json.dumps({**self._about(report), "rows": None}, indent=1)
        _put(self.folder / "result.json", head.replace('"rows": null', f'"rows": [\n  {rows}\n ]') + "\n")
        for name, table in report.tables.items():
            _put(self.folder / f"{name}.csv", table.csv())
        for name, figure in report.figures.items():
            with matplotlib.rc_context({"svg.hashsalt": name}):  # the same picture, the same file
                for kind in ("svg", "png"):
                    path = self.folder / f"{name}.{kind}"
                    figure.savefig(path, dpi=120, bbox_inches="tight", metadata=_UNDATED[kind])
            plt.close(figure)
        _put(self.folder / "result.md", self._page(report))
        for path in self.folder.glob("cells*.jsonl"):
            path.unlink()  # result.json has them all
        self._release()

    # -- private ------------------------------------------------------------
    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self.cells.path.with_suffix(".lock").unlink(missing_ok=True)
            self._lock = None

    def _fixed(self) -> dict[str, Any]:
        """Settings that all rows share."""
        return {name: value for name, value in self.settings.items() if name != "seeds"}

    def _held(self) -> dict[str, Any]:
        """What an earlier run left, of the same settings."""
        path = self.folder / "result.json"
        held: dict[str, Any] = {}
        if path.exists():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
                known = {name: value for name, value in held["settings"].items() if name != "seeds"}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FileFormatError(
                    f"{path} can not be read",
                    expected="what an earlier run of this experiment wrote",
                    got=f"{type(error).__name__}: {error}",
                    fix="name another folder with -o, or move the file away",
                ) from error
            self._agree(known, path)
        for cells in self.folder.glob("cells*.jsonl"):
            first = Cells(cells, mend=False).rows.get("settings")
            if first is not None:
                self._agree(first["settings"], cells)
        return held

    def _agree(self, known: Mapping[str, Any], path: Path) -> None:
        differing = [n for n in sorted({*known, *self._fixed()}) if known.get(n) != self._fixed().get(n)]
        if differing:
            name = differing[0]
            raise MismatchError(
                f"{path} was made under other settings",
                expected=f"{name}={self._fixed().get(name)!r}",
                got=f"{name}={known.get(name)!r}",
                fix="name another folder with -o, or remove this one; a quick run and a full one need two",
            )

    def _about(self, report: Report) -> dict[str, Any]:
        experiment = self.experiment
        return {
            "name": experiment.name,
            "paper": experiment.paper,
            "question": experiment.question,
            "settings": self.settings,
            "quick": self.quick,
            "complete": self.complete,
            "runs": self._runs + ([self._this_run() | {"commit": self._origin["commit"]}] if self._computed else []),
            "summary": report.summary,
            "words": list(report.words),
            "claims": [vars(claim) for claim in report.claims],
            "wins": list(report.wins),
            "losses": list(report.losses),
            "figures": list(report.figures),
        }

    def _this_run(self) -> dict[str, Any]:
        """Where the cells of this call come from."""
        return {
            "cells": self._computed,
            "commit": commit(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "device": self.device if self.device == "cpu" else torch.cuda.get_device_name(self.device),
            "seconds": round(time.monotonic() - self._began, 1),
        }

    def _page(self, report: Report) -> str:
        e = self.experiment
        how = f"`python -m experiments run {e.name}{' --data DIR' if e.data else ''}{' --quick' if self.quick else ''}`"
        unfinished = "" if self.complete else " Not all cells are done."
        lines = [f"# {e.question}", "", f"{e.paper}. {how}; all numbers are in `result.json`.{unfinished}", ""]
        if self.quick:
            lines += ["**A quick run**: it shows that the code runs, and is no result.", ""]
        for text in report.words:
            lines += [text, ""]
        if report.claims:
            lines += [claims_table([vars(c) for c in report.claims]), ""]
        for name in report.figures:
            lines += [f"![{name}]({name}.svg)", ""]
        for table in report.tables.values():
            lines += [f"## {table.title}", "", table.markdown(), ""]
            if table.note:
                lines += [table.note, ""]
        lines += ["## Settings", "", "```json", json.dumps(self.settings, indent=1), "```", ""]
        return "\n".join(lines)


_RUN = "run of "


def _locked(path: Path) -> int:
    """A handle of a file beside this one that no other process can have; it is free again when its process ends.

    Raises
    ------
    DataError
        If another process has it.
    """
    handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise DataError(
            f"another process is at work on {path}",
            expected="one process per file",
            got="a lock that is held",
            fix="wait for it, deal the cells with --part, or name another folder with -o",
        ) from error
    return handle


_UNDATED: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "png": {"Software": None}}


def claims_table(claims: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: what was claimed, the published value, ours, the verdict and why."""
    lines = ["| claim | published | ours | verdict | why |", "|---|---|---|---|---|"]
    for c in claims:
        cells = [str(c[name]).replace("|", "\\|") for name in ("claim", "published", "ours", "verdict", "why")]
        cells[3] = f"**{cells[3]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def commit() -> str | None:
    """Of the checkout, with a plus where files were changed; None without git."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{found}+" if changed else found


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside this one that takes its place at the end: a kill leaves what was there."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _put(path: Path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
