"""What the command line reads: networks, weights, and samples in their forms; and what it says of those it can't."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

import compress
from compress._pictures import Pictures, parse_shape, parse_size, parse_values, read_pictures
from compress._sources import builder, explaining, read_model
from lrp import errors

NET = "nets:build"
SOURCE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))

def wide(width):
    return nn.Linear(width, 2)

def nothing():
    return 3

made = build()

def pair():
    return torch.arange(24.0).reshape(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])

def batches():
    x, y = pair()
    return [(x[:4], y[:4]), (x[4:], y[4:])]

def once():
    return iter(batches())

def unlabelled():
    return [pair()[0]]

def loader():
    return DataLoader(TensorDataset(*pair()), 4)
"""


@pytest.fixture(scope="module", autouse=True)
def _nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that the tests name, importable from a folder of its own."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


def rows(data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All samples of batches."""
    parts = list(data)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


# ---------------------------------------------------------------------- networks


def test_a_network_by_name() -> None:
    with pytest.warns(UserWarning, match="no --weights: the network is as nets:build builds it"):
        model = read_model(NET, None)
    assert not model.training
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 3)
    first, second = builder(NET)(), builder(NET)()
    assert first is not second


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nets", ["'nets'"]),
        ("nets:bild", ["'nets:bild'"]),
        ("no_such_module:build", ["no_such_module"]),
        ("nets:made", ["network already", "function"]),
        ("nets:wide", ["needs arguments", "width"]),
        ("nets:nothing", ["returned no network", "int"]),
    ],
)
def test_wrong_names(spec: str, words: list[str]) -> None:
    with pytest.raises(errors.InputError) as caught:
        read_model(spec, None)
    for word in words:
        assert word in str(caught.value)


def test_weights_in_every_form(tmp_path: Path) -> None:
    trained = builder(NET)()
    state = trained.state_dict()
    with torch.no_grad():
        for t in state.values():
            t.copy_(torch.rand(t.shape) + 1 if t.is_floating_point() else t + 3)
    save_file(state, tmp_path / "plain.safetensors")
    compress.save(trained, tmp_path / "ours.safetensors")
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "wrapped.pt")
    torch.save({f"module.{name}": t for name, t in state.items()}, tmp_path / "parallel.pth")
    short = {name: t for name, t in state.items() if "num_batches" not in name}
    torch.save({"model": short}, tmp_path / "old.pth")
    x = torch.randn(4, 1, 4, 4)
    expected = trained.eval()(x)
    for name in ("plain.safetensors", "ours.safetensors", "plain.pth", "wrapped.pt", "parallel.pth", "old.pth"):
        found = read_model(NET, tmp_path / name)
        assert not found.training
        torch.testing.assert_close(found(x), expected, rtol=0, atol=0)


def test_a_pickled_network_is_named_without_terminal_codes(tmp_path: Path) -> None:
    torch.save(builder(NET)(), tmp_path / "whole.pth")
    with pytest.raises(errors.FileFormatError) as caught:
        read_model(NET, tmp_path / "whole.pth")
    assert "\x1b" not in str(caught.value)
    assert re.search(r"a pickled object, [\w.]+\.", caught.value.got + ".")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(errors.FileFormatError) as caught:
        read_model(NET, tmp_path / "junk.pth")
    assert "\x1b" not in str(caught.value)


def test_another_torch_than_torchvisions_says_what_to_install() -> None:
    with pytest.raises(errors.InputError, match="pip install torch torchvision") as caught, explaining("--model x:y"):
        raise RuntimeError("operator torchvision::nms does not exist")
    assert torch.__version__ in caught.value.fix


def test_pruned_weights_keep_their_plan(tmp_path: Path) -> None:
    trained = builder(NET)()
    plan = compress.plan_pruning(
        trained, torch.zeros(1, 1, 4, 4), criterion="lrp", data=[(torch.randn(6, 1, 4, 4), torch.arange(6) % 3)],
        target=compress.Target(channels=4),
    )  # fmt: skip
    small = plan.apply(trained)
    compress.save(small, tmp_path / "small.safetensors")
    found = read_model(NET, tmp_path / "small.safetensors")
    x = torch.randn(4, 1, 4, 4)
    torch.testing.assert_close(found(x), small.eval()(x), rtol=0, atol=0)


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.place),)


def test_no_code_is_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Malicious(tmp_path / "hit")}, tmp_path / "bad.pth")
    with pytest.raises(errors.FileFormatError, match="without running code"):
        read_model(NET, tmp_path / "bad.pth")
    assert not (tmp_path / "hit").exists()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = builder(NET)().state_dict()
    torch.save({**state, "0.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "shape.pth")
    torch.save(
        {name: t for name, t in state.items() if name != "4.bias"} | {"extra": torch.zeros(1)}, tmp_path / "n.pth"
    )
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    (tmp_path / "cut.pth").write_bytes(b"12345")
    for name, kind, words in (
        ("shape.pth", errors.MismatchError, "'0.weight' of shape (4, 1, 3, 3), not (8, 1, 3, 3)"),
        ("n.pth", errors.MismatchError, "missing ['4.bias'], surplus ['extra']"),
        ("list.pth", errors.FileFormatError, "list"),
        ("epoch.pth", errors.FileFormatError, "epoch"),
        ("cut.safetensors", errors.FileFormatError, "can not be read"),
        ("cut.pth", errors.FileFormatError, "without running code"),
        ("none.pth", errors.DataError, "nothing at"),
    ):
        with pytest.raises(kind) as caught:
            read_model(NET, tmp_path / name)
        assert words in str(caught.value)


@pytest.mark.filterwarnings("ignore:no --weights")
def test_device() -> None:
    assert next(read_model(NET, None, "cpu").parameters()).device.type == "cpu"
    with pytest.raises(errors.InputError, match="--device"):
        read_model(NET, None, "gpu17")


# ---------------------------------------------------------------------- pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three grey pictures of 6 x 4 pixels each; pixel (i, j) of picture k is 10 k + 4 i + j."""
    for c, name in enumerate(("zebra", "ant")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(3):
            pixels = 10 * (3 * c + k) + np.arange(24).reshape(6, 4)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "set" / name / f"{k}.png")
    (tmp_path / "set" / ".hidden").mkdir()
    (tmp_path / "set" / "ant" / "notes.txt").write_text("no picture")
    return tmp_path / "set"


def test_folder(folder: Path) -> None:
    found = read_pictures(str(folder))
    assert found.classes == ("ant", "zebra")  # by name, not by time
    x, y = rows(found.batches(2))
    assert x.shape == (6, 3, 6, 4)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.arange(24.0).reshape(6, 4)
    for k, first in enumerate((30, 40, 50, 0, 10, 20)):
        for channel in x[k]:
            torch.testing.assert_close(channel * 255, expected + first)
    grey = read_pictures(str(folder), grey=True, mean="0.5", std="0.25").example
    torch.testing.assert_close(grey, ((expected + 30) / 255 - 0.5)[None, None] / 0.25)


def test_folders_of_folders_are_no_classes(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(folder, tmp_path / "photos" / part)
    with pytest.raises(errors.DataError, match="train holds folders of pictures, and is no class") as caught:
        read_pictures(str(tmp_path / "photos"))
    assert f"name {tmp_path / 'photos' / 'train'} itself" in str(caught.value)
    for name in ("zebra", "ant"):  # one folder within each class, as some sets have
        (tmp_path / "deep" / name).mkdir(parents=True)
        shutil.copytree(folder / name, tmp_path / "deep" / name / "images")
    assert read_pictures(str(tmp_path / "deep")).classes == ("ant", "zebra")


def test_size_crops_the_middle(folder: Path) -> None:
    x, _ = rows(read_pictures(str(folder), size="4", grey=True).batches())
    assert x.shape == (6, 1, 4, 4)
    # 6 x 4 needs no scaling to 4 x 4: rows 1 to 4 stay
    torch.testing.assert_close(x[3, 0] * 255, torch.arange(24.0).reshape(6, 4)[1:5])
    wide, _ = rows(read_pictures(str(folder), size="3x8", grey=True).batches())
    assert wide.shape == (6, 1, 3, 8)


def test_npz(tmp_path: Path) -> None:
    x = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)
    y = np.array([1, 0, 1, 2])
    cases = {
        "last.npz": ({"x": x, "y": y}, (3, 5, 6)),
        "first.npz": ({"x": x.transpose(0, 3, 1, 2), "y": y}, (3, 5, 6)),
        "grey.npz": ({"x": x[..., 0], "y": y.astype(np.uint8)}, (1, 5, 6)),
        "flat.npz": ({"x": x.reshape(4, -1)[:, :7].astype(float), "y": y}, (7,)),
    }
    for name, (arrays, shape) in cases.items():
        np.savez(tmp_path / name, **arrays)
        found = read_pictures(str(tmp_path / name))
        batch, labels = rows(found.batches(3))
        assert batch.shape == (4, *shape)
        assert batch.dtype == torch.float32
        assert labels.tolist() == y.tolist()
    first, _ = rows(read_pictures(str(tmp_path / "first.npz")).batches())
    last, _ = rows(read_pictures(str(tmp_path / "last.npz"), mean="0.1,0.2,0.3", std="0.5").batches())
    torch.testing.assert_close(first, torch.from_numpy(x.transpose(0, 3, 1, 2) / np.float32(255)))
    torch.testing.assert_close(last, (first - torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1)) / 0.5)
    resized, _ = rows(read_pictures(str(tmp_path / "first.npz"), size="10x12").batches())
    assert resized.shape == (4, 3, 10, 12)
    np.savez(tmp_path / "named.npz", x=x, y=y, classes=np.array(["a", "b", "c"]))
    assert read_pictures(str(tmp_path / "named.npz")).classes == ("a", "b", "c")


@pytest.mark.parametrize("name", ["pair", "batches", "loader"])
def test_objects(name: str) -> None:
    found = read_pictures(f"nets:{name}")
    for _ in range(2):
        x, y = rows(found.batches(4))
        assert x.flatten().tolist() == list(range(24))
        assert y.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.example.flatten().tolist() == [0, 1, 2, 3]
    few = rows(found.few(1, 0))
    assert sorted(few[1].tolist()) == [0, 1, 2]
    for sample, label in zip(*few, strict=True):
        assert int(sample.flatten()[0]) // 4 % 3 == int(label)
    drawn = [rows(found.few(1, seed))[0].flatten().tolist() for seed in (3, 3, 0, 1, 2, 4, 5)]
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn))) > 1


def test_a_data_set_is_not_read_for_drawing(folder: Path) -> None:
    found = read_pictures(str(folder), grey=True)
    (folder / "zebra" / "2.png").write_bytes(b"broken")
    drawn = [rows(found.few(1, seed))[1].tolist() for seed in range(2) if not _broken(found, seed)]
    assert all(sorted(labels) == [0, 1] for labels in drawn)
    with pytest.raises(errors.DataError, match=r"2\.png is no picture"):
        rows(found.batches())


def _broken(found: Pictures, seed: int) -> bool:
    try:
        found.few(1, seed)
    except errors.DataError:
        return True
    return False


def test_shuffled_is_seeded() -> None:
    found = read_pictures("nets:pair")
    orders = [[rows(data)[1].tolist() for _ in range(2)] for data in (found.shuffled(2, 5), found.shuffled(2, 5))]
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]


def test_unlabelled_batches_have_no_classes() -> None:
    found = read_pictures("nets:unlabelled")
    with pytest.raises(errors.InputError, match="without y"):
        found.few(2, 0)
    assert found.example.shape == (1, 1, 2, 2)


def test_what_can_not_be_read(tmp_path: Path, folder: Path) -> None:
    np.savez(tmp_path / "no_y.npz", x=np.zeros((3, 4)))
    np.savez(tmp_path / "other.npz", x=np.zeros((3, 4)), y=np.zeros(2, int))
    np.savez(tmp_path / "floats.npz", x=np.zeros((3, 4)), y=np.zeros(3))
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}]), y=np.zeros(2, int))
    np.savez(tmp_path / "words.npz", x=np.zeros((2, 4)), y=np.array(["a", "b"]))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(b"")
    (tmp_path / "gap" / "empty").mkdir(parents=True)
    (tmp_path / "table.csv").write_text("1,2")
    for spec, words in (
        (tmp_path / "no_y.npz", "arrays x and y"),
        (tmp_path / "other.npz", "x and y do not fit"),
        (tmp_path / "floats.npz", "whole numbers"),
        (tmp_path / "objects.npz", "without Python objects"),
        (tmp_path / "words.npz", "not of numbers"),
        (tmp_path / "cut.npz", "can not be read"),
        (tmp_path / "none.npz", "is not there"),
        (tmp_path / "flat", "no class folders"),
        (tmp_path / "gap", "holds no picture"),
        (tmp_path / "table.csv", "is no npz file"),
        (tmp_path / "nowhere", "is not there"),
        ("nets:once", "can be read once only"),
        ("nets:missing", "nets:missing"),
    ):
        with pytest.raises(errors.LRPError) as caught:
            read_pictures(str(spec), option="--test-data")
        assert words in str(caught.value)
    with pytest.raises(errors.InputError, match="--mean"):
        rows(read_pictures(str(folder), mean="0.1,0.2").batches())
    with pytest.raises(errors.InputError, match="--std"):
        read_pictures(str(folder), std="0")
    with pytest.raises(errors.InputError, match="prepare the samples in the function"):
        read_pictures("nets:loader", size="8")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "ant" / "9.png")
    with pytest.raises(errors.DataError, match="--size 224"):
        rows(read_pictures(str(folder)).batches())


def test_data_sets_with_targets() -> None:
    x, y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    data = TensorDataset(x, y)
    found = Pictures(data, None)
    batch, labels = rows(found.batches(4))
    torch.testing.assert_close(batch, x)
    assert labels.tolist() == y.tolist()


# ---------------------------------------------------------------------- numbers


def test_numbers() -> None:
    assert parse_shape("3,224,224") == (3, 224, 224)
    assert parse_shape("7") == (7,)
    assert parse_size("32") == (32, 32)
    assert parse_values("0.485,0.456,0.406", "--mean").tolist() == pytest.approx([0.485, 0.456, 0.406])
    for text in ("", "3,-1,4", "3,x", "a"):
        with pytest.raises(errors.InputError, match="--input-shape"):
            parse_shape(text)
    for text in ("0", "1x2x3", "1.5", ""):
        with pytest.raises(errors.InputError, match="--size"):
            parse_size(text)
    for text in ("", "a", "1,,2", "nan"):
        with pytest.raises(errors.InputError, match="--mean"):
            parse_values(text, "--mean")


def test_a_builder_may_be_a_class() -> None:
    assert isinstance(builder("torch.nn:ReLU")(), nn.ReLU)
