"""Pictures: what is drawn is what was computed, and nothing breaks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from by_hand import KINDS, by_hand, classes, density, outliers
from matplotlib.colors import to_hex

from lrp import errors
from neuralize import CentroidHead, Explanation, NeuralizedModel

mpl.use("Agg")

import matplotlib.pyplot as plt

FOR, AGAINST, OTHER = "#c2410c", "#1d4ed8", "#6b7280"
ODD = ["</script>$a_b$ 100 %", "", "x" * 300, "two\nlines\tand a tab", "_hidden"]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def drawn(ax: Any) -> Any:
    ax.figure.canvas.draw()
    return ax


def bars(ax: Any) -> list[tuple[str, float, float, str]]:
    """Label, start, width and colour, top to bottom."""
    labels = {round(y): text.get_text() for y, text in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    found = [(p.get_y() + p.get_height() / 2, p) for p in ax.patches]
    return [
        (labels[round(y)], p.get_x(), p.get_width(), to_hex(p.get_facecolor()))
        for y, p in sorted(found, key=lambda pair: -pair[0])
    ]


# ---------------------------------------------------------------------- waterfall


@pytest.mark.parametrize("kind", [*KINDS, "wide"])
@pytest.mark.parametrize("top", [1, 2, 10])
def test_a_waterfall_adds_up(kind: str, top: int) -> None:
    rng = np.random.default_rng(0)
    wide = by_hand(rng.normal(size=(3, 30)), np.ones((3, 30)), parts={"entropy": [-3.0, 0, 1], "prior": [0.5, 0, 0]})
    e = wide if kind == "wide" else KINDS[kind]()
    for row in (0, 1, -1):
        *steps, total = bars(drawn(e.plot.waterfall(row, top=top)))
        assert total[0] == "output"
        assert total[1:3] == (0.0, pytest.approx(e.output[row]))
        assert sum(width for _, _, width, _ in steps) == pytest.approx(e.output[row])
        at = 0.0
        for _, start, width, _ in steps:
            assert start == pytest.approx(at)
            at += width
        parts = {name: part[row] for name, part in e.residual_parts.items() if part[row]}
        columns = steps[: len(steps) - len(parts)]
        assert {label: width for label, _, width, _ in steps[len(columns) :]} == pytest.approx(parts)
        assert all(colour == OTHER for *_, colour in steps[len(columns) :])
        sizes = np.sort(np.abs(e.values[row]))[::-1]
        named = len(sizes) if len(sizes) <= top + 1 else top
        np.testing.assert_allclose([abs(width) for _, _, width, _ in columns][:named], sizes[:named])
        if named < len(sizes):
            assert columns[-1][0] == f"{len(sizes) - named} other columns"
        for _, _, width, colour in columns:
            assert colour == (FOR if width > 0 else AGAINST)


def test_a_waterfall_names_values() -> None:
    e = classes()
    labels = {row: [label for label, *_ in bars(e.plot.waterfall(row))] for row in (0, 5)}
    missing = int(np.argmax(np.isnan(e.data[:, 2])))
    assert "housing = own" in labels[0]
    assert "housing = missing" in labels[5]
    assert "age = missing" in [label for label, *_ in bars(e.plot.waterfall(missing))]
    assert any(label.startswith("petal = ") for label in labels[0])
    texts = [t.get_text() for t in drawn(density().plot.waterfall(0)).texts]
    assert "-6.4" in texts


# ---------------------------------------------------------------------- beeswarm


def test_a_beeswarm_shows_every_row_where_it_is() -> None:
    e = outliers()
    ax = drawn(e.plot.beeswarm())
    order = np.argsort(-np.abs(e.values).mean(0))
    assert [t.get_text() for t in ax.get_yticklabels()][::-1] == [e.feature_names[t] for t in order]
    for collection, t in zip(ax.collections[: e.values.shape[1]], order[::-1], strict=True):
        points = np.asarray(collection.get_offsets())
        np.testing.assert_allclose(points[:, 0], e.values[:, t])
        y = round(float(np.median(points[:, 1])))
        assert np.abs(points[:, 1] - y).max() < 0.45
        shade, raw = np.asarray(collection.get_array()), e.data[:, t]
        low, high = np.quantile(raw, [0.05, 0.95])
        np.testing.assert_allclose(shade, np.clip((raw - low) / (high - low), 0, 1))
    assert ax.get_title() == "300 rows"
    one = drawn(e.plot.beeswarm(cluster=-1))
    assert one.get_title() == "an outlier: 30 rows"
    np.testing.assert_allclose(np.asarray(one.collections[0].get_offsets())[:, 0].size, 30)
    with pytest.raises(errors.TargetError):
        e.plot.beeswarm(cluster=4)


def test_crowded_points_do_not_hide_each_other() -> None:
    e = by_hand(np.repeat([[0.0], [1.0]], [20, 1], axis=0), np.arange(21.0)[:, None])
    points = np.asarray(e.plot.beeswarm().collections[0].get_offsets())
    assert len(np.unique(points[:20, 1])) == 20
    assert points[20, 1] == 0


def test_categories_are_grey_and_holes_are_hollow() -> None:
    e = classes()
    ax = drawn(e.plot.beeswarm())
    by_line: dict[str, list[Any]] = {}
    labels = [t.get_text() for t in ax.get_yticklabels()]
    for c in ax.collections:
        y = round(float(np.median(np.asarray(c.get_offsets())[:, 1])))
        by_line.setdefault(labels[y], []).append(c)
    grey, hole = by_line["housing"]
    assert {to_hex(c) for c in grey.get_facecolors()} == {OTHER}
    assert grey.get_array() is None
    assert len(grey.get_offsets()) == 149
    assert len(hole.get_offsets()) == 1
    filled, hollow = by_line["age"]
    assert len(hollow.get_offsets()) == np.isnan(e.data[:, 2]).sum()
    assert len(hollow.get_facecolors()) == 0
    assert len(np.unique(np.asarray(filled.get_array()))) > 50


def test_many_rows_are_thinned_and_it_is_said() -> None:
    data = np.random.default_rng(0).normal(size=(5000, 2))
    ax = by_hand(data, data).plot.beeswarm()
    assert ax.get_title() == "2,000 of 5,000 rows"
    assert [len(c.get_offsets()) for c in ax.collections[:2]] == [2000, 2000]


# ---------------------------------------------------------------------- image


def test_an_image_has_its_pixels_in_place() -> None:
    values = np.arange(12.0).reshape(1, 12) - 5
    e = by_hand(values, np.zeros((1, 12)))
    ax = drawn(e.plot.image(0, (3, 4)))
    np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), values.reshape(3, 4))
    assert ax.images[0].get_clim() == (-6, 6)
    middle = np.asarray(ax.images[0].cmap(0.5))[:3]
    assert np.ptp(middle) < 0.02  # zero is neutral
    ax = e.plot.image(0, (2, 2, 3))
    np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), values.reshape(2, 2, 3).sum(2))
    for wrong in ((3, 5), (12,), (0, 12), (-3, -4), "3x4", None, (3.0, 4.0), 12):
        with pytest.raises(errors.InputError, match="12 pixels"):
            e.plot.image(0, wrong)
    digits = by_hand(np.ones((1, 784)), np.ones((1, 784)))
    assert np.asarray(digits.plot.image(0).images[0].get_array()).shape == (28, 28)


# ---------------------------------------------------------------------- all of them


def degenerate() -> dict[str, Explanation]:
    rng = np.random.default_rng(0)
    line = NeuralizedModel(CentroidHead([[0.0], [1.0]]), feature_names=["$a$ and $b_c$"])
    return {
        "one row, one column": line.explain([[0.2]]),
        "zeros": by_hand(np.zeros((4, 4)), np.zeros((4, 4))),
        "holes": by_hand(rng.normal(size=(9, 3)), np.full((9, 3), np.nan)),
        "odd names": by_hand(rng.normal(size=(9, 5)), rng.normal(size=(9, 5)), names=ODD, unit="unit " * 60),
        "odd labels": by_hand(
            rng.normal(size=(6, 2)),
            rng.normal(size=(6, 2)),
            labels=["$x_1$" * 30, "\n"],
            target=["$x_1$" * 30, "\n"] * 3,
        ),
        "truth values": by_hand(rng.normal(size=(9, 2)), rng.random((9, 2)) > 0.5),
        "integers": by_hand(rng.normal(size=(9, 2)), rng.integers(0, 9, (9, 2))),
        "one category": by_hand([[1.0]], [[0]], names=["c"], categories={"c": ("$only_one$" * 9,)}),
        "wide": by_hand(rng.normal(size=(20, 784)), rng.random((20, 784))),
        "huge and tiny": by_hand([[1e200, -1e-200]], [[1e300, 1e-300]]),
    }


@pytest.mark.parametrize("case", degenerate())
@pytest.mark.parametrize("method", ["bar", "row", "waterfall", "beeswarm", "heatmap", "image"])
def test_nothing_breaks_a_picture(case: str, method: str) -> None:
    e = degenerate()[case]
    d = e.values.shape[1]
    draw = {
        "bar": lambda ax: e.plot.bar(ax=ax),
        "row": lambda ax: e.plot.bar(row=0, ax=ax),
        "waterfall": lambda ax: e.plot.waterfall(0, ax=ax),
        "beeswarm": lambda ax: e.plot.beeswarm(ax=ax),
        "heatmap": lambda ax: e.plot.heatmap(ax=ax),
        "image": lambda ax: e.plot.image(0, (1, d), ax=ax),
    }[method]
    fresh = drawn(draw(None))
    _, given = plt.subplots(layout="constrained")
    assert draw(given) is given
    drawn(given)
    for ax in (fresh, given):
        assert all(np.isfinite(ax.get_xlim()))
        assert ax.get_xlim()[0] < ax.get_xlim()[1]
        texts = [t.get_text() for t in (*ax.get_yticklabels(), *ax.get_xticklabels())]
        assert max(map(len, texts), default=0) <= 80
        assert not any("\n" in t for t in texts)


def test_labels_stay_on_the_page() -> None:
    for method in ("bar", "waterfall", "beeswarm", "heatmap"):
        e = by_hand(np.random.default_rng(0).normal(size=(9, 5)), np.ones((9, 5)), names=ODD, unit="Unit " * 60)
        ax = drawn(getattr(e.plot, method)(*([0] if method == "waterfall" else [])))
        page, renderer = ax.figure.bbox, ax.figure.canvas.get_renderer()
        low, high = ax.get_xlim()
        within = [t for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]  # others are not drawn
        for text in (*ax.get_yticklabels(), *within, ax.title, ax.xaxis.label):
            box = text.get_window_extent(renderer)
            assert box.x0 >= page.x0 - 1
            assert box.x1 <= page.x1 + 1


def test_titles_of_every_kind() -> None:
    e = {kind: make() for kind, make in KINDS.items()}
    inlier = int(np.argmax(e["outlier"].decided == 1))
    assert e["outlier"].plot.bar(row=inlier).get_title() == f"row {inlier}: why an inlier"
    assert outliers(-1).plot.waterfall(inlier).get_title() == f"row {inlier}: why not an outlier"
    assert e["density"].plot.waterfall(2).get_title() == f"row 2: log density {e['density'].output[2]:.3g}"
    high = int(e["value"].output.argmax())
    assert e["value"].plot.waterfall(high).get_title() == f"row {high}: why above the reference value"
    assert e["class"].plot.bar(row=0).get_title() == "row 0: why class setosa"
    assert e["class"].plot.bar(cluster="setosa").get_title() == "class setosa: mean of 50 rows"
    assert [t.get_text() for t in e["class"].plot.heatmap().get_yticklabels()] == [
        "class setosa",
        "class versicolor",
        "class virginica",
    ]
    assert "class's largest" in e["class"].plot.heatmap().figure.axes[-1].get_ylabel()
    net = NeuralizedModel(CentroidHead([[0.0], [10.0], [30.0]]), feature_names=["age"])
    duel = net.explain(pd.DataFrame({"age": [1.0, 29.0]}, index=["Ada", "Bob"]), target=0, contrast=1)
    assert duel.plot.bar(row=0).get_title() == "row Ada: why cluster 0 rather than cluster 1"
    assert duel.plot.bar(row=1).get_title() == "row Bob: why closer to cluster 1"


def test_rows_are_positions() -> None:
    e = classes()
    by_row: list[Callable[..., Any]] = [
        lambda row: e.plot.bar(row=row),
        lambda row: e.plot.waterfall(row),
        lambda row: e.plot.image(row, (1, 3)),
    ]
    for draw in by_row:
        for wrong in (150, -151, True, 1.5, "0"):
            with pytest.raises(errors.InputError, match="0 to 149"):
                draw(wrong)
    assert e.plot.bar(row=-1).get_title() == "row 149: why class virginica"
    assert e.plot.waterfall(np.int64(3)).get_title() == "row 3: why class setosa"
    for wrong in (0, -1, 1.5, True):
        for draw in (lambda top: e.plot.waterfall(0, top=top), lambda top: e.plot.beeswarm(top=top)):
            with pytest.raises(errors.InputError, match="top"):
                draw(wrong)
