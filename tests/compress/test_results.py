"""Intervals against naive resampling, and what results share: tables and files."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import compress
from compress._results import (
    Result,
    aligned,
    as_csv,
    as_markdown,
    checked_rates,
    mean_interval,
    pairs_interval,
)
from compress.comparison import Comparison, Curve
from compress.drift import Agreement, Drift, SampleDrift
from compress.search import SearchResult, Trial
from compress.sensitivity import Row, Sensitivity
from compress.stability import RankCorrelation, Stability
from lrp.errors import FileFormatError, InputError


def symmetric(n: int, seed: int = 0) -> Any:
    m = np.random.default_rng(seed).random((n, n))
    return (m + m.T) / 2


def test_the_mean_of_pairs_is_that_of_a_double_loop() -> None:
    m = symmetric(9)
    pairs = [m[i, j] for i in range(9) for j in range(i)]
    assert pairs_interval(m)[0] == pytest.approx(np.mean(pairs), abs=1e-14)
    other = m.copy()
    np.fill_diagonal(other, 99.0)
    assert pairs_interval(other) == pairs_interval(m)


def test_the_interval_of_pairs_is_that_of_naive_resampling() -> None:
    n, m = 7, symmetric(7, 1)
    copies = np.random.default_rng(5).multinomial(n, np.full(n, 1 / n), size=2000)
    means = []
    for row in copies:
        drawn = [i for i, c in enumerate(row) for _ in range(c)]
        values = [m[a, b] for k, a in enumerate(drawn) for b in drawn[:k] if a != b]
        if values:
            means.append(np.mean(values))
    low, high = np.quantile(means, [0.025, 0.975])
    assert pairs_interval(m, seed=5) == pytest.approx((np.mean(m[~np.eye(n, dtype=bool)]), low, high), abs=1e-12)


@pytest.mark.slow
def test_the_interval_of_pairs_covers_the_truth() -> None:
    """Sets of random size-5 subsets with a draw-specific bias; the truth by brute force over many draws."""
    rng = np.random.default_rng(0)

    def member(n: int) -> Any:
        strength = rng.normal(size=(n, 1)) * 0.7
        scores = np.linspace(0, 2, 20) * (1 + strength) + rng.normal(size=(n, 20))
        chosen = np.zeros((n, 20))
        np.put_along_axis(chosen, np.argsort(scores, axis=1)[:, :5], 1.0, axis=1)
        return chosen

    many = member(4000)
    together = many @ many.T / 5
    truth = (together.sum() - np.trace(together)) / (4000 * 3999)
    hits = 0
    for trial in range(300):
        own = member(20)
        _, low, high = pairs_interval(own @ own.T / 5, seed=trial)
        hits += low <= truth <= high
    assert 0.88 <= hits / 300 <= 0.99


def test_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = mean_interval(values, seed=1)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert mean_interval(np.array([0.25])) == (0.25, 0.25)
    assert mean_interval(values, seed=1) == (low, high)


def test_rates_are_shares() -> None:
    assert checked_rates((0.5, 0.1, 0.5, 0)) == (0.0, 0.1, 0.5)
    assert checked_rates(np.array([0.25])) == (0.25,)  # type: ignore[arg-type]
    for wrong in ((), (1.0,), (-0.1,), ("0.1",), "0.1", (True,), (float("nan"),), None):
        with pytest.raises(InputError, match="no shares to remove"):
            checked_rates(wrong)  # type: ignore[arg-type]


ROWS = [("name", "a"), ("x|y", "1.5"), ("longer, name", "10")]


def test_tables() -> None:
    assert aligned(ROWS).splitlines() == ["name            a", "x|y           1.5", "longer, name   10"]
    assert as_markdown(ROWS).splitlines() == [
        "| name | a |",
        "|---|---:|",
        "| x\\|y | 1.5 |",
        "| longer, name | 10 |",
    ]
    assert list(csv.reader(io.StringIO(as_csv(ROWS)))) == [list(row) for row in ROWS]


@dataclass(frozen=True)
class Pair(Result):
    FORMAT: ClassVar[str] = "test.Pair"
    first: int
    second: tuple[float, ...]

    def _held(self) -> dict[str, Any]:
        return {"first": self.first, "second": list(self.second)}

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> Pair:
        return cls(int(stored["first"]), tuple(float(v) for v in stored["second"]))


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    pair = Pair(3, (1 / 3, -0.0))
    pair.save(tmp_path / "pair.json")
    assert Pair.load(tmp_path / "pair.json") == pair
    assert [p.name for p in tmp_path.iterdir()] == ["pair.json"]


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    held = Pair(3, (1.0,)).to_json()
    for wrong in ({**held, "version": 2}, {**held, "format": "x"}, [], None):
        with pytest.raises(FileFormatError, match="this is no Pair"):
            Pair.from_json(wrong)
    for wrong in ({**held, "first": "three"}, {k: v for k, v in held.items() if k != "second"}, {**held, "second": 1}):
        with pytest.raises(FileFormatError, match="the Pair is damaged"):
            Pair.from_json(wrong)
    path = tmp_path / "pair.json"
    path.write_text("{" * 3)
    with pytest.raises(FileFormatError, match="can not be read"):
        Pair.load(path)
    with pytest.raises(FileNotFoundError):
        Pair.load(tmp_path / "none.json")


def test_analyses_import_nothing_that_only_pictures_and_searches_need() -> None:
    modules = ("sensitivity", "stability", "drift", "comparison", "search")
    code = f"import sys, {', '.join(f'compress.{m}' for m in modules)}; print([m for m in sys.modules])"
    root = str(Path(compress.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    for name in ("matplotlib", "sklearn", "onnx", "captum"):
        assert f"'{name}'" not in done.stdout, name


def test_what_a_result_is_of_fits_into_a_line() -> None:
    """All of it, sample by sample, is what to_json is for."""
    drifts = tuple(SampleDrift(k, 0, 0, 0, 0, 0.9, 0.8, 0.7) for k in range(500))
    trial = Trial({"all": "zplus"}, 0.75, (0.75,) * 99)
    for found, told in (
        (Comparison((0.5,), "macs", (Curve("lrp", "none", False, ((0.9,),) * 99, (0.5,)),), 0.99),
         "Comparison(lrp at 50% of the macs removed; unpruned 0.9900)"),
        (Stability((), (RankCorrelation(5, 0.5, 0.4, 0.6),), 20, True), "Stability(20 draws of 5 samples per class)"),
        (Drift(drifts, {"cosine": Agreement(0.9, 0.8, 1.0, 500)}), "Drift(500 samples: cosine 0.900)"),
        (Sensitivity((0.5, 0.7), (Row("a", ("a",), 4, (0.9, 0.8), (2, 3)),), 0.95),
         "Sensitivity(rows: 1, rates: 2; unpruned 0.9500)"),
        (SearchResult((trial,), (0.5,) * 99, {"all": ("a",)}, (), 0.9),
         "SearchResult(best of 1: zplus, area 0.7500)"),
    ):  # fmt: skip
        assert repr(found) == told
