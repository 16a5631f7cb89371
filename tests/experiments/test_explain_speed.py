"""The benchmark of explanations: complete, honest about refusals, readable. No times are asserted."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benchmarks import (
    explain_memory,
    explain_models,
    explain_pairs,
    explain_report,
    explain_speed,
    measuring,
)
from experiments.benchmarks.lrp_peers import Refused

TINY = ["--rows", "2000", "--columns", "6", "--clusters", "3", "--model-rows", "120", "--model-columns", "4",
        "--members", "12", "24", "--pair-rows", "3", "--rounds", "2", "--threads", "1"]  # fmt: skip


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.mark.slow
def test_structure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part but memory; rivals give a figure or refuse with a reason; threads are as before."""
    threads = torch.get_num_threads()
    models = ["KMeans", "SVC, 2 classes", "GaussianMixture diag"]
    parts = ["--parts", "kmeans", "models", "pairs", "--models", *models]
    explain_speed.main([*TINY, *parts, "-o", str(tmp_path), "--json", str(tmp_path / "again.json")])
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads((tmp_path / "again.json").read_text())
    assert [e["name"] for e in result["kmeans"]] == ["float64", "float32"]
    assert [e["name"] for e in result["models"]] == models
    for entry in result["models"]:
        assert set(entry["rivals"]) | set(entry["refused"]) == set(explain_models.RIVALS)
        assert not set(entry["rivals"]) & set(entry["refused"])
        assert all(len(why) > 10 for why in entry["refused"].values())
    cases = result["pairs"]["cases"]
    assert [c["members"] for c in cases] == [12, 24]
    assert cases[1]["size"] > 3 * cases[0]["size"]
    for e in [*result["kmeans"], *result["models"], *cases]:
        assert len(e["rounds"]) == len(e["cpu_rounds"]) == 2
        assert all(set(r) == set(e["seconds"]) for r in (*e["rounds"], *e["cpu_rounds"]))
        assert all(math.isfinite(n) and n > 0 for n in numbers([e["rounds"], e["seconds"]]))
    assert set(result["pairs"]["exponents"]) == {"divided", "divided pairs", "undivided", "undivided pairs"}
    report = (tmp_path / "result.md").read_text()
    assert "(<= 4 " in report
    assert "(<= 6 " in report
    assert str(tmp_path) not in report
    assert report in capsys.readouterr().out
    assert "1 thread(s)" in report
    assert f"torch {torch.__version__}" in report


@pytest.mark.slow
def test_quick() -> None:
    result = explain_speed.run(["--quick", "--threads", "1"])
    assert set(result) >= set(explain_speed.PARTS)
    assert set(result["memory"]["ways"]) == set(explain_memory.WAYS)


@pytest.mark.slow
def test_memory_does_not_grow_with_rows() -> None:
    rows, row = [40_000, 120_000], 50 * 8

    def growth(way: str) -> float:
        entry = explain_memory.in_fresh_process(way, rows, 50, 3, "float64", 1)
        few, many = entry["mib"]
        return (many - few) * measuring.MIB / (rows[1] - rows[0])

    assert growth("returned") >= 0.9 * row  # what is measured is seen
    assert growth("batches") <= 0.1 * row
    assert growth("out") <= 80  # output, residual and the like of each row: eight numbers or so


def test_memory_says_why_it_failed() -> None:
    entry = explain_memory.in_fresh_process("out", [100], 3, 2, "no such type", 1)
    assert "no such type" in entry["failed"]
    part = {"rows": [100], "columns": 3, "clusters": 2, "dtype": "float64"}
    head = {"settings": {"threads": 1, "rounds": 1}, "versions": {}, "machine": "", "waiting": "", "load": [0.0, 0.0]}
    report = explain_report.markdown({**head, "memory": {**part, "ways": dict.fromkeys(explain_memory.WAYS, entry)}})
    assert "no such type" in report


@pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
@pytest.mark.parametrize("members", [9, 40])
@pytest.mark.parametrize("rule", explain_pairs.RULES)
def test_pair_network_explains_the_same(members: int, rule: str) -> None:
    """What is compared does the same work."""
    net, X, network = explain_pairs.case(members, 5, 6)
    assert len(X) == 6
    ours = net.explain(X, rule=rule)
    assert set(ours.target) == {0}
    written_out = np.stack([network.explain(x, rule).numpy() for x in X])
    assert np.abs(ours.values - written_out).max() <= 1e-10 * np.abs(written_out).max()
    own, rival = np.bincount(net.head.pool.weights.argmax(0).numpy(), minlength=2)
    assert network.size == own * rival * 5


def test_zoo_is_what_its_networks_say() -> None:
    for name, build in explain_models.zoo(150, 4).items():
        model = build()
        assert model.name == name
        assert (model.net.predict(model.X) == model.predict()()).mean() > 0.99, name
        assert len(model.explain()().values) == len(model.X)


@pytest.mark.peer
def test_shap_explains_the_logit() -> None:
    """shap's values and their base sum to the logit that our explanation has as output."""
    model = explain_models.zoo(200, 4)["KMeans"]()
    try:
        found = explain_models.shap_permutation(model, 1)()
    except Refused as reason:
        pytest.skip(str(reason))
    assert found.values[0].sum() + found.base_values[0] == pytest.approx(model.net.explain(model.X[:1]).output[0])


@pytest.mark.peer
def test_shapiq_explains_the_decision_function() -> None:
    model = explain_models.zoo(120, 4)["SVC, 2 classes"]()
    try:
        (found,) = explain_models.product_kernel(model, 1)()
    except Refused as reason:
        pytest.skip(str(reason))
    total = found.baseline_value + sum(found.get_n_order_values(1))
    assert total == pytest.approx(model.fitted.decision_function(model.X[:1])[0])


def test_what_is_not_installed_is_said() -> None:
    with pytest.raises(Refused, match="not installed"):
        explain_models.imported("no_such_library")


def test_both_clocks() -> None:
    """Waiting takes wall time and no CPU time."""
    timer = explain_speed.TwoClocks()

    def job() -> None:
        time.sleep(0.05)

    assert timer.seconds(job) >= 0.05
    assert timer.cpu[job][0] < 0.05


def test_preparations_are_not_timed() -> None:
    done = []

    def job() -> None:
        done.append("job")

    def prepare() -> None:
        done.append("before")
        time.sleep(0.5)

    assert explain_speed.TwoClocks({job: prepare}).seconds(job) < 0.5
    assert done == ["before", "job"]


def test_exponent() -> None:
    assert explain_pairs.exponent([10, 20, 40], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_budgets_are_judged() -> None:
    assert explain_report.at_most(3.9, 4) == " (<= 4 met)"
    assert explain_report.at_most(4.1, 4) == " (<= 4 missed)"
    assert explain_report.at_least(999, 1000) == " (>= 1000 missed)"
    assert explain_report.at_least(2e4, 1000) == " (>= 1000 met)"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "Perceptron"], "unknown model 'Perceptron'"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--clusters", "1"], "--clusters is 1"),
        (["--members", "3"], "at least 4"),
        (["--parts", "everything"], "invalid choice"),
    ],
)
def test_wrong_use_exits_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        explain_speed.run(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
