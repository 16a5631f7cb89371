"""Quantization by several processes of torch.distributed: one relevance and one assignment, of the samples of all."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

import compress
from compress import Rate, WeightRelevance
from compress.quantizer import Quantizer

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


def work(rank: int, folder: str) -> None:
    """One of two processes."""
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    held = {name: loop(SHARES[rank], options) for name, options in LOOPS.items()}
    held |= {name: once(rank, how) for name, how in ONCE.items()}
    torch.save(held, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


Found = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("processes")
    places = (str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    code = "import sys, {0}; {0}.work(int(sys.argv[1]), sys.argv[2])".format(Path(__file__).stem)
    commands = [[sys.executable, "-c", code, str(rank), str(folder)] for rank in range(2)]
    running = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        told = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()  # nothing where it has ended
    assert [process.returncode for process in running] == [0, 0], told
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
