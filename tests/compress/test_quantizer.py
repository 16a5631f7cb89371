"""Training at low precision: what the optimiser moves, what the network sees, what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quantization_plan import plan_of
from compress.quantizer import Quantizer
from compress.rate import Rate
from compress.weight_relevance import WeightRelevance
from compress.zero_cost import ZeroCost
from lrp.errors import ConvergenceError, InputError, MismatchError, ModeError, NonFiniteError


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )


def batch(n: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n, 1, 6, 6, generator=g)
    return x, x.mean((1, 2, 3)).mul(20).round().long() % 3


COLLECTED = {n: torch.ones_like(p) for n, p in network().named_parameters() if p.dim() > 1}


def learn(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


def trained(steps: int = 5, **options: Any) -> tuple[nn.Sequential, Quantizer]:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    quantizer = Quantizer(net, optimizer, **options)
    x, y = batch()
    for _ in range(steps):
        learn(net, optimizer, x, y)
        quantizer.step(x, y)
    return net, quantizer


# -- background and quantized weights -------------------------------------------------
def test_background_and_quantized_weights_are_apart_on_a_cpu() -> None:
    """Trap 1."""
    net, quantizer = trained(1, method="ecq", bits=3, first=None, last=None)
    for name, w in quantizer.background().items():
        p = net.get_parameter(name)
        assert not torch.equal(w, p)
        assert len(p.unique()) <= 7
        book = quantizer.books[name]
        assert torch.equal(book.values(book.indices(p.detach())), p)
    kept = {w.data_ptr() for w in quantizer._background}
    assert not kept & {p.data_ptr() for p in net.parameters()}


def test_the_optimiser_moves_the_background_by_the_gradient_at_the_quantized_weights() -> None:
    """The straight-through estimator, by hand."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
    quantizer = Quantizer(net, optimizer, method="ecq", bits=4)
    x, y = batch()
    before = quantizer.background()
    quantized = {n: p.detach().clone() for n, p in net.named_parameters()}
    twin = copy.deepcopy(net)
    F.cross_entropy(twin(x), y).backward()
    learn(net, optimizer, x, y)
    for name, p in net.named_parameters():
        if name in before:  # the network sees the levels until step()
            assert torch.equal(p, quantized[name])
    quantizer.step()
    for name, w in quantizer.background().items():
        grad = twin.get_parameter(name).grad
        assert grad is not None
        assert torch.allclose(w, before[name] - 0.1 * (grad + 0.01 * before[name]), atol=1e-7)


@pytest.mark.parametrize("scale", ["plain", "abs", "signed"])
def test_factor_of_the_gradient(scale: str) -> None:
    """Trap 2: the released code multiplies with the signed level, which turns the gradient of negative levels."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    quantizer = Quantizer(net, optimizer, method="ecq", bits=4, grad_scale=scale)
    x, y = batch()
    q = {n: net.get_parameter(n).detach().clone() for n in quantizer.parameters}
    before = quantizer.background()
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    grads = {n: net.get_parameter(n).grad.clone() for n in q}  # type: ignore[union-attr]  # they have one
    optimizer.step()
    for name, w in quantizer.background().items():
        factor = {"plain": torch.ones_like(w), "abs": q[name].abs(), "signed": q[name]}[scale]
        factor = torch.where(q[name] == 0, 1.0, factor)
        assert torch.allclose(before[name] - w, factor * grads[name], atol=1e-6)
        moved = (before[name] - w) * grads[name]
        assert bool((moved < -1e-12).any()) == (scale == "signed")


def test_the_estimator_equals_the_difference_quotient_of_the_loss_in_the_levels() -> None:
    net = network().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    quantizer = Quantizer(net, optimizer, method="ecq", bits=4)
    net.eval()
    x, y = batch()
    x = x.double()
    before = quantizer.background()
    twin = copy.deepcopy(net)
    learn(net, optimizer, x, y)
    w = quantizer.background()["3.weight"]
    p = twin.get_parameter("3.weight")
    h = 1e-6
    for at in (0, 100, 500):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                p.view(-1)[at] += sign * h
            losses.append(float(F.cross_entropy(twin(x), y).detach()))
            with torch.no_grad():
                p.view(-1)[at] -= sign * h
        slope = (losses[0] - losses[1]) / (2 * h)
        assert float((before["3.weight"] - w).view(-1)[at]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_the_model_is_ready_in_the_users_own_loop_and_after() -> None:
    net, quantizer = trained(4, method="ecqx", bits=4, relevance=WeightRelevance(every=2))
    plan = quantizer.finish()
    assert plan_of(net) is plan
    held = {n: p.detach().clone() for n, p in net.named_parameters()}
    x, y = batch()
    optimizer = quantizer.optimizer
    learn(net, optimizer, x, y)  # the optimiser is an ordinary one again
    assert any(not torch.equal(p, held[n]) for n, p in net.named_parameters())
    with pytest.raises(MismatchError, match="lies off its codebook"):
        plan.indices(net)


def test_order_of_calls() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    quantizer = Quantizer(net, optimizer, method="ecqx", bits=4)
    x, y = batch()
    with pytest.raises(ModeError, match="made no step"):
        quantizer.step(x, y)
    learn(net, optimizer, x, y)
    with pytest.raises(InputError, match="no batch"):
        quantizer.step()
    learn(net, optimizer, x, y)
    quantizer.step(x, y)
    quantizer.finish()
    with pytest.raises(ModeError, match="finished"):
        quantizer.step(x, y)


def test_an_optimiser_of_other_parameters_is_refused() -> None:
    net = network()
    with pytest.raises(MismatchError, match="optimiser"):
        Quantizer(net, torch.optim.SGD(network(1).parameters(), lr=0.1))


# -- which tensors ------------------------------------------------------------------
def test_what_is_left_out_stays_as_it_is() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    quantizer = Quantizer(net, optimizer, method="ecq", exclude="3.*")  # one pattern may stand alone
    assert quantizer.settings()["exclude"] == ["3.*"]
    assert quantizer.left_out["3.weight"] == "excluded"
    x, y = batch()
    learn(net, optimizer, x, y)
    quantizer.step()
    assert {n: len(b.step.shape) for n, b in quantizer.books.items()} == {"0.weight": 0, "6.weight": 0}
    assert len(net[3].weight.unique()) > 255  # type: ignore[arg-type,operator]  # a convolution's


# -- relevance ----------------------------------------------------------------------
def test_every_source_of_relevance() -> None:
    found = {}
    for method in ("ecqx", "magnitude", "gradient", "random"):
        _, quantizer = trained(2, method=method, bits=4, gamma=0.5, relevance=WeightRelevance(every=1, momentum=0.0))
        assert quantizer._average is not None
        found[method] = quantizer._average.values["3.weight"]
    weights = trained(2, method="magnitude", bits=4, gamma=0.5, relevance=WeightRelevance(every=1))[1].background()
    assert torch.allclose(found["magnitude"], weights["3.weight"], atol=1e-2)
    lrp, other = found["ecqx"].flatten(), found["random"].flatten()
    assert not torch.equal(lrp, other)


def test_random_relevance_is_lrps_with_the_same_histogram() -> None:
    x, y = batch()
    pair = []
    for method in ("ecqx", "random"):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        quantizer = Quantizer(net, optimizer, method=method, bits=4, relevance=WeightRelevance(momentum=0.0))
        learn(net, optimizer, x, y)
        quantizer.step(x, y)
        assert quantizer._average is not None
        pair.append(quantizer._average.values["3.weight"].flatten())
    assert torch.equal(pair[0].sort().values, pair[1].sort().values)
    assert not torch.equal(*pair)


def test_relevance_is_that_of_the_engine() -> None:
    import lrp

    x, y = batch()
    for at in ("background", "quantized", "quantized_jitter"):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        how = WeightRelevance(at=at, momentum=0.0)
        quantizer = Quantizer(net, optimizer, method="ecqx", bits=3, relevance=how)
        before, q = quantizer.background(), {n: net.get_parameter(n).detach().clone() for n in quantizer.parameters}
        learn(net, optimizer, x, y)
        after = quantizer.background()
        twin = copy.deepcopy(net).eval()  # the batch norm's statistics have moved
        for name in q:
            moved = {"background": after[name], "quantized": q[name]}.get(at, q[name] + (after[name] - before[name]))
            twin.get_parameter(name).data.copy_(moved)
        expected = lrp.attribute(
            twin, x, y, composite="epsilon_plus_flat", wrt="weights", weight_rule="epsilon"
        ).weights
        quantizer.step(x, y)
        assert quantizer._average is not None
        for name, r in quantizer._average.values.items():
            assert torch.allclose(r, expected[name] / len(y), rtol=1e-4, atol=1e-7)
        assert all(len(net.get_parameter(n).unique()) <= 255 for n in q)  # the levels are back


class Pair(nn.Module):
    """Of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.head((self.left(a) + self.right(b)).relu())
        return out


@pytest.mark.parametrize("inputs", [1, 2])
def test_magnitudes_of_single_samples_are_those_of_a_loop(inputs: int) -> None:
    import lrp

    g = torch.Generator().manual_seed(2)
    net = (network() if inputs == 1 else Pair()).double().eval()
    x: Any = torch.randn(7, 1, 6, 6, generator=g).double()
    if inputs == 2:
        x = (torch.randn(7, 3, generator=g).double(), torch.randn(7, 2, generator=g).double())
    y = torch.tensor([0, 1, 2, 0, 1, 1, 0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    how = WeightRelevance(aggregate="abs_per_sample", at="quantized", momentum=0.0, start="probability")
    quantizer = Quantizer(net, optimizer, method="ecqx", bits=4, relevance=how)
    twin = copy.deepcopy(net)
    optimizer.zero_grad()
    sum(p.sum() for p in net.parameters()).backward()  # type: ignore[union-attr]  # a tensor
    optimizer.step()
    quantizer.step(x, y)
    total: dict[str, Tensor] = {}
    signed: dict[str, Tensor] = {}
    for i in range(len(y)):
        one = x[i : i + 1] if inputs == 1 else tuple(t[i : i + 1] for t in x)
        weights = lrp.attribute(
            twin, one, y[i : i + 1], composite="epsilon_plus_flat", wrt="weights", weight_rule="epsilon",
            start="probability",
        ).weights  # fmt: skip
        for name, r in weights.items():
            total[name] = total.get(name, 0) + r.abs() / len(y)
            signed[name] = signed.get(name, 0) + r / len(y)
    assert quantizer._average is not None
    assert quantizer._average.values.keys() == quantizer.parameters.keys()
    for name, r in quantizer._average.values.items():
        assert torch.allclose(r, total[name], rtol=1e-9, atol=1e-14), name
        assert not torch.allclose(r, signed[name].abs(), rtol=1e-2)  # else the test could not tell them apart


def test_where_the_optimiser_made_no_step_the_background_is_explained() -> None:
    found = {}
    for at in ("quantized_jitter", "background", "quantized"):
        net = network().eval()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        quantizer = Quantizer(net, optimizer, method="ecqx", bits=3, gamma=0.5, relevance=WeightRelevance(at=at))
        quantizer.settle([batch()])
        found[at] = quantizer.state_dict()["relevance.3.weight"]
    assert torch.equal(found["quantized_jitter"], found["background"])
    assert not torch.equal(found["quantized_jitter"], found["quantized"])


def test_without_training_every_sample_counts_alike() -> None:
    """Batches of different sizes give the mean over their samples."""
    x, y = batch()
    found = []
    for sizes in ([24], [1, 16, 7]):
        net = network().eval().double()
        quantizer = Quantizer(net, torch.optim.SGD(net.parameters(), lr=0.1), method="ecqx", gamma=0.5)
        quantizer.settle(list(zip(x.double().split(sizes), y.split(sizes), strict=True)))
        found.append(quantizer.state_dict()["relevance.3.weight"])
    assert torch.allclose(*found, rtol=1e-9, atol=1e-14)


def test_average_over_steps_survives_epochs_and_files() -> None:
    """Trap 9: the released code makes the average anew in every epoch."""
    net, quantizer = trained(3, method="ecqx", bits=4, relevance=WeightRelevance(every=1, momentum=0.9))
    held = {n: t.clone() for n, t in quantizer.state_dict().items()}
    other_net = network()
    other = Quantizer(
        other_net, torch.optim.Adam(other_net.parameters(), lr=1e-2), method="ecqx", bits=4,
        relevance=WeightRelevance(every=1, momentum=0.9),
    )  # fmt: skip
    other_net.load_state_dict(net.state_dict())
    other.load_state_dict(held)
    assert all(torch.equal(p, net.get_parameter(n)) for n, p in other_net.named_parameters())
    assert other.steps == 3
    assert all(torch.equal(t, held[n]) for n, t in other.state_dict().items())


def test_a_weight_that_is_needed_grows_back_by_its_background() -> None:
    """Trap 10: at the quantized network a zero has no relevance; the background still moves it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40, bias=False), nn.ReLU(), nn.Linear(40, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.linspace(-1, 1, 40)[:, None])
        net[0].weight[20] = 1e-3
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.05)
    net[2].requires_grad_(False)
    quantizer = Quantizer(
        net, optimizer, method="ecqx", bits=3, gamma=0.2, first=None, last=None,
        relevance=WeightRelevance(at="background", every=1), zero_cost=ZeroCost(p=0.05),
    )  # fmt: skip
    assert float(net[0].weight[20].detach()) == 0.0
    x = torch.ones(4, 1)
    for _ in range(20):
        optimizer.zero_grad()
        (-net[0](x)[:, 20].sum()).backward()
        optimizer.step()
        quantizer.step(x, torch.zeros(4, dtype=torch.long))
    assert float(net[0].weight[20].detach()) > 0.5


def test_relevance_collected_before() -> None:
    import lrp

    net = network().eval()
    x, y = batch()
    total = lrp.collect(net, [(x, y)], wrt="weights", progress=False)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    quantizer = Quantizer(net, optimizer, method="ecqx", bits=4, gamma=0.5, relevance=total.weights)
    assert {s.relevance for s in quantizer.states.values()} <= {"ok", "skipped", "not_reached"}
    learn(net, optimizer, x, y)
    quantizer.step()  # reads no batch
    with pytest.raises(MismatchError, match="does not fit"):
        Quantizer(net, torch.optim.SGD(net.parameters(), lr=0.1), method="ecqx", relevance={"0.weight": torch.zeros(3)})


# -- rate and collapse ----------------------------------------------------------------
@pytest.mark.parametrize("method", ["ecq", "ecqx"])
def test_a_rate_is_held(method: str) -> None:
    _, quantizer = trained(3, method=method, bits=4, rate=Rate(zeros=0.7, every=1))
    assert 0.7 <= quantizer.zeros < 0.72
    _, quantizer = trained(3, method=method, bits=4, rate=Rate(bits_per_weight=2.0, every=1))
    assert 1.9 < quantizer.bits_per_weight <= 2.0


def test_a_state_is_put_back_to_the_last_bit() -> None:
    """Gamma in float64, and no new search for it: later steps have moved the weights it was searched at."""
    _, quantizer = trained(4, method="ecq", bits=3, rate=Rate(zeros=0.6, every=2))
    state = {name: t.clone() for name, t in quantizer.state_dict().items()}
    levels, gamma = [q.clone() for q in quantizer._quantized], quantizer.gamma
    assert gamma != float(torch.tensor(gamma))  # float32 would not hold it
    quantizer.gamma = 0.0
    quantizer._assign(search=False)
    assert not all(torch.equal(a, b) for a, b in zip(levels, quantizer._quantized, strict=True))
    quantizer.load_state_dict(state)
    assert quantizer.gamma == gamma
    assert all(torch.equal(a, b) for a, b in zip(levels, quantizer._quantized, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(bad: float) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    quantizer = Quantizer(net, optimizer, bits=3)
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    name = list(quantizer.parameters)[1]
    grad = quantizer.parameters[name].grad
    assert grad is not None
    grad.view(-1)[0] = bad
    optimizer.step()
    with pytest.raises(NonFiniteError, match=f"'{name}' has weights that are no finite numbers"):
        quantizer.step(x, y)


def test_other_relevance_is_another_run() -> None:
    """A resumed run compares settings."""
    settings = []
    for factor in (1.0, 1.0, 2.0):
        given = {n: factor * r for n, r in COLLECTED.items()}
        settings.append(trained(0, method="ecqx", relevance=given)[1].settings())
    assert settings[0] == settings[1] != settings[2]


def test_collapse_is_told() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    quantizer = Quantizer(net, optimizer, method="ecq", bits=4, gamma=20.0)
    assert quantizer.collapsed
    with pytest.raises(ConvergenceError, match="became zero"):
        quantizer.finish()
    assert quantizer.zeros > 0.9
    quantizer.finish(allow_collapse=True)


def test_gamma_below_one_keeps_both_signs_in_every_tensor() -> None:
    net, quantizer = trained(6, method="ecq", bits=3, gamma=0.95)
    assert not quantizer.collapsed
    for name, w in quantizer.background().items():
        book, q = quantizer.books[name], net.get_parameter(name)
        for sign in (1, -1):
            if bool((sign * book.nearest(w) > 0).any()):
                assert bool((sign * q > 0).any()), name


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "ecqy"}, "method"),
        ({"gamma": -1}, "gamma"),
        ({"grad_scale": "sign"}, "grad_scale"),
        ({"lambda_rule": "min"}, "lambda_rule"),
        ({"method": "ecq", "relevance": WeightRelevance()}, "no relevance"),
        ({"method": "ecq", "relevance": {"3.weight": torch.ones(8, 8, 3, 3)}}, "no relevance"),
        ({"method": "magnitude", "relevance": WeightRelevance("gradient")}, "different sources"),
        *[({"method": m, "relevance": COLLECTED}, f"'{m}' has a source") for m in ("magnitude", "gradient", "random")],
        ({"first": True}, "first"),
    ],
)
def test_refused(options: dict[str, Any], match: str) -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=match):
        Quantizer(net, torch.optim.SGD(net.parameters(), lr=0.1), **options)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@pytest.mark.gpu
def test_the_same_levels_on_a_gpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        net = network().to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        quantizer = Quantizer(net, optimizer, method="ecqx", bits=4, gamma=0.3)
        x, y = (t.to(device) for t in batch())
        learn(net, optimizer, x, y)
        quantizer.step(x, y)
        found.append({n: quantizer.books[n].indices(net.get_parameter(n).detach()).cpu() for n in quantizer.books})
    same = [float((found[0][n] == found[1][n]).double().mean()) for n in found[0]]
    assert min(same) > 0.99  # relevance differs in the last bits
