r"""Accuracy on labelled data, how sure it is, and which classes a change has hurt.

An accuracy of k right answers out of n has the Wilson score interval

.. math:: \frac{k + z^2/2}{n + z^2} \pm \frac{z}{n + z^2} \sqrt{\frac{k (n - k)}{n} + \frac{z^2}{4}},

which stays within [0, 1] and is not empty for k = 0 or k = n (E. B. Wilson,
"Probable inference, the law of succession, and statistical inference", JASA
22, 1927). Two networks asked about the same samples are compared by those on
which they disagree: with b samples that only the first gets right and c that
only the second does, b is Binomial(b + c, 1/2) if neither is better (exact
test of Q. McNemar, Psychometrika 12, 1947).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress._data import batches_of, check_reiterable, device_of, labels_of, outputs_of
from compress._modes import evaluating
from lrp._settings import as_double
from lrp.errors import InputError, MismatchError, NonFiniteError, OutputError, TargetError

__all__ = [
    "ClassAccuracy",
    "ClassChange",
    "ClassComparison",
    "Evaluation",
    "Evaluator",
    "compare_classes",
    "evaluate",
    "evaluator_of",
    "mcnemar",
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


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value of McNemar's test; 1 where nothing changed.

    Parameters
    ----------
    lost, gained : int
        Samples that only the first, or only the second network gets right.

    Examples
    --------
    >>> mcnemar(6, 0), mcnemar(3, 3)
    (0.03125, 1.0)
    """
    n, k = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / (1 << n))  # whole numbers divide correctly rounded, however large


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


@dataclass(frozen=True)
class ClassChange:
    """One class before and after.

    Attributes
    ----------
    label, name : int, str
        -1 and "all" for all samples together.
    count : int
        Samples.
    before, after : float
        Accuracy.
    lost, gained : int or None
        Samples that only the first, or only the second network gets right; None
        without per-sample results.
    p_value : float or None
        Of McNemar's exact test, for this class alone.
    adjusted : float or None
        After Holm's correction for the number of classes.
    """

    label: int
    name: str
    count: int
    before: float
    after: float
    lost: int | None = None
    gained: int | None = None
    p_value: float | None = None
    adjusted: float | None = None

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before


@dataclass(frozen=True)
class ClassComparison:
    """Who was hurt: classes from the largest loss to the largest gain; prints as a table.

    Attributes
    ----------
    rows : tuple of ClassChange
    overall : ClassChange
        All samples.
    """

    rows: tuple[ClassChange, ...]
    overall: ClassChange

    def __iter__(self) -> Iterator[ClassChange]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ClassChange:
        return self.rows[index]

    def hurt(self, level: float = 0.05) -> tuple[ClassChange, ...]:
        """Classes that lost, significantly so after Holm's correction."""
        return tuple(r for r in self.rows if r.difference < 0 and r.adjusted is not None and r.adjusted <= level)

    def to_json(self) -> dict[str, Any]:
        def row(r: ClassChange) -> dict[str, Any]:
            return {**vars(r), "difference": r.difference}

        return {"rows": [row(r) for r in self.rows], "overall": row(self.overall)}

    def __str__(self) -> str:
        table = [("class", "samples", "before", "after", "change", "lost", "gained", "p (Holm)")]
        for r in (*self.rows, self.overall):
            p = r.adjusted if r.label >= 0 else r.p_value
            table.append(
                (
                    r.name,
                    str(r.count),
                    f"{r.before:.4f}",
                    f"{r.after:.4f}",
                    f"{r.difference:+.4f}",
                    "-" if r.lost is None else str(r.lost),
                    "-" if r.gained is None else str(r.gained),
                    "-" if p is None else f"{p:.3g}",
                )
            )
        widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in table
        )


def compare_classes(before: Evaluation, after: Evaluation, *, paired: bool = True) -> ClassComparison:
    """Which classes a change has hurt.

    Parameters
    ----------
    before, after : Evaluation
        Of two networks on the same samples in the same order.
    paired : bool
        False: the samples came in another order, so that only the accuracies
        can be compared.

    Returns
    -------
    ClassComparison
        Sorted by loss of accuracy. Unpaired, or without per-sample results
        (after JSON), there are no p-values.

    Raises
    ------
    InputError
        If they have no classes: a user's function was asked.
    MismatchError
        If they are of other samples.

    Notes
    -----
    p-values of single classes are corrected by Holm's step-down method (S. Holm,
    Scandinavian Journal of Statistics 6, 1979): with many classes some will seem
    to be hurt by chance.

    Examples
    --------
    >>> import torch
    >>> from compress.evaluation import compare_classes, evaluate
    >>> x, y = torch.eye(2).repeat(6, 1), torch.tensor([0, 1] * 6)
    >>> first = evaluate(torch.nn.Identity(), [(x, y)])
    >>> second = evaluate(torch.nn.Threshold(2.0, 0.0), [(x, y)])  # always 0, so that class 0 is taken
    >>> print(compare_classes(first, second))
    class  samples  before   after   change  lost  gained  p (Holm)
    1            6  1.0000  0.0000  -1.0000     6       0    0.0625
    0            6  1.0000  1.0000  +0.0000     0       0         1
    all         12  1.0000  0.5000  -0.5000     6       0    0.0312
    """
    if not before.per_class or not after.per_class:
        raise InputError(
            "there are no classes to compare",
            expected="two results of compress.evaluate on data",
            got="a number that a function returned",
            fix="pass labelled data as evaluate=",
        )
    if not paired:
        before, after = (replace(e, labels=None, predictions=None) for e in (before, after))
    theirs = {c.label: c for c in after.per_class}
    counts = [{c.label: c.count for c in e.per_class} for e in (before, after)]
    if counts[0] != counts[1] or other_order(before, after):
        raise MismatchError(
            "the two evaluations are of different samples",
            expected="the same data in the same order",
            got=f"{before.count} and {after.count} samples, other classes or another order",
            fix="evaluate both networks on the same data without shuffling, or compare with paired=False",
        )
    rows = []
    for c in before.per_class:
        at = None if before.labels is None else before.labels == c.label
        rows.append(_change(c.label, c.name, c.count, c.accuracy, theirs[c.label].accuracy, before, after, at))
    rows = _holm(rows)
    rows.sort(key=lambda r: (r.difference, 1.0 if r.p_value is None else r.p_value, r.label))
    overall = _change(-1, "all", before.count, before.accuracy, after.accuracy, before, after, None)
    return ClassComparison(tuple(rows), overall)


def other_order(before: Evaluation, after: Evaluation) -> bool:
    """Whether the labels are known not to come in one order."""
    first, second = before.labels, after.labels
    return first is not None and second is not None and not torch.equal(first, second)


def _change(
    label: int, name: str, count: int, accuracy: float, then: float,
    before: Evaluation, after: Evaluation, at: Tensor | None,
) -> ClassChange:  # fmt: skip
    first, second = before.correct, after.correct
    if first is None or second is None:
        return ClassChange(label, name, count, accuracy, then)
    if at is not None:
        first, second = first[at], second[at]
    lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
    return ClassChange(label, name, count, accuracy, then, lost, gained, mcnemar(lost, gained))


def _holm(rows: list[ClassChange]) -> list[ClassChange]:
    """With p-values adjusted for all classes."""
    order = sorted((r.p_value, k) for k, r in enumerate(rows) if r.p_value is not None)
    out, largest = list(rows), 0.0
    for rank, (p, k) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        out[k] = replace(rows[k], adjusted=largest)
    return out
