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


def test_quantized_networks_are_trained_on_the_training_part_only() -> None:
    """The epoch is chosen by the validation part; the test part is for the final numbers."""
    teacher = digits.build()
    tune = digits.tuning(teacher, 1)
    x, y = tune.data
    assert torch.equal(x, digits.training()[0])
    assert torch.equal(y, digits.training()[1])
    ((held, _),) = tune.validation
    assert torch.equal(held, digits.validation()[0])
    assert tune.distill is not None
    assert tune.distill.teacher is teacher


def test_the_quantized_network_holds_its_rate(tmp_path: Path) -> None:
    model = digits.train(tmp_path, epochs=2)
    small = digits.quantized(model, model, epochs=1)
    assert small.reached.bits_per_weight <= 1
    assert small.training is not None
    assert small.training.best == 1
    assert {book.bits for book in small.plan.codebooks.values()} == {4, 8}
    assert small.evaluation is None  # the run has seen no test samples


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    way = digits.run(tmp_path, draws=2, rates=(0.3, 0.5), rivals=False, seeds=1, epochs=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "index.html", "pruned", "quantized", "stages.json", "trained-network.safetensors", "trained.safetensors"
    ]  # fmt: skip
    pruned, quantized = tmp_path / "pruned", tmp_path / "quantized"
    assert sorted(p.name for p in pruned.iterdir()) == [
        "index.html", "model.onnx", "model.safetensors", "plan.json", "report.json"
    ]  # fmt: skip
    assert sorted(p.name for p in quantized.iterdir()) == [
        "a8w8.onnx", "fp32.onnx", "index.html", "int8.onnx", "model.compressed", "plan.json", "report.json",
        "trained.onnx",
    ]  # fmt: skip
    found = compress.Report.load(pruned / "report.json")
    assert found.met
    assert 0.45 < found.after.costs.macs / found.before.costs.macs <= 0.5
    small = compress.load(pruned / "model.safetensors", digits.build)
    accuracy = evaluate(small, [digits.test()]).accuracy
    assert found.after.evaluation is not None
    assert found.before.evaluation is not None
    assert found.after.evaluation.accuracy == accuracy
    assert found.before.evaluation.accuracy > 0.98
    assert accuracy > 0.96
    stored = json.loads((pruned / "report.json").read_text())
    assert {c["criterion"] for c in stored["sections"]["comparison"]["curves"]} >= {"random", "weight", "activation"}
    assert found.after.file_bytes == (pruned / "model.safetensors").stat().st_size
    last = compress.QuantizationReport.load(quantized / "report.json")
    tiny = compress.load(quantized / "model.compressed", digits.build)
    assert last.after.evaluation is not None
    assert last.after.evaluation.accuracy == evaluate(tiny, [digits.test()]).accuracy > 0.95
    assert last.before.file_bytes == found.after.file_bytes
    assert not [note for note in last.notes if "architecture before pruning" in note]
    assert [s.name for s in way.stages] == ["trained", "pruned", "quantized", "ONNX fp32", "ONNX int8", "ONNX a8w8"]
    sizes = {s.name: s.bytes for s in way.stages}
    assert sizes["quantized"] == (quantized / "model.compressed").stat().st_size < sizes["trained"] / 15
    assert sizes["ONNX int8"] == (quantized / "int8.onnx").stat().st_size
    assert way.stages[2].accuracy == last.after.evaluation.accuracy
    assert way.stages[0].ms is not None
    page = (tmp_path / "index.html").read_text()
    for link in ("pruned/index.html", "quantized/index.html"):
        assert f'href="{link}"' in page
        assert (tmp_path / link).is_file()
