"""The commands that change rows: flip and counterfactual."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
from commands import Done, in_process, wrong
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from neuralize import neuralize
from neuralize.cli import main

here = in_process("neuralize", main)


# ---------------------------------------------------------------------- flip


def test_flip(here: Callable[..., Done], tmp_path: Path) -> None:
    quick = ("--rows", "40", "--draws", "4", "--seeds", "2")
    words = ("flip", "sklearn:wine", "--fit", "kmeans:3", "--scale", "-o", tmp_path / "o", *quick)
    done = here(*words, "--imputer", "mean,marginal,other,kde,midpoint")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["flip.png", "result.csv", "result.json"]
    assert (tmp_path / "o" / "flip.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(tmp_path / "o" / "result.csv", index_col=[0, 1])
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["rows"] == 40
    assert result["seeds"] == [0, 1]
    assert set(table.index.get_level_values("imputer")) == {"mean", "marginal", "other", "kde", "midpoint"}
    for record in result["results"]:
        assert record["srg"] == pytest.approx(table.loc[(record["imputer"], record["method"]), "srg"])
    gains = table["srg"].unstack("method")
    assert list(gains.columns.sort_values()) == ["gradient x input", "random", "relevance", "sensitivity"]
    assert (gains["relevance"] > gains["random"] + 0.2).all()
    again = json.loads(here(*words, "--imputer", "mean,marginal,other,kde,midpoint", "--json").stdout)
    assert again == result


def test_flip_judges_other_tools(here: Callable[..., Done], tmp_path: Path) -> None:
    fit = ("--fit", "kmeans:3", "--scale")
    here("explain", "sklearn:wine", *fit, "-o", tmp_path / "ours")
    quick = ("--rows", "30", "--draws", "2", "--seeds", "1", "--imputer", "mean", "--json")
    for name in ("explanations.npz", "values.csv"):
        done = here("flip", "sklearn:wine", *fit, "-o", tmp_path / "o", "--values", tmp_path / "ours" / name, *quick)
        assert done.returncode == 0, done.stderr
        found = {r["method"]: r["srg"] for r in json.loads(done.stdout)["results"]}
        assert found[name] == pytest.approx(found["relevance"])
    np.savez(tmp_path / "short.npz", values=np.zeros((3, 13)))
    words = ("flip", "sklearn:wine", *fit, "-o", tmp_path / "x")
    wrong(here(*words, "--values", tmp_path / "short.npz"), "(178, 13)")
    wrong(here(*words, "--imputer", "median"), "mean, marginal, other, kde, midpoint")
    wrong(here(*words, "--rows", "0"), "--rows")
    assert not (tmp_path / "x").exists()


def test_flip_with_words(here: Callable[..., Done], tmp_path: Path, tabular: Callable[..., pd.DataFrame]) -> None:
    frame = tabular("penguins.csv")
    frame.to_csv(tmp_path / "t.csv", index=False)
    words = ("flip", tmp_path / "t.csv", "--fit", "kmeans:3", "--prepare", "--drop", "species", "-o", tmp_path / "o")
    done = here(*words, "--rows", "40", "--draws", "3", "--seeds", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["left_out"] == int(frame.drop(columns="species").isna().any(axis=1).sum())
    gains = {(r["imputer"], r["method"]): r["srg"] for r in result["results"]}
    assert {i for i, _ in gains} == {"marginal", "other"}
    for imputer in ("marginal", "other"):
        assert gains[imputer, "relevance"] > gains[imputer, "random"] + 0.2
    wrong(here(*words, "--imputer", "mean"), "island", "--imputer marginal,other")


@pytest.mark.parametrize("fit", ["kde:0.5", "one-class-svm", "gmm:3"])
def test_flip_other_kinds(here: Callable[..., Done], tmp_path: Path, fit: str) -> None:
    words = ("flip", "sklearn:iris", "--fit", fit, "--scale", "-o", tmp_path / "o", "--rows", "30", "--draws", "2")
    done = here(*words, "--seeds", "1", "--json")
    assert done.returncode == 0, done.stderr
    gains = {(r["imputer"], r["method"]): r["srg"] for r in json.loads(done.stdout)["results"]}
    assert gains["marginal", "relevance"] > gains["marginal", "random"]
    if fit.startswith("kde"):
        wrong(here(*words, "--imputer", "other"), "gives numbers")


# ---------------------------------------------------------------------- counterfactual


def test_counterfactual(here: Callable[..., Done], tmp_path: Path, wine: pd.DataFrame) -> None:
    fitted = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(wine)
    skops.io.dump(fitted, tmp_path / "m.skops")
    words = ("counterfactual", "sklearn:wine", "--model", tmp_path / "m.skops", "--rows", "3:30")
    done = here(*words, "-o", tmp_path / "o", "--to", "1")
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(tmp_path / "o" / "counterfactuals.csv", index_col="row")
    assert rows.index.tolist() == list(range(3, 30))
    assert (fitted.predict(rows[wine.columns]) == 1).all()
    assert (rows["new"] == 1).all()
    expected = neuralize(fitted).counterfactual(wine.iloc[3:30], 1, reference=wine)
    np.testing.assert_allclose(rows["distance"], expected.distance)
    said = done.stdout.splitlines()
    assert said[:20] == [expected.sentence(i) for i in range(20)]
    assert said[20].startswith("and 7 more")
    changes = pd.read_csv(tmp_path / "o" / "changes.csv")
    assert set(changes["column"]) <= set(wine.columns)
    told = json.loads(here(*words, "--to", "1", "--json").stdout)
    assert [r["sentence"] for r in told["rows"]] == [expected.sentence(i) for i in range(27)]


def test_counterfactual_options(here: Callable[..., Done]) -> None:
    words = ("counterfactual", "sklearn:iris", "--fit", "kmeans:3", "--json")
    held = json.loads(here(*words, "--row", "4", "--fixed", "petal length (cm)").stdout)
    free = json.loads(here(*words, "--row", "4").stdout)
    assert [r["row"] for r in free["rows"]] == ["4"]
    assert held["rows"][0]["distance"] > free["rows"][0]["distance"]
    assert "petal length" not in held["rows"][0]["sentence"]
    raw = json.loads(here(*words, "--row", "4", "--metric", "raw").stdout)
    assert raw["unit"] == "raw units"
    within = json.loads(here(*words, "--row", "4", "--bounds", "data").stdout)
    assert within["rows"][0]["distance"] >= free["rows"][0]["distance"]


def test_counterfactuals_out_of_reach(here: Callable[..., Done], tmp_path: Path) -> None:
    pd.DataFrame({"a": [0.0, 1.0, 9.0, 10.0, 5.4], "b": [0.0, 0.0, 100.0, 100.0, 0.0]}).to_csv(
        tmp_path / "t.csv", index=False
    )
    skops.io.dump(KMeans(2, n_init=1, random_state=0).fit([[0.0, 0.0], [10.0, 1.0]]), tmp_path / "m.skops")
    words = ("counterfactual", tmp_path / "t.csv", "--model", tmp_path / "m.skops", "--fixed", "b", "--bounds", "data")
    done = here(*words)
    assert done.returncode == 0, done.stderr
    assert "Out of reach: 2 of 5 rows (2, 3)." in done.stdout
    wrong(here(*words, "--rows", "2:4"), "can not get another label")


def test_wrong_counterfactuals(here: Callable[..., Done]) -> None:
    words = ("counterfactual", "sklearn:iris", "--fit", "kmeans:3")
    wrong(here(*words, "--rows", "3"), "FROM:TO")
    wrong(here(*words, "--rows", "3:4", "--row", "3"), "not both")
    wrong(here(*words, "--row", "150"), "no row")
    wrong(here(*words, "--to", "9"), "does not exist")
    wrong(here(*words, "--fixed", "colour"), "'colour'")
    wrong(here(*words, "--metric", "city"), "metric")
    wrong(here(*words, "--bounds", "tight"), "bounds")
    wrong(here("counterfactual", "sklearn:iris", "--fit", "kde", "--row", "0"), "number, not a label")
    wrong(here("counterfactual", "sklearn:iris", "--fit", "gmm:3", "--row", "0"), "curved")
