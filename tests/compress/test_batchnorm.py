"""Batch-norm statistics against a slow computation in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.batchnorm import reestimate, reestimate_
from compress.evaluation import evaluate
from lrp import errors


class Net(nn.Module):
    """Two convolutions with batch norm, one of which is used twice; dropout; a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5, affine=False, momentum=None)
        self.free = nn.BatchNorm2d(5, track_running_stats=False)
        self.drop = nn.Dropout(0.5)
        self.fc, self.bn3 = nn.Linear(5, 3), nn.BatchNorm1d(3, eps=1e-2)
        self.unused = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + self.bn2(x))
        x = self.drop(self.free(x)).mean((2, 3))
        return self.bn3(self.fc(x))


def randomised(net: nn.Module) -> nn.Module:
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.running_mean is not None and m.running_var is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 2)
                nn.init.normal_(m.bias)
    return net


def normalised(x: Tensor, bn: Any) -> Tensor:
    """As in training, channel by channel."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c].flatten()
        mean = sum(values.tolist()) / len(values)
        var = sum((v - mean) ** 2 for v in values.tolist()) / len(values)
        out[:, c] = (x[:, c] - mean) / math.sqrt(var + bn.eps)
        if bn.affine:
            out[:, c] = out[:, c] * bn.weight[c].item() + bn.bias[c].item()
    return out


def by_hand(net: Any, data: list[Tensor]) -> dict[str, tuple[list[float], list[float]]]:
    """Mean and unbiased variance of all inputs of each layer, gathered from all batches."""
    seen: dict[str, list[Tensor]] = {"bn1": [], "bn2": [], "bn3": []}
    with torch.no_grad():
        for x in data:
            a = net.conv1(x)
            seen["bn1"].append(a)
            a = torch.relu(normalised(a, net.bn1))
            b = net.conv2(a)
            seen["bn2"] += [b, a]
            a = torch.relu(normalised(b, net.bn2) + normalised(a, net.bn2))
            a = net.fc(normalised(a, net.free).mean((2, 3)))
            seen["bn3"].append(a)
    out = {}
    for name, parts in seen.items():
        columns = torch.cat([p.transpose(0, 1).flatten(1) for p in parts], 1).tolist()
        means = [sum(column) / len(column) for column in columns]
        out[name] = (
            means,
            [sum((v - m) ** 2 for v in column) / (len(column) - 1) for m, column in zip(means, columns, strict=True)],
        )
    return out


def data_of(*sizes: int) -> list[Tensor]:
    return [torch.randn(n, 2, 4, 5, dtype=torch.float64) * (k + 1) + k for k, n in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [(6,), (4, 4, 4), (7, 2, 5)])
def test_equals_the_slow_computation(sizes: tuple[int, ...]) -> None:
    net = randomised(Net().double())
    data = data_of(*sizes)
    new: Any = reestimate(net, data)
    for name, (mean, var) in by_hand(net, data).items():
        layer = getattr(new, name)
        assert layer.running_mean.tolist() == pytest.approx(mean, abs=1e-12)
        assert layer.running_var.tolist() == pytest.approx(var, rel=1e-11)
        assert int(layer.num_batches_tracked) == len(sizes) * (2 if name == "bn2" else 1)
    assert torch.equal(new.unused.running_mean, net.unused.running_mean)


def test_a_single_batch_is_what_training_leaves() -> None:
    net = randomised(Net().double())
    (x,) = data_of(6)
    new = reestimate(net, [x])
    twin = copy.deepcopy(net).train()
    for m in twin.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 1.0
        if isinstance(m, nn.Dropout):
            m.eval()
    twin.bn2.momentum = 0.5  # used twice: statistics are those of both uses
    with torch.no_grad():
        twin(x)
    for name in ("bn1", "bn3"):
        for key in ("running_mean", "running_var"):
            assert torch.allclose(getattr(getattr(new, name), key), getattr(getattr(twin, name), key), atol=1e-12)


def test_unequal_batches_count_by_their_samples() -> None:
    layer = nn.BatchNorm1d(1).double()
    x = torch.tensor([[0.0], [2.0], [10.0], [12.0], [14.0], [16.0]], dtype=torch.float64)
    new: Any = reestimate(layer, [x[:2], x[2:]])
    assert float(new.running_mean) == pytest.approx(float(x.mean()), abs=1e-12)
    assert float(new.running_var) == pytest.approx(float(x.var()), abs=1e-12)
    twin = nn.BatchNorm1d(1, momentum=None).double().train()
    for part in (x[:2], x[2:]):
        twin(part)
    assert twin.running_mean is not None
    assert twin.running_var is not None
    # torch's own average is another one: each batch counts the same, distances between them not at all
    assert float(twin.running_mean) == pytest.approx(7.0)
    assert float(twin.running_var) < float(new.running_var) / 5


def test_the_model_stays_as_it_is() -> None:
    net = randomised(Net().double()).train()
    net.conv1.requires_grad_(False)
    net.bn3.eval()
    flags = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    new = reestimate(net, data_of(5))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert [m.training for m in new.modules()] == flags
    assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in net.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(new.parameters(), net.parameters(), strict=True))
    assert not any(m._forward_pre_hooks for m in new.modules())
    assert not torch.equal(new.bn1.running_mean, net.bn1.running_mean)


def test_dropout_does_not_enter() -> None:
    net = randomised(Net().double())
    data = data_of(5, 3)
    one, two = reestimate(net, data), reestimate(net, data)
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_large_offsets_do_not_cancel() -> None:
    layer = nn.BatchNorm1d(1)
    x = torch.randn(40, 1) + 3e4
    new: Any = reestimate(layer, list(x.split(8)))
    assert float(new.running_var) == pytest.approx(float(x.double().var()), rel=1e-5)


def test_without_layers_the_data_are_not_read() -> None:
    class Untouched:
        def __iter__(self) -> Any:
            raise AssertionError("read")

    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False))
    new = reestimate(net, Untouched())
    assert new is not net
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in new.state_dict().items())


def test_faults_leave_the_statistics() -> None:
    net = randomised(Net().double())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bad = data_of(4, 4)
    bad[1][0, 0, 0, 0] = math.inf
    with pytest.raises(errors.NonFiniteError, match="'bn1'"):
        reestimate_(net, bad)
    with pytest.raises(errors.InputError, match=r"'bn3'.*single value.*drop_last"):
        reestimate_(net, data_of(4, 1))
    with pytest.raises(errors.InputError, match="no sample"):
        reestimate_(net, [])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert net.bn1.training


def test_subclasses_keep_their_activations_in_evaluation_mode() -> None:
    class Activated(nn.BatchNorm1d):
        def __init__(self, n: int) -> None:
            super().__init__(n)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(super().forward(x))

    net = nn.Sequential(Activated(3), nn.BatchNorm1d(3)).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    new: Any = reestimate(net, [x])
    assert torch.allclose(new[1].running_mean, torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(new[1].running_var, x.var(0, unbiased=False) / (x.var(0, unbiased=False) + 1e-5) * 20 / 19)


def test_wrong_statistics_are_mended() -> None:
    """What pruning does to statistics, in small: accuracy comes back without labels."""
    x, y = torch.randn(400, 6), torch.arange(400) % 2
    x[:, 0] += 3 * (2 * y - 1)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    opt = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
    assert evaluate(net, [(x, y)]).accuracy > 0.98
    bn: Any = net[1]
    bn.running_mean += 50  # no unit fires
    assert evaluate(net, [(x, y)]).accuracy < 0.9
    assert evaluate(reestimate(net, list(x.split(50))), [(x, y)]).accuracy > 0.98
