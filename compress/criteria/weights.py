"""Criteria of the weights alone: norms, batch-norm scales, distances between filters, chance."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.criteria._base import Base, choose
from compress.criteria._reading import followers
from compress.criteria.scores import Scores, width_of
from lrp.errors import InputError

__all__ = ["batchnorm_scale", "fpgm", "random", "weight"]


def filters_of(module: nn.Module) -> Tensor:
    """Weights of each output channel as rows (C, rest), float64; transposed layers hold them the other way round."""
    w = module.weight
    assert isinstance(w, Tensor)
    w = w.detach().double()
    if getattr(module, "transposed", False):
        groups = int(getattr(module, "groups", 1))
        parts = w.reshape(groups, w.shape[0] // groups, *w.shape[1:]).transpose(1, 2)
        w = parts.reshape(groups * parts.shape[1], *parts.shape[2:])
    return w.flatten(1)


class _Weight(Base):
    needs_data = False

    def scored(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        device: torch.device,
        progress: bool,
        structure: Any,
        example_inputs: Any,
    ) -> Scores:
        norms = followers(model, layers, example_inputs) if self.settings["fold"] == "batchnorm" else {}
        modules = dict(model.named_modules())
        values = {}
        for name in layers:
            rows = filters_of(modules[name])
            size = rows.abs().sum(1) if self.settings["norm"] == "l1" else rows.square().sum(1).sqrt()
            values[name] = size * _scale(modules[norms[name]]) if name in norms else size
        return Scores(values, {}, self.name, self.settings)


def _scale(bn: nn.Module) -> Tensor:
    """What a batch norm multiplies its channels by, as a magnitude."""
    var, eps = bn.running_var, float(bn.eps)  # type: ignore[arg-type]  # a Module's attributes are untyped
    assert isinstance(var, Tensor)
    scale = (var.detach().double() + eps).rsqrt()
    return scale * bn.weight.detach().double().abs() if isinstance(bn.weight, Tensor) else scale


def weight(norm: str = "l1", fold: str = "none") -> Base:
    """Norm of each filter (Li et al. 2017, arXiv 1608.08710); needs no data.

    Parameters
    ----------
    norm : "l1" or "l2"
    fold : "none" or "batchnorm"
        Times the factor of the batch norm behind; then ``example_inputs`` are
        needed, to see which one that is.
    """
    settings = {"norm": choose("norm", norm, ("l1", "l2")), "fold": choose("fold", fold, ("none", "batchnorm"))}
    return _Weight("weight", settings)


class _BatchNormScale(Base):
    needs_data = False

    def scored(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        device: torch.device,
        progress: bool,
        structure: Any,
        example_inputs: Any,
    ) -> Scores:
        norms = followers(model, layers, example_inputs)
        values, unscored = {}, {}
        for name in layers:
            bn = model.get_submodule(norms[name]) if name in norms else None
            if bn is None or not isinstance(bn.weight, Tensor):
                unscored[name] = "no batch norm with a scale follows it"
            else:
                values[name] = bn.weight.detach().double().abs()
        return Scores(values, unscored, self.name, self.settings)


def batchnorm_scale() -> Base:
    """Magnitude of the scale of the batch norm behind each filter (Liu et al. 2017, arXiv 1708.06519).

    Layers without one have no score. Needs ``example_inputs``, to see which
    batch norm follows which layer.
    """
    return _BatchNormScale("batchnorm_scale", {})


class _FPGM(Base):
    needs_data = False

    def scored(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        device: torch.device,
        progress: bool,
        structure: Any,
        example_inputs: Any,
    ) -> Scores:
        values = {}
        for name in layers:
            rows = filters_of(model.get_submodule(name))
            values[name] = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
        return Scores(values, {}, self.name, self.settings)


def fpgm() -> Base:
    """Sum of the euclidean distances to the other filters of the layer (He et al. 2019, arXiv 1811.00250, eq. 4).

    The filter nearest to the geometric median, which the others can replace,
    goes first. Cost O(C² · rest) per layer. Needs no data.
    """
    return _FPGM("fpgm", {})


class _Random(Base):
    needs_data = False

    def scored(
        self,
        model: nn.Module,
        data: Any,
        layers: Sequence[str],
        device: torch.device,
        progress: bool,
        structure: Any,
        example_inputs: Any,
    ) -> Scores:
        values = {}
        for name in layers:
            text = f"{self.settings['seed']}/{name}".encode()
            seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
            generator = torch.Generator().manual_seed(seed)
            width = width_of(model.get_submodule(name))
            values[name] = torch.rand(width, generator=generator, dtype=torch.float64)
        return Scores(values, {}, self.name, self.settings)


def random(seed: int | str = 0) -> Base:
    """Uniform numbers, the same for the same seed and layer name: the control of every comparison."""
    try:
        number = int(seed)
    except (TypeError, ValueError) as error:
        raise InputError(
            "the seed is no number", expected="an int", got=repr(seed), fix="for example random:3"
        ) from error
    return _Random("random", {"seed": number})
