"""The command line, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from neuralize import Explanation
from neuralize.cli import main

ROOT = Path(__file__).parents[2]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "neuralize", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The same in this process: starting one takes seconds."""

    def call(*words: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["neuralize", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return Done(int(stop.value.code or 0), out, err)

    return call


def wrong(result: Done | subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not result.stdout


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
    wrong(run("explain", "sklearn:wine", "--fit", "kmeans:1", "-o", out), "K >= 2")
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
    skops.io.dump(make_pipeline(PCA(2), KMeans(3, n_init=1)).fit(wine), tmp_path / "pca.skops")
    wrong(here("explain", table, "--model", tmp_path / "pca.skops", "-o", tmp_path / "x"), "PCA")
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
