"""Pictures of a report: what is drawn has the values, and the place, it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import matplotlib as mpl
import pytest
from reports import AFTER, answers, by_hand

from compress import Target, plots
from compress.comparison import Comparison, Curve
from compress.evaluation import wilson
from compress.pruning import Step
from lrp import errors

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_costs() -> None:
    ax = plots.costs(by_hand())
    bars = {label.get_text(): bar.get_width() for label, bar in zip(ax.get_yticklabels(), ax.patches, strict=True)}
    assert bars["MACs"] == pytest.approx(49)
    assert bars["bytes on disk"] == pytest.approx(100 * 75_000 / 163_412)
    assert bars["latency, ms"] == pytest.approx(60)
    assert "400,000 → 196,000" in [t.get_text() for t in ax.texts]
    assert ax.yaxis_inverted()


def test_axes_are_taken_and_returned() -> None:
    report = by_hand()
    for draw in (plots.costs, plots.widths, plots.classes, plots.history):
        given = plt.subplots()[1]
        assert draw(report, given) is given
        assert draw(report) is not given


def test_widths() -> None:
    report = by_hand()
    ax = plots.widths(report)
    found = [bar.get_width() for bar in ax.patches]
    assert found == [32, 32, 32, 64, 10, 16, 24, 16, 48, 10]
    long = plots.widths({"features.denseblock4.denselayer16.conv2_and_more": (4, 2), "a $b$ c": (1, 1)})
    names = [t.get_text() for t in long.get_yticklabels()]
    assert len(names[0]) == 34
    assert "…" in names[0]
    assert names[1] == r"a \$b\$ c"
    with pytest.raises(errors.InputError, match="no layers"):
        plots.widths({})


def test_classes() -> None:
    ax = plots.classes(by_hand(), top=3)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["8", "3", "0"]
    change, interval, *_ = ax.lines
    assert list(change.get_xdata()) == pytest.approx([100, 100 * 42 / 45])
    assert list(interval.get_xdata()) == pytest.approx([100 * v for v in wilson(42, 45)])
    assert change.get_color() == plots.LOSS
    with pytest.raises(errors.InputError, match="no classes"):
        plots.classes(dataclasses.replace(by_hand(), classes=None))


def test_history() -> None:
    steps = tuple(
        Step(k, Target(macs=1), dataclasses.replace(AFTER, macs=400_000 - 100_000 * k), answers({0: 9 * k}),
             answers({0: k}))
        for k in (1, 2)
    )  # fmt: skip
    ax = plots.history(by_hand(history=steps, before=answers({})))
    line, cuts = ax.lines
    assert list(line.get_xdata()) == pytest.approx([100, 75, 50])
    assert list(line.get_ydata()) == pytest.approx([100, 100 * 449 / 450, 100 * 448 / 450])
    assert list(cuts.get_ydata()) == pytest.approx([100 * 441 / 450, 100 * 432 / 450])
    assert ax.xaxis_inverted()


def compared() -> Comparison:
    """Two criteria and two baselines whose budgets differ, with and without batch norm."""
    curves = []
    for k, name in enumerate(("weight", "random", "taylor", "_own")):
        for bn in (False, True):
            draws = tuple(tuple(0.9 - 0.1 * k * r + 0.01 * d for r in (1, 2)) for d in range(2))
            curves.append(Curve(name, "auto", bn, draws, (0.2 + 0.01 * k, 0.4 + 0.02 * k)))
    return Comparison((0.2, 0.4), "macs", tuple(curves), 0.95, count=100)


def test_comparison_is_drawn_over_what_was_removed() -> None:
    found = compared()
    ax = plots.comparison(found, own="_own", batchnorm=True)
    lines = {box.get_label().strip(): box[0] for box in ax.containers}
    assert list(lines) == ["_own", "taylor", "weight", "random"]
    for name, line in lines.items():
        curve = found.curve(name, batchnorm=True)
        assert list(line.get_xdata()) == pytest.approx([100 * r for r in curve.removed])
        assert list(line.get_ydata()) == pytest.approx([100 * m for m in curve.mean])
    assert ax.get_xlabel() == "MACs removed, %"
    (dotted,) = [line for line in ax.lines if str(line.get_label()).startswith("unpruned")]
    assert set(dotted.get_ydata()) == {95.0}


def test_criteria_are_told_apart_without_colour() -> None:
    ax = plots.comparison(compared(), own="_own", batchnorm=False)
    lines = {box.get_label().strip(): box[0] for box in ax.containers}
    assert len({line.get_marker() for line in lines.values()}) == 4
    assert min(line.get_markersize() for line in lines.values()) >= 7
    own = lines.pop("_own")
    assert own.get_linewidth() > 1.5 * max(line.get_linewidth() for line in lines.values())
    assert own.get_markersize() > max(line.get_markersize() for line in lines.values())
    assert own.get_zorder() > max(line.get_zorder() for line in lines.values())
    hollow = {name: line.get_markerfacecolor() == plots.PAPER for name, line in lines.items()}
    assert hollow == {"taylor": False, "weight": True, "random": True}
    assert {name: line.get_linestyle() == "-" for name, line in lines.items()} == {n: not h for n, h in hollow.items()}
    # without a name, what is best and no baseline; with both treatments, a mark each
    every = plots.comparison(compared())
    assert every.containers[0].get_label() == "taylor"
    assert len({box[0].get_marker() for box in every.containers}) == 8


def test_two_treatments_have_one_range() -> None:
    found = compared()
    first, second = (plots.comparison(found, batchnorm=bn) for bn in (False, True))
    assert first.get_ylim() == second.get_ylim()
    low, high = first.get_ylim()
    assert low < 100 * min(min(c.mean) for c in found.curves)
    assert high > 95
    with pytest.raises(errors.InputError, match="no such curve"):
        plots.comparison(dataclasses.replace(found, curves=found.curves[::2]), batchnorm=True)


def test_the_legend_holds_all_and_hides_nothing() -> None:
    found = compared()
    many = tuple(dataclasses.replace(c, criterion=f"{c.criterion}{k} of $a$ b") for c in found.curves for k in range(3))
    figure = plt.figure(figsize=(3.8, 3.5), layout="constrained")
    ax = plots.comparison(dataclasses.replace(found, curves=many), figure.add_subplot(), batchnorm=True)
    plots.legend_below(ax)
    figure.canvas.draw()
    legend = ax.get_legend()
    assert legend is not None
    texts = legend.get_texts()
    assert len(texts) == 13
    assert [t.get_fontweight() for t in texts[:3]] == ["normal", "bold", "normal"]
    assert texts[1].get_text() == r"weight0 of \$a\$ b"
    assert legend.get_window_extent().y1 < ax.get_window_extent().y0
    boxes = [t.get_window_extent() for t in texts]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])


def test_svg_is_for_a_page() -> None:
    text = plots.svg(lambda ax: plots.costs(by_hand(), ax), salt="one", label='a "quoted" <name>')
    assert text.startswith('<svg role="img" aria-label="a &quot;quoted&quot; &lt;name&gt;" viewBox=')
    assert "http" not in text
    assert 'id="one-' in text
    assert plots.AFTER not in text
    assert "var(--c0)" in text
    assert ">latency, ms</text>" in text  # text stays text
    assert "sans-serif" in text
    assert "DejaVu" not in text  # the reader's own font
    assert text == plots.svg(lambda ax: plots.costs(by_hand(), ax), salt="one", label='a "quoted" <name>')
