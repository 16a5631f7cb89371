"""The commands quantize and inspect, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT, Done, in_process, wrong
from safetensors.torch import save_file

import compress
from compress import container
from compress.cli import main
from compress.evaluation import evaluate
from compress.quantization_plan import QuantizationPlan, plan_of

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, 2, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(x)).mean((2, 3)))

def samples(count=200, seed=1):
    generator = torch.Generator().manual_seed(seed)
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    textures = torch.stack([torch.ones(8, 8), -torch.ones(8, 8), stripes.repeat(8, 1), stripes.repeat(8, 1).T])
    y = torch.arange(count) % 4
    return 0.8 * textures[y].unsqueeze(1) + 1.5 * torch.randn(count, 1, 8, 8, generator=generator), y

def test():
    return samples(seed=2)

def validation():
    return samples(seed=3)
"""


here = in_process("compress", main)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the user's module and trained weights."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "qnets.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import qnets  # type: ignore[import-not-found]  # written above

        torch.manual_seed(3)
        model = qnets.Net()
        compress.FineTune(qnets.samples(400, 0), epochs=10, lr=0.05, progress=False)(model)
        save_file(model.state_dict(), folder / "weights.safetensors")
        yield folder
    sys.modules.pop("qnets", None)


@pytest.fixture
def network(home: Path) -> tuple[str | Path, ...]:
    return "--model", "qnets:Net", "--weights", home / "weights.safetensors"


DATA = ("--data", "qnets:samples")
TEST = ("--test-data", "qnets:test")
SHORT = ("--epochs", "2", "--lr", "0.003")


@pytest.fixture(scope="module")
def made(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One whole run, in a process of its own."""
    out = tmp_path_factory.mktemp("made") / "out"
    words = ("quantize", "--model", "qnets:Net", "--weights", home / "weights.safetensors", *DATA, *TEST, *SHORT)
    words = (*words, "--validation-data", "qnets:validation", "--zeros", "0.5", "--controls", "1", "-o", out)
    done = subprocess.run(
        [sys.executable, "-m", "compress", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=home,
        check=False,
        env={"PYTHONPATH": f"{ROOT}:{home}", "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_what_quantize_writes(made: tuple[Path, str]) -> None:
    import qnets

    out, printed = made
    assert sorted(p.name for p in out.iterdir()) == ["index.html", "model.compressed", "plan.json", "report.json"]
    small = compress.load(out / "model.compressed", qnets.Net)
    plan = plan_of(small)
    assert plan is not None
    assert QuantizationPlan.load(out / "plan.json").to_json() == plan.to_json()
    report = compress.QuantizationReport.load(out / "report.json")
    assert report.after.file_bytes == (out / "model.compressed").stat().st_size
    assert report.after.evaluation is not None
    assert report.after.evaluation.accuracy == evaluate(small, [qnets.test()]).accuracy
    assert report.training is not None
    assert report.training.best in (1, 2)
    assert report.reached.zeros >= 0.5
    assert report.forms is not None
    assert {row["form"] for row in report.forms["rows"]} == {"fp32", "int8", "int4", "a8w8"}
    assert len(report.sections["comparison"]["runs"]) == 5
    assert "1 bit" not in printed
    assert "times smaller, everything counted" in printed
    assert "model.compressed, plan.json, report.json, index.html" in printed


def test_a_report_is_written_again(here: Callable[..., Done], made: tuple[Path, str], tmp_path: Path) -> None:
    done = here("report", made[0] / "report.json", "--title", "Another", "-o", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "again" / "index.html").read_text()
    assert "<title>Another</title>" in page
    assert page.count("<section") == (made[0] / "index.html").read_text().count("<section")


def test_a_quantized_file_is_measured(
    here: Callable[..., Done], made: tuple[Path, str], network: tuple[str | Path, ...], tmp_path: Path
) -> None:
    done = here("report", made[0] / "model.compressed", *network, *TEST, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["after"]["file_bytes"] == (made[0] / "model.compressed").stat().st_size


def test_inspect(here: Callable[..., Done], made: tuple[Path, str], home: Path, tmp_path: Path) -> None:
    file = made[0] / "model.compressed"
    done = here("inspect", file)
    assert done.returncode == 0, done.stderr
    assert "first.weight" in done.stdout
    assert "method: ecq\n" in done.stdout  # the method if none is named
    told = json.loads(here("inspect", file, "--json").stdout)
    assert told["bytes"] == file.stat().st_size
    assert told["bytes"] == told["header"] + told["other"] + told["weights"]
    assert [e["name"] for e in told["tensors"]] == [e.name for e in container.inspect(file).entries]
    assert not told["pruned"]
    plain = here("inspect", home / "weights.safetensors")
    assert "not quantized" in plain.stdout
    assert "8x1x3x3" in plain.stdout
    (tmp_path / "text").write_text("nothing")
    wrong(here("inspect", tmp_path / "text"), "no file of compress.save")
    wrong(here("inspect", tmp_path / "missing"), "is not there")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-3])
    wrong(here("inspect", tmp_path / "cut"), "cut off")


def test_rounding_needs_no_data(here: Callable[..., Done], network: tuple[str | Path, ...], tmp_path: Path) -> None:
    done = here(
        "quantize", *network, "--input-shape", "1,8,8", "--method", "rtn_per_channel", "--bits", "3", "--bits",
        "last=8", "--exclude", "first", "--no-forms", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {layer["name"]: layer["bits"] for layer in told["layers"]} == {"second.weight": 3, "last.weight": 8}
    assert told["method"] == "rtn_per_channel"
    assert told["target"] == {"limit": None, "met": True}


def test_a_target_in_bytes_and_a_run_that_goes_on(
    here: Callable[..., Done], network: tuple[str | Path, ...], tmp_path: Path
) -> None:
    words = ("quantize", *network, *DATA, *SHORT, "--target", "bytes=1500", "--method", "ecq", "--first", "same",
             "--no-forms", "--resume", tmp_path / "state")  # fmt: skip
    first = here(*words, "-o", tmp_path / "one", "--json")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["target"] == {"limit": 1500, "met": True}
    assert (tmp_path / "one" / "model.compressed").stat().st_size <= 1500
    again = here(*words, "-o", tmp_path / "two", "--json")
    assert again.returncode == 0, again.stderr
    one, two = ((tmp_path / name / "model.compressed").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_pruned_network_is_quantized(here: Callable[..., Done], tmp_path: Path) -> None:
    import qnets

    pruned = compress.prune(
        qnets.Net(),
        torch.zeros(1, 1, 8, 8),
        criterion="weight",
        target=compress.Target(macs=0.6),
        round_to=1,
        reestimate_batchnorm=False,
        progress=False,
    )
    compress.save(pruned.model, tmp_path / "pruned.safetensors")
    done = here(
        "quantize", "--model", "qnets:Net", "--weights", tmp_path / "pruned.safetensors", *DATA, *TEST, "--no-forms",
        "--method", "ecqx", "--epochs", "0", "--relevance-at", "background", "--every", "5", "-o", tmp_path / "small",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "architecture before pruning" not in done.stdout
    small = compress.load(tmp_path / "small" / "model.compressed", qnets.Net)
    assert small.first.out_channels < 8 or small.second.out_channels < 8
    assert json.loads(here("inspect", tmp_path / "small" / "model.compressed", "--json").stdout)["pruned"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gamma", "0.1", "--zeros", "0.5", *DATA), ("several goals", "--gamma and --zeros")),
        (("--target", "macs=0.5", *DATA), ("knows no such target", "--target bytes=")),
        (("--method", "lrp", *DATA), ("unknown", "ecqx")),
        (("--method", "rtn", "--zeros", "0.5", *DATA), ("no rate to choose", "--method ecq")),
        (("--input-shape", "1,8,8"), ("trains", "--data")),
        (("--method", "ecq", "--every", "3", *DATA), ("no relevance by LRP", "--method ecqx")),
        (("--epochs", "0", "--distill", *DATA), ("--distill is about training",)),
        (("--method", "mse", "--resume", "state", *DATA), ("--resume is about training",)),
        (("--controls", "2", *DATA), ("--controls", "--test-data")),
        (("--controls", "2", "--epochs", "0", *DATA, *TEST), ("--controls are trainings", "--epochs 0")),
        (("--bits", "four", *DATA), ("--bits make no sense", "--bits 4")),
        (("--first", "all", *DATA), ("--first makes no sense", "same")),
        (("--exclude", "nothing", "--epochs", "0", *DATA), ("fits no layer", "first.weight")),
        (("--zeros", "1.5", *DATA), ("rate makes no sense",)),
        (("--method", "ecqx", "--relevance-at", "nowhere", *DATA), ("at of the relevance is unknown",)),
    ],
)
def test_wrong_use(
    here: Callable[..., Done], network: tuple[str | Path, ...], tmp_path: Path, words: tuple[str, ...],
    said: tuple[str, ...],
) -> None:  # fmt: skip
    wrong(here("quantize", *network, *words, "-o", tmp_path / "out"), *said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        f"import sys\nsys.argv = ['compress', '{command}', '--help']\nimport compress.cli\n"
        "try:\n    compress.cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'jinja2', 'onnx'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
