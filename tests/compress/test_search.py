"""Composite search: groups by depth, composites that mean what they say, strategies on a known objective."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import analysed
import matplotlib
import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

import compress
import lrp
from compress import criteria
from compress._strategies import choices, expected_improvement, posterior
from compress.evaluation import evaluate
from compress.planning import plan_pruning
from compress.search import (
    RULES,
    SearchResult,
    Trial,
    composite_of,
    depth_groups,
    search,
)
from lrp.errors import BudgetError, InputError, MismatchError

matplotlib.use("Agg")
FEW, HELD, TEST = analysed.batches("train", 30), analysed.batches("validation", 100), analysed.batches("test", 100)
RATES = (0.1, 0.3)


PARTS = {"low": "stem", "middle": ["inner", "outer"], "rest": "*"}


def found(**options: Any) -> SearchResult:
    given: dict[str, Any] = {"validation": HELD, "rules": ("epsilon", "zplus"), "rates": RATES, "progress": False}
    return search(analysed.trained(), analysed.EXAMPLE, FEW, **{**given, **options})


# ---------------------------------------------------------------------- composites


def chain(convolutions: int) -> nn.Module:
    layers: list[nn.Module] = []
    for k in range(convolutions):
        layers += [nn.Conv2d(1 if k == 0 else 2, 2, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (4, [1, 2, 1]), (13, [4, 5, 4])]
)
def test_depth_groups_are_quarters_rounded_up(count: int, sizes: list[int]) -> None:
    groups, dense = depth_groups(chain(count), torch.zeros(1, 1, 4, 4))
    assert [len(groups.get(n, ())) for n in ("first", "middle", "last")] == sizes  # 4 / 5 / 4 on VGG-16
    names = [str(2 * k) for k in range(count)]
    assert [layer for n in ("first", "middle", "last") for layer in groups.get(n, ())] == names
    assert groups["linear"] == dense == (str(2 * count + 1), str(2 * count + 3))
    assert all(groups.values())


class Backwards(nn.Module):
    """Runs its layers against the order in which they are registered, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.c, self.b, self.a = nn.Linear(2, 2), *(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(torch.relu(self.b(torch.relu(self.a(x)))))).mean((2, 3)))


def test_depth_is_the_order_of_execution() -> None:
    model = Backwards().train()
    groups, _ = depth_groups(model, torch.zeros(1, 2, 4, 4))
    assert groups == {"first": ("a",), "middle": ("b",), "last": ("c",), "linear": ("head",)}
    assert model.training


def test_a_composite_gives_every_layer_the_rule_of_its_group() -> None:
    model = analysed.trained().double()
    x = analysed.split()["test"][0][:5].double()
    groups, dense = depth_groups(model, analysed.EXAMPLE.double())
    assert groups == {"first": ("stem",), "middle": ("inner", "outer"), "last": ("top",), "linear": ("hidden", "head")}
    choice = {"first": "alpha2beta1", "middle": "gamma", "last": "zplus", "linear": "gamma"}
    mine = composite_of(choice, groups, dense)
    by_hand = lrp.Composite(
        [
            ("stem", lrp.rules.AlphaBeta(2, 1)),
            ("inner", lrp.rules.Gamma(0.25)),
            ("outer", lrp.rules.Gamma(0.25)),
            ("top", lrp.rules.ZPlus()),
            (nn.Linear, lrp.rules.Gamma(0.05)),
        ]
    )
    plain = lrp.composites.epsilon()
    results = [lrp.attribute(model, x, 3, composite=c, wrt=("input", "channels")) for c in (mine, by_hand, plain)]
    assert torch.equal(results[0].input, results[1].input)
    assert not torch.allclose(results[0].input, results[2].input)
    for name in ("stem", "inner", "outer", "top", "hidden"):
        assert torch.equal(results[0].channels[name], results[1].channels[name])
    none = composite_of({}, {}, dense)
    assert torch.equal(lrp.attribute(model, x, 3, composite=none).input, results[2].input)


# ---------------------------------------------------------------------- the search


def test_the_grid_tries_all_and_every_area_is_the_accuracy_by_hand() -> None:
    model = analysed.trained().train()
    before = copy.deepcopy(model.state_dict())
    result = search(
        model, analysed.EXAMPLE, FEW, validation=HELD, test=TEST, rules=("epsilon", "zplus"), rates=RATES,
        groups={"low": ["stem", "inner"], "rest": "*"}, normalisation="sum", progress=False,
    )  # fmt: skip
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()
    assert [tuple(t.rules.values()) for t in result.trials] == [
        ("epsilon", "epsilon"), ("zplus", "zplus"), ("epsilon", "zplus"), ("zplus", "epsilon"),
    ]  # fmt: skip
    assert result.groups == {"low": ("stem", "inner"), "rest": ("outer", "top", "hidden", "head")}
    assert result.baseline == evaluate(model, HELD).accuracy
    tests = {}
    for trial in result.trials:
        low, rest = (RULES[rule][0] for rule in trial.rules.values())
        rules = lrp.Composite([("stem", low), ("inner", low), ("*", rest)])
        accuracy, unseen = [], []
        for rate in RATES:
            plan = plan_pruning(
                model, analysed.EXAMPLE, FEW, criterion=criteria.lrp(rules), target=compress.Target(channels=1 - rate),
                normalisation="sum", floor=0.0, round_to=1, progress=False,
            )  # fmt: skip
            accuracy.append(evaluate(plan.apply(model), HELD).accuracy)
            unseen.append(evaluate(plan.apply(model), TEST).accuracy)
        assert trial.accuracy == tuple(accuracy)
        assert trial.area == pytest.approx(np.mean(accuracy))
        tests[trial.name] = np.mean(unseen)
    assert len({t.accuracy for t in result.trials}) > 1
    assert result.test == pytest.approx(
        {"epsilon": tests["epsilon"], "zplus": tests["zplus"], "best": tests[result.best.name]}
    )
    assert result.best.area == max(t.area for t in result.trials)


class Counting:
    """Counts evaluations in its class."""

    calls: ClassVar[int] = 0

    def __call__(self, model: nn.Module) -> float:
        Counting.calls += 1
        return evaluate(model, TEST).accuracy


def test_the_test_set_is_asked_for_the_best_and_the_baselines_only() -> None:
    Counting.calls = 0
    result = found(test=Counting(), groups=PARTS)
    assert len(result.trials) == 8
    assert Counting.calls <= 3 * len(RATES)
    assert set(result.test) == {"epsilon", "zplus", "best"}
    assert "pass test=" not in str(result)
    assert "pass test=" in str(found(strategy="random", budget=2))


def test_random_and_bayes_keep_to_the_budget_and_to_the_seed(tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "groups": PARTS,
        "resume": tmp_path / "tried",
    }  # composites are tried once for all of them
    for strategy in ("random", "bayes"):
        first = found(strategy=strategy, budget=4, **shared)
        assert len({t.name for t in first.trials}) == 4
        assert [t.name for t in first.trials[:2]] == ["epsilon", "zplus"]
        assert found(strategy=strategy, budget=4, **shared) == first
        others = [found(strategy=strategy, budget=4, seed=k, **shared).trials for k in range(1, 4)]
        assert any({t.name for t in other} != {t.name for t in first.trials} for other in others)
        assert len(found(strategy=strategy, budget=99, **shared).trials) == 8


def test_sets_that_are_not_apart_are_refused() -> None:
    with pytest.raises(InputError, match="validation and data are not apart"):
        found(validation=FEW)
    with pytest.raises(InputError, match="test and validation are not apart"):
        found(test=[(x.clone(), y) for x, y in HELD])


def test_a_first_layer_alone_is_no_group_for_its_rule_changes_no_score() -> None:
    assert list(found(strategy="random", budget=2).groups) == ["middle", "last", "linear"]
    model, layers = analysed.trained().double(), ["stem", "inner", "outer", "top", "hidden"]
    few = [(x.double(), y) for x, y in FEW]
    scores = []
    for rule in (lrp.rules.Epsilon(), lrp.rules.AlphaBeta(2, 1)):
        rules = lrp.Composite([("stem", rule), ("*", lrp.rules.ZPlus())])
        scores.append(criteria.lrp(rules)(model, few, layers, progress=False).values)
    assert all(torch.allclose(scores[0][n], scores[1][n], rtol=1e-9) for n in layers)


def test_what_makes_no_sense_is_refused() -> None:
    for options, text in (
        ({"strategy": "annealing"}, "strategy is not known"),
        ({"quantity": "bytes"}, "quantity is not known"),
        ({"validation": None}, "validation is missing"),
        ({"budget": 3}, "the grid has 8 composites"),
        ({"strategy": "random", "budget": 1}, "budget is too small"),
        ({"rules": ("epsilon", "beta")}, "'beta' is no rule"),
        ({"rules": {"mine": lrp.rules.Gamma}}, "'mine' is no rule"),
        ({"groups": {"low": "conv*"}}, "'conv\\*' fits no layer"),
        ({"groups": {"all": "*", "low": "stem"}}, "no layer is left for 'low'"),
        ({"groups": {}}, "groups is empty"),
    ):
        with pytest.raises(InputError, match=text):
            found(**options)
    with pytest.raises(BudgetError):
        found(rates=(0.1, 0.98))


def test_rules_of_the_users_own() -> None:
    own = {"strong": lrp.rules.Gamma(1.0), "mixed": (lrp.rules.ZPlus(), lrp.rules.Epsilon(0.1))}
    result = found(rules=own, groups={"all": "*"})
    assert [t.name for t in result.trials] == ["epsilon", "zplus", "strong", "mixed"]
    with pytest.raises(InputError, match="user's own"):
        _ = result.composite
    assert composite_of({"all": "mixed"}, result.groups, result.linear, {**RULES, "mixed": own["mixed"]}).rules[0] == (
        "stem",
        own["mixed"][0],
    )


# ---------------------------------------------------------------------- strategies


def test_expected_improvement_is_an_expectation() -> None:
    mean, deviation = np.array([0.2, 0.5, 0.5, 0.9]), np.array([0.3, 0.1, 1e-14, 0.05])
    draws = mean + deviation * norm.ppf((np.arange(200_000) + 0.5) / 200_000)[:, None]
    expected = np.maximum(draws - 0.6, 0).mean(0)
    assert expected_improvement(mean, deviation, 0.6) == pytest.approx(expected, abs=1e-5)


def test_the_posterior_knows_what_was_measured() -> None:
    x = np.random.default_rng(0).random((30, 2))
    y = np.sin(3 * x[:, 0]) + x[:, 1]
    at = np.array([[0.5, 0.5], x[3], [9.0, 9.0]])
    mean, deviation, known = posterior(x, y, at, seed=0)
    assert mean[:2] == pytest.approx([np.sin(1.5) + 0.5, y[3]], abs=0.02)
    assert known == pytest.approx(y.max(), abs=0.02)
    assert deviation[:2].max() < 0.05 < 0.2 < deviation[2]


def walk(strategy: str, budget: int, seed: int) -> dict[Any, list[float]]:
    """A strategy on a known objective: what each group's rule is worth, and a little noise."""
    names = list(RULES)
    worth = np.random.default_rng(7).random((4, 4))
    noise = np.random.default_rng(8).normal(scale=0.02, size=(4,) * 4)
    grid = list(itertools.product(names, repeat=4))
    tried: dict[Any, list[float]] = {}
    for choice in choices(strategy, grid, tried, budget, seed, RULES):
        place = tuple(names.index(rule) for rule in choice)
        assert choice not in tried
        tried[choice] = [float(sum(worth[k, j] for k, j in enumerate(place)) + noise[place])]
    assert len(tried) == budget
    return tried


def test_bayes_finds_what_random_choices_do_not() -> None:
    best = max(v[0] for v in walk("grid", 256, 0).values())
    reached = {
        s: [best - max(v[0] for v in walk(s, 25, seed).values()) for seed in range(3)] for s in ("random", "bayes")
    }
    assert max(reached["bayes"]) < 0.1
    assert np.mean(reached["bayes"]) < 0.3 * np.mean(reached["random"])


# ---------------------------------------------------------------------- results


def made() -> SearchResult:
    def trial(first: str, linear: str, *accuracy: float) -> Trial:
        return Trial({"first": first, "linear": linear}, float(np.mean(accuracy)), accuracy)

    trials = (
        trial("epsilon", "epsilon", 0.9, 0.7),
        trial("zplus", "zplus", 0.9, 0.5),
        trial("gamma", "epsilon", 0.9, 0.7),
        trial("zplus", "epsilon", 0.9, 0.6),
    )
    groups = {"first": ("a", "b"), "linear": ("c",)}
    return SearchResult(trials, (0.0, 0.5), groups, ("c",), 0.9, 50, {"best": 0.75, "epsilon": 0.75, "zplus": 0.6}, {})


def test_results_by_hand(tmp_path: Path) -> None:
    result = made()
    assert result.best.name == "epsilon"  # of equal ones the first tried: a baseline wins a tie
    assert list(result.baselines()) == ["epsilon", "zplus"]
    assert [m for m, _ in result.composite.rules] == ["a", "b", "c", "*"]
    result.save(tmp_path / "s.json")
    assert SearchResult.load(tmp_path / "s.json") == result
    lines = str(result).splitlines()
    assert lines[0].split() == ["first", "linear", "area,", "validation", "test"]
    assert lines[1].split() == ["epsilon", "epsilon", "0.8000", "0.7500"]
    assert lines[2].split() == ["gamma", "epsilon", "0.8000", "-"]
    assert lines[5] == "unpruned 0.9000; 4 composites tried, 50 validation samples"
    ax = result.plot()
    assert len(ax.lines) == 4 + 2 + 1
    assert result.plot(ax) is ax
    matplotlib.pyplot.close("all")
    real = found(strategy="random", budget=3)
    assert SearchResult.from_json(real.to_json()) == real
    scores = criteria.lrp(real.composite)(analysed.trained(), FEW, ["stem"], progress=False)
    assert scores.values["stem"].shape == (12,)


def test_a_search_goes_on_and_refuses_other_work(tmp_path: Path) -> None:
    path = tmp_path / "tried"
    Counting.calls = 0
    options: dict[str, Any] = {"validation": Counting(), "strategy": "random", "groups": PARTS}
    first = found(budget=3, resume=path, **options)
    assert Counting.calls == 1 + 3 * 2
    more = found(budget=4, resume=path, **options)
    assert Counting.calls == 1 + 4 * 2
    assert more.trials[:3] == first.trials
    assert more == found(budget=4, **options)
    for named, changed in (
        ("rates", {"rates": (0.1,)}),
        ("validation", {"validation": HELD}),
        ("start", {"start": "logit"}),
        ("layers", {"groups": {"all": "*"}}),
    ):
        with pytest.raises(MismatchError, match=f"'{named}' differs"):
            found(**{**options, "resume": path, **changed})


KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    import analysed
    from compress.evaluation import evaluate
    from compress.search import search

    class Fragile:
        calls = 0
        def __call__(self, model):
            Fragile.calls += 1
            if os.environ.get("KILL") == str(Fragile.calls):
                os.kill(os.getpid(), signal.SIGKILL)
            return evaluate(model, analysed.batches("validation", 100)).accuracy

    found = search(analysed.trained(), analysed.EXAMPLE, analysed.batches("train", 20), validation=Fragile(),
                   strategy="bayes", budget=9, rates=(0.2,), resume=sys.argv[1] or None, progress=False)
    print(Fragile.calls)
    print(found.to_json())
"""


@pytest.mark.slow
def test_kill_9_and_resume_give_the_same_search(tmp_path: Path) -> None:
    def run(path: Path | str, kill: int = 0) -> tuple[int, list[str]]:
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), str(Path(analysed.__file__).parent)]
        root = str(Path(compress.__file__).parent.parent)
        environment = {**os.environ, "KILL": str(kill), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    path = tmp_path / "tried"
    assert run(path, kill=8)[0] == -signal.SIGKILL  # in the part that the process chooses
    code, second = run(path)
    assert code == 0
    assert second[0] == "3"
    _, whole = run("")
    assert whole[0] == "10"
    assert second[1] == whole[1]


def test_misspelt_arguments_are_named() -> None:
    for given, words in (
        ({"evaluate": HELD}, "did you mean 'validation'"),
        ({"validation": HELD, "strateg": "grid"}, "did you mean 'strategy'"),
        ({}, "validation is missing"),
    ):
        with pytest.raises(InputError, match=words):
            search(analysed.trained(), analysed.EXAMPLE, FEW, **given)  # type: ignore[arg-type]
