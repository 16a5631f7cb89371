"""The rows that a page shows one by one: which of them, and what is embedded of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lrp.errors import InputError
from neuralize._taken import position, row_label, take, wordless
from neuralize._words import count, notes, words
from neuralize.explanation import Explanation
from neuralize.reasons import Reason, parts_of, reason
from neuralize.sentences import of_row

__all__ = ["check_alternatives", "choose", "embed", "payloads"]

ROWS, _IN_ALL, _FEWEST = 500, 2000, 50
_BARS, _LIST, _NAMED = 12, 5, 3


def choose(e: Explanation, limit: int = ROWS, wanted: Sequence[int] = ()) -> tuple[npt.NDArray[np.int64], str]:
    """Positions of at most ``limit`` rows, in order, and how they were chosen.

    A third nearest to the border (output 0), a third farthest from it, the
    rest drawn at random with a fixed seed. Of a density, where 0 is no border:
    the lowest and the highest. ``wanted`` positions are added to them.
    """
    n = len(e)
    if n <= limit:
        return np.arange(n), f"All {count(n, 'row')}." if n > 1 else "The only row."
    third = limit // 3
    size = e.output if e.kind == "density" else np.abs(e.output)
    order = np.argsort(size, kind="stable")
    near, far = order[:third], order[n - third :]
    left = limit - 2 * third
    drawn = np.random.default_rng(0).choice(order[third : n - third], left, replace=False)
    first, last = words(e.kind).ends
    text = f"{limit:,} of {count(n, 'row')}: the {third:,} {first}, the {third:,} {last}, and {left:,} drawn at random."
    rows = np.concatenate([near, far, drawn])
    asked = np.setdiff1d([position(e, i) for i in wanted], rows).astype(np.int64)
    if len(asked):
        text = f"{text[:-1]}; and {count(len(asked), 'row')} asked for."
    return np.sort(np.concatenate([rows, asked])), text


def limit_for(alternatives: int) -> int:
    """Rows to embed of each explanation, so that all together stay few."""
    return max(_FEWEST, min(ROWS, _IN_ALL // (1 + alternatives)))


def check_alternatives(e: Explanation, alternatives: Mapping[str, Explanation]) -> None:
    """Raise ``InputError`` unless all explain the rows of ``e``."""
    for question, other in alternatives.items():
        same = (
            isinstance(other, Explanation)
            and other.feature_names == e.feature_names
            and len(other) == len(e)
            and _same(other.data, e.data)
        )
        if not same:
            raise InputError(
                f"the alternative {question!r} is no explanation of the same rows",
                expected=f"the {len(e)} rows and {len(e.feature_names)} columns of the explanation, in the same order",
                got="others" if isinstance(other, Explanation) else type(other).__name__,
                fix="explain the same table with another target or contrast, as neuralize.page.alternatives does",
            )


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or hasattr(a, "toarray") != hasattr(b, "toarray"):
        return False
    if hasattr(a, "toarray"):
        return bool((a != b).nnz == 0)
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f" and b.dtype.kind == "f")


def _small(value: float) -> float | None:
    """Five significant digits; None for what JSON has no number for."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _scope(e: Explanation) -> tuple[str, str]:
    """What is explained and what it is compared with, for a whole table."""
    said, own = words(e.kind), bool((e.target == e.decided).all())
    single = len(e.labels) > 1 and not own and len(np.unique(e.target)) == 1
    target = said.name(e.target.tolist()[0]) if single else said.scope(own)
    if e.contrast is None:
        return target, "all others"
    rivals = np.unique(e.contrast).tolist()
    return target, said.name(rivals[0]) if len(rivals) == 1 else "the contrast"


def _item(place: int, r: Reason) -> list[Any]:
    return [place, r.shown, "" if r.point == "-" else r.point, _small(r.relevance)]


def _row(e: Explanation, position: int, groups: frozenset[str]) -> dict[str, Any]:
    """What is embedded of a row; its items, rest and parts add up to its output."""
    one = take(e, [position])
    _ = one.slope  # once, before it is taken apart
    said, values = words(one.kind), one.values[0]
    up = np.argsort(-values, kind="stable")
    pro = [t for t in up[:_LIST].tolist() if values[t] > 0]
    con = [t for t in up[::-1][:_LIST].tolist() if values[t] < 0]
    bars = np.argsort(-np.abs(values), kind="stable")[:_BARS].tolist()
    named = list(dict.fromkeys([*bars, *pro, *con]))
    target, decided = one.target.tolist()[0], one.decided.tolist()[0]
    contrast = None if one.contrast is None else one.contrast.tolist()[0]
    rest = np.delete(np.arange(len(values)), named)
    return {
        "row": position,
        "name": row_label(e, position),
        "target": said.name(target) + ("" if contrast is None else f" rather than {said.name(contrast)}"),
        "decided": said.name(decided),
        "why": said.why(target, contrast, target == decided, float(one.output[0])),
        "heads": said.asked(target),
        "output": _small(float(one.output[0])),
        "coverage": _small(float(one.coverage[0])),
        "sentence": of_row(one, 0, groups=groups).sentence,
        "items": [_item(t, reason(one, t, groups)) for t in named],
        "bars": len(bars),
        "pro": [named.index(t) for t in pro],
        "con": [named.index(t) for t in con],
        "rest": [len(rest), _small(float(values[rest].sum()))],
        "parts": [[name, _small(size)] for name, size in parts_of(one, 0).items()],
        "notes": notes(one, 0),
    }


def payload(e: Explanation, rows: npt.NDArray[np.int64], question: str) -> dict[str, Any]:
    """What is embedded of one explanation."""
    groups = wordless(e)
    if len(rows) > len(e) // 4 and not hasattr(e.values, "toarray"):
        _ = e.slope  # of all rows at once: sooner done than one by one
    target, contrast = _scope(e)
    coverage = float(np.median(e.coverage))
    return {
        "question": question,
        "target": target,
        "contrast": contrast,
        "unit": e.unit,
        "coverage": _small(coverage),
        "weak": not 0.5 <= coverage <= 2,
        "rows": [_row(e, position, groups) for position in rows.tolist()],
    }


def payloads(
    e: Explanation, alternatives: Mapping[str, Explanation], rows: npt.NDArray[np.int64]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Of the explanation and of every alternative, and the names of the columns that occur in them.

    Target and contrast tell the explanations apart.
    """
    found = [payload(e, rows, e.question)]
    found += [payload(other, rows, question) for question, other in alternatives.items()]
    if len({(p["target"], p["contrast"]) for p in found}) < len(found):
        for p in found:
            p["target"], p["contrast"] = p["question"], ""
    items = [item for p in found for row in p["rows"] for item in row["items"]]
    named = sorted({item[0] for item in items})
    place = {t: k for k, t in enumerate(named)}
    for item in items:
        item[0] = place[item[0]]
    return found, [e.feature_names[t] for t in named]


def top_columns(row: dict[str, Any], names: list[str]) -> list[tuple[str, str]]:
    """Sign and text of a row's strongest columns."""
    return [
        ("+" if size > 0 else "−", names[t] + ("" if shown == "-" else f" {shown}"))
        for t, shown, _, size in row["items"][:_NAMED]
        if size
    ]


def embed(value: Any) -> str:
    """JSON that can stand in a script element whatever the names in it are."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text
