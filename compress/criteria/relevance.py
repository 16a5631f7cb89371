"""Relevance as a criterion."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lrp as engine
from compress._modes import evaluating
from compress.criteria._base import AGGREGATES, Base, choose
from compress.criteria.scores import Scores
from lrp import composites, rules
from lrp.errors import InputError

__all__ = ["lrp"]

RULES = {"zplus": rules.ZPlus, "gamma": rules.Gamma, "alpha_beta": rules.AlphaBeta, "flat": rules.Flat}


class _Relevance(Base):
    def __init__(
        self, composite: Any, start: Any, aggregate: str, target: Any, resume: str | os.PathLike[str] | None
    ) -> None:
        shown = composite if isinstance(composite, str) else repr(composite)
        super().__init__(
            "lrp",
            {
                "composite": shown,
                "start": start if isinstance(start, str) else type(start).__name__,
                "aggregate": choose("aggregate", aggregate, AGGREGATES),
                "target": target,
                "read_at": "output",
            },
        )
        self._composite, self._start, self._resume = _composite_of(composite), start, resume
        self.needs_labels = target is None

    def scored(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        device: torch.device,
        progress: bool,
        structure: Any,
        example_inputs: Any,
    ) -> Scores:
        with evaluating(model):
            total = engine.collect(
                model,
                data,
                composite=self._composite,
                wrt=("channels",),
                aggregate=self.settings["aggregate"],
                start=self._start,
                target=self.settings["target"],
                device=device,
                progress=progress,
                resume=self._resume,
            )
        sums: dict[str, Tensor] = {}
        for call, r in total.channels.items():
            name = call.split("@")[0]  # a module that is used again appears as name@1
            if name in set(layers):
                sums[name] = sums[name] + r if name in sums else r
        unscored = {name: total.unexplained.get(name, "no relevance reaches it") for name in layers if name not in sums}
        for key, why in total.unexplained.items():
            name = key.split("[")[0].split("@")[0]
            if name in sums and "[" in key:
                del sums[name]  # rows of a packed projection get none: the layer is not comparable as a whole
                unscored[name] = why
        return Scores({n: t / total.count for n, t in sums.items()}, unscored, self.name, self.settings, total.count)


def _composite_of(composite: Any) -> Any:
    if not isinstance(composite, str):
        return composite
    if composite in RULES:
        return RULES[composite]()
    known = [*RULES, *(n for n in composites.__all__ if callable(getattr(composites, n)) and n[0].islower())]
    if composite not in known:
        raise InputError(
            "the composite is not known",
            expected=", ".join(known),
            got=repr(composite),
            fix="choose one, or pass a rule",
        )
    return composite


def lrp(
    composite: Any = "epsilon",
    start: Any = "one_hot",
    aggregate: str = "abs_per_sample",
    target: int | str | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Base:
    """Relevance of each filter, read at its output (Yeom et al. 2021, arXiv 1912.08881).

    A convolution and the batch norm folded into it carry the same relevance.
    Layers that get none by rule (gates, queries and keys) are unscored.

    Parameters
    ----------
    composite : str, rule or Composite
        A name of :mod:`lrp.composites`; "zplus", "gamma", "alpha_beta" for that
        rule in every linear layer; or a rule or Composite of your own.
    start : str, Tensor or Seed
        See :func:`lrp.attribute`.
    aggregate : str
        "abs_per_sample" (Hatefi et al. 2024), "abs_element" (the ResNet code of
        Yeom et al.), "abs_total", "signed" (their VGG code).
    target : None, int or "predicted"
        None: the labels of the batches.
    resume : path, optional
        State of a long pass; see :func:`lrp.collect`.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    >>> data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    >>> compress.criteria.lrp("zplus")(net, data, ["0"]).values["0"].shape
    torch.Size([5])
    """
    return _Relevance(composite, start, aggregate, target, resume)
