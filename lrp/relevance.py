"""Results: relevance of every kind, and the ledger of where it went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrp._unit import COLUMNS

__all__ = ["Ledger", "LedgerRow", "Relevance"]

_ABSORBED = COLUMNS[2:]


@dataclass(frozen=True, eq=False)
class LedgerRow:
    """The books of one module, each entry of shape (N,), float64.

    ``start`` arrived at the module's output; ``input`` was handed to its
    inputs; the other entries were absorbed. ``gap`` is what is left
    unexplained: rounding.
    """

    start: Tensor
    input: Tensor
    bias: Tensor
    stabiliser: Tensor
    dead: Tensor
    constant: Tensor
    nonlinear: Tensor
    lost: Tensor

    @property
    def gap(self) -> Tensor:
        out = self.start - self.input
        for name in _ABSORBED:
            out = out - getattr(self, name)
        return out

    @classmethod
    def from_table(cls, table: Tensor) -> LedgerRow:
        return cls(*table.double().unbind(1))


class Ledger(LedgerRow):
    """Where relevance was absorbed, in total and per module.

    Attributes
    ----------
    start, input : Tensor (N,)
        Relevance put in at the output, and delivered at the input.
    bias : Tensor (N,)
        Taken by biases, folded shifts and normalisation shifts.
    stabiliser : Tensor (N,)
        The cost of epsilon.
    dead : Tensor (N,)
        Relevance on outputs to which nothing contributed.
    constant : Tensor (N,)
        Taken by tokens, position embeddings, additive constants and f(0).
    nonlinear : Tensor (N,)
        Taylor remainders; zero under the rules that conserve.
    lost : Tensor (N,)
        Relevance that sat on exact zeros where it had to become a coefficient.
    gap : Tensor (N,)
        ``start - input - everything absorbed``: rounding only.
    modules : dict of str to LedgerRow

    Notes
    -----
    All entries are sums taken on their own; ``gap`` is the only difference.
    """

    modules: dict[str, LedgerRow]

    def __init__(self, start: Tensor, relevance_in: Tensor, modules: dict[str, LedgerRow]) -> None:
        def total(name: str) -> Tensor:
            out = torch.zeros_like(start, dtype=torch.float64)
            for row in modules.values():
                out = out + getattr(row, name)
            return out

        super().__init__(start.double(), relevance_in.double(), *(total(n) for n in _ABSORBED))
        object.__setattr__(self, "modules", modules)

    def magnitude(self) -> Tensor:
        """Sum of the magnitudes of all parts (N,): the scale rounding is measured against."""
        out = self.start.abs() + self.input.abs()
        for row in self.modules.values():
            for name in _ABSORBED:
                out = out + getattr(row, name).abs()
        return out

    def __str__(self) -> str:
        names = ("start", "input", *_ABSORBED, "gap")
        width = max([len("mean over samples"), *(len(m) for m in self.modules)])
        width = min(width, 48)

        def short(name: str) -> str:
            return name if len(name) <= width else "…" + name[1 - width :]

        lines = ["mean over samples".ljust(width) + "".join(n.rjust(12) for n in names)]
        rows: Iterator[tuple[str, LedgerRow]] = iter([*self.modules.items(), ("total", self)])
        for module, row in rows:
            cells = "".join(f"{getattr(row, n).mean().item():12.4g}" for n in names)
            lines.append(short(module).ljust(width) + cells)
        lines.append("start and input are each module's own; what is absorbed adds up to the total; gap is rounding")
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class Relevance:
    """What one call explains.

    Attributes
    ----------
    input : Tensor or tuple of Tensor
        Shaped like the input (a tuple where the model takes several).
    output : Tensor
        The model's output, equal to rounding.
    target : LongTensor (N,) or None
        The explained class of every sample, where the start needs one.
    layers : dict of str to Tensor
        Module call to the relevance of its output. The k-th re-use of a module
        is named ``name@k``; a folded batch norm and a fused ReLU share the
        relevance of their layer.
    channels : dict of str to Tensor (N, C)
        Signed sum over space, of every module whose output has the channels of
        a linear layer: these layers, what keeps their channels (norms,
        activations, pools), and containers of them.
    weights : dict of str to Tensor
        Parameter name to its relevance, signed sum over the batch: weights and
        biases of linear layers. The shift of a norm is in the ledger's
        ``bias``, and so is the bias of a layer it is folded into.
    ledger : Ledger or None
    unexplained : dict of str to str
        Module calls that get no relevance by rule, and why (gates, queries and
        keys): absent from ``layers`` and ``channels``, not zero. Rows of a
        packed projection are listed as ``"attn.qkv[0:384]"``: they are 0 in
        ``channels`` and ``weights``, and must not be taken for irrelevant.
    """

    input: Tensor | tuple[Tensor, ...]
    output: Tensor
    target: Tensor | None = None
    layers: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    ledger: Ledger | None = None
    unexplained: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        shape = tuple(self.input.shape) if isinstance(self.input, Tensor) else [tuple(t.shape) for t in self.input]
        parts = [f"input {shape}"]
        parts += [f"{len(d)} {n}" for n, d in (("layers", self.layers), ("channels", self.channels)) if d]
        if self.weights:
            parts.append(f"weights of {len(self.weights)} parameters")
        if self.ledger is not None:
            worst = (self.ledger.gap.abs() / self.ledger.magnitude().clamp_min(1e-300)).max().item()
            parts.append(f"largest relative gap {worst:.1e}")
        return f"Relevance({', '.join(parts)})"
