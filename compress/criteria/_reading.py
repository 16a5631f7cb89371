"""Where a layer is read: at its own output, behind its batch norm, or behind its activation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress.groups import as_inputs
from lrp.errors import InputError

__all__ = ["Activations", "Taps", "followers"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ELEMENTWISE = {
    getattr(owner, name)
    for owner in (F, torch, Tensor)
    for name in (
        "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "selu",
        "celu", "silu", "hardswish", "gelu", "mish", "sigmoid", "sigmoid_", "hardsigmoid", "tanh", "tanh_", "softplus",
        "clamp", "clamp_", "clamp_min", "clamp_min_",
    )
    if hasattr(owner, name)
}  # fmt: skip


def followers(model: nn.Module, layers: Sequence[str], example_inputs: Any) -> dict[str, str]:
    """Layer to the batch norm that takes its output, and is the only module that does.

    Raises
    ------
    InputError
        Without example inputs.
    """
    if example_inputs is None:
        raise InputError(
            "the batch norm behind a layer is found by a forward pass",
            expected="example_inputs",
            got="None",
            fix="pass example_inputs, or use compress.score",
        )
    twin = copy.deepcopy(model).eval()
    found = _Watcher(twin, layers)
    place = next((p.device for p in twin.parameters()), torch.device("cpu"))
    inputs = tuple(t.to(place) if isinstance(t, Tensor) else t for t in as_inputs(example_inputs))
    with torch.no_grad():
        twin(*inputs)
    return found.result()


class _Watcher:
    """Which modules take the very tensor that a layer returned."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.made: list[tuple[Tensor, str]] = []  # held, so that no address is used again
        self.taken: dict[str, set[str]] = {}
        chosen = set(layers)
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                module.register_forward_pre_hook(self._before(name, isinstance(module, _NORMS)))
            if name in chosen:
                module.register_forward_hook(self._after(name))

    def _before(self, name: str, norm: bool) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            for t in given:
                for made, layer in self.made:
                    if t is made:
                        self.taken.setdefault(layer, set()).add(name if norm else "")

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self.made.append((output, name))

        return hook

    def result(self) -> dict[str, str]:
        return {layer: next(iter(by)) for layer, by in self.taken.items() if len(by) == 1 and "" not in by}


class Taps:
    """Outputs of chosen modules of a copy, as tensors that what follows can not overwrite.

    Parameters
    ----------
    model : nn.Module
        A copy: hooks are added, and stay.
    places : dict of str to str
        Layer to the module where it is read.
    differentiable : bool
        Whether outputs start a graph of their own where nothing before them
        requires a gradient.
    """

    def __init__(self, model: nn.Module, places: dict[str, str], differentiable: bool) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        for layer, place in places.items():
            model.get_submodule(place).register_forward_hook(self._hook(layer, differentiable))

    def clear(self) -> None:
        """Forget the last pass."""
        self.outputs = {}

    def _hook(self, layer: str, differentiable: bool) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            if differentiable and not output.requires_grad:
                output = output.detach().requires_grad_(True)
            self.outputs.setdefault(layer, []).append(output)
            return output.clone()  # an in-place activation must not change what was read

        return hook


class Activations(TorchFunctionMode):
    """Hands on what the elementwise function behind a tapped output returns."""

    def __init__(self, use: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.use = use
        self.waiting: list[tuple[Tensor, str]] = []

    def expect(self, layer: str, output: Tensor) -> None:
        """The next elementwise function of this tensor is the layer's activation."""
        self.waiting.append((output, layer))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        layer = None
        if func in _ELEMENTWISE and args:
            layer = next((name for t, name in self.waiting if t is args[0]), None)
        out = func(*args, **(kwargs or {}))
        if layer is not None and isinstance(out, Tensor):
            self.waiting = [(t, name) for t, name in self.waiting if t is not args[0]]
            self.use(layer, out)
        return out

    def rest(self) -> list[tuple[Tensor, str]]:
        """Outputs that no elementwise function took; forgotten with this call."""
        out, self.waiting = self.waiting, []
        return out
