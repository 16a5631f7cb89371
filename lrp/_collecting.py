"""One run over a data set: its plans, its place in the data, its state on disk."""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrp._batches import Batch, chain, check_batches, parse, rows, start_for, targets
from lrp._distributed import on_device, place, raise_together, same_everywhere
from lrp._files import read_tensors, write_tensors
from lrp._identity import unwrapped
from lrp._settings import as_double, check_state, compare, same
from lrp.composites import resolve
from lrp.errors import DataError, FileFormatError, InputError, LRPError, MismatchError
from lrp.plan import Plan, prepare
from lrp.seeds import Start

if TYPE_CHECKING:
    from lrp.collection import RelevanceSum
    from lrp.relevance import Relevance

__all__ = ["Plans", "Run", "reduced", "summed"]

KIND = "lrp.collect"
_OTHER_RUN = "name another file to start again, or delete this one if its sums are not needed"


def reduced(relevance: Relevance, aggregate: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The sums of one pass, in float64.

    Raises
    ------
    MismatchError
        If the relevance lacks what is summed.
    """
    new: dict[str, dict[str, Tensor]] = {"channels": {}, "weights": {}}
    if "channels" in aggregate:
        magnitudes = aggregate["channels"] == "abs_per_sample"
        for name, r in relevance.channels.items():
            r = as_double(r)
            new["channels"][name] = (r.abs() if magnitudes else r).sum(0)
    if "weights" in aggregate:
        magnitudes = aggregate["weights"] == "abs_per_sample"
        for name, r in relevance.weights.items():
            r = as_double(r)
            new["weights"][name] = r.abs() if magnitudes else r
    for kind in aggregate:
        if not new[kind]:
            raise MismatchError(
                f"the relevance has no {kind}",
                expected=f"relevance of the {kind}, which this sum is of",
                got="none",
                fix=f"ask for wrt={kind!r}; layers= may have left none, or the model has none",
            )
    return new


class Plans:
    """The plan for each batch; made again only where the shape changes."""

    def __init__(self, model: nn.Module | Plan, composite: Any, device: torch.device | str | None) -> None:
        self._given = model if isinstance(model, Plan) else None
        if self._given is not None and composite is not None:
            raise InputError(
                "a plan has its composite already",
                expected="either a Plan or a model with composite=",
                got="both",
                fix="drop composite, or pass plan.model",
            )
        if not isinstance(model, (Plan, nn.Module)):
            raise InputError(
                "the model is not an nn.Module",
                expected="a torch.nn.Module or a Plan",
                got=type(model).__name__,
                fix="for scikit-learn estimators use neuralize.neuralize",
            )
        self.model = unwrapped(model.model if isinstance(model, Plan) else model)
        self.composite = (
            self._given.composite
            if self._given is not None
            else resolve("epsilon_plus" if composite is None else composite)
        )
        self.device = self._place(device)
        self._last: Plan | None = self._given
        self._shape: Any = None
        self._used: weakref.WeakSet[Any] = weakref.WeakSet()  # what the cache has let go of needs no release

    def _place(self, device: torch.device | str | None) -> torch.device | None:
        held = next(itertools.chain(self.model.parameters(), self.model.buffers()), None)
        there = None if held is None else held.device
        if device is None:
            return there
        try:
            wanted = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise InputError(
                "unknown device", expected="such as 'cpu' or 'cuda:0'", got=repr(device), fix="name one torch knows"
            ) from error
        if there is None:
            return wanted
        if wanted.type != there.type or wanted.index not in (None, there.index):
            raise InputError(
                "the model is on another device",
                expected=f"the model on {wanted}",
                got=f"{type(self.model).__name__} on {there}",
                fix=f"model.to('{wanted}') before, or leave device out",
            )
        return there

    def get(self, batch: Batch) -> Plan:
        shape = [(tuple(t.shape[1:]), t.dtype, t.device) for t in batch.inputs]
        if self._last is not None and (self._given is not None or shape == self._shape):
            self._last.check_model()
        else:
            self._last, self._shape = prepare(self.model, batch.x, self.composite), shape
        self._used.add(self._last._core)
        return self._last

    def release(self) -> None:
        """Free the folded and modified weights, up to twice the memory of the model; the next use makes them again."""
        for core in self._used:
            core.bound.release()


@dataclass(frozen=True)
class Position:
    """How far a run is: ``seen`` batches of the iterable, with their digest."""

    seen: int = 0
    first: str = ""
    digest: str = ""


class Run:
    """A pass over the batches of one process."""

    def __init__(
        self,
        total: RelevanceSum,
        plans: Plans,
        batches: Iterable[Any],
        start: Start,
        place: tuple[int, int],
        resume: Any,
        save_every: float,
        progress: bool,
    ) -> None:
        self.total, self.plans, self.batches, self.start = total, plans, batches, start
        self.rank, self.world = place
        self.progress, self.save_every = progress, save_every
        self.path = None if resume is None else self._own(Path(resume))
        self.tracked = self.path is not None or self.world > 1
        self.position = Position()
        self._items: Iterator[Any] = iter(())
        self._sound = True  # the sum is that of the batches before the position
        self._saved = time.monotonic()
        self._written: Position | None = None

    # -- state on disk ------------------------------------------------------
    def _own(self, path: Path) -> Path:
        """The file of this process; refuses one that another number of processes left."""
        if path.is_dir() or not path.parent.is_dir():
            raise DataError(
                "resume names no file in an existing folder",
                expected="the path of a file, which need not exist",
                got=str(path),
                fix="make the folder, and name a file in it",
            )
        many = [path.with_name(f"{path.name}.rank{r}") for r in range(self.world)]
        other = path if self.world > 1 else many[0]
        if other.exists():
            raise MismatchError(
                f"{other} was left by a run with another number of processes",
                expected=f"a state of {self.world} processes",
                got="one of a single process" if self.world > 1 else "one of several",
                fix=f"start as many processes as before; {_OTHER_RUN}",
            )
        return many[self.rank] if self.world > 1 else path

    def _load(self) -> None:
        assert self.path is not None
        tensors, meta = read_tensors(self.path, KIND)
        try:
            check_state(tensors, meta["sum"])
            position = Position(**meta["position"])
            rank, world = meta["rank"], meta["world"]
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{self.path} holds no state of lrp.collect",
                expected="a file that resume= wrote",
                got=f"{type(error).__name__}: {error}",
                fix=_OTHER_RUN,
            ) from error
        same("number of processes", self.world, world, f"start as many processes as before; {_OTHER_RUN}")
        same("rank", self.rank, rank, _OTHER_RUN)
        compare(self.total.settings, meta["sum"]["settings"], f"{self.path} is of another run; {_OTHER_RUN}")
        self.total._unflatten(tensors, meta["sum"])
        self.position = self._written = position

    def _save(self) -> None:
        if self.path is not None and self._written != self.position:
            meta = {
                "sum": self.total._meta(),
                "position": asdict(self.position),
                "rank": self.rank,
                "world": self.world,
            }
            write_tensors(self.path, KIND, self.total._flat(), meta, alone=True)
            self._written, self._saved = self.position, time.monotonic()

    # -- the run ------------------------------------------------------------
    def open(self) -> None:
        """Read the state and the first batch."""
        if self.path is not None and self.path.exists():
            self._load()
        items = iter(self.batches)
        nothing = object()
        first = next(items, nothing)
        if first is nothing:
            raise InputError(
                "there are no batches",
                expected="at least one batch",
                got="an iterable that yields nothing",
                fix="a generator that was used once is empty; make it anew, or check the loader's data set",
            )
        if self.tracked:
            digest = chain("", parse(first, 0))
            if self.position.seen:
                self._same_data(self.position.first, digest, 0)
            self.position = replace(self.position, first=digest)
        self._items = itertools.chain([first], items)
        self._save()  # a path that can not be written to should be known now

    def _same_data(self, before: str, now: str, index: int) -> None:
        if before != now:
            raise MismatchError(
                f"the data up to batch {index} are not those that {self.path} was made from",
                expected="the same batches in the same order, and none or more after them",
                got="other values, shapes or order, or fewer batches",
                fix=f"seed the shuffle and every random transform; {_OTHER_RUN}",
            )

    def note(self) -> dict[str, Any]:
        """What all processes must agree on."""
        return {"settings": self.total.settings, "first": self.position.first, "digest": self.position.digest}

    def work(self) -> None:
        """All batches that are not done yet; those that are done are only compared."""
        from tqdm import tqdm

        try:
            length = len(self.batches)  # type: ignore[arg-type]  # asked, since a loader may have none
        except TypeError:
            length = None
        hidden = None if self.progress and self.rank == 0 else True  # None: hidden off a terminal
        done, digest, index = self.position.seen, "", -1
        try:
            with tqdm(total=length, desc="relevance", unit="batch", disable=hidden) as bar:
                for index, item in enumerate(self._items):
                    batch = parse(item, index)
                    digest = chain(digest, batch) if self.tracked else ""
                    if index == done - 1:
                        self._same_data(self.position.digest, digest, index)
                    if index >= done:
                        self._step(batch, index, digest)
                    bar.update()
            if index + 1 < done:
                self._same_data(self.position.digest, "", index)
            self._save()
        except BaseException:
            if self._sound:
                with contextlib.suppress(OSError, LRPError):
                    self._save()
            raise

    def _step(self, batch: Batch, index: int, digest: str) -> None:
        mine = index % self.world == self.rank
        self._sound = False
        if mine:
            try:
                self._pass(batch, index)
            except Exception as error:
                if isinstance(error, LRPError):  # in its text, for notes do not reach a log, nor other processes
                    error.args = (f"In batch {index}: {error}",)
                else:
                    error.add_note(f"in batch {index} of lrp.collect")
                if isinstance(batch.y, Tensor) and batch.y.is_floating_point():
                    error.add_note("its second entry was read as targets: several inputs go into a tuple of their own")
                raise
        self.position = replace(self.position, seen=index + 1, digest=digest)
        self._sound = True
        if mine and self.path is not None and time.monotonic() - self._saved >= self.save_every:
            self._save()

    def _pass(self, batch: Batch, index: int) -> None:
        settings, total = self.total.settings, self.total
        batch = batch.to(self.plans.device)
        plan = self.plans.get(batch)
        captured = plan._core.analysis.captured
        n, ndim = batch.inputs[0].shape[0], captured.info[captured.output].ndim
        target: Any = settings["target"]
        labels = False
        if target == "predicted" or not (isinstance(self.start, str) and ndim == 2):
            target = None if target == "predicted" else target
        elif target is None:
            target = targets(batch, index)
            labels = target is not None
        if total._labels not in (None, labels):
            raise InputError(
                "some batches bring targets and others do not",
                expected=f"{'targets' if total._labels else 'none'}, as in the batches before",
                got=f"{'targets' if labels else 'none'} in batch {index}",
                fix="yield (x, y) throughout, or say target='predicted'",
            )
        start = start_for(self.start, n, ndim)
        aggregate = settings["aggregate"]
        absolute = tuple(k for k, how in aggregate.items() if how == "abs_element")
        only = None if settings["layers"] is None else plan._patterns(settings["layers"])

        def relevance(x: Tensor | tuple[Tensor, ...], target: Any, start: Start) -> None:
            rel = plan._attribute(x, target, settings["wrt"], start, None, False, absolute, only, as_far_as_input=False)
            total._add(rel, labels)

        if aggregate.get("weights") != "abs_per_sample":
            relevance(batch.x, target, start)
            return
        for i in range(n):
            relevance(rows(batch.x, i), rows(target, i), rows(start, i))


def summed(
    empty: Callable[[Plans], RelevanceSum],
    model: nn.Module | Plan,
    batches: Iterable[Any],
    composite: Any,
    start: Start,
    *,
    device: torch.device | str | None,
    progress: bool,
    resume: Any,
    save_every: float = 0.0,
    keep: bool = True,
) -> RelevanceSum:
    """The sum that ``empty`` makes, filled: see :func:`lrp.collect`.

    ``keep=False`` frees the plans' folded and modified weights at the end.
    """
    failed: Exception | None = None
    run: Run | None = None
    with contextlib.ExitStack() as stack:
        try:
            plans = Plans(model, composite, device)
            if not keep:
                stack.callback(plans.release)
            on_device(stack, plans.device)
            total = empty(plans)
            data = check_batches(batches, place()[1] > 1)
            run = Run(total, plans, data, start, place(), resume, save_every, progress)
            run.open()
        except Exception as error:
            failed = error
        notes = raise_together({} if run is None else run.note(), failed)
        assert run is not None
        same_everywhere(notes, "settings", "model and settings", "build and load the same model in every process")
        _same_data(notes, "first")
        try:
            run.work()
        except Exception as error:
            failed = error
        notes = raise_together(run.note(), failed)
        _same_data(notes, "digest")
        return run.total.all_reduce()


def _same_data(notes: list[dict[str, Any]], key: str) -> None:
    fix = "shuffle and transform with the same seed in every process, and do not split the data before"
    same_everywhere(notes, key, "the data (SHA-256)", fix)
