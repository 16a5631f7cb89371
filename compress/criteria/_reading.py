"""Reading: what leaves a layer, and the gradient of an objective there, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress._data import outputs_of
from compress.criteria._layers import by_channel
from compress.criteria._names import READ_AT
from compress.criteria._paths import Call, Path, follow, is_step, key, on_calls
from compress.criteria._sums import check_choice
from compress.criteria._task import Task
from lrp._batches import Batch, rows
from lrp.errors import ModeError, StructureError

__all__ = ["Objective", "Reading", "Tap", "tapped"]

#: one number per sample, from the network's output and the batch
Objective = Callable[[Any, Batch], Tensor]
#: layer, values and gradients, both (samples, positions, channels)
Take = Callable[[str, Tensor, Tensor], None]
#: a call, what is read there, and whether that is changed in place later; what is returned takes its place
Tap = Callable[[Call, Tensor, bool], "Tensor | None"]

DEPTH = {"conv": (), "output": ("norm",), "activated": ("norm", "activation")}


class _Taps(TorchFunctionMode):
    """Waits, behind every call of a layer, for the functions up to the point of reading."""

    def __init__(self, paths: Mapping[Call, Path], read_at: str, tap: Tap) -> None:
        super().__init__()
        self.paths, self.steps, self.tap = paths, DEPTH[read_at], tap
        self.waiting: dict[tuple[int, int], tuple[Call, Tensor, int]] = {}

    def arrived(self, call: Call, value: Tensor, depth: int = 0) -> Tensor:
        """A value ``depth`` steps behind the layer: read it, or wait for the next step."""
        path = self.paths.get(call, Path())
        wanted = [step for step in path.steps if step in self.steps]
        if depth < len(wanted):
            self.waiting[key(value)] = (call, value, depth)
            return value
        changed = path.changed[depth] if depth < len(path.changed) else True
        replaced = self.tap(call, value, changed)
        return value if replaced is None else replaced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = key(args[0]) if self.waiting and args and isinstance(args[0], Tensor) else None
        out = func(*args, **(kwargs or {}))
        if before not in self.waiting or not isinstance(out, Tensor) or key(out) == before:
            return out  # of no interest, or handed on as it is
        call, _, depth = self.waiting[before]
        if not is_step(self.paths[call].steps[depth], func):
            raise StructureError(
                f"what follows layer '{call[0]}' differs from sample to sample",
                expected=f"its {self.paths[call].steps[depth]}, as for the first sample",
                got=getattr(func, "__name__", str(func)),
                fix="say read_at='conv'",
            )
        del self.waiting[before]
        return self.arrived(call, out, depth + 1)


@contextmanager
def tapped(
    layers: Mapping[str, nn.Module], paths: Mapping[Call, Path], read_at: str, tap: Tap
) -> Iterator[list[Tensor]]:
    """Within the block, ``tap`` sees what is read of every call of the layers.

    Yields the leaves of the graph, which begins at the first of the layers:
    nothing before them needs a gradient.
    """
    taps = _Taps(paths, read_at, tap)

    def act(call: Call, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad and output.is_floating_point():
            roots.append(output.detach().requires_grad_())
            output = roots[-1].clone()  # what follows may change it in place, which a leaf does not allow
        return taps.arrived(call, output)

    roots: list[Tensor] = []
    with on_calls(layers, act), taps:
        yield roots


@dataclass
class Reading:
    """Values, and gradients where an objective is given, at one point behind every layer.

    Attributes
    ----------
    samples : int
        Seen so far.
    unreached : dict of str to str
        Layers that were called, but which no gradient reached, with the reason.
    """

    task: Task
    read_at: str
    objective: Objective | None = None
    samples: int = 0

    def __post_init__(self) -> None:
        check_choice("read_at", self.read_at, READ_AT)
        self.called: set[str] = set()
        self.reached: set[str] = set()
        self.apart: bool | None = None
        self.paths: dict[Call, Path] = {}

    @property
    def unreached(self) -> dict[str, str]:
        why = "no gradient of the objective reaches it"
        return dict.fromkeys(self.called - self.reached, why)

    def run(self, take: Take) -> None:
        """One pass over the data.

        Where rows of a layer's output can not be told to belong to a sample
        (time before batch, statistics of the batch), samples go one by one.
        """
        self.paths = follow(self.task.twin, self.task.twins, self.task.example)
        for batch in self.task.batches():
            for part in self.parts(batch):
                self._pass(part, take)
            self.samples += batch.inputs[0].shape[0]

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """The batch, or its samples one by one where their rows can not be told apart.

        Raises
        ------
        ModeError
            If the objective of a sample depends on the other samples.
        """
        n = batch.inputs[0].shape[0]
        if self.apart is None and n > 1:
            self.apart = not self._in_order(batch)
        if not self.apart or n == 1:
            yield batch
            return
        for i in range(n):
            yield Batch(rows(batch.x, i), None if batch.y is None else batch.y[i : i + 1])

    def _pass(self, batch: Batch, take: Take) -> None:
        n = batch.inputs[0].shape[0]
        modules = self.task.twins
        if self.objective is None:
            with torch.no_grad(), self._taps(lambda call, value, _: self._value(call, value, n, take)):
                outputs_of(self.task.twin, batch.inputs)
            return

        def tap(call: Call, value: Tensor, changed: bool) -> None:
            name = call[0]
            self.called.add(name)
            if not value.requires_grad:  # under no_grad
                return
            held = value.detach().clone() if changed else value.detach()

            def receive(gradient: Tensor) -> None:
                self.reached.add(name)
                module = modules[name]
                take(name, by_channel(module, held, n), by_channel(module, gradient.detach(), n))

            value.register_hook(receive)  # type: ignore[no-untyped-call]  # torch: untyped

        with torch.enable_grad():
            with self._taps(tap) as roots:
                output = outputs_of(self.task.twin, batch.inputs)
            wanted = self.objective(output, batch)
            if wanted.requires_grad:
                torch.autograd.grad(wanted.sum(), roots, allow_unused=True)

    def _taps(self, tap: Tap) -> AbstractContextManager[list[Tensor]]:
        return tapped(self.task.twins, self.paths, self.read_at, tap)

    def _value(self, call: Call, value: Tensor, n: int, take: Take) -> None:
        self.called.add(call[0])
        self.reached.add(call[0])
        held = by_channel(self.task.twins[call[0]], value, n)
        take(call[0], held, held)

    # -- whether samples can be told apart -------------------------------------------
    def _in_order(self, batch: Batch) -> bool:
        """Whether the rows of every output are those of one sample after the other."""
        found = []
        for count in (1, 2):
            seen: dict[Call, Tensor] = {}
            part = Batch(tuple(t[:count] for t in batch.inputs), None if batch.y is None else batch.y[:count])

            def tap(call: Call, value: Tensor, changed: bool, seen: dict[Call, Tensor] = seen) -> None:
                seen[call] = value.detach().clone()

            with torch.no_grad(), self._taps(tap):
                output = outputs_of(self.task.twin, part.inputs)
            found.append((seen, None if self.objective is None else self.objective(output, part)))
        (one, first), (two, both) = found
        if first is not None and both is not None and not _close(first, both[:1]):
            raise ModeError(
                f"the samples of a batch influence each other in {type(self.task.model).__name__}",
                expected="the output of a sample to depend on that sample only",
                got="a change when another sample joins it",
                fix="give batch norms their running statistics",
            )
        return one.keys() == two.keys() and all(
            two[c].shape[0] == 2 * t.shape[0] and _close(t, two[c][: t.shape[0]]) for c, t in one.items()
        )


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding, which is that of sums in another order."""
    if a.shape != b.shape:
        return False
    limit = {torch.float64: 1e-9, torch.float32: 1e-3}.get(a.dtype, 0.1)
    scale = a.abs().max() if a.numel() else torch.zeros(())
    return bool(((a - b).abs() <= limit * scale).all()) or not bool(a.isfinite().all())
