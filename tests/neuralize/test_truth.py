"""Sentences, headings and pictures of rows that are not in the cluster asked for; numbers that are printed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from by_hand import KINDS, by_hand, density, outliers, value
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lrp import errors
from neuralize import CentroidHead, Explanation, NeuralizedModel, describe, neuralize
from neuralize.audit import conservation
from neuralize.page import render
from neuralize.sentences import claims, of_row, rounded

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


@pytest.fixture(scope="module")
def fitted(wine: pd.DataFrame) -> tuple[NeuralizedModel, pd.DataFrame]:
    return neuralize(make_pipeline(StandardScaler(), KMeans(3, n_init=10, random_state=0)).fit(wine)), wine


def line(*mu: float) -> NeuralizedModel:
    return NeuralizedModel(CentroidHead([[m] for m in mu]), feature_names=["age"])


@pytest.mark.parametrize("options", [{}, {"target": 2}, {"target": 2, "contrast": 0}])
def test_members_and_others_never_share_a_sentence(fitted: Any, options: dict[str, Any], tmp_path: Path) -> None:
    net, X = fitted
    e = net.explain(X, **options)
    own = net.predict(X)
    np.testing.assert_array_equal(e.decided, own)
    np.testing.assert_array_equal(Explanation.load(e.save(tmp_path / "e.npz")).decided, own)
    portraits = describe(e)
    assert sum(p.rows for p in portraits) == len(X)
    for p in portraits:
        if p.claim == "in":
            assert p.rows == (own == p.label).sum()
            assert p.sentence.startswith(f"Cluster {p.label} ({p.rows} rows) is set apart")
            continue
        outside = (own != p.label) & {"out": True, "closer": e.output > 0, "farther": e.output <= 0}[p.claim]
        assert p.rows == outside.sum()
        mean = e.values[outside].mean(0)
        # what is named first speaks most for what is said
        assert p.features[0].name == e.feature_names[int((p.sign * mean).argmax())]
        words = {"out": "are not in cluster 2", "closer": "closer to cluster 2 than", "farther": "than to cluster 2"}
        assert words[p.claim] in p.sentence
        assert p.sentence.startswith(f"{p.rows} rows are ")
    if options == {"target": 2}:
        assert [p.heading for p in portraits] == ["Cluster 2", "Not in cluster 2"]
        assert "Not in cluster 2" in render(e)
        assert "cluster asked for" in render(e)
    if not options:
        assert "cluster asked for" not in render(e)


def test_sides_hold_for_most_rows_with_the_printed_number(fitted: Any) -> None:
    net, X = fitted
    said = 0
    for options in ({}, {"target": 1}, {"target": 1, "contrast": 2}):
        e = net.explain(X, **options)
        own = e.decided
        for p in describe(e):
            mine = (e.target == p.label) & (own == p.label if p.claim == "in" else own != p.label)
            if p.claim in ("closer", "farther"):
                mine &= (e.output > 0) == (p.claim == "closer")
            for name, side, number in re.findall(r"(\w[\w/]*) (above|below) about (-?[\d.,]*\d)", p.sentence):
                shown, column = float(number.replace(",", "")), X[name].to_numpy()
                holds = column[mine] > shown if side == "above" else column[mine] < shown
                assert holds.mean() > 0.5, (p.sentence, name)
                assert column.min() <= shown <= column.max()
                said += 1
    assert said > 20


def test_half_of_the_rows_are_not_enough() -> None:
    """Speaks for the cluster on average only because of a few rows far out."""
    net = NeuralizedModel(CentroidHead([[0.0, 0.0], [2.0, 9.0]]), feature_names=["a", "b"])
    rows = np.array([[1.5, 0.0]] * 5 + [[-4.0, 0.0]] * 5 + [[4.0, 9.0]])
    note = {f.name: f for f in describe(net.explain(rows))[0].features}["a"]
    assert note.relevance > 0
    assert note.phrase.startswith("a around")


def test_break_even_outside_the_table_is_not_printed() -> None:
    net = NeuralizedModel(CentroidHead([[0.0, 0.0], [30.0, 1.0]]), feature_names=["a", "b"])
    rows = np.array([[3.0, 0.0], [5.0, 0.2], [6.0, 0.9]])
    assert describe(net.explain(rows))[0].features[0].phrase == "a around 4.67"


def test_one_row() -> None:
    net = line(0.0, 10.0, 30.0)
    assert describe(net.explain([[1.0]], contrast=1))[0].sentence == (
        "This row is in cluster 0 rather than in cluster 1 mostly because age is 1 (below about 5)."
    )
    assert describe(net.explain([[9.0]], target=0, beta=np.inf))[0].sentence == (
        "This row is not in cluster 0 mostly because age is 9 (above about 5)."
    )
    assert describe(net.explain([[9.0]], target=0, contrast=2))[0].sentence == (
        "This row is closer to cluster 0 than to cluster 2 mostly because age is 9 (below about 15)."
    )
    assert describe(net.explain([[19.0]], target=0, contrast=2))[0].sentence == (
        "This row is closer to cluster 2 than to cluster 0 mostly because age is 19 (above about 15)."
    )


def test_the_contrast_of_the_readme(fitted: Any) -> None:
    net, X = fitted
    e = net.explain(X[net.predict(X) != 0], contrast=0)
    assert {p.contrast for p in describe(e)} == {0}
    assert {p.claim for p in describe(e)} == {"in"}


def test_question() -> None:
    net, rows = line(0.0, 10.0, 30.0), [[1.0], [9.0], [28.0]]
    assert net.explain(rows).question == "why each row is in its cluster"
    assert net.explain(rows[:1]).question == "why cluster 0"
    assert net.explain(rows, target=1).question == "why, or why not, cluster 1"
    assert net.explain(rows, target=[1, 2, 0]).question == "why, or why not, the cluster asked for"
    assert net.explain(rows, target=1, contrast=2).question == "why cluster 1 rather than cluster 2"
    assert net.explain(rows[:2], contrast=2).question == "why its own cluster rather than cluster 2"
    assert net.explain(rows, contrast=[1, 0, 1]).question == "why its own cluster rather than the contrast"
    assert net.explain(rows, target=[1, 1, 0], contrast=2).question.startswith("why the cluster asked for rather")


def test_break_even_says_when_it_is_exact() -> None:
    assert "shares held" in (Explanation.break_even.__doc__ or "")
    held = "shares held as they are"
    three, two, rows = line(0.0, 10.0, 30.0), line(0.0, 10.0), [[1.0], [9.0]]
    assert held in render(three.explain(rows))
    assert held not in render(three.explain(rows, contrast=2))
    assert held not in render(two.explain(rows))


def test_conservation_at_a_border_is_rounding() -> None:
    e = line(0.0, 10.0).explain([[1.0], [9.0]])
    e.values[1], e.output[1] = 1e-15, 0.0
    assert conservation(e) < 1e-9
    e.output[1] = 1.0
    assert conservation(e) > 1e-3


def test_one_cluster_far_away_leaves_the_others_visible() -> None:
    net = NeuralizedModel(CentroidHead([[0.0, 0.0], [3.0, 0.0], [0.0, 1e4]]))
    e = net.explain([[0.1, 0.2], [2.9, 0.1], [0.0, 1e4]])
    import matplotlib.pyplot as plt

    ax = e.plot.heatmap()
    assert np.abs(np.asarray(ax.images[0].get_array())).max(1) == pytest.approx(np.ones(3))
    assert "cluster" in ax.figure.axes[-1].get_ylabel()
    assert np.abs(np.asarray(e.plot.heatmap(scale="table").images[0].get_array())).max() > 1e7
    faint = re.compile(r"rgba\(\d+,\d+,\d+,(0\.\d+)\)")
    per_cluster, per_table = (
        sorted(map(float, faint.findall(render(e, scale=scale)))) for scale in ("cluster", "table")
    )
    assert per_cluster.count(0.9) == 3
    assert per_table.count(0.9) == 1
    for call in (e.plot.heatmap, lambda scale: render(e, scale=scale)):
        with pytest.raises(errors.InputError, match="'cluster' or 'table'"):
            call(scale="row")
    plt.close("all")


def test_titles_of_bars(fitted: Any) -> None:
    import matplotlib.pyplot as plt

    net, X = fitted
    e = net.explain(X, target=2)
    other = int(np.argmax(e.decided != 2))
    assert e.plot.bar(row=other).get_title() == f"row {other}: why not cluster 2"
    assert f"{(e.decided == 2).sum()} of them in it" in e.plot.bar(cluster=2).get_title()
    assert e.plot.heatmap().get_yticklabels()[0].get_text() == "cluster 2, asked"
    for top in (0, -1, 1.5, True):
        for draw in (e.plot.bar, e.plot.heatmap):
            with pytest.raises(errors.InputError, match="top"):
                draw(top=top)
    plt.close("all")


def test_page_cosmetics(tmp_path: Path) -> None:
    net = line(0.0, 10.0)
    assert "1 row, 1 column." in render(net.explain([[1.0]]))
    source = render(net.explain([[1.0], [9.0]]))
    assert "2 rows, 1 column." in source
    assert "overflow-wrap: anywhere" in source.split("th, td {")[1][:60]
    assert "<bdi>age</bdi>" in source
    assert "A dash means" in source
    with pytest.raises(errors.DataError, match="absent"):
        net.explain([[1.0]]).to_html(tmp_path / "absent" / "p.html")
    with pytest.raises(errors.DataError, match="absent"):
        net.explain([[1.0]]).save(tmp_path / "absent" / "e.npz")


def test_thousands_are_separated_alike_within_a_column() -> None:
    net = line(0.0, 20_000.0, 60_000.0)
    notes = [p.features[0] for p in describe(net.explain([[1200.0], [1400.0], [22_000.0], [59_000.0]]))]
    assert notes[0].text(1300) == "1,300"
    assert notes[2].text(59_000) == "59,000"
    assert (rounded(1300, 0), rounded(13000, 0), rounded(13000, 0, False)) == ("1300", "13,000", "13000")


# ---------------------------------------------------------------------- every kind, every form

NUMBER = r"(-?[\d.,]*\d)"


def number(text: str) -> float:
    return float(text.replace(",", ""))


def shares(printed: str, true: float) -> bool:
    """A percentage, and never all or none where there are others."""
    return int(printed) == min(max(round(100 * true), 1), 99)


def holds_for_rows(e: Explanation, p: Any, mine: np.ndarray) -> int:
    """Check everything that a sentence says about some rows; how much it said."""
    said = 0
    for t, name in enumerate(e.feature_names):
        table = np.asarray(e.data[:, t], float)
        rows, mean = table[mine], e.values[mine, t].mean()
        kinds = e.categories.get(name)
        for side, point, _, share in re.findall(
            rf"\b{name} (above|below) about {NUMBER}( for (\d+) % of them)?", p.sentence
        ):
            beyond = rows > number(point) if side == "above" else rows < number(point)
            assert shares(share, beyond.mean()) if share else beyond.mean() > 0.5, (p.sentence, name)
            assert np.nanmin(table) <= number(point) <= np.nanmax(table)
            said += 1
        for middle in re.findall(rf"\b{name} far from {NUMBER} \(its median\)", p.sentence):
            assert number(middle) == pytest.approx(np.nanmedian(table), abs=np.nanstd(table) / 20)
            far, usual = np.abs(rows - number(middle)), np.nanmedian(np.abs(table - number(middle)))
            assert (far > usual).mean() > 0.5, (p.sentence, name)
            said += 1
        for _, around in re.findall(rf"\b{name} (around |\(mean ){NUMBER}", p.sentence):
            assert number(around) == pytest.approx(np.nanmean(rows), rel=5e-4, abs=np.nanstd(table) / 20)
            said += 1
        for what, share in re.findall(rf"\b{name} (?:mostly )?(\w+) (?:in |\()(\d+) %", p.sentence):
            has = np.isnan(rows) if what == "missing" else rows == (kinds or ()).index(what)
            assert shares(share, has.mean()), (p.sentence, name)
            assert (int(share) > 50) == (f"{name} mostly {what}" in p.sentence) or "speaks" in p.sentence
            # that category, and not only the column, says what the sentence says
            assert np.sign(e.values[mine, t][has].sum()) in (0, np.sign(mean)), p.sentence
            said += 1
        if "not enough" in p.sentence:
            assert (p.sign * e.values[mine].mean(0) <= 0).all()
        elif re.search(rf"(?:by|of|,|and) {name} ", p.sentence.split(";")[0]):
            assert p.sign * mean > 0, (p.sentence, name)
        elif f"; {name} " in p.sentence:
            assert p.sign * mean < 0, (p.sentence, name)
    return said


def holds_for_one(e: Explanation, i: int, sentence: str, sign: int) -> int:
    said = 0
    for t, name in enumerate(e.feature_names):
        raw, kinds = float(e.data[i, t]), e.categories.get(name)
        for shown, side in re.findall(
            rf"\b{name} is (-?[\d.,]*\d|[^ ,.;]+)( \((?:above|below) about [^)]*\))?", sentence
        ):
            assert sign * e.values[i, t] > 0
            said += 1
            if np.isnan(raw):
                assert (shown, side) == ("missing", "")
            elif kinds:
                assert (shown, side) == (kinds[int(raw)], "")
            else:
                assert number(shown) == pytest.approx(raw, rel=5e-4)
                if side:
                    point = number(re.findall(NUMBER, side)[0])
                    assert (number(shown) > point) == ("above" in side)
                    assert number(shown) != point
                    # the break-even point itself, to what the gap needs
                    assert point == pytest.approx(e.break_even[i, t], abs=0.05 * abs(raw - e.break_even[i, t]) + 1e-9)
    return said


def groups(e: Explanation) -> list[np.ndarray]:
    """Rows of the portraits, found without the code under test."""
    found = []
    for p in describe(e):
        mine = e.target == p.label
        if p.contrast is not None:
            mine = mine & (e.contrast == p.contrast)
        inside = e.decided == e.target
        if e.kind == "density":
            lowest = e.output <= np.sort(e.output)[len(e) // 10 - 1] if len(e) >= 20 else np.zeros(len(e), bool)
            mine = lowest if p.claim == "rarest" else ~lowest
        elif e.kind == "value":
            mine = mine & {"above": e.output > 0, "below": e.output < 0, "at": e.output == 0}[p.claim]
        elif p.claim == "in":
            mine = mine & inside
        else:
            mine = mine & ~inside & {"out": True, "closer": e.output > 0, "farther": e.output <= 0}[p.claim]
        assert p.rows == mine.sum()
        found.append(mine)
    assert sum(mine.sum() for mine in found) == len(e)
    return found


def drawn(seed: int) -> Explanation:
    """Anything: lines, categories, holes, rows far out, any kind."""
    rng = np.random.default_rng(seed)
    n, kind = int(rng.integers(2, 60)), ["cluster", "class", "outlier", "density", "value"][seed % 5]
    data = rng.normal(size=(n, 5)) * 10.0 ** rng.integers(-3, 6, 5) + rng.normal(size=5)
    slope = rng.normal(size=5) * np.where(rng.random((n, 5)) < 0.8, 1, -1) / data.std(0)
    point = np.median(data, 0) + rng.normal(size=(n, 5)) * data.std(0) * rng.choice([0, 0.3, 2], 5)
    values = slope * (data - point)
    data[:, 3] = rng.integers(0, 3, n)
    slope[:, 3], point[:, 3], values[:, 3] = (
        0,
        np.nan,
        rng.normal(size=3)[data[:, 3].astype(int)] + rng.normal(size=n) / 9,
    )
    gone = rng.random((n, 5)) < rng.choice([0, 0, 0.2, 0.7], 5)
    data[gone], slope[gone], point[gone] = np.nan, 0, np.nan
    values[gone] = rng.normal(size=5)[np.nonzero(gone)[1]]
    labels = {"outlier": [-1, 1], "density": [0], "value": [0]}.get(kind, [4, 5, 6])
    target, decided = rng.choice(labels, n), rng.choice(labels, n)
    duel = kind in ("cluster", "class") and rng.random() < 0.5
    return by_hand(
        values,
        data,
        kind=kind,
        labels=labels,
        target=np.where(duel & (target == 6), 5, target),
        decided=decided,
        contrast=6 if duel else None,
        slope=slope,
        break_even=point,
        parts={"rest": rng.normal(size=n)},
        names=["alpha", "beta", "gamma", "delta", "omega"],
        categories={"delta": ("own", "rent", "free")},
    )


@pytest.mark.parametrize("make", [*KINDS.values(), lambda: outliers(-1), lambda: outliers(1)])
def test_every_kind_says_what_holds(make: Any) -> None:
    e = make()
    said = sum(holds_for_rows(e, p, mine) for p, mine in zip(describe(e), groups(e), strict=True))
    assert said >= 3
    for i in range(40):
        p = of_row(e, i)
        assert holds_for_one(e, i, p.sentence, p.sign) >= 1


def test_whatever_is_drawn_what_is_said_holds() -> None:
    forms, said, one = set(), 0, 0
    for seed in range(250):
        e = drawn(seed)
        for p, mine in zip(describe(e), groups(e), strict=True):
            said += holds_for_rows(e, p, mine)
            forms |= {f.direction for f in p.features if f.name in p.sentence}
        for i in range(min(len(e), 5)):
            p = of_row(e, i)
            one += holds_for_one(e, i, p.sentence, p.sign)
    assert said > 1000
    assert one > 2000
    assert forms >= {
        "above",
        "below",
        "around",
        "far",
        "above for some",
        "below for some",
        "spread",
        "category",
        "missing",
    }


def test_words_of_every_kind() -> None:
    starts = {
        "outlier": ["Outliers (30 rows) are set apart mostly by", "Inliers (270 rows) are set apart mostly by"],
        "density": ["30 rows have the lowest log density (", "The log density of the other 270 rows (median "],
        "value": ["64 rows are predicted above the reference", "56 rows are predicted below the reference value,"],
        "class": ["Class setosa (50 rows) is", "Class versicolor (50 rows) is", "Class virginica (50 rows) is"],
    }
    questions = {
        "outlier": "why each row is an outlier or an inlier",
        "density": "what raises and lowers the log density",
        "value": "why above or below the reference value 0",
        "class": "why each row is in its class",
    }
    for kind, make in KINDS.items():
        e = make()
        portraits = describe(e)
        assert e.question == questions[kind]
        assert len(portraits) == len(starts[kind])
        for p, start in zip(portraits, starts[kind], strict=True):
            assert p.sentence.startswith(start), p.sentence
            assert "cluster" not in p.sentence + p.heading
    outlier = outliers(-1)
    assert outlier.question == "why or why not an outlier"
    assert [p.heading for p in describe(outlier)] == ["Outliers", "Not outliers"]
    inlier = int(np.argmax(outlier.decided == 1))
    assert of_row(outlier, inlier).sentence.startswith("This row is not an outlier mostly because")
    assert of_row(outliers(), inlier).sentence.startswith("This row is an inlier mostly because")
    high = value()
    for i in range(10):
        word = "above" if high.output[i] > 0 else "below"
        assert of_row(high, i).sentence.startswith(f"This row is predicted {word} the reference value mostly because")
    at = by_hand([[0.0]], [[1.0]], kind="value", labels=[0])
    assert describe(at)[0].sentence == "This row is predicted at the reference value: no column plays a part."


def test_the_lowest_density_is_stated_truly() -> None:
    for seed in range(20):
        e = density(n=25 + seed, seed=seed)
        rarest = describe(e)[0]
        k = (25 + seed) // 10
        assert rarest.rows == k
        limit = number(re.findall(rf"density \({NUMBER} or less\)", rarest.sentence)[0])
        highest = np.sort(e.output)[k - 1]
        assert highest <= limit < highest + 0.01 * abs(highest)
    few = density(n=19)
    assert [p.claim for p in describe(few)] == ["lowered"]
    few.output[:] = 1.0
    same = density(n=40)
    same.output[:] = -3.0
    assert [p.claim for p in describe(same)] == ["lowered"]


def test_categories_and_holes_have_no_break_even() -> None:
    e = by_hand(
        [[1.0, 0.5], [2.0, 0.1], [0.5, 0.2]],
        [[0, np.nan], [0, np.nan], [1, 4.0]],
        slope=1.0,
        break_even=[[0.0, 3.0]] * 3,  # ignored where there is no number to compare
        names=["housing", "age"],
        categories={"housing": ("own", "rent")},
    )
    assert (
        of_row(e, 0).sentence
        == "This row is in cluster 0 mostly because housing is own, and, to a lesser degree, because age is missing."
    )
    assert of_row(e, 2).sentence.endswith(
        "because housing is rent, and, to a lesser degree, because age is 4 (above about 3)."
    )
    (p,) = describe(e)
    assert p.sentence == (
        "Cluster 0 (3 rows) is set apart mostly by housing mostly own (67 %), and, to a lesser degree, by age "
        "mostly missing (67 %)."
    )
    assert [f.point for f in p.features] == ["-", "-"]
    unknown = by_hand([[1.0]], [[7]], names=["housing"], categories={"housing": ("own",)})
    assert describe(unknown)[0].sentence.endswith("because housing is unknown (7).")


def test_where_nothing_speaks_for_it() -> None:
    """Of an inlier, every column may be a distance that a threshold outweighs."""
    e = by_hand(
        [[-1.0, -3.0], [-2.0, -1.0], [9.0, 0.0]],
        [[1, 5], [2, 7], [30, 6]],
        kind="outlier",
        labels=[-1, 1],
        target=[1, 1, -1],
        parts={"threshold": [10.0, 10.0, -6.0]},
        names=["age", "size"],
    )
    assert (
        of_row(e, 0).sentence == "This row is an inlier: its columns speak against it, size (5) most, but not enough."
    )
    assert describe(e)[1].sentence == (
        "Inliers (2 rows): on average the columns speak against it, size (mean 6) most, but not enough."
    )
    below = by_hand([[2.0]], [[3]], kind="value", labels=[0], parts={"intercept": -5.0}, names=["age"])
    assert of_row(below, 0).sentence == (
        "This row is predicted below the reference value: its columns raise it, age (3) most, but not enough."
    )


def test_groups_of_columns_are_not_missing() -> None:
    e = by_hand([[1.0, 0.4], [2.0, 0.5]], [[np.nan, 1.0], [np.nan, np.nan]], names=["money", "age"])
    e.grouped = ("money",)
    assert of_row(e, 0).sentence == (
        "This row is in cluster 0 mostly because money points there, and, to a lesser degree, because age is 1."
    )
    assert of_row(e, 1).sentence.endswith("because age is missing.")
    assert "mostly by money, and" in describe(e)[0].sentence
    assert str(e.for_and_against(0)).count("missing") == 0
    assert [r.shown for r in e.for_and_against(1).pro] == ["-", "missing"]
    e.grouped = ()
    assert "money is missing" in of_row(e, 0).sentence


def test_a_point_that_rounding_made_is_no_point() -> None:
    e = by_hand([[1.0, 2.0]], [[2.4, 3.0]], slope=[1e-14, 1.0], break_even=[-7e13, 1.0], names=["ash", "age"])
    assert of_row(e, 0).sentence.endswith(
        "because age is 3 (above about 1), and, to a lesser degree, because ash is 2.4."
    )


@pytest.mark.filterwarnings("error")
def test_sparse_values() -> None:
    rng = np.random.default_rng(0)
    data = sparse.random_array((60, 900), density=0.02, random_state=rng, format="csr")
    values = sparse.csr_array(data * rng.normal(size=900))
    full = by_hand(values.toarray(), data.toarray(), slope=values.sum(0), break_even=0.0, parts={"rest": 1.0})
    thin = dataclasses.replace(full, values=values, data=data)
    for i in (0, 7):
        assert str(thin.for_and_against(i)) == str(full.for_and_against(i))
    assert "_computed" not in thin.__dict__
    (p,), (q,) = describe(thin), describe(full)
    assert p.sentence == q.sentence
    assert len(p.features) == 200
    assert {f.name for f in p.features[:20]} == {f.name for f in q.features[:20]}
    page = render(thin)
    assert "870 more with smaller relevance" in page
    assert len(page) < 200_000


def test_rows_with_notes_and_no_rows() -> None:
    e = by_hand([[1.0], [2.0]], [[1.0], [2.0]], kind="class", notes={"votes": [False, True], "odd": [True, False]})
    said = "no class wins against all others; decided by votes"
    assert e.for_and_against(1).notes == (said,)
    assert said in str(e.for_and_against(1))
    assert said in e.for_and_against(1)._repr_html_()
    assert str(e.for_and_against(0)).endswith("odd")
    assert "Decided by votes <b>1 row</b>" in render(e)
    none = by_hand(np.ones((0, 2)), np.ones((0, 2)))
    assert "no rows" in none._repr_html_()
    assert describe(none) == []
    for call in (render, lambda e: e.plot.bar(), lambda e: e.plot.heatmap(), lambda e: e.for_and_against(0)):
        with pytest.raises(errors.InputError, match="nothing was explained"):
            call(none)


def test_claims_are_made_row_by_row(fitted: Any) -> None:
    net, X = fitted
    e = net.explain(X, target=2, contrast=1)
    for i, claim in enumerate(claims(e)):
        p = of_row(e, i)
        assert p.claim == claim
        alone = describe(net.explain(X.iloc[[i]], target=2, contrast=1))[0]
        assert alone.sentence == p.sentence
        assert holds_for_one(e, i, p.sentence, p.sign) >= 1


# ---------------------------------------------------------------------- for and against


@pytest.mark.parametrize("kind", [*KINDS, "wine"])
def test_for_and_against(kind: str, fitted: Any) -> None:
    e = fitted[0].explain(fitted[1], target=1) if kind == "wine" else KINDS[kind]()
    for i in (0, 7, -1):
        for top in (1, 3, 50):
            found, at = e.for_and_against(i, top), i % len(e)
            values = e.values[at]
            for reasons, sign in ((found.pro, 1), (found.con, -1)):
                sizes = sorted((sign * values[sign * values > 0]).tolist(), reverse=True)[:top]
                assert [sign * r.relevance for r in reasons] == sizes
                for r in reasons:
                    t = e.feature_names.index(r.name)
                    assert r.relevance == values[t]
                    raw = float(e.data[at, t])
                    assert r.value == (
                        None if np.isnan(raw) else e.categories[r.name][int(raw)] if r.name in e.categories else raw
                    )
                    if not r.side:
                        assert r.point == "-"
                        continue
                    assert r.break_even == pytest.approx(e.break_even[at, t], rel=1e-9)
                    assert (r.side == "above") == (e.slope[at, t] > 0)
                    # as printed, the value is on the side that the list says
                    beyond = number(r.shown) > number(r.point.split()[1])
                    assert beyond == ((r.side == "above") == (sign > 0))
            total = sum(r.relevance for r in (*found.pro, *found.con)) + found.rest + sum(found.residual_parts.values())
            assert total == pytest.approx(found.output, abs=1e-12 * np.abs(values).sum() + 1e-12)
            assert found.others + len(found.pro) + len(found.con) == len(values)
            assert set(found.residual_parts) <= set(e.residual_parts)
            text, source = str(found), found._repr_html_()
            assert found.sentence in text
            for r in (*found.pro, *found.con):
                line = next(line for line in text.splitlines() if line.startswith(f"  {r.name} "))
                assert r.shown in line
                assert r.point in line
                assert r.name in source
    for wrong in (len(e), -len(e) - 1, True, "0", 1.0):
        with pytest.raises(errors.InputError, match="no such row"):
            e.for_and_against(wrong)
    with pytest.raises(errors.InputError, match="top"):
        e.for_and_against(0, top=0)


def test_for_and_against_computes_one_row(fitted: Any) -> None:
    net, X = fitted
    e = net.explain(X.set_index(pd.Index([f"bottle {i}" for i in range(len(X))])))
    assert str(e.for_and_against(3)).startswith("Row bottle 3: why cluster 2\n")
    assert "_computed" not in e.__dict__
    few = str(e.for_and_against(3))
    assert e.slope.shape == X.shape
    assert str(e.for_and_against(3)) == few


def test_a_part_without_a_name_is_still_counted() -> None:
    e = by_hand([[1.0, 2.0]], [[0, 0]])
    e.residual[:] = -0.5
    e.output[:] = 2.5
    assert e.for_and_against(0).residual_parts == {"residual": -0.5}


@pytest.mark.parametrize("kind", KINDS)
def test_notebooks(kind: str) -> None:
    e = KINDS[kind]()
    source = e._repr_html_()
    assert "<script" not in source
    assert e.question in source
    for name in e.feature_names:
        assert name in source
    means = e.by_cluster()["mean"]
    for cell in means.to_numpy().ravel():
        assert any(
            number(text) == pytest.approx(cell, rel=6e-3, abs=1e-4) for text in re.findall(rf">{NUMBER}<", source)
        )
    wide = by_hand(np.ones((2, 900)), np.ones((2, 900)), target=[0, 1])._repr_html_()
    assert wide.count("<tr>") == 9
    assert "900 columns (8 shown)" in wide


@pytest.mark.parametrize(
    "change",
    [
        {"competitors": np.zeros((178, 2))},
        {"contrast": np.zeros(3, int)},
        {"contrast": np.full(178, 7)},
        {"labels": np.zeros((3, 1))},
        {"labels": np.array(["a", "b", "c"])},
        {"part_0": np.zeros(2)},
        {"part_names": np.array(["a", "b"])},
        {"feature_names": np.array(["a"])},
        {"decided": np.zeros(178) + 9},
        {"divided": np.zeros(178)},
        {"values": np.zeros((178, 13), int)},
        {"output": np.array(["x"] * 178)},
        {"beta": np.zeros(2)},
        {"text": np.array(["a", "b"])},
        {"values": np.zeros(178)},
    ],
)
def test_files_are_checked_array_by_array(fitted: Any, change: dict[str, Any], tmp_path: Path) -> None:
    net, X = fitted
    net.explain(X).save(tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as file:
        entries = {name: file[name] for name in file.files}
    np.savez(tmp_path / "bad.npz", **(entries | change))
    with pytest.raises(errors.FileFormatError, match=r"bad\.npz"):
        Explanation.load(tmp_path / "bad.npz")
