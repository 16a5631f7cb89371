"""The planted artefact: where it is, what the network and the neuralized k-means make of it, what the report says."""

from __future__ import annotations

import base64
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from experiments import data as sets
from experiments import models
from experiments.papers import clever_hans as work
from experiments.papers.clever_hans import Case
from experiments.papers.clever_hans_report import CONTROLS, MAIN
from experiments.spray import pooled
from experiments.study import Study


def test_square_lies_where_it_is_said_to_lie() -> None:
    pictures = np.random.default_rng(0).integers(0, 200, (6, 32, 32, 3)).astype(np.uint8)
    for case in (Case("corner", 0.5, 1), Case("anywhere", 0.5, 1)):
        places = case.places(6, 1)
        got = work.stamp(pictures, places)
        inside = work.area(places)
        assert inside.sum((1, 2)).tolist() == [36] * 6
        assert ((got != pictures).any(3) == inside).all()
        assert (got[inside] == (255, 255, 0)).all()
        wide = work.area(places, 2)
        assert (wide | ~inside).all()
        assert wide.sum() > inside.sum()
    assert len({tuple(p) for p in Case("anywhere", 0.5, 1).places(6, 1)}) > 1
    assert not (Case("anywhere", 0.5, 1).places(6, 1) == Case("anywhere", 0.5, 1).places(6, 2)).all()


def test_larger_shares_hold_the_smaller_ones() -> None:
    few, many = Case("corner", 0.1, 0).planted(50), Case("corner", 0.5, 0).planted(50)
    assert (few.sum(), many.sum()) == (5, 25)
    assert not (few & ~many).any()
    cases = [few_case := Case("corner", 0.1, 0), Case("corner", 0.5, 0), Case("anywhere", 0.5, 0)]
    cases.append(Case("corner", 0.5, 0, trained=False))
    assert len({case.key for case in cases}) == 4
    assert few_case.target == 7


def _maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    case = Case("corner", 0.5, 0)
    maps, planted, places = rng.random((30, 32, 32)), case.planted(30), case.places(30, 1)
    maps[planted] += 4 * work.area(places)[planted]
    return maps, planted, places


def test_explanation_in_pixels_is_the_closed_form() -> None:
    maps, planted, places = _maps()
    told, mean = work.pointed(maps, planted, places, 8, 2, 0)
    rows = pooled(maps, 8)
    fitted = KMeans(2, n_init=10, random_state=0).fit(rows)
    own = int(fitted.labels_[planted][0])
    assert (fitted.labels_[planted] == own).all()
    assert not (fitted.labels_[~planted] == own).any()
    here, there = fitted.cluster_centers_[own], fitted.cluster_centers_[1 - own]
    expected = np.zeros((32, 32))
    for n in np.flatnonzero(planted):
        cells = (2 * (here - there) * (rows[n] - (here + there) / 2)).reshape(8, 8)
        for i in range(8):
            for j in range(8):
                part = maps[n, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                expected[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] += cells[i, j] * part / part.sum() / planted.sum()
    np.testing.assert_allclose(mean, expected, atol=1e-5 * np.abs(expected).max())
    positive = np.maximum(expected, 0)
    assert told["on_mean"] == pytest.approx(positive[24:30, 2:8].sum() / positive.sum(), rel=1e-4)
    assert told["peak"]
    assert told["chance"] == pytest.approx(36 / 1024)
    assert told["on_mean"] > 0.5 > told["map_mean"]
    assert [e["planted"] for e in told["each"]] in ([15, 0], [0, 15])


def test_explanation_without_a_square_points_nowhere() -> None:
    maps, planted, places = _maps()
    noise = np.random.default_rng(1).random(maps.shape)
    told, _ = work.pointed(noise, planted, places, 8, 2, 0)
    assert told["on_mean"] < 0.2
    assert told["auc"] < 0.9


# -- the report on hand-made rows ----------------------------------------------
def _row(
    seed: int, share: float = 0.5, auc: float = 0.97, case: str = "corner", control: float = 0.6, **changes: Any
) -> dict[str, Any]:
    def found(maps: str, value: float) -> dict[str, Any]:
        told = {"suggested": 2, "gap": 0.1, "tau": 9.0, "picked": [1], "ari": 0.9, "precision": 0.95, "recall": 0.9}
        size = None if maps == "activations" else 8
        return {"maps": maps, "pooling": size, "neighbours": 10, **told, "auc": value + 0.002 * seed}

    taus = [{"class": c, "tau": 10.0 if c == 7 else 2.0, "suggested": 1, "gap": 0.1} for c in range(10)]
    nulls = {"p_permuted": 0.01, "p_rotated": 0.05, "null_mean": 3.0, "null_sd": 0.5}
    each = [{"size": 5, "planted": 5, "on_mean": 0.8}, {"size": 5, "planted": 0, "on_mean": 0.7}]
    pointed = {"clusters": 2, "picked": [0], "auc": auc, "each": each, "on_mean": 0.8, "peak": True, "map_mean": 0.1}
    pointed |= {"on_rows": 0.7, "near": 0.75, "chance": 0.035, "chance_near": 0.1}
    row = {
        "case": case,
        "share": share,
        "seed": seed,
        "class": 7,
        "planted": 5,
        "use": {"accuracy": 0.8, "accuracy_class": 0.8, "turned_before": 0.02, "turned": 0.4},
        "found": [found(MAIN, auc), *(found(name, control) for name in CONTROLS)],
        "pointed": pointed,
    }
    if case == "corner":
        row["ranking"] = [q | nulls for q in taus]
    return row | changes


def _report(tmp_path: Path, rows: list[dict[str, Any]]) -> Any:
    study = Study(replace(work.EXPERIMENT, work=lambda _: None), tmp_path)
    for row in rows:
        study.cell(f"{row['case']}|{row['share']}|{row['seed']}", partial(dict, row))
    return work.EXPERIMENT.report(study)


def _verdicts(report: Any) -> list[str]:
    return [claim.verdict for claim in report.claims]


def _seeds(**changes: Any) -> list[dict[str, Any]]:
    rows = [_row(k, **changes) for k in range(3)]
    return rows + [_row(k, auc=0.55, case="unused") for k in range(3)]


def test_good_numbers_are_confirmed(tmp_path: Path) -> None:
    report = _report(tmp_path, _seeds())
    assert _verdicts(report) == ["confirmed"] * 5
    assert len(report.wins) == 1
    assert not report.losses
    assert "80 ± 0 % of the positive relevance" in report.words[-1]
    assert "share of 50%; there the area under the ROC curve is 0.97 ± 0.00" in report.summary
    assert "So do the other clusters (70 ± 0 %)" in report.words[-1]


def test_other_numbers_give_other_verdicts(tmp_path: Path) -> None:
    blind = _report(tmp_path / "a", _seeds(auc=0.6))
    assert _verdicts(blind)[:3] == ["refuted", "refuted", "refuted"]
    assert len(blind.losses) == 1
    assert not blind.wins
    assert "share of 50%; there the area under the ROC curve is 0.60 ± 0.00" in blind.summary
    near = _report(tmp_path / "b", _seeds(control=0.97))
    assert _verdicts(near)[:3] == ["confirmed", "confirmed", "refuted"], "controls do as well"
    low = [q | {"tau": float(q["class"] == 7 or 10 - q["class"])} for q in _row(0)["ranking"]]
    ranked = _report(tmp_path / "c", _seeds(ranking=low))
    assert _verdicts(ranked)[3] == "refuted"
    lost = _row(0)["pointed"] | {"on_mean": 0.04, "peak": False}
    assert _verdicts(_report(tmp_path / "d", _seeds(pointed=lost)))[4] == "refuted"


def test_shares_at_which_it_is_lost(tmp_path: Path) -> None:
    idle = _row(0)["use"] | {"turned": 0.03}
    rows = _seeds() + [_row(k, share=0.05, auc=0.55, use=idle) for k in range(3)]
    report = _report(tmp_path / "a", rows)
    assert _verdicts(report)[0] == "confirmed", "nothing to be found where the network does not use it"
    assert "It fails (AUC below 0.9) at 5%; the network uses the square at 50%." in report.words[2]
    used = _seeds() + [_row(k, share=0.05, auc=0.55) for k in range(3)]
    assert _verdicts(_report(tmp_path / "b", used))[0] == "partly"


def test_a_square_that_may_lie_anywhere_counts(tmp_path: Path) -> None:
    lost = _report(tmp_path / "a", _seeds() + [_row(k, auc=0.6, case="anywhere") for k in range(3)])
    assert _verdicts(lost)[0] == "partly"
    assert [("anywhere" in text) for text in lost.losses] == [True]
    found = _report(tmp_path / "b", _seeds() + [_row(k, case="anywhere") for k in range(3)])
    assert _verdicts(found)[0] == "confirmed"
    assert not found.losses


def test_unfinished_runs_make_no_claims(tmp_path: Path) -> None:
    report = _report(tmp_path / "a", [_row(0)])
    assert _verdicts(report) == ["not comparable"]
    assert "one seed" in report.claims[0].why
    idle = _row(0)["use"] | {"turned": 0.03}
    assert "no network" in _report(tmp_path / "b", [_row(k, use=idle) for k in range(2)]).claims[0].why


@pytest.mark.data
def test_tiny_run_on_pictures(tmp_path: Path, data: Path) -> None:
    tiny = dict(work.EXPERIMENT.quick) | {"per_class": 16, "held_out": 4, "epochs": 1, "shares": [0.5], "rotations": 2}
    tiny |= {"neighbours": [4], "permutations": 4}
    study = Study(replace(work.EXPERIMENT, quick=tiny), tmp_path, quick=True, data=data)
    assert study.run()
    assert [row["key"] for row in study.rows] == ["corner|0.5|0", "anywhere|0.5|0", "unused|0.5|0"]
    row = study.rows[0]
    assert row["planted"] == 8
    assert len(row["ranking"]) == 10
    labels = row["view"]["labels"]
    assert sorted(i for group in row["view"]["medoids"] for i in group) == sorted(
        {i for group in row["view"]["medoids"] for i in group}
    )
    assert all(labels[i] == c for c, group in enumerate(row["view"]["medoids"]) for i in group)
    for name in ("shares", "medoids", "tsne", "pointed"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000

    bench = work.Bench(study)
    case = Case("corner", 0.5, 0)
    model: Any = bench.network(case)
    shown, planted, _ = bench.training_pictures(case)
    first = row["view"]["medoids"][0][0]
    picture = np.frombuffer(base64.b64decode(row["view"]["pictures"][0][0]), np.uint8).reshape(32, 32, 3)
    assert (picture == shown[first]).all()
    assert (shown[planted][:, 24:30, 2:8] == (255, 255, 0)).all()
    assert (shown[~planted] == bench.pictures[7][~planted]).all()
    x = sets.normalise(shown, models.IMAGENET_MEAN, models.IMAGENET_STD)
    with torch.no_grad():
        logit = model(x)
        upper = model.linear(torch.nn.functional.adaptive_avg_pool2d(model.layer3(bench.lower(shown)), 1).flatten(1))
    torch.testing.assert_close(upper, logit, rtol=1e-4, atol=1e-4)
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(z)[:, 7].sum(), z)
    got = bench.relevance(model, shown, 7, "gradient_x_input")
    expected = (gradient * x).sum(1).detach().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(bench.relevance(model, shown, 7, "epsilon_plus"), got)
