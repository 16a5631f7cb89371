"""How much must go for a latency: guessed by a table of layers, decided by the meter on whole networks."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

_SEARCHED, _TRIED = 16, 16  # networks that are exported and measured: for a place, and as blocks are put back

Removed = dict[str, Channels]


class LatencySearch:
    """The smallest number of blocks, in the order of the ranking, with which the network is fast enough.

    The table of layers guesses where to look; only whole exported networks
    decide. What is found is a place where the network is fast enough and was
    not one tried step before; then blocks are put back as long as it stays fast
    enough, most important first. Whatever is returned was measured to be within
    the limit. A block of a group that was measured to be too slow is not tried
    again, for more channels take no less time; where times are noisy they may.
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
        progress: bool = False,
    ) -> None:
        from tqdm import tqdm

        from compress.latency import LatencyTable, layer_specs
        from compress.meters import onnxruntime_meter

        self.model, self.example, self.structure, self.table = model, example_inputs, structure, table
        self.target = target
        self.meter: Callable[[Path], float] = meter if meter is not None else onnxruntime_meter()
        self.layers = LatencyTable(self.meter, cache)
        self.specs = layer_specs(model, example_inputs)
        self.networks = 0
        self._bar = tqdm(desc="latency", unit="file", disable=None if progress else True)
        self.before = self._measure({})
        self.limit = target.absolute(self.before)

    def check(self, blocks: Sequence[Block]) -> None:
        """Raise BudgetError if the network is too slow with all blocks gone."""
        enough = self.before <= self.limit or not blocks
        least = self.before if enough else self._measure(_removed(blocks))
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
        """The plan, with the times in its settings, and how much was measured for them."""
        slow, fast = 0, len(blocks)
        times = {0: self.before}
        if self.before <= self.limit:
            fast = 0
        factor = self.before / max(1e-9, self._predict({}))
        while fast - slow > 1 and len(times) < _SEARCHED:
            k = self._guess(blocks, factor, slow, fast)
            times[k] = self._measure(_removed(blocks[:k]))
            factor = times[k] / max(1e-9, self._predict(_removed(blocks[:k])))
            if times[k] <= self.limit:
                fast = k
            else:
                slow = k
        if fast not in times:
            times[fast] = self._measure(_removed(blocks[:fast]))
            if times[fast] > self.limit:
                self.check(blocks)  # too slow with all that has a score
                raise BudgetError(
                    f"{self.target} can not be met with the groups that have a score",
                    expected=f"latency <= {self.limit:.4g} ms",
                    got=f"{times[fast]:.4g} ms",
                    fix="choose a criterion that scores more layers, or ask for more",
                )
        taken, after, untried = self._put_back(blocks[:fast], times[fast])
        plan = plan_of(_removed(taken))
        self._bar.close()
        found = {"meter": name_of(self.meter), "before": self.before, "after": after, "limit": self.limit}
        counted = {"networks_measured": self.networks, "layers_measured": self.layers.measured}
        settings = {**plan.settings, "latency_ms": {**found, **counted, "groups_untried": untried}}
        return dataclasses.replace(plan, settings=settings)

    def _guess(self, blocks: Sequence[Block], factor: float, slow: int, fast: int) -> int:
        """Fewest blocks that the table thinks fast enough, strictly between what is known."""
        low, high = slow, fast
        while high - low > 1:
            middle = (low + high) // 2
            if factor * self._predict(_removed(blocks[:middle])) <= self.limit:
                high = middle
            else:
                low = middle
        return min(max(high, slow + 1), fast - 1)

    # -- putting back -------------------------------------------------------
    def _put_back(self, blocks: Sequence[Block], time: float) -> tuple[list[Block], float, int]:
        """What stays removed, its time, and of how many groups no block more was measured.

        Many at once, as far as the table thinks that they fit; then one by one.
        """
        taken, shut, most = list(blocks), set[str](), len(blocks)
        if not taken:
            return taken, time, 0
        gone = self._predict({}) - self._predict(_removed(taken))
        pace = (self.before - time) / gone if gone > 0 else 1.0  # of the meter on networks, by that of the table
        for _ in range(_TRIED):
            left = [b for b in reversed(taken) if b.group not in shut]
            if not left:
                break
            layers = self._layers(_removed(taken))
            some = self._fitting(taken, shut, layers, (self.limit - time) / pace if pace > 0 else 0.0)[:most]
            some = some or left[:1]
            trial = [b for b in taken if b not in set(some)]
            measured, grown = self._measure(_removed(trial)), self._growth(layers, taken, trial)
            if grown > 0 and measured > time:
                pace = (measured - time) / grown
            if measured <= self.limit:
                taken, time = trial, measured
            elif len(some) == 1:
                shut.add(some[0].group)
            else:
                most = len(some) // 2
        return taken, time, len({b.group for b in taken} - shut)

    def _fitting(self, taken: Sequence[Block], shut: set[str], layers: Mapping[str, float], room: float) -> list[Block]:
        """Blocks by which the layers grow no more than the room, most important first."""
        full, some = set(shut), list[Block]()
        for block in reversed(taken):
            if block.group in full:
                continue  # a block comes back only after all that its group lost later
            back = {*some, block}
            if self._growth(layers, taken, [b for b in taken if b not in back]) <= room:
                some.append(block)
            else:
                full.add(block.group)
        return some

    def _growth(self, layers: Mapping[str, float], taken: Sequence[Block], trial: Sequence[Block]) -> float:
        """How much longer the layers take, each by its multiply-adds: the table is asked for nothing new."""
        before, after = (self.table.layer_macs(_removed(blocks)) for blocks in (taken, trial))
        return sum(t * (after[n] / before[n] - 1) for n, t in layers.items() if before.get(n))

    # -- times --------------------------------------------------------------
    def _predict(self, removed: Removed) -> float:
        return sum(self._layers(removed).values())

    def _layers(self, removed: Removed) -> dict[str, float]:
        """Milliseconds of every layer without the removed channels, by the table."""
        out = {}
        for name, spec in self.resized(removed).items():
            known = self.layers.measured
            with self._asking(f"the layer '{name}' with {spec.inputs} inputs and {spec.outputs} outputs"):
                out[name] = self.layers.of(spec)
            self._bar.update(self.layers.measured - known)
        return out

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
            gone = sum(map(len, removed.values()))
            with self._asking(f"the network without {gone} of its channels" if gone else "the whole network"):
                time = milliseconds(self.meter, path)
        self.networks += 1
        self._bar.update()
        return time

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """An error of the meter says what it was asked for."""
        try:
            yield
        except Exception as error:
            error.add_note(
                f"the meter '{name_of(self.meter)}' was asked for {what}, after {self.networks} networks (of at most "
                f"{_SEARCHED + _TRIED + 2}) and {self.layers.measured} single layers"
            )
            raise


def _removed(blocks: Sequence[Block]) -> Removed:
    out: dict[str, list[int]] = {}
    for block in blocks:
        out.setdefault(block.group, []).extend(block.channels)
    return {name: tuple(sorted(channels)) for name, channels in out.items()}
