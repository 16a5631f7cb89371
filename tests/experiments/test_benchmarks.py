"""The table of all benchmarks: what it says of figures that meet their budget, miss it, or have none."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import __main__ as bench
from experiments.benchmarks import pruning_speed, quantizing_speed, runtime_forms, summary
from experiments.benchmarks.summary import Figure, Limit
from lrp.errors import DataError, FileFormatError

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def spread(median: float, **further: Any) -> dict[str, Any]:
    return {"median": median, "low": median - 0.01, "high": median + 0.02, "best": median, **further}


def lrp(seconds: float) -> dict[str, Any]:
    """Epsilon so many times as slow as the gradient; excitation backprop and captum refused."""
    return {
        "settings": {"threads": 1, "rounds": 1, "peers": True},
        "versions": {"torch": "2", "captum": "0.9.0"},
        "machine": "some machine",
        "clock": "process CPU time",
        "methods": ["plain gradient", "full backward", "lrp epsilon", "lrp excitation_backprop", "captum epsilon"],
        "cases": [
            {
                "label": "vgg16 64 b1",
                "net": "vgg16",
                "rounds": [{"plain gradient": 1.0, "full backward": 2.0, "lrp epsilon": seconds}],
                "ratios": {"lrp epsilon": spread(seconds, over="plain gradient", budget=1.15)},
                "memory": {
                    "plain gradient": {"mib": 100.0},
                    "lrp epsilon": {"mib": 150.0, "ratio": 1.5, "budget": 1.4},
                    "captum epsilon": {"mib": 300.0, "ratio": 3.0},
                },
                "refused": {"lrp excitation_backprop": "no such network", "captum epsilon": "its map is wrong"},
            }
        ],
    }


def explain(slower: float, faster: float) -> dict[str, Any]:
    ratios = {job: spread(slower) for job in ("out", "returned", "as it comes")}
    rounds = [{"predict": 0.1, **dict.fromkeys(ratios, 0.1 * slower)}]
    rivals = {"shap PermutationExplainer": spread(faster)}
    own = {"explain": spread(2.0)}
    times = [{"predict": 1.0, "explain": 2.0}]
    memory = {"mib": [1.0, 2.0], "how": "somehow"}
    return {
        "settings": {"threads": 2, "rounds": 1},
        "versions": {"shap": "0.51.0"},
        "machine": "some machine",
        "waiting": "active",
        "load": [0.1, 0.2],
        "kmeans": [
            {"name": "float64", "note": "9 rows", "rounds": rounds, "cpu_rounds": rounds, "wall": ratios, "cpu": ratios}
        ],
        "memory": {
            "rows": [10, 2**20 + 10],
            "columns": 2,
            "dtype": "float64",
            "ways": {"out": memory, "batches": {"failed": "no memory"}, "returned": memory},
        },
        "models": [
            {
                "name": "KMeans",
                "note": "K = 5",
                "rows": 10,
                "rival_rows": 1,
                "seconds": {"explain": 2.0, "shap PermutationExplainer": 0.2 * faster},
                "rounds": times,
                "cpu_rounds": times,
                "wall": own,
                "cpu": own,
                "rivals": rivals,
                "refused": {"shapiq ProductKernelExplainer": "takes binary SVC only"},
            }
        ],
    }


def pruning(ratio: float, seconds: float) -> dict[str, Any]:
    names = [pruning_speed.BASE, *pruning_speed.CRITERIA]
    return {
        "threads": 1,
        "versions": {"torch": "2"},
        "python": "3",
        "scoring": [
            {
                "net": "resnet18",
                "pixels": 64,
                "pictures": 16,
                "rounds": [dict.fromkeys(names, 1.0)],
                "ratios": {name: spread(ratio) for name in pruning_speed.CRITERIA},
            }
        ],
        "planning": {"resnet50": {"structure": seconds - 2, "plan": 1.0, "cut": 1.0, "total": seconds}},
    }


def quantizing(ratio: float) -> dict[str, Any]:
    methods = quantizing_speed.METHODS
    rounds = [{quantizing_speed.PLAIN: 1.0, **dict.fromkeys(methods, ratio)}]
    case = {"net": "resnet20", "pixels": 32, "batch": 8, "rounds": rounds}
    ratios = {m: spread(ratio) for m in methods}
    return {"threads": 1, "torch": "2", "python": "3", "machine": "a machine", "cases": [{**case, "ratios": ratios}]}


def coders(file: int, zstd: int | None) -> dict[str, Any]:
    row = {"bits": 2, "gamma": 0.0, "packed": 200, "zlib9": 150, "lzma": 120, "nnc": 100, "file": file}
    row |= {} if zstd is None else {"zstd19": zstd + 5, "zstd19 of packed": zstd}
    time = {"weights": 1000, "zeros": 0.5, "encode_seconds": 2.0, "decode_seconds": 1.0, "slow_seconds": 4.0}
    return {"versions": {"torch": "2"}, "python": "3", "rounds": 3, "sizes": [row], "times": [time]}


def forms(speed: float, vnni: bool = True) -> dict[str, Any]:
    speeds = {"speed": speed, "speed_low": speed - 1, "speed_high": speed + 1, "speed_best": speed}
    rows = {"fp32": {"ms": 1.0, "speed": 1.0}, "int8, folded": {"ms": 1.0, **speeds}, "a8w8": {"ms": 0.5, **speeds}}
    sizes = {"fp32": 400, "int8": 110, "a8w8": 120}
    load = [runtime_forms.BUSY + 1, 2.0]
    settings = {"versions": {}, "python": "3", "machine": "a machine", "vnni": vnni, "rounds": 9, "load": load}
    net = {"net": "resnet18", "weights": "random", "bytes": sizes, "times": {"2": rows, "1": rows}}
    return {"settings": settings, "nets": [net]}


def verdicts(name: str, result: dict[str, Any]) -> dict[tuple[str, str], str]:
    run = summary.BENCHMARKS[name][1](result)
    return {(f.what, f.case): f.verdict for f in run.figures if f.verdict != "no budget"}


def test_figures_of_lrp() -> None:
    for seconds, verdict in ((1.1, "met"), (1.2, "missed")):
        run = summary.lrp_speed(lrp(seconds))
        time, memory, refused = run.figures
        assert (time.what, time.case, time.verdict) == ("time of epsilon, VGG", "vgg16 64 b1", verdict)
        assert (time.ours, time.other) == (f"{seconds:g} s", "plain gradient, 1 s")
        assert time.ratio == f"{seconds:.2f} [{seconds - 0.01:.2f}, {seconds + 0.02:.2f}; {seconds:.2f}]"
        assert (memory.verdict, memory.peers) == ("missed", "captum 3.00")
        assert (refused.verdict, refused.ours, refused.ratio) == ("no figure", "refused", "–")
        assert any("its map is wrong" in note for note in run.notes)
        assert any("not installed: zennit" in note for note in run.notes)
        assert run.about == "some machine, 1 thread, process CPU time, 1 round; torch 2, captum 0.9.0"


def test_figures_of_explanations() -> None:
    met, missed = explain(3.9, 1000), explain(6.1, 999)
    assert set(verdicts("explain_speed", met).values()) == {"met"}
    assert set(verdicts("explain_speed", missed).values()) == {"missed"}
    assert len(verdicts("explain_speed", met)) == 5  # two clocks, into out= and returned; shap
    run = summary.explain_speed(met)
    assert [f.value for f in run.figures if f.what == "memory per further row"] == [1 / 16, 1 / 16]
    assert any("no memory" in note for note in run.notes)
    assert any("takes binary SVC only" in note for note in run.notes)


def test_figures_of_pruning() -> None:
    expected = {
        ("scoring by lrp:zplus", "resnet18, 64 pixels, 16 pictures"),
        ("planning and cutting beyond scoring", "resnet50"),
    }
    for result, verdict in ((pruning(1.9, 59.9), "met"), (pruning(1.91, 60.0), "missed")):
        found = verdicts("pruning_speed", result)
        assert set(found) == expected
        assert set(found.values()) == {verdict}
    run = summary.pruning_speed(pruning(1.0, 10.0))
    assert run.about.startswith("machine not recorded, 1 thread")
    assert run.figures[-1].ratio == "10.0 s"


def test_figures_of_quantizing() -> None:
    for ratio, verdict in ((1.6, "met"), (1.61, "missed")):
        found = verdicts("quantizing_speed", quantizing(ratio))
        assert len(found) == len(quantizing_speed.METHODS)
        assert set(found.values()) == {verdict}


def test_figures_of_coders() -> None:
    case = "2 bit, gamma 0.0"
    both = {("file over NNC", case): "met", ("file over zstd-19", case): "missed"}
    assert verdicts("coder_sizes", coders(99, 98)) == both
    assert verdicts("coder_sizes", coders(100, None)) == {("file over NNC", case): "missed"}  # below, not at most
    assert summary.coder_sizes(coders(99, 98)).notes == []
    assert "zstandard is not installed" in summary.coder_sizes(coders(99, None)).notes[0]


def test_figures_of_forms() -> None:
    key = ("speed of a8w8 over fp32, 2 threads", "resnet18, random weights")  # nothing is pledged for one thread
    assert verdicts("runtime_forms", forms(2.5)) == {key: "met"}
    assert verdicts("runtime_forms", forms(2.4)) == {key: "missed"}
    assert verdicts("runtime_forms", forms(2.4, vnni=False)) == {}
    assert "not to be quoted" in summary.runtime_forms(forms(2.5)).notes[0]


def test_rounding_hides_no_miss() -> None:
    assert Figure("", "", "", "", 1.1504, (), Limit("<=", 1.15)).ratio == "1.1504"
    assert Figure("", "", "", "", 2.4999, (), Limit(">=", 2.5)).ratio == "2.4999"
    assert Figure("", "", "", "", 1.15, (), Limit("<=", 1.15)).ratio == "1.15"
    assert Figure("", "", "", "", float("nan"), (), Limit("<=", 1.15)).verdict == "missed"
    assert Figure("", "", "", "", None, (), Limit("<=", 1.15)).verdict == "no figure"


def test_what_is_missed_is_seen() -> None:
    """In the line of its pledge, in a table of its own, and among all figures."""
    found: dict[str, dict[str, Any]] = {name: {} for name in summary.BENCHMARKS}
    found["quantizing_speed"] = {"result": quantizing(1.5), "slow": quantizing(1.7)}
    text = summary.page(found, {"lrp_speed": "skipped: torchvision is not installed"})
    methods = len(quantizing_speed.METHODS)
    assert f"{2 * methods} figures: {methods} met, {methods} missed." in text
    assert text.count("| **missed** (1 of 2) |") == methods
    assert text.count("| **missed** |") == 2 * methods
    assert text.count("| met |") == methods
    assert "- lrp_speed: skipped: torchvision is not installed" in text
    assert "- coder_sizes: no result is stored here" in text
    good = summary.page(found | {"quantizing_speed": {"result": quantizing(1.5)}})
    assert "missed" not in good


def test_what_is_committed() -> None:
    """``python -m experiments.benchmarks table`` writes this page from the committed results."""
    assert summary.page(summary.stored(RESULTS)) == (RESULTS / summary.PAGE).read_text(encoding="utf-8")


def test_every_benchmark_is_told() -> None:
    assert set(bench.BENCHMARKS) == set(summary.BENCHMARKS)
    for name in bench.BENCHMARKS:
        assert importlib.util.find_spec(f"experiments.benchmarks.{name}") is not None
        line = bench.command(name, True, Path("data"), Path("out"))
        assert line[-2:] == ["-o", str(Path("out", name).resolve())]
        assert len(line) > len(bench.command(name, False, Path("data"), Path("out")))  # each has a short form


def test_table_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "coder_sizes"
    place.mkdir()
    (place / "result.json").write_text(json.dumps(coders(99, 98)))
    assert bench.main(["table", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / summary.PAGE)
    assert "3 bit" not in (tmp_path / summary.PAGE).read_text()
    (place / "other.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"coder_sizes/other\.json is no result"):
        summary.write(tmp_path)
    (place / "other.json").write_text("{")
    with pytest.raises(FileFormatError, match="cannot be read"):
        summary.write(tmp_path)


def test_nothing_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="holds no results"):
        summary.write(tmp_path)
    assert bench.main(["table", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_missing_data_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ["--only", "coder_sizes", "--data", str(tmp_path), "-o", str(out)]
    assert bench.main(asked) == 1  # no result at all, so no table
    assert "the data folder has no cifar10_models" in capsys.readouterr().err
    shutil.copytree(RESULTS / "coder_sizes", out / "coder_sizes")
    assert bench.main(asked) == 0
    text = (out / summary.PAGE).read_text()
    assert "skipped: the data folder has no cifar10_models" in text
    assert "of an earlier run" in text
    assert bench.main(["table", str(out)]) == 0  # the reason is kept
    assert (out / summary.PAGE).read_text() == text


def test_missing_modules_are_said() -> None:
    found = bench.Benchmark((), ("json", "no_such_module"), ("nor_this",))
    assert found.lacks(True, Path()) == "no_such_module is not installed"
    assert found.lacks(False, Path()) == "no_such_module, nor_this are not installed"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "lrp_speed", "nonsense"], "invalid choice: 'nonsense'"),
        (["--only"], "expected at least one argument"),
        (["tables"], "invalid choice: 'tables'"),
        (["--quicker"], "unrecognized arguments"),
    ],
)
def test_wrong_use_exits_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    """One benchmark in a process of its own, and the table of it."""
    if why := bench.BENCHMARKS["pruning_speed"].lacks(True, tmp_path):
        pytest.skip(why)
    assert bench.main(["--quick", "--only", "pruning_speed", "-o", str(tmp_path)]) == 0
    text = (tmp_path / summary.PAGE).read_text()
    assert "- pruning_speed: A short run" in text
    assert "| scoring by lrp:zplus | resnet18" in text
    assert "machine not recorded" not in text


def test_failure_is_said(tmp_path: Path) -> None:
    """The last line that the process wrote."""
    assert "ecqx_resnet20.safetensors" in bench.measure("coder_sizes", True, tmp_path, tmp_path)
