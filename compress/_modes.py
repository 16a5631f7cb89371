"""Training flags of a network: set for a while, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "modes_kept"]


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module's ``training`` is afterwards what it was before."""
    flags = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode within the block."""
    with modes_kept(model):
        model.eval()
        yield
