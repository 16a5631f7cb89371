"""Reference samples: which ones they are, and random draws of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from compress._data import batches_of
from compress.criteria.scores import Criterion
from lrp._batches import Batch
from lrp._settings import _plain
from lrp.errors import InputError

__all__ = [
    "Pool",
    "asked_with",
    "criterion_settings",
    "digests_of",
    "fingerprint",
    "pool_of",
    "reads_samples",
    "refuse_shared",
    "shared",
]

Ints = NDArray[np.int64]
_VALUES = 1024
_BITS = 256
_SHARED = 0.01  # of the smaller set: what duplicates within a public data set may explain


def digests_of(data: Any) -> list[int]:
    """A number for every sample, from its label and up to about a thousand of its values, in order of reading."""
    out: list[int] = []
    for batch in batches_of(data):
        parts = []
        for t in batch.inputs:
            flat = t.detach().reshape(len(t), -1)
            step = flat.shape[1] // _VALUES | 1  # odd: no walk along one column
            parts.append(flat[:, ::step].cpu().contiguous().view(torch.uint8).numpy())
        shape = repr([(str(t.dtype), tuple(t.shape[1:])) for t in batch.inputs]).encode()
        labels = [None] * len(parts[0]) if batch.y is None else batch.y.tolist()
        for i, y in enumerate(labels):
            digest = hashlib.sha256(shape + repr(y).encode())
            for part in parts:
                digest.update(part[i].tobytes())
            out.append(int.from_bytes(digest.digest()))
    return out


def fingerprint(data: Any) -> list[Any]:
    """Number of samples and a digest of them, whatever their order and batches; reads all data."""
    if data is None:
        return [0, ""]
    found = digests_of(data)
    return [len(found), f"{sum(found) % 2**_BITS:064x}"]


def asked_with(evaluate: Any) -> Any:
    """What tells one ``evaluate=`` from others: a fingerprint of data, or a digest of a function."""
    if hasattr(evaluate, "__iter__") or hasattr(evaluate, "__getitem__"):
        return fingerprint(evaluate)
    return _plain(evaluate)


def refuse_shared(sets: dict[str, Any]) -> None:
    """Refuse sets of samples that are not apart.

    Raises
    ------
    InputError
        If two are the same object, or share more samples than chance duplicates.
    """
    found = shared(sets)
    if found is not None:
        first, second, got = found
        raise InputError(
            f"{first} and {second} are not apart",
            expected="samples of their own: what was chosen on some samples looks better on them than it is",
            got=got,
            fix="split the data first",
        )


def shared(sets: dict[str, Any]) -> tuple[str, str, str] | None:
    """Two sets of samples that are not apart, by name, and why; None if all are. Reads all data."""
    names = [name for name, data in sets.items() if data is not None and not _is_function(data)]
    held: dict[str, set[int]] = {}
    for k, name in enumerate(names):
        for other in names[:k]:
            if sets[name] is sets[other]:
                return name, other, "the same object"
        held[name] = set(digests_of(sets[name]))
        for other in names[:k]:
            common = len(held[name] & held[other])
            if common > _SHARED * min(len(held[name]), len(held[other])):
                return name, other, f"{common} samples in common"
    return None


def _is_function(data: Any) -> bool:
    return not (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))


@dataclass(frozen=True)
class Pool:
    """Samples to draw from.

    Attributes
    ----------
    labels : array (n,) or None
    """

    labels: Ints | None
    _inputs: tuple[Tensor, ...] | None
    _data: Any
    count: int

    def batches(self, rows: Sequence[int] | Ints, size: int = 64) -> list[tuple[Any, Tensor] | Any]:
        """The samples of these rows as a list of batches, in the order given."""
        out: list[Any] = []
        for start in range(0, len(rows), size):
            part = np.asarray(rows[start : start + size], dtype=np.int64)
            if self._inputs is not None:
                at = torch.from_numpy(part)
                x: Any = tuple(t[at.to(t.device)] for t in self._inputs)
                x = x if len(x) > 1 else x[0]
            else:
                items = [self._data[int(i)] for i in part]
                x = _stacked([item[0] if isinstance(item, (tuple, list)) else item for item in items])
            out.append(x if self.labels is None else (x, torch.from_numpy(self.labels[part])))
        return out

    def draw(self, size: int, seed: Sequence[int], per_class: bool) -> Ints:
        """Rows drawn without replacement: ``size`` of every class, or in all; in random order."""
        rng = np.random.default_rng(np.random.SeedSequence(seed[0], spawn_key=tuple(seed[1:])))
        if not per_class or self.labels is None:
            return rng.permutation(self.count)[:size]
        chosen = [rng.permutation(np.flatnonzero(self.labels == c))[:size] for c in np.unique(self.labels)]
        return rng.permutation(np.concatenate(chosen))

    def check(self, sizes: Sequence[int], per_class: bool) -> None:
        """Refuse what can not be drawn.

        Raises
        ------
        InputError
        """
        for size in sizes:
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
                raise InputError(
                    "a number of samples makes no sense", expected="an int >= 1", got=repr(size), fix="change it"
                )
        if per_class and self.labels is None:
            raise InputError(
                "samples per class need labels",
                expected="samples (x, y)",
                got="samples without y",
                fix="pass labels, or stratify=False",
            )
        least, where = self.count, "in all"
        if per_class and self.labels is not None:
            classes, counts = np.unique(self.labels, return_counts=True)
            least, where = int(counts.min()), f"in class {classes[counts.argmin()]}"
        if max(sizes) > least:
            raise InputError(
                "there are too few samples to draw from",
                expected=f"at least {max(sizes)}{' per class' if per_class else ''}",
                got=f"{least} {where}",
                fix="pass more samples, or smaller sizes",
            )

    def common(self, size: int, per_class: bool) -> float:
        """Expected share of samples that two draws have in common."""
        if not per_class or self.labels is None:
            return size / self.count
        _, counts = np.unique(self.labels, return_counts=True)
        return float(np.mean(size / counts))


def pool_of(samples: Any) -> Pool:
    """A pool from tensors ``(x, y)``, a map-style data set, or batches.

    Raises
    ------
    InputError
        If the samples have none of these forms.
    """
    if isinstance(samples, Pool):
        return samples
    pair = _pair(samples)
    if pair is not None:
        return Pool(pair[1], pair[0], None, len(pair[0][0]))
    if isinstance(samples, Dataset) and hasattr(samples, "__len__"):
        return _of_dataset(samples)
    batches: list[Batch] = list(batches_of(samples, what="samples"))
    inputs = tuple(torch.cat(parts) for parts in zip(*(b.inputs for b in batches), strict=True))
    known = [b.y for b in batches if b.y is not None]
    if known and len(known) < len(batches):
        raise InputError(
            "some batches bring labels and others do not",
            expected="labels throughout, or none",
            got=f"labels in {len(known)} of {len(batches)}",
            fix="yield (x, y) throughout",
        )
    return Pool(torch.cat(known).cpu().numpy() if known else None, inputs, None, len(inputs[0]))


def _pair(samples: Any) -> tuple[tuple[Tensor, ...], Ints] | None:
    if not isinstance(samples, (tuple, list)) or len(samples) != 2:
        return None
    x, y = samples
    inputs = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dim() != 1:
        return None
    if not all(isinstance(t, Tensor) and t.dim() and len(t) == len(y) for t in inputs) or not len(y):
        return None
    return inputs, y.cpu().numpy().astype(np.int64)


def _of_dataset(samples: Any) -> Pool:
    labels = next((getattr(samples, name) for name in ("targets", "labels") if hasattr(samples, name)), None)
    n = len(samples)
    if labels is None or len(labels) != n:
        labels = list(_labels(samples, n))
    if any(y is None for y in labels):
        return Pool(None, None, samples, n)
    try:
        classes = np.asarray([int(y) for y in labels], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise InputError(
            "the labels of the data set are no classes",
            expected="one integer per sample",
            got=f"{type(labels[0]).__name__}",
            fix="pass samples (x, y) as tensors, y a LongTensor (N,)",
        ) from error
    return Pool(classes, None, samples, n)


def _labels(samples: Any, n: int) -> Iterator[Any]:
    for i in range(n):
        item = samples[i]
        yield item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None


def _stacked(items: Sequence[Any]) -> Any:
    if isinstance(items[0], (tuple, list)):
        return tuple(torch.stack(list(part)) for part in zip(*items, strict=True))
    return torch.stack(list(items))


def criterion_settings(spec: Any, criterion: Criterion) -> list[Any]:
    """What tells one criterion from others; JSON-able."""
    return [criterion.name, dict(criterion.settings), _plain(spec) if _is_users(spec) else None]


def reads_samples(spec: Any, criterion: Criterion) -> bool:
    """Whether scores may depend on the samples; of a user's function nothing is known."""
    return criterion.needs_data or _is_users(spec)


def _is_users(spec: Any) -> bool:
    return not isinstance(spec, (str, Criterion))
