"""The network in what a user hands over: out of its wrappers, with values, and such that it can be copied."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lrp._identity import unwrapped
from lrp.errors import InputError

__all__ = ["check_values", "example_of", "network_of", "normal_mode"]

_REGISTRIES = frozenset(vars(nn.Module()))


def network_of(model: nn.Module, *, values: bool = True) -> nn.Module:
    """The module inside of ``torch.compile``, DataParallel and DistributedDataParallel, if it can be worked with.

    Names of layers are those of the network that the user built, so that plans
    and files fit a fresh one, wrapped or not.

    Parameters
    ----------
    model : nn.Module
    values : bool
        Refuse the meta device too.

    Raises
    ------
    InputError
        If it is no module, a parameter has no shape or no values yet, or it
        holds what can not be copied.

    Notes
    -----
    Cost: a copy of the modules, which shares all parameters and buffers.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "the model is not an nn.Module",
            expected="a torch.nn.Module",
            got=type(model).__name__,
            fix="pass the network itself",
        )
    model = unwrapped(model)
    check_values(model, meta=values)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_leaf}
    try:
        with normal_mode():
            copy.deepcopy(model, shared)
    except Exception as error:
        raise _uncopied(model, error) from error
    return model


@contextlib.contextmanager
def normal_mode() -> Iterator[None]:
    """Out of ``torch.inference_mode``, whose tensors can neither be explained nor trained; also a decorator."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        yield


def example_of(inputs: Any) -> Any:
    """Example inputs that autograd takes: those made in ``torch.inference_mode`` are copied.

    To be called in :func:`normal_mode`.
    """
    if isinstance(inputs, Tensor):
        return inputs.clone() if inputs.is_inference() else inputs
    return type(inputs)(map(example_of, inputs)) if type(inputs) in (tuple, list) else inputs


def check_values(model: nn.Module, *, meta: bool = True) -> None:
    """That all parameters and buffers have shapes and, unless ``meta`` is false, values.

    Raises
    ------
    InputError
    """
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(t):
            raise InputError(
                f"'{name}' has no shape yet",
                expected="a network whose lazy layers know their widths",
                got=f"a {type(t).__name__}",
                fix="call the model once on example_inputs",
            )
        if meta and t.is_meta:
            raise InputError(
                f"'{name}' has no values",
                expected="a network on a CPU or another device with memory",
                got="a tensor on the meta device",
                fix="build it outside of torch.device('meta'), or model.to_empty(device='cpu') and load its weights",
            )


def _uncopied(model: nn.Module, error: Exception) -> InputError:
    """Which attribute it is due to, and what to do about it."""
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    where, fix = "", "find the attribute that it is due to: copy.deepcopy(model) has to work"
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _REGISTRIES}
        key = next((key for key, t in _tensors({**own, **module._buffers}) if not t.is_leaf), "")
        if key:
            where, fix = f" with '{name}.{key}'" if name else f" with '{key}'", f"let forward keep {key}.detach()"
            if hasattr(module, f"{key}_g") or hasattr(module, f"{key}_orig"):
                fix = (
                    "remove the old-style hook that computes it (torch.nn.utils.remove_weight_norm, "
                    "remove_spectral_norm, prune.remove), or use torch.nn.utils.parametrizations"
                )
            break
    return InputError(
        f"{type(model).__name__} can not be copied{where}, and only copies are ever cut",
        expected="a network without results of an earlier pass, locks or open files in its attributes",
        got=f"a tensor with a graph behind it ({type(error).__name__})"
        if where
        else f"{type(error).__name__}: {first}",
        fix=fix,
    )


def _tensors(held: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors among attributes, also in lists, tuples and dicts, with the attribute's name."""
    for key, value in held.items():
        stack, seen = [value], set()
        while stack:
            item = stack.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                yield key, item
            elif isinstance(item, Mapping):
                stack += list(item.values())
            elif isinstance(item, (list, tuple)):
                stack += list(item)
