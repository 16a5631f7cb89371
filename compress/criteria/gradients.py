"""Gradients: of the loss, or of the true class's output, at the outputs of layers or at their weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress.criteria._layers import filters
from compress.criteria._names import AGGREGATES, READ_AT
from compress.criteria._objectives import CROSS_ENTROPY, Loss, check_loss, logit, loss_of, setting
from compress.criteria._reading import Objective, Reading
from compress.criteria._sums import Sums, check_choice
from compress.criteria._task import Found, Measure, Task
from compress.criteria._weight_gradients import COMPUTED, weight_gradients
from compress.criteria.scores import Criterion
from lrp._settings import as_double

__all__ = ["gradient", "logit_x_activation", "taylor"]

CVPR2019 = "cvpr2019"


@dataclass(frozen=True, repr=False)
class _OfLoss(Measure):
    """What has a loss and an aggregate."""

    aggregate: str
    loss: Loss

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def needs_labels(self) -> bool:
        return self.loss == CROSS_ENTROPY

    @property
    def _objective(self) -> Objective:
        return functools.partial(loss_of, loss=self.loss, why=f"criterion '{self.name}'")

    @property
    def settings(self) -> dict[str, Any]:
        return {"aggregate": self.aggregate, "loss": setting(self.loss)}


def _read(task: Task, read_at: str, objective: Objective, aggregate: str, times: bool) -> Found:
    """Gradients, or activation x gradient, at the point of reading."""
    sums, reading = Sums(aggregate), Reading(task, read_at, objective)
    reading.run(lambda layer, a, g: sums.add(layer, a * g if times else g))
    return Found(sums.means(reading.samples), reading.unreached, reading.samples)


@dataclass(frozen=True, repr=False)
class _Gradient(_OfLoss):
    read_at: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("aggregate", self.aggregate, AGGREGATES)
        check_choice("read_at", self.read_at, READ_AT)

    @property
    def name(self) -> str:
        return "gradient"

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "read_at": self.read_at}

    def _score(self, task: Task) -> Found:
        return _read(task, self.read_at, self._objective, self.aggregate, times=False)


class _Taylor(_Gradient):
    @property
    def name(self) -> str:
        return "taylor"

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "on": "activation"}

    def _score(self, task: Task) -> Found:
        return _read(task, self.read_at, self._objective, self.aggregate, times=True)


class _WeightTaylor(_OfLoss):
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("aggregate", self.aggregate, (*AGGREGATES, CVPR2019))

    @property
    def name(self) -> str:
        return "taylor:weight"

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "on": "weight"}

    def _score(self, task: Task) -> Found:
        if self.aggregate == CVPR2019:
            return self._summed_first(task)
        sums, samples = Sums(self.aggregate), 0
        for n, gradients in weight_gradients(task, self._objective, per_sample=True):
            samples += n
            for name, g in gradients.items():
                products = filters(task.twins[name]) * filters(task.twins[name], g)
                sums.add(name, products.T[None])
        return Found(sums.means(samples), samples=samples, otherwise=COMPUTED)

    def _summed_first(self, task: Task) -> Found:
        total: dict[str, Tensor] = {}
        samples = 0
        for n, gradients in weight_gradients(task, self._objective, per_sample=False):
            samples += n
            for name, g in gradients.items():
                total[name] = total[name] + as_double(g) if name in total else as_double(g)
        values = {
            name: (filters(task.twins[name]) * filters(task.twins[name], g / samples)).abs().sum(1)
            for name, g in total.items()
        }
        return Found(values, samples=samples, otherwise=COMPUTED)


@dataclass(frozen=True, repr=False)
class _LogitXActivation(Measure):
    aggregate: str
    read_at: str

    def __post_init__(self) -> None:
        check_choice("aggregate", self.aggregate, AGGREGATES)
        check_choice("read_at", self.read_at, READ_AT)

    @property
    def name(self) -> str:
        return "logit_x_activation"

    @property
    def settings(self) -> dict[str, Any]:
        return {"aggregate": self.aggregate, "read_at": self.read_at}

    def _score(self, task: Task) -> Found:
        objective = functools.partial(logit, why=f"criterion '{self.name}'")
        return _read(task, self.read_at, objective, self.aggregate, times=True)


def gradient(aggregate: str = "abs_per_sample", read_at: str = "output", loss: Loss = CROSS_ENTROPY) -> Criterion:
    r"""Gradient of the loss at the layer's output, summed over positions.

    With :math:`g_{np} = \partial L_n / \partial a_{np}` the score is
    :math:`\frac1N \sum_n |\sum_p g_{np}|`, or another ``aggregate`` of it.

    Parameters
    ----------
    aggregate : str
        See :mod:`compress.criteria`. Published as a baseline (code of Yeom
        et al. 2021) is "abs_total".
    read_at : str
        "conv": what the layer gives out. "output": after its batch norm, if
        that alone reads it (where LRP with a folded batch norm reads too).
        "activated": after its elementwise activation as well.
    loss : str or callable
        "cross_entropy" to the label, or ``loss(output, y) -> (N,)``, where y
        is None for batches without labels.

    Returns
    -------
    Criterion

    Notes
    -----
    One forward and one backward pass; memory as in training, without the
    gradients of weights. What alone reads a layer is looked up in one forward
    pass of a sample.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> data = [(torch.randn(5, 3), torch.randint(2, (5,)))]
    >>> gradient()(net, data, ["0"])
    Scores(gradient: 4 channels in 1 layers)
    """
    return _Gradient(aggregate, loss, read_at)


def taylor(
    aggregate: str | None = None,
    read_at: str = "output",
    on: str | None = None,
    loss: Loss = CROSS_ENTROPY,
) -> Criterion:
    r"""First-order Taylor expansion of the loss: what a channel, or its weights, being 0 would change.

    On activations, with :math:`r_{np} = a_{np}\,\partial L_n/\partial a_{np}`,
    the score is :math:`\frac1N\sum_n|\sum_p r_{np}|` (Molchanov et al. 2017,
    arXiv 1611.06440, without the division by the number of positions). Read
    after the batch norm, its scale and shift are in it: summed over positions, r is
    :math:`\gamma\,\partial L/\partial\gamma + \beta\,\partial L/\partial\beta`.

    On weights, with :math:`r_{nk} = w_k\,\partial L_n/\partial w_k` over the
    entries k of the filter, :math:`\frac1N\sum_n\sum_k|r_{nk}|`. "cvpr2019"
    takes the magnitude of each weight after the sum over samples,
    :math:`\sum_k|w_k\,\frac1N\sum_n\partial L_n/\partial w_k|`: the form of
    torch-pruning, after Molchanov et al. 2019, arXiv 1906.10771. The two are different criteria:
    name the one that is meant.

    Parameters
    ----------
    aggregate : str
        See :mod:`compress.criteria`. "abs_per_sample" on activations and
        "abs_element" on weights, if None; published baselines take
        "abs_total" of activations, in which samples cancel.
    read_at, loss
        As in :func:`gradient`; ``read_at`` has no meaning for weights.
    on : str
        "activation" or "weight"; None: weights for "cvpr2019", else activations.

    Returns
    -------
    Criterion

    Notes
    -----
    On activations one forward and one backward pass. On weights one pass per
    *sample*, but for "cvpr2019". Filters only: biases and batch norms do not
    count there. Layers whose weight is computed are not scored.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> data = [(torch.randn(5, 3), torch.randint(2, (5,)))]
    >>> taylor()(net, data, ["0"])
    Scores(taylor: 4 channels in 1 layers)
    >>> taylor(on="weight")(net, data, ["0"])
    Scores(taylor:weight: 4 channels in 1 layers)
    """
    on = on or ("weight" if aggregate == CVPR2019 else "activation")
    check_choice("kind of Taylor expansion", on, ("activation", "weight"))
    if on == "weight":
        return _WeightTaylor(aggregate or "abs_element", loss)
    return _Taylor(aggregate or "abs_per_sample", loss, read_at)


def logit_x_activation(aggregate: str = "abs_per_sample", read_at: str = "output") -> Criterion:
    r"""Activation times the gradient of the true class's output.

    :math:`r_{np} = a_{np}\,\partial f_{y_n}/\partial a_{np}`. On a network of
    ReLUs this is LRP-epsilon from the logit, for epsilon -> 0, biases kept:
    the same score at a lower price, and a test of both.

    Parameters
    ----------
    aggregate, read_at
        As in :func:`gradient`.

    Returns
    -------
    Criterion

    Notes
    -----
    The class is the label; the largest output where batches bring none. Cost
    as for :func:`gradient`.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> logit_x_activation()(net, [torch.randn(5, 3)], ["0"])
    Scores(logit_x_activation: 4 channels in 1 layers)
    """
    return _LogitXActivation(aggregate, read_at)
