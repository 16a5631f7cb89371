"""One run of fine-tuning: its steps, and its state on disk after every epoch."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from compress._data import Filled, batches_of, device_of, labels_of, outputs_of
from compress._distillation import distillation_loss
from compress._modes import evaluating, modes_kept
from compress._order import order_of
from compress._randomness import generators_of, put_generators, put_states, seed_of, seeded, states
from compress._states import write_state
from compress.evaluation import check_labels, evaluate, logits_of
from compress.training import History
from lrp._batches import Batch, parse
from lrp._distributed import (
    exchange,
    from_first,
    gather,
    on_device,
    place,
    raise_together,
    reached,
    same_everywhere,
    sum_over_processes,
    together,
)
from lrp._files import digest, read_tensors
from lrp._identity import unwrapped
from lrp._settings import as_double, same
from lrp.errors import DataError, DistributedError, FileFormatError, InputError, LRPError, MismatchError, NonFiniteError

if TYPE_CHECKING:
    from compress.training import FineTune

__all__ = ["Trainer", "load_state", "state_of"]

KIND = "compress.FineTune"
_OTHER_RUN = "name another file to start again, or delete this one if it is not needed"
_END: Any = object()
_ALIKE = "give every process the same model, data and settings, and seed loaders of your own alike"


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers; tied ones are copied each on its own."""
    return {name: t.detach().clone() for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def load_state(model: nn.Module, held: dict[str, Tensor]) -> None:
    """Write the values into the model's own tensors, which stay the same objects.

    Raises
    ------
    MismatchError
        If names or shapes differ.
    """
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    same("names and shapes of their tensors", _shapes(held), _shapes(own), "build the model as for the first start")
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(held[name])


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


@dataclass
class Share:
    """What one process brings to a step.

    Attributes
    ----------
    batch : Batch or None
        None where the last batches do not go round.
    ended : bool
        Whether there was no step left.
    loss : float
        Sum over the samples.
    labelled : bool
        False for a batch without labels.
    sums : dict of str to Tensor
        Gradients, summed over the samples, and which parameters have one;
        empty in a single process.
    """

    batch: Batch | None = None
    ended: bool = False
    count: int = 0
    loss: float = 0.0
    right: int = 0
    labelled: bool = True
    sums: dict[str, Tensor] = field(default_factory=dict)
    failed: Exception | None = None


class _Dealt:
    """Every ``world``-th batch, from the ``rank``-th on."""

    def __init__(self, data: Any, rank: int, world: int) -> None:
        self.data, self.rank, self.world, self.dealt = data, rank, world, 0

    def __iter__(self) -> Iterator[Any]:
        for item in itertools.islice(Filled(self.data), self.rank, None, self.world):
            self.dealt += 1
            yield item


class Trainer:
    """FineTune at work on one model."""

    def __init__(self, task: FineTune, model: nn.Module, resume: Any, companion: Any = None) -> None:
        self.rank, self.world = place()
        self.task, self.model = task, model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self.model = model = unwrapped(model)  # gradients are shared here
        self.device = device_of(model)
        self.path = None if resume is None else Path(resume)
        self.companion: Any = None
        with contextlib.ExitStack() as stack:
            on_device(stack, self.device)
            failed: Exception | None = None
            alike: dict[str, Any] = {}
            try:
                self._prepare()
                alike = self._alike()
            except Exception as error:
                failed = error
            self._agree(raise_together(alike, failed))
            from_first(self._tensors())
            with together():
                self.start = digest(state_of(model)) if self.path is not None else ""
                if companion is not None:
                    self.companion = companion(self.optimizer)
            if self.world > 1 and self.companion is not None:
                self._agree(exchange({"companion": self.companion.settings()}))

    # -- setting up ---------------------------------------------------------
    def _prepare(self) -> None:
        task, model = self.task, self.model
        self.order = order_of(task.data, task.batch_size, task.seed)
        self.steps = -(-len(self.order) // self.world)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.precision = self._precision()
        self._check()
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.precision is torch.float16)
        self.generators = generators_of(task.data)
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self.beside: dict[str, Tensor] = {}  # the companion's state at the best epoch
        self.mark = b""  # of the data that were read, where several processes read them
        self.loading: dict[str, Any] = {}  # random states of the loaders, the same in all processes

    def _tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def _alike(self) -> dict[str, Any]:
        """What all processes must have in common, beside the weights, which are those of process 0."""
        if self.world == 1:
            return {}
        shapes = [[n, str(t.dtype), list(t.shape)] for n, t in self.model.state_dict().items() if isinstance(t, Tensor)]
        found = {**self._settings(), "tensors": shapes, "resume": self.path is not None}
        plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
        return plain

    def _agree(self, notes: list[dict[str, Any]]) -> None:
        for key in notes[0]:
            if key != "error":
                same_everywhere(notes, key, f"the training: {key}", _ALIKE)

    def _check(self) -> None:
        if not self.parameters:
            raise InputError(
                "there is nothing to train",
                expected="a parameter that requires a gradient",
                got="a network that is frozen or has no parameters",
                fix="model.requires_grad_(True), or for the layers to train only",
            )
        if self.path is not None and (self.path.is_dir() or not self.path.parent.is_dir()):
            raise DataError(
                "resume names no file in an existing folder",
                expected="the path of a file, which need not exist",
                got=str(self.path),
                fix="make the folder, and name a file in it",
            )
        split = (getattr(data, "sampler", None) for data in (self.task.data, self.task.validation))
        if self.world > 1 and any(isinstance(s, torch.utils.data.DistributedSampler) for s in split):
            raise InputError(
                "the loader has a DistributedSampler, and FineTune deals out whole batches itself",
                expected="the same batches in every process",
                got="a part of the data in each, of which only every n-th batch would be used",
                fix="leave the sampler out; shuffle with one seed for all processes",
            )
        waits = any(isinstance(m, nn.SyncBatchNorm) for m in self.model.modules())
        if self.world > 1 and waits and len(self.order) % self.world:
            raise InputError(
                "SyncBatchNorm waits for all processes, and the last batches do not go round",
                expected=f"a number of batches that {self.world} processes divide",
                got=f"{len(self.order)} batches",
                fix="drop the last batches, or use BatchNorm",
            )
        distill = self.task.distill
        if distill is None:
            return
        if distill.teacher is self.model:
            raise InputError(
                "the teacher is the network that is trained",
                expected="another one",
                got="the same object",
                fix="pass the network before pruning, or copy.deepcopy(model)",
            )
        if device_of(distill.teacher) != self.device:
            raise InputError(
                "teacher and model are on different devices",
                expected=str(self.device),
                got=str(device_of(distill.teacher)),
                fix="move the teacher",
            )

    def _precision(self) -> torch.dtype | None:
        asked = self.task.mixed_precision
        if asked == "off" or (asked == "auto" and self.device.type != "cuda"):
            return None
        if self.device.type != "cuda":
            raise InputError(
                "mixed precision is for CUDA devices",
                expected="mixed_precision='auto' or 'off'",
                got=f"'{asked}' on {self.device}",
                fix="leave it out",
            )
        if asked == "auto":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if asked == "bf16" else torch.float16

    def _optimizer(self) -> torch.optim.Optimizer:
        task = self.task
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": task.weight_decay},
            {"params": [p for p in self.parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        if task.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=task.lr)
        return torch.optim.SGD(groups, lr=task.lr, momentum=task.momentum, nesterov=task.momentum > 0)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted over all epochs."""
        task = self.task
        total = task.epochs * self.steps
        rising = round(task.warmup * total)
        if step < rising:
            return task.lr * (step + 1) / rising
        t = (step - rising) / max(1, total - rising)
        if task.schedule == "cosine":
            return task.lr * (1 + math.cos(math.pi * t)) / 2
        return task.lr * (1 - t) if task.schedule == "linear" else task.lr

    # -- state on disk ------------------------------------------------------
    def _settings(self) -> dict[str, Any]:
        return {
            **self.task.settings(),
            "model": type(self.model).__name__,
            "parameters": [[n, list(p.shape), p.requires_grad] for n, p in self.model.named_parameters()],
            "precision": None if self.precision is None else str(self.precision),
            "steps": self.steps,
            "companion": None if self.companion is None else self.companion.settings(),
            **({"processes": self.world} if self.world > 1 else {}),
        }

    def _save(self, settings: dict[str, Any]) -> None:
        """Process 0 writes, for all have the same; the others wait for it."""
        with together():
            if self.path is not None and self.rank == 0:
                self._write(self.path, settings)

    def _write(self, path: Path, settings: dict[str, Any]) -> None:
        held = states(self.device)
        plain: dict[str, Any] = {}
        tensors = {f"model:{name}": t for name, t in state_of(self.model).items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer:{index}:{key}"] = value.clone()
                else:
                    plain[f"{index}:{key}"] = value
        tensors |= {f"best:{name}": t for name, t in self.best.items()}
        if self.companion is not None:
            tensors |= {f"companion:{name}": t for name, t in self.companion.state_dict().items()}
        tensors |= {f"beside:{name}": t for name, t in self.beside.items()}
        tensors |= {f"random:{name}": t for name, t in held.items() if name != "plain"}
        tensors |= {f"generator:{k}": g.get_state() for k, g in enumerate(self.generators)}
        meta = {
            "settings": settings,
            "start": self.start,
            "history": self.history.to_json(),
            "optimizer": plain,
            "scaler": self.scaler.state_dict(),
            "random": held["plain"],
        }
        write_state(path, KIND, tensors, meta)

    def _load(self, settings: dict[str, Any]) -> bool:
        """Go back to where the file is; False if there is none."""
        if self.path is None or not self.path.exists():
            return False
        tensors, meta = read_tensors(self.path, KIND)
        kinds = ("model", "optimizer", "random", "generator", "best", "companion", "beside")
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        try:
            for key, t in tensors.items():
                kind, _, name = key.partition(":")
                parts[kind][name] = t
            history = History.from_json(meta["history"])
            theirs, start, plain, scaler = meta["settings"], meta["start"], meta["optimizer"], meta["scaler"]
            random_states = {**parts["random"], "plain": meta["random"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{self.path} holds no state of compress.FineTune",
                expected="a file that resume= wrote",
                got=f"{type(error).__name__}: {error}",
                fix=_OTHER_RUN,
            ) from error
        for key in (*settings, *(key for key in theirs if key not in settings)):
            same(
                f"settings of fine-tuning: {key}",
                theirs.get(key),
                settings.get(key),
                f"{self.path} is of another run; {_OTHER_RUN}",
            )
        if self.start not in (start, digest(parts["model"])):
            raise MismatchError(
                f"{self.path} is the training of another network",
                expected="the weights this training began with, or those the file holds",
                got="others",
                fix=_OTHER_RUN,
            )
        self.start = start
        load_state(self.model, parts["model"])
        self.best, self.beside = parts["best"], parts["beside"]
        if self.companion is not None:
            self.companion.load_state_dict(parts["companion"])
        self._load_optimizer(parts["optimizer"], plain)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        put_states(random_states, self.device)
        put_generators(self.generators, list(parts["generator"].values()))
        self.history = history
        return True

    def _load_optimizer(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        state: dict[int, dict[str, Any]] = {}
        for name, value in (*tensors.items(), *plain.items()):
            index, _, key = name.partition(":")
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    # -- the run ------------------------------------------------------------
    def run(self) -> History:
        """All epochs that are not done yet."""
        from tqdm import tqdm

        settings = {} if self.path is None else self._settings()
        total = self.task.epochs * self.steps
        with contextlib.ExitStack() as stack:
            on_device(stack, self.device)
            stack.enter_context(seeded(self.task.seed, self.device))
            stack.enter_context(modes_kept(self.model))
            if self.task.distill is not None:
                stack.enter_context(evaluating(self.task.distill.teacher))
            if not self._open(settings):
                self._save(settings)  # a path that can not be written to should be known now
            self._training_mode()
            done = len(self.history.losses)
            bar = stack.enter_context(
                tqdm(total=total, initial=done * self.steps, desc="fine-tuning", unit="batch",
                     disable=None if self.task.progress and self.rank == 0 else True)
            )  # fmt: skip
            good = state_of(self.model)
            try:
                for epoch in range(done, self.task.epochs):
                    if self._out_of_patience():
                        break
                    self._epoch(epoch, bar)
                    self._validate()
                    good = state_of(self.model)
                    self._save(settings)
                if self.best:
                    load_state(self.model, self.best)
                if self.companion is not None and self.beside:
                    self.companion.load_state_dict(self.beside)
            except BaseException:
                load_state(self.model, good)
                raise
            finally:
                self.optimizer.zero_grad(set_to_none=True)
        return self.history

    def _open(self, settings: dict[str, Any]) -> bool:
        """Go on from the file, in all processes or in none."""
        found = False
        with together():
            found = self._load(settings)
        states = gather([found, len(self.history.losses)])
        if any(state != states[0] for state in states):
            raise DistributedError(
                "the processes do not see the same file",
                expected="resume= on a disk that all processes read",
                got=f"{sum(bool(state[0]) for state in states)} of {self.world} processes found {self.path}",
                fix="name a file on a shared disk, or leave resume out",
            )
        return found

    def _validate(self) -> None:
        if self.task.validation is None:
            return
        right, count = 0, 0
        with together():
            data = self.task.validation
            own = data if self.world == 1 else _Dealt(data, self.rank, self.world)
            try:
                found = evaluate(self.model, own, progress=False)
                right, count = sum(c.correct for c in found.per_class), found.count
            except InputError:
                if self.rank == 0 or not isinstance(own, _Dealt) or own.dealt:
                    raise  # but for fewer batches than processes
        rows = gather([right, count])
        self.history = self.history.validated(sum(row[0] for row in rows) / sum(row[1] for row in rows))
        if self.history.best == len(self.history.validations):
            self.best = state_of(self.model)
            if self.companion is not None:
                self.beside = {name: t.clone() for name, t in self.companion.state_dict().items()}

    def _out_of_patience(self) -> bool:
        patience, seen = self.task.patience, len(self.history.validations)
        return patience is not None and seen - self.history.best >= patience

    def _training_mode(self) -> None:
        """Training mode but for frozen batch normalisations: their statistics belong to their weights."""
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
                module.training = False

    def _epoch(self, epoch: int, bar: Any) -> None:
        began = time.monotonic()
        losses, right, count, mine = 0.0, 0, 0, 0
        labelled = True
        step, rate = -1, 0.0
        with self._own_randomness(epoch):
            turns = self._turns(epoch)
            for k in itertools.count():
                rate, before = self.rate(epoch * self.steps + min(k, self.steps - 1)), rate
                own = self._share(turns, epoch, k, rate)
                rows = self._meet(own, k)
                if own.ended:
                    rate = before
                    break
                step, n = k, int(sum(row[0] for row in rows))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self._sum_gradients(own, n)
                with together(), self._named(epoch, k):
                    self._move()
                if self.companion is not None and self.companion.stepped:  # a scaler may have left the step out
                    batch = own.batch
                    with together(), self._named(epoch, k):
                        self.companion.step(*(None, None) if batch is None else (batch.x, batch.y))
                losses, count, mine = losses + sum(row[1] for row in rows), count + n, mine + own.count
                right += int(sum(row[2] for row in rows))
                labelled = labelled and all(row[3] for row in rows)
                bar.set_postfix(loss=f"{losses / count:.4f}", refresh=False)
                bar.update()
        self._mean_statistics(mine / count)
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise self._diverged(f"weights are not finite after epoch {epoch + 1}, step {step + 1}", rate, epoch)
        seconds = self._still_alike(round(time.monotonic() - began, 3))
        self.history = self.history.plus(losses / count, right / count if labelled else None, rate, seconds)

    def _share(self, turns: Iterator[Batch | None], epoch: int, step: int, rate: float) -> Share:
        """The next batch of this process, down to its gradient; an error is kept until all are told."""
        own = Share()
        try:
            with self._as_loader():
                batch = next(turns, _END)
            if batch is _END:
                own.ended = True
                return own
            own.batch = batch
            with self._named(epoch, step):
                self.optimizer.zero_grad(set_to_none=True)
                if batch is None:
                    self.scaler.scale(torch.zeros((), device=self.device))  # it begins with its first number
                else:
                    value, output = self._gradient(batch, step)
                    if not math.isfinite(value):
                        what = f"the loss is {value} in epoch {epoch + 1}, step {step + 1}"
                        raise self._diverged(what, rate, epoch)
                    own.count, own.labelled = len(output), batch.y is not None
                    own.loss = value * own.count
                    if batch.y is not None:
                        own.right = int((output.argmax(1) == batch.y).sum())
                if self.world > 1:
                    own.sums = self._gradient_sums(own.count)
        except Exception as error:
            own.failed = error
        return own

    @contextlib.contextmanager
    def _named(self, epoch: int, step: int) -> Iterator[None]:
        try:
            yield
        except LRPError:
            raise
        except Exception as error:
            error.add_note(f"in epoch {epoch + 1}, step {step + 1} of compress.FineTune")
            raise

    def _gradient(self, batch: Batch, step: int) -> tuple[float, Tensor]:
        """Loss and output; the gradient only where the loss is finite."""
        mixed = torch.autocast("cuda", self.precision) if self.precision is not None else contextlib.nullcontext()
        with mixed:
            output = logits_of(outputs_of(self.model, batch.inputs), step)
        loss = self._loss(output.float() if self.precision is not None else output, batch, step, mixed)
        value = float(loss.detach())
        if math.isfinite(value):
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch: untyped
        return value, output.detach()

    def _move(self) -> None:
        if self.task.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.task.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _loss(self, output: Tensor, batch: Batch, step: int, mixed: Any) -> Tensor:
        distill, loss = self.task.distill, torch.zeros((), device=output.device)
        if distill is None or distill.needs_labels:
            y = labels_of(batch, "fine-tuning without a teacher, or with distill weight below 1,")
            check_labels(y, output.shape[1], step)
            loss = F.cross_entropy(output, y, label_smoothing=self.task.label_smoothing)
        if distill is None:
            return loss
        with torch.no_grad(), mixed:
            teacher = logits_of(distill.teacher(*batch.inputs), step)
        same("number of outputs", teacher.shape[1], output.shape[1], "take a teacher with the same classes")
        far = distillation_loss(output, teacher.to(output.dtype), distill.temperature)
        return (1 - distill.weight) * loss + distill.weight * far

    def _diverged(self, what: str, rate: float, epoch: int) -> NonFiniteError:
        lower = "" if self.precision is None else ", mixed_precision='off'"
        return NonFiniteError(
            f"fine-tuning diverged: {what}",
            expected="finite numbers",
            got=f"NaN or infinity at learning rate {rate:.3g}; the model is as after {epoch} epochs",
            fix=f"lower lr= (say {self.task.lr / 10:.2g}), add warmup=0.1 or clip=1.0{lower}; check the data for NaN",
        )

    # -- several processes ---------------------------------------------------
    def _turns(self, epoch: int) -> Iterator[Batch | None]:
        """One batch per step; of several processes each reads all and takes every ``world``-th; None: none is left."""
        data = self.order.epoch(epoch)
        if self.world == 1:
            yield from batches_of(data, self.device)
            return
        own, k = None, -1
        for k, item in enumerate(Filled(data)):
            self._note(item, k)
            if k % self.world == self.rank:
                own = item
            if (k + 1) % self.world == 0:
                yield from batches_of([own], self.device)
                own = None
        if k < 0:
            yield from batches_of([])  # which says so
        if (k + 1) % self.world:
            yield None if own is None else next(batches_of([own], self.device))

    def _note(self, item: Any, index: int) -> None:
        """Mark shapes, labels and the first sample of a batch: enough to tell another order, and read in no time."""
        batch = parse(item, index)
        held = {str(k): t[:1] for k, t in enumerate(batch.inputs)}
        shapes = str([tuple(t.shape) for t in batch.inputs])
        if isinstance(batch.y, Tensor):
            held["y"] = batch.y
        else:
            shapes += str(batch.y)
        self.mark = hashlib.sha256(self.mark + digest(held, shapes).encode()).digest()

    def _meet(self, own: Share, step: int) -> list[list[float]]:
        """Count, loss, correct ones and whether there are labels, of every process; all raise if one failed."""
        mark = int.from_bytes(self.mark[:6], "big")  # exact in float64
        rows = gather([own.failed is not None, own.ended, mark, own.count, own.loss, own.right, own.labelled])
        if any(row[0] for row in rows):
            raise_together({}, own.failed)
        if any(row[1:3] != rows[0][1:3] for row in rows):
            raise DistributedError(
                f"the processes do not read the same batches up to step {step + 1}",
                expected="the same data in the same order in every process, which take turns",
                got="other samples" if len({row[1] for row in rows}) == 1 else "more batches in one than in another",
                fix=_ALIKE,
            )
        return [row[3:] for row in rows]

    def _gradient_sums(self, count: int) -> dict[str, Tensor]:
        sums = {"has": torch.tensor([float(p.grad is not None) for p in self.parameters], dtype=torch.float64)}
        for k, p in enumerate(self.parameters):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            sums[str(k)] = as_double(gradient) * count
        return sums

    def _sum_gradients(self, own: Share, count: int) -> None:
        """The mean over the samples of all processes, in float64 until it is done."""
        if self.world == 1:
            return
        with reached():
            total = sum_over_processes(own.sums)
        own.sums = {}
        for k, (p, has) in enumerate(zip(self.parameters, total["has"].tolist(), strict=True)):
            p.grad = (total[str(k)] / count).to(p) if has else None

    def _mean_statistics(self, weight: float) -> None:
        """Running statistics: the mean over the processes by their samples; other buffers: those of process 0."""
        if self.world == 1:
            return
        layers = [m for m in self.model.modules() if isinstance(m, _NormBase) and m.training]
        held = {id(t): t for m in layers for t in (m.running_mean, m.running_var) if t is not None}
        with reached():
            total = sum_over_processes({str(k): as_double(t) * weight for k, t in enumerate(held.values())})
        for k, t in enumerate(held.values()):
            t.copy_(total[str(k)])
        from_first(t for t in self.model.buffers() if id(t) not in held)

    def _still_alike(self, seconds: float) -> float:
        """The seconds of process 0; all raise if their weights have come apart."""
        if self.world == 1:
            return seconds
        held = {f"model:{name}": t for name, t in state_of(self.model).items()}
        if self.companion is not None:
            held |= {f"companion:{name}": t for name, t in self.companion.state_dict().items()}
        notes = exchange({"weights": digest(held), "seconds": seconds})
        same_everywhere(notes, "weights", "the weights after an epoch", "run all processes on devices of one kind")
        return float(notes[0]["seconds"])

    @contextlib.contextmanager
    def _own_randomness(self, epoch: int) -> Iterator[None]:
        """Of several processes each draws numbers of its own (dropout), but for what the loaders draw."""
        if self.world == 1:
            yield
            return
        with seeded(seed_of(self.task.seed, epoch, 0), self.device):
            self.loading = states(torch.device("cpu"))
        with seeded(seed_of(self.task.seed, epoch, 1 + self.rank), self.device):
            yield

    @contextlib.contextmanager
    def _as_loader(self) -> Iterator[None]:
        if self.world == 1:
            yield
            return
        here = torch.device("cpu")
        own = states(here)
        put_states(self.loading, here)
        try:
            yield
        finally:
            self.loading = states(here)
            put_states(own, here)
