"""Composites by depth: groups of layers, rules by name, and the composite of a choice."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import lrp
from compress._modes import evaluating
from compress._strategies import BASELINES
from compress.groups import as_inputs
from lrp import rules as lrp_rules
from lrp.errors import InputError

__all__ = ["RULES", "composite_of", "depth_groups", "layer_groups", "rules_of"]

#: Name to the rule of convolutions and the rule of linear layers.
RULES: dict[str, tuple[lrp_rules.Rule, lrp_rules.Rule]] = {
    "epsilon": (lrp_rules.Epsilon(1e-6), lrp_rules.Epsilon(1e-6)),
    "zplus": (lrp_rules.ZPlus(), lrp_rules.ZPlus()),
    "gamma": (lrp_rules.Gamma(0.25), lrp_rules.Gamma(0.05)),
    "alpha2beta1": (lrp_rules.AlphaBeta(2, 1), lrp_rules.AlphaBeta(2, 1)),
}


def depth_groups(model: nn.Module, example_inputs: Any) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Layers by depth, as Hatefi et al. group them; and which of them are linear.

    The first and the last quarter of the convolutions in execution order,
    rounded up, those between, and the linear layers; empty groups are left out.

    Returns
    -------
    groups : dict of str to tuple of str
    linear : tuple of str

    Examples
    --------
    >>> import torch
    >>> from compress.search import depth_groups
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    >>> depth_groups(net, torch.randn(1, 1, 4, 4))
    ({'first': ('0',), 'linear': ('3',)}, ('3',))
    """
    layers = _linear_layers(model, example_inputs)
    convolutions = [name for name, dense in layers.items() if not dense]
    dense = tuple(name for name, dense in layers.items() if dense)
    quarter = math.ceil(len(convolutions) / 4)
    last = max(quarter, len(convolutions) - quarter)
    parts = {
        "first": tuple(convolutions[:quarter]),
        "middle": tuple(convolutions[quarter:last]),
        "last": tuple(convolutions[last:]),
        "linear": dense,
    }
    return {name: found for name, found in parts.items() if found}, dense


def composite_of(
    choice: Mapping[str, str],
    groups: Mapping[str, Sequence[str]],
    linear: Sequence[str],
    rules: Mapping[str, tuple[lrp_rules.Rule, lrp_rules.Rule]] = RULES,
) -> lrp.Composite:
    """A composite that gives every layer the rule of its group; epsilon where a layer is in none.

    Parameters
    ----------
    choice : dict of str to str
        Group to the name of its rule.
    groups : dict of str to sequence of str
        Group to its layers.
    linear : sequence of str
        Layers that take the second rule of a pair.
    rules : dict of str to (Rule, Rule)

    Examples
    --------
    >>> from compress.search import composite_of
    >>> composite_of({"linear": "gamma"}, {"linear": ["fc"]}, ["fc"]).rules[0]
    ('fc', Gamma(gamma=0.05, epsilon=1e-06, ignore_bias=False))
    """
    dense = set(linear)
    entries: list[tuple[Any, lrp_rules.Rule]] = []
    for group, layers in groups.items():
        entries += [(name, rules[choice[group]][name in dense]) for name in layers]
    name = ", ".join(f"{group}: {rule}" for group, rule in choice.items())
    return lrp.Composite([*entries, ("*", lrp_rules.Epsilon(1e-6))], name=name)


def rules_of(given: Sequence[str] | Mapping[str, Any] | None) -> dict[str, tuple[lrp_rules.Rule, lrp_rules.Rule]]:
    """Rules by name, in pairs; the baselines first."""
    if given is None:
        return dict(RULES)
    found: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    if not isinstance(given, Mapping):
        for name in (given,) if isinstance(given, str) else given:
            found[name] = RULES.get(name)
    pairs = {}
    for name, rule in found.items():
        pair = (rule, rule) if isinstance(rule, lrp_rules.Rule) else rule
        right = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(r, lrp_rules.Rule) for r in pair)
        if not isinstance(name, str) or not right:
            raise InputError(
                f"'{name}' is no rule to search among",
                expected=f"names among {sorted(RULES)}, or a dict from names to a rule or a pair of rules",
                got=repr(rule),
                fix="for example rules={'gamma1': lrp.rules.Gamma(1.0)}",
            )
        pairs[name] = pair
    return {**{name: RULES[name] for name in BASELINES}, **pairs}


def _linear_layers(model: nn.Module, example_inputs: Any) -> dict[str, bool]:
    """Layers that need a rule, in execution order, and whether they are linear."""
    inputs = as_inputs(example_inputs)
    with evaluating(model):
        plan = lrp.prepare(model, inputs if len(inputs) > 1 else inputs[0], "epsilon")
    out: dict[str, bool] = {}
    modules = dict(model.named_modules())
    for call in plan.layers:
        name = call.split("@")[0]
        module = modules.get(name)
        if isinstance(module, nn.Linear):
            out[name] = True
        elif isinstance(module, nn.modules.conv._ConvNd):
            out[name] = False
    return out


def layer_groups(
    model: nn.Module, example_inputs: Any, given: Mapping[str, Sequence[str] | str] | None
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    parts, dense = depth_groups(model, example_inputs)
    if given is None:
        if not parts:
            raise InputError(
                "the network has no convolution and no linear layer by name",
                expected="layers that take a rule",
                got="none",
                fix="print(lrp.prepare(model, example_inputs)) shows what relevance passes",
            )
        if len(parts) > 1 and len(parts.get("first", ())) == 1:
            del parts["first"]
        return parts, dense
    layers = _linear_layers(model, example_inputs)
    left = list(layers)
    out: dict[str, tuple[str, ...]] = {}
    for name, patterns in given.items():
        some = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        for pattern in some:
            if not fnmatch.filter(layers, pattern):
                raise InputError(
                    f"groups: '{pattern}' fits no layer",
                    expected=f"names such as {', '.join(list(layers)[:5])}",
                    got=pattern,
                    fix="compress.search.depth_groups(model, example_inputs) lists them",
                )
        mine = [layer for layer in left if any(fnmatch.fnmatchcase(layer, p) for p in some)]
        if not mine:
            raise InputError(
                f"groups: no layer is left for '{name}'",
                expected="patterns that do not fit the same layers",
                got=repr(patterns),
                fix="put the narrower group first",
            )
        out[str(name)] = tuple(mine)
        left = [layer for layer in left if layer not in mine]
    if not out:
        raise InputError("groups is empty", expected="at least one group", got="{}", fix="leave it out")
    return out, dense
