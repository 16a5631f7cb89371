"""Curvature: optimal brain damage with the empirical Fisher information."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from compress.criteria._layers import filters
from compress.criteria._objectives import CROSS_ENTROPY, Loss, loss_of
from compress.criteria._task import Found, Task
from compress.criteria._weight_gradients import COMPUTED, weight_gradients
from compress.criteria.gradients import _OfLoss
from compress.criteria.scores import Criterion
from lrp._settings import as_double

__all__ = ["hessian"]


class _Hessian(_OfLoss):
    @property
    def name(self) -> str:
        return "hessian"

    @property
    def settings(self) -> dict[str, Any]:
        return {"loss": super().settings["loss"]}

    def _score(self, task: Task) -> Found:
        squares: dict[str, Tensor] = {}
        samples = 0
        objective = functools.partial(loss_of, loss=self.loss, why="criterion 'hessian'")
        for n, gradients in weight_gradients(task, objective, per_sample=True):
            samples += n
            for name, g in gradients.items():
                new = as_double(g).square()
                squares[name] = squares[name].add_(new) if name in squares else new
        values = {}
        for name, total in squares.items():
            module = task.twins[name]
            values[name] = (as_double(filters(module)).square() * filters(module, total / samples)).sum(1) / 2
        return Found(values, samples=samples, otherwise=COMPUTED)


def hessian(loss: Loss = CROSS_ENTROPY) -> Criterion:
    r"""Second-order Taylor expansion of the loss about a minimum: :math:`\sum_k \frac12 h_{kk} w_k^2`.

    The diagonal of the Hessian is taken from the empirical Fisher information,
    :math:`h_{kk} = \frac1N\sum_n (\partial L_n/\partial w_k)^2` with the labels
    as they are; the sum is over the weights k of the filter. Source: LeCun et
    al. 1989, "Optimal brain damage".

    Parameters
    ----------
    loss : str or callable
        As in :func:`compress.criteria.gradient`.

    Returns
    -------
    Criterion

    Notes
    -----
    Cost: one forward and one backward pass per *sample*, since squares are
    taken of each sample's gradient; 8 bytes per weight.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> hessian()(net, [(torch.randn(5, 3), torch.randint(2, (5,)))], ["0"])
    Scores(hessian: 4 channels in 1 layers)
    """
    return _Hessian("signed", loss)
