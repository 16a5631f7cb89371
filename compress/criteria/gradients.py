"""Criteria of activations and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress._data import labels_of
from compress.criteria._base import AGGREGATES, Base, aggregated, channels_first, choose, frozen_copy
from compress.criteria._reading import Activations, Taps, followers
from compress.criteria.scores import Scores
from compress.criteria.weights import filters_of
from lrp._batches import Batch
from lrp.errors import InputError

__all__ = ["activation", "gradient", "logit_x_activation", "taylor"]

READ_AT = ("output", "conv")


def _places(model: nn.Module, layers: Sequence[str], read_at: str, data: Any, device: torch.device) -> dict[str, str]:
    """Layer to the module where it is read."""
    from compress._data import batches_of

    if read_at == "conv":
        return {name: name for name in layers}
    first = next(iter(batches_of(data)))
    behind = followers(model, layers, tuple(t[:2] for t in first.inputs))
    return {name: behind.get(name, name) for name in layers}


def _output(model: nn.Module, batch: Batch) -> Tensor:
    out = model(*batch.inputs)
    if not isinstance(out, Tensor) or out.dim() != 2:
        raise InputError(
            "the model's output has no class axis",
            expected="logits of shape (N, classes)",
            got=f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__,
            fix="wrap the model so that it returns logits, or use a criterion without a loss",
        )
    return out


def _check_labels(logits: Tensor, y: Tensor) -> Tensor:
    if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
        raise InputError(
            "a label is no class of the model",
            expected=f"0 to {logits.shape[1] - 1}",
            got=f"{int(y.min())} to {int(y.max())}",
            fix="check the labels of the data",
        )
    return y


class _Product(Base):
    """Sum over space of activation^p times the gradient of the loss or of the logit."""

    needs_labels = True

    def __init__(self, name: str, aggregate: str, read_at: str, of: str, times_activation: bool) -> None:
        settings = {
            "aggregate": choose("aggregate", aggregate, AGGREGATES),
            "read_at": choose("read_at", read_at, READ_AT),
        }
        super().__init__(name, settings)
        self._of, self._times = of, times_activation

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
        places = _places(model, layers, self.settings["read_at"], data, device)
        twin = frozen_copy(model, device)
        taps = Taps(twin, places, differentiable=True)
        sums: dict[str, Tensor] = {}
        count = 0
        for batch in self.batches(data, device, progress):
            taps.clear()
            with torch.enable_grad():
                logits = _output(twin, batch)
                y = _check_labels(logits, labels_of(batch, self.name))
                if self._of == "loss":
                    start = F.cross_entropy(logits, y, reduction="sum")
                else:
                    start = logits.gather(1, y[:, None]).sum()
                at = [(name, t) for name, read in taps.outputs.items() for t in read]
                gradients = torch.autograd.grad(start, [t for _, t in at], allow_unused=True)
            count += len(y)
            for (name, t), g in zip(at, gradients, strict=True):
                if g is None:
                    continue
                product = (t * g if self._times else g).detach()
                own = aggregated(channels_first(product, twin.get_submodule(places[name])), self.settings["aggregate"])
                sums[name] = sums[name] + own if name in sums else own
        final: Callable[[Tensor], Tensor] = torch.abs if self.settings["aggregate"] == "abs_total" else lambda t: t
        values = {name: final(t) / count for name, t in sums.items()}
        unscored = {name: "the loss does not depend on it" for name in layers if name not in values}
        return Scores(values, unscored, self.name, self.settings, count)


def gradient(aggregate: str = "abs_per_sample", read_at: str = "output") -> Base:
    """Gradient of the cross-entropy with respect to a filter's output, summed over space.

    Parameters
    ----------
    aggregate : str
        "abs_per_sample"; "abs_total", the form of Yeom et al. 2021's code,
        where samples of opposite sign cancel; "abs_element"; "signed".
    read_at : "output" or "conv"
        Behind the batch norm that follows, if any, or before it.
    """
    return _Product("gradient", aggregate, read_at, "loss", False)


def logit_x_activation(aggregate: str = "abs_per_sample", read_at: str = "output") -> Base:
    """Activation times the gradient of the label's logit.

    On a network of ReLUs with folded batch norms this is LRP-epsilon with the
    bias kept, up to the stabiliser.
    """
    return _Product("logit_x_activation", aggregate, read_at, "logit", True)


class _WeightTaylor(Base):
    """Sum over a filter of |w dL/dw|, of one sample's loss or of the whole batch's."""

    needs_labels = True

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
        per_sample = self.settings["aggregate"] == "abs_per_sample"
        sums: dict[str, Tensor] = {}
        count = 0
        for gradients, n in weight_gradients(self, model, data, layers, device, progress, per_sample):
            count += n
            for name, (module, g) in gradients.items():
                product = filters_of(module) * g
                product = product.abs() if per_sample else product
                sums[name] = sums[name] + product if name in sums else product
        values = {name: t.abs().sum(1) / count for name, t in sums.items()}
        unscored = {name: "the loss does not depend on it" for name in layers if name not in values}
        return Scores(values, unscored, self.name, self.settings, count)


def weight_gradients(
    criterion: Base,
    model: nn.Module,
    data: Any,
    layers: Sequence[str],
    device: torch.device,
    progress: bool,
    per_sample: bool,
) -> Any:
    """Yield ({layer: (module, gradient of the loss as rows (C, rest), float64)}, samples)."""
    twin = frozen_copy(model, device)
    modules = {name: twin.get_submodule(name) for name in layers}
    weights = {}
    for name, module in modules.items():
        assert isinstance(module.weight, Tensor)
        weights[name] = module.weight.requires_grad_(True)
    for batch in criterion.batches(data, device, progress):
        y = labels_of(batch, criterion.name)
        for k in range(len(y)) if per_sample else (slice(None),):
            part = slice(k, k + 1) if isinstance(k, int) else k
            with torch.enable_grad():
                logits = _output(twin, Batch(tuple(t[part] for t in batch.inputs), None))
                loss = F.cross_entropy(logits, _check_labels(logits, y[part]), reduction="sum")
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            out = {}
            for (name, w), g in zip(weights.items(), found, strict=True):
                if g is not None:
                    out[name] = (modules[name], _rows(modules[name], g, w))
            yield out, len(y[part])


class _Holder(nn.Module):
    def __init__(self, weight: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.transposed = bool(getattr(like, "transposed", False))
        self.groups = int(getattr(like, "groups", 1))


def _rows(module: nn.Module, g: Tensor, w: Tensor) -> Tensor:
    return filters_of(_Holder(g.detach().reshape(w.shape), module))


def taylor(form: str = "activation", aggregate: str = "abs_per_sample", read_at: str = "output") -> Base:
    """First-order change of the loss when a filter goes.

    Parameters
    ----------
    form : "activation" or "weight"
        "activation": sum over space of a · dL/da (Molchanov et al. 2017, arXiv
        1611.06440, eq. 7); "weight": sum over the filter of |w · dL/dw|
        (Molchanov et al. 2019, arXiv 1906.10771).
    aggregate : str
        Of the activation form as in :func:`gradient`; "abs_total" is the form of
        Yeom et al.'s code. Of the weight form "abs_per_sample" (a pass per
        sample) or "abs_total" (the gradient of the summed loss).
    read_at : "output" or "conv"
        Of the activation form.
    """
    if choose("form", form, ("activation", "weight")) == "activation":
        return _Product("taylor", aggregate, read_at, "loss", True)
    settings = {"form": "weight", "aggregate": choose("aggregate", aggregate, ("abs_per_sample", "abs_total"))}
    return _WeightTaylor("taylor", settings)


class _Activation(Base):
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
        read_at = self.settings["read_at"]
        places = _places(model, layers, "conv" if read_at == "conv" else "output", data, device)
        twin = frozen_copy(model, device)
        sums: dict[str, Tensor] = {}
        used: dict[str, int] = {}
        samples = 0

        def add(name: str, t: Tensor) -> None:
            t = channels_first(t.detach(), twin.get_submodule(places[name])).double()
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=t.device)) + t.abs().sum((0, 2))
            used[name] = used.get(name, 0) + t.shape[0] * t.shape[2]

        mode = Activations(add)
        for name, place in places.items():

            def hook(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    if read_at == "activation":
                        mode.expect(name, output)
                    else:
                        add(name, output)

            twin.get_submodule(place).register_forward_hook(hook)
        for batch in self.batches(data, device, progress):
            with torch.no_grad(), mode:
                twin(*batch.inputs)
            for t, name in mode.rest():
                add(name, t)
            samples += batch.inputs[0].shape[0]
        values = {name: t / used[name] for name, t in sums.items()}
        unscored = {name: "it is not used" for name in layers if name not in values}
        return Scores(values, unscored, self.name, self.settings, samples)


def activation(read_at: str = "activation") -> Base:
    """Mean magnitude of what a filter gives, over samples and space; needs no labels.

    Parameters
    ----------
    read_at : "activation", "output" or "conv"
        Behind the elementwise function that takes the layer's output (its ReLU),
        behind its batch norm, or at the layer itself.
    """
    return _Activation("activation", {"read_at": choose("read_at", read_at, ("activation", *READ_AT))})
