"""The harness of the experiments: cells that are kept, files that are whole, a page that says what the numbers say."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from experiments import catalogue, results_page
from experiments.__main__ import app
from experiments.experiment import Claim, Experiment, Report, Table
from experiments.study import Study, TimeIsOverError
from lrp.errors import DataError, FileFormatError, InputError, MismatchError

CALLS: list[str] = []


def square(study: Study, seed: int) -> Mapping[str, Any]:
    CALLS.append(f"{seed}")
    return {"seed": seed, "value": seed**2 + study.settings["shift"]}


def work(study: Study) -> None:
    for seed in study.progress(study.seeds, "squares"):
        study.cell(f"square|{seed}", lambda seed=seed: square(study, seed))  # type: ignore[misc]  # bound at once


def report(study: Study) -> Report:
    figure = Figure()
    figure.add_subplot().plot([row["value"] for row in study.rows])
    largest = max(row["value"] for row in study.rows)
    verdict = "confirmed" if largest >= 4 else "refuted"
    table = Table("Squares", ["seed", "value"], study.columns("seed", "value"), "Of whole numbers.", 0)
    return Report(
        [f"The largest is {largest}."],
        {"squares": table},
        {"curve": figure},
        [Claim("squares grow", "4", f"{largest}", verdict, "a | b")],  # type: ignore[arg-type]  # one of two literals
        wins=["here"],
        losses=["there"],
    )


SQUARES = Experiment(
    "squares", "Pythagoras", "How large?", {"seeds": 3, "shift": 0}, {"seeds": 2, "shift": 0}, work, report
)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_what_a_run_writes(tmp_path: Path) -> None:
    assert Study(SQUARES, tmp_path).run()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "curve.png", "curve.svg", "result.json", "result.md", "squares.csv",
    ]  # fmt: skip
    held = result(tmp_path)
    assert [row["value"] for row in held["rows"]] == [0, 1, 4]
    assert (held["complete"], held["quick"], held["settings"]) == (True, False, {"seeds": 3, "shift": 0})
    (run,) = held["runs"]
    assert run["cells"] == 3
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or run["versions"]["torch"] == torch.__version__
    rows = list(csv.reader((tmp_path / "squares.csv").read_text().splitlines()))
    assert rows == [
        ["seed", "value"],
        ["0", "0"],
        ["1", "1"],
        ["2", "4"],
    ]
    page = (tmp_path / "result.md").read_text()
    assert "| squares grow | 4 | 4 | **confirmed** | a \\| b |" in page
    assert "![curve](curve.svg)" in page
    assert "| 2 | 4 |" in page
    assert "quick" not in page


def test_nothing_is_computed_twice_and_more_seeds_go_on(tmp_path: Path) -> None:
    Study(SQUARES, tmp_path).run()
    Study(SQUARES, tmp_path).run()
    assert CALLS == ["0", "1", "2"]
    assert len(result(tmp_path)["runs"]) == 1  # a page that was written again tells of no other run
    Study(SQUARES, tmp_path, seeds=5).run()
    assert CALLS == ["0", "1", "2", "3", "4"]
    assert [run["cells"] for run in result(tmp_path)["runs"]] == [3, 2]


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    def stopped(study: Study) -> None:
        work(study)
        raise KeyboardInterrupt

    broken = Experiment("squares", "", "", SQUARES.full, SQUARES.quick, stopped, report)
    with pytest.raises(KeyboardInterrupt):
        Study(broken, tmp_path, seeds=2).run()
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"key": "square|2", "va')  # as a kill leaves it
    assert Study(SQUARES, tmp_path).run()
    assert CALLS == ["0", "1", "2"]
    assert not list(tmp_path.glob("cells*"))
    held = result(tmp_path)
    assert [row["value"] for row in held["rows"]] == [0, 1, 4]
    assert [(run["cells"], run["seconds"] is None) for run in held["runs"]] == [(2, True), (1, False)]
    assert held["runs"][0]["versions"] == held["runs"][1]["versions"]


def test_cells_come_from_the_code_that_began_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout may move on while a long run is at work."""
    told = iter(["first", "later", "latest"])
    monkeypatch.setattr("experiments.study.commit", lambda: next(told))
    Study(SQUARES, tmp_path).run()
    assert [run["commit"] for run in result(tmp_path)["runs"]] == ["first"]


def test_when_the_time_is_over_what_is_done_is_written(tmp_path: Path) -> None:
    def slow(study: Study) -> None:
        study.cell("square|0", lambda: square(study, 0))
        study._until = 0.0
        study.cell("square|1", lambda: square(study, 1))

    unfinished = Experiment("squares", "", "", SQUARES.full, SQUARES.quick, slow, report)
    assert not Study(unfinished, tmp_path).run()
    assert result(tmp_path)["complete"] is False
    assert "Not all cells are done" in (tmp_path / "result.md").read_text()
    with pytest.raises(TimeIsOverError):
        Study(SQUARES, tmp_path / "none", seconds=-1).weights("net", dict)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Study(SQUARES, tmp_path).run()
    before = (tmp_path / "result.json").read_bytes()
    other = Experiment("squares", "", "", {"seeds": 3, "shift": 1}, {}, work, report)
    with pytest.raises(MismatchError, match=r"shift=1.*shift=0"):
        Study(other, tmp_path)
    half = tmp_path / "half"
    Study(SQUARES, half).cell("square|0", lambda: {"seed": 0, "value": 0})
    with pytest.raises(MismatchError, match="shift"):
        Study(other, half)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(FileFormatError, match="can not be read"):
        Study(SQUARES, tmp_path)
    assert before != b"{"


def test_parts_are_taken_together(tmp_path: Path) -> None:
    for k in (0, 1):
        assert Study(SQUARES, tmp_path, part=(k, 2)).run()
        assert not (tmp_path / "result.json").exists()
    assert sorted(CALLS) == ["0", "1", "2"]
    assert Study(SQUARES, tmp_path).run()
    assert len(CALLS) == 3
    assert sorted(row["value"] for row in result(tmp_path)["rows"]) == [0, 1, 4]
    assert not list(tmp_path.glob("cells*"))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = Study(SQUARES, tmp_path)
    first.cell("square|0", lambda: square(first, 0))
    second = Study(SQUARES, tmp_path)
    assert len(second.rows) == 1
    with pytest.raises(DataError, match="another process is at work"):
        second.run()
    with pytest.raises(DataError, match="another process is at work"):
        Study(SQUARES, tmp_path).rewrite()  # it would remove the cells of the first
    assert not (tmp_path / "result.json").exists()
    assert (tmp_path / "cells.jsonl").exists()
    assert first.run()
    assert CALLS == ["0", "1", "2"]
    assert not list(tmp_path.glob("cells*"))


def test_a_page_is_written_again_without_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.__main__.experiment", lambda name: SQUARES)
    assert call(monkeypatch, capsys, "page", "squares", "-o", tmp_path)[0] == 2
    Study(SQUARES, tmp_path / "squares", seeds=2).run()
    (tmp_path / "squares" / "result.md").unlink()
    before = result(tmp_path / "squares")
    code, out, _ = call(monkeypatch, capsys, "page", "squares", "-o", tmp_path)
    assert (code, out.strip()) == (0, str(tmp_path / "squares" / "result.md"))
    assert "The largest is 1." in (tmp_path / "squares" / "result.md").read_text()
    assert CALLS == ["0", "1"]
    assert result(tmp_path / "squares") == before


def test_weights_are_kept(tmp_path: Path) -> None:
    made = []

    def train() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"w": torch.arange(3.0)}

    for _ in range(2):
        assert torch.equal(Study(SQUARES, tmp_path).weights("net", train)["w"], torch.arange(3.0))
    assert made == [1]


def test_tables() -> None:
    table = Table("t", ["a", "b", "c"], [["x", (0.5, 0.25), None], ["y", float("nan"), 3]], digits=2)
    assert table.markdown().splitlines()[2:] == ["| x | 0.50 ± 0.25 | - |", "| y | - | 3 |"]
    assert table.csv().splitlines() == ["a,b,b (standard error),c", "x,0.5,0.25,", "y,nan,,3"]
    with pytest.raises(ValueError, match="a row of 1"):
        Table("t", ["a", "b"], [["x"]])
    with pytest.raises(ValueError, match="maybe"):
        Claim("", "", "", "maybe", "")  # type: ignore[arg-type]  # that is the mistake


def test_results_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MODULES", {"squares": "none"})
    monkeypatch.setattr(results_page, "MODULES", {"squares": "none"})
    with pytest.raises(DataError, match="no results"):
        results_page.write(tmp_path)
    Study(SQUARES, tmp_path / "squares").run()
    text = results_page.write(tmp_path).read_text()
    assert "1 claims: 1 confirmed" in text
    assert "| [squares](squares/result.md) | How large? | 1 |  |  |  |  |" in text
    assert text.index("Where relevance beats every control") < text.index("Where it does not")
    for told in (
        "- [squares](squares/result.md)\n  - here",
        "- [squares](squares/result.md)\n  - there",
        "The largest is 4.",
        "](squares/curve.svg)",
    ):
        assert told in text


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        app()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = call(monkeypatch, capsys, "list")
    assert code == 0
    assert all(name in out for name in catalogue.MODULES)
    assert catalogue.MODULES
    for words, told in (
        (("run", "nothing"), "there is no experiment 'nothing'"),
        (("run",), "name experiments, or say --all"),
        (("run", "ecqx", "--part", "1"), "--part takes K/N"),
        (("run", "ecqx", "--quick", "--data", tmp_path / "none", "-o", tmp_path), "folder of real data is missing"),
    ):
        code, _, err = call(monkeypatch, capsys, *words)
        assert (code, told in err) == (2, True), err
        assert "Traceback" not in err


@pytest.mark.parametrize("name", catalogue.MODULES)
def test_every_experiment_is_what_it_should_be(name: str) -> None:
    found = catalogue.experiment(name)
    assert found.name == name
    assert found.question.endswith("?")
    assert "seeds" in found.full
    assert set(found.full) == set(found.quick)
    assert found.quick["seeds"] <= found.full["seeds"]


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="there is no experiment"):
        catalogue.experiment("nothing")


def test_results_that_are_committed_fit_their_experiments() -> None:
    """Written by the settings that the code has now, whole, and told on the page as they are in the file."""
    folder = Path(results_page.__file__).parent / "results"
    for name in catalogue.MODULES:
        if not (folder / name / "result.json").exists():
            continue
        before = sorted(path.name for path in (folder / name).iterdir())
        held = result(folder / name)
        study = Study(catalogue.experiment(name), folder / name, seeds=held["settings"]["seeds"])
        assert sorted(path.name for path in (folder / name).iterdir()) == before  # reading leaves it as it is
        study.cells.rows = {row["key"]: row for row in held["rows"]}
        again = study.experiment.report(study)
        assert [vars(c) for c in again.claims] == held["claims"], name
        assert list(again.words) == held["words"], name


def test_reading_the_list_needs_no_torch() -> None:
    """As a process: an answer at once."""
    code = "import sys, experiments.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
