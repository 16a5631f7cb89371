"""The README's heat maps of two trained networks: ``python -m experiments.gallery -o docs``.

Needs the data folder. Only relevance is drawn, never the pictures themselves,
which are not ours to pass on. Colours are symmetric about zero, scaled per map.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lrp
from experiments import data as sets
from experiments import models

IMAGENET_CLASSES = (1, 207, 281, 340, 404, 817)
CIFAR_ROWS = (0, 1, 3, 5, 12, 13)
COMPOSITES = ("epsilon", "epsilon_plus", "epsilon_gamma_box")


def composite(name: str, low: Tensor, high: Tensor) -> Any:
    """A composite by name; the box gets its bounds."""
    return lrp.composites.epsilon_gamma_box(low, high) if name == "epsilon_gamma_box" else name


def maps(network: models.Trained, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """({composite: relevance summed over colour (N, H, W)}, predicted class (N,))."""
    out = {}
    for name in COMPOSITES:
        rel = lrp.attribute(network.model, x, composite=composite(name, network.low, network.high), ledger=False)
        assert isinstance(rel.input, Tensor)
        out[name] = rel.input.sum(1)
    assert rel.target is not None
    return out, rel.target


def draw(columns: list[tuple[str, dict[str, Tensor], int]], path: Path) -> None:
    """One row per composite, one column per picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(COMPOSITES), len(columns), figsize=(1.15 * len(columns), 4.1), squeeze=False)
    for j, (title, relevance, i) in enumerate(columns):
        for k, name in enumerate(COMPOSITES):
            lrp.plots.heatmap(relevance[name][i], axes[k, j])
            if j == 0:
                axes[k, j].set_ylabel(name, fontsize=7)
            if k == 0:
                axes[k, j].set_title(title, fontsize=7)
    figure.tight_layout(pad=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Write ``gallery.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of real data")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    folder = sets.folder(arguments.data)
    torch.manual_seed(0)

    labels = sets.imagenet_labels(folder)
    pictures = [p for i, (_, p) in enumerate(sets.imagenet_samples(folder)) if i in IMAGENET_CLASSES]
    relevance, best = maps(models.squeezenet(folder), models.caffe_input(np.stack(pictures)))
    columns = [(labels[int(best[i])].split(",")[0], relevance, i) for i in range(len(pictures))]

    cifar, _ = sets.cifar10(folder)
    x = sets.normalise(cifar[list(CIFAR_ROWS)], models.IMAGENET_MEAN, models.IMAGENET_STD)
    relevance, best = maps(models.resnet56(folder), x)
    columns += [(sets.CIFAR10_CLASSES[int(best[i])], relevance, i) for i in range(len(x))]
    draw(columns, arguments.output / "gallery.png")
    print(f"wrote {arguments.output}: SqueezeNet 1.1 on {len(pictures)} pictures, ResNet-56 on {len(x)}")


if __name__ == "__main__":
    main()
