"""compress.quantize from end to end: methods, rates, targets, resumption, what is refused."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import FineTune, Rate, Target, WeightRelevance, ZeroCost
from compress.codebook import codebook_of
from compress.quantization_plan import QuantizationPlan, plan_of
from compress.rounding import ROUNDING
from lrp.errors import BudgetError, ConvergenceError, FileFormatError, InputError, MismatchError

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ("ecq", "ecqx", "magnitude", "gradient", "random")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def samples(n: int = 120, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 7, 7, generator=g)
    y = torch.stack([x[:, 0, :3].mean((1, 2)), x[:, 0, 4:].mean((1, 2)), x[:, 0, :, :3].mean((1, 2))], 1).argmax(1)
    return x, y


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    net = network()
    FineTune(samples(), epochs=12, optimizer="adamw", lr=5e-3, batch_size=20, progress=False)(net)
    return net.eval()


def train(epochs: int = 3, **options: Any) -> FineTune:
    return FineTune(samples(), epochs=epochs, optimizer="adamw", lr=2e-3, batch_size=20, progress=False, **options)


def quantize(net: nn.Module, **options: Any) -> compress.QuantizeResult:
    if options.get("method", "ecq") in TRAINED and "train" not in options:
        options["train"] = train()
    return compress.quantize(net, samples(), evaluate=[samples(200, 2)], progress=False, **options)


@pytest.mark.parametrize("method", [*TRAINED, *ROUNDING])
def test_every_method(trained: nn.Sequential, method: str) -> None:
    before = copy.deepcopy(trained.state_dict())
    result = quantize(trained, method=method, bits=4)
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    assert plan_of(trained) is None
    assert plan_of(result.model) is result.plan
    assert set(result.plan.codebooks) == {"0.weight", "3.weight", "8.weight"}
    assert result.evaluation is not None
    assert result.evaluation_before is not None
    assert result.evaluation.accuracy > result.evaluation_before.accuracy - 0.25
    text = json.dumps(result.report, allow_nan=False)
    assert json.loads(text)["tensors"]["3.weight"]["bits"] == 4
    assert f"{result.reached.bytes:,} after" in str(result)
    assert not result.model.training


def test_rounding_by_hand(trained: nn.Sequential) -> None:
    result = quantize(trained, method="rtn_per_channel", bits=3, first=None, last=None)
    w = trained[3].weight.detach()
    step = w.abs().amax((1, 2, 3)) / 3
    expected = (w / step.view(-1, 1, 1, 1)).round().clamp(-3, 3) * step.view(-1, 1, 1, 1)
    assert torch.allclose(result.model.get_parameter("3.weight"), expected)
    error = {}
    for method in ROUNDING:
        q = quantize(trained, method=method, bits=3, first=None, last=None).model.get_parameter("3.weight")
        error[method] = float((q - w).detach().square().sum())
    assert error["mse"] <= error["rtn"]
    assert error["mse_per_channel"] <= error["rtn_per_channel"]
    assert error["mse_per_channel"] <= error["mse"]


def test_batch_norm_statistics_are_taken_anew(trained: nn.Sequential) -> None:
    plain = quantize(trained, method="rtn", bits=2)
    again = quantize(trained, method="rtn", bits=2, reestimate_batchnorm=True)
    assert torch.equal(plain.model[1].running_var, trained[1].running_var)  # type: ignore[index,arg-type]  # a Sequential
    assert not torch.equal(again.model[4].running_var, trained[4].running_var)  # type: ignore[index,arg-type]  # as above
    assert torch.equal(plain.model.get_parameter("3.weight"), again.model.get_parameter("3.weight"))


@pytest.mark.parametrize("rate", [Rate(zeros=0.8), Rate(bits_per_weight=1.5)])
@pytest.mark.parametrize("method", ["ecq", "ecqx"])
def test_a_rate_is_held_to_the_end(trained: nn.Sequential, method: str, rate: Rate) -> None:
    result = quantize(trained, method=method, bits=4, rate=rate, train=train(2))
    r = result.reached
    assert abs(rate.excess(r.zeros, r.bits_per_weight)) < 0.15  # searched every ten steps, not after the last
    assert result.gamma != 0.05


@pytest.mark.parametrize("method", ["ecq", "ecqx"])
def test_bytes_are_never_exceeded(trained: nn.Sequential, tmp_path: Path, method: str) -> None:
    for limit in (3200, 3600):
        result = quantize(trained, method=method, bits=5, target=Target(bytes=limit), train=train(2))
        compress.save(result.model, tmp_path / "net")
        size = (tmp_path / "net").stat().st_size
        assert result.reached.bytes == size <= limit
        assert size > 0.93 * limit or result.gamma == 0
    with pytest.raises(BudgetError, match="no room"):
        quantize(trained, method=method, target=Target(bytes=600))


def test_without_training_relevance_is_averaged_over_the_data(trained: nn.Sequential) -> None:
    import lrp

    result = quantize(trained, method="ecqx", bits=3, gamma=0.4, train=False)
    plain = quantize(trained, method="ecq", bits=3, gamma=0.4, train=False)
    assert any(s.relevance == "ok" for s in result.states.values())
    assert not torch.equal(result.model.get_parameter("3.weight"), plain.model.get_parameter("3.weight"))
    x, y = samples()
    weights = lrp.attribute(trained, x, y, composite="epsilon_plus_flat", wrt="weights", weight_rule="epsilon").weights
    given = quantize(trained, method="ecqx", bits=3, gamma=0.4, train=False, relevance=weights)
    same = given.model.get_parameter("3.weight") == result.model.get_parameter("3.weight")
    assert float(same.double().mean()) > 0.98  # but for rounding of sums


def test_a_pruned_network(trained: nn.Sequential, tmp_path: Path) -> None:
    x, y = samples()
    pruned = compress.prune(trained, x[:1], [(x, y)], target=Target(channels=0.5), round_to=1, progress=False).model
    result = compress.quantize(pruned, (x, y), method="ecqx", bits=4, train=train(2), progress=False)
    compress.save(result.model, tmp_path / "net")
    again = compress.load(tmp_path / "net", network)
    assert again[0].out_channels < 8  # type: ignore[index]  # a Sequential
    with torch.no_grad():
        assert torch.equal(again(x), result.model.eval()(x))
    assert plan_of(again) is not None


def test_relevance_collected_once_serves_both(trained: nn.Sequential) -> None:
    import lrp

    x, y = samples()
    total = lrp.collect(trained, [(x, y)], wrt=("channels", "weights"), progress=False)
    plan = compress.plan_pruning(
        trained,
        x[:1],
        [(x, y)],
        criterion=lambda model, batches: total.channels,
        target=Target(channels=0.75),
        round_to=1,
    )
    assert plan.removed
    result = compress.quantize(
        trained, (x, y), method="ecqx", bits=4, train=train(1), relevance=total.weights, progress=False
    )
    assert result.settings["relevance"] == "given"


def test_early_stopping_keeps_the_best_epoch(trained: nn.Sequential) -> None:
    held = [samples(80, 3)]
    result = quantize(trained, method="ecqx", bits=2, gamma=0.3, train=train(12, validation=held, patience=2))
    history = result.training
    assert history is not None
    assert history.best == history.validations.index(max(history.validations)) + 1
    assert len(history.validations) <= history.best + 2
    assert compress.evaluate(result.model, held).accuracy == pytest.approx(max(history.validations))
    assert plan_of(result.model) is not None


def test_seeds(trained: nn.Sequential) -> None:
    first, again = (quantize(trained, method="random", bits=3, gamma=0.4, train=train(1), seed=1) for _ in range(2))
    other = quantize(trained, method="random", bits=3, gamma=0.4, train=train(1), seed=2)
    w = [r.model.get_parameter("3.weight") for r in (first, again, other)]
    assert torch.equal(w[0], w[1])
    assert not torch.equal(w[0], w[2])


def test_collapse_is_an_error_unless_allowed(trained: nn.Sequential) -> None:
    with pytest.raises(ConvergenceError, match="became zero"):
        quantize(trained, method="ecq", bits=4, gamma=30.0, train=train(1))
    result = quantize(trained, method="ecq", bits=4, gamma=30.0, train=train(1), allow_collapse=True)
    assert result.collapsed
    assert "zero throughout" in str(result)


@pytest.mark.parametrize("method", ["ecq", "ecqx"])
def test_frozen_layers_keep_their_background(trained: nn.Sequential, method: str) -> None:
    """Where it does not move, neither do the levels: they are those that one assignment without training finds."""
    import lrp

    net = copy.deepcopy(trained)
    net[3].requires_grad_(False)
    options: dict[str, Any] = {"method": method, "bits": 4, "gamma": 0.3}
    if method == "ecqx":  # relevance that is not refreshed
        options["relevance"] = lrp.collect(net, [samples()], wrt="weights", progress=False).weights
    result = quantize(net, train=train(2), **options)
    still = quantize(net, train=False, **options)
    found, expected = (r.plan.indices(r.model) for r in (result, still))
    assert not result.model.get_parameter("3.weight").requires_grad
    assert torch.equal(found["3.weight"], expected["3.weight"])
    assert not torch.equal(found["3.weight"], codebook_of(net[3].weight, 4).nearest(net[3].weight))  # gamma acts
    for name in ("0.weight", "8.weight"):
        assert not torch.equal(found[name], expected[name])  # the others were trained


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_types(trained: nn.Sequential, dtype: torch.dtype) -> None:
    net = copy.deepcopy(trained).to(dtype)
    x, y = samples()
    result = compress.quantize(net, (x.to(dtype), y), method="ecqx", bits=4, progress=False,
                               train=FineTune((x.to(dtype), y), epochs=1, progress=False))  # fmt: skip
    assert result.model.get_parameter("3.weight").dtype == dtype


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "gptq"}, "unknown method"),
        ({"method": "rtn", "train": True}, "does not train"),
        ({"method": "rtn", "rate": Rate(zeros=0.5)}, "no rate"),
        ({"method": "rtn", "step": "mse"}, "step of its own"),
        *[
            ({"method": method, name: value}, f"'{method}' knows no relevance")
            for method in ("ecq", *ROUNDING)
            for name, value in (("relevance", WeightRelevance()), ("relevance", {}), ("zero_cost", ZeroCost()))
        ],
        *[
            ({"method": method, name: value}, f"'{method}' knows no {name}.*{name}={value!r}")
            for method in ROUNDING
            for name, value in (("gamma", 0.1), ("lambda_rule", "max"), ("grad_scale", "abs"))
        ],
        ({"zero_cost": ZeroCost()}, "'ecq' knows no relevance"),  # the method if none is given
        ({"method": "ecqx", "train": False, "resume": "folder"}, "no training to resume"),
        ({"method": "ecq", "train": False, "resume": "folder"}, "no training to resume"),
        ({"method": "random", "relevance": {"3.weight": torch.ones(16, 8, 3, 3)}}, "'random' has a source of its own"),
        ({"first": 1}, "first is no number of bits"),
        ({"method": "rtn", "last": True}, "last is no number of bits"),
        ({"exclude": "nothing"}, "'nothing' fits no layer"),
        ({"exclude": 5}, "exclude names no layers"),
        *[({"train": train}, "train is of another kind") for train in ("no", -1, float("nan"), [], object())],
        ({"rate": 0.9}, "rate is of another kind"),
        ({"method": "ecqx", "relevance": "x"}, "relevance is of another kind"),
        ({"method": "ecqx", "zero_cost": "x"}, "zero_cost is of another kind"),
        ({"gamma": True}, "gamma makes no sense"),
        ({"device": "nonsense"}, "no such device"),
        ({"method": []}, "unknown method"),
        ({"rate": Rate(zeros=0.5), "target": Target(bytes=100)}, "two goals"),
        ({"target": Target(macs=0.5)}, "knows no such target"),
        ({"seed": -1}, "seed"),
        ({"bits": 9}, "bits"),
        ({"bits": {"nothing*": 4}}, "fits no layer"),
        ({"method": "gradient", "train": False}, "training step"),
    ],
)
def test_refused(
    trained: nn.Sequential, options: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=match):
        compress.quantize(trained, samples(), progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_rounding_takes_what_it_does_not_read_as_it_is_by_default(trained: nn.Sequential) -> None:
    given = quantize(trained, method="rtn", gamma=0.05, lambda_rule="thesis", grad_scale="plain")
    assert torch.equal(given.model.get_parameter("3.weight"), quantize(trained, method="rtn").model[3].weight)  # type: ignore[index,arg-type]  # a Sequential


def test_bytes_are_not_exceeded_by_new_statistics(trained: nn.Sequential) -> None:
    """Statistics taken anew are other floats, which deflate to another length."""
    trained = copy.deepcopy(trained)
    for layer in trained.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()  # 0 and 1 deflate to nothing
    plain = compress.quantize(trained, samples(), train=False, bits=4, reestimate_batchnorm=True, progress=False)
    assert any(bool((m.running_mean != 0).any()) for m in plain.model.modules() if isinstance(m, nn.BatchNorm2d))
    for limit in (plain.reached.bytes - 40, int(0.9 * plain.reached.bytes)):
        found = compress.quantize(
            trained,
            samples(),
            train=False,
            bits=4,
            reestimate_batchnorm=True,
            target=Target(bytes=limit),
            progress=False,
        )
        assert found.reached.bytes <= limit


def test_bytes_that_are_reached_by_deflated_floats_are_not_refused() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zeros = nn.Parameter(torch.zeros(20_000))
            self.conv, self.linear = nn.Conv2d(1, 16, 3), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).mean((2, 3))) + self.zeros[0]  # type: ignore[no-any-return]  # a tensor

    torch.manual_seed(0)
    net = Padded()
    free = compress.quantize(net, train=False, progress=False).reached.bytes
    assert free < 3000
    found = compress.quantize(net, train=False, target=Target(bytes=free - 20), progress=False)
    assert found.reached.bytes <= free - 20
    with pytest.raises(BudgetError, match=r"no room for the weights.*if every quantized weight is zero"):
        compress.quantize(net, train=False, target=Target(bytes=200), progress=False)


def test_a_rate_that_is_out_of_reach_is_told() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.3)
    with pytest.warns(UserWarning, match=r"the rate was not reached: 0.0% of the weights are zero"):
        result = compress.quantize(net, rate=Rate(zeros=0.9), train=False, progress=False)
    assert "asked for: zeros = 0.9, which was not reached" in str(result)


def test_one_pattern_to_exclude_may_stand_alone(trained: nn.Sequential) -> None:
    result = quantize(trained, method="rtn", exclude="3.*")
    assert set(result.plan.codebooks) == {"0.weight", "8.weight"}
    assert torch.equal(result.model.get_parameter("3.weight"), trained.get_parameter("3.weight"))
    assert result.settings["exclude"] == ["3.*"]


def test_data_that_are_not_read_may_be_left_out(trained: nn.Sequential) -> None:
    given = {n: p.detach() ** 3 for n, p in trained.named_parameters() if p.dim() > 1}
    for options in ({"method": "ecq"}, {"method": "magnitude"}, {"method": "ecqx", "relevance": given}):
        shared: dict[str, Any] = {**options, "bits": 3, "gamma": 0.4, "train": False, "progress": False}
        without, beside = (compress.quantize(trained, data, **shared) for data in (None, samples()))
        found, expected = (r.plan.indices(r.model) for r in (without, beside))
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    for method in ("ecqx", "random"):
        with pytest.raises(InputError, match="data is missing"):
            compress.quantize(trained, method=method, train=False)


def test_data_are_needed(trained: nn.Sequential) -> None:
    with pytest.raises(InputError, match="no data"):
        compress.quantize(trained)
    with pytest.raises(InputError, match="need data"):
        compress.quantize(trained, method="rtn", reestimate_batchnorm=True)


# -- the plan -------------------------------------------------------------------------
def test_plan_as_json(trained: nn.Sequential, tmp_path: Path) -> None:
    result = quantize(trained, method="mse_per_channel", bits=3)
    result.plan.save(tmp_path / "plan.json")
    again = QuantizationPlan.load(tmp_path / "plan.json")
    assert str(again) == str(result.plan)
    assert all(torch.equal(again.codebooks[n].step, b.step) for n, b in result.plan.codebooks.items())
    found = result.plan.statistics(result.model)["3.weight"]
    k = result.plan.indices(result.model)["3.weight"]
    assert found["zeros"] == pytest.approx(float((k == 0).double().mean()))
    p = torch.bincount(k.flatten() + 3).double() / k.numel()
    assert found["entropy"] == pytest.approx(float(-(p[p > 0] * p[p > 0].log2()).sum()))
    (tmp_path / "plan.json").write_text('{"kind": "other"}')
    with pytest.raises(FileFormatError, match="no quantization plan"):
        QuantizationPlan.load(tmp_path / "plan.json")
    with pytest.raises(MismatchError, match="not the one"):
        result.plan.indices(nn.Linear(2, 2))


# -- interruption ---------------------------------------------------------------------
_SCRIPT = """
import sys, hashlib
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_quantization import network, samples
import compress
from compress import FineTune
net = network()
class Slow:
    def __iter__(self):
        import time
        x, y = samples()
        for rows in torch.arange(120).split(20):
            time.sleep({pause})
            yield x[rows], y[rows]
    def __len__(self):
        return 6
task = FineTune(Slow(), epochs=6, optimizer="adamw", lr=2e-3, progress=False)
result = compress.quantize(net, samples(), method="ecqx", bits=3, gamma={gamma}, train=task, resume={folder!r},
                           relevance=compress.WeightRelevance(every=2, momentum=0.8), progress=False)
digest = hashlib.sha256()
for name, t in result.model.state_dict().items():
    digest.update(t.numpy().tobytes())
print("digest", digest.hexdigest())
"""


def _script(folder: Path, pause: float, gamma: float = 0.3) -> list[str]:
    text = _SCRIPT.format(tests=str(Path(__file__).parent), pause=pause, gamma=gamma, folder=str(folder))
    return [sys.executable, "-c", text]


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    whole = subprocess.run(_script(tmp_path / "a", 0.0), env=_env(), capture_output=True, text=True, check=True).stdout
    process = subprocess.Popen(_script(tmp_path / "b", 0.15), env=_env(), stdout=subprocess.PIPE, text=True)
    state = tmp_path / "b" / "quantizing.state"
    deadline = time.monotonic() + 120
    seen = set()
    while len(seen) < 4 and time.monotonic() < deadline:  # the start and three epochs
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # which closes its pipe, too
    assert len(seen) >= 3
    again = subprocess.run(_script(tmp_path / "b", 0.0), env=_env(), capture_output=True, text=True, check=True).stdout
    assert again == whole
    other = subprocess.run(
        _script(tmp_path / "b", 0.0, gamma=0.4), env=_env(), capture_output=True, text=True, check=False
    )
    assert other.returncode
    assert "MismatchError" in other.stderr


def test_resume_is_refused_for_the_rounding_methods(trained: nn.Sequential, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not train"):
        compress.quantize(trained, method="rtn", resume=tmp_path)


@pytest.mark.parametrize("method", ["ecq", "ecqx"])
def test_what_is_fitted_at_the_end_is_the_best_epoch(trained: nn.Sequential, method: str) -> None:
    """Weights are assigned anew from those behind the levels, which must be of that epoch, too."""
    held = [samples(200, 2)]
    x, y = samples()
    wrong = (x, (y + 1) % 3)  # so that every epoch is worse than the one before
    task = FineTune(wrong, epochs=5, optimizer="adamw", lr=2e-3, batch_size=20, validation=held, progress=False)
    result = quantize(trained, method=method, train=task, target=Target(bytes=0.9))  # which binds nothing
    history = result.training
    assert history is not None
    assert 0 < history.best < 5
    assert result.evaluation is not None
    assert result.evaluation.accuracy == max(history.validations)


def test_relevance_settings_are_told(trained: nn.Sequential) -> None:
    result = quantize(
        trained, method="ecqx", bits=4, train=train(1), relevance=WeightRelevance(at="quantized", every=3)
    )
    assert result.settings["relevance"]["at"] == "quantized"
    assert not any(isinstance(v, float) and math.isnan(v) for v in result.settings.values())
