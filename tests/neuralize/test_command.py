"""The command line, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from commands import ROOT, Done, in_process, run, wrong
from conftest import data_folder
from sklearn.cluster import DBSCAN, Birch, KMeans
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_diabetes
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVR, OneClassSVM

from neuralize import Explanation
from neuralize.cli import main
from neuralize.readers import read_labelled
from neuralize.recipes import RECIPES

here = in_process("neuralize", main)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['neuralize', 'explain', '--help']\nimport neuralize.cli\n"
        "try:\n    neuralize.cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "heavy = {'torch', 'sklearn', 'pandas', 'numpy', 'matplotlib', 'jinja2', 'shap', 'skops'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--fit" in done.stdout


def test_help_names_every_recipe(here: Callable[..., Done]) -> None:
    told = " ".join(here("explain", "--help").stdout.split())
    for recipe in RECIPES.values():
        assert recipe.usage in told
    for command in ("describe", "flip", "counterfactual"):
        assert here(command, "--help").returncode == 0


def test_import_is_lazy() -> None:
    code = (
        "import sys, neuralize\nassert 'torch' not in sys.modules\nfrom neuralize import neuralize\n"
        "heavy = {'matplotlib', 'typer', 'shap', 'skops'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_demo(here: Callable[..., Done], tmp_path: Path) -> None:
    out = tmp_path / "a" / "wine"
    done = run("explain", "sklearn:wine", "--fit", "kmeans:3", "--scale", "--seed", "0", "-o", out)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["explanations.npz", "index.html", "summary.json", "values.csv"]
    summary = json.loads((out / "summary.json").read_text())
    assert [c["rows"] for c in summary["clusters"]] == [65, 51, 62]
    for cluster in summary["clusters"]:
        assert cluster["sentence"] in done.stdout
    e = Explanation.load(out / "explanations.npz")
    values = pd.read_csv(out / "values.csv", index_col=0)
    np.testing.assert_allclose(values[list(e.feature_names)], e.values)
    np.testing.assert_allclose(values["output"], e.output)
    again = here("explain", "sklearn:wine", "--fit", "kmeans:3", "--scale", "--seed", "0", "-o", out, "--json")
    assert json.loads(again.stdout) == summary


def test_saved_models(here: Callable[..., Done], tmp_path: Path, wine: pd.DataFrame) -> None:
    table = tmp_path / "wine.csv"
    wine.to_csv(table, index=False)
    fitted = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(wine)
    skops.io.dump(fitted, tmp_path / "good.skops")
    done = here(
        "explain", table, "--model", tmp_path / "good.skops", "-o", tmp_path / "o", "--target", "1", "--contrast", "2"
    )
    assert done.returncode == 0, done.stderr
    assert "from cluster 2" in done.stdout
    skops.io.dump(make_pipeline(StandardScaler(), DBSCAN()).fit(wine), tmp_path / "dbscan.skops")
    wrong(here("explain", table, "--model", tmp_path / "dbscan.skops", "-o", tmp_path / "x"), "DBSCAN")
    skops.io.dump(Path("/secret"), tmp_path / "path.skops")
    wrong(here("explain", table, "--model", tmp_path / "path.skops", "-o", tmp_path / "x"), "not allowed", "Path")
    (tmp_path / "bad.skops").write_bytes((tmp_path / "good.skops").read_bytes()[:200])
    wrong(here("explain", table, "--model", tmp_path / "bad.skops", "-o", tmp_path / "x"), "no skops file")
    wrong(here("explain", table, "--model", tmp_path / "none.skops", "-o", tmp_path / "x"), "is not there")
    wrong(
        here("explain", "sklearn:iris", "--model", tmp_path / "good.skops", "-o", tmp_path / "x"), "missing: 'alcohol'"
    )
    assert not (tmp_path / "x").exists()


def test_tables(here: Callable[..., Done], tmp_path: Path, wine: pd.DataFrame) -> None:
    small = wine.iloc[:40, :3]
    small.to_csv(tmp_path / "plain.csv", index=False, header=False)
    small.to_parquet(tmp_path / "t.parquet")
    np.savez(tmp_path / "t.npz", other=np.zeros(3), X=small.to_numpy())
    fit = ("--fit", "kmeans:2", "--json", "-o", tmp_path / "o")
    for name, options, names in (
        ("plain.csv", ("--no-header", "--drop", "x1"), ["x0", "x2"]),
        ("t.parquet", ("--columns", "ash,alcohol"), ["ash", "alcohol"]),
        ("t.npz", ("--beta", "inf"), ["x0", "x1", "x2"]),
    ):
        done = here("explain", tmp_path / name, *options, *fit)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["features"] == names


def test_wrong_use(here: Callable[..., Done], tmp_path: Path, wine: pd.DataFrame) -> None:
    out, fit = ("-o", tmp_path / "o"), ("--fit", "kmeans:3")
    wine.assign(kind="red").to_csv(tmp_path / "words.csv")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty.csv").write_text("")
    wine.assign(hue=np.nan).to_csv(tmp_path / "holes.csv")
    wrong(here(), "Missing command")
    wrong(here("explain", "sklearn:wine", *fit), "--output")
    wrong(here("explain", "sklearn:wine", *fit, *out, "--colour"), "--colour")
    wrong(here("explain", "sklearn:wine", *out), "--fit")
    wrong(here("explain", "sklearn:wine", "--fit", "kmeans:1", *out), "K >= 2")
    wrong(here("explain", "sklearn:moon", *fit, *out), "sklearn:wine")
    wrong(here("explain", tmp_path / "none.csv", *fit, *out), "none.csv is not there")
    wrong(here("explain", tmp_path / "words.csv", *fit, *out), "--drop kind")
    wrong(here("explain", tmp_path / "damaged.parquet", *fit, *out), "can not be read")
    wrong(here("explain", tmp_path / "empty.csv", *fit, *out), "can not be read")
    wrong(here("explain", tmp_path / "holes.csv", *fit, *out), "--drop hue")
    wrong(here("explain", "sklearn:wine", *fit, *out, "--drop", "price"), "'price'")
    wrong(here("explain", "sklearn:wine", *fit, *out, "--target", "9"), "does not exist")
    wrong(here("explain", "sklearn:wine", *fit, *out, "--beta", "soft"), "--beta")
    wrong(here("explain", "sklearn:wine", *fit, *out, "--rule", "gi"), "support vector")
    blocked = tmp_path / "file"
    blocked.write_text("x")
    wrong(here("explain", "sklearn:wine", *fit, "-o", blocked), "can not write")
    assert not (tmp_path / "o").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_broken_contract_stops_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from neuralize import cli, network

    honest = network.NeuralizedModel.predict
    monkeypatch.setattr(network.NeuralizedModel, "predict", lambda self, X: (honest(self, X) + 1) % 3)
    monkeypatch.setattr(
        sys, "argv", ["neuralize", "explain", "sklearn:iris", "--fit", "kmeans:3", "-o", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "contract broken" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_target_has_two_sentences(here: Callable[..., Done], tmp_path: Path) -> None:
    done = here("explain", "sklearn:iris", "--fit", "kmeans:3", "--target", "2", "--beta", "inf", "-o", tmp_path / "o")
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith("Cluster 2 (38 rows) is set apart")
    assert second.startswith("112 rows are not in cluster 2, mostly because of")
    assert "why, or why not, cluster 2" in (tmp_path / "o" / "index.html").read_text()
    assert pd.read_csv(tmp_path / "o" / "values.csv")["decided"].nunique() == 3


def test_a_contrast_leaves_its_own_rows_out(here: Callable[..., Done], tmp_path: Path) -> None:
    words = ("explain", "sklearn:iris", "--fit", "kmeans:3", "--contrast", "0", "-o", tmp_path / "o")
    done = here(*words)
    assert done.returncode == 0, done.stderr
    assert "Left out: 62 rows in cluster 0 itself." in done.stdout
    summary = json.loads(here(*words, "--json").stdout)
    assert (summary["left_out"], summary["rows"], summary["predictions_equal"]) == (62, 88, 150)
    wrong(here(*words[:-3], "9", "-o", tmp_path / "x"), "contrast", "does not exist")
    pd.DataFrame({"a": [0.0, 1.0]}).to_csv(tmp_path / "one.csv", index=False)
    skops.io.dump(KMeans(2, n_init=1).fit([[0.5], [90.0]]), tmp_path / "two.skops")
    rival = str(KMeans.predict(skops.io.load(tmp_path / "two.skops"), [[0.5]])[0])
    model = ("--model", tmp_path / "two.skops", "--contrast", rival)
    wrong(here("explain", tmp_path / "one.csv", *model, "-o", tmp_path / "x"), f"every row is in cluster {rival}")


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("a,b\n1,2,3\n4,5,6\n", (), ("more cells",)),
        ("a,b\n1,2,\n4,5,\n", (), ("more cells",)),
        ("a;b\n1;2\n4;5\n", (), ("separated by ';'",)),
        ("a;b\n1,5;2\n4,5;5\n", (), ("separated by ';'",)),
        ("a\tb\n1\t2\n", (), ("separated by '\\t'",)),
        ("1;2\n4;5\n", ("--no-header",), ("separated by ';'",)),
        ("1.5,2,2\n4,5,6\n", (), ("looks like data", "--no-header")),
        ("1.5,,1.5\n4,5,6\n", (), ("looks like data",)),
        ("a,b\n", (), ("no rows",)),
        ("a,my col\n1,x\n", (), ("--drop 'my col'",)),
        ("a,my col\n1,\n2,3\n", (), ("--drop 'my col'",)),
        ("a,b\n1,2\n3,4\n", ("--columns", "a,b,a"), ("named twice",)),
        ("a,b\n1,2\n3,4\n", ("--columns", "a, c"), ("no column 'c'",)),
        ("a,b\n1,2\n3,4\n", ("--drop", "a", "--drop", "b"), ("no columns",)),
        ("a,b\n1,2\n3,4\n", ("--seed", "-1"), ("--seed",)),
    ],
)
def test_wrong_tables(
    here: Callable[..., Done], tmp_path: Path, text: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "t.csv").write_text(text)
    wrong(here("explain", tmp_path / "t.csv", "--fit", "kmeans:2", "-o", tmp_path / "o", *options), *words)


def test_right_tables(here: Callable[..., Done], tmp_path: Path) -> None:
    for text, options, names in (
        ("0,1\n4,5\n7,8\n", ("--header",), ["0", "1"]),
        ("a, b,c\n1,2,3\n4,5,6\n", ("--columns", "c, a"), ["c", "a"]),
        ("a,b\n1.5,True\n4,False\n", (), ["a", "b"]),
    ):
        (tmp_path / "t.csv").write_text(text)
        done = here("explain", tmp_path / "t.csv", "--fit", "kmeans:2", "-o", tmp_path / "o", "--json", *options)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["features"] == names


def test_columns_are_advised_for_the_shell(here: Callable[..., Done], tmp_path: Path, wine: pd.DataFrame) -> None:
    skops.io.dump(KMeans(2, n_init=1).fit(wine[["hue", "ash"]]), tmp_path / "m.skops")
    words = ("explain", "sklearn:wine", "--model", tmp_path / "m.skops", "-o", tmp_path / "o")
    wrong(here(*words), "--columns hue,ash")
    assert here(*words, "--columns", "hue,ash").returncode == 0


def test_models_in_single_precision(here: Callable[..., Done], tmp_path: Path, wine: pd.DataFrame) -> None:
    wine.to_csv(tmp_path / "t.csv", index=False)
    for steps in ((), (StandardScaler(),)):
        skops.io.dump(make_pipeline(*steps, KMeans(3, n_init=1)).fit(wine.astype(np.float32)), tmp_path / "m.skops")
        done = here("explain", tmp_path / "t.csv", "--model", tmp_path / "m.skops", "-o", tmp_path / "o", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["predictions_equal"] == 178


def test_far_from_the_origin_the_estimator_rounds(here: Callable[..., Done], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.normal(size=(3000, 4)) + 1e7, columns=list("abcd"))
    rows.to_csv(tmp_path / "t.csv", index=False)
    done = here("explain", tmp_path / "t.csv", "--fit", "kmeans:4", "-o", tmp_path / "o", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["decided_within_rounding"] > 0
    assert summary["decided_within_rounding"] + summary["predictions_equal"] == 3000


def test_only_own_warnings_on_one_line(here: Callable[..., Done], tmp_path: Path) -> None:
    done = here("explain", "sklearn:iris", "--fit", "kmeans:3", "--target", "0", "-o", tmp_path / "o", "--beta", "1e-9")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: the features carry")
    (tmp_path / "huge.csv").write_text("a,b\n1e200,1\n-1e200,2\n3,4\n")
    wrong(here("explain", tmp_path / "huge.csv", "--fit", "kmeans:2", "-o", tmp_path / "o"), "overflow")


@pytest.mark.parametrize(("where", "ours"), [("neuralize.network.NeuralizedModel.explain", True), (KMeans, False)])
def test_only_the_estimators_own_refusal_is_excused(
    here: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, ours: bool
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ValueError("no luck")

    words = ("explain", "sklearn:iris", "--fit", "kmeans:3", "-o", tmp_path / "o")
    if ours:
        monkeypatch.setattr(where, fail)
        with pytest.raises(ValueError, match="no luck"):
            here(*words)
        return
    monkeypatch.setattr(where, "predict", fail)
    done = here(*words)
    assert done.returncode == 1
    assert "nothing is verified" in done.stderr
    assert "no luck" in done.stderr


# ---------------------------------------------------------------------- other models


FITS = {
    "kmeans:3": "KMeans",
    "minibatch:3": "MiniBatchKMeans",
    "bisecting:3": "BisectingKMeans",
    "gmm:3": "GaussianMixture",
    "gmm:3:diag": "GaussianMixture",
    "birch:3": "Birch",
    "meanshift": "MeanShift",
    "kernel-kmeans:3": "KernelKMeans",
    "kernel-kmeans:3:0.05": "KernelKMeans",
    "one-class-svm": "OneClassSVM",
    "one-class-svm:0.2": "OneClassSVM",
    "kde": "KernelDensity",
    "kde:0.5": "KernelDensity",
    "kde:scott": "KernelDensity",
    "svc": "SVC",
    "knn:5": "KNeighborsClassifier",
    "logistic": "LogisticRegression",
    "lda": "LinearDiscriminantAnalysis",
    "qda": "QuadraticDiscriminantAnalysis",
    "nb": "GaussianNB",
}


def test_all_recipes_are_tried() -> None:
    assert {fit.split(":")[0] for fit in FITS} == set(RECIPES)


@pytest.mark.parametrize("fit", FITS)
def test_recipes(here: Callable[..., Done], tmp_path: Path, fit: str) -> None:
    table = "sklearn:wine" if fit == "meanshift" else "sklearn:iris"
    words = ["explain", table, "--fit", fit, "--scale", "-o", tmp_path / "o", "--json"]
    supervised = RECIPES[fit.split(":")[0]].supervised
    if supervised:
        wrong(here(*words), "--target-column")
        words += ["--target-column", "target"]
    done = here(*words)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert FITS[fit] in summary["model"]
    assert summary["conservation"] < 1e-9
    assert summary["predictions_equal"] + summary["decided_within_rounding"] == summary["rows"]
    e = Explanation.load(tmp_path / "o" / "explanations.npz")
    assert sum(c["rows"] for c in summary["clusters"]) == len(e)
    assert e.kind == summary["kind"]
    if supervised:
        assert e.kind == "class"
        assert set(e.labels) == {"setosa", "versicolor", "virginica"}
        assert (e.decided == read_labelled("sklearn:iris", "target")[1]).mean() > 0.9
    page = (tmp_path / "o" / "index.html").read_text()
    assert "<html" in page


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        ("kmeans", ("kmeans:K", "K >= 2")),
        ("kmeans:3:4", ("kmeans:K", "nothing more")),
        ("k-means:3", ("kmeans:K", "gmm:K", "--fit kmeans:3")),
        ("gmm:3:round", ("full, tied, diag, spherical",)),
        ("kernel-kmeans:3:-1", ("a number > 0",)),
        ("one-class-svm:1.5", ("a number > 0 and <= 1",)),
        ("kde:wide", ("scott, or silverman",)),
        ("knn:0", ("K >= 1",)),
        ("meanshift:3", ("Expected: meanshift.",)),
        ("kmeans:200", ("149 distinct rows",)),
        ("knn:150", ("n_neighbors",)),
    ],
)
def test_wrong_recipes(here: Callable[..., Done], fit: str, words: tuple[str, ...]) -> None:
    label = ("--target-column", "target") if fit.startswith("knn") else ()
    wrong(here("describe", "sklearn:iris", "--fit", fit, *label), *words)


def test_wrong_labels(here: Callable[..., Done], tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"a": [0.0, 1.0, 2.0, 3.0], "half": [0.5, 1.5, 0.5, 1.5], "one": "x", "gap": ["u", None, "v", "u"]}
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    words = ("describe", tmp_path / "t.csv", "--columns", "a", "--fit", "nb", "--target-column")
    wrong(here(*words, "half"), "fractions")
    wrong(here(*words, "one"), "one class")
    wrong(here(*words, "gap"), "1 without")
    wrong(here(*words, "none"), "'none'")
    wrong(here("describe", "sklearn:iris", "--fit", "kmeans:3", "--target-column", "target"), "--drop")
    wrong(here("describe", "sklearn:iris", "--model", "m.skops", "--scale"), "belong to --fit")
    wrong(here("describe", "sklearn:iris", "--model", "m.skops", "--fit", "kmeans:3"), "exactly one of")


def test_pickles_by_name_only(here: Callable[..., Done], tmp_path: Path, wine: pd.DataFrame) -> None:
    fitted = make_pipeline(StandardScaler(), Birch(n_clusters=3, threshold=1.5)).fit(wine)
    joblib.dump(fitted, tmp_path / "m.joblib")
    wrong(here("describe", "sklearn:wine", "--model", tmp_path / "m.joblib"), "no skops file")
    done = here("describe", "sklearn:wine", "--allow-pickle", tmp_path / "m.joblib")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "warning: unpickling" in done.stderr
    assert "trust" in done.stderr
    assert done.stdout.startswith("Cluster 0 (")


def test_words_and_gaps(here: Callable[..., Done], tmp_path: Path, tabular: Callable[..., pd.DataFrame]) -> None:
    frame = tabular("penguins.csv")
    frame.to_csv(tmp_path / "penguins.csv", index=False)
    words = ("explain", tmp_path / "penguins.csv", "--fit", "kmeans:3", "-o", tmp_path / "o")
    wrong(here(*words), "--drop species --drop island --drop sex", "--prepare")
    numbers = ("--columns", "bill_length_mm,body_mass_g")
    wrong(here(*words, *numbers), "columns with missing values: bill_length_mm, body_mass_g", "--prepare")
    for flag in ("--prepare", "--scale"):
        done = here(*words, "--drop", "species", flag, "--json")
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["features"] == list(frame.columns[1:])
        assert summary["predictions_equal"] == 344
    e = Explanation.load(tmp_path / "o" / "explanations.npz")
    assert e.categories["island"] == ("Biscoe", "Dream", "Torgersen")
    assert np.isnan(e.data).sum() == frame.iloc[:, 1:].isna().to_numpy().sum()
    done = here(*words[:2], "--fit", "svc", "--prepare", "--target-column", "species", *words[4:])
    assert done.returncode == 0, done.stderr
    e = Explanation.load(tmp_path / "o" / "explanations.npz")
    assert (e.decided == frame["species"]).mean() > 0.98


def test_a_saved_pipeline_takes_the_raw_table(
    here: Callable[..., Done], tmp_path: Path, tabular: Callable[..., pd.DataFrame]
) -> None:
    frame = tabular("penguins.csv").drop(columns="species")
    frame.to_csv(tmp_path / "penguins.csv", index=False)
    numbers, words = [c for c in frame if frame[c].dtype.kind == "f"], ["island", "sex"]
    prepared = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), numbers),
        (make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()), words),
    )
    skops.io.dump(make_pipeline(prepared, KMeans(3, n_init=1, random_state=0)).fit(frame), tmp_path / "m.skops")
    done = here("describe", tmp_path / "penguins.csv", "--model", tmp_path / "m.skops", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["features"] == list(frame.columns)


def test_tables_without_a_header(here: Callable[..., Done], tabular: Callable[..., pd.DataFrame]) -> None:
    tabular("german.csv", header=None)
    file = data_folder() / "tabular" / "german.csv"
    words = ("describe", file, "--fit", "logistic", "--prepare", "--reference", "--target-column", "x20", "--json")
    done = here(*words, "--no-header")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert sorted(c["cluster"] for c in summary["clusters"]) == [1, 2]
    assert summary["rows"] == 1000
    wrong(here(*words, "--header"), "'x20'")


def test_what_can_not_be_prepared(here: Callable[..., Done], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=60), "id": [f"n{i}" for i in range(60)], "w": ["x", "y"] * 30})
    words = ("describe", tmp_path / "t.csv", "--fit", "kmeans:2", "--prepare")
    frame.to_csv(tmp_path / "t.csv", index=False)
    wrong(here(*words), "names the rows", "--drop id")
    assert here(*words, "--drop", "id").returncode == 0
    frame.assign(id=np.nan).to_csv(tmp_path / "t.csv", index=False)
    wrong(here(*words), "missing values only", "--drop id")
    frame.assign(id=np.inf).to_csv(tmp_path / "t.csv", index=False)
    wrong(here(*words), "infinite", "--drop id")
    many = pd.DataFrame({"a": rng.normal(size=400), "w": [f"n{i % 80}" for i in range(400)]})
    many.to_csv(tmp_path / "t.csv", index=False)
    done = here(*words)
    assert done.returncode == 0
    assert "80 different words" in done.stderr


def test_outliers_by_name(here: Callable[..., Done]) -> None:
    words = ("describe", "sklearn:iris", "--fit", "one-class-svm", "--scale", "--json")
    for asked, label in (("outlier", -1), ("-1", -1), ("inlier", 1)):
        found = json.loads(here(*words, "--target", asked).stdout)["clusters"]
        assert {c["cluster"] for c in found} == {label}
    done = here("explain", "sklearn:iris", "--fit", "one-class-svm", "--contrast", "outlier", "-o", "/dev/null/x")
    wrong(done, "can not write")


def test_regressions_and_their_level(here: Callable[..., Done], tmp_path: Path) -> None:
    frame = load_diabetes(as_frame=True).data
    y = load_diabetes().target
    frame.to_csv(tmp_path / "t.csv", index=False)
    fitted = make_pipeline(StandardScaler(), SVR()).fit(frame, y)
    skops.io.dump(fitted, tmp_path / "m.skops")
    words = ("explain", tmp_path / "t.csv", "--model", tmp_path / "m.skops", "-o", tmp_path / "o", "--json")
    outputs = {}
    for level in ("0", "100", "mean"):
        done = here(*words, "--level", level)
        assert done.returncode == 0, done.stderr
        outputs[level] = Explanation.load(tmp_path / "o" / "explanations.npz").output
    np.testing.assert_allclose(outputs["0"], fitted.predict(frame), rtol=1e-9)
    np.testing.assert_allclose(outputs["0"] - 100, outputs["100"], rtol=1e-9, atol=1e-7)
    assert abs(outputs["mean"].mean()) < 1e-6
    wrong(here(*words, "--level", "high"), "--level")
    wrong(here(*words, "--contrast", "value"), "contrast")
    wrong(here("describe", "sklearn:iris", "--fit", "kmeans:3", "--level", "1"), "regressions")


def test_the_decision_value(here: Callable[..., Done], tmp_path: Path, wine: pd.DataFrame) -> None:
    fitted = make_pipeline(StandardScaler(), OneClassSVM(nu=0.2)).fit(wine)
    skops.io.dump(fitted, tmp_path / "m.skops")
    words = ("explain", "sklearn:wine", "--model", tmp_path / "m.skops", "--target", "inlier", "-o", tmp_path / "o")
    assert here(*words, "--output-kind", "decision").returncode == 0
    e = Explanation.load(tmp_path / "o" / "explanations.npz")
    assert e.output_name == "decision"
    np.testing.assert_allclose(e.output, fitted.decision_function(wine), rtol=1e-7, atol=1e-9)
    wrong(here(*words, "--output-kind", "score"), "'decision'")


def test_the_largest_values_only(here: Callable[..., Done], tmp_path: Path, wine: pd.DataFrame) -> None:
    words = ("explain", "sklearn:wine", "--fit", "kmeans:3", "--scale", "-o", tmp_path / "o")
    assert here(*words).returncode == 0
    whole = Explanation.load(tmp_path / "o" / "explanations.npz")
    done = here(*words, "--top", "2")
    assert done.returncode == 0, done.stderr
    kept = Explanation.load(tmp_path / "o" / "explanations.npz")
    assert (np.diff(kept.values.indptr) == 2).all()
    long = pd.read_csv(tmp_path / "o" / "values.csv")
    assert len(long) == 2 * len(wine)
    for row, lines in long.groupby("row"):
        best = np.argsort(-np.abs(whole.values[row]))[:2]
        assert lines["feature"].tolist() == [whole.feature_names[t] for t in best]
        np.testing.assert_allclose(lines["relevance"], whole.values[row, best])
        np.testing.assert_allclose(lines["output"], whole.output[row])
    wrong(here("describe", tmp_path / "o" / "explanations.npz"), "--top")


# ---------------------------------------------------------------------- describe


def test_describe_writes_nothing(here: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ("--fit", "kmeans:3", "--scale")
    said = here("describe", "sklearn:wine", *fit).stdout
    assert list(tmp_path.iterdir()) == []
    assert here("explain", "sklearn:wine", *fit, "-o", "o").stdout.startswith(said)
    assert here("describe", "o/explanations.npz").stdout == said
    told = json.loads(here("describe", "o/explanations.npz", "--json").stdout)
    assert [c["sentence"] for c in told["clusters"]] == said.splitlines()
    wrong(here("describe", "o/explanations.npz", "--target", "1"), "answer already")
    wrong(here("describe", "o/none.npz"), "is not there")
    wrong(here("describe", "sklearn:wine"), "--fit")


def test_one_row(here: Callable[..., Done], tmp_path: Path) -> None:
    words = ("sklearn:wine", "--fit", "kmeans:3", "--scale")
    done = here("describe", *words, "--row", "5", "--top", "3", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    here("explain", *words, "-o", tmp_path / "o")
    e = Explanation.load(tmp_path / "o" / "explanations.npz")
    found = {f["name"]: f["relevance"] for f in told["for"] + told["against"]}
    for name, value in found.items():
        assert value == pytest.approx(e.values[5, e.feature_names.index(name)], rel=1e-9)
    assert [f["relevance"] for f in told["for"]] == pytest.approx(np.sort(e.values[5])[::-1][:3].tolist())
    total = sum(found.values()) + told["of_other_columns"] + sum(told["residual"].values())
    assert total == pytest.approx(told["output"]) == pytest.approx(e.output[5])
    said = here("describe", *words, "--row", "5").stdout
    assert said == str(e.for_and_against(5)) + "\n"
    assert here("describe", tmp_path / "o" / "explanations.npz", "--row", "5").stdout == said
    for source in (words, (tmp_path / "o" / "explanations.npz",)):
        wrong(here("describe", *source, "--row", "178"), "0 to 177")
    own, other = e.decided[5], next(k for k in e.labels if k != e.decided[5])
    wrong(here("describe", *words, "--row", "5", "--contrast", str(own)), f"row 5 is in cluster {own} itself")
    duel = json.loads(here("describe", *words, "--row", "5", "--contrast", str(other), "--json").stdout)
    assert duel["question"] == f"why cluster {own} rather than cluster {other}"


def test_one_row_beyond_the_first_thousand(here: Callable[..., Done], tmp_path: Path) -> None:
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(1500, 3)), columns=list("abc"))
    frame.iloc[::7, 1] = np.nan
    frame.to_csv(tmp_path / "t.csv", index=False)
    words = (tmp_path / "t.csv", "--fit", "kmeans:3", "--prepare")
    here("explain", *words, "-o", tmp_path / "o")
    e = Explanation.load(tmp_path / "o" / "explanations.npz")
    for row in (1400, 1401):
        assert here("describe", *words, "--row", row).stdout == str(e.for_and_against(row)) + "\n"


def test_the_page_lets_its_reader_choose(here: Callable[..., Done], tmp_path: Path) -> None:
    words = ("explain", "sklearn:iris", "--fit", "kmeans:3", "-o", tmp_path / "o")
    assert here(*words).returncode == 0
    plain = (tmp_path / "o" / "index.html").read_text()
    done = here(*words, "--alternatives")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "o" / "index.html").read_text()
    assert plain.count('"question":') == 1
    assert page.count('"question":') == 4
    wrong(here(*words, "--alternatives", "--top", "2"), "--top")
    wrong(here("explain", "sklearn:iris", "--fit", "kde", "-o", tmp_path / "o", "--alternatives"), "one number")
