"""A small residual CNN on scikit-learn's digits: train it, halve its MACs, quantize it, export it, measure every stage.

``python -m experiments.digits -o out/digits`` takes under four minutes on two
cores and needs no data folder. Of the 1,797 pictures (8 x 8), a fixed split
gives 1,000 to training, 347 to validation and 450 to the test. 10 pictures per
class of the *training* part are the reference samples of every criterion; the
quantized network is trained on all of that part, the validation part chooses
its epoch, and the test part is for the final numbers. The network is trained
once and kept beside the results; a second run reads it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress.measurement import Measurement, measure
from compress.stages import Stage, Stages, timed

__all__ = [
    "DigitNet",
    "build",
    "controls",
    "few",
    "pruned",
    "quantized",
    "run",
    "split",
    "test",
    "train",
    "training",
    "tuning",
    "validation",
]

EPOCHS, RATE, SEED, PER_CLASS, TUNING = 15, 0.1, 0, 10, 20
CRITERION = "lrp:epsilon"  # the default of compress.prune
BASELINES = ("random", "weight", "activation")
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
METHOD, BITS, ENTROPY = "ecqx", 4, compress.Rate(bits_per_weight=1.0)
QUANTIZED, SEEDS, CALIBRATION = 6, 5, 400  # epochs; of the ways to quantize; pictures
FORMS = ("fp32", "int8", "a8w8")
Batches = list[tuple[Tensor, Tensor]]


class DigitNet(nn.Module):
    """Convolution, pooling, a residual block, a convolution of stride 2, and a linear layer; about 390,000 MACs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv4 = nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + x)
        x = F.relu(self.bn4(self.conv4(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def build() -> DigitNet:
    """The network before training, for ``--model experiments.digits:build``."""
    return DigitNet()


def split() -> dict[str, tuple[Tensor, Tensor]]:
    """Part to (pictures (N, 1, 8, 8) in 0..1, labels (N,)); the same at every call."""
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
    y = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED))
    parts = {"train": order[:1000], "validation": order[1000:1347], "test": order[1347:]}
    return {name: (x[rows], y[rows]) for name, rows in parts.items()}


def training() -> tuple[Tensor, Tensor]:
    """For ``--data experiments.digits:training``."""
    return split()["train"]


def validation() -> tuple[Tensor, Tensor]:
    """For ``--validation-data experiments.digits:validation``."""
    return split()["validation"]


def test() -> tuple[Tensor, Tensor]:
    """For ``--test-data experiments.digits:test``."""
    return split()["test"]


test.__test__ = False  # type: ignore[attr-defined]  # a data set, whatever pytest makes of its name


def few(per_class: int = PER_CLASS, draw: int = 0) -> Batches:
    """Reference samples: some of every class, drawn from the training part."""
    x, y = training()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 + draw))
    rows = torch.cat([order[y[order] == c][:per_class] for c in range(10)])
    return [(x[rows], y[rows])]


def train(folder: Path | None = None, epochs: int = EPOCHS, width: int = 32) -> DigitNet:
    """The network trained with a fixed seed, or read from the folder if it was kept there.

    On one machine the result is the same every time.
    """
    from safetensors.torch import load_file, save_file

    place = None if folder is None else folder / "trained.safetensors"
    torch.manual_seed(SEED)
    model = DigitNet(width)
    if place is not None and place.is_file():
        model.load_state_dict(load_file(place))
        return model.eval()
    x, y = training()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs=epochs, steps_per_epoch=-(-len(y) // 50))
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(50):
            loss = F.cross_entropy(model(_shifted(x[rows], generator)), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), place)
    return model


def pruned(model: nn.Module, reference: Batches, criterion: str = CRITERION) -> compress.PruneResult:
    """Half of the MACs; then the original's outputs on the reference samples are followed for some epochs.

    The labels of the reference samples choose what goes, and nothing else.
    """
    (x, y) = reference[0]
    tune = compress.FineTune(
        (x, y),
        epochs=TUNING,
        lr=0.02,
        batch_size=20,
        distill=compress.Distillation(model, weight=1.0),
        progress=False,
    )
    return compress.prune(
        model,
        x[:1],
        reference,
        target=compress.Target(macs=0.5),
        criterion=criterion,
        fine_tune=tune,
        evaluate=[validation()],
        seed=SEED,
        progress=False,
    )


def tuning(teacher: nn.Module, epochs: int = QUANTIZED) -> compress.FineTune:
    """How quantized networks are trained: on the training part, half by labels, half after the network as trained."""
    return compress.FineTune(
        training(),
        epochs=epochs,
        optimizer="adamw",
        lr=2e-3,
        weight_decay=0.0,
        batch_size=50,
        distill=compress.Distillation(teacher, weight=0.5),
        validation=[validation()],
        seed=SEED,
        progress=False,
    )


def quantized(model: nn.Module, teacher: nn.Module, epochs: int = QUANTIZED) -> compress.QuantizeResult:
    """ECQx at 4 bits, held to an entropy of one bit per weight."""
    return compress.quantize(
        model,
        training(),
        method=METHOD,
        bits=BITS,
        rate=ENTROPY,
        train=tuning(teacher, epochs),
        seed=SEED,
        progress=False,
    )


def controls(
    model: nn.Module, teacher: nn.Module, seeds: int = SEEDS, epochs: int = QUANTIZED, resume: Path | None = None
) -> compress.QuantizerComparison:
    """ECQx, ECQ, magnitude, gradient and chance at the same entropy, judged once on the test part."""
    return compress.compare_quantizers(
        model,
        training(),
        evaluate=[test()],
        bits=BITS,
        rate=ENTROPY,
        train=tuning(teacher, epochs),
        seeds=seeds,
        resume=resume,
        progress=False,
    )


def run(
    folder: Path,
    draws: int = 5,
    rates: Sequence[float] = RATES,
    rivals: bool = True,
    seeds: int = SEEDS,
    epochs: int = QUANTIZED,
) -> Stages:
    """Everything: the network, pruned, quantized and exported, two reports, and the page of all stages, in ``folder``.

    Comparisons of criteria and studies are made on validation samples; the
    accuracies of the reports, and of the ways to quantize, are those of the
    test samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, reference = train(folder), few()
    result = _pruning(folder / "pruned", model, reference, draws, rates, rivals)
    small = quantized(result.model, model, epochs)
    found, measured = _quantization(folder / "quantized", result.model, small, model, seeds, epochs)
    compress.save(model, folder / "trained-network.safetensors")
    way = _way(folder, result, found, measured)
    way.save(folder / "stages.json")
    way.to_html(folder / "index.html")
    return way


def _pruning(
    folder: Path, model: nn.Module, reference: Batches, draws: int, rates: Sequence[float], rivals: bool
) -> compress.PruneResult:
    """The pruned network, its plan, its ONNX file, comparison, report and page."""
    folder.mkdir(exist_ok=True)
    example = reference[0][0][:1]
    result = pruned(model, reference)
    compress.save(result.model, folder / "model.safetensors")
    result.plan.save(folder / "plan.json")
    compress.export_onnx(result.model, folder / "model.onnx", example)
    comparison = compress.compare(
        model,
        example,
        training(),
        criteria=(CRITERION,),
        evaluate=[validation()],
        rates=rates,
        quantity="macs",
        draws=draws,
        per_class=PER_CLASS,
        progress=False,
    )
    others = {name: pruned(model, reference, name) for name in BASELINES} if rivals else {}
    compress.report(
        result,
        folder,
        original=model,
        example_inputs=example,
        data=[test()],
        title="Handwritten digits with half of the MACs",
        rivals=others,
        comparison=comparison,
        drift=compress.drift.drift(model, result.model, [validation()], progress=False),
    )
    return result


def _quantization(
    folder: Path, before: nn.Module, result: compress.QuantizeResult, teacher: nn.Module, seeds: int, epochs: int
) -> tuple[compress.QuantizationReport, Measurement]:
    """The file, the ONNX forms, controls, report and page; and every ONNX file of the way, timed in turns."""
    folder.mkdir(exist_ok=True)
    x, _ = training()
    compress.save(result.model, folder / "model.compressed")
    result.plan.save(folder / "plan.json")
    paths = {}
    for form in FORMS:
        given = x[:CALIBRATION] if form == "a8w8" else None
        paths[form] = compress.export_onnx(result.model, folder / f"{form}.onnx", x[:1], form, given)
    compress.export_onnx(teacher, folder / "trained.onnx", x[:1])
    files = {"fp32": folder / "trained.onnx", "pruned": folder.parent / "pruned" / "model.onnx"}
    files |= {f"quantized {form}": path for form, path in paths.items()}
    found = compress.report(
        result,
        folder,
        original=before,
        example_inputs=x[:1],
        data=[test()],
        calibration=x[:CALIBRATION],
        build=build,
        title="Handwritten digits at four bits",
        comparison=controls(before, teacher, seeds, epochs) if seeds else None,
    )
    return found, measure(files, data=[test()], threads=1, memory=False)


def _way(
    folder: Path, result: compress.PruneResult, found: compress.QuantizationReport, measured: Measurement
) -> Stages:
    """From the network as trained to the files that are shipped."""
    full, half = result.before.macs, result.reached.macs
    judge = [test()]
    files = {"trained": folder / "trained-network.safetensors", "pruned": folder / "pruned" / "model.safetensors"}
    files["quantized"] = folder / "quantized" / "model.compressed"
    accuracy = {name: compress.evaluate(compress.load(path, build), judge).accuracy for name, path in files.items()}
    pages = {"pruned": "pruned/index.html", "quantized": "quantized/index.html"}
    told = {
        "trained": "float32, on 1,000 pictures; its time is that of its ONNX file",
        "pruned": f"half of the MACs, chosen by relevance on {10 * PER_CLASS} labelled training pictures; on the same "
        "pictures it then followed the outputs before, without labels. Its time is that of its ONNX file",
        "quantized": f"ECQx, {BITS} bits (first and last layer 8), held to one bit per weight by entropy; trained on "
        "all 1,000 training pictures with labels, the epoch chosen on the validation part. Decoded at load, and then "
        "as fast as the pruned network",
        "ONNX fp32": "the quantized network, its weights written out",
        "ONNX int8": "the same whole numbers as weights, arithmetic in fp32: smaller, not faster",
        "ONNX a8w8": f"activations in 8 bits, too, calibrated on {CALIBRATION} training pictures",
    }
    rows = [("trained", "fp32", full), ("pruned", "pruned", half), ("quantized", None, half)]
    stages = []
    for name, form, macs in rows:
        time = {} if form is None else timed(measured[form])
        size, page = files[name].stat().st_size, pages.get(name, "")
        stages.append(Stage(name, size, told[name], accuracy[name], macs, page=page, **time))
    for form in FORMS:
        row, name = measured[f"quantized {form}"], f"ONNX {form}"
        alone = form == "int8"
        stages.append(Stage(name, row.bytes, told[name], row.accuracy, half, weights_only=alone, **timed(row)))
    s = measured.settings
    runtime = f"{s['runtime']}, {s['threads']} thread, batch {s['batch']}, {s['machine']}"
    notes = ["The quantized network was trained on more labelled pictures than the pruned one was."]
    if found.sections.get("comparison"):
        notes += [
            text for text in found.sentences if text.startswith(("At equal bytes", f"{METHOD} ", "In this pilot"))
        ]
    settings = {"rate": ENTROPY.settings(), "seed": SEED}
    return Stages(
        "Handwritten digits, from float32 to the file", tuple(stages), len(test()[1]), runtime, tuple(notes), settings
    )


def main(words: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m experiments.digits", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("out/digits"), help="folder for the results")
    parser.add_argument("--draws", type=int, default=5, help="of reference samples, for the comparison")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the ways to quantize; 0: no comparison of them")
    given = parser.parse_args(words)
    torch.set_num_threads(1)  # layers this small are faster without help, much faster on a busy machine
    start = time.monotonic()
    found = run(given.output, given.draws, seeds=given.seeds)
    print(found)
    print(f"Written to {given.output} in {time.monotonic() - start:.0f} s: index.html, stages.json, and a folder with "
          "report and files for each of pruned, quantized")  # fmt: skip


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every batch moved by at most one pixel."""
    right, down = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return torch.roll(F.pad(x, (1, 1, 1, 1)), (down, right), (2, 3))[:, :, 1:-1, 1:-1]


if __name__ == "__main__":
    main()
