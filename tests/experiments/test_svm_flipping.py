"""Flipping of kernel machines: slopes, rules and splits against loops; the page on hand-made rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from experiments.papers import svm_flipping as work
from experiments.papers import svm_flipping_report as page
from experiments.study import Study
from neuralize import neuralize

TABLES = ("one", "two", "three", "four")


def blobs(seed: int = 0, n: int = 60, d: int = 4) -> work.Split:
    rng = np.random.default_rng(seed)
    y = np.arange(2 * n) % 2
    X = rng.normal(0, 0.4, (2 * n, d))
    X[:, 0] += y
    X -= X[:n].mean(0)
    return work.Split(X[:n], y[:n], X[n:], y[n:])


def test_slope_and_integrated_gradients_against_differences() -> None:
    part = blobs()
    machine = SVC(gamma=0.7, C=3).fit(part.train, part.labels)
    X, h = part.test[:5], 1e-5
    slope = work.slope_of_decision(machine, X)
    for t in range(X.shape[1]):
        step = np.zeros(X.shape[1])
        step[t] = h
        wanted = (machine.decision_function(X + step) - machine.decision_function(X - step)) / (2 * h)
        np.testing.assert_allclose(slope[:, t], wanted, atol=1e-7)
    found = work.integrated_gradients(lambda rows: work.slope_of_decision(machine, rows), X, 400)
    change = machine.decision_function(X) - machine.decision_function(np.zeros((1, X.shape[1])))
    np.testing.assert_allclose(found.sum(1), change, atol=1e-5)


def test_ranks_averaged_by_loops() -> None:
    part, k, eta = blobs(1, 30), 5, 0.8
    found, g = work.averaged_ranks(part, k, eta)
    for i, x in enumerate(part.test):
        side = []
        for label in (0, 1):
            d = sorted(((x - u) ** 2).sum() for u in part.train[part.labels == label])[:k]
            side.append(sum(d) / k)
        assert g[i] == pytest.approx(side[0] - side[1])
    np.testing.assert_allclose(found["midpoint, averaged ranks"].sum(1), g, atol=1e-12)
    mixed = (1 - eta) * found["GI, averaged ranks"] + eta * found["midpoint, averaged ranks"]
    np.testing.assert_allclose(found["hybrid, averaged ranks"], mixed)


@pytest.mark.parametrize("model", ["svc", "knn"])
def test_relevances_are_signed_towards_the_second_class(model: str) -> None:
    part = blobs(2)
    machine: Any = SVC(gamma=1.0) if model == "svc" else KNeighborsClassifier(5)
    machine.fit(part.train, part.labels)
    net = neuralize(machine)
    found, measured = work.relevances(machine, net, part, 0, 0.3)
    assert measured["conservation"] < 1e-12
    np.testing.assert_allclose(found["hybrid"], 0.7 * found["GI"] + 0.3 * found["midpoint"])
    agree = (found["midpoint"][:, 0] > 0) == (machine.predict(part.test) == 1)
    assert agree.mean() > 0.65  # the first column alone tells the classes apart
    assert abs((found["midpoint"][:, 1] > 0).mean() - 0.5) < 0.25
    if model == "knn":  # the GI rule is input times gradient of g
        np.testing.assert_allclose(found["GI"], found["gradient x input"], atol=1e-10)
    # unsigned methods give the same order to both classes once the sign of the prediction is taken out
    sign = np.where(machine.predict(part.test) == 1, 1, -1)
    assert (found["centroid difference"] * sign[:, None] >= 0).all()
    numbers = work.equivalence(machine, net, part, 0)
    assert numbers["rows_differing"] == 0
    assert numbers["rows_compared"] + numbers["rows_on_border"] == len(part.train) + len(part.test) + 200


@pytest.mark.parametrize("name", ["breast cancer", "wine 2 v rest", "digits 4v9"])
def test_units_come_from_the_training_rows(name: str) -> None:
    part = work.split(name, None, 3, {"train": 70, "test": 40})
    assert (len(part.train), len(part.test)) == (70, 40)
    np.testing.assert_allclose(part.train.mean(0), 0, atol=1e-12)
    pairs = [((a - b) ** 2).sum() for i, a in enumerate(part.train) for b in part.train[:i]]
    assert np.median(pairs) == pytest.approx(1)
    same = work.split(name, None, 3, {"train": 70, "test": 40})
    np.testing.assert_array_equal(part.test, same.test)
    assert not np.array_equal(part.test, work.split(name, None, 4, {"train": 70, "test": 40}).test)


@pytest.mark.data
def test_the_pictures_and_the_tables_of_the_folder(data: Path) -> None:
    part = work.split("MNIST 4v9", data, 0, {"train": 30, "test": 10})
    assert part.train.shape == (30, 784)
    assert set(part.labels.tolist()) == {0, 1}
    wine = work.split("red wine", data, 0, {"train": 100, "test": 50})
    assert 0.4 < wine.labels.mean() < 0.7  # 855 of 1599 have six and more


def test_one_table_from_end_to_end(tmp_path: Path) -> None:
    small = {
        "seeds": 1,
        "tables": ["wine 2 v rest"],
        "rows": {"train": 60, "test": 20, "draws": 3},
        "pictures": {"train": 20, "test": 5, "draws": 1},
        "shap_rows": 0,
        "grid": {"C": [1.0], "gamma": [1.0], "k": [3]},
    }
    study = Study(replace(work.EXPERIMENT, quick=small), tmp_path, quick=True, data=tmp_path)
    assert study.run()
    svc, knn = study.rows
    assert svc["eta"] == pytest.approx(0.4, abs=0.02)
    assert svc["areas"]["hybrid"] < svc["areas"]["random"]
    assert not svc["areas_of_few"]
    assert knn["averaged_agrees"] > 0.8
    text = (tmp_path / "result.md").read_text(encoding="utf-8")
    assert "0 of 560 rows decided differently" in text  # 2 x (60 + 20 + 200)
    assert (tmp_path / "curves.png").exists()


@pytest.mark.peer
@pytest.mark.slow
def test_shap_of_a_linear_score() -> None:
    pytest.importorskip("shap")
    part = blobs(4)
    w = np.array([1.0, -2.0, 0.5, 0.0])
    found = work.shap_values(lambda rows: np.asarray(rows @ w), part, 3, 0)
    background = part.train[np.random.default_rng(0).permutation(len(part.train))[:50]]
    assert found is not None
    np.testing.assert_allclose(found, w * (part.test[:3] - background.mean(0)), atol=1e-9)


def rows(shift: dict[str, float], seeds: int = 4, model: str = "svc") -> list[dict[str, Any]]:
    """Areas of .5 for all methods but those that are shifted; the same noise for all."""
    out = []
    for name in TABLES:
        for seed in range(seeds):
            areas = {m: 0.5 + 0.01 * seed + shift.get(m, 0.0) + 0.0001 * (seed % 2) * (m == "GI") for m in work.METHODS}
            out.append(
                {
                    "key": f"{name}|{model}|{seed}", "table": name, "model": model, "seed": seed, "columns": 4,
                    "train_rows": 9, "test_rows": 9, "draws": 1, "step": 1, "chosen": {"C": 1.0}, "eta": 0.4,
                    "accuracy": 0.9, "rows_compared": 10.0, "rows_differing": 0.0, "rows_on_border": 0.0,
                    "decision_gap": 1e-14, "ms_per_row": 0.1, "conservation": 1e-15, "areas": areas,
                    "row_errors": dict.fromkeys(areas, 0.01), "curves": {m: [1, 0.5, 0.2, 0, 0] for m in areas},
                    "areas_of_few": {},
                }
            )  # fmt: skip
    return out


def told(found: list[dict[str, Any]]) -> Any:
    settings = {**work.EXPERIMENT.quick, "tables": list(TABLES)}
    return page.report(SimpleNamespace(rows=found, settings=settings))  # type: ignore[arg-type]


def verdict(report: Any, part: str) -> str:
    return next(c.verdict for c in report.claims if part in c.claim)


def test_verdicts_follow_the_numbers() -> None:
    ahead = told(rows({"hybrid": -0.1, "GI": -0.05}))
    assert verdict(ahead, "than GI alone (SVC") == "confirmed"
    assert verdict(ahead, "earlier than that of f") == "confirmed"
    assert verdict(ahead, "earlier than occlusion (SVC") == "confirmed"
    assert verdict(ahead, "network decides") == "confirmed"
    assert len(ahead.wins) == 1
    assert "(ahead of all controls on 4, behind one on 0 of 4)" in ahead.summary
    assert not ahead.losses
    behind = told(rows({"hybrid": 0.1}))
    assert verdict(behind, "earlier than occlusion (SVC") == "refuted"
    assert not behind.wins
    assert "(gradient x input, integrated gradients of f and others)" in behind.losses[0]
    assert "(ahead of all controls on 0, behind one on 4 of 4)" in behind.summary
    assert verdict(told(rows({"hybrid": -0.001})), "earlier than occlusion (SVC") == "null"  # too small to matter
    assert verdict(told(rows({"hybrid": -0.1}, seeds=2)), "earlier than occlusion (SVC") == "not comparable"


def test_a_network_that_differs_is_refuted_and_no_rows_say_nothing() -> None:
    found = rows({})
    found[0]["rows_differing"], found[0]["conservation"] = 5.0, 1e-3
    report = told(found)
    assert verdict(report, "network decides") == "refuted"
    assert verdict(report, "add up to g") == "refuted"
    nothing = told([])
    assert not nothing.claims
    assert nothing.tables["areas_svc"].rows == []


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["below", "level"], "confirmed"),
        (["below", "level", "level"], "partly"),
        (["below", "below", "above"], "partly"),
        (["level", "level"], "null"),
        (["below", "above"], "null"),
        (["above", "level"], "refuted"),
        (["below", "unknown"], "not comparable"),
        ([], "not comparable"),
    ],
)
def test_the_rule_of_verdicts(states: list[str], expected: str) -> None:
    assert page.judge(states) == expected
    mirrored = [{"below": "above", "above": "below"}.get(s, s) for s in states]
    assert page.judge(mirrored, "above") == expected


def test_paired_differences_by_hand() -> None:
    found = page.paired([0.1, 0.2, 0.4], [0.2, 0.4, 0.5])  # -.1, -.2, -.1
    assert found.mean == pytest.approx(-0.4 / 3)
    spread = math.sqrt(sum((d + 0.4 / 3) ** 2 for d in (-0.1, -0.2, -0.1)) / 2)
    assert found.error == pytest.approx(spread / math.sqrt(3))
    assert found.state == "level"  # 4.30 x .0333 > .133
    assert page.paired([0.1, 0.2, 0.4], [0.3, 0.4, 0.6]).state == "below"
    assert page.paired([0.1, 0.2, 0.4], [0.103, 0.203, 0.403]).state == "level"
