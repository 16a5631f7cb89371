"""A network as the first stage of a neuralized model, and centroids behind it.

How its outputs' relevance goes back to its input is in :mod:`neuralize.deep`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrp.errors import InputError, OutputError
from neuralize.centroids import CentroidHead
from neuralize.deep import EncodedRelevance, batches, explain_encoded
from neuralize.heads import Head, numbers
from neuralize.labels import positions

__all__ = ["EncodedModel", "Encoder", "encoded"]


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


class EncodedModel(nn.Module):
    """Centroids behind an encoder, as one network; made by :func:`encoded`.

    Parameters
    ----------
    encoder : Encoder
    head : Head
        On its features.
    labels : array (K,), optional
        What ``predict`` returns for each logit; 0..K-1 (int32).
    """

    def __init__(self, encoder: Encoder, head: Head, labels: npt.ArrayLike | None = None) -> None:
        super().__init__()
        if encoder.outputs != head.features:
            raise InputError(
                "encoder and centroids do not fit each other",
                expected=f"centroids with {encoder.outputs} coordinates, as the encoder's features",
                got=f"{head.features}",
                fix="cluster the output of this very network",
            )
        self.encoder, self.head = encoder, head
        self.labels = np.arange(head.clusters, dtype=np.int32) if labels is None else np.array(labels)
        if self.labels.shape != (head.clusters,):
            raise InputError(
                "labels do not fit the centroids",
                expected=f"{head.clusters} labels",
                got=str(self.labels.shape),
                fix="pass one label per centroid, or none",
            )
        self.eval()

    def _rows(self, X: Any) -> Tensor:
        x = X if isinstance(X, Tensor) else torch.tensor(np.asarray(X))
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.encoder.inputs:
            raise InputError(
                "the samples do not fit the encoder",
                expected=f"(N, {self.encoder.inputs}) or (N, {', '.join(map(str, self.encoder.shape))})",
                got=str(tuple(x.shape)),
                fix="pass samples like the example, or flattened",
            )
        return x if x.is_floating_point() else x.to(self.encoder.dtype)

    def features(self, x: Tensor) -> Tensor:
        """Features (N, L), in the head's precision."""
        held = next(b for b in self.head.buffers() if b.is_floating_point())
        return self.encoder(x.to(device=self.encoder.device, dtype=self.encoder.dtype)).to(held)  # type: ignore[no-any-return]

    def forward(self, X: Any) -> Tensor:
        """Logits (N, K) of samples (N, ...), or of flattened rows."""
        return self.head(self.features(self._rows(X)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def predict(self, X: Any, batch_size: int | str = "auto") -> npt.NDArray[Any]:
        """Label (N,) of the nearest centroid in feature space, the lowest position on ties."""
        x = self._rows(X)
        found = [
            numbers(self.head.assign(self.features(x[rows]))[0])
            for rows in batches(len(x), batch_size, self.encoder.inputs)
        ]
        return np.asarray(self.labels[np.concatenate(found)]) if found else self.labels[:0]

    def explain(
        self,
        X: Any,
        target: Any = None,
        contrast: Any = None,
        beta: float | str = "auto",
        rule: str = "auto",
        composite: Any = None,
        *,
        hand_over: str = "relevance",
        batch_size: int | str = "auto",
    ) -> EncodedRelevance:
        """Relevance of every element of every sample; see :func:`explain_encoded`.

        ``target`` and ``contrast`` are labels; the result has positions among
        ``labels``. Values are shaped like X.
        """
        x = self._rows(X)
        t, k = (
            None if v is None else torch.from_numpy(positions(v, self.labels, len(x), n))
            for n, v in (("target", target), ("contrast", contrast))
        )
        return explain_encoded(
            self.encoder, self.head, x, t, k, beta, rule, composite, hand_over=hand_over, batch_size=batch_size
        )


def encoded(
    encoder: nn.Module,
    centroids: npt.ArrayLike,
    example: Tensor,
    labels: npt.ArrayLike | None = None,
    *,
    reference: Tensor | None = None,
) -> EncodedModel:
    """Neuralize centroids that were found in the features of a network you already have.

    Parameters
    ----------
    encoder : nn.Module
        From samples to features (N, L). Copied; used in evaluation mode.
    centroids : array (K, L)
        For example ``KMeans().fit(features).cluster_centers_``, K >= 2.
    example : Tensor (N, ...)
        One or more samples.
    labels : array (K,), optional
        What ``predict`` returns; 0..K-1.
    reference : Tensor (N, ...), optional
        Samples whose mean margin sets ``beta="auto"``; otherwise the centroids do.

    Returns
    -------
    EncodedModel

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
    torch.Size([2, 1, 8, 8])
    """
    net = EncodedModel(Encoder(encoder, example), CentroidHead(centroids), labels)
    if reference is not None:
        x = net._rows(reference)
        with torch.no_grad():
            net.head.refer([net.features(x[rows]) for rows in batches(len(x), "auto", net.encoder.inputs)])
    return net
