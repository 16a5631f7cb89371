r"""Accuracy on labelled data, and how sure it is.

An accuracy of k right answers out of n has the Wilson score interval

.. math:: \frac{k + z^2/2}{n + z^2} \pm \frac{z}{n + z^2} \sqrt{\frac{k (n - k)}{n} + \frac{z^2}{4}},

which stays within [0, 1] and is not empty for k = 0 or k = n (E. B. Wilson,
"Probable inference, the law of succession, and statistical inference", JASA
22, 1927). Which classes a change has hurt: :mod:`compress.class_comparison`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress._data import batches_of, check_reiterable, device_of, labels_of, outputs_of
from compress._modes import evaluating
from lrp._settings import as_double
from lrp.errors import InputError, NonFiniteError, OutputError, TargetError

__all__ = [
    "ClassAccuracy",
    "Evaluation",
    "Evaluator",
    "evaluate",
    "evaluator_of",
    "wilson",
]

Classes = Sequence[str] | Mapping[int, str] | None


def wilson(correct: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share; (0, 1) without samples.

    Examples
    --------
    >>> [round(p, 3) for p in wilson(9, 10)]
    [0.596, 0.982]
    """
    if not count:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = correct + z * z / 2
    half = z * math.sqrt(correct * (count - correct) / count + z * z / 4)
    return max(0.0, (middle - half) / (count + z * z)), min(1.0, (middle + half) / (count + z * z))


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy on the samples of one class."""

    label: int
    name: str
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count if self.count else math.nan

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's."""
        return wilson(self.correct, self.count, level)


@dataclass(frozen=True)
class Evaluation:
    """What a network gets right.

    Attributes
    ----------
    accuracy : float
        Share of samples whose largest output is their class; or whatever number
        the user's own function returned.
    loss : float or None
        Mean cross-entropy, in nats.
    count : int
        Samples; 0 where a function of the user's was asked.
    per_class : tuple of ClassAccuracy
        Of the classes that have samples, by label.
    labels, predictions : Tensor (count,) int64, on the CPU, or None
        Kept for comparisons; not part of the JSON form.

    Examples
    --------
    >>> import torch
    >>> from compress.evaluation import evaluate
    >>> x = torch.eye(3)
    >>> found = evaluate(torch.nn.Identity(), [(x, torch.tensor([0, 1, 0]))])
    >>> print(found)
    accuracy 0.6667 (95 % interval 0.2077 to 0.9385, 3 samples), loss 0.8848
    >>> found.correct.tolist(), found.confusion.tolist()
    ([True, True, False], [[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    """

    accuracy: float
    loss: float | None = None
    count: int = 0
    per_class: tuple[ClassAccuracy, ...] = ()
    labels: Tensor | None = field(default=None, repr=False, compare=False)
    predictions: Tensor | None = field(default=None, repr=False, compare=False)
    outputs: int = field(default=0, repr=False, compare=False)

    @property
    def correct(self) -> Tensor | None:
        """Which samples are right: bool (count,); None after JSON."""
        if self.labels is None or self.predictions is None:
            return None
        return self.labels == self.predictions

    @property
    def confusion(self) -> Tensor | None:
        """int64 (C, C): samples of each class (row) by predicted class; None after JSON."""
        if self.labels is None or self.predictions is None:
            return None
        flat = torch.bincount(self.labels * self.outputs + self.predictions, minlength=self.outputs**2)
        return flat.reshape(self.outputs, self.outputs)

    @property
    def chance(self) -> float | None:
        """Accuracy of always naming the class with most samples; None where the classes are not known."""
        return max(c.count for c in self.per_class) / self.count if self.per_class and self.count else None

    @property
    def at_chance(self) -> bool:
        """Whether the accuracy can not be told from that, by its 95 % interval."""
        chance, interval = self.chance, self.interval()
        return chance is not None and chance < 1 and interval is not None and interval[0] <= chance

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Wilson's; None where the samples are not known."""
        return wilson(round(self.accuracy * self.count), self.count, level) if self.count else None

    def to_json(self) -> dict[str, Any]:
        interval = self.interval()
        return {
            "accuracy": self.accuracy,
            "interval": None if interval is None else list(interval),
            "loss": self.loss,
            "count": self.count,
            "per_class": [
                {
                    "label": c.label,
                    "name": c.name,
                    "correct": c.correct,
                    "count": c.count,
                    "accuracy": c.accuracy,
                    "interval": list(c.interval()),
                }
                for c in self.per_class
            ],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Evaluation:
        loss = stored["loss"]
        rows = (
            ClassAccuracy(int(c["label"]), str(c["name"]), int(c["correct"]), int(c["count"]))
            for c in stored["per_class"]
        )
        return cls(float(stored["accuracy"]), None if loss is None else float(loss), int(stored["count"]), tuple(rows))

    def __str__(self) -> str:
        interval = self.interval()
        out = f"accuracy {self.accuracy:.4f}"
        if interval is not None:
            out += f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f}, {self.count} samples)"
        return out if self.loss is None else f"{out}, loss {self.loss:.4f}"


Evaluator = Callable[[nn.Module], Evaluation]


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    device: torch.device | str | None = None,
    classes: Classes = None,
    progress: bool = False,
) -> Evaluation:
    """Accuracy and mean cross-entropy of a classifier, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Its output is (N, C) with C >= 2. Training flags are put back.
    data : iterable
        A DataLoader or list that yields ``(x, y)``, y a LongTensor (N,).
    device : torch.device or str, optional
        Batches are moved there; the model's own if not given.
    classes : sequence of str or dict of int to str, optional
        Names of the classes.
    progress : bool
        A bar on stderr, on a terminal only.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        For data of an unknown form, without labels, or without samples.
    OutputError, TargetError
        If the output is no (N, C), or a label is none of its classes.
    NonFiniteError
        If an output is NaN or infinite.

    Notes
    -----
    Of equal largest outputs the first counts. Sums are float64. Cost: one
    forward pass; 16 bytes per sample are kept.

    Examples
    --------
    >>> import torch
    >>> from compress.evaluation import evaluate
    >>> data = [(torch.eye(3), torch.tensor([0, 1, 1]))]
    >>> found = evaluate(torch.nn.Identity(), data, classes=["ash", "beech", "cedar"])
    >>> [(c.name, c.correct, c.count) for c in found.per_class]
    [('ash', 1, 1), ('beech', 1, 2)]
    """
    from tqdm import tqdm

    data = check_reiterable(data)
    place = device_of(model, device)
    labels, predictions, losses = [], [], 0.0
    width = 0
    with evaluating(model), torch.no_grad():
        bar = tqdm(batches_of(data, place), total=_length(data), desc="evaluation", unit="batch",
                   disable=None if progress else True)  # fmt: skip
        for index, batch in enumerate(bar):
            y = labels_of(batch, "evaluation")
            output = logits_of(outputs_of(model, batch.inputs), index)
            width = _checked(output, y, index)
            losses += float(F.cross_entropy(as_double(output), y.to(as_double(output).device), reduction="sum"))
            labels.append(y.cpu())
            predictions.append(output.argmax(1).cpu())
    return _evaluation(torch.cat(labels), torch.cat(predictions), losses, width, classes)


def logits_of(output: Any, index: int) -> Tensor:
    """The output (N, C) of a classifier, checked.

    Raises
    ------
    OutputError
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() != 2 or output.shape[1] < 2:
        shape = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise OutputError(
            "the model is no classifier",
            expected="one output (N, C) with C >= 2",
            got=f"{shape} in batch {index}",
            fix="wrap the model so that it returns its logits, or pass a function of your own as evaluate=",
        )
    return output


def _checked(output: Tensor, y: Tensor, index: int) -> int:
    """The number of classes, if output and labels make sense."""
    width = output.shape[1]
    if not bool(torch.isfinite(output).all()):
        raise NonFiniteError(
            f"the model's output is not finite in batch {index}",
            expected="finite logits",
            got=f"{int((~torch.isfinite(output)).sum())} of {output.numel()} NaN or infinite",
            fix="check the inputs, then the weights: a training step that diverged leaves NaN behind",
        )
    check_labels(y, width, index)
    return width


def check_labels(y: Tensor, width: int, index: int) -> None:
    """Raise TargetError for a label that is none of the classes."""
    least, most = int(y.min()), int(y.max())
    if least < 0 or most >= width:
        raise TargetError(
            f"a label of batch {index} is none of the model's classes",
            expected=f"0 to {width - 1}",
            got=f"{least} to {most}",
            fix="check how the data number their classes",
        )


def _evaluation(y: Tensor, predictions: Tensor, losses: float, width: int, classes: Classes) -> Evaluation:
    right = y == predictions
    counts = torch.bincount(y, minlength=width).tolist()
    correct = torch.bincount(y[right], minlength=width).tolist()
    names = _names(classes, width)
    per_class = tuple(ClassAccuracy(c, names[c], correct[c], counts[c]) for c in range(width) if counts[c])
    n = len(y)
    return Evaluation(int(right.sum()) / n, losses / n, n, per_class, y, predictions, width)


def _names(classes: Classes, width: int) -> list[str]:
    if classes is None:
        return [str(c) for c in range(width)]
    if isinstance(classes, Mapping):
        return [str(classes.get(c, c)) for c in range(width)]
    if isinstance(classes, str) or len(classes) != width:
        raise InputError(
            "the names of the classes do not fit the model",
            expected=f"{width} names",
            got=repr(classes) if isinstance(classes, str) else f"{len(classes)}",
            fix="name all outputs in their order, or pass {label: name}",
        )
    return [str(name) for name in classes]


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def evaluator_of(
    evaluate_with: Any, *, device: torch.device | str | None = None, classes: Classes = None
) -> Evaluator | None:
    """One form for the three that ``evaluate=`` takes.

    Parameters
    ----------
    evaluate_with : None, iterable or callable
        None: no evaluation. Data: :func:`evaluate` on them. A function of the
        model that returns a number (larger is better) or an Evaluation; it is
        called in evaluation mode.
    device, classes
        For data; see :func:`evaluate`.

    Returns
    -------
    callable or None
        From a model to an Evaluation. A user's number has ``count`` 0, no loss
        and no classes.

    Raises
    ------
    InputError
        At once if it is none of the three; later if a function returns no number.
    NonFiniteError
        If it returns NaN or infinity.

    Examples
    --------
    >>> import torch
    >>> from compress.evaluation import evaluator_of
    >>> evaluator_of(lambda model: 0.75)(torch.nn.Identity())
    Evaluation(accuracy=0.75, loss=None, count=0, per_class=())
    """
    if evaluate_with is None:
        return None
    if hasattr(evaluate_with, "__iter__") or hasattr(evaluate_with, "__getitem__"):
        data = check_reiterable(evaluate_with, "evaluate")
        return lambda model: evaluate(model, data, device=device, classes=classes)
    if not callable(evaluate_with):
        raise InputError(
            "evaluate is neither data nor a function",
            expected="None, batches (x, y), or a function from a model to a number",
            got=type(evaluate_with).__name__,
            fix="pass a DataLoader or a list of (x, y)",
        )

    def asked(model: nn.Module) -> Evaluation:
        with evaluating(model):
            found = evaluate_with(model)
        if isinstance(found, Evaluation):
            return found
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, Real):
            raise InputError(
                "the function given as evaluate returned no number",
                expected="a float, larger is better, or an Evaluation",
                got=type(found).__name__,
                fix="return the accuracy",
            )
        if not math.isfinite(found):
            raise NonFiniteError(
                "the function given as evaluate returned no finite number",
                expected="a finite float",
                got=repr(float(found)),
                fix="check what it divides by, and whether the outputs are finite",
            )
        return Evaluation(float(found))

    return asked
