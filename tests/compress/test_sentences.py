"""What a report says: every sentence with the numbers that make it true, and with those that make it false."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from reports import AFTER, BEFORE, answers, by_hand, compared, timed

from compress import Target
from compress._sentences import byte_size, percent, rows, sentences
from compress.comparison import Comparison, Curve
from compress.evaluation import ClassAccuracy, Evaluation
from compress.pruning import Step
from compress.reporting import Measured, Report


def texts(report: Report) -> str:
    return "\n".join(report.sentences)


def warned(report: Report) -> str:
    return "\n".join(s.text for s in sentences(report) if s.warning)


def with_curves(
    own: list[list[float]], base: list[list[float]], *, rate: float = 0.5, count: int = 450, batchnorm: bool = True
) -> dict[str, Any]:
    """A comparison at one rate: accuracies by draw of lrp, and of the three baselines alike but for a constant."""
    curves = [Curve("lrp", "auto", batchnorm, tuple(map(tuple, own)), (rate,))]
    for name, less in (("activation", 0.0), ("weight", 0.1), ("random", 0.3)):
        lower = tuple(tuple(a - less for a in row) for row in base)
        curves.append(Curve(name, "auto", batchnorm, lower, (rate,)))
    return Comparison((rate,), "macs", tuple(curves), 0.99, (), count).to_json()


# ---------------------------------------------------------------------- target


@pytest.mark.parametrize(
    ("target", "limit", "reached", "expected"),
    [
        (Target(macs=0.5), 2e5, 1.96e5, "at most 50 % of the multiply-adds (MACs); 49 % remain (196,000 of 400,000)."),
        (Target(macs="50%"), 2e5, 1.96e5, "at most 50 % of the multiply-adds (MACs); 49 % remain"),
        (Target(macs="200k"), 2e5, 1.96e5, "at most 200k multiply-adds (MACs); 49 % remain (196,000 of 400,000)."),
        (Target(channels=104), 104.0, 104.0, "at most 104 prunable channels; 65 % remain (104 of 160)."),
        (Target(bytes="80kB"), 8e4, 7.5e4, "at most 80kB bytes on disk; 45.9 % remain (75,000 of 163,412)."),
        (Target(params=0.45), 1.8e4, 1.8e4, "at most 45 % of the parameters; 45 % remain (18,000 of 40,000)."),
    ],
)
def test_target(target: Target, limit: float, reached: float, expected: str) -> None:
    report = by_hand(target=target, limit=limit, reached=reached)
    assert report.met
    assert report.sentences[0] == f"Asked for {expected}" or expected in report.sentences[0]
    assert report.sentences[0] not in warned(report)


def test_latency_target() -> None:
    report = by_hand(
        target=Target(latency_ms=0.7),
        limit=0.7,
        reached=0.6,
        before=answers({}),
    )
    costs = dataclasses.replace(BEFORE, latency_ms=1.0)
    report = dataclasses.replace(report, before=dataclasses.replace(report.before, costs=costs))
    assert report.sentences[0] == "Asked for at most 70 % of the time per call; 60 % remain (0.6 of 1)."


def test_a_target_that_was_missed_is_a_warning() -> None:
    report = by_hand(limit=1.9e5)
    assert not report.met
    assert "this was not reached: 49 % remain" in warned(report)
    assert "what was reached is not measured" in warned(by_hand(reached=None))


@pytest.mark.parametrize(
    ("round_to", "expected"),
    [
        (16, "blocks of up to 16 channels; round_to=1 comes closer, but may run slower."),
        ({"conv1": 8, "conv4": 4}, "blocks of up to 8 channels; round_to=1 comes closer"),
        ("auto", "blocks of up to 16 channels; round_to=1 comes closer"),
        (1, "below the target, although widths were not rounded: channels go as a whole."),
        (None, "13.3 % below the target."),
    ],
)
def test_a_target_that_was_rounded_away(round_to: Any, expected: str) -> None:
    settings = {"ranking": {"round_to": round_to}}
    report = by_hand(target=Target(macs=0.7), limit=2.8e5, reached=2.428e5, settings=settings)
    assert "; 60.7 % remain" in report.sentences[0]
    assert report.sentences[1].startswith("What remains is 13.3 % below the target")
    assert report.sentences[1].endswith(expected) or expected in report.sentences[1]
    assert expected in str(report)
    assert report.sentences[1] in warned(report)


def test_a_target_that_is_near_is_not_worth_a_word() -> None:
    settings = {"ranking": {"round_to": 16}}
    assert "below the target" not in texts(by_hand(limit=2e5, reached=1.9e5, settings=settings))
    assert "5.5 % below the target: widths" in texts(by_hand(limit=2e5, reached=1.89e5, settings=settings))
    edited = by_hand(limit=2e5, reached=1e5, settings={**settings, "edits": ["conv1: keep 4"]})
    assert "50 % below the target: the plan was edited by hand." in texts(edited)
    odd = by_hand(limit=2e5, reached=1e5, settings={"ranking": {"round_to": "auto"}}, widths={"conv1": (32, 15)})
    assert "although widths were not rounded" in texts(odd)
    missed = by_hand(limit=1.9e5, settings=settings)
    assert "below the target" not in texts(missed)
    times = by_hand(target=Target(latency_ms="1ms"), limit=1.0, reached=0.6, settings=settings)
    assert times.sentences[0] == "Asked for at most 1ms milliseconds per call; 0.6 remain."
    assert "below the target" not in texts(times)


def test_a_floor_that_ended_the_run() -> None:
    steps = tuple(Step(k, Target(macs=300_000), AFTER, None, None, None) for k in (1, 2))
    stopped = "accuracy floor at step 2: 0.9400 < 0.9500; rolled back"
    report = by_hand(stopped=stopped, history=steps, limit=1.9e5)
    assert not report.met
    assert f"The accuracy floor ended the run: {stopped}. The last step was undone; steps kept: 1." in warned(report)
    other = by_hand(stopped="nothing is left to remove")
    assert "The run ended early: nothing is left to remove." in warned(other)
    assert "accuracy floor ended" not in texts(other)
    assert "ended" not in texts(by_hand())


# ---------------------------------------------------------------------- accuracy


def test_a_small_loss_may_be_chance() -> None:
    report = by_hand()  # 4 lost, none gained: p = 2 / 2^4
    assert "On 450 test samples top-1 accuracy went from 99.6 % (98.4 to 99.9) to 98.7 % (97.1 to 99.4)" in texts(
        report
    )
    assert (
        "loses 4 samples that the original gets right and gains 0: the intervals overlap, and a difference like this"
        in texts(report)
    )
    assert "p = 0.12" in texts(report)
    assert "more than chance" not in warned(report)


def test_overlapping_intervals_do_not_hide_a_paired_loss() -> None:
    report = by_hand(before=answers({0: 1}), after=answers({0: 1, 3: 7}))  # 7 lost, none gained: p = 2 / 2^7
    assert "this loss is more than chance (McNemar's test, p = 0.016); the intervals overlap, but both" in warned(
        report
    )


def test_a_large_loss() -> None:
    report = by_hand(after=answers(dict.fromkeys(range(10), 20)))
    assert "this loss is more than chance" in warned(report)
    assert "overlap" not in texts(report)


def test_a_gain() -> None:
    report = by_hand(before=answers({3: 20}), after=answers({}))
    assert "this gain is more than chance" in texts(report)
    assert "chance" not in warned(report)
    assert "No class lost accuracy." in texts(report)


def test_unpaired_results_are_judged_by_intervals() -> None:
    first, second, third = (Evaluation.from_json(answers(w).to_json()) for w in ({0: 1}, {0: 4}, {0: 40}))
    near = by_hand(before=first, after=second)
    assert "The intervals overlap: these samples do not tell the two networks apart." in texts(near)
    far = by_hand(before=first, after=third)
    assert "The intervals do not overlap: the loss is more than chance." in warned(far)


def test_a_measure_of_the_users_own() -> None:
    report = by_hand(before=Evaluation(3.25), after=Evaluation(3.125), classes=None)
    assert "The user's own measure went from 3.25 to 3.125." in texts(report)
    assert rows(report)[0][:4] == ("own measure", "3.25", "3.125", "−0.125")


def test_without_test_samples() -> None:
    report = by_hand()
    bare = [dataclasses.replace(side, evaluation=None) for side in (report.before, report.after)]
    report = dataclasses.replace(report, before=bare[0], after=bare[1], classes=None)
    assert "Accuracy was not measured" in warned(report)


def test_who_was_hurt() -> None:
    after = answers({0: 1, 3: 1, 8: 20})
    report = by_hand(after=after)
    assert "Hurt more than chance explains, of 10 classes: 8 (100 % to 55.6 %)." in warned(report)
    mild = texts(by_hand())
    assert "The class that lost most is 8: 100 % to 93.3 % of 45 samples; among 10 classes a loss like this" in mild
    assert "Hurt more" not in mild


# ---------------------------------------------------------------------- speed and size


def test_faster() -> None:
    assert "It is 1.7 times as fast: 1 ms before, 0.6 ms after (onnxruntime 1.25.0, CPU" in texts(by_hand())


def test_not_faster_although_the_macs_fell() -> None:
    same = by_hand(times=(1.0, 0.99))
    assert "It did not get faster, although 51 % of the MACs are gone: 1 ms before, 0.99 ms after" in warned(same)
    assert "within the spread of the rounds" in warned(same)
    slower = by_hand(times=(1.0, 1.3))
    assert "It became slower, although 51 % of the MACs are gone" in warned(slower)
    assert "It is" not in texts(slower)


def test_a_faster_median_within_the_spread_is_no_speed_up() -> None:
    report = by_hand()
    noisy = [
        dataclasses.replace(side, latency=timed(t, 0.3)) for side, t in ((report.before, 1.0), (report.after, 0.9))
    ]
    report = dataclasses.replace(report, before=noisy[0], after=noisy[1])
    assert "It did not get faster" in warned(report)


def test_latency_that_was_not_measured() -> None:
    assert "Latency was not measured." in warned(by_hand(times=None))


def test_size_and_filters() -> None:
    assert "The file went from 163 kB to 75 kB on disk (45.9 %), plan included." in texts(by_hand())
    told = "Removed were 35 % of the prunable filters (56 of 160), which is 32.9 % of all (170)."
    assert told in texts(by_hand())


# ---------------------------------------------------------------------- baselines


def test_a_comparison_that_is_missing_is_a_warning() -> None:
    assert "There is no comparison with random, magnitude and activation" in warned(by_hand())


def test_relevance_that_lost() -> None:
    settings = {"criterion": {"name": "lrp"}, "reestimate_batchnorm": True}
    draws = [[0.90], [0.91], [0.90], [0.89]], [[0.95], [0.95], [0.96], [0.95]]
    report = by_hand(settings=settings, sections={"comparison": with_curves(*draws)})
    said = warned(report)
    assert "With 50 % of the MACs removed and no training, lrp + BN gets 90 % of 450 samples right" in said
    assert (
        "lrp + BN lost against activation + BN at equal budget (-5.2 points, standard error 0.5 over 4 draws)" in said
    )
    won = by_hand(settings=settings, sections={"comparison": with_curves(draws[1], draws[0])})
    assert "lrp + BN is better than the best baseline here (+5.2 points" in texts(won)
    assert "lost against" not in texts(won)
    level = [[0.9], [0.96]], [[0.95], [0.9]]
    tied = by_hand(settings=settings, sections={"comparison": with_curves(*level)})
    assert "are not told apart" in texts(tied)


def test_a_single_draw_is_judged_by_the_test_samples() -> None:
    settings = {"reestimate_batchnorm": True}
    near = by_hand(settings=settings, sections={"comparison": with_curves([[0.93]], [[0.95]])})
    assert "not told apart (-2.0 points, from a single draw)" in warned(near)
    far = by_hand(settings=settings, sections={"comparison": with_curves([[0.80]], [[0.95]])})
    assert "lost against activation + BN" in warned(far)
    own = by_hand(settings=settings, sections={"comparison": with_curves([[0.80]], [[0.95]], count=0)})
    assert "lost against" in warned(own)


def test_budgets_that_differ_are_said() -> None:
    """A comparison in which random removed more than lrp is not at equal budget."""
    settings = {"criterion": {"name": "lrp"}, "reestimate_batchnorm": True}
    found = Comparison.from_json(with_curves([[0.90], [0.91]], [[0.95], [0.95]]))

    def said(gone: float) -> Report:
        curves = tuple(dataclasses.replace(c, removed=(gone,)) if c.criterion == "lrp" else c for c in found.curves)
        return by_hand(settings=settings, sections={"comparison": dataclasses.replace(found, curves=curves).to_json()})

    apart = said(0.485)
    assert "With 48.5 % of the MACs removed and no training, lrp + BN gets" in texts(apart)
    assert "lrp + BN lost against activation + BN (-4.5 points" in warned(apart)
    told = "Budgets are not equal: asked for 50 %, weight removed 50 % of the MACs and lrp 48.5 %, 1.5 points apart."
    assert told in warned(apart)
    assert "right; activation + BN 95 % (with 50 % removed), weight + BN" in texts(apart)
    close = said(0.49)
    assert "Budgets" not in texts(close)
    assert "With 49 % of the MACs removed and no training, lrp + BN gets" in texts(close)
    assert "lost against activation + BN at equal budget" in warned(close)
    assert "activation + BN 95 %, weight" in texts(close)


def test_the_budget_that_is_judged_is_the_nearest_that_was_reached() -> None:
    curves = tuple(
        Curve(name, "auto", False, ((0.9, 0.5),), (0.5, 0.7)) for name in ("lrp", "random", "weight", "activation")
    )
    rounded = Comparison((0.3, 0.5), "macs", curves, 0.99, (), 450)
    assert "With 50 % of the MACs removed and no training, lrp gets 90 %" in texts(
        by_hand(sections={"comparison": rounded.to_json()})
    )


def rivals_of(**kept: int) -> dict[str, Any]:
    return {
        name: {"reached": dataclasses.replace(AFTER, macs=macs).to_json(),
               "evaluation": {"accuracy": 0.9, "count": 450}, "stopped": ""}
        for name, macs in kept.items()
    }  # fmt: skip


def test_rivals_with_other_budgets() -> None:
    report = by_hand(sections={"rivals": rivals_of(random=192_000, weight=172_000)})
    assert (
        "random 90 % (with 48 % of the MACs) and weight 90 % (with 43 % of the MACs); here 98.7 % (with 49 %"
        in texts(report)
    )
    assert "Budgets are not equal: this run keeps 49 % of the MACs and weight 43 %, 6 points apart." in warned(report)
    assert "Budgets" not in texts(by_hand(sections={"rivals": rivals_of(random=192_000, weight=195_000)}))
    alike = by_hand(target=Target(params=0.45), sections={"rivals": rivals_of(random=192_000, weight=172_000)})
    assert "weight 90 % (with 45 % of the parameters)" in texts(alike)  # what was asked for is what counts
    assert "Budgets" not in texts(alike)


def test_what_got_no_score_is_said() -> None:
    report = by_hand(unscored={"gate": "the rule gives gates no relevance"})
    assert "1 group got no score and stays whole, which does not mean unimportant: gate (the rule gives" in warned(
        report
    )


def test_how_it_was_done() -> None:
    told = "ranked by lrp over 100 reference samples, one draw of them; "
    assert f"{told}whether it was trained after the cut is not recorded." in texts(by_hand())
    untrained = by_hand(settings={**by_hand().settings, "fine_tune": None})
    assert f"{told}there was no fine-tuning." in texts(untrained)
    tuned = by_hand(
        settings={"criterion": {"name": "taylor"}, "fine_tune": {"epochs": 3, "distill": [4.0, 0.5, ""]}},
        history=(Step(1, Target(macs=300_000), AFTER), Step(2, Target(macs=200_000), AFTER)),
    )
    assert "fine-tuned for 3 epochs after each of 2 cuts, following the original's outputs" in texts(tuned)
    assert "trained further by mine" in texts(by_hand(settings={"criterion": {"name": "lrp"}, "fine_tune": "mine"}))


def test_notes_come_last_and_are_warnings() -> None:
    report = by_hand(notes=("Mind the gap.",))
    assert report.sentences[-1] == "Mind the gap."
    assert "Mind the gap." in warned(report)


# ---------------------------------------------------------------------- numbers


def test_numbers() -> None:
    assert [percent(x) for x in (0.0, 0.333, 0.9999, 1.0)] == ["0 %", "33.3 %", "> 99.9 %", "100 %"]
    assert [byte_size(x) for x in (0, 999, 1000, 163_412, 2_500_000)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "163 kB",
        "2.5 MB",
    ]


def test_rows_leave_out_what_was_not_measured() -> None:
    names = [row.name for row in rows(by_hand())]
    assert names == [
        "top-1 accuracy",
        "MACs",
        "parameters",
        "prunable channels",
        "filters, all layers",
        "bytes on disk",
        "bytes as ONNX",
        "latency, ms",
    ]
    bare = by_hand()
    bare = dataclasses.replace(bare, before=Measured(BEFORE), after=Measured(AFTER), classes=compared(None, None))
    assert [row.name for row in rows(bare)] == names[1:5]
    half = dataclasses.replace(bare, after=Measured(AFTER, file_bytes=75_000))
    assert rows(half)[-1] == ("bytes on disk", "-", "75,000", "-", None)


def asked_of(before: list[int], after: list[int]) -> str:
    """Right answers among ten samples of each of ten classes."""
    found = []
    for right in (before, after):
        rows = tuple(ClassAccuracy(k, str(k), n, 10) for k, n in enumerate(right))
        found.append(Evaluation(sum(right) / 100, None, 100, rows))
    report = by_hand()
    first, second = (
        dataclasses.replace(m, evaluation=e) for m, e in zip((report.before, report.after), found, strict=True)
    )
    return warned(dataclasses.replace(report, before=first, after=second, classes=None))


def test_accuracy_at_chance_is_told() -> None:
    """An original that is no better than one class for all was given samples or weights that are not its own."""
    good, chance = [9] * 10, [10] + [0] * 9
    assert "The original itself can not be told from always naming one class (10 %): check the scale" in asked_of(
        chance, chance
    )
    left = asked_of(good, chance)
    assert "What is left can not be told from always naming one class (10 %): ask for less" in left
    assert "The original itself" not in left
    assert "naming one class" not in asked_of(good, [3] * 10)
    one = Evaluation(1.0, None, 5, (ClassAccuracy(0, "0", 5, 5),))
    assert (one.chance, one.at_chance) == (1.0, False)  # samples of one class tell nothing
    assert Evaluation(0.1).chance is None
