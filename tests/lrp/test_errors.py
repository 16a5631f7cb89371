"""Bad input: a typed error that says what was expected, what came, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp
from lrp import errors, rules

X = torch.ones(2, 4)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


class Sorts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), _Sort())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Sort(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(torch.cos(x))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x * 2


class Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 2, 2).sum(2)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(4)


class EndsInSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.fc(x), 1)


def with_nan() -> nn.Module:
    model = mlp()
    model[0].weight.data[0, 0] = float("nan")
    return model


def train_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()


def train_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)).train()


class InDict(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x * 2}


class ConstantOnTheLeft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.w, x.reshape(-1, 2, 2)).sum(2)


class ClampsByTensor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, torch.zeros(4), torch.ones(4))


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long().float() * 2


class StraightThrough(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 3
        return x * 2 + y


MODELS: list[tuple[Any, type[Exception], str]] = [
    (Sorts, errors.UnsupportedOperationError, "'inner.1' has no rule"),
    (Branches, errors.ExportError, "can not be captured"),
    (Pair, errors.OutputError, "does not return one tensor"),
    (InDict, errors.OutputError, "inside a container"),
    (ConstantOnTheLeft, errors.UnsupportedOperationError, "constant matrix"),
    (ClampsByTensor, errors.UnsupportedOperationError, "clamp"),
    (Rounds, errors.UnsupportedOperationError, "int64"),
    (Integers, errors.OutputError, "floating-point"),
    (FixedBatch, errors.ExportError, "batch"),
    (Random, errors.PlanError, "differs"),
    (EndsInSoftmax, errors.UnsupportedOperationError, "return the logits"),
    (with_nan, errors.NonFiniteError, "'0.weight'"),
    (train_norm, errors.ModeError, "'1'.*eval"),
    (train_dropout, errors.ModeError, "'1'.*eval"),
    (lambda: torch.jit.script(mlp()), errors.ExportError, "script"),
    (lambda: "model", errors.InputError, "nn.Module"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.script on its way out
@pytest.mark.parametrize(("make", "error", "text"), MODELS, ids=[m[2] for m in MODELS])
def test_bad_models(make: Any, error: type[Exception], text: str) -> None:
    model = make()
    if isinstance(model, nn.Module) and error is not errors.ModeError:
        model.eval()
    with pytest.raises(error, match=text) as caught:
        lrp.attribute(model, X)
    assert isinstance(caught.value, errors.LRPError)
    assert "Expected:" in str(caught.value)
    assert "What to do:" in str(caught.value)


INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.ones(0, 4)}, errors.InputError, "empty"),
    ({"x": torch.full((2, 4), float("nan"))}, errors.NonFiniteError, "8 of 8"),
    ({"x": torch.tensor([[1.0, 2, 3, float("inf")]])}, errors.NonFiniteError, "1 of 4"),
    ({"x": torch.ones(2, 4).long()}, errors.InputError, "floating-point"),
    ({"x": [[1.0, 2.0]]}, errors.InputError, "not a tensor"),
    ({"x": torch.ones(2, 4).numpy()}, errors.InputError, "not a tensor"),
    ({"target": 3}, errors.TargetError, "0 <= target < 3"),
    ({"target": -1}, errors.TargetError, "out of range"),
    ({"target": torch.tensor([0, 1, 2])}, errors.TargetError, "number of targets"),
    ({"target": torch.tensor([0.0, 1.0])}, errors.TargetError, "class indices"),
    ({"target": True}, errors.TargetError, "truth value"),
    ({"target": "cat"}, errors.TargetError, "class ind"),
    ({"start": "logits"}, errors.TargetError, "unknown start"),
    ({"start": torch.ones(2, 4)}, errors.InputError, "does not fit the output"),
    ({"start": torch.full((2, 3), float("nan"))}, errors.NonFiniteError, "not finite"),
    ({"start": torch.ones(2, 3), "target": 1}, errors.TargetError, "no meaning"),
    ({"x": torch.ones(2, 5)}, errors.InputError, "does not run on an input"),
    ({"target": ["a", "b"]}, errors.TargetError, "class indices"),
    ({"target": [True, False]}, errors.TargetError, "truth values"),
    ({"layers": ["0"]}, errors.InputError, "is asked for"),
    ({"wrt": "layers", "layers": "nonsense"}, errors.PlanError, "'nonsense'"),
    ({"wrt": "inputs"}, errors.InputError, "unknown"),
    ({"composite": "epsilon_pluss"}, errors.CompositeError, "epsilon_plus"),
    ({"composite": rules.ZPlus}, errors.CompositeError, "call it"),
    ({"composite": lrp.Composite([(nn.Conv2d, rules.ZPlus())])}, errors.CompositeError, "no rule for layer '0'"),
    ({"composite": rules.ZBox([0.0] * 3, [1.0] * 3)}, errors.BoundsError, "does not fit"),
]


@pytest.mark.parametrize(("kwargs", "error", "text"), INPUTS, ids=[i[2] + str(k) for k, i in enumerate(INPUTS)])
def test_bad_calls(kwargs: dict[str, Any], error: type[Exception], text: str) -> None:
    call = {"x": X, **kwargs}
    with pytest.raises(error, match=text) as caught:
        lrp.attribute(mlp(), call.pop("x"), **call)
    assert "Expected:" in str(caught.value)


def test_gradient_of_another_kind_is_refused() -> None:
    with pytest.raises(errors.PlanError, match="gradient of the plan differs"):
        lrp.attribute(StraightThrough().eval(), X, composite="gradient")


def test_model_of_another_type() -> None:
    model = mlp()
    plan = lrp.prepare(model, X)
    model.double()
    with pytest.raises(errors.PlanError, match="shape or type"):
        plan.attribute(X)


def test_relevance_on_a_zero_output() -> None:
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    with pytest.raises(errors.TargetError, match="output that is 0"):
        lrp.attribute(model, X, start=torch.ones(2, 2))
    with pytest.raises(errors.TargetError, match="output that is 0"):
        lrp.attribute(model, X, 0, start="one_hot")


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(None, 1.0, "no lower bound"), (0.0, None, "no higher bound"), (1.0, 0.0, "inverted"),
     ([0.0, 0.0], [1.0, -1.0], "inverted"), (float("-inf"), 1.0, "not finite"), ([0.0] * 2, [1.0] * 3, "fit")],
)  # fmt: skip
def test_box_bounds(low: Any, high: Any, text: str) -> None:
    with pytest.raises(errors.BoundsError, match=text):
        rules.ZBox(low, high)


def test_box_without_bounds_by_name() -> None:
    with pytest.raises(errors.BoundsError, match="no lower bound"):
        lrp.attribute(nn.Sequential(nn.Conv2d(1, 1, 1)).eval(), torch.ones(1, 1, 2, 2), composite="epsilon_gamma_box")


def test_leaving_the_box_warns() -> None:
    with pytest.warns(RuntimeWarning, match="leaves the box"):
        lrp.attribute(mlp(), X * 3, composite=lrp.Composite([("first", rules.ZBox(-1, 1)), ("*", rules.Epsilon())]))


@pytest.mark.parametrize(
    "make", [lambda: rules.Epsilon(-1.0), lambda: rules.Gamma(float("nan")), lambda: rules.ZPlus(epsilon=-1)]
)
def test_rule_parameters(make: Any) -> None:
    with pytest.raises(errors.RuleError, match="out of range"):
        make()


def test_composite_parameters() -> None:
    with pytest.raises(errors.CompositeError, match="unknown matcher"):
        lrp.Composite([(3, rules.Epsilon())])
    with pytest.raises(errors.CompositeError, match="not a rule"):
        lrp.Composite([("*", rules.Epsilon)])
    with pytest.raises(errors.CompositeError, match="stabilise_sums"):
        lrp.Composite([], -1.0)
    with pytest.raises(errors.CompositeError, match="list of pairs"):
        lrp.Composite([nn.Linear, rules.ZPlus()])  # type: ignore[list-item]


def test_plan_of_another_shape_or_type() -> None:
    plan = lrp.prepare(mlp(), X)
    with pytest.raises(errors.PlanError, match="shape"):
        plan.attribute(torch.ones(2, 5))
    with pytest.raises(errors.PlanError, match="float64"):
        plan.attribute(X.double())
    with pytest.raises(errors.InputError, match="composite already"):
        lrp.attribute(plan, X, composite="epsilon")


def test_switching_to_train_mode_is_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    lrp.attribute(model, X)
    model.train()
    with pytest.raises(errors.ModeError):
        lrp.attribute(model, X)


def test_weights_that_turn_nan_later() -> None:
    model = mlp()
    lrp.attribute(model, X, composite="epsilon")
    model[2].bias.data[0] = float("inf")
    with pytest.raises(errors.NonFiniteError, match=r"'2\.bias'"):
        lrp.attribute(model, X, composite="epsilon")


def test_entries_that_fit_no_layer_are_named_in_the_plan() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    composite = lrp.Composite(
        [("haed.*", lrp.rules.Gamma()), (nn.Conv2d, lrp.rules.ZPlus()), ("*", lrp.rules.Epsilon())]
    )
    assert "entries that fit no layer: 'haed.*', Conv2d" in str(lrp.prepare(net, torch.zeros(1, 3), composite))


def test_layers_restrict_everything_of_modules() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    rel = lrp.attribute(net, torch.ones(1, 3), 1, wrt=("layers", "channels", "weights"), layers="0")
    assert list(rel.layers) == list(rel.channels) == ["0"]
    assert set(rel.weights) == {"0.weight", "0.bias"}
    with pytest.raises(lrp.errors.InputError, match="relevance of modules"):
        lrp.attribute(net, torch.ones(1, 3), 1, layers="0")


def test_wrong_use_that_used_to_be_raw() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.ones(1, 3)
    with pytest.raises(lrp.errors.InputError, match="no such backend"):
        lrp.prepare(net, x, compile="nope")
    with pytest.raises(lrp.errors.RuleError, match=r"AlphaBeta\(2, 1\)"):
        lrp.rules.AlphaBeta(2, -1)
    for wrong in ("small", None, True, -1.0):
        with pytest.raises(lrp.errors.RuleError):
            lrp.rules.Epsilon(wrong)
    with pytest.raises(lrp.errors.InputError, match="without a shape"):
        lrp.attribute(nn.Sequential(nn.LazyLinear(3)).eval(), x)
    plan = lrp.prepare(net, x)
    net.train()
    with pytest.raises(lrp.errors.PlanError, match=r"training mode.*model\.eval"):
        plan.attribute(x)


def test_depth_borders_belong_to_the_upper_part() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5))).eval()  # depths 0, .25, .5, .75, 1
    pairs = [((0.0, 0.5), lrp.rules.Gamma()), ((0.5, 1.0), lrp.rules.ZPlus())]
    lines = str(lrp.prepare(net, torch.zeros(1, 3), lrp.Composite(pairs))).splitlines()[2:7]
    assert [line.split()[1][:5] for line in lines] == ["Gamma", "Gamma", "ZPlus", "ZPlus", "ZPlus"]


def test_inputs_and_starts_without_real_values() -> None:
    net, x = nn.Sequential(nn.Linear(3, 2)).eval(), torch.ones(1, 3)
    for wrong in (x.to("meta"), x.to_sparse()):
        with pytest.raises(lrp.errors.InputError, match="no values to read"):
            lrp.attribute(net, wrong)
    with pytest.raises(lrp.errors.InputError, match="is complex"):
        lrp.attribute(net, x, start=lrp.Seed(torch.ones(1, 2, dtype=torch.complex64)))
    with pytest.raises(lrp.errors.CompositeError, match="no layer type"):
        lrp.First("conv")


def test_a_gradient_mode_takes_no_rules() -> None:
    for options in ({"rules": [("*", lrp.rules.Epsilon())]}, {"stabilise_sums": 1e-6}, {"attention": "attn_lrp"}):
        with pytest.raises(lrp.errors.CompositeError, match="uses no rules"):
            lrp.Composite(mode="gradient", **options)
