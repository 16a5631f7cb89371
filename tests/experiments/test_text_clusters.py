"""Clusters of texts: logits, occlusion and deletion by loops; the page on hand-made rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.pipeline import make_pipeline

from experiments.papers import text_clusters as work
from experiments.papers import text_clusters_report as page
from experiments.study import Study
from lrp.errors import DataError
from neuralize import neuralize


@pytest.fixture
def fitted() -> Any:
    rng = np.random.default_rng(0)
    topics = rng.integers(3, size=80)
    rate = np.full((80, 12), 0.15)
    for k in range(3):
        rate[topics == k, 4 * k : 4 * k + 4] = 1.5
    counts = rng.poisson(rate).astype(float)
    counts[counts.sum(1) == 0, 0] = 1
    sparse = scipy.sparse.csr_array(counts)
    pipeline = make_pipeline(TfidfTransformer(sublinear_tf=True), KMeans(3, n_init=3, random_state=0)).fit(sparse)
    return pipeline, sparse


def f(pipeline: Any, counts: np.ndarray, own: int) -> float:
    z = pipeline[0].transform(scipy.sparse.csr_array(counts[None])).toarray()[0]
    d = [float(((z - m) ** 2).sum()) for m in pipeline[-1].cluster_centers_]
    return min(v for k, v in enumerate(d) if k != own) - d[own]


def test_methods_by_loops(fitted: Any) -> None:
    pipeline, counts = fitted
    net, own = neuralize(pipeline), pipeline.predict(counts).astype(np.int64)
    some, mine = counts[:6], own[:6]
    mean = pipeline[0].transform(counts).toarray().mean(0)
    found, measured = work.rankings(pipeline, net, some, mine, mean, 0)
    assert measured["conservation"] < 1e-12
    assert 0 < measured["absent_share"] < 1
    logits = work.logits(pipeline.transform(some), mine)
    for i in range(6):
        x = some.toarray()[i]
        assert logits[i] == pytest.approx(f(pipeline, x, mine[i]))
        assert found["LRP"][i].sum() == pytest.approx(logits[i])
        for t in range(12):
            y = x.copy()
            y[t] = 0
            assert found["occlusion"][i, t] == pytest.approx(
                f(pipeline, x, mine[i]) - f(pipeline, y, mine[i]), abs=1e-12
            )
    Z, centres = pipeline[0].transform(some).toarray(), pipeline[-1].cluster_centers_
    for i in range(6):
        for t in range(12):
            z = Z[i].copy()
            z[t] = mean[t]
            before, after = (((v - centres) ** 2).sum(1) for v in (Z[i], z))
            fell = [min(np.delete(d, mine[i])) - d[mine[i]] for d in (before, after)]
            assert found["occlusion by the mean"][i, t] == pytest.approx(fell[0] - fell[1], abs=1e-12)


def test_deletion_takes_the_share_it_names() -> None:
    counts = np.array([[2.0, 1.0, 0.0, 3.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    values = np.array([[0.1, 0.4, 9.0, -1.0, 0.3], [1.0, 2.0, 3.0, 4.0, 5.0]])
    most = work.without(counts, values, 0.5, True)
    assert most.tolist() == [[2.0, 0.0, 0.0, 3.0, 0.0], [0.0] * 5]
    least = work.without(counts, values, 0.5, False)
    assert least.tolist() == [[0.0, 1.0, 0.0, 0.0, 1.0], [0.0] * 5]
    assert work.without(counts, values, 0.0, True).tolist() == counts.tolist()


def test_areas_by_the_trapezoid_rule(fitted: Any) -> None:
    pipeline, counts = fitted
    dense, own = counts.toarray()[:10], pipeline.predict(counts).astype(np.int64)[:10]
    values = np.random.default_rng(1).random(dense.shape)
    found = work.areas(pipeline, dense, values, own, [0.2, 0.5])
    start = np.mean([f(pipeline, x, c) for x, c in zip(dense, own, strict=True)])
    points = [1.0]
    for share in (0.2, 0.5):
        rows = work.without(dense, values, share, True)
        points.append(np.mean([f(pipeline, x, c) for x, c in zip(rows, own, strict=True)]) / start)
    assert found["deleted most"]["curve"] == pytest.approx(points)
    assert found["deleted most"]["area"] == pytest.approx(
        (0.1 * (points[0] + points[1]) + 0.15 * (points[1] + points[2])) / 0.5
    )
    assert found["deleted least"]["curve"] != pytest.approx(points)


def test_the_corpus_is_read_from_sources() -> None:
    texts = work.docstrings("numpy.polynomial")
    assert len(texts) > 50
    assert texts == sorted(set(texts))
    assert all(len(t.split()) >= 40 for t in texts)
    found = work.corpus(("numpy.polynomial", "scipy.ndimage"), 40)
    assert found.counts.shape == (len(found.topics), len(found.words))
    assert np.diff(found.counts.indptr).min() >= 15
    assert set(found.topics.tolist()) == {0, 1}
    assert not set(work.NAMES) & set(found.words)
    assert work.corpus(("numpy.polynomial", "scipy.ndimage"), 40).digest == found.digest
    with pytest.raises(DataError, match="no_such_package"):
        work.docstrings("no_such_package.part")


def test_a_few_texts_from_end_to_end(tmp_path: Path) -> None:
    small = {
        "seeds": 1, "topics": ["numpy.polynomial", "scipy.ndimage"], "most": 40, "clusters": 2, "starts": 1,
        "held_out": 0.3, "judged": 10, "shares": [0.1, 0.2, 0.3, 0.5],
    }  # fmt: skip
    study = Study(replace(work.EXPERIMENT, quick=small), tmp_path, quick=True)
    assert study.run()
    (row,) = study.rows
    assert row["rows_differing"] == 0
    assert sum(t["texts"] for t in row["clusters"]) + row["explained"] == row["texts"]
    flipping = row["flipping"]
    assert flipping["LRP"]["deleted most"]["area"] < flipping["random"]["deleted most"]["area"]
    assert flipping["LRP"][work.EXCHANGED]["curve"][0] == pytest.approx(1)
    assert {t["topic"] for t in row["clusters"]} <= {"numpy.polynomial", "scipy.ndimage"}
    assert {p.name for p in tmp_path.glob("*.png")} == {"words.png", "curves.png"}


def rows(shift: dict[str, float], f1: float = 0.5, seeds: int = 4) -> list[dict[str, Any]]:
    out = []
    for seed in range(seeds):
        flipping: dict[str, Any] = {}
        for m in work.METHODS:
            one = {"area": 0.3 + 0.01 * seed + shift.get(m, 0.0), "curve": [1, 0.8, 0.6, 0.4, 0.2], "stays": [1.0] * 5}
            flipping[m] = {f"{r} {o}": one for r in work.REMOVALS for o in ("most", "least")}
            flipping[m][work.EXCHANGED] = {"area": one["area"], "curve": [1.0] * (len(work.STEPS) + 1)}
        told = {name: [["word", 1.0], ["other", 0.5]] for name in work.LISTS}
        out.append(
            {
                "key": f"split|{seed}", "seed": seed, "texts": 10, "words": 5, "words_per_text": 4.0, "digest": "0",
                "per_topic": {"a": 10}, "explained": 3, "adjusted_rand": 0.5, "rows_compared": 10, "rows_differing": 0,
                "conservation": 1e-15, "kept": 32.0, "absent_share": 0.5, "sparse_ms": 1.0, "dense_ms": 1.0,
                "flipping": flipping, "f1": {n: f1 if n == work.LISTS[0] else 0.5 for n in work.LISTS},
                "clusters": [{"cluster": 0, "texts": 5, "topic": "a", "purity": 0.9, **told}],
                "shared": dict.fromkeys(work.LISTS[1:], 5.0),
            }
        )  # fmt: skip
    return out


def told(found: list[dict[str, Any]]) -> Any:
    settings = {"topics": ["a"], "clusters": 1, "seeds": 4, "judged": 3, "shares": [0.1, 0.2, 0.3, 0.5]}
    return page.report(SimpleNamespace(rows=found, settings=settings))  # type: ignore[arg-type]


def verdict(report: Any, part: str) -> str:
    return next(c.verdict for c in report.claims if part in c.claim)


def test_verdicts_follow_the_numbers() -> None:
    best = told(rows({"LRP": -0.1}, 0.7))
    assert (
        verdict(best, "Deleting words by relevance takes a text out of its cluster sooner than by gradient")
        == "confirmed"
    )
    assert verdict(best, "tell a cluster better") == "confirmed"
    assert len(best.wins) == 3
    assert not best.losses
    worse = told(rows({"gradient x input": -0.1}, 0.3))
    assert (
        verdict(worse, "Exchanging columns by relevance takes a text out of its cluster sooner than by gradient")
        == "refuted"
    )
    assert verdict(worse, "sooner than by random") == "null"
    assert verdict(worse, "tell a cluster better") == "refuted"
    assert "behind gradient x input" in worse.losses[0]
    assert best.summary.count("(LRP ahead of 9, behind 0 of 9 controls)") == 2
    assert worse.summary.count("(LRP ahead of 0, behind 1 of 9 controls)") == 2
    assert verdict(told(rows({"LRP": -0.1}, seeds=2)), "sooner than by random") == "not comparable"


def test_a_text_elsewhere_refutes() -> None:
    found = rows({})
    assert verdict(told(found), "every text") == "confirmed"
    found[0]["rows_differing"], found[1]["conservation"] = 1, 1e-5
    assert verdict(told(found), "every text") == "refuted"
    assert verdict(told(found), "add up") == "refuted"
    assert not told([]).claims
    assert not told([]).summary
