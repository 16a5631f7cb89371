"""The benchmark of lrp: complete, honest about refusals, readable. No times are asserted."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lrp
from experiments.benchmarks import lrp_memory, lrp_methods, lrp_peers, lrp_report, lrp_speed, measuring

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs torchvision's model definitions: make peers"
)
TINY = ["--pixels", "32", "--batches", "1", "--rounds", "2", "--classes", "10", "--no-memory", "--no-cold"]


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_every_composite_is_found() -> None:
    found = lrp_methods.composites()
    assert {"epsilon", "epsilon_plus", "epsilon_gamma_box", "gradient", "gradient_x_input"} <= set(found)
    assert "resolve" not in found
    for name, make in found.items():
        assert make().name == name


@pytest.mark.slow
@needs_torchvision
def test_structure(tmp_path: Path) -> None:
    """All composites and variants of one network; peers refuse with a reason or give a figure."""
    lrp_speed.main(["--nets", "resnet18", *TINY, "-o", str(tmp_path), "--json", str(tmp_path / "again.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads((tmp_path / "again.json").read_text())
    (case,) = result["cases"]
    for name in lrp_methods.composites():
        assert f"lrp {name}" in case["ratios"]
    assert set(case["ratios"]) | set(case["refused"]) == set(result["methods"]) - {lrp_methods.PLAIN}
    assert not set(case["ratios"]) & set(case["refused"])
    assert {"lrp epsilon weights", "lrp epsilon_plus ledger"} <= set(case["ratios"])
    assert case["ratios"]["lrp epsilon weights"]["over"] == lrp_methods.FULL
    assert case["ratios"]["lrp epsilon"]["budget"] == 1.15
    assert len(case["rounds"]) == 2
    assert all(math.isfinite(n) and n > 0 for n in numbers([case["ratios"], case["rounds"]]) if n)
    assert all(len(why) > 10 for why in case["refused"].values())
    if "captum" in lrp_peers.installed():  # torchvision's ResNets reuse their ReLUs
        assert "gradient x input" in case["refused"]["captum epsilon"]
    report = (tmp_path / "result.md").read_text()
    assert "(<= 1.15" in report
    assert str(tmp_path) not in report


@pytest.mark.slow
@needs_torchvision
def test_cold_calls_are_measured() -> None:
    options = ["--composites", "epsilon", "gradient", "--no-peers", "--cold"]
    (case,) = lrp_speed.run(["--nets", "resnet18", *TINY, *options])["cases"]
    assert set(case["cold_s"]) == {"lrp epsilon", "lrp gradient"}
    assert min(case["cold_s"].values()) > 0
    assert " s = " in lrp_report.cold_cell(case, "lrp epsilon")


@needs_torchvision
def test_methods_explain_the_same() -> None:
    """What is timed does the work: our map, the peers' maps and gradient x input agree."""
    case = lrp_methods.Case("vgg11", 32, 2, classes=5)
    model, x = case.model(), case.input()
    (plain,) = lrp_methods.build(lrp_methods.Method("torch", lrp_methods.PLAIN), case, model, x)()
    ours = lrp_methods.build(lrp_methods.Method("lrp", "epsilon"), case, model, x)()
    assert ours.ledger is None
    assert (ours.input - x * plain).abs().sum() <= 1e-2 * ours.input.abs().sum()
    for peer in lrp_peers.installed():
        target, seed = case.target(x)
        lrp_peers.check(peer, model, x, seed, target)
    full = lrp_methods.build(lrp_methods.Method("torch", lrp_methods.FULL), case, model, x)()
    assert len(full) == 1 + len(list(model.parameters()))
    weights = lrp_methods.build(lrp_methods.Method("lrp", "epsilon", "weights"), case, model, x)()
    assert len(weights.weights) == len(list(model.parameters()))


@pytest.mark.slow
@needs_torchvision
def test_memory_of_one_method() -> None:
    case = lrp_methods.Case("resnet18", 32, 1, classes=10)
    entry = lrp_memory.in_fresh_process({"library": "lrp", "composite": "epsilon"}, case.as_dict(), 1)
    assert entry["mib"] > 0
    assert entry["how"]


def test_peak_extra_sees_an_allocation() -> None:
    code = (
        "import torch; from experiments.benchmarks.measuring import peak_extra; "
        "print(peak_extra(lambda: torch.ones(2**24).sum())[0])"
    )
    root = Path(lrp_memory.ROOT)  # a process of its own: here, malloc has memory in stock
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, **lrp_memory.MALLOC}, capture_output=True, text=True
    )
    assert 60 <= int(done.stdout) / measuring.MIB <= 80, done.stderr


def test_rounds_alternate_and_ratios_stay_within() -> None:
    order: list[str] = []
    jobs = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    rounds = measuring.interleave(jobs, 2, measuring.CpuClock())
    assert order == ["a", "b", "b", "a"]
    assert [list(r) for r in rounds] == [["a", "b"], ["a", "b"]]
    r = measuring.ratio([{"a": 2.0, "b": 1.0}, {"a": 9.0, "b": 3.0}, {"a": 1.0, "b": 4.0}], "a", "b")
    assert (r.median, r.low, r.high, r.best) == (2.0, 0.25, 3.0, 1.0)


def test_budget_is_judged() -> None:
    assert lrp_report.judged(1.1, 1.15) == " (<= 1.15 met)"
    assert lrp_report.judged(1.2, 1.15) == " (<= 1.15 missed)"
    assert lrp_report.judged(9.9, None) == ""
    method = lrp_methods.Method("lrp", "epsilon_plus")
    assert [lrp_methods.budget(method, net) for net in ("vgg16", "resnet50")] == [1.6, 1.9]
    assert lrp_methods.budget(lrp_methods.Method("zennit", "epsilon"), "vgg16") is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--composites", "nonsense"], "unknown composite nonsense"),
        (["--rounds", "0"], "--rounds is 0"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_wrong_use_exits_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        lrp_speed.run(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_refusal_carries_the_reason() -> None:
    """A composite that a model cannot take is named, not timed."""
    case = lrp_methods.Case("none", 4, 1, classes=2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2), torch.nn.Softmax(1)).eval()
    with pytest.raises(lrp_peers.Refused, match="softmax"):
        lrp_methods.build(lrp_methods.Method("lrp", "epsilon"), case, model, case.input())
    assert issubclass(lrp.errors.UnsupportedOperationError, lrp.errors.LRPError)
