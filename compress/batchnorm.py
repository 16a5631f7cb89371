r"""Batch-norm statistics of a network whose channels have changed.

Every BatchNorm layer sees, in one pass over the data, the batches it would see
in training: layers before it normalise by the statistics of the batch. The
mean and the variance of all its inputs are pooled over the batches,

.. math:: m = \sum_b n_b m_b / n, \qquad
          v = \Bigl(\sum_b n_b v_b + \sum_b n_b (m_b - m)^2\Bigr) / (n - 1),

with n_b values per channel in batch b, n their sum, and m_b, v_b mean and
biased variance of the batch. So batches of any sizes count by their samples.
torch's own cumulative average (``momentum=None``) gives each batch the same
weight and leaves out how far the means of batches lie apart.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress._data import batches_of, check_reiterable, device_of, outputs_of
from compress._modes import evaluating
from lrp._settings import as_double
from lrp.errors import InputError, NonFiniteError

__all__ = ["reestimate", "reestimate_"]


class _Pool:
    """Count, mean and sum of squared deviations per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.batches = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        rows = as_double(x.detach().transpose(0, 1).flatten(1))
        n = rows.shape[1]
        mean = rows.mean(1)
        squares = (rows - mean[:, None]).square().sum(1)
        if not self.count:
            self.mean, self.squares = mean, squares
        else:
            # pairwise update (Chan, Golub, LeVeque 1979): differences of large squares would cancel
            shift = mean - self.mean
            total = self.count + n
            self.mean = self.mean + shift * (n / total)
            self.squares = self.squares + squares + shift.square() * (self.count * n / total)
        self.count += n
        self.batches += 1

    @property
    def variance(self) -> Tensor:
        return self.squares / (self.count - 1)


def reestimate(model: nn.Module, data: Any, *, device: torch.device | str | None = None) -> nn.Module:
    """A copy whose BatchNorm1d, 2d and 3d layers hold the statistics of the data.

    Labels are not used. Dropout and everything else stay in evaluation mode;
    layers without running statistics, and layers the data do not reach, stay
    as they are. Weights do not change.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    data : iterable
        A DataLoader or list that yields ``x`` or ``(x, y)``.
    device : torch.device or str, optional
        Batches are moved there; the model's own if not given.

    Returns
    -------
    nn.Module
        Training flags and frozen parameters as in the model.

    Raises
    ------
    InputError
        If a layer meets a batch with a single value per channel, or the data
        have no known form.
    NonFiniteError
        If an input of a layer is NaN or infinite.

    Notes
    -----
    See the module's text for the formula. As torch keeps it, the running
    variance is the unbiased one. For a single batch, the result is what a
    training pass with ``momentum=1`` leaves. Cost: one forward pass in float64
    statistics; a network without such layers is copied, and the data are not
    read.

    Examples
    --------
    >>> import torch
    >>> from compress.batchnorm import reestimate
    >>> net = torch.nn.BatchNorm1d(1)
    >>> new = reestimate(net, [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [5.0]])])
    >>> new.running_mean, new.running_var, net.running_mean
    (tensor([3.]), tensor([2.5000]), tensor([0.]))
    """
    out = copy.deepcopy(model)
    reestimate_(out, data, device=device)
    return out


def reestimate_(model: nn.Module, data: Any, *, device: torch.device | str | None = None) -> None:
    """The same in place, for a model that is a copy already; on an error nothing has changed."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not layers:
        return
    data = check_reiterable(data)
    before = {name: _statistics(layer) for name, layer in layers.items()}
    pools = {name: _Pool() for name in layers}
    handles = []
    try:
        with evaluating(model), torch.no_grad():
            for name, layer in layers.items():
                handles.append(layer.register_forward_pre_hook(_recorder(name, layer, pools[name])))
                layer.training = True  # of this module only: subclasses hold activations and dropout
            for batch in batches_of(data, device_of(model, device)):
                outputs_of(model, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            _put(layer, before[name])
    for name, pool in pools.items():
        if pool.count:
            _put(layers[name], {"running_mean": pool.mean, "running_var": pool.variance, "batches": pool.batches})


def _statistics(layer: _BatchNorm) -> dict[str, Any]:
    tracked = layer.num_batches_tracked
    held = {"running_mean": layer.running_mean, "running_var": layer.running_var}
    out: dict[str, Any] = {key: t.clone() for key, t in held.items() if t is not None}
    out["batches"] = None if tracked is None else int(tracked)
    return out


def _put(layer: _BatchNorm, statistics: dict[str, Any]) -> None:
    with torch.no_grad():
        for key in ("running_mean", "running_var"):
            held = getattr(layer, key)
            held.copy_(statistics[key].to(held.device))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(statistics["batches"])


def _recorder(name: str, layer: _BatchNorm, pool: _Pool) -> Any:
    def record(module: nn.Module, given: tuple[Any, ...]) -> None:
        x: Tensor = given[0]
        values = x.numel() // max(1, layer.num_features)
        if values < 2:
            raise InputError(
                f"batch normalisation '{name}' meets a single value per channel, which has no variance",
                expected="batches of several samples",
                got=f"an input of shape {tuple(x.shape)}",
                fix="use larger batches, and drop_last=True where the last one holds a single sample",
            )
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                f"an input of batch normalisation '{name}' is not finite",
                expected="finite activations",
                got=f"{int((~torch.isfinite(x)).sum())} of {x.numel()} NaN or infinite",
                fix="check the data, then the weights before this layer",
            )
        pool.add(x)

    return record
