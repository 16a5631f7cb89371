"""A network and its weights, from where the user of the command line says."""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.storage import callable_of, load
from lrp.errors import DataError, FileFormatError, InputError, MismatchError

__all__ = ["builder", "read_model"]

_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPED = ("state_dict", "model_state_dict", "model", "net")


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
