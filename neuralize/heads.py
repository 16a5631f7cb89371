"""What every head of a neuralized model provides: logits, relevance, and the lines behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrp.errors import RuleError, TargetError, UnsupportedEstimatorError
from neuralize.frames import Frame
from neuralize.units import Line, Picked

__all__ = ["Details", "Head", "Part", "Request"]

Workspace = dict[str, Tensor]
Polytope = tuple[Tensor, Tensor]

# who knows a rule, for the message where it is asked of somebody else
_OWNERS = {
    "gi": "support vector machines and k-nearest neighbours",
    "hybrid": "support vector machines and k-nearest neighbours",
    "divided": "hard minima over pairs",
    "shapley": "centroid models",
    "midpoint": "centroid models and support vector machines",
    "undivided": "pools over competitors",
}


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
    output : str
        "logit", or "decision": the estimator's own decision value.
    """

    rule: str
    beta: float
    target: Tensor | None = None
    contrast: Tensor | None = None
    divided: Tensor | None = None
    output: str = "logit"

    def rows(self, rows: slice | Tensor) -> Request:
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
    notes : dict of BoolTensor (n,)
        Rows with something to know about, by its name.
    """

    output: Tensor
    parts: dict[str, Tensor]
    target: Tensor
    decided: Tensor
    divided: Tensor
    notes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Details:
    """What is behind an explanation of a batch.

    Parameters
    ----------
    output : Tensor (n,)
    competitors : Tensor (n, K)
        Share of each competitor; 0 for the target.
    lines : list of Line
        One per block of the frame, in the coordinates it leads to.
    rho : Tensor (n, M) or Picked, optional
        Signed shares of the prototypes, where the head has any.
    """

    output: Tensor
    competitors: Tensor
    lines: list[Line]
    rho: Tensor | Picked | None = None


class Head(nn.Module):
    """The last layers of a neuralized model: from scaled values to logits.

    Subclasses implement the methods below on values ``z`` (N, d), and
    :class:`neuralize.NeuralizedModel` does the rest: names, batches, units,
    and the way back through preprocessing, which comes as a frame.

    Attributes
    ----------
    features, clusters : int
        d, and the number of logits K.
    rules : tuple of str
        The rules it knows; ``"auto"`` is the first.
    residual_names : tuple of str
        The parts of its residual, in order.
    unit : str
        What one unit of the output is.
    kind : str
        What the logits stand for; see :class:`neuralize.Explanation`.
    """

    features: int
    clusters: int
    rules: tuple[str, ...] = ("auto",)
    residual_names: tuple[str, ...] = ()
    unit: str = "squared distance"
    kind: str = "cluster"
    outputs: ClassVar[tuple[str, ...]] = ("logit", "decision")

    def forward(self, z: Tensor) -> Tensor:
        """Logits (N, K)."""
        raise NotImplementedError

    def assign(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (N,) of the decided clusters, and a number (N,) that is finite where the distances are."""
        raise NotImplementedError

    def request(self, rule: str, beta: float | str, contrast: bool, output: str = "logit") -> tuple[str, float]:
        """Checked rule and stiffness; raises ``RuleError``."""
        if rule not in self.rules:
            known = ", ".join(self.rules)
            if rule in _OWNERS:
                raise RuleError(
                    f"rule {rule!r} belongs to {_OWNERS[rule]}",
                    expected=f"one of {known} for this model",
                    got=rule,
                    fix="use rule='auto'",
                )
            raise RuleError("unknown rule", expected=f"one of {known}", got=repr(rule), fix="choose one")
        return rule, self.default_beta(rule, contrast) if beta == "auto" else stiffness(beta)

    def default_beta(self, rule: str, contrast: bool) -> float:
        """The stiffness "auto" stands for."""
        raise NotImplementedError

    def explain(self, z: Tensor, request: Request, out: Tensor, work: Workspace, frame: Frame) -> Part:
        """Write the values (N, D) into ``out``; ``work`` keeps buffers between batches."""
        raise NotImplementedError

    def details(self, z: Tensor, request: Request, frame: Frame) -> Details:
        """Competitors, lines and prototypes."""
        raise NotImplementedError

    def refer(self, batches: Iterable[Tensor]) -> None:
        """Learn the stiffness, and the mean row, from reference rows."""
        raise NotImplementedError

    def layered(self, cluster: int) -> nn.Sequential:
        """The plain layers of one logit, from scaled values."""
        raise UnsupportedEstimatorError(
            "this model has no plain layers beyond those it shows",
            expected="a centroid model",
            got=type(self).__name__,
            fix="its own layers are net.head",
        )

    def cells(self, cluster: int) -> list[Polytope] | None:
        """Where a cluster wins: a union of polytopes {A z + b >= 0}; None if its borders are curved."""
        return None

    def prototypes(self) -> npt.NDArray[Any] | None:
        """Names of the units behind ``Details.rho`` (M,); None where they are no prototypes."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation."""
        return next(b.dtype for b in self.buffers() if b.is_floating_point())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample; rows of a table but for networks that take pictures."""
        return (self.features,)

    @property
    def non_negative(self) -> bool:
        """Whether it is defined for coordinates >= 0 only."""
        return False

    @property
    def width(self) -> int:
        """Numbers per row that its widest layer holds."""
        return max(self.features, self.clusters)

    @property
    def level(self) -> float:
        """The reference value of a regression; else 0."""
        return 0.0

    def set_level(self, level: float) -> None:
        """Compare a regression with another reference value."""
        raise RuleError(
            "only regressions have a reference value",
            expected="a regression, such as SVR",
            got=f"a network that decides a {self.kind}",
            fix="choose target= and contrast= in explain",
        )

    def unit_of(self, output: str) -> str:
        """What one unit of an output is."""
        return self.unit

    def beta_counts(self, request: Request) -> bool:
        """Whether the stiffness enters the explanation."""
        return request.contrast is None


def stiffness(beta: Any) -> float:
    """A checked number > 0."""
    if isinstance(beta, str):
        raise RuleError("unknown beta", expected="'auto' or a number > 0", got=repr(beta), fix="choose one")
    try:
        value = float(beta)
    except (TypeError, ValueError):
        value = math.nan
    except OverflowError:  # an integer beyond floating point; its digits would fill the message
        value, beta = math.nan, "an integer beyond 1e308"
    if isinstance(beta, bool) or not value > 0:
        raise RuleError(
            "beta is no stiffness", expected="'auto', a number > 0 or inf", got=repr(beta), fix="choose one"
        )
    return value


def nearest_only(rule: str, beta: float, contrast: bool) -> None:
    """Raise ``RuleError`` where the midpoint rule, which has one competitor, is asked for soft shares."""
    if rule == "midpoint" and not contrast and math.isfinite(beta):
        raise RuleError(
            "rule 'midpoint' has only the nearest competitor",
            expected="beta 'auto' or inf",
            got=f"{beta:g}",
            fix="use rule='undivided' for soft shares of all competitors",
        )


def distinct(target: Tensor, contrast: Tensor | None) -> None:
    """Raise ``TargetError`` where a cluster is compared with itself."""
    if contrast is not None and bool((same := target == contrast).any()):
        raise TargetError(
            "target and contrast are the same label",
            expected="two different labels in every row",
            got=f"{int(same.sum())} rows of a batch of {len(target)} with a label against itself",
            fix="pass target= as well, or explain only rows of other labels: X[net.predict(X) != contrast]",
        )


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
