"""Fine-tuning of a pruned network."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from compress._data import check_reiterable
from compress._distillation import Distillation, distillation_loss
from compress._order import fingerprint, order_of
from lrp._files import digest
from lrp.errors import InputError

__all__ = ["Distillation", "FineTune", "History", "distillation_loss"]

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "linear", "constant")
Companion = Callable[..., Any]  # of the optimiser
PRECISIONS = ("auto", "off", "bf16", "fp16")


@dataclass(frozen=True)
class History:
    """What happened in each epoch.

    Attributes
    ----------
    losses : tuple of float
        Mean over the samples.
    accuracies : tuple of float or None
        On the training batches, while they were learnt from; None without labels.
    rates : tuple of float
        Learning rate of the last step.
    validations : tuple of float
        Accuracy on the validation data; empty without them.
    best : int
        The epoch, from 1, whose weights the model has; 0: those of the last.
    seconds : tuple of float
        Left out of comparisons.
    """

    losses: tuple[float, ...] = ()
    accuracies: tuple[float | None, ...] = ()
    rates: tuple[float, ...] = ()
    validations: tuple[float, ...] = ()
    best: int = 0
    seconds: tuple[float, ...] = field(default=(), compare=False)

    def plus(self, loss: float, accuracy: float | None, rate: float, seconds: float) -> History:
        """With one more epoch."""
        return replace(
            self,
            losses=(*self.losses, loss),
            accuracies=(*self.accuracies, accuracy),
            rates=(*self.rates, rate),
            seconds=(*self.seconds, seconds),
        )

    def validated(self, accuracy: float) -> History:
        """With the validation of the last epoch; the first of equal ones stays the best."""
        found = (*self.validations, accuracy)
        return replace(self, validations=found, best=found.index(max(found)) + 1)

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> History:
        names = ("losses", "accuracies", "rates", "seconds", "validations")
        return cls(**{name: tuple(stored.get(name, ())) for name in names}, best=int(stored.get("best", 0)))

    def __str__(self) -> str:
        head = "epoch  loss    accuracy  rate    "
        rows = [f"{head}  validation" if self.validations else head.rstrip()]
        for k, (loss, accuracy, rate) in enumerate(zip(self.losses, self.accuracies, self.rates, strict=True), 1):
            share = "-" if accuracy is None else f"{accuracy:.4f}"
            rows.append(f"{k:5d}  {loss:.4f}  {share:8s}  {rate:.2e}")
            if self.validations:
                rows[-1] += f"  {self.validations[k - 1]:.4f}{' best' if k == self.best else ''}"
        return "\n".join(rows)


@dataclass(frozen=True)
class FineTune:
    """Training of a network in place: ``FineTune(data, epochs=5)(model)``.

    Parameters
    ----------
    data
        Batches ``(x, y)``: a DataLoader, whose order is its own (seed it by its
        ``generator``), or a list, whose batches come in a new seeded order in
        every epoch. Or one pair of tensors ``(x, y)``, whose rows are dealt
        into new batches of ``batch_size`` in every epoch. Labels may be missing
        where all of the loss is distillation.
    epochs : int
    optimizer : "sgd" or "adamw"
        Made anew at each call, for pruning replaces parameters. Only those that
        require a gradient are trained.
    lr, momentum, weight_decay : float
        The largest learning rate; momentum of SGD (Nesterov's if positive);
        decay of weights with two or more axes, so not of biases and norms.
    schedule : "cosine", "linear" or "constant"
        From ``lr`` to 0, step by step, after the warm-up.
    warmup : float
        Share of all steps in which the rate rises linearly to ``lr``.
    mixed_precision : "auto", "off", "bf16" or "fp16"
        Automatic mixed precision on CUDA: "auto" is bf16 where the device has
        it, else fp16 with a scaled gradient; off on other devices.
    distill : Distillation, optional
        A teacher to follow.
    label_smoothing : float
    clip : float, optional
        Largest norm of the gradient.
    batch_size : int
        For a pair of tensors.
    validation : optional
        Labelled batches, apart from the training and the test data. They are
        read after every epoch, and the model ends as after the best one.
    patience : int, optional
        Stop after so many epochs without a better validation.
    seed : int
        Sets the order and torch's, numpy's and Python's global random states
        within the call (dropout, transforms, loaders without a generator).
        After the call these are as before.
    progress : bool
        A bar on stderr, on a terminal only.

    Raises
    ------
    InputError

    Notes
    -----
    Batch-norm layers all of whose parameters are frozen keep their statistics.
    Memory: gradients, the optimiser's state, and one copy of the model, to
    which it returns if an epoch fails.

    Under torch.distributed (``torchrun``) all processes train one network.
    Give each the same model, data and settings, and seed a loader of your own
    alike: every process reads all batches of an epoch and takes each
    ``world``-th, beginning with its rank. They start from the parameters and
    buffers of process 0. A step moves by the gradient of the mean over the
    samples of all processes, summed in float64, clipped and checked as a whole.
    So ``world`` processes do what one does that reads, in every step, the next
    ``world`` batches of the epoch joined into one (fewer at its end), with
    ceil(batches / world) steps: to rounding where no layer ties samples
    together (batch norm) or draws random numbers (dropout, which each process
    draws on its own). Batch norm takes the statistics of a process' own batch;
    at the end of an epoch its running means and variances become their mean
    over the processes, by samples, and other buffers those of process 0.
    Validation batches are dealt likewise. History, weights and the companion
    are the same in all; if one process fails, all raise, as soon as they are
    through with their batch, and none waits longer than the group's time-out.
    The learning rate is not scaled. Cost: 8 bytes per parameter are summed in
    every step, after the backward pass (memory: 24), and all weights are
    compared after every epoch. ``SyncBatchNorm`` needs a number of batches that
    the processes divide; with it an error in one process may end the others by
    time-out only.

    Examples
    --------
    >>> import torch
    >>> from compress.training import FineTune
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> net = torch.nn.Linear(2, 2)
    >>> history = FineTune((x, (x[:, 0] > 0).long()), epochs=20, lr=1.0)(net)
    >>> len(history.losses), history.losses[-1] < 0.2
    (20, True)
    """

    data: Any = field(repr=False)
    epochs: int = 1
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.0
    mixed_precision: str = "auto"
    distill: Distillation | None = None
    label_smoothing: float = 0.0
    clip: float | None = None
    batch_size: int = 64
    validation: Any = field(default=None, repr=False)
    patience: int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("mixed_precision", PRECISIONS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} is unknown",
                    expected=f"one of {', '.join(allowed)}",
                    got=repr(getattr(self, name)),
                    fix="choose one, or pass a function of your own as fine_tune=",
                )
        bounds = {
            "epochs": self.epochs >= 1 and int(self.epochs) == self.epochs,
            "lr": self.lr > 0,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": self.weight_decay >= 0,
            "warmup": 0 <= self.warmup < 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "clip": self.clip is None or self.clip > 0,
            "batch_size": self.batch_size >= 1,
            "patience": self.patience is None or (isinstance(self.patience, int) and self.patience >= 1),
            "seed": self.seed >= 0,
        }
        for name, right in bounds.items():
            if not right:
                raise InputError(
                    f"{name} makes no sense",
                    expected="epochs, batch_size, patience >= 1, whole numbers; lr, clip > 0; weight_decay, seed >= 0; "
                    "momentum, warmup, label_smoothing in [0, 1)",
                    got=f"{name}={getattr(self, name)!r}",
                    fix="warmup is a share of all steps, not a number of epochs" if name == "warmup" else "change it",
                )
        order_of(self.data, self.batch_size, self.seed)
        if self.patience is not None and self.validation is None:
            raise InputError(
                "patience needs something to wait for",
                expected="validation= with labelled batches",
                got="none",
                fix="pass samples that are neither trained on nor used for the final test",
            )
        if self.validation is not None:
            check_reiterable(self.validation, "validation")
            if self.validation is self.data:
                raise InputError(
                    "the validation data are the training data",
                    expected="samples that are not trained on",
                    got="the same object",
                    fix="split them",
                )

    def settings(self) -> dict[str, Any]:
        """What the result depends on beside the model: JSON-able, data and teacher as digests."""
        plain = ("epochs", "optimizer", "lr", "momentum", "weight_decay", "schedule", "warmup", "mixed_precision",
                 "label_smoothing", "clip", "batch_size", "patience", "seed")  # fmt: skip
        out: dict[str, Any] = {name: getattr(self, name) for name in plain}
        out["data"] = order_of(self.data, self.batch_size, self.seed).fingerprint()
        out["validation"] = None if self.validation is None else fingerprint(self.validation)
        out["distill"] = None
        if self.distill is not None:
            teacher = digest(dict(self.distill.teacher.state_dict()))
            out["distill"] = [self.distill.temperature, self.distill.weight, teacher]
        return out

    def __call__(
        self, model: nn.Module, *, resume: str | os.PathLike[str] | None = None, companion: Companion | None = None
    ) -> History:
        """Train the model in place.

        Parameters
        ----------
        model : nn.Module
            A classifier with output (N, C); the batches are moved to its
            device. Training flags are put back afterwards.
        resume : path, optional
            A file for the state: model, optimiser, random states, history. It
            is written at the start and after every epoch, whole or not at all.
            Where it exists, training goes on after its last epoch, on a CPU to
            the same bits. The model must be the one the training began with,
            or the one that the file holds. Of several processes the first
            writes and all read, so it lies on a disk that all see; as many must
            go on as there were.
        companion : callable, optional
            Gets the optimiser and returns what goes along with the training and
            is saved with it: :class:`compress.Quantizer`.

        Returns
        -------
        History
            With the epochs before the resumption.

        Raises
        ------
        InputError
            If there is nothing to train, or labels are missing.
        OutputError, TargetError
            If the output is no (N, C), or a label is none of its classes.
        NonFiniteError
            If a loss or a weight is NaN or infinite.
        MismatchError, FileFormatError, DataError
            If ``resume`` is of another run, damaged, or in no folder.
        DistributedError
            If another process failed or is gone, or the processes differ in
            model, data or settings.

        Notes
        -----
        On any error, Ctrl-C included, the model is left as after its last
        finished epoch, which is also what the file holds. Random states of the
        persistent workers of a DataLoader are not part of the file.
        """
        from compress._trainer import Trainer

        return Trainer(self, model, resume, companion).run()
