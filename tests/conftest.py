"""Fixtures shared by all tests: the data folder, and peers that may be absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is no CUDA device: said here, once."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def data_folder() -> Path:
    return Path(os.environ.get("NEURALIZE_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def data() -> Path:
    """The folder of real data; the test is skipped where it is absent."""
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(f"needs the data folder ({folder}); set NEURALIZE_DATA to its place")
    return folder
