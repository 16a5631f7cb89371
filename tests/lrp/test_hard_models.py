"""Models that are hard on the planner: sums of constants, mixed samples, edits, aliases, wrappers, threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp
from lrp import rules
from lrp.plan import Plan


def _closes(rel: lrp.Relevance, limit: float = 1e-11) -> bool:
    return bool((rel.ledger.gap.abs() <= limit * rel.ledger.magnitude()).all())


class Call(nn.Module):
    """A forward pass from a function, with some modules and tensors."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


SUMS: dict[str, Any] = {
    "h + h": lambda m, h: h + h,
    "h - h / 2": lambda m, h: torch.sub(h, h, alpha=0.5),
    "where": lambda m, h: torch.where(m.mask > 0, h, m.tokens),
    "where, constant first": lambda m, h: torch.where(m.mask > 0, m.tokens, h),
    "where, number": lambda m, h: torch.where(m.mask > 0, h, 0.5),
    "where, number first": lambda m, h: torch.where(m.mask > 0, -2.0, h),
    "constant - h": lambda m, h: m.tokens - h,
    "number - h": lambda m, h: 3.0 - 2 * h,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_choices_are_booked(name: str) -> None:
    parts = {"mask": torch.tensor([1.0, 0, 1, 0, 0, 1]), "tokens": torch.linspace(-1, 2, 6)}
    model = Call(lambda m, x: m.f(SUMS[name](m, F.relu(m.e(x)))), e=nn.Linear(4, 6), f=nn.Linear(6, 3), **parts)
    rel = lrp.attribute(model, _random(5, 4), composite="epsilon")
    assert _closes(rel)
    assert bool((rel.ledger.constant != 0).any()) == (name not in ("h + h", "h - h / 2"))


def test_dead_share_in_float32_is_what_was_not_delivered() -> None:
    layer = nn.Linear(2, 1, bias=False).eval()
    layer.weight.data[:] = torch.tensor([[-1000.0, 1e-3]])
    rel = lrp.attribute(layer, torch.ones(1, 2), composite=rules.ZPlus())
    assert _closes(rel, 1e-6)
    assert rel.input.sum() < -990


def _attend(m: Any, x: Tensor) -> Tensor:
    tokens = x[:, None].expand(-1, 2, -1)  # batch_first is forgotten
    return m.f(m.a(tokens, tokens, tokens)[0].mean(1))


MIXES: dict[str, Any] = {
    "mean over the batch": (lambda m, x: m.f(x - x.mean(0, keepdim=True)), {}),
    "roll along the batch": (lambda m, x: m.f(x + x.roll(1, 0)), {}),
    "softmax over the batch": (lambda m, x: m.f(x) * torch.softmax(m.f(x), 0), {}),
    "attention over the batch": (_attend, {"a": nn.MultiheadAttention(4, 2)}),
    "divided by the batch's maximum": (lambda m, x: m.f(x / x.amax()), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_mixed_samples_are_refused(name: str) -> None:
    function, parts = MIXES[name]
    model = Call(function, f=nn.Linear(4, 3), **parts)
    refusals = (lrp.errors.ModeError, lrp.errors.UnsupportedOperationError)
    with pytest.raises(refusals, match=r"influence each|batch axis"):
        lrp.attribute(model, _random(4, 4), composite="epsilon")


def test_edits_outside_parameters_are_seen() -> None:
    x = _random(3, 4)

    def make() -> Call:
        model = Call(lambda m, x: m.act(m.f(x)) * m.scale * m.gains[0], f=nn.Linear(4, 3))
        model.scale, model.gains, model.act = torch.full((3,), 2.0, dtype=torch.float64), [1.0, 2.0], torch.relu
        return model

    def edit_in_place(m: Any) -> None:
        m.scale.data.mul_(3)

    def replace(m: Any) -> None:
        m.scale = torch.full((3,), 5.0, dtype=torch.float64)

    def edit_list(m: Any) -> None:
        m.gains[0] = 7.0

    def swap_function(m: Any) -> None:
        m.act = F.silu

    def patch(m: Any) -> None:
        m.function = lambda m, x: m.f(x)

    for edit in (edit_in_place, replace, edit_list, swap_function, patch):
        model = make()
        lrp.attribute(model, x, composite="epsilon")
        edit(model)
        assert torch.allclose(lrp.attribute(model, x, composite="epsilon").output, model(x)), edit.__name__


def test_an_alias_made_before_an_in_place_call() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.e(x)
        view = h.view(-1, 2, 3)
        h = h.relu_()
        return m.f(h) + m.g(view.flatten(1))

    model = Call(function, e=nn.Linear(4, 6), f=nn.Linear(6, 3), g=nn.Linear(6, 3))
    x = _random(5, 4)
    rel = lrp.prepare(model, torch.zeros(1, 4, dtype=torch.float64), "epsilon").attribute(x)
    assert torch.allclose(rel.output, model(x), atol=1e-13)
    assert _closes(rel)


def test_tracked_instance_norm_is_an_affine_map() -> None:
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(12, 2)).double().eval()
    x = _random(4, 3, 4)
    rel = lrp.attribute(model, x, 1, composite=rules.Epsilon(0.0))
    plain = lrp.attribute(model, x, 1, composite="gradient_x_input")
    assert torch.allclose(rel.input, plain.input, atol=1e-12)
    assert _closes(rel)


def test_pass_rule_in_front_of_a_relu() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    composite = lrp.Composite([("0", rules.Pass()), ("*", rules.Epsilon())])
    rel = lrp.attribute(model, _random(5, 4), composite=composite, wrt=("input", "layers"))
    assert torch.allclose(rel.input, rel.layers["1"], atol=1e-13)
    assert _closes(rel)


def test_wrapped_models_and_star_arguments() -> None:
    inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(3, 4)
    expected = lrp.attribute(inner, x).input
    assert torch.equal(lrp.attribute(nn.DataParallel(inner).eval(), x).input, expected)
    assert torch.equal(lrp.attribute(torch.compile(inner, backend="eager"), x).input, expected)

    class Star(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = inner

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.net(inputs[0])

    assert torch.equal(lrp.attribute(Star().eval(), x).input, expected)


def test_tied_weights_have_the_name_of_named_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)).double().eval()
    model[2].weight = model[0].weight
    x = _random(3, 4)
    for composite in ("epsilon", "gradient"):
        rel = lrp.attribute(model, x, 1, composite=composite, wrt="weights")
        assert set(rel.weights) == {name for name, _ in model.named_parameters()}
    leaf = model[0].weight
    (g,) = torch.autograd.grad(model(x)[:, 1].sum(), leaf)
    assert torch.allclose(rel.weights["0.weight"], g, atol=1e-12)


def test_box_bounds_lie_along_the_channels() -> None:
    low = torch.arange(4, dtype=torch.float64) - 8
    model = Call(lambda m, x: m.f(x).mean(1), f=nn.Linear(4, 3))
    x = _random(2, 4, 4)
    one = lrp.attribute(model, x, 0, composite=rules.ZBox(low, low + 16))
    two = lrp.attribute(model, x, 0, composite=rules.ZBox(low.expand(4, 4), (low + 16).expand(4, 4)))
    assert torch.equal(one.input, two.input)
    conv = nn.Conv1d(4, 2, 3, padding=1).double().eval()
    three = lrp.attribute(conv, x, start=lrp.Seed(torch.ones(2, 2, 4).double()), composite=rules.ZBox(low, low + 16))
    wide = low[:, None].expand(4, 4)
    four = lrp.attribute(conv, x, start=lrp.Seed(torch.ones(2, 2, 4).double()), composite=rules.ZBox(wide, wide + 16))
    assert torch.equal(three.input, four.input)


def test_attributes_written_in_forward_are_put_back() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.last = torch.relu(m.f(x))
        return m.last

    model = Call(function, f=nn.Linear(4, 3))
    model.calls = 0
    plan = lrp.prepare(model, _random(2, 4), "epsilon")
    plan.attribute(_random(2, 4))
    assert model.calls == 0
    assert not hasattr(model, "last")


def test_derived_weights_made_in_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with torch.inference_mode():
        inside = lrp.attribute(model, torch.ones(2, 4), composite=rules.Gamma()).input
    assert torch.equal(inside, lrp.attribute(model, torch.ones(2, 4), composite=rules.Gamma()).input)


def test_mask_filled_piece_by_piece() -> None:
    """Writes into a fresh constant: run as they are, at every batch size."""

    def function(m: Any, x: Tensor) -> Tensor:
        mask = x.new_zeros((4, 4))
        for i, rows in enumerate((slice(0, 2), slice(2, 4))):
            mask[rows, :2] = i + 1.0
        mask = torch.where(mask > 1, -1.0, 1.0) * torch.ones_like(x)
        return m.f((x * mask).flatten(1))

    model = Call(function, f=nn.Linear(16, 3))
    for n in (1, 3):
        x = _random(n, 4, 4)
        rel = lrp.attribute(model, x, 1, composite=rules.Epsilon(0.0))
        assert torch.allclose(rel.output, model(x), atol=1e-13)
        assert torch.allclose(rel.input, lrp.attribute(model, x, 1, composite="gradient_x_input").input, atol=1e-12)
        assert _closes(rel)


def test_threads_and_models_do_not_mix() -> None:
    """Two models, four threads, cold plans: the numbers of a serial run."""
    models = [Call(lambda m, x: m.f(F.relu(m.e(x))), e=nn.Linear(4, 6), f=nn.Linear(6, 3)) for _ in range(2)]
    jobs = [(models[i % 2], _random(3, 4), composite) for i in range(8) for composite in ("epsilon", rules.Gamma())]
    serial = [lrp.attribute(copy.deepcopy(m), x, 1, composite=c, wrt=("input", "weights")) for m, x, c in jobs]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(
            pool.map(lambda j: lrp.attribute(j[0], j[1], 1, composite=j[2], wrt=("input", "weights")), jobs)
        )
    for one, two in zip(serial, threaded, strict=True):
        assert torch.equal(one.input, two.input)
        assert all(torch.equal(one.weights[k], two.weights[k]) for k in one.weights)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's compiler about itself
@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus", rules.Gamma()], ids=str)
def test_the_running_plan_compiles(composite: Any) -> None:
    """The program is one graph without side effects: fullgraph compilation changes no number."""
    from lrp._program import Wanted

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    plan: Plan = lrp.prepare(model, x, composite)
    program = plan._core.program(Wanted())
    table = plan._core.bound.table(model)
    constants = [table[key] for key in program.constants]

    def run(module: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        return leaf * torch.autograd.grad(module(leaf, *constants)[0][:, 1].sum(), leaf)[0]

    compiled = run(torch.compile(program.module, fullgraph=True, backend="aot_eager"))
    assert torch.allclose(compiled, run(program.module), atol=1e-6)
    assert torch.allclose(compiled, plan.attribute(x, 1).input, atol=1e-6)


def test_tensors_stored_by_forward_are_put_back() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        m.last = m.f(x)
        return m.last

    model = Call(function, f=nn.Linear(3, 4))
    kept = model(_random(5, 3))
    lrp.attribute(model, _random(2, 3), 1)
    assert model.last is kept


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrised_layers_are_called_by_their_own_name() -> None:
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    model = nn.Sequential(parametrised, nn.ReLU(), nn.Linear(6, 2)).double().eval()
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    with torch.no_grad():
        plain[0].weight.copy_(parametrised.weight)
        plain[0].bias.copy_(parametrised.bias)
        plain[2].load_state_dict(model[2].state_dict())
    x = _random(3, 4)
    composite = lrp.Composite([("0", rules.Gamma()), ("*", rules.ZPlus())])
    one, two = (
        lrp.attribute(m, x, 1, composite=composite, wrt=("input", "weights", "channels")) for m in (model, plain)
    )
    assert torch.allclose(one.input, two.input, atol=1e-12)
    assert set(one.weights) == set(two.weights)
    assert torch.allclose(one.weights["0.weight"], two.weights["0.weight"], atol=1e-12)
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.ReLU()).double().eval()
    assert lrp.attribute(old, x, 1).input.shape == x.shape


def test_a_branch_on_the_number_of_samples_is_refused() -> None:
    model = Call(lambda m, x: m.f(x) if x.shape[0] > 1 else 2 * m.f(x), f=nn.Linear(3, 2))
    with pytest.raises(lrp.errors.LRPError, match=r"number of samples|every batch size"):
        lrp.attribute(model, _random(1, 3), 0)


def test_stabiliser_of_constant_denominators_is_not_dead() -> None:
    layer = nn.Linear(3, 2).double().eval()
    with torch.no_grad():
        layer.weight.mul_(1e-4)
        layer.bias.fill_(1.0)
    books = lrp.attribute(layer, _random(4, 3), 0, composite=rules.WSquare(ignore_bias=True)).ledger
    assert books.dead.abs().max() == 0
    assert (books.stabiliser > 0.9).all()
