"""Meters: what they run, what they say, and what is refused as a time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import mlp, plain
from torch import Tensor, nn

from compress.exporting import export_onnx
from compress.meters import Latency, machine, milliseconds, onnxruntime_meter, torch_latency
from lrp import errors

pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")


class Several(nn.Module):
    """A picture, a token and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(10, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor, token: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.fc(x) + self.table(token) * mask
        return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    several = torch.randn(2, 6), torch.randint(10, (2,)), torch.ones(2, 4, dtype=torch.bool)
    return {
        "open": export_onnx(plain(), folder / "open.onnx", torch.randn(1, 3, 8, 8)),
        "fixed": export_onnx(mlp(), folder / "fixed.onnx", torch.randn(2, 5), dynamic_batch=False),
        "several": export_onnx(Several(), folder / "several.onnx", several),
    }


def test_a_time_has_quartiles(files: dict[str, Path]) -> None:
    for name in ("open", "several"):
        for batch in (1, 4):
            found = onnxruntime_meter(repeats=9, batch=batch).measure(files[name])
            assert 0 < found.low <= found.median <= found.high < 1000
            assert found.runs % 9 == 0
            assert "ms (" in str(found)
    assert onnxruntime_meter(repeats=3)(files["open"]) > 0
    assert onnxruntime_meter(repeats=1).measure(files["open"]).runs >= 1


def test_samples_are_long_enough(files: dict[str, Path]) -> None:
    """A network of microseconds runs many times within one sample."""
    few = onnxruntime_meter(repeats=4, least_ms=0).measure(files["several"])
    assert few.runs == 4
    many = onnxruntime_meter(repeats=4, least_ms=50).measure(files["several"])
    assert many.runs > 4
    assert many.runs % 4 == 0


def test_times_are_milliseconds_of_one_run() -> None:
    """A network that sleeps takes at least as long, and not a thousand times as long."""

    class Sleepy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.004)
            return x

    for least in (0.0, 10.0):
        found = torch_latency(Sleepy(), torch.ones(1), repeats=3, warmup=1, least_ms=least)
        assert 4 <= found.low <= found.median < 4000
    assert found.runs >= 3


def test_batches_that_do_not_fit(files: dict[str, Path]) -> None:
    assert onnxruntime_meter(repeats=2, batch=2)(files["fixed"]) > 0
    with pytest.raises(errors.InputError, match="another batch size") as caught:
        onnxruntime_meter()(files["fixed"])
    assert "batch=2" in caught.value.fix


def test_files_that_can_not_be_run(tmp_path: Path) -> None:
    meter = onnxruntime_meter()
    with pytest.raises(FileNotFoundError):
        meter(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(errors.InputError, match="can not open"):
        meter(tmp_path / "bad.onnx")
    import onnx
    from onnx import TensorProto, helper

    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length"])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [given], [given])
    graph.output[0].name = "y"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "a.onnx")
    with pytest.raises(errors.InputError, match="can not make an input 'x'"):
        meter(tmp_path / "a.onnx")


def test_identities_tell_meters_apart() -> None:
    import onnxruntime

    meter = onnxruntime_meter()
    assert meter.name == f"onnxruntime {onnxruntime.__version__}, CPU, 1 thread, batch 1"
    assert machine() in meter.identity
    others = {onnxruntime_meter(threads=2).identity, onnxruntime_meter(batch=8).identity}
    assert len(others | {meter.identity}) == 3
    assert onnxruntime_meter().identity == meter.identity


@pytest.mark.parametrize("name", ["threads", "repeats", "batch"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_settings_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(errors.InputError, match=name):
        onnxruntime_meter(**{name: value})


@pytest.mark.parametrize(
    "value", [0, -1.0, None, "3", b"3", True, [1.0], float("nan"), float("inf"), np.float32("nan")]
)
def test_times_that_are_none(value: Any) -> None:
    def board(path: Path) -> Any:
        return value

    with pytest.raises(errors.InputError, match="'board' gave no time") as caught:
        milliseconds(board, "net.onnx")
    number = isinstance(value, (int, float, np.float32))
    assert isinstance(caught.value, errors.NonFiniteError) == (number and not np.isfinite(value))
    assert "net.onnx" in str(caught.value)


@pytest.mark.parametrize("value", [3, 0.5, np.float32(2), np.int64(7), torch.tensor(1.5)])
def test_times_of_any_numeric_type(value: Any) -> None:
    found = milliseconds(lambda path: value, "net.onnx")
    assert type(found) is float
    assert found == float(value)


def test_a_meter_that_fails_says_so_itself() -> None:
    def board(path: Path) -> float:
        raise ConnectionError("no board")

    with pytest.raises(ConnectionError, match="no board"):
        milliseconds(board, "net.onnx")


def test_torch_on_a_cpu() -> None:
    net = plain().train()
    before, statistics_before = torch.get_num_threads(), net[1].running_mean.clone()
    found = torch_latency(net, torch.randn(2, 3, 8, 8), repeats=5, threads=1)
    assert 0 < found.low <= found.median <= found.high
    assert torch.get_num_threads() == before
    assert net.training
    assert torch.equal(net[1].running_mean, statistics_before)
    with pytest.raises(errors.InputError, match="threads"):
        torch_latency(net, torch.randn(2, 3, 8, 8), threads=0)
    with pytest.raises(RuntimeError):
        torch_latency(net, torch.randn(2, 4, 8, 8))
    assert torch.get_num_threads() == before


@pytest.mark.gpu
def test_torch_on_a_gpu() -> None:
    """The time of a long kernel, not that of its launch."""
    net = nn.Linear(8192, 8192)
    x = torch.randn(8192, 8192)
    found = torch_latency(net, x, device="cuda", repeats=5)
    assert found.median > 2 * 8192**3 / 2e15 * 1e3  # no GPU does more than 2e15 operations per second
    assert next(net.parameters()).device.type == "cpu"


def test_without_onnxruntime() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from lrp.errors import MissingDependencyError\n"
        "from compress.meters import onnxruntime_meter\n"
        "assert 'torch' not in sys.modules\n"
        "meter = onnxruntime_meter()\n"
        "for ask in (lambda: meter.name, lambda: meter('net.onnx')):\n"
        "    try: ask()\n"
        "    except MissingDependencyError as error: print(error.fix[:30])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "pip install 'neuralize[onnx]',\n" * 2


def test_latencies_print() -> None:
    assert str(Latency(1.23456, 1.0, 2.0, 30)) == "1.23 ms (1 to 2, 30 runs)"
