"""Cells on disk: what is finished stays, whatever kills the run, and nothing else is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress._cells import opened, weights_of
from lrp.errors import DataError, FileFormatError, MismatchError

SETTINGS = {"weights": "abc", "rates": [0.1, 0.2], "nested": {"a": None}}
VALUES: list[Any] = [1 / 3, [0.1, 1e-300, -0.0, 2**60], {"accuracy": 0.1 + 0.2, "who": "Grün\n"}, None, True]


def fill(
    path: Path | None, upto: int = len(VALUES), settings: Any = SETTINGS, kind: str = "test"
) -> tuple[list[Any], int]:
    """Values of the first cells, and how many were computed."""
    computed = 0

    def compute(k: int) -> Any:
        nonlocal computed
        computed += 1
        return VALUES[k]

    with opened(path, kind, settings) as cells:
        got = [cells.value(["cell", k, 0.1 * k], lambda k=k: compute(k)) for k in range(upto)]
    return got, computed


def test_values_come_back_exactly_and_are_computed_once(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    assert fill(path, 3) == (VALUES[:3], 3)
    assert fill(path) == (VALUES, 2)
    assert fill(path) == (VALUES, 0)
    assert fill(None) == (VALUES, 5)


def test_a_value_is_the_same_when_computed_and_when_read(tmp_path: Path) -> None:
    for path in (None, tmp_path / "cells"):
        with opened(path, "test", {}) as cells:
            first = cells.value(["a"], lambda: {"pair": (1, 2), 3: 0.5})
        assert first == {"pair": [1, 2], "3": 0.5}
    with opened(tmp_path / "cells", "test", {}) as cells:
        assert ["a"] in cells
        assert ["b"] not in cells
        assert cells.value(["a"], lambda: pytest.fail("computed again")) == first


def test_a_file_cut_at_any_byte_goes_on_with_the_whole_lines(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    fill(whole)
    held = whole.read_bytes()
    ends = [k + d for k, byte in enumerate(held) if byte == ord("\n") for d in (-1, 0, 1, 2)]
    for size in sorted({*range(0, len(held), 7), *(k for k in ends if k < len(held))}):
        path = tmp_path / "cut"
        path.write_bytes(held[:size])
        lines = held[:size].count(b"\n")
        got, computed = fill(path)
        assert got == VALUES
        assert computed == len(VALUES) - max(0, lines - 1)
        assert path.read_bytes() == held


def test_a_power_failure_may_leave_zeros_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    fill(path, 2)
    held = path.read_bytes()
    path.write_bytes(held + b"\0" * 512)
    assert fill(path) == (VALUES, 3)


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    digit = lines[1].index(b"0.333")
    lines[1] = lines[1][:digit] + b"0.334" + lines[1][digit + 5 :]  # still JSON: only the checksum can tell
    path.write_bytes(b"".join(lines))
    with pytest.raises(FileFormatError, match="damaged at byte"):
        fill(path)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "content", [b"my thesis\n", b"my thesis", b'{"format": "compress.other"}\n', b"[1]\n", b"\xff\xfe"]
)
def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="name another file"):
        fill(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "kind", "named"),
    [
        ({**SETTINGS, "weights": "abd"}, "test", "'weights' differs"),
        ({**SETTINGS, "more": 1}, "test", "'more' differs"),
        ({"weights": "abc", "rates": [0.1, 0.2]}, "test", "'nested' differs"),
        (SETTINGS, "others", "its kind differs"),
    ],
)
def test_cells_of_other_work_are_refused_and_stay(tmp_path: Path, settings: Any, kind: str, named: str) -> None:
    path = tmp_path / "cells"
    fill(path)
    held = path.read_bytes()
    with pytest.raises(MismatchError, match=named):
        fill(path, settings=settings, kind=kind)
    assert path.read_bytes() == held


def test_an_error_in_a_cell_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    fill(path, 2)
    with pytest.raises(ZeroDivisionError), opened(path, "test", SETTINGS) as cells:
        cells.value(["bad"], lambda: 1 / 0)
    assert fill(path) == (VALUES, 3)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="existing folder"):
        fill(tmp_path / "none" / "cells")


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    with opened(path, "test", SETTINGS), pytest.raises(DataError, match="another process"):
        fill(path)
    assert fill(path)[0] == VALUES


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    from compress._cells import Cells

    handle = os.open(full, os.O_WRONLY)
    try:
        with pytest.raises(DataError, match="make space"):
            Cells(handle, full, {}).value(["a"], lambda: 1)
    finally:
        os.close(handle)


KILLED = """
    import sys, time
    from compress._cells import opened

    with opened(sys.argv[1], "killed", {}) as cells:
        for k in range(2000):
            cells.value([k], lambda: [k / 7] * 50)
"""


def test_kill_9_loses_no_finished_cell(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(path)])
    try:
        deadline = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size < 20_000) and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = path.read_bytes().count(b"\n") - 1
    assert done >= 1
    computed = 0

    def again(k: int) -> list[float]:
        nonlocal computed
        computed += 1
        return [k / 7] * 50

    with opened(path, "killed", {}) as cells:
        assert cells.found == done
        for k in range(done + 3):
            assert cells.value([k], lambda k=k: again(k)) == [k / 7] * 50
    assert computed == 3
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [row["cell"] for row in rows] == [[k] for k in range(done + 3)]


def test_a_network_is_told_by_weights_and_by_settings_without_weights() -> None:
    def build(stride: int = 1, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3, stride), nn.BatchNorm2d(2))

    first = weights_of(build())
    assert weights_of(build()) == first
    assert weights_of(build(seed=1)) != first
    assert weights_of(build(stride=2)) != first
    moved = build()
    moved[1].running_mean += 1  # type: ignore[index,operator]
    assert weights_of(moved) != first
