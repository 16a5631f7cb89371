"""Sums over a data set: their files, wrong use, progress."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.sums import close, make_data, make_net, pairs
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lrp
from lrp import errors
from lrp._files import read_tensors, write_tensors


@pytest.fixture
def net() -> nn.Module:
    return make_net()


# -- files -------------------------------------------------------------------------


def test_state_and_file(net: nn.Module, tmp_path: Path) -> None:
    total = lrp.collect(net, pairs(*make_data()), wrt=("channels", "weights"), aggregate="abs_total")
    total.save(tmp_path / "sum.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["sum.safetensors"]
    loaded = lrp.RelevanceSum.load(tmp_path / "sum.safetensors")
    again = lrp.RelevanceSum()
    again.load_state_dict(total.state_dict())
    buffer = io.BytesIO()
    torch.save(total.state_dict(), buffer)  # plain tensors and JSON: loads with weights_only
    buffer.seek(0)
    third = lrp.RelevanceSum()
    third.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (loaded, again, third):
        assert repr(other) == repr(total)
        assert other.unexplained == total.unexplained
        close(other.channels, total.channels, 0)
        close(other.weights, total.weights, 0)
        assert list(other.channels) == list(total.channels)
        assert other.merge(total).count == 14
    state = total.state_dict()
    state["channels"]["conv1"].zero_()
    assert total.channels["conv1"].any()


def test_damaged_files(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "sum.safetensors"
    lrp.collect(net, pairs(*make_data(3))).save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for content in (whole[:-8], whole[:40], b"", bytes(flipped), b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(errors.FileFormatError, match="can not be read"):
            lrp.RelevanceSum.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(errors.FileFormatError, match="kind"):
        lrp.RelevanceSum.load(path)
    with pytest.raises(FileNotFoundError):
        lrp.RelevanceSum.load(tmp_path / "none")
    with pytest.raises(errors.DataError):
        lrp.collect(net, pairs(*make_data(3))).save(tmp_path / "none" / "sum")
    with pytest.raises(errors.FileFormatError):
        lrp.RelevanceSum().load_state_dict({"channels": {}})


# -- wrong use ---------------------------------------------------------------------

X, Y = make_data(3)
WRONG: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (errors.InputError, "no batches", [], {}),
    (errors.InputError, "no batches", iter(()), {}),
    (errors.InputError, "no iterable", 3, {}),
    (errors.InputError, "no iterable", None, {}),
    (errors.InputError, "no iterable", X, {}),
    (errors.InputError, "no iterable", "data", {}),
    (errors.InputError, "no iterable", (X, Y), {}),
    (errors.InputError, "no iterable", {"x": X}, {}),
    (errors.InputError, "batch 0 has no known form", [{"x": X}], {}),
    (errors.InputError, "batch 0 has no known form", [(X, Y, Y)], {}),
    (errors.InputError, "batch 0 has no known form", [()], {}),
    (errors.InputError, "batch 0 has no known form", [[[1.0, 2.0], 3]], {}),
    (errors.InputError, "batch 1 has no known form", [X, "x"], {}),
    (errors.InputError, "batch 0 is no target", [(X, Y.double())], {}),
    (errors.InputError, "others do not", [(X, Y), X], {}),
    (errors.InputError, "others do not", [X, (X, Y)], {}),
    (errors.TargetError, "out of range", [(X, Y + 9)], {}),
    (errors.TargetError, "number of targets", [(X, Y[:2])], {}),
    (errors.TargetError, "no class", [X], {"target": Y}),
    (errors.TargetError, "no class", [X], {"target": True}),
    (errors.TargetError, "no class", [X], {"target": "labels"}),
    (errors.TargetError, "unknown start", [X], {"start": "logits"}),
    (errors.TargetError, "unknown start", [X], {"start": len}),
    (errors.TargetError, "drop the target", [X], {"start": lrp.Seed(torch.ones(4)), "target": 1}),
    (errors.InputError, "does not fit", [X], {"start": lrp.Seed(torch.ones(5).double())}),
    (errors.InputError, "'layers' is not summed", [X], {"wrt": ("channels", "layers")}),
    (errors.InputError, "'input' is not summed", [X], {"wrt": "input"}),
    (errors.InputError, "wrt names", [X], {"wrt": "filters"}),
    (errors.InputError, "wrt names", [X], {"wrt": ()}),
    (errors.InputError, "unknown aggregate", [X], {"aggregate": "abs"}),
    (errors.InputError, "unknown aggregate", [X], {"aggregate": {"channels": "abs"}}),
    (errors.InputError, "not collected", [X], {"aggregate": {"weights": "signed"}}),
    (errors.InputError, "magnitudes", [X], {"composite": "gradient", "wrt": "weights", "aggregate": "abs_element"}),
    (errors.CompositeError, "unknown composite", [X], {"composite": "eps"}),
    (errors.PlanError, "no layer matches", [X], {"layers": "conv9"}),
    (errors.InputError, "unknown device", [X], {"device": "gpu"}),
    (errors.InputError, "on another device", [X], {"device": "meta"}),
    (errors.NonFiniteError, "not finite", [X / 0], {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "match", "batches", "options"), WRONG)
def test_wrong_use(net: nn.Module, kind: type[errors.LRPError], match: str, batches: Any, options: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        lrp.collect(net, batches, **options)
    assert caught.value.expected
    assert caught.value.fix


def test_no_model() -> None:
    with pytest.raises(errors.InputError, match="is not an"):
        lrp.collect(len, [X])  # type: ignore[arg-type]


def test_errors_name_the_batch(net: nn.Module) -> None:
    with pytest.raises(errors.NonFiniteError) as caught:
        lrp.collect(net, [X, X / 0])
    assert str(caught.value).startswith("In batch 1: ")
    with pytest.raises(errors.TargetError, match=r"In batch 2: .*out of range") as wrong:
        lrp.collect(net, [(X, Y), (X, Y), (X, Y + 9)])
    assert wrong.value.fix
    with pytest.raises(errors.TargetError, match=r"In batch 0: .*out of range"):
        lrp.collect(net, [X], target=9)


def test_distributed_sampler_is_refused(net: nn.Module) -> None:
    from lrp._batches import check_batches

    data = TensorDataset(X, Y)
    loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(errors.InputError, match="DistributedSampler"):
        check_batches(loader, distributed=True)


# -- progress ----------------------------------------------------------------------


def test_progress_is_for_terminals(net: nn.Module, capsys: Any, monkeypatch: Any) -> None:
    data = pairs(*make_data())
    lrp.collect(net, data)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    lrp.collect(net, data, progress=False)
    assert capsys.readouterr().err == ""
    lrp.collect(net, data)
    assert "3/3" in capsys.readouterr().err


def test_a_flipped_bit_anywhere_is_seen(tmp_path: Path) -> None:
    """The digest covers what is known of the sums as well as the sums."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    path = tmp_path / "state"
    lrp.collect(net, [torch.randn(4, 3), torch.randn(4, 3)], resume=path, progress=False)
    raw = path.read_bytes()
    start = raw.index(b"seen") if b"seen" in raw else raw.index(b"count")
    digits = [i for i in range(start, start + 40) if chr(raw[i]).isdigit()]
    assert digits
    for i in digits:
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 2]) + raw[i + 1 :])
        with pytest.raises(lrp.errors.FileFormatError):
            lrp.collect(net, [torch.randn(4, 3)], resume=path, progress=False)


def test_the_state_of_another_process_is_refused(net: nn.Module, tmp_path: Path) -> None:
    x, y = make_data()
    path = tmp_path / "state"
    lrp.collect(net, pairs(x, y), resume=path, progress=False)
    tensors, meta = read_tensors(path, "lrp.collect")
    write_tensors(path, "lrp.collect", tensors, {**meta, "rank": 1})
    with pytest.raises(errors.MismatchError, match="rank"):
        lrp.collect(net, pairs(x, y), resume=path, progress=False)
