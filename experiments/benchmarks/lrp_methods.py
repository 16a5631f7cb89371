"""The methods under the clock: plain gradients, lrp in all its composites, and peers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lrp
from experiments.benchmarks import lrp_peers
from experiments.benchmarks.lrp_peers import HIGH, LOW, Refused
from experiments.benchmarks.measuring import Job
from experiments.models import torchvision_models

PLAIN, FULL = "plain gradient", "full backward"
LEDGER = ("epsilon_plus",)
WEIGHTS = ("epsilon", "epsilon_plus", "epsilon_gamma_box")
COMPILED = WEIGHTS


@dataclass(frozen=True)
class Case:
    """One network on one batch."""

    net: str
    pixels: int
    batch: int
    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = False
    classes: int = 1000

    def __str__(self) -> str:
        tail = "" if self.device == "cpu" and self.dtype == "float32" else f" {self.dtype}"
        return f"{self.net} {self.pixels} b{self.batch}{tail}"

    def model(self) -> nn.Module:
        """The network with random weights, frozen, in evaluation mode."""
        torch.manual_seed(0)
        model: nn.Module = getattr(torchvision_models(), self.net)(num_classes=self.classes)
        model = model.eval().requires_grad_(False).to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def input(self) -> Tensor:
        """Noise inside the box of the composites that need one."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, 3, self.pixels, self.pixels, generator=generator).clamp_(LOW, HIGH)
        x = x.to(self.device)
        return x.to(memory_format=torch.channels_last) if self.channels_last else x

    def target(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(class of every sample, the same one-hot)."""
        target = torch.arange(self.batch, device=x.device) % self.classes
        return target, torch.nn.functional.one_hot(target, self.classes).to(x.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast for any type but float32."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.split(":")[0], getattr(torch, self.dtype))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Method:
    """Something that takes time.

    Attributes
    ----------
    library : str
        "torch", "lrp", "zennit" or "captum".
    composite : str
        The name under which libraries are compared.
    variant : str
        "", "ledger", "weights" or "compiled".
    over : str
        The method whose time divides this one's.
    """

    library: str
    composite: str
    variant: str = ""
    over: str = PLAIN

    @property
    def name(self) -> str:
        if self.library == "torch":
            return self.composite
        return " ".join(part for part in (self.library, self.composite, self.variant) if part)


def composites() -> dict[str, Callable[[], lrp.Composite]]:
    """Every function of ``lrp.composites`` that makes a composite; boxes get their bounds."""
    out: dict[str, Callable[[], lrp.Composite]] = {}
    for name in lrp.composites.__all__:
        make = getattr(lrp.composites, name)
        if not inspect.isfunction(make) or "Composite" not in str(inspect.signature(make).return_annotation):
            continue
        parameters = inspect.signature(make).parameters
        bounds = {k: v for k, v in (("low", LOW), ("high", HIGH)) if k in parameters}
        open_ended = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if all(p.name in bounds for p in open_ended):
            out[name] = lambda make=make, bounds=bounds: make(**bounds)
    return out


def methods(chosen: list[str], peers: list[str], compiled: bool = False) -> list[Method]:
    """What is measured for these composites, the divisors first."""
    out = [Method("torch", PLAIN), Method("torch", FULL)]
    out += [Method("lrp", name) for name in chosen]
    out += [Method("lrp", name, "ledger") for name in LEDGER if name in chosen]
    out += [Method("lrp", name, "weights", over=FULL) for name in WEIGHTS if name in chosen]
    out += [Method("lrp", name, "compiled") for name in COMPILED if name in chosen and compiled]
    for peer in peers:
        out += [Method(peer, name) for name in chosen if name in lrp_peers.NAMES[peer]]
    return out


def _gradient(model: nn.Module, x: Tensor, seed: Tensor, *, weights: bool) -> Job:
    """Forward and backward to the input; with ``weights`` to every parameter as well."""
    leaf = x.detach().clone().requires_grad_()
    if weights:
        model = copy.deepcopy(model).requires_grad_(True)
    wanted = [leaf, *model.parameters()] if weights else [leaf]

    def job() -> Any:
        out = model(leaf)
        return torch.autograd.grad(out, wanted, seed.to(out.dtype))

    return job


def _ours(method: Method, model: nn.Module, x: Tensor, target: Tensor) -> Job:
    composite = composites()[method.composite]()
    options: dict[str, Any] = {}
    if method.variant == "compiled":
        if "compile" not in inspect.signature(lrp.prepare).parameters:
            raise Refused("lrp.prepare has no compile= in this version")
        options["compile"] = True
    plan = lrp.prepare(model, x, composite, **options)  # held, so that no cache limit meets the round robin
    wrt = ("input", "weights") if method.variant == "weights" else ("input",)

    def job() -> Any:
        return plan.attribute(x, target, wrt=wrt, ledger=method.variant == "ledger")

    return job


def build(method: Method, case: Case, model: nn.Module, x: Tensor) -> Job:
    """A warm job: what can be prepared beforehand is, as the library's users can.

    Raises
    ------
    Refused
        If the library does not support the network, with its own words.
    """
    target, seed = case.target(x)
    try:
        with case.autocast():
            if method.library == "torch":
                inner = _gradient(model, x, seed, weights=method.composite == FULL)
            elif method.library == "lrp":
                inner = _ours(method, model, x, target)
            else:
                inner = lrp_peers.BUILD[method.library](method.composite, model, x, seed, target)
    except lrp.errors.LRPError as error:
        raise Refused(str(error)) from error

    def job() -> Any:
        with case.autocast():
            return inner()

    return job


def first_call(method: Method, case: Case, model: nn.Module, x: Tensor) -> Job:
    """The cold job: planning, derived weights and the first result, on a model never seen before."""
    fresh = copy.deepcopy(model)
    return lambda: build(method, case, fresh, x)()


def budget(method: Method, net: str) -> float | None:
    """The largest time ratio the design allows; None where it states none."""
    if method.library != "lrp" or method.variant in ("ledger", "compiled"):
        return None
    name, vgg = method.composite, net.startswith("vgg")
    one_version = name.startswith(("epsilon_plus", "epsilon_gamma", "excitation", "best_practice"))
    if method.variant == "weights":
        return 1.25 if name == "epsilon" else 1.6 if one_version and vgg else None
    if name == "epsilon":
        return 1.15
    if name.startswith("epsilon_alpha"):
        return 2.3
    return (1.6 if vgg else 1.9) if one_version else None


MEMORY_BUDGET = 1.4
