"""Real data sets, read from a folder the user names.

Nothing is downloaded. ``--data DIR`` (or the environment variable
``NEURALIZE_DATA``) points at a folder with

=============  ==============================================================
``cifar10/``   one of: lossless WebP mosaics of 25 x 40 tiles and
               ``labels.npz``; the originals, ``data_batch_1`` to ``_5`` and
               ``test_batch`` (Python version) or the same with ``.bin``
               (binary version), here or in the folder that the archive
               makes; pictures in ``train/CLASS/`` and ``test/CLASS/``
``imagenet/``  ``samples_1000_jpg256.zip``, one picture per class, and
               ``imagenet_labels.txt``
``mnist/``     the four IDX files, gzipped or not
``tabular/``   small tables, csv
=============  ==============================================================

CIFAR-10: https://www.cs.toronto.edu/~kriz/cifar.html; MNIST:
https://yann.lecun.com/exdb/mnist/ (or torchvision's mirror); ImageNet samples:
https://github.com/EliSchwartz/imagenet-sample-images; tables:
https://archive.ics.uci.edu.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lrp.errors import DataError

SOURCES = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "mnist": "https://yann.lecun.com/exdb/mnist/",
    "imagenet": "https://github.com/EliSchwartz/imagenet-sample-images",
    "tabular": "https://archive.ics.uci.edu",
}
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
        raise _missing(path.parent, path.name)
    return path


def _missing(place: Path, name: str) -> DataError:
    source = SOURCES.get(place.name)
    return DataError(
        "a data file is missing",
        expected=name,
        got=f"nothing of that name in {place}",
        fix=f"the original is at {source}; see experiments/data.py for the layouts"
        if source
        else "see experiments/data.py",
    )


def cifar10(
    data: Path, split: str = "test", thousands: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(pictures (N, 32, 32, 3) in 0..255, labels (N,)) in the official order; maybe only the first thousands.

    Raises
    ------
    DataError
        If the folder holds none of the layouts, or a file of one is damaged.
    """
    place = data / "cifar10"
    count = thousands or {"train": 50, "test": 10}[split]
    if (place / "labels.npz").is_file():
        return _mosaics(place, split, count)
    batches = [f"data_batch_{k}" for k in range(1, 6)][: -(-count // 10)] if split == "train" else ["test_batch"]
    for folder, ending, read in (
        ("cifar-10-batches-py", "", _python_batch),
        (".", "", _python_batch),
        ("cifar-10-batches-bin", ".bin", _binary_batch),
        (".", ".bin", _binary_batch),
    ):
        if (place / folder / f"{batches[0]}{ending}").is_file():
            found = [read(_existing(place / folder / f"{name}{ending}")) for name in batches]
            pictures, labels = (np.concatenate(part) for part in zip(*found, strict=True))
            return pictures[: 1000 * count], labels[: 1000 * count]
    if (place / split).is_dir():
        return _folders(place / split, 1000 * count)
    raise _missing(place, f"labels.npz, {batches[0]}, {batches[0]}.bin or a folder {split}")


def _mosaics(place: Path, split: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    strips = []
    for k in range(count):
        with Image.open(_existing(place / f"{split}_{k:02d}.webp")) as picture:
            mosaic = np.asarray(picture.convert("RGB"))
        strips.append(mosaic.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3))
    labels = np.load(_existing(place / "labels.npz"))[f"y_{split}"]
    return np.concatenate(strips), labels[: 1000 * count].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """A pickle may run anything: here only what makes up an array."""

    ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)


def _python_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with path.open("rb") as file:
        try:
            batch = _ArraysOnly(file, encoding="bytes").load()
            flat, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], np.int64)
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, ImportError, IndexError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if flat.dtype != np.uint8 or flat.shape != (len(labels), 3072):
        raise _damaged(path, f"an array {flat.dtype} {flat.shape} and {len(labels)} labels")
    return flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _binary_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % 3073:
        raise _damaged(path, f"{len(content)} bytes, no multiple of 3,073")
    rows = content.reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0].astype(np.int64)


def _damaged(path: Path, got: str) -> DataError:
    return DataError(
        f"{path.name} is no batch of CIFAR-10",
        expected="10,000 rows of 3,072 bytes and their labels",
        got=got,
        fix=f"take another copy from {SOURCES['cifar10']}",
    )


def _folders(place: Path, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures by class, taken in turn from all classes, so that the first thousands hold all of them."""
    classes: Sequence[str] = sorted(p.name for p in place.iterdir() if p.is_dir())
    if len(classes) != 10:
        raise _missing(place, "ten folders, one per class")
    rows = []
    for k, name in enumerate(classes):
        files = sorted(p for p in (place / name).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        rows += [(index, k, path) for index, path in enumerate(files)]
    pictures, labels = [], []
    for _, k, path in sorted(rows)[:count]:
        with Image.open(path) as picture:
            array = np.asarray(picture.convert("RGB"))
        if array.shape != (32, 32, 3):
            raise DataError(
                f"{path} is of another size",
                expected="32 x 32 pixels",
                got=f"{array.shape[1]} x {array.shape[0]}",
                fix="resize the pictures",
            )
        pictures.append(array)
        labels.append(k)
    return np.stack(pictures), np.array(labels, np.int64)


def mnist(data: Path, split: str = "test") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(pictures (N, 28, 28) in 0..255, labels (N,)) in the official order."""
    name = {"train": "train", "test": "t10k"}[split]
    pictures = _idx(data / "mnist", f"{name}-images-idx3-ubyte")
    return pictures, _idx(data / "mnist", f"{name}-labels-idx1-ubyte").astype(np.int64)


def _idx(place: Path, name: str) -> NDArray[np.uint8]:
    """An IDX file of bytes: two zeros, type 8, number of axes, sizes as big-endian int32, values."""
    plain = place / name
    path = plain if plain.is_file() else _existing(place / f"{name}.gz")
    if path is plain:
        content = path.read_bytes()
    else:
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
