"""Trained networks: stated accuracies, and explanations that close on real pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.naive import explain, naive

import lrp
from experiments import accuracy, gallery, models
from experiments import data as sets
from lrp import rules

pytestmark = pytest.mark.data


@pytest.mark.slow
def test_resnet56_accuracy(data: Path) -> None:
    assert accuracy.resnet56(data) == {"top1": 0.9339}


@pytest.mark.slow
def test_squeezenet_accuracy(data: Path) -> None:
    assert accuracy.squeezenet(data) == {"top1": 0.616, "top5": 0.838}


def test_resnet56_books_and_oracle(data: Path) -> None:
    """Padded option-A shortcuts included, on real pictures, at every layer."""
    network = models.resnet56(data)
    pictures, labels = sets.cifar10(data)
    x = sets.normalise(pictures[:4], models.IMAGENET_MEAN, models.IMAGENET_STD).double()
    model = network.model.double()
    assert (model(x).argmax(1).numpy() == labels[:4]).all()
    rel = lrp.attribute(model, x, composite="epsilon_plus", wrt=("input", "layers"))
    assert (rel.ledger.gap.abs() <= 1e-10 * rel.ledger.magnitude()).all()
    c = torch.zeros_like(rel.output).scatter(1, rel.target[:, None], 1.0)
    r_in, layers, _ = explain(naive(model, rules.ZPlus(), rules.Epsilon(), x=x), x, c)
    assert (rel.input - r_in).abs().sum() <= 1e-9 * r_in.abs().sum()
    assert len(layers) > 100
    for name, r in layers.items():
        if name in rel.layers:
            assert (rel.layers[name] - r).abs().sum() <= 1e-9 * r.abs().sum(), name


def test_squeezenet_books_and_float32(data: Path) -> None:
    """The box rule on real pictures: the books close, float32 agrees with float64."""
    network = models.squeezenet(data)
    pictures = [p for i, (_, p) in enumerate(sets.imagenet_samples(data)) if i in (1, 340)]
    x = models.caffe_input(np.stack(pictures))
    composite = lrp.composites.epsilon_gamma_box(network.low, network.high)
    single = lrp.attribute(network.model, x, composite=composite)
    assert (single.ledger.gap.abs() <= 1e-4 * single.ledger.magnitude()).all()
    assert single.target.tolist() == [1, 340]
    double = lrp.attribute(network.model.double(), x.double(), composite=composite)
    assert (double.ledger.gap.abs() <= 1e-10 * double.ledger.magnitude()).all()
    error = (single.input.double() - double.input).abs().sum() / double.input.abs().sum()
    assert error <= 1e-3


def test_gallery_draws(data: Path, tmp_path: Path) -> None:
    network = models.resnet56(data)
    pictures, _ = sets.cifar10(data)
    x = sets.normalise(pictures[:1], models.IMAGENET_MEAN, models.IMAGENET_STD)
    relevance, best = gallery.maps(network, x)
    assert set(relevance) == set(gallery.COMPOSITES)
    gallery.draw([(sets.CIFAR10_CLASSES[int(best[0])], relevance, 0)], tmp_path / "g.png")
    assert (tmp_path / "g.png").stat().st_size > 3000


def test_missing_data_teaches(tmp_path: Path) -> None:
    with pytest.raises(lrp.errors.DataError, match="NEURALIZE_DATA"):
        sets.folder(tmp_path / "nowhere")
    with pytest.raises(lrp.errors.DataError, match="missing"):
        models.resnet56(tmp_path)
