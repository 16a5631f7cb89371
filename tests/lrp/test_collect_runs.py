"""Sums over a data set that are interrupted, resumed, or made by several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.sums import close, make_data, make_net, pairs
from torch import nn

import lrp
from lrp import errors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def net() -> nn.Module:
    return make_net()


# -- resuming ----------------------------------------------------------------------


class StopsError(Exception):
    pass


def stopping(data: list[Any], at: int, error: type[BaseException] = StopsError) -> Iterator[Any]:
    for i, item in enumerate(data):
        if i == at:
            raise error
        yield item


@pytest.mark.parametrize("error", [StopsError, KeyboardInterrupt])
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_resume(net: nn.Module, tmp_path: Path, error: type[BaseException], save_every: float) -> None:
    data = pairs(*make_data(11), 2)
    path = tmp_path / "state"
    options: dict[str, Any] = {"wrt": ("channels", "weights")}
    expected = lrp.collect(net, data, **options)
    for at in (2, 4):
        with pytest.raises(error):
            lrp.collect(net, stopping(data, at, error), resume=path, save_every=save_every, **options)
        assert [p.name for p in tmp_path.iterdir()] == ["state"]
    total = lrp.collect(net, data, resume=path, save_every=save_every, **options)
    for kind in ("channels", "weights"):
        for name, t in getattr(total, kind).items():
            assert torch.equal(t, getattr(expected, kind)[name])
    assert total.count == 11
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_resumed_batches_are_not_explained_again(net: nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    data = pairs(*make_data(11), 2)
    with pytest.raises(StopsError):
        lrp.collect(net, stopping(data, 4), resume=tmp_path / "state")
    calls: list[int] = []
    run = lrp.Plan._attribute
    monkeypatch.setattr(lrp.Plan, "_attribute", lambda self, *a, **k: calls.append(1) or run(self, *a, **k))
    lrp.collect(net, data, resume=tmp_path / "state")
    assert len(calls) == 2
    # finished: the data are compared only
    kept = (tmp_path / "state").read_bytes()
    assert lrp.collect(net, iter(data), resume=tmp_path / "state").count == 11
    assert (tmp_path / "state").read_bytes() == kept
    assert len(calls) == 2


@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_a_finished_run_and_other_data(net: nn.Module, tmp_path: Path, save_every: float) -> None:
    x, y = make_data(11)
    data, path = pairs(x, y, 2), tmp_path / "state"
    options: dict[str, Any] = {"wrt": ("channels", "weights"), "save_every": save_every}
    lrp.collect(net, data[:4], resume=path, **options)
    kept = path.read_bytes()
    others = [
        ("batch 0", [(a + 1, b) for a, b in data[:4]]),
        ("batch 0", [(x, y)]),
        ("batch 3", [*data[:3], (data[3][0], (data[3][1] + 1) % 4)]),
        ("batch 2", data[:3]),
        ("batch 3", [*data[:3], data[4]]),
        ("batch 3", [*data[:3], *data[4:]]),
        ("no batches", []),
    ]
    for what, batches in others:
        with pytest.raises((errors.MismatchError, errors.InputError), match=what):
            lrp.collect(net, batches, resume=path, **options)
        assert path.read_bytes() == kept, what
    # more of the same: it goes on
    with pytest.raises(StopsError):
        lrp.collect(net, stopping(data, 5), resume=path, **options)
    for _ in range(2):
        total = lrp.collect(net, data, resume=path, **options)
        expected = lrp.collect(net, data, wrt=("channels", "weights"))
        assert total.count == 11
        for kind in ("channels", "weights"):
            for name, t in getattr(total, kind).items():
                assert torch.equal(t, getattr(expected, kind)[name])


def test_resume_refuses_other_runs(net: nn.Module, tmp_path: Path) -> None:
    data = pairs(*make_data(11), 2)
    path = tmp_path / "state"
    with pytest.raises(StopsError):
        lrp.collect(net, stopping(data, 3), resume=path)
    kept = path.read_bytes()
    refused: list[tuple[str, Any, dict[str, Any]]] = [
        ("composite", data, {"composite": "epsilon"}),
        ("start", data, {"start": "margin"}),
        ("aggregate", data, {"aggregate": "signed"}),
        ("batch 0", data[::-1], {}),
        ("batch 2", [data[0], data[2], data[1], *data[3:]], {}),
        ("batch 1", data[:2], {}),
    ]
    for what, batches, options in refused:
        with pytest.raises(errors.MismatchError, match=what):
            lrp.collect(net, batches, resume=path, **options)
        assert path.read_bytes() == kept, what
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] += 1e-9
    with pytest.raises(errors.MismatchError, match=r"weights.*another run"):
        lrp.collect(net, data, resume=path)
    path.rename(tmp_path / "state.rank0")
    with pytest.raises(errors.MismatchError, match="number of processes"):
        lrp.collect(make_net(), data, resume=path)


def test_resume_from_damaged_files(net: nn.Module, tmp_path: Path) -> None:
    data = pairs(*make_data(3))
    path = tmp_path / "state"
    lrp.collect(net, data, resume=path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(errors.FileFormatError, match="can not be read"):
        lrp.collect(net, data, resume=path)
    lrp.collect(net, data).save(path)
    with pytest.raises(errors.FileFormatError, match="kind") as caught:
        lrp.collect(net, data, resume=path)
    assert "RelevanceSum.load" in caught.value.fix
    lrp.collect(net, data, resume=tmp_path / "healthy")
    with pytest.raises(errors.FileFormatError, match="kind") as caught:
        lrp.RelevanceSum.load(tmp_path / "healthy")
    assert "call lrp.collect(..., resume=path)" in caught.value.fix
    assert "delete" not in str(caught.value)
    for bad in (tmp_path, tmp_path / "none" / "state"):
        with pytest.raises(errors.DataError, match="existing folder"):
            lrp.collect(net, data, resume=bad)


def test_interruption_leaves_nothing_behind(net: nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StopsError):
        lrp.collect(net, stopping(pairs(*make_data()), 2))
    assert list(tmp_path.iterdir()) == []


COMMON = """
import sys, time
sys.path[:0] = {paths!r}
import torch, lrp
from oracles.sums import make_data, make_net, pairs
"""


def script(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(COMMON.format(paths=[str(ROOT), str(ROOT / "tests")]) + body)
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.slow
def test_resume_after_kill(net: nn.Module, tmp_path: Path) -> None:
    body = """
def slowly():
    for i, item in enumerate(pairs(*make_data(40), 2)):
        yield item
        print(i, flush=True)
        time.sleep(0.05)
lrp.collect(make_net(), slowly(), wrt=("channels", "weights"), resume=sys.argv[1], progress=False)
"""
    path = tmp_path / "state"
    child = subprocess.Popen(
        [sys.executable, str(script(tmp_path, body)), str(path)], stdout=subprocess.PIPE, env=environment()
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 5:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    state = path.read_bytes()
    assert len(state) > 1000
    data = pairs(*make_data(40), 2)
    torch.set_num_threads(1)
    total = lrp.collect(net, data, wrt=("channels", "weights"), resume=path)
    assert path.read_bytes() != state
    expected = lrp.collect(net, data, wrt=("channels", "weights"))
    assert total.count == 40
    for kind in ("channels", "weights"):
        for name, t in getattr(total, kind).items():
            assert torch.equal(t, getattr(expected, kind)[name])
    assert {p.name for p in tmp_path.iterdir()} <= {"state", "script.py"}


# -- several processes -------------------------------------------------------------


def torchrun(tmp_path: Path, body: str, *args: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone",
               "--local-addr", "localhost", str(script(tmp_path, body)), *args]  # fmt: skip
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)


SHARDED = """
from torch import distributed as dist
from datetime import timedelta
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
rank = dist.get_rank()
folder = sys.argv[1]
for name, n in (("odd", 5), ("one", 2)):
    for aggregate in (None, "abs_element", "abs_per_sample"):
        data = pairs(*make_data(n), 2)
        resume = f"{folder}/{name}-{aggregate}.state"
        for _ in range(2):  # the second time from the finished states
            total = lrp.collect(make_net(), iter(data), wrt=("channels", "weights"), aggregate=aggregate, resume=resume)
            assert total.count == n, total
        total.save(f"{folder}/{name}-{aggregate}-{rank}.sum")
        longer = [*data, *pairs(*make_data(7), 2)[1:]]
        if name == "one":  # finished, and more of the same: it goes on
            total = lrp.collect(make_net(), longer, wrt=("channels", "weights"), aggregate=aggregate, resume=resume)
            assert total.count == 7, total
            total.save(f"{folder}/longer-{aggregate}-{rank}.sum")
        try:  # finished, and other data
            lrp.collect(make_net(), [(x + 1, y) for x, y in longer], wrt=("channels", "weights"),
                        aggregate=aggregate, resume=resume)
        except lrp.errors.MismatchError as error:
            assert "batch 0" in str(error)
        else:
            raise AssertionError
part = lrp.RelevanceSum(model=make_net())
part.unexplained[f"of process {rank}"] = "a test"
if rank == 1:
    x, y = make_data(3)
    part.update(lrp.attribute(make_net(), x, y, wrt="channels"))
part.all_reduce().save(f"{folder}/part-{rank}.sum")

def refused(error, match, **options):
    try:
        lrp.collect(options.pop("model", make_net()), options.pop("data", data), **options)
    except error as caught:
        assert match in str(caught), caught
    else:
        raise AssertionError(match)

errors = lrp.errors
other = make_net()
if rank == 1:
    other.head.weight.data.mul_(2)
refused(errors.DistributedError, "do not agree on model", model=other)
refused(errors.DistributedError, "do not agree on the data", data=pairs(*make_data(6), 2)[:: 1 - 2 * rank])
five = pairs(*make_data(10), 2)
swapped = five[:2] + five[2:][:: 1 - 2 * rank]
refused(errors.DistributedError, "do not agree on the data", data=swapped)
bad = [(x if i != 3 else x / 0, y) for i, (x, y) in enumerate(five)]
if rank == 1:
    refused(errors.NonFiniteError, "not finite", data=bad)
else:
    refused(errors.DistributedError, "process 1 of 2 failed", data=bad)
if rank == 0:
    refused(errors.InputError, "aggregate", aggregate="wrong")
else:
    refused(errors.DistributedError, "process 0 of 2 failed")
refused(errors.InputError, "no batches", data=[])
refused(errors.DistributedError, "targets", data=[make_data(2), make_data(2)[0]])
mismatched = lrp.RelevanceSum(aggregate=("signed", "abs_total")[rank])
try:
    mismatched.all_reduce()
except errors.DistributedError as error:
    assert "agree" in str(error)
else:
    raise AssertionError
open(f"{folder}/done-{rank}", "w").close()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(net: nn.Module, tmp_path: Path) -> None:
    ran = torchrun(tmp_path, SHARDED, str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "relevance" not in ran.stderr  # no bar off a terminal
    for rank in (0, 1):
        assert (tmp_path / f"done-{rank}").exists()
        for name, n in (("odd", 5), ("one", 2)):
            for aggregate in (None, "abs_element", "abs_per_sample"):
                ours = lrp.RelevanceSum.load(tmp_path / f"{name}-{aggregate}-{rank}.sum")
                alone = lrp.collect(net, pairs(*make_data(n), 2), wrt=("channels", "weights"), aggregate=aggregate)
                assert ours.count == n
                assert ours.unexplained == alone.unexplained
                assert list(ours.channels) == list(alone.channels)
                close(ours.channels, alone.channels)
                close(ours.weights, alone.weights)
        for aggregate in (None, "abs_element", "abs_per_sample"):
            longer = [*pairs(*make_data(2), 2), *pairs(*make_data(7), 2)[1:]]
            ours = lrp.RelevanceSum.load(tmp_path / f"longer-{aggregate}-{rank}.sum")
            alone = lrp.collect(net, longer, wrt=("channels", "weights"), aggregate=aggregate)
            close(ours.channels, alone.channels)
            close(ours.weights, alone.weights)
        part = lrp.RelevanceSum.load(tmp_path / f"part-{rank}.sum")
        assert {"of process 0", "of process 1"} <= part.unexplained.keys()
        close(part.channels, lrp.collect(net, [make_data(3)]).channels)
    # a state of two processes is none of one, nor of three
    state = tmp_path / "odd-None.state"
    with pytest.raises(errors.MismatchError, match="number of processes"):
        lrp.collect(net, pairs(*make_data(5), 2), wrt=("channels", "weights"), resume=state)


DIES = """
import os
from torch import distributed as dist
from datetime import timedelta
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
def data():
    for i, item in enumerate(pairs(*make_data(8), 2)):
        if i == 3 and dist.get_rank() == 1:
            os._exit(7)
        yield item
try:
    lrp.collect(make_net(), data())
except lrp.errors.DistributedError as error:
    open(sys.argv[1], "w").write(str(error))
"""


@pytest.mark.slow
def test_a_process_that_is_gone(tmp_path: Path) -> None:
    begun = time.monotonic()
    ran = torchrun(tmp_path, DIES, str(tmp_path / "message"))
    assert ran.returncode != 0
    if (tmp_path / "message").exists():  # unless the launcher was quicker
        assert "gone" in (tmp_path / "message").read_text()
    assert time.monotonic() - begun < 100
