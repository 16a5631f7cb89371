"""The benchmark of pruning: what it measures and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import models
from lrp.errors import MissingDependencyError


@pytest.mark.slow
def test_a_run_in_small(tmp_path: Path) -> None:
    from experiments.benchmarks import pruning_speed as speed

    try:
        models.torchvision_models()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    speed.main(
        [
            "--nets",
            "resnet18",
            "--pixels",
            "32",
            "--pictures",
            "2",
            "--batch",
            "1",
            "--rounds",
            "1",
            "-o",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    (case,) = result["scoring"]
    assert set(case["ratios"]) == set(speed.CRITERIA)
    base, other = case["rounds"][0][speed.BASE], case["rounds"][0]["lrp:zplus"]
    assert case["ratios"]["lrp:zplus"]["median"] == pytest.approx(other / base)
    row = result["planning"]["resnet50"]
    assert row["total"] == pytest.approx(row["structure"] + row["plan"] + row["cut"])
    assert f"{row['total']:.2f}" in (tmp_path / "result.md").read_text()
