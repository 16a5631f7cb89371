"""Forward passes of copies that are looked at: where they are, and what runs in training mode only."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress._data import tensors_of
from compress.groups import is_weighted, kind_of

__all__ = ["Calls", "Heads", "Places", "find_heads", "place", "thin_copy"]


def thin_copy(model: nn.Module) -> nn.Module:
    """In eval mode, with the values of the model's own parameters; all of them require a gradient, frozen or not."""
    own = {
        id(p): nn.Parameter(p.detach().clone() if p.is_inference() else p.detach(), p.is_floating_point())
        for p in model.parameters()
    }
    return copy.deepcopy(model, own).eval()


def place(name: str) -> str:
    """A module in a sentence."""
    return f"'{name}'" if name else "the model's forward"


class Calls:
    """Which modules are at work in a forward pass: a context.

    Attributes
    ----------
    stack : list of str
        Modules whose forward has begun and not ended; after an exception, the last is where it happened.
    called : set of str
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stack: list[str] = []
        self.called: set[str] = set()
        self._handles: list[Any] = []

    def _entering(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self.stack.append(name)
            self.called.add(name)

        return hook

    def _leaving(self, *_: Any) -> None:
        self.stack.pop()

    def __enter__(self) -> Calls:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving))
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()


class Places(TorchFunctionMode):
    """In which module each operation is called: ``of`` maps nodes of autograd's graph to names."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.of: dict[Any, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.grad_fn is not None and self.calls.stack:
            self.of.setdefault(out.grad_fn, self.calls.stack[-1])
        return out


@dataclass(frozen=True)
class Heads:
    """Parts of a network that run in training mode only, such as auxiliary classifiers.

    Attributes
    ----------
    names : tuple of str
        Their outermost modules.
    holders : tuple of str
        Modules that have to be in training mode for them to run.
    failure : str
        Why they do not run on the example inputs; empty if they do.
    """

    names: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    failure: str = ""

    def of(self, layer: str) -> str:
        """The head a layer belongs to; empty if to none."""
        return next((n for n in self.names if layer == n or layer.startswith(f"{n}.")), "")

    def start(self, model: nn.Module) -> nn.Module:
        """Let them run; heads that can't are replaced by what they read, so that its channels are outputs."""
        for name in self.holders:
            model.get_submodule(name).training = True
        if self.failure:
            for name in self.names:
                owner, _, short = name.rpartition(".")
                setattr(model.get_submodule(owner), short, _Given())
        return model


class _Given(nn.Module):
    def forward(self, first: Any, *more: Any, **named: Any) -> Any:
        return first


def find_heads(model: nn.Module, inputs: tuple[Any, ...]) -> Heads:
    """Modules that run when those that hold them are in training mode, and else do not.

    Norms and dropout stay as in eval mode. Cost: a forward pass; more if there
    are layers on which the outputs do not depend.
    """
    twin = thin_copy(model)
    try:
        with torch.enable_grad(), Calls(twin) as eval_mode:
            used = _leaves(tensors_of(twin(*inputs)))
    except Exception:
        return Heads()  # the trace says what is wrong
    idle = {
        name
        for name, module in twin.named_modules()
        if is_weighted(kind_of(module)) and name not in eval_mode.called
        if not any(id(p) in used for p in module.parameters(recurse=False))
    }
    holders = {".".join(name.split(".")[:k]) for name in idle for k in range(name.count(".") + 1)}
    heads = Heads(holders=tuple(sorted(holders)))
    while idle:
        failure = ""
        with torch.no_grad(), Calls(heads.start(twin)) as calls:
            try:
                twin(*inputs)
            except Exception as error:
                failure = f"{type(error).__name__} in {place(calls.stack[-1])}"
        fresh = calls.called - eval_mode.called
        fresh = {n for n in fresh if not any(n.startswith(f"{m}.") for m in fresh) and not heads.of(n)}
        fresh = {n for n in fresh if any(layer == n or layer.startswith(f"{n}.") for layer in idle)}
        heads = replace(heads, names=(*heads.names, *sorted(fresh)), failure=heads.failure or failure)
        if not failure:
            break
        if not fresh:  # it is not the heads that fail
            return Heads()
    return heads if heads.names else Heads()


def _leaves(outputs: Iterable[Tensor]) -> set[int]:
    """Tensors from which the outputs were computed, by their ids."""
    stack: list[Any] = [t.grad_fn for t in outputs]
    seen: set[Any] = set()
    out: set[int] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            out.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    return out
