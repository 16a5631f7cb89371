"""The command line, as a user runs it: on a small network in a module of the user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from commands import ROOT, Done, in_process, wrong
from safetensors.torch import load_file, save_file

import compress
from compress._shell import for_the_shell
from compress.cli import main
from compress.criteria import CRITERIA

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

def unlabelled():
    return [samples()[0]]
"""


here = in_process("compress", main)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the user's module and trained weights."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mynets.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import mynets  # type: ignore[import-not-found]  # written above

        torch.manual_seed(3)
        model = mynets.Net()
        compress.FineTune(mynets.samples(400, 0), epochs=10, lr=0.05, progress=False)(model)
        save_file(model.state_dict(), folder / "weights.safetensors")
        yield folder
    sys.modules.pop("mynets", None)


@pytest.fixture
def network(home: Path) -> tuple[str | Path, ...]:
    return "--model", "mynets:Net", "--weights", home / "weights.safetensors"


DATA = ("--data", "mynets:samples")
TEST = ("--test-data", "mynets:test")
VALIDATION = ("--validation-data", "mynets:validation")
HALF = ("--target", "macs=0.5", "--round-to", "1")


def written(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------------- in processes of their own


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['compress', 'prune', '--help']\nimport compress.cli\n"
        "try:\n    compress.cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "heavy = {'torch', 'sklearn', 'pandas', 'numpy', 'matplotlib', 'jinja2', 'onnx', 'onnxruntime', "
        "'torch_pruning', 'PIL'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--accuracy-floor" in done.stdout


def test_reporting_imports_no_optional_package() -> None:
    code = (
        "import sys, compress, compress.reporting, compress.page, compress._commands\n"
        "heavy = {'onnx', 'onnxscript', 'onnxruntime', 'matplotlib', 'captum', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_prune_as_a_process(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compress", "prune", "--model", "mynets:Net", "--weights", "weights.safetensors"]
    command += [*DATA, *TEST, *HALF, "-o", str(tmp_path / "a" / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert written(tmp_path / "a" / "out") == ["index.html", "model.safetensors", "plan.json", "report.json"]
    report = compress.Report.load(tmp_path / "a" / "out" / "report.json")
    for sentence in report.sentences:
        assert sentence in done.stdout
    assert report.met


# ---------------------------------------------------------------------- prune


def test_what_prune_writes(here: Callable[..., Done], network: Any, tmp_path: Path) -> None:
    import mynets

    done = here("prune", *network, *DATA, *TEST, *HALF, "--onnx", "--json", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    files = ["index.html", "model.onnx", "model.safetensors", "plan.json", "report.json"]
    assert written(tmp_path) == sorted(summary["files"]) == files
    assert summary["target"]["met"]
    assert summary["target"]["reached"] <= summary["target"]["limit"]
    plan = compress.PruningPlan.load(tmp_path / "plan.json")
    model = compress.load(tmp_path / "model.safetensors", mynets.Net)
    assert model.first.out_channels == plan.layer_widths["first"][1]
    assert summary["widths"] == {name: list(pair) for name, pair in plan.layer_widths.items()}
    x, y = mynets.test()
    accuracy = int((model(x).argmax(1) == y).sum()) / len(y)
    assert summary["after"]["evaluation"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)
    report = compress.Report.load(tmp_path / "report.json")
    assert "comparison" in report.sections
    assert summary["after"]["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size


def test_the_same_seed_gives_the_same_files(here: Callable[..., Done], network: Any, tmp_path: Path) -> None:
    options = (*network, *DATA, *HALF, "--samples-per-class", "3", "--no-baselines")
    states = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        done = here("prune", *options, "--seed", str(seed), "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
        states[name] = load_file(tmp_path / name / "model.safetensors")
    assert equal(states["a"], states["b"])
    assert not equal(states["a"], states["c"])


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """The headers of two files may differ in the order of their entries."""
    return list(first) == list(second) and all(torch.equal(t, second[name]) for name, t in first.items())


def test_training_distilling_steps_and_resuming(here: Callable[..., Done], network: Any, tmp_path: Path) -> None:
    options = (
        *network, *DATA, *TEST, *HALF, "--steps", "2", "--fine-tune-epochs", "1", "--distill", "--no-baselines",
        "--resume", tmp_path / "state",
    )  # fmt: skip
    first = here("prune", *options, "-o", tmp_path / "a")
    assert first.returncode == 0, first.stderr
    report = compress.Report.load(tmp_path / "a" / "report.json")
    assert len(report.history) == 2
    assert all(step.training is not None for step in report.history)
    assert "fine-tuned for 1 epoch after each of 2 cuts, following the original's outputs" in first.stdout
    assert "There is no comparison" in first.stdout
    again = here("prune", *options, "--rivals", "-o", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    assert equal(*(load_file(tmp_path / name / "model.safetensors") for name in ("a", "b")))
    rivals = compress.Report.load(tmp_path / "b" / "report.json").sections["rivals"]
    assert list(rivals) == ["random", "weight", "activation"]
    assert all(r["reached"]["macs"] <= report.limit and r["evaluation"]["count"] == 200 for r in rivals.values())
    other = here("prune", *options, "--seed", "1", "-o", tmp_path / "c")
    assert other.returncode == 2
    assert "error: " in other.stderr


def test_a_floor_that_ends_the_run_is_a_failed_contract(
    here: Callable[..., Done], network: Any, tmp_path: Path
) -> None:
    options = (*network, *DATA, "--target", "macs=0.15", "--round-to", "1", "--floor", "1", "--steps", "3")
    done = here("prune", *options, *TEST, "--accuracy-floor=-0.03", "--no-baselines", "-o", tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "error: accuracy floor" in done.stderr
    assert "The accuracy floor was watched on the test samples themselves" in done.stdout
    assert "report.json" in written(tmp_path)
    assert not compress.Report.load(tmp_path / "report.json").met
    apart = here(
        "prune", *options, *TEST, *VALIDATION, "--accuracy-floor", "0.1", "--no-baselines", "-o", tmp_path / "b"
    )
    assert apart.returncode == 0, apart.stderr
    assert "watched on the test samples" not in apart.stdout


def test_options_of_the_ranking(here: Callable[..., Done], network: Any, tmp_path: Path) -> None:
    done = here(
        "prune", *network, *DATA, *HALF, "--normalisation", "l2", "--scope", "local", "--floor", "second=6", "--floor",
        "*=0.25", "--criterion", "weight", "--no-baselines", "--json", "-o", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranking = compress.PruningPlan.load(tmp_path / "plan.json").settings["ranking"]
    assert ranking["normalisation"] == "l2"
    assert ranking["scope"] == "local"
    assert ranking["floor"] == {"second": 6, "*": 0.25}
    assert ranking["round_to"] == 1
    assert json.loads(done.stdout)["widths"]["second"][1] >= 6
    kept = here(
        "plan", *network, "--input-shape", "1,8,8", *HALF, "--criterion", "weight", "--protect", "second", "--json"
    )
    assert json.loads(kept.stdout)["widths"]["second"] == [8, 8]


def test_without_data_criteria_of_the_weights_work(here: Callable[..., Done], network: Any, tmp_path: Path) -> None:
    options = ("prune", *network, "--input-shape", "1,8,8", *HALF, "-o", tmp_path)
    done = here(*options, "--criterion", "weight")
    assert done.returncode == 0, done.stderr
    assert "Accuracy was not measured" in done.stdout
    wrong(here(*options), "--data")
    labels = here("prune", *network, "--data", "mynets:unlabelled", *HALF, "-o", tmp_path)
    wrong(labels, "without y", "--samples-per-class 0")


# ---------------------------------------------------------------------- plan, apply, report


def test_plan_diff_apply_report(here: Callable[..., Done], network: Any, home: Path, tmp_path: Path) -> None:
    import mynets

    ranked = (*network, *DATA, "--round-to", "1")
    first = here("plan", *ranked, "--target", "macs=0.5", "-o", tmp_path / "plans")
    assert first.returncode == 0, first.stderr
    assert f"Written to {tmp_path / 'plans' / 'plan.json'}" in first.stdout
    plan = compress.PruningPlan.load(tmp_path / "plans" / "plan.json")
    assert str(plan) in first.stdout
    more = here(
        "plan",
        *ranked,
        "--target",
        "macs=0.3",
        "-o",
        tmp_path / "more.json",
        "--diff",
        tmp_path / "plans" / "plan.json",
    )
    other = compress.PruningPlan.load(tmp_path / "more.json")
    assert other.diff(plan) in more.stdout
    same = here("plan", *ranked, "--target", "macs=0.5", "--diff", tmp_path / "plans" / "plan.json")
    assert "does the same." in same.stdout
    applied = here(
        "apply", tmp_path / "more.json", *network, "--onnx", "--input-shape", "1,8,8", "-o", tmp_path / "cut"
    )
    assert applied.returncode == 0, applied.stderr
    assert written(tmp_path / "cut") == ["model.onnx", "model.safetensors"]
    original = compress._sources.read_model("mynets:Net", home / "weights.safetensors")  # type: ignore[attr-defined]  # it is imported by now
    x, _ = mynets.test()
    small = compress.load(tmp_path / "cut" / "model.safetensors", mynets.Net)
    torch.testing.assert_close(small(x), other.mask(original).eval()(x), rtol=1e-4, atol=1e-5)
    measured = here("report", tmp_path / "cut" / "model.safetensors", *network, *TEST, "-o", tmp_path / "r", "--json")
    assert measured.returncode == 0, measured.stderr
    summary = json.loads(measured.stdout)
    assert summary["after"]["file_bytes"] == (tmp_path / "cut" / "model.safetensors").stat().st_size
    assert summary["before"]["evaluation"]["accuracy"] > summary["after"]["evaluation"]["accuracy"]
    compared = here("compare", *ranked, *VALIDATION, "--criteria", "lrp", "--rates", "0.5", "-o", tmp_path / "c")
    assert compared.returncode == 0, compared.stderr
    comparison = tmp_path / "c" / "comparison.json"
    for file in (tmp_path / "cut" / "model.safetensors", tmp_path / "r" / "report.json"):
        more = (*network, "--input-shape", "1,8,8") if file.suffix == ".safetensors" else ()
        beside = here("report", file, *more, "--comparison", comparison, "-o", tmp_path / "beside", "--json")
        assert beside.returncode == 0, beside.stderr
        assert "comparison" in compress.Report.load(tmp_path / "beside" / "report.json").sections
    missing = here("report", file, "--comparison", tmp_path / "none.json", "-o", tmp_path / "no")
    assert missing.returncode == 2
    assert "none.json is not there" in missing.stderr
    renamed = here("report", tmp_path / "r" / "report.json", "--title", "Once more", "-o", tmp_path / "again")
    assert renamed.returncode == 0, renamed.stderr
    assert "<title>Once more</title>" in (tmp_path / "again" / "index.html").read_text()
    assert written(tmp_path / "again") == ["index.html", "report.json"]


# ---------------------------------------------------------------------- studies


def test_compare(here: Callable[..., Done], network: Any, tmp_path: Path) -> None:
    done = here(
        "compare", *network, *DATA, *VALIDATION, "--criteria", "lrp,taylor", "--rates", "0.3,0.5", "--draws", "2",
        "--samples-per-class", "4", "--json", "-o", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {c["criterion"] for c in found["curves"]} == {"lrp", "taylor", "random", "weight", "activation"}
    assert all(len(c["accuracy"]) == 2 for c in found["curves"])
    assert written(tmp_path) == ["comparison.json", "index.html"]
    assert "<svg" in (tmp_path / "index.html").read_text()
    told = here("compare", *network, *DATA, *VALIDATION, "--rates", "0.3", "--draws", "1", "-o", tmp_path)
    assert "lrp" in told.stdout
    assert "random" in told.stdout


def test_sensitivity(here: Callable[..., Done], network: Any, tmp_path: Path) -> None:
    done = here(
        "sensitivity",
        *network,
        *DATA,
        *VALIDATION,
        "--rates",
        "0.25,0.75",
        "--protect",
        "second",
        "--json",
        "-o",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["rows"]] == ["first"]
    assert found["rates"] == [0.25, 0.75]
    assert written(tmp_path) == ["index.html", "sensitivity.json"]
    rows = here("sensitivity", *network, *DATA, *VALIDATION, "--rates", "0.5", "--per", "*", "-o", tmp_path)
    assert "baseline" in rows.stdout


# ---------------------------------------------------------------------- wrong use


def test_wrong_use(here: Callable[..., Done], network: Any, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "o")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "file").write_text("")
    wrong(here(), "Missing command")
    wrong(here("prune", *network, *DATA, *out), "--target")
    wrong(here("prune", *network, *DATA, *HALF), "--output")
    wrong(here("prune", *DATA, *HALF, *out), "--model")
    wrong(here("prune", *network, *HALF, *out, "--colour"), "--colour")
    wrong(here("prune", *network, *DATA, "--target", "flops=0.5", *out), "--target", "macs=0.5")
    wrong(here("prune", *network, *DATA, "--target", "macs=1.5", *out), "1.5")
    wrong(here("prune", *network, *DATA, "--target", "macs=0.0001", "--no-baselines", *out), "can not be met")
    wrong(here("prune", *network, *HALF, *out), "--input-shape")
    wrong(here("prune", *network, "--input-shape", "1x8x8", *HALF, *out), "data")
    wrong(here("prune", *network, "--data", "nowhere", *HALF, *out), "nowhere")
    wrong(here("prune", "--model", "mynets:Nest", *DATA, *HALF, *out), "mynets:Nest")
    wrong(here("prune", *network, *DATA, *HALF, *out, "--criterion", "magic"), "magic")
    wrong(here("prune", *network, *DATA, *HALF, *out, "--normalisation", "l9"), "l9", "l2")
    wrong(here("prune", *network, *DATA, *HALF, *out, "--floor", "a lot"), "a lot")
    wrong(here("prune", *network, *DATA, *HALF, *out, "--protect", "third"), "third")
    wrong(here("prune", *network, *DATA, *HALF, *out, "--distill"), "--fine-tune-epochs")
    wrong(here("prune", *network, *DATA, *HALF, *out, "--accuracy-floor", "0.5"), "--validation-data")
    wrong(here("prune", *network, *DATA, *HALF, *out, "--device", "abacus"), "--device", "abacus")
    wrong(here("prune", *network, *DATA, *HALF, "-o", tmp_path / "file"), "can not write into")
    wrong(here("prune", "--model", "mynets:Net", "--weights", "none.pth", *DATA, *HALF, *out), "none.pth")
    wrong(here("compare", *network, *DATA, *out), "--validation-data")
    wrong(here("compare", *network, *VALIDATION, *out), "--data")
    wrong(here("compare", *network, *DATA, *VALIDATION, "--rates", "half", *out), "--rates", "half")
    wrong(here("compare", *network, *DATA, *VALIDATION, "--rates", "1.5", *out), "1.5")
    wrong(here("apply", tmp_path / "broken.json", *network, *out), "can not be read")
    wrong(here("apply", tmp_path / "none.json", *network, *out), "none.json")
    wrong(here("apply", tmp_path / "broken.json", *network, *out, "--onnx"), "can not be read")
    wrong(here("report", tmp_path / "broken.json", *out), "can not be read")
    wrong(here("report", tmp_path / "none.safetensors", *out), "--model")
    wrong(here("report", tmp_path / "none.safetensors", *network, *out), "is not there")
    wrong(here("report", tmp_path / "broken.json", *network, *out), "model.safetensors")
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


def test_a_plan_for_another_network(here: Callable[..., Done], network: Any, tmp_path: Path) -> None:
    done = here("plan", *network, *DATA, *HALF, "-o", tmp_path / "plan.json")
    assert done.returncode == 0
    wrong(
        here("apply", tmp_path / "plan.json", "--model", "torch.nn:Identity", "-o", tmp_path / "o"), "another network"
    )


def test_advice_is_given_in_options() -> None:
    assert for_the_shell("ask for more, lower floor=, set round_to=1, or protect fewer layers") == (
        "ask for more, lower --floor, set --round-to 1, or protect fewer layers"
    )
    assert for_the_shell("for example compress.Target(macs=0.5)") == "for example --target macs=0.5"
    assert for_the_shell("pass labelled data as evaluate=") == "pass labelled data as --validation-data"
    assert for_the_shell("'x' can not be used for resume=") == "'x' can not be used for --resume"
    assert (
        for_the_shell("pass a few samples, or reestimate_batchnorm=False") == "pass a few samples, or --no-reestimate"
    )


def test_help_names_the_usual_criteria(here: Callable[..., Done]) -> None:
    told = " ".join(here("prune", "--help").stdout.split())
    for name in ("lrp", "weight", "taylor", "gradient", "activation", "random"):
        assert name in CRITERIA
        assert name in told
    for command in ("plan", "apply", "compare", "sensitivity", "report"):
        assert here(command, "--help").returncode == 0
