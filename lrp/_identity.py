"""What a model is beside its weights: whether a plan still fits it, and leaving it as it was."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Held while a model is traced, which swaps its tensors for a moment, and while its tensors are read.
PLANNING = threading.RLock()

_REGISTRIES = frozenset(vars(nn.Module()))


def _content(value: Any, depth: int = 0) -> Any:
    """What identifies a setting: its value where it is plain, else the object."""
    if isinstance(value, (int, float, bool, str, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, (list, tuple)) and depth < 3 and len(value) < 1000:
        return type(value), tuple(_content(v, depth + 1) for v in value)
    if isinstance(value, dict) and depth < 3 and len(value) < 1000:
        return tuple((k, _content(v, depth + 1)) for k, v in value.items() if isinstance(k, (str, int)))
    return id(value)


def signature(model: nn.Module) -> tuple[Any, ...]:
    """What the traced graph depends on beside weights: structure, settings, modes, hooks."""
    out: list[Any] = []
    own_classes: dict[type, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        values = vars(module)
        settings = tuple((k, _content(v)) for k, v in values.items() if k not in _REGISTRIES or k == "training")
        hooks = (tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
        out.append((name, weakref.ref(module), settings, hooks))
        kind = type(module)
        if not kind.__module__.startswith("torch.") and kind not in own_classes:
            own_classes[kind] = tuple((k, _content(v)) for k, v in vars(kind).items() if not k.startswith("__"))
    return (*out, *own_classes.items())


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass does to the attributes of its modules while it is traced."""
    kept = [(m, dict(vars(m))) for m in model.modules()]
    try:
        yield
    finally:
        for module, values in kept:
            now = vars(module)
            if list(now) != list(values) or any(now[k] is not v for k, v in values.items()):
                vars(module).clear()
                vars(module).update(values)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's or DataParallel's wrapper."""
    while True:
        inner: nn.Module | None = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner
