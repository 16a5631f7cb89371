"""Scores of filters, and what gives them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lrp._files import read_tensors, write_tensors
from lrp.errors import FileFormatError, InputError, NonFiniteError

__all__ = ["Criterion", "Scores", "criterion_of"]

KIND = "compress.Scores"


@dataclass(frozen=True)
class Scores:
    """One number per output channel of each layer; higher = more important.

    Attributes
    ----------
    values : dict of str to Tensor (C,)
        Layer (or group) name to scores, float64 on the CPU.
    unscored : dict of str to str
        Layers that have no score, and why: never counted as least important.
    name : str
    settings : dict
        JSON-able; what the scores depend on beside network and samples.
    samples : int
        How many were looked at.
    level : str
        "layer", or "group" where a criterion scores coupled layers as one.

    Raises
    ------
    NonFiniteError
        If a score is NaN or infinite.
    InputError
        If scores are no vectors.

    Examples
    --------
    >>> import torch
    >>> from compress import Scores
    >>> Scores({"0": torch.tensor([0.5, 2.0])}, name="mine").values["0"].dtype
    torch.float64
    """

    values: Mapping[str, Tensor]
    unscored: Mapping[str, str] = field(default_factory=dict)
    name: str = "given"
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 0
    level: str = "layer"

    def __post_init__(self) -> None:
        clean = {}
        for layer, given in self.values.items():
            t = torch.as_tensor(given).detach().to("cpu", torch.float64)
            if t.dim() != 1:
                raise InputError(
                    f"the scores of '{layer}' are no vector",
                    expected="one number per output channel, shape (C,)",
                    got=f"shape {tuple(t.shape)}",
                    fix="reduce them over space and samples",
                )
            if not bool(t.isfinite().all()):
                raise NonFiniteError(
                    f"{self.name} gives scores of '{layer}' that are not finite",
                    expected="finite numbers",
                    got=f"{int((~t.isfinite()).sum())} of {t.numel()} are NaN or infinite",
                    fix="look for NaN in the samples, the weights and the network's outputs",
                )
            clean[layer] = t.clone()
        if self.level not in ("layer", "group"):
            raise InputError(
                "level is not known", expected="'layer' or 'group'", got=repr(self.level), fix="see Scores"
            )
        object.__setattr__(self, "values", clean)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        meta = {
            "unscored": dict(self.unscored),
            "name": self.name,
            "settings": dict(self.settings),
            "samples": self.samples,
            "level": self.level,
        }
        write_tensors(path, KIND, dict(self.values), meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileFormatError, FileNotFoundError
        """
        tensors, meta = read_tensors(path, KIND)
        try:
            return cls(
                tensors,
                {str(k): str(v) for k, v in meta["unscored"].items()},
                str(meta["name"]),
                dict(meta["settings"]),
                int(meta["samples"]),
                str(meta["level"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{path} does not hold scores",
                expected="a file written by this version",
                got=f"{type(error).__name__}: {error}",
                fix="score again",
            ) from error

    def __repr__(self) -> str:
        total = sum(t.numel() for t in self.values.values())
        return f"Scores({self.name}: {total} channels of {len(self.values)} {self.level}s, {self.samples} samples)"


@runtime_checkable
class Criterion(Protocol):
    """What gives scores: ``name``, JSON-able ``settings``, and a call."""

    name: str
    settings: Mapping[str, Any]
    needs_data: bool
    needs_labels: bool

    def __call__(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        *,
        device: torch.device | str | None = None,
        progress: bool = True,
        structure: Any = None,
        example_inputs: Any = None,
    ) -> Scores: ...


class Given:
    """A user's function ``f(model, data) -> {layer: scores}``, checked.

    Layers it leaves out are unscored; names that are no layers raise.
    """

    needs_data = False
    needs_labels = False

    def __init__(self, function: Callable[[nn.Module, Any], Mapping[str, Any]]) -> None:
        self.function = function
        self.name = str(getattr(function, "__name__", type(function).__name__))
        self.settings: dict[str, Any] = {"function": self.name}

    def __call__(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        *,
        device: torch.device | str | None = None,
        progress: bool = True,
        structure: Any = None,
        example_inputs: Any = None,
    ) -> Scores:
        given = self.function(model, data)
        if not isinstance(given, Mapping):
            raise InputError(
                f"{self.name} returned no scores",
                expected="a dict of layer name to scores (C,)",
                got=type(given).__name__,
                fix="return {'conv1': tensor, ...}",
            )
        modules = dict(model.named_modules())
        for layer, values in given.items():
            if layer not in modules:
                raise InputError(
                    f"{self.name} scores '{layer}', and there is no such layer",
                    expected=f"names such as {list(layers)[:3]}",
                    got=repr(layer),
                    fix="use the names of model.named_modules()",
                )
            width = width_of(modules[layer])
            if width and torch.as_tensor(values).shape != (width,):
                raise InputError(
                    f"{self.name} gives '{layer}' scores of another length",
                    expected=f"{width} numbers, one per output channel",
                    got=f"shape {tuple(torch.as_tensor(values).shape)}",
                    fix="score output channels",
                )
        chosen = {name: torch.as_tensor(given[name]) for name in layers if name in given}
        left = {name: f"{self.name} gives it no score" for name in layers if name not in given}
        return Scores(chosen, left, self.name, self.settings)


def width_of(module: nn.Module) -> int:
    """Output channels of a convolution or linear layer; 0 of anything else."""
    for name in ("out_channels", "out_features"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return 0


def criterion_of(spec: Any) -> Criterion:
    """A criterion by name, as it is, or made of a function.

    Parameters
    ----------
    spec : str, Criterion or callable
        A name of :data:`compress.criteria.CRITERIA`, with options behind
        colons: "lrp", "lrp:zplus", "lrp:epsilon:signed", "weight:l2",
        "taylor:abs_total", "random:3", "captum:LayerConductance".

    Raises
    ------
    InputError
        If the name or an option is not known.

    Examples
    --------
    >>> from compress.criteria import criterion_of
    >>> criterion_of("weight:l2").settings
    {'norm': 'l2', 'fold': 'none'}
    """
    from compress.criteria._names import CRITERIA, make

    if isinstance(spec, str):
        name, *options = spec.split(":")
        if name not in CRITERIA:
            near = difflib.get_close_matches(name, CRITERIA, 3)
            raise InputError(
                "the criterion is not known",
                expected=", ".join(CRITERIA),
                got=repr(spec),
                fix=f"did you mean {' or '.join(near)}?" if near else "choose one of these, or pass a function",
            )
        return make(name, options)
    if isinstance(spec, Criterion):
        return spec
    if callable(spec):
        return Given(spec)
    raise InputError(
        "criterion is none",
        expected="a name, a Criterion, or a function f(model, data) -> {layer: scores}",
        got=type(spec).__name__,
        fix="for example criterion='lrp'",
    )
