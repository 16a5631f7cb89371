"""The demo on digits: its split is fixed, and what it writes is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import compress
from compress.evaluation import evaluate
from experiments import digits


def test_parts_are_fixed_and_apart() -> None:
    parts = digits.split()
    assert {name: len(y) for name, (_, y) in parts.items()} == {"train": 1000, "validation": 347, "test": 450}
    everything = torch.cat([x.flatten(1) for x, _ in parts.values()])
    assert len(torch.unique(everything, dim=0)) == 1797
    assert torch.equal(digits.split()["test"][0], parts["test"][0])
    assert torch.equal(digits.test()[1], parts["test"][1])
    for x, _ in parts.values():
        assert 0 <= float(x.min()) <= float(x.max()) <= 1


def test_reference_samples_are_of_the_training_part() -> None:
    ((x, y),) = digits.few()
    assert torch.bincount(y).tolist() == [10] * 10
    known = {tuple(row) for row in digits.training()[0].flatten(1).tolist()}
    assert all(tuple(row) in known for row in x.flatten(1).tolist())
    ((other, _),) = digits.few(draw=1)
    assert not torch.equal(x, other)


def test_size_of_the_network() -> None:
    found = compress.count(digits.build(), torch.zeros(1, 1, 8, 8))
    assert (found.macs, found.params) == (387_712, 38_122)


def test_the_trained_network_is_kept(tmp_path: Path) -> None:
    first = digits.train(tmp_path, epochs=1)
    again = digits.train(tmp_path)
    assert (tmp_path / "trained.safetensors").is_file()
    for name, t in again.state_dict().items():
        assert torch.equal(t, first.state_dict()[name])
    assert not again.training


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    found = digits.run(tmp_path, draws=2, rates=(0.3, 0.5), rivals=False)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "index.html", "model.onnx", "model.safetensors", "plan.json", "report.json", "trained.safetensors"
    ]  # fmt: skip
    assert found.met
    assert 0.45 < found.after.costs.macs / found.before.costs.macs <= 0.5
    small = compress.load(tmp_path / "model.safetensors", digits.build)
    accuracy = evaluate(small, [digits.test()]).accuracy
    assert found.after.evaluation is not None
    assert found.before.evaluation is not None
    assert found.after.evaluation.accuracy == accuracy
    assert found.before.evaluation.accuracy > 0.98
    assert accuracy > 0.96
    stored = json.loads((tmp_path / "report.json").read_text())
    assert {c["criterion"] for c in stored["sections"]["comparison"]["curves"]} >= {"random", "weight", "activation"}
    assert found.after.file_bytes == (tmp_path / "model.safetensors").stat().st_size
