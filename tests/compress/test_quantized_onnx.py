"""Files of integer weights: the integers of the network bit for bit, its function to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integers import X, indices, kinds, level, props, quantized, read, session
from networks import BY_NAME, NETWORKS, Expression, conv, hard, mlp
from torch import Tensor, nn

from compress.codebook import codebook_of
from compress.exporting import export_onnx
from compress.meters import FOLDING
from compress.quantization_plan import plan_of
from lrp import errors

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")

QUICK = ("depthwise",)
FIXED = ("channels mixed", "unflatten", "unflatten to fixed sizes")  # call len(x), a number to the exporter


def check_integers(path: Path, model: nn.Module) -> None:
    """Every quantized weight of the file is that of the network, zero points taken off."""
    held, graph = read(path), onnx.load(path).graph
    expected = indices(model)
    seen = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in expected:
            continue
        k = held[node.input[0]].astype(np.int64)
        if len(node.input) > 2:
            zero = held[node.input[2]].astype(np.int64)
            assert (zero == zero.flat[0]).all()
            k = k - zero.flat[0]
        seen.add(node.input[0])
        np.testing.assert_array_equal(k, expected[node.input[0]], err_msg=node.input[0])
    assert seen
    assert seen == set(expected) & set(held)


def check_outputs(path: Path, model: nn.Module, *inputs: Tensor, tolerance: float = 1e-5) -> None:
    """By default and folded."""
    with torch.no_grad():
        expected = model(*inputs).numpy()
    for options in ({}, {FOLDING.replace(".", "__"): "1"}):
        run = session(path, **options)
        found = run.run(None, {i.name: x.numpy() for i, x in zip(run.get_inputs(), inputs, strict=True)})[0]
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("bits", "form", "axis"),
    [(4, "int4", None), (8, "int8", 0), (4, "int4", 1)]
    + [pytest.param(b, f, a, marks=pytest.mark.slow) for b, f in ((2, "int4"), (3, "int8")) for a in (None, 0, 1)],
)
def test_every_kind_of_layer(bits: int, form: str, axis: int | None, tmp_path: Path) -> None:
    levels = "released" if axis is None else "symmetric"
    net = quantized(kinds(), bits, levels, axis)
    path = export_onnx(net, tmp_path / "net.onnx", X, form)
    check_integers(path, net)
    check_outputs(path, net, X)
    held = onnx.load(path)
    onnx.checker.check_model(held, full_check=True)
    norms = sum(n.op_type == "BatchNormalization" for n in held.graph.node)
    # in front of a layer and behind grouped transposed ones they stay, and where steps run along another axis
    assert norms == {None: 2, 0: 3, 1: 5}[axis]
    assert props(path)["batch_norms_folded"] == str(6 - norms)
    assert not held.graph.value_info


def test_the_step_becomes_a_scale_per_channel(tmp_path: Path) -> None:
    net = quantized(kinds(), 4)
    plan = plan_of(net)
    assert plan is not None
    held = read(export_onnx(net, tmp_path / "net.onnx", X, "int4"))
    norm: Any = net.norm
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    step = float(plan.codebooks["conv.weight"].step)
    np.testing.assert_allclose(held["conv.weight.scale"], (step * factor).detach(), rtol=1e-6)
    assert held["conv.weight.scale"][0] == 0
    assert held["conv.weight.scale"][1] < 0
    assert held["depthwise.weight.scale"].shape == ()  # no batch norm: the step as it is
    assert held["depthwise.weight.scale"] == np.float32(plan.codebooks["depthwise.weight"].step)
    assert held["bare.bias"].dtype == np.float32


@pytest.mark.parametrize(
    "name", [c.name if c.name in QUICK else pytest.param(c.name, marks=pytest.mark.slow) for c in NETWORKS]
)
def test_networks_of_every_kind(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    net = quantized(case.model(), 4, "released")
    path = export_onnx(net, tmp_path / "net.onnx", case.inputs(), "int4", dynamic_batch=name not in FIXED)
    check_integers(path, net)
    net = quantized(case.model(), 8, axis=0)
    path = export_onnx(net, tmp_path / "net.onnx", case.inputs(), "int8", dynamic_batch=name not in FIXED)
    check_integers(path, net)


RANGES = {
    "int4": {(-7, 7): "INT4", (-8, 7): "INT4", (-7, 8): "UINT4", (0, 15): "UINT4", (-15, 0): "UINT4", (-1, 2): "INT4",
             (-15, 15): "INT8"},
    "int8": {(-7, 8): "INT8", (-128, 127): "INT8", (-127, 128): "UINT8", (0, 255): "UINT8", (-255, 0): "UINT8"},
}  # fmt: skip


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("form", RANGES)
def test_ranges(form: str, axis: int | None, tmp_path: Path) -> None:
    """Those that no signed type holds have a zero point, per channel where the scale is."""
    ranges = dict(enumerate(RANGES[form]))

    def compute(m: Any, x: Tensor) -> Tensor:
        for k in ranges:
            x = torch.relu(getattr(m, f"norm{k}")(getattr(m, f"conv{k}")(x)))
        return x.mean((2, 3))

    parts = {f"conv{k}": conv(3, 3) for k in ranges} | {f"norm{k}": nn.BatchNorm2d(3) for k in ranges}
    net = hard(Expression(compute, **parts))
    with torch.no_grad():
        for k in ranges:  # both ends of the range are taken
            getattr(net, f"conv{k}").weight.view(-1)[:2] = torch.tensor([-1.0, 1.0])
    quantized(net, books=lambda name, w: level(w, *ranges[int(name[4])], axis))
    x = torch.randn(2, 3, 6, 6)
    path = export_onnx(net, tmp_path / "net.onnx", x, form)
    check_integers(path, net)
    check_outputs(path, net, x)
    held = {t.name: t for t in onnx.load(path).graph.initializer}
    for k, (low, _) in ranges.items():
        name = f"conv{k}.weight"
        kind = RANGES[form][ranges[k]]
        assert onnx.TensorProto.DataType.Name(held[name].data_type) == kind
        assert held[name].HasField("raw_data")
        zero = held.get(f"{name}.zero_point")
        assert (zero is not None) == (kind.startswith("U") and low != 0)
        assert zero is None or list(zero.dims) == list(held[f"{name}.scale"].dims) == [3]


def test_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    net = quantized(hard(nn.Sequential(nn.Flatten(), nn.Linear(300, 301), nn.ReLU(), nn.Linear(301, 4))), 4)
    x = torch.randn(1, 300)
    sizes = {form: export_onnx(net, tmp_path / form, x, form).stat().st_size for form in ("fp32", "int8", "int4")}
    weights = 300 * 301 + 301 * 4
    rest = 4 * 305 + 4000
    assert 4 * weights < sizes["fp32"] < 4 * weights + rest
    assert weights < sizes["int8"] < weights + rest
    assert weights / 2 < sizes["int4"] < weights / 2 + rest


def test_mixed_bits(tmp_path: Path) -> None:
    """4 bits where they are enough; where they are nowhere, an error."""
    net = hard(nn.Sequential(conv(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)))
    quantized(net, books=lambda name, w: codebook_of(w, 3 if name == "0.weight" else 5))
    x = torch.randn(1, 3, 6, 6)
    path = export_onnx(net, tmp_path / "net.onnx", x, "int4")
    assert props(path)["weights"] == "1 in INT4, 1 in INT8"
    check_integers(path, net)
    quantized(net, 5)
    with pytest.raises(errors.InputError, match="no weight of this network fits 4 bits") as caught:
        export_onnx(net, tmp_path / "five.onnx", x, "int4")
    assert "int8" in caught.value.fix
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_tensors_without_a_codebook_stay_float(tmp_path: Path) -> None:
    net = quantized(kinds(), 4, skip=("conv.weight", "tokens.weight"))
    path = export_onnx(net, tmp_path / "net.onnx", X, "int4")
    check_integers(path, net)
    check_outputs(path, net, X)
    held = read(path)
    assert held["conv.weight"].dtype == np.float32
    assert not any(name.startswith("conv.weight.") for name in held)


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    """With a scale per batch norm."""
    first, second = conv(4, 4), nn.Conv2d(4, 4, 3, padding=1)
    second.weight = first.weight

    def compute(m: Any, x: Tensor) -> Tensor:
        return m.end(torch.relu(m.b(m.second(torch.relu(m.a(m.first(x)))))).mean((2, 3)))

    parts = {"first": first, "a": nn.BatchNorm2d(4), "second": second, "b": nn.BatchNorm2d(4), "end": nn.Linear(4, 3)}
    net = quantized(hard(Expression(compute, **parts)), 4)
    x = torch.randn(2, 4, 6, 6)
    path = export_onnx(net, tmp_path / "net.onnx", x, "int4")
    check_outputs(path, net, x)
    held = onnx.load(path).graph
    readers = [n for n in held.node if n.op_type == "DequantizeLinear" and n.input[0] == "first.weight"]
    assert len(readers) == 2
    assert sum(len(t.dims) == 4 for t in held.initializer) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    net = quantized(kinds().to(dtype), 4)
    path = export_onnx(net, tmp_path / "net.onnx", X.to(dtype), "int4")
    check_integers(path, net)
    if dtype == torch.float64:
        found = session(path).run(None, {"input": X.numpy()})[0]
        expected = net(X.double()).detach().numpy()
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_linear_layers_on_sequences_keep_float_activations(tmp_path: Path) -> None:
    """onnxruntime would fuse them into a kernel that rounds activations to 8 bits."""
    net = hard(nn.Sequential(nn.Linear(128, 256, bias=False), nn.ReLU(), nn.Linear(256, 16)))
    x = torch.randn(2, 7, 128)
    for form, bits in (("int8", 8), ("int4", 4)):
        path = export_onnx(quantized(net, bits, axis=0), tmp_path / "net.onnx", x, form)
        check_outputs(path, net, x)


def test_metadata_tell_how_to_run_it(tmp_path: Path) -> None:
    path = export_onnx(quantized(kinds(), 4), tmp_path / "net.onnx", X, "int4")
    told = props(path)
    assert told["form"] == "int4"
    assert told["session_option"] == "session.disable_quant_qdq=1"
    assert "not faster" in told["advice"]
    assert told["session_option"] in told["advice"]
    assert float(told["parity"].split()[0]) < 1e-5
    raw = path.read_bytes()
    for trace in (b".py", b"stack_trace", b"torch.nn", b"forward"):
        assert trace not in raw
    unchecked = export_onnx(quantized(kinds(), 4), tmp_path / "net.onnx", X, "int4", check=False)
    assert props(unchecked)["parity"] == "not checked"


@pytest.mark.parametrize("form", ["int8", "int4", "a8w8"])
def test_a_quantized_network_is_needed(form: str, tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="needs a quantized network") as caught:
        export_onnx(mlp(), tmp_path / "net.onnx", torch.randn(1, 5), form)
    assert 'compress.quantize(model, method="rtn_per_channel", bits=8)' in caught.value.fix
    net = quantized(mlp())
    with torch.no_grad():
        next(net.parameters()).mul_(1.01)
    with pytest.raises(errors.MismatchError, match="off its codebook"):
        export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 5), form, torch.randn(20, 5))
    assert not list(tmp_path.iterdir())


def test_opsets(tmp_path: Path) -> None:
    net, x = quantized(mlp()), torch.randn(1, 5)
    with pytest.raises(errors.InputError, match="opset"):
        export_onnx(net, tmp_path / "net.onnx", x, "int4", opset=20)
    path = export_onnx(net, tmp_path / "net.onnx", x, "int8", opset=20)
    assert [o.version for o in onnx.load(path).opset_import if not o.domain] == [20]
    check_outputs(path, net, torch.randn(4, 5))


def test_the_network_stays_as_it_is(tmp_path: Path) -> None:
    net = quantized(kinds(), 4).train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    export_onnx(net, tmp_path / "net.onnx", X, "int4")
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.training


def test_a_wrong_file_is_not_written(tmp_path: Path) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return nn.functional.dropout(m.fc(x), 0.5, True)

    net = quantized(Expression(compute, fc=nn.Linear(4, 2)))
    (tmp_path / "net.onnx").write_text("before")
    with pytest.raises(errors.UnverifiedError, match="something else"):
        export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 4), "int8")
    assert (tmp_path / "net.onnx").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1
