"""Real data sets, read from a folder the user names.

Nothing is downloaded. ``--data DIR`` (or the environment variable
``NEURALIZE_DATA``) points at a folder with

=============  ==============================================================
``cifar10/``   lossless WebP mosaics of 25 x 40 tiles and ``labels.npz``
``imagenet/``  ``samples_1000_jpg256.zip``, one picture per class, and
               ``imagenet_labels.txt``
``mnist/``     the four gzipped IDX files
``tabular/``   small tables, csv
=============  ==============================================================
"""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lrp.errors import DataError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def folder(data: str | Path | None = None) -> Path:
    """The data folder.

    Raises
    ------
    DataError
        If there is none.
    """
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    path = Path(data or os.environ.get("NEURALIZE_DATA") or default)
    if not path.is_dir():
        raise DataError(
            "the folder of real data is missing",
            expected="a folder with cifar10/, imagenet/, mnist/ and tabular/",
            got=str(path),
            fix="pass --data DIR or set NEURALIZE_DATA",
        )
    return path


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            "a data file is missing", expected=path.name, got=f"nothing at {path}", fix="see experiments/data.py"
        )
    return path


def cifar10(
    data: Path, split: str = "test", thousands: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(pictures (N, 32, 32, 3) in 0..255, labels (N,)) in the official order; maybe only the first thousands."""
    count = thousands or {"train": 50, "test": 10}[split]
    strips = []
    for k in range(count):
        with Image.open(_existing(data / "cifar10" / f"{split}_{k:02d}.webp")) as picture:
            mosaic = np.asarray(picture.convert("RGB"))
        strips.append(mosaic.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3))
    labels = np.load(_existing(data / "cifar10" / "labels.npz"))[f"y_{split}"]
    return np.concatenate(strips), labels[: 1000 * count].astype(np.int64)


def mnist(data: Path, split: str = "test") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(pictures (N, 28, 28) in 0..255, labels (N,)) in the official order."""
    name = {"train": "train", "test": "t10k"}[split]
    pictures = _idx(_existing(data / "mnist" / f"{name}-images-idx3-ubyte.gz"))
    return pictures, _idx(_existing(data / "mnist" / f"{name}-labels-idx1-ubyte.gz")).astype(np.int64)


def _idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of bytes: two zeros, type 8, number of axes, sizes as big-endian int32, values."""
    with gzip.open(path) as file:
        content = file.read()
    axes = content[3] if content[:3] == b"\x00\x00\x08" else 0
    shape = np.frombuffer(content, ">i4", axes, 4)
    if not axes or len(content) != 4 + 4 * axes + int(shape.prod()):
        raise DataError(
            f"{path.name} is no IDX file of bytes",
            expected="magic number 00 00 08 and the number of axes, their sizes, values",
            got=f"{len(content)} bytes that begin with {content[:4].hex(' ')}",
            fix="take another copy",
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def normalise(pictures: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(N, H, W, C) in 0..255 to a float32 tensor (N, C, H, W), ``(x / 255 - mean) / std``."""
    x = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float().div_(255)
    shape = (1, -1, 1, 1)
    return x.sub_(torch.tensor(mean).reshape(shape)).div_(torch.tensor(std).reshape(shape))


def imagenet_samples(data: Path, size: int = 227) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(WordNet id, picture (size, size, 3)) in class order: the centre of each sample."""
    with zipfile.ZipFile(_existing(data / "imagenet" / "samples_1000_jpg256.zip")) as archive:
        names = sorted(n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg")))
        by_class = sorted(names, key=lambda n: Path(n).name.split("_")[0])
        for name in by_class:
            with Image.open(io.BytesIO(archive.read(name))) as picture:
                rgb = np.asarray(picture.convert("RGB"))
            top, left = (rgb.shape[0] - size) // 2, (rgb.shape[1] - size) // 2
            yield Path(name).name.split("_")[0], rgb[top : top + size, left : left + size]


def imagenet_labels(data: Path) -> list[str]:
    """Class names in index order."""
    return _existing(data / "imagenet" / "imagenet_labels.txt").read_text(encoding="utf-8").strip().splitlines()
