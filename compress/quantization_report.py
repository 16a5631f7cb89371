"""The report on a quantized network: what its file takes, tensor by tensor, and what it is worth."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from compress._results import Result, aligned, optional_number
from compress.class_comparison import ClassComparison
from compress.evaluation import Evaluation
from compress.quantization import Reached
from compress.training import History

__all__ = ["Layer", "QuantizationReport", "Side"]

SECTIONS = ("comparison", "drift")


@dataclass(frozen=True)
class Side:
    """One network as the file it is.

    Attributes
    ----------
    file_bytes : int or None
        Of the file that :func:`compress.save` wrote.
    evaluation : Evaluation or None
        Of the network loaded back from there.
    """

    file_bytes: int | None = None
    evaluation: Evaluation | None = None

    def to_json(self) -> dict[str, Any]:
        found = self.evaluation
        return {"file_bytes": self.file_bytes, "evaluation": None if found is None else found.to_json()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Side:
        size, found = stored["file_bytes"], stored["evaluation"]
        return cls(None if size is None else int(size), None if found is None else Evaluation.from_json(found))


@dataclass(frozen=True)
class Layer:
    """One quantized tensor.

    Attributes
    ----------
    name : str
        Of the parameter.
    bits, levels : int
        Of an index at a fixed length; how many values it may have.
    low, high : float
        Smallest and largest step; they differ where every channel has its own.
    weights : int
    zeros : float
        A share.
    entropy : float
        Bits per weight.
    bytes : int or None
        In the file: code and steps.
    relevance : str
        "ok", "not_reached", "skipped" or "none"; see :class:`compress.ZeroCost`.
    beta : float or None
        Exponent of the relevance.
    collapsed : bool
        Whether all weights are zero.
    """

    name: str
    bits: int
    levels: int
    low: float
    high: float
    weights: int
    zeros: float
    entropy: float
    bytes: int | None = None
    relevance: str = "none"
    beta: float | None = None
    collapsed: bool = False

    @property
    def step(self) -> str:
        """As it is read."""
        return f"{self.low:.3g}" if self.low == self.high else f"{self.low:.3g} to {self.high:.3g}"

    @property
    def rate(self) -> float | None:
        """Bits per weight in the file, with steps and tables."""
        return None if self.bytes is None else 8 * self.bytes / max(1, self.weights)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Layer:
        size = stored["bytes"]
        return cls(
            name=str(stored["name"]),
            bits=int(stored["bits"]),
            levels=int(stored["levels"]),
            low=float(stored["low"]),
            high=float(stored["high"]),
            weights=int(stored["weights"]),
            zeros=float(stored["zeros"]),
            entropy=float(stored["entropy"]),
            bytes=None if size is None else int(size),
            relevance=str(stored["relevance"]),
            beta=optional_number(stored["beta"]),
            collapsed=bool(stored["collapsed"]),
        )


@dataclass(frozen=True, repr=False)
class QuantizationReport(Result):
    """Everything a quantized network has to show. Made by :func:`compress.report`; prints as sentences and a table.

    Attributes
    ----------
    title, model, method : str
        ``model`` is the class of the network.
    before, after : Side
        Before quantization (after pruning, if it was pruned), and the result.
    reached : Reached
    parts : dict of str to int
        Bytes within the file: "weights" (quantized, with their steps), "other"
        (all other tensors), "header". Empty where no file was written.
    layers : tuple of Layer
    left_out : dict of str to str
        Every other floating-point tensor, and why it stays as it is.
    limit : int or None
        Bytes asked for.
    gamma : float or None
        At the end.
    collapsed : tuple of str
        Tensors that are zero throughout.
    classes : ClassComparison or None
    training : History or None
    forms : dict or None
        What :func:`compress.measurement.measure` found of the ONNX forms.
    settings, versions : dict
    notes : tuple of str
    sections : dict
        "comparison" (of :func:`compress.compare_quantizers`) and "drift".

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> result = compress.quantize(net, method="rtn", bits=4)
    >>> found = compress.report(result, original=net, meter=None)
    >>> found.after.file_bytes == result.reached.bytes, [layer.bits for layer in found.layers]
    (True, [8, 8])
    """

    FORMAT: ClassVar[str] = "compress.QuantizationReport"

    title: str
    model: str
    method: str
    before: Side
    after: Side
    reached: Reached
    parts: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    gamma: float | None = None
    collapsed: tuple[str, ...] = ()
    classes: ClassComparison | None = None
    training: History | None = None
    forms: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sections: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether bytes or rate are what was asked for; True where nothing was."""
        from compress._quantization_sentences import rate_of

        size = self.after.file_bytes
        if self.limit is not None:
            return size is not None and size <= self.limit
        rate = rate_of(self)
        return rate is None or rate.reached(self.reached.zeros, self.reached.bits_per_weight)

    @property
    def sentences(self) -> list[str]:
        """What the numbers say, in plain words, the most important first."""
        from compress._quantization_sentences import sentences

        return [s.text for s in sentences(self)]

    # -- keeping ------------------------------------------------------------
    def _told(self) -> str:
        return f"{self.title!r}, {self.reached.bytes:,} bytes"

    def _held(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "model": self.model,
            "method": self.method,
            "sentences": self.sentences,  # for other readers
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "target": {"limit": self.limit, "met": self.met},
            "reached": self.reached.to_json(),
            "parts": dict(self.parts),
            "layers": [layer.to_json() for layer in self.layers],
            "left_out": dict(self.left_out),
            "gamma": self.gamma,
            "collapsed": list(self.collapsed),
            "classes": None if self.classes is None else self.classes.to_json(),
            "training": None if self.training is None else self.training.to_json(),
            "forms": None if self.forms is None else dict(self.forms),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "sections": dict(self.sections),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> QuantizationReport:
        from compress.reporting import comparison_of

        limit, reached = stored["target"]["limit"], stored["reached"]
        return cls(
            title=str(stored["title"]),
            model=str(stored["model"]),
            method=str(stored["method"]),
            before=Side.from_json(stored["before"]),
            after=Side.from_json(stored["after"]),
            reached=Reached(**{name: reached[name] for name in ("bytes", "zeros", "bits_per_weight", "weights")}),
            parts={str(name): int(size) for name, size in stored["parts"].items()},
            layers=tuple(Layer.from_json(row) for row in stored["layers"]),
            left_out=dict(stored["left_out"]),
            limit=None if limit is None else int(limit),
            gamma=optional_number(stored["gamma"]),
            collapsed=tuple(map(str, stored["collapsed"])),
            classes=None if stored["classes"] is None else comparison_of(stored["classes"]),
            training=None if stored["training"] is None else History.from_json(stored["training"]),
            forms=stored["forms"],
            settings=dict(stored["settings"]),
            versions=dict(stored["versions"]),
            notes=tuple(map(str, stored["notes"])),
            sections=dict(stored["sections"]),
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained page; see :func:`compress.quantization_page.render_quantized`."""
        from compress.page import write
        from compress.quantization_page import render_quantized

        return write(render_quantized(self), path)

    def __str__(self) -> str:
        from compress._quantization_sentences import layer_rows

        return "\n".join([self.title, *self.sentences, "", aligned(layer_rows(self))])
