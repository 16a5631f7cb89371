r"""Does the pruned network still look at the same things?

Heat maps of the original and of the pruned network, of the same samples, the
same class and the same composite, are compared. Accuracy may stay while
reasons change: Hatefi et al. 2024 (arXiv 2408.12568) measure the cosine
similarity of the maps beside it.

Three numbers per sample: the cosine of the two maps, Spearman's correlation of
their values (average ranks), and the overlap of their top pixels. Maps of one
network on *different* samples agree to some degree too, since objects lie in
the middle and relevance is mostly positive; so the same numbers, with the
pruned network's map of another sample, stand beside them as chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lrp
from compress._data import batches_of, check_reiterable, device_of, labels_of, outputs_of
from compress._modes import evaluating
from compress._results import Result, aligned, mean_interval, optional_number
from compress.evaluation import check_labels, logits_of
from lrp._drawing import axes_or_new
from lrp._settings import as_double
from lrp.composites import resolve
from lrp.errors import InputError, MismatchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MEASURES", "Agreement", "Drift", "SampleDrift", "drift"]

Floats = NDArray[np.float64]
MEASURES = ("cosine", "spearman", "top")


@dataclass(frozen=True)
class SampleDrift:
    """Two heat maps of one sample.

    Attributes
    ----------
    index : int
        Place of the sample in the data.
    label : int or None
        Its class, where the data say.
    target : int
        The output that is explained.
    before, after : int
        What the original and the pruned network predict.
    cosine, spearman, top : float or None
        0 where one of the maps is zero (for ``spearman``: constant) and the
        other is not; None where both are, since nothing can be compared.
    """

    index: int
    label: int | None
    target: int
    before: int
    after: int
    cosine: float | None
    spearman: float | None
    top: float | None


@dataclass(frozen=True)
class Agreement:
    """One measure over many samples: mean and bootstrap interval over samples, and what chance gives.

    ``chance`` is None where no two samples came in one batch.
    """

    mean: float
    low: float
    high: float
    count: int
    chance: float | None = None


@dataclass(frozen=True, repr=False)
class Drift(Result):
    """How heat maps agree before and after; prints as a table.

    Attributes
    ----------
    samples : tuple of SampleDrift
    overall : dict of str to Agreement
        By measure; absent where no sample can be compared.
    zero : dict of str to int
        Samples whose map is zero: "before", "after", "both".
    flipped : int
        Samples whose explained output changed its sign. With the start "logit"
        such a map turns over as a whole, and its cosine is near -1.
    settings : dict

    Examples
    --------
    See :func:`drift`.
    """

    FORMAT: ClassVar[str] = "compress.Drift"

    samples: tuple[SampleDrift, ...]
    overall: Mapping[str, Agreement]
    zero: Mapping[str, int] = field(default_factory=dict)
    flipped: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def worst(self, count: int = 10, measure: str = "cosine") -> tuple[SampleDrift, ...]:
        """Samples whose maps agree least, worst first; those that can't be compared are left out."""
        _known(measure)
        rated = [(getattr(s, measure), s.index, s) for s in self.samples if getattr(s, measure) is not None]
        return tuple(s for *_, s in sorted(rated, key=lambda row: row[:2])[:count])

    def per_class(self, measure: str = "cosine") -> dict[int, Agreement]:
        """By class of the samples (by explained class, where the data bring none), worst first."""
        _known(measure)
        parts: dict[int, list[float]] = {}
        for s in self.samples:
            value = getattr(s, measure)
            if value is not None:
                parts.setdefault(s.target if s.label is None else s.label, []).append(value)
        found = {c: _agreement(np.array(values), None) for c, values in sorted(parts.items())}
        return dict(sorted(found.items(), key=lambda item: item[1].mean))

    @property
    def kept(self) -> float:
        """Share of samples whose predicted class is the same."""
        return sum(s.before == s.after for s in self.samples) / len(self.samples)

    def _told(self) -> str:
        means = ", ".join(f"{name} {a.mean:.3f}" for name, a in self.overall.items())
        return f"{len(self.samples)} samples: {means or 'nothing to compare'}"

    def _held(self) -> dict[str, Any]:
        return {
            "samples": [list(vars(s).values()) for s in self.samples],
            "overall": {name: vars(a) for name, a in self.overall.items()},
            "zero": dict(self.zero),
            "flipped": self.flipped,
            "settings": dict(self.settings),
        }

    @classmethod
    def _made(cls, stored: Mapping[str, Any]) -> Drift:
        samples = []
        for index, label, target, before, after, *values in stored["samples"]:
            whole = (int(target), int(before), int(after))
            samples.append(
                SampleDrift(int(index), None if label is None else int(label), *whole, *map(optional_number, values))
            )
        overall = {}
        for name, a in stored["overall"].items():
            mean, low, high = (float(a[k]) for k in ("mean", "low", "high"))
            overall[str(name)] = Agreement(mean, low, high, int(a["count"]), optional_number(a["chance"]))
        zero = {str(k): int(v) for k, v in stored["zero"].items()}
        return cls(tuple(samples), overall, zero, int(stored["flipped"]), dict(stored["settings"]))

    def __str__(self) -> str:
        table = [("agreement of heat maps", "mean", "95 % interval", "chance", "samples")]
        for name, a in self.overall.items():
            shown = f"top {self.settings['top']:.0%}" if name == "top" and "top" in self.settings else name
            chance = "-" if a.chance is None else f"{a.chance:.3f}"
            table.append((shown, f"{a.mean:.3f}", f"{a.low:.3f} to {a.high:.3f}", chance, str(a.count)))
        lines = [aligned(table), f"the same class is predicted for {self.kept:.1%} of {len(self.samples)} samples"]
        if any(self.zero.values()):
            parts = [f"{self.zero.get(k, 0)} {k}" for k in ("before", "after", "both")]
            lines.append(f"heat maps that are zero: {', '.join(parts)} (counted as no agreement, but for both)")
        if self.flipped:
            lines.append(f"the explained output changed its sign for {self.flipped} samples")
        worst = [f"{s.index} ({s.cosine:.3f})" for s in self.worst(5)]
        return "\n".join([*lines, f"worst samples by cosine: {', '.join(worst) or 'none'}"])

    def plot(self, ax: Axes | None = None, measure: str = "cosine") -> Axes:
        """Distribution of one measure over samples, those with another predicted class apart.

        Parameters
        ----------
        ax : Axes, optional
        measure : str
        """
        _known(measure)
        ax = axes_or_new(ax, 6.0, 3.4)
        held = [(getattr(s, measure), s.before == s.after) for s in self.samples if getattr(s, measure) is not None]
        parts = [[v for v, same in held if same], [v for v, same in held if not same]]
        low = min((v for v, _ in held), default=0.0)
        bins = np.linspace(min(0.0, low), 1.0, 31)
        ax.hist(parts, bins=bins.tolist(), stacked=True, color=["#1d4ed8", "#c2410c"],
                label=["same class predicted", "another class predicted"])  # fmt: skip
        found = self.overall.get(measure)
        if found is not None:
            ax.axvline(found.mean, color="0.2", linewidth=1, label=f"mean {found.mean:.3f}")
            if found.chance is not None:
                ax.axvline(found.chance, color="0.5", linewidth=1, linestyle="--", label=f"chance {found.chance:.3f}")
        ax.set_xlabel(f"{measure} of heat maps before and after")
        ax.set_ylabel("samples")
        ax.legend(fontsize="small")
        return ax


def drift(
    original: nn.Module,
    pruned: nn.Module,
    data: Any,
    *,
    composite: Any = "epsilon_plus",
    target: str | int = "label",
    start: str = "logit",
    top: float = 0.1,
    merge_channels: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Drift:
    """Agreement of the heat maps of two networks on the same samples.

    Parameters
    ----------
    original, pruned : nn.Module
        Left as they are; explained in evaluation mode.
    data : iterable of batches
        ``(x, y)`` or ``x``.
    composite : str, Rule or Composite
        The same for both. One whose matchers are depths or names means the
        same layers in both, since cutting keeps them.
    target : "label", "predicted" or int
        Which output is explained, in both: the sample's class, the class the
        *original* predicts, or this one.
    start : str
        What is propagated; see :func:`lrp.attribute`.
    top : float
        Share of the pixels that count as top.
    merge_channels : bool
        Sum the relevance of an input (N, C, ...) with space over its channels,
        as heat maps are drawn.
    device : torch.device or str, optional
    progress : bool

    Returns
    -------
    Drift

    Raises
    ------
    InputError
        If labels are asked for and missing.
    MismatchError
        If the networks have different outputs.
    lrp.errors.LRPError
        If a network can not be explained.

    Notes
    -----
    Similarities are computed in float64, and do not depend on the scale of a
    map. Top pixels are those of the largest relevance; ties go by place. Cost:
    one relevance pass per network, and a sort of every map.

    Examples
    --------
    >>> import torch
    >>> from compress.drift import drift
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> found = drift(net, net, [(torch.randn(6, 4), torch.tensor([0, 1] * 3))], top=0.5)
    >>> [round(a.mean, 6) for a in found.overall.values()], found.kept
    ([1.0, 1.0, 1.0], 1.0)
    """
    from tqdm import tqdm

    check_reiterable(data)
    if not (isinstance(top, float) and 0 < top <= 1):
        raise InputError("top is no share of the pixels", expected="a float in (0, 1]", got=repr(top), fix="try 0.1")
    if target not in ("label", "predicted") and (isinstance(target, bool) or not isinstance(target, int)):
        raise InputError(
            "target is not known", expected="'label', 'predicted' or a class", got=repr(target), fix="choose one"
        )
    rules = resolve(composite)
    place = device_of(original, device)
    rows: list[SampleDrift] = []
    chance: dict[str, list[float]] = {name: [] for name in MEASURES}
    zero = {"before": 0, "after": 0, "both": 0}
    flipped = 0
    bar = tqdm(batches_of(data, place), desc="drift", unit="batch", disable=None if progress else True)
    with evaluating(original), evaluating(pruned):
        for index, batch in enumerate(bar):
            outputs = [_output(model, batch.inputs, index) for model in (original, pruned)]
            if outputs[0].shape != outputs[1].shape:
                raise MismatchError(
                    "the two networks have different outputs",
                    expected=str(tuple(outputs[0].shape)),
                    got=str(tuple(outputs[1].shape)),
                    fix="compare a network with its own pruned form",
                )
            predicted = [o.argmax(1) for o in outputs]
            if target == "label":
                asked = labels_of(batch, "target='label'")
                check_labels(asked, outputs[0].shape[1], index)
            elif target == "predicted":
                asked = predicted[0]
            else:
                asked = torch.full_like(predicted[0], int(target))
                check_labels(asked, outputs[0].shape[1], index)
            mine, theirs = (_maps(model, batch.x, asked, rules, start, merge_channels) for model in (original, pruned))
            found = similarities(mine, theirs, top)
            empty = [~m.any(1) for m in (mine, theirs)]
            for name, where in zip(
                zero, (empty[0] & ~empty[1], empty[1] & ~empty[0], empty[0] & empty[1]), strict=True
            ):
                zero[name] += int(where.sum())
            signs = [o.gather(1, asked[:, None]).sign() for o in outputs]
            flipped += int((signs[0] * signs[1] < 0).sum())
            n = len(asked)
            if n > 1:
                other = similarities(mine, np.roll(theirs, 1, axis=0), top)
                for name in MEASURES:
                    chance[name] += [v for v in other[name] if not math.isnan(v)]
            labels = [None] * n if batch.y is None else batch.y.tolist()
            chosen, before, after = (t.tolist() for t in (asked, *predicted))
            for i in range(n):
                values = [None if math.isnan(found[name][i]) else found[name][i] for name in MEASURES]
                rows.append(SampleDrift(len(rows), labels[i], chosen[i], before[i], after[i], *values))
    overall = {}
    for name in MEASURES:
        known = np.array([v for s in rows if (v := getattr(s, name)) is not None])
        if len(known):
            overall[name] = _agreement(known, float(np.mean(chance[name])) if chance[name] else None)
    settings = {
        "composite": repr(rules),
        "target": target,
        "start": start,
        "top": top,
        "merge_channels": merge_channels,
    }
    return Drift(tuple(rows), overall, zero, flipped, settings)


def similarities(first: Floats, second: Floats, top: float) -> dict[str, list[float]]:
    """The three measures for each row of two arrays of maps (N, P).

    0 where one of the two is zero (constant, for ranks), NaN where both are.
    """
    from scipy.stats import rankdata

    spots = max(1, math.ceil(top * first.shape[1] - 1e-9))
    peaks = [np.argsort(-m, axis=1, kind="stable")[:, :spots] for m in (first, second)]
    common = np.array([len(np.intersect1d(a, b)) for a, b in zip(*peaks, strict=True)]) / spots
    empty = [~m.any(1) for m in (first, second)]
    common = np.where(empty[0] & empty[1], np.nan, np.where(empty[0] | empty[1], 0.0, common))
    ranks = [rankdata(m, axis=1) for m in (first, second)]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    scaled = [m / np.maximum(np.abs(m).max(1, keepdims=True), np.finfo(np.float64).tiny) for m in (first, second)]
    values = (_cosine(*scaled), _cosine(*centred), common)
    return {name: v.tolist() for name, v in zip(MEASURES, values, strict=True)}


def _cosine(first: Floats, second: Floats) -> Floats:
    lengths = [np.sqrt(np.square(m).sum(1)) for m in (first, second)]
    both = lengths[0] * lengths[1]
    out = (first * second).sum(1) / np.where(both > 0, both, 1.0)
    return np.where((lengths[0] == 0) & (lengths[1] == 0), np.nan, np.clip(out, -1.0, 1.0))


def _output(model: nn.Module, inputs: tuple[Tensor, ...], index: int) -> Tensor:
    with torch.no_grad():
        return logits_of(outputs_of(model, inputs), index)


def _maps(model: nn.Module, x: Any, target: Tensor, composite: Any, start: str, merge: bool) -> Floats:
    found = lrp.attribute(model, x, target, composite=composite, start=start, ledger=False).input
    parts: Sequence[Tensor] | Iterable[Tensor] = found if isinstance(found, tuple) else (found,)
    rows = []
    for part in parts:
        r = as_double(part.detach())
        rows.append((r.sum(1) if merge and r.dim() > 2 else r).reshape(len(r), -1).cpu().numpy())
    return np.concatenate(rows, axis=1)


def _agreement(values: Floats, chance: float | None) -> Agreement:
    return Agreement(float(values.mean()), *mean_interval(values), len(values), chance)


def _known(measure: str) -> None:
    if measure not in MEASURES:
        raise InputError(
            "this measure is not known", expected=f"one of {MEASURES}", got=repr(measure), fix="choose one"
        )
