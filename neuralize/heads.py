"""What every head of a neuralized model provides: logits, relevance, and the lines behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = ["Details", "Head", "Part", "Request"]

Workspace = dict[str, Tensor]


@dataclass(frozen=True)
class Request:
    """What is to be explained, by which rule.

    Parameters
    ----------
    rule : str
        As the user asked, ``"auto"`` included.
    beta : float
        Stiffness of the softmin over competitors, per unit of output;
        ``inf`` for the nearest competitor. It does not enter a contrast.
    target : LongTensor (N,) or None
        Positions of the explained logits; None for each row's own.
    contrast : LongTensor (N,) or None
        Positions of the single competitors.
    divided : BoolTensor (N,) or None
        Rows on which the divided rule was used, once that is known.
    """

    rule: str
    beta: float
    target: Tensor | None = None
    contrast: Tensor | None = None
    divided: Tensor | None = None

    def rows(self, rows: slice) -> Request:
        """The same request for some rows."""

        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        return replace(self, target=cut(self.target), contrast=cut(self.contrast), divided=cut(self.divided))

    def to(self, device: torch.device) -> Request:
        """The same request on another device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(self, target=move(self.target), contrast=move(self.contrast), divided=move(self.divided))


@dataclass(frozen=True)
class Part:
    """Explanation of one batch, without its values.

    Parameters
    ----------
    output : Tensor (n,)
    parts : dict of Tensor (n,)
        Named parts of the residual.
    target, decided : LongTensor (n,)
        Positions of the explained logits, and of those that win.
    divided : BoolTensor (n,)
    """

    output: Tensor
    parts: dict[str, Tensor]
    target: Tensor
    decided: Tensor
    divided: Tensor


@dataclass(frozen=True)
class Details:
    r"""The lines :math:`R_t = w_t (x_t - \tau_t)` of a batch, in some units.

    Parameters
    ----------
    output : ndarray (n,)
    competitors : ndarray (n, K)
        Share of each competitor; 0 for the target.
    slope : ndarray (n, D)
        :math:`w_t`: its sign says on which side of the break-even point a
        value speaks for the target.
    break_even : ndarray (n, D)
        :math:`\tau_t`; NaN where :math:`w_t = 0`.
    """

    output: npt.NDArray[Any]
    competitors: npt.NDArray[Any]
    slope: npt.NDArray[Any]
    break_even: npt.NDArray[Any]


class Head(nn.Module):
    """The last layers of a neuralized model: from scaled values to logits.

    Subclasses implement the methods below on scaled values ``z`` (N, D), and
    :class:`neuralize.NeuralizedModel` does the rest: names, batches, units.

    Attributes
    ----------
    features, clusters : int
        D and K.
    rules : tuple of str
        The rules it knows; ``"auto"`` is the first.
    residual_names : tuple of str
        The parts of its residual, in order.
    """

    features: int
    clusters: int
    rules: ClassVar[tuple[str, ...]] = ("auto",)
    residual_names: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "squared distance"

    def forward(self, z: Tensor) -> Tensor:
        """Logits (N, K)."""
        raise NotImplementedError

    def assign(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (N,) of the decided clusters, and a number (N,) that is finite where the distances are."""
        raise NotImplementedError

    def request(self, rule: str, beta: float | str, contrast: bool) -> tuple[str, float]:
        """Checked rule and stiffness; raises ``RuleError``."""
        raise NotImplementedError

    def explain(self, z: Tensor, request: Request, out: Tensor, work: Workspace) -> Part:
        """Write the values (N, D) into ``out``; ``work`` keeps buffers between batches."""
        raise NotImplementedError

    def details(self, z: Tensor, request: Request) -> Details:
        """Competitors and lines, in scaled units."""
        raise NotImplementedError

    def refer(self, batches: Iterable[Tensor]) -> None:
        """Learn the stiffness, and the mean row, from reference rows."""
        raise NotImplementedError

    def layered(self, cluster: int) -> nn.Sequential:
        """The plain layers of one logit, from scaled values."""
        raise NotImplementedError


def buffer(work: Workspace, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
    """An uninitialised tensor that is kept between batches: fresh pages cost as much as a product."""
    held = work.get(name)
    numel = shape[0] * shape[1]
    if held is None or held.numel() < numel or held.dtype != like.dtype or held.device != like.device:
        held = work[name] = torch.empty(numel, dtype=like.dtype, device=like.device)
    return held[:numel].view(shape)


def numbers(tensor: Tensor) -> npt.NDArray[Any]:
    """As numpy, on the host."""
    return np.asarray(tensor.detach().cpu().numpy())
