"""One run of fine-tuning: its steps, and its state on disk after every epoch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from compress._data import batches_of, device_of, labels_of, outputs_of
from compress._distillation import distillation_loss
from compress._modes import evaluating, modes_kept
from compress._order import order_of
from compress._randomness import generators_of, put_generators, put_states, seeded, states
from compress._states import write_state
from compress.evaluation import check_labels, evaluate, logits_of
from compress.training import History
from lrp._batches import Batch
from lrp._files import digest, read_tensors
from lrp._settings import same
from lrp.errors import DataError, FileFormatError, InputError, LRPError, MismatchError, NonFiniteError

if TYPE_CHECKING:
    from compress.training import FineTune

__all__ = ["Trainer", "load_state", "state_of"]

KIND = "compress.FineTune"
_OTHER_RUN = "name another file to start again, or delete this one if it is not needed"


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


class Trainer:
    """FineTune at work on one model."""

    def __init__(self, task: FineTune, model: nn.Module, resume: Any, companion: Any = None) -> None:
        self.task, self.model = task, model
        self.device = device_of(model)
        self.path = None if resume is None else Path(resume)
        self.order = order_of(task.data, task.batch_size, task.seed)
        self.steps = len(self.order)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.precision = self._precision()
        self._check()
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.precision is torch.float16)
        self.generators = generators_of(task.data)
        self.history = History()
        self.start = digest(state_of(model)) if self.path is not None else ""
        self.best: dict[str, Tensor] = {}
        self.beside: dict[str, Tensor] = {}  # the companion's state at the best epoch
        self.companion = None if companion is None else companion(self.optimizer)

    # -- setting up ---------------------------------------------------------
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
        }

    def _save(self, settings: dict[str, Any]) -> None:
        if self.path is None:
            return
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
        write_state(self.path, KIND, tensors, meta)

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
        for key, value in settings.items():
            same(
                f"settings of fine-tuning: {key}",
                theirs.get(key),
                value,
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
            stack.enter_context(seeded(self.task.seed, self.device))
            stack.enter_context(modes_kept(self.model))
            if self.task.distill is not None:
                stack.enter_context(evaluating(self.task.distill.teacher))
            if not self._load(settings):
                self._save(settings)  # a path that can not be written to should be known now
            self._training_mode()
            done = len(self.history.losses)
            bar = stack.enter_context(
                tqdm(total=total, initial=done * self.steps, desc="fine-tuning", unit="batch",
                     disable=None if self.task.progress else True)
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

    def _validate(self) -> None:
        if self.task.validation is None:
            return
        found = evaluate(self.model, self.task.validation, progress=False).accuracy
        self.history = self.history.validated(found)
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
        losses, right, count = 0.0, 0, 0
        labelled = True
        step, rate = -1, 0.0
        for step, batch in enumerate(self._batches(epoch)):
            rate = self.rate(epoch * self.steps + min(step, self.steps - 1))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            try:
                loss, output = self._step(batch, step)
            except LRPError:
                raise
            except Exception as error:
                error.add_note(f"in epoch {epoch + 1}, step {step + 1} of compress.FineTune")
                raise
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss} in epoch {epoch + 1}, step {step + 1}", rate, epoch)
            n = len(output)
            losses, count = losses + loss * n, count + n
            labelled = labelled and batch.y is not None
            if batch.y is not None:
                right += int((output.argmax(1) == batch.y).sum())
            bar.set_postfix(loss=f"{losses / count:.4f}", refresh=False)
            bar.update()
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise self._diverged(f"weights are not finite after epoch {epoch + 1}, step {step + 1}", rate, epoch)
        accuracy = right / count if labelled else None
        self.history = self.history.plus(losses / count, accuracy, rate, round(time.monotonic() - began, 3))

    def _batches(self, epoch: int) -> Iterator[Batch]:
        return batches_of(self.order.epoch(epoch), self.device)

    def _step(self, batch: Batch, step: int) -> tuple[float, Tensor]:
        mixed = torch.autocast("cuda", self.precision) if self.precision is not None else contextlib.nullcontext()
        self.optimizer.zero_grad(set_to_none=True)
        with mixed:
            output = logits_of(outputs_of(self.model, batch.inputs), step)
        loss = self._loss(output.float() if self.precision is not None else output, batch, step, mixed)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value, output
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch: untyped
        if self.task.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.task.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.companion is not None and self.companion.stepped:  # a scaler may have left the step out
            self.companion.step(batch.x, batch.y)
        return value, output.detach()

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
