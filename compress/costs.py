"""What a network costs: channels, filters, multiply-adds, parameters, bytes; and how each falls when channels go."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.cutting import scaled_axis
from compress.groups import Channels, Group, Structure, as_inputs, is_depthwise, is_weighted, kind_of

__all__ = ["CostTable", "Costs", "count"]

Axis = tuple[str, str]


@dataclass(frozen=True)
class Costs:
    """Of one network, for one sample.

    Attributes
    ----------
    channels : int
        Channels of the groups that can be pruned; coupled ones count once.
    filters : int
        Output channels of all convolutions and linear layers, prunable or not.
    macs : int
        Multiply-adds of one sample: convolutions, linear layers, matrix products.
    params : int
        Entries of all parameters.
    bytes : int
        Of all tensors of the state; the header of a file comes on top.
    latency_ms : float or None
        Median, where it was measured.
    file_bytes : int or None
        Of the file that :func:`compress.save` writes, header and plan included;
        known where it was the target.
    """

    channels: int
    filters: int
    macs: int
    params: int
    bytes: int
    latency_ms: float | None = None
    file_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Costs:
        latency = stored.get("latency_ms")
        channels, filters, macs, params, size = (
            int(stored[n]) for n in ("channels", "filters", "macs", "params", "bytes")
        )
        known = None if latency is None else float(latency)
        file_bytes = stored.get("file_bytes")
        return cls(channels, filters, macs, params, size, known, None if file_bytes is None else int(file_bytes))

    def __str__(self) -> str:
        parts = [f"{self.channels:,} prunable channels", f"{self.filters:,} filters", f"{self.macs:,} MACs"]
        parts += [f"{self.params:,} parameters", f"{self.bytes:,} bytes"]
        if self.file_bytes is not None:
            parts[-1] += f" ({self.file_bytes:,} in the file)"
        if self.latency_ms is not None:
            parts.append(f"{self.latency_ms:.3g} ms")
        return ", ".join(parts)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the state: its shape, and which axis of which layer each dimension follows."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    follows: tuple[tuple[str, str, int] | None, ...]  # layer, axis, in how many equal parts

    def size(self, gone: Mapping[Axis, int]) -> int:
        out = 1
        for n, source in zip(self.shape, self.follows, strict=True):
            out *= n if source is None else n - gone.get((source[0], source[1]), 0) // source[2]
        return out


@dataclass(frozen=True)
class _Layer:
    weight: str
    positions: int  # how often each weight is used for one sample
    filters: int


class CostTable:
    """Costs of a network as a function of what is removed from it; no pass is needed to ask.

    Parameters
    ----------
    structure : Structure
    tensors, layers, other_macs
        See :meth:`of`.

    Examples
    --------
    >>> import torch
    >>> from compress import find_groups
    >>> from compress.costs import CostTable
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    >>> table = CostTable.of(net, torch.randn(1, 4), find_groups(net, torch.randn(1, 4)))
    >>> table.costs({}).macs, table.costs({"0": [0, 3]}).macs
    (36, 24)
    """

    def __init__(
        self, structure: Structure, tensors: Mapping[str, _Entry], layers: Mapping[str, _Layer], other_macs: int
    ) -> None:
        self.structure = structure
        self._tensors, self._layers, self._other = dict(tensors), dict(layers), other_macs
        self._users: dict[Axis, list[str]] = defaultdict(list)
        for name, entry in self._tensors.items():
            for source in entry.follows:
                if source is not None:
                    self._users[source[0], source[1]].append(name)
        self._uses: dict[str, list[str]] = defaultdict(list)
        for layer, row in self._layers.items():
            if row.weight:  # a weight that is computed has no tensor of its own, and its products count as constant
                self._uses[row.weight].append(layer)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CostTable):
            return NotImplemented
        return self.structure == other.structure and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]  # it holds dicts

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, structure: Structure) -> CostTable:
        """Measured by one forward pass of a copy.

        Multiply-adds of a layer are its weight's entries times the positions
        they are used at; what torch's own counter finds beyond (products of
        two activations in attention) is constant.
        """
        positions, total, samples = _positions(model, as_inputs(example_inputs))
        tensors, layers = {}, {}
        sources = _sources(model, structure)
        trained = {name for name, _ in model.named_parameters()}
        first: dict[int, str] = {}  # a tensor of two names shrinks under both
        for name, t in model.state_dict(keep_vars=True).items():
            own = first.setdefault(id(t), name)
            follows = sources.get(name, sources.get(own, (None,) * t.dim()))
            tensors[name] = _Entry(tuple(t.shape), t.element_size(), name in trained, follows)
        explained = 0
        for name, uses in positions.items():
            module = model.get_submodule(name)
            weight = f"{name}.weight" if name else "weight"
            filters = int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))
            known = weight in tensors
            layers[name] = _Layer(weight if known else "", uses // samples, filters)
            explained += uses // samples * tensors[weight].size({}) if known else 0
        return cls(structure, tensors, layers, max(0, total // samples - explained))

    def costs(self, removed: Mapping[str, Iterable[int]]) -> Costs:
        """Of the network without the removed channels (group name to channels)."""
        state = self.running()
        for name, channels in removed.items():
            state.take(self.structure[name], tuple(channels))
        return state.costs()

    def running(self) -> Running:
        """Costs that follow, step by step, what is taken and given back."""
        return Running(self)

    def layer_macs(self, removed: Mapping[str, Iterable[int]]) -> dict[str, int]:
        """Multiply-adds of every convolution and linear layer."""
        state = self.running()
        for name, channels in removed.items():
            state.take(self.structure[name], tuple(channels))
        weights = {n: row for n, row in self._layers.items() if row.weight}
        return {n: row.positions * self._tensors[row.weight].size(state._gone) for n, row in weights.items()}

    def widths(self, removed: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, int]]:
        """Output channels of every convolution and linear layer, before and after."""
        gone: Counter[str] = Counter()
        for name, channels in removed.items():
            chosen = tuple(channels)
            for m in self.structure[name].members:
                if m.axis == "out" and m.layer in self._layers:
                    gone[m.layer] += len(m.of(chosen))
        return {name: (row.filters, row.filters - gone[name]) for name, row in self._layers.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the state, before anything is removed."""
        return {name: entry.shape for name, entry in self._tensors.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": {
                n: [list(e.shape), e.itemsize, e.trained, [f and list(f) for f in e.follows]]
                for n, e in self._tensors.items()
            },
            "layers": {n: [row.weight, row.positions, row.filters] for n, row in self._layers.items()},
            "other_macs": self._other,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], structure: Structure) -> CostTable:
        tensors = {}
        for name, (shape, itemsize, trained, follows) in stored["tensors"].items():
            sources = tuple(None if f is None else (str(f[0]), str(f[1]), int(f[2])) for f in follows)
            tensors[name] = _Entry(tuple(int(n) for n in shape), int(itemsize), bool(trained), sources)
        layers = {n: _Layer(str(w), int(p), int(f)) for n, (w, p, f) in stored["layers"].items()}
        return cls(structure, tensors, layers, int(stored["other_macs"]))


class Running:
    """Costs while channels are taken and given back; each step costs as much as the tensors it touches."""

    def __init__(self, table: CostTable) -> None:
        self._table = table
        self._gone: dict[Axis, int] = {}
        self._sizes = {name: entry.size({}) for name, entry in table._tensors.items()}
        self.channels = sum(g.width for g in table.structure.prunable)
        self.filters = sum(row.filters for row in table._layers.values())
        self.params = sum(n for name, n in self._sizes.items() if table._tensors[name].trained)
        self.bytes = sum(n * table._tensors[name].itemsize for name, n in self._sizes.items())
        used = (row for row in table._layers.values() if row.weight)
        self.macs = table._other + sum(row.positions * self._sizes[row.weight] for row in used)

    def take(self, group: Group, channels: Channels) -> None:
        """Without these channels of a group."""
        self._move(group, channels, 1)

    def give(self, group: Group, channels: Channels) -> None:
        """With these channels again."""
        self._move(group, channels, -1)

    def costs(self) -> Costs:
        return Costs(self.channels, self.filters, self.macs, self.params, self.bytes)

    def _move(self, group: Group, channels: Channels, sign: int) -> None:
        table = self._table
        touched: set[str] = set()
        self.channels -= sign * len(channels)
        for member in group.members:
            axis = (member.layer, member.axis)
            n = sum(len(member.index[j]) for j in channels)
            self._gone[axis] = self._gone.get(axis, 0) + sign * n
            touched.update(table._users.get(axis, ()))
            if member.axis == "out" and member.layer in table._layers:
                self.filters -= sign * n
        for name in touched:
            entry = table._tensors[name]
            size = entry.size(self._gone)
            change = size - self._sizes[name]
            self._sizes[name] = size
            self.bytes += change * entry.itemsize
            if entry.trained:
                self.params += change
            for layer in table._uses.get(name, ()):
                self.macs += change * table._layers[layer].positions


def count(model: nn.Module, example_inputs: Any, structure: Structure | None = None) -> Costs:
    """Costs of a network as it is, by one forward pass of a copy.

    Parameters
    ----------
    model : nn.Module
    example_inputs : Tensor or tuple
    structure : Structure, optional
        For ``channels``; without it they are 0.

    Returns
    -------
    Costs

    Examples
    --------
    >>> import torch
    >>> from compress.costs import count
    >>> count(torch.nn.Conv2d(3, 8, 3), torch.randn(1, 3, 10, 10)).macs
    13824
    """
    return CostTable.of(model, example_inputs, structure or Structure(())).costs({})


def _positions(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, int], int, int]:
    """Uses of every weight, all multiply-adds, and samples, in one pass."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    twin = copy.deepcopy(model).eval()
    uses: Counter[str] = Counter()

    def hook(name: str) -> Any:
        def record(module: nn.Module, given: Sequence[Tensor], output: Any) -> None:
            if isinstance(output, Tensor):
                transposed = getattr(module, "transposed", False)
                t = given[0] if transposed else output
                width = getattr(module, "in_channels" if transposed else "out_channels", 0) or t.shape[-1]
                uses[name] += t.numel() // width

        return record

    for name, module in twin.named_modules():
        if is_weighted(kind_of(module)) and isinstance(getattr(module, "weight", None), Tensor):
            module.register_forward_hook(hook(name))
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    moved = tuple(t.to(device) if isinstance(t, Tensor) else t for t in inputs)
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention hides its products from the counter
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            twin(*moved)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    samples = next((t.shape[0] for t in moved if isinstance(t, Tensor) and t.dim()), 1)
    return dict(uses), counter.get_total_flops() // 2, max(1, samples)


def _sources(model: nn.Module, structure: Structure) -> dict[str, tuple[tuple[str, str, int] | None, ...]]:
    """Tensor name to what each of its dimensions follows."""
    out: dict[str, tuple[tuple[str, str, int] | None, ...]] = {}
    axes: dict[str, set[str]] = defaultdict(set)
    for group in structure.groups:
        for m in group.members:
            axes[m.layer].add(m.axis)
    parameters = dict(model.named_parameters())
    for layer, known in axes.items():
        if "parameter" in known:
            p = parameters[layer]
            out[layer] = tuple((layer, "parameter", 1) if k == scaled_axis(p) else None for k in range(p.dim()))
            continue
        module = model.get_submodule(layer)
        weighted = is_weighted(kind_of(module))
        parts = getattr(module, "groups", 1) if weighted else 1
        depthwise = weighted and is_depthwise(module)
        for short, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            name = f"{layer}.{short}" if layer else short
            if t.dim() == 0:
                continue
            if not weighted:
                # a norm or an elementwise scale: its channels are the last entries of its shape
                out[name] = (*(None,) * (t.dim() - 1), (layer, "out" if "out" in known else "in", 1))
            elif t.dim() == 1:
                out[name] = ((layer, "out", 1),)
            elif getattr(module, "transposed", False):
                out[name] = ((layer, "in", 1), (layer, "out", parts), *(None,) * (t.dim() - 2))
            else:
                second = None if depthwise else (layer, "in", parts)
                out[name] = ((layer, "out", 1), second, *(None,) * (t.dim() - 2))
    return out
