"""Relevance of single weights while a network is trained at low precision: where it comes from, how it is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import labels_of
from compress._modes import evaluating
from lrp._batches import Batch
from lrp._distributed import place, reached, sum_over_processes, together
from lrp.errors import InputError, NonFiniteError

__all__ = ["AGGREGATES", "PLACES", "SOURCES", "WeightRelevance", "mean_over_processes"]

SOURCES = ("lrp", "magnitude", "gradient", "random")
PLACES = ("quantized_jitter", "background", "quantized")
AGGREGATES = ("signed", "abs_per_sample")


@dataclass(frozen=True)
class WeightRelevance:
    """What says how much a weight matters.

    Parameters
    ----------
    source : {"lrp", "magnitude", "gradient", "random"}
        ``"lrp"``: layer-wise relevance of the weights; ``"magnitude"``: |w|;
        ``"gradient"``: gradient of the loss times weight; ``"random"``: LRP's
        values, dealt to other weights of the tensor by one permutation per
        tensor, so with the same histogram. The last three are controls.
    at : {"quantized_jitter", "background", "quantized"}
        The weights with which LRP runs: the quantized ones plus the optimiser's
        last step (those that the optimiser moves where there was no step);
        those that the optimiser moves; or the quantized ones, at which a weight
        of 0 has relevance 0 and can hardly come back. The first is the
        published one, and the best of the three at equal bytes
        (``experiments/results/ecqx``).
    composite : str, Rule or Composite
        How relevance is handed on.
    weight_rule : {"epsilon", "own"}
        How a layer's weights share it; see :func:`lrp.attribute`.
    start : {"logit", "one_hot", "probability"}
        Of the true class.
    aggregate : {"signed", "abs_per_sample"}
        Sum over the batch, or sum of the magnitudes of each sample's relevance,
        which takes one pass per sample.
    momentum : float
        Share of the earlier average: R <- (1 - m) R_new + m R.
    every : int
        Steps from one refresh to the next.

    Raises
    ------
    InputError

    Notes
    -----
    One refresh costs about as much as one training step. Published: "lrp", at
    the quantized weights after the optimiser moved them, every step, momentum
    0.1 (D. Becking et al., "ECQx", 2022).

    Examples
    --------
    >>> from compress.weight_relevance import WeightRelevance
    >>> WeightRelevance(every=1).at
    'quantized_jitter'
    """

    source: str = "lrp"
    at: str = "quantized_jitter"
    composite: Any = "epsilon_plus_flat"
    weight_rule: str = "epsilon"
    start: str = "logit"
    aggregate: str = "signed"
    momentum: float = 0.1
    every: int = 10

    def __post_init__(self) -> None:
        for name, allowed in (
            ("source", SOURCES), ("at", PLACES), ("weight_rule", ("epsilon", "own")),
            ("start", ("logit", "one_hot", "probability")), ("aggregate", AGGREGATES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} of the relevance is unknown",
                    expected=f"one of {', '.join(allowed)}",
                    got=repr(getattr(self, name)),
                    fix="choose one",
                )
        whole = isinstance(self.every, int) and not isinstance(self.every, bool) and self.every >= 1
        if not whole or not 0 <= self.momentum < 1:
            raise InputError(
                "a setting of the relevance makes no sense",
                expected="every a whole number from 1, 0 <= momentum < 1",
                got=f"every={self.every!r}, momentum={self.momentum!r}",
                fix="change it",
            )

    def settings(self) -> dict[str, Any]:
        return {**vars(self), "composite": str(self.composite)}


@dataclass
class Average:
    """The moving average of the weights' relevance.

    Attributes
    ----------
    how : WeightRelevance
    names : tuple of str
        Of the tensors.
    seed : int
        Of the permutations.
    """

    how: WeightRelevance
    names: tuple[str, ...]
    seed: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    _plan: Any = None
    _shape: Any = None
    _orders: dict[str, Tensor] = field(default_factory=dict)

    def update(self, found: Mapping[str, Tensor]) -> None:
        """Take in one batch.

        Raises
        ------
        NonFiniteError
        """
        m = self.how.momentum
        for name in self.names:
            new = found[name].detach()
            if self.how.source == "random":
                new = new.reshape(-1)[self._order(name, new)].view_as(new)
            old = self.values.get(name)
            self.values[name] = new.clone() if old is None else old.mul_(m).add_(new, alpha=1 - m)
        if not all(bool(torch.isfinite(r).all()) for r in self.values.values()):
            raise NonFiniteError(
                "the relevance of a weight is not finite",
                expected="finite numbers",
                got="NaN or infinity",
                fix="lower the learning rate, or look at the data",
            )

    def mean_of(self, sums: Callable[[Any, Tensor], dict[str, Tensor]], batches: Iterable[Batch]) -> None:
        """Take in all batches of all processes at once, each sample alike; ``sums`` is :meth:`sums` of a batch."""

        def found() -> tuple[dict[str, Tensor], int]:
            total: dict[str, Tensor] = {}
            count = 0
            for batch in batches:
                y = labels_of(batch, "relevance of weights")
                for name, r in sums(batch.x, y).items():
                    total[name] = total[name].add_(r) if name in total else r.clone()
                count += len(y)
            return total, count

        mean = mean_over_processes(found)
        self.values = {}
        self.update(mean)

    def sums(self, model: nn.Module, x: Any, y: Tensor) -> dict[str, Tensor]:
        """LRP's relevance of the tensors, summed over the samples of one batch of this process.

        Raises
        ------
        InputError
            If the engine finds no relevance for one of them.
        """
        with evaluating(model), _with_gradients(model):
            if self.how.aggregate == "signed":
                found = self._pass(model, x, y)
            else:
                found = {}
                for i in range(len(y)):
                    row = tuple(t[i : i + 1] for t in x) if isinstance(x, tuple) else x[i : i + 1]
                    for name, r in self._pass(model, row, y[i : i + 1]).items():
                        found[name] = found[name] + r.abs() if name in found else r.abs()
        missing = [name for name in self.names if name not in found]
        if missing:
            raise InputError(
                f"'{missing[0]}' gets no relevance",
                expected="weights that lie on the way from the input to the output",
                got=f"{len(missing)} tensors that the relevance never reaches",
                fix=f"exclude=({missing[0]!r},), or method='ecq'",
            )
        return {name: found[name] for name in self.names}

    def _pass(self, model: nn.Module, x: Any, y: Tensor) -> dict[str, Tensor]:
        import lrp

        shape = [tuple(t.shape[1:]) for t in (x if isinstance(x, tuple) else (x,))]
        if self._plan is None or self._shape != shape:
            self._plan, self._shape = lrp.prepare(model, x, self.how.composite), shape
        found = self._plan.attribute(
            x, y, wrt="weights", start=self.how.start, ledger=False, weight_rule=self.how.weight_rule
        )
        weights: dict[str, Tensor] = found.weights
        return weights

    def _order(self, name: str, like: Tensor) -> Tensor:
        if name not in self._orders:
            draw = torch.Generator().manual_seed(self.seed + self.names.index(name))
            self._orders[name] = torch.randperm(like.numel(), generator=draw).to(like.device)
        return self._orders[name]


def mean_over_processes(found: Callable[[], tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Mean over the samples of all processes of torch.distributed.

    ``found`` gives the sums over the samples of this process, and their number;
    if it raises in one process, all raise.

    Raises
    ------
    InputError
        If no process has a sample.
    DistributedError
        If another process failed.
    """
    sums: Mapping[str, Tensor] = {}
    count = 0
    with together():
        sums, count = found()
    if place()[1] == 1:
        total, n = dict(sums), float(count)
    else:
        held = {name: r.double() for name, r in sums.items()}
        with reached():
            total = sum_over_processes({**held, "": torch.tensor(count, dtype=torch.float64)})  # no parameter's name
        n = float(total[""])
    if not n:
        raise InputError(
            "the relevance is due and there is no sample",
            expected="a batch (x, y) in one process at least",
            got="none",
            fix="pass the batch of this step: quantizer.step(x, y)",
        )
    return {name: (total[name] / n).to(r.dtype) for name, r in sums.items()}


@contextlib.contextmanager
def _with_gradients(model: nn.Module) -> Iterator[None]:
    with torch.enable_grad(), torch.autocast(next(iter(model.parameters())).device.type, enabled=False):
        yield
