"""Learning from the outputs of another network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from lrp.errors import InputError

__all__ = ["Distillation", "distillation_loss"]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Divergence of the student's softened classes from the teacher's.

    .. math:: L = \frac{T^2}{N} \sum_n \mathrm{KL}\bigl(\mathrm{softmax}(t_n / T)
              \,\|\, \mathrm{softmax}(s_n / T)\bigr)

    T squared keeps the gradient's size as T grows (G. Hinton, O. Vinyals and
    J. Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531,
    2015, section 2).

    Parameters
    ----------
    student, teacher : Tensor (N, C)
        Logits.
    temperature : float
        T > 0.

    Returns
    -------
    Tensor ()

    Examples
    --------
    >>> import torch
    >>> from compress.training import distillation_loss
    >>> t = torch.tensor([[2.0, 0.0]])
    >>> round(float(distillation_loss(t, t)), 6), round(float(distillation_loss(torch.zeros(1, 2), t, 1.0)), 4)
    (0.0, 0.3278)
    """
    p = F.log_softmax(teacher / temperature, 1)
    q = F.log_softmax(student / temperature, 1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Distillation:
    """A teacher, and how much it counts.

    Parameters
    ----------
    teacher : nn.Module
        With the same outputs; usually the network before pruning. Asked in
        evaluation mode, and left as it is.
    temperature : float
    weight : float
        w in (1 - w) cross-entropy + w distillation. 1: labels are not needed.

    Raises
    ------
    InputError

    Examples
    --------
    >>> import torch
    >>> from compress.training import Distillation
    >>> Distillation(torch.nn.Linear(2, 2), temperature=2, weight=1).needs_labels
    False
    """

    teacher: nn.Module
    temperature: float = 4.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, nn.Module):
            raise InputError(
                "the teacher is no network",
                expected="an nn.Module",
                got=type(self.teacher).__name__,
                fix="pass the model before pruning",
            )
        if not self.temperature > 0 or not 0 < self.weight <= 1:
            raise InputError(
                "the distillation makes no sense",
                expected="temperature > 0 and a weight in (0, 1]",
                got=f"temperature={self.temperature}, weight={self.weight}",
                fix="for example Distillation(model, temperature=4, weight=0.5); distill=None for none",
            )

    @property
    def needs_labels(self) -> bool:
        return self.weight < 1
