"""Pictures of a report: what is drawn has the values, and the place, it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import matplotlib as mpl
import pytest
from reports import AFTER, answers, by_hand

from compress import Target, plots
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


def test_svg_is_for_a_page() -> None:
    text = plots.svg(lambda ax: plots.costs(by_hand(), ax), salt="one", label='a "quoted" <name>')
    assert text.startswith('<svg role="img" aria-label="a &quot;quoted&quot; &lt;name&gt;" viewBox=')
    assert "http" not in text
    assert 'id="one-' in text
    assert plots.AFTER not in text
    assert "var(--c0)" in text
    assert ">latency, ms</text>" in text  # text stays text
    assert text == plots.svg(lambda ax: plots.costs(by_hand(), ax), salt="one", label='a "quoted" <name>')
