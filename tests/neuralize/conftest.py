"""Real tables, and a slow reference that shares no code with the package."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets

DATA = Path(os.environ.get("NEURALIZE_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def bundled(name: str) -> pd.DataFrame:
    return getattr(datasets, f"load_{name}")(as_frame=True).data


@pytest.fixture(scope="session")
def wine() -> pd.DataFrame:
    return bundled("wine")


@pytest.fixture(scope="session")
def tabular() -> Callable[..., pd.DataFrame]:
    def read(name: str, **options: Any) -> pd.DataFrame:
        path = DATA / "tabular" / name
        if not path.is_file():
            pytest.skip(f"needs {path}: set NEURALIZE_DATA to the data folder")
        return pd.read_csv(path, **options)

    return read


def _materialised(
    z: np.ndarray, mu: np.ndarray, c: int, beta: float, divided: bool, contrast: int | None = None
) -> tuple[np.ndarray, float, float]:
    """(R, residual, output) of one scaled row: every pair unit, its midpoint, one loop per unit."""
    others = [k for k in range(len(mu)) if k != c] if contrast is None else [contrast]
    units = []
    for k in others:
        w = 2 * (mu[c] - mu[k])
        terms = w * (z - (mu[c] + mu[k]) / 2)
        units.append((k, terms, float(((z - mu[k]) ** 2).sum() - ((z - mu[c]) ** 2).sum())))
    h = np.array([u[2] for u in units])
    f = float(h.min())
    p = (h == f).astype(float) if np.isinf(beta) else np.exp(-beta * (h - f))
    p /= p.sum()
    R = np.zeros_like(z)
    for share, (_, terms, value) in zip(p, units, strict=True):
        ratio = 1.0
        if divided and value != 0:
            ratio = f / value
        R += share * ratio * terms
    return R, 0.0 if divided else f - float(p @ h), f


@pytest.fixture(scope="session")
def materialised() -> Callable[..., tuple[np.ndarray, float, float]]:
    return _materialised
