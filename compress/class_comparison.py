r"""Which classes a change has hurt.

Two networks asked about the same samples are compared by those on which they
disagree: with b samples that only the first gets right and c that only the
second does, b is Binomial(b + c, 1/2) if neither is better (exact test of
Q. McNemar, Psychometrika 12, 1947).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrp.errors import InputError, MismatchError

if TYPE_CHECKING:
    from compress.evaluation import Evaluation

__all__ = ["ClassChange", "ClassComparison", "compare_classes", "compared", "mcnemar"]


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
    >>> from compress.class_comparison import compare_classes
    >>> from compress.evaluation import evaluate
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


def compared(before: Evaluation | None, after: Evaluation | None) -> ClassComparison | None:
    """Who was hurt; None without two evaluations on the same labelled data.

    Without p-values where the data were shuffled between them.
    """
    if before is None or after is None or not before.per_class or not after.per_class:
        return None
    if {c.label: c.count for c in before.per_class} != {c.label: c.count for c in after.per_class}:
        return None
    return compare_classes(before, after, paired=not other_order(before, after))


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
