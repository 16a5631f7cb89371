"""Codebooks: uniform levels of a tensor, whole numbers times a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrp.errors import InputError, MismatchError, NonFiniteError

__all__ = ["BITS", "LEVELS", "STEPS", "Codebook", "codebook_of"]

BITS = range(2, 9)
LEVELS = ("symmetric", "released")
STEPS = ("percentile", "mse", "max")
_PERCENTILE = 99.9
_COARSE, _FINE = 60, 24  # trial steps of the search for the least squared error


@dataclass(frozen=True, eq=False)
class Codebook:
    """Levels ``k * step`` with k from ``low`` to ``high``, one of which is 0.

    Attributes
    ----------
    step : Tensor () or (C,)
        Positive; one for the whole tensor, or one per slice along ``axis``.
        In the type of the weights.
    low, high : int
        Smallest and largest k; ``low <= 0 <= high``.
    axis : int or None
        Along which ``step`` runs.

    Examples
    --------
    >>> import torch
    >>> from compress.codebook import codebook_of
    >>> book = codebook_of(torch.tensor([-0.7, -0.1, 0.2, 0.7]), bits=3, step="max")
    >>> book.low, book.high, round(float(book.step), 4)
    (-3, 3, 0.2333)
    >>> book.nearest(torch.tensor([-0.7, -0.1, 0.2, 0.7]))
    tensor([-3,  0,  1,  3])
    """

    step: Tensor
    low: int
    high: int
    axis: int | None = None

    def __post_init__(self) -> None:
        ok = self.low <= 0 <= self.high and self.low < self.high and self.step.is_floating_point()
        if not ok or self.step.dim() != (0 if self.axis is None else 1):
            raise InputError(
                "a codebook makes no sense",
                expected="low <= 0 <= high, low < high, and a step () or, with axis, (C,)",
                got=f"low={self.low}, high={self.high}, step of shape {tuple(self.step.shape)}, axis={self.axis}",
                fix="use codebook_of",
            )
        if not bool((torch.isfinite(self.step) & (self.step > 0)).all()):
            raise NonFiniteError(
                "a step of a codebook is no size",
                expected="positive finite numbers",
                got=str(float(self.step.min())),
                fix="look for NaN, infinity or numbers too small for the type among the weights",
            )

    @property
    def size(self) -> int:
        """Number of levels."""
        return self.high - self.low + 1

    @property
    def bits(self) -> int:
        """Bits of an index at a fixed length."""
        return (self.size - 1).bit_length()

    def spread(self, like: Tensor) -> Tensor:
        """The step, in a shape that multiplies a tensor of weights."""
        if self.axis is None:
            return self.step
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return self.step.view(shape)

    def nearest(self, w: Tensor) -> Tensor:
        """Indices k of the nearest levels, int64, halves to even; shape of ``w``."""
        step = self.spread(w)
        if w.itemsize == 2:  # in 16 bits the quotient would not tell 127 levels apart
            w, step = w.float(), step.float()
        return (w / step).round_().clamp_(self.low, self.high).long()

    def values(self, k: Tensor) -> Tensor:
        """Levels of the indices, in the type of the step: one rounding each."""
        return k.to(self.step.dtype) * self.spread(k)

    def indices(self, w: Tensor, name: str = "the tensor") -> Tensor:
        """Indices of a tensor that lies on the levels, exactly.

        Raises
        ------
        MismatchError
            If an entry lies on no level.
        """
        k = self.nearest(w)
        off = self.values(k) != w
        if bool(off.any()):
            raise MismatchError(
                f"{name} lies off its codebook",
                expected="a level for every entry, as compress.quantize left them",
                got=f"{int(off.sum()):,} of {w.numel():,} entries that are no level",
                fix="quantize again after training or editing the weights",
            )
        return k

    def to(self, device: torch.device | str) -> Codebook:
        return Codebook(self.step.to(device), self.low, self.high, self.axis)

    def to_json(self) -> dict[str, Any]:
        """Steps in hexadecimal, for they must come back to the last bit."""
        steps = [float(s).hex() for s in self.step.reshape(-1).double().tolist()]
        kind = str(self.step.dtype).removeprefix("torch.")
        return {"low": self.low, "high": self.high, "axis": self.axis, "type": kind, "step": steps}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Codebook:
        axis = None if stored["axis"] is None else int(stored["axis"])
        steps = [float.fromhex(s) for s in stored["step"]]
        step = torch.tensor(steps, dtype=getattr(torch, stored["type"]))
        return cls(step[0] if axis is None else step, int(stored["low"]), int(stored["high"]), axis)

    def __str__(self) -> str:
        low, high = float(self.step.min()), float(self.step.max())
        size = f"{low:.4g}" if self.axis is None else f"{low:.4g} to {high:.4g} per slice of axis {self.axis}"
        return f"{self.bits} bit, {self.size} levels {self.low} to {self.high}, step {size}"


def codebook_of(
    w: Tensor,
    bits: int,
    *,
    levels: str = "symmetric",
    step: str | float = "percentile",
    axis: int | None = None,
) -> Codebook:
    r"""The codebook of a tensor.

    Parameters
    ----------
    w : Tensor
    bits : int
        2 to 8.
    levels : "symmetric" or "released"
        :math:`2^b - 1` levels :math:`-(2^{b-1}-1) \dots 2^{b-1}-1`; or
        :math:`2^b` levels as the published ECQx code has them, where the side
        with one more is the one that wins three of five comparisons of the
        positive with the negative weights (largest magnitude, mean magnitude,
        count, sum of magnitudes, standard deviation). Weights of one sign get
        levels on that side only, in both.
    step : "percentile", "mse", "max" or float
        ``"percentile"``: the 99.9th percentile of :math:`|w|` becomes the
        outermost level; ``"max"``: the largest :math:`|w|` does; ``"mse"``:
        the step with the least squared error of rounding, found on a grid; a
        number: that step.
    axis : int, optional
        One step per slice along this axis (0: output channels).

    Returns
    -------
    Codebook

    Raises
    ------
    InputError, NonFiniteError

    Notes
    -----
    Percentile and extra level: D. Becking et al., "ECQx: Explainability-driven
    quantization for low-bit and sparse DNNs", 2022, as in the published code.
    A tensor or slice of zeros gets the step 1. O(N) per trial step.

    Examples
    --------
    >>> import torch
    >>> from compress.codebook import codebook_of
    >>> w = torch.linspace(-1, 1, 101)
    >>> print(codebook_of(w, 4, step="max"))
    4 bit, 15 levels -7 to 7, step 0.1429
    >>> codebook_of(w.abs(), 2).high
    3
    """
    _check(w, bits, levels, step, axis)
    w = w.detach()
    low, high = _range(w, bits, levels)
    rows = w.reshape(1, -1) if axis is None else w.movedim(axis, 0).reshape(w.shape[axis], -1)
    outermost = max(high, -low)
    if isinstance(step, (int, float)):
        steps = torch.full((len(rows),), float(step), dtype=torch.float64, device=w.device)
    elif step == "mse":
        steps = _least_error(rows, low, high)
    else:
        size = _percentile(rows) if step == "percentile" else rows.abs().amax(1).double()
        largest = rows.abs().amax(1).double()
        steps = torch.where(size > 0, size, largest) / outermost
    steps = torch.where(steps > 0, steps, 1.0).to(w.dtype)
    steps = torch.where(steps > 0, steps, torch.finfo(w.dtype).tiny)  # so small that the type lost it
    return Codebook(steps[0] if axis is None else steps, low, high, axis)


def _check(w: Tensor, bits: int, levels: str, step: Any, axis: int | None) -> None:
    if not isinstance(w, Tensor) or not w.is_floating_point() or not w.numel():
        raise InputError(
            "there is nothing to quantize",
            expected="a tensor of floating-point weights",
            got=f"{w.dtype} {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__,
            fix="pass a weight",
        )
    if not bool(torch.isfinite(w).all()):
        raise NonFiniteError(
            "a weight is not finite", expected="finite weights", got="NaN or infinity", fix="look at its training"
        )
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise InputError(
            "this number of bits is not offered",
            expected=f"a whole number from {BITS[0]} to {BITS[-1]}",
            got=repr(bits),
            fix="2 bits have 3 or 4 levels, 8 bits 255 or 256",
        )
    if levels not in LEVELS:
        raise InputError(
            "unknown levels", expected=" or ".join(map(repr, LEVELS)), got=repr(levels), fix="choose one of them"
        )
    number = isinstance(step, (int, float)) and not isinstance(step, bool)
    if not (number and math.isfinite(step) and step > 0) and step not in STEPS:
        raise InputError(
            "unknown step",
            expected=f"{', '.join(map(repr, STEPS))} or a positive number",
            got=repr(step),
            fix="choose one of them",
        )
    if axis is not None and not 0 <= axis < w.dim():
        raise InputError(
            "axis is none of the tensor's", expected=f"0 to {w.dim() - 1}", got=repr(axis), fix="0 is the output's"
        )


def _range(w: Tensor, bits: int, levels: str) -> tuple[int, int]:
    positive, negative = w[w > 0], -w[w < 0]
    if not negative.numel():
        return 0, 2**bits - 1
    if not positive.numel():
        return 1 - 2**bits, 0
    half = 2 ** (bits - 1)
    if levels == "symmetric":
        return 1 - half, half - 1

    def sizes(part: Tensor) -> list[float]:
        part = part.double()
        spread = float(part.std(correction=0))
        return [float(part.max()), float(part.mean()), float(part.numel()), float(part.sum()), spread]

    wins = sum(p > n for p, n in zip(sizes(positive), sizes(negative), strict=True))
    return (1 - half, half) if wins >= 3 else (-half, half - 1)


def _percentile(rows: Tensor) -> Tensor:
    """Of the magnitudes of each row, between order statistics; numpy's, for torch's takes 16 million at most."""
    found = np.percentile(rows.abs().double().cpu().numpy(), _PERCENTILE, axis=1)
    return torch.from_numpy(np.atleast_1d(found)).to(rows.device)


def _least_error(rows: Tensor, low: int, high: int) -> Tensor:
    """The step of each row with the least squared error: a coarse grid of trials, then a fine one about the best."""
    largest = rows.abs().amax(1).double()
    top = largest / max(high, -low)
    w = rows.double()

    def best(trials: list[Tensor]) -> Tensor:
        errors = []
        for trial in trials:
            step = torch.where(trial > 0, trial, 1.0).unsqueeze(1)
            errors.append((w - (w / step).round().clamp(low, high) * step).square().sum(1))
        return torch.stack(trials).gather(0, torch.stack(errors).argmin(0).unsqueeze(0))[0]

    # the outermost level may lie beyond the largest weight: 2 bit rounds everything to 0 or to it
    coarse = [top * (0.1 + 1.2 * i / (_COARSE - 1)) for i in range(_COARSE)]
    centre, width = best(coarse), top * 1.2 / (_COARSE - 1)
    return best([centre, *(centre + width * (2 * i / (_FINE - 1) - 1) for i in range(_FINE))])
