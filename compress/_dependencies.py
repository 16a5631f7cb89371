"""The one place that knows torch-pruning: its dependency graph and its cutting functions."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import tensors_of
from compress.groups import UNSEEN, Channels, Group, Member, Structure, as_inputs, is_depthwise, is_weighted, kind_of
from lrp.errors import LRPError, StructureError

__all__ = ["cut_axis", "importance_scores", "trace", "version"]

#: where layers that are no convolution and no linear layer hold their width
WIDTHS = ("num_features", "num_channels", "normalized_shape", "num_parameters")

Key = tuple[Any, str]  # a node of the graph and one of its axes


def version() -> str:
    """The installed version; the package's own attribute is wrong in 1.6.1."""
    return importlib.metadata.version("torch-pruning")


def _graph(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, nn.Module]:
    """torch-pruning's graph of a copy in which everything requires a gradient: frozen layers are layers too."""
    import torch_pruning as tp

    twin = copy.deepcopy(model).eval()
    for p in twin.parameters():
        p.requires_grad_(p.is_floating_point())
    graph = tp.DependencyGraph()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                twin,
                inputs,
                forward_fn=lambda m, x: m(*x),
                output_transform=lambda out: [t for t in tensors_of(out) if t.grad_fn is not None],
                unwrapped_parameters=[],  # the default of torch-pruning is shared between graphs
                verbose=False,
            )
    except LRPError:
        raise
    except Exception as error:
        raise StructureError(
            f"the graph of {type(model).__name__} can not be traced",
            expected="a forward pass on example_inputs that autograd can follow",
            got=f"{type(error).__name__}: {error}",
            fix="call the model with the example inputs; if that works, its channels move in a way that the graph of "
            "torch-pruning can not follow",
        ) from error
    return graph, twin


class _Union:
    """Which channels belong together."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, j: int) -> int:
        while self.parent[j] != j:
            self.parent[j] = self.parent[self.parent[j]]
            j = self.parent[j]
        return j

    def join(self, i: int, j: int) -> None:
        a, b = self.find(i), self.find(j)
        self.parent[max(a, b)] = min(a, b)

    def sets(self) -> tuple[Channels, ...]:
        out: dict[int, list[int]] = defaultdict(list)
        for j in range(len(self.parent)):
            out[self.find(j)].append(j)
        return tuple(tuple(unit) for unit in out.values())


def trace(model: nn.Module, example_inputs: Any) -> Structure:
    """Groups of a model with the protection that the graph alone tells.

    Every channel of a layer is followed through the graph with its origin, so
    that channels of one layer that meet somewhere (gated pairs, concatenations
    that are added) become one unit.
    """
    graph, twin = _graph(model, as_inputs(example_inputs))
    from torch_pruning.dependency import index_mapping

    index_mapping.update_index_mapping(graph)
    names = {m: name for name, m in twin.named_modules()}
    names |= graph._param_to_name
    ends = {node for node in graph.module2node.values() if not node.outputs or node.type == graph.ops.OPTYPE.OUTPUT}
    fixed = _fixed_layers(twin)
    largest = max((n for m in twin.modules() for n in _axes(m)), default=0)
    groups: list[Group] = []
    done: set[str] = set()
    for name, module in twin.named_modules():
        if name in done or module not in graph.module2node or not _is_root(graph, module):
            continue
        pruner = graph.get_pruner_of_module(module)
        width = pruner.get_out_channels(module)
        if not width:
            continue
        union = _Union(width)
        reached, lost = _closure(graph, module, width, union, largest)
        if width == 1:
            reached = {key: where for key, where in reached.items() if key[0].module is module}
        group, reason = _group(name, width, reached, union, names, ends, fixed)
        reason = reason or lost
        done |= set(group.producers)
        if name not in group.producers:
            continue
        if len(group.units) == 1:
            reason = reason or ("it has one channel" if width == 1 else "all its channels are tied to each other")
        groups.append(Group(group.name, width, group.units, group.members, reason))
    return Structure(_with_unseen(twin, groups, done))


def _with_unseen(model: nn.Module, groups: Sequence[Group], done: set[str]) -> tuple[Group, ...]:
    """Groups, and layers that the graph does not hold as groups of their own that stay; in the order of the modules."""
    out = {g.name: g for g in groups}
    for name, module in model.named_modules():
        width = getattr(module, "out_channels", 0) or getattr(module, "out_features", 0)
        if name in done or not is_weighted(kind_of(module)) or not isinstance(width, int) or not width:
            continue
        own = tuple((j,) for j in range(width))
        member = Member(name, "out", kind_of(module), own)
        out.setdefault(name, Group(name, width, own, (member,), UNSEEN))
    order = {name: k for k, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted(out.values(), key=lambda g: order[g.name]))


def _is_root(graph: Any, module: nn.Module) -> bool:
    return isinstance(module, (graph.ops.TORCH_CONV, graph.ops.TORCH_LINEAR))


def _axes(module: nn.Module) -> tuple[int, ...]:
    """Channels in and out of a convolution or a linear layer."""
    sizes = (getattr(module, n, 0) for n in ("in_channels", "out_channels", "in_features", "out_features"))
    return tuple(n for n in sizes if isinstance(n, int))


def _makes_one(graph: Any, dependency: Any) -> bool:
    """Whether it leads to the output of a layer that has one channel."""
    module = dependency.target.module
    if not (_is_root(graph, module) and graph.is_out_channel_pruning_fn(dependency.handler)):
        return False
    return 1 in (getattr(module, "out_channels", 0), getattr(module, "out_features", 0))


def _closure(
    graph: Any, module: nn.Module, width: int, union: _Union, largest: int
) -> tuple[dict[Key, dict[int, int]], str]:
    """Node and axis to {index there: channel of the root}, all that removing them would touch; and what is wrong.

    An index that a second channel reaches ties the two and is followed no
    further: what lies beyond belongs to both. So the cost is linear in what is
    reached, also where every channel reaches every other.
    """
    from torch_pruning import _helpers

    pruner = graph.get_pruner_of_module(module)
    handler: Callable[..., Any] = pruner.prune_out_channels
    if is_depthwise(module):
        handler = graph.REGISTERED_PRUNERS[graph.ops.OPTYPE.DEPTHWISE_CONV].prune_out_channels
    start = [_helpers._HybridIndex(idx=j, root_idx=j) for j in range(width)]
    reached: dict[Key, dict[int, int]] = {}
    stack = [(graph.module2node[module], handler, start)]
    while stack:
        node, fn, indices = stack.pop()
        # a function that is both an in- and an out-function belongs to a layer whose two axes are one
        axis = "out" if graph.is_out_channel_pruning_fn(fn) else "in"
        seen = reached.setdefault((node, axis), {})
        fresh = []
        for i in indices:
            if i.idx in seen:
                union.join(seen[i.idx], i.root_idx)
            else:
                seen[i.idx] = i.root_idx
                fresh.append(i)
        if not fresh:
            continue
        if max(i.idx for i in fresh) >= largest:  # maps of a cycle multiply without end
            return reached, "its channels can not be followed through the graph"
        for dependency in node.dependencies:
            if width > 1 and _makes_one(graph, dependency):
                continue  # a map of one channel is spread over all of them: it is no part of any
            if dependency.is_triggered_by(fn):
                mapped = fresh
                for mapping in dependency.index_mapping:
                    if mapping is not None:
                        mapped = mapping(mapped)
                if mapped:
                    stack.append((dependency.target, dependency.handler, mapped))
    return reached, ""


def _group(
    name: str,
    width: int,
    reached: dict[Key, dict[int, int]],
    union: _Union,
    names: Mapping[Any, str],
    ends: set[Any],
    fixed: Mapping[str, str],
) -> tuple[Group, str]:
    members: list[Member] = []
    reason = ""
    for (node, axis), where in reached.items():
        if node in ends and (axis == "out" or node.module not in names):
            reason = reason or "its channels are the network's output"
        if node.module not in names or getattr(node.module, "num_parameters", 0) == 1:  # one slope serves all
            continue
        layer = names[node.module]
        reason = reason or fixed.get(layer, "")
        if getattr(node.module, "groups", 1) == getattr(node.module, "out_channels", 0) > 1 and not is_depthwise(
            node.module
        ):
            reason = reason or f"'{layer}' makes one channel of each part: the graph takes it for a depthwise layer"
        index: list[list[int]] = [[] for _ in range(width)]
        for i, j in where.items():
            index[j].append(i)
        kind = "parameter" if isinstance(node.module, nn.Parameter) else axis
        members.append(Member(layer, kind, kind_of(node.module), tuple(tuple(sorted(i)) for i in index)))
        if kind != "parameter":
            _tie(union, node.module, axis, members[-1])
    order = {member: k for k, member in enumerate(names.values())}
    members.sort(key=lambda m: (order[m.layer], m.axis != "in"))
    return Group(name, width, union.sets(), tuple(members)), reason


def _tie(union: _Union, module: nn.Module, axis: str, member: Member) -> None:
    """Layers that work on equal parts of the channels lose the same number from each part: one position from all."""
    parts = getattr(module, "num_groups", 1) if isinstance(module, nn.GroupNorm) else getattr(module, "groups", 1)
    if not isinstance(parts, int) or parts <= 1:
        return
    if is_depthwise(module):
        return
    total = sum(len(i) for i in member.index)
    size = total // parts
    if not size:
        return
    at: dict[int, int] = {}
    for j, entries in enumerate(member.index):
        for i in entries:
            at[i] = j
    for i, j in at.items():
        other = at.get(i % size)
        if other is not None:
            union.join(j, other)


def _fixed_layers(model: nn.Module) -> dict[str, str]:
    """Layers whose parameters can not be replaced one by one."""
    out: dict[str, str] = {}
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=True):
        if (
            nn.utils.parametrize.is_parametrized(module)
            or hasattr(module, "weight_g")
            or hasattr(module, "weight_orig")
        ):
            out[name] = "its weight is computed (a parametrisation or an old-style hook)"
        for p in module._parameters.values():
            if p is not None:
                holders[id(p)].append(name)
    for layers in holders.values():
        if len(layers) > 1:
            out |= {name: f"it shares a parameter with '{(set(layers) - {name}).pop()}'" for name in set(layers)}
    return out


def cut_axis(module: nn.Module, axis: str, entries: Iterable[int]) -> None:
    """Remove entries of one axis of a module, in place; parameters become new objects with the flags of the old."""
    import torch_pruning as tp

    gone = sorted(entries)
    frozen = {name: p.requires_grad for name, p in module.named_parameters(recurse=False)}
    kind = tp.ops.module2type(module)
    if kind == tp.ops.OPTYPE.DEPTHWISE_CONV and not is_depthwise(module):
        kind = tp.ops.OPTYPE.CONV  # one output per group, but several inputs
    pruner = tp.pruner.function.PrunerBox.get(kind)
    if pruner is None:
        raise StructureError(
            f"channels of a {type(module).__name__} can not be removed",
            expected="a layer that torch-pruning knows",
            got=type(module).__name__,
            fix="protect the group it belongs to",
        )
    if not is_weighted(kind_of(module)) and not isinstance(module, nn.Embedding):
        _cut_entries(module, gone)
        return
    (pruner.prune_out_channels if axis == "out" else pruner.prune_in_channels)(module, gone)
    for name, p in module.named_parameters(recurse=False):
        p.requires_grad_(frozen[name])


def _cut_entries(module: nn.Module, gone: Sequence[int]) -> None:
    """The same for a norm or an elementwise layer; torch-pruning forgets statistics and may change the order."""
    attribute = next(n for n in WIDTHS if hasattr(module, n))
    old = getattr(module, attribute)
    width = old[-1] if isinstance(old, tuple) else old
    keep = torch.tensor(sorted(set(range(width)) - set(gone)))
    for name, p in list(module.named_parameters(recurse=False)):
        new = p.detach().index_select(p.dim() - 1, keep.to(p.device))
        setattr(module, name, nn.Parameter(new, requires_grad=p.requires_grad))
    for name, b in list(module.named_buffers(recurse=False)):
        if b.dim():
            setattr(module, name, b.index_select(b.dim() - 1, keep.to(b.device)))
    setattr(module, attribute, (*old[:-1], len(keep)) if isinstance(old, tuple) else len(keep))


def importance_scores(
    model: nn.Module,
    example_inputs: Any,
    importance: Any,
    structure: Structure,
    loss: Callable[[nn.Module], Any] | None,
) -> dict[str, Tensor]:
    """Scores of whole groups by one of torch-pruning's importances; group name to (width,).

    ``loss`` runs on the copy that is scored, after the graph is traced, and
    leaves gradients there, for importances that need them.
    """
    graph, twin = _graph(model, as_inputs(example_inputs))
    if loss is not None:
        with torch.enable_grad():
            loss(twin)
    modules = dict(twin.named_modules())
    out: dict[str, Tensor] = {}
    for g in structure.prunable:
        root = modules[g.name]
        pruner = graph.get_pruner_of_module(root)
        score = importance(graph.get_pruning_group(root, pruner.prune_out_channels, list(range(g.width))))
        if score is not None:
            out[g.name] = torch.as_tensor(score).detach().double().cpu()
    return out
