"""The command lines, run as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "neuralize", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def in_process(program: str, main: Callable[[], None], *, split: bool = False) -> Any:
    """A fixture that runs a program's ``main`` in this process: starting one takes seconds.

    ``split``: words are split at spaces, but for paths.
    """

    @pytest.fixture
    def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
        def call(*words: str | Path) -> Done:
            parts = [p for word in words for p in (word.split() if split and isinstance(word, str) else [str(word)])]
            monkeypatch.setattr(sys, "argv", [program, *parts])
            with pytest.raises(SystemExit) as stop:
                main()
            out, err = capsys.readouterr()
            return Done(int(stop.value.code or 0), out, err)

        return call

    return here


def wrong(result: Done | subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not result.stdout
