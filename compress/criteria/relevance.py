"""Relevance: what of the output is due to a filter, by Layer-wise Relevance Propagation."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress._data import Filled, batches_of, device_of
from compress._modes import evaluating
from compress.criteria._names import AGGREGATES, COMPOSITES, ENTRIES, RULES, near
from compress.criteria._sums import check_choice
from compress.criteria._task import Found, Measure, Task
from compress.criteria.scores import Criterion
from lrp import composites, rules
from lrp._collecting import Plans, summed
from lrp._distributed import place
from lrp._settings import _composite, _start
from lrp.collection import RelevanceSum
from lrp.composites import Composite, resolve
from lrp.errors import InputError
from lrp.plan import prepare
from lrp.rules import Rule
from lrp.seeds import Start

__all__ = ["lrp"]

_ROWS = re.compile(r"(.*)\[(\d+):(\d+)\]")
_AGAIN = re.compile(r"@\d+$")


@dataclass(frozen=True, repr=False)
class _LRP(Measure):
    engine: str | Composite  # a name where it is enough: plans are kept by it
    start: Start
    aggregate: str
    target: int | str | None
    told: dict[str, Any]
    resume: str | os.PathLike[str] | None

    @property
    def name(self) -> str:
        return f"lrp:{self.told['composite']}"

    @property
    def settings(self) -> dict[str, Any]:
        start = _start(self.start, self.target if isinstance(self.start, str) else None)
        return {**self.told, "start": start, "aggregate": self.aggregate, "target": self.target}

    def _score(self, task: Task) -> Found:
        # the user's own where it may be, for which the engine keeps its plan: it is not modified
        held = (*task.model.parameters(), *task.model.buffers())
        own = device_of(task.model) == task.device and not any(t.is_inference() for t in held)
        net = task.model if own else task.twin
        with evaluating(net):
            return self._collect(task, net)

    def _collect(self, task: Task, net: nn.Module) -> Found:
        plan = prepare(net, next(batches_of(task.data, task.device)).x, self.engine)
        layers = _names(net, task)
        calls = {call: layers[name] for call in plan.layers if (name := _AGAIN.sub("", call)) in layers}
        unexplained = dict(plan._core.analysis.unreached)
        values: dict[str, Tensor] = {}
        samples = 0
        if calls:
            total = self._sum(task, net, [glob.escape(call) for call in calls])
            samples = total.count
            unexplained |= total.unexplained
            for call, r in total.channels.items():
                layer = calls[call]
                values[layer] = values[layer] + r if layer in values else r
        whole, parts = _reasons(unexplained, layers)
        values = {name: t / samples for name, t in values.items() if name not in parts}
        if self.aggregate == "abs_total":
            values = {name: t.abs() for name, t in values.items()}
        return Found(values, {**whole, **parts}, samples, otherwise="relevance never meets it as a layer")

    def _sum(self, task: Task, net: nn.Module, layers: list[str]) -> RelevanceSum:
        # whose weights it is of costs a digest of them; only a state on disk and other processes ask
        identified = self.resume is not None or place()[1] > 1

        def empty(plans: Plans) -> RelevanceSum:
            return RelevanceSum(
                aggregate="signed" if self.aggregate == "abs_total" else self.aggregate,  # calls are added first
                composite=plans.composite,
                start=self.start,
                target=self.target,
                layers=layers,
                model=plans.model if identified else None,
            )

        return summed(
            empty,
            net,
            Filled(task.data),
            self.engine,
            self.start,
            device=task.device,
            progress=task.progress,
            resume=self.resume,
            keep=False,
        )


def _names(net: nn.Module, task: Task) -> dict[str, str]:
    """Every name of a layer's module to the name that is asked for."""
    known = {net.get_submodule(name): name for name in reversed(task.layers)}
    return {name: known[m] for name, m in net.named_modules(remove_duplicate=False) if m in known}


def _reasons(unexplained: Mapping[str, str], layers: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Why layers get no relevance by rule: those of which a call gets none, and those of which some channels do."""
    whole: dict[str, str] = {}
    runs: dict[str, list[str]] = {}
    for key, why in unexplained.items():
        rows = _ROWS.fullmatch(key)
        name = layers.get(_AGAIN.sub("", rows[1] if rows else key))
        if name is None:
            continue
        if rows is None:
            whole[name] = f"no relevance by rule: {why}"
        else:
            runs.setdefault(name, []).append(f"{rows[2]} to {int(rows[3]) - 1} ({why})")
    return whole, {name: f"no relevance by rule on its channels {', '.join(found)}" for name, found in runs.items()}


def _resolved(composite: Any, ignore_bias: bool) -> tuple[str | Composite, dict[str, Any]]:
    """The composite, or its name, and what of it is told in the settings."""
    if not isinstance(composite, str):
        found = resolve(composite)
        if ignore_bias:
            raise InputError(
                "ignore_bias has no meaning beside a composite or a rule",
                expected="a name, or a composite that ignores biases",
                got=repr(composite),
                fix="set it in its rules, for example lrp.rules.ZPlus(ignore_bias=True)",
            )
        return found, {"composite": found.name, "rules": _composite(found)}
    options = {"ignore_bias": True} if ignore_bias else {}
    told = {"composite": composite, **options}
    if composite in RULES:
        rule: Rule = getattr(rules, RULES[composite])(**options)
        return Composite([("*", rule)], name=composite), told
    if composite not in COMPOSITES:
        words = ENTRIES["lrp"].words
        raise InputError(
            f"there is no composite '{composite}' that a name is enough for",
            expected=f"one of {', '.join((*RULES, *COMPOSITES))}, a rule of lrp.rules or a lrp.Composite",
            got=repr(composite),
            fix=near(composite, words, "choose one of these"),
        )
    make = getattr(composites, composite)
    if ignore_bias and make().mode != "lrp":
        raise InputError(
            f"'{composite}' has no rules whose bias could be ignored",
            expected="a composite of rules",
            got=composite,
            fix="leave ignore_bias out",
        )
    return make(**options) if options else composite, told


def lrp(
    composite: str | Rule | Composite = "epsilon",
    start: Start = "one_hot",
    aggregate: str = "abs_per_sample",
    target: int | str | None = None,
    *,
    ignore_bias: bool = False,
    resume: str | os.PathLike[str] | None = None,
) -> Criterion:
    r"""Relevance of a layer's output channels (Yeom et al. 2021, "Pruning by explaining", arXiv 1912.08881).

    With :math:`R_{np}` the relevance of a sample at a position of the channel,
    :math:`\frac1N\sum_n|\sum_p R_{np}|`, or another ``aggregate``. Read at the
    layer's output, where a batch norm that is folded into it, and a ReLU, have
    the same relevance. (Gradient methods fold nothing: they are read in front
    of the batch norm.)

    Parameters
    ----------
    composite : str, Rule or Composite
        "zplus", "gamma" or "alpha_beta": that rule in every linear layer; or
        the name of a composite of :mod:`lrp.composites`, or an object.
    start : str, Tensor or lrp.Seed
        As in :func:`lrp.collect`. "one_hot": relevance 1 at the true class, as
        published; "logit": its output; "margin": minus that of the runner-up.
    aggregate : str
        See :mod:`compress.criteria`. "signed" is published for VGG,
        "abs_element" for ResNets (there without layer normalisation),
        "abs_per_sample" by Hatefi et al. 2024 (arXiv 2408.12568).
    target : None, int or "predicted"
        None: the labels, the largest output where batches bring none.
    ignore_bias : bool
        Leave biases out of the denominators, as published for z+.
    resume : path, optional
        See :func:`lrp.collect`: a file for the state of the pass. One network
        only: another one in its place raises MismatchError.

    Returns
    -------
    Criterion

    Notes
    -----
    Cost: one plan (seconds), then one pass per batch; see :mod:`lrp`. Layers
    that get no relevance by rule (gates, queries and keys), or only on some of
    their channels, are not scored. Uses of a module add up. Raises what
    :func:`lrp.prepare` raises for networks that can't be exported.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> data = [(torch.randn(5, 3), torch.randint(2, (5,)))]
    >>> lrp("zplus")(net, data, ["0"])
    Scores(lrp:zplus: 4 channels in 1 layers)
    """
    found, told = _resolved(composite, ignore_bias)
    check_choice("aggregate", aggregate, AGGREGATES)
    _start(start, target)
    return _LRP(found, start, aggregate, target, told, resume)
