"""What criteria are called: names with options after colons. Imports no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lrp.errors import InputError

__all__ = ["AGGREGATES", "CRITERIA", "ENTRIES", "RULES", "Entry", "near", "options_of"]

#: as in lrp.collect
AGGREGATES = ("signed", "abs_element", "abs_per_sample", "abs_total")
READ_AT = ("conv", "output", "activated")
STARTS = ("logit", "one_hot", "probability", "margin")
COMPOSITES = (
    "epsilon",
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "best_practice",
    "excitation_backprop",
    "gradient",
    "gradient_x_input",
    "guided_backprop",
    "deconvnet",
)
#: one rule for every linear layer
RULES = {"zplus": "ZPlus", "gamma": "Gamma", "alpha_beta": "AlphaBeta"}

Words = Mapping[str, tuple[str, Any]]


def _choices(keyword: str, *values: str) -> dict[str, tuple[str, Any]]:
    return {value: (keyword, value) for value in values}


_AGGREGATE = {
    **_choices("aggregate", *AGGREGATES),
    "published": ("aggregate", "abs_total"),
    "per_sample": ("aggregate", "abs_per_sample"),
}
_READ_AT = _choices("read_at", *READ_AT)


@dataclass(frozen=True)
class Entry:
    """A criterion that has a name.

    Attributes
    ----------
    where : str
        "module:function" in this package; the function makes the criterion.
    about : str
        One line.
    words : dict
        Option word to (keyword, value).
    free : str
        The keyword that any other word is the value of.
    """

    where: str
    about: str
    words: Words = field(default_factory=dict)
    free: str = ""


ENTRIES = {
    "lrp": Entry(
        "relevance:lrp",
        "relevance at the layer's output; lrp:RULE or lrp:COMPOSITE, e.g. lrp:zplus, lrp:epsilon_plus:signed",
        {
            **_AGGREGATE,
            **_choices("start", *STARTS),
            "predicted": ("target", "predicted"),
            "ignore_bias": ("ignore_bias", True),
            **_choices("composite", *COMPOSITES, *RULES),
        },
        "composite",
    ),
    "weight": Entry(
        "weights:weight",
        "norm of the filter; weight:l1, weight:l2, weight:bn with the batch norm folded in; needs no data",
        {**_choices("norm", "l1", "l2"), "bn": ("fold", "bn")},
    ),
    "gradient": Entry(
        "gradients:gradient",
        "gradient of the loss at the layer's output; gradient:published takes the magnitude after the sum over samples",
        {**_AGGREGATE, **_READ_AT},
    ),
    "taylor": Entry(
        "gradients:taylor",
        "activation x gradient of the loss; taylor:published; taylor:weight for weight x gradient, taylor:cvpr2019",
        {
            **_AGGREGATE,
            **_READ_AT,
            "weight": ("on", "weight"),
            "activation": ("on", "activation"),
            "cvpr2019": ("aggregate", "cvpr2019"),
        },
    ),
    "logit_x_activation": Entry(
        "gradients:logit_x_activation",
        "activation x gradient of the true class's output; on a ReLU network epsilon-LRP is the same",
        {**_AGGREGATE, **_READ_AT},
    ),
    "activation": Entry(
        "activations:activation",
        "mean magnitude of what leaves the layer, after its batch norm and activation; needs no labels",
        {**_AGGREGATE, **_READ_AT},
    ),
    "batchnorm_scale": Entry(
        "weights:batchnorm_scale", "magnitude of the scale of the batch norm that follows; needs no data"
    ),
    "fpgm": Entry("weights:fpgm", "distance to the other filters of the layer; needs no data"),
    "hessian": Entry("curvature:hessian", "optimal brain damage with the empirical Fisher; one pass per sample"),
    "ablation": Entry(
        "ablations:ablation",
        "drop of the true class's output without the filter: ground truth, one pass per filter; ablation:loss",
        {**_choices("measure", "logit", "loss"), **_READ_AT},
    ),
    "random": Entry("chance:random", "a random order, as baseline; random:SEED; needs no data", {}, "seed"),
    "captum": Entry(
        "external:captum",
        "a layer attributor of captum by its name, e.g. captum:LayerConductance; captum must be installed",
        _AGGREGATE,
        "attributor",
    ),
    "tp": Entry(
        "external:torch_pruning",
        "an importance of torch-pruning by its name, e.g. tp:GroupMagnitudeImportance, tp:LAMPImportance",
        {},
        "importance",
    ),
    "tp-taylor": Entry(
        "external:tp_taylor", "torch-pruning's GroupTaylorImportance, which leaves batch norms out of account"
    ),
}

#: name to one line
CRITERIA = {name: entry.about for name, entry in ENTRIES.items()}


def near(word: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about a misspelt word."""
    close = difflib.get_close_matches(word, list(known), 3, 0.5)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else otherwise


def options_of(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and keywords of a text such as "lrp:zplus:signed" or "captum:LayerConductance:n_steps=20".

    Raises
    ------
    InputError
        For an unknown name or word; close matches are listed.

    Examples
    --------
    >>> options_of("lrp:zplus:signed:start=margin")
    ('lrp', {'composite': 'zplus', 'aggregate': 'signed', 'start': 'margin'})
    """
    name, *words = spec.split(":")
    entry = ENTRIES.get(name)
    if entry is None:
        known = [*ENTRIES, *(f"{other}:{word}" for other, e in ENTRIES.items() for word in e.words)]
        parts = [k for k in known if k.partition(":")[2] == spec]
        fix = f"did you mean {' or '.join(map(repr, parts))}?" if parts else near(spec, known, "choose one of these")
        raise InputError(f"there is no criterion '{spec}'", expected=", ".join(ENTRIES), got=repr(spec), fix=fix)
    options: dict[str, Any] = {}
    for word in words:
        if "=" in word:
            keyword, _, text = word.partition("=")
            value = _value(text)
        elif word in entry.words:
            keyword, value = entry.words[word]
        elif entry.free and entry.free not in options:
            keyword, value = entry.free, _value(word)
        else:
            raise InputError(
                f"criterion '{name}' has no option '{word}'",
                expected=", ".join(entry.words) or (f"{name}:{entry.free.upper()}" if entry.free else "no options"),
                got=repr(spec),
                fix=near(word, entry.words, "leave it out"),
            )
        if keyword in options:
            raise InputError(
                f"criterion '{spec}' says {keyword} twice",
                expected=f"one {keyword}",
                got=f"{options[keyword]!r} and {value!r}",
                fix="leave one out",
            )
        options[keyword] = value
    return name, options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
