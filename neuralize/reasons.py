"""What speaks for and against, for one row: every column with its value and its break-even point."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import numpy as np

from lrp.errors import InputError
from neuralize._columns import significant
from neuralize._taken import dense, position, row_label, take, wordless
from neuralize._words import notes, words
from neuralize.explanation import Explanation
from neuralize.sentences import note_of, of_row

__all__ = ["ForAndAgainst", "Reason", "for_and_against", "parts_of"]


@dataclass(frozen=True)
class Reason:
    """One column of one row.

    Attributes
    ----------
    name : str
    value : float, str or None
        Raw value, the name of a category, or None where it is missing or the
        column is a group of others.
    break_even : float
        Raw value at which the column would speak neither for nor against; NaN
        where there is none.
    side : str
        "above" or "below": where a value speaks for the explained label, next
        to the break-even point; empty where there is none.
    relevance : float
    shown, point : str
        Value and side as they are printed, so that they can be told apart.
    """

    name: str
    value: float | str | None
    break_even: float
    side: str
    relevance: float
    shown: str
    point: str


@dataclass(frozen=True)
class ForAndAgainst:
    """The columns that speak for and against what is explained, for one row.

    Attributes
    ----------
    row : str
        Its label.
    question, sentence : str
    output : float
        ``sum of all relevances + sum of residual_parts``.
    unit : str
    pro, con : tuple of Reason
        The strongest first.
    others : int
        Columns in neither list.
    rest : float
        Their summed relevance.
    residual_parts : dict of float
        What no column carries, by name.
    heads : tuple of str
        Headings of the two lists.
    does : str
        Heading of the sides: "speaks for it".
    notes : tuple of str
        What else is to know about the row.
    """

    row: str
    question: str
    sentence: str
    output: float
    unit: str
    pro: tuple[Reason, ...]
    con: tuple[Reason, ...]
    others: int
    rest: float
    residual_parts: dict[str, float]
    heads: tuple[str, str]
    does: str = "speaks for it"
    notes: tuple[str, ...] = ()

    def _sums(self) -> list[tuple[str, float]]:
        """What makes the lists add up to the output."""
        sums = [(f"{self.others} other column{'s' * (self.others != 1)}", self.rest)] if self.others else []
        return [*sums, *self.residual_parts.items(), ("output", self.output)]

    def __str__(self) -> str:
        lists = [(head, rows) for head, rows in zip(self.heads, (self.pro, self.con), strict=True) if rows]
        rows = [r for _, part in lists for r in part]
        sums = self._sums()
        wide = [
            max(map(len, [head for head, _ in lists] + [f"  {r.name}" for r in rows] + [name for name, _ in sums])),
            max([5, *(len(r.shown) for r in rows)]),
            max([13, *(len(r.point) for r in rows)]),
        ]

        def line(name: str, value: str, point: str, number: str) -> str:
            return f"{name:<{wide[0]}}  {value:>{wide[1]}}  {point:>{wide[2]}}  {number:>10}".rstrip()

        text = [f"Row {self.row}: {self.question}", self.sentence, ""]
        for head, part in lists:
            text.append(line(head, "value", self.does, "relevance"))
            text += [line(f"  {r.name}", r.shown, r.point, significant(r.relevance)) for r in part]
        text += [line(name, "", "", significant(number)) for name, number in sums]
        return "\n".join([*text, f"in {self.unit}", *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def cells(*texts: str, tag: str = "td") -> str:
            return "".join(
                f'<{tag} style="padding:.15em .6em;text-align:{"right" if i else "left"}">{html.escape(t)}</{tag}>'
                for i, t in enumerate(texts)
            )

        body = ""
        for head, part, colour in zip(self.heads, (self.pro, self.con), ("#c2410c", "#1d4ed8"), strict=True):
            if part:
                body += f'<tr style="color:{colour}">{cells(head, "value", self.does, "relevance", tag="th")}</tr>'
                body += "".join(f"<tr>{cells(r.name, r.shown, r.point, significant(r.relevance))}</tr>" for r in part)
        body += "".join(f"<tr>{cells(name, '', '', significant(v))}</tr>" for name, v in self._sums())
        caption = html.escape(f"Row {self.row}: {self.question}")
        return (
            f'<div style="color:#1f2933;background:#fff;padding:.4em"><p><b>{caption}</b><br>'
            f"{html.escape(self.sentence)}</p><table>{body}</table>"
            f'<p style="color:#5f6c7b">{"<br>".join(map(html.escape, (f"in {self.unit}", *self.notes)))}</p></div>'
        )


def reason(one: Explanation, t: int, groups: frozenset[str]) -> Reason:
    """Column ``t`` of the only row; the side is the one that speaks for the explained label."""
    name, raw = one.feature_names[t], float(one.data[0, t])
    note, known = note_of(one, t, 1, name in groups), name not in one.categories
    return Reason(
        note.name,
        None if note.direction in ("missing", "group") else note.category or raw,
        float(one.break_even[0, t]) if known else math.nan,
        note.direction if note.side else "",
        note.relevance,
        note.value,
        note.point,
    )


def parts_of(e: Explanation, i: int) -> dict[str, float]:
    """What no column of a row carries, by name; it adds up to the residual.

    Parts of 0, to rounding, are left out; a part without a name is called "residual".
    """
    parts = {name: float(part[i]) for name, part in e.residual_parts.items()}
    rest = float(e.residual[i]) - sum(parts.values())
    scale = float(np.abs(dense(e.values[[i]])).sum()) + sum(map(abs, parts.values())) + abs(float(e.residual[i]))
    parts = {name: size for name, size in parts.items() if abs(size) > 1e-12 * scale}
    if abs(rest) > 1e-6 * scale:
        parts["residual"] = parts.get("residual", 0.0) + rest
    return parts


def for_and_against(explanation: Explanation, i: int, top: int = 5) -> ForAndAgainst:
    """The columns that speak most for and most against, for row ``i``.

    Parameters
    ----------
    explanation : Explanation
    i : int
        Position of the row.
    top : int
        At most so many columns on either list.

    Raises
    ------
    InputError
        If there is no such row, or ``top`` is no integer > 0.

    Examples
    --------
    >>> from neuralize import CentroidHead, NeuralizedModel
    >>> net = NeuralizedModel(CentroidHead([[0.0, 0.0], [10.0, 2.0]]), feature_names=["age", "size"])
    >>> print(for_and_against(net.explain([[4.0, 1.9]]), 0))
    Row 0: why cluster 0
    This row is in cluster 0 mostly because age is 4 (below about 5); size (1.9) speaks against it.
    <BLANKLINE>
    Speaks for cluster 0      value  speaks for it   relevance
      age                         4        below 5          20
    Speaks against cluster 0  value  speaks for it   relevance
      size                      1.9        below 1        -3.6
    output                                                16.4
    in squared distance of the raw columns
    """
    e, i, groups = explanation, position(explanation, i), wordless(explanation)
    if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
        raise InputError("top is no number of columns", expected="an integer > 0", got=repr(top), fix="choose one")
    one = take(e, [i])
    values = one.values[0]
    order = np.argsort(-values, kind="stable")
    pro = [t for t in order[:top].tolist() if values[t] > 0]
    con = [t for t in order[::-1][:top].tolist() if values[t] < 0]
    target, contrast = one.target.tolist()[0], None if one.contrast is None else one.contrast.tolist()[0]
    inside, output = bool(one.target[0] == one.decided[0]), float(one.output[0])
    said = words(e.kind)
    return ForAndAgainst(
        row=row_label(e, i),
        question=said.why(target, contrast, inside, output),
        sentence=of_row(one, 0, groups=groups).sentence,
        output=output,
        unit=e.unit,
        pro=tuple(reason(one, t, groups) for t in pro),
        con=tuple(reason(one, t, groups) for t in con),
        others=len(values) - len(pro) - len(con),
        rest=float(np.delete(values, [*pro, *con]).sum()),
        residual_parts=parts_of(one, 0),
        heads=said.asked(target),
        does=said.does_it.lower(),
        notes=notes(one, 0),
    )
