"""Outliers among digits: planted pixels, the stiffness, relevances by loops; the page on hand-made rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.papers import outliers as work
from experiments.papers import outliers_report as page
from experiments.study import Study


@pytest.mark.parametrize("kind", list(work.PLANTED))
def test_the_mask_is_what_was_changed(kind: str) -> None:
    picture = np.zeros((28, 28))
    picture[8:20, 10:14] = 1.0
    before = picture.copy()
    for seed in range(20):
        spoilt, mask = work.spoil(picture, kind, np.random.default_rng(seed))
        np.testing.assert_array_equal(picture, before)
        np.testing.assert_array_equal(mask, np.abs(spoilt - picture) > 0.1)
        assert 5 <= mask.sum() <= 36
        assert ((spoilt >= 0) & (spoilt <= 1)).all()
        if kind == "wiped":
            assert (spoilt[mask] == 0).all()
        if kind == "stroke":
            assert (spoilt[mask] == 1).all()


def test_stiffness_has_the_perplexity_it_names() -> None:
    points = np.random.default_rng(0).normal(size=(40, 3))
    gamma = work.stiffness(points, 0.25)
    perplexities = []
    for i in range(40):
        w = [math.exp(-gamma * ((points[i] - points[j]) ** 2).sum()) for j in range(40) if j != i]
        p = [v / sum(w) for v in w]
        perplexities.append(math.exp(-sum(v * math.log(v) for v in p)))
    assert np.mean(perplexities) == pytest.approx(10, rel=1e-4)
    assert work.stiffness(points, 0.1) > gamma


@pytest.mark.parametrize("name", list(work.MACHINES))
def test_relevances_by_loops(name: str) -> None:
    rng = np.random.default_rng(1)
    train, X = rng.random((30, 6)), rng.random((4, 6)) + 0.5
    machine = work.learn(name, train, 0.2)
    found, measured = work.relevances(machine, X, 0)
    assert measured["conservation"] < 1e-12
    scale = 1.0 if name == "ocsvm" else machine.gamma  # relevance of a log density is in its units
    mean = train.mean(0)
    weights = np.exp(machine.log_weights)

    def o(x: np.ndarray) -> float:
        kernel = [
            w * math.exp(-machine.gamma * ((x - u) ** 2).sum()) for w, u in zip(weights, machine.points, strict=True)
        ]
        return -math.log(sum(kernel)) / machine.gamma

    for i, x in enumerate(X):
        assert machine.score(X)[i] == pytest.approx(scale * o(x))
        p = np.array(
            [w * math.exp(-machine.gamma * ((x - u) ** 2).sum()) for w, u in zip(weights, machine.points, strict=True)]
        )
        p /= p.sum()
        wanted = scale * sum(v * (x - u) ** 2 for v, u in zip(p, machine.points, strict=True))
        np.testing.assert_allclose(found["LRP, undivided"][i], wanted)
        nearest = min(train, key=lambda u: ((x - u) ** 2).sum())
        np.testing.assert_allclose(found["squared difference to the nearest"][i], (x - nearest) ** 2)
        for t in range(6):
            y = x.copy()
            y[t] = mean[t]
            assert found["occlusion by the mean"][i, t] == pytest.approx(o(x) - o(y))
            up, down = x.copy(), x.copy()
            up[t] += 1e-5
            down[t] -= 1e-5
            slope = scale * (o(up) - o(down)) / 2e-5
            assert found["gradient x input"][i, t] == pytest.approx(slope * x[t], abs=1e-6)
            assert found["sensitivity"][i, t] == pytest.approx(slope**2, abs=1e-5)
    numbers = work.equivalence(machine, np.concatenate([train, X]))
    assert numbers["decision_gap"] < 1e-9
    assert numbers.get("rows_differing", 0) == 0
    assert numbers.get("least_outlyingness", 0) >= 0


def test_ranking_by_pairs() -> None:
    values = np.array([[3.0, 1.0, 2.0, 2.0], [0.0, 5.0, 1.0, 2.0]])
    masks = np.array([[True, False, True, False], [False, False, True, True]])
    areas = []
    for v, m in zip(values, masks, strict=True):
        pairs = [(a > b) + 0.5 * (a == b) for a in v[m] for b in v[~m]]
        areas.append(sum(pairs) / len(pairs))
    auc, rank = work.ranking(values, masks)
    assert auc == pytest.approx(np.mean(areas))
    assert rank == pytest.approx((1 + 0.5) / 2)


@pytest.mark.data
def test_one_digit_from_end_to_end(data: Path, tmp_path: Path) -> None:
    small = {"seeds": 1, "digits": [3], "rows": 40, "judged": 5, "draws": 2, "nu": 0.1, "steps": [8, 64]}
    study = Study(replace(work.EXPERIMENT, quick=small), tmp_path, quick=True, data=data)
    assert study.run()
    fits = {r["machine"]: r for r in study.rows if "machine" in r}
    assert set(fits) == set(work.MACHINES)
    stroke = fits["ocsvm"]["stroke"]
    assert stroke["auc"]["LRP, undivided"] > 0.8 > stroke["auc"]["random"]
    assert stroke["areas"]["density"]["LRP, undivided"] < stroke["areas"]["density"]["random"]
    assert stroke["curves"]["mean"]["random"][0] > 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"pictures.png", "curves.png"}
    assert "not comparable" in (tmp_path / "result.md").read_text(encoding="utf-8")  # one draw has no spread


def rows(auc: dict[str, float], area: dict[str, float], seeds: int = 4) -> list[dict[str, Any]]:
    out = []
    for machine in work.MACHINES:
        for seed in range(seeds):
            row: dict[str, Any] = {
                "key": f"{machine}|3|{seed}", "machine": machine, "digit": 3, "seed": seed, "gamma": 0.1,
                "rows_compared": 10.0, "rows_differing": 0.0, "decision_gap": 1e-14, "score_samples_gap": 1e-3,
                "least_outlyingness": 0.1, "conservation": 1e-15, "ms_per_row": 1.0,
            }  # fmt: skip
            for kind in work.KINDS:
                told: dict[str, Any] = {"detected": 0.9}
                if kind in work.PLANTED:
                    told["auc"] = {m: 0.7 + 0.01 * seed + auc.get(m, 0.0) for m in work.METHODS}
                    told["rank"] = dict.fromkeys(work.METHODS, 0.3)
                told["areas"] = {f: {m: 0.5 + area.get(m, 0.0) for m in work.METHODS} for f in ("density", "mean")}
                told["curves"] = {f: {m: [2.0, 1.0, 0.5] for m in work.METHODS} for f in ("density", "mean")}
                row[kind] = told
            out.append(row)
    return out


def told(found: list[dict[str, Any]]) -> Any:
    settings = {"nu": 0.1, "rows": 9, "digits": [3], "seeds": 4, "judged": 9, "steps": [8, 64]}
    return page.report(SimpleNamespace(rows=found, settings=settings))  # type: ignore[arg-type]


def verdict(report: Any, part: str) -> str:
    return next(c.verdict for c in report.claims if part in c.claim)


def test_verdicts_follow_the_numbers() -> None:
    best = told(rows({"LRP, undivided": 0.1}, {"LRP, undivided": -0.1}))
    assert verdict(best, "spoilt pixels better than sensitivity") == "confirmed"
    assert verdict(best, "faster than random") == "confirmed"
    assert len(best.wins) == 3
    assert "ahead of every control in 21 and behind one in 0 of 21 settings" in best.summary
    assert not best.losses
    worse = told(rows({"sensitivity": 0.1}, {"random": -0.1}))
    assert verdict(worse, "spoilt pixels better than sensitivity") == "refuted"
    assert verdict(worse, "faster than random") == "refuted"
    assert verdict(worse, "spoilt pixels better than random") == "null"
    assert not worse.wins
    assert "behind sensitivity" in worse.losses[0]
    assert "ahead of every control in 0 and behind one in 21 of 21 settings" in worse.summary
    few = told(rows({"LRP, undivided": 0.1}, {}, seeds=2))
    assert verdict(few, "spoilt pixels better than sensitivity") == "not comparable"


def test_equivalence_is_refuted_by_one_row() -> None:
    found = rows({}, {})
    assert verdict(told(found), "same decisions") == "confirmed"
    assert verdict(told(found), "add up to") == "confirmed"
    found[0]["rows_differing"], found[1]["conservation"], found[-1]["decision_gap"] = 1.0, 1e-4, 1e-3
    report = told(found)
    assert verdict(report, "same decisions") == "refuted"
    assert verdict(report, "add up to") == "refuted"
    assert verdict(report, "without a threshold") == "refuted"
    assert not told([]).claims
    assert not told([]).summary
