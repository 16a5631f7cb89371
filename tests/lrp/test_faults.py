"""Interrupted, failing and concurrent calls leave nothing behind and mix nothing up."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp

ALL = ("input", "layers", "channels", "weights")


class Fault:
    """When a forward pass is to raise; no attribute of the model, since those are put back."""

    calls = 0
    at = 0
    error: BaseException = RuntimeError()


FAULT = Fault()


class Net(nn.Module):
    """Raises what it is told to at its k-th forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        FAULT.calls += 1
        if FAULT.calls == FAULT.at:
            raise FAULT.error
        return self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))


@pytest.fixture
def net() -> Net:
    return Net().double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 4, 4, dtype=torch.float64)


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {k: (v.clone(), v.data_ptr(), v._version) for k, v in model.state_dict().items()},
        "types": [(n, type(m), sorted(k for k in vars(m))) for n, m in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "parameters": [(n, id(p), type(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
    }


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = all(
        torch.equal(v, b["tensors"][k][0]) and (pointer, version) == b["tensors"][k][1:]
        for k, (v, pointer, version) in a["tensors"].items()
    )
    return tensors and all(a[k] == b[k] for k in ("types", "hooks", "parameters"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no")], ids=["interrupted", "failing"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_stopped_while_planning(net: Net, x: Tensor, k: int, error: BaseException) -> None:
    """The forward is run, traced and compared: stop it in each, then call again."""
    expected = lrp.attribute(copy.deepcopy(net), x, 1, wrt=ALL)
    mode, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    before = _state(net)
    FAULT.calls, FAULT.at, FAULT.error = 0, k, error
    with pytest.raises((KeyboardInterrupt, lrp.errors.LRPError, RuntimeError)):
        lrp.attribute(net, x, 1, wrt=ALL)
    FAULT.at = 0
    assert _same(before, _state(net))
    assert (mode, grad) == (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
    again = lrp.attribute(net, x, 1, wrt=ALL)
    assert torch.equal(again.input, expected.input)
    assert all(torch.equal(again.weights[n], r) for n, r in expected.weights.items())


def test_stopped_in_the_backward_pass(net: Net, x: Tensor) -> None:
    class Stop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1

    def rule(c: Tensor, y: Tensor, t: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 3), Stop(), nn.Linear(3, 2)).double().eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = lrp.attribute(model, x, 1).input
    before = _state(model)
    with lrp.register(Stop, rule), pytest.raises(KeyboardInterrupt):
        lrp.attribute(model, x, 1, wrt=ALL)
    assert _same(before, _state(model))
    assert torch.equal(lrp.attribute(model, x, 1).input, expected)


def test_two_threads_two_models_many_composites(x: Tensor) -> None:
    """Cold plans, edits of one model between calls, several composites: the numbers of a serial run."""
    models = [Net().double().eval() for _ in range(2)]
    composites: list[Any] = ["epsilon", "epsilon_plus", lrp.rules.Gamma(), "guided_backprop"]
    expected = {
        (i, j, step): lrp.attribute(_edited(models[i], step), x, 1, composite=c, wrt=ALL)
        for i in range(2)
        for j, c in enumerate(composites)
        for step in range(2)
    }
    barrier = threading.Barrier(2)

    def work(i: int) -> list[bool]:
        same = []
        for step in range(2):
            barrier.wait()
            if step:
                models[i].conv.weight.data += 0.1
            for j, c in enumerate(composites):
                rel, want = lrp.attribute(models[i], x, 1, composite=c, wrt=ALL), expected[i, j, step]
                same.append(torch.equal(rel.input, want.input))
                same += [torch.equal(rel.weights[n], r) for n, r in want.weights.items()]
        return same

    with ThreadPoolExecutor(2) as pool:
        results = [f.result() for f in [pool.submit(work, i) for i in range(2)]]
    assert all(all(r) and len(r) > 16 for r in results)


def _edited(model: Net, step: int) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.conv.weight.data += 0.1 * step
    return twin


def test_one_plan_in_four_threads(net: Net, x: Tensor) -> None:
    plan = lrp.prepare(net, x, "epsilon_plus")
    batches = [torch.randn(n, 2, 4, 4, dtype=torch.float64) for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    serial = [plan.attribute(b, 1, wrt=ALL) for b in batches]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda b: plan.attribute(b, 1, wrt=ALL), batches))
    for one, two in zip(serial, threaded, strict=True):
        assert torch.equal(one.input, two.input)
        assert all(torch.equal(two.channels[n], r) for n, r in one.channels.items())
        assert torch.equal(one.ledger.gap, two.ledger.gap)


def test_planning_in_one_thread_does_not_disturb_use_in_another() -> None:
    """Tracing swaps a model's tensors for a moment."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    x = torch.randn(3, 3, 8, 8)
    plan = lrp.prepare(model, x)
    expected = plan.attribute(x, 1).input
    stop, wrong = threading.Event(), []

    def use() -> None:
        try:
            while not stop.is_set():
                if not torch.allclose(plan.attribute(x, 1).input, expected, rtol=1e-4, atol=1e-7):
                    wrong.append("numbers")
        except BaseException as error:
            wrong.append(repr(error))

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for size in range(9, 16):
            lrp.prepare(model, torch.randn(2, 3, size, size))
    finally:
        stop.set()
        thread.join()
    assert not wrong
