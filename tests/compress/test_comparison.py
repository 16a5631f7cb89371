"""Comparison of criteria: every cell by hand, equal samples and budgets for all, and honest sentences."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import analysed
import matplotlib
import pytest
import torch
from torch import Tensor, nn

import compress
from compress._reference import digests_of
from compress.batchnorm import reestimate
from compress.comparison import Comparison, Curve, compare
from compress.evaluation import evaluate
from compress.planning import plan_pruning
from lrp.errors import BudgetError, InputError, MismatchError

matplotlib.use("Agg")
RATES = (0.1, 0.3)
HELD = analysed.batches("validation")
FEW = analysed.batches("train", 40)


def measured(**options: Any) -> Comparison:
    given: dict[str, Any] = {"criteria": ("taylor",), "evaluate": HELD, "rates": RATES, "progress": False}
    data = options.pop("data", FEW)
    return compare(analysed.trained(), analysed.EXAMPLE, data, **{**given, **options})


@pytest.mark.parametrize("quantity", ["channels", "macs"])
def test_every_cell_by_hand(quantity: str) -> None:
    model = analysed.trained()
    before = copy.deepcopy(model.state_dict())
    found = compare(
        model, analysed.EXAMPLE, FEW, criteria=("taylor", "lrp"), evaluate=HELD, rates=RATES, quantity=quantity,
        normalisations={"*": "mean", "taylor": ("none", "sum")}, progress=False,
    )  # fmt: skip
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert found.baseline == evaluate(model, HELD).accuracy
    assert found.reestimated == (evaluate(reestimate(model, FEW), HELD).accuracy,)
    names = [(c.criterion, c.normalisation, c.batchnorm) for c in found.curves]
    kinds = [("taylor", "none"), ("taylor", "sum"), *((n, "mean") for n in ("lrp", "random", "weight", "activation"))]
    assert names == [(*kind, bn) for kind in kinds for bn in (False, True)]
    for curve in found.curves:
        if curve.criterion == "random":
            continue
        for k, rate in enumerate(RATES):
            plan = plan_pruning(
                model, analysed.EXAMPLE, FEW, criterion=curve.criterion, target=compress.Target(**{quantity: 1 - rate}),
                normalisation=curve.normalisation, floor=0.0, round_to=1, progress=False,
            )  # fmt: skip
            small = plan.apply(model)
            small = reestimate(small, FEW) if curve.batchnorm else small
            assert len(curve.accuracy) == 1
            assert curve.accuracy[0][k] == evaluate(small, HELD).accuracy, curve.name
            share = 1 - getattr(plan.after, quantity) / getattr(plan.before, quantity)
            assert curve.removed[k] == pytest.approx(share)
            assert share >= rate


def test_random_is_another_at_every_draw_and_the_others_are_not_computed_again() -> None:
    Asked.calls = 0
    found = measured(criteria={"mine": Asked()}, draws=4, reestimate_batchnorm=False)
    assert Asked.calls == 1
    for curve in found.curves:
        assert len(set(curve.accuracy)) == len(curve.accuracy) == (4 if curve.criterion == "random" else 1)
        assert (curve.error is None) is (curve.criterion != "random")
    assert "4 draws of random, one of all else" in str(found)
    again = measured(criteria={"mine": Asked()}, draws=4, reestimate_batchnorm=False)
    assert again == found
    assert measured(draws=4, reestimate_batchnorm=False, seed=1).curve("random") != found.curve("random")


class Asked:
    """Keeps, in its class, the samples it was asked with."""

    calls: ClassVar[int] = 0
    seen: ClassVar[list[tuple[str, tuple[int, ...]]]] = []
    widths: ClassVar[dict[str, int]] = {"stem": 12, "outer": 12, "inner": 10, "top": 16, "hidden": 14}

    def __init__(self, name: str = "asked") -> None:
        self.title = name

    def __call__(self, model: nn.Module, data: Any) -> dict[str, Tensor]:
        Asked.calls += 1
        Asked.seen.append((self.title, tuple(sorted(digests_of(data)))))
        total = float(sum(x.abs().sum() for x, _ in data))
        return {n: torch.linspace(0, 1, w).mul(total).sin() for n, w in self.widths.items()}


def test_all_criteria_see_the_same_samples_of_a_draw() -> None:
    Asked.seen.clear()
    x, y = analysed.split()["train"]
    found = measured(
        data=(x, y), criteria={"a": Asked("a"), "b": Asked("b")}, draws=3, per_class=2, reestimate_batchnorm=False
    )
    first, second = ([s for name, s in Asked.seen if name == n] for n in "ab")
    assert first == second
    assert len(set(first)) == 3
    assert all(len(s) == 20 for s in first)
    assert found.curve("weight").error == pytest.approx((0.0, 0.0), abs=1e-12)
    assert max(found.curve("a").error or ()) > 0


def test_draws_of_all_the_samples_there_are_are_one() -> None:
    x, y = analysed.split()["train"]
    rows = torch.cat([(y == c).nonzero().flatten()[:2] for c in range(10)])
    with pytest.warns(UserWarning, match="the data hold exactly 2 of every class"):
        found = measured(data=(x[rows], y[rows]), criteria={"a": Asked("a")}, draws=3, per_class=2)
    assert len(found.reestimated) == 1
    for curve in found.curves:
        assert (curve.error is None) is (curve.criterion != "random"), curve.name
    assert "± 0.0000" not in str(found)
    gap, error = found.difference(found.curve("a"), found.curve("random"))
    assert gap == pytest.approx(found.area(found.curve("a")) - found.area(found.curve("random")))
    assert error is not None  # that of random
    assert found.settings["common"] == 1
    assert measured(data=(x, y), criteria=(), draws=2, per_class=2).settings["common"] < 0.1


def test_batch_norm_is_reestimated_on_the_samples_of_the_draw() -> None:
    x, y = analysed.split()["train"]
    found = measured(data=(x, y), criteria=(), draws=3, per_class=2, reestimate_batchnorm=True, rates=(0.2,))
    assert len(set(found.reestimated)) > 1
    assert len(set(found.curve("weight", batchnorm=True).accuracy)) > 1  # one cut, three sets of statistics
    assert [c.criterion for c in found.curves] == ["random", "weight", "activation"]


def made(*areas: tuple[str, bool, list[list[float]]], baseline: float = 0.9) -> Comparison:
    curves = tuple(
        Curve(name, "auto", bn, tuple(tuple(row) for row in rows), (0.0, 0.3, 0.4)) for name, bn, rows in areas
    )
    return Comparison((0.0, 0.2, 0.4), "channels", curves, baseline, (), 100, {"seed": 0})


def test_areas_errors_and_top_rates_by_hand() -> None:
    found = made(
        ("lrp", False, [[0.9, 0.8, 0.4], [0.9, 0.9, 0.5]]), ("random", False, [[0.9, 0.6, 0.3], [0.9, 0.6, 0.1]])
    )
    lrp, random = found.curves
    assert lrp.mean == pytest.approx((0.9, 0.85, 0.45))
    assert lrp.error == pytest.approx((0.0, 0.05, 0.05))
    assert lrp.areas == pytest.approx((0.7, 2.3 / 3))
    assert found.area(lrp) == pytest.approx(2.2 / 3)
    assert found.trapezoid(lrp) == pytest.approx(0.2 * (0.45 + 0.85 + 0.225))
    assert found.top(lrp) == 0.0  # 0.855 is 95 % of the baseline
    assert found.top(lrp, 0.9) == 0.2
    assert found.top(random, 1.01) is None
    gap, error = found.difference(lrp, random)
    assert gap == pytest.approx((0.1 + 2.3 / 3 - 1.6 / 3) / 2)
    assert error == pytest.approx(abs(0.1 - 0.7 / 3) / 2)
    tested = (2.2 / 3 * 0.8 / 3 + 1.7 / 3 * 1.3 / 3) / 100
    assert found.error(lrp, random) == pytest.approx(math.sqrt(error**2 + tested))
    assert dataclasses.replace(found, count=0).error(lrp, random) == pytest.approx(error)
    perfect = made(("lrp", False, [[1.0, 1.0, 1.0]]), baseline=1.0)
    assert (perfect.area(perfect.curves[0]), perfect.trapezoid(perfect.curves[0])) == (1.0, pytest.approx(0.4))
    assert perfect.curves[0].error is None


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([[0.9, 0.9, 0.8], [0.9, 0.9, 0.82]], "'lrp' is better than the best baseline 'weight': +13.00 points"),
        ([[0.9, 0.3, 0.2], [0.9, 0.3, 0.25]], "the baseline 'weight' is better than 'lrp': -25.83 points"),
        ([[0.9, 0.9, 0.9], [0.9, 0.5, 0.2]], "'lrp' is not told apart from the baseline 'weight': +1.67 points"),
    ],
)
def test_the_verdict_says_whether_relevance_helps(own: list[list[float]], expected: str) -> None:
    weight = [[0.9, 0.7, 0.6], [0.9, 0.7, 0.6]]
    found = made(("lrp", False, own), ("random", False, [[0.9, 0.1, 0.1]] * 2), ("weight", False, weight))
    gap, _ = found.difference(found.curve("lrp"), found.curve("weight"))
    assert found.verdict().startswith("as cut: " + expected.split(": ")[0])
    assert f"{100 * gap:+.2f} points" in found.verdict()
    assert found.verdict() in str(found)
    found = made(("weight:l2", False, own), ("weight", False, weight))
    assert "best of the baselines" in found.verdict()  # another norm is no criterion of another kind
    alone = dataclasses.replace(made(("lrp", True, own[:1]), ("weight", True, weight[:1])), count=0)
    assert alone.verdict().endswith("of which no error is known")
    assert alone.verdict().startswith("with batch norm re-estimated")
    assert made(("weight", False, weight)).verdict() == "as cut: 'weight' is the best of the baselines"


def test_tables_pictures_and_files(tmp_path: Path) -> None:
    found = measured(draws=2, normalisations=("none", "mean"))
    found.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == found
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(rows) == (3 + 2) * 2 * 2 * 2  # two draws of random alone
    one = [r for r in rows if (r["criterion"], r["normalisation"], r["batchnorm"]) == ("taylor", "mean", "True")]
    curve = found.curve("taylor", "mean", True)
    assert [float(r["accuracy"]) for r in one] == [a for row in curve.accuracy for a in row]
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["criterion", "-10%", "-30%"]
    areas = [found.area(found.curve(*c)) for c in [(x.criterion, x.normalisation, False) for x in found.curves[::2]]]
    assert float(lines[1].split()[-3]) == pytest.approx(max(areas), abs=1e-4)
    assert found.to_markdown().splitlines()[1].startswith("|---|---:|")
    ax = found.plot()
    assert len(ax.containers) == 16
    assert len(found.plot(batchnorm=True).containers) == 8
    assert found.plot(ax) is ax
    matplotlib.pyplot.close("all")


def test_what_makes_no_sense_is_refused() -> None:
    Asked.calls = 0
    with pytest.raises(BudgetError, match="can not be met"):
        measured(criteria={"mine": Asked()}, rates=(0.1, 0.97))
    assert Asked.calls == 0  # refused before any scoring
    for options, text in (
        ({"quantity": "bytes"}, "quantity is not known"),
        ({"draws": 0}, "draws makes no sense"),
        ({"criteria": ("lrp", "lrp")}, "two criteria are named 'lrp'"),
        ({"normalisations": "max"}, "normalisations make no sense"),
        ({"normalisations": {"tailor": "sum"}}, "normalisations make no sense"),
        ({"normalisations": ()}, "normalisations make no sense"),
        ({"reestimate_batchnorm": ()}, "neither true nor false"),
        ({"evaluate": None}, "evaluate is missing"),
        ({"per_class": 500, "data": analysed.split()["train"]}, "too few samples"),
        ({"criteria": ("tailor",)}, "criterion"),
    ):
        with pytest.raises(InputError, match=text):
            measured(**options)
    with pytest.raises(InputError, match="no such curve"):
        made(("weight", False, [[0.1, 0.1, 0.1]])).curve("weight", batchnorm=True)


class Counting:
    """Counts evaluations in its class."""

    calls: ClassVar[int] = 0

    def __call__(self, model: nn.Module) -> float:
        Counting.calls += 1
        return evaluate(model, HELD).accuracy


def test_a_run_goes_on_and_is_extended(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    options: dict[str, Any] = {"evaluate": Counting(), "resume": path, "criteria": ("taylor",)}
    Counting.calls, Asked.calls = 0, 0
    first = measured(**options)
    assert Counting.calls == 1 + 1 + 4 * 2 * 2
    Counting.calls = 0
    assert measured(**options) == first
    assert Counting.calls == 0
    more = measured(**{**options, "rates": (0.1, 0.2, 0.3), "criteria": ("taylor", "gradient")})
    assert Counting.calls == 4 * 2 + 3 * 2
    assert more.curve("taylor").accuracy[0][::2] == first.curve("taylor").accuracy[0]
    assert more == measured(rates=(0.1, 0.2, 0.3), criteria=("taylor", "gradient"), evaluate=Counting())
    for named, changed in (
        ("data", {"data": [(FEW[0][0][:3], FEW[0][1][:3])]}),
        ("reduction", {"reduction": "max"}),
        ("evaluate", {"evaluate": HELD}),
    ):
        with pytest.raises(MismatchError, match=f"'{named}' differs"):
            measured(**{**options, **changed})


def test_a_criterion_of_the_same_name_with_other_settings_is_another(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    first = measured(criteria={"mine": "weight:l1"}, resume=path)
    second = measured(criteria={"mine": "weight:l2"}, resume=path)
    assert first.curve("mine").accuracy == first.curve("weight").accuracy
    assert second.curve("mine") == measured(criteria={"mine": "weight:l2"}).curve("mine")


def test_a_mean_of_draws_has_its_standard_error() -> None:
    found = measured(criteria=(), draws=5, reestimate_batchnorm=False)
    own = found.curve("random")
    for k in range(len(RATES)):
        values = [row[k] for row in own.accuracy]
        mean = sum(values) / 5
        assert own.mean[k] == pytest.approx(mean)
        assert (own.error or ())[k] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 5))


KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    import analysed
    from compress.comparison import compare
    from compress.evaluation import evaluate

    class Fragile:
        calls = 0
        def __call__(self, model):
            Fragile.calls += 1
            if os.environ.get("KILL") == str(Fragile.calls):
                os.kill(os.getpid(), signal.SIGKILL)
            return evaluate(model, analysed.batches("validation", 100)).accuracy

    found = compare(analysed.trained(), analysed.EXAMPLE, analysed.split()["train"], criteria=("lrp",), per_class=2,
                    draws=2, evaluate=Fragile(), rates=(0.2,), resume=sys.argv[1] or None, progress=False)
    print(Fragile.calls)
    print(found.to_json())
"""


@pytest.mark.slow
def test_kill_9_and_resume_give_the_same_curves(tmp_path: Path) -> None:
    def run(path: Path | str, kill: int = 0) -> tuple[int, list[str]]:
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), str(Path(analysed.__file__).parent)]
        root = str(Path(compress.__file__).parent.parent)
        environment = {**os.environ, "KILL": str(kill), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    path = tmp_path / "cells"
    for kill in (2, 6, 9):
        assert run(path, kill)[0] == -signal.SIGKILL
    code, second = run(path)
    assert code == 0
    _, whole = run("")
    assert int(second[0]) == int(whole[0]) - (1 + 5 + 8)
    assert second[1] == whole[1]
