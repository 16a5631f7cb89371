"""int8 activations: our integers in onnxruntime's static quantization, fused, and compared on rows held out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integers import X, indices, kinds, level, props, quantized, read, session
from networks import BY_NAME, Expression, conv, hard, mlp
from torch import Tensor, nn

from compress.exporting import export_onnx
from compress.quantization_plan import plan_of
from experiments import models
from experiments.data import cifar10, normalise
from lrp import errors

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")


def rows(*shape: int, count: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def small() -> nn.Module:
    """Convolutions with batch norms of negative and zero factors, and a linear layer."""
    net = hard(nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ))  # fmt: skip
    with torch.no_grad():
        net[1].weight[0], net[1].weight[1] = 0.0, -net[1].weight[1].abs()
    return net


def layers(path: Path) -> dict[str, dict[str, Any]]:
    """What every layer with integers reads, by the name of its weight."""
    graph, held = onnx.load(path).graph, read(path)
    makers = {name: node for node in graph.node for name in node.output}
    out = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        sources = [makers.get(name) for name in node.input]
        if any(s is None or s.op_type != "DequantizeLinear" for s in sources):
            continue
        parts = [[held[name] for name in s.input if name in held] for s in sources]  # type: ignore[union-attr]
        out[sources[1].input[0]] = {"x": parts[0], "w": parts[1], "b": parts[2] if len(parts) > 2 else None}  # type: ignore[union-attr]
    return out


@pytest.mark.parametrize("axis", [None, 0])
def test_the_integers_are_ours(axis: int | None, tmp_path: Path) -> None:
    """Weights, scales and biases: the tool's own would lie up to half a step off."""
    net = quantized(small(), 4, axis=axis)
    path = export_onnx(net, tmp_path / "net.onnx", X, "a8w8", rows(3, 8, 8))
    plan, k = plan_of(net), indices(net)
    assert plan is not None
    found = layers(path)
    assert set(found) == set(k)
    norms = {"0.weight": net[1], "3.weight": net[4], "8.weight": None}  # type: ignore[index]
    for name, norm in norms.items():
        w, scale, zero = found[name]["w"]
        step = plan.codebooks[name].step.double().expand(len(w)).numpy()
        factor = np.ones(len(w))
        bias = (net[8] if norm is None else net[0] if name == "0.weight" else net[3]).bias  # type: ignore[index]
        b = np.zeros(len(w)) if bias is None else bias.detach().double().numpy()
        if norm is not None:
            gamma, beta = (t.detach().double().numpy() for t in (norm.weight, norm.bias))
            factor = gamma / np.sqrt(norm.running_var.double().numpy() + norm.eps)
            b = beta + (b - norm.running_mean.double().numpy()) * factor
        live = factor != 0
        np.testing.assert_array_equal(w[live], k[name][live])
        assert not w[~live].any()
        np.testing.assert_allclose(scale[live], (step * factor)[live], rtol=1e-6)
        assert not zero.any()
        whole, both = found[name]["b"][:2]
        assert whole.dtype == np.int32
        np.testing.assert_allclose(both, found[name]["x"][0] * scale, rtol=1e-6)
        assert np.abs(whole * both.astype(np.float64) - b).max() <= 0.5 * np.abs(both).max() + 1e-6 * np.abs(b).max()
    told = props(path)
    zeroed = int(np.count_nonzero(k["0.weight"][0]))
    assert told["moved"] == f'{{"0.weight": {zeroed}}}'  # of the channel whose factor is 0
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_layers_are_fused_and_the_file_says_so(tmp_path: Path) -> None:
    net = quantized(small(), 4)
    path = export_onnx(net, tmp_path / "net.onnx", X, "a8w8", rows(3, 8, 8, count=400))
    told = props(path)
    assert told["fused"] == "2 QLinearConv, 1 QGemm; 0 layers in float32"
    assert told["agreement"].startswith("top-1 ")
    assert told["agreement"].endswith(" of 200 held-out rows")
    assert 0.95 <= float(told["agreement"].split()[1]) <= 1
    assert float(told["parity"].split()[0]) < 0.05
    assert told["calibration"].startswith("200 rows, 200 more held out; onnxruntime quantize_static, QDQ, QUInt8")
    assert told["session_option"] == "session.disable_quant_qdq=0"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2
    assert "Conv" not in kinds
    assert [o.version for o in onnx.load(path).opset_import if not o.domain] == [21]


def test_the_outputs_are_near(tmp_path: Path) -> None:
    """Also with negative scales, which the kernels take."""
    net = quantized(small(), 8)
    path = export_onnx(net, tmp_path / "net.onnx", X, "a8w8", rows(3, 8, 8, count=200))
    x = rows(3, 8, 8, count=50, seed=1)
    found = session(path).run(None, {"input": x.numpy()})[0]
    expected = net(x).detach().numpy()
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_square_matrices_of_tokens(tmp_path: Path) -> None:
    """Behind more than two axes a MatMul reads the weight turned, which its shape does not show."""
    net = hard(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Flatten(), nn.Linear(64, 5)))
    quantized(net, 8)
    path = export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 4, 16), "a8w8", rows(4, 16, count=200), force=True)
    held, k = read(path), indices(net)
    np.testing.assert_array_equal(held["0.weight"], k["0.weight"].T)
    assert not np.array_equal(held["0.weight"], k["0.weight"])
    x = rows(4, 16, count=50, seed=1)
    with torch.no_grad():
        expected = net(x).numpy()
    found = session(path).run(None, {"input": x.numpy()})[0]
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(("low", "high"), [(-127, 128), (0, 255), (-255, 0), (-128, 127)])
def test_ranges_beyond_the_signed_type(low: int, high: int, tmp_path: Path) -> None:
    net = hard(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)))
    quantized(net, books=lambda name, w: level(w, low, high))
    x = torch.randn(2, 3, 8, 8)
    path = export_onnx(net, tmp_path / "net.onnx", x, "a8w8", rows(3, 8, 8, count=200), force=True)
    for name, k in indices(net).items():
        w, _, zero = layers(path)[name]["w"]
        assert w.dtype == np.int8
        assert len(set(zero.tolist())) == 1
        np.testing.assert_array_equal(w.astype(np.int64) - zero[0], k)
    assert props(path)["fused"] == "2 QLinearConv, 1 QGemm; 0 layers in float32"
    with torch.no_grad():
        expected = net(x).numpy()
    found = session(path).run(None, {"input": x.numpy()})[0]
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_every_kind_of_layer(tmp_path: Path) -> None:
    """Transposed convolutions have no integer kernel: their integers are read as weights alone are."""
    net = quantized(kinds(), 4)
    path = export_onnx(net, tmp_path / "net.onnx", X, "a8w8", rows(3, 8, 8, count=300), force=True)
    held, k = read(path), indices(net)
    assert set(k) <= set(held)
    for name in ("up.weight", "up_grouped.weight", "grouped.weight", "depthwise.weight", "bare.weight"):
        np.testing.assert_array_equal(held[name], k[name])
    assert props(path)["fused"].endswith("2 layers in float32")


@pytest.mark.parametrize("name", ["shared parameter", "heads", "group norm", "two inputs"])
def test_networks(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    net = quantized(case.model(), 4)
    shapes = [s[1:] for s in case.shapes]
    batches: list[Any] = [tuple(rows(*s, count=16, seed=i + 9 * j) for j, s in enumerate(shapes)) for i in range(10)]
    data = [(b if len(b) > 1 else b[0], torch.zeros(16, dtype=torch.long)) for b in batches]
    path = export_onnx(net, tmp_path / "net.onnx", case.inputs(), "a8w8", data, force=True)
    held, k = read(path), indices(net)
    for tensor, expected in k.items():
        if tensor in held:  # a MatMul reads it transposed
            assert any(np.array_equal(found, expected) for found in (held[tensor], held[tensor].T))


def test_weights_without_a_codebook_are_rounded_and_named(tmp_path: Path) -> None:
    net = quantized(small(), 4, skip=("0.weight",))
    path = export_onnx(net, tmp_path / "net.onnx", X, "a8w8", rows(3, 8, 8))
    assert props(path)["rounded"] == '["0.weight"]'
    assert props(path)["fused"] == "2 QLinearConv, 1 QGemm; 0 layers in float32"
    assert props(path)["weights"] == "2 in INT8"


def test_biases_that_32_bits_can_not_hold(tmp_path: Path) -> None:
    """Of channels whose batch norm all but removes them: a coarser step, stated."""
    net = small()
    with torch.no_grad():
        net[1].weight[2] = 1e-9  # type: ignore[index]
        net[1].bias[2] = 3.0  # type: ignore[index]
    quantized(net, 4)
    path = export_onnx(net, tmp_path / "net.onnx", X, "a8w8", rows(3, 8, 8, count=200))
    x = rows(3, 8, 8, count=20, seed=2)
    expected = net(x).detach().numpy()
    found = session(path).run(None, {"input": x.numpy()})[0]
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert "0.weight" in props(path)["moved"]


def misleading() -> Tensor:
    """Every second row, of which the ranges are taken, is a hundred times smaller."""
    x = rows(5, count=200)
    x[0::2] /= 100
    return x


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    net = quantized(mlp(), 4)
    (tmp_path / "net.onnx").write_text("before")
    with pytest.raises(errors.UnverifiedError, match="int8 activations change") as caught:
        export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 5), "a8w8", misleading())
    assert "of 100" in caught.value.got
    assert "95%" in caught.value.expected
    assert (tmp_path / "net.onnx").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1
    path = export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 5), "a8w8", misleading(), force=True)
    assert float(props(path)["agreement"].split()[1]) < 0.95


def test_outputs_without_classes(tmp_path: Path) -> None:
    net = quantized(hard(nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 1))), 4)
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(errors.InputError, match="top-1 agreement can not be measured"):
        export_onnx(net, tmp_path / "net.onnx", x, "a8w8", rows(3, 8, 8))
    path = export_onnx(net, tmp_path / "net.onnx", x, "a8w8", rows(3, 8, 8), force=True)
    assert props(path)["agreement"] == "not measured: no classes"


def test_networks_without_integer_kernels_are_refused(tmp_path: Path) -> None:
    net = quantized(mlp(), 4, axis=1)  # steps along the inputs
    with pytest.raises(errors.UnverifiedError, match="leaves layers of this file in float32"):
        export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 5), "a8w8", rows(5))
    assert not list(tmp_path.iterdir())


def test_calibration_data(tmp_path: Path) -> None:
    net = quantized(small(), 4)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (None, errors.InputError, "needs calibration data"),
        ([], errors.InputError, "no sample"),
        (rows(3, 8, 8, count=1), errors.InputError, "too few"),
        (rows(2, 8, 8), errors.ExportError, "static quantization does not take"),
        (torch.utils.data.TensorDataset(rows(3, 8, 8)), errors.InputError, "single samples"),
    ]
    for data, kind, word in wrong:
        with pytest.raises(kind, match=word):
            export_onnx(net, tmp_path / "net.onnx", X, "a8w8", data)
    with pytest.raises(errors.InputError, match="opset"):
        export_onnx(net, tmp_path / "net.onnx", X, "a8w8", rows(3, 8, 8), opset=20)
    assert not list(tmp_path.iterdir())


def test_batches_of_one_size(tmp_path: Path) -> None:
    """Rows are put together anew for files that take no other."""
    net = quantized(small(), 4)
    loader = [rows(3, 8, 8, count=7, seed=i) for i in range(9)]
    path = export_onnx(net, tmp_path / "net.onnx", X, "a8w8", loader, dynamic_batch=False)
    assert [d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim] == [2, 3, 8, 8]
    assert props(path)["agreement"].endswith("of 32 held-out rows")


def test_nothing_is_left_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """No messages, no files, and the user's logging as it was."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level_before = root.handlers[:], root.level
    net = quantized(small(), 4)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    export_onnx(net, tmp_path / "net.onnx", X, "a8w8", rows(3, 8, 8))
    assert root.handlers == handlers
    assert root.level == level_before
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_unchecked(tmp_path: Path) -> None:
    net = quantized(Expression(lambda m, x: m.fc(x), fc=nn.Linear(4, 3)), 4)
    path = export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 4), "a8w8", rows(4), check=False)
    assert props(path)["parity"] == "not checked"
    assert "agreement" not in props(path)


@pytest.mark.data
@pytest.mark.slow
def test_resnet_20(data: Path, tmp_path: Path) -> None:
    """The published weights, on pictures of CIFAR-10."""
    pictures, _ = cifar10(data, "test", 1)
    x = normalise(pictures[:400], models.IMAGENET_MEAN, models.IMAGENET_STD)
    net = quantized(models.resnet20(data).model, 8, axis=0)
    told = props(export_onnx(net, tmp_path / "net.onnx", x[:1], "a8w8", list(x.split(50))))
    assert told["fused"] == "19 QLinearConv, 1 QGemm; 0 layers in float32"
    assert told["batch_norms_folded"] == "19"
    assert float(told["agreement"].split()[1]) >= 0.97
