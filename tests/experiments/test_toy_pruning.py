"""The toy experiment: its points, masks against real removal, agreement against loops, verdicts on made-up rows."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import make_circles

import compress
import lrp
from experiments.papers import toy_claims as claims
from experiments.papers import toy_pruning as toy
from experiments.papers.toy_report import report
from experiments.study import Study

TINY: dict[str, Any] = {
    **toy.COMMON, "seeds": 3, "width": 12, "training points": 100, "test points": 40, "batch": 50, "steps": 60,
    "first units": [3, 12],
    "series": [
        {"name": "paper", "mode": "paper", "draws": "even", "network": 0, "n": [1, 5], "seeds": 3},
        {"name": "relu3", "mode": "relu3", "draws": "random", "network": 0, "n": [5], "seeds": 2},
    ],
}  # fmt: skip


# -- points -----------------------------------------------------------------------
def test_points_are_the_published_ones() -> None:
    x, y = toy.points("circle", 1000, "even", 0)
    there, label = make_circles(2000, noise=0.1, factor=0.3, random_state=0)
    for k in (0, 1):
        assert np.array_equal(x[y == k], there[label == k].astype(np.float32))
    x, y = toy.points("mult", 1, "even", 3)
    assert np.array_equal(x, np.zeros((4, 2))), "four points at the origin, with four labels"
    assert y.tolist() == [0, 1, 2, 3]
    x, y = toy.points("mult", 50, "even", 3)
    assert np.allclose(np.linalg.norm(x, axis=1), np.tile(np.linspace(0, 1, 50), 4), atol=1e-6)


@pytest.mark.parametrize("name", ["moon", "circle", "mult"])
def test_even_points_move_by_their_noise_only(name: str) -> None:
    even, drawn = (
        np.stack([toy.points(name, 400, draws, seed)[0] for seed in (1, 2)]).astype(float)
        for draws in ("even", "random")
    )
    angle = np.arctan2(even[..., 1], even[..., 0])
    assert not np.array_equal(even[0], even[1])
    assert np.abs(even.mean(1) - drawn.mean(1)).max() < 0.1, "the same curves"
    assert np.abs(even.std(1) - drawn.std(1)).max() < 0.1
    near = [np.linalg.norm(x[0][:, None] - x[1][None], axis=2).min(1).mean() for x in (even, drawn)]
    assert max(near) < 0.1
    assert angle.shape == (2, 400 * toy.CLASSES[name])
    again = toy.points(name, 400, "random", 1)[0]
    assert np.array_equal(again, drawn[0].astype(np.float32))


# -- scores and masks ---------------------------------------------------------------
def _positive_weights(net: torch.nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Layer by layer: epsilon-LRP of single layers that have positive weights and no biases."""
    fc = [m for m in net if isinstance(m, torch.nn.Linear)]
    a = [fc[0](x).relu()]
    a.append(fc[1](a[0]).relu())
    a.append(fc[2](a[1]))
    logits = fc[3](a[2]).detach()
    start = logits * torch.nn.functional.one_hot(y, logits.shape[1])
    out = []
    for values, layer in zip(reversed(a), reversed(fc[1:]), strict=True):
        part = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        part.weight.data = layer.weight.detach().clamp(min=0)
        found = lrp.attribute(part, values.detach(), composite=lrp.rules.Epsilon(0), start=start, ledger=False)
        assert isinstance(found.input, torch.Tensor)
        start = found.input
        out.append(start.mean(0))
    return out[::-1]


@pytest.mark.parametrize(("mode", "data"), [("paper", "moon"), ("relu3", "mult")])
def test_scores_are_those_of_compress_and_masks_are_removal(mode: str, data: str) -> None:
    settings = {**TINY, "width": 30}
    net = toy.network(mode, 30, toy.CLASSES[data])
    net.load_state_dict(toy.train(data, mode, settings, 0))
    bench = toy.Bench(data, mode, net, settings)
    x, y = (torch.from_numpy(a) for a in toy.points(data, 5, "even", 3))
    example = torch.zeros(1, 2)
    scores = bench.scores(5, "even", 3) | bench.scores(0, "even", 3)
    assert set(scores) == set(toy.CRITERIA)
    row = bench.row(bench.normalised(5, "even", 3) | bench.normalised(0, "even", 3), bench.training)
    where, label = (torch.from_numpy(a) for a in toy.points(data, settings["training points"], "even", 0))
    for name, (spec, published) in toy.CRITERIA.items():
        found = compress.score(net, example, [(x, y)], criterion=spec.format(seed=3), progress=False)
        if name == "LRP z+" and mode == "paper":
            found = compress.Scores(dict(zip(bench.names, _positive_weights(net, x, y), strict=True)))
        expected = torch.stack([found.values[k] for k in bench.names])
        torch.testing.assert_close(scores[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        for how in {published, "sum"}:
            told = name if how == published else f"{name}, layer sum"
            plan = compress.plan_pruning(
                net, example, [(x, y)], criterion=spec.format(seed=3), scores=found, normalisation=how,
                target=compress.Target(channels=2 / 3 + 1e-9), floor=1, round_to=1,
            )  # fmt: skip
            small = plan.apply(net).eval()
            left = [m.out_features for m in small.modules() if isinstance(m, torch.nn.Linear)][:3]
            assert row["cuts"][told] == [30 - k for k in left]
            right = (small(where).argmax(1) == label).double().mean()
            assert row["values"][told] == [pytest.approx(100 * float(right), abs=0.51)]  # a point on the border


@pytest.mark.parametrize("mode", ["paper", "relu3"])
def test_a_mask_is_zeros_in_the_network(mode: str) -> None:
    settings = {**TINY, "width": 9}
    net = toy.network(mode, 9, 4)
    net.load_state_dict(toy.train("mult", mode, settings, 1))
    bench = toy.Bench("mult", mode, net, settings)
    held = bench.training + toy.Held(bench, bench.test_sets(0))
    assert held.names == ["train", "0", "0.01", "0.1", "0.3"]
    assert held.sizes == [400, 40, 40, 40, 40]
    points = [toy.points("mult", 100, "even", 0), *bench.test_sets(0).values()]
    for count in (1, 4, 8):  # both ways to the product of layer 2
        gone = torch.zeros(3, 9, dtype=torch.bool)
        for layer in range(3):
            gone[layer, torch.randperm(9)[:count]] = True
        expected = []
        for x, y in points:
            h = torch.from_numpy(x)
            for layer, name in enumerate(("fc1", "fc2", "fc3")):
                z = net.get_submodule(name)(h)
                h = (z if layer == 2 and mode == "paper" else z.relu()) * ~gone[layer]
            right = net.get_submodule("fc4")(h).argmax(1) == torch.from_numpy(y)
            expected.append(100 * float(right.double().mean()))
        assert bench.accuracy(held, gone) == pytest.approx(expected, abs=0.26)
    assert 0 < bench.accuracy(held, gone)[0] < 100


def test_the_twin_has_one_more_relu() -> None:
    kinds = {m: [type(k).__name__ for k in toy.network(m, 5, 2)] for m in ("paper", "relu3")}
    assert [k.count("ReLU") for k in kinds.values()] == [2, 3]
    assert kinds["paper"][-2:] == ["Linear", "Linear"]
    assert kinds["paper"][:3] == ["Linear", "Dropout", "ReLU"]


# -- agreement ----------------------------------------------------------------------
def test_agreement_equals_loops() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(30)
    scores = [np.round(base + 0.3 * rng.random(30), 1) for _ in range(5)]  # with ties
    found = toy.agreement(scores, (4, 10))

    def mean(of: Any, which: list[int]) -> float:
        return float(np.mean([of(scores[i], scores[j]) for i, j in itertools.combinations(which, 2)]))

    def shared(k: int) -> Any:
        def of(a: Any, b: Any) -> float:
            first = [set(sorted(range(30), key=lambda i: (s[i], i))[:k]) for s in (a, b)]
            return len(first[0] & first[1]) / k

        return of

    for what, of in (("4", shared(4)), ("10", shared(10)), ("spearman", lambda a, b: spearmanr(a, b).statistic)):
        without = [mean(of, [i for i in range(5) if i != out]) for out in range(5)]
        error = np.sqrt(4 / 5 * np.sum((np.array(without) - np.mean(without)) ** 2))
        assert found[what] == pytest.approx([mean(of, list(range(5))), float(error)], abs=2e-5)
    assert toy.agreement(scores[:1] * 2, (4,))["4"] == [1.0, None]


# -- the run --------------------------------------------------------------------------
@pytest.mark.slow
def test_a_tiny_run_and_its_continuation(tmp_path: Path) -> None:
    experiment = dataclasses.replace(toy.EXPERIMENT, quick=TINY)
    study = Study(experiment, tmp_path, quick=True)
    assert study.run()
    rows = study.rows
    cells = [r for r in rows if r["kind"] == "accuracy"]
    assert len(cells) == 3 * (3 * 3 + 2 * 2)
    assert len(rows) - len(cells) == 3 * (3 + 2)
    for row in cells:
        assert all(sum(cut) == 12 for cut in row["cuts"].values())
        assert len(row["sets"]) == (3 if row["n"] == 1 else 5)
        assert ("unpruned" in row["values"]) == ("weight" in row["values"]) == (row["n"] == 0)
    page = (tmp_path / "result.md").read_text()
    assert "## Units removed per layer" in page
    assert "![accuracy](accuracy.svg)" in page
    again = Study(experiment, tmp_path, quick=True)
    assert again.run()
    assert again.rows == rows
    assert len(list((tmp_path / "cache").iterdir())) == 6


# -- the report -------------------------------------------------------------------------
def _made(lrp: float, loss: float, controls: float, shared: float, unpruned: float = 100.0) -> list[Any]:
    """Rows in which LRP has one accuracy from n = 5, and gradient and Taylor another."""
    sets, sizes = ["train", "0", "0.3", "0.01", "0.1"], (1, 5, 200)
    rows: list[dict[str, Any]] = []
    for data, seed, n in itertools.product(claims.DATA, range(4), (0, *sizes)):
        names = ("random", "weight", "unpruned") if n == 0 else (*claims.CONTROLS[2:], *claims.EQUAL, *claims.RELEVANCE)
        values = {}
        for name in names:
            at = {"unpruned": unpruned, "random": controls, "weight": controls, "activation": controls}.get(name, loss)
            if name.startswith("LRP"):
                at = lrp if n > 1 else 50.0
            if n == 200 and at == loss:
                at = (lrp + loss) / 2
            values[name] = [at + 0.01 * (seed % 2 if name != "unpruned" else 0)] * 5
        cuts = {name: [5, 4, 3] for name in names if name != "unpruned"}
        about = {"series": "paper", "data": data, "n": n, "seed": seed}
        rows.append({"kind": "accuracy", **about, "sets": sets, "values": values, "cuts": cuts})
    for data, n in itertools.product(claims.DATA, sizes):
        high = {"LRP z+": 1 - shared if (data, n) == ("circle", 1) else shared, "Taylor": 0.7, "gradient": 0.7}
        found = {name: {"1000": [v, 0.01], "500": [v, 0.01], "spearman": [v, 0.01]} for name, v in high.items()}
        rows.append({"kind": "agreement", "series": "paper", "data": data, "n": n, "draws": 4, "values": found})
    return rows


def _verdicts(rows: list[Any]) -> dict[str, str]:
    return {c.claim: c.verdict for c in claims.claims(claims.Rows(rows), (500, 1000))}


def test_verdicts_follow_the_numbers() -> None:
    good = _verdicts(_made(99.95, 80.0, 97.0, 0.96))
    beats = "On {}, n = 5, LRP keeps the accuracy because it finds the right units: it beats simple controls"
    assert good["From n = 5, LRP keeps the accuracy of the unpruned network on moon and circle"] == "confirmed"
    assert good["From n = 5, LRP keeps at least 91 % on mult"] == "not comparable", "100.00 unpruned is not 94.95"
    assert good["From n = 5, LRP loses 3.0 to 3.8 points of the unpruned network on mult"] == "confirmed"
    assert good["At n = 5, gradient and Taylor lose far more than LRP"] == "confirmed"
    assert good["Weight magnitude keeps 99.60 / 97.10 / 91.00"] == "partly"
    assert good["At n = 1, LRP is behind weight magnitude"] == "confirmed"
    assert good["The lead over gradient and Taylor shrinks with n, and is still there at n = 200"] == "confirmed"
    assert good[beats.format("moon")] == "confirmed"
    assert good["Of the first 500 units at n = 5, LRP does not agree more than gradient and Taylor"] == "refuted"
    same = (
        "LRP removes nearly the same units for every draw, gradient and Taylor do not (evenly spaced reference points)"
    )
    assert good[same] == "confirmed"
    assert good["At n = 1, LRP agrees less than gradient and Taylor on circle, and more on moon"] == "confirmed"

    other = _verdicts(_made(85.0, 84.0, 85.0, 0.6))
    assert other["From n = 5, LRP keeps the accuracy of the unpruned network on moon and circle"] == "refuted"
    assert other["From n = 5, LRP loses 3.0 to 3.8 points of the unpruned network on mult"] == "refuted"
    for accuracy, verdict in ((91.5, "confirmed"), (89.0, "refuted")):
        as_good = _verdicts(_made(accuracy, 80.0, 85.0, 0.6, unpruned=94.5))
        assert as_good["From n = 5, LRP keeps at least 91 % on mult"] == verdict
    assert other["At n = 5, gradient and Taylor lose far more than LRP"] == "refuted"
    assert other["Weight magnitude keeps 99.60 / 97.10 / 91.00"] == "refuted"
    assert other["Under noise of sigma 0.3, from n = 5, LRP is as good as the unpruned network"] == "refuted"
    assert other[beats.format("circle")] == "null"
    assert other["Of the first 500 units at n = 5, LRP does not agree more than gradient and Taylor"] == "confirmed"
    assert other[same] == "partly", "Taylor and gradient agree as little as was published"
    assert other["At n = 1, LRP agrees less than gradient and Taylor on circle, and more on moon"] == "partly"
    assert _verdicts(_made(85.0, 80.0, 97.0, 0.96))[beats.format("mult")] == "refuted"


def test_differences_are_paired() -> None:
    rows = claims.Rows(_made(99.95, 80.0, 97.0, 0.96))
    gap = rows.difference("moon", 5, "LRP z+", "Taylor")
    assert gap is not None
    assert gap[0] == pytest.approx(19.95)
    assert gap[1] == pytest.approx(0, abs=1e-9)
    mean, error = rows.mean("paper", "moon", 5, "Taylor") or (0.0, None)
    assert mean == pytest.approx(80.005)
    assert error == pytest.approx(0.01 / 12**0.5)  # sd of 0, 0, 1, 1 is 1 / sqrt(3), of four


def _report(rows: list[Any], tmp_path: Path) -> Any:
    study = Study(toy.EXPERIMENT, tmp_path)
    for k, row in enumerate(rows):
        study.cells.add(str(k), **row)
    return report(study)


def test_wins_and_losses(tmp_path: Path) -> None:
    found = _report(_made(99.95, 80.0, 97.0, 0.96), tmp_path)
    assert any(text.startswith("moon: training points, n = 5, 200 reference") for text in found.wins)
    assert any("(at 5: LRP z+ 2.95 ± 0.00 points against random)" in text for text in found.wins)
    assert all("n = 1 reference" in text for text in found.losses)
    behind = _report(_made(85.0, 80.0, 97.0, 0.96), tmp_path / "behind")
    assert not behind.wins
    assert any("any number of reference" in text and "LRP z+ -12.00" in text for text in behind.losses)
    assert any("Training points, n = 5. moon: unpruned 100.00" in text for text in found.words)
    assert "more than half a point and two standard errors on moon, circle and mult" in found.summary
    assert "nowhere more than half a point and two standard errors" in behind.summary
    assert len(found.losses) <= len(claims.DATA)
    many = next(c.ours for c in found.claims if c.claim.startswith("LRP removes nearly the same units"))
    assert many.startswith("LRP z+ 0.960, Taylor 0.")


@pytest.mark.parametrize("keep", [0, 1, 7, 30])
def test_an_unfinished_run_is_reported(keep: int, tmp_path: Path) -> None:
    rows = _made(99.95, 80.0, 97.0, 0.96)
    found = _report(rows[:keep], tmp_path)
    assert len(found.claims) < len(_verdicts(rows))
    assert found.summary == ""
    for table in found.tables.values():
        assert table.markdown().startswith("| ")
        table.csv()
    assert set(found.figures) == {"accuracy", "agreement", "cuts"}


def test_the_published_table_is_complete() -> None:
    assert len(claims.PUBLISHED) == 24
    assert all(len(v) == 9 for v in claims.PUBLISHED.values())
    assert claims.PUBLISHED["mult", 5] == [67.96, 8.32, 77.34, 6.56, 91.85, 0.83, 34.87, 38.09, 45.88]


def test_another_width_is_not_comparable(tmp_path: Path) -> None:
    study = Study(toy.EXPERIMENT, tmp_path, quick=True)
    for k, row in enumerate(_made(99.95, 80.0, 97.0, 0.96)):
        study.cells.add(str(k), **row)
    found = report(study).claims
    assert found
    assert {c.verdict for c in found} == {"not comparable"}
    assert "120 units" in found[0].why
