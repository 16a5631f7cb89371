"""Random states that long work depends on: seeded for a while, kept on disk, put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrp.errors import MismatchError

__all__ = ["generators_of", "put_generators", "put_states", "seed_of", "seeded", "states"]


def seed_of(seed: int, *path: int) -> int:
    """A seed for one part of the work, different for each path; below 2**32."""
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1)[0])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's, numpy's and Python's global random states start at the seed, and are put back afterwards."""
    before = states(device)
    try:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  # the state that transforms of a user's data set read
        random.seed(seed)
        yield
    finally:
        put_states(before, device)


def states(device: torch.device) -> dict[str, Any]:
    """The global states as tensors and, under "plain", JSON-able values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002  # as above
    version, numbers, gauss = random.getstate()
    out: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state(device)
    out["plain"] = {
        "numpy": [str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(numbers), gauss],
    }
    return out


def put_states(held: Mapping[str, Any], device: torch.device) -> None:
    """Put back what :func:`states` returned; a state of another kind of device is left aside."""
    torch.set_rng_state(held["cpu"])
    if "cuda" in held and device.type == "cuda":
        torch.cuda.set_rng_state(held["cuda"], device)
    name, keys, position, has_gauss, cached = held["plain"]["numpy"]
    state = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)  # noqa: NPY002  # as above
    version, numbers, gauss = held["plain"]["python"]
    random.setstate((version, tuple(numbers), gauss))


def generators_of(*sources: Any) -> list[torch.Generator]:
    """Generators of loaders and their samplers, each once, in a fixed order; none for other data."""
    out: list[torch.Generator] = []
    for source in sources:
        sampler, batches = (getattr(source, name, None) for name in ("sampler", "batch_sampler"))
        for holder in (source, sampler, batches, getattr(batches, "sampler", None)):
            found = getattr(holder, "generator", None)
            if isinstance(found, torch.Generator) and all(found is not g for g in out):
                out.append(found)
    return out


def put_generators(generators: Sequence[torch.Generator], held: Sequence[Tensor]) -> None:
    """Set the generators to states taken before.

    Raises
    ------
    MismatchError
        If there is another number of them.
    """
    if len(generators) != len(held):
        raise MismatchError(
            "the loaders have other generators than before",
            expected=f"{len(held)} torch.Generator in the loaders and their samplers",
            got=f"{len(generators)}",
            fix="build the loaders as for the first start",
        )
    for generator, state in zip(generators, held, strict=True):
        generator.set_state(state)
