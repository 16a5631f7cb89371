"""What was quantized, and how: the codebook of every tensor, and why the others have none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.codebook import Codebook
from compress.rate import entropy_of
from lrp._files import replacing
from lrp.errors import FileFormatError, MismatchError

__all__ = ["QuantizationPlan", "plan_of"]

_KIND = "compress.QuantizationPlan"


@dataclass(frozen=True)
class QuantizationPlan:
    """Codebooks by parameter name.

    A quantized network is an ordinary network whose weights lie on the levels of
    this plan; the whole numbers are read off the weights, exactly.

    Attributes
    ----------
    codebooks : dict of str to Codebook
    left_out : dict of str to str
        Every other floating-point tensor of the state, and why it stays as it is.
    settings : dict
        What the choice depends on: JSON-able.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> small = compress.quantize(net, method="rtn", bits=4).model
    >>> plan = compress.quantization_plan.plan_of(small)
    >>> sorted(plan.codebooks), int(plan.indices(small)["0.weight"].abs().max()) <= 127
    (['0.weight', '2.weight'], True)
    """

    codebooks: Mapping[str, Codebook]
    left_out: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def indices(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole numbers behind the weights, int64.

        Raises
        ------
        MismatchError
            If a tensor is missing, or lies off its codebook.
        """
        state = model.state_dict()
        out = {}
        for name, book in self.codebooks.items():
            found = state.get(name)
            if not isinstance(found, Tensor) or not self._fits(book, found):
                raise MismatchError(
                    "the network is not the one that was quantized",
                    expected=f"a tensor '{name}' of {book.step.dtype}",
                    got="none" if not isinstance(found, Tensor) else f"{found.dtype} {tuple(found.shape)}",
                    fix="pass the network that compress.quantize returned, in its own type",
                )
            out[name] = book.to(found.device).indices(found, f"'{name}'")
        return out

    @staticmethod
    def _fits(book: Codebook, t: Tensor) -> bool:
        if book.axis is not None and (book.axis >= t.dim() or t.shape[book.axis] != len(book.step)):
            return False
        return t.dtype == book.step.dtype

    def apply(self, model: nn.Module) -> None:
        """Let the network carry this plan, so that save and export can read it.

        Raises
        ------
        MismatchError
            If its weights lie off the codebooks.
        """
        self.indices(model)
        object.__setattr__(model, "_quantization_plan", self)

    def statistics(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Per tensor: weights, bits, share of zeros, entropy in bits per weight."""
        out = {}
        for name, k in self.indices(model).items():
            book = self.codebooks[name]
            counts = torch.bincount((k - book.low).reshape(-1), minlength=book.size)
            zeros = float((k == 0).double().mean())
            entropy = entropy_of([counts.tolist()])
            out[name] = {"weights": k.numel(), "bits": book.bits, "zeros": zeros, "entropy": entropy}
        return out

    # -- JSON ---------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        books = {name: book.to_json() for name, book in self.codebooks.items()}
        return {"codebooks": books, "left_out": dict(self.left_out), "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> QuantizationPlan:
        books = {str(name): Codebook.from_json(book) for name, book in stored["codebooks"].items()}
        left_out = {str(name): str(why) for name, why in stored["left_out"].items()}
        return cls(books, left_out, dict(stored["settings"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        text = json.dumps({"kind": _KIND, "version": 1, **self.to_json()}, indent=1)
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantizationPlan:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileFormatError
        """
        try:
            with open(path, encoding="utf-8") as file:
                stored = json.load(file)
            if stored["kind"] != _KIND or stored["version"] != 1:
                raise ValueError(f"{stored['kind']}, version {stored['version']}")
            return cls.from_json(stored)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FileFormatError(
                f"{path} holds no quantization plan",
                expected=f"JSON of the kind {_KIND}, version 1",
                got=f"{type(error).__name__}: {error}",
                fix="name a file that QuantizationPlan.save wrote",
            ) from error

    def __str__(self) -> str:
        width = max((len(name) for name in (*self.codebooks, *self.left_out)), default=0)
        rows = [f"{name.ljust(width)}  {book}" for name, book in self.codebooks.items()]
        rows += [f"{name.ljust(width)}  as it is: {why}" for name, why in self.left_out.items()]
        return "\n".join(rows)


def plan_of(model: nn.Module) -> QuantizationPlan | None:
    """The plan that a quantized network carries; None for others."""
    plan: QuantizationPlan | None = getattr(model, "_quantization_plan", None)
    return plan
