"""Exported files compute what the networks do; what can't be shown is not written."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import BY_NAME, NETWORKS, Expression, conv, mlp, plain, structure_of
from torch import Tensor, nn
from torch.nn import functional as F

from compress import _parity
from compress.costs import CostTable
from compress.exporting import export_onnx, export_program
from compress.plan import PruningPlan
from lrp import errors

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")

QUICK = ("depthwise",)


def run(path: Path, *inputs: Any) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    found: list[np.ndarray[Any, Any]] = session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))
    return found


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for v in values for t in flat(v)]


def pruned(name: str) -> tuple[nn.Module, PruningPlan]:
    """Half of the units of every group go."""
    case = BY_NAME[name]
    model, structure = case.model(), structure_of(name)
    removed = {g.name: tuple(j for u in g.units[: len(g.units) // 2] for j in u) for g in structure.prunable}
    plan = PruningPlan(structure, CostTable.of(model, case.inputs(), structure), removed)
    return plan.apply(model), plan


LENGTHS = ("channels mixed", "unflatten", "unflatten to fixed sizes")  # call len(x), a number to the exporter


@pytest.mark.parametrize(
    "name", [c.name if c.name in QUICK else pytest.param(c.name, marks=pytest.mark.slow) for c in NETWORKS]
)
def test_onnx_is_the_network(name: str, tmp_path: Path) -> None:
    """On batches of any size, against the network in float64; from an example of one sample."""
    case = BY_NAME[name]
    for model in (case.model(), pruned(name)[0]) if case.free else (case.model(),):
        example = tuple(x[:1] for x in case.inputs())
        if name in LENGTHS:
            with pytest.raises(errors.ExportError, match=r"len\(x\)"):
                export_onnx(model, tmp_path / "net.onnx", example)
        path = export_onnx(model, tmp_path / "net.onnx", example, dynamic_batch=name not in LENGTHS)
        assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
        exact = copy.deepcopy(model).double()
        for size in (1,) if name in LENGTHS else (1, 2, 7):
            inputs = tuple(torch.randn(size, *s[1:]) for s in case.shapes)
            with torch.no_grad():
                expected = flat(exact(*(x.double() for x in inputs)))
            found = run(path, *inputs)
            assert [a.shape for a in found] == [tuple(t.shape) for t in expected]
            for a, t in zip(found, expected, strict=True):
                assert np.abs(a - t.numpy()).max() <= 1e-5 * float(t.abs().max() + 1e-9)


def test_the_file_tells_what_it_is(tmp_path: Path) -> None:
    model, plan = pruned("residual")
    path = export_onnx(model, tmp_path / "net.onnx", BY_NAME["residual"].inputs())
    held = onnx.load(path)
    told = {p.key: p.value for p in held.metadata_props}
    assert told["compress.form"] == "fp32"
    assert told["compress.version"] == "0.1.0"
    assert f"onnxruntime {onnxruntime.__version__}" in told["compress.parity"]
    assert float(told["compress.parity"].split()[0]) < 1e-5
    numbers = json.loads(told["compress.plan"])
    assert numbers["macs"] == [plan.before.macs, plan.after.macs]
    assert numbers["macs"][1] < 0.6 * numbers["macs"][0]
    assert [o.version for o in held.opset_import if not o.domain]
    assert held.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    raw = path.read_bytes()
    for trace in (b".py", b"stack_trace", b"torch.nn", b"forward"):
        assert trace not in raw  # nothing of the machine it was made on
    assert len(raw) - sum(t.ByteSize() for t in held.graph.initializer) < 300 * len(held.graph.node)


def test_names(tmp_path: Path) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor, scale: float, mask: Tensor) -> dict[str, Any]:
            return {"a": x * scale * mask, "b": (x.sum(1), x.argmax(1))}

    path = export_onnx(Several(), tmp_path / "net.onnx", (torch.randn(2, 4), 3.0, torch.rand(2, 4)))
    held = onnx.load(path)
    assert [i.name for i in held.graph.input] == ["x", "mask"]
    assert [o.name for o in held.graph.output] == ["output_0", "output_1", "output_2"]
    x, m = torch.randn(5, 4), torch.rand(5, 4)
    first, second, third = run(path, x, m)
    np.testing.assert_allclose(first, x * 3 * m, rtol=1e-6)
    np.testing.assert_allclose(second, x.sum(1), rtol=1e-5)
    assert third.tolist() == x.argmax(1).tolist()
    path = export_onnx(BY_NAME["two inputs"].model(), tmp_path / "net.onnx", BY_NAME["two inputs"].inputs())
    assert [i.name for i in onnx.load(path).graph.input] == ["input_0", "input_1"]


def test_integers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(10, 6), nn.Flatten(), nn.Linear(30, 2)).eval()
    tokens = torch.randint(10, (1, 5))
    path = export_onnx(net, tmp_path / "net.onnx", tokens)
    more = torch.randint(10, (4, 5))
    np.testing.assert_allclose(run(path, more)[0], net(more).detach(), rtol=1e-5, atol=1e-6)
    export_program(net, tmp_path / "net.pt2", tokens)


SHORT = [pytest.param(t, marks=pytest.mark.slow) for t in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("dtype", [torch.float64, *SHORT])
def test_any_type_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    net = mlp().to(dtype)
    path = export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 5, dtype=dtype))
    x = torch.randn(3, 5)
    found = run(path, x)[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, copy.deepcopy(net).float()(x).detach(), rtol=1e-4, atol=1e-6)


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    net = nn.Sequential(*plain(), nn.Dropout(0.5)).train()
    net[0].requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    kept, values = {n: id(t) for n, t in net.state_dict(keep_vars=True).items()}, copy.deepcopy(net.state_dict())
    flags, held = [p.requires_grad for p in net.parameters()], x.detach().clone()
    export_onnx(net, tmp_path / "net.onnx", x)
    export_program(net, tmp_path / "net.pt2", x)
    assert {n: id(t) for n, t in net.state_dict(keep_vars=True).items()} == kept
    assert all(torch.equal(t, values[n]) for n, t in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(m.training for m in net.modules())
    assert torch.equal(x, held)
    assert x.grad is None


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)[:, :3]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Rows(nn.Module):
    """Wrong on other batches only: the exporter keeps the number of rows that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None:
            self.rows = 1
        self.rows += 1
        return x * self.rows


def noisy() -> nn.Module:
    return Expression(lambda m, x: F.dropout(m.fc(x), 0.5, True), fc=nn.Linear(4, 2))


def test_fixed_batches(tmp_path: Path) -> None:
    for export in (export_onnx, export_program):
        with pytest.raises(errors.ExportError, match="fixes the batch size") as caught:
            export(FixedBatch(), tmp_path / "net", torch.randn(2, 4))
        assert "dynamic_batch=False" in caught.value.fix
    assert not list(tmp_path.iterdir())
    path = export_onnx(FixedBatch(), tmp_path / "net", torch.randn(2, 4), dynamic_batch=False)
    assert [d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim] == [2, 4]
    x = torch.randn(2, 4)
    np.testing.assert_array_equal(run(path, x)[0], x[:, :3])
    one = export_program(mlp(), tmp_path / "one", torch.randn(1, 5), dynamic_batch=False)
    assert torch.export.load(one).module()(torch.randn(1, 5)).shape == (1, 3)


@pytest.mark.parametrize("export", [export_onnx, export_program])
@pytest.mark.parametrize("build", [noisy, pytest.param(Rows, marks=pytest.mark.slow)])
def test_files_that_compute_something_else(
    export: Callable[..., Path], build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    (tmp_path / "net").write_text("before")
    with pytest.raises(errors.UnverifiedError, match="something else") as caught:
        export(build(), tmp_path / "net", torch.randn(2, 4))
    assert "apart, largest" in caught.value.got
    assert (tmp_path / "net").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1
    export(build(), tmp_path / "net", torch.randn(2, 4), check=False)
    if export is export_onnx:
        told = {p.key: p.value for p in onnx.load(tmp_path / "net").metadata_props}
        assert told["compress.parity"] == "not checked"


def test_the_comparison_sees_every_kind_of_difference() -> None:
    """Against runners that are wrong on purpose, in one place each."""
    net = _parity.Twin.of(nn.Linear(4, 3), torch.randn(2, 4), True, torch.float32)

    def right(inputs: tuple[Any, ...]) -> list[Tensor]:
        return net.run("x", inputs)

    def other_batches(inputs: tuple[Any, ...]) -> list[Tensor]:
        return [t + (len(t) != 2) for t in right(inputs)]

    def other_values(inputs: tuple[Any, ...]) -> list[Tensor]:
        known = torch.isin(inputs[0], net.inputs[0]).all()
        return [t if known else 1.001 * t for t in right(inputs)]

    def crashing(inputs: tuple[Any, ...]) -> list[Tensor]:
        if len(inputs[0]) == 1:
            raise RuntimeError("no single samples")
        return right(inputs)

    assert net.compare(right, "here", 1e-6).error == 0
    wrong: dict[str, Any] = {
        "batch of 1": other_batches,
        "noise": other_values,
        "no single samples": crashing,
        "the example": lambda i: [t * (1 + 1e-4) for t in right(i)],
        r"1 output\w*. Got: 2": lambda i: right(i) * 2,
        r"shape \(2, 1\)": lambda i: [t[:, :1] for t in right(i)],
        "float64": lambda i: [t.double() for t in right(i)],
        "NaN": lambda i: [t.index_fill(1, torch.tensor(0), float("nan")) for t in right(i)],
    }
    for word, runner in wrong.items():
        with pytest.raises(errors.UnverifiedError, match=word):
            net.compare(runner, "here", 1e-5)


def test_differences_are_shares_of_the_largest() -> None:
    net = _parity.Twin.of(nn.Identity(), torch.full((2, 2), 100.0), True, torch.float32)
    found = net.compare(lambda i: [t + 1e-3 for t in net.run("x", i)], "here", 1e-4)
    assert 0.9e-5 < found.error < 1.1e-5
    infinite = Expression(lambda m, x: torch.stack([x / 0, x * float("nan"), x], 1))
    twin = _parity.Twin.of(infinite, torch.randn(2, 2), True, torch.float32)
    assert twin.compare(lambda i: twin.run("x", i), "here", 0.0).error == 0
    count = Expression(lambda m, x: x.argmax(1))
    twin = _parity.Twin.of(count, torch.randn(2, 3), True, torch.float32)
    with pytest.raises(errors.UnverifiedError, match="of 2 entries differ"):
        twin.compare(lambda i: [t + 1 for t in twin.run("x", i)], "here", 1.0)


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_networks_that_can_not_be_exported(export: Callable[..., Path], tmp_path: Path) -> None:
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (Branch(), torch.randn(2, 4), errors.ExportError, "captured"),
        (torch.jit.trace(nn.Linear(4, 2), torch.randn(1, 4)), torch.randn(2, 4), errors.ExportError, "scripted"),
        (mlp(), torch.randn(2, 6), errors.InputError, "does not run"),
        (mlp(), torch.zeros(0, 5), errors.InputError, "no samples"),
        (mlp(), torch.tensor(1.0), errors.InputError, "no samples"),
        (mlp(), "picture", errors.InputError, "no tensor"),
        (Expression(lambda m, x: 3), torch.randn(2, 5), errors.OutputError, "no tensor"),
    ]
    for model, example, kind, word in wrong:
        with pytest.raises(kind, match=word):
            export(model, tmp_path / "net", example)
    assert not list(tmp_path.iterdir())


def test_forms(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="unknown form"):
        export_onnx(mlp(), tmp_path / "net", torch.randn(1, 5), "fp8")
    assert not list(tmp_path.iterdir())


def test_versions_of_the_operators(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = export_onnx(mlp(), tmp_path / "net", torch.randn(1, 5), opset=21)
    assert [o.version for o in onnx.load(path).opset_import if not o.domain] == [21]
    with pytest.raises(errors.ExportError, match="opset 17"):  # the exporter would write 18, silently
        export_onnx(plain(), tmp_path / "net", torch.randn(1, 3, 8, 8), opset=17)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_files_over_two_gigabytes(tmp_path: Path) -> None:
    net = Expression(lambda m, x: x * m.huge[0], fc=nn.Linear(1, 1))
    net.register_buffer("huge", torch.ones(1).expand(2**29 + 1))  # takes no memory
    with pytest.raises(errors.ExportError, match="too large"):
        export_onnx(net, tmp_path / "net", torch.randn(2, 4))


def test_places(tmp_path: Path) -> None:
    for export in (export_onnx, export_program):
        with pytest.raises(errors.DataError, match="no folder"):
            export(mlp(), tmp_path / "no" / "net", torch.randn(1, 5))
        (tmp_path / "folder").mkdir(exist_ok=True)  # refused before the work
        with pytest.raises(errors.DataError, match="can not be written"):
            export(mlp(), tmp_path / "folder", torch.randn(1, 5))
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for model, example in (
        (mlp(), torch.randn(1, 5)),
        (Branch(), torch.randn(2, 4)),
        (FixedBatch(), torch.randn(2, 4)),
    ):
        for export in (export_onnx, export_program):
            try:
                export(model, tmp_path / "net", example)
            except errors.ExportError:
                assert not isinstance(model, nn.Sequential)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("name", ["residual", "embed"])
def test_programs(name: str, tmp_path: Path) -> None:
    if name == "residual":
        model = pruned(name)[0].double()
        example: Any = tuple(x[:1] for x in BY_NAME[name].inputs(torch.float64))
        more = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    else:
        model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten()).eval()
        example, more = torch.randn(1, 5, 6), torch.randn(5, 5, 6)
    path = export_program(model, tmp_path / "net.pt2", example)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]
    held = {"compress.version": "", "compress.plan": ""} if name == "residual" else {"compress.version": ""}
    found = torch.export.load(path, extra_files=held).module()(more)
    assert found.dtype == more.dtype
    torch.testing.assert_close(found, model(more))
    assert held["compress.version"]
    if name == "residual":
        assert json.loads(held["compress.plan"])["params"][1] == sum(p.numel() for p in model.parameters())


def test_programs_hold_no_example(tmp_path: Path) -> None:
    """It may be a picture of someone."""
    example = torch.full((2, 5), 1234.5)
    path = export_program(mlp(), tmp_path / "net.pt2", example)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert len(parts) > 5
    assert not any(example.numpy().tobytes()[:8] in raw for raw in parts.values())


def test_packages_that_are_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxscript'] = None\n"
        "import torch\nfrom lrp.errors import MissingDependencyError\n"
        "from compress.exporting import export_onnx, export_program\n"
        f"export_program(torch.nn.Linear(2, 2), {str(tmp_path / 'net.pt2')!r}, torch.randn(1, 2))\n"
        f"try: export_onnx(torch.nn.Linear(2, 2), {str(tmp_path / 'net.onnx')!r}, torch.randn(1, 2))\n"
        "except MissingDependencyError as error: print(error.fix)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "pip install 'neuralize[onnx]'\n"


def test_a_network_of_convolutions_is_folded(tmp_path: Path) -> None:
    """Batch norms cost nothing in the file."""
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()).eval()
    held = onnx.load(export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 3, 4, 4)))
    assert [n.op_type for n in held.graph.node] == ["Conv", "Relu"]
