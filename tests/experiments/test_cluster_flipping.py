"""The flipping of clusterings: tables, methods and gains against slow loops, verdicts on rows made by hand."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans

from experiments.papers import cluster_flipping as runs
from experiments.papers import cluster_report as told
from experiments.study import Study
from experiments.tables import BUNDLED, NAMES, table
from lrp.errors import DataError, InputError
from neuralize import KernelKMeans, neuralize

SETTINGS = {"rows": 6, "fit_rows": 60, "pictures": [40, 3], "draws": 2, "epochs": 1}


def _own_logit(centres: Any, x: Any, c: int) -> float:
    d = [sum((float(a) - float(b)) ** 2 for a, b in zip(x, u, strict=True)) for u in centres]
    return min(v for k, v in enumerate(d) if k != c) - d[c]


# ------------------------------------------------------------ tables


def test_bundled_tables_need_no_folder() -> None:
    for name in BUNDLED:
        raw, scaled = table(name, "nowhere", standardise=False), table(name, "nowhere")
        assert raw.X.shape == scaled.X.shape == (len(raw.y), len(raw.columns))
        np.testing.assert_allclose(scaled.X * raw.X.std(0) + raw.X.mean(0), raw.X, atol=1e-9)
        assert set(raw.y.tolist()) == set(range(len(raw.classes)))
    assert table("digits").X.shape == (1797, 61), "three pixels are always white"
    with pytest.raises(InputError, match="wine"):
        table("wines")


@pytest.mark.data
def test_tables_of_the_folder(data: Path, tmp_path: Path) -> None:
    known = {
        "wheat seeds": ((210, 7), [70, 70, 70]),
        "glass": ((214, 9), [70, 76, 17, 13, 9, 29]),
        "sonar": ((208, 60), [111, 97]),
        "banknote": ((1372, 4), [762, 610]),
        "thyroid": ((215, 5), [150, 35, 30]),
        "diabetes": ((768, 8), [500, 268]),
        "penguins": ((342, 4), [151, 68, 123]),
        "cars": ((392, 7), [68, 79, 245]),
        "wholesale": ((440, 6), [298, 142]),
    }
    for name, (shape, counts) in known.items():
        found = table(name, data, standardise=False)
        assert found.X.shape == shape
        assert np.bincount(found.y).tolist() == counts
    for name in NAMES:
        assert np.isfinite(table(name, data).X).all(), name
    wholesale = table("wholesale", data, standardise=False)
    assert wholesale.X[0, 0] == pytest.approx(math.log(12669))
    assert table("penguins", data, standardise=False).take(slice(0, 1)).X.tolist() == [[39.1, 18.7, 181.0, 3750.0]]
    with pytest.raises(DataError):
        table("glass", tmp_path)


def test_split_keeps_judged_rows_apart() -> None:
    X = table("wine").X
    part = runs.split("wine", 3, SETTINGS | {"fit_rows": 1000})
    assert part.clusters == 3
    assert (len(part.train), len(part.judged)) == (142, 6)
    apart = {tuple(r) for r in part.train} & {tuple(r) for r in part.judged}
    assert not apart
    assert {tuple(r) for r in part.train} < {tuple(r) for r in X}
    assert not np.array_equal(runs.split("wine", 4, SETTINGS).train, runs.split("wine", 3, SETTINGS).train)


# ------------------------------------------------------------ methods


def test_definitions_by_loops() -> None:
    part = runs.split("wine", 0, SETTINGS)
    X = part.judged
    flat = KMeans(3, n_init=1, random_state=0).fit(part.train)
    expected = [[_own_logit(flat.cluster_centers_, x, c) for c in range(3)] for x in X]
    np.testing.assert_allclose(runs.direct_logits(flat, X), expected, rtol=1e-9)
    kernel = KernelKMeans(3, algorithm="full", random_state=0).fit(part.train)
    gamma, norms = float(kernel.gamma_), kernel.centre_norms_
    for x, row in zip(X, runs.direct_logits(kernel, X), strict=True):
        kappa = [
            math.exp(-gamma * sum((a - b) ** 2 for a, b in zip(x, u, strict=True))) for u in kernel.support_vectors_
        ]
        s = [sum(a * k for a, k in zip(line, kappa, strict=True)) for line in kernel.dual_coef_]
        for c in range(3):
            pairs = [
                (math.log(s[c] + norms[k] / 2) - math.log(s[k] + norms[c] / 2)) / gamma for k in range(3) if k != c
            ]
            assert row[c] == pytest.approx(min(pairs), rel=1e-9)
    np.testing.assert_allclose(runs.logits(neuralize(kernel), X), runs.direct_logits(kernel, X), rtol=1e-9)


def test_methods_on_a_linear_logit() -> None:
    part = runs.split("wine", 0, SETTINGS)
    fitted = KMeans(2, n_init=1, random_state=0).fit(part.train)
    net, X = neuralize(fitted), part.judged
    own = fitted.predict(X)
    u = fitted.cluster_centers_
    w = 2 * (u[own] - u[1 - own])  # one competitor: the logit is linear
    np.testing.assert_allclose(runs.integrated_gradients(net, X, own), w * X, atol=1e-9)
    np.testing.assert_allclose(runs.integrated_gradients(net, X, own, X.mean(0)), w * (X - X.mean(0)), atol=1e-9)
    found = runs.local_surrogate(net, X, part.train, samples=2000)
    for got, expected in zip(found, w * (X - part.train.mean(0)), strict=True):
        assert np.corrcoef(got, expected)[0, 1] > 0.8
        assert np.abs(got - expected).max() < 0.5 * np.abs(expected).max()


@pytest.mark.peer
@pytest.mark.slow
def test_shapley_of_a_linear_logit() -> None:
    pytest.importorskip("shap")
    part = runs.split("wine", 0, SETTINGS)
    fitted = KMeans(2, n_init=1, random_state=0).fit(part.train)
    X = part.judged[:2]
    own, u = fitted.predict(X), fitted.cluster_centers_
    background = part.train[np.random.default_rng(5).permutation(len(part.train))[:20]]
    expected = 2 * (u[own] - u[1 - own]) * (X - background.mean(0))
    np.testing.assert_allclose(runs.shapley(neuralize(fitted), X, part.train, 5), expected, atol=1e-8)


# ------------------------------------------------------------ a row


def test_a_row_is_what_loops_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SHAP_WORK", 0.0)  # reading shap alone takes seconds
    row = runs.measured("k-means", "wine", 1, SETTINGS)
    assert (row["labels_agree"], row["signs_agree"], row["checked"]) == (1.0, 1.0, 12)
    assert max(row["logit_error"], row["books_error"], row["residual_share"]) < 1e-9
    assert row["coverage"] == pytest.approx(1)
    part = runs.split("wine", 1, SETTINGS)
    fitted = runs.fit("k-means", part, 1, 1)
    X, u, mean = part.judged, fitted.cluster_centers_, part.train.mean(0)
    own = fitted.predict(X)
    values = np.asarray(runs.explained(neuralize(fitted).set_reference(part.train), X).values)
    removed = [0, 2, 4, 6, 8, 10, 12, 13]
    areas = []
    for sign in (-1, 1):  # most, then least relevant first
        curve = np.zeros(len(removed))
        for x, v, c in zip(X, values, own, strict=True):
            order = np.argsort(sign * v)
            for i, k in enumerate(removed):
                changed = x.copy()
                changed[order[:k]] = mean[order[:k]]
                curve[i] += _own_logit(u, changed, int(c))
        curve /= curve[0]
        areas.append(sum((b - a) * (p + q) / 2 for a, b, p, q in zip(
            removed, removed[1:], curve, curve[1:], strict=False)) / 13)  # fmt: skip
    assert row["most"]["mean"]["LRP"] == pytest.approx(areas[0], rel=1e-9)
    assert row["least"]["mean"]["LRP"] == pytest.approx(areas[1], rel=1e-9)
    assert row["srg"]["mean"]["LRP"] == pytest.approx(areas[1] - areas[0], rel=1e-9)
    assert row["srg"]["mean"]["LRP"] > row["srg"]["mean"]["random"]
    assert "midpoint" in row["srg"]
    assert row["curves"]["LRP"][0][0] == row["curves"]["LRP"][1][0] == 1


def test_rows_of_the_other_models_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SHAP_WORK", 0.0)
    kernel = runs.measured("kernel k-means", "wine", 0, SETTINGS)
    deep = runs.measured("deep k-means", "wine", 0, SETTINGS)
    for row in (kernel, deep):
        assert row["labels_agree"] == row["signs_agree"] == 1
        assert max(row["logit_error"], row["books_error"]) < 1e-9
        assert row["residual_share"] > 0.01, "pools and biases take something here"
        assert "midpoint" not in row["srg"]
    assert "LRP, coefficients" in deep["srg"]["KDE"]
    assert "LRP, coefficients" not in kernel["srg"]["KDE"]
    assert "SHAP" not in kernel["srg"]["KDE"], "more multiplications than allowed"


# ------------------------------------------------------------ the report


def _row(model: str, name: str, seed: int, gains: Mapping[str, float], **changes: Any) -> dict[str, Any]:
    by = {i: {n: v + 0.001 * seed * k for k, (n, v) in enumerate(gains.items())} for i in told.IMPUTERS}
    return {
        "table": name, "model": model, "seed": seed, "columns": 4, "clusters": 3, "fitted_on": 40, "judged": 10,
        "checked": 20, "labels_agree": 1.0, "signs_agree": 1.0, "logit_error": 1e-15, "books_error": 1e-15,
        "residual_share": 0.0, "coverage": 1.0, "mean_logit": 2.0,
        "seconds": {n: 0.1 if n == "SHAP" else 1e-4 for n in gains}, "sum_error": dict.fromkeys(gains, 0.0),
        "srg": by, "most": by, "least": by, "curves": {n: [[1.0] * 11, [1.0] * 11] for n in gains},
    } | changes  # fmt: skip


GOOD = {"LRP": 1.0, "LRP, hard": 0.9} | dict.fromkeys(told.CONTROLS, 0.5)


def _study(folder: Path, rows: list[dict[str, Any]]) -> Study:
    study = Study(runs.EXPERIMENT, folder)
    for row in rows:
        study.cell(f"{row['model']}|{row['table']}|{row['seed']}", functools.partial(dict, row))
    return study


def test_verdicts_follow_the_numbers(tmp_path: Path) -> None:
    tables = ("wine", "digits")
    rows = [_row("k-means", t, s, GOOD) for t in tables for s in range(3)]
    study = _study(tmp_path / "good", rows)
    report = runs.EXPERIMENT.report(study)
    assert {c.verdict for c in report.claims} == {"confirmed"}
    assert len(report.claims) == 5
    assert report.wins == ["Flipping, k-means: LRP (default) is ahead of every other method on wine, digits."]
    assert not report.losses
    study.write(report)
    assert "against gradient x input and integrated gradients, LRP is ahead 4 and behind 0 of 4 times" in report.summary
    text = (tmp_path / "good" / "result.md").read_text()
    assert "| wine (D 4, K 3) | 1.00 ± 0.00 |" in text

    bad = [_row("k-means", t, s, GOOD | {"LRP": 0.2}) for t in tables for s in range(3)]
    report = runs.EXPERIMENT.report(_study(tmp_path / "bad", bad))
    assert [c.verdict for c in report.claims] == ["confirmed", "confirmed", "refuted", "refuted", "refuted"]
    assert not report.wins
    assert "behind gradient x input" in report.losses[0]
    assert report.losses[0].endswith("on wine, digits.")
    assert "k-means 0.20 ± 0.00 (" in report.summary
    assert "LRP is ahead 0 and behind 4 of 4 times" in report.summary

    mixed = copy.deepcopy(rows)
    for row in mixed:
        if row["table"] == "digits":
            for imputer in told.IMPUTERS:
                row["srg"][imputer]["gradient x input"] = (0.9, 1.1, 1.0)[row["seed"]]
    report = runs.EXPERIMENT.report(_study(tmp_path / "mixed", mixed))
    assert [c.verdict for c in report.claims] == ["confirmed", "confirmed", "confirmed", "partly", "confirmed"]
    assert "behind none, and level with at least one" in report.losses[0]
    sampled = copy.deepcopy(rows)
    for row in sampled:
        for imputer in told.IMPUTERS:
            row["srg"][imputer]["SHAP"] = 1.1
    report = runs.EXPERIMENT.report(_study(tmp_path / "sampled", sampled))
    assert report.wins[0].startswith("Flipping, k-means: LRP (default) is ahead of what samples nothing")
    assert report.wins[0].endswith("on wine, digits.")
    assert report.claims[-1].verdict == "refuted"

    broken = [row | {"labels_agree": 0.9995, "residual_share": 0.4, "coverage": 0.6} for row in rows]
    assert [c.verdict for c in runs.EXPERIMENT.report(_study(tmp_path / "broken", broken)).claims][:2] == ["partly"] * 2
    slow = copy.deepcopy(rows)
    for row in slow:
        row["books_error"], row["seconds"]["LRP"] = 0.1, 0.05
    found = [c.verdict for c in runs.EXPERIMENT.report(_study(tmp_path / "slow", slow)).claims]
    assert (found[1], found[-1]) == ("refuted", "refuted")


def test_unfinished_runs_claim_nothing_about_gains(tmp_path: Path) -> None:
    assert not runs.EXPERIMENT.report(_study(tmp_path / "none", [])).claims
    assert not runs.EXPERIMENT.report(_study(tmp_path / "none", [])).summary
    without = {n: v for n, v in GOOD.items() if n != "SHAP"}
    study = _study(tmp_path / "one", [_row("k-means", "wine", 0, without)])
    report = runs.EXPERIMENT.report(study)
    assert [c.verdict for c in report.claims][2:] == ["not comparable"] * 3
    assert not report.wins
    assert not report.losses
    study.write(report)


def test_rules_of_verdicts() -> None:
    assert told.difference([1.0, 1.1, 0.9])[0] == "ahead"
    assert told.difference([-1.0, -1.1, -0.9])[0] == "behind"
    assert told.difference([1.0, -1.1, 0.9])[0] == "level"
    assert told.difference([1.0, 1.1])[0] == "unknown"
    # mean 0.4 and standard error 0.1: t = 4 is below the 4.30 of two degrees of freedom
    third = math.sqrt(3) * 0.1
    word, mean, error = told.difference([0.4 - third, 0.4, 0.4 + third])
    assert word == "level"
    assert [mean, error] == pytest.approx([0.4, 0.1])
    assert told.verdict(["ahead"] * 4 + ["level"]) == "confirmed"
    assert told.verdict(["ahead"] * 4 + ["behind"]) == "partly"
    assert told.verdict(["level"] * 4 + ["ahead"]) == "null"
    assert told.verdict(["behind", "behind", "ahead", "level"]) == "refuted"
    assert told.verdict([]) == told.verdict(["unknown"]) == "not comparable"
