"""What the command line reads: a network by name, its weights, and pictures with their classes."""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from compress._data import batches_of, check_reiterable, labels_of
from compress.storage import callable_of, load
from lrp.errors import DataError, FileFormatError, InputError, MismatchError

__all__ = [
    "Pictures",
    "builder",
    "few_per_class",
    "parse_shape",
    "parse_values",
    "read_model",
    "read_pictures",
]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPED = ("state_dict", "model_state_dict", "model", "net")


# ---------------------------------------------------------------------- networks


def builder(spec: str) -> Callable[[], nn.Module]:
    """The function that ``--model`` names; it makes the network anew at each call.

    Raises
    ------
    InputError
        If it names no such function; at the call, if it returns no module.
    """
    found = callable_of(spec)
    wrong = {
        "expected": "a function or class that needs no argument and returns an nn.Module",
        "fix": "write a small function that builds your network, and name it",
    }
    if isinstance(found, nn.Module):
        raise InputError(f"--model {spec} is a network already", got=type(found).__name__, **wrong)
    needed = [p.name for p in _parameters(found) if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD,
              p.POSITIONAL_ONLY, p.KEYWORD_ONLY)]  # fmt: skip
    if needed:
        raise InputError(f"--model {spec} needs arguments", got=f"it asks for {', '.join(needed)}", **wrong)

    def build() -> nn.Module:
        model = found()
        if not isinstance(model, nn.Module):
            raise InputError(f"--model {spec} returned no network", got=type(model).__name__, **wrong)
        return model.eval()

    return build


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled functions tell nothing
        return []


def read_model(spec: str, weights: Path | None, device: str | None = None) -> nn.Module:
    """The network that ``--model`` and ``--weights`` describe, in evaluation mode.

    Weights are a state in a safetensors file, or in what ``torch.save`` wrote,
    which is read with ``weights_only=True``: no code in it is run. A state that
    lies one level down ("state_dict", "model") or that DataParallel has
    prefixed is found. Files that :func:`compress.save` wrote are read by their
    own kind, pruned ones with their plan.

    Raises
    ------
    InputError, DataError, FileFormatError, MismatchError
    """
    build = builder(spec)
    if weights is None:
        return _placed(build(), device)
    if not weights.is_file():
        raise DataError(
            "the weights are missing",
            expected="a safetensors file, or a .pth or .pt file",
            got=f"nothing at {weights}",
            fix="check --weights",
        )
    if weights.suffix.lower() in _PICKLED:
        state = _read_pickled(weights)
    else:
        own = _read_own(weights, build)
        if own is not None:
            return _placed(own, device)
        state = _read_safe(weights)
    model = build()
    _load(model, state, weights)
    return _placed(model, device)


def _placed(model: nn.Module, device: str | None) -> nn.Module:
    if device is None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            "--device is none that torch can use here",
            expected="cpu, cuda, cuda:1, mps, ...",
            got=f"{device}: {str(error).splitlines()[0]}",
            fix="leave it out to work on the CPU",
        ) from error


def _read_own(path: Path, build: Callable[[], nn.Module]) -> nn.Module | None:
    """The network in a file that compress.save wrote; None if it is of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not header.get("format", "").startswith("compress."):
        return None
    return load(path, build).eval()


def _read_safe(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FileFormatError:
    return FileFormatError(
        f"{path} can not be read",
        expected="a safetensors file; files of torch.save end in .pth or .pt",
        got=f"{type(error).__name__}: {error}",
        fix="take another copy, or rename it after what wrote it",
    )


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileFormatError(
            f"{path} can not be read without running code that it holds",
            expected="a state_dict: names and tensors only",
            got=first,
            fix="if you trust it, load it yourself and save model.state_dict() with safetensors.torch.save_file",
        ) from error
    for key in _WRAPPED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        got = f"{type(found).__name__} of {', '.join(map(str, list(found)[:4]))}" if isinstance(found, Mapping) else ""
        raise FileFormatError(
            f"{path} holds no state of a network",
            expected="names and tensors, at the top or under 'state_dict' or 'model'",
            got=got or type(found).__name__,
            fix="save model.state_dict()",
        )
    return dict(found)


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    known = model.state_dict()
    if state and all(name.startswith("module.") for name in state) and not all(n.startswith("module.") for n in known):
        state = {name.removeprefix("module."): t for name, t in state.items()}
    missing = [n for n in known if n not in state and not n.endswith("num_batches_tracked")]
    surplus = [n for n in state if n not in known]
    other = [n for n in known if n in state and state[n].shape != known[n].shape]
    if missing or surplus or other:
        got = f"missing {missing[:3]}, surplus {surplus[:3]}" if missing or surplus else ""
        if other:
            shapes = f"'{other[0]}' of shape {tuple(state[other[0]].shape)}, not {tuple(known[other[0]].shape)}"
            got = f"{got}; {shapes}" if got else shapes
        raise MismatchError(
            f"the weights in {path.name} do not fit the network",
            expected=f"{len(known)} tensors of its names and shapes",
            got=got,
            fix="name the network they were trained in with --model",
        )
    model.load_state_dict(state, strict=False)


# ---------------------------------------------------------------------- pictures


class _Files(Dataset[tuple[Tensor, int]]):
    """Pictures of a folder, decoded one by one as they are asked for."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], form: _Form) -> None:
        self.paths, self.labels, self.form = list(paths), list(labels), form

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, UnidentifiedImageError

        path = self.paths[index]
        try:
            with Image.open(path) as picture:
                x = self.form.of_picture(picture)
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise DataError(
                f"{path} is no picture that can be read",
                expected="png, jpeg, webp, ...",
                got=f"{type(error).__name__}: {error}",
                fix="replace or remove it",
            ) from error
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

        picture = picture.convert("L" if self.grey else "RGB")
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

    def few(self, per_class: int, seed: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
        """See :func:`few_per_class`."""
        if isinstance(self.source, Dataset) and self.labels is not None:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.labels), generator=generator)
            chosen: dict[int, list[int]] = {}
            for i in order.tolist():
                own = chosen.setdefault(int(self.labels[i]), [])
                if len(own) < per_class:
                    own.append(i)
            rows = sorted(i for own in chosen.values() for i in own)
            return [(x, y) for x, y in DataLoader(Subset(self.source, rows), size)]
        return few_per_class(self.batches(), per_class, seed, size)


def few_per_class(data: Any, per_class: int, seed: int = 0, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """The same number of samples of every class, drawn at random: batches that fit into memory.

    Parameters
    ----------
    data : iterable of batches (x, y)
        Read once; only what is drawn is held (reservoir sampling).
    per_class : int
    seed : int
    size : int
        Samples per batch.

    Returns
    -------
    list of (Tensor, Tensor)
        By class. Classes with fewer samples give all they have.

    Raises
    ------
    InputError
        If the samples have no labels.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.arange(8.0).reshape(8, 1), torch.tensor([0, 1] * 4)
    >>> [batch[1].tolist() for batch in few_per_class([(x, y)], 2)]
    [[0, 0, 1, 1]]
    """
    generator = torch.Generator().manual_seed(seed)
    held: dict[int, list[Tensor]] = {}
    seen: dict[int, int] = {}
    for batch in batches_of(data):
        y = labels_of(batch, "drawing samples of every class")
        for x, label in zip(batch.inputs[0], y.tolist(), strict=True):
            own, count = held.setdefault(label, []), seen.get(label, 0)
            seen[label] = count + 1
            if count < per_class:
                own.append(x)
                continue
            place = int(torch.randint(count + 1, (1,), generator=generator))
            if place < per_class:
                own[place] = x
    x = torch.stack([t for label in sorted(held) for t in held[label]])
    labels = torch.tensor([label for label in sorted(held) for _ in held[label]])
    return [(x[k : k + size], labels[k : k + size]) for k in range(0, len(x), size)]


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
        with np.load(path, allow_pickle=False) as file:
            if "x" not in file or "y" not in file:
                raise DataError(
                    f"{option}: {path} holds no samples",
                    expected="the arrays x and y",
                    got=", ".join(file.files) or "nothing",
                    fix="np.savez(path, x=pictures, y=labels)",
                )
            x, y = file["x"], file["y"]
            names = tuple(map(str, file["classes"].tolist())) if "classes" in file else ()
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
