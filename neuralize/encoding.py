"""A network as the first stage of a neuralized model, and centroids behind it.

How its outputs' relevance goes back to its input is in :mod:`neuralize.deep`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrp.errors import InputError, OutputError, RuleError, UnsupportedEstimatorError
from neuralize.centroids import CentroidHead
from neuralize.deep import BOOKS, HANDOVERS, planned, through_encoder
from neuralize.frames import Frame
from neuralize.heads import Details, Head, Part, Request, Workspace
from neuralize.network import NeuralizedModel
from neuralize.units import back, cut, gathered, no_line

__all__ = ["EncodedHead", "Encoder", "encoded"]


class Encoder(nn.Module):
    """A network as the first stage of a neuralized model: from rows (N, D) to features (N, L).

    Parameters
    ----------
    network : nn.Module
        Copied, put into evaluation mode, without gradients.
    example : Tensor (N, ...)
        One or more samples; only the shape counts, and that they are valid.
    source : str, optional
        Shown.

    Attributes
    ----------
    shape : tuple of int
        Of one sample.
    inputs, outputs : int
        D, the number of its elements, and L.

    Examples
    --------
    >>> stage = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), torch.zeros(1, 2, 3))
    >>> stage.inputs, stage.outputs, stage(torch.zeros(5, 6)).shape
    (6, 2, torch.Size([5, 2]))
    """

    def __init__(self, network: nn.Module, example: Tensor, source: str | None = None) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InputError(
                "the encoder is no network", expected="an nn.Module", got=type(network).__name__, fix="pass one"
            )
        if not isinstance(example, Tensor) or example.ndim < 2 or not len(example):
            raise InputError(
                "the example is no batch of samples",
                expected="a tensor (N, ...), N >= 1",
                got=str(tuple(example.shape)) if isinstance(example, Tensor) else type(example).__name__,
                fix="pass one sample, with a batch axis",
            )
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.shape = tuple(int(s) for s in example.shape[1:])
        self.inputs = math.prod(self.shape)
        self.source = type(network).__name__ if source is None else source
        with torch.no_grad():
            features = self(example[:1].to(device=self.device, dtype=self.dtype))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 1:
            raise OutputError(
                f"{self.source} returns no features",
                expected="a tensor (N, L)",
                got=str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__,
                fix="end it with a pool and nn.Flatten(), for example",
            )
        self.outputs = int(features.shape[1])

    @property
    def _held(self) -> Tensor | None:
        return next((p for p in self.network.parameters() if p.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the features."""
        return torch.float64 if self._held is None else self._held.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._held is None else self._held.device

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, L) of rows (N, D), or of samples (N, \\*shape)."""
        if tuple(x.shape[1:]) != self.shape:
            x = x.reshape(x.shape[0], *self.shape)
        return self.network(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.source}: {self.shape} -> {self.outputs} features"


class EncodedHead(Head):
    r"""A head on the features of a network: :math:`f_c(\Phi(x))`.

    Parameters
    ----------
    encoder : Encoder
    head : Head
        On its features.
    composite : str, lrp rule or lrp.Composite, optional
        Rules of the encoder; see :func:`neuralize.deep.explain_encoded`.
    hand_over : {"relevance", "coefficient"}
        What the head gives to the encoder; see :mod:`neuralize.deep`.

    Notes
    -----
    It has no break-even points: the columns act through a network.
    """

    def __init__(self, encoder: Encoder, head: Head, *, composite: Any = None, hand_over: str = "relevance") -> None:
        super().__init__()
        if encoder.outputs != head.features:
            raise InputError(
                "encoder and centroids do not fit each other",
                expected=f"centroids with {encoder.outputs} coordinates, as the encoder's features",
                got=f"{head.features}",
                fix="cluster the output of this very network",
            )
        if hand_over not in HANDOVERS:
            raise RuleError(
                "unknown hand_over", expected=f"one of {', '.join(HANDOVERS)}", got=repr(hand_over), fix="choose one"
            )
        self.encoder, self.head = encoder, head
        self.composite, self.hand_over = composite, hand_over
        self.features, self.clusters = encoder.inputs, head.clusters
        self.rules, self.kind, self.unit = head.rules, head.kind, f"{head.unit} of the features"
        handed = ("root",) if hand_over == "coefficient" else ()
        self.residual_names = (*head.residual_names, *handed, *(f"encoder {name}" for name in BOOKS))

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.encoder.shape

    def codes(self, z: Tensor) -> Tensor:
        """Features (N, L) of rows (N, D), in the head's precision."""
        there = next(b for b in self.head.buffers() if b.is_floating_point())
        return self.encoder(z.to(device=self.encoder.device, dtype=self.encoder.dtype)).to(there)  # type: ignore[no-any-return]

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.codes(z))  # type: ignore[no-any-return]

    def assign(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.assign(self.codes(z))

    def request(self, rule: str, beta: float | str, contrast: bool, output: str = "logit") -> tuple[str, float]:
        return self.head.request(rule, beta, contrast, output)

    def explain(self, z: Tensor, request: Request, out: Tensor, work: Workspace, frame: Frame) -> Part:
        if frame.mixes:
            raise UnsupportedEstimatorError(
                "an encoder behind steps that mix columns can't be passed exactly",
                expected="steps that keep columns apart: scalers, encoders, imputers, selection",
                got="a projection in front of a network",
                fix="make the projection the first layer of the network",
            )
        x = z.to(device=self.encoder.device, dtype=self.encoder.dtype).reshape(len(z), *self.encoder.shape)
        plan = planned(self.encoder.network, x[:1], self.composite, self.hand_over)
        with torch.enable_grad():
            values, _, part = through_encoder(plan, self.head, x, request, self.hand_over)
        R = values.reshape(len(z), -1).to(out)
        found, lost = gathered(frame, [cut(R, block) for block in frame.parts()])
        out.copy_(found)
        if lost is not None:
            part.parts[frame.lost_name] = lost
        return part

    def details(self, z: Tensor, request: Request, frame: Frame) -> Details:
        codes = self.codes(z)
        inner = self.head.details(codes, request, Frame.identity(codes.shape[1]).to(codes.device))
        lines = [no_line(back(cut(z, block), block)) for block in frame.parts()]
        return Details(inner.output, inner.competitors, lines, inner.rho)

    def refer(self, batches: Iterable[Tensor]) -> None:
        self.head.refer(self.codes(z) for z in batches)

    def prototypes(self) -> npt.NDArray[Any] | None:
        return self.head.prototypes()

    @property
    def width(self) -> int:
        # activations of a network, several layers of them
        return max(16 * self.features, self.head.width)

    def beta_counts(self, request: Request) -> bool:
        return self.head.beta_counts(request)


def encoded(
    encoder: nn.Module,
    centroids: npt.ArrayLike | Head,
    example: Tensor,
    labels: npt.ArrayLike | None = None,
    *,
    reference: Any = None,
    composite: Any = None,
    hand_over: str = "relevance",
) -> NeuralizedModel:
    """Neuralize centroids that were found in the features of a network you already have.

    Parameters
    ----------
    encoder : nn.Module
        From samples to features (N, L). Copied; used in evaluation mode.
    centroids : array (K, L) or Head
        For example ``KMeans().fit(features).cluster_centers_``, K >= 2; or the
        head of any neuralized model of the features, ``neuralize(fitted).head``.
    example : Tensor (N, ...)
        One or more samples.
    labels : array (K,), optional
        What ``predict`` returns; 0..K-1.
    reference : array (N, ...), optional
        Samples whose mean margin sets ``beta="auto"``; otherwise the centroids do.
    composite, hand_over
        See :class:`EncodedHead`.

    Returns
    -------
    NeuralizedModel
        It takes samples (N, ...) or flattened rows (N, D); its values are
        flattened, (N, D).

    Examples
    --------
    >>> from sklearn.cluster import KMeans
    >>> _ = torch.manual_seed(0)
    >>> network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    >>> pictures = torch.rand(40, 1, 8, 8, dtype=torch.float64)
    >>> found = KMeans(3, n_init=1, random_state=0).fit(network(pictures).detach().numpy())
    >>> net = encoded(network, found.cluster_centers_, pictures)
    >>> bool((net.predict(pictures) == found.labels_).all())
    True
    >>> net.explain(pictures[:2]).values.shape
    (2, 64)
    """
    inner = centroids if isinstance(centroids, Head) else CentroidHead(centroids)
    head = EncodedHead(Encoder(encoder, example), inner, composite=composite, hand_over=hand_over)
    if labels is not None and np.shape(labels) != (head.clusters,):
        raise InputError(
            "labels do not fit the centroids",
            expected=f"{head.clusters} labels",
            got=str(np.shape(labels)),
            fix="pass one label per centroid, or none",
        )
    net = NeuralizedModel(head, labels=labels, source=f"centroids behind {head.encoder.source}")
    return net if reference is None else net.set_reference(reference)
