"""Accuracy of the trained networks the experiments start from: ``python -m experiments.accuracy``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from experiments import data as sets
from experiments import models


@torch.no_grad()
def resnet56(folder: Path, batch: int = 250) -> dict[str, float]:
    """Top-1 on the 10,000 test pictures of CIFAR-10."""
    network = models.resnet56(folder).model
    pictures, labels = sets.cifar10(folder)
    right = 0
    for i in tqdm(range(0, len(pictures), batch), desc="ResNet-56", disable=None):
        x = sets.normalise(pictures[i : i + batch], models.IMAGENET_MEAN, models.IMAGENET_STD)
        right += int((network(x).argmax(1).numpy() == labels[i : i + batch]).sum())
    return {"top1": right / len(pictures)}


@torch.no_grad()
def squeezenet(folder: Path, batch: int = 50) -> dict[str, float]:
    """Top-1 and top-5 on 1,000 sample pictures, one per class.

    The samples are probably training pictures: no validation accuracy.
    """
    network = models.squeezenet(folder).model
    pictures = [p for _, p in sets.imagenet_samples(folder)]
    top1 = top5 = 0
    for i in tqdm(range(0, len(pictures), batch), desc="SqueezeNet 1.1", disable=None):
        best = network(models.caffe_input(np.stack(pictures[i : i + batch]))).topk(5).indices
        hit = best == torch.arange(i, i + len(best))[:, None]
        top1 += int(hit[:, 0].sum())
        top5 += int(hit.any(1).sum())
    return {"top1": top1 / len(pictures), "top5": top5 / len(pictures)}


def main() -> None:
    """Print both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of real data")
    folder = sets.folder(parser.parse_args().data)
    print(json.dumps({"resnet56": resnet56(folder), "squeezenet1_1": squeezenet(folder)}, indent=1))


if __name__ == "__main__":
    main()
