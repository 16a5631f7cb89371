"""Pruning that is killed, interrupted or resumed, and its folder."""

from __future__ import annotations

import functools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned import Net, accuracies, batches, make_net, run, same_results, samples
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compress
from compress.pruning import Iterative
from compress.training import FineTune
from lrp import errors

ROOT = Path(__file__).resolve().parents[2]
# small nets are judged by the samples they were ranked on, which prune warns of
pytestmark = pytest.mark.filterwarnings("ignore:evaluate= and data= are not apart")


@pytest.fixture
def net() -> Net:
    return make_net()


# -- resuming ----------------------------------------------------------------------


class StopsError(Exception):
    pass


class Bomb:
    """Goes off at its k-th touch."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.touched = at, error, 0

    def touch(self) -> None:
        self.touched += 1
        if self.touched == self.at:
            raise self.error


NOW = [Bomb(0, StopsError)]


def loader(seed: int = 3) -> Any:
    return DataLoader(
        TensorDataset(*samples()), batch_size=24, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


class Touching:
    """A loader that touches the bomb with every batch."""

    def __init__(self, data: Any) -> None:
        self.data, self.generator, self.batch_size = data, data.generator, data.batch_size

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for item in self.data:
            NOW[0].touch()
            yield item


def scored(model: nn.Module, data: Any) -> dict[str, Tensor]:
    """Depends on the weights, on the order of the data to rounding, and on random numbers."""
    NOW[0].touch()
    out = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            x, _ = next(iter(data))
            out[name] = m.weight.detach().abs().sum((1, 2, 3)) * (1 + x.std()) + 0.01 * torch.rand(m.out_channels)
    return out


def own_training(model: nn.Module) -> None:
    NOW[0].touch()
    noise = torch.randn(3)
    for x, y in batches():
        NOW[0].touch()
        loss = nn.functional.cross_entropy(model(x), y) + 0.1 * (model.head.bias * noise).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.05 * g


def everything(training: str, rescore: str = "per_step") -> dict[str, Any]:
    """All that can be interrupted."""
    tune: Any = own_training if training == "own" else FineTune(Touching(loader(4)), epochs=2, lr=0.02, progress=False)
    return {
        "data": Touching(loader(5)),
        "criterion": scored,
        "schedule": Iterative(3, rescore=rescore),
        "fine_tune": tune,
        "evaluate": Touching(loader(6)),
        "reestimate_data": Touching(loader(7)),
    }


@pytest.mark.parametrize(
    ("training", "rescore", "error"), [("own", "once", KeyboardInterrupt), ("fine_tune", "per_step", StopsError)]
)
def test_resume_from_anywhere(
    net: Net, tmp_path: Path, training: str, rescore: str, error: type[BaseException]
) -> None:
    NOW[0] = Bomb(0, error)
    expected = run(net, **everything(training, rescore))
    total = NOW[0].touched
    assert total > 50
    for at in range(1, total + 1, 7):
        folder = tmp_path / str(at)
        NOW[0] = Bomb(at, error)
        torch.manual_seed(at)
        with pytest.raises(error):
            run(net, resume=folder, **everything(training, rescore))
        NOW[0] = Bomb(0, error)
        result = run(net, resume=folder, **everything(training, rescore))
        same_results(result, expected)
        assert NOW[0].touched < total or at < 8  # in the first evaluation nothing is done yet
        assert {p.name for p in folder.iterdir()} == {"lock", "finished.state"}


def test_a_finished_run_returns_at_once(net: Net, tmp_path: Path) -> None:
    NOW[0] = Bomb(0, StopsError)
    options = everything("own")
    first = run(net, resume=tmp_path, accuracy_floor=0.1, **options)
    kept = (tmp_path / "finished.state").read_bytes()
    NOW[0] = Bomb(1, StopsError)
    same_results(run(net, resume=tmp_path, accuracy_floor=0.1, **options), first)
    assert (tmp_path / "finished.state").read_bytes() == kept


def test_a_run_that_was_stopped_by_the_floor_stays_so(net: Net, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": Iterative(3), "accuracy_floor": 0.8, "resume": tmp_path}
    first = run(net, evaluate=accuracies(0.9, 0.85, 0.7), **options)
    assert "step 2" in first.stopped
    again = run(net, evaluate=accuracies(), **options)
    same_results(again, first)


def test_after_an_interruption_only_what_is_missing_is_done(net: Net, tmp_path: Path) -> None:
    calls: list[str] = []

    def criterion(model: Any, data: Any) -> Any:
        calls.append(f"score {model.inner.out_channels}")
        return {n: m.weight.detach().abs().sum((1, 2, 3)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def train(model: Any) -> None:
        calls.append(f"train {model.inner.out_channels}")
        if len(calls) == 4:
            raise StopsError

    options: dict[str, Any] = {"criterion": criterion, "fine_tune": train, "schedule": Iterative(2), "resume": tmp_path}
    with pytest.raises(StopsError):
        run(net, **options)
    result = run(net, **options)
    width = result.model.inner.out_channels
    # the callback is called again, the criterion is not
    assert [c.split()[0] for c in calls] == ["score", "train", "score", "train", "train"]
    assert calls[3] == calls[4] == f"train {width}"


def test_functions_are_told_apart_by_code_and_identity(net: Net, tmp_path: Path) -> None:
    rate = [0.1]

    def train(model: Any) -> None:
        model.head.bias.data += rate[0]

    run(net, resume=tmp_path, fine_tune=train)
    rate[0] = 0.2
    run(net, resume=tmp_path, fine_tune=train)  # what it reads is not looked at, and the docstring says so
    train.identity = "0.2"  # type: ignore[attr-defined]
    for other in (train, lambda model: None, functools.partial(lambda model: model.eval())):
        with pytest.raises(errors.MismatchError, match="another run: fine_tune"):
            run(net, resume=tmp_path, fine_tune=other)


def test_resume_refuses_other_runs(net: Net, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": Iterative(2), "evaluate": batches(), "fine_tune": FineTune(batches())}
    run(net, resume=tmp_path, **options)
    kept = (tmp_path / "finished.state").read_bytes()
    others: list[tuple[str, dict[str, Any]]] = [
        ("target", {"target": compress.Target(macs=0.41)}),
        ("criterion", {"criterion": "random"}),
        ("schedule", {"schedule": Iterative(3)}),
        ("schedule", {"schedule": Iterative(2, rescore="once")}),
        ("fine_tune", {"fine_tune": FineTune(batches(), lr=0.1)}),
        ("fine_tune", {"fine_tune": None}),
        ("options", {"normalisation": "sum"}),
        ("accuracy_floor", {"accuracy_floor": 0.1}),
        ("reestimate_batchnorm", {"reestimate_batchnorm": False}),
        ("seed", {"seed": 1}),
        ("data", {"data": batches(12)}),
    ]
    for what, change in others:
        with pytest.raises(errors.MismatchError, match=rf"another run: {what}"):
            run(net, resume=tmp_path, **{**options, **change})
    with torch.no_grad():
        net.head.bias += 1e-3
    with pytest.raises(errors.MismatchError, match="weights"):
        run(net, resume=tmp_path, **options)
    assert (tmp_path / "finished.state").read_bytes() == kept


@pytest.mark.parametrize("name", ["finished.state", "step.state", "tuning-2.state"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_an_error_and_stays(net: Net, tmp_path: Path, name: str, how: str) -> None:
    NOW[0] = Bomb(0, StopsError)
    run(net, **everything("fine_tune"))
    total = NOW[0].touched
    NOW[0] = Bomb(total * 2 // 3 - 6, StopsError)  # in the training of step 2
    with pytest.raises(StopsError):
        run(net, resume=tmp_path, **everything("fine_tune"))
    path = tmp_path / name
    whole = path.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"lock", "finished.state", "step.state", "tuning-2.state"}
    damaged = {"truncated": whole[:-100], "empty": b"", "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]}[
        how
    ]
    path.write_bytes(damaged)
    held = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    NOW[0] = Bomb(0, StopsError)
    with pytest.raises(errors.FileFormatError, match=name):
        run(net, resume=tmp_path, **everything("fine_tune"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == held
    path.write_bytes(whole)
    run(net, resume=tmp_path, **everything("fine_tune"))


def test_a_full_disk(net: Net, tmp_path: Path) -> None:
    """The limit on the size of a file stands for the disk."""
    NOW[0] = Bomb(0, StopsError)
    expected = run(net, **everything("own"))
    NOW[0] = Bomb(expected_touches() * 2 // 3, StopsError)
    with pytest.raises(StopsError):
        run(net, resume=tmp_path, **everything("own"))
    kept = (tmp_path / "finished.state").read_bytes()
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    NOW[0] = Bomb(0, StopsError)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, old[1]))
        with pytest.raises(errors.DataError, match=r"can not be written.*goes on after"):
            run(net, resume=tmp_path, **everything("own"))
        with pytest.raises(errors.DataError, match="can not be written"):
            run(net, resume=tmp_path / "new", **everything("own"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "finished.state").read_bytes() == kept
    assert not list(tmp_path.rglob("*.part"))
    same_results(run(net, resume=tmp_path, **everything("own")), expected)


def expected_touches() -> int:
    return NOW[0].touched


SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
import test_pruning_resume as t
from safetensors.torch import load_file
class Slow(t.Bomb):
    def touch(self):
        self.touched += 1
        print(self.touched, flush=True)
        time.sleep(0.01)
t.torch.set_num_threads(1)
t.NOW[0] = Slow(0, t.StopsError)
net = t.Net().eval()
net.load_state_dict(load_file(sys.argv[3]))
t.run(net, resume=sys.argv[1], **t.everything(sys.argv[2]))
"""


def killed(tmp_path: Path, training: str, after: int) -> None:
    """A process that works in the folder "run" and is killed after some touches."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]))
    save_file(make_net().state_dict(), tmp_path / "weights")
    command = [sys.executable, str(script), str(tmp_path / "run"), training, str(tmp_path / "weights")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= after:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are split over threads: bits depend on their number."""
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["own", "fine_tune"])
def test_resume_after_kills(net: Net, tmp_path: Path, training: str, one_thread: None) -> None:
    NOW[0] = Bomb(0, StopsError)
    expected = run(net, **everything(training))
    total, left = NOW[0].touched, []
    for share in (0.35, 0.35):  # the second lands later: it goes on where the first one was
        killed(tmp_path, training, int(share * total))
        left.append({p.name for p in (tmp_path / "run").iterdir()})
    assert all("finished.state" in names for names in left)
    NOW[0] = Bomb(0, StopsError)
    same_results(run(net, resume=tmp_path / "run", **everything(training)), expected)
    assert NOW[0].touched < total / 2
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"lock", "finished.state"}


def test_folders_that_can_not_be_used(net: Net, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for bad in (file, file / "below", Path("/proc/self/none")):
        with pytest.raises(errors.DataError, match="can not be used"):
            run(net, resume=bad)
    assert file.read_text() == "mine"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finished.state").write_text("mine")
    with pytest.raises(errors.FileFormatError):
        run(net, resume=tmp_path / "run")
    assert (tmp_path / "run" / "finished.state").read_text() == "mine"


def test_one_process_at_a_time(net: Net, tmp_path: Path) -> None:
    def second(model: nn.Module) -> None:
        with pytest.raises(errors.DataError, match="another process is at work"):
            run(net, resume=tmp_path)

    run(net, resume=tmp_path, fine_tune=second)


def test_loaders_without_their_generators(net: Net, tmp_path: Path) -> None:
    NOW[0] = Bomb(0, StopsError)
    run(net, resume=tmp_path, data=loader())
    plain = DataLoader(TensorDataset(*samples()), batch_size=24)
    with pytest.raises(errors.MismatchError, match="generators"):
        run(net, resume=tmp_path, data=plain)
