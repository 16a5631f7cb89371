r"""Bits per layer under a budget: few where it matters little.

Every tensor l at b bits costs bytes :math:`r_l(b)`, the entropy of its rounded
levels, and damage :math:`e_l(b)`. The choice minimises :math:`\sum_l e_l` subject
to :math:`\sum_l r_l \le B`: for a multiplier :math:`\mu` every tensor takes the b
of the least :math:`e + \mu r`, the least :math:`\mu` that fits is found by
bisection, and what is left of the budget goes to the steps that save most damage
per byte.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import batches_of, check_reiterable, device_of, outputs_of
from compress._modes import evaluating
from compress.codebook import BITS, Codebook, codebook_of
from compress.evaluation import logits_of
from compress.quantized_tensors import choose_tensors
from compress.rate import entropy_of
from lrp.errors import BudgetError, InputError, MismatchError

__all__ = ["MEASURES", "BitAllocation", "allocate_bits"]

MEASURES = ("output", "relevance")
_ROUNDS = 200


@dataclass(frozen=True)
class BitAllocation:
    """The bits of every tensor, and what each choice would have cost.

    Attributes
    ----------
    bits : dict of str to int
        For ``compress.quantize(bits=...)``.
    bytes : float
        Entropy of the rounded levels of all tensors, in bytes.
    damage : float
        Sum over the tensors.
    budget : float
        In bytes.
    table : dict of str to dict of int to (bytes, damage)
    """

    bits: Mapping[str, int]
    bytes: float
    damage: float
    budget: float
    table: Mapping[str, Mapping[int, tuple[float, float]]] = field(repr=False)

    def __str__(self) -> str:
        width = max(map(len, self.bits))
        rows = [f"{'tensor'.ljust(width)}  bits       bytes    damage"]
        for name, b in self.bits.items():
            size, damage = self.table[name][b]
            rows.append(f"{name.ljust(width)}  {b:4d}  {size:10,.0f}  {damage:8.3g}")
        rows.append(f"{'all'.ljust(width)}        {self.bytes:10,.0f}  {self.damage:8.3g}  of {self.budget:,.0f} bytes")
        return "\n".join(rows)


def allocate_bits(
    model: nn.Module,
    data: Any = None,
    *,
    budget: float,
    by: str = "output",
    relevance: Mapping[str, Tensor] | None = None,
    choices: Sequence[int] = (2, 3, 4, 5, 6, 8),
    exclude: Iterable[str] | str = (),
    levels: str = "symmetric",
    step: str | float = "mse",
) -> BitAllocation:
    r"""Choose the bits of every tensor under a budget of bytes.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    data : batches, optional
        For ``by="output"``; labels are not read.
    budget : float
        Bytes of all quantized weights together, by entropy.
    by : {"output", "relevance"}
        The damage of rounding one tensor: the mean squared change of the
        logits, measured; or :math:`\sum_i (R_i / w_i)^2 (q_i - w_i)^2`, with
        the relevance R of the weights: R / w is the slope of what the network's
        output owes to a weight, so this is the damage to first order if the
        errors of the weights are independent.
    relevance : dict of str to Tensor
        For ``by="relevance"``: :func:`lrp.collect` with ``wrt="weights"``.
    choices : sequence of int
        Numbers of bits to choose from, 2 to 8.
    exclude : iterable of str
        Shell patterns of layers that stay as they are.
    levels, step
        See :func:`compress.codebook.codebook_of`.

    Returns
    -------
    BitAllocation

    Raises
    ------
    InputError, MismatchError
    BudgetError
        If even the fewest bits take more.

    Notes
    -----
    Cost of "output": one pass over the data per tensor and choice.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> found = compress.allocate_bits(net, [torch.randn(32, 8)], budget=400)
    >>> found.bytes <= 400, sorted(found.bits)
    (True, ['0.weight', '2.weight'])
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise InputError(
            "budget is no number of bytes", expected="a number above 0", got=repr(budget), fix="budget=100_000"
        )
    if not isinstance(choices, Iterable):
        raise InputError(
            "choices make no sense", expected="several numbers of bits", got=repr(choices), fix="choices=(3, 4)"
        )
    wanted = sorted(set(choices))
    if by not in MEASURES or not wanted or not all(b in BITS for b in wanted):
        raise InputError(
            "by or choices make no sense",
            expected=f"by one of {', '.join(MEASURES)}; choices from {BITS[0]} to {BITS[-1]}",
            got=f"by={by!r}, choices={tuple(choices)!r}",
            fix="change them",
        )
    chosen, _ = choose_tensors(model, wanted[-1], first=None, last=None, exclude=exclude)
    weights = {name: p.detach() for name, p in model.named_parameters() if name in chosen}
    books = {n: {b: codebook_of(w, b, levels=levels, step=step) for b in wanted} for n, w in weights.items()}
    measured = by == "output"
    damages = _by_output(model, weights, books, data) if measured else _by_relevance(weights, books, relevance)
    table = {name: {b: (_bytes(books[name][b], w), damages[name][b]) for b in wanted} for name, w in weights.items()}
    bits = _least_damage(table, budget)
    size = sum(table[n][b][0] for n, b in bits.items())
    return BitAllocation(bits, size, sum(table[n][b][1] for n, b in bits.items()), float(budget), table)


def _bytes(book: Codebook, w: Tensor) -> float:
    counts = torch.bincount((book.nearest(w) - book.low).reshape(-1), minlength=book.size)
    return entropy_of([counts.tolist()]) * w.numel() / 8


def _by_relevance(
    weights: Mapping[str, Tensor],
    books: Mapping[str, Mapping[int, Codebook]],
    relevance: Mapping[str, Tensor] | None,
) -> dict[str, dict[int, float]]:
    out = {}
    for name, w in weights.items():
        r = None if relevance is None else relevance.get(name)
        if r is None or r.shape != w.shape:
            raise MismatchError(
                "the relevance does not fit the weights",
                expected=f"relevance= with a tensor for '{name}' of shape {tuple(w.shape)}",
                got="none" if r is None else str(tuple(r.shape)),
                fix="relevance=lrp.collect(model, batches, wrt='weights').weights",
            )
        plain = w.double()
        slope = torch.where(plain == 0, 0.0, r.to(plain) / torch.where(plain == 0, 1.0, plain))
        out[name] = {
            b: float((slope * (book.values(book.nearest(w)).double() - plain)).square().sum())
            for b, book in books[name].items()
        }
    return out


def _by_output(
    model: nn.Module, weights: Mapping[str, Tensor], books: Mapping[str, Mapping[int, Codebook]], data: Any
) -> dict[str, dict[int, float]]:
    """Mean squared change of the outputs, one tensor and number of bits at a time."""
    data = check_reiterable(data)
    twin = copy.deepcopy(model)
    place = device_of(twin)
    parameters = dict(twin.named_parameters())

    def outputs() -> Tensor:
        found = enumerate(batches_of(data, place))
        return torch.cat([logits_of(outputs_of(twin, batch.inputs), i).double() for i, batch in found])

    out: dict[str, dict[int, float]] = {}
    with evaluating(twin), torch.no_grad():
        plain = outputs()
        for name, w in weights.items():
            out[name] = {}
            for b, book in books[name].items():
                parameters[name].copy_(book.values(book.nearest(w)))
                out[name][b] = float((outputs() - plain).square().mean())
            parameters[name].copy_(w)
    return out


def _least_damage(table: Mapping[str, Mapping[int, tuple[float, float]]], budget: float) -> dict[str, int]:
    def choice(multiplier: float) -> dict[str, int]:
        return {n: min(row, key=lambda b: (row[b][1] + multiplier * row[b][0], row[b][0])) for n, row in table.items()}

    def size(bits: Mapping[str, int]) -> float:
        return sum(table[n][b][0] for n, b in bits.items())

    least = {n: min(row, key=lambda b: row[b][0]) for n, row in table.items()}
    if not size(least) <= budget:
        raise BudgetError(
            "the budget can not be met",
            expected=f"at least {size(least):,.0f} bytes, at the fewest bits everywhere",
            got=f"{budget:,.0f} bytes",
            fix="raise it, allow fewer bits, or prune before",
        )
    bits = choice(0.0)
    if size(bits) > budget:
        low, high = 0.0, 1.0
        while size(choice(high)) > budget and high < 1e300:
            low, high = high, 4 * high
        if size(choice(high)) > budget:
            return least
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            low, high = (low, middle) if size(choice(middle)) <= budget else (middle, high)
        bits = choice(high)
    while True:  # what is left
        room = budget - size(bits)
        steps = [
            ((table[n][b][1] - row[c][1]) / max(1e-12, row[c][0] - table[n][b][0]), n, c)
            for n, row in table.items()
            for b in (bits[n],)
            for c in row
            if row[c][1] < table[n][b][1] and row[c][0] - table[n][b][0] <= room
        ]
        if not steps:
            return bits
        _, name, better = max(steps)
        bits[name] = better
