"""Activations: how much leaves a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.criteria._names import AGGREGATES, READ_AT
from compress.criteria._reading import Reading
from compress.criteria._sums import Sums, check_choice
from compress.criteria._task import Found, Measure, Task
from compress.criteria.scores import Criterion

__all__ = ["activation"]


@dataclass(frozen=True, repr=False)
class _Activation(Measure):
    aggregate: str
    read_at: str

    def __post_init__(self) -> None:
        check_choice("aggregate", self.aggregate, AGGREGATES)
        check_choice("read_at", self.read_at, READ_AT)

    @property
    def name(self) -> str:
        return "activation"

    @property
    def settings(self) -> dict[str, Any]:
        return {"aggregate": self.aggregate, "read_at": self.read_at}

    def _score(self, task: Task) -> Found:
        sums, reading = Sums(self.aggregate), Reading(task, self.read_at)
        reading.run(lambda layer, a, _: sums.add(layer, a / a.shape[1]))
        return Found(sums.means(reading.samples), samples=reading.samples)


def activation(aggregate: str = "abs_element", read_at: str = "activated") -> Criterion:
    r"""Mean magnitude of what leaves a layer, over all samples and positions.

    :math:`\frac1N\sum_n\frac1P\sum_p|a_{np}|`.

    Parameters
    ----------
    aggregate : str
        See :mod:`compress.criteria`, where c is the activation divided by the
        number of positions.
    read_at : str
        As in :func:`compress.criteria.gradient`. "activated": after the batch
        norm and the elementwise activation that alone read the layer. Where an
        addition or a concatenation comes first, before that.

    Returns
    -------
    Criterion

    Notes
    -----
    One forward pass; needs no labels. A module that is used again counts all
    its uses.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> bool((activation()(net, [torch.randn(5, 3)], ["0"]).values["0"] >= 0).all())
    True
    """
    return _Activation(aggregate, read_at)
