"""The command line and what users bring: functions of their own that may fail, names, folders, a Ctrl-C."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Done, in_process, wrong
from PIL import Image
from safetensors.torch import load_file

import compress
from compress._parity import unheard
from compress._sources import builder, explaining, read_classes, read_criterion, read_meter, read_samples
from compress.cli import main
from compress.evaluation import wilson
from lrp import errors

SOURCE = """
import os, signal
from pathlib import Path
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.second, self.last = nn.Conv2d(6, 5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))

class Single(Net):  # for one sample only, which torch.export finds out
    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)).flatten())[None]

class Failing(Net):
    def forward(self, x):
        return {}["nothing"]

def needs(width):
    return Net()

def broken(*given):
    raise RuntimeError("the disk is gone\\nand more")

def quits():
    raise SystemExit(3)

def samples(n=30):
    x = torch.randn(n, 1, 7, 7, generator=torch.Generator().manual_seed(1)) * 2 + 1
    return x, torch.arange(n) % 3

def double():
    return samples()[0].double(), samples()[1]

def coloured():
    return samples()[0].repeat(1, 3, 1, 1), samples()[1]

def shifted():
    return samples()[0], samples()[1] + 1

def mixed():
    x, y = samples()
    return [(x[:9], y[:9]), (x[9:].double(), y[9:])]

class Lazy(torch.utils.data.Dataset):
    targets = [0, 1, 2] * 4
    def __len__(self):
        return 12
    def __getitem__(self, i):
        if i == 7:
            raise OSError("no such tape")
        return torch.ones(1, 7, 7), self.targets[i]

def lazy():
    return Lazy()

def workers():
    return torch.utils.data.DataLoader(Lazy(), 4, num_workers=1)

def last_first(model, data):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return {name: -torch.arange(float(len(m.weight))) for name, m in layers.items()}

def counted(model, data):
    calls = Path(os.environ["CALLS"])
    calls.write_text(calls.read_text() + "x")
    if calls.read_text() == "xx":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.kill(os.getpid(), signal.SIGINT)
    return last_first(model, data)

def on_my_board(path):
    return os.path.getsize(path) / 1e4

def silent(path):
    return None

class Board:
    name = "board 7"
    calls = 0
    def __call__(self, path):
        Board.calls += 1
        if Board.calls == 3:
            raise ConnectionError("board 7 is off")
        return 1.5
"""


here = in_process("compress", main, split=True)


@pytest.fixture(scope="module", autouse=True)
def _theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with the user's modules."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "theirs.py").write_text(SOURCE)
    (folder / "fails.py").write_text("raise ValueError('no licence')")
    (folder / "typo.py").write_text("def f(:")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    sys.modules.pop("theirs", None)


NET = "--model theirs:Net --round-to 1"
WEIGHT = f"{NET} --criterion weight --target macs=0.5"
DATA = "--data theirs:samples"
PLAN = f"plan {WEIGHT} {DATA}"


# ---------------------------------------------------------------------- errors of the user's code


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"plan --model theirs:broken {DATA} --target macs=0.5", ["theirs:broken", "disk is gone", "theirs.py, line"]),
        (f"plan --model theirs:quits {DATA} --target macs=0.5", ["--model theirs:quits", "SystemExit: 3"]),
        (f"plan --model theirs:needs {DATA} --target macs=0.5", ["--model theirs:needs", "'width'"]),
        (f"plan --model fails:net {DATA} --target macs=0.5", ["--model fails:net", "ValueError: no licence"]),
        (f"plan --model typo:f {DATA} --target macs=0.5", ["--model typo:f", "SyntaxError"]),
        (f"plan --model theirs:Failing {DATA} --target macs=0.5", ["theirs:Failing.forward", "KeyError: 'nothing'"]),
        (f"plan {WEIGHT} --data theirs:broken", ["--data theirs:broken", "the disk is gone"]),
        (f"plan {WEIGHT} --data theirs:needs", ["--data theirs:needs needs arguments", "'width'"]),
        (f"plan {NET} {DATA} --target macs=0.5 --criterion theirs:broken", ["theirs:broken", "the disk is gone"]),
        (f"plan {NET} {DATA} --target macs=0.5 --criterion theirs:needs", ["theirs:needs", "(model, data)"]),
        (f"plan {NET} {DATA} --target macs=0.5 --criterion lpr:zplus", ["lpr:zplus", "MODULE:CALLABLE", "'lrp'"]),
        (f"plan {NET} {DATA} --target latency_ms=0.5 --meter theirs:broken", ["theirs:broken", "the disk is gone"]),
        (f"plan {WEIGHT} {DATA} --meter theirs:on_my_board", ["--meter", "latency_ms"]),
        (
            f"plan {NET} --target macs=0.5 --data theirs:lazy --samples-per-class 0 --criterion activation",
            ["theirs:Lazy.__getitem__", "no such tape"],
        ),
        (
            f"plan {NET} --target macs=0.5 --data theirs:workers --samples-per-class 0 --criterion activation",
            ["no such tape"],
        ),
    ],
)  # fmt: skip
def test_errors_of_the_users_code(here: Callable[..., Done], command: str, words: list[str]) -> None:
    wrong(here(command), *words)


@pytest.mark.parametrize("criterion", ["weight", "taylor", "lrp"])
@pytest.mark.parametrize("kind", ["double", "coloured"])
def test_samples_that_the_network_does_not_take(
    here: Callable[..., Done], tmp_path: Path, criterion: str, kind: str
) -> None:
    run = f"prune {NET} --target macs=0.5 --criterion {criterion} --input-shape 1,7,7"
    for option, others in (("--data", ""), ("--test-data", DATA), ("--validation-data", DATA)):
        done = here(run, others, option, f"theirs:{kind}", "-o", tmp_path / "o")
        wrong(done, option, "(Net) does not run", "RuntimeError", "(1, 3, 7, 7)" if kind == "coloured" else "float64")
    wrong(here(f"plan {WEIGHT} --input-shape 3,7,7"), "--input-shape 3,7,7", "does not run")
    assert not list(tmp_path.iterdir())


def test_a_later_batch_of_another_kind(here: Callable[..., Done]) -> None:
    done = here(f"plan {NET} --target macs=0.5 --criterion taylor --data theirs:mixed --samples-per-class 0")
    wrong(done, "does not run", "torch.float64 (21, 1, 7, 7)")


def test_labels_out_of_range(here: Callable[..., Done], tmp_path: Path) -> None:
    for option in ("--test-data", "--validation-data"):
        wrong(here(f"prune {WEIGHT} {DATA} {option} theirs:shifted -o", tmp_path / "o"), option, "0 to 2", "1 to 3")
    wrong(here(f"compare --model theirs:Net {DATA} --validation-data theirs:shifted -o", tmp_path / "o"), "1 to 3")
    assert not list(tmp_path.iterdir())


def test_classes_that_are_not_the_networks(here: Callable[..., Done], tmp_path: Path) -> None:
    """By number of folders and by label, wherever labels are used, in plan as in prune."""
    for name in ("one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(np.full((7, 7), 40 * k, np.uint8)).save(tmp_path / "set" / name / f"{k}.png")
    for line in (f"plan {NET} --target macs=0.5", f"prune {NET} --target macs=0.5 -o {tmp_path / 'o'}"):
        wrong(here(line, "--grey --data", tmp_path / "set"), "3 classes, one for each output", "2: one, two")
        wrong(here(line, "--data theirs:shifted"), "a label of --data is none", "0 to 2", "1 to 3")
    done = here(f"plan {NET} --target macs=0.5 --criterion activation --grey --data", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: no --weights: the network is as theirs:Net builds it")
    assert len(done.stderr.splitlines()) == 1
    wrong(here(f"plan {NET} {DATA} --target macs=0.5 --floor firs=0.5"), "--floor firs fits no layer", "'first'")


def test_causes_are_kept_and_our_own_errors_pass() -> None:
    for call in (builder("theirs:broken"), lambda: read_samples("theirs:broken", "--data")):
        with pytest.raises(errors.InputError) as caught:
            call()
        assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(TypeError):
        explaining()(wilson)("a", 1)  # type: ignore[arg-type]  # that is what fails
    with pytest.raises(errors.TargetError):
        explaining("--data mine")(_raise)(errors.TargetError("as it is"))
    with pytest.raises(errors.InputError, match="mine raised an error") as found:
        explaining("--data mine")(_raise)(ZeroDivisionError("0"))
    assert isinstance(found.value.__cause__, ZeroDivisionError)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "hpu"])
def test_a_device_that_is_not_there(here: Callable[..., Done], device: str) -> None:
    """It is refused before any work: the network, which fails, is not even made."""
    done = here(f"plan --model theirs:broken {DATA} --target macs=0.5 --device {device}")
    wrong(done, f"--device {device} is none")


# ---------------------------------------------------------------------- functions of the user's


def test_a_criterion_of_the_users(here: Callable[..., Done], tmp_path: Path) -> None:
    done = here(f"plan {NET} {DATA} --target channels=7 --criterion theirs:last_first --json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["settings"]["criterion"]["function"] == "theirs.last_first"
    for channels, (before, _) in ((found["removed"][n], found["widths"][n]) for n in ("first", "second")):
        assert channels == list(range(before - len(channels), before))
    compared = here(
        f"compare --model theirs:Net {DATA} --validation-data theirs:samples --criteria weight:l2,theirs:last_first "
        "--rates 0.5 --draws 1 --json -o",
        tmp_path,
    )
    assert compared.returncode == 0, compared.stderr
    names = {c["criterion"] for c in json.loads(compared.stdout)["curves"]}
    assert {"weight:l2", "last_first", "random"} <= names
    assert read_criterion("lrp:zplus:signed") == "lrp:zplus:signed"


def test_a_meter_of_the_users(here: Callable[..., Done]) -> None:
    latency = "plan --model theirs:Net --round-to 1 --criterion weight --protect second --input-shape 1,7,7 --json"
    done = here(latency, "--target latency_ms=0.9 --meter theirs:on_my_board")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["settings"]["latency_ms"]
    assert found["meter"] == "on_my_board"
    assert found["after"] <= found["limit"] < found["before"]
    assert read_meter(None) is None
    assert read_meter("theirs:Board").name == "board 7"  # type: ignore[union-attr]  # a class makes one


def test_a_meter_that_fails_in_a_search(here: Callable[..., Done]) -> None:
    latency = "plan --model theirs:Net --round-to 1 --criterion weight --input-shape 1,7,7 --target latency_ms=0.9"
    asked = "was asked for the whole network, after 0 networks (of at most 34) and 0 single layers"
    wrong(here(latency, "--meter theirs:broken"), "the disk is gone", asked)
    wrong(here(latency, "--meter theirs:silent"), "gave no time", asked)


@pytest.mark.slow
def test_a_meter_that_fails_late_and_the_names_of_classes(here: Callable[..., Done], tmp_path: Path) -> None:
    """What a run has written by then is whole, and the error says so; the report is made from there."""
    prune = f"prune {WEIGHT} {DATA} --no-baselines --meter theirs:Board -o"
    wrong(here(prune, tmp_path / "o"), "board 7 is off", "model.safetensors, plan.json of this run are complete")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["model.safetensors", "plan.json"]
    (tmp_path / "names.txt").write_text("ash\nbeech\ncedar\n")
    (tmp_path / "names.json").write_text('{"1": "birch"}')
    report = ("report", tmp_path / "o" / "model.safetensors", "--model theirs:Net --meter theirs:Board --test-data")
    for given, names in (
        (tmp_path / "names.txt", {"ash", "beech", "cedar"}),
        (tmp_path / "names.json", {"0", "birch", "2"}),
    ):
        done = here(*report, "theirs:samples --json -o", tmp_path / "r", "--classes", given)
        assert done.returncode == 0, done.stderr
        found = compress.Report.load(tmp_path / "r" / "report.json")
        assert found.classes is not None
        assert {row.name for row in found.classes} == names
        assert found.after.latency is not None
        assert (found.after.latency.meter, found.after.latency.median) == ("board 7", 1.5)
        assert all(name in (tmp_path / "r" / "index.html").read_text() for name in names)
    for option in ("--classes a,b", "--test-data theirs:samples", "--meter theirs:Board", "--model theirs:Net"):
        wrong(here("report", tmp_path / "r" / "report.json", option, "-o", tmp_path / "again"), "not measured", option)
    assert not (tmp_path / "again").exists()


def test_names_that_do_not_fit(here: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "far.json").write_text('{"7": "seven"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.txt").write_text("\n")
    run = (f"prune {WEIGHT} {DATA} --test-data theirs:samples -o", tmp_path / "o", "--classes")
    for given in ("a,b", tmp_path / "far.json"):
        wrong(here(*run, given), "do not fit the network", "3 names", "--classes")
    for given in ("nowhere.txt", "a,,b", tmp_path / "broken.json", tmp_path / "empty.txt"):
        wrong(here(*run, given), f"--classes {given} names no classes")
    wrong(here(f"prune {WEIGHT} {DATA} --classes a,b,c -o", tmp_path / "o"), "--test-data")
    assert not (tmp_path / "o").exists()
    assert read_classes(" a , b") == ["a", "b"]


# ---------------------------------------------------------------------- apply


@pytest.mark.slow
def test_apply_re_estimates_as_prune_does(here: Callable[..., Done], tmp_path: Path) -> None:
    for flag, folder in (("", "new"), ("--no-reestimate", "old")):
        done = here(f"prune {WEIGHT} {DATA} --no-baselines --samples-per-class 4 {flag} -o", tmp_path / folder)
        assert done.returncode == 0, done.stderr
        plan = tmp_path / folder / "plan.json"
        done = here(
            "apply", plan, f"--model theirs:Net {DATA} --samples-per-class 4 {flag} --json -o", tmp_path / f"{folder}2"
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["reestimated"] is (not flag)
    states = {name: load_file(tmp_path / name / "model.safetensors") for name in ("new", "new2", "old", "old2")}
    for name in ("new", "old"):
        assert all(torch.equal(t, states[f"{name}2"][key]) for key, t in states[name].items())
    assert not torch.equal(states["new"]["norm.running_mean"], states["old"]["norm.running_mean"])
    bare = here("apply", tmp_path / "old" / "plan.json", "--model theirs:Net -o", tmp_path / "bare")
    assert "The batch-norm statistics are those of the original; --data re-estimates them." in bare.stdout


# ---------------------------------------------------------------------- exports


def test_the_log_of_torch_export_stays_out(here: Callable[..., Done], tmp_path: Path) -> None:
    heard: list[logging.LogRecord] = []
    own = logging.getLogger("torch._subclasses.fake_tensor")
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]  # on this one alone
    own.addHandler(handler)
    try:
        planned = here("plan --model theirs:Single --round-to 1 --criterion weight --input-shape 1,7,7 "
                       "--target macs=0.5 -o", tmp_path / "plan.json")  # fmt: skip
        assert planned.returncode == 0, planned.stderr
        done = here(
            "apply", tmp_path / "plan.json", "--model theirs:Single --input-shape 1,7,7 --onnx -o", tmp_path / "o"
        )
        wrong(done, "can not be captured")
    finally:
        own.removeHandler(handler)
    assert not heard
    assert not (tmp_path / "o").exists()  # nothing half-written


def test_only_their_log_is_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, other = logging.getLogger("torch.export.anything"), logging.getLogger("theirs")
    before = theirs.getEffectiveLevel()
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    with unheard():
        assert not theirs.isEnabledFor(logging.ERROR)
        assert other.isEnabledFor(logging.ERROR)
    assert theirs.getEffectiveLevel() == before
    monkeypatch.setenv("TORCH_LOGS", "export")
    with unheard():
        assert theirs.isEnabledFor(logging.ERROR)


def test_what_can_not_be_exported_is_refused_at_the_start(here: Callable[..., Done], tmp_path: Path) -> None:
    """Not after the run: the criterion, which fails, is never asked."""
    done = here("prune --model theirs:Single --input-shape 1,7,7 --criterion theirs:broken --target macs=0.5 "
                "--round-to 1 --onnx -o", tmp_path / "a" / "b")  # fmt: skip
    wrong(done, "can not be captured")
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------- files and folders


def test_a_broken_archive_has_one_message(here: Callable[..., Done], tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=np.zeros((8, 1, 7, 7), np.float32), y=np.arange(8) % 3)
    np.savez(tmp_path / "no_y.npz", x=np.zeros((8, 4)))
    np.savez_compressed(tmp_path / "packed.npz", x=np.random.default_rng(0).random((8, 1, 7, 7)), y=np.arange(8) % 3)
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(data[: len(data) // 2])
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[200:260] = bytes(60)
    (tmp_path / "damaged.npz").write_bytes(packed)
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("half", "damaged", "text", "array", "no_y"):
        done = here(f"plan {WEIGHT} --data", tmp_path / f"{name}.npz")
        wrong(done, f"--data: {tmp_path / name}.npz", "holds no samples" if name == "no_y" else "can not be read")
        assert done.stderr.count("What to do") == done.stderr.count("Expected") == 1, done.stderr
        assert "pickle" not in done.stderr
    assert here(f"plan {WEIGHT} --data", tmp_path / "whole.npz").returncode == 0


def test_an_option_given_twice(here: Callable[..., Done]) -> None:
    wrong(here(PLAN, "--target macs=0.7"), "'--target'", "more than once")
    wrong(here(PLAN, "--seed 1 --seed=2"), "'--seed'", "more than once")
    assert here(PLAN, "--protect first --json --json").returncode == 0


def test_folders(here: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "there").mkdir()
    impossible = f"{NET} {DATA} --criterion weight --target macs=0.0001"
    for place in ("a/b/c", "there"):
        wrong(here(f"prune {impossible} -o", tmp_path / place), "can not be met")
        wrong(here(f"plan {impossible} -o", tmp_path / place), "can not be met")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "file",
        "there",
    ]  # what was made is gone, what was there is not
    for command in ("prune", "plan"):
        wrong(here(f"{command} {WEIGHT} {DATA} -o", tmp_path / "file" / "o"), "can not write into")
    if Path("/proc/self").is_dir():  # there, but nobody can write into it
        wrong(here(f"prune {WEIGHT} {DATA} -o /proc"), "can not write into /proc")
    assert here(PLAN, "-o", tmp_path / "a" / "b").returncode == 0
    assert (tmp_path / "a" / "b" / "plan.json").exists()


def test_ctrl_c(here: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second step; the same command then goes on with that step."""
    calls = tmp_path / "calls"
    calls.write_text("")
    monkeypatch.setenv("CALLS", str(calls))
    run = (f"prune {NET} {DATA} --target macs=0.4 --criterion theirs:counted --steps 2 --no-baselines -o",
           tmp_path / "o", "--resume", tmp_path / "state")  # fmt: skip
    done = here(*run)
    assert done.returncode == 130
    assert done.stderr == f"error: interrupted; the same command goes on from what is in {tmp_path / 'state'}\n"
    assert not done.stdout
    assert not (tmp_path / "o").exists()
    again = here(*run)
    assert again.returncode == 0, again.stderr
    assert calls.read_text() == "xxx"
    assert len(compress.Report.load(tmp_path / "o" / "report.json").history) == 2


def test_a_target_that_is_met_already(here: Callable[..., Done], tmp_path: Path) -> None:
    done = here(f"prune {NET} {DATA} --criterion weight --target macs=1.0 --no-baselines -o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert compress.Report.load(tmp_path / "report.json").met


def test_options_are_declared_once() -> None:
    """In compress._options; the commands name them."""
    source = Path(compress.__file__).with_name("cli.py").read_text()
    assert "typer.Option" not in source
    assert "typer.Argument" not in source
    light = "compress._options, compress._requests, compress._shell"
    code = f"import sys, {light}\nassert not {{'torch', 'numpy'}} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
