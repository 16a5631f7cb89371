"""Paths: what reads a layer's output, as far as torch's own functions show it.

A batch norm or an elementwise activation belongs to a layer if it alone reads
what the layer gives out. This is seen in one forward pass in which every call
of a torch function on a tensor is watched; autograd functions of the user's own
and scripted modules are not seen.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

__all__ = ["Call", "Norm", "Path", "follow", "is_step", "key", "on_calls"]

Call = tuple[str, int]  # a layer, and the how-manieth time it is called
Key = tuple[int, int]  # a tensor as it is now: in-place changes make another of it

BATCH_NORMS = {F.batch_norm, torch.batch_norm}
_NAMES = (
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu mish hardswish hardsigmoid "
    "hardtanh hardtanh_ sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid log_sigmoid hardshrink softshrink "
    "tanhshrink threshold threshold_ _threshold prelu rrelu rrelu_ clamp clamp_ clamp_min clamp_min_"
)
#: functions of one element each
ACTIVATIONS: set[Any] = {
    getattr(space, name)
    for name in _NAMES.split()
    for space in (F, torch, Tensor, torch._C._nn)
    if hasattr(space, name)
}


@dataclass(frozen=True)
class Norm:
    """The batch norm of a layer; ``module`` is its name where it is a module of its own."""

    weight: Tensor | None
    variance: Tensor | None
    eps: float
    module: str


@dataclass
class Path:
    """What follows one call of a layer: at most "norm", then at most "activation".

    ``changed[k]``: whether what is there after k steps is changed in place later.
    """

    steps: tuple[str, ...] = ()
    norm: Norm | None = None
    changed: tuple[bool, ...] = (True,)


@dataclass
class _Use:
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    made: Key | None


def key(t: Tensor) -> Key:
    return id(t), 0 if t.is_inference() else t._version


def is_step(step: str, function: Any) -> bool:
    return function in (BATCH_NORMS if step == "norm" else ACTIVATIONS)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


class _Watch(TorchFunctionMode):
    """Every tensor of one forward pass, and the functions that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[Key, list[_Use]] = defaultdict(list)
        self.alive: list[Tensor] = []  # a freed tensor's id would come again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [(t, key(t)) for t in _tensors((args, kwargs))]
        out = func(*args, **kwargs)
        results = list(_tensors(out))
        changed = any(key(t) != before for t, before in read)
        if results or changed:
            self.alive += [t for t, _ in read] + results
            made = {key(t) for t in results}
            use = _Use(func, tuple(args), kwargs, out, key(out) if isinstance(out, Tensor) else None)
            for k in {k for _, k in read} - made:  # what hands its input on as it is, is no reader
                self.uses[k].append(use)
        return out


@contextmanager
def on_calls(
    layers: Mapping[str, nn.Module], act: Callable[[Call, nn.Module, tuple[Any, ...], Tensor], Tensor | None]
) -> Iterator[None]:
    """``act(call, layer, args, output)`` after every call of the layers; what it returns takes the output's place."""
    handles = []
    counts: dict[str, int] = defaultdict(int)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any, name: str) -> Tensor | None:
        call = (name, counts[name])
        counts[name] += 1
        return act(call, module, args, output) if isinstance(output, Tensor) else None

    names: dict[nn.Module, str] = {}
    for name, module in layers.items():
        names.setdefault(module, name)  # one module may have several names
    try:
        for module, name in names.items():
            handles.append(module.register_forward_hook(lambda m, a, o, name=name: hook(m, a, o, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Traced:
    outputs: dict[Call, Tensor] = field(default_factory=dict)
    keys: dict[Call, Key] = field(default_factory=dict)
    norms: dict[Key, str] = field(default_factory=dict)


def follow(model: nn.Module, layers: Mapping[str, nn.Module], inputs: tuple[Any, ...]) -> dict[Call, Path]:
    """The path of every call of the layers, from one forward pass without gradients.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    layers : dict of str to nn.Module
    inputs : tuple
        What the model is called with; one sample is enough.
    """
    traced = _Traced()

    def note(call: Call, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        traced.outputs[call], traced.keys[call] = output, key(output)

    def norm_hook(module: nn.Module, args: Any, output: Any, name: str) -> None:
        if isinstance(output, Tensor):
            traced.norms.setdefault(key(output), name)

    watch = _Watch()
    handles = [
        m.register_forward_hook(lambda m, a, o, name=name: norm_hook(m, a, o, name))
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm)
    ]
    try:
        with torch.no_grad(), on_calls(layers, note), watch:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {call: _path(watch, traced, call) for call in traced.outputs}


def _path(watch: _Watch, traced: _Traced, call: Call) -> Path:
    steps: list[str] = []
    norm: Norm | None = None
    tensor, at = traced.outputs[call], traced.keys[call]
    changed = [key(tensor) != at]
    for step in ("norm", "activation"):
        uses = watch.uses.get(at, [])
        made = uses[0].made if len(uses) == 1 else None
        if made is None or not is_step(step, uses[0].function):
            continue
        (use,) = uses
        if not use.args or use.args[0] is not tensor:  # the tensor may be another operand
            continue
        if step == "norm":
            norm = _norm(use, traced)
        steps.append(step)
        tensor, at = use.result, made
        changed.append(key(tensor) != at)
    return Path(tuple(steps), norm, tuple(changed))


def _norm(use: _Use, traced: _Traced) -> Norm:
    signature = _F_BATCH_NORM if use.function is F.batch_norm else _TORCH_BATCH_NORM
    given = signature.bind(*use.args, **use.kwargs)
    given.apply_defaults()
    held = given.arguments
    variance = None if held["training"] else held["running_var"]
    assert use.made is not None
    return Norm(held["weight"], variance, float(held["eps"]), traced.norms.get(use.made, ""))


def _torch_batch_norm(  # the signature of a built-in function that has none
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: Any, momentum: Any, eps: Any,
    cudnn_enabled: Any,
) -> None: ...  # fmt: skip


_F_BATCH_NORM, _TORCH_BATCH_NORM = inspect.signature(F.batch_norm), inspect.signature(_torch_batch_norm)
