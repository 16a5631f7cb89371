"""The command line, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
