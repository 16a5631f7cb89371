"""Fine-tuning: what is trained, how far it can be interrupted, and the loss of a student."""

from __future__ import annotations

import copy
import math
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compress._order import order_of
from compress._trainer import Trainer
from compress.training import Distillation, FineTune, History, distillation_loss
from lrp import errors

ROOT = Path(__file__).resolve().parents[2]


def net_of(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def samples(n: int = 90) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, 4, generator=g)
    return x, x[:, :3].argmax(1)


def batches(n: int = 90, size: int = 15) -> list[tuple[Tensor, Tensor]]:
    x, y = samples(n)
    return list(zip(x.split(size), y.split(size), strict=True))


def loader() -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(*samples()), batch_size=15, shuffle=True, generator=torch.Generator().manual_seed(3)
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


# -- the loss ----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_distillation_loss_is_its_formula(temperature: float) -> None:
    s, t = (5 * torch.randn(6, 5, dtype=torch.float64) for _ in range(2))
    expected = 0.0
    for a, b in zip(s.tolist(), t.tolist(), strict=True):
        q, p = ([math.exp(v / temperature) for v in row] for row in (a, b))
        q, p = ([v / sum(row) for v in row] for row in (q, p))
        expected += sum(pk * math.log(pk / qk) for pk, qk in zip(p, q, strict=True))
    assert float(distillation_loss(s, t, temperature)) == pytest.approx(temperature**2 * expected / 6, rel=1e-10)
    assert float(distillation_loss(t, t, temperature)) == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, t, temperature), s.requires_grad_())


def test_large_temperature_matches_logits() -> None:
    """The limit of Hinton et al.: the loss goes to squared differences of centred logits over 2 C."""
    s, t = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    s, t = s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    expected = float((s - t).square().sum()) / (2 * 3 * 4)
    assert float(distillation_loss(s, t, 1e4)) == pytest.approx(expected, rel=1e-3)


# -- training ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [samples, batches, loader])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learns(kind: Any, optimizer: str) -> None:
    net = net_of()
    history = FineTune(kind(), epochs=15, lr=0.05, optimizer=optimizer, batch_size=15)(net)
    assert len(history.losses) == len(history.accuracies) == len(history.seconds) == 15
    assert history.losses[-1] < history.losses[0] / 2
    assert history.accuracies[-1] is not None
    assert history.accuracies[-1] > 0.75
    assert "15" in str(history)
    assert History.from_json(history.to_json()) == history


def test_one_step_of_sgd_by_hand() -> None:
    net = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    w, b = net.weight.detach().clone(), net.bias.detach().clone()
    FineTune([(x, y)], lr=0.3, momentum=0.0, weight_decay=0.1, schedule="constant")(net)
    p = torch.softmax(x @ w.T + b, 1)
    error = p - nn.functional.one_hot(y, 2)
    assert torch.allclose(net.weight, w - 0.3 * (error.T @ x / 8 + 0.1 * w), atol=1e-12)
    assert torch.allclose(net.bias, b - 0.3 * error.mean(0), atol=1e-12)  # no decay of biases
    assert net.weight.grad is None


def test_schedules() -> None:
    def rates(**options: Any) -> list[float]:
        trainer = Trainer(FineTune(batches(), epochs=2, lr=0.8, **options), net_of(), None)
        return [trainer.rate(k) for k in range(12)]

    assert rates(schedule="constant") == [0.8] * 12
    assert rates(schedule="linear") == pytest.approx([0.8 * (1 - k / 12) for k in range(12)])
    assert rates() == pytest.approx([0.4 * (1 + math.cos(math.pi * k / 12)) for k in range(12)])
    warm = rates(warmup=0.25)
    assert warm[:4] == pytest.approx([0.8 / 3, 1.6 / 3, 0.8, 0.8])
    assert warm[4:] == sorted(warm[4:], reverse=True)


def test_flags_and_random_states_are_put_back() -> None:
    net = net_of().train()
    net[3].eval()
    flags = [m.training for m in net.modules()]
    held = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002  # what is kept
    FineTune(batches(), epochs=2)(net)
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(torch.get_rng_state(), held[0])
    assert np.random.get_state()[1].tolist() == held[1]  # noqa: NPY002
    assert random.getstate() == held[2]


def test_frozen_parameters_and_their_statistics_stay() -> None:
    net = net_of()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    before = copy.deepcopy(net)
    FineTune(batches(), epochs=2, lr=0.1)(net)
    assert same(net[0], before[0])
    assert same(net[1], before[1])
    assert not same(net[4], before[4])
    net[1].requires_grad_(True)
    FineTune(batches(), epochs=2, lr=0.1)(net)
    assert not torch.equal(net[1].running_mean, before[1].running_mean)
    with pytest.raises(errors.InputError, match="nothing to train"):
        FineTune(batches())(net.requires_grad_(False))


def test_parameters_made_after_the_task_are_trained() -> None:
    """Pruning replaces parameters: an optimiser made before would hold dead ones."""
    net, task = net_of(), FineTune(batches(), epochs=1, lr=0.1)
    task(net)
    net[4].weight = nn.Parameter(net[4].weight.detach().clone())
    before = net[4].weight.detach().clone()
    task(net)
    assert not torch.equal(net[4].weight, before)


@pytest.mark.parametrize("kind", [samples, batches, loader])
def test_the_seed_decides(kind: Any) -> None:
    first, second, third = net_of(), net_of(), net_of()
    torch.manual_seed(10)
    FineTune(kind(), epochs=2, batch_size=15)(first)
    torch.manual_seed(20)
    FineTune(kind(), epochs=2, batch_size=15)(second)
    FineTune(kind(), epochs=2, batch_size=15, seed=1)(third)
    assert same(first, second)
    assert not same(first, third)


def test_rows_are_dealt_anew_in_every_epoch() -> None:
    x, y = torch.arange(31).float()[:, None], torch.arange(31)
    order = order_of((x, y), 10, 7)
    epochs = [[b[1].tolist() for b in order.epoch(k)] for k in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == list(range(31))
        assert [len(rows) for rows in epoch] == [8, 8, 8, 7]  # no batch of a single row
    listed = order_of(batches(), 1, 7)
    firsts = [[float(b[0][0, 0]) for b in listed.epoch(k)] for k in (0, 1)]
    assert sorted(firsts[0]) == sorted(firsts[1])
    assert firsts[0] != firsts[1]


# -- a teacher ---------------------------------------------------------------------


def test_distillation_without_labels() -> None:
    teacher, net = net_of(1).train(), net_of(2)
    x, _ = samples()
    before = copy.deepcopy(teacher)
    history = FineTune(list(x.split(15)), epochs=80, lr=0.1, distill=Distillation(teacher, temperature=2, weight=1))(
        net
    )
    assert history.accuracies == (None,) * 80
    assert history.losses[-1] < history.losses[0] / 4
    assert same(teacher, before)
    assert all(m.training for m in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    with pytest.raises(errors.InputError, match="labels"):
        FineTune(list(x.split(15)), distill=Distillation(teacher, weight=0.5))(net)


def test_the_weight_mixes_both_losses() -> None:
    net, teacher = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    x, y = samples(9)
    x = x.double()
    z, t = net(x).detach(), teacher(x).detach()
    history = FineTune([(x, y)], distill=Distillation(teacher, 3.0, 0.3), label_smoothing=0.1)(net)
    smooth = 0.9 * nn.functional.one_hot(y, 3).double() + 0.1 / 3
    hard = -(smooth * torch.log_softmax(z, 1)).sum(1).mean()
    assert history.losses[0] == pytest.approx(float(0.7 * hard + 0.3 * distillation_loss(z, t, 3.0)), rel=1e-12)


def test_wrong_teachers() -> None:
    net = net_of()
    with pytest.raises(errors.InputError, match="same object"):
        FineTune(batches(), distill=Distillation(net))(net)
    with pytest.raises(errors.MismatchError, match="outputs"):
        FineTune(batches(), distill=Distillation(nn.Linear(4, 5)))(net)
    for options in ({"temperature": 0.0}, {"weight": 0.0}, {"weight": 1.5}):
        with pytest.raises(errors.InputError, match="makes no sense"):
            Distillation(net, **options)


# -- what can go wrong -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optimizer": "lion"}, "sgd, adamw"),
        ({"schedule": "step"}, "cosine"),
        ({"mixed_precision": "int8"}, "bf16"),
        ({"epochs": 0}, "epochs=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"warmup": 3}, "share of all steps"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"patience": 2}, "patience needs something to wait for.*validation="),
        ({"patience": 0, "validation": batches(30)}, "patience=0"),
        ({"patience": -1, "validation": batches(30)}, "patience=-1"),
        ({"patience": 1.5, "validation": batches(30)}, "whole numbers.*patience=1.5"),
        ({"validation": (b for b in batches(30))}, "validation can be read once only"),
        ({"validation": TensorDataset(*samples(30))}, "validation gives single samples"),
        ({"validation": 7}, "batches"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(errors.InputError, match=match):
        FineTune(batches(), **options)


def test_wrong_data() -> None:
    for wrong in (None, torch.zeros(3, 2), (b for b in batches()), (torch.zeros(0, 2), torch.zeros(0).long())):
        with pytest.raises(errors.InputError):
            FineTune(wrong)
    with pytest.raises(errors.TargetError, match="none of the model's classes"):
        FineTune([(torch.randn(4, 4), torch.tensor([0, 1, 2, 3]))])(net_of())
    with pytest.raises(errors.InputError, match="CUDA"):
        FineTune(batches(), mixed_precision="bf16")(net_of())


def test_validation_is_apart_from_training() -> None:
    data = batches()
    with pytest.raises(errors.InputError, match="validation data are the training data"):
        FineTune(data, validation=data)
    FineTune(data, validation=batches(), patience=1)  # equal, but not the same object: a person's own business


def test_patience_stops_and_the_best_epoch_is_kept() -> None:
    """Labels that contradict the validation: every epoch is worse than the one before."""
    x, y = samples()
    held = [samples(60)]
    net = net_of()
    FineTune(batches(), epochs=15, lr=0.05)(net)
    wrong = [(x, (y + 1) % 3)]
    for patience, epochs in ((1, 2), (3, 4)):
        student, once = copy.deepcopy(net), copy.deepcopy(net)
        options: dict[str, Any] = {"epochs": 9, "lr": 0.1, "schedule": "constant", "momentum": 0.0}
        history = FineTune(wrong, validation=held, patience=patience, **options)(student)
        assert sorted(history.validations, reverse=True) == list(history.validations)
        assert (history.best, len(history.validations), len(history.losses)) == (1, epochs, epochs)
        FineTune(wrong, **{**options, "epochs": 1})(once)
        assert same(student, once)
    with pytest.raises(errors.InputError, match="labels"):
        FineTune(batches(), validation=[x])(copy.deepcopy(net))


def test_divergence_names_the_place_and_leaves_the_last_good_epoch() -> None:
    net = net_of()
    data = batches()
    kept = net_of()
    FineTune(data, epochs=1, schedule="constant")(kept)

    class Spoilt:
        """Infinite in the fourth batch of the second epoch."""

        epochs = 0

        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Iterator[Any]:
            self.epochs += 1
            for k, (x, y) in enumerate(order_of(data, 64, 0).epoch(self.epochs - 1)):
                yield (x / 0 if self.epochs == 2 and k == 3 else x), y

    with pytest.raises(errors.NonFiniteError, match=r"epoch 2, step 4.*after 1 epochs.*lower lr"):
        FineTune(Spoilt(), epochs=3, schedule="constant")(net)
    assert same(net, kept)
    with pytest.raises(errors.NonFiniteError, match=r"epoch 1"):
        FineTune(data, epochs=3, lr=1e30)(net)
    assert same(net, kept)


def test_clip_bounds_the_step() -> None:
    x, y = samples(30)
    steps = []
    for clip in (None, 1e-3):
        net = nn.Linear(4, 3)
        before = net.weight.detach().clone()
        FineTune([(1000 * x, y)], lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", clip=clip)(net)
        steps.append(float((net.weight.detach() - before).norm()))
    assert steps[1] <= 1.001e-3 < steps[0]


# -- resuming ----------------------------------------------------------------------


class StopsError(Exception):
    pass


class Stopping:
    """Data that raise in one epoch."""

    def __init__(self, data: Any, at: int, error: type[BaseException]) -> None:
        self.data, self.at, self.error, self.epochs = data, at, error, 0
        self.generator = getattr(data, "generator", None)
        self.batch_size = getattr(data, "batch_size", None)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        for k, item in enumerate(self.data):
            if self.epochs == self.at and k == 2:
                raise self.error
            yield item


@pytest.mark.parametrize("error", [StopsError, KeyboardInterrupt])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume(tmp_path: Path, error: type[BaseException], optimizer: str) -> None:
    options: dict[str, Any] = {"epochs": 4, "optimizer": optimizer, "clip": 1.0}
    expected = net_of()
    history = FineTune(Stopping(loader(), 0, error), **options)(expected)
    path, net = tmp_path / "state", net_of()
    with pytest.raises(error):
        FineTune(Stopping(loader(), 3, error), **options)(net, resume=path)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert all(p.grad is None for p in net.parameters())
    # from the beginning in a new process, or with the model as it was left
    kept = path.read_bytes()
    for model in (net_of(), net):
        path.write_bytes(kept)
        torch.manual_seed(99)
        assert FineTune(Stopping(loader(), 0, error), **options)(model, resume=path) == history
        assert same(model, expected)
    # finished: no pass
    again = net_of()
    assert FineTune(Stopping(loader(), 1, error), **options)(again, resume=path) == history
    assert same(again, expected)


def test_resume_refuses_other_runs(tmp_path: Path) -> None:
    path = tmp_path / "state"
    FineTune(batches(), epochs=2)(net_of(), resume=path)
    kept = path.read_bytes()
    x, y = batches()[0]
    refused: list[tuple[str, Any, Any]] = [
        ("lr", FineTune(batches(), epochs=2, lr=0.1), net_of()),
        ("epochs", FineTune(batches(), epochs=3), net_of()),
        ("data", FineTune([(x + 1, y), *batches()[1:]], epochs=2), net_of()),
        ("distill", FineTune(batches(), epochs=2, distill=Distillation(net_of(3))), net_of()),
        ("another network", FineTune(batches(), epochs=2), net_of(7)),
        ("parameters", FineTune(batches(), epochs=2), nn.Sequential(*net_of()[:-1], nn.Linear(12, 4))),
    ]
    for what, task, model in refused:
        before = copy.deepcopy(model)
        with pytest.raises(errors.MismatchError, match=what):
            task(model, resume=path)
        assert path.read_bytes() == kept
        assert same(model, before)
    path.write_bytes(kept[:-5])
    with pytest.raises(errors.FileFormatError, match="can not be read"):
        FineTune(batches(), epochs=2)(net_of(), resume=path)
    assert path.read_bytes() == kept[:-5]
    for bad in (tmp_path, tmp_path / "none" / "state"):
        with pytest.raises(errors.DataError, match="existing folder"):
            FineTune(batches())(net_of(), resume=bad)


def test_tied_weights_are_kept(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        net = net_of()
        net[4].weight = nn.Parameter(torch.eye(12))
        net.insert(5, nn.Linear(12, 12))
        net[5].weight = net[4].weight
        return net

    expected, net = tied(), tied()
    FineTune(Stopping(batches(), 0, StopsError), epochs=3)(expected)
    with pytest.raises(StopsError):
        FineTune(Stopping(batches(), 2, StopsError), epochs=3)(net, resume=tmp_path / "state")
    net = tied()
    FineTune(Stopping(batches(), 0, StopsError), epochs=3)(net, resume=tmp_path / "state")
    assert same(net, expected)
    assert net[5].weight is net[4].weight


def test_a_full_disk_is_an_error_and_leaves_the_last_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(StopsError):
        FineTune(Stopping(batches(), 2, StopsError), epochs=3)(net_of(), resume=path)
    kept = path.read_bytes()
    expected = net_of()
    FineTune(Stopping(batches(), 0, StopsError), epochs=3)(expected)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        with pytest.raises(errors.DataError, match=r"can not be written.*space"):
            FineTune(Stopping(batches(), 0, StopsError), epochs=3)(net_of(), resume=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    net = net_of()
    FineTune(Stopping(batches(), 0, StopsError), epochs=3)(net, resume=path)
    assert same(net, expected)


SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
from test_training import FineTune, batches, net_of
class Slow(list):
    def __getitem__(self, k):
        print(k, flush=True)
        time.sleep(0.02)
        return super().__getitem__(k)
FineTune(Slow(batches()), epochs=20, progress=False)(net_of(), resume=sys.argv[1])
"""


def test_resume_after_kill(tmp_path: Path) -> None:
    script, path = tmp_path / "script.py", tmp_path / "state"
    script.write_text(SCRIPT.format(paths=[str(ROOT), str(Path(__file__).parent)]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, str(script), str(path)], stdout=subprocess.PIPE, env=environment)
    assert child.stdout is not None
    for count, _ in enumerate(child.stdout):
        if count == 33:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    state = path.read_bytes()
    expected, net = net_of(), net_of()
    held = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that was killed
    history = FineTune(batches(), epochs=20)(expected)
    assert FineTune(batches(), epochs=20)(net, resume=path) == history
    torch.set_num_threads(held)
    assert path.read_bytes() != state
    assert same(net, expected)
    assert {p.name for p in tmp_path.iterdir()} <= {"state", "script.py"}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "off"])
def test_mixed_precision(precision: str, tmp_path: Path) -> None:
    net = net_of().cuda()
    task = FineTune(samples(), epochs=20, lr=0.05, batch_size=15, mixed_precision=precision)
    history = task(net, resume=tmp_path / "state")
    assert history.losses[-1] < history.losses[0] / 2
    assert all(p.dtype == torch.float32 for p in net.parameters())
    again = net_of().cuda()
    assert task(again, resume=tmp_path / "state") == history
    assert same(net, again)
