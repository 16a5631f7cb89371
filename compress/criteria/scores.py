"""Scores of channels, what makes them, and how criteria are named."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compress.criteria._names import ENTRIES, near, options_of
from lrp._files import read_tensors, write_tensors
from lrp._settings import as_double
from lrp.composites import Composite
from lrp.errors import FileFormatError, InputError, NonFiniteError
from lrp.rules import Rule

if TYPE_CHECKING:
    from compress.groups import Structure

__all__ = ["Criterion", "Scores", "criterion_of"]

KIND = "compress.Scores"
LEVELS = ("layer", "group")


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per channel, higher = more important.

    Attributes
    ----------
    values : dict of str to Tensor (C,)
        Layer (group, if that is the level) to scores, float64 on the CPU.
    unscored : dict of str to str
        Layers that could not be scored, and why. They are not unimportant.
    name : str
        Of the criterion.
    settings : dict
        Of the criterion; JSON-able.
    samples : int
        Samples the scores are means over; 0 without data.
    level : str
        "layer", or "group" where the criterion scores coupled channels at once.

    Raises
    ------
    NonFiniteError
        Naming the layer, if a score is NaN or infinite.
    InputError
        If scores are no vector, or a layer is both scored and not.

    Examples
    --------
    >>> import torch
    >>> print(Scores({"conv": torch.tensor([0.5, 2.0])}, {"gate": "a gate"}, "mine", {}, 10))
    mine, 10 samples
    layer  channels  lowest  median  highest
    conv          2     0.5    1.25        2
    gate: no score (a gate)
    """

    values: dict[str, Tensor]
    unscored: dict[str, str] = field(default_factory=dict)
    name: str = "given"
    settings: dict[str, Any] = field(default_factory=dict)
    samples: int = 0
    level: str = "layer"

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise InputError(
                "the scores are of an unknown level", expected="'layer' or 'group'", got=repr(self.level), fix="choose"
            )
        values = {}
        for name, given in self.values.items():
            t = torch.as_tensor(given).detach()
            if t.dim() != 1 or t.is_complex():
                raise InputError(
                    f"the scores of '{name}' are no vector ({self.name})",
                    expected="one real number per output channel, (C,)",
                    got=f"shape {tuple(t.shape)}, {t.dtype}",
                    fix="reduce them over samples, positions and the weights of each filter",
                )
            if name in self.unscored:
                raise InputError(
                    f"'{name}' has scores and a reason for having none ({self.name})",
                    expected="a layer in values or in unscored",
                    got="it in both",
                    fix="leave one out",
                )
            if not bool(t.isfinite().all()):
                wrong = (~t.isfinite()).nonzero().flatten().tolist()
                raise NonFiniteError(
                    f"the scores of '{name}' are not finite ({self.name})",
                    expected="finite numbers",
                    got=f"NaN or infinity in {len(wrong)} of {t.numel()} channels, first {wrong[0]}",
                    fix="look at the samples, and at the network's outputs on them",
                )
            values[name] = as_double(t).cpu()
        object.__setattr__(self, "values", values)

    def check(self, widths: Mapping[str, int]) -> Scores:
        """Itself, if every layer has as many scores as channels.

        Parameters
        ----------
        widths : dict of str to int
            Channels by layer (or group), for those that are known.

        Raises
        ------
        InputError
            Naming the layer.

        Examples
        --------
        >>> import torch
        >>> Scores({"conv": torch.ones(2)}).check({"conv": 2})
        Scores(given: 2 channels in 1 layers)
        """
        for name, t in self.values.items():
            if t.shape[0] != widths.get(name, t.shape[0]):
                raise InputError(
                    f"the scores of '{name}' do not fit its channels ({self.name})",
                    expected=f"{widths[name]} numbers, one per output channel",
                    got=f"{t.shape[0]}",
                    fix="score the network as it is now",
                )
        return self

    def __str__(self) -> str:
        head = (self.level, "channels", "lowest", "median", "highest")
        rows: list[tuple[str, ...]] = [head]
        for name, t in self.values.items():
            parts = t.quantile(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() if len(t) else []
            rows.append((name, str(len(t)), *(f"{v:.4g}" for v in parts)))
        widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(len(head))]
        lines = [f"{self.name}, {self.samples} samples" if self.samples else self.name]
        for first, *others in rows:
            cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=False))]
            lines.append("  ".join(cells))
        return "\n".join([*lines, *(f"{name}: no score ({why})" for name, why in self.unscored.items())])

    def __repr__(self) -> str:
        channels = sum(len(t) for t in self.values.values())
        left = f", {len(self.unscored)} not scored" if self.unscored else ""
        return f"Scores({self.name}: {channels} channels in {len(self.values)} {self.level}s{left})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        Raises
        ------
        DataError
            If the folder is missing.

        Examples
        --------
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Scores({"conv": torch.ones(2)}).save(f"{folder}/scores.safetensors")
        ...     Scores.load(f"{folder}/scores.safetensors")
        Scores(given: 2 channels in 1 layers)
        """
        meta = {key: getattr(self, key) for key in ("unscored", "name", "settings", "samples", "level")}
        write_tensors(path, KIND, self.values, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileFormatError
            Damaged, of another kind or version.
        FileNotFoundError
        """
        tensors, meta = read_tensors(path, KIND)
        try:
            return cls(tensors, **meta)
        except (TypeError, ValueError) as error:
            raise FileFormatError(
                f"{path} does not hold scores",
                expected="a file written by this version",
                got=f"{type(error).__name__}: {error}",
                fix="take another copy, or score again",
            ) from error


@runtime_checkable
class Criterion(Protocol):
    """What scores a network; any object with these four attributes that can be called so.

    Attributes
    ----------
    name : str
    settings : dict
        JSON-able.
    needs_data, needs_labels : bool
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def needs_data(self) -> bool: ...

    @property
    def needs_labels(self) -> bool: ...

    def __call__(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        *,
        device: torch.device | str | None = None,
        progress: bool = True,
        structure: Structure | None = None,
        example_inputs: Any = None,
    ) -> Scores:
        """Scores of the layers.

        Parameters
        ----------
        model : nn.Module
            Left as it is; scored in evaluation mode.
        data : iterable of batches
            ``(x, y)`` or ``x``, a DataLoader or a list; None where it is not
            needed.
        layers : sequence of str
            Names of convolutions and linear layers.
        device : torch.device or str, optional
            Where to compute; the model's if None.
        progress : bool
            A bar on stderr, on a terminal only.
        structure, example_inputs : optional
            Groups of the network and what it is called with, for criteria that
            score groups or look at what follows a layer.
        """
        ...


def criterion_of(spec: Any) -> Criterion:
    """The criterion that is meant.

    Parameters
    ----------
    spec : str, Criterion, callable, lrp.Composite or rule
        A name with options after colons, e.g. "lrp", "lrp:zplus:signed",
        "weight:l2", "taylor:published", "random:3"; see
        :data:`compress.criteria.CRITERIA`. A callable ``f(model, data)``
        returns {layer: scores (C,)}.

    Raises
    ------
    InputError
        For an unknown name or option; close matches are listed.
    MissingDependencyError
        For a criterion of a package that is not installed.

    Examples
    --------
    >>> criterion_of("lrp:zplus:signed").settings["aggregate"]
    'signed'
    >>> criterion_of(lambda model, data: {}).name
    '<lambda>'
    """
    if isinstance(spec, str):
        return _made(spec, *options_of(spec))
    if isinstance(spec, (Composite, Rule)):
        from compress.criteria.relevance import lrp

        return lrp(spec)
    if isinstance(spec, Criterion) and callable(spec) and not isinstance(spec, type):
        return spec
    where = f"{getattr(spec, '__module__', '')}:{getattr(spec, '__name__', '')}"
    uncalled = isinstance(spec, type) or where.removeprefix("compress.criteria.") in {e.where for e in ENTRIES.values()}
    if callable(spec) and not uncalled and not isinstance(spec, nn.Module):
        from compress.criteria._given import Given

        return Given(spec)
    raise InputError(
        "this is no criterion",
        expected="a name such as 'lrp' or 'weight:l2', a criterion, or a callable f(model, data)",
        got=repr(spec),
        fix="call it, so that it becomes a criterion" if uncalled else "compress.criteria.CRITERIA lists the names",
    )


def _made(spec: str, name: str, options: dict[str, Any]) -> Criterion:
    where, _, function = ENTRIES[name].where.partition(":")
    make = getattr(importlib.import_module(f"compress.criteria.{where}"), function)
    parameters = inspect.signature(make).parameters
    named = [k for k, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    surplus = [] if len(named) < len(parameters) else [k for k in options if k not in named]
    missing = [k for k in named if parameters[k].default is inspect.Parameter.empty and k not in options]
    if surplus or missing:
        raise InputError(
            f"criterion '{name}' can not be made as '{spec}'",
            expected=f"{name}:{missing[0].upper()}" if missing else f"options among {named}" if named else "no options",
            got=f"no {missing[0]}" if missing else f"{surplus[0]}=",
            fix=f"see CRITERIA['{name}']" if missing else near(surplus[0], named, "leave it out"),
        )
    made: Criterion = make(**options)
    return made
