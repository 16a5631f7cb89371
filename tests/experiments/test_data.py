"""Real data in every layout that is read, and files that are missing or damaged."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import data as sets
from lrp.errors import DataError

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(1000) % 10


def planes() -> np.ndarray:
    return PICTURES.transpose(0, 3, 1, 2).reshape(1000, 3072)


def mosaics(place: Path) -> None:
    tiles = PICTURES.reshape(25, 40, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(800, 1280, 3)
    Image.fromarray(tiles).save(place / "test_00.webp", lossless=True, exact=True)
    np.savez(place / "labels.npz", y_test=LABELS.astype(np.uint8), y_train=LABELS.astype(np.uint8))


def python_batches(place: Path) -> None:
    content = {b"data": planes(), b"labels": LABELS.tolist(), b"batch_label": b"testing batch 1 of 1"}
    (place / "test_batch").write_bytes(pickle.dumps(content, 2))


def binary_batches(place: Path) -> None:
    np.concatenate([LABELS[:, None].astype(np.uint8), planes()], 1).tofile(place / "test_batch.bin")


@pytest.mark.parametrize(
    ("folder", "write"),
    [
        ("", mosaics),
        ("", python_batches),
        ("cifar-10-batches-py", python_batches),
        ("", binary_batches),
        ("cifar-10-batches-bin", binary_batches),
    ],
)
def test_every_layout_gives_the_same_pictures(tmp_path: Path, folder: str, write: object) -> None:
    place = tmp_path / "cifar10" / folder
    place.mkdir(parents=True)
    write(place)  # type: ignore[operator]  # one of the functions above
    pictures, labels = sets.cifar10(tmp_path, "test", 1)
    np.testing.assert_array_equal(pictures, PICTURES)
    np.testing.assert_array_equal(labels, LABELS)
    assert labels.dtype == np.int64


def test_folders_of_pictures(tmp_path: Path) -> None:
    for k, name in enumerate(sets.CIFAR10_CLASSES):
        place = tmp_path / "cifar10" / "test" / name
        place.mkdir(parents=True)
        for index in range(3):
            Image.fromarray(PICTURES[10 * index + k]).save(place / f"{index}.png")
    pictures, labels = sets.cifar10(tmp_path, "test", 1)
    np.testing.assert_array_equal(pictures, PICTURES[:30])  # in turn from all classes
    np.testing.assert_array_equal(labels, LABELS[:30])
    Image.fromarray(PICTURES[0][:16]).save(tmp_path / "cifar10" / "test" / "truck" / "0.png")
    with pytest.raises(DataError, match="32 x 16"):
        sets.cifar10(tmp_path, "test", 1)


def test_a_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "cifar10"
    place.mkdir()
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(marker),)

    (place / "test_batch").write_bytes(pickle.dumps({b"data": Hostile(), b"labels": [0]}))
    with pytest.raises(DataError, match=r"no batch of CIFAR-10.*mkdir"):
        sets.cifar10(tmp_path, "test", 1)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", pickle.dumps({b"data": planes()[:, :9], b"labels": [0]})])
def test_damaged_batches(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cifar10").mkdir()
    for name in ("test_batch", "test_batch.bin"):
        path = tmp_path / "cifar10" / name
        path.write_bytes(content)
        with pytest.raises(DataError, match="no batch of CIFAR-10"):
            sets.cifar10(tmp_path, "test", 1)
        path.unlink()


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path: Path, packed: bool) -> None:
    place = tmp_path / "mnist"
    place.mkdir()
    digits = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for name, values in (("t10k-images-idx3-ubyte", digits), ("t10k-labels-idx1-ubyte", LABELS[:5].astype(np.uint8))):
        head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        if packed:
            with gzip.open(place / f"{name}.gz", "wb") as file:
                file.write(head + values.tobytes())
        else:
            (place / name).write_bytes(head + values.tobytes())
    pictures, labels = sets.mnist(tmp_path)
    np.testing.assert_array_equal(pictures, digits)
    np.testing.assert_array_equal(labels, LABELS[:5])


def test_what_is_missing_is_said_with_its_place_and_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_batch_1.*cifar10.*cs\.toronto\.edu"):
        sets.cifar10(tmp_path, "train")
    with pytest.raises(DataError, match=r"t10k-images.*mnist.*yann\.lecun"):
        sets.mnist(tmp_path)
    with pytest.raises(DataError, match="--data"):
        sets.folder(tmp_path / "nowhere")
