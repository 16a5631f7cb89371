"""Drift of explanations: the measures against scipy and plain sets, and heat maps that are zero."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import analysed
import matplotlib
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import compress
import lrp
from compress.drift import Agreement, Drift, SampleDrift, drift, similarities
from compress.planning import plan_pruning
from lrp.errors import InputError, MismatchError, TargetError

matplotlib.use("Agg")


def pruned(share: float = 0.6) -> nn.Module:
    model = analysed.trained()
    plan = plan_pruning(model, analysed.EXAMPLE, criterion="weight", target=compress.Target(channels=share), round_to=1)
    return plan.apply(model)


def naive(a: Tensor, b: Tensor, spots: int) -> tuple[float, float, float]:
    """Cosine, Spearman's correlation and overlap of the largest entries of two maps."""
    x, y = a.flatten().double().numpy(), b.flatten().double().numpy()
    first, second = (set(sorted(range(len(m)), key=lambda i: (-m[i], i))[:spots]) for m in (x, y))
    cosine = sum(x * y) / math.sqrt(sum(x * x) * sum(y * y))
    return float(cosine), float(spearmanr(x, y).statistic), len(first & second) / spots


@pytest.mark.parametrize("target", ["label", "predicted", 3])
def test_every_sample_against_scipy(target: Any) -> None:
    model, small = analysed.trained().double(), pruned().double()
    data = [(x.double(), y) for x, y in analysed.batches("test", 40, 15)]
    before = copy.deepcopy(model.state_dict())
    model.train()
    found = drift(model, small, data, composite="epsilon_plus", target=target, top=0.1, progress=False)
    assert model.training
    assert not small.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    asked = {"label": y, "predicted": model(x).argmax(1), 3: torch.full_like(y, 3)}[target]
    maps = [lrp.attribute(m, x, asked, composite="epsilon_plus").input.sum(1) for m in (model, small)]
    assert [s.target for s in found.samples] == asked.tolist()
    assert [s.label for s in found.samples] == y.tolist()
    assert [s.before for s in found.samples] == model(x).argmax(1).tolist()
    assert [s.after for s in found.samples] == small(x).argmax(1).tolist()
    for s in found.samples:
        expected = naive(maps[0][s.index], maps[1][s.index], 7)  # a tenth of 64 pixels, rounded up
        assert (s.cosine, s.spearman, s.top) == pytest.approx(expected, abs=1e-9)
    rows = [(s.cosine, s.spearman, s.top) for s in found.samples]
    for k, agreement in enumerate(found.overall.values()):
        assert agreement.mean == pytest.approx(np.mean([row[k] for row in rows]))
        assert agreement.low < agreement.mean < agreement.high
        assert agreement.count == 40
    assert found.kept == pytest.approx(float((model(x).argmax(1) == small(x).argmax(1)).double().mean()))


def test_chance_is_the_agreement_with_the_map_of_another_sample() -> None:
    model, small = analysed.trained().double(), pruned(0.9).double()
    data = [(x.double(), y) for x, y in analysed.batches("test", 20, 10)]
    found = drift(model, small, data, top=0.1)
    values = []
    for x, y in data:
        maps = [lrp.attribute(m, x, y, composite="epsilon_plus").input.sum(1) for m in (model, small)]
        values += [naive(maps[0][i], maps[1][i - 1], 7) for i in range(10)]
    for agreement, expected in zip(found.overall.values(), np.mean(values, axis=0), strict=True):
        assert agreement.chance == pytest.approx(expected, abs=1e-9)
        assert agreement.mean > agreement.chance + 0.1
    alone = drift(model, small, [(data[0][0][:1], data[0][1][:1])])
    assert alone.overall["cosine"].chance is None
    assert alone.overall["cosine"].low == alone.overall["cosine"].mean


def test_a_network_does_not_drift_from_itself_nor_from_a_scaled_one() -> None:
    model, data = analysed.trained().double(), [(x.double(), y) for x, y in analysed.batches("test", 20)]
    scaled = copy.deepcopy(model)
    scaled.head.weight.data *= 3
    scaled.head.bias.data *= 3
    for other in (model, scaled):
        found = drift(model, other, data)
        assert all(a.mean == pytest.approx(1.0, abs=1e-9) for a in found.overall.values())
        assert (found.kept, found.flipped) == (1, 0)
    opposed = copy.deepcopy(model)
    opposed.head.weight.data *= -1
    opposed.head.bias.data *= -1
    found = drift(model, opposed, data, composite="epsilon")
    assert found.overall["cosine"].mean == pytest.approx(-1.0, abs=1e-6)
    assert found.flipped == 20
    assert "changed its sign for 20 samples" in str(found)


class Gate(nn.Module):
    """Relevance a x for class 0: where a x is not positive, the map is zero."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.lin = nn.Linear(len(weights), len(weights), bias=False)
        self.out = nn.Linear(len(weights), 2, bias=False)
        self.lin.weight.data = torch.diag(torch.tensor(weights))
        self.out.weight.data = torch.ones(2, len(weights))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.lin(x)))


def test_heat_maps_of_zeros_are_told_apart() -> None:
    first, second = Gate(1.0, 1.0, 0.0), Gate(0.0, 1.0, 1.0)
    x = torch.tensor(
        [
            [1.0, 2.0, 3.0],  # 1 2 0 against 0 2 3
            [1.0, 0.0, 0.0],  # only the first has relevance
            [0.0, 0.0, 1.0],  # only the second
            [0.0, -1.0, 0.0],  # neither
        ]
    )
    found = drift(first, second, [x], composite="epsilon", target=0, top=0.3)
    cosine = 4 / math.sqrt(5 * 13)
    assert [s.cosine for s in found.samples] == [pytest.approx(cosine, abs=1e-5), 0.0, 0.0, None]
    assert [s.top for s in found.samples] == [0.0, 0.0, 0.0, None]
    assert [s.spearman for s in found.samples] == [
        pytest.approx(spearmanr([1, 2, 0], [0, 2, 3]).statistic), 0.0, 0.0, None,
    ]  # fmt: skip
    assert found.zero == {"before": 1, "after": 1, "both": 1}
    assert found.overall["cosine"].count == 3
    assert [s.label for s in found.samples] == [None] * 4
    assert "zero: 1 before, 1 after, 1 both" in str(found)
    nothing = drift(first, second, [x[3:]], composite="epsilon", target=0)
    assert dict(nothing.overall) == {}
    assert nothing.worst() == ()
    assert str(nothing).endswith("worst samples by cosine: none")


def test_similarities_of_constant_and_huge_maps() -> None:
    flat, varied, zero = np.full((1, 4), 2.0), np.array([[1.0, 2.0, 3.0, 4.0]]), np.zeros((1, 4))
    assert similarities(flat, flat, 0.5)["spearman"] == pytest.approx([math.nan], nan_ok=True)
    assert similarities(flat, varied, 0.5)["spearman"] == [0.0]
    assert similarities(flat, flat, 0.5)["cosine"] == [pytest.approx(1.0)]
    assert similarities(flat, zero, 0.5)["cosine"] == [0.0]
    for scale in (1e-200, 1e200):
        assert similarities(varied * scale, varied, 0.5)["cosine"] == [pytest.approx(1.0)]
    tied = similarities(np.array([[1.0, 1.0, 1.0, 0.0]]), np.array([[0.0, 1.0, 1.0, 1.0]]), 0.5)
    assert tied["top"] == [0.5]  # places 0, 1 and 1, 2


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, picture: Tensor, row: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(picture)).mean((2, 3)) + torch.relu(self.b(row)))


def test_several_inputs_are_one_map_and_channels_are_merged_on_request() -> None:
    torch.manual_seed(0)
    first, second = Two().double().eval(), Two().double().eval()
    x = torch.randn(6, 3, 5, 5).double(), torch.randn(6, 5).double()
    y = torch.tensor([0, 1] * 3)
    merged, whole = (drift(first, second, [(x, y)], merge_channels=merge) for merge in (True, False))
    for found, merge in ((merged, True), (whole, False)):
        maps = []
        for m in (first, second):
            a, b = lrp.attribute(m, x, y, composite="epsilon_plus").input
            maps.append(torch.cat([(a.sum(1) if merge else a).flatten(1), b], 1))
        assert found.samples[2].cosine == pytest.approx(naive(maps[0][2], maps[1][2], 3)[0])
    assert merged.samples != whole.samples


def made() -> Drift:
    samples = tuple(
        SampleDrift(i, label, 0, 1, after, cosine, cosine, cosine)
        for i, (label, after, cosine) in enumerate([(0, 1, 0.9), (1, 1, 0.2), (0, 0, 0.5), (1, 1, 0.4), (2, 1, None)])
    )
    return Drift(
        samples, {"cosine": Agreement(0.5, 0.3, 0.7, 4, 0.1)}, {"before": 0, "after": 0, "both": 1}, 2, {"top": 0.1}
    )


def test_worst_samples_and_classes_by_hand() -> None:
    found = made()
    assert [s.index for s in found.worst(2)] == [1, 3]
    assert [s.index for s in found.worst()] == [1, 3, 2, 0]
    classes = found.per_class()
    assert list(classes) == [1, 0]
    assert (classes[1].mean, classes[1].count) == (pytest.approx(0.3), 2)
    assert found.kept == 0.8
    with pytest.raises(InputError, match="measure is not known"):
        found.worst(measure="kendall")


def test_it_prints_draws_and_is_kept(tmp_path: Path) -> None:
    found = made()
    found.save(tmp_path / "d.json")
    assert Drift.load(tmp_path / "d.json") == found
    real = drift(analysed.trained(), pruned(), analysed.batches("test", 30))
    assert Drift.from_json(real.to_json()) == real
    lines = str(real).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["agreement", "cosine", "spearman", "top"]
    ax = real.plot()
    assert sum(bar.get_height() for bar in ax.patches) == 30
    assert real.plot(ax, "top") is ax
    matplotlib.pyplot.close("all")


def test_what_makes_no_sense_is_refused() -> None:
    model, small, data = analysed.trained(), pruned(), analysed.batches("test", 10)
    with pytest.raises(InputError, match="needs labels"):
        drift(model, small, [data[0][0]])
    with pytest.raises(MismatchError, match="different outputs"):
        drift(model, nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), data)
    with pytest.raises(TargetError):
        drift(model, small, data, target=10)
    for options in ({"top": 0.0}, {"top": 2}, {"target": "second"}, {"target": True}):
        with pytest.raises(InputError):
            drift(model, small, data, **options)  # type: ignore[arg-type]
