"""Criteria in general: names, arguments, scores and their file, a user's function, the network left as it was."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import hard
from scored import NETS, conv
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress.criteria import CRITERIA, Criterion, Scores, criterion_of, lrp, random, weight
from compress.criteria._names import ENTRIES
from lrp import errors
from lrp._files import write_tensors

NAMES = [n for n in CRITERIA if n not in ("captum", "tp")] + ["tp:LAMPImportance", "weight:bn", "taylor:cvpr2019"]
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.tensor([0, 2]))]


def chain() -> nn.Module:
    return hard(
        nn.Sequential(
            conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), conv(6, 5), nn.BatchNorm2d(5),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
        )
    )  # fmt: skip


def state(model: nn.Module) -> list[Any]:
    """All that scoring might leave behind."""
    out: list[Any] = []
    for name, m in model.named_modules():
        hooks = [len(d) for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)]
        out.append((name, m.training, hooks))
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        out.append((name, t.requires_grad, t.grad is None, t._version, t.detach().clone()))
    return out


def same(a: list[Any], b: list[Any]) -> bool:
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True)]
    return all(torch.equal(u, v) if isinstance(u, Tensor) else u == v for u, v in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_stays_as_it_was(name: str) -> None:
    """Trap 16: no hooks, no other weights, statistics, flags or gradients; and dropout is off."""
    model = chain()
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(k % 2 == 0)
    criterion = criterion_of(name)
    exact = criterion(model, DATA, ["0", "4"], progress=False, example_inputs=X)
    model.train()
    model[4].eval()
    before = state(model)
    found = criterion(model, DATA, ["0", "4"], progress=False, example_inputs=X)
    assert same(state(model), before)
    assert found.values.keys() == exact.values.keys()
    assert all(torch.equal(t, exact.values[n]) for n, t in found.values.items())


@pytest.mark.parametrize("name", NAMES)
def test_frozen_networks_have_the_same_scores(name: str) -> None:
    criterion, model = criterion_of(name), chain()
    exact = criterion(model, DATA, ["0", "4"], progress=False, example_inputs=X)
    frozen = criterion(
        model.requires_grad_(False), DATA, ["0", "4"], progress=False, example_inputs=X, device="cpu"
    )  # fmt: skip
    assert exact.values
    assert all(torch.equal(t, exact.values[n]) for n, t in frozen.values.items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_scores_on_a_device(name: str) -> None:
    criterion, model = criterion_of(name), chain().double()
    data = [(x.double(), y) for x, y in DATA]
    exact = criterion(model, data, ["0", "4"], progress=False, example_inputs=X.double())
    found = criterion(model, data, ["0", "4"], progress=False, example_inputs=X.double(), device="cuda")
    assert next(model.parameters()).device.type == "cpu"
    for layer, own in exact.values.items():
        assert torch.allclose(found.values[layer], own, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_vectors_of_the_layers_in_order(name: str) -> None:
    criterion = criterion_of(name)
    assert isinstance(criterion, Criterion)
    json.dumps(criterion.settings)
    assert "name" not in criterion.settings
    found = criterion(chain(), DATA, ["4", "0"], progress=False, example_inputs=X)
    if found.level == "layer":
        assert list(found.values) == ["4", "0"]
    assert {n: tuple(t.shape) for n, t in found.values.items()} == {"0": (6,), "4": (5,)}
    assert all(t.dtype == torch.float64 and t.device.type == "cpu" for t in found.values.values())
    assert found.name == criterion.name
    assert found.settings == criterion.settings
    assert found.samples == (2 if criterion.needs_data else 0)


@pytest.mark.parametrize("name", NAMES)
def test_data_are_asked_for_where_they_are_needed(name: str) -> None:
    criterion = criterion_of(name)
    if criterion.needs_data:
        with pytest.raises(errors.InputError, match=f"criterion '{criterion.name}' needs data.*such as 'weight'"):
            criterion(chain(), None, ["0"], example_inputs=X)
    else:
        assert criterion(chain(), None, ["0"], example_inputs=X).samples == 0


@pytest.mark.parametrize("name", ["batchnorm_scale", "weight:bn", "tp:LAMPImportance"])
def test_a_call_of_the_network_needs_something_to_call_it_with(name: str) -> None:
    criterion, model = criterion_of(name), chain()
    with pytest.raises(errors.InputError, match="neither"):
        criterion(model, None, ["0"])
    by_data = criterion(model, DATA, ["0", "4"], progress=False)
    by_example = criterion(model, None, ["0", "4"], example_inputs=(X,))
    assert all(torch.equal(t, by_example.values[n]) for n, t in by_data.values.items())


@pytest.mark.parametrize("name", [n for n in NAMES if n != "lrp"])
def test_not_a_number_is_named(name: str) -> None:
    """Trap 11."""
    model = chain()
    with torch.no_grad():
        model[4].weight[2, 0, 0, 0] = torch.nan
    criterion = criterion_of(name)
    if name in ("random", "batchnorm_scale"):
        assert criterion(model, DATA, ["4"], progress=False, example_inputs=X).values["4"].shape == (5,)
        return
    with pytest.raises(errors.NonFiniteError, match="'4' are not finite"):
        criterion(model, DATA, ["4"], progress=False, example_inputs=X)


def test_not_a_number_in_a_pass_of_relevance() -> None:
    x = X.clone()
    x[0, 0, 0, 0] = torch.inf
    for name in ("lrp", "taylor", "activation"):
        with pytest.raises(errors.NonFiniteError):
            criterion_of(name)(chain(), [(x, torch.tensor([0, 2]))], ["4"], progress=False)


# -- layers and data that do not fit -----------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "lrp", "random", "activation"])
def test_layers_that_do_not_exist(name: str) -> None:
    criterion = criterion_of(name)
    model = NETS["shared"].model().float()
    with pytest.raises(errors.InputError, match=r"'block.conv3'.*did you mean 'block.conv"):
        criterion(model, DATA, ["block.conv3"])
    with pytest.raises(errors.InputError, match=r"'bn0' is no layer.*BatchNorm2d"):
        criterion(model, DATA, ["bn0"])
    assert not criterion(model, DATA, [], progress=False).values


def test_data_that_are_read_once_only() -> None:
    with pytest.raises(errors.InputError, match="read once only"):
        criterion_of("activation")(chain(), (item for item in DATA), ["0"])
    with pytest.raises(errors.InputError, match="no sample"):
        criterion_of("activation")(chain(), [], ["0"])


def test_a_data_set_of_single_samples() -> None:
    with pytest.raises(errors.InputError, match=r"data gives single samples.*TensorDataset.*DataLoader"):
        criterion_of("activation")(chain(), torch.utils.data.TensorDataset(*DATA[0]), ["0"])


@pytest.mark.parametrize(
    "name", [n for n in NAMES if criterion_of(n).needs_data and not n.startswith("lrp")]
)  # fmt: skip
def test_samples_the_network_does_not_run_on(name: str) -> None:
    for x, got in ((X.double(), "float64"), (X[:, :2], r"\(\d, 2, 6, 6\)")):
        with pytest.raises(errors.InputError, match=f"Sequential does not run on.*{got}"):
            criterion_of(name)(chain(), [(x, DATA[0][1])], ["0", "4"], progress=False, example_inputs=X)


def test_what_is_no_network() -> None:
    with pytest.raises(errors.InputError, match=r"not an nn\.Module"):
        weight()(X, None, ["0"])  # type: ignore[arg-type]


# -- names -------------------------------------------------------------------------------


def test_every_name_makes_a_criterion() -> None:
    assert list(CRITERIA) == list(ENTRIES)
    assert all(about and "\n" not in about for about in CRITERIA.values())
    for name, entry in ENTRIES.items():
        if entry.free and name in ("captum", "tp"):
            with pytest.raises(errors.InputError, match=f"no {entry.free}"):
                criterion_of(name)
            continue
        assert criterion_of(name).name.startswith(name if name != "tp-taylor" else "tp:GroupTaylor")
        for word in entry.words:
            assert isinstance(criterion_of(f"{name}:{word}"), Criterion), word
    assert compress.criteria.criterion_of is criterion_of


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("weight", {"norm": "l1", "fold": None}),
        ("weight:l2", {"norm": "l2", "fold": None}),
        ("weight:bn:l2", {"norm": "l2", "fold": "bn"}),
        ("random:3", {"seed": 3}),
        ("random:seed=4", {"seed": 4}),
        ("gradient:published", {"aggregate": "abs_total", "loss": "cross_entropy", "read_at": "output"}),
        ("gradient:conv", {"aggregate": "abs_per_sample", "loss": "cross_entropy", "read_at": "conv"}),
        (
            "taylor:abs_element",
            {"aggregate": "abs_element", "loss": "cross_entropy", "read_at": "output", "on": "activation"},
        ),
        ("taylor:weight", {"aggregate": "abs_element", "loss": "cross_entropy", "on": "weight"}),
        ("taylor:cvpr2019", {"aggregate": "cvpr2019", "loss": "cross_entropy", "on": "weight"}),
        ("activation", {"aggregate": "abs_element", "read_at": "activated"}),
        ("ablation:loss", {"measure": "loss", "read_at": "output"}),
        ("hessian", {"loss": "cross_entropy"}),
    ],
)  # fmt: skip
def test_options_after_colons(spec: str, settings: dict[str, Any]) -> None:
    assert criterion_of(spec).settings == settings


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wieght", "did you mean 'weight'"),
        ("tailor", "did you mean 'taylor'"),
        ("zplus", "did you mean 'lrp:zplus'"),
        ("published", "'gradient:published'"),
        ("l2", "'weight:l2'"),
        ("weight:l3", "did you mean 'l"),
        ("weight:norm=l3", "unknown norm"),
        ("weight:order=2", "options among"),
        ("weight:l1:l2", "says norm twice"),
        ("random:x", "no integer"),
        ("random:1:2", "no option '2'"),
        ("hessian:signed", "no options"),
        ("fpgm:p=2", "no options"),
        ("activation:absolute", "no option 'absolute'"),
        ("", "no criterion ''"),
    ],
)
def test_names_that_are_misspelt(spec: str, message: str) -> None:
    with pytest.raises(errors.InputError, match=message):
        criterion_of(spec)


@pytest.mark.parametrize("spec", [3, None, nn.ReLU(), lrp, random, dict, {"0": X}])
def test_what_is_no_criterion(spec: Any) -> None:
    with pytest.raises(errors.InputError, match="no criterion"):
        criterion_of(spec)


def test_a_criterion_is_itself() -> None:
    criterion = weight("l2")
    assert criterion_of(criterion) is criterion
    assert repr(criterion) == "weight:l2(norm='l2', fold=None)"


def test_listing_the_names_needs_no_torch() -> None:
    code = "import sys, compress; print(len(compress.criteria.CRITERIA), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(len(CRITERIA)), "False"]


# -- random ------------------------------------------------------------------------------


def test_random_depends_on_seed_and_layer_alone() -> None:
    model = chain()
    state_before = torch.random.get_rng_state()
    one = random(3)(model, None, ["0", "4"])
    torch.manual_seed(5)
    two = random(3)(copy.deepcopy(model), DATA, ["4"])
    assert torch.equal(one.values["4"], two.values["4"])
    assert not torch.equal(one.values["0"][:5], one.values["4"])
    assert not torch.equal(random(4)(model, None, ["4"]).values["4"], two.values["4"])
    torch.random.set_rng_state(state_before)
    random(3)(model, None, ["0"])
    assert torch.equal(torch.random.get_rng_state(), state_before)
    wide = random(0)(hard(nn.Sequential(nn.Linear(2, 5000))), None, ["0"]).values["0"]
    assert 0 <= wide.min() <= wide.max() < 1
    assert wide.mean().item() == pytest.approx(0.5, abs=0.02)
    assert wide.std().item() == pytest.approx(12**-0.5, abs=0.02)


# -- a user's function -------------------------------------------------------------------


def test_a_function_of_ones_own() -> None:
    def mine(model: nn.Module, data: Any) -> dict[str, Any]:
        assert not model.training
        model[0].weight.data.zero_()
        return {"0": range(6), "4": None, "9": torch.ones(3), "2": "an activation is left aside"}

    model = chain().train()
    criterion = criterion_of(mine)
    assert not criterion.needs_data
    assert "mine" in criterion.settings["function"]
    found = criterion(model, None, ["0", "4"])
    assert found.name == "mine"
    assert found.values["0"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.unscored == {"4": "mine gives it no score"}
    assert bool(model[0].weight.any())
    assert model.training


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "no dictionary"),
        ({"00": [1.0] * 6}, r"does not exist: '00'.*did you mean '0'"),
        ({"0": [1.0] * 5}, "6 numbers.*shape \\(5,\\)"),
        ({"0": torch.ones(6, 1)}, "6 numbers"),
        ({"0": 1.0}, "6 numbers"),
        ({"0": ["a"] * 6}, "6 numbers"),
        ({}, "scored none of the layers"),
        ({"2": torch.ones(6)}, "scored none of the layers"),
    ],
)
def test_functions_that_return_something_else(result: Any, message: str) -> None:
    with pytest.raises(errors.InputError, match=message):
        criterion_of(lambda model, data: result)(chain(), None, ["0", "4"])


def test_functions_that_do_not_take_the_data() -> None:
    with pytest.raises(errors.InputError, match=r"f\(model, data\).*Got: <lambda>\(model\)"):
        criterion_of(lambda model: {"0": torch.ones(6)})(chain(), None, ["0"])


def test_functions_that_return_no_numbers() -> None:
    with pytest.raises(errors.NonFiniteError, match=r"'0' are not finite.*1 of 6 channels, first 3"):
        criterion_of(lambda model, data: {"0": [1, 2, 3, torch.nan, 5, 6]})(chain(), None, ["0"])


def test_functions_may_take_gradients() -> None:
    def saliency(model: nn.Module, data: Any) -> dict[str, Tensor]:
        for x, y in data:
            F.cross_entropy(model(x), y).backward()
        return {n: m.weight.grad.abs().flatten(1).sum(1) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    model = chain()
    found = criterion_of(saliency)(model, DATA, ["0", "4"])
    assert bool((found.values["0"] > 0).any())
    assert model[0].weight.grad is None


def test_an_object_with_the_four_attributes() -> None:
    class Mine:
        name, settings, needs_data, needs_labels = "mine", {"p": 2}, False, False

        def __call__(self, model: nn.Module, data: Any, layers: Any, **others: Any) -> Scores:
            return Scores({n: torch.ones(2) for n in layers}, name=self.name)

    criterion = Mine()
    assert criterion_of(criterion) is criterion
    with pytest.raises(errors.InputError, match="call it"):
        criterion_of(Mine)


# -- scores ------------------------------------------------------------------------------


def test_scores_are_kept_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scores = Scores(
        {"b": torch.tensor([1.0, -2.5]), "a": torch.arange(3)}, {"gate": "a gate"}, "mine", {"k": [1, None]}, 7, "group"
    )
    scores.save(path)
    found = Scores.load(path)
    assert list(found.values) == ["b", "a"]
    assert all(torch.equal(found.values[n], t) for n, t in scores.values.items())
    for key in ("unscored", "name", "settings", "samples", "level"):
        assert getattr(found, key) == getattr(scores, key)
    with pytest.raises(errors.DataError):
        scores.save(tmp_path / "none" / "scores")
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(errors.FileFormatError):
        Scores.load(path)
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "none")


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, "other", {"a": torch.ones(2)}, {})
    with pytest.raises(errors.FileFormatError):
        Scores.load(path)
    write_tensors(path, "compress.Scores", {"a": torch.ones(2)}, {"colour": "red"})
    with pytest.raises(errors.FileFormatError, match="does not hold scores"):
        Scores.load(path)
    write_tensors(path, "compress.Scores", {"a": torch.ones(2, 2)}, {"name": "mine"})
    with pytest.raises(errors.FileFormatError, match="does not hold scores"):
        Scores.load(path)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers(wrong: float) -> None:
    with pytest.raises(errors.NonFiniteError, match="scores of 'b' are not finite"):
        Scores({"a": torch.ones(2), "b": torch.tensor([1.0, wrong])})


def test_scores_that_do_not_fit() -> None:
    with pytest.raises(errors.InputError, match="'a' are no vector"):
        Scores({"a": torch.ones(2, 2)})
    with pytest.raises(errors.InputError, match="'a' are no vector"):
        Scores({"a": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(errors.InputError, match="in both"):
        Scores({"a": torch.ones(2)}, {"a": "why"})
    with pytest.raises(errors.InputError, match="level"):
        Scores({}, level="filter")
    with pytest.raises(errors.InputError, match=r"scores of 'a' do not fit its channels.*3 numbers"):
        Scores({"a": torch.ones(2)}).check({"a": 3})
    own = Scores({"a": torch.ones(2)})
    assert own.check({"b": 3}) is own


def test_scores_are_printed() -> None:
    scores = Scores({"conv1": torch.tensor([0.5, 2, 3]), "empty": torch.ones(0)}, {"gate": "a gate"}, "mine", {}, 7)
    assert str(scores).splitlines() == [
        "mine, 7 samples",
        "layer  channels  lowest  median  highest",
        "conv1         3     0.5       2        3",
        "empty         0",
        "gate: no score (a gate)",
    ]
    assert repr(scores) == "Scores(mine: 3 channels in 2 layers, 1 not scored)"


# -- in planning -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lrp:zplus", "weight:bn", "batchnorm_scale", "tp-taylor", "taylor", "random:1"])
def test_a_plan_by_name(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b, self.fc = conv(3, 8), nn.BatchNorm2d(8), conv(8, 8), nn.Linear(8, 3)
            self.bn2 = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.bn2(self.b(F.relu(self.bn(self.a(x)))))).mean((2, 3)))

    model = hard(Net())
    plan = compress.plan_pruning(
        model, X, DATA, criterion=name, target=compress.Target(channels=0.5), round_to=1, progress=False
    )
    assert sum(len(c) for c in plan.removed.values()) == 8
    assert plan.apply(model)(X).shape == (2, 3)
    json.dumps(plan.settings)
