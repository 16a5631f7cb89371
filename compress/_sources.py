"""What the user of the command line names: networks, samples, functions; and whose fault an error is."""

from __future__ import annotations

import inspect
import json
import os
import re
import sysconfig
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import lrp
from compress._data import device_of, outputs_of
from compress._modes import evaluating
from compress._pictures import Pictures, read_pictures
from compress.criteria import Criterion
from compress.criteria._names import ENTRIES, near
from compress.criteria.scores import criterion_of
from compress.evaluation import logits_of
from compress.groups import as_inputs
from compress.storage import callable_of, load
from lrp.errors import DataError, FileFormatError, InputError, LRPError, MismatchError, TargetError

if TYPE_CHECKING:
    from compress._options import Network, Samples

__all__ = [
    "builder",
    "explaining",
    "opened",
    "read_classes",
    "read_criterion",
    "read_meter",
    "read_model",
    "read_samples",
    "uses_labels",
]

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPED = ("state_dict", "model_state_dict", "model", "net")
_PLACES = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_NOT_THE_USERS = tuple(
    os.path.join(place, "") for place in (*_PLACES, os.path.dirname(__file__), os.path.dirname(lrp.__file__))
)

# ---------------------------------------------------------------------- whose fault it is

_THEIRS: set[str] = set()  # packages that options have named


@contextmanager
def explaining(what: str = "") -> Iterator[None]:
    """Errors of the user's code as InputErrors that keep their cause; our own pass.

    With ``what``, all that is raised is taken for an error of that function.
    """
    try:
        yield
    except LRPError:
        raise
    except (Exception, SystemExit) as error:
        found = _raised(what, error) if what else _blamed(error)
        if found is None:
            raise
        raise found from error


def _blamed(error: BaseException) -> InputError | None:
    """Whose code it came from, by the first of the user's functions on the way there; None if it is our fault."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if _is_users(frame):
            return _raised(f"{frame.f_globals.get('__name__')}:{frame.f_code.co_qualname}", error)
    return _raised("the data's own code", error) if "DataLoader worker" in str(error) else None


def _is_users(frame: FrameType) -> bool:
    file, package = frame.f_code.co_filename, str(frame.f_globals.get("__name__")).partition(".")[0]
    return package in _THEIRS or not file.startswith(("<", *_NOT_THE_USERS))


def _raised(what: str, error: BaseException) -> InputError:
    places = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    at = f" ({Path(places[-1][0].f_code.co_filename).name}, line {places[-1][1]})" if places else ""
    fix = "call it in Python, where the whole traceback is shown"
    if "operator torchvision::" in str(error):
        fix = f"this torchvision was built for another torch than {torch.__version__}: install both from one index, "
        fix += "as in pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
    return InputError(
        f"{what} raised an error",
        expected="code of yours that runs through",
        got="; ".join([_said(error) + at, *getattr(error, "__notes__", ())]),
        fix=fix,
    )


def _said(error: BaseException) -> str:
    lines = [text.strip().rstrip(".") for text in str(error).splitlines() if text.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "DataLoader worker" in lines[0] else f"{type(error).__name__}: {lines[0]}"


# ---------------------------------------------------------------------- functions


def named(spec: str, option: str, *arguments: str) -> Callable[..., Any]:
    """The user's function that an option names, which can be called with these arguments.

    Where there are some, a class is made an object first.

    Raises
    ------
    InputError
    """
    with explaining(f"{option} {spec}"):
        found = callable_of(spec)
        if arguments and isinstance(found, type):
            found = callable_of(found())
    _THEIRS.update({spec.partition(":")[0].partition(".")[0]} - {"torch", "compress", "lrp"})
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # compiled functions tell nothing
        return found
    try:
        signature.bind(*arguments)
    except TypeError as error:
        if isinstance(found, Criterion):
            return found
        raise InputError(
            f"{option} {spec} needs {'other ' if arguments else ''}arguments",
            expected=f"a function of ({', '.join(arguments)})" if arguments else "a function that needs no argument",
            got=str(error),
            fix="write a small function around it, and name that",
        ) from error
    return found


def read_criterion(text: str) -> Any:
    """The name of a criterion as it is; a function ``f(model, data) -> {layer: scores}`` for MODULE:CALLABLE.

    Raises
    ------
    InputError
        If it is a function's name, and there is none.

    Examples
    --------
    >>> read_criterion("lrp:zplus")
    'lrp:zplus'
    """
    name = text.partition(":")[0]
    if ":" not in text or name in ENTRIES:
        return text
    try:
        return named(text, "--criterion", "model", "data")
    except InputError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise InputError(
            f"there is no criterion and no function '{text}'",
            expected=f"{', '.join(ENTRIES)}; or MODULE:CALLABLE, f(model, data) -> {{layer: scores}}",
            got=error.got,
            fix=near(name, ENTRIES, error.fix),
        ) from error


def read_meter(spec: str | None) -> Callable[[Path], float] | None:
    """What measures ONNX files, for ``--meter``; None without it."""
    return None if spec is None else named(spec, "--meter", "path")


def read_classes(text: str) -> list[str] | dict[int, str]:
    """Names of classes: a file with one per line, a ``.json`` with a list or {label: name}, or separated by commas.

    Raises
    ------
    InputError

    Examples
    --------
    >>> read_classes("cat, dog")
    ['cat', 'dog']
    """
    is_file = os.path.isfile(text)
    try:
        if is_file and text.lower().endswith(".json"):
            found = json.loads(Path(text).read_text(encoding="utf-8"))
            return {int(k): str(v) for k, v in found.items()} if isinstance(found, dict) else [str(v) for v in found]
        lines = Path(text).read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
        names = [name.strip() for name in lines if name.strip() or not is_file]
    except (ValueError, TypeError, RecursionError) as error:
        got, names = _said(error), []
    else:
        got = "no such file, and no comma" if len(names) == 1 and not is_file else f"{len(names)} names"
    if len(names) < 2 or not all(names):
        raise InputError(
            f"--classes {text} names no classes",
            expected="a file with one name per line, a .json file with a list or {label: name}, or NAME,NAME,...",
            got=got,
            fix="check the path; names are in the order of the network's outputs",
        )
    return names


# ---------------------------------------------------------------------- networks


def builder(spec: str) -> Callable[[], nn.Module]:
    """The function that ``--model`` names; it makes the network anew at each call.

    Raises
    ------
    InputError
        If it names no such function; at the call, if it returns no module.
    """
    found = named(spec, "--model")
    wrong = {
        "expected": "a function or class that needs no argument and returns an nn.Module",
        "fix": "write a small function that builds your network, and name it",
    }
    if isinstance(found, nn.Module):
        raise InputError(f"--model {spec} is a network already", got=type(found).__name__, **wrong)

    def build() -> nn.Module:
        with explaining(f"--model {spec}"):
            model = found()
        if not isinstance(model, nn.Module):
            raise InputError(f"--model {spec} returned no network", got=type(model).__name__, **wrong)
        return model.eval()

    return build


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
    _placed(nn.Linear(1, 1), device)  # a device that is not there is refused before any work
    build = builder(spec)
    if weights is None:
        model = _placed(build(), device)
        warnings.warn(
            f"no --weights: the network is as {spec} builds it, with random values unless it loads some itself",
            UserWarning,
            stacklevel=2,
        )
        return model
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
    cause: Exception | None = None
    try:
        if torch.device(device).type != "meta":
            return model.to(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        cause = error
    raise InputError(
        f"--device {device} is none that torch can use here",
        expected="for example cpu, cuda, cuda:1 or mps",
        got=_said(cause) if cause else "a device that holds no numbers",
        fix="leave it out to work on the CPU",
    ) from cause


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
    except Exception as error:  # whatever unpacking damaged bytes leads to
        held = re.search(r"GLOBAL ([\w.]+)", str(error))
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileFormatError(
            f"{path} can not be read without running code that it holds",
            expected="a state_dict: names and tensors only",
            got=f"a pickled object, {held[1]}" if held else _ANSI.sub("", first),
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


# ---------------------------------------------------------------------- samples


def read_samples(spec: str, option: str, **how: Any) -> Pictures:
    """What :func:`read_pictures` gives; with errors of the user's function, and one message for a broken archive.

    Raises
    ------
    DataError, InputError
    """
    path = Path(spec)
    if ":" in spec and not path.exists():
        named(spec, option)
        with explaining(f"{option} {spec}"):
            return read_pictures(spec, option=option, **how)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return read_pictures(spec, option=option, **how)
    cause: Exception | None = None
    try:
        if zipfile.is_zipfile(path):
            return read_pictures(spec, option=option, **how)
    except LRPError:
        raise
    except Exception as error:  # whatever unpacking damaged bytes leads to
        cause = error
    raise DataError(
        f"{option}: {path} can not be read",
        expected="an npz file that np.savez wrote, without Python objects",
        got=_said(cause) if cause else "no zip archive, or a part of one",
        fix="take another copy",
    ) from cause


def opened(network: Network, samples: Samples, example: bool = True, labelled: bool = False) -> tuple[nn.Module, Any]:
    """The network and an example of its input, once it has run on the first sample of each source.

    ``labelled``: whether the labels of ``--data`` are used, as those of the others are.

    Raises
    ------
    InputError
        Naming the source, before any work.
    OutputError, TargetError
        If there are samples to evaluate on, and the network is no classifier of them.
    """
    names = samples.given_names
    model = network.read()
    given = network.example(samples) if example else None
    if network.input_shape is not None and example:
        _output(model, given, f"--input-shape {network.input_shape}")
    for option, pictures in samples.sources():
        output = _output(model, pictures.example, f"the samples of {option}")
        if option == "--data" and not labelled:
            continue
        width = logits_of(output, 0).shape[1]
        y = pictures.labels
        if y is not None and (int(y.min()) < 0 or int(y.max()) >= width):
            raise TargetError(
                f"a label of {option} is none of the network's classes",
                expected=f"0 to {width - 1}",
                got=f"{int(y.min())} to {int(y.max())}",
                fix="check how the data number their classes",
            )
        if option == "--test-data":
            _check_names(names or pictures.classes, width)
        elif option == "--data":
            _check_classes(pictures, width)
    return model, given


def _output(model: nn.Module, example: Any, on: str) -> Any:
    place = device_of(model)
    inputs = tuple(t.to(place) if isinstance(t, Tensor) else t for t in as_inputs(example))
    try:
        with evaluating(model), torch.no_grad():
            return outputs_of(model, inputs)
    except InputError as error:
        raise InputError(
            f"the network ({type(model).__name__}) does not run on {on}",
            expected=error.expected,
            got=error.got,
            fix="check --size, --grey and --input-shape, or what your function returns",
        ) from error


def uses_labels(criteria: Sequence[Any]) -> bool:
    """Whether one of these criteria looks at the labels of reference samples; of a user's function nothing is known."""
    made = [criterion_of(c) for c in criteria]
    return any(c.needs_labels or (c.needs_data and c.name != "activation") for c in made)


def _check_classes(pictures: Pictures, width: int) -> None:
    """The folders of a set are its classes, numbered in the order of their names: there must be one for each output."""
    found = pictures.classes
    if found and len(found) != width:
        raise TargetError(
            f"the classes of --data {pictures.origin} are not those of the network",
            expected=f"{width} classes, one for each output",
            got=f"{len(found)}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}",
            fix="name the folder that holds all class folders; or choose --criterion activation, which needs no labels",
        )


def _check_names(names: Any, width: int) -> None:
    fits = not names or (all(0 <= k < width for k in names) if isinstance(names, dict) else len(names) == width)
    if not fits:
        raise InputError(
            "the names of the classes do not fit the network",
            expected=f"{width} names, or labels from 0 to {width - 1}",
            got=f"{len(names)} names: {', '.join(map(str, list(names)[:3]))}, ...",
            fix="name all outputs in their order with --classes, or some of them in a .json file with {label: name}",
        )
