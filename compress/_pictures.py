"""Pictures with their classes, from where the user of the command line says."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from compress._data import batches_of, check_reiterable
from compress._reference import pool_of
from compress.storage import callable_of
from lrp.errors import DataError, InputError

__all__ = ["Pictures", "parse_shape", "parse_size", "parse_values", "read_pictures"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class _Files(Dataset[tuple[Tensor, int]]):
    """Pictures of a folder, decoded one by one as they are asked for."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], form: _Form) -> None:
        self.paths, self.labels, self.form = list(paths), list(labels), form
        self.targets = self.labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, UnidentifiedImageError

        path = self.paths[index]
        try:
            with Image.open(path) as picture:
                pixels = picture.convert("L" if self.form.grey else "RGB")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{path} is no picture that can be read",
                expected="png, jpeg, webp, ...",
                got=f"{type(error).__name__}: {error}",
                fix="replace or remove it",
            ) from error
        x = self.form.of_picture(pixels)
        first = self.form.first
        if first is not None and x.shape != first:
            raise DataError(
                "the pictures are of different sizes",
                expected=f"{tuple(first)} as {self.paths[0].name}",
                got=f"{tuple(x.shape)} in {path}",
                fix="say --size 224, or whatever the network takes",
            )
        return x, self.labels[index]


class _Arrays(Dataset[tuple[Tensor, int]]):
    """Samples that are in memory already, prepared as they are asked for."""

    def __init__(self, x: Tensor, y: Tensor, form: _Form) -> None:
        self.x, self.y, self.form = x, y, form
        self.targets = y.tolist()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.form.of_array(self.x[index]), int(self.y[index])


@dataclass
class _Form:
    """How a picture becomes what the network takes: scaled to 0..1, resized, standardised."""

    size: tuple[int, int] | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    grey: bool = False
    first: torch.Size | None = None

    def of_picture(self, picture: Any) -> Tensor:
        from PIL import Image

        if self.size is not None:
            high, wide = self.size
            scale = max(high / picture.height, wide / picture.width)
            # the shorter side fits, the middle stays
            enlarged = max(wide, round(picture.width * scale)), max(high, round(picture.height * scale))
            picture = picture.resize(enlarged, Image.Resampling.BILINEAR)
            left, top = (enlarged[0] - wide) // 2, (enlarged[1] - high) // 2
            picture = picture.crop((left, top, left + wide, top + high))
        pixels = np.array(picture, np.float32) / 255
        return self._standard(torch.from_numpy(pixels[None] if self.grey else pixels.transpose(2, 0, 1).copy()))

    def of_array(self, x: Tensor) -> Tensor:
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if self.size is not None and x.dim() == 3 and tuple(x.shape[1:]) != self.size:
            x = nn.functional.interpolate(x[None], self.size, mode="bilinear", antialias=True)[0]
        return self._standard(x)

    def _standard(self, x: Tensor) -> Tensor:
        if self.mean is not None:
            x = x - self._fit(self.mean, x, "--mean")
        if self.std is not None:
            x = x / self._fit(self.std, x, "--std")
        return x

    @staticmethod
    def _fit(values: Tensor, x: Tensor, option: str) -> Tensor:
        if len(values) not in (1, x.shape[0]):
            raise InputError(
                f"{option} does not fit the pictures",
                expected=f"1 or {x.shape[0]} numbers, one per channel",
                got=f"{len(values)}",
                fix=f"for example {option} 0.5",
            )
        return values.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))


@dataclass(frozen=True)
class Pictures:
    """Samples with their classes.

    Attributes
    ----------
    source : Dataset or iterable of batches
    labels : Tensor (N,) or None
        Known without reading the pictures; None for batches.
    classes : tuple of str
        Names, by label; empty where there are none.
    origin : str
        As the user named it.
    """

    source: Any
    labels: Tensor | None
    classes: tuple[str, ...] = ()
    origin: str = ""

    def batches(self, size: int = 64) -> Iterable[Any]:
        """All samples in their order."""
        return DataLoader(self.source, size) if isinstance(self.source, Dataset) else check_reiterable(self.source)

    def shuffled(self, size: int, seed: int) -> Iterable[Any]:
        """For training: in a new seeded order in every pass. Batches that came as such keep their members."""
        if not isinstance(self.source, Dataset):
            return self.batches()
        return DataLoader(self.source, size, shuffle=True, generator=torch.Generator().manual_seed(seed))

    @property
    def example(self) -> Tensor | tuple[Any, ...]:
        """The first sample, as a batch of one."""
        inputs = next(batches_of(self.batches(1))).inputs
        first = tuple(t[:1] if isinstance(t, Tensor) else t for t in inputs)
        return first[0] if len(first) == 1 else first

    def few(self, per_class: int, seed: int, size: int = 64) -> list[Any]:
        """As many samples of every class, drawn at random, as batches; classes with fewer give all they have."""
        pool = pool_of(self.source)
        if pool.labels is None:
            raise InputError(
                "samples of every class can not be drawn without labels",
                expected="samples (x, y)",
                got=f"{self.origin} without y",
                fix="--samples-per-class 0 takes all samples",
            )
        return pool.batches(pool.draw(per_class, (seed, 0, 0), True), size)


def read_pictures(
    spec: str,
    *,
    size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    grey: bool = False,
    option: str = "--data",
) -> Pictures:
    """Samples and classes from where the user says.

    Parameters
    ----------
    spec : str
        A folder with one folder of pictures per class, in the order of their
        names; an npz file with ``x`` (N, C, H, W), (N, H, W, C), (N, H, W) or
        (N, D) and ``y`` (N,); or ``MODULE:CALLABLE``, which returns a Dataset,
        a pair of tensors (x, y), or an iterable of batches.
    size : str, optional
        "224" or "224x320": pictures are resized so that the shorter side fits,
        and cropped to the middle; arrays are resized.
    mean, std : str, optional
        Numbers separated by commas, one or one per channel, of pixels in 0..1.
    grey : bool
        Read pictures with one channel.
    option : str
        For messages.

    Raises
    ------
    DataError, InputError
    """
    form = _Form(
        None if size is None else parse_size(size),
        None if mean is None else parse_values(mean, "--mean"),
        None if std is None else parse_values(std, "--std"),
        grey,
    )
    if form.std is not None and bool((form.std <= 0).any()):
        raise InputError("--std is no deviation", expected="numbers > 0", got=str(std), fix="check their order")
    path = Path(spec)
    if path.is_dir():
        return _read_folder(path, form, option)
    if path.suffix.lower() == ".npz":
        return _read_npz(path, form, option)
    if ":" in spec and not path.exists():
        return _read_object(spec, form, option)
    raise DataError(
        f"{option} names no samples",
        expected="a folder of class folders, an npz file with x and y, or MODULE:CALLABLE",
        got=f"{spec}, which is {'no npz file' if path.exists() else 'not there'}",
        fix="check the path",
    )


def _read_folder(path: Path, form: _Form, option: str) -> Pictures:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    paths, labels = [], []
    for label, folder in enumerate(folders):
        own = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        if not own:
            raise DataError(
                f"{option}: the class folder {folder} holds no picture",
                expected=f"files ending in {', '.join(PICTURES)}",
                got="none",
                fix="remove the folder: the place of a folder among the others is its class",
            )
        inner = sorted({p.relative_to(folder).parts[0] for p in own})
        if len(inner) > 1 and all((folder / name).is_dir() for name in inner):
            raise DataError(
                f"{option}: {folder} holds folders of pictures, and is no class",
                expected=f"one folder of pictures per class in {path}",
                got=f"folders in it: {', '.join(inner[:3])}{', ...' if len(inner) > 3 else ''}",
                fix=f"name {folder} itself, if its folders are the classes",
            )
        paths += own
        labels += [label] * len(own)
    if not paths:
        raise DataError(
            f"{option}: there are no class folders in {path}",
            expected="one folder of pictures per class",
            got=f"{sum(1 for _ in path.iterdir())} entries, none of them a folder",
            fix="name the folder above them",
        )
    data = _Files(paths, labels, form)
    form.first = data[0][0].shape
    return Pictures(data, torch.tensor(labels), tuple(f.name for f in folders), str(path))


def _read_npz(path: Path, form: _Form, option: str) -> Pictures:
    if not path.is_file():
        raise DataError(f"{option}: {path} is not there", expected="an npz file", got="nothing", fix="check the path")
    try:
        # numpy leaves a broken archive open, if it opened it itself
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if "x" not in file or "y" not in file:
                raise DataError(
                    f"{option}: {path} holds no samples",
                    expected="the arrays x and y",
                    got=", ".join(file.files) or "nothing",
                    fix="np.savez(path, x=pictures, y=labels)",
                )
            x, y = file["x"], file["y"]
            names = tuple(map(str, file["classes"].tolist())) if "classes" in file else ()
    except DataError:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{option}: {path} can not be read",
            expected="an npz file that np.savez wrote, without Python objects",
            got=f"{type(error).__name__}: {error}",
            fix="take another copy",
        ) from error
    return _of_arrays(_tensor(x, option), _tensor(y, option), form, names, str(path), option)


def _tensor(array: np.ndarray[Any, Any], option: str) -> Tensor:
    if array.dtype == np.float64:
        array = array.astype(np.float32)  # what networks are trained in
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except TypeError as error:
        raise DataError(
            f"{option}: an array is not of numbers", expected="floats or integers", got=str(array.dtype),
            fix="number the classes from 0",
        ) from error  # fmt: skip


def _of_arrays(x: Tensor, y: Tensor, form: _Form, names: tuple[str, ...], origin: str, option: str) -> Pictures:
    if y.dim() != 1 or y.is_floating_point() or len(x) != len(y) or not len(x) or x.dim() < 2:
        raise DataError(
            f"{option}: x and y do not fit",
            expected="x with samples first, and y (N,) with whole numbers",
            got=f"x {tuple(x.shape)}, y {y.dtype} {tuple(y.shape)}",
            fix="give every sample one class",
        )
    if x.dim() == 3:
        x = x[:, None]
    elif x.dim() == 4 and x.shape[1] not in (1, 3, 4) and x.shape[3] in (1, 3, 4):
        x = x.permute(0, 3, 1, 2)
    y = y.to(torch.int64)
    return Pictures(_Arrays(x, y, form), y, names, origin)


def _read_object(spec: str, form: _Form, option: str) -> Pictures:
    found = callable_of(spec)()
    prepared = form.size is not None or form.mean is not None or form.std is not None or form.grey
    if prepared and not _is_pair(found):
        raise InputError(
            "--size, --mean, --std and --grey are for folders and npz files",
            expected=f"none of them with {option} MODULE:CALLABLE",
            got=spec,
            fix="prepare the samples in the function",
        )
    if _is_pair(found):
        return _of_arrays(found[0], found[1], form, (), spec, option)
    names = getattr(found, "classes", None)
    if isinstance(found, Dataset):
        targets = getattr(found, "targets", None)
        labels = None if targets is None else torch.as_tensor(targets, dtype=torch.int64)
        return Pictures(found, labels, tuple(map(str, names or ())), spec)
    return Pictures(check_reiterable(found, option), None, (), spec)


def _is_pair(found: Any) -> bool:
    return isinstance(found, tuple) and len(found) == 2 and all(isinstance(t, Tensor) for t in found)


# ---------------------------------------------------------------------- numbers


def parse_values(text: str, option: str) -> Tensor:
    """Numbers separated by commas.

    Examples
    --------
    >>> parse_values("0.5,0.25", "--mean")
    tensor([0.5000, 0.2500])
    """
    try:
        values = torch.tensor([float(part) for part in text.split(",")])
    except ValueError:
        values = torch.tensor([float("nan")])
    if not bool(torch.isfinite(values).all()):
        raise InputError(
            f"{option} holds no numbers",
            expected="one number, or one per channel, separated by commas",
            got=text,
            fix=f"for example {option} 0.485,0.456,0.406",
        )
    return values


def parse_size(text: str) -> tuple[int, int]:
    """Height and width.

    Examples
    --------
    >>> parse_size("224"), parse_size("32x48")
    ((224, 224), (32, 48))
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise InputError("--size is no size", expected="PIXELS or HEIGHTxWIDTH", got=text, fix="for example --size 224")
    return int(parts[0]), int(parts[-1])


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape of one sample, without the batch.

    Examples
    --------
    >>> parse_shape("3,224,224"), parse_shape("3x32x32")
    ((3, 224, 224), (3, 32, 32))
    """
    parts = text.lower().replace("x", ",").split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise InputError(
            "--input-shape is no shape",
            expected="the numbers of one sample, separated by commas, without the batch",
            got=text,
            fix="for example --input-shape 3,224,224",
        )
    return tuple(int(p) for p in parts)
