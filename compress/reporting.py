"""The report: what a compression run has cost and brought, measured on the files it leaves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from torch import nn

from compress._results import Result, aligned
from compress.class_comparison import ClassChange, ClassComparison
from compress.costs import Costs
from compress.evaluation import Evaluation
from compress.pruning import PruneResult, Step
from compress.quantization import QuantizeResult
from compress.quantization_plan import plan_of
from compress.quantization_report import SECTIONS as OF_QUANTIZED
from compress.quantization_report import QuantizationReport
from compress.target import Target
from lrp.errors import InputError

__all__ = ["Measured", "Report", "Timed", "comparison_of", "report"]

SECTIONS = ("comparison", "rivals", "sensitivity", "stability", "drift")


@dataclass(frozen=True)
class Timed:
    """Time of one call, by a meter.

    Attributes
    ----------
    median, low, high : float
        Milliseconds: median and quartiles of the rounds.
    rounds : int
        How often the meter was asked, in turns with the other network.
    meter : str
        Its name: runtime, version, device, threads, batch.
    threads : int or None
        Where the meter tells it.

    Examples
    --------
    >>> print(Timed(1.25, 1.2, 1.5, 5, "my board"))
    1.25 ms (quartiles 1.2 to 1.5, 5 rounds), my board
    """

    median: float
    low: float
    high: float
    rounds: int
    meter: str
    threads: int | None = None

    def overlaps(self, other: Timed) -> bool:
        """Whether the ranges between the quartiles have a time in common."""
        return self.low <= other.high and other.low <= self.high

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Timed:
        return cls(**stored)

    def __str__(self) -> str:
        spread = f"quartiles {self.low:.3g} to {self.high:.3g}, {self.rounds} round{'s' if self.rounds != 1 else ''}"
        return f"{self.median:.3g} ms ({spread}), {self.meter}"


@dataclass(frozen=True)
class Measured:
    """One network: counted, evaluated, weighed and timed.

    Attributes
    ----------
    costs : Costs
        Counted on the modules.
    evaluation : Evaluation or None
        Of the network loaded back from its file.
    file_bytes : int or None
        Of the file that :func:`compress.save` wrote.
    onnx_bytes : int or None
        Of the exported file.
    onnx_parity : str
        How far the runtime's outputs were from the network's own.
    latency : Timed or None
    """

    costs: Costs
    evaluation: Evaluation | None = None
    file_bytes: int | None = None
    onnx_bytes: int | None = None
    onnx_parity: str = ""
    latency: Timed | None = None

    def to_json(self) -> dict[str, Any]:
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.to_json() if hasattr(value, "to_json") else value for name, value in held.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Measured:
        def number(name: str, kind: Any) -> Any:
            return None if stored.get(name) is None else kind(stored[name])

        return cls(
            Costs.from_json(stored["costs"]),
            number("evaluation", Evaluation.from_json),
            number("file_bytes", int),
            number("onnx_bytes", int),
            str(stored["onnx_parity"]),
            number("latency", Timed.from_json),
        )


@dataclass(frozen=True, repr=False)
class Report(Result):
    """Everything a compression run has to show. Made by :func:`report`; prints as sentences and a table.

    Attributes
    ----------
    title, model : str
        ``model`` is the class of the network.
    target : Target
        Asked for.
    reached : float or None
        The target's quantity of the result, as measured; None where it was not.
    limit : float or None
        What the target came to, in the same unit.
    before, after : Measured
    classes : ClassComparison or None
        Who was hurt: every class before and after.
    filters : dict
        "prunable" and "all": {"before", "after", "removed"}, ``removed`` a share.
    widths : dict of str to (int, int)
        Output channels of every convolution and linear layer, before and after.
    protected, unscored : dict of str to str
        Groups that stay whole, and why.
    history : tuple of Step
    stopped : str
        Why the run ended before its target.
    settings, versions : dict
        What the run depends on, seeds included; the packages and the machine.
    notes : tuple of str
        What a reader should know beside the numbers.
    sections : dict
        "comparison", "rivals", "sensitivity", "stability", "drift": JSON forms
        of further studies, as far as they were made.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> result = compress.prune(net, torch.randn(1, 4), criterion="weight", target=compress.Target(macs=0.5))
    >>> found = compress.report(result, original=net)
    >>> found.sentences[0]
    'Asked for at most 50 % of the multiply-adds (MACs); 50 % remain (24 of 48).'
    """

    FORMAT: ClassVar[str] = "compress.Report"

    title: str
    model: str
    target: Target
    limit: float | None
    reached: float | None
    before: Measured
    after: Measured
    classes: ClassComparison | None = None
    filters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    protected: Mapping[str, str] = field(default_factory=dict)
    unscored: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Step, ...] = ()
    stopped: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sections: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether what was reached is within the target."""
        if self.reached is None or self.limit is None:
            return not self.stopped
        return self.reached <= self.limit

    @property
    def sentences(self) -> list[str]:
        """What the numbers say, in plain words, the most important first."""
        from compress._sentences import sentences

        return [s.text for s in sentences(self)]

    # -- keeping ------------------------------------------------------------
    def _told(self) -> str:
        return f"{self.title!r}, {'met' if self.met else 'missed'} {self.target}"

    def _held(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "model": self.model,
            "sentences": self.sentences,  # for other readers
            "target": {"asked": self.target.to_json(), "limit": self.limit, "reached": self.reached, "met": self.met},
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "classes": None if self.classes is None else self.classes.to_json(),
            "filters": {name: dict(share) for name, share in self.filters.items()},
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "protected": dict(self.protected),
            "unscored": dict(self.unscored),
            "history": [step.to_json() for step in self.history],
            "stopped": self.stopped,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "sections": dict(self.sections),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> Report:
        target = stored["target"]
        return cls(
            title=str(stored["title"]),
            model=str(stored["model"]),
            target=Target.from_json(target["asked"]),
            limit=target["limit"],
            reached=target["reached"],
            before=Measured.from_json(stored["before"]),
            after=Measured.from_json(stored["after"]),
            classes=None if stored["classes"] is None else comparison_of(stored["classes"]),
            filters={str(n): dict(share) for n, share in stored["filters"].items()},
            widths={str(n): (int(b), int(a)) for n, (b, a) in stored["widths"].items()},
            protected=dict(stored["protected"]),
            unscored=dict(stored["unscored"]),
            history=tuple(Step.from_json(s) for s in stored["history"]),
            stopped=str(stored["stopped"]),
            settings=dict(stored["settings"]),
            versions=dict(stored["versions"]),
            notes=tuple(map(str, stored["notes"])),
            sections=dict(stored["sections"]),
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained page; see :func:`compress.page.render`."""
        from compress.page import render, write

        return write(render(self), path)

    def __str__(self) -> str:
        from compress._sentences import rows

        table = [("", "before", "after", "left"), *(row[:4] for row in rows(self))]
        return "\n".join([self.title, *self.sentences, "", aligned(table)])


def comparison_of(stored: Mapping[str, Any]) -> ClassComparison:
    """What ``ClassComparison.to_json`` gave."""

    def row(kept: Mapping[str, Any]) -> ClassChange:
        return ClassChange(**{name: value for name, value in kept.items() if name != "difference"})

    return ClassComparison(tuple(row(r) for r in stored["rows"]), row(stored["overall"]))


@overload
def report(
    result: QuantizeResult | QuantizationReport, path: str | os.PathLike[str] | None = None, **options: Any
) -> QuantizationReport: ...
@overload
def report(
    result: PruneResult | nn.Module | Report, path: str | os.PathLike[str] | None = None, **options: Any
) -> Report: ...  # of a network that is quantized, a QuantizationReport, which no type tells
def report(
    result: PruneResult | QuantizeResult | nn.Module | Report | QuantizationReport,
    path: str | os.PathLike[str] | None = None,
    *,
    original: nn.Module | None = None,
    example_inputs: Any = None,
    data: Any = None,
    class_names: Any = None,
    calibration: Any = None,
    build: Any = None,
    meter: Any = "auto",
    rounds: int = 5,
    title: str | None = None,
    notes: Sequence[str] = (),
    rivals: Mapping[str, PruneResult] | None = None,
    device: torch.device | str | None = None,
    **sections: Any,
) -> Any:
    """Measure what a compression run has brought, and write it down.

    Networks are saved to a temporary folder and loaded back: bytes are those of
    the file, accuracy is that of the network in the file. Both are exported to
    ONNX and timed in turns, so that a busy machine troubles both alike; of a
    quantized network every form that it can have.

    Parameters
    ----------
    result : PruneResult, QuantizeResult, nn.Module, Report or QuantizationReport
        What :func:`compress.prune` or :func:`compress.quantize` returned; a
        network that ``plan.apply`` or :func:`compress.load` made, which carries
        its plan; or a report, which is written again, with more sections if any
        are given.
    path : path, optional
        A folder, made if missing, for report.json and index.html; or the name
        of one of the two, ending in .json or .html.
    original : nn.Module, optional
        Before compression; for a network that was pruned and quantized, either
        the pruned one or the one before. Without it only what the run has kept of it is known.
    example_inputs : Tensor or tuple, optional
        What the networks are called with, for export and timing; the first
        sample of ``data`` if missing.
    data : iterable of batches (x, y), optional
        Test samples, which had no part in any choice. Without them the accuracy
        is the one that the run measured.
    class_names : sequence of str or dict of int to str, optional
    calibration : iterable of batches or Tensor, optional
        For the form "a8w8" of a quantized network; see
        :func:`compress.export_onnx`.
    build : callable or "MODULE:CALLABLE", optional
        Gives the architecture before pruning, for a network that was pruned and
        quantized; see :func:`compress.load`.
    meter : callable, None or "auto"
        Path of an ONNX file to milliseconds. "auto": the one that the run was
        given, else onnxruntime on this machine, where it is installed; None: no
        export and no timing. Forms of quantized networks are timed in
        onnxruntime only.
    rounds : int
        How often each network is timed; forms of a quantized network six times
        as often, for their rounds are short.
    title : str, optional
    notes : sequence of str
        Sentences to be added.
    rivals : dict of str to PruneResult, optional
        The same run with other criteria, training included.
    device : torch.device or str, optional
        For the accuracy.
    **sections
        comparison=, sensitivity=, stability=, drift=: results of these studies.
        For quantized networks comparison=, of :func:`compress.compare_quantizers`,
        and drift=, which is made from up to 256 samples of ``data`` where it is
        not given.

    Returns
    -------
    Report or QuantizationReport

    Raises
    ------
    InputError
        For a network without a plan, an unknown section, or another suffix.

    Notes
    -----
    Cost: two passes over ``data``, two exports, ``2 x rounds`` calls of the
    meter. What can not be measured is left out, and a sentence says why.

    Examples
    --------
    >>> import torch, compress
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> data = [(torch.randn(20, 4), torch.randint(2, (20,)))]
    >>> result = compress.prune(net, torch.randn(1, 4), data, target=compress.Target(macs=0.5))
    >>> found = compress.report(result, original=net, data=data, meter=None)
    >>> found.after.costs.macs, found.after.file_bytes > 0, found.met
    (24, True, True)
    """
    from compress._measuring import judged, measure

    quantized = isinstance(result, (QuantizeResult, QuantizationReport))
    quantized = quantized or (isinstance(result, nn.Module) and plan_of(result) is not None)
    unknown = [name for name in sections if name not in (OF_QUANTIZED if quantized else SECTIONS)]
    if quantized and rivals:
        unknown.append("rivals")
    if unknown:
        raise InputError(
            f"report has no such part{' for quantized networks' if quantized else ''}",
            expected=", ".join(OF_QUANTIZED if quantized else SECTIONS),
            got=", ".join(unknown),
            fix="compare methods with compress.compare_quantizers" if quantized else "check the spelling",
        )
    kept = {name: _plain(value) for name, value in sections.items() if value is not None}
    if quantized:
        _check_quantized(kept)
    if rivals:
        kept["rivals"] = judged(rivals, data, device)
    asked = {"original": original, "example_inputs": example_inputs, "data": data, "class_names": class_names}
    asked |= {"meter": meter, "rounds": rounds, "title": title, "notes": notes, "device": device}
    out: Report | QuantizationReport
    if isinstance(result, (Report, QuantizationReport)):
        changed: dict[str, Any] = {"sections": {**result.sections, **kept}, "notes": (*result.notes, *notes)}
        out = replace(result, **changed, title=title or result.title)
    elif quantized:
        from compress._quantization_measuring import measure_quantized, of_network

        run = of_network(result, original) if isinstance(result, nn.Module) else result
        assert isinstance(run, QuantizeResult)
        out = measure_quantized(run, calibration=calibration, build=build, sections=kept, **asked)
    else:
        out = replace(measure(result, **asked), sections=kept)
    if path is not None:
        _write(out, Path(path))
    return out


def _check_quantized(sections: Mapping[str, Any]) -> None:
    """Sections of the right kind: those of pruning have the same names."""
    from compress.drift import Drift
    from compress.quantizer_comparison import QuantizerComparison

    for name, kind in (("comparison", QuantizerComparison), ("drift", Drift)):
        found = sections.get(name)
        if found is not None and (not isinstance(found, Mapping) or found.get("format") != kind.FORMAT):
            raise InputError(
                f"{name} is of another kind",
                expected=f"a {kind.__name__}",
                got=str(found.get("format")) if isinstance(found, Mapping) else type(found).__name__,
                fix="compress.compare_quantizers compares ways to quantize, compress.compare ways to prune",
            )


def _plain(value: Any) -> Any:
    return value.to_json() if hasattr(value, "to_json") else value


def _write(found: Report | QuantizationReport, path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix == ".json":
        found.save(path)
    elif suffix in (".html", ".htm"):
        found.to_html(path)
    elif suffix and not path.is_dir():
        raise InputError(
            "a report is a folder, a .json or a .html file",
            expected="for example out/report",
            got=str(path),
            fix="choose another name",
        )
    else:
        path.mkdir(parents=True, exist_ok=True)
        found.save(path / "report.json")
        found.to_html(path / "index.html")
