"""The table of layers: files of one layer are that layer, and times are kept apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import BY_NAME, Expression, conv, structure_of
from torch import Tensor, nn

from compress._latency_search import LatencySearch
from compress.costs import CostTable, count
from compress.cutting import cut
from compress.latency import LatencyTable, LayerSpec, layer_specs
from compress.meters import onnxruntime_meter
from compress.target import Target
from lrp import errors

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")


class Counting:
    """A meter of its own that tells how often it was asked; times follow the size of the file."""

    def __init__(self, identity: str = "board") -> None:
        self.identity, self.asked = identity, 0

    def __call__(self, path: Path) -> float:
        self.asked += 1
        return path.stat().st_size / 1000


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 9, 7)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 7)),
    "everything": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 2), groups=2), (2, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 9, 7)),
    "same, even kernel": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 9, 7)),
    "valid": (lambda: nn.Conv2d(4, 6, 2, padding="valid"), (2, 4, 5, 7)),
    "1d": (lambda: nn.Conv1d(4, 6, 4, 3, 2), (2, 4, 17)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 2)), (2, 4, 3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, (1, 0), (1, 0), groups=2, dilation=2), (2, 4, 5, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, bias=False), (2, 4, 5)),
    "linear": (lambda: nn.Linear(5, 3), (2, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), (2, 5)),
    "linear over tokens": (lambda: nn.Linear(5, 3), (2, 7, 5)),
    "linear over tokens, no bias": (lambda: nn.Linear(5, 3, bias=False), (2, 2, 7, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_a_file_of_one_layer_computes_that_layer(name: str) -> None:
    """With the weights found in the file, torch and onnxruntime agree: the meter itself looks."""
    build, shape = LAYERS[name]
    layer = build()
    seen = []

    def meter(path: Path) -> float:
        held = {
            t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in onnx.load(path).graph.initializer
        }
        weight = held["w"].t() if isinstance(layer, nn.Linear) and len(shape) > 2 else held["w"]
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_(held["b"])
        assert set(held) == ({"w", "b"} if layer.bias is not None else {"w"})
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for batch in (1, 3):  # the batch size is open
            x = torch.randn(batch, *shape[1:])
            found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
            torch.testing.assert_close(found, layer(x).detach(), rtol=1e-4, atol=1e-5)
            seen.append(batch)
        return 2.5

    (spec,) = layer_specs(layer, torch.randn(shape)).values()
    assert LatencyTable(meter).of(spec) == 2.5
    assert seen == [1, 3]


def macs(spec: LayerSpec) -> int:
    """Multiply-adds by the text-book."""
    total = 0
    for size in spec.sizes:
        places = 1
        for k, n in enumerate(size):
            if spec.type == "conv":
                ends = spec.padding[k] + spec.padding[k + len(size)]
                n = (n + ends - spec.dilation[k] * (spec.kernel[k] - 1) - 1) // spec.stride[k] + 1
            places *= n
        kernel = 1
        for n in spec.kernel:
            kernel *= n
        total += places * kernel * spec.inputs * spec.outputs // spec.groups
    return total


NAMES = (
    "plain", "residual", "depthwise", "grouped", "flatten", "dense", "called twice", "called on two inputs",
    "two inputs", "transposed", "three dimensions", "squeeze and excite", "mlp", "layers by other names",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_specifications_explain_all_multiplications(name: str) -> None:
    """Summed over calls they are what torch's own counter finds; the batch of the example plays no part."""
    case = BY_NAME[name]
    model = case.model().train()
    specs = layer_specs(model, case.inputs())
    assert sum(macs(s) for s in specs.values()) == count(model, case.inputs()).macs
    assert specs == layer_specs(model, tuple(x[:1] for x in case.inputs()))
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["residual", "depthwise", "flatten", "grouped"])
def test_resized_specifications_are_those_of_the_cut_network(name: str) -> None:
    case = BY_NAME[name]
    model, structure = case.model(), structure_of(name)
    table = CostTable.of(model, case.inputs(), structure)
    search = LatencySearch(model, case.inputs(), Target(latency_ms=0.5), structure, table, Counting())
    removed = {g.name: tuple(j for u in g.units[::2][: len(g.units) - 1] for j in u) for g in structure.prunable}
    found = search.resized(removed)
    assert found == layer_specs(cut(model, structure, removed), case.inputs())
    assert found != search.specs


def test_windows_in_the_batch_axis() -> None:
    """Layers called on several rows per sample."""

    def compute(m: Any, x: Tensor) -> Tensor:
        y = x.reshape(-1, 5, 6)
        z = m.conv(x.reshape(-1, 1, 5, 6))
        out: Tensor = m.fc(y).sum() + z.sum()
        return out

    net = Expression(compute, fc=nn.Linear(6, 2), conv=conv(1, 2))
    specs = layer_specs(net, torch.randn(2, 3, 5, 6))
    assert specs["fc"].sizes == ((3, 5),)
    assert specs["conv"].sizes == ((5, 6),) * 3
    assert LatencyTable(lambda path: 1.0).of(specs["conv"]) == 3.0


def test_every_call_counts() -> None:
    net = Expression(lambda m, x: m.conv(x).sum() + m.conv(x[..., ::2]).sum(), conv=conv(3, 4))
    (spec,) = layer_specs(net, torch.randn(1, 3, 8, 8)).values()
    assert spec.sizes == ((8, 8), (8, 4))
    meter = Counting()
    table = LatencyTable(meter)
    assert table.of(spec) == sum(table.of(call) for call in spec.calls)
    assert meter.asked == 2


def test_attention_is_not_passed_by() -> None:
    net = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    specs = layer_specs(net, torch.randn(1, 5, 6))
    assert {"linear1", "linear2"} <= set(specs)
    assert specs["linear1"].sizes == ((5,),)


def test_widths_that_no_layer_has() -> None:
    (spec,) = layer_specs(nn.Conv2d(8, 8, 3, groups=8), torch.randn(1, 8, 5, 5)).values()
    assert spec.resized(4, 4, 4).groups == 4
    for widths in ({"inputs": 0}, {"outputs": 0}, {"inputs": 4}, {"groups": 3}):
        with pytest.raises(errors.InputError, match="no conv layer of these widths"):
            spec.resized(**widths)


# -- the cache -----------------------------------------------------------------
SPEC = LayerSpec("linear", 8, 4)


def test_a_layer_is_measured_once(tmp_path: Path) -> None:
    meter = Counting()
    table = LatencyTable(meter, tmp_path / "times.json")
    first = table.of(SPEC)
    assert table.of(SPEC) == table.predict([SPEC, SPEC]) / 2 == first
    assert (meter.asked, len(table)) == (1, 1)
    table.of(SPEC.resized(outputs=3))
    assert meter.asked == 2
    again = Counting()
    assert LatencyTable(again, tmp_path / "times.json").of(SPEC) == first
    assert again.asked == 0
    assert [p.name for p in tmp_path.iterdir()] == ["times.json"]


def test_times_of_other_meters_are_others(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    LatencyTable(Counting(), path).of(SPEC)
    other = Counting("another board")
    table = LatencyTable(other, path)
    table.of(SPEC)
    assert other.asked == 1
    named = Counting()
    LatencyTable(named, path, identity="a third one").of(SPEC)
    assert named.asked == 1
    assert set(json.loads(path.read_text())["times"]) == {"board", "another board", "a third one"}
    own = LatencyTable(onnxruntime_meter(repeats=2), path)
    assert onnxruntime.__version__ in own.identity
    assert own.of(SPEC) > 0


def test_tables_share_a_file(tmp_path: Path) -> None:
    """Neither loses what the other wrote meanwhile."""
    path = tmp_path / "times.json"
    first, second = LatencyTable(Counting(), path), LatencyTable(Counting(), path)
    specs = [SPEC.resized(outputs=n) for n in range(1, 7)]
    for k, spec in enumerate(specs):
        (first, second)[k % 2].of(spec)
    fresh = Counting()
    LatencyTable(fresh, path).predict(specs)
    assert fresh.asked == 0


def test_a_meter_that_fails_leaves_the_table(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    LatencyTable(Counting(), path).of(SPEC)
    before = path.read_bytes()

    class Failing(Counting):
        def __call__(self, path: Path) -> float:
            raise ConnectionError("no board")

    class Odd(Counting):
        def __call__(self, path: Path) -> float:
            return -1.0

    with pytest.raises(ConnectionError):
        LatencyTable(Failing(), path).of(SPEC.resized(outputs=2))
    with pytest.raises(errors.InputError, match="gave no time"):
        LatencyTable(Odd(), path).of(SPEC.resized(outputs=2))
    assert path.read_bytes() == before


def test_a_meter_without_a_name_is_kept_in_memory_only(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="identity"):
        LatencyTable(lambda path: 1.0, tmp_path / "times.json")
    assert LatencyTable(lambda path: 1.0).of(SPEC) == 1.0
    assert LatencyTable(lambda path: 1.0, tmp_path / "times.json", identity="mine").of(SPEC) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        "[" * 100_000,
        '{"format": "compress.LatencyTable", "version": 2, "times": {}}',
        '{"format": "other", "version": 1, "times": {}}',
        '{"format": "compress.LatencyTable", "version": 1, "times": []}',
        '{"format": "compress.LatencyTable", "version": 1, "times": {"board": {"a": -1}}}',
        '{"format": "compress.LatencyTable", "version": 1, "times": {"board": {"a": NaN}}}',
        '{"format": "compress.LatencyTable", "version": 1, "times": {"board": {"a": null}}}',
    ],
    ids=range(11),
)
def test_files_that_are_no_table(text: str, tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(errors.FileFormatError, match="no table of latencies"):
        LatencyTable(Counting(), tmp_path / "times.json")
    assert (tmp_path / "times.json").read_text() == text


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(errors.DataError):
        LatencyTable(Counting(), tmp_path / "no" / "times.json").of(SPEC)
    with pytest.raises(errors.FileFormatError):
        LatencyTable(Counting(), tmp_path)


@pytest.mark.slow
def test_a_search_keeps_the_times_of_layers_for_the_next(tmp_path: Path) -> None:
    import compress

    class Sizes:
        """Milliseconds by the size of the file, and how often it was asked."""

        identity = "bytes of the file"

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, path: Path) -> float:
            self.calls += 1
            return path.stat().st_size / 1e3

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    cache, plans, calls = tmp_path / "times.json", [], []
    for _ in range(2):
        meter = Sizes()
        plans.append(
            compress.plan_pruning(
                net, torch.randn(1, 16), criterion="weight", target=compress.Target(latency_ms=0.8), meter=meter,
                latency_cache=cache, round_to=8,
            )
        )  # fmt: skip
        calls.append(meter.calls)
    assert plans[0].removed == plans[1].removed
    assert plans[0].settings["latency_ms"]["after"] <= plans[0].settings["latency_ms"]["limit"]
    assert cache.is_file()
    assert calls[1] < calls[0]
