"""Containers: a quantized network comes back to the last bit, with its plans, or an error says why not."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import BY_NAME, plain, structure_of
from torch import Tensor, nn

from compress import container
from compress.codebook import Codebook, codebook_of
from compress.costs import CostTable
from compress.plan import PruningPlan
from compress.quantization_plan import QuantizationPlan, plan_of
from compress.storage import file_size, load, save
from lrp import errors

PRELUDE = struct.Struct("<8sHHIIIQ")


def quantized(net: nn.Module, bits: int = 4, axis: int | None = None, but: tuple[str, ...] = ()) -> nn.Module:
    """Weights rounded to the nearest level, in place."""
    books = {}
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() > 1 and name not in but:
                books[name] = codebook_of(p, bits, axis=axis)
                p.copy_(books[name].values(books[name].nearest(p)))
    left_out = {name: "not a weight" for name in net.state_dict() if name not in books}
    QuantizationPlan(books, left_out, {"method": "rtn", "bits": bits}).apply(net)
    return net


def pruned(share: float = 0.5) -> nn.Module:
    case = BY_NAME["plain"]
    model, inputs, structure = case.model(), case.inputs(), structure_of("plain")
    removed = {g.name: tuple(j for u in g.units[: int(share * len(g.units))] for j in u) for g in structure.prunable}
    return PruningPlan(structure, CostTable.of(model, inputs, structure), removed, {}).apply(model)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        t.dtype == second[n].dtype and torch.equal(t, second[n]) for n, t in first.items()
    )


def same_plan(a: QuantizationPlan | None, b: QuantizationPlan | None) -> bool:
    return a is not None and b is not None and a.to_json() == b.to_json()


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_what_comes_back(bits: int, axis: int | None, tmp_path: Path) -> None:
    net = quantized(plain().train(), bits, axis)
    net(torch.randn(4, 3, 8, 8))  # statistics and counters
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", plain)
    assert same_state(again, net)
    assert not again.training
    plan, found = plan_of(net), plan_of(again)
    assert plan is not None
    assert same_plan(plan, found)
    assert found is not None
    for name, k in found.indices(again).items():
        assert torch.equal(k, plan.indices(net)[name])
    assert (tmp_path / "net").stat().st_size == file_size(net) == file_size(again)
    save(again, tmp_path / "twice")
    assert (tmp_path / "twice").read_bytes() == (tmp_path / "net").read_bytes()


@pytest.mark.parametrize("name", ["norm of the batch", "instance norm, tracked", "two names", "attention", "residual"])
def test_networks_of_many_kinds(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    net = quantized(case.model())
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", case.build)
    assert same_state(again, net)
    assert same_plan(plan_of(again), plan_of(net))


def test_pruned_and_quantized(tmp_path: Path) -> None:
    net = quantized(pruned())
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", plain)
    assert same_state(again, net)
    assert again._pruning_plan.removed == net._pruning_plan.removed
    assert same_plan(plan_of(again), plan_of(net))
    assert file_size(net) == (tmp_path / "net").stat().st_size
    bare = nn.Sequential(*net)
    plan = plan_of(net)
    assert plan is not None
    plan.apply(bare)
    save(bare, tmp_path / "given", plan=net._pruning_plan)
    assert (tmp_path / "given").read_bytes() == (tmp_path / "net").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_follow_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    net = quantized(plain().to(dtype), 8)
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", plain)  # builds in float32
    assert same_state(again, net)
    assert again[0].weight.dtype == dtype


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    net = quantized(plain())
    net[0].requires_grad_(False)
    save(net, tmp_path / "net")
    flags = {n: p.requires_grad for n, p in load(tmp_path / "net", plain).named_parameters()}
    assert flags == {n: p.requires_grad for n, p in net.named_parameters()}
    assert not all(flags.values())


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        if tie:
            self.b.weight = self.a.weight


@pytest.mark.parametrize("names", [("a.weight",), ("b.weight",), ("a.weight", "b.weight")])
def test_tied_weights_are_coded_once(names: tuple[str, ...], tmp_path: Path) -> None:
    """Whatever they are called in the plan."""
    net = Tied()
    book = codebook_of(net.a.weight, 3)
    with torch.no_grad():
        net.a.weight.copy_(book.values(book.nearest(net.a.weight)))
    QuantizationPlan(dict.fromkeys(names, book)).apply(net)
    save(net, tmp_path / "net")
    assert [e.name for e in container.inspect(tmp_path / "net").entries] == ["a.weight"]
    for tie in (True, False):
        again = load(tmp_path / "net", lambda tie=tie: Tied(tie))
        assert again.b.weight is again.a.weight
        assert torch.equal(again.a.weight, net.a.weight)
        assert same_plan(plan_of(again), plan_of(net))


def test_one_tensor_has_one_codebook(tmp_path: Path) -> None:
    net = Tied()
    torch.nn.init.zeros_(net.a.weight)
    one, two = (Codebook(torch.tensor(step), -1, 1) for step in (0.5, 0.25))
    QuantizationPlan({"a.weight": one, "b.weight": two}).apply(net)
    with pytest.raises(errors.InputError, match="one tensor with two codebooks"):
        save(net, tmp_path / "net")


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    net = quantized(plain())
    save(nn.DataParallel(net), tmp_path / "net")
    assert same_state(load(tmp_path / "net", plain), net)


def test_nobody_else_is_changed(tmp_path: Path) -> None:
    own, net = plain(), quantized(plain(), 2)
    before = {n: t.clone() for n, t in own.state_dict().items()}
    kept = {n: t.clone() for n, t in net.state_dict().items()}
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", lambda: own)
    assert again is not own
    assert all(torch.equal(t, before[n]) for n, t in own.state_dict().items())
    assert all(torch.equal(t, kept[n]) for n, t in net.state_dict().items())
    assert plan_of(own) is None


def test_a_plain_file_leaves_no_plan_behind(tmp_path: Path) -> None:
    """Where build gives a network that is quantized."""
    save(plain(), tmp_path / "net")
    assert plan_of(load(tmp_path / "net", lambda: quantized(plain()))) is None


def test_weights_that_moved(tmp_path: Path) -> None:
    net = quantized(plain())
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-3
    with pytest.raises(errors.MismatchError, match=r"'0.weight' lies off its codebook"):
        save(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [object(), {1, 2}, "x" * 2**21])
def test_settings_that_are_no_json(value: Any, tmp_path: Path) -> None:
    net = quantized(plain())
    plan = plan_of(net)
    assert plan is not None
    QuantizationPlan(plan.codebooks, {}, {"odd": value}).apply(net)
    with pytest.raises(errors.InputError, match="plans"):
        save(net, tmp_path / "net")


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    net = quantized(plain())
    with pytest.raises(errors.DataError, match="no folder"):
        save(net, tmp_path / "no" / "net")
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.DataError, match="can not be written"):
        save(net, tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", plain)


def test_the_slow_decoder_reads_the_same(tmp_path: Path) -> None:
    net = quantized(nn.Sequential(nn.Conv2d(16, 24, 3), nn.Linear(30, 40)))
    save(net, tmp_path / "net")
    header = container.inspect(tmp_path / "net")
    shapes = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    for slow in (False, True):
        tensors, _ = container.read(tmp_path / "net", header, shapes, slow=slow)
        assert all(torch.equal(tensors[n], t) for n, t in net.state_dict().items())


def test_without_constriction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = quantized(nn.Conv2d(16, 24, 3))
    save(net, tmp_path / "net")
    torch.save(net.weight, tmp_path / "weight")
    code = f"""
import sys
sys.modules["constriction"] = None
import torch
from compress.storage import load
net = load({str(tmp_path / "net")!r}, lambda: torch.nn.Conv2d(16, 24, 3))
assert torch.equal(net.weight, torch.load({str(tmp_path / "weight")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_header_tells_what_is_inside(tmp_path: Path) -> None:
    net = quantized(plain())
    save(net, tmp_path / "net")
    header = container.inspect(tmp_path / "net")
    size = (tmp_path / "net").stat().st_size
    assert header.size == size
    assert header.start + header.floats[1] + sum(e.length for e in header.entries) == size
    plan = plan_of(net)
    assert plan is not None
    for e in header.entries:
        book = plan.codebooks[e.name]
        assert (e.low, e.high, e.axis) == (book.low, book.high, book.axis)
        assert e.shape == tuple(net.get_parameter(e.name).shape)
        assert e.dtype == "float32"
    table = str(header)
    assert f"{size:,} bytes" in table
    assert all(name in table for name in plan.codebooks)


def test_the_format_is_what_its_description_says(tmp_path: Path) -> None:
    """Read by hand: prelude, JSON, safetensors, steps."""
    from safetensors.torch import load as deserialise

    net = quantized(nn.Sequential(nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24)), axis=0)
    save(net, tmp_path / "net")
    raw = (tmp_path / "net").read_bytes()
    magic, version, zero, packed, inflated, crc, size = PRELUDE.unpack(raw[:32])
    assert (magic, version, zero, size) == (container.MAGIC, 1, 0, len(raw))
    assert zlib.crc32(raw[:20] + bytes(4) + raw[24 : 32 + packed]) == crc
    text = zlib.decompress(raw[32 : 32 + packed])
    assert len(text) == inflated
    stored = json.loads(text)
    coder, length, _, crc = stored["floats"]
    place = 32 + packed
    section = raw[place : place + length]
    assert zlib.crc32(section) == crc
    floats = deserialise(zlib.decompress(section) if coder == "deflate" else section)
    assert set(floats) == set(net.state_dict()) - {"0.weight"}
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in floats.items())
    ((name, dtype, shape, bounds, coder, length, crc),) = stored["tensors"]
    assert (name, dtype, shape, bounds) == ("0.weight", "float32", [24, 16, 3, 3], [-7, 7, 0])
    payload = raw[place + len(section) :]
    assert len(payload) == length
    assert zlib.crc32(payload) == crc
    plan = plan_of(net)
    assert plan is not None
    assert struct.unpack("<24f", payload[:96]) == tuple(plan.codebooks["0.weight"].step.tolist())
    assert stored["quantization"]["settings"] == {"method": "rtn", "bits": 4}


def test_the_header_is_small() -> None:
    """Of twenty layers, some thirty bytes each."""
    net = quantized(nn.Sequential(*[nn.Conv2d(16, 16, 3, bias=False) for _ in range(20)]))
    plan = plan_of(net)
    assert plan is not None
    QuantizationPlan(plan.codebooks).apply(net)
    pieces = container.pack({n: (k, plan.codebooks[n]) for n, k in plan.indices(net).items()}, {}, {})
    assert len(pieces[0]) + len(pieces[1]) < 600


# -- damaged and hostile -----------------------------------------------------
class Forged:
    """A container in pieces, sealed with checksums that fit."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        *_, packed, _, _, _ = PRELUDE.unpack(raw[:32])
        self.header: Any = json.loads(zlib.decompress(raw[32 : 32 + packed]))
        self.body, self.path = raw[32 + packed :], path

    def write(self, **fields: int) -> Path:
        text = fields.get("text", json.dumps(self.header).encode())
        packed = zlib.compress(text)
        values = {"version": 1, "zero": 0, "packed": len(packed), "inflated": len(text), "crc": 0}
        values.update(size=32 + len(packed) + len(self.body))
        values.update({k: v for k, v in fields.items() if k in values})
        first = PRELUDE.pack(container.MAGIC, *values.values())
        values["crc"] = zlib.crc32(packed, zlib.crc32(first))
        place = self.path.with_name("forged")
        place.write_bytes(PRELUDE.pack(container.MAGIC, *values.values()) + packed + self.body)
        return place


@pytest.fixture
def forged(tmp_path: Path) -> Forged:
    torch.manual_seed(0)
    save(quantized(plain(), axis=0), tmp_path / "net")
    return Forged(tmp_path / "net")


def refused(path: Path, match: str | None, kind: type[errors.LRPError] = errors.FileFormatError) -> None:
    with pytest.raises(kind, match=match) as caught:
        load(path, plain)
    assert path.name in str(caught.value)
    assert caught.value.expected
    assert caught.value.fix


def test_a_forged_file_is_read_if_nothing_is_wrong(forged: Forged) -> None:
    assert same_state(load(forged.write(), plain), load(forged.path, plain))


def test_cut_off_too_long_and_damaged(forged: Forged, tmp_path: Path) -> None:
    raw = forged.path.read_bytes()
    place = tmp_path / "other"
    for data, word in (
        (raw[:-1], "cut off"),
        (raw[: len(raw) // 2], "cut off"),
        (raw[:20], "do not start as such a file does"),
        (raw + b"\0", "bytes behind the end"),
        (raw[:40] + bytes([raw[40] ^ 1]) + raw[41:], "header that does not fit its checksum"),
        (raw[:-5] + bytes([raw[-5] ^ 16]) + raw[-4:], r"section of '8.weight': it does not fit its checksum"),
    ):
        place.write_bytes(data)
        refused(place, word)
    for size in range(32):
        place.write_bytes(raw[:size])
        with pytest.raises(errors.FileFormatError):
            load(place, plain)


def test_another_version(forged: Forged) -> None:
    refused(forged.write(version=2), "another version of the package.*version 1.*version 2")


@pytest.mark.parametrize(
    "fields", [{"zero": 1}, {"packed": 2**31}, {"inflated": 2**32 - 1}, {"inflated": 3}, {"size": 2**63}]
)
def test_preludes_that_claim_much(fields: dict[str, int], forged: Forged) -> None:
    refused(forged.write(**fields), None)


def row(header: Any, i: int, value: Any) -> None:
    header["tensors"][0][i] = value


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda h: row(h, 2, [8, 2**40, 2**20, 3]), r"'0.weight' of shape \(8, 1099511627776"),
        (lambda h: row(h, 2, [2**62] * 4), "for the steps"),
        (lambda h: row(h, 2, [*h["tensors"][0][2][:3], 4]), "of shape"),
        (lambda h: row(h, 2, h["tensors"][0][2][:3]), "of shape"),
        (lambda h: row(h, 0, "none"), "'none' of shape"),
        (lambda h: row(h, 0, "\ud800"), "surrogates"),
        (lambda h: h.__setitem__("frozen", ["\ud800"]), "surrogates"),
        (lambda h: h["tensors"].pop() and h["floats"].__setitem__(1, 10**9), None),
        (lambda h: row(h, 2, [-1, 3, 3, 3]), None),
        (lambda h: row(h, 2, [8.0, 3, 3, 3]), None),
        (lambda h: row(h, 2, [True, 3, 3, 3]), None),
        (lambda h: row(h, 2, [1] * 10**5), None),
        (lambda h: row(h, 3, [-7, 7, 4]), None),
        (lambda h: row(h, 3, [1, 7, None]), None),
        (lambda h: row(h, 3, [-(10**12), 7, 0]), "codebook"),
        (lambda h: row(h, 3, [-7, 10**12, 0]), "codebook"),
        (lambda h: row(h, 3, [0, 0, 0]), "codebook"),
        (lambda h: row(h, 4, "pickle"), "section of '0.weight'.*a coder 'pickle'"),
        (lambda h: row(h, 4, "constant"), "section of '0.weight'"),
        (lambda h: row(h, 5, 10**12), "not as long as the file"),
        (lambda h: row(h, 5, -1), None),
        (lambda h: row(h, 1, "int64"), None),
        (lambda h: row(h, 1, ["float32"]), None),
        (lambda h: row(h, 1, "float64"), None),
        (lambda h: row(h, 0, h["tensors"][1][0]), "comes twice"),
        (lambda h: h["floats"].__setitem__(0, "zip"), None),
        (lambda h: h["floats"].__setitem__(2, 10**9), "room for"),
        (lambda h: h["floats"].__setitem__(2, 17), "float section"),
        (lambda h: h.__setitem__("tensors", None), None),
        (lambda h: h.__setitem__("tensors", {}), "not as long"),
        (lambda h: h.__setitem__("pruning", []), None),
        (lambda h: h.__setitem__("quantization", None), None),
        (lambda h: h["quantization"].__setitem__("settings", 3), None),
        (lambda h: h.__setitem__("tied", {"x": "y"}), None),
        (lambda h: h.__setitem__("frozen", 4), None),
        (lambda h: h.__setitem__("aliases", {"0.weight": ["other"]}), "codebooks of tensors that are not there"),
        (lambda h: h.pop("aliases"), None),
    ],
)
def test_headers_that_make_no_sense(change: Callable[[Any], Any], word: str | None, forged: Forged) -> None:
    change(forged.header)
    kind = errors.MismatchError if word and ("of shape" in word or "room" in word) else errors.FileFormatError
    refused(forged.write(), word, kind)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"3", b"[" * 10**5, b"\xff", b'{"tensors":[]}', b"[1" + b"0" * 10**4 + b"]"]
)
def test_headers_that_are_no_object(text: bytes, forged: Forged) -> None:
    refused(forged.write(text=text), None)  # type: ignore[arg-type]


def test_a_long_header_is_not_read_unasked(forged: Forged) -> None:
    """Objects take far more than their text: what may be read does not grow with the file without end."""
    text = json.dumps({**forged.header, "x": [[] for _ in range(3_000_000)]}).encode()
    forged.body += bytes(2**20)
    assert len(text) > 2**23
    with pytest.raises(errors.FileFormatError, match="a header of"):
        container.inspect(forged.write(text=text))  # type: ignore[arg-type]  # bytes


def test_a_plan_that_would_fill_the_memory(forged: Forged) -> None:
    group = {"name": "0", "width": 10**12, "units": None, "protected": "", "members": []}
    forged.header["pruning"] = {"format": "compress.PruningPlan", "version": 1, "structure": [group]}
    with pytest.raises((errors.MismatchError, errors.FileFormatError)):
        load(forged.write(), plain)


def test_floats_of_another_kind(forged: Forged) -> None:
    """Checksums fit, but a parameter is trained that is no floating-point number."""
    from safetensors.torch import load as deserialise
    from safetensors.torch import save as serialise

    coder, length, *_ = forged.header["floats"]
    section = forged.body[:length]
    floats = deserialise(zlib.decompress(section) if coder == "deflate" else section)

    def swap(**other: Tensor) -> Path:
        data = serialise({**floats, **other})
        forged.header["floats"] = ["raw", len(data), len(data), zlib.crc32(data)]
        body, forged.body = forged.body, data + forged.body[length:]
        place = forged.write()
        forged.body = body
        return place

    bias = floats["8.bias"]
    assert same_state(load(swap(), plain), load(forged.path, plain))
    refused(swap(**{"8.bias": bias.long()}), "int64", errors.MismatchError)
    refused(swap(**{"8.bias": torch.zeros(1)}), "shape", errors.MismatchError)
    twice = {"0.weight": torch.zeros(8, 3, 3, 3)}
    refused(swap(**twice), "'0.weight' twice")
    refused(swap(extra=torch.zeros(2)), "surplus|missing", errors.MismatchError)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(container.MAGIC)
    refused(tmp_path / "text", "do not start")
    save(plain(), tmp_path / "plain")
    assert not container.is_container(tmp_path / "plain")
    with pytest.raises(errors.FileFormatError, match="do not start"):
        container.inspect(tmp_path / "plain")
    assert not container.is_container(tmp_path)


def test_a_kill_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "net"
    code = (
        "import torch; from compress.codebook import codebook_of; from compress.storage import save\n"
        "from compress.quantization_plan import QuantizationPlan\n"
        "net = torch.nn.Linear(90, 90); book = codebook_of(net.weight, 4)\n"
        "net.weight.data = book.values(book.nearest(net.weight))\n"
        "QuantizationPlan({'weight': book}).apply(net)\n"
        f"save(net, {str(path)!r}); print('x', flush=True)\n"
        f"while True: save(net, {str(path)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.kill()
    load(path, lambda: nn.Linear(90, 90))
