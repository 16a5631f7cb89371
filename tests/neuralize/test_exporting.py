"""ONNX files compute what the networks do: every model's logits, and the k-means explanation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitted import CASES
from sklearn.datasets import load_wine

from lrp import errors
from neuralize import neuralize
from neuralize.exporting import Explainer, export_onnx

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")]
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")

QUICK = ("k-means pca", "svc two")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize("name", ALL)
def test_logits(name: str, tmp_path: Path) -> None:
    fitted, X = CASES[name].fit()
    net = neuralize(fitted)
    path = export_onnx(net, tmp_path / "net.onnx", X[:9])
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    for rows in (X[:1], X[:100]):  # any batch
        logits = net(rows).numpy()
        np.testing.assert_allclose(run(path, rows)[0], logits, rtol=1e-9, atol=1e-9 * np.abs(logits).max())
    single = copy.deepcopy(net).float()
    path = export_onnx(single, tmp_path / "single.onnx", X[:9])
    found = run(path, X[:100].astype(np.float32))[0]
    assert found.dtype == np.float32
    if "standardscaler" in str(fitted).lower():
        exact = net(X[:100]).numpy()
        # on standardised data: of the largest logit. Distances are differences of squared norms there
        assert np.abs(found - exact).max() <= 1e-5 * max(np.abs(exact).max(), 10.0)


@pytest.mark.parametrize("name", ["k-means pca", pytest.param("k-means digits", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["double", "float"])
def test_explanation(name: str, precision: str, tmp_path: Path) -> None:
    fitted, X = CASES[name].fit()
    net = getattr(neuralize(fitted), precision)()
    path = export_onnx(net, tmp_path / "net.onnx", X[:9], form="explanation")
    rows = X[:60].astype(np.float32 if precision == "float" else np.float64)
    logits, values, output = run(path, rows)
    e = net.explain(rows)
    tolerance = 1e-9 if precision == "double" else 1e-5
    for found, ours in ((logits, net(rows).numpy()), (values, e.values), (output, e.output)):
        np.testing.assert_allclose(found, ours, rtol=0, atol=tolerance * np.abs(ours).max())


def test_explainer_is_the_explanation() -> None:
    for name, case in CASES.items():
        if not name.startswith(("k-means", "mean shift", "affinity")):
            continue
        fitted, X = case.fit()
        net = neuralize(fitted)
        e = net.explain(X)
        logits, values, output = Explainer(net)(torch.from_numpy(X))
        size = np.abs(e.values).sum(1)
        assert (np.abs(values.numpy() - e.values) <= 1e-9 * size[:, None]).all()
        np.testing.assert_allclose(output, e.output, atol=1e-9 * size.max())
        assert torch.equal(logits, net(X))


def test_errors(tmp_path: Path) -> None:
    fitted, X = CASES["gmm diag"].fit()
    net = neuralize(fitted)
    with pytest.raises(errors.RuleError, match="centroid"):
        export_onnx(net, tmp_path / "a.onnx", X, form="explanation")
    with pytest.raises(errors.RuleError, match="form"):
        export_onnx(net, tmp_path / "a.onnx", X, form="values")
    with pytest.raises(errors.InputError, match="two"):
        export_onnx(net, tmp_path / "a.onnx", X[:1])
    with pytest.raises(errors.DataError, match="no folder"):
        export_onnx(net, tmp_path / "no" / "a.onnx", X)
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: Any) -> None:
    fitted, _ = CASES["k-means standard"].fit()
    net = neuralize(fitted)
    from neuralize import exporting

    def other(module: Any, rows: Any, names: Any, path: Path) -> None:
        moved = copy.deepcopy(net)
        moved.head.pairs.prototypes[0, 0] += 1e-3
        write(moved, rows, names, path)

    write = exporting._write
    monkeypatch.setattr(exporting, "_write", other)
    with pytest.raises(errors.ExportError, match="other logits"):
        export_onnx(net, tmp_path / "net.onnx", load_wine().data)
    assert not list(tmp_path.iterdir())
