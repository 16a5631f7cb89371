"""The one place that knows torch-pruning: its dependency graph and its cutting functions."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import tensors_of
from compress._passes import Calls, Heads, Places, place, thin_copy
from compress.groups import (
    TRAINING_ONLY,
    UNSEEN,
    Channels,
    Group,
    Member,
    Structure,
    as_inputs,
    is_depthwise,
    is_weighted,
    kind_of,
)
from lrp.errors import LRPError, StructureError

__all__ = ["cut_axes", "importance_scores", "trace", "version"]

#: where layers that are no convolution and no linear layer hold their width
WIDTHS = ("num_features", "num_channels", "normalized_shape", "num_parameters")

Key = tuple[Any, str]  # a node of the graph and one of its axes


def version() -> str:
    """The installed version; the package's own attribute is wrong in 1.6.1."""
    return importlib.metadata.version("torch-pruning")


def _graph(model: nn.Module, inputs: tuple[Any, ...], heads: Heads) -> tuple[Any, nn.Module, dict[Any, str]]:
    """torch-pruning's graph of a copy, the copy, and the modules in which its operations are."""
    import torch_pruning as tp

    twin = thin_copy(model)
    places: dict[Any, str] = {}

    def forward(net: nn.Module, x: tuple[Any, ...]) -> Any:
        with Calls(heads.start(net)) as calls, Places(calls) as found:
            out = net(*x)
        places.update(found.of)
        return out

    for careful in (False, True):
        graph = tp.DependencyGraph()
        if careful:
            _bar_shuffles(graph)
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                graph.build_dependency(
                    twin,
                    inputs,
                    forward_fn=forward,
                    output_transform=lambda out: [t for t in tensors_of(out) if t.grad_fn is not None],
                    unwrapped_parameters=[],  # the default of torch-pruning is shared between graphs
                    verbose=False,
                )
        except LRPError:
            raise
        except Exception as error:
            if not careful and isinstance(error, ZeroDivisionError):
                continue  # what torch-pruning makes of a shuffle of channels, which it takes for a flattening
            raise StructureError(
                f"the graph of {type(model).__name__} can not be traced",
                expected="a forward pass on example_inputs that autograd can follow",
                got=f"{type(error).__name__}: {error}",
                fix="call the model with the example inputs; if that works, its channels move in a way that the graph "
                "of torch-pruning can not follow",
            ) from error
        break
    return graph, twin, places


def _bar_shuffles(graph: Any) -> None:
    """Before its indices are mapped, take a graph's regrouping views out of its reshapes."""
    build, types = graph._build_dependency, graph.ops.OPTYPE

    def built(nodes: Mapping[Any, Any]) -> None:
        build(nodes)
        for node in nodes.values():
            if node.type == types.RESHAPE and _movement(node.grad_fn):
                node.type = types.ELEMENTWISE

    graph._build_dependency = built


def _is_barred(node: Any, graph: Any) -> bool:
    return isinstance(node.module, graph.ops._ReshapeOp) and node.type != graph.ops.OPTYPE.RESHAPE


def _movement(operation: Any) -> str:
    """What an operation does to the order of channels, in words; empty if nothing is known."""
    name = operation.name().partition("Backward")[0] if hasattr(operation, "name") else ""
    if not hasattr(operation, "_input_metadata") or not operation._input_metadata:
        return ""
    after = tuple(operation._input_metadata[0].shape)

    def has(attribute: str) -> bool:
        dims = getattr(operation, attribute, ())
        signed = (d - 2**64 if d >= 2**63 else d for d in (dims if isinstance(dims, tuple) else (dims,)))
        return 1 in {d % len(after) for d in signed}

    if name == "ConstantPadNd":
        first = 2 * (len(after) - 2)
        return "padded with zeros" if any(operation._saved_pad[first : first + 2]) else ""
    if name in ("Flip", "Roll"):
        return ("reversed" if name == "Flip" else "rolled") if has("_saved_dims") else ""
    if name in ("PixelShuffle", "PixelUnshuffle", "ChannelShuffle"):
        return "shuffled"
    if name == "IndexSelect":
        return "picked by number" if has("_saved_dim") else ""
    if name == "Index":
        return "picked by number" if operation._saved_indices[1:2] not in ((), (None,)) else ""
    if name in ("View", "UnsafeView", "ReshapeAlias"):
        before = tuple(operation._saved_self_sym_sizes)
        changed = next((k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
        return "regrouped" if changed == 1 and before[-1] == after[-1] and len(before) != len(after) else ""
    return ""


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
    """Groups of a model with the protection that the graph alone tells; see :func:`follow`."""
    return follow(model, example_inputs)[0]


def follow(model: nn.Module, example_inputs: Any, heads: Heads | None = None) -> tuple[Structure, dict[str, str]]:
    """Groups of a model with the protection that the graph alone tells, and what moves their channels, by group.

    Every channel of a layer is followed through the graph with its origin, so
    that channels of one layer that meet somewhere (gated pairs, concatenations
    that are added) become one unit. ``heads`` read channels, and make none that
    can go.
    """
    heads = heads or Heads()
    graph, twin, places = _graph(model, as_inputs(example_inputs), Heads() if heads.failure else heads)
    from torch_pruning.dependency import index_mapping

    index_mapping.update_index_mapping(graph)
    names = {m: name for name, m in twin.named_modules()}
    names |= graph._param_to_name
    ends = {node for node in graph.module2node.values() if not node.outputs or node.type == graph.ops.OPTYPE.OUTPUT}
    fixed = _fixed_layers(twin)
    largest = max((n for m in twin.modules() for n in _axes(m)), default=0)
    groups: list[Group] = []
    moved: dict[str, str] = {}
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
        ways = ((_movement(node.grad_fn), places.get(node.grad_fn, "")) for node, _ in reached)
        moves = next((f"its channels are {how} in {place(where)}" for how, where in ways if how), "")
        if width == 1:
            reached = {key: where for key, where in reached.items() if key[0].module is module}
        group, reason = _group(name, width, reached, union, names, ends, fixed)
        done |= set(group.producers)
        if name not in group.producers:
            continue
        if moves:
            moved[name] = moves
        if lost:
            reason = reason or (
                f"{moves}, which the graph does not follow" if moves else "the graph loses its channels"
            )
        reason = next((_of_head(head) for head in map(heads.of, group.producers) if head), reason)
        if len(group.units) == 1:
            reason = reason or ("it has one channel" if width == 1 else "all its channels are tied to each other")
        elif all(any(part.issubset(unit) for part in group.parts) for unit in group.units):
            reason = reason or "each of its channels is all that a layer has"
        groups.append(Group(group.name, width, group.units, group.members, reason))
    return Structure(_with_unseen(twin, groups, done, heads)), moved


def _of_head(head: str) -> str:
    return f"it belongs to '{head}', {TRAINING_ONLY}"


def _with_unseen(model: nn.Module, groups: Sequence[Group], done: set[str], heads: Heads) -> tuple[Group, ...]:
    """Groups, and layers that the graph does not hold as groups of their own that stay; in the order of the modules."""
    out = {g.name: g for g in groups}
    for name, module in model.named_modules():
        width = getattr(module, "out_channels", 0) or getattr(module, "out_features", 0)
        if name in done or not is_weighted(kind_of(module)) or not isinstance(width, int) or not width:
            continue
        own = tuple((j,) for j in range(width))
        member = Member(name, "out", kind_of(module), own)
        head = heads.of(name)
        out.setdefault(name, Group(name, width, own, (member,), _of_head(head) if head else UNSEEN))
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
) -> tuple[dict[Key, dict[int, int]], bool]:
    """Node and axis to {index there: channel of the root}, all that removing them would touch; and whether it got lost.

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
        if max(i.idx for i in fresh) >= largest or _is_barred(node, graph):  # maps of a cycle multiply without end
            return reached, True
        for dependency in node.dependencies:
            if width > 1 and _makes_one(graph, dependency):
                continue  # a map of one channel is spread over all of them: it is no part of any
            if dependency.is_triggered_by(fn):
                mapped = fresh
                try:
                    for mapping in dependency.index_mapping:
                        if mapping is not None:
                            mapped = mapping(mapped)
                except IndexError:  # a split of which torch-pruning does not know all parts
                    return reached, True
                if mapped:
                    stack.append((dependency.target, dependency.handler, mapped))
    return reached, False


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


def cut_axes(module: nn.Module, axes: Mapping[str, Sequence[int]]) -> None:
    """Remove sorted entries of the axes of a module, in place; parameters become new objects with the flags of the old.

    Both axes of a weight go at once: a half-cut copy of a large layer costs more memory than the layer that is left.
    """
    import torch_pruning as tp

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
    if kind in (tp.ops.OPTYPE.CONV, tp.ops.OPTYPE.LINEAR) and getattr(module, "groups", 1) == 1:
        _cut_weight(module, axes)
        return
    frozen = {name: p.requires_grad for name, p in module.named_parameters(recurse=False)}
    for axis, gone in axes.items():
        if not is_weighted(kind_of(module)) and not isinstance(module, nn.Embedding):
            _cut_entries(module, gone)
        else:
            (pruner.prune_out_channels if axis == "out" else pruner.prune_in_channels)(module, list(gone))
    for name, p in module.named_parameters(recurse=False):
        p.requires_grad_(frozen[name])


def _cut_weight(module: Any, axes: Mapping[str, Sequence[int]]) -> None:
    """The same for a linear layer, or a convolution of one group."""
    weight = module.weight
    first = "in" if getattr(module, "transposed", False) else "out"
    keep: dict[int, Tensor] = {}
    for axis, gone in axes.items():
        k = int(axis != first)
        left = torch.ones(weight.shape[k], dtype=torch.bool)
        left[torch.as_tensor(gone)] = False
        keep[k] = left.nonzero().flatten().to(weight.device)
        setattr(module, f"{axis}_{'features' if isinstance(module, nn.Linear) else 'channels'}", len(keep[k]))
        if axis == "out" and module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach()[keep[k]], module.bias.requires_grad)
    if len(keep) == 2:
        new = weight.detach()[keep[0][:, None], keep[1]]
    else:
        ((k, kept),) = keep.items()
        new = weight.detach().index_select(k, kept)
    module.weight = nn.Parameter(new, weight.requires_grad)


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
    graph, twin, _ = _graph(model, as_inputs(example_inputs), Heads())
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
