"""Weights beside the model: folded and modified, guarded by a fingerprint."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrp._analysis import Analysis, UnitPlan
from lrp._graph import Captured
from lrp._identity import PLANNING
from lrp._inputs import all_finite
from lrp._linear import ConvOp, LinearOp
from lrp._vocabulary import is_mutable, operand
from lrp.errors import NonFiniteError, PlanError


class Live:
    """The constants of the graph as the model holds them now.

    The owners of the tensors are looked up once; a replaced parameter is seen,
    a replaced module is the plan's business.
    """

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._shapes = {n: tuple(int(s) for s in captured.info[n].shape) for n in captured.constants}
        self._types = {n: n.meta["val"].dtype for n in captured.constants}
        self._owners: list[tuple[fx.Node, weakref.ref[nn.Module] | None, str]] = []

    def _find_owners(self, model: nn.Module) -> None:
        for node, (kind, name) in self._captured.constants.items():
            path, _, last = name.rpartition(".")
            owner = None if kind == "constant" else weakref.ref(model.get_submodule(path))
            self._owners.append((node, owner, last if owner is not None else name))

    def __call__(self, model: nn.Module) -> dict[fx.Node, Tensor]:
        """Node -> detached tensor.

        Raises
        ------
        PlanError
            If a tensor is gone or has another shape.
        """
        if not self._owners:
            self._find_owners(model)
        out: dict[fx.Node, Tensor] = {}
        for node, reference, name in self._owners:
            tensor = self._captured.tensors[name] if reference is None else getattr(reference(), name, None)
            if (
                not isinstance(tensor, Tensor)
                or tensor.shape != self._shapes[node]
                or tensor.dtype != self._types[node]
            ):
                qualified = self._captured.constants[node][1]
                raise PlanError(
                    f"the plan does not fit the model: '{qualified}' is gone, or has another shape or type",
                    expected=f"a tensor {self._shapes[node]} of {self._types[node]}",
                    got=f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else "nothing",
                    fix="call lrp.prepare again",
                )
            out[node] = tensor.detach()
        return out


class Fingerprint:
    """A cheap position-sensitive digest of tensors: one random projection per 4096 numbers.

    One pass over the weights. In-place edits of ``.data`` leave version
    counters unchanged, so the values themselves are read. An edit is missed
    only where it moves a projection by less than its rounding.
    """

    ROW = 4096  # long enough to be bound by memory, short enough not to drown an edit in rounding

    def __init__(self) -> None:
        self._directions: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def _direction(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        if key not in self._directions:
            generator = torch.Generator().manual_seed(0x1E97)
            direction = torch.rand(self.ROW, generator=generator, dtype=torch.float64) + 0.5
            self._directions[key] = direction.to(like.device, like.dtype)
        return self._directions[key]

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        whole: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            flat = t.reshape(-1)
            rows = flat.numel() // self.ROW if t.is_floating_point() else 0
            if rows:
                large = flat[: rows * self.ROW].view(rows, self.ROW)
                if large.itemsize == 2:
                    large = large.float()
                projections = torch.mv(large, self._direction(large))
                whole.setdefault(projections.dtype, []).append(projections)
            whole.setdefault(flat.dtype, []).append(flat[rows * self.ROW :])
        pieces = [torch.cat(many).double() for many in whole.values()]
        return torch.cat(pieces) if pieces else torch.zeros(0)


def check_finite(model_name: str, named: list[tuple[str, Tensor]]) -> None:
    """Raise if a weight holds NaN or infinity."""
    named = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    if all_finite([tensor for _, tensor in named]):
        return
    for name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"parameter or buffer '{name}' of {model_name} is not finite",
                expected="finite weights",
                got=f"{bad} of {tensor.numel()} values are NaN or infinite",
                fix="load a sound checkpoint; a diverged training leaves such weights",
            )


class Bound:
    """The table of constants a program runs on, refreshed when weights change."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._lock = threading.Lock()
        self._fingerprint = Fingerprint()
        self._live = Live(analysis.captured)
        self._digest: Tensor | None = None
        self._table: dict[Any, Tensor] = {}
        captured = analysis.captured
        self._computed = [
            n
            for n in captured.graph.nodes
            if n.op == "call_function" and not captured.info[n].varies and not captured.info[n].per_call
        ]
        sources: dict[fx.Node, None] = {}
        for node in self._computed:
            for arg in node.all_input_nodes:
                if arg in captured.constants:
                    sources[arg] = None
        self._derived = [u for u in analysis.units if u.folds or _derives(u)]
        for unit in self._derived:
            own = [] if unit.form is not None and unit.form.scaled else [unit.weight]
            parts = [*own, unit.bias, *(a for bn in unit.folds for a in bn.args[1:5])]
            for part in parts:
                if isinstance(part, fx.Node) and part in captured.constants:
                    sources[part] = None
        # a tensor that is a plain attribute is captured by reference; watch all of them
        sources |= {n: None for n, (kind, _) in captured.constants.items() if kind == "constant"}
        self._sources = list(sources)

    def table(self, model: nn.Module) -> dict[Any, Tensor]:
        """Key -> tensor, for every constant of every program of this analysis."""
        with PLANNING:
            live = self._live(model)
        with self._lock, torch.no_grad(), torch.inference_mode(False):
            digest = self._fingerprint([live[n] for n in self._sources])
            if (
                self._digest is None
                or self._digest.shape != digest.shape
                or self._digest.device != digest.device
                or not torch.equal(self._digest, digest)
            ):
                named = [(self.analysis.captured.constants[n][1], live[n]) for n in live]
                check_finite(type(model).__name__, named)
                self._table = self._derive(live)
                self._digest = digest
            derived = self._table
        out: dict[Any, Tensor] = dict(live)
        out.update(derived)
        for unit in self.analysis.units:
            out.setdefault(("w", unit.name), out[unit.weight])
            if unit.bias is not None:
                out.setdefault(("b", unit.name), out[unit.bias])
        return out

    def release(self) -> None:
        """Let go of what was derived; the next use makes it again."""
        with self._lock:
            self._digest, self._table = None, {}

    def _derive(self, live: dict[fx.Node, Tensor]) -> dict[Any, Tensor]:
        values: dict[fx.Node, Any] = dict(live)
        for node in self._computed:
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        table: dict[Any, Tensor] = {n: values[n] for n in self._computed if not is_mutable(n) or n.users}
        for unit in self._derived:
            w, b = values[unit.weight], None if unit.bias is None else values[unit.bias]
            assert unit.form is not None
            if unit.form.scaled:
                assert unit.bn is not None
                w, shift = _affine(unit.bn, values)  # the scale, in the place of a weight
                b = shift if b is None else b * w + shift
            elif unit.folds:
                w, b = fold(unit, w, b, values)
                table[("w", unit.name)] = w
            if b is not None:
                table[("b", unit.name)] = b
            for i, extra in enumerate(unit.form.derive(w, b)):
                table[("extra", unit.name, i)] = extra
            if self.analysis.low is not None and not unit.form.rule.ends_pass:
                for key in [k for k in table if isinstance(k, tuple) and k[1] == unit.name]:
                    table[key] = table[key].to(self.analysis.low)
        return table


def _derives(unit: UnitPlan) -> bool:
    assert unit.form is not None
    return unit.form.name not in ("epsilon", "pass")


def _affine(bn: fx.Node, values: dict[fx.Node, Any]) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch normalisation: ``weight / sqrt(var + eps)``, ``bias - mean scale``."""
    gain, shift, mean, var = (values.get(operand(bn, i)) for i in range(1, 5))
    assert mean is not None
    assert var is not None
    scale = (var + operand(bn, 7)).rsqrt()
    if gain is not None:
        scale = scale * gain
    offset = -mean * scale
    return scale, offset if shift is None else offset + shift


def fold(unit: UnitPlan, w: Tensor, b: Tensor | None, values: dict[fx.Node, Any]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer with the batch normalisations around it folded in.

    In front: ``W' = W scale`` along the inputs, and ``b' = b + W shift``, a plane
    where zero padding cuts the shift off at the border. Behind: ``W' = scale W``,
    ``b' = scale b + shift``.
    """
    op = unit.op
    if unit.bn_before is not None:
        assert unit.form is not None
        scale, shift = _affine(unit.bn_before, values)
        plane = op.push(op.spread(shift).expand(1, *unit.form.in_shape), w, b)
        b = plane[0] if isinstance(op, LinearOp) else plane
        if isinstance(op, ConvOp) and not op.cuts:
            b = plane[0].flatten(1)[:, 0]
        w = op.scale_inputs(w, scale)
    if unit.bn is not None:
        scale, shift = _affine(unit.bn, values)
        w = op.scale_outputs(w, scale)
        if b is not None and b.ndim > 1:
            scale, shift = op.spread(scale), op.spread(shift)
        b = shift if b is None else b * scale + shift
    assert b is not None
    return w, b
