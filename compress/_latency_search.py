"""How much must go for a latency: guessed by a table of layers, decided by the meter on whole networks."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from compress.costs import CostTable
from compress.cutting import cut
from compress.groups import Channels, Structure
from compress.meters import name_of
from compress.plan import PruningPlan
from compress.ranking import Block
from compress.target import Target
from lrp.errors import BudgetError

__all__ = ["LatencySearch"]

_MOST = 16  # networks that are exported and measured

Removed = dict[str, Channels]


class LatencySearch:
    """The smallest number of blocks, in the order of the ranking, with which the network is fast enough.

    The table of layers guesses where to look; only whole exported networks
    decide. Times are noisy and need not fall with every block, so what is found
    is a place where the network is fast enough and was not one tried step
    before.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        target: Target,
        structure: Structure,
        table: CostTable,
        meter: Any,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        from compress.latency import LatencyTable, layer_specs
        from compress.meters import onnxruntime_meter

        self.model, self.example, self.structure, self.table = model, example_inputs, structure, table
        self.target = target
        self.meter: Callable[[Path], float] = meter if meter is not None else onnxruntime_meter()
        self.layers = LatencyTable(self.meter, cache)
        self.specs = layer_specs(model, example_inputs)
        self.before = self._measure({})
        self.limit = target.absolute(self.before)

    def check(self, blocks: Sequence[Block]) -> None:
        """Raise BudgetError if the network is too slow with all blocks gone."""
        enough = self.before <= self.limit or not blocks
        least = self.before if enough else self._measure(_first(blocks, len(blocks)))
        if least > self.limit:
            raise BudgetError(
                f"{self.target} can not be met",
                expected=f"latency <= {self.limit:.4g} ms by {name_of(self.meter)}",
                got=f"{least:.4g} ms with everything removed that may go ({self.before:.4g} ms before)",
                fix="ask for more, lower floor=, protect fewer layers, or quantize" + self._hint(),
            )

    def _hint(self) -> str:
        """Below one, a number is a share; who means milliseconds has to say so."""
        value = self.target.latency_ms
        if not isinstance(value, float):
            return ""
        return f"; {value!r} is a share of {self.before:.4g} ms: write '{value:g}ms' for milliseconds"

    def plan(self, blocks: Sequence[Block], plan_of: Callable[[Removed], PruningPlan]) -> PruningPlan:
        """The plan, with the times in its settings."""
        slow, fast = 0, len(blocks)
        times = {0: self.before}
        if self.before <= self.limit:
            fast = 0
        factor = self.before / max(1e-9, self._predict({}))
        while fast - slow > 1 and len(times) < _MOST:
            k = self._guess(blocks, factor, slow, fast)
            times[k] = self._measure(_first(blocks, k))
            factor = times[k] / max(1e-9, self._predict(_first(blocks, k)))
            if times[k] <= self.limit:
                fast = k
            else:
                slow = k
        if fast not in times:
            times[fast] = self._measure(_first(blocks, fast))
            if times[fast] > self.limit:
                self.check(blocks)  # too slow with all that has a score
                raise BudgetError(
                    f"{self.target} can not be met with the groups that have a score",
                    expected=f"latency <= {self.limit:.4g} ms",
                    got=f"{times[fast]:.4g} ms",
                    fix="choose a criterion that scores more layers, or ask for more",
                )
        plan = plan_of(_first(blocks, fast))
        found = {"meter": name_of(self.meter), "before": self.before, "after": times[fast], "limit": self.limit}
        settings = {**plan.settings, "latency_ms": {**found, "networks_measured": len(times)}}
        return dataclasses.replace(plan, settings=settings)

    def _guess(self, blocks: Sequence[Block], factor: float, slow: int, fast: int) -> int:
        """Fewest blocks that the table thinks fast enough, strictly between what is known."""
        low, high = slow, fast
        while high - low > 1:
            middle = (low + high) // 2
            if factor * self._predict(_first(blocks, middle)) <= self.limit:
                high = middle
            else:
                low = middle
        return min(max(high, slow + 1), fast - 1)

    def _predict(self, removed: Removed) -> float:
        return self.layers.predict(self.resized(removed).values())

    def resized(self, removed: Removed) -> dict[str, Any]:
        """Specifications of the layers without the removed channels."""
        outputs = self.table.widths(removed)
        gone: dict[str, int] = {}
        for name, channels in removed.items():
            for m in self.structure[name].members:
                if m.axis == "in":
                    gone[m.layer] = gone.get(m.layer, 0) + len(m.of(channels))
        out = {}
        for name, spec in self.specs.items():
            width = outputs[name][1] if name in outputs else spec.outputs
            if spec.groups > 1 and spec.groups == spec.outputs == spec.inputs:  # depthwise: both axes are one
                out[name] = spec.resized(inputs=width, outputs=width, groups=width)
            else:
                out[name] = spec.resized(inputs=spec.inputs - gone.get(name, 0), outputs=width, groups=spec.groups)
        return out

    def _measure(self, removed: Removed) -> float:
        from compress.exporting import export_onnx
        from compress.meters import milliseconds

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_onnx(cut(self.model, self.structure, removed), path, self.example)
            return milliseconds(self.meter, path)


def _first(blocks: Sequence[Block], count: int) -> Removed:
    out: dict[str, list[int]] = {}
    for block in blocks[:count]:
        out.setdefault(block.group, []).extend(block.channels)
    return {name: tuple(sorted(channels)) for name, channels in out.items()}
