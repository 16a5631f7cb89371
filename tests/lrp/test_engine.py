"""What the engine promises beside the rules: results, starts, books, and a model left alone."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp
from lrp import rules


class Residual(nn.Module):
    """Batch norms in all places, a reused module, in-place and functional operations, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0 = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.squeeze = nn.Conv2d(4, 2, 1)
        self.excite = nn.Conv2d(2, 4, 1)
        self.pre = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(x)
        y = self.relu(self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(y))
        z = self.bn2(self.conv2(self.relu(z)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(z, 1)))))
        z = z * gate
        z += y
        z = F.max_pool2d(self.relu(z), 2)
        w = F.avg_pool2d(y, 2)
        u = F.relu6(self.pre(torch.cat([z, w], 1)))
        return self.head(F.leaky_relu(self.last(u), 0.1).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    net = Residual()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias, std=0.2)
    return net.double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64)


ALL = ("input", "layers", "channels", "weights")
COMPOSITES = ["epsilon", "epsilon_plus", lrp.composites.epsilon_gamma_box(-20.0, 20.0), rules.Gamma()]


@pytest.mark.parametrize("composite", COMPOSITES, ids=str)
def test_books_close(model: nn.Module, x: Tensor, composite: Any) -> None:
    rel = lrp.attribute(model, x, composite=composite, wrt=ALL)
    assert torch.allclose(rel.output, model(x), atol=1e-12)
    books = rel.ledger
    assert (books.gap.abs() <= 1e-12 * books.magnitude()).all()
    for row in books.modules.values():
        assert (row.gap.abs() <= 1e-11 * (row.start.abs() + row.bias.abs() + 1)).all()
    assert torch.allclose(books.input, rel.input.sum((1, 2, 3)), atol=1e-12)
    assert set(rel.unexplained) >= {"squeeze", "excite"}
    assert "excite" not in rel.layers
    assert "total" in str(books)
    assert torch.allclose(rel.layers[""] if "" in rel.layers else rel.layers["head"], _start(rel), atol=1e-12)


def _start(rel: lrp.Relevance) -> Tensor:
    return torch.zeros_like(rel.output).scatter(1, rel.target[:, None], rel.output.gather(1, rel.target[:, None]))


@pytest.mark.parametrize("composite", COMPOSITES, ids=str)
def test_filter_and_weight_sums(model: nn.Module, x: Tensor, composite: Any) -> None:
    """Channels are layers summed over space; a filter's weights carry its relevance but bias and stabiliser."""
    rel = lrp.attribute(model, x, composite=composite, wrt=ALL)
    for name, channel in rel.channels.items():
        layer = rel.layers[name]
        assert torch.allclose(channel, layer.flatten(2).sum(2) if layer.ndim > 2 else layer, atol=1e-12), name
    calls = {n: [r for m, r in rel.ledger.modules.items() if m.split("@")[0] == n] for n in ("conv1", "conv2", "head")}
    for name, rows in calls.items():
        assert len(rows) == (2 if name == "conv2" else 1)
        own = sum(r.start - r.bias - r.stabiliser - r.dead for r in rows).sum()
        if name == "conv1" and isinstance(composite, lrp.Composite):
            continue  # the box rule: some of R is lost where the input of the layer is 0
        assert torch.allclose(rel.weights[f"{name}.weight"].sum(), own, atol=1e-10), name


def test_reused_module_equals_unrolled_copy(model: nn.Module, x: Tensor) -> None:
    class Unrolled(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.conv3, self.bn3 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm0(x)
            y = F.relu(self.bn1(self.conv1(x)))
            z = self.bn2(self.conv2(y))
            z = self.bn3(self.conv3(F.relu(z)))
            gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(z, 1)))))
            z = F.max_pool2d(F.relu(z * gate + y), 2)
            u = F.relu6(self.pre(torch.cat([z, F.avg_pool2d(y, 2)], 1)))
            return self.head(F.leaky_relu(self.last(u), 0.1).mean((2, 3)))

    other = Unrolled()
    state = model.state_dict()
    state.update({k.replace("conv2", "conv3").replace("bn2", "bn3"): v for k, v in state.items() if "2" in k})
    other.load_state_dict(state)
    other.double().eval()
    one = lrp.attribute(model, x, 2, composite="epsilon_plus", wrt=ALL)
    two = lrp.attribute(other, x, 2, composite="epsilon_plus", wrt=ALL)
    assert torch.allclose(one.input, two.input, atol=1e-13)
    both = two.weights["conv2.weight"] + two.weights["conv3.weight"]
    assert torch.allclose(one.weights["conv2.weight"], both, atol=1e-13)
    assert torch.allclose(one.layers["conv2@1"], two.layers["conv3"], atol=1e-13)


def test_folded_equals_unfolded_by_hand(x: Tensor) -> None:
    """BatchNorm behind a convolution: as if folded by hand, also with negative scales."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    conv, bn = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double()
    nn.init.normal_(bn.weight)
    bn.running_mean.normal_()
    model = nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(4, 2, 3).double()).eval()
    by_hand = nn.Sequential(fuse_conv_bn_eval(conv.eval(), bn.eval()), nn.ReLU(), model[3]).eval()
    c = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    for rule in (rules.Epsilon(), rules.Gamma(), rules.ZPlus()):
        a = lrp.attribute(model, x, start=lrp.Seed(c), composite=rule, wrt=("input", "weights"))
        b = lrp.attribute(by_hand, x, start=lrp.Seed(c), composite=rule, wrt=("input", "weights"))
        assert torch.allclose(a.input, b.input, atol=1e-12)
        assert torch.allclose(a.weights["0.weight"], b.weights["0.weight"], atol=1e-12)


def test_starts(model: nn.Module, x: Tensor) -> None:
    out = model(x).detach()
    plan = lrp.prepare(model, x, "epsilon")
    top = out.argmax(1)
    assert torch.equal(plan.attribute(x).target, top)
    assert torch.equal(plan.attribute(x, top).input, plan.attribute(x).input)
    rows = torch.arange(4)

    def total(**kwargs: Any) -> Tensor:
        return plan.attribute(x, **kwargs).ledger.start

    assert torch.allclose(total(target=3), out[:, 3])
    assert torch.allclose(total(target=3, start="one_hot"), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(total(target=3, start="probability"), torch.softmax(out, 1)[:, 3])
    others = out.clone()
    others[:, 3] = -math.inf
    assert torch.allclose(total(target=3, start="margin"), out[:, 3] - others.max(1).values)
    relevance = torch.randn_like(out)
    assert torch.allclose(total(start=relevance), relevance.sum(1))
    c = torch.randn_like(out)
    assert torch.allclose(total(start=lrp.Seed(c)), (c * out).sum(1))
    logit = plan.attribute(x, 3).input
    scaled = plan.attribute(x, 3, start="one_hot").input
    assert torch.allclose(logit, scaled * out[rows, 3, None][:, :, None, None], atol=1e-12)


def test_linear_in_the_seed_and_batch_invariant(model: nn.Module, x: Tensor) -> None:
    plan = lrp.prepare(model, x, lrp.composites.epsilon_gamma_box(-20.0, 20.0))
    c, d = torch.randn(2, 4, 6, dtype=torch.float64)
    sum_of = plan.attribute(x, start=lrp.Seed(c + 2 * d)).input
    parts = plan.attribute(x, start=lrp.Seed(c)).input + 2 * plan.attribute(x, start=lrp.Seed(d)).input
    assert torch.allclose(sum_of, parts, atol=1e-12)
    batch = plan.attribute(x, 1).input
    alone = torch.cat([plan.attribute(row[None], 1).input for row in x])
    assert torch.allclose(batch, alone, atol=1e-13)


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: (v.clone(), v.data_ptr(), v._version) for k, v in model.state_dict().items()},
        "flags": [
            (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), m.forward.__func__)
            for n, m in model.named_modules()
        ],
        "grads": [(p.requires_grad, p.grad) for p in model.parameters()],
        "vars": [sorted(k for k in vars(m)) for m in model.modules()],
    }


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_bit_identical_afterwards(model: nn.Module, x: Tensor, fails: bool) -> None:
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1) and None)
    model.conv2.weight.requires_grad_(False)
    before, x_before = _fingerprint(model), x.clone()
    if fails:
        with pytest.raises(lrp.errors.TargetError):
            lrp.attribute(model, x, 99, wrt=ALL)
    else:
        lrp.attribute(model, x, wrt=ALL)
    after = _fingerprint(model)
    for name, (value, pointer, version) in before["state"].items():
        new, new_pointer, new_version = after["state"][name]
        assert torch.equal(value, new)
        assert (pointer, version) == (new_pointer, new_version), name
    assert before["flags"] == after["flags"]
    assert before["grads"] == after["grads"]
    assert before["vars"] == after["vars"]
    assert torch.equal(x, x_before)
    assert not x.requires_grad


def test_buffers_that_forward_writes_are_left_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.fc(x)

    model = Counts().eval()
    version = model.calls._version
    rel = lrp.attribute(model, torch.randn(2, 3))
    assert model.calls == 0
    assert model.calls._version == version
    assert torch.allclose(rel.ledger.gap, torch.zeros(2).double(), atol=1e-5)


def test_edited_weights_are_seen(model: nn.Module, x: Tensor) -> None:
    """Edits of ``.data`` leave version counters alone; the fingerprint reads the values."""
    plan = lrp.prepare(model, x, "epsilon_plus")
    first = plan.attribute(x, 1).input
    model.conv2.weight.data[0, 0, 0, 0] += 0.5
    edited = plan.attribute(x, 1).input
    assert not torch.allclose(first, edited)
    fresh = lrp.attribute(copy.deepcopy(model), x, 1, composite="epsilon_plus").input
    assert torch.equal(edited, fresh)
    model.bn1.running_mean.data.add_(0.3)
    assert torch.equal(plan.attribute(x, 1).input, lrp.attribute(copy.deepcopy(model), x, 1).input)
    swapped = model.conv1.weight.data.flip(0).clone()
    model.conv1.weight.data.copy_(swapped)
    assert torch.equal(plan.attribute(x, 1).input, lrp.attribute(copy.deepcopy(model), x, 1).input)


def test_changed_structure_is_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    lrp.attribute(model, x)
    plan = lrp.prepare(model, x)
    model[1] = nn.GELU()
    with pytest.raises(lrp.errors.PlanError, match="has changed"):
        plan.attribute(x)
    rel = lrp.attribute(model, x)
    assert torch.allclose(rel.output, model(x))
    assert "gelu" in str(lrp.prepare(model, x))


def test_replaced_parameter_is_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    plan = lrp.prepare(model, x, rules.Gamma())
    plan.attribute(x)
    model[0].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    assert torch.equal(
        plan.attribute(x, 1).input, lrp.attribute(copy.deepcopy(model), x, 1, composite=rules.Gamma()).input
    )


def test_plans_are_kept_and_models_released() -> None:
    import gc
    import weakref

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    first = lrp.prepare(model, torch.zeros(1, 4))
    assert lrp.prepare(model, torch.zeros(7, 4))._core is first._core
    gone = weakref.ref(model)
    del model, first
    gc.collect()
    assert gone() is None


def test_plans_can_be_copied_and_pickled() -> None:
    """The copy belongs to the copied model."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model(x)
    plan = lrp.prepare(model, x, rules.Gamma())
    expected = plan.attribute(x, 1).input
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin.model is not model
        twin.model[0].weight.data += 1
        assert not torch.equal(twin.attribute(x, 1).input, expected)
        assert torch.equal(plan.attribute(x, 1).input, expected)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 5), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(torch.relu(self.a(x) + self.b(y)))

    model = Two().double().eval()
    x, y = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    rel = lrp.attribute(model, (x, y), composite="epsilon")
    assert [t.shape for t in rel.input] == [x.shape, y.shape]
    assert (rel.ledger.gap.abs() <= 1e-12 * rel.ledger.magnitude()).all()
    with pytest.raises(lrp.errors.InputError, match="disagree on the batch"):
        lrp.attribute(model, (x, y[:2]))


ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
    "elu": nn.ELU(0.7),
    "selu": nn.SELU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 2.0),
    "sigmoid": nn.Sigmoid(),
    "hardsigmoid": nn.Hardsigmoid(),
    "softplus": nn.Softplus(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_activation_factors(name: str, dtype: torch.dtype) -> None:
    """R passes unchanged but f(0), finite at 0, tiny and large inputs, in every type."""
    function = ACTIVATIONS[name]
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([[0.0, tiny, -tiny, 1e-3, -1e-3, 1.0, -1.0, 3.0, -3.0, 7.0, -7.0, 30.0, -30.0]], dtype=dtype)
    c = torch.ones_like(x)
    rel = lrp.attribute(nn.Sequential(function), x, start=lrp.Seed(c), composite="epsilon", wrt="input")
    y, at_zero = function(x), function(torch.zeros((), dtype=dtype))
    assert torch.isfinite(rel.input).all()
    limit = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 0.05}[dtype]
    assert torch.allclose(rel.input.double(), (y - at_zero).double(), atol=limit, rtol=limit)
    assert torch.allclose(rel.ledger.constant, (at_zero * x.shape[1]).double().expand(1), rtol=1e-2)


def test_saturated_relu6_passes_relevance() -> None:
    x = torch.tensor([[9.0, 3.0, -1.0]], dtype=torch.float64)
    rel = lrp.attribute(nn.Sequential(nn.ReLU6()), x, start=lrp.Seed(torch.ones(1, 3).double()), composite="epsilon")
    assert torch.equal(rel.input, torch.tensor([[6.0, 3.0, 0.0]], dtype=torch.float64))


def test_products_and_gates() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] * x[:, 3:]

    x = torch.randn(5, 6, dtype=torch.float64)
    rel = lrp.attribute(Product(), x, start=lrp.Seed(torch.ones(5, 3).double()), composite="epsilon")
    product = x[:, :3] * x[:, 3:]
    assert torch.allclose(rel.input, torch.cat([product, product], 1) / 2, atol=1e-13)

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] * torch.sigmoid(x[:, 3:])

    rel = lrp.attribute(Gate(), x, start=lrp.Seed(torch.ones(5, 3).double()), composite="epsilon")
    signal = x[:, :3] * torch.sigmoid(x[:, 3:])
    assert torch.allclose(rel.input, torch.cat([signal, torch.zeros_like(signal)], 1), atol=1e-13)

    class Expanded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean(1, keepdim=True).sigmoid().expand_as(x)

    rel = lrp.attribute(Expanded(), x, start=lrp.Seed(torch.ones(5, 6).double()), composite="epsilon")
    assert torch.allclose(rel.input, Expanded()(x), atol=1e-13)


def test_rows_of_norms_and_constants_show_what_went_through() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv, self.shift = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.bn(x))
            return (y + self.conv(y) + 0.5).flatten(1)

    model = Net().double().eval()
    with torch.no_grad():
        for t in (model.bn.running_mean, model.bn.weight, model.bn.bias):
            t.normal_()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    rel = lrp.attribute(model, x, start=lrp.Seed(torch.randn(2, 48).double()), composite="epsilon", wrt="layers")
    row = rel.ledger.modules["bn"]
    assert torch.allclose(row.start, rel.layers["bn"].sum((1, 2, 3)), atol=1e-12)
    assert torch.allclose(row.input, rel.input.sum((1, 2, 3)), atol=1e-12)
    for name, row in rel.ledger.modules.items():
        assert (row.gap.abs() <= 1e-12).all(), name
        assert row.start.abs().max() > 0, "no row of zeros"


def test_stabilisers_that_can_not_hold(model: nn.Module, x: Tensor) -> None:
    for wrong in (lambda z: z * 0, lambda z: z * float("inf")):
        with pytest.raises(lrp.errors.RuleError, match="made a denominator 0"):
            lrp.attribute(model, x, 1, composite=rules.Epsilon(wrong))
    noisy = rules.Epsilon(lambda z: z + torch.randn_like(z))  # wrong as a rule, but booked
    rel = lrp.attribute(model, x, 1, composite=noisy)
    assert (rel.ledger.gap.abs() <= 1e-9 * rel.ledger.magnitude()).all()


def test_books_that_do_not_close_warn() -> None:
    """Relevances of 1e8 that cancel to about 10: float32 can not hold the difference, float64 can."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1e8], [1e8 + 8]]))
        net[1].weight.copy_(torch.tensor([[-1.0, 1.0]]))
    x = torch.tensor([[1.1], [1.3], [1.7]])
    with pytest.warns(RuntimeWarning, match="do not close"):
        lrp.attribute(net, x, 0, composite=rules.Epsilon(0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrp.attribute(net.double(), x.double(), 0, composite=rules.Epsilon(0.0))


def test_rectifiers_of_guided_backprop_and_deconvnet() -> None:
    """Every spelling of a rectifier, in place or capped, by its definition."""
    spellings: dict[str, tuple[Any, float]] = {
        "relu": (torch.relu, float("inf")),
        "in place": (lambda t: nn.functional.relu(t * 1, inplace=True), float("inf")),
        "relu6": (nn.functional.relu6, 6.0),
        "hardtanh": (lambda t: nn.functional.hardtanh(t, 0.0, 2.0), 2.0),
        "clamp": (lambda t: t.clamp(0, 3), 3.0),
        "clamp_min": (lambda t: t.clamp_min(0), float("inf")),
    }

    class Net(nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 9), nn.Linear(9, 3), act

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(4 * self.a(x)))

    x, c = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    for name, (act, high) in spellings.items():
        net = Net(act).double().eval()
        z, back = 4 * net.a(x), (c @ net.b.weight).clamp(min=0)
        inside = (z > 0) & (z < high)
        for mode, mask in (("guided_backprop", inside), ("deconvnet", torch.ones_like(inside))):
            rel = lrp.attribute(net, x, start=lrp.Seed(c), composite=mode)
            assert torch.allclose(rel.input, (back * mask) @ (4 * net.a.weight), atol=1e-12), (name, mode)
            assert rel.ledger is None
    for mode in ("guided_backprop", "deconvnet"):
        with pytest.raises(lrp.errors.CompositeError, match="this model has none"):
            lrp.attribute(Net(torch.tanh).double().eval(), x, 0, composite=mode)


def test_rms_stabiliser_keeps_samples_apart_where_the_batch_is_merged() -> None:
    """torch's attention runs its output layer on (length x samples) rows."""
    net = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), nn.Flatten(), nn.Linear(40, 3)
    )
    net, x = net.double().eval(), torch.randn(4, 5, 8, dtype=torch.float64)
    rule = rules.Epsilon(rules.Rms(0.3))
    batch = lrp.attribute(net, x, 1, composite=rule)
    alone = torch.cat([lrp.attribute(net, row[None], 1, composite=rule).input for row in x])
    assert torch.allclose(batch.input, alone, atol=1e-12)
    assert (batch.ledger.gap.abs() <= 1e-10 * batch.ledger.magnitude()).all()


def test_global_response_normalisation() -> None:
    """ConvNeXt V2: a norm over space, divided by its mean, is a statistic; addcmul is a product and a sum."""

    class Response(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 1, 1, 3))
            self.bias = nn.Parameter(torch.randn(1, 1, 1, 3))

        def forward(self, x: Tensor) -> Tensor:
            size = x.norm(p=2, dim=(1, 2), keepdim=True)
            share = size / (size.mean(dim=-1, keepdim=True) + 1e-6)
            return x + torch.addcmul(self.bias, self.weight, x * share, value=2)

    model = Response().double().eval()
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    c = torch.randn_like(x)
    rel = lrp.attribute(model, x, start=lrp.Seed(c), composite="epsilon")
    size = x.norm(p=2, dim=(1, 2), keepdim=True)
    share = size / (size.mean(dim=-1, keepdim=True) + 1e-6)
    assert torch.allclose(rel.input, (c * x * (1 + 2 * model.weight * share)).detach(), atol=1e-12)
    assert torch.allclose(rel.ledger.constant, (c * model.bias).sum((1, 2, 3)).detach(), atol=1e-12)
    assert (rel.ledger.gap.abs() <= 1e-12 * rel.ledger.magnitude()).all()


def test_constants_are_booked() -> None:
    """Tokens and position embeddings take their share, per sample."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.position = nn.Parameter(torch.randn(1, 1, 3)), nn.Parameter(torch.randn(1, 4, 3))
            self.mix = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
            return self.mix(2.0 - x).sum(1)

    model = Tokens().double().eval()
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    c = torch.randn(4, 3, dtype=torch.float64)
    rel = lrp.attribute(model, x, start=lrp.Seed(c), composite=rules.Epsilon(0.0))
    g = (c @ model.mix.weight).detach()
    constant = (2 * 4 * g.sum(1)) - (g[:, None] * model.position).sum((1, 2)) - (g * model.token[0]).sum(1)
    assert torch.allclose(rel.ledger.constant, constant, atol=1e-12)
    assert (rel.ledger.gap.abs() <= 1e-12 * rel.ledger.magnitude()).all()


def test_layer_norm_and_attention_conserve() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.group = nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return (x + self.attention(y, y, y, need_weights=False)[0]).sum(1) + self.group(x).sum(1)

    model = Block().double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name:
                p.zero_()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    c = torch.randn(3, 8, dtype=torch.float64)
    rel = lrp.attribute(model, x, start=lrp.Seed(c), composite=rules.Epsilon(0.0))
    assert torch.allclose(rel.input.sum((1, 2)), (c * model(x)).sum(1), atol=1e-11)


def test_attention_unbound_from_one_projection() -> None:
    """q, k and v out of one unbind, as in timm: q and k get nothing, the rest conserves."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            n, length, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
            return self.out(mixed.transpose(1, 2).reshape(n, length, 8)).mean(1)

    model = Attention().double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    rel = lrp.attribute(model, x, 1, composite=rules.Epsilon(0.0), wrt=("input", "weights"))
    assert torch.allclose(rel.input.sum((1, 2)), model(x)[:, 1], atol=1e-12)
    assert (rel.weights["qkv.weight"][:16] == 0).all()
    assert (rel.weights["qkv.weight"][16:] != 0).any()


def test_sink_behind_normalisation_keeps_relevance() -> None:
    """A box rule behind an in-model normalisation: R goes through it, nothing is lost or made."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1))
            self.conv = nn.Conv2d(3, 4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv((x - self.mean) / 0.25)).sum((2, 3))

    model = Normalised().double().eval()
    x = torch.rand(3, 3, 6, 6, dtype=torch.float64)
    x[0, :, :2] = 0  # black pixels carry relevance too
    low, high = (0 - model.mean) / 0.25, (1 - model.mean) / 0.25
    rel = lrp.attribute(model, x, start="logit", composite=rules.ZBox(low, high, 0.0), wrt=("input", "layers"))
    inner = lrp.attribute(
        model.conv, (x - model.mean) / 0.25, start=_conv_start(model, x, rel), composite=rules.ZBox(low, high, 0.0)
    )
    assert torch.allclose(rel.input, inner.input, atol=1e-12)
    assert torch.allclose(rel.ledger.input, rel.ledger.start, atol=1e-10)
    assert rel.input[0, :, :2].abs().sum() > 0

    class Standardise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 0.5) / 0.25

    outer = nn.Sequential(Standardise(), nn.BatchNorm2d(3), model.conv).double().eval()
    box = rules.ZBox(-9.0, 9.0)
    rel = lrp.attribute(outer, x, start=lrp.Seed(torch.ones(3, 4, 4, 4).double()), composite=box, wrt=ALL)
    for name in ("0", "1"):  # relevance goes through both unchanged
        assert torch.equal(rel.layers[name], rel.input)
        assert name not in rel.channels


def _conv_start(model: nn.Module, x: Tensor, rel: lrp.Relevance) -> Tensor:
    z = model.conv((x - model.mean) / 0.25).detach()
    mask = torch.zeros(3, 4, 1, 1, dtype=torch.float64).scatter(1, rel.target[:, None, None, None], 1.0)
    return z.relu() * mask


def test_in_place_on_a_view() -> None:
    """An in-place call seen through another name: the graph is made functional first."""

    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            y[:, :2].mul_(3.0)
            z = y.view(x.shape[0], -1)
            z.relu_()
            return y.sum((2, 3))

    model = View().double().eval()
    model.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    rel = lrp.attribute(model, x, 1, composite=rules.Epsilon(0.0))
    assert torch.allclose(rel.output, model(x), atol=1e-13)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert torch.allclose(rel.input, x * g, atol=1e-12)
    mutates = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)).double().eval()
    y = torch.randn(2, 4, dtype=torch.float64)
    kept = y.clone()
    lrp.attribute(mutates, y)
    assert torch.equal(y, kept)


def test_trivial_modules_and_reshapes() -> None:
    model = nn.Sequential(
        nn.Identity(), nn.Conv2d(2, 4, 3, padding=1), nn.ELU(), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.PixelShuffle(2), nn.Dropout(0.5), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 3),
    ).double().eval()  # fmt: skip
    rel = lrp.attribute(model, torch.randn(2, 2, 4, 4, dtype=torch.float64))
    assert (rel.ledger.gap.abs() <= 1e-12 * rel.ledger.magnitude()).all()


def test_gradient_composites(model: nn.Module, x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    params = list(model.named_parameters())
    gradients = torch.autograd.grad(model(leaf)[:, 2].sum(), [leaf, *(p for _, p in params)])
    rel = lrp.attribute(model, x, 2, composite="gradient", wrt=("input", "weights", "channels"))
    assert torch.allclose(rel.input, gradients[0], atol=1e-13)
    for (name, _), g in zip(params, gradients[1:], strict=True):
        assert torch.allclose(rel.weights[name], g, atol=1e-12), name
    assert rel.ledger is None
    times = lrp.attribute(model, x, 2, composite="gradient_x_input", wrt=("input", "weights"))
    assert torch.allclose(times.input, gradients[0] * x, atol=1e-13)
    assert torch.allclose(times.weights["head.weight"], rel.weights["head.weight"] * model.head.weight, atol=1e-12)


def test_matchers() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).eval()
    composite = lrp.Composite(
        [("first", rules.ZBox(-9, 9)), ("last", rules.Epsilon(0.5)), ((0.0, 0.3), rules.Gamma(0.1)),
         ("2", rules.ZPlus()), (nn.Linear, rules.Epsilon(0.25))]
    )  # fmt: skip
    text = str(lrp.prepare(model, torch.zeros(1, 4), composite)).splitlines()[2:7]
    assert [line.split()[1].split("(")[0] for line in text] == ["ZBox", "Gamma", "ZPlus", "Epsilon", "Epsilon"]
    assert "0.25" in text[3]
    assert "0.5" in text[4]


def test_first_is_execution_order() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Conv2d(4, 2, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x))).mean((2, 3))

    plan = lrp.prepare(Swapped().eval(), torch.zeros(1, 3, 8, 8), lrp.composites.epsilon_gamma_box(-1, 1))
    lines = str(plan).splitlines()
    assert lines[2].startswith("first ")
    assert "ZBox" in lines[2]
    assert "Gamma" in lines[3]


def test_layer_patterns(model: nn.Module, x: Tensor) -> None:
    rel = lrp.attribute(model, x, wrt="layers", layers=["conv*"])
    assert set(rel.layers) == {"conv1", "conv2", "conv2@1"}
    with pytest.raises(lrp.errors.PlanError, match="no relevance by rule"):
        lrp.attribute(model, x, wrt="layers", layers=["excite"])


def test_inference_mode_and_no_grad(model: nn.Module, x: Tensor) -> None:
    expected = lrp.attribute(model, x, 1).input
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = lrp.attribute(model, x.clone(), 1).input
        assert torch.equal(expected, got)


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, lrp; assert 'torch' not in sys.modules; lrp.rules; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_combination_of_results(model: nn.Module, x: Tensor) -> None:
    whole = lrp.attribute(model, x, 1, wrt=ALL)
    for size in (1, 2, 3):
        for wrt in itertools.combinations(ALL, size):
            for ledger in (True, False):
                part = lrp.attribute(model, x, 1, wrt=wrt, ledger=ledger)
                assert torch.allclose(part.input, whole.input, atol=1e-13)
                for kind in ("layers", "channels", "weights"):
                    mine, all_of = getattr(part, kind), getattr(whole, kind)
                    assert set(mine) == (set(all_of) if kind in wrt else set())
                    assert all(torch.allclose(mine[k], all_of[k], atol=1e-12) for k in mine)
