"""The report: numbers that are those of the files, a JSON form that is whole, and honest gaps."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import AFTER, answers, by_hand
from torch import Tensor, nn

import compress
from compress._measuring import timed, versions
from compress.evaluation import evaluate
from compress.pruning import PruneResult
from compress.reporting import Report, Timed
from lrp import errors


class Net(nn.Module):
    """Convolution, batch norm, convolution, linear; eight pixels a side."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, 2, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(x)).mean((2, 3)))


Batches = list[tuple[Tensor, Tensor]]


def samples(count: int, seed: int) -> Batches:
    """Noise on one of four textures, which is the class: bright, dark, stripes across, stripes down."""
    generator = torch.Generator().manual_seed(seed)
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    textures = torch.stack([torch.ones(8, 8), -torch.ones(8, 8), stripes.repeat(8, 1), stripes.repeat(8, 1).T])
    y = torch.arange(count) % 4
    return [(0.8 * textures[y].unsqueeze(1) + 1.5 * torch.randn(count, 1, 8, 8, generator=generator), y)]


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(3)
    model = Net()
    compress.FineTune(samples(400, 0)[0], epochs=10, lr=0.05, progress=False)(model)
    return model.eval()


@pytest.fixture(scope="module")
def result(net: Net) -> PruneResult:
    return compress.prune(
        net,
        torch.zeros(1, 1, 8, 8),
        samples(40, 1),
        target=compress.Target(macs=0.6),
        round_to=1,
        evaluate=samples(200, 2),
        progress=False,
    )


@pytest.fixture(scope="module")
def full(net: Net, result: PruneResult) -> Report:
    return compress.report(result, original=net, data=samples(300, 4), class_names=["a", "b", "c", "d"], rounds=3)


def test_the_example_is_worth_pruning(net: Net) -> None:
    assert 0.8 < evaluate(net, samples(300, 4)).accuracy < 1


@pytest.mark.parametrize("trained", [True, False])
def test_a_file_knows_what_was_done_after_the_cut(net: Net, tmp_path: Path, trained: bool) -> None:
    """As far as the run did it: what is made of the same plan by hand has no such past."""
    options: dict[str, Any] = {"target": compress.Target(macs=0.6), "round_to": 1, "progress": False}
    tune = compress.FineTune(samples(40, 1), epochs=2, lr=1e-3, progress=False) if trained else None
    steps = compress.Iterative(2)
    made = compress.prune(net, torch.zeros(1, 1, 8, 8), samples(40, 1), schedule=steps, fine_tune=tune, **options)
    compress.save(made.model, tmp_path / "small.safetensors")
    again = compress.load(tmp_path / "small.safetensors", Net)
    told = "fine-tuned for 2 epochs after each of 2 cuts" if trained else "there was no fine-tuning"
    both = [compress.report(one, original=net, meter=None) for one in (made, again)]
    for found in both:
        (how,) = (text for text in found.sentences if text.startswith("Channels were ranked"))
        assert how.endswith(f"{told}; batch-norm statistics were re-estimated.")
    assert both[0].settings["seed"] == both[1].settings["seed"]
    by_hand = compress.report(made.plan.apply(net), original=net, meter=None)
    (how,) = (text for text in by_hand.sentences if text.startswith("Channels were ranked"))
    assert how.endswith("whether it was trained after the cut is not recorded.")


@pytest.mark.parametrize("steps", [1, 2])
def test_bytes_are_those_of_the_file_everywhere(net: Net, tmp_path: Path, steps: int) -> None:
    schedule = compress.OneShot() if steps == 1 else compress.Iterative(steps)
    made = compress.prune(
        net, torch.zeros(1, 1, 8, 8), samples(40, 1), target=compress.Target(bytes=0.8), schedule=schedule,
        round_to=1, fine_tune=lambda model: None, progress=False,
    )  # fmt: skip
    for name, model in (("before", net), ("after", made.model)):
        compress.save(model, tmp_path / name)
    before, after = ((tmp_path / name).stat().st_size for name in ("before", "after"))
    assert after <= 0.8 * before
    assert (made.before.file_bytes, made.reached.file_bytes) == (before, after)
    assert (made.plan.before.file_bytes, made.plan.after.file_bytes) == (before, after)
    assert f"bytes of the file: {before:,} -> {after:,}" in str(made.plan)
    assert f"({after:,} in the file)" in str(made.reached)
    found = compress.report(made, original=net, meter=None)
    assert (found.reached, found.after.file_bytes) == (after, after)
    assert compress.PruningPlan.from_json(made.plan.to_json()) == made.plan
    assert compress.Costs.from_json(made.reached.to_json()) == made.reached
    assert made.plan.keep(next(iter(made.plan.removed))).after.file_bytes is None


def test_numbers_are_those_of_the_files(net: Net, result: PruneResult, full: Report, tmp_path: Path) -> None:
    for model, side in ((net, full.before), (result.model, full.after)):
        compress.save(model, tmp_path / "model.safetensors")
        compress.export_onnx(model, tmp_path / "model.onnx", torch.zeros(1, 1, 8, 8))
        assert side.file_bytes == (tmp_path / "model.safetensors").stat().st_size
        assert side.onnx_bytes == pytest.approx((tmp_path / "model.onnx").stat().st_size, abs=64)
        own = evaluate(compress.load(tmp_path / "model.safetensors", Net), samples(300, 4))
        assert side.evaluation is not None
        assert side.evaluation.accuracy == own.accuracy
        assert side.evaluation.count == 300
        assert [c.name for c in side.evaluation.per_class] == ["a", "b", "c", "d"]
        assert "largest output" in side.onnx_parity
    assert full.before.costs == result.before
    assert full.after.costs == result.reached
    assert full.limit == pytest.approx(0.6 * result.before.macs)
    assert full.reached == result.reached.macs
    assert full.met


def test_both_networks_are_timed_in_turns(full: Report) -> None:
    for side in (full.before, full.after):
        assert side.latency is not None
        assert 0 < side.latency.low <= side.latency.median <= side.latency.high
        assert side.latency.rounds == 3
        assert side.latency.threads == 1
        assert side.latency.meter.startswith(f"onnxruntime {importlib.metadata.version('onnxruntime')}")


def test_the_order_of_timing() -> None:
    asked: list[str] = []
    times = iter([4.0, 1.0, 5.0, 3.0, 9.0, 2.0])

    def board(path: Path) -> float:
        asked.append(path.name)
        return next(times)

    first, second = timed(board, [Path("a"), Path("b")], 3)
    assert asked == ["a", "b", "a", "b", "a", "b"]
    assert (first.median, first.low, first.high) == (5.0, 4.5, 7.0)
    assert (second.median, second.low, second.high, second.meter) == (2.0, 1.5, 2.5, "board")
    assert not first.overlaps(second)
    assert first.overlaps(dataclasses.replace(second, high=4.6))
    assert second.overlaps(dataclasses.replace(first, low=0.1))
    assert not Timed(1, 1, 1, 1, "").overlaps(Timed(2, 2, 2, 1, ""))


def test_a_meter_of_the_users_own(net: Net, result: PruneResult) -> None:
    def size_of(path: Path) -> float:
        return path.stat().st_size / 1e3

    found = compress.report(result, original=net, example_inputs=torch.zeros(1, 1, 8, 8), meter=size_of, rounds=1)
    assert found.after.latency is not None
    assert found.after.onnx_bytes is not None
    assert found.after.latency.median == found.after.onnx_bytes / 1e3
    assert found.after.latency.meter == "size_of"
    assert found.after.latency.threads is None
    with pytest.raises(errors.InputError, match="gave no time"):
        compress.report(result, original=net, example_inputs=torch.zeros(1, 1, 8, 8), meter=lambda path: -1.0)
    with pytest.raises(errors.InputError, match="can not be called"):
        compress.report(result, original=net, example_inputs=torch.zeros(1, 1, 8, 8), meter="board")


@pytest.mark.slow
def test_the_meter_of_the_run_times_its_report(net: Net) -> None:
    def size_of(path: Path) -> float:
        return path.stat().st_size / 1e3

    example = torch.zeros(1, 1, 8, 8)
    result = compress.prune(
        net, example, samples(40, 1), target=compress.Target(latency_ms=0.8), meter=size_of, progress=False
    )
    found = compress.report(result, original=net, example_inputs=example, rounds=1)
    assert found.after.latency is not None
    assert found.after.latency.meter == "size_of"
    assert found.after.onnx_bytes is not None
    assert found.after.latency.median == found.after.onnx_bytes / 1e3
    assert not any("was made by" in note for note in found.notes)

    def other(path: Path) -> float:
        return 1.0

    noted = compress.report(result, original=net, example_inputs=example, rounds=1, meter=other)
    assert any("made by the times of 'size_of'" in note and "'other'" in note for note in noted.notes)
    with pytest.raises(errors.BudgetError, match=r"write '0\.001ms' for milliseconds"):
        compress.plan_pruning(net, example, criterion="weight", target=compress.Target(latency_ms=0.001), meter=size_of)


def test_both_denominators(result: PruneResult, full: Report) -> None:
    widths = result.plan.layer_widths
    assert dict(full.widths) == widths
    every = dict(widths)
    prunable = {name: pair for name, pair in widths.items() if name != "last"}
    for name, pairs in (("all", every), ("prunable", prunable)):
        before, after = (sum(pair[k] for pair in pairs.values()) for k in (0, 1))
        assert full.filters[name] == {"before": before, "after": after, "removed": pytest.approx(1 - after / before)}
    assert full.filters["all"]["before"] == 20
    assert full.filters["prunable"]["before"] == 16
    assert full.protected == {"last": "its channels are the network's output"}


def test_who_was_hurt_is_paired(full: Report, net: Net, result: PruneResult) -> None:
    x, y = samples(300, 4)[0]
    right = [model(x).argmax(1) == y for model in (net, result.model.eval())]
    assert full.classes is not None
    assert full.classes.overall.lost == int((right[0] & ~right[1]).sum())
    assert full.classes.overall.gained == int((right[1] & ~right[0]).sum())
    for row in full.classes:
        at = y == row.label
        assert row.lost == int((right[0] & ~right[1] & at).sum())


def test_json_is_whole(full: Report, tmp_path: Path) -> None:
    full.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.to_json() == full.to_json() == json.loads((tmp_path / "report.json").read_text())
    assert again.sentences == full.sentences
    assert str(again) == str(full)
    assert again.met == full.met
    by_eye = full.to_json()
    assert by_eye["sentences"] == full.sentences
    assert by_eye["versions"]["torch-pruning"] == importlib.metadata.version("torch-pruning")
    assert by_eye["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in by_eye["versions"]["torch"]
    assert by_eye["settings"]["seed"] == 0


@pytest.mark.parametrize(
    "text", ["{}", "[]", "no json", '{"format": "compress.Report", "version": 1}', '{"format": "compress.Report"}']
)
def test_damaged_reports(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(errors.FileFormatError):
        Report.load(tmp_path / "r.json")


def test_what_is_written(full: Report, tmp_path: Path) -> None:
    assert compress.report(full, tmp_path / "new" / "folder") is not None
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["index.html", "report.json"]
    compress.report(full, tmp_path / "only.html")
    compress.report(full, tmp_path / "only.json")
    assert "<html" in (tmp_path / "only.html").read_text()
    assert Report.load(tmp_path / "only.json").title == full.title
    with pytest.raises(errors.InputError, match=r"\.json or a \.html"):
        compress.report(full, tmp_path / "only.pdf")


def test_a_report_can_be_written_again_with_more(full: Report) -> None:
    curves = compress.compare(
        Net().eval(), torch.zeros(1, 1, 8, 8), samples(12, 5), evaluate=samples(20, 6), rates=(0.3,),
        reestimate_batchnorm=False, progress=False,
    )  # fmt: skip
    more = compress.report(full, comparison=curves, title="Again", notes=["One more thing."])
    assert more.title == "Again"
    assert more.sections["comparison"] == curves.to_json()
    assert more.notes[-1] == "One more thing."
    assert "no comparison" not in " ".join(more.sentences)
    assert full.title == "Net, pruned"
    with pytest.raises(errors.InputError, match="no such part"):
        compress.report(full, comparisons=curves)


def test_rivals_are_judged_on_the_same_samples(net: Net, result: PruneResult) -> None:
    rival = compress.prune(
        net, torch.zeros(1, 1, 8, 8), samples(40, 1), target=compress.Target(macs=0.6), criterion="random",
        round_to=1, progress=False,
    )  # fmt: skip
    found = compress.report(result, original=net, data=samples(300, 4), meter=None, rivals={"random": rival})
    stored = found.sections["rivals"]["random"]
    assert stored["evaluation"] == {"accuracy": evaluate(rival.model, samples(300, 4)).accuracy, "count": 300}
    assert stored["reached"] == rival.reached.to_json()
    assert "The same run, training included, with other criteria: random" in " ".join(found.sentences)


# ---------------------------------------------------------------------- gaps


def test_without_an_original(result: PruneResult) -> None:
    found = compress.report(result, data=samples(300, 4), meter=None)
    assert found.before.evaluation is None
    assert found.before.file_bytes is None
    assert found.after.file_bytes is not None
    assert found.classes is None
    assert any("was not at hand" in note for note in found.notes)
    assert found.before.costs == result.before


def test_without_test_samples(net: Net, result: PruneResult) -> None:
    found = compress.report(result, original=net, example_inputs=torch.zeros(1, 1, 8, 8), meter=None)
    assert found.before.evaluation == result.evaluation_before
    assert any("measured to steer by" in note for note in found.notes)
    bare = dataclasses.replace(result, evaluation=None, evaluation_before=None)
    assert "Accuracy was not measured" in " ".join(compress.report(bare, original=net, meter=None).sentences)


def test_without_onnx(net: Net, result: PruneResult) -> None:
    class Branch(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.sum() > -1e9) else super().forward(-x)

    odd = Branch()
    odd.load_state_dict(net.state_dict())
    small = copy.deepcopy(result.model)
    small.__class__ = Branch
    found = compress.report(dataclasses.replace(result, model=small), original=odd.eval(), data=samples(40, 4))
    assert found.after.latency is None
    assert any(note.startswith("Latency was not measured: the graph of Branch") for note in found.notes)
    assert found.after.evaluation is not None


def test_of_a_network_that_carries_its_plan(net: Net, result: PruneResult, tmp_path: Path) -> None:
    compress.save(result.model, tmp_path / "m.safetensors")
    small = compress.load(tmp_path / "m.safetensors", Net)
    found = compress.report(small, original=net, data=samples(300, 4), meter=None)
    assert found.after.costs.macs == result.reached.macs
    assert found.before.costs.macs == result.before.macs
    assert found.target == compress.Target(macs=0.6)
    assert found.met
    with pytest.raises(errors.InputError, match="no compression to report on"):
        compress.report(net, original=net)
    with pytest.raises(errors.MismatchError):
        compress.report(small, original=nn.Linear(2, 2))


def test_a_run_that_was_stopped(net: Net) -> None:
    result = compress.prune(
        net, torch.zeros(1, 1, 8, 8), samples(40, 1), target=compress.Target(macs=0.15), round_to=1,
        schedule=compress.Iterative(3), evaluate=samples(200, 2), accuracy_floor=-0.05, floor=0.0, progress=False,
    )  # fmt: skip
    assert result.stopped
    found = compress.report(result, original=net, data=samples(300, 4), meter=None)
    assert not found.met
    told = " ".join(found.sentences)
    assert "this was not reached" in told
    assert "The accuracy floor ended the run" in told
    assert len(found.history) == len(result.history)


def test_the_user_s_networks_stay_as_they_are(net: Net, result: PruneResult) -> None:
    before = copy.deepcopy(net.state_dict()), copy.deepcopy(result.model.state_dict())
    flags = [m.training for model in (net, result.model) for m in model.modules()]
    compress.report(result, original=net, data=samples(40, 4), rounds=1)
    for model, held in zip((net, result.model), before, strict=True):
        for name, t in model.state_dict().items():
            assert torch.equal(t, held[name])
    assert flags == [m.training for model in (net, result.model) for m in model.modules()]


def test_a_target_in_bytes_is_that_of_the_file(net: Net) -> None:
    result = compress.prune(
        net, torch.zeros(1, 1, 8, 8), samples(40, 1), target=compress.Target(bytes=0.9), round_to=1, progress=False
    )
    found = compress.report(result, original=net, meter=None)
    assert found.before.file_bytes is not None
    assert found.reached == found.after.file_bytes
    assert found.limit == pytest.approx(0.9 * found.before.file_bytes)
    assert found.met


def test_versions() -> None:
    found = versions()
    for name in ("torch", "onnx", "onnxruntime", "torch-pruning"):
        assert found[name] == importlib.metadata.version(name)
    assert "core" in found["machine"]


def test_equality_of_hand_made_reports() -> None:
    first = by_hand(after=answers({0: 1}))
    again = Report.from_json(json.loads(json.dumps(first.to_json())))
    assert again.after.costs == AFTER
    assert again.target == first.target
    changed: Any = {**first.to_json(), "version": 2}
    with pytest.raises(errors.FileFormatError, match="version 2"):
        Report.from_json(changed)
