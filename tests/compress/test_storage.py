"""Files of networks: what comes back is what was saved, or an error says why not."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BY_NAME, NETWORKS, conv, mlp, plain, structure_of
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.costs import CostTable
from compress.groups import find_groups
from compress.plan import PruningPlan
from compress.storage import KIND, callable_of, file_size, load, save
from lrp import errors
from lrp._files import read_tensors, write_tensors


def plan_for(model: nn.Module, inputs: Any, structure: Any = None, share: float = 0.5, seed: int = 0) -> PruningPlan:
    """Some of the units of every group go, drawn at random."""
    structure = structure or find_groups(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for g in structure.prunable:
        gone = [u for u in g.units if torch.rand(1, generator=generator) < share][: len(g.units) - 1]
        removed[g.name] = tuple(j for u in gone for j in u)
    scores = {g.name: tuple(0.1 * j for j in range(g.width)) for g in structure.prunable}
    return PruningPlan(structure, CostTable.of(model, inputs, structure), removed, scores)


def disturb(model: nn.Module) -> nn.Module:
    """Other values for everything, as training would leave them."""
    with torch.no_grad():
        for t in model.state_dict().values():
            if t.is_floating_point():
                t.add_(torch.rand(t.shape, dtype=torch.float64).to(t.dtype))
            else:
                t.add_(7)
    return model


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        t.dtype == second[n].dtype and torch.equal(t, second[n]) for n, t in first.items()
    )


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        found = model(*inputs)
    values = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
    return [t for v in values for t in (v if isinstance(v, tuple) else (v,))]


def header(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    found: dict[str, str] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    return found


@pytest.mark.parametrize("name", [c.name for c in NETWORKS if c.free])
def test_pruned_networks_come_back(name: str, tmp_path: Path) -> None:
    """From a fresh, untrained original: equal tensors, equal outputs, the same plan, the size that was told."""
    case = BY_NAME[name]
    model, inputs = case.model(), case.inputs()
    plan = plan_for(model, inputs, structure_of(name))
    assert plan.removed
    small = disturb(plan.apply(model))
    path = tmp_path / "net.safetensors"
    save(small, path)
    assert path.stat().st_size == file_size(small)
    again = load(path, case.build)
    assert same_state(again, small)
    assert not again.training
    small.eval()
    for a, b in zip(outputs(again, inputs), outputs(small, inputs), strict=True):
        assert torch.equal(a, b)
    held = again._pruning_plan
    assert isinstance(held, PruningPlan)
    assert held.removed == plan.removed
    assert held.after == plan.after
    twice = tmp_path / "twice.safetensors"
    save(again, twice)
    assert file_size(again) == twice.stat().st_size == path.stat().st_size
    assert read_tensors(twice, KIND)[1] == read_tensors(path, KIND)[1]


@pytest.mark.parametrize("name", ["plain", "norm of the batch", "instance norm, tracked", "two names", "attention"])
def test_whole_networks_come_back(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    model = disturb(case.model())
    save(model, tmp_path / "net")
    again = load(tmp_path / "net", case.build)
    assert same_state(again, model)
    assert (tmp_path / "net").stat().st_size == file_size(model)
    assert not hasattr(again, "_pruning_plan")


def test_statistics_and_counters(tmp_path: Path) -> None:
    net = plain().train()
    for _ in range(5):
        net(torch.randn(4, 3, 8, 8))
    save(net, tmp_path / "net")
    assert net.training  # untouched
    again = load(tmp_path / "net", plain)
    assert int(again[1].num_batches_tracked) == 5
    assert torch.equal(again[1].running_var, net[1].running_var)


def test_steps_of_pruning_are_one_plan(tmp_path: Path) -> None:
    """A network that was cut twice is rebuilt from the original at once."""
    case = BY_NAME["residual"]
    model, inputs = case.model(), case.inputs()
    once = plan_for(model, inputs, structure_of("residual"), 0.3).apply(model)
    twice = disturb(plan_for(once, inputs, share=0.5, seed=2).apply(once))
    assert twice.conv3.out_channels < once.conv3.out_channels < model.conv3.out_channels
    assert twice.stem.out_channels < once.stem.out_channels < model.stem.out_channels
    save(twice, tmp_path / "net")
    assert same_state(load(tmp_path / "net", case.build), twice)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_follow_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    net = plain().to(dtype)
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", plain)  # builds in float32
    assert same_state(again, net)
    assert again[0].weight.dtype == dtype
    assert isinstance(again[0].weight, nn.Parameter)


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    net = plain()
    net[0].requires_grad_(False)
    net[8].bias.requires_grad_(False)
    save(net, tmp_path / "net")

    def build() -> nn.Module:
        other = plain()
        other[3].requires_grad_(False)  # the file decides
        return other

    flags = {n: p.requires_grad for n, p in load(tmp_path / "net", build).named_parameters()}
    assert flags == {n: p.requires_grad for n, p in net.named_parameters()}
    assert not all(flags.values())


class Tied(nn.Module):
    """Two linear layers that may have one weight."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.fc = nn.Linear(6, 2)
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.b(self.a(x).relu()).relu())
        return out


@pytest.mark.parametrize("built", [True, False])
def test_tied_weights_are_stored_once_and_tied_again(built: bool, tmp_path: Path) -> None:
    net = Tied(True)
    save(net, tmp_path / "net")
    assert "b.weight" not in read_tensors(tmp_path / "net", KIND)[0]
    assert (tmp_path / "net").stat().st_size == file_size(net) < file_size(Tied(False)) - 100
    again = load(tmp_path / "net", lambda: Tied(built))
    assert again.b.weight is again.a.weight
    assert torch.equal(again.a.weight, net.a.weight)
    assert len(list(again.parameters())) == 5


def test_tied_weights_beside_a_cut_layer(tmp_path: Path) -> None:
    case = BY_NAME["shared parameter"]
    model, inputs = case.model(), case.inputs()
    small = plan_for(model, inputs, structure_of(case.name)).apply(model)
    assert small[6].out_features < 9
    save(small, tmp_path / "net")
    again = load(tmp_path / "net", case.build)
    assert again[4].weight is again[2].weight
    assert torch.equal(outputs(again, inputs)[0], outputs(small, inputs)[0])


def test_two_tensors_do_not_fit_in_one(tmp_path: Path) -> None:
    save(Tied(False), tmp_path / "net")
    with pytest.raises(errors.MismatchError, match=r"'a.weight' and 'b.weight' as two tensors"):
        load(tmp_path / "net", lambda: Tied(True))


class Views(nn.Module):
    """Tensors that share memory, that are expanded, and of every type."""

    def __init__(self, values: bool = True) -> None:
        super().__init__()
        whole = torch.arange(12.0) if values else torch.zeros(12)
        self.first, self.second = nn.Parameter(whole[:6]), nn.Parameter(whole[3:9])
        self.register_buffer("größe", torch.ones(1).expand(5) * (2 if values else 1))
        self.register_buffer("wide", torch.full((1,), 3.0 if values else 0.0).expand(4))
        self.register_buffer("flag", torch.tensor([values, False]))
        self.register_buffer("small", torch.tensor(5 if values else 0, dtype=torch.uint8))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("nan", torch.tensor([float("nan") if values else 0.0, 1.0]))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("columns", (torch.arange(6.0) if values else torch.zeros(6)).reshape(2, 3).t())


def test_odd_tensors(tmp_path: Path) -> None:
    net = Views()
    save(net, tmp_path / "net")
    assert (tmp_path / "net").stat().st_size == file_size(net)

    def apart() -> nn.Module:
        other = Views(False)
        other.second = nn.Parameter(torch.zeros(6))
        return other

    again = load(tmp_path / "net", apart)
    for name, t in net.state_dict().items():
        assert again.state_dict()[name].dtype == t.dtype
        assert torch.equal(again.state_dict()[name].nan_to_num(9), t.nan_to_num(9)), name


class Overlapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        whole = torch.zeros(6)
        self.register_buffer("a", whole[:4])
        self.register_buffer("b", whole[2:])


def test_overlapping_memory_of_the_built_network_is_refused(tmp_path: Path) -> None:
    net = Overlapping()
    net.b = torch.arange(4.0)  # apart
    save(net, tmp_path / "net")
    with pytest.raises(errors.MismatchError, match="shares memory"):
        load(tmp_path / "net", Overlapping)
    net = Overlapping()
    net.b += 1
    save(net, tmp_path / "net")
    assert load(tmp_path / "net", Overlapping).a.tolist() == [0, 0, 1, 1]


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    net = plain()
    save(torch.compile(net), tmp_path / "a")
    save(nn.DataParallel(net), tmp_path / "b")
    for name in "ab":
        assert same_state(load(tmp_path / name, plain), net)


def test_nobody_else_is_changed(tmp_path: Path) -> None:
    """Neither the network that is saved nor the one that build gives."""
    case = BY_NAME["plain"]
    model, inputs = case.model(), case.inputs()
    plan = plan_for(model, inputs, structure_of("plain"))
    for net in (model, plan.apply(model)):
        kept = {n: (id(t), t.clone()) for n, t in net.state_dict(keep_vars=True).items()}
        save(net.train(), tmp_path / "net")
        assert all(
            id(t) == kept[n][0] and torch.equal(t, kept[n][1]) for n, t in net.state_dict(keep_vars=True).items()
        )
        own = disturb(case.model()).train()
        before = copy.deepcopy(own)
        again = load(tmp_path / "net", lambda own=own: own)
        assert same_state(own, before)
        assert own.training
        assert again is not own


# -- what does not fit -------------------------------------------------------
def wider() -> nn.Module:
    return nn.Sequential(*[conv(3, 9), *list(plain())[1:]])


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(
    ("build", "word"),
    [
        (wider, r"0\.weight"),
        (lambda: plain(bias=False), "missing"),
        (lambda: nn.Sequential(*plain(), nn.Linear(4, 4)), "surplus"),
        (lambda: nn.Sequential(plain()), "missing"),
        (nn.ReLU, "0 tensors|missing|no more than 0"),
    ],
)
def test_another_architecture(build: Callable[[], nn.Module], word: str, pruned: bool, tmp_path: Path) -> None:
    case = BY_NAME["plain"]
    model = case.model()
    net = plan_for(model, case.inputs(), structure_of("plain")).apply(model) if pruned else model
    save(net, tmp_path / "net.st")
    with pytest.raises(errors.MismatchError, match=word) as caught:
        load(tmp_path / "net.st", build)
    assert "net.st" in str(caught.value)
    assert "original architecture" in caught.value.fix


def test_a_pruned_build_is_refused(tmp_path: Path) -> None:
    case = BY_NAME["plain"]
    model = case.model()
    small = plan_for(model, case.inputs(), structure_of("plain")).apply(model)
    save(small, tmp_path / "net")
    with pytest.raises(errors.MismatchError, match="unpruned"):
        load(tmp_path / "net", lambda: small)


def test_a_network_that_its_plan_does_not_leave(tmp_path: Path) -> None:
    case = BY_NAME["plain"]
    model, inputs = case.model(), case.inputs()
    structure = structure_of("plain")
    plan, other = plan_for(model, inputs, structure), plan_for(model, inputs, structure, 0.8, 3)
    assert plan.widths != other.widths
    small = plan.apply(model)
    with pytest.raises(errors.MismatchError, match="leaves another network"):
        save(small, tmp_path / "net", plan=other)
    with pytest.raises(errors.MismatchError, match="leaves another network"):
        save(model, tmp_path / "net", plan=plan)
    with pytest.raises(errors.MismatchError, match="leaves another network"):
        file_size(mlp(), plan)
    small[8] = nn.Linear(small[8].in_features, 7)  # a new head
    with pytest.raises(errors.MismatchError, match="'8'"):
        save(small, tmp_path / "net")
    small[8] = nn.Sequential(nn.Linear(small[3].out_channels, 4))
    with pytest.raises(errors.MismatchError, match="names"):
        save(small, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_plan_may_be_given(tmp_path: Path) -> None:
    """Where a training loop made a new object of the network."""
    case = BY_NAME["plain"]
    model = case.model()
    plan = plan_for(model, case.inputs(), structure_of("plain"))
    bare = nn.Sequential(*plan.apply(model))
    save(bare, tmp_path / "net", plan=plan)
    assert same_state(load(tmp_path / "net", case.build), bare)


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None: ...


def sparse() -> nn.Module:
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.eye(2).to_sparse())
    return net


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: Extra(2, 2), "_extra_state"),
        (sparse, "mask"),
        (lambda: nn.LazyLinear(3), "lazy"),
        (lambda: nn.Linear(2, 2, device="meta"), "meta"),
    ],
)
def test_what_no_file_of_tensors_holds(build: Callable[[], nn.Module], word: str, tmp_path: Path) -> None:
    (tmp_path / "net").write_text("before")
    with pytest.raises(errors.InputError, match=word):
        save(build(), tmp_path / "net")
    assert (tmp_path / "net").read_text() == "before"


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match="no folder"):
        save(mlp(), tmp_path / "no" / "net")
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.DataError, match="can not be written"):
        save(mlp(), tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


# -- damaged and hostile files -----------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = BY_NAME["plain"]
    model = case.model()
    path = tmp_path_factory.mktemp("whole") / "net"
    save(plan_for(model, case.inputs(), structure_of("plain")).apply(model), path)
    return path


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=30, deadline=None)
def test_truncated(share: float, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    raw = whole.read_bytes()
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(errors.FileFormatError):
        load(path, plain)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), early=st.booleans())
@settings(max_examples=120, deadline=None)
def test_flipped_bits(
    where: float, bit: int, early: bool, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In the header as often as in the values: refused, unless it says the same."""
    raw = bytearray(whole.read_bytes())
    size = 8 + int.from_bytes(raw[:8], "little")
    raw[int(where * (size if early else len(raw)))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(raw)
    try:
        found = load(path, plain)
    except errors.FileFormatError:
        return
    assert same_state(found, load(whole, plain))


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", plain)
    torch.save(plain().state_dict(), tmp_path / "pickle")
    save_file(plain().state_dict(), tmp_path / "bare")
    write_tensors(tmp_path / "sum", "lrp.RelevanceSum", {"a": torch.ones(2)}, {})
    for name in ("pickle", "bare", "sum"):
        with pytest.raises(errors.FileFormatError):
            load(tmp_path / name, plain)
    own = {"format": KIND, "version": "2", "meta": "{}", "order": "[]", "digest": ""}
    save_file({"a": torch.ones(2)}, tmp_path / "later", own)
    with pytest.raises(errors.FileFormatError, match="another version"):
        load(tmp_path / "later", plain)


def test_a_header_that_claims_much(whole: Path, tmp_path: Path) -> None:
    raw = whole.read_bytes()
    for size in (2**63, 2**32, 10**8 + 1):
        (tmp_path / "net").write_bytes(size.to_bytes(8, "little") + raw[8:])
        with pytest.raises(errors.FileFormatError):
            load(tmp_path / "net", plain)


def packed(plan: Any) -> str:
    return base64.b85encode(zlib.compress(json.dumps(plan).encode())).decode()


def of_width(width: int, **index: int) -> Any:
    group = {"name": "0", "width": width, "units": None, "protected": ""}
    members = [{"layer": "0", "axis": "out", "type": "Conv2d", "index": {"start": 0, "run": 1, "count": 8, **index}}]
    return {"format": "compress.PruningPlan", "version": 1, "structure": [{**group, "members": members}]}


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"plan": None, "tied": {}},
        {"plan": None, "tied": [], "frozen": []},
        {"plan": None, "tied": {"x": "y"}, "frozen": []},
        {"plan": None, "tied": {"0.bias": "0.weight"}, "frozen": []},
        {"plan": None, "tied": {}, "frozen": 3},
        {"plan": 3, "tied": {}, "frozen": []},
        {"plan": "~~~", "tied": {}, "frozen": []},
        {"plan": "é", "tied": {}, "frozen": []},
        {"plan": base64.b85encode(b"no zlib").decode(), "tied": {}, "frozen": []},
        {"plan": base64.b85encode(zlib.compress(b"[" * 10**5)).decode(), "tied": {}, "frozen": []},
        {"plan": base64.b85encode(zlib.compress(b"[1" + b" " * 2**27 + b"]")).decode(), "tied": {}, "frozen": []},
        {"plan": packed([]), "tied": {}, "frozen": []},
        {"plan": packed({"structure": 5}), "tied": {}, "frozen": []},
        {"plan": packed({"structure": []}), "tied": {}, "frozen": []},
        {"plan": packed({**of_width(8), "version": 2}), "tied": {}, "frozen": []},
        {"plan": packed(of_width(8)), "tied": {}, "frozen": []},
    ],
    ids=range(17),
)
def test_headers_that_make_no_sense(meta: dict[str, Any], tmp_path: Path) -> None:
    """With a digest that fits: made by someone else, not damaged."""
    write_tensors(tmp_path / "net", KIND, plain().state_dict(), meta)
    with pytest.raises(errors.FileFormatError):
        load(tmp_path / "net", plain)


@pytest.mark.parametrize("plan", [of_width(10**12), of_width(8, count=10**12), of_width(8, run=10**12)])
def test_a_plan_that_would_fill_the_memory(plan: Any, tmp_path: Path) -> None:
    write_tensors(tmp_path / "net", KIND, plain().state_dict(), {"plan": packed(plan), "tied": {}, "frozen": []})
    with pytest.raises(errors.MismatchError, match="000000000000 channels"):
        load(tmp_path / "net", plain)


def test_the_header_is_json_and_the_plan_is_small(whole: Path) -> None:
    found = header(whole)
    assert found["format"] == "compress.model"
    assert found["version"] == "1"
    meta = json.loads(found["meta"])
    stored = json.loads(zlib.decompress(base64.b85decode(meta["plan"])))
    assert stored["removed"]
    assert not stored["scores"]
    assert len(meta["plan"]) < 0.4 * len(json.dumps(stored))
    PruningPlan.from_json(stored).apply(plain())


# -- build ---------------------------------------------------------------------
def test_names_of_functions(tmp_path: Path) -> None:
    net = mlp()
    save(net, tmp_path / "net")
    assert same_state(load(tmp_path / "net", "networks:mlp"), net)
    assert callable_of("torch.nn:functional.relu") is nn.functional.relu
    assert callable_of(plain) is plain


@pytest.mark.parametrize(
    "spec",
    ["networks", "networks:", ":mlp", "networks:none", "no_such_module:x", "networks:PLAIN", "torch.nn:", 3, None],
)
def test_names_of_nothing(spec: Any) -> None:
    with pytest.raises(errors.InputError, match="MODULE:CALLABLE"):
        callable_of(spec)


def test_builds_of_no_network(whole: Path) -> None:
    with pytest.raises(errors.InputError, match="no network"):
        load(whole, dict)  # type: ignore[arg-type]
    with pytest.raises(errors.InputError, match=r"not a function.*lambda: network"):
        load(whole, plain())
    with pytest.raises(errors.InputError, match="meta"):
        load(whole, lambda: plain().to("meta"))


def test_a_kill_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    """Killed while it writes over and over: what is there is whole."""
    path = tmp_path / "net"
    code = (
        "import sys, torch; from compress.storage import save; net = torch.nn.Linear(600, 600)\n"
        f"save(net, {str(path)!r}); print('x', flush=True)\n"
        f"while True: save(net, {str(path)!r})"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            process.kill()
        load(path, lambda: nn.Linear(600, 600))
