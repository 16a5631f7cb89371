"""Which batch norm stands alone behind, or in front of, which linear layer; and the folding.

Found out by running the model: a hook sees which tensor a module reads and
returns, and autograd's graph says who else reads it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Call:
    """What one module call read and returned, as nodes of autograd's graph."""

    read: Any
    returned: Any
    ndim: int


@dataclass
class Execution:
    """One run of a model: the calls of its linear layers and batch norms, in order of execution."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    readers: Counter[Any] = field(default_factory=Counter)

    def once(self, name: str) -> Call | None:
        calls = self.calls.get(name, [])
        return calls[0] if len(calls) == 1 else None


def _readers(root: Any) -> Counter[Any]:
    count: Counter[Any] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            count[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return count


def execution(model: nn.Module, x: Tensor) -> Execution:
    """Runs the model once on x; calls that do not depend on x are left out."""
    run, handles, pending = Execution(), [], {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            pending[name] = args[0].grad_fn if isinstance(args[0], Tensor) else None

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.requires_grad:
                run.calls.setdefault(name, []).append(Call(pending[name], out.grad_fn, out.ndim))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (*CONVS, nn.Linear, _BatchNorm)):
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    with torch.enable_grad():
        out = model(x.detach().clone().requires_grad_())
    for handle in handles:
        handle.remove()
    run.readers = _readers(out.grad_fn)
    return run


class Rest(nn.Module):
    """What is left of a batch norm that was folded away: the children it runs on its result."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, child in norm.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def _modules(model: nn.Module, run: Execution, types: tuple[type, ...]) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, types) and n in run.calls}


def fold_backward(model: nn.Module, run: Execution) -> list[str]:
    """Folds every batch norm that is the only reader of a linear layer into it."""
    layers = _modules(model, run, (*CONVS, nn.Linear))
    makers = {call.returned: n for n in layers if (call := run.once(n)) is not None}
    folded = []
    for name, norm in _modules(model, run, (_BatchNorm,)).items():
        call = run.once(name)
        maker = makers.get(call.read) if call is not None else None
        if maker is None or run.readers[call.read] != 1:
            continue
        layer = layers[maker]
        if isinstance(layer, nn.Linear):
            if run.calls[maker][0].ndim != 2:
                continue
            put(model, maker, fuse_linear_bn_eval(layer, norm))
        else:
            put(model, maker, fuse_conv_bn_eval(layer, norm))
        put(model, name, Rest(norm))
        folded.append(name)
    return folded


def before_layers(model: nn.Module, run: Execution, folded: list[str]) -> dict[str, str]:
    """Linear layer -> the batch norm that stands alone in front of it and is read by nothing else."""
    layers = _modules(model, run, (*CONVS, nn.Linear))
    found = {}
    for name in _modules(model, run, (_BatchNorm,)):
        call = run.once(name)
        if name in folded or call is None or run.readers[call.returned] != 1:
            continue
        if "BatchNorm" not in call.returned.name():
            continue  # the module went on with an activation of its own
        for layer in layers:
            reader = run.once(layer)
            if reader is None or reader.read is not call.returned:
                continue
            if isinstance(layers[layer], nn.Linear) and call.ndim != 2:
                continue  # the channels are not what the layer reads
            found[layer] = name
    return found


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift) of every channel."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias).detach()
