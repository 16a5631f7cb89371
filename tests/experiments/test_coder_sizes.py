"""The benchmark of coders: its whole numbers are those of the reference table, and our files are small enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks import coder_sizes as bench

# of the reference table: entropy, zlib-9 and zstd-19 (the smaller of plain and packed)
KNOWN = {
    (2, 0.0): (12277, 16463, 13419),
    (2, 0.05): (9735, 13309, 11055),
    (2, 0.2): (4944, 7042, 6138),
    (3, 0.0): (57793, 66112, 60688),
    (3, 0.05): (53745, 62170, 56784),
    (3, 0.2): (43500, 51648, 47723),
    (4, 0.0): (95952, 107215, 93674),
    (4, 0.05): (86020, 98294, 85067),
    (4, 0.2): (48585, 59327, 52618),
    (5, 0.0): (131999, 144513, 130725),
    (5, 0.05): (95483, 111532, 97555),
    (5, 0.2): (43535, 54863, 49516),
}


@pytest.mark.slow
@pytest.mark.data
def test_sizes_of_the_reference_network(data: Path) -> None:
    """Whole files, names and checksums included: smaller than NNC and than zstd, on every row."""
    rows = bench.sizes(data / "cifar10_models" / "ecqx_resnet20.safetensors")
    assert {(r["bits"], r["gamma"]) for r in rows} == set(KNOWN)
    for row in rows:
        entropy, zlib, zstd = KNOWN[row["bits"], row["gamma"]]
        assert round(row["entropy"]) == entropy
        assert row["zlib9"] == pytest.approx(zlib, rel=0.01)  # zlib has more than one implementation
        assert row["codes"] < row["file"] < row["nnc"]
        assert row["file"] < zstd
        assert row["file"] < row["model_file"] < row["file"] + 13_000  # 11,048 bytes of floats, their names and shapes


def test_what_is_told() -> None:
    folder = Path(__file__).parents[2] / "experiments" / "results" / "coder_sizes"
    assert bench.markdown(json.loads((folder / "result.json").read_text())) == (folder / "result.md").read_text()
