"""Ablation: what the network loses without a filter, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import batches_of, outputs_of
from compress.criteria._names import READ_AT
from compress.criteria._objectives import CROSS_ENTROPY, logit, loss_of
from compress.criteria._paths import Call, follow
from compress.criteria._reading import Tap, tapped
from compress.criteria._sums import check_choice
from compress.criteria._task import Found, Measure, Task
from compress.criteria.scores import Criterion
from compress.cutting import channel_axis, width_of
from lrp._batches import Batch
from lrp._settings import as_double

__all__ = ["ablation"]


@dataclass(frozen=True, repr=False)
class _Ablation(Measure):
    measure: str
    read_at: str

    def __post_init__(self) -> None:
        check_choice("measure", self.measure, ("logit", "loss"))
        check_choice("read_at", self.read_at, READ_AT)

    @property
    def name(self) -> str:
        return f"ablation:{self.measure}"

    @property
    def needs_labels(self) -> bool:
        return self.measure == "loss"

    @property
    def settings(self) -> dict[str, Any]:
        return {"measure": self.measure, "read_at": self.read_at}

    def _worth(self, output: Any, batch: Batch) -> Tensor:
        """What falls when something important is missing, (N,)."""
        why = f"criterion '{self.name}'"
        if self.measure == "logit":
            return as_double(logit(output, batch, why))
        return -as_double(loss_of(output, batch, CROSS_ENTROPY, why))

    def _score(self, task: Task) -> Found:
        from tqdm import tqdm

        twin, layers = task.twin, task.twins
        paths = follow(twin, layers, task.example)
        called = [name for name in layers if any(call[0] == name for call in paths)]
        values = {name: torch.zeros(width_of(layers[name]), dtype=torch.float64) for name in called}
        samples = 0
        batches = [self._labelled(twin, batch) for batch in batches_of(task.data, task.device)]
        total = len(batches) * sum(len(t) for t in values.values())
        with tqdm(total=total, desc=self.name, unit="pass", disable=None if task.progress else True) as bar:
            for batch in batches:
                whole = self._worth(outputs_of(twin, batch.inputs), batch)
                samples += len(whole)
                for name, sums in values.items():
                    for channel in range(len(sums)):
                        with tapped({name: layers[name]}, paths, self.read_at, _without(layers[name], channel)):
                            left = self._worth(outputs_of(twin, batch.inputs), batch)
                        sums[channel] += (whole - left).sum().cpu()
                        bar.update()
        return Found({name: t / samples for name, t in values.items()}, samples=samples)

    def _labelled(self, twin: nn.Module, batch: Batch) -> Batch:
        """The batch; without labels, with the classes that the whole network finds."""
        if batch.y is not None or self.measure == "loss":
            return batch
        output = outputs_of(twin, batch.inputs)
        return Batch(batch.x, output.argmax(1)) if isinstance(output, Tensor) and output.dim() == 2 else batch


def _without(module: nn.Module, channel: int) -> Tap:
    """Sets a channel of what is read to 0."""

    def act(call: Call, value: Tensor, changed: bool) -> Tensor:
        return value.index_fill(channel_axis(module, value), torch.tensor([channel], device=value.device), 0)

    return act


def ablation(measure: str = "logit", read_at: str = "output") -> Criterion:
    r"""Drop of the true class's output when a filter's output is set to 0: the truth that scores estimate.

    :math:`\frac1N\sum_n f_{y_n}(x_n) - f^{\setminus c}_{y_n}(x_n)`, signed: a
    filter without which the network does better has a score below 0. With
    "loss", the rise of the cross-entropy.

    Parameters
    ----------
    measure : str
        "logit" or "loss".
    read_at : str
        What is set to 0; as in :func:`compress.criteria.gradient`. At "output",
        after the batch norm, this is what removing the channel does, apart
        from other layers that share it.

    Returns
    -------
    Criterion

    Notes
    -----
    Cost: one forward pass over all data per *filter*. For small networks and
    few samples; the bar says how long it takes. All data are held in memory.
    The class is the label; the largest output where batches bring none.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> for p, value in zip(net.parameters(), ([[1.0, 0], [0, 1]], [0.0, 0], [[3.0, -1]], [0.0])):
    ...     p.data = torch.tensor(value)
    >>> ablation()(net, [(torch.ones(1, 2), torch.tensor([0]))], ["0"]).values["0"].tolist()
    [3.0, -1.0]
    """
    return _Ablation(measure, read_at)
