"""The report on a quantized network, and the comparison of ways to quantize: numbers of the file, honest words."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor, nn

import compress
from compress import container
from compress.evaluation import evaluate
from compress.quantization_page import render_quantized
from compress.quantization_plots import bits, methods, training, zeros
from compress.quantization_report import QuantizationReport
from compress.quantizer_comparison import QuantizerComparison, Run
from compress.stages import Stage, Stages, render_stages
from lrp.errors import FileFormatError, InputError, MismatchError

mpl.use("Agg")
Pair = tuple[Tensor, Tensor]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def samples(n: int = 120, seed: int = 1) -> Pair:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 7, 7, generator=g)
    y = torch.stack([x[:, 0, :3].mean((1, 2)), x[:, 0, 4:].mean((1, 2)), x[:, 0, :, :3].mean((1, 2))], 1).argmax(1)
    return x, y


def tuning(**options: Any) -> compress.FineTune:
    plain: dict[str, Any] = {"epochs": 3, "optimizer": "adamw", "lr": 2e-3, "batch_size": 20, "progress": False}
    return compress.FineTune(samples(), **{**plain, **options})


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    model = network()
    compress.FineTune(samples(), epochs=12, optimizer="adamw", lr=5e-3, batch_size=20, progress=False)(model)
    return model.eval()


@pytest.fixture(scope="module")
def result(net: nn.Sequential) -> compress.QuantizeResult:
    return compress.quantize(
        net,
        samples(),
        method="ecqx",
        rate=compress.Rate(zeros=0.6),
        train=tuning(validation=[samples(60, 5)]),
        progress=False,
    )


@pytest.fixture(scope="module")
def compared(net: nn.Sequential) -> QuantizerComparison:
    return compress.compare_quantizers(
        net,
        samples(),
        evaluate=[samples(200, 2)],
        methods=("ecq", "ecqx", "random"),
        seeds=2,
        rate=compress.Rate(bits_per_weight=1.5),
        train=tuning(epochs=2),
        progress=False,
    )


@pytest.fixture(scope="module")
def full(
    net: nn.Sequential, result: compress.QuantizeResult, compared: QuantizerComparison
) -> compress.QuantizationReport:
    return compress.report(
        result,
        original=net,
        data=[samples(200, 2)],
        class_names=["up", "down", "<b>left</b>"],
        calibration=samples()[0],
        rounds=1,
        comparison=compared,
    )


# ---------------------------------------------------------------------- the report


def test_numbers_are_those_of_the_file(
    net: nn.Sequential, result: compress.QuantizeResult, full: QuantizationReport, tmp_path: Path
) -> None:
    compress.save(result.model, tmp_path / "small")
    compress.save(net, tmp_path / "large")
    header = container.inspect(tmp_path / "small")
    size = (tmp_path / "small").stat().st_size
    assert (full.before.file_bytes, full.after.file_bytes) == ((tmp_path / "large").stat().st_size, size)
    assert full.reached.bytes == size == sum(full.parts.values())
    own = evaluate(compress.load(tmp_path / "small", network), [samples(200, 2)])
    assert full.after.evaluation is not None
    assert full.after.evaluation.accuracy == own.accuracy
    lengths = {e.name: e.length for e in header.entries}
    assert {layer.name: layer.bytes for layer in full.layers} == lengths
    for layer in full.layers:
        w = result.model.get_parameter(layer.name)
        assert layer.zeros == pytest.approx(float((w == 0).double().mean()))
        assert layer.weights == w.numel()
        assert layer.relevance in ("ok", "skipped", "not_reached")
    assert full.met
    assert full.reached.zeros >= 0.6


@pytest.mark.parametrize("method", ["ecq", "ecqx"])
@pytest.mark.parametrize("epochs", [1, 4])
def test_a_rate_holds_at_the_end_and_not_only_at_the_last_search(net: nn.Sequential, method: str, epochs: int) -> None:
    """6 steps an epoch, a search every 10; and no more is given up than was asked for."""
    for rate in (compress.Rate(zeros=0.6), compress.Rate(bits_per_weight=1.5)):
        found = compress.quantize(
            net, samples(), method=method, rate=rate, train=tuning(epochs=epochs, lr=5e-3), progress=False
        ).reached
        assert 0 <= rate.excess(found.zeros, found.bits_per_weight) < 0.03


def test_it_says_what_matters(full: QuantizationReport) -> None:
    text = "\n".join(full.sentences)
    assert "times smaller, everything counted" in text
    assert "Asked for at least 60 % zeros" in text
    assert "test samples top-1 accuracy went from" in text
    assert re.search(r"int8 is [\d.]+ times smaller but not faster|int8 is not smaller", text)
    assert "Zeros and few bits alone make nothing faster." in text
    assert "Heat maps before and after" in text
    assert "(a pilot)" in text
    assert "best on validation samples" in text
    assert "seed 0" in text
    for layer in full.layers:
        assert layer.name in str(full)


def test_json_comes_back(full: QuantizationReport, tmp_path: Path) -> None:
    full.save(tmp_path / "report.json")
    again = QuantizationReport.load(tmp_path / "report.json")
    assert again.to_json() == full.to_json()
    assert str(again) == str(full)
    assert render_quantized(again) == render_quantized(full)
    json.dumps(full.to_json(), allow_nan=False)
    stored = json.loads((tmp_path / "report.json").read_text())
    stored["layers"][0].pop("bits")
    with pytest.raises(FileFormatError, match="damaged"):
        QuantizationReport.from_json(stored)
    with pytest.raises(FileFormatError, match="no QuantizationReport"):
        QuantizationReport.from_json({"format": "compress.Report", "version": 1})


def test_the_page_is_whole_and_safe(full: QuantizationReport, tmp_path: Path) -> None:
    compress.report(full, tmp_path / "out", title="A <script> of a network")
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.html", "report.json"]
    assert "<script" not in page
    assert "<b>left</b>" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "a pilot over 2 seeds" in page
    for heading in ("Forms of the network", "Layer by layer", "Training", "Does it still look at the same things?"):
        assert heading in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_gaps_are_said(net: nn.Sequential, result: compress.QuantizeResult) -> None:
    found = compress.report(result, original=net, meter=None)
    text = "\n".join(found.sentences)
    assert "Accuracy was not measured" in text
    assert "Forms for a runtime were not measured" in text
    assert "There is no comparison with other methods at equal bytes." in text
    assert found.sections == {}
    assert "Heat maps" not in text
    blind = compress.report(result, data=[samples(50, 2)], meter=None)
    assert "The network before quantization was not at hand" in "\n".join(blind.sentences)


def test_what_was_not_reached_and_what_collapsed_is_a_warning(full: QuantizationReport) -> None:
    from compress._quantization_sentences import sentences

    gone = dataclasses.replace(full.layers[0], zeros=1.0, collapsed=True, relevance="not_reached")
    bad = dataclasses.replace(full, limit=10, collapsed=(gone.name,), layers=(gone, *full.layers[1:]))
    assert not bad.met
    warned = [s.text for s in sentences(bad) if s.warning]
    assert any("Asked for at most 10 bytes; this was not reached." in text for text in warned)
    assert any(text.startswith("Zero throughout") and gone.name in text for text in warned)
    assert "all zero" in render_quantized(bad)


NOT_REACHED = "In these tensors no exponent up to 1 leaves the number of zeros that was asked for"
SKIPPED = (
    "These tensors had too few zeros for relevance to act, or relevance that is 0 everywhere: they are as without it"
)


def told_of_relevance(report: QuantizationReport) -> list[str]:
    from compress._quantization_sentences import sentences

    found = [s for s in sentences(report) if s.text.startswith((NOT_REACHED, SKIPPED))]
    assert all(s.warning for s in found)
    return [s.text for s in found]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (("ok", "ok", "none"), []),
        (("not_reached", "ok", "ok"), [f"{NOT_REACHED}: 0.weight."]),
        (("ok", "skipped", "skipped"), [f"{SKIPPED}: 3.weight and 8.weight."]),
        (("skipped", "not_reached", "skipped"), [f"{NOT_REACHED}: 3.weight.", f"{SKIPPED}: 0.weight and 8.weight."]),
    ],
)
def test_each_state_of_relevance_names_its_layers(
    full: QuantizationReport, states: tuple[str, ...], expected: list[str]
) -> None:
    layers = tuple(dataclasses.replace(layer, relevance=s) for layer, s in zip(full.layers, states, strict=True))
    assert [layer.name for layer in layers] == ["0.weight", "3.weight", "8.weight"]
    assert told_of_relevance(dataclasses.replace(full, layers=layers)) == expected


@pytest.mark.parametrize("state", ["not_reached", "skipped"])
def test_what_is_told_of_relevance_is_so(net: nn.Sequential, state: str) -> None:
    """In runs that end in the state: even relevance asks for large exponents, a wide window for nothing."""
    options: dict[str, Any] = {"bits": 3, "gamma": 0.4, "train": False, "progress": False}
    plain = compress.quantize(net, method="ecq", **options)
    zero_cost = compress.ZeroCost(match="sparsity") if state == "not_reached" else compress.ZeroCost(p=1.0)
    even = {n: torch.linspace(0.98, 1, p.numel()).view_as(p) for n, p in net.named_parameters() if p.dim() > 1}
    found = compress.quantize(net, method="ecqx", relevance=even, zero_cost=zero_cost, **options)
    report: Any = compress.report(found, data=[samples(50, 2)], meter=None, drift=None)
    told = NOT_REACHED if state == "not_reached" else SKIPPED
    names = [n for n, s in found.states.items() if s.relevance == state]
    assert names == ["0.weight", "3.weight", "8.weight"]
    assert told_of_relevance(report) == [f"{told}: 0.weight, 3.weight and 8.weight."]
    for name in names:
        first, second = (r.plan.indices(r.model)[name] for r in (plain, found))
        assert torch.equal(first, second) == (state == "skipped")  # "as without it"
        assert (int((first == 0).sum()) == int((second == 0).sum())) == (state == "skipped")


def test_a_network_from_a_file_is_reported_on(
    net: nn.Sequential, result: compress.QuantizeResult, tmp_path: Path
) -> None:
    compress.save(result.model, tmp_path / "small")
    again = compress.load(tmp_path / "small", network)
    found: Any = compress.report(again, original=net, data=[samples(100, 2)], meter=None, drift=None)
    assert isinstance(found, QuantizationReport)
    assert found.method == "ecqx"
    assert found.after.file_bytes == result.reached.bytes
    assert found.training is None
    alone: Any = compress.report(again, meter=None)
    assert alone.before.file_bytes == found.before.file_bytes


def test_a_pruned_and_quantized_network(net: nn.Sequential) -> None:
    x, _ = samples()
    pruned = compress.prune(
        net, x[:1], [samples()], target=compress.Target(macs=0.6), round_to=1, evaluate=None, progress=False
    ).model
    small = compress.quantize(pruned, method="rtn", bits=4)
    test = [samples(100, 2)]
    whole = compress.report(small, original=pruned, data=test, meter=None, build=network)
    uncut = compress.report(small, original=pruned, data=test, meter=None)
    first = compress.report(small, original=net, data=test, meter=None)
    assert whole.after == uncut.after == first.after
    assert not whole.notes
    assert "architecture before pruning" in uncut.notes[0]
    assert not first.notes
    assert first.before.file_bytes is not None
    assert whole.before.file_bytes is not None
    assert first.before.file_bytes > whole.before.file_bytes
    assert "no comparison" not in "\n".join(whole.sentences)  # rounding has no rate


def test_what_does_not_belong_is_refused(net: nn.Sequential, result: compress.QuantizeResult) -> None:
    with pytest.raises(InputError, match="no such part for quantized"):
        compress.report(result, sensitivity=1)
    with pytest.raises(InputError, match="rivals"):
        compress.report(result, rivals={"random": None})
    with pytest.raises(InputError, match="comparison is of another kind"):
        compress.report(result, comparison={"format": "compress.Comparison"})
    with pytest.raises(InputError, match="onnxruntime"):
        compress.report(result, meter=lambda path: 1.0)


def test_drawings(full: QuantizationReport, compared: QuantizerComparison) -> None:
    import matplotlib.pyplot as plt

    assert [bar.get_width() for bar in bits(full).patches] == [layer.entropy for layer in full.layers]
    assert len(zeros(full).patches) == len(full.layers)
    assert full.training is not None
    ax = training(full.training)
    assert ax.lines[0].get_ydata().tolist() == list(full.training.losses)
    assert methods(compared).get_xlabel() == "accuracy, %"
    with pytest.raises(InputError, match="no layers"):
        bits(dataclasses.replace(full, layers=()))
    plt.close("all")


# ---------------------------------------------------------------------- the comparison


def by_hand(accuracies: dict[str, list[float | None]], size: int = 1000) -> QuantizerComparison:
    runs = [
        Run(name, seed, a, None if a is None else size, 0.5, 1.0, 0.1, (), "" if a is not None else "it failed")
        for name, row in accuracies.items()
        for seed, a in enumerate(row)
    ]
    return QuantizerComparison(tuple(runs), "at most 1 bit per weight", 0.95, 1000)


def test_all_methods_take_the_same_and_are_paired(compared: QuantizerComparison) -> None:
    assert compared.methods == ("ecq", "ecqx", "random")
    assert compared.seeds == (0, 1)
    assert compared.count == 200
    for run in compared.runs:
        assert run.error == ""
        assert run.bits_per_weight is not None
        assert run.bits_per_weight <= 1.5
    assert compared.spread < 0.1
    d = compared.difference("ecqx", "ecq")
    assert d is not None
    gaps = [(a.accuracy or 0) - (b.accuracy or 0) for a, b in zip(compared.of("ecqx"), compared.of("ecq"), strict=True)]
    assert d.mean == pytest.approx(sum(gaps) / 2)
    assert min(gaps) <= d.low <= d.high <= max(gaps)
    assert QuantizerComparison.from_json(json.loads(json.dumps(compared.to_json()))) == compared
    assert "2 seeds are a pilot" in str(compared)
    assert compared.to_markdown().startswith("| method |")


def test_the_seed_of_a_run_is_that_of_quantize(net: nn.Sequential, compared: QuantizerComparison) -> None:
    alone = compress.quantize(
        net,
        samples(),
        method="ecq",
        rate=compress.Rate(bits_per_weight=1.5),
        train=tuning(epochs=2, seed=1),
        evaluate=[samples(200, 2)],
        seed=1,
        progress=False,
    )
    run = compared.of("ecq")[1]
    assert alone.evaluation is not None
    assert (run.accuracy, run.bytes) == (alone.evaluation.accuracy, alone.reached.bytes)


def test_verdicts() -> None:
    found = by_hand({"ecq": [0.9] * 5, "ecqx": [0.92, 0.93, 0.92, 0.94, 0.92], "random": [0.8, 0.95, 0.9, 0.85, 0.99]})
    assert not found.pilot
    assert [d.verdict for d in found.differences] == ["ahead", "not told apart", "not told apart"]
    said = "\n".join(found.verdict())
    assert "At equal bytes ecqx is ahead of ecq: +2.60 points over 5 seeds" in said
    assert "pilot" not in said
    worse = by_hand({"ecq": [0.9] * 4, "ecqx": [0.8, 0.81, 0.8, 0.79]})
    assert "In this pilot ecqx is behind ecq" in "\n".join(worse.verdict())
    one = by_hand({"ecq": [0.9], "ecqx": [0.8]})
    assert one.differences[0].verdict == "not told apart"


def test_failures_collapse_and_unequal_bytes_are_named() -> None:
    found = by_hand({"ecq": [0.9, 0.9], "ecqx": [0.8, None], "random": [None, None]})
    said = "\n".join(found.verdict())
    assert "3 of 6 runs failed" in said
    assert "it failed" in said
    assert found.difference("random", "ecq") is None
    d = found.difference("ecqx", "ecq")
    assert d is not None
    assert d.seeds == 1
    assert ("random", "failed", "0", "-", "-", "-") in found.rows()
    runs = [dataclasses.replace(run, bytes=1000 if run.method == "ecq" else 1100) for run in found.runs]
    runs[0] = dataclasses.replace(runs[0], collapsed=("conv1.weight",))
    said = "\n".join(dataclasses.replace(found, runs=tuple(runs)).verdict())
    assert "Budgets are not equal: the files differ by up to 10.0 %." in said
    assert "With a tensor that is zero throughout: ecq under seed 0." in said


def test_finished_runs_are_kept(net: nn.Sequential, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "evaluate": [samples(50, 2)], "rate": compress.Rate(zeros=0.5), "train": tuning(epochs=1),
        "resume": tmp_path / "cells", "progress": False,
    }  # fmt: skip
    first = compress.compare_quantizers(net, samples(), methods=("ecq", "magnitude"), seeds=1, **options)
    lines = (tmp_path / "cells").read_bytes().count(b"\n")
    more = compress.compare_quantizers(net, samples(), methods=("ecq", "magnitude"), seeds=2, **options)
    assert (tmp_path / "cells").read_bytes().count(b"\n") == lines + 2
    assert [run for run in more.runs if run.seed == 0] == list(first.runs)
    with pytest.raises(MismatchError, match="stale"):
        compress.compare_quantizers(net, samples(), methods=("ecq", "magnitude"), **{**options, "bits": 3})


def test_a_function_of_the_seed_makes_the_training(net: nn.Sequential) -> None:
    asked = []

    def train(seed: int) -> compress.FineTune:
        asked.append(seed)
        return tuning(epochs=1, seed=seed)

    found = compress.compare_quantizers(
        net,
        samples(),
        evaluate=lambda model: 1.0,
        methods=("ecq", "magnitude"),
        seeds=[3, 5],
        target=compress.Target(bytes=4000),
        train=train,
        progress=False,
    )
    assert set(asked) == {0, 3, 5}
    assert found.seeds == (3, 5)
    assert found.goal == "at most 4,000 bytes in the file"
    assert found.count == 0
    assert all(run.bytes is not None and run.bytes <= 4000 for run in found.runs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ("ecq", "rtn")}, "rounding after training has no rate"),
        ({"methods": ("ecq",)}, "two or more"),
        ({"seeds": 0}, "a number from 1"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"rate": None}, "equal bytes"),
        ({"target": compress.Target(bytes=100)}, "one of the two"),
        ({"train": 3}, "train is no training"),
        ({"gamma": 0.1}, "gamma is not the same for all"),
        ({"evaluate": None}, "nothing to compare by"),
    ],
)
def test_wrong_comparisons(net: nn.Sequential, options: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"evaluate": [samples(10, 2)], "rate": compress.Rate(zeros=0.5), **options}
    with pytest.raises(InputError, match=re.escape(words)):
        compress.compare_quantizers(net, samples(), progress=False, **given)


# ---------------------------------------------------------------------- stages


def test_stages(tmp_path: Path) -> None:
    stages = (
        Stage("trained", 100_000, "float32", 0.99, 1000, 1.0, 0.9, 1.1),
        Stage("pruned", 50_000, "half", 0.98, 500, 0.5, 0.45, 0.55, page="pruned/index.html"),
        Stage("quantized", 5_000, "<i>", 0.98, 500, page="javascript:alert(1)"),
        Stage("ONNX int8", 20_000, "", 0.98, 500, 0.4, 0.39, 0.41, weights_only=True),
        Stage("ONNX same", 20_000, "", 0.98, 1000, 0.4, 0.39, 0.41, weights_only=True),
    )
    way = Stages("The way", stages, 450, "a runtime", ("A note.",), {"seed": 0})
    text = "\n".join(way.sentences)
    assert "quantized, is 20.0 times smaller than trained" in text
    assert "the 95 % intervals overlap" in text
    assert "Faster than trained in the runtime: pruned (2.00x), ONNX int8 (2.50x)." in text
    assert "within the spread of the rounds: ONNX same (2.50x)." in text
    way.save(tmp_path / "stages.json")
    assert Stages.load(tmp_path / "stages.json") == way
    page = render_stages(way)
    assert re.findall(r'href="([^"#]+)"', page) == ["pruned/index.html"]
    assert "<i>" not in page.split("<dl")[1]
    assert "A note." in page
