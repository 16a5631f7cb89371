"""What users do with an explanation: frames, files, pictures, pages, sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lrp import errors
from neuralize import CentroidHead, Explanation, NeuralizedModel, describe, neuralize
from neuralize.sentences import rounded

mpl.use("Agg")
HOSTILE = "<script>alert('x')</script>&\"$a_b$"


@pytest.fixture(scope="module")
def explanation(wine: pd.DataFrame) -> Explanation:
    frame = wine.set_index(pd.Index([f"bottle {i}" for i in range(len(wine))]))
    return neuralize(make_pipeline(StandardScaler(), KMeans(3, n_init=10, random_state=0)).fit(frame)).explain(frame)


def test_print(wine: pd.DataFrame, explanation: Explanation) -> None:
    drawn = str(neuralize(make_pipeline(StandardScaler(), KMeans(3, n_init=1)).fit(wine)))
    for part in ("13 columns -> 3 logits", "StandardScaler", "pairs", "MinPool", "min over k != c"):
        assert part in drawn
    assert "178 x 13" in repr(explanation)
    assert "squared distance after StandardScaler" in repr(explanation)
    assert "coverage" in repr(explanation)
    assert explanation._repr_html_().count("<tr>") >= 6


def test_frames(explanation: Explanation) -> None:
    frame = explanation.to_frame()
    assert list(frame.columns) == list(explanation.feature_names)
    assert frame.index[3] == "bottle 3"
    books = explanation.to_frame(books=True)
    assert list(books.columns[:5]) == ["target", "decided", "output", "residual", "coverage"]
    taken = NeuralizedModel(CentroidHead([[0.0, 1.0], [2.0, 3.0]]), feature_names=["output", "target"]).explain(
        [[0.0, 0.0]]
    )
    assert list(taken.to_frame(books=True).columns) == [
        "target_",
        "decided",
        "output_",
        "residual",
        "coverage",
        "output",
        "target",
    ]
    means = explanation.by_cluster()
    assert means.shape == (3, 26)
    mine = explanation.values[explanation.target == 1]
    np.testing.assert_allclose(means.loc[1, "mean"], mine.mean(0))
    np.testing.assert_allclose(means.loc[1, "magnitude"], np.abs(mine).mean(0))


def test_damaged_files(explanation: Explanation, tmp_path: Path) -> None:
    whole = explanation.save(tmp_path / "whole.npz").read_bytes()
    bad = tmp_path / "bad.npz"
    middle = bytearray(whole)
    middle[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-40], bytes(middle), b"hello" * 100):
        bad.write_bytes(content)
        with pytest.raises(errors.FileFormatError, match=r"bad\.npz"):
            Explanation.load(bad)
    np.savez(bad, values=np.zeros((2, 2)))
    with pytest.raises(errors.FileFormatError):
        Explanation.load(bad)
    with np.load(tmp_path / "whole.npz") as file:
        entries = {name: file[name] for name in file.files}
    for change in (
        {"version": np.array(99)},
        {"output": np.zeros(3)},
        {"slope": np.zeros((178, 2))},
        {"format": np.array("x")},
        *(
            {"text": np.append(entries["text"][:5], text)}
            for text in ("[{},5,0]", "[" * 100_000, "{}", '[{"a":1},[],0]')
        ),
        {"text": np.where(np.arange(6) == 3, "bogus", entries["text"])},
    ):
        np.savez(bad, **(entries | change))
        with pytest.raises(errors.FileFormatError):
            Explanation.load(bad)
    np.savez(bad, **(entries | {"values": np.array([object()])}))
    with pytest.raises(errors.FileFormatError):
        Explanation.load(bad)
    with pytest.raises(FileNotFoundError):
        Explanation.load(tmp_path / "absent.npz")


def test_a_failed_save_leaves_the_old_file(
    explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = explanation.save(tmp_path / "e.npz")
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        args[0].write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(np, "savez_compressed", full)
        with pytest.raises(errors.DataError, match=r"can not be written.*disk full"):
            explanation.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_pictures(explanation: Explanation) -> None:
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2)
    assert explanation.plot.bar(cluster=2, ax=left) is left
    assert left.get_xlim()[0] == -left.get_xlim()[1]
    names = [label.get_text() for label in left.get_yticklabels()]
    means = explanation.by_cluster().loc[2, "mean"]
    assert names[-1] == means.abs().idxmax()
    assert explanation.plot.heatmap(ax=right) is right
    low, high = right.images[0].get_clim()
    assert low == -high
    assert [t.get_text() for t in right.get_xticklabels()] == list(explanation.feature_names)
    explanation.plot.bar(row=0)
    explanation.plot.bar()
    hostile = NeuralizedModel(CentroidHead([[0.0], [1.0]]), feature_names=[HOSTILE]).explain([[0.2]])
    hostile.plot.bar().figure.canvas.draw()
    hostile.plot.heatmap().figure.canvas.draw()
    with pytest.raises(errors.TargetError):
        explanation.plot.bar(cluster=7)
    plt.close("all")


def test_sentences_are_true(explanation: Explanation) -> None:
    raw = pd.DataFrame(explanation.data, columns=explanation.feature_names)
    portraits = describe(explanation)
    assert [p.label for p in portraits] == [0, 1, 2]
    assert sum(p.rows for p in portraits) == 178
    said = 0
    for p in portraits:
        mine = raw[explanation.target == p.label]
        assert f"({len(mine)} rows)" in p.sentence
        relevance = explanation.values[explanation.target == p.label].mean(0)
        best = explanation.feature_names[int(relevance.argmax())]
        assert p.features[0].name == best
        assert p.sentence.index(best) == min(p.sentence.index(f.name) for f in p.features if f.name in p.sentence)
        for f in p.features:
            assert f.mean == pytest.approx(mine[f.name].mean())
            if f.direction != "around" and f.name in p.sentence.split(";")[0]:
                said += 1
                assert (f.mean > f.break_even) == (f.direction == "above")
                outside = raw[f.name][explanation.target != p.label].mean()
                assert (f.mean > outside) == (f.direction == "above")
        assert "%" not in p.sentence
    assert said > 8


def test_sentence_between_two_clusters() -> None:
    """A cluster in the middle is neither above nor below."""
    net = NeuralizedModel(CentroidHead([[-10.0], [0.0], [10.0]]), feature_names=["age"])
    rows = np.linspace(-4, 4, 41)[:, None]
    assert describe(net.explain(rows))[0].sentence == "Cluster 1 (41 rows) is set apart mostly by age around 0."
    alone = describe(net.explain([[-9.0]], beta=np.inf))[0].sentence
    assert alone == "This row is in cluster 0 mostly because age is -9 (below about -5)."
    assert "Cluster 0 (1 row)" in describe(net.explain([[-9.0], [1.0]]))[0].sentence


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (755.3, 0, "755"),
        (4.6001, 2, "4.6"),
        (15432.0, -1, "15,430"),
        (-0.0004, 2, "0"),
        (float("nan"), 2, "-"),
        (0.25, 2, "0.25"),
        (100.0, 1, "100"),
    ],
)
def test_rounding(value: float, digits: int, text: str) -> None:
    assert rounded(value, digits) == text
