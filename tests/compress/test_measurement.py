"""Forms side by side: what is measured, what is said of it, and the commands measure and export."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, Done, in_process, wrong
from integers import indices, props, quantized, read
from networks import mlp
from torch import nn

import compress
from compress.cli import main
from compress.exporting import export_onnx
from compress.measurement import Measurement, Row, form_of, measure
from compress.meters import Latency
from lrp import errors

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")

FORMS = ["fp32", "int8", "int8, folded", "int4", "int4, folded", "a8w8"]
QUICK: dict[str, Any] = {"rounds": 3, "least_ms": 0.1, "threads": 1}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip


def batches(count: int = 40) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(10, 1, 8, 8, generator=generator), torch.arange(10) % 4) for _ in range(count // 10)]


def test_every_form_side_by_side() -> None:
    model = quantized(net(), 4)
    found = measure(
        model, example_inputs=torch.randn(1, 1, 8, 8), calibration=batches(), data=batches(), force=True, **QUICK
    )
    assert [row.name for row in found.rows] == FORMS
    sizes = [found[name].bytes for name in ("fp32", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    for row in found.rows:
        assert 0 < row.compressed < row.bytes
        assert row.load_ms is not None
        assert row.load_ms > 0
        assert row.latency is not None
        assert row.latency.low <= row.latency.median <= row.latency.high
        assert row.accuracy is not None
        assert row.resident is None or row.resident >= 0
    assert found["fp32"].speed == 1
    assert found["int8"].accuracy == found["int8, folded"].accuracy == found["fp32"].accuracy
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches())
    assert found["fp32"].accuracy == right / 40
    text = str(found)
    for word in (*FORMS, "1 thread,", "batch 1", "of 40 samples", "onnxruntime", found.sentence):
        assert word in text
    told = json.loads(json.dumps(found.to_json()))
    assert [row["name"] for row in told["rows"]] == FORMS
    assert told["settings"]["compressor"] in ("zstd -19", "lzma -6")
    assert told["settings"]["threads"] == 1


def row(form: str, size: int, speed: float | None) -> Row:
    return Row(form, form, size, size, 1.0, Latency(1.0, 1.0, 1.0, 9), speed)


def test_weights_alone_are_never_called_faster() -> None:
    """Even where noise says so: their arithmetic is that of fp32."""
    rows = (row("fp32", 1000, 1.0), row("int8", 270, 1.3), row("int4", 150, 0.4), row("a8w8", 280, 1.9))
    found = Measurement(rows, {}).sentence
    assert found == (
        "Against fp32, int8 is 3.7 times smaller but not faster (1.00x by default, at best 1x with "
        "session.disable_quant_qdq=1); int4 is 6.7 times smaller but not faster (0.40x by default, at best 1x with "
        "session.disable_quant_qdq=1); a8w8 is 3.6 times smaller and 1.90 times faster."
    )
    slow = Measurement((row("fp32", 1000, 1.0), row("a8w8", 1001, 0.8)), {}).sentence
    assert slow == "Against fp32, a8w8 is not smaller and not faster (0.80x)."
    assert "nothing beside" in Measurement((row("fp32", 1000, 1.0),), {}).sentence
    assert "no fp32 file" in Measurement((row("int8", 1000, None),), {}).sentence


def test_onnx_files(tmp_path: Path) -> None:
    """One of weights alone stands beside the numbers it holds; several beside each other."""
    model, x = quantized(net(), 4), torch.randn(1, 1, 8, 8)
    paths = {form: export_onnx(model, tmp_path / f"{form}.onnx", x, form) for form in ("fp32", "int8", "int4")}
    alone = measure(paths["int4"], memory=False, data=batches(), **QUICK)
    assert [r.name for r in alone.rows] == ["fp32", "int4", "int4, folded"]
    assert len({r.accuracy for r in alone.rows}) == 1
    assert alone["fp32"].bytes > 2 * alone["int4"].bytes
    found = measure(paths, memory=False, **QUICK)
    assert [r.name for r in found.rows] == FORMS[:-1]
    plain = measure(paths["fp32"], memory=False, **QUICK)
    assert [r.name for r in plain.rows] == ["fp32"]
    assert form_of(paths["int8"]) == "int8"


def test_what_can_not_be_measured(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no protobuf at all")
    x = torch.randn(1, 1, 8, 8)
    wrong_calls: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (tmp_path / "none.onnx", {}, errors.DataError, "not there"),
        (tmp_path / "net.onnx", {}, errors.DataError, "no ONNX file"),
        (net(), {}, errors.InputError, "inputs are not known"),
        (net(), {"example_inputs": x, "threads": 0}, errors.InputError, "threads"),
        (net(), {"example_inputs": x, "data": [torch.randn(3, 1, 8, 8)]}, errors.InputError, "labels"),
        (net(), {"example_inputs": x, "data": [(torch.randn(3, 2, 8, 8), torch.zeros(3).long())]}, errors.InputError,
         "does not run"),
    ]  # fmt: skip
    for what, options, kind, word in wrong_calls:
        with pytest.raises(kind, match=word):
            measure(what, **{"rounds": 1, "memory": False, "least_ms": 0.1, **options})


def test_forms_that_are_left_out_are_named() -> None:
    x = torch.randn(1, 1, 8, 8)
    found = measure(quantized(net(), 8), example_inputs=x, original=net(1), memory=False, **QUICK)
    assert [r.name for r in found.rows] == FORMS[:3]
    assert "int4 left out: no weight of this network fits 4 bits" in found.notes[0]
    assert found.notes[1] == "a8w8 left out: it needs calibration data."
    assert found.notes[0] in str(found)
    found = measure(mlp(), example_inputs=torch.randn(1, 5), memory=False, **QUICK)
    assert "not quantized" in found.notes[0]


# ---------------------------------------------------------------------- the commands

SOURCE = """
import torch
from test_helpers_of_measure import net

def samples(count=80, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 4
"""


here = in_process("compress", main)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the user's module and a quantized file."""
    folder = tmp_path_factory.mktemp("home")
    helper = type(sys)("test_helpers_of_measure")
    helper.net = net  # type: ignore[attr-defined]
    (folder / "measurednets.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setitem(sys.modules, "test_helpers_of_measure", helper)
        compress.save(quantized(net(), 4), folder / "net.safetensors")
        yield folder
    sys.modules.pop("measurednets", None)


MODEL = ("--model", "measurednets:net")
DATA = ("--data", "measurednets:samples")


@pytest.mark.parametrize("form", ["int4", "a8w8"])
def test_export(form: str, here: Callable[..., Done], home: Path, tmp_path: Path) -> None:
    place = tmp_path / "new" / "net.onnx"
    extra = (*DATA, "--force") if form == "a8w8" else ("--input-shape", "1,8,8")
    done = here("export", home / "net.safetensors", *MODEL, "--form", form, *extra, "-o", place, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["form"] == form == props(place)["form"]
    assert told["bytes"] == place.stat().st_size
    assert told["session_option"]
    expected = indices(compress.load(home / "net.safetensors", net))
    assert (read(place)["3.weight"] == expected["3.weight"]).all()


def test_export_refusals(here: Callable[..., Done], home: Path, tmp_path: Path) -> None:
    file, place = home / "net.safetensors", tmp_path / "net.onnx"
    wrong(here("export", file, *MODEL, "--form", "a8w8", "--input-shape", "1,8,8", "-o", place), "--data")
    wrong(here("export", file, *MODEL, "--form", "fp8", "--input-shape", "1,8,8", "-o", place), "unknown form")
    wrong(here("export", tmp_path / "none", *MODEL, "--input-shape", "1,8,8", "-o", place), "not there")
    assert not place.exists()


def test_measure(here: Callable[..., Done], home: Path, tmp_path: Path) -> None:
    place = tmp_path / "measured.json"
    test = ("--test-data", "measurednets:samples")
    settings = ("--rounds", "2", "--threads", "1", "--force", "-o", place)
    done = here("measure", home / "net.safetensors", *MODEL, *DATA, *test, *settings)
    assert done.returncode == 0, done.stderr
    assert "not faster" in done.stdout
    assert "1 thread," in done.stdout
    told = json.loads(place.read_text())
    assert [r["name"] for r in told["rows"]] == ["net.safetensors", *FORMS]
    assert told["rows"][0]["bytes"] == (home / "net.safetensors").stat().st_size
    assert told["settings"]["samples"] == 80


def test_measure_onnx_files(here: Callable[..., Done], home: Path, tmp_path: Path) -> None:
    model, x = quantized(net(), 4), torch.randn(1, 1, 8, 8)
    paths = [export_onnx(model, tmp_path / f"{form}.onnx", x, form) for form in ("fp32", "int4")]
    done = here("measure", *paths, "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert [r["name"] for r in json.loads(done.stdout)["rows"]] == ["fp32", "int4", "int4, folded"]
    wrong(here("measure", *paths, *MODEL), "measured as it is")
    wrong(here("measure", paths[0], home / "net.safetensors"), "measured together")
    wrong(here("measure", home / "net.safetensors"), "--model")


def test_help_imports_nothing_heavy() -> None:
    for command in ("measure", "export"):
        code = (
            f"import sys\nsys.argv = ['compress', '{command}', '--help']\nimport compress.cli\n"
            "try:\n    compress.cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
            "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime'} & set(sys.modules)\nassert not heavy, heavy\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
