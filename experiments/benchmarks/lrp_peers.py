"""zennit and captum under the clock, each used as its documentation shows."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.measuring import Job
from experiments.models import torchvision_models

LOW, HIGH = -3.0, 3.0


class Refused(Exception):  # noqa: N818  # an outcome that is reported, not an error of the benchmark
    """The library does not support this; the message says why."""


_ZENNIT = {
    "epsilon": None,  # zennit has no such composite: built from its rules
    "epsilon_plus": "EpsilonPlus",
    "epsilon_plus_flat": "EpsilonPlusFlat",
    "epsilon_gamma_box": "EpsilonGammaBox",
    "epsilon_alpha2_beta1": "EpsilonAlpha2Beta1",
    "epsilon_alpha2_beta1_flat": "EpsilonAlpha2Beta1Flat",
    "excitation_backprop": "ExcitationBackprop",
    "guided_backprop": "GuidedBackprop",
    "deconvnet": "DeconvNet",
}
_CAPTUM = ("epsilon", "epsilon_plus", "epsilon_gamma_box")
NAMES: dict[str, tuple[str, ...]] = {"zennit": tuple(_ZENNIT), "captum": _CAPTUM}


def installed() -> list[str]:
    """The peers that can be measured here."""
    return [name for name in NAMES if importlib.util.find_spec(name) is not None]


def _zennit_composite(name: str, x: Tensor, canonizers: list[Any]) -> Any:
    from zennit import composites, rules, types

    if name == "epsilon":
        layers = [
            *composites.layer_map_base(),
            (types.Convolution, rules.Epsilon()),
            (nn.Linear, rules.Epsilon()),
        ]
        return composites.LayerMapComposite(layer_map=layers, canonizers=canonizers)
    options: dict[str, Any] = {"canonizers": canonizers}
    if name == "epsilon_gamma_box":
        options |= {"low": torch.full_like(x, LOW), "high": torch.full_like(x, HIGH)}
    return getattr(composites, str(_ZENNIT[name]))(**options)


def _zennit(name: str, model: nn.Module, x: Tensor, seed: Tensor, target: Tensor) -> Job:
    """Registers hooks, folds batch norm and undoes both inside every call, as its users do."""
    torchvision_models()
    import zennit.attribution
    import zennit.torchvision

    kind = type(model).__name__
    canonizer = {"VGG": zennit.torchvision.VGGCanonizer, "ResNet": zennit.torchvision.ResNetCanonizer}.get(kind)
    if canonizer is None:
        raise Refused(f"zennit has no canonizer for {kind}")
    model = copy.deepcopy(model)
    composite = _zennit_composite(name, x, [canonizer()])

    def job() -> Any:
        leaf = x.detach().clone()
        with zennit.attribution.Gradient(model=model, composite=composite) as attributor, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attributor(leaf, lambda out: seed.to(out.dtype))

    return job


def _captum(name: str, model: nn.Module, x: Tensor, seed: Tensor, target: Tensor) -> Job:
    """One epsilon, alpha1-beta0 or gamma rule for convolutions (it has no box), epsilon for dense layers."""
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule

    model = copy.deepcopy(model)
    rules: dict[str, Any] = {
        "epsilon": EpsilonRule,
        "epsilon_plus": Alpha1_Beta0_Rule,
        "epsilon_gamma_box": GammaRule,
    }
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # captum's hooks fail on in-place layers
    layers = [(m, rules[name]) for m in model.modules() if isinstance(m, nn.Conv2d)]
    layers += [(m, EpsilonRule) for m in model.modules() if isinstance(m, nn.Linear)]

    def job() -> Any:
        for module, rule in layers:  # captum deletes the rules after every call
            module.rule = rule()  # type: ignore[assignment]  # how captum takes them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return LRP(model).attribute(x.detach().clone().requires_grad_(), target=target)
            except (RuntimeError, TypeError, AssertionError) as error:
                raise Refused(f"captum raises {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error

    return job


def check(peer: str, model: nn.Module, x: Tensor, seed: Tensor, target: Tensor) -> None:
    """Compare the peer's epsilon map with gradient x input, which it has to equal up to epsilon on a ReLU network.

    The time of a wrong map says nothing.

    Raises
    ------
    Refused
        If they differ by more than a tenth.
    """
    leaf = x.detach().clone().requires_grad_()
    out = model(leaf)
    expected = leaf.detach() * torch.autograd.grad(out, leaf, seed.to(out.dtype))[0]
    result = BUILD[peer]("epsilon", model, x, seed, target)()
    if peer == "zennit":  # it starts from relevance 1, not from the logit
        result = result[1] * (out.detach() * seed).sum(1).reshape(-1, *(1,) * (x.ndim - 1))
    error = float((result.detach() - expected).abs().sum() / expected.abs().sum())
    if not error <= 0.1:
        raise Refused(
            f"its epsilon map is not gradient x input (relative difference {error:.0e}), so its times mean nothing"
        )


BUILD: dict[str, Callable[[str, nn.Module, Tensor, Tensor, Tensor], Job]] = {"zennit": _zennit, "captum": _captum}
