"""Training and quantization by several processes of torch.distributed: as one process that has the samples of all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import compress
import compress._trainer
from compress import Distillation, FineTune, Rate, Target, WeightRelevance
from compress._order import order_of
from compress._progress import Folder
from compress._randomness import seed_of, seeded
from compress._trainer import Trainer
from compress.quantizer import Quantizer
from compress.training import History
from compress.weight_relevance import Average
from lrp import errors

ROOT = Path(__file__).resolve().parents[2]
STEPS, N = 4, 24
SHARES = (slice(0, 9), slice(9, N))  # of a batch: the processes have neither the same samples nor as many
LOOPS: dict[str, dict[str, Any]] = {
    "ecq": {"method": "ecq", "rate": Rate(zeros=0.5, every=2)},
    "jitter": {"method": "ecqx", "relevance": WeightRelevance(every=1, momentum=0.5)},
    "abs_per_sample": {
        "method": "ecqx",
        "relevance": WeightRelevance(at="background", aggregate="abs_per_sample", every=2),
    },
    "rate": {"method": "ecqx", "relevance": WeightRelevance(every=1), "rate": Rate(zeros=0.6, every=1)},
    "random": {"method": "random", "relevance": WeightRelevance(every=1, momentum=0.0)},
    "gradient": {"method": "gradient", "relevance": WeightRelevance(every=1)},
}
ONCE = {"settled": WeightRelevance(), "settled_abs": WeightRelevance(aggregate="abs_per_sample")}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    ).double()  # fmt: skip


def samples(seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, x.mean((1, 2, 3)).mul(20).round().long() % 3


def found(quantizer: Quantizer) -> dict[str, Tensor]:
    """The relevance, and the integers of the levels."""
    out = {f"relevance.{n.removeprefix('relevance.')}": t for n, t in quantizer.state_dict().items() if "relev" in n}
    return out | {f"index.{n}": b.indices(quantizer.parameters[n].detach()) for n, b in quantizer.books.items()}


def loop(share: slice | None, options: dict[str, Any]) -> dict[str, Tensor]:
    """Training in the user's own loop, with the samples of one share, or with all."""
    net = network()
    model = net if share is None else nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    quantizer = Quantizer(model, optimizer, bits=4, gamma=0.3, **options)
    for step in range(STEPS):
        x, y = (t if share is None else t[share] for t in samples(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum") / N
        (loss if share is None else 2 * loss).backward()  # type: ignore[no-untyped-call]  # torch: untyped
        optimizer.step()
        quantizer.step(x, y)
    return found(quantizer)


def once(rank: int | None, how: WeightRelevance) -> dict[str, Tensor]:
    """Without training: the first process has three batches, the second one has two, none of one size."""
    x, y = samples(9, 33)
    parts = list(zip(x.split([2, 9, 4, 11, 7]), y.split([2, 9, 4, 11, 7]), strict=True))
    net = network()
    own = parts if rank is None else parts[rank::2]
    options: dict[str, Any] = {"method": "ecqx", "bits": 4, "gamma": 0.3, "relevance": how}
    quantizer = Quantizer(net, torch.optim.SGD(net.parameters(), lr=0.0), **options)
    quantizer.settle(own)
    held = found(quantizer)
    result = compress.quantize(network(), own, train=False, progress=False, **options)
    assert all(torch.equal(result.plan.indices(result.model)[n], held[f"index.{n}"]) for n in quantizer.books)
    return held


# -- compress.FineTune ------------------------------------------------------------------


class Joined:
    """What one process reads to do what two do: the next two batches of an epoch as one."""

    def __init__(self, task: FineTune) -> None:
        self.task, self.epoch = task, 0
        self.order = order_of(task.data, task.batch_size, task.seed)

    def __len__(self) -> int:
        return -(-len(self.order) // 2)

    def __iter__(self) -> Iterator[Any]:
        with seeded(seed_of(self.task.seed, self.epoch, 0), torch.device("cpu")):  # for loaders without a generator
            items = list(self.order.epoch(self.epoch))
        self.epoch += 1
        for k in range(0, len(items), 2):
            x, y = zip(*items[k : k + 2], strict=True)
            yield torch.cat(x), torch.cat(y)


class Beside(nn.Sequential):
    """With weights that are never used: without a gradient, decay must not act on them either."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.never = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[0](x)
        return out


class Noisy(TensorDataset):
    """A transform that draws from the global random state."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape, dtype=x.dtype), y


def parts(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    x, y = samples(3, sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def teacher() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()


def task_of(name: str) -> FineTune:
    """7 batches of a pair, 5 of a list, and so on: the last ones never go round."""
    task = FineTune(samples(4, 53), epochs=3, lr=0.1, batch_size=8, seed=3, weight_decay=0.01, progress=False)
    held = parts(5, 3, 7, 1)
    return {
        "sgd": task,
        "clip": replace(task, clip=0.05, warmup=0.4, label_smoothing=0.1, schedule="linear"),
        "adamw": replace(task, data=parts(4, 9, 2, 6, 5), optimizer="adamw", lr=0.01),
        "even": replace(task, data=parts(4, 9, 2, 6)),
        "one batch": replace(task, data=parts(6), optimizer="adamw", lr=0.01),
        "loader": replace(task, data=DataLoader(Noisy(*samples(4, 53)), batch_size=8, shuffle=True)),
        "distilled": replace(task, distill=Distillation(teacher(), temperature=2.0, weight=0.7)),
        "validated": replace(task, epochs=8, lr=0.6, validation=held, patience=2),
        "validated once": replace(task, validation=parts(9)),  # fewer batches than processes
    }[name]


TASKS = ("sgd", "clip", "adamw", "even", "one batch", "loader", "distilled", "validated", "validated once")


def tuned(task: FineTune, wrapped: bool = False) -> dict[str, Tensor]:
    net = Beside(network())
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True) if wrapped else net
    if dist.is_initialized() and dist.get_rank():
        with torch.no_grad():
            net.never.weight.add_(1.0)  # all begin as process 0 does
    return {**net.state_dict(), **told(task(model))}


def told(history: History) -> dict[str, Tensor]:
    """All but the seconds."""
    plain = {"losses": history.losses, "rates": history.rates, "validations": history.validations}
    out = {f"history.{name}": torch.tensor(values, dtype=torch.float64) for name, values in plain.items()}
    out["history.accuracies"] = torch.tensor([-1.0 if a is None else a for a in history.accuracies]).double()
    return {**out, "history.best": torch.tensor(history.best)}


QUANTIZED: dict[str, dict[str, Any]] = {
    "ecq": {"method": "ecq", "target": Target(bytes=1500)},
    "ecqx": {"method": "ecqx", "relevance": WeightRelevance(every=1), "rate": Rate(zeros=0.6, every=1)},
    "abs": {"method": "random", "relevance": WeightRelevance(every=2, aggregate="abs_per_sample", at="background")},
    "gradient": {"method": "gradient", "relevance": WeightRelevance(every=1), "grad_scale": "abs"},
}


def quantized(name: str, task: FineTune, **options: Any) -> dict[str, Tensor]:
    options = {"bits": 3, "gamma": 0.3, "evaluate": parts(20), "progress": False, **QUANTIZED[name], **options}
    result = compress.quantize(network(), train=task, **options)
    assert result.training is not None
    indices = {f"index.{n}": k for n, k in result.plan.indices(result.model).items()}
    return {**indices, **result.model.state_dict(), **told(result.training)}


def quantizing() -> FineTune:
    return replace(task_of("sgd"), optimizer="adamw", lr=0.01)


def pruned() -> dict[str, Tensor]:
    x, _ = samples(4, 1)
    data = parts(4, 9, 2, 6, 5)
    result = compress.prune(network(), x, data, target=Target(channels=0.7), fine_tune=task_of("sgd"), round_to=1,
                            evaluate=parts(20), progress=False)  # fmt: skip
    history = result.history[0].training
    assert history is not None
    return {**result.model.state_dict(), **told(history)}


class Drawing(nn.Module):
    """Keeps what it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        return x


def drawn() -> dict[str, Tensor]:
    """Random numbers of the network: others in each process and epoch; the loader's are those of all."""
    net = nn.Sequential(Drawing(), *network())
    history = replace(task_of("loader"), epochs=2)(net)
    return {"drawn": torch.tensor(net[0].drawn), **told(history)}


def normalised() -> dict[str, Tensor]:
    """Batch norm at weights that stand still, three batches in process 0 and two in process 1."""
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3)).double()
    net.register_buffer("other", torch.tensor(float(dist.get_rank())))
    FineTune(parts(4, 9, 2, 6, 5), lr=1e-300, progress=False)(net)
    return dict(net.state_dict())


def scaled() -> dict[str, Tensor]:
    """A scaled gradient that overflows in the process that has one batch: both leave the step out."""
    net = network().float()
    data = [(x.float() * (1e4 if k == 1 else 1.0), y) for k, (x, y) in enumerate(parts(4, 9, 2, 6, 5))]
    task = FineTune(data, epochs=4, lr=1e-3, optimizer="adamw", seed=3, progress=False)
    scales: list[float] = []
    trainer = Trainer(task, net, None, lambda optimizer: Quantizer(net, optimizer, "ecqx", gamma=0.3))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**117, growth_interval=3)

    assign = trainer.companion.step

    def step(*batch: Any) -> None:
        scales.append(trainer.scaler.get_scale())
        assign(*batch)

    trainer.companion.step = step
    trainer.run()
    return {"scales": torch.tensor(scales).double(), **net.state_dict()}


class Faulty:
    """Data that raise in one process, in one epoch."""

    def __init__(self, epoch: int | None, rank: int = 1) -> None:
        self.items, self.at, self.epoch = parts(4, 9, 2, 6, 5), epoch if dist.get_rank() == rank else None, 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        for k, item in enumerate(self.items):
            if self.epoch == self.at and k == 3:
                raise OSError("the disk is gone")
            yield item


class Shorter(Faulty):
    """Fewer batches in one process than it says."""

    def __iter__(self) -> Iterator[Any]:
        yield from self.items[:2] if self.at else self.items


def resumed(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An error in one process stops both, which go on from the file of process 0."""
    options: dict[str, Any] = {"epochs": 4, "optimizer": "adamw", "lr": 0.01, "progress": False}
    expected, net = network(), network()
    whole = FineTune(Faulty(None), **options)(expected)
    with contextlib.suppress(OSError, errors.DistributedError):
        FineTune(Faulty(3), **options)(net, resume=folder / "tuning")
    again = network()
    assert FineTune(Faulty(None), **options)(again, resume=folder / "tuning") == whole
    for key, t in expected.state_dict().items():
        assert torch.equal(again.state_dict()[key], t), key
    task = FineTune(Faulty(None), **options)
    whole_levels = quantized("ecqx", task)
    with contextlib.suppress(OSError, errors.DistributedError):
        quantized("ecqx", replace(task, data=Faulty(3)), resume=folder / "levels")
    levels = quantized("ecqx", task, resume=folder / "levels")
    assert (folder / "levels" / "quantizing.state").exists()
    for key, t in whole_levels.items():
        assert torch.equal(levels[key], t), key
    return levels, dict(net.state_dict())


@contextlib.contextmanager
def failing(owner: Any, name: str, rank: int, call: int) -> Iterator[None]:
    """In one process a method raises when it is called for the n-th time."""
    held, count = getattr(owner, name), 0

    def method(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if dist.get_rank() == rank and count == call:
            raise OSError(f"{name} failed")
        return held(*args, **kwargs)

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, held)


def by_rank(task: FineTune, **of_second: Any) -> None:
    replace(task, **of_second if dist.get_rank() else {})(network())


def in_own_loop() -> None:
    with failing(Average, "sums", 1, 2):
        loop(SHARES[dist.get_rank()], LOOPS["jitter"])


def with_relevance() -> None:
    with failing(Average, "sums", 1, 5):
        quantized("ecqx", quantizing())


def with_(owner: Any, name: str, rank: int, call: int, **options: Any) -> None:
    with failing(owner, name, rank, call):
        replace(task_of("sgd"), **options)(network())


def unwritable(folder: Path) -> None:
    with failing(compress._trainer, "write_state", 0, 2):
        task_of("sgd")(network(), resume=folder / "unwritable")


def locked(folder: Path) -> None:
    """Process 1 holds the lock that process 0 asks for."""
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 1:
            stack.enter_context(Folder(folder / "locked").locked())
        dist.barrier()
        quantized("ecq", quantizing(), resume=folder / "locked")


def other_world(folder: Path) -> None:
    """The state of another number of processes."""
    path = folder / "alone"
    if dist.get_rank() == 0:
        path.write_bytes((folder / "of_one").read_bytes())
    dist.barrier()
    alone(path)


def alone(path: Path) -> None:
    FineTune(parts(6), progress=False)(network(), resume=path)


def unseen(folder: Path) -> None:
    """A disk of its own for each process."""
    own = folder / str(dist.get_rank())
    own.mkdir()
    alone(own / "state")
    if dist.get_rank():
        (own / "state").unlink(missing_ok=True)
    alone(own / "state")


def spoilt(value: float) -> None:
    data = parts(4, 4)
    data[1][0][0] = value
    FineTune(Ordered(data), progress=False)(network())


class Ordered:
    """Batches in their own order."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        yield from self.items


def shuffled(seed: int) -> Any:
    return DataLoader(TensorDataset(*samples(3)), batch_size=4, shuffle=True,
                      generator=torch.Generator().manual_seed(seed))  # fmt: skip


def sampled() -> None:
    data = TensorDataset(*samples(3))
    FineTune(DataLoader(data, batch_size=4, sampler=DistributedSampler(data)), progress=False)(network())


def tuning(data: Any) -> None:
    FineTune(data, epochs=2, lr=0.1, progress=False)(network())


def labels(wrong: int) -> None:
    data = parts(4, 4)
    data[1][1][0] = wrong
    tuning(Ordered(data))


def synchronised() -> None:
    net = nn.Sequential(nn.SyncBatchNorm(1), *network()).double()
    FineTune(parts(4, 4, 4), progress=False)(net)


#: what is done, and what the two processes say
FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "data": (lambda _: tuning(Faulty(2)), "DistributedError: process 1 of 2 failed.*the disk is gone", "OSError: the"),
    "data of process 0": (lambda _: tuning(Faulty(2, 0)), "OSError: the", "DistributedError: process 0 of 2"),
    "label": (lambda _: labels(7), "DistributedError.*TargetError", "TargetError: a label"),
    "not finite": (lambda _: spoilt(float("nan")), "DistributedError.*NonFiniteError.*the loss is nan", "NonFiniteErr"),
    "fewer batches": (lambda _: tuning(Shorter(1)), *["DistributedError.*more batches in one than in another"] * 2),
    "other order": (lambda _: tuning(shuffled(dist.get_rank())), *["DistributedError.*other samples"] * 2),
    "other list": (lambda _: tuning([parts(4, 4), parts(4, 3)][dist.get_rank()]), *["DistributedError.*: data"] * 2),
    "other rate": (lambda _: by_rank(task_of("sgd"), lr=0.2), *["DistributedError.*do not agree.*: lr"] * 2),
    "split loader": (lambda _: sampled(), *["InputError: the loader has a DistributedSampler"] * 2),
    "sync": (lambda _: synchronised(), *["InputError: SyncBatchNorm waits"] * 2),
    "set-up": (lambda _: with_(Trainer, "_optimizer", 1, 1), "DistributedError.*_optimizer failed", "OSError"),
    "step": (lambda _: with_(torch.optim.SGD, "zero_grad", 1, 3), "DistributedError.*zero_grad failed", "OSError"),
    "move": (lambda _: with_(Trainer, "_move", 1, 3), "DistributedError.*_move failed", "OSError"),
    "validation": (
        lambda _: with_(compress._trainer, "evaluate", 1, 2, validation=parts(4, 5)),
        "DistributedError.*evaluate failed",
        "OSError",
    ),
    "relevance": (lambda _: with_relevance(), "DistributedError.*sums failed", "OSError: sums failed"),
    "relevance in a loop of one's own": (lambda _: in_own_loop(), "DistributedError.*sums failed", "OSError"),
    "file": (unwritable, "OSError: write_state failed", "DistributedError.*write_state failed"),
    "lock": (locked, "DataError: another process is at work", "DistributedError.*another process is at work"),
    "state of one process": (other_world, *["MismatchError.*processes"] * 2),
    "file of one process": (unseen, *["DistributedError.*do not see the same file"] * 2),
}


def faults(folder: Path) -> dict[str, str]:
    out = {}
    for name, (run, *_) in FAULTS.items():
        try:
            run(folder)
            out[name] = "none"
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
    return out


def work(rank: int, folder: str) -> None:
    """One of two processes."""
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    held = {name: loop(SHARES[rank], options) for name, options in LOOPS.items()}
    held |= {name: once(rank, how) for name, how in ONCE.items()}
    held |= {f"tuned {name}": tuned(task_of(name)) for name in TASKS}
    held["tuned wrapped"] = tuned(task_of("sgd"), wrapped=True)
    held |= {f"quantized {name}": quantized(name, quantizing()) for name in QUANTIZED}
    held |= {"pruned": pruned(), "drawn": drawn(), "normalised": normalised(), "scaled": scaled()}
    held["resumed"], held["resumed failed"] = resumed(Path(folder))
    torch.save(held, f"{folder}/{rank}.pt")
    Path(f"{folder}/{rank}.json").write_text(json.dumps(faults(Path(folder))))
    dist.barrier()
    dist.destroy_process_group()


Found = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes have left what they found."""
    folder = tmp_path_factory.mktemp("processes")
    alone(folder / "of_one")
    places = (str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    code = "import sys, {0}; {0}.work(int(sys.argv[1]), sys.argv[2])".format(Path(__file__).stem)
    commands = [[sys.executable, "-c", code, str(rank), str(folder)] for rank in range(2)]
    running = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        told = [process.communicate(timeout=500)[1] for process in running]
    finally:
        for process in running:
            process.kill()  # nothing where it has ended
    assert [process.returncode for process in running] == [0, 0], told
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[Found]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOOPS, *ONCE])
def test_processes_agree_with_each_other_and_with_one_that_has_all_samples(both: list[Found], name: str) -> None:
    first, second = both[0][name], both[1][name]
    alone = loop(None, LOOPS[name]) if name in LOOPS else once(None, ONCE[name])
    assert first.keys() == second.keys() == alone.keys()
    assert any(key.startswith("relevance") for key in alone) == (name != "ecq")
    for key, expected in alone.items():
        assert torch.equal(first[key], second[key]), key  # to the last bit
        if key.startswith("index"):
            assert torch.equal(first[key], expected), key
            assert len(expected.unique()) > 2
        else:
            assert torch.allclose(first[key], expected, rtol=1e-10, atol=1e-14), key


def compare(both: list[Found], name: str, alone: dict[str, Tensor]) -> None:
    """Both processes to the last bit, and the single one but for rounding."""
    first, second = both[0][name], both[1][name]
    assert first.keys() == second.keys() == alone.keys()
    for key, expected in alone.items():
        assert torch.equal(first[key], second[key]), key
        assert first[key].shape == expected.shape, key
        if expected.is_floating_point():
            assert torch.allclose(first[key], expected, rtol=1e-12, atol=1e-12), key
        else:
            assert torch.equal(first[key], expected), key


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_two_processes_train_as_one_that_joins_their_batches(both: list[Found], name: str) -> None:
    task = task_of(name)
    alone = tuned(replace(task, data=Joined(task)))
    compare(both, f"tuned {name}", alone)
    if name == "validated":
        assert 0 < len(alone["history.losses"]) < task.epochs  # patience ended it
    plain = tuned(task)
    assert not torch.allclose(plain["0.5.weight"], alone["0.5.weight"]) or name == "one batch"


@pytest.mark.slow
def test_a_wrapped_network_is_trained_alike(both: list[Found]) -> None:
    task = task_of("sgd")
    compare(both, "tuned wrapped", tuned(replace(task, data=Joined(task))))


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_two_processes_quantize_as_one_that_joins_their_batches(both: list[Found], name: str) -> None:
    task = quantizing()
    alone = quantized(name, replace(task, data=Joined(task)))
    compare(both, f"quantized {name}", alone)
    assert min(len(k.unique()) for key, k in alone.items() if key.startswith("index")) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pruned", "resumed", "scaled", "normalised"])
def test_processes_have_the_same_in_the_end(both: list[Found], name: str) -> None:
    compare(both, name, both[0][name])


@pytest.mark.slow
def test_both_are_as_after_the_last_epoch_that_both_finished(both: list[Found]) -> None:
    task = FineTune(Ordered(parts(4, 9, 2, 6, 5)), epochs=4, optimizer="adamw", lr=0.01, progress=False)
    net = network()
    joined = Joined(task)

    class Ends:
        def __len__(self) -> int:
            return len(joined)

        def __iter__(self) -> Iterator[Any]:
            if joined.epoch == 2:
                raise OSError
            yield from joined

    with pytest.raises(OSError):  # noqa: PT011  # the one above
        replace(task, data=Ends())(net)
    for key, t in net.state_dict().items():
        assert torch.allclose(both[0]["resumed failed"][key], t, rtol=1e-12, atol=1e-12), key
        assert torch.equal(both[0]["resumed failed"][key], both[1]["resumed failed"][key])


@pytest.mark.slow
def test_networks_draw_apart_and_loaders_alike(both: list[Found]) -> None:
    first, second = (found["drawn"].pop("drawn") for found in both)
    assert (len(first), len(second)) == (8, 6)  # 4 and 3 batches of 7
    assert len({*first.tolist(), *second.tolist()}) == 14
    compare(both, "drawn", both[0]["drawn"])


@pytest.mark.slow
def test_running_statistics_are_averaged_by_samples(both: list[Found]) -> None:
    items = list(order_of(parts(4, 9, 2, 6, 5), 64, 0).epoch(0))
    found = both[0]["normalised"]
    count = [sum(len(y) for _, y in items[rank::2]) for rank in range(2)]
    mean = var = torch.zeros(())
    for rank in range(2):
        own = nn.BatchNorm1d(36).double()
        for x, _ in items[rank::2]:
            own(x.flatten(1))
        assert own.running_mean is not None
        assert own.running_var is not None
        mean = mean + own.running_mean * count[rank] / sum(count)
        var = var + own.running_var * count[rank] / sum(count)
    assert torch.allclose(found["1.running_mean"], mean, rtol=1e-12, atol=1e-14)
    assert torch.allclose(found["1.running_var"], var, rtol=1e-12, atol=1e-14)
    assert int(found["1.num_batches_tracked"]) == 3
    assert float(found["other"]) == 0.0


@pytest.mark.slow
def test_steps_that_overflow_are_left_out_by_both(both: list[Found]) -> None:
    scales = both[0]["scaled"]["scales"]
    assert 0 < len(scales) < 12
    assert len(scales.unique()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_in_one_process_is_raised_in_both(folder: Path, name: str) -> None:
    for rank, expected in enumerate(FAULTS[name][1:]):
        found = json.loads((folder / f"{rank}.json").read_text())[name]
        assert re.search(expected, found, re.DOTALL), found
