"""Sentences, headings and pictures of rows that are not in the cluster asked for; numbers that are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lrp import errors
from neuralize import CentroidHead, Explanation, NeuralizedModel, describe, neuralize
from neuralize.explanation import conserved
from neuralize.page import render
from neuralize.sentences import rounded

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
    assert conserved(e) < 1e-9
    e.output[1] = 1.0
    assert conserved(e) > 1e-3


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
